"""Order-preserving compaction: which images of a batch execute; gather and scatter by the list."""

from __future__ import annotations

import torch
from torch import Tensor

from skipnet_rt.kernels.language import check, check_device, jit, programs, tl

_BLOCK = 1024


def compact_ref(executed: Tensor) -> tuple[Tensor, Tensor]:
    """The executing images in order, with a count that can stay on the device.

    Equals ``executed.nonzero()`` padded to the batch, by a prefix sum as a kernel does it.

    Args:
        executed: bool ``[N]``.

    Returns:
        rows: int32 ``[N]``, the executing images in ascending order; the tail is -1.
        count: int32 ``[1]``.
    """
    _check_executed(executed)
    batch = executed.shape[0]
    place = executed.cumsum(0) - 1
    rows = torch.full((batch + 1,), -1, dtype=torch.int32, device=executed.device)
    images = torch.arange(batch, dtype=torch.int32, device=executed.device)
    rows.scatter_(0, torch.where(executed, place, batch), torch.where(executed, images, -1))
    return rows[:batch], executed.sum(dtype=torch.int32).view(1)


def gather_ref(x: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """``x[rows[:count]]``, padded with zeros to the batch. Arguments as for :func:`gather`."""
    listed = rows[:int(count)].long()
    return torch.cat([x[listed], x.new_zeros(len(x) - len(listed), *x.shape[1:])])


def scatter_ref(y: Tensor, rows: Tensor, count: Tensor, out: Tensor) -> Tensor:
    """``out[rows[:count]] = y[:count]``. Arguments as for :func:`scatter`; ``out`` is left as it is."""
    listed = rows[:int(count)].long()
    return out.index_copy(0, listed, y[:len(listed)])


@jit()
def list_executing(executed_ptr: tl.tensor, rows_ptr: tl.tensor, count_ptr: tl.tensor, batch: tl.tensor,
                   BLOCK: tl.constexpr) -> None:
    """One program's work: write rows and count for the flags ``executed``, bool ``[batch]``."""
    count = tl.full((), 0, tl.int32)
    for start in tl.range(0, batch, BLOCK):
        image = start + tl.arange(0, BLOCK)
        # Past the first-level cache: other programs may have written the flags just now.
        executed = tl.load(executed_ptr + image, mask=image < batch, other=0, cache_modifier=".cg").to(tl.int32)
        place = count + tl.cumsum(executed, 0) - executed
        tl.store(rows_ptr + place, image, mask=executed != 0)
        count += tl.sum(executed, 0)
    for start in tl.range(0, batch, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(rows_ptr + place, -1, mask=(place >= count) & (place < batch))
    tl.store(count_ptr, count)


@jit(do_not_specialize=["batch"])
def compact_kernel(executed_ptr: tl.tensor, rows_ptr: tl.tensor, count_ptr: tl.tensor, batch: tl.tensor,
                   BLOCK: tl.constexpr) -> None:
    """Compaction alone, in one program."""
    list_executing(executed_ptr, rows_ptr, count_ptr, batch, BLOCK)


@jit(do_not_specialize=["size"])
def move_kernel(from_ptr: tl.tensor, to_ptr: tl.tensor, rows_ptr: tl.tensor, count_ptr: tl.tensor, size: tl.tensor,
                SCATTER: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Copy listed images of ``size`` elements; a persistent grid over ``count`` of them."""
    blocks = tl.cdiv(size, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.load(count_ptr) * blocks, tl.num_programs(0)):
        place = (tile // blocks).to(tl.int64)
        image = tl.load(rows_ptr + place).to(tl.int64)
        element = tile % blocks * BLOCK + tl.arange(0, BLOCK)
        source, target = (place, image) if SCATTER else (image, place)
        value = tl.load(from_ptr + source * size + element, mask=element < size)
        tl.store(to_ptr + target * size + element, value, mask=element < size)


def compact(executed: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`compact_ref` in one launch; the count never reaches the host.

    Args:
        executed: bool ``[N]``, contiguous.

    Returns:
        rows: int32 ``[N]``, the executing images in ascending order; the tail is -1.
        count: int32 ``[1]``.

    Raises:
        ValueError: the flags are not as described.
    """
    _check_executed(executed)
    check("executed", executed, torch.bool, *executed.shape)
    check_device(executed=executed)
    rows = torch.empty(len(executed), dtype=torch.int32, device=executed.device)
    count = torch.empty(1, dtype=torch.int32, device=executed.device)
    compact_kernel[(1,)](executed, rows, count, len(executed), BLOCK=_BLOCK)
    return rows, count


def gather(x: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """The listed images, one after the other: ``x[rows[:count]]`` without the count on the host.

    Args:
        x: ``[N, ...]``, contiguous, of any dtype.
        rows: int32 ``[N]``, its first ``count`` entries in ``[0, N)``.
        count: int32 ``[1]``.

    Returns:
        ``[N, ...]``, of which the first ``count`` images are written.

    Raises:
        ValueError: an argument is not as described.
    """
    out = torch.empty_like(x)
    _move(x, out, rows, count, scatter=False)
    return out


def scatter(y: Tensor, rows: Tensor, count: Tensor, out: Tensor) -> Tensor:
    """The inverse: ``out[rows[:count]] = y[:count]`` in place, without the count on the host.

    Args:
        y: ``[N, ...]``, contiguous, of any dtype.
        rows: int32 ``[N]``, its first ``count`` entries in ``[0, N)``, each once.
        count: int32 ``[1]``.
        out: as ``y``; images that are not listed keep what they have.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument is not as described.
    """
    check("out", out, y.dtype, *y.shape)
    _move(y, out, rows, count, scatter=True)
    return out


def _move(source: Tensor, target: Tensor, rows: Tensor, count: Tensor, *, scatter: bool) -> None:
    check("y" if scatter else "x", source, source.dtype, *source.shape)
    check("rows", rows, torch.int32, len(source))
    check("count", count, torch.int32, 1)
    check_device(source=source, target=target, rows=rows, count=count)
    if source.numel() == 0:
        return
    size = source[0].numel()
    grid = min(programs(source.device, 4), len(source) * -(-size // _BLOCK))
    move_kernel[(grid,)](source, target, rows, count, size, SCATTER=scatter, BLOCK=_BLOCK)


def _check_executed(executed: Tensor) -> None:
    if executed.dim() != 1 or executed.dtype != torch.bool:
        raise ValueError(f"executed must be bool [N], got {executed.dtype} {list(executed.shape)}")
