"""Which back end runs an operator: the table, the choice and the reasons against."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wcmi_fast._ops import LIBRARY
from wcmi_fast.backends import cpu, cuda, triton
from wcmi_fast.backends.backend import Backend, Case

REFERENCE = "reference"
IMPLS = (REFERENCE, "cpu", "cuda", "triton")

BACKENDS: dict[str, Backend] = {"cpu": cpu.BACKEND, "cuda": cuda.BACKEND, "triton": triton.BACKEND}


class Entry(NamedTuple):
    """A back end, for cases of up to so many multiply-adds."""

    backend: str
    products: float = math.inf


# For each device type and operator the back ends that impl=None tries, best first, before the
# reference. It may be changed: by `prefer`, or entry by entry. That the CUDA form of critic_stats,
# one launch without tensor cores, is the faster one up to 2^23 multiply-adds is an estimate.
TABLE: dict[str, dict[str, tuple[Entry, ...]]] = {
    "cpu": {operator: (Entry("cpu"),) for operator in cpu.BACKEND.operators},
    "cuda": {
        "critic_stats": (Entry("cuda", 2.0**23), Entry("triton"), Entry("cuda")),
        "critic_tail": (Entry("triton"),),
        "dv_value": (Entry("cuda"), Entry("triton")),
        "score_stats": (Entry("cuda"), Entry("triton")),
        "linf_step_": (Entry("cuda"), Entry("triton")),
        "linf_start_": (Entry("cuda"), Entry("triton")),
        "l2_step_": (Entry("cuda"), Entry("triton")),
        "keep_best_": (Entry("cuda"), Entry("triton")),
    },
}

_logger = logging.getLogger("wcmi_fast")
_told: set[str] = set()


def prefer(device_type: str, operator: str, *backends: str) -> None:
    """Make impl=None try these back ends for an operator, best first, before the reference.

    Raises ValueError for an unknown device type, operator or back end.
    """
    if device_type not in TABLE:
        raise ValueError(f"prefer: device_type is {device_type!r}, wanted one of {(*TABLE,)}")
    if operator not in TABLE[device_type]:
        known = tuple(TABLE[device_type])
        raise ValueError(f"prefer: operator is {operator!r}, wanted one of {known}")
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"prefer: backend is {backend!r}, wanted one of {(*BACKENDS,)}")
    TABLE[device_type][operator] = tuple(Entry(backend) for backend in backends)


def case_of(like: Tensor, *, units: int = 0, products: int = 0) -> Case:
    """Return the case of an operator on tensors like this one."""
    device = like.device
    return Case(device.type, device, like.dtype, units, products)


def why_not(backend: str, operator: str, case: Case) -> str | None:
    """Return why `backend` cannot run `operator` in this case; None if it can."""
    known = BACKENDS[backend]
    if operator not in known.operators:
        return f"wcmi_fast has no {backend} kernel for it"
    if case.device_type != known.device_type:
        return f"that back end does not run on {case.device_type} tensors"
    return known.missing or known.unsupported(operator, case)


def choose(function: str, operator: str, case: Case, impl: str | None) -> str:
    """Return the back end's name for one call of the public `function`.

    Raises ValueError for an unknown impl, RuntimeError for one that cannot be honoured, and
    ValueError where WCMI_FAST_SIMD is not a level of this machine.
    """
    if cpu.BAD_LEVEL is not None:
        raise ValueError(cpu.BAD_LEVEL)
    if impl is None:
        return _best(operator, case)
    if impl == REFERENCE:
        return REFERENCE
    if impl not in BACKENDS:
        raise ValueError(f"{function}: impl is {impl!r}, wanted None or one of {IMPLS}")
    reason = why_not(impl, operator, case)
    if reason is not None:
        raise RuntimeError(f"{function}: impl={impl!r} cannot be honoured: {reason}")
    return impl


def _best(operator: str, case: Case) -> str:
    reasons: dict[str, str] = {}
    for entry in TABLE.get(case.device_type, {}).get(operator, ()):
        if case.products > entry.products:
            continue
        reason = why_not(entry.backend, operator, case)
        if reason is None:
            if reasons:
                _tell(operator, reasons, entry.backend)
            return entry.backend
        reasons[entry.backend] = reason
    _tell(operator, reasons, REFERENCE)
    return REFERENCE


def _tell(operator: str, reasons: dict[str, str], chosen: str) -> None:
    """Log once per operator that a back end which the table prefers cannot be used, and why."""
    if not reasons or torch.compiler.is_compiling():
        return
    why = "; ".join(f"{backend} cannot: {reason}" for backend, reason in reasons.items())
    sentence = f"{operator}: uses {chosen}, because {why}"
    if sentence not in _told:
        _told.add(sentence)
        _logger.warning(sentence)


def explain(device_type: str, operator: str) -> str:
    """Say in words what impl=None takes for an operator on tensors of a device type."""
    parts = []
    for entry in TABLE[device_type][operator]:
        limit = "" if entry.products == math.inf else f" up to {entry.products:,.0f} multiply-adds"
        state = " (missing)" if BACKENDS[entry.backend].missing else ""
        parts.append(f"{entry.backend}{limit}{state}")
    return ", else ".join((*parts, REFERENCE))


def _route(schema: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        return BACKENDS[arguments[-1]].kernels[schema](*arguments[:-1])

    return kernel


for _schema in cpu.BACKEND.kernels:
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_schema, _route(_schema), _key)
