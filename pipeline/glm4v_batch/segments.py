"""Hand out stretches of a pool of tokens, each in one piece, and join what comes back."""

from bisect import bisect_left, insort


class Segments:
    """The free stretches of a pool of *num_tokens* tokens.

    A request's keys and values lie in one piece, so that attention finds them by a start and a length.
    First fit: requests of about one length leave holes that the next ones fill.
    """

    def __init__(self, num_tokens: int) -> None:
        self._free = [(0, num_tokens)] if num_tokens else []

    def take(self, num_tokens: int) -> int | None:
        """The start of a stretch of *num_tokens*, or None where no free one is long enough."""
        for place, (start, length) in enumerate(self._free):
            if length >= num_tokens:
                rest = (start + num_tokens, length - num_tokens)
                self._free[place : place + 1] = [rest] if rest[1] else []
                return start
        return None

    def give_back(self, start: int, num_tokens: int) -> None:
        """Take back the stretch of *num_tokens* that begins at *start*."""
        place = bisect_left(self._free, (start, 0))
        after = self._free[place] if place < len(self._free) else None
        if after is not None and start + num_tokens == after[0]:
            del self._free[place]
            num_tokens += after[1]
        before = self._free[place - 1] if place else None
        if before is not None and sum(before) == start:
            del self._free[place - 1]
            start, num_tokens = before[0], before[1] + num_tokens
        insort(self._free, (start, num_tokens))
