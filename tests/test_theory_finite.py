"""Lemma 3.3, theorem 3.4 and lemma C.1 on finite spaces, by enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import entropy

from wcmi_fast.theory import adversarial_risk_lower_bound, fano_error_lower_bound
from wcmi_fast.theory.components import component_information
from wcmi_fast.theory.finite import (
    adversarial_risk,
    mutual_information,
    worst_case_information,
    worst_distribution,
)

Table = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
RADII = st.sampled_from([0.0, 0.1, 0.3, 0.6, 2.0])
ROUNDING = 1e-9


class Space(NamedTuple):
    """Points in the unit square, a joint distribution with labels, and a classifier."""

    joint: Table
    predictions: NDArray[np.int64]
    distances: Table


def space(seed: int, points: int, labels: int, *, uniform: bool = False) -> Space:
    random = np.random.default_rng(seed)
    where = random.uniform(size=(points, 2))
    distances = np.abs(where[:, None] - where).max(2)
    joint = random.dirichlet(np.full(points * labels, 0.5)).reshape(points, labels)
    if uniform:
        joint = joint / joint.sum(0) / labels
    return Space(joint, random.integers(labels, size=points), distances)


def in_ball(new: Table, old: Table, near: NDArray[np.bool_]) -> bool:
    """Strassen: no set holds more new mass than the old mass that can reach it."""
    for size in range(1, len(old) + 1):
        for chosen in map(list, itertools.combinations(range(len(old)), size)):
            reachable = near[:, chosen].any(1)
            if new[chosen].sum() > old[reachable].sum() + ROUNDING:
                return False
    return True


@given(seed=SEEDS, points=st.integers(1, 5), labels=st.integers(1, 3), eps=RADII)
@settings(max_examples=60)
def test_lemma_3_3(seed: int, points: int, labels: int, eps: float) -> None:
    joint, predictions, distances = space(seed, points, labels)
    by_points = adversarial_risk(joint, predictions, distances, eps)
    worst = worst_distribution(joint, predictions, distances, eps)
    assert worst.risk == pytest.approx(by_points, abs=ROUNDING)
    errs = predictions[:, None] != np.arange(labels)
    assert worst.joint[errs].sum() == pytest.approx(worst.risk, abs=ROUNDING)
    assert all(in_ball(worst.joint[:, y], joint[:, y], distances <= eps) for y in range(labels))


@given(seed=SEEDS, eps=RADII)
@settings(max_examples=20)
def test_no_map_of_points_and_labels_errs_more(seed: int, eps: float) -> None:
    joint, predictions, distances = space(seed, 3, 2)
    pairs = list(itertools.product(range(3), range(2)))
    places = [np.flatnonzero(distances[x] <= eps) for x, _ in pairs]
    risks = [
        sum(joint[pair] for pair, x in zip(pairs, goal, strict=True) if predictions[x] != pair[1])
        for goal in itertools.product(*places)
    ]
    assert adversarial_risk(joint, predictions, distances, eps) == pytest.approx(max(risks))


def test_lemma_3_3_by_hand() -> None:
    # Three points on a line at 0, 1, 2, classes 0, 0, 1, and right labels but for a tenth.
    joint = [[0.3, 0.0], [0.2, 0.1], [0.0, 0.4]]
    distances = [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    for eps, risk in ((0.0, 0.1), (0.9, 0.1), (1.0, 0.7), (2.0, 1.0)):
        assert adversarial_risk(joint, [0, 0, 1], distances, eps) == pytest.approx(risk)
        found = worst_distribution(joint, [0, 0, 1], distances, eps)
        assert found.risk == pytest.approx(risk)


def test_a_transport_that_does_not_see_labels_can_be_weaker() -> None:
    # Both labels at the middle point: each wants another neighbour.
    joint, predictions = np.array([[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]), np.array([0, 0, 1])
    distances = np.abs(np.subtract.outer(range(3), range(3))).astype(float)
    assert adversarial_risk(joint, predictions, distances, 1.0) == 1
    assert worst_distribution(joint, predictions, distances, 1.0).risk == pytest.approx(1)
    blind = [joint[1, [y for y in range(2) if predictions[goal] != y]].sum() for goal in range(3)]
    assert max(blind) == 0.5


@given(seed=SEEDS, eps=RADII)
@settings(max_examples=30)
def test_no_random_transport_leaves_less_information(seed: int, eps: float) -> None:
    random = np.random.default_rng(seed)
    _, values, distances = space(seed, 5, 3)
    marginal = random.dirichlet(np.ones(5))
    least = worst_case_information(marginal, values, distances, eps)
    for _ in range(20):
        plan = random.dirichlet(np.full(5, 0.3), size=5) * (distances <= eps)
        plan = np.where(plan.sum(1, keepdims=True) > 0, plan, np.eye(5))
        moved = marginal @ (plan / plan.sum(1, keepdims=True))
        outcome = np.zeros((5, 3))
        outcome[range(5), values] = moved
        assert mutual_information(outcome) >= least - ROUNDING


def test_least_information_by_hand() -> None:
    distances = np.abs(np.subtract.outer(range(4), range(4)))
    marginal, values = [0.4, 0.2, 0.1, 0.3], [0, 0, 1, 1]
    information = [worst_case_information(marginal, values, distances, eps) for eps in (0, 1, 2)]
    # By 1 the point of mass 0.2 crosses, or that of 0.1: 0.7 / 0.3 is nearer to 1/2 than 0.6 / 0.4.
    coins = [entropy([0.6, 0.4]), entropy([0.7, 0.3]), entropy([1.0, 0.0])]
    assert information == pytest.approx(coins)


@given(seed=SEEDS, labels=st.integers(2, 5), eps=RADII)
@settings(max_examples=40)
def test_theorem_3_4_on_finite_spaces(seed: int, labels: int, eps: float) -> None:
    joint, _, distances = space(seed, 6, labels, uniform=True)
    values = np.random.default_rng(seed).integers(3, size=6)
    least = worst_case_information(joint.sum(1), values, distances, eps)
    heads = map(np.array, itertools.product(range(labels), repeat=3))
    risk = min(adversarial_risk(joint, head[values], distances, eps) for head in heads)
    assert risk >= adversarial_risk_lower_bound(least, labels) - ROUNDING
    assert risk >= fano_error_lower_bound(least, labels) - ROUNDING


def test_theorem_3_4_says_something() -> None:
    # Nine classes at 0 to 8 on a line, and g tells them all. By 1 they gather in three threes.
    distances, joint = np.abs(np.subtract.outer(range(9), range(9))), np.eye(9) / 9
    least = worst_case_information(joint.sum(1), range(9), distances, 1.0)
    assert least == pytest.approx(math.log(3))
    bound = adversarial_risk_lower_bound(least, 9)
    assert bound == pytest.approx(1 - math.log(6) / math.log(9))
    # The best classifier knows the middle of each three, and no other.
    head = np.repeat([1, 4, 7], 3)
    risk = adversarial_risk(joint, head, distances, 1.0)
    assert 0.15 < bound < fano_error_lower_bound(least, 9) < risk == pytest.approx(2 / 3)


@given(seed=SEEDS, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_lemma_c_1(seed: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    marginal = random.dirichlet(np.full(5, 0.5))
    channels = [random.dirichlet(np.full(size, 0.4), size=5) for size in sizes]
    found = component_information(marginal, channels)
    assert found.whole <= sum(found.parts) + ROUNDING
    assert found.whole >= max(found.parts) - ROUNDING
    # The step of the proof: what is lost is the total correlation of the components.
    joint = marginal[:, None]
    for channel in channels:
        joint = (joint[:, :, None] * channel[:, None]).reshape(5, -1)
    whole = entropy(joint.sum(0))
    apart = sum(entropy(marginal @ channel) for channel in channels)
    assert sum(found.parts) - found.whole == pytest.approx(apart - whole, abs=ROUNDING)


def test_lemma_c_1_at_its_ends() -> None:
    coin = np.full(4, 0.25)
    bits = [np.eye(2)[[0, 0, 1, 1]], np.eye(2)[[0, 1, 0, 1]]]
    apart = component_information(coin, bits)
    assert apart.whole == pytest.approx(2 * math.log(2))
    assert sum(apart.parts) == pytest.approx(apart.whole)
    twice = component_information(coin, [bits[0], bits[0]])
    assert twice.whole == pytest.approx(math.log(2))
    assert sum(twice.parts) == pytest.approx(2 * math.log(2))


def test_lemma_c_1_needs_independence_given_the_image() -> None:
    # Z_1 is a fair coin and Z_2 = Z_1 xor X: each says nothing of X, both say all.
    joint = np.zeros((2, 2, 2))
    for x, first in itertools.product(range(2), repeat=2):
        joint[x, first, first ^ x] = 0.25
    assert mutual_information(joint.reshape(2, 4)) == pytest.approx(math.log(2))
    assert mutual_information(joint.sum(2)) == pytest.approx(0, abs=ROUNDING)
    assert mutual_information(joint.sum(1)) == pytest.approx(0, abs=ROUNDING)


@given(seed=SEEDS)
@settings(max_examples=20)
def test_mutual_information_is_entropy_minus_conditional_entropy(seed: int) -> None:
    joint = np.random.default_rng(seed).dirichlet(np.full(12, 0.3)).reshape(3, 4)
    wanted = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel())
    assert mutual_information(joint) == pytest.approx(wanted, abs=1e-12)


HALVES, APART = [[0.5, 0.0], [0.0, 0.5]], [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mutual_information([0.5, 0.5]), r"joint has shape \(2,\), wanted 2 dimensions"),
        (lambda: mutual_information([[0.5, 0.6]]), "joint has minimum 0.5 and sum 1.1, wanted"),
        (lambda: mutual_information([[-0.5, 1.5]]), "joint has minimum -0.5 and sum 1.0, wanted"),
        (
            lambda: adversarial_risk(HALVES, [0], APART, 1),
            r"predictions has shape \(1,\) and dtype int64, wanted \(2,\) integers",
        ),
        (lambda: adversarial_risk(HALVES, [0.0, 1.0], APART, 1), "dtype float64, wanted"),
        (
            lambda: adversarial_risk(HALVES, [0, 1], [[0]], 1),
            r"distances have shape \(1, 1\), want",
        ),
        (lambda: adversarial_risk(HALVES, [0, 1], HALVES, 1), "distances are not 0 on the diag"),
        (lambda: worst_distribution(HALVES, [0, 1], APART, -1), "worst_dis.*: eps is -1, wanted 0"),
        (
            lambda: worst_case_information([0.05] * 20, range(20), np.zeros((20, 20)), 1),
            r"there are 104857600000000000000000000 maps to try, wanted at most 1000000",
        ),
        (lambda: component_information([1.0], []), "channels is empty, wanted a table"),
        (
            lambda: component_information([1.0], [[[1.0]], [[0.5, 0.5], [1, 0]]]),
            r"channels\[1\] has shape \(2, 2\), wanted \(1, ...\)",
        ),
        (
            lambda: component_information([1.0], [[[0.5, 0.4]]]),
            r"channels\[0\]'s row has minimum 0.4 and sum 0.9, wanted",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
