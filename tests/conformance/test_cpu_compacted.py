"""What only the CPU's compacted strategy has: blocks that all threads share, and leave together."""

import pytest
import torch
from networks import small_images, small_model

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
