"""From a ResNet to a SkipNet: gates are added, every weight is kept.

torchvision's and timm's plain ResNets bear the names of our dense base networks, ``layer{g}.{i}.X``, which become
``group{g}_layer{i}.X``. What remains is to make sure that such a network computes what ours does (there are many
ResNets that don't), to add gates that are open, and to fill in the model card.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipnet_rt.checkpoint.error import CheckpointError
from skipnet_rt.checkpoint.files import Contents, read_contents
from skipnet_rt.checkpoint.loading import assembled, unwrapped
from skipnet_rt.checkpoint.variants import variants_by_module
from skipnet_rt.model.arch import ArchError, GateKind, SkipNetArch, published_name
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.gate_init import run_everything, standardise_gates
from skipnet_rt.model.network import SkipNet, build
from skipnet_rt.model.preprocessing import Preprocessing

CHOICES = ("image_size", "stage", "embed_dim", "hidden_dim")
"""Of a SkipNet's architecture, what the weights of a dense network leave open."""

_TOLERANCE = 1e-4  # of the logits, relative norm, as between engines in float32


def from_resnet(source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module, gate: GateKind = "rnn", *,
                gate_bias: float = 2.0, images: Tensor | None = None, weights: Any = None, **arch: Any) -> SkipNet:
    """A SkipNet with the weights of a ResNet and new gates, ready for ``skipnet-rt train --recipe finetune``.

    The ResNet may be torchvision's or timm's 18, 34, 50, 101 or 152, one of our dense base networks or a published
    one; of the ImageNet kind or the CIFAR kind, of any depth and width. Variants that compute something else are
    refused with the reason: other stems and shortcuts (timm's -c, -d, -s, -t), squeeze-and-excitation, ResNeXt, Wide
    ResNet; and, where a module is given, stride in the first 1x1 convolution, dilation, other activations. A module
    also proves itself: with all gates open the logits must be its own, to 1e-4. Weights alone cannot show strides
    or activations; they are taken for a plain ResNet's, with the stride in the bottleneck's 3x3 convolution.

    Args:
        source: a module (it stays as it is), its state dict, or a file of either format (:func:`load`).
        gate: ``"rnn"``, ``"feedforward1"`` or ``"feedforward2"``.
        gate_bias: the new gates' execute logit, the same for every image and above 0: everything executes, and the
            network computes what the ResNet did.
        images: ``[N, C, H, W]``, preprocessed: standardise new RNNGates over them instead, so that they tell these
            images apart and run half of the blocks, see :func:`~skipnet_rt.model.gate_init.standardise_gates`.
        weights: the torchvision weights that the source holds, e.g. ``ResNet50_Weights.IMAGENET1K_V2``: their
            transforms and class names go into the card. A timm module brings its own ``pretrained_cfg``.
        **arch: ``image_size``, ``stage``, ``embed_dim``, ``hidden_dim``, see :class:`SkipNetArch`; without an
            ``image_size`` it is that of the preprocessing, where that is known, or else 224x224 (ImageNet's stem) or
            32x32 (CIFAR's).

    Returns:
        The network in evaluation mode on the CPU. Its card has the source's preprocessing and labels, where known.

    Raises:
        CheckpointError: the source is no ResNet, another variant, or doesn't compute what it should.
        ArchError: ``arch`` names something that follows from the weights, or a value is impossible.
        TypeError: ``source`` is of another type.
        ValueError: ``gate_bias`` is not above 0; ``images`` have another shape, or are given for another gate.
    """
    if gate == "none":
        raise ArchError("gate must be rnn, feedforward1 or feedforward2: a SkipNet has gates, got 'none'")
    if settled := sorted(set(arch) - set(CHOICES)):
        raise ArchError(f"{', '.join(settled)}: not to be chosen, the ResNet's weights settle it; "
                        f"open are {', '.join(CHOICES)}")
    if images is not None and gate != "rnn":
        raise ValueError(f"images standardise RNNGates, not {gate}")
    if images is not None and (images.ndim != 4 or len(images) < 2):
        raise ValueError(f"images must be [N, C, H, W], at least two, got {list(images.shape)}")
    module = unwrapped(source) if isinstance(source, nn.Module) else None
    dense = _dense(source if module is None else module)
    if module is not None and (problems := variants_by_module(module, dense.arch)):
        raise CheckpointError(type(module).__name__, problems)
    card = _card(dense, module, weights)
    if "image_size" not in arch and card.preprocessing:
        arch["image_size"] = card.preprocessing.image_size
    model = with_gates(dense, dense.arch.replace(gate=gate, **arch))
    model.card = replace(card, preprocessing=_resized(card.preprocessing, model.arch.image_size))
    if images is None:
        run_everything(model, gate_bias)
    if module is not None:
        _prove(module, model)
    if images is not None:
        standardise_gates(model, images.to("cpu", torch.float32))
    return model.eval()


