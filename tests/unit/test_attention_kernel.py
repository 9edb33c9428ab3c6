"""The Triton kernels without a GPU: interpreted, and compiled for each kind of card."""

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glm4v_batch.engines import packed_attention
from glm4v_batch.engines.packed_attention import Sequences

triton = pytest.importorskip("triton", reason="Triton has no wheel for this machine")

NUM_HEADS, NUM_KEY_HEADS, WIDTH = 8, 2, 32
# Of each sequence its queries and the keys before them; of the third and last some queries see no key.
SIZES, BEFORE, STARTS = [70, 1, 130, 30, 5], [34, 120, 0, 220, -4], [10, 200, 350, 500, 890]
COUNTS = [size + before for size, before in zip(SIZES, BEFORE, strict=True)]
SCALING = WIDTH**-0.5

# Shared memory that a program may have, by compute capability (CUDA C++ Programming Guide).
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


def load_kernels(name: str) -> Any:
    """The module anew: whether Triton interprets or compiles is settled where a kernel is defined."""
    path = Path(packed_attention.__file__).with_name("attention_kernel.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets: it settles that when it is imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TRITON_INTERPRET", "1")
            process.submit(int).result(timeout=60)
        yield process


def pool() -> tuple[Tensor, Tensor]:
    """Keys and values [P, K, D], each a part of something wider, NaN wherever no sequence has any."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.full((900, NUM_KEY_HEADS, WIDTH), torch.nan)
    values = torch.full((900, NUM_KEY_HEADS, 2 * WIDTH), torch.nan)[:, :, WIDTH:]
    for start, count in zip(STARTS, COUNTS, strict=True):
        for tensor in (keys, values):
            tensor[start : start + count] = torch.randn(count, NUM_KEY_HEADS, WIDTH, generator=generator)
    return keys, values


def queries(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, 3 * NUM_HEADS, WIDTH, generator=generator)[:, NUM_HEADS : 2 * NUM_HEADS]


def ints(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attend_pieces(is_causal: bool) -> None:
    kernels = load_kernels("interpreted_attention_kernel")
    kernels._num_stages = lambda *_: 1
    kernels._hopper_kernel = lambda *_: None
    ends = [0, *np.cumsum(SIZES).tolist()]
    # A slot that nothing uses comes last, as where a step is filled up.
    sequences = Sequences(ints([*ends, ends[-1]]), ints([*STARTS, 0]), ints([*COUNTS, 0]))
    (keys, values), query = pool(), queries(ends[-1])
    found = torch.full(query.shape, 7.0)

    kernels.attend_pieces(found, query, keys, values, sequences, SCALING, is_causal=is_causal)

    for place, (begin, end) in enumerate(pairwise(ends)):
        seen = slice(STARTS[place], STARTS[place] + COUNTS[place])
        one = (query[begin:end], keys[seen], values[seen], SCALING)
        expected = packed_attention._one(*one, is_causal=is_causal).nan_to_num()
        torch.testing.assert_close(found[begin:end], expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_pieces_attend_as_sdpa_does_each_to_its_own_keys(
    interpreter: ProcessPoolExecutor, is_causal: bool
) -> None:
    interpreter.submit(attend_pieces, is_causal).result(timeout=120)


def attend_rows(enough_programs: int) -> None:
    kernels = load_kernels("interpreted_attention_kernel")
    kernels._num_stages = lambda *_: 1
    kernels._ENOUGH_PROGRAMS = enough_programs
    counts = [*COUNTS[:4], 0]
    sequences = Sequences(ints(range(6)), ints(STARTS), ints(counts))
    (keys, values), query = pool(), queries(5)
    found = torch.full(query.shape, 7.0)

    kernels.attend_rows(found, query, keys, values, sequences, SCALING)

    for row, (start, count) in enumerate(zip(STARTS[:4], counts[:4], strict=True)):
        seen = slice(start, start + count)
        one = (query[row : row + 1], keys[seen], values[seen], SCALING)
        torch.testing.assert_close(found[row : row + 1], packed_attention._one(*one, is_causal=False))
    assert not found[4].any()


@pytest.mark.parametrize("enough_programs", [1, 20, 60, 1000])
def test_rows_attend_as_sdpa_does_however_many_programs_share_their_keys(
    interpreter: ProcessPoolExecutor, enough_programs: int
) -> None:
    interpreter.submit(attend_rows, enough_programs).result(timeout=120)


def test_the_fewer_rows_the_more_programs_share_their_keys() -> None:
    kernels = load_kernels("attention_kernel_to_count")

    shares = [kernels._num_splits(num_programs) for num_programs in (2, 64, 96, 128, 256, 512, 2048)]

    assert shares == [16, 8, 5, 4, 2, 1, 1]


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_card_that_is_served_has_a_compiler_and_the_shared_memory_for_it(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, width = load_kernels("compiled_attention_kernel"), 128
    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_BYTES[capability])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = torch.device("cuda")

    def shared_bytes(kernel: Any, rows: int, **constants: Any) -> int:
        stages = kernels._num_stages(device, width, rows)
        sizes = {"GROUP": 16, "WIDTH": width, "ROWS": rows, "KEYS": kernels._BLOCK_KEYS}
        return int(compiled(kernel, capability, stages, sizes | constants).metadata.shared)

    pieces = shared_bytes(kernels._attend, kernels._PIECE_ROWS, IS_CAUSAL=True, SLOTS=32)
    rows = shared_bytes(kernels._attend_rows, kernels._FEWEST_ROWS, IS_SHARED=True)
    joined = compiled(kernels._join, capability, 1, {"WIDTH": width, "MOST_SPLITS": 16}).metadata.shared

    assert max(pieces, rows, joined) <= SHARED_BYTES[capability]


def compiled(kernel: Any, capability: int, num_stages: int, constants: dict[str, Any]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("query", "keys", "values", "answer"), "*bf16")
    pointers |= dict.fromkeys(("founds", "sums"), "*fp32") | {"scale": "fp32"}
    pointers |= dict.fromkeys(("ends", "key_starts", "key_counts"), "*i32")
    constant = dict.fromkeys(constants, "constexpr")
    signature = {name: (pointers | constant).get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    options = {"num_warps": 4, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
