"""What all tests share: no network, and small sources of real images."""

import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from PIL import Image

MakeSource = Callable[..., Path]

# How long an example takes says how busy the machine is: no deadlines. A commit is tried with the same
# examples each time; `pytest -m hypothesis --hypothesis-profile new` looks for others.
settings.register_profile("new", deadline=None, derandomize=False, max_examples=1000, print_blob=True)
settings.register_profile("same", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("same")


def pytest_configure() -> None:
    """Runs that tests start must heed Ctrl-C, which a script's background jobs ignore and pass on."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def heeded_hangup() -> Iterator[None]:
    """SIGHUP as a terminal's child has it: under nohup the tests ignore it, and so would what they test."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def image_bytes(row: int, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    """An encoded image of one colour that depends on *row*."""
    colour = tuple(int(c) for c in np.random.default_rng(row).integers(0, 256, 3))
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Writes Parquet shards of small images: `make_source(num_rows, shards=2)` gives their folder."""

    def make(num_rows: int, *, shards: int = 1, broken: tuple[int, ...] = (), name: str = "source") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for shard, rows in enumerate(np.array_split(np.arange(num_rows), shards)):
            data = [b"not an image" if row in broken else image_bytes(int(row)) for row in rows]
            table = pa.table(
                {
                    "id": [f"id-{row}" for row in rows],
                    "image": data,
                    "title": [f"title {row}" for row in rows],
                }
            )
            pq.write_table(table, folder / f"shard-{shard}.parquet", row_group_size=50)
        return folder

    return make
