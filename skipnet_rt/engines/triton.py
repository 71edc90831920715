"""The Triton engine: the compacted strategy on GPUs, for every network, without a compiler of one's own.

A block is two or three launches (four where the shortcut projects) and a gate step is one: the first convolution reads
its images through the row list, those between work on the compact batch, the last one adds bias and residual, applies
ReLU, writes in place to where its images stand, and leaves the pooled sums that the gate step finishes. Activations are
channels-last. No count reaches the host. See docs/triton.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt import kernels
from skipnet_rt.engines.base import Availability, BlockwiseEngine, Decisions, EnginePass, empty_decisions
from skipnet_rt.engines.cuda_graphs import LARGE_PIXELS, Graphs
from skipnet_rt.engines.tolerances import tf32_asked
from skipnet_rt.kernels import GateStep, tuning
from skipnet_rt.kernels.gathered_conv import DTYPES, Configuration, Layer, Workspace, configurations
from skipnet_rt.kernels.language import INTERPRETED, compilation_shown, unavailable_reason
from skipnet_rt.model.packing import PackedBlock, PackedConvolution, PackedFeedforwardGate, PackedNetwork


@dataclass(frozen=True)
class Rows:
    """Which images a block runs for, on the device."""

    order: Tensor  # int32 [N], the images in order; what follows the first `count` is not read
    count: Tensor  # int32 [1]
    present: Tensor  # int32 [1], images in the batch: a captured bucket may have more places


@dataclass(frozen=True)
class Activation:
    """A block's output."""

    pixels: Tensor  # [N, H, W, C] in the network's dtype
    sums: Tensor | None  # float32 [N, tiles, C], its partial sums for the pool; the stem's output has none
    workspace: Workspace  # a pass's own, which its launches use one after the other


@dataclass
class _TritonDecisions(Decisions):
    """Adds what the gate step leaves for the next block.

    Attributes:
        rows: the executing images; every gate writes it anew.
    """

    rows: Rows


class _Convolution:
    """A layer's weights as the kernel takes them (``copied`` bytes beyond the packed ones), and its configuration.

    Args:
        layer: the weights.
        size: the input's height and width.
        measured: configurations that were, by layer.
        pooled: writes the output's sums.
        tf32: operands are cut to TF32.
    """

    def __init__(self, layer: PackedConvolution, size: tuple[int, int], measured: dict[str, Configuration], *,
                 pooled: bool = False, tf32: bool = False) -> None:
        out_channels, channels, kernel, _ = layer.weight.shape
        # TF32's instructions want the terms of a sum beside each other, the others' take the channels of the output.
        self.weight = (layer.weight.permute(0, 2, 3, 1).contiguous().permute(1, 2, 3, 0) if tf32
                       else layer.weight.permute(2, 3, 1, 0).contiguous())
        self.bias = layer.bias.float()
        self.copied = sum(mine.nbytes for mine, packed in ((self.weight, layer.weight), (self.bias, layer.bias))
                          if mine.data_ptr() != packed.data_ptr())
        self.layer = Layer(*size, channels, out_channels, kernel, layer.stride, layer.padding, layer.weight.dtype,
                           pooled, tf32)
        self.configuration = measured.get(str(self.layer), configurations(self.layer)[0])

    def __call__(self, x: Tensor, count: Tensor | None = None, *, gather: Tensor | None = None,
                 scatter: Tensor | None = None, relu: bool = False, residual: Tensor | None = None,
                 out: Tensor | None = None, sums: Tensor | None = None, workspace: Workspace) -> Tensor:
        """See :func:`skipnet_rt.kernels.gathered_conv2d`."""
        return kernels.gathered_conv2d(
            x, self.weight, self.bias, count, gather=gather, scatter=scatter, stride=self.layer.stride,
            padding=self.layer.padding, relu=relu, residual=residual, out=out, sums=sums, tf32=self.layer.tf32,
            configuration=self.configuration, workspace=workspace)

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """Memory for a batch's output in the weights' dtype, and for its sums."""
        size, channels, device = self.layer.out_size, self.layer.out_channels, self.weight.device
        return (torch.empty(batch, *size, channels, dtype=self.layer.dtype, device=device),
                torch.empty(batch, kernels.sum_tiles(size), channels, device=device))


