"""Attention of many sequences at once as a Triton kernel: keys and values stay where they lie in the pool.

The loop over keys is that of Dao 2023, "FlashAttention-2". Compiled for the GPU at hand, it reaches more of
a recent one's arithmetic than the flash attention that torch ships, and it writes where it is told to.
"""

# T packed tokens, S sequences, H query heads, K key-value heads, D head_dim, P tokens of the pool

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm4v_batch.engines.packed_attention import Sequences

_LOG2_E = 1.4426950408889634
# The matrix units take no fewer rows.
_FEWEST_ROWS = 16
_MOST_STAGES = 3
# Each number of slots is a kernel of its own.
_FEWEST_SLOTS = 32


def attend_pieces(
    answer: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    scaling: float,
    *,
    is_causal: bool,
) -> None:
    """Write to *answer* [T, H, D] what *query* [T, H, D] finds in *keys* and *values* [P, K, D].

    Nothing is read of the pool beyond each sequence's own keys. A query that sees no key finds zeros.
    """
    num_tokens, num_heads = query.shape[:2]
    shape = _Shape(rows=64, keys=64, is_causal=is_causal, are_heads_rows=False)
    # Each sequence may end within a block.
    most_blocks = triton.cdiv(num_tokens, shape.rows) + len(sequences.key_counts)
    _launch((most_blocks, num_heads), answer, query, keys, values, sequences, scaling, shape)


