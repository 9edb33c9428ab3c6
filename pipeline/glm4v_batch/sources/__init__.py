"""Where records come from: one `Source` for each kind of `source` in the job file."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, assert_never

from glm4v_batch.errors import JobError, SourceError
from glm4v_batch.job import DatasetSettings, ParquetSettings, SourceSettings
from glm4v_batch.mistakes import suggest
from glm4v_batch.types import Chunk, Record

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS_SHOWN = 50


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


@dataclass(frozen=True, slots=True)
class RecordColumns:
    """What records carry besides id and images: *fields* for the prompt, *passed* for the output."""

    fields: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()


def open_source(
    settings: SourceSettings, columns: RecordColumns, *, own_output: Path | None = None
) -> Source:
    """The source that *settings* describe; its records carry *columns*.

    Files below *own_output* are the job's own answers and do not count.
    No data is read, only what describes it. A column that does not exist anywhere is left to
    `check_columns`, which knows the setting that asked for it.
    """
    match settings:
        case ParquetSettings():
            from glm4v_batch.sources.parquet import ParquetSource
            from glm4v_batch.sources.reader import Reader

            return ParquetSource(Reader(settings, columns, own_output), settings, columns)
        case DatasetSettings():
            from glm4v_batch.sources.dataset import open_dataset

            return open_dataset(settings, columns)
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
        more = len(source_columns) - _COLUMNS_SHOWN
        shown = [*source_columns[:_COLUMNS_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]
        hint = f"The columns are: {', '.join(shown)}."
        raise JobError("\n".join(mistakes), hint=hint)


def check_root(source: Source, image_column: str) -> None:
    """Refuse image paths without a folder to look them up in: every row would fail.

    Raises JobError where `source.root` is not set, SourceError where it is no folder or one that this
    user may not enter.
    """
    if not _holds_text(source.schema.field(image_column).type):
        return
    if source.root is None:
        raise JobError(
            f"source.image: the column {image_column} holds text, which is taken for paths of images, and "
            "source.root is not set.",
            hint="Set source.root to the folder below which they stand, or name another column.",
        )
    trouble, hint = _trouble_of_root(source.root)
    if trouble:
        raise SourceError(
            f"source.root {source.root} {trouble}, and the column {image_column} holds paths below it.",
            hint=hint,
        )


def _trouble_of_root(root: str) -> tuple[str, str]:
    """What keeps images below *root* from being looked up, and what to do; both empty where nothing does."""
    try:
        # With the dot it has to be a folder and let this user in. `Path` would drop it, and its `is_dir`
        # raises what refuses until Python 3.13 and hides it from 3.14 on.
        os.stat(os.path.join(root, "."))  # noqa: PTH116, PTH118
    except (FileNotFoundError, NotADirectoryError):
        return "is not a folder", "Mount it, or correct source.root."
    except PermissionError as error:
        hint = "Mend its permissions: this user has to enter it and the folders that lead to it."
        return f"cannot be entered: {error.strerror}", hint
    except OSError as error:
        return f"cannot be looked up: {error.strerror}", "Mend this, or correct source.root."
    return "", ""


def check_prompt(schema: "pa.Schema", columns: Sequence[str]) -> None:
    """Raise JobError where one of *columns*, which the prompt asks for, holds neither text nor numbers."""
    for name in columns:
        kind = schema.field(name).type
        if not _can_be_written(kind):
            raise JobError(
                f"prompt.user asks for {{{name}}}, a column of {kind}, which has no one way to be written.",
                hint="Use a column of text, whole or floating-point numbers, or true and false.",
            )


def check_whole_numbers(schema: "pa.Schema", columns: Sequence[str]) -> None:
    """Raise JobError where one of *columns*, which rows take a setting from, holds no whole numbers."""
    from pyarrow import types

    for name in columns:
        kind = schema.field(name).type
        if not (types.is_integer(kind) or types.is_null(kind)):
            raise JobError(
                f"generation.max_new_tokens_column names {name}, a column of {kind}.",
                hint="Use a column of whole numbers.",
            )


def _can_be_written(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _can_be_written(kind.value_type)
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return any(is_kind(kind) for is_kind in plain) or (_holds_text(kind) and not types.is_nested(kind))


def _holds_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    if types.is_struct(kind):
        return {field.name for field in kind} & {"bytes", "path"} == {"path"}
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


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
