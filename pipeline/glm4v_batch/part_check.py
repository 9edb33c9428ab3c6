"""Read a part from its first byte to its last and say everything that is wrong with it.

Nothing about the file is trusted: it may be a pipe, another program's, or made to eat memory. Reading
is streamed, and within a limit on the memory of this process that holds while parts are read.
"""

import resource
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from glm4v_batch.confinement import limit_memory
from glm4v_batch.durable import open_regular
from glm4v_batch.errors import OutputError, first_line, on_one_line, sanitise
from glm4v_batch.failure_codes import FailureCode, Stage
from glm4v_batch.output import fingerprint
from glm4v_batch.parts import RESULT_FIELDS, PartInfo, part_name, read_part
from glm4v_batch.types import FinishReason
from glm4v_batch.units import format_bytes, format_count

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 4096
# A row number alone takes more than a byte, compressed; such a file would be read for days.
_MAX_ROWS_PER_BYTE = 16
_MEMORY_BYTES = 768 << 20

_ANSWER = ("text", "finish_reason", "prompt_tokens", "completion_tokens")
_ERROR = ("error_stage", "error_code", "error_message")
_KNOWN = {
    "finish_reason": get_args(FinishReason),
    "error_stage": get_args(Stage),
    "error_code": get_args(FailureCode),
}
_MOVE_AWAY = "Move it out of the folder; the next run does its rows again."
_MEND_DISK = "Mend that first; the part itself may be whole."

Kind = Literal["unreadable", "inconsistent", "other_job", "doubled", "changed", "beyond", "missing"]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a folder is not right: in which file or source, what is wrong there, and what to do.

    Whatever their names hold, *where* and *what* are text that no terminal obeys, each on one line.
    """

    kind: Kind
    where: str
    what: str
    todo: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", on_one_line(self.where))
        object.__setattr__(self, "what", on_one_line(self.what))


_NO_IDS: Ids = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class PartCheck:
    """What reading a whole part showed.

    *info* is None where its footer cannot be used. *failures* counts its failed rows by code; *ids*
    holds a hash of each row's id. *has_checksums* tells whether its pages carry them;
    *passed* names the columns passed through with their types.
    """

    path: Path
    info: PartInfo | None = None
    faults: tuple[Fault, ...] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    ids: Ids = field(default_factory=lambda: _NO_IDS, repr=False, compare=False)
    has_checksums: bool = True
    passed: tuple[str, ...] = ()

    def without_ids(self) -> "PartCheck":
        """The same, in little memory."""
        return replace(self, ids=_NO_IDS)


class _UnusableError(Exception):
    """Why nothing more can be learned from a file, and what to do."""

    def __init__(self, what: str, todo: str = _MOVE_AWAY) -> None:
        super().__init__(what)
        self.todo = todo


def check_parts(paths: Iterable[Path]) -> Iterator[PartCheck]:
    """What is wrong with each of *paths*; one that is gone meanwhile is left out."""
    # One after the other: threads were slower, as half of the work is Python's.
    with _limited_memory():
        for path in paths:
            with suppress(FileNotFoundError):
                yield check_part(path)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process grow by a bounded number of bytes, where the system can tell its size."""
    before, pool = resource.getrlimit(resource.RLIMIT_AS), pa.default_memory_pool()
    with suppress(OSError):  # no /proc that tells it
        limit_memory(_MEMORY_BYTES)
    # The default pool reserves a GiB of addresses at once, used or not.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        pa.set_memory_pool(pool)


def check_part(path: Path) -> PartCheck:
    """What is wrong with the part at *path*, and what it holds. Raises FileNotFoundError where it is gone."""
    while True:
        before = _version(path)
        check = _check(path)
        # A run that retries failures replaces parts: what was read may be of two files.
        if _version(path) == before:
            return check


