"""Files in a process of their own: the same records, and what kills the reader is named."""

import os
import re
import signal
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm4v_batch.errors import SourceError
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources import RecordColumns, Source, open_source
from glm4v_batch.sources.parquet import Opened, ParquetFiles, ParquetSource, Piece
from glm4v_batch.sources.reader import Reader
from glm4v_batch.types import Chunk, Record

MIB = 1 << 20


def settings(path: Path, **more: Any) -> ParquetSettings:
    return ParquetSettings(kind="parquet", path=str(path), **more)


def opened(path: Path, *fields: str, **more: Any) -> Source:
    return open_source(settings(path, **more), RecordColumns(fields, fields))


def records(source: Source) -> Iterator[Record]:
    for shard in source.shards():
        yield from source.read(Chunk(shard.path, 0, shard.num_rows or 0))


def write(path: Path, images: list[bytes], **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"image": images, "title": [f"title {row}" for row in range(len(images))], **columns})
    pq.write_table(table, path, row_group_size=20, write_page_checksum=True)
    return path


class Unlistable(ParquetFiles):
    """Files that crash whoever opens them, and even whoever looks at a single one."""

    def __init__(
        self,
        asked: ParquetSettings,
        columns: RecordColumns,
        own_output: Path | None,
        opened: Opened | None,
    ) -> None:
        os.abort()


class Poisoned(ParquetFiles):
    """Opened files, of which those with a telling name do to their reader what the name says."""

    def __init__(
        self,
        asked: ParquetSettings,
        columns: RecordColumns,
        own_output: Path | None,
        opened: Opened | None,
    ) -> None:
        super().__init__(asked, columns, own_output, opened)
        if any("abort-opening" in shard.path for shard in self.shards):
            os.abort()

    def piece(self, path: str, first_row: int, num_rows: int) -> Piece:
        if "abort-reading" in path and first_row + num_rows > 30:
            os.abort()
        if "raise" in path:
            raise AssertionError("a bug of ours")
        return super().piece(path, first_row, num_rows)


def poisoned(path: Path) -> ParquetSource:
    asked = settings(path), RecordColumns(("title",))
    return ParquetSource(Reader(*asked, open_files=Poisoned), *asked)


def reader_pid(source: Source) -> int:
    assert isinstance(source, ParquetSource)
    assert isinstance(source._files, Reader)
    assert source._files._child is not None
    return source._files._child.pid


def test_records_are_those_that_are_read_in_this_process(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [os.urandom(50) for _ in range(70)], key=[f"k{row}" for row in range(70)])
    asked = settings(tmp_path, id="key"), RecordColumns(("title",), ("title",))
    here = ParquetSource(ParquetFiles(*asked), *asked)

    there = opened(tmp_path, "title", id="key")

    assert list(records(there)) == list(records(here))
    assert there.shards() == here.shards()
    assert there.schema == here.schema


def test_paths_are_relative_to_where_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data" / "a.parquet", [b"x"])
    monkeypatch.chdir(tmp_path)

    assert [shard.path for shard in opened(Path("data")).shards()] == ["data/a.parquet"]


def test_a_killed_reader_is_replaced_and_no_row_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [os.urandom(50) for _ in range(100)])
    source = opened(tmp_path)
    rows = []

    for first in range(0, 100, 10):
        rows += [record.row for record in source.read(Chunk(source.shards()[0].path, first, 10))]
        os.kill(reader_pid(source), signal.SIGKILL)

    assert rows == list(range(100))


def test_a_file_replaced_while_its_reader_is_killed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [b"old"] * 100)
    source = opened(tmp_path)
    assert len(list(source.read(Chunk(str(path), 0, 10)))) == 10

    write(tmp_path / "next" / "a.parquet", [b"new"] * 100).replace(path)
    os.kill(reader_pid(source), signal.SIGKILL)

    with pytest.raises(SourceError, match=r"a.parquet has changed since this run began"):
        list(source.read(Chunk(str(path), 10, 10)))


def test_a_file_removed_while_its_reader_is_killed_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    gone = write(tmp_path / "a.parquet", [b"gone"] * 10)
    kept = write(tmp_path / "b.parquet", [b"kept"] * 10)
    source = opened(tmp_path)

    gone.unlink()
    os.kill(reader_pid(source), signal.SIGKILL)

    with pytest.raises(SourceError, match=r"a.parquet is gone since this run began"):
        list(source.read(Chunk(str(gone), 0, 10)))
    assert len(list(source.read(Chunk(str(kept), 0, 10)))) == 10


