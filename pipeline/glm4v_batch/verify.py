"""Prove from an output folder, and from its source if asked, that every row stands exactly once.

No lock is taken and nothing is written: a run may go on meanwhile, and the folder may be read-only.
Without the source the proof is about what is there; only the source tells what is not.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from glm4v_batch.described import job_name
from glm4v_batch.errors import OutputError, sanitise
from glm4v_batch.holder import lock_holder
from glm4v_batch.part_check import Fault, PartCheck, check_parts
from glm4v_batch.parts import STATE_FOLDER, Part, differing_keys, gaps
from glm4v_batch.source_check import SourceCheck, check_source, open_described
from glm4v_batch.units import format_count

if TYPE_CHECKING:
    from glm4v_batch.sources import Source

# 256 MiB of hashes; beyond that, ids are no longer compared.
_MAX_IDS = 32 << 20
_NAMED = 5
# Where inodes are made up anew for every look, no two looks agree.
_MAX_LOOKS = 3


@dataclass(frozen=True, slots=True)
class SourceCount:
    """The rows of one source.

    *expected* is what the source itself holds; None where it was not looked at, has changed or is gone,
    so that its rows cannot be compared. *failures* counts by code.
    *num_doubled* rows are too many, as another part holds them. *missing* are rows that no part holds:
    up to the source's end where that is known, else up to the last row that one holds.
    """

    path: str
    expected: int | None
    num_parts: int
    num_ok: int
    num_failed: int
    failures: Mapping[str, int]
    num_doubled: int
    missing: tuple[range, ...]

    @property
    def num_missing(self) -> int:
        """Rows that no part holds."""
        return sum(map(len, self.missing))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in *folder*.

    *with_source* tells whether the source was looked at. *strays* are files that are no part of the
    output; *notices* are worth knowing, and no fault. *holder* is what the lock says of a run that holds
    the folder, None where none does.
    """

    folder: Path
    job_name: str | None
    fingerprint: str | None
    with_source: bool
    num_parts: int
    sources: tuple[SourceCount, ...]
    faults: tuple[Fault, ...]
    notices: tuple[str, ...]
    strays: tuple[str, ...]
    holder: str | None

    @property
    def exit_code(self) -> int:
        """5 where anything is wrong or, against the source, missing; else 0."""
        return OutputError.exit_code if self.faults else 0

    @property
    def is_only_unfinished(self) -> bool:
        """Whether all that is wrong is that rows are still to be done."""
        return bool(self.faults) and all(fault.kind == "missing" for fault in self.faults)


def verify(folder: Path, *, with_source: bool = False) -> Verdict:
    """Read every page of every part in *folder* and say all that is wrong, at once.

    Raises OutputError where *folder* is no output folder or, *with_source*, does not name its source;
    SourceError or JobError where the source cannot be opened.
    """
    _list(folder)  # what is no output folder has no source either
    return verify_against(folder, open_described(folder) if with_source else None)


def verify_against(folder: Path, source: "Source | None") -> Verdict:
    """As `verify`, against *source*, which is open already; None: the parts by themselves."""
    num_looks = 0
    while True:
        # The holder first: whoever adds parts after they are listed is then named.
        before, listing = lock_holder(folder), _list(folder)
        findings = _look(listing, source)
        num_looks += 1
        now = lock_holder(folder)
        # A run that has ended meanwhile may have made good what was found.
        is_old = now is None and (before is not None or _list(folder).inodes != listing.inodes)
        if not (findings.faults and is_old):
            return _verdict(folder, listing, findings, now or before)
        if num_looks == _MAX_LOOKS:
            notices = (*findings.notices, f"the parts changed while they were read, {num_looks} times over")
            return _verdict(folder, listing, replace(findings, notices=notices), now)


@dataclass(frozen=True, slots=True)
class _Findings:
    """What one look at all parts showed, and at the source if there is one."""

    survey: "_Survey"
    with_source: bool
    counts: tuple[SourceCount, ...]
    faults: tuple[Fault, ...]
    notices: tuple[str, ...]


def _look(listing: "_Listing", source: "Source | None") -> _Findings:
    survey = _read(listing.parts)
    parts = survey.parts
    against = SourceCheck({}, {}, (), ()) if source is None else check_source(source, parts)
    counts = _count(survey.checks, against)
    faults = [fault for check in survey.checks for fault in check.faults]
    faults += [*_other_jobs(parts), *_other_versions(parts), *_overlaps(parts, against.moved)]
    faults += [*against.faults, *(() if source is None else _missing(counts))]
    holes = _holes(counts) if source is None else _holes_of_others(counts)
    notices = (*against.notices, *survey.notices, *holes)
    return _Findings(survey, source is not None, tuple(counts), tuple(faults), notices)


def _verdict(folder: Path, listing: "_Listing", findings: _Findings, holder: str | None) -> Verdict:
    leftovers = () if holder is not None else listing.leftovers
    return Verdict(
        folder=folder,
        job_name=job_name(folder),
        fingerprint=_job_of(findings.survey.parts),
        with_source=findings.with_source,
        num_parts=len(findings.survey.checks),
        sources=findings.counts,
        faults=tuple(_beside(holder, findings.faults)),
        notices=(*findings.notices, *_about_strays(listing.foreign, leftovers)),
        strays=(*listing.foreign, *leftovers),
        holder=holder,
    )


