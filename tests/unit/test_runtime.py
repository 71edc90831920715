"""compile() and its runtime: what goes in and comes out, and what is refused with which words."""

import copy

import pytest
import torch
from networks import small_images, small_model
from torch import nn

import skipnet_rt as srt
from skipnet_rt.engines.registry import REGISTRY


def test_engines_say_whether_and_why():
    status = srt.engines()
    assert set(REGISTRY) <= set(status)
    assert status["eager"]
    assert status["eager"].reason == ""
    for name, availability in status.items():
        assert availability or availability.reason, name


def test_auto_takes_the_first_engine_that_takes_the_network():
    assert srt.compile(small_model("rnn")).engine.name == next(name for name in REGISTRY if srt.engines()[name])
    assert srt.compile(small_model("rnn"), dtype=torch.float64).engine.name == "eager"


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"engine": "warp"}, srt.EngineError, "no engine is called 'warp'; known: auto"),
    ({"engine": "cpu", "dtype": torch.float16}, srt.EngineError, "cpu: it computes in .*not in torch.float16"),
    ({"engine": "cpu", "device": "meta"}, srt.EngineError, "cpu: it runs on cpu, not on meta"),
    ({"device": "quark"}, srt.EngineError, "device 'quark' cannot be used here: Expected one of cpu, cuda"),
    ({"device": "cuda:99"}, srt.EngineError, "device 'cuda:99' cannot be used here"),
    ({"dtype": torch.int8}, srt.EngineError, "eager: it computes in"),
    ({"max_batch": 0}, ValueError, "max_batch must be at least 1, got 0"),
])
def test_compile_refuses_clearly(options, error, message):
    with pytest.raises(error, match=message):
        srt.compile(small_model("rnn"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_with_the_reason():
    reason = "Torch not compiled with CUDA enabled" if torch.version.cuda is None else "Found no NVIDIA driver"
    with pytest.raises(srt.EngineError, match=f"^device 'cuda' cannot be used here: {reason}"):
        srt.compile(small_model("rnn"), device="cuda")


@pytest.mark.parametrize("model", ["checkpoint.pth", nn.ReLU(), nn.Linear(3, 4)])
def test_compile_refuses_what_is_no_skipnet(model):
    with pytest.raises((TypeError, srt.CheckpointError)):
        srt.compile(model)


def test_an_engine_of_the_design_that_is_not_there_yet_is_answered():
    for name in set(srt.engines()) - set(REGISTRY):
        with pytest.raises(srt.EngineError, match="not available"):
            srt.compile(small_model("rnn"), engine=name)


def test_a_runtime_is_a_snapshot():
    model = copy.deepcopy(small_model("rnn"))
    images = small_images("rnn", 2)
    runtime = srt.compile(model)
    before = runtime.infer(images).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(runtime.infer(images).logits, before)


def test_compile_leaves_the_model_as_it_is():
    model = copy.deepcopy(small_model("rnn")).train()
    state = copy.deepcopy(model.state_dict())
    runtime = srt.compile(model)
    runtime(small_images("rnn", 2))
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_runtime_stays_where_it_is():
    runtime = srt.compile(small_model("rnn"))
    assert isinstance(runtime, nn.Module)
    assert runtime.eval() is runtime
    assert not runtime.training
    with pytest.raises(RuntimeError, match="compile the model again"):
        runtime.to(torch.float64)
    with pytest.raises(RuntimeError, match="train the model"):
        runtime.train()
    assert "engine=" in repr(runtime)


def test_a_foreign_class_with_the_published_names_is_recognised():
    class Foreign(nn.Module):
        def __init__(self, model):
            super().__init__()
            for name, child in model.named_children():
                self.add_module(name, child)

    model = small_model("rnn")
    architecture = model.arch.replace(image_size=(32, 32))
    same = srt.build(architecture)
    same.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for wrapped in (Foreign(same), nn.DataParallel(Foreign(same))):
        assert torch.equal(srt.compile(wrapped).infer(images).logits, srt.compile(same).infer(images).logits)


def test_a_double_model_compiles_to_double():
    model = copy.deepcopy(small_model("rnn")).double()
    runtime = srt.compile(model)
    assert runtime.dtype == torch.float64
    logits, masks, probabilities = runtime(small_images("rnn", 2).double())
    assert logits.dtype == masks[0].dtype == probabilities[0].dtype == torch.float64


def test_masks_keep_the_models_dtype_in_a_16_bit_runtime():
    logits, masks, probabilities = srt.compile(small_model("rnn"), engine="eager", dtype=torch.bfloat16)(
        small_images("rnn", 2))
    assert logits.dtype == torch.bfloat16
    assert masks[0].dtype == probabilities[0].dtype == torch.float32


def test_memory_is_stated_in_advance():
    """The weights once at least, and the same after a call as before; half of it in 16 bits, gates aside."""
    model = small_model("feedforward1")
    weights = 4 * sum(value.numel() for name, value in model.named_parameters() if "bn" not in name)
    for name in ("eager", "cpu"):
        runtime = srt.compile(model, engine=name)
        before = runtime.memory
        runtime(small_images("feedforward1", 2))
        assert runtime.memory == before
        assert weights < before < 1.2 * weights
    dense = small_model("dense")
    assert srt.compile(dense, dtype=torch.bfloat16).memory * 2 == srt.compile(dense).memory


def test_a_bfloat16_runtime_rounds_float32_images_as_pytorch_does():
    """Engines that take images as they come round them themselves."""
    model, images = small_model("rnn"), small_images("rnn", 5)
    images[0, 0, 0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1e-40, 3.4e38])  # ties, a subnormal, to infinity
    images[1, 0, 0, 0] = torch.nan
    for engine in ("cpu", "eager"):
        runtime = srt.compile(model, engine=engine, dtype=torch.bfloat16)
        rounded = runtime.infer(images.bfloat16()).logits
        torch.testing.assert_close(runtime.infer(images).logits, rounded, rtol=0, atol=0, equal_nan=True)


def test_a_float32_runtime_takes_bfloat16_images():
    model, images = small_model("rnn"), small_images("rnn", 5).bfloat16()
    runtime = srt.compile(model, engine="cpu")
    assert torch.equal(runtime.infer(images).logits, runtime.infer(images.float()).logits)
