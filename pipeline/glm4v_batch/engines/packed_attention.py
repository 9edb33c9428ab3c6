"""Attention without padding: many sequences side by side on one token axis, keys and values in a pool.

Transformers' own modules call it, under two names that it is registered by. On a GPU flash attention
reads the pool in place, through the aten operator that also serves torch's own varlen attention: keys
begin where they are told to and are as long as they are told. Elsewhere, and for types that flash
attention lacks, scaled dot products run sequence by sequence, with the same results.
"""

# T packed tokens, N of them prompts, S prompt pieces, R rows that decode, H query heads, K key-value
# heads, G query heads of one key-value head, D head_dim, P tokens of the pool

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

TEXT_ATTENTION = "glm4v_batch_packed"
# Transformers packs the images of a call for implementations whose name has this word in it.
VISION_ATTENTION = "glm4v_batch_flash"

_FLASH_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Some sequences, one after another on the token axis, and where each one's keys lie in the pool.

    ends        int32 [S + 1], where each sequence begins among the tokens, and the end
    key_starts  int32 [S + 1], where each sequence's keys begin in the pool; the last entry is not used
    key_counts  int32 [S], how many keys each sequence's last token sees, itself among them
    longest     the most tokens that any of them has
    """

    ends: Tensor
    key_starts: Tensor
    key_counts: Tensor
    longest: int

    def to(self, device: torch.device) -> "Sequences":
        """The same on *device*."""
        tensors = (self.ends, self.key_starts, self.key_counts)
        ends, starts, counts = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Sequences(ends, starts, counts, self.longest)


@dataclass(frozen=True, slots=True)
class Packing:
    """What attention must know of one step: first *num_prompt* tokens of prompts, then one for each row.

    writes     int64 [T], the place in the pool of each token's key and value
    pieces     the pieces of prompts
    rows       the rows that decode; each one's query heads stand in for tokens, G of them
    most_keys  no token sees more
    """

    writes: Tensor
    num_prompt: int
    pieces: Sequences
    rows: Sequences
    most_keys: int

    def to(self, device: torch.device) -> "Packing":
        """The same on *device*."""
        writes = self.writes.to(device, non_blocking=True)
        return replace(self, writes=writes, pieces=self.pieces.to(device), rows=self.rows.to(device))


def register() -> None:
    """Make transformers know the two implementations by their names."""
    AttentionInterface.register(TEXT_ATTENTION, _text_attention)
    AttentionInterface.register(VISION_ATTENTION, _vision_attention)


# Compiled layers stop here, and know nothing of pool and packing.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _text_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  transformers passes it, as None
    *,
    scaling: float,
    keys: Tensor,
    values: Tensor,
    packing: Packing,
    **_others: Any,
) -> tuple[Tensor, None]:
    """The packed answer [1, T, H, D] to *query* [1, H, T, D], *key* and *value* [1, K, T, D]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(q, k, v, keys, values, packing, scaling)[None], None


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, packing: Packing, scaling: float
) -> Tensor:
    """Write *key* and *value* [T, K, D] to the pool [P, K, D], and attend there with *query* [T, H, D]."""
    keys.index_copy_(0, packing.writes, key)
    values.index_copy_(0, packing.writes, value)
    num_prompt = packing.num_prompt
    answer = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_prompt:
        answer[:num_prompt] = _varlen(
            query[:num_prompt], keys, values, packing.pieces, packing.most_keys, scaling, is_causal=True
        )
    if num_prompt < len(query):
        grouped = _heads_to_tokens(query[num_prompt:], keys.shape[1])
        rows = _varlen(grouped, keys, values, packing.rows, packing.most_keys, scaling, is_causal=False)
        answer[num_prompt:] = _tokens_to_heads(rows, query.shape[1] // keys.shape[1])
    return answer


def _heads_to_tokens(query_RHD: Tensor, num_key_heads: int) -> Tensor:
    """[R·G, K, D]: query heads that share a key head as tokens of it, so that its keys are read once."""
    rows, heads, width = query_RHD.shape
    grouped = query_RHD.reshape(rows, num_key_heads, heads // num_key_heads, width)
    return grouped.transpose(1, 2).reshape(-1, num_key_heads, width)


def _tokens_to_heads(answer: Tensor, group: int) -> Tensor:
    num_key_heads, width = answer.shape[1:]
    rows = answer.view(-1, group, num_key_heads, width)
    return rows.transpose(1, 2).reshape(len(rows), -1, width)


def _varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    most_keys: int,
    scaling: float,
    *,
    is_causal: bool,
) -> Tensor:
    """Attention of each sequence's queries to its own stretch of *keys*; causal from the last one back."""
    if query.is_cuda and query.dtype in _FLASH_TYPES:
        return _flash(query, keys, values, sequences, most_keys, scaling, is_causal=is_causal)
    answer = torch.empty_like(query)
    starts, counts = sequences.key_starts.tolist(), sequences.key_counts.tolist()
    for place, (begin, end) in enumerate(pairwise(sequences.ends.tolist())):
        if begin < end:
            seen = slice(starts[place], starts[place] + counts[place])
            answer[begin:end] = _one(query[begin:end], keys[seen], values[seen], scaling, is_causal=is_causal)
    return answer


def _flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    most_keys: int,
    scaling: float,
    *,
    is_causal: bool,
) -> Tensor:
    # torch.nn.attention.varlen calls the same operator, but lacks grouped queries before torch 2.12.
    flash = torch.ops.aten._flash_attention_forward  # noqa: SLF001  the operator's own name
    answer: Tensor = flash(
        query, keys, values, sequences.ends, sequences.key_starts, sequences.longest, most_keys,
        0.0, is_causal, False, scale=scaling, seqused_k=sequences.key_counts,
    )[0]  # fmt: skip
    return answer


def _one(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, is_causal: bool) -> Tensor:
    """Attention of one sequence: *query* [q, H, D], *key* and *value* [k, K, D]."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    hidden = len(key) - len(query)
    mask = None
    if is_causal and len(query) > 1:
        mask = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(hidden)
    is_grouped = query.shape[1] != key.shape[1]
    answer = scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=is_grouped)
    return answer[0].transpose(0, 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _vision_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  transformers passes it, as None
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_others: Any,
) -> tuple[Tensor, None]:
    """The packed answer [1, T, H, D] of every image's patches to each other; all inputs [1, H, T, D]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends = cu_seq_lens_q
    images = Sequences(ends, ends, ends.diff(), max_length_q)
    return _varlen(q, k, v, images, max_length_q, scaling, is_causal=False)[None], None
