"""The kernels as operations of their own, each beside its oracle in plain PyTorch (the name ends in ``_ref``)."""

from skipnet_rt.kernels.compaction import compact_ref
from skipnet_rt.kernels.gate_step import gate_step_ref

__all__ = ["compact_ref", "gate_step_ref"]
