"""The gate step: finish the pool, embed, advance the LSTM, decide, and list the executing images, in one launch.

One program per image. The program that finishes last lists the executing images with a prefix sum over all flags, so
that their order is theirs in the batch, however the programs were scheduled. All arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipnet_rt.kernels.compaction import list_executing
from skipnet_rt.kernels.language import FUSED, INTERPRETED, check, check_device, jit, power_of_two, rounded, tl
from skipnet_rt.model.packing import PackedEmbedding, PackedFeedforwardGate, PackedLSTM


@dataclass(frozen=True)
class GateStep:
    """What a gate step writes.

    Attributes:
        logit: float32 ``[N]``; the image executes where ``sigmoid(logit) > 0.5``.
        probability: float32 ``[N]``, its sigmoid.
        executed: bool ``[N]``.
        rows: int32 ``[N]``, the executing images in order; the tail is -1.
        count: int32 ``[1]``, how many they are.
    """

    logit: Tensor
    probability: Tensor
    executed: Tensor
    rows: Tensor
    count: Tensor

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> GateStep:
        """Memory for the results of so many images."""
        logit, probability = torch.empty(2, batch, device=device)
        rows, count = (torch.empty(size, dtype=torch.int32, device=device) for size in (batch, 1))
        return cls(logit, probability, torch.empty(batch, dtype=torch.bool, device=device), rows, count)


def gate_step_ref(pooled: Tensor, embedding: PackedEmbedding, lstm: PackedLSTM, hidden: Tensor,
                  cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One RNNGate step (SkipNet paper, section 3.1) with ``torch.lstm_cell``.

    Args:
        pooled: ``[N, channels]``, the global average of a block's output, in the weights' dtype.
        embedding: the block's embedding.
        lstm: the shared cell and its projection.
        hidden, cell: ``[N, hidden_dim]``, the state before the step; left as they are.

    Returns:
        logit: ``[N]``; the image executes where ``sigmoid(logit) > 0.5``.
        hidden, cell: ``[N, hidden_dim]``, the state after it.
    """
    feature = pooled @ embedding.weight.t() + embedding.bias
    zero = torch.zeros_like(lstm.bias)
    hidden, cell = torch.lstm_cell(feature, (hidden, cell), lstm.input_weight, lstm.hidden_weight, lstm.bias, zero)
    return hidden @ lstm.projection_weight + lstm.projection_bias, hidden, cell


def pool_ref(sums: Tensor, pixels: int) -> Tensor:
    """The global average ``[N, C]`` from an activation's partial sums ``[N, tiles, C]``."""
    return sums.sum(1) / pixels


