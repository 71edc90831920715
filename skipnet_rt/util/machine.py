"""What this machine is: what every timing depends on, and what ``doctor`` looks at first."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("triton", "numpy", "torchvision", "matplotlib", "onnx", "onnxruntime", "openvino")

_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
                 "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve")


def versions() -> dict[str, str | None]:
    """Versions of ourselves, of Python, of the system and of packages; None for one that is not installed."""
    return {"skipnet-rt": _installed("skipnet-rt"), "python": platform.python_version(),
            "platform": platform.platform(), "torch": torch.__version__,  # which says CPU or CUDA, too
            **{name: _installed(name) for name in _PACKAGES}}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """The processor, the instruction sets that matter here, and how much of both PyTorch uses."""
    return {"processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(), "instructions": _instructions()}


def gpu(device: torch.device) -> dict[str, Any] | None:
    """A CUDA device, its driver, and its clocks (MHz), power (W) and temperature (C) as nvidia-smi tells them."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    details: dict[str, Any] = {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory,
        "cuda": torch.version.cuda}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    try:
        answer = subprocess.run(["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(fields)}",
                               "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return details
    return details | dict(zip(fields, (value.strip() for value in answer.stdout.split(",")), strict=False))


def load() -> float | None:
    """Processes that wanted a core in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _instructions() -> list[str]:
    """As Linux names them; empty on other systems."""
    present = set(_cpuinfo("flags|Features").split())
    return [name for name in _INSTRUCTIONS if name in present]


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    line = re.search(rf"^(?:{field})\s*:(.*)$", text, re.MULTILINE)
    return line[1].strip() if line else ""
