"""Parts: immutable Parquet files, one per chunk, whose footers are the only record of what is done.

A part becomes visible under its final name by `link()`, complete and synced, or not at all.
`rename()` would do that too, but it silently replaces what is there; `link()` refuses.
"""

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glm4v_batch.durable import (
    SyncError,
    Way,
    discard,
    free_bytes,
    is_regular,
    open_regular,
    publish,
    sync_folder,
    write_synced,
)
from glm4v_batch.errors import OutputError, first_line, on_one_line, sanitise
from glm4v_batch.types import ENDLESS
from glm4v_batch.units import format_bytes

FORMAT_VERSION = 1
FOOTER_KEY = b"glm4v_batch"
STATE_FOLDER = ".glm4v-batch"
# For the report, the line per batch, and what the file system itself needs besides a file's bytes.
_SPARE_BYTES = 1024**2
_GO_ON = "What is committed is safe; then run the same command again."

RESULT_FIELDS = (
    pa.field("id", pa.string()),
    pa.field("text", pa.string()),
    pa.field("status", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("error_stage", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("source", pa.string()),
    pa.field("row", pa.int64()),
)
"""The columns of every part, before those passed through from the source."""


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What a part's footer says: whose rows it holds, by which settings, and how they ended.

    *source* is the shard's identity, with at least its path; *settings* are the keys and values
    that the fingerprint was made of.
    """

    fingerprint: str
    settings: Mapping[str, Any]
    source: Mapping[str, str | int]
    first_row: int
    num_rows: int
    num_ok: int
    num_failed: int

    @property
    def source_path(self) -> str:
        """The path that the source had when these rows were committed."""
        return str(self.source["path"])

    @property
    def rows(self) -> range:
        """The row numbers of the source that the part holds."""
        return range(self.first_row, self.first_row + self.num_rows)


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part. *way* is how it got its name, where this run gave it."""

    path: Path
    info: PartInfo
    way: Way = field(default="link", compare=False)


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys under which two descriptions, of a part's job or of its source, say different things.

    >>> differing_keys({"path": "a", "size": 1}, {"path": "a", "size": 2, "etag": "x"})
    ['etag', 'size']
    """
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def part_name(source: str, first_row: int, num_rows: int, fingerprint: str) -> str:
    """The one name that a chunk's part can have.

    >>> part_name("data/scenes/scenes-00000.parquet", 128, 16, "0123456789abcdef")
    'part-scenes-00000.002e94eb-000000128-16-0123456789ab.parquet'
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source).name.split(".")[0])[:40]
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return f"part-{stem}.{digest}-{first_row:09d}-{num_rows}-{fingerprint[:12]}.parquet"


def commit(folder: Path, table: pa.Table, info: PartInfo) -> Part:
    """Make *table* visible in *folder* as the part that *info* describes, durably, or raise OutputError.

    Committing a chunk twice is harmless: a part of the same chunk and fingerprint that is
    already there stays as it is.
    """
    final = folder / part_name(info.source_path, info.first_row, info.num_rows, info.fingerprint)
    with refusing(folder), _written(folder, final.name, table, info) as temporary:
        part = _publish(temporary, final, info)
        # Also for a part that was there already: whoever made it may have died before this.
        sync_folder(folder)
    return part


def replace(folder: Path, table: pa.Table, info: PartInfo, old: Part) -> Part:
    """Put *table* in the place of the part *old* of the same rows, durably, or raise OutputError.

    At every instant there is either the old part or the new one, whole. To be called under the
    folder's lock only: nothing else keeps two runs from replacing each other's answers.
    """
    assert (info.fingerprint, info.rows) == (old.info.fingerprint, old.info.rows), "another chunk's part"
    with refusing(folder), _written(folder, old.path.name, table, info) as temporary:
        if read_part(old.path).info != old.info:
            raise OutputError(
                f"{old.path} has changed since this run began.",
                hint="Something else writes to this folder. Stop it, then run the same command again.",
            )
        temporary.replace(old.path)
        sync_folder(folder)
    return Part(old.path, info)


