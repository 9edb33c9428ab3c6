"""Whole runs that end before their work does, and what is done about failed and changed rows."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import MakeSource
from tests.e2e.command import AT_ONCE, MODEL, ROOT, command, run_command, wait_until, write_job
from tests.e2e.test_run_echo import SLOW, contents, rows_of
from tests.faults.runs import orphans

QUICK = ["batching: {engine: echo, max_batch_size: 10}"]


def shell(line: str, job: Path) -> int:
    """The exit status of the run in *line*, where it stands as `$RUN`."""
    script = f'set -o pipefail; RUN() {{ {" ".join(command("run", job))} "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, timeout=120, check=False
    ).returncode


@pytest.mark.parametrize(
    "line",
    [
        "RUN | true",
        "RUN 2>&1 | true",
        "RUN >&-",
        "RUN 2>&-",
        "RUN >&- 2>&-",
        "RUN <&- >&- 2>&-",
        "RUN --json | true",
    ],
)
def test_a_run_whose_output_nobody_reads_commits_everything_and_ends_as_it_would(
    tmp_path: Path, make_source: MakeSource, line: str
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(60, broken=(7,)), tmp_path / "out")

    assert shell(line, job) == 3

    assert len(rows_of(tmp_path / "out")) == 60


def test_a_job_that_turns_out_wrong_leaves_no_folder_and_no_other_job_its_own(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    wrong = write_job(tmp_path / "wrong.yaml", tmp_path / "nowhere", tmp_path / "out")

    before = run_command("run", wrong)
    assert not (tmp_path / "out").exists()
    run_command("run", job)
    after = run_command("run", wrong)

    assert (before.returncode, after.returncode) == (4, 4)
    assert len(rows_of(tmp_path / "out")) == 10
    assert (tmp_path / "out" / ".glm4v-batch" / "job.json").is_file()


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(0) / "nowhere", tmp_path / "out")

    assert shell("RUN 2>&1 | true", job) == 4
    assert shell("RUN 2>&-", job) == 4


def test_a_held_folder_is_refused_before_the_source_is_opened(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", tmp_path / "no such folder", tmp_path / "out")
    (tmp_path / "out" / ".glm4v-batch").mkdir(parents=True)
    with (tmp_path / "out" / ".glm4v-batch" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        refused = run_command("run", job)

    assert refused.returncode == 75, refused.stderr


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGHUP)]
)
def test_a_second_signal_of_another_kind_ends_the_run_at_once_too(
    tmp_path: Path, make_source: MakeSource, first: signal.Signals, second: signal.Signals
) -> None:
    slow = ["batching: {engine: echo, max_batch_size: 20, echo_seconds: 20}"]
    job = write_job(tmp_path / "job.yaml", make_source(60), tmp_path / "out", extra=slow)
    process = subprocess.Popen(
        [*command("run", job, "--set", "batching.echo_replicas=1")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(second, signal.SIG_DFL),
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("ready" in line for line in lines)
    time.sleep(3)  # a batch is in hand

    process.send_signal(first)
    assert any("once more" in line for line in lines)
    process.send_signal(second)
    began = time.monotonic()
    process.communicate()

    # An interrupted wait may end by itself, but not before its grace.
    assert process.returncode == -second
    assert time.monotonic() - began < 20


def test_a_deadline_ends_the_run_with_whole_parts_and_the_way_to_go_on(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(400), tmp_path / "out", extra=SLOW)
    until = datetime.now().astimezone() + timedelta(seconds=4)

    ended = run_command("run", job, "--until", until.isoformat())

    # 400 rows take 7.5 s at the least.
    assert ended.returncode == 143, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"Resume with: glm4v-batch run {job}"
    assert "Out of time" in ended.stdout
    # None at all where the machine is so slow that the time is over before the run begins.
    num_committed = 20 * len(contents(tmp_path / "out"))
    assert num_committed < 400
    assert f"{num_committed} of 400 rows are committed" in ended.stdout
    assert run_command("run", job, *AT_ONCE).returncode == 0
    assert len(rows_of(tmp_path / "out")) == 400


def test_a_deadline_that_has_passed_does_nothing_and_says_so(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(40), tmp_path / "out")

    ended = run_command("run", job, "--until", "2020-01-01T06:00", "--json")
    answer = json.loads(ended.stdout)

    assert (ended.returncode, answer["exit_code"]) == (143, 143)
    assert "2020-01-01 06:00" in answer["stopped"]
    assert not (tmp_path / "out").exists()


def test_a_retry_that_is_out_of_time_says_that_failed_rows_are_left(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(12, broken=(1, 4, 7, 10)), tmp_path / "out")
    run_command("run", job)

    ended = run_command("run", job, "--retry-failed", "--until", "2020-01-01T00:00")

    assert ended.returncode == 143, ended.stderr
    told, resume = ended.stdout.splitlines()
    assert told.endswith(f" 0 of 4 failed rows in {tmp_path / 'out'} were done again.")
    assert resume == f"Resume with: glm4v-batch run {job} --retry-failed"


def test_a_finished_job_has_no_deadline(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    run_command("run", job)

    assert run_command("run", job, "--until", "2020-01-01T06:00").returncode == 0


def test_a_run_stops_when_everything_fails_and_goes_on_when_that_is_meant(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(300, broken=tuple(range(300)))
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out", extra=QUICK, rows_per_part=30)

    stopped = run_command("run", job)
    committed = len(rows_of(tmp_path / "out"))
    retried = run_command("run", job, "--retry-failed")
    meant = run_command("run", job, "--set", "limits.failed_fraction=null")

    assert stopped.returncode == 4, stopped.stderr
    assert "100 of the last 100 records failed (100 × image_format)" in stopped.stdout
    assert f"Resume with: glm4v-batch run {job}" in stopped.stdout
    # The part that the hundredth failure lies in is not committed.
    assert committed == 90
    assert "--retry-failed" in stopped.stdout
    assert retried.returncode == 3
    assert meant.returncode == 3
    assert len(rows_of(tmp_path / "out")) == 300


def test_a_small_input_may_fail_as_a_whole(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(60, broken=tuple(range(60))), tmp_path / "out")

    assert run_command("run", job).returncode == 3


def test_a_changed_source_is_redone_when_asked_for(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(60)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    make_source(50, broken=(3,))

    refused = run_command("run", job)
    redone = run_command("run", job, "--on-changed", "redo")

    assert refused.returncode == 4
    assert "--on-changed redo" in refused.stderr
    assert redone.returncode == 3, redone.stderr
    assert "changed: " in redone.stderr
    assert [row["row"] for row in rows_of(tmp_path / "out")] == list(range(50))


def test_failed_rows_are_retried_from_the_command_line(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(60, broken=(3, 44)), tmp_path / "out")
    run_command("run", job)

    shown = json.loads(run_command("plan", job, "--retry-failed", "--json").stdout)
    again = run_command("run", job, "--retry-failed=image_format")

    assert shown["retry"] == {"rows": 2, "failures": {"image_format": 2}, "stuck": 0}
    assert again.returncode == 3
    assert "2 failed rows" in again.stdout
    assert "0 ok, 2 failed again" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retry-failed", "jobs/x.yaml"], "is no failure code"),
        (["--retry-failed", "--on-changed", "redo"], "one after the other"),
        (["--until", "soon"], "is no time"),
        (["--on-changed", "maybe"], "maybe"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_made(
    tmp_path: Path, make_source: MakeSource, options: list[str], message: str
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")

    refused = run_command("run", job, *options)

    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_message_to_a_closed_stream_never_lands_in_a_file_of_ours(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(400), tmp_path / "out", extra=SLOW)
    with subprocess.Popen(
        ["bash", "-c", f"exec {' '.join(command('run', job))} >&- 2>&-"], cwd=ROOT
    ) as process:
        wait_until(process, lambda: contents(tmp_path / "out"))
        os.kill(process.pid, signal.SIGTERM)

    assert process.returncode == 143
    state = tmp_path / "out" / ".glm4v-batch"
    assert b"Stopping" not in b"".join(path.read_bytes() for path in state.iterdir() if path.is_file())
    assert run_command("run", job, *AT_ONCE).returncode == 0
    assert len(rows_of(tmp_path / "out")) == 400


def damage(file: Path) -> None:
    """Change a byte of *file* in a page of images, whose checksum then does not hold."""
    data = bytearray(file.read_bytes())
    data[pq.read_metadata(file).row_group(0).column(1).dictionary_page_offset + 200] ^= 1
    file.write_bytes(data)


def test_a_run_that_its_source_ends_says_how_far_it_came_and_how_to_go_on(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(120, shards=3)
    last = source / "shard-2.parquet"
    pq.write_table(pq.read_table(last), last, write_page_checksum=True)
    damage(last)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out", rows_per_part=40)

    ended = run_command("run", job, "--limit", 120)

    assert ended.returncode == 4, ended.stderr
    assert ended.stderr.splitlines()[-2:] == [
        f"  80 of 120 rows were committed in {tmp_path / 'out'} by then.",
        f"  Resume with: glm4v-batch run {job} --limit 120",
    ]
    report = json.loads((tmp_path / "out" / ".glm4v-batch" / "report.json").read_text())
    assert report["rows"] == {"ok": 80, "failed": 0, "committed": 80}
    assert len(rows_of(tmp_path / "out")) == 80


def test_an_error_before_any_work_counts_no_rows(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    run_command("run", job)
    make_source(11)

    refused = run_command("run", job)

    assert refused.returncode == 4
    assert "by then" not in refused.stderr
    assert "Resume with" not in refused.stderr


@pytest.fixture
def endless_start(tmp_path: Path, make_source: MakeSource) -> tuple[Path, Path]:
    """A job whose run waits for its model's config as long as nobody writes it, and that file, a FIFO."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    job.write_text(job.read_text().replace(str(MODEL), str(model)))
    return job, model / "config.json"


