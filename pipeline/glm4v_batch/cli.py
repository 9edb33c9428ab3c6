"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import click

from glm4v_batch import __version__
from glm4v_batch.errors import Glm4vBatchError, printable
from glm4v_batch.interruption import SignalledError, ended_by_signals, let_the_next_one_end_it

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from glm4v_batch.asked import Asked

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns the errors that users meet into a message and an exit code, in this one place."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click's, on streams that may be closed, full or read by nobody: help and usage errors too.

        For a process of its own: what it does with the streams and with signals is not undone.
        """
        _open_closed_streams()
        sys.stdout, sys.stderr = _undemanding(sys.stdout, 1), _undemanding(sys.stderr, 2)
        return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            # From the first import: what Ctrl-C raises there may come wrapped, or not at all.
            with ended_by_signals():
                return super().invoke(ctx)
        except Glm4vBatchError as error:
            _say(_told(error, ctx), err=True)
            ctx.exit(error.exit_code)
        except SignalledError as signalled:
            # What came once records were in hand ends the run by an outcome; this one came before or after.
            # Which command would resume is known once a run has read its options.
            resume = f" Resume with: {_resume_command(ctx)}" if _UNTIL in ctx.meta else ""
            _say(f"Interrupted.{resume}", err=True)
            ctx.exit(128 + signalled.signal_number)
        finally:
            # All is told: what comes now would only leave a traceback of what it met while all is taken down.
            let_the_next_one_end_it()


def _told(error: Glm4vBatchError, ctx: click.Context) -> str:
    lines = [f"Error: {error}", *([f"  {error.hint}"] if error.hint else [])]
    if error.progress:
        lines += [f"  {error.progress}", f"  Resume with: {_resume_command(ctx)}"]
    return "\n".join(lines)


_UNTIL = "glm4v_batch.until"


def _resume_command(ctx: click.Context, *, is_late: bool = False) -> str:
    from glm4v_batch.deadline import resume_command

    return resume_command(sys.argv[1:], None if is_late else ctx.meta.get(_UNTIL))


def _open_closed_streams() -> None:
    """Have closed standard streams lead nowhere: the next file opened would take their number.

    A message written to descriptor 2 would then end up in a part, for one.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


class _Undemanding(io.FileIO):
    """A standard stream whose reader may be gone, or its disk full: what it does not take is dropped."""

    def write(self, data: "ReadableBuffer") -> int:
        """Write of *data* what is taken, and pass over the rest: how many bytes are done with."""
        try:
            # None, of which the stubs do not know, where a non-blocking stream's reader is slow.
            while (num_written := cast(int | None, super().write(data))) is None:
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return num_written


def _undemanding(stream: TextIO, number: int) -> TextIO:
    """*stream*, of descriptor *number*, such that the exit code says what it has to although nobody reads.

    Caught where something is printed, an error would come again: the interpreter flushes at its end.
    What a program has put in the place of its standard streams stays as it is.
    """
    if stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    buffer = io.BufferedWriter(_Undemanding(number, "w", closefd=False))
    is_told_at_once = stream.line_buffering or cast(io.TextIOWrapper, stream).write_through
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=is_told_at_once)


def _say(text: str, *, err: bool = False) -> None:
    click.echo(printable(text), err=err)


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


_ANY_CODE = "any"


def _asked(command: _Command) -> _Command:
    """The options of `run` and `plan` that say which rows to do, as one `Asked`."""
    limit = click.option(
        "--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows of the source."
    )
    retry = click.option(
        "--retry-failed",
        multiple=True,
        is_flag=False,
        flag_value=_ANY_CODE,
        metavar="[CODE]",
        callback=_codes,
        help="Do failed rows again, and no others: all, or those of this error code; repeatable.",
    )
    on_changed = click.option(
        "--on-changed",
        type=click.Choice(["refuse", "redo"]),
        default="refuse",
        show_default=True,
        help="What to do about a source that changed after its rows were committed.",
    )

    @wraps(command)
    def with_asked(
        *arguments: Any,
        limit: int | None,
        retry_failed: frozenset[str] | None,
        on_changed: str,
        **others: Any,
    ) -> Any:
        from glm4v_batch.asked import Asked

        if retry_failed is not None and on_changed == "redo":
            raise click.UsageError(
                "--retry-failed does no new rows, and --on-changed redo makes some: one after the other."
            )
        asked = Asked(limit=limit, redo_changed=on_changed == "redo", retry=retry_failed)
        return command(*arguments, asked=asked, **others)

    return cast(_Command, limit(retry(on_changed(with_asked))))


