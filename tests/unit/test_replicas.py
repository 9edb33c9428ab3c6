"""Replicas: every request ends once, whatever process dies, and no process stays behind."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm4v_batch.errors import PlacementError
from glm4v_batch.replicas import Replicas, ReplicasLostError
from glm4v_batch.types import (
    BatchRun,
    Completion,
    Failure,
    Heartbeat,
    ReplicaLost,
    ReplicaReady,
    Request,
)
from tests.builders import request
from tests.scripted_engine import Script, batches, load


def requests(count: int) -> list[Request]:
    return [request(row) for row in range(count)]


def rows(events: Sequence[object]) -> list[int]:
    return sorted(event.row for event in events if isinstance(event, (Completion, Failure)))


def failures(events: Sequence[object]) -> list[Failure]:
    return [event for event in events if isinstance(event, Failure)]


def lost(events: Sequence[object]) -> list[ReplicaLost]:
    return [event for event in events if isinstance(event, ReplicaLost)]


def run(scripts: list[Script], count: int, num_expected: int | None = None) -> list[object]:
    return list(Replicas(load, scripts, num_expected).run(requests(count)))


def test_all_replicas_work_and_every_request_ends_once(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, batch_seconds=0.02) for name in "abc"]

    events = run(scripts, 120)

    assert rows(events) == list(range(120))
    assert {event.text for event in events if isinstance(event, Completion)} == {"by a", "by b", "by c"}
    runs = [event for event in events if isinstance(event, BatchRun)]
    assert {run.replica for run in runs} == {0, 1, 2}
    assert sum(run.shape.batch_size for run in runs) == 120
    assert sorted(event.replica for event in events if isinstance(event, ReplicaReady)) == [0, 1, 2]


def test_failures_pass_through_before_any_replica_is_ready(tmp_path: Path) -> None:
    failure = Failure("id-7", "shard#0+1000", 7, "decode", "image_truncated", "it ends early")

    events = list(Replicas(load, [Script(tmp_path)]).run([failure, request(8)]))

    assert events[0] == failure
    assert rows(events) == [7, 8]


def test_the_last_requests_are_spread_evenly_where_their_number_is_known(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, batch_size=5, batch_seconds=0.1) for name in "ab"]

    events = run(scripts, 40, num_expected=40)

    answered = {name: sum(len(rows) for who, rows in batches(tmp_path) if who == name) for name in "ab"}
    assert rows(events) == list(range(40))
    assert max(answered.values()) <= 25


def test_what_a_dead_replica_held_is_answered_by_another_and_it_is_started_again(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, batch_seconds=0.05, dies_once_at_row=9) for name in "ab"]

    events = run(scripts, 60)

    assert rows(events) == list(range(60))
    assert failures(events) == []
    assert [loss.reason for loss in lost(events)] == ["its process died: exit code 0"]
    assert sum(isinstance(event, ReplicaReady) for event in events) == 3


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_record_that_kills_replicas_becomes_a_failed_row_and_its_neighbours_do_not(
    tmp_path: Path, num_replicas: int
) -> None:
    scripts = [Script(tmp_path, name, deadly_rows=(13,)) for name in "abc"[:num_replicas]]

    events = run(scripts, 40)

    (failure,) = failures(events)
    assert (failure.row, failure.stage, failure.code) == (13, "generate", "replica_crashed")
    assert "signal 9" in failure.message
    assert rows(events) == list(range(40))
    # Twice with neighbours, once alone; the neighbours were run one by one as well.
    deadly = [batch for _, batch in batches(tmp_path) if 13 in batch]
    assert len(deadly) == 3
    assert deadly[-1] == [13]


def test_an_error_that_nobody_expected_counts_as_a_death_and_is_told(tmp_path: Path) -> None:
    events = run([Script(tmp_path, raising_rows=(3,))], 8)

    (failure,) = failures(events)
    assert failure.row == 3
    assert "ValueError: the model is confused" in failure.message
    assert rows(events) == list(range(8))


def test_a_users_mistake_while_loading_stops_the_run_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="does not fit") as caught:
        run([Script(tmp_path, batch_seconds=1.0), Script(tmp_path, loading="user's mistake")], 8)

    assert caught.value.hint == "buy a larger card"


def test_a_replica_that_never_loads_is_given_up_and_the_others_do_its_work(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, "a", batch_seconds=0.1), Script(tmp_path, "b", loading="dies")]

    events = run(scripts, 100, num_expected=100)

    assert rows(events) == list(range(100))
    assert [loss.replica for loss in lost(events)] == [1, 1, 1]
    assert failures(events) == []


def test_replicas_that_only_ever_die_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(ReplicasLostError, match="exit code 3"):
        run([Script(tmp_path, loading="dies")], 8)
    with pytest.raises(ReplicasLostError, match="7 times without an answer"):
        run([Script(tmp_path, deadly_rows=tuple(range(50)))], 50)


def test_draining_ends_after_the_batches_in_hand(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, batch_seconds=0.3) for name in "ab"]
    replicas = Replicas(load, scripts)
    events: list[object] = []

    for event in replicas.run(requests(1000)):
        events.append(event)
        if isinstance(event, BatchRun) and event.replica == 0:
            replicas.drain()

    begun = sorted(row for _, batch in batches(tmp_path) for row in batch)
    assert rows(events) == begun
    assert 4 <= len(begun) <= 24


def test_draining_does_not_wait_for_a_replica_that_still_loads(tmp_path: Path) -> None:
    replicas = Replicas(load, [Script(tmp_path, loading="takes long")])
    started = time.monotonic()

    for event in replicas.run(requests(10)):
        assert isinstance(event, Heartbeat)
        replicas.drain()

    assert time.monotonic() - started < 20


def test_no_process_stays_when_the_run_is_left_half_way(tmp_path: Path) -> None:
    replicas = Replicas(load, [Script(tmp_path, batch_seconds=0.05), Script(tmp_path, batch_seconds=0.05)])
    events = replicas.run(requests(100))
    while not isinstance(next(events), BatchRun):
        pass
    children = [replica.child.pid for replica in replicas._replicas]

    events.close()  # type: ignore[attr-defined]  # it is a generator

    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 60),
    deadly=st.sets(st.integers(0, 59), max_size=2),
    num_replicas=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    is_known=st.booleans(),
)
def test_every_request_ends_once_whoever_dies(
    tmp_path: Path, count: int, deadly: set[int], num_replicas: int, batch_size: int, is_known: bool
) -> None:
    scripts = [
        Script(tmp_path, name, batch_size=batch_size, deadly_rows=tuple(deadly))
        for name in "abc"[:num_replicas]
    ]

    events = run(scripts, count, count if is_known else None)

    assert rows(events) == list(range(count))
    assert {failure.row for failure in failures(events)} == {row for row in deadly if row < count}
