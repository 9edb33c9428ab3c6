"""The formulas against live bytes: scaled-down models of every family run `generate()` under a meter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig

from glm4v_batch.activations import (
    _TEXT_DEFAULTS,
    _VISION_DEFAULTS,
    DeviceShare,
    can_predict,
    prior_coefficients,
)
from glm4v_batch.types import BatchShape
from tests.cpu_meter import _LiveBytes

VISION, PREFILL, DECODE = range(3)
IMAGE, NEW_TOKENS = 5, 4
ENDLESS = 1 << 50
# What the formulas leave out are token ids, masks and positions: some 50 bytes per token.
EXACT, NEAR = 0.01, 0.04

TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 6,
    "image_start_token_id": 7,
    "image_end_token_id": 8,
    "video_start_token_id": 9,
    "video_end_token_id": 10,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "mrope_section": [4, 6, 6],
}
SMALL: Mapping[str, Any] = {"vocab_size": 1000, "pad_token_id": 0, "rope_parameters": ROPE}
# GLM-4.1V-9B's, GLM-4.5V's and GLM-OCR's proportions at about an eighth of their widths.
DENSE = {
    **SMALL,
    "hidden_size": 512,
    "intermediate_size": 1712,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
EXPERTS = {
    **SMALL,
    "hidden_size": 512,
    "intermediate_size": 1368,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 176,
    "num_experts_per_tok": 8,
    "n_routed_experts": 16,
}
OCR = {
    **SMALL,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TOWER = {"depth": 2, "hidden_size": 192, "num_heads": 3, "out_hidden_size": 512, "intermediate_size": 1712}
OCR_TOWER = {
    "depth": 2,
    "hidden_size": 256,
    "num_heads": 8,
    "out_hidden_size": 384,
    "intermediate_size": 1024,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"model_type": "glm4v", "text_config": DENSE, "vision_config": TOWER},
    "dense in float32": {"model_type": "glm4v", "text_config": DENSE, "vision_config": TOWER},
    "experts": {"model_type": "glm4v_moe", "text_config": EXPERTS, "vision_config": TOWER},
    "experts inside glm46v": {
        "model_type": "glm46v",
        "text_config": {"model_type": "glm4v_moe_text", **EXPERTS},
        "vision_config": {"model_type": "glm4v_moe_vision", **TOWER},
    },
    "ocr": {"model_type": "glm_ocr", "text_config": OCR, "vision_config": OCR_TOWER},
    "ocr in float32": {"model_type": "glm_ocr", "text_config": OCR, "vision_config": OCR_TOWER},
}
every_model = pytest.mark.parametrize("name", CONFIGS)


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if "float32" in name else torch.bfloat16


@cache
def model_of(name: str) -> Any:
    """The model with random weights."""
    torch.manual_seed(0)
    config = {**CONFIGS[name], **TOKENS}
    built = CONFIG_MAPPING[config.pop("model_type")](**config)
    model = AutoModelForImageTextToText.from_config(built, dtype=dtype_of(name)).eval()
    model.generation_config = GenerationConfig()
    return model


def shape_of(sides: Sequence[int], lengths: Sequence[int], new_tokens: int = NEW_TOKENS) -> BatchShape:
    """A batch of requests with one square image each, *sides* in patches, *lengths* in prompt tokens."""
    size, longest = len(sides), max(lengths)
    return BatchShape(
        batch_size=size,
        padded_tokens=size * longest,
        visual_patches=sum(side**2 for side in sides),
        kv_tokens=size * (longest + new_tokens),
        mask_cells=size * longest**2,
    )


@cache
def live_peaks(
    name: str, sides: tuple[int, ...], lengths: tuple[int, ...], new_tokens: int = NEW_TOKENS
) -> tuple[int, ...]:
    """The most bytes that live in each phase of `generate()` on the batch that `shape_of` describes."""
    model, longest = model_of(name), max(lengths)
    rows = [[IMAGE] * (side**2 // 4) for side in sides]
    ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    counter = _LiveBytes(ENDLESS)
    with torch.inference_mode(), counter, watched(model, counter) as peaks:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == IMAGE).int(),
            image_grid_thw=torch.tensor([(1, side, side) for side in sides]),
            pixel_values=torch.zeros(sum(side**2 for side in sides), 1176),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
    return tuple(peaks)


@contextmanager
def watched(model: Any, counter: _LiveBytes) -> Iterator[list[int]]:
    """Gather the peak of each phase, which begins where its part of *model* is called."""
    peaks, phases = [0, 0, 0, 0], [3]  # the last is what comes before the first phase

    def enter(phase: int) -> None:
        leave()
        phases[0] = phase

    def leave() -> None:
        peaks[phases[0]] = max(peaks[phases[0]], counter.peak_bytes)
        counter.peak_bytes = counter._live_bytes

    def enter_text(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        enter(PREFILL if kwargs["inputs_embeds"].shape[1] > 1 else DECODE)

    visual, text = model.model.visual, model.model.language_model
    handles = [
        visual.register_forward_pre_hook(lambda *_: enter(VISION)),
        visual.register_forward_hook(lambda *_: enter(3)),
        text.register_forward_pre_hook(enter_text, with_kwargs=True),
    ]
    try:
        yield peaks
    finally:
        leave()
        for handle in handles:
            handle.remove()


def grown(name: str, phase: int, first: tuple[Any, ...], second: tuple[Any, ...]) -> int:
    """By how many bytes the peak of *phase* grows from one batch to another."""
    return live_peaks(name, *second)[phase] - live_peaks(name, *first)[phase]


def formulas(name: str) -> Any:
    return prior_coefficients(CONFIGS[name], dtype_of(name).itemsize)


FEW_PATCHES = ((16, 16), (300, 300))
MANY_PATCHES = ((32, 32), (300, 300))
LONG = ((16, 16), (600, 600))
PADDED = ((16, 16), (600, 500))
LATE = ((16, 16), (300, 280), NEW_TOKENS + 60)
EARLY = ((16, 16), (300, 280))


@every_model
@pytest.mark.parametrize("phase", [VISION, PREFILL, DECODE])
def test_a_visual_patch_takes_what_the_formula_says_in_every_phase(name: str, phase: int) -> None:
    num_patches = 2 * (32**2 - 16**2)

    measured = grown(name, phase, FEW_PATCHES, MANY_PATCHES) / num_patches

    assert formulas(name)[phase][2] == pytest.approx(measured, rel=EXACT)


@every_model
def test_a_prompt_token_takes_what_the_formula_says_in_prefill(name: str) -> None:
    measured = grown(name, PREFILL, FEW_PATCHES, LONG) / (2 * 300)

    assert formulas(name)[PREFILL][1] == pytest.approx(measured, rel=EXACT)


@every_model
def test_a_padded_batch_keeps_one_byte_per_mask_cell_and_the_formula_allows_its_copy(name: str) -> None:
    measured = grown(name, PREFILL, LONG, PADDED) / (2 * 600**2)

    assert measured == pytest.approx(1, rel=EXACT)
    assert formulas(name)[PREFILL][4] == 1 + dtype_of(name).itemsize


@every_model
def test_a_decoded_token_takes_its_cache_and_the_formula_allows_a_copy_of_one_layer(name: str) -> None:
    text = CONFIGS[name]["text_config"]
    head_dim = text.get("head_dim", 64)
    width = text["num_key_value_heads"] * head_dim * dtype_of(name).itemsize
    copied = 2 * text["num_attention_heads"] * head_dim * dtype_of(name).itemsize

    measured = grown(name, DECODE, EARLY, LATE) / (2 * 60)

    cache = 2 * text["num_hidden_layers"] * width
    assert formulas(name)[DECODE][3] == cache + copied
    assert cache < measured <= (cache + copied) * (1 + NEAR)


@every_model
@pytest.mark.parametrize("batch", [FEW_PATCHES, MANY_PATCHES, LONG, PADDED, LATE])
def test_no_phase_takes_noticeably_more_than_predicted(name: str, batch: tuple[Any, ...]) -> None:
    features = np.array(astuple(shape_of(*batch)), float)

    predicted = formulas(name) @ features

    measured = np.array(live_peaks(name, *batch)[:3])
    assert (measured <= predicted * (1 + NEAR)).all(), predicted / measured


@every_model
@pytest.mark.parametrize("batch", [FEW_PATCHES, MANY_PATCHES])
def test_the_largest_phase_is_predicted_within_fifteen_percent(name: str, batch: tuple[Any, ...]) -> None:
    features = np.array(astuple(shape_of(*batch)), float)

    predicted = (formulas(name) @ features).max()

    assert predicted == pytest.approx(max(live_peaks(name, *batch)), rel=0.15)


def tower_growth(config: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Bytes that one more patch takes in the vision tower of *config*, run by itself."""
    settings = {**config, **TOKENS}
    built = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    tower = AutoModelForImageTextToText.from_config(built, dtype=dtype).eval().model.visual
    peaks = []
    for side in (16, 32):
        counter = _LiveBytes(ENDLESS)
        with torch.inference_mode(), counter:
            pixels = torch.zeros(side**2, 1176)
            tower(pixels.to(dtype), torch.tensor([(1, side, side)]))
        peaks.append(counter.peak_bytes)
    return (peaks[1] - peaks[0]) / (32**2 - 16**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", ["glm4v", "glm_ocr"])
@pytest.mark.parametrize(
    "widths",
    [
        {"out_hidden_size": 64, "intermediate_size": 128},
        {"out_hidden_size": 64, "intermediate_size": 4096},
        {"out_hidden_size": 1024, "intermediate_size": 1024},
    ],
    ids=["attention", "merger or MLP", "MLP or merger"],
)
def test_each_part_of_the_tower_may_be_its_largest(
    model_type: str, widths: Mapping[str, int], dtype: torch.dtype
) -> None:
    tower = {"depth": 2, "hidden_size": 256, "num_heads": 8, **widths}
    text = {**SMALL, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {"model_type": model_type, "text_config": text, "vision_config": tower}

    measured = tower_growth(config, dtype)

    predicted = prior_coefficients(config, dtype.itemsize)[VISION][2]
    assert measured * (1 - EXACT) <= predicted <= measured * 1.1


@pytest.mark.parametrize("model_type", ["glm4v", "glm46v", "glm4v_moe", "glm_ocr"])
def test_a_config_that_leaves_out_its_defaults_means_the_same(model_type: str) -> None:
    full = CONFIG_MAPPING[model_type]().to_dict()

    coefficients = prior_coefficients({"model_type": model_type}, 2)

    assert np.array_equal(coefficients, prior_coefficients(full, 2))


@pytest.mark.parametrize(
    ("section", "defaults"),
    [*_TEXT_DEFAULTS.items(), *_VISION_DEFAULTS.items()],
    ids=lambda value: str(value)[:16],
)
def test_the_defaults_are_those_of_transformers(section: str, defaults: Mapping[str, int]) -> None:
    config = CONFIG_MAPPING[section]()

    assert defaults == {key: getattr(config, key) for key in defaults}


def test_the_formulas_give_the_traced_bytes_of_glm_4_1v_9b() -> None:
    """The figures are live-byte traces of the full-size model: vision attention, MLP, features, KV cache."""
    vision, prefill, decode = prior_coefficients({"model_type": "glm4v"}, bytes_per_value=2)

    assert vision[2] == 4_704 + 55_616
    assert prefill[1] == pytest.approx(134_400 + 8_192 + 40_960, rel=0.002)
    assert prefill[2] == 4_704 + 3 * 8_192 / 4
    assert decode[0] == 303_104 + 2 * 606_208
    assert decode[3] == 40_960 + 16_384


def test_experts_count_and_not_only_the_dense_layers() -> None:
    config = {"model_type": "glm4v_moe", "text_config": {"head_dim": 128}}
    dense = {"model_type": "glm4v_moe", "text_config": {"head_dim": 128, "first_k_dense_replace": 46}}

    with_experts, without = (prior_coefficients(each, 2)[PREFILL][1] for each in (config, dense))

    assert with_experts > 1.5 * without


def test_the_shares_of_a_spread_model_hold_each_part_where_it_lies() -> None:
    config = {"model_type": "glm4v"}
    first = prior_coefficients(config, 2, DeviceShare(layers=0.25, has_head=False))
    middle = prior_coefficients(
        config, 2, DeviceShare(takes_inputs=False, has_vision=False, layers=0.5, has_head=False)
    )
    last = prior_coefficients(config, 2, DeviceShare(takes_inputs=False, has_vision=False, layers=0.25))
    whole = prior_coefficients(config, 2)

    assert first[VISION][2] == whole[VISION][2]
    assert not middle[VISION].any()
    assert first[DECODE][0] == whole[DECODE][0]
    assert last[DECODE][0] == 2 * 151_552
    assert (first <= whole).all()
    assert (middle <= whole).all()
    assert (last <= whole).all()


def test_a_card_with_the_tower_alone_holds_no_prompts() -> None:
    alone = prior_coefficients(
        {"model_type": "glm4v"}, 2, DeviceShare(takes_inputs=False, layers=0.0, has_head=False)
    )

    assert alone[VISION][2] == 55_616
    assert not alone[:, [0, 1, 3, 4]].any()


def test_a_model_of_another_type_gets_one_phase_and_no_promise() -> None:
    config = {"model_type": "glm6v", "text_config": {"hidden_size": 128}, "vision_config": {"depth": 2}}

    coefficients = prior_coefficients(config, 2)

    assert not can_predict(config)
    assert coefficients.shape == (1, 5)
    assert (coefficients > 0).all()
