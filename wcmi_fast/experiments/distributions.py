"""Pairs of random vectors whose mutual information is known in closed form (spec section 8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A joint distribution of x and y.

    Attributes:
        name: as in `TASKS`.
        dims: sizes of x and of y.
        information: I(x; y) in nats.
        draw: (n, generator) -> x (n, dims[0]) and y (n, dims[1]), float64.
    """

    name: str
    dims: tuple[int, int]
    information: float
    draw: Draw

    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw n pairs: x (n, dims[0]) and y (n, dims[1]), float32; the same for the same seed."""
        x, y = self.draw(n, torch.Generator().manual_seed(seed))
        return x.float(), y.float()


def normal(name: str, covariance: Tensor, dim_x: int) -> Task:
    """Return the normal distribution of mean 0; x is its first components.

    Args:
        name: the task's.
        covariance: (D, D), positive definite.
        dim_x: size of x, 1 to D - 1.

    Source: I = (log |S_x| + log |S_y| - log |S|) / 2.
    """
    covariance = covariance.double()
    root: Tensor = torch.linalg.cholesky(covariance)
    dims = (dim_x, len(covariance) - dim_x)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = (_normals(n, len(root), generator) @ root.t()).split(dims, 1)
        return x, y

    return Task(name, dims, normal_information(covariance, dim_x), draw)


def normal_information(covariance: Tensor, dim_x: int) -> float:
    """Return the information, in nats, between the first dim_x normal variables and the others."""
    parts = covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance
    x, y, both = (float(torch.logdet(part.double())) for part in parts)
    return (x + y - both) / 2


def bivariate(rho: float = 0.75) -> Task:
    """Return two standard normal variables of correlation rho: I = -log(1 - rho^2) / 2."""
    return normal(f"1v1-normal-{rho:g}", torch.tensor([[1.0, rho], [rho, 1.0]]), 1)


def dense(dim: int, rho: float = 0.5) -> Task:
    """Return standard normal vectors (dim each), every two components of correlation rho."""
    covariance = torch.full((2 * dim, 2 * dim), rho).fill_diagonal_(1.0)
    return normal(f"dense-{dim}", covariance, dim)


def sparse(dim: int, pairs: int = 2, strength: float = 2.0) -> Task:
    """Return standard normal vectors (dim each); x_i and y_i are correlated for i < pairs.

    Each variable of a pair is the pair's signal times strength, plus noise of variance 1, scaled to
    variance 1: rho = strength^2 / (1 + strength^2), 0.8 for strength 2.
    """
    covariance, rho = torch.eye(2 * dim), strength**2 / (1 + strength**2)
    for i in range(pairs):
        covariance[i, dim + i] = covariance[dim + i, i] = rho
    return normal(f"sparse-{dim}", covariance, dim)


def student(dim_x: int, dim_y: int, df: int) -> Task:
    """Return the multivariate Student distribution whose dispersion is the identity.

    Components are uncorrelated and share one random scale, which alone is what x tells of y.
    """
    dims = (dim_x, dim_y)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        normals = _normals(n, dim_x + dim_y, generator)
        chi_square = _normals(n, df, generator).square().sum(1, keepdim=True)
        x, y = (normals * (df / chi_square).sqrt()).split(dims, 1)
        return x, y

    return Task(f"student-{dim_x}-{dim_y}-{df}", dims, student_information(dim_x, dim_y, df), draw)


def student_information(dim_x: int, dim_y: int, df: float) -> float:
    """Return the information, in nats, between the parts of a Student vector; dispersion identity.

    h(x) + h(y) - h(x, y), where a vector of d components has the entropy h_d below and
    d log(pi df) / 2, which cancels. For another dispersion add `normal_information` of it.

    Source: Czyz et al. 2023, appendix; Arellano-Valle et al. 2013.
    """

    def entropy(dim: int) -> float:
        upper, lower = (df + dim) / 2, df / 2
        density = math.lgamma(upper) - math.lgamma(lower)
        return upper * (_digamma(upper) - _digamma(lower)) - density

    return entropy(dim_x) + entropy(dim_y) - entropy(dim_x + dim_y)


def transformed(prefix: str, task: Task, of_x: Map, of_y: Map) -> Task:
    """Return a task whose x and y go through invertible maps, which leave I unchanged."""

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = task.draw(n, generator)
        return of_x(x), of_y(y)

    return Task(f"{prefix}-{task.name}", task.dims, task.information, draw)


def half_cube(v: Tensor) -> Tensor:
    """Map every component v to v |v|^(1/2), which makes the tails heavy."""
    return v * v.abs().sqrt()


def normal_cdf(v: Tensor) -> Tensor:
    """Map every component to its normal probability, uniform in (0, 1)."""
    found: Tensor = torch.special.ndtr(v)
    return found


def spiral(v: Tensor, plane: tuple[int, int], speed: float) -> Tensor:
    """Turn v (N, D) in the plane of two components, by speed |v|^2 radians.

    |v| does not change, so that turning back by the same angle is the inverse.
    """
    i, j = plane
    angle = speed * v.square().sum(1)
    cos, sin = angle.cos(), angle.sin()
    turned = v.clone()
    turned[:, i] = cos * v[:, i] + sin * v[:, j]
    turned[:, j] = cos * v[:, j] - sin * v[:, i]
    return turned


def half_cubed(task: Task) -> Task:
    """Return a task after `half_cube` of x and y."""
    return transformed("half-cube", task, half_cube, half_cube)


def normal_cdfed(task: Task) -> Task:
    """Return a task after `normal_cdf` of x and y."""
    return transformed("normal-cdf", task, normal_cdf, normal_cdf)


def spiralled(task: Task) -> Task:
    """Return a task after `spiral` of x in components 0 and 1, and of y in 1 and 2.

    The speed is 1 / D, so that the angle is about 1 whatever D.
    """
    x, y = task.dims
    return transformed(
        "spiral", task, lambda v: spiral(v, (0, 1), 1 / x), lambda v: spiral(v, (1, 2), 1 / y)
    )


def staircase(information: float, dim: int = 20, *, cubic: bool = False) -> Task:
    """Return a stair of Poole et al.: x_i and y_i are normal with a correlation that gives I.

    Args:
        information: I in nats, 0 or more.
        dim: components of x and of y.
        cubic: whether y is cubed.

    Source: Poole et al. 2019, section 4; spec section 8.
    """
    rho = math.sqrt(-math.expm1(-2 * information / dim))
    covariance = torch.eye(2 * dim, dtype=torch.float64)
    for i in range(dim):
        covariance[i, dim + i] = covariance[dim + i, i] = rho
    task = normal(f"staircase-{information:g}", covariance, dim)
    return transformed("cubic", task, lambda v: v, lambda v: v**3) if cubic else task


def _digamma(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).digamma())


def _normals(n: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        bivariate(),
        *map(dense, (2, 3, 5, 25, 50)),
        *map(sparse, (2, 3, 5, 25)),
        student(5, 5, 2),
        *(
            transform(sparse(dim))
            for transform in (half_cubed, normal_cdfed, spiralled)
            for dim in (3, 5)
        ),
    )
}
