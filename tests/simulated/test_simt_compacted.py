"""The GPU's compacted strategy, stem to logits, run on the CPU (tests/simulated/simt), against plain PyTorch."""

import copy
import shutil

import numpy as np
import pytest
import torch
from networks import (
    SMALL,
    GoldenCase,
    plain_logits,
    relative_error,
    small_images,
    small_model,
    with_seeded_weights,
)
from simt import library
from test_simt_barriers import build_changed, fails, places

import skipnet_rt as srt
from skipnet_rt import _C
from skipnet_rt.engines.cuda_compacted import CompactedWeights, Description, element
from skipnet_rt.engines.tolerances import TOLERANCES
from skipnet_rt.model.packing import pack

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUICK = [("rnn", torch.bfloat16), ("feedforward1", torch.float32)]  # of the empty places


def bits(tensor):
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def flattened(value):
    """A description's numbers in order; lists are preceded by their length, floats are left out."""
    if isinstance(value, tuple):
        return [number for part in value for number in flattened(part)]
    if isinstance(value, list):
        return [len(value), *(number for part in value for number in flattened(part))]
    return [] if isinstance(value, float) else [int(value)]


class Compacted:
    """A small network on the simulated GPU."""

    def __init__(self, model, dtype, tf32=False):
        model = small_model(model) if isinstance(model, str) else model
        self.network = pack(model, torch.device("cpu"), dtype)
        self.description, self.weights = Description.of(self.network), CompactedWeights.of(self.network)
        fields = flattened(tuple(vars(self.description).values()))
        self.numbers = np.array([3 if tf32 else DTYPES.index(dtype), *fields], np.int32)  # csrc/cuda/element.h
        biases = [self.description.projection_bias, *(bias for _, bias in self.description.gates)]
        self.biases = np.array(biases, np.float32)

    def run(self, images, seed=0, routing=None, num_gates=None, multiprocessors=3, empty=None):
        """(logits, executed, probabilities), each with the images first.

        `empty` places follow the batch's: there is no memory for their images and states (whoever reads or writes any
        faults), and whatever else they have is poison.
        """
        native, arch, count = library("compacted"), self.network.arch, len(images)
        batch = count + (empty or 0)
        native.configure(seed, multiprocessors)
        num_gates = arch.num_gates if num_gates is None else num_gates
        sizes = np.zeros(4, np.int64)
        native("measure", self.numbers, self.biases, batch, sizes)
        assert sizes[:2].tolist() == [len(self.weights.elements), len(self.weights.floats)]
        place, memory = native.array, native.empty
        logits = memory((batch, self.description.head[1]))
        gate_logits, probabilities, executed = (memory((num_gates, batch)), memory((num_gates, batch)),
                                                memory((num_gates, batch), np.bool_))
        workspace = memory(int(sizes[2]), np.uint8)
        state = [memory((count, self.description.hidden)) for _ in range(2)]
        forced = None
        if routing is not None:
            forced = memory((arch.num_gates, batch), np.bool_)
            forced[:, :count] = routing.numpy().T
        native("run", self.numbers, self.biases, place(bits(self.weights.elements)), place(self.weights.floats.numpy()),
               batch, num_gates, None if empty is None else place(np.array([count], np.int32)),
               place(bits(images.to(self.network.dtype))), forced, logits, gate_logits, probabilities, executed, *state,
               workspace)
        self.written = np.count_nonzero(workspace[:sizes[3]] != 0xff)
        assert not empty or not np.isnan(logits[count:]).any(), "nothing that nobody wrote reaches the classifier"
        return (torch.from_numpy(logits[:count, :arch.num_classes].copy()).to(self.network.dtype),
                torch.from_numpy(executed[:, :count].T.copy()), torch.from_numpy(probabilities[:, :count].T.copy()))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_float32_equals_the_eager_engine(name):
    """Own decisions, over several orders of threads."""
    images = small_images(name, 5)
    expected = srt.compile(small_model(name), engine="eager").infer(images)
    network = Compacted(name, torch.float32)
    for seed in range(3):
        logits, executed, probabilities = network.run(images, seed)
        assert relative_error(logits, expected.logits) < TOLERANCES[torch.float32].logits
        assert torch.equal(executed, expected.executed)
        torch.testing.assert_close(probabilities, expected.probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rnn", "bottleneck", "feedforward1"])
def test_sixteen_bits_stay_within_the_error_bar(name, dtype):
    images, model = small_images(name, 4), small_model(name)
    exact = srt.compile(model, engine="eager", dtype=torch.float64).infer(images.double())
    logits, executed, _ = Compacted(name, dtype).run(images, seed=1, routing=exact.executed)
    assert torch.equal(executed, exact.executed)
    plain = plain_logits(copy.deepcopy(model).to(dtype), images.to(dtype), exact.executed)
    assert relative_error(logits, exact.logits) <= 2 * relative_error(plain, exact.logits)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("cifar10_feedforward_38-s71", 4), ("imagenet_rnn_gate_18-s111", 1)])
