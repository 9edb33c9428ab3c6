"""Records from Parquet files, streamed: memory depends on pages and batches, never on row groups.

An open file is kept at its position, so that reading consecutive chunks decodes each page once.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from glm4v_batch.errors import JobError, SourceError
from glm4v_batch.job import ParquetSettings
from glm4v_batch.types import Chunk, Record
from glm4v_batch.units import format_bytes

from . import RecordColumns, Shard, cut, first_line
from .cells import Layout, check_image_column, records

_MAGIC = b"PAR1"
_TAIL_BYTES = 64 << 10
_MAX_FOOTER_BYTES = 256 << 20
_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 256
_FOOTER_THREADS = 8

# What no honest file does: compress a row group this far, to this much. Images do not compress,
# and repeated values are dictionary-encoded before their size is declared.
_BOMB_BYTES = 256 << 20
_BOMB_RATIO = 200
_BLOCK_BYTES = 4096
_SAMPLE_BLOCKS = 16


class ParquetSource:
    """The rows of all files that `source.path` finds, in the order of their paths."""

    def __init__(
        self, settings: ParquetSettings, columns: RecordColumns, *, own_output: Path | None = None
    ) -> None:
        self._fs, found = _find(settings.path, own_output)
        footers = _read_footers(self._fs, found)
        self._files = {footer.shard.path: path for path, footer in zip(found.values(), footers, strict=True)}
        self._shards = [footer.shard for footer in footers]
        self._layout = Layout(settings.image, settings.id, columns.fields, columns.passed)
        self.schema = _common_schema(footers, self._layout.columns, settings.image)
        self.root = settings.root
        check_image_column(self.schema, settings.image)
        self._cursor: _Cursor | None = None

    def shards(self) -> Sequence[Shard]:
        """One shard for each file."""
        return self._shards

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        """The chunks that make up *gaps*."""
        for rows in cut(gaps, rows_per_chunk):
            yield Chunk(shard.path, rows.start, len(rows))

    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of *chunk*, read on from where the last chunk ended if it begins there."""
        # Taken away while in use: a second reader then opens a file of its own.
        cursor, self._cursor = self._cursor, None
        if cursor is None or (cursor.shard.path, cursor.next_row) != (chunk.source, chunk.first_row):
            cursor = self._open_at(chunk)
        for batch in cursor.take(chunk.num_rows):
            yield from records(batch, chunk.source, cursor.next_row - batch.num_rows, self._layout)
        # Pages of large images are freed one by one, and the allocator would keep them all.
        pa.default_memory_pool().release_unused()
        if cursor.next_row == cursor.shard.num_rows:
            cursor.close()
        else:
            self._cursor = cursor

    def _open_at(self, chunk: Chunk) -> "_Cursor":
        shard = next(shard for shard in self._shards if shard.path == chunk.source)
        return _Cursor(self._fs, self._files[shard.path], shard, self._layout.columns, chunk.first_row)


