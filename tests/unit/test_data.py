"""The data sets: the embedded digits, their augmentation, and what torchvision's sets need."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torchvision_schemas
from PIL import Image

from skipnet_rt.data import DIGIT_SHIFT, DIGITS, DataError, augment_digit, digits_pictures, load_dataset
from skipnet_rt.model.preprocessing import IMAGENET


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    ours = {}
    for held_out in (False, True):
        pictures, labels = digits_pictures(held_out=held_out)
        for picture, label in zip(pictures, labels, strict=True):
            ours.setdefault((np.asarray(picture).tobytes(), label), []).append(held_out)
    expected = [(np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
                for image, label in zip(theirs.images, theirs.target, strict=True)]
    assert sum(map(len, ours.values())) == len(expected) == 1797
    assert set(ours) == set(expected)


def test_the_split_is_1437_and_360_pictures_with_every_class_in_proportion():
    train, held_out = (np.bincount(digits_pictures(held_out=held_out)[1]) for held_out in (False, True))
    assert (train.sum(), held_out.sum()) == (1437, 360)
    assert np.abs(held_out - (train + held_out) * 360 / 1797).max() < 1


def test_no_held_out_picture_is_trained_on():
    train, held_out = ({np.asarray(picture).tobytes() for picture in digits_pictures(held_out=held_out)[0]}
                       for held_out in (False, True))
    assert not train & held_out


def test_digits_normalisation_is_that_of_the_training_split():
    pixels = np.stack([np.asarray(DIGITS.resized(picture)) for picture in digits_pictures(held_out=False)[0]]) / 255
    np.testing.assert_allclose(DIGITS.mean, pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(DIGITS.std, pixels.std((0, 1, 2)), atol=1e-4)


def test_a_users_png_becomes_the_held_out_image(tmp_path):
    data = load_dataset("digits")
    picture = digits_pictures(held_out=True)[0][7]
    picture.save(tmp_path / "digit.png")
    image, label = data.test[7]
    assert (picture.mode, picture.size) == ("L", (8, 8))
    assert torch.equal(data.preprocessing(Image.open(tmp_path / "digit.png")), image)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert data.labels[label] == str(digits_pictures(held_out=True)[1][7])


def test_only_training_images_are_augmented_and_the_seed_fixes_them():
    data = load_dataset("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert torch.equal(data.test[0][0], data.test[0][0])
    torch.manual_seed(3)
    first, second = data.train[0][0], data.train[0][0]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(data.train[0][0], first)


def test_augmentation_moves_the_picture_both_ways_and_not_too_far():
    spot = Image.new("RGB", (32, 32))
    spot.paste((255, 255, 255), (13, 13, 19, 19))  # its middle is the picture's, which turning and scaling keep
    torch.manual_seed(0)
    moved = np.stack([np.asarray(augment_digit(spot), dtype=float)[..., 0] for _ in range(300)])
    grid = np.arange(32) - 15.5
    total = moved.sum((1, 2))
    for shifts in ((moved.sum(1) @ grid) / total, (moved.sum(2) @ grid) / total):
        assert np.abs(shifts).max() < DIGIT_SHIFT * 1.15 + 0.1  # divided by a scale of at least 0.88
        assert shifts.min() < -0.8 * DIGIT_SHIFT
        assert shifts.max() > 0.8 * DIGIT_SHIFT
        assert abs(shifts.mean()) < 0.35
    assert total.std() > 0.05 * total.mean()  # scaled


def test_unknown_data_set_is_named_beside_the_known():
    with pytest.raises(DataError, match=r"'mnist'.*digits, cifar10"):
        load_dataset("mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_without_torchvision_the_extra_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"torchvision.*skipnet-rt\[train\]"):
        load_dataset(name, tmp_path)


def test_an_image_folder_says_which_part_is_missing(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="val is missing"):
        load_dataset("imagenet", tmp_path)


def test_an_image_folder_is_cropped_and_labelled(tmp_path):
    torchvision_schemas.torchvision()
    picture = Image.effect_noise((300, 260), 60)  # grey: becomes RGB
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            picture.save(tmp_path / split / label / "1.png")
    data = load_dataset("imagenet", tmp_path)
    assert data.labels == ("cat", "dog")
    image, label = data.test[1]
    assert label == 1
    assert torch.equal(image, IMAGENET(picture))
    augmented = data.train[0][0]
    assert augmented.shape == (3, 224, 224)
    assert not torch.equal(augmented, data.train[0][0])
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cow")
    with pytest.raises(DataError, match="different classes: cow, dog"):
        load_dataset("imagenet", tmp_path)


def test_an_image_folder_that_cannot_be_trained_on_is_refused(tmp_path):
    torchvision_schemas.torchvision()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="class folder"):
        load_dataset("imagenet", tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir()
    with pytest.raises(DataError, match="cat"):  # no pictures
        load_dataset("imagenet", tmp_path)
    for split in ("train", "val"):
        Image.effect_noise((30, 20), 60).save(tmp_path / split / "cat" / "1.png")
    with pytest.raises(DataError, match=r"train holds one class, cat: there is nothing to tell apart"):
        load_dataset("imagenet", tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "dog").mkdir()
        (tmp_path / split / "dog" / "2.png").write_bytes((tmp_path / split / "cat" / "1.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"2\.png is no picture that can be read"):
        load_dataset("imagenet", tmp_path).test[1]


def test_normalising_is_plain_float32_arithmetic_for_every_level():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    mean, deviation = (np.array(values, dtype=np.float32) for values in (IMAGENET.mean, IMAGENET.std))
    expected = ((levels.astype(np.float32) / 255 - mean) / deviation).transpose(2, 0, 1)
    got = IMAGENET.normalise(Image.fromarray(levels))
    assert torch.equal(got, torch.from_numpy(expected))
    assert got.is_contiguous()
