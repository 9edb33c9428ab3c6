"""Whole runs on the echo engine: every record once, whatever happens on the way."""

import json
import signal
import subprocess
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from tests.conftest import MakeSource
from tests.e2e.command import AT_ONCE, ROOT, command, run_command, wait_until, write_job
from tests.faults.runs import of_session, orphans

SLOW = ["batching: {engine: echo, max_batch_size: 8, echo_seconds: 0.15}"]


def rows_of(folder: Path) -> list[dict[str, object]]:
    table = pyarrow.dataset.dataset(sorted(folder.glob("part-*.parquet"))).to_table()
    rows: list[dict[str, object]] = table.sort_by([("source", "ascending"), ("row", "ascending")]).to_pylist()
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def times(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.glob("part-*.parquet"))}


def kill_when_committed(job: Path, folder: Path, num_parts: int, number: int = signal.SIGKILL) -> int:
    """Start a run and send it a signal once *num_parts* stand; its exit status."""
    with subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        wait_until(process, lambda: len(list(folder.glob("part-*.parquet"))) >= num_parts)
        process.send_signal(number)
        process.communicate()
    return process.returncode


def test_a_run_answers_every_row_once_with_its_columns(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(110, shards=2), tmp_path / "out")

    finished = run_command("run", job)

    assert finished.returncode == 0, finished.stderr
    rows = rows_of(tmp_path / "out")
    assert sorted(str(r["id"]) for r in rows) == sorted(f"id-{n}" for n in range(110))
    assert all(r["title"] == f"title {str(r['id']).removeprefix('id-')}" for r in rows)
    assert {r["status"] for r in rows} == {"ok"}
    assert len({r["text"] for r in rows}) == 110
    # Chunks of 20 within two shards of 55 rows.
    assert len(contents(tmp_path / "out")) == 6


def test_a_run_does_not_import_pandas_which_takes_half_a_second(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(20), tmp_path / "out")
    python, *rest = command("run", job)

    finished = subprocess.run(
        [python, "-X", "importtime", *rest], capture_output=True, text=True, cwd=ROOT, check=True
    )

    lines = (line for line in finished.stderr.splitlines() if line.startswith("import time:"))
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "pyarrow" in imported
    assert "pandas" not in imported


def test_a_killed_run_goes_on_to_the_same_parts_as_an_uninterrupted_one(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(400)
    whole = write_job(tmp_path / "whole.yaml", source, tmp_path / "whole")
    killed = write_job(tmp_path / "killed.yaml", source, tmp_path / "killed", extra=SLOW)

    assert run_command("run", whole).returncode == 0
    assert kill_when_committed(killed, tmp_path / "killed", 2) == -signal.SIGKILL
    assert 2 <= len(contents(tmp_path / "killed")) < 20
    resumed = run_command("run", killed, *AT_ONCE)

    assert resumed.returncode == 0, resumed.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert list((tmp_path / "killed/.glm4v-batch/tmp").iterdir()) == []


def has_all_helpers(session: int) -> bool:
    names = [name for _, name in of_session(session)]
    return names.count("glm4v-reader") == 1 and names.count("glm4v-decoder") >= 2


def test_no_process_outlives_a_killed_run(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(400), tmp_path / "out", extra=SLOW)
    with subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        wait_until(process, lambda: has_all_helpers(process.pid))
        process.kill()

    assert orphans(process.pid) == []


def test_a_finished_run_changes_no_part(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(45), tmp_path / "out")
    run_command("run", job)
    before = times(tmp_path / "out")

    again = run_command("run", job)

    assert again.returncode == 0
    assert "Nothing to do" in again.stdout
    assert times(tmp_path / "out") == before


def test_a_run_does_not_let_its_memory_of_batches_grow_for_ever(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(5), tmp_path / "out")
    run_command("run", job)
    batches = tmp_path / "out" / ".glm4v-batch" / "batches.jsonl"
    batches.write_text(batches.read_text() * 10_005)

    run_command("run", job)

    assert len(batches.read_text().splitlines()) == 10_000


def test_another_prompt_on_the_same_folder_is_refused_with_the_key(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10), tmp_path / "out")
    run_command("run", job)
    before = times(tmp_path / "out")

    refused = run_command("run", job, "--set", "prompt.user=Count the cats in {title}.")

    assert refused.returncode == 5
    assert "prompt.user was" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert times(tmp_path / "out") == before


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(1000), tmp_path / "out", extra=SLOW)
    with subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as first:
        wait_until(first, lambda: contents(tmp_path / "out"))

        second = run_command("run", job)

        assert first.poll() is None
        first.kill()
    assert second.returncode == 75
    assert f"process {first.pid}" in second.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_resume(
    tmp_path: Path, make_source: MakeSource, number: signal.Signals, code: int
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(400), tmp_path / "out", extra=SLOW)
    process = subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    wait_until(process, lambda: contents(tmp_path / "out"))

    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)

    assert process.returncode == code, stderr
    assert f"Resume with: glm4v-batch run {job}" in stdout
    assert "Traceback" not in stderr