@contextmanager
def _written(folder: Path, name: str, table: pa.Table, info: PartInfo) -> Iterator[Path]:
    """A temporary file that is the part of *table*, synced and read back; it is gone afterwards."""
    data = _as_parquet(table, info)
    check_room(folder, len(data))
    temporary = folder / STATE_FOLDER / "tmp" / f"{name}.{os.getpid()}"
    try:
        try:
            write_synced(temporary, data)
        except SyncError:
            # The kernel may have dropped what it could not write, and would call the next sync a
            # success. So never the same file again, but once another one, from memory.
            discard(temporary)
            temporary = temporary.with_name(f"{temporary.name}.again")
            write_synced(temporary, data)
        _check_whole(temporary, info)
        yield temporary
    except BaseException:
        discard(temporary)
        raise
    temporary.unlink(missing_ok=True)


def _as_parquet(table: pa.Table, info: PartInfo) -> memoryview:
    # In memory first: its size is then known before the disk is touched, and it can be written twice.
    sink = pa.BufferOutputStream()
    described = table.replace_schema_metadata({FOOTER_KEY: _footer(info)})
    pq.write_table(described, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def _check_whole(path: Path, info: PartInfo) -> None:
    try:
        num_rows = read_part(path).info.num_rows
    except OutputError as error:
        if error.hint:  # an obstacle, not damage
            raise
        raise OutputError(
            f"What was written to {path.parent} reads back damaged: {error}.",
            hint="Check the disk. What is committed is safe; then run the same command again.",
        ) from None
    assert num_rows == info.num_rows, f"{path} holds {num_rows} rows instead of {info.num_rows}"


def _publish(temporary: Path, final: Path, info: PartInfo) -> Part:
    try:
        way = publish(temporary, final)
    except FileExistsError:
        present = read_part(final)
        if present.info != info:
            raise OutputError(
                f"{final} exists already and is not the part that this run would write.",
                hint="Move it away, or choose another output.path.",
            ) from None
        return present
    return Part(final, info, way)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise OutputError unless the disk of *folder* has room for *needed_bytes* and a little more."""
    with refusing(folder):
        found = free_bytes(folder)
    if found is not None and found < needed_bytes + _SPARE_BYTES:
        raise OutputError(
            f"The disk of {folder} has {format_bytes(found)} free, and what is to be written next needs "
            f"about {format_bytes(needed_bytes + _SPARE_BYTES)}.",
            hint=f"Make room. {_GO_ON}",
        )


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn what the file system says against writing to *folder* into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{_at_fault(folder, error)} cannot be written: {error.strerror or error}.",
            hint=f"{_what_to_do(error.errno)} {_GO_ON}",
        ) from error


def _at_fault(folder: Path, error: OSError) -> Path:
    """What refused: *folder*, or what *error* names of that which is hidden in it.

    Where it is for want of permission, that is the first that this user may not write of what *error*
    names and of its folder.
    """
    named = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
    if error.errno in (errno.EACCES, errno.EPERM):
        above = (path for name in named for path in (name, name.absolute().parent))
        closed = (path for path in above if os.path.lexists(path) and not _may_write(path))
        named = [*islice(closed, 1), *named]
    elif len(named) > 1:
        return folder  # to give a file its name is the disk's to do, and no file refuses it
    # A file that is still to be made has refused nothing: its disk has, or its folder is gone.
    return next(filter(os.path.lexists, named), folder)


def _may_write(path: Path) -> bool:
    needed = os.W_OK | os.X_OK if path.is_dir() else os.W_OK
    return os.access(path, needed, effective_ids=True)


def check_name(folder: Path) -> None:
    """Raise OutputError where the locale's encoding of file names cannot express that of *folder*."""
    try:
        os.fsencode(folder)
    except UnicodeEncodeError as error:
        lacking = error.object[error.start : error.end]
        raise OutputError(
            f"{folder} cannot be looked for: the encoding of file names under this locale, "
            f"{sys.getfilesystemencoding()}, has no {lacking}.",
            hint="Set a locale of UTF-8 (LC_ALL=C.UTF-8), or choose another output.path.",
        ) from None


def _what_to_do(number: int | None) -> str:
    match number:
        case errno.ENOSPC:
            return "Make room, for files or for their number."
        case errno.EDQUOT:
            return "Make room, or have the quota raised."
        case errno.EROFS:
            return "Mount it writable; a kernel that made it read-only by itself says why in 'dmesg'."
        case errno.EIO:
            return "Check the disk: 'dmesg' says what happened."
        case errno.EMFILE | errno.ENFILE:
            return "Allow more open files ('ulimit -n')."
        case errno.ENOENT | errno.ESTALE:
            return "It was moved or removed while the run went on: put it back, or begin anew."
        case errno.EACCES | errno.EPERM:
            return "Mend its permissions."
        case _:
            return "Mend this."


def _footer(info: PartInfo) -> bytes:
    body = {
        "format": FORMAT_VERSION,
        "fingerprint": info.fingerprint,
        "settings": info.settings,
        "source": info.source,
        "rows": [info.first_row, info.num_rows],
        "counts": {"ok": info.num_ok, "failed": info.num_failed},
    }
    return json.dumps(body, sort_keys=True, ensure_ascii=False).encode()


def list_parts(folder: Path) -> list[Part]:
    """The parts of *folder*, sorted by name, from their footers alone.

    Raises OutputError, naming all of them, where a file called `part-*.parquet` is not a whole
    part of ours.
    """
    parts, damaged = [], []
    for path in _part_paths(folder):
        try:
            parts.append(read_part(path))
        except OutputError as error:
            if error.hint:  # an obstacle, not damage
                raise
            damaged.append(f"  {error}")
    if damaged:
        raise OutputError(
            "\n".join([f"{len(damaged)} of the parts in {folder} cannot be used:", *damaged]),
            hint="Move them away: the rows of a damaged part are then done again. If none of them is of this "
            "job, choose another output.path.",
        )
    _refuse_overlaps(parts)
    return parts


def _part_paths(folder: Path) -> list[Path]:
    check_name(folder)
    try:
        names = sorted(path.name for path in folder.iterdir())  # glob takes an unreadable folder for empty
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read: {error.strerror}.",
            hint="An output is a folder that this user can read and write.",
        ) from None
    return [folder / name for name in names if name.startswith("part-") and name.endswith(".parquet")]


