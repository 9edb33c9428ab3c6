"""Make a request of one record: decode and resize its images, render and tokenise its prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from glm4v_batch.checkpoint import Checkpoint
from glm4v_batch.errors import Glm4vBatchError, RecordError, place_of, sanitise
from glm4v_batch.failure_codes import FailureCode, Stage
from glm4v_batch.images import ImageLimits, ImagePatches, read_image, visual_tokens, with_pixel_limits
from glm4v_batch.prompts import PromptRenderer
from glm4v_batch.types import Chunk, Failure, ModelInputs, Record, Request
from glm4v_batch.units import format_bytes

NO_MEMORY = "preparing it took more memory than a decoder may use"
"""What is said of a record that costs a decoder its memory."""

Item = tuple[Chunk, Record]
Prepared = Request | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSettings:
    """What turns a record into a request. It is sent to the workers once, when they start.

    *min_pixels* and *max_pixels* count height × width of one image; None keeps the checkpoint's.
    *record_seconds* is the patience with one record by the clock, so that a busy machine fails none;
    *record_cpu_seconds* is what its decoder may work for it.
    """

    checkpoint: Checkpoint
    system: str | None
    user: str
    max_new_tokens: int
    max_new_tokens_column: str | None = None
    root: Path | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    record_seconds: float = 180
    record_cpu_seconds: float = 60
    worker_memory_bytes: int = 4 * 1024**3

    def renderer(self) -> PromptRenderer:
        """The checkpoint's tokenizer with the job's prompt. Making one takes a while."""
        return PromptRenderer(self.checkpoint, system=self.system, user=self.user)


class Prepare(Protocol):
    """Makes a request of a record, or says why there is none."""

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        """The request of *record*, or its failure; never an exception for the record's own trouble."""
        ...


class Preprocessor:
    """Prepares records one at a time; it owns the tokenizer."""

    def __init__(self, settings: PreprocessSettings) -> None:
        self._settings = settings
        self._renderer = settings.renderer()
        self._processing = with_pixel_limits(
            settings.checkpoint.images, settings.min_pixels, settings.max_pixels
        )

    def __call__(self, chunk: Chunk, record: Record) -> Prepared:
        """The request of *record*. Whatever goes wrong with the record becomes its failure."""
        return request_or_failure(self._request, chunk, record)

    def _request(self, chunk: Chunk, record: Record) -> Request:
        settings, processing = self._settings, self._processing
        check_readable(record)
        new_tokens = most_new_tokens(record, settings)
        images = self._images(record, new_tokens)
        image_tokens = [visual_tokens(image.grid, processing.merge_size) for image in images]
        input_ids = self._renderer.render(record.fields, image_tokens, new_tokens)
        patches = _joined(images, len(processing.image_mean) * processing.patch_size**2)
        return Request(
            record_id=record.record_id,
            chunk_id=chunk.chunk_id,
            row=record.row,
            prompt_tokens=len(input_ids),
            visual_patches=len(patches),
            max_new_tokens=new_tokens,
            inputs=ModelInputs(input_ids, patches, tuple(image.grid for image in images)),
        )

    def _images(self, record: Record, new_tokens: int) -> list[ImagePatches]:
        """The images of *record*, as long as the context holds them: a list of them may be endless."""
        settings, processing = self._settings, self._processing
        images: list[ImagePatches] = []
        num_tokens = 0
        for ref in record.images:
            images.append(read_image(ref, settings.root, settings.limits, processing))
            num_tokens += visual_tokens(images[-1].grid, processing.merge_size)
            _check_context(num_tokens + new_tokens, settings)
        return images


def check_readable(record: Record) -> None:
    """Raise RecordError where the source left *record* out because of its size."""
    if record.oversize_bytes:
        raise RecordError("read", "record_too_large", f"its cells take {format_bytes(record.oversize_bytes)}")


def most_new_tokens(record: Record, settings: PreprocessSettings) -> int:
    """After how many tokens the answer of *record* is cut: the job's number, or its own where that is less.

    Raises RecordError where its own leaves no answer.
    """
    column = settings.max_new_tokens_column
    own = None if column is None else record.fields[column]
    if own is not None and own < 1:
        raise RecordError("render", "no_new_tokens", f"column {column} allows {own} new tokens")
    return settings.max_new_tokens if own is None else min(own, settings.max_new_tokens)


def _check_context(num_tokens: int, settings: PreprocessSettings) -> None:
    """Raise RecordError where *num_tokens* of images and answer alone exceed the model's context."""
    context_tokens = settings.checkpoint.context_tokens
    if num_tokens > context_tokens:
        raise RecordError(
            "render",
            "prompt_too_long",
            f"its images alone exceed the model's context of {context_tokens} tokens",
        )


def request_or_failure(
    make_request: Callable[[Chunk, Record], Request], chunk: Chunk, record: Record
) -> Prepared:
    """What *make_request* makes of *record*; whatever goes wrong with the record becomes its failure."""
    try:
        return make_request(chunk, record)
    except Glm4vBatchError:
        raise  # the trouble is not this record's: it stops the run
    except RecordError as error:
        return failure_of((chunk, record), error.stage, error.code, str(error))
    except MemoryError:
        return failure_of((chunk, record), "decode", "out_of_memory", NO_MEMORY)
    except Exception as error:  # noqa: BLE001, RUF100  the border where a record's trouble becomes its row
        return failure_of((chunk, record), "decode", "preprocess_error", place_of(error))


def _joined(images: Sequence[ImagePatches], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    if len(images) == 1:
        return images[0].patches
    return np.concatenate([np.empty((0, width), np.uint8), *(image.patches for image in images)])


def failure_of(item: Item, stage: Stage, code: FailureCode, message: str) -> Failure:
    """The failure of the record of *item*, with *message* made harmless."""
    chunk, record = item
    return Failure(record.record_id, chunk.chunk_id, record.row, stage, code, sanitise(message))
