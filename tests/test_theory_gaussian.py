"""Theorem 3.2 on mixtures of two Gaussians: closed forms, bounds, and the exact attack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import log_ndtr
from scipy.stats import norm
from torch import Tensor

from wcmi_fast.theory import (
    GaussianMixture,
    WorstCaseTransport,
    binary_entropy,
    worst_case_transport,
)
from wcmi_fast.theory.norms import dual_norm, steepest

# Rounding of two closed forms; equality holds for m = 0.
SLACK = 1e-12
NORMS = st.one_of(st.sampled_from([1.0, 2.0, math.inf]), st.floats(1, 20))


class Case(NamedTuple):
    theta: NDArray[np.float64]
    sigma: NDArray[np.float64]
    w: NDArray[np.float64]
    eps: float
    p: float

    def mixture(self) -> GaussianMixture:
        return GaussianMixture(self.theta, self.sigma)

    def line(self) -> tuple[float, float, float]:
        """The mean and deviation of w'x for the class 1, and how far eps moves it."""
        mean, spread = self.w @ self.theta, math.sqrt(self.w @ self.sigma @ self.w)
        return float(mean), spread, self.eps * explicit_dual_norm(self.w, self.p)


def explicit_dual_norm(w: NDArray[np.float64], p: float) -> float:
    absolute = np.abs(w)
    if p == 1:
        return float(absolute.max())
    if p == math.inf:
        return float(absolute.sum())
    q = p / (p - 1)
    return float(absolute.max() * ((absolute / absolute.max()) ** q).sum() ** (1 / q))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    root = random.normal(size=(size, size))
    scale = draw(st.floats(0.1, 10))
    theta = draw(st.floats(0, 3)) * random.normal(size=size)
    w = random.normal(size=size) * draw(st.sampled_from([1e-3, 1.0, 1e5]))
    eps = draw(st.sampled_from([0.0, 1e-9, 0.01, 0.2, 1.0, 5.0]))
    return Case(theta, scale * (root @ root.T + 0.1 * np.eye(size)), w, eps, draw(NORMS))


def density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def standard(m: float) -> GaussianMixture:
    return GaussianMixture([m], [[1.0]])


def test_worked_value() -> None:
    mixture = GaussianMixture([0.6, 0.8], np.eye(2))
    w, ball = [0.6, 0.8], {"eps": 0.2, "p": 2}
    assert round(mixture.adversarial_gap(w, **ball), 4) == 0.0532
    assert round(mixture.representation_vulnerability(w, **ball), 5) == 0.00469
    low, high = mixture.vulnerability_bounds(w, **ball)
    assert (round(low, 5), round(high, 5)) == (0.00142, 0.00567)


@given(cases())
def test_theorem_3_2_holds_in_the_corrected_order_and_not_as_printed(case: Case) -> None:
    mixture, ball = case.mixture(), {"eps": case.eps, "p": case.p}
    vulnerability = mixture.representation_vulnerability(case.w, **ball)
    low, high = mixture.vulnerability_bounds(case.w, **ball)
    assert low <= vulnerability * (1 + SLACK)
    assert vulnerability <= high * (1 + SLACK)
    # Below and above rounding makes all three 0, or log 2.
    if 1e-100 < mixture.adversarial_gap(case.w, **ball) < 0.999:
        assert not (high <= vulnerability <= low)
        assert low < high


@given(cases())
@settings(max_examples=40)
def test_bounds_are_integrals_of_the_derivative(case: Case) -> None:
    mixture, ball = case.mixture(), {"eps": case.eps, "p": case.p}
    gap = mixture.adversarial_gap(case.w, **ball)
    for bound, start in zip(
        mixture.vulnerability_bounds(case.w, **ball), (0.5 - gap / 2, 0.5 - gap), strict=True
    ):
        # In u = sqrt(t), so that the integrand is finite where the integral starts at 0.
        ends = math.sqrt(max(start, 0.0)), math.sqrt(0.5)
        integral = quad(lambda u: 2 * u * math.log((1 - u * u) / (u * u)), *ends)[0]
        assert bound == pytest.approx(integral, abs=1e-9)


