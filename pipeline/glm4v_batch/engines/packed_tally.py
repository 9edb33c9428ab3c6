"""What the steps of the packed engine took, summed up for one line of `batches.jsonl` at a time."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from glm4v_batch.memory import MemoryModel
from glm4v_batch.types import BatchRun, BatchShape, PeakSample, Phase

AT_WORK: tuple[Phase, ...] = ("vision", "prefill", "decode")
"""The phases in which the device computes."""


@dataclass(slots=True)
class Tally:
    """What has run since the last line.

    *largest_call* and *largest_step* are what each kind of work measured where it took most.
    """

    started: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    num_written: int = 0
    num_patches: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    asked_tokens: int = 0
    reserved_bytes: tuple[int, ...] = ()
    largest_call: PeakSample | None = None
    largest_step: PeakSample | None = None
    is_out_of_memory: bool = False
    phase_seconds: defaultdict[Phase, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        """Since the last line."""
        return time.perf_counter() - self.started

    def add_call(self, sample: PeakSample, reserved_bytes: tuple[int, ...]) -> None:
        """Count a call of the vision tower."""
        self.num_patches += sample.shape.visual_patches
        self.largest_call = _larger(self.largest_call, sample)
        self._add(sample, reserved_bytes)

    def add_step(
        self, sample: PeakSample, reserved_bytes: tuple[int, ...], prompt_tokens: int, num_written: int
    ) -> None:
        """Count a step, which took so many tokens of prompts and wrote so many of answers."""
        self.num_steps += 1
        self.num_written += num_written
        self.prompt_tokens += prompt_tokens
        self.largest_step = _larger(self.largest_step, sample)
        self._add(sample, reserved_bytes)

    def _phases(self) -> dict[Phase, float]:
        """Where the seconds went; what nothing was launched for counts as idle."""
        at_work = sum(self.phase_seconds[phase] for phase in AT_WORK)
        return {**self.phase_seconds, "idle": max(0.0, self.seconds - at_work)}

    def _add(self, sample: PeakSample, reserved_bytes: tuple[int, ...]) -> None:
        self.reserved_bytes = tuple(map(max, reserved_bytes, self.reserved_bytes or reserved_bytes))
        self.is_out_of_memory |= sample.out_of_memory

    def as_run(self, memory: MemoryModel, budget_bytes: tuple[int, ...]) -> BatchRun:
        """The line: how much was done, and how near the largest peak came to what *memory* predicts.

        Its shape counts all that was done since the last line, in the words of a batch: for its size the
        mean of rows that decoded at once, and for the KV cache the prompts and what these rows wrote.
        """
        num_rows = max(1, round(self.num_written / max(1, self.num_steps)))
        samples = [sample for sample in (self.largest_call, self.largest_step) if sample is not None]
        predicted = [memory.predict(sample.shape) for sample in samples]
        return BatchRun(
            shape=BatchShape(
                batch_size=num_rows,
                padded_tokens=self.prompt_tokens,
                visual_patches=self.num_patches,
                kv_tokens=self.prompt_tokens + self.num_steps * num_rows,
                mask_cells=0,
            ),
            predicted_bytes=_highest(predicted),
            peak_bytes=_highest([sample.peak_bytes for sample in samples]),
            budget_bytes=budget_bytes,
            out_of_memory=self.is_out_of_memory,
            seconds=self.seconds,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            reserved_bytes=self.reserved_bytes,
            phase_seconds=self._phases(),
            asked_tokens=self.asked_tokens,
        )


def _larger(one: PeakSample | None, other: PeakSample) -> PeakSample:
    return other if one is None or other.peak_bytes > one.peak_bytes else one


def _highest(values: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(max, zip(*values, strict=True)))
