"""What information says about classification: Fano and theorem 3.4 (spec section 4)."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from wcmi_fast.theory.elementwise import (
    Integers,
    Numbers,
    class_counts,
    elementwise,
    numbers,
    probabilities,
)
from wcmi_fast.theory.entropy import binary_entropy

# Halvings of an interval of length 1 to the spacing of doubles there.
HALVINGS = 54


@overload
def adversarial_risk_lower_bound(
    worst_case_information: float, classes: int, *, clip: bool = True
) -> float: ...
@overload
def adversarial_risk_lower_bound(
    worst_case_information: Numbers, classes: Integers, *, clip: bool = True
) -> Any: ...
def adversarial_risk_lower_bound(
    worst_case_information: Numbers, classes: Integers, *, clip: bool = True
) -> Any:
    """Return the least adversarial risk of any classifier on a representation (theorem 3.4).

    ``1 - (I_worst + log 2) / log K``, where ``I_worst = I(X; Z) - RV_eps(g)`` is the worst-case
    information of the representation. For ten equally likely classes it says nothing (0) from
    log 5 = 1.609 nats on. The bound holds for the true information; with an estimate in its place
    (spec section 3) it is an indication and not a certificate.

    Args:
        worst_case_information: I_worst, in nats: a number, an array or a tensor.
        classes: number K of equally likely classes, integers, 2 or more, that broadcast with it.
        clip: take an estimate below 0 as 0, because information is never negative, and a risk below
            0 as 0. False gives the formula's value.

    Returns:
        A probability of error under attack, in [0, 1] if clipped: a tensor if an argument is one,
        else an array if an argument is one, else a float.

    Raises:
        TypeError: classes are not integers; worst_case_information is no number.
        ValueError: worst_case_information is NaN; classes less than 2.

    Equivalent torch program, clipped::

        (1 - (information.clamp(min=0) + math.log(2)) / math.log(classes)).clamp(min=0)

    Source: Zhu et al. 2020, theorem 3.4.
    """
    owner = "adversarial_risk_lower_bound"
    information = numbers(
        owner, "worst_case_information", worst_case_information, "a number of nats"
    )

    def risk(information: Tensor, classes: Tensor) -> Tensor:
        if clip:
            information = information.clamp(min=0)
        found = 1 - (information + math.log(2)) / classes.log()
        return found.clamp(min=0) if clip else found

    counts = class_counts(owner, classes, information)
    return elementwise(risk, information, counts, like=(worst_case_information, classes))


@overload
def adversarial_accuracy_upper_bound(
    worst_case_information: float, classes: int, *, clip: bool = True
) -> float: ...
@overload
def adversarial_accuracy_upper_bound(
    worst_case_information: Numbers, classes: Integers, *, clip: bool = True
) -> Any: ...
def adversarial_accuracy_upper_bound(
    worst_case_information: Numbers, classes: Integers, *, clip: bool = True
) -> Any:
    """Return the best adversarial accuracy of any classifier on a representation (theorem 3.4).

    One minus `adversarial_risk_lower_bound`, with the same arguments, units and errors: at 1.08
    nats and ten classes at most 77.0 % of the images can be classified correctly under attack.

    Source: Zhu et al. 2020, theorem 3.4.
    """
    return 1.0 - adversarial_risk_lower_bound(worst_case_information, classes, clip=clip)


@overload
def fano_conditional_entropy(error: float, classes: int) -> float: ...
@overload
def fano_conditional_entropy(error: Numbers, classes: Integers) -> Any: ...
def fano_conditional_entropy(error: Numbers, classes: Integers) -> Any:
    """Return the greatest H(Y|Z) of a label that Z gives away but for an error (Fano), in nats.

    ``H(Y|Z) <= H2(P_e) + P_e log(K - 1)`` for every guess of Y from Z that is wrong with
    probability P_e, whatever the distribution of Y is.

    Args:
        error: P_e in [0, 1]: a number, an array or a tensor.
        classes: number K of classes, integers, 2 or more, that broadcast with it.

    Returns:
        Nats, 0 to log K: a tensor if an argument is one, else an array if an argument is one, else
        a float.

    Raises:
        TypeError: classes are not integers; error is no number.
        ValueError: error is NaN or outside [0, 1]; classes less than 2.

    Equivalent torch program::

        torch.special.entr(error) + torch.special.entr(1 - error) + error * math.log(classes - 1)

    Source: Cover and Thomas, Elements of Information Theory, theorem 2.10.1.
    """
    owner = "fano_conditional_entropy"
    errors = probabilities(owner, "error", error)
    counts = class_counts(owner, classes, errors)
    return elementwise(_fano, errors, counts, like=(error, classes))


@overload
def fano_error_lower_bound(information: float, classes: int) -> float: ...
@overload
def fano_error_lower_bound(information: Numbers, classes: Integers) -> Any: ...
def fano_error_lower_bound(information: Numbers, classes: Integers) -> Any:
    """Return the least error of guessing one of K equally likely classes from I nats about it.

    The smallest P_e with ``H2(P_e) + P_e log(K - 1) >= log K - I``: 1 - 1/K at I = 0 and 0 from
    log K on. Theorem 3.4 puts log 2 in place of H2(P_e) and log K in place of log(K - 1), so that
    it is never above this; with worst-case information for I this bounds the adversarial risk too.

    Args:
        information: I(Y; Z) or more, in nats: a number, an array or a tensor; below 0 counts as 0.
        classes: number K of equally likely classes, integers, 2 or more, that broadcast with it.

    Returns:
        A probability, in [0, 1 - 1/K], by bisection to about 1e-15 (1e-8 next to I = 0, where H is
        flat), without gradient: a tensor if an argument is one, else an array if an argument is
        one, else a float.

    Raises:
        TypeError: classes are not integers; information is no number.
        ValueError: information is NaN; classes less than 2.

    Source: Cover and Thomas, theorem 2.10.1, solved for P_e; docs/theory.md.
    """
    owner = "fano_error_lower_bound"
    nats = numbers(owner, "information", information, "a number of nats")
    counts = class_counts(owner, classes, nats)
    return elementwise(_fano_error, nats, counts, like=(information, classes))


def _fano(error: Tensor, classes: Tensor) -> Tensor:
    return binary_entropy(error) + error * (classes - 1).log()


@torch.no_grad()
def _fano_error(information: Tensor, classes: Tensor) -> Tensor:
    information, classes = torch.broadcast_tensors(information, classes)
    wanted = classes.log() - information.clamp(min=0)
    low, high = torch.zeros_like(wanted), 1 - 1 / classes
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = _fano(middle, classes) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(information <= 0, 1 - 1 / classes, low)
