"""Sample tokens so that a record's draw depends on nothing but the seed and the record.

`torch.multinomial` draws for the whole batch from one stream, so that a neighbour would change
a record's text. Here each token gets Gumbel noise from a counter hash of (seed, record, step,
token), and the largest sum wins: an exact draw from the softmax (Gumbel 1954; Maddison et al.
2014, "A* Sampling"), the same on every device and in every batch.
"""

# B rows, V vocabulary

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glm4v_batch.job import GenerationSettings

_MASK = (1 << 63) - 1


def row_seed(seed: int, record_id: str, row: int) -> int:
    """The 63 bits that a record's noise starts from."""
    digest = hashlib.sha256(f"{seed}\0{record_id}\0{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & _MASK


def warpers(settings: GenerationSettings) -> list[LogitsProcessor]:
    """Transformers' own changes of scores before a token is drawn, in its order; the temperature is not 0."""
    changes: list[LogitsProcessor] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_k is not None:
        changes.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        changes.append(TopPLogitsWarper(settings.top_p))
    return changes


class SeededGumbel(LogitsProcessor):  # type: ignore[misc]  # Any to mypy
    """Adds to each row's scores the noise of its own stream; argmax then samples."""

    def __init__(self, row_seeds: Sequence[int], prompt_length: int) -> None:
        self._row_seeds = torch.tensor(row_seeds, dtype=torch.int64)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """*scores* [B, V] with noise for the step that *input_ids* [B, T] stands at."""
        step = input_ids.shape[1] - self._prompt_length
        self._row_seeds = self._row_seeds.to(scores.device)
        noise_BV = gumbel_noise(self._row_seeds, step, scores.shape[1])
        return scores.float() + noise_BV


def gumbel_noise(row_seeds_B: Tensor, step: int | Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, float32 [B, V], for one *step* of all rows or an int64 [B] of their own."""
    tokens_V = torch.arange(vocab_size, device=row_seeds_B.device, dtype=torch.int64)
    steps_B = torch.zeros_like(row_seeds_B) + step
    streams_B1 = _mix(row_seeds_B + steps_B * 0x632BE59BD9B4E019)[:, None]
    bits_BV = _mix(streams_B1 + tokens_V[None, :] * 0x1E3779B97F4A7C15)
    # 23 bits and a half are exact in float32 and never 0 or 1: the logarithms stay finite.
    uniform_BV = ((bits_BV >> 40) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return -torch.log(-torch.log(uniform_BV))


def _mix(x: Tensor) -> Tensor:
    # The finaliser of splitmix64 (Steele et al. 2014) with logical shifts on signed integers.
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
