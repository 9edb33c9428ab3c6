"""Models of every family without memory for their weights, and checkpoints of them without data."""

import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from glm4v_batch.checkpoint import Checkpoint, read_checkpoint
from tests.tiny import ROOT

FAMILIES = ("glm4v", "glm46v", "glm46v_moe", "glm4v_moe", "glm_ocr")

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
_TEXT: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
    "pad_token_id": 0,
    "rope_parameters": _ROPE,
}
_MOE: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "depth": 11,
    "num_heads": 2,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "image_size": 56,
}
_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors of a file by name: safetensors' word for the type, and the shape."""


def small_model(
    family: str, dtype: torch.dtype = torch.float32, *, device: str = "meta", **changes: Any
) -> Any:
    """A model of *family*, random and small; *changes* are settings of its config."""
    is_moe = family.endswith("_moe")
    model_type = family.removesuffix("_moe") if family == "glm46v_moe" else family
    text = {**_TEXT, **(_MOE if is_moe else {})}
    if family == "glm46v_moe":
        text["model_type"] = "glm4v_moe_text"
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=dict(_VISION), **changes)
    return on_device(config, dtype, device)


def full_size_model(model_type: str) -> Any:
    """The model that the config class of *model_type* stands for, in bfloat16 on the meta device."""
    return on_device(CONFIG_MAPPING[model_type](), torch.bfloat16, "meta")


def on_device(config: Any, dtype: torch.dtype, device: str) -> Any:
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def stored_layout(model: Any, dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of *model* as checkpoints on the Hub have them: experts one by one."""
    return {
        name: (dtype, shape)
        for key, tensor in model.state_dict().items()
        for name, shape in _unfused(key, tuple(tensor.shape))
    }


def _unfused(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, _, part = key.rpartition(".mlp.experts.")
    if not prefix:
        yield key, shape
        return
    num_experts, rows, columns = shape
    for expert in range(num_experts):
        stem = f"{prefix}.mlp.experts.{expert}"
        if part == "gate_up_proj":
            yield f"{stem}.gate_proj.weight", (rows // 2, columns)
            yield f"{stem}.up_proj.weight", (rows // 2, columns)
        else:
            yield f"{stem}.{part}.weight", (rows, columns)


def write_checkpoint(folder: Path, config: Any, tensors: Stored, num_files: int = 1) -> Checkpoint:
    """A checkpoint of *tensors* in *folder*, whose files have their full length and hold no data."""
    shutil.copytree(ROOT / "data" / "tiny-glm4v", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config if isinstance(config, dict) else config.to_dict()))
    names = list(tensors)
    files = {f"model-{i}.safetensors": names[i::num_files] for i in range(num_files)}
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, held in files.items():
        _write_sparse(folder / file, {name: tensors[name] for name in held})
    return read_checkpoint(folder)


def _write_sparse(path: Path, tensors: Stored) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _DTYPES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
