"""csrc/cuda/resident.cu on the CPU against the oracle in float64; simt/simt.h says what the harness catches."""

import copy
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from golden.seeded import seeded_images
from networks import GoldenCase, plain_logits, relative_error, with_seeded_weights
from simt import SimtError, library

import skipnet_rt as srt
from skipnet_rt import SkipNetArch
from skipnet_rt.engines.cuda_resident import ResidentWeights
from skipnet_rt.engines.tolerances import TOLERANCES
from skipnet_rt.model.packing import pack

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# Depth 8 and 14 with the published widths, whose planes have the published rows, and what is padded: widths, columns,
# rows, channels of the image.
NETWORKS = {
    "8": SkipNetArch("cifar", "basic", (1, 1, 1), (16, 32, 64), "rnn", image_size=(16, 32)),
    "14": SkipNetArch("cifar", "basic", (2, 2, 2), (16, 32, 64), "rnn", image_size=(32, 32)),
    "narrow": SkipNetArch("cifar", "basic", (3, 2, 2), (8, 12, 16), "rnn", num_classes=7, image_size=(16, 16)),
    "two groups": SkipNetArch("cifar", "basic", (2, 2), (8, 16), "rnn", "reinforced", image_size=(8, 12),
                              in_channels=1, embed_dim=6, hidden_dim=9),
    "odd": SkipNetArch("cifar", "basic", (1, 2, 2), (16, 32, 64), "rnn", image_size=(19, 13), num_classes=300),
    "wide gate": SkipNetArch("cifar", "basic", (1, 1, 1), (16, 32, 64), "rnn", image_size=(8, 8), embed_dim=32,
                             hidden_dim=32),
    "one group": SkipNetArch("cifar", "basic", (3,), (16,), "rnn", image_size=(8, 8)),
    "dense": SkipNetArch("cifar", "basic", (1, 2, 1), (16, 32, 64), "none", image_size=(16, 16)),
}
DTYPES = [torch.float16, torch.bfloat16]
BFLOAT16_SLOW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
LARGER_SLOW = ["8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("odd", "two groups"))]
EVERYTHING = 227 * 1024  # bytes of shared memory: three images of 32x32 at a time


@cache
def model(name):
    return with_seeded_weights(srt.build(NETWORKS[name]), seed=5, gate_bias=-1.0, gate_gain=3.0)


def images_of(name, count, seed=5):
    arch = NETWORKS[name]
    images = torch.from_numpy(seeded_images(seed, count, 4 * max(arch.image_size)))
    return images[:, :arch.in_channels, :arch.image_size[0], :arch.image_size[1]].contiguous()


def as_array(tensor):
    return tensor.contiguous().view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def simulate(net, images, dtype, *, routing=None, last_gate=False, seed=0, at_a_time=0, cluster=1,
             multiprocessors=2, shared=EVERYTHING):
    """The kernel's logits, gate logits, probabilities and decisions ``[N, ...]`` and the LSTM's state."""
    network = pack(net, torch.device("cpu"), dtype)
    arch, batch = network.arch, len(images)
    weights = ResidentWeights.of(network)
    resident = library("resident")
    resident.configure(seed, multiprocessors)
    embed, hidden_dim = (arch.embed_dim, arch.hidden_dim) if arch.gated else (0, 0)
    num_gates = arch.num_gates + (last_gate and arch.gated)
    numbers = np.array([dtype == torch.bfloat16, arch.in_channels, *arch.image_size, arch.num_classes, embed,
                        hidden_dim, len(arch.depths), *arch.depths], np.int32)
    sizes = np.array([2 * len(weights.fragments), len(weights.floats)], np.int32)
    strides = (0, 0) if routing is None else (0, 1) if routing.dim() == 1 else (arch.num_gates, 1)
    forced = None if routing is None else resident.array(routing.contiguous().numpy())
    logits = resident.empty((batch, arch.num_classes), np.uint16)
    gate_logits, probabilities = resident.empty((num_gates, batch)), resident.empty((num_gates, batch))
    executed = resident.empty((num_gates, batch), np.uint8)
    hidden, cell = resident.empty((batch, hidden_dim)), resident.empty((batch, hidden_dim))
    resident("run", numbers, resident.array(as_array(weights.fragments)), resident.array(as_array(weights.floats)),
             sizes, shared, at_a_time, cluster, batch, num_gates, resident.array(as_array(images.to(dtype))), forced,
             *strides, logits, gate_logits, probabilities, executed, hidden, cell,
             resident.array(np.zeros(1, np.int32)))
    assert np.isin(executed, (0, 1)).all()
    return (torch.from_numpy(logits.copy()).view(dtype),
            *(torch.from_numpy(value.copy()).t() for value in (gate_logits, probabilities)),
            torch.from_numpy(executed.copy()).bool().t(), torch.from_numpy(hidden.copy()),
            torch.from_numpy(cell.copy()))


def routings(name, batch):
    """No forced decisions, every block, none, and routes that differ from image to image."""
    gates = NETWORKS[name].num_gates
    mixed = (torch.arange(batch).unsqueeze(1) + torch.arange(gates)) % 3 != 1
    return {"free": None, "all": torch.ones(batch, gates, dtype=torch.bool),
            "none": torch.zeros(batch, gates, dtype=torch.bool), "mixed": mixed}


def check(name, dtype, images, routing, result):
    """Against float64 on the same route: logits within twice plain PyTorch's error, gates by the dtype's epsilon."""
    logits, gate_logits, probabilities, executed, hidden, cell = result
    gates = NETWORKS[name].num_gates
    route = executed[:, :gates]
    oracle = srt.compile(copy.deepcopy(model(name)).double(), engine="eager")
    exact = oracle.engine.run(images.double(), route.t() if gates else None, gate_logits.shape[1])
    plain = plain_logits(copy.deepcopy(model(name)).to(dtype), images.to(dtype), route)
    bar = 2 * relative_error(plain, exact.logits)
    assert relative_error(logits, exact.logits) <= bar
    decided = probabilities > 0.5
    assert torch.equal(executed, decided if routing is None else torch.cat((routing, decided[:, gates:]), dim=1))
    expected = exact.decisions
    epsilon = TOLERANCES[dtype].decision
    assert (probabilities - expected.probabilities.t()).abs().max() < epsilon if gates else True
    torch.testing.assert_close(torch.sigmoid(gate_logits), probabilities, atol=1e-6, rtol=0)
    if gates:
        assert (hidden - expected.hidden).abs().max() < epsilon
        assert (cell - expected.cell).abs().max() < 2 * epsilon


@pytest.mark.parametrize("dtype", BFLOAT16_SLOW, ids=str)
@pytest.mark.parametrize("route", ["free", "all", "none", "mixed"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "14" else name
                                  for name in sorted(NETWORKS)])
def test_agrees_with_the_oracle(name, route, dtype):
    batch = 2 if name == "14" else 3
    images, routing = images_of(name, batch), routings(name, batch)[route]
    result = simulate(model(name), images, dtype, routing=routing, seed=1, last_gate=route == "mixed")
    check(name, dtype, images, routing, result)


def same_bits(left, right):
    """Of two results; NaN included."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8))
               for a, b in zip(map(torch.Tensor.contiguous, left), map(torch.Tensor.contiguous, right), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "count", "cluster"), [
    ("cifar10_rnn_gate_38-s15", torch.bfloat16, 2, 1), ("cifar100_rnn_gate_38-s56", torch.float16, 1, 4),
    ("cifar10_rnn_gate_110-s33", torch.float16, 2, 1), ("cifar10_rnn_gate_152-s44", torch.bfloat16, 1, 2)])
def test_published_networks_agree_with_the_golden_cases(name, dtype, count, cluster):
    case = GoldenCase(name)
    images, route = case.images[:count], case.executed[:count]
    logits, _, probabilities, executed, *_ = simulate(case.model, images, dtype, routing=route, cluster=cluster)
    plain = plain_logits(copy.deepcopy(case.model).to(dtype), images.to(dtype), route)
    assert relative_error(logits, case.logits[:count]) <= 2 * relative_error(plain, case.logits[:count])
    assert torch.equal(executed, route)
    clear = (case.probabilities[:count] - 0.5).abs() > TOLERANCES[dtype].decision
    assert torch.equal((probabilities > 0.5)[clear], route[clear])


@pytest.mark.parametrize("dtype", BFLOAT16_SLOW, ids=str)
@pytest.mark.parametrize("name", LARGER_SLOW)
def test_an_image_does_not_depend_on_its_company(name, dtype):
    """Alone or with up to three others in its thread block, one round or several, whoever comes first."""
    images = images_of(name, 5)
    expected = simulate(model(name), images, dtype, at_a_time=1, multiprocessors=5)
    for seed, (at_a_time, multiprocessors) in enumerate([(0, 2), (1, 1), (2, 2), (3, 1), (4, 2)]):
        assert same_bits(simulate(model(name), images, dtype, seed=seed, at_a_time=at_a_time,
                                  multiprocessors=multiprocessors), expected)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = simulate(model(name), images[order], dtype, at_a_time=3)
    assert same_bits(shuffled, [part[order] for part in expected])
    for row in range(5):
        assert same_bits(simulate(model(name), images[row:row + 1], dtype, seed=row),
                         [part[row:row + 1] for part in expected])


@pytest.mark.parametrize("route", ["free", "mixed", "none"])
@pytest.mark.parametrize("cluster", [2, 4])
@pytest.mark.parametrize("name", LARGER_SLOW)
def test_a_cluster_changes_no_bit(name, cluster, route):
    """Two or four thread blocks that share an image give what one gives."""
    for seed in range(3):
        images, routing = images_of(name, 2, seed), routings(name, 2)[route]
        expected = simulate(model(name), images, torch.float16, routing=routing, last_gate=True)
        assert same_bits(simulate(model(name), images, torch.float16, routing=routing, last_gate=True, seed=seed,
                                  cluster=cluster), expected)


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_threads_changes_a_bit(seed):
    images, routing = images_of("8", 3), routings("8", 3)["mixed"]
    expected = simulate(model("8"), images, torch.float16, routing=routing, at_a_time=2, multiprocessors=1)
    assert same_bits(simulate(model("8"), images, torch.float16, routing=routing, at_a_time=2, multiprocessors=1,
                              seed=100 + seed), expected)


@pytest.mark.parametrize("name", ["8", "narrow"])
def test_a_skipped_block_leaves_no_trace(name):
    """Its weights have come all the same, for another image or in advance: they may be NaN."""
    images, routing = images_of(name, 4), routings(name, 4)["mixed"]
    routing[:, 0] = torch.tensor([False, True, False, True])
    poisoned = copy.deepcopy(model(name))
    poisoned.block(poisoned.arch.blocks[1]).conv1.weight.data.fill_(float("nan"))
    expected = simulate(model(name), images, torch.bfloat16, routing=routing)
    got = simulate(poisoned, images, torch.bfloat16, routing=routing)
    assert same_bits([part[[0, 2]] for part in got], [part[[0, 2]] for part in expected])
    assert got[0][[1, 3]].isnan().all()
    nobody = torch.zeros_like(routing)
    assert same_bits(simulate(poisoned, images, torch.bfloat16, routing=nobody),
                     simulate(model(name), images, torch.bfloat16, routing=nobody))


def test_one_route_for_all_images():
    images, route = images_of("narrow", 3), torch.tensor([True, False, False, True, True, False])
    assert same_bits(simulate(model("narrow"), images, torch.bfloat16, routing=route),
                     simulate(model("narrow"), images, torch.bfloat16, routing=route.expand(3, 6)))


def test_an_image_with_nan_gets_nan_and_spoils_no_other():
    images = images_of("8", 3)
    clean = simulate(model("8"), images, torch.float16, at_a_time=3)
    images[1, 0, 4, 5] = float("nan")
    logits, _, probabilities, executed, *_ = simulate(model("8"), images, torch.float16, at_a_time=3)
    assert logits[1].isnan().all()
    assert probabilities[1].isnan().all()
    assert not executed[1].any()
    assert torch.equal(logits[[0, 2]], clean[0][[0, 2]])


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(SimtError, match=r"image: 32 x 32 needs .* bytes of shared memory, the device has 65536"):
        simulate(model("14"), images_of("14", 1), torch.float16, shared=65536)


def test_fits_the_shared_memory_of_every_architecture():
    """One image of 32x32 in 99 KiB (sm_86, sm_89, sm_120), two in 163 (sm_80), three in 227 (sm_90, sm_100)."""
    resident = library("resident")
    for kilobytes, images in ((99, 1), (163, 2), (227, 3)):
        bytes_of = [resident_bytes(resident, count) for count in (images, images + 1)]
        assert bytes_of[0] <= kilobytes * 1024 < bytes_of[1]


@pytest.mark.parametrize("name", ["one group", "narrow", pytest.param("odd", marks=pytest.mark.slow)])
def test_eight_pixels_in_a_row_lie_in_different_banks(name):
    """At a plane's borders, too. Where a group begins every second pixel is read, which meets banks twice."""
    arch, resident = NETWORKS[name], library("resident")

    def counted():
        counts = np.zeros(2, np.int32)
        resident("bank_conflicts", counts[:1], counts[1:])
        return counts

    counts = {}
    for route in ("none", "inner"):
        inner = [route == "inner" and block.stride == 1 for block in arch.blocks[1:]]  # the first block has no gate
        counted()  # what others have left
        simulate(model(name), images_of(name, 1), torch.float16, routing=torch.tensor([inner]))
        counts[route] = counted()
    reads, conflicts = counts["inner"] - counts["none"]
    assert reads > 0
    assert conflicts == 0


def test_a_logit_decides_as_its_probability_does():
    """Every float32 near the threshold, others from the smallest to the largest, zeros, infinities and NaN."""
    threshold = int(np.float32(1.5 * 2.0 ** -24).view(np.uint32))
    near = np.arange(threshold - 100_000, threshold + 100_000, dtype=np.uint32)
    positive = np.concatenate((near, np.arange(0, 0x7f800001, 9973, dtype=np.uint32), [0x7f800000, 0x7fc00000]))
    bits = np.concatenate((positive, positive | 0x80000000)).astype(np.uint32)
    resident = library("resident")
    resident.configure(0)
    executed, probabilities = resident.empty(len(bits), np.uint8), resident.empty(len(bits))
    resident("decide_by_logit", resident.array(bits.view(np.float32)), len(bits), executed, probabilities)
    assert np.array_equal(executed.astype(bool), probabilities > 0.5)


def test_a_launch_leaves_the_kernels_limits_alone():
    """They are set once, when a network is placed: a smaller launch would take them below a larger one's needs."""
    with pytest.raises(SimtError, match="resident: more shared memory than the kernel has been allowed"):
        library("resident")("run_unplaced", RESNET_110)


RESNET_110 = np.array([0, 3, 32, 32, 10, 10, 10, 3, 18, 18, 18], np.int32)


def resident_bytes(resident, images):
    """Bytes of shared memory for a SkipNet-110."""
    answer = resident.empty(1, np.int32)
    resident("shared_memory_of", RESNET_110, images, answer)
    return int(answer[0])


@pytest.mark.parametrize(("device", "batch", "plan"), [
    ((132, 227), 1, (1, 1, 0, 1)), ((132, 227), 132, (1, 132, 0, 1)), ((132, 227), 133, (2, 67, 0, 1)),
    ((132, 227), 396, (3, 132, 0, 1)), ((132, 227), 397, (2, 132, 1, 1)), ((132, 227), 4096, (3, 132, 1, 1)),
    ((108, 163), 1, (1, 1, 0, 1)), ((108, 163), 216, (2, 108, 0, 1)), ((128, 99), 300, (1, 128, 1, 1))])
def test_plans(device, batch, plan):
    """Images at a time, thread blocks, whether the plan is dynamic; and never a cluster."""
    resident = library("resident")
    planned = resident.empty(4, np.int32)
    resident("plan_of", RESNET_110, np.array([device[0], 1024 * device[1]], np.int32), batch, planned)
    assert tuple(planned) == plan
