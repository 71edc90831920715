"""The CPU engine: a network is packed once, and a call goes from images to logits in native code.

It has two strategies, whose five phases are in the native source:

- resident (csrc/cpu/resident/), for CIFAR-scale networks: an image's activation stays in its core's cache. Threads
  take a few images each, or share a convolution of one;
- compacted (csrc/cpu/compacted/), for ImageNet-scale networks and any other: block by block, all threads share
  each convolution over the executing images.

Sums are float32 whatever the network's dtype; products of a bfloat16 network are formed from bfloat16 where the
processor can (AVX512-BF16, AMX), gates and the resident strategy's stem excepted.
"""

from __future__ import annotations

import os
import sys
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from skipnet_rt import _C
from skipnet_rt.engines.base import Decisions, Engine, EnginePass
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.packing import (
    PackedConvolution,
    PackedEmbedding,
    PackedFeedforwardGate,
    PackedLSTM,
    PackedNetwork,
)
from skipnet_rt.util.processors import cpu_quota

SPIN = "SKIPNET_SPIN_MICROSECONDS"
"""The environment variable that says for how long a thread of ours may spin between calls before it sleeps."""

_SPIN = 5000

Strategy = Literal["resident", "compacted"]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy()


def _layer(layer: PackedConvolution) -> _C.Layer:
    return _array(layer.weight), _array(layer.bias), layer.stride


def _lstm(lstm: PackedLSTM) -> _C.LSTM:
    return (_array(lstm.input_weight), _array(lstm.hidden_weight), _array(lstm.bias),
            _array(lstm.projection_weight), lstm.projection_bias.item())


def _strategy(architecture: SkipNetArch) -> Strategy:
    """What a network runs by, unless told otherwise."""
    return "resident" if architecture.stem == "cifar" and architecture.block == "basic" else "compacted"


def _spin_microseconds() -> int:
    """What the environment says, or the default."""
    asked = os.environ.get(SPIN, "")
    if asked and not (asked.isascii() and asked.isdecimal() and int(asked) < 10 ** 9):
        raise ValueError(f"{SPIN}: expected a whole number of microseconds from 0 on, got {asked!r}")
    return int(asked) if asked else _SPIN


class CpuEngine(Engine):
    """One native call on threads of our own: PyTorch's number, or what affinity and cgroups allow if that is less.

    Between calls they spin for a little longer than calls have lately been apart, at most
    ``SKIPNET_SPIN_MICROSECONDS`` (5000 by default; 0 for never), then sleep. The variable is read when an engine is
    made, and holds for all engines of the process.

    Args:
        network: any; the resident strategy takes CIFAR-scale networks of basic blocks only.
        strategy, instruction_set: instead of the network's own strategy and the processor's best instruction set. For
            tests and measurements.
    """

    name = "cpu"
    devices = ("cpu",)
    dtypes = (torch.float32, torch.bfloat16)
    # PyTorch would convert large batches on threads that go on spinning afterwards, in the way of ours.
    image_dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, network: PackedNetwork, strategy: Strategy | None = None,
                 instruction_set: str | None = None) -> None:
        super().__init__(network)
        _C.set_spin_microseconds(_spin_microseconds())
        self._quota = cpu_quota()
        self._native = _C.Network(
            strategy=strategy or _strategy(network.arch),
            image_size=network.arch.image_size,
            stem=_layer(network.stem),
            max_pool=network.arch.stem_pools,
            blocks=[([_layer(layer) for layer in block.convolutions],
                     None if block.projection is None else _layer(block.projection)) for block in network.blocks],
            embeddings=[(_array(gate.weight), _array(gate.bias)) for gate in network.gates
                        if isinstance(gate, PackedEmbedding)],
            lstm=None if network.lstm is None else _lstm(network.lstm),
            gates=[(gate.max_pool, [_layer(layer) for layer in gate.convolutions], _array(gate.weight),
                    gate.bias.item()) for gate in network.gates if isinstance(gate, PackedFeedforwardGate)],
            head_weight=_array(network.head_weight),
            head_bias=_array(network.head_bias),
            bfloat16=network.dtype == torch.bfloat16,
            instruction_set=instruction_set or _C.instruction_sets()[0],
        )

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        batch, architecture = len(images), self.network.arch
        # Made by NumPy, whose arrays the native call takes: as tensors first, each would cost twice as much.
        logits = np.empty((batch, architecture.num_classes), np.float32)
        gate_logits, probabilities = (np.empty((num_gates, batch), np.float32) for _ in range(2))
        executed = np.empty((num_gates, batch), np.bool_)
        hidden, cell = (np.empty((batch, architecture.state_dim), np.float32) for _ in range(2))
        forced = None if forced is None else forced.contiguous()
        pixels = images.view(torch.uint16) if images.dtype == torch.bfloat16 else images
        threads = min(torch.get_num_threads(), _C.allowed_processors(), self._quota or sys.maxsize)
        self._native.run(pixels.numpy(), logits, gate_logits, probabilities, executed,
                         None if forced is None else forced.numpy(), hidden, cell, threads)
        tensor = torch.from_numpy
        return EnginePass(tensor(logits).to(self.network.dtype),
                          Decisions(tensor(gate_logits), tensor(probabilities), tensor(executed), tensor(hidden),
                                    tensor(cell), forced))
