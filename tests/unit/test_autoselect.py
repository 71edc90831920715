"""Which engine is the fastest: measured, kept, and obeyed by ``"auto"``."""

import pytest
import torch
from networks import small_model

import skipnet_rt as srt
from skipnet_rt.engines import autoselect
from skipnet_rt.measure.benchmark import BenchmarkError, measure_crossover

CPU = torch.device("cpu")
TIMES = {"cpu": {1: {0.5: 2.0, 1.0: 4.0}, 8: {0.5: 3.0, 1.0: 5.0}},
         "eager": {1: {0.5: 1.0, 1.0: 1.5}, 8: {0.5: 30.0, 1.0: 50.0}}}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def chosen(name="rnn", **options):
    return srt.compile(small_model(name), **options).engine.name


def save(times=TIMES):
    return autoselect.save(times, small_model("rnn").arch, CPU, torch.float32)


def test_the_fastest_comes_first():
    assert autoselect.fastest_first(TIMES) == ["cpu", "eager"]
    assert autoselect.fastest_first(TIMES, max_batch=7) == ["eager", "cpu"]
    assert autoselect.fastest_first({"cpu": {8: {1.0: 1.0}}, "eager": {8: {1.0: 2.0}}}, max_batch=1) == ["cpu", "eager"]


def test_auto_takes_what_was_the_fastest_here():
    assert chosen() == "cpu"
    save()
    assert autoselect.load(small_model("rnn").arch, CPU, torch.float32) == TIMES
    assert chosen() == "cpu"
    assert chosen(max_batch=1) == "eager"
    assert chosen(max_batch=8) == "cpu"
    assert chosen(engine="cpu", max_batch=1) == "cpu"


def test_times_hold_for_their_network_and_dtype_only():
    save({"eager": {1: {1.0: 1.0}}, "cpu": {1: {1.0: 2.0}}})
    assert chosen() == "eager"
    assert chosen("bottleneck") == "cpu"
    assert chosen(dtype=torch.bfloat16) == "cpu"


def test_an_engine_that_objects_or_is_gone_is_passed_over():
    times = {"warp": 0.1, "cuda": 0.5, "eager": 1.0, "cpu": 2.0}
    save({name: {1: {1.0: time}} for name, time in times.items()})
    assert chosen() == "eager"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"milliseconds": {"cpu": 3}}',
                                  '{"milliseconds": {"cpu": {"1": {"x": 3}}}}'])
def test_a_damaged_file_is_named(text):
    file = save()
    file.write_text(text)
    with pytest.raises(srt.EngineError, match=rf"{file.name} holds no times of engines, delete it"):
        srt.compile(small_model("rnn"))


def test_every_engine_is_timed_at_every_batch_and_share():
    progress = []
    measured = measure_crossover(small_model("rnn"), CPU, torch.float32, batches=(1, 3), fractions=(0.0, 1.0),
                                 seconds=0, on_progress=lambda what, share: progress.append((what[:7], share)))
    assert {"cpu", "eager"} <= set(measured.milliseconds)
    for batches in measured.milliseconds.values():
        assert list(batches) == [1, 3]
        assert all(time > 0 for times in batches.values() for time in times.values())
        assert all(list(times) == [0.0, 1.0] for times in batches.values())
    assert progress == [(f"batch {batch}", share / 3) for batch in (1, 3) for share in (1, 2, 3)]
    assert [result.batch for result in measured.results] == [1, 3]
    for result in measured.results:
        times = {name: batches[result.batch] for name, batches in measured.milliseconds.items()}
        assert result.winners == {share: min(times, key=lambda name: times[name][share]) for share in (0.0, 1.0)}


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(BenchmarkError, match="nothing to skip"):
        measure_crossover(small_model("dense"), CPU, torch.float32)
    with pytest.raises(BenchmarkError, match=r"no engine takes .* in torch.int8"):
        measure_crossover(small_model("rnn"), CPU, torch.int8)
