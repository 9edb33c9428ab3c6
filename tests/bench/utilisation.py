"""How often NVML sees a kernel on the first cards, read beside a run, without a CUDA context of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Looks at the cards: when, and the part of the time before it in which a kernel ran, over all cards."""

    looks: list[tuple[float, float]] = field(default_factory=list)

    def idle_fraction(self, start: float, stop: float) -> float | None:
        """The part of the time between *start* and *stop* without a kernel; None where nobody looked."""
        busy = [fraction for moment, fraction in self.looks if start <= moment <= stop]
        return 1 - sum(busy) / len(busy) if busy else None


@contextmanager
def watching(num_devices: int) -> Iterator[Utilisation]:
    """Look at the first *num_devices* cards as long as the context lasts."""
    found, is_over = Utilisation(), threading.Event()
    if not num_devices:
        yield found
        return
    thread = threading.Thread(target=_look, args=(num_devices, found, is_over), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def _look(num_devices: int, found: Utilisation, is_over: threading.Event) -> None:
    import pynvml

    pynvml.nvmlInit()
    handles: list[Any] = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(num_devices)]
    while not is_over.wait(_LOOK_SECONDS):
        busy = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in handles]
        found.looks.append((time.time(), sum(busy) / num_devices))
    pynvml.nvmlShutdown()
