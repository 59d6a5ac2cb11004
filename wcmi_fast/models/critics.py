"""Both sides of the critic T[i, j, p] = <z[i], h[j, p]> (spec sections 1 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wcmi_fast.models.encoders import (
    check_images,
    check_input_shape,
    check_rows,
    check_size,
    conv_layers,
)


class OneByOneBlock(nn.Module):
    """The critic's residual 1x1 block, on rows (spec section 5; Hjelm et al. 2018).

    ``LayerNorm(W2 relu(batch_norm(W1 v)) + b + S v)`` for each row v. A 1x1 convolution is a
    matrix product on the rows of all images and locations, and its batch norm the one over rows,
    so this is exact. The shortcut S starts near the identity: uniform in (-0.01, 0.01) with ones on
    the diagonal.

    Args:
        inputs: size C of a row.
        units: size U of a result.

    Raises:
        TypeError, ValueError: sizes that are not positive integers.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.inputs = check_size("OneByOneBlock", "inputs", inputs)
        self.units = check_size("OneByOneBlock", "units", units)
        self.nonlinear = nn.Sequential(
            nn.Linear(inputs, units, bias=False),
            nn.BatchNorm1d(units),
            nn.ReLU(),
            nn.Linear(units, units),
        )
        self.shortcut = nn.Linear(inputs, units, bias=False)
        self.norm = nn.LayerNorm(units)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01).fill_diagonal_(1.0)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (R, C), floating point, to critic features (R, U).

        Raises:
            ValueError: rows is not (R, C).
        """
        check_rows("OneByOneBlock", "rows", rows, self.inputs)
        features: Tensor = self.norm(self.nonlinear(rows) + self.shortcut(rows))
        return features


class LocalCritic(nn.Module):
    """The critic's side of the images: one feature vector per location (spec section 5).

    Two 4x4 convolutions of stride 2 and padding 1, without bias, of 64 and 128 channels, then the
    1x1 block on every location. Batch norm and ReLU follow every convolution, the last one too, as
    in the authors' code. (The supplement's table lists a third convolution, of 256 channels, which
    their code leaves out.)

    Args:
        input_shape: (C, H, W) of one image, H and W at least 4 (8 for three convolutions).
        units: size U of the features; 2048 in the paper.
        convolutions: 2 as in the authors' code, or 3 as in the supplement.

    Attributes:
        locations: P, the number of locations: 49 for 28x28 images and 64 for 32x32 ones with two
            convolutions.

    Raises:
        TypeError, ValueError: sizes that are not positive integers; images too small; a number of
            convolutions other than 2 and 3.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], *, units: int = 2048, convolutions: int = 2
    ) -> None:
        super().__init__()
        if convolutions not in (2, 3):
            raise ValueError(f"LocalCritic: convolutions is {convolutions!r}, wanted 2 or 3")
        channels, height, width = check_input_shape(
            "LocalCritic", input_shape, halvings=convolutions
        )
        widths = (64, 128, 256)[:convolutions]
        self.input_shape = (channels, height, width)
        self.units = check_size("LocalCritic", "units", units)
        self.locations = (height >> convolutions) * (width >> convolutions)
        self.convolutions = conv_layers(channels, widths)
        self.block = OneByOneBlock(widths[-1], units)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W), floating point, in any memory format, to h (N, P, U).

        Locations are in row-major order: p = row * columns + column.

        Raises:
            ValueError: x is not (N, *input_shape).
        """
        check_images("LocalCritic", x, self.input_shape)
        rows = self.convolutions(x).permute(0, 2, 3, 1).flatten(0, 2)
        h: Tensor = self.block(rows).unflatten(0, (len(x), self.locations))
        return h


class VectorCritic(nn.Module):
    """The critic's side of inputs that are vectors: one location, P = 1.

    A fully connected layer of 128 units with batch norm and ReLU, then the 1x1 block.

    Args:
        inputs: size D of an input.
        units: size U of the features.

    Raises:
        TypeError, ValueError: sizes that are not positive integers.
    """

    def __init__(self, inputs: int, *, units: int = 64) -> None:
        super().__init__()
        self.inputs = check_size("VectorCritic", "inputs", inputs)
        self.units = check_size("VectorCritic", "units", units)
        self.hidden = nn.Sequential(nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.block = OneByOneBlock(128, units)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (N, D), floating point, to h (N, 1, U).

        Raises:
            ValueError: x is not (N, D).
        """
        check_rows("VectorCritic", "x", x, self.inputs)
        h: Tensor = self.block(self.hidden(x))
        return h[:, None]


class GlobalCritic(nn.Module):
    """The critic's side of the representation: the 1x1 block on g(x) (spec section 5).

    Args:
        dim: size D of the representation.
        units: size U of the features; 2048 in the paper.

    Raises:
        TypeError, ValueError: sizes that are not positive integers.
    """

    def __init__(self, dim: int, *, units: int = 2048) -> None:
        super().__init__()
        self.dim = check_size("GlobalCritic", "dim", dim)
        self.units = check_size("GlobalCritic", "units", units)
        self.block = OneByOneBlock(dim, units)

    def forward(self, g: Tensor) -> Tensor:
        """Map representations g(x) (N, D), floating point, to z (N, U).

        Raises:
            ValueError: g is not (N, D).
        """
        check_rows("GlobalCritic", "g", g, self.dim)
        z: Tensor = self.block(g)
        return z
