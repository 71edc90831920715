"""The CUDA gate step and compaction, run on the CPU (tests/simulated/simt), against the oracles in float64."""

import shutil

import numpy as np
import pytest
import torch
from simt import SimtError, library

from skipnet_rt.kernels import compact_ref, gate_step_ref
from skipnet_rt.model.packing import PackedEmbedding, PackedLSTM

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def assert_compacted(executed, rows, count):
    expected_rows, expected_count = compact_ref(torch.from_numpy(executed.copy()))
    np.testing.assert_array_equal(rows, expected_rows.numpy())
    assert count.tolist() == expected_count.tolist()


@pytest.mark.parametrize("batch", [0, 1, 2, 31, 33, 1000, 4096, 4097, 9001])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_compaction(batch, share):
    compaction = library("compacted")
    generator = np.random.default_rng(batch)
    for seed in range(4):
        compaction.configure(seed)
        executed = compaction.array(generator.random(batch) < share)
        rows, count = compaction.empty(batch, np.int32), compaction.empty(1, np.int32)
        compaction("run_compact", executed, batch, rows, count)
        assert_compacted(executed, rows, count)


class GateStep:
    """One gate's step on random weights and state: inputs, the kernel's outputs, and the oracle's."""

    def __init__(self, seed, batch, channels, tiles, *, embed=10, hidden=10, rnn=True, forced=False):
        self.batch, self.channels, self.tiles, self.pixels = batch, channels, tiles, 7 * tiles
        self.embed, self.hidden_size, self.rnn = embed, hidden, rnn
        random = np.random.default_rng(seed)

        def normal(*shape, scale=1.0):
            return (scale * random.standard_normal(shape)).astype(np.float32)

        self.weights = ([normal(embed, channels, scale=channels ** -0.5), normal(embed), normal(4 * hidden, embed),
                         normal(4 * hidden, hidden), normal(4 * hidden), normal(hidden)] if rnn
                        else [normal(channels, scale=channels ** -0.5)])
        self.bias = float(np.float32(random.standard_normal()) * 0.1)
        self.sums = normal(batch, tiles, channels, scale=7.0)
        self.state = [normal(batch, hidden), normal(batch, hidden)] if rnn else []
        self.forced = random.random(batch) < 0.5 if forced else None

    def run(self, seed, times=1, empty=None):
        """The kernel's (logit, probability, executed, rows, count, *state). `empty` places follow the batch's."""
        gate, n = library("compacted"), self.batch
        gate.configure(seed)
        place = gate.array
        logit, probability, executed = gate.empty(n), gate.empty(n), gate.empty(n, np.bool_)
        rows, count, arrivals = gate.empty(n, np.int32), gate.empty(1, np.int32), place(np.zeros(1, np.int32))
        state = [place(value) for value in self.state]
        places = (n, None) if empty is None else (n + empty, place(np.array([n], np.int32)))
        sizes = (*places, self.channels, *((self.embed, self.hidden_size) if self.rnn else ()))
        forced = None if self.forced is None else place(self.forced)
        arguments = (*sizes, *map(place, self.weights), self.bias, place(self.sums), self.tiles, self.pixels, *state,
                     logit, probability, executed, forced, rows, count, arrivals)
        for _ in range(times):
            gate("run_rnn" if self.rnn else "run_feedforward", *arguments)
            assert arrivals.tolist() == [0], "scratch is zero again"
        return [value.copy() for value in (logit, probability, executed, rows, count, *state)]

    def expected(self, times=1):
        """The oracle's logits and state in float64, after some steps on the same pooled features."""
        pooled = torch.from_numpy(self.sums).double().sum(1) / self.pixels
        weights = [torch.from_numpy(weight).double() for weight in self.weights]
        bias = torch.tensor(self.bias, dtype=torch.float64)
        if not self.rnn:
            return [pooled @ weights[0] + bias]
        embedding, lstm = PackedEmbedding(*weights[:2]), PackedLSTM(*weights[2:], bias.view(1))
        state = [torch.from_numpy(value).double() for value in self.state]
        for _ in range(times):
            logit, *state = gate_step_ref(pooled, embedding, lstm, *state)
        return [logit, *state]


