"""The CUDA kernels as operations of their own, for tensors on a GPU. They wait for nothing: counts stay on the device.

Their oracles in plain PyTorch are :func:`skipnet_rt.kernels.compact_ref` and :func:`skipnet_rt.kernels.gate_step_ref`;
a convolution's is ``torch.nn.functional.conv2d``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipnet_rt import _C
from skipnet_rt.model.packing import PackedEmbedding, PackedLSTM

POOLED_PIXELS = 64
"""Pixels of one partial sum of a global average pool."""

_ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cuda or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, contiguous, on a GPU; got {tensor.dtype} "
                         f"{list(tensor.shape)} on {tensor.device}")
    return tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(tensor: Tensor) -> tuple[int, int]:
    """The device's index, and PyTorch's current stream there."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def compact(executed: Tensor) -> tuple[Tensor, Tensor]:
    """The executing images in order. Equals :func:`skipnet_rt.kernels.compact_ref`.

    Args:
        executed: bool ``[N]``.

    Returns:
        rows: int32 ``[N]``, the executing images in ascending order; the tail is -1.
        count: int32 ``[1]``.
    """
    _check("executed", executed, (executed.numel(),), torch.bool)
    rows = torch.empty(len(executed), dtype=torch.int32, device=executed.device)
    count = torch.empty(1, dtype=torch.int32, device=executed.device)
    _C.cuda_compact(executed.data_ptr(), len(executed), rows.data_ptr(), count.data_ptr(), *_stream(executed))
    return rows, count


@dataclass(frozen=True)
class Decided:
    """What a gate has decided for a batch, all ``[N]``, and the executing images.

    Attributes:
        logit, probability: float32.
        executed: bool.
        rows, count: as :func:`compact` returns them.
    """

    logit: Tensor
    probability: Tensor
    executed: Tensor
    rows: Tensor
    count: Tensor


class RNNGate:
    """RNNGate after one block: finish the pool, embed, LSTM step, decide and compact in one launch.

    Args:
        embedding, lstm: weights on a GPU, float32.
    """

    def __init__(self, embedding: PackedEmbedding, lstm: PackedLSTM) -> None:
        self.embedding, self.lstm = embedding, lstm
        embed, channels = embedding.weight.shape
        hidden = len(lstm.projection_weight)
        shapes = {
            "embedding_weight": (embedding.weight, (embed, channels)),
            "embedding_bias": (embedding.bias, (embed,)),
            "input_weight": (lstm.input_weight, (4 * hidden, embed)),
            "hidden_weight": (lstm.hidden_weight, (4 * hidden, hidden)),
            "bias": (lstm.bias, (4 * hidden,)),
            "projection_weight": (lstm.projection_weight, (hidden,)),
        }
        self._weights = {name: _check(name, weight, shape, torch.float32).data_ptr()
                         for name, (weight, shape) in shapes.items()}
        self._projection_bias = lstm.projection_bias.item()
        self._arrivals = torch.zeros(1, dtype=torch.int32, device=lstm.bias.device)  # scratch: calls are in one stream

    def __call__(self, sums: Tensor, pixels: int, hidden: Tensor, cell: Tensor,
                 forced: Tensor | None = None) -> Decided:
        """Decide for a batch.

        Args:
            sums: float32 ``[N, tiles, channels]``, partial sums of the block's output over all of its pixels.
            pixels: of an image.
            hidden, cell: float32 ``[N, hidden_dim]``, advanced in place.
            forced: bool ``[N]``, replaces the gate's own decisions.
        """
        embed, channels = self.embedding.weight.shape
        units, (batch, tiles) = len(self.lstm.projection_weight), sums.shape[:2]
        _check("sums", sums, (batch, tiles, channels), torch.float32)
        for name, state in (("hidden", hidden), ("cell", cell)):
            _check(name, state, (batch, units), torch.float32)
        if forced is not None:
            _check("forced", forced, (batch,), torch.bool)

        def empty(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=sums.device)

        decided = Decided(empty(batch, torch.float32), empty(batch, torch.float32), empty(batch, torch.bool),
                          empty(batch, torch.int32), empty(1, torch.int32))
        device, stream = _stream(sums)
        _C.cuda_gate_step(
            **self._weights, projection_bias=self._projection_bias, channels=channels, embed=embed, hidden_size=units,
            batch=batch, sums=sums.data_ptr(), tiles=tiles, pixels=pixels, hidden=hidden.data_ptr(),
            cell=cell.data_ptr(), logit=decided.logit.data_ptr(), probability=decided.probability.data_ptr(),
            executed=decided.executed.data_ptr(), forced=_address(forced), rows=decided.rows.data_ptr(),
            count=decided.count.data_ptr(), arrivals=self._arrivals.data_ptr(), device=device, stream=stream)
        return decided


