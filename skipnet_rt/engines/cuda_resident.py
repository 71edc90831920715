"""The GPU's resident strategy: a CIFAR-scale network from images to logits in one launch.

The walk and its rooms are in csrc/cuda/resident.cu; here weights are laid out as it reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt.packing import PackedConvolution, PackedEmbedding, PackedNetwork

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
