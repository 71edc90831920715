"""The trainable network: one class for every SkipNet and its dense base, with the published state-dict names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipnet_rt.model.arch import BlockPlan, SkipNetArch, arch
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.gates import (
    GATE_MODES,
    FeedforwardGate,
    GateMode,
    LSTMState,
    PooledEmbedding,
    RNNGate,
    decide,
    published_probabilities,
)


def _convolution_bn(in_channels: int, out_channels: int, kernel: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out_channels)


class ResidualBlock(nn.Module):
    """A basic or bottleneck block (He et al., CVPR 2016): ``relu(convolutions(x) + shortcut(x))``."""

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        if plan.kind == "basic":
            self.conv1, self.bn1 = _convolution_bn(plan.in_channels, plan.planes, 3, plan.stride)
            self.conv2, self.bn2 = _convolution_bn(plan.planes, plan.out_channels, 3, 1)
        else:
            self.conv1, self.bn1 = _convolution_bn(plan.in_channels, plan.planes, 1, 1)
            self.conv2, self.bn2 = _convolution_bn(plan.planes, plan.planes, 3, plan.stride)
            self.conv3, self.bn3 = _convolution_bn(plan.planes, plan.out_channels, 1, 1)
        self.downsample = nn.Sequential(
            *_convolution_bn(plan.in_channels, plan.out_channels, 1, plan.stride)) if plan.projects else None

    def shortcut(self, x: Tensor) -> Tensor:
        """The identity, or the projection where the stage changes: what a skipped image becomes."""
        return x if self.downsample is None else self.downsample(x)

    def residual(self, x: Tensor) -> Tensor:
        """The convolutions with their batch normalisations, before the shortcut is added."""
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.bn3(self.conv3(F.relu(x))) if hasattr(self, "conv3") else x


@dataclass(frozen=True)
class Trace:
    """One forward pass, with what training and analysis need.

    Attributes:
        logits: ``[N, num_classes]``.
        masks: ``[N, G]``, 0 or 1 (p with soft gates in training), differentiable in hard and soft mode.
        gate_logits: ``[N, G]``, or ``[N, G + 1]`` where the published forward evaluates the last gate too;
            the execute logits, differentiable.
        hidden: the LSTM's last ``(h, c)``, each ``[1, N, hidden_dim]``; None without RNNGate.
    """

    logits: Tensor
    masks: Tensor
    gate_logits: Tensor
    hidden: LSTMState | None


class SkipNet(nn.Module):
    """A SkipNet, or its dense base network, as its architecture says.

    In evaluation mode every gate decides by p > 0.5 and a skipped image's activation is untouched. In training
    mode all images run all blocks and ``gate_mode`` says how masks come about: ``"hard"`` (straight-through),
    ``"soft"`` or ``"sample"``; see :func:`skipnet_rt.model.gates.decide`.

    Args:
        architecture: what to build.
    """

    def __init__(self, architecture: SkipNetArch) -> None:
        super().__init__()
        self.arch = architecture
        self.card = ModelCard()
        self.gate_mode: GateMode = "sample" if architecture.stage == "reinforced" else "hard"
        kernel, stride = (3, 1) if architecture.stem == "cifar" else (7, 2)
        self.conv1, self.bn1 = _convolution_bn(architecture.in_channels, architecture.widths[0], kernel, stride)
        for plan in architecture.blocks:
            block = ResidualBlock(plan)
            if architecture.gated:
                if block.downsample is not None:
                    self.add_module(plan.shortcut_name, block.downsample)
                self.add_module(plan.layer_name, block)
                self.add_module(plan.gate_name, self._gate(plan))
            else:
                if plan.position == 0:
                    self.add_module(f"layer{plan.group}", nn.Sequential())
                self.get_submodule(f"layer{plan.group}").add_module(str(plan.position), block)
        if architecture.gate == "rnn":
            self.control = RNNGate(architecture.embed_dim, architecture.hidden_dim,
                                   convolution=architecture.stem == "imagenet")
        self.fc = nn.Linear(architecture.features, architecture.num_classes)
        self._initialise()

    def _gate(self, plan: BlockPlan) -> nn.Module:
        if self.arch.gate == "rnn":
            return PooledEmbedding(plan.out_channels, self.arch.embed_dim)
        return FeedforwardGate(plan.out_channels, 2 if self.arch.gate == "feedforward1" else 1)

    def _initialise(self) -> None:
        """He initialisation over the fan-out, and the published code's equivalent for linear layers."""
        if self.fc.weight.is_meta:  # shapes only, about to be filled by a checkpoint
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight.numel()))
                nn.init.zeros_(module.bias)

    def set_gate_mode(self, mode: GateMode) -> SkipNet:
        """How masks come about in training mode: ``"hard"``, ``"soft"`` or ``"sample"``. Returns the model."""
        if mode not in GATE_MODES:
            raise ValueError(f"gate mode must be one of {', '.join(GATE_MODES)}, got {mode!r}")
        self.gate_mode = mode
        return self

    def block(self, plan: BlockPlan) -> ResidualBlock:
        """The module of one residual block."""
        module = self.get_submodule(plan.layer_name if self.arch.gated else plan.dense_name)
        assert isinstance(module, ResidualBlock)
        return module

    def gate(self, plan: BlockPlan) -> nn.Module:
        """The gate module that looks at a block's output (gated networks only)."""
        return self.get_submodule(plan.gate_name)

    def features(self, images: Tensor) -> Tensor:
        """The stem: images ``[N, in_channels, H, W]`` to the first block's input."""
        x = F.relu(self.bn1(self.conv1(images)))
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.arch.stem_pools else x

    def trace(self, images: Tensor) -> Trace:
        """Run the network on images ``[N, in_channels, H, W]`` and keep masks, gate logits and LSTM state."""
        x = self.features(images)
        masks: list[Tensor] = []
        gate_logits: list[Tensor] = []
        state: LSTMState | None = None
        last = self.arch.num_blocks - 1
        for plan in self.arch.blocks:
            block = self.block(plan)
            shortcut = block.shortcut(x)
            executed = F.relu(block.residual(x) + shortcut)
            x = self._blend(masks[-1], executed, shortcut) if masks else executed
            if self.arch.gated and (plan.index < last or self.arch.steps_last_gate):
                logit, state = self.gate_step(plan, x, state)
                gate_logits.append(logit)
                if plan.index < last:
                    masks.append(decide(logit, self.gate_mode if self.training else "hard"))
        logits = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        nothing = logits.new_zeros(logits.shape[0], 0)
        return Trace(logits, torch.stack(masks, dim=1) if masks else nothing,
                     torch.stack(gate_logits, dim=1) if gate_logits else nothing, state)

    def gate_step(self, plan: BlockPlan, x: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState | None]:
        """The gate after a block: execute logit ``[N]`` from its output ``[N, C, H, W]``, and the next LSTM state."""
        seen = self.gate(plan)(x)
        if self.arch.gate != "rnn":
            return seen, None
        return self.control(seen, state or self.control.initial_state(seen))

    def _blend(self, mask: Tensor, executed: Tensor, shortcut: Tensor) -> Tensor:
        mask = mask.view(-1, 1, 1, 1)
        if self.training:
            return mask * executed + (1 - mask) * shortcut
        return torch.where(mask > 0.5, executed, shortcut)

    def forward(self, images: Tensor) -> Tensor | tuple:
        """What the published network of this name returns.

        Args:
            images: ``[N, in_channels, H, W]``.

        Returns:
            Dense base: logits ``[N, num_classes]``. CIFAR: ``(logits, masks, probabilities)``; ImageNet:
            ``(logits, masks, probabilities, hidden)``. ``masks`` is a list of G tensors ``[N]``; ``probabilities``
            a list in the form of :func:`skipnet_rt.model.gates.published_probabilities`; ``hidden`` the LSTM's
            ``(h, c)``. Unlike the published code, a batch of one keeps its batch axis.
        """
        trace = self.trace(images)
        return published_output(self.arch, trace.logits, trace.masks, trace.gate_logits, trace.hidden)


def published_output(architecture: SkipNetArch, logits: Tensor, masks: Tensor, gate_logits: Tensor,
                     hidden: LSTMState | None) -> Tensor | tuple:
    """Arrange a pass as the published network of this architecture returns it; see :meth:`SkipNet.forward`."""
    if not architecture.gated:
        return logits
    returned = architecture.num_gates + architecture.returns_last_gate
    probabilities = published_probabilities(architecture, gate_logits[:, :returned])
    output = (logits, list(masks.unbind(1)), probabilities)
    return (*output, hidden) if architecture.returns_hidden else output


def build(architecture: str | SkipNetArch) -> SkipNet:
    """A trainable network with fresh weights, from a published name or an architecture.

    Raises:
        skipnet_rt.ArchError: no published architecture has this name.
    """
    return SkipNet(arch(architecture) if isinstance(architecture, str) else architecture)
