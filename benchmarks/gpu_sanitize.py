"""Call every GPU operator once or twice on small odd sizes, for compute-sanitizer to watch.

`compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py`. Results are compared with the
reference on the CPU. Without a GPU, --cpu calls the CPU's kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

# Each tensor an allocation of its own, so that the next one's memory is out of bounds.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

from wcmi_fast import functional
from wcmi_fast.backends import registry

# Operands on the CPU, and the results of a back end on operands of any device.
Operation = Callable[..., Sequence[Tensor]]

SIZES = [(5, 3, 7), (17, 2, 33), (18, 9, 65)]
NAMES = ("dv", "jsd", "smile", "X2", "W1")
EPS, STEP = 0.1, 0.05
# bfloat16 takes the same path as float16, with fewer steps.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3}


def critic_stats(impl: str | None, *inputs: Tensor) -> list[Tensor]:
    """Return every statistic of (z, h) or (scores,), and the gradients of their sum."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    given = {"scores": leaves[0]} if len(leaves) == 1 else dict(zip("zh", leaves, strict=True))
    stats = functional.critic_stats(which=NAMES, tau=1.5, impl=impl, **given)
    values = [stats.positives, stats.lse, stats.softplus, stats.sum, stats.square]
    found = [value for value in values if value is not None]
    return [*found, *torch.autograd.grad([x.sum() for x in found], leaves)]


def dv(impl: str | None, z: Tensor, h: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (z, h)]
    value = functional.dv(*leaves, diagonal="zero", impl=impl)
    return [value, *torch.autograd.grad(value, leaves)]


def critic_tail(impl: str | None, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    features = functional.critic_tail(*leaves, impl=impl)
    # Not the features' squares, of which a layer norm leaves no gradient.
    weights = torch.linspace(-1, 1, features.numel(), device=features.device).view_as(features)
    return [features, *torch.autograd.grad(features, leaves, weights.to(features))]


def linf_step(impl: str | None, x: Tensor, grad: Tensor, origin: Tensor) -> list[Tensor]:
    return [functional.linf_step_(x.clone(), grad, origin, eps=EPS, step_size=STEP, impl=impl)]


def linf_start(impl: str | None, x: Tensor, grad: Tensor, origin: Tensor) -> list[Tensor]:
    return [functional.linf_start_(x.clone(), origin, eps=EPS, seed=7, impl=impl)]


def l2_step(impl: str | None, x: Tensor, grad: Tensor, origin: Tensor) -> list[Tensor]:
    return [functional.l2_step_(x.clone(), grad, origin, eps=EPS, step_size=STEP, impl=impl)]


def keep_best(impl: str | None, x: Tensor, grad: Tensor, origin: Tensor) -> list[Tensor]:
    best, value, new = x.clone(), origin[:, 0].clone(), grad[:, 0].clone()
    functional.keep_best_(best, value, origin, new, impl=impl)
    return [best, value]


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]


def cases() -> list[tuple[str, Operation, list[Tensor]]]:
    """Return (operator, its call, float32 operands) with sizes beside those of tiles."""
    steps = [_normal(*3 * [shape]) for shape in ((1, 1), (3, 37), (2, 2051))]
    tail = ((19, 5), (33, 5), (33,), (33, 33), (33,), (33, 5))
    return [
        *(("critic_stats", critic_stats, _normal((n, u), (n, p, u))) for n, p, u in SIZES),
        *(("critic_stats", dv, _normal((n, u), (n, p, u))) for n, p, u in SIZES[:1]),
        *(("score_stats", critic_stats, _normal((n, n, p))) for n, p, _ in SIZES),
        ("critic_tail", critic_tail, _normal(*tail)),
        *(("linf_step_", linf_step, x) for x in steps),
        *(("linf_start_", linf_start, x) for x in steps),
        *(("l2_step_", l2_step, x) for x in steps),
        *(("keep_best_", keep_best, x) for x in steps),
    ]


def check(
    operation: Operation, impl: str, device: str, dtype: torch.dtype, operands: list[Tensor]
) -> None:
    """Compare a back end's results with the reference's; both from operands of the dtype."""
    narrow = [x.to(dtype) for x in operands]
    found = operation(impl, *(x.to(device) for x in narrow))
    for ours, wanted in zip(found, operation("reference", *narrow), strict=True):
        scale = max(1.0, wanted.float().abs().max().item())
        error = (ours.detach().cpu().float() - wanted.float()).abs().max().item()
        assert error <= TOLERANCES[dtype] * scale, f"{impl} {dtype}: error {error:.2e}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Call every GPU operator on small odd sizes.")
    parser.add_argument("--impl", nargs="*", default=["cuda", "triton"])
    parser.add_argument("--cpu", action="store_true", help="the CPU's kernels, for a test")
    return parser.parse_args()


def main() -> int:
    """Call what is installed; 1 where a result is wrong, or nothing is there to be called."""
    given = arguments()
    device, impls = ("cpu", ["cpu"]) if given.cpu else ("cuda", given.impl)
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_sanitize: torch sees no GPU; --cpu calls the CPU's kernels", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    count = 0
    for operator, operation, operands in cases():
        like = torch.empty(0, device=device)
        for impl in impls:
            for dtype in TOLERANCES:
                like = like.to(dtype)
                if registry.why_not(impl, operator, registry.case_of(like)) is None:
                    check(operation, impl, device, dtype, operands)
                    count += 1
    print(f"{count} calls of {', '.join(impls)} agree with the reference")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