def test_golden_cases(name, count):
    """What the published code computed, at full size."""
    case = GoldenCase(name)
    logits, executed, probabilities = Compacted(case.model, torch.float32).run(case.images[:count].float(), seed=4)
    assert relative_error(logits, case.logits[:count]) < TOLERANCES[torch.float32].logits
    assert torch.equal(executed, case.executed[:count])
    torch.testing.assert_close(probabilities.double(), case.probabilities[:count], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, False),
                                             pytest.param(torch.float32, True, marks=pytest.mark.slow),
                                             pytest.param(torch.bfloat16, False, marks=pytest.mark.slow)])
def test_wide_networks(dtype, tf32):
    """As many channels as the two wider tiles and split-K are for; neither which tile nor who adds shows."""
    arch = srt.SkipNetArch("imagenet", "bottleneck", (1, 2), (32, 128), "rnn", image_size=(40, 36))
    model = with_seeded_weights(srt.build(arch), 3, 0.0, 1.0)
    images = torch.randn(3, 3, 40, 36, generator=torch.Generator().manual_seed(1))
    routing = torch.tensor([[True, False], [False, True], [True, True]])
    exact = plain_logits(copy.deepcopy(model).double(), images.double(), routing)
    network = Compacted(model, dtype, tf32)
    large, *_ = network.run(images, 1, routing, multiprocessors=1)
    small, *_ = network.run(images, 2, routing, multiprocessors=9)
    assert torch.equal(large, small)
    alone, *_ = network.run(images[1:2], 3, routing[1:2], multiprocessors=60)
    assert torch.equal(alone[0], large[1])
    bar = TOLERANCES[dtype].logits
    if bar is None:
        plain = plain_logits(copy.deepcopy(model).to(dtype), images.to(dtype), routing)
        bar = 2 * relative_error(plain, exact)
    error = relative_error(large, exact)
    assert 1e-5 < error < 1e-3 if tf32 else error <= bar


@pytest.fixture(scope="module")
def wide():
    """RNNGate after convolutions in small tiles, whose tail it may be."""
    arch = srt.SkipNetArch("imagenet", "basic", (2, 2), (40, 72), "rnn", image_size=(36, 40))
    return Compacted(with_seeded_weights(srt.build(arch), 3, 0.0, 1.0), torch.float32)


def test_a_gate_in_a_convolutions_tail_gives_the_same_bits_as_in_a_launch_of_its_own(wide):
    images, native = torch.randn(3, 3, 36, 40, generator=torch.Generator().manual_seed(1)), library("compacted")
    for routing in (None, torch.tensor([[True, False, True], [False, True, False], [False, False, False]])):
        native.launches()
        by_itself = wide.run(images, 1, routing, num_gates=4, multiprocessors=2)
        launches = native.launches()
        for seed in range(2, 6):
            in_tail = wide.run(images, seed, routing, num_gates=4, multiprocessors=200)
            assert native.launches() == launches - 4
            for value, expected in zip(in_tail, by_itself, strict=True):
                assert torch.equal(value, expected)
        for image in range(3):  # alone, nobody else lists it
            alone = wide.run(images[image:image + 1], image, None if routing is None else routing[image:image + 1],
                             num_gates=4, multiprocessors=200, empty=image % 2)
            for value, expected in zip(alone, by_itself, strict=True):
                assert torch.equal(value[0], expected[image])


