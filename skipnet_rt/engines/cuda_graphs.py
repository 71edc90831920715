"""CUDA graphs of our own: a forward pass's launches captured once for each size of batch, and replayed.

A graph is captured for a bucket, the next power of two, and takes any batch up to it: how many images are there is a
number on the device (``present``), and empty places cost next to nothing. Buckets share one memory pool, so that they
run one after the other: a lock orders the threads that enqueue, an event the streams they enqueue on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from skipnet_rt.engines.base import Decisions, EnginePass
from skipnet_rt.kernels.language import power_of_two
from skipnet_rt.model.arch import SkipNetArch

Forward = Callable[[Tensor, "Tensor | None", "Tensor | None", int], EnginePass]
"""From images ``[B, ...]``, forced bool ``[G, B]`` or None, present int32 ``[1]`` (None: B) and the gates to evaluate,
to a result of B rows, of which those that are not present are undefined."""

SMALL_PIXELS = 32 * 224 * 224
"""Of a bucket's images. More keep a GPU busy for longer than the host needs for launches from C++: a graph would bring
nothing, and would hold the memory of all activations."""

LARGE_PIXELS = 256 * 224 * 224
"""The same for launches from Python, each of which takes many times as long. Beyond :data:`SMALL_PIXELS` a bucket must
leave others most of the device's memory."""

# PyTorch's switch for debugging: memory that is allocated piece by piece cannot be had during a capture.
_CAPTURES = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ

_CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


def activation_bytes(architecture: SkipNetArch, batch: int, dtype: torch.dtype) -> int:
    """What a forward pass holds at a time, roughly: a block's input, all in between and, if new, its output."""
    def area(size: tuple[int, int]) -> int:
        return size[0] * size[1]

    first = architecture.blocks[0]
    # What the stem's max pool takes is four times as large; what it gives, there is twice.
    most = first.in_channels * area(first.in_size) * (6 if architecture.stem_pools else 1)
    for plan in architecture.blocks:
        inner = area(plan.out_size) + (area(plan.in_size) if plan.kind == "bottleneck" else 0)
        out = plan.out_channels * area(plan.out_size) if plan.projects else 0  # else it is written in place
        most = max(most, plan.in_channels * area(plan.in_size) + plan.planes * inner + out)
    return batch * most * dtype.itemsize


