"""What a model does once before it counts."""

import pytest
import torch

from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.engines.packed_rows import DecodeRows
from glm4v_batch.engines.packed_warmup import _Work
from glm4v_batch.job import GenerationSettings
from glm4v_batch.kv_pool import KVPool
from glm4v_batch.packed_limits import MOST_STEP_TOKENS, PackedLimits
from tests.packed import packed_weights


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
