"""Find the devices that there are and watch how busy they are, without touching CUDA in this process.

A CUDA context takes about half a GiB of its card for as long as the process lives, so the driver's
library is asked instead (NVML, which needs no context); torch only where NVML cannot tell, and then
in a process that ends with its answer.
"""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from glm4v_batch.errors import PlacementError
from glm4v_batch.types import Device

Use = Literal["all", "cpu"] | Sequence[int]
"""What `devices.use` says: all GPUs, the CPU, or GPUs by number."""

_log = logging.getLogger(__name__)

_DEV = Path("/dev")
_TORCH_SECONDS = 300  # importing torch from a cold network file system takes minutes
# What people hide all GPUs with.
_NONE_ON_PURPOSE = ("", "-1", "none", "void", "NoDevFiles")
_NVIDIA_SMI = "Run 'nvidia-smi' to see what the driver says"


def let_segments_grow() -> None:
    """Ask torch's CUDA allocator for segments that grow, unless the user has asked for something else.

    Batches of ever new sizes fragment a card otherwise: a batch predicted and measured at 88 % of an
    80 GB card ran out of memory. To be called before torch touches CUDA, which reads this once.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A whole GPU, or a MIG device of one, as its driver lists it.

    card       the number of the physical GPU, as nvidia-smi counts it; its MIG devices share it
    card_uuid  how the driver names the physical GPU, `GPU-…`
    uuid       how it names this device: the same, or `MIG-…`; empty where it does not tell
    trouble    the driver's words where it cannot be read; sizes are 0 then
    """

    card: int
    card_uuid: str = ""
    uuid: str = ""
    name: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    trouble: str = ""


def find_devices(use: Use, limit_bytes: int | None = None) -> tuple[Device, ...]:
    """The devices that `devices.use` names, GPUs first choice, the CPU where torch can have no GPU.

    GPUs are numbered from 0 among those that CUDA_VISIBLE_DEVICES leaves, in its order; without it as
    nvidia-smi numbers them, the MIG devices of a GPU in its place. *limit_bytes* is the most that the
    job allows itself on each device. GPUs that their driver cannot read are passed over with a warning.
    Raises PlacementError where *use* names one by its number, or one that is not there, and where no
    GPU can be read.
    """
    found = () if use == "cpu" else _find_gpus()
    wanted = range(len(found)) if isinstance(use, str) else use
    missing = sorted(set(wanted) - set(range(len(found))))
    if missing:
        raise PlacementError(
            f"devices.use names GPU {missing[0]}, but {_gpus_there(len(found))}.", hint=_where_they_are()
        )
    if not wanted:
        memory = host_memory()
        return (Device(None, "CPU", memory.total_bytes, memory.free_bytes, limit_bytes=limit_bytes),)
    if use == "all":
        wanted = _sound(found) or wanted
    return tuple(_device(index, found[index], limit_bytes) for index in wanted)


def _sound(gpus: Sequence[Gpu]) -> list[int]:
    """The numbers of those that can be read; each of the others is named in the log."""
    for index, gpu in enumerate(gpus):
        if gpu.trouble:
            _log.warning("GPU %d is left out, its driver says: %s", index, gpu.trouble)
    return [index for index, gpu in enumerate(gpus) if not gpu.trouble]


def _gpus_there(count: int) -> str:
    if count == 0:
        return "there is no GPU here"
    return "the only GPU here is 0" if count == 1 else f"the GPUs here are 0 to {count - 1}"


def _where_they_are() -> str:
    if _torch_platform() is None:
        return "The torch that is installed is built for the CPU alone; install one that is built for GPUs."
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return f"{_NVIDIA_SMI}."
    return f"CUDA_VISIBLE_DEVICES is {visible!r} and hides all others. {_NVIDIA_SMI}."


def _device(index: int, gpu: Gpu, limit_bytes: int | None) -> Device:
    if gpu.trouble:
        raise PlacementError(
            f"GPU {index} cannot be used; its driver says: {gpu.trouble}.",
            hint=f"{_NVIDIA_SMI}, or name the other GPUs in devices.use.",
        )
    return Device(index, gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.uuid, limit_bytes)


