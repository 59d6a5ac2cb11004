"""mine and its running mean: value, corrected gradient, and a state that can be saved."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch
from gpu_on_cpu import every_impl
from oracle import DTYPES, as_scores, limits, plain_dv, value_and_grads
from strategies import features
from torch import Tensor

from wcmi_fast import functional

both_keeps = pytest.mark.parametrize("kept_bytes", [0, 4 << 20])


def split(T: Tensor) -> tuple[Tensor, Tensor]:
    n, _, p = T.shape
    own = torch.eye(n, dtype=torch.bool)
    return T[own], T[~own].view(n, n - 1, p)


def mean_exp(T: Tensor) -> Tensor:
    return split(T)[1].exp().mean((0, 1))


class PlainMine:
    """MINE of spec.md section 2 as its paper writes it, with exp(T) itself."""

    def __init__(self, decay: float) -> None:
        self.decay, self.average = decay, None

    def carrier(self, T: Tensor) -> Tensor:
        """What has mine's gradient: that of the log term is that of mean exp(T) / average."""
        now = mean_exp(T)
        past = now if self.average is None else self.average
        self.average = (self.decay * past + (1 - self.decay) * now).detach()
        return (split(T)[0].mean(0) - now / self.average).mean()


@every_impl
@both_keeps
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_batches_in_a_row(decay: float, kept_bytes: int, impl: str) -> None:
    state, plain = functional.EMAState(decay), PlainMine(decay)
    for scale in (1.0, 0.3, 2.0, 1.0):
        z, h = features(9, 3, 5, torch.float64, scale**0.5)
        with limits(5 * 8 * 3 * 8, kept_bytes, tile_rows=8):
            ours = value_and_grads(
                lambda a, b: functional.mine(a, b, ema_state=state, impl=impl), z, h
            )
        wanted = value_and_grads(lambda a, b: plain.carrier(as_scores(a, b)), z, h)
        torch.testing.assert_close(ours.value, plain_dv(*split(as_scores(z, h))))
        torch.testing.assert_close(ours.grads, wanted.grads)
        torch.testing.assert_close(state.log_mean, plain.average.log())


@every_impl
def test_the_first_batch_and_a_decay_of_0_have_the_gradient_of_dv(impl: str) -> None:
    for decay in (0.99, 0.0):
        z, h = features(9, 3, 5)
        state = functional.EMAState(decay)
        ours = value_and_grads(
            lambda a, b, s=state: functional.mine(a, b, ema_state=s, impl=impl), z, h
        )
        wanted = value_and_grads(lambda a, b: functional.dv(a, b, impl=impl), z, h)
        torch.testing.assert_close(ours, wanted)
    later = value_and_grads(lambda a, b: functional.mine(a, b, ema_state=state, impl=impl), z, -h)
    wanted = value_and_grads(lambda a, b: functional.dv(a, b, impl=impl), z, -h)
    torch.testing.assert_close(later, wanted)


@every_impl
def test_the_past_changes_the_gradient_and_not_the_value(impl: str) -> None:
    z, h = features(9, 3, 5)
    results = []
    for past in (-5.0, 5.0):
        state = functional.EMAState(0.9)
        state.log_mean = torch.full((3,), past)
        results.append(
            value_and_grads(lambda a, s=state: functional.mine(a, h, ema_state=s, impl=impl), z)
        )
    assert torch.equal(results[0].value, results[1].value)
    assert (results[0].grads[0] - results[1].grads[0]).abs().max() > 0.1


@every_impl
def test_scores_whose_exponentials_overflow(impl: str) -> None:
    state, T = functional.EMAState(0.5), torch.randn(9, 9, 2)
    for shift in (150.0, 149.0, -150.0):
        value = functional.mine(scores=T + shift, ema_state=state, impl=impl)
        torch.testing.assert_close(value, plain_dv(*split(T)), rtol=0, atol=1e-4)
        assert state.log_mean.isfinite().all()
    log_mean = mean_exp(T.double()).log()
    wanted = torch.logaddexp(log_mean + 150 + math.log(1 / 4), log_mean + 149 + math.log(1 / 4))
    torch.testing.assert_close(state.log_mean.double(), wanted, rtol=0, atol=1e-4)


