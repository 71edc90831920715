"""What only the CPU's compacted strategy has: blocks that all threads share, and leave together."""

import numpy as np
import pytest
import torch
from networks import relative_error, small_images, small_model, with_seeded_weights

import skipnet_rt as srt
from skipnet_rt import _C
from skipnet_rt.engines.cpu import CpuEngine
from skipnet_rt.model.packing import pack


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck-feedforward"])
def test_a_batch_that_nobody_executes_and_one_that_all_do(name, torch_threads):
    """Blocks without an image pass at once, on every thread: no thread may wait for one that has nothing to do."""
    torch_threads(3)
    model, images = small_model(name), small_images(name, 3)
    gates = model.arch.num_gates
    engine = CpuEngine(pack(model, torch.device("cpu"), torch.float32), "compacted")
    routes = torch.cat([torch.zeros(2, gates, dtype=torch.bool), torch.ones(1, gates, dtype=torch.bool)])
    together = engine.run(images, routes.t(), gates).logits
    for _ in range(50):
        for row in range(3):
            alone = engine.run(images[row:row + 1].contiguous(), routes[row:row + 1].t(), gates).logits
            assert torch.equal(alone[0], together[row])


def test_large_maps_of_odd_sizes(torch_threads):
    """A stem pooled in bands with an edge on every side, and more images than go through a block together."""
    torch_threads(3)
    arch = srt.SkipNetArch("imagenet", "bottleneck", (2, 1), (160, 16), "rnn", image_size=(93, 110))
    model = with_seeded_weights(srt.build(arch), seed=5, gate_bias=0.0, gate_gain=1.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 93, 110, generator=generator)
    routing = torch.rand(6, arch.num_gates, generator=generator) < 0.8
    together = srt.compile(model, engine="cpu").infer(images, routing=routing).logits
    expected = srt.compile(model, engine="eager").infer(images, routing=routing).logits
    assert relative_error(together, expected) < 1e-5
    torch_threads(1)
    for row in range(6):
        alone = srt.compile(model, engine="cpu").infer(images[row:row + 1], routing=routing[row:row + 1]).logits
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_stem_of_bfloat16_numbers(stride, bfloat16, instruction_set):
    """Seven taps are three pairs and a half: what stands beside the last is not in the sum, at no edge."""
    generator = torch.Generator().manual_seed(stride)
    images, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 3, 15, 18), (20, 3, 7, 7)))
    stem = _C.Convolution("compacted", (weight.float().numpy(), np.zeros(20, np.float32), stride), bfloat16, 2,
                          (15, 18), instruction_set)
    stem.load(images.float().permute(0, 2, 3, 1).contiguous().numpy())
    stem.run()
    expected = torch.nn.functional.conv2d(images.double(), weight.double(), None, stride, 3).relu()
    # Outputs are bfloat16, too, and off by 2^-8 at most.
    torch.testing.assert_close(torch.from_numpy(stem.read()).permute(0, 3, 1, 2).double(), expected,
                               rtol=1.01 * 2 ** -8 if bfloat16 else 1e-5, atol=1e-5)
