"""Both sides of a separable critic of two samples: T[i, j] = <f(x_i), g(z_j)> + a(x_i) + b(z_j)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wcmi_fast.models.encoders import conv_layers

# The learned map of a vector starts small beside its linear part, which is all that normal
# vectors need.
SMALL = 0.3


class VectorTower(nn.Module):
    """Vectors (N, D) to features (N, units) and an offset (N, 1).

    A network of two hidden layers plus a linear map, and for the offset a sum of squares too: with
    them the critic of jointly normal vectors is exact, log p(x, z) - log p(x) p(z).

    Args:
        inputs: size D.
        units: number of features.
        width: of the hidden layers.
    """

    def __init__(self, inputs: int, units: int, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, units + 1),
        )
        self.linear = nn.Linear(inputs, units + 1, bias=False)
        self.squares = nn.Linear(inputs, inputs, bias=False)
        self.signs = nn.Parameter(torch.zeros(inputs))
        with torch.no_grad():
            self.network[-1].weight.mul_(SMALL)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, D) to (N, units + 1), the last column being the offset."""
        found: Tensor = self.network(x) + self.linear(x)
        offset = found[:, -1:] + (self.squares(x).square() @ self.signs)[:, None]
        return torch.cat([found[:, :-1], offset], 1)


class ImageTower(nn.Module):
    """Images (N, C, H, W) to features (N, units) and an offset (N, 1).

    Two 4x4 convolutions of stride 2, as the critic of the paper has, then a hidden layer.

    Args:
        shape: (C, H, W), H and W at least 4.
        units: number of features.
        width: of the hidden layer.
    """

    def __init__(self, shape: tuple[int, int, int], units: int, width: int) -> None:
        super().__init__()
        channels, height, row = shape
        self.network = nn.Sequential(
            conv_layers(channels, (32, 64)),
            nn.Flatten(),
            nn.Linear(64 * (height >> 2) * (row >> 2), width),
            nn.SiLU(),
            nn.Linear(width, units + 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, H, W) to (N, units + 1), the last column being the offset."""
        found: Tensor = self.network(x)
        return found


def new_tower(shape: tuple[int, ...], units: int, width: int) -> nn.Module:
    """Return the tower for inputs of a shape: images (1 or 3, H, W) of 4 x 4 or more; vectors."""
    if len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 4:
        return ImageTower((shape[0], shape[1], shape[2]), units, width)
    return nn.Sequential(nn.Flatten(), VectorTower(torch.Size(shape).numel(), units, width))


def features(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of T as the bounds take them, the offsets among the features.

    Args:
        x: (N, units + 1), what the tower of x returned.
        z: the same of z.

    Returns:
        z's side (N, units + 2) and x's (N, 1, units + 2): a product of rows is T.
    """
    one = torch.ones_like(x[:, :1])
    return torch.cat([z, one], 1), torch.cat([x[:, :-1], one, x[:, -1:]], 1)[:, None]
