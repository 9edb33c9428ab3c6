"""What a run is expected to be like, and that earlier runs make it better known."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from glm4v_batch import forecast as forecast_module
from glm4v_batch.asked import Asked
from glm4v_batch.errors import PlacementError
from glm4v_batch.forecast import Forecast, context_of, fetching_seconds
from glm4v_batch.job import Job, read_job
from glm4v_batch.output import locked
from glm4v_batch.parts import STATE_FOLDER
from glm4v_batch.plan import make_plan, open_job
from glm4v_batch.render import plan_as_json, plan_as_text
from glm4v_batch.report import Report
from glm4v_batch.speed import prior_seconds
from glm4v_batch.survey import SampleLimits, survey
from glm4v_batch.types import BatchRun, BatchShape, Replica, ReplicaReady
from tests.cards import WORST, cpu, glm_41v, gpu, gpus
from tests.conftest import MakeSource
from tests.e2e.command import write_job


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a survey read what it would on a machine that keeps up, on a host with 10 GiB."""
    unhurried = partial(survey, limits=SampleLimits(seconds=600))
    monkeypatch.setattr(forecast_module, "survey", unhurried)
    monkeypatch.setattr(forecast_module, "find_devices", lambda *_: (cpu(10),))


@pytest.fixture
def job(tmp_path: Path, make_source: MakeSource) -> Job:
    """A job on the tiny model with 50 rows, of which two are broken."""
    source = make_source(50, broken=(3, 40))
    engine = ["devices: {use: cpu}", "batching: {engine: generate}"]
    return read_job(write_job(tmp_path / "job.yaml", source, tmp_path / "out", extra=engine))


def forecast_of(job: Job, limit: int | None = None) -> Forecast:
    forecast = make_plan(open_job(job), Asked(limit=limit)).forecast
    assert forecast is not None
    return forecast


def run(size: int, seconds: float) -> BatchRun:
    """A batch of *size* requests as the source has them, which took 1 GiB for each."""
    shape = BatchShape(size, size * 25, size * 36, size * 89, size * 625)
    peak_bytes = (1 << 28) + size * (1 << 30)
    return BatchRun(shape, (1 << 28,), (peak_bytes,), (10 << 30,), False, seconds, size * 25, size * 64)


def test_a_forecast_rests_on_a_sample_of_the_rows_that_are_left(job: Job) -> None:
    forecast = forecast_of(job)

    assert len(forecast.survey.sizes) == 48
    assert forecast.survey.num_failed == 2
    assert (forecast.typical.prompt_tokens, forecast.typical.visual_patches) == (25, 36)
    assert forecast.worst.visual_patches > forecast.typical.visual_patches
    assert forecast.time is not None
    assert not forecast.time.is_measured


def test_what_earlier_batches_measured_replaces_the_guess(job: Job) -> None:
    guessed = forecast_of(job)
    assert guessed.time is not None
    with locked(Path(job.output.path)):
        report = Report(Path(job.output.path), guessed.contexts)
        report.add_replica(ReplicaReady(0, 3.0, (1 << 28,)))
        for size in (4, 8, 12, 16) * 4:
            report.add_batch(run(size, seconds=0.3 + size * 0.03))
        report.write()

    measured = forecast_of(job)

    assert measured.time is not None
    assert measured.time.is_measured
    # Three seconds of loading, then batches of as many as fit at 1 GiB each.
    num_batches = math.ceil(48 / measured.batch_size)
    assert measured.time.low_seconds < 3 + 0.3 * num_batches + 48 * 0.03 < measured.time.high_seconds
    assert measured.time.high_seconds < guessed.time.high_seconds
    assert measured.batch_size < guessed.batch_size
    assert len(measured.samples(0)) == 16


ODD_REPORTS = [
    ({"replicas": ["load_seconds"]}, "replicas that are a list"),
    ({"replicas": {"load_seconds": "3.0"}}, "seconds that are text"),
    ({"replicas": {"load_seconds": [3.0]}}, "seconds that are a list"),
    ({"replicas": {"load_seconds": 10**400}}, "seconds larger than any float"),
    ({"replicas": {"load_seconds": float("nan")}}, "seconds that are no number"),
    ({"replicas": {"load_seconds": float("inf")}}, "seconds without end"),
    ({"replicas": {"load_seconds": -3.0}}, "seconds below none"),
    ({"contexts": 7, "replicas": {"load_seconds": 3.0}}, "contexts that are a number"),
]


@pytest.mark.parametrize("odd", [odd for odd, _ in ODD_REPORTS], ids=[name for _, name in ODD_REPORTS])
def test_a_report_that_holds_anything_else_counts_as_none(job: Job, odd: dict[str, object]) -> None:
    guessed = forecast_of(job)
    state = Path(job.output.path) / STATE_FOLDER
    state.mkdir(parents=True)
    (state / "report.json").write_text(json.dumps({"contexts": [*guessed.contexts], **odd}))

    assert forecast_of(job).time == guessed.time


def test_batches_of_other_cards_say_nothing(job: Job) -> None:
    guessed = forecast_of(job)
    with locked(Path(job.output.path)):
        Report(Path(job.output.path), ["the same model on another card"]).add_batch(run(8, seconds=4))

    assert forecast_of(job).runs == guessed.runs


def test_the_jobs_largest_batch_is_kept_to(job: Job) -> None:
    capped = job.model_copy(update={"batching": job.batching.model_copy(update={"max_batch_size": 7})})

    assert forecast_of(capped).batch_size == 7


