"""After loading, every tensor is where the device map says."""

import pytest
from torch import nn

from glm4v_batch.model import check_placed, spot_of


def model_of(*, tower: str, head: str) -> nn.Module:
    """Two modules, the first with a buffer, on these devices."""
    model = nn.ModuleDict({"tower": nn.BatchNorm1d(2, device=tower), "head": nn.Linear(2, 2, device=head)})
    return model.requires_grad_(False)


def test_a_tensor_belongs_where_the_longest_name_says() -> None:
    spots = {"": "cuda:0", "model.visual": "cuda:1", "model.visual.merger": "cpu"}

    assert spot_of("lm_head.weight", spots) == "cuda:0"
    assert spot_of("model.visual.blocks.0.weight", spots) == "cuda:1"
    assert spot_of("model.visual.merger.weight", spots) == "cpu"
    assert spot_of("model.visual2.weight", spots) == "cuda:0"


def test_what_lies_where_the_map_says_passes() -> None:
    check_placed(model_of(tower="cpu", head="cpu"), {"": "cpu"})
    # What is offloaded stands as meta tensors between its uses.
    check_placed(model_of(tower="meta", head="meta"), {"tower": "cpu", "head": "disk"})


@pytest.mark.parametrize(
    ("tower", "head", "device_map", "words"),
    [
        ("cpu", "meta", {"": "cpu"}, "head.weight is on meta, not on cpu"),
        ("meta", "cpu", {"": "cpu"}, "tower.weight is on meta, not on cpu"),
        ("cpu", "cpu", {"": "cuda:0"}, "tower.weight is on cpu, not on cuda:0"),
        ("cpu", "cpu", {"tower": "cuda:0", "head": "cpu"}, "tower.weight is on cpu, not on cuda:0"),
        ("cpu", "cpu", {"tower": "cpu", "head": "disk"}, "is on cpu, not offloaded to"),
    ],
)
def test_what_lies_elsewhere_or_was_left_on_meta_is_a_bug(
    tower: str, head: str, device_map: dict[str, str], words: str
) -> None:
    with pytest.raises(AssertionError, match=words):
        check_placed(model_of(tower=tower, head=head), device_map)
