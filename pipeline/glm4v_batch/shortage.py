"""Say why the model finds no room, with all numbers, and what would give it room."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from glm4v_batch.errors import PlacementError
from glm4v_batch.job import DeviceSettings
from glm4v_batch.layouts import Demand, budget_bytes, has_room
from glm4v_batch.needs import ModuleNeed
from glm4v_batch.packing import largest
from glm4v_batch.reasons import names_of, request_bytes
from glm4v_batch.types import Device, RequestSize
from glm4v_batch.units import format_bytes

_MOST_GPUS = 64
_USUAL_FRACTION = 0.92
# An image of fewer visual tokens is a thumbnail.
_LEAST_TOKENS = 64


def no_room(devices: Sequence[Device], demand: Demand, chosen: Sequence[Device]) -> PlacementError:
    """What to raise where a copy finds no room on *devices*, which are some or all of those *chosen*."""
    needs, worst = demand.needs, demand.worst
    message = (
        f"The model does not fit on {names_of(devices)}: it takes {format_bytes(needs.weight_bytes)} for its "
        f"weights, and beside them {format_bytes(request_bytes(demand))} for the largest request "
        f"({worst.prompt_tokens:,} prompt tokens, {worst.visual_patches:,} patches, "
        f"{worst.new_tokens:,} new tokens)."
    )
    lines = [f"  {_described(device, demand.settings)}" for device in devices]
    if demand.settings.offload == "cpu":
        lines.append(f"  host memory: room for {format_bytes(demand.host_bytes)} of offloaded weights")
    return PlacementError("\n".join([message, *lines]), hint=_hint(devices, demand, chosen))


def overfull(devices: Sequence[Device], predicted_bytes: Sequence[int], demand: Demand) -> PlacementError:
    """What to raise where the job's own map puts too much on one of *devices*.

    *predicted_bytes* is what each of them would take with the largest request.
    """
    lines = [
        f"  {_described(device, demand.settings)}; would take {format_bytes(taken)}"
        for device, taken in zip(devices, predicted_bytes, strict=True)
    ]
    automatic = replace(demand, settings=demand.settings.model_copy(update={"layout": "auto"}))
    hint = "Move modules to another GPU, or leave devices.layout at auto."
    return PlacementError(
        "\n".join(["devices.layout leaves a GPU without room for the largest request:", *lines]),
        hint=hint if has_room(devices, automatic) else _hint(devices, automatic, devices),
    )


def _described(device: Device, settings: DeviceSettings) -> str:
    others = f", {format_bytes(device.others_bytes)} of it held by others" if device.others_bytes else ""
    limit = "" if device.limit_bytes is None else f", limited to {format_bytes(device.limit_bytes)}"
    budget = format_bytes(budget_bytes(device, settings))
    return (
        f"{names_of([device])} ({device.name}): {format_bytes(device.total_bytes)}{others}{limit}; "
        f"may hold {budget} (devices.memory_fraction: {settings.memory_fraction:g})"
    )


def _hint(devices: Sequence[Device], demand: Demand, chosen: Sequence[Device]) -> str:
    remedies = [
        *_more_memory(devices, demand),
        *_more_devices(devices, demand, chosen),
        *_smaller_requests(devices, demand),
        *_smaller_weights(devices, demand),
        *_offloading(devices, demand),
    ]
    if not remedies:
        return "Use a smaller model, or larger GPUs."
    *others, last = remedies
    return f"One of these would do: {'; '.join(others)}; or {last}." if others else f"This would do: {last}."


def _more_memory(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    unlimited = [replace(device, limit_bytes=None) for device in devices]
    freed = [replace(device, free_bytes=device.total_bytes) for device in devices]
    if has_room(unlimited, demand):
        yield "raise devices.memory_limit_gib"
    elif has_room(freed, demand):
        yield "free the memory that others hold"
    elif has_room([replace(device, limit_bytes=None) for device in freed], demand):
        yield "free the memory that others hold and raise devices.memory_limit_gib"
    usual = demand.settings.model_copy(update={"memory_fraction": _USUAL_FRACTION})
    is_low = demand.settings.memory_fraction < _USUAL_FRACTION
    if is_low and has_room(devices, replace(demand, settings=usual)):
        yield f"raise devices.memory_fraction to {_USUAL_FRACTION}"


def _more_devices(devices: Sequence[Device], demand: Demand, chosen: Sequence[Device]) -> Iterator[str]:
    if len(chosen) > len(devices) and has_room(chosen, demand):
        yield "leave devices.layout and devices.gpus_per_replica at auto"
        return
    best = max(devices, key=lambda device: device.usable_bytes)
    too_few = largest(lambda count: not has_room([best] * count, demand), _MOST_GPUS)
    if best.index is not None and too_few < _MOST_GPUS:
        room = best.free_bytes if best.limit_bytes is None else min(best.free_bytes, best.limit_bytes)
        grouped = demand.settings.layout == "replicas" or demand.settings.gpus_per_replica != "auto"
        setting = f" and set devices.gpus_per_replica: {too_few + 1}" if grouped else ""
        yield f"use {too_few + 1} GPUs with {format_bytes(room)} each{setting}"


def _smaller_requests(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    needs, worst = demand.needs, demand.worst
    if worst.visual_patches > demand.image_patches:
        return  # several images, of which the limit bounds each alone
    num_tokens = worst.visual_patches // needs.patches_per_token

    def fits(fewer_tokens: int) -> bool:
        prompt_tokens = worst.prompt_tokens - num_tokens + fewer_tokens
        smaller = RequestSize(prompt_tokens, fewer_tokens * needs.patches_per_token, worst.new_tokens)
        return has_room(devices, replace(demand, worst=smaller))

    enough = largest(fits, num_tokens)
    if enough >= _LEAST_TOKENS:
        yield f"lower images.max_pixels to {_rounded(enough * needs.pixels_per_token)}"


def _rounded(pixels: int) -> int:
    """*pixels*, all digits but the first two made 0."""
    step: int = 10 ** max(0, len(str(pixels)) - 2)
    return pixels // step * step


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
    if has_room(devices, replace(demand, needs=smaller)):
        yield f"{remedy} (about {format_bytes(smaller.weight_bytes)} of weights)"


def _halved(module: ModuleNeed) -> ModuleNeed:
    return replace(module, weight_bytes=module.weight_bytes // 2)


def _offloading(devices: Sequence[Device], demand: Demand) -> Iterator[str]:
    if devices[0].index is None or demand.settings.offload == "disk":
        return
    for place in ("cpu", "disk"):
        settings = demand.settings.model_copy(update={"offload": place})
        if has_room(devices, replace(demand, settings=settings)):
            yield f"set devices.offload: {place}, which is much slower"
            return
