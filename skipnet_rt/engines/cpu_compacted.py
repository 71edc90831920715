"""The CPU's compacted strategy: for ImageNet-scale networks, and any other. Block by block on the executing images."""

from __future__ import annotations

from skipnet_rt.engines.cpu_native import NativeCpuEngine


class CompactedCpuEngine(NativeCpuEngine):
    """All threads share each convolution over the executing images; csrc/cpu/compacted/compacted.cpp."""

    strategy = "compacted"
