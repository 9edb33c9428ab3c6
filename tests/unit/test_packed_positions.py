"""Positions as a product of matrices are those that transformers samples."""

import pytest
import torch
from transformers import Glm4vVisionConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionEmbeddings
from transformers.vision_utils import get_vision_position_ids

from glm4v_batch.engines.packed_positions import Positions, cubic_weights

GRIDS = ((1, 54, 74), (1, 2, 2), (1, 8, 100), (1, 12, 12), (1, 120, 30))


def test_positions_are_those_of_transformers_whatever_the_images_sizes() -> None:
    torch.manual_seed(0)
    config = Glm4vVisionConfig(hidden_size=48, num_heads=4, image_size=168, patch_size=14)
    theirs = Glm4vVisionEmbeddings(config)
    ours = Positions(theirs.position_embedding)
    places = get_vision_position_ids(torch.tensor(GRIDS), 2)
    hidden = torch.randn(len(places), 48)
    # As where a call is filled up: images without patches behind the others.
    grids = torch.tensor([*GRIDS, (1, 2, 2), (1, 2, 2)])
    sizes = torch.tensor([*(high * wide for _, high, wide in GRIDS), 0, 0])
    given = (hidden, sizes, grids, places[:, 0], places[:, 1])
    torch.testing.assert_close(ours(*given), theirs(*given), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("place", "size"), [(0, 1), (0, 40), (39, 40), (3, 7)])
def test_weights_of_a_place_sum_to_one_also_at_the_border(place: int, size: int) -> None:
    weights = cubic_weights(torch.tensor([place]), torch.tensor([size]), 24)
    assert weights.shape == (1, 24)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_a_place_of_the_trained_size_is_itself() -> None:
    weights = cubic_weights(torch.arange(6), torch.full((6,), 6), 6)
    torch.testing.assert_close(weights, torch.eye(6), rtol=0, atol=1e-6)
