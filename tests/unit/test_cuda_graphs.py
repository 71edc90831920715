"""The captured graphs' book-keeping, with the device replaced: what is captured, and the order of events."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from networks import small_model

import skipnet_rt as srt
from skipnet_rt.engines import cuda_graphs
from skipnet_rt.engines import triton as triton_engine
from skipnet_rt.engines.base import Decisions, EnginePass
from skipnet_rt.engines.cuda_graphs import LARGE_PIXELS, SMALL_PIXELS, Graphs, activation_bytes
from skipnet_rt.model.packing import pack

IMAGENET = srt.arch("imagenet_rnn_gate_101")
CPU = torch.device("cpu")


class Device:
    """In place of ``torch.cuda``: writes down what is asked of it.

    Attributes:
        done: in order.
        free: bytes of memory.
    """

    def __init__(self, monkeypatch):
        self.done, self.free = [], 1 << 40
        device = self

        class Graph:
            def replay(self):
                device.done.append("replay")

        class Stream:
            def __init__(self, place=None):
                pass

            def wait_event(self, event):
                device.done.append("wait")

            def synchronize(self):
                device.done.append("synchronize")

        class Event:
            def record(self, stream):
                device.done.append("record")

        def captured(graph, **options):
            device.done.append("capture")
            return nullcontext()

        for name, value in {"CUDAGraph": Graph, "Stream": Stream, "Event": Event, "graph": captured,
                            "graph_pool_handle": lambda: None, "current_stream": lambda place=None: Stream(),
                            "device": nullcontext, "set_device": lambda place: None,
                            "is_current_stream_capturing": lambda: False,
                            "mem_get_info": lambda place: (device.free, 1 << 40),
                            "memory_snapshot": lambda pool, include_traces: [{"total_size": 5}]}.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def forward(images, forced, present, num_gates):
    """A result of the right shapes, without much memory."""
    batch = len(images)
    gates, state = torch.zeros(num_gates, 1).expand(-1, batch), torch.zeros(1, 10).expand(batch, -1)
    return EnginePass(state, Decisions(gates, gates, gates > 0, state, state, None))


def batch_of(architecture, count):
    return torch.zeros(1, 3, 1, 1).expand(count, -1, *architecture.image_size)


def graphs(architecture=IMAGENET, **options):
    return Graphs(architecture, CPU, torch.float16, **options)


@pytest.mark.parametrize(("most_pixels", "count", "captured"), [
    (SMALL_PIXELS, 32, True), (SMALL_PIXELS, 33, False), (LARGE_PIXELS, 33, True)])
def test_graphs_from_python_go_further_than_those_from_cpp(device, monkeypatch, most_pixels, count, captured):
    monkeypatch.setattr(Graphs, "_captured", lambda self, forward, size, num_gates, forces:
                        cuda_graphs._Bucket(torch.cuda.CUDAGraph(), batch_of(IMAGENET, size).clone(), None,
                                            torch.zeros(1, dtype=torch.int32), forward(batch_of(IMAGENET, size), None,
                                                                                       None, num_gates)))
    result = graphs(most_pixels=most_pixels).run(forward, batch_of(IMAGENET, count), None, 32)
    assert len(result.logits) == count
    assert ("replay" in device.done) == captured


@pytest.mark.parametrize(("size", "fits"), [(256, True), (512, False)])
def test_a_large_bucket_has_a_bound(device, size, fits):
    assert graphs(most_pixels=LARGE_PIXELS)._fits(size) == fits


def test_a_large_bucket_leaves_most_of_the_memory_and_a_small_one_is_captured_anyway(device):
    """The most is where SkipNet-101's second stage begins: 256 and 128 channels of 56x56, 128 and 512 of 28x28."""
    needed = activation_bytes(IMAGENET, 256, torch.float16)
    assert needed == 256 * ((256 + 128) * 56 * 56 + (128 + 512) * 28 * 28) * 2
    own = graphs(most_pixels=LARGE_PIXELS)
    device.free = 4 * needed
    assert own._affordable(256)
    device.free -= 1
    assert not own._affordable(256)
    assert own._affordable(128)
    device.free = 0
    assert own._affordable(32)


def test_what_the_memory_does_not_reach_for_is_launched_directly_for_good(device):
    own = graphs(most_pixels=LARGE_PIXELS)
    device.free = 0
    own.run(forward, batch_of(IMAGENET, 64), None, 32)
    device.free = 1 << 40
    own.run(forward, batch_of(IMAGENET, 64), None, 32)
    assert device.done == []
    assert own.memory == 0


def test_a_stem_without_pool_counts_once():
    cifar = srt.arch("cifar10_rnn_gate_110")
    assert activation_bytes(cifar, 1, torch.float32) == 2 * 16 * 32 * 32 * 4
    imagenet = srt.arch("imagenet_rnn_gate_18")
    assert activation_bytes(imagenet, 1, torch.float32) == 6 * 64 * 56 * 56 * 4


def test_a_bucket_is_captured_once_and_replays_are_in_order(device):
    architecture = srt.arch("cifar10_rnn_gate_38")
    own, images = graphs(architecture), batch_of(architecture, 3)
    for _ in range(2):
        own.run(forward, images, None, 17)
    assert device.done == ["capture", *2 * ["wait", "replay", "record"]]
    assert own.memory == 5 + 4 * 3 * 32 * 32 * 2 + 4


@pytest.mark.parametrize("where", ["_copied", "replay"])
def test_the_event_is_recorded_though_a_call_fails(device, monkeypatch, where):
    """No memory for the results, say: the replay is under way, and the next one on another stream must wait for it."""
    architecture = srt.arch("cifar10_rnn_gate_38")
    own, images = graphs(architecture), batch_of(architecture, 3)

    def fail(*_):
        device.done.append("failed")
        raise torch.OutOfMemoryError

    monkeypatch.setattr(*(cuda_graphs, where) if where == "_copied" else (torch.cuda.CUDAGraph, where), fail)
    with pytest.raises(torch.OutOfMemoryError):
        own.run(forward, images, None, 17)
    assert device.done[-2:] == ["failed", "record"]
    assert not own._lock.locked()


def test_triton_waits_for_its_weights(device, monkeypatch):
    """Laid out on the stream that is current while the engine is built, they are read on any other."""
    monkeypatch.setattr(triton_engine, "INTERPRETED", False)
    monkeypatch.setattr(triton_engine.tuning, "results", lambda place: {})
    laid_out = triton_engine._Convolution.__init__

    def noted(self, *arguments, **options):
        laid_out(self, *arguments, **options)
        device.done.append("layer")

    monkeypatch.setattr(triton_engine._Convolution, "__init__", noted)
    engine = triton_engine.TritonEngine(pack(small_model("rnn"), CPU, torch.float32))
    assert device.done[-2:] == ["layer", "synchronize"]
    assert engine._graphs._most_pixels == LARGE_PIXELS
