"""Values over a pipe from one process of ours to another, large arrays beside the pickle of the rest.

Within a pickle an array is copied on either side, and all of a message has to be in memory twice.
"""

import os
import pickle
import struct
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

# Smaller ones cost less within.
_LARGE_BYTES = 4096
# writev(2) and readv(2) take 1,024 on Linux.
_MOST_VIEWS = 1024


def send(pipe: Connection, value: object) -> None:
    """Send *value* for `receive` at the other end. Raises OSError where there is none any more."""
    large: list[memoryview] = []

    def stays_within(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        is_small = view.nbytes < _LARGE_BYTES
        if not is_small:
            large.append(view)
        return is_small

    pickled = pickle.dumps(value, protocol=5, buffer_callback=stays_within)
    left = [memoryview(pickled), *large]
    pipe.send_bytes(struct.pack(f"<{len(left)}Q", *(view.nbytes for view in left)))
    while left:
        left = _after(left, os.writev(pipe.fileno(), left[:_MOST_VIEWS]))


def receive(pipe: Connection) -> Any:
    """What was sent, each large array in memory of its own, so that none keeps its neighbours there.

    Raises EOFError or OSError where it does not come. For pipes to our own processes only: it is unpickled.
    """
    buffers = [bytearray(size) for (size,) in struct.iter_unpack("<Q", pipe.recv_bytes())]
    left = [memoryview(buffer) for buffer in buffers]
    while left:
        num_bytes = os.readv(pipe.fileno(), left[:_MOST_VIEWS])
        if not num_bytes:
            raise EOFError
        left = _after(left, num_bytes)
    pickled, *large = buffers
    return pickle.loads(pickled, buffers=large)  # noqa: S301  from our own process


def _after(views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """*views* without their first *num_bytes*."""
    for index, view in enumerate(views):
        if num_bytes < view.nbytes:
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= view.nbytes
    return []
