"""Predictor: pictures in, predictions out, bit for bit those of the runtime."""

import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import with_seeded_weights
from PIL import Image
from served import png

import skipnet_rt as srt
from skipnet_rt.data import DIGITS, digits_pictures
from skipnet_rt.model.preprocessing import IMAGENET
from skipnet_rt.serving import PictureError, Prediction, Predictor, PredictorError

ARCH = srt.SkipNetArch("cifar", "basic", (2, 2, 2), (8, 8, 16), "rnn")

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path, architecture: srt.SkipNetArch, card: srt.ModelCard) -> Path:
    model = with_seeded_weights(srt.build(architecture), seed=3, gate_bias=0.1, gate_gain=3.0)
    path = folder / "small.safetensors"
    srt.save(model, path, card=card)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint"), ARCH, srt.ModelCard(tuple("abcdefghij"), DIGITS))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Of the bundled network, whose routes differ from digit to digit."""
    return Predictor()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return digits_pictures(held_out=True)[0][:24]


def essence(prediction: Prediction) -> Prediction:
    """All that may not depend on the batch or on the clock."""
    return replace(prediction, milliseconds=0.0, batch=0, dense_milliseconds=None)


def test_predictions_are_the_runtimes(predictor, pictures):
    images = torch.stack([DIGITS(picture) for picture in pictures])
    result, predictions = predictor.runtime.infer(images), predictor.predict([png(picture) for picture in pictures])
    assert [prediction.probabilities for prediction in predictions] == [
        tuple(logits.softmax(0).tolist()) for logits in result.logits]
    assert [prediction.route for prediction in predictions] == [(True, *row) for row in result.executed.tolist()]
    assert [prediction.computation for prediction in predictions] == result.computation.tolist()
    assert [prediction.multiply_adds for prediction in predictions] == result.multiply_adds.tolist()
    assert [prediction.blocks_run for prediction in predictions] == result.blocks_run.tolist()
    assert {prediction.batch for prediction in predictions} == {24}
    assert len({prediction.milliseconds for prediction in predictions}) == 1
    assert predictions[0].milliseconds > 0
    assert len({prediction.route for prediction in predictions}) > 3, "several routes"


def test_a_prediction_is_bitwise_the_same_alone_and_in_any_batch(predictor, pictures):
    images = [predictor.image(picture) for picture in pictures]
    alone = [essence(predictor.infer([image])[0]) for image in images]
    for order in (range(24), reversed(range(24)), [7] * 5, range(3, 20)):
        places = list(order)
        together = predictor.infer([images[place] for place in places])
        assert [essence(prediction) for prediction in together] == [alone[place] for place in places]


def test_a_network_without_gates_runs_everything(tmp_path, pictures):
    predictor = Predictor(saved(tmp_path, ARCH.replace(gate="none"), srt.ModelCard(None, DIGITS)))
    (prediction,) = predictor.predict(pictures[:1])
    assert prediction.route == (True,) * 6
    assert prediction.computation == 1
    assert prediction.multiply_adds == srt.count_operations(predictor.arch).dense.multiply_adds
    assert predictor.labels == tuple("0123456789")


def test_the_same_picture_in_any_form_makes_the_same_image(predictor, pictures):
    picture = pictures[0].resize((40, 30))
    image = predictor.image(picture)
    assert torch.equal(image, DIGITS(picture))
    assert torch.equal(image, predictor.image(png(picture)))
    assert torch.equal(image, predictor.image(np.array(picture)))
    assert torch.equal(image, predictor.image(np.array(picture.convert("RGB"))))
    assert torch.equal(image, predictor.image(np.array(picture.convert("RGBA"))))
    assert torch.equal(image, predictor.image(png(picture), max_pixels=1200))


def test_densely_too(predictor, pictures, monkeypatch):
    images, forced = [predictor.image(picture) for picture in pictures[:3]], []
    infer = predictor.runtime.infer

    def noted(images, routing=None):
        forced.append(None if routing is None else routing.tolist())
        return infer(images, routing)

    monkeypatch.setattr(predictor.runtime, "infer", noted)
    predictions = predictor.infer(images, dense=True)
    assert forced == [None, [True] * 17] * 9
    assert [essence(prediction) for prediction in predictions] == [
        essence(prediction) for prediction in predictor.infer(images)]
    assert all(prediction.dense_milliseconds > 0 and prediction.batch == 1 for prediction in predictions)
    assert predictor.infer(images)[0].dense_milliseconds is None


def test_nothing_in_nothing_out(predictor):
    assert predictor.infer([]) == predictor.predict([]) == []


