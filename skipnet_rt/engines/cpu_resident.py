"""The CPU's resident strategy: for CIFAR-scale networks. An image's activation stays in its core's cache."""

from __future__ import annotations

from skipnet_rt.engines.cpu_native import NativeCpuEngine


class ResidentCpuEngine(NativeCpuEngine):
    """Images over threads, or an image over a team of them; csrc/cpu/resident/resident.cpp."""

    strategy = "resident"
