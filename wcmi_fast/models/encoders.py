"""Encoders g: images to representations, and what they share with the critics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BaselineH(nn.Module):
    """The paper's Baseline-H encoder (spec section 5; Hjelm et al. 2018).

    Three 4x4 convolutions of stride 2 and padding 1, without bias, of 64, 128 and 256 channels,
    each halving the image; then fully connected layers of 1024 and ``dim`` units. Batch norm and
    ReLU follow every layer but the last. Features are flattened in the order (C, H, W).

    Args:
        input_shape: (C, H, W) of one image, H and W at least 8; (1, 28, 28) and (3, 32, 32) are
            the paper's.
        dim: size D of the representation.

    Raises:
        TypeError, ValueError: sizes that are not positive integers; images too small.
    """

    def __init__(self, input_shape: tuple[int, int, int], *, dim: int = 64) -> None:
        super().__init__()
        channels, height, width = check_input_shape("BaselineH", input_shape, halvings=3)
        self.input_shape = (channels, height, width)
        self.dim = check_size("BaselineH", "dim", dim)
        self.convolutions = conv_layers(channels, (64, 128, 256))
        self.hidden = nn.Sequential(
            nn.Linear(256 * (height >> 3) * (width >> 3), 1024), nn.BatchNorm1d(1024), nn.ReLU()
        )
        self.output = nn.Linear(1024, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W), floating point, in any memory format, to g(x) (N, D).

        Raises:
            ValueError: x is not (N, *input_shape).
        """
        check_images("BaselineH", x, self.input_shape)
        representation: Tensor = self.output(self.hidden(self.convolutions(x).flatten(1)))
        return representation


def conv_layers(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Build 4x4 convolutions of stride 2, each halving the image, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [
            nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers)


def check_size(owner: str, name: str, value: int) -> int:
    """Return value if it is a positive integer; else raise, naming the owner and the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} is {value!r}, wanted a positive integer")
    if value < 1:
        raise ValueError(f"{owner}: {name} is {value}, wanted a positive integer")
    return value


def check_input_shape(
    owner: str, input_shape: Sequence[int], *, halvings: int
) -> tuple[int, int, int]:
    """Return (C, H, W) if the image survives being halved that often; else raise."""
    if len(input_shape) != 3:
        raise ValueError(f"{owner}: input_shape is {tuple(input_shape)}, wanted (C, H, W)")
    channels, height, width = (check_size(owner, "input_shape", size) for size in input_shape)
    smallest = 1 << halvings
    if min(height, width) < smallest:
        raise ValueError(
            f"{owner}: input_shape is {tuple(input_shape)}, wanted H and W of at least {smallest}, "
            f"because {halvings} convolutions halve the image"
        )
    return channels, height, width


def check_images(owner: str, x: Tensor, input_shape: tuple[int, int, int]) -> None:
    """Raise unless x is (N, *input_shape)."""
    if x.shape[1:] != input_shape:
        wanted = ", ".join(map(str, input_shape))
        raise ValueError(f"{owner}: x has shape {tuple(x.shape)}, wanted (N, {wanted})")


def check_rows(owner: str, name: str, rows: Tensor, columns: int) -> None:
    """Raise unless rows is a matrix with that many columns."""
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"{owner}: {name} has shape {tuple(rows.shape)}, wanted (N, {columns})")
