from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wcmi_fast.theory import (
    adversarial_accuracy_upper_bound,
    adversarial_risk_lower_bound,
    binary_entropy,
    binary_entropy_derivative,
    fano_conditional_entropy,
    fano_error_lower_bound,
)
from wcmi_fast.theory.entropy import entropy_deficit

# Every part of [0, 1], with the smallest double, and both neighbours of 1/2 and of 1.
PROBABILITIES = [5e-324, 1e-300, 1e-17, 1e-8, 0.1, 0.249999, 0.25, 0.4, 0.5 - 1e-9, 0.5 - 2**-54]
PROBABILITIES += [0.5, 0.5 + 2**-53, 0.5 + 1e-5, 0.7, 0.75, 0.9, 1 - 1e-8, 1 - 2**-53]


@pytest.mark.parametrize(("information", "percent"), [(1.08, 77.0), (0.0, 30.1), (-0.4, 30.1)])
def test_worked_values(information: float, percent: float) -> None:
    assert round(100 * adversarial_accuracy_upper_bound(information, 10), 1) == percent
    assert round(100 * adversarial_risk_lower_bound(information, 10), 1) == 100 - percent


def test_the_proofs_checks() -> None:
    document = Path(__file__).parents[1] / "docs" / "theory.md"
    found = doctest.testfile(str(document), module_relative=False)
    assert found.failed == 0
    assert found.attempted > 50


def test_no_constraint_from_log_5_on() -> None:
    assert adversarial_risk_lower_bound(1.609, 10) > 0
    assert adversarial_risk_lower_bound(1.61, 10) == 0
    assert adversarial_risk_lower_bound(math.inf, 10) == 0
    assert adversarial_accuracy_upper_bound(1.61, 10) == 1


def test_two_classes_are_never_constrained() -> None:
    assert adversarial_risk_lower_bound(0.0, 2) == 0


@settings(deadline=None)
@given(classes=st.integers(2, 10**6), risk=st.floats(0, 1))
def test_inverts_fano(classes: int, risk: float) -> None:
    information = (1 - risk) * math.log(classes) - math.log(2)
    expected = risk if information >= 0 else 1 - math.log(2) / math.log(classes)
    found = adversarial_risk_lower_bound(information, classes)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 <= found <= 1


@pytest.mark.parametrize(
    ("information", "classes", "error", "sentence"),
    [
        (1.0, 1, ValueError, "classes is 1, wanted 2 or more"),
        (1.0, -3, ValueError, "classes is -3, wanted 2 or more"),
        (1.0, 10.0, TypeError, "classes is 10.0, wanted an integer, 2 or more"),
        (1.0, True, TypeError, "classes is True, wanted an integer"),
        (math.nan, 10, ValueError, "worst_case_information is nan, wanted a number of nats"),
    ],
)
def test_bad_input(information: float, classes: int, error: type[Exception], sentence: str) -> None:
    for function in (adversarial_risk_lower_bound, adversarial_accuracy_upper_bound):
        with pytest.raises(error, match=f"adversarial_risk_lower_bound: {sentence}"):
            function(information, classes)


def test_arrays_and_tensors_broadcast() -> None:
    information, classes = np.array([[0.0], [1.08], [-0.4], [math.inf]]), np.array([2, 10, 1000])
    found = adversarial_risk_lower_bound(information, classes)
    wanted = [
        [adversarial_risk_lower_bound(nats, k) for k in classes.tolist()]
        for nats in information[:, 0].tolist()
    ]
    assert isinstance(found, np.ndarray)
    assert found.tolist() == wanted
    as_tensors = adversarial_risk_lower_bound(torch.tensor(information), torch.tensor(classes))
    assert as_tensors.tolist() == wanted
    mixed = adversarial_accuracy_upper_bound(torch.tensor(information), classes)
    assert mixed.tolist() == [[1 - risk for risk in row] for row in wanted]
    assert adversarial_risk_lower_bound(1.08, classes).tolist() == wanted[1]
    assert type(adversarial_risk_lower_bound(np.float32(0.5), np.int64(10))) is float


def test_dtypes_are_kept() -> None:
    single = torch.tensor([0.5, 1.0], dtype=torch.float32)
    assert adversarial_risk_lower_bound(single, 10).dtype == torch.float32
    assert adversarial_risk_lower_bound(single.numpy(), 10).dtype == np.float32
    assert adversarial_risk_lower_bound(torch.tensor([0, 1]), 10).dtype == torch.float64
    assert binary_entropy(single).dtype == torch.float32


def test_without_clipping_it_is_the_formula() -> None:
    for nats in (-0.4, 0.0, 1.0, 3.0):
        formula = 1 - (nats + math.log(2)) / math.log(10)
        assert adversarial_risk_lower_bound(nats, 10, clip=False) == pytest.approx(formula)
        upper = adversarial_accuracy_upper_bound(nats, 10, clip=False)
        assert upper == pytest.approx(1 - formula)
    assert adversarial_risk_lower_bound(math.inf, 10, clip=False) == -math.inf
    assert adversarial_accuracy_upper_bound(3.0, 10, clip=False) > 1


def test_tensors_have_gradients() -> None:
    information = torch.tensor([-1.0, 0.5, 5.0], dtype=torch.float64, requires_grad=True)
    adversarial_risk_lower_bound(information, 10).sum().backward()
    assert information.grad is not None
    assert information.grad.tolist() == pytest.approx([0, -1 / math.log(10), 0])


