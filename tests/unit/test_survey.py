"""What a survey reads, how little of it, and that its sizes are those of the real requests."""

import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_batch.checkpoint import ImageProcessing
from glm4v_batch.errors import RecordError
from glm4v_batch.images import resized_size, visual_tokens
from glm4v_batch.job import DatasetSettings
from glm4v_batch.plan import open_job, preprocess_settings
from glm4v_batch.prepare import Preprocessor, PreprocessSettings
from glm4v_batch.sources import RecordColumns, Shard, cut, open_source
from glm4v_batch.survey import SampleLimits, Survey, most_visual_tokens, survey, worst_case
from glm4v_batch.types import ENDLESS, Chunk, ImageRef, Record, Request, RequestSize
from tests.conftest import MakeSource, image_bytes
from tests.tiny import job_of, sample

IMAGE = ImageRef(data=image_bytes(0))


@dataclass
class FakeSource:
    """Shards of equal small images. Opening a chunk and passing over a row take time on its own clock."""

    lengths: dict[str, int | None]
    opening_seconds: float = 0.0
    seconds_per_row: float = 0.0
    with_title: Container[tuple[str, int]] | None = None
    now: float = 0.0
    read_rows: list[tuple[str, int]] = field(default_factory=list)
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    root: str | None = None

    def clock(self) -> float:
        return self.now

    def shards(self) -> Sequence[Shard]:
        return [Shard(path, num_rows, {}) for path, num_rows in self.lengths.items()]

    def chunks(self, shard: Shard, gaps: Iterable[range], rows_per_chunk: int) -> Iterator[Chunk]:
        return (Chunk(shard.path, rows.start, len(rows)) for rows in cut(gaps, rows_per_chunk))

    def read(self, chunk: Chunk) -> Iterator[Record]:
        self.now += self.opening_seconds + chunk.first_row * self.seconds_per_row
        for row in chunk.rows:
            self.now += self.seconds_per_row
            self.read_rows.append((chunk.source, row))
            has_title = self.with_title is None or (chunk.source, row) in self.with_title
            fields = {"title": "a title" if has_title else None}
            yield Record(f"{row}", chunk.source, row, (IMAGE,), fields)


@cache
def settings_of(name: str, *overrides: str) -> PreprocessSettings:
    return preprocess_settings(open_job(job_of(name, *overrides)))


def surveyed(source: FakeSource, left: Sequence[tuple[str, range]], **limits: Any) -> Survey:
    # In this process: what decoders do with a record is tested where its sizes are.
    return survey(source, left, settings_of("caption"), SampleLimits(**limits), source.clock, num_workers=0)


def size_of(request: Request) -> RequestSize:
    return RequestSize(request.prompt_tokens, request.visual_patches, request.max_new_tokens)


@pytest.mark.parametrize("name", ["caption", "question"])
def test_headers_give_the_sizes_of_the_real_requests(name: str) -> None:
    opened = open_job(job_of(name))
    left = [(shard.path, range(shard.num_rows or 0)) for shard in opened.shards]
    limits = SampleLimits(num_rows=1000, seconds=600)

    found = survey(opened.source, left, settings_of(name), limits)

    assert Counter(found.sizes) == Counter(map(size_of, sample(name)[1]))
    assert found.num_failed == 0


def test_a_few_rows_that_are_left_are_all_sampled_and_no_others() -> None:
    opened = open_job(job_of("caption"))
    first, _, third, _ = (shard.path for shard in opened.shards)
    requests = sample("caption")[1]

    left = [(first, range(5, 9)), (third, range(100, 103))]
    found = survey(opened.source, left, settings_of("caption"), SampleLimits(seconds=600))

    expected = [*requests[5:9], *requests[2 * 144 + 100 : 2 * 144 + 103]]
    assert found.sizes == tuple(map(size_of, expected))


