"""Attention of many sequences at once as a Triton kernel: keys and values stay where they lie in the pool.

The loop over keys is that of Dao 2023, "FlashAttention-2". Compiled for the GPU at hand, it reaches more of
a recent one's arithmetic than the flash attention that torch ships, and it writes where it is told to.
"""

# T packed tokens, S sequences, H query heads, K key-value heads, D head_dim, P tokens of the pool

import logging
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm4v_batch.engines.generate import ran_out_of_memory
from glm4v_batch.engines.packed_attention import Sequences

_log = logging.getLogger(__name__)
_LOG2_E = 1.4426950408889634
# The matrix units take no fewer rows.
_FEWEST_ROWS = 16
_MOST_STAGES = 3
# What one program has in hand at a time: of pieces so many queries, and so many keys.
_PIECE_ROWS = _BLOCK_KEYS = 64
# The compute capability whose instructions the faster kernel for images is made of.
_HOPPER = (9, 0)
# Some four on each multiprocessor of a large GPU.
_ENOUGH_PROGRAMS = 512
# A power of two.
_MOST_SPLITS = 16
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

    Nothing of the pool beyond each sequence's own keys counts, whatever it is. A query that sees no key finds
    zeros; where nothing is causal each sequence has a key.
    """
    num_tokens, num_heads, width = query.shape
    num_sequences = len(sequences.key_counts)
    hopper = None if is_causal else _hopper_kernel(query.device, query.dtype, width)
    if hopper and hopper.serves(query, keys, values):
        hopper.attend_images(answer, query, keys, values, sequences, scaling)
        return
    # Each sequence may end within a block.
    most_blocks = triton.cdiv(num_tokens, _PIECE_ROWS) + num_sequences
    # Triton launches on the device that is current, which is the first where a model lies on several.
    with torch.cuda.device_of(query):
        _attend[most_blocks, num_heads](
            query, keys, values, answer,
            sequences.ends, sequences.key_starts, sequences.key_counts, num_sequences, scaling * _LOG2_E,
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *answer.stride()[:2],
            GROUP=num_heads // keys.shape[1], WIDTH=width, ROWS=_PIECE_ROWS, KEYS=_BLOCK_KEYS,
            IS_CAUSAL=is_causal, SLOTS=max(_FEWEST_SLOTS, triton.next_power_of_2(num_sequences)),
            num_warps=4, num_stages=_num_stages(query.device, width, _PIECE_ROWS), enable_fp_fusion=True,
        )  # fmt: skip


@cache
def _hopper_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Any:
    """The kernel for images on Hopper, a module; None on other GPUs, and where Triton does not compile it."""
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return None
    some = torch.zeros(128, 1, width, dtype=dtype, device=device)
    ends = torch.tensor([0, len(some)], dtype=torch.int32, device=device)
    try:
        from glm4v_batch.engines import hopper_attention

        if hopper_attention.serves(some, some, some):
            one = Sequences(ends, ends[:-1], ends.diff())
            hopper_attention.attend_images(some, some, some, some, one, 1.0)
            torch.cuda.synchronize(device)
    # Gluon is Triton's experiment: any release may change it, and fail in ways of its own.
    except Exception as error:
        if isinstance(error, RuntimeError) and ran_out_of_memory(error):
            raise
        _log.warning(
            "Images attend by a slower kernel: Triton %s refuses ours. %s", triton.__version__, error
        )
        return None
    return hopper_attention


def attend_rows(
    answer: Tensor, query: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, scaling: float
) -> None:
    """As `attend_pieces`, for sequences of one query each: heads that share keys read them once, together.

    Few rows would leave most of the GPU idle: several programs share a row's keys then, and what they
    found is joined (Dao et al. 2023, "Flash-Decoding").
    """
    num_rows, num_heads, width = query.shape
    num_key_heads = keys.shape[1]
    group = num_heads // num_key_heads
    rows = max(_FEWEST_ROWS, triton.next_power_of_2(group))
    num_splits = _num_splits(num_rows * num_key_heads)
    # Of one program alone nothing is joined.
    size = num_rows * num_heads * num_splits if num_splits > 1 else 0
    founds = torch.empty(size * width, dtype=torch.float32, device=query.device)
    sums = torch.empty(size * 2, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _attend_rows[num_rows, num_key_heads, num_splits](
            query, keys, values, answer, founds, sums,
            sequences.key_starts, sequences.key_counts, scaling * _LOG2_E,
            *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], *answer.stride()[:2],
            GROUP=group, WIDTH=width, ROWS=rows, KEYS=_BLOCK_KEYS, IS_SHARED=num_splits > 1,
            num_warps=4, num_stages=_num_stages(query.device, width, rows), enable_fp_fusion=True,
        )  # fmt: skip
        if num_splits > 1:
            _join[num_rows, num_heads](
                founds, sums, answer, num_splits, *answer.stride()[:2],
                WIDTH=width, MOST_SPLITS=_MOST_SPLITS, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip


def _num_splits(num_programs: int) -> int:
    """Among how many programs the keys of each of *num_programs* are shared."""
    return max(1, min(_MOST_SPLITS, _ENOUGH_PROGRAMS // num_programs))


@cache
def _num_stages(device: torch.device, width: int, rows: int) -> int:
    """How many blocks of keys and values are under way at once: what the device's shared memory holds."""
    properties: Any = torch.cuda.get_device_properties(device)
    room = int(properties.shared_memory_per_block_optin)
    value_bytes = 2
    block_bytes = 2 * _BLOCK_KEYS * width * value_bytes
    return max(1, min(_MOST_STAGES, (room - rows * width * value_bytes) // block_bytes))


@triton.jit(do_not_specialize=["num_sequences"])
def _attend(
    query, keys, values, answer, ends, key_starts, key_counts, num_sequences, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, answer_token, answer_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    block, sequence = _find(tl.program_id(0), ends, num_sequences, ROWS, SLOTS)
    if sequence >= num_sequences:
        return
    first = tl.load(ends + sequence)
    size = tl.load(ends + sequence + 1) - first
    count = tl.load(key_counts + sequence)
    row = block * ROWS + tl.arange(0, ROWS)
    is_row = row < size
    token = (first + row).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    start = tl.load(key_starts + sequence).to(tl.int64)
    keys += start * key_token + head // GROUP * key_head
    values += start * value_token + head // GROUP * value_head
    at_query = token * query_token + head * query_head
    q = tl.load(query + at_query[:, None] + lane[None, :], mask=is_row[:, None], other=0.0)
    # A query sees its own token's key and those before; the last query's is the last key.
    last_key = tl.zeros([ROWS], tl.int32) + count - 1
    if IS_CAUSAL:
        last_key = count - size + row
    seen = tl.minimum(count, tl.max(last_key) + 1)
    seen_by_all = tl.maximum(0, tl.minimum(count, tl.min(last_key) + 1)) // KEYS * KEYS
    found, total, _ = _look_from_to(
        q, keys, values, key_token, value_token, 0, seen_by_all, seen, last_key, count, scale,
        lane, WIDTH, ROWS, KEYS,
    )  # fmt: skip
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    to = answer + (token * answer_token + head * answer_head)[:, None] + lane[None, :]
    tl.store(to, found.to(answer.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _attend_rows(
    query, keys, values, answer, founds, sums, key_starts, key_counts, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, answer_token, answer_head,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    IS_SHARED: tl.constexpr,
):  # fmt: skip
    """One row's query, its heads side by side, and of its keys the share of this program."""
    token = tl.program_id(0).to(tl.int64)
    key_head_place, split, num_splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    row = tl.arange(0, ROWS)
    is_row = row < GROUP
    head = key_head_place * GROUP + row
    lane = tl.arange(0, WIDTH)
    count = tl.load(key_counts + token)
    start = tl.load(key_starts + token).to(tl.int64)
    keys += start * key_token + key_head_place * key_head
    values += start * value_token + key_head_place * value_head
    at_query = token * query_token + head * query_head
    q = tl.load(query + at_query[:, None] + lane[None, :], mask=is_row[:, None], other=0.0)
    # Whole blocks, so that only the last one of all has keys that are not the row's.
    share = tl.cdiv(tl.cdiv(count, KEYS), num_splits) * KEYS
    begin = tl.minimum(split * share, count)
    end = tl.minimum(begin + share, count)
    whole = begin + (end - begin) // KEYS * KEYS
    last_key = tl.zeros([ROWS], tl.int32) + count - 1
    found, total, highest = _look_from_to(
        q, keys, values, key_token, value_token, begin, whole, end, last_key, count, scale,
        lane, WIDTH, ROWS, KEYS,
    )  # fmt: skip
    if IS_SHARED:
        num_heads = tl.num_programs(1) * GROUP
        place = (token * num_heads + head) * num_splits + split
        tl.store(founds + place[:, None] * WIDTH + lane[None, :], found, mask=is_row[:, None])
        tl.store(sums + 2 * place, total, mask=is_row)
        tl.store(sums + 2 * place + 1, highest, mask=is_row)
    else:
        found = found / tl.where(total > 0, total, 1.0)[:, None]
        to = answer + (token * answer_token + head * answer_head)[:, None] + lane[None, :]
        tl.store(to, found.to(answer.dtype.element_ty), mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_splits"])
def _join(
    founds, sums, answer, num_splits, answer_token, answer_head,
    WIDTH: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """Of one row and head what all programs found, by the highest score that any of them saw."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    split = tl.arange(0, MOST_SPLITS)
    is_split = split < num_splits
    place = (token * tl.num_programs(1) + head) * num_splits + split
    total = tl.load(sums + 2 * place, mask=is_split, other=0.0)
    highest = tl.load(sums + 2 * place + 1, mask=is_split, other=float("-inf"))
    # Not -inf, whose difference from itself is no number where no program saw a key.
    top = tl.maximum(tl.max(highest, 0), -1.0e30)
    fade = tl.exp2(highest - top)
    found = tl.load(founds + place[:, None] * WIDTH + lane[None, :], mask=is_split[:, None], other=0.0)
    whole, total = tl.sum(found * fade[:, None], 0), tl.sum(total * fade, 0)
    to = answer + token * answer_token + head * answer_head + lane
    tl.store(to, (whole / tl.where(total > 0, total, 1.0)).to(answer.dtype.element_ty))


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
def _look_from_to(
    q, keys, values, key_token, value_token, begin, whole, end, last_key, count, scale,
    lane, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What *q* finds from *begin* to *end*: to *whole* in blocks that all of it sees, then in masked ones.

    Returns the sum of values, that of their weights, and the highest score.
    """
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    found, total, highest = _look(
        q, found, total, highest, keys, values, key_token, value_token,
        begin, whole, last_key, count, scale, lane, KEYS, False,
    )  # fmt: skip
    found, total, highest = _look(
        q, found, total, highest, keys, values, key_token, value_token,
        whole, end, last_key, count, scale, lane, KEYS, True,
    )  # fmt: skip
    return found, total, highest


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
