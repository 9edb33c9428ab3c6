"""Turn values into text for people, or JSON for programs. Nothing here decides anything."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glm4v_batch.errors import on_one_line, printable
from glm4v_batch.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    # Commands that only print settings must not pay for importing what others print.
    from glm4v_batch.executor import Outcome
    from glm4v_batch.forecast import Forecast
    from glm4v_batch.inspection import InspectedRow
    from glm4v_batch.job import Job
    from glm4v_batch.needs import ModelNeeds
    from glm4v_batch.plan import Plan
    from glm4v_batch.retry import Retries
    from glm4v_batch.speed import TimeEstimate
    from glm4v_batch.status import Status
    from glm4v_batch.stopping import Reason
    from glm4v_batch.types import Device, Replica


def as_json(value: object) -> str:
    """*value* as JSON that people can read too: only what a terminal would obey is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return re.sub(r"[^ -~\n]", lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]


def job_as_json(job: "Job") -> str:
    """Every setting of *job*, defaults filled in."""
    return as_json(job.as_dict())


def plan_as_text(plan: "Plan") -> str:
    """What `plan` prints."""
    opened, job = plan.opened, plan.opened.job
    shards, parts = format_count(len(opened.shards), "shard"), format_count(len(plan.parts), "part")
    lines = [
        f"job          {job.name}",
        f"source       {on_one_line(job.source.path)}: {shards}, {_rows(plan.num_rows)}",
        f"committed    {_rows(plan.num_committed)} in {parts} of {on_one_line(job.output.path)}",
        f"left         {_left(plan)}",
        f"model        {job.model.name} ({opened.checkpoint.model_type}, {job.model.dtype})",
        *_forecast_lines(plan),
        f"fingerprint  {plan.fingerprint[:12]}",
    ]
    lines += [f"changed      {line}" for line in changed_lines(plan)]
    lines += [f"gone         {on_one_line(path)}; its parts stay" for path in plan.vanished]
    lines += [f"note         {line}" for line in retry_notes(plan)]
    return printable("\n".join(lines))


def _left(plan: "Plan") -> str:
    if plan.retries is None:
        return f"{_rows(plan.num_left)}, {plan.opened.job.output.rows_per_part} to a part"
    codes = ", ".join(f"{count:,} × {code}" for code, count in plan.retries.codes.items())
    return f"{format_count(plan.retries.num_rows, 'failed row')} to do again; failed are {codes or 'none'}"


def changed_lines(plan: "Plan") -> Iterator[str]:
    """Which sources have changed, and what becomes of their parts."""
    for path, count in plan.changed.items():
        parts = format_count(count, "part")
        yield f"{on_one_line(path)}; its {parts} of the old data taken away, its rows done again"


def _rows(count: int | None) -> str:
    return "an unknown number of rows" if count is None else format_count(count, "row")


def _forecast_lines(plan: "Plan") -> Iterator[str]:
    forecast, job = plan.forecast, plan.opened.job
    if forecast is None:
        yield "engine       echo: no model is loaded" if plan.num_left != 0 else "placement    nothing to do"
        return
    yield from (f"device       {_device(device)}" for device in forecast.devices)
    yield f"placement    {forecast.placement.reason}"
    for replica in forecast.placement.replicas:
        lines = _room(replica, forecast.needs, job.devices.memory_fraction)
        yield from (f"             {line}" for line in lines)
    first, *others = _engines(forecast)
    yield f"engine       {first}"
    yield from (f"             {line}" for line in others)
    yield f"requests     {_requests(forecast)}"
    yield f"batch        about {format_count(forecast.batch_size, 'typical request')} at once"
    time = "unknown" if forecast.time is None else time_as_text(forecast.time)
    yield f"time         {time}"


def _engines(forecast: "Forecast") -> Iterator[str]:
    """Which engine runs, a line for each reason; on which GPUs, where there are several reasons."""
    places: defaultdict[str | None, list[Replica]] = defaultdict(list)
    for reason, replica in zip(forecast.reasons_for_generate, forecast.placement.replicas, strict=True):
        places[reason].append(replica)
    for reason, replicas in places.items():
        where = ", ".join(device.label for replica in replicas for device in replica.devices)
        engine = "packed" if reason is None else f"generate: {reason}"
        yield engine if len(places) == 1 else f"on {where}: {engine}"