def test_nothing_is_looked_at_where_nothing_is_left(job: Job) -> None:
    elsewhere = job.model_copy(update={"devices": job.devices.model_copy(update={"use": (99,)})})
    plan = make_plan(open_job(elsewhere.model_copy(update={"batching": _echo(job)})))

    assert plan.forecast is None


def _echo(job: Job) -> object:
    return job.batching.model_copy(update={"engine": "echo"})


def on_cards(*gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be cards of these sizes, and weights of GLM-4.1V-9B in the job's model."""
    found = {"cpu": (cpu(64),), "all": tuple(gpus(*gib))}
    monkeypatch.setattr(forecast_module, "find_devices", lambda use, *_: found[use])
    monkeypatch.setattr(forecast_module, "read_needs", lambda *_: glm_41v())


def on_auto(job: Job) -> Job:
    """*job* on all cards, by the engine that serves there."""
    devices = job.devices.model_copy(update={"use": "all"})
    batching = job.batching.model_copy(update={"engine": "auto"})
    return job.model_copy(update={"devices": devices, "batching": batching})


def test_a_small_card_more_takes_the_packed_engine_from_no_other(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = on_auto(job)
    on_cards(24, 24, monkeypatch=monkeypatch)
    two = forecast_of(job)
    on_cards(24, 24, 20, 20, monkeypatch=monkeypatch)

    more = forecast_of(job)

    assert two.reasons_for_generate == (None, None)
    assert [len(replica.devices) for replica in more.placement.replicas] == [1, 1, 2]
    assert more.reasons_for_generate == (None, None, None)
    assert more.contexts[0] == two.contexts[0] != more.contexts[2]
    assert two.time is not None
    assert more.time is not None
    assert more.time.seconds < two.time.seconds


def test_the_time_of_unequal_copies_keeps_to_the_largest_batch(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cards(24, 20, 20, monkeypatch=monkeypatch)
    free = on_auto(job)
    capped = free.model_copy(update={"batching": free.batching.model_copy(update={"max_batch_size": 1})})

    loose, tight = forecast_of(free).time, forecast_of(capped).time

    assert loose is not None
    assert tight is not None
    assert tight.seconds > loose.seconds + 10


@pytest.mark.parametrize("model_type", ["glm4v", "glmga"])
def test_a_guess_at_the_largest_request_keeps_a_model_from_no_card(
    model_type: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cards(24, 24, monkeypatch=monkeypatch)
    needs = replace(glm_41v(), config={**glm_41v().config, "model_type": model_type})
    monkeypatch.setattr(forecast_module, "read_needs", lambda *_: needs)
    # As the published checkpoints have it: 4.8 megapixels, which a guess takes twice the room for.
    monkeypatch.setattr(forecast_module, "worst_case", lambda *_: WORST)

    placement = forecast_of(on_auto(job)).placement

    assert [len(replica.devices) for replica in placement.replicas] == [1, 1]
    assert ("by a guess" in placement.reason) == (model_type == "glmga")


def without_room_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packed engine find no room on copies of several cards."""
    packed_rows = forecast_module._packed_rows

    def rows(job: Job, forecast: Forecast, replica: Replica) -> int:
        if len(replica.devices) > 1:
            raise PlacementError("The copy has no room.")
        return packed_rows(job, forecast, replica)

    monkeypatch.setattr(forecast_module, "_packed_rows", rows)


def test_the_plan_says_which_engine_runs_where(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job = on_auto(job)
    on_cards(24, 20, 20, monkeypatch=monkeypatch)
    without_room_on_several(monkeypatch)

    plan = make_plan(open_job(job))

    text = plan_as_text(plan)
    assert "engine       on GPU 0: packed\n             on GPU 1, GPU 2: generate: The copy" in text
    told = json.loads(plan_as_json(plan))["forecast"]["replicas"]
    assert [(each["engine"], each["devices"]) for each in told] == [("packed", [0]), ("generate", [1, 2])]
    assert all(each["room_bytes"][0] < each["budget_bytes"][0] for each in told)


def test_replicas_on_equal_cards_learn_from_each_other_and_others_do_not() -> None:
    needs = glm_41v()
    whole = Replica((gpu(0, 24),), {"": 0}, (needs.weight_bytes,))
    twin = replace(whole, devices=(gpu(3, 24),))
    other_card = replace(whole, devices=(gpu(0, 24, name="NVIDIA L4"),))
    spread = replace(whole, devices=(gpu(0, 24), gpu(1, 24)), device_map={"model": 0, "lm_head": 1})
    spread_otherwise = replace(spread, device_map={"model": 1, "lm_head": 0})

    contexts = [context_of(needs, each) for each in (whole, twin, other_card, spread, spread_otherwise)]

    assert contexts[0] == contexts[1]
    assert len(set(contexts)) == 4
    assert context_of(replace(needs, bytes_per_value=4), whole) != contexts[0]


def test_offloaded_weights_are_fetched_in_every_step() -> None:
    needs = glm_41v()
    replica = Replica((gpu(0, 24),), {"model": 0, "lm_head": "cpu"}, (1,), offloaded_bytes=13 * 10**9)

    prior = prior_seconds(needs.config, replica.devices[0])
    fetching = prior_seconds(needs.config, replica.devices[0], fetching_seconds(replica))

    assert fetching[0] - prior[0] == pytest.approx(2.0)
    assert fetching[1:] == pytest.approx(prior[1:])
    assert fetching_seconds(replace(replica, device_map={"": "disk"})) > fetching_seconds(replica)