def test_bad_elements_are_named() -> None:
    with pytest.raises(ValueError, match="classes holds 1, wanted 2 or more"):
        adversarial_risk_lower_bound(1.0, np.array([10, 1]))
    with pytest.raises(TypeError, match="classes is an array of float64, wanted an integer"):
        adversarial_risk_lower_bound(1.0, np.array([10.0]))
    with pytest.raises(ValueError, match="worst_case_information holds nan, wanted a number"):
        adversarial_risk_lower_bound(torch.tensor([1.0, math.nan]), 10)
    with pytest.raises(TypeError, match="worst_case_information is '1', wanted a number of nats"):
        adversarial_risk_lower_bound("1", 10)


def exact_entropy(p: float) -> float:
    with localcontext(prec=400):
        one = Decimal(p), 1 - Decimal(p)
        return float(-sum(share * share.ln() for share in one))


def exact_derivative(p: float) -> float:
    with localcontext(prec=400):
        return float(((1 - Decimal(p)) / Decimal(p)).ln())


@pytest.mark.parametrize("p", PROBABILITIES)
def test_entropy_and_derivative_are_accurate(p: float) -> None:
    assert binary_entropy(p) == pytest.approx(exact_entropy(p), rel=1e-15, abs=0)
    assert binary_entropy_derivative(p) == pytest.approx(exact_derivative(p), rel=1e-15, abs=0)


def test_entropy_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    entropy = binary_entropy(ends)
    entropy.sum().backward()
    assert entropy.tolist() == [0, 0]
    assert ends.grad is not None
    assert ends.grad.tolist() == [math.inf, -math.inf]
    assert binary_entropy_derivative(np.array([0, 1])).tolist() == [math.inf, -math.inf]
    assert binary_entropy(0.5) == math.log(2)
    assert binary_entropy_derivative(0.5) == 0


def test_entropy_is_differentiable_twice() -> None:
    p = torch.tensor([1e-3, 0.2, 0.3, 0.5, 0.6, 0.99], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(binary_entropy, p)
    assert torch.autograd.gradgradcheck(binary_entropy, p)
    (slope,) = torch.autograd.grad(binary_entropy_derivative(p).sum(), p)
    assert torch.allclose(slope, -1 / (p * (1 - p)), rtol=1e-12)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(binary_entropy_derivative(ends).sum(), ends)
    assert slope.tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("imbalance", [0.0, 1e-160, 1e-9, 0.01, 0.4999, 0.5, 0.8, 1 - 1e-9, 1.0])
def test_deficit_of_an_unbalanced_coin(imbalance: float) -> None:
    with localcontext(prec=400):
        shares = (1 - Decimal(imbalance)) / 2, (1 + Decimal(imbalance)) / 2
        wanted = Decimal(2).ln() + sum(p * p.ln() for p in shares if p > 0)
    assert entropy_deficit(imbalance) == pytest.approx(float(wanted), rel=2e-15, abs=0)


@pytest.mark.parametrize("function", [binary_entropy, binary_entropy_derivative])
def test_no_probability(function: Callable[[Any], Any]) -> None:
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name}: p is 1.5, wanted a probability in"):
        function(1.5)
    with pytest.raises(ValueError, match=f"{name}: p holds -1.0, wanted a probability in"):
        function(torch.tensor([0.5, -1.0]))
    with pytest.raises(ValueError, match=f"{name}: p is nan, wanted a probability in"):
        function(math.nan)
    with pytest.raises(TypeError, match=f"{name}: p is None, wanted a probability in"):
        function(None)


@given(classes=st.integers(2, 6), data=st.data())
def test_fano_holds_for_every_guess(classes: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    joint = np.random.default_rng(seed).dirichlet(np.full(classes * 4, 0.3)).reshape(classes, 4)
    guess = data.draw(st.lists(st.integers(0, classes - 1), min_size=4, max_size=4))
    error = min(max(1 - sum(joint[guess[z], z] for z in range(4)), 0.0), 1.0)
    share = joint / joint.sum(0)
    conditional = -np.sum(joint * np.log(np.where(share > 0, share, 1.0)))
    assert conditional <= fano_conditional_entropy(error, classes) + 1e-9


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("error", [0.0, 0.01, 0.3, 0.45])
def test_fano_is_attained(classes: int, error: float) -> None:
    # A symmetric channel: Z is Y, or one of the other classes alike.
    wrong = error / (classes - 1)
    conditional = -(1 - error) * math.log(1 - error)
    conditional -= (classes - 1) * (wrong * math.log(wrong) if wrong else 0.0)
    assert fano_conditional_entropy(error, classes) == pytest.approx(conditional, abs=1e-14)
    least = fano_error_lower_bound(math.log(classes) - conditional, classes)
    assert least == pytest.approx(error, abs=1e-12)


def test_fano_is_sharper_than_theorem_3_4() -> None:
    information, classes = np.linspace(0, 3, 50)[:, None], np.array([2, 3, 10, 1000])
    sharp = fano_error_lower_bound(information, classes)
    assert (sharp >= adversarial_risk_lower_bound(information, classes)).all()
    assert fano_error_lower_bound(0.3, 2) > 0.13  # where theorem 3.4 says nothing
    assert fano_error_lower_bound(-1.0, 10) == 0.9
    assert fano_error_lower_bound(math.log(10), 10) == 0
    assert fano_error_lower_bound(torch.tensor([math.inf]), 10).tolist() == [0]
