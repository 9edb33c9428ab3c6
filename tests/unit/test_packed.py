"""The packed engine writes what `generate()` writes, whatever runs beside it and whatever runs out."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count, pairwise
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from glm4v_batch.activations import packed_coefficients, prior_coefficients
from glm4v_batch.engines import packed, packed_graphs, packed_model, packed_rows
from glm4v_batch.engines.generate import GenerateEngine, Vocabulary
from glm4v_batch.engines.packed import PackedEngine
from glm4v_batch.engines.packed_graphs import Graphs
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_work import Work
from glm4v_batch.errors import PlacementError
from glm4v_batch.job import GenerationSettings
from glm4v_batch.kv_pool import KVPool
from glm4v_batch.memory import MemoryModel
from glm4v_batch.packed_limits import PackedLimits
from glm4v_batch.types import (
    BatchRun,
    BatchShape,
    BatchStart,
    Completion,
    Failure,
    ModelInputs,
    PeakSample,
    Request,
)
from tests.cpu_meter import CpuMeter, CrowdedMeter, EndlessMeter
from tests.families import FAMILIES, small_model
from tests.packed import LIMITS, packed_engine
from tests.tiny import ENDLESS, answers, runs, sample, texts, weight_bytes

FEW = PackedLimits(max_rows=4, pool_tokens=2000, step_tokens=128, patches=1024)
MIB = 1024**2

# A small model of any family.
IMAGE, END = 190, (1, 2, 7, 11, 13)
SMALL = GenerationSettings(max_new_tokens=24)


@pytest.mark.parametrize("name", ["caption", "question"])
def test_every_sample_record_gets_the_text_that_generate_gives(name: str) -> None:
    _, requests = sample(name)

    found = texts(packed_engine(name).run(iter(requests)))

    assert found == texts(answers(name, requests))


@pytest.mark.parametrize(
    "overrides",
    [
        ("generation.temperature=0.8", "generation.top_p=0.9", "generation.top_k=20"),
        ("generation.repetition_penalty=1.3",),
        ("generation.max_new_tokens=3",),
    ],
)
def test_sampling_penalties_and_lengths_are_those_of_generate(overrides: Sequence[str]) -> None:
    requests = [replace(r, max_new_tokens=3 if "max" in overrides[0] else 64) for r in sample("caption")[1]]

    found = texts(packed_engine("caption", *overrides, limits=FEW).run(iter(requests[:40])))

    assert found == texts(answers("caption", requests[:40], overrides))


def test_a_text_does_not_depend_on_neighbours_or_on_how_prompts_are_cut() -> None:
    requests = sample("caption")[1][:30]
    base = texts(packed_engine("caption").run(iter(requests)))

    for limits in (FEW, replace(FEW, max_rows=1), replace(LIMITS, step_tokens=64)):
        assert texts(packed_engine("caption", limits=limits).run(iter(requests[::-1]))) == base


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_its_generate_writes_with_four_rows_for_forty(family: str) -> None:
    requests, vocabulary = list(small_requests(40)), small_vocabulary()
    model = random_model(family)
    meter = EndlessMeter(0)
    memory = MemoryModel((0,), [prior_coefficients(model.config.to_dict(), 4)])
    expected = ends(
        GenerateEngine(model, vocabulary, SMALL, memory, meter, memory_fraction=1.0).run(requests)
    )

    limits = PackedLimits(max_rows=4, pool_tokens=300, step_tokens=64, patches=64)
    found = ends(small_engine(model, vocabulary, limits).run(requests))

    assert found == expected
    assert {reason for _, reason in found.values()} == {"stop", "length"}


def test_a_penalty_is_for_what_a_row_has_seen_however_its_prompt_is_cut() -> None:
    limits = replace(FEW, max_rows=1, step_tokens=64)
    engine = packed_engine("caption", "generation.repetition_penalty=1.3", limits=limits)
    request = max(sample("caption")[1], key=lambda request: request.prompt_tokens)
    prompt = set(request.inputs.input_ids.tolist())
    assert request.prompt_tokens > limits.prompt_tokens(1)

    (completion,) = [event for event in engine.run([request]) if isinstance(event, Completion)]

    of_rows = engine._rows._seen
    assert of_rows is not None
    seen = set(of_rows[0].nonzero()[:, 0].tolist())
    assert prompt <= seen
    written = seen - prompt
    # What it wrote last is decoded without the end token, which it has seen too.
    ends = set(engine._vocabulary.eos_token_ids)
    assert all(engine._vocabulary.decode([token]) in completion.text for token in written - ends)


def test_what_the_pool_held_before_reaches_no_answer() -> None:
    requests = sample("caption")[1][:20]
    engine = packed_engine("caption", limits=FEW)
    pool = engine._rows._pool
    with torch.inference_mode():
        for tensor in (*pool.keys, *pool.values):
            tensor[: pool.num_tokens] = torch.nan

    found = texts(engine.run(iter(requests)))

    assert found == texts(answers("caption", requests))


@pytest.mark.parametrize("room_mib", [2, 4, 8])
def test_memory_that_runs_out_makes_calls_and_pieces_smaller_and_changes_no_text(room_mib: int) -> None:
    requests = sample("caption")[1][:40]
    meter = CpuMeter(weight_bytes(), weight_bytes() + room_mib * MIB)
    limits = PackedLimits(max_rows=16, pool_tokens=16_000, step_tokens=512, patches=4096)
    engine = packed_engine("caption", limits=limits, meter=meter)

    events = list(engine.run(iter(requests)))

    completions = [event for event in events if isinstance(event, Completion)]
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(completions) + len(failures) == len(requests)
    assert {failure.code for failure in failures} <= {"out_of_memory"}
    expected = texts(answers("caption", requests))
    assert texts(completions).items() <= expected.items()
    if room_mib >= 4:
        assert not failures
    if room_mib <= 4:
        assert any(run.out_of_memory for run in runs(events))


@pytest.mark.parametrize("room_kib", [1, 300])
@pytest.mark.parametrize("when", [5, 20, 32, 38])
def test_memory_that_runs_out_once_within_a_step_changes_no_text(when: int, room_kib: int) -> None:
    requests = [
        replace(request, max_new_tokens=60 if number % 2 else 40)
        for number, request in enumerate(sample("caption")[1][:8])
    ]
    sizes = [request.prompt_tokens + request.max_new_tokens for request in requests]
    # Two requests fill the pool, and half of it holds no longer one.
    pool_tokens = max(map(sum, pairwise(sizes)))
    limits = PackedLimits(max_rows=2, pool_tokens=pool_tokens, step_tokens=64, patches=1024)
    engine = packed_engine("caption", limits=limits, meter=ShortOnce(when, room_kib << 10))

    events = list(engine.run(iter(requests)))

    completions = [event for event in events if isinstance(event, Completion)]
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(completions) + len(failures) == len(requests)
    assert texts(completions).items() <= texts(answers("caption", requests)).items()
    # Only one that was alone in hand may fail for it.
    assert len(failures) <= 1


def test_a_request_that_the_pool_cannot_hold_fails_alone() -> None:
    requests = sample("caption")[1][:10]
    long = replace(requests[3], max_new_tokens=5000)

    events = list(packed_engine("caption", limits=FEW).run(iter([*requests[:3], long, *requests[4:]])))

    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert (failure.row, failure.code, failure.stage) == (long.row, "out_of_memory", "generate")
    assert len([event for event in events if isinstance(event, Completion)]) == 9


@pytest.mark.parametrize("room_kib", [1, 700])
def test_neighbours_that_take_all_memory_stop_the_run_instead_of_failing_its_records(room_kib: int) -> None:
    first_bytes = weight_bytes() + 100 * MIB
    meter = CrowdedMeter(weight_bytes(), weight_bytes() + (room_kib << 10), first_bytes=first_bytes)

    with pytest.raises(PlacementError, match=r"of the 100\.00 MiB for work, \d+\.00 KiB are left"):
        list(packed_engine("caption", limits=FEW, meter=meter).run(iter(sample("caption")[1][:4])))


def test_failures_pass_through_and_every_request_in_hand_is_named_before_it_runs() -> None:
    requests = sample("caption")[1][:12]
    failure = Failure("bad", "chunk", 99, "decode", "image_truncated", "cut short")

    items: list[Request | Failure] = [*requests[:5], failure, *requests[5:]]

    events = list(packed_engine("caption", limits=FEW).run(items))

    assert failure in events
    named: set[tuple[str, int]] = set()
    for event in events:
        if isinstance(event, BatchStart):
            named |= set(event.rows)
        if isinstance(event, Completion):
            assert (event.chunk_id, event.row) in named
    assert sum(run.completion_tokens for run in runs(events)) > 0


def test_draining_answers_what_decodes_and_drops_the_rest() -> None:
    requests = sample("caption")[1][:60]
    engine = packed_engine("caption", limits=FEW)
    events = engine.run(iter(requests))
    first = next(event for event in events if isinstance(event, Completion))

    engine.drain()
    rest = [event for event in events if isinstance(event, Completion)]

    expected = texts(answers("caption", requests))
    assert texts([first, *rest]).items() <= expected.items()
    assert len(rest) < FEW.max_rows + 1


def test_the_last_layer_takes_one_token_of_each_row_and_no_more() -> None:
    requests = sample("caption")[1][:20]
    engine = packed_engine("caption", limits=FEW)
    first, last = ([], [])  # type: tuple[list[int], list[int]]
    for seen, layer in ((first, engine._model.layers[0]), (last, engine._model.layers[-1])):
        layer.mlp.register_forward_hook(lambda _m, given, _o, seen=seen: seen.append(given[0].shape[1]))

    assert texts(engine.run(iter(requests))) == texts(answers("caption", requests))
    assert max(first) > 10 * FEW.max_rows
    assert max(last) == FEW.max_rows


def test_attention_of_other_parts_than_known_ones_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = sample("caption")[1][:20]
    monkeypatch.setattr(packed_model, "is_known", lambda _attention: False)

    assert texts(packed_engine("caption", limits=FEW).run(iter(requests))) == texts(
        answers("caption", requests)
    )


class AtOnce:
    """As `Intake`, but nobody else's thread decides when an item is ready: each is when it is asked for."""

    def __init__(
        self, items: Iterable[Request | Failure], make: Callable[[Request | Failure], Any], _most_ahead: int
    ) -> None:
        self._items = map(make, items)
        self.is_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def next(self, *, wait: bool) -> Any:
        item = next(self._items, None)
        self.is_ended = item is None
        return item