def test_a_reader_that_follows_a_killed_one_lists_nothing_anew(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", [b"x"] * 10)
    source = opened(tmp_path)

    (tmp_path / "b.parquet").write_bytes(b"no Parquet file")
    os.kill(reader_pid(source), signal.SIGKILL)

    assert len(list(source.read(Chunk(str(first), 0, 10)))) == 10


def test_a_file_that_crashes_its_reader_is_named_with_the_row(tmp_path: Path) -> None:
    write(tmp_path / "abort-reading.parquet", [b"x"] * 60)
    source = poisoned(tmp_path)
    (shard,) = source.shards()

    assert len(list(source.read(Chunk(shard.path, 0, 30)))) == 30
    with pytest.raises(SourceError, match=r"abort-reading.parquet cannot be read at row 30: .* signal 6"):
        list(source.read(Chunk(shard.path, 30, 30)))
    assert len(list(source.read(Chunk(shard.path, 0, 30)))) == 30


def test_files_whose_footers_cannot_be_told_apart_are_refused_together(tmp_path: Path) -> None:
    write(tmp_path / "abort-opening.parquet", [b"x"])

    with pytest.raises(SourceError, match="cannot be read: its reader was lost 2 times"):
        poisoned(tmp_path)


def test_files_that_nobody_can_open_are_refused_and_the_reader_not_asked_for_ever(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [b"x"])

    with pytest.raises(SourceError, match=r"its reader was lost 2 times, at last it died by signal 6"):
        Reader(settings(tmp_path), RecordColumns(), open_files=Unlistable)


def test_a_bug_in_the_reader_shows_its_traceback(tmp_path: Path) -> None:
    write(tmp_path / "raise.parquet", [b"x"])

    with pytest.raises(RuntimeError, match="a bug of ours"):
        list(records(poisoned(tmp_path)))


def test_a_record_over_the_limit_is_handed_on_without_its_values(tmp_path: Path) -> None:
    images = [b"small", bytes(130 * MIB), b"small too"]
    write(tmp_path / "a.parquet", images, key=["one", "two", "three"])

    one, two, three = records(opened(tmp_path, "title", id="key"))

    assert (one.images[0].data, three.images[0].data) == (b"small", b"small too")
    assert (two.record_id, two.images[0].data, two.fields) == ("two", None, {"title": None})
    assert two.oversize_bytes > 130 * MIB
    assert one.oversize_bytes == three.oversize_bytes == 0
    assert two.passed is not None
    assert two.passed.to_pylist() == [{"title": None}]


def test_what_passes_through_keeps_no_image_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [os.urandom(2 * MIB) for _ in range(20)])
    source = opened(tmp_path, "title")
    tracemalloc.start()

    passed = [record.passed for record in source.read(Chunk(source.shards()[0].path, 0, 20))]
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert [table.column_names for table in passed if table is not None] == [["title"]] * 20
    assert held_bytes < 12 * MIB


def test_a_reader_of_local_files_has_no_secrets_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    write(tmp_path / "a.parquet", [b"x"])

    source = Reader(settings(tmp_path), RecordColumns())

    assert source._child is not None
    block = Path(f"/proc/{source._child.pid}/environ").read_bytes()
    assert b"hunter2" not in block
    limits = Path(f"/proc/{source._child.pid}/limits").read_text()
    assert re.search(r"Max file size\s+0\s+0", limits)


def test_large_rows_come_in_pieces_that_fit(tmp_path: Path) -> None:
    asked = settings(write(tmp_path / "a.parquet", [os.urandom(3 * MIB) for _ in range(12)])), RecordColumns()
    files = ParquetFiles(*asked)

    sizes, row = [], 0
    while row < 12:
        piece = files.piece(files.shards[0].path, row, 12 - row)
        sizes.append(piece.rows.nbytes)
        row += piece.rows.num_rows

    assert len(sizes) > 3
    assert max(sizes) <= 8 * MIB


def test_a_large_dictionary_does_not_travel_with_every_row(tmp_path: Path) -> None:
    words = [f"{row} " + "x" * MIB for row in range(20)]
    title = pa.array(words).dictionary_encode()
    pq.write_table(pa.table({"image": [b"x"] * 20, "title": title}), tmp_path / "a.parquet")
    asked = settings(tmp_path), RecordColumns(("title",), ("title",))
    files = ParquetFiles(*asked)

    piece = files.piece(files.shards[0].path, 0, 20)

    assert piece.rows.nbytes <= 8 * MIB + MIB
    assert piece.rows.schema.field("title").type == title.type
    assert [r.fields["title"] for r in records(ParquetSource(files, *asked))] == words


def test_a_value_that_is_small_in_the_file_and_repeated_is_read_row_by_row(tmp_path: Path) -> None:
    # One value of 20 MiB, 1000 times: a dictionary entry and 1000 numbers in the file.
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([bytes(20 * MIB)]))
    columns = {"image": bomb, "title": ["x"] * 1000}
    pq.write_table(pa.table(columns), tmp_path / "bomb.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < MIB

    sizes = [len(record.images[0].data or b"") for record in islice(records(opened(tmp_path)), 8)]

    assert sizes == [20 * MIB] * 8


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_the_reader_ends_when_nobody_wants_its_files_any_more(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [b"x"])
    source = opened(tmp_path)
    reader = reader_pid(source)
    assert is_running(reader)

    del source

    deadline = time.monotonic() + 60
    while is_running(reader):
        assert time.monotonic() < deadline
        time.sleep(0.02)
