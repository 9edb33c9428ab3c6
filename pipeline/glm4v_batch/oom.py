"""Retry a batch that does not fit in memory at half its size, down to one request."""

from collections.abc import Callable, Iterator, Sequence

from glm4v_batch.types import Completion, Failure, Request, Result

Attempt = Callable[[Sequence[Request]], Sequence[Completion] | None]
"""Runs a batch. Returns None where memory ran out, with everything that the attempt held let go.

None rather than an exception: while an exception is being handled, its traceback keeps the
failed attempt's tensors alive, and the retry would run out of memory as well.
"""


def run_or_split(batch: Sequence[Request], attempt: Attempt) -> Iterator[Result]:
    """Yield one result per request of *batch*, in order, splitting it wherever memory runs out.

    A request that does not fit even alone becomes a `Failure` with the code `out_of_memory`;
    it never stops the run.
    """
    pending = [batch]
    while pending:
        part = pending.pop()
        completions = attempt(part)
        if completions is not None:
            yield from completions
        elif len(part) == 1:
            yield out_of_memory(part[0])
        else:
            half = len(part) // 2
            pending += [part[half:], part[:half]]


def out_of_memory(request: Request) -> Failure:
    """The failure of a request that does not fit even alone."""
    return request.failed(
        "out_of_memory",
        f"does not fit in memory even alone: {request.prompt_tokens} prompt tokens, "
        f"{request.visual_patches} visual patches; lower images.max_pixels",
    )