def test_best_classes(checkpoint):
    predictor = Predictor(checkpoint)
    prediction = Prediction((0.1, 0.4, 0.0, 0.4, *[0.0] * 5, 0.1), (True,) * 6, 1.0, 1, 1.0, 1)
    assert predictor.classes(prediction, 3) == [{"class": 1, "label": "b", "probability": 0.4},
                                                {"class": 3, "label": "d", "probability": 0.4},
                                                {"class": 0, "label": "a", "probability": 0.1}]
    assert [entry["class"] for entry in predictor.classes(prediction)] == [1, 3, 0, 9, 2, 4, 5, 6, 7, 8]


def test_it_pickles_as_its_arguments(checkpoint, pictures, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    predictor = Predictor(checkpoint.name, "eager", torch.float64, preprocessing=replace(DIGITS, std=(0.4,) * 3))
    pickled = pickle.dumps(predictor)
    assert len(pickled) < 1000
    monkeypatch.chdir("/")
    copy = pickle.loads(pickled)
    assert copy.describe() == predictor.describe()
    assert (copy.runtime.engine.name, copy.runtime.dtype) == ("eager", torch.float64)
    assert [essence(prediction) for prediction in copy.predict(pictures[:4])] == [
        essence(prediction) for prediction in predictor.predict(pictures[:4])]


def test_threads_are_the_processs(checkpoint, torch_threads):
    assert Predictor(checkpoint, threads=2).describe()["threads"] == torch.get_num_threads() == 2


def test_the_description_says_nothing_of_files(checkpoint):
    description = Predictor(checkpoint).describe()
    assert description["groups"] == [2, 2, 2]
    assert (description["blocks"], description["engine"], description["dtype"]) == (6, "cpu", "float32")
    assert str(checkpoint.parent) not in str(description)


# What it does not take -----------------------------------------------------------------------------------------------

def test_a_checkpoint_that_takes_no_pictures(tmp_path):
    path = saved(tmp_path, ARCH, srt.ModelCard())
    with pytest.raises(PredictorError, match="how pictures become inputs; choose with --preprocessing digits"):
        Predictor(path)
    with pytest.raises(PredictorError, match=r"makes images of 3x224x224, but .* takes 3x32x32"):
        Predictor(path, preprocessing=IMAGENET)
    with pytest.raises(PredictorError, match=r"makes images of 3x32x32, but .* takes 1x32x32"):
        Predictor(saved(tmp_path, ARCH.replace(in_channels=1), srt.ModelCard()), preprocessing=DIGITS)


def huge_png(width: int, height: int) -> bytes:
    """Says that it has so many pixels, and has none."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def test_what_cannot_be_read(predictor, pictures, checkpoint):
    whole = png(pictures[0].resize((50, 50)))
    for data in (b"", b"no picture", whole[:-30], whole[:40], checkpoint.read_bytes()[:4000], huge_png(100, 100)):
        with pytest.raises(PictureError, match="not a picture that can be read") as refused:
            predictor.image(data)
        assert not refused.value.too_large
        assert "object at 0x" not in str(refused.value)
    for array in (np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 0), np.uint8)):
        with pytest.raises(PictureError, match="must be uint8"):
            predictor.image(array)


def test_what_is_too_large_is_not_unpacked(predictor, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was unpacked"))
    for data in (huge_png(5000, 5001), huge_png(2**31 - 1, 2**31 - 1)):
        with pytest.raises(PictureError) as refused:
            predictor.image(data, max_pixels=25_000_000)
        assert refused.value.too_large
    with pytest.raises(PictureError, match="up to 25000000 pixels, this one has 5000x5001"):
        predictor.image(huge_png(5000, 5001), max_pixels=25_000_000)


def test_a_line_that_would_be_enlarged_without_end(tmp_path):
    """1x100,000 pixels are few, but 256x25,600,000 once the shorter side has 256 of them."""
    shape = ARCH.replace(image_size=(224, 224))
    predictor = Predictor(saved(tmp_path, shape, srt.ModelCard(None, IMAGENET)))
    line = Image.new("L", (1, 100_000))
    with pytest.raises(PictureError, match="once its shorter side has 256") as refused:
        predictor.image(png(line), max_pixels=25_000_000)
    assert refused.value.too_large
    assert predictor.image(png(Image.new("L", (1, 300))), max_pixels=25_000_000).shape == (3, 224, 224)


def test_with_a_limit_only_plain_formats_are_read(predictor, pictures, tmp_path):
    pictures[0].convert("RGB").save(tmp_path / "picture.eps")
    pictures[0].save(tmp_path / "picture.ico")
    for path in (tmp_path / "picture.eps", tmp_path / "picture.ico"):
        with pytest.raises(PictureError, match="not a picture that can be read"):
            predictor.image(path.read_bytes(), max_pixels=10_000)
    assert predictor.image((tmp_path / "picture.ico").read_bytes()).shape == (3, 32, 32), "one's own files may be any"