def gathered_conv(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, *, stride: int = 1, rows: Tensor | None = None,
                  count: Tensor | None = None, gathers: bool = True, scatters: bool = True, relu: bool = False,
                  residual: Tensor | None = None, sums: Tensor | None = None, tf32: bool = False) -> None:
    """``y = relu(conv2d(x) + bias + residual)`` for some images of a batch, channels last.

    Args:
        x: ``[N, H, W, C]``, float32, float16 or bfloat16; C is a multiple of 8.
        weight: ``[O, kernel, kernel, C]`` in x's dtype; O is a multiple of 8. The padding is half of the kernel.
        bias: float32 ``[O]``.
        y: ``[N, H', W', O]`` in x's dtype; places of other images are left alone.
        stride: 1 or more.
        rows, count: the images, as :func:`compact` returns them; None: all.
        gathers: x holds the whole batch; otherwise the list's i-th image is at place i.
        scatters: the same for y, residual and sums.
        relu: of the sum; NaN stays NaN.
        residual: as y, and may be y itself.
        sums: float32 ``[N, ceil(H' W' / POOLED_PIXELS), O]``, receives y's sums over so many pixels each.
        tf32: products of float32 tensors are taken in TF32, on tensor cores.
    """
    if x.dim() != 4 or x.dtype not in _ELEMENTS:
        raise ValueError(f"x: expected [N, H, W, C] in {', '.join(map(str, _ELEMENTS))}, got {x.dtype} {list(x.shape)}")
    if (rows is None) != (count is None):
        raise ValueError("rows and count: expected both or neither")
    if tf32 and x.dtype != torch.float32:
        raise ValueError(f"tf32: expected float32 tensors, got {x.dtype}")
    batch, height, width, channels = x.shape
    out, kernel = weight.shape[0], weight.shape[1]
    out_shape = (batch, (height - 1) // stride + 1, (width - 1) // stride + 1, out)
    _check("x", x, tuple(x.shape), x.dtype)
    _check("weight", weight, (out, kernel, kernel, channels), x.dtype)
    _check("bias", bias, (out,), torch.float32)
    _check("y", y, out_shape, x.dtype)
    if residual is not None:
        _check("residual", residual, out_shape, x.dtype)
    if sums is not None:
        _check("sums", sums, (batch, -(-out_shape[1] * out_shape[2] // POOLED_PIXELS), out), torch.float32)
    if rows is not None and count is not None:
        _check("rows", rows, (batch,), torch.int32)
        _check("count", count, (1,), torch.int32)
    element = "tf32" if tf32 else _ELEMENTS[x.dtype]
    partial, arrivals = None, None  # partial sums of a split K, and how many of a tile's slices are there
    if floats := _C.cuda_partial_sums(element, channels, out, kernel, stride, batch, height, width):
        partial = torch.empty(floats, device=x.device)
        arrivals = torch.zeros(_C.cuda_partial_tiles, dtype=torch.int32, device=x.device)
    _C.cuda_gathered_conv(element, channels, out, kernel, stride, weight.data_ptr(), bias.data_ptr(), batch, height,
                          width, _address(rows), _address(count), gathers, scatters, relu, x.data_ptr(),
                          _address(residual), y.data_ptr(), _address(sums), _address(partial), _address(arrivals),
                          *_stream(x))
