"""Neurons of a convolutional layer as functions of the image patches that they see (section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from wcmi_fast.information.representation import Representation
from wcmi_fast.models.folding import folded

ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)


class Field(NamedTuple):
    """Which rows of a map a location of a later layer sees; columns likewise.

    Location r sees the size rows from ``stride * r - padding`` on. Those outside the map are the
    zeros of a convolution's padding.
    """

    size: int
    stride: int
    padding: int


class PatchNeurons(nn.Module):
    """The K kernels of a layer as K functions of an image patch, in eval mode.

    A layer of convolutions computes the same function at every location, but for the zeros around
    its inner maps. These are put where the model has them, so that z is what the model computes,
    at the borders too.

    Args:
        model: not changed; images must enter the layer's ``Sequential`` as they are.
        layer: name, as in ``model.named_modules()``, of a convolution inside a ``Sequential``, or
            of a batch norm or elementwise activation behind it. Before it the ``Sequential`` has
            convolutions, batch norms that directly follow them, and elementwise activations only.
        image_shape: (C, H, W).

    Attributes:
        count: K.
        field: of the location in the image: patches are of R x R pixels, R its size.
        grid: rows and columns of locations.

    Raises:
        ValueError: a layer of which these functions are not known; the message says why.
    """

    def __init__(self, model: nn.Module, layer: str, image_shape: Sequence[int]) -> None:
        super().__init__()
        before, convolutions, self.after = _stages(model, layer)
        fields, shapes = _fields(convolutions), _shapes(convolutions, image_shape)
        self.field, self.grid = fields[0], shapes[-1]
        self.count = convolutions[-1].out_channels
        self.before = nn.ModuleList(before)
        self.windows = [(each.kernel_size[0], each.stride[0]) for each in convolutions[:-1]]
        for i, convolution in enumerate(convolutions):
            self.register_buffer(f"inside_{i}", _inside(fields[i], shapes[i], self.grid))
            self.register_buffer(
                f"weight_{i}", _as_matrix(convolution, last=i == len(self.windows))
            )
            self.register_buffer(f"bias_{i}", _bias(convolution))

    @property
    def locations(self) -> int:
        """Return the number P of locations."""
        return self.grid[0] * self.grid[1]

    def patches(self, images: Tensor, where: Tensor) -> Tensor:
        """Cut a patch out of each image.

        Args:
            images: (N, C, H, W), floating point.
            where: (N,), int64: the locations, row-major numbers.

        Returns:
            (N, C, R, R), with zeros outside the image.
        """
        size, stride, padding = self.field
        padded = nn.functional.pad(images, (padding,) * 4)
        windows = padded.unfold(2, size, stride).unfold(3, size, stride)
        rows, columns = where // self.grid[1], where % self.grid[1]
        return windows[torch.arange(len(images), device=images.device), :, rows, columns]

    def inside(self, where: Tensor) -> Tensor:
        """Return 1 for the pixels of patches (N, 1, R, R) that lie in the image, else 0."""
        return self.get_buffer("inside_0")[where].movedim(-1, 1)

    def maps(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to all neurons' values at all locations (N, K, P)."""
        n, p = len(images), self.locations
        where = torch.arange(p, device=images.device).repeat(n)
        patches = self.patches(images.repeat_interleave(p, 0), where)
        z = self(patches[None], where, torch.arange(self.count, device=images.device))
        maps: Tensor = z.unflatten(1, (n, p)).transpose(0, 1)
        return maps

    def forward(self, patches: Tensor, where: Tensor, neurons: Tensor) -> Tensor:
        """Return z (M, N), the values of M neurons on patches.

        Args:
            patches: (1, N, C, R, R), floating point, seen by all the neurons; or (M, N, C, R, R),
                each neuron's own. Pixels outside the image count as 0.
            where: (N,), int64: the locations that they are at.
            neurons: (M,), int64: which of the K.
        """
        maps = patches.movedim(2, -1)  # channels last: rows for matrix products
        last = len(self.windows)
        for i, before in enumerate(self.before):
            maps = before(maps) * self.get_buffer(f"inside_{i}")[where]
            if i < last:
                weight, bias = self.get_buffer(f"weight_{i}"), self.get_buffer(f"bias_{i}")
                maps = _convolved(maps, weight, bias, *self.windows[i])
        kernels = self.get_buffer(f"weight_{last}")[neurons, :, None]
        sums = (maps.flatten(2) @ kernels)[..., 0]
        z: Tensor = self.after(sums + self.get_buffer(f"bias_{last}")[neurons, None])
        return z


