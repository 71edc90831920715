"""The network that ships with the package."""

from __future__ import annotations

from importlib import resources

from skipnet_rt.checkpoint.loading import load
from skipnet_rt.model.network import SkipNet

BUNDLED = "skipnet38-digits.safetensors"
"""SkipNet-38 with RNNGate, trained on the handwritten digits; see the card inside."""


def bundled_model() -> SkipNet:
    """Load it.

    Raises:
        skipnet_rt.CheckpointError: the installation lacks its file, or it is damaged.
    """
    with resources.as_file(resources.files("skipnet_rt.assets") / BUNDLED) as path:
        return load(path)
