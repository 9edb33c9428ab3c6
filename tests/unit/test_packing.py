"""Modules over devices: in order, whole, within budget, and as even as they go."""

from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from glm4v_batch.activations import prior_coefficients
from glm4v_batch.memory import MemoryModel
from glm4v_batch.needs import ModelNeeds
from glm4v_batch.packing import (
    Packing,
    RunCosts,
    Strategy,
    balanced,
    balanced_low_0,
    batch_of,
    largest,
    pieces_of,
    sequential,
    share_of,
)
from glm4v_batch.types import BatchShape, RequestSize
from tests.cards import GIB, TYPICAL, WORST, glm_41v, needs_of

STRATEGIES = {"balanced": balanced, "balanced_low_0": balanced_low_0, "sequential": sequential}

models = st.builds(
    needs_of,
    layers=st.integers(1, 10),
    blocks=st.integers(1, 4),
    layer_bytes=st.integers(1 << 20, GIB),
    block_bytes=st.integers(1 << 20, GIB // 4),
    embedding_bytes=st.integers(1 << 20, GIB),
    tied=st.booleans(),
)
budgets = st.lists(st.integers(2 * GIB, 16 * GIB), min_size=2, max_size=5)
sizes = st.builds(
    RequestSize,
    prompt_tokens=st.integers(1, 4000),
    visual_patches=st.integers(0, 12_000),
    new_tokens=st.integers(1, 512),
)


def packed(
    needs: ModelNeeds,
    budgets_bytes: Sequence[int],
    strategy: Strategy = balanced,
    *,
    whole_vision: bool = True,
    worst: RequestSize = WORST,
    typical: RequestSize = TYPICAL,
) -> Packing | None:
    pieces = pieces_of(needs, whole_vision=whole_vision)
    return strategy(RunCosts(needs, pieces), budgets_bytes, worst, typical)


def peaks(packing: Packing, needs: ModelNeeds, shape: BatchShape) -> list[int]:
    """What each device of *packing* is predicted to take, by the model that the engine uses."""
    return [
        MemoryModel(
            (sum(module.weight_bytes for module in modules),),
            (
                prior_coefficients(
                    needs.config, needs.bytes_per_value, share_of(modules, needs, takes_inputs=place == 0)
                ),
            ),
        ).predict(shape)[0]
        for place, modules in enumerate(modules for modules in packing.modules if modules)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(needs=models, budgets_bytes=budgets, whole_vision=st.booleans(), worst=sizes, typical=sizes)
def test_each_module_is_packed_once_in_order_and_within_budget(
    strategy: str,
    needs: ModelNeeds,
    budgets_bytes: list[int],
    whole_vision: bool,
    worst: RequestSize,
    typical: RequestSize,
) -> None:
    packing = packed(
        needs, budgets_bytes, STRATEGIES[strategy], whole_vision=whole_vision, worst=worst, typical=typical
    )
    assume(packing is not None)
    assert packing is not None

    modules = [module for held in packing.modules for module in held]
    used = [budget for budget, held in zip(budgets_bytes, packing.modules, strict=True) if held]
    assert sorted(modules, key=needs.modules.index) == list(needs.modules)
    assert needs.is_head_tied or modules == list(needs.modules)
    assert all(p <= budget for p, budget in zip(peaks(packing, needs, batch_of(worst)), used, strict=True))


@given(needs=models, budgets_bytes=budgets, worst=sizes, typical=sizes)
def test_the_batch_that_a_balanced_packing_is_made_for_fits_and_one_more_request_does_not(
    needs: ModelNeeds, budgets_bytes: list[int], worst: RequestSize, typical: RequestSize
) -> None:
    packing = packed(needs, budgets_bytes, worst=worst, typical=typical)
    assume(packing is not None and 0 < packing.batch_size < 1024)
    assert packing is not None

    used = [budget for budget, held in zip(budgets_bytes, packing.modules, strict=True) if held]
    fitting = peaks(packing, needs, batch_of(typical, packing.batch_size))
    too_many = peaks(packing, needs, batch_of(typical, packing.batch_size + 1))
    assert all(peak <= budget for peak, budget in zip(fitting, used, strict=True))
    assert any(1.021 * peak > budget for peak, budget in zip(too_many, used, strict=True))


@given(needs=models, budgets_bytes=budgets, more=st.lists(st.integers(0, 8 * GIB), min_size=5, max_size=5))
def test_more_memory_never_makes_the_batch_smaller(
    needs: ModelNeeds, budgets_bytes: list[int], more: list[int]
) -> None:
    packing = packed(needs, budgets_bytes)
    assume(packing is not None)

    larger = packed(needs, [budget + extra for budget, extra in zip(budgets_bytes, more, strict=False)])

    assert packing is not None
    assert larger is not None
    assert larger.batch_size >= packing.batch_size


@given(
    needs=st.builds(needs_of, layers=st.integers(1, 4), layer_bytes=st.integers(1 << 20, 4 * GIB)),
    budgets_bytes=st.lists(st.integers(0, 12 * GIB), min_size=1, max_size=3),
    typical=sizes,
)
def test_no_other_packing_fits_where_none_is_found_or_leaves_the_fullest_device_emptier(
    needs: ModelNeeds, budgets_bytes: list[int], typical: RequestSize
) -> None:
    costs = RunCosts(needs, pieces_of(needs, whole_vision=True))
    packing = balanced(costs, budgets_bytes, WORST, typical)

    load = (batch_of(WORST), batch_of(typical, packing.batch_size if packing else 0))
    stops = range(len(costs.pieces) + 1)
    best = min(
        fullest(costs, (*ends, stops[-1]), budgets_bytes, load)
        for ends in combinations_with_replacement(stops, len(budgets_bytes) - 1)
    )
    if packing is None:
        assert best > 1
    else:
        assert fullest(costs, packing.ends, budgets_bytes, load) == pytest.approx(best)


def fullest(
    costs: RunCosts, ends: Sequence[int], budgets_bytes: Sequence[int], load: tuple[BatchShape, ...]
) -> float:
    """The largest part of a budget that a device needs."""
    taken = [costs.of(start, stop, load) for start, stop in pairwise((0, *ends))]
    return max(t / max(budget, 1) for t, budget in zip(taken, budgets_bytes, strict=True))


def test_the_card_with_the_vision_tower_gets_fewer_layers_and_all_peaks_are_alike() -> None:
    needs = glm_41v()

    packing = packed(needs, [int(0.92 * 12 * GIB)] * 4)

    assert packing is not None
    layers = [sum(module.layer is not None for module in modules) for modules in packing.modules]
    taken = peaks(packing, needs, batch_of(TYPICAL, packing.batch_size))
    assert layers[0] < min(layers[1:]) / 2
    assert max(taken) < 1.15 * min(taken)
    assert min(taken) > 0.9 * 0.92 * 12 * GIB


def test_the_vision_tower_stays_whole_or_goes_block_by_block() -> None:
    needs = needs_of(layers=2, blocks=3)

    whole = pieces_of(needs, whole_vision=True)
    parted = pieces_of(needs, whole_vision=False)

    assert [module.name for module in whole[0]] == [m.name for m in needs.modules if m.is_vision]
    assert [piece[0].name.removeprefix("model.visual.") for piece in parted[:5]] == [
        "patch_embed",
        "embeddings",
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


def test_what_has_no_weights_goes_with_what_comes_before_it() -> None:
    pieces = pieces_of(needs_of(layers=1), whole_vision=True)

    names = [[module.name.rpartition(".")[2] for module in piece] for piece in pieces[1:]]
    assert names == [["embed_tokens", "rotary_emb"], ["0", "norm"], ["lm_head"]]


def test_a_tied_head_lies_with_the_embedding() -> None:
    pieces = pieces_of(needs_of(layers=1, tied=True), whole_vision=True)

    assert [module.name for module in pieces[1]][-1] == "lm_head"


def test_low_0_leaves_the_first_device_empty_while_the_others_have_room() -> None:
    packing = packed(glm_41v(), [12 * GIB] * 4, balanced_low_0)

    assert packing is not None
    assert packing.ends[0] == 0


def test_low_0_gives_the_first_device_no_more_than_it_must() -> None:
    needs, small = glm_41v(), 6 * GIB

    packing = packed(needs, [12 * GIB, small, small, small], balanced_low_0)

    assert packing is not None
    first, *others = packing.modules
    assert sum(module.weight_bytes for module in first) > 0
    layer_bytes = next(module.weight_bytes for module in needs.modules if module.layer is not None)
    for modules in others:
        (taken,) = peaks(Packing((modules,), (1,)), needs, batch_of(WORST))
        assert taken > small - 2 * layer_bytes


def test_sequential_fills_a_device_before_the_next_one_gets_anything() -> None:
    packing = packed(needs_of(layers=20), [8 * GIB] * 3, sequential)

    assert packing is not None
    first, second, third = packing.modules
    assert len(first) > len(second) > 0
    assert not third


def test_streamed_modules_take_room_and_work_on_the_first_device() -> None:
    needs = needs_of(layers=6)
    kept, streamed = needs.modules[:-3], needs.modules[-4:-2]
    pieces = tuple((module,) for module in kept[:-1])

    alone = RunCosts(needs, pieces)
    busy = RunCosts(needs, pieces, streamed)

    load = (batch_of(TYPICAL, 8),)
    room_bytes = max(module.weight_bytes for module in streamed)
    assert busy.of(0, 3) >= alone.of(0, 3) + room_bytes
    assert busy.of(0, 3, load) > alone.of(0, 3, load) + room_bytes
    assert busy.of(1, 3, load) == alone.of(1, 3, load)


@given(limit=st.integers(0, 2000), most=st.integers(0, 2000))
def test_the_largest_possible_number_is_found(limit: int, most: int) -> None:
    assert largest(lambda number: number <= limit, most) == min(limit, most)