def _find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can have, as CUDA_VISIBLE_DEVICES leaves them.

    NVML lists cards in the order of their PCI addresses, as nvidia-smi does, and integers in
    CUDA_VISIBLE_DEVICES count that way here, as NVIDIA's programming guide says they do. CUDA itself
    puts the fastest card first where CUDA_DEVICE_ORDER does not say PCI_BUS_ID, which is another order
    only where cards differ. A user who asks for it by CUDA_DEVICE_ORDER=FASTEST_FIRST gets it: then
    torch is asked, as only CUDA knows which card it takes for the fastest.

    Raises PlacementError where NVML or torch is there and does not answer, where CUDA_VISIBLE_DEVICES
    names a GPU twice, and for HIP_VISIBLE_DEVICES.
    """
    platform = _torch_platform()
    if platform is None:
        return ()
    if platform == "cuda" and os.environ.get("CUDA_DEVICE_ORDER") != "FASTEST_FIRST":
        listed = _listed_by_nvml()
        if listed is not None:
            return visible_gpus(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not _gpu_driver_loaded():
        return ()
    gpus = ask_torch()
    if platform == "hip" and gpus and "HIP_VISIBLE_DEVICES" in os.environ:
        raise PlacementError(
            "HIP_VISIBLE_DEVICES is set, and each replica's own CUDA_VISIBLE_DEVICES is void beside it.",
            hint="Set CUDA_VISIBLE_DEVICES in its place: HIP takes both names for the same.",
        )
    return gpus


def _torch_platform() -> Literal["cuda", "hip"] | None:
    """What torch is built for, beside the CPU, from the text of its version.py.

    Importing torch takes seconds, which planning on a machine without a GPU should not cost.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    built_for = re.search(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", version, re.MULTILINE)
    if built_for is None:
        return None
    return "hip" if built_for[1] == "hip" else "cuda"


def _gpu_driver_loaded() -> bool:
    """Whether a driver that torch could use has put its device file into /dev.

    CUDA and ROCm open these files themselves, so that without one there is no GPU for any program:
    `nvidia*` (NVIDIA), `nvhost*` and `nvgpu` (Jetson), `dxg` (Windows Subsystem for Linux), `kfd` (AMD).
    """
    return any(any(_DEV.glob(pattern)) for pattern in ("nvidia*", "nvhost*", "nvgpu", "dxg", "kfd"))


def visible_gpus(gpus: Sequence[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """What CUDA_VISIBLE_DEVICES, set to *visible*, leaves of *gpus*, in its order; None leaves all.

    As CUDA reads it (CUDA Programming Guide, "CUDA Environment Variables"): a comma-separated list of
    numbers and of UUIDs, which may be cut short while they name one device alone; what comes after
    the first entry that names none is hidden, so that "" and "-1" hide everything. A card in MIG mode
    stands for its first MIG device. Where CUDA would be left with one MIG device, all are kept: a
    process sees one only, but each replica is a process of its own.

    Raises PlacementError where an entry stands twice: CUDA then shows no GPU at all (so
    torch.cuda._parse_visible_devices), and the run would go to the CPU without a word. The same where the
    first entry names none of *gpus*, unless it is one of those that people hide all GPUs with.
    """
    if visible is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        gpu = _named_by(entry.strip(), gpus)
        if gpu is None:
            break
        if gpu in chosen:
            raise PlacementError(
                f"CUDA_VISIBLE_DEVICES is {visible!r}, which names one GPU twice; CUDA shows none then.",
                hint="Name each GPU once.",
            )
        chosen.append(gpu)
    if gpus and not chosen and visible.strip() not in _NONE_ON_PURPOSE:
        raise PlacementError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which names none of the GPUs that are there "
            f"({len(gpus)}); CUDA shows none then.",
            hint="Name GPUs that `nvidia-smi -L` lists. To run on the CPU, set devices.use: cpu.",
        )
    return tuple(chosen)


def _named_by(entry: str, gpus: Sequence[Gpu]) -> Gpu | None:
    # CUDA reads numbers as strtoul does: "1st" is 1.
    if number := re.match(r"\+?(\d+)", entry):
        return next((gpu for gpu in gpus if gpu.card == int(number[1])), None)
    named: list[Gpu] = []
    if entry.startswith("MIG-"):
        named = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    elif entry.startswith("GPU-"):
        first_of_card = {gpu.card: gpu for gpu in reversed(gpus) if gpu.card_uuid.startswith(entry)}
        named = list(first_of_card.values())
    return named[0] if len(named) == 1 else None


def cuda_visible_devices(devices: Sequence[Device]) -> str:
    """What CUDA_VISIBLE_DEVICES must be for a process to see *devices* alone, as cuda:0, cuda:1, …

    UUIDs, which mean the same in any numbering. Where a driver tells none, the entries of this
    process's own CUDA_VISIBLE_DEVICES, or else the numbers. For the CPU an empty text, which hides all.
    Raises PlacementError for a MIG device among several: CUDA shows one process one MIG device only.
    """
    if len(devices) > 1 and any(device.uuid.startswith("MIG-") for device in devices):
        raise PlacementError(
            "One copy of the model cannot lie on several MIG devices: a process sees one of them only.",
            hint="Use larger MIG devices, whole GPUs, or a smaller model.",
        )
    indices = [device.index for device in devices if device.index is not None]
    if all(device.uuid for device in devices):
        return ",".join(device.uuid for device in devices)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = None if visible is None else visible.split(",")
    return ",".join(str(index) if entries is None else entries[index].strip() for index in indices)


def _listed_by_nvml() -> tuple[Gpu, ...] | None:
    """All GPUs by NVML; None where it cannot tell: no NVIDIA driver, or memory shared with the host.

    Raises PlacementError where there is a driver and it does not answer.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            cards = range(pynvml.nvmlDeviceGetCount())
            return tuple(gpu for card in cards for gpu in _gpus_of_card(pynvml, card))
        finally:
            pynvml.nvmlShutdown()
    except (
        pynvml.NVMLError_LibraryNotFound,
        pynvml.NVMLError_DriverNotLoaded,
        pynvml.NVMLError_NotSupported,
    ):
        return None
    except pynvml.NVMLError as error:
        raise PlacementError(
            f"The NVIDIA driver does not tell its GPUs; it says: {error}.",
            hint=f"{_NVIDIA_SMI}, or run on the CPU (devices.use: cpu).",
        ) from error


def _gpus_of_card(nvml: Any, card: int) -> tuple[Gpu, ...]:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(card)
        card_uuid = nvml.nvmlDeviceGetUUID(handle)
        return tuple(_gpu(nvml, card, card_uuid, device) for device in _devices_of_card(nvml, handle))
    except nvml.NVMLError_NotSupported:
        raise
    except nvml.NVMLError as error:
        # One lost card is no reason to refuse the others.
        return (Gpu(card, trouble=str(error)),)


def _devices_of_card(nvml: Any, handle: Any) -> Sequence[Any]:
    try:
        in_mig_mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return [handle]
    return list(_mig_devices(nvml, handle)) if in_mig_mode else [handle]


def _mig_devices(nvml: Any, handle: Any) -> Iterator[Any]:
    for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(nvml.NVMLError_NotFound):
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)


def _gpu(nvml: Any, card: int, card_uuid: str, handle: Any) -> Gpu:
    memory = _card_memory(nvml, handle)
    name = nvml.nvmlDeviceGetName(handle)
    uuid = nvml.nvmlDeviceGetUUID(handle)
    return Gpu(card, card_uuid, uuid, name, memory.total_bytes, memory.free_bytes)


@dataclass(frozen=True, slots=True)
class MemorySize:
    """How much memory programs can have at most, and how much of it is free."""

    total_bytes: int
    free_bytes: int


def _card_memory(nvml: Any, handle: Any) -> MemorySize:
    """The card's memory, without what the driver keeps for itself: the total that CUDA reports, too.

    What the driver keeps (0.5 GiB and more on an 80 GB card) would otherwise look like other programs'.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError_FunctionNotFound, nvml.NVMLError_ArgumentVersionMismatch):
        # Drivers before 510 know the first form only, which does not tell the two apart.
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return MemorySize(memory.total, memory.free)
    return MemorySize(memory.total - memory.reserved, memory.free)


def ask_torch() -> tuple[Gpu, ...]:
    """The GPUs that torch sees, found out in a process that ends at once and gives all memory back.

    Raises PlacementError where torch cannot be loaded or does not answer.
    """
    # As this process finds modules, and not from the current folder, which may hold anything.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "glm4v_batch.devices"]
    try:
        answer = subprocess.run(  # noqa: S603 - our own interpreter and our own module
            command, env=environment, capture_output=True, text=True, timeout=_TORCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PlacementError(
            f"torch did not tell its GPUs within {_TORCH_SECONDS} s.",
            hint="Try 'python -c \"import torch; print(torch.cuda.device_count())\"'.",
        ) from error
    if answer.returncode != 0:
        raise PlacementError(
            f"torch cannot tell its GPUs; it says: {_last_line(answer.stderr)}",
            hint="Repair the installation of torch, or run on the CPU (devices.use: cpu).",
        )
    return tuple(Gpu(**gpu) for gpu in json.loads(_last_line(answer.stdout)))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1]


def _seen_by_torch(index: int) -> Gpu:
    import torch

    try:
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Gpu(index, trouble=str(error).partition("\n")[0])
    # Only a whole NVIDIA GPU is sure to be known to CUDA_VISIBLE_DEVICES by the UUID that torch gives.
    known = torch.version.cuda is not None and "MIG" not in properties.name
    uuid = f"GPU-{properties.uuid}" if known else ""
    return Gpu(index, uuid, uuid, properties.name, total_bytes, free_bytes)


def _write_what_torch_sees() -> None:
    import torch

    gpus = [asdict(_seen_by_torch(index)) for index in range(torch.cuda.device_count())]
    sys.stdout.write(f"{json.dumps(gpus)}\n")


def host_memory(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> MemorySize:
    """The host's memory, or what the tightest control group of this process leaves of it.

    A container's limit is one of a control group, version 2 or 1, mounted at *cgroups*; *membership*
    names the groups of the process (cgroups(7)). Every group above counts as well. File pages that a
    group can drop, `inactive_file`, are free, as they are in the host's own figure.
    """
    import psutil

    host = psutil.virtual_memory()
    sizes = [MemorySize(host.total, host.available)]
    for folder in _memory_groups(cgroups, membership):
        sizes += _group_memory(folder)
    return MemorySize(min(s.total_bytes for s in sizes), max(0, min(s.free_bytes for s in sizes)))


def _memory_groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _with_parents(cgroups, path)
            elif "memory" in controllers.split(","):
                yield from _with_parents(cgroups / "memory", path)


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    # ".." stands where the group lies outside of what the container sees; nothing there can be read.
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _group_memory(folder: Path) -> Iterator[MemorySize]:
    for limit, usage, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        # Without a limit the file says "max", which is no number, or a number beyond any memory.
        with suppress(OSError, ValueError):
            limit_bytes = int((folder / limit).read_text())
            used_bytes = int((folder / usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield MemorySize(limit_bytes, limit_bytes - used_bytes + int(statistics.get(droppable, 0)))


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """How busy one GPU is right now, by all processes on it.

    index        the `Device.index` of the GPU
    utilisation  the part of the last sample period (1/6 to 1 s) in which a kernel ran, 0 to 1; None
                 where the driver does not tell, as for MIG devices
    """

    index: int
    used_bytes: int
    total_bytes: int
    utilisation: float | None


class DeviceMonitor:
    """Reads live figures of GPUs from NVML, which is open from here to `close`.

    Figures are for people: where NVML cannot tell them there are none, and no run stops for it.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._handles: list[tuple[int, Any]] = []
        self._nvml: Any = _open_nvml() if any(device.uuid for device in devices) else None
        if self._nvml is None:
            return
        for device in devices:
            if device.index is not None and device.uuid:
                with suppress(self._nvml.NVMLError):
                    self._handles.append((device.index, self._nvml.nvmlDeviceGetHandleByUUID(device.uuid)))

    def read(self) -> tuple[DeviceUse, ...]:
        """The figures of each GPU that can be read now, in the order of the devices. Never raises."""
        uses = (self._read(index, handle) for index, handle in self._handles)
        return tuple(use for use in uses if use is not None)

    def _read(self, index: int, handle: Any) -> DeviceUse | None:
        try:
            memory = _card_memory(self._nvml, handle)
        except self._nvml.NVMLError:
            return None  # the card fell off the bus
        used_bytes = memory.total_bytes - memory.free_bytes
        return DeviceUse(index, used_bytes, memory.total_bytes, self._utilisation(handle))

    def _utilisation(self, handle: Any) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        """Let NVML go; `read` has nothing to say afterwards."""
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._nvml = None
        self._handles = []


def _open_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


if __name__ == "__main__":
    _write_what_torch_sees()
