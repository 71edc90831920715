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
from skipnet_rt.engines.engine import Availability, Decisions, EnginePass, WalkingEngine
from skipnet_rt.engines.graphs import Graphs
from skipnet_rt.kernels import GateStep, tuning
from skipnet_rt.kernels.gathered_conv import DTYPES, Configuration, Layer, configurations
from skipnet_rt.kernels.language import INTERPRETED, compilation_shown, missing
from skipnet_rt.packing import PackedBlock, PackedConvolution, PackedFeedforwardGate, PackedNetwork


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


@dataclass
class _TritonDecisions(Decisions):
    """Adds what the gate step leaves for the next block.

    Attributes:
        rows: the executing images; every gate writes it anew.
        arrivals: int32 ``[1]``, the gate step's counter; 0 between launches.
    """

    rows: Rows
    arrivals: Tensor


class _Convolution:
    """A layer's weights as the kernel takes them, and its configuration.

    Args:
        layer: the weights.
        size: the input's height and width.
        measured: configurations that were, by layer.
        pooled: writes the output's sums.
    """

    def __init__(self, layer: PackedConvolution, size: tuple[int, int], measured: dict[str, Configuration], *,
                 pooled: bool = False) -> None:
        out_channels, channels, kernel, _ = layer.weight.shape
        self.weight = layer.weight.permute(2, 3, 1, 0).contiguous()
        self.bias = layer.bias.float()
        self.layer = Layer(*size, channels, out_channels, kernel, layer.stride, layer.padding, layer.weight.dtype,
                           pooled)
        self._configuration = measured.get(str(self.layer), configurations(self.layer)[0])

    def __call__(self, x: Tensor, count: Tensor | None = None, *, gather: Tensor | None = None,
                 scatter: Tensor | None = None, relu: bool = False, residual: Tensor | None = None,
                 out: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
        """See :func:`skipnet_rt.kernels.gathered_conv2d`."""
        return kernels.gathered_conv2d(
            x, self.weight, self.bias, count, gather=gather, scatter=scatter, stride=self.layer.stride,
            padding=self.layer.padding, relu=relu, residual=residual, out=out, sums=sums,
            configuration=self._configuration)

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """Memory for a batch's output in the weights' dtype, and for its sums."""
        size, channels, device = self.layer.out_size, self.layer.out_channels, self.weight.device
        return (torch.empty(batch, *size, channels, dtype=self.layer.dtype, device=device),
                torch.empty(batch, kernels.sum_tiles(size), channels, device=device))


def _chain(layers: tuple[PackedConvolution, ...], size: tuple[int, int],
           measured: dict[str, Configuration]) -> list[_Convolution]:
    """Convolutions that follow one another, the first on an input of this size; the last one writes sums."""
    chain: list[_Convolution] = []
    for layer in layers:
        chain.append(_Convolution(layer, chain[-1].layer.out_size if chain else size, measured,
                                  pooled=layer is layers[-1]))
    return chain


class _Block:
    def __init__(self, block: PackedBlock, measured: dict[str, Configuration]) -> None:
        *self.first, self.last = _chain(block.convolutions, block.plan.in_size, measured)
        self.projection = None if block.projection is None else _Convolution(
            block.projection, block.plan.in_size, measured, pooled=True)


class _FeedforwardGate:
    """A feed-forward gate's convolutions; its tail is in the gate step."""

    def __init__(self, gate: PackedFeedforwardGate, size: tuple[int, int], measured: dict[str, Configuration]) -> None:
        self.max_pool = gate.max_pool
        self.chain = _chain(gate.convolutions, (size[0] // 2, size[1] // 2) if gate.max_pool else size, measured)

    def __call__(self, x: Tensor, present: Tensor) -> tuple[Tensor, int]:
        """The sums of the last feature map, and its pixels. In float32 from the first product on."""
        if self.max_pool:
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        for convolution in self.chain:
            out, sums = convolution.empty(len(x))
            x = convolution(x, present, relu=True, out=out, sums=sums if convolution.layer.pooled else None)
        return sums, x.shape[1] * x.shape[2]


class TritonEngine(WalkingEngine[Activation, Rows]):
    """Row lists and counts stay on the device; on a GPU most batches are a CUDA graph of :class:`Graphs`."""

    name = "triton"
    devices = ("cpu",) if INTERPRETED else ("cuda",)
    dtypes = DTYPES

    def __init__(self, network: PackedNetwork) -> None:
        super().__init__(network)
        architecture = network.arch
        measured = tuning.results(network.device)
        self._stem = _Convolution(network.stem, architecture.image_size, measured)
        self._blocks = [_Block(block, measured) for block in network.blocks]
        self._gates = [_FeedforwardGate(gate, plan.out_size, measured) if isinstance(gate, PackedFeedforwardGate)
                       else None for plan, gate in zip(architecture.blocks, network.gates, strict=False)]
        weight = network.head_weight
        self._head = _Convolution(PackedConvolution(weight.view(*weight.shape, 1, 1), network.head_bias, 1, 0), (1, 1),
                                  measured)
        self._graphs = None if INTERPRETED else Graphs(architecture, network.device, network.dtype, compilation_shown)
        self._interpreter = threading.Lock()  # it runs one program at a time

    @classmethod
    def availability(cls) -> Availability:
        reason = missing()
        return Availability(reason is None, reason or "")

    @property
    def memory(self) -> int:
        return super().memory + (0 if self._graphs is None else self._graphs.memory)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every kind of convolution that the network has, once: what there is to tune."""
        convolutions = [self._stem, self._head]
        for block in self._blocks:
            convolutions += [*block.first, block.last, *([] if block.projection is None else [block.projection])]
        for gate in self._gates:
            convolutions += [] if gate is None else gate.chain
        return tuple(dict.fromkeys(convolution.layer for convolution in convolutions))

    def run(self, images: Tensor, routing: Tensor | None, steps: int) -> EnginePass:
        if self._graphs is None:
            with self._interpreter:
                return self._walk(images, routing, None, steps)
        return self._graphs.run(self._walk, images, routing, steps)

    def prepare(self, batches: Iterable[int], *, steps: int | None = None, forced: bool = False) -> None:
        """Compile and capture ahead for these sizes of batch, so that no call has to.

        Args:
            batches: how many images; each is rounded up to a power of two. Those too large to be captured are left out.
            steps: gates to evaluate, as for :meth:`run`; by default G, which is what ``infer`` asks for.
            forced: for calls with a routing.
        """
        if self._graphs is not None:
            self._graphs.capture(self._walk, batches, self.network.arch.num_gates if steps is None else steps, forced)

    def _walk(self, images: Tensor, routing: Tensor | None, present: Tensor | None, steps: int) -> EnginePass:
        """The walk for the first ``present`` images, or all; the others' results are undefined."""
        if present is None:
            present = torch.full((1,), len(images), dtype=torch.int32, device=images.device)
        return self.walk(images, self._decisions(len(images), routing, present, steps))

    def _decisions(self, batch: int, routing: Tensor | None, present: Tensor, steps: int) -> _TritonDecisions:
        integers: dict[str, Any] = dict(dtype=torch.int32, device=present.device)
        rows = Rows(torch.empty(batch, **integers), torch.empty(1, **integers), present)
        return _TritonDecisions(**vars(self.begin(batch, steps, routing)), rows=rows,
                                arrivals=torch.zeros(1, **integers))

    def everyone(self, decisions: Decisions) -> Rows:
        assert isinstance(decisions, _TritonDecisions)
        present = decisions.rows.present
        order = torch.arange(decisions.executed.shape[1], dtype=torch.int32, device=present.device)
        return Rows(order, present, present)

    def stem(self, images: Tensor) -> Activation:
        x = self._stem(images.permute(0, 2, 3, 1), relu=True)
        if self.network.arch.stem == "imagenet":
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, stride=2, padding=1).permute(0, 2, 3, 1).contiguous()
        return Activation(x, None)

    def gate_step(self, index: int, x: Activation, decisions: Decisions) -> None:
        assert isinstance(decisions, _TritonDecisions)
        assert x.sums is not None
        rows = decisions.rows
        out = GateStep(decisions.gate_logits[index], decisions.probabilities[index], decisions.executed[index],
                       rows.order, rows.count)
        packed, feedforward = self.network.gates[index], self._gates[index]
        if feedforward is None:
            kernels.gate_step(x.sums, x.pixels.shape[1] * x.pixels.shape[2], packed, self.network.lstm,
                              decisions.hidden, decisions.cell, forced=decisions.forced_by(index),
                              present=rows.present, out=out, arrivals=decisions.arrivals)
        else:
            kernels.gate_step(*feedforward(x.pixels, rows.present), packed, forced=decisions.forced_by(index),
                              present=rows.present, out=out, arrivals=decisions.arrivals)

    def compact(self, index: int, decisions: Decisions) -> Rows:
        assert isinstance(decisions, _TritonDecisions)
        return decisions.rows  # the gate step has listed them

    def run_block(self, index: int, x: Activation, rows: Rows) -> Activation:
        block, y = self._blocks[index], x
        if block.projection is not None:  # everyone's shortcut; the executing images add to it below
            y = Activation(*block.projection.empty(len(x.pixels)))
            block.projection(x.pixels, rows.present, out=y.pixels, sums=y.sums)
        elif x.sums is None:
            y = Activation(x.pixels, block.last.empty(len(x.pixels))[1])
        first, *between = block.first
        inner = first(x.pixels, rows.count, gather=rows.order, relu=True)
        for convolution in between:
            inner = convolution(inner, rows.count, relu=True)
        block.last(inner, rows.count, scatter=rows.order, relu=True, residual=y.pixels, out=y.pixels, sums=y.sums)
        return y

    def head(self, x: Activation) -> Tensor:
        assert x.sums is not None
        pooled = kernels.pool(x.sums, x.pixels.shape[1] * x.pixels.shape[2], self.network.dtype)
        return self._head(pooled.view(len(pooled), 1, 1, -1)).view(len(pooled), -1)
