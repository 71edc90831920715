"""The harness that runs CUDA sources on the CPU: it accepts what is right and catches what is wrong."""

import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from simt import SimtError, library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

(NONE, BARRIER, COPY_WAIT, SHARED_BOUNDS, GLOBAL_BOUNDS, UNWRITTEN, DIVERGENT, EARLY_EXIT, WARP, HASTY_END, SPIN,
 RELEASE, ACQUIRE, LATE_RELEASE, NO_WAIT, HASTY_MIDDLE, COUNTER_FENCE) = range(17)
SEEDS = range(8)


@contextmanager
def suppress_and_keep(messages):
    """An error's message goes on a list."""
    try:
        yield
    except SimtError as error:
        messages.append(str(error))


def rotate(seed, fault, blocks=5):
    """The rotated blocks, beside what they should be."""
    faults = library("faults")
    faults.configure(seed)
    x = faults.array(np.random.default_rng(seed).standard_normal((blocks, 128), dtype=np.float32))
    out = faults.empty(x.shape)
    faults("run_rotate", x, out, blocks, fault)
    return out.copy(), np.roll(x, -1, axis=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_passes(seed):
    out, expected = rotate(seed, NONE)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("fault", [BARRIER, COPY_WAIT, UNWRITTEN])
def test_a_wrong_result_shows(fault):
    results = [rotate(seed, fault) for seed in SEEDS]
    wrong = sum(not np.array_equal(out, expected) for out, expected in results)
    assert wrong > len(SEEDS) / 2
    assert any(np.isnan(out).any() for out, _ in results)


@pytest.mark.parametrize(("fault", "message"), [
    (DIVERGENT, r"divergent barrier: other threads of the block wait at faults.cpp:"),
    (EARLY_EXIT, r"threads wait for ever"),
    (WARP, r"(31|62|93) for __shfl_xor_sync at faults.cpp:"),
])
def test_threads_that_do_not_meet(fault, message):
    for seed in SEEDS:
        with pytest.raises(SimtError, match=message):
            rotate(seed, fault)


def test_out_of_bounds():
    """An access past the end faults where the array lies against its end, a write also where it lies at the start."""
    caught = []
    for seed in SEEDS:
        try:
            out, expected = rotate(seed, SHARED_BOUNDS)
            assert not np.array_equal(out, expected)
        except SimtError as error:
            caught.append(str(error))
        with pytest.raises(SimtError, match=r"a global array of 2560 bytes, at byte 2560|written outside an array"):
            rotate(seed, GLOBAL_BOUNDS)
    assert any("out of bounds: shared memory of block" in error and "(512 bytes), at byte 512" in error
               for error in caught)


def pass_on(seed, fault, cluster=4):
    """What 16 blocks have got from the next one of their cluster, and should have."""
    faults = library("faults")
    faults.configure(seed)
    out = faults.empty((16, 32, 2))
    faults("run_pass_on", out, 16, cluster, fault)
    following = np.roll(np.arange(16).reshape(-1, cluster), -1, axis=1).reshape(16, 1, 1)
    return out.copy(), np.broadcast_to(2 * following + np.arange(2), out.shape)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_clusters(seed, cluster):
    out, expected = pass_on(seed, NONE, cluster)
    np.testing.assert_array_equal(out, expected)


def test_a_store_that_nobody_waits_for_has_not_come():
    for seed in SEEDS:
        out, expected = pass_on(seed, NO_WAIT)
        np.testing.assert_array_equal(out[..., 0], expected[..., 0])
        assert np.isnan(out[..., 1]).any()


@pytest.mark.parametrize(("fault", "message"), [
    (BARRIER, "nothing is counted there yet|no fence and barrier of the cluster"),
    (COUNTER_FENCE, "no fence and barrier of the cluster"),
    (HASTY_END, "a block ends before what is stored to it has come|block . has ended"),
])
def test_a_cluster_that_does_not_agree(fault, message):
    """Storing to a block that does not count yet, or has ended, shows in the orders of threads in which it is so."""
    messages = []
    for seed in range(20):
        with suppress_and_keep(messages):
            pass_on(seed, fault)
    assert messages
    assert all(re.search(message, each) for each in messages), messages


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_wait_for_one_another(seed):
    faults = library("faults")
    faults.configure(seed)
    ticket, sums = faults.array(np.zeros(1, np.int32)), faults.empty(13, np.int32)
    sums[0] = 0
    faults("run_chain", ticket, sums, 12, NONE)
    np.testing.assert_array_equal(sums, np.concatenate([[0], np.arange(12).cumsum()]))


def test_waiting_for_a_block_that_has_not_started():
    faults = library("faults")
    faults.configure(0)
    sums = faults.empty(65, np.int32)
    sums[0] = 0
    with pytest.raises(SimtError, match="spins for ever"):
        faults("run_chain", None, sums, 64, SPIN)


@pytest.mark.parametrize("fault", [NONE, RELEASE, ACQUIRE, LATE_RELEASE])
def test_what_blocks_leave_one_another_takes_two_fences(fault):
    faults = library("faults")
    for seed in SEEDS:
        faults.configure(seed)
        left, out = faults.empty((7, 64, 4)), faults.empty(64)
        faults("run_join", left, faults.array(np.zeros(1, np.int32)), out, 7, fault)
        assert (out == sum(range(7))).all() if fault == NONE else np.isnan(out).all()


@pytest.mark.parametrize("fault", [NONE, NO_WAIT, HASTY_MIDDLE])
def test_grids_that_overlap(fault):
    """Without a wait a grid reads what is not there yet; so does one whose forerunner ends without having waited."""
    faults, wrong = library("faults"), 0
    for seed in SEEDS:
        faults.configure(seed)
        first = np.arange(160, dtype=np.int32)
        to = faults.empty((4, 160), np.int32)
        faults("run_pass_along", faults.array(first), to, 5, fault)
        expected = (first + 3)[::-1] if fault == HASTY_MIDDLE else first + 4  # each reads from the other end
        wrong += not np.array_equal(to[3], expected)
    assert (wrong == 0) == (fault == NONE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fragments(dtype):
    faults = library("faults")
    faults.configure(3)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    d = faults.empty((16, 16))
    bits = [faults.array(value.view(torch.uint16).numpy()) for value in (a, b)]
    faults("run_multiply", *bits, d, dtype == torch.bfloat16)
    np.testing.assert_allclose(d, (a.double() @ b.double().t()).numpy(), rtol=1e-5, atol=1e-5)


def test_sixteen_bit_rounding():
    """As PyTorch rounds, to nearest even, over all magnitudes, halfway cases, infinities and NaN."""
    faults = library("faults")
    faults.configure(0)
    every = np.arange(1 << 16, dtype=np.uint32)
    patterns = np.concatenate([every << 16, (every << 16) + 0x8000, (every << 16) + 0x1000, (every << 16) + 0x7fff])
    x = faults.array(patterns.astype(np.uint32).view(np.float32))
    half, bfloat16 = (faults.empty(x.shape, np.uint16) for _ in range(2))
    back = faults.empty(x.shape)
    faults("run_round_trip", x, half, bfloat16, back, x.size)
    values = torch.from_numpy(x.copy())
    number = ~np.isnan(x)
    np.testing.assert_array_equal(half[number], values.half().view(torch.uint16).numpy()[number])
    np.testing.assert_array_equal(bfloat16[number], values.bfloat16().view(torch.uint16).numpy()[number])
    np.testing.assert_array_equal(back, values.half().float().numpy())
