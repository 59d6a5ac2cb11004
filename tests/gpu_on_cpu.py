"""The GPU back ends as test-only back ends for CPU tensors: CUDA's sources emulated, Triton's
interpreted. Importing this module puts them into the registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import build, control
from hypothesis import assume
from oracle import EAGER_IMPLS

from wcmi_fast.backends import cuda, registry, triton

EMULATED, INTERPRETED = "cuda_emulated", "triton_interpreted"
SEEDS = (0, 1, 2, 3)


@cache
def binary() -> ModuleType:
    """The emulated module; built at the first use."""
    return build.load("plain")


class _Later:
    """The functions of the emulated module, of which only a call needs it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(binary(), name)


def _interpreted(schema: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        # Not above: it changes the parts of one version of Triton, and imports it.
        import triton_interpreter

        triton_interpreter.enable()
        return triton.KERNELS[schema](*arguments)

    return kernel


registry.BACKENDS[EMULATED] = cuda.BACKEND._replace(
    device_type="cpu", kernels=cuda.kernels_of(_Later()), missing=build.why_not()
)
registry.BACKENDS[INTERPRETED] = triton.BACKEND._replace(
    device_type="cpu", kernels={schema: _interpreted(schema) for schema in triton.KERNELS}
)

# Parameters of tests: skipped, with the reason, where the emulation cannot be built.
emulated = pytest.param(
    EMULATED,
    marks=pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
)


@contextmanager
def order(impl: str, seed: int) -> Iterator[None]:
    """Run blocks and threads in the order of a seed, where impl is emulated."""
    with control.seed(binary(), seed) if impl == EMULATED else nullcontext():
        yield


every_impl = pytest.mark.parametrize("impl", [*EAGER_IMPLS, emulated])
# Both GPU back ends, the emulated one in several orders of blocks and threads.
gpu_turns = pytest.mark.parametrize(
    ("impl", "turn"),
    [*(pytest.param(EMULATED, seed, marks=emulated.marks) for seed in SEEDS), (INTERPRETED, 0)],
)


def assume_supported(impl: str, dtype: torch.dtype) -> None:
    """Have hypothesis draw another case where a back end has no kernels for the dtype."""
    assume(impl != INTERPRETED or dtype != torch.float64)


# Every back end with kernels, for operators that are called by themselves.
every_kernel = pytest.mark.parametrize("impl", ["cpu", emulated, INTERPRETED])
