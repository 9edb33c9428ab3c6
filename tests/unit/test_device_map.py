"""Device maps: what a name covers, how few names do, and what is wrong with a user's map."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.device_map import check_map, compact_map, is_within, spots_of
from glm4v_batch.errors import JobError
from glm4v_batch.needs import read_needs
from glm4v_batch.types import Spot
from tests.cards import gpus, needs_of
from tests.families import FAMILIES, small_model, stored_layout, write_checkpoint

NEEDS = needs_of(layers=12, blocks=11)
NAMES = [module.name for module in NEEDS.modules]
SPOTS = st.lists(st.sampled_from([0, 1, 2, "cpu"]), min_size=len(NAMES), max_size=len(NAMES))


def refusal(device_map: Mapping[str, Spot], **model: Any) -> str:
    with pytest.raises(JobError) as caught:
        check_map(device_map, needs_of(layers=3, **model), gpus(24, 24))
    return str(caught.value)


@given(spots=SPOTS)
def test_a_compact_map_says_the_same_with_names_that_do_not_overlap(spots: list[Spot]) -> None:
    wanted = dict(zip(NAMES, spots, strict=True))

    compact = compact_map(wanted)

    assert spots_of(compact, NEEDS) == wanted
    assert all(sum(is_within(name, key) for key in compact) == 1 for name in NAMES)


def test_one_name_is_enough_where_all_lies_together() -> None:
    assert compact_map(dict.fromkeys(NAMES, 0)) == {"": 0}


def test_the_vision_tower_and_the_text_model_need_a_name_each() -> None:
    spots: dict[str, Spot] = {name: 0 if "visual" in name else 1 for name in NAMES}

    assert compact_map(spots) == {"model.visual": 0, "model.language_model": 1, "lm_head": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_accelerate_read_a_compact_map_as_it_is_meant(family: str, tmp_path: Path) -> None:
    from accelerate.utils import check_device_map
    from transformers.integrations.accelerate import expand_device_map

    model = small_model(family)
    needs = read_needs(write_checkpoint(tmp_path / "model", model.config, stored_layout(model)), "auto")
    wanted = {module.name: number % 3 for number, module in enumerate(needs.modules)}
    compact = compact_map(wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_device_map(model, compact)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    expanded = expand_device_map(compact, names)

    assert {name: wanted[next(m for m in wanted if is_within(name, m))] for name in names} == expanded


@pytest.mark.parametrize(
    "device_map",
    [
        {"": 1},
        {"model": 0, "lm_head": 1},
        {"model.visual": 1, "model.language_model": 0, "lm_head": "cpu"},
        {"model.visual": 0, "model.language_model": "cpu", "lm_head": "disk"},
    ],
)
def test_a_map_that_gives_each_module_one_place_is_accepted(device_map: Mapping[str, Spot]) -> None:
    check_map(device_map, needs_of(layers=3), gpus(24, 24))


def test_all_mistakes_of_a_map_are_named_at_once() -> None:
    message = refusal({"model.visul": 0, "model.language_model": 5, "model.language_model.layers.1": 0})

    assert "5 mistakes" not in message
    assert "names model.visul, which the model does not have. Did you mean model.visual?" in message
    assert "puts model.language_model on GPU 5, which is not among those chosen (0, 1)" in message
    assert "gives no place to model.visual.patch_embed, model.visual.post_conv_layernorm" in message
    assert "by model.language_model and by model.language_model.layers.1" in message


def test_a_layer_is_not_divided_by_a_map() -> None:
    message = refusal({"": 0, "model.language_model.layers.1.mlp": 1})

    assert "names model.language_model.layers.1.mlp, a part of model.language_model.layers.1" in message


def test_the_position_table_of_the_vision_tower_is_not_offloaded() -> None:
    message = refusal({"model.visual": "cpu", "model.language_model": 0, "lm_head": 0})

    assert "offloads model.visual.embeddings, whose weights transformers reads from outside of it" in message


def test_a_map_without_a_gpu_is_refused() -> None:
    assert "names no GPU" in refusal({"": "cpu"})


def test_a_tied_head_is_not_parted_from_its_embedding() -> None:
    message = refusal({"model": 0, "lm_head": 1}, tied=True)

    assert "parts lm_head from model.language_model.embed_tokens, whose weights it shares" in message
