"""The weights as engines want them: batch normalisation folded, gates in float32, nothing trainable.

A :class:`PackedNetwork` is a snapshot: training the model further does not change it. Folding is done in float64
and rounded once, so that it costs no accuracy (He et al., CVPR 2016, use the same batch normalisation everywhere).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipnet_rt.model.arch import BlockPlan, SkipNetArch
from skipnet_rt.model.gates import FeedforwardGate, PooledEmbedding, RNNGate
from skipnet_rt.model.network import SkipNet


@dataclass(frozen=True)
class PackedConvolution:
    """A convolution with its batch normalisation folded in.

    Attributes:
        weight: ``[out_channels, in_channels, kernel, kernel]``.
        bias: ``[out_channels]``.
        stride, padding: in pixels, the same in both directions.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int


@dataclass(frozen=True)
class PackedBlock:
    """A residual block: its two or three convolutions, and the projection where the shortcut is not the identity."""

    plan: BlockPlan
    convolutions: tuple[PackedConvolution, ...]
    projection: PackedConvolution | None


@dataclass(frozen=True)
class PackedEmbedding:
    """RNNGate's embedding of one block's pooled output.

    Attributes:
        weight: ``[embed_dim, channels]``.
        bias: ``[embed_dim]``.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PackedFeedforwardGate:
    """One block's feed-forward gate. The two-way softmax is folded into one execute logit.

    Attributes:
        max_pool: a 2x2 max pool comes first (FFGate-I).
        convolutions: one or two, each followed by ReLU.
        weight: ``[channels]``, from the pooled feature to the execute logit.
        bias: ``[1]``.
    """

    max_pool: bool
    convolutions: tuple[PackedConvolution, ...]
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PackedLSTM:
    """RNNGate's shared cell (PyTorch's gate order i, f, g, o) and its projection to the execute logit.

    Attributes:
        input_weight: ``[4 * hidden_dim, embed_dim]``.
        hidden_weight: ``[4 * hidden_dim, hidden_dim]``.
        bias: ``[4 * hidden_dim]``, the sum of PyTorch's two.
        projection_weight: ``[hidden_dim]``.
        projection_bias: ``[1]``.
    """

    input_weight: Tensor
    hidden_weight: Tensor
    bias: Tensor
    projection_weight: Tensor
    projection_bias: Tensor


@dataclass(frozen=True)
class PackedNetwork:
    """A whole network, ready for an engine.

    Attributes:
        arch: what it is.
        dtype: of convolutions, activations and logits. Gates are float32 (float64 in a float64 network).
        stem: the first convolution; ReLU and, for ImageNet, a max pool follow.
        blocks: every residual block in order.
        gates: one per residual block (the last one decides nothing); empty in a dense network.
        lstm: RNNGate's cell, otherwise None.
        head_weight: ``[num_classes, features]``.
        head_bias: ``[num_classes]``.
    """

    arch: SkipNetArch
    dtype: torch.dtype
    stem: PackedConvolution
    blocks: tuple[PackedBlock, ...]
    gates: tuple[PackedEmbedding | PackedFeedforwardGate, ...]
    lstm: PackedLSTM | None
    head_weight: Tensor
    head_bias: Tensor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in _tensors(self))

    @property
    def gate_dtype(self) -> torch.dtype:
        """Of all gate arithmetic."""
        return _gate_dtype(self.dtype)


def _gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of all gate arithmetic in a network of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tensors(part: Any) -> Iterator[Tensor]:
    """Of a packed network or a part of it."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for one in part:
            yield from _tensors(one)
    elif isinstance(part, (PackedConvolution, PackedBlock, PackedEmbedding, PackedFeedforwardGate, PackedLSTM,
                           PackedNetwork)):
        yield from _tensors(tuple(vars(part).values()))


class _Packer:
    """Casts and places tensors; folds batch normalisation in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.gate_dtype = _gate_dtype(dtype)

    def gate_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.gate_dtype, copy=True).contiguous()

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True).contiguous()

    def convolution(self, convolution: nn.Module, norm: nn.Module, *, gate: bool = False) -> PackedConvolution:
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
        mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
        scale = norm.weight.detach().double() / torch.sqrt(variance + norm.eps)
        weight = convolution.weight.detach().double() * scale.view(-1, 1, 1, 1)
        bias = norm.bias.detach().double() - mean * scale
        place = self.gate_tensor if gate else self.tensor
        return PackedConvolution(place(weight), place(bias), convolution.stride[0], int(convolution.padding[0]))

    def gate(self, gate: nn.Module) -> PackedEmbedding | PackedFeedforwardGate:
        if isinstance(gate, PooledEmbedding):
            embedding = cast(nn.Conv2d, gate[1])
            return PackedEmbedding(self.gate_tensor(embedding.weight.flatten(1)),
                                   self.gate_tensor(cast(Tensor, embedding.bias)))
        assert isinstance(gate, FeedforwardGate)
        convolutions = [self.convolution(gate.conv1, gate.bn1, gate=True)]
        if gate.convolutions == 2:
            convolutions.append(self.convolution(gate.conv2, gate.bn2, gate=True))
        weight = gate.linear_layer.weight.detach().double().flatten(1)
        bias = cast(Tensor, gate.linear_layer.bias).detach().double()
        return PackedFeedforwardGate(gate.convolutions == 2, tuple(convolutions),
                                     self.gate_tensor(weight[1] - weight[0]), self.gate_tensor(bias[1:] - bias[:1]))

    def lstm(self, control: RNNGate) -> PackedLSTM:
        weights = dict(control.named_parameters())
        bias = weights["rnn.bias_ih_l0"].detach().double() + weights["rnn.bias_hh_l0"].detach().double()
        return PackedLSTM(self.gate_tensor(weights["rnn.weight_ih_l0"]), self.gate_tensor(weights["rnn.weight_hh_l0"]),
                          self.gate_tensor(bias), self.gate_tensor(weights["proj.weight"].flatten()),
                          self.gate_tensor(weights["proj.bias"]))

    def block(self, model: SkipNet, plan: BlockPlan) -> PackedBlock:
        block = model.block(plan)
        names = ("1", "2") if plan.kind == "basic" else ("1", "2", "3")
        convolutions = [self.convolution(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in names]
        shortcut = block.downsample
        projection = None if shortcut is None else self.convolution(shortcut[0], shortcut[1])
        return PackedBlock(plan, tuple(convolutions), projection)


def pack(model: SkipNet, device: torch.device, dtype: torch.dtype) -> PackedNetwork:
    """A snapshot of a model's weights for an engine, in evaluation-mode meaning whatever mode the model is in.

    Args:
        model: any :class:`SkipNet`; it is left as it is.
        device: where the engine runs.
        dtype: of convolutions and activations: float32, bfloat16, float16 or float64.
    """
    packer = _Packer(device, dtype)
    architecture = model.arch
    return PackedNetwork(
        arch=architecture,
        dtype=dtype,
        stem=packer.convolution(model.conv1, model.bn1),
        blocks=tuple(packer.block(model, plan) for plan in architecture.blocks),
        gates=tuple(packer.gate(model.gate(plan)) for plan in architecture.blocks) if architecture.gated else (),
        lstm=packer.lstm(model.control) if architecture.gate == "rnn" else None,
        head_weight=packer.tensor(model.fc.weight),
        head_bias=packer.tensor(model.fc.bias),
    )
