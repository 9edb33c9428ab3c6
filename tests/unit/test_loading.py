"""What a replica's process decides while it loads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4v_batch.engines import loading
from glm4v_batch.engines.loading import ReplicaSettings, is_worth_compiling, load_engine, with_run
from glm4v_batch.errors import PlacementError
from glm4v_batch.memory import MEMORY_OF_SAMPLES
from glm4v_batch.types import BatchRun, BatchShape, Device, PeakSample, Replica
from glm4v_batch.units import GIB


@pytest.mark.parametrize(
    ("num_expected", "room_gib", "expected"),
    [
        (20, 50, False), (699, 50, False), (700, 50, True), (None, 50, True),
        (20, 2, False), (299, 2, False), (300, 2, True), (None, 2, True),
    ],
)  # fmt: skip
def test_only_a_short_job_does_without_compiling(
    num_expected: int | None, room_gib: int, *, expected: bool
) -> None:
    assert is_worth_compiling(num_expected, room_gib * GIB) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), PlacementError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
    ],
)
def test_memory_that_runs_out_while_loading_is_a_matter_of_room_and_nothing_else_is(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> Any:
        raise error

    monkeypatch.setattr(loading, "_loaded", full)
    device = Device(2, "a card", 24 * GIB, 24 * GIB)
    settings: Any = ReplicaSettings.__new__(ReplicaSettings)
    object.__setattr__(settings, "replica", Replica((device,), {"": 0}, (0,)))

    with pytest.raises(expected) as caught:
        load_engine(settings)

    assert type(caught.value) is expected
    if expected is PlacementError:
        assert "GPU 2" in str(caught.value)


def test_a_start_after_a_batch_knows_what_that_took() -> None:
    nothing: Any = None
    settings = ReplicaSettings(
        job=nothing,
        checkpoint=nothing,
        replica=nothing,
        priors=(),
        samples=(),
        must_probe=True,
        offload_folder=Path(),
    )
    shape = BatchShape(4, 40, 0, 80, 400)
    short = BatchRun(shape, (900,), (1000,), (2000,), True, 0.5, 40, 40)
    unmeasured = replace(short, peak_bytes=())

    for run in (unmeasured, short, unmeasured):
        settings = with_run(settings, run)

    assert settings.samples == [PeakSample(shape, (1000,), out_of_memory=True)]
    for _ in range(2 * MEMORY_OF_SAMPLES):
        settings = with_run(settings, short)
    assert len(settings.samples) == MEMORY_OF_SAMPLES