def test_a_broken_image_is_a_failed_row_and_the_run_goes_on(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(50, broken=(7, 33)), tmp_path / "out")

    finished = run_command("run", job)
    again = run_command("run", job)

    assert finished.returncode == 3, finished.stderr
    failed = [r for r in rows_of(tmp_path / "out") if r["status"] == "failed"]
    assert [r["row"] for r in failed] == [7, 33]
    assert all(r["error_stage"] == "decode" and r["error_code"] and r["error_message"] for r in failed)
    assert [r["title"] for r in failed] == ["title 7", "title 33"]
    assert len(rows_of(tmp_path / "out")) == 50
    assert again.returncode == 3


def test_new_files_are_done_and_finished_ones_stay(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(30)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    before = times(tmp_path / "out")

    make_source(25, name="more").joinpath("shard-0.parquet").rename(source / "shard-9.parquet")
    finished = run_command("run", job)

    assert finished.returncode == 0, finished.stderr
    after = times(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(rows_of(tmp_path / "out")) == 55


def test_a_changed_source_is_refused_before_any_work(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(30)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    before = times(tmp_path / "out")

    make_source(31)
    refused = run_command("run", job)

    assert refused.returncode == 4
    assert "shard-0.parquet" in refused.stderr
    assert times(tmp_path / "out") == before


def test_a_limit_is_about_the_first_rows_and_a_full_run_completes_it(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(50, shards=2), tmp_path / "out")

    run_command("run", job, "--limit", 30)
    assert len(rows_of(tmp_path / "out")) == 30
    again = run_command("run", job, "--limit", 30)
    assert "Nothing to do" in again.stdout
    run_command("run", job)

    assert sorted(str(r["id"]) for r in rows_of(tmp_path / "out")) == sorted(f"id-{n}" for n in range(50))


def test_other_part_sizes_complete_a_folder_without_doubling(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(60), tmp_path / "out", rows_per_part=25)
    run_command("run", job, "--limit", 30)

    finished = run_command("run", job, "--set", "output.rows_per_part=7")

    assert finished.returncode == 0, finished.stderr
    assert [r["row"] for r in rows_of(tmp_path / "out")] == list(range(60))


def test_the_folder_is_read_by_datasets_pandas_and_pyarrow(
    tmp_path: Path, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    job = write_job(tmp_path / "job.yaml", make_source(30, broken=(3,)), tmp_path / "out")
    run_command("run", job)
    out = tmp_path / "out"

    loaded = datasets.load_dataset(
        "parquet", data_files=f"{out}/part-*.parquet", cache_dir=str(tmp_path / "cache"), split="train"
    )
    frame = pd.read_parquet(out)
    table = pq.read_table(out)

    assert len(loaded) == len(frame) == len(table) == 30
    assert table.schema.names[:11] == [
        "id", "text", "status", "finish_reason", "prompt_tokens", "completion_tokens",
        "error_stage", "error_code", "error_message", "source", "row",
    ]  # fmt: skip
    assert loaded[3]["error_code"] == frame.loc[3, "error_code"]
    assert table.schema.field("prompt_tokens").type == pa.int32()


def test_status_reads_the_folder_alone(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(30, broken=(3,))
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    job.unlink()
    (source / "shard-0.parquet").unlink()

    text = run_command("status", tmp_path / "out")
    found = json.loads(run_command("status", tmp_path / "out", "--json").stdout)

    assert text.returncode == 0
    assert "30 rows in 2 parts: 29 ok, 1 failed" in text.stdout
    assert "glm4v-batch run JOB --retry-failed" in text.stdout
    assert (found["num_ok"], found["num_failed"], found["job_name"]) == (29, 1, "test")
    assert list(found["sources"].values()) == [30]
    assert sum(found["failures"].values()) == 1


def test_a_finished_run_answers_in_json(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(10, broken=(3,)), tmp_path / "out")

    answer = json.loads(run_command("run", job, "--json").stdout)

    assert answer["exit_code"] == 3
    assert answer["run"]["rows"] == {"ok": 9, "failed": 1, "committed": 10}
