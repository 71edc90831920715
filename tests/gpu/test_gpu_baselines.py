"""The dense engines that our engines are measured against, on a GPU."""

import pytest
import torch
from networks import relative_error, small_images, small_model

import skipnet_rt as srt
from skipnet_rt.measure.baselines import CUDA_GRAPH, CUDA_GRAPH_BENCHMARK, PYTORCH, PYTORCH_CHANNELS_LAST

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


# Not torch.compile: it takes minutes, and what it does on the CPU is tested.
@pytest.mark.parametrize("baseline", [CUDA_GRAPH, CUDA_GRAPH_BENCHMARK, PYTORCH, PYTORCH_CHANNELS_LAST],
                         ids=lambda baseline: baseline.name)
def test_a_baseline_runs_the_dense_network_and_leaves_the_switch(baseline):
    model, images = small_model("rnn"), small_images("rnn", 3)
    everything = torch.ones(model.arch.num_gates, dtype=torch.bool)
    expected = srt.compile(model, engine="eager").infer(images, routing=everything).logits
    before = torch.backends.cudnn.benchmark
    call = baseline.build(model, images.cuda().half(), torch.float16)
    assert torch.backends.cudnn.benchmark == before
    for given, logits in ((images, expected), (images.flip(0), expected.flip(0))):
        assert relative_error(call(given.cuda().half()).float().cpu(), logits) < 0.01
