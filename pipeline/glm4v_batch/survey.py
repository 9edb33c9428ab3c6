"""How large the requests of a job will be, from the image headers of a sample of its rows.

A few short runs of rows stand for all. A source may have to unpack every row between the start of a
shard and the rows that are asked for, and only trying shows whether it does: so the shallow runs come
first, and each goes only as deep as the time left allows by the pace of the last one.
"""

import math
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise

import numpy as np

from glm4v_batch.checkpoint import ImageProcessing
from glm4v_batch.errors import RecordError
from glm4v_batch.images import MAX_ASPECT, open_image, visual_grid, visual_tokens, with_pixel_limits
from glm4v_batch.prepare import PreprocessSettings, check_readable, most_new_tokens, request_or_failure
from glm4v_batch.preprocess import preprocess
from glm4v_batch.sources import Source
from glm4v_batch.templates import columns_of
from glm4v_batch.types import Chunk, Failure, ModelInputs, Record, Request, RequestSize

_NUM_PLACES = 16
_DEEPEST_FRACTION = 0.25


@dataclass(frozen=True, slots=True)
class SampleLimits:
    """How many rows a survey reads at most, and the seconds after which it begins no further row."""

    num_rows: int = 256
    seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class Survey:
    """The sampled records: *places* holds the sizes of neighbouring rows together.

    *failures* counts the records that have no request, by error code. Only headers were read, so
    images that are damaged further on count as sound.
    """

    places: tuple[tuple[RequestSize, ...], ...]
    failures: Mapping[str, int]

    @property
    def sizes(self) -> tuple[RequestSize, ...]:
        """The sizes of all sampled requests."""
        return tuple(size for place in self.places for size in place)

    @property
    def num_failed(self) -> int:
        """Sampled records that have no request."""
        return sum(self.failures.values())

    @property
    def typical(self) -> RequestSize | None:
        """The mean of each measure, rounded up and at least 1; None where no request was sampled."""
        if not self.sizes:
            return None
        num = len(self.sizes)
        return RequestSize(
            prompt_tokens=max(1, math.ceil(sum(s.prompt_tokens for s in self.sizes) / num)),
            visual_patches=max(1, math.ceil(sum(s.visual_patches for s in self.sizes) / num)),
            new_tokens=max(1, math.ceil(sum(s.new_tokens for s in self.sizes) / num)),
        )