class _Cursor:
    """An open file and the row that comes next."""

    def __init__(self, fs: Any, path: str, shard: Shard, columns: list[str], first_row: int) -> None:
        self.shard = shard
        self.next_row = first_row
        footer = _read_footer(fs, path, shard.path)
        if footer.shard.identity != shard.identity:
            raise SourceError(f"{shard.path} has changed since this run began.")
        with _reading(shard.path, "the file"):
            self._opened = _open(fs, path)
            file = pq.ParquetFile(
                self._opened,
                metadata=footer.metadata,
                buffer_size=_BUFFER_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            )
        self._batches = _batches(file, shard.path, columns, first_row)
        self._rest: pa.RecordBatch | None = None

    def take(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """The next *num_rows* rows; `next_row` stands behind each batch when it is handed out."""
        while num_rows:
            batch = next(self._batches, None) if self._rest is None else self._rest
            if batch is None:
                raise SourceError(f"{self.shard.path} ends at row {self.next_row}, before its footer says.")
            piece, rest = batch.slice(0, num_rows), batch.slice(num_rows)
            self._rest = rest if rest.num_rows else None
            self.next_row += piece.num_rows
            num_rows -= piece.num_rows
            yield piece

    def close(self) -> None:
        """Let go of the file."""
        self._opened.close()


@dataclass(frozen=True, slots=True)
class _Footer:
    shard: Shard
    metadata: pq.FileMetaData
    schema: pa.Schema


class _UnreadableError(Exception):
    """Why a file is no readable Parquet file."""


def _batches(
    file: pq.ParquetFile, shard: str, columns: list[str], first_row: int
) -> Iterator[pa.RecordBatch]:
    """The rows from *first_row* on; whole row groups before it are skipped unread."""
    skip = first_row
    for group in range(file.metadata.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if skip < num_rows:
            batches = _group_batches(file, group, columns)
            yield from _skipped(_guarded(batches, shard, f"row group {group}"), skip)
        skip = max(0, skip - num_rows)


def _guarded(batches: Iterator[pa.RecordBatch], shard: str, where: str) -> Iterator[pa.RecordBatch]:
    while True:
        with _reading(shard, where):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _group_batches(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    num_rows = file.metadata.row_group(group).num_rows
    declared_bytes, stored_bytes = _sizes(file.metadata.row_group(group), columns)
    if declared_bytes > max(_BOMB_BYTES, _BOMB_RATIO * stored_bytes):
        raise _UnreadableError(
            f"it unpacks from {format_bytes(stored_bytes)} to {format_bytes(declared_bytes)}, "
            "which no image file does"
        )
    rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, declared_bytes)))
    yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _sizes(group: pq.RowGroupMetaData, columns: list[str]) -> tuple[int, int]:
    """Bytes of *columns* unpacked and stored."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    needed = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    return (
        sum(chunk.total_uncompressed_size for chunk in needed),
        sum(chunk.total_compressed_size for chunk in needed),
    )


def _skipped(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if num_rows < batch.num_rows:
            yield batch.slice(num_rows)
        num_rows = max(0, num_rows - batch.num_rows)


@contextmanager
def _reading(shard: str, where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, _UnreadableError) as error:
        raise SourceError(
            f"{shard} cannot be read in {where}: {first_line(error)}.",
            hint="Replace the file. What is committed stays.",
        ) from None


def _open(fs: Any, path: str) -> Any:
    # Arrow's own file spares a Python call for each read; a memory map would count as our memory.
    return pa.OSFile(path) if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")


def _find(pattern: str, own_output: Path | None) -> tuple[Any, dict[str, str]]:
    """The file system of *pattern*, and the files it finds there by the name that we call them.

    Parts of *own_output* do not count: an output below its source would feed on itself.
    """
    try:
        fs, path = fsspec.url_to_fs(pattern)
    except (ValueError, ImportError) as error:
        raise JobError(f"source.path {pattern} cannot be opened: {error}.") from None
    try:
        found = [file for file in _expand(fs, path) if not _is_below(fs, file, own_output)]
    except OSError as error:
        raise SourceError(f"{pattern} cannot be listed: {first_line(error)}.") from None
    if not found:
        raise SourceError(
            f"{pattern} finds no Parquet files.",
            hint="source.path is a file, a glob, or a folder that holds *.parquet; it is relative to the "
            "current folder.",
        )
    named = {_name(fs, file, pattern): file for file in found}
    return fs, dict(sorted(named.items()))


def _is_below(fs: Any, file: str, folder: Path | None) -> bool:
    if folder is None or not isinstance(fs, LocalFileSystem):
        return False
    return Path(file).resolve().is_relative_to(folder.resolve())


def _expand(fs: Any, path: str) -> list[str]:
    if fs.isfile(path):
        return [path]
    if not fs.isdir(path):
        return [file for file in fs.glob(path) if fs.isfile(file)]
    # Names that begin with . or _ are other programs' state, our own output folders' among them.
    below = [
        (file, PurePosixPath(file[len(path) :]).parts) for file in fs.glob(f"{path.rstrip('/')}/**/*.parquet")
    ]
    return [file for file, parts in below if not any(part.startswith((".", "_")) for part in parts)]


def _name(fs: Any, path: str, pattern: str) -> str:
    if not isinstance(fs, LocalFileSystem):
        return str(fs.unstrip_protocol(path))
    is_relative = "://" not in pattern and not pattern.startswith(("/", "~"))
    return os.path.relpath(path) if is_relative else path


def _read_footers(fs: Any, found: dict[str, str]) -> list[_Footer]:
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        read = list(threads.map(partial(_footer_or_fault, fs), found.values(), found.keys()))
    faults = [fault for fault in read if isinstance(fault, str)]
    if faults:
        raise SourceError("\n".join(["These files cannot be read as Parquet:", *faults]))
    return [footer for footer in read if isinstance(footer, _Footer)]


def _footer_or_fault(fs: Any, path: str, name: str) -> _Footer | str:
    try:
        return _read_footer(fs, path, name)
    except SourceError as error:
        return f"  {error}"


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
