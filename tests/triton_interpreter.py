"""Triton's interpreter for tests: our kernels on CPU tensors, with bf16 as hardware computes it.

The interpreter stores bf16 as uint16 and computes on these bits. Here every operation on bf16
widens to float32 and rounds the result to nearest even.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    ReduceOps,
    ScanOps,
    TensorHandle,
)
from triton.runtime.jit import JITFunction

from wcmi_fast.backends import triton as kernels

ROUND_TO_ZERO = interpreter._ir.ROUNDING_MODE.RTZ


# ---- kernels ------------------------------------------------------------------------------------


@functools.cache
def enable() -> str:
    """Let every kernel of wcmi_fast.backends.triton run on CPU tensors; return the device to use.

    On a machine with a GPU nothing is interpreted: the device is "cuda", and tests that put their
    tensors there run the compiled kernels.

    TRITON_INTERPRET=1 does this to functions that are decorated while it is set. torchvision
    imports triton before a test could set it, and a subprocess or inductor would see it: so the
    decorated functions are exchanged instead.
    """
    if torch.cuda.is_available():
        return "cuda"
    # Else a launch imports it, and it finds functions that are not what @triton.jit returns.
    importlib.import_module("triton.experimental.gluon")
    modules = pkgutil.iter_modules(kernels.__path__, kernels.__name__ + ".")
    for module in modules:
        importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        if name.startswith(("triton.language", kernels.__name__)):
            _exchange(module)
    for name, member in list(vars(tl.tensor).items()):
        if isinstance(member, JITFunction):
            setattr(tl.tensor, name, _method(interpreted(member)))
    _patch()
    return "cpu"


def _exchange(module: Any) -> None:
    for name, member in list(vars(module).items()):
        if isinstance(member, JITFunction):
            setattr(module, name, interpreted(member))
        elif isinstance(getattr(member, "fn", None), JITFunction):  # an autotuner
            member.fn = interpreted(member.fn)


def interpreted(kernel: JITFunction) -> InterpretedFunction:
    """Return the interpreted form of what @triton.jit returned, the same one at every call."""
    return _interpreted(kernel.fn)


# Not by the JITFunction, whose hash reads the sources of all that it calls.
@functools.cache
def _interpreted(function: Callable[..., Any]) -> InterpretedFunction:
    return InterpretedFunction(function)


def _method(function: InterpretedFunction) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


# ---- bf16 ---------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 of bf16 bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray, to_zero: bool = False) -> np.ndarray:
    """Return the bf16 bits of float32 x, rounded to nearest even unless to zero; NaN is NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    last = (bits >> np.uint32(16)) & np.uint32(1)
    up = np.uint32(0) if to_zero else np.uint32(0x7FFF) + last
    rounded = ((bits + up) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data), tl.bfloat16)


def _in_float32(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Compute an operation of the builder on bf16 in float32, and round its result.

    The interpreter calls the type of a comparison that of its operands, and then takes a scalar's
    truth for a number where it meets a block.
    """

    @functools.wraps(original)
    def operation(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        bf16 = any(map(_is_bf16, args))
        result = original(self, *(map(_wide, args) if bf16 else args))
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        return _narrow(result) if bf16 else result

    return operation


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar != tl.bfloat16:
            return original(self, _wide(src), dst_type)
        if _is_bf16(src):
            return src
        return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)

    return cast_impl


def _fp_to_fp(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_fp_to_fp(
        self: InterpreterBuilder, src: TensorHandle, dst_type: Any, rounding_mode: Any
    ) -> TensorHandle:
        if dst_type.scalar != tl.bfloat16:
            if not _is_bf16(src):
                return original(self, src, dst_type, rounding_mode)
            return self.cast_impl(src, dst_type)
        wide = _wide(src).data.astype(np.float32)
        return TensorHandle(narrow(wide, rounding_mode == ROUND_TO_ZERO), tl.bfloat16)

    return create_fp_to_fp


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        return original(self, _wide(a), _wide(b), d, *options)

    return create_dot


def _reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reduce bf16 in float32; hardware rounds in between, too, in an order of its own."""

    def apply_impl(self: Any, inputs: tuple[tl.tensor, ...]) -> Any:
        wide = [x.dtype == tl.bfloat16 for x in inputs]
        if not any(wide):
            return original(self, inputs)
        results = original(self, tuple(map(_wide_tensor, inputs)))
        if isinstance(results, tl.tensor):
            return _narrow_tensor(results)
        pairs = zip(results, wide, strict=True)
        return [_narrow_tensor(x) if was_bf16 else x for x, was_bf16 in pairs]

    return apply_impl


def _wide_tensor(x: tl.tensor) -> tl.tensor:
    if x.dtype != tl.bfloat16:
        return x
    return tl.tensor(_wide(x.handle), _with_scalar(x.type, tl.float32))


def _narrow_tensor(x: tl.tensor) -> tl.tensor:
    return tl.tensor(_narrow(x.handle), _with_scalar(x.type, tl.bfloat16))


def _with_scalar(kind: Any, scalar: tl.dtype) -> Any:
    return tl.block_type(scalar, kind.shape) if kind.is_block() else scalar


def _as_they_are(self: GridExecutor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Take tensors as they are: the interpreter copies each storage back, here onto itself."""
    return args, kwargs


def _launch(original: Callable[..., None]) -> Callable[..., None]:
    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        _patched.clear()
        with np.errstate(all="ignore"):
            original(self, *args, **kwargs)

    return call


# The language modules that the launch in progress has patched. The interpreter patches them again,
# in 2 ms, at every call of a device function.
_patched: set[int] = set()


def _patch_once(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch_lang(function: Callable[..., Any]) -> Any:
        modules = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
        if modules <= _patched:
            return interpreter._LangPatchScope()
        _patched.update(modules)
        return original(function)

    return patch_lang


def _patch() -> None:
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    builder = InterpreterBuilder
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _fp_to_fp(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    ReduceOps.apply_impl = _reduction(ReduceOps.apply_impl)
    ScanOps.apply_impl = _reduction(ScanOps.apply_impl)
    GridExecutor.__call__ = _launch(GridExecutor.__call__)
    GridExecutor._init_args_hst = _as_they_are
    GridExecutor._restore_args_dev = lambda *_: None
    # It looks for overflows of integers at each operation, but then never says so.
    interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)


# ---- traffic ------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes of global memory that kernels read and wrote."""

    read: int = 0
    written: int = 0


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count what kernels read and write inside: lanes that no mask turns off, each for itself."""
    traffic, builder = Traffic(), interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        traffic.read += _bytes(ptrs, mask)
        return load(ptrs, mask, *rest)

    def counted_store(
        ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
    ) -> None:
        traffic.written += _bytes(ptrs, mask)
        store(ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _bytes(ptrs: TensorHandle, mask: TensorHandle) -> int:
    lanes = int(np.broadcast_to(mask.data, ptrs.data.shape).sum())
    return lanes * max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
