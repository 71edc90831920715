"""Evaluation against what its parts compute one by one; the bundled network's promise."""

import copy
import json

import pytest
import torch
from networks import SMALL, relative_error, small_images, small_model
from torch.utils.data import TensorDataset

import skipnet_rt as srt
from skipnet_rt.checkpoint.bundled import bundled_model
from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.measure.demo import held_out_digits
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
    evaluation = evaluate(runtime, split, batch_size=batch_size, on_progress=done.append)
    assert done[-1] == len(evaluation) == COUNT
    assert len(done) == -(-COUNT // batch_size)
    assert torch.equal(evaluation.predictions, whole.logits.argmax(1))
    assert torch.equal(evaluation.targets, split.tensors[1])
    assert torch.equal(evaluation.executed, whole.executed)
    assert torch.equal(evaluation.probabilities, whole.probabilities)
    assert torch.equal(evaluation.blocks_run, whole.blocks_run)
    assert evaluation.accuracy == pytest.approx(8 / COUNT)
    assert evaluation.stats.computation == pytest.approx(whole.computation.mean().item())
    assert (evaluation.engine, evaluation.device, evaluation.dtype) == (runtime.engine.name, "cpu", torch.float32)
    assert evaluation.top5_accuracy is None
    assert evaluation.agreement is None


def test_the_easiest_come_first(split):
    evaluation = evaluate(srt.compile(small_model("rnn")), split)
    ran = evaluation.blocks_run[evaluation.easiest_first]
    assert len(set(ran.tolist())) > 1
    assert (ran.diff() >= 0).all()
    assert sorted(evaluation.easiest_first) == list(range(COUNT))


def test_top5_counts_the_five_largest_logits():
    architecture = SMALL["rnn"].replace(num_classes=24)
    model, images = srt.build(architecture).eval(), small_images("rnn", 6)
    order = srt.compile(model).infer(images).logits.argsort(dim=1, descending=True)
    targets = order[torch.arange(6), torch.tensor([0, 4, 5, 1, 23, 3])]
    evaluation = evaluate(srt.compile(model), TensorDataset(images, targets), batch_size=4)
    assert evaluation.in_top5.tolist() == [True, True, False, True, False, True]
    assert evaluation.accuracy == pytest.approx(1 / 6)
    assert evaluation.top5_accuracy == pytest.approx(4 / 6)


def test_a_dense_network_runs_everything():
    images = small_images("dense", 5)
    evaluation = evaluate(srt.compile(small_model("dense")), TensorDataset(images, torch.zeros(5, dtype=torch.long)))
    assert evaluation.blocks_run.tolist() == [6] * 5
    assert evaluation.stats.computation == 1
    assert evaluation.stats.distinct_routes == 1
    assert evaluation.to_dict()["execution_rates"] == []


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
    evaluation = evaluate(srt.compile(model, "cpu"), split, reference=srt.compile(model, "eager"))
    document = json.loads(json.dumps(evaluation.to_dict()))
    assert document["accuracy"] == pytest.approx(100 * 8 / COUNT)
    assert document["computation"] == pytest.approx(100 * evaluation.stats.computation)
    assert document["execution_rates"] == pytest.approx((100 * evaluation.stats.execution_rates).tolist())
    assert document["blocks_run"]["max"] == evaluation.blocks_run.max()
    assert document["agreement"]["flips"] == 0


def test_data_that_do_not_fit_are_refused(split):
    runtime = srt.compile(small_model("rnn"))
    with pytest.raises(ValueError, match="no images"):
        evaluate(runtime, TensorDataset(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="label 7, the network only 7 classes"):
        evaluate(runtime, TensorDataset(split.tensors[0][:2], torch.tensor([0, 7])))


# The bundled network -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundled() -> srt.SkipNet:
    return bundled_model()


def test_bundled_network_keeps_its_promise(bundled):
    evaluation = evaluate(srt.compile(bundled), held_out_digits())
    assert len(evaluation) == 360
    assert evaluation.accuracy >= 0.975
    assert evaluation.stats.computation <= 0.5
    assert evaluation.stats.distinct_routes > 1


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