@dataclass(frozen=True)
class _Bucket:
    """A captured graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor  # [B, in_channels, H, W]
    forced: Tensor | None  # bool [G, B]
    present: Tensor  # int32 [1]
    result: EnginePass


class Graphs:
    """The captured graphs of one network on one GPU.

    Its engine's forward pass is captured: it must not wait for the device, and use nothing beyond ``present`` images.
    It comes with every call, for whoever kept it would keep the engine and its memory.

    Args:
        architecture: of the network, for the shapes of images and forced decisions.
        device: a CUDA device.
        dtype: of images.
        loading: around a bucket's first pass, which compiles or loads what is new; shows that, for instance.
        most_pixels: of a bucket's images; larger batches are launched directly.
    """

    def __init__(self, architecture: SkipNetArch, device: torch.device, dtype: torch.dtype,
                 loading: Callable[[], AbstractContextManager[None]] = nullcontext,
                 most_pixels: int = SMALL_PIXELS) -> None:
        self._architecture, self._device, self._dtype, self._loading = architecture, device, dtype, loading
        self._most_pixels = most_pixels
        self._buckets: dict[tuple[int, int, bool], _Bucket | None] = {}  # None: there was not the memory for it
        self._pool = torch.cuda.graph_pool_handle()
        # Of this device (PyTorch's own choice is of the device that captured first), and one for all that share a pool.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def memory(self) -> int:
        """Bytes of the device's memory that the buckets hold, with what belongs to their pool."""
        with self._lock:
            buckets = [bucket for bucket in self._buckets.values() if bucket is not None]
            if not buckets:
                return 0
            inputs = [tensor for bucket in buckets
                      for tensor in (bucket.images, bucket.forced, bucket.present) if tensor is not None]
            segments = torch.cuda.memory_snapshot(self._pool, include_traces=False)  # type: ignore[no-untyped-call]
        return sum(tensor.nbytes for tensor in inputs) + sum(segment["total_size"] for segment in segments)

    def run(self, forward: Forward, images: Tensor, forced: Tensor | None, num_gates: int) -> EnginePass:
        """A batch on the current stream: its bucket replayed, which the first such batch captures, and waits for that.

        Launched directly where a graph would bring nothing or take too much memory, where the caller captures one that
        shall hold it, and where PyTorch's allocator does not cache.
        """
        size = power_of_two(len(images))
        with torch.cuda.device(self._device):
            if self._fits(size) and not torch.cuda.is_current_stream_capturing():
                with self._lock:
                    if bucket := self._bucket(forward, size, num_gates, forced is not None):
                        return self._replayed(bucket, images, forced)
            return forward(images, forced, None, num_gates)

    def capture(self, forward: Forward, batches: Iterable[int], num_gates: int, forces: bool) -> None:
        """Capture ahead, the largest first: the smaller ones then find room in its memory."""
        with self._lock, torch.cuda.device(self._device):
            for size in sorted(filter(self._fits, {power_of_two(batch) for batch in batches}), reverse=True):
                self._bucket(forward, size, num_gates, forces)

    def _fits(self, size: int) -> bool:
        return _CAPTURES and self._pixels(size) <= self._most_pixels

    def _pixels(self, size: int) -> int:
        height, width = self._architecture.image_size
        return size * height * width

    def _affordable(self, size: int) -> bool:
        """A large bucket's activations, which its graph holds, fit four times into what is free."""
        if self._pixels(size) <= SMALL_PIXELS:
            return True
        free, _ = torch.cuda.mem_get_info(self._device)
        return 4 * activation_bytes(self._architecture, size, self._dtype) <= free

    def _replayed(self, bucket: _Bucket, images: Tensor, forced: Tensor | None) -> EnginePass:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        try:
            bucket.images[:len(images)].copy_(images)
            bucket.present.fill_(len(images))
            if forced is not None:
                assert bucket.forced is not None
                bucket.forced[:, :len(images)].copy_(forced)
            bucket.graph.replay()
            return _copied(bucket.result, len(images))
        finally:  # whatever has been enqueued, the next replay waits for it, also where there is no memory for results
            self._done.record(stream)

    def _bucket(self, forward: Forward, size: int, num_gates: int, forces: bool) -> _Bucket | None:
        key = size, num_gates, forces
        if key not in self._buckets and not self._affordable(size):
            self._buckets[key] = None
        if key not in self._buckets:
            # In a thread of its own: what stays must not belong to what this call is made in, like inference mode, or
            # the warm-up of torch.compile's CUDA graphs, in which all that a thread allocates comes from their pool.
            with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(self._device,)) as thread:
                self._buckets[key] = thread.submit(self._captured, forward, *key).result()
        return self._buckets[key]

    def _captured(self, forward: Forward, size: int, num_gates: int, forces: bool) -> _Bucket:
        architecture, device = self._architecture, self._device
        images = torch.zeros(size, architecture.in_channels, *architecture.image_size, dtype=self._dtype, device=device)
        forced = torch.zeros(architecture.num_gates, size, dtype=torch.bool, device=device) if forces else None
        present = torch.zeros(1, dtype=torch.int32, device=device)
        with self._loading():
            forward(images, forced, present, num_gates)  # a capture cannot compile or load
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are restricted while it captures: others may be allocating.
        with _CAPTURING, torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                          capture_error_mode="thread_local"):
            result = forward(images, forced, present, num_gates)
        return _Bucket(graph, images, forced, present, result)


def _copied(result: EnginePass, batch: int) -> EnginePass:
    """The first images' results in memory of their own: the bucket's is written again by the next replay."""
    decisions = result.decisions
    gates = {name: getattr(decisions, name)[:, :batch].clone() for name in ("gate_logits", "probabilities", "executed")}
    state = {name: getattr(decisions, name)[:batch].clone() for name in ("hidden", "cell")}
    return EnginePass(result.logits[:batch].clone(), Decisions(**gates, **state, forced=None))
