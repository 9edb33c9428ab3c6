"""Load a checkpoint with transformers, strictly: safetensors only, no remote code, every key in its place."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from glm4v_batch.errors import JobError

_DTYPES: Mapping[str, torch.dtype | str] = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def load_model(
    folder: Path, dtype: str, device_map: Mapping[str, str], offload_folder: Path | None = None
) -> PreTrainedModel:
    """The model of *folder* in *dtype*, each module on its device, ready to generate.

    *device_map* names torch devices, `cpu` or `disk`; what `disk` gets that its files do not hold as it
    is used goes to *offload_folder*. Raises JobError where the checkpoint's keys are not exactly the
    model's: transformers would fill what is missing with random numbers and go on.
    """
    transformers_logging.disable_progress_bar()
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=_DTYPES[dtype],
        device_map=_torch_map(device_map),
        offload_folder=offload_folder,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    _refuse_wrong_keys(folder, loading)
    check_placed(model, device_map)
    # Only what the job says counts; a checkpoint's own sampling settings would fill every gap.
    model.generation_config = GenerationConfig()
    model.eval()
    return model


def _torch_map(device_map: Mapping[str, str]) -> dict[str, Any]:
    """*device_map* with the cards in a form that puts accelerate's main device on the lowest one.

    accelerate lets requests enter through the first of the *set* of devices: of names that is any of
    them, with Python's hash seed. From the disk safetensors reads to names and numbers alone.
    """
    by_number = "disk" in device_map.values()
    return {
        module: spot if spot in ("cpu", "disk") else _card(spot, by_number=by_number)
        for module, spot in device_map.items()
    }


def _card(name: str, *, by_number: bool) -> torch.device | int:
    card = torch.device(name)
    return (card.index or 0) if by_number else card


def check_placed(model: torch.nn.Module, device_map: Mapping[str, str]) -> None:
    """Assert that every parameter and buffer of *model* lies where *device_map* says.

    What is offloaded stands as meta tensors between its uses, its buffers where it is executed; nothing
    else may be on meta.
    """
    is_spread = len(set(device_map.values())) > 1
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        spot = spot_of(name, device_map)
        if not (is_spread and spot in ("cpu", "disk")):
            assert tensor.device == torch.device(spot), f"{name} is on {tensor.device}, not on {spot}"
        elif isinstance(tensor, torch.nn.Parameter):
            assert tensor.is_meta, f"{name} is on {tensor.device}, not offloaded to {spot}"


def spot_of(name: str, device_map: Mapping[str, str]) -> str:
    """Where the tensor *name* belongs: the spot of the longest module name that is a prefix of it."""
    prefixes = [module for module in device_map if module in ("", name) or name.startswith(f"{module}.")]
    return device_map[max(prefixes, key=len)]


def _refuse_wrong_keys(folder: Path, loading: Mapping[str, Any]) -> None:
    problems = [
        f"  {len(loading[kind])} {what}, such as {_first(loading[kind])}"
        for kind, what in (
            ("missing_keys", "weights that the model needs are missing"),
            ("unexpected_keys", "weights that the model does not have"),
            ("mismatched_keys", "weights of another shape"),
        )
        if loading.get(kind)
    ]
    if problems:
        raise JobError(
            "\n".join([f"The checkpoint {folder} does not match its config.json:", *problems]),
            hint="Download it again, or convert it to the layout of this transformers version.",
        )


def _first(keys: Iterable[str | tuple[str, ...]]) -> str:
    # A mismatched key comes with both shapes.
    return min(key if isinstance(key, str) else key[0] for key in keys)
