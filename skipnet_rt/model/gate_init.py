"""What gates are set to: open, standardised over images, sharpened, or one route for all images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from skipnet_rt.model.gates import FeedforwardGate, PooledEmbedding, RNNGate
from skipnet_rt.model.network import SkipNet

_SURE = 100.0  # a logit whose sigmoid is 0 or 1 in float32, with no gradient left


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
def run_everything(model: SkipNet, bias: float) -> None:
    """Let every gate execute for every image, with probability sigmoid(bias); training moves it on from there.

    Raises:
        ValueError: the bias is not above 0: nothing would execute.
    """
    if not bias > 0:
        raise ValueError(f"gate_bias must be above 0, so that everything executes, got {bias!r}")
    for layer in _last_layers(model):
        assert layer.bias is not None
        layer.weight.zero_()
        layer.bias.zero_()
    open_gates(model, bias)


@torch.no_grad()
def open_to(model: SkipNet, images: Tensor, computation: float) -> None:
    """Add to every execute logit as much as lets sampled gates execute so much of these images; their order stays.

    Args:
        model: a network with gates; it is left in evaluation mode.
        images: ``[N, C, H, W]``.
        computation: the expected share of the gated blocks, above 0 and below 1.
    """
    low, high = -30.0, 30.0
    added = 0.0
    model.eval()
    for _ in range(12):  # by halves, to 0.02
        middle = (low + high) / 2
        open_gates(model, middle - added)
        added = middle
        expected = torch.sigmoid(model.trace(images).gate_logits[:, :model.arch.num_gates]).mean()
        low, high = (middle, high) if expected < computation else (low, middle)


@torch.no_grad()
def fix_route(model: SkipNet, executed: Sequence[bool]) -> None:
    """Send every image along one route: block ``k + 1`` runs if ``executed[k]``, whatever the image.

    The network remains a SkipNet, but a static one. Its gates are saturated: training neither moves nor feels them.
    An RNNGate does it by embedding features to a constant, which its LSTM's first unit passes on at once.

    Args:
        model: a network with gates.
        executed: one for each of its G gates.
    """
    if len(executed) != model.arch.num_gates:
        raise ValueError(f"a route of {model.arch} has {model.arch.num_gates} decisions, got {len(executed)}")
    for module in model.modules():
        if isinstance(module, RNNGate):
            for parameter in module.parameters():
                parameter.zero_()
            hidden = module.rnn.hidden_size
            cast(Tensor, module.rnn.bias_ih_l0)[:2 * hidden] = torch.tensor([_SURE, -_SURE]).repeat_interleave(hidden)
            cast(Tensor, module.rnn.bias_ih_l0)[3 * hidden:] = _SURE  # input and output gates open, forget gate shut
            cast(Tensor, module.rnn.weight_ih_l0)[2 * hidden, 0] = _SURE
            module.proj.weight[0, 0] = _SURE
    for plan, runs in zip(model.arch.blocks, executed, strict=False):  # the last block's gate decides nothing
        gate, sign = model.gate(plan), 1.0 if runs else -1.0
        if isinstance(gate, FeedforwardGate):
            gate.linear_layer.weight.zero_()
            cast(Tensor, gate.linear_layer.bias).copy_(torch.tensor([0.0, sign * _SURE]))
        else:
            embed = cast(nn.Conv2d, cast(PooledEmbedding, gate)[1])
            embed.weight.zero_()
            cast(Tensor, embed.bias).fill_(sign)


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