def _device(device: "Device") -> str:
    limit = (
        "" if device.limit_bytes is None else f", of which the job takes {format_bytes(device.limit_bytes)}"
    )
    name = device.label if device.index is None else f"{device.label}, {device.name}"
    return (
        f"{name}: {format_bytes(device.total_bytes)}, "
        f"{format_bytes(device.others_bytes)} held by others{limit}"
    )


def _room(replica: "Replica", needs: "ModelNeeds", memory_fraction: float) -> Iterator[str]:
    from glm4v_batch.placement import standing_bytes

    standing = standing_bytes(replica, needs)
    for device, weights, kept in zip(replica.devices, replica.weight_bytes, standing, strict=True):
        budget = device.budget_bytes(memory_fraction)
        passing = f", {format_bytes(kept - weights)} for those passing through" if kept > weights else ""
        yield (
            f"{device.label}: budget {format_bytes(budget)}, weights {format_bytes(weights)}{passing}, "
            f"room for batches {format_bytes(budget - kept)}"
        )


def _requests(forecast: "Forecast") -> str:
    typical, worst, sampled = forecast.typical, forecast.worst, forecast.survey
    unusable = f", {sampled.num_failed:,} of them unusable" if sampled.num_failed else ""
    average = (
        f"on average {typical.prompt_tokens:,} prompt tokens with {typical.visual_patches:,} patches"
        if sampled.sizes
        else "none to go by"
    )
    return (
        f"{format_count(len(sampled.sizes) + sampled.num_failed, 'row')} sampled{unusable}: {average}; the "
        f"largest to be ready for has {worst.prompt_tokens:,} with {worst.visual_patches:,}"
    )


def time_as_text(time: "TimeEstimate") -> str:
    """An estimate with its interval, and what it rests on."""
    low, high = format_seconds(time.low_seconds), format_seconds(time.high_seconds)
    basis = "by measured batches" if time.is_measured else "a guess until batches are measured"
    return f"{format_seconds(time.seconds)} ({low} to {high}), {basis}"


def plan_as_json(plan: "Plan") -> str:
    """What `plan --json` prints."""
    job = plan.opened.job
    return as_json(
        {
            "name": job.name,
            "source": [dict(shard.identity) for shard in plan.opened.shards],
            "rows": {"total": plan.num_rows, "committed": plan.num_committed, "left": plan.num_left},
            "parts": len(plan.parts),
            "vanished": plan.vanished,
            "changed": list(plan.changed),
            "retry": None if plan.retries is None else _retries_as_dict(plan.retries),
            "forecast": _forecast_as_dict(plan),
            "fingerprint": plan.fingerprint,
            "settings": plan.opened.settings,
            "output": job.output.path,
        }
    )


def _retries_as_dict(retries: "Retries") -> dict[str, Any]:
    return {"rows": retries.num_rows, "failures": dict(retries.codes), "stuck": retries.num_stuck}


def _replica_as_dict(forecast: "Forecast", index: int, memory_fraction: float) -> dict[str, Any]:
    """What `plan` says of a replica: its engine, and each of its devices' budget and room in bytes."""
    from glm4v_batch.placement import standing_bytes

    replica, reason = forecast.placement.replicas[index], forecast.reasons_for_generate[index]
    budgets = [device.budget_bytes(memory_fraction) for device in replica.devices]
    standing = standing_bytes(replica, forecast.needs)
    return {
        "engine": "packed" if reason is None else "generate",
        "reason_for_generate": reason,
        "devices": [device.index for device in replica.devices],
        "budget_bytes": budgets,
        "room_bytes": [budget - kept for budget, kept in zip(budgets, standing, strict=True)],
    }


