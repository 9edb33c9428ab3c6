"""From the cells of an Arrow table to records: what an image, an id and a text look like in a column."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from glm4v_batch.errors import JobError
from glm4v_batch.templates import BrokenText
from glm4v_batch.types import ImageRef, Record


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns make a record: *fields* for the prompt, *passed* for the output."""

    image: str
    id: str | None
    fields: tuple[str, ...]
    passed: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Every column to read, each once."""
        return list(dict.fromkeys([*self.looked_at, *self.passed]))

    @property
    def looked_at(self) -> list[str]:
        """The columns whose values Python needs."""
        return list(dict.fromkeys([self.image, *([self.id] if self.id else []), *self.fields]))


def records(
    batch: pa.RecordBatch | pa.Table, source: str, first_row: int, layout: Layout, oversize_bytes: int = 0
) -> Iterator[Record]:
    """The rows of *batch*, the first of which is row *first_row* of the shard *source*.

    *oversize_bytes* says how much they took where their values were left out because of it.
    """
    columns = {name: _python_values(batch.column(name)) for name in layout.looked_at}
    passed = _alone(_table(batch).select(list(layout.passed)))
    for offset in range(batch.num_rows):
        values = {name: cells[offset] for name, cells in columns.items()}
        record = _record(values, source, first_row + offset, layout, passed.slice(offset, 1))
        yield replace(record, oversize_bytes=oversize_bytes) if oversize_bytes else record


def _table(batch: pa.RecordBatch | pa.Table) -> pa.Table:
    return pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch


def _alone(table: pa.Table) -> pa.Table:
    """*table* in memory of its own: a slice would keep the images beside it until its part is written."""
    if not table.num_columns:
        return table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def _record(values: Mapping[str, Any], source: str, row: int, layout: Layout, passed: pa.Table) -> Record:
    name = values[layout.id] if layout.id else None
    return Record(
        record_id=f"{source}#{row}" if name is None else str(name),
        source=source,
        row=row,
        images=_images(values[layout.image]),
        fields={column: values[column] for column in layout.fields},
        passed=passed,
    )


def check_image_column(schema: pa.Schema, column: str) -> None:
    """Raise JobError where *column* cannot hold images. A column that does not exist is not judged here."""
    if column in schema.names and not _can_hold_images(schema.field(column).type):
        raise JobError(
            f"source.image names {column}, which holds {schema.field(column).type}, not images.",
            hint="Images are encoded bytes, {bytes, path} structs, paths, or lists of these.",
        )


def _can_hold_images(kind: pa.DataType) -> bool:
    match kind:
        case pa.BaseExtensionType():
            return _can_hold_images(kind.storage_type)
        case pa.DictionaryType() | pa.ListType() | pa.LargeListType() | pa.FixedSizeListType():
            return _can_hold_images(kind.value_type)
        case pa.StructType():
            return "bytes" in {field.name for field in kind} or "path" in {field.name for field in kind}
    return kind in _BYTES_AND_PATHS


_BYTES_AND_PATHS = (
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.null(),
)


def _images(cell: Any) -> tuple[ImageRef, ...]:
    if isinstance(cell, list):
        return tuple(_image(item) for item in cell)
    return (_image(cell),)


def _image(cell: Any) -> ImageRef:
    match cell:
        case bytes():
            return ImageRef(data=cell)
        case str():
            return ImageRef(path=cell)
        case {"bytes": bytes(data)}:
            return ImageRef(data=data)
        case {"path": str(path)}:
            return ImageRef(path=path)
    return ImageRef()


def _python_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        # Parquet's text is not checked until it is looked at, nor are dates that Python cannot hold.
        return [_python_value(scalar) for scalar in column]
    return values


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _python_value(scalar[name]) for name in scalar.keys()}  # noqa: SIM118  no mapping
        is_flat = hasattr(scalar, "as_buffer")
        return BrokenText(scalar.as_buffer().to_pybytes().decode(errors="replace") if is_flat else "�")
