"""Spread the tiny GLM-4V over real GPUs in every way that has to work; print what its texts change.

Run from the repository's root on a machine with two or more CUDA GPUs:

    PYTHONPATH=pipeline:. python -m tests.gpu.cross_device

Under each device map of tests/sharded.py, and for each card through which requests may enter, the texts
of greedy decoding in float32 have to be those of the model on one card; of the packed engine also those in
bfloat16, which attend by its kernels. Maps of more cards than there are get left out. The exit code is 1
where a text differs or a map fails.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch

from glm4v_batch.engines.packed_model import PackedModel
from tests.gpu.batch_size_search import environment
from tests.sharded import DEVICE_MAPS, DeviceMap, cards_of, differences, enter_through, load, run, run_packed

WHOLE: DeviceMap = {"": "cuda:0"}


def problems(device_map: DeviceMap, expected: Sequence[object]) -> list[str]:
    """What fails or differs from *expected* under *device_map*, wherever requests enter."""
    model, found = load(device_map), []
    for card in cards_of(device_map):
        enter_through(model, card)
        found += _compared(f"entered through {card}", partial(run, model), expected)
    return found


def packed_problems(device_map: DeviceMap, dtype: str, expected: Sequence[object]) -> list[str]:
    """What fails or differs from *expected* in the packed engine."""
    return _compared(f"packed, {dtype}", partial(run_packed, load(device_map, dtype)), expected)


def _compared(how: str, do: Callable[[], Sequence[object]], expected: Sequence[object]) -> list[str]:
    try:
        return [f"{how}, {each}" for each in differences(do(), expected)]
    except RuntimeError as error:
        return [f"{how}, {str(error).splitlines()[0]}"]


def main() -> int:
    """Print one line per map."""
    print(environment(), flush=True)
    expected, num_cards, num_wrong = run(load(WHOLE)), torch.cuda.device_count(), 0
    # In bfloat16 other sizes of steps may change texts: one card has graphs, and fills steps up for them.
    with patch.object(PackedModel, "has_graphs", new=False):
        packed = {"float32": expected, "bfloat16": run_packed(load(WHOLE, "bfloat16"))}
    for name, device_map in DEVICE_MAPS.items():
        num_needed = len(cards_of(device_map))
        if num_needed > num_cards:
            print(f"{name}: left out, it needs {num_needed} GPUs and {num_cards} are there", flush=True)
            continue
        found = problems(device_map, expected)
        for dtype, written in packed.items():
            found += packed_problems(device_map, dtype, written)
        num_wrong += bool(found)
        print(f"{name}: {'; '.join(found) or 'equal'}", flush=True)
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
