"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import click

from glm4v_batch import __version__
from glm4v_batch.errors import Glm4vBatchError

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns the errors that users meet into a message and an exit code, in this one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Glm4vBatchError as error:
            click.echo(f"Error: {error}", err=True)
            if error.hint:
                click.echo(f"  {error.hint}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            # A run handles it itself; this one came before or after.
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


_job_file = click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))
_out_folder = click.argument(
    "folder", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


def _job_options(command: _Command) -> _Command:
    setting = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="A.B=C",
        help="Change a setting of the job file; repeatable.",
    )
    return _job_file(setting(command))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glm4v-batch")
def main() -> None:
    """Caption and annotate images in bulk with GLM-4V models.

    \b
    Example:
        glm4v-batch init jobs/mine.yaml
        glm4v-batch plan jobs/mine.yaml
        glm4v-batch run jobs/mine.yaml
    """


@main.command()
@_job_options
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows of the source.")
@_as_json
@click.pass_context
def run(
    ctx: click.Context, job_file: Path, overrides: tuple[str, ...], limit: int | None, as_json: bool
) -> None:
    """Do what is left of a job, and commit it part by part.

    Run the same command again after an interruption: it goes on where it stopped.

    \b
    Example:
        glm4v-batch run jobs/caption.yaml --limit 100
    """
    from glm4v_batch.executor import run as run_job
    from glm4v_batch.job import read_job
    from glm4v_batch.plan import open_job
    from glm4v_batch.progress import Progress
    from glm4v_batch.render import outcome_as_json, outcome_as_text

    with (
        closing(run_job(open_job(read_job(job_file, overrides)), limit)) as events,
        Progress(sys.stderr) as progress,
    ):
        outcome = progress.follow(events)
    command_line = shlex.join(["glm4v-batch", *sys.argv[1:]])
    click.echo(outcome_as_json(outcome) if as_json else outcome_as_text(outcome, command_line))
    ctx.exit(outcome.exit_code)


@main.command()
@_job_options
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows of the source.")
@_as_json
def plan(job_file: Path, overrides: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Show what `run` would do: rows that are left, model, device, memory.

    \b
    Example:
        glm4v-batch plan jobs/caption.yaml
    """
    from glm4v_batch.job import read_job
    from glm4v_batch.plan import make_plan, open_job
    from glm4v_batch.render import plan_as_json, plan_as_text

    made = make_plan(open_job(read_job(job_file, overrides)), limit)
    click.echo(plan_as_json(made) if as_json else plan_as_text(made))


@main.command()
@_job_options
@_as_json
def validate(job_file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a job file; all mistakes are shown at once, with their lines.

    \b
    Example:
        glm4v-batch validate jobs/caption.yaml
    """
    from glm4v_batch.job import read_job
    from glm4v_batch.render import job_as_json

    job = read_job(job_file, overrides)
    click.echo(job_as_json(job) if as_json else f"{job_file} is a complete job: {job.name}.")


@main.command()
@_job_options
@click.option(
    "-n", "num_rows", type=click.IntRange(min=1), default=4, show_default=True, help="Rows to show."
)
@_as_json
def inspect(job_file: Path, overrides: tuple[str, ...], num_rows: int, as_json: bool) -> None:
    """Show rows as the model will see them: prompt, image sizes, tokens.

    \b
    Example:
        glm4v-batch inspect jobs/caption.yaml -n 2
    """
    from glm4v_batch.inspection import inspect_rows
    from glm4v_batch.job import read_job
    from glm4v_batch.plan import open_job
    from glm4v_batch.render import rows_as_json, rows_as_text

    rows = inspect_rows(open_job(read_job(job_file, overrides)), num_rows)
    click.echo(rows_as_json(rows) if as_json else rows_as_text(rows))


@main.command()
@_out_folder
@_as_json
def status(folder: Path, as_json: bool) -> None:
    """Show what an output folder holds, from the folder alone.

    \b
    Example:
        glm4v-batch status out/caption
    """
    from glm4v_batch.render import status_as_json, status_as_text
    from glm4v_batch.status import read_status

    found = read_status(folder)
    click.echo(status_as_json(found) if as_json else status_as_text(found))


@main.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default=Path("jobs/caption.yaml"))
def init(path: Path) -> None:
    """Write a commented job file to begin with.

    \b
    Example:
        glm4v-batch init jobs/mine.yaml
    """
    from glm4v_batch.job import write_template

    write_template(path)
    click.echo(f"Wrote {path}. Edit it, then: glm4v-batch plan {path}")


@main.command()
def schema() -> None:
    """Print the JSON Schema of a job file, with which editors complete it.

    \b
    Example:
        glm4v-batch schema > job.schema.json
    """
    from glm4v_batch.job import job_schema
    from glm4v_batch.render import as_json

    click.echo(as_json(job_schema()))


if __name__ == "__main__":
    main()
