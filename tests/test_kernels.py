"""The native gate step and compaction against their oracles in plain PyTorch."""

import numpy as np
import pytest
import torch
from networks import small_model

from skipnet_rt import _C
from skipnet_rt.kernels import compact_ref, gate_step_ref
from skipnet_rt.packing import pack


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


def native_gate(network, index):
    lstm, gate = network.lstm, network.gates[index]
    return _C.RNNGate(gate.weight.numpy(), gate.bias.numpy(), lstm.input_weight.numpy(), lstm.hidden_weight.numpy(),
                      lstm.bias.numpy(), lstm.projection_weight.numpy(), lstm.projection_bias.item())


def decisions(batch):
    return (np.full(batch, np.nan, np.float32), np.full(batch, np.nan, np.float32), np.zeros(batch, bool))


@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
@pytest.mark.parametrize("batch", [0, 1, 5, 130])
def test_rnn_gate_step_equals_its_oracle(name, batch):
    network = pack(small_model(name), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(batch)
    hidden_dim, channels = network.arch.hidden_dim, network.arch.blocks[0].out_channels
    pooled = torch.randn(batch, channels, generator=generator)
    hidden, cell = (torch.randn(batch, hidden_dim, generator=generator) for _ in range(2))
    logit, expected_hidden, expected_cell = gate_step_ref(pooled, network.gates[0], network.lstm, hidden, cell)
    got, probability, executed = decisions(batch)
    rows = np.full(batch, -7)
    count = native_gate(network, 0).step(pooled.numpy(), hidden.numpy(), cell.numpy(), got, probability, executed,
                                         None, rows)
    for value, expected in ((got, logit), (probability, logit.sigmoid()), (hidden, expected_hidden),
                            (cell, expected_cell)):
        torch.testing.assert_close(torch.as_tensor(value), expected, atol=2e-6, rtol=1e-5)
    assert executed.tolist() == (probability > 0.5).tolist()
    assert rows[:count].tolist() == np.flatnonzero(executed).tolist()
    assert (rows[count:] == -7).all(), "the tail is left alone"


def test_exactly_half_and_nan_skip():
    gate = _C.FeedforwardGate(np.ones(1, np.float32), 0.0)
    logit, probability, executed = decisions(4)
    rows = np.zeros(4, np.int64)
    pooled = np.array([[0.0], [np.nan], [1e-3], [-1e-3]], np.float32)
    assert gate.step(pooled, logit, probability, executed, None, rows) == 1
    assert probability[0] == 0.5
    assert executed.tolist() == [False, False, True, False]
    assert rows[0] == 2


def test_forced_decisions_replace_the_gates_own():
    gate = _C.FeedforwardGate(np.ones(1, np.float32), 0.0)
    logit, probability, executed = decisions(3)
    rows = np.zeros(3, np.int64)
    forced = np.array([True, False, True])
    assert gate.step(np.array([[-1.0], [1.0], [2.0]], np.float32), logit, probability, executed, forced, rows) == 2
    assert executed.tolist() == forced.tolist()
    assert rows[:2].tolist() == [0, 2]
    np.testing.assert_allclose(probability, torch.sigmoid(torch.tensor([-1.0, 1.0, 2.0])), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pool_averages_the_listed_images_only(dtype):
    activation = torch.randn(5, 12, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    viewed = activation.view(torch.uint16) if dtype == torch.bfloat16 else activation
    pooled = torch.full((5, 7), -1.0)
    _C.pool(viewed.numpy(), np.array([1, 4]), pooled.numpy())
    torch.testing.assert_close(pooled[[1, 4]], activation[[1, 4]].float().mean(1), atol=1e-6, rtol=1e-5)
    assert (pooled[[0, 2, 3]] == -1).all()


def test_classify_equals_linear():
    generator = torch.Generator().manual_seed(0)
    pooled, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 16), (10, 16), (10,)))
    logits = torch.empty(3, 10)
    _C.classify(pooled.numpy(), weight.t().contiguous().numpy(), bias.numpy(), logits.numpy())
    torch.testing.assert_close(logits, torch.nn.functional.linear(pooled, weight, bias))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: _C.pool(np.zeros((2, 3, 4), np.float32), np.array([2]), np.zeros((2, 4), np.float32)),
     "rows: image 2 is not in a batch of 2"),
    (lambda: _C.pool(np.zeros((2, 3, 4), np.float32), np.array([0]), np.zeros((2, 5), np.float32)),
     r"pooled: expected shape \[ 2 4 \], got \[ 2 5 \]"),
    (lambda: _C.pool(np.zeros((2, 3, 4)), np.array([0]), np.zeros((2, 4), np.float32)),
     "activation: expected float32, .*float64"),
    (lambda: _C.pool(np.zeros((2, 4), np.float32), np.array([0]), np.zeros((2, 4), np.float32)),
     "expected .batch, pixels, channels., got 2 dimensions"),
])
def test_native_code_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
