"""The native code by another compiler and for another processor: a golden case, run by a program without Python.

AArch64 runs in qemu's user mode, its NEON through the same vector type as everything else.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import variants
from networks import GoldenCase
from object_cache import ROOT, compiled

from skipnet_rt.model.packing import pack

SOURCES = ["tests/build/native/golden_case.cpp", "csrc/cpu/thread_team.cpp", "csrc/cpu/instruction_sets.cpp"]
INCLUDED = [ROOT / "csrc" / "cpu", ROOT / "tests" / "build" / "native", *(ROOT / "csrc").glob("*.h")]

pytestmark = pytest.mark.slow


def needs(*tools):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def write_case(case, path):
    """As golden_case.cpp reads it."""
    network = pack(case.model, torch.device("cpu"), torch.float32)
    words = []

    def integers(*values):
        words.append(np.array(values, np.int32).tobytes())

    def floats(values):
        array = np.asarray(values, np.float32)
        integers(array.size)
        words.append(array.tobytes())

    def convolution(layer):
        out_channels, in_channels, kernel, _ = layer.weight.shape
        integers(in_channels, out_channels, kernel, layer.stride)
        floats(layer.weight)
        floats(layer.bias)

    integers(*network.arch.image_size, network.arch.num_classes)
    convolution(network.stem)
    integers(len(network.blocks))
    for block, gate in zip(network.blocks, network.gates, strict=True):
        for layer in block.convolutions:
            convolution(layer)
        integers(block.projection is not None)
        if block.projection is not None:
            convolution(block.projection)
        floats(gate.weight)
        floats(gate.bias)
    lstm = network.lstm
    integers(lstm.input_weight.shape[1], len(lstm.projection_weight))
    for array in (lstm.input_weight, lstm.hidden_weight, lstm.bias, lstm.projection_weight, lstm.projection_bias,
                  network.head_weight, network.head_bias):
        floats(array)
    integers(len(case.images))
    floats(case.images)
    floats(case.logits)
    floats(case.executed.t().float())
    path.write_bytes(b"".join(words))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "case"
    write_case(GoldenCase("cifar10_rnn_gate_38-s15"), path)
    return path


def program(compiler, instruction_sets):
    """The golden case's program; everything in it by this compiler."""
    commands = [[*compiler, "-c", "-Icsrc/cpu", source] for source in SOURCES]
    commands += variants.commands(compiler, instruction_sets)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda command: compiled(command, INCLUDED), commands))
    return compiled([*compiler, *files], files)


def run(command):
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Optimised as little as makes sense: compiling takes longer than running.
FLAGS = [*(flag for flag in variants.FLAGS if flag != "-O3"), "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]


@needs("clang++")
def test_clang_takes_the_code_for_every_instruction_set():
    """Checked, not generated: that would take it a minute."""
    clang = ["clang++", *FLAGS, "-fsyntax-only", *(f"-D{name}={value}" for name, value in variants.MACROS)]
    for command in variants.commands(clang, variants.VARIANTS):
        run(command)


@needs("clang++")
def test_clang_builds_what_gives_the_golden_case(golden):
    out = run([program(["clang++", *FLAGS], variants.VARIANTS[:1]), golden])
    assert out.count("portable, resident") == out.count("portable, compacted") == 2


@needs("aarch64-linux-gnu-g++", "qemu-aarch64")
def test_aarch64_gives_the_golden_case(golden):
    out = run(["qemu-aarch64", program(["aarch64-linux-gnu-g++", *FLAGS, "-static"], variants.VARIANTS[:1]), golden])
    assert out.count("portable, resident") == out.count("portable, compacted") == 2
