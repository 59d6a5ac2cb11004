"""Projected gradient ascent on images, for losses that couple the batch and losses that do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from wcmi_fast import attack_graph
from wcmi_fast._ops import accumulation_dtype
from wcmi_fast.attack_graph import Best
from wcmi_fast.functional.steps import check_budget, keep_best_, l2_step_, linf_start_, linf_step_

NORMS = ("linf", "l2")


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient ascent in the ball around each image (supplement, algorithm 1).

    The equivalent torch program, with ``origin`` the clean images, run ``steps`` times::

        (grad,) = torch.autograd.grad(loss_fn(x.requires_grad_()).sum(), x)
        x = (x + step_size * grad.sign()).clamp(origin - eps, origin + eps).clamp(*clip).detach()

    Args:
        eps: radius of the ball, in units of x (0.3 for MNIST in [0, 1]); finite, 0 or more.
        step_size: length of one step in the same norm, in units of x; finite, more than 0.
        steps: gradient evaluations per restart, 1 or more.
        norm: ``"linf"`` as above, the paper's, or ``"l2"``: each image moves along its normalised
            gradient and stays in the l2 ball around it (`functional.l2_step_`).
        random_start: start each restart uniformly in the ball, then clip; the paper starts at x.
        restarts: runs of the attack, 1 or more; more than one needs ``random_start``.
        keep: ``"last"`` keeps the last iterate of a restart, ``"best"`` the iterate of highest
            loss, the start included. Among restarts the one of highest loss is kept (the authors'
            code keeps the last restart instead, by a slip). Losses are compared per image when
            loss_fn gives one per image, and per batch when it gives a scalar.
        clip: lowest and highest allowed value of x, rounded to the dtype of x.
        cuda_graph: on a GPU, capture a restart as one CUDA graph and replay it, which takes the
            host's part out of every step; see `attack` for what this asks of loss_fn. Where it is
            impossible (on a CPU, say) the plain loop runs, with the same results, and the logger
            "wcmi_fast" warns once.

    Raises:
        TypeError, ValueError: a field of the wrong type, or out of the range given above.
    """

    eps: float
    step_size: float
    steps: int
    norm: Literal["linf", "l2"] = "linf"
    random_start: bool = False
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    clip: tuple[float, float] = (0.0, 1.0)
    # Seeds of training are made of the repr, and the results do not depend on this.
    cuda_graph: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        _check_number("eps", self.eps)
        _check_number("step_size", self.step_size)
        _check_pair("clip", self.clip)
        check_budget("PGD", self.eps, self.step_size, self.clip)
        _check_count("steps", self.steps)
        _check_count("restarts", self.restarts)
        if self.norm not in NORMS:
            raise ValueError(f"PGD: norm is {self.norm!r}, wanted 'linf' or 'l2'")
        for name in ("random_start", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"PGD: {name} is {getattr(self, name)!r}, wanted True or False")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"PGD: restarts is {self.restarts} with random_start=False, wanted 1, "
                "because all restarts would be the same"
            )
        if self.keep not in ("last", "best"):
            raise ValueError(f"PGD: keep is {self.keep!r}, wanted 'last' or 'best'")

    def attack(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        modules: Iterable[nn.Module] = (),
        generator: torch.Generator | None = None,
        part_of: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return images near x that make ``loss_fn`` large.

        Nothing outside changes, also when loss_fn raises: x, every ``.grad``, the global random
        state (of the CPU, and of the GPU that holds x) and ``modules`` (see `frozen`) are left as
        they were. Works under ``torch.no_grad``, and under ``torch.inference_mode`` if what loss_fn
        differentiates through was created outside it.

        The result is within clip, and within eps of x up to one rounding. Rounding eps and then
        ``x +- eps`` to the dtype errs by at most half a unit in the last place each; so for clip
        (0, 1) and eps at most 1 the exact difference ``|x_adv - x|`` is at most
        ``eps + torch.finfo(x.dtype).eps / 2``, that is eps + 2**-24 in float32. For values up to B
        in magnitude it is at most ``eps + (B + eps) * torch.finfo(x.dtype).eps / 2``. For norm
        ``"l2"``, clip (0, 1) and images of D elements the exact l2 norm of ``x_adv - x`` is at most
        ``eps + sqrt(D) * torch.finfo(x.dtype).eps / 2`` on the cpu back end, which computes it in
        float64, and a few roundings of eps more elsewhere.

        With ``cuda_graph`` a call captures the loop, which costs as much as a few attacks, and
        later calls with the same loss_fn object (a bound method is a new one at every access), the
        same modules, and images of the same shape, dtype, device and memory format only replay it.
        No Python of loss_fn runs then: the kernels run again, on the same addresses. So loss_fn
        must do the same at every call, and must read all else that it needs (weights, labels, z)
        from tensors that stay in place: write new labels into the old tensor by ``copy_``. Weights
        may change in place between calls; modes, flags, autocast and Python numbers stay as they
        were captured, and checks in loss_fn (as that of `FrozenCritic` for stale weights) are not
        made again. ``modules`` are frozen during the capture, and during every replay.

        Args:
            loss_fn: images (N, ...) -> the loss to maximise: a scalar, or (N,), one per image.
                A NaN loss is never the best one.
            x: clean images (N, ...), floating point, within clip.
            modules: run in eval mode with frozen weights and given back as they were.
            generator: source of the random starts, on the device of x. None is a generator
                seeded with 0 at every call: pass your own to vary the starts across calls.
            part_of: (first, rows) where x is the images from first on of a batch of so many rows,
                of which other processes attack the rest: x then starts where that batch would.

        Returns:
            x itself if eps is 0; else a new tensor of the shape, dtype, device and memory format
            of x, without history.

        Raises:
            TypeError: x is not floating point; loss_fn returns no tensor.
            ValueError: x is empty or outside clip; loss_fn returns another shape or a loss that
                does not depend on its argument; generator is on another device; part_of leaves no
                room for x.
        """
        self._check_images(x)
        first, rows = (0, len(x)) if part_of is None else part_of
        if not 0 <= first <= rows - len(x):
            raise ValueError(
                f"PGD.attack: part_of is {part_of}, wanted (first, rows) with room for x's {len(x)}"
            )
        if self.eps == 0:
            return x
        modules = _submodules(modules)
        generator = _starts_generator(generator, x.device)
        gpus = [x.device] if x.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=gpus),
            frozen(modules),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            return self._run(loss_fn, x.detach(), generator, modules, (first, rows))

    def _run(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        origin: Tensor,
        generator: torch.Generator,
        modules: list[nn.Module],
        part: tuple[int, int],
    ) -> Tensor:
        restart = partial(self._restart, loss_fn)
        starts: Iterator[Tensor] = (
            self._start(origin, generator, part) for _ in range(self.restarts)
        )
        if self.cuda_graph:
            first = next(starts)
            settings = (self, *map(id, modules))
            captured = attack_graph.capture(
                restart, loss_fn, settings, origin, first, steps=self.steps
            )
            starts = chain([first], starts)
            if captured is not None:
                return captured.run(origin, starts)
        best: Best | None = None
        for x_adv in starts:
            best = restart(origin, x_adv, best, self.steps)
        return x_adv if best is None else best.x

    def _restart(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        origin: Tensor,
        x_adv: Tensor,
        best: Best | None,
        steps: int,
    ) -> Best | None:
        """Take steps from x_adv, in place; return the best if it is asked for.

        The host never waits for the device in here, nor does what a step runs depend on values: a
        CUDA graph can hold it.
        """
        step_ = linf_step_ if self.norm == "linf" else l2_step_
        for _ in range(steps):
            losses, grad = _value_and_grad(loss_fn, x_adv)
            if self.keep == "best":
                best = _keep_best(best, origin, x_adv, losses)
            step_(x_adv, grad, origin, eps=self.eps, step_size=self.step_size, clip=self.clip)
        if self.keep == "last" and self.restarts == 1:
            return None
        with torch.no_grad():
            losses = _losses(loss_fn, x_adv)
        return _keep_best(best, origin, x_adv, losses)

    def _start(self, origin: Tensor, generator: torch.Generator, part: tuple[int, int]) -> Tensor:
        if not self.random_start:
            return origin.clone()
        if self.norm == "l2":
            return _l2_start(origin, self.eps, self.clip, generator, part)
        # One number of the generator's; linf_start_ makes the same start of it on every device.
        seed = torch.randint(2**63 - 1, (), generator=generator, device=origin.device)
        first = part[0] * origin[0].numel()
        return linf_start_(
            torch.empty_like(origin),
            origin,
            eps=self.eps,
            seed=int(seed),
            clip=self.clip,
            first=first,
        )

    def _check_images(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"PGD.attack: x has dtype {x.dtype}, wanted floating point images")
        if x.ndim == 0 or x.numel() == 0:
            raise ValueError(
                f"PGD.attack: x has shape {tuple(x.shape)}, wanted (N, ...) with at least one image"
            )
        # Images at 0.1 in float32 are a little above the double 0.1: compare in the dtype of x.
        lowest, highest = torch.tensor(self.clip, dtype=x.dtype).tolist()
        found_lowest, found_highest = torch.stack(torch.aminmax(x.detach())).tolist()
        if not (lowest <= found_lowest and found_highest <= highest):
            raise ValueError(
                f"PGD.attack: x ranges from {found_lowest} to {found_highest}, "
                f"wanted values within clip={self.clip}"
            )


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules in eval mode with frozen weights, then give them back exactly as they were.

    On leaving, also by an exception, the mode of every submodule, the ``requires_grad`` flag of
    every parameter, and every buffer (which tensor it is, and its values) are as before. Buffers
    that kept their values are not written, so that their version counters stay. The modes are set
    directly, without calling ``train`` or ``eval``, which a module may override with side effects.

    Args:
        modules: the modules; all of their submodules are included.

    Raises:
        TypeError: modules is a single module, or holds something that is not a module.
    """
    parts = _submodules(modules)
    modes = [(part, part.training) for part in parts]
    flags = [(p, p.requires_grad) for part in parts for p in part.parameters(recurse=False)]
    buffers = [(part, dict(part._buffers)) for part in parts]
    values = [
        (buffer, buffer.detach().clone())
        for _, named in buffers
        for buffer in named.values()
        if buffer is not None
    ]
    try:
        for part in parts:
            part.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, named in buffers:
            part._buffers.clear()
            part._buffers.update(named)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _keep_best(best: Best | None, origin: Tensor, x_adv: Tensor, losses: Tensor) -> Best:
    """Keep x_adv where it is better; at first than the clean images with losses of -inf."""
    if best is None:
        lowest = torch.full_like(losses, -math.inf, device=origin.device)
        best = Best(origin.clone(), lowest)
    keep_best_(best.x, best.losses, x_adv, losses.to(best.losses))
    return best


def _l2_start(
    origin: Tensor,
    eps: float,
    clip: tuple[float, float],
    generator: torch.Generator,
    part: tuple[int, int],
) -> Tensor:
    """Return a uniform point of each image's l2 ball, clipped.

    The direction of a normal vector is uniform, and so is the D-th power of the radius.
    """
    dtype, device = accumulation_dtype(origin.dtype), origin.device
    # Drawn in index order, so that the start does not depend on the memory format of x.
    first, rows = part
    own = slice(first, first + len(origin))
    shape = (rows, *origin.shape[1:])
    noise = torch.randn(shape, generator=generator, dtype=dtype, device=device)[own]
    directions = normalize(noise.view(len(origin), -1), dim=1)
    radii = torch.rand((rows, 1), generator=generator, dtype=dtype, device=device)[own]
    radii = eps * radii ** (1 / directions.shape[1])
    start = origin.clone()
    start += (radii * directions).view(origin.shape)
    # The sum may round to just outside the ball: a step along no gradient projects, and clips.
    return l2_step_(start, torch.zeros_like(start), origin, eps=eps, step_size=1.0, clip=clip)


def _value_and_grad(loss_fn: Callable[[Tensor], Tensor], x_adv: Tensor) -> tuple[Tensor, Tensor]:
    point = x_adv.detach().requires_grad_()
    losses = _losses(loss_fn, point)
    grad: Tensor | None = None
    if losses.requires_grad:
        (grad,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
    if grad is None:
        raise ValueError(
            "PGD.attack: the loss returned by loss_fn does not depend on its argument, "
            "wanted one that is differentiable in the images"
        )
    return losses.detach(), grad


def _losses(loss_fn: Callable[[Tensor], Tensor], x_adv: Tensor) -> Tensor:
    losses: object = loss_fn(x_adv)
    if not isinstance(losses, Tensor):
        raise TypeError(f"PGD.attack: loss_fn returned a {type(losses).__name__}, wanted a tensor")
    if losses.shape not in ((), (len(x_adv),)):
        raise ValueError(
            f"PGD.attack: loss_fn returned shape {tuple(losses.shape)}, "
            f"wanted () or ({len(x_adv)},), one loss per batch or one per image"
        )
    return losses


def _submodules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    # An nn.Sequential is iterable, and would lose its own mode.
    if isinstance(modules, nn.Module):
        raise TypeError(
            f"frozen: modules is a single {type(modules).__name__}, wanted an iterable of modules"
        )
    roots: list[object] = list(modules)
    found: dict[nn.Module, None] = {}
    for root in roots:
        if not isinstance(root, nn.Module):
            raise TypeError(f"frozen: modules holds a {type(root).__name__}, wanted only modules")
        found.update(dict.fromkeys(root.modules()))
    return list(found)


def _starts_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    if generator is None:
        return torch.Generator(device).manual_seed(0)
    if generator.device.type != device.type:
        raise ValueError(
            f"PGD.attack: generator is on {generator.device}, wanted {device}, the device of x"
        )
    return generator


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"PGD: {name} is {value!r}, wanted a number")


def _check_pair(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"PGD: {name} is {value!r}, wanted a tuple of two numbers")
    for end in value:
        _check_number(name, end)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"PGD: {name} is {value!r}, wanted an integer")
    if value < 1:
        raise ValueError(f"PGD: {name} is {value}, wanted 1 or more")
