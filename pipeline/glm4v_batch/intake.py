"""Take items ahead of their use, in a thread, so that whoever works need not wait for them."""

import threading
from collections.abc import Callable, Iterable
from queue import Empty, Queue
from types import TracebackType
from typing import Generic, Self, TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class _End:
    """Nothing comes after this; *error* is what ended it before its time."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Intake(Generic[_In, _Out]):
    """Pulls *items* in a thread, makes something of each, and keeps at most *most_ahead* of them ready."""

    def __init__(self, items: Iterable[_In], make: Callable[[_In], _Out], most_ahead: int) -> None:
        self._items = items
        self._make = make
        self._ready: Queue[_Out | _End] = Queue(most_ahead)
        self._is_left = threading.Event()
        self.is_ended = False
        self._thread = threading.Thread(target=self._pull, name="intake", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The thread may wait for an item that never comes: it is not waited for.
        self._is_left.set()
        with self._ready.mutex:
            self._ready.queue.clear()
            self._ready.not_full.notify_all()

    def next(self, *, wait: bool) -> _Out | None:
        """What is ready, in order; None where nothing is, or ever will be. Raises what pulling raised."""
        if self.is_ended:
            return None
        try:
            item = self._ready.get(block=wait)
        except Empty:
            return None
        if not isinstance(item, _End):
            return item
        self.is_ended = True
        if item.error is not None:
            raise item.error
        return None

    def _pull(self) -> None:
        try:
            for item in self._items:
                self._ready.put(self._make(item))
                if self._is_left.is_set():
                    return
            self._ready.put(_End())
        except BaseException as error:  # the border of the thread: whoever takes the items meets it
            self._ready.put(_End(error))
