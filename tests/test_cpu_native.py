"""What both of the CPU's native strategies keep: callers of many threads, forks, workspaces that are reused."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import small_images, small_model

from skipnet_rt.engines.cpu_compacted import CompactedCpuEngine
from skipnet_rt.engines.cpu_resident import ResidentCpuEngine
from skipnet_rt.packing import pack

STRATEGIES = {"resident": (ResidentCpuEngine, ("rnn", "feedforward1")),
              "compacted": (CompactedCpuEngine, ("bottleneck", "imagenet-reinforced"))}


@pytest.fixture(params=STRATEGIES)
def engines(request):
    """(engine, images) of two networks that the strategy takes."""
    engine, names = STRATEGIES[request.param]
    return [(engine(pack(small_model(name), torch.device("cpu"), torch.float32)), small_images(name, 6))
            for name in names]


def run(engine, images, routing=None):
    return engine.run(images, routing, engine.network.arch.num_gates)


def test_runtimes_called_at_once_get_right_answers(engines, torch_threads):
    """More callers than cores, each asking for two threads: who finds them busy computes alone."""
    torch_threads(2)
    expected = [run(*target).logits for target in engines]

    def wrong(which):
        torch.set_num_threads(2)
        return sum(not torch.equal(run(*engines[which % 2]).logits, expected[which % 2]) for _ in range(30))

    with ThreadPoolExecutor() as callers:
        assert list(callers.map(wrong, range(4))) == [0] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_may_call(engines, torch_threads):
    torch_threads(2)
    target = engines[0]
    expected = run(*target).logits
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(run(*target).logits, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_workspace_keeps_nothing_of_the_last_call(engines):
    """The same call before and after others of other batch sizes, routes and NaN gives the same bits."""
    engine, images = engines[0]
    expected = run(engine, images)
    everything = torch.ones(len(images), engine.network.arch.num_gates, dtype=torch.bool)
    run(engine, torch.full_like(images, float("nan")), everything)
    run(engine, images[:1].contiguous() * 1e30)
    again = run(engine, images)
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.decisions.gate_logits, expected.decisions.gate_logits)
