"""The keys and values of all running requests: one preallocated tensor each per layer."""

# P tokens of the pool, K key-value heads, D head_dim

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys and values [P, K, D] of each layer, on the layer's device.

    The first *num_tokens* places are for requests; those behind them take what padding writes, and
    nothing that counts reads them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_tokens: int


def make_pool(
    devices: Sequence[torch.device],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_tokens: int,
    num_scratch: int,
) -> KVPool:
    """A pool for the layers that lie on *devices*, one entry per layer. Raises torch.OutOfMemoryError."""
    shape = (2, num_tokens + num_scratch, num_heads, head_dim)
    # Zeroed, because padding reads what stands in its place, if only to be thrown away.
    layers = [torch.zeros(shape, device=device, dtype=dtype) for device in devices]
    keys, values = zip(*(layer.unbind() for layer in layers), strict=True)
    return KVPool(keys, values, num_tokens)
