"""What a model takes, by its config and the headers of its weight files, against transformers' own models."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from glm4v_batch.needs import ModelNeeds, read_needs
from tests.families import FAMILIES, full_size_model, on_device, small_model, stored_layout, write_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sizes_of(model: Any, names: list[str]) -> dict[str, int]:
    """Bytes of the parameters and of the saved buffers of each of the modules *names*."""
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return {
        name: sum(t.numel() * t.element_size() for key, t in state.items() if key.startswith(f"{name}."))
        for name in names
    }


def sizes_in(needs: ModelNeeds) -> dict[str, int]:
    return {module.name: module.weight_bytes for module in needs.modules}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_module_takes_what_transformers_makes_of_it(family: str, dtype: str, tmp_path: Path) -> None:
    model = small_model(family, DTYPES[dtype])
    checkpoint = write_checkpoint(tmp_path / "model", model.config, stored_layout(model), num_files=3)

    needs = read_needs(checkpoint, dtype)

    assert sizes_in(needs) == sizes_of(model, [module.name for module in needs.modules])
    assert needs.num_layers == 3
    assert needs.bytes_per_value == DTYPES[dtype].itemsize


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_and_buffer_is_in_one_module(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    needs = read_needs(write_checkpoint(tmp_path / "model", model.config, stored_layout(model)), "auto")

    holders = {
        name: [module.name for module in needs.modules if name.startswith(f"{module.name}.")]
        for name, _ in [*model.named_parameters(), *model.named_buffers()]
    }

    assert {len(found) for found in holders.values()} == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_stand_in_the_order_that_a_request_passes_them(family: str, tmp_path: Path) -> None:
    model = small_model(family, device="cpu")
    needs = read_needs(write_checkpoint(tmp_path / "model", model.config, stored_layout(model)), "auto")
    called: list[str] = []
    for module in needs.modules:
        model.get_submodule(module.name).register_forward_hook(partial(note_call, called, module.name))

    pass_through(model)

    assert called == [module.name for module in needs.modules]


def note_call(called: list[str], name: str, *_call: Any) -> None:
    called.append(name)


@torch.inference_mode()
def pass_through(model: Any) -> None:
    """An image of four patches through the vision tower, five tokens through the text model."""
    model.model.visual(torch.zeros((4, 3 * 2 * 14 * 14)), grid_thw=torch.tensor([[1, 2, 2]]))
    text = model.model.language_model(input_ids=torch.zeros((1, 5), dtype=torch.long), use_cache=False)
    model.lm_head(text.last_hidden_state)


@pytest.mark.parametrize(
    ("model_type", "num_parameters"), [("glm4v", 10_292_777_472), ("glm4v_moe", 104_372_866_880)]
)
def test_full_size_models_are_counted_to_the_byte(
    model_type: str, num_parameters: int, tmp_path: Path
) -> None:
    model = full_size_model(model_type)
    checkpoint = write_checkpoint(tmp_path / "model", model.config, stored_layout(model), num_files=47)

    needs = read_needs(checkpoint, "auto")

    assert sizes_in(needs) == sizes_of(model, [module.name for module in needs.modules])
    # The router's correction, a float32 for each of 128 experts in 45 layers, is no parameter.
    corrections = 45 * 128 * 4 if model_type == "glm4v_moe" else 0
    assert needs.weight_bytes == 2 * num_parameters + corrections


def test_layers_that_predict_several_tokens_do_not_count(tmp_path: Path) -> None:
    model = small_model("glm4v_moe")
    stored = stored_layout(model)
    extra = {name.replace("layers.2.", "layers.3."): t for name, t in stored.items() if ".layers.2." in name}
    extra["model.language_model.layers.3.eh_proj.weight"] = ("BF16", (64, 128))
    extra["model.layers.46.enorm.weight"] = ("BF16", (64,))

    plain = read_needs(write_checkpoint(tmp_path / "plain", model.config, stored), "auto")
    longer = read_needs(write_checkpoint(tmp_path / "longer", model.config, {**stored, **extra}), "auto")

    assert longer.modules == plain.modules


def test_a_tied_head_has_a_place_and_no_weights_of_its_own(tmp_path: Path) -> None:
    model = small_model("glm4v", tie_word_embeddings=True)
    stored = stored_layout(model)
    del stored["lm_head.weight"]

    needs = read_needs(write_checkpoint(tmp_path / "model", model.config, stored), "auto")

    assert needs.is_head_tied
    assert needs.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert sizes_in(needs)["lm_head"] == 0


def test_a_tie_that_only_the_text_config_names_counts_too(tmp_path: Path) -> None:
    model = small_model("glm4v")
    config = model.config.to_dict()
    config["text_config"]["tie_word_embeddings"] = True

    needs = read_needs(write_checkpoint(tmp_path / "model", config, stored_layout(model)), "auto")

    assert needs.is_head_tied


def test_quantised_tensors_count_as_they_are_stored(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    tensors = {
        name: ("F8_E4M3", (64, 64)),
        f"{name}_scale": ("F32", (64, 1)),
        "model.language_model.layers.1.mlp.down_proj.weight": ("I8", (10, 10)),
    }
    checkpoint = write_checkpoint(tmp_path / "model", small_model("glm4v").config.to_dict(), tensors)

    needs = read_needs(checkpoint, "bfloat16")

    sizes = sizes_in(needs)
    assert sizes["model.language_model.layers.0"] == 64 * 64 + 2 * 64
    assert sizes["model.language_model.layers.1"] == 100


@pytest.mark.parametrize(("stored", "value_bytes"), [("F32", 4), ("F16", 2)])
def test_without_a_dtype_in_the_config_the_weights_decide(
    stored: str, value_bytes: int, tmp_path: Path
) -> None:
    model = small_model("glm4v")
    config = model.config.to_dict()
    for section in (config, config["text_config"], config["vision_config"]):
        section.pop("dtype", None)

    needs = read_needs(write_checkpoint(tmp_path / "model", config, stored_layout(model, stored)), "auto")

    assert needs.bytes_per_value == value_bytes
    assert needs.weight_bytes == value_bytes * sum(p.numel() for p in model.parameters())


def test_an_older_layout_is_read_without_a_crash(tmp_path: Path) -> None:
    model = small_model("glm4v")
    older = {name.replace("language_model.", ""): t for name, t in stored_layout(model).items()}

    needs = read_needs(write_checkpoint(tmp_path / "model", model.config, older), "auto")

    assert needs.num_layers == 0


def test_a_token_stands_for_784_pixels_and_4_patches(tmp_path: Path) -> None:
    model = small_model("glm4v")

    needs = read_needs(write_checkpoint(tmp_path / "model", model.config, stored_layout(model)), "auto")

    assert needs.pixels_per_token == 28 * 28
    assert needs.patches_per_token == 4


@pytest.mark.parametrize("model_type", ["glm4v", "glm46v", "glmga"])
def test_a_head_is_tied_by_the_key_that_transformers_reads(tmp_path: Path, model_type: str) -> None:
    config = small_model("glm4v").config.to_dict()
    config.update(model_type=model_type, tie_word_embeddings=False)
    config["text_config"]["tie_word_embeddings"] = True
    model = on_device(CONFIG_MAPPING[model_type].from_dict(config), torch.float32, "meta")

    needs = read_needs(write_checkpoint(tmp_path / "model", config, stored_layout(model)), "auto")

    assert needs.is_head_tied == (model.lm_head.weight is model.get_input_embeddings().weight)
