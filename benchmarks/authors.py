"""The authors' form: feature maps (N, U, H, W), permutations, T stored, a multiplicative mask.

Written anew from spec.md sections 2 and 5, with the weights of our modules in their order of
registration. The tests compare our networks with these too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """The 1x1 block: convolutions, and permutations around the layer norm."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, units, 1, bias=False)
        self.bn = nn.BatchNorm2d(units)
        self.b = nn.Conv2d(units, units, 1)
        self.shortcut = nn.Conv2d(inputs, units, 1, bias=False)
        self.ln = nn.LayerNorm(units)

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps (N, C, H, W) to (N, U, H, W)."""
        y: Tensor = self.b(torch.relu(self.bn(self.a(x)))) + self.shortcut(x)
        normed: Tensor = self.ln(y.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class PlainLocalCritic(nn.Module):
    """Convolutions, then the block: images (N, C, H, W) to (N, U, H', W')."""

    def __init__(self, channels: int, units: int, widths: tuple[int, ...] = (64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(before, after, 4, 2, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.block = PlainBlock(widths[-1], units)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to (N, U, H', W')."""
        y: Tensor = self.block(self.layers(x))
        return y


class PlainGlobalCritic(nn.Module):
    """The block on representations (N, D), as maps of one pixel."""

    def __init__(self, dim: int, units: int) -> None:
        super().__init__()
        self.block = PlainBlock(dim, units)

    def forward(self, g: Tensor) -> Tensor:
        """Map representations (N, D) to (N, U, 1, 1)."""
        y: Tensor = self.block(g[:, :, None, None])
        return y


class PlainDotCritic(nn.Module):
    """Both sides."""

    def __init__(self, dim: int, channels: int, units: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.global_ = PlainGlobalCritic(dim, units)
        self.local = PlainLocalCritic(channels, units, widths)

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        """Map representations and images to T (N, N, P)."""
        return scores(self.global_(g), self.local(x))


def copied(target: nn.Module, source: nn.Module) -> nn.Module:
    """Copy source's state by order of registration into a network built otherwise."""
    ours, theirs = source.state_dict(), target.state_dict()
    pairs = zip(theirs.items(), ours.values(), strict=True)
    target.load_state_dict({name: value.reshape(was.shape) for (name, was), value in pairs})
    return target


def scores(m: Tensor, l: Tensor) -> Tensor:  # noqa: E741 (their name)
    """Return T (N, N, P) from feature maps of representations and images."""
    n, units = l.shape[:2]
    m = m.reshape(n, units, -1).permute(0, 2, 1).reshape(-1, units)
    l = l.reshape(n, units, -1).permute(0, 2, 1).reshape(-1, units)  # noqa: E741
    u = torch.mm(m, l.t())
    return u.reshape(n, 1, n, -1).permute(0, 2, 3, 1)[..., 0]


def dv(T: Tensor) -> Tensor:
    """Return their bound: the mask multiplies, so that each own pair adds exp(0) to the sum."""
    n = T.shape[0]
    own = torch.eye(n, dtype=T.dtype, device=T.device)[:, :, None]
    positive = (T * own).sum((0, 1)) / n
    negative = torch.logsumexp(T * (1 - own), (0, 1)) - math.log(n * (n - 1))
    return (positive - negative).mean()
