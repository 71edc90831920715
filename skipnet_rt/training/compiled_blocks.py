"""``torch.compile`` for the residual blocks' convolutions, while a network is trained.

Only they are compiled: the way from block to block, with its gates, is too short to gain and has to sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from skipnet_rt.model.network import SkipNet


@contextmanager
def compiled_blocks(model: SkipNet) -> Iterator[None]:
    """While it lasts, residual blocks of the same shapes run one compiled function; then the model is what it was."""
    blocks = [model.block(plan) for plan in model.arch.blocks]
    # A graph for every kind of block, another when the epoch's last batch turns the batch size into a variable. By
    # default PyTorch gives up at eight of one function.
    with torch._dynamo.config.patch(recompile_limit=2 * len(blocks) + 2):
        for block in blocks:
            vars(block)["residual"] = torch.compile(block.residual)
        try:
            yield
        finally:
            for block in blocks:
                del vars(block)["residual"]