def assert_equals_oracle(step, seed, times=1):
    logit, probability, executed, rows, count, *state = step.run(seed, times)
    expected_logit, *expected_state = step.expected(times)
    for value, expected in ((logit, expected_logit), (probability, torch.sigmoid(expected_logit)),
                            *zip(state, expected_state, strict=True)):
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-5, atol=3e-6)
    wanted = step.forced if step.forced is not None else probability > 0.5
    np.testing.assert_array_equal(executed, wanted)
    assert_compacted(executed, rows, count)


@pytest.mark.parametrize(("batch", "channels", "tiles"), [
    (1, 16, 8), (3, 64, 1), (5, 17, 2), (130, 32, 4), (1, 2048, 1), (6, 256, 25), (2, 300, 9), (2, 1100, 5),
    (27, 16, 1), (28, 16, 1)])
@pytest.mark.parametrize("rnn", [True, False])
def test_gate_step(batch, channels, tiles, rnn):
    for seed in range(6):
        step = GateStep(seed, batch, channels, tiles, rnn=rnn, forced=seed % 3 == 2)
        assert_equals_oracle(step, seed)


@pytest.mark.parametrize(("embed", "hidden"), [(6, 9), (1, 1), (40, 33)])
def test_other_sizes_of_the_lstm(embed, hidden):
    assert_equals_oracle(GateStep(1, 9, 24, 3, embed=embed, hidden=hidden), seed=5)


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize(("batch", "empty"), [(0, 1), (0, 9), (1, 3), (5, 11), (4, 0), (600, 1500)])
def test_empty_places_are_left_alone(batch, empty, rnn):
    """There is no memory for them: whoever reads or writes any faults. The others' bits are as without them."""
    step = GateStep(8, batch, 24, 2, rnn=rnn)
    for value, expected in zip(step.run(seed=2, empty=empty), step.run(seed=1), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_state_advances_call_after_call():
    assert_equals_oracle(GateStep(4, 11, 16, 2), seed=6, times=4)


def test_a_large_batch():
    """More images than one round of the last block's compaction takes (1,024)."""
    assert_equals_oracle(GateStep(7, 1100, 16, 1), seed=3)


def test_an_empty_batch():
    *_, rows, count = GateStep(0, 0, 16, 1, rnn=False).run(seed=0)
    assert rows.shape == (0,)
    assert count.tolist() == [0]


def test_batch_invariance():
    """Bitwise the same in any batch, at any place, under any order of threads."""
    whole = GateStep(2, 37, 48, 3)
    results = whole.run(seed=0)
    for seed, part in ((1, slice(0, 37)), (2, slice(5, 6)), (3, slice(30, 37))):
        step = GateStep(2, 37, 48, 3)
        step.sums, step.state = whole.sums[part].copy(), [value[part].copy() for value in whole.state]
        step.batch = len(step.sums)
        logit, probability, executed, _, _, *state = step.run(seed)
        for value, expected in zip((logit, probability, executed, *state), results[:3] + results[5:], strict=True):
            np.testing.assert_array_equal(value, expected[part])


def test_an_image_with_nan_skips_and_its_neighbours_do_not_notice():
    step = GateStep(3, 10, 32, 2)
    clean = step.run(seed=1)
    step.sums[4, 1, 7] = np.nan
    logit, probability, executed, rows, _, *_ = step.run(seed=1)
    others = np.arange(10) != 4
    assert np.isnan(logit[4])
    assert np.isnan(probability[4])
    assert not executed[4]
    assert 4 not in rows
    np.testing.assert_array_equal(logit[others], clean[0][others])


def test_bad_sizes_are_named():
    step = GateStep(0, 2, 16, 1)
    step.tiles = 0
    with pytest.raises(SimtError, match="pooled: expected tiles and pixels, got 0"):
        step.run(seed=0)
