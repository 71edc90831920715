"""ResNets that compute something else than ours: told from their weights, or from the module that holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from skipnet_rt.checkpoint.validation import empty_network
from skipnet_rt.model.arch import SkipNetArch

_BY_NAME = {
    r"conv1\.\d+\.\w+": "its stem is three 3x3 convolutions (timm's -c, -d, -s and -t), not one",
    r"layer\d+\.\d+\.downsample\.2\.\w+": "its shortcuts average before they convolve (ResNet-D, timm's -d)",
    r"layer\d+\.\d+\.se\..*": "its blocks weigh their channels (squeeze-and-excitation, ECA and alike)",
    r"layer\d+\.\d+\.convs\..*": "its blocks split their 3x3 convolution into a hierarchy (Res2Net)",
    r"layer\d+\.\d+\.conv2\.(conv|fc1)\..*": "its 3x3 convolutions attend to splits (ResNeSt)",
    r"stages\..*": "it is no plain ResNet: its parts have the names of another design (ResNetV2 among them)",
}
"""Designs that show in the names of weights."""

_OF_NO_CONSEQUENCE = (nn.ReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d,
                      nn.Linear)
"""What a plain ResNet consists of, beside convolutions and batch normalisations, which are looked at one by one."""


def variants_by_weights(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why weights of such names and shapes are not a plain ResNet's, as problems of a checkpoint; none if they are."""
    reasons = [reason for pattern, reason in _BY_NAME.items() if any(re.fullmatch(pattern, name) for name in shapes)]
    if "bn1.weight" in shapes and "layer1.0.bn1.weight" in shapes and "layer1.0.bn1.running_mean" not in shapes:
        reasons.append("its normalisation has no running statistics: it is not batch normalisation")
    for name, shape in shapes.items():
        if re.fullmatch(r"layer\d+\.\d+\.conv2\.weight", name) and len(shape) == 4 and shape[0] != shape[1]:
            reasons.append(f"its convolutions are grouped: {name} is {list(shape)} (ResNeXt)")
            break
    for name, shape in shapes.items():
        if re.fullmatch(r"layer\d+\.\d+\.conv3\.weight", name) and len(shape) == 4 and shape[0] != 4 * shape[1]:
            reasons.append(f"its bottlenecks are not a quarter as wide inside: {name} is {list(shape)} "
                           "(Wide ResNet, ResNeXt)")
            break
    return [f"variant: {reason}" for reason in reasons]


def variants_by_module(module: nn.Module, architecture: SkipNetArch) -> list[str]:
    """How a module's layers differ from those of the network that its weights make, in what weights don't show.

    Args:
        module: a ResNet whose weights fit.
        architecture: of its weights, dense.
    """
    ours = dict(empty_network(architecture).named_modules())
    reasons: list[str] = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and isinstance(expected := ours.get(name), nn.Conv2d):
            for attribute in ("stride", "padding", "dilation", "groups", "padding_mode"):
                given, wanted = getattr(layer, attribute), getattr(expected, attribute)
                if given != wanted:
                    first = " (stride in the first 1x1 convolution, as in the first ResNets)"
                    known = first if attribute == "stride" and name.endswith(".0.conv1") else ""
                    reasons.append(f"{attribute}: {name} has {given}, ours has {wanted}{known}")
        elif isinstance(layer, nn.BatchNorm2d) and isinstance(expected := ours.get(name), nn.BatchNorm2d):
            if layer.eps != expected.eps:
                reasons.append(f"eps: {name} has {layer.eps:g}, ours has {expected.eps:g}")
        elif not list(layer.children()) and type(layer) not in _OF_NO_CONSEQUENCE:
            reasons.append(f"layer: {name} is a {type(layer).__name__}; a plain ResNet has ReLU, batch normalisation "
                           "and pooling between its convolutions")
    return [f"variant: {reason}" for reason in reasons]
