"""Which back end runs an operator: the table, the choice and the reasons against."""

from __future__ import annotations

from wcmi_fast.backends import cpu, cuda

REFERENCE = "reference"
IMPLS = (REFERENCE, "cpu", "cuda", "triton")

# For each device type, the back ends that impl=None tries, best first, before the reference.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda",)}

# The operators that each back end has kernels for. Each is a prefix of the schemas in _ops.py.
OPERATORS: dict[str, tuple[str, ...]] = {
    "cpu": cpu.OPERATORS,
    "cuda": cuda.OPERATORS,
    "triton": (),
}


def why_not(backend: str, operator: str, device_type: str) -> str | None:
    """Return why `backend` cannot run `operator` on a device of this type; None if it can."""
    if operator not in OPERATORS[backend]:
        return f"wcmi_fast has no {backend} kernel for it yet"
    if backend not in PREFERENCE.get(device_type, ()):
        return f"that back end does not run on {device_type} tensors"
    return missing(backend)


def missing(backend: str) -> str | None:
    """Return why a back end is not installed, and how to get it; None if it is."""
    if backend == "triton":
        return "wcmi_fast has no triton kernels yet"
    return cpu.MISSING if backend == "cpu" else cuda.MISSING


def choose(function: str, operator: str, device_type: str, impl: str | None) -> str:
    """Return the back end's name for one call of the public `function`.

    Raises ValueError for an unknown impl, RuntimeError for one that cannot be honoured, and
    ValueError where WCMI_FAST_SIMD is not a level of this machine.
    """
    if cpu.BAD_LEVEL is not None:
        raise ValueError(cpu.BAD_LEVEL)
    if impl is None:
        for backend in PREFERENCE.get(device_type, ()):
            if why_not(backend, operator, device_type) is None:
                return backend
        return REFERENCE
    if impl not in IMPLS:
        raise ValueError(f"{function}: impl is {impl!r}, wanted None or one of {IMPLS}")
    if impl == REFERENCE:
        return REFERENCE
    reason = why_not(impl, operator, device_type)
    if reason is not None:
        raise RuntimeError(f"{function}: impl={impl!r} cannot be honoured: {reason}")
    return impl
