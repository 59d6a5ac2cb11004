"""The exact attack on g(x) = sgn(w'x): the worst case of theorem 3.2 (docs/theory.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from wcmi_fast.theory.norms import check_radius, direction_of, steepest

Side = Literal[-1, 1]


def worst_case_transport(
    x: Tensor, w: ArrayLike, *, eps: float, p: float = math.inf, side: Side | None = None
) -> Tensor:
    """Return x moved so that sgn(w'x) tells least: the least I(X'; sgn(w'X')) within eps.

    g(X') is a function of X', so that I(X'; g(X')) is the entropy of a coin, least where the coin
    is most unbalanced. All points within reach of the boundary on one side cross it, by eps along
    the direction that changes w'x most; all others stay. A point on the boundary crosses too.

    Args:
        x: points (N, D), floating point.
        w: (D,), not 0; only its direction matters.
        eps: radius of the ball, finite, 0 or more.
        p: norm of the ball, 1 to infinity.
        side: the side that gains the points; None takes the one that leaves less entropy for x. Of
            the batches of one sample all should cross alike.

    Returns:
        A new tensor (N, D) of the dtype and device of x, each row within eps of x's up to rounding.

    Raises:
        TypeError: x is not floating point; eps or p is no number.
        ValueError: shapes that do not fit; w is 0 or not finite; eps, p or side is not as wanted.

    Equivalent torch program, for p infinite and side 1::

        moved = x + eps * w.sign()
        torch.where((x @ w <= 0)[:, None] & (moved @ w > 0)[:, None], moved, x)

    Source: Zhu et al. 2020, proof of theorem 3.2; docs/theory.md.
    """
    owner = "worst_case_transport"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{owner}: x is {_kind(x)}, wanted a tensor of floating point")
    direction = direction_of(owner, w)
    if x.ndim != 2 or x.shape[1] != len(direction):
        raise ValueError(
            f"{owner}: x has shape {tuple(x.shape)}, wanted (N, {len(direction)}), rows as w"
        )
    if check_radius(owner, eps) == math.inf:
        raise ValueError(f"{owner}: eps is inf, wanted a finite number, 0 or more")
    if side not in (None, -1, 1):
        raise ValueError(f"{owner}: side is {side!r}, wanted -1, 1 or None")
    normal = torch.from_numpy(direction).to(x.device)
    step = eps * torch.from_numpy(steepest(owner, direction, p)).to(x.device)
    if side is not None:
        return _crossed(x, normal, step, side)
    both = [_crossed(x, normal, step, end) for end in (1, -1)]
    up, down = (float(((moved.double() @ normal) > 0).double().mean()) for moved in both)
    return both[0] if abs(up - 0.5) >= abs(down - 0.5) else both[1]


@dataclass(frozen=True, kw_only=True)
class WorstCaseTransport:
    """`worst_case_transport` as the ``attack=`` of a measurement; it needs no gradient.

    Args:
        w, eps, p, side: as there. With side None each batch crosses to its own better side; a side
            makes all batches samples of one distribution.
    """

    w: ArrayLike
    eps: float
    p: float = math.inf
    side: Side | None = None

    def attack(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return `worst_case_transport` of x (N, D); loss_fn and generator are not used."""
        return worst_case_transport(x, self.w, eps=self.eps, p=self.p, side=self.side)


def _crossed(x: Tensor, normal: Tensor, step: Tensor, side: Side) -> Tensor:
    """Move the rows to a side that a step can bring there and that are not there yet."""
    moved = (x.double() + side * step).to(x.dtype)
    before, after = (side * (rows.double() @ normal) for rows in (x, moved))
    crosses = (before <= 0) & (after > 0)
    return torch.where(crosses[:, None], moved, x)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
