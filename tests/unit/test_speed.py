"""How long a job is said to take, how sure that is, and what it learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_batch.speed import TimeEstimate, WorkAhead, estimate, prior_seconds
from glm4v_batch.survey import Survey
from glm4v_batch.types import BatchRun, BatchShape, Device, RequestSize

GPU = Device(0, "a GPU", 24 << 30, 24 << 30)
CPU = Device(None, "CPU", 24 << 30, 24 << 30)
NEW_TOKENS = 128

GLM_4_1V_9B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "num_hidden_layers": 40,
        "vocab_size": 151552,
    },
    "vision_config": {"hidden_size": 1536, "depth": 24, "out_hidden_size": 4096, "intermediate_size": 13696},
}
PRIOR = prior_seconds(GLM_4_1V_9B, GPU)


@dataclass(frozen=True)
class SimulatedJob:
    """Requests in the order of their source, and the batches that a simulated device ran them in."""

    sizes: list[RequestSize]
    runs: list[BatchRun]
    batch_size: int

    def split(self, num_batches: int) -> tuple[list[BatchRun], WorkAhead, float]:
        """The first batches, what is ahead after them, and how long that took in truth."""
        done, rest = self.runs[:num_batches], self.runs[num_batches:]
        left = self.sizes[sum(run.shape.batch_size for run in done) :]
        ahead = WorkAhead(sampled(left), len(left), self.batch_size)
        return done, ahead, sum(run.seconds for run in rest)


def sampled(sizes: Sequence[RequestSize], num_places: int = 16) -> Survey:
    starts = [len(sizes) * place // num_places for place in range(num_places)]
    return Survey(tuple(tuple(sizes[start : start + 16]) for start in starts), {})


@cache
def simulated(
    seed: int, *, batch_size: int = 24, noise: float = 0.15, first_factor: float = 3.0
) -> SimulatedJob:
    """Photos in albums of 50 alike; answers of any length; a device unlike the prior.

    Batches grow as trust does. Their seconds are off by *noise*, and the first takes *first_factor*
    times as long.
    """
    rng = np.random.default_rng(seed)
    truth = PRIOR * np.exp(rng.normal(0, 0.5)) * np.exp(rng.normal(0, 0.3, 4))
    albums = np.repeat(rng.lognormal(0, 0.3, 40), 50)
    tokens = np.clip(800 * albums * rng.lognormal(0, 0.5, 2000), 9, 6144).astype(int)
    sizes = [RequestSize(int(t) + 42, 4 * int(t), NEW_TOKENS) for t in tokens]
    runs: list[BatchRun] = []
    start = 0
    while start < len(sizes):
        batch = sizes[start : start + min(batch_size, 4 << len(runs))]
        answers = np.clip(rng.lognormal(np.log(60), 0.5, len(batch)), 1, NEW_TOKENS).astype(int)
        start += len(batch)
        factor = first_factor if not runs else 1.0
        runs.append(timed_run(batch, answers, truth * factor * rng.lognormal(0, noise)))
    return SimulatedJob(sizes, runs, batch_size)


def timed_run(batch: Sequence[RequestSize], answers: np.ndarray[Any, Any], truth: Any) -> BatchRun:
    longest, patches = max(s.prompt_tokens for s in batch), sum(s.visual_patches for s in batch)
    padded = len(batch) * longest
    shape = BatchShape(len(batch), padded, patches, padded + len(batch) * NEW_TOKENS, padded * longest)
    seconds = float(truth @ (answers.max(), patches, padded, answers.sum()))
    return BatchRun(
        shape=shape,
        predicted_bytes=(),
        peak_bytes=(),
        budget_bytes=(),
        out_of_memory=False,
        seconds=seconds,
        prompt_tokens=sum(s.prompt_tokens for s in batch),
        completion_tokens=int(answers.sum()),
    )


def estimated(ahead: WorkAhead, runs: Sequence[BatchRun] = ()) -> TimeEstimate:
    result = estimate(ahead, runs, PRIOR)
    assert result is not None
    return result


def width(result: TimeEstimate) -> float:
    return result.high_seconds / result.low_seconds


EQUAL = [RequestSize(1041, 3996, NEW_TOKENS)] * 400
AHEAD = WorkAhead(sampled(EQUAL), 400, 16)


def equal_runs(count: int, seconds: float = 5.0, batch_size: int = 16) -> list[BatchRun]:
    run = timed_run(EQUAL[:batch_size], np.full(batch_size, NEW_TOKENS), PRIOR)
    return [replace(run, seconds=seconds)] * count


@pytest.mark.parametrize("num_batches", [2, 4, 8, 16, 40])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_the_interval_holds_the_truth_in_most_jobs(num_batches: int, noise: float) -> None:
    held = []
    for seed in range(30):
        runs, ahead, truth = simulated(seed, noise=noise).split(num_batches)
        result = estimated(ahead, runs)
        held.append(result.low_seconds <= truth <= result.high_seconds)

    assert np.mean(held) >= 0.7


def test_the_more_batches_the_narrower_the_interval() -> None:
    jobs = [simulated(seed) for seed in range(15)]

    widths = [
        np.median([width(estimated(ahead, runs)) for runs, ahead, _ in (job.split(count) for job in jobs)])
        for count in (0, 3, 10, 40)
    ]

    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(9)
    assert widths[-1] < 1.4


def test_without_any_batch_it_is_a_guess() -> None:
    result = estimated(AHEAD)

    assert not result.is_measured
    assert result.high_seconds == pytest.approx(3 * result.seconds)
    assert result.low_seconds == pytest.approx(result.seconds / 3)


def test_of_equal_batches_the_total_is_their_sum() -> None:
    result = estimated(AHEAD, equal_runs(10))

    assert result.is_measured
    assert result.seconds == pytest.approx(25 * 5.0, rel=0.01)


def test_replicas_share_the_rows() -> None:
    alone = estimated(AHEAD, equal_runs(10))

    shared = estimated(replace(AHEAD, num_replicas=5), equal_runs(10))

    assert shared.seconds == pytest.approx(alone.seconds / 5, rel=0.01)


def test_a_batch_that_is_not_full_still_takes_its_steps() -> None:
    few, full = (estimated(replace(AHEAD, num_rows=rows), equal_runs(10)) for rows in (1, 16))

    assert full.seconds / 16 < few.seconds < full.seconds


def test_loading_is_counted_once_and_is_certain() -> None:
    plain = estimated(AHEAD, equal_runs(10))

    loaded = estimated(replace(AHEAD, load_seconds=100), equal_runs(10))

    assert loaded.seconds == plain.seconds + 100
    assert loaded.high_seconds - loaded.low_seconds == pytest.approx(plain.high_seconds - plain.low_seconds)


def test_records_that_fail_take_no_time() -> None:
    half_fail = replace(AHEAD.survey, failures={"image_corrupt": len(AHEAD.survey.sizes)})

    result = estimated(replace(AHEAD, survey=half_fail), equal_runs(10))

    assert result.seconds == pytest.approx(estimated(replace(AHEAD, num_rows=200), equal_runs(10)).seconds)


def test_where_no_record_makes_a_request_nothing_is_estimated() -> None:
    assert estimate(replace(AHEAD, survey=Survey((), {"image_corrupt": 9})), equal_runs(3), PRIOR) is None


def test_batches_that_ran_out_of_memory_are_time_lost() -> None:
    runs = equal_runs(10)
    lost = replace(runs[0], out_of_memory=True, seconds=10.0, completion_tokens=0)

    result = estimated(AHEAD, [*runs, lost])

    assert result.seconds == pytest.approx(1.2 * estimated(AHEAD, runs).seconds)


def test_only_batches_that_ran_out_of_memory_leave_it_a_guess() -> None:
    lost = [replace(run, out_of_memory=True) for run in equal_runs(3)]

    assert estimated(AHEAD, lost) == estimated(AHEAD)


def test_batches_without_a_measured_time_are_passed_over() -> None:
    assert estimated(AHEAD, equal_runs(5, seconds=0.0)) == estimated(AHEAD)


def test_a_slow_first_batch_of_each_replica_does_not_count() -> None:
    slow = [replace(run, replica=replica, seconds=60.0) for replica, run in enumerate(equal_runs(4))]
    steady = [replace(run, replica=place % 4) for place, run in enumerate(equal_runs(8))]

    result = estimated(AHEAD, [*slow, *steady])

    assert result.seconds == pytest.approx(25 * 5.0, rel=0.01)


def test_one_odd_batch_in_the_middle_hardly_counts() -> None:
    runs = equal_runs(20)
    runs[10] = replace(runs[10], seconds=100.0)

    assert estimated(AHEAD, runs).seconds == pytest.approx(25 * 5.0, rel=0.05)


def test_what_was_measured_last_counts_most() -> None:
    runs = [*equal_runs(100, seconds=5.0), *equal_runs(100, seconds=10.0)]

    assert 25 * 8.0 < estimated(AHEAD, runs).seconds <= 25 * 10.5


def test_short_answers_are_learnt() -> None:
    """Wherever written tokens are what takes time, half of them take half of it."""
    prior = np.array([0.0, 0.0, 0.0, 1.0])
    runs = [replace(run, completion_tokens=16 * 64, seconds=16 * 64.0) for run in equal_runs(10)]

    result = estimate(AHEAD, runs, prior)

    assert result is not None
    assert result.seconds == pytest.approx(400 * 64, rel=0.01)


def test_a_sample_of_everything_leaves_less_doubt_than_one_of_a_little() -> None:
    job = simulated(3)
    runs, ahead, _ = job.split(20)
    everything = Survey(tuple(tuple(job.sizes[start : start + 16]) for start in range(0, 2000, 16)), {})

    few, all_of_it = (
        estimated(replace(ahead, survey=survey, num_rows=2000), runs)
        for survey in (sampled(job.sizes, num_places=4), everything)
    )

    assert width(all_of_it) < width(few)


def test_one_place_says_little_of_the_others() -> None:
    """However alike the rows there are."""
    one, many = (
        estimated(replace(AHEAD, survey=sampled(EQUAL, places)), equal_runs(40)) for places in (1, 16)
    )

    assert width(one) > 1.5 * width(many)


@settings(max_examples=40, deadline=None)
@given(
    seconds=st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12),
    num_rows=st.integers(1, 10**6),
    num_replicas=st.integers(1, 8),
)
def test_whatever_was_measured_the_estimate_lies_within_its_interval(
    seconds: list[float], num_rows: int, num_replicas: int
) -> None:
    runs = [
        replace(run, seconds=each)
        for size, each in enumerate(seconds, start=1)
        for run in equal_runs(1, batch_size=size)
    ]

    result = estimated(replace(AHEAD, num_rows=num_rows, num_replicas=num_replicas), runs)

    assert 0 < result.low_seconds < result.seconds < result.high_seconds < float("inf")


def test_the_prior_counts_the_operations_of_glm_4_1v_9b() -> None:
    """27.8 TFLOP for an image of the W1 workload, 2.7 of them in attention's own products."""
    flops = 1e14 * (PRIOR @ (0, 3996, 1041, 128))

    assert flops == pytest.approx(25.1e12, rel=0.005)


