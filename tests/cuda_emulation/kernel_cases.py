"""Small cases of every kernel of csrc/cuda, by numpy alone: they also run under sanitizers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from cuda_emulation import control
from cuda_emulation.build import import_from

# The enum DType of csrc/kernels.h.
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
STORAGE = {FLOAT32: np.float32, FLOAT64: np.float64, BFLOAT16: np.uint16, FLOAT16: np.float16}
ALL, LSE = 31, 1
HERE = (0, 0)  # device and stream


def accumulation(dtype: int) -> type:
    return np.float64 if dtype == FLOAT64 else np.float32


def stored(values: np.ndarray, dtype: int, offset: int = 0) -> np.ndarray:
    """Return a copy in a buffer of its own, `offset` elements after an aligned address."""
    if dtype == BFLOAT16:
        values = values.astype(np.float32).view(np.uint32) >> 16
    buffer = np.empty(values.size + offset, STORAGE[dtype])
    buffer[offset:] = values.ravel()
    return buffer[offset:]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def addresses(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def linf_step(module: ModuleType, dtype: int, count: int, offset: int) -> list[np.ndarray]:
    x, grad, origin = random(3, count)
    grad[::7], grad[1::7] = np.nan, 0
    x, grad, origin = (stored(a, dtype, offset) for a in (x, grad, origin))
    step = (0.25, 0.125, -1.0, 1.0, *HERE)
    module.linf_step(dtype, *addresses(x, grad, origin), count, *step)
    return [x]


def linf_start(module: ModuleType, dtype: int, count: int, offset: int) -> list[np.ndarray]:
    x, origin = stored(np.zeros(count), dtype, offset), stored(random(count), dtype, offset)
    module.linf_start(dtype, *addresses(x, origin), count, 0.25, 7, -1.0, 1.0, *HERE)
    return [x]


def l2_step(module: ModuleType, dtype: int, rows: int, size: int) -> list[np.ndarray]:
    x, grad, origin = random(3, rows, size)
    grad[0, size // 2] = np.nan
    x, grad, origin = (stored(a, dtype) for a in (x, grad, origin))
    module.l2_step(dtype, *addresses(x, grad, origin), rows, size, 0.5, 0.25, -1.0, 1.0, *HERE)
    return [x]


def keep_best(module: ModuleType, dtype: int, rows: int, size: int) -> list[np.ndarray]:
    best, x = (stored(a, dtype) for a in random(2, rows, size))
    best_value, value = random(2, rows)
    best_value[::2] = np.nan
    best_value, value = stored(best_value, dtype), stored(value, dtype)
    row_bytes = best.nbytes // rows
    module.keep_best(dtype, *addresses(best, best_value, x, value), rows, row_bytes, *HERE)
    return [best, best_value]


def critic_stats(module: ModuleType, dtype: int, n: int, p: int, u: int) -> list[np.ndarray]:
    wide = accumulation(dtype)
    z, h = stored(random(n, u), dtype), stored(random(n, p, u), dtype)
    stats, d = np.full((6, n, p), np.nan, wide), random(6, n, p).astype(wide)
    module.critic_stats_fwd(dtype, *addresses(z, h), n, p, u, ALL, 2.0, stats.ctypes.data, *HERE)
    dz, dh = stored(np.zeros(n * u), dtype), stored(np.zeros(n * p * u), dtype)
    sums = np.empty(module.critic_stats_bwd_parts(n, p) * n * u, wide)
    module.critic_stats_bwd(
        dtype, *addresses(d, z, h, stats[1]), n, p, u, ALL, *addresses(dz, dh, sums), *HERE
    )
    return [stats, dz, dh]


def score_stats(module: ModuleType, dtype: int, n: int, p: int) -> list[np.ndarray]:
    wide = accumulation(dtype)
    scores = stored(3 * random(n, n, p), dtype)
    stats, d = np.full((6, n, p), np.nan, wide), random(6, n, p).astype(wide)
    module.score_stats_fwd(dtype, scores.ctypes.data, n, p, ALL, 2.0, stats.ctypes.data, *HERE)
    dscores = stored(np.zeros(n * n * p), dtype)
    module.score_stats_bwd(
        dtype, *addresses(d, scores, stats[1]), n, p, ALL, dscores.ctypes.data, *HERE
    )
    return [stats, dscores]


def dv_value(module: ModuleType, dtype: int, n: int, p: int) -> list[np.ndarray]:
    positives, lse = (stored(a, dtype) for a in random(2, n, p))
    value, dlse = stored(np.zeros(1), dtype), stored(np.zeros(n * p), dtype)
    for zero_diagonal in (False, True):
        module.dv_value(
            dtype, *addresses(positives, lse), n, p, zero_diagonal, *addresses(value, dlse), *HERE
        )
    return [value, dlse]


CASES = [
    *((linf_step, dtype, 1003, 0) for dtype in STORAGE),
    (linf_step, FLOAT32, 37, 1),
    (linf_step, FLOAT16, 37, 1),
    *((linf_start, dtype, 1003, 0) for dtype in STORAGE),
    (linf_start, FLOAT32, 38, 1),
    *((l2_step, dtype, 3, 70) for dtype in STORAGE),
    (l2_step, FLOAT32, 2, 2056),
    (l2_step, FLOAT16, 2, 4104),
    (keep_best, FLOAT32, 5, 40),
    (keep_best, FLOAT16, 5, 37),
    (keep_best, FLOAT64, 5, 601),
    (critic_stats, FLOAT32, 18, 3, 40),
    (critic_stats, FLOAT16, 17, 16, 5),
    (critic_stats, FLOAT64, 5, 1, 33),
    (score_stats, FLOAT32, 18, 3),
    (score_stats, FLOAT16, 9, 16),
    (score_stats, BFLOAT16, 3, 300),
    (dv_value, FLOAT32, 18, 3),
    (dv_value, FLOAT64, 3, 300),
]


def results(module: ModuleType, only: str) -> Iterator[tuple[str, np.ndarray]]:
    """Run the cases whose function is named, or all, and name each result."""
    for function, *arguments in CASES:
        if only not in ("all", function.__name__):
            continue
        for k, result in enumerate(function(module, *arguments)):
            yield f"{function.__name__}{tuple(arguments)}[{k}]", result


def main(only: str, seeds: str, to: str) -> None:
    """Write the results under every seed to a file of numpy's."""
    module = import_from(Path(os.environ["WCMI_EMULATION_MODULE"]))
    found = {}
    for seed in map(int, seeds.split(",")):
        with control.seed(module, seed):
            found |= {f"seed {seed}: {name}": r for name, r in results(module, only)}
    np.savez(to, **{name: np.array(result) for name, result in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
