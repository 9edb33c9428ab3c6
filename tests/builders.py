"""Small values for tests, with sensible defaults for what a test does not care about."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from glm4v_batch.failure_codes import FailureCode
from glm4v_batch.types import BatchShape, Chunk, Completion, Failure, ImageRef, ModelInputs, Record, Request


def request(row: int = 0, *, tokens: int = 10, patches: int = 8, new_tokens: int = 4) -> Request:
    """A request of *tokens* prompt tokens and *patches* visual patches."""
    inputs = ModelInputs(
        input_ids=np.arange(tokens, dtype=np.int32),
        patches=np.full((patches, 4), row % 256, np.uint8),
        image_grid_thw=((1, 2, patches // 2),) if patches else (),
    )
    return Request(f"id-{row}", "shard#0+1000", row, tokens, patches, new_tokens, inputs)


def requests(lengths: Sequence[int]) -> list[Request]:
    """One request per prompt length, rows counted from 0."""
    return [request(row, tokens=tokens) for row, tokens in enumerate(lengths)]


def completion(row: int, chunk: Chunk, text: str = "a caption") -> Completion:
    """A finished answer for *row* of *chunk*."""
    return Completion(f"id-{row}", chunk.chunk_id, row, text, "stop", 12, 3)


def failure(row: int, chunk: Chunk, code: FailureCode = "image_truncated") -> Failure:
    """A failure of *row* of *chunk*."""
    return Failure(f"id-{row}", chunk.chunk_id, row, "decode", code, "the image ends early")


def record(row: int, chunk: Chunk, **passed: object) -> Record:
    """The record at *row* of *chunk*, with the columns *passed* to pass through."""
    table = pa.table({name: [value] for name, value in passed.items()})
    return Record(f"id-{row}", chunk.source, row, (ImageRef(data=b""),), {}, table)


def shape(batch_size: int = 1, tokens: int = 100, patches: int = 400, new_tokens: int = 50) -> BatchShape:
    """The shape of *batch_size* equal requests."""
    return BatchShape(
        batch_size=batch_size,
        padded_tokens=batch_size * tokens,
        visual_patches=batch_size * patches,
        kv_tokens=batch_size * (tokens + new_tokens),
        mask_cells=batch_size * tokens**2,
    )