def test_a_sample_is_spread_over_all_that_is_left() -> None:
    source = FakeSource({"a": 40_000, "b": 40_000})

    found = surveyed(source, [("a", range(20_000, 40_000)), ("b", range(20_000))])

    starts = sorted((path, row) for path, row in source.read_rows if row % 2500 == 0)
    assert starts == [("a", row) for row in range(20_000, 40_000, 2500)] + [
        ("b", row) for row in range(0, 20_000, 2500)
    ]
    assert [len(place) for place in found.places] == [16] * 16


gaps_of_a_shard = st.lists(st.integers(0, 3000), unique=True, max_size=8).map(
    lambda bounds: [range(*pair) for pair in zip(sorted(bounds)[::2], sorted(bounds)[1::2], strict=False)]
)


@settings(max_examples=50, deadline=None)
@given(gaps=st.lists(gaps_of_a_shard, max_size=4), num_rows=st.integers(1, 60))
def test_as_many_rows_as_allowed_are_sampled_and_only_what_is_left(
    gaps: list[list[range]], num_rows: int
) -> None:
    left = [(f"shard-{number}", gap) for number, found in enumerate(gaps) for gap in found]
    rows = {(path, row) for path, gap in left for row in gap}
    source = FakeSource({f"shard-{number}": 3000 for number in range(len(gaps))}, with_title=rows)

    found = surveyed(source, left, num_rows=num_rows)

    assert found.failures == {}  # every other row would fail for want of a title
    # Where portions and shares do not divide evenly, a place may be a row short.
    assert min(num_rows, len(rows)) - 16 <= len(found.sizes) <= num_rows
    assert len(found.sizes) == len(rows) or num_rows < len(rows)


@settings(max_examples=50, deadline=None)
@given(
    opening_seconds=st.floats(0, 0.5),
    seconds_per_row=st.floats(0, 0.1),
    first_left=st.integers(0, 900_000),
)
def test_whatever_passing_rows_over_costs_the_time_limit_holds(
    opening_seconds: float, seconds_per_row: float, first_left: int
) -> None:
    source = FakeSource({"a": 1_000_000}, opening_seconds, seconds_per_row)

    found = surveyed(source, [("a", range(first_left, 1_000_000))], num_rows=64, seconds=2.0)

    # Opening takes its time even at the first row, and the last row begun is finished.
    assert source.now <= 2.0 + 2 * opening_seconds + seconds_per_row
    assert found.sizes


def test_a_source_that_finds_rows_at_once_is_sampled_to_its_end() -> None:
    source = FakeSource({"a": 1_000_000}, opening_seconds=0.02)

    surveyed(source, [("a", range(1_000_000))], seconds=2.0)

    assert max(row for _, row in source.read_rows) > 900_000


def test_a_slow_source_is_sampled_as_deep_as_the_time_allows() -> None:
    source = FakeSource({"a": 1_000_000}, opening_seconds=0.02, seconds_per_row=1e-4)

    surveyed(source, [("a", range(1_000_000))], seconds=2.0)

    assert 1000 < max(row for _, row in source.read_rows) < 10_000


def test_a_shard_of_unknown_length_is_sampled_in_its_first_rows() -> None:
    source = FakeSource({"stream": None})

    found = surveyed(source, [("stream", range(5000, ENDLESS))])

    assert source.read_rows == [("stream", row) for row in range(256)]
    assert [len(place) for place in found.places] == [16] * 16