def test_calls_of_the_vision_tower_are_full_while_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = sample("caption")[1][:40]
    sizes: list[int] = []
    encode = PackedModel.encode

    def noted(model: PackedModel, images: Sequence[Tensor], grids: Any) -> list[Tensor]:
        sizes.append(sum(map(len, images)))
        return encode(model, images, grids)

    monkeypatch.setattr(PackedModel, "encode", noted)
    monkeypatch.setattr(packed, "Intake", AtOnce)
    engine = packed_engine("caption", limits=replace(LIMITS, step_tokens=64))

    assert len(texts(engine.run(iter(requests)))) == 40
    assert sum(sizes) == sum(request.visual_patches for request in requests)
    largest = max(request.visual_patches for request in requests)
    # The first calls may come before all requests have, and the last one has what is left.
    assert all(size <= LIMITS.patches for size in sizes)
    assert sum(size > LIMITS.patches - largest for size in sizes) >= len(sizes) - 3


def test_a_call_begins_with_who_came_first_and_leaves_nobody_waiting_who_would_fit() -> None:
    requests = sample("caption")[1][:40]
    engine = packed_engine("caption", limits=LIMITS)
    for request in requests:
        work = engine._prepare(request)
        assert isinstance(work, Work)
        engine._waiting.append(work)
        engine._answers.expect(request)
    num_waiting = len(requests)

    while chosen := engine._next_to_encode():
        patches = [work.request.visual_patches for work in chosen]
        assert chosen[0].request.row == min(work.request.row for work in (*chosen, *engine._waiting))
        assert sum(patches) <= LIMITS.patches
        assert all(sum(patches) + w.request.visual_patches > LIMITS.patches for w in engine._waiting)
        num_waiting -= len(chosen)

    assert num_waiting == len(engine._waiting) == 0


