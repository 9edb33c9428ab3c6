"""What the packed engine may have in hand: it fits, it is worth having, or it is refused."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm4v_batch.activations import feature_token_bytes, packed_coefficients, pool_token_bytes
from glm4v_batch.errors import PlacementError
from glm4v_batch.packed_limits import (
    MOST_PATCHES,
    MOST_STEP_TOKENS,
    PackedDemand,
    PackedLimits,
    PackedNeeds,
    call_sizes,
    filled_up,
    packed_limits,
    peak_bytes,
    rounded_tokens,
    shorter_step,
    steady_tokens,
)
from glm4v_batch.types import RequestSize
from glm4v_batch.units import GIB

# GLM-4.1V-9B's dimensions are the defaults.
CONFIG = {"model_type": "glm4v", "text_config": {}, "vision_config": {}}
NEEDS = PackedNeeds(
    packed_coefficients(CONFIG, 2), pool_token_bytes(CONFIG, 2), feature_token_bytes(CONFIG, 2)
)
DEMAND = PackedDemand((NEEDS,), 256, RequestSize(1041, 3996, 128), RequestSize(6200, 24576, 128), 24576)


def test_a_token_of_the_pool_takes_what_the_architecture_says() -> None:
    # 40 layers, keys and values, 2 heads of 128 values in bfloat16.
    assert NEEDS.pool_token_bytes == 40 * 2 * 2 * 128 * 2


def test_beside_a_9b_model_on_24_gib_some_thirty_requests_fit() -> None:
    limits = packed_limits(DEMAND, [int(0.92 * 24 * GIB - 19.17 * GIB)])

    assert 25 <= limits.pool_tokens // (1041 + 128) <= 45
    assert limits.patches == 24576


@pytest.mark.parametrize("room_gib", [0.8, 1.2, 2, 3, 40])
def test_an_image_finds_room_where_no_row_of_the_sample_has_one(room_gib: float) -> None:
    demand = PackedDemand((NEEDS,), 256, RequestSize(200, 0, 128), RequestSize(200, 0, 128), image_patches=0)

    assert packed_limits(demand, [int(room_gib * GIB)]).patches > 0


@given(num_patches=st.integers(1, 100_000))
def test_a_call_is_filled_up_to_one_of_few_sizes(num_patches: int) -> None:
    size = filled_up(num_patches)

    assert num_patches <= size < num_patches + (1024 if num_patches <= MOST_PATCHES else 2048)
    assert filled_up(size) == size
    sizes = list(call_sizes(size))
    assert sizes == sorted({filled_up(size) for size in sizes}, reverse=True)
    assert sizes[0] == size
    assert len(sizes) <= 16 + (100_000 - MOST_PATCHES) // 2048 + 1


def test_a_pool_is_no_larger_than_the_rows_can_fill() -> None:
    limits = packed_limits(DEMAND, [100 * GIB])

    assert limits.pool_tokens == 256 * 1169 * 3 // 2


@given(num_tokens=st.integers(1, MOST_STEP_TOKENS))
def test_a_step_is_filled_up_to_one_of_few_sizes(num_tokens: int) -> None:
    size = rounded_tokens(num_tokens)

    assert num_tokens <= size < num_tokens + max(64, num_tokens / 8)
    assert rounded_tokens(size) == steady_tokens(size) == size
    # What comes step after step is not filled up, once it is much.
    assert 7 / 8 * num_tokens <= steady_tokens(num_tokens) <= max(num_tokens, 512)
    assert len({rounded_tokens(number) for number in range(1, MOST_STEP_TOKENS + 1)}) == 32


def test_steps_are_as_long_as_rows_want_and_longer_where_memory_is_plenty() -> None:
    tight, plenty = (packed_limits(DEMAND, [room * GIB]) for room in (4, 40))

    for limits in (tight, plenty):
        rows = min(limits.max_rows, limits.pool_tokens / 1169)
        assert limits.prompt_tokens(limits.max_rows) >= 7 / 8 * rows * 1041 / 128
    assert tight.step_tokens < 1500
    assert plenty.step_tokens == MOST_STEP_TOKENS


def test_longer_steps_are_not_paid_for_with_rows() -> None:
    worst, short = RequestSize(6200, 24576, 500), RequestSize(100, 3996, 128)

    limits = packed_limits(PackedDemand((NEEDS,), 256, short, worst, 24576), [int(1.9 * GIB)])

    # The pool has to hold the worst request, and so 29 of the typical ones.
    assert min(limits.max_rows, limits.pool_tokens // (100 + 128)) >= 28


@given(
    room_mib=st.integers(0, 80_000),
    max_rows=st.sampled_from([1, 8, 256, 1000, 4000]),
    prompt=st.integers(20, 6000),
    answer=st.integers(1, 2000),
)
@example(room_mib=2300, max_rows=256, prompt=1041, answer=1)
@example(room_mib=1822, max_rows=256, prompt=1041, answer=128)
@example(room_mib=1730, max_rows=4000, prompt=20, answer=128)
@example(room_mib=1650, max_rows=256, prompt=200, answer=1)
@example(room_mib=1826, max_rows=256, prompt=20, answer=1)
def test_what_is_allowed_fits_or_is_refused(room_mib: int, max_rows: int, prompt: int, answer: int) -> None:
    worst = RequestSize(6200, 24576, answer)
    demand = PackedDemand((NEEDS,), max_rows, RequestSize(prompt, 3996, answer), worst, 24576)
    room = room_mib * 1024**2
    try:
        limits = packed_limits(demand, [room])
    except PlacementError:
        # Nor does the least that there is: the shortest steps of the fewest rows.
        least = PackedLimits(8, 6200 + answer, 128, 24576)
        assert 1.06 * peak_bytes(least, NEEDS, 24576) + least.pool_tokens * NEEDS.pool_token_bytes > room
        return

    assert peak_bytes(limits, NEEDS, 24576) + limits.pool_tokens * NEEDS.pool_token_bytes <= room
    assert limits.pool_tokens >= 6200 + answer


def test_the_features_of_a_request_of_many_images_are_counted() -> None:
    many = replace(DEMAND, worst=RequestSize(6200, 10 * 24576, 128))

    limits = packed_limits(many, [4 * GIB])

    more = peak_bytes(limits, NEEDS, 10 * 24576) - peak_bytes(limits, NEEDS, 24576)
    assert more == 9 * 24576 // 4 * NEEDS.feature_token_bytes
    assert peak_bytes(limits, NEEDS, 10 * 24576) + limits.pool_tokens * NEEDS.pool_token_bytes <= 4 * GIB


def test_a_device_without_layers_leaves_the_pool_as_large_as_the_others_allow() -> None:
    tower = replace(NEEDS, pool_token_bytes=0.0)
    two = PackedDemand((tower, NEEDS), 256, DEMAND.typical, DEMAND.worst, 24576)

    assert packed_limits(two, [4 * GIB, 4 * GIB]) == packed_limits(DEMAND, [4 * GIB])


def test_after_memory_ran_out_steps_have_a_size_that_graphs_are_made_for() -> None:
    numbers = (4000, 1090, 700, 128, 100, 3)

    assert [shorter_step(number) for number in numbers] == [3840, 1024, 640, 128, 64, 64]


def test_the_tightest_device_decides() -> None:
    two = PackedDemand((NEEDS, NEEDS), 256, DEMAND.typical, DEMAND.worst, 24576)

    assert packed_limits(two, [10 * GIB, 4 * GIB]) == packed_limits(DEMAND, [4 * GIB])


def test_too_little_room_is_refused_with_what_would_help() -> None:
    with pytest.raises(PlacementError, match=r"6,328") as refused:
        packed_limits(DEMAND, [1 * GIB])

    assert "max_pixels" in refused.value.hint
