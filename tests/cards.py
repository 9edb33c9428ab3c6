"""Made-up models and cards: what placement is decided by, without a checkpoint or a GPU."""

from typing import Any

from glm4v_batch.job import DeviceSettings
from glm4v_batch.layouts import Demand
from glm4v_batch.needs import ModelNeeds, ModuleNeed
from glm4v_batch.types import Device, RequestSize

GIB = 1 << 30

WORST = RequestSize(prompt_tokens=6_250, visual_patches=24_576, new_tokens=128)
"""One image at GLM-4.1V's limit of 4.8 megapixels."""

TYPICAL = RequestSize(prompt_tokens=1_041, visual_patches=3_996, new_tokens=128)
"""One image of 1036×756 pixels."""


def gpu(
    index: int, gib: float, *, name: str = "NVIDIA RTX", free: float | None = None, limit: float | None = None
) -> Device:
    """A card of *gib*, of which *free* GiB are free and *limit* may be used."""
    return Device(
        index=index,
        name=name,
        total_bytes=int(gib * GIB),
        free_bytes=int((gib if free is None else free) * GIB),
        uuid=f"GPU-{index}",
        limit_bytes=None if limit is None else int(limit * GIB),
    )


def gpus(*gib: float) -> list[Device]:
    """Cards of these sizes, all of it free, numbered from 0."""
    return [gpu(index, size) for index, size in enumerate(gib)]


def cpu(free: float, total: float = 64) -> Device:
    """A host with *free* GiB."""
    return Device(None, "CPU", int(total * GIB), int(free * GIB))


def demand(needs: ModelNeeds, host_bytes: float = 1e18, **settings: Any) -> Demand:
    """*needs* for the requests above, with *settings* of the section `devices`."""
    return Demand(needs, DeviceSettings(**settings), WORST, TYPICAL, host_bytes)


def needs_of(
    *,
    layers: int,
    blocks: int = 2,
    layer_bytes: int = 400 << 20,
    block_bytes: int = 50 << 20,
    embedding_bytes: int = 1 << 30,
    tied: bool = False,
    bytes_per_value: int = 2,
    **config: Any,
) -> ModelNeeds:
    """A dense model with GLM-4.1V's widths and weights of these sizes."""
    vision = [f"model.visual.blocks.{block}" for block in range(blocks)]
    text = [f"model.language_model.layers.{layer}" for layer in range(layers)]
    sizes = {
        "model.visual.patch_embed": 4 << 20,
        "model.visual.post_conv_layernorm": 3072,
        "model.visual.rotary_pos_emb": 0,
        "model.visual.embeddings": 2 << 20,
        **dict.fromkeys(vision, block_bytes),
        "model.visual.post_layernorm": 3072,
        "model.visual.downsample": 48 << 20,
        "model.visual.merger": 353 << 20,
        "model.language_model.embed_tokens": embedding_bytes,
        "model.language_model.rotary_emb": 0,
        **dict.fromkeys(text, layer_bytes),
        "model.language_model.norm": 8192,
        "lm_head": 0 if tied else embedding_bytes,
    }
    return ModelNeeds(
        modules=tuple(ModuleNeed(name, size) for name, size in sizes.items()),
        config={**_config(layers, blocks), "tie_word_embeddings": tied, **config},
        bytes_per_value=bytes_per_value,
    )


def glm_41v() -> ModelNeeds:
    """GLM-4.1V-9B in bfloat16: 10,292,777,472 parameters."""
    hidden, mlp, keys, vision, patch = 4096, 13696, 2 * 128, 1536, 3 * 2 * 14 * 14
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * keys + keys)
    values = {
        "model.visual.patch_embed": patch * vision + vision,
        "model.visual.post_conv_layernorm": vision,
        "model.visual.embeddings": 24 * 24 * vision,
        "model.visual.blocks": 2 * vision + 4 * vision * vision + 3 * vision * hidden,
        "model.visual.post_layernorm": vision,
        "model.visual.downsample": 4 * vision * hidden + hidden,
        "model.visual.merger": hidden * hidden + 2 * hidden + 3 * hidden * mlp,
        "model.language_model.embed_tokens": 151_552 * hidden,
        "model.language_model.layers": attention + 3 * hidden * mlp + 4 * hidden,
        "model.language_model.norm": hidden,
        "lm_head": 151_552 * hidden,
    }
    blank = needs_of(layers=40, blocks=24)
    return ModelNeeds(
        modules=tuple(ModuleNeed(m.name, 2 * _found(m.name, values)) for m in blank.modules),
        config=blank.config,
        bytes_per_value=2,
    )


def _found(name: str, values: dict[str, int]) -> int:
    stage, _, number = name.rpartition(".")
    return values.get(stage if number.isdigit() else name, 0)


def _config(layers: int, blocks: int) -> dict[str, Any]:
    text = {
        "model_type": "glm4v_text",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "vocab_size": 151_552,
    }
    vision = {
        "model_type": "glm4v_vision",
        "hidden_size": 1536,
        "depth": blocks,
        "num_heads": 12,
        "out_hidden_size": 4096,
        "intermediate_size": 13696,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return {"model_type": "glm4v", "text_config": text, "vision_config": vision}
