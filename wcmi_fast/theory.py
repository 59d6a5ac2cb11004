"""What information says about robustness: theorem 3.4 of the paper (spec section 4)."""

from __future__ import annotations

import math


def adversarial_risk_lower_bound(worst_case_information: float, classes: int) -> float:
    """Return the least adversarial risk of any classifier on a representation (theorem 3.4).

    ``1 - (I_worst + log 2) / log K``, clipped to [0, 1], where ``I_worst = I(X; Z) - RV_eps(g)``
    is the worst-case information of the representation. For ten equally likely classes it says
    nothing (0) from log 5 = 1.609 nats on. An estimate below 0 is taken as 0, because information
    is never negative. The bound holds for the true information; with an estimate in its place
    (spec section 3) it is an indication and not a certificate.

    Args:
        worst_case_information: I_worst, in nats.
        classes: number K of equally likely classes, 2 or more.

    Returns:
        A probability of error under attack, in [0, 1].

    Raises:
        TypeError: classes is not an integer.
        ValueError: worst_case_information is NaN; classes is less than 2.
    """
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise TypeError(
            f"adversarial_risk_lower_bound: classes is {classes!r}, wanted an integer, 2 or more"
        )
    if classes < 2:
        raise ValueError(f"adversarial_risk_lower_bound: classes is {classes}, wanted 2 or more")
    if math.isnan(worst_case_information):
        raise ValueError(
            "adversarial_risk_lower_bound: worst_case_information is nan, wanted a number of nats"
        )
    information = max(worst_case_information, 0.0)
    return max(1.0 - (information + math.log(2)) / math.log(classes), 0.0)


def adversarial_accuracy_upper_bound(worst_case_information: float, classes: int) -> float:
    """Return the best adversarial accuracy of any classifier on a representation (theorem 3.4).

    One minus `adversarial_risk_lower_bound`, with the same arguments, units and errors: at 1.08
    nats and ten classes at most 77.0 % of the images can be classified correctly under attack.
    """
    return 1.0 - adversarial_risk_lower_bound(worst_case_information, classes)
