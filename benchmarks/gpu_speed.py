"""Time every operator on a GPU against eager torch, torch.compile and the roofline.

`python benchmarks/gpu_speed.py --out FOLDER --seconds 120` writes speed.json and speed.md; --cpu
runs the same program on tiny sizes without a GPU, so that it cannot fail on a typo where time is
short. Needs nothing but torch and wcmi_fast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_model import DEVICES, Device, Work, backward_work, critic_stats_work, tail_work
from torch import Tensor
from torch.nn.functional import layer_norm

from wcmi_fast import PGD, functional, reference
from wcmi_fast.backends import registry
from wcmi_fast.models import BaselineH, DotCritic
from wcmi_fast.models.folding import folded

Call = Callable[[], Any]
Program = Callable[..., Any]

# Published figures, by a part of the name that torch gives the device.
PUBLISHED = {
    "H200": DEVICES["H100"]._replace(bandwidth=4.8e12),
    "H100 80GB HBM3": DEVICES["H100"],
    "A100-SXM4-80GB": DEVICES["A100"],
}
# dtype, torch's float32 matmul precision, the type of products in gpu_model.py, and how far results
# may be from the exact ones beside twice the error of eager torch.
KINDS: dict[str, tuple[torch.dtype, str, str, float]] = {
    "bf16": (torch.bfloat16, "high", "half", 2e-2),
    "fp32 high": (torch.float32, "high", "tf32", 4e-3),
    "fp32 highest": (torch.float32, "highest", "ieee", 1e-5),
    "fp16": (torch.float16, "high", "half", 4e-3),
}
EPS, STEP, CLIP, SEED = 8 / 255, 2 / 255, (0.0, 1.0), 7
L2_EPS, L2_STEP = 0.5, 0.1


class Machine(NamedTuple):
    """Where the times are taken, and what is known of it."""

    device: torch.device
    name: str
    impls: tuple[str, ...]
    roofline: Device
    source: str
    copy_bandwidth: float

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


class Case(NamedTuple):
    """One case: variants that compute the same, their check, and the least work it takes.

    host: whether the time in which the host launches is part of the figure.
    """

    op: str
    sizes: str
    kind: str
    variants: dict[str, Call]
    check: Call
    work: Work
    host: bool = False


class Later(NamedTuple):
    """A case that is built, and compiled, only when its turn comes."""

    name: str
    kind: str
    build: Callable[[Machine], Case]


# ---- clocks -------------------------------------------------------------------------------------


def sampler(machine: Machine) -> Callable[[Call, bool], float]:
    """Return a function that times one call, in seconds, the second-level cache flushed."""
    if not machine.is_gpu:
        return _sample_on_cpu
    size = 2 * getattr(torch.cuda.get_device_properties(machine.device), "L2_cache_size", 1 << 26)
    flush = torch.empty(max(size, 1 << 26), dtype=torch.uint8, device=machine.device)
    return partial(_sample_on_gpu, flush)


def _sample_on_cpu(call: Call, host: bool) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _sample_on_gpu(flush: Tensor, call: Call, host: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.fill_(1)
    if host:
        torch.cuda.synchronize()
    else:
        # The GPU waits for longer than the host takes to launch: launches are no part of the time.
        torch.cuda._sleep(4_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def interleaved(
    variants: dict[str, Call], sample: Callable[[Call], float], seconds: float
) -> dict[str, list[float]]:
    """Return samples of every variant, 5 to 25, in rounds that rotate their order."""
    names = list(variants)
    for name in names:
        for _ in range(2):
            sample(variants[name])
    slowest = sum(sample(variants[name]) for name in names)
    rounds = min(25, max(5, int(seconds / max(slowest, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for k in range(len(names)):
            name = names[(index + k) % len(names)]
            times[name].append(sample(variants[name]))
    return times


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Return the bytes that a call allocates at its peak, its results among them."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


# ---- the machine --------------------------------------------------------------------------------


def machine_of(cpu: bool) -> Machine:
    """Return the GPU, with published figures if there are some, else measured ones; or the CPU."""
    device = torch.device("cpu" if cpu else "cuda")
    name = "CPU, tiny sizes" if cpu else torch.cuda.get_device_name()
    bare = Machine(device, name, ("cpu", "reference"), DEVICES["H100"], "", 0.0)
    if not cpu:
        bare = bare._replace(impls=("cuda", "triton"))
    bandwidth = _copy_bandwidth(bare)
    known = next((figures for part, figures in PUBLISHED.items() if part in name), None)
    if known is not None:
        return bare._replace(roofline=known, source="published", copy_bandwidth=bandwidth)
    flops = {kind: _product_rate(bare, *KINDS[label][:2]) for label, kind in _labels().items()}
    measured = Device(bandwidth, flops, 0)
    return bare._replace(roofline=measured, source="measured", copy_bandwidth=bandwidth)


def _labels() -> dict[str, str]:
    return {"bf16": "half", "fp32 high": "tf32", "fp32 highest": "ieee"}


def _copy_bandwidth(machine: Machine) -> float:
    """Return bytes read and written per second by a copy of 1 GiB; on the CPU of 1 MiB."""
    x = torch.ones(1 << (28 if machine.is_gpu else 18), device=machine.device)
    y, sample = torch.empty_like(x), sampler(machine)
    return 2 * x.nbytes / min(sample(lambda: y.copy_(x), False) for _ in range(5))


def _product_rate(machine: Machine, dtype: torch.dtype, precision: str) -> float:
    """Return operations per second of a large product of torch's."""
    size, sample = 8192 if machine.is_gpu else 128, sampler(machine)
    a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
    with matmul_precision(precision):
        return 2 * size**3 / min(sample(lambda: a @ b, False) for _ in range(5))


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- what cases are made of ---------------------------------------------------------------------


