"""Oracles in the tests' own words, and the rule that compares with them.

Nothing here calls wcmi_fast's formulas: `plain_bound` is each bound as spec.md writes it, in
another formulation than wcmi_fast.reference, and `loop_bound` is the same in Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from wcmi_fast import functional
from wcmi_fast._ops import accumulation_dtype
from wcmi_fast.backends import cpu
from wcmi_fast.functional import bounds

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EAGER_IMPLS = ("reference", "cpu")

# Each bound with each of its options, by a name for both: function and keyword arguments. mine gets
# a state, too, whose past is a mean exp(T) of 1.
TAU, DECAY = 1.5, 0.5
MEASURES = ("GAN", "X2", "KL", "RKL", "H2", "W1")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dv": ("dv", {}),
    "dv_zero": ("dv", {"diagonal": "zero"}),
    "infonce": ("infonce", {}),
    "infonce_all": ("infonce", {"candidates": "all_locations"}),
    "nwj": ("nwj", {}),
    "jsd": ("jsd", {}),
    "smile": ("smile", {"tau": TAU}),
    "mine": ("mine", {}),
    **{measure: ("fenchel_dual", {"measure": measure}) for measure in MEASURES},
}
# The exponential of a score itself is in these; in the others it is inside of a logarithm.
EXPONENTIAL = ("nwj", "KL", "RKL", "H2")
# The name that critic_stats' which= has for the variant.
STATS_NAMES = {
    name: name if function == "fenchel_dual" else function
    for name, (function, _) in VARIANTS.items()
}


def error_rule(name: str, ours: Tensor, plain: Tensor, oracle: Tensor, magnitude: float) -> None:
    """Check |ours - oracle| <= 2 |plain - oracle| + tiny in max norm; oracle is float64.

    `plain` is the plain torch program in ours' dtype. By luck it may hit the oracle exactly (N = 2,
    U = 1), where any other order of summation cannot follow: tiny allows 4 roundings, in the dtype
    of the output, of the largest quantity that goes into it, `magnitude` (2 were seen in 3,000
    random cases). In float64 the oracle is the plain program itself and has errors of its own: 32
    roundings (9 were seen). Exponentials below the smallest normal number are 0.
    """
    assert ours.dtype == plain.dtype
    assert ours.shape == oracle.shape
    roundings = 32 if ours.dtype == torch.float64 else 4
    finfo = torch.finfo(ours.dtype)
    smallest = max(torch.finfo(accumulation_dtype(ours.dtype)).tiny, finfo.tiny * finfo.eps)
    tiny = roundings * (finfo.eps * magnitude + smallest)
    error = (ours.double() - oracle).abs().max().item()
    allowed = 2 * (plain.double() - oracle).abs().max().item() + tiny
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


# ---- bounds in torch ----------------------------------------------------------------------------


def plain_scores(z: Tensor, h: Tensor) -> Tensor:
    """T (N, N, P) by one matrix product; of half types in float32."""
    z, h = (t if t.dtype == torch.float64 else t.float() for t in (z, h))
    n = z.shape[0]
    return (z @ h.reshape(-1, z.shape[1]).t()).reshape(n, n, -1)


def plain_softplus(x: Tensor) -> Tensor:
    # torch.nn.functional.softplus returns x itself above 20, also in float64.
    return torch.logaddexp(x, x.new_zeros(()))


def plain_log_mean_exp(negatives: Tensor) -> Tensor:
    return negatives.flatten(0, 1).logsumexp(0) - math.log(negatives[..., 0].numel())


def plain_dv(positives: Tensor, negatives: Tensor) -> Tensor:
    return (positives.mean(0) - plain_log_mean_exp(negatives)).mean()


def plain_dv_zero(positives: Tensor, negatives: Tensor) -> Tensor:
    n = len(negatives)
    with_zeros = torch.cat([negatives.flatten(0, 1), torch.zeros_like(positives)])
    return (positives.mean(0) - with_zeros.logsumexp(0)).mean() + math.log(n * (n - 1))


def plain_infonce(positives: Tensor, negatives: Tensor) -> Tensor:
    candidates = torch.cat([positives[:, None], negatives], 1)
    return candidates.log_softmax(1)[:, 0].mean() + math.log(len(positives))


def plain_infonce_all(positives: Tensor, negatives: Tensor) -> Tensor:
    # Where all of its arguments are -inf the gradient of torch's logsumexp is NaN.
    others = negatives.clamp_min(-1e30).flatten(1).logsumexp(1, keepdim=True).expand_as(positives)
    return torch.stack([positives, others]).log_softmax(0)[0].mean()


def plain_jsd(positives: Tensor, negatives: Tensor) -> Tensor:
    return 2 * math.log(2) - plain_softplus(-positives).mean() - plain_softplus(negatives).mean()


def plain_mine_carrier(positives: Tensor, negatives: Tensor) -> Tensor:
    log_mean = plain_log_mean_exp(negatives)
    past = torch.full_like(log_mean, math.log(DECAY))
    average = torch.logaddexp(past, log_mean + math.log(1 - DECAY)).detach()
    return positives.mean() - (log_mean - average).exp().mean()


# Of positives (N, P) and negatives (N, N - 1, P): row i's negatives are T[i, j] for j != i.
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dv": plain_dv,
    "dv_zero": plain_dv_zero,
    "infonce": plain_infonce,
    "infonce_all": plain_infonce_all,
    "nwj": lambda positives, negatives: positives.mean() - (negatives - 1).exp().mean(),
    "jsd": plain_jsd,
    "smile": lambda positives, negatives: plain_dv(positives, negatives.clamp(-TAU, TAU)),
    "mine": plain_dv,
    "GAN": lambda positives, negatives: plain_jsd(positives, negatives) - 2 * math.log(2),
    "X2": lambda positives, negatives: (
        (positives**2).mean() + 0.5 * ((negatives.abs() + 1) ** 2).mean()
    ),
    "KL": lambda positives, negatives: positives.mean() + 1 - negatives.exp().mean(),
    "RKL": lambda positives, negatives: -(-positives).exp().mean() - (negatives.mean() - 1),
    "H2": lambda positives, negatives: 2 - (-positives).exp().mean() - negatives.exp().mean(),
    "W1": lambda positives, negatives: positives.mean() - negatives.mean(),
}
# What is differentiated in place of the value.
CARRIERS = {**PLAIN, "smile": plain_jsd, "mine": plain_mine_carrier}


def plain_bound(variant: str, T: Tensor, carrier: bool = False) -> Tensor:
    """A bound of T (N, N, P), by picking entries instead of masking, or what has its gradient."""
    n, _, p = T.shape
    own = torch.eye(n, dtype=torch.bool, device=T.device)
    program = (CARRIERS if carrier else PLAIN)[variant]
    return program(T[own], T[~own].view(n, n - 1, p))


# ---- bounds in loops ----------------------------------------------------------------------------


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _log_sum_exp(values: list[float]) -> float:
    return math.log(math.fsum(math.exp(value) for value in values))


def _softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def loop_bound(variant: str, T: list[list[list[float]]]) -> float:
    """The bound of spec.md section 2 in loops over Python floats; for moderate scores."""
    n, locations = len(T), range(len(T[0][0]))
    if variant == "infonce_all":
        terms = []
        for i in range(n):
            others = [T[i][j][q] for j in range(n) if j != i for q in locations]
            terms += [T[i][i][p] - _log_sum_exp([T[i][i][p], *others]) for p in locations]
        return _mean(terms)
    return _mean(
        [loop_location(variant, [[row[p] for row in rows] for rows in T]) for p in locations]
    )


def loop_location(variant: str, T: list[list[float]]) -> float:
    """The bound at one location, of T (N, N)."""
    n = len(T)
    pos = [T[i][i] for i in range(n)]
    neg = [T[i][j] for i in range(n) for j in range(n) if i != j]
    if variant == "infonce":
        return _mean([T[i][i] - _log_sum_exp(T[i]) + math.log(n) for i in range(n)])
    if variant in ("dv", "mine", "dv_zero", "smile"):
        if variant == "smile":
            neg = [min(max(q, -TAU), TAU) for q in neg]
        if variant == "dv_zero":
            neg += n * [0.0]
        return _mean(pos) - (_log_sum_exp(neg) - math.log(n * (n - 1)))
    positive, negative = {
        "nwj": (lambda x: x, lambda q: math.exp(q - 1)),
        "jsd": (lambda x: 2 * math.log(2) - _softplus(-x), _softplus),
        # Hjelm et al.'s gan_losses.py.
        "GAN": (lambda x: -_softplus(-x), lambda q: _softplus(-q) + q),
        "X2": (lambda x: x**2, lambda q: -0.5 * (math.sqrt(q**2) + 1) ** 2),
        "KL": (lambda x: x + 1, math.exp),
        "RKL": (lambda x: -math.exp(-x), lambda q: q - 1),
        "H2": (lambda x: 1 - math.exp(-x), lambda q: math.exp(q) - 1),
        "W1": (lambda x: x, lambda q: q),
    }[variant]
    return _mean([positive(x) for x in pos]) - _mean([negative(q) for q in neg])


# ---- the library's bounds against them ----------------------------------------------------------


class Result(NamedTuple):
    value: Tensor
    grads: tuple[Tensor, ...]


Bound = Callable[..., Tensor]


class UnitPast(functional.EMAState):
    """A state whose past is a mean exp(T) of 1, at every call."""

    def update(self, function: str, log_mean: Tensor) -> Tensor:
        self.log_mean = torch.zeros_like(log_mean)
        return super().update(function, log_mean)


def bound(variant: str, *inputs: Tensor, **options: Any) -> Tensor:
    """Call the library's function of a variant on (z, h), on (scores,) or with stats=."""
    function, own = VARIANTS[variant]
    state = {"ema_state": UnitPast(DECAY)} if variant == "mine" else {}
    scores = {"scores": inputs[0]} if len(inputs) == 1 else {}
    features = inputs if len(inputs) == 2 else ()
    return getattr(functional, function)(*features, **{**scores, **state, **own, **options})


