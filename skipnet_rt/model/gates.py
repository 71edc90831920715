"""The gates: small networks that look at a block's output and decide whether the next block runs.

All of them reduce to one number per image, the *execute logit* ``z``; ``p = sigmoid(z)`` is the probability of
executing. (The feed-forward gates' two-way softmax is the sigmoid of the difference of its two logits.)
Source: SkipNet paper, section 3.1, figure 3. Parameter names are those of the published code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipnet_rt.model.arch import SkipNetArch

GateMode = Literal["hard", "soft", "sample"]
GATE_MODES: tuple[GateMode, ...] = ("hard", "soft", "sample")
LSTMState = tuple[Tensor, Tensor]


class RNNGate(nn.Module):
    """The recurrent gate shared by all blocks: one LSTM cell, then a projection to the execute logit.

    Args:
        embed_dim: size of the embedded feature.
        hidden_dim: size of the LSTM's state.
        convolution: keep the projection as a 1x1 convolution, as the published ImageNet networks do.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, *, convolution: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(embed_dim, hidden_dim)
        self.proj = nn.Conv2d(hidden_dim, 1, kernel_size=1) if convolution else nn.Linear(hidden_dim, 1)

    def initial_state(self, feature: Tensor) -> LSTMState:
        """Zero state ``(h, c)``, each ``[1, N, hidden_dim]``, for features ``[N, embed_dim]``."""
        zeros = feature.new_zeros(1, feature.shape[0], self.rnn.hidden_size)
        return zeros, zeros

    def forward(self, feature: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """Execute logit ``[N]`` and the next state, from embedded features ``[N, embed_dim]``."""
        output, state = self.rnn(feature.unsqueeze(0), state)
        return F.linear(output[0], self.proj.weight.flatten(1), self.proj.bias).squeeze(1), state


class PooledEmbedding(nn.Sequential):
    """RNNGate's own part of every block: global average pool, then a 1x1 convolution with bias."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, embed_dim, kernel_size=1))

    def forward(self, activation: Tensor) -> Tensor:
        """Embedded feature ``[N, embed_dim]`` of an activation ``[N, C, H, W]``."""
        pool, embed = self
        return embed(pool(activation)).flatten(1)


class FeedforwardGate(nn.Module):
    """FFGate-I (``convolutions=2``: 2x2 max pool, 3x3, 3x3 stride 2) or FFGate-II (``1``: 3x3 stride 2).

    Every convolution is followed by batch normalisation and ReLU; then global average pool and a 1x1
    convolution to the logits of (skip, execute).
    """

    def __init__(self, channels: int, convolutions: Literal[1, 2]) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=3 - convolutions, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        if convolutions == 2:
            self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
        self.linear_layer = nn.Conv2d(channels, 2, kernel_size=1)

    def forward(self, activation: Tensor) -> Tensor:
        """Execute logit ``[N]`` of an activation ``[N, C, H, W]``."""
        x = activation
        if self.convolutions == 2:
            x = F.relu(self.bn1(self.conv1(F.max_pool2d(x, 2))))
            x = F.relu(self.bn2(self.conv2(x)))
        else:
            x = F.relu(self.bn1(self.conv1(x)))
        logits = self.linear_layer(F.adaptive_avg_pool2d(x, 1)).flatten(1)
        return logits[:, 1] - logits[:, 0]


def decide(logit: Tensor, mode: GateMode) -> Tensor:
    """Turn execute logits ``[N]`` into the mask ``[N]`` that multiplies the block.

    ``"hard"``: 1 where p > 0.5, else 0 (exactly 0.5 skips), with the gradient of p (straight-through, section 3.2);
    ``"soft"``: p itself (the paper's Table 3); ``"sample"``: 1 with probability p, without gradient (section 3.3).
    """
    probability = torch.sigmoid(logit)
    if mode == "soft":
        return probability
    if mode == "sample":
        return torch.bernoulli(probability.detach())
    hard = (probability > 0.5).to(probability.dtype)
    return hard + (probability - probability.detach())  # the bracket is exactly 0: the mask is exactly 0 or 1


def published_probabilities(architecture: SkipNetArch, logits: Tensor) -> list[Tensor]:
    """Execute logits ``[N, gates]`` in the form in which the published networks return each gate's probabilities.

    RNNGate: CIFAR supervised ``[N, 1]`` (p), CIFAR reinforced ``[N, 2]`` (1 - p, p), ImageNet ``[N]`` (p).
    FFGate: supervised ``[N, 2]`` (log-softmax), reinforced ``[N, 2]`` (softmax).
    """
    z = logits.t().contiguous()  # all gates at once: one after another would take longer than a small network
    if architecture.gate != "rnn" and architecture.stage == "supervised":
        published = torch.stack((F.logsigmoid(-z), F.logsigmoid(z)), dim=2)
    elif architecture.stem == "imagenet" and architecture.gate == "rnn":
        published = torch.sigmoid(z)
    elif architecture.stage == "supervised":
        published = torch.sigmoid(z).unsqueeze(2)
    else:
        p = torch.sigmoid(z)
        published = torch.stack((1 - p, p), dim=2)
    return list(published.unbind(0))
