"""Plain information, of two samples or of a model's representation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
from torch import Tensor, nn

from wcmi_fast.information.job import Options
from wcmi_fast.information.results import Report
from wcmi_fast.information.vulnerability import model_information

if TYPE_CHECKING:
    from wcmi_fast.information.sample_report import SampleReport

Sample = Tensor | np.ndarray[Any, Any]


@overload
def estimate_information(
    x: nn.Module, z: Any, /, *, bound: str = "dv", **options: Unpack[Options]
) -> Report: ...


@overload
def estimate_information(x: Sample, z: Sample, /, **options: Any) -> SampleReport: ...


def estimate_information(x: Any, z: Any, /, **options: Any) -> Report | SampleReport:
    """Estimate I(X; Z) of two samples, or I(X; g(X)) of a model g and data, in nats.

    Args:
        x: a sample (N, ...), tensor or array; or a model.
        z: the other sample (N, ...), row i belonging to row i of x; or the model's data, in any of
            the forms that `representation_vulnerability` takes.
        options: for samples those of `wcmi_fast.information.samples.sample_information`; for a
            model bound, layer, classes, trials, seed, budget, critic, train_images, test_images,
            device, folder, progress and say, as for `representation_vulnerability`.

    Returns:
        A report that prints as a table: a `SampleReport`, or a `Report`.

    Raises:
        TypeError, ValueError: samples, a model, data or options that do not fit.
        FloatingPointError: no finite value was found.

    Equivalent torch program, for one batch, critic sides z and h trained before::

        dv(z(g(x)), h(x))

    Source: Zhu et al. 2020, section 2; spec sections 2 and 3.
    """
    if isinstance(x, nn.Module):
        return model_information(x, z, **options)
    if not isinstance(x, (Tensor, np.ndarray)):
        raise TypeError(
            f"estimate_information: x is a {type(x).__name__}, wanted a sample (a tensor or an "
            "array), or an nn.Module"
        )
    from wcmi_fast.information.samples import sample_information

    return sample_information(x, z, **options)
