"""What a kernel takes of a GPU that need not be here: shared memory, registers and stack, from compiling it.

Triton compiles for any target, and brings the assembler with it; ``benchmarks/triton_resources.py`` prints a table, and
tests hold every configuration to the limits below.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skipnet_rt.kernels import gathered_conv
from skipnet_rt.kernels.compaction import compact_kernel
from skipnet_rt.kernels.gate_step import constants as gate_constants
from skipnet_rt.kernels.gate_step import gate_step_kernel
from skipnet_rt.kernels.gathered_conv import Configuration, Layer
from skipnet_rt.kernels.language import FUSED, triton

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that a program may have: CUDA C++ Programming Guide; AMD's manual of CDNA3."""

REGISTER_LIMIT = 255
"""Registers that a thread of an NVIDIA GPU may have."""

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
             torch.bool: "*i1"}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        shared: bytes of shared memory a program has.
        registers: of a thread; None for AMD.
        stack: bytes of local memory a thread has, to which registers spill; None for AMD.
        instructions: the matrix instructions in it, such as ``wgmma.mma_async``, and how many.
    """

    shared: int
    registers: int | None
    stack: int | None
    instructions: Mapping[str, int]


def convolution(layer: Layer, configuration: Configuration, target: str) -> Resources:
    """The gathered convolution as a block has it: the last one of a block for a pooled layer, else the first."""
    dtype, integer = layer.dtype, torch.int32
    tensors = dict(x_ptr=dtype, weight_ptr=dtype, bias_ptr=torch.float32, out_ptr=dtype, count_ptr=integer)
    tensors |= (dict(residual_ptr=dtype, sums_ptr=torch.float32, scatter_ptr=integer) if layer.pooled
                else dict(gather_ptr=integer))
    if configuration.split_k > 1:
        tensors |= dict(partials_ptr=torch.float32, arrivals_ptr=integer)
    strides = (layer.height * layer.width * layer.channels, layer.width * layer.channels, layer.channels, 1)
    by_term = (1, layer.kernel ** 2 * layer.channels) if layer.tf32 else (layer.out_channels, 1)
    return _compiled(gathered_conv.gathered_conv_kernel, tensors, ("batch", "capacity"),
                     gathered_conv.constants(layer, configuration, strides, by_term, relu=True), target,
                     num_warps=configuration.warps, num_stages=configuration.stages)


def gate(pixels: int, channels: int, embed: int, hidden: int, target: str) -> Resources:
    """The gate step; without hidden units a feed-forward gate's."""
    names = ["sums_ptr", "weight_ptr", "bias_ptr", "logit_ptr", "probability_ptr"]
    if hidden:
        names += ["input_weight_ptr", "hidden_weight_ptr", "lstm_bias_ptr", "projection_weight_ptr",
                  "projection_bias_ptr", "hidden_ptr", "cell_ptr"]
    tensors = dict.fromkeys(names, torch.float32) | dict.fromkeys(("forced_ptr", "executed_ptr"), torch.bool)
    tensors |= dict.fromkeys(("rows_ptr", "count_ptr", "present_ptr", "arrivals_ptr"), torch.int32)
    tiles = -(-pixels // gathered_conv.POOL_TILE)
    return _compiled(gate_step_kernel, tensors, ("batch",),
                     gate_constants(tiles, pixels, channels, embed, max(1, hidden)), target)


def compaction(target: str) -> Resources:
    """Compaction alone."""
    tensors = dict(executed_ptr=torch.bool, rows_ptr=torch.int32, count_ptr=torch.int32)
    return _compiled(compact_kernel, tensors, ("batch",), dict(BLOCK=1024), target)


def _compiled(kernel: Any, tensors: Mapping[str, torch.dtype], integers: tuple[str, ...],
              constants: Mapping[str, Any], target: str, **options: int) -> Resources:
    """A kernel for these arguments; a pointer that is not among the tensors is None."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {name: _POINTERS[dtype] for name, dtype in tensors.items()}
    signature = {name: pointers.get(name, "i32" if name in integers else "constexpr") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    constexprs = {places[name]: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=gpu, options={**options, **FUSED})
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    instructions = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+", text)
    registers, stack = _usage(compiled.asm["cubin"]) if nvidia else (None, None)
    return Resources(compiled.metadata.shared, registers, stack, Counter(instructions))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack, as the assembler's own tool reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    assert usage is not None, output
    return int(usage[1]), int(usage[2]) + int(usage[3])
