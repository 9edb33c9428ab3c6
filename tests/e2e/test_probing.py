"""A model whose formulas nobody wrote down: its memory is measured on single requests, then batches grow."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from glm4v_batch.activations import can_predict
from glm4v_batch.report import read_runs
from tests.e2e.command import MODEL, ROOT, run_command


@pytest.fixture
def unknown_model(tmp_path: Path) -> Path:
    """A random GLM-GA of the tiny model's dimensions."""
    folder = tmp_path / "unknown"
    shutil.copytree(MODEL, folder)
    config = json.loads((MODEL / "config.json").read_text())
    config["model_type"] = "glmga"
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def test_an_unknown_model_is_probed_one_request_at_a_time_first(tmp_path: Path, unknown_model: Path) -> None:
    assert not can_predict(json.loads((unknown_model / "config.json").read_text()))
    job = [
        ROOT / "jobs" / "question.yaml",
        *("--set", f"model.name={unknown_model}"),
        *("--set", f"output.path={tmp_path / 'out'}"),
        *("--set", "generation.max_new_tokens=2"),
    ]

    planned = run_command("plan", *job, "--limit", "40")
    finished = run_command("run", *job, "--limit", "40")

    assert planned.returncode == 0, planned.stderr
    assert finished.returncode == 0, finished.stderr
    sizes = [run.shape.batch_size for _, run in read_runs(tmp_path / "out")]
    assert sum(sizes) == 40
    assert sizes[:3] == [1, 1, 1]
    assert max(sizes) > 4
