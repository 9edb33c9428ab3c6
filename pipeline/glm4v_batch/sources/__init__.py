"""Where records come from: one `Source` for each kind of `source` in the job file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

from glm4v_batch.errors import JobError
from glm4v_batch.job import DatasetSettings, ParquetSettings, SourceSettings
from glm4v_batch.mistakes import suggest
from glm4v_batch.types import Chunk, Record

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Shard:
    """One source file, or one whole data set.

    *num_rows* is None where only reading to the end tells. *identity* holds at least the path and
    changes when the data does; it is equal between runs over the same data.
    """

    path: str
    num_rows: int | None
    identity: Mapping[str, str | int]


class Source(Protocol):
    """Where records come from. Reading a chunk twice gives the same records.

    *schema* holds every column that exists; *root* is the folder below which the paths of images
    are looked up.
    """

    @property
    def schema(self) -> "pa.Schema":
        """The names and types of all columns that exist."""

    @property
    def root(self) -> str | None:
        """The folder that image paths are relative to and may not leave; None: paths are refused."""

    def shards(self) -> Sequence[Shard]:
        """All shards, in an order that stays the same."""

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        """The chunks that make up *gaps*, the rows of *shard* that are not committed yet.

        Chunks are cut at multiples of *rows_per_chunk* from row 0. The last gap of a shard whose
        length is unknown is endless; its chunks stop where the data does.
        """

    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of *chunk*, in order; SourceError where they cannot be read."""


def open_source(settings: SourceSettings, field_columns: Sequence[str]) -> Source:
    """The source that *settings* describe; the `fields` of its records are *field_columns*.

    No data is read, only what describes it. A column that does not exist anywhere is left to
    `check_columns`, which knows the setting that asked for it.
    """
    match settings:
        case ParquetSettings():
            from .parquet import ParquetSource

            return ParquetSource(settings, field_columns)
        case DatasetSettings():
            from .dataset import open_dataset

            return open_dataset(settings, field_columns)
    assert_never(settings)


def check_columns(source_columns: Sequence[str], asked: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise one JobError for all columns that the job asks for and *where* does not have.

    *asked* is `Job.asked_columns()`: the columns by the setting that asks for them.
    """
    mistakes = [
        f"{setting} asks for {column}, which is not a column of {where}{suggest(column, source_columns)}"
        for setting, columns in asked.items()
        for column in columns
        if column not in source_columns
    ]
    if mistakes:
        hint = f"The columns are: {', '.join(source_columns)}."
        raise JobError("\n".join(mistakes), hint=hint)


def cut(gaps: Iterable[range], rows_per_chunk: int) -> Iterator[range]:
    """*gaps* in pieces that end at multiples of *rows_per_chunk*, whatever row they begin at.

    >>> list(cut([range(3, 9)], rows_per_chunk=4))
    [range(3, 4), range(4, 8), range(8, 9)]
    """
    for gap in gaps:
        start = gap.start
        while start < gap.stop:
            stop = min(gap.stop, (start // rows_per_chunk + 1) * rows_per_chunk)
            yield range(start, stop)
            start = stop


def first_line(error: BaseException) -> str:
    """What *error* says, in one line that fits into a message."""
    return str(error).strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__
