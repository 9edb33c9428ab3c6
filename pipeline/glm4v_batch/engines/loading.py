"""Load a replica's engine in the replica's process, which sees that replica's GPUs and no other."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from glm4v_batch.activations import FloatArray
from glm4v_batch.checkpoint import Checkpoint
from glm4v_batch.devices import cuda_visible_devices, let_segments_grow
from glm4v_batch.engines import Engine
from glm4v_batch.engines.room import Room
from glm4v_batch.errors import PlacementError, first_line
from glm4v_batch.job import Job
from glm4v_batch.memory import MEMORY_OF_SAMPLES, MemoryModel, Meter
from glm4v_batch.packed_limits import PackedDemand, packed_limits
from glm4v_batch.types import BatchRun, PeakSample, Replica, Spot
from glm4v_batch.units import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm4v_batch.engines.generate import Vocabulary
    from glm4v_batch.kv_pool import KVPool

# Compiling takes as long as what it saves on so many images: measured on an H100, 20 s and 30 ms.
_WORTH_COMPILING = 700
# In little room it saves some 70 ms an image, by simulation: rows have the memory that it takes otherwise.
_WORTH_COMPILING_IN_LITTLE_ROOM = 300
_LITTLE_ROOM_BYTES = 8 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """What a replica's process needs.

    `MemoryModel` starts from *priors*, *samples* and *must_probe*; *offload_folder* is used only where
    the replica's device map says `disk`. With *packed* the packed engine runs, else `generate()`.
    *num_expected* is how many requests this replica is likely to get, None where nobody knows.
    """

    job: Job
    checkpoint: Checkpoint
    replica: Replica
    priors: Sequence[FloatArray]
    samples: Sequence[PeakSample]
    must_probe: bool
    offload_folder: Path
    packed: PackedDemand | None = None
    num_expected: int | None = None


def with_run(settings: ReplicaSettings, run: BatchRun) -> ReplicaSettings:
    """*settings* for a start after *run*, of which the memory model of `generate()` then knows."""
    if settings.packed or not run.peak_bytes:
        return settings
    sample = PeakSample(run.shape, run.peak_bytes, run.out_of_memory)
    return replace(settings, samples=[*settings.samples, sample][-MEMORY_OF_SAMPLES:])


def load_engine(settings: ReplicaSettings) -> Engine:
    """The engine of *settings*, its model loaded. It takes the process for itself.

    Raises PlacementError where there is less memory than the plan found.
    """
    try:
        return _loaded(settings)
    except RuntimeError as error:
        # Not before: what imports torch must come after the environment that torch reads.
        from glm4v_batch.engines.generate import ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        said = first_line(error)
    devices = settings.replica.devices
    names = ", ".join(device.label for device in devices)
    who = "what else runs here" if devices[0].index is None else "with nvidia-smi who else is there"
    raise PlacementError(
        f"Memory ran out while the model was loaded on {names}, though the plan found enough: {said}.",
        hint=f"Look {who}, or lower devices.memory_fraction; then run the same command again.",
    )


def _loaded(settings: ReplicaSettings) -> Engine:
    """As `load_engine`; what it sets in the environment comes before torch is imported."""
    devices = settings.replica.devices
    if devices[0].index is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices(devices)
        let_segments_grow()
        _limit_memory(settings.replica)
    from glm4v_batch.engines.generate import vocabulary_of
    from glm4v_batch.meters import meter_for
    from glm4v_batch.model import load_model
    from glm4v_batch.prompts import PromptRenderer

    job, checkpoint = settings.job, settings.checkpoint
    model = load_model(
        checkpoint.folder, job.model.dtype, torch_map(settings.replica), settings.offload_folder
    )
    renderer = PromptRenderer(checkpoint, system=job.prompt.system, user=job.prompt.user)
    make = _generate_engine if settings.packed is None else _packed_engine
    return make(settings, model, vocabulary_of(checkpoint, renderer.decode), meter_for(devices))


def _generate_engine(
    settings: ReplicaSettings, model: "PreTrainedModel", vocabulary: "Vocabulary", meter: Meter
) -> Engine:
    from glm4v_batch.engines.generate import GenerateEngine

    job = settings.job
    return GenerateEngine(
        model,
        vocabulary,
        job.generation,
        MemoryModel(meter.held_bytes(), settings.priors, settings.samples, must_probe=settings.must_probe),
        meter,
        memory_fraction=job.devices.memory_fraction,
        max_batch_size=job.batching.max_batch_size,
    )


def _packed_engine(
    settings: ReplicaSettings, model: "PreTrainedModel", vocabulary: "Vocabulary", meter: Meter
) -> Engine:
    import torch

    from glm4v_batch.engines.packed import PackedEngine
    from glm4v_batch.engines.packed_model import PackedModel
    from glm4v_batch.engines.packed_rows import DecodeRows
    from glm4v_batch.engines.packed_warmup import WarmedUp, warm_up

    job, demand = settings.job, settings.packed
    assert demand is not None
    table = torch.from_numpy(vocabulary.normalisation)
    packed = PackedModel(model, table, vocabulary.temporal_patch_size)
    warmed = WarmedUp(demand, 0.0)
    if packed.device.type == "cuda":
        room_bytes = min(Room(meter, job.devices.memory_fraction).left_bytes())
        is_compiled = is_worth_compiling(settings.num_expected, room_bytes)
        if is_compiled:
            packed.compile()

        def rows_in(pool: "KVPool", max_rows: int) -> DecodeRows:
            return DecodeRows(packed, pool, max_rows, job.generation, vocabulary.eos_token_ids)

        warmed = warm_up(packed, rows_in, demand, meter)
        if is_compiled:
            packed.end_compilers()
        meter.free()
    limits = packed_limits(warmed.demand, Room(meter, job.devices.memory_fraction).left_bytes())
    packed.record_vision(limits.patches)
    meter.free()
    return PackedEngine(
        packed,
        vocabulary,
        job.generation,
        limits,
        meter,
        [needs.coefficients for needs in warmed.demand.needs],
        memory_fraction=job.devices.memory_fraction,
        compile_seconds=warmed.compile_seconds,
    )


def is_worth_compiling(num_expected: int | None, room_bytes: int) -> bool:
    """Whether *num_expected* requests pay for it, with *room_bytes* beside the weights.

    Where nobody knows how many come, there may be millions.
    """
    enough = _WORTH_COMPILING_IN_LITTLE_ROOM if room_bytes < _LITTLE_ROOM_BYTES else _WORTH_COMPILING
    return num_expected is None or num_expected >= enough


def torch_map(replica: Replica) -> Mapping[str, str]:
    """The replica's device map in the names that torch has for its devices in the replica's process."""
    return {module: _torch_name(spot, replica) for module, spot in replica.device_map.items()}


def _torch_name(spot: Spot, replica: Replica) -> str:
    if isinstance(spot, str):
        return spot
    return "cpu" if replica.devices[spot].index is None else f"cuda:{spot}"


def _limit_memory(replica: Replica) -> None:
    import torch

    for place, device in enumerate(replica.devices):
        if device.limit_bytes is not None:
            fraction = min(1.0, device.limit_bytes / torch.cuda.get_device_properties(place).total_memory)
            torch.cuda.set_per_process_memory_fraction(fraction, place)
