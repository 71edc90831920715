"""How gates begin and how they are set between epochs: open, standardised over images, sharpened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from skipnet_rt.model.gates import FeedforwardGate, PooledEmbedding, RNNGate
from skipnet_rt.model.network import SkipNet


def _last_layers(model: SkipNet) -> Iterator[nn.Linear | nn.Conv2d]:
    """The layers that give the execute logits: one shared by all gates (RNNGate) or one for each."""
    for module in model.modules():
        if isinstance(module, RNNGate):
            yield module.proj
        elif isinstance(module, FeedforwardGate):
            yield module.linear_layer


def freeze_idle_gates(model: SkipNet) -> None:
    """Take from the optimizer what no decision depends on and no gradient reaches: the gate after the last block."""
    if model.arch.gated:
        idle = [model.gate(model.arch.blocks[-1])]
        if model.arch.gate == "rnn" and not model.arch.num_gates:
            idle.append(model.control)
        for module in idle:
            module.requires_grad_(False)


@torch.no_grad()
def open_gates(model: SkipNet, bias: float) -> None:
    """Add to every gate's execute logit."""
    for layer in _last_layers(model):
        assert layer.bias is not None
        layer.bias[-1] += bias  # of (execute,) or of (skip, execute)


@torch.no_grad()
def sharpen_gates(model: SkipNet, temperature: float) -> None:
    """Divide every gate's execute logit by the temperature; hard decisions stay as they are."""
    for layer in _last_layers(model):
        for parameter in layer.parameters():
            parameter.div_(temperature)


@torch.no_grad()
def standardise_gates(model: SkipNet, images: Tensor) -> None:
    """Let RNNGates see what tells these images ``[N, C, H, W]`` apart, and run half of the blocks on average.

    Data-dependent initialisation (Salimans and Kingma, "Weight normalization", 2016, section 3): every embedded
    feature gets mean 0 and deviation 1, the execute logits get mean 0. What pooled features have in common is far
    larger than their differences: otherwise a gate sees little but the former, and learns to treat all images alike.
    """
    features: dict[PooledEmbedding, Tensor] = {}
    gates = [module for module in model.modules() if isinstance(module, PooledEmbedding)]
    hooks = [gate.register_forward_hook(lambda gate, _, output: features.update({gate: output})) for gate in gates]
    model.eval().trace(images)
    for hook in hooks:
        hook.remove()
    for gate, feature in features.items():
        convolution, deviation = cast(nn.Conv2d, gate[1]), feature.std(0) + 1e-6
        convolution.weight.div_(deviation.view(-1, 1, 1, 1))
        cast(Tensor, convolution.bias).sub_(feature.mean(0)).div_(deviation)
    open_gates(model, -float(model.trace(images).gate_logits[:, :model.arch.num_gates].mean()))