def normal(machine: Machine, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=machine.device).to(dtype)


def compiled(machine: Machine, program: Program, *args: Tensor) -> dict[str, Program]:
    """Return torch.compile's form of a program by its name; nothing where that fails."""
    function: Program = torch.compile(
        program, backend="inductor" if machine.is_gpu else "aot_eager", dynamic=False
    )
    try:
        function(*args)
    except Exception as error:
        print(f"torch.compile does not run here: {error}", file=sys.stderr)
        return {}
    return {"compiled": function}


def able(machine: Machine, operator: str, like: Tensor, **sizes: int) -> list[str]:
    """Return the back ends that can run an operator on tensors like this one."""
    case = registry.case_of(like, **sizes)
    return [
        impl
        for impl in machine.impls
        if impl == registry.REFERENCE or registry.why_not(impl, operator, case) is None
    ]


def check_twice(
    found: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float
) -> None:
    """Check |found - exact| <= 2 |eager - exact| + tolerance |exact|, in the 2-norm."""
    for k, (a, b, c) in enumerate(zip(found, eager, exact, strict=True)):
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm()
        allowed += tolerance * c.norm()
        assert error <= allowed, f"result {k}: error {error:.2e}, allowed {allowed:.2e}"


def gradients(program: Program, *leaves: Tensor) -> list[Tensor]:
    value = program(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


# ---- bounds -------------------------------------------------------------------------------------


def eager_dv(z: Tensor, h: Tensor) -> Tensor:
    """dv as it is mostly written: the product in the inputs' dtype, all else in float32."""
    n, p, u = h.shape
    T = (z @ h.reshape(n * p, u).t()).view(n, n, p)
    return reference.dv(T.float() if T.dtype != torch.float64 else T)


def dv_case(machine: Machine, sizes: tuple[int, int, int], kind: str, others: str) -> Case:
    """Return dv and its gradients to z and h; others: which programs beside ours."""
    n, p, u = sizes
    dtype, _, work_kind, tolerance = KINDS[kind]
    z, h = normal(machine, n, u, dtype=dtype), normal(machine, n, p, u, dtype=dtype)
    z, h = ((x * u**-0.25).requires_grad_() for x in (z, h))
    programs: dict[str, Program] = {
        impl: partial(functional.dv, impl=impl)
        for impl in able(machine, "critic_stats", z, units=u, products=n * n * p * u)
    }
    ours = list(programs)
    if "eager" in others:
        programs["eager"] = eager_dv
    if "compiled" in others:
        programs |= compiled(machine, eager_dv, z, h)

    def check() -> None:
        eager, exact = gradients(eager_dv, z, h), gradients(eager_dv, *wide(z, h))
        for impl in ours:
            check_twice(gradients(programs[impl], z, h), eager, exact, tolerance)

    forward = critic_stats_work(n, p, u, dtype.itemsize, work_kind)
    backward = backward_work(n, p, u, dtype.itemsize, work_kind)
    return Case(
        op="critic_stats, dv forward + backward",
        sizes=f"N={n} P={p} U={u}",
        kind=kind,
        variants={name: partial(gradients, program, z, h) for name, program in programs.items()},
        check=check,
        work=Work(forward.flops + backward.flops, forward.bytes + backward.bytes, work_kind),
    )


def score_stats_case(machine: Machine, n: int, p: int) -> Case:
    """Return dv of given scores and its gradient."""
    T = normal(machine, n, n, p).requires_grad_()

    def ours(impl: str, scores: Tensor) -> Tensor:
        return functional.dv(scores=scores, impl=impl)

    impls = able(machine, "score_stats", T)
    programs: dict[str, Program] = {impl: partial(ours, impl) for impl in impls}

    def check() -> None:
        eager, exact = gradients(reference.dv, T), gradients(reference.dv, *wide(T))
        for program in programs.values():
            check_twice(gradients(program, T), eager, exact, 1e-5)

    everything = {**programs, "eager": reference.dv, **compiled(machine, reference.dv, T)}
    return Case(
        op="score_stats, dv forward + backward",
        sizes=f"N={n} P={p}",
        kind="fp32",
        variants={name: partial(gradients, program, T) for name, program in everything.items()},
        check=check,
        work=Work(0, 3 * T.nbytes),
    )


# ---- the critic's block -------------------------------------------------------------------------


def eager_tail(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(rows, w1, b1).relu()
    v = torch.nn.functional.linear(hidden, w2, b2) + rows @ s.t()
    normal_form: Tensor = layer_norm(v, (len(w2),))
    return normal_form


def tail_case(machine: Machine, rows: int, c: int, u: int, kind: str) -> Case:
    """Return the block, forward."""
    dtype, _, work_kind, tolerance = KINDS[kind]
    shapes = [(rows, c), (u, c), (u,), (u, u), (u,), (u, c)]
    scales = [1.0, c**-0.5, 0.5, u**-0.5, 0.5, c**-0.5]
    tensors = [
        (normal(machine, *shape) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    impls = able(machine, "critic_tail", tensors[0], units=u, products=rows * u * (u + 2 * c))
    programs: dict[str, Program] = {
        impl: partial(functional.critic_tail, impl=impl) for impl in impls
    }

    def check() -> None:
        eager, exact = eager_tail(*tensors), eager_tail(*(x.double() for x in tensors))
        for program in programs.values():
            check_twice([program(*tensors)[:, :u]], [eager], [exact], tolerance)

    everything = {**programs, "eager": eager_tail, **compiled(machine, eager_tail, *tensors)}
    return Case(
        op="critic_tail, forward",
        sizes=f"rows={rows} C={c} U={u}",
        kind=kind,
        variants={name: partial(program, *tensors) for name, program in everything.items()},
        check=check,
        work=tail_work(rows, c, u, dtype.itemsize, work_kind),
    )


# ---- the attack's updates -----------------------------------------------------------------------


def eager_linf_step(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    return torch.clamp(x + STEP * grad.sign(), origin - EPS, origin + EPS).clamp(*CLIP)


def eager_linf_start(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    return (origin + torch.empty_like(origin).uniform_(-EPS, EPS)).clamp(*CLIP)


def eager_l2_step(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 1))
    norm = torch.linalg.vector_norm(grad.flatten(1), dim=1).clamp(min=1e-12)
    delta = x + L2_STEP * grad / norm.view(shape) - origin
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    moved: Tensor = origin + delta * (L2_EPS / size.clamp(min=L2_EPS)).view(shape)
    return moved.clamp(*CLIP)


def eager_keep_best(best: Tensor, value: Tensor, x: Tensor, new: Tensor) -> list[Tensor]:
    better = new > value
    rows = better.view(-1, *[1] * (x.dim() - 1))
    return [torch.where(rows, x, best), torch.where(better, new, value)]


STEPS: dict[str, tuple[Program, Program, int]] = {
    "linf_step_": (
        partial(functional.linf_step_, eps=EPS, step_size=STEP, clip=CLIP), eager_linf_step, 4,
    ),
    "l2_step_": (
        partial(functional.l2_step_, eps=L2_EPS, step_size=L2_STEP, clip=CLIP), eager_l2_step, 4,
    ),
    "linf_start_": (
        lambda x, grad, origin, impl: functional.linf_start_(
            x, origin, eps=EPS, seed=SEED, clip=CLIP, impl=impl
        ),
        eager_linf_start, 2,
    ),
}  # fmt: skip


def step_case(machine: Machine, op: str, shape: tuple[int, ...], kind: str) -> Case:
    """Return one update of a batch of images; traffic: its reads and writes of a batch."""
    ours, eager, traffic = STEPS[op]
    dtype = KINDS[kind][0]
    origin = torch.rand(shape, device=machine.device).to(dtype)
    grad, x = normal(machine, *shape, dtype=dtype), origin.clone()
    impls = able(machine, op, x)

    def check() -> None:
        exact = ours(*(t.double().clone() for t in (x, grad, origin)), impl="reference")
        same = ours(x.clone(), grad, origin, impl="reference")
        for impl in impls:
            found = ours(x.clone(), grad, origin, impl=impl)
            check_twice([found], [same], [exact], 1e-6)

    variants: dict[str, Call] = {impl: partial(ours, x, grad, origin, impl=impl) for impl in impls}
    variants["eager"] = partial(eager, x, grad, origin)
    for name, program in compiled(machine, eager, x, grad, origin).items():
        variants[name] = partial(program, x, grad, origin)
    work = Work(0, traffic * x.nbytes)
    return Case(op, size_text(shape), kind, variants, check, work)


def size_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def keep_best_case(machine: Machine, shape: tuple[int, ...]) -> Case:
    """Return keep_best_; half of the rows are better in the check, all in what is timed."""
    best, x = normal(machine, *shape), normal(machine, *shape)
    value = torch.zeros(shape[0], device=machine.device)
    new = torch.linspace(-1, 1, shape[0], device=machine.device)
    impls = able(machine, "keep_best_", x)

    def ours(impl: str) -> list[Tensor]:
        found, kept = best.clone(), value.clone()
        functional.keep_best_(found, kept, x, new, impl=impl)
        return [found, kept]

    def check() -> None:
        wanted = eager_keep_best(best, value, x, new)
        for impl in impls:
            check_twice(ours(impl), wanted, [t.double() for t in wanted], 0.0)

    def all_better(impl: str) -> None:
        value.fill_(-2)
        functional.keep_best_(best, value, x, new, impl=impl)

    variants: dict[str, Call] = {impl: partial(all_better, impl) for impl in impls}
    variants["eager"] = partial(eager_keep_best, best, value, x, new)
    return Case(
        "keep_best_, all better", size_text(shape), "fp32", variants, check, Work(0, 2 * x.nbytes)
    )


# ---- a whole attack -----------------------------------------------------------------------------


def attack_case(machine: Machine, n: int, units: int, steps: int) -> Case:
    """Return an attack on the encoder, the images' side of the critic computed once."""
    shape = (3, 32, 32)
    torch.manual_seed(0)
    encoder = folded(BaselineH(shape, dim=64).to(machine.device).eval().requires_grad_(False))
    critic = DotCritic(64, shape, units=units).to(machine.device).eval().requires_grad_(False)
    view, x = critic.frozen(), torch.rand(n, *shape, device=machine.device)
    h = view.x_side(x).detach()

    def loss(x_adv: Tensor) -> Tensor:
        return -functional.dv(view.z_side(encoder(x_adv)), h)

    def eager() -> Tensor:
        x_adv = x.clone()
        for _ in range(steps):
            point = x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(-eager_dv(view.z_side(encoder(point)), h), point)
            x_adv = eager_linf_step(x_adv.detach(), grad, x)
        return x_adv

    plain = PGD(eps=EPS, step_size=STEP, steps=steps)
    graph = PGD(eps=EPS, step_size=STEP, steps=steps, cuda_graph=True)

    def check() -> None:
        # A gradient that is 0 but for rounding has either sign.
        wanted = plain.attack(loss, x)
        for found in (graph.attack(loss, x), eager()):
            differ = ((found - wanted).abs() > EPS / 100).float().mean().item()
            assert differ < 0.1, f"{differ:.0%} of the pixels differ"

    return Case(
        op=f"attack, {steps} steps",
        sizes=f"N={n} 3x32x32 U={units}",
        kind="fp32 high",
        variants={
            "plain loop": lambda: plain.attack(loss, x),
            "cuda_graph": lambda: graph.attack(loss, x),
            "eager": eager,
        },
        check=check,
        work=Work(0, 0),
        host=True,
    )


# ---- all cases ----------------------------------------------------------------------------------

# For the sweep: N * N * P * U from 2^18 to 2^28, U small enough for the CUDA form.
SWEEP = [(16, 16, 64), (32, 16, 64), (32, 64, 64), (64, 64, 64), (64, 64, 128), (128, 64, 256)]


def cases(is_gpu: bool) -> list[Later]:
    """Return every case, the most wanted first; tiny ones for a CPU."""
    images = (128, 3, 32, 32) if is_gpu else (2, 3, 4, 4)
    paper, *sizes = [(128, 64, 2048), (128, 64, 256), (1024, 64, 512), (16, 16, 64)]
    tail, tokens = ((8192, 128, 2048), (128, 64)) if is_gpu else ((5, 4, 16), (5, 3))
    attack = (128, 2048, 10) if is_gpu else (3, 16, 2)
    if not is_gpu:
        paper, *sizes = [(5, 3, 8), (4, 2, 8)]
    both = "eager, compiled"
    return [
        *(_later(op, "fp32 high", step_case, op, images, "fp32 high") for op in STEPS),
        _later(f"dv {paper}", "bf16", dv_case, paper, "bf16", both),
        _later(f"dv {paper}", "fp32 high", dv_case, paper, "fp32 high", both),
        _later("attack", "fp32 high", attack_case, *attack),
        _later("critic_tail", "bf16", tail_case, *tail, "bf16"),
        _later("keep_best_", "fp32 high", keep_best_case, images),
        _later("score_stats", "fp32 high", score_stats_case, *tokens),
        _later(f"dv {paper}", "fp32 highest", dv_case, paper, "fp32 highest", "eager"),
        _later(f"dv {paper}", "fp16", dv_case, paper, "fp16", "eager"),
        *(
            _later(f"dv {size}", kind, dv_case, size, kind, "eager")
            for kind in ("bf16", "fp32 high")
            for size in sizes
        ),
        _later("critic_tail", "fp32 high", tail_case, *tail, "fp32 high"),
        *(_later(op, "bf16", step_case, op, images, "bf16") for op in STEPS),
    ]


def sweep_cases(is_gpu: bool) -> list[Later]:
    """Return dv by both back ends at growing sizes, for the limit in registry.TABLE."""
    return [
        _later(f"sweep {sizes}", kind, dv_case, sizes, kind, "")
        for kind in ("fp32 highest", "bf16", "fp32 high")
        for sizes in (SWEEP if is_gpu else [(3, 2, 4), (4, 2, 4)])
    ]


def _later(name: str, kind: str, build: Callable[..., Case], *arguments: Any) -> Later:
    return Later(name, kind, lambda machine: build(machine, *arguments))


def measured(machine: Machine, later: Later, seconds: float) -> dict[str, Any]:
    """Build, check and time one case; a failure is its result."""
    torch.manual_seed(0)
    sample = sampler(machine)
    try:
        with matmul_precision(KINDS[later.kind][1]):
            case = later.build(machine)
            case.check()
            times = interleaved(case.variants, lambda call: sample(call, case.host), seconds)
            peaks = {n: peak_memory(call, machine.device) for n, call in case.variants.items()}
    except Exception as error:
        return {"name": later.name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    work = case.work
    return {
        "name": later.name,
        "op": case.op,
        "sizes": case.sizes,
        "kind": case.kind,
        "seconds": {name: statistics.median(samples) for name, samples in times.items()},
        "samples": times,
        "peak_bytes": peaks,
        "roofline_seconds": max(
            work.bytes / machine.roofline.bandwidth, work.flops / machine.roofline.flops[work.kind]
        ),
        "flops": work.flops,
        "bytes": work.bytes,
    }


# ---- tables -------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def row_of(result: dict[str, Any], machine: Machine) -> list[str]:
    """Return a case's line: times, ratios to our fastest, the roofline's share, peaks."""
    times: dict[str, float] = result["seconds"]
    ours = [name for name in times if name in (*machine.impls, "cuda_graph", "plain loop")]
    best = min(ours or times, key=lambda name: times[name])

    def against(name: str) -> str:
        return f"{times[name] / times[best]:.2f}" if name in times else ""

    floor = result["roofline_seconds"]
    peaks = {name: peak for name, peak in result["peak_bytes"].items() if peak is not None}
    return [
        result["op"],
        f"{result['sizes']}, {result['kind']}",
        "; ".join(f"{name} {time_text(seconds)}" for name, seconds in times.items()),
        best,
        against("eager"),
        against("compiled"),
        f"{floor / times[best]:.0%} of {time_text(floor)}" if floor else "",
        "; ".join(f"{name} {peak / 2**20:.1f}" for name, peak in peaks.items()),
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweep_text(results: list[dict[str, Any]], machine: Machine) -> str:
    """Return the sweep's table, and up to where the first back end was not the slower one."""
    first, second = machine.impls
    rows: list[list[str]] = []
    largest: dict[str, int] = {}
    for result in results:
        times: dict[str, float] = result["seconds"]
        if not {first, second} <= times.keys():
            continue
        products = result["flops"] // 8
        if times[first] <= times[second]:
            largest[result["kind"]] = max(largest.get(result["kind"], 0), products)
        rows.append([
            f"2^{math.log2(products):.1f}", f"{result['sizes']}, {result['kind']}",
            time_text(times[first]), time_text(times[second]),
            f"{times[second] / times[first]:.2f}",
        ])  # fmt: skip
    limit = registry.TABLE["cuda"]["critic_stats"][0].products
    says = "; ".join(f"{kind} 2^{math.log2(size):.1f}" for kind, size in largest.items())
    header = ["multiply-adds", "size", first, second, f"{second} / {first}"]
    return (
        f"{table(header, rows)}\n\nThe largest size at which {first} was not the slower one: "
        f"{says or 'none'}. The limit in registry.TABLE is 2^{math.log2(limit):.1f}."
    )


def markdown(
    machine: Machine,
    results: list[dict[str, Any]],
    sweep: list[dict[str, Any]],
    left_out: list[str],
) -> str:
    """Return the report."""
    roofline = machine.roofline
    rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in roofline.flops.items())
    header = [
        "operator", "size", "median", "our fastest", "eager / it", "compiled / it",
        "roofline's share", "peak, MiB",
    ]  # fmt: skip
    failed = [f"- {r['name']}: {r['failed']}" for r in (*results, *sweep) if "failed" in r]
    results, sweep = ([r for r in part if "failed" not in r] for part in (results, sweep))
    parts = [
        f"## Speed on {machine.name}",
        f"torch {torch.__version__}; roofline from {machine.source} figures: "
        f"{roofline.bandwidth / 1e12:.3g} TB/s, TFLOP/s {rates}; a copy moves "
        f"{machine.copy_bandwidth / 1e12:.3g} TB/s. Medians of interleaved rounds, the "
        "second-level cache flushed before each; launches are hidden but for the attack. Values "
        "were checked first.",
        table(header, [row_of(result, machine) for result in results]),
        f"### {machine.impls[0]} or {machine.impls[1]}, dv forward + backward",
        sweep_text(sweep, machine),
    ]
    if failed:
        parts += ["### Failed", "\n".join(failed)]
    if left_out:
        parts.append(f"Left out when the time was spent: {', '.join(left_out)}.")
    return "\n\n".join(parts) + "\n"


def write(
    folder: Path,
    machine: Machine,
    results: list[dict[str, Any]],
    sweep: list[dict[str, Any]],
    left_out: list[str],
) -> None:
    """Write what there is so far: a run that is cut off leaves it behind."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "device": machine.name,
        "torch": str(torch.__version__),
        "roofline": {"source": machine.source, **machine.roofline._asdict()},
        "copy_bandwidth": machine.copy_bandwidth,
        "cases": results,
        "sweep": sweep,
        "left_out": left_out,
    }
    (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "speed.md").write_text(markdown(machine, results, sweep, left_out))


# ---- main ---------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time every operator on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for speed.json, speed.md")
    parser.add_argument("--seconds", type=float, default=120.0, help="stop after so long")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU, for a test")
    return parser.parse_args()


def main() -> int:
    """Run all cases until the time is spent; return 1 if one failed."""
    given, start = arguments(), time.monotonic()
    if not given.cpu and not torch.cuda.is_available():
        print("gpu_speed: torch sees no GPU; --cpu runs tiny sizes", file=sys.stderr)
        return 1
    machine = machine_of(given.cpu)
    results: list[dict[str, Any]] = []
    sweep: list[dict[str, Any]] = []
    left_out: list[str] = []
    # The sweep decides a default: a part of the time is its own.
    turns = ((cases, results, 0.75), (sweep_cases, sweep, 0.97))
    for make, into, share in turns:
        for later in make(machine.is_gpu):
            if time.monotonic() - start > share * given.seconds:
                left_out.append(f"{later.name} {later.kind}")
                continue
            into.append(measured(machine, later, 0.3 if machine.is_gpu else 0.01))
            print(f"{time.monotonic() - start:6.1f} s  {later.name} {later.kind}", flush=True)
            write(given.out, machine, results, sweep, left_out)
    write(given.out, machine, results, sweep, left_out)
    failed = [result for result in (*results, *sweep) if "failed" in result]
    for result in failed:
        print(f"failed: {result['name']}: {result['failed']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
