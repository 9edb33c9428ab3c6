"""Decide what a run will do before anything heavy starts: which rows are left, with what, and where."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from glm4v_batch.asked import EVERYTHING, Asked
from glm4v_batch.changes import changed_parts, moved_sources, refuse_changed
from glm4v_batch.checkpoint import Checkpoint, identity, locate, read_checkpoint
from glm4v_batch.errors import JobError
from glm4v_batch.forecast import Forecast, make_forecast
from glm4v_batch.images import ImageLimits, with_pixel_limits
from glm4v_batch.job import Job
from glm4v_batch.output import committed_parts, fingerprint
from glm4v_batch.parts import Part, check_name, gaps
from glm4v_batch.prepare import PreprocessSettings
from glm4v_batch.retry import Retries, find_retries
from glm4v_batch.sources import (
    RecordColumns,
    Shard,
    Source,
    check_columns,
    check_prompt,
    check_root,
    check_whole_numbers,
    open_source,
)
from glm4v_batch.templates import columns_of
from glm4v_batch.types import ENDLESS, Chunk

# They decide which images fail, and raising them is how those are done after all.
_NOT_TEXT = {"max_image_pixels", "max_image_bytes"}
# Without these the text is what it was before they existed, and so are the folders of that time.
_NEWER = {"max_new_tokens_column"}


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job whose source and checkpoint are found and fit together; no weight is read yet."""

    job: Job
    source: Source
    shards: tuple[Shard, ...]
    checkpoint: Checkpoint
    settings: Mapping[str, Any]

    @property
    def passed_fields(self) -> list[pa.Field]:
        """The source's columns that the parts repeat."""
        return [self.source.schema.field(name) for name in self.job.output.columns]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is committed and what is left.

    *forecast* is None where no model is needed: for the echo engine, and where nothing is left. *moved*
    maps the path of a source that has parts to where the same data stands now; *done* holds the
    committed rows of each shard by its path. *superseded* are parts of changed sources, which do not
    count any more and are taken away before the first new part; *retries* is None unless asked for.
    """

    opened: OpenJob
    parts: tuple[Part, ...]
    moved: Mapping[str, str]
    done: Mapping[str, Sequence[range]]
    forecast: Forecast | None = None
    asked: Asked = EVERYTHING
    superseded: tuple[Part, ...] = ()
    retries: Retries | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint that the parts carry."""
        return fingerprint(self.opened.settings)

    @property
    def num_rows(self) -> int | None:
        """Rows of the source within the limit; None where only reading it to its end would tell."""
        counts = [shard.num_rows for shard in self._shards()]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def num_committed(self) -> int:
        """Rows that stand in parts already, among those that the limit lets in."""
        return sum(
            len(range(rows.start, min(rows.stop, _end(shard))))
            for shard in self._shards()
            for rows in self.done.get(shard.path, ())
        )

    @property
    def num_missing(self) -> int | None:
        """Rows within the limit that no part holds, or None where that is unknown."""
        return None if self.num_rows is None else self.num_rows - self.num_committed

    @property
    def num_left(self) -> int | None:
        """Rows to do, or None where that is unknown."""
        return self.num_missing if self.retries is None else self.retries.num_rows

    @property
    def vanished(self) -> tuple[str, ...]:
        """Sources that have parts and are no longer there."""
        present = {shard.path for shard in self.opened.shards}
        return tuple(sorted({p.info.source_path for p in self.parts} - present - set(self.moved)))

    @property
    def changed(self) -> Mapping[str, int]:
        """Sources whose parts are superseded, with the number of these parts."""
        return Counter(part.info.source_path for part in self.superseded)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks that no part holds, in the order of the source."""
        for shard in self._shards():
            left = gaps(shard.num_rows, self.done.get(shard.path, ()))
            yield from self.opened.source.chunks(shard, left, self.opened.job.output.rows_per_part)

    def left(self) -> list[tuple[str, range]]:
        """Where the rows to do are, by the path of their shard; failed ones lie scattered there."""
        if self.retries is not None:
            return [(retry.chunk.source, retry.chunk.rows) for retry in self.retries.of]
        return [
            (shard.path, rows)
            for shard in self._shards()
            for rows in gaps(shard.num_rows, self.done.get(shard.path, ()))
        ]

    def identity_of(self, chunk: Chunk) -> Mapping[str, str | int]:
        """The identity of the shard that *chunk* is of."""
        return next(s.identity for s in self.opened.shards if s.path == chunk.source)

    def _shards(self) -> Iterator[Shard]:
        return _within(self.opened.shards, self.asked.limit)


def _within(shards: Sequence[Shard], limit: int | None) -> Iterator[Shard]:
    # An unknown length counts as endless: the limit then cuts it to a known one, which is
    # an upper bound only, and the source's own end still counts.
    room = limit
    for shard in shards:
        if room is None:
            yield shard
        elif room > 0:
            yield replace(shard, num_rows=min(room, _end(shard)))
            room -= min(room, _end(shard))


def _end(shard: Shard) -> int:
    return ENDLESS if shard.num_rows is None else shard.num_rows


def open_job(job: Job) -> OpenJob:
    """Find the job's source and checkpoint and check that its columns exist.

    Raises JobError for columns that no one has, SourceError for a source that cannot be read, OutputError
    for an output whose name the locale cannot express.
    """
    check_name(Path(job.output.path))
    prompt_columns, own_columns = columns_of(job.prompt.user), job.generation.own_columns
    columns = RecordColumns(tuple(dict.fromkeys(prompt_columns + own_columns)), job.output.columns)
    source = open_source(job.source, columns, own_output=Path(job.output.path))
    check_columns(source.schema.names, job.asked_columns(), where=job.source.path)
    check_root(source, job.source.image)
    check_prompt(source.schema, prompt_columns)
    check_whole_numbers(source.schema, own_columns)
    checkpoint = read_checkpoint(locate(job.model.name, job.model.revision))
    opened = OpenJob(job, source, tuple(source.shards()), checkpoint, text_settings(job, checkpoint))
    _refuse_impossible_prompts(opened)
    return opened


def _refuse_impossible_prompts(opened: OpenJob) -> None:
    # What would fail every record is found here, before the model loads, and by `plan` too.
    settings = preprocess_settings(opened)
    settings.renderer()
    with_pixel_limits(opened.checkpoint.images, settings.min_pixels, settings.max_pixels)
    if settings.max_new_tokens >= opened.checkpoint.context_tokens:
        raise JobError(
            f"generation.max_new_tokens is {settings.max_new_tokens:,}, and the model's context holds "
            f"{opened.checkpoint.context_tokens:,} tokens, the prompt included.",
            hint="Lower generation.max_new_tokens.",
        )


def text_settings(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """Every setting that can change the text or the columns of a part, and none that cannot."""
    sections = {"prompt": job.prompt, "generation": job.generation, "images": job.images}
    return {
        "engine": "echo" if job.batching.engine == "echo" else "model",
        **{f"model.{name}": value for name, value in identity(checkpoint).items()},
        "model.dtype": job.model.dtype,
        **{
            f"{section}.{name}": value
            for section, settings in sections.items()
            for name, value in settings.model_dump(mode="json", exclude=_NOT_TEXT).items()
            if value is not None or name not in _NEWER
        },
        "source.id": job.source.id,
        "source.image": job.source.image,
        "output.columns": list(job.output.columns),
    }


def preprocess_settings(opened: OpenJob) -> PreprocessSettings:
    """What turns the job's records into requests."""
    job, root = opened.job, opened.source.root
    return PreprocessSettings(
        checkpoint=opened.checkpoint,
        system=job.prompt.system,
        user=job.prompt.user,
        max_new_tokens=job.generation.max_new_tokens,
        max_new_tokens_column=job.generation.max_new_tokens_column,
        root=None if root is None else Path(root),
        min_pixels=job.images.min_pixels,
        max_pixels=job.images.max_pixels,
        limits=ImageLimits(
            max_image_pixels=job.images.max_image_pixels, max_image_bytes=job.images.max_image_bytes
        ),
    )


