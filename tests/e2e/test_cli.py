"""What a person at the command line meets: quick answers, mistakes explained, exit codes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm4v_batch.job import read_job
from tests.conftest import MakeSource
from tests.e2e.command import MODEL, ROOT, command, run_command, wait_until, write_job

FIVE_MISTAKES = """\
name: test
source: {kind: parquet, path: data/scenes/*.parquet}
prompt:
  usr: "Describe this picture."
model: {name: data/tiny-glm4v, dtype: int4}
generation:
  max_new_tokens: 0
  temperature: warm
output:
  path: out/test
  path: out/other
"""

HEAVY = {"torch", "transformers", "accelerate", "datasets", "pandas"}


LATE = """
import atexit, os, signal, sys
from glm4v_batch.cli import main

atexit.register(lambda: os.kill(os.getpid(), int(sys.argv.pop())))
main(["validate", "jobs/caption.yaml"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_all_is_told_ends_the_process_without_a_traceback(number: signal.Signals) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LATE, str(int(number))], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert ended.stdout
    assert (ended.returncode, ended.stderr) == (-number, "")


def imported_by(arguments: list[str]) -> set[str]:
    code = (
        "import sys\nfrom glm4v_batch.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('MODULES', *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("MODULES")]
    return set(line.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["validate", "jobs/caption.yaml"],
        ["schema"],
        ["init", "{tmp}/new.yaml"],
        ["status", "{tmp}"],
        ["verify", "{tmp}"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_light_commands_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    modules = imported_by([a.format(tmp=tmp_path) for a in arguments])

    assert "click" in modules
    assert modules & HEAVY == set()
    if arguments[0] not in ("status", "verify"):
        assert "pyarrow" not in modules


def test_an_echo_run_imports_neither_torch_nor_transformers(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(5), tmp_path / "out")

    modules = imported_by(["run", str(job)])

    assert "pyarrow" in modules
    assert modules & {"torch", "transformers", "accelerate"} == set()
    assert list((tmp_path / "out").glob("part-*.parquet"))


def test_five_mistakes_get_five_lines_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(FIVE_MISTAKES)

    refused = run_command("validate", path)

    assert refused.returncode == 2
    lines = [line.strip() for line in refused.stderr.splitlines() if line.strip().startswith("line ")]
    numbers = [line.split(":")[0] for line in lines]
    assert {"line 4", "line 5", "line 7", "line 8", "line 11"} <= set(numbers), refused.stderr
    assert "Did you mean user?" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("command", ["run", "plan", "inspect"])
def test_an_unknown_column_is_refused_before_the_model_loads(
    tmp_path: Path, make_source: MakeSource, command: str
) -> None:
    job = write_job(
        tmp_path / "job.yaml", make_source(5), tmp_path / "out", extra=["batching: {engine: generate}"]
    )

    refused = run_command(command, job, "--set", "prompt.user=Describe {titel}.")

    assert refused.returncode == 2
    assert "titel" in refused.stderr
    assert "title" in refused.stderr
    assert "The columns are: id, image, title." in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_without_files_is_unreadable_input(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", tmp_path / "nowhere", tmp_path / "out")

    assert run_command("run", job).returncode == 4


def test_a_model_that_is_not_there_is_a_mistake_of_the_job(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(5), tmp_path / "out")

    refused = run_command("run", job, "--set", "model.name=data/tinny-glm4v")

    assert refused.returncode == 2
    assert "data/tinny-glm4v" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_model_that_cannot_fit_is_refused_before_it_loads(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(
        tmp_path / "job.yaml", make_source(5), tmp_path / "out", extra=["batching: {engine: generate}"]
    )

    refused = run_command("plan", job, "--set", "devices.memory_fraction=0.00001")

    assert refused.returncode == 6
    assert "MiB for its weights" in refused.stderr


def test_a_gpu_that_is_not_there_cannot_be_used(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(
        tmp_path / "job.yaml", make_source(5), tmp_path / "out", extra=["batching: {engine: generate}"]
    )

    refused = run_command("plan", job, "--set", "devices.use=[99]")

    assert refused.returncode == 6
    assert "devices.use names GPU 99" in refused.stderr


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_folder_that_is_no_output_is_refused(tmp_path: Path, command: str) -> None:
    refused = run_command(command, tmp_path)

    assert refused.returncode == 5
    assert "is not an output folder" in refused.stderr


def test_the_initial_job_file_is_valid_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "jobs" / "mine.yaml"

    first, second = run_command("init", path), run_command("init", path)

    assert first.returncode == 0
    assert (read_job(path).name, read_job(path).output.path) == ("mine", "out/mine")
    assert second.returncode == 2
    assert "exists already" in second.stderr


def test_the_initial_job_file_is_valid_however_long_its_name(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 70}.yaml"

    assert run_command("init", path).returncode == 0
    assert read_job(path).name == "a" * 64


def test_the_schema_describes_every_setting() -> None:
    schema = json.loads(run_command("schema").stdout)

    assert schema["properties"]["generation"]
    settings = [s for section in schema["$defs"].values() for s in section.get("properties", {}).values()]
    assert len(settings) > 25
    assert all("description" in setting for setting in settings)


def test_the_sample_jobs_are_valid() -> None:
    assert {run_command("validate", path).returncode for path in (ROOT / "jobs").glob("*.yaml")} == {0}


def test_plan_says_what_is_left_and_where_the_model_goes(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(
        tmp_path / "job.yaml", make_source(50), tmp_path / "out", extra=["batching: {engine: generate}"]
    )

    text = run_command("plan", job)
    found = json.loads(run_command("plan", job, "--limit", "30", "--json").stdout)

    assert text.returncode == 0
    assert "50 rows" in text.stdout
    assert "room for batches" in text.stdout
    assert found["rows"] == {"total": 30, "committed": 0, "left": 30}
    assert not (tmp_path / "out").exists()


def test_inspect_shows_rows_as_the_model_sees_them(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(9, broken=(1,)), tmp_path / "out")

    text = run_command("inspect", job, "-n", 2)
    first, second = json.loads(run_command("inspect", job, "-n", 2, "--json").stdout)

    assert text.returncode == 0, text.stderr
    assert "84 × 84 pixels as the model sees it, 9 visual tokens" in text.stdout
    assert "<|begin_of_image|><|image|>×9<|end_of_image|>Describe title 0." in first["prompt"]
    assert second["failure"]["code"]
    assert not (tmp_path / "out").exists()


def test_help_of_every_verb_ends_in_an_example() -> None:
    for verb in ("run", "plan", "validate", "inspect", "status", "verify", "init", "schema"):
        assert f"glm4v-batch {verb}" in run_command(verb, "--help").stdout


def test_the_bundled_model_is_laid_out_as_on_the_hub() -> None:
    names = {path.name for path in MODEL.iterdir()}

    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12_000_000


@pytest.mark.parametrize("verb", ["status", "verify", "schema"])
def test_an_answer_that_cannot_be_printed_changes_no_exit_code(
    tmp_path: Path, make_source: MakeSource, verb: str
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(5), tmp_path / "out")
    assert run_command("run", job).returncode == 0
    words = [verb] if verb == "schema" else [verb, tmp_path / "out"]

    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*words), stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(params=["full disk", "closed pipe"])
def unread(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes nothing."""
    if request.param == "full disk":
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, number = os.pipe()
        os.close(reading)
    yield number
    os.close(number)


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("run --help", 0),
        ("nosuch", 2),
        ("run jobs/caption.yaml --nosuch", 2),
        ("run jobs/caption.yaml --retry-failed=nosuch", 2),
    ],
)
def test_help_version_and_usage_errors_that_nobody_reads_keep_their_exit_codes(
    words: str, exit_code: int, unread: int
) -> None:
    done = subprocess.run(
        command(*words.split()), stdout=unread, stderr=unread, timeout=60, cwd=ROOT, check=False
    )

    assert done.returncode == exit_code


def num_bytes_in(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_reader_that_is_slow_gets_the_whole_answer() -> None:
    whole = run_command("schema").stdout
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)

    with os.fdopen(reading) as read_end:
        process = subprocess.Popen(command("schema"), stdout=writing, cwd=ROOT)
        os.close(writing)
        wait_until(process, lambda: num_bytes_in(reading) == 4096)
        heard = read_end.read()

    assert len(whole) > 4096
    assert (process.wait(60), heard) == (0, whole)


def test_no_name_reaches_a_terminal_unescaped(tmp_path: Path, make_source: MakeSource) -> None:
    out = tmp_path / "out \x1b[31m\u202e"
    job = tmp_path / "job.yaml"
    write_job(job, make_source(5), tmp_path / "out")

    said = run_command("run", job, "--set", f"output.path={json.dumps(str(out))}")
    shown = run_command("status", out)
    as_json = run_command("status", out, "--json")

    for text in (said.stdout, said.stderr, shown.stdout, as_json.stdout):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert said.returncode == 0, said.stderr
    assert json.loads(as_json.stdout)


@pytest.mark.parametrize(
    ("setting", "exit_code", "told"),
    [
        ("output.path=" + "x" * 256, 5, "File name too long"),
        ('output.path="a\\0b"', 2, "a null character"),
        ("model.name=" + "x" * 256, 2, "model.name cannot be looked up"),
        ("batching.echo_seconds=1e18", 2, "must be 86400 or less"),
    ],
)
def test_what_no_system_can_do_is_the_jobs_mistake(
    tmp_path: Path, make_source: MakeSource, setting: str, exit_code: int, told: str
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(4), tmp_path / "out")

    finished = run_command("run", job, "--set", setting)

    assert finished.returncode == exit_code, finished.stderr
    assert told in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_night_may_last_longer_than_any_timer(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(4), tmp_path / "out")

    finished = run_command("run", job, "--until", "9999-12-31")

    assert finished.returncode == 0, finished.stderr


def test_a_name_with_a_line_break_stays_on_its_line(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(4)
    next(source.glob("*.parquet")).rename(source / "new\nline.parquet")
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    ran = run_command("run", job)

    told = run_command("status", tmp_path / "out").stdout

    assert ran.returncode == 0, ran.stderr
    assert "new\\nline.parquet: 4 rows" in told
    assert "\nline.parquet" not in told
