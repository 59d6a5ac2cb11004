"""Estimators against what theory knows: sgn(w'x) of a mixture, and a smooth representation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import PGD, CriticConfig, reference, representation_vulnerability
from wcmi_fast.information import attack_information, evaluate_critic
from wcmi_fast.models.folding import folded
from wcmi_fast.theory import GaussianMixture, WorstCaseTransport, binary_entropy
from wcmi_fast.theory.transport import Side
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.objective import Critic

W = [0.6, -0.8]
MIXTURE = GaussianMixture(theta=[1.8, -2.4], sigma=np.eye(2))  # m = 3
EPS = 3.2 / 1.4  # r = 3.2 in the l-inf norm: |w|_1 = 1.4


class Sign(nn.Module):
    """g(x) = sgn(w'x), (N, 1); it has no gradient."""

    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor(W))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).sign()[:, None]


class OneHot(nn.Module):
    """A coin's side z (N, 1) as (1, 0) or (0, 1)."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z > 0, z <= 0], 1).float()


class CoinScores(nn.Module):
    """T(z, x) = log 1/P(z) where sgn(w'x) is z, and far below elsewhere: the best critic."""

    def __init__(self, heads: float) -> None:
        super().__init__()
        self.sign, self.heads = Sign(), heads

    def forward(self, x: Tensor) -> Tensor:
        up, down = torch.tensor([[-math.log(self.heads), -50.0], [-50.0, -math.log1p(-self.heads)]])
        return torch.where(self.sign(x) > 0, up, down)[:, None]


@pytest.mark.parametrize("side", [1, -1])
def test_the_best_critic_finds_the_entropy_of_the_transported_sample(side: Side) -> None:
    n = 20_000
    x, _ = MIXTURE.sample(n, seed=0)
    config = CriticConfig(batch_size=2000)
    attack = WorstCaseTransport(w=W, eps=EPS, side=side)
    found = []
    for points in (x, attack.attack(lambda x: x, x)):
        heads = float((Sign()(points) > 0).float().mean())
        critic = Critic(OneHot(), CoinScores(heads))
        given = None if points is x else attack
        values = evaluate_critic(Sign(), critic, x, config, attack=given).values
        found.append(sum(values) / len(values))
        assert found[-1] == pytest.approx(binary_entropy(heads), abs=2e-3)  # batches: 1 / 2000
    truth = MIXTURE.representation_vulnerability(W, eps=EPS)
    share = 0.5 - MIXTURE.boundary_mass(W, eps=EPS) / 2
    deviation = math.sqrt(share * (1 - share) / n) * math.log((1 - share) / share)
    assert abs(found[0] - found[1] - truth) < 5 * deviation
    assert 5 * deviation < 0.15 * truth


@pytest.mark.slow
def test_representation_vulnerability_recovers_rv() -> None:
    train, _ = MIXTURE.sample(5000, seed=1)
    test, _ = MIXTURE.sample(5000, seed=2)
    report = representation_vulnerability(
        Sign(),
        (train, test),
        eps=EPS,
        attack=WorstCaseTransport(w=W, eps=EPS, side=1),
        critic=CriticConfig(epochs=15, batch_size=500, learning_rate=3e-3, units=16),
        train_images=None,
        test_images=None,
        progress=False,
    )
    assert report.vulnerability is not None
    low, high = report.vulnerability.interval
    truth = MIXTURE.representation_vulnerability(W, eps=EPS)
    assert low <= truth <= high
    assert high - low < 0.3 * truth


# A smooth representation: x = (c S, N), g(x) = S + N, S of variance snr and N of variance 1. The
# image's side of the critic sees S alone, and c is so large that an l-inf ball hardly moves S. The
# critic is the best one of the clean distribution, T(z, s) = log p(z | s) - log p(z), so that the
# mean of exp T over S is 1 for every z, and the attack lowers E T pair by pair. T is a concave
# quadratic in z: its minimum over [z - eps, z + eps] is at an end. See docs/theory.md.
SCALE = 1024.0


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] / SCALE + x[:, 1:]


