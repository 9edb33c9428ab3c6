"""The driver keeps up with a fast engine, and its memory does not grow with the data."""

import io
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from glm4v_batch.job import read_job
from glm4v_batch.output import fingerprint
from glm4v_batch.parts import RESULT_FIELDS, PartInfo, commit
from glm4v_batch.plan import OpenJob, open_job
from tests.e2e.command import ROOT, command, run_command, write_job

ROWS_PER_SECOND = 2000
# Of what Pillow alone does before and after, on as many cores: 0.41 to 0.48 were measured.
SHARE_OF_PILLOW = 0.37
GIB = 1 << 30


def small_images(count: int) -> list[bytes]:
    """Encoded 64 × 64 pictures of coarse noise, JPEG and PNG by turns."""
    rng, images = np.random.default_rng(0), []
    for number in range(count):
        blocks = np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        buffer = io.BytesIO()
        Image.fromarray(blocks).save(buffer, "JPEG" if number % 2 else "PNG")
        images.append(buffer.getvalue())
    return images


def write_shards(folder: Path, num_rows: int, num_shards: int) -> None:
    folder.mkdir()
    images = small_images(100)
    for shard, rows in enumerate(np.array_split(np.arange(num_rows), num_shards)):
        columns = {
            "id": [f"id-{row}" for row in rows],
            "image": [images[row % 100] for row in rows],
            "title": [f"title {row}" for row in rows],
        }
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet", row_group_size=1000)


def resized_per_second(images: list[bytes]) -> float:
    """How many of *images* Pillow decodes and resizes in a second, on one core and without us."""
    began = time.monotonic()
    for data in images:
        Image.open(io.BytesIO(data)).convert("RGB").resize((84, 84), Image.Resampling.BICUBIC).tobytes()
    return len(images) / (time.monotonic() - began)


def pillow_alone() -> float:
    """Images that Pillow decodes and resizes in a second on two cores at once."""
    with ProcessPoolExecutor(2) as pool:
        return sum(pool.map(resized_per_second, [small_images(100) * 30] * 2))


def test_20000_rows_of_small_images_keep_up_at_2000_rows_a_second(tmp_path: Path) -> None:
    """A machine on which Pillow alone does too little for that may do less, in proportion."""
    write_shards(tmp_path / "source", num_rows=20_000, num_shards=4)

    # Three tries: what counts is what the code can do, not what else the machine did meanwhile.
    for attempt in range(3):
        job = write_job(
            tmp_path / "job.yaml", tmp_path / "source", tmp_path / f"out-{attempt}", rows_per_part=128
        )
        before = pillow_alone()
        finished = run_command("run", job, "--json")
        alone = (before + pillow_alone()) / 2
        assert finished.returncode == 0, finished.stderr
        rate = json.loads(finished.stdout)["run"]["rows_per_second"]
        sys.stderr.write(
            f"\necho engine, 20,000 rows of 64 × 64 pixels: {rate:,.0f} rows/s, {rate / alone:.2f} of what "
            f"Pillow alone does, {alone:,.0f} images/s\n"
        )
        if rate >= min(ROWS_PER_SECOND, SHARE_OF_PILLOW * alone):
            return
    pytest.fail("three tries were too slow")


def write_large_source(path: Path, num_rows: int, cell_bytes: int) -> None:
    """Rows whose images carry random bytes after their end, which decoders pass over."""
    path.parent.mkdir()
    rng, images = np.random.default_rng(0), small_images(100)
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("title", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, num_rows, 500):
            rows = range(first, min(first + 500, num_rows))
            noise = [images[row % 100] + rng.bytes(cell_bytes) for row in rows]
            columns = {"id": [f"id-{r}" for r in rows], "image": noise, "title": [f"title {r}" for r in rows]}
            writer.write_table(pa.table(columns, schema=schema))


def peak_rss(arguments: list[str]) -> int:
    """The most resident bytes that the process and all its children held together."""
    peak = 0
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for each in [tree, *tree.children(recursive=True)]:
                try:
                    total += each.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)
            time.sleep(0.05)
        assert process.returncode == 0
    return peak


def test_a_2_gb_source_runs_within_1_gb_of_memory(tmp_path: Path) -> None:
    source = tmp_path / "source" / "large.parquet"
    write_large_source(source, num_rows=10_000, cell_bytes=200_000)
    assert source.stat().st_size > 2_000_000_000
    job = write_job(tmp_path / "job.yaml", source.parent, tmp_path / "out", rows_per_part=128)

    peak = peak_rss(command("run", job))

    sys.stderr.write(f"\n2 GB source on the echo engine: peak {peak / GIB:.2f} GiB resident, all processes\n")
    source.unlink()
    assert peak < GIB


def commit_everything(opened: OpenJob, rows_per_part: int) -> int:
    """Commit an answer for each row, as runs of many nights would have; the number of parts."""
    names = {"id": "x", "text": "a caption", "status": "ok", "finish_reason": "stop", "title": "a title"}
    schema = pa.schema([*RESULT_FIELDS, pa.field("title", pa.string())])
    columns = {name: [names.get(name)] * rows_per_part for name in schema.names}
    table = pa.table(columns, schema=schema)
    folder = Path(opened.job.output.path)
    (folder / ".glm4v-batch" / "tmp").mkdir(parents=True)
    num_parts = 0
    for shard in opened.shards:
        assert shard.num_rows is not None
        for first_row in range(0, shard.num_rows, rows_per_part):
            info = PartInfo(
                fingerprint(opened.settings),
                opened.settings,
                shard.identity,
                first_row,
                rows_per_part,
                rows_per_part,
                0,
            )
            commit(folder, table, info)
            num_parts += 1
    return num_parts


def test_a_night_without_new_rows_over_a_million_done_takes_less_than_5_seconds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    columns = {"id": ["x"] * 50_000, "image": small_images(1) * 50_000, "title": ["a title"] * 50_000}
    for shard in range(20):
        pq.write_table(pa.table(columns), source / f"{shard}.parquet", row_group_size=1000)
    job = write_job(tmp_path / "job.yaml", source, tmp_path / "out", rows_per_part=500)
    assert commit_everything(open_job(read_job(job)), 500) == 2000

    seconds = []
    for _ in range(3):  # what counts is what the code can do, not what else the machine did meanwhile
        began = time.monotonic()
        finished = run_command("run", job)
        seconds.append(time.monotonic() - began)
        assert finished.returncode == 0, finished.stderr
        assert "all 1,000,000 rows are committed" in finished.stdout

    sys.stderr.write(f"\nnothing to do over 1,000,000 rows in 2,000 parts: {min(seconds):.2f} s\n")
    assert min(seconds) < 5
