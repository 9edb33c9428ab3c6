"""The plain engine: transformers' `generate()` on left-padded batches, sized by measured memory."""

# B batch, T padded prompt, P visual patches of all images, S new tokens

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)

from glm4v_batch.checkpoint import Checkpoint
from glm4v_batch.engines import EngineEvent
from glm4v_batch.engines.room import Room
from glm4v_batch.images import normalisation_table
from glm4v_batch.job import GenerationSettings
from glm4v_batch.memory import MemoryModel, Meter
from glm4v_batch.oom import run_or_split
from glm4v_batch.sampling import SeededGumbel, row_seed, warpers
from glm4v_batch.scheduler import Scheduler, batch_shape
from glm4v_batch.types import BatchRun, BatchStart, Completion, Failure, FinishReason, PeakSample, Request

# What CUDA and its libraries say when an allocation of their own fails: a RuntimeError, not torch's OOM.
_DISGUISED = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # its name since cuDNN 9
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "HIP out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the engine must know of the tokens.

    *normalisation* is float32 [channels, 256]: the pixel value of each byte, per channel.
    """

    image_token_id: int
    eos_token_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    normalisation: NDArray[np.float32]
    temporal_patch_size: int


def vocabulary_of(checkpoint: Checkpoint, decode: Callable[[Sequence[int]], str]) -> Vocabulary:
    """What the engine must know of *checkpoint*'s tokens and pixels."""
    return Vocabulary(
        image_token_id=checkpoint.image_token_id,
        eos_token_ids=checkpoint.eos_token_ids,
        decode=decode,
        normalisation=normalisation_table(checkpoint.images),
        temporal_patch_size=checkpoint.images.temporal_patch_size,
    )


