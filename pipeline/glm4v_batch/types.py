"""The values that flow down the pipe, from a source row to a row of a part."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

Stage = Literal["read", "decode", "render", "generate"]
FinishReason = Literal["stop", "length"]
GridTHW = tuple[int, int, int]
"""Frames, patch rows and patch columns of one image, before the 2×2 merge."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that is not opened yet: its encoded bytes, or else a path below `source.root`.

    Both are None where the source holds a null; preprocessing then fails the record.
    """

    data: bytes | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one shard: the unit of dispatch, commit and resume.

    *source* is the shard's path as the user's pattern found it; *first_row* counts from 0.
    """

    source: str
    first_row: int
    num_rows: int

    @property
    def chunk_id(self) -> str:
        """A name that no other chunk of the job has."""
        return f"{self.source}#{self.first_row}+{self.num_rows}"

    @property
    def rows(self) -> range:
        """The row numbers of the chunk."""
        return range(self.first_row, self.first_row + self.num_rows)


@dataclass(frozen=True, slots=True)
class Record:
    """One source row with its images.

    *fields* holds the columns that the prompt asks for; *passed* is a table of one row with those
    that the output repeats, which never become Python values.
    """

    record_id: str
    source: str
    row: int
    images: tuple[ImageRef, ...]
    fields: Mapping[str, Any]
    passed: "pa.Table | None" = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What the model sees of one record.

    input_ids       int32 [prompt_tokens], image placeholders already repeated once per visual token
    patches         uint8 [visual_patches, channels × patch_size²], in the order of transformers'
                    image processor, normalised and repeated over the temporal axis on the device
    image_grid_thw  one entry per image
    """

    input_ids: NDArray[np.int32]
    patches: NDArray[np.uint8]
    image_grid_thw: tuple[GridTHW, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A record ready for the model."""

    record_id: str
    chunk_id: str
    row: int
    prompt_tokens: int
    visual_patches: int
    max_new_tokens: int
    inputs: ModelInputs = field(repr=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """The model's answer to one request."""

    record_id: str
    chunk_id: str
    row: int
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one record has no answer. *code* is stable; *message* is for people and sanitised."""

    record_id: str
    chunk_id: str
    row: int
    stage: Stage
    code: str
    message: str


Result = Completion | Failure


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The features of the memory model.

    batch_size      requests
    padded_tokens   batch_size × longest prompt
    visual_patches  patches of all images, before the merge
    kv_tokens       batch_size × (longest prompt + max_new_tokens), the KV cache at its end
    mask_cells      batch_size × longest prompt², what a padded batch's attention mask takes
    """

    batch_size: int
    padded_tokens: int
    visual_patches: int
    kv_tokens: int
    mask_cells: int


@dataclass(frozen=True, slots=True)
class PeakSample:
    """What one batch took on each device. Where memory ran out the peak is a lower bound."""

    shape: BatchShape
    peak_bytes: tuple[int, ...]
    out_of_memory: bool


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What running one batch took: a line of `batches.jsonl`."""

    shape: BatchShape
    predicted_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    budget_bytes: tuple[int, ...]
    out_of_memory: bool
    seconds: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the run finds it.

    *index* counts as torch does, after CUDA_VISIBLE_DEVICES; None is the CPU.
    """

    index: int | None
    name: str
    total_bytes: int
    free_bytes: int

    @property
    def torch_name(self) -> str:
        """The device's name in torch, such as `cuda:0`."""
        return "cpu" if self.index is None else f"cuda:{self.index}"


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the model: its devices, which module lies on which, and the weights on each."""

    devices: tuple[Device, ...]
    device_map: Mapping[str, str]
    weight_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """All copies of the model, and why they lie so."""

    replicas: tuple[Replica, ...]
    reason: str
