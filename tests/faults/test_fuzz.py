"""Damaged bytes, thousands of them: an answer or a known failure for each image, a name for each file."""

import io
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from glm4v_batch.checkpoint import read_checkpoint
from glm4v_batch.errors import SourceError
from glm4v_batch.failure_codes import FAILURE_KINDS
from glm4v_batch.job import ParquetSettings
from glm4v_batch.meters import HostMeter
from glm4v_batch.prepare import Preprocessor, PreprocessSettings
from glm4v_batch.preprocess import _Workers
from glm4v_batch.sources import RecordColumns, open_source
from glm4v_batch.types import Chunk, Failure, ImageRef, Record
from tests.e2e.command import MODEL

WANTS_ALL = os.environ.get("FAULTS") == "all"
NUM_IMAGES = 20_000 if WANTS_ALL else 1_000
NUM_FILES = 600 if WANTS_ALL else 40
GIB = 1 << 30
FUZZING = settings(
    deadline=None, database=None, derandomize=not WANTS_ALL, suppress_health_check=list(HealthCheck)
)
RecordProperty = Callable[[str, object], None]


def small_images() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        name: (name, "RGB", {}) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    }
    kinds |= {
        "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
        "CMYK JPEG": ("JPEG", "CMYK", {}),
        "palette PNG": ("PNG", "P", {}),
        "LZW TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        "JPEG TIFF": ("TIFF", "RGB", {"compression": "jpeg"}),
        "fax TIFF": ("TIFF", "1", {"compression": "group4"}),
        "lossless WebP": ("WEBP", "RGBA", {"lossless": True}),
    }
    images = {}
    for name, (kind, mode, options) in kinds.items():
        buffer = io.BytesIO()
        noise.convert(mode).save(buffer, kind, **options)
        images[name] = buffer.getvalue()
    return images


IMAGES = small_images()


def damaged(choice: st.DataObject, whole: bytes, first: int = 0) -> bytes:
    """*whole* with some bytes from *first* on changed, left out, repeated, or cut off."""
    data = bytearray(whole)
    for _ in range(choice.draw(st.integers(1, 5))):
        at = choice.draw(st.integers(first, max(first, len(data) - 1)))
        match choice.draw(st.sampled_from(["flip", "set", "drop", "repeat", "cut"])):
            case "flip":
                data[at : at + 1] = bytes(
                    byte ^ 1 << choice.draw(st.integers(0, 7)) for byte in data[at : at + 1]
                )
            case "set":
                data[at : at + 1] = bytes([choice.draw(st.sampled_from([0, 1, 127, 128, 255]))])
            case "drop":
                del data[at : at + choice.draw(st.integers(1, 8))]
            case "repeat":
                data[at:at] = data[at : at + choice.draw(st.integers(1, 64))]
            case "cut" if choice.draw(st.integers(0, 9)) == 0:
                del data[at:]
    return bytes(data)


def test_any_bytes_are_an_answer_or_a_failure_with_a_known_code(record_property: RecordProperty) -> None:
    outcomes: Counter[str] = Counter()
    prepared_by = PreprocessSettings(
        checkpoint=read_checkpoint(MODEL), system=None, user="Describe.", max_new_tokens=8
    )
    with _Workers(1, prepared_by, Preprocessor) as workers:

        @settings(FUZZING, max_examples=NUM_IMAGES)
        @given(st.data())
        def each(choice: st.DataObject) -> None:
            data = damaged(choice, IMAGES[choice.draw(st.sampled_from(sorted(IMAGES)))])
            item = (Chunk("s", 0, 1), Record("a", "s", 0, (ImageRef(data=data),), {}))
            (result,) = workers.results([item], workers.submit([item]))
            outcomes[result.code if isinstance(result, Failure) else "ok"] += 1
            # A crash would be contained, and would still be news.
            assert not isinstance(result, Failure) or result.code.startswith("image_"), result

        each()

    assert set(outcomes) <= {*FAILURE_KINDS, "ok"}
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    record_property("fault", f"fuzzed images: {outcomes.total()} tried ({counts}), 0 violations")


def small_files() -> list[bytes]:
    images = [np.random.default_rng(row).bytes(200) for row in range(30)]
    plain = pa.table({"image": images, "title": [f"t{row % 3}" for row in range(30)], "n": list(range(30))})
    structs = pa.array([[{"bytes": image, "path": None}] * (len(image) % 3) for image in images])
    nested = plain.set_column(0, "image", structs)
    files = []
    for table in (plain, nested):
        for options in (
            {"compression": "none", "use_dictionary": False},
            {"compression": "zstd", "write_page_checksum": True},
            {"compression": "snappy", "data_page_version": "2.0"},
        ):
            buffer = io.BytesIO()
            pq.write_table(table, buffer, row_group_size=12, **options)
            files.append(buffer.getvalue())
    return files


FILES = small_files()


def test_any_file_is_read_or_refused_by_name(tmp_path: Path, record_property: RecordProperty) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "damaged.parquet"

    @settings(FUZZING, max_examples=NUM_FILES)
    @given(st.data())
    def each(choice: st.DataObject) -> None:
        whole = choice.draw(st.sampled_from(FILES))
        # Half of them in the footer, where all offsets and sizes stand.
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        path.write_bytes(damaged(choice, whole, choice.draw(st.sampled_from([0, footer]))))
        try:
            read_all(path)
            outcomes["read"] += 1
        except SourceError as error:
            outcomes["refused" if path.name in str(error) else f"refused without its name: {error}"] += 1

    # Of this process, which other tests may have made large, only what it grows by.
    with HostMeter().watch():
        held_bytes = HostMeter().held_bytes()[0]
        each()
    grown_bytes = max(0, HostMeter().peak_bytes()[0] - held_bytes)

    assert set(outcomes) <= {"read", "refused"}
    record_property(
        "fault",
        f"fuzzed Parquet files: {outcomes.total()} tried ({outcomes['refused']} refused), 0 violations; "
        f"the process that asked grew by {grown_bytes / GIB:.2f} GiB at most",
    )
    assert sys.platform != "linux" or grown_bytes < GIB


def read_all(path: Path) -> int:
    """How many rows can be read, 10,000 at most: a footer may claim more than there are atoms."""
    columns = RecordColumns(("title",), ("n",))
    source = open_source(ParquetSettings(kind="parquet", path=str(path)), columns)
    num_rows = 0
    for shard in source.shards():
        for chunk in source.chunks(shard, [range(min(10_000, shard.num_rows or 0))], 16):
            num_rows += sum(1 for _ in source.read(chunk))
    return num_rows
