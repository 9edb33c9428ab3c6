"""A model spread over cards writes what it writes on one; shown without a GPU, on logical devices."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers.models.glm4v.modeling_glm4v import Glm4vTextRotaryEmbedding

from glm4v_batch.engines import packed_attention, packed_model
from glm4v_batch.engines.stopwatch import Stopwatch
from tests.logical_devices import logical_devices
from tests.sharded import DEVICE_MAPS, cards_of, differences, enter_through, load, requests, run, run_packed
from tests.tiny import runs, texts, weights

GIB = 1 << 30
CROSSED = "Expected all tensors to be on the same device"
SAMPLED = ("generation.temperature=3", "generation.top_k=20", "generation.repetition_penalty=1.1")


@pytest.fixture(scope="module")
def unsharded() -> list[object]:
    """What the whole model writes, before there are any cards."""
    return run(weights())


@pytest.fixture(scope="module")
def unsharded_samples() -> list[object]:
    """What the whole model draws."""
    return run(weights(), *SAMPLED)


@pytest.fixture(autouse=True)
def _cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logical cards on which transformers can load a model."""
    # Its threads would not see them.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24 * GIB, 24 * GIB))
    with logical_devices():
        yield


@pytest.fixture
def _packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logical cards that have nothing of a GPU beside its memory: no kernels, events or pinned memory."""
    for module in (packed_attention, packed_model):
        monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    monkeypatch.setattr(Stopwatch, "_now", lambda _: time.perf_counter())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


def test_the_requests_make_one_padded_batch_with_different_texts(unsharded: list[object]) -> None:
    (batch,) = runs(unsharded)

    assert batch.shape.batch_size == len(requests()) == 6
    assert batch.shape.padded_tokens > batch.prompt_tokens
    assert len(set(texts(unsharded).values())) == 6


@pytest.mark.parametrize(
    ("name", "entrance"), [(name, card) for name, cards in DEVICE_MAPS.items() for card in cards_of(cards)]
)
def test_a_spread_model_writes_the_same_texts_wherever_requests_enter(
    name: str, entrance: str, unsharded: list[object]
) -> None:
    model = load(DEVICE_MAPS[name])
    enter_through(model, entrance)

    written = run(model)

    assert {str(weight.device) for weight in model.parameters()} == set(cards_of(DEVICE_MAPS[name]))
    assert differences(written, unsharded) == []


@pytest.mark.parametrize("name", ["automatic order", "vision last", "three cards, backwards"])
def test_a_spread_model_draws_the_same_samples(
    name: str, unsharded: list[object], unsharded_samples: list[object]
) -> None:
    written = run(load(DEVICE_MAPS[name]), *SAMPLED)

    assert differences(written, unsharded_samples) == []
    assert differences(written, unsharded) != []


@pytest.mark.usefixtures("_packed")
@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_the_packed_engine_writes_the_same_texts_on_a_spread_model(
    name: str, unsharded: list[object]
) -> None:
    model = load(DEVICE_MAPS[name])

    written = run_packed(model)

    assert {str(weight.device) for weight in model.parameters()} == set(cards_of(DEVICE_MAPS[name]))
    assert differences(written, unsharded) == []


@pytest.mark.usefixtures("_packed")
def test_positions_become_angles_where_their_module_lies(
    unsharded: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Glm4vTextRotaryEmbedding.forward

    def as_of_5_17(self: Any, x: Tensor, position_ids: Tensor) -> object:
        """Newer versions of transformers move the frequencies to the embeddings."""
        return newest(self, x, position_ids + 0 * self.inv_freq[0].long())

    monkeypatch.setattr(Glm4vTextRotaryEmbedding, "forward", as_of_5_17)

    written = run_packed(load(DEVICE_MAPS["rotary elsewhere"]))

    assert differences(written, unsharded) == []


@pytest.mark.usefixtures("_packed")
@pytest.mark.parametrize("name", ["automatic order", "vision last", "three cards, backwards"])
def test_the_packed_engine_draws_the_same_samples_on_a_spread_model(
    name: str, unsharded_samples: list[object]
) -> None:
    written = run_packed(load(DEVICE_MAPS[name]), *SAMPLED)

    assert differences(written, unsharded_samples) == []


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_cuda_records_no_model_that_lies_on_several_cards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_model, "has_kernel", lambda *_: True)
    spread, whole = (
        packed_model.PackedModel(load(cards), torch.zeros(3, 256), 2)
        for cards in (DEVICE_MAPS[name], {"": "cuda:1"})
    )

    assert not spread.has_graphs
    assert not spread.has_vision_graphs
    assert whole.has_graphs
    assert whole.has_vision_graphs


def test_modules_in_host_memory_change_no_text(unsharded: list[object]) -> None:
    one_card = {
        module: "cpu" if card == "cuda:1" else card for module, card in DEVICE_MAPS["automatic order"].items()
    }
    model = load(one_card)

    written = run(model)

    assert {weight.device.type for weight in model.parameters()} == {"cuda", "meta"}
    assert differences(written, unsharded) == []


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_a_spread_model_without_hooks_mixes_devices(name: str) -> None:
    model = load(DEVICE_MAPS[name])
    remove_hook_from_submodules(model)

    with pytest.raises(RuntimeError, match=CROSSED):
        run(model)


def ones(*shape: int, on: str) -> Tensor:
    return torch.ones(shape, device=on)


def attend(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(queries, keys, keys, mask)


MIXED: dict[str, Callable[[str, str], object]] = {
    "add": lambda a, b: ones(2, on=a) + ones(2, on=b),
    "add in place": lambda a, b: ones(2, on=a).add_(ones(2, on=b)),
    "compare": lambda a, b: ones(2, on=a) == ones(2, on=b),
    "where": lambda a, b: torch.where(ones(2, on=a) > 0, ones(2, on=b), ones(2, on=b)),
    "cat": lambda a, b: torch.cat([ones(2, on=a), ones(2, on=b)]),
    "matmul": lambda a, b: ones(2, 2, on=a) @ ones(2, 2, on=b),
    "embedding": lambda a, b: nn.functional.embedding(ones(2, on=a).long(), ones(2, 2, on=b)),
    "linear layer": lambda a, b: nn.Linear(2, 2).to(a)(ones(2, on=b)),
    "attention": lambda a, b: attend(ones(1, 1, 2, 2, on=a), ones(1, 1, 2, 2, on=b)),
    "attention mask": lambda a, b: attend(
        ones(1, 1, 2, 2, on=a), ones(1, 1, 2, 2, on=a), mask=ones(2, 2, on=b).bool()
    ),
    "image features into text": lambda a, b: ones(2, on=a).masked_scatter(ones(2, on=a) > 0, ones(2, on=b)),
    "masked fill": lambda a, b: ones(2, on=a).masked_fill(ones(2, on=b) > 0, 0.0),
    "put values": lambda a, b: ones(2, on=a).index_put_((ones(1, on=a).long(),), ones(1, on=b)),
    "a card's scalar": lambda a, b: ones(2, on=a) * ones(on=b),
}


@pytest.mark.parametrize("operation", MIXED)
@pytest.mark.parametrize(("one", "other"), [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cpu", "cuda:0")])
def test_an_operation_on_two_devices_fails_as_on_cuda(operation: str, one: str, other: str) -> None:
    with pytest.raises(RuntimeError, match=f"{CROSSED}.* {one} and {other}|{CROSSED}.* {other} and {one}"):
        MIXED[operation](one, other)


@pytest.mark.parametrize("index_device", ["cuda:0", "cuda:1"])
def test_a_card_is_indexed_from_itself_or_the_host_alone(index_device: str) -> None:
    index = torch.tensor([0], device=index_device)

    assert ones(2, on=index_device)[index].device == torch.device(index_device)
    assert ones(2, on="cuda:1")[index.cpu()].device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match=CROSSED):
        ones(2, on="cuda:2")[index]


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "made there": lambda x: torch.arange(3, device=x.device),
    "made by a name": lambda x: torch.tensor([1.0], device="cuda:1"),
    "made alike": torch.zeros_like,
    "made by its method": lambda x: x.new_tensor([1.0]),
    "moved by name": lambda x: torch.ones(2).to("cuda:1", torch.float64),
    "moved by keyword": lambda x: torch.ones(2).to(dtype=torch.float64, device=x.device),
    "moved to another tensor": lambda x: torch.ones(2, device="cuda:0").to(x),
    "a view": lambda x: x[:1].view(1, 1),
    "a parameter": nn.Parameter,
    "with a host scalar": lambda x: x + torch.tensor(1.0),
    "with a number": lambda x: 2 * x,
    "copied into": lambda x: x.copy_(torch.ones(2, device="cuda:0")),
    "a chunk": lambda x: x.chunk(2)[1],
}


@pytest.mark.parametrize("result", ALLOWED)
def test_what_cuda_allows_works_and_lies_on_the_card(result: str) -> None:
    tensor = torch.ones(2, device="cuda:1")

    assert ALLOWED[result](tensor).device == torch.device("cuda:1")


def test_moving_leaves_the_original_where_it_was_and_keeps_values() -> None:
    original = torch.arange(3)

    there = original.to("cuda:1")
    back = there.cpu()

    assert [t.device for t in (original, there, back)] == [torch.device(d) for d in ("cpu", "cuda:1", "cpu")]
    assert there.tolist() == back.tolist() == [0, 1, 2]
    assert there[2].item() == 2


def test_a_host_scalar_stays_on_the_host_after_it_met_a_card() -> None:
    scalar = torch.tensor(1.0)

    scalar.expand_as(torch.ones(2, device="cuda:0"))

    assert scalar.device == torch.device("cpu")


def test_what_lies_on_a_card_is_no_numpy_array() -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(2, device="cuda:0").numpy()
