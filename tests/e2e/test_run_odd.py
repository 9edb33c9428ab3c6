"""Whole runs on odd input, and interrupted at odd moments."""

import json
import os
import re
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import MakeSource, image_bytes
from tests.e2e.command import AT_ONCE, ROOT, command, num_batches, run_command, wait_until, write_job
from tests.e2e.test_run_echo import SLOW, contents, rows_of


def with_line(job: Path, **replacements: str) -> Path:
    lines = job.read_text().splitlines()
    job.write_text("\n".join(replacements.get(line.split(":")[0], line) for line in lines))
    return job


def write_table(folder: Path, columns: dict[str, pa.Array]) -> Path:
    folder.mkdir()
    table = pa.table(columns)
    images = pa.array([image_bytes(row) for row in range(table.num_rows)])
    pq.write_table(table.append_column("image", images), folder / "shard.parquet")
    return folder


def test_columns_of_any_type_pass_through_unchanged(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([1, 2, 3]),
        "title": pa.array(["a", None, "c"]),
        "year_10000": pa.array([300_000_000_000_000_000] * 3, pa.timestamp("us")),
        "nanoseconds": pa.array([1, 2, 3], pa.time64("ns")),
        "tags": pa.array([["x", "y"], [], None]),
        "size": pa.array([{"w": 1}, {"w": 2}, None]),
        "nothing": pa.nulls(3),
        "when": pa.array([datetime(2026, 11, 22, tzinfo=UTC)] * 3),
    }
    source = write_table(tmp_path / "source", columns)
    passed = [name for name in columns if name != "id"]
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    with_line(
        job,
        output=f"output: {{path: {tmp_path}/out, rows_per_part: 2, columns: [{', '.join(passed)}]}}",
        prompt='prompt: {user: "Describe."}',
    )

    finished = run_command("run", job)

    assert finished.returncode == 0, finished.stderr
    out = pq.read_table(tmp_path / "out").sort_by("row")
    for name in passed:
        assert out.column(name).combine_chunks().equals(pa.chunked_array([columns[name]]).combine_chunks()), (
            name
        )
    assert out.column("id").to_pylist() == ["1", "2", "3"]


