"""Measure what this process takes on a device: the allocator's peak on a GPU, the resident set on a CPU."""

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from glm4v_batch.devices import host_memory
from glm4v_batch.types import Device


class CudaMeter:
    """Measures GPUs through torch's allocator, and through the driver what others hold there."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices = tuple(indices)

    def limit_bytes(self) -> tuple[int, ...]:
        """What the allocator already holds and what the device still has free."""
        return tuple(map(self._limit, self._indices))

    def _limit(self, index: int) -> int:
        import torch

        free, total = torch.cuda.mem_get_info(index)
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        return min(free + torch.cuda.memory_reserved(index), allowed)

    def held_bytes(self) -> tuple[int, ...]:
        """What live tensors hold."""
        import torch

        return tuple(torch.cuda.memory_allocated(i) for i in self._indices)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Start the allocator's peak counters anew."""
        import torch

        for index in self._indices:
            torch.cuda.reset_peak_memory_stats(index)
        yield

    def peak_bytes(self) -> tuple[int, ...]:
        """The most that live tensors held since `watch` began."""
        import torch

        return tuple(torch.cuda.max_memory_allocated(i) for i in self._indices)

    def reserved_bytes(self) -> tuple[int, ...]:
        """The most that the allocator had from the driver since `watch` began."""
        import torch

        return tuple(torch.cuda.max_memory_reserved(i) for i in self._indices)

    def free(self) -> None:
        """Return unused blocks of the allocator to the device."""
        import torch

        torch.cuda.empty_cache()

    def trim(self, budget_bytes: Sequence[int]) -> None:
        """Return unused blocks where the allocator holds more than *budget_bytes*."""
        import torch

        held = map(torch.cuda.memory_reserved, self._indices)
        if any(reserved > budget for reserved, budget in zip(held, budget_bytes, strict=True)):
            self.free()


class HostMeter:
    """Measures this process's resident memory; on Linux its peak can be started anew."""

    def limit_bytes(self) -> tuple[int, ...]:
        """What the process holds and what the host, or its container, still has free."""
        return (host_memory().free_bytes + self.held_bytes()[0],)

    def held_bytes(self) -> tuple[int, ...]:
        """The resident set."""
        import psutil

        return (psutil.Process().memory_info().rss,)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Start the kernel's high-water mark anew, where it allows that."""
        with suppress(OSError):
            # proc(5): writing 5 resets VmHWM to the current resident set.
            Path("/proc/self/clear_refs").write_text("5")
        yield

    def peak_bytes(self) -> tuple[int, ...]:
        """The high-water mark of the resident set."""
        return (_high_water_bytes(),)

    def reserved_bytes(self) -> tuple[int, ...]:
        """What it has peaked at: the kernel knows no difference."""
        return self.peak_bytes()

    def free(self) -> None:
        """Nothing to give back: the C library decides."""

    def trim(self, budget_bytes: Sequence[int]) -> None:
        """As `free`."""


def _high_water_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def meter_for(devices: Sequence[Device]) -> CudaMeter | HostMeter:
    """What measures a replica's *devices*, in a process that sees no other GPU than these."""
    if any(device.index is None for device in devices):
        return HostMeter()
    return CudaMeter(range(len(devices)))