def all_stats(*inputs: Tensor, **options: Any) -> functional.CriticStats:
    """Call critic_stats for all variants on (z, h) or on (scores,)."""
    given = {"scores": inputs[0]} if len(inputs) == 1 else dict(zip("zh", inputs, strict=True))
    names = tuple(STATS_NAMES.values())
    return functional.critic_stats(**given, which=names, tau=TAU, **options)


def as_scores(*inputs: Tensor) -> Tensor:
    """T (N, N, P) of (z, h) or (scores,), half types in float32."""
    if len(inputs) == 2:
        return plain_scores(*inputs)
    (T,) = inputs
    T = T if T.dim() == 3 else T[:, :, None]
    return T.to(accumulation_dtype(T.dtype))


def value_and_grads(function: Bound, *inputs: Tensor) -> Result:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    value = function(*inputs)
    return Result(value.detach(), torch.autograd.grad(value, inputs))


def plain_value_and_grads(variant: str, *inputs: Tensor) -> Result:
    """The same of the plain program, whose value and gradient may be those of two formulas."""
    carrier = value_and_grads(lambda *x: plain_bound(variant, as_scores(*x), True), *inputs)
    return Result(plain_bound(variant, as_scores(*inputs)), carrier.grads)


def _magnitudes(variant: str, *inputs: Tensor) -> tuple[float, list[float]]:
    """The largest quantities that go into a bound and into its gradients, for `error_rule`.

    A score has the error of its terms, a log-sum-exp that of its size; the value has theirs times
    its slopes. The relative error of an exponential in a gradient is the absolute one of its
    exponent, which has the accumulation dtype.
    """
    wide = tuple(x.double() for x in inputs)
    T = as_scores(*wide)
    terms = as_scores(*(x.abs() for x in wide)) if len(wide) == 2 else T.abs()
    size = terms[terms.isfinite()].max().item() + 2 * math.log(len(T))
    slope = value_and_grads(lambda x: plain_bound(variant, x), T)
    value = size * slope.grads[0].abs().sum().item() / 2 + slope.value.abs().item()
    (G,) = value_and_grads(lambda x: plain_bound(variant, x, True), T).grads
    dtype = inputs[0].dtype
    accumulation_eps = torch.finfo(accumulation_dtype(dtype)).eps
    weight = 1 + size * accumulation_eps / torch.finfo(dtype).eps
    G = weight * G.abs()
    if len(wide) == 1:
        return value, [G.max().item()]
    z, h = (x.abs().max().item() for x in wide)
    return value, [G.sum((1, 2)).max().item() * h, G.sum(0).max().item() * z]


