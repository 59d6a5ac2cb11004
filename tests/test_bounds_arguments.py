"""Bad input to the bounds: one sentence with the function, the argument, what it got and wanted."""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager

import pytest
import torch
from gpu_on_cpu import every_impl
from strategies import features
from torch import Tensor

from wcmi_fast import functional

EXTRA = {
    "dv": {},
    "infonce": {},
    "nwj": {},
    "jsd": {},
    "smile": {"tau": 1.0},
    "mine": {},
    "fenchel_dual": {"measure": "KL"},
    "critic_stats": {"which": "dv"},
}
every_function = pytest.mark.parametrize("function", EXTRA)
THOSE_WITH_STATS = [name for name in EXTRA if name != "critic_stats"]


def call(function: str, *inputs: Tensor, **options: object) -> object:
    state = {"ema_state": functional.EMAState()} if function == "mine" else {}
    given = {**EXTRA[function], **state, **options}
    return getattr(functional, function)(*inputs, **given)


def refused(error: type[Exception], sentence: str) -> AbstractContextManager[object]:
    """Exactly this sentence, and no other line."""
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


# ---- z and h ------------------------------------------------------------------------------------

TOO_FEW = "wanted N >= 2: fewer have no negative pair"
BAD_SHAPES = [
    ((5, 3), (6, 2, 3), "h has N = 6, wanted z's, N = 5"),
    ((5, 3), (6, 3), "h has N = 6, wanted z's, N = 5"),
    ((5, 3), (5, 2, 4), "h has U = 4, wanted z's, U = 3"),
    ((5, 3), (5, 4), "h has U = 4, wanted z's, U = 3"),
    ((1, 3), (1, 2, 3), f"z has N = 1, {TOO_FEW}"),
    ((0, 3), (0, 2, 3), f"z has N = 0, {TOO_FEW}"),
    ((5, 3), (5, 0, 3), "h has shape (5, 0, 3), wanted no empty dimension"),
    ((5, 0), (5, 2, 0), "h has shape (5, 2, 0), wanted no empty dimension"),
    ((5,), (5, 2, 3), "z has shape (5,), wanted (N, U)"),
    ((5, 2, 3), (5, 2, 3), "z has shape (5, 2, 3), wanted (N, U)"),
    ((5, 3), (5,), "h has shape (5,), wanted (N, P, U) or (N, U)"),
    ((5, 3), (5, 2, 2, 3), "h has shape (5, 2, 2, 3), wanted (N, P, U) or (N, U)"),
]


@every_function
@every_impl
@pytest.mark.parametrize(("z", "h", "sentence"), BAD_SHAPES)
def test_shapes_of_features(
    z: tuple[int, ...], h: tuple[int, ...], sentence: str, impl: str, function: str
) -> None:
    with refused(ValueError, f"{function}: {sentence}"):
        call(function, torch.zeros(z), torch.zeros(h), impl=impl)


FLOATS = "(torch.float32, torch.float64, torch.bfloat16, torch.float16)"
NOT_FLOAT = [torch.int64, torch.uint8, torch.bool, torch.complex64]


@every_function
@pytest.mark.parametrize("dtype", NOT_FLOAT, ids=str)
def test_dtypes_of_features(dtype: torch.dtype, function: str) -> None:
    bad, fine = torch.zeros(5, 3, dtype=dtype), torch.zeros(5, 3)
    with refused(TypeError, f"{function}: z has dtype {dtype}, wanted a float dtype of {FLOATS}"):
        call(function, bad, bad)
    with refused(TypeError, f"{function}: h has dtype {dtype}, wanted z's, torch.float32"):
        call(function, fine, bad)


@every_function
@every_impl
def test_features_of_two_dtypes_or_devices(impl: str, function: str) -> None:
    z, h = features(5, 2, 3)
    with refused(TypeError, f"{function}: h has dtype torch.float64, wanted z's, torch.float32"):
        call(function, z, h.double(), impl=impl)
    with refused(ValueError, f"{function}: h is on meta, wanted z's device, cpu"):
        call(function, z, h.to("meta"), impl=impl)
    with refused(ValueError, f"{function}: h is on cpu, wanted z's device, meta"):
        call(function, z.to("meta"), h, impl=None)


# ---- scores -------------------------------------------------------------------------------------

