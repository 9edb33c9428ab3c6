"""Attention without padding: many sequences side by side on one token axis, keys and values in a pool.

Transformers' own modules call it, under two names that it is registered by. On a GPU a Triton kernel
reads the pool in place. Elsewhere, and for types that the kernel lacks, scaled dot products run sequence
by sequence, with the same results.
"""

# T packed tokens, N of them prompts, S sequences, H query heads, K key-value heads, D head_dim, P tokens
# of the pool

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

TEXT_ATTENTION = "glm4v_batch_packed"
# Transformers packs the images of a call for implementations whose name has this word in it.
VISION_ATTENTION = "glm4v_batch_flash"

_KERNEL_TYPES = (torch.bfloat16, torch.float16)
_KERNEL_WIDTHS = (16, 32, 64, 128, 256)
# Ampere: the first whose matrix units take bfloat16.
_OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Some sequences, one after another on the token axis, and where each one's keys lie in the pool.

    ends        int32 [S + 1], where each sequence begins among the tokens, and the end
    key_starts  int32 [S], where each sequence's keys begin in the pool
    key_counts  int32 [S], how many keys each sequence's last token sees, itself among them
    """

    ends: Tensor
    key_starts: Tensor
    key_counts: Tensor

    def to(self, device: torch.device) -> "Sequences":
        """The same on *device*."""
        tensors = (self.ends, self.key_starts, self.key_counts)
        ends, starts, counts = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Sequences(ends, starts, counts)


@dataclass(frozen=True, slots=True)
class Packing:
    """What attention must know of one step: first *num_prompt* tokens of prompts, then one for each row.

    writes    int64 [T], the place in the pool of each token's key and value
    pieces    the pieces of prompts
    rows      the rows that decode, of one token each
    speakers  of every row the token that its next one is chosen from: its own, or its prompt's last
    """

    writes: Tensor
    num_prompt: int
    pieces: Sequences
    rows: Sequences
    speakers: Sequences

    def to(self, device: torch.device) -> "Packing":
        """The same on *device*."""
        pieces, rows, speakers = (part.to(device) for part in (self.pieces, self.rows, self.speakers))
        return Packing(self.writes.to(device, non_blocking=True), self.num_prompt, pieces, rows, speakers)


@cache
def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel serves there: a GPU from 2020 on, values of 16 bits, a power of two, and Triton."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return False
    fits = dtype in _KERNEL_TYPES and head_dim in _KERNEL_WIDTHS
    return fits and torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY


def register() -> None:
    """Make transformers know the two implementations by their names."""
    AttentionInterface.register(TEXT_ATTENTION, _text_attention)
    AttentionInterface.register(VISION_ATTENTION, _vision_attention)


@dataclass(slots=True)
class InHand:
    """What a layer's attention works with: its keys and values [P, K, D] in the pool, and the step's packing.

    It hangs on the layer's attention module. As arguments of the layer, torch would look at every tensor
    of it at every call of a compiled layer, and compile anew for what does not matter there.
    """

    keys: Tensor
    values: Tensor
    packing: Packing


# Compiled layers stop here, and know nothing of pool and packing.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _text_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  transformers passes it, as None
    *,
    scaling: float,
    **_others: Any,
) -> tuple[Tensor, None]:
    """The packed answer [1, T, H, D] to *query* [1, H, T, D], *key* and *value* [1, K, T, D]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    in_hand: Any = module.in_hand
    return attend(q, k, v, in_hand, scaling)[None], None


def attend(query: Tensor, key: Tensor, value: Tensor, in_hand: InHand, scaling: float) -> Tensor:
    """Write *key* and *value* [T, K, D] to the pool, and attend there with *query* [T, H, D]."""
    write(key, value, in_hand)
    keys, values, packing = in_hand.keys, in_hand.values, in_hand.packing
    num_prompt = packing.num_prompt
    answer = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    is_mixed = 0 < num_prompt < len(query)
    beside = _forked(query) if is_mixed else None
    try:
        with torch.cuda.stream(beside) if beside else nullcontext():
            if num_prompt < len(query):
                _attend_rows(answer[num_prompt:], query[num_prompt:], keys, values, packing.rows, scaling)
        if num_prompt:
            of_prompts = (answer[:num_prompt], query[:num_prompt], keys, values, packing.pieces, scaling)
            _attend_pieces(*of_prompts, is_causal=True)
    finally:
        # Also where memory runs out: what CUDA records must not end with work that nobody waits for.
        if beside:
            torch.cuda.current_stream(query.device).wait_stream(beside)
    return answer


def write(key: Tensor, value: Tensor, in_hand: InHand) -> None:
    """Write *key* and *value* [T, K, D] to their places in the pool."""
    in_hand.keys.index_copy_(0, in_hand.packing.writes, key)
    in_hand.values.index_copy_(0, in_hand.packing.writes, value)


def _forked(query: Tensor) -> torch.cuda.Stream | None:
    """A stream that waits for what is under way: rows wait for memory, pieces for arithmetic."""
    if not has_kernel(query.device, query.dtype, query.shape[2]):
        return None
    stream = _stream_beside(query.device)
    stream.wait_stream(torch.cuda.current_stream(query.device))
    return stream


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _attend_pieces(
    answer: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    scaling: float,
    *,
    is_causal: bool,
) -> None:
    """Attention of each sequence's queries to its own stretch of *keys*; causal from the last one back."""
    if has_kernel(query.device, query.dtype, query.shape[2]):
        from glm4v_batch.engines.attention_kernel import attend_pieces

        attend_pieces(answer, query, keys, values, sequences, scaling, is_causal=is_causal)
    else:
        _attend_each(answer, query, keys, values, sequences, scaling, is_causal=is_causal)


def _attend_rows(
    answer: Tensor, query: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, scaling: float
) -> None:
    if has_kernel(query.device, query.dtype, query.shape[2]):
        from glm4v_batch.engines.attention_kernel import attend_rows

        attend_rows(answer, query, keys, values, sequences, scaling)
    else:
        _attend_each(answer, query, keys, values, sequences, scaling, is_causal=False)


def _attend_each(
    answer: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    scaling: float,
    *,
    is_causal: bool,
) -> None:
    starts, counts = sequences.key_starts.tolist(), sequences.key_counts.tolist()
    for place, (begin, end) in enumerate(pairwise(sequences.ends.tolist())):
        if begin < end:
            seen = slice(starts[place], starts[place] + counts[place])
            answer[begin:end] = _one(query[begin:end], keys[seen], values[seen], scaling, is_causal=is_causal)


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
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  transformers passes it, as None
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_others: Any,
) -> tuple[Tensor, None]:
    """The packed answer [1, T, H, D] of every image's patches to each other; all inputs [1, H, T, D]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _attend_images(q, k, v, cu_seq_lens_q, scaling)[None], None


# An operator of torch's, so that a block of the vision tower compiles in one piece around it.
@torch.library.custom_op("glm4v_batch::attend_images", mutates_args=())
def _attend_images(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scaling: float) -> Tensor:
    images = Sequences(ends, ends[:-1], ends.diff())
    answer = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _attend_pieces(answer, query, key, value, images, scaling, is_causal=False)
    return answer


@_attend_images.register_fake
def _(query: Tensor, _key: Tensor, _value: Tensor, _ends: Tensor, _scaling: float) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
