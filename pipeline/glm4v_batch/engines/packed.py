"""The packed engine: no padding anywhere, one pool of decoding rows, prompts prefilled in pieces beside them.

Each step runs one packed batch of tokens: pieces of prompts, and one token for every row that decodes.
The weights are read once for both, so decoding, which is bound by memory, hides beneath prefilling,
which is bound by arithmetic (Agrawal et al. 2023, "SARATHI"). A row that ends leaves, and the next
request enters at once. The device decides what ends; the host learns of it a step later and never waits.
"""

import gc
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from operator import gt
from typing import TypeVar

import torch
from torch import Tensor

from glm4v_batch.activations import FloatArray
from glm4v_batch.engines import EngineEvent
from glm4v_batch.engines.generate import Vocabulary, ran_out_of_memory
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_rows import NO_TOKEN, DecodeRows, Entry, Piece
from glm4v_batch.engines.packed_tally import Tally
from glm4v_batch.engines.packed_work import Work, WorkImage, calls, images_of
from glm4v_batch.engines.room import Room
from glm4v_batch.engines.stopwatch import Stopwatch
from glm4v_batch.errors import PlacementError
from glm4v_batch.intake import Intake
from glm4v_batch.job import GenerationSettings
from glm4v_batch.memory import MemoryModel, Meter
from glm4v_batch.packed_limits import FEWEST_PROMPT_TOKENS, PackedLimits, shorter_step, steady_tokens
from glm4v_batch.sampling import row_seed
from glm4v_batch.segments import Segments
from glm4v_batch.types import BatchShape, BatchStart, Completion, Failure, PeakSample, Request

# Rows that do not live count as tokens of a step all the same: few sizes of few rows, and more of many.
_ROW_STEP, _LARGE_ROW_STEP = 8, 32
_REPORT_SECONDS = 1.0
# Requests whose patches lie in pinned memory before they may wait; of the largest images 32 take half a GB.
_MOST_AHEAD = 32
# Among so many calls' patches there are small images to fill up a call with: a fiftieth of it stays empty.
_CALLS_AHEAD = 4
# Who finds no stretch of the pool long enough lets so many of the next pass, so many times.
_LOOK_AHEAD = 8
_MOST_PASSING = 32
_CROWDED_FRACTION = 0.98
# Lines without a shortage, of a second or more each, after which what was lowered is tried again.
_LINES_BEFORE_RAISING = 300
# So many answers are taken to be as long as allowed, until real ones say how long they are.
_GUESSED_ANSWERS = 4

_Found = TypeVar("_Found")