@pytest.mark.parametrize(("batch_size", "images_per_second"), [(16, 1.25), (128, 5.9)])
def test_the_guess_holds_what_an_h100_measured(batch_size: int, images_per_second: float) -> None:
    """GLM-4.1V-9B, W1, `generate()` without padding, one H100 80 GB, torch 2.11, transformers 5.17."""
    ahead = WorkAhead(sampled([RequestSize(1041, 3996, 128)] * 1280), 1280, batch_size)

    result = estimated(ahead)

    assert result.low_seconds < 1280 / images_per_second < result.high_seconds


def test_of_experts_only_those_in_use_count() -> None:
    """GLM-4.5V's language model: 106 billion weights, 12 of them in use (its model card)."""
    text = {
        "hidden_size": 4096,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 46,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
    }

    written = prior_seconds({**GLM_4_1V_9B, "text_config": text}, GPU)[3]

    assert 1e14 * written / 2 == pytest.approx(12e9, rel=0.15)


@pytest.mark.parametrize("config", [{}, {"text_config": {}, "vision_config": {}}, {"vision_config": None}])
def test_a_config_that_leaves_all_out_has_a_prior(config: Mapping[str, Any]) -> None:
    assert prior_seconds(config, GPU) == pytest.approx(PRIOR)


@pytest.mark.parametrize(
    ("size", "num_rows", "measured_seconds"),
    [(RequestSize(1041, 3996, 128), 1000, 55.9), (RequestSize(1269, 4908, 117), 700, 59.8)],
)
def test_the_guess_for_the_packed_engine_holds_what_an_h100_took(
    size: RequestSize, num_rows: int, measured_seconds: float
) -> None:
    prior = prior_seconds(GLM_4_1V_9B, GPU, is_packed=True)
    guess = estimate(WorkAhead(sampled([size] * 256), num_rows, 256), [], prior)

    assert guess is not None
    assert guess.low_seconds < measured_seconds < guess.seconds
    assert guess.seconds < 4 * measured_seconds


