"""Plan a model of GLM-4.5V's dimensions on the GPUs that are here: its config and headers alone, no weights.

Run from the repository's root; with CUDA GPUs the plan is for them:

    PYTHONPATH=pipeline:. python -m tests.gpu.plan_large FOLDER

The files of the checkpoint have their full length and hold no data, so that they take no room. "On paper"
is two bytes for each parameter that transformers counts on the meta device.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Glm4vMoeConfig

from tests.families import on_device, stored_layout, write_checkpoint
from tests.gpu.every_card import GIB, command, write_job
from tests.gpu.full_size import ROPE, copy_small_files, make_source

# zai-org/GLM-4.5V's config.json, as far as it differs from the class's defaults.
TEXT = {
    "num_hidden_layers": 46,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151552,
    "attention_bias": True,
    "rope_parameters": ROPE,
    "pad_token_id": 0,
}


def main() -> None:
    """Print the plan, and its weights beside the parameter count."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tiny = json.loads(Path("data/tiny-glm4v/config.json").read_text())
    config = Glm4vMoeConfig(text_config=TEXT, image_token_id=tiny["image_token_id"])
    model = on_device(config, torch.bfloat16, "meta")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    written = {**config.to_dict(), "dtype": "bfloat16"}
    written["text_config"]["eos_token_id"] = tiny["text_config"]["eos_token_id"]
    write_checkpoint(folder / "model", written, stored_layout(model), num_files=46)
    copy_small_files(folder / "model")
    make_source(folder / "source", 100)
    job = write_job(folder / "large.yaml", folder / "model", folder / "source", folder / "out", 128, "{}")
    for arguments in ((), ("--json",)):
        answer = subprocess.run(command("plan", job, *arguments), capture_output=True, text=True, check=False)
        shown = answer.stdout or answer.stderr
        if arguments and answer.returncode == 0:
            planned = json.loads(shown)["forecast"]["weight_bytes"]
            print(f"{num_parameters:,} parameters: {2 * num_parameters / GIB:.2f} GiB on paper, "
                  f"{planned / GIB:.2f} GiB by the plan")  # fmt: skip
        else:
            print(f"exit {answer.returncode}\n{shown}")


if __name__ == "__main__":
    main()