def test_a_streamed_data_set_is_sampled_as_its_rows_arrive(
    make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = DatasetSettings(kind="dataset", path=str(make_source(40)), streaming=True)
    source = open_source(dataset, RecordColumns(("title",)))
    (shard,) = source.shards()

    found = survey(source, [(shard.path, range(ENDLESS))], settings_of("caption"), SampleLimits(seconds=600))

    assert len(found.sizes) == 40


def test_records_without_a_request_are_counted_by_code(make_source: MakeSource) -> None:
    opened = open_job(job_of("caption", f"source.path={make_source(40, broken=(3, 7))}", "output.columns=[]"))
    left = [(shard.path, range(shard.num_rows or 0)) for shard in opened.shards]

    found = survey(opened.source, left, settings_of("caption"), SampleLimits(seconds=600))

    assert found.failures == {"image_format": 2}
    assert (len(found.sizes), found.num_failed) == (38, 2)


def test_without_any_request_nothing_is_typical() -> None:
    found = surveyed(FakeSource({"a": 10}, with_title=()), [("a", range(10))])

    assert found.failures == {"prompt_missing_column": 10}
    assert found.typical is None


def test_typical_is_the_mean_of_each_measure() -> None:
    sizes = (RequestSize(10, 400, 5), RequestSize(31, 0, 5))

    found = Survey((sizes,), {})

    assert found.typical == RequestSize(21, 200, 5)


sides = st.integers(1, 60) | st.integers(1, 20_000)


@given(height=sides, width=sides, limits=st.tuples(st.integers(1, 10**6), st.integers(1, 10**7)))
def test_no_image_has_more_visual_tokens_than_the_most(
    height: int, width: int, limits: tuple[int, int]
) -> None:
    processing = ImageProcessing(min_frame_pixels=min(limits), max_frame_pixels=max(limits))

    try:
        rows, columns = (side // 14 for side in resized_size(height, width, processing))
    except RecordError:
        return
    assert visual_tokens((1, rows, columns), 2) <= most_visual_tokens(processing)


def test_the_most_visual_tokens_of_glm_4_1v_are_reached() -> None:
    """Its longest_edge is 9,633,792: 6,144 tokens, as of an image of 64 × 96 tokens."""
    processing = ImageProcessing(max_frame_pixels=9_633_792)

    height, width = resized_size(64 * 28, 96 * 28, processing)

    assert most_visual_tokens(processing) == (height // 28) * (width // 28) == 6144


def record_of(size: tuple[int, int], title: str = "", num_images: int = 1) -> Record:
    images = (ImageRef(data=image_bytes(0, size)),) * num_images
    return Record("a", "shard", 0, images, {"title": title})


def prepared(preprocessing: PreprocessSettings, record: Record) -> RequestSize:
    request = Preprocessor(preprocessing)(Chunk("shard", 0, 1), record)
    assert isinstance(request, Request)
    return size_of(request)


def test_without_a_sample_the_worst_case_is_the_largest_image_under_an_empty_text() -> None:
    preprocessing = settings_of("caption", "images.max_pixels=470400")  # 600 visual tokens

    worst = worst_case(preprocessing)

    assert worst == prepared(preprocessing, record_of((30 * 28, 20 * 28)))


def test_the_longest_text_of_the_sample_counts_for_the_worst_case() -> None:
    preprocessing = settings_of("caption", "images.max_pixels=470400")
    sizes = [
        prepared(preprocessing, record_of((64, 64), title)) for title in ("short", "a much longer title")
    ]

    worst = worst_case(preprocessing, sizes)

    assert worst == prepared(preprocessing, record_of((30 * 28, 20 * 28), "a much longer title"))


def test_a_sampled_request_of_several_images_may_be_the_worst_case() -> None:
    preprocessing = settings_of("caption", "images.max_pixels=470400")
    many = prepared(preprocessing, record_of((30 * 28, 20 * 28), num_images=3))

    assert worst_case(preprocessing, [many]).visual_patches == many.visual_patches == 3 * 2400


def test_no_request_is_prepared_for_that_exceeds_the_context() -> None:
    preprocessing = settings_of("caption", "images.max_pixels=100000000")

    worst = worst_case(preprocessing)

    assert worst.prompt_tokens + worst.new_tokens == preprocessing.checkpoint.context_tokens


def test_a_prompt_that_fills_the_context_by_itself_has_a_worst_case() -> None:
    preprocessing = settings_of("caption", f"prompt.system={'words ' * 5000}")

    worst = worst_case(preprocessing)

    assert worst.prompt_tokens + worst.new_tokens == preprocessing.checkpoint.context_tokens


def test_a_survey_and_an_estimate_need_no_torch() -> None:
    code = "import sys, glm4v_batch.speed, glm4v_batch.survey; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
