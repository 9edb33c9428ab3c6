"""What became of the sources since their rows were committed: the same, moved, changed or gone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from glm4v_batch.durable import sync_folder
from glm4v_batch.errors import SourceError, on_one_line, sanitise
from glm4v_batch.output import Lock
from glm4v_batch.parts import Part, differing_keys, refusing
from glm4v_batch.sources import Shard

_NAMED = 20


def changed_parts(shards: Sequence[Shard], parts: Iterable[Part]) -> list[Part]:
    """The parts whose source stands at its old path with other data than they were made from."""
    identities = {shard.path: shard.identity for shard in shards}
    return [
        part for part in parts if identities.get(part.info.source_path, part.info.source) != part.info.source
    ]


def refuse_changed(shards: Sequence[Shard], parts: Iterable[Part]) -> None:
    """Raise one SourceError for all sources that *parts* and *shards* know with different data."""
    identities = {shard.path: shard.identity for shard in shards}
    changed = {part.info.source_path: part.info.source for part in changed_parts(shards, parts)}
    if changed:
        paths = sorted(changed)
        lines = [f"{len(paths):,} of the sources changed since their rows were committed:"]
        lines += [f"  {on_one_line(p)}: {_differences(changed[p], identities[p])}" for p in paths[:_NAMED]]
        lines += [f"  and {len(paths) - _NAMED:,} more"] if len(paths) > _NAMED else []
        raise SourceError(
            "\n".join(lines),
            hint="Restore them, or give up their old answers and do their rows again with: "
            "run --on-changed redo. Or choose another output.path for the new data.",
        )


def moved_sources(shards: Sequence[Shard], parts: Sequence[Part]) -> dict[str, str]:
    """Sources that stand at another path than their parts say, recognised by their content.

    Without this, another spelling of `source.path` would do every row again. Among shards of the
    same content any is right whose rows are not taken yet.
    """
    present = {shard.path for shard in shards}
    contents = {part.info.source_path: _content(part.info.source) for part in parts}
    missing = {path: content for path, content in contents.items() if path not in present and content}
    if not missing:
        return {}
    taken: defaultdict[str, list[range]] = defaultdict(list)
    for part in parts:
        taken[part.info.source_path].append(part.info.rows)
    moved: dict[str, str] = {}
    for path, content in missing.items():
        same = (shard.path for shard in shards if _content(shard.identity) == content)
        new = next((candidate for candidate in same if not _share_rows(taken[candidate], taken[path])), None)
        if new is not None:
            moved[path] = new
            taken[new] += taken[path]
    return moved


def _share_rows(these: Iterable[range], those: Iterable[range]) -> bool:
    """Whether a row is in a range of *these* and in one of *those*."""
    ends = [0, 0]  # of what begins earlier, on either side
    sides = ((rows.start, side, rows.stop) for side, ranges in enumerate((these, those)) for rows in ranges)
    for start, side, stop in sorted(sides):
        if start < min(stop, ends[1 - side]):
            return True
        ends[side] = max(ends[side], stop)
    return False


def take_away(lock: Lock, parts: Sequence[Part]) -> None:
    """Remove *parts* from the folder that *lock* holds, durably, or raise OutputError.

    A crash on the way leaves some of them: their source still counts as changed then.
    """
    if not parts:
        return
    lock.check()
    with refusing(lock.folder):
        for part in parts:
            part.path.unlink(missing_ok=True)
        # Before the first new part: after a loss of power an old one must not stand beside it.
        sync_folder(lock.folder)


def _content(identity: Mapping[str, str | int]) -> frozenset[tuple[str, str | int]] | None:
    # Without a sample of the data, equal identities do not mean equal data.
    if "sample_sha256" not in identity:
        return None
    return frozenset(item for item in identity.items() if item[0] != "path")


def _differences(theirs: Mapping[str, str | int], ours: Mapping[str, str | int]) -> str:
    """What a person can see of it: numbers as they are, and of hashes only that they differ."""
    counts, others = [], []
    for key in differing_keys(theirs, ours):
        match theirs.get(key), ours.get(key):
            case int(before), int(now):
                counts.append(f"{key} was {before:,} and is {now:,}")
            case _:
                others.append(key.removesuffix("_sha256"))
    if others:
        counts.append(sanitise(f"other content ({', '.join(others)})"))
    return ", ".join(counts)
