"""Records from Parquet files, streamed: memory depends on pages and batches, never on row groups.

The files are opened in a process of their own (`reader`), because pyarrow can be made to crash and to
take gigabytes by a file of some kilobytes. An open file is kept at its position, so that reading
consecutive chunks decodes each page once.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from glm4v_batch.errors import PlacementError, SourceError, first_line, on_one_line
from glm4v_batch.job import ParquetSettings
from glm4v_batch.sources import RecordColumns, Shard, cut
from glm4v_batch.sources.cells import Layout, check_image_column, records
from glm4v_batch.sources.listing import file_system, find_files
from glm4v_batch.types import Chunk, Record
from glm4v_batch.units import format_bytes

_MAGIC = b"PAR1"
_TAIL_BYTES = 64 << 10
_MAX_FOOTER_BYTES = 256 << 20
_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 256
_PIECE_BYTES = 8 << 20
_LARGE_DICTIONARY_ROWS = 16
# An image may have 64 MiB; there is more in a record than one.
_MAX_RECORD_BYTES = 128 << 20
# What an item of a list takes as a Python value, be it null and nothing in the file.
_ITEM_BYTES = 128
_MAX_ID_BYTES = 1 << 10
_HELD_CURSORS = 4
_FOOTER_THREADS = 8

# What no honest file does: compress a row group this far, to this much. Images do not compress,
# and repeated values are dictionary-encoded before their size is declared.
_BOMB_BYTES = 256 << 20
_BOMB_RATIO = 200
_BLOCK_BYTES = 4096
_SAMPLE_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring rows of a shard; or a single one of *oversize_bytes*, left without its values."""

    rows: pa.RecordBatch
    oversize_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening found, for the rest of a run: see `Files`; *paths* is where each shard lies."""

    schema: pa.Schema
    shards: Sequence[Shard]
    paths: Mapping[str, str]


class Files(Protocol):
    """Opened Parquet files, in this process or another."""

    @property
    def schema(self) -> pa.Schema:
        """Every column of any file."""

    @property
    def shards(self) -> Sequence[Shard]:
        """One shard for each file, in the order of their paths."""

    def piece(self, path: str, first_row: int, num_rows: int) -> Piece:
        """Some of the *num_rows* rows of the shard *path* from *first_row* on, one at least.

        Raises SourceError where they cannot be read.
        """


class ParquetSource:
    """The rows of *files*, in the order of their paths."""

    def __init__(self, files: Files, settings: ParquetSettings, columns: RecordColumns) -> None:
        self._files = files
        self._layout = layout_of(settings, columns)
        self.schema = files.schema
        self.root = settings.root
        check_image_column(self.schema, settings.image)

    def shards(self) -> Sequence[Shard]:
        """One shard for each file."""
        return self._files.shards

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        """The chunks that make up *gaps*."""
        for rows in cut(gaps, rows_per_chunk):
            yield Chunk(shard.path, rows.start, len(rows))

    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of *chunk*."""
        row = chunk.first_row
        while row < chunk.rows.stop:
            piece = self._files.piece(chunk.source, row, chunk.rows.stop - row)
            yield from records(piece.rows, chunk.source, row, self._layout, piece.oversize_bytes)
            row += piece.rows.num_rows


def layout_of(settings: ParquetSettings, columns: RecordColumns) -> Layout:
    """Which columns make the records of *settings*."""
    return Layout(settings.image, settings.id, columns.fields, columns.passed)


