"""Attention of images on Hopper, in Gluon: one warp copies, and two groups of four multiply and weigh.

What those wait for is copied long before, and one multiplies while the other weighs, after Shah et al. 2024,
"FlashAttention-3". Held at a card's full power it reaches two fifths more than the kernel for all cards.
"""

# T packed tokens, S sequences, H heads, D head_dim, P tokens of the pool

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from glm4v_batch.engines.packed_attention import Sequences

_WIDTHS = (64, 128)
# Queries of one group of warps, and keys that all have in hand at a time; so many copies are under way.
_ROWS, _KEYS, _STAGES = gl.constexpr(64), gl.constexpr(128), gl.constexpr(2)
_FEWEST_SLOTS = 32
# Who multiplies needs registers, who copies hardly any; together they are all that there are.
_REGISTERS = gl.constexpr([240, 24])
_LOG2_E = 1.4426950408889634
# Its older name went away with Triton 3.9.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def serves(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend_images` takes these: as many heads each, side by side, of a width that it knows."""
    width = query.shape[2]
    lie_well = all(tensor.stride()[1:] == (width, 1) for tensor in (query, keys, values))
    are_aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0 for tensor in (query, keys, values)
    )
    return width in _WIDTHS and query.shape[1] == keys.shape[1] and lie_well and are_aligned


def attend_images(
    answer: Tensor, query: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, scaling: float
) -> None:
    """Write to *answer* [T, H, D] what *query* [T, H, D] finds in *keys* and *values* [P, H, D].

    Each query sees all keys of its sequence, of which there is one at least. What lies beyond them may be
    read, and changes nothing.
    """
    num_tokens, num_heads, width = query.shape
    num_sequences = len(sequences.key_counts)
    # Each sequence may end within a block.
    most_blocks = triton.cdiv(num_tokens, 2 * _ROWS.value) + num_sequences
    # Triton launches on the device that is current, which is the first where a model lies on several.
    with torch.cuda.device_of(query):
        _attend[most_blocks, num_heads](
            _descriptor(query, _ROWS.value), _descriptor(keys, _KEYS.value), _descriptor(values, _KEYS.value),
            answer, sequences.ends, sequences.key_starts, sequences.key_counts, num_sequences,
            scaling * _LOG2_E, *answer.stride()[:2], WIDTH=width,
            SLOTS=max(_FEWEST_SLOTS, triton.next_power_of_2(num_sequences)),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _descriptor(tensor: Tensor, num_rows: int) -> TensorDescriptor:
    """Of *tensor* [P, H, D], in blocks of *num_rows* tokens of one head."""
    num_tokens, num_heads, width = tensor.shape
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([num_rows, width], dtype)
    shape, strides = [num_tokens, num_heads * width], [tensor.stride(0), 1]
    return TensorDescriptor(tensor, shape, strides, [num_rows, width], layout)


@gluon.jit(do_not_specialize=["num_sequences"])
def _attend(
    query, keys, values, answer, ends, key_starts, key_counts, num_sequences, scale,
    answer_token, answer_head, WIDTH: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(1)
    block, sequence = _find(gl.program_id(0), ends, num_sequences, SLOTS)
    if sequence < num_sequences:
        begin = gl.load(ends + sequence) + block * 2 * _ROWS
        num_rows = gl.load(ends + sequence + 1) - begin
        count, start = gl.load(key_counts + sequence), gl.load(key_starts + sequence)
        q = gl.allocate_shared_memory(query.dtype, [2, _ROWS, WIDTH], query.layout)
        k = gl.allocate_shared_memory(keys.dtype, [_STAGES, _KEYS, WIDTH], keys.layout)
        v = gl.allocate_shared_memory(values.dtype, [_STAGES, _KEYS, WIDTH], values.layout)
        # Of a barrier that says "full" one copy is the sender, of one that says "free" both groups.
        q_full, k_full, v_full = _barriers(2, 1), _barriers(_STAGES, 1), _barriers(_STAGES, 1)
        k_free, v_free = _barriers(_STAGES, 2), _barriers(_STAGES, 2)
        fence_async_shared()
        num_blocks = (count + _KEYS - 1) // _KEYS
        to = answer + head * answer_head
        ring = (k, v, k_full, v_full, k_free, v_free)
        gl.warp_specialize([
            (_weigh, (0, q, q_full, ring, to, answer_token, begin, num_rows, count, num_blocks, scale)),
            (_weigh, (1, q, q_full, ring, to, answer_token, begin, num_rows, count, num_blocks, scale)),
            (_fetch, (query, keys, values, q, q_full, ring, begin, start, num_blocks, head * WIDTH)),
        ], [4, 1], _REGISTERS)  # fmt: skip


@gluon.jit
def _barriers(number: gl.constexpr, num_senders: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(number):
        mbarrier.init(barriers.index(place), count=num_senders)
    return barriers


@gluon.jit
def _find(place, ends, num_sequences, SLOTS: gl.constexpr):
    """The block *place* of all sequences' blocks: which one of its sequence, and of which sequence."""
    square: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, square))
    other = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, square))
    is_slot = slot < num_sequences
    sizes = gl.load(ends + slot + 1, mask=is_slot, other=0) - gl.load(ends + slot, mask=is_slot, other=0)
    blocks = (sizes + 2 * _ROWS - 1) // (2 * _ROWS)
    upto = gl.sum(gl.where(slot[None, :] <= other[:, None], blocks[None, :], 0), axis=1)
    is_before = (upto <= place) & (other < num_sequences)
    before = gl.max(gl.where(is_before, upto, 0), axis=0)
    return place - before, gl.sum(is_before.to(gl.int32), axis=0)