def with_gates(dense: SkipNet, architecture: SkipNetArch) -> SkipNet:
    """A network of an architecture with gates, around a dense one's weights; the gates are fresh.

    Raises:
        CheckpointError: the dense network is not the architecture's base.
    """
    base = architecture.replace(gate="none", **{name: getattr(dense.arch, name) for name in CHOICES})
    if base != dense.arch.replace():
        raise CheckpointError(str(dense.arch), [f"not the dense base of {architecture}"])
    model = build(architecture if architecture.name else architecture.replace(name=published_name(architecture)))
    model.load_state_dict(dense.state_dict(), strict=False)  # all that is in no block has the same name in both
    for plan in dense.arch.blocks:
        model.block(plan).load_state_dict(dense.block(plan).state_dict())
    return model


def _dense(source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module) -> SkipNet:
    """The dense network in a source."""
    if isinstance(source, SkipNet):
        dense = source
    elif isinstance(source, nn.Module):
        dense = assembled(Contents(type(source).__name__, source.state_dict()))
    elif isinstance(source, Mapping):
        dense = assembled(Contents("state dict", source))
    elif isinstance(source, (str, os.PathLike)):
        dense = assembled(read_contents(Path(source)))
    else:
        raise TypeError(f"source must be a path, a state dict or a torch.nn.Module, got {type(source).__name__}")
    if dense.arch.gated:
        raise CheckpointError(str(dense.arch), ["is no ResNet: it has gates already"])
    return dense


def _card(dense: SkipNet, module: nn.Module | None, weights: Any) -> ModelCard:
    """What is known of the source beside its weights."""
    card, training = dense.card, dict(dense.card.training)
    labels, preprocessing = card.labels, card.preprocessing
    if timm := getattr(module, "pretrained_cfg", None):
        preprocessing = _of_timm(timm)
        training["source"] = f"timm {timm['architecture']}" + (f".{timm['tag']}" if timm.get("tag") else "")
    elif module is not None and type(module).__module__.startswith("torchvision."):
        training["source"] = "torchvision ResNet"
    if weights is not None:
        preprocessing, training["source"] = _of_torchvision(weights.transforms()), f"torchvision {weights}"
        if len(categories := weights.meta.get("categories", ())) == dense.arch.num_classes:
            labels = tuple(categories)
    return ModelCard(labels, preprocessing, training)


def _of_timm(values: Mapping[str, Any]) -> Preprocessing:
    """timm's evaluation transform: resize the shorter side by the crop's share, crop the centre."""
    _, height, width = values["input_size"]
    return Preprocessing((height, width), tuple(values["mean"]), tuple(values["std"]),
                         int(min(height, width) / values["crop_pct"]), values["interpolation"])


def _of_torchvision(transform: Any) -> Preprocessing:
    """torchvision's ``ImageClassification`` transform."""
    size = tuple(transform.crop_size)
    return Preprocessing((size[0], size[-1]), tuple(transform.mean), tuple(transform.std),
                         transform.resize_size[0], transform.interpolation.value)


def _resized(preprocessing: Preprocessing | None, size: tuple[int, int]) -> Preprocessing | None:
    """The same preprocessing for inputs of another size, with the same share cropped."""
    if preprocessing is None or preprocessing.image_size == size:
        return preprocessing
    shorter = preprocessing.resize_shorter
    return replace(preprocessing, image_size=size, resize_shorter=shorter and round(
        shorter * min(size) / min(preprocessing.image_size)))


@torch.no_grad()
def _prove(module: nn.Module, model: SkipNet) -> None:
    """Compare a module's logits with those of its weights in our dense network, all gates being open."""
    height, width = model.arch.image_size
    images = torch.randn(2, model.arch.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    where = type(module).__name__
    expected = copy.deepcopy(module).to("cpu", torch.float32).eval()(images)
    if not isinstance(expected, Tensor):
        raise CheckpointError(where, [f"returns a {type(expected).__name__}, not logits"])
    opened = copy.deepcopy(model).eval()
    run_everything(opened, 1.0)
    got = opened.trace(images).logits
    if expected.shape != got.shape:
        raise CheckpointError(where, [f"returns {list(expected.shape)} for {list(images.shape)}, "
                                      f"expected {list(got.shape)}"])
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise CheckpointError(where, [f"computes something else than a plain ResNet of its weights: with all gates "
                                      f"open the logits differ by {error:.1e} (relative norm; {_TOLERANCE:g} allowed)"])
