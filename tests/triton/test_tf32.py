"""TF32 in the Triton engine: on a GPU, or under the interpreter, which shows who takes it but computes exactly."""

import pytest
import torch
from networks import SMALL, relative_error, small_images, small_model

import skipnet_rt as srt
from skipnet_rt import kernels
from skipnet_rt.kernels.language import INTERPRETED, unavailable_reason

if unavailable_reason() is not None:
    pytest.skip(str(unavailable_reason()), allow_module_level=True)

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def asked():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def compiled(name, dtype=torch.float32):
    return srt.compile(small_model(name), engine="triton", device=DEVICE, dtype=dtype)


def tf32_layers(runtime):
    return [layer for layer in runtime.engine.layers if layer.tf32]


def test_nobody_takes_it_unasked():
    assert tf32_layers(compiled("feedforward1")) == []


def test_a_float32_network_takes_it_when_asked_but_for_gates_and_classifier(asked):
    runtime = compiled("feedforward1")
    architecture = SMALL["feedforward1"]
    own = {layer for layer in runtime.engine.layers if not layer.tf32}
    gates = [layer for gate in runtime.engine._gates for layer in (each.layer for each in gate.chain)]
    assert own == {*gates, runtime.engine._head.layer}
    assert {(layer.height, layer.width) for layer in tf32_layers(runtime)} >= {block.in_size
                                                                               for block in architecture.blocks}
    assert all(str(layer).count("tf32") for layer in tf32_layers(runtime))  # tuned by themselves


def test_no_other_dtype_does(asked):
    assert tf32_layers(compiled("rnn", torch.float16)) == []


def test_it_is_decided_when_the_engine_is_built(asked):
    runtime = compiled("rnn")
    torch.set_float32_matmul_precision("highest")
    assert tf32_layers(runtime)
    assert tf32_layers(compiled("rnn")) == []


@pytest.mark.parametrize("name", ["rnn", pytest.param("bottleneck", marks=pytest.mark.slow)])
def test_logits_are_near_and_do_not_depend_on_the_batch(name, asked):
    images = small_images(name, 5).to(DEVICE)
    routing = torch.ones(SMALL[name].num_gates, dtype=torch.bool)
    exact = srt.compile(small_model(name), engine="eager", device="cpu").infer(images.cpu(), routing=routing).logits
    runtime = compiled(name)
    logits = runtime.infer(images, routing=routing.to(DEVICE)).logits
    assert relative_error(logits.cpu(), exact) < 1e-2
    alone = torch.cat([runtime.infer(image[None], routing=routing.to(DEVICE)).logits for image in images])
    assert torch.equal(alone, logits)


@pytest.mark.parametrize("channels", [16, 512])
def test_products_are_as_exact_as_ten_bits_are(channels):
    """On a GPU they differ from float32: the tensor cores took them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 7, channels, generator=generator).to(DEVICE)
    weight = torch.randn(64, 3, 3, channels, generator=generator).to(DEVICE).permute(1, 2, 3, 0)
    bias = torch.zeros(64, device=DEVICE)
    cut = kernels.gathered_conv2d(x, weight, bias, padding=1, tf32=True)
    error = relative_error(cut, kernels.gathered_conv2d_ref(x, weight, bias, padding=1))
    assert error < 2e-3
    assert INTERPRETED or error > 1e-5
