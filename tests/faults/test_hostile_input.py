"""Whole runs over hostile records and files: each record accounted for, the driver small and alive."""

import io
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from glm4v_batch.errors import Glm4vBatchError, SourceError
from glm4v_batch.failure_codes import FAILURE_KINDS
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources import RecordColumns, open_source
from glm4v_batch.types import Chunk, Record
from tests.conftest import image_bytes
from tests.e2e.command import ROOT, command, write_job
from tests.faults.hostile import OK, SECRET, Attack, attacks, encoded

GIB = 1 << 30
STAGES = {(code, stage) for code, kind in FAILURE_KINDS.items() for stage in kind.stages}
RecordProperty = Callable[[str, object], None]


def run(*arguments: object) -> tuple[int, str, int]:
    """Exit code, what was printed, and the most bytes that the driver held."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=said, stderr=said)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, high_water_bytes(process.pid))
            time.sleep(0.01)
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace"), peak_bytes


def high_water_bytes(pid: int) -> int:
    """The most that the process held since it began. What wait4 tells counts ours from before that, too."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that has ended holds nothing
    return int(found.group(1)) << 10 if found else 0


def write_attacks(path: Path, records: Sequence[Attack]) -> None:
    path.parent.mkdir()
    titles = [title.encode() if isinstance(title, str) else title for title in (r.title for r in records)]
    text = pa.array(titles, pa.binary())
    columns = {
        # One id for all innocents, and none for every tenth.
        "id": [None if row % 10 == 9 else record.name for row, record in enumerate(records)],
        "image": pa.array([{"bytes": r.data, "path": r.path} for r in records]),
        "title": pa.Array.from_buffers(pa.string(), len(text), text.buffers(), text.null_count),
    }
    pq.write_table(pa.table(columns), path, row_group_size=64)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path, page_checksum_verification=True) for path in folder.glob("part-*.parquet")]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).sort_by("row").to_pylist()
    return rows


