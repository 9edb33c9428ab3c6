"""Compare what is committed with the source that the output folder's job.json names.

What opens a source is imported only then: the parts alone are checked without it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from glm4v_batch.described import read_description
from glm4v_batch.errors import OutputError, sanitise
from glm4v_batch.part_check import Fault
from glm4v_batch.parts import Part, differing_keys
from glm4v_batch.types import ENDLESS
from glm4v_batch.units import format_count

if TYPE_CHECKING:
    from glm4v_batch.sources import Shard, Source

_ROWS_PER_CHUNK = 128


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """What the source says. *expected* counts the rows of each shard that parts can be compared with.

    *moved* maps the path that parts say to where the same data stands now.
    """

    expected: Mapping[str, int]
    moved: Mapping[str, str]
    faults: tuple[Fault, ...]
    notices: tuple[str, ...]


def open_described(folder: Path) -> "Source":
    """The source of the job that last ran in *folder*; relative paths are relative to the current folder.

    Raises OutputError where job.json does not tell, SourceError or JobError where it cannot be opened.
    """
    from pydantic import TypeAdapter, ValidationError

    from glm4v_batch.job import SourceSettings
    from glm4v_batch.sources import RecordColumns, open_source

    described = read_description(folder)
    try:
        settings = TypeAdapter[SourceSettings](SourceSettings).validate_python(
            (described or {}).get("source")
        )
    except ValidationError:
        raise OutputError(
            f"{folder} does not say what its source is: its job.json is missing or cannot be read.",
            hint="Any run of the job writes it anew. Without --source the parts are checked by themselves.",
        ) from None
    return open_source(settings, RecordColumns(), own_output=folder)


def check_source(source: "Source", parts: Sequence[Part]) -> SourceCheck:
    """What *parts* and *source* say of each other; reads the rows of a source that has no known length."""
    from glm4v_batch.changes import moved_sources

    shards = source.shards()
    moved = moved_sources(shards, parts)
    by_path = defaultdict(list)
    for part in parts:
        by_path[moved.get(part.info.source_path, part.info.source_path)].append(part)
    changed = {shard.path: _changes(shard, by_path[shard.path], moved) for shard in shards}
    expected = {shard.path: _num_rows(source, shard) for shard in shards if not changed[shard.path]}
    beyond = [fault for path, count in expected.items() for fault in _beyond(path, count, by_path[path])]
    present = {shard.path for shard in shards}
    gone = {path: found for path, found in by_path.items() if found and path not in present}
    notices = [*_moves(moved), *_vanished(gone)]
    return SourceCheck(expected, moved, (*chain.from_iterable(changed.values()), *beyond), tuple(notices))


def _changes(shard: "Shard", parts: Sequence[Part], moved: Mapping[str, str]) -> tuple[Fault, ...]:
    other = [
        part for part in parts if part.info.source_path not in moved and part.info.source != shard.identity
    ]
    if not other:
        return ()
    differing = {key for part in other for key in differing_keys(part.info.source, shard.identity)}
    fault = Fault(
        "changed",
        shard.path,
        f"{sanitise(shard.path)} is not what {format_count(len(other), 'part')} of it were made from: "
        f"{', '.join(sorted(differing))} differ.",
        "Restore it, or have its rows done again: glm4v-batch run JOB --on-changed redo",
    )
    return (fault,)


def _beyond(path: str, count: int, parts: Sequence[Part]) -> Iterator[Fault]:
    over = [part for part in parts if part.info.rows.stop > count]
    if over:
        yield Fault(
            "beyond",
            path,
            f"{sanitise(path)} ends after {format_count(count, 'row')}, and {over[0].path.name} holds rows "
            f"up to {over[0].info.rows.stop:,}.",
            "Move such parts out of the folder: no run of this source wrote them.",
        )


def _num_rows(source: "Source", shard: "Shard") -> int:
    if shard.num_rows is not None:
        return shard.num_rows
    return sum(chunk.num_rows for chunk in source.chunks(shard, [range(ENDLESS)], _ROWS_PER_CHUNK))


def _moves(moved: Mapping[str, str]) -> Iterator[str]:
    for old, new in moved.items():
        yield f"{sanitise(old)} stands at {sanitise(new)} now, and is counted there"


def _vanished(gone: Mapping[str, Sequence[Part]]) -> Iterator[str]:
    for path, parts in gone.items():
        kept = format_count(len(parts), "part")
        yield f"{sanitise(path)} is gone; its rows in {kept} are kept, and cannot be compared"
