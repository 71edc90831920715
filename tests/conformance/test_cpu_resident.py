"""What only the CPU's resident strategy is asked: how instruction sets differ, and where they must not."""

import numpy as np
import pytest
import torch
from networks import GoldenCase, small_images, small_model

from skipnet_rt import _C
from skipnet_rt.engines.cpu import CpuEngine
from skipnet_rt.model.packing import pack


def seeded(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def engine_for(model, instruction_set, dtype=torch.float32):
    return CpuEngine(pack(model, torch.device("cpu"), dtype), "resident", instruction_set)


@pytest.mark.skipif("avx512bf16" not in _C.instruction_sets(), reason="needs AVX512-BF16")
def test_bfloat16_products_leave_float32_alone():
    """The same bits as AVX-512 without bfloat16 in a float32 network, others in a bfloat16 one."""
    images = small_images("rnn", 5)
    logits = {(name, dtype): engine_for(small_model("rnn"), name, dtype).run(images.to(dtype), None, 6).logits
              for name in ("avx512", "avx512bf16") for dtype in (torch.float32, torch.bfloat16)}
    assert torch.equal(logits["avx512", torch.float32], logits["avx512bf16", torch.float32])
    assert not torch.equal(logits["avx512", torch.bfloat16], logits["avx512bf16", torch.bfloat16])


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(_C.instruction_sets()), reason="needs AVX2 and AVX-512")
def test_fused_multiply_adds_of_any_width_give_the_same_bits():
    case = GoldenCase("cifar10_rnn_gate_38-s15")
    narrow, wide = (engine_for(case.model, name).run(case.images, None, 17) for name in ("avx2", "avx512"))
    assert torch.equal(narrow.logits, wide.logits)
    assert torch.equal(narrow.decisions.gate_logits, wide.decisions.gate_logits)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_a_convolution_of_one_image_has_the_bits_of_one_among_others(instruction_set, channels, size, bfloat16):
    """Few tiles are multiplied in another way than many, one column of channels in another than several."""
    weight, bias = seeded(1, channels, channels, 3, 3), seeded(2, channels)
    images = seeded(3, 5, size, size, channels)

    def convolved(x):
        layer = _C.Convolution("resident", (weight, bias, 1), bfloat16, len(x), (size, size), instruction_set)
        layer.load(x)
        layer.run()
        return layer.read()

    together = convolved(images)
    for image in range(5):
        assert np.array_equal(convolved(images[image:image + 1])[0], together[image])


def test_portable_code_is_always_there():
    assert _C.instruction_sets()[-1] == "portable"
    with pytest.raises(ValueError, match="instruction_set: 'mmx' is not one"):
        engine_for(small_model("rnn"), "mmx")
