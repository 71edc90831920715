"""From a file, or from a module of the published code, to a network."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipnet_rt.checkpoint.error import CheckpointError
from skipnet_rt.checkpoint.files import Contents, read_contents
from skipnet_rt.checkpoint.inference import inferred_architecture
from skipnet_rt.checkpoint.metadata import from_metadata
from skipnet_rt.checkpoint.validation import checked_weights, differences, empty_network, own_name
from skipnet_rt.checkpoint.variants import variants_by_weights
from skipnet_rt.model.arch import ArchError, SkipNetArch, arch, published_name
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.network import SkipNet
from skipnet_rt.model.preprocessing import default_preprocessing

LABELS: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "svhn": tuple("0123456789"),
}
"""Class names of the published data sets that have few, in the order of the logits."""


def load(source: str | os.PathLike[str] | nn.Module) -> SkipNet:
    """A trained network from a checkpoint, or from an instance of the published code's own model classes.

    Reads published ``torch.save`` files (zip or older), bare state dictionaries and our safetensors, recognised by
    their content. The architecture is inferred from the weights. Where these can't tell, the file's own word counts
    if it fits them; without one: 32x32 images for the CIFAR stem and 224x224 for ImageNet's, the supervised stage,
    ``cifar10`` rather than ``svhn``. Weights in float16, bfloat16 and float64 become float32;
    ``num_batches_tracked``, unknown to old PyTorch, becomes 0 where missing.

    Nothing in a file is ever executed: ``torch.load`` runs with ``weights_only=True`` and there is no second try.

    Args:
        source: a file, or a module whose state dictionary has the published names (inside ``nn.DataParallel`` or
            not; its weights are copied). A :class:`~skipnet_rt.model.network.SkipNet` is returned as it is.

    Returns:
        The network in evaluation mode on the CPU. ``model.card.training`` keeps a published file's ``iter`` or
        ``epoch``, ``arch`` and ``best_prec1`` under these names; preprocessing, and labels where the file names
        its data set, are those of the published data set unless the file says otherwise.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or hostile; or names, shapes, types or values
            (NaN, infinity) of weights are wrong. Everything found wrong is listed at once.
        TypeError: ``source`` is neither a path nor a module.

    Warns:
        UserWarning: the file's ``arch`` is a published name that contradicts its weights. The weights win.
    """
    if isinstance(source, nn.Module):
        return as_skipnet(source)
    if isinstance(source, (str, os.PathLike)):
        return assembled(read_contents(Path(source)))
    raise TypeError(f"source must be a path or a torch.nn.Module, got {type(source).__name__}")


def as_skipnet(module: nn.Module) -> SkipNet:
    """A :class:`~skipnet_rt.model.network.SkipNet` as it is; an instance of the published code's classes as a copy.

    Raises:
        CheckpointError: its names, shapes or values are not those of a published network.
    """
    module = unwrapped(module)
    return module if isinstance(module, SkipNet) else assembled(_module_contents(module))


def unwrapped(module: nn.Module) -> nn.Module:
    """What a parallel wrapper holds."""
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    return module


def _module_contents(module: nn.Module) -> Contents:
    kind = type(module).__name__
    # The published reinforced networks say RL in their class names and collect their gates' decisions here.
    reinforced = "RL" in kind or hasattr(module, "saved_actions")
    return Contents(kind, module.state_dict(), stage="reinforced" if reinforced else "supervised")


def assembled(contents: Contents) -> SkipNet:
    """The network that weights and metadata make, or all that is wrong with them."""
    state, problems = checked_weights(contents.state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if variants := variants_by_weights(shapes):
        raise CheckpointError(contents.where, [*problems, *variants])
    try:
        inferred = inferred_architecture(shapes)
        if contents.metadata is None:
            architecture, card = _named(inferred, contents), ModelCard(training=contents.training)
        else:
            architecture, card = from_metadata(inferred, contents.metadata)
    except ValueError as error:
        raise CheckpointError(contents.where, [*problems, str(error)]) from None
    network = empty_network(architecture)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(own_name(name), torch.zeros_like(tensor, device="cpu"))
    problems += differences(state, network)
    if problems:
        raise CheckpointError(contents.where, problems)
    network.load_state_dict(state, strict=False, assign=True)  # not strict: projections come under one name only
    network.card = _completed(card, architecture)
    return network


def _named(inferred: SkipNetArch, contents: Contents) -> SkipNetArch:
    """The inferred architecture with what a published file's ``arch`` adds to it, if that fits."""
    declared = _published(contents.training.get("arch"))
    if declared and inferred.replace(stage=declared.stage, image_size=declared.image_size) == declared.replace():
        return declared
    if inferred.gated:
        inferred = inferred.replace(stage=contents.stage)
    inferred = inferred.replace(name=published_name(inferred))
    if declared:
        warnings.warn(f"{contents.where} calls itself {contents.training['arch']}, but its weights are those of "
                      f"{inferred}; the weights win", stacklevel=4)  # 4: who called load()
    return inferred


def _published(name: Any) -> SkipNetArch | None:
    with suppress(ArchError):
        return arch(name) if isinstance(name, str) else None
    return None


def _completed(card: ModelCard, architecture: SkipNetArch) -> ModelCard:
    """The card with the published data set's preprocessing and labels where it has none of its own.

    Labels only if the file itself names the data set: ten classes of 32x32 pixels could be anything.
    """
    labels = None
    if architecture.name and _published(card.training.get("arch")) == architecture:
        labels = LABELS.get(architecture.name.partition("_")[0])
    return replace(card, labels=card.labels or labels,
                   preprocessing=card.preprocessing or default_preprocessing(architecture.name))
