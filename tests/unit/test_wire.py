"""What is sent arrives as it was, or visibly not at all; each array in memory of its own."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch import wire
from glm4v_batch.types import ModelInputs, Request


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = Pipe()
    with ours, theirs:
        yield ours, theirs


def sent(value: object) -> Any:
    """What arrives of *value* when another thread sends it."""
    ours, theirs = Pipe()
    with closing(ours), closing(theirs):
        sender = threading.Thread(target=wire.send, args=(theirs, value), daemon=True)
        sender.start()
        received = wire.receive(ours)
        sender.join(10)
        assert not sender.is_alive()
    return received


def request(num_patches: int) -> Request:
    patches = np.arange(num_patches * 588, dtype=np.uint32).astype(np.uint8).reshape(num_patches, 588)
    inputs = ModelInputs(np.arange(20, dtype=np.int32), patches, ((1, 1, num_patches),))
    return Request("id", "a#0+9", 3, 20, num_patches, 64, inputs)


@given(sizes=st.lists(st.integers(0, 20_000), max_size=12))
def test_arrays_of_any_size_arrive_in_order(sizes: list[int]) -> None:
    arrays = [np.arange(size, dtype=np.uint16) for size in sizes]

    received = sent(arrays)

    assert len(received) == len(arrays)
    assert all(np.array_equal(one, other) for one, other in zip(arrays, received, strict=True))


def test_more_arrays_arrive_than_one_system_call_takes() -> None:
    arrays = [np.full(4096, number % 251, np.uint8) for number in range(2500)]

    assert np.array_equal(np.stack(sent(arrays)), np.stack(arrays))


def test_an_array_larger_than_the_pipe_holds_arrives() -> None:
    array = np.arange(3_000_000, dtype=np.uint32)

    assert np.array_equal(sent(array), array)


def test_a_request_arrives_with_arrays_that_can_be_written_and_share_no_memory() -> None:
    one, other = sent([request(36), request(36)])

    assert (one.record_id, one.row, one.inputs.image_grid_thw) == ("id", 3, ((1, 1, 36),))
    assert np.array_equal(one.inputs.patches, request(36).inputs.patches)
    assert one.inputs.patches.flags.writeable
    assert not np.shares_memory(one.inputs.patches, other.inputs.patches)
    assert len(one.inputs.patches.base.base.obj) == 36 * 588


def test_a_sender_that_dies_between_its_arrays_is_an_end(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    wire.send(theirs, np.zeros(50_000, np.uint8))
    whole = bytearray(os.read(ours.fileno(), 100_000))
    os.write(theirs.fileno(), whole[:-1])
    theirs.close()

    with pytest.raises(EOFError):
        wire.receive(ours)


def test_a_closed_pipe_is_an_end(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    theirs.close()

    with pytest.raises(EOFError):
        wire.receive(ours)
    with pytest.raises(BrokenPipeError):
        wire.send(ours, "x")
