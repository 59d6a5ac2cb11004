"""Theorem 3.2: a mixture of two Gaussians seen by g(x) = sgn(w'x) (spec section 4)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from wcmi_fast.theory.entropy import binary_entropy, entropy_deficit
from wcmi_fast.theory.norms import check_radius, direction_of, dual_norm, vector

Head = Literal["best", "identity", "negated"]
HEADS = ("best", "identity", "negated")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


class GaussianMixture:
    """Images x ~ N(y theta, Sigma) of two equally likely classes y in {-1, 1}.

    Methods that take w are about the representation g(x) = sgn(w'x); only the direction of w
    matters. An attack moves x by at most eps in the l_p norm. In the closed forms Z is standard
    normal, ``s = sqrt(w'Sigma w)``, ``m = w'theta / s`` and ``r = eps |w|_q / s`` with
    ``1/p + 1/q = 1``.

    Two classifiers of y can be made of g: h(z) = z ("identity") and h(z) = -z ("negated"). "best"
    is the one whose risk is at most 1/2: the identity for m >= 0. Theorem 3.2 is about this one.

    Args:
        theta: (D,), mean of the class 1.
        sigma: (D, D), covariance, symmetric and positive definite.

    Raises:
        ValueError: wrong shapes; values that are not finite; a covariance that is not symmetric or
            not positive definite.

    Source: Zhu et al. 2020, theorem 3.2, corrected in docs/theory.md.
    """

    def __init__(self, theta: ArrayLike, sigma: ArrayLike) -> None:
        self.theta = vector("GaussianMixture", "theta", theta)
        self.sigma = np.array(sigma, dtype=np.float64)
        size = len(self.theta)
        if self.sigma.shape != (size, size):
            raise ValueError(
                f"GaussianMixture: sigma has shape {self.sigma.shape}, wanted {(size, size)}"
            )
        if not np.isfinite(self.sigma).all():
            raise ValueError("GaussianMixture: sigma has NaN or infinite values, wanted finite")
        if not np.allclose(self.sigma, self.sigma.T, rtol=1e-8, atol=0):
            raise ValueError("GaussianMixture: sigma is not symmetric, wanted a covariance")
        try:
            self._root = np.linalg.cholesky(self.sigma)
        except np.linalg.LinAlgError as error:
            lowest = float(np.linalg.eigvalsh(self.sigma)[0])
            raise ValueError(
                f"GaussianMixture: sigma has the eigenvalue {lowest:.3g}, wanted all above 0"
            ) from error

    def sample(
        self, n: int, seed: int = 0, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return x (n, D) of the dtype, and y (n,), int64, -1 or 1.

        Raises:
            ValueError: n is less than 1.
        """
        if n < 1:
            raise ValueError(f"GaussianMixture.sample: n is {n}, wanted 1 or more")
        generator = torch.Generator().manual_seed(seed)
        y = 2 * torch.randint(2, (n,), generator=generator) - 1
        noise = torch.randn(n, len(self.theta), generator=generator, dtype=torch.float64)
        x = y[:, None] * torch.from_numpy(self.theta) + noise @ torch.from_numpy(self._root.T)
        return x.to(dtype), y

    def risk(self, w: ArrayLike, *, head: Head = "best") -> float:
        """Return Pr[h(g(x)) != y] = P(Z <= -m), with m negated for the negated classifier.

        Args:
            w: (D,), not 0.
            head: the classifier h.

        Raises:
            ValueError: w or head is not as wanted.
        """
        return _normal_cdf(-self._line("risk", w, 0.0, math.inf).of(head).margin)

    def adversarial_risk(
        self, w: ArrayLike, *, eps: float, p: float = math.inf, head: Head = "best"
    ) -> float:
        """Return Pr[h(g(x')) != y for some x' within eps] = P(Z <= r - m) = risk + gap.

        Args:
            w, head: as for `risk`.
            eps: radius of the ball, 0 or more; infinity is allowed.
            p: norm of the ball, 1 to infinity.

        Raises:
            ValueError: w, eps, p or head is not as wanted.
        """
        line = self._line("adversarial_risk", w, eps, p).of(head)
        return _normal_cdf(line.reach - line.margin)

    def adversarial_gap(
        self, w: ArrayLike, *, eps: float, p: float = math.inf, head: Head = "best"
    ) -> float:
        """Return AG, adversarial risk minus risk, P(m - r <= Z <= m).

        Accurate to about 1e-13 of its value, also where it is far below the risk's rounding.

        Args, Raises: as for `adversarial_risk`.
        """
        line = self._line("adversarial_gap", w, eps, p).of(head)
        return _normal_mass(line.margin - line.reach, line.margin, line.reach)

    def boundary_mass(self, w: ArrayLike, *, eps: float, p: float = math.inf) -> float:
        """Return M = P(m - r <= Z <= m + r), the share of images that can change g's value.

        Half of it lies on each side of the boundary. Accuracy as for `adversarial_gap`.

        Args, Raises: as for `adversarial_risk`.
        """
        line = self._line("boundary_mass", w, eps, p)
        return _normal_mass(line.margin - line.reach, line.margin + line.reach, 2 * line.reach)

    def worst_case_information(self, w: ArrayLike, *, eps: float, p: float = math.inf) -> float:
        """Return the least I(X'; g(X')) = H2(1/2 - M/2), in nats; log 2 without an attack.

        Args, Raises: as for `adversarial_risk`.
        """
        line = self._line("worst_case_information", w, eps, p)
        # (1 - M) / 2 as a sum of tails, exact where M is rounded to 1.
        tails = _normal_cdf(line.margin - line.reach) + _normal_cdf(-line.margin - line.reach)
        return binary_entropy(tails / 2)

    def representation_vulnerability(
        self, w: ArrayLike, *, eps: float, p: float = math.inf
    ) -> float:
        """Return RV = H2(1/2) - H2(1/2 - M/2), in nats, accurate to about 1e-13 of its value.

        Args, Raises: as for `adversarial_risk`.
        """
        return entropy_deficit(self.boundary_mass(w, eps=eps, p=p))

    def vulnerability_bounds(
        self, w: ArrayLike, *, eps: float, p: float = math.inf
    ) -> tuple[float, float]:
        """Return theorem 3.2's bounds on RV by the best classifier's AG, in nats, in their order.

        ``H2(1/2) - H2(1/2 - AG/2) <= RV <= H2(1/2) - H2(1/2 - AG)``; the print has them swapped.
        Where AG exceeds 1/2, the upper one is log 2.

        Args, Raises: as for `adversarial_risk`.
        """
        gap = self.adversarial_gap(w, eps=eps, p=p)
        return entropy_deficit(gap), entropy_deficit(min(2 * gap, 1.0))

    def _line(self, method: str, w: ArrayLike, eps: float, p: float) -> _Line:
        owner = f"GaussianMixture.{method}"
        direction = direction_of(owner, w)
        if direction.shape != self.theta.shape:
            raise ValueError(
                f"{owner}: w has shape {direction.shape}, wanted theta's, {self.theta.shape}"
            )
        reach = check_radius(owner, eps) * dual_norm(owner, direction, p)
        spread = float(np.linalg.norm(self._root.T @ direction))
        return _Line(owner, float(direction @ self.theta) / spread, reach / spread)


class _Line(NamedTuple):
    """The mixture along w, in units of its deviation s: N(+-margin, 1), moved by up to reach."""

    owner: str
    margin: float
    reach: float

    def of(self, head: Head) -> _Line:
        """Return it with the class 1 where the classifier wants it to be."""
        if head not in HEADS:
            raise ValueError(f"{self.owner}: head is {head!r}, wanted one of {HEADS}")
        if head == "best":
            return self._replace(margin=abs(self.margin))
        return self if head == "identity" else self._replace(margin=-self.margin)


def _normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _normal_mass(low: float, high: float, width: float) -> float:
    """Return P(low <= Z <= high); width is high - low, not rounded as their difference is."""
    middle = low + width / 2
    if width * max(1.0, abs(middle)) < 1:
        # A difference of two nearly equal probabilities would lose all digits.
        points = middle + width / 2 * _NODES
        density = float(_WEIGHTS @ np.exp(-points * points / 2))
        return width / 2 * density / math.sqrt(2 * math.pi)
    if low > -high:  # the same mass on the other side of 0, where both probabilities are small
        low, high = -high, -low
    return _normal_cdf(high) - _normal_cdf(low)