def _codes(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> frozenset[str] | None:
    from glm4v_batch.failure_codes import FAILURE_KINDS
    from glm4v_batch.mistakes import suggest

    for code in given:
        if code != _ANY_CODE and code not in FAILURE_KINDS:
            guess = suggest(code, [*FAILURE_KINDS]) or ". Put JOB first, or write --retry-failed=CODE."
            raise click.BadParameter(f"{code} is no failure code{guess}")
    if not given:
        return None
    return frozenset() if _ANY_CODE in given else frozenset(given)


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
@_asked
@click.option("--until", metavar="TIME", help="Begin nothing that would not be done by then, such as 06:00.")
@_as_json
@click.pass_context
def run(
    ctx: click.Context,
    job_file: Path,
    overrides: tuple[str, ...],
    asked: "Asked",
    until: str | None,
    as_json: bool,
) -> None:
    """Do what is left of a job, and commit it part by part.

    Run the same command again after an interruption: it goes on where it stopped.

    \b
    Example:
        glm4v-batch run jobs/caption.yaml --limit 100
        glm4v-batch run jobs/caption.yaml --until 06:00
        glm4v-batch run jobs/caption.yaml --retry-failed
    """
    from glm4v_batch.deadline import read_deadline
    from glm4v_batch.job import read_job
    from glm4v_batch.output import locked
    from glm4v_batch.render import outcome_as_json, outcome_as_text

    deadline = None if until is None else read_deadline(until)
    ctx.meta[_UNTIL] = deadline
    job = read_job(job_file, overrides)
    # First of all that takes time, the other imports too: a second run is to be refused at once.
    with locked(Path(job.output.path)) as lock:
        from glm4v_batch.executor import run_locked
        from glm4v_batch.plan import open_job
        from glm4v_batch.progress import Progress

        with (
            closing(run_locked(lock, open_job(job), asked, deadline)) as events,
            Progress(sys.stderr) as progress,
        ):
            outcome = progress.follow(events)
    resume = _resume_command(ctx, is_late=outcome.is_late)
    _say(outcome_as_json(outcome) if as_json else outcome_as_text(outcome, resume))
    ctx.exit(outcome.exit_code)


@main.command()
@_job_options
@_asked
@_as_json
def plan(job_file: Path, overrides: tuple[str, ...], asked: "Asked", as_json: bool) -> None:
    """Show what `run` would do: rows that are left, model, device, memory.

    \b
    Example:
        glm4v-batch plan jobs/caption.yaml
    """
    from glm4v_batch.job import read_job
    from glm4v_batch.plan import make_plan, open_job
    from glm4v_batch.render import plan_as_json, plan_as_text

    made = make_plan(open_job(read_job(job_file, overrides)), asked)
    _say(plan_as_json(made) if as_json else plan_as_text(made))


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
    _say(job_as_json(job) if as_json else f"{job_file} is a complete job: {job.name}.")


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
    _say(rows_as_json(rows) if as_json else rows_as_text(rows))


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
    _say(status_as_json(found) if as_json else status_as_text(found))


@main.command()
@_out_folder
@click.option("--source", "with_source", is_flag=True, help="Compare with the input as well.")
@_as_json
@click.pass_context
def verify(ctx: click.Context, folder: Path, with_source: bool, as_json: bool) -> None:
    """Prove that every row stands exactly once; exit 5 where one does not.

    Reads every page of every part and changes nothing, so it may run beside a run. With --source,
    rows are counted against the input that the job names, from the same current folder.

    \b
    Example:
        glm4v-batch verify out/caption --source
    """
    from glm4v_batch.verdict_text import verdict_as_json, verdict_as_text
    from glm4v_batch.verify import verify as verify_folder

    verdict = verify_folder(folder, with_source=with_source)
    _say(verdict_as_json(verdict) if as_json else verdict_as_text(verdict))
    ctx.exit(verdict.exit_code)


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
    _say(f"Wrote {path}. Edit it, then: glm4v-batch plan {path}")


@main.command()
def schema() -> None:
    """Print the JSON Schema of a job file, with which editors complete it.

    \b
    Example:
        glm4v-batch schema > job.schema.json
    """
    from glm4v_batch.job import job_schema
    from glm4v_batch.render import as_json

    _say(as_json(job_schema()))


if __name__ == "__main__":
    main()
