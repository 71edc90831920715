"""The GPU's resident strategy: a CIFAR-scale network from images to logits in one launch.

Its five phases are in csrc/cuda/resident.cu; here weights are laid out as that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt import _C
from skipnet_rt.engines.base import EnginePass, empty_decisions
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.packing import PackedConvolution, PackedEmbedding, PackedNetwork

WIDTHS = (16, 32, 64)
"""Channels that the groups compute with; fewer are padded with zeros."""


def fragments(layer: PackedConvolution, in_channels: int, out_channels: int) -> Tensor:
    """A convolution's weights as operand B of ``mma.m16n8k16``, in the order in which a warp's lanes hold them.

    Returns:
        ``[out / 16, in / 16, taps, 32 lanes, 2 halves of the output channels, 2 of the input channels, 2]``, flat.
    """
    weight = layer.weight.flatten(2)
    weight = F.pad(weight, (0, 0, 0, in_channels - weight.shape[1], 0, out_channels - weight.shape[0]))
    split = weight.view(out_channels // 16, 2, 8, in_channels // 16, 2, 4, 2, -1)
    return split.permute(0, 3, 7, 2, 5, 1, 4, 6).flatten()


def _padded(bias: Tensor, channels: int) -> Tensor:
    return F.pad(bias.float(), (0, channels - len(bias)))


@dataclass(frozen=True)
class ResidentWeights:
    """A network's weights as csrc/cuda/resident.h describes them.

    Attributes:
        fragments: of all convolutions, in the network's dtype, flat.
        floats: biases, embeddings, LSTM and classifier, float32, flat.
    """

    fragments: Tensor
    floats: Tensor

    @classmethod
    def of(cls, network: PackedNetwork) -> ResidentWeights:
        """The layout of ``lay_out`` in csrc/cuda/resident.cu."""
        convolutions = [fragments(network.stem, 16, 16)]
        floats = [_padded(network.stem.bias, 16)]
        for group, channels in enumerate(WIDTHS[:len(network.arch.depths)]):
            blocks = [block for block in network.blocks if block.plan.group == group + 1]
            inner = [layer for block in blocks for layer in block.convolutions]
            if group > 0:
                entry, projection = inner.pop(0), blocks[0].projection
                assert projection is not None
                for layer in (entry, projection):
                    convolutions.append(fragments(layer, WIDTHS[group - 1], channels))
                    floats.append(_padded(layer.bias, channels))
            for layer in inner:
                convolutions.append(fragments(layer, channels, channels))
                floats.append(_padded(layer.bias, channels))
            for block in blocks if network.lstm is not None else ():
                gate = network.gates[block.plan.index]
                assert isinstance(gate, PackedEmbedding)
                weight = F.pad(gate.weight, (0, channels - gate.weight.shape[1]))
                record = torch.cat((weight.flatten(), gate.bias))
                floats.append(F.pad(record, (0, -len(record) % 4)))
        if lstm := network.lstm:
            rows = torch.cat((lstm.input_weight, lstm.hidden_weight, lstm.bias.unsqueeze(1)), dim=1)
            floats += [rows.view(4, len(lstm.projection_weight), -1).permute(2, 1, 0).flatten(),
                       lstm.projection_weight, lstm.projection_bias]
        head = F.pad(network.head_weight.float(), (0, channels - network.head_weight.shape[1]))
        floats += [head.t().flatten(), network.head_bias.float()]
        return cls(torch.cat(convolutions), torch.cat(floats))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _native(arch: SkipNetArch, dtype: torch.dtype) -> _C.CudaResident:
    embed = arch.embed_dim if arch.state_dim else 0
    return _C.CudaResident(str(dtype).removeprefix("torch."), arch.in_channels, arch.image_size, arch.num_classes,
                           list(arch.depths), embed, arch.state_dim)


class ResidentStrategy:
    """One launch per batch; a call allocates its results and nothing else.

    Args:
        network: one that :meth:`unsupported_reason` has nothing against.
        images: that a thread block takes at a time, where the batch does not decide it.
        cluster: or thread blocks that share an image, 2 or 4; no plan asks for them by itself. Both are for tests and
            measurements: results are the same.
    """

    def __init__(self, network: PackedNetwork, images: int | None = None, cluster: int | None = None) -> None:
        self.network = network
        self._weights = ResidentWeights.of(network)
        self._native = _native(network.arch, network.dtype)
        self._images, self._cluster = images, cluster
        weights = self._weights
        self._native.place(_index(network.device), weights.fragments.data_ptr(), weights.fragments.nbytes,
                           weights.floats.data_ptr(), len(weights.floats))
        torch.cuda.current_stream(network.device).synchronize()  # the weights are there for every stream's calls

    @property
    def memory(self) -> int:
        """Bytes of the device's memory for the weights as its kernel reads them."""
        return self._weights.fragments.nbytes + self._weights.floats.nbytes

    @staticmethod
    def unsupported_reason(arch: SkipNetArch, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why a network is none for the resident strategy on a GPU, or None."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in 16 bits, not in {dtype}"
        if arch.stem != "cifar" or arch.block != "basic" or arch.gate not in ("rnn", "none"):
            return "it takes CIFAR-scale networks of basic blocks without feed-forward gates"
        if len(arch.widths) > len(WIDTHS) or any(own > most for own, most in zip(arch.widths, WIDTHS, strict=False)):
            return f"it computes groups of up to {', '.join(map(str, WIDTHS))} channels, not {arch.widths}"
        if arch.in_channels > 16 or max(arch.embed_dim, arch.hidden_dim) > 32:
            return (f"it takes images of up to 16 channels and gates of up to 32 units, not {arch.in_channels} and "
                    f"{max(arch.embed_dim, arch.hidden_dim)}")
        needed = _native(arch, dtype).shared_memory(1)
        _, there = _C.cuda_limits(_index(device))
        return f"an image needs {needed} bytes of shared memory, {device} has {there}" if needed > there else None

    def fits(self, images: int) -> bool:
        """Whether a thread block can take so many images at a time."""
        return self._native.shared_memory(images) <= _C.cuda_limits(_index(self.network.device))[1]

    def plan(self, batch: int) -> _C.ResidentPlan:
        """How a batch is spread over the device."""
        if self._cluster is not None:
            return _C.ResidentPlan(1, self._cluster * batch, False, self._cluster)
        if self._images is None:
            return self._native.plan(batch)
        blocks = min(_C.cuda_limits(_index(self.network.device))[0], -(-batch // self._images))
        return _C.ResidentPlan(self._images, blocks, blocks * self._images < batch, 1)

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        """See :meth:`skipnet_rt.engines.base.Engine.run`; what is forced is read where it lies, by its strides."""
        batch, device = len(images), self.network.device
        plan = self.plan(batch)
        decisions = empty_decisions(self.network, batch, num_gates, None, zeroed=False)
        logits = torch.empty(batch, self.network.arch.num_classes, dtype=self.network.dtype, device=device)
        work_counter = torch.zeros(1, dtype=torch.int32, device=device) if plan.dynamic else None
        self._native.run(
            plan, batch, num_gates, images.data_ptr(), 0 if forced is None else forced.data_ptr(),
            (0, 0) if forced is None else (forced.stride(1), forced.stride(0)), logits.data_ptr(),
            decisions.gate_logits.data_ptr(), decisions.probabilities.data_ptr(), decisions.executed.data_ptr(),
            decisions.hidden.data_ptr(), decisions.cell.data_ptr(),
            0 if work_counter is None else work_counter.data_ptr(), torch.cuda.current_stream(device).cuda_stream)
        return EnginePass(logits, decisions)
