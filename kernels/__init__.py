"""The kernels as operations of their own, each beside its oracle in plain PyTorch (the name ends in ``_ref``).

They are written in Triton, which need not be installed: without it the oracles work, and the operations say what is
missing.
"""

from skipnet_rt.kernels.compaction import compact, compact_ref, gather, gather_ref, scatter, scatter_ref
from skipnet_rt.kernels.gate_step import GateStep, gate_step, gate_step_ref, pool, pool_ref
from skipnet_rt.kernels.gathered_conv import gathered_conv2d, gathered_conv2d_ref, sum_tiles

__all__ = ["GateStep", "compact", "compact_ref", "gate_step", "gate_step_ref", "gather", "gather_ref",
           "gathered_conv2d", "gathered_conv2d_ref", "pool", "pool_ref", "scatter", "scatter_ref", "sum_tiles"]
