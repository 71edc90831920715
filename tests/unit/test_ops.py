"""A runtime inside torch.compile and torch.export: one node, the same bits."""

import copy

import pytest
import torch
from networks import SMALL, small_images, small_model
from torch import nn

import skipnet_rt as srt
from skipnet_rt import ops
from skipnet_rt.engines.registry import REGISTRY

NAMES = ["rnn", "feedforward2", "imagenet-reinforced", "dense"]


def engine_devices():
    """Every registered engine where it runs here."""
    return [(name, kind) for name, engine in REGISTRY.items()
            for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
            if engine.availability() and (engine.devices is None or kind in engine.devices)]


@pytest.fixture(params=engine_devices(), ids="-".join)
def target(request):
    return dict(zip(("engine", "device"), request.param, strict=True))


def compiled(name, target, **options):
    dtype = torch.float16 if target["engine"] == "cuda" else torch.float32
    model = small_model(name)
    if reason := REGISTRY[target["engine"]].unsupported_reason(model.arch, torch.device(target["device"]), dtype):
        pytest.skip(reason)
    return srt.compile(model, dtype=dtype, **target, **options)


class Around(nn.Module):
    """A caller's own network with a runtime in it."""

    def __init__(self, runtime):
        super().__init__()
        self.runtime = runtime

    def forward(self, images):
        result = self.runtime.infer(2 * images)
        return result.logits.softmax(1), result.executed.sum(1)


def operators(graph_module):
    """Ours, in a graph and in those that it wraps to run without gradients."""
    return [node.target for part in graph_module.modules() if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes if node.op == "call_function" and "skipnet_rt" in str(node.target)]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(target, name):
    runtime = compiled(name, target)
    images = small_images(name, 3).to(runtime.device, runtime.dtype)
    gates = SMALL[name].num_gates
    routing = torch.ones(gates, 3, dtype=torch.bool, device=runtime.device)
    for forced, num_gates in ((None, gates), (routing, gates), (None, gates + (gates > 0))):
        torch.library.opcheck(ops.run, (images, forced, runtime._number, num_gates))


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_sees_one_node(target, name):
    runtime = compiled(name, target)
    around = Around(runtime)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(around, backend=backend, fullgraph=True)
    for batch in (3, 5):
        images = small_images(name, batch).to(runtime.device)
        torch.testing.assert_close(fast(images), around(images), rtol=0, atol=0)
    assert all(len(operators(graph)) == 1 for graph in graphs)


def test_torch_compile_of_a_call(target):
    runtime = compiled("rnn", target)
    torch._dynamo.reset()
    images = small_images("rnn", 4).to(runtime.device)
    fast = torch.compile(runtime, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(images), runtime(images), rtol=0, atol=0)
    with pytest.raises(Exception, match="images must have shape"):
        fast(images[:, :2])


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_holds_one_node(target, strict):
    around = Around(compiled("rnn", target)).eval()
    images = small_images("rnn", 4).to(around.runtime.device)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(around, (images,), dynamic_shapes=({0: batch},), strict=strict)
    assert operators(program.graph_module) == [torch.ops.skipnet_rt.run.default]
    more = small_images("rnn", 7).to(around.runtime.device)
    torch.testing.assert_close(program.module()(more), around(more), rtol=0, atol=0)


def test_a_split_batch_inside_torch_compile(target):
    runtime = compiled("rnn", target, max_batch=2)
    torch._dynamo.reset()
    images = small_images("rnn", 5).to(runtime.device)
    fast = torch.compile(runtime.infer, backend="eager", fullgraph=True)
    assert torch.equal(fast(images).logits, runtime.infer(images).logits)


def test_a_runtime_that_is_gone_is_named():
    runtime = srt.compile(small_model("rnn"), engine="eager")
    number = runtime._number
    images = small_images("rnn", 1)
    torch.ops.skipnet_rt.run(images, None, number, 6)
    del runtime
    with pytest.raises(ValueError, match=f"runtime {number} does not exist"):
        torch.ops.skipnet_rt.run(images, None, number, 6)


def test_a_call_that_is_not_traced_does_not_dispatch(monkeypatch):
    runtime = srt.compile(copy.deepcopy(small_model("rnn")), engine="eager")
    monkeypatch.setattr(ops, "run", None)
    assert runtime.infer(small_images("rnn", 1)).logits.shape == (1, 7)
