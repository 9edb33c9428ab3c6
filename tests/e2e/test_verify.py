"""`verify` as an operator meets it: after a run, beside a run, and when somebody has been at the files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm4v_batch.output import fingerprint
from glm4v_batch.parts import FOOTER_KEY, RESULT_FIELDS, PartInfo, _footer, part_name
from tests.conftest import MakeSource
from tests.e2e.command import ROOT, command, run_command, wait_until, write_job

SLOW = ["batching: {engine: echo, max_batch_size: 8, echo_seconds: 0.15}"]
GIB = 1 << 30


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below *folder*, by what would change if it was written."""
    found = [folder, *folder.rglob("*")]
    return {str(p): (p.lstat().st_ino, p.lstat().st_size, p.lstat().st_mtime_ns) for p in found}


def test_a_finished_run_is_proven_sound_and_complete_and_left_as_it_is(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(50, shards=2, broken=(3,)), tmp_path / "out")
    run_command("run", job)
    before = state_of(tmp_path / "out")

    proven = run_command("verify", tmp_path / "out", "--source")
    found = json.loads(run_command("verify", tmp_path / "out", "--source", "--json").stdout)

    assert proven.returncode == 0, proven.stdout + proven.stderr
    assert proven.stdout.splitlines()[-1] == (
        "Sound and complete: every row of the source stands exactly once: 50 rows, 49 ok and 1 failed."
    )
    assert [source["expected"] for source in found["sources"]] == [25, 25]
    assert (found["exit_code"], found["faults"], found["notices"]) == (0, [], [])
    assert state_of(tmp_path / "out") == before


def test_an_unfinished_folder_is_sound_by_itself_and_wanting_against_its_source(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(50, shards=2), tmp_path / "out")
    run_command("run", job, "--limit", 30)

    alone = run_command("verify", tmp_path / "out")
    against = run_command("verify", tmp_path / "out", "--source")

    assert alone.returncode == 0, alone.stdout
    assert against.returncode == 5
    assert "20 rows of 1 source stand in no part, the first is row 5 of" in against.stdout
    assert "glm4v-batch run JOB" in against.stdout
    assert against.stdout.splitlines()[-1].startswith("Not finished: 30 rows, 30 ok and 0 failed, are sound")


def test_a_lost_part_is_missed_against_the_source(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(50), tmp_path / "out")
    run_command("run", job)
    max((tmp_path / "out").glob("part-*.parquet")).unlink()

    found = json.loads(run_command("verify", tmp_path / "out", "--source", "--json").stdout)

    assert [fault["kind"] for fault in found["faults"]] == ["missing"]
    assert found["sources"][0]["missing"] == [{"first_row": 40, "num_rows": 10}]