class GenerateEngine:
    """Runs batches through `model.generate()`, as large as *memory* predicts to fit *meter*'s device."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        generation: GenerationSettings,
        memory: MemoryModel,
        meter: Meter,
        *,
        memory_fraction: float,
        max_batch_size: int | None = None,
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._generation = generation
        self._memory = memory
        self._meter = meter
        self._room = Room(meter, memory_fraction)
        self._scheduler = Scheduler(memory, max_batch_size)
        self._device = input_device(model)
        self._table = torch.from_numpy(vocabulary.normalisation).to(self._device)
        self._runs: list[BatchRun] = []
        self._is_draining = False

    def drain(self) -> None:
        """See `Engine.drain`."""
        self._is_draining = True

    def held_bytes(self) -> tuple[int, ...]:
        """See `Engine.held_bytes`."""
        return self._meter.held_bytes()

    def run(self, items: Iterable[Request | Failure]) -> Iterator[EngineEvent]:
        """See `Engine.run`. Raises PlacementError where other processes leave no room at all."""
        for item in items:
            if isinstance(item, Failure):
                yield item
                continue
            self._scheduler.add(item)
            while self._scheduler.is_full and not self._is_draining:
                yield from self._run_next()
        while self._scheduler and not self._is_draining:
            yield from self._run_next()

    def _run_next(self) -> Iterator[EngineEvent]:
        budget = self._room.budget_bytes()
        self._meter.trim(budget)
        batch = self._scheduler.next_batch(budget)
        yield BatchStart(tuple(request.key for request in batch))
        yield from run_or_split(batch, self._attempt)
        yield from self._runs
        self._runs.clear()

    def _attempt(self, batch: Sequence[Request]) -> Sequence[Completion] | None:
        shape, budget = batch_shape(batch), self._room.budget_bytes()
        predicted = self._memory.predict(shape)
        started = time.perf_counter()
        with self._meter.watch():
            completions = self._generate_or_none(batch)
        seconds = time.perf_counter() - started
        peak = self._meter.peak_bytes()
        reserved = self._meter.reserved_bytes()
        if completions is None:
            gc.collect()
            self._meter.free()
            if len(batch) == 1:
                self._room.refuse_if_taken()
        self._memory.observe(PeakSample(shape, peak, out_of_memory=completions is None))
        self._runs.append(
            BatchRun(
                shape=shape,
                predicted_bytes=predicted,
                peak_bytes=peak,
                budget_bytes=budget,
                out_of_memory=completions is None,
                seconds=seconds,
                prompt_tokens=sum(r.prompt_tokens for r in batch),
                completion_tokens=sum(c.completion_tokens for c in completions or ()),
                reserved_bytes=reserved,
            )
        )
        return completions

    def _generate_or_none(self, batch: Sequence[Request]) -> Sequence[Completion] | None:
        try:
            tokens_BS = self._generate(batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            return None
        return [self._completion(request, row) for request, row in zip(batch, tokens_BS, strict=True)]

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Request]) -> list[list[int]]:
        inputs = self._inputs(batch)
        prompt_length = inputs["input_ids"].shape[1]
        output = self._model.generate(
            **inputs,
            generation_config=self._config(batch),
            logits_processor=self._sampling(batch, prompt_length),
        )
        tokens: list[list[int]] = output[:, prompt_length:].tolist()
        return tokens

    def _inputs(self, batch: Sequence[Request]) -> dict[str, Tensor]:
        device = self._device
        ids_BT, mask_BT = left_padded([r.inputs.input_ids for r in batch])
        inputs = {
            "input_ids": ids_BT.to(device),
            "attention_mask": mask_BT.to(device),
            # Without these generate() falls back to text positions, silently.
            "mm_token_type_ids": ((ids_BT == self._vocabulary.image_token_id) & mask_BT.bool())
            .int()
            .to(device),
        }
        if any(r.visual_patches for r in batch):
            grids = [grid for r in batch for grid in r.inputs.image_grid_thw]
            inputs["image_grid_thw"] = torch.tensor(grids, device=device)
            inputs["pixel_values"] = self._pixel_values(batch)
        return inputs

    def _pixel_values(self, batch: Sequence[Request]) -> Tensor:
        patches_P = torch.from_numpy(np.concatenate([r.inputs.patches for r in batch])).to(self._device)
        return normalise(patches_P, self._table, self._vocabulary.temporal_patch_size)

    def _config(self, batch: Sequence[Request]) -> GenerationConfig:
        eos = list(self._vocabulary.eos_token_ids)
        longest = max(request.max_new_tokens for request in batch)
        return GenerationConfig(
            max_new_tokens=min(longest, self._generation.max_new_tokens),
            # Sampling is argmax over seeded noise, so that no neighbour changes a record's draw.
            do_sample=False,
            repetition_penalty=self._generation.repetition_penalty,
            eos_token_id=eos,
            pad_token_id=eos[0],
        )

    def _sampling(self, batch: Sequence[Request], prompt_length: int) -> LogitsProcessorList:
        settings, processors = self._generation, LogitsProcessorList()
        if settings.temperature == 0:
            return processors
        processors += warpers(settings)
        seeds = [row_seed(settings.seed, r.record_id, r.row) for r in batch]
        processors.append(SeededGumbel(seeds, prompt_length))
        return processors

    def _completion(self, request: Request, row: Sequence[int]) -> Completion:
        tokens, reason = cut_at_eos(row[: request.max_new_tokens], self._vocabulary.eos_token_ids)
        return Completion(
            record_id=request.record_id,
            chunk_id=request.chunk_id,
            row=request.row,
            text=self._vocabulary.decode(tokens),
            finish_reason=reason,
            prompt_tokens=request.prompt_tokens,
            completion_tokens=len(tokens) + (reason == "stop"),
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where requests enter *model*: its lowest card, where accelerate's outermost hook moves them anyway."""
    spots = getattr(model, "hf_device_map", {}).values()
    cards = [torch.device(spot) for spot in spots if spot not in ("cpu", "disk")]
    return min(cards, key=lambda card: card.index or 0) if cards else model.device


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether *error* says that a device, or a library on it, could not get memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _DISGUISED)


def left_padded(rows: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """*rows* as int64 input_ids [B, T] and attention_mask [B, T], padded on the left.

    A row is padded with its own first token. The mask hides the padding from attention, but a
    repetition penalty reads input_ids: any other token there would be penalised in padded rows
    only, and a record's text would depend on its neighbours' length.
    """
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (longest - len(row), 0), constant_values=row[0]) for row in rows])
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows])
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def normalise(patches_P: Tensor, table: Tensor, temporal_patch_size: int) -> Tensor:
    """float32 pixel values [P, channels × temporal × patch²] of uint8 *patches_P* [P, channels × patch²].

    A lookup per channel: bit-identical to what transformers computes on the host. A still image
    fills every temporal position with the same pixels.
    """
    num_patches, channels = patches_P.shape[0], table.shape[0]
    bytes_PC = patches_P.view(num_patches, channels, -1)
    values = torch.stack([table[c][bytes_PC[:, c].int()] for c in range(channels)], dim=1)
    frames = values[:, :, None].expand(-1, -1, temporal_patch_size, -1)
    return frames.reshape(num_patches, -1)


def cut_at_eos(row: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[list[int], FinishReason]:
    """The tokens before the first end token, and whether there was one.

    The padding token is one of the end tokens, so padding cannot be told from an end by itself.
    """
    for position, token in enumerate(row):
        if token in eos_token_ids:
            return list(row[:position]), "stop"
    return list(row), "length"
