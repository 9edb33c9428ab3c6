"""What happens to a batch that does not fit."""

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.oom import run_or_split
from glm4v_batch.types import Completion, Failure, Request
from tests.builders import request, requests


class LimitedMemory:
    """Answers batches of at most *limit* tokens, or those that *fits* lets through."""

    def __init__(self, limit: int, fits: Callable[[], bool] = lambda: True) -> None:
        self.limit = limit
        self.fits = fits
        self.sizes: list[int] = []

    def attempt(self, batch: Sequence[Request]) -> Sequence[Completion] | None:
        self.sizes.append(len(batch))
        if sum(r.prompt_tokens for r in batch) > self.limit or not self.fits():
            return None
        return [Completion(r.record_id, r.chunk_id, r.row, "text", "stop", r.prompt_tokens, 1) for r in batch]


def test_a_batch_that_does_not_fit_is_retried_at_half_its_size() -> None:
    memory = LimitedMemory(limit=40)

    list(run_or_split([request(row) for row in range(8)], memory.attempt))

    assert memory.sizes == [8, 4, 4]


def test_a_request_that_does_not_fit_alone_fails_and_its_neighbours_do_not() -> None:
    batch = requests([10, 10, 100, 10])

    results = list(run_or_split(batch, LimitedMemory(limit=40).attempt))

    assert [type(r) for r in results] == [Completion, Completion, Failure, Completion]
    assert isinstance(results[2], Failure)
    assert (results[2].stage, results[2].code) == ("generate", "out_of_memory")


@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    limit=st.integers(1, 200),
    pattern=st.lists(st.booleans(), min_size=1),
)
def test_one_result_per_request_in_order_for_any_pattern_of_failures(
    tokens: list[int], limit: int, pattern: list[bool]
) -> None:
    batch = requests(tokens)
    outcomes = iter(pattern)
    memory = LimitedMemory(limit, fits=lambda: next(outcomes, True))

    results = list(run_or_split(batch, memory.attempt))

    assert [r.record_id for r in results] == [r.record_id for r in batch]