@given(cases())
@settings(max_examples=40)
def test_closed_forms_agree_with_quadrature(case: Case) -> None:
    mixture, ball = case.mixture(), {"eps": case.eps, "p": case.p}
    mean, spread, reach = case.line()

    def mass(low: float, high: float, centre: float) -> float:
        """P(low <= w'x <= high | class), by an adaptive rule over 12 deviations."""
        low, high = max(low, centre - 12 * spread), min(high, centre + 12 * spread)
        if low >= high:
            return 0.0
        points = [centre] if low < centre < high else None
        return quad(lambda t: density((t - centre) / spread) / spread, low, high, points=points)[0]

    for head, centre in (("identity", mean), ("negated", -mean), ("best", abs(mean))):
        risk = mixture.risk(case.w, head=head)
        attacked = mixture.adversarial_risk(case.w, head=head, **ball)
        gap = mixture.adversarial_gap(case.w, head=head, **ball)
        assert risk == pytest.approx(mass(-math.inf, 0.0, centre), abs=1e-9)
        assert attacked == pytest.approx(mass(-math.inf, reach, centre), abs=1e-9)
        assert gap == pytest.approx(mass(0.0, reach, centre), abs=1e-9)
        assert attacked == pytest.approx(risk + gap, abs=1e-14)
    near = [mass(-reach, reach, centre) for centre in (mean, -mean)]
    assert mixture.boundary_mass(case.w, **ball) == pytest.approx(sum(near) / 2, abs=1e-9)
    share = min(0.5 * sum(mass(reach, math.inf, centre) for centre in (mean, -mean)), 0.5)
    worst = mixture.worst_case_information(case.w, **ball)
    assert worst == pytest.approx(binary_entropy(share), abs=1e-7)
    vulnerability = mixture.representation_vulnerability(case.w, **ball)
    assert vulnerability == pytest.approx(math.log(2) - worst, abs=1e-14)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("m_sign", [1, -1])
def test_closed_forms_agree_with_attacked_samples(p: float, m_sign: int) -> None:
    n = 100_000
    case = Case(
        theta=m_sign * np.array([0.8, -0.2, 0.4]),
        sigma=np.array([[1.0, 0.3, 0.0], [0.3, 0.5, -0.1], [0.0, -0.1, 2.0]]),
        w=np.array([1.0, -0.5, 0.2]),
        eps=0.3,
        p=p,
    )
    mixture, ball = case.mixture(), {"eps": case.eps, "p": p}
    x, y = mixture.sample(n, seed=1, dtype=torch.float64)
    w = torch.from_numpy(case.w)

    def agrees(found: Tensor, wanted: float) -> bool:
        return abs(float(found.double().mean()) - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / n)

    nearest = x - (y * case.eps)[:, None] * torch.from_numpy(steepest("test", case.w, p))
    assert agrees((x @ w).sign() != y, mixture.risk(case.w, head="identity"))
    attacked = (nearest @ w).sign() != y
    assert agrees(attacked, mixture.adversarial_risk(case.w, head="identity", **ball))
    moved = worst_case_transport(x, case.w, side=1, **ball)
    positive = (moved @ w) > 0
    mass = mixture.boundary_mass(case.w, **ball)
    assert agrees(positive, 0.5 + mass / 2)
    entropy = binary_entropy(float(positive.double().mean()))
    error = 5 * math.sqrt(0.25 / n) * math.log((1 + mass) / (1 - mass)) + 1e-4
    assert abs(entropy - mixture.worst_case_information(case.w, **ball)) < error
    assert agrees(positive & ((x @ w) <= 0), mass / 2)  # not M: the half that (A.1) drops


