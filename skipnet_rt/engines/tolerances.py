"""How exact an engine is, by dtype: the one table that tests, `doctor` and docs/numerics.md go by."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """What an engine promises in one dtype.

    Attributes:
        logits: norm of the logits' error over their norm, against float64; None where the bound is relative: twice
            the error of plain PyTorch in the same dtype on the same route.
        decision: on the same route so far, a gate decides as float64 does wherever |p - 0.5| exceeds this.
    """

    logits: float | None
    decision: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(logits=1e-9, decision=1e-9),
    torch.float32: Tolerance(logits=1e-4, decision=1e-4),
    torch.float16: Tolerance(logits=None, decision=0.01),
    torch.bfloat16: Tolerance(logits=None, decision=0.03),
}


def tf32_asked() -> bool:
    """Whether a GPU may round the operands of float32 convolutions to TF32 (10 bits of fraction).

    Asked as PyTorch is: ``torch.set_float32_matmul_precision("high")`` before :func:`skipnet_rt.compile`. PyTorch's
    other setting, for its own convolutions, is on by default and therefore asks for nothing. The bounds of float32
    above do not hold then; gates and classifier stay float32.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
