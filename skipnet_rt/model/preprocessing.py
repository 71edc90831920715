"""From a picture to the network's input, the same way in training, evaluation and prediction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise; stored with a checkpoint so that prediction repeats what training did.

    Attributes:
        image_size: height and width of the network's input in pixels.
        resize_shorter: first resize the shorter side to this many pixels and crop the centre (ImageNet); None
            resizes straight to ``image_size`` (CIFAR-scale).
        mean, std: of each RGB channel, for pixels in [0, 1].
        interpolation: how pictures are resized.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_shorter: int | None = None
    interpolation: Interpolation = "bilinear"

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture of any mode and size to a normalised float32 image ``[3, H, W]``."""
        return self.normalise(self.resized(picture))

    def resized(self, picture: Image.Image) -> Image.Image:
        """The RGB picture of ``image_size`` that the network will see, before normalisation."""
        picture = picture.convert("RGB")
        height, width = self.image_size
        resampling = Image.Resampling[self.interpolation.upper()]
        if self.resize_shorter is None:
            return picture.resize((width, height), resampling)
        scale = self.resize_shorter / min(picture.size)
        picture = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))),
                                 resampling)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    def normalise(self, picture: Image.Image) -> Tensor:
        """An RGB picture to a float32 tensor ``[3, H, W]`` with the channels' mean and deviation taken out."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float()
        return pixels.div_(255).sub_(_by_channel(self.mean)).div_(_by_channel(self.std))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_dict`; lists become tuples."""
        tuples: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                  for key, value in values.items()}
        return cls(**tuples)


@lru_cache
def _by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


# The published code's values: its cifar/data.py and imagenet/train_*.py.
CIFAR = Preprocessing((32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
SVHN = Preprocessing((32, 32), (0.4524, 0.4525, 0.4690), (0.2194, 0.2266, 0.2285))
IMAGENET = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize_shorter=256)


def default_preprocessing(name: str | None) -> Preprocessing | None:
    """The preprocessing that the published networks of this name were trained with; None for other names."""
    datasets = {"cifar10": CIFAR, "cifar100": CIFAR, "svhn": SVHN, "imagenet": IMAGENET}
    return datasets.get((name or "").split("_")[0])
