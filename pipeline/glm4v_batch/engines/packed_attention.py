"""Attention without padding: many sequences side by side on one token axis, keys and values in a pool.

Transformers' own modules call it, under two names that it is registered by. On a GPU flash attention
reads the pool in place, through the aten operator that also serves torch's own varlen attention: keys
begin where they are told to and are as long as they are told. Elsewhere, and for types that flash
attention lacks, scaled dot products run sequence by sequence, with the same results.
"""

# T packed tokens, N of them prompts, S prompt pieces, R rows that decode, H query heads, K key-value
# heads, G query heads of one key-value head, D head_dim, P tokens of the pool

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

TEXT_ATTENTION = "glm4v_batch_packed"
# Transformers packs the images of a call for implementations whose name has this word in it.
VISION_ATTENTION = "glm4v_batch_flash"

_FLASH_TYPES = (torch.bfloat16, torch.float16)


class Packing(NamedTuple):
    """Where the tokens of one step lie: first N of prompt pieces, then one for each of R rows.

    writes      int64 [T], the place in the pool of each token's key and value
    piece_ends  int32 [S + 1], where each piece begins among the N tokens, and the end
    piece_keys  int32 [S + 1], where each piece's keys begin in the pool; the last entry is not used
    piece_sizes int32 [S], how many keys each piece's last token sees, itself among them
    row_ends    int32 [R + 1], multiples of G: in attention a row's query heads stand in for tokens
    row_keys    int32 [R + 1], as *piece_keys*
    row_sizes   int32 [R], as *piece_sizes*
    bounds      int64 [3] on the CPU: N, the longest piece, the most keys that any token sees
    """

    writes: Tensor
    piece_ends: Tensor
    piece_keys: Tensor
    piece_sizes: Tensor
    row_ends: Tensor
    row_keys: Tensor
    row_sizes: Tensor
    bounds: Tensor

    def to(self, device: torch.device) -> "Packing":
        """This packing with all but *bounds* on *device*."""
        moved = (tensor.to(device, non_blocking=True) for tensor in self[:-1])
        return Packing(*moved, self.bounds)


def register() -> None:
    """Make transformers know the two implementations by their names."""
    AttentionInterface.register(TEXT_ATTENTION, _text_attention)
    AttentionInterface.register(VISION_ATTENTION, _vision_attention)


def _text_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    keys: Tensor,
    values: Tensor,
    packing: Packing,
    **_others: Any,
) -> tuple[Tensor, None]:
    """The packed answer [1, T, H, D] to *query* [1, H, T, D], *key* and *value* [1, K, T, D]."""
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(*packed, keys, values, *packing, scaling)[None], None


@torch.library.custom_op("glm4v_batch::attend", mutates_args=("keys", "values"))
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    writes: Tensor,
    piece_ends: Tensor,
    piece_keys: Tensor,
    piece_sizes: Tensor,
    row_ends: Tensor,
    row_keys: Tensor,
    row_sizes: Tensor,
    bounds: Tensor,
    scaling: float,
) -> Tensor:
    """Write *key* and *value* [T, K, D] to the pool [P, K, D], and attend there with *query* [T, H, D].

    A custom operator, so that compiled layers keep it whole. The other arguments are those of `Packing`.
    """
    keys.index_copy_(0, writes, key)
    values.index_copy_(0, writes, value)
    num_prompt, longest, most_keys = bounds.tolist()
    answer = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_prompt:
        pieces = (piece_ends, piece_keys, piece_sizes)
        answer[:num_prompt] = _varlen(
            query[:num_prompt], keys, values, *pieces, longest, most_keys, scaling, is_causal=True
        )
    if num_prompt < len(query):
        grouped = _heads_to_tokens(query[num_prompt:], keys.shape[1])
        group = query.shape[1] // keys.shape[1]
        rows = _varlen(
            grouped, keys, values, row_ends, row_keys, row_sizes, group, most_keys, scaling, is_causal=False
        )
        answer[num_prompt:] = _tokens_to_heads(rows, group)
    return answer


@attend.register_fake
def _(query: Tensor, *_others: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


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
    ends: Tensor,
    key_starts: Tensor,
    key_sizes: Tensor,
    longest: int,
    most_keys: int,
    scaling: float,
    *,
    is_causal: bool,
) -> Tensor:
    """Attention of each sequence's queries to its own stretch of *keys*; causal from the last one back."""
    if query.is_cuda and query.dtype in _FLASH_TYPES:
        return _flash(
            query, keys, values, ends, key_starts, longest, most_keys, scaling, is_causal, key_sizes
        )
    answer = torch.empty_like(query)
    starts, sizes = key_starts.tolist(), key_sizes.tolist()
    for place, (begin, end) in enumerate(pairwise(ends.tolist())):
        if begin < end:
            seen = slice(starts[place], starts[place] + sizes[place])
            answer[begin:end] = _one(query[begin:end], keys[seen], values[seen], scaling, is_causal=is_causal)
    return answer


def _flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    most_keys: int,
    scaling: float,
    is_causal: bool,
    key_sizes: Tensor | None = None,
) -> Tensor:
    # torch.nn.attention.varlen calls the same operator, but lacks grouped queries before torch 2.12.
    answer: Tensor = torch.ops.aten._flash_attention_forward(
        query, keys, values, ends, key_ends, longest, most_keys, 0.0, is_causal, False,
        scale=scaling, seqused_k=key_sizes,
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


def _vision_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_others: Any,
) -> tuple[Tensor, None]:
    """The packed answer [1, T, H, D] of every image's patches to each other; all inputs [1, H, T, D]."""
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend_images(*packed, cu_seq_lens_q, max_length_q, scaling)[None], None


@torch.library.custom_op("glm4v_batch::attend_images", mutates_args=())
def attend_images(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float
) -> Tensor:
    """Attention within each image; *query*, *key*, *value* are [T, H, D], *ends* int32 [images + 1]."""
    if query.is_cuda and query.dtype in _FLASH_TYPES:
        return _flash(query, key, value, ends, ends, longest, longest, scaling, is_causal=False)
    spans = pairwise(ends.tolist())
    parts = [_one(query[a:b], key[a:b], value[a:b], scaling, is_causal=False) for a, b in spans]
    return torch.cat(parts).contiguous()


@attend_images.register_fake
def _(query: Tensor, *_others: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
