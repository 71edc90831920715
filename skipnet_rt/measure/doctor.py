"""What this installation can do, and whether it does it right: every engine against the eager one."""

from __future__ import annotations

from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from skipnet_rt import _C
from skipnet_rt.checkpoint import CheckpointError
from skipnet_rt.checkpoint.bundled import bundled_model
from skipnet_rt.engines import autoselect
from skipnet_rt.engines.base import Availability
from skipnet_rt.engines.registry import EngineError, engines
from skipnet_rt.engines.tolerances import TOLERANCES
from skipnet_rt.engines.triton import TritonEngine
from skipnet_rt.kernels import tuning
from skipnet_rt.measure.benchmark import measure_crossover
from skipnet_rt.measure.demo import devices, held_out_digits, spread
from skipnet_rt.model.network import SkipNet
from skipnet_rt.runtime import compile, usable_device
from skipnet_rt.util import machine


@dataclass(frozen=True)
class SelfCheck:
    """One engine on one device against the eager engine on the CPU, in float32.

    Attributes:
        engine, device: what was checked.
        passed: equal decisions, and logits within float32's tolerance; see :mod:`skipnet_rt.engines.tolerances`.
        detail: the differences, in words.
    """

    engine: str
    device: str
    passed: bool
    detail: str


def self_check(model: SkipNet, images: int = 16) -> list[SelfCheck]:
    """Classify a few held-out digits on every available engine and compare with the eager engine on the CPU.

    Args:
        model: the bundled network.
        images: how many, evenly spread over the 360.
    """
    tolerance = TOLERANCES[torch.float32].logits
    assert tolerance is not None
    few = spread(held_out_digits(), images)
    oracle = compile(model, engine="eager", device="cpu", dtype=torch.float32).infer(few)
    checks = []
    for name, availability in engines().items():
        for device in devices() if availability else ():
            try:
                runtime = compile(model, engine=name, device=device, dtype=torch.float32)
            except EngineError:
                continue  # it does not run on this device
            result = runtime.infer(few.to(device))
            flips = int((result.executed.cpu() != oracle.executed).sum())
            error = float((result.logits.cpu() - oracle.logits).norm() / oracle.logits.norm())
            checks.append(SelfCheck(name, device, flips == 0 and error <= tolerance,
                                    f"{images} images: {flips} of {oracle.executed.numel()} decisions differ, "
                                    f"relative error of the logits {error:.1e}"))
    return checks


def warm(model: SkipNet, dtype: torch.dtype, on_progress: Callable[[str, float], None]) -> int:
    """Choose and compile a network's Triton kernels ahead, and find its fastest engine: what ``"auto"`` will take.

    Args:
        model: the network; its weights do not matter.
        dtype: that it will run in.
        on_progress: told what is being done, and the share that is done.

    Returns:
        How many kinds of layer it has.

    Raises:
        EngineError: the Triton engine cannot run here.
    """
    def build() -> TritonEngine:
        engine = compile(model, engine="triton", device=TritonEngine.devices[0], dtype=dtype).engine
        assert isinstance(engine, TritonEngine)
        return engine

    if not (status := TritonEngine.availability()):
        raise EngineError(f"engine 'triton' is {status}")
    engine = build()
    device, steps = engine.network.device, len(engine.layers) + 2
    tuning.tune(engine.layers, device,
                on_progress=lambda layer, done, total: on_progress(f"measuring {layer}", done / (total + 2)))
    on_progress("compiling", 1 - 2 / steps)
    build().prepare([1])
    if device.type == "cuda" and model.arch.gated:  # in the interpreter there is nothing to compare
        on_progress("comparing engines", 1 - 1 / steps)
        autoselect.save(measure_crossover(model, device, dtype).milliseconds, model.arch, device, dtype)
    return len(engine.layers)


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` says of an installation.

    Attributes:
        versions, cpu: of the machine; see :mod:`skipnet_rt.util.machine`.
        cuda: what our CUDA sources were built for, the GPUs that they and PyTorch see, and the problem if any.
        engines: every engine's availability.
        missing_for_gpus: all that the GPU engines lack here; an engine's reason is the first thing only.
        bundled_problem: why the bundled network cannot be loaded, or None. Without it there are no self-checks.
        self_checks: one for each available engine and device.
    """

    versions: dict[str, str | None]
    cpu: dict[str, Any]
    cuda: dict[str, Any]
    engines: dict[str, Availability]
    missing_for_gpus: list[str]
    bundled_problem: str | None
    self_checks: list[SelfCheck]

    @property
    def ok(self) -> bool:
        """There is something to check, and all of it is right."""
        return bool(self.self_checks) and all(check.passed for check in self.self_checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok, "versions": self.versions, "cpu": self.cpu, "cuda": self.cuda,
            "engines": {name: vars(availability) for name, availability in self.engines.items()},
            "missing_for_gpus": self.missing_for_gpus,
            "bundled_model": {"present": self.bundled_problem is None, "problem": self.bundled_problem},
            "self_checks": [vars(check) for check in self.self_checks],
        }


def diagnose() -> Diagnosis:
    """Look at everything that can be wrong with an installation."""
    problem, checks = None, []
    try:
        checks = self_check(bundled_model())
    except CheckpointError as error:
        problem = str(error)
    return Diagnosis(machine.versions(), machine.cpu(), _cuda(), engines(), missing_for_gpus(), problem, checks)


def missing_for_gpus() -> list[str]:
    """What the GPU engines need and do not find here, and where it comes from."""
    missing = []
    try:
        usable_device("cuda")
    except EngineError as error:
        if torch.version.cuda is None:
            missing.append("a PyTorch with CUDA (https://pytorch.org/get-started): this one was built without")
        if find_library("cuda") is None:
            missing.append("an NVIDIA GPU and its driver: no driver is installed")
        missing = missing or [str(error)]
    if not _C.cuda_archs:
        missing.append(f"for engine cuda, nvcc, and skipnet-rt installed anew: CUDA sources {_C.cuda_build}")
    if find_spec("triton") is None:
        missing.append("for engine triton, Triton: pip install 'skipnet-rt[gpu]'")
    return missing


def _cuda() -> dict[str, Any]:
    """GPUs as our own CUDA code sees them, or why it sees none, beside what PyTorch sees."""
    gpus: list[dict[str, str]] = []
    problem = None
    if hasattr(_C, "cuda_devices"):
        try:
            gpus = [{"name": name, "capability": capability} for name, capability in _C.cuda_devices()]
        except RuntimeError as error:
            problem = str(error)
    return {"sources": _C.cuda_build, "archs": _C.cuda_archs, "gpus": gpus, "problem": problem,
            "torch_cuda": torch.version.cuda, "torch_sees": torch.cuda.device_count()}