def _forecast_as_dict(plan: "Plan") -> dict[str, Any] | None:
    forecast, fraction = plan.forecast, plan.opened.job.devices.memory_fraction
    if forecast is None:
        return None
    num_replicas = len(forecast.placement.replicas)
    return {
        "devices": [asdict(device) for device in forecast.devices],
        "placement": asdict(forecast.placement),
        "weight_bytes": forecast.needs.weight_bytes,
        "sampled": {"rows": len(forecast.survey.sizes), "failures": dict(forecast.survey.failures)},
        "typical_request": asdict(forecast.typical),
        "largest_request": asdict(forecast.worst),
        "replicas": [_replica_as_dict(forecast, index, fraction) for index in range(num_replicas)],
        "batch_size": forecast.batch_size,
        "time": None if forecast.time is None else asdict(forecast.time),
    }


def outcome_as_text(outcome: "Outcome", resume: str) -> str:
    """What `run` prints at its end; *resume* is the command that goes on."""
    report, plan = outcome.report, outcome.plan
    rows, folder = report["rows"], plan.opened.job.output.path
    if outcome.reason is not None:
        stopped = f"{_what_stopped(outcome.reason)} {_how_far(plan, rows['committed'])}"
        return "\n".join([stopped, *_how_to_go_on(outcome, resume)])
    if plan.retries is not None:
        return "\n".join(_retried_lines(plan, report, outcome.num_failed))
    total = plan.num_committed + rows["committed"]
    if not rows["committed"]:
        return _nothing_to_do(plan, total, outcome.num_failed)
    speed = f"{format_seconds(report['seconds'])}, {report['rows_per_second']:.1f} rows/s"
    failed = f", {rows['failed']:,} of them failed" if rows["failed"] else ""
    lines = [f"{_rows(rows['committed'])} committed to {folder} in {speed}{failed}"]
    lines += [f"  {count:,} × {code}" for code, count in report["failures"].items()]
    if outcome.num_failed:
        lines.append(f"{folder} holds {_rows(total)}{_failed(outcome.num_failed)}: see their error_message")
    return "\n".join([*lines, *_batch_lines(report["batches"]), *_run_lines(report)])


def _what_stopped(reason: "Reason") -> str:
    from glm4v_batch.stopping import Interrupted, OutOfTime

    match reason:
        case Interrupted():
            return "Interrupted."
        case OutOfTime():
            return f"Out of time: the run was to end by {reason.deadline:%Y-%m-%d %H:%M:%S %z}."
    codes = ", ".join(f"{count:,} × {code}" for code, count in reason.codes.items())
    return f"Stopped: {reason.num_failed:,} of the last {reason.num_records:,} records failed ({codes})."


def _how_far(plan: "Plan", num_committed: int) -> str:
    folder = plan.opened.job.output.path
    if plan.retries is not None:
        again = format_count(plan.retries.num_rows, "failed row")
        return f"{num_committed:,} of {again} in {folder} were done again."
    return f"{plan.num_committed + num_committed:,} of {_rows(plan.num_rows)} are committed in {folder}."


def _how_to_go_on(outcome: "Outcome", resume: str) -> Iterator[str]:
    from glm4v_batch.failure_watch import TooManyFailed

    if isinstance(outcome.reason, TooManyFailed):
        yield "What was in hand is not committed. Look for what broke: the disk, the paths, the model."
        yield "If these records are so, raise limits.failed_fraction, or set it to null."
        if outcome.num_failed:
            failed = _rows(outcome.num_failed)
            yield f"The {failed} committed as failed can be done again with: --retry-failed"
    yield f"Resume with: {resume}"


def _retried_lines(plan: "Plan", report: Mapping[str, Any], num_failed: int) -> Iterator[str]:
    rows, folder = report["rows"], plan.opened.job.output.path
    assert plan.retries is not None
    if rows["committed"]:
        again = format_count(rows["committed"], "failed row")
        yield f"{again} of {folder} done again: {rows['ok']:,} ok, {rows['failed']:,} failed again"
        yield from (f"  {count:,} × {code}" for code, count in report["failures"].items())
    elif num_failed == 0:
        yield f"Nothing to retry: no row of {folder} failed."
    else:
        codes = ", ".join(f"{count:,} × {code}" for code, count in plan.retries.codes.items())
        yield f"Nothing to retry among the {format_count(num_failed, 'failed row')} of {folder}: {codes}."
    yield from retry_notes(plan)


