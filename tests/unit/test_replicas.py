"""Replicas: every request ends once, whatever process dies, and no process stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from threading import Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm4v_batch.errors import PlacementError
from glm4v_batch.replicas import Learn, Replicas, ReplicasLostError, _Replica
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
from tests.e2e.command import ROOT
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
    return run_all(requests(count), scripts, num_expected)


def run_all(items: list[Request], scripts: list[Script], num_expected: int | None = None) -> list[object]:
    return list(Replicas(load, scripts, num_expected).run(items))


def run_until(
    is_enough: Callable[[list[object]], object],
    scripts: list[Script],
    learn: Learn | None = None,
    watch: Callable[[Replicas, object], object] = lambda *_: None,
) -> tuple[list[object], int]:
    """What replicas tell that have work until *is_enough* has been told; and the number of requests.

    A run over a fixed number ends with the last answer, whoever still loads: how many have worked by then
    depends on the machine. *watch* sees each event.
    """
    events: list[object] = []
    num_requests = 0

    def work() -> Iterator[Request]:
        nonlocal num_requests
        while not is_enough(events):
            assert num_requests < 10_000, "what the test waits for did not come"
            yield request(num_requests)
            num_requests += 1

    replicas = Replicas(load, scripts, None, *([learn] if learn else []))
    for event in replicas.run(work()):
        events.append(event)
        watch(replicas, event)
    return events, num_requests


def is_given_up(events: Sequence[object]) -> bool:
    return any(loss.is_final for loss in lost(events))


def count_ready(events: Sequence[object]) -> int:
    return sum(isinstance(event, ReplicaReady) for event in events)


def test_all_replicas_work_and_every_request_ends_once(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, batch_seconds=0.02) for name in "abc"]

    events, num_requests = run_until(lambda events: len(authors(events)) == 3, scripts)

    assert rows(events) == list(range(num_requests))
    assert authors(events) == {"by a", "by b", "by c"}
    runs = [event for event in events if isinstance(event, BatchRun)]
    assert {run.replica for run in runs} == {0, 1, 2}
    assert sum(run.shape.batch_size for run in runs) == num_requests
    assert sorted(event.replica for event in events if isinstance(event, ReplicaReady)) == [0, 1, 2]


def authors(events: Sequence[object]) -> set[str]:
    return {event.text for event in events if isinstance(event, Completion)}


def test_failures_pass_through_before_any_replica_is_ready(tmp_path: Path) -> None:
    failure = Failure("id-7", "shard#0+1000", 7, "decode", "image_truncated", "it ends early")

    events = list(Replicas(load, [Script(tmp_path)]).run([failure, request(8)]))

    assert events[0] == failure
    assert rows(events) == [7, 8]


def test_the_last_requests_are_spread_evenly_where_their_number_is_known(tmp_path: Path) -> None:
    scripts = [
        Script(tmp_path, name, batch_size=5, batch_seconds=0.1, first_batch_with="ab") for name in "ab"
    ]

    events = run(scripts, 40, num_expected=40)

    answered = {name: sum(len(rows) for who, rows in batches(tmp_path) if who == name) for name in "ab"}
    assert rows(events) == list(range(40))
    assert max(answered.values()) <= 25


def test_what_a_dead_replica_held_is_answered_by_another_and_it_is_started_again(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, batch_seconds=0.05, dies_once_at_row=9) for name in "ab"]

    events, num_requests = run_until(lambda events: count_ready(events) == 3, scripts)

    assert rows(events) == list(range(num_requests))
    assert failures(events) == []
    assert [loss.reason for loss in lost(events)] == ["its process died: exit code 0"]
    assert count_ready(events) == 3


def test_a_replica_that_is_started_again_knows_of_its_batches_before(tmp_path: Path) -> None:
    def learn(script: Script, run: BatchRun) -> Script:
        return replace(script, batch_size=script.batch_size + run.shape.batch_size)

    scripts = [Script(tmp_path, name, batch_size=2, batch_seconds=0.05, dies_once_at_row=9) for name in "ab"]

    events, num_requests = run_until(
        lambda events: any(isinstance(event, BatchRun) and event.shape.batch_size > 2 for event in events),
        scripts,
        learn,
    )

    assert rows(events) == list(range(num_requests))
    (loss,) = lost(events)
    died, other = ("a", "b") if loss.replica == 0 else ("b", "a")
    sizes = {name: [len(batch) for by, batch in batches(tmp_path) if by == name] for name in (died, other)}
    assert max(sizes[other]) == 2
    assert max(sizes[died]) > 2


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
    assert "4 times, the last 2 with nothing else in hand" in failure.message
    # Twice with neighbours, twice alone; the neighbours were run one by one as well.
    deadly = [(name, batch) for name, batch in batches(tmp_path) if 13 in batch]
    assert [batch == [13] for _, batch in deadly] == [False, False, True, True]
    # Each time on the replica that it has killed least.
    assert len({name for name, _ in deadly[:3]}) == num_replicas


def test_an_error_that_nobody_expected_counts_as_a_death_and_is_told(tmp_path: Path) -> None:
    events = run([Script(tmp_path, raising_rows=(3,))], 8)

    (failure,) = failures(events)
    assert failure.row == 3
    assert "ValueError: the model is confused" in failure.message
    assert rows(events) == list(range(8))


def test_where_no_replica_has_room_the_run_stops_with_what_the_last_one_said(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="does not fit") as caught:
        run([Script(tmp_path, loading="user's mistake") for _ in range(2)], 8)

    assert caught.value.hint == "buy a larger card"


@pytest.mark.parametrize(
    "crowded", [{"loading": "user's mistake"}, {"crowded_after": 0}, {"crowded_after": 3}]
)
def test_a_replica_without_room_is_given_up_and_the_others_do_its_work(
    tmp_path: Path, crowded: dict[str, Any]
) -> None:
    scripts = [Script(tmp_path, "a", batch_seconds=0.05), Script(tmp_path, "b", **crowded)]

    events, num_requests = run_until(is_given_up, scripts)

    assert rows(events) == list(range(num_requests))
    # Who was crowded while it loaded is tried three times.
    assert {loss.replica for loss in lost(events)} == {1}
    assert [loss.is_final for loss in lost(events)] == (
        [True] if "crowded_after" in crowded else [False, False, True]
    )
    assert any(hint in lost(events)[-1].reason for hint in ("free the GPU", "buy a larger card"))
    assert failures(events) == []


@pytest.mark.parametrize("has_no_room", [False, True])
def test_a_death_makes_what_was_in_hand_suspect_and_a_crowded_gpu_does_not(has_no_room: bool) -> None:
    replicas = Replicas(load, [])
    child: Any = None
    held = [request(row) for row in range(3)]
    replica = _Replica(0, child, has_no_room=has_no_room, in_hand=frozenset(each.key for each in held[:2]))
    replica.unanswered = {each.key: each for each in held}

    assert list(replicas._requeue(held, replica, "gone")) == []

    assert list(replicas._waiting) == held
    assert set(replicas._suspicions) == (set() if has_no_room else {each.key for each in held[:2]})


def test_a_replica_that_never_loads_is_given_up_and_the_others_do_its_work(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, "a", batch_seconds=0.1), Script(tmp_path, "b", loading="dies")]

    events, num_requests = run_until(is_given_up, scripts)

    assert rows(events) == list(range(num_requests))
    assert [loss.replica for loss in lost(events)] == [1, 1, 1]
    assert failures(events) == []


def test_replicas_that_only_ever_die_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(ReplicasLostError, match="exit code 3"):
        run([Script(tmp_path, loading="dies")], 8)
    with pytest.raises(ReplicasLostError, match=r"only ever die.*signal 9"):
        run([Script(tmp_path, deadly_rows=tuple(range(50)))], 50)


def test_a_replica_that_only_ever_dies_is_given_up_and_fails_no_record(tmp_path: Path) -> None:
    broken_card = Script(tmp_path, "broken", deadly_rows=tuple(range(10_000)))

    events, num_requests = run_until(is_given_up, [Script(tmp_path, "good", batch_seconds=0.05), broken_card])

    assert rows(events) == list(range(num_requests))
    assert failures(events) == []
    assert {loss.replica for loss in lost(events)} == {1}


def test_replicas_that_cannot_load_do_not_stop_one_that_loads_slowly(tmp_path: Path) -> None:
    slow = Script(tmp_path, "good", loading="waits until it is told")
    broken = [Script(tmp_path, name, loading="dies") for name in "bcd"]
    events: list[object] = []

    for event in Replicas(load, [slow, *broken]).run(requests(20)):
        events.append(event)
        if sum(loss.is_final for loss in lost(events)) == 3:
            (tmp_path / "told").touch()

    assert rows(events) == list(range(20))
    assert sum(loss.is_final for loss in lost(events)) == 3


def test_many_replicas_killed_at_the_same_moment_are_all_started_again(tmp_path: Path) -> None:
    num_ready = 0

    def kill_all_once_ready(replicas: Replicas, event: object) -> None:
        nonlocal num_ready
        num_ready += isinstance(event, ReplicaReady)
        if isinstance(event, ReplicaReady) and num_ready == 8:
            for replica in replicas._replicas:
                os.kill(replica.child.pid, signal.SIGKILL)

    scripts = [Script(tmp_path, name, batch_seconds=0.3) for name in "abcdefgh"]
    events, num_requests = run_until(lambda _: num_ready >= 16, scripts, watch=kill_all_once_ready)

    assert rows(events) == list(range(num_requests))
    assert failures(events) == []
    assert sorted(loss.replica for loss in lost(events)) == list(range(8))


def test_neighbours_that_all_kill_are_each_failed(tmp_path: Path) -> None:
    deadly = tuple(range(4, 11))

    events = run([Script(tmp_path, deadly_rows=deadly, batch_size=16)], 30)

    assert rows(events) == list(range(30))
    assert [failure.row for failure in sorted(failures(events), key=lambda f: f.row)] == list(deadly)


def test_a_request_that_cannot_be_unpacked_ends_like_any_that_kills(tmp_path: Path) -> None:
    spoilt = [*requests(8)]
    spoilt[3] = replace(spoilt[3], record_id=Unpackable())

    events = run_all(spoilt, [Script(tmp_path)])

    assert rows(events) == list(range(8))
    assert "cannot be unpacked" in failures(events)[0].message


class Unpackable(str):
    """Text that only the process that made it can hold."""

    def __reduce__(self) -> tuple[Callable[[int], str], tuple[int]]:
        return unpack, (os.getpid(),)


def unpack(maker: int) -> str:
    if maker != os.getpid():
        raise MemoryError("cannot be unpacked")
    return "x"


def test_a_stopped_replica_does_not_silence_the_others(tmp_path: Path) -> None:
    large = [
        replace(r, inputs=replace(r.inputs, patches=np.zeros((1024, 1024), np.uint8))) for r in requests(150)
    ]
    replicas = Replicas(load, [Script(tmp_path, name, batch_seconds=0.05) for name in "ab"], 150)
    ended_by_other, stopped_at, longest_silence = 0, 0.0, 0.0
    last = time.monotonic()

    for event in replicas.run(large):
        if stopped_at:
            longest_silence = max(longest_silence, time.monotonic() - last)
            ended_by_other += isinstance(event, Completion)
        last = time.monotonic()
        if isinstance(event, BatchRun) and not stopped_at:
            stopped_at = last
            stopped = replicas._replicas[event.replica].child.pid
            os.kill(stopped, signal.SIGSTOP)
            going_on = Timer(30, os.kill, (stopped, signal.SIGCONT))
            going_on.start()
        if stopped_at and last - stopped_at > 5:
            break

    going_on.cancel()
    assert ended_by_other > 20
    # A driver that writes to the one that reads nothing would be silent until that goes on.
    assert longest_silence < 20


def test_a_slow_source_does_not_keep_signs_of_life_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("glm4v_batch.replicas.time", SimpleNamespace(monotonic=lambda: clock.now))

    def slowly() -> Iterator[Request]:
        for each in requests(60):
            clock.now += 0.5
            yield each

    times = [0.0]
    for _ in Replicas(load, [Script(tmp_path, batch_size=64)], 60).run(slowly()):
        times.append(clock.now)

    assert clock.now == 30
    assert max(later - earlier for earlier, later in pairwise(times)) < 2


def run_program(folder: Path, lines: str, **script: object) -> subprocess.CompletedProcess[str]:
    """Run *lines*, to which *replicas* is one that does what *script* says, as a program of its own."""
    values = ", ".join(f"{name}={value!r}" for name, value in script.items())
    path = folder / "program.py"
    path.write_text(
        "from pathlib import Path\n"
        "from glm4v_batch.replicas import Replicas\n"
        "from glm4v_batch.types import ReplicaReady\n"
        "from tests.builders import request\n"
        "from tests.scripted_engine import Script, load\n"
        "if __name__ == '__main__':\n"
        f"    replicas = Replicas(load, [Script(Path({str(folder)!r}), {values})])\n" + indent(lines, "    ")
    )
    paths = os.pathsep.join([str(ROOT / "pipeline"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=120, env=environment, check=True
    )


def test_a_program_that_ends_without_closing_leaves_no_process_and_does_not_hang(tmp_path: Path) -> None:
    lines = (
        "events = replicas.run(map(request, range(10000)))\n"
        "while not isinstance(next(events), ReplicaReady): pass\n"
        "print(replicas._replicas[0].child.pid, flush=True)\n"
    )

    ended = run_program(tmp_path, lines, batch_seconds=0.1)

    assert not Path(f"/proc/{ended.stdout.strip()}").exists()


def test_a_bar_that_a_library_shows_while_it_loads_leaves_nothing_behind(tmp_path: Path) -> None:
    lines = "print(len(list(replicas.run(map(request, range(8))))))\n"

    ended = run_program(tmp_path, lines, loading="shows a bar")

    assert int(ended.stdout) > 8
    assert ended.stderr == ""


def test_draining_ends_after_the_batches_in_hand(tmp_path: Path) -> None:
    scripts = [Script(tmp_path, name, second_batch_waits_for_drain=True) for name in "ab"]
    replicas = Replicas(load, scripts)
    events: list[object] = []

    for event in replicas.run(requests(1000)):
        events.append(event)
        if isinstance(event, BatchRun) and event.replica == 0:
            replicas.drain()

    begun = sorted(row for _, batch in batches(tmp_path) for row in batch)
    assert rows(events) == begun
    assert 4 <= len(begun) <= 16


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
