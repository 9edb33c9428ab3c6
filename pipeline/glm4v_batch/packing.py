"""Lay a model's modules over several devices, in the order of execution, by what they take under load.

A device pays for more than its weights: the one with the vision tower for the pixels and features of
a batch, the one with the head for its logits, each for a layer's activations and for its layers' KV
cache. What consecutive modules take never falls as more are added, so a greedy packing shows whether
a limit can be kept, and bisection finds the smallest limit that can.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from math import ceil, inf

import numpy as np

from glm4v_batch.activations import DeviceShare, prior_coefficients
from glm4v_batch.memory import MemoryModel
from glm4v_batch.needs import EMBEDDING, HEAD, ModelNeeds, ModuleNeed
from glm4v_batch.types import BatchShape, RequestSize

# As many requests as the scheduler ever lets wait.
_LARGEST_BATCH = 1024
_BISECTIONS = 30
_NO_BATCH = BatchShape(0, 0, 0, 0, 0)

Load = tuple[BatchShape, ...]
"""Batches each of which must fit, one at a time."""

Piece = tuple[ModuleNeed, ...]
"""Modules that are not parted."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Pieces over devices: those of device d end before `ends[d]`, where those of the next begin.

    *batch_size* is the number of typical requests that it was made for.
    """

    pieces: tuple[Piece, ...]
    ends: tuple[int, ...]
    batch_size: int = 0

    @property
    def modules(self) -> Iterator[Piece]:
        """The modules of each device, in order; none where a device gets nothing."""
        for start, stop in pairwise((0, *self.ends)):
            yield tuple(module for piece in self.pieces[start:stop] for module in piece)


Strategy = Callable[["RunCosts", Sequence[int], RequestSize, RequestSize], Packing | None]
"""Lays pieces over devices of these budgets, for a worst and a typical request; None: there is no way."""


def batch_of(size: RequestSize, num_requests: int = 1) -> BatchShape:
    """The shape of a batch of equal requests."""
    num_patches = num_requests * size.visual_patches
    return BatchShape.padded(num_requests, size.prompt_tokens, num_patches, size.new_tokens)


def largest(is_possible: Callable[[int], bool], most: int = _LARGEST_BATCH) -> int:
    """The largest number up to *most* for which *is_possible*, or 0; all below a possible one are."""
    possible, not_possible = 0, most + 1
    while not_possible - possible > 1:
        middle = (possible + not_possible) // 2
        if is_possible(middle):
            possible = middle
        else:
            not_possible = middle
    return possible


def pieces_of(needs: ModelNeeds, *, whole_vision: bool) -> tuple[Piece, ...]:
    """The model's modules, those joined that must stay together, or had better.

    Norms and what has no weights go with what comes before them, and a tied head with the embedding.
    """
    pieces: list[list[ModuleNeed]] = []
    for module in needs.modules:
        if module.name == HEAD and needs.is_head_tied:
            _with_embedding(pieces).append(module)
        elif pieces and (_is_light(module) or (whole_vision and module.is_vision)):
            pieces[-1].append(module)
        else:
            pieces.append([module])
    return tuple(map(tuple, pieces))


def _is_light(module: ModuleNeed) -> bool:
    return not module.weight_bytes or module.name.endswith("norm")


def _with_embedding(pieces: Sequence[list[ModuleNeed]]) -> list[ModuleNeed]:
    return next(piece for piece in pieces if any(module.name == EMBEDDING for module in piece))


def share_of(modules: Sequence[ModuleNeed], needs: ModelNeeds, *, takes_inputs: bool) -> DeviceShare:
    """The part of the work that a device does which executes *modules*."""
    return DeviceShare(
        takes_inputs=takes_inputs,
        has_vision=any(module.is_vision and module.weight_bytes for module in modules),
        layers=sum(module.layer is not None for module in modules) / max(1, needs.num_layers),
        has_head=any(module.name == HEAD for module in modules),
    )


class RunCosts:
    """What consecutive pieces take on one device: weights, working space, load. Remembers what it knows.

    It is what `MemoryModel.fits` counts at full trust, so a packing that keeps a budget fits it.
    *streamed* modules lie on no device and pass through the first one, one at a time.
    """

    def __init__(
        self, needs: ModelNeeds, pieces: Sequence[Piece], streamed: Sequence[ModuleNeed] = ()
    ) -> None:
        self.pieces = tuple(pieces)
        self._needs = needs
        self._streamed = tuple(streamed)
        self._rest_bytes = [sum(_at_rest(module.weight_bytes) for module in piece) for piece in pieces]
        # What lies on no device is fetched by the one where requests enter, and executed there.
        self._room_bytes = _at_rest(max((module.weight_bytes for module in streamed), default=0))
        self._runs: dict[tuple[int, int], tuple[int, DeviceShare]] = {}
        self._models: dict[DeviceShare, MemoryModel] = {}
        self._taken: dict[tuple[DeviceShare, Load], int] = {}

    def of(self, start: int, stop: int, load: Load = ()) -> int:
        """Bytes that the pieces from *start* to before *stop* take on one device under *load*."""
        if start == stop:
            return 0
        run = self._runs.get((start, stop))
        if run is None:
            run = self._runs[start, stop] = self._run(start, stop)
        rest_bytes, share = run
        return rest_bytes + self._under_load(share, load)

    def _run(self, start: int, stop: int) -> tuple[int, DeviceShare]:
        is_first = start == 0
        executed = [module for piece in self.pieces[start:stop] for module in piece]
        if is_first:
            executed += self._streamed
        rest_bytes = sum(self._rest_bytes[start:stop]) + (self._room_bytes if is_first else 0)
        return rest_bytes, share_of(executed, self._needs, takes_inputs=is_first)

    def _under_load(self, share: DeviceShare, load: Load) -> int:
        taken = self._taken.get((share, load))
        if taken is None:
            model = self._model(share)
            worst = max((model.predict(shape)[0] for shape in load), default=-1)
            # One byte more, as predictions are cut to whole bytes.
            taken = self._taken[share, load] = ceil((worst + 1) * (1 + model.margin))
        return taken

    def _model(self, share: DeviceShare) -> MemoryModel:
        if share not in self._models:
            prior = prior_coefficients(self._needs.config, self._needs.bytes_per_value, share)
            self._models[share] = MemoryModel((0,), (prior,))
        return self._models[share]


def _at_rest(weight_bytes: int) -> int:
    """Weights with the working space that comes with them, without any batch."""
    model = MemoryModel((weight_bytes,), (np.zeros((1, len(astuple(_NO_BATCH)))),))
    return weight_bytes + ceil((model.predict(_NO_BATCH)[0] + 1 - weight_bytes) * (1 + model.margin))


def balanced(
    costs: RunCosts, budgets_bytes: Sequence[int], worst: RequestSize, typical: RequestSize
) -> Packing | None:
    """The packing for the largest batch of typical requests in which the fullest device is least full.

    None where a batch of the worst request alone finds no room.
    """
    return _balanced(costs, budgets_bytes, worst, typical, first=0)


def balanced_low_0(
    costs: RunCosts, budgets_bytes: Sequence[int], worst: RequestSize, typical: RequestSize
) -> Packing | None:
    """As `balanced`, over all but the first device, which gets only what finds no room on the others."""
    own, *others = budgets_bytes
    for stop in range(len(costs.pieces) + 1):
        if costs.of(0, stop, (batch_of(worst),)) > own:
            return None
        packing = _balanced(costs, others, worst, typical, first=stop)
        if packing is not None:
            return replace(packing, ends=(stop, *packing.ends))
    return None


def sequential(
    costs: RunCosts, budgets_bytes: Sequence[int], worst: RequestSize, _typical: RequestSize
) -> Packing | None:
    """Each device full, with room for the worst request, before the next gets anything."""
    ends = _packed(costs, budgets_bytes, (batch_of(worst),))
    return None if ends is None else Packing(costs.pieces, ends)


def _balanced(
    costs: RunCosts, budgets_bytes: Sequence[int], worst: RequestSize, typical: RequestSize, first: int
) -> Packing | None:
    def load_of(num_typical: int) -> Load:
        return (batch_of(worst), batch_of(typical, num_typical))

    def fits(num_typical: int) -> bool:
        return _packed(costs, budgets_bytes, load_of(num_typical), first=first) is not None

    if not fits(0):
        return None
    batch_size = largest(fits)
    load = load_of(batch_size)
    fraction = _least_fraction(costs, budgets_bytes, load, first)
    return Packing(costs.pieces, _evened(costs, budgets_bytes, load, fraction, first), batch_size)


def _packed(
    costs: RunCosts, budgets_bytes: Sequence[int], load: Load, fraction: float = 1.0, first: int = 0
) -> tuple[int, ...] | None:
    """Where each device's pieces end if *fraction* of each is filled in order; None if some are left."""
    ends = []
    for budget in budgets_bytes:
        first = _furthest(costs, first, fraction * budget, load)
        ends.append(first)
    return tuple(ends) if first == len(costs.pieces) else None