def check_result(ours: Result, variant: str, *inputs: Tensor) -> None:
    """Apply the error rule to a bound's value and gradients."""
    plain = plain_value_and_grads(variant, *inputs)
    exact = plain_value_and_grads(variant, *(x.double() for x in inputs))
    value, grads = _magnitudes(variant, *inputs)
    error_rule(f"{variant}'s value", ours.value, plain.value, exact.value, value)
    for k, magnitude in enumerate(grads):
        name = f"{variant}'s gradient {k}"
        error_rule(name, ours.grads[k], plain.grads[k], exact.grads[k], magnitude)


def check_bound(variant: str, *inputs: Tensor, **options: Any) -> None:
    """Apply the error rule to the library's bound of (z, h) or of (scores,)."""
    ours = value_and_grads(lambda *x: bound(variant, *x, **options), *inputs)
    check_result(ours, variant, *inputs)


@contextmanager
def limits(tile_bytes: int, kept_bytes: int, tile_rows: int = 128) -> Iterator[None]:
    """Make tiles and the scores kept for the backward pass as small as a test wants them."""
    with (
        mock.patch.object(cpu, "TILE_BYTES", tile_bytes),
        mock.patch.object(cpu, "TILE_ROWS", tile_rows),
        mock.patch.object(bounds, "KEPT_SCORES_BYTES", kept_bytes),
    ):
        yield


