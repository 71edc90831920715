"""Predictor: pictures in, classes with probabilities and routes out."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipnet_rt.checkpoint import load
from skipnet_rt.checkpoint.bundled import bundled_model
from skipnet_rt.data import PREPROCESSINGS
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.preprocessing import Preprocessing
from skipnet_rt.model.routing import InferenceResult, computation_of
from skipnet_rt.runtime import compile
from skipnet_rt.serving.pictures import PictureError, decoded, from_array

_TURNS = 3  # of an image that is computed both ways


class PredictorError(ValueError):
    """A checkpoint that pictures cannot be given to; the message is one line."""


@dataclass(frozen=True)
class Prediction:
    """What one image came to. All but ``milliseconds`` and ``batch`` is bitwise the same alone and in any batch.

    Attributes:
        probabilities: of all classes in the order of the logits: their softmax in float32.
        route: whether each residual block ran; the first always does.
        computation: the published computation percentage as a fraction in (0, 1].
        multiply_adds: of convolutions and gates.
        milliseconds: that the engine's call took in which the image was computed, together with others or not.
        batch: images in that call.
        dense_milliseconds: that the same engine took with every block forced to run; where it was asked for.
    """

    probabilities: tuple[float, ...]
    route: tuple[bool, ...]
    computation: float
    multiply_adds: int
    milliseconds: float
    batch: int
    dense_milliseconds: float | None = None

    @property
    def blocks_run(self) -> int:
        """Residual blocks that ran, the first one included."""
        return sum(self.route)

    def best(self, top: int) -> list[int]:
        """The numbers of the most probable classes, best first; the lower number first where two are equal."""
        return heapq.nlargest(top, range(len(self.probabilities)), key=self.probabilities.__getitem__)


class Predictor:
    """A compiled network with its preprocessing and its labels. Threads may share it.

    It pickles as its arguments and loads again where it is unpickled, so that processes can be sent one.

    Args:
        path: a checkpoint, published or ours; None for the bundled network.
        engine, dtype, device: as for :func:`skipnet_rt.compile`.
        threads: of PyTorch and of the engines, in the whole process; None leaves them as they are.
        preprocessing: instead of the checkpoint's own.

    Attributes:
        runtime: the compiled network.
        arch: its architecture.
        labels: names of the classes in the order of the logits; their numbers where the checkpoint has no names.
        preprocessing: how pictures become images.

    Raises:
        PredictorError: the checkpoint does not say how pictures become images, or it takes others than are made.
        skipnet_rt.CheckpointError, skipnet_rt.EngineError: it cannot be loaded, or not be compiled so.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, engine: str = "auto",
                 dtype: torch.dtype | None = None, threads: int | None = None, *, device: str = "cpu",
                 preprocessing: Preprocessing | None = None) -> None:
        path = None if path is None else os.path.abspath(path)  # it may be unpickled in another folder
        self._arguments = (path, engine, dtype, threads, device, preprocessing)
        if threads is not None:
            torch.set_num_threads(threads)
        model = bundled_model() if path is None else load(path)
        self.preprocessing = _fitting(preprocessing or model.card.preprocessing, model.arch)
        self.runtime = compile(model, engine, device, dtype)
        self.arch = model.arch
        self._least, self._costs = _costs(self.arch)
        self.labels = model.card.labels or tuple(map(str, range(model.arch.num_classes)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, self._arguments

    def image(self, picture: bytes | np.ndarray | Image.Image, max_pixels: int | None = None) -> Tensor:
        """A picture as the network takes it.

        Args:
            picture: a file's bytes; an array, uint8 ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``; or a picture.
            max_pixels: refuse larger ones, and of files' formats all but the usual; see
                :func:`skipnet_rt.serving.pictures.decoded`.

        Returns:
            float32 ``[3, H, W]`` on the CPU, normalised.

        Raises:
            PictureError: it cannot be read, or it is too large.
        """
        if isinstance(picture, np.ndarray):
            picture = from_array(picture)
        elif not isinstance(picture, Image.Image):
            picture = decoded(picture, max_pixels)
        if max_pixels is not None:
            self._check_enlarged(picture, max_pixels)
        return self.preprocessing(picture)

    def _check_enlarged(self, picture: Image.Image, max_pixels: int) -> None:
        """A line of pixels is a small picture, but an endless one once its shorter side has been enlarged."""
        shorter, longer = sorted(picture.size)
        resized = self.preprocessing.resize_shorter
        if resized and resized * max(resized, longer * resized // shorter) > max_pixels:
            raise PictureError(f"a picture of {picture.width}x{picture.height} pixels has over {max_pixels} once its "
                               f"shorter side has {resized}", too_large=True)

    def infer(self, images: Sequence[Tensor], dense: bool = False) -> list[Prediction]:
        """The predictions of some images, in one call of the engine.

        Args:
            images: each float32 ``[3, H, W]``, as :meth:`image` makes them.
            dense: compute each image alone, in turns as the gates decide and with every block forced to run, three
                times each; ``milliseconds`` and ``dense_milliseconds`` are the fastest of each.
        """
        if dense:
            return [self._both_ways(image) for image in images]
        if not images:
            return []
        result, milliseconds = self._timed(torch.stack(list(images)))
        return self._predictions(result, milliseconds)

    def _timed(self, images: Tensor, routing: Tensor | None = None) -> tuple[InferenceResult, float]:
        images = images.to(self.runtime.device)
        begun = time.perf_counter()
        result = self.runtime.infer(images, routing)
        result = InferenceResult(result.logits.cpu(), result.executed.cpu(), result.probabilities, result.arch)
        return result, 1e3 * (time.perf_counter() - begun)

    def _both_ways(self, image: Tensor) -> Prediction:
        images, times, dense_times = image.unsqueeze(0), [], []
        every = torch.ones(self.arch.num_gates, dtype=torch.bool, device=self.runtime.device)
        for _ in range(_TURNS):
            result, milliseconds = self._timed(images)
            times.append(milliseconds)
            dense_times.append(self._timed(images, every)[1])
        return self._predictions(result, min(times), min(dense_times))[0]

    def _predictions(self, result: InferenceResult, milliseconds: float,
                     dense_milliseconds: float | None = None) -> list[Prediction]:
        # Softmax image by image: of the whole batch at once it would be PyTorch that promises equal bits.
        rows = zip((logits.float().softmax(0).tolist() for logits in result.logits), result.executed.tolist(),
                   strict=True)
        return [self._prediction(tuple(probabilities), executed, milliseconds, len(result), dense_milliseconds)
                for probabilities, executed in rows]

    def _prediction(self, probabilities: tuple[float, ...], executed: list[bool], milliseconds: float, batch: int,
                    dense_milliseconds: float | None) -> Prediction:
        route = (True, *executed) if self.arch.gated else (True,) * self.arch.num_blocks
        multiply_adds = self._least + sum(cost for cost, ran in zip(self._costs, executed, strict=True) if ran)
        return Prediction(probabilities, route, computation_of(sum(executed), self.arch.num_gates), multiply_adds,
                          milliseconds, batch, dense_milliseconds)

    def predict(self, pictures: Sequence[bytes | np.ndarray | Image.Image], dense: bool = False) -> list[Prediction]:
        """:meth:`image` of each picture, then :meth:`infer` of all of them.

        Raises:
            PictureError: one of them cannot be read.
        """
        return self.infer([self.image(picture) for picture in pictures], dense)

    def classes(self, prediction: Prediction, top: int | None = None) -> list[dict[str, Any]]:
        """The most probable classes, best first: their numbers, labels and probabilities; all of them by default."""
        return [{"class": number, "label": self.labels[number], "probability": prediction.probabilities[number]}
                for number in prediction.best(self.arch.num_classes if top is None else top)]

    def to_dict(self, prediction: Prediction, top: int | None = None) -> dict[str, Any]:
        """A prediction in plain values, for JSON: computation in percent, the `top` best classes (all by default)."""
        classes = self.classes(prediction, top)
        return {**classes[0], "classes": classes, "route": list(prediction.route),
                "blocks_run": prediction.blocks_run, "blocks": self.arch.num_blocks,
                "computation": 100 * prediction.computation, "multiply_adds": prediction.multiply_adds,
                "milliseconds": prediction.milliseconds, "batch": prediction.batch,
                "dense_milliseconds": prediction.dense_milliseconds}

    def describe(self) -> dict[str, Any]:
        """The network and what runs it, in plain values, for JSON: nothing of its file or of this machine's folders."""
        runtime = self.runtime
        return {"architecture": str(self.arch), "gate": self.arch.gate, "blocks": self.arch.num_blocks,
                "groups": [len(list(members)) for _, members in groupby(self.arch.blocks, key=lambda plan: plan.group)],
                "labels": list(self.labels), "image_size": list(self.arch.image_size),
                "preprocessing": self.preprocessing.to_dict(), "engine": runtime.engine.name,
                "device": str(runtime.device), "dtype": str(runtime.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "multiply_adds": count_operations(self.arch).dense.multiply_adds}


def _fitting(preprocessing: Preprocessing | None, architecture: SkipNetArch) -> Preprocessing:
    """A preprocessing that makes what the network takes."""
    if preprocessing is None:
        raise PredictorError("the checkpoint doesn't say how pictures become inputs; "
                             f"choose with --preprocessing {'|'.join(PREPROCESSINGS)}")
    height, width = preprocessing.image_size
    if (3, height, width) != (architecture.in_channels, *architecture.image_size):
        taken = "x".join(map(str, (architecture.in_channels, *architecture.image_size)))
        raise PredictorError(f"this preprocessing makes images of 3x{height}x{width}, but {architecture} takes {taken}")
    return preprocessing


def _costs(architecture: SkipNetArch) -> tuple[int, list[int]]:
    """Multiply-adds of an image that skips all it can, and what each gated block adds to them."""
    gates = architecture.num_gates
    least, *others = count_operations(architecture).per_image(
        torch.cat([torch.zeros(1, gates, dtype=torch.bool), torch.eye(gates, dtype=torch.bool)]))[0].tolist()
    return least, [other - least for other in others]


def _restored(path: Any, engine: str, dtype: torch.dtype | None, threads: int | None, device: str,
              preprocessing: Preprocessing | None) -> Predictor:
    """The other end of pickling."""
    return Predictor(path, engine, dtype, threads, device=device, preprocessing=preprocessing)
