"""What a run will be like, before a weight is read: where the model goes, how many at once, how long."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm4v_batch.activations import can_predict
from glm4v_batch.checkpoint import Checkpoint
from glm4v_batch.devices import find_devices
from glm4v_batch.engine_choice import reason_for_generate
from glm4v_batch.errors import PlacementError, first_line
from glm4v_batch.job import Job
from glm4v_batch.needs import ModelNeeds, read_needs
from glm4v_batch.packed_limits import CPU_ROWS, GPU_ROWS, PackedDemand, packed_limits, tokens_of
from glm4v_batch.placement import expected_batch_size, packed_needs, place, standing_bytes
from glm4v_batch.prepare import PreprocessSettings
from glm4v_batch.report import read_report, read_runs
from glm4v_batch.sources import Source
from glm4v_batch.speed import TimeEstimate, WorkAhead, estimate, prior_seconds, side_by_side
from glm4v_batch.survey import Survey, survey, worst_case
from glm4v_batch.types import BatchRun, Device, PeakSample, Placement, Replica, RequestSize
from glm4v_batch.units import GIB

_DIGEST_CHARACTERS = 12
_LARGER_THAN_SEEN = 1.25
_GUESSED_IMPORT_SECONDS = 8.0
_GUESSED_BYTES_PER_SECOND = 1e9
# Measured on an H200 host: 8.4 GiB of layers in 1.3 s a step. A disk is guessed without the page cache.
_HOST_BYTES_PER_SECOND = 6.5e9
_DISK_BYTES_PER_SECOND = 2e9


@dataclass(frozen=True, slots=True)
class Forecast:
    """*typical* and *worst* are the requests that the placement was made for.

    *contexts* name each replica's model and kind of devices; *runs* are the batches that earlier runs
    measured in each context, the oldest first. *batch_size* is how many typical requests a replica is
    expected to take at once, *time* how long what is left will take: None where nothing is known of it.
    *image_patches* is the most that one image may have, *reasons_for_generate* why the packed engine does
    not run on each replica, None where it does.
    """

    devices: tuple[Device, ...]
    needs: ModelNeeds
    survey: Survey
    typical: RequestSize
    worst: RequestSize
    placement: Placement
    image_patches: int
    reasons_for_generate: tuple[str | None, ...] = ()
    contexts: tuple[str, ...] = ()
    runs: Mapping[str, Sequence[BatchRun]] = field(default_factory=dict)
    batch_size: int = 1
    time: TimeEstimate | None = None

    def is_packed(self, replica: int) -> bool:
        """Whether the packed engine runs on *replica*."""
        return self.reasons_for_generate[replica] is None

    def samples(self, replica: int) -> list[PeakSample]:
        """What the memory model of *replica* can learn from earlier runs."""
        runs = self.runs[self.contexts[replica]]
        return [PeakSample(run.shape, run.peak_bytes, run.out_of_memory) for run in runs if run.peak_bytes]


def make_forecast(
    job: Job,
    checkpoint: Checkpoint,
    source: Source,
    preprocess: PreprocessSettings,
    left: Sequence[tuple[str, range]],
    num_left: int | None,
) -> Forecast:
    """The forecast for the rows in *left*, by the path of their shard.

    Raises PlacementError where the model fits nowhere, SourceError where the sampled rows cannot be read.
    """
    devices = find_devices(job.devices.use, _limit_bytes(job))
    needs = read_needs(checkpoint, job.model.dtype)
    sampled = survey(source, left, preprocess)
    worst = worst_case(preprocess, sampled.sizes)
    typical = sampled.typical or worst
    (host,) = find_devices("cpu")
    image_patches = worst_case(preprocess).visual_patches
    # What can only be guessed refuses no card: the first requests are measured, and one that fits not even
    # alone fails as a row.
    must_fit = worst if can_predict(needs.config) else typical
    placement = place(devices, needs, job.devices, must_fit, typical, host, image_patches)
    forecast = Forecast(
        devices=devices,
        needs=needs,
        survey=sampled,
        typical=typical,
        worst=worst,
        placement=placement,
        image_patches=image_patches,
    )
    reasons = tuple(_reason_for_generate(job, forecast, replica) for replica in placement.replicas)
    return _with_runs(job, replace(forecast, reasons_for_generate=reasons), num_left)


def _reason_for_generate(job: Job, forecast: Forecast, replica: Replica) -> str | None:
    """One card more, however small, takes the faster engine from no other."""
    if reason := reason_for_generate(job, forecast.needs, replica):
        return reason
    try:
        _packed_rows(job, forecast, replica)
    except PlacementError as error:
        if job.batching.engine == "packed":
            raise
        return first_line(error)
    return None


def _with_runs(job: Job, forecast: Forecast, num_left: int | None) -> Forecast:
    """*forecast* with what earlier runs measured, the batch size and the time."""
    contexts = tuple(
        context_of(forecast.needs, replica, is_packed=forecast.is_packed(index))
        for index, replica in enumerate(forecast.placement.replicas)
    )
    known = replace(forecast, contexts=contexts, runs=_runs(Path(job.output.path), contexts))
    sizes = _batch_sizes(job, known)
    share = sys.maxsize if num_left is None else math.ceil(num_left / len(sizes))
    sized = replace(known, batch_size=min(*sizes, share))
    return replace(sized, time=_time(job, sized, sizes, num_left))


def packed_demand(job: Job, forecast: Forecast, replica: Replica) -> PackedDemand:
    """What the packed engine of *replica* is asked for."""
    has_gpu = replica.devices[0].index is not None
    largest = max((size.visual_patches for size in forecast.survey.sizes), default=forecast.image_patches)
    return PackedDemand(
        needs=tuple(packed_needs(replica, forecast.needs)),
        max_rows=job.batching.max_batch_size or (GPU_ROWS if has_gpu else CPU_ROWS),
        typical=forecast.typical,
        worst=forecast.worst,
        # A larger one that comes is encoded too: the pool makes room for it.
        image_patches=min(forecast.image_patches, int(_LARGER_THAN_SEEN * largest)),
    )


def _packed_rows(job: Job, forecast: Forecast, replica: Replica) -> int:
    """How many typical requests the packed engine is expected to have in hand at once."""
    standing = standing_bytes(replica, forecast.needs)
    room = [
        device.budget_bytes(job.devices.memory_fraction) - weights
        for device, weights in zip(replica.devices, standing, strict=True)
    ]
    limits = packed_limits(packed_demand(job, forecast, replica), room)
    return min(limits.max_rows, limits.pool_tokens // tokens_of(forecast.typical))


def _fitting(job: Job, forecast: Forecast, index: int) -> int:
    replica = forecast.placement.replicas[index]
    if forecast.is_packed(index):
        return _packed_rows(job, forecast, replica)
    fraction = job.devices.memory_fraction
    return expected_batch_size(replica, forecast.needs, forecast.typical, fraction, forecast.samples(index))


def _batch_sizes(job: Job, forecast: Forecast) -> list[int]:
    """How many typical requests each replica could take at once."""
    most = job.batching.max_batch_size or sys.maxsize
    replicas = range(len(forecast.placement.replicas))
    # A request that fits nowhere by prediction is tried all the same.
    return [min(max(1, _fitting(job, forecast, index)), most) for index in replicas]


def _time(
    job: Job, forecast: Forecast, batch_sizes: Sequence[int], num_left: int | None
) -> TimeEstimate | None:
    if num_left is None:
        return None
    load_seconds = _load_seconds(job, forecast)
    if len(set(forecast.contexts)) == 1:
        ahead = WorkAhead(forecast.survey, num_left, forecast.batch_size, len(batch_sizes), load_seconds)
        return _time_on(forecast, 0, ahead)
    alone = (
        _time_on(forecast, index, WorkAhead(forecast.survey, num_left, size))
        for index, size in enumerate(batch_sizes)
    )
    return side_by_side([time for time in alone if time is not None], load_seconds)


def _time_on(forecast: Forecast, index: int, ahead: WorkAhead) -> TimeEstimate | None:
    replica = forecast.placement.replicas[index]
    prior = prior_seconds(
        forecast.needs.config,
        replica.devices[0],
        fetching_seconds(replica),
        is_packed=forecast.is_packed(index),
    )
    return estimate(ahead, forecast.runs[forecast.contexts[index]], prior)


def fetching_seconds(replica: Replica) -> float:
    """What fetching the offloaded weights of *replica* adds to each step: a guess."""
    is_on_disk = "disk" in replica.device_map.values()
    return replica.offloaded_bytes / (_DISK_BYTES_PER_SECOND if is_on_disk else _HOST_BYTES_PER_SECOND)


def context_of(needs: ModelNeeds, replica: Replica, *, is_packed: bool = False) -> str:
    """Names a model and engine on a kind of devices: what was measured there holds for replicas like it."""
    config = _digest(needs.config)
    names = ", ".join(device.name for device in replica.devices)
    layout = "" if replica.device_map.keys() == {""} else f" as {_digest(replica.device_map)}"
    engine = " packed" if is_packed else ""
    return f"{config} {needs.bytes_per_value} bytes on {names}{layout}{engine}"


def _digest(mapping: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:_DIGEST_CHARACTERS]


def _limit_bytes(job: Job) -> int | None:
    limit_gib = job.devices.memory_limit_gib
    return None if limit_gib is None else int(limit_gib * GIB)


def _runs(folder: Path, contexts: Sequence[str]) -> dict[str, list[BatchRun]]:
    runs: dict[str, list[BatchRun]] = {context: [] for context in contexts}
    for context, run in read_runs(folder):
        if context in runs:
            runs[context].append(run)
    return runs


def _load_seconds(job: Job, forecast: Forecast) -> float:
    """What loading took the last time, or a guess: the imports, and the weights from a disk."""
    match read_report(Path(job.output.path)):
        # The file may hold anything: what no run writes there counts as not there.
        case {"contexts": contexts, "replicas": {"load_seconds": float(measured)}} if (
            contexts == list(forecast.contexts) and 0 < measured < math.inf
        ):
            return measured
    return _GUESSED_IMPORT_SECONDS + forecast.needs.weight_bytes / _GUESSED_BYTES_PER_SECOND
