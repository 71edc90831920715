"""Triton, where it is installed: without it the kernels' modules import all the same, and calls say what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)
"""Kernels run on the CPU, program by program, in Triton's interpreter: TRITON_INTERPRET=1 was set at import."""


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``, or nothing at all without Triton."""
    return triton.jit(**options) if triton is not None else lambda function: function


@jit()
def rounded(value: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """A float32 value in another dtype, to the nearest; the interpreter just cuts bfloat16's last bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


def unavailable_reason() -> str | None:
    """Why kernels cannot run on this machine, or None."""
    if triton is None:
        return "Triton is not installed (pip install skipnet-rt[gpu])"
    if not INTERPRETED and not torch.cuda.is_available():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def check_device(**tensors: Tensor | None) -> None:
    """All tensors are on one device, and it is one that Triton runs on.

    Raises:
        RuntimeError: no kernel can run on this machine.
        ValueError: a tensor is elsewhere.
    """
    if (reason := unavailable_reason()) is not None:
        raise RuntimeError(reason)
    kind, where = "cpu" if INTERPRETED else "cuda", None
    for name, tensor in tensors.items():
        if tensor is not None:
            where = where or tensor.device
            if tensor.device.type != kind or tensor.device != where:
                raise ValueError(f"{name} must be on {where if where.type == kind else kind}, got {tensor.device}")
    if where is not None and not INTERPRETED and where.index != torch.cuda.current_device():
        raise ValueError(f"tensors must be on the current device, cuda:{torch.cuda.current_device()}, got {where}")


def check(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    """A tensor (None passes) is contiguous, of this dtype and of this shape.

    Raises:
        ValueError: it is not.
    """
    if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
                         f"{'' if tensor.is_contiguous() else ', not contiguous'}")


def power_of_two(size: int) -> int:
    """The next power of two, or the size itself if it is one."""
    return 1 << (size - 1).bit_length()


def programs(device: torch.device, per_processor: int = 1) -> int:
    """Programs in a persistent grid: so many for every multiprocessor. Two in the interpreter, so that both loop."""
    if INTERPRETED:
        return 2
    return per_processor * torch.cuda.get_device_properties(device).multi_processor_count


FUSED = {"enable_fp_fusion": True}
"""Launch option: products are added in one rounding. It is Triton's default, but will not be from 3.10 on."""


@contextmanager
def compilation_shown() -> Iterator[None]:
    """While kernels compile, count them on standard error, if that is a terminal: a network has dozens."""
    hooks, compiled = triton.knobs.runtime, 0
    before = hooks.jit_post_compile_hook

    def count(**_: Any) -> None:
        nonlocal compiled
        compiled += 1
        if sys.stderr.isatty():
            print(f"\rCompiling Triton kernels: {compiled} done", end="", file=sys.stderr, flush=True)

    hooks.jit_post_compile_hook = count
    try:
        yield
    finally:
        hooks.jit_post_compile_hook = before
        if compiled and sys.stderr.isatty():
            print(file=sys.stderr)
