"""A run ends when it is asked to, also while it waits for what does not come."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from glm4v_batch import stopping
from glm4v_batch.deadline import Deadline
from glm4v_batch.engines.echo import EchoEngine
from glm4v_batch.stopping import Interrupted, OutOfTime
from glm4v_batch.types import Chunk

CHUNKS = [Chunk("shard", first, 10) for first in range(0, 50, 10)]


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(stopping, "_LATE_SECONDS", 0.1)


def never_again() -> Iterator[str]:
    yield "an event"
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(60)  # a decoder or a file server that hangs


def test_a_run_that_waits_in_vain_ends_when_the_grace_is_over() -> None:
    seen = []
    began = time.monotonic()

    with stopping.stopping(None) as stop:
        seen += list(stop.pull(never_again()))

    assert stop.reason == Interrupted(signal.SIGTERM)
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_whoever_shows_the_events_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    with stopping.stopping(None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        while time.monotonic() - began < 0.6:  # the alarm rings here, several times
            threading.Event().wait(0.05)
        monkeypatch.setattr(stopping, "_GRACE_SECONDS", 30)
        is_over = [stop.is_over(EchoEngine()), stop.is_over(EchoEngine())]

    assert stop.reason == Interrupted(signal.SIGTERM)
    assert is_over[0] is False


@pytest.mark.usefixtures("heeded_hangup")
def test_no_chunk_is_admitted_after_a_signal() -> None:
    with stopping.stopping(None) as stop:
        tasks = stop.admit(CHUNKS)
        first = next(tasks)
        os.kill(os.getpid(), signal.SIGHUP)
        rest = list(tasks)

    assert (first, rest) == (CHUNKS[0], [])
    assert stop.reason == Interrupted(signal.SIGHUP)


def test_no_chunk_is_admitted_after_the_deadline() -> None:
    now = datetime.now().astimezone()
    deadline = Deadline(now, clock=lambda: now.timestamp())

    with stopping.stopping(deadline) as stop:
        admitted = list(stop.admit(CHUNKS))

    assert admitted == []
    assert stop.reason == OutOfTime(now)


def test_a_run_that_waits_in_vain_ends_after_its_deadline_too() -> None:
    soon = datetime.now().astimezone() + timedelta(seconds=0.2)

    def hang() -> Iterator[str]:
        threading.Event().wait(60)
        yield "never"

    with stopping.stopping(Deadline(soon)) as stop:
        list(stop.pull(hang()))

    assert stop.reason == OutOfTime(soon)


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    with stopping.stopping(None):
        os.kill(os.getpid(), signal.SIGTERM)

    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before