def _chain(layers: tuple[PackedConvolution, ...], size: tuple[int, int], measured: dict[str, Configuration], *,
           tf32: bool = False) -> list[_Convolution]:
    """Convolutions that follow one another, the first on an input of this size; the last one writes sums."""
    chain: list[_Convolution] = []
    for layer in layers:
        chain.append(_Convolution(layer, chain[-1].layer.out_size if chain else size, measured,
                                  pooled=layer is layers[-1], tf32=tf32))
    return chain


class _Block:
    def __init__(self, block: PackedBlock, measured: dict[str, Configuration], *, tf32: bool) -> None:
        *self.first, self.last = _chain(block.convolutions, block.plan.in_size, measured, tf32=tf32)
        self.projection = None if block.projection is None else _Convolution(
            block.projection, block.plan.in_size, measured, pooled=True, tf32=tf32)


class _FeedforwardGate:
    """A feed-forward gate's convolutions; its tail is in the gate step."""

    def __init__(self, gate: PackedFeedforwardGate, size: tuple[int, int], measured: dict[str, Configuration]) -> None:
        self.max_pool = gate.max_pool
        self.chain = _chain(gate.convolutions, (size[0] // 2, size[1] // 2) if gate.max_pool else size, measured)

    def __call__(self, x: Tensor, present: Tensor, workspace: Workspace) -> tuple[Tensor, int]:
        """The sums of the last feature map, and its pixels. In float32 from the first product on."""
        if self.max_pool:
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        for convolution in self.chain:
            out, sums = convolution.empty(len(x))
            x = convolution(x, present, relu=True, out=out, sums=sums if convolution.layer.pooled else None,
                            workspace=workspace)
        return sums, x.shape[1] * x.shape[2]


class TritonEngine(BlockwiseEngine[Activation, Rows]):
    """Row lists and counts stay on the device; on a GPU most batches are a CUDA graph of :class:`Graphs`."""

    name = "triton"
    devices = ("cpu",) if INTERPRETED else ("cuda",)
    dtypes = DTYPES

    def __init__(self, network: PackedNetwork) -> None:
        super().__init__(network)
        architecture = network.arch
        measured = tuning.results(network.device)
        # Of AMD's GPUs few have it: Triton refuses it for the others.
        tf32 = network.dtype == torch.float32 and torch.version.hip is None and tf32_asked()
        self._stem = _Convolution(network.stem, architecture.image_size, measured, tf32=tf32)
        self._blocks = [_Block(block, measured, tf32=tf32) for block in network.blocks]
        self._gates = [_FeedforwardGate(gate, plan.out_size, measured) if isinstance(gate, PackedFeedforwardGate)
                       else None for plan, gate in zip(architecture.blocks, network.gates, strict=False)]
        weight = network.head_weight
        self._head = _Convolution(PackedConvolution(weight.view(*weight.shape, 1, 1), network.head_bias, 1, 0), (1, 1),
                                  measured)
        self._plans = {(one.layer, one.configuration) for one in self._convolutions}
        self._graphs = None if INTERPRETED else Graphs(architecture, network.device, network.dtype, compilation_shown,
                                                       LARGE_PIXELS)
        self._interpreter = threading.Lock()  # it runs one program at a time
        if not INTERPRETED:
            torch.cuda.current_stream(network.device).synchronize()  # the weights are there for every stream's calls

    @classmethod
    def availability(cls) -> Availability:
        reason = unavailable_reason()
        return Availability(reason is None, reason or "")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every kind of convolution that the network has, once: what there is to tune."""
        return tuple(dict.fromkeys(convolution.layer for convolution in self._convolutions))

    @property
    def _convolutions(self) -> list[_Convolution]:
        convolutions = [self._stem, self._head]
        for block in self._blocks:
            convolutions += [*block.first, block.last, *([] if block.projection is None else [block.projection])]
        for gate in self._gates:
            convolutions += [] if gate is None else gate.chain
        return convolutions

    @property
    def memory(self) -> int:
        """Weights, as packed and as the kernels take them, and what the graphs hold."""
        copies = sum(convolution.copied for convolution in self._convolutions)
        return super().memory + copies + (0 if self._graphs is None else self._graphs.memory)

    def run(self, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        if self._graphs is None:
            with self._interpreter:
                return self._forward(images, forced, None, num_gates)
        return self._graphs.run(self._forward, images, forced, num_gates)

    def prepare(self, batches: Iterable[int], *, num_gates: int | None = None, forced: bool = False) -> None:
        """Compile and capture ahead for these sizes of batch, so that no call has to.

        Args:
            batches: how many images; each is rounded up to a power of two. Those too large to be captured are left out.
            num_gates: gates to evaluate, as for :meth:`run`; by default G, which is what ``infer`` asks for.
            forced: for calls with a routing.
        """
        if self._graphs is not None:
            self._graphs.capture(self._forward, batches,
                                 self.network.arch.num_gates if num_gates is None else num_gates, forced)

    def _forward(self, images: Tensor, forced: Tensor | None, present: Tensor | None, num_gates: int) -> EnginePass:
        """The pass for the first ``present`` images, or all; the others' results are undefined."""
        if present is None:
            present = torch.full((1,), len(images), dtype=torch.int32, device=images.device)
        return self.forward(images, self._decisions(len(images), forced, present, num_gates))

    def _decisions(self, batch: int, forced: Tensor | None, present: Tensor, num_gates: int) -> _TritonDecisions:
        integers: dict[str, Any] = dict(dtype=torch.int32, device=present.device)
        rows = Rows(torch.empty(batch, **integers), torch.empty(1, **integers), present)
        return _TritonDecisions(**vars(empty_decisions(self.network, batch, num_gates, forced)), rows=rows)

    def all_rows(self, decisions: Decisions) -> Rows:
        assert isinstance(decisions, _TritonDecisions)
        present = decisions.rows.present
        order = torch.arange(decisions.executed.shape[1], dtype=torch.int32, device=present.device)
        return Rows(order, present, present)

    def stem(self, images: Tensor) -> Activation:
        # Made for every pass: a graph's is its own, whatever runs beside it.
        workspace = Workspace.empty(self._plans, len(images), images.device)
        x = self._stem(images.permute(0, 2, 3, 1), relu=True, workspace=workspace)
        if self.network.arch.stem_pools:
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, stride=2, padding=1).permute(0, 2, 3, 1).contiguous()
        return Activation(x, None, workspace)

    def gate_step(self, index: int, x: Activation, decisions: Decisions) -> None:
        assert isinstance(decisions, _TritonDecisions)
        assert x.sums is not None
        rows, workspace = decisions.rows, x.workspace
        out = GateStep(decisions.gate_logits[index], decisions.probabilities[index], decisions.executed[index],
                       rows.order, rows.count)
        packed, feedforward = self.network.gates[index], self._gates[index]
        if feedforward is None:
            kernels.gate_step(x.sums, x.pixels.shape[1] * x.pixels.shape[2], packed, self.network.lstm,
                              decisions.hidden, decisions.cell, forced=decisions.forced_by(index),
                              present=rows.present, out=out, arrivals=workspace.arrivals[:1])
        else:
            kernels.gate_step(*feedforward(x.pixels, rows.present, workspace), packed,
                              forced=decisions.forced_by(index), present=rows.present, out=out,
                              arrivals=workspace.arrivals[:1])

    def compact(self, index: int, decisions: Decisions) -> Rows:
        assert isinstance(decisions, _TritonDecisions)
        return decisions.rows  # the gate step has listed them

    def run_block(self, index: int, x: Activation, rows: Rows) -> Activation:
        block, y, workspace = self._blocks[index], x, x.workspace
        if block.projection is not None:  # every image's shortcut; the executing images add to it below
            y = Activation(*block.projection.empty(len(x.pixels)), workspace)
            block.projection(x.pixels, rows.present, out=y.pixels, sums=y.sums, workspace=workspace)
        elif x.sums is None:
            y = Activation(x.pixels, block.last.empty(len(x.pixels))[1], workspace)
        # The skip: these launches read how many images execute on the device, and go through no others.
        first, *between = block.first
        inner = first(x.pixels, rows.count, gather=rows.order, relu=True, workspace=workspace)
        for convolution in between:
            inner = convolution(inner, rows.count, relu=True, workspace=workspace)
        block.last(inner, rows.count, scatter=rows.order, relu=True, residual=y.pixels, out=y.pixels, sums=y.sums,
                   workspace=workspace)
        return y

    def head(self, x: Activation) -> Tensor:
        assert x.sums is not None
        pooled = kernels.pool(x.sums, x.pixels.shape[1] * x.pixels.shape[2], self.network.dtype)
        return self._head(pooled.view(len(pooled), 1, 1, -1), workspace=x.workspace).view(len(pooled), -1)
