"""Finite spaces: adversarial risk and worst-case information by enumeration (lemma 3.3).

A space is the numbers 0, 1, ... with a table of distances. The infinity-Wasserstein ball of radius
eps around a distribution holds those that it can be transported to without moving any mass farther
than eps.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.special import entr, rel_entr

MAPS = 10**6


class WorstDistribution(NamedTuple):
    """A distribution of an infinity-Wasserstein ball at which a classifier errs most.

    Attributes:
        risk: its probability of error.
        joint: (X, Y), Pr[X' = x, Y = y].
    """

    risk: float
    joint: NDArray[np.float64]


def mutual_information(joint: ArrayLike) -> float:
    """Return I(A; B) of a table (A, B) of probabilities, in nats.

    Raises:
        ValueError: joint is no table of probabilities that sum to 1.

    Equivalent torch program::

        torch.xlogy(joint, joint / (joint.sum(1, keepdim=True) * joint.sum(0))).nansum()
    """
    table = probability_table("mutual_information", "joint", joint, 2)
    product = table.sum(1, keepdims=True) * table.sum(0)
    return float(rel_entr(table, product).sum())


def adversarial_risk(
    joint: ArrayLike, predictions: ArrayLike, distances: ArrayLike, eps: float
) -> float:
    """Return Pr[f(x') != Y for some x' within eps of X], point by point.

    Args:
        joint: (X, Y), Pr[X = x, Y = y].
        predictions: (X,), integers: the class f(x).
        distances: (X, X), 0 on the diagonal.
        eps: radius, 0 or more.

    Raises:
        ValueError: tables that do not fit each other.

    Source: Zhu et al. 2020, definition of the adversarial risk.
    """
    table = probability_table("adversarial_risk", "joint", joint, 2)
    near = _near("adversarial_risk", distances, eps, len(table))
    wrong = _wrong("adversarial_risk", predictions, table)
    attainable = np.array([wrong[row].any(0) for row in near])
    return float(table[attainable].sum())


def worst_distribution(
    joint: ArrayLike, predictions: ArrayLike, distances: ArrayLike, eps: float
) -> WorstDistribution:
    """Return the worst Pr[f(X') != Y] over the infinity-Wasserstein ball, by linear programming.

    The ball is that around the joint distribution of (X, Y), where labels cannot be moved. Lemma
    3.3 says that the result is `adversarial_risk`.

    Args, Raises: as for `adversarial_risk`.

    Source: Zhu et al. 2020, lemma 3.3.
    """
    owner = "worst_distribution"
    table = probability_table(owner, "joint", joint, 2)
    near = _near(owner, distances, eps, len(table))
    wrong = _wrong(owner, predictions, table)
    points, labels = table.shape
    # Unknowns: the plan (x, y, x'), then the new distribution (x', y).
    plan = np.arange(points * labels * points).reshape(points, labels, points)
    moved = plan.size + np.arange(points * labels).reshape(points, labels)
    sources, targets = np.zeros((2, table.size, plan.size + moved.size))
    for row, (x, y) in enumerate(itertools.product(range(points), range(labels))):
        sources[row, plan[x, y]] = 1
        targets[row, plan[:, y, x]] = 1
        targets[row, moved[x, y]] = -1
    upper = np.full(plan.size + moved.size, math.inf)
    upper[plan[np.broadcast_to(~near[:, None], plan.shape)]] = 0
    gain = np.zeros_like(upper)
    gain[moved[wrong]] = 1
    found = linprog(
        -gain,
        A_eq=np.concatenate([sources, targets]),
        b_eq=np.concatenate([table.ravel(), np.zeros(table.size)]),
        bounds=[(0.0, highest) for highest in upper.tolist()],
    )
    if found.x is None:
        raise RuntimeError(f"{owner}: linprog failed: {found.message}")
    return WorstDistribution(float(gain @ found.x), found.x[moved])


def worst_case_information(
    marginal: ArrayLike, representation: ArrayLike, distances: ArrayLike, eps: float
) -> float:
    """Return the least I(X'; g(X')) over the infinity-Wasserstein ball, in nats, by enumeration.

    For a function g it is the entropy of g(X'), a concave function of the transport plan, so that
    it is least at a vertex: where every x goes to one place. All such maps are tried.

    Args:
        marginal: (X,), Pr[X = x].
        representation: (X,), integers: g(x).
        distances: (X, X), 0 on the diagonal.
        eps: radius, 0 or more.

    Raises:
        ValueError: tables that do not fit each other; more than 1,000,000 maps.
    """
    owner = "worst_case_information"
    masses = probability_table(owner, "marginal", marginal, 1)
    near = _near(owner, distances, eps, len(masses))
    values = _integers(owner, "representation", representation, len(masses))
    choices = [np.unique(values[row]) for row in near]
    maps = math.prod(len(choice) for choice in choices)
    if maps > MAPS:
        raise ValueError(f"{owner}: there are {maps} maps to try, wanted at most {MAPS}")
    return min(
        float(entr(np.bincount(goal, weights=masses)).sum()) for goal in itertools.product(*choices)
    )


def probability_table(owner: str, name: str, value: Any, ndim: int) -> NDArray[np.float64]:
    """Return an argument as probabilities that sum to 1."""
    table = np.asarray(value, dtype=np.float64)
    if table.ndim != ndim or not table.size:
        raise ValueError(f"{owner}: {name} has shape {table.shape}, wanted {ndim} dimensions")
    total = float(table.sum())
    if not (table >= 0).all() or not math.isclose(total, 1, abs_tol=1e-9):
        raise ValueError(
            f"{owner}: {name} has minimum {table.min()} and sum {total}, wanted probabilities that "
            "sum to 1"
        )
    return table


def _near(owner: str, distances: ArrayLike, eps: float, points: int) -> NDArray[np.bool_]:
    table = np.asarray(distances, dtype=np.float64)
    if table.shape != (points, points):
        raise ValueError(
            f"{owner}: distances have shape {table.shape}, wanted {(points, points)}, one per pair"
        )
    if not (table >= 0).all() or table.diagonal().any():
        raise ValueError(f"{owner}: distances are not 0 on the diagonal and 0 or more elsewhere")
    if not eps >= 0:
        raise ValueError(f"{owner}: eps is {eps}, wanted 0 or more")
    near: NDArray[np.bool_] = table <= eps
    return near


def _wrong(owner: str, predictions: ArrayLike, table: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (X, Y): whether f(x) is not y."""
    found = _integers(owner, "predictions", predictions, len(table))
    wrong: NDArray[np.bool_] = found[:, None] != np.arange(table.shape[1])
    return wrong


def _integers(owner: str, name: str, value: ArrayLike, points: int) -> NDArray[np.int64]:
    found = np.asarray(value)
    if found.shape != (points,) or found.dtype.kind not in "iu" or (found < 0).any():
        raise ValueError(
            f"{owner}: {name} has shape {found.shape} and dtype {found.dtype}, wanted {(points,)} "
            "integers, 0 or more"
        )
    return found.astype(np.int64)
