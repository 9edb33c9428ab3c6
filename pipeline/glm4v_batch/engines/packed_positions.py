"""The vision tower's embedding of positions, stretched to each image's size, as a product of matrices.

Transformers calls `grid_sample`, which took 3 ms of a GPU for each call of the tower, whatever its size.
"""

# P patches, S images, G rows of the square grid that was trained, D hidden size

import math

import torch
from torch import Tensor

_SHARPNESS = -0.75


class Positions(torch.nn.Module):
    """Stands where transformers has `Glm4vVisionEmbeddings`, with the weights [G², D] of its *embedding*."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.position_embedding = embedding

    def forward(self, hidden: Tensor, sizes: Tensor, grids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """*hidden* [P, D] of images with *sizes* [S] and *grids* [S, 3], each patch's position added.

        *rows* and *columns* [P] are where each patch lies in its image.
        """
        trained = self.position_embedding.weight
        num_rows = math.isqrt(len(trained))
        patch = torch.arange(len(hidden), device=hidden.device)
        image = (patch >= sizes.cumsum(0)[:, None]).sum(0)
        height, width = grids[image, 1], grids[image, 2]
        vertical, horizontal = cubic_weights(rows, height, num_rows), cubic_weights(columns, width, num_rows)
        weights = (vertical[:, :, None] * horizontal[:, None, :]).flatten(1).to(trained.device)
        return hidden + (weights @ trained.float()).to(hidden.device, hidden.dtype)


def cubic_weights(places: Tensor, sizes: Tensor, num_points: int) -> Tensor:
    """How much each of *num_points* G counts at the middle of each place [P] of as many as *sizes* says [P].

    Float32 [P, G]. As `grid_sample` has it: bicubic (Keys 1981, "Cubic convolution interpolation for digital
    image processing", with a = -0.75), pixels as areas, the border repeated.
    """
    at = (places + 0.5) / sizes * num_points - 0.5
    first = at.floor() - 1
    steps = torch.arange(4, device=places.device)
    distance = (at[:, None] - first[:, None] - steps).abs()
    point = (first[:, None] + steps).clamp(0, num_points - 1)
    is_point = point[:, :, None] == torch.arange(num_points, device=places.device)
    return (_cubic(distance)[:, :, None] * is_point).sum(1)


def _cubic(distance: Tensor) -> Tensor:
    """Keys's kernel at *distance* below 2."""
    a, x = _SHARPNESS, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)
