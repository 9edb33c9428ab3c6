"""Whole runs over several replica processes, on the echo engine: whoever dies, every record stands once."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import MakeSource
from tests.e2e.command import AT_ONCE, ROOT, command, run_command, wait_until, write_job
from tests.e2e.test_run_echo import contents, rows_of
from tests.faults.runs import orphans

REPLICAS = ["batching: {engine: echo, max_batch_size: 8, echo_seconds: 0.15, echo_replicas: 3}"]


@contextmanager
def started(job: Path, mark: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the background, whose processes carry *mark* in their environment."""
    with subprocess.Popen(
        command("run", job),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GLM4V_TEST_MARK": str(mark)},
        start_new_session=True,
    ) as process:
        yield process


def wait_for_parts(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    wait_until(process, lambda: len(list(folder.glob("part-*.parquet"))) >= count)


def replica_pids(mark: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_ours = f"GLM4V_TEST_MARK={mark}".encode() in (path / "environ").read_bytes()
            found += [int(path.name)] if is_ours and (path / "comm").read_text() == "glm4v-replica\n" else []
    return found


def test_replicas_leave_the_same_rows_as_one_process(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(600, broken=(4,))
    one = write_job(tmp_path / "one.yaml", source, tmp_path / "one")
    three = write_job(tmp_path / "three.yaml", source, tmp_path / "three", extra=REPLICAS)

    run_command("run", one)
    finished = run_command("run", three)

    assert finished.returncode == 3, finished.stderr
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert finished.stderr.count("ready after") == 3


def test_replicas_killed_in_mid_run_cost_no_record(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(600)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out", extra=REPLICAS)

    with started(job, tmp_path) as process:
        for num_parts in (1, 3, 5):
            wait_for_parts(process, tmp_path / "out", num_parts)
            os.kill(random.Random(num_parts).choice(replica_pids(tmp_path)), signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)

    assert process.returncode == 0, stderr
    assert stderr.count("its process died: signal 9") == 3, stderr
    assert [row["row"] for row in rows_of(tmp_path / "out")] == list(range(600))
    assert {row["status"] for row in rows_of(tmp_path / "out")} == {"ok"}


def test_no_replica_outlives_a_killed_run(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(600), tmp_path / "out", extra=REPLICAS)
    with started(job, tmp_path) as process:
        wait_for_parts(process, tmp_path / "out", 1)
        wait_until(process, lambda: len(replica_pids(tmp_path)) == 3)
        process.kill()

    assert orphans(process.pid) == []


def test_a_killed_run_goes_on_to_the_parts_of_an_uninterrupted_one(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(400)
    whole = write_job(tmp_path / "whole.yaml", source, tmp_path / "whole")
    killed = write_job(tmp_path / "killed.yaml", source, tmp_path / "killed", extra=REPLICAS)
    run_command("run", whole)

    with started(killed, tmp_path) as process:
        wait_for_parts(process, tmp_path / "killed", 2)
        process.kill()
    resumed = run_command("run", killed, *AT_ONCE)

    assert resumed.returncode == 0, resumed.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_an_interrupted_run_keeps_what_the_batches_in_hand_completed(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(1000), tmp_path / "out", extra=REPLICAS)

    with started(job, tmp_path) as process:
        wait_for_parts(process, tmp_path / "out", 2)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)

    assert process.returncode == 143, stderr
    assert time.monotonic() - begun < 10
    assert f"Resume with: glm4v-batch run {job}" in stdout
    assert "Traceback" not in stderr