def _convolved(maps: Tensor, weight: Tensor, bias: Tensor, size: int, stride: int) -> Tensor:
    """Convolve maps (G, N, H, W, C) without padding; as one product, faster for small maps."""
    windows = maps.unfold(2, size, stride).unfold(3, size, stride)
    rows = windows.reshape(-1, weight.shape[1])
    return nn.functional.linear(rows, weight, bias).view(*windows.shape[:4], -1)


def _stages(model: nn.Module, layer: str) -> tuple[list[nn.Module], list[nn.Conv2d], nn.Module]:
    """Return convolutions up to a layer, what comes before each, and what comes after the last."""
    stages: list[list[nn.Module]] = [[]]
    convolutions: list[nn.Conv2d] = []
    for part in cast(nn.Sequential, folded(nn.Sequential(*_parts(model, layer)))):
        if isinstance(part, nn.Conv2d):
            _check_convolution(layer, part)
            convolutions.append(part)
            stages.append([])
        elif isinstance(part, ELEMENTWISE):
            stages[-1].append(part)
        else:
            names = ", ".join(kind.__name__ for kind in ELEMENTWISE)
            raise ValueError(
                f"layer {layer!r} has a {type(part).__name__} before it, wanted convolutions, "
                f"batch norms directly behind them, and elementwise activations ({names})"
            )
    if not convolutions:
        raise ValueError(f"layer {layer!r} has no convolution before it, wanted one or more")
    *before, after = (nn.Sequential(*stage) for stage in stages)
    return list(before), convolutions, after


def _parts(model: nn.Module, layer: str) -> list[nn.Module]:
    """Return the modules of a layer's `Sequential`, the layer's own the last."""
    Representation(model, layer)  # raises if there is no such layer
    parent, _, name = layer.rpartition(".")
    sequence = model.get_submodule(parent)
    if not isinstance(sequence, nn.Sequential):
        raise ValueError(
            f"layer {layer!r} is inside a {type(sequence).__name__}, wanted one in an nn.Sequential"
        )
    names = list(sequence._modules)
    return list(sequence)[: names.index(name) + 1]


def _check_convolution(layer: str, convolution: nn.Conv2d) -> None:
    height, width = convolution.kernel_size
    square = height == width and len(set(convolution.stride)) == 1
    padded = not isinstance(convolution.padding, str) and len(set(convolution.padding)) == 1
    plain = convolution.groups == 1 and set(convolution.dilation) == {1}
    if not (square and padded and plain and convolution.padding_mode == "zeros"):
        raise ValueError(
            f"layer {layer!r} has the convolution {convolution} before it, wanted square ones, "
            "padded by a number of zeros, without groups and dilation"
        )


def _fields(convolutions: Sequence[nn.Conv2d]) -> list[Field]:
    """Return what a location of the last convolution sees of each one's input."""
    field = Field(1, 1, 0)
    found = []
    for convolution in reversed(convolutions):
        stride, padding = convolution.stride[0], int(convolution.padding[0])
        size = (field.size - 1) * stride + convolution.kernel_size[0]
        field = Field(size, field.stride * stride, field.padding * stride + padding)
        found.append(field)
    return found[::-1]


def _shapes(convolutions: Sequence[nn.Conv2d], image_shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return height and width of each convolution's input, and of the last one's output."""
    shapes = [(image_shape[1], image_shape[2])]
    for convolution in convolutions:
        size, padding = convolution.kernel_size[0], int(convolution.padding[0])
        height, width = (
            (extent + 2 * padding - size) // convolution.stride[0] + 1 for extent in shapes[-1]
        )
        shapes.append((height, width))
    return shapes


def _inside(field: Field, shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return 1 where what each location sees of a map lies in it, else 0: (P, R, R, 1)."""
    rows, columns = (
        _inside_along(field, extent, count) for extent, count in zip(shape, grid, strict=True)
    )
    both = rows[:, None, :, None] * columns[None, :, None, :]
    return both.flatten(0, 1)[..., None]


def _inside_along(field: Field, extent: int, count: int) -> Tensor:
    first = torch.arange(count)[:, None] * field.stride - field.padding
    index = first + torch.arange(field.size)
    return ((index >= 0) & (index < extent)).float()


def _as_matrix(convolution: nn.Conv2d, *, last: bool) -> Tensor:
    """Return kernels as rows; the last one covers a map whose channels come last."""
    weight = convolution.weight.permute(0, 2, 3, 1) if last else convolution.weight
    return weight.flatten(1)


def _bias(convolution: nn.Conv2d) -> Tensor:
    return torch.zeros(convolution.out_channels) if convolution.bias is None else convolution.bias
