"""What networks cost, beside PyTorch's own counter and the published figures."""

import pytest
import torch
from networks import SMALL, small_images, small_model
from torch.utils.flop_counter import FlopCounterMode

import skipnet_rt as srt
from skipnet_rt.model.arch import PUBLISHED
from skipnet_rt.model.flops import count_operations


def counted_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_multiply_adds_equal_what_pytorch_counts_for_the_model(name):
    """PyTorch's counter sees every block computed, every gate, and the classifier; two operations a multiply-add."""
    model, images = small_model(name), small_images(name, 1)
    counts = count_operations(model.arch)
    per_step = 4 * model.arch.hidden_dim * (model.arch.embed_dim + model.arch.hidden_dim)
    classifier = model.arch.features * model.arch.num_classes
    expected = counts.dense.multiply_adds + sum(gate.multiply_adds for gate in counts.gates) + classifier
    if model.arch.gate == "rnn":  # the fused LSTM is not in PyTorch's table
        expected -= model.arch.num_gates * per_step
        if model.arch.steps_last_gate:
            expected += model.arch.blocks[-1].out_channels * model.arch.embed_dim + model.arch.hidden_dim
    elif model.arch.gated:
        last = count_operations(model.arch.replace(depths=(*model.arch.depths[:-1], model.arch.depths[-1] + 1)))
        expected += last.gates[-1].multiply_adds
    with torch.no_grad():
        assert counted_flops(lambda: model.trace(images)) == 2 * expected


@pytest.mark.parametrize(("name", "multiply_adds"), [
    ("cifar10_resnet_110", 253_149_184),      # 0.51 GFLOP; He et al. 2016 round to 0.25 G multiply-adds
    ("imagenet_resnet_50", 4_087_136_256),    # with the classifier's 2,048,000: 4.089 G, the figure usually quoted
    ("imagenet_resnet_101", 7_799_357_440),   # with the classifier: 7.80 G
])
def test_known_totals_of_dense_networks(name, multiply_adds):
    assert count_operations(srt.arch(name)).dense.multiply_adds == multiply_adds


@pytest.mark.parametrize(("name", "percent"), [
    ("cifar10_feedforward_38", 15.6), ("cifar10_feedforward_110", 12.5), ("cifar10_rnn_gate_110", 0.02)])
def test_gate_costs_beside_a_residual_block(name, percent):
    counts = count_operations(srt.arch(name))
    share = counts.gates[3].multiply_adds / counts.blocks[3].executed.multiply_adds
    assert 100 * share == pytest.approx(percent, rel=0.05)


def test_per_image_counts():
    architecture = srt.arch("cifar10_rnn_gate_38")
    counts = count_operations(architecture)
    executed = torch.zeros(3, architecture.num_gates, dtype=torch.bool)
    executed[1] = True
    executed[2, 5] = True  # the first block of group 2: its projection is paid either way
    multiply_adds, operations = counts.per_image(executed)
    gates = sum(gate.multiply_adds for gate in counts.gates)
    assert multiply_adds[1] == counts.dense.multiply_adds + gates
    block = counts.blocks[6]
    assert multiply_adds[2] - multiply_adds[0] == block.executed.multiply_adds - block.skipped.multiply_adds
    assert block.skipped.multiply_adds == 32 * 16 * 16 * 16
    assert (operations > 2 * multiply_adds).all()


def test_operations_exceed_twice_the_multiply_adds_in_every_network():
    for architecture in PUBLISHED.values():
        dense = count_operations(architecture).dense
        assert 2 * dense.multiply_adds < dense.operations < 2.1 * dense.multiply_adds
