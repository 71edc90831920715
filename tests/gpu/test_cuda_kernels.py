"""The CUDA kernels as operations of their own, on a GPU: the simulated tests' cases and what needs a device."""

from dataclasses import fields

import pytest
import torch
from test_simt_gate_step import GateStep, assert_equals_oracle
from test_simt_gathered_conv import ELEMENTS, Case

from skipnet_rt import _C
from skipnet_rt.engines.registry import engines
from skipnet_rt.kernels import compact_ref
from skipnet_rt.kernels import cuda as kernels
from skipnet_rt.model.packing import PackedEmbedding, PackedLSTM

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available() or not hasattr(_C, "cuda_compact"),
                                 reason=f"no GPU that the CUDA sources run on: {engines()['cuda']}")]


@pytest.mark.parametrize("batch", [0, 1, 33, 4096, 4097, 70_001])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_compaction(batch, share):
    executed = torch.rand(batch, device="cuda") < share
    for value, expected in zip(kernels.compact(executed), compact_ref(executed), strict=True):
        assert torch.equal(value, expected)


class GateStepOnGpu(GateStep):
    def run(self, seed, times=1):
        gate, (sums, hidden, cell), forced = self.on_gpu()
        for _ in range(times):
            decided = gate(sums, self.pixels, hidden, cell, forced)
        return [value.cpu().numpy() for value in (*vars(decided).values(), hidden, cell)]

    def on_gpu(self):
        """The gate, its arrays [sums, hidden, cell] and what is forced."""
        weights = [torch.from_numpy(weight).cuda() for weight in self.weights]
        lstm = PackedLSTM(*weights[2:], torch.tensor([self.bias], device="cuda"))
        arrays = [torch.from_numpy(array).cuda() for array in (self.sums, *self.state)]
        forced = None if self.forced is None else torch.from_numpy(self.forced).cuda()
        return kernels.RNNGate(PackedEmbedding(*weights[:2]), lstm), arrays, forced


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(("batch", "channels", "tiles"), [(1, 16, 8), (130, 32, 4), (1, 2048, 1), (3000, 64, 1)])
def test_gate_step(batch, channels, tiles, forced):
    assert_equals_oracle(GateStepOnGpu(1, batch, channels, tiles, forced=forced), seed=0)
    assert_equals_oracle(GateStepOnGpu(2, batch, channels, tiles, forced=forced), seed=0, times=3)


