"""What a model takes, read from its config and the headers of its weight files."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm4v_batch.checkpoint import Checkpoint, StoredTensor, stored_tensors

EMBEDDING = "model.language_model.embed_tokens"
HEAD = "lm_head"
_VISION = "model.visual."
_LAYERS = "model.language_model.layers."
_BLOCKS = "model.visual.blocks."

# The modules of transformers' Glm4v, Glm4vMoe, Glm46V and GlmOcr models that are not to be divided, in
# the order of their forward methods. A stage that a family lacks is passed over.
_STAGES = (
    "model.visual.patch_embed",
    "model.visual.post_conv_layernorm",
    "model.visual.rotary_pos_emb",
    "model.visual.embeddings",
    "model.visual.blocks",
    "model.visual.post_layernorm",
    "model.visual.downsample",
    "model.visual.merger",
    EMBEDDING,
    "model.language_model.rotary_emb",
    "model.language_model.layers",
    "model.language_model.norm",
    HEAD,
)
# Without tensors in the files: their buffers are computed, and a device map must cover them all the same.
_COMPUTED = ("model.visual.rotary_pos_emb", "model.language_model.rotary_emb")
_MODULE = re.compile(rf"((?:{'|'.join(map(re.escape, _STAGES))})(?:\.\d+)?)\.")

_STORED_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
# `_keep_in_fp32_modules_strict` of the MoE families, whatever the precision asked for.
_KEPT_IN_FLOAT32 = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class ModuleNeed:
    """A part of the model that lies whole on one device. What has no weights of its own takes 0 bytes."""

    name: str
    weight_bytes: int

    @property
    def is_vision(self) -> bool:
        """Whether it is a part of the vision tower."""
        return self.name.startswith(_VISION)

    @property
    def layer(self) -> int | None:
        """Which decoder layer it is, from 0; None for anything else."""
        return int(self.name.removeprefix(_LAYERS)) if self.name.startswith(_LAYERS) else None


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What a model takes before any batch.

    *modules* covers every parameter and buffer, in the order that a request passes them; *config* is
    the checkpoint's config.json; activations and the KV cache take *bytes_per_value* each.
    """

    modules: tuple[ModuleNeed, ...]
    config: Mapping[str, Any]
    bytes_per_value: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(module.weight_bytes for module in self.modules)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(module.layer is not None for module in self.modules)

    @property
    def is_head_tied(self) -> bool:
        """Whether the head computes with the embedding's weights, and so lies on its device."""
        return _is_head_tied(self.config)

    @property
    def patches_per_token(self) -> int:
        """Visual patches that become one visual token."""
        return int(_vision(self.config).get("spatial_merge_size", 2)) ** 2

    @property
    def pixels_per_token(self) -> int:
        """Pixels of an image that become one visual token."""
        return int(_vision(self.config).get("patch_size", 14)) ** 2 * self.patches_per_token


def read_needs(checkpoint: Checkpoint, dtype: str) -> ModelNeeds:
    """What *checkpoint* takes in the precision *dtype*, a value of `model.dtype`.

    Floating weights count in that precision, quantised ones (integers, 8-bit floats) as stored.
    Tensors that the model does not have, such as layers that predict several tokens, do not count.
    """
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    tensors = [item for path in checkpoint.weight_files for item in stored_tensors(path).items()]
    value_bytes = _value_bytes(checkpoint, dtype, tensors)
    sizes: defaultdict[str, int] = defaultdict(int, dict.fromkeys(_COMPUTED, 0))
    for name, tensor in tensors:
        module = _module_of(name, config)
        if module is not None:
            sizes[module] += _loaded_bytes(name, tensor, value_bytes)
    if _is_head_tied(config):
        sizes[HEAD] = 0
    modules = tuple(ModuleNeed(name, sizes[name]) for name in sorted(sizes, key=_place_in_order))
    return ModelNeeds(modules, config, value_bytes)


def _module_of(tensor_name: str, config: Mapping[str, Any]) -> str | None:
    match = _MODULE.match(tensor_name)
    if match is None:
        return None
    stage, _, number = match[1].rpartition(".")
    counts = {_LAYERS: _text(config).get("num_hidden_layers"), _BLOCKS: _vision(config).get("depth")}
    count = counts.get(f"{stage}.")
    return match[1] if count is None or int(number) < count else None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("vision_config") or {}


def _place_in_order(name: str) -> tuple[int, int]:
    stage, _, number = name.rpartition(".")
    return (_STAGES.index(stage), int(number)) if number.isdigit() else (_STAGES.index(name), 0)


def _is_head_tied(config: Mapping[str, Any]) -> bool:
    # Before transformers 5 it stood in text_config, where 5 still finds it, but not for GLM-4.6V's classes.
    is_46v = config.get("model_type") in ("glm46v", "glmga")
    sections = (config,) if is_46v else (config, _text(config))
    return any(section.get("tie_word_embeddings", False) for section in sections)


def _value_bytes(checkpoint: Checkpoint, dtype: str, tensors: list[tuple[str, StoredTensor]]) -> int:
    named = checkpoint.dtype if dtype == "auto" else dtype
    if named is not None:
        return 4 if named == "float32" else 2
    # As transformers does where a config names none: the first floating tensor decides.
    return next((_STORED_FLOATS[t.dtype] for _, t in tensors if t.dtype in _STORED_FLOATS), 4)


def _loaded_bytes(name: str, tensor: StoredTensor, value_bytes: int) -> int:
    if tensor.dtype not in _STORED_FLOATS:
        return tensor.num_bytes
    kept = name.endswith(_KEPT_IN_FLOAT32)
    return tensor.num_values * (max(value_bytes, 4) if kept else value_bytes)
