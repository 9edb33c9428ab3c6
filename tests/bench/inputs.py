"""Write what a measurement reads: a checkpoint that ends no answer, and a workload as Parquet with JPEGs.

Each row has an image of its own: uint8 noise of a stream that is seeded with 0 and the row's number, so that
processes can share the work. Both are written once and used again.
"""

import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.workloads import Work, w1, w2
from tests.gpu.full_size import TINY

ModelSize = Literal["full", "tiny"]
WORKS = {"w1": w1, "w2": w2}
BASELINE_REQUESTS = 300
"""As many as vLLM was measured on. Of W2, 1,500 drawn anew are an eighth more work each: the tail is long."""
QUESTION = "Why would you say fog, mud make us glum?"
"""40 bytes; with the bundled tokenizer and template the prompt is as long as with the published ones."""
ROWS_PER_FILE = 64
_JPEG_QUALITY = 90


def checkpoint(folder: Path, size: ModelSize) -> Path:
    """The checkpoint below *folder*: random weights of GLM-4.1V-9B's dimensions, or the bundled tiny model.

    The full size is made by a process of its own on the first GPU, so that this one holds nothing there.
    """
    final, temporary = folder / f"model-{size}", folder / f"model-{size}.tmp"
    if final.is_dir():
        return final
    shutil.rmtree(temporary, ignore_errors=True)
    if size == "tiny":
        shutil.copytree(TINY, temporary)
    else:
        command = [sys.executable, "-m", "tests.gpu.full_size", "model", str(temporary)]
        subprocess.run(command, check=True)
    _never_end(temporary)
    temporary.rename(final)
    return final


def _never_end(folder: Path) -> None:
    # No token has the number after the last, so that no answer ends before its max_new_tokens.
    config = json.loads((folder / "config.json").read_text())
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    generation["eos_token_id"] = [config["text_config"]["vocab_size"]]
    path.write_text(json.dumps(generation, indent=2))


def source(folder: Path, name: str, num_rows: int) -> Path:
    """The workload *name* as Parquet files below *folder*: id, image, question, new_tokens."""
    # Of which draw is part of its name: they differ.
    drawn = f"{name}-{num_rows}-of-{min(num_rows, BASELINE_REQUESTS)}"
    final, temporary = folder / drawn, folder / f"{drawn}.tmp"
    if final.is_dir():
        return final
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    work = work_of(name, num_rows)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write_file, temporary, work), range(0, num_rows, ROWS_PER_FILE)))
    temporary.rename(final)
    return final


def work_of(name: str, num_rows: int) -> Work:
    """*num_rows* requests of the workload *name*, the first ones again and again beyond BASELINE_REQUESTS."""
    drawn = WORKS[name](min(num_rows, BASELINE_REQUESTS))
    return [drawn[row % len(drawn)] for row in range(num_rows)]


def _write_file(folder: Path, work: Work, start: int) -> None:
    rows = range(start, min(len(work), start + ROWS_PER_FILE))
    table = pa.table(
        {
            "id": [f"row-{row:06}" for row in rows],
            "image": [_noise(work[row][0], work[row][1], row) for row in rows],
            "question": [QUESTION] * len(rows),
            "new_tokens": [work[row][2] for row in rows],
        }
    )
    pq.write_table(table, folder / f"rows-{start:06}.parquet", row_group_size=16)


def _noise(width: int, height: int, row: int) -> bytes:
    pixels = np.random.default_rng([0, row]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
