from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wcmi_fast.theory import adversarial_accuracy_upper_bound, adversarial_risk_lower_bound


@pytest.mark.parametrize(("information", "percent"), [(1.08, 77.0), (0.0, 30.1), (-0.4, 30.1)])
def test_worked_values(information: float, percent: float) -> None:
    assert round(100 * adversarial_accuracy_upper_bound(information, 10), 1) == percent
    assert round(100 * adversarial_risk_lower_bound(information, 10), 1) == 100 - percent


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