BAD_SCORES = [
    ((5, 4), "scores has shape (5, 4), wanted (N, N, P) or (N, N)"),
    ((5, 4, 2), "scores has shape (5, 4, 2), wanted (N, N, P) or (N, N)"),
    ((2, 5, 5), "scores has shape (2, 5, 5), wanted (N, N, P) or (N, N)"),
    ((5,), "scores has shape (5,), wanted (N, N, P) or (N, N)"),
    ((), "scores has shape (), wanted (N, N, P) or (N, N)"),
    ((5, 5, 2, 1), "scores has shape (5, 5, 2, 1), wanted (N, N, P) or (N, N)"),
    ((1, 1), f"scores has N = 1, {TOO_FEW}"),
    ((1, 1, 4), f"scores has N = 1, {TOO_FEW}"),
    ((0, 0), f"scores has N = 0, {TOO_FEW}"),
    ((5, 5, 0), "scores has shape (5, 5, 0), wanted no empty dimension"),
]


@every_function
@every_impl
@pytest.mark.parametrize(("shape", "sentence"), BAD_SCORES)
def test_shapes_of_scores(shape: tuple[int, ...], sentence: str, impl: str, function: str) -> None:
    with refused(ValueError, f"{function}: {sentence}"):
        call(function, scores=torch.zeros(shape), impl=impl)


@every_function
@pytest.mark.parametrize("dtype", NOT_FLOAT, ids=str)
def test_dtypes_of_scores(dtype: torch.dtype, function: str) -> None:
    sentence = f"{function}: scores has dtype {dtype}, wanted a float dtype of {FLOATS}"
    with refused(TypeError, sentence):
        call(function, scores=torch.zeros(5, 5, dtype=dtype))


# ---- which of the three forms -------------------------------------------------------------------


def some_stats() -> functional.CriticStats:
    return functional.critic_stats(*features(5, 2, 3), which=["dv", "jsd"])


FORMS = [
    ((), "nothing"),
    (("z",), "z"),
    (("h",), "h"),
    (("z", "h", "scores"), "z and h and scores"),
    (("z", "scores"), "z and scores"),
    (("z", "h", "stats"), "z and h and stats"),
    (("scores", "stats"), "scores and stats"),
]


@pytest.mark.parametrize(("names", "got"), FORMS)
@every_function
def test_one_form_of_input(function: str, names: tuple[str, ...], got: str) -> None:
    if function == "critic_stats" and "stats" in names:
        pytest.skip("critic_stats takes no stats")
    z, h = features(5, 2, 3)
    inputs = {"z": z, "h": h, "scores": torch.zeros(5, 5), "stats": some_stats()}
    wanted = "wanted z and h, or scores, or stats"
    if function == "critic_stats":
        wanted = "wanted z and h, or scores"
    with refused(TypeError, f"{function}: got {got}, {wanted}"):
        call(function, **{name: inputs[name] for name in names})


@pytest.mark.parametrize("function", THOSE_WITH_STATS)
def test_stats_come_alone(function: str) -> None:
    for name, value in (("mask", torch.ones(5, dtype=torch.bool)), ("impl", "cpu")):
        wanted = "wanted it in critic_stats' own call"
        with refused(TypeError, f"{function}: got {name} with stats, {wanted}"):
            call(function, stats=some_stats(), **{name: value})


LACKING = [
    ("dv", "jsd", "lse"),
    ("infonce", "jsd", "lse"),
    ("nwj", "W1", "lse"),
    ("mine", "X2", "lse"),
    ("fenchel_dual", "jsd", "lse"),
    ("jsd", "dv", "softplus"),
    ("smile", "jsd", "clamped_lse"),
]


@pytest.mark.parametrize(("function", "which", "field"), LACKING)
@every_impl
def test_stats_of_another_bound(impl: str, function: str, which: str, field: str) -> None:
    stats = functional.critic_stats(*features(5, 2, 3), which=which, impl=impl)
    wanted = "the stats of critic_stats(..., which=) with this bound among the names"
    with refused(ValueError, f"{function}: stats.{field} is None, wanted {wanted}"):
        call(function, stats=stats)


# ---- mask ---------------------------------------------------------------------------------------


def mask_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


TOO_FEW_ROWS = "of 5 rows, wanted 2 or more: fewer have no negative pair"
BAD_MASKS = [
    (mask_of(1, 1, 1), ValueError, "mask has shape (3,), wanted (N,), (5,)"),
    (mask_of(1, 1, 1, 1, 1, 1), ValueError, "mask has shape (6,), wanted (N,), (5,)"),
    (mask_of(1, 1, 1, 1, 1)[None], ValueError, "mask has shape (1, 5), wanted (N,), (5,)"),
    (torch.ones(5), TypeError, "mask has dtype torch.float32, wanted torch.bool"),
    (torch.arange(5), TypeError, "mask has dtype torch.int64, wanted torch.bool"),
    (torch.ones(5).byte(), TypeError, "mask has dtype torch.uint8, wanted torch.bool"),
    (mask_of(1, 1, 1, 1, 1).to("meta"), ValueError, "mask is on meta, wanted the inputs', cpu"),
    (mask_of(0, 0, 0, 0, 0), ValueError, f"mask keeps 0 {TOO_FEW_ROWS}"),
    (mask_of(0, 0, 1, 0, 0), ValueError, f"mask keeps 1 {TOO_FEW_ROWS}"),
]