class Powers(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z * z, z, torch.ones_like(z)], 1)


class LogRatio(nn.Module):
    def __init__(self, snr: float) -> None:
        super().__init__()
        self.information, self.curvature = 0.5 * math.log1p(snr), snr / (1 + snr)

    def forward(self, x: Tensor) -> Tensor:
        s = x[:, :1] / SCALE
        parts = [torch.full_like(s, -self.curvature / 2), s, self.information - s * s / 2]
        return torch.stack(parts, 2)


def channel(snr: float, n: int) -> Tensor:
    s, noise = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    return torch.stack([SCALE * math.sqrt(snr) * s, noise], 1)


def analytic_minimum(snr: float, eps: float) -> float:
    curvature = snr / (1 + snr)
    drop = eps * math.sqrt(2 * curvature / math.pi) + curvature * eps**2 / 2
    return 0.5 * math.log1p(snr) - drop


def descent(eps: float, steps: int = 3) -> PGD:
    return PGD(eps=eps, step_size=eps / 2, steps=steps, clip=(-1e6, 1e6))


@pytest.mark.parametrize(
    ("snr", "eps", "critic_grad"),
    [(1.0, 0.1, "full"), (1.0, 1.0, "full"), (3.0, 0.5, "full"), (3.0, 0.5, "encoder_only")],
)
def test_the_attack_reaches_the_analytic_minimum(
    snr: float, eps: float, critic_grad: CriticGrad
) -> None:
    config = CriticConfig(batch_size=1000, critic_grad=critic_grad)
    critic, x = Critic(Powers(), LogRatio(snr)), channel(snr, 8000)
    clean, attacked = (
        torch.tensor(evaluate_critic(Sum(), critic, x, config, attack=attack).values)
        for attack in (None, descent(eps))
    )
    error = float(attacked.std()) / math.sqrt(len(attacked))
    truth = 0.5 * math.log1p(snr)
    assert abs(float(clean.mean()) - truth) < 4 * error
    assert abs(float(attacked.mean()) - analytic_minimum(snr, eps)) < 4 * error
    # The same images twice, so that the drop is known far better: 2 % of it is the tolerance.
    drop = truth - analytic_minimum(snr, eps)
    assert float((clean - attacked).mean()) == pytest.approx(drop, rel=0.02)


def test_one_short_step_does_not_reach_the_analytic_minimum() -> None:
    config, critic = CriticConfig(batch_size=1000), Critic(Powers(), LogRatio(1.0))
    x = channel(1.0, 4000)
    values = evaluate_critic(Sum(), critic, x, config, attack=descent(0.5, steps=1)).values
    assert sum(values) / len(values) > analytic_minimum(1.0, 0.5) + 0.1


@pytest.mark.parametrize("eps", [0.2, 0.7])
def test_the_attack_reaches_a_small_batch_s_minimum(eps: float) -> None:
    n, critic, x = 8, Critic(Powers(), LogRatio(1.0)), channel(1.0, 8)
    places = torch.tensor(list(itertools.product([-eps, 0.0, eps], repeat=n)))
    z = (Sum()(x)[:, 0] + places)[:, :, None]
    scores = torch.vmap(lambda z: reference.scores(critic.global_(z), critic.local(x)))(z)
    least = float(torch.vmap(reference.dv)(scores).min())
    attacked = attack_information(
        Sum(), critic, x, descent(eps), CriticConfig(batch_size=n), shifts=None
    )
    found = reference.dv(
        reference.scores(critic.global_(Sum()(attacked)), folded(critic.local)(x))
    ).item()
    clean = reference.dv(reference.scores(critic.global_(Sum()(x)), critic.local(x))).item()
    assert found == pytest.approx(least, abs=0.02 * (clean - least))