def test_lines_count_the_rows_that_decode_and_what_their_answers_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "_REPORT_SECONDS", 0.0)
    requests, vocabulary = list(small_requests(40)), small_vocabulary()
    limits = PackedLimits(max_rows=4, pool_tokens=300, step_tokens=64, patches=64)

    events = list(small_engine(random_model("glm4v"), vocabulary, limits).run(requests))

    lines = [event for event in events if isinstance(event, BatchRun)]
    answers = [event for event in events if isinstance(event, Completion)]
    assert len(answers) == 40
    assert len(lines) > 3
    # What ends when the last line is written already, a row each at most, is in none.
    asked, total = sum(line.asked_tokens or 0 for line in lines), sum(r.max_new_tokens for r in requests)
    ended, answered = (sum(x.completion_tokens for x in found) for found in (lines, answers))
    assert 0.8 * total <= asked <= total
    assert 0.8 * answered <= ended <= answered
    assert all(1 <= line.shape.batch_size <= 4 for line in lines)
    # The prompt's own step writes each answer's first token; a row is one step late to learn of its end.
    written = sum(line.shape.kv_tokens - line.shape.padded_tokens for line in lines)
    assert written == pytest.approx(sum(a.completion_tokens for a in answers), rel=0.15)


def test_few_patches_wait_in_the_hosts_memory_however_many_requests_may_run() -> None:
    requests = sample("caption")[1][:60]
    limits = replace(LIMITS, max_rows=64, patches=512)
    engine = packed_engine("caption", limits=limits)
    waiting: list[int] = []

    for _ in engine.run(iter(requests)):
        waiting.append(sum(work.request.visual_patches for work in engine._waiting))

    largest = max(request.visual_patches for request in requests)
    assert 0 < max(waiting) < 4 * limits.patches + largest
    assert sum(request.visual_patches for request in requests) > 8 * limits.patches


