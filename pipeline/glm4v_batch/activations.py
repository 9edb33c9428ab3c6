"""What a forward pass takes, from the architecture's dimensions.

The factors count the tensors that live at the same time at the peak of each phase: read in
transformers' modelling code and checked against live-byte traces of `generate()` under 5.17 and
5.23 (`tests/unit/test_activation_formulas.py`). Where the versions differ, the larger counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Dimensions = Mapping[str, int]

_FLOAT32_BYTES = 4

# A config.json may leave out what equals the default of its class. These are the defaults of
# transformers 5.23, models/{glm4v,glm4v_moe,glm_ocr}/configuration_*.py.
_TEXT_DEFAULTS: Mapping[str, Dimensions] = {
    "glm4v_text": {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
    },
    "glm4v_moe_text": {
        "vocab_size": 151424,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "glm_ocr_text": {
        "vocab_size": 59392,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
_VISION_DEFAULTS: Mapping[str, Dimensions] = {
    "glm4v_vision": {
        "hidden_size": 1536,
        "num_heads": 12,
        "out_hidden_size": 4096,
        "intermediate_size": 13696,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
    "glm_ocr_vision": {
        "hidden_size": 1024,
        "num_heads": 16,
        "out_hidden_size": 1536,
        "intermediate_size": 4096,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
}
_PARTS: Mapping[str, tuple[str, str]] = {
    "glm4v": ("glm4v_text", "glm4v_vision"),
    "glm46v": ("glm4v_text", "glm4v_vision"),
    "glm4v_moe": ("glm4v_moe_text", "glm4v_vision"),
    "glm_ocr": ("glm_ocr_text", "glm_ocr_vision"),
}


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """Which parts of a replica's work one of its devices does.

    *takes_inputs*: requests enter here with their pixels, are embedded, and get their next tokens
    chosen; *layers* is the share of the decoder's layers, from 0 to 1, and with it of the KV cache.
    """

    takes_inputs: bool = True
    has_vision: bool = True
    layers: float = 1.0
    has_head: bool = True


WHOLE = DeviceShare()
"""A device that does everything."""


@dataclass(frozen=True, slots=True)
class _Model:
    """The dimensions of a model, with the bytes of one value of its type."""

    text_type: str
    text: Dimensions
    vision_type: str
    vision: Dimensions
    value_bytes: int


def can_predict(config: Mapping[str, Any]) -> bool:
    """Whether the formulas here are those of the model that *config* (a config.json) describes.

    For any other model `prior_coefficients` gives dense GLM-4V's features with whatever dimensions
    *config* names: proportions to start from, not bytes to rely on (`MemoryModel`'s *must_probe*).
    """
    return config.get("model_type") in _PARTS


def prior_coefficients(
    config: Mapping[str, Any], bytes_per_value: int, share: DeviceShare = WHOLE
) -> FloatArray:
    """Bytes per feature in each phase, [phases, features], on a device that does *share* of the work.

    *config* is a checkpoint's config.json, *bytes_per_value* the size of the model's type. Phases are
    vision, prefill, decode; features are those of `BatchShape`, in its order. Activations are not
    divided among devices, as each runs its layers on all tokens; the KV cache is. Where `can_predict`
    says no there is one phase for any *share*: nothing is known of what dominates, or where.
    """
    model = _model_of(config, bytes_per_value)
    if can_predict(config):
        return _phases(model, share)
    one_phase: FloatArray = _phases(model, WHOLE).max(axis=0, keepdims=True)
    return one_phase


def packed_coefficients(
    config: Mapping[str, Any], bytes_per_value: int, share: DeviceShare = WHOLE
) -> FloatArray:
    """As `prior_coefficients`, for the packed engine: phases are a call of the vision tower and a step.

    A step's `padded_tokens` are all its tokens, none of them padding, and its `batch_size` the rows that
    get a next token. Keys and values are not counted: they lie in the pool (`pool_token_bytes`).
    """
    model = _model_of(config, bytes_per_value)
    vision = _vision_phase(model, share)
    vision[1] = 0.0  # no prompt is embedded yet
    step = [_logit_bytes(model, share), _token_bytes(model, share), 0.0, 0.0, 0.0]
    return np.array([vision, step])


def pool_token_bytes(config: Mapping[str, Any], bytes_per_value: int, share: DeviceShare = WHOLE) -> float:
    """What one token takes in the packed engine's pool of keys and values."""
    return _key_value_bytes(_model_of(config, bytes_per_value)) * share.layers


def feature_token_bytes(config: Mapping[str, Any], bytes_per_value: int) -> int:
    """What the features of one visual token take while they wait for their prompt's turn."""
    model = _model_of(config, bytes_per_value)
    return model.vision["out_hidden_size"] * model.value_bytes


def _phases(model: _Model, share: DeviceShare) -> FloatArray:
    return np.array([_vision_phase(model, share), _prefill_phase(model, share), _decode_phase(model, share)])


def _model_of(config: Mapping[str, Any], value_bytes: int) -> _Model:
    # A config without sections has the text model's keys at its top.
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    text_type, vision_type = _PARTS.get(str(config.get("model_type")), _PARTS["glm4v"])
    # glm46v wraps a dense or a mixture-of-experts text model: the section itself says which.
    text_type = text["model_type"] if text.get("model_type") in _TEXT_DEFAULTS else text_type
    return _Model(
        text_type,
        {**_TEXT_DEFAULTS[text_type], **_dimensions(text)},
        vision_type,
        {**_VISION_DEFAULTS[vision_type], **_dimensions(vision)},
        value_bytes,
    )


def _dimensions(section: Mapping[str, Any]) -> Dimensions:
    return {key: value for key, value in section.items() if isinstance(value, int)}


def _vision_phase(model: _Model, share: DeviceShare) -> list[float]:
    values, value_bytes = _values_per_patch(model), model.value_bytes
    # get_image_features casts the pixels where they are; a tower elsewhere gets a copy of the cast.
    cast = values * value_bytes if value_bytes < _FLOAT32_BYTES else 0
    if not share.has_vision:
        pixels = _normalising_bytes(model) if share.takes_inputs else 0.0
    elif share.takes_inputs:
        pixels = values * _FLOAT32_BYTES + cast + _tower_bytes(model)
    else:
        pixels = values * value_bytes + _tower_bytes(model)
    # transformers 5.17 embeds the prompt before it looks at the images, 5.23 after.
    embeds = model.text["hidden_size"] * value_bytes if share.takes_inputs else 0
    return [0.0, embeds, pixels, 0.0, 0.0]


def _prefill_phase(model: _Model, share: DeviceShare) -> list[float]:
    value_bytes = model.value_bytes
    # The last hidden states and the pooled features stay in generate()'s arguments; where the prompt
    # is embedded (the root's hook copies both there) they are concatenated once more.
    copies = 3 if share.takes_inputs else 2 if share.has_vision else 0
    tokens = _token_bytes(model, share) + _key_value_bytes(model) * share.layers
    # The boolean mask lives on; its additive copies only in attention, which takes less than the MLP. One
    # copy on top of the MLP is enough for prompts of up to ten thousand tokens, and a few percent too much.
    mask = 1.0 + value_bytes if share.layers else 1.25 if share.takes_inputs else 0.0
    per_patch = _held_pixel_bytes(model, share) + copies * _feature_bytes(model)
    return [_logit_bytes(model, share), tokens, per_patch, 0.0, mask]


def _decode_phase(model: _Model, share: DeviceShare) -> list[float]:
    # Before transformers 5.23 a padded batch copies one layer's keys and values for every query head.
    repeated = 2 * _query_width(model) * model.value_bytes if share.layers else 0
    per_patch = _held_pixel_bytes(model, share) + (2 * _feature_bytes(model) if share.has_vision else 0.0)
    per_request = max(_logit_bytes(model, share), _token_bytes(model, share))
    return [per_request, 0.0, per_patch, _key_value_bytes(model) * share.layers + repeated, 0.0]


def _values_per_patch(model: _Model) -> int:
    vision = model.vision
    return vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2


def _held_pixel_bytes(model: _Model, share: DeviceShare) -> int:
    """Float32 pixels per patch: the engine's arguments keep them to the end of the batch."""
    return _values_per_patch(model) * _FLOAT32_BYTES if share.takes_inputs else 0


def _normalising_bytes(model: _Model) -> float:
    """What turning uint8 patches into float32 pixels takes per patch: bytes, values, and all frames."""
    values = _values_per_patch(model)
    return values * _FLOAT32_BYTES + values * (_FLOAT32_BYTES + 1) / model.vision["temporal_patch_size"]


def _feature_bytes(model: _Model) -> float:
    """One copy of the image features, per patch."""
    vision = model.vision
    return vision["out_hidden_size"] * model.value_bytes / vision["spatial_merge_size"] ** 2


def _tower_bytes(model: _Model) -> float:
    """What the vision tower takes per patch beside its pixels: its largest part.

    Attention holds its input and the norm, queries, keys and values (for glm_ocr normalised copies of
    two of them). It peaks where keys are rotated, with float32 copies of queries and keys, rotated
    queries and three float32 tensors under way; in a float32 model, which copies nothing, at its end,
    with both rotated and three forms of the output. An MLP holds the block's input, its own and the
    norm, and three inner tensors.
    """
    vision, value_bytes = model.vision, model.value_bytes
    is_ocr = model.vision_type == "glm_ocr_vision"
    hidden, out = vision["hidden_size"], vision["out_hidden_size"]
    # In glm4v a block's MLP is as wide as the output and intermediate_size is the merger's.
    mlp_width = vision["intermediate_size"] if is_ocr else out
    merger_width = out * vision["in_channels"] if is_ocr else vision["intermediate_size"]
    num_inputs = 7 if is_ocr else 5
    num_float32 = 6 if value_bytes < _FLOAT32_BYTES else 4
    rotating = num_inputs * value_bytes + num_float32 * _FLOAT32_BYTES
    attention = hidden * max(rotating, (num_inputs + 5) * value_bytes)
    mlp = 3 * (hidden + mlp_width) * value_bytes
    merger = (2 * out + 3 * merger_width) * value_bytes / vision["spatial_merge_size"] ** 2
    # Cosines and sines in float32 and two int64 coordinates serve all blocks.
    shared = 2 * _FLOAT32_BYTES * (hidden // vision["num_heads"]) + 16
    return max(attention, mlp, merger) + shared


def _token_bytes(model: _Model, share: DeviceShare) -> float:
    """What one token takes in the largest module of the text model that the device runs."""
    hidden, value_bytes = model.text["hidden_size"], model.value_bytes
    modules = [0.0]
    if share.layers:
        modules.append(_layer_bytes(model))
    if share.takes_inputs:
        # Embeddings before and after the images go in; on CUDA masked_scatter expands the mask
        # (1 byte) and sums it up (int64).
        modules.append(hidden * (2 * value_bytes + 9))
    if share.has_head:
        # The final norm: its input and two float32 tensors.
        modules.append(hidden * (value_bytes + 2 * _FLOAT32_BYTES))
    return max(modules)


def _layer_bytes(model: _Model) -> float:
    """A decoder layer's peak per token, its KV cache aside.

    Around the inner part live the embedded prompt, the layer's input, the residual sum and its norm.
    Attention holds queries, keys and values repeated for every head, and two forms of its output.
    """
    text, value_bytes = model.text, model.value_bytes
    stream = 4 * text["hidden_size"] * value_bytes
    rotary = 2 * _head_dim(model) * value_bytes
    attention = 5 * _query_width(model) * value_bytes
    return stream + rotary + max(attention, _mlp_bytes(model))


def _mlp_bytes(model: _Model) -> float:
    text, value_bytes = model.text, model.value_bytes
    dense = text["intermediate_size"] * value_bytes
    if model.text_type != "glm4v_moe_text":
        # The fused projection (two widths), the activated gate and the product.
        return 4 * dense
    if text["first_k_dense_replace"] >= text["num_hidden_layers"]:
        return 3 * dense
    shared = text["n_shared_experts"] * text["moe_intermediate_size"] * value_bytes
    return max(3 * dense, _experts_bytes(model), text["hidden_size"] * value_bytes + 3 * shared)


def _experts_bytes(model: _Model) -> float:
    """The routed experts' peak per token (grouped_mm, transformers' default: integrations/moe.py).

    All of a token's experts run at once. At the end live the gathered inputs, the outputs, and the
    weighted outputs twice, the second time in the order of tokens; routing weights are float32, and
    so is what they multiply. In the middle live the inputs and four inner widths.
    """
    text, value_bytes = model.text, model.value_bytes
    hidden, chosen = text["hidden_size"], text["num_experts_per_tok"]
    end = hidden * (2 * value_bytes + 2 * _FLOAT32_BYTES)
    middle = (hidden + 4 * text["moe_intermediate_size"]) * value_bytes
    # Indices of the sort and its inverse, and the router's scores of all experts.
    routing = 40 * chosen + _FLOAT32_BYTES * text["n_routed_experts"]
    return chosen * max(end, middle) + routing


def _head_dim(model: _Model) -> int:
    return model.text.get("head_dim") or model.text["hidden_size"] // model.text["num_attention_heads"]


def _query_width(model: _Model) -> int:
    return model.text["num_attention_heads"] * _head_dim(model)


def _key_value_bytes(model: _Model) -> int:
    """The KV cache of one token in all layers."""
    width = model.text["num_key_value_heads"] * _head_dim(model)
    return 2 * model.text["num_hidden_layers"] * width * model.value_bytes


def _logit_bytes(model: _Model, share: DeviceShare) -> int:
    """Logits of one request: the model's type where the head is, and where tokens are chosen, which is
    where inputs enter (the root's hook returns them there), float32 twice beside it.
    """
    own = model.value_bytes if share.takes_inputs or share.has_head else 0
    return model.text["vocab_size"] * (own + (2 * _FLOAT32_BYTES if share.takes_inputs else 0))