def _version(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check(path: Path) -> PartCheck:
    try:
        info = _footer(path)
    except _UnusableError as error:
        return PartCheck(path, faults=(Fault("unreadable", path.name, str(error), error.todo),))
    reading = _Reading(path, info)
    try:
        reading.read()
    except MemoryError:
        limit = format_bytes(_MEMORY_BYTES)
        what = f"{_shown(path)} takes more memory to read than any part does: over {limit}."
        reading.faults.append(Fault("unreadable", path.name, what, _MOVE_AWAY))
    except (OSError, UnicodeDecodeError, pa.ArrowException, _UnusableError) as error:
        what = f"{_shown(path)} is damaged: {first_line(error, with_quotes=True)}."
        # Arrow's own finding has no number; the system's trouble has.
        todo = _MEND_DISK if getattr(error, "errno", None) else _MOVE_AWAY
        reading.faults.append(Fault("unreadable", path.name, what, todo))
    return reading.result()


def _footer(path: Path) -> PartInfo:
    """What the footer of *path* says, once it is certain that looking at it does no harm."""
    _refuse_odd_file(path)
    try:
        return read_part(path).info
    except OutputError as error:
        todo = _MEND_DISK if error.hint else _MOVE_AWAY
        raise _UnusableError(f"{sanitise(str(error)).rstrip('.')}.", todo) from None


def _refuse_odd_file(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise _UnusableError(f"{_shown(path)} is not a regular file.")
    try:
        with path.open("rb") as file:
            file.seek(max(0, found.st_size - 8))
            tail = file.read(8)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _UnusableError(f"{_shown(path)} cannot be read: {error.strerror}.", _MEND_DISK) from None
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC:
        raise _UnusableError(f"{_shown(path)} does not end as a Parquet file does.")
    if length > min(found.st_size, _MAX_FOOTER_BYTES):
        raise _UnusableError(f"{_shown(path)} claims a footer of {format_bytes(length)}.")


class _Reading:
    """What is known of a part so far while its rows pass by."""

    def __init__(self, path: Path, info: PartInfo) -> None:
        self.faults: list[Fault] = []
        self._path = path
        self._info = info
        self._next_row = info.first_row
        self._num_ok = 0
        self._wrong: dict[str, tuple[int, int]] = {}
        self._failures: Counter[str] = Counter()
        self._ids: list[Ids] = []
        self._has_checksums = True
        self._passed: tuple[str, ...] = ()

    def read(self) -> None:
        """Look at the name, the footer and every page."""
        info = self._info
        name = part_name(info.source_path, info.first_row, info.num_rows, info.fingerprint)
        if self._path.name != name:
            self._add(f"is named otherwise than its footer says, which makes it {name}")
        if fingerprint(info.settings) != info.fingerprint:
            self._add("has a fingerprint that is not that of the settings in its footer")
        # Not by its name, which Arrow would look up in UTF-8 whatever the disk has.
        with open_regular(self._path) as opened, pa.PythonFile(opened) as file:
            self._read_rows(file)

    def _read_rows(self, file: pa.NativeFile) -> None:
        parquet = pq.ParquetFile(
            file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        metadata = parquet.metadata
        _refuse_lies(metadata, file.size())
        # A writer gives one to all pages or to none, and the first page follows the magic bytes.
        self._has_checksums = _page_has_checksum(file.read_at(32, len(_MAGIC)))
        if self._has_other_columns(parquet.schema_arrow):
            return
        for group in range(metadata.num_row_groups):
            rows = _rows_at_once(metadata.row_group(group))
            for batch in parquet.iter_batches(rows, row_groups=[group], use_threads=False):
                batch.validate(full=True)
                self._take(batch)
        self._compare_counts()

    def _has_other_columns(self, schema: pa.Schema) -> bool:
        expected = pa.schema(RESULT_FIELDS)
        passed = self._info.settings.get("output.columns", [])
        found = pa.schema(list(schema)[: len(expected)])
        self._passed = tuple(f"{field.name} {field.type}" for field in list(schema)[len(expected) :])
        if found.equals(expected) and schema.names[len(expected) :] == passed:
            return False
        self._add("has other columns than the parts of its job have")
        return True

    def _take(self, batch: pa.RecordBatch) -> None:
        first_row, source = self._next_row, self._info.source_path
        for what, mask in _wrong_rows(batch, first_row, source):
            if count := _num_true(mask):
                num_before, first = self._wrong.get(what, (0, first_row + pc.index(mask, True).as_py()))
                self._wrong[what] = (num_before + count, first)
        self._next_row += batch.num_rows
        self._num_ok += _num_true(_equals(batch, "status", "ok"))
        if batch.column("error_code").null_count < batch.num_rows:
            self._failures.update(code for code in batch.column("error_code").to_pylist() if code is not None)
        self._ids.append(np.fromiter(map(hash, batch.column("id").to_pylist()), np.int64, batch.num_rows))

    def _compare_counts(self) -> None:
        num_rows = self._next_row - self._info.first_row
        counted = (num_rows, self._num_ok, num_rows - self._num_ok)
        claimed = (self._info.num_rows, self._info.num_ok, self._info.num_failed)
        if counted != claimed:
            self._add(
                "holds {} rows, {} ok and {} not, its footer says {}, {} and {}".format(*counted, *claimed)
            )

    def _add(self, what: str) -> None:
        fault = Fault("inconsistent", self._path.name, f"{_shown(self._path)} {sanitise(what)}.", _MOVE_AWAY)
        self.faults.append(fault)

    def result(self) -> PartCheck:
        """All that was found."""
        for what, (count, first) in self._wrong.items():
            self._add(f"holds {format_count(count, 'row')} {what}, the first is row {first}")
        return PartCheck(
            path=self._path,
            info=self._info,
            faults=tuple(self.faults),
            failures=dict(self._failures),
            ids=np.concatenate(self._ids) if self._ids else _NO_IDS,
            has_checksums=self._has_checksums,
            passed=self._passed,
        )


def _wrong_rows(batch: pa.RecordBatch, first_row: int, source: str) -> Iterator[tuple[str, pa.Array]]:
    """What may be wrong with a row, and a mask of the rows with which it is."""
    expected = pa.array(np.arange(first_row, first_row + batch.num_rows))
    ok, failed = _equals(batch, "status", "ok"), _equals(batch, "status", "failed")
    answered, lacks_answer = _holds_any(batch, _ANSWER), _lacks_any(batch, _ANSWER)
    explained, lacks_reason = _holds_any(batch, _ERROR), _lacks_any(batch, _ERROR)
    yield "out of order", pc.invert(pc.equal(pc.fill_null(batch.column("row"), -1), expected))
    yield "of another source", pc.invert(_equals(batch, "source", source))
    yield "without an id", pc.is_null(batch.column("id"))
    yield "with a status other than ok and failed", pc.invert(pc.or_(ok, failed))
    yield "that count as ok without an answer", pc.and_(ok, lacks_answer)
    yield "that count as ok with an error", pc.and_(ok, explained)
    yield "that count as failed without a reason", pc.and_(failed, lacks_reason)
    yield "that count as failed with an answer", pc.and_(failed, answered)
    for column in _KNOWN:
        yield f"with an unknown {column}", _is_unknown(batch, column)


def _holds_any(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.Array:
    return reduce(pc.or_, (pc.is_valid(batch.column(name)) for name in columns))


def _lacks_any(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.Array:
    return reduce(pc.or_, (pc.is_null(batch.column(name)) for name in columns))


def _is_unknown(batch: pa.RecordBatch, column: str) -> pa.Array:
    values = [*_KNOWN[column], None]
    return pc.invert(pc.is_in(batch.column(column), value_set=pa.array(values, pa.string())))


def _equals(batch: pa.RecordBatch, column: str, value: str) -> pa.Array:
    return pc.fill_null(pc.equal(batch.column(column), value), fill_value=False)


def _num_true(mask: pa.Array) -> int:
    return int(mask.true_count)


def _refuse_lies(metadata: pq.FileMetaData, size: int) -> None:
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise _UnusableError(f"it claims {metadata.num_rows} rows, its row groups {sum(counts)}")
    if metadata.num_rows > _MAX_ROWS_PER_BYTE * size:
        raise _UnusableError(f"it claims {metadata.num_rows} rows in {format_bytes(size)}")


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    # The whole group's size: asking for a column's aborts the process where the footer is damaged.
    return max(
        1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * int(group.num_rows) // max(1, int(group.total_byte_size)))
    )


def _page_has_checksum(header: bytes) -> bool:
    """Whether a page *header* has its field 4, the CRC: Arrow checks one if it is there, and does not tell.

    Thrift's compact protocol: the first three fields are 32-bit numbers (a byte for "the next field, a
    number", then a varint); the next byte tells whether the field that follows is such a one too.
    """
    rest = iter(header)
    for _ in range(3):
        if next(rest, None) != 0x15:
            return False
        next((byte for byte in rest if byte < 0x80), None)
    return list(islice(rest, 1)) == [0x15]


def _shown(path: Path) -> str:
    return sanitise(path.name)
