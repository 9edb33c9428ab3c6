"""The keys and values of all running requests: one preallocated tensor each per layer."""

# P tokens of the pool, K key-value heads, D head_dim

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys and values [P, K, D] of each layer, on the layer's device.

    The first *num_tokens* places are for requests; the *num_scratch* behind them take what padding
    writes, and are read by nothing that counts.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_tokens: int
    num_scratch: int


def make_pool(
    text_config: Any, devices: Sequence[torch.device], dtype: torch.dtype, num_tokens: int, num_scratch: int
) -> KVPool:
    """A pool for the layers that lie on *devices*, one entry per layer. Raises torch.OutOfMemoryError."""
    shape = (num_tokens + num_scratch, text_config.num_key_value_heads, head_dim_of(text_config))
    # Zeroed, because what scratch holds is read, if only to be thrown away.
    tensors = [torch.zeros(2, *shape, device=device, dtype=dtype) for device in devices]
    keys, values = (tuple(tensor[place] for tensor in tensors) for place in range(2))
    return KVPool(keys, values, num_tokens, num_scratch)


def head_dim_of(text_config: Any) -> int:
    """The width of one attention head, which a config may leave to its other sizes."""
    explicit: int | None = getattr(text_config, "head_dim", None)
    return explicit or text_config.hidden_size // text_config.num_attention_heads


def token_bytes(text_config: Any, layers_per_device: Mapping[torch.device, int], dtype: torch.dtype) -> dict[torch.device, int]:
    """What one token of the pool takes on each device."""
    width = 2 * text_config.num_key_value_heads * head_dim_of(text_config) * dtype.itemsize
    return {device: num_layers * width for device, num_layers in layers_per_device.items()}
