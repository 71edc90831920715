"""Every kernel and every configuration compiles for GPUs that are not here, within their limits."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from skipnet_rt.kernels.language import INTERPRETED

if importlib.util.find_spec("triton") is None or INTERPRETED:
    pytest.skip("compiling needs Triton, and not its interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from skipnet_rt.kernels import resources
from skipnet_rt.kernels.gate_step import constants as gate_constants
from skipnet_rt.kernels.gate_step import gate_step_kernel
from skipnet_rt.kernels.gathered_conv import Layer, configurations, constants, gathered_conv_kernel
from skipnet_rt.kernels.resources import REGISTER_LIMIT, SHARED_LIMIT

NVIDIA = ["sm_80", "sm_90", "sm_100"]
PRODUCT = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}

# The heaviest main loop with the heaviest epilogue: a basic block's last convolution, wide enough for every tiling.
HEAVIEST = {dtype: Layer(56, 56, 256, 256, 3, 1, 1, dtype, pooled=True)
            for dtype in (torch.float16, torch.bfloat16, torch.float32)}
TF32 = replace(HEAVIEST[torch.float32], tf32=True)

# Of published networks. The first two hold every part of the kernel between them: sums split and whole, with and
# without tensor cores, pooled sums, rows that are gathered and scattered.
LAYERS = [
    Layer(7, 7, 512, 512, 3, 1, 1, torch.float16, pooled=False),
    Layer(32, 32, 16, 16, 3, 1, 1, torch.float32, pooled=True),
    Layer(224, 224, 3, 64, 7, 2, 3, torch.float16, pooled=False),
    Layer(14, 14, 1024, 256, 1, 1, 0, torch.float16, pooled=False),
    Layer(14, 14, 256, 1024, 1, 1, 0, torch.float16, pooled=True),
    Layer(56, 56, 256, 512, 1, 2, 0, torch.bfloat16, pooled=True),
    Layer(56, 56, 128, 128, 3, 2, 1, torch.float32, pooled=False, tf32=True),
    Layer(224, 224, 3, 64, 7, 2, 3, torch.float32, pooled=False, tf32=True),
]

# (pixels, channels, embed, hidden)
GATES = [(64, 16, 1, 0), (1024, 16, 10, 10), (3136, 256, 10, 10), (49, 2048, 10, 10)]


def slow_after(count, cases):
    """The first cases are quick enough for every run: each is compiled once for each target."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), id=str(case),
                         marks=[pytest.mark.slow] if place >= count else []) for place, case in enumerate(cases)]


def on_a_small_image(layer):
    """The same layer where its sums are split."""
    return replace(layer, height=14, width=14)


def assert_within_limits(used, target):
    assert 0 < used.shared <= SHARED_LIMIT[target]
    if target != "gfx942":
        assert used.registers <= REGISTER_LIMIT


def candidates():
    """Every configuration in float16, float32 and TF32; bfloat16 differs by one word of the instruction."""
    large = [HEAVIEST[torch.float16], HEAVIEST[torch.float32], TF32]
    small = [on_a_small_image(layer) for layer in large]
    plans = [(layer, configuration) for layer in large for configuration in configurations(layer)]
    plans += [(layer, configuration) for layer in small for configuration in configurations(layer)
              if configuration.split_k > 1]
    plans.append((HEAVIEST[torch.bfloat16], configurations(HEAVIEST[torch.bfloat16])[0]))
    for layer, configuration in plans:
        yield pytest.param(layer, configuration, id=f"{layer}-{configuration}")


@pytest.mark.slow
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("layer", "configuration"), list(candidates()))
def test_every_configuration(layer, configuration, target):
    used = resources.convolution(layer, configuration, target)
    assert_within_limits(used, target)
    assert used.stack <= 16, "registers spill"
    if layer.dtype != torch.float32 or layer.tf32:  # float32 has no tensor cores of its own precision
        assert list(used.instructions) == [PRODUCT[target]]


@pytest.mark.slow
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("layer", [on_a_small_image(HEAVIEST[torch.float16]), on_a_small_image(TF32)], ids=str)
def test_one_main_loop_serves_both_ways(layer, target):
    """Whether a program sums one slice or all, the same instructions do it: none more than without split-K."""
    split = next(configuration for configuration in configurations(layer) if configuration.split_k > 1)
    products = [resources.convolution(layer, configuration, target).instructions
                for configuration in (split, replace(split, split_k=1))]
    assert products[0] == products[1] != {}


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
@pytest.mark.parametrize("layer", slow_after(2, LAYERS))
def test_best_guesses_of_published_layers(layer, target):
    """What runs where nothing has been measured, on AMD's smaller shared memory too."""
    used = resources.convolution(layer, configurations(layer)[0], target)
    assert_within_limits(used, target)
    assert (used.stack or 0) <= 16, "registers spill"
    if layer.dtype != torch.float32 or layer.tf32:
        assert all(name.startswith(PRODUCT[target]) for name in used.instructions)
        assert used.instructions


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
@pytest.mark.parametrize(("pixels", "channels", "embed", "hidden"), slow_after(2, GATES))
def test_gate_steps(pixels, channels, embed, hidden, target):
    used = resources.gate(pixels, channels, embed, hidden, target)
    assert_within_limits(used, target)
    assert used.stack in (0, None)


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_compaction(target):
    assert_within_limits(resources.compaction(target), target)


class AbsentGPU:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self):
        return 99  # binaries are kept by device: these must not be found by a real one

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def absent_gpu(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU())


@pytest.mark.parametrize("split_k", [1, 4])
def test_a_convolution_is_one_binary_for_all_batches(split_k, absent_gpu):
    layer = Layer(8, 8, 16, 16, 3, 1, 1, torch.float16, pooled=True)
    configuration = replace(configurations(layer)[0], split_k=split_k)

    def compiled(batch, capacity):
        x = torch.empty(batch, 8, 8, 16, dtype=torch.float16)
        weight, bias, sums = torch.empty(3, 3, 16, 16, dtype=torch.float16), torch.empty(16), torch.empty(batch, 1, 16)
        rows, count = torch.empty(batch, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        partials, arrivals = torch.empty(99 * capacity), torch.empty(capacity, dtype=torch.int32)
        workspace = (None, None) if split_k == 1 else (partials, arrivals)
        return gathered_conv_kernel.warmup(x, weight, bias, x, x, sums, None, rows, count, *workspace, batch, capacity,
                                           grid=(1,), **constants(layer, configuration, x.stride(), (16, 1), True))

    assert compiled(1, 0) is compiled(5, 1) is compiled(16, 16)


def test_a_gate_step_is_one_binary_for_all_batches_and_gates(absent_gpu):
    def compiled(batch, gate):
        sums, (hidden, cell) = torch.empty(batch, 1, 16), torch.empty(2, batch, 16)
        weights = [torch.empty(size) for size in (160, 10, 400, 400, 40, 10, 1)]
        logit, probability = torch.empty(2, 3, batch)[:, gate]
        forced, executed = torch.empty(2, 3, batch, dtype=torch.bool)[:, gate]
        rows, count, present, arrivals = (torch.empty(size, dtype=torch.int32) for size in (batch, 1, 1, 1))
        return gate_step_kernel.warmup(sums, *weights, hidden, cell, forced, logit, probability, executed, rows, count,
                                       present, arrivals, batch, grid=(batch,), **gate_constants(1, 64, 16, 10, 10))

    assert compiled(1, 0) is compiled(1, 2) is compiled(5, 1) is compiled(16, 0)
