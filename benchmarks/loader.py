"""Images per second of the training's loader alone: what the processor can decode, crop and normalise for a GPU.

    python benchmarks/loader.py                            # JPEGs of ImageNet's usual size, made up
    python benchmarks/loader.py --root DIR --batch-size 256 --workers 0 1 2 4 8

It is the loader of ``skipnet-rt train --data imagenet`` with its augmentation, and nothing takes its images. A
training keeps up if all ranks together take fewer images per second than their workers give; docs/training.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from skipnet_rt.data import Split, load_dataset
from skipnet_rt.training.batches import loader

PICTURES = 256  # made up; they are read again and again
SIZE = (500, 375)  # pixels; the size that most of ImageNet's pictures have
QUALITY = 90  # with that much noise about 110 KB per picture, ImageNet's mean


def make_pictures(root: Path) -> None:
    """An image folder of two classes: smooth colours under noise, as heavy to decode as photographs are."""
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        colours = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(SIZE)
        pixels = np.asarray(colours, dtype=np.float32) + generator.normal(0, 12, (SIZE[1], SIZE[0], 1))
        for split in ("train", "val"):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            if split == "train" or number < 2:
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=QUALITY)


def images_per_second(split: Split, batch_size: int, workers: int, seconds: float) -> float:
    """The loader's rate from the second batch on, when its workers are up, epoch after epoch."""
    images, began = 0, None
    while True:
        for batch, _ in loader(split, batch_size, shuffle=True, workers=workers):
            now = time.perf_counter()
            if began is None:
                began = now
                continue
            images += len(batch)
            if now - began > seconds:
                return images / (now - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="imagenet", help="name of the data set")
    parser.add_argument("--root", type=Path, help="its folder; without it, pictures are made up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as made_up:
        if options.root is None:
            make_pictures(Path(made_up))
            sizes = [path.stat().st_size for path in Path(made_up).rglob("*.jpg")]
            print(f"{PICTURES} pictures of {SIZE[0]}x{SIZE[1]}, {np.mean(sizes) / 1000:.0f} KB on average")
        split = load_dataset(options.data, options.root or made_up).train
        for workers in options.workers:
            rate = images_per_second(split, options.batch_size, workers, options.seconds)
            print(f"{workers} workers: {rate:.0f} images/s")


if __name__ == "__main__":
    main()