@jit()
def _pooled(sums_ptr: tl.tensor, image: tl.tensor, channel: tl.tensor, TILES: tl.constexpr, PIXELS: tl.constexpr,
            CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr) -> tl.tensor:
    """One image's global average over these channels, from its partial sums."""
    tile = tl.arange(0, BLOCK_T)
    place = (image.to(tl.int64) * TILES + tile)[:, None] * CHANNELS + channel[None, :]
    parts = tl.load(sums_ptr + place, mask=(tile < TILES)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    return tl.sum(parts, 0) / PIXELS


@jit()
def _sigmoid(z: tl.tensor) -> tl.tensor:
    return tl.div_rn(1.0, 1.0 + tl.exp(-z))  # exactly one half at 0


@jit()
def _tanh(z: tl.tensor) -> tl.tensor:
    return 2.0 * _sigmoid(2.0 * z) - 1.0


@jit()
def _lstm_gate(which: tl.constexpr, feature: tl.tensor, state: tl.tensor, input_weight_ptr: tl.tensor,
               hidden_weight_ptr: tl.tensor, lstm_bias_ptr: tl.tensor, EMBED: tl.constexpr, HIDDEN: tl.constexpr,
               BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr) -> tl.tensor:
    """One of the four preactivations ``[BLOCK_H]``, in PyTorch's order i, f, g, o."""
    unit, k, h = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    row = which * HIDDEN + unit
    known = unit < HIDDEN
    from_input = tl.load(input_weight_ptr + row[:, None] * EMBED + k[None, :],
                         mask=known[:, None] & (k < EMBED)[None, :], other=0.0)
    from_hidden = tl.load(hidden_weight_ptr + row[:, None] * HIDDEN + h[None, :],
                          mask=known[:, None] & (h < HIDDEN)[None, :], other=0.0)
    return (tl.load(lstm_bias_ptr + row, mask=known, other=0.0) + tl.sum(from_input * feature[None, :], 1)
            + tl.sum(from_hidden * state[None, :], 1))


@jit(do_not_specialize=["batch"],
     do_not_specialize_on_alignment=["forced_ptr", "logit_ptr", "probability_ptr", "executed_ptr", "count_ptr",
                                     "present_ptr"])
def gate_step_kernel(
        sums_ptr: tl.tensor,  # [N, TILES, CHANNELS]
        weight_ptr: tl.tensor,  # [EMBED, CHANNELS]; a feed-forward gate's [1, CHANNELS]
        bias_ptr: tl.tensor,  # [EMBED]
        input_weight_ptr: tl.tensor,  # [4 * HIDDEN, EMBED]; with a feed-forward gate the LSTM's pointers are None
        hidden_weight_ptr: tl.tensor,  # [4 * HIDDEN, HIDDEN]
        lstm_bias_ptr: tl.tensor,  # [4 * HIDDEN]
        projection_weight_ptr: tl.tensor,  # [HIDDEN]
        projection_bias_ptr: tl.tensor,  # [1]
        hidden_ptr: tl.tensor, cell_ptr: tl.tensor,  # [N, HIDDEN], advanced in place
        forced_ptr: tl.tensor,  # bool [N], or None
        logit_ptr: tl.tensor, probability_ptr: tl.tensor, executed_ptr: tl.tensor,  # [N]
        rows_ptr: tl.tensor, count_ptr: tl.tensor,  # int32 [N] and [1]
        present_ptr: tl.tensor,  # int32 [1]: images in use; the others never execute. None: batch
        arrivals_ptr: tl.tensor,  # int32 [1]: 0 before and after
        batch: tl.tensor,
        TILES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, EMBED: tl.constexpr, HIDDEN: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_N: tl.constexpr) -> None:
    """See the top of the file and :func:`gate_step`."""
    image = tl.program_id(0)
    present = batch if present_ptr is None else tl.load(present_ptr)
    if image < present:
        k = tl.arange(0, BLOCK_E)
        feature = tl.load(bias_ptr + k, mask=k < EMBED, other=0.0)
        for start in tl.static_range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            pooled = _pooled(sums_ptr, image, channel, TILES, PIXELS, CHANNELS, BLOCK_T)
            weight = tl.load(weight_ptr + k[:, None] * CHANNELS + channel[None, :],
                             mask=(k < EMBED)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
            feature += tl.sum(weight * pooled[None, :], 1)
        if hidden_ptr is None:
            logit = tl.sum(feature, 0)  # one term; the others are 0
        else:
            unit = tl.arange(0, BLOCK_H)
            known = unit < HIDDEN
            state = image * HIDDEN + unit
            hidden = tl.load(hidden_ptr + state, mask=known, other=0.0)
            cell = tl.load(cell_ptr + state, mask=known, other=0.0)
            i = _lstm_gate(0, feature, hidden, input_weight_ptr, hidden_weight_ptr, lstm_bias_ptr, EMBED, HIDDEN,
                           BLOCK_E, BLOCK_H)
            f = _lstm_gate(1, feature, hidden, input_weight_ptr, hidden_weight_ptr, lstm_bias_ptr, EMBED, HIDDEN,
                           BLOCK_E, BLOCK_H)
            g = _lstm_gate(2, feature, hidden, input_weight_ptr, hidden_weight_ptr, lstm_bias_ptr, EMBED, HIDDEN,
                           BLOCK_E, BLOCK_H)
            o = _lstm_gate(3, feature, hidden, input_weight_ptr, hidden_weight_ptr, lstm_bias_ptr, EMBED, HIDDEN,
                           BLOCK_E, BLOCK_H)
            cell = _sigmoid(f) * cell + _sigmoid(i) * _tanh(g)
            hidden = _sigmoid(o) * _tanh(cell)
            tl.store(hidden_ptr + state, hidden, mask=known)
            tl.store(cell_ptr + state, cell, mask=known)
            projection = tl.load(projection_weight_ptr + unit, mask=known, other=0.0)
            logit = tl.sum(projection * hidden, 0) + tl.load(projection_bias_ptr)
        probability = _sigmoid(logit)
        executed = probability > 0.5
        if forced_ptr is not None:
            executed = tl.load(forced_ptr + image) != 0
        tl.store(logit_ptr + image, logit)
        tl.store(probability_ptr + image, probability)
        tl.store(executed_ptr + image, executed)
    else:
        tl.store(executed_ptr + image, False)
    tl.debug_barrier()  # all of this program's writes are done before it says so
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        list_executing(executed_ptr, rows_ptr, count_ptr, batch, BLOCK_N)
        tl.store(arrivals_ptr, 0)


@jit()
def pool_kernel(sums_ptr: tl.tensor, pooled_ptr: tl.tensor, TILES: tl.constexpr, PIXELS: tl.constexpr,
                CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
                INTERPRETED: tl.constexpr) -> None:
    """Partial sums to averages; one program per image and block of channels."""
    image, channel = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pooled = _pooled(sums_ptr, image, channel, TILES, PIXELS, CHANNELS, BLOCK_T)
    tl.store(pooled_ptr + image.to(tl.int64) * CHANNELS + channel,
             rounded(pooled, pooled_ptr.dtype.element_ty, INTERPRETED), mask=channel < CHANNELS)


def _pool_blocks(tiles: int, channels: int) -> dict[str, int]:
    """A block of partial sums: all tiles, and as many channels as make it a few thousand values."""
    block_t = power_of_two(tiles)
    return dict(BLOCK_T=block_t, BLOCK_C=min(power_of_two(channels), max(16, 4096 // block_t), 512))


def constants(tiles: int, pixels: int, channels: int, embed: int, hidden: int) -> dict[str, Any]:
    """The gate step kernel's compile-time arguments: nothing of the batch."""
    return dict(TILES=tiles, PIXELS=pixels, CHANNELS=channels, EMBED=embed, HIDDEN=hidden,
                **_pool_blocks(tiles, channels), BLOCK_E=power_of_two(embed), BLOCK_H=power_of_two(hidden),
                BLOCK_N=256)


def gate_step(sums: Tensor, pixels: int, gate: PackedEmbedding | PackedFeedforwardGate, lstm: PackedLSTM | None = None,
              hidden: Tensor | None = None, cell: Tensor | None = None, *, forced: Tensor | None = None,
              present: Tensor | None = None, out: GateStep | None = None, arrivals: Tensor | None = None) -> GateStep:
    """A gate's step for a batch in one launch: :func:`pool_ref`, :func:`gate_step_ref`, decision, compaction.

    Args:
        sums: float32 ``[N, tiles, channels]``, the activation's partial sums as ``gathered_conv2d`` writes them: of a
            block's output, or of a feed-forward gate's last convolution.
        pixels: of the activation: what the sums are divided by.
        gate: the block's embedding, or a feed-forward gate, whose tail this is.
        lstm: the shared cell, with an embedding.
        hidden, cell: float32 ``[N, hidden_dim]``, with an embedding: the state, advanced in place.
        forced: bool ``[N]``, decisions that replace the gate's own, or None.
        present: int32 ``[1]``: only so many images are there; the others never execute. None: all N.
        out: where results go; made here if None.
        arrivals: int32 ``[1]``, zero before and after the launch, for one stream at a time; made here if None.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: no kernel can run on this machine.
    """
    if sums.dim() != 3:
        raise ValueError(f"sums must be [N, tiles, channels], got {list(sums.shape)}")
    batch, tiles, channels = sums.shape
    recurrent = isinstance(gate, PackedEmbedding)
    if recurrent != (lstm is not None) or recurrent != (hidden is not None) or recurrent != (cell is not None):
        raise ValueError("lstm, hidden and cell belong to an embedding, and to nothing else: "
                         f"got {type(gate).__name__} with {lstm is not None}, {hidden is not None}, {cell is not None}")
    embed = gate.bias.numel()
    units = 0 if lstm is None else lstm.projection_weight.numel()
    check("sums", sums, torch.float32, batch, tiles, channels)
    check("gate.weight", gate.weight, torch.float32, *((embed, channels) if recurrent else (channels,)))
    check("hidden", hidden, torch.float32, batch, units)
    check("cell", cell, torch.float32, batch, units)
    check("forced", forced, torch.bool, batch)
    check("present", present, torch.int32, 1)
    check_device(sums=sums, weight=gate.weight, hidden=hidden, cell=cell, forced=forced, present=present)
    out = out or GateStep.empty(batch, sums.device)
    if batch == 0:
        out.count.zero_()
        return out
    if arrivals is None:
        arrivals = torch.zeros(1, dtype=torch.int32, device=sums.device)
    shared = (None,) * 5 if lstm is None else (lstm.input_weight, lstm.hidden_weight, lstm.bias,
                                               lstm.projection_weight, lstm.projection_bias)
    gate_step_kernel[(batch,)](
        sums, gate.weight, gate.bias, *shared, hidden, cell, forced, out.logit, out.probability, out.executed,
        out.rows, out.count, present, arrivals, batch,
        **constants(tiles, pixels, channels, embed, max(1, units)), **FUSED)
    return out


def pool(sums: Tensor, pixels: int, dtype: torch.dtype) -> Tensor:
    """The global average of an activation from its partial sums; :func:`pool_ref` in one launch.

    Args:
        sums: float32 ``[N, tiles, C]``, contiguous.
        pixels: of the activation.
        dtype: of the result.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError: the sums are not as described.
    """
    batch, tiles, channels = sums.shape
    check("sums", sums, torch.float32, batch, tiles, channels)
    check_device(sums=sums)
    pooled = torch.empty(batch, channels, dtype=dtype, device=sums.device)
    if batch == 0:
        return pooled
    blocks = _pool_blocks(tiles, channels)
    pool_kernel[(batch, -(-channels // blocks["BLOCK_C"]))](
        sums, pooled, TILES=tiles, PIXELS=pixels, CHANNELS=channels, **blocks, INTERPRETED=INTERPRETED)
    return pooled
