"""Both sides of a separable critic of two samples: T[i, j] = <f(x_i), g(z_j)> + a(x_i) + b(z_j)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wcmi_fast.models.encoders import conv_layers

# The linear parts start small, which favours scores of low rank where there are many coordinates,
# and learn faster than the networks, which would otherwise learn by heart what is linear.
LINEAR_START = 0.3
LINEAR_RATE = 3.0


class VectorTower(nn.Module):
    """Vectors (N, D) to features (N, units) and an offset (N, 1).

    A network of two hidden layers plus a linear map, and for the offset a sum of squares too: with
    them the critic of jointly normal vectors is exact, log p(x, z) - log p(x) p(z). Both see the
    log of the vector's length, which is all that some heavy-tailed vectors tell; the network also
    sees the squares. It begins at 0.

    Args:
        inputs: size D.
        units: number of features.
        width: of the hidden layers.
    """

    def __init__(self, inputs: int, units: int, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(2 * inputs + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, units + 1),
        )
        self.linear = nn.Linear(inputs + 1, units)
        self.squares = nn.Linear(inputs, min(inputs, width), bias=False)
        self.signs = nn.Parameter(torch.zeros(min(inputs, width)))
        with torch.no_grad():
            nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
            self.linear.weight.mul_(LINEAR_START)
            self.squares.weight.mul_(LINEAR_START)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, D) to (N, units + 1), the last column being the offset."""
        squares = x.square()
        # Of standard normal coordinates both have mean 0 and a variance of about 1.
        length = 2 * squares.mean(1, keepdim=True).log1p() - 1.2
        found: Tensor = self.network(torch.cat([x, length, (squares - 1) / 2**0.5], 1))
        offset = (self.squares(x).square() @ self.signs)[:, None]
        return found + torch.cat([self.linear(torch.cat([x, length], 1)), offset], 1)

    def linear_weights(self) -> list[nn.Parameter]:
        """Return the weights of the linear and the quadratic part."""
        return [*self.linear.parameters(), *self.squares.parameters(), self.signs]


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


def is_image(shape: tuple[int, ...]) -> bool:
    """Tell whether rows of a shape are images: (1 or 3, H, W) of 4 x 4 or more."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 4


def new_tower(shape: tuple[int, ...], units: int, width: int) -> nn.Module:
    """Return the tower for images, see `is_image`, or for vectors (D,)."""
    if is_image(shape):
        return ImageTower((shape[0], shape[1], shape[2]), units, width)
    return VectorTower(torch.Size(shape).numel(), units, width)


def groups(towers: nn.ModuleList, learning_rate: float) -> list[dict[str, object]]:
    """Return an optimiser's groups of weights: the linear parts have a higher learning rate."""
    linear = [p for tower in towers for p in _linear(tower)]
    known = set(map(id, linear))
    others = [p for p in towers.parameters() if id(p) not in known]
    return [
        {"params": params, "lr": rate, "first_rate": rate}
        for params, rate in ((others, learning_rate), (linear, LINEAR_RATE * learning_rate))
    ]


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


def _linear(tower: nn.Module) -> Iterator[nn.Parameter]:
    yield from tower.linear_weights() if isinstance(tower, VectorTower) else ()
