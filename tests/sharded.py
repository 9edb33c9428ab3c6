"""The tiny GLM-4V spread over several cards: the device maps that have to work, and what it writes."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from glm4v_batch.activations import prior_coefficients
from glm4v_batch.engines.generate import GenerateEngine
from glm4v_batch.memory import MemoryModel
from glm4v_batch.model import load_model
from glm4v_batch.packed_limits import PackedLimits
from glm4v_batch.types import Request
from tests.cpu_meter import EndlessMeter
from tests.packed import packed_engine
from tests.tiny import ROOT, job_of, sample, texts, vocabulary, weight_bytes

JOB = "caption"
MOST_NEW_TOKENS = 12
NEW_TOKENS = f"generation.max_new_tokens={MOST_NEW_TOKENS}"
NUM_REQUESTS = 6
# Fewer rows than requests, prompts in pieces, images of several calls.
_PACKED = PackedLimits(max_rows=4, pool_tokens=1 << 12, step_tokens=64, patches=512)

DeviceMap = Mapping[str, str]


def spread(*, vision: str, layers: str, head: str, embedding: str = "0", rotary: str = "0") -> DeviceMap:
    """A device map of the tiny model, from card numbers: a digit per vision block and per text layer.

    What comes before and after the vision blocks lies with the first and the last of them, the final
    norm with the last text layer. *embedding* and *rotary* are the text's.
    """
    text = {
        "embed_tokens": embedding,
        **{f"layers.{layer}": card for layer, card in enumerate(layers)},
        "norm": layers[-1],
        "rotary_emb": rotary,
    }
    cards = {
        **{f"model.visual{part}": card for part, card in _vision(vision).items()},
        **{f"model.language_model.{part}": card for part, card in text.items()},
        "lm_head": head,
    }
    return {module: f"cuda:{card}" for module, card in cards.items()}


def _vision(blocks: str) -> dict[str, str]:
    if len(set(blocks)) == 1:
        return {"": blocks[0]}
    before = ("patch_embed", "rotary_pos_emb", "post_conv_layernorm", "embeddings")
    after = ("post_layernorm", "downsample", "merger")
    return {
        **{f".{part}": blocks[0] for part in before},
        **{f".blocks.{block}": card for block, card in enumerate(blocks)},
        **{f".{part}": blocks[-1] for part in after},
    }


DEVICE_MAPS: Mapping[str, DeviceMap] = {
    "automatic order": spread(vision="0000", layers="0011", head="1"),
    "vision alone": spread(vision="0000", embedding="1", layers="1111", rotary="1", head="1"),
    "vision last": spread(vision="1111", layers="0000", head="0"),
    "vision with the last layers": spread(vision="1111", layers="0011", head="1"),
    "vision split": spread(vision="0011", embedding="1", layers="1111", rotary="1", head="1"),
    "head apart": spread(vision="0000", embedding="1", layers="1111", rotary="1", head="0"),
    "rotary elsewhere": spread(vision="0000", layers="0011", rotary="1", head="1"),
    "there and back": spread(vision="0101", layers="0101", head="0"),
    "three cards": spread(vision="0000", layers="1122", head="2"),
    "three cards, backwards": spread(vision="2211", embedding="1", layers="1100", rotary="2", head="2"),
}


def cards_of(device_map: DeviceMap) -> list[str]:
    """The names of the cards of *device_map*, in order."""
    return sorted(set(device_map.values()))


def requests() -> list[Request]:
    """Requests with images from small to large, so that a batch of them is padded."""
    by_size = sorted(sample(JOB)[1], key=lambda request: request.visual_patches)
    return by_size[:: len(by_size) // (NUM_REQUESTS - 1)]


def load(device_map: DeviceMap, dtype: str = "float32", **options: Any) -> Any:
    """The tiny model, its modules where *device_map* says."""
    return load_model(ROOT / "data" / "tiny-glm4v", dtype, device_map, **options)


def enter_through(model: Any, card: str) -> None:
    """Let *card* be where the hooks of *model* first send a request.

    By itself accelerate takes the first of a set of names, which changes with Python's hash seed.
    """
    model._hf_hook.execution_device = card


def run(model: Any, *overrides: str) -> list[object]:
    """What the generate engine yields for all `requests` on *model*, memory being endless."""
    meter = EndlessMeter(weight_bytes())
    engine = GenerateEngine(
        model,
        vocabulary(JOB, NEW_TOKENS, *overrides),
        job_of(JOB, NEW_TOKENS, *overrides).generation,
        MemoryModel(meter.held_bytes(), [prior_coefficients(model.config.to_dict(), 4)]),
        meter,
        memory_fraction=1.0,
    )
    return list(engine.run(requests()))


def run_packed(model: Any, *overrides: str) -> list[object]:
    """What the packed engine yields for the same requests; it takes *model* for itself."""
    engine = packed_engine(JOB, NEW_TOKENS, *overrides, limits=_PACKED, model=model)
    return list(engine.run([replace(each, max_new_tokens=MOST_NEW_TOKENS) for each in requests()]))


def differences(found: Iterable[object], expected: Iterable[object]) -> list[str]:
    """The records whose texts are not the same in both runs, with both texts."""
    ours, theirs = texts(found), texts(expected)
    assert ours.keys() == theirs.keys()
    return [f"{row}: {ours[row]!r}, not {theirs[row]!r}" for row in sorted(ours) if ours[row] != theirs[row]]