class ParquetFiles:
    """The files of *settings*, opened in this process, and where the last reads ended in them.

    *opened* is what an earlier process found in this run: nothing is listed again then, and a file
    that has changed since is refused when it is read.
    """

    def __init__(
        self,
        settings: ParquetSettings,
        columns: RecordColumns,
        own_output: Path | None = None,
        opened: Opened | None = None,
    ) -> None:
        layout = layout_of(settings, columns)
        self._fs, _ = file_system(settings.path)
        self._columns, self._looked_at, self._id = layout.columns, layout.looked_at, layout.id
        self.opened = opened or _open_all(settings, layout, own_output)
        self._shards = {shard.path: shard for shard in self.opened.shards}
        self._cursors: OrderedDict[tuple[str, int], _Cursor] = OrderedDict()

    @property
    def schema(self) -> pa.Schema:
        """See `Files.schema`."""
        return self.opened.schema

    @property
    def shards(self) -> Sequence[Shard]:
        """See `Files.shards`."""
        return self.opened.shards

    def piece(self, path: str, first_row: int, num_rows: int) -> Piece:
        """See `Files.piece`. Reads on from where an earlier call ended, if it ended there."""
        cursor = self._cursors.pop((path, first_row), None) or self._open_at(path, first_row)
        try:
            rows = cursor.take(num_rows)
        except _MemoryNeededError:
            # Cells that are small in the file, and repeated, may be large in a batch.
            cursor.close()
            cursor = self._open_at(path, first_row, most_rows=1)
            rows = cursor.take(1)
        self._keep(path, cursor)
        return self._bounded(rows)

    def _open_at(self, path: str, first_row: int, most_rows: int = _MAX_BATCH_ROWS) -> "_Cursor":
        wanted = _Wanted(self._columns, self._looked_at, first_row, most_rows)
        return _Cursor(self._fs, self.opened.paths[path], self._shards[path], wanted)

    def _keep(self, path: str, cursor: "_Cursor") -> None:
        # Pages of large images are freed one by one, and the allocator would keep them all.
        pa.default_memory_pool().release_unused()
        if cursor.next_row == cursor.shard.num_rows:
            cursor.close()
            return
        self._cursors[path, cursor.next_row] = cursor
        if len(self._cursors) > _HELD_CURSORS:
            _, oldest = self._cursors.popitem(last=False)
            oldest.close()

    def _bounded(self, rows: pa.RecordBatch) -> Piece:
        num_bytes = _value_bytes(rows, self._looked_at)
        if rows.num_rows > 1 or num_bytes <= _MAX_RECORD_BYTES:
            return Piece(rows)
        emptied = [
            column if name == self._id and column.nbytes <= _MAX_ID_BYTES else pa.nulls(1, column.type)
            for name, column in zip(rows.schema.names, rows.columns, strict=True)
        ]
        nullable = pa.schema([field.with_nullable(True) for field in rows.schema])
        return Piece(pa.record_batch(emptied, schema=nullable), num_bytes)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a cursor reads: *columns* from *first_row* on, at most *most_rows* at once.

    Those *looked_at* become Python values.
    """

    columns: list[str]
    looked_at: list[str]
    first_row: int
    most_rows: int


class _Cursor:
    """An open file and the row that comes next."""

    def __init__(self, fs: Any, path: str, shard: Shard, wanted: _Wanted) -> None:
        self.shard = shard
        self.next_row = wanted.first_row
        self._looked_at = wanted.looked_at
        with _reading(shard.path, "the file"):
            # Before the footer: a file that takes the name in between fails the comparison.
            self._opened = _open(fs, path)
        footer = _read_footer(fs, path, shard.path)
        if footer.shard.identity != shard.identity:
            raise SourceError(f"{on_one_line(shard.path)} has changed since this run began.", hint=_PUT_BACK)
        with _reading(shard.path, "the file"):
            file = pq.ParquetFile(
                self._opened,
                metadata=footer.metadata,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
        self._batches = _batches(file, shard.path, wanted)
        self._rest: pa.RecordBatch | None = None

    def take(self, num_rows: int) -> pa.RecordBatch:
        """The next rows, one at least: no more than *num_rows*, and no more than fit into a piece."""
        batch = next(self._batches, None) if self._rest is None else self._rest
        if batch is None:
            raise SourceError(
                f"{on_one_line(self.shard.path)} ends at row {self.next_row}, before its footer says.",
                hint=REPLACE,
            )
        piece = _fitting(batch.slice(0, num_rows), self._looked_at)
        rest = batch.slice(piece.num_rows)
        self._rest = rest if rest.num_rows else None
        self.next_row += piece.num_rows
        return piece

    def close(self) -> None:
        """Let go of the file."""
        self._opened.close()


def _fitting(rows: pa.RecordBatch, looked_at: Sequence[str]) -> pa.RecordBatch:
    """As many of the first *rows* as fit into a piece, or one."""
    schema = rows.schema
    if any(_is_dictionary(column) and column.dictionary.nbytes > _PIECE_BYTES for column in rows.columns):
        # Each slice of such a column would carry all of the dictionary.
        rows = _decoded(rows.slice(0, _LARGE_DICTIONARY_ROWS))
    while rows.num_rows > 1 and _value_bytes(rows, looked_at) > _PIECE_BYTES:
        rows = rows.slice(0, rows.num_rows // 2)
    return rows if rows.schema == schema else rows.cast(schema)


def _value_bytes(rows: pa.RecordBatch, looked_at: Sequence[str]) -> int:
    """About what *rows* take, and the items of lists *looked_at*: a million nulls are nothing in Arrow."""
    return int(rows.nbytes) + _ITEM_BYTES * sum(_num_items(rows.column(name)) for name in looked_at)


def _num_items(values: pa.Array) -> int:
    """The items of all lists in *values*, those within lists and structs among them."""
    if isinstance(values, pa.ExtensionArray):
        return _num_items(values.storage)
    if isinstance(values, pa.StructArray):
        return sum(map(_num_items, values.flatten()))
    if isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray, pa.MapArray)):
        items = values.flatten()
        return len(items) + _num_items(items)
    return 0


def _decoded(rows: pa.RecordBatch) -> pa.RecordBatch:
    columns = [column.dictionary_decode() if _is_dictionary(column) else column for column in rows.columns]
    return pa.record_batch(columns, names=rows.schema.names)


def _is_dictionary(column: pa.Array) -> bool:
    return bool(pa.types.is_dictionary(column.type))


@dataclass(frozen=True, slots=True)
class _Footer:
    shard: Shard
    metadata: pq.FileMetaData
    schema: pa.Schema


class _UnreadableError(Exception):
    """Why a file is no readable Parquet file."""


class _MemoryNeededError(SourceError):
    """Reading needs more memory than there is."""


def _batches(file: pq.ParquetFile, shard: str, wanted: _Wanted) -> Iterator[pa.RecordBatch]:
    """The rows from the first wanted one on; whole row groups before it are skipped unread."""
    skip = wanted.first_row
    for group in range(file.metadata.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if skip < num_rows:
            batches = _group_batches(file, group, wanted)
            yield from _skipped(_guarded(batches, shard, f"row group {group}"), skip)
        skip = max(0, skip - num_rows)


def _guarded(batches: Iterator[pa.RecordBatch], shard: str, where: str) -> Iterator[pa.RecordBatch]:
    while True:
        with _reading(shard, where):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _group_batches(file: pq.ParquetFile, group: int, wanted: _Wanted) -> Iterator[pa.RecordBatch]:
    num_rows = file.metadata.row_group(group).num_rows
    declared_bytes, stored_bytes = _sizes(file.metadata.row_group(group), wanted.columns)
    if declared_bytes > max(_BOMB_BYTES, _BOMB_RATIO * stored_bytes):
        raise _UnreadableError(
            f"it unpacks from {format_bytes(stored_bytes)} to {format_bytes(declared_bytes)}, "
            "which no image file does"
        )
    rows = max(1, min(wanted.most_rows, _BATCH_BYTES * num_rows // max(1, declared_bytes)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=wanted.columns, use_threads=False):
        if missing := set(wanted.columns) - set(batch.schema.names):
            raise _UnreadableError(f"it has no column {missing.pop()} where its footer says")
        yield batch.select(wanted.columns)


def _sizes(group: pq.RowGroupMetaData, columns: list[str]) -> tuple[int, int]:
    """Bytes of *columns* unpacked and stored."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    needed = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    if any(min(chunk.total_uncompressed_size, chunk.total_compressed_size) < 0 for chunk in needed):
        raise _UnreadableError("it claims columns of less than no bytes")
    return (
        sum(chunk.total_uncompressed_size for chunk in needed),
        sum(chunk.total_compressed_size for chunk in needed),
    )