class PackedEngine:
    """Runs requests through *model*, as many side by side as *limits* let in.

    *coefficients* are what `packed_coefficients` gives for each device. *compile_seconds* went by before.

    Memory that runs out lowers the limits: fewer patches or prompt tokens at a time, then a smaller pool,
    whose requests begin anew; one that does not fit even alone fails.
    """

    def __init__(
        self,
        model: PackedModel,
        vocabulary: Vocabulary,
        generation: GenerationSettings,
        limits: PackedLimits,
        meter: Meter,
        coefficients: Sequence[FloatArray],
        *,
        memory_fraction: float,
        compile_seconds: float = 0.0,
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._generation = generation
        self._meter = meter
        self._coefficients = coefficients
        self._room = Room(meter, memory_fraction)
        self._is_draining = False
        self._waiting: deque[Work] = deque()
        self._encoded: deque[Work] = deque()
        self._failed: list[Failure] = []
        self._answers = _Answers()
        self._tally = Tally()
        self._stopwatch = Stopwatch(model.device)
        self._num_clean = _LINES_BEFORE_RAISING
        self._first_limits = limits
        self._first_limit_bytes = meter.limit_bytes()
        self._fill(limits)
        self._tally.phase_seconds["compile"] = compile_seconds

    @torch.inference_mode()
    def _fill(self, limits: PackedLimits) -> None:
        """Begin with an empty pool of the size that *limits* says."""
        self._limits = limits
        # However many may be in use: what is lowered may rise again.
        most_rows = self._first_limits.max_rows
        self._by_row: list[Work | None] = [None] * most_rows
        self._prefilling: deque[Work] = deque()
        self._entering: list[Work] = []
        self._launched: deque[_Arriving] = deque()
        self._num_passing = 0
        self._segments = Segments(limits.pool_tokens)
        model = self._model
        # A place of its own for each row that does not live, and one for padding.
        pool = model.make_pool(limits.pool_tokens, most_rows + 1)
        self._rows = DecodeRows(model, pool, most_rows, self._generation, self._vocabulary.eos_token_ids)
        self._memory = MemoryModel(self._meter.held_bytes(), self._coefficients)

    def drain(self) -> None:
        """See `Engine.drain`: what decodes is answered, what does not yet is dropped."""
        self._is_draining = True

    def held_bytes(self) -> tuple[int, ...]:
        """See `Engine.held_bytes`."""
        return self._meter.held_bytes()

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        """See `Engine.run`. Raises PlacementError where other processes leave no room at all."""
        with Intake(items, self._prepare, min(_MOST_AHEAD, self._limits.max_rows)) as intake:
            while True:
                yield from self._take_in(intake)
                if not self._is_busy():
                    break
                yield from self._turn()
        if self._tally.num_steps:
            yield self._reported()

    def _take_in(self, intake: "Intake[Request | Failure, Work | Failure]") -> Iterator[Failure]:
        """Let wait what has come; wait for something to come where there is nothing else to do."""
        if self._is_draining:
            self._drop()
            return
        while self._may_wait():
            item = intake.next(wait=not self._is_busy())
            if item is None:
                return
            if isinstance(item, Failure):
                yield item
            else:
                self._waiting.append(item)
                self._answers.expect(item.request)

    def _may_wait(self) -> bool:
        """Whether another request may wait; patches wait in pinned memory, which is the host's."""
        num_patches = sum(work.request.visual_patches for work in self._waiting)
        return (
            len(self._waiting) < self._limits.max_rows and num_patches < _CALLS_AHEAD * self._limits.patches
        )

    def _prepare(self, item: Request | Failure) -> Work | Failure:
        """What can be done of *item* on the host, ahead of its turn."""
        if isinstance(item, Failure):
            return item
        input_ids = torch.from_numpy(item.inputs.input_ids).long()
        image_token_id = self._vocabulary.image_token_id
        positions, offset = self._model.positions(input_ids, image_token_id, item.inputs.image_grid_thw)
        patches = torch.from_numpy(item.inputs.patches)
        if self._model.vision_device.type == "cuda":
            patches = patches.pin_memory()
        places = (input_ids == image_token_id).nonzero()[:, 0]
        return Work(item, input_ids, positions, offset, places, patches)

    def _is_busy(self) -> bool:
        return bool(self._waiting or self._encoded or any(self._by_row))

    def _drop(self) -> None:
        self._waiting.clear()
        self._encoded.clear()
        self._entering.clear()
        while self._prefilling:
            self._release(self._prefilling.popleft())

    def _turn(self) -> Iterator[EngineEvent]:
        """Encode images where prompts run short, take one step, and hand on what has ended meanwhile."""
        if chosen := self._next_to_encode():
            in_hand = [*chosen, *self._encoded, *filter(None, self._by_row)]
            yield BatchStart(tuple(work.request.key for work in in_hand))
            self._encode(chosen)
        was_launched = self._step()
        # One step stays under way while the next is made ready, so that the device never waits for the host.
        while len(self._launched) > was_launched:
            yield from self._collect()
        yield from self._failed
        self._failed.clear()
        if self._tally.num_steps and self._tally.seconds >= _REPORT_SECONDS:
            yield self._reported()

    # Vision

    def _next_to_encode(self) -> list[Work]:
        """The works whose images come next, taken off the queue; none while prompts enough are ready."""
        ready = sum(work.num_left for work in (*self._encoded, *self._prefilling))
        if not self._waiting or ready >= 2 * self._prompt_tokens():
            return []
        # A call that is made at all is made full: small ones are slower by the image. The first in the queue
        # goes first, so that none waits for ever, and smaller ones fill what the next in turn would not.
        chosen: list[Work] = []
        others: deque[Work] = deque()
        num_patches = 0
        for work in self._waiting:
            fits = not chosen or num_patches + work.request.visual_patches <= self._limits.patches
            (chosen if fits else others).append(work)
            num_patches += work.request.visual_patches if fits else 0
        self._waiting = others
        return chosen

    def _encode(self, works: Sequence[Work]) -> None:
        """Give *works* their features. Where memory runs out they wait again, or one fails."""
        features: defaultdict[Work, list[Tensor]] = defaultdict(list)
        for call in calls([image for work in works for image in images_of(work)], self._limits.patches):
            found = self._encode_call(call)
            if found is None:
                self._waiting.extendleft(reversed(works))
                self._expect_less_of_vision(call)
                return
            for image, tensor in zip(call, found, strict=True):
                features[image.work].append(tensor)
        for work in works:
            work.unpin()
            work.features = features[work]
        self._encoded.extend(works)

    def _encode_call(self, call: Sequence[WorkImage]) -> Sequence[Tensor] | None:
        patches, grids = [image.patches for image in call], [image.grid for image in call]
        shape = BatchShape(0, 0, sum(map(len, patches)), 0, 0)
        with self._stopwatch.time({"vision": 1.0}):
            found, sample = self._measured(lambda: self._model.encode(patches, grids), shape)
        self._tally.add_call(sample, self._meter.reserved_bytes())
        return found

    def _expect_less_of_vision(self, call: Sequence[WorkImage]) -> None:
        if len(call) > 1:
            self._limits = replace(self._limits, patches=sum(len(image.patches) for image in call) // 2)
        elif not self._shrink_pool():
            self._room.refuse_if_taken()
            self._waiting.remove(call[0].work)
            self._fail(call[0].work, f"an image of {len(call[0].patches):,} patches does not fit alone")

    # Steps

    def _prompt_tokens(self) -> int:
        """How many prompt tokens a step takes: as many as leave in answers, so that the rows stay full.

        More would fill the rows at once and then leave them to decode alone, which wastes arithmetic.
        """
        prompt, answer = self._answers.mean_prompt_tokens, self._answers.mean_answer_tokens
        rows = min(self._limits.max_rows, self._limits.pool_tokens / (prompt + answer))
        num_rows = self._num_rows()
        wanted = steady_tokens(math.ceil(rows * prompt / answer) + num_rows) - num_rows
        return max(FEWEST_PROMPT_TOKENS, min(wanted, self._limits.prompt_tokens(num_rows)))

    def _num_rows(self) -> int:
        """How many rows a step has: one of few numbers, so that few graphs serve all; 0 without any work."""
        most = len(self._by_row)
        rows = [work.row for work in filter(None, self._by_row) if work.decodes or work.num_left]
        if not rows:
            return 0
        steps = range(most.bit_length() - 1, -1, -1)
        halves = (_rounded_up(most >> times, _ROW_STEP) for times in steps)
        half = next(number for number in halves if number > max(rows))
        return min(most, half, _rounded_up(max(rows) + 1, _LARGE_ROW_STEP))

    def _step(self) -> bool:
        """Launch a step, if there is anything to do; whether it was launched."""
        pieces = self._compose()
        num_rows = self._num_rows()
        if not num_rows:
            return False
        num_prompt = sum(num_tokens for _, num_tokens in pieces)
        shape = BatchShape(num_rows, num_prompt + num_rows, 0, 0, 0)
        in_hand = [work.piece(num_tokens) for work, num_tokens in pieces]
        # Both go through the layers together: by tokens is as near as one can tell them apart.
        prefill = num_prompt / (num_prompt + num_rows)
        with self._stopwatch.time({"prefill": prefill, "decode": 1 - prefill}):
            tokens, sample = self._measured(lambda: self._enter_and_step(in_hand, num_rows), shape)
        if tokens is None:
            self._tally.add_step(sample, self._meter.reserved_bytes(), 0, 0)
            self._expect_less_of_steps(num_prompt, num_rows)
            return False
        num_decoding = sum(work.decodes for work in filter(None, self._by_row))
        self._tally.add_step(sample, self._meter.reserved_bytes(), num_prompt, num_decoding)
        self._note_launched(pieces)
        self._launched.append(_Arriving(tokens))
        return True

    def _compose(self) -> list[tuple[Work, int]]:
        """The next pieces of prompts and their lengths; requests enter where rows and pool allow."""
        works: list[Work] = []
        ready = self._to_prefill()
        while sum(work.num_left for work in works) < self._prompt_tokens() and (work := next(ready, None)):
            works.append(work)
        # Those that entered may have made the rows more, and left less for prompts.
        return list(_cut(works, self._prompt_tokens()))

    def _to_prefill(self) -> Iterator[Work]:
        yield from list(self._prefilling)
        while not self._is_draining and (work := self._next_that_fits()):
            yield work

    def _next_that_fits(self) -> Work | None:
        """The first in the queue, or, where the pool has no room for it, one of the next, so many times."""
        candidates = list(islice(self._encoded, _LOOK_AHEAD))
        for place, work in enumerate(candidates if self._num_passing < _MOST_PASSING else candidates[:1]):
            if self._enter(work):
                self._num_passing = self._num_passing + 1 if place else 0
                return work
        return None

    def _enter(self, work: Work) -> bool:
        if sum(other is not None for other in self._by_row) >= self._limits.max_rows:
            return False
        start = self._segments.take(work.num_pool_tokens)
        if start is None:
            self._refuse_too_long(work)
            return False
        self._encoded.remove(work)
        work.row, work.pool_start = self._by_row.index(None), start
        self._by_row[work.row] = work
        self._prefilling.append(work)
        self._entering.append(work)
        return True

    def _refuse_too_long(self, work: Work) -> None:
        if work.num_pool_tokens <= self._limits.pool_tokens:
            return
        if work.num_pool_tokens <= self._first_limits.pool_tokens:
            if not any(self._by_row):
                self._fill_as_at_first()
            return
        self._encoded.remove(work)
        most = self._limits.pool_tokens
        self._fail(work, f"{work.num_pool_tokens:,} tokens of prompt and answer; the KV cache holds {most:,}")

    def _enter_and_step(self, pieces: Sequence[Piece], num_rows: int) -> Tensor:
        if self._entering:
            self._rows.enter([self._entry(work) for work in self._entering])
        return self._rows.step(pieces, num_rows)

    def _entry(self, work: Work) -> Entry:
        request = work.request
        return Entry(
            row=work.row,
            pool_start=work.pool_start,
            input_ids=work.input_ids,
            position_offset=work.position_offset,
            max_new_tokens=request.max_new_tokens,
            seed=row_seed(self._generation.seed, request.record_id, request.row),
        )

    def _note_launched(self, pieces: Sequence[tuple[Work, int]]) -> None:
        self._entering.clear()
        for work in filter(None, self._by_row):
            work.num_launched += work.decodes
        for work, num_tokens in pieces:
            work.num_prefilled += num_tokens
            work.forget_used_features()
            if not work.num_left:
                self._prefilling.remove(work)
                work.num_launched, work.features = 1, ()

    def _collect(self) -> Iterator[Completion]:
        """What the oldest step under way has made of each row."""
        for row, token in enumerate(self._launched.popleft().wait()):
            work = self._by_row[row]
            if token != NO_TOKEN and work is not None:
                work.tokens.append(token)
                has_stopped = token in self._vocabulary.eos_token_ids
                if has_stopped or len(work.tokens) == work.request.max_new_tokens:
                    self._release(work)
                    yield self._completion(work, has_stopped=has_stopped)

    def _completion(self, work: Work, *, has_stopped: bool) -> Completion:
        request = work.request
        self._answers.add(len(work.tokens))
        self._tally.completion_tokens += len(work.tokens)
        self._tally.asked_tokens += request.max_new_tokens
        return Completion(
            record_id=request.record_id,
            chunk_id=request.chunk_id,
            row=request.row,
            text=self._vocabulary.decode(work.tokens[:-1] if has_stopped else work.tokens),
            finish_reason="stop" if has_stopped else "length",
            prompt_tokens=request.prompt_tokens,
            completion_tokens=len(work.tokens),
        )

    def _release(self, work: Work) -> None:
        self._by_row[work.row] = None
        self._segments.give_back(work.pool_start, work.num_pool_tokens)

    # Memory

    def _measured(self, do: Callable[[], _Found], shape: BatchShape) -> tuple[_Found | None, PeakSample]:
        """What *do* gives, or None where memory ran out, and what it took.

        After a while without a shortage it is tried again without graphs, which are quickly recorded anew,
        where smaller limits stay for long. Whoever comes short again soon is to expect less.
        """
        is_rare = self._num_clean >= _LINES_BEFORE_RAISING
        with self._meter.watch(), torch.inference_mode():
            found = _unless_out_of_memory(do)
            is_out_of_memory = found is None
            if found is None and is_rare:
                self._give_up_graphs()
                found = _unless_out_of_memory(do)
        sample = PeakSample(shape, self._meter.peak_bytes(), out_of_memory=is_out_of_memory)
        if found is None:
            self._give_up_graphs()
        return found, sample

    def _give_up_graphs(self) -> None:
        self._num_clean = 0
        self._model.forget_graphs()
        self._rows.forget_graphs()
        gc.collect()
        self._meter.free()

    def _expect_less_of_steps(self, num_prompt: int, num_rows: int) -> None:
        if num_prompt > FEWEST_PROMPT_TOKENS:
            most = min(self._limits.step_tokens, (num_prompt + num_rows) // 2)
            self._limits = replace(self._limits, step_tokens=shorter_step(most))
        elif not self._shrink_pool():
            running = list(filter(None, self._by_row))
            self._begin_anew()
            if len(running) > 1:
                self._limits = replace(self._limits, max_rows=len(running) // 2)
            else:
                self._room.refuse_if_taken()
                self._waiting.remove(running[0])
                self._fail(running[0], "a step of it does not fit, alone")

    def _shrink_pool(self) -> bool:
        """Halve the pool; its requests begin anew. False where it could not hold each of them any more."""
        held = [*filter(None, self._by_row), *self._encoded, *self._waiting]
        num_tokens = self._limits.pool_tokens // 2
        if num_tokens < max((work.num_pool_tokens for work in held), default=1):
            return False
        self._begin_anew()
        self._fill_anew(num_tokens)
        return True

    def _fill_as_at_first(self) -> None:
        """Make the pool as large again as it was: what made it smaller may be over."""
        self._fill_anew(self._first_limits.pool_tokens)

    def _fill_anew(self, num_tokens: int) -> None:
        before = self._limits.pool_tokens
        self._give_up_graphs()
        del self._rows  # and with it the pool
        self._meter.free()
        if not _fits(lambda: self._fill(replace(self._limits, pool_tokens=num_tokens))):
            raise _crowded(self._first_limits.pool_tokens, before)

    def _begin_anew(self) -> None:
        """Let all wait again that is under way, in its order."""
        running = sorted(filter(None, self._by_row), key=lambda work: work.num_left)
        again = [*running, *self._encoded]
        for work in running:
            self._release(work)
        for work in again:
            work.begin_anew()
        self._waiting.extendleft(reversed(again))
        for queue in (self._encoded, self._prefilling, self._entering, self._launched):
            queue.clear()
        self._rows.leave()

    def _reported(self) -> EngineEvent:
        """The line of what ran since the last one; by it the pool yields where others took the memory."""
        budget = self._room.budget_bytes()
        for phase, seconds in self._stopwatch.ended():
            self._tally.phase_seconds[phase] += seconds
        run = self._tally.as_run(self._memory, budget)
        self._tally = Tally()
        self._meter.trim(budget)
        # What graphs work in counts as reserved alone.
        taken = map(max, run.peak_bytes, self._reserved_bytes())
        if self._is_crowded() and any(map(gt, taken, budget)):
            self._shrink_pool()
        self._raise_limits()
        return run

    def _reserved_bytes(self) -> tuple[int, ...]:
        with self._meter.watch():
            pass
        return self._meter.reserved_bytes()

    def _raise_limits(self) -> None:
        """After a while without a shortage, try steps, calls and rows of the first sizes again."""
        self._num_clean += 1
        if self._num_clean == _LINES_BEFORE_RAISING:
            # The pool is made anew only for who needs a larger one: that costs all that is in it.
            self._limits = replace(self._first_limits, pool_tokens=self._limits.pool_tokens)

    def _is_crowded(self) -> bool:
        """Whether others have taken memory that was free at first."""
        pairs = zip(self._meter.limit_bytes(), self._first_limit_bytes, strict=True)
        return any(now < _CROWDED_FRACTION * first for now, first in pairs)

    def _fail(self, work: Work, message: str) -> None:
        self._failed.append(work.request.failed("out_of_memory", message))


class _Answers:
    """How long prompts and answers are on average."""

    def __init__(self) -> None:
        self._num_prompts = self._prompt_tokens = 0
        self._num_answers = self._answer_tokens = 0

    def expect(self, request: Request) -> None:
        """Count the prompt of *request*; the first requests also stand for answers as long as allowed."""
        self._num_prompts += 1
        self._prompt_tokens += request.prompt_tokens
        if self._num_answers < _GUESSED_ANSWERS:
            self.add(request.max_new_tokens)

    def add(self, num_tokens: int) -> None:
        """Count an answer."""
        self._num_answers += 1
        self._answer_tokens += num_tokens

    @property
    def mean_prompt_tokens(self) -> float:
        return self._prompt_tokens / max(1, self._num_prompts)

    @property
    def mean_answer_tokens(self) -> float:
        return max(1.0, self._answer_tokens / max(1, self._num_answers))


class _Arriving:
    """Numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[int]:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers


def _unless_out_of_memory(do: Callable[[], _Found]) -> _Found | None:
    try:
        return do()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
    return None


def _fits(do: Callable[[], None]) -> bool:
    try:
        do()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return False
    return True


def _cut(works: Sequence[Work], num_tokens: int) -> Iterator[tuple[Work, int]]:
    """The pieces of the first *num_tokens* tokens that *works* have left."""
    for work in works:
        if size := min(num_tokens, work.num_left):
            yield work, size
            num_tokens -= size


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _crowded(first_tokens: int, now_tokens: int) -> PlacementError:
    return PlacementError(
        "Other processes have taken a GPU's memory while the run used it: the KV cache held "
        f"{first_tokens:,} tokens at first and holds {now_tokens:,} now.",
        hint="What is committed is safe. Free the GPU, then run the same command again.",
    )
