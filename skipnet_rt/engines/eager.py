"""The oracle: plain PyTorch on any device, one image at a time through every layer.

One at a time, because PyTorch chooses its kernels by batch size, and computes the first numbers of a row with vectors
and the rest without, whose ``sigmoid`` differs in the last bit. Each image in memory of its own, because the libraries
underneath look at its alignment. Only so is a result bitwise the same in any company (promise 2) on every processor.
Other engines are tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt.engines.base import BlockwiseEngine, Decisions, EnginePass
from skipnet_rt.model.packing import PackedConvolution, PackedEmbedding, PackedFeedforwardGate, PackedLSTM


def _convolve(x: Tensor, layer: PackedConvolution) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, stride=layer.stride, padding=layer.padding)


def _alone(x: Tensor, row: int) -> Tensor:
    """One image (or its state) as a batch of one, in memory of its own."""
    return x[row:row + 1].clone()


def _one_by_one(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(_alone(x, row)) for row in range(len(x))])


class EagerEngine(BlockwiseEngine[Tensor, Tensor]):
    """Plain PyTorch with real compaction: a block's convolutions run for the executing images only."""

    name = "eager"
    devices = None
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    synchronizes_on = ("cuda", "xpu", "mps")  # the row list's length is needed on the host

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        # On a GPU: the same algorithm every time, and float32 that is float32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return super().run(images, forced, num_gates)

    def all_rows(self, decisions: Decisions) -> Tensor:
        return torch.arange(decisions.executed.shape[1], device=decisions.executed.device)

    def stem(self, images: Tensor) -> Tensor:
        def one(image: Tensor) -> Tensor:
            x = F.relu(_convolve(image, self.network.stem))
            return F.max_pool2d(x, 3, stride=2, padding=1) if self.network.arch.stem_pools else x

        return _one_by_one(one, images)

    def gate_step(self, index: int, x: Tensor, decisions: Decisions) -> None:
        gate, forced = self.network.gates[index], decisions.forced_by(index)
        for row in range(len(x)):
            image = _alone(x, row).to(self.network.gate_dtype)
            if isinstance(gate, PackedEmbedding):
                assert self.network.lstm is not None
                feature = F.linear(image.mean(dim=(2, 3)), gate.weight, gate.bias)
                hidden, cell = _alone(decisions.hidden, row), _alone(decisions.cell, row)
                logit, decisions.hidden[row], decisions.cell[row] = self._lstm_step(self.network.lstm, feature,
                                                                                    hidden, cell)
            else:
                logit = self._feedforward(gate, image)
            decisions.gate_logits[index, row] = logit[0]
            decisions.probabilities[index, row] = torch.sigmoid(logit)[0]
        decisions.executed[index] = decisions.probabilities[index] > 0.5 if forced is None else forced

    @staticmethod
    def _lstm_step(lstm: PackedLSTM, feature: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The execute logit ``[1]`` and the next state ``[hidden_dim]`` twice, from a state ``[1, hidden_dim]``."""
        gates = F.linear(feature, lstm.input_weight, lstm.bias) + F.linear(hidden, lstm.hidden_weight)
        i, f, g, o = gates.chunk(4, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return F.linear(hidden, lstm.projection_weight.unsqueeze(0), lstm.projection_bias)[0], hidden[0], cell[0]

    @staticmethod
    def _feedforward(gate: PackedFeedforwardGate, image: Tensor) -> Tensor:
        """Execute logit ``[1]`` of an activation ``[1, C, H, W]``."""
        x = F.max_pool2d(image, 2) if gate.max_pool else image
        for layer in gate.convolutions:
            x = F.relu(_convolve(x, layer))
        return F.linear(x.mean(dim=(2, 3)), gate.weight.unsqueeze(0), gate.bias)[0]

    def compact(self, index: int, decisions: Decisions) -> Tensor:
        return decisions.executed[index].nonzero().squeeze(1)

    def run_block(self, index: int, x: Tensor, rows: Tensor) -> Tensor:
        block = self.network.blocks[index]
        projection = block.projection
        shortcut = x if projection is None else _one_by_one(lambda image: _convolve(image, projection), x)
        for row in rows.tolist():  # the skip: nothing is computed for any other image
            y = _alone(x, row)
            for layer in block.convolutions[:-1]:
                y = F.relu(_convolve(y, layer))
            y = _convolve(y, block.convolutions[-1])
            shortcut[row:row + 1] = F.relu(y + shortcut[row:row + 1])
        return shortcut

    def head(self, x: Tensor) -> Tensor:
        return _one_by_one(
            lambda image: F.linear(image.mean(dim=(2, 3)), self.network.head_weight, self.network.head_bias), x)
