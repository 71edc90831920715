"""Order-preserving compaction: which images of a batch execute."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_ref(executed: Tensor) -> tuple[Tensor, Tensor]:
    """The executing images in order, with a count that can stay on the device.

    Equals ``executed.nonzero()`` padded to the batch, by a prefix sum as a kernel does it.

    Args:
        executed: bool ``[N]``.

    Returns:
        rows: int32 ``[N]``, the executing images in ascending order; the tail is -1.
        count: int32 ``[1]``.
    """
    if executed.dim() != 1 or executed.dtype != torch.bool:
        raise ValueError(f"executed must be bool [N], got {executed.dtype} {list(executed.shape)}")
    batch = executed.shape[0]
    place = executed.cumsum(0) - 1
    rows = torch.full((batch + 1,), -1, dtype=torch.int32, device=executed.device)
    images = torch.arange(batch, dtype=torch.int32, device=executed.device)
    rows.scatter_(0, torch.where(executed, place, batch), torch.where(executed, images, -1))
    return rows[:batch], executed.sum(dtype=torch.int32).view(1)
