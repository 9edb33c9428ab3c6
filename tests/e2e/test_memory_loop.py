"""The real loop on the tiny GLM-4V under a cap that it really exceeds: measure, fit, batch, split."""

from collections.abc import Sequence

import pytest

from glm4v_batch.types import BatchRun, Completion, Failure, Request
from tests.cpu_meter import CpuMeter
from tests.tiny import answers, runs, sample, texts, weight_bytes

SHORT = "generation.max_new_tokens=3"
MIB = 1 << 20


def question_requests() -> list[Request]:
    _, requests = sample("question")
    return requests


def used(run: BatchRun) -> float:
    """The share of the budget for activations that a batch used."""
    weights = weight_bytes()
    return (run.peak_bytes[0] - weights) / (run.budget_bytes[0] - weights)


def ids(results: Sequence[object]) -> list[str]:
    return sorted(r.record_id for r in results if isinstance(r, (Completion, Failure)))


def test_batches_grow_without_an_oom_until_the_budget_is_used() -> None:
    meter = CpuMeter(weight_bytes(), weight_bytes() + 48 * MIB)
    requests = question_requests()

    events = list(answers("question", requests, meter=meter, overrides=(SHORT,)))

    batches = runs(events)
    assert not any(run.out_of_memory for run in batches)
    assert ids(events) == sorted(r.record_id for r in requests)
    # The last batch holds what is left over.
    assert max(used(run) for run in batches[:-1]) >= 0.8
    assert sorted(used(run) for run in batches[-8:-1])[3] >= 0.8, [f"{used(run):.2f}" for run in batches]
    assert batches[0].shape.batch_size < max(run.shape.batch_size for run in batches)


def test_predictions_come_near_the_measured_peaks() -> None:
    meter = CpuMeter(weight_bytes(), weight_bytes() + 48 * MIB)

    batches = runs(answers("question", question_requests(), meter=meter, overrides=(SHORT,)))

    late = batches[len(batches) // 2 :]
    errors = sorted(abs(run.predicted_bytes[0] - run.peak_bytes[0]) / run.peak_bytes[0] for run in late)
    assert errors[int(0.95 * len(errors))] < 0.15, errors


class LoweredMeter(CpuMeter):
    """Another process takes memory away after some batches: the cap falls without notice."""

    def __init__(self, cap_bytes: int, lowered_bytes: int, after_batches: int) -> None:
        super().__init__(weight_bytes(), cap_bytes)
        self._told_bytes = cap_bytes
        self._lowered_bytes = lowered_bytes
        self._batches_left = after_batches

    def limit_bytes(self) -> tuple[int, ...]:
        # As on a card where the other process comes between our look and our allocation.
        return (self._told_bytes,)

    def watch(self):  # type: ignore[no-untyped-def]  # noqa: ANN201  the context manager of CpuMeter.watch
        self._batches_left -= 1
        if self._batches_left < 0:
            self.cap_bytes = self._lowered_bytes
        return super().watch()


def test_batches_shrink_when_the_cap_falls_and_every_record_ends_once() -> None:
    requests = question_requests()
    low = weight_bytes() + 20 * MIB
    meter = LoweredMeter(weight_bytes() + 48 * MIB, low, after_batches=12)

    events = list(answers("question", requests, meter=meter, overrides=(SHORT,)))

    batches = runs(events)
    before = [run for run in batches[:12] if not run.out_of_memory]
    after = [run for run in batches[12:] if not run.out_of_memory]
    assert any(run.out_of_memory for run in batches)
    assert after[-2].shape.batch_size < before[-1].shape.batch_size
    assert max(run.peak_bytes[0] for run in after) <= low
    assert ids(events) == sorted(r.record_id for r in requests)
    assert not any(isinstance(event, Failure) for event in events)


def test_splitting_changes_no_text() -> None:
    requests = question_requests()[:60]
    calm = texts(answers("question", requests, overrides=(SHORT,)))
    meter = LoweredMeter(weight_bytes() + 48 * MIB, weight_bytes() + 12 * MIB, after_batches=1)

    events = list(answers("question", requests, meter=meter, overrides=(SHORT,)))

    assert any(run.out_of_memory for run in runs(events))
    assert texts(events) == calm


@pytest.fixture
def one_giant() -> tuple[list[Request], CpuMeter]:
    """Small requests and, among them, the largest one, under a cap that only it exceeds alone."""
    by_size = sorted(question_requests(), key=lambda r: r.visual_patches)
    requests = [*by_size[:10], by_size[-1], *by_size[10:20]]
    return requests, CpuMeter(weight_bytes(), weight_bytes() + 2 * MIB)


def test_a_record_that_cannot_fit_alone_fails_and_its_neighbours_do_not(
    one_giant: tuple[list[Request], CpuMeter],
) -> None:
    requests, meter = one_giant

    events = list(answers("question", requests, meter=meter, overrides=(SHORT,)))

    failures = [event for event in events if isinstance(event, Failure)]
    assert [(f.record_id, f.code) for f in failures] == [(requests[10].record_id, "out_of_memory")]
    assert ids(events) == sorted(r.record_id for r in requests)