def test_samples_are_the_mixture() -> None:
    sigma = np.array([[2.0, -0.6], [-0.6, 0.5]])
    x, y = GaussianMixture([1.0, -2.0], sigma).sample(50_000, seed=3)
    assert x.dtype == torch.float32
    assert set(y.tolist()) == {-1, 1}
    assert abs(float(y.double().mean())) < 0.03
    for label in (-1, 1):
        rows = x[y == label].double()
        assert rows.mean(0).tolist() == pytest.approx([label, -2 * label], abs=0.05)
        assert np.allclose(torch.cov(rows.T), sigma, atol=0.06)
    again, _ = GaussianMixture([1.0, -2.0], sigma).sample(50_000, seed=3)
    other, _ = GaussianMixture([1.0, -2.0], sigma).sample(50_000, seed=4)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_upper_bound_fails_for_the_worse_head() -> None:
    mixture, ball = standard(-1.0), {"eps": 0.2}
    worse = mixture.adversarial_gap([1.0], head="identity", **ball)
    better = mixture.adversarial_gap([1.0], head="negated", **ball)
    assert worse < better == mixture.adversarial_gap([1.0], **ball)
    vulnerability = mixture.representation_vulnerability([1.0], **ball)
    assert vulnerability > math.log(2) - binary_entropy(0.5 - worse)
    assert vulnerability < math.log(2) - binary_entropy(0.5 - better)
    assert mixture.boundary_mass([1.0], **ball) == pytest.approx(worse + better)


@given(cases(), st.floats(1e-200, 1e200))
def test_only_the_direction_of_w_matters(case: Case, scale: float) -> None:
    mixture, ball = case.mixture(), {"eps": case.eps, "p": case.p}
    found, same, opposite = (
        mixture.representation_vulnerability(w, **ball) for w in (case.w, scale * case.w, -case.w)
    )
    assert same == pytest.approx(found, rel=1e-9)
    assert opposite == pytest.approx(found, rel=1e-12)


def test_limits() -> None:
    still, far = {"eps": 0.0}, {"eps": math.inf}
    for m in (1.0, -1.0):
        mixture, best = standard(m), float(norm.cdf(1))
        assert mixture.adversarial_gap([1.0], **still) == 0
        assert mixture.representation_vulnerability([1.0], **still) == 0
        assert mixture.worst_case_information([1.0], **still) == math.log(2)
        assert mixture.adversarial_risk([1.0], **far) == 1
        assert mixture.adversarial_gap([1.0], **far) == pytest.approx(best)
        assert mixture.worst_case_information([1.0], **far) == 0
        assert mixture.representation_vulnerability([1.0], **far) == math.log(2)
        low, high = mixture.vulnerability_bounds([1.0], **far)
        assert low < math.log(2) == high  # AG above 1/2: the integral would start below 0
    mixture = standard(0.0)
    gap = mixture.adversarial_gap([1.0], eps=0.3)
    assert gap == pytest.approx(float(norm.cdf(0.3)) - 0.5)
    assert mixture.boundary_mass([1.0], eps=0.3) == pytest.approx(2 * gap)
    high = mixture.vulnerability_bounds([1.0], eps=0.3)[1]
    assert mixture.representation_vulnerability([1.0], eps=0.3) == pytest.approx(high)