TAIL_WAITS = places(r"cp_async_wait<0>\(\);", "cuda/gathered_conv.cu")


@pytest.mark.parametrize(("source", "line"), TAIL_WAITS)
def test_a_tail_without_a_gate_waits_for_the_weights_it_asked_for(wide, source, line):
    images = torch.zeros(1, 3, 36, 40)
    with library("compacted").without(source, line):
        assert fails(lambda: wide.run(images, multiprocessors=200))
    assert not fails(lambda: wide.run(images, multiprocessors=200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_of_an_odd_width(dtype):
    """The stem takes pixels in pairs; the last pair of a row is half one."""
    arch = srt.SkipNetArch("imagenet", "basic", (1, 1), (8, 16), "rnn", image_size=(27, 33))
    model = with_seeded_weights(srt.build(arch), 4, 0.0, 1.0)
    images = torch.randn(2, 3, 27, 33, generator=torch.Generator().manual_seed(2))
    routing = torch.tensor([[True], [False]])
    exact = plain_logits(copy.deepcopy(model).double(), images.double(), routing)
    network = Compacted(model, dtype)
    assert network.description.stem_pairs
    logits, *_ = network.run(images, 1, routing)
    bar = TOLERANCES[dtype].logits
    if bar is None:
        bar = 2 * relative_error(plain_logits(copy.deepcopy(model).to(dtype), images.to(dtype), routing), exact)
    assert relative_error(logits, exact) <= bar


@pytest.mark.parametrize("name", ["rnn", "feedforward2"])
def test_all_and_none(name):
    """Routes on which nobody or everybody executes; the unused last gate is evaluated, too."""
    images, arch = small_images(name, 3), SMALL[name]
    for share in (False, True):
        routing = torch.full((3, arch.num_gates), share)
        expected = plain_logits(copy.deepcopy(small_model(name)).double(), images.double(), routing)
        logits, executed, probabilities = Compacted(name, torch.float32).run(images, 2, routing, arch.num_gates + 1)
        assert torch.equal(executed[:, :-1], routing)
        assert not probabilities.isnan().any()
        assert relative_error(logits, expected) < TOLERANCES[torch.float32].logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance(dtype):
    """Alone, in a batch, at another place: the same bits."""
    images, network = small_images("rnn", 6), Compacted("rnn", dtype)
    whole = network.run(images, seed=0)
    for place in (0, 5):
        for value, expected in zip(network.run(images[place:place + 1], seed=place + 1), whole, strict=True):
            assert torch.equal(value[0], expected[place])
    for value, expected in zip(network.run(images.flip(0), seed=9), whole, strict=True):
        assert torch.equal(value.flip(0), expected)


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow)
    for name in sorted(SMALL) for dtype in (torch.float32, torch.bfloat16)])
def test_empty_places_do_not_change_a_bit(name, dtype):
    """As when a captured graph of a larger batch is replayed. Poison, NaN everywhere, would show; so would any work."""
    network, gates = Compacted(name, dtype), SMALL[name].num_gates
    for count, empty, forced in ((5, 3, False), (3, 1, True), (1, 0, False)):
        images = small_images(name, count)
        routing = torch.rand(count, gates, generator=torch.Generator().manual_seed(count)) < 0.5 if forced else None
        expected = network.run(images, 1, routing)
        assert not expected[0].isnan().any()
        written = network.written
        for value, wanted in zip(network.run(images, 2, routing, empty=empty), expected, strict=True):
            assert torch.equal(value, wanted)
        assert network.written == written, "no activation, no sum of an empty place is written"


def test_all_places_may_be_empty():
    """The forward pass that comes before a capture has no images."""
    logits, executed, probabilities = Compacted("rnn", torch.float32).run(small_images("rnn", 1)[:0], empty=4)
    assert len(logits) == len(executed) == len(probabilities) == 0


