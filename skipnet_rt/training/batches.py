"""Batches of a split of a data set, and every rank's share of each.

A rank's share of a batch is every ``count``-th image of it, so that shares differ by one image at most. No rank goes
without: where fewer images than ranks would be left over for the last batch, the one before takes them in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler

from skipnet_rt.data import Split
from skipnet_rt.training.distributed import ALONE, Ranks


def batch_sizes(images: int, batch_size: int, ranks: int = 1) -> list[int]:
    """How many images each batch of an epoch has, all ranks' together."""
    full, rest = divmod(images, batch_size)
    sizes = [batch_size] * full + [rest] * bool(rest)
    if full and 0 < rest < ranks:
        sizes[-2:] = [batch_size + rest]
    return sizes


class _Shares(Sampler[list[int]]):
    """A rank's image numbers of each batch of these sizes, in an order that is the same on all ranks."""

    def __init__(self, order: Sampler[int], sizes: list[int], ranks: Ranks) -> None:
        self.order, self.sizes, self.ranks = order, sizes, ranks

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.order)
        for size in self.sizes:
            if share := list(islice(order, size))[self.ranks.rank::self.ranks.count]:
                yield share


def loader(split: Split, batch_size: int, *, shuffle: bool, ranks: Ranks = ALONE, order: torch.Generator | None = None,
           workers: int = 0) -> DataLoader[Any]:
    """What loads a rank's share of every batch: images ``[N, C, H, W]`` float32 and labels ``[N]`` int64, on the host.

    Args:
        split: sized, of ``(image [C, H, W], label)``.
        batch_size: images per batch, all ranks' together.
        shuffle: whether in random order.
        ranks: who shares the batches.
        order: what draws the order, equal on all ranks; torch's own generator by default, for one rank alone.
        workers: processes that load; 0 loads in this one.
    """
    sized: Any = split
    samples: Sampler[int] = RandomSampler(sized, generator=order) if shuffle else SequentialSampler(sized)
    shares = _Shares(samples, batch_sizes(len(sized), batch_size, ranks.count), ranks)
    return DataLoader(split, batch_sampler=shares, num_workers=workers, pin_memory=ranks.device.type == "cuda")
