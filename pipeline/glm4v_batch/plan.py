"""Decide what a run will do before anything heavy starts: which rows are left, with what, and where."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from glm4v_batch.checkpoint import Checkpoint, identity, locate, read_checkpoint
from glm4v_batch.errors import SourceError
from glm4v_batch.job import Job
from glm4v_batch.output import committed_parts, fingerprint
from glm4v_batch.parts import Part, gaps
from glm4v_batch.placement import find_devices, place
from glm4v_batch.preprocess import PreprocessSettings
from glm4v_batch.sources import Shard, Source, check_columns, open_source
from glm4v_batch.types import Chunk, Placement


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
    """What is committed and what is left; *limit* counts rows of the source from its beginning."""

    opened: OpenJob
    parts: tuple[Part, ...]
    placement: Placement | None
    limit: int | None = None

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
            for rows in self._done(shard)
        )

    @property
    def num_left(self) -> int | None:
        """Rows to do, or None where that is unknown."""
        return None if self.num_rows is None else self.num_rows - self.num_committed

    @property
    def vanished(self) -> tuple[str, ...]:
        """Sources that have parts and are no longer there."""
        present = {shard.path for shard in self.opened.shards}
        return tuple(sorted({str(p.info.source["path"]) for p in self.parts} - present))

    def chunks(self) -> Iterator[Chunk]:
        """The chunks that are left, in the order of the source."""
        for shard in self._shards():
            left = gaps(shard.num_rows, self._done(shard))
            yield from self.opened.source.chunks(shard, left, self.opened.job.output.rows_per_part)

    def identity_of(self, chunk: Chunk) -> Mapping[str, str | int]:
        """The identity of the shard that *chunk* is of."""
        return next(s.identity for s in self.opened.shards if s.path == chunk.source)

    def _done(self, shard: Shard) -> list[range]:
        return [p.info.rows for p in self.parts if p.info.source["path"] == shard.path]

    def _shards(self) -> Iterator[Shard]:
        # An unknown length counts as endless: the limit then cuts it to a known one, which is
        # an upper bound only, and the source's own end still counts.
        room = self.limit
        for shard in self.opened.shards:
            if room is None:
                yield shard
            elif room > 0:
                yield replace(shard, num_rows=min(room, _end(shard)))
                room -= min(room, _end(shard))


def _end(shard: Shard) -> int:
    return 2**62 if shard.num_rows is None else shard.num_rows


def open_job(job: Job) -> OpenJob:
    """Find the job's source and checkpoint and check that its columns exist.

    Raises JobError for columns that no one has, SourceError for a source that cannot be read.
    """
    source = open_source(job.source, job.field_columns())
    check_columns(source.schema.names, job.asked_columns(), where=job.source.path)
    checkpoint = read_checkpoint(locate(job.model.name, job.model.revision))
    return OpenJob(job, source, tuple(source.shards()), checkpoint, text_settings(job, checkpoint))


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
            for name, value in settings.model_dump(mode="json").items()
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
        root=None if root is None else Path(root),
        min_pixels=job.images.min_pixels,
        max_pixels=job.images.max_pixels,
    )


def make_plan(opened: OpenJob, limit: int | None = None) -> Plan:
    """What is left of *opened*, from the parts that its output folder holds now.

    Raises OutputError where the folder is another job's, SourceError where a source has changed
    since its rows were committed, PlacementError where the model fits nowhere.
    """
    parts = committed_parts(Path(opened.job.output.path), opened.settings)
    _refuse_changed(opened.shards, parts)
    return Plan(opened, tuple(parts), _placement(opened), limit)


def _placement(opened: OpenJob) -> Placement | None:
    if opened.job.batching.engine == "echo":
        return None
    devices = opened.job.devices
    return place(find_devices(devices.use), weight_bytes(opened), devices.memory_fraction)


def weight_bytes(opened: OpenJob) -> int:
    """What the weights take in the job's precision, from the sizes of their files."""
    stored = sum(path.stat().st_size for path in opened.checkpoint.weight_files)
    dtype, theirs = opened.job.model.dtype, opened.checkpoint.dtype
    if dtype == "auto" or theirs is None:
        return stored
    return stored * _value_bytes(dtype) // _value_bytes(theirs)


def _value_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _refuse_changed(shards: Sequence[Shard], parts: Sequence[Part]) -> None:
    identities = {shard.path: dict(shard.identity) for shard in shards}
    changed = sorted(
        {
            str(part.info.source["path"])
            for part in parts
            if identities.get(str(part.info.source["path"]), part.info.source) != part.info.source
        }
    )
    if changed:
        lines = "\n".join(f"  {path}" for path in changed)
        raise SourceError(
            f"{len(changed)} of the sources changed since their rows were committed:\n{lines}",
            hint="Restore them, or choose another output.path for the new data.",
        )
