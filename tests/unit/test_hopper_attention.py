"""The kernel for images on Hopper without a GPU: it compiles, knows what it takes, and has a stand-in.

Its results are held against float32 on a GPU, by `tests/gpu/packed_check.py`.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from glm4v_batch.engines import attention_kernel, hopper_attention  # noqa: E402  Triton comes first

# Shared memory that a program may have (CUDA C++ Programming Guide).
SHARED_BYTES = 232_448


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process that compiles: Gluon's own objects complain when it ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=be_quiet) as process:
        yield process


def be_quiet() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 128), ("fp16", 128), ("bf16", 64)])
def test_it_compiles_to_hoppers_own_instructions(
    compiler: ProcessPoolExecutor, dtype: str, width: int
) -> None:
    assembly, shared_bytes = compiler.submit(compiled, dtype, width).result(timeout=120)

    for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg.inc", "ex2.approx"):
        assert instruction in assembly
    assert shared_bytes <= SHARED_BYTES


def compiled(dtype: str, width: int) -> tuple[str, int]:
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    def descriptor(num_rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([num_rows, width], gl.bfloat16)
        return f"tensordesc<{dtype}[{num_rows}, {width}],{layout!r}>"

    kernel = hopper_attention._attend
    types = {"query": descriptor(64), "keys": descriptor(128), "values": descriptor(128)}
    types |= {"answer": f"*{dtype}", "scale": "fp32", "WIDTH": "constexpr", "SLOTS": "constexpr"}
    types |= dict.fromkeys(("ends", "key_starts", "key_counts"), "*i32")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in (("WIDTH", width), ("SLOTS", 32))}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=places)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return made.asm["ptx"], made.metadata.shared


@pytest.fixture
def kernels() -> Iterator[Any]:
    """The module of all kernels, which has not looked for this one yet."""
    attention_kernel._hopper_kernel.cache_clear()
    yield attention_kernel
    attention_kernel._hopper_kernel.cache_clear()


def find(kernels: Any) -> Any:
    return kernels._hopper_kernel(torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_cards_have_the_kernel_for_all_cards(
    kernels: Any, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    assert find(kernels) is None


def test_hopper_has_it(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(hopper_attention, "attend_images", lambda *_: None)

    assert find(kernels) is hopper_attention


def raising(error: Exception) -> Any:
    def attend_images(*_: Any) -> None:
        raise error

    return attend_images


def test_where_triton_does_not_compile_it_there_is_the_other_and_a_word(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(hopper_attention, "attend_images", raising(AttributeError("async_load is gone")))

    assert find(kernels) is None
    assert "slower kernel" in caplog.text
    assert "async_load is gone" in caplog.text


def test_memory_that_runs_out_is_not_taken_for_a_refusal(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(hopper_attention, "attend_images", raising(torch.OutOfMemoryError("full")))

    with pytest.raises(torch.OutOfMemoryError):
        find(kernels)


def spread(row_values: int, first: int = 0) -> tuple[torch.Tensor, ...]:
    """Query, keys and values of 12 heads, with so many values from one token to the next."""
    whole = torch.zeros(3, 10 * row_values + first, dtype=torch.bfloat16)
    each = whole[:, first:].view(3, 10, row_values)[..., : 12 * 128].view(3, 10, 12, 128)
    return each[0], each[1], each[2]


@pytest.mark.parametrize(("served", "of", "given"), [
    (True, slice(None), spread(12 * 128)),
    (True, slice(None), spread(3 * 12 * 128)),
    (False, (slice(None), slice(None, None, 2)), spread(12 * 128)),
    (False, (..., slice(64)), spread(12 * 128)),
    (False, (..., slice(1, None)), spread(12 * 128)),
    (False, slice(None), spread(12 * 128 + 4)),
    (False, slice(None), spread(12 * 128, first=4)),
], ids=["side by side", "queries, keys and values in turn", "heads apart", "parts of heads", "unknown width",
        "tokens begin between", "all begins between"])  # fmt: skip
def test_it_takes_heads_side_by_side_where_copies_may_begin(
    served: bool, of: Any, given: tuple[torch.Tensor, ...]
) -> None:
    assert hopper_attention.serves(*(tensor[of] for tensor in given)) is served


def test_it_takes_as_many_heads_of_keys_as_of_queries() -> None:
    query, keys, values = spread(12 * 128)

    assert not hopper_attention.serves(query, keys[:, :2], values[:, :2])
