"""Do failed rows again: read them from their source, and put what comes out into the parts they stand in.

All else in such a part is carried over as it is, column by column, without becoming Python values.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from glm4v_batch import parts
from glm4v_batch.output import Lock, result_row
from glm4v_batch.parts import RESULT_FIELDS, Part
from glm4v_batch.sources import Source
from glm4v_batch.types import Chunk, Record, Result

# What names a row stays; everything else of the result is new.
_RENEWED = [column for column in RESULT_FIELDS if column.name not in ("id", "source", "row")]


@dataclass(frozen=True, slots=True)
class Retry:
    """The failed *rows* of *part* that are to be done again.

    *chunk* reaches in the source, as it is called now, from the first of them to the last.
    """

    part: Part
    chunk: Chunk
    rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows to do."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Replaced:
    """*part* stands where *old* stood, *num_rows* of its rows done again."""

    part: Part
    old: Part
    num_rows: int


@dataclass(frozen=True, slots=True)
class Retries:
    """What can be done again: *of* each part, in the order of the parts.

    *codes* counts all failed rows by code, whether they are chosen or not; *num_stuck* of the chosen
    ones cannot be read again, because their source is gone or lies beyond the limit.
    """

    of: tuple[Retry, ...]
    codes: Mapping[str, int]
    num_stuck: int

    @property
    def num_rows(self) -> int:
        """Rows to do."""
        return sum(retry.num_rows for retry in self.of)


def find_retries(
    committed: Sequence[Part],
    moved: Mapping[str, str],
    num_rows: Mapping[str, int],
    wanted: Collection[str],
) -> Retries:
    """The failed rows of *committed* whose code is among *wanted*, or of any code where that is empty.

    *moved* maps paths in the parts to where that source is now; *num_rows* says how many rows of each
    source count. Raises OutputError where a part cannot be read.
    """
    found: list[Retry] = []
    codes: Counter[str] = Counter()
    num_stuck = 0
    for part in committed:
        if not part.info.num_failed:
            continue
        failed = parts.failed_rows(part)
        codes.update(code for _, code in failed)
        chosen = sorted(row for row, code in failed if not wanted or code in wanted)
        path = moved.get(part.info.source_path, part.info.source_path)
        rows = tuple(row for row in chosen if row < num_rows.get(path, 0))
        num_stuck += len(chosen) - len(rows)
        if rows:
            found.append(Retry(part, Chunk(path, rows[0], rows[-1] - rows[0] + 1), rows))
    return Retries(tuple(found), dict(codes.most_common()), num_stuck)


class Replacements:
    """Collects the new results, and replaces each part once the last of its rows is there.

    *lock* is the hold on their folder.
    """

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._open: dict[str, _OpenRetry] = {}

    def begin(self, retry: Retry) -> None:
        """Expect results for the rows of *retry*.

        Raises OutputError, before any of them is done, where the part that they stand in cannot be read
        to its end, or the disk has no room for those that are begun.
        """
        parts.read_rows(retry.part)
        self._open[retry.chunk.chunk_id] = _OpenRetry(retry)
        with parts.refusing(self._lock.folder):
            num_bytes = sum(begun.retry.part.path.stat().st_size for begun in self._open.values())
        parts.check_room(self._lock.folder, num_bytes)

    def add(self, result: Result) -> Replaced | None:
        """Take a result in; the part that it completes, once that is durable, or None."""
        begun = self._open[result.chunk_id]
        assert result.row not in begun.results, f"two results for row {result.row} of {result.chunk_id}"
        begun.results[result.row] = result_row(result)
        if len(begun.results) < begun.retry.num_rows:
            return None
        del self._open[result.chunk_id]
        return self._replace(begun)

    def _replace(self, whole: "_OpenRetry") -> Replaced:
        old = whole.retry.part
        table = _renewed(parts.read_rows(old), whole.results)
        num_ok = pc.sum(pc.equal(table.column("status"), "ok")).as_py()
        info = replace(old.info, num_ok=num_ok, num_failed=old.info.num_rows - num_ok)
        self._lock.check()
        return Replaced(parts.replace(self._lock.folder, table, info, old), old, len(whole.results))


@dataclass(slots=True)
class _OpenRetry:
    retry: Retry
    results: dict[int, dict[str, Any]] = field(default_factory=dict)


def _renewed(table: pa.Table, results: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """*table* with the columns of a result replaced in the rows of *results*."""
    ordered = [results[row] for row in table.column("row").to_pylist() if row in results]
    mask = pc.is_in(table.column("row"), pa.array(list(results), pa.int64())).combine_chunks()
    for column in _RENEWED:
        values = pa.array([result.get(column.name) for result in ordered], column.type)
        kept = table.column(column.name).combine_chunks()
        index = table.schema.get_field_index(column.name)
        table = table.set_column(index, column, pc.replace_with_mask(kept, mask, values))
    return table


def retried_records(
    source: Source, retries: Iterable[Retry], replacements: Replacements
) -> Iterator[tuple[Chunk, Record]]:
    """The records to do again, one part after the other."""
    for retry in retries:
        replacements.begin(retry)
        wanted = frozenset(retry.rows)
        for record in source.read(retry.chunk):
            if record.row in wanted:
                yield retry.chunk, replace(record, passed=None)
