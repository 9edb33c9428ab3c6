"""A call of the vision tower: images side by side, filled up to one of few sizes where graphs serve them."""

# P patches, S images

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from glm4v_batch.packed_limits import filled_up
from glm4v_batch.types import GridTHW

MOST_IMAGES = 31
"""Of one call."""

# What is filled up is one more image.
_SLOTS = MOST_IMAGES + 1
_NO_IMAGE = (1, 2, 2)


@dataclass(frozen=True, slots=True)
class VisionCall:
    """What the vision tower computes with.

    patches    uint8 [P, channels × patch²]
    positions  int64 [P, 2], row and column of each patch
    ends       int32 [S + 1], where each image begins, and the end
    grids      int64 [S, 3]
    """

    patches: Tensor
    positions: Tensor
    ends: Tensor
    grids: Tensor

    @property
    def size(self) -> int:
        """What all calls have in common that one graph serves."""
        return len(self.patches)

    def tensors(self) -> list[Tensor]:
        """All of it, in an order of its own."""
        return [self.patches, self.positions, self.ends, self.grids]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "VisionCall":
        """The same call, of other tensors in that order."""
        patches, positions, ends, grids = tensors
        return VisionCall(patches, positions, ends, grids)


def vision_call(
    images: Sequence[Tensor],
    grids: Sequence[GridTHW],
    merge_size: int,
    device: torch.device,
    *,
    fills_up: bool,
) -> VisionCall:
    """The call for *images*, of each its uint8 patches [P, channels × patch²], on *device*.

    With *fills_up* it has as many patches and images as the graph for its size, those that are missing blank.
    """
    sizes = [len(image) for image in images]
    missing = filled_up(sum(sizes)) - sum(sizes) if fills_up else 0
    patches = _copied_beside(images, device)
    blank = torch.zeros(missing, patches[0].shape[1], dtype=torch.uint8, device=device)
    places = get_vision_position_ids(torch.tensor(grids), merge_size)
    num_blank = _SLOTS - len(images) if fills_up else 0
    ends = torch.tensor([0, *sizes, missing, *[0] * (num_blank - 1)][: len(images) + num_blank + 1]).cumsum(0)
    return VisionCall(
        patches=torch.cat([*patches, blank]),
        positions=sent(torch.nn.functional.pad(places, (0, 0, 0, missing)), device),
        ends=sent(ends.int(), device),
        grids=sent(torch.tensor([*grids, *[_NO_IMAGE] * num_blank]), device),
    )


def _copied_beside(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """*images* on *device*; from pinned memory while it is still at work on what came before."""
    if not all(image.is_pinned() for image in images):
        return [image.to(device) for image in images]
    current, beside = torch.cuda.current_stream(device), _copying_stream(device)
    with torch.cuda.stream(beside):
        copies = [image.to(device, non_blocking=True) for image in images]
    current.wait_stream(beside)
    for copy in copies:
        # It is memory of the one stream and read on the other: not to be given to another tensor before.
        copy.record_stream(current)
    return copies


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """*tensor* on *device*; from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
