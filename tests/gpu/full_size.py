"""Make a full-size random GLM-4.1V-9B checkpoint, and a Parquet source of pictures for it.

Run from the repository's root on a machine with a CUDA GPU:

    PYTHONPATH=pipeline:. python -m tests.gpu.full_size model FOLDER
    PYTHONPATH=pipeline:. python -m tests.gpu.full_size source FOLDER --rows 400

Weights are random, so that nothing is downloaded; dimensions, precision and memory are those of the
real model. Tokenizer and chat template are the bundled tiny model's, whose token ids the config takes over.
"""

import argparse
import io
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.workloads import w2

TINY = Path(__file__).parents[2] / "data" / "tiny-glm4v"
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
_TOKEN_IDS = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_ROWS_PER_FILE = 100
_SMALLEST_MEGAPIXELS = 0.05


def full_size_config(**text: Any) -> Any:
    """GLM-4.1V-9B's dimensions with the tiny model's token ids; *text* overrides the text model's."""
    from transformers import Glm4vConfig

    tiny = json.loads((TINY / "config.json").read_text())
    ids = {name: tiny[name] for name in _TOKEN_IDS if name in tiny}
    eos = tiny.get("eos_token_id") or tiny["text_config"]["eos_token_id"]
    return Glm4vConfig(
        text_config={"rope_parameters": ROPE, "pad_token_id": 0, "eos_token_id": eos, **text}, **ids
    )


def make_model(folder: Path) -> None:
    """Write the checkpoint: 19.2 GiB of bfloat16 in files of 4 GB."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(full_size_config(), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    copy_small_files(folder)


def copy_small_files(folder: Path) -> None:
    """Tokenizer and template of the tiny model, and the pixel limits of the published checkpoints."""
    for name in _COPIED:
        if (TINY / name).is_file():
            shutil.copy(TINY / name, folder / name)
    processor = json.loads((TINY / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 12544, "longest_edge": 9633792}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def sizes(num_rows: int) -> list[tuple[int, int]]:
    """Width and height of *num_rows* pictures: W2's, from 0.05 instead of 0.1 to 4.8 megapixels."""
    rng = np.random.default_rng(0)
    pictures = [(width, height) for width, height, _ in w2(num_rows)]
    # Every tenth is smaller than W2 has them.
    for row in range(0, num_rows, 10):
        side = int(np.sqrt(1e6 * rng.uniform(_SMALLEST_MEGAPIXELS, 0.1)))
        pictures[row] = (side, side)
    return pictures


def picture(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of soft noise: every one different, and cheap to make."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def make_source(folder: Path, num_rows: int) -> None:
    """Write Parquet files of 100 rows: id, image, question."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sizes(num_rows)
    with ProcessPoolExecutor() as pool:
        images = list(pool.map(picture, pictures, range(num_rows), chunksize=8))
    for start in range(0, num_rows, _ROWS_PER_FILE):
        rows = range(start, min(num_rows, start + _ROWS_PER_FILE))
        table = pa.table(
            {
                "id": [f"picture-{row}" for row in rows],
                "image": [images[row] for row in rows],
                "question": ["What is to be seen in this picture, in a few words?"] * len(rows),
            }
        )
        pq.write_table(table, folder / f"pictures-{start:05}.parquet", row_group_size=20)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["model", "source"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    options = parser.parse_args()
    if options.what == "model":
        make_model(options.folder)
    else:
        make_source(options.folder, options.rows)


if __name__ == "__main__":
    main()