@every_impl
def test_the_second_derivative_is_that_of_the_corrected_term(impl: str) -> None:
    z, h = (t.requires_grad_() for t in features(5, 2, 3, torch.float64))

    def hessian_product(value: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(value, (z, h), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), (z, h))

    state, plain = functional.EMAState(0.5), PlainMine(0.5)
    state.log_mean, plain.average = torch.zeros(2).double(), torch.ones(2).double()
    ours = hessian_product(functional.mine(z, h, ema_state=state, impl=impl))
    wanted = hessian_product(plain.carrier(as_scores(z, h)))
    torch.testing.assert_close(ours, wanted)


# ---- the state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_goes_through_a_file_and_goes_on_as_it_would(dtype: torch.dtype) -> None:
    batches = [features(9, 3, 5, dtype) for _ in range(3)]
    state = functional.EMAState(0.7)
    for z, h in batches[:2]:
        functional.mine(z, h, ema_state=state)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    restored = functional.EMAState()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.decay == 0.7
    assert torch.equal(restored.log_mean, state.log_mean)
    z, h = batches[2]
    results = [
        value_and_grads(lambda a, b, s=s: functional.mine(a, b, ema_state=s), z, h)
        for s in (state, restored)
    ]
    for ours, wanted in zip(results[1].grads, results[0].grads, strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(restored.log_mean, state.log_mean)
    assert restored.log_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_fresh_state_goes_through_a_file() -> None:
    state = functional.EMAState()
    state.load_state_dict(functional.EMAState(0.25).state_dict())
    assert state.decay == 0.25
    assert state.log_mean is None


def test_a_loaded_state_shares_no_memory_and_a_state_has_no_graph() -> None:
    z, h = (t.requires_grad_() for t in features(9, 3, 5))
    state, other = functional.EMAState(0.5), functional.EMAState()
    functional.mine(z, h, ema_state=state)
    functional.mine(z, h, ema_state=state)
    assert not state.log_mean.requires_grad
    other.load_state_dict(state.state_dict())
    before = other.log_mean.clone()
    state.log_mean.zero_()
    assert torch.equal(other.log_mean, before)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, math.nan])
def test_bad_decay(decay: float) -> None:
    message = re.escape(f"EMAState: decay is {decay}, wanted a number in [0, 1)")
    with pytest.raises(ValueError, match=message):
        functional.EMAState(decay)
    with pytest.raises(ValueError, match=message):
        functional.EMAState().load_state_dict({"decay": decay, "log_mean": None})


def test_bad_state() -> None:
    message = re.escape("state has keys ['decay'], wanted ['decay', 'log_mean']")
    with pytest.raises(ValueError, match="EMAState.load_state_dict: " + message):
        functional.EMAState().load_state_dict({"decay": 0.5})


BAD_PASTS = [
    (torch.zeros(3).double(), TypeError, "dtype torch.float64, wanted the statistics', "),
    (torch.zeros(2), ValueError, "ema_state has P = 2, wanted the inputs', P = 3"),
    (torch.zeros(3, device="meta"), ValueError, "ema_state is on meta, wanted the inputs', cpu"),
]


@every_impl
@pytest.mark.parametrize(("past", "error", "message"), BAD_PASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_of_other_inputs_is_refused_and_kept(
    dtype: torch.dtype, past: Tensor, error: type[Exception], message: str, impl: str
) -> None:
    state = functional.EMAState(0.5)
    state.log_mean = past
    with pytest.raises(error, match="^mine: ema_state .*" + message.removeprefix("ema_state ")):
        functional.mine(*features(9, 3, 5, dtype), ema_state=state, impl=impl)
    assert state.log_mean is past


def test_a_float32_state_is_refused_by_float64_inputs() -> None:
    state = functional.EMAState(0.5)
    functional.mine(*features(9, 3, 5), ema_state=state)
    with pytest.raises(TypeError, match=r"torch\.float32, wanted the statistics', torch\.float64"):
        functional.mine(*features(9, 3, 5, torch.float64), ema_state=state)
