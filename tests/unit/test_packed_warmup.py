"""What a model does once before it counts."""

import gc
import weakref

import pytest
import torch

from glm4v_batch.activations import packed_coefficients
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_rows import DecodeRows
from glm4v_batch.engines.packed_warmup import _Work, warm_up
from glm4v_batch.job import GenerationSettings
from glm4v_batch.kv_pool import KVPool
from glm4v_batch.packed_limits import MOST_STEP_TOKENS, PackedDemand, PackedLimits, PackedNeeds
from glm4v_batch.types import RequestSize
from tests.cpu_meter import EndlessMeter
from tests.packed import packed_weights


def test_nothing_of_it_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PackedModel(packed_weights(), torch.zeros(3, 256), 2)
    made: list[weakref.ref[torch.Tensor]] = []
    make_pool = PackedModel.make_pool

    def noted(model: PackedModel, num_tokens: int, num_scratch: int) -> KVPool:
        pool = make_pool(model, num_tokens, num_scratch)
        made.extend(map(weakref.ref, (*pool.keys, *pool.values)))
        return pool

    def make_rows(pool: KVPool, num_rows: int) -> DecodeRows:
        return DecodeRows(model, pool, num_rows, GenerationSettings(max_new_tokens=8), [1])

    monkeypatch.setattr(PackedModel, "make_pool", noted)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    needs = PackedNeeds(packed_coefficients(model.model.config.to_dict(), 4), 1.0, 1)
    size = RequestSize(100, 400, 8)

    gc.disable()
    try:
        warm_up(model, make_rows, PackedDemand((needs,), 8, size, size, 400), EndlessMeter(0))
        # What hangs in a circle would wait for a collection, and the room is shared out before that.
        assert made
        assert not [tensor for tensor in made if tensor() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("max_rows", [1, 32, MOST_STEP_TOKENS + 1])
def test_the_largest_step_is_taken_however_many_rows_are_asked_for(max_rows: int) -> None:
    model = PackedModel(packed_weights(), torch.zeros(3, 256), 2)

    def make_rows(pool: KVPool, num_rows: int) -> DecodeRows:
        return DecodeRows(model, pool, num_rows, GenerationSettings(max_new_tokens=8), [1])

    work = _Work(model, make_rows, max_rows)

    with torch.inference_mode():
        work.step()
        work.decode()
    assert work.num_prompt == PackedLimits(max_rows, 0, MOST_STEP_TOKENS, 0).prompt_tokens(max_rows)