def violations(records: Sequence[Attack], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if [row["row"] for row in rows] != list(range(len(records))):
        yield f"{len(rows)} rows stand for {len(records)} records"
    innocent = {row["text"] for record, row in zip(records, rows, strict=False) if record.name == "innocent"}
    if len(innocent) != 1:
        yield f"innocent neighbours have {len(innocent)} different answers"
    for record, row in zip(records, rows, strict=False):
        outcome = OK if row["status"] == "ok" else row["error_code"]
        message = row["error_message"] or ""
        if outcome not in record.outcomes:
            yield f"{record.name}: {outcome} ({message}) instead of {record.outcomes}"
        if outcome != OK and (outcome, row["error_stage"]) not in STAGES:
            yield f"{record.name}: {outcome} at {row['error_stage']}"
        if SECRET in message or len(message) > 200 or not message.isprintable():
            yield f"{record.name}: the message is {message!r}"


def test_every_hostile_record_is_an_answer_or_a_failure_with_a_known_code(
    tmp_path: Path, record_property: RecordProperty
) -> None:
    root = tmp_path / "root"
    records = attacks(root)
    write_attacks(tmp_path / "source" / "hostile.parquet", records)
    job = write_job(tmp_path / "job.yaml", tmp_path / "source", tmp_path / "out", rows_per_part=64)

    code, said, peak_bytes = run("run", job, "--set", f"source.root={root}")

    assert code == 3, said
    found = list(violations(records, rows_of(tmp_path / "out")))
    codes = Counter(row["error_code"] for row in rows_of(tmp_path / "out") if row["error_code"])
    record_property(
        "fault",
        f"hostile records: {len(records)} records tried, {codes.total()} failed with {len(codes)} codes, "
        f"{len(found)} violations; the driver held {peak_bytes / GIB:.2f} GiB at most",
    )
    assert not found, "\n".join(found)
    assert SECRET not in said
    assert "Traceback" not in said
    assert peak_bytes < GIB


def table(num_rows: int, **columns: Any) -> pa.Table:
    images = [image_bytes(row, size=(30, 30)) for row in range(num_rows)]
    titles = [f"title {row}" for row in range(num_rows)]
    return pa.table({"id": [f"id-{r}" for r in range(num_rows)], "image": images, "title": titles, **columns})


def written(rows: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, **{"row_group_size": 20, "write_page_checksum": True, **options})
    return buffer.getvalue()


def footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def more_rows(data: bytes, claimed: int) -> bytes:
    """*data*, whose footer now claims *claimed* rows where it said 60, in all and in its last row group."""
    # Thrift's compact integers: 60 is 0x78, and 20 is 0x28, when they are doubled for their sign.
    start = footer_start(data)
    footer = bytearray(data[start:-8])
    whole = footer.index(b"\x16\x78")
    footer[whole + 1] = 2 * claimed
    last = footer.rindex(b"\x16\x28")
    footer[last + 1] = 2 * (claimed - 40)
    return data[:start] + bytes(footer) + data[-8:]


def deep(levels: int) -> pa.Table:
    """A column of lists of lists of lists."""
    value: Any = 1
    kind = pa.int8()
    for _ in range(levels):
        value, kind = [value], pa.list_(kind)
    return table(60, deep=pa.array([value] * 60, kind))


def bomb() -> bytes:
    """A file of some kilobytes that claims, truly, to be 1.2 GB of zeros."""
    zeros = pa.array([bytes(30 << 20)])
    rows = pa.table({"id": ["x"] * 40, "image": pa.chunked_array([zeros] * 40), "title": ["t"] * 40})
    return written(rows, compression="zstd", use_dictionary=False, row_group_size=40)


def files() -> Iterator[tuple[str, bytes]]:
    """Parquet files that cannot be read to their end, by name."""
    good = written(table(60))
    for tenth in range(10):
        yield f"cut-at-{tenth}0", good[: len(good) * tenth // 10]
    yield "long-footer", good[:-8] + b"\xff\xff\xff\x7fPAR1"
    yield "noise-footer", good[: footer_start(good)] + os.urandom(300) + good[-8:]
    yield "more-rows-than-there-are", more_rows(good, 63)
    yield (
        "fewer-rows-in-its-groups",
        more_rows(good, 63)[: footer_start(good)]
        + good[footer_start(good) :].replace(b"\x16\x78", b"\x16\x76", 1),
    )
    for place in range(5):
        at = footer_start(good) * (place + 1) // 6
        yield f"flipped-page-{place}", good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]
    yield "zeros", bomb()
    yield "too-deep", written(deep(60))
    yield "no-parquet", b"PAR1" + SECRET.encode() * 1000 + b"PAR1"


def read_all(path: Path) -> list[Record]:
    source = open_source(
        ParquetSettings(kind="parquet", path=str(path), id="id"), RecordColumns(("title",), ("title",))
    )
    return [r for shard in source.shards() for r in source.read(Chunk(shard.path, 0, shard.num_rows or 0))]


def test_files_that_cannot_be_read_to_their_end_are_refused_by_name(
    tmp_path: Path, record_property: RecordProperty
) -> None:
    found, tried = [], 0
    for name, data in files():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        tried += 1
        try:
            found.append(f"{name}: {len(read_all(path))} rows were read")
        except SourceError as error:
            if path.name not in str(error) or SECRET in str(error):
                found.append(f"{name}: {error}")

    record_property("fault", f"hostile Parquet files: {tried} files tried, {len(found)} violations")
    assert not found, "\n".join(found)


def test_files_that_are_odd_and_whole_are_read(tmp_path: Path) -> None:
    rows = table(60)
    odd = {
        "deep": written(deep(30)),
        "wide": written(table(60, **{f"column {number}": [0] * 60 for number in range(2000)})),
        "one-row-groups": written(rows, row_group_size=1),
        "no-checksums": written(rows, write_page_checksum=False),
        "dictionaries": written(rows.set_column(2, "title", rows.column("title").dictionary_encode())),
        "empty-groups": written(table(0)),
    }

    for name, data in odd.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        assert len(read_all(path)) == (0 if name == "empty-groups" else 60), name


def test_a_damaged_page_stops_the_run_and_fails_no_row(tmp_path: Path) -> None:
    good = written(table(60), use_dictionary=False)
    images = pq.read_metadata(io.BytesIO(good)).row_group(1).column(1)
    at = images.data_page_offset + images.total_compressed_size // 2
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.parquet").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    (tmp_path / "source" / "b.parquet").write_bytes(good)
    job = write_job(tmp_path / "job.yaml", tmp_path / "source", tmp_path / "out", rows_per_part=20)

    code, said, peak_bytes = run("run", job)
    (tmp_path / "source" / "a.parquet").rename(tmp_path / "moved away.parquet")
    code_later, said_later, _ = run("run", job)

    assert code == 4, said
    assert "a.parquet cannot be read in row group 1" in said
    assert "move it away" in said
    assert code_later == 0, said_later
    rows = rows_of(tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"}
    assert len({(row["source"], row["row"]) for row in rows}) == len(rows) == 80
    assert peak_bytes < GIB


def test_a_bomb_of_a_gigabyte_stops_the_run_at_a_small_price(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "bomb.parquet"
    path.write_bytes(bomb())
    assert path.stat().st_size < 1 << 20
    job = write_job(tmp_path / "job.yaml", tmp_path / "source", tmp_path / "out")

    code, said, peak_bytes = run("run", job)

    assert code == 4, said
    assert "bomb.parquet cannot be read in row group 0: it unpacks from" in said
    assert peak_bytes < GIB // 2


def long_texts() -> pa.Table:
    """Rows of 100 MiB of text each, which a file holds in kilobytes, beside images that take a second."""
    blank = encoded(Image.new("L", (6900, 6900)), "PNG")
    titles = pa.DictionaryArray.from_arrays(pa.array([0] * 12), pa.array(["x" * (100 << 20)]))
    return pa.table({"id": [str(row) for row in range(12)], "image": [blank] * 12, "title": titles})


def endless_list() -> pa.Table:
    """A row of 16 million images, all of them null, which a file holds in a kilobyte."""
    nulls = pa.ListArray.from_arrays([0, 16_000_000], pa.nulls(16_000_000, pa.binary()))
    return pa.table({"id": ["a"], "image": nulls, "title": ["t"]})


@pytest.mark.parametrize(
    ("rows", "code"), [(long_texts, "prompt_too_long"), (endless_list, "record_too_large")]
)
def test_a_bomb_in_a_cell_fails_its_row_at_a_small_price(
    tmp_path: Path, rows: Callable[[], pa.Table], code: str
) -> None:
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "bomb.parquet"
    bombs = rows()
    pq.write_table(bombs, path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    job = write_job(tmp_path / "job.yaml", tmp_path / "source", tmp_path / "out")

    exit_code, said, peak_bytes = run("run", job, "--set", "output.columns=[]")

    assert exit_code in (3, 4), said  # 4 where all have failed
    assert [row["error_code"] for row in rows_of(tmp_path / "out")] == [code] * len(bombs)
    assert peak_bytes < GIB


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (table(5).drop_columns(["title"]), "b.parquet has no column title"),
        (table(5).set_column(2, "title", pa.array([1] * 5)), "column title holds int64, elsewhere string"),
        (table(5).rename_columns(["id", "image", "Title"]), "b.parquet has no column title"),
    ],
)
def test_files_that_drift_apart_are_named_before_any_work(tmp_path: Path, other: pa.Table, said: str) -> None:
    (tmp_path / "a.parquet").write_bytes(written(table(5)))
    (tmp_path / "b.parquet").write_bytes(written(other))

    with pytest.raises(SourceError, match=said):
        read_all(tmp_path)


def test_names_from_strangers_are_printed_escaped(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a\x1b[2J\u202e.parquet").write_bytes(b"no Parquet")
    job = write_job(tmp_path / "job.yaml", tmp_path / "source", tmp_path / "out")

    code, said, _ = run("run", job)

    assert code == 4
    assert "a\\x1b[2J\\u202e.parquet" in said
    assert "\x1b" not in said
    assert "\u202e" not in said


def test_a_fifo_and_a_name_that_is_no_text_do_not_stop_the_world(tmp_path: Path) -> None:
    (tmp_path / "good.parquet").write_bytes(written(table(5)))
    os.mkfifo(tmp_path / "fifo.parquet")
    assert len(read_all(tmp_path)) == 5

    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))).write_bytes(written(table(5)))
    with pytest.raises(Glm4vBatchError, match="is not UTF-8"):
        read_all(tmp_path)
