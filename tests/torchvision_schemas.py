"""torchvision and timm beside a PyTorch that torchvision's C++ operators were not built for.

Their import fails then (``operator torchvision::nms does not exist``): torchvision describes two operators which its
library has not registered. Models and transforms never call them, so that their schemas are enough.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: Any = None  # as long as it lives, so do its operators


def _import(name: str) -> Any:
    global _library
    if importlib.util.find_spec("torchvision") is not None and _library is None:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            _library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _library.define(operator + _NMS)
    return pytest.importorskip(name, reason=f"{name} is not installed, or not for this PyTorch",
                               exc_type=(ImportError, RuntimeError))


def torchvision() -> Any:
    """The package; the test is skipped without it."""
    return _import("torchvision")


def timm() -> Any:
    """The package, which needs torchvision; the test is skipped without it."""
    return _import("timm")