@gluon.jit
def _fetch(query, keys, values, q, q_full, ring, begin, start, num_blocks, lane):
    """Copy the queries once, and keys and values whenever there is room for more."""
    k, v, k_full, v_full, k_free, v_free = ring
    for group in gl.static_range(2):
        _copy_to(q.index(group), query, begin + group * _ROWS, lane, q_full.index(group))
    for block in range(num_blocks):
        place, turn = block % _STAGES, block // _STAGES & 1
        mbarrier.wait(k_free.index(place), turn ^ 1)
        _copy_to(k.index(place), keys, start + block * _KEYS, lane, k_full.index(place))
        mbarrier.wait(v_free.index(place), turn ^ 1)
        _copy_to(v.index(place), values, start + block * _KEYS, lane, v_full.index(place))


@gluon.jit
def _copy_to(to, descriptor, row, lane, is_full):
    num_bytes: gl.constexpr = to.shape[0] * to.shape[1] * to.dtype.primitive_bitwidth // 8
    mbarrier.expect(is_full, num_bytes)
    _copy(descriptor, [row, lane], is_full, to)


@gluon.jit
def _weigh(
    group: gl.constexpr, q, q_full, ring, answer, answer_token, begin, num_rows, count, num_blocks, scale
):
    """Of one group's queries the answers: the next scores are under way while these become weights."""
    k, v, k_full, v_full, k_free, v_free = ring
    WIDTH: gl.constexpr = q.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    found = gl.zeros([_ROWS, WIDTH], gl.float32, D)
    total = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, S))
    highest = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    mbarrier.wait(q_full.index(group), 0)
    score = warpgroup_mma_wait(0, deps=(_scores(q.index(group), k, k_full, 0, S),))
    mbarrier.arrive(k_free.index(0), count=1)
    for block in range(num_blocks - 1):
        ahead = _scores(q.index(group), k, k_full, block + 1, S)
        weight, found, total, highest = _weighed(score, found, total, highest, scale, D, v.dtype)
        mbarrier.wait(v_full.index(block % _STAGES), block // _STAGES & 1)
        sums = warpgroup_mma(weight, v.index(block % _STAGES), found, is_async=True)
        score = warpgroup_mma_wait(1, deps=(ahead,))
        mbarrier.arrive(k_free.index((block + 1) % _STAGES), count=1)
        found = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(v_free.index(block % _STAGES), count=1)
    # Only the last block has keys beyond the sequence's own.
    last = num_blocks - 1
    key = last * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, S))
    score = gl.where((key < count)[None, :], score, -1.0e30)
    weight, found, total, highest = _weighed(score, found, total, highest, scale, D, v.dtype)
    mbarrier.wait(v_full.index(last % _STAGES), last // _STAGES & 1)
    _blank(v.index(last % _STAGES), count - last * _KEYS)
    sums = warpgroup_mma(weight, v.index(last % _STAGES), found, is_async=True)
    found = warpgroup_mma_wait(0, deps=(sums,)) / gl.convert_layout(total, gl.SliceLayout(1, D))[:, None]
    row = group * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, D))
    lane = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, D))
    to = answer + ((begin + row).to(gl.int64) * answer_token)[:, None] + lane[None, :]
    gl.store(to, found.to(answer.dtype.element_ty), mask=(row < num_rows)[:, None])


@gluon.jit
def _scores(q, k, k_full, block, S: gl.constexpr):
    """The scores of *q* with the keys of *block*, under way."""
    place = block % _STAGES
    mbarrier.wait(k_full.index(place), block // _STAGES & 1)
    none = gl.zeros([_ROWS, _KEYS], gl.float32, S)
    return warpgroup_mma(q, k.index(place).permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _weighed(score, found, total, highest, scale, D: gl.constexpr, dtype: gl.constexpr):
    """The weights of *score*, and what was found before, its weights' sum and the highest score by them."""
    # Scaled only here: a product and a difference of each score are one instruction.
    new = gl.maximum(highest, gl.max(score, axis=1) * scale)
    weight = gl.exp2(score * scale - new[:, None])
    fade = gl.exp2(highest - new)
    total = total * fade + gl.sum(weight, axis=1)
    found = found * gl.convert_layout(fade, gl.SliceLayout(1, D))[:, None]
    return gl.convert_layout(weight.to(dtype), gl.DotOperandLayout(0, D, 2)), found, total, new


@gluon.jit
def _blank(v, count):
    """Make *v* zero from its value *count* on: another's may be NaN, which no weight takes away.

    Both groups do so, each before it reads: what they write is the same.
    """
    if count < _KEYS:
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        key = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, rows))
        value = v.load(rows)
        v.store(gl.where((key < count)[:, None], value, gl.zeros_like(value)))
        fence_async_shared()
