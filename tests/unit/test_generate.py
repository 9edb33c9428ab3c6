"""The parts of the generate engine that a wrong batch would betray."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch.engines.generate import (
    cut_at_eos,
    input_device,
    left_padded,
    normalise,
    ran_out_of_memory,
)
from glm4v_batch.errors import PlacementError
from glm4v_batch.types import BatchRun, BatchStart, Completion
from tests.cpu_meter import CrowdedMeter
from tests.tiny import engine, runs, sample, weight_bytes


def test_rows_are_padded_on_the_left_with_their_own_first_token() -> None:
    ids, mask = left_padded([np.array([7, 8, 9], np.int32), np.array([5], np.int32)])

    assert ids.tolist() == [[7, 8, 9], [5, 5, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@given(rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_adds_no_token_that_a_row_does_not_have(rows: list[list[int]]) -> None:
    ids, mask = left_padded([np.array(row, np.int32) for row in rows])

    for row, padded, real in zip(rows, ids, mask.bool(), strict=True):
        assert padded[real].tolist() == row
        assert set(padded.tolist()) == set(row)


def test_normalised_pixels_are_looked_up_per_channel_and_repeated_over_time() -> None:
    table = torch.arange(3 * 256, dtype=torch.float32).view(3, 256)
    patches = torch.tensor([[1, 2, 10, 20, 100, 200]], dtype=torch.uint8)

    values = normalise(patches, table, temporal_patch_size=2)

    red, green, blue = [1, 2], [256 + 10, 256 + 20], [512 + 100, 512 + 200]
    assert values.tolist() == [[*red, *red, *green, *green, *blue, *blue]]


def test_a_row_is_cut_at_its_first_end_token() -> None:
    assert cut_at_eos([4, 5, 2, 6, 2, 2], eos_token_ids=(2, 3)) == ([4, 5], "stop")
    assert cut_at_eos([4, 5, 6], eos_token_ids=(2, 3)) == ([4, 5, 6], "length")
    assert cut_at_eos([3, 4], eos_token_ids=(2, 3)) == ([], "stop")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_allocation_failures_are_recognised_whatever_library_reports_them(error: RuntimeError) -> None:
    assert ran_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Expected all tensors to be on the same device"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("the size of tensor a must match the size of tensor b; out of range"),
    ],
)
def test_other_errors_are_never_taken_for_lack_of_memory(error: RuntimeError) -> None:
    assert not ran_out_of_memory(error)


SHORT = "generation.max_new_tokens=2"
MIB = 1 << 20


def test_a_batch_is_announced_before_it_runs() -> None:
    _, requests = sample("question")

    events = list(engine("question", SHORT, max_batch_size=4).run(requests[:8]))

    announced: set[tuple[str, int]] = set()
    for event in events:
        match event:
            case BatchStart():
                announced = set(event.rows)
            case Completion():
                assert (event.chunk_id, event.row) in announced
    assert sum(isinstance(event, BatchStart) for event in events) == len(runs(events)) == 2


def test_rows_of_one_batch_are_cut_each_at_its_own_length() -> None:
    lengths = [1, 9, 4]
    requests = [
        replace(request, max_new_tokens=length)
        for request, length in zip(sample("caption")[1][:3], lengths, strict=True)
    ]

    events = list(engine("caption", max_batch_size=3).run(requests))

    ended = sorted((event for event in events if isinstance(event, Completion)), key=lambda each: each.row)
    assert len(runs(events)) == 1
    assert [(each.completion_tokens, each.finish_reason) for each in ended] == [
        (length, "length") for length in lengths
    ]


def test_a_drained_engine_ends_after_the_batch_in_hand() -> None:
    _, requests = sample("question")
    tiny = engine("question", SHORT, max_batch_size=4)
    events: list[object] = []

    for event in tiny.run(requests[:64]):
        events.append(event)
        if isinstance(event, BatchStart):
            tiny.drain()

    assert sum(isinstance(event, Completion) for event in events) == 4
    assert isinstance(events[-1], BatchRun)


def test_a_neighbour_that_takes_all_memory_stops_the_run_instead_of_failing_its_records() -> None:
    meter = CrowdedMeter(weight_bytes(), weight_bytes() + MIB // 4, first_bytes=weight_bytes() + 100 * MIB)
    _, requests = sample("question")

    with pytest.raises(PlacementError, match=r"of the 100\.00 MiB for work, 256\.00 KiB are left"):
        list(engine("question", SHORT, meter=meter, memory_fraction=1.0).run(requests[:1]))


def test_requests_enter_through_the_lowest_card_of_the_map() -> None:
    class Spread:
        def __init__(self) -> None:
            self.hf_device_map = {"a": torch.device("cuda:1"), "b": torch.device("cuda:0"), "c": "cpu"}

    assert input_device(Spread()) == torch.device("cuda:0")