@pytest.mark.parametrize("m", [0.0, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("eps", [1e-100, 1e-12, 1e-6])
def test_small_attacks_are_accurate(m: float, eps: float) -> None:
    mixture = standard(m)
    # phi(m - u) = phi(m) (1 + m u + ...): three terms are exact enough for these eps.
    at_m = density(m)
    gap = eps * at_m * (1 + m * eps / 2 + (m * m - 1) * eps**2 / 6)
    assert mixture.adversarial_gap([1.0], eps=eps) == pytest.approx(gap, rel=1e-12, abs=0)
    mass = 2 * eps * at_m * (1 + (m * m - 1) * eps**2 / 6)
    assert mixture.boundary_mass([1.0], eps=eps) == pytest.approx(mass, rel=1e-12, abs=0)
    vulnerability = mixture.representation_vulnerability([1.0], eps=eps)
    assert vulnerability == pytest.approx(mass**2 / 2, rel=1e-9, abs=1e-320)


@pytest.mark.parametrize("m", [1.0, 10.0, 37.0])
def test_small_tails_are_accurate(m: float) -> None:
    mixture = standard(m)
    assert mixture.risk([1.0]) == pytest.approx(math.exp(log_ndtr(-m)), rel=1e-11, abs=0)
    assert mixture.adversarial_risk([1.0], eps=0.5) == pytest.approx(
        math.exp(log_ndtr(0.5 - m)), rel=1e-11, abs=0
    )
    wide = math.exp(log_ndtr(2 - m)) - math.exp(log_ndtr(-m))
    assert mixture.adversarial_gap([1.0], eps=2.0) == pytest.approx(wide, rel=1e-11, abs=0)
    # A wide interval on the far side: the tails beyond it are what information is left.
    tail = (math.exp(log_ndtr(-37.0)) + math.exp(log_ndtr(-37.0 - 2 * m))) / 2
    left = mixture.worst_case_information([1.0], eps=37.0 + m)
    assert left == pytest.approx(-tail * math.log(tail) + tail, rel=1e-11, abs=0)


@given(m=st.floats(-5, 5), reach=st.floats(0.01, 3))
@settings(max_examples=50)
def test_narrow_and_wide_intervals_meet(m: float, reach: float) -> None:
    gap = standard(m).adversarial_gap([1.0], eps=reach, head="identity")
    assert gap == pytest.approx(quad(density, m - reach, m, epsabs=0)[0], rel=1e-9)


@given(cases())
def test_the_steepest_direction_attains_the_dual_norm(case: Case) -> None:
    w = case.w / np.abs(case.w).max()
    v, q_norm = steepest("test", w, case.p), dual_norm("test", w, case.p)
    assert q_norm == pytest.approx(explicit_dual_norm(w, case.p))
    assert np.linalg.norm(v, ord=case.p) == pytest.approx(1)
    assert w @ v == pytest.approx(q_norm)


def share_entropy(moved: Tensor, w: Tensor) -> float:
    return binary_entropy(float(((moved @ w) > 0).double().mean()))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 7), p=NORMS, eps=st.floats(0.01, 2))
def test_no_transport_of_a_sample_leaves_less_information(
    seed: int, n: int, p: float, eps: float
) -> None:
    random = np.random.default_rng(seed)
    points, direction = random.normal(size=(n, 2)), random.normal(size=2)
    x, w = torch.from_numpy(points), torch.from_numpy(direction)
    moved = worst_case_transport(x, direction, eps=eps, p=p)
    assert float(np.linalg.norm(moved - x, ord=p, axis=1).max()) <= eps * (1 + 1e-12)
    reach = eps * explicit_dual_norm(direction, p)
    sides = [{z > 0, z - reach > 0, z + reach > 0} for z in (points @ direction).tolist()]
    entropies = [binary_entropy(sum(goal) / n) for goal in itertools.product(*sides)]
    assert share_entropy(moved, w) == min(entropies)


def test_only_points_in_reach_on_one_side_move() -> None:
    x = torch.tensor([[-1.5, 7.0], [-0.9, 0.0], [0.0, 0.0], [0.1, 3.0], [0.9, 0.0], [1.5, 0.0]])
    up = worst_case_transport(x, [2.0, 0.0], eps=1.0, side=1)
    down = worst_case_transport(x, [2.0, 0.0], eps=1.0, side=-1)
    assert up[:, 0].tolist() == pytest.approx([-1.5, 0.1, 1.0, 0.1, 0.9, 1.5])
    assert down[:, 0].tolist() == pytest.approx([-1.5, -0.9, -1.0, -0.9, -0.1, 1.5])
    assert torch.equal(up[:, 1], x[:, 1])
    more = torch.cat([x, x[5:]])
    assert torch.equal(worst_case_transport(more, [1.0, 0.0], eps=1.0)[:6], up)
    assert torch.equal(worst_case_transport(-more, [1.0, 0.0], eps=1.0)[:6], -up)


