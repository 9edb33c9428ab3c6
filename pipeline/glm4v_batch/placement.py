"""Decide where the copies of the model go, by numbers, before a weight is read.

A copy takes the smallest group of devices that holds it with its largest request, and there are as
many copies as the devices allow. Layers are spread over several devices where one cannot hold them
all, or where the job asks for it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil, inf

from glm4v_batch.activations import (
    DeviceShare,
    FloatArray,
    feature_token_bytes,
    packed_coefficients,
    pool_token_bytes,
    prior_coefficients,
)
from glm4v_batch.device_map import check_map, compact_map, spots_of
from glm4v_batch.errors import PlacementError
from glm4v_batch.groups import able_to_share, fewest, for_each, groups_of, refuse_shared_mig, without_offload
from glm4v_batch.job import DeviceSettings
from glm4v_batch.layouts import Demand, lay
from glm4v_batch.memory import MemoryModel
from glm4v_batch.needs import ModelNeeds, ModuleNeed
from glm4v_batch.packed_limits import PackedNeeds
from glm4v_batch.packing import batch_of, largest, share_of
from glm4v_batch.reasons import reason_of
from glm4v_batch.shortage import no_room, overfull
from glm4v_batch.types import Device, PeakSample, Placement, Replica, RequestSize, Spot
from glm4v_batch.units import format_bytes


def place(
    devices: Sequence[Device],
    needs: ModelNeeds,
    settings: DeviceSettings,
    worst: RequestSize,
    typical: RequestSize,
    host: Device | None = None,
    image_patches: float = inf,
) -> Placement:
    """Where the copies of the model go on *devices*, those that `devices.use` names, in its order.

    Every device of a copy has room for its weights and one *worst* request within `memory_fraction`
    of what it may use; layers are spread so that batches of *typical* requests can be largest. Only
    `auto` passes over a device that a copy has no room on; the other layouts are refused then. What
    gets no module is idle. *host*, the CPU, bounds what may lie in host memory; None: no bound.
    *image_patches* is the most that one image may have. Raises PlacementError with the numbers where
    something does not fit, JobError where the job's own map is wrong.
    """
    host_bytes = inf if host is None else host.budget_bytes(settings.memory_fraction)
    demand = Demand(needs, settings, worst, typical, host_bytes, image_patches)
    if devices[0].index is None:
        return _on_the_cpu(devices[0], demand)
    if isinstance(settings.layout, Mapping):
        return _by_map(devices, demand, settings.layout)
    if settings.layout == "auto":
        return _as_many_as_fit(devices, demand)
    return _in_groups(devices, demand)


def shares(replica: Replica, needs: ModelNeeds) -> tuple[DeviceShare, ...]:
    """The part of the work that each device of *replica* does.

    The first one takes the inputs and executes what lies on no device, as accelerate has it.
    """
    return tuple(
        share_of(modules, needs, takes_inputs=position == 0)
        for position, modules in enumerate(_executed(replica, needs))
    )


def priors(replica: Replica, needs: ModelNeeds) -> list[FloatArray]:
    """What `prior_coefficients` gives for each device of *replica*."""
    return [
        prior_coefficients(needs.config, needs.bytes_per_value, share) for share in shares(replica, needs)
    ]


def packed_needs(replica: Replica, needs: ModelNeeds) -> list[PackedNeeds]:
    """What the packed engine takes on each device of *replica*."""
    config, value_bytes = needs.config, needs.bytes_per_value
    return [
        PackedNeeds(
            coefficients=packed_coefficients(config, value_bytes, share),
            pool_token_bytes=pool_token_bytes(config, value_bytes, share),
            feature_token_bytes=feature_token_bytes(config, value_bytes) if share.takes_inputs else 0,
        )
        for share in shares(replica, needs)
    ]


def standing_bytes(replica: Replica, needs: ModelNeeds) -> tuple[int, ...]:
    """What each device of *replica* keeps for weights: its own, and on the first one those passing through.

    For planning. When the vision tower is at its peak no layer passes, so a run measures less.
    """
    spots = spots_of(replica.device_map, needs)
    streamed = [m.weight_bytes for m in needs.modules if not isinstance(spots[m.name], int)]
    first, *others = replica.weight_bytes
    return (first + max(streamed, default=0), *others)


def expected_batch_size(
    replica: Replica,
    needs: ModelNeeds,
    typical: RequestSize,
    memory_fraction: float,
    samples: Sequence[PeakSample] = (),
) -> int:
    """How many *typical* requests fit *replica* at once when trust is full; 0 where not one does.

    *samples* are what an earlier run measured on the same devices.
    """
    memory = MemoryModel(standing_bytes(replica, needs), priors(replica, needs), samples)
    memory.trust = 1.0
    budgets = [device.budget_bytes(memory_fraction) for device in replica.devices]
    return largest(lambda num_requests: memory.fits(batch_of(typical, num_requests), budgets))


def _executed(replica: Replica, needs: ModelNeeds) -> list[list[ModuleNeed]]:
    spots = spots_of(replica.device_map, needs)
    executed: list[list[ModuleNeed]] = [[] for _ in replica.devices]
    for module in needs.modules:
        spot = spots[module.name]
        executed[spot if isinstance(spot, int) else 0].append(module)
    return executed


def _on_the_cpu(device: Device, demand: Demand) -> Placement:
    settings = demand.settings
    if settings.layout not in ("auto", "replicas") or settings.gpus_per_replica not in ("auto", 1):
        raise PlacementError(
            "devices.layout and devices.gpus_per_replica spread the model over GPUs, and it runs on the CPU.",
            hint="Leave both at auto, or run where there are GPUs.",
        )
    if device.limit_bytes is not None or settings.offload != "none":
        raise PlacementError(
            "devices.memory_limit_gib and devices.offload are for GPUs, and the model runs on the CPU.",
            hint="Leave both out, or run where there are GPUs.",
        )
    replica = lay([device], demand)
    if replica is None:
        raise no_room([device], demand, [device])
    return _described([device], [replica], demand)


def _as_many_as_fit(devices: Sequence[Device], demand: Demand) -> Placement:
    on_devices, number = without_offload(demand), demand.settings.gpus_per_replica
    sizes = range(1, len(devices) + 1) if number == "auto" else [number]
    left = list(devices)
    replicas: list[Replica] = []
    while (group := fewest(left, devices, on_devices, sizes)) is not None:
        replica = lay(group, on_devices)
        assert replica is not None, "what has room can be laid"
        replicas.append(replica)
        left = [device for device in left if device not in replica.devices]
    if not replicas:
        return _in_groups(devices, demand)
    if number == "auto":
        replicas = _joined(replicas, able_to_share(left), devices, on_devices)
    return _described(devices, replicas, demand)


def _joined(
    replicas: Sequence[Replica], left: Sequence[Device], order: Sequence[Device], demand: Demand
) -> list[Replica]:
    """*replicas*, those of several devices widened by what is *left* wherever that makes batches larger."""

    def batch_size(replica: Replica) -> int:
        return expected_batch_size(replica, demand.needs, demand.typical, demand.settings.memory_fraction)

    joined = list(replicas)
    for device in left:
        # A copy on one device is faster than any that is spread.
        spread = [replica for replica in joined if len(replica.devices) > 1]
        if spread:
            least = min(spread, key=lambda replica: len(replica.devices))
            wider = lay(sorted([*least.devices, device], key=order.index), demand)
            if wider is not None and batch_size(wider) > batch_size(least):
                joined[joined.index(least)] = wider
    return joined


def _in_groups(devices: Sequence[Device], demand: Demand) -> Placement:
    groups = groups_of(devices, demand.settings)
    each = for_each(demand, len(groups))
    laid = [lay(group, each) for group in groups]
    replicas = [replica for replica in laid if replica is not None]
    may_pass_over = demand.settings.layout == "auto" and replicas
    if len(replicas) < len(groups) and not may_pass_over:
        raise no_room(groups[laid.index(None)], demand, devices)
    return _described(devices, replicas, demand)


def _by_map(devices: Sequence[Device], demand: Demand, layout: Mapping[str, Spot]) -> Placement:
    check_map(layout, demand.needs, devices)
    named = spots_of(layout, demand.needs)
    by_index = {device.index: device for device in devices}
    # The first device takes the inputs, so it is the one where the model begins.
    indices = [spot for spot in dict.fromkeys(named.values()) if isinstance(spot, int)]
    spots = {name: indices.index(spot) if isinstance(spot, int) else spot for name, spot in named.items()}
    held: Counter[Spot] = Counter()
    for module in demand.needs.modules:
        held[spots[module.name]] += module.weight_bytes
    replica = Replica(
        devices=tuple(by_index[index] for index in indices),
        device_map=compact_map(spots),
        weight_bytes=tuple(held[position] for position in range(len(indices))),
        offloaded_bytes=held["cpu"] + held["disk"],
    )
    refuse_shared_mig(replica.devices)
    _refuse_overfull(replica, devices, demand, held["cpu"])
    return _described(devices, [replica], demand)


def _refuse_overfull(replica: Replica, chosen: Sequence[Device], demand: Demand, host_bytes: int) -> None:
    fixed = standing_bytes(replica, demand.needs)
    memory = MemoryModel(fixed, priors(replica, demand.needs))
    memory.trust = 1.0
    worst = batch_of(demand.worst)
    if not memory.fits(worst, demand.budgets_bytes(replica.devices)):
        taken = [
            held + ceil((predicted - held) * (1 + memory.margin))
            for held, predicted in zip(fixed, memory.predict(worst), strict=True)
        ]
        raise overfull(replica.devices, taken, demand, chosen)
    if host_bytes > demand.host_bytes:
        raise PlacementError(
            f"devices.layout puts {format_bytes(host_bytes)} of weights into host memory, "
            f"which has room for {format_bytes(demand.host_bytes)}.",
            hint="Put fewer modules on cpu, or put them on disk.",
        )


def _described(devices: Sequence[Device], replicas: Sequence[Replica], demand: Demand) -> Placement:
    used = {device for replica in replicas for device in replica.devices}
    idle = tuple(device for device in devices if device not in used)
    return Placement(tuple(replicas), reason_of(replicas, idle, demand), idle)