def _skipped(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if num_rows < batch.num_rows:
            yield batch.slice(num_rows)
        num_rows = max(0, num_rows - batch.num_rows)


# ValueError and LookupError: names that are not UTF-8, and those that two places spell differently.
_UNREADABLE = (OSError, ValueError, LookupError, ArithmeticError, pa.ArrowException, _UnreadableError)
REPLACE = "Replace the file, or move it away to go on with the others. What is committed stays."
_MEND = "Mend its permissions, or move it away to go on with the others. What is committed stays."
_PUT_BACK = "Put the file back as it was and run this command again. What is committed stays."


@contextmanager
def _reading(shard: str, where: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise _MemoryNeededError(
            f"{on_one_line(shard)} cannot be read in {where}: that takes more memory than a file may.",
            hint=f"{REPLACE} Where `ulimit -v` is set, it may be too low.",
        ) from None
    except FileNotFoundError:
        raise SourceError(f"{on_one_line(shard)} is gone since this run began.", hint=_PUT_BACK) from None
    except PermissionError:
        raise SourceError(f"{on_one_line(shard)} may not be read by this user.", hint=_MEND) from None
    except _UNREADABLE as error:
        raise SourceError(
            f"{on_one_line(shard)} cannot be read in {where}: {first_line(error)}.", hint=REPLACE
        ) from None


def _open(fs: Any, path: str) -> Any:
    # Arrow's own file spares a Python call for each read; a memory map would count as our memory. Of a name
    # that is text it takes the UTF-8, whatever the system's names are in.
    return pa.OSFile(os.fsencode(path)) if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")


def _open_all(settings: ParquetSettings, layout: Layout, own_output: Path | None) -> Opened:
    fs, found = find_files(settings, own_output)
    footers = _read_footers(fs, found)
    schema = _common_schema(footers, layout.columns, layout.image)
    return Opened(schema, [footer.shard for footer in footers], found)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a file, and what to do about it."""

    said: str
    hint: str


def _read_footers(fs: Any, found: dict[str, str]) -> list[_Footer]:
    read = _side_by_side(partial(_footer_or_fault, fs), found)
    refuse([fault for fault in read if isinstance(fault, Fault)])
    return [footer for footer in read if isinstance(footer, _Footer)]


def _side_by_side(
    read: Callable[[str, str], _Footer | Fault], found: dict[str, str]
) -> list[_Footer | Fault]:
    try:
        with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
            return list(threads.map(read, found.values(), found.keys()))
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise PlacementError(
            "The system starts no more threads, of which reading files takes some.",
            hint="Raise the limit on processes (ulimit -u).",
        ) from None


def refuse(faults: Sequence[Fault]) -> None:
    """Raise one SourceError for the *faults* of all files, where there are any."""
    if faults:
        hints = dict.fromkeys(fault.hint for fault in faults)
        raise SourceError(
            "\n".join(["These files cannot be read as Parquet:", *(f"  {fault.said}" for fault in faults)]),
            hint=" ".join(hints),
        )


def fault_of(fs: Any, path: str, name: str) -> Fault | None:
    """What is wrong with the footer of the file *path*, called *name*; None where nothing is."""
    read = _footer_or_fault(fs, path, name)
    return read if isinstance(read, Fault) else None


def _footer_or_fault(fs: Any, path: str, name: str) -> _Footer | Fault:
    try:
        return _read_footer(fs, path, name)
    except SourceError as error:
        return Fault(str(error), error.hint)


def _read_footer(fs: Any, path: str, name: str) -> _Footer:
    with _reading(name, "its footer"):
        size = int(fs.size(path))
        with fs.open(path, "rb") as file:
            footer = _footer_bytes(file, size)
            # A footer need not differ where the data does; a remote file's blocks would cost too much.
            blocks = _sample(file, size) if isinstance(fs, LocalFileSystem) else None
        # Only the end of the file is looked at, so these bytes are a file to Arrow.
        metadata = pq.read_metadata(
            pa.BufferReader(_MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC)
        )
        _check_honest(metadata)
        identity: dict[str, str | int] = {
            "path": name,
            "size": size,
            "footer_sha256": hashlib.sha256(footer).hexdigest(),
            **({} if blocks is None else {"sample_sha256": blocks}),
        }
        return _Footer(Shard(name, metadata.num_rows, identity), metadata, metadata.schema.to_arrow_schema())


def _sample(file: Any, size: int) -> str:
    """The hash of blocks spread evenly over the file: all of a small one, a few of a large one."""
    digest = hashlib.sha256()
    step = max(_BLOCK_BYTES, size // _SAMPLE_BLOCKS)
    for position in range(0, size, step):
        file.seek(position)
        digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _footer_bytes(file: Any, size: int) -> bytes:
    start = max(0, size - _TAIL_BYTES)
    file.seek(start)
    tail = bytes(file.read(size - start))
    if len(tail) < 12 or not tail.endswith(_MAGIC):
        raise _UnreadableError("it does not end as a Parquet file does")
    length = int.from_bytes(tail[-8:-4], "little")
    if length + 12 > size or length > _MAX_FOOTER_BYTES:
        raise _UnreadableError(f"it claims a footer of {format_bytes(length)}")
    if length + 8 > len(tail):
        file.seek(size - 8 - length)
        tail = bytes(file.read(length + 8))
    return tail[-8 - length : -8]


def _check_honest(metadata: pq.FileMetaData) -> None:
    names = metadata.schema.to_arrow_schema().names
    if twice := [name for name in names if names.count(name) > 1]:
        raise _UnreadableError(f"it has two columns called {twice[0]}")
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise _UnreadableError(f"it claims {metadata.num_rows} rows, its row groups {sum(counts)}")


def _common_schema(footers: Sequence[_Footer], needed: Sequence[str], image: str) -> pa.Schema:
    """Every column of any file. Files may differ, but not in the columns *needed*."""
    merged: dict[str, pa.Field] = {}
    faults = []
    for footer in footers:
        for field in footer.schema:
            fault = _merge(merged, field)
            # Images are bytes in one file and structs in another, and both are read.
            if fault and field.name in needed and field.name != image:
                faults.append(f"  {footer.shard.path}: column {field.name} holds {fault}")
    for footer in footers:
        missing = [name for name in needed if name in merged and name not in footer.schema.names]
        faults += [f"  {footer.shard.path} has no column {name}" for name in missing]
    if faults:
        raise SourceError("\n".join(["Files differ in columns that the job needs:", *faults]))
    return pa.schema(list(merged.values()))


def _loses(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether no type holds every value of both, though Arrow would choose one."""
    kinds = (one, other)
    if any(pa.types.is_null(kind) for kind in kinds):
        return False
    if any(pa.types.is_timestamp(kind) for kind in kinds):
        return True  # units and zones differ
    if all(pa.types.is_integer(kind) for kind in kinds):
        return pa.uint64() in kinds and any(pa.types.is_signed_integer(kind) for kind in kinds)
    return any(pa.types.is_integer(kind) for kind in kinds)


def _merge(merged: dict[str, pa.Field], field: pa.Field) -> str:
    """Widen the type of *field* in *merged* to hold both; say what is wrong where none does."""
    seen = merged.setdefault(field.name, pa.field(field.name, field.type))
    if seen.type == field.type:
        return ""
    if _loses(seen.type, field.type):
        return f"{field.type}, elsewhere {seen.type}"
    try:
        both = pa.unify_schemas(
            [pa.schema([seen]), pa.schema([seen.with_type(field.type)])], promote_options="permissive"
        )
    except pa.ArrowException:
        return f"{field.type}, elsewhere {seen.type}"
    merged[field.name] = both.field(0)
    return ""