def test_rounding_leaves_no_point_on_the_wrong_side() -> None:
    w = [0.3, -0.7, 0.1]
    x, _ = GaussianMixture([0.1, 0.0, 0.0], 1e-6 * np.eye(3)).sample(2000, seed=0)
    assert (
        (worst_case_transport(x, w, eps=0.1, side=1).double() @ torch.tensor(w).double()) > 0
    ).all()


def test_the_attack_object_is_the_function() -> None:
    x, w = torch.randn(100, 2), [1.0, -0.5]

    def unused(x: Tensor) -> Tensor:
        raise AssertionError("the exact attack needs no loss")

    attack = WorstCaseTransport(w=w, eps=0.7, p=2, side=-1)
    wanted = worst_case_transport(x, w, eps=0.7, p=2, side=-1)
    assert torch.equal(attack.attack(unused, x, generator=torch.Generator()), wanted)
    assert not torch.equal(wanted, x)
    assert not torch.equal(WorstCaseTransport(w=w, eps=0.7, side=1).attack(unused, x), wanted)


MIXTURE = standard(1.0)
PLANE = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: GaussianMixture([[1.0]], [[1.0]]),
            ValueError,
            r"theta has shape \(1, 1\), wanted",
        ),
        (lambda: GaussianMixture([math.nan], [[1.0]]), ValueError, "theta has NaN or infinite"),
        (
            lambda: GaussianMixture([1.0], [1.0]),
            ValueError,
            r"sigma has shape \(1,\), wanted \(1, 1",
        ),
        (lambda: GaussianMixture([1.0], [[math.inf]]), ValueError, "sigma has NaN or infinite"),
        (lambda: GaussianMixture([1, 1], [[1, 1], [1, 1]]), ValueError, "sigma has the eigenvalue"),
        (lambda: GaussianMixture([1, 1], [[1, 0.5], [0, 1]]), ValueError, "sigma is not symmetric"),
        (lambda: MIXTURE.sample(0), ValueError, "GaussianMixture.sample: n is 0, wanted 1 or more"),
        (lambda: MIXTURE.risk([0.0]), ValueError, "GaussianMixture.risk: w is 0, wanted a direct"),
        (lambda: MIXTURE.risk([1.0, 2.0]), ValueError, r"w has shape \(2,\), wanted theta's, \(1,"),
        (lambda: MIXTURE.risk([1.0], head="z"), ValueError, "head is 'z', wanted one of"),
        (lambda: MIXTURE.boundary_mass([1.0], eps=-1), ValueError, "eps is -1, wanted a number, 0"),
        (lambda: MIXTURE.boundary_mass([1.0], eps=math.nan), ValueError, "eps is nan, wanted"),
        (
            lambda: MIXTURE.boundary_mass([1.0], eps="1"),
            TypeError,
            "eps is '1', wanted a number, 0",
        ),
        (
            lambda: MIXTURE.boundary_mass([1.0], eps=1, p=0.5),
            ValueError,
            "p is 0.5, wanted a number",
        ),
        (lambda: worst_case_transport(PLANE.long(), [1, 0], eps=1), TypeError, "x is torch.int64"),
        (
            lambda: worst_case_transport(PLANE, [1], eps=1),
            ValueError,
            r"x has shape \(4, 2\), want",
        ),
        (lambda: worst_case_transport(PLANE, [0, 0], eps=1), ValueError, "transport: w is 0, want"),
        (lambda: worst_case_transport(PLANE, [1, 0], eps=math.inf), ValueError, "eps is inf, want"),
        (lambda: worst_case_transport(PLANE, [1, 0], eps=1, side=2), ValueError, "side is 2, want"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
