"""The CPU engine: which strategy takes which network."""

from __future__ import annotations

import torch

from skipnet_rt.engines.base import Engine
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.packing import PackedNetwork


class CpuEngine(Engine):
    """Resident for CIFAR-scale networks, compacted for the others; see the files of these names."""

    name = "cpu"
    devices = ("cpu",)
    dtypes = (torch.float32, torch.bfloat16)

    @staticmethod
    def resident(architecture: SkipNetArch) -> bool:
        """Whether the network is one for the resident strategy."""
        return architecture.stem == "cifar" and architecture.block == "basic"

    @classmethod
    def build(cls, network: PackedNetwork) -> Engine:
        from skipnet_rt.engines.cpu_compacted import CompactedCpuEngine
        from skipnet_rt.engines.cpu_resident import ResidentCpuEngine

        return (ResidentCpuEngine if cls.resident(network.arch) else CompactedCpuEngine)(network)