def _beside(holder: str | None, faults: Sequence[Fault]) -> Iterator[Fault]:
    for fault in faults:
        is_being_done = holder is not None and fault.kind == "missing"
        yield replace(fault, todo="Wait for the run to end.") if is_being_done else fault


@dataclass(frozen=True, slots=True)
class _Listing:
    """What stands in a folder: files named like parts, what no run writes, what a killed run left.

    *inodes* are those of the parts, by which another file under the same name is known.
    """

    parts: tuple[Path, ...]
    inodes: tuple[int, ...]
    foreign: tuple[str, ...]
    leftovers: tuple[str, ...]


def _list(folder: Path) -> _Listing:
    state = folder / STATE_FOLDER
    try:
        with os.scandir(folder) as entries:
            inodes = {entry.name: entry.inode() for entry in sorted(entries, key=lambda entry: entry.name)}
        temporary = state / "tmp"
        leftovers = sorted(os.listdir(temporary)) if temporary.is_dir() else []  # noqa: PTH208
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be read: {error.strerror}.",
            hint="verify only reads: let this user read the folder and what is in it.",
        ) from None
    parts = [name for name in inodes if name.startswith("part-") and name.endswith(".parquet")]
    if not parts and not state.is_dir():
        raise OutputError(f"{folder} is not an output folder of glm4v-batch: it has no parts.")
    return _Listing(
        tuple(folder / name for name in parts),
        tuple(inodes[name] for name in parts),
        tuple(name for name in inodes if name not in {*parts, STATE_FOLDER}),
        tuple(str(Path(STATE_FOLDER, "tmp", name)) for name in leftovers),
    )


@dataclass(frozen=True, slots=True)
class _Survey:
    """The checks of all parts, sorted by name, and what they showed together."""

    checks: tuple[PartCheck, ...]
    notices: tuple[str, ...]

    @property
    def parts(self) -> list[Part]:
        return [Part(check.path, check.info) for check in self.checks if check.info is not None]


def _read(paths: Sequence[Path]) -> _Survey:
    checks, ids, num_ids = [], [], 0
    for check in check_parts(paths):
        checks.append(check.without_ids())
        num_ids += len(check.ids)
        if num_ids <= _MAX_IDS:
            ids.append(check.ids)
    checks.sort(key=lambda check: check.path.name)
    notices = [*_about_ids(ids, is_all=num_ids <= _MAX_IDS), *_about_checksums(checks), *_about_types(checks)]
    return _Survey(tuple(checks), tuple(notices))


def _about_ids(hashes: Sequence[NDArray[np.int64]], *, is_all: bool) -> Iterator[str]:
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.int64)
    repeated = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    if repeated:
        yield f"ids that stood before: {format_count(repeated, 'row')}; rows are told apart by source and row"
    if not is_all:
        yield f"ids were compared within {format_count(len(ordered), 'row')} only, for want of memory"


def _about_checksums(checks: Sequence[PartCheck]) -> Iterator[str]:
    without = [check.path.name for check in checks if check.info is not None and not check.has_checksums]
    if without:
        yield f"{_some(without, 'part')} without page checksums: damage to the data may not show"


def _about_types(checks: Sequence[PartCheck]) -> Iterator[str]:
    # Wider numbers of later files do this, and so does damage to a footer, which has no checksum.
    by_types: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for check in checks:
        if not check.faults:
            by_types[check.passed].append(check.path.name)
    (usual, _), *others = sorted(by_types.items(), key=lambda item: -len(item[1])) or [((), [])]
    for types, names in others:
        differing = ", ".join(sorted(set(types) - set(usual)))
        yield f"{_some(names, 'part')} with other types than the rest: {sanitise(differing)}"


def _some(names: Sequence[str], noun: str) -> str:
    shown = ", ".join(sanitise(name) for name in names[:_NAMED])
    more = ", …" if len(names) > _NAMED else ""
    return f"{format_count(len(names), noun)} ({shown}{more})"


def _about_strays(foreign: Sequence[str], leftovers: Sequence[str]) -> Iterator[str]:
    if foreign:
        yield f"{_some(foreign, 'file')} not of glm4v-batch: who reads the whole folder meets them"
    if leftovers:
        yield f"{_some(leftovers, 'file')} left by a run that was killed: the next run removes them"


def _job_of(parts: Sequence[Part]) -> str | None:
    """The fingerprint of most of the *parts*."""
    counted = Counter(part.info.fingerprint for part in parts)
    return counted.most_common(1)[0][0] if counted else None


