"""The values that flow down the pipe, from a source row to a row of a part."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from glm4v_batch.failure_codes import FailureCode, Stage

if TYPE_CHECKING:
    import pyarrow as pa

Phase = Literal["compile", "vision", "prefill", "decode", "idle"]
"""What a device's time goes to; *idle* is when it had nothing to do though requests were there."""

_Kind = TypeVar("_Kind")

FinishReason = Literal["stop", "length"]
GridTHW = tuple[int, int, int]
"""Frames, patch rows and patch columns of one image, before the 2×2 merge."""

ENDLESS = 2**62
"""The number of rows of a source of unknown length: more than any has."""


def _pickled_in_order(kind: type[_Kind]) -> type[_Kind]:
    """Have objects of the data class *kind*, made with slots, pickled as its name and their values in order.

    What `dataclass` generates looks the fields up for each object, which takes about twice as long.
    """
    slots: tuple[str, ...] = kind.__slots__  # type: ignore[attr-defined]
    assert len(slots) > 1, "of one name attrgetter makes no tuple"
    values = attrgetter(*slots)
    kind.__reduce__ = lambda self: (kind, values(self))  # type: ignore[method-assign]
    return kind


@_pickled_in_order
@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that is not opened yet: its encoded bytes, or else a path below `source.root`.

    Both are None where the source holds a null; preprocessing then fails the record.
    """

    data: bytes | None = None
    path: str | None = None


@_pickled_in_order
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


@_pickled_in_order
@dataclass(frozen=True, slots=True)
class Record:
    """One source row with its images.

    *fields* holds the columns that the prompt asks for; *passed* is a table of one row with those
    that the output repeats, which never become Python values. A record that takes too much is left
    empty by its source, and *oversize_bytes* says how much that was.
    """

    record_id: str
    source: str
    row: int
    images: tuple[ImageRef, ...]
    fields: Mapping[str, Any]
    passed: "pa.Table | None" = field(default=None, repr=False, compare=False)
    oversize_bytes: int = 0


@_pickled_in_order
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


@_pickled_in_order
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

    @property
    def key(self) -> tuple[str, int]:
        """Its chunk and row, which no other record of the job has."""
        return self.chunk_id, self.row

    def failed(self, code: FailureCode, message: str) -> "Failure":
        """The failure of a request that the engine has no answer for."""
        return Failure(self.record_id, self.chunk_id, self.row, "generate", code, message)


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
    code: FailureCode
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

    @classmethod
    def padded(cls, batch_size: int, prompt_tokens: int, visual_patches: int, new_tokens: int) -> Self:
        """The shape of *batch_size* requests: the longest prompt and answer, and the patches of all."""
        return cls(
            batch_size=batch_size,
            padded_tokens=batch_size * prompt_tokens,
            visual_patches=visual_patches,
            kv_tokens=batch_size * (prompt_tokens + new_tokens),
            mask_cells=batch_size * prompt_tokens**2,
        )


@dataclass(frozen=True, slots=True)
class PeakSample:
    """What one batch took on each device. Where memory ran out the peak is a lower bound."""

    shape: BatchShape
    peak_bytes: tuple[int, ...]
    out_of_memory: bool


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What running one batch took: a line of `batches.jsonl`.

    *phase_seconds* says where the time went, as far as the engine knows; phases that overlap add up to more.
    Where batches flow into each other a line is a stretch of time: its shape has the mean of rows that
    decoded at once, and *asked_tokens* is what the answers that ended in it might have had at most. It is
    None where a line is a batch, whose shape says that too.
    """

    shape: BatchShape
    predicted_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    budget_bytes: tuple[int, ...]
    out_of_memory: bool
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    reserved_bytes: tuple[int, ...] = ()
    replica: int = 0
    phase_seconds: Mapping[Phase, float] = field(default_factory=dict)
    asked_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class BatchStart:
    """A batch that begins, by the chunk and row of each request: the suspects, should it kill its process."""

    rows: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded its model, in so many seconds; *held_bytes* is what that takes on each device."""

    replica: int
    seconds: float
    held_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica's process has ended by itself; its *num_requests* requests are done again.

    It is started anew, unless *is_final*. *trace* is the traceback where there is one.
    """

    replica: int
    reason: str
    num_requests: int
    is_final: bool = False
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing happened for a second: whoever pulls gets the chance to do something else."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What people should know of a run, and what changes nothing about its outcome."""

    message: str


@dataclass(frozen=True, slots=True)
class RequestSize:
    """How large a request is, before it exists: what plans are made of."""

    prompt_tokens: int
    visual_patches: int
    new_tokens: int


# Measured: 518 MiB for torch 2.11.0+cu130 on an H200, kernels loaded.
_CONTEXT_BYTES = 520 * 1024**2


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the run finds it, before it holds anything there.

    index        counts as nvidia-smi does, after CUDA_VISIBLE_DEVICES; None is the CPU
    uuid         how the driver names it, whatever the numbering; empty where it does not tell
    limit_bytes  the most that the job allows itself here (`devices.memory_limit_gib`), None: no limit
    """

    index: int | None
    name: str
    total_bytes: int
    free_bytes: int
    uuid: str = ""
    limit_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """What tensors may take: what is free beside CUDA's own context, within the job's limit."""
        room = self.free_bytes - (0 if self.index is None else _CONTEXT_BYTES)
        return max(0, room if self.limit_bytes is None else min(room, self.limit_bytes))

    def budget_bytes(self, memory_fraction: float) -> int:
        """What a run may have in use here, the weights included."""
        return int(self.usable_bytes * memory_fraction)

    @property
    def others_bytes(self) -> int:
        """What other processes hold."""
        return self.total_bytes - self.free_bytes

    @property
    def label(self) -> str:
        """The device's name for people, as nvidia-smi numbers it."""
        return "CPU" if self.index is None else f"GPU {self.index}"


Spot = int | Literal["cpu", "disk"]
"""Where a module lies: the place of a device among its replica's devices, or host memory, or the disk."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the model: its devices, which module lies on which, and the weights on each.

    *device_map* is complete: the names of modules that do not overlap, `""` for the whole model.
    *weight_bytes* has one entry per device; *offloaded_bytes* lie in host memory or on the disk.
    """

    devices: tuple[Device, ...]
    device_map: Mapping[str, Spot]
    weight_bytes: tuple[int, ...]
    offloaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """All copies of the model, why they lie so, and the chosen devices that no replica could use."""

    replicas: tuple[Replica, ...]
    reason: str
    idle: tuple[Device, ...] = ()