def test_text_that_is_not_utf8_leaves_the_part_readable(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe bad", b"fine"]).cast(pa.string(), safe=False)
    source = write_table(tmp_path / "source", {"id": pa.array(["a", "b", "c"]), "title": broken})

    finished = run_command("run", write_job(tmp_path / "job.yaml", source, tmp_path / "out"))

    assert finished.returncode == 3, finished.stderr
    frame = pd.read_parquet(tmp_path / "out")
    assert list(frame["status"]) == ["ok", "failed", "ok"]
    assert frame["title"][1].endswith(" bad")


def test_images_are_read_below_the_root_and_nowhere_else(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.png").write_bytes(image_bytes(1))
    (tmp_path / "secret.png").write_bytes(image_bytes(2))
    source = tmp_path / "source"
    source.mkdir()
    paths = ["one.png", "../secret.png", "missing.png", "http://example.org/a.png"]
    table = pa.table({"id": ["a", "b", "c", "d"], "image": paths, "title": ["t"] * 4})
    pq.write_table(table, source / "shard.parquet")
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")

    finished = run_command("run", job, "--set", f"source.root={pictures}")

    assert finished.returncode == 3, finished.stderr
    assert [row["error_code"] for row in rows_of(tmp_path / "out")] == [
        None, "path_outside_root", "image_missing", "url_not_allowed",
    ]  # fmt: skip


def test_trouble_of_the_disk_stops_the_run_and_fails_no_row(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # Reading this file gives EIO to anyone.
    table = pa.table({"id": ["a"], "image": ["self/mem"], "title": ["t"]})
    pq.write_table(table, source / "shard.parquet")
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")

    stopped = run_command("run", job, "--set", "source.root=/proc")

    assert stopped.returncode == 4, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert contents(tmp_path / "out") == {}


def test_the_source_may_lie_in_the_home_folder(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(3)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    done = subprocess.run(
        command("run", job, "--set", f"source.path=~/{source.name}/*.parquet"),
        cwd=ROOT,
        env={**os.environ, "HOME": str(source.parent)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out")) == 3


def test_system_message_and_pixel_limits_reach_the_model(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(1), tmp_path / "out")
    changes = ("--set", "prompt.system=Be {brief}.", "--set", "images.min_pixels=40000")

    (plain,) = json.loads(run_command("inspect", job, "-n", 1, "--json").stdout)
    (changed,) = json.loads(run_command("inspect", job, "-n", 1, "--json", *changes).stdout)

    assert plain["images"] == [[84, 84, 9]]
    assert changed["images"] == [[224, 224, 64]]
    assert "<|system|>\nBe {brief}." in changed["prompt"]


def is_caught(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal, as proc(5) tells."""
    found = re.search(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is not None and bool(int(found.group(1), 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("delay", [0, 0.3, 0.6, 1.2])
def test_a_signal_to_the_whole_group_at_any_time_ends_in_one_line(
    tmp_path: Path, make_source: MakeSource, number: signal.Signals, delay: float
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(400), tmp_path / "out", extra=SLOW)
    process = subprocess.Popen(
        command("run", job),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    wait_until(process, lambda: is_caught(process.pid, signal.SIGTERM))  # else Python is still starting
    time.sleep(delay)

    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=30)

    # Before the run begins a signal ends the process as it ends any other.
    assert process.returncode in (128 + number, -number), stderr
    assert "Traceback" not in stderr
    assert run_command("run", job, *AT_ONCE).returncode == 0
    assert len(rows_of(tmp_path / "out")) == 400


def test_a_signal_that_is_ignored_on_purpose_stays_ignored(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(150), tmp_path / "out", extra=SLOW)
    process = subprocess.Popen(
        ["nohup", *command("run", job)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_until(process, lambda: contents(tmp_path / "out"))

    process.send_signal(signal.SIGHUP)

    assert process.wait(timeout=60) == 0
    assert len(rows_of(tmp_path / "out")) == 150


def test_the_second_signal_ends_the_run_at_once(tmp_path: Path, make_source: MakeSource) -> None:
    slow = ["batching: {engine: echo, max_batch_size: 20, echo_seconds: 8}"]
    job = write_job(tmp_path / "job.yaml", make_source(60), tmp_path / "out", extra=slow)
    process = subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    wait_until(process, lambda: num_batches(tmp_path / "out") == 1)
    time.sleep(2)  # the second batch is in hand

    process.send_signal(signal.SIGTERM)
    # Two that come while the driver waits for the disk would be one.
    assert process.stderr is not None
    assert any(b"once more to stop at once" in line for line in iter(process.stderr.readline, b""))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)

    # A run that had waited for its batch would have ended by itself.
    assert process.returncode == -signal.SIGTERM


def test_an_interrupted_run_commits_what_its_last_batch_completed(
    tmp_path: Path, make_source: MakeSource
) -> None:
    slow = ["batching: {engine: echo, max_batch_size: 40, echo_seconds: 5}"]
    job = write_job(tmp_path / "job.yaml", make_source(160), tmp_path / "out", extra=slow)
    process = subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wait_until(process, lambda: num_batches(tmp_path / "out") == 1)
    time.sleep(2)  # the second batch is in hand

    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)

    assert process.returncode == 143
    assert len(contents(tmp_path / "out")) == 4


def test_a_signal_during_the_last_batch_interrupts_nothing(tmp_path: Path, make_source: MakeSource) -> None:
    slow = ["batching: {engine: echo, max_batch_size: 20, echo_seconds: 5}"]
    job = write_job(tmp_path / "job.yaml", make_source(40), tmp_path / "out", extra=slow)
    process = subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    wait_until(process, lambda: num_batches(tmp_path / "out") == 1)
    time.sleep(2)  # the last batch is in hand

    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)

    assert process.returncode == 0
    assert b"40 rows committed" in stdout


def test_a_run_goes_on_when_nobody_reads_its_progress(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(60, broken=(3,)), tmp_path / "out")
    reader, writer = os.pipe()
    os.close(reader)

    process = subprocess.Popen(command("run", job), cwd=ROOT, stderr=writer, stdout=subprocess.DEVNULL)
    os.close(writer)

    assert process.wait(timeout=60) == 3
    assert len(rows_of(tmp_path / "out")) == 60


def test_a_state_folder_that_cannot_be_used_is_refused(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    (tmp_path / "out" / ".glm4v-batch" / "lock").mkdir(parents=True)

    refused = run_command("run", job)

    assert refused.returncode == 5
    assert "Is a directory" in refused.stderr
    assert "Traceback" not in refused.stderr
