"""Microbenchmarks of the native CPU code: ``pytest benchmarks/bench_kernels.py --benchmark-enable``.

Convolutions run on one thread; the group's extra columns are GFLOP/s, counted as a direct convolution counts them, and
their share of what this core does in nothing but fused multiply-adds. Winograd can exceed 100 %.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import skipnet_rt as srt
from skipnet_rt import _C
from skipnet_rt.kernels import gate_step_ref
from skipnet_rt.model.packing import PackedEmbedding, PackedNetwork, pack

BATCHES = (1, 8, 64, 512)


@pytest.fixture(scope="module")
def network() -> PackedNetwork:
    """SkipNet-110's weights, fresh: a gate's time does not depend on them."""
    torch.manual_seed(0)
    return pack(srt.build("cifar10_rnn_gate_110"), torch.device("cpu"), torch.float32)


def gate_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pooled feature and LSTM state for the last group: 64 channels, 10 hidden."""
    generator = torch.Generator().manual_seed(batch)
    pooled, hidden, cell = (torch.randn(batch, size, generator=generator) for size in (64, 10, 10))
    return pooled, hidden, cell


@pytest.mark.parametrize("batch", BATCHES)
def test_gate_step(benchmark: BenchmarkFixture, network: PackedNetwork, batch: int) -> None:
    """RNNGate after one block, fused: embed, LSTM step, execute logit."""
    lstm, gate = network.lstm, network.gates[-1]
    assert lstm is not None
    assert isinstance(gate, PackedEmbedding)
    native = _C.RNNGate(gate.weight.numpy(), gate.bias.numpy(), lstm.input_weight.numpy(),
                        lstm.hidden_weight.numpy(), lstm.bias.numpy(), lstm.projection_weight.numpy(),
                        lstm.projection_bias.item(), _C.instruction_sets()[0])
    state = [tensor.numpy() for tensor in gate_inputs(batch)]
    benchmark(native.step, *state, np.empty(batch, np.float32))


@pytest.mark.parametrize("batch", BATCHES)
def test_gate_step_in_pytorch(benchmark: BenchmarkFixture, network: PackedNetwork, batch: int) -> None:
    """The same in plain PyTorch, compaction by ``nonzero``: what the fused step replaces."""
    lstm, gate = network.lstm, network.gates[-1]
    assert lstm is not None
    assert isinstance(gate, PackedEmbedding)
    inputs = gate_inputs(batch)

    def step() -> None:
        logit, _, _ = gate_step_ref(inputs[0], gate, lstm, inputs[1], inputs[2])
        (torch.sigmoid(logit) > 0.5).nonzero()

    benchmark(step)


@pytest.fixture(scope="module")
def peak() -> float:
    """Operations per second of one core in fused multiply-adds alone, with the best instruction set."""
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        best = max(best, _C.multiply_add(2_000_000, _C.instruction_sets()[0]) / (time.perf_counter() - started))
    return best


CIFAR = [(3, 1, 3, 16, 32), (3, 1, 16, 16, 32), (3, 1, 32, 32, 16), (3, 1, 64, 64, 8), (3, 2, 16, 32, 32),
         (3, 2, 32, 64, 16), (1, 2, 16, 32, 32), (1, 2, 32, 64, 16)]
IMAGENET = [(7, 2, 3, 64, 224), (1, 1, 64, 64, 56), (3, 1, 64, 64, 56), (1, 1, 64, 256, 56), (1, 1, 256, 64, 56),
            (1, 1, 256, 128, 56), (3, 2, 128, 128, 56), (1, 2, 256, 512, 56), (1, 1, 512, 128, 28),
            (3, 1, 128, 128, 28), (1, 1, 128, 512, 28), (3, 2, 256, 256, 28), (1, 1, 1024, 256, 14),
            (3, 1, 256, 256, 14), (1, 1, 256, 1024, 14), (3, 2, 512, 512, 14), (1, 1, 2048, 512, 7),
            (3, 1, 512, 512, 7), (1, 1, 512, 2048, 7)]


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("strategy", "kernel", "stride", "channels_in", "channels_out", "size"), [
    *(("resident", *shape) for shape in CIFAR), *(("compacted", *shape) for shape in IMAGENET)])
def test_convolution(benchmark: BenchmarkFixture, peak: float, strategy: str, kernel: int, stride: int,
                     channels_in: int, channels_out: int, size: int, batch: int, bfloat16: bool) -> None:
    """Every convolution shape of the CIFAR networks and of ResNet-50 to 152; the peak is float32's."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels_out, channels_in, kernel, kernel), np.float32)
    layer = (weight, np.zeros(channels_out, np.float32), stride)
    alone = _C.Convolution(strategy, layer, bfloat16, batch, (size, size), _C.instruction_sets()[0])
    alone.load(rng.standard_normal((batch, size, size, channels_in), np.float32))
    benchmark(alone.run)
    if benchmark.stats is not None:
        operations = 2 * weight.size * (size // stride) ** 2 * batch
        rate = operations / benchmark.stats.stats.median
        benchmark.extra_info.update({"GFLOP/s": round(rate / 1e9, 1), "share of peak": round(rate / peak, 2)})
