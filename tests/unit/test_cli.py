"""The command line, from arguments to exit status, with real files and real (small) networks."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from networks import with_seeded_weights
from PIL import Image
from torch.utils.data import Subset

import skipnet_rt as srt
from skipnet_rt import _C, data
from skipnet_rt.checkpoint import bundled
from skipnet_rt.cli import app as cli
from skipnet_rt.cli import train as train_command
from skipnet_rt.cli.demo import draw
from skipnet_rt.data import DIGITS, digits_pictures
from skipnet_rt.engines.registry import REGISTRY
from skipnet_rt.measure import clock, demo, doctor
from skipnet_rt.measure.evaluate import evaluate
from skipnet_rt.training import RECIPES, TrainConfig

ARCH = srt.SkipNetArch("cifar", "basic", (2, 2, 2), (8, 8, 16), "rnn")
COMMANDS = ("demo", "predict", "serve", "evaluate", "benchmark", "train", "inspect", "convert", "doctor")


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """Standard output, which must be one JSON document and nothing else."""
        assert self.status == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Runs ``skipnet-rt`` with arguments, in this process."""
    def command(*arguments) -> Ran:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return Ran(stopped.value.code or 0, *capsys.readouterr())
    return command


@pytest.fixture(scope="module")
def model() -> srt.SkipNet:
    """A small network for digits, untrained but with gates that decide differently from image to image."""
    made = with_seeded_weights(srt.build(ARCH), seed=3, gate_bias=0.1, gate_gain=3.0)
    made.card = srt.ModelCard(tuple("0123456789"), DIGITS, {"accuracy": 10.0})
    return made


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "small.safetensors"
    srt.save(model, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """The first held-out digits as files of several kinds, sizes and modes."""
    folder, (digits, _) = tmp_path_factory.mktemp("pictures"), digits_pictures(held_out=True)
    digits[0].save(folder / "grey.png")
    digits[1].convert("RGBA").resize((50, 70)).save(folder / "large.png")
    digits[2].convert("P").save(folder / "palette.gif")
    return [folder / "grey.png", folder / "large.png", folder / "palette.gif"]


@pytest.fixture
def few_digits(monkeypatch):
    """A smaller data set under the name of the digits: 24 pictures to train on and 10 held out."""
    whole = data.load_dataset("digits")
    few = replace(whole, train=Subset(whole.train, range(24)), test=Subset(whole.test, range(10)))
    monkeypatch.setitem(data.DATASETS, "digits", lambda root: few)


# Usage, mistakes, exit statuses --------------------------------------------------------------------------------------

def test_version_and_help(run):
    assert run("--version").out == f"skipnet-rt {srt.__version__}\n"
    helped = run("--help")
    assert helped.status == 0
    assert all(name in helped.out for name in COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help").status == 0


def test_installed_command_is_ours():
    """The console script itself, in a process of its own."""
    script = Path(sys.executable).with_name("skipnet-rt")
    ran = subprocess.run([script, "inspect", "svhn_resnet_38", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["name"] == "svhn_resnet_38"
    assert ran.stderr == ""


@pytest.mark.parametrize("arguments", [
    ["unknown"], ["predict"], ["inspect"], ["convert", "one"], ["evaluate", "--unknown"],
    ["evaluate", "--dtype", "int8"], ["evaluate", "--batch-size", "0"], ["predict", "--top", "0", "x.png"],
    ["train", "--stages", "all"], ["train", "--seed", "x"], ["predict", "--preprocessing", "mnist", "x.png"],
    ["benchmark", "--fraction", "1.5"], ["benchmark", "--batch", "0"], ["benchmark", "cifar10_rnn_gate_38"],
    ["predict", "--ray", "x.png"], ["predict", "--output", "x.parquet", "x.png"]])
def test_a_wrong_command_line_exits_with_2(run, arguments):
    ran = run(*arguments)
    assert ran.status == 2
    assert ran.out == ""
    assert "Usage" in ran.err


@pytest.mark.parametrize(("arguments", "why"), [
    (["inspect", "nowhere.pth"], "nowhere.pth: there is no such file"),
    (["inspect", "cifar10_rnn_gate_39"], "no published architecture is called 'cifar10_rnn_gate_39'"),
    (["inspect", __file__], "not a checkpoint"),
    (["inspect", "{folder}"], "Is a directory"),
    (["convert", "{checkpoint}", "{folder}/small.onnx"], "'.onnx' is unknown"),
    (["convert", "{checkpoint}", "{folder}/nowhere/small.pth"], "No such file or directory"),
    (["predict", "nowhere.png"], "nowhere.png: there is no such file"),
    (["predict", "{checkpoint}"], "not a picture that can be read"),
    (["predict", "{cut}"], "not a picture that can be read"),
    (["predict", "--model", "nowhere.pth", "{picture}"], "nowhere.pth"),
    (["predict", "--model", "{bare}", "{picture}"], "choose with --preprocessing digits|cifar|svhn|imagenet"),
    (["predict", "--model", "{checkpoint}", "--preprocessing", "imagenet", "{picture}"], "images of 3x224x224"),
    (["evaluate", "--model", "{checkpoint}", "--data", "mnist"], "no data set is called 'mnist'; known: digits"),
    (["evaluate", "--model", "{checkpoint}", "--engine", "tpu"], "no engine is called 'tpu'; known: auto, "),
    (["evaluate", "--model", "{checkpoint}", "--device", "quark"], "device 'quark' cannot be used here"),
    (["evaluate", "--model", "{checkpoint}", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["evaluate", "--model", "{checkpoint}", "--engine", "cpu", "--dtype", "float64"], "not in torch.float64"),
    (["evaluate", "--model", "{other}"], "digits has 10 classes, but"),
    (["evaluate", "--model", "{checkpoint}", "--data", "cifar10"], "pip install 'skipnet-rt[train]'"),
    (["evaluate", "--model", "{checkpoint}", "--plots", "{checkpoint}"], "File exists"),
    (["evaluate", "--model", "{checkpoint}", "--compare", "nowhere.pth"], "nowhere.pth"),
    (["train", "--data", "mnist"], "data must be one of digits"),
    (["train", "--arch", "skipnet", "--output", "{folder}/run"], "no published architecture is called 'skipnet'"),
    (["train", "--supervised-lr", "-1"], "supervised_lr must be from"),
    (["train", "--recipe", "finetune"], "arch 'init' needs a trained network to begin with: name it in init (--init)"),
    (["train", "--recipe", "finetune", "--init", "{picture}", "--output", "{folder}/run"], "not a checkpoint"),
    (["train", "--device", "quark"], "device 'quark' cannot be used here"),
    (["train", "--output", "{checkpoint}/run"], "Not a directory"),
])
def test_a_mistake_gets_one_line_and_exits_with_1(run, arguments, why, checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    bare, other, cut = tmp_path / "bare.safetensors", tmp_path / "other.safetensors", tmp_path / "cut.png"
    srt.save(srt.load(checkpoint), bare, card=srt.ModelCard())
    srt.save(srt.build(ARCH.replace(num_classes=4)), other)
    cut.write_bytes(pictures[1].read_bytes()[:-60])
    places = {"checkpoint": checkpoint, "picture": pictures[0], "bare": bare, "other": other, "cut": cut,
              "folder": tmp_path}
    ran = run(*(argument.format(**places) for argument in arguments))
    assert ran.status == 1
    assert ran.out == ""
    assert why in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1


def test_figures_need_matplotlib(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    ran = run("evaluate", "--model", checkpoint, "--plots", tmp_path / "plots")
    assert (ran.status, ran.err) == (
        1, "error: --plots needs matplotlib; install it with: pip install 'skipnet-rt[plots]'\n")
    assert not (tmp_path / "plots").exists()


def test_warnings_are_one_line(run, tmp_path):
    model, path = with_seeded_weights(srt.build(ARCH), 1, 0.0, 1.0), tmp_path / "wrong-name.pth"
    torch.save({"arch": "cifar10_rnn_gate_110", "state_dict": model.state_dict()}, path)
    ran = run("inspect", path, "--json")
    assert ran.err.startswith("warning: ")
    assert ran.err.count("\n") == 1
    assert ran.json["name"] is None


# predict -------------------------------------------------------------------------------------------------------------

def test_predictions_are_the_network_s(run, model, checkpoint, pictures):
    document = run("predict", "--model", checkpoint, "--top", 2, "--json", *pictures).json
    images = torch.stack([DIGITS(Image.open(path)) for path in pictures])
    result = srt.compile(model).infer(images)
    assert document["blocks"] == 6
    assert [prediction["image"] for prediction in document["predictions"]] == [str(path) for path in pictures]
    for prediction, logits, ran in zip(document["predictions"], result.logits, result.blocks_run, strict=True):
        values, numbers = logits.softmax(0).topk(2)
        assert [entry["class"] for entry in prediction["classes"]] == numbers.tolist()
        assert [entry["label"] for entry in prediction["classes"]] == [str(number) for number in numbers.tolist()]
        assert [entry["probability"] for entry in prediction["classes"]] == pytest.approx(values.tolist())
        assert prediction["blocks_run"] == ran
        assert prediction["computation"] == pytest.approx(100 * ran.item() / 6)


def test_a_batch_job_without_ray_says_what_is_missing(run, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "skipnet_rt.serving.batch_job", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ran = run("predict", "--ray", tmp_path, "--output", tmp_path / "out.parquet")
    assert ran.status == 1
    assert "pip install 'skipnet-rt[ray]'" in ran.err


def test_prediction_table(run, checkpoint, pictures):
    ran = run("predict", "--model", checkpoint, pictures[0])
    assert ran.status == 0
    assert "of 6" in ran.out
    assert ran.err == ""


def test_preprocessing_can_be_chosen_and_counts(run, checkpoint, pictures):
    documents = [run("predict", "--model", checkpoint, "--json", pictures[0], "--preprocessing", name).json
                 for name in ("digits", "cifar")]
    assert documents[0] == run("predict", "--model", checkpoint, "--json", pictures[0]).json
    assert documents[0]["predictions"][0]["classes"] != documents[1]["predictions"][0]["classes"]


def test_one_bad_picture_spoils_the_whole_command(run, checkpoint, pictures):
    ran = run("predict", "--model", checkpoint, "--json", *pictures, "nowhere.png")
    assert (ran.status, ran.out) == (1, "")


# evaluate ------------------------------------------------------------------------------------------------------------

def test_evaluation_is_the_library_s(run, model, checkpoint, few_digits):
    document = run("evaluate", "--model", checkpoint, "--json", "--batch-size", 4).json
    expected = evaluate(srt.compile(model), data.load_dataset("digits").test).to_dict()
    agreement = document["agreement"]
    assert document == {"model": str(checkpoint), "data": "digits", **expected, "agreement": agreement,
                        "compared": [], "plots": []}
    assert agreement["reference"] == "eager, float32"
    assert (agreement["images"], agreement["flips"]) == (10, 0)


@pytest.mark.parametrize(("options", "engine", "dtype", "compared"), [
    ([], "cpu", "float32", 10),
    (["--dtype", "bfloat16", "--engine", "eager"], "eager", "bfloat16", 10),
    (["--engine", "eager"], "eager", "float32", None),
    (["--agreement", "0"], "cpu", "float32", None),
    (["--agreement", "5"], "cpu", "float32", 5),
])
def test_agreement_with_the_reference_engine(run, checkpoint, few_digits, options, engine, dtype, compared):
    document = run("evaluate", "--model", checkpoint, "--json", *options).json
    assert (document["engine"], document["dtype"]) == (engine, dtype)
    assert (document["agreement"] and document["agreement"]["images"]) == compared


def test_figures_and_comparison(run, checkpoint, few_digits, tmp_path):
    pytest.importorskip("matplotlib")
    dense = tmp_path / "dense.safetensors"
    srt.save(srt.build(ARCH.replace(gate="none")), dense)
    document = run("evaluate", "--model", checkpoint, "--compare", dense, "--plots", tmp_path / "new" / "plots",
                   "--json").json
    assert [Path(path).name for path in document["plots"]] == [
        "execution_rates.png", "skipped_by_class.png", "easiest_and_hardest.png", "routes.png",
        "accuracy_against_computation.png"]
    for path in document["plots"]:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
    (compared,) = document["compared"]
    assert compared["model"] == str(dense)
    assert compared["computation"] == 100
    assert compared["agreement"] is None


def test_evaluation_table(run, checkpoint, few_digits, tmp_path):
    pytest.importorskip("matplotlib")
    ran = run("evaluate", "--model", checkpoint, "--plots", tmp_path)
    assert ran.status == 0
    for expected in ("small (", "Accuracy", "Computation", "Multiply-adds", "Decision flips", "16x8x8",
                     "skipped_by_class.png"):
        assert expected in ran.out
    assert ran.err == ""


def test_other_classes_and_preprocessing_are_warned_of(run, model, few_digits, tmp_path):
    path = tmp_path / "letters.safetensors"
    srt.save(model, path, card=srt.ModelCard(tuple("abcdefghij"), replace(DIGITS, mean=(0.5,) * 3)))
    ran = run("evaluate", "--model", path, "--json")
    assert ran.status == 0
    assert "warning: the checkpoint's classes are not those of digits" in ran.err
    assert "warning: the checkpoint was trained with another preprocessing" in ran.err


# train ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def parsed(monkeypatch):
    """The configuration that ``skipnet-rt train`` would train with."""
    asked: list[TrainConfig] = []

    def instead_of_training(config, on_progress, on_epoch):
        asked.append(config)
        raise KeyboardInterrupt

    def parse(*arguments: str) -> TrainConfig:
        with pytest.raises(SystemExit):
            cli.main(["train", *arguments])
        return asked.pop()

    monkeypatch.setattr(train_command, "train", instead_of_training)
    return parse


def test_every_field_is_an_option_with_help():
    options = {option.name: option for option in typer.main.get_command(cli.app).commands["train"].params}
    assert set(options) - {"as_json", "help", "recipe"} == {field.name for field in fields(TrainConfig)}
    for field in fields(TrainConfig):
        assert options[field.name].opts == [f"--{field.name.replace('_', '-')}"]
        assert len(options[field.name].help) > 5
        assert "`" not in options[field.name].help


def test_without_options_the_recipe_counts(parsed):
    for name in RECIPES:
        assert parsed("--data", name) == TrainConfig.for_data(name)
    assert parsed() == TrainConfig()
    finetuning = TrainConfig.for_data("digits", recipe="finetune", init="x.pth", target_computation=60.0)
    assert parsed("--recipe", "finetune", "--init", "x.pth", "--target-computation", "60") == finetuning
    nothing = parsed("--data", "cifar10", "--weight-decay", "0", "--warmup-steps", "0")
    assert nothing == TrainConfig.for_data("cifar10", weight_decay=0.0, warmup_steps=0)


def changed(name: str, value: object) -> object:
    """Another value that a field of :class:`TrainConfig` may have."""
    hint = get_type_hints(TrainConfig)[name]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if name in ("arch", "device"):
        return {"arch": "cifar10_feedforward_74", "device": "meta"}[name]
    if float in get_args(hint):
        return 50.0
    if hint is bool:
        return not value
    return value + 1 if type(value) is int else value / 2 + 0.25 if type(value) is float else Path("a folder/a file")


def test_the_command_in_a_card_repeats_the_training(parsed):
    """Every option is read back as it was written, so that none can be misnamed, mistyped or lost."""
    recipe = TrainConfig.for_data("cifar10")
    names = [field.name for field in fields(TrainConfig) if field.name not in ("data", "resume")]
    config = replace(recipe, **{name: changed(name, getattr(recipe, name)) for name in names})
    assert all(getattr(config, name) != getattr(recipe, name) for name in names)
    program, command, *arguments = shlex.split(config.command())
    assert (program, command) == ("skipnet-rt", "train")
    assert parsed(*arguments) == config
    assert parsed(*arguments, "--resume") == replace(config, resume=True)


def test_training_writes_a_model_and_goes_on_with_resume(run, few_digits, tmp_path):
    command = ("train", "--arch", "cifar10_rnn_gate_38", "--stages", "supervised", "--supervised-epochs", 1,
               "--batch-size", 12, "--output", tmp_path, "--json")
    ran = run(*command)
    document = ran.json
    assert document["model"] == str(tmp_path / "model.safetensors")
    assert document["epochs"] == 1
    assert "epoch 1/1" in ran.err
    assert srt.load(document["model"]).card.training["accuracy"] == document["accuracy"]
    refused = run(*command)
    assert refused.status == 1
    assert "--resume" in refused.err
    assert run(*command, "--resume").json["accuracy"] == document["accuracy"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_training_with_one_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "skipnet_rt", "train", "--output", tmp_path / "run"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 60
    while not (tmp_path / "run").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # Python dies of the signal, which shells show as 130 too, if it came while a string was executed (python/cpython
    # keeps a flag of that); otherwise the status is ours.
    assert process.returncode in (130, -signal.SIGINT)
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in err


# inspect, convert ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["cifar10_rnn_gate_110", "cifar100_feedforward_38", "svhn_resnet_74",
                                  "imagenet_rnn_gate_50"])
def test_inspection_of_published_names(run, name):
    document = run("inspect", name, "--json").json
    model, counts = srt.build(name), srt.count_operations(srt.arch(name))
    assert srt.SkipNetArch.from_dict(document["architecture"]) == srt.arch(name)
    assert document["format"] is None
    assert document["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert document["parameters"]["gates"] == sum(
        parameter.numel() for key, parameter in model.named_parameters() if "_gate" in key or "control" in key)
    assert document["multiply_adds"]["dense"] == counts.dense.multiply_adds
    assert document["multiply_adds"]["dense"] == document["multiply_adds"]["stem"] + sum(
        block["multiply_adds"] for block in document["blocks"])
    assert document["multiply_adds"]["gates"] == sum(document["gates"])
    assert len(document["gates"]) == srt.arch(name).num_gates
    assert name in run("inspect", name).out


def test_conversion_and_inspection_of_files(run, model, checkpoint, tmp_path):
    published, back = tmp_path / "small.pth.tar", tmp_path / "back.safetensors"
    assert run("convert", checkpoint, published).status == 0
    assert run("convert", published, back).status == 0
    for name, tensor in srt.load(back).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    documents = [run("inspect", path, "--json").json for path in (checkpoint, published, back)]
    assert [document["format"] for document in documents] == ["safetensors", "torch.save (before zip)", "safetensors"]
    torch.save({"state_dict": model.state_dict()}, tmp_path / "zip.pth")
    assert run("inspect", tmp_path / "zip.pth", "--json").json["format"] == "torch.save (zip)"
    assert documents[0]["card"] == documents[2]["card"] == json.loads(json.dumps(model.card.to_dict()))
    shown = run("inspect", checkpoint).out
    for expected in ("RNNGate", "0, 1, 2, 3", "Training: accuracy  10.0", "16x8x8"):
        assert expected in shown


# demo, doctor --------------------------------------------------------------------------------------------------------

def test_demo_shows_accuracy_routes_and_times(run, monkeypatch):
    monkeypatch.setattr(demo, "BATCHES", {1: 2, 3: 3})
    monkeypatch.setattr(demo, "_SECONDS", {1: 0.01, 3: 0.01})
    monkeypatch.setattr(clock, "_PAUSE", 0.0)  # what is timed does not matter here
    document = run("demo", "--json").json
    assert document["evaluation"]["images"] == 360
    assert document["easiest"]["blocks_run"] == document["evaluation"]["blocks_run"]["min"]
    assert document["hardest"]["blocks_run"] == document["evaluation"]["blocks_run"]["max"]
    assert [timing["batch"] for timing in document["timings"] if timing["device"] == "cpu"] == [1, 3]
    assert {"cpu", "eager"} <= set(document["timings"][0]["engines"]) <= set(REGISTRY)
    assert [timing["images"] for timing in document["timings"] if timing["device"] == "cpu"] == [2, 3]
    for timing in document["timings"]:
        assert timing["rounds"] >= clock.MIN_ROUNDS
        assert timing["pytorch_dense"]["variant"].startswith("BN folded, ")
        for times in timing["engines"].values():
            assert 0 < times["skipping"]["p20"] <= times["skipping"]["median"] <= times["skipping"]["p80"]
    assert set(document["engines"]) == set(srt.engines())
    shown = run("demo").out
    assert "Draw digits yourself: skipnet-rt serve, then open http://127.0.0.1:8000 " in shown.splitlines()[-1]
    for expected in ("Accuracy", "Computation", "Multiply-adds", "Distinct routes", "Easiest: digit", "Hardest: digit",
                     "PyTorch dense", "█"):
        assert expected in shown
    for name, availability in srt.engines().items():
        assert (f"Engine {name}: not available" in shown) == (not availability)


def test_digits_are_drawn_as_they_are():
    picture = Image.new("L", (8, 8))
    picture.paste(255, (0, 0, 4, 8))
    assert draw(picture).split("\n") == ["████████        "] * 8
    picture = Image.new("L", (16, 16))
    picture.paste(255, (0, 1, 16, 15))
    assert draw(picture).split("\n") == ["▄" * 16, *["█" * 16] * 6, "▀" * 16]


def available() -> set[str]:
    return {name for name, availability in srt.engines().items() if availability}


def test_doctor_is_content_with_a_sound_installation(run):
    document = run("doctor", "--json").json
    assert document["ok"] is True
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["engines"]) == set(srt.engines())
    assert {check["engine"] for check in document["self_checks"]} == available()
    shown = run("doctor")
    assert shown.status == 0
    assert "Check cpu on cpu" in shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_all_that_gpus_would_take(run, monkeypatch):
    monkeypatch.setattr(_C, "cuda_archs", "")
    monkeypatch.setattr(doctor, "find_library", lambda name: None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    missing = run("doctor", "--json").json["missing_for_gpus"]
    assert [line.split(" (")[0].split(":")[0] for line in missing] == [
        "a PyTorch with CUDA", "an NVIDIA GPU and its driver", "for engine cuda, nvcc, and skipnet-rt installed anew",
        "for engine triton, Triton"]
    shown = run("doctor").out
    assert "Missing for GPUs" in shown
    assert "pip install 'skipnet-rt[gpu]'" in shown


def test_doctor_finds_a_missing_network(run, monkeypatch):
    monkeypatch.setattr(bundled, "BUNDLED", "nowhere.safetensors")
    ran = run("doctor", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["bundled_model"]["present"] is False
    assert "nowhere.safetensors" in run("doctor").out


def test_doctor_finds_an_engine_that_decides_nonsense(run, monkeypatch):
    class Wrong(REGISTRY["eager"]):
        name = "wrong"

        def run(self, images, routing, num_gates):
            result = super().run(images, routing, num_gates)
            result.decisions.executed[0, 0] ^= True  # the logits stay right
            return result

    monkeypatch.setitem(REGISTRY, "wrong", Wrong)
    ran = run("doctor", "--json")
    assert ran.status == 1
    assert {check["engine"]: check["passed"] for check in json.loads(ran.out)["self_checks"]} == {
        **dict.fromkeys(available(), True), "wrong": False}
    assert "FAILED" in run("doctor").out