@every_function
@every_impl
@pytest.mark.parametrize(("mask", "error", "sentence"), BAD_MASKS)
def test_masks(
    mask: Tensor, error: type[Exception], sentence: str, impl: str, function: str
) -> None:
    with refused(error, f"{function}: {sentence}"):
        call(function, *features(5, 2, 3), mask=mask, impl=impl)
    with refused(error, f"{function}: {sentence}"):
        call(function, scores=torch.zeros(5, 5, 2), mask=mask, impl=impl)


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", ["keep", "", None])
def test_unknown_diagonal(diagonal: str | None) -> None:
    with refused(ValueError, f"dv: diagonal is {diagonal!r}, wanted one of ('exclude', 'zero')"):
        functional.dv(*features(5, 2, 3), diagonal=diagonal)


@pytest.mark.parametrize("candidates", ["images", "", None])
def test_unknown_candidates(candidates: str | None) -> None:
    wanted = "wanted one of ('location', 'all_locations')"
    with refused(ValueError, f"infonce: candidates is {candidates!r}, {wanted}"):
        functional.infonce(*features(5, 2, 3), candidates=candidates)


@pytest.mark.parametrize("measure", ["JSD", "kl", "", None])
def test_unknown_measure(measure: str | None) -> None:
    wanted = "wanted one of ('GAN', 'X2', 'KL', 'RKL', 'H2', 'W1')"
    with refused(ValueError, f"fenchel_dual: measure is {measure!r}, {wanted}"):
        functional.fenchel_dual(*features(5, 2, 3), measure=measure)


@every_impl
@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_bad_tau(tau: float, impl: str) -> None:
    with refused(ValueError, f"smile: tau is {tau}, wanted a finite number > 0"):
        functional.smile(*features(5, 2, 3), tau=tau, impl=impl)
    with refused(ValueError, f"critic_stats: tau is {tau}, wanted a finite number > 0"):
        functional.critic_stats(*features(5, 2, 3), which="smile", tau=tau, impl=impl)


@every_impl
def test_tau_of_other_stats(impl: str) -> None:
    stats = functional.critic_stats(*features(5, 2, 3), which="smile", tau=1.0, impl=impl)
    with refused(ValueError, "smile: tau is 2.0, wanted that of stats, 1.0"):
        functional.smile(stats=stats, tau=2.0)
    functional.smile(stats=stats, tau=1)


def test_tau_with_smile_only() -> None:
    with refused(ValueError, "critic_stats: tau is None, wanted a number > 0 for smile"):
        functional.critic_stats(*features(5, 2, 3), which=["dv", "smile"])
    with refused(ValueError, "critic_stats: tau is 1.0, wanted None without smile"):
        functional.critic_stats(*features(5, 2, 3), which="dv", tau=1.0)


NAMES = "('dv', 'infonce', 'nwj', 'mine', 'jsd', 'smile', 'GAN', 'X2', 'KL', 'RKL', 'H2', 'W1')"


@pytest.mark.parametrize(
    ("which", "got"),
    [("lse", "'lse'"), (["dv", "fenchel_dual"], "'fenchel_dual'"), ([], "empty"), ("", "''")],
)
def test_unknown_names_of_statistics(which: list[str] | str, got: str) -> None:
    with refused(ValueError, f"critic_stats: which is {got}, wanted names out of {NAMES}"):
        functional.critic_stats(*features(5, 2, 3), which=which)


@every_function
def test_unknown_impl(function: str) -> None:
    wanted = "wanted None or one of ('reference', 'cpu', 'cuda', 'triton')"
    for inputs in ({"scores": torch.zeros(5, 5)}, dict(zip("zh", features(5, 2, 3), strict=True))):
        with refused(ValueError, f"{function}: impl is 'fastest', {wanted}"):
            call(function, **inputs, impl="fastest")
        with pytest.raises(RuntimeError, match=f"^{function}: impl='cuda' cannot be honoured: "):
            call(function, **inputs, impl="cuda")