def _furthest(costs: RunCosts, start: int, limit_bytes: float, load: Load) -> int:
    def fits(count: int) -> bool:
        return costs.of(start, start + count, load) <= limit_bytes

    return start + largest(fits, len(costs.pieces) - start)


def _least_fraction(costs: RunCosts, budgets_bytes: Sequence[int], load: Load, first: int) -> float:
    too_small, enough = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (too_small + enough) / 2
        if _packed(costs, budgets_bytes, load, middle, first) is None:
            too_small = middle
        else:
            enough = middle
    return enough


def _evened(
    costs: RunCosts, budgets_bytes: Sequence[int], load: Load, fraction: float, first: int
) -> tuple[int, ...]:
    """Of all packings that keep to *fraction* of the budgets, the one with the most even weights.

    That is the least sum of squares, found stage by stage. Greedy packing leaves the last device short,
    and what is heavy by its load alone leaves open how the others share the rest.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {first: (0.0, ())}
    for budget in budgets_bytes:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (squares, ends) in best.items():
            for stop in range(start, _furthest(costs, start, fraction * budget, load) + 1):
                candidate = (squares + (costs.of(start, stop) / max(budget, 1)) ** 2, (*ends, stop))
                reached[stop] = min(candidate, reached.get(stop, (inf, ())))
        best = reached
    return best[len(costs.pieces)][1]
