"""Microbenchmarks of the Triton kernels on a GPU: ``pytest benchmarks/bench_triton.py --benchmark-enable``.

Every row is :data:`REPEATS` launches in a CUDA graph, replayed and waited for: no time of the host's is in it but the
one replay's. The extra columns are microseconds per launch and, for convolutions, TFLOP/s. Convolutions take the
configurations that ``skipnet-rt doctor --warm`` has measured on this machine, else the best guesses.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional as F

import skipnet_rt as srt
from skipnet_rt import kernels
from skipnet_rt.kernels import tuning
from skipnet_rt.kernels.gathered_conv import Layer, Workspace, configurations
from skipnet_rt.kernels.language import INTERPRETED, unavailable_reason
from skipnet_rt.model.packing import PackedEmbedding, pack

REASON = "times in the interpreter say nothing" if INTERPRETED else unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BATCHES = (1, 8, 64, 256)
REPEATS = 20

# SkipNet-101's convolutions in float16, and SkipNet-110's: (size, channels, out_channels, kernel, stride).
SHAPES = [(56, 64, 64, 1, 1), (56, 64, 64, 3, 1), (56, 64, 256, 1, 1), (28, 128, 128, 3, 1), (28, 512, 128, 1, 1),
          (28, 128, 512, 1, 1), (14, 256, 256, 3, 1), (14, 1024, 256, 1, 1), (14, 256, 1024, 1, 1), (7, 512, 512, 3, 1),
          (7, 2048, 512, 1, 1), (7, 512, 2048, 1, 1), (56, 128, 128, 3, 2), (224, 3, 64, 7, 2), (32, 16, 16, 3, 1),
          (16, 32, 32, 3, 1), (8, 64, 64, 3, 1)]


def timed(benchmark: BenchmarkFixture, call: Callable[[], object], operations: float = 0.0) -> None:
    """Benchmark a call that only launches kernels."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark(replay)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / REPEATS
        benchmark.extra_info.update({"device": torch.cuda.get_device_name(), "us a launch": round(1e6 * seconds, 2),
                                     "TFLOP/s": round(operations / seconds / 1e12, 1)})


@pytest.mark.parametrize("who", ["gathered", "gathered half", "cudnn"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_convolution(benchmark: BenchmarkFixture, who: str, batch: int, shape: tuple[int, int, int, int, int]) -> None:
    """Bias and ReLU included; ``half`` lists every other image, in as large a batch."""
    size, channels, out_channels, kernel, stride = shape
    layer = Layer(size, size, channels, out_channels, kernel, stride, kernel // 2, torch.float16, pooled=False)
    x = torch.randn(batch, size, size, channels, device="cuda").half()
    weight = torch.randn(kernel, kernel, channels, out_channels, device="cuda").half()
    bias = torch.randn(out_channels, device="cuda")
    listed = torch.ones(batch, dtype=torch.bool, device="cuda")
    if who == "gathered half":
        listed[1::2] = False
    rows, count = kernels.compact(listed)
    images = int(count)
    height, width = layer.out_size
    operations = 2.0 * images * height * width * weight.numel()
    if who == "cudnn":
        planar, packed, half = x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), bias.half()
        packed = packed.contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            timed(benchmark, lambda: F.relu_(F.conv2d(planar, packed, half, stride, kernel // 2)), operations)
    else:
        configuration = tuning.results(x.device).get(str(layer), configurations(layer)[0])
        out = torch.empty(batch, height, width, out_channels, dtype=x.dtype, device="cuda")
        workspace = Workspace.empty([(layer, configuration)], batch, x.device)
        timed(benchmark, lambda: kernels.gathered_conv2d(
            x, weight, bias, count, gather=rows, stride=stride, padding=kernel // 2, relu=True, out=out,
            configuration=configuration, workspace=workspace), operations)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "index"), [("cifar10_rnn_gate_110", -1), ("imagenet_rnn_gate_101", 0),
                                             ("imagenet_rnn_gate_101", -1)])
def test_gate_step(benchmark: BenchmarkFixture, name: str, index: int, batch: int) -> None:
    """RNNGate after one block, from partial sums to the row list."""
    network = pack(srt.build(name), torch.device("cuda"), torch.float16)
    gate, plan = network.gates[index], network.arch.blocks[index]
    assert isinstance(gate, PackedEmbedding)
    sums = torch.randn(batch, kernels.sum_tiles(plan.out_size), plan.out_channels, device="cuda")
    hidden, cell = torch.zeros(2, batch, network.arch.hidden_dim, device="cuda")
    out = kernels.GateStep.empty(batch, sums.device)
    arrivals = torch.zeros(1, dtype=torch.int32, device="cuda")
    pixels = plan.out_size[0] * plan.out_size[1]
    timed(benchmark, lambda: kernels.gate_step(sums, pixels, gate, network.lstm, hidden, cell, out=out,
                                               arrivals=arrivals))


@pytest.mark.parametrize("batch", BATCHES)
def test_compaction(benchmark: BenchmarkFixture, batch: int) -> None:
    """Compaction alone."""
    executed = torch.rand(batch, device="cuda") < 0.5
    timed(benchmark, lambda: kernels.compact(executed))