def _refuse_overlaps(parts: Sequence[Part]) -> None:
    def place(part: Part) -> tuple[str, int]:
        return part.info.source_path, part.info.first_row

    for one, other in pairwise(sorted(parts, key=place)):
        if place(one)[0] == place(other)[0] and other.info.first_row < one.info.rows.stop:
            raise OutputError(
                f"{one.path.name} and {other.path.name} in {one.path.parent} hold the same rows of "
                f"{place(one)[0]}.",
                hint="Move one of them away: each row may stand in one part only.",
            )


def read_part(path: Path) -> Part:
    """What the footer of *path* says. Raises OutputError where it is damaged or not ours."""
    with _reading(path) as file:
        metadata = pq.read_metadata(file)
    footer = (metadata.metadata or {}).get(FOOTER_KEY)
    if footer is None:
        raise OutputError(f"{path.name} was not written by glm4v-batch")
    return Part(path, _info(path, footer, metadata.num_rows))


def read_rows(part: Part) -> pa.Table:
    """All rows and columns of *part*, its page checksums verified. Raises OutputError where it is damaged."""
    with _opened(part) as file:
        table = file.read()
        if table.num_rows != part.info.num_rows:
            raise OutputError(
                f"{on_one_line(part.path.name)} holds {table.num_rows} rows, "
                f"its footer says {part.info.num_rows}"
            )
    return table.replace_schema_metadata(None)


def failed_rows(part: Part) -> list[tuple[int, str]]:
    """Number and error code of each failed row of *part*, page checksums verified.

    Raises OutputError where it is damaged.
    """
    wanted = pa.schema([column for column in RESULT_FIELDS if column.name in ("row", "error_code")])
    with _opened(part) as file:
        table = file.read(columns=wanted.names)
        if set(table.schema) != set(wanted):
            raise OutputError(f"{on_one_line(part.path.name)} has other columns than a part")
        table.validate(full=True)
    failed = table.filter(pc.is_valid(table.column("error_code")))
    return list(zip(failed.column("row").to_pylist(), failed.column("error_code").to_pylist(), strict=True))


