"""Triton's interpreter as the tests run it: its products have the same bits on every processor, and in any batch.

Its own products are NumPy's, hence a BLAS's, which may sum a row in another order for another shape or at another place
(OpenBLAS's for AVX2 does). On a GPU the instructions fix that order; what the tests look at is what the kernels decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` term by term, in float32: each operation is rounded by itself, so nothing but the terms decides."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        total += a[:, k:k + 1] * b[k]
    return total


@contextmanager
def fixed_products() -> Iterator[None]:
    """Patches the interpreter: :func:`product` for ``tl.dot``, and no search for overflows of integers.

    That takes a third of the time, and drops what it finds unless Triton's debug mode is on.
    """
    from triton.runtime import interpreter

    def create_dot(_: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
        assert a.data.dtype == b.data.dtype == total.data.dtype == np.float32, "the kernels convert the operands"
        return interpreter.TensorHandle(product(a.data, b.data) + total.data, total.dtype.scalar)

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(builder), "create_dot", create_dot)
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield
