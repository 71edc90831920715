"""The CUDA engine: on which GPUs it runs, and by which strategy.

A strategy is an object that executes one network and knows nothing of the engine that holds it. Its five phases are in
the native source:

- resident (cuda_resident.py, csrc/cuda/resident.cu), for CIFAR-scale networks in 16 bits: one launch;
- compacted (cuda_compacted.py, csrc/cuda/compacted.cu), for all others: block by block on the executing images.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from skipnet_rt import _C
from skipnet_rt.engines.base import Availability, Engine, EnginePass
from skipnet_rt.engines.cuda_compacted import CompactedStrategy
from skipnet_rt.engines.cuda_resident import ResidentStrategy
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.packing import PackedNetwork


class Strategy(Protocol):
    """A way of executing one network on a GPU."""

    @property
    def memory(self) -> int:
        """Bytes of the device's memory that it holds, the packed network apart."""

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        """See :meth:`skipnet_rt.engines.base.Engine.run`."""


class CudaEngine(Engine):
    """A strategy in native code that never waits for the device.

    Args:
        network: any.
        strategy: of this network, instead of the one that it would get. For tests and measurements.
    """

    name = "cuda"
    devices = ("cuda",)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, network: PackedNetwork, strategy: Strategy | None = None) -> None:
        super().__init__(network)
        self.strategy = strategy or _strategy(network)

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

    @property
    def memory(self) -> int:
        return super().memory + self.strategy.memory

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        return self.strategy.run(images, forced, num_gates)


def _strategy(network: PackedNetwork) -> Strategy:
    """What a network runs by, unless told otherwise."""
    unsupported = ResidentStrategy.unsupported_reason(network.arch, network.device, network.dtype)
    return ResidentStrategy(network) if unsupported is None else CompactedStrategy(network)


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
