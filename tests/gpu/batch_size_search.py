"""Let the generate engine find its batch size on a full-size random GLM-4.1V-9B; print what it predicted.

Run from the repository's root on a machine with a CUDA GPU:

    PYTHONPATH=pipeline:. python -m tests.gpu.batch_size_search --requests 300 --cap-gib 24

Weights are random, so that nothing is downloaded; dimensions, precision and memory are those of the
real model. Work is W2 of tests/bench/workloads.py: photo-like sizes from 0.1 to 4.8 megapixels.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, GenerationConfig, Glm4vConfig

from glm4v_batch.activations import prior_coefficients
from glm4v_batch.checkpoint import ImageProcessing
from glm4v_batch.devices import let_segments_grow
from glm4v_batch.engines.generate import GenerateEngine, Vocabulary
from glm4v_batch.images import normalisation_table, resized_size
from glm4v_batch.job import GenerationSettings
from glm4v_batch.memory import MemoryModel
from glm4v_batch.meters import CudaMeter
from glm4v_batch.report import batch_figures
from glm4v_batch.types import BatchRun, Completion, Failure, ModelInputs, Request
from tests.bench.workloads import w2

GIB = 1 << 30
PROCESSING = ImageProcessing(max_frame_pixels=9_633_792, min_frame_pixels=12_544)
TEXT_TOKENS = 42


def random_model() -> Any:
    """GLM-4.1V-9B's dimensions with random weights, bfloat16, on the GPU."""
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [8, 12, 12],
    }
    config = Glm4vConfig(text_config={"rope_parameters": rope, "pad_token_id": 151329})
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig()
    return model.eval()


def requests(model: Any, count: int, new_tokens: int) -> Iterator[Request]:
    """W2's pictures as uint8 noise, in the shape that preprocessing gives them."""
    rng = np.random.default_rng(0)
    for row, (width, height, _) in enumerate(w2(count)):
        rows, columns = (side // PROCESSING.patch_size for side in resized_size(height, width, PROCESSING))
        tokens = rows * columns // 4
        ids = np.full(tokens + TEXT_TOKENS, 1000, np.int32)
        ids[4 : 4 + tokens] = model.config.image_token_id
        patches = rng.integers(0, 256, (rows * columns, 588), dtype=np.uint8)
        inputs = ModelInputs(ids, patches, ((1, rows, columns),))
        yield Request(f"r{row}", "w2", row, len(ids), rows * columns, new_tokens, inputs)


def engine(model: Any, new_tokens: int) -> tuple[GenerateEngine, CudaMeter]:
    """The engine as a run builds it, with the prior of the architecture and no samples."""
    meter = CudaMeter([0])
    vocabulary = Vocabulary(
        image_token_id=model.config.image_token_id,
        eos_token_ids=(151329,),
        decode=lambda ids: f"{len(ids)} tokens",
        normalisation=normalisation_table(PROCESSING),
        temporal_patch_size=2,
    )
    memory = MemoryModel(meter.held_bytes(), [prior_coefficients(model.config.to_dict(), 2)])
    settings = GenerationSettings(max_new_tokens=new_tokens)
    return GenerateEngine(model, vocabulary, settings, memory, meter, memory_fraction=0.92), meter


def show(run: BatchRun) -> None:
    """One line for one batch."""
    shape = run.shape
    print(
        f"batch {shape.batch_size:4d}  longest {shape.padded_tokens // shape.batch_size:5d}  "
        f"patches {shape.visual_patches:7d}  predicted {run.predicted_bytes[0] / GIB:6.2f}  "
        f"measured {run.peak_bytes[0] / GIB:6.2f}  budget {run.budget_bytes[0] / GIB:6.2f} GiB  "
        f"{run.seconds:5.1f} s{'  OUT OF MEMORY' if run.out_of_memory else ''}",
        flush=True,
    )


def summary(runs: Sequence[BatchRun], num_ok: int, num_failed: int, seconds: float) -> str:
    """The figures of the search in one line."""
    figures = batch_figures(runs)
    late = [run for run in runs[len(runs) // 2 :] if not run.out_of_memory]
    errors = sorted(abs(r.predicted_bytes[0] - r.peak_bytes[0]) / r.peak_bytes[0] for r in late)
    return (
        f"{num_ok} ok, {num_failed} failed in {seconds:.0f} s ({num_ok / seconds:.2f} images/s); "
        f"{figures['num']} batches, largest {figures['largest']}, {figures['out_of_memory']} out of memory; "
        f"median {figures['budget_used_median']:.1%} of the budget; predicted against measured, p95: "
        f"{figures['prediction_error_p95']:.1%}, in the second half {errors[int(0.95 * len(errors))]:.1%}"
    )


def search(model: Any, count: int, new_tokens: int) -> None:
    """Run the work and print every batch, then the figures."""
    built, meter = engine(model, new_tokens)
    limit = meter.limit_bytes()[0]
    print(f"weights {meter.held_bytes()[0] / GIB:.2f} GiB, limit {limit / GIB:.2f} GiB")
    runs, ended, started = [], [], time.perf_counter()
    for event in built.run(requests(model, count, new_tokens)):
        match event:
            case BatchRun():
                runs.append(event)
                show(event)
            case Completion() | Failure():
                ended.append(event)
    num_ok = sum(isinstance(each, Completion) for each in ended)
    assert sorted(each.row for each in ended) == list(range(count)), "a request is lost or doubled"
    print(summary(runs, num_ok, len(ended) - num_ok, time.perf_counter() - started), flush=True)


def environment() -> str:
    """Hardware, versions and commit, for the record."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, "
        f"Python {sys.version.split()[0]}, commit {commit or 'unknown'}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--cap-gib", type=float, help="stand for a smaller card")
    options = parser.parse_args()
    let_segments_grow()
    print(environment())
    if options.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / total)
    search(random_model(), options.requests, options.new_tokens)


if __name__ == "__main__":
    main()