def binary():
    """The CPU binary; None where it is missing."""
    return cpu._binary


@contextmanager
def level(name: str) -> Iterator[None]:
    """Run the CPU kernels at one instruction set."""
    before = binary().level()
    binary().set_level(name)
    try:
        yield
    finally:
        binary().set_level(before)


def plain_linf_step(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step: float, clip: tuple[float, float]
) -> Tensor:
    """The update of the issue in torch's words; a NaN gradient leaves its pixel."""
    moved = torch.clamp(x + step * torch.sign(grad), origin - eps, origin + eps)
    return torch.where(torch.isnan(grad), x, torch.clamp(moved, *clip))


def plain_uniform(count: int, seed: int, first: int = 0) -> Tensor:
    """Philox4x32-10 as Salmon et al. 2011 write it, and 24 bits of each word in [-1, 1).

    `first`, a multiple of 4, is the index of the first number.
    """
    index = np.arange(first // 4, first // 4 + -(-count // 4), dtype=np.uint64)
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    left0, right0, left1, right1 = index & low, index >> word, 0 * index, 0 * index
    for r in range(10):
        key0, key1 = (seed + r * 0x9E3779B9) & 0xFFFFFFFF, ((seed >> 32) + r * 0xBB67AE85) % 2**32
        p0, p1 = np.uint64(0xD2511F53) * left0, np.uint64(0xCD9E8D57) * left1
        left0, right0 = (p1 >> word) ^ right0 ^ np.uint64(key0), p1 & low
        left1, right1 = (p0 >> word) ^ right1 ^ np.uint64(key1), p0 & low
    words = np.stack([left0, right0, left1, right1], axis=1).ravel()[:count]
    return torch.from_numpy((words >> np.uint64(8)).astype(np.float64) / 2**23 - 1)


def plain_linf_start(origin: Tensor, eps: float, seed: int, clip: tuple[float, float]) -> Tensor:
    """A uniform point of the ball in torch's words; half types in float32, rounded once."""
    centre = origin if origin.dtype == torch.float64 else origin.float()
    noise = plain_uniform(origin.numel(), seed).to(centre.dtype).reshape(origin.shape)
    return torch.clamp(centre + eps * noise, *clip).to(origin.dtype)


def plain_l2_step(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step: float, clip: tuple[float, float]
) -> Tensor:
    """The usual program of l2 PGD, row by row; half types in float32, rounded once."""
    rows = []
    for row, g, centre in zip(x, grad, origin, strict=True):
        if row.dtype != torch.float64:
            row, g, centre = row.float(), g.float(), centre.float()
        moved = row + step * g / g.norm() if g.any() else row
        offset = moved - centre
        if offset.norm() > eps:
            moved = centre + offset * (eps / offset.norm())
        rows.append(moved.clamp(*clip))
    return torch.stack(rows).to(x.dtype)


def plain_keep_best(
    best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """One row after the other, compared as Python numbers."""
    best_x, best_value = best_x.clone(), best_value.clone()
    pairs = zip(value.reshape(-1).tolist(), best_value.reshape(-1).tolist(), strict=True)
    for n, (new, best) in enumerate(pairs):
        if new > best or (math.isnan(best) and not math.isnan(new)):
            at = n if value.dim() else ...
            best_x[at], best_value[at] = x[at], value[at]
    return best_x, best_value


BIT_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(ours: Tensor, wanted: Tensor) -> None:
    """Same bits, but for the sign of a zero and a NaN's payload, on which torch's lanes differ."""
    assert ours.dtype == wanted.dtype
    assert ours.shape == wanted.shape
    kind = BIT_TYPES[ours.dtype.itemsize]
    same = ours.contiguous().view(kind) == wanted.contiguous().view(kind)
    same |= (ours == 0) & (wanted == 0)
    same |= ours.isnan() & wanted.isnan()
    assert same.all(), f"{(~same).sum()} differ: {ours[~same][:4]} for {wanted[~same][:4]}"
