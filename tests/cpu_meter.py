"""A meter for CI: counts the live tensor bytes of the CPU and runs out of memory above a cap.

A dispatch mode sees every operation's results. A storage counts from the operation that first
returned it until Python frees it, so what is measured is what torch really keeps alive, and the
real measure, fit, batch and split code runs without a GPU.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CpuMeter:
    """A `Meter` of one device that holds *weight_bytes* and at most *cap_bytes*."""

    def __init__(self, weight_bytes: int, cap_bytes: int) -> None:
        self._weight_bytes = weight_bytes
        self.cap_bytes = cap_bytes
        self._peak_bytes = weight_bytes

    def limit_bytes(self) -> tuple[int, ...]:
        return (self.cap_bytes,)

    def held_bytes(self) -> tuple[int, ...]:
        return (self._weight_bytes,)

    @contextmanager
    def watch(self) -> Iterator[None]:
        counter = _LiveBytes(self.cap_bytes - self._weight_bytes)
        try:
            with counter:
                yield
        finally:
            self._peak_bytes = self._weight_bytes + counter.peak_bytes

    def peak_bytes(self) -> tuple[int, ...]:
        return (self._peak_bytes,)

    def reserved_bytes(self) -> tuple[int, ...]:
        return self.peak_bytes()

    def free(self) -> None:
        """Nothing is cached."""

    def trim(self, budget_bytes: Sequence[int]) -> None:
        """Nothing is cached."""


class CrowdedMeter(CpuMeter):
    """A `Meter` of a device with *first_bytes* at the first look, of which others then leave *cap_bytes*."""

    def __init__(self, weight_bytes: int, cap_bytes: int, *, first_bytes: int) -> None:
        super().__init__(weight_bytes, cap_bytes)
        self._told_bytes = first_bytes

    def limit_bytes(self) -> tuple[int, ...]:
        limit, self._told_bytes = self._told_bytes, self.cap_bytes
        return (limit,)


class EndlessMeter(CpuMeter):
    """A `Meter` of a device without end, where nothing is counted: that makes a model seven times as slow."""

    def __init__(self, weight_bytes: int) -> None:
        super().__init__(weight_bytes, 1 << 40)

    @contextmanager
    def watch(self) -> Iterator[None]:
        yield


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    def __init__(self, room_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._room_bytes = room_bytes
        self._live_bytes = 0
        self._seen: set[int] = set()
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in inputs:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage.data_ptr(), storage.nbytes()
        if not num_bytes or key in self._seen:
            return
        self._seen.add(key)
        self._live_bytes += num_bytes
        weakref.finalize(storage, self._forget, key, num_bytes)
        if self._live_bytes > self._room_bytes:
            raise torch.OutOfMemoryError(f"CPU meter: {self._live_bytes} bytes exceed {self._room_bytes}")
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self._live_bytes -= num_bytes


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
