"""Hold the packed engine in bfloat16 against transformers on a full-size random GLM-4.1V-9B.

Run from the repository's root on a machine with a CUDA GPU:

    PYTHONPATH=pipeline:. python -m tests.gpu.packed_check

Five things are shown, and the exit code is 1 where one of the first four does not hold:

- What the attention kernels are not told to read changes nothing: the pool around is NaN, and so is an image
  beside. Their answers are those of float32 within rounding, of prompts, rows and images, empty ones and more
  than 32 among them.
- Images in calls that are filled up and replayed get features as near to those of float32 as transformers'
  own tower gives them.
- Logits at the end of the prompt and 20 tokens later are as near to those of float32 as `generate()`'s are,
  alone and with neighbours. All are given the same tokens.
- The host waits for the GPU nowhere but where it takes what a step gave.
- How many texts other neighbours change, in the packed engine and in `generate()`.

With `--tiny` the model is small and the CPU will do, without the first and the fourth.
"""

import argparse
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

from glm4v_batch.activations import packed_coefficients, prior_coefficients
from glm4v_batch.engines.generate import GenerateEngine, Vocabulary, normalise
from glm4v_batch.engines.packed import PackedEngine
from glm4v_batch.engines.packed_attention import (
    InHand,
    Packing,
    Sequences,
    _attend_each,
    _attend_pieces,
    attend,
)
from glm4v_batch.engines.packed_graphs import Graphs
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_rows import DecodeRows, Entry, Piece
from glm4v_batch.job import GenerationSettings
from glm4v_batch.memory import MemoryModel
from glm4v_batch.meters import CudaMeter
from glm4v_batch.packed_limits import MOST_PATCHES, PackedLimits
from glm4v_batch.types import Completion, GridTHW, ModelInputs, Request
from tests.cpu_meter import CpuMeter
from tests.gpu.full_size import full_size_config
from tests.tiny import ENDLESS

NUM_FORCED = 21
_MOST_BEYOND = 1.25
# Of so few layers the medians of 8 requests scatter.
_MOST_BEYOND_TINY = 2.0
SETTINGS = GenerationSettings(max_new_tokens=32)
SIDES = (8, 14, 22, 30, 36, 44, 54, 62)


