"""Look at rows as the model will see them, through the same code that a run uses."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from glm4v_batch.parts import gaps
from glm4v_batch.plan import OpenJob, preprocess_settings
from glm4v_batch.preprocess import preprocess
from glm4v_batch.prompts import PromptRenderer
from glm4v_batch.types import Chunk, Failure, Record, Request


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """A row before the model: *images* are (height, width, visual tokens) after resizing.

    *prompt* is the whole prompt, special tokens included; a run of visual tokens stands as one.
    """

    record_id: str
    source: str
    row: int
    images: tuple[tuple[int, int, int], ...]
    prompt_tokens: int
    prompt: str
    failure: Failure | None


def inspect_rows(opened: OpenJob, num_rows: int) -> list[InspectedRow]:
    """The first *num_rows* rows of the source, preprocessed in a process like a run's."""
    records = list(islice(_records(opened, num_rows), num_rows))
    settings = preprocess_settings(opened)
    renderer = settings.renderer()
    results = preprocess(iter(records), settings, num_workers=1)
    return [
        _row(opened, renderer, record, result) for (_, record), result in zip(records, results, strict=True)
    ]


def _records(opened: OpenJob, num_rows: int) -> Iterator[tuple[Chunk, Record]]:
    for shard in opened.shards:
        for chunk in opened.source.chunks(shard, gaps(shard.num_rows, []), num_rows):
            for record in opened.source.read(chunk):
                yield chunk, record


def _row(
    opened: OpenJob, renderer: PromptRenderer, record: Record, result: Request | Failure
) -> InspectedRow:
    if isinstance(result, Failure):
        return InspectedRow(record.record_id, record.source, record.row, (), 0, "", result)
    images = opened.checkpoint.images
    sizes = tuple(
        (
            rows * images.patch_size,
            columns * images.patch_size,
            frames * rows * columns // images.merge_size**2,
        )
        for frames, rows, columns in result.inputs.image_grid_thw
    )
    prompt = renderer.show(result.inputs.input_ids.tolist())
    return InspectedRow(
        record.record_id, record.source, record.row, sizes, result.prompt_tokens, prompt, None
    )
