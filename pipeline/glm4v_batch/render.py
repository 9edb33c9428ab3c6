"""Turn values into text for people, or JSON for programs. Nothing here decides anything."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from glm4v_batch.executor import Event, Outcome
from glm4v_batch.inspection import InspectedRow
from glm4v_batch.job import Job
from glm4v_batch.parts import Part
from glm4v_batch.plan import Plan
from glm4v_batch.status import Status
from glm4v_batch.types import BatchRun, Completion, Failure
from glm4v_batch.units import format_bytes, format_count, format_seconds

_LOG_SECONDS = 30.0


def as_json(value: object) -> str:
    """*value* as JSON that people can read too."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def job_as_json(job: Job) -> str:
    """Every setting of *job*, defaults filled in."""
    return as_json(job.as_dict())


class Progress:
    """Shows a run as it goes: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._started = self._last_line = time.monotonic()
        self._num_done = 0
        self._num_failed = 0
        self._num_left: int | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def follow(self, events: Iterable[Event]) -> Outcome:
        """Show *events* and return the outcome, which is the last of them."""
        for event in events:
            match event:
                case Plan():
                    self._begin(event)
                case Completion() | Failure():
                    self._count(event)
                case BatchRun() if event.out_of_memory:
                    self._note(f"out of memory: a batch of {event.shape.batch_size} was split")
                case Outcome():
                    return event
        raise AssertionError("a run ends with its outcome")

    def _begin(self, plan: Plan) -> None:
        for line in _plan_lines(plan):
            self._note(line)
        self._num_left = plan.num_left
        if self._stream.isatty() and plan.num_left != 0:
            self._bar = tqdm(total=plan.num_left, unit=" rows", file=self._stream, smoothing=0.1)

    def _count(self, result: Completion | Failure) -> None:
        self._num_done += 1
        self._num_failed += isinstance(result, Failure)
        if self._bar is not None:
            self._bar.update()
            if isinstance(result, Failure):
                self._bar.set_postfix(failed=self._num_failed)
        elif time.monotonic() - self._last_line > _LOG_SECONDS:
            self._last_line = time.monotonic()
            self._note(self._progress_line())

    def _progress_line(self) -> str:
        rate = self._num_done / (self._last_line - self._started)
        total = "" if self._num_left is None else f" of {self._num_left:,}"
        return f"{self._num_done:,}{total} rows, {self._num_failed:,} failed, {rate:.1f} rows/s"

    def _note(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(f"{line}\n")
            self._stream.flush()


def _plan_lines(plan: Plan) -> Iterator[str]:
    job = plan.opened.job
    left = "an unknown number of rows" if plan.num_left is None else format_count(plan.num_left, "row")
    yield f"{job.name}: {left} to do, {plan.num_committed:,} committed in {job.output.path}"
    yield f"model {job.model.name}: " + ("echo engine, no model is loaded" if plan.placement is None else plan.placement.reason)
    for path in plan.vanished:
        yield f"gone: {path}; its parts stay"


def plan_as_text(plan: Plan) -> str:
    """What `plan` prints."""
    opened, job = plan.opened, plan.opened.job
    lines = [
        f"job          {job.name}",
        f"source       {job.source.path}: {format_count(len(opened.shards), 'file')}, {_rows(plan.num_rows)}",
        f"committed    {_rows(plan.num_committed)} in {format_count(len(plan.parts), 'part')} of {job.output.path}",
        f"left         {_rows(plan.num_left)}, {job.output.rows_per_part} to a part",
        f"model        {job.model.name} ({opened.checkpoint.model_type}, {job.model.dtype})",
        *_placement_lines(plan),
        f"fingerprint  {plan.fingerprint[:12]}",
    ]
    lines += [f"gone         {path}; its parts stay" for path in plan.vanished]
    return "\n".join(lines)


def _rows(count: int | None) -> str:
    return "an unknown number of rows" if count is None else format_count(count, "row")


def _placement_lines(plan: Plan) -> Iterator[str]:
    if plan.placement is None:
        yield "engine       echo: no model is loaded"
        return
    yield f"placement    {plan.placement.reason}"
    fraction = plan.opened.job.devices.memory_fraction
    for replica in plan.placement.replicas:
        for device, weights in zip(replica.devices, replica.weight_bytes, strict=True):
            budget = int(device.free_bytes * fraction)
            yield (
                f"{device.torch_name:<12} {device.name}: budget {format_bytes(budget)}, "
                f"weights {format_bytes(weights)}, room for batches {format_bytes(budget - weights)}"
            )


def plan_as_json(plan: Plan) -> str:
    """What `plan --json` prints."""
    job = plan.opened.job
    return as_json(
        {
            "name": job.name,
            "source": [dict(shard.identity) for shard in plan.opened.shards],
            "rows": {"total": plan.num_rows, "committed": plan.num_committed, "left": plan.num_left},
            "parts": len(plan.parts),
            "vanished": plan.vanished,
            "placement": None if plan.placement is None else asdict(plan.placement),
            "fingerprint": plan.fingerprint,
            "settings": plan.opened.settings,
            "output": job.output.path,
        }
    )


def outcome_as_text(outcome: Outcome, job_file: str) -> str:
    """What `run` prints at its end."""
    report, plan = outcome.report, outcome.plan
    rows, folder = report["rows"], plan.opened.job.output.path
    if outcome.signal_number is not None:
        return (
            f"Interrupted. {_rows(plan.num_committed + rows['committed'])} of {_rows(plan.num_rows)} are committed "
            f"in {folder}.\nResume with: glm4v-batch run {job_file}"
        )
    if not rows["committed"]:
        return f"Nothing to do: {_rows(plan.num_committed)} committed in {folder}{_failed(outcome.num_failed)}."
    lines = [
        f"{_rows(rows['committed'])} committed to {folder} in {format_seconds(report['seconds'])}, "
        f"{report['rows_per_second']:.1f} rows/s{_failed(outcome.num_failed)}"
    ]
    lines += [f"  {count:,} × {code}" for code, count in report["failures"].items()]
    return "\n".join([*lines, *_batch_lines(report["batches"])])


def _failed(count: int) -> str:
    return f", {count:,} of them failed" if count else ""


def _batch_lines(batches: Mapping[str, Any]) -> Iterator[str]:
    if batches["num"]:
        yield (
            f"{format_count(batches['num'], 'batch').replace('batchs', 'batches')}, the largest {batches['largest']}, "
            f"{batches['out_of_memory']} out of memory"
        )
    if "peak_bytes" in batches:
        yield (
            f"peak memory {format_bytes(batches['peak_bytes'])}, {batches['budget_used_median']:.0%} of the budget "
            f"in the median batch; predicted against measured, p95: {batches['prediction_error_p95']:.1%}"
        )


def outcome_as_json(outcome: Outcome) -> str:
    """What `run --json` prints."""
    return as_json(
        {
            "exit_code": outcome.exit_code,
            "output": outcome.plan.opened.job.output.path,
            "failed": outcome.num_failed,
            "run": outcome.report,
        }
    )


def status_as_text(status: Status) -> str:
    """What `status` prints."""
    num_rows = status.num_ok + status.num_failed
    lines = [
        f"folder       {status.folder}",
        f"job          {status.job_name or 'unknown'}",
        f"committed    {_rows(num_rows)} in {format_count(status.num_parts, 'part')}: "
        f"{status.num_ok:,} ok, {status.num_failed:,} failed",
    ]
    lines += [f"  {count:>10,}  {code}" for code, count in status.failures.items()]
    lines += [f"source       {path}: {_rows(count)}" for path, count in status.sources.items()]
    lines += [f"batches      {line}" for line in _batch_lines(status.batches)]
    return "\n".join(lines)


def status_as_json(status: Status) -> str:
    """What `status --json` prints."""
    return as_json(asdict(status))


def rows_as_text(rows: Sequence[InspectedRow]) -> str:
    """What `inspect` prints."""
    return "\n\n".join("\n".join(_row_lines(row)) for row in rows)


def _row_lines(row: InspectedRow) -> Iterator[str]:
    yield f"{row.record_id}  ({row.source} row {row.row})"
    if row.failure is not None:
        yield f"  fails at {row.failure.stage}: {row.failure.code}: {row.failure.message}"
        return
    for height, width, tokens in row.images:
        yield f"  image  {width} × {height} pixels as the model sees it, {tokens} visual tokens"
    yield f"  prompt {row.prompt_tokens} tokens: {row.prompt!r}"


def rows_as_json(rows: Sequence[InspectedRow]) -> str:
    """What `inspect --json` prints."""
    return as_json([asdict(row) for row in rows])
