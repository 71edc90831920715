"""The native gate step and compaction against their oracles in plain PyTorch."""

import copy

import numpy as np
import pytest
import torch
from networks import small_images, small_model

import skipnet_rt as srt
from skipnet_rt import _C
from skipnet_rt.kernels import compact_ref, gate_step_ref
from skipnet_rt.model.packing import pack


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compact_ref_equals_nonzero(batch, share):
    executed = torch.rand(batch, generator=torch.Generator().manual_seed(batch)) < share
    rows, count = compact_ref(executed)
    expected = executed.nonzero()[:, 0].int()
    assert count.tolist() == [len(expected)]
    assert torch.equal(rows[:len(expected)], expected)
    assert (rows[len(expected):] == -1).all()
    assert rows.shape == (batch,)


def test_compact_ref_checks_its_input():
    with pytest.raises(ValueError, match=r"executed must be bool \[N\], got torch.float32"):
        compact_ref(torch.ones(3))


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
@pytest.mark.parametrize("batch", [0, 1, 5, 130])
def test_rnn_gate_step_equals_its_oracle(name, batch, instruction_set):
    network = pack(small_model(name), torch.device("cpu"), torch.float32)
    lstm, gate = network.lstm, network.gates[0]
    native = _C.RNNGate(gate.weight.numpy(), gate.bias.numpy(), lstm.input_weight.numpy(), lstm.hidden_weight.numpy(),
                        lstm.bias.numpy(), lstm.projection_weight.numpy(), lstm.projection_bias.item(),
                        instruction_set)
    generator = torch.Generator().manual_seed(batch)
    pooled, hidden, cell = (torch.randn(batch, size, generator=generator) for size in (
        network.arch.blocks[0].out_channels, network.arch.hidden_dim, network.arch.hidden_dim))
    logit, expected_hidden, expected_cell = gate_step_ref(pooled, gate, lstm, hidden, cell)
    got = torch.full((batch,), torch.nan)
    native.step(pooled.numpy(), hidden.numpy(), cell.numpy(), got.numpy())
    for value, expected in ((got, logit), (hidden, expected_hidden), (cell, expected_cell)):
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
def test_exactly_half_skips(name):
    model = copy.deepcopy(small_model(name))
    with torch.no_grad():
        for parameter in model.control.proj.parameters():
            parameter.zero_()
    result = srt.compile(model, engine="cpu").infer(small_images(name, 3))
    assert (result.probabilities == 0.5).all()
    assert not result.executed.any()


def convolution():
    weight, bias = np.zeros((4, 3, 3, 3), np.float32), np.zeros(4, np.float32)
    return _C.Convolution("compacted", (weight, bias, 1), False, 2, (5, 6), "portable")


@pytest.mark.parametrize(("call", "message"), [
    (lambda: convolution().load(np.zeros((2, 5, 6, 4), np.float32)),
     r"x: expected shape \[ 2 5 6 3 \], got \[ 2 5 6 4 \]"),
    (lambda: _C.Convolution("compacted", (np.zeros((4, 3, 5, 5), np.float32), np.zeros(4, np.float32), 1), False, 1,
                            (5, 6), "portable"), "with a kernel of 1 or 3"),
    (lambda: _C.Convolution("resident", (np.zeros((4, 3, 3, 3), np.float32), np.zeros(4, np.float32), 3), False, 1,
                            (5, 6), "portable"), "stride: expected 1 or 2, got 3"),
    (lambda: _C.Convolution("lazy", (np.zeros((4, 3, 3, 3), np.float32), np.zeros(4, np.float32), 1), False, 1,
                            (5, 6), "portable"), "strategy: expected 'resident' or 'compacted', got 'lazy'"),
])
def test_native_code_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
