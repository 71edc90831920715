"""The CPU engine: which strategy takes which network."""

from __future__ import annotations

import torch

from skipnet_rt.arch import SkipNetArch
from skipnet_rt.engines.engine import Availability, Engine
from skipnet_rt.packing import PackedNetwork


class CpuEngine(Engine):
    """Resident for CIFAR-scale networks, compacted for the others; see the files of these names."""

    name = "cpu"
    devices = ("cpu",)
    dtypes = (torch.float32, torch.bfloat16)

    @classmethod
    def availability(cls) -> Availability:
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return Availability(False, "this PyTorch was built without oneDNN")
        return Availability(True)

    @classmethod
    def objection(cls, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> str | None:
        resident = cls.resident(architecture)
        if dtype == torch.bfloat16 and not resident and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no instructions for bfloat16"
        return super().objection(architecture, device, dtype)

    @staticmethod
    def resident(architecture: SkipNetArch) -> bool:
        """Whether the network is one for the resident strategy."""
        return architecture.stem == "cifar" and architecture.block == "basic"

    @classmethod
    def build(cls, network: PackedNetwork) -> Engine:
        from skipnet_rt.engines.cpu_compacted import CompactedCpuEngine
        from skipnet_rt.engines.cpu_resident import ResidentCpuEngine

        return (ResidentCpuEngine if cls.resident(network.arch) else CompactedCpuEngine)(network)
