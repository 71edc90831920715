"""What a training begins with: fresh weights, a checkpoint, or a dense network that is given gates."""

from __future__ import annotations

import copy

from skipnet_rt import checkpoint
from skipnet_rt.checkpoint.resnets import with_gates
from skipnet_rt.data import Data
from skipnet_rt.model.arch import SkipNetArch, arch
from skipnet_rt.model.gate_init import open_gates
from skipnet_rt.model.network import SkipNet, build
from skipnet_rt.training.config import TrainConfig, TrainError


def starting_network(config: TrainConfig, data: Data) -> tuple[SkipNet, SkipNet | None]:
    """The network to train, and the dense one to learn from if distillation is asked for (evaluation mode, frozen).

    Raises:
        TrainError: network, data and configuration don't fit together.
        skipnet_rt.CheckpointError: ``config.init`` cannot be read, or is no network of ours and no plain ResNet.
    """
    begun = None if config.init is None else checkpoint.load(config.init)
    architecture = _architecture(config, data, begun)
    if begun is None:
        model = build(architecture)
        open_gates(model, config.gate_bias)
    elif architecture.gated and not begun.arch.gated:
        model = with_gates(begun, architecture)
        open_gates(model, config.gate_bias)
    elif begun.arch.replace(stage=architecture.stage, image_size=architecture.image_size) == architecture.replace():
        model = build(architecture)
        model.load_state_dict(begun.state_dict())
    else:
        raise TrainError(f"{config.init} is {begun.arch}, which does not fit {architecture}")
    return model, _teacher(config, begun)


def _architecture(config: TrainConfig, data: Data, begun: SkipNet | None) -> SkipNetArch:
    classes, size = len(data.labels), data.preprocessing.image_size
    if config.arch == "init":
        assert begun is not None  # TrainConfig sees to it
        architecture = begun.arch if begun.arch.gated else begun.arch.replace(gate="rnn")
        architecture = architecture if architecture.image_size == size else architecture.replace(image_size=size)
    elif isinstance(config.arch, str):
        architecture = arch(config.arch)
        if architecture.num_classes != classes:
            architecture = architecture.replace(num_classes=classes)
    else:
        architecture = config.arch
    if (architecture.num_classes, architecture.image_size) != (classes, size):
        raise TrainError(f"{config.data} has {classes} classes and images of {size[0]}x{size[1]}; "
                         f"{architecture} has {architecture.num_classes} and {architecture.image_size}")
    if not architecture.gated and config.stages in ("pure", "gates+hybrid"):
        what = "pure reinforcement learning" if config.stages == "pure" else "the gates' own stage"
        raise TrainError(f"{what} trains gates, and {architecture} has none")
    return architecture


def _teacher(config: TrainConfig, begun: SkipNet | None) -> SkipNet | None:
    if not config.distill_weight:
        return None
    assert begun is not None  # TrainConfig sees to it
    if begun.arch.gated:
        raise TrainError(f"distillation is from a dense network, and {config.init} is {begun.arch}; "
                         "begin with the ResNet, or set distill_weight to 0")
    return copy.deepcopy(begun).eval().requires_grad_(False)
