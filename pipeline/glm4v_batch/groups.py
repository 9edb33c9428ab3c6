"""Which devices share a copy of the model, and whether the copies find room there."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from glm4v_batch.errors import PlacementError
from glm4v_batch.job import DeviceSettings
from glm4v_batch.layouts import Demand, has_room
from glm4v_batch.types import Device


def groups_of(devices: Sequence[Device], settings: DeviceSettings) -> list[Sequence[Device]]:
    """*devices* parted in their order as `layout` and `gpus_per_replica` say, one copy for each group.

    `auto` leaves over what makes no full group, and MIG devices where copies lie on several. Raises
    PlacementError where *devices* cannot be divided so.
    """
    is_auto = settings.layout == "auto"
    size = settings.gpus_per_replica
    if size == "auto":
        able = able_to_share(devices)
        if is_auto:
            return [able] if able else [[device] for device in devices]
        size = 1 if settings.layout == "replicas" else len(devices)
    able = able_to_share(devices) if is_auto and size > 1 else devices
    if len(able) < size or (len(able) % size and not is_auto):
        raise _indivisible(devices, able, size)
    groups = [able[start : start + size] for start in range(0, len(able) - size + 1, size)]
    for group in groups:
        refuse_shared_mig(group)
    return groups


def refuse_shared_mig(devices: Sequence[Device]) -> None:
    """Raise PlacementError where a copy on *devices* would need several devices and one of them is MIG."""
    if len(devices) > 1 and len(able_to_share(devices)) < len(devices):
        raise PlacementError(
            "One copy of the model cannot lie on several MIG devices: a process sees one of them only.",
            hint="Leave devices.layout and devices.gpus_per_replica at auto, or name whole GPUs.",
        )


def fewest(
    left: Sequence[Device], order: Sequence[Device], demand: Demand, sizes: Sequence[int]
) -> Sequence[Device] | None:
    """The smallest group of *left*, of one of *sizes*, that a copy has room on, in *order*; or None.

    It is the largest device and the smallest others that will do: large ones are kept, as each may
    make a copy possible.
    """
    for size in sizes:
        for group in _candidates(left, demand.settings, size):
            ordered = sorted(group, key=order.index)
            if has_room(ordered, demand):
                return ordered
    return None


def _candidates(left: Sequence[Device], settings: DeviceSettings, size: int) -> Iterator[Sequence[Device]]:
    """The largest of *left* with the *size* − 1 smallest others, then with ever larger ones."""
    able = sorted(
        left if size == 1 else able_to_share(left),
        key=lambda device: -device.budget_bytes(settings.memory_fraction),
    )
    if size == 1:
        yield able[:1]
        return
    others = sorted(able[1:], key=lambda device: device.budget_bytes(settings.memory_fraction))
    for start in range(len(others) - size + 2):
        yield [*able[:1], *others[start : start + size - 1]]


def finds_room(devices: Sequence[Device], demand: Demand) -> bool:
    """Whether `place` finds a way, whatever the layout but for a map of the job's own.

    Much quicker than `place`, as no good way is looked for.
    """
    if devices[0].index is None:
        return has_room(devices, demand)
    try:
        groups = groups_of(devices, demand.settings)
    except PlacementError:
        return False
    each = for_each(demand, len(groups))
    if demand.settings.layout != "auto":
        return all(has_room(group, each) for group in groups)
    if any(has_room(group, without_offload(demand)) for group in _most_able(devices, demand.settings)):
        return True
    return demand.settings.offload != "none" and any(has_room(group, each) for group in groups)


def for_each(demand: Demand, num_copies: int) -> Demand:
    """*demand* for one of *num_copies*, which share the host's memory."""
    return replace(demand, host_bytes=demand.host_bytes / num_copies)


def without_offload(demand: Demand) -> Demand:
    """*demand* with all layers on the devices."""
    return replace(demand, settings=demand.settings.model_copy(update={"offload": "none"}))


def able_to_share(devices: Sequence[Device]) -> Sequence[Device]:
    """Those of *devices* of which one process can have several: CUDA shows it one MIG device only."""
    return [device for device in devices if not device.uuid.startswith("MIG-")]


def _most_able(devices: Sequence[Device], settings: DeviceSettings) -> Iterator[Sequence[Device]]:
    """The groups of which one has room if any has, as a device more never takes room away."""
    size = settings.gpus_per_replica
    able = sorted(able_to_share(devices), key=lambda device: -device.budget_bytes(settings.memory_fraction))
    if able:
        yield sorted(able if size == "auto" else able[:size], key=devices.index)
    if size in ("auto", 1):
        yield from ([device] for device in devices if device not in able)


def _indivisible(devices: Sequence[Device], able: Sequence[Device], size: int) -> PlacementError:
    but = "" if len(able) == len(devices) else f", {len(devices) - len(able)} of them MIG devices,"
    return PlacementError(
        f"devices.gpus_per_replica is {size}, and {len(devices)} GPUs{but} cannot be divided so.",
        hint="Name a multiple of it in devices.use, or choose another number.",
    )
