"""Weights as engines take them: exact, and a snapshot."""

import pytest
import torch
from networks import SMALL, small_images, small_model
from torch.nn import functional as F

import skipnet_rt as srt
from skipnet_rt.model.packing import pack


@pytest.mark.parametrize("name", sorted(SMALL))
def test_folded_convolutions_equal_convolution_and_batch_norm(name):
    model = small_model(name).double()
    try:
        network = pack(model, torch.device("cpu"), torch.float64)
        images = small_images(name, 2).double()
        x = model.features(images)
        folded = F.relu(F.conv2d(images, network.stem.weight, network.stem.bias, network.stem.stride,
                                 network.stem.padding))
        torch.testing.assert_close(folded, F.relu(model.bn1(model.conv1(images))))
        for plan, packed in zip(model.arch.blocks, network.blocks, strict=True):
            y = x
            for place, layer in enumerate(packed.convolutions):
                y = F.conv2d(F.relu(y) if place else y, layer.weight, layer.bias, layer.stride, layer.padding)
            torch.testing.assert_close(y, model.block(plan).residual(x))
            x = F.relu(y + model.block(plan).shortcut(x))
    finally:
        model.float()


def test_gates_stay_in_float32_and_a_snapshot_is_a_copy():
    model = srt.build(SMALL["rnn"])
    network = pack(model, torch.device("cpu"), torch.bfloat16)
    assert network.stem.weight.dtype == torch.bfloat16
    assert network.gates[0].weight.dtype == network.lstm.input_weight.dtype == torch.float32
    before = network.lstm.input_weight.clone(), network.head_weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(network.lstm.input_weight, before[0])
    assert torch.equal(network.head_weight, before[1])
