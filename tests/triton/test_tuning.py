"""Tuning results: what names them, where they are kept, how others import them. On a GPU, or under the interpreter."""

import json

import pytest
import torch
from networks import small_images, small_model

import skipnet_rt as srt
from skipnet_rt.kernels import tuning
from skipnet_rt.kernels.gathered_conv import configurations
from skipnet_rt.kernels.language import INTERPRETED, unavailable_reason
from skipnet_rt.kernels.tuning import TuningError
from skipnet_rt.measure.doctor import warm

if unavailable_reason() is not None:
    pytest.skip(str(unavailable_reason()), allow_module_level=True)

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "skipnet-rt"


def layers():
    return srt.compile(small_model("bottleneck"), engine="triton", device=DEVICE).engine.layers


def test_a_network_names_every_kind_of_layer_once():
    named = layers()
    assert len(set(named)) == len({str(layer) for layer in named}) == len(named)
    assert {layer.kernel for layer in named} == {1, 3, 7}
    assert {layer.stride for layer in named} == {1, 2}


def test_results_are_kept_and_reused(cache):
    told = []
    wanted = layers()[:2]
    assert tuning.results(DEVICE) == {}
    first = tuning.tune(wanted, DEVICE, on_progress=lambda *progress: told.append(progress))
    assert told == [(wanted[0], 0, 2), (wanted[1], 1, 2)]
    assert first == tuning.results(DEVICE)
    assert all(first[str(layer)] in configurations(layer) for layer in wanted)
    again = tuning.tune(wanted, DEVICE, on_progress=lambda *progress: told.append(progress))
    assert again == first
    assert len(told) == 2, "measured again"
    assert [file.name for file in cache.iterdir()] == [tuning.path(DEVICE).name]


def test_a_measured_configuration_is_used_and_changes_nothing_else():
    images = small_images("bottleneck", 2).to(DEVICE)
    guessed = srt.compile(small_model("bottleneck"), engine="triton", device=DEVICE)
    results = {str(layer): configurations(layer)[-1] for layer in guessed.engine.layers}
    tuning._write(tuning.path(DEVICE), DEVICE, results)
    tuned = srt.compile(small_model("bottleneck"), engine="triton", device=DEVICE)
    torch.testing.assert_close(tuned.infer(images).logits, guessed.infer(images).logits, atol=1e-5, rtol=1e-5)


def test_results_can_be_exported_and_imported(tmp_path, monkeypatch):
    measured = tuning.tune(layers()[:2], DEVICE)
    tuning.export_results(tmp_path / "exported.json", DEVICE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert tuning.results(DEVICE) == {}
    assert tuning.import_results(tmp_path / "exported.json", DEVICE) == 2
    assert tuning.results(DEVICE) == measured


@pytest.mark.parametrize("name", ["source", "triton", "device", "driver"])
def test_results_of_anything_else_are_refused(tmp_path, name):
    """And name another file, so that nobody would look there."""
    file = tmp_path / "exported.json"
    tuning.export_results(file, DEVICE)
    document = json.loads(file.read_text())
    document["identity"][name] = "another"
    file.write_text(json.dumps(document))
    with pytest.raises(TuningError, match=f"was measured with {name} 'another', here it is"):
        tuning.import_results(file, DEVICE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"identity": {}, "layers": {"a": 3}}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(TuningError, match=r"other.json (holds no tuning results|was measured with)"):
        tuning.import_results(file, DEVICE)


def test_doctor_tunes_ahead(capsys):
    """Every layer of the network, and says so; float64 is none of the engine's dtypes."""
    pytest.importorskip("typer")
    from skipnet_rt.cli import app as cli

    with pytest.raises(SystemExit):
        cli.main(["doctor", "--warm", "cifar10_rnn_gate_38", "--dtype", "float64"])
    assert "it computes in" in capsys.readouterr().err
    assert tuning.results(DEVICE) == {}
    model = srt.build("cifar10_rnn_gate_38")
    told = []
    named = warm(model, torch.float16, lambda what, share: told.append((what, share)))
    runtime = srt.compile(model, engine="triton", device=DEVICE, dtype=torch.float16)
    assert set(tuning.results(DEVICE)) == {str(layer) for layer in runtime.engine.layers}
    assert named == len(runtime.engine.layers) == sum(what.startswith("measuring") for what, _ in told)
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] < 1
