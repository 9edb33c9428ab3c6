"""Spread the tiny GLM-4V over real GPUs in every way that has to work; print what its texts change.

Run from the repository's root on a machine with two or more CUDA GPUs:

    PYTHONPATH=pipeline:. python -m tests.gpu.cross_device

Under each device map of tests/sharded.py, and for each card through which requests may enter, the texts
of greedy decoding in float32 have to be those of the model on one card. Maps of more cards than there
are get left out. The exit code is 1 where a text differs or a map fails.
"""

import sys
from collections.abc import Sequence

import torch

from tests.gpu.batch_size_search import environment
from tests.sharded import DEVICE_MAPS, DeviceMap, cards_of, differences, enter_through, load, run

WHOLE: DeviceMap = {"": "cuda:0"}


def problems(device_map: DeviceMap, expected: Sequence[object]) -> list[str]:
    """What fails or differs from *expected* under *device_map*, wherever requests enter."""
    model, found = load(device_map), []
    for card in cards_of(device_map):
        enter_through(model, card)
        try:
            found += [f"entered through {card}, {each}" for each in differences(run(model), expected)]
        except RuntimeError as error:
            found.append(f"entered through {card}, {str(error).splitlines()[0]}")
    return found


def main() -> int:
    """Print one line per map."""
    print(environment(), flush=True)
    expected, num_cards, num_wrong = run(load(WHOLE)), torch.cuda.device_count(), 0
    for name, device_map in DEVICE_MAPS.items():
        num_needed = len(cards_of(device_map))
        if num_needed > num_cards:
            print(f"{name}: left out, it needs {num_needed} GPUs and {num_cards} are there", flush=True)
            continue
        found = problems(device_map, expected)
        num_wrong += bool(found)
        print(f"{name}: {'; '.join(found) or 'equal'}", flush=True)
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
