"""The bench counts the arithmetic that the model has, and its inputs are what they are said to be."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, Glm4vConfig

from glm4v_batch.checkpoint import read_checkpoint
from glm4v_batch.images import resized_size
from tests.bench.arithmetic import arithmetic_of
from tests.bench.inputs import QUESTION, checkpoint, source, work_of
from tests.bench.measure import Figures
from tests.bench.table import COLUMNS, table
from tests.bench.utilisation import Utilisation
from tests.bench.workloads import w1, w2
from tests.gpu.full_size import TINY, copy_small_files

CONFIG = Glm4vConfig()
SOME = Figures(
    engine="packed", work="w1", num_devices=1, cap_gib=24.0, rows=4, failed=0, wrong_length=0,
    images_per_second=18.0, images_per_second_overall=9.0, seconds=30.0, first_part_seconds=25.0,
    load_seconds=12.0, compile_seconds=10.0, vision_ms=18.5, prefill_ms=None, decode_ms=None,
    tflop_per_image=27.9, limit_fraction=0.62, idle_fraction=None, idle_fraction_nvml=0.01,
    peak_allocated_gib=22.0, peak_reserved_gib=None, out_of_memory=0,
    prompt_tokens=4164, completion_tokens=512,
)  # fmt: skip


def products(module: nn.Module) -> int:
    """Multiplications and additions of *module*'s matrices and convolutions for one position."""
    weights = [
        part.weight for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d))
    ]
    return 2 * sum(weight.numel() for weight in weights)


def test_the_arithmetic_is_that_of_the_weights_of_transformers_model() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG)
    vision = model.model.visual

    counted = arithmetic_of(CONFIG.to_dict())

    assert counted.patch == products(vision.patch_embed) + products(vision.blocks)
    assert counted.visual_token == products(vision.downsample) + products(vision.merger)
    assert counted.token == products(model.model.language_model.layers)
    assert counted.logits == products(model.lm_head)


def test_a_request_of_w1_takes_what_was_measured_against() -> None:
    teraflop = arithmetic_of(CONFIG.to_dict()).request(3996, 1041, 128) / 1e12

    assert teraflop == pytest.approx(27.8, rel=0.005)


def test_attention_counts_every_pair_of_patches_and_half_of_those_of_tokens() -> None:
    arithmetic = replace(arithmetic_of(CONFIG.to_dict()), patch=0, visual_token=0, token=0, logits=0)

    pairs = arithmetic.request(4, 3, 1)

    assert pairs == 16 * arithmetic.patch_pair + (1 + 2 + 3) * arithmetic.token_pair


def test_a_prompt_of_w1_is_as_long_as_with_the_published_tokenizer(tmp_path: Path) -> None:
    from glm4v_batch.prompts import PromptRenderer

    checkpoint(tmp_path, "tiny")
    copy_small_files(tmp_path / "model-tiny")
    read = read_checkpoint(tmp_path / "model-tiny")
    width, height, _ = w1(1)[0]

    rows, columns = (side // 28 for side in resized_size(height, width, read.images))
    prompt = PromptRenderer(read, system=None, user="{question}").render(
        {"question": QUESTION}, [rows * columns], 128
    )

    assert len(QUESTION.encode()) == 40
    assert (rows * columns, len(prompt)) == (999, 1041)


def test_no_token_ends_an_answer_of_the_bench(tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text())

    made = read_checkpoint(checkpoint(tmp_path, "tiny"))

    assert min(made.eos_token_ids) >= config["text_config"]["vocab_size"]


def test_every_row_has_an_image_of_its_own_and_the_work_that_it_stands_for(tmp_path: Path) -> None:
    folder = source(tmp_path, "w2", 66)

    files = sorted(folder.glob("*.parquet"))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    pictures = [Image.open(io.BytesIO(row["image"])) for row in rows]
    assert len(files) == 2
    assert [(*p.size, row["new_tokens"]) for p, row in zip(pictures, rows, strict=True)] == w2(66)
    assert {picture.format for picture in pictures} == {"JPEG"}
    assert len({np.asarray(picture).tobytes() for picture in pictures}) == 66


def test_a_long_run_is_the_work_of_the_baseline_over_and_over() -> None:
    assert work_of("w2", 700) == [*w2(300), *w2(300), *w2(300)[:100]]
    assert work_of("w2", 66) == w2(66)


def test_inputs_are_made_once(tmp_path: Path) -> None:
    first = source(tmp_path, "w1", 1)
    before = next(first.iterdir()).stat().st_mtime_ns

    again = source(tmp_path, "w1", 1)

    assert next(again.iterdir()).stat().st_mtime_ns == before


def test_idleness_is_that_between_two_moments() -> None:
    looks = Utilisation([(1.0, 0.0), (2.0, 1.0), (3.0, 0.5), (4.0, 0.0)])

    assert looks.idle_fraction(2.0, 3.5) == 0.25
    assert looks.idle_fraction(5.0, 6.0) is None


def test_the_table_shows_a_dash_for_what_nobody_measured() -> None:
    heading, _, line = table([SOME]).splitlines()

    cells = [cell.strip() for cell in line.strip("|").split("|")]
    shown = dict(zip([cell.strip() for cell in heading.strip("|").split("|")], cells, strict=True))
    assert tuple(shown) == tuple(COLUMNS)
    assert shown["load + compile + rest, s"] == "2.0 + 10.0 + 13.0"
    assert (shown["vision, ms"], shown["prefill, ms"], shown["idle"]) == ("18.5", "-", "-")
    assert (shown["images/s"], shown["of the limit"], shown["cap, GiB"]) == ("18.00", "62.0%", "24")