@pytest.mark.slow
def test_more_images_than_a_grid_is_long(monkeypatch):
    """A thread takes several. There is no memory for 65,536 here, so the limit becomes 2."""
    images, network = small_images("feedforward1", 5), Compacted("feedforward1", torch.float32)
    expected = network.run(images)
    changed = build_changed("compacted", "65535", "2")
    monkeypatch.setitem(globals(), "library", lambda name: changed)
    for value, wanted in zip(network.run(images), expected, strict=True):
        assert torch.equal(value, wanted)


WAITS = places(r"wait_for_previous_grid\(\);", "cuda/compacted.cu", "cuda/gate_step.cu", "cuda/gathered_conv.cu")


@pytest.mark.parametrize(("source", "line"), WAITS)
def test_without_one_wait_for_the_grid_before_a_result_is_wrong(source, line):
    """Grids overlap, in one order of threads or another; with all waits nothing shows of it."""
    networks = [(Compacted(name, torch.float32), small_images(name, 3)) for name in ("bottleneck", "feedforward1")]
    expected = [network.run(images)[0] for network, images in networks]

    def check(seed, network, images, logits):
        assert torch.equal(network.run(images, seed)[0], logits)

    checks = [lambda seed=seed, case=(*network, logits): check(seed, *case) for seed in range(1, 9)
              for network, logits in zip(networks, expected, strict=True)]
    assert not any(map(fails, checks[:4]))
    with library("compacted").without(source, line):
        assert any(map(fails, checks))


def test_an_image_with_nan_gets_nan_and_skips():
    images, network = small_images("rnn", 4), Compacted("rnn", torch.float32)
    clean, *_ = network.run(images)
    images[2, 0, 3, 3] = torch.nan
    logits, executed, probabilities = network.run(images)
    others = [0, 1, 3]
    assert logits[2].isnan().all()
    assert probabilities[2].isnan().all()
    assert not executed[2].any()
    assert torch.equal(logits[others], clean[others])


def test_an_empty_batch():
    logits, executed, _ = Compacted("rnn", torch.float32).run(small_images("rnn", 1)[:0])
    assert logits.shape == (0, 7)
    assert executed.shape == (0, 6)


def test_tf32_is_for_float32_and_only_where_it_is_asked_for():
    precision = torch.get_float32_matmul_precision()
    try:
        for asked, expected in (("highest", "float32"), ("high", "tf32")):
            torch.set_float32_matmul_precision(asked)
            assert [element(dtype) for dtype in DTYPES] == [expected, "float16", "bfloat16"]
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.skipif(not hasattr(_C, "CudaCompacted"), reason=f"CUDA sources {_C.cuda_build}")
@pytest.mark.parametrize("name", ["cifar10_rnn_gate_38", "cifar10_feedforward_38", "cifar10_feedforward_110",
                                  "imagenet_rnn_gate_18", "imagenet_rnn_gate_50"])
def test_the_extension_takes_the_published_networks(name):
    """Descriptions and weights fit one another; a workspace grows with the batch. No device is touched."""
    network = pack(srt.build(name), torch.device("cpu"), torch.bfloat16)
    weights, description = CompactedWeights.of(network), Description.of(network)
    addresses = dict(elements=weights.elements.data_ptr(), floats=weights.floats.data_ptr())
    native = _C.CudaCompacted(0, "bfloat16", **vars(description), **addresses,
                              elements_count=len(weights.elements), floats_count=len(weights.floats))
    # All grows with it but the partial sums, which are 8 MiB at most.
    assert 0 < 6 * native.workspace_bytes(1) <= native.workspace_bytes(8) <= 8 * native.workspace_bytes(1)
    with pytest.raises(ValueError, match=r"weights: expected \d+ elements and \d+ floats, got 3 and 4"):
        _C.CudaCompacted(0, "bfloat16", **vars(description), **addresses, elements_count=3, floats_count=4)
