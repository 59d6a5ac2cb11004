"""Lemma C.1: information of a representation whose components are independent given the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from wcmi_fast.theory.finite import mutual_information, probability_table


class ComponentInformation(NamedTuple):
    """Information of a representation Z = (Z_1, ..., Z_n) about X, in nats.

    Attributes:
        whole: I(X; Z).
        parts: I(X; Z_i) of each component; lemma C.1 says that whole is at most their sum.
    """

    whole: float
    parts: tuple[float, ...]


def component_information(
    marginal: ArrayLike, channels: Sequence[ArrayLike]
) -> ComponentInformation:
    """Return I(X; Z) and all I(X; Z_i) for components that are independent given X.

    Args:
        marginal: (X,), Pr[X = x].
        channels: for each component (X, Z_i), Pr[Z_i = z | X = x]; rows sum to 1.

    Raises:
        ValueError: no channel; tables that do not fit or hold no probabilities.

    Equivalent torch program, for two components::

        joint = torch.einsum("x,xa,xb->xab", marginal, *channels).flatten(1)
        torch.xlogy(joint, joint / (joint.sum(1, keepdim=True) * joint.sum(0))).nansum()

    Source: Zhu et al. 2020, lemma C.1.
    """
    owner = "component_information"
    masses = probability_table(owner, "marginal", marginal, 1)
    if not channels:
        raise ValueError(f"{owner}: channels is empty, wanted a table for each component")
    joint, parts = masses[:, None], []
    for number, channel in enumerate(channels):
        table = np.asarray(channel, dtype=np.float64)
        if table.ndim != 2 or len(table) != len(masses):
            raise ValueError(
                f"{owner}: channels[{number}] has shape {table.shape}, wanted ({len(masses)}, ...)"
            )
        for row in table:
            probability_table(owner, f"channels[{number}]'s row", row, 1)
        parts.append(mutual_information(masses[:, None] * table))
        joint = (joint[:, :, None] * table[:, None]).reshape(len(masses), -1)
    return ComponentInformation(mutual_information(joint), tuple(parts))