def retry_notes(plan: "Plan") -> Iterator[str]:
    """What `--retry-failed` leaves as it is."""
    if plan.retries is None:
        return
    if plan.retries.num_stuck:
        stuck = format_count(plan.retries.num_stuck, "failed row")
        yield f"{stuck} left as they are: their source is gone, or they lie beyond --limit"
    if plan.num_missing is None or plan.num_missing > 0:
        yield f"{_rows(plan.num_missing)} not done yet: run without --retry-failed"


def _run_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for device in report["devices"]:
        busy = device["utilisation_mean"]
        yield (
            f"GPU {device['index']}: at most {format_bytes(device['peak_used_bytes'])} in use"
            f"{'' if busy is None else f', busy {busy:.0%} of the time'}"
        )
    plan = report["plan"]
    if plan is not None and plan["actual_seconds"] is not None:
        took, expected = format_seconds(plan["actual_seconds"]), format_seconds(plan["seconds"])
        yield f"took {took}; the plan said {expected}"


def _nothing_to_do(plan: "Plan", total: int, num_failed: int) -> str:
    job = plan.opened.job
    if total == 0:
        return f"Nothing to do: {job.source.path} has no rows."
    return f"Nothing to do: all {_rows(total)} are committed in {job.output.path}{_failed(num_failed)}."


def _failed(count: int) -> str:
    return f"; {count:,} of the folder's rows failed" if count else ""


def _batch_lines(batches: Mapping[str, Any]) -> Iterator[str]:
    if batches["num"]:
        noun = "batch" if batches["num"] == 1 else "batches"
        yield (
            f"{batches['num']:,} {noun}, the largest {batches['largest']}, "
            f"{batches['out_of_memory']} out of memory"
        )
    if "peak_bytes" in batches:
        yield (
            f"peak {format_bytes(batches['peak_bytes'])}, median {batches['budget_used_median']:.0%} of the "
            f"budget; predicted against measured, p95: {batches['prediction_error_p95']:.1%}"
        )


def outcome_as_json(outcome: "Outcome") -> str:
    """What `run --json` prints."""
    return as_json(
        {
            "exit_code": outcome.exit_code,
            "output": outcome.plan.opened.job.output.path,
            "failed": outcome.num_failed,
            "stopped": None if outcome.reason is None else _what_stopped(outcome.reason),
            "run": outcome.report,
        }
    )


def status_as_text(status: "Status") -> str:
    """What `status` prints."""
    rows = f"{_rows(status.num_ok + status.num_failed)} in {format_count(status.num_parts, 'part')}"
    lines = [
        f"folder       {status.folder}",
        f"job          {status.job_name or 'unknown'}",
        f"committed    {rows}: {status.num_ok:,} ok, {status.num_failed:,} failed",
    ]
    lines += [f"  {count:>10,}  {code}" for code, count in status.failures.items()]
    if status.num_failed:
        lines.append("retry        glm4v-batch run JOB --retry-failed")
    lines += [f"source       {on_one_line(path)}: {_rows(count)}" for path, count in status.sources.items()]
    lines += [f"batches      {line}" for line in _batch_lines(status.batches)]
    return printable("\n".join(lines))


def status_as_json(status: "Status") -> str:
    """What `status --json` prints."""
    return as_json(asdict(status))


def rows_as_text(rows: Sequence["InspectedRow"]) -> str:
    """What `inspect` prints."""
    return printable("\n\n".join("\n".join(_row_lines(row)) for row in rows))


def _row_lines(row: "InspectedRow") -> Iterator[str]:
    yield f"{row.record_id}  ({row.source} row {row.row})"
    if row.failure is not None:
        yield f"  fails at {row.failure.stage}: {row.failure.code}: {row.failure.message}"
        return
    for height, width, tokens in row.images:
        yield f"  image  {width} × {height} pixels as the model sees it, {tokens} visual tokens"
    yield f"  prompt {row.prompt_tokens} tokens: {row.prompt!r}"


def rows_as_json(rows: Sequence["InspectedRow"]) -> str:
    """What `inspect --json` prints."""
    return as_json([asdict(row) for row in rows])
