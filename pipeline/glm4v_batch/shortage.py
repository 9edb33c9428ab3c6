"""Say why the model finds no room, with all numbers, and what would give it room."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from glm4v_batch.errors import PlacementError
from glm4v_batch.groups import able_to_share, finds_room
from glm4v_batch.job import DeviceSettings
from glm4v_batch.layouts import Demand
from glm4v_batch.needs import ModuleNeed
from glm4v_batch.packing import largest
from glm4v_batch.reasons import names_of, request_bytes, request_named
from glm4v_batch.types import Device, RequestSize
from glm4v_batch.units import format_bytes, format_count

# What is left beyond is for what nobody counts: kernels, and the workspaces of libraries.
_HIGHEST_FRACTION = 0.95
_ANOTHER_JOB = (
    " Other pixel limits, answers or weights make another job: a folder that holds parts refuses it, so name "
    "another output.path."
)
_MOST_GPUS = 64
# An image of fewer visual tokens is a thumbnail.
_LEAST_TOKENS = 64
_LEAST_NEW_TOKENS = 16


def no_room(devices: Sequence[Device], demand: Demand, chosen: Sequence[Device]) -> PlacementError:
    """What to raise where a copy finds no room on *devices*, which are some or all of those *chosen*.

    What the hint proposes was tried: with it, all that the job asks for finds room on those *chosen*.
    """
    needs, worst = demand.needs, demand.worst
    message = (
        f"The model does not fit on {names_of(devices)}: it takes {format_bytes(needs.weight_bytes)} for its "
        f"weights, and beside them {format_bytes(request_bytes(demand))} for {request_named(demand)} "
        f"({worst.prompt_tokens:,} prompt tokens, {worst.visual_patches:,} patches, "
        f"{worst.new_tokens:,} new tokens)."
    )
    lines = [f"  {_described(device, demand.settings)}" for device in devices]
    if demand.settings.offload == "cpu":
        lines.append(f"  host memory: room for {format_bytes(demand.host_bytes)} of offloaded weights")
    if len(chosen) - len(able_to_share(chosen)) > 1:
        lines.append("  One copy cannot lie on several MIG devices: a process sees one of them only.")
    return PlacementError("\n".join([message, *lines]), hint=_hint(chosen, demand))


def overfull(
    devices: Sequence[Device], taken_bytes: Sequence[int], demand: Demand, chosen: Sequence[Device]
) -> PlacementError:
    """What to raise where the job's own map puts too much on one of *devices*, some of those *chosen*.

    *taken_bytes* is what each of them would take with the request that must fit, margin included.
    """
    lines = [
        f"  {_described(device, demand.settings)}; would take {format_bytes(taken)}"
        for device, taken in zip(devices, taken_bytes, strict=True)
    ]
    return PlacementError(
        "\n".join([f"devices.layout leaves a GPU without room for {request_named(demand)}:", *lines]),
        hint=f"Move modules to another GPU{_or_auto(chosen, demand)}.",
    )


def _described(device: Device, settings: DeviceSettings) -> str:
    others = f", {format_bytes(device.others_bytes)} of it held by others" if device.others_bytes else ""
    limit = "" if device.limit_bytes is None else f", limited to {format_bytes(device.limit_bytes)}"
    budget = format_bytes(device.budget_bytes(settings.memory_fraction))
    return (
        f"{names_of([device])} ({device.name}): {format_bytes(device.total_bytes)}{others}{limit}; "
        f"may hold {budget} (devices.memory_fraction: {settings.memory_fraction:g})"
    )


def _or_auto(chosen: Sequence[Device], demand: Demand) -> str:
    would_do = finds_room(chosen, _with(demand, layout="auto"))
    return ", or leave devices.layout at auto" if would_do else ", to cpu or to disk"


def _hint(devices: Sequence[Device], demand: Demand) -> str:
    harmless = [
        *_more_memory(devices, demand),
        *_more_devices(devices, demand),
        *_offloading(devices, demand),
    ]
    changing = [*_smaller_requests(devices, demand), *_smaller_weights(devices, demand)]
    return f"{_one_of([*harmless, *changing], devices)}{_ANOTHER_JOB if changing else ''}"


def _one_of(remedies: Sequence[str], devices: Sequence[Device]) -> str:
    if not remedies:
        on_cpu = devices[0].index is None
        return f"Use a smaller model, or {'a machine with more memory' if on_cpu else 'larger GPUs'}."
    *others, last = remedies
    return f"One of these would do: {'; '.join(others)}; or {last}." if others else f"This would do: {last}."


def _with(demand: Demand, **settings: object) -> Demand:
    return replace(demand, settings=demand.settings.model_copy(update=settings))


def _more_memory(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    default: float = DeviceSettings.model_fields["memory_fraction"].default
    higher = (f for f in (default, _HIGHEST_FRACTION) if f > demand.settings.memory_fraction)
    enough_fraction = next((f for f in higher if finds_room(devices, _with(demand, memory_fraction=f))), None)
    if enough_fraction is not None:
        yield f"raise devices.memory_fraction to {enough_fraction:g}"
    unlimited = [replace(device, limit_bytes=None) for device in devices]
    freed = [replace(device, free_bytes=device.total_bytes) for device in devices]
    both = [replace(device, limit_bytes=None) for device in freed]
    remedies = {
        "raise devices.memory_limit_gib": unlimited,
        "free the memory that others hold": freed,
    }
    enough = [remedy for remedy, changed in remedies.items() if finds_room(changed, demand)]
    if not enough and finds_room(both, demand):
        enough = ["free the memory that others hold and raise devices.memory_limit_gib"]
    yield from enough


def _more_devices(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    settings = demand.settings
    if finds_room(devices, _with(demand, layout="auto", gpus_per_replica="auto")):
        yield "leave devices.layout and devices.gpus_per_replica at auto"
        return
    able = [device for device in able_to_share(devices) if device.index is not None]
    if not able:
        return
    best = max(able, key=lambda device: device.usable_bytes)
    is_sized = settings.gpus_per_replica != "auto" or settings.layout == "replicas"

    def too_few(count: int) -> bool:
        size = count if is_sized else "auto"
        return not finds_room([best] * count, _with(demand, gpus_per_replica=size))

    count = largest(too_few, _MOST_GPUS) + 1
    if count <= _MOST_GPUS:
        room = best.free_bytes if best.limit_bytes is None else min(best.free_bytes, best.limit_bytes)
        sized = f" and set devices.gpus_per_replica: {count}" if is_sized else ""
        yield f"use {format_count(count, 'GPU')} with {format_bytes(room)} free each{sized}"


def _smaller_requests(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    yield from _smaller_images(devices, demand)
    worst = demand.worst

    def fits(new_tokens: int) -> bool:
        return finds_room(devices, replace(demand, worst=replace(worst, new_tokens=new_tokens)))

    enough = largest(fits, worst.new_tokens)
    if enough >= _LEAST_NEW_TOKENS:
        yield f"lower generation.max_new_tokens to {_rounded(enough)}"


def _smaller_images(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    needs, worst = demand.needs, demand.worst
    if worst.visual_patches > demand.image_patches:
        return  # several images, of which the limit bounds each alone
    num_tokens = worst.visual_patches // needs.patches_per_token

    def fits(fewer_tokens: int) -> bool:
        prompt_tokens = worst.prompt_tokens - num_tokens + fewer_tokens
        smaller = RequestSize(prompt_tokens, fewer_tokens * needs.patches_per_token, worst.new_tokens)
        return finds_room(devices, replace(demand, worst=smaller))

    enough = largest(fits, num_tokens)
    if enough >= _LEAST_TOKENS:
        yield f"lower images.max_pixels to {_rounded(enough * needs.pixels_per_token)}"


def _rounded(number: int) -> int:
    """*number*, all digits but the first two made 0."""
    step: int = 10 ** max(0, len(str(number)) - 2)
    return number // step * step


def _smaller_weights(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    needs = demand.needs
    if needs.bytes_per_value == 4:
        remedy = "set model.dtype: bfloat16"
        smaller = replace(needs, modules=tuple(map(_halved, needs.modules)), bytes_per_value=2)
    elif "quantization_config" not in needs.config:
        remedy = "use a version of the model in 8 bits"
        # Quantisers leave the embedding and the head as they are.
        halved = (_halved(m) if m.is_vision or m.layer is not None else m for m in needs.modules)
        smaller = replace(needs, modules=tuple(halved))
    else:
        return
    if finds_room(devices, replace(demand, needs=smaller)):
        yield f"{remedy} (about {format_bytes(smaller.weight_bytes)} of weights)"


def _halved(module: ModuleNeed) -> ModuleNeed:
    return replace(module, weight_bytes=module.weight_bytes // 2)


def _offloading(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    if devices[0].index is None:
        return
    further = {"none": ("cpu", "disk"), "cpu": ("disk",), "disk": ()}[demand.settings.offload]
    for place in further:
        if finds_room(devices, _with(demand, offload=place)):
            yield f"set devices.offload: {place}, which is much slower"
            return
