"""The ground truth's distributions: their information, and samples that have it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, multivariate_t
from torch import Tensor

from wcmi_fast.experiments import distributions
from wcmi_fast.experiments.distributions import TASKS, Task, staircase

# Spec section 8, in nats.
PUBLISHED = {
    "1v1-normal-0.75": 0.4133,
    "dense-2": 0.2939,
    "dense-3": 0.4133,
    "dense-5": 0.5928,
    "dense-25": 1.2922,
    "dense-50": 1.6243,
    "sparse-2": 1.0217,
    "sparse-3": 1.0217,
    "sparse-5": 1.0217,
    "sparse-25": 1.0217,
    "student-5-5-2": 0.4482,
    "half-cube-sparse-3": 1.0217,
    "half-cube-sparse-5": 1.0217,
    "normal-cdf-sparse-3": 1.0217,
    "normal-cdf-sparse-5": 1.0217,
    "spiral-sparse-3": 1.0217,
    "spiral-sparse-5": 1.0217,
}
N = 20_000


def correlations(x: Tensor, y: Tensor) -> np.ndarray:
    return np.corrcoef(torch.cat([x, y], 1).double().numpy(), rowvar=False)


def back(task: Task, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Undo a task's transform."""
    if task.name.startswith("half-cube"):
        return x.sign() * x.abs() ** (2 / 3), y.sign() * y.abs() ** (2 / 3)
    if task.name.startswith("normal-cdf"):
        return torch.special.ndtri(x.double()), torch.special.ndtri(y.double())
    if task.name.startswith("spiral"):
        dim = x.shape[1]
        return (
            distributions.spiral(x, (0, 1), -1 / dim),
            distributions.spiral(y, (1, 2), -1 / dim),
        )
    return x, y


def test_the_information_is_the_published_one() -> None:
    assert {name: round(task.information, 4) for name, task in TASKS.items()} == PUBLISHED


@pytest.mark.parametrize("name", TASKS)
def test_samples_have_the_dimensions_and_follow_the_seed(name: str) -> None:
    task = TASKS[name]
    x, y = task.sample(7, 3)
    assert (x.shape, y.shape) == ((7, task.dims[0]), (7, task.dims[1]))
    assert x.dtype == y.dtype == torch.float32
    again = task.sample(7, 3)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert not any(torch.equal(x, task.sample(7, seed)[0]) for seed in (0, 1, 2, 4))


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("student")])
def test_samples_without_their_transform_are_normal_and_have_that_information(name: str) -> None:
    """Of normal variables the correlations tell the information."""
    task = TASKS[name]
    x, y = back(task, *task.sample(N, 0))
    every = torch.cat([x, y], 1)
    assert every.mean(0).abs().max() < 0.04
    assert (every.var(0) - 1).abs().max() < 0.05
    assert ((every**4).mean(0) - 3).abs().max() < 0.5
    found = distributions.normal_information(torch.from_numpy(correlations(x, y)), task.dims[0])
    dims = task.dims[0] * task.dims[1]
    # An estimated correlation matrix tells about dims / 2N too much.
    assert found - dims / (2 * N) == pytest.approx(task.information, abs=0.03)


def test_correlations_are_where_the_names_say() -> None:
    rho = correlations(*TASKS["1v1-normal-0.75"].sample(N, 0))
    assert rho[0, 1] == pytest.approx(0.75, abs=0.02)
    rho = correlations(*TASKS["dense-5"].sample(N, 0))
    assert rho == pytest.approx(np.full((10, 10), 0.5) + 0.5 * np.eye(10), abs=0.03)
    rho = correlations(*TASKS["sparse-5"].sample(N, 0))
    wanted = np.eye(10)
    wanted[[0, 1, 5, 6], [5, 6, 0, 1]] = 0.8
    assert rho == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("name", ["half-cube-sparse-5", "normal-cdf-sparse-5", "spiral-sparse-5"])
def test_a_transform_changes_samples_and_can_be_undone(name: str) -> None:
    task, base = TASKS[name], TASKS["sparse-5"]
    x, y = task.sample(500, 0)
    original = base.sample(500, 0)
    assert (x - original[0]).abs().mean() > 0.2
    assert (y - original[1]).abs().mean() > 0.2
    for found, wanted in zip(back(task, x, y), original, strict=True):
        assert found.double() == pytest.approx(wanted.double(), abs=1e-3)


