"""Networks, images and a plain reference that several tests share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from golden.seeded import seeded_images, seeded_state
from torch import Tensor
from torch.nn import functional as F

import skipnet_rt as srt
from skipnet_rt import SkipNet, SkipNetArch

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.npz"))

SMALL = {
    "rnn": SkipNetArch("cifar", "basic", (3, 2, 2), (8, 12, 16), "rnn", num_classes=7, image_size=(16, 16)),
    "rnn-reinforced": SkipNetArch("cifar", "basic", (2, 2), (8, 16), "rnn", "reinforced", image_size=(8, 12)),
    "feedforward1": SkipNetArch("cifar", "basic", (2, 2, 2), (8, 8, 16), "feedforward1", image_size=(16, 16)),
    "feedforward2": SkipNetArch("cifar", "basic", (2, 2, 2), (8, 8, 16), "feedforward2", "reinforced",
                                image_size=(18, 14)),
    "bottleneck": SkipNetArch("imagenet", "bottleneck", (2, 2, 1), (8, 12, 16), "rnn", image_size=(48, 40),
                              embed_dim=6, hidden_dim=9),
    "imagenet-reinforced": SkipNetArch("imagenet", "basic", (2, 2), (8, 16), "rnn", "reinforced",
                                       image_size=(32, 32), in_channels=1),
    "bottleneck-feedforward": SkipNetArch("cifar", "bottleneck", (2, 2), (8, 8), "feedforward1", image_size=(12, 16)),
    "dense": SkipNetArch("cifar", "basic", (2, 2, 2), (8, 12, 16), "none", image_size=(16, 16)),
}

# (seed, gate bias) with which a network takes several routes over small_images, no gate within 0.002 of 0.5.
WEIGHTS = {"rnn": (5, -2.0), "rnn-reinforced": (6, 1.0), "feedforward1": (6, -1.0), "feedforward2": (6, -2.0),
           "bottleneck": (5, -1.0), "imagenet-reinforced": (6, 3.0), "bottleneck-feedforward": (7, 1.0),
           "dense": (5, 0.0)}


@cache
def published_shapes() -> dict[str, dict[str, list[int]]]:
    """State-dict shapes of the published networks, by name."""
    return json.loads((GOLDEN / "state_dict_shapes.json").read_text())


def with_seeded_weights(model: SkipNet, seed: int, gate_bias: float, gate_gain: float) -> SkipNet:
    """Fill a model with the golden cases' seeded weights; evaluation mode."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    state = seeded_state(shapes, seed, gate_bias, gate_gain)
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()})
    return model.eval()


class GoldenCase:
    """One golden case: the model, its images and what the published code computed for them in float64."""

    def __init__(self, name: str) -> None:
        case = np.load(GOLDEN / "cases" / f"{name}.npz")
        self.model = with_seeded_weights(srt.build(str(case["arch"])), int(case["seed"]), float(case["gate_bias"]),
                                         float(case["gate_gain"]))
        self.images = torch.from_numpy(seeded_images(int(case["seed"]), int(case["count"]), int(case["image_size"])))
        self.logits = torch.from_numpy(case["logits"])
        self.executed = torch.from_numpy(case["executed"]).bool()
        self.probabilities = torch.from_numpy(case["probabilities"])


@cache
def small_model(name: str) -> SkipNet:
    """A small network whose gates both execute and skip on :func:`small_images`."""
    seed, gate_bias = WEIGHTS[name]
    return with_seeded_weights(srt.build(SMALL[name]), seed, gate_bias, gate_gain=3.0)


def small_images(name: str, count: int, seed: int = 5) -> Tensor:
    """Images of different contrast for a small network, float32 ``[count, in_channels, H, W]``."""
    architecture = SMALL[name]
    height, width = architecture.image_size
    images = torch.from_numpy(seeded_images(seed, count, 4 * max(height, width)))
    return images[:, :architecture.in_channels, :height, :width].contiguous()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


@torch.no_grad()
def plain_logits(model: SkipNet, images: Tensor, routing: Tensor) -> Tensor:
    """Plain PyTorch with forced routing: every block computed, the result chosen by ``torch.where``."""
    x = model.features(images)
    for plan in model.arch.blocks:
        block = model.block(plan)
        shortcut = block.shortcut(x)
        executed = F.relu(block.residual(x) + shortcut)
        if plan.index > 0 and model.arch.gated:
            executed = torch.where(routing[:, plan.index - 1].view(-1, 1, 1, 1), executed, shortcut)
        x = executed
    return model.fc(x.mean(dim=(2, 3)))
