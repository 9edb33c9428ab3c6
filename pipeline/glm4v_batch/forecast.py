"""What a run will be like, before a weight is read: where the model goes, how many at once, how long."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm4v_batch.checkpoint import Checkpoint
from glm4v_batch.devices import find_devices
from glm4v_batch.job import Job
from glm4v_batch.needs import ModelNeeds, read_needs
from glm4v_batch.placement import expected_batch_size, place
from glm4v_batch.preprocess import PreprocessSettings
from glm4v_batch.report import read_report, read_runs
from glm4v_batch.sources import Source
from glm4v_batch.speed import TimeEstimate, WorkAhead, estimate, prior_seconds
from glm4v_batch.survey import Survey, survey, worst_case
from glm4v_batch.types import BatchRun, Device, PeakSample, Placement, Replica, RequestSize
from glm4v_batch.units import GIB

_DIGEST_CHARACTERS = 12
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
    """

    devices: tuple[Device, ...]
    needs: ModelNeeds
    survey: Survey
    typical: RequestSize
    worst: RequestSize
    placement: Placement
    contexts: tuple[str, ...]
    runs: Mapping[str, Sequence[BatchRun]]
    batch_size: int = 1
    time: TimeEstimate | None = None

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
    placement = place(devices, needs, job.devices, worst, typical, host, image_patches)
    contexts = tuple(context_of(needs, replica) for replica in placement.replicas)
    forecast = Forecast(
        devices, needs, sampled, typical, worst, placement, contexts, _runs(Path(job.output.path), contexts)
    )
    sized = replace(forecast, batch_size=_batch_size(job, forecast, num_left))
    return replace(sized, time=_time(job, sized, num_left))


def _batch_size(job: Job, forecast: Forecast, num_left: int | None) -> int:
    sizes = (
        expected_batch_size(
            replica, forecast.needs, forecast.typical, job.devices.memory_fraction, forecast.samples(index)
        )
        for index, replica in enumerate(forecast.placement.replicas)
    )
    # A request that fits nowhere by prediction is tried all the same.
    fitting = max(1, min(sizes))
    share = fitting if num_left is None else math.ceil(num_left / len(forecast.placement.replicas))
    return min(fitting, share, job.batching.max_batch_size or fitting)


def _time(job: Job, forecast: Forecast, num_left: int | None) -> TimeEstimate | None:
    if num_left is None:
        return None
    ahead = WorkAhead(
        forecast.survey,
        num_left,
        forecast.batch_size,
        len(forecast.placement.replicas),
        _load_seconds(job, forecast),
    )
    replica = forecast.placement.replicas[0]
    prior = prior_seconds(forecast.needs.config, replica.devices[0], fetching_seconds(replica))
    return estimate(ahead, forecast.runs[forecast.contexts[0]], prior)


def fetching_seconds(replica: Replica) -> float:
    """What fetching the offloaded weights of *replica* adds to each step: a guess."""
    is_on_disk = "disk" in replica.device_map.values()
    return replica.offloaded_bytes / (_DISK_BYTES_PER_SECOND if is_on_disk else _HOST_BYTES_PER_SECOND)


def context_of(needs: ModelNeeds, replica: Replica) -> str:
    """Names a model on a kind of devices: what was measured there holds for every replica like it."""
    config = _digest(needs.config)
    names = ", ".join(device.name for device in replica.devices)
    layout = "" if replica.device_map.keys() == {""} else f" as {_digest(replica.device_map)}"
    return f"{config} {needs.bytes_per_value} bytes on {names}{layout}"


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
    report = read_report(Path(job.output.path)) or {}
    measured = report.get("replicas", {}).get("load_seconds", 0.0)
    if measured and report.get("contexts") == list(forecast.contexts):
        return float(measured)
    return _GUESSED_IMPORT_SECONDS + forecast.needs.weight_bytes / _GUESSED_BYTES_PER_SECOND