def test_a_cpu_is_guessed_to_be_much_slower() -> None:
    on_cpu = estimate(AHEAD, [], prior_seconds(GLM_4_1V_9B, CPU))

    assert on_cpu is not None
    assert on_cpu.seconds > 100 * estimated(AHEAD).seconds


def flowing_runs(num_requests: int, num_rows: int, truth: Any) -> tuple[list[BatchRun], float]:
    """Lines of a second each of an engine whose answers come and go, *num_rows* at once; and its seconds."""
    rng = np.random.default_rng(0)
    answers = list(np.clip(rng.lognormal(np.log(40), 0.5, num_requests), 1, NEW_TOKENS).astype(int))
    live: list[list[int]] = []
    runs: list[BatchRun] = []
    seconds = total = 0.0
    steps = written = prompts = ended = asked = 0
    while answers or live:
        if answers and len(live) < num_rows:
            live.append([0, int(answers.pop())])
            prompts += 1
            seconds += float(truth @ (0, 3996, 1041, 0))
        seconds += float(truth @ (1, 0, 0, len(live)))
        steps, written = steps + 1, written + len(live)
        for row in live:
            row[0] += 1
        ended += sum(row[1] for row in live if row[0] == row[1])
        asked += NEW_TOKENS * sum(row[0] == row[1] for row in live)
        live = [row for row in live if row[0] < row[1]]
        if seconds >= 1 or not (answers or live):
            size, padded = max(1, round(written / steps)), prompts * 1041
            shape = BatchShape(size, padded, prompts * 3996, padded + steps * size, 0)
            run = BatchRun(shape, (), (), (), False, seconds, padded, ended, asked_tokens=asked)
            runs.append(run)
            total += seconds
            seconds, steps, written, prompts, ended, asked = 0.0, 0, 0, 0, 0, 0
    return runs, total


def test_answers_that_flow_are_judged_by_the_rows_that_decode_and_by_how_long_they_become() -> None:
    truth = PRIOR * np.array([0.3, 0.4, 0.2, 0.5])
    runs, seconds = flowing_runs(600, 24, truth)

    # More rows are planned for than there ever were, and answers may be three times as long as they are.
    found = estimated(WorkAhead(sampled(EQUAL), 600, 100), runs)

    assert found.low_seconds < seconds < found.high_seconds
    assert found.seconds == pytest.approx(seconds, rel=0.1)


def test_before_the_first_answer_has_ended_all_are_taken_to_be_as_long_as_allowed() -> None:
    truth = PRIOR * np.array([0.3, 0.4, 0.2, 0.5])
    runs, seconds = flowing_runs(600, 24, truth)
    first = [replace(run, asked_tokens=0, completion_tokens=0) for run in runs[:3]]

    found = estimated(WorkAhead(sampled(EQUAL), 600, 24), first)

    assert seconds < found.seconds < 4 * seconds