def make_plan(opened: OpenJob, asked: Asked = EVERYTHING) -> Plan:
    """What is to do of *opened*, from the parts that its output folder holds now.

    Raises OutputError where the folder is another job's, SourceError where a source has changed
    since its rows were committed, PlacementError where the model fits nowhere.
    """
    parts = committed_parts(Path(opened.job.output.path), opened.settings)
    shards = list(_within(opened.shards, asked.limit))
    superseded = changed_parts(shards, parts) if asked.redo_changed else []
    given_up = {part.path for part in superseded}
    valid = [part for part in parts if part.path not in given_up]
    if not asked.redo_changed:
        refuse_changed(opened.shards, parts)
    moved = moved_sources(opened.shards, valid)
    done: defaultdict[str, list[range]] = defaultdict(list)
    for part in valid:
        done[moved.get(part.info.source_path, part.info.source_path)].append(part.info.rows)
    retries = _retries(shards, valid, moved, asked)
    plan = Plan(opened, tuple(valid), moved, done, None, asked, tuple(superseded), retries)
    return replace(plan, forecast=_forecast(plan))


def _retries(
    shards: Sequence[Shard], parts: Sequence[Part], moved: Mapping[str, str], asked: Asked
) -> Retries | None:
    if asked.retry is None:
        return None
    return find_retries(parts, moved, {shard.path: _end(shard) for shard in shards}, asked.retry)


def _forecast(plan: Plan) -> Forecast | None:
    opened = plan.opened
    # A night without new files must not fail because the GPUs are busy.
    if opened.job.batching.engine == "echo" or plan.num_left == 0:
        return None
    return make_forecast(
        opened.job, opened.checkpoint, opened.source, preprocess_settings(opened), plan.left(), plan.num_left
    )