@pytest.mark.parametrize("num_pieces", [1, 4, 31, 32, 33, 63, 64])
def test_a_step_that_is_filled_up_has_a_piece_for_what_fills_it(num_pieces: int) -> None:
    sizes = packed_rows.StepSizes(num_pieces, 8 * num_pieces, 4).rounded_up()

    assert sizes.num_pieces > num_pieces
    assert sizes.num_prompt >= 8 * num_pieces
    assert packed_rows.StepSizes(0, 0, 4).rounded_up() == packed_rows.StepSizes(0, 0, 4)


def test_an_engine_runs_again_after_it_has_answered_all() -> None:
    requests = sample("caption")[1][:12]
    engine = packed_engine("caption", limits=FEW)

    found = {**texts(engine.run(iter(requests[:6]))), **texts(engine.run(iter(requests[6:])))}

    assert found == texts(answers("caption", requests))


def test_compiled_layers_write_the_same() -> None:
    from glm4v_batch.meters import HostMeter

    requests = sample("caption")[1][:6]
    # No counting of live bytes: nothing is compiled under a dispatch mode.
    engine = packed_engine("caption", limits=FEW, meter=HostMeter())
    engine._model.compile(backend="aot_eager")

    found = texts(engine.run(iter(requests)))

    assert found == texts(answers("caption", requests))