def test_transforms_have_the_marginals_of_their_names() -> None:
    x, _ = TASKS["normal-cdf-sparse-5"].sample(N, 0)
    shares = torch.histc(x[:, 3], bins=10, min=0, max=1) / N
    assert shares == pytest.approx(torch.full((10,), 0.1), abs=0.012)
    v = torch.tensor([[4.0, -9.0, 0.0]])
    assert torch.equal(distributions.half_cube(v), torch.tensor([[8.0, -27.0, 0.0]]))
    quarter = distributions.spiral(torch.tensor([[2.0, 0.0, 5.0]]), (0, 1), math.pi / 2 / 29)
    assert quarter == pytest.approx(torch.tensor([[0.0, -2.0, 5.0]]), abs=1e-6)


def test_student_samples_are_student() -> None:
    """|v|^2 / d of a Student vector has an F distribution, and x tells |y|."""
    from scipy.stats import f

    x, y = (side.double() for side in TASKS["student-5-5-2"].sample(N, 0))
    for v, dim in ((x, 5), (torch.cat([x, y], 1), 10)):
        shares = f.cdf((v.square().sum(1) / dim).numpy(), dim, 2)
        assert np.histogram(shares, 10, (0, 1))[0] / N == pytest.approx(np.full(10, 0.1), abs=0.012)
    assert abs(correlations(x.sign(), y.sign()) - np.eye(10)).max() < 0.04
    assert correlations(x.norm(dim=1).log()[:, None], y.norm(dim=1).log()[:, None])[0, 1] > 0.6


@pytest.mark.parametrize(("dims", "df"), [((5, 5), 2), ((1, 3), 4), ((2, 2), 1)])
def test_students_information_is_the_mean_log_ratio_of_densities(
    dims: tuple[int, int], df: int
) -> None:
    x, y = (side.double().numpy() for side in distributions.student(*dims, df).sample(N, 1))
    densities = [multivariate_t(shape=np.eye(dim), df=df) for dim in (*dims, sum(dims))]
    ratios = (
        densities[2].logpdf(np.hstack([x, y])) - densities[0].logpdf(x) - densities[1].logpdf(y)
    )
    error = ratios.std() / math.sqrt(N)
    found = distributions.student_information(*dims, df)
    assert ratios.mean() == pytest.approx(found, abs=4 * error)
    assert error < 0.06 * found


@given(st.floats(-0.95, 0.95), st.integers(1, 3))
def test_normal_information_is_that_of_independent_pairs(rho: float, dim: int) -> None:
    covariance = torch.eye(2 * dim, dtype=torch.float64) * 4
    for i in range(dim):
        covariance[i, dim + i] = covariance[dim + i, i] = 4 * rho
    found = distributions.normal_information(covariance, dim)
    assert found == pytest.approx(-dim / 2 * math.log1p(-(rho**2)), abs=1e-9)


def test_normal_information_is_the_mean_log_ratio_of_densities() -> None:
    covariance = torch.tensor([[2.0, 0.5, 0.6], [0.5, 1.0, -0.2], [0.6, -0.2, 1.5]])
    task = distributions.normal("any", covariance, 1)
    x, y = (side.double().numpy() for side in task.sample(N, 0))
    sigma = covariance.double().numpy()
    ratios = (
        multivariate_normal(cov=sigma).logpdf(np.hstack([x, y]))
        - multivariate_normal(cov=sigma[:1, :1]).logpdf(x)
        - multivariate_normal(cov=sigma[1:, 1:]).logpdf(y)
    )
    error = ratios.std() / math.sqrt(N)
    assert ratios.mean() == pytest.approx(task.information, abs=4 * error)


@pytest.mark.parametrize("information", [0.0, 2.0, 10.0])
def test_a_stair_has_the_information_asked_for(information: float) -> None:
    task = staircase(information)
    assert task.information == pytest.approx(information, abs=1e-9)
    assert task.dims == (20, 20)
    rho = math.sqrt(1 - math.exp(-2 * information / 20))
    found = correlations(*task.sample(N, 0))
    wanted = np.eye(40) + rho * (np.eye(40, k=20) + np.eye(40, k=-20))
    assert found == pytest.approx(wanted, abs=0.04)


def test_a_cubic_stair_cubes_y() -> None:
    x, y = staircase(6.0).sample(50, 0)
    same, cubed = staircase(6.0, cubic=True).sample(50, 0)
    assert torch.equal(x, same)
    assert cubed == pytest.approx(y**3, rel=1e-4)
    assert staircase(6.0, cubic=True).information == pytest.approx(6.0)
