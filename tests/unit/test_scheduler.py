"""Which requests run together."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.memory import MemoryModel
from glm4v_batch.scheduler import Scheduler, batch_shape
from glm4v_batch.types import BatchShape, Request
from tests.builders import request, requests

# Memory is counted in padded tokens: one byte each.
PER_TOKEN = np.array([[0.0, 1.0, 0.0, 0.0, 0.0]])


def scheduler(max_batch_size: int | None = None) -> tuple[Scheduler, MemoryModel]:
    memory = MemoryModel([0], [PER_TOKEN])
    memory.trust = 1.0
    memory.margin = 0.0
    return Scheduler(memory, max_batch_size), memory


def drain(waiting: Scheduler, budget: int) -> list[list[Request]]:
    batches = []
    while waiting:
        batches.append(waiting.next_batch([budget]))
    return batches


def test_batch_shape_pads_to_the_longest_prompt() -> None:
    batch = [request(tokens=10, patches=8, new_tokens=5), request(tokens=30, patches=4, new_tokens=2)]

    assert batch_shape(batch) == BatchShape(2, 60, 12, 70, 1800)


def test_similar_lengths_run_together() -> None:
    waiting, _ = scheduler(max_batch_size=3)
    for item in requests([10, 100, 11, 101, 12, 102]):
        waiting.add(item)

    first, second = drain(waiting, budget=10**9)

    assert sorted(r.prompt_tokens for r in first) == [10, 11, 12]
    assert sorted(r.prompt_tokens for r in second) == [100, 101, 102]


def test_the_oldest_request_is_always_in_the_next_batch() -> None:
    waiting, _ = scheduler(max_batch_size=2)
    for item in requests([50, 1, 2, 3, 4]):
        waiting.add(item)

    assert 0 in [r.row for r in waiting.next_batch([10**9])]


def test_a_request_over_the_budget_runs_alone() -> None:
    waiting, _ = scheduler()
    for item in requests([1000, 5, 5]):
        waiting.add(item)

    assert [[r.row for r in batch] for batch in drain(waiting, budget=20)] == [[0], [1, 2]]


def test_an_empty_scheduler_is_not_full_and_one_with_many_requests_is() -> None:
    waiting, _ = scheduler()
    assert not waiting.is_full

    for item in requests([5] * 64):
        waiting.add(item)

    assert waiting.is_full


def padded_tokens(batch: Sequence[Request]) -> int:
    return len(batch) * max(r.prompt_tokens for r in batch)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), budget=st.integers(1, 400))
def test_each_request_is_in_exactly_one_batch_and_within_the_budget(lengths: list[int], budget: int) -> None:
    waiting, _ = scheduler()
    for item in requests(lengths):
        waiting.add(item)

    batches = drain(waiting, budget)

    assert sorted(r.row for batch in batches for r in batch) == list(range(len(lengths)))
    assert all(padded_tokens(batch) <= budget for batch in batches if len(batch) > 1)