@contextmanager
def _opened(part: Part) -> Iterator[pq.ParquetFile]:
    try:
        with (
            _reading(part.path) as file,
            # What is read ahead would be read beside this thread, and on after a page is found damaged.
            pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet,
        ):
            yield parquet
    except OutputError as error:
        if error.hint:  # an obstacle, not damage
            raise
        raise OutputError(
            f"A part in {part.path.parent} cannot be used: {error}.",
            hint="Move it away: a run without --retry-failed then does its rows again.",
        ) from None


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The file *path*, opened; what goes wrong is an OutputError, which has a hint if it is no damage.

    Arrow is given this and never a name, which it would look up in UTF-8 whatever the disk has.
    """
    try:
        # Opening a pipe would wait for ever, and a link's target is nobody's to keep.
        if not is_regular(path):
            raise OutputError(
                f"{on_one_line(path.name)} is damaged: it is a folder, a link or a pipe instead of a file"
            )
        with open_regular(path) as file:
            yield file
    except MemoryError:
        raise OutputError(
            f"{on_one_line(str(path))} cannot be read: that takes more memory than there is.",
            hint="Free memory and run the same command again. If that does not help, the part is damaged: "
            "move it out of the folder, and its rows are done again.",
        ) from None
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        number = getattr(error, "errno", None)
        if number is None:
            what = first_line(error, with_quotes=True)
            raise OutputError(f"{on_one_line(path.name)} is damaged: {what}") from None
        raise OutputError(
            f"{on_one_line(str(path))} cannot be read: {os.strerror(number)}.",
            hint=f"The part itself may be whole. {_what_to_do(number)} {_GO_ON}",
        ) from None


def _info(path: Path, footer: bytes, num_rows: int) -> PartInfo:
    try:
        body = json.loads(footer)
        if body["format"] != FORMAT_VERSION:
            written = sanitise(str(body["format"]))
            raise OutputError(f"{path.name} has format {written}, this version reads {FORMAT_VERSION}")
        first_row, rows = body["rows"]
        counts = body["counts"]
        info = PartInfo(
            body["fingerprint"],
            body["settings"],
            body["source"],
            first_row,
            rows,
            counts["ok"],
            counts["failed"],
        )
    except (ValueError, KeyError, TypeError, RecursionError):  # it may hold anything
        raise OutputError(f"{path.name} has a footer that cannot be read") from None
    if not _is_plausible(info):
        raise OutputError(f"{path.name} has a footer that no run writes")
    if num_rows != rows or info.num_ok + info.num_failed != rows:
        raise OutputError(f"{path.name} holds {num_rows} rows, its footer says {rows}")
    return info


def _is_plausible(info: PartInfo) -> bool:
    numbers = (info.first_row, info.num_rows, info.num_ok, info.num_failed)
    return (
        all(type(number) is int and 0 <= number < ENDLESS for number in numbers)
        and isinstance(info.fingerprint, str)
        and isinstance(info.settings, Mapping)
        and isinstance(info.source, Mapping)
        and isinstance(info.source.get("path"), str)
    )


def gaps(num_rows: int | None, done: Sequence[range]) -> list[range]:
    """The rows of a shard that no part holds yet, as ascending ranges.

    *num_rows* is None where it is unknown; the last gap is then endless. Raises OutputError
    where two parts hold the same row.

    >>> gaps(10, [range(6, 8), range(0, 4)])
    [range(4, 6), range(8, 10)]
    """
    end = ENDLESS if num_rows is None else num_rows
    found, next_row = [], 0
    for rows in sorted(done, key=lambda r: r.start):
        if rows.start < next_row:
            raise OutputError(f"Two parts hold row {rows.start} of the same source.")
        if rows.start > next_row:
            found.append(range(next_row, rows.start))
        next_row = rows.stop
    if next_row < end:
        found.append(range(next_row, end))
    return found
