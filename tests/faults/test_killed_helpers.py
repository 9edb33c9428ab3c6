"""Whoever helps the driver may be killed: readers, decoders and the server they come from."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import MakeSource
from tests.e2e.command import ROOT, command, run_command, write_job

WANTS_ALL = os.environ.get("FAULTS") == "all"
NUM_ROWS = 120


def helpers(driver: int) -> dict[int, str]:
    """The processes of the driver's session but itself, with the first words of their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == driver != int(path.name) and state != "Z":
                found[int(path.name)] = (
                    f"{(path / 'comm').read_text().strip()} {(path / 'cmdline').read_text()}"
                )
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in folder.glob("part-*.parquet")]
    rows: list[dict[str, Any]] = (
        pa.concat_tables(tables).sort_by([("source", "ascending"), ("row", "ascending")]).to_pylist()
    )
    return rows


@pytest.mark.parametrize(
    "name", ["glm4v-reader", "forkserver", *(["glm4v-decoder", ""] if WANTS_ALL else [])]
)
def test_a_run_outlives_the_death_of_any_helper_and_fails_no_record(
    tmp_path: Path, make_source: MakeSource, name: str
) -> None:
    source = make_source(NUM_ROWS, shards=3)
    slow = ["batching: {engine: echo, max_batch_size: 10, echo_seconds: 0.3}"]
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out", extra=slow, rows_per_part=10)
    assert run_command("run", write_job(tmp_path / "whole.yaml", source, tmp_path / "whole")).returncode == 0
    chance = random.Random(1)
    num_killed = 0

    with subprocess.Popen(
        command("run", job),
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        seen = 0
        while process.poll() is None:
            committed = len(list((tmp_path / "out").glob("part-*.parquet")))
            if committed > seen:
                seen = committed
                chosen = [pid for pid, words in helpers(process.pid).items() if name in words]
                if chosen:
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(sorted(chosen)), signal.SIGKILL)
                        num_killed += 1
            time.sleep(0.01)
        said = process.stderr.read() if process.stderr else b""

    assert process.returncode == 0, said
    assert num_killed >= 1
    whole, ours = rows_of(tmp_path / "whole"), rows_of(tmp_path / "out")
    assert [row["text"] for row in ours] == [row["text"] for row in whole]
    deadline = time.monotonic() + 60
    while helpers(process.pid):
        assert time.monotonic() < deadline, helpers(process.pid)
        time.sleep(0.02)


def test_a_file_swapped_while_its_reader_is_killed_stops_the_run_and_gives_it_no_row(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(1500, shards=2)
    other = pq.read_table(source / "shard-1.parquet")
    titles = pa.array([f"other {row}" for row in range(other.num_rows)])
    pq.write_table(other.set_column(other.schema.get_field_index("title"), "title", titles), tmp_path / "new")
    slow = ["batching: {engine: echo, max_batch_size: 10, echo_seconds: 0.1}"]
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out", extra=slow, rows_per_part=10)

    with subprocess.Popen(
        command("run", job),
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not list((tmp_path / "out").glob("part-*.parquet")):
            time.sleep(0.01)
        (tmp_path / "new").replace(source / "shard-1.parquet")
        for pid, words in helpers(process.pid).items():
            if "glm4v-reader" in words:
                os.kill(pid, signal.SIGKILL)
        said = process.stderr.read().decode() if process.stderr else ""

    assert process.returncode == 4, said
    assert "shard-1.parquet has changed since this run began" in said
    assert "Traceback" not in said
    titles_done = [row["title"] for row in rows_of(tmp_path / "out")]
    assert len(titles_done) >= 750
    assert all(title.startswith("title ") for title in titles_done)
