"""The data sets: pictures with labels, and the preprocessing that turns them into inputs.

Every split is a map-style data set of ``(image, label)`` pairs: a normalised float32 image ``[3, H, W]`` and an int.
Held-out images come out of :class:`skipnet_rt.model.preprocessing.Preprocessing` alone, the way ``skipnet-rt predict``
treats a user's picture. Training images are augmented as pictures before they are normalised; the random numbers
are torch's, so that seeding torch fixes them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from skipnet_rt.model.preprocessing import CIFAR, IMAGENET, SVHN, Preprocessing

Transform = Callable[[Image.Image], Tensor]
Split = Dataset[tuple[Tensor, int]]

DIGITS = Preprocessing((32, 32), (0.3057,) * 3, (0.3235,) * 3)
"""Digits, 8x8 pixels enlarged to 32x32; mean and deviation of the training split's enlarged pictures."""

DIGIT_SHIFT = 3.0  # pixels of 32
DIGIT_ROTATION = 12.0  # degrees
DIGIT_SCALE = 0.12  # of the size, either way


class DataError(RuntimeError):
    """A data set that is unknown, absent from the disk, or needs a package that is not installed."""


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        train, test: sized data sets of ``(image [3, H, W] float32, label int)``; only ``train`` is augmented.
        labels: the classes' names, in the order of their numbers.
        preprocessing: what made the held-out images, and what a user's picture needs.
    """

    train: Split
    test: Split
    labels: tuple[str, ...]
    preprocessing: Preprocessing


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures held in memory, each transformed when it is asked for.

    Args:
        pictures: of any mode and size that the transform takes.
        labels: one class number per picture.
        transform: a picture to an image ``[3, H, W]``.
    """

    def __init__(self, pictures: Sequence[Image.Image], labels: Sequence[int], transform: Transform) -> None:
        self.pictures, self.labels, self.transform = pictures, labels, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def load_dataset(name: str, root: str | Path = "data") -> Data:
    """A data set by name.

    Args:
        name: ``"digits"`` (embedded); ``"cifar10"``, ``"cifar100"``, ``"svhn"`` (torchvision downloads them); or
            ``"imagenet"``, any image folder ``root/train/<class>/*`` and ``root/val/<class>/*``.
        root: where the data set is kept, or is downloaded to; `digits` needs none.

    Raises:
        DataError: no such name, no such folder, or torchvision is needed and missing.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is called {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](Path(root))


def digits_pictures(*, held_out: bool) -> tuple[list[Image.Image], list[int]]:
    """The handwritten digits as a user would have them: 8x8 pictures of mode "L", 0 to 255, and their labels.

    Args:
        held_out: the 360 held-out pictures; otherwise the 1,437 for training.
    """
    with (resources.files("skipnet_rt.assets") / "digits.npz").open("rb") as file, np.load(file) as arrays:
        pixels, labels, chosen = arrays["pixels"], arrays["labels"], np.zeros(len(arrays["labels"]), dtype=bool)
        chosen[arrays["held_out"]] = True
    chosen = chosen if held_out else ~chosen
    grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(picture) for picture in grey], [int(label) for label in labels[chosen]]


def augment_digit(picture: Image.Image) -> Image.Image:
    """A picture moved, turned and scaled a little, at random (torch's generator); black comes in at the edges."""
    shift_x, shift_y, turn, grow = (2 * torch.rand(4) - 1).tolist()
    angle, scale = math.radians(turn * DIGIT_ROTATION), 1 + grow * DIGIT_SCALE
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    middle_x, middle_y = (picture.width - 1) / 2, (picture.height - 1) / 2
    from_x, from_y = middle_x + shift_x * DIGIT_SHIFT, middle_y + shift_y * DIGIT_SHIFT
    # PIL wants the inverse map: where in the old picture each pixel of the new one comes from.
    inverse = (cosine, sine, from_x - cosine * middle_x - sine * middle_y,
               -sine, cosine, from_y + sine * middle_x - cosine * middle_y)
    return picture.transform(picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)


def _augmented_digit(picture: Image.Image) -> Tensor:
    return DIGITS.normalise(augment_digit(picture))


def _digits(root: Path) -> Data:
    train, train_labels = digits_pictures(held_out=False)
    test, test_labels = digits_pictures(held_out=True)
    enlarged = [DIGITS.resized(picture) for picture in train]
    return Data(Pictures(enlarged, train_labels, _augmented_digit),
                Pictures(test, test_labels, DIGITS), tuple("0123456789"), DIGITS)


def _torchvision(module: str) -> Any:
    try:
        return importlib.import_module(f"torchvision.{module}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise DataError(f"this data set needs a torchvision that fits torch {torch.__version__} ({error}); "
                        "install it with: pip install 'skipnet-rt[train]'") from None


def _cifar(kind: str) -> Callable[[Path], Data]:
    def load(root: Path) -> Data:
        """He et al., CVPR 2016, section 4.2: 4 pixels of padding, random crops and flips in training."""
        dataset, transforms = getattr(_torchvision("datasets"), kind), _torchvision("transforms")
        augmented = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), CIFAR])
        train = dataset(str(root), train=True, download=True, transform=augmented)
        test = dataset(str(root), train=False, download=True, transform=CIFAR)
        return Data(train, test, tuple(train.classes), CIFAR)
    return load


def _svhn(root: Path) -> Data:
    """Train and extra pictures, no augmentation (SkipNet paper, section 4). One normalisation for all splits."""
    dataset = _torchvision("datasets").SVHN
    train, extra, test = (dataset(str(root), split=split, download=True, transform=SVHN)
                          for split in ("train", "extra", "test"))
    return Data(cast(Split, ConcatDataset([train, extra])), test, tuple("0123456789"), SVHN)


def read_picture(path: str) -> Image.Image:
    """A picture from a file, in RGB.

    Raises:
        DataError: the file is no picture, or a damaged one.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # all of which PIL raises for damaged files
        raise DataError(f"{path} is no picture that can be read: {error}") from None


def _image_folder(root: Path) -> Data:
    """ImageNet's usual preprocessing: random crops of any scale and flips; centre crops of 224 when held out."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"an image folder holds train/<class>/* and val/<class>/*; {root / split} is missing")
    datasets, transforms = _torchvision("datasets"), _torchvision("transforms")
    augmented = transforms.Compose([transforms.RandomResizedCrop(IMAGENET.image_size),
                                    transforms.RandomHorizontalFlip(), IMAGENET.normalise])
    try:
        train = datasets.ImageFolder(str(root / "train"), augmented, loader=read_picture)
        test = datasets.ImageFolder(str(root / "val"), IMAGENET, loader=read_picture)
    except FileNotFoundError as error:
        raise DataError(str(error)) from None
    if len(train.classes) < 2:
        raise DataError(f"{root / 'train'} holds one class, {train.classes[0]}: there is nothing to tell apart")
    if train.classes != test.classes:
        raise DataError(f"{root / 'train'} and {root / 'val'} hold different classes: "
                        f"{', '.join(sorted(set(train.classes) ^ set(test.classes)))}")
    return Data(train, test, tuple(train.classes), IMAGENET)


DATASETS: dict[str, Callable[[Path], Data]] = {
    "digits": _digits,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "svhn": _svhn,
    "imagenet": _image_folder,
}
"""Every data set's name and how it is loaded from its root."""
