"""A request on its way through the packed engine, and the images of several put into calls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glm4v_batch.engines.packed_rows import Piece
from glm4v_batch.engines.packed_vision import MOST_IMAGES
from glm4v_batch.types import GridTHW, Request


@dataclass(slots=True, eq=False)
class Work:
    """A request with its prompt on the host, and its features on the device once they are there.

    input_ids        int64 [T]
    positions        int64 [3, T], M-RoPE
    position_offset  what positions are ahead of the count of tokens once the prompt has ended
    image_places     int64 [F], ascending, which of the prompt's tokens stand for images
    patches          uint8 [P, channels × patch²], of all images; in pinned memory until they are encoded
    features         [V, D] of each image, V of F, until it is prefilled; none before they are there
    num_used         visual tokens of the images before those
    num_launched     steps that write a token of the answer and were launched; *tokens* is behind
    """

    request: Request
    input_ids: Tensor
    positions: Tensor
    position_offset: int
    image_places: Tensor
    patches: Tensor
    features: Sequence[Tensor] = ()
    num_used: int = 0
    row: int = -1
    pool_start: int = 0
    num_prefilled: int = 0
    num_launched: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def num_pool_tokens(self) -> int:
        """What the pool must hold of it in the end."""
        return self.request.prompt_tokens + self.request.max_new_tokens

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are not in the pool."""
        return self.request.prompt_tokens - self.num_prefilled

    @property
    def decodes(self) -> bool:
        """Whether another step can give it another token."""
        return not self.num_left and self.num_launched < self.request.max_new_tokens

    def piece(self, num_tokens: int) -> Piece:
        """The next *num_tokens* tokens of the prompt."""
        begin, end = self.num_prefilled, self.num_prefilled + num_tokens
        first, last = np.searchsorted(self.image_places.numpy(), [begin, end]).tolist()
        return Piece(
            row=self.row,
            input_ids=self.input_ids[begin:end],
            positions=self.positions[:, begin:end],
            image_places=self.image_places[first:last] - begin,
            features=list(_between(self.features, first - self.num_used, last - self.num_used)),
            pool_place=self.pool_start + begin,
            num_before=begin,
            ends_prompt=end == self.request.prompt_tokens,
        )

    def forget_used_features(self) -> None:
        """Let go of the images that are in the pool whole: a request may have many."""
        num_prefilled = int(np.searchsorted(self.image_places.numpy(), self.num_prefilled))
        while self.features and self.num_used + len(self.features[0]) <= num_prefilled:
            self.num_used += len(self.features[0])
            self.features = self.features[1:]

    def unpin(self) -> None:
        """Keep the patches where the request has them: pinned memory is for those that wait."""
        self.patches = torch.from_numpy(self.request.inputs.patches)

    def begin_anew(self) -> None:
        """Forget all that was done."""
        self.features, self.row = (), -1
        self.num_used = self.num_prefilled = self.num_launched = 0
        self.tokens.clear()


def _between(tensors: Sequence[Tensor], first: int, last: int) -> Iterator[Tensor]:
    """The rows from *first* to *last* of *tensors*, as if these were one."""
    begin = 0
    for tensor in tensors:
        end = begin + len(tensor)
        if first < end and begin < last:
            yield tensor[max(0, first - begin) : last - begin]
        begin = end


@dataclass(frozen=True, slots=True)
class WorkImage:
    """One image of a work."""

    work: Work
    patches: Tensor
    grid: GridTHW


def images_of(work: Work) -> Iterator[WorkImage]:
    """The images of *work*, in their order."""
    begin = 0
    for grid in work.request.inputs.image_grid_thw:
        size = grid[0] * grid[1] * grid[2]
        yield WorkImage(work, work.patches[begin : begin + size], grid)
        begin += size


def calls(images: Sequence[WorkImage], most_patches: int) -> Iterator[list[WorkImage]]:
    """*images* in calls of at most *most_patches*; a larger image goes alone."""
    call: list[WorkImage] = []
    num_patches = 0
    for image in images:
        num_patches += len(image.patches)
        if call and (num_patches > most_patches or len(call) == MOST_IMAGES):
            yield call
            call, num_patches = [], len(image.patches)
        call.append(image)
    if call:
        yield call
