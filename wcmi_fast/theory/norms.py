"""Balls of l_p norms: what an attack of radius eps can do to w'x."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_radius(owner: str, eps: object) -> float:
    """Return an attack's eps, 0 or more, possibly infinite."""
    return _at_least(owner, "eps", eps, 0.0, "a number, 0 or more")


def dual_exponent(owner: str, p: object) -> float:
    """Return q with 1/p + 1/q = 1."""
    exponent = _at_least(owner, "p", p, 1.0, "a number, 1 to infinity")
    if exponent == 1:
        return math.inf
    return 1.0 if exponent == math.inf else exponent / (exponent - 1)


def dual_norm(owner: str, w: NDArray[np.float64], p: float) -> float:
    """Return |w|_q, how far w'x moves when x moves by 1 in the l_p norm."""
    return float(np.linalg.norm(w, ord=dual_exponent(owner, p)))


def steepest(owner: str, w: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    """Return the v with |v|_p = 1 and w'v = |w|_q; the largest |w_i| is 1."""
    q = dual_exponent(owner, p)
    if q == math.inf:
        v = np.zeros_like(w)
        largest = int(np.abs(w).argmax())
        v[largest] = np.sign(w[largest])
        return v
    powers = np.abs(w) ** (q - 1)
    scaled: NDArray[np.float64] = np.sign(w) * powers / np.linalg.norm(w, ord=q) ** (q - 1)
    return scaled


def direction_of(owner: str, w: Any) -> NDArray[np.float64]:
    """Return w (D,), finite and not 0, scaled so that its largest element is 1 or -1."""
    direction = vector(owner, "w", w)
    largest = float(np.abs(direction).max())
    if largest == 0:
        raise ValueError(f"{owner}: w is 0, wanted a direction")
    scaled: NDArray[np.float64] = direction / largest
    return scaled


def vector(owner: str, name: str, value: Any) -> NDArray[np.float64]:
    """Return a copy of finite values (D,)."""
    found = np.array(value, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{owner}: {name} has shape {found.shape}, wanted (D,)")
    if not np.isfinite(found).all():
        raise ValueError(f"{owner}: {name} has NaN or infinite values, wanted finite")
    return found


def _at_least(owner: str, name: str, value: object, lowest: float, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} is {value!r}, wanted {wanted}")
    number = float(value)
    if not number >= lowest:
        raise ValueError(f"{owner}: {name} is {value}, wanted {wanted}")
    return number