def _other_jobs(parts: Sequence[Part]) -> Iterator[Fault]:
    by_job: defaultdict[str, list[Part]] = defaultdict(list)
    for part in parts:
        by_job[part.info.fingerprint].append(part)
    (_, ours), *others = sorted(by_job.items(), key=lambda item: -len(item[1])) or [("", [])]
    for _, theirs in others:
        keys = differing_keys(ours[0].info.settings, theirs[0].info.settings)
        yield Fault(
            "other_job",
            theirs[0].path.name,
            f"{_some([part.path.name for part in theirs], 'part')} of another job than the other "
            f"{len(ours):,}: {sanitise(', '.join(keys))} differ.",
            "Move the parts of one of the jobs to a folder of their own.",
        )


def _other_versions(parts: Sequence[Part]) -> Iterator[Fault]:
    versions: defaultdict[str, dict[str, Part]] = defaultdict(dict)
    for part in parts:
        versions[part.info.source_path].setdefault(repr(sorted(part.info.source.items())), part)
    for path, found in versions.items():
        if len(found) > 1:
            names = [part.path.name for part in found.values()]
            yield Fault(
                "changed",
                path,
                f"the parts of {sanitise(path)} are of {len(found)} versions of it, such as {names[0]} and "
                f"{names[1]}.",
                "Move away those of the versions that are no more; the next run does their rows again.",
            )


def _overlaps(parts: Sequence[Part], moved: Mapping[str, str]) -> Iterator[Fault]:
    def place(part: Part) -> tuple[str, int]:
        return moved.get(part.info.source_path, part.info.source_path), part.info.first_row

    widest: Part | None = None
    for part in sorted(parts, key=place):
        if widest is not None and place(widest)[0] == place(part)[0]:
            shared = range(part.info.first_row, min(part.info.rows.stop, widest.info.rows.stop))
            if shared:
                yield Fault(
                    "doubled",
                    part.path.name,
                    f"{sanitise(widest.path.name)} and {sanitise(part.path.name)} both hold "
                    f"{_rows(shared)} of {sanitise(place(part)[0])}.",
                    "Move one of them away: each row may stand in one part only.",
                )
            if part.info.rows.stop <= widest.info.rows.stop:
                continue
        widest = part


def _rows(rows: range) -> str:
    return f"row {rows.start}" if len(rows) == 1 else f"rows {rows.start}–{rows.stop - 1}"


def _count(checks: Sequence[PartCheck], against: SourceCheck) -> list[SourceCount]:
    by_path: defaultdict[str, list[PartCheck]] = defaultdict(list, {path: [] for path in against.expected})
    for check in checks:
        if check.info is not None:
            path = check.info.source_path
            by_path[against.moved.get(path, path)].append(check)
    return [_count_source(path, found, against.expected.get(path)) for path, found in by_path.items()]


def _count_source(path: str, checks: Sequence[PartCheck], expected: int | None) -> SourceCount:
    infos = [check.info for check in checks if check.info is not None]
    done = _joined([info.rows for info in infos])
    end = expected if expected is not None else max((rows.stop for rows in done), default=0)
    failures: Counter[str] = Counter()
    for check in checks:
        failures.update(check.failures)
    return SourceCount(
        path=path,
        expected=expected,
        num_parts=len(infos),
        num_ok=sum(info.num_ok for info in infos),
        num_failed=sum(info.num_failed for info in infos),
        failures=dict(failures.most_common()),
        num_doubled=sum(info.num_rows for info in infos) - sum(map(len, done)),
        missing=tuple(gaps(end, done)),
    )


def _joined(ranges: Sequence[range]) -> list[range]:
    """The rows of all *ranges*, each once, as few ascending ranges.

    >>> _joined([range(5, 9), range(0, 4), range(3, 5)])
    [range(0, 9)]
    """
    joined: list[range] = []
    for rows in sorted(ranges, key=lambda each: each.start):
        if joined and rows.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, rows.stop))
        else:
            joined.append(rows)
    return joined


def _missing(counts: Sequence[SourceCount]) -> Iterator[Fault]:
    lacking = [count for count in counts if count.num_missing and count.expected is not None]
    if lacking:
        first = lacking[0]
        yield Fault(
            "missing",
            first.path,
            f"{format_count(sum(count.num_missing for count in lacking), 'row')} of "
            f"{format_count(len(lacking), 'source')} stand in no part, the first is row "
            f"{first.missing[0].start} of {sanitise(first.path)}.",
            "Run the job again: glm4v-batch run JOB",
        )


def _holes(counts: Sequence[SourceCount]) -> Iterator[str]:
    lacking = [count for count in counts if count.num_missing]
    if lacking:
        holes = sum(count.num_missing for count in lacking)
        yield (
            f"{format_count(holes, 'row')} between others stand in no part, the first is row "
            f"{lacking[0].missing[0].start} of {sanitise(lacking[0].path)}: an interrupted run leaves such "
            "holes and the next one fills them; a part that was lost leaves one too"
        )


def _holes_of_others(counts: Sequence[SourceCount]) -> Iterator[str]:
    lacking = [count for count in counts if count.num_missing and count.expected is None]
    for count in lacking:
        yield (
            f"{format_count(count.num_missing, 'row')} between others of {sanitise(count.path)} stand in no "
            "part, and it cannot be compared"
        )
