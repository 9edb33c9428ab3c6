"""Say in one line why a placement is as it is."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from glm4v_batch.activations import can_predict
from glm4v_batch.device_map import spots_of
from glm4v_batch.job import DeviceSettings
from glm4v_batch.layouts import Demand
from glm4v_batch.needs import ModelNeeds
from glm4v_batch.packing import RunCosts, batch_of
from glm4v_batch.types import Device, Replica
from glm4v_batch.units import format_bytes, format_count


def reason_of(replicas: Sequence[Replica], idle: Sequence[Device], demand: Demand) -> str:
    """How many copies there are, where, and why so; what lies elsewhere, and what is idle."""
    if all(len(replica.devices) == 1 for replica in replicas):
        where = _on_single_devices(replicas, demand)
    else:
        where = _over_several_devices(replicas, demand)
    parts = [where, *_elsewhere(replicas, demand.needs)]
    if idle:
        parts.append(f"{names_of(idle)} idle, {_why_idle(demand.settings)}")
    return "; ".join(parts)


def request_bytes(demand: Demand) -> int:
    """What the worst request takes beside the weights on a device that does everything, margin included."""
    needs = demand.needs
    return RunCosts(needs, (needs.modules,)).of(0, 1, (batch_of(demand.worst),)) - needs.weight_bytes


def request_named(demand: Demand) -> str:
    """Which request a copy must have room for, in words."""
    if can_predict(demand.needs.config):
        return "the largest request"
    return "a typical request, by a guess until some are measured"


def names_of(devices: Sequence[Device]) -> str:
    """*devices* as the job file numbers them, such as "GPUs 0, 1 and 3"."""
    if devices[0].index is None:
        return "the CPU"
    *others, last = [str(device.index) for device in devices]
    return f"GPUs {', '.join(others)} and {last}" if others else f"GPU {last}"


def _on_single_devices(replicas: Sequence[Replica], demand: Demand) -> str:
    weights = format_bytes(max(sum(replica.weight_bytes) for replica in replicas))
    what = f"{weights} of weights and {request_named(demand)} ({format_bytes(request_bytes(demand))}) fit"
    if len(replicas) == 1:
        return f"1 replica, on {names_of(replicas[0].devices)}: {what}"
    return f"{len(replicas)} replicas, one per GPU: {what} on each"


def _over_several_devices(replicas: Sequence[Replica], demand: Demand) -> str:
    sizes = Counter(len(replica.devices) for replica in replicas)
    count = format_count(len(replicas), "replica")
    if len(sizes) > 1:
        each = ", ".join(f"{number} on {format_count(size, 'GPU')}" for size, number in sizes.items())
        count = f"{count} ({each})"
    else:
        count = f"{count} over {max(sizes)} GPUs{' each' if len(replicas) > 1 else ''}"
    # Copies on equal groups of equal devices are laid alike and named once.
    layers = dict.fromkeys(_layers(replica, demand.needs) for replica in replicas if len(replica.devices) > 1)
    return f"{count}, {_manner(demand.settings)}: layers {'; '.join(layers)}"


def _manner(settings: DeviceSettings) -> str:
    if isinstance(settings.layout, Mapping):
        return "as devices.layout says"
    manners = {
        "balanced_low_0": "balanced by predicted peaks, the first GPU with the least",
        "sequential": "filled one after the other",
    }
    return manners.get(settings.layout, "balanced by predicted peaks")


def _layers(replica: Replica, needs: ModelNeeds) -> str:
    """The decoder layers on each device, such as "none | 0–12 | 13–26 | 27–39"."""
    spots = spots_of(replica.device_map, needs)
    layers = [(spots[module.name], module.layer) for module in needs.modules if module.layer is not None]
    positions = range(len(replica.devices))
    return " | ".join(_ranges([layer for spot, layer in layers if spot == place]) for place in positions)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending *numbers* as runs.

    >>> _ranges([0, 1, 2, 5])
    '0–2, 5'
    """
    # Within a run, a number and its place in the list differ by the same amount.
    runs = [list(run) for _, run in groupby(numbers, key=lambda number: number - numbers.index(number))]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def _elsewhere(replicas: Sequence[Replica], needs: ModelNeeds) -> Iterator[str]:
    held: Counter[object] = Counter()
    for replica in replicas:
        spots = spots_of(replica.device_map, needs)
        for module in needs.modules:
            held[spots[module.name]] += module.weight_bytes
    for place, words in (("cpu", "in host memory"), ("disk", "on the disk")):
        if held[place]:
            weights = format_bytes(held[place])
            yield f"{weights} of weights lie {words} and are fetched for every token, which is slow"


def _why_idle(settings: DeviceSettings) -> str:
    if isinstance(settings.layout, Mapping):
        return "not named in devices.layout"
    if settings.layout == "auto":
        return "without room for another replica"
    return "as the others hold the whole model"