def attend_rows(
    answer: Tensor, query: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, scaling: float
) -> None:
    """As `attend_pieces`, for sequences of one query each: heads that share keys read them once, together."""
    num_key_heads = keys.shape[1]
    rows = max(_FEWEST_ROWS, triton.next_power_of_2(query.shape[1] // num_key_heads))
    shape = _Shape(rows=rows, keys=64, is_causal=False, are_heads_rows=True)
    grid = (len(sequences.key_counts), num_key_heads)
    _launch(grid, answer, query, keys, values, sequences, scaling, shape)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The block of queries and of keys that one program has in hand at a time."""

    rows: int
    keys: int
    is_causal: bool
    are_heads_rows: bool


def _launch(
    grid: tuple[int, int],
    answer: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    scaling: float,
    shape: _Shape,
) -> None:
    width, num_sequences = query.shape[2], len(sequences.key_counts)
    # Triton launches on the device that is current, which is the first where a model lies on several.
    with torch.cuda.device_of(query):
        _attend[grid](
            query, keys, values, answer,
            sequences.ends, sequences.key_starts, sequences.key_counts, num_sequences, scaling * _LOG2_E,
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *answer.stride()[:2],
            GROUP=query.shape[1] // keys.shape[1], WIDTH=width, ROWS=shape.rows, KEYS=shape.keys,
            IS_CAUSAL=shape.is_causal, ARE_HEADS_ROWS=shape.are_heads_rows,
            SLOTS=_num_slots(num_sequences, shape),
            num_warps=4, num_stages=_num_stages(query.device, width, shape.rows, shape.keys),
        )  # fmt: skip


def _num_slots(num_sequences: int, shape: _Shape) -> int:
    # Where heads are the rows nothing looks for a sequence.
    return (
        _FEWEST_SLOTS if shape.are_heads_rows else max(_FEWEST_SLOTS, triton.next_power_of_2(num_sequences))
    )


@cache
def _num_stages(device: torch.device, width: int, rows: int, keys: int) -> int:
    """How many blocks of keys and values are under way at once: what the device's shared memory holds."""
    properties: Any = torch.cuda.get_device_properties(device)
    room = int(properties.shared_memory_per_block_optin)
    value_bytes = 2
    block_bytes = 2 * keys * width * value_bytes
    return max(1, min(_MOST_STAGES, (room - rows * width * value_bytes) // block_bytes))


@triton.jit(do_not_specialize=["num_sequences"])
def _attend(
    query, keys, values, answer, ends, key_starts, key_counts, num_sequences, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, answer_token, answer_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, ARE_HEADS_ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    if ARE_HEADS_ROWS:
        block, sequence = 0, tl.program_id(0)
    else:
        block, sequence = _find(tl.program_id(0), ends, num_sequences, ROWS, SLOTS)
    if sequence >= num_sequences:
        return
    first = tl.load(ends + sequence)
    size = tl.load(ends + sequence + 1) - first
    count = tl.load(key_counts + sequence)
    row = block * ROWS + tl.arange(0, ROWS)
    if ARE_HEADS_ROWS:
        key_head_place = head
        is_row = (row < GROUP) & (size > 0)
        token = tl.zeros([ROWS], tl.int64) + first
        row_head = head * GROUP + row
    else:
        key_head_place = head // GROUP
        is_row = row < size
        token = (first + row).to(tl.int64)
        row_head = tl.zeros([ROWS], tl.int32) + head
    if block * ROWS < size:
        lane = tl.arange(0, WIDTH)
        start = tl.load(key_starts + sequence).to(tl.int64)
        keys += start * key_token + key_head_place * key_head
        values += start * value_token + key_head_place * value_head
        at_query = token * query_token + row_head * query_head
        q = tl.load(query + at_query[:, None] + lane[None, :], mask=is_row[:, None], other=0.0)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        found = tl.zeros([ROWS, WIDTH], tl.float32)
        # A query sees its own token's key and those before; the last query's is the last key.
        last_key = tl.zeros([ROWS], tl.int32) + count - 1
        if IS_CAUSAL:
            last_key = count - size + row
        seen = tl.minimum(count, tl.max(last_key) + 1)
        seen_by_all = tl.maximum(0, tl.minimum(count, tl.min(last_key) + 1)) // KEYS * KEYS
        found, total, highest = _look(
            q, found, total, highest, keys, values, key_token, value_token,
            0, seen_by_all, last_key, count, scale, lane, KEYS, False,
        )  # fmt: skip
        found, total, highest = _look(
            q, found, total, highest, keys, values, key_token, value_token,
            seen_by_all, seen, last_key, count, scale, lane, KEYS, True,
        )  # fmt: skip
        found = found / tl.where(total > 0, total, 1.0)[:, None]
        at_answer = token * answer_token + row_head * answer_head
        to = answer + at_answer[:, None] + lane[None, :]
        tl.store(to, found.to(answer.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _find(place, ends, num_sequences, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The block *place* of all sequences' blocks: which one of its sequence, and of which sequence."""
    slot = tl.arange(0, SLOTS)
    is_slot = slot < num_sequences
    sizes = tl.load(ends + slot + 1, mask=is_slot, other=0) - tl.load(ends + slot, mask=is_slot, other=0)
    upto = tl.cumsum((sizes + ROWS - 1) // ROWS, 0)
    is_before = (upto <= place) & is_slot
    before = tl.max(tl.where(is_before, upto, 0), 0)
    return place - before, tl.sum(is_before.to(tl.int32), 0)


@triton.jit
def _look(
    q, found, total, highest, keys, values, key_token, value_token,
    begin, end, last_key, count, scale, lane, KEYS: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys from *begin* to *end* into *found*, a sum of values whose weights' sum is *total*."""
    for at in tl.range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        place = key.to(tl.int64)
        at_keys = keys + place[None, :] * key_token + lane[:, None]
        at_values = values + place[:, None] * value_token + lane[None, :]
        if IS_MASKED:
            k = tl.load(at_keys, mask=key[None, :] < count, other=0.0)
            v = tl.load(at_values, mask=key[:, None] < count, other=0.0)
        else:
            k = tl.load(at_keys)
            v = tl.load(at_values)
        score = tl.dot(q, k)
        if IS_MASKED:
            is_seen = (key[None, :] <= last_key[:, None]) & (key[None, :] < count)
            # Not -inf, whose difference from itself is no number where a row sees nothing yet.
            score = tl.where(is_seen, score, -1.0e30)
        # Scaled only here: a product and a difference of each score are one instruction.
        new = tl.maximum(highest, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - new[:, None])
        if IS_MASKED:
            weight = tl.where(is_seen, weight, 0.0)
        fade = tl.exp2(highest - new)
        total = total * fade + tl.sum(weight, 1)
        found = tl.dot(weight.to(v.dtype), v, found * fade[:, None])
        highest = new
    return found, total, highest
