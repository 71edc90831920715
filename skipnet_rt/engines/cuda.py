"""The CUDA engine: which strategy takes which network, and on which GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipnet_rt import _C
from skipnet_rt.engines.base import Availability, Decisions, Engine
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.packing import PackedNetwork


class CudaEngine(Engine):
    """Resident for CIFAR-scale networks in 16 bits, compacted for the others; see the files of these names."""

    name = "cuda"
    devices = ("cuda",)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @classmethod
    def availability(cls) -> Availability:
        if not hasattr(_C, "CudaResident"):
            return Availability(False, f"CUDA sources {_C.cuda_build}")
        if torch.version.cuda is None:
            return Availability(False, "this PyTorch was built without CUDA")
        try:
            capabilities = [capability for _, capability in _C.cuda_devices()]
        except RuntimeError as error:
            return Availability(False, f"no usable GPU ({error})")
        if not capabilities or not torch.cuda.is_available():
            return Availability(False, "there is no GPU")
        if not any(map(built_for, capabilities)):
            return Availability(False, f"CUDA sources {_C.cuda_build}, the GPU has compute capability "
                                       f"{' and '.join(sorted(set(capabilities)))}: install with SKIPNET_CUDA_ARCHS")
        return Availability(True)

    @classmethod
    def unsupported_reason(cls, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := super().unsupported_reason(architecture, device, dtype):
            return reason
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        if not built_for(capability):
            return f"CUDA sources {_C.cuda_build}, {device} has compute capability {capability}"
        return None

    @classmethod
    def build(cls, network: PackedNetwork) -> Engine:
        from skipnet_rt.engines.cuda_compacted import CompactedCudaEngine
        from skipnet_rt.engines.cuda_resident import ResidentCudaEngine

        resident = ResidentCudaEngine.unsupported_reason(network.arch, network.device, network.dtype) is None
        return (ResidentCudaEngine if resident else CompactedCudaEngine)(network)

    def empty_decisions(self, batch: int, num_gates: int, routing: Tensor | None) -> Decisions:
        """Decisions that are not written yet: the kernels fill all of them."""
        arch, device = self.network.arch, self.network.device
        units = arch.hidden_dim if arch.gate == "rnn" else 0
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return Decisions(
            gate_logits=torch.empty(num_gates, batch, **options),
            probabilities=torch.empty(num_gates, batch, **options),
            executed=torch.empty(num_gates, batch, dtype=torch.bool, device=device),
            hidden=torch.empty(batch, units, **options),
            cell=torch.empty(batch, units, **options),
            forced=None if routing is None else routing.t(),
        )


def built_for(capability: str) -> bool:
    """Whether the extension holds a GPU's code: of its generation, or older PTX for the driver to compile."""
    major, minor = map(int, capability.split("."))
    archs = [arch for arch in _C.cuda_archs.split(",") if arch]
    return any(_number(arch) == (major, minor) for arch in archs) or any(
        arch.isdigit() and (major, 0) <= _number(arch) <= (major, minor) for arch in archs) or (
        bool(archs) and _number(archs[-1]) <= (major, minor))  # the last one comes as PTX, too


def _number(arch: str) -> tuple[int, int]:
    """``"90a"`` to (9, 0)."""
    digits = arch.rstrip("af")
    return int(digits[:-1]), int(digits[-1])
