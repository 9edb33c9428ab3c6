"""Which module lies where, by name, as accelerate writes it: a name stands for all below it, "" for all."""

from collections.abc import Iterable, Mapping, Sequence

from glm4v_batch.errors import JobError
from glm4v_batch.mistakes import suggest
from glm4v_batch.needs import EMBEDDING, HEAD, ModelNeeds
from glm4v_batch.types import Device, Spot

_MAX_NAMES = 3
# Its parent reads its position table, when accelerate has not fetched it yet.
_VISION_EMBEDDINGS = "model.visual.embeddings"


def is_within(name: str, key: str) -> bool:
    """Whether *key* of a device map stands for the module *name*.

    >>> is_within("model.visual.blocks.10", "model.visual.blocks.1")
    False
    """
    return key in ("", name) or name.startswith(f"{key}.")


def spots_of(device_map: Mapping[str, Spot], needs: ModelNeeds) -> dict[str, Spot]:
    """Where each module of *needs* lies, from a map that covers each of them once."""
    return {
        module.name: next(spot for key, spot in device_map.items() if is_within(module.name, key))
        for module in needs.modules
    }


def compact_map(spots: Mapping[str, Spot]) -> dict[str, Spot]:
    """*spots*, with one name for all modules below it wherever they lie together.

    Keys do not overlap: transformers takes "blocks.1" for a beginning of "blocks.10" as well, which
    does no harm where each of the numbered modules is named itself.

    >>> compact_map({"model.visual": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1})
    {'model.visual': 0, 'model.layers.0': 0, 'model.layers.1': 1, 'lm_head': 1}
    """
    return dict(_compacted("", spots))


def _compacted(prefix: str, spots: Mapping[str, Spot]) -> Iterable[tuple[str, Spot]]:
    places = set(spots.values())
    if len(places) == 1:
        yield prefix, places.pop()
        return
    start = len(prefix) + 1 if prefix else 0
    children: dict[str, dict[str, Spot]] = {}
    for name, spot in spots.items():
        stop = name.find(".", start)
        children.setdefault(name if stop < 0 else name[:stop], {})[name] = spot
    for child, inner in children.items():
        yield from _compacted(child, inner)


def check_map(device_map: Mapping[str, Spot], needs: ModelNeeds, devices: Sequence[Device]) -> None:
    """Refuse a job's map that does not give each module one place among the chosen *devices*.

    Numbers in it are those of `devices.use`. Raises one JobError that names every mistake.
    """
    mistakes = [
        *_wrong_names(device_map, needs),
        *_wrong_spots(device_map, devices),
        *_wrong_cover(device_map, needs),
    ]
    if mistakes:
        raise JobError.of_mistakes("devices.layout", mistakes)


def _wrong_names(device_map: Mapping[str, Spot], needs: ModelNeeds) -> Iterable[str]:
    names = [module.name for module in needs.modules]
    for key in device_map:
        whole = next((name for name in names if key != name and is_within(key, name)), None)
        if whole is not None:
            yield f"names {key}, a part of {whole}, which must lie in one place. Name that instead"
        elif not any(is_within(name, key) for name in names):
            known = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, 5)}
            yield f"names {key}, which the model does not have{suggest(key, sorted(known))}"


def _wrong_spots(device_map: Mapping[str, Spot], devices: Sequence[Device]) -> Iterable[str]:
    chosen = [device.index for device in devices]
    for key, spot in device_map.items():
        if isinstance(spot, int) and spot not in chosen:
            what = key or "everything"
            yield f"puts {what} on GPU {spot}, which is not among those chosen ({_listed(chosen)})"
        elif isinstance(spot, str) and is_within(_VISION_EMBEDDINGS, key):
            yield f"offloads {_VISION_EMBEDDINGS}, whose weights transformers reads from outside of it"
    if not any(isinstance(spot, int) for spot in device_map.values()):
        yield "names no GPU, and what lies in host memory or on the disk needs one to pass through"


def _wrong_cover(device_map: Mapping[str, Spot], needs: ModelNeeds) -> Iterable[str]:
    covering = {m.name: [key for key in device_map if is_within(m.name, key)] for m in needs.modules}
    missing = [name for name, keys in covering.items() if not keys]
    if missing:
        yield f"gives no place to {_listed(missing)}"
    for keys in dict.fromkeys(tuple(keys) for keys in covering.values() if len(keys) > 1):
        yield f"names the same modules twice, by {' and by '.join(key or 'an empty name' for key in keys)}"
    yield from _parted_ties(covering, device_map, needs)


def _parted_ties(
    covering: Mapping[str, Sequence[str]], device_map: Mapping[str, Spot], needs: ModelNeeds
) -> Iterable[str]:
    tied = (HEAD, EMBEDDING)
    spots = {device_map[key] for name in tied for key in covering.get(name, ())}
    if needs.is_head_tied and len(spots) > 1:
        yield f"parts {tied[0]} from {tied[1]}, whose weights it shares"


def _listed(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_MAX_NAMES])
    return shown if len(values) <= _MAX_NAMES else f"{shown} and {len(values) - _MAX_NAMES} more"
