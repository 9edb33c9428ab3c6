"""Find the devices and put the model on one of them.

This version runs one replica on one device: the chosen GPU with the most free memory, or the
CPU where there is none.
"""

import os
from collections.abc import Sequence
from typing import Literal

from glm4v_batch.errors import PlacementError
from glm4v_batch.types import Device, Placement, Replica
from glm4v_batch.units import format_bytes

Use = Literal["all", "cpu"] | Sequence[int]

# Below this a GPU has no room for the activations of even one large image.
_SMALLEST_ROOM = 1.03


def let_segments_grow() -> None:
    """Ask torch's CUDA allocator for segments that grow, unless the user has asked for something else.

    Batches of ever new sizes fragment a card otherwise: a batch predicted and measured at 88 % of an
    80 GB card ran out of memory. To be called before torch touches CUDA, which reads this once.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def find_devices(use: Use) -> tuple[Device, ...]:
    """The devices that `devices.use` names, GPUs first choice, the CPU where there is no GPU.

    Raises PlacementError where it names a GPU that is not there.
    """
    let_segments_grow()
    import torch

    count = torch.cuda.device_count() if use != "cpu" else 0
    wanted = list(range(count)) if isinstance(use, str) else list(use)
    missing = sorted(set(wanted) - set(range(count)))
    if missing:
        raise PlacementError(
            f"devices.use names GPU {missing[0]}, but {_gpus_there(count)}.",
            hint="Run 'nvidia-smi' to see them; CUDA_VISIBLE_DEVICES may hide some.",
        )
    return tuple(_cuda_device(index) for index in wanted) or (_cpu(),)


def _gpus_there(count: int) -> str:
    return "there is no GPU here" if count == 0 else f"the GPUs here are 0 to {count - 1}"


def _cuda_device(index: int) -> Device:
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    limit = int(torch.cuda.get_per_process_memory_fraction(index) * properties.total_memory)
    return Device(index, properties.name, limit, min(free, limit))


def _cpu() -> Device:
    import psutil

    memory = psutil.virtual_memory()
    return Device(None, "CPU", memory.total, memory.available)


def place(devices: Sequence[Device], weight_bytes: int, memory_fraction: float) -> Placement:
    """The whole model on the device with the most free memory.

    Raises PlacementError, before a weight is read, where it does not fit there.
    """
    device = max(devices, key=lambda d: d.free_bytes)
    budget = int(device.free_bytes * memory_fraction)
    if weight_bytes * _SMALLEST_ROOM > budget:
        raise PlacementError(
            f"The model needs {format_bytes(weight_bytes)} for its weights, and some room beside them; "
            f"{device.torch_name} ({device.name}) has {format_bytes(budget)} "
            f"({memory_fraction:.0%} of the {format_bytes(device.free_bytes)} that are free).",
            hint="Free memory on the device, name another one in devices.use, or use a smaller model.",
        )
    reason = f"{format_bytes(weight_bytes)} of weights fit on {device.torch_name}"
    if len(devices) > 1:
        reason += f", the freest of {len(devices)} GPUs; this version uses one"
    return Placement((Replica((device,), {"": device.torch_name}, (weight_bytes,)),), reason)
