"""Inputs and weights for tests of networks, and how their results are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> nn.Module:
    """Give every weight and buffer a value that a mix-up would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    return module


def assert_twice_as_good(ours: Tensor, torch_same: Tensor, exact: Tensor) -> None:
    """|ours - f64| <= 2 |torch in the same dtype - f64| + tiny."""
    assert ours.shape == exact.shape
    allowed = 2 * (torch_same.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


def assert_twice_as_good_together(
    draws: list[tuple[list[Tensor], list[Tensor], list[Tensor]]], names: list[str]
) -> None:
    """Apply the 2x rule to each result's root mean square error over several draws.

    A layer norm or a batch norm can make one draw's gradients ill-conditioned; which of two equally
    good programs is then nearer to the truth by a factor of 2 is luck, but not in every draw.
    """
    for k, name in enumerate(names):
        ours, same = (
            torch.stack([_relative(draw[i][k], draw[2][k]) for draw in draws])
            .square()
            .mean()
            .sqrt()
            for i in (0, 1)
        )
        assert ours <= 2 * same + 1e-6, f"{name}: {ours:.2e} for torch's {same:.2e}"


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    error = (found.double().reshape(exact.shape) - exact).norm()
    return error / exact.norm() if exact.any() else error


def _root_mean_square(errors: list[Tensor]) -> Tensor:
    return torch.stack(errors).square().mean().sqrt()


class ByLocation(nn.Sequential):
    """A network's feature maps (N, U, H, W) as (N, P, U)."""

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = super().forward(x)
        return maps.flatten(2).transpose(1, 2)
