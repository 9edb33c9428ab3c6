"""Let a model do its largest work once before it counts: what compiles compiles, and memory is measured."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from glm4v_batch.engines.generate import ran_out_of_memory
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_rows import DecodeRows, Piece
from glm4v_batch.kv_pool import KVPool
from glm4v_batch.memory import Meter
from glm4v_batch.packed_limits import (
    FEWEST_PROMPT_TOKENS,
    MOST_PATCHES,
    MOST_STEP_TOKENS,
    PackedDemand,
    PackedNeeds,
    bytes_of,
)
from glm4v_batch.types import BatchShape

_FEW_ROWS = 8

MakeRows = Callable[[KVPool, int], DecodeRows]
"""Makes rows, so many, that decode in a pool."""


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """*demand* with the memory that work really takes, and the seconds that went into compiling."""

    demand: PackedDemand
    compile_seconds: float


@torch.inference_mode()
def warm_up(model: PackedModel, make_rows: MakeRows, demand: PackedDemand, meter: Meter) -> WarmedUp:
    """Encode images and take steps of the largest sizes that *demand* may lead to, of nothing in particular.

    What does not fit is left as the formulas of *demand* have it.
    """
    work = _Work(model, make_rows, demand.max_rows)
    encoding, stepping, decoding = (_Twice(do, meter) for do in (work.encode, work.step, work.decode))
    vision = BatchShape(0, 0, work.num_patches, 0, 0)
    step = BatchShape(demand.max_rows, work.num_prompt + demand.max_rows, 0, 0, 0)
    needs = _scaled(demand.needs, 0, vision, encoding.taken_bytes)
    needs = _scaled(needs, 1, step, stepping.taken_bytes)
    compile_seconds = encoding.compile_seconds + stepping.compile_seconds + decoding.compile_seconds
    return WarmedUp(replace(demand, needs=needs), compile_seconds)


class _Twice:
    """What the first time of *do* takes longer than the second, and what the second takes on each device.

    The second is also when CUDA records it. *taken_bytes* is None where it does not fit.
    """

    def __init__(self, do: Callable[[], None], meter: Meter) -> None:
        first, _ = _timed(do)
        held = meter.held_bytes()
        with meter.watch():
            second, is_done = _timed(do)
        peaks = zip(meter.peak_bytes(), held, strict=True)
        self.taken_bytes = tuple(peak - before for peak, before in peaks) if is_done else None
        self.compile_seconds = max(0.0, first - second)


class _Work:
    def __init__(self, model: PackedModel, make_rows: MakeRows, max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows
        self.num_prompt = max(FEWEST_PROMPT_TOKENS, MOST_STEP_TOKENS - max_rows)
        self._pool = model.make_pool(self.num_prompt, max_rows + 1)
        self._rows = make_rows(self._pool, max_rows)
        merge = model.merge_size
        side = math.isqrt(MOST_PATCHES // 4) // merge * merge
        self._grid = (1, side, side)
        self.num_patches = 4 * side**2
        self._patches = torch.zeros(side**2, model.patch_values, dtype=torch.uint8)

    def encode(self) -> None:
        self._model.encode([self._patches] * 4, [self._grid] * 4)

    def step(self) -> None:
        size = self.num_prompt
        none = torch.zeros(0, dtype=torch.int64)
        places = torch.arange(size).expand(3, -1)
        piece = Piece(0, torch.zeros(size, dtype=torch.int64), places, none, (), 0, 0, ends_prompt=False)
        self._rows.step([piece], self._max_rows)

    def decode(self) -> None:
        # Few rows attend by other kernels than many. Of one alone torch would compile anew.
        for num_rows in (self._max_rows, min(self._max_rows, _FEW_ROWS)):
            self._rows.step([], num_rows)


def _timed(do: Callable[[], None]) -> tuple[float, bool]:
    """The seconds of *do*, and whether memory was enough."""
    started, is_done = time.perf_counter(), True
    try:
        do()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        is_done = False
    return time.perf_counter() - started, is_done


def _scaled(
    needs: tuple[PackedNeeds, ...], phase: int, shape: BatchShape, taken_bytes: tuple[int, ...] | None
) -> tuple[PackedNeeds, ...]:
    """*needs* of each device, whose *phase* takes *taken_bytes* for *shape*."""
    if taken_bytes is None:
        return needs
    return tuple(_scaled_one(*pair, phase, shape) for pair in zip(needs, taken_bytes, strict=True))


def _scaled_one(needs: PackedNeeds, taken_bytes: int, phase: int, shape: BatchShape) -> PackedNeeds:
    coefficients, predicted = needs.coefficients.copy(), bytes_of(shape, needs, phase)
    if predicted:
        coefficients[phase] *= taken_bytes / predicted
    return replace(needs, coefficients=coefficients)
