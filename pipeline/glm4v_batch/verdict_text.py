"""Print a verdict: a table of the sources, every fault with what to do, and the verdict in the last line."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from glm4v_batch.errors import sanitise
from glm4v_batch.render import as_json
from glm4v_batch.units import format_count

if TYPE_CHECKING:
    from glm4v_batch.verify import SourceCount, Verdict

_MAX_SOURCES = 20
_MAX_FAULTS = 50
_MAX_PLACES = 3
_HEADER = ["source", "expected", "committed", "ok", "failed", "missing", "doubled"]


def verdict_as_text(verdict: "Verdict") -> str:
    """What `verify` prints."""
    fingerprint = (verdict.fingerprint or "unknown")[:12]
    lines = [
        f"folder       {verdict.folder}",
        f"job          {verdict.job_name or 'unknown'}, fingerprint {fingerprint}",
        f"parts        {verdict.num_parts:,}, read to the last page",
        "",
        *_table(verdict),
        *_failures(verdict.sources),
        *_notes(verdict),
        *_faults(verdict),
        "",
        _last_line(verdict),
    ]
    return "\n".join(lines)


def _table(verdict: "Verdict") -> Iterator[str]:
    shown, hidden = list(verdict.sources), []
    if len(shown) > _MAX_SOURCES:
        shown.sort(key=lambda count: not (count.num_missing or count.num_doubled))
        shown, hidden = shown[:_MAX_SOURCES], shown[_MAX_SOURCES:]
    table = [_HEADER, *(_cells(sanitise(count.path), [count]) for count in shown)]
    if hidden:
        table.append(_cells(f"and {len(hidden):,} more", hidden))
    if len(verdict.sources) > 1:
        table += _sums(verdict)
    if not verdict.with_source:
        table = [[name, *rest] for name, _expected, *rest in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers in table:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *cells])


def _sums(verdict: "Verdict") -> Iterator[list[str]]:
    """The sums of what was compared and of what was not: together they would say nothing."""
    compared, others = _split(verdict)
    if compared and others:
        yield _cells("all compared", compared)
        yield _cells("all others", others)
    else:
        yield _cells("all", verdict.sources)


def _split(verdict: "Verdict") -> "tuple[list[SourceCount], list[SourceCount]]":
    """The sources whose rows were compared with what they hold, and those that have changed or are gone."""
    compared = [count for count in verdict.sources if count.expected is not None]
    return compared, [count for count in verdict.sources if count.expected is None]


def _cells(name: str, counts: "Sequence[SourceCount]") -> list[str]:
    expected = [count.expected for count in counts if count.expected is not None]
    num_ok, num_failed = sum(count.num_ok for count in counts), sum(count.num_failed for count in counts)
    num_missing = sum(count.num_missing for count in counts)
    num_doubled = sum(count.num_doubled for count in counts)
    numbers = (num_ok + num_failed, num_ok, num_failed, num_missing, num_doubled)
    return [name, f"{sum(expected):,}" if expected else "?", *(f"{number:,}" for number in numbers)]


def _failures(counts: "Sequence[SourceCount]") -> Iterator[str]:
    codes: Counter[str] = Counter()
    for count in counts:
        codes.update(count.failures)
    if codes:
        yield ""
        yield "failures by code"
        for code, number in codes.most_common():
            yield f"{number:>9,}  {sanitise(code)}{_where(code, counts)}"


def _where(code: str, counts: "Sequence[SourceCount]") -> str:
    """In which sources, where there are several; the ones with most of them."""
    if len(counts) == 1:
        return ""
    having = sorted((count for count in counts if count.failures.get(code)), key=lambda c: -c.failures[code])
    named = [f"{count.failures[code]:,} in {sanitise(count.path)}" for count in having[:_MAX_PLACES]]
    more = [f"and {len(having) - _MAX_PLACES:,} more sources"] if len(having) > _MAX_PLACES else []
    return ": " + ", ".join([*named, *more])


def _notes(verdict: "Verdict") -> Iterator[str]:
    notices = list(verdict.notices)
    if verdict.holder is not None:
        notices.insert(0, f"a run holds this folder ({verdict.holder}): parts that it adds now were not read")
    if notices:
        yield ""
        yield "to know"
        yield from (f"  - {notice}" for notice in notices)


def _faults(verdict: "Verdict") -> Iterator[str]:
    for fault in verdict.faults[:_MAX_FAULTS]:
        yield ""
        yield f"{'UNFINISHED' if fault.kind == 'missing' else 'FAULT'}  {fault.what}"
        yield f"  {fault.todo}"
    if len(verdict.faults) > _MAX_FAULTS:
        yield ""
        yield f"and {len(verdict.faults) - _MAX_FAULTS:,} more faults: --json lists them all"


def _last_line(verdict: "Verdict") -> str:
    rows = _how_many(verdict.sources)
    if verdict.is_only_unfinished:
        return f"Not finished: {rows}, are sound, each once; others are still to be done."
    if verdict.faults:
        return f"Not sound: {format_count(len(verdict.faults), 'fault')}."
    if verdict.with_source:
        compared, gone = _split(verdict)
        beside = f" Beside them, of sources that are gone: {_how_many(gone)}." if gone else ""
        return (
            f"Sound and complete: every row of the source stands exactly once: {_how_many(compared)}.{beside}"
        )
    return f"Sound: {rows}, each once. Whether any is missing only --source can tell."


def _how_many(counts: "Sequence[SourceCount]") -> str:
    num_ok, num_failed = sum(count.num_ok for count in counts), sum(count.num_failed for count in counts)
    return f"{format_count(num_ok + num_failed, 'row')}, {num_ok:,} ok and {num_failed:,} failed"


def verdict_as_json(verdict: "Verdict") -> str:
    """What `verify --json` prints."""
    sources = [{**asdict(count), "missing": _ranges(count.missing)} for count in verdict.sources]
    described = {**asdict(verdict), "sources": sources}
    return as_json({"exit_code": verdict.exit_code, **described})


def _ranges(missing: Sequence[range]) -> list[dict[str, int]]:
    return [{"first_row": rows.start, "num_rows": len(rows)} for rows in missing]
