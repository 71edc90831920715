"""Evaluation against what its parts compute one by one; timing against what was called, and against dense execution."""

import copy
import json

import pytest
import torch
from networks import SMALL, relative_error, small_images, small_model
from torch.utils.data import TensorDataset

import skipnet_rt as srt
from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.measure.clock import (
    MIN_ROUNDS,
    Comparison,
    DenseNetwork,
    EngineTiming,
    Timing,
    alternate,
    compare_with_dense,
)
from skipnet_rt.measure.demo import bundled_model, held_out_digits
from skipnet_rt.measure.doctor import self_check
from skipnet_rt.measure.evaluate import evaluate

COUNT = 23


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def split() -> TensorDataset:
    """Images for the small RNNGate network, labelled so that about every third label is right."""
    images = small_images("rnn", COUNT)
    predicted = srt.compile(small_model("rnn")).infer(images).logits.argmax(1)
    return TensorDataset(images, torch.where(torch.arange(COUNT) % 3 == 0, predicted, (predicted + 1) % 7))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_is_what_the_runtime_says_of_every_image(split, batch_size):
    runtime = srt.compile(small_model("rnn"))
    whole, done = runtime.infer(split.tensors[0]), []
    found = evaluate(runtime, split, batch_size=batch_size, on_progress=done.append)
    assert done[-1] == len(found) == COUNT
    assert len(done) == -(-COUNT // batch_size)
    assert torch.equal(found.predictions, whole.logits.argmax(1))
    assert torch.equal(found.targets, split.tensors[1])
    assert torch.equal(found.executed, whole.executed)
    assert torch.equal(found.probabilities, whole.probabilities)
    assert torch.equal(found.blocks_run, whole.blocks_run)
    assert found.accuracy == pytest.approx(8 / COUNT)
    assert found.stats.computation == pytest.approx(whole.computation.mean().item())
    assert (found.engine, found.device, found.dtype) == (runtime.engine.name, "cpu", torch.float32)
    assert found.top5_accuracy is None
    assert found.agreement is None


def test_the_easiest_come_first(split):
    found = evaluate(srt.compile(small_model("rnn")), split)
    ran = found.blocks_run[found.easiest_first]
    assert len(set(ran.tolist())) > 1
    assert (ran.diff() >= 0).all()
    assert sorted(found.easiest_first) == list(range(COUNT))


def test_top5_counts_the_five_largest_logits():
    architecture = SMALL["rnn"].replace(num_classes=24)
    model, images = srt.build(architecture).eval(), small_images("rnn", 6)
    order = srt.compile(model).infer(images).logits.argsort(dim=1, descending=True)
    targets = order[torch.arange(6), torch.tensor([0, 4, 5, 1, 23, 3])]
    found = evaluate(srt.compile(model), TensorDataset(images, targets), batch_size=4)
    assert found.in_top5.tolist() == [True, True, False, True, False, True]
    assert found.accuracy == pytest.approx(1 / 6)
    assert found.top5_accuracy == pytest.approx(4 / 6)


def test_a_dense_network_runs_everything():
    images = small_images("dense", 5)
    found = evaluate(srt.compile(small_model("dense")), TensorDataset(images, torch.zeros(5, dtype=torch.long)))
    assert found.blocks_run.tolist() == [6] * 5
    assert found.stats.computation == 1
    assert found.stats.distinct_routes == 1
    assert found.to_dict()["execution_rates"] == []


def test_engines_agree_where_they_are_right(split):
    model = small_model("rnn")
    agreement = evaluate(srt.compile(model, "cpu"), split, batch_size=7,
                         reference=srt.compile(model, "eager")).agreement
    assert agreement.reference == "eager, float32"
    assert (agreement.images, agreement.decisions) == (COUNT, COUNT * 6)
    assert (agreement.flips, agreement.flip_margin, agreement.predictions_changed) == (0, 0.0, 0)
    assert agreement.logits_error < 1e-5


def changed_runtime(bias: float) -> srt.SkipNetRuntime:
    """The small network with another classifier, and gates that execute more often."""
    model = copy.deepcopy(small_model("rnn"))
    with torch.no_grad():
        model.control.proj.bias += bias
        model.fc.weight += 0.01 * torch.randn(model.fc.weight.shape, generator=torch.Generator().manual_seed(0))
    return srt.compile(model)


@pytest.mark.parametrize("wanted", [None, 8, 1])
def test_disagreement_is_counted_image_by_image(split, wanted):
    """Against a reference whose flips are known from running both over the same images by hand."""
    runtime, other = srt.compile(small_model("rnn")), changed_runtime(0.2)
    agreement = evaluate(runtime, split, batch_size=5, reference=other, reference_images=wanted).agreement
    chosen = split.tensors[0][::{None: 1, 8: 3, 1: COUNT}[wanted]]
    ours, theirs = runtime.infer(chosen), other.infer(chosen)
    flipped = ours.executed != theirs.executed
    assert agreement.images == len(chosen)
    assert agreement.decisions == flipped.numel()
    assert agreement.flips == flipped.sum()
    if wanted is None:
        assert flipped.any()
        assert not flipped.any(dim=1).all()
    assert agreement.flip_share == pytest.approx(flipped.double().mean().item())
    firsts = [(image, flips.nonzero()[0].item()) for image, flips in enumerate(flipped) if flips.any()]
    assert agreement.flip_margin == pytest.approx(
        max((abs(theirs.probabilities[image, gate].item() - 0.5) for image, gate in firsts), default=0))
    assert agreement.predictions_changed == (ours.logits.argmax(1) != theirs.logits.argmax(1)).sum()
    same = ~flipped.any(dim=1)
    expected = relative_error(ours.logits[same], theirs.logits[same]) if same.any() else None
    assert agreement.logits_error == (expected if expected is None else pytest.approx(expected))


def test_without_equal_routes_logits_are_not_compared(split):
    runtime = srt.compile(small_model("rnn"))
    skipping = ~runtime.infer(split.tensors[0]).executed.all(dim=1)
    some = TensorDataset(*(tensor[skipping] for tensor in split.tensors))
    agreement = evaluate(runtime, some, reference=changed_runtime(100.0)).agreement
    assert agreement.flips >= len(some) > 0
    assert agreement.logits_error is None


def test_json_has_percents(split):
    model = small_model("rnn")
    found = evaluate(srt.compile(model, "cpu"), split, reference=srt.compile(model, "eager"))
    document = json.loads(json.dumps(found.to_dict()))
    assert document["accuracy"] == pytest.approx(100 * 8 / COUNT)
    assert document["computation"] == pytest.approx(100 * found.stats.computation)
    assert document["execution_rates"] == pytest.approx((100 * found.stats.execution_rates).tolist())
    assert document["blocks_run"]["max"] == found.blocks_run.max()
    assert document["agreement"]["flips"] == 0


def test_data_that_do_not_fit_are_refused(split):
    runtime = srt.compile(small_model("rnn"))
    with pytest.raises(ValueError, match="no images"):
        evaluate(runtime, TensorDataset(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="label 7, the network only 7 classes"):
        evaluate(runtime, TensorDataset(split.tensors[0][:2], torch.tensor([0, 7])))


# Timing --------------------------------------------------------------------------------------------------------------

def test_contestants_take_turns():
    calls: list[str] = []
    names, told = ["a", "b", "c", "d"], []
    timings = alternate({name: lambda name=name: calls.append(name) for name in names}, seconds=1e-9, per=4,
                        on_progress=told.append)
    assert calls[:4] == names  # to warm up
    assert calls[4::2] == calls[5::2], "an untimed call right before every timed one"
    rounds = [calls[start:start + 8:2] for start in range(4, len(calls), 8)]
    assert len(rounds) == MIN_ROUNDS
    assert all(sorted(order) == names for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert all(len(timing.seconds) == MIN_ROUNDS for timing in timings.values())
    assert len(told) == MIN_ROUNDS


def test_ratios_are_formed_within_a_round():
    """The machine slows down tenfold in the second round: the ratio of the medians would say 20, the paired one 2."""
    fast, slow = Timing((1.0, 10.0, 1.0)), Timing((2.0, 20.0, 20.0))
    assert fast.speedup_over(slow) == 2
    assert slow.median / fast.median == 20
    assert fast.to_dict() == {"median": 1e3, "p20": pytest.approx(1e3), "p80": pytest.approx(6.4e3)}


def test_a_busy_machine_is_noticed():
    calm, busy = Timing((1.0, 1.1, 1.2, 1.0)), Timing((1.0, 1.1, 3.0, 3.0))
    for skipping, dense, pytorch in ((calm, calm, calm), (busy, calm, calm), (calm, busy, calm), (calm, calm, busy)):
        found = Comparison("cpu", torch.float32, 1, 1, 1, 0.5, "BN folded", pytorch,
                           (EngineTiming("eager", skipping, dense),))
        assert found.steady == (busy not in (skipping, dense, pytorch))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", SMALL)
def test_dense_execution_is_the_network_with_every_block_run(name, memory_format):
    model, images = small_model(name), small_images(name, 3)
    everything = torch.ones(model.arch.num_gates, dtype=torch.bool)
    expected = srt.compile(model, "eager").infer(images, routing=everything).logits
    given = images.clone()
    logits = DenseNetwork(model, torch.device("cpu"), torch.float32, memory_format)(given)
    assert relative_error(logits, expected) < 1e-5
    assert torch.equal(given, images)


def test_every_engine_is_timed_beside_dense_execution():
    model, images = small_model("rnn"), small_images("rnn", 6)
    found = compare_with_dense(model, images, batch=2, seconds=0.01)
    names = [name for name, engine in REGISTRY.items()
             if engine.unsupported_reason(model.arch, torch.device("cpu"), torch.float32) is None]
    assert [timed.engine for timed in found.engines] == names
    assert {"cpu", "eager"} <= set(names)
    result = srt.compile(model, "eager").infer(images)
    dense = srt.count_operations(model.arch).dense.multiply_adds
    assert found.multiply_adds_share == pytest.approx(result.multiply_adds.double().mean().item() / dense)
    document = json.loads(json.dumps(found.to_dict()))
    assert set(document["engines"]) == set(names)
    for timed in document["engines"].values():
        assert 0 < timed["skipping"]["p20"] <= timed["skipping"]["median"] <= timed["skipping"]["p80"]
    assert document["pytorch_dense"]["variant"].startswith("BN folded")
    with pytest.raises(ValueError, match="whole batches of 4, got 6"):
        compare_with_dense(model, images, batch=4)


# The bundled network -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundled() -> srt.SkipNet:
    return bundled_model()


def test_bundled_network_keeps_its_promise(bundled):
    found = evaluate(srt.compile(bundled), held_out_digits())
    assert len(found) == 360
    assert found.accuracy >= 0.975
    assert found.stats.computation <= 0.5
    assert found.stats.distinct_routes > 1


def test_self_check_passes_on_every_engine_and_finds_a_wrong_one(bundled, monkeypatch):
    checks = self_check(bundled, images=4)
    assert {check.engine for check in checks} == {name for name, availability in srt.engines().items() if availability}
    assert all(check.passed for check in checks)
    right = {check.engine for check in checks}

    class Wrong(REGISTRY["eager"]):
        name = "wrong"

        def head(self, x):
            return super().head(x) * 1.01

    monkeypatch.setitem(REGISTRY, "wrong", Wrong)
    verdicts = {check.engine: check.passed for check in self_check(bundled, images=4)}
    assert verdicts == {**dict.fromkeys(right, True), "wrong": False}


