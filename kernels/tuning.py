"""Which configuration a layer's convolution takes: measured once for a GPU, kept in a file that others can import.

The batch is no part of the choice (an image's bits must not depend on it), nor is anything measured behind a caller's
back: without a file every layer takes its best guess. ``skipnet-rt doctor --warm`` measures and writes the file.

A result is valid for the source of the kernel, the version of Triton, the GPU and its driver; together they name the
file. Compiled kernels need no care of ours: Triton's own cache is keyed by the source of a kernel and of all that it
calls, by the compiler, the target and every option.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from skipnet_rt.kernels import gathered_conv
from skipnet_rt.kernels.gathered_conv import (
    Configuration,
    Layer,
    Workspace,
    configurations,
    gathered_conv2d,
    sum_tiles,
)
from skipnet_rt.kernels.language import INTERPRETED, triton
from skipnet_rt.util import cache

BATCHES = (1, 8, 64)
"""What a configuration is measured on; the least geometric mean wins."""


class TuningError(ValueError):
    """A file of tuning results that does not fit this machine, or is none."""


@functools.cache
def identity(device: torch.device) -> dict[str, str]:
    """What results hold for: the kernel's source, Triton's version, the GPU's name and the driver's version."""
    source = hashlib.sha256(Path(gathered_conv.__file__).read_bytes()).hexdigest()
    if INTERPRETED:
        return dict(source=source, triton=triton.__version__, device="interpreter", driver="none")
    driver = torch.version.hip or _cuda_driver()
    return dict(source=source, triton=triton.__version__, device=torch.cuda.get_device_name(device), driver=driver)


def _cuda_driver() -> str:
    """The version of CUDA that the driver brings, in its own words: not every PyTorch tells."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return str(version.value)


def path(device: torch.device) -> Path:
    """Where this machine's results are kept."""
    return cache.path("tuning", identity(device))


def results(device: torch.device) -> dict[str, Configuration]:
    """What has been measured on this machine, by layer; empty if nothing has."""
    try:
        return _read(path(device), device)
    except FileNotFoundError:
        return {}


def export_results(file: Path, device: torch.device) -> None:
    """Write this machine's results to a file, for others with the same GPU, driver, Triton and source."""
    _write(file, device, results(device))


def import_results(file: Path, device: torch.device) -> int:
    """Add an exported file's results to this machine's; returns how many there are in it.

    Raises:
        TuningError: it was measured with something else, or is no such file; the message says what differs.
    """
    imported = _read(file, device)
    _write(path(device), device, results(device) | imported)
    return len(imported)


def tune(layers: Iterable[Layer], device: torch.device, *,
         on_progress: Callable[[Layer, int, int], None] | None = None) -> dict[str, Configuration]:
    """Measure every layer that has not been measured on this machine, and keep the results.

    Args:
        layers: of the networks that will run.
        device: the GPU, the current one.
        on_progress: told each layer before it is measured, how many are done, and how many there are in all.

    Returns:
        The configurations, by layer.
    """
    known = results(device)
    unmeasured = [layer for layer in dict.fromkeys(layers) if str(layer) not in known]
    for done, layer in enumerate(unmeasured):
        if on_progress is not None:
            on_progress(layer, done, len(unmeasured))
        candidates = configurations(layer)
        known[str(layer)] = candidates[0] if len(candidates) == 1 else min(
            candidates, key=lambda configuration: _time(layer, configuration, device))
        _write(path(device), device, known)  # after every layer: it may take minutes, and be interrupted
    return known


def _time(layer: Layer, configuration: Configuration, device: torch.device) -> float:
    """Milliseconds, geometric mean over :data:`BATCHES`; infinite where the GPU's shared memory does not suffice."""
    logarithms = 0.0
    for batch in BATCHES:
        shape = (layer.kernel, layer.kernel, layer.channels, layer.out_channels)
        x = torch.randn(batch, layer.height, layer.width, layer.channels, device=device).to(layer.dtype)
        weight, bias = torch.randn(shape, device=device).to(layer.dtype), torch.zeros(layer.out_channels, device=device)
        if layer.tf32:
            weight = weight.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        out = torch.zeros(batch, *layer.out_size, layer.out_channels, dtype=layer.dtype, device=device)
        sums = torch.zeros(batch, sum_tiles(layer.out_size), layer.out_channels, device=device)
        call = functools.partial(
            gathered_conv2d, x, weight, bias, stride=layer.stride, padding=layer.padding, relu=True, out=out,
            residual=out if layer.pooled else None, sums=sums if layer.pooled else None, tf32=layer.tf32,
            configuration=configuration, workspace=Workspace.empty([(layer, configuration)], batch, device))
        try:
            logarithms += math.log(triton.testing.do_bench_cudagraph(call, return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return math.inf
    return math.exp(logarithms / len(BATCHES))


def _read(file: Path, device: torch.device) -> dict[str, Configuration]:
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        measured_with, layers = document["identity"], document["layers"]
        configuration_by_layer = {layer: Configuration(*values) for layer, values in layers.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise TuningError(f"{file} holds no tuning results: {error!r}") from error
    for name, here in identity(device).items():
        if measured_with.get(name) != here:
            raise TuningError(f"{file} was measured with {name} {measured_with.get(name)!r}, here it is {here!r}")
    return configuration_by_layer


def _write(file: Path, device: torch.device, layers: dict[str, Configuration]) -> None:
    cache.save(file, dict(identity=identity(device), layers={
        layer: astuple(configuration) for layer, configuration in sorted(layers.items())}))
