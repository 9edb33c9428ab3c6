"""Lay one copy of the model over given devices, or find that it has no room there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from glm4v_batch.device_map import compact_map
from glm4v_batch.job import DeviceSettings
from glm4v_batch.needs import ModelNeeds, ModuleNeed
from glm4v_batch.packing import (
    Packing,
    RunCosts,
    Strategy,
    balanced,
    balanced_low_0,
    pieces_of,
    sequential,
)
from glm4v_batch.types import Device, Replica, RequestSize, Spot

_STRATEGIES: Mapping[str, Strategy] = {"balanced_low_0": balanced_low_0, "sequential": sequential}


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be placed, and how: the model, the job's wishes, its largest and its usual request.

    *host_bytes* is what each copy of the model may keep in host memory, *image_patches* the most that one
    image may have.
    """

    needs: ModelNeeds
    settings: DeviceSettings
    worst: RequestSize
    typical: RequestSize
    host_bytes: float
    image_patches: float = inf

    def budgets_bytes(self, devices: Sequence[Device]) -> list[int]:
        """What the job may have in use on each of *devices*."""
        return [device.budget_bytes(self.settings.memory_fraction) for device in devices]


def lay(devices: Sequence[Device], demand: Demand) -> Replica | None:
    """One copy over *devices*, the model's beginning on the first of them; None where it has no room.

    As few of the last layers as possible lie elsewhere where the job allows that, and the vision tower
    is parted only where it finds no room whole. Devices that get nothing are left out.
    """
    strategy = _STRATEGIES.get(str(demand.settings.layout), balanced)
    for offloaded in _offloads(demand):
        for whole_vision in (True, False):
            packing = _packed(devices, demand, offloaded, strategy, whole_vision=whole_vision)
            if packing is not None:
                return _replica(devices, demand, packing, offloaded)
    return None


def has_room(devices: Sequence[Device], demand: Demand) -> bool:
    """Whether `lay` finds a way, without looking for a good one."""
    return any(
        _packed(devices, demand, offloaded, sequential, whole_vision=False) is not None
        for offloaded in _offloads(demand)
    )


def _offloads(demand: Demand) -> Iterator[Sequence[ModuleNeed]]:
    """What may lie elsewhere: nothing, then ever more of the last layers."""
    yield ()
    settings = demand.settings
    layers = [module for module in demand.needs.modules if module.layer is not None]
    for count in range(1, len(layers) + 1 if settings.offload != "none" else 0):
        offloaded = layers[-count:]
        if settings.offload == "disk" or sum(m.weight_bytes for m in offloaded) <= demand.host_bytes:
            yield offloaded


def _packed(
    devices: Sequence[Device],
    demand: Demand,
    offloaded: Sequence[ModuleNeed],
    strategy: Strategy,
    *,
    whole_vision: bool,
) -> Packing | None:
    needs, budgets = demand.needs, demand.budgets_bytes(devices)
    away = set(offloaded)
    kept = replace(needs, modules=tuple(module for module in needs.modules if module not in away))
    costs = RunCosts(needs, pieces_of(kept, whole_vision=whole_vision), offloaded)
    return strategy(costs, budgets, demand.worst, demand.typical)


def _replica(
    devices: Sequence[Device], demand: Demand, packing: Packing, offloaded: Sequence[ModuleNeed]
) -> Replica:
    used = [(device, modules) for device, modules in zip(devices, packing.modules, strict=True) if modules]
    elsewhere: Spot = "disk" if demand.settings.offload == "disk" else "cpu"
    spots: dict[str, Spot] = {module.name: elsewhere for module in offloaded}
    for position, (_, modules) in enumerate(used):
        spots |= {module.name: position for module in modules}
    return Replica(
        devices=tuple(device for device, _ in used),
        device_map=compact_map({module.name: spots[module.name] for module in demand.needs.modules}),
        weight_bytes=tuple(sum(module.weight_bytes for module in modules) for _, modules in used),
        offloaded_bytes=sum(module.weight_bytes for module in offloaded),
    )
