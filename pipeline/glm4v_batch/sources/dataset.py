"""Records from a data set of the `datasets` library: from the Hub, a folder, or what save_to_disk wrote.

Rows are taken as Arrow tables, so that images stay as they are stored: that library's own decoding
opens any path and URL that a record names, and this project's does not.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from glm4v_batch.errors import JobError, SourceError, first_line, sanitise
from glm4v_batch.job import DatasetSettings
from glm4v_batch.sources import RecordColumns, Shard, cut
from glm4v_batch.sources.cells import Layout, check_image_column, records
from glm4v_batch.types import Chunk, Record

_ROWS_PER_READ = 32
_SAMPLE_ROWS = 16
_HELD_CHUNKS = 2
_ROWS_TO_INFER_TYPES = 100


def open_dataset(
    settings: DatasetSettings, columns: RecordColumns
) -> "MappedDatasetSource | StreamedDatasetSource":
    """The data set that *settings* describe. One that is not streamed is first prepared on disk."""
    datasets = _library()
    with _loading(datasets, settings):
        if _is_saved(settings.path):
            return MappedDatasetSource(_load_saved(datasets, settings), settings, columns)
        where = {"path": settings.path, "name": settings.name, "revision": settings.revision}
        if settings.revision and Path(settings.path).exists():
            raise JobError(
                f"source.revision has no effect on the local folder {settings.path}: leave it out."
            )
        if settings.streaming:
            builder = datasets.load_dataset_builder(**where)
            return StreamedDatasetSource(builder, settings, columns)
        return MappedDatasetSource(datasets.load_dataset(**where, split=settings.split), settings, columns)


class MappedDatasetSource:
    """A data set on disk, whose rows can be addressed. It is one shard."""

    def __init__(self, dataset: Any, settings: DatasetSettings, columns: RecordColumns) -> None:
        self.schema: pa.Schema = dataset.features.arrow_schema
        self.root = _root(settings)
        check_image_column(self.schema, settings.image)
        self._layout = Layout(settings.image, settings.id, columns.fields, columns.passed)
        existing = [column for column in self._layout.columns if column in self.schema.names]
        # The Arrow format hands out what is stored; nothing is decoded, in lists of images neither.
        self._rows = dataset.select_columns(existing).with_format("arrow")
        identity: dict[str, str | int] = {
            "path": _shard_name(settings),
            "num_rows": len(dataset),
            "schema_sha256": hashlib.sha256(str(self.schema.remove_metadata()).encode()).hexdigest(),
            "sample_sha256": _sample(dataset.with_format("arrow")),
        }
        self._shard = Shard(_shard_name(settings), len(dataset), identity)

    def shards(self) -> Sequence[Shard]:
        """The data set's split, as one shard."""
        return [self._shard]

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        """The chunks that make up *gaps*."""
        for rows in cut(gaps, rows_per_chunk):
            yield Chunk(shard.path, rows.start, len(rows))

    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of *chunk*."""
        for rows in cut([chunk.rows], _ROWS_PER_READ):
            with _reading(self._shard.path, rows.start):
                table = self._rows[rows.start : rows.stop]
            yield from records(table, chunk.source, rows.start, self._layout)


class StreamedDatasetSource:
    """A data set that is read while it arrives. Its length shows at its end.

    The rows of the latest chunks are held, because going back means reading from the start again.
    """

    def __init__(self, builder: Any, settings: DatasetSettings, columns: RecordColumns) -> None:
        stream = builder.as_streaming_dataset(split=settings.split)
        if stream.features is not None:  # without known types there is nothing to decode
            stream = stream.decode(False)
        self.schema = _stream_schema(stream)
        self.root = _root(settings)
        check_image_column(self.schema, settings.image)
        self._layout = Layout(settings.image, settings.id, columns.fields, columns.passed)
        existing = [column for column in self._layout.columns if column in self.schema.names]
        self._stream = stream.select_columns(existing).with_format("arrow")
        identity: dict[str, str | int] = {
            "path": _shard_name(settings),
            "config": builder.config_id,
            "data": str(builder.hash),
        }
        self._shard = Shard(_shard_name(settings), None, identity)
        self._held: OrderedDict[Chunk, list[Record]] = OrderedDict()

    def shards(self) -> Sequence[Shard]:
        """The data set's split, as one shard of unknown length."""
        return [self._shard]

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        """Pull the stream chunk by chunk; rows outside *gaps* are passed over."""
        stream: Iterator[Record] | None = None
        next_row = 0
        for rows in cut(gaps, rows_per_chunk):
            if stream is None:
                stream, next_row = self._records_from(rows.start), rows.start
            held = list(islice(stream, rows.start - next_row, rows.stop - next_row))
            next_row = rows.stop
            if held:
                yield self._hold(Chunk(shard.path, rows.start, len(held)), held)
            if len(held) < len(rows):
                return

    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of *chunk*, from memory if it is one of the latest."""
        held = self._held.get(chunk)
        yield from islice(self._records_from(chunk.first_row), chunk.num_rows) if held is None else held

    def _hold(self, chunk: Chunk, held: list[Record]) -> Chunk:
        self._held[chunk] = held
        if len(self._held) > _HELD_CHUNKS:
            self._held.popitem(last=False)
        return chunk

    def _records_from(self, first_row: int) -> Iterator[Record]:
        row = first_row
        stream = self._stream.skip(first_row) if first_row else self._stream
        tables = stream.iter(batch_size=_ROWS_PER_READ)
        while True:
            with _reading(self._shard.path, row):
                table = next(tables, None)
            if table is None:
                return
            yield from records(table, self._shard.path, row, self._layout)
            row += table.num_rows


def _sample(rows: Any) -> str:
    """The hash of rows spread evenly over the data set.

    Not the library's own fingerprint: that of local files depends on where they lie and when they
    were touched.
    """
    digest = hashlib.sha256()
    for row in range(0, len(rows), max(1, len(rows) // _SAMPLE_ROWS)):
        table = rows[row : row + 1].combine_chunks().replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise JobError(
            "source.kind: dataset needs the datasets library, which is not installed.",
            hint="Install it with: pip install 'glm4v-batch[datasets]'",
        ) from None
    datasets.disable_progress_bars()
    library: ModuleType = datasets
    return library


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_saved(datasets: ModuleType, settings: DatasetSettings) -> Any:
    given = {"name": settings.name, "revision": settings.revision, "streaming": settings.streaming}
    if ignored := [f"source.{setting}" for setting, value in given.items() if value]:
        raise JobError(
            f"{', '.join(ignored)} has no effect on {settings.path}, which save_to_disk wrote: leave it out."
        )
    saved = datasets.load_from_disk(settings.path)
    if not isinstance(saved, datasets.DatasetDict):
        split = str(saved.split or "train")
        if split != settings.split:
            raise JobError(f"source.split is {settings.split}, but {settings.path} holds the split {split}.")
        return saved
    if settings.split not in saved:
        raise JobError(
            f"source.split is {settings.split}, which {settings.path} does not have.",
            hint=f"Its splits are: {', '.join(saved)}.",
        )
    return saved[settings.split]


def _stream_schema(stream: Any) -> pa.Schema:
    schema: pa.Schema
    if stream.features is not None:
        schema = stream.features.arrow_schema
        return schema
    for table in stream.with_format("arrow").iter(batch_size=_ROWS_TO_INFER_TYPES):
        schema = table.schema
        return schema
    return pa.schema([])


def _shard_name(settings: DatasetSettings) -> str:
    return ":".join(filter(None, (settings.path, settings.name, settings.split)))


def _root(settings: DatasetSettings) -> str | None:
    """Where the images of a data set lie that holds paths to them: in its own folder."""
    if settings.root is not None or Path(settings.path).is_dir():
        return settings.root or settings.path
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    # Links inside this folder lead to blobs in the same folder.
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=settings.path, repo_type="dataset"))
    return str(folder) if folder.is_dir() else None


@contextmanager
def _loading(datasets: ModuleType, settings: DatasetSettings) -> Iterator[None]:
    what = f"The data set {settings.path}"
    try:
        yield
    except (OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        is_here = _is_here(settings.path)
        hint = (
            "" if is_here else "There is no such folder here, so it was looked for on the Hugging Face Hub."
        )
        raise SourceError(f"{what} cannot be loaded: {_trouble(error)}.", hint=hint) from None
    except ValueError as error:  # an unknown configuration or split
        raise JobError(f"{what} cannot be loaded: {first_line(error, with_quotes=True)}.") from None


def _is_here(path: str) -> bool:
    """Whether something stands at *path*, for all the system tells."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def _trouble(error: Exception) -> str:
    """What *error* says; the path that it is about, too, which quotes nothing of the data."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {sanitise(os.fsdecode(error.filename))}"
    return first_line(error)


@contextmanager
def _reading(shard: str, row: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{shard} cannot be read at row {row}: {first_line(error)}.") from None