def wait_for_reader(fifo: Path, process: subprocess.Popen[str]) -> int:
    """Return once someone has opened *fifo*, with its other end."""
    while True:
        assert process.poll() is None, process.communicate()
        with suppress(OSError):
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_work_begins_says_how_to_go_on_and_leaves_nothing(
    tmp_path: Path, endless_start: tuple[Path, Path], number: signal.Signals
) -> None:
    job, fifo = endless_start
    process = subprocess.Popen(
        command("run", job, "--until", "2999-01-01T06:00"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    other_end = wait_for_reader(fifo, process)

    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    os.close(other_end)

    assert process.returncode == 128 + number
    assert said == f"Interrupted. Resume with: glm4v-batch run {job} --until 2999-01-01T06:00\n"
    assert not (tmp_path / "out").exists()
    assert orphans(process.pid) == []


def test_a_signal_while_the_model_loads_says_how_to_go_on(tmp_path: Path, make_source: MakeSource) -> None:
    engine = ["devices: {use: cpu}", "batching: {engine: generate}"]
    job = write_job(tmp_path / "job.yaml", make_source(20), tmp_path / "out", extra=engine)
    process = subprocess.Popen(
        command("run", job), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert any("expected: " in line for line in iter(process.stderr.readline, ""))

    process.send_signal(signal.SIGTERM)
    said, told = process.communicate(timeout=60)

    assert process.returncode == 143, told
    # The plan is told a moment before the work is begun: either says it, each in its own words.
    assert f"Resume with: glm4v-batch run {job}" in said + told
    assert "Traceback" not in told
