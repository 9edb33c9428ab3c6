"""How much the packed engine may have in hand at once, so that everything fits each device of a replica."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from glm4v_batch.activations import FloatArray
from glm4v_batch.errors import PlacementError
from glm4v_batch.types import BatchShape, RequestSize
from glm4v_batch.units import format_bytes

GPU_ROWS = 256
CPU_ROWS = 32
_PIECE_TOKENS = (2048, 1024, 512, 256, 64)
_PATCHES = 16_384
_MARGIN = 1.05
# Prompts whose images are encoded wait for about two steps' worth of tokens.
_STEPS_AHEAD = 3
# Requests longer than the typical one must find a place too.
_POOL_PER_TYPICAL = 1.5
_WORTH_SMALLER_PIECES = 1.25


@dataclass(frozen=True, slots=True)
class PackedLimits:
    """What one replica may have in hand at once.

    max_rows      requests that prefill or decode
    pool_tokens   tokens of all of them in the KV pool
    piece_tokens  prompt tokens of one step
    patches       patches of one call of the vision tower; one larger image goes alone
    """

    max_rows: int
    pool_tokens: int
    piece_tokens: int
    patches: int


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
    """The largest limits whose pool, features, and highest peak fit into *room_bytes* beside the weights.

    Prompts are taken in smaller pieces where that leaves much more room for requests. Raises PlacementError
    where not even the worst request fits, piece by piece.
    """
    most_tokens = _most_tokens(demand)
    best = PackedLimits(demand.max_rows, 0, 0, 0)
    for piece_tokens in _PIECE_TOKENS:
        for patches in sorted({max(demand.image_patches, _PATCHES), demand.image_patches}, reverse=True):
            limits = PackedLimits(demand.max_rows, most_tokens, piece_tokens, patches)
            tokens = [_pool_tokens(limits, *pair) for pair in zip(demand.needs, room_bytes, strict=True)]
            found = replace(limits, pool_tokens=min(most_tokens, *tokens))
            if found.pool_tokens > _WORTH_SMALLER_PIECES * best.pool_tokens:
                best = found
    if best.pool_tokens < tokens_of(demand.worst):
        raise _no_room(tokens_of(demand.worst), best, room_bytes)
    return best


def tokens_of(size: RequestSize) -> int:
    """What the pool holds of a request in the end."""
    return size.prompt_tokens + size.new_tokens


def _most_tokens(demand: PackedDemand) -> int:
    """More than this the rows would hardly ever fill."""
    typical = int(demand.max_rows * tokens_of(demand.typical) * _POOL_PER_TYPICAL)
    return max(tokens_of(demand.worst), typical)


def peak_bytes(limits: PackedLimits, needs: PackedNeeds) -> float:
    """What a call of the vision tower or a step takes on a device at most, and the features that wait."""
    shapes = (
        BatchShape(0, 0, limits.patches, 0, 0),
        BatchShape(limits.max_rows, limits.piece_tokens + limits.max_rows, 0, 0, 0),
    )
    return max(_bytes_of(shape, needs) for shape in shapes) + _feature_bytes(limits, needs)


def _pool_tokens(limits: PackedLimits, needs: PackedNeeds, room_bytes: int) -> int:
    room = room_bytes - _MARGIN * peak_bytes(limits, needs)
    if room < 0:
        return 0
    # A device without layers holds nothing of the pool.
    return int(room / needs.pool_token_bytes) if needs.pool_token_bytes else limits.pool_tokens


def _bytes_of(shape: BatchShape, needs: PackedNeeds) -> float:
    features = (shape.batch_size, shape.padded_tokens, shape.visual_patches, 0, 0)
    return float((needs.coefficients @ features).max())


def _feature_bytes(limits: PackedLimits, needs: PackedNeeds) -> int:
    # The images of one call are encoded whether or not so many tokens are wanted; four patches each.
    num_tokens = _STEPS_AHEAD * limits.piece_tokens + limits.patches // 4
    return num_tokens * needs.feature_token_bytes


def _no_room(worst_tokens: int, best: PackedLimits, room_bytes: Sequence[int]) -> PlacementError:
    rooms = ", ".join(map(format_bytes, room_bytes))
    return PlacementError(
        f"Beside the weights {rooms} are left; the packed engine's pool would hold {best.pool_tokens:,} "
        f"tokens of keys and values, and the largest request has {worst_tokens:,}.",
        hint="Use more GPUs, set images.max_pixels or generation.max_new_tokens lower, or set "
        "batching.engine: generate.",
    )
