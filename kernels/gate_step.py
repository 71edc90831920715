"""RNNGate's step for a batch: embed, LSTM, decide."""

from __future__ import annotations

import torch
from torch import Tensor

from skipnet_rt.packing import PackedEmbedding, PackedLSTM


def gate_step_ref(pooled: Tensor, embedding: PackedEmbedding, lstm: PackedLSTM, hidden: Tensor,
                  cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One RNNGate step (SkipNet paper, section 3.1) with ``torch.lstm_cell``.

    Args:
        pooled: ``[N, channels]``, the global average of a block's output, in the weights' dtype.
        embedding: the block's embedding.
        lstm: the shared cell and its projection.
        hidden, cell: ``[N, hidden_dim]``, the state before the step; left as they are.

    Returns:
        logit: ``[N]``; the image executes where ``sigmoid(logit) > 0.5``.
        hidden, cell: ``[N, hidden_dim]``, the state after it.
    """
    feature = pooled @ embedding.weight.t() + embedding.bias
    zero = torch.zeros_like(lstm.bias)
    hidden, cell = torch.lstm_cell(feature, (hidden, cell), lstm.input_weight, lstm.hidden_weight, lstm.bias, zero)
    return hidden @ lstm.projection_weight + lstm.projection_bias, hidden, cell
