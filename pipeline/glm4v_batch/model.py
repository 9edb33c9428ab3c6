"""Load a checkpoint with transformers, strictly: safetensors only, no remote code, every key in its place."""

from collections.abc import Iterable, Mapping
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


def load_model(folder: Path, dtype: str, device_map: Mapping[str, str]) -> PreTrainedModel:
    """The model of *folder* in *dtype*, each module on its device, ready to generate.

    Raises JobError where the checkpoint's keys are not exactly the model's: transformers would
    fill what is missing with random numbers and go on.
    """
    transformers_logging.disable_progress_bar()
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=_DTYPES[dtype],
        device_map=dict(device_map),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    _refuse_wrong_keys(folder, loading)
    # Only what the job says counts; a checkpoint's own sampling settings would fill every gap.
    model.generation_config = GenerationConfig()
    model.eval()
    return model


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