class ShortOnce(CpuMeter):
    """A device whose memory is short the *when*-th time that something is measured, and never again."""

    def __init__(self, when: int, room_bytes: int) -> None:
        super().__init__(weight_bytes(), ENDLESS)
        self._when = when
        self._room_bytes = room_bytes

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._when -= 1
        self.cap_bytes = ENDLESS if self._when else weight_bytes() + self._room_bytes
        with super().watch():
            yield


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    model = small_model(family, device="cpu", image_token_id=IMAGE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Wider than usual: near-constant logits would make any text equal to any other.
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model.generation_config = GenerationConfig()
    return model.eval()


def small_vocabulary() -> Vocabulary:
    table = np.linspace(-2, 2, 256, dtype=np.float32)[None].repeat(3, axis=0)
    return Vocabulary(IMAGE, END, lambda ids: " ".join(map(str, ids)), table, temporal_patch_size=2)


def small_engine(model: Any, vocabulary: Vocabulary, limits: PackedLimits) -> PackedEngine:
    return PackedEngine(
        PackedModel(model, torch.from_numpy(vocabulary.normalisation), 2),
        vocabulary,
        SMALL,
        limits,
        EndlessMeter(0),
        [packed_coefficients(model.config.to_dict(), 4)],
        memory_fraction=1.0,
    )


def small_requests(count: int) -> Iterator[Request]:
    """Prompts of up to two images among a few words, and answers of 3 to 23 tokens."""
    random = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return [int(word) for word in random.integers(20, 180, random.integers(low, high))]

    for row in range(count):
        ids, grids = words(2, 9), []
        for _ in range(random.integers(0, 3)):
            height, width = (2 * int(side) for side in random.integers(1, 5, 2))
            grids.append((1, height, width))
            ids += [IMAGE] * (height * width // 4) + words(1, 5)
        size = sum(height * width for _, height, width in grids)
        patches = random.integers(0, 256, (size, 588), dtype=np.uint8)
        inputs = ModelInputs(np.array(ids, np.int32), patches, tuple(grids))
        yield Request(f"r-{row}", "c", row, len(ids), size, int(random.integers(3, 24)), inputs)


def ends(events: Any) -> dict[int, tuple[str, str]]:
    """Text and finish reason of each completion, by row."""
    completions = [event for event in events if not isinstance(event, (BatchRun, BatchStart))]
    return {event.row: (event.text, event.finish_reason) for event in completions}


def test_where_recording_runs_out_of_memory_work_goes_on_without_graphs_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def run_out(_self: Any, _do: Any, given: Any) -> Any:
        tried.append(given.size)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(PackedModel, "has_graphs", True)
    monkeypatch.setattr(Graphs, "_capture", run_out)
    requests = sample("caption")[1][:20]

    found = texts(packed_engine("caption", limits=FEW).run(iter(requests)))

    assert found == texts(answers("caption", requests))
    assert len(tried) == 3
    assert caplog.text.count("Recording a CUDA graph of steps ran out of memory") == 3
    assert caplog.text.count("from now on the host launches kernel by kernel") == 1


class ReplayedOnTheHost(Graphs[Any]):
    """Graphs whose replay computes again what is in the buffers: a CPU records nothing."""

    num_replayed: ClassVar[Counter[str]] = Counter()

    def _capture(self, do: Callable[[Any], Tensor], given: Any) -> tuple[Any, Tensor]:
        found = do(given).clone()

        class Graph:
            def replay(_) -> None:  # noqa: N805
                ReplayedOnTheHost.num_replayed[type(given).__name__] += 1
                found.copy_(do(given))

        return Graph(), found


def test_where_recording_ran_out_of_memory_once_it_is_tried_anew(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [True, False, True]

    class Crowded(ReplayedOnTheHost):
        def _capture(self, do: Callable[[Any], Tensor], given: Any) -> tuple[Any, Tensor]:
            if failing and failing.pop():
                raise torch.OutOfMemoryError("full")
            return super()._capture(do, given)

    monkeypatch.setattr(PackedModel, "has_graphs", True)
    monkeypatch.setattr(packed_rows, "Graphs", Crowded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ReplayedOnTheHost.num_replayed.clear()
    requests = sample("caption")[1][:20]

    found = texts(packed_engine("caption", limits=FEW).run(iter(requests)))

    assert found == texts(answers("caption", requests))
    assert not failing
    assert ReplayedOnTheHost.num_replayed["Step"] > 5
    assert caplog.text.count("all of them are recorded anew") == 2


@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_pool_is_gone_before_another_is_made(has_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    make_pool = PackedModel.make_pool

    def noted(model: PackedModel, num_tokens: int, num_scratch: int) -> KVPool:
        assert not [tensor for tensor in made if tensor() is not None]
        pool = make_pool(model, num_tokens, num_scratch)
        made.extend(map(weakref.ref, (*pool.keys, *pool.values)))
        return pool

    monkeypatch.setattr(PackedModel, "make_pool", noted)
    monkeypatch.setattr(PackedModel, "has_graphs", has_graphs)
    monkeypatch.setattr(packed_rows, "Graphs", ReplayedOnTheHost)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    requests = sample("caption")[1][:20]
    engine = packed_engine("caption", limits=FEW)
    first = texts(engine.run(requests))

    assert engine._shrink_pool()
    second = texts(engine.run(requests))

    assert len(made) == 4 * len(engine._model.layers)
    assert first == second == texts(answers("caption", requests))


@pytest.mark.parametrize(("owner", "name"), [(packed_rows.DecodeRows, "step"), (PackedModel, "encode")])
@pytest.mark.parametrize("again", [False, True])
def test_memory_that_runs_out_once_lowers_no_limit_and_is_told_but_twice_does(
    owner: type, name: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = sample("caption")[1][:20]
    work, calls = getattr(owner, name), count(1)

    def short_once(*arguments: Any) -> Any:
        if next(calls) in ((3, 6) if again else (3,)):
            raise torch.OutOfMemoryError("full")
        return work(*arguments)

    monkeypatch.setattr(owner, name, short_once)
    engine = packed_engine("caption", limits=FEW)

    events = list(engine.run(requests))

    assert texts(events) == texts(answers("caption", requests))
    assert (engine._limits == FEW) == (not again)
    assert sum(run.out_of_memory for run in runs(events)) >= 1


def test_an_image_that_waits_keeps_its_own_features_and_no_others() -> None:
    limits = PackedLimits(max_rows=16, pool_tokens=2000, step_tokens=64, patches=512)
    engine = small_engine(random_model("glm4v"), small_vocabulary(), limits)
    prepared = [engine._prepare(request) for request in small_requests(30)]
    works = [work for work in prepared if isinstance(work, Work)]

    engine._encode(works)

    assert [len(work.features) for work in works] == [len(w.request.inputs.image_grid_thw) for w in works]
    features = [tensor for work in works for tensor in work.features]
    assert len(features) > 20
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in features)


def test_features_go_image_by_image_as_a_prompt_is_prefilled() -> None:
    engine = small_engine(random_model("glm4v"), small_vocabulary(), replace(FEW, patches=512))
    work = max(
        (engine._prepare(request) for request in small_requests(30)),
        key=lambda work: len(work.request.inputs.image_grid_thw) if isinstance(work, Work) else 0,
    )
    assert isinstance(work, Work)
    engine._encode([work])
    whole = torch.cat(list(work.features))
    ends = np.cumsum([len(tensor) for tensor in work.features])
    assert len(ends) == 2

    for place in range(work.request.prompt_tokens):
        found = work.piece(1).features
        number = int((work.image_places < place).sum())
        if place in work.image_places:
            assert torch.equal(torch.cat(list(found)), whole[number : number + 1])
        else:
            assert not found
        work.num_prefilled += 1
        work.forget_used_features()
        assert len(work.features) == (ends > int((work.image_places <= place).sum())).sum()
    assert not work.features


def test_what_ran_out_of_memory_is_told_though_the_pool_is_made_anew() -> None:
    engine = packed_engine("caption", limits=FEW)
    short = PeakSample(BatchShape(1, 64, 0, 0, 0), (1,), out_of_memory=True)
    engine._tally.add_step(short, (1,), 63, 1)

    assert engine._shrink_pool()

    run = engine._reported()
    assert isinstance(run, BatchRun)
    assert run.out_of_memory
    assert run.prompt_tokens == 63


def test_what_was_lowered_is_tried_again_after_a_while_without_a_shortage() -> None:
    engine = packed_engine("caption", limits=LIMITS)
    engine._limits = replace(LIMITS, max_rows=4, step_tokens=128, patches=1024)
    assert engine._shrink_pool()
    lowered = engine._limits

    for _ in range(packed._LINES_BEFORE_RAISING - 1):
        engine._reported()
    engine._give_up_graphs()
    for _ in range(packed._LINES_BEFORE_RAISING - 1):
        engine._reported()
    assert engine._limits == lowered
    engine._reported()
    assert engine._limits == replace(LIMITS, pool_tokens=lowered.pool_tokens)
    requests = sample("caption")[1][:20]
    assert texts(engine.run(requests)) == texts(answers("caption", requests))


def test_images_go_without_graphs_where_these_do_not_fit(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedModel, "has_vision_graphs", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    features = PackedModel._features_of

    def crowded(model: PackedModel, call: Any) -> Tensor:
        if call.size > 1024:
            raise torch.OutOfMemoryError("full")
        return features(model, call)

    requests = sample("caption")[1][:20]
    engine = packed_engine("caption", limits=FEW)
    with monkeypatch.context() as patch:
        patch.setattr(PackedModel, "_features_of", crowded)
        engine._model.record_vision(2048)

    assert "CUDA graphs of images do not fit" in caplog.text
    assert texts(engine.run(requests)) == texts(answers("caption", requests))


def test_memory_that_runs_out_while_two_streams_are_recorded_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Graph:
        def capture_begin(self, **_: Any) -> None:
            pass

        def capture_end(self) -> None:
            raise RuntimeError("capturing stream has unjoined work")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    with pytest.raises(torch.OutOfMemoryError), packed_graphs._recording(Graph(), None, None):  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("full")
    with pytest.raises(RuntimeError, match="unjoined"), packed_graphs._recording(Graph(), None, None):  # type: ignore[arg-type]
        pass


def steps_of(engine: PackedEngine) -> list[tuple[int, int]]:
    """Prompt tokens and rows of each step that *engine* takes from now on."""
    taken = []
    step = engine._rows.step

    def noted(pieces: Sequence[Any], num_rows: int) -> Tensor:
        taken.append((sum(len(piece.input_ids) for piece in pieces), num_rows))
        return step(pieces, num_rows)

    engine._rows.step = noted  # type: ignore[method-assign]
    return taken


@pytest.mark.parametrize("new_tokens", [1, 64])
@pytest.mark.parametrize(
    "limits", [FEW, LIMITS, PackedLimits(32, 1 << 14, 320, 2048), PackedLimits(200, 1 << 14, 320, 2048)]
)
def test_a_step_has_no_more_tokens_than_it_may_and_rows_of_few_numbers(
    limits: PackedLimits, new_tokens: int
) -> None:
    engine = packed_engine("caption", limits=limits)
    requests = [replace(request, max_new_tokens=new_tokens) for request in sample("caption")[1][:120]]
    taken = steps_of(engine)

    done = texts(engine.run(iter(requests)))

    assert len(done) == 120
    assert max(prompt + rows for prompt, rows in taken) <= limits.step_tokens
    # Those are all that graphs are made for.
    assert {rows for _, rows in taken} <= {8, 16, 32, 56, 64, 96, 104, 128, 160, 192, 200, limits.max_rows}
    assert any(prompt and rows for prompt, rows in taken)


def test_room_for_prompts_that_many_rows_leave_is_never_none() -> None:
    assert [PackedLimits(256, 1, 512, 1).prompt_tokens(rows) for rows in (0, 8, 448, 500, 600)] == [
        512, 504, 64, 64, 64,
    ]  # fmt: skip


def sized(name: str, prompt_tokens: int, new_tokens: int) -> Request:
    """A request of words alone."""
    words = np.full(prompt_tokens, 30, np.int32)
    inputs = ModelInputs(words, np.zeros((0, 588), np.uint8), ())
    return Request(name, "c", int(name), prompt_tokens, 0, new_tokens, inputs)


def test_who_finds_no_room_lets_a_few_pass_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "Intake", AtOnce)
    model, vocabulary = random_model("glm4v"), small_vocabulary()
    # No token ends an answer, so that all are as long as allowed.
    vocabulary = replace(vocabulary, eos_token_ids=(model.config.text_config.vocab_size,))
    limits = PackedLimits(max_rows=16, pool_tokens=100, step_tokens=128, patches=64)
    # Small ones of many lengths fill the pool. The large one finds no room unless they stop passing it.
    small = [sized(f"{row}", 5, 6 + row % 7) for row in range(70)]
    requests = [*small[:8], sized("70", 60, 10), *small[8:]]

    found = list(ends(small_engine(model, vocabulary, limits).run(requests)))

    assert len(found) == 71
    # Of those before it 8, 32 that may pass it, and some that leave their room to it.
    assert 16 < found.index(70) <= 48


@pytest.mark.parametrize("limits", [LIMITS, FEW, replace(LIMITS, max_rows=5, step_tokens=192)])
def test_work_filled_up_to_sizes_that_were_recorded_writes_the_same(
    limits: PackedLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = sample("caption")[1][:40]
    monkeypatch.setattr(PackedModel, "has_graphs", True)
    monkeypatch.setattr(PackedModel, "has_vision_graphs", True)
    for module in (packed_rows, packed_model):
        monkeypatch.setattr(module, "Graphs", ReplayedOnTheHost)
    engine = packed_engine("caption", limits=limits)
    engine._model.record_vision(limits.patches)
    ReplayedOnTheHost.num_replayed.clear()

    found = texts(engine.run(iter(requests)))

    assert found == texts(answers("caption", requests))
    assert ReplayedOnTheHost.num_replayed["Step"] > 5
    assert ReplayedOnTheHost.num_replayed["VisionCall"] > 1
