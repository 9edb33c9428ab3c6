"""How much the packed engine may have in hand at once, so that everything fits each device of a replica."""

import math
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glm4v_batch.activations import FloatArray
from glm4v_batch.errors import PlacementError
from glm4v_batch.types import BatchShape, RequestSize
from glm4v_batch.units import format_bytes

GPU_ROWS = 256
CPU_ROWS = 32
MOST_STEP_TOKENS = 4096
MOST_PATCHES = 16_384
FEWEST_PROMPT_TOKENS = 64
"""Of a step that has any."""

# Steps have sizes this far apart, and from _FEW_TOKENS on a sixteenth of the next power of two.
_TOKEN_STEP = 64
# So few take hardly less time than a few more: the weights are read all the same.
_FEW_TOKENS = 512
# A call of the vision tower has a multiple of the first up to MOST_PATCHES, and of the second beyond.
_PATCH_STEP, _LARGE_PATCH_STEP = 1024, 2048
# Smaller calls of the vision tower are slower, hardly so as CUDA graphs: the host launches as many kernels.
_PATCHES = (MOST_PATCHES, MOST_PATCHES // 2, 0)
_MARGIN = 1.05
# Prompts whose images are encoded wait for about two steps' worth of tokens.
_STEPS_AHEAD = 3
# Requests longer than the typical one must find a place too.
_POOL_PER_TYPICAL = 1.5
_WORTH_SMALLER_CALLS = 1.15
# Answers that end early want longer steps than those of full length, worth so many of the requests at once.
_WORTH_LONGER_STEPS = 0.95
_ROW_STEP = 8


@dataclass(frozen=True, slots=True)
class PackedLimits:
    """What one replica may have in hand at once.

    max_rows      requests that prefill or decode
    pool_tokens   tokens of all of them in the KV pool
    step_tokens   tokens of one step: one for each row, and of prompts what is left, 64 at least
    patches       patches of one call of the vision tower; one larger image goes alone
    """

    max_rows: int
    pool_tokens: int
    step_tokens: int
    patches: int

    def prompt_tokens(self, num_rows: int) -> int:
        """How many tokens of prompts a step may have beside *num_rows* rows."""
        return max(FEWEST_PROMPT_TOKENS, self.step_tokens - num_rows)


@dataclass(frozen=True, slots=True)
class PackedNeeds:
    """What the packed engine takes on one device: see the functions of the same names in `activations`."""

    coefficients: FloatArray
    pool_token_bytes: float
    feature_token_bytes: int


@dataclass(frozen=True, slots=True)
class PackedDemand:
    """What the packed engine of one replica is asked for.

    *needs* has one entry per device; *image_patches* is the most that one image may have: the vision
    tower takes an image whole.
    """

    needs: tuple[PackedNeeds, ...]
    max_rows: int
    typical: RequestSize
    worst: RequestSize
    image_patches: int


def packed_limits(demand: PackedDemand, room_bytes: Sequence[int]) -> PackedLimits:
    """The limits with the largest pool that fits *room_bytes*, beside the weights, with features and peaks.

    Images are encoded fewer at a time where that leaves much more room for requests. Raises PlacementError
    where not even the worst request fits, piece by piece.
    """
    best = PackedLimits(demand.max_rows, 0, 0, 0)
    # Where no row of the sample has an image, one may come all the same.
    largest = max(1, demand.image_patches)
    for patches in dict.fromkeys(filled_up(max(largest, patches)) for patches in _PATCHES):
        found = _with_patches(demand, room_bytes, patches)
        is_needed = _holds_worst(found, demand) and not _holds_worst(best, demand)
        if is_needed or found.pool_tokens > _WORTH_SMALLER_CALLS * best.pool_tokens:
            best = found
    if not _holds_worst(best, demand):
        raise _no_room(tokens_of(demand.worst), best, room_bytes)
    return best


def filled_up(num_patches: int) -> int:
    """*num_patches* rounded up to one of the few sizes that calls of the vision tower have as CUDA graphs."""
    step = _PATCH_STEP if num_patches <= MOST_PATCHES else _LARGE_PATCH_STEP
    return -(-num_patches // step) * step


def rounded_tokens(num_tokens: int) -> int:
    """*num_tokens* of a step rounded up to one of the few sizes that steps have as CUDA graphs."""
    step = _step_between(num_tokens)
    return -(-num_tokens // step) * step


def _step_between(num_tokens: int) -> int:
    power_of_two = 1 << (num_tokens - 1).bit_length()
    return max(_TOKEN_STEP, power_of_two // 16)


def steady_tokens(num_tokens: int) -> int:
    """The size of steps that should have *num_tokens* each, step after step.

    Of many each takes its time: room that nothing fills costs more than rows that are not quite full.
    """
    if num_tokens <= _FEW_TOKENS:
        return rounded_tokens(num_tokens)
    step = _step_between(num_tokens)
    return min(MOST_STEP_TOKENS, num_tokens // step * step)


def shorter_step(num_tokens: int) -> int:
    """The longest size of steps of at most *num_tokens*, or the shortest of all."""
    return max((size for size in _step_sizes() if size <= num_tokens), default=FEWEST_PROMPT_TOKENS)


def _step_sizes() -> Iterator[int]:
    size = 2 * FEWEST_PROMPT_TOKENS
    while size <= MOST_STEP_TOKENS:
        yield size
        size = rounded_tokens(size + 1)


def call_sizes(most_patches: int) -> Iterator[int]:
    """All sizes that `filled_up` gives up to *most_patches*, which is one, the largest first."""
    size = most_patches
    while size > 0:
        yield size
        size -= _PATCH_STEP if size <= MOST_PATCHES else _LARGE_PATCH_STEP


def _with_patches(demand: PackedDemand, room_bytes: Sequence[int], patches: int) -> PackedLimits:
    """With the shortest steps that keep the rows full, or longer ones where they cost hardly any of the rows.

    Where no size of steps leaves the pool room for the worst request, with the shortest.
    """
    found = [_with_steps(demand, room_bytes, patches, step_tokens) for step_tokens in _step_sizes()]
    holding = [limits for limits in found if _holds_worst(limits, demand)]
    if not holding:
        return found[0]
    enough = next((limits for limits in holding if _is_enough(limits, demand)), holding[-1])
    worth = _WORTH_LONGER_STEPS * _side_by_side(enough, demand.typical)
    return [
        limits
        for limits in holding
        if limits.step_tokens >= enough.step_tokens and _side_by_side(limits, demand.typical) >= worth
    ][-1]


def _holds_worst(limits: PackedLimits, demand: PackedDemand) -> bool:
    return limits.pool_tokens >= tokens_of(demand.worst)


def _is_enough(limits: PackedLimits, demand: PackedDemand) -> bool:
    """Whether steps take as many prompt tokens as rows let in, or all that the pool holds."""
    rate = math.ceil(_rate(limits, demand.typical)) + limits.max_rows
    return limits.step_tokens >= min(steady_tokens(rate), limits.pool_tokens)


def _with_steps(
    demand: PackedDemand, room_bytes: Sequence[int], patches: int, step_tokens: int
) -> PackedLimits:
    """With as many rows as the pool that is left beside them may hold: fewer rows leave a larger pool."""
    allowed = [*range(_ROW_STEP, demand.max_rows, _ROW_STEP), demand.max_rows]

    def limits_of(num_rows: int) -> PackedLimits:
        return _with_pool(PackedLimits(num_rows, 0, step_tokens, patches), demand, room_bytes)

    def are_too_many(num_rows: int) -> bool:
        limits = limits_of(num_rows)
        return not _holds_worst(limits, demand) or _rows_of(limits, demand) < num_rows

    return limits_of(allowed[max(1, bisect_left(allowed, True, key=are_too_many)) - 1])


def _with_pool(limits: PackedLimits, demand: PackedDemand, room_bytes: Sequence[int]) -> PackedLimits:
    patches = demand.worst.visual_patches
    tokens = [_pool_tokens(limits, *pair, patches) for pair in zip(demand.needs, room_bytes, strict=True)]
    return replace(limits, pool_tokens=min(_most_tokens(demand), *tokens))


def _rows_of(limits: PackedLimits, demand: PackedDemand) -> int:
    """As many as the pool may hold: requests shorter than the typical one come too."""
    rows = _POOL_PER_TYPICAL * limits.pool_tokens / tokens_of(demand.typical)
    return min(demand.max_rows, _ROW_STEP * max(1, math.ceil(rows / _ROW_STEP)))


def _rate(limits: PackedLimits, typical: RequestSize) -> float:
    """Prompt tokens for a step, where as many come in as go out with those that have ended."""
    return _side_by_side(limits, typical) * typical.prompt_tokens / typical.new_tokens


def _side_by_side(limits: PackedLimits, typical: RequestSize) -> float:
    """How many typical requests there are at once."""
    return min(limits.max_rows, limits.pool_tokens / tokens_of(typical))


def tokens_of(size: RequestSize) -> int:
    """What the pool holds of a request in the end."""
    return size.prompt_tokens + size.new_tokens


def _most_tokens(demand: PackedDemand) -> int:
    """More than this the rows would hardly ever fill."""
    typical = int(demand.max_rows * tokens_of(demand.typical) * _POOL_PER_TYPICAL)
    return max(tokens_of(demand.worst), typical)


def peak_bytes(limits: PackedLimits, needs: PackedNeeds, request_patches: int) -> float:
    """What a call of the vision tower and a step take on a device at most, and the features that wait.

    Both are counted: steps that CUDA has recorded keep their memory while images are encoded. One request
    has at most *request_patches*, which several calls may encode.
    """
    shapes = (
        BatchShape(0, 0, limits.patches, 0, 0),
        BatchShape(limits.max_rows, _most_step_tokens(limits), 0, 0, 0),
    )
    works = sum(bytes_of(shape, needs, phase) for phase, shape in enumerate(shapes))
    return works + _feature_bytes(limits, needs, request_patches)


def _most_step_tokens(limits: PackedLimits) -> int:
    """Of a step of all rows, filled up."""
    return rounded_tokens(limits.prompt_tokens(limits.max_rows) + limits.max_rows)


def _pool_tokens(limits: PackedLimits, needs: PackedNeeds, room_bytes: int, request_patches: int) -> int:
    room = room_bytes - _MARGIN * peak_bytes(limits, needs, request_patches)
    if room < 0:
        return 0
    # A device without layers holds nothing of the pool, however large.
    return int(room / needs.pool_token_bytes) if needs.pool_token_bytes else sys.maxsize


def bytes_of(shape: BatchShape, needs: PackedNeeds, phase: int) -> float:
    """What work of *shape* takes on a device: phase 0 is a call of the vision tower, 1 a step."""
    features = (shape.batch_size, shape.padded_tokens, shape.visual_patches, 0, 0)
    return float(needs.coefficients[phase] @ features)


def _feature_bytes(limits: PackedLimits, needs: PackedNeeds, request_patches: int) -> int:
    # The images of one call, or of one request, are encoded whether or not so many tokens are wanted. What
    # graphs give stands in a place of its own. Four patches are a token.
    num_encoded = max(limits.patches, request_patches) + limits.patches
    num_tokens = _STEPS_AHEAD * limits.step_tokens + num_encoded // 4
    return num_tokens * needs.feature_token_bytes


def _no_room(worst_tokens: int, best: PackedLimits, room_bytes: Sequence[int]) -> PlacementError:
    rooms = ", ".join(map(format_bytes, room_bytes))
    return PlacementError(
        f"Beside the weights {rooms} are left; the packed engine's pool would hold {best.pool_tokens:,} "
        f"tokens of keys and values, and the largest request has {worst_tokens:,}.",
        hint="Use more GPUs, set batching.engine: generate, or set images.max_pixels or "
        "generation.max_new_tokens lower, which makes another job: a folder that holds parts refuses it.",
    )