def test_a_changed_source_is_a_fault_and_a_vanished_one_is_told(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(60, shards=3)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    (source / "shard-0.parquet").unlink()
    shutil.copy(make_source(7, name="other") / "shard-0.parquet", source / "shard-1.parquet")

    verdict = run_command("verify", tmp_path / "out", "--source")

    assert verdict.returncode == 5
    assert "shard-1.parquet is not what 1 part of it were made from: footer_sha256, sample" in verdict.stdout
    assert "shard-0.parquet is gone; its rows in 1 part are kept, and cannot be compared" in verdict.stdout
    assert verdict.stdout.splitlines()[-1] == "Not sound: 1 fault."


def test_rows_of_a_vanished_source_are_counted_apart_from_those_that_were_compared(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(60, shards=3, broken=(3, 50))
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    (source / "shard-0.parquet").unlink()

    verdict = run_command("verify", tmp_path / "out", "--source")
    found = json.loads(run_command("verify", tmp_path / "out", "--source", "--json").stdout)

    assert verdict.returncode == 0, verdict.stdout
    table = {line.split("  ")[0]: line.split()[-6:] for line in verdict.stdout.splitlines() if "  " in line}
    assert table["all compared"] == ["40", "40", "39", "1", "0", "0"]
    assert table["all others"] == ["?", "20", "19", "1", "0", "0"]
    assert verdict.stdout.splitlines()[-1] == (
        "Sound and complete: every row of the source stands exactly once: 40 rows, 39 ok and 1 failed. "
        "Beside them, of sources that are gone: 20 rows, 19 ok and 1 failed."
    )
    assert [count["expected"] for count in found["sources"]] == [20, 20, None]


def test_a_hole_in_the_rows_of_a_vanished_source_is_told_and_is_no_fault(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(100, shards=2)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    sorted((tmp_path / "out").glob("part-shard-0*"))[1].unlink()
    (source / "shard-0.parquet").unlink()

    verdict = run_command("verify", tmp_path / "out", "--source")

    assert verdict.returncode == 0, verdict.stdout
    assert "20 rows between others of" in verdict.stdout
    assert "shard-0.parquet stand in no part, and it cannot be compared" in verdict.stdout


def test_a_source_that_stands_elsewhere_now_is_recognised(tmp_path: Path, make_source: MakeSource) -> None:
    source = make_source(30)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    (source / "shard-0.parquet").rename(source / "renamed.parquet")

    verdict = run_command("verify", tmp_path / "out", "--source")

    assert verdict.returncode == 0, verdict.stdout
    assert "shard-0.parquet stands at" in verdict.stdout


@pytest.mark.parametrize(("spoil", "code"), [("source", 4), ("description", 5)])
def test_a_source_that_cannot_be_opened_is_no_verdict(
    tmp_path: Path, make_source: MakeSource, spoil: str, code: int
) -> None:
    source = make_source(10)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    run_command("run", job)
    spoiled = source if spoil == "source" else tmp_path / "out" / ".glm4v-batch" / "job.json"
    spoiled.rename(tmp_path / "gone")

    refused = run_command("verify", tmp_path / "out", "--source")

    assert refused.returncode == code
    assert refused.stderr.startswith("Error: ")
    assert "Traceback" not in refused.stderr


def test_verify_beside_a_run_disturbs_nothing_and_says_that_there_is_one(
    tmp_path: Path, make_source: MakeSource
) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(150), tmp_path / "out", extra=SLOW)
    with subprocess.Popen(
        command("run", job), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as running:
        wait_until(running, lambda: list((tmp_path / "out").glob("part-*.parquet")))
        during = json.loads(run_command("verify", tmp_path / "out", "--json").stdout)
        # Its name leaves the lock file before the lock is given up.
        is_held = f"process {running.pid} " in (tmp_path / "out" / ".glm4v-batch" / "lock").read_text()

    assert running.returncode == 0
    assert (during["exit_code"], during["faults"]) == (0, [])
    assert during["holder"] is None or f"process {running.pid}" in during["holder"]
    assert not is_held or during["holder"] is not None
    assert run_command("verify", tmp_path / "out", "--source").returncode == 0


def test_a_folder_that_may_only_be_read_is_proven(tmp_path: Path, make_source: MakeSource) -> None:
    job = write_job(tmp_path / "job.yaml", make_source(30), tmp_path / "out")
    run_command("run", job)
    folders = [tmp_path / "out", *(p for p in (tmp_path / "out").rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)

    verdict = run_command("verify", tmp_path / "out", "--source")

    for folder in folders:
        folder.chmod(0o755)
    assert verdict.returncode == 0, verdict.stderr


def peak_rss_bytes(*arguments: object) -> int:
    """The most resident bytes that the command held."""
    # Asked of the process itself: what wait4 tells counts this one's memory too, from before exec.
    code = (
        "import pathlib\nfrom glm4v_batch.cli import main\n"
        f"try: main({[*map(str, arguments)]!r})\nexcept SystemExit: pass\n"
        "print(pathlib.Path('/proc/self/status').read_text())"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return int(finished.stdout.split("VmHWM:")[1].split()[0]) * 1024


def parts_of(num_parts: int, rows_per_part: int) -> Iterator[tuple[pa.Table, PartInfo]]:
    settings: dict[str, object] = {"output.columns": []}
    for first in range(0, num_parts * rows_per_part, rows_per_part):
        rows = range(first, first + rows_per_part)
        same = {"status": "ok", "text": "a large blue square", "finish_reason": "stop", "source": "a.parquet"}
        table = pa.Table.from_pylist(
            [{**same, "id": f"id-{r}", "row": r, "prompt_tokens": 9, "completion_tokens": 5} for r in rows],
            schema=pa.schema(RESULT_FIELDS),
        )
        source: dict[str, str | int] = {"path": "a.parquet"}
        yield table, PartInfo(fingerprint(settings), settings, source, first, len(rows), len(rows), 0)


def write(folder: Path, table: pa.Table, info: PartInfo) -> None:
    name = part_name(str(info.source["path"]), info.first_row, info.num_rows, info.fingerprint)
    table = table.replace_schema_metadata({FOOTER_KEY: _footer(info)})
    pq.write_table(table, folder / name, compression="zstd", write_page_checksum=True)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    for name, num_parts in (("few", 2), ("many", 100)):
        (tmp_path / name).mkdir()
        for table, info in parts_of(num_parts, rows_per_part=2000):
            write(tmp_path / name, table, info)

    few, many = peak_rss_bytes("verify", tmp_path / "few"), peak_rss_bytes("verify", tmp_path / "many")

    # Each row leaves eight bytes, the hash of its id.
    assert many - few < 64 << 20


def test_a_part_made_to_eat_memory_is_a_fault_and_costs_less_than_1_gib(tmp_path: Path) -> None:
    ((table, info),) = parts_of(1, rows_per_part=20_000)
    text = pa.DictionaryArray.from_arrays([0] * 20_000, pa.array(["a" * (64 << 20)]))
    bomb = table.set_column(1, "text", text)
    path = tmp_path / part_name("a.parquet", 0, 20_000, info.fingerprint)
    # Without Arrow's own schema the column says of itself that it is plain text.
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": GIB}
    with pq.ParquetWriter(path, bomb.schema, **options) as writer:
        writer.write_table(bomb)
        writer.add_key_value_metadata({FOOTER_KEY: _footer(info)})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20

    peak = peak_rss_bytes("verify", tmp_path)
    sys.stderr.write(f"\na part that unpacks to 1.2 TiB: peak {peak / GIB:.2f} GiB resident\n")
    verdict = run_command("verify", tmp_path)

    assert verdict.returncode == 5
    assert "takes more memory to read than any part does" in verdict.stdout
    assert peak < GIB


def test_a_run_with_nothing_to_do_still_says_where_the_source_is_now(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source(20)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out")
    assert run_command("run", job).returncode == 0
    source.rename(tmp_path / "elsewhere")

    again = run_command("run", job, "--set", f"source.path={tmp_path}/elsewhere/*.parquet")
    verdict = run_command("verify", tmp_path / "out", "--source")

    assert "Nothing to do" in again.stdout
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr
