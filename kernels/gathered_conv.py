"""Convolution of the listed images: implicit GEMM, channels-last, with every epilogue that a residual block needs.

One kernel for every layer of every network. Rows of the product are output pixels, columns are output channels, and
the sum runs over taps and input channels. The grid is persistent: programs stride over the tiles of ``count`` images,
and ``count`` is read on the device.

A long sum is cut into slices (split-K). Where tiles are too few for the GPU, a program computes one slice, and the one
that arrives last adds them all; where they are many, a program computes all slices of its tile.

Bits do not depend on the batch: an output element is summed in one order, which the configuration alone decides: slice
by slice from zero, each block by block of BLOCK_K, then the slices from first to last. A pooled sum is formed inside
tiles that never span two images.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from skipnet_rt.kernels.language import (
    FUSED,
    INTERPRETED,
    check,
    check_device,
    jit,
    power_of_two,
    programs,
    rounded,
    tl,
)

POOL_TILE = 64
"""Pixels that go into one partial sum of an image's pool: fixed, because layers that write the same sums must agree."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """What a convolution's configuration may depend on: never the batch.

    Attributes:
        height, width, channels: of the input.
        out_channels: of the output.
        kernel, stride, padding: in pixels, the same in both directions.
        dtype: of weights and products.
        pooled: pooled sums are written too.
        tf32: float32 operands are cut to TF32, for tensor cores.
    """

    height: int
    width: int
    channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    dtype: torch.dtype
    pooled: bool
    tf32: bool = False

    @property
    def out_size(self) -> tuple[int, int]:
        """The output's height and width."""
        height, width = ((size + 2 * self.padding - self.kernel) // self.stride + 1
                         for size in (self.height, self.width))
        return height, width

    def __str__(self) -> str:
        """All of it: ``3x3/2+1 64-128 of 56x56 float16 pooled`` has stride 2 and padding 1."""
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return (f"{self.kernel}x{self.kernel}/{self.stride}+{self.padding} {self.channels}-{self.out_channels} of "
                f"{self.height}x{self.width} {dtype}{' pooled' if self.pooled else ''}")


@dataclass(frozen=True)
class Configuration:
    """How the kernel is cut for a layer.

    Attributes:
        block_m: output pixels of a tile; for a pooled layer a multiple of :data:`POOL_TILE`.
        block_n: output channels of a tile.
        block_k: terms of a sum that one product of blocks adds. All configurations of a layer have the same.
        warps: warps of a program.
        stages: blocks of operands in flight.
        split_k: slices that a sum is cut into, which may be formed at the same time.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1

    def __str__(self) -> str:
        """Such as ``64x32x64, 4 warps, 5 stages, split-K 4``."""
        split_k = f", split-K {self.split_k}" if self.split_k > 1 else ""
        return f"{self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages{split_k}"


# (block_m, block_n, warps, stages) by the products' format, best guess first. The first ones fit the shared
# memory of every GPU that we compile for; none spills registers (docs/triton.md). tuning.py measures what is fastest.
_TILINGS = {
    "16 bits": ((128, 128, 8, 3), (64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (64, 256, 8, 3), (64, 32, 4, 5),
        (128, 32, 4, 4), (64, 16, 4, 5), (128, 16, 4, 4)),
    "tf32": ((128, 128, 8, 3), (64, 64, 4, 4), (128, 64, 4, 4), (64, 32, 4, 5), (128, 32, 4, 4), (64, 16, 4, 5)),
    "float32": ((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (64, 16, 4, 3)),
}


@functools.cache
def configurations(layer: Layer) -> tuple[Configuration, ...]:
    """What is worth measuring for a layer, best guess first."""
    pixels, channels = layer.out_size[0] * layer.out_size[1], max(16, power_of_two(layer.out_channels))
    if INTERPRETED:  # few large tiles: time goes by the number of operations, not by their size
        block_k = max(16, min(256, power_of_two(layer.kernel ** 2 * layer.channels) // 2))
        block_m = max(POOL_TILE, min(512, power_of_two(pixels))) if layer.pooled else 512
        return (Configuration(block_m, channels, block_k, warps=1, stages=1, split_k=_split_k(layer, block_k)),)
    size = layer.dtype.itemsize
    # Whole channels of one tap where they divide.
    block_k = next((block for block in (128 // size, 32, 16) if layer.channels % block == 0), 32)
    # A pooled layer's tiles do not span images: no wide ones where they would mostly be padding.
    widest = 9 / 8 * _padded(pixels, POOL_TILE)
    tilings = [tiling for tiling in _TILINGS["tf32" if layer.tf32 else "16 bits" if size == 2 else "float32"]
               if tiling[1] <= channels and not (layer.pooled and _padded(pixels, tiling[0]) > widest)]
    unsplit = [Configuration(block_m, block_n, block_k, warps, stages) for block_m, block_n, warps, stages in tilings]
    split_k = _split_k(layer, block_k)
    # Small tiles only: there are more of them, and a program holds a tile twice, one slice and the sum of all.
    split = [replace(configuration, split_k=split_k) for configuration in unsplit
             if split_k > 1 and configuration.block_m * configuration.block_n <= 64 * 64]
    return (*split, *unsplit)


def _split_k(layer: Layer, block_k: int) -> int:
    """Into how many slices a sum is cut, by the layer alone: docs/triton.md has the reasons for these numbers."""
    blocks = -(-layer.kernel ** 2 * layer.channels // block_k)
    if INTERPRETED:  # in two wherever that is possible: small networks are to show it
        return min(2, blocks)
    tiles = -(-layer.out_size[0] * layer.out_size[1] // 64) * -(-layer.out_channels // 64)
    return max(1, min(8, blocks // 8, 128 // tiles))


def _padded(size: int, block: int) -> int:
    """Up to whole blocks."""
    return -(-size // block) * block


def _tiles(layer: Layer, configuration: Configuration, batch: int) -> int:
    """Tiles of the product for so many images."""
    pixels = layer.out_size[0] * layer.out_size[1]
    rows = batch * (_padded(pixels, configuration.block_m) if layer.pooled else pixels)
    return -(-rows // configuration.block_m) * -(-layer.out_channels // configuration.block_n)


@dataclass(frozen=True)
class Workspace:
    """Where the slices of few tiles are left to be added: for one launch at a time.

    Attributes:
        partials: float32, flat, a tile's slices one after the other.
        arrivals: int32, flat, how many slices of a tile are there; zero before and after a launch.
    """

    partials: Tensor
    arrivals: Tensor

    @classmethod
    def empty(cls, plans: Iterable[tuple[Layer, Configuration]], batch: int, device: torch.device) -> Workspace:
        """Enough for this many images in each of these layers. Tiles that fill half of the GPU need none."""
        few = max(1, programs(device) // 2)
        sizes = [(min(few, _tiles(layer, configuration, batch)), _partials_per_tile(configuration))
                 for layer, configuration in plans if configuration.split_k > 1]
        return cls(torch.empty(max((tiles * partials for tiles, partials in sizes), default=0), device=device),
                   torch.zeros(max((tiles for tiles, _ in sizes), default=1), dtype=torch.int32, device=device))

    def capacity(self, configuration: Configuration) -> int:
        """How many tiles' partial sums it takes."""
        return min(len(self.arrivals), len(self.partials) // _partials_per_tile(configuration))


def _partials_per_tile(configuration: Configuration) -> int:
    """How many values of a tile's slices stand in a workspace."""
    return configuration.split_k * configuration.block_m * configuration.block_n


def sum_tiles(size: tuple[int, int]) -> int:
    """Partial sums per image, for an activation of this height and width."""
    return -(-size[0] * size[1] // POOL_TILE)


def gathered_conv2d_ref(x: Tensor, weight: Tensor, bias: Tensor, count: Tensor | None = None, *,
                        gather: Tensor | None = None, scatter: Tensor | None = None, stride: int = 1, padding: int = 0,
                        relu: bool = False, residual: Tensor | None = None, out: Tensor | None = None,
                        sums: Tensor | None = None) -> Tensor:
    """:func:`gathered_conv2d` in plain PyTorch, with the count on the host. Writes ``out`` and ``sums`` likewise."""
    images = len(x) if count is None else int(count)
    read = torch.arange(images, device=x.device) if gather is None else gather[:images].long()
    written = torch.arange(images, device=x.device) if scatter is None else scatter[:images].long()
    # On a GPU: float32 that is float32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        y = F.conv2d(x[read].float().permute(0, 3, 1, 2), weight.float().permute(3, 2, 0, 1), bias, stride, padding)
    y = y.permute(0, 2, 3, 1)
    if residual is not None:
        y = y + residual[written].float()
    y = (F.relu(y) if relu else y).to(x.dtype if out is None else out.dtype)
    if out is None:
        out = y.new_empty(len(x), *y.shape[1:])
    out[written] = y
    if sums is not None:
        tiles = torch.split(y.float().flatten(1, 2), POOL_TILE, dim=1)
        sums[written] = torch.stack([tile.sum(1) for tile in tiles], 1)
    return out


@jit(do_not_specialize=["batch", "capacity"])
def gathered_conv_kernel(
        x_ptr: tl.tensor,  # [N, HEIGHT, WIDTH, CHANNELS], by the strides below
        weight_ptr: tl.tensor,  # [KERNEL * KERNEL * CHANNELS, OUT_CHANNELS], by the strides below
        bias_ptr: tl.tensor,  # float32 [OUT_CHANNELS]
        residual_ptr: tl.tensor,  # as out, or None
        out_ptr: tl.tensor,  # [N, OUT_HEIGHT, OUT_WIDTH, OUT_CHANNELS]
        sums_ptr: tl.tensor,  # float32 [N, tiles, OUT_CHANNELS], or None
        gather_ptr: tl.tensor,  # int32 [N]: where slot i reads; None: i
        scatter_ptr: tl.tensor,  # int32 [N]: where slot i writes; None: i
        count_ptr: tl.tensor,  # int32 [1], slots in use; None: batch
        partials_ptr: tl.tensor,  # float32 [capacity, SPLIT_K, BLOCK_M, BLOCK_N]; None with one slice
        arrivals_ptr: tl.tensor,  # int32 [capacity]: 0 before and after; None with one slice
        batch: tl.tensor, capacity: tl.tensor,
        IMAGE_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
        HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
        OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_CHANNELS: tl.constexpr,
        KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, RELU: tl.constexpr,
        TERM_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
        POOL_TILE: tl.constexpr, INTERPRETED: tl.constexpr) -> None:
    """See the top of the file and :func:`gathered_conv2d`."""
    PIXELS: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    TERMS: tl.constexpr = KERNEL * KERNEL * CHANNELS
    WHOLE_TAPS: tl.constexpr = CHANNELS % BLOCK_K == 0
    TILE_COLUMNS: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    IMAGE_TILES: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    POOL_TILES: tl.constexpr = (PIXELS + POOL_TILE - 1) // POOL_TILE
    # Rows of the product that an image takes: with pooled sums whole tiles, else just its pixels.
    SPAN: tl.constexpr = PIXELS if sums_ptr is None else IMAGE_TILES * BLOCK_M
    # Terms of a slice: whole blocks.
    SLICE_TERMS: tl.constexpr = (TERMS + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    images = batch if count_ptr is None else tl.load(count_ptr)
    tiles = tl.cdiv(images * SPAN, BLOCK_M) * TILE_COLUMNS
    slices_per_program = SPLIT_K  # how many slices of a tile one program sums up: all, or where tiles are few, one
    if SPLIT_K > 1:
        slices_per_program = tl.where(tiles <= capacity, 1, SPLIT_K)
    for item in tl.range(tl.program_id(0), tiles * (SPLIT_K // slices_per_program), tl.num_programs(0)):
        tile, first_slice = item * slices_per_program // SPLIT_K, item * slices_per_program % SPLIT_K
        row = tile // TILE_COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)
        channel_out = tile % TILE_COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
        slot, pixel = row // SPAN, row % SPAN
        used = (slot < images) & (pixel < PIXELS)
        source = slot if gather_ptr is None else tl.load(gather_ptr + slot, mask=used, other=0)
        y = (pixel // OUT_WIDTH * STRIDE - PADDING)[:, None]
        x = (pixel % OUT_WIDTH * STRIDE - PADDING)[:, None]
        corner = source.to(tl.int64)[:, None] * IMAGE_STRIDE + y * ROW_STRIDE + x * PIXEL_STRIDE
        total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for begin in tl.range(first_slice * SLICE_TERMS, (first_slice + slices_per_program) * SLICE_TERMS, SLICE_TERMS):
            slice_sum = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            for start in tl.range(begin, tl.minimum(begin + SLICE_TERMS, TERMS), BLOCK_K):
                term = start + tl.arange(0, BLOCK_K)
                tap = (start if WHOLE_TAPS else term[None, :]) // CHANNELS  # one for the block, or one per column
                dy, dx = tap // KERNEL, tap % KERNEL
                inside, known = used[:, None], (channel_out < OUT_CHANNELS)[None, :]
                if PADDING > 0:
                    inside &= (y + dy >= 0) & (y + dy < HEIGHT) & (x + dx >= 0) & (x + dx < WIDTH)
                if not WHOLE_TAPS:
                    inside &= (term < TERMS)[None, :]
                    known &= (term < TERMS)[:, None]
                offset = dy * ROW_STRIDE + dx * PIXEL_STRIDE + (term[None, :] - tap * CHANNELS) * CHANNEL_STRIDE
                a = tl.load(x_ptr + (corner + offset), mask=inside, other=0.0)
                b = tl.load(weight_ptr + term[:, None] * TERM_STRIDE + channel_out[None, :] * OUT_STRIDE, mask=known,
                            other=0.0)
                a = a.to(b.dtype)
                if INTERPRETED:  # it multiplies bfloat16 as the integers that it keeps them in
                    a, b = a.to(tl.float32), b.to(tl.float32)
                slice_sum = tl.dot(a, b, slice_sum, input_precision=PRECISION)
            total += slice_sum
        complete = slices_per_program == SPLIT_K
        if SPLIT_K > 1:
            value = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            partials = partials_ptr + tile * SPLIT_K * BLOCK_M * BLOCK_N + value
            if not complete:
                tl.store(partials + first_slice * BLOCK_M * BLOCK_N, total)
                tl.debug_barrier()  # all of this program's writes are done before it says so
                complete = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
                if complete:
                    tl.store(arrivals_ptr + tile, 0)
                    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
                    for other in tl.range(0, SPLIT_K):
                        # Past the first-level cache: other programs have written them just now.
                        total += tl.load(partials + other * BLOCK_M * BLOCK_N, cache_modifier=".cg")
        if complete:
            total += tl.load(bias_ptr + channel_out, mask=channel_out < OUT_CHANNELS, other=0.0)[None, :]
            written = slot if scatter_ptr is None else tl.load(scatter_ptr + slot, mask=used, other=0)
            place = (written.to(tl.int64) * PIXELS + pixel)[:, None] * OUT_CHANNELS + channel_out[None, :]
            known = used[:, None] & (channel_out < OUT_CHANNELS)[None, :]
            if residual_ptr is not None:
                total += tl.load(residual_ptr + place, mask=known, other=0.0).to(tl.float32)
            if RELU:
                total = tl.where(total < 0.0, 0.0, total)  # NaN stays
            result = rounded(total, out_ptr.dtype.element_ty, INTERPRETED)
            tl.store(out_ptr + place, result, mask=known)
            if sums_ptr is not None:
                pooled_slot = tile // TILE_COLUMNS // IMAGE_TILES
                image = pooled_slot if scatter_ptr is None else tl.load(scatter_ptr + pooled_slot)
                values = tl.where(used[:, None], result.to(tl.float32), 0.0)
                pooled = tl.sum(tl.reshape(values, (BLOCK_M // POOL_TILE, POOL_TILE, BLOCK_N)), 1)
                first_pool_tile = tile // TILE_COLUMNS % IMAGE_TILES * (BLOCK_M // POOL_TILE)
                pool_tile = first_pool_tile + tl.arange(0, BLOCK_M // POOL_TILE)
                place = (image.to(tl.int64) * POOL_TILES + pool_tile)[:, None] * OUT_CHANNELS + channel_out[None, :]
                tl.store(sums_ptr + place, pooled,
                         mask=(pool_tile < POOL_TILES)[:, None] & (channel_out < OUT_CHANNELS)[None, :])


def constants(layer: Layer, configuration: Configuration, strides: tuple[int, ...], weight_strides: tuple[int, ...],
              relu: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments. Strides: the input's, image to channel; the weights', term and out."""
    image, row, pixel, channel = strides
    out_height, out_width = layer.out_size
    return dict(IMAGE_STRIDE=image, ROW_STRIDE=row, PIXEL_STRIDE=pixel, CHANNEL_STRIDE=channel,
                HEIGHT=layer.height, WIDTH=layer.width, CHANNELS=layer.channels,
                OUT_HEIGHT=out_height, OUT_WIDTH=out_width, OUT_CHANNELS=layer.out_channels,
                KERNEL=layer.kernel, STRIDE=layer.stride, PADDING=layer.padding, RELU=relu,
                TERM_STRIDE=weight_strides[0], OUT_STRIDE=weight_strides[1], PRECISION="tf32" if layer.tf32 else "ieee",
                BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n, BLOCK_K=configuration.block_k,
                SPLIT_K=configuration.split_k, POOL_TILE=POOL_TILE, INTERPRETED=INTERPRETED)


def gathered_conv2d(x: Tensor, weight: Tensor, bias: Tensor, count: Tensor | None = None, *,
                    gather: Tensor | None = None, scatter: Tensor | None = None, stride: int = 1, padding: int = 0,
                    relu: bool = False, residual: Tensor | None = None, out: Tensor | None = None,
                    sums: Tensor | None = None, tf32: bool = False, configuration: Configuration | None = None,
                    workspace: Workspace | None = None) -> Tensor:
    """Convolve ``count`` images in one launch, reading and writing by row lists; the count never reaches the host.

    For every slot ``i < count``: ``out[scatter[i]] = relu(conv2d(x[gather[i]]) + bias + residual[scatter[i]])``, where
    a list that is None means ``i``. Sums are float32; ReLU keeps NaN.

    Args:
        x: ``[N, H, W, C]`` with any strides, float32, bfloat16 or float16.
        weight: ``[kernel, kernel, C, O]``: PyTorch's, permuted by ``(2, 3, 1, 0)``. Products are formed in its dtype,
            to which ``x`` is converted. Its memory is contiguous in this order, or as ``[O, kernel, kernel, C]``, which
            suits TF32.
        bias: float32 ``[O]``.
        count: int32 ``[1]``; None for all N.
        gather, scatter: int32 ``[N]``; the first ``count`` entries in ``[0, N)``, for ``scatter`` each once.
        stride, padding: in pixels.
        relu: ends with a ReLU.
        residual: ``[N, H', W', O]`` in the output's dtype, contiguous; may be ``out`` itself.
        out: ``[N, H', W', O]`` in one of these dtypes, contiguous; made here in x's if None. What is not listed keeps
            its content.
        sums: float32 ``[N, tiles, O]``, the written images' sums over every :data:`POOL_TILE` pixels of the (rounded)
            output, ``tiles`` being :func:`sum_tiles` of its size; what is not listed keeps its content.
        tf32: cut float32 operands to TF32, for tensor cores.
        configuration: one of :func:`configurations`; by default the first.
        workspace: for one launch at a time; made here if None. One smaller than ``Workspace.empty`` gives lets
            programs share fewer tiles, which changes no bit.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: no kernel can run on this machine.
    """
    layer = _checked_layer(x, weight, stride, padding, sums is not None, tf32)
    batch, out_shape = len(x), (*layer.out_size, layer.out_channels)
    if out is None:
        out = torch.empty(batch, *out_shape, dtype=x.dtype, device=x.device)
    check("bias", bias, torch.float32, layer.out_channels)
    check("count", count, torch.int32, 1)
    check("gather", gather, torch.int32, batch)
    check("scatter", scatter, torch.int32, batch)
    check("out", out, out.dtype if out.dtype in DTYPES else x.dtype, batch, *out_shape)
    check("residual", residual, out.dtype, batch, *out_shape)
    check("sums", sums, torch.float32, batch, sum_tiles(layer.out_size), layer.out_channels)
    check_device(x=x, weight=weight, bias=bias, count=count, gather=gather, scatter=scatter, residual=residual,
                 out=out, sums=sums)
    if batch == 0:
        return out
    configuration = configuration or configurations(layer)[0]
    partials, arrivals, capacity = None, None, 0
    if configuration.split_k > 1:
        workspace = workspace or Workspace.empty([(layer, configuration)], batch, x.device)
        partials, arrivals, capacity = workspace.partials, workspace.arrivals, workspace.capacity(configuration)
    grid = min(_tiles(layer, configuration, batch) * configuration.split_k, programs(x.device, 2))
    gathered_conv_kernel[(grid,)](
        x, weight, bias, residual, out, sums, gather, scatter, count, partials, arrivals, batch, capacity,
        **constants(layer, configuration, x.stride(), _by_term(weight), relu),
        num_warps=configuration.warps, num_stages=configuration.stages, **FUSED)
    return out


def _by_term(weight: Tensor) -> tuple[int, ...]:
    """The weights' strides as ``[kernel * kernel * C, O]``."""
    return weight.view(-1, weight.shape[3]).stride()


def _checked_layer(x: Tensor, weight: Tensor, stride: int, padding: int, pooled: bool, tf32: bool) -> Layer:
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [N, H, W, C] in {', '.join(map(str, DTYPES))}, got {x.dtype} {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[0] != weight.shape[1] or weight.shape[2] != x.shape[3] \
            or weight.dtype not in DTYPES:
        raise ValueError(f"weight must be [kernel, kernel, {x.shape[3]}, O], got {weight.dtype} {list(weight.shape)}")
    if not (weight.is_contiguous() or weight.permute(3, 0, 1, 2).is_contiguous()):
        raise ValueError(f"weight must be contiguous as [kernel, kernel, C, O] or as [O, kernel, kernel, C], "
                         f"got strides {list(weight.stride())} for {list(weight.shape)}")
    if tf32 and weight.dtype != torch.float32:
        raise ValueError(f"tf32 is for float32 weights, got {weight.dtype}")
    kernel = weight.shape[0]
    if stride < 1 or padding < 0 or min(x.shape[1:3]) + 2 * padding < kernel:
        raise ValueError(f"stride must be at least 1, and the padded input no smaller than the kernel, got stride "
                         f"{stride}, padding {padding}, input {list(x.shape[1:3])}, kernel {kernel}")
    _, height, width, channels = x.shape
    return Layer(height, width, channels, weight.shape[3], kernel, stride, padding, weight.dtype, pooled, tf32)
