"""The entropy of a coin, H2(p) = -p log p - (1 - p) log(1 - p), in nats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wcmi_fast.theory.elementwise import Same, elementwise, probabilities


def binary_entropy(p: Same) -> Same:
    """Return the entropy H2(p) of a coin that falls on one side with probability p, in nats.

    Accurate to a few units in the last place on all of [0, 1]; H2(0) = H2(1) = 0. The gradient of
    a tensor is `binary_entropy_derivative`, infinite at 0 and 1.

    Args:
        p: probability: a number, an array or a tensor of any shape, floating point.

    Returns:
        What p is, of its shape and dtype (integers give float64), in [0, log 2].

    Raises:
        TypeError: p is no number, array or tensor of real numbers.
        ValueError: p is NaN or outside [0, 1].

    Equivalent torch program::

        torch.special.entr(p) + torch.special.entr(1 - p)
    """
    values = probabilities("binary_entropy", "p", p)
    found: Same = elementwise(_Entropy.apply, values, like=(p,))
    return found


def binary_entropy_derivative(p: Same) -> Same:
    """Return H2'(p) = log((1 - p) / p), in nats; infinite at 0 and minus infinite at 1.

    Accurate to a few units in the last place on all of [0, 1], also next to its zero at 1/2, where
    the quotient is rounded to 1 before the logarithm sees it.

    Args:
        p: as for `binary_entropy`.

    Returns:
        What p is, of its shape and dtype (integers give float64).

    Raises:
        TypeError, ValueError: as `binary_entropy`.

    Equivalent torch program::

        -torch.logit(p)
    """
    values = probabilities("binary_entropy_derivative", "p", p)
    found: Same = elementwise(_derivative, values, like=(p,))
    return found


def entropy_deficit(imbalance: float) -> float:
    """Return log 2 - H2(1/2 - imbalance / 2), the integral of H2' from there to 1/2, in nats.

    Accurate to a few units in the last place, also where the difference would round to 0; an
    imbalance t is nearly t^2 / 2.

    Args:
        imbalance: difference t of a coin's two probabilities, in [0, 1].
    """
    t = imbalance
    if t < 0.5:
        return t * math.atanh(t) + 0.5 * math.log1p(-t * t)
    rest = (1 - t) * math.log1p(-t) if t < 1 else 0.0
    return 0.5 * ((1 + t) * math.log1p(t) + rest)


class _Entropy(torch.autograd.Function):
    """H2, whose gradient at 0 and 1 is infinite and not NaN."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        other: Tensor = torch.special.xlog1py(1 - p, -p)
        return -torch.xlogy(p, p) - other

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        p: Tensor = ctx.saved_tensors[0]
        return grads[0] * _derivative(p)


def _derivative(p: Tensor) -> Tensor:
    # 1 - 2p is exact where p is near 1/2. Elsewhere that branch gets a harmless value, because the
    # gradient of torch.where multiplies the infinite one at 0 and 1 by 0.
    middle = (p - 0.5).abs() < 0.25
    near = 2 * torch.atanh(1 - 2 * torch.where(middle, p, 0.5))
    return torch.where(middle, near, torch.log1p(-p) - p.log())