def requests_of(config: Any, count: int, max_new_tokens: int) -> list[Request]:
    """Prompts of one image of another size each, among words."""
    random = np.random.default_rng(0)
    made = []
    for row in range(count):
        height, width = SIDES[row % len(SIDES)], SIDES[(3 * row + 1) % len(SIDES)]
        words = random.integers(20, 500, 24 + row % 7)
        image = np.full(height * width // 4, config.image_token_id)
        ids = np.concatenate([words[:6], image, words[6:]]).astype(np.int32)
        patches = random.integers(0, 256, (height * width, 588), dtype=np.uint8)
        inputs = ModelInputs(ids, patches, ((1, height, width),))
        made.append(Request(f"r{row}", "c", row, len(ids), height * width, max_new_tokens, inputs))
    return made


def vocabulary_of(config: Any) -> Vocabulary:
    """No token ends an answer: one past the vocabulary does."""
    table = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    end = (config.text_config.vocab_size,)
    return Vocabulary(config.image_token_id, end, lambda ids: " ".join(map(str, ids)), table, 2)


class Forced(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Lets row r of a batch choose *tokens* [r][step] and nothing else."""

    def __init__(self, tokens: Sequence[Sequence[int]], prompt_length: int) -> None:
        self._tokens = tokens
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length
        chosen = torch.tensor([row[step] for row in self._tokens], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


@torch.inference_mode()
def generated(
    engine: GenerateEngine, batch: Sequence[Request], forced: Sequence[Sequence[int]] | None = None
) -> tuple[list[list[int]], list[Tensor]]:
    """Tokens of `generate()`, and logits float32 [B, V] of the first and the last step."""
    inputs = engine._inputs(batch)
    length = inputs["input_ids"].shape[1]
    config = engine._config(batch)
    config.pad_token_id = 0
    output = engine._model.generate(
        **inputs,
        generation_config=config,
        logits_processor=LogitsProcessorList([Forced(forced, length)] if forced else []),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, length:].tolist(), [output.logits[at].float() for at in (0, -1)]


@torch.inference_mode()
def packed_logits(
    model: PackedModel, vocabulary: Vocabulary, batch: Sequence[Request], forced: Sequence[Sequence[int]]
) -> list[Tensor]:
    """As `generated`, through the packed engine's steps, all prompts in one; the pool is NaN at first."""
    sizes = [request.prompt_tokens + request.max_new_tokens for request in batch]
    starts = [37 + sum(sizes[:place]) + 11 * place for place in range(len(batch))]
    pool = model.make_pool(starts[-1] + sizes[-1] + 50, len(batch) + 1)
    for tensor in (*pool.keys, *pool.values):
        tensor[: pool.num_tokens] = torch.nan
    rows = DecodeRows(model, pool, len(batch), SETTINGS, vocabulary.eos_token_ids)
    rows._graphs = None
    seen: list[Tensor] = []
    logits = model.logits
    model.logits = lambda hidden: _kept(seen, logits(hidden))  # type: ignore[method-assign]
    pieces = []
    for row, request in enumerate(batch):
        ids = torch.from_numpy(request.inputs.input_ids).long()
        positions, offset = model.positions(ids, vocabulary.image_token_id, request.inputs.image_grid_thw)
        places = (ids == vocabulary.image_token_id).nonzero()[:, 0]
        features = model.encode([torch.from_numpy(request.inputs.patches)], request.inputs.image_grid_thw)
        rows.enter([Entry(row, starts[row], ids, offset, request.max_new_tokens, 0)])
        pieces.append(Piece(row, ids, positions, places, features, starts[row], 0, ends_prompt=True))
    for step in range(NUM_FORCED):
        rows.step(pieces if step == 0 else [], len(batch))
        rows._token.copy_(torch.tensor([tokens[step] for tokens in forced]))
    model.logits = logits  # type: ignore[method-assign]
    return [seen[0].float(), seen[-1].float()]


def _kept(seen: list[Tensor], logits: Tensor) -> Tensor:
    seen.append(logits.clone())
    return logits


def distances(found: Sequence[Tensor], reference: Sequence[Tensor]) -> list[list[float]]:
    """‖found − reference‖ / ‖reference‖ of each request, at the first and the last step."""
    return [
        ((one - other).norm(dim=1) / other.norm(dim=1)).tolist()
        for one, other in zip(found, reference, strict=True)
    ]


def check_kernel() -> bool:
    """Whether pieces and rows attend as float32 does, in a pool that is NaN elsewhere."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = partial(torch.randn, device="cuda", generator=generator)
    sizes, before, heads, shared, width = [700, 1, 1041, 306], [341, 1200, 0, 20], 32, 2, 128
    starts = [37, 5_001, 9_000, 14_003, 20_000, 23_456]
    counts = [size + more for size, more in zip(sizes, before, strict=True)] + [1, 1799]
    pool = torch.full((2, 30_000, shared, width), torch.nan, device="cuda", dtype=torch.bfloat16)
    for start, count in zip(starts, counts, strict=True):
        pool[:, start : start + count] = random(2, count, shared, width).bfloat16()
    ends = np.concatenate([[0], np.cumsum(sizes)])
    ints = partial(torch.tensor, device="cuda", dtype=torch.int32)
    pieces = Sequences(ints(ends.tolist()), ints(starts[:4]), ints(counts[:4]))
    rows = Sequences(ints([0, 1, 2]), ints(starts[4:]), ints(counts[4:]))
    places = [s + c - n + i for s, c, n in zip(starts, counts, [*sizes, 1, 1], strict=True) for i in range(n)]
    packing = Packing(torch.tensor(places, device="cuda"), int(ends[-1]), pieces, rows, rows)
    query, key, value = (random(len(places), n, width).bfloat16() for n in (heads, shared, shared))
    wide = InHand(pool[0].float(), pool[1].float(), packing)
    expected = attend(query.float(), key.float(), value.float(), wide, width**-0.5)
    found = attend(query, key, value, InHand(pool[0], pool[1], packing), width**-0.5).float()
    distance = float((found - expected).norm() / expected.norm())
    print(f"kernel: ‖found − float32‖ / ‖float32‖ = {distance:.4f}", flush=True)
    return distance < 0.01


def check_many() -> bool:
    """Whether 77 sequences, empty ones and NaN among them, attend to themselves alone, as in float32."""
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = torch.randint(0, 300, (77,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes[3] = sizes[40] = sizes[76] = 0
    query, key, value = (
        torch.randn(sum(sizes), 4, 128, device="cuda", generator=generator).bfloat16() for _ in range(3)
    )
    ends = torch.tensor([0, *np.cumsum(sizes).tolist()], device="cuda", dtype=torch.int32)
    sound = torch.ones(sum(sizes), dtype=torch.bool, device="cuda")
    for place in (5, 41, 75):
        sound[ends[place] : ends[place + 1]] = False
    key[~sound] = value[~sound] = torch.nan
    images = Sequences(ends, ends[:-1].contiguous(), ends.diff())
    far = []
    for is_causal in (False, True):
        found, expected = torch.full_like(query, torch.nan), torch.zeros_like(query, dtype=torch.float32)
        _attend_pieces(found, query, key, value, images, 128**-0.5, is_causal=is_causal)
        wide = (query.float(), key.float(), value.float())
        _attend_each(expected, *wide, images, 128**-0.5, is_causal=is_causal)
        found, expected = found[sound], expected[sound]
        far.append(float((found.float() - expected).norm() / expected.norm()))
    print(f"kernel, 77 sequences: {far[0]:.4f}, causal {far[1]:.4f}", flush=True)
    return max(far) < 0.01


def check_logits(model: Any, vocabulary: Vocabulary, requests: Sequence[Request], most_beyond: float) -> bool:
    """Whether the packed engine's logits are as near to those of float32 as `generate()`'s are.

    *model* is in float32 afterwards: that is the reference, given the tokens that bfloat16 chose.
    """
    engine = generate_engine(model, vocabulary, GenerationSettings(max_new_tokens=NUM_FORCED))
    alone = [generated(engine, [request]) for request in requests]
    forced = [tokens[0] for tokens, _ in alone]
    found = {
        "generate() alone": [torch.cat([logits[at] for _, logits in alone]) for at in (0, 1)],
        f"generate() in a batch of {len(requests)}": generated(engine, requests, forced)[1],
    }
    original = original_of(model)
    packed = packed_model(model, vocabulary)
    found["packed"] = packed_logits(packed, vocabulary, requests, forced)
    unpack(model, original)
    model.float()
    pairs = zip(requests, forced, strict=True)
    exact = [generated(engine, [request], [tokens])[1] for request, tokens in pairs]
    reference = [torch.cat([logits[at] for logits in exact]) for at in (0, 1)]
    return _compared(found, reference, most_beyond)


def _compared(found: Mapping[str, Sequence[Tensor]], reference: Sequence[Tensor], most_beyond: float) -> bool:
    away = {name: distances(logits, reference) for name, logits in found.items()}
    for place, name in enumerate(("end of prompt", f"{NUM_FORCED - 1} tokens later")):
        told = "; ".join(f"{each} {_spread(far[place])}" for each, far in away.items())
        print(f"logits from float32, {name}: {told}", flush=True)
    alone, _, packed = (np.median(far, axis=1) for far in away.values())
    return bool((packed <= most_beyond * alone).all())


def _spread(values: Sequence[float]) -> str:
    return f"median {np.median(values):.4f}, most {max(values):.4f}"


@dataclass(frozen=True)
class Original:
    """What the packed engine replaces in a model."""

    text_attention: str
    vision_attention: str
    patch_projection: Any
    downsample: Any
    embeddings: Any


def original_of(model: Any) -> Original:
    """What *model* has of its own, before the packed engine takes it."""
    config, tower = model.config, model.model.visual
    return Original(
        config.text_config._attn_implementation,
        config.vision_config._attn_implementation,
        tower.patch_embed.proj,
        tower.downsample,
        tower.embeddings,
    )


def unpack(model: Any, original: Original) -> None:
    """Give *model* back what it had of its own, so that it is transformers' alone."""
    config, tower = model.config, model.model.visual
    config.text_config._attn_implementation = original.text_attention
    config.vision_config._attn_implementation = original.vision_attention
    tower.patch_embed.proj, tower.downsample = original.patch_projection, original.downsample
    tower.embeddings = original.embeddings


def generate_engine(
    model: Any, vocabulary: Vocabulary, settings: GenerationSettings, max_batch_size: int | None = None
) -> GenerateEngine:
    """`generate()` on *model*."""
    memory = MemoryModel(meter().held_bytes(), [prior_coefficients(model.config.to_dict(), 2)])
    return GenerateEngine(
        model,
        vocabulary,
        settings,
        memory,
        meter(),
        memory_fraction=0.9,
        max_batch_size=max_batch_size,
    )


def meter() -> Any:
    """Of the GPU, where there is one."""
    return CudaMeter([0]) if torch.cuda.is_available() else CpuMeter(0, ENDLESS)


def packed_engine(
    model: PackedModel, vocabulary: Vocabulary, max_rows: int, coefficients: Any
) -> PackedEngine:
    """The packed engine with so many rows."""
    limits = PackedLimits(max_rows, max_rows * 2600, 1024, 16_384)
    return PackedEngine(model, vocabulary, SETTINGS, limits, meter(), [coefficients], memory_fraction=0.9)


def texts(events: Iterator[Any]) -> dict[int, str]:
    """The text of each row."""
    return {event.row: event.text for event in events if isinstance(event, Completion)}


def show_neighbours(model: Any, vocabulary: Vocabulary, requests: Sequence[Request]) -> bool:
    """How many texts change where other requests run beside; False where packed ones wait meanwhile."""
    many, few = (
        texts(generate_engine(model, vocabulary, SETTINGS, size).run(iter(requests)))
        for size in (len(requests), 5)
    )
    print(f"generate(), batches of {len(requests)} and of 5: {_changed(many, few)}", flush=True)
    original = original_of(model)
    coefficients = packed_coefficients(model.config.to_dict(), 2)
    packed = packed_model(model, vocabulary)
    runs = {rows: packed_engine(packed, vocabulary, rows, coefficients) for rows in (len(requests), 5)}
    found = {rows: texts(engine.run(iter(requests))) for rows, engine in runs.items()}
    print(f"packed, {len(requests)} rows and 5: {_changed(found[len(requests)], found[5])}", flush=True)
    # What comes for the second time is recorded, and recording waits.
    texts(runs[len(requests)].run(iter(requests)))
    again, waits = _with_waits(runs[len(requests)], requests)
    print(f"packed, twice the same: {_changed(found[len(requests)], again)}", flush=True)
    print(f"packed, where the host waited: {dict(waits) or 'nowhere'}", flush=True)
    unpack(model, original)
    return not waits


def packed_model(model: Any, vocabulary: Vocabulary) -> PackedModel:
    """*model* as a replica has it, with graphs of its vision tower."""
    packed = PackedModel(model, torch.from_numpy(vocabulary.normalisation), 2)
    packed.record_vision(MOST_PATCHES)
    return packed


@torch.inference_mode()
def check_images(model: Any, vocabulary: Vocabulary, requests: Sequence[Request], most_beyond: float) -> bool:
    """Whether images side by side get what each gets alone from transformers, as near to float32 as there."""
    device, original = next(model.parameters()).device, original_of(model)
    table = torch.from_numpy(vocabulary.normalisation).to(device)
    images = [torch.from_numpy(request.inputs.patches) for request in requests]
    grids = [request.inputs.image_grid_thw[0] for request in requests]
    tower = model.model.visual
    exact, theirs = (
        torch.cat(
            [
                _features(each, normalise(i.to(device), table, 2), g)
                for i, g in zip(images, grids, strict=True)
            ]
        )
        for each in (copy.deepcopy(tower).float(), tower)
    )
    packed = packed_model(model, vocabulary)
    ours = torch.cat([packed.encode(images, grids) for _ in range(3)][-1]).float()
    unpack(model, original)
    away = [float((found - exact).norm() / exact.norm()) for found in (theirs, ours)]
    between = float((ours - theirs).norm() / theirs.norm())
    print(
        f"images from float32: transformers {away[0]:.4f}, packed {away[1]:.4f}; apart {between:.4f}",
        flush=True,
    )
    return away[1] <= most_beyond * away[0]


def _features(tower: Any, pixels: Tensor, grid: GridTHW) -> Tensor:
    """The features float32 [V, D] of one image."""
    grids = torch.tensor([grid], device=pixels.device)
    found: Tensor = tower(pixels.to(tower.dtype), grid_thw=grids).pooler_output
    return found.float()


def _with_waits(engine: PackedEngine, requests: Sequence[Request]) -> tuple[dict[int, str], Counter[str]]:
    """The texts, and how often which line made the host wait for the GPU without a word."""
    recorded = patch.object(Graphs, "_capture", autospec=True, side_effect=Graphs._capture)
    with recorded as capture, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        found = texts(engine.run(iter(requests)))
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    # Recording a size waits once, and says so. No more such waits than sizes are excused.
    said = [w for w in waits if w.filename.endswith("torch/cuda/__init__.py")][: capture.call_count]
    return found, Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits if w not in said)


def _changed(one: dict[int, str], other: dict[int, str]) -> str:
    first = [
        next(
            (at for at, pair in enumerate(zip(a.split(), b.split(), strict=False)) if len(set(pair)) > 1),
            None,
        )
        for a, b in ((one[row], other[row]) for row in one)
    ]
    places = [place for place in first if place is not None]
    at = f", at token {int(np.median(places))} in the median" if places else ""
    return f"{len(places)} of {len(one)} texts differ{at}"


def main() -> int:
    """Print what each check shows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    torch.manual_seed(0)
    if tiny:
        from tests.packed import packed_weights

        model = packed_weights().to(torch.bfloat16)
        config = model.config
    else:
        config = full_size_config()
        with torch.device("cuda"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    vocabulary = vocabulary_of(config)
    most_beyond = _MOST_BEYOND_TINY if tiny else _MOST_BEYOND
    is_right = tiny or (check_kernel() and check_many())
    is_right &= check_images(model, vocabulary, requests_of(config, 8, 1), most_beyond)
    is_right &= show_neighbours(model, vocabulary, requests_of(config, 40, SETTINGS.max_new_tokens))
    is_right &= check_logits(model, vocabulary, requests_of(config, 8, NUM_FORCED), most_beyond)
    print("as expected" if is_right else "NOT as expected")
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