class ConvOnGpu(Case):
    def run(self, seed, multiprocessors=None, calls=1):
        arguments, options = self.on_gpu()
        for _ in range(calls):
            kernels.gathered_conv(*arguments, **options)
        return arguments[-1].cpu(), options["sums"].cpu()

    def on_gpu(self):
        """The operation's arguments; images that are not in the list are NaN."""
        n = len(self.images)
        read = self.images if self.gathers else list(range(n))
        written = self.images if self.scatters else list(range(n))
        x, shortcut = torch.full_like(self.x, torch.nan), torch.full_like(self.shortcut, torch.nan)
        x[read], shortcut[written] = self.x[self.images], self.shortcut[self.images]
        shortcut = shortcut.cuda()
        y = shortcut if self.in_place else torch.full_like(shortcut, torch.nan)
        rows = count = None
        if self.rows is not None:
            rows = torch.full((self.batch,), -1, dtype=torch.int32)
            rows[:n] = torch.tensor(self.rows, dtype=torch.int32)
            rows, count = rows.cuda(), torch.tensor([n], dtype=torch.int32, device="cuda")
        tiles = -(-self.out_size[0] * self.out_size[1] // kernels.POOLED_PIXELS)
        sums = torch.full((self.batch, tiles, self.channels_out), torch.nan, device="cuda")
        options = dict(stride=self.stride, rows=rows, count=count, gathers=self.gathers, scatters=self.scatters,
                       relu=self.relu, residual=shortcut if self.residual else None, sums=sums, tf32=self.tf32)
        return (x.cuda(), self.weight.cuda(), self.bias.cuda(), y), options


@pytest.mark.parametrize(("dtype", "tf32"), ELEMENTS)
@pytest.mark.parametrize("case", [
    dict(channels_in=16, channels_out=16, size=(32, 32), batch=9, rows=(1, 2, 8), residual=True, in_place=True),
    dict(channels_in=64, channels_out=64, size=(56, 56), batch=4, rows=(0, 3), gathers=False),
    dict(channels_in=256, channels_out=128, kernel=1, stride=2, size=(28, 28), batch=5, relu=False),
    dict(channels_in=512, channels_out=512, size=(7, 7), batch=6, rows=(5, 0, 4), scatters=False),
    dict(channels_in=8, channels_out=64, kernel=7, stride=2, size=(224, 224), batch=2),
    dict(channels_in=1024, channels_out=256, kernel=1, size=(14, 14), batch=64, rows=tuple(range(0, 64, 3))),
    dict(channels_in=40, channels_out=136, size=(9, 13), batch=3, rows=()),
], ids=lambda case: "-".join(f"{value}" for value in case.values()))
def test_gathered_conv(case, dtype, tf32):
    ConvOnGpu(**case, dtype=dtype, tf32=tf32).check(seed=0)


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize(("dtype", "tf32"), ELEMENTS)
def test_an_image_does_not_see_its_batch(dtype, tf32, channels):
    """Bitwise the same in a batch of 64, which takes large tiles, and alone, which takes small ones; every time.

    With 256 channels K is split: alone, its slices are computed at the same time.
    """
    whole = ConvOnGpu(channels, 256, size=(14, 14), batch=64, dtype=dtype, tf32=tf32)
    y, sums = whole.run(seed=0)
    for _ in range(20):
        for value, expected in zip(whole.run(seed=0), (y, sums), strict=True):
            assert torch.equal(value, expected)
    alone = ConvOnGpu(**{field.name: getattr(whole, field.name) for field in fields(whole)} | {"batch": 1})
    alone.x, alone.shortcut = whole.x[7:8], whole.shortcut[7:8]
    for value, expected in zip(alone.run(seed=0), (y, sums), strict=True):
        assert torch.equal(value[0], expected[7])


@pytest.mark.parametrize(("dtype", "tf32"), ELEMENTS)
def test_split_k_has_the_same_bits_every_time(dtype, tf32):
    """A race between the thread blocks that leave partial sums and the one that adds them would show."""
    arguments, options = ConvOnGpu(512, 512, size=(7, 7), batch=2, rows=(1,), dtype=dtype, tf32=tf32).on_gpu()
    kernels.gathered_conv(*arguments, **options)
    y, sums = arguments[-1][1].clone(), options["sums"][1].clone()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        arguments[-1].fill_(torch.nan)
        kernels.gathered_conv(*arguments, **options)
        differing += (arguments[-1][1] != y).sum() + (options["sums"][1] != sums).sum()
    assert differing.item() == 0


def test_tf32_is_as_exact_as_pytorch_s():
    case = ConvOnGpu(256, 256, size=(14, 14), batch=4, relu=False, tf32=True)
    x, weight = (value.cuda().permute(0, 3, 1, 2) for value in (case.x, case.weight))
    exact = case.expected()[0]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        plain = torch.nn.functional.conv2d(x, weight, case.bias.cuda(), padding=1).permute(0, 2, 3, 1).cpu()
    ours, _ = case.run(seed=0)
    assert 1e-5 < (ours - exact).norm() / exact.norm() <= 2 * (plain - exact).norm() / exact.norm()


def test_nothing_waits_for_the_device_and_a_graph_replays_it():
    gate, arrays, _ = GateStepOnGpu(3, 50, 32, 2).on_gpu()
    arguments, options = ConvOnGpu(16, 32, batch=50).on_gpu()

    def step():
        decided = gate(arrays[0], 14, arrays[1], arrays[2])
        kernels.gathered_conv(*arguments, **options | {"rows": decided.rows, "count": decided.count})
        return decided

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    state = [array.clone() for array in arrays[1:]]
    with torch.cuda.graph(graph):
        decided = step()
    for array, before in zip(arrays[1:], state, strict=True):
        array.copy_(before)
    graph.replay()
    for value, expected in zip((decided.rows, decided.count), compact_ref(decided.executed), strict=True):
        assert torch.equal(value, expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"executed: expected torch.bool \[3\].*got torch.float32"):
        kernels.compact(torch.ones(3, device="cuda"))
    with pytest.raises(ValueError, match=r"tf32: expected float32 tensors, got torch.float16"):
        kernels.gathered_conv(*(torch.ones(1, 4, 4, 8, device="cuda").half() for _ in range(4)), tf32=True)
    x, weight, bias = torch.ones(1, 4, 4, 8).cuda(), torch.ones(8, 3, 3, 16).cuda(), torch.ones(8).cuda()
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 \[8, 3, 3, 8\]"):
        kernels.gathered_conv(x, weight, bias, torch.empty_like(x))
