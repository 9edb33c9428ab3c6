"""What people write today: a loop around `generate()` with a fixed batch, to compare with."""

import gc
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from glm4v_batch.engines.generate import left_padded, normalise
from glm4v_batch.images import normalisation_table
from glm4v_batch.types import Request
from tests.gpu.batch_size_search import PROCESSING


def generate_batch(model: Any, work: Sequence[Request], size: int) -> float | None:
    """Seconds for all of *work* in batches of *size*, as it comes; None where memory runs out."""
    started = time.perf_counter()
    try:
        for start in range(0, len(work), size):
            _generate(model, work[start : start + size])
    except torch.OutOfMemoryError:
        ran_out = True
    else:
        ran_out = False
    gc.collect()
    torch.cuda.empty_cache()
    return None if ran_out else time.perf_counter() - started


@torch.inference_mode()
def _generate(model: Any, batch: Sequence[Request]) -> None:
    device = torch.device("cuda:0")
    ids_BT, mask_BT = left_padded([request.inputs.input_ids for request in batch])
    table = torch.from_numpy(normalisation_table(PROCESSING)).to(device)
    patches_P = torch.from_numpy(np.concatenate([request.inputs.patches for request in batch])).to(device)
    model.generate(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        mm_token_type_ids=(ids_BT == model.config.image_token_id).int().to(device),
        image_grid_thw=torch.tensor([r.inputs.image_grid_thw[0] for r in batch], device=device),
        pixel_values=normalise(patches_P, table, 2),
        max_new_tokens=batch[0].max_new_tokens,
        min_new_tokens=batch[0].max_new_tokens,
        do_sample=False,
    )
