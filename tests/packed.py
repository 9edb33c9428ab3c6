"""The packed engine on the bundled tiny GLM-4V, in this process."""

from typing import Any

from glm4v_batch.activations import packed_coefficients
from glm4v_batch.engines.packed import PackedEngine
from glm4v_batch.engines.packed_model import PackedModel
from glm4v_batch.memory import Meter
from glm4v_batch.model import load_model
from glm4v_batch.packed_limits import PackedLimits
from tests.cpu_meter import EndlessMeter
from tests.tiny import ROOT, job_of, vocabulary, weight_bytes

LIMITS = PackedLimits(max_rows=16, pool_tokens=1 << 14, step_tokens=512, patches=2048)


def packed_weights() -> Any:
    """The tiny model in float32: one of its own, because the packed engine changes its attention."""
    return load_model(ROOT / "data" / "tiny-glm4v", "float32", {"": "cpu"})


def packed_engine(
    name: str,
    *overrides: str,
    limits: PackedLimits = LIMITS,
    meter: Meter | None = None,
    model: Any = None,
) -> PackedEngine:
    """The packed engine on the job `jobs/<name>.yaml`; without *meter* memory is endless.

    It takes *model*, or `packed_weights`, for itself.
    """
    import torch

    known = vocabulary(name, *overrides)
    model = model or packed_weights()
    table = torch.from_numpy(known.normalisation)
    meter = meter or EndlessMeter(weight_bytes())
    return PackedEngine(
        PackedModel(model, table, known.temporal_patch_size),
        known,
        job_of(name, *overrides).generation,
        limits,
        meter,
        [packed_coefficients(model.config.to_dict(), 4)],
        memory_fraction=1.0,
    )