def survey(
    source: Source,
    left: Sequence[tuple[str, range]],
    settings: PreprocessSettings,
    limits: SampleLimits = SampleLimits(),
    clock: Callable[[], float] = time.monotonic,
    num_workers: int = 2,
) -> Survey:
    """The sizes of the requests that a sample of the rows in *left* makes.

    *left* holds the rows to do by the path of their shard, in the order of the source. They are
    sampled at evenly spread places; at earlier rows of the shard, committed or not, where a place is
    too deep to be reached in time; and at its first rows where its length is unknown. Raises
    SourceError where a run would meet it too.
    """
    reader = _Reader(source, clock, limits.seconds)
    items = (
        (chunk, record) for chunk in _places(source, left, limits.num_rows) for record in reader.read(chunk)
    )
    failures: Counter[str] = Counter()
    places: defaultdict[str, list[RequestSize]] = defaultdict(list)
    # In the same processes as a run's decoders: a header may be made to crash or to hang a reader.
    for result in preprocess(items, settings, num_workers=num_workers, make=HeaderReader):
        if isinstance(result, Request):
            places[result.chunk_id].append(_size_of(result))
        else:
            failures[result.code] += 1
    length = max(1, limits.num_rows // _NUM_PLACES)
    return Survey(tuple(piece for sizes in places.values() for piece in _cut(sizes, length)), dict(failures))


def worst_case(settings: PreprocessSettings, sample: Sequence[RequestSize] = ()) -> RequestSize:
    """The largest request to be prepared for: one image at the pixel limit under the longest text.

    That is the longest text of *sample*, or the prompt with empty columns where there is none, and
    no more altogether than the model's context holds. Where a request of *sample* is larger in any
    measure, having several images, its measure counts. Raises JobError for pixel limits that no image meets.
    """
    processing, checkpoint = _processing(settings), settings.checkpoint
    text_tokens = _most_text_tokens(settings, processing, sample)
    room_tokens = checkpoint.context_tokens - settings.max_new_tokens - text_tokens
    image_tokens = max(1, min(most_visual_tokens(processing), room_tokens))
    alone = RequestSize(
        prompt_tokens=text_tokens + image_tokens,
        visual_patches=image_tokens * processing.merge_size**2,
        new_tokens=settings.max_new_tokens,
    )
    return _largest([alone, *sample])


def most_visual_tokens(processing: ImageProcessing) -> int:
    """The most visual tokens that any one image can have, whatever its size.

    An image above the pixel limit is shrunk to below it, but for its shorter side, which keeps one
    token; one below the lower limit grows on each side to the next whole token.
    """
    pixels_per_token = processing.temporal_patch_size * (processing.patch_size * processing.merge_size) ** 2
    most, fewest = (
        limit / pixels_per_token for limit in (processing.max_frame_pixels, processing.min_frame_pixels)
    )
    shrunk = math.floor(math.sqrt(MAX_ASPECT * most)) if most < MAX_ASPECT else 0
    return max(math.floor(most), shrunk, _most_grown_tokens(fewest))


def _most_grown_tokens(fewest: float) -> int:
    # Sides x ≥ y with x·y = fewest become ⌈x⌉·⌈y⌉; for each ⌈y⌉ the longest x has the smallest y.
    smallest = math.sqrt(fewest / MAX_ASPECT)
    return max(
        rows * math.ceil(fewest / max(rows - 1, smallest))
        for rows in range(math.ceil(smallest), math.ceil(math.sqrt(fewest)) + 1)
    )


def _largest(sizes: Sequence[RequestSize]) -> RequestSize:
    return RequestSize(
        prompt_tokens=max(size.prompt_tokens for size in sizes),
        visual_patches=max(size.visual_patches for size in sizes),
        new_tokens=max(size.new_tokens for size in sizes),
    )


def _most_text_tokens(
    settings: PreprocessSettings, processing: ImageProcessing, sample: Sequence[RequestSize]
) -> int:
    if sample:
        return max(size.prompt_tokens - size.visual_patches // processing.merge_size**2 for size in sample)
    empty = dict.fromkeys(columns_of(settings.user), "")
    try:
        return len(settings.renderer().render(empty, [1], settings.max_new_tokens)) - 1
    except RecordError:  # too long for the context, as every prompt will be
        return settings.checkpoint.context_tokens - settings.max_new_tokens - 1


def _processing(settings: PreprocessSettings) -> ImageProcessing:
    return with_pixel_limits(settings.checkpoint.images, settings.min_pixels, settings.max_pixels)


class HeaderReader:
    """Makes requests as `prepare.Preprocessor` would, but without pixels; it owns the tokenizer."""

    def __init__(self, settings: PreprocessSettings) -> None:
        self._settings = settings
        self._renderer = settings.renderer()
        self._processing = _processing(settings)

    def __call__(self, chunk: Chunk, record: Record) -> Request | Failure:
        """The request of *record* with `inputs` that hold no patches."""
        return request_or_failure(self._request, chunk, record)

    def _request(self, chunk: Chunk, record: Record) -> Request:
        settings, processing = self._settings, self._processing
        check_readable(record)
        new_tokens = most_new_tokens(record, settings)
        headers = (open_image(ref, settings.root, settings.limits) for ref in record.images)
        grids = tuple(visual_grid(header, processing) for header in headers)
        image_tokens = [visual_tokens(grid, processing.merge_size) for grid in grids]
        input_ids = self._renderer.render(record.fields, image_tokens, new_tokens)
        return Request(
            record_id=record.record_id,
            chunk_id=chunk.chunk_id,
            row=record.row,
            prompt_tokens=len(input_ids),
            visual_patches=sum(map(math.prod, grids)),
            max_new_tokens=new_tokens,
            inputs=ModelInputs(input_ids, np.empty((0, 0), np.uint8), grids),
        )


def _size_of(request: Request) -> RequestSize:
    return RequestSize(request.prompt_tokens, request.visual_patches, request.max_new_tokens)


class _Reader:
    """Reads chunks until its time is up, none deeper in its shard than can be reached in time."""

    def __init__(self, source: Source, clock: Callable[[], float], seconds: float) -> None:
        self._source = source
        self._clock = clock
        self._deadline = clock() + seconds
        self._seconds_per_row = math.inf
        self._proven_row = -1
        self._read: set[tuple[str, int]] = set()

    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of *chunk* that were not read yet; of rows before it where it is out of reach."""
        if self._clock() >= self._deadline:
            return
        for record in self._records(replace(chunk, first_row=self._reached_row(chunk))):
            if (record.source, record.row) not in self._read:
                self._read.add((record.source, record.row))
                yield record
            if self._clock() >= self._deadline:
                return

    def _reached_row(self, chunk: Chunk) -> int:
        """The first row of *chunk*, or the deepest that can be reached, found by going ever deeper."""
        row = min(chunk.first_row, self._reachable_row())
        while self._proven_row < row < chunk.first_row:
            next(self._records(Chunk(chunk.source, row, 1)), None)
            row = min(chunk.first_row, self._reachable_row())
        return row

    def _reachable_row(self) -> int:
        # A share of the time only: whatever lies deeper may turn out slower.
        left_seconds = max(0.0, self._deadline - self._clock())
        return int(_DEEPEST_FRACTION * left_seconds / self._seconds_per_row)

    def _records(self, chunk: Chunk) -> Iterator[Record]:
        started = self._clock()
        records = self._source.read(chunk)
        for record in islice(records, 1):
            # Opening counts as passing rows over: the pace errs on the slow side.
            self._seconds_per_row = max(self._clock() - started, 1e-9) / max(1, chunk.first_row)
            self._proven_row = max(self._proven_row, 2 * chunk.first_row)
            yield record
        yield from records


def _places(source: Source, left: Sequence[tuple[str, range]], num_rows: int) -> list[Chunk]:
    """What to read of *left*, the least deep first: at most *num_rows* rows in all of known length."""
    endless = {shard.path for shard in source.shards() if shard.num_rows is None}
    beginnings = {path: min(num_rows, rows.stop) for path, rows in left if path in endless}
    spread = _spread([(path, rows) for path, rows in left if path not in endless], num_rows)
    return [
        *(Chunk(path, 0, num_first) for path, num_first in beginnings.items()),
        *sorted(spread, key=lambda chunk: chunk.first_row),
    ]


def _spread(left: Sequence[tuple[str, range]], num_rows: int) -> Iterator[Chunk]:
    """The first rows of each of equal portions of *left*: all of it where it is small."""
    ends = list(accumulate(len(rows) for _, rows in left))
    total = ends[-1] if ends else 0
    portions = pairwise(total * place // _NUM_PLACES for place in range(_NUM_PLACES + 1))
    shares = pairwise(min(total, num_rows) * place // _NUM_PLACES for place in range(_NUM_PLACES + 1))
    for (start, stop), (low, high) in zip(portions, shares, strict=True):
        yield from _pieces(left, ends, range(start, min(stop, start + high - low)))


def _pieces(left: Sequence[tuple[str, range]], ends: Sequence[int], wanted: range) -> Iterator[Chunk]:
    """*wanted*, which counts through all of *left*, as rows of its shards."""
    at, start = bisect_right(ends, wanted.start), wanted.start
    while start < wanted.stop:
        path, rows = left[at]
        offset = start - (ends[at] - len(rows))
        piece = rows[offset : offset + wanted.stop - start]
        yield Chunk(path, piece.start, len(piece))
        start += len(piece)
        at += 1


def _cut(sizes: Sequence[RequestSize], length: int) -> list[tuple[RequestSize, ...]]:
    return [tuple(sizes[start : start + length]) for start in range(0, len(sizes), length)]
