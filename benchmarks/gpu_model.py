"""How long a call should take on a GPU, predicted: cycles of the machine code's pieces and a device's public figures.

    python benchmarks/gpu_model.py [--json FILE]

Nothing here was measured: docs/gpu-model.md says what is assumed, and which of its predictions the first run on
hardware can refute. benchmarks/gpu_cycles.py makes what it reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, comb
from pathlib import Path
from typing import Any

import skipnet_rt as srt
from skipnet_rt.model.arch import BlockPlan, SkipNetArch

CYCLES = Path(__file__).parent / "results" / "predicted" / "cycles.json"


TO_L2 = 280  # cycles
EMPTY = 600  # cycles of a convolution's launch that finds no image


@cache
def _all_cycles() -> dict[str, dict[str, Any]]:
    return json.loads(CYCLES.read_text())


@dataclass(frozen=True)
class Device:
    """A GPU's public figures.

    Attributes:
        arch: whose units it has.
        multiprocessors, clock: how many, and their highest frequency in Hz.
        shared_memory: of a thread block, in bytes.
        l2, memory: bandwidths in bytes per second.
        cache: the L2's size in bytes.
        launch, chained: seconds between the end of a kernel and the start of the next in a CUDA graph, with an ordinary
            and with a programmatic dependent launch; the same where there is none.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    shared_memory: int
    l2: float
    memory: float
    cache: int
    launch: float
    chained: float

    @property
    def cycles(self) -> dict[str, Any]:
        """Of the kernels' pieces on such units."""
        return _all_cycles()[self.arch]

    def seconds(self, cycles: float) -> float:
        """Of so many cycles."""
        return cycles / self.clock


DEVICES = (
    Device("H200", "sm_90", 132, 1.98e9, 227 << 10, 5.5e12, 4.8e12, 60_000_000, 1.3e-6, 0.6e-6),
    Device("H100", "sm_90", 132, 1.98e9, 227 << 10, 5.5e12, 3.35e12, 50_000_000, 1.3e-6, 0.6e-6),
    Device("A100", "sm_80", 108, 1.41e9, 163 << 10, 4.0e12, 2.04e12, 40_000_000, 1.5e-6, 1.5e-6),
    Device("RTX 4090", "sm_89", 128, 2.52e9, 99 << 10, 5.0e12, 1.01e12, 72_000_000, 1.3e-6, 1.3e-6),
)


@dataclass(frozen=True)
class Part:
    """One kernel's or one phase's share of a call: seconds, and what bounds it."""

    phase: str
    seconds: float
    bound: str

    @staticmethod
    def of(phase: str, **bounds: float) -> Part:
        """The longest of several."""
        bound = max(bounds, key=lambda name: bounds[name])
        return Part(phase, bounds[bound], bound.replace("_", " "))


@dataclass(frozen=True)
class Prediction:
    """Of one call."""

    network: str
    device: str
    batch: int
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """From the first kernel's start to the last one's end."""
        return sum(part.seconds for part in self.parts)

    def share(self, **where: str) -> float:
        """Of the parts with a phase or a bound."""
        return sum(part.seconds for part in self.parts
                   if all(getattr(part, name) == value for name, value in where.items())) / self.seconds

    @property
    def bound(self) -> str:
        """What most of the time goes into."""
        return max({part.bound for part in self.parts}, key=lambda bound: self.share(bound=bound))


def _executing(images: int, share: float) -> Iterator[tuple[int, float]]:
    """How many of some images execute a block, and how probable that is; images decide independently."""
    for count in range(images + 1):
        yield count, comb(images, count) * share ** count * (1 - share) ** (images - count)


def turns(batch: int, images: int, blocks: int) -> list[int]:
    """How many images the thread block takes that has most, one turn after another, if turns take so many at most."""
    each = ceil(batch / blocks)
    rounds = ceil(each / images)
    return [each // rounds + (number < each % rounds) for number in range(rounds)]


def resident(arch: SkipNetArch, device: Device, batch: int, share: float, cluster: int = 1) -> Prediction:
    """A CIFAR-scale SkipNet in one launch; a thread block takes one to three images from stem to head, or a cluster of
    four takes one."""
    cycles = device.cycles["cluster" if cluster > 1 else "resident"]
    image, rest = 66 << 10, 22 << 10  # shared memory: an image's planes and sums; weights of the gate and the like
    most = 1 if cluster > 1 else (device.shared_memory - rest) // image
    rounds = ceil(batch / (device.multiprocessors * most))
    images = ceil(batch / (device.multiprocessors * rounds))
    blocks = min(device.multiprocessors, ceil(batch / images))

    def weights(channels: int) -> float:  # of a convolution, for all thread blocks
        return blocks * cluster * 9 * channels ** 2 * 2 / device.l2

    def turn(images: int) -> Iterator[Part]:
        """So many images' from stem to head."""
        yield Part("stem", device.seconds(cycles["start"][images - 1]), "latency")
        for number, depth in enumerate(arch.depths):
            stage, channels = cycles["stages"][number], arch.widths[number]
            for block in range(depth):
                always = number == block == 0
                nobody = (1 - share) ** images
                # Weights are loaded ahead as long as blocks are executed.
                late = nobody if block > (number == 0) else 0.0
                for count, probability in [(images, 1.0)] if always else _executing(images, share):
                    first = "entry" if number and block == 0 else "inner"
                    if count:
                        run = stage[first][count - 1] + late * stage["loading"] + stage["closing"][count - 1]
                    elif first == "entry":
                        run = stage["entry"][0]  # of which the projection is for all
                    else:
                        continue
                    part = Part.of("run_block", latency=device.seconds(run), L2=(2 + late) * weights(channels))
                    yield replace(part, seconds=part.seconds * probability)
                # Images decide side by side: the gate is a short one only if none of them has executed.
                nobody = nobody if block else 0.0
                gate = (1 - nobody) * stage["gate"] + nobody * stage["recall"]
                yield Part("gate_step", device.seconds(gate), "latency")
        yield Part("head", device.seconds(cycles["head"]), "latency")

    parts = [part for taken in turns(batch, images, blocks) for part in turn(taken)]
    name = f"{arch.name}, a cluster of {cluster}" if cluster > 1 else arch.name or ""
    return Prediction(name, device.name, batch, (Part("launch", device.launch, "launches"), *parts))


SMALL, SMALL_BYTES = "64, 64, 2, 2, true", 32 << 10  # the tile, and the shared memory it takes


def _gate_bytes(channels: int) -> int:
    """Of a gate in shared memory: its weights, and what its warps leave there."""
    return 4 * (4 * 10 * 26 + 10 * channels)


@dataclass(frozen=True)
class Convolution:
    """A layer of the compacted strategy; channels, sides of the output in pixels."""

    inputs: int
    outputs: int
    kernel: int
    pixels: int
    pools: bool = False

    @property
    def steps(self) -> int:
        """Of K, 32 elements each."""
        return ceil(self.kernel ** 2 * self.inputs / 32)

    @property
    def slices(self) -> int:
        """Into which K is cut where there are few tiles."""
        if self.outputs <= 32 or self.steps < 32:
            return 1
        tiles = ceil(self.pixels / 64) * ceil(self.outputs / 64)
        return max(1, min(int(math.sqrt(self.steps // 2)), 128 // tiles))

    def tiles(self, images: float, rows: int, columns: int) -> float:
        """Of so many images; where no pooled sums are written, they go on from one image to the next."""
        of_rows = images * ceil(self.pixels / rows) if self.pools else ceil(images * self.pixels / rows)
        return of_rows * ceil(self.outputs / columns)

    def gates(self, batch: int, device: Device) -> bool:
        """Whether the launch evaluates gates in its tail: every thread block has a multiprocessor for itself."""
        name, *sides = self.tile(batch, device)
        return (name == SMALL and self.tiles(batch, *sides) * self.slices <= device.multiprocessors
                and SMALL_BYTES + _gate_bytes(self.outputs) <= device.shared_memory)

    def tile(self, batch: int, device: Device) -> tuple[str, int, int]:
        """The tile that a batch takes: its name, rows, columns."""
        if self.outputs <= 32:
            return "128, 32, 4, 1, false", 128, 32
        rows = self.pixels if self.pools else batch * self.pixels
        if rows <= 64 or self.outputs <= 64 or self.tiles(batch, 128, 128) < device.multiprocessors:
            return SMALL, 64, 64
        return f"128, 128, 2, 4, {'true' if self.slices > 1 else 'false'}", 128, 128


def _convolutions(plan: BlockPlan) -> tuple[list[Convolution], list[Convolution]]:
    """A block's convolutions, and its projection."""
    inside, outside = (math.prod(size) for size in (plan.in_size, plan.out_size))
    projection = [Convolution(plan.in_channels, plan.out_channels, 1, outside, pools=True)] if plan.projects else []
    if plan.kind == "basic":
        return [Convolution(plan.in_channels, plan.planes, 3, outside),
                Convolution(plan.planes, plan.out_channels, 3, outside, pools=True)], projection
    return [Convolution(plan.in_channels, plan.planes, 1, inside), Convolution(plan.planes, plan.planes, 3, outside),
            Convolution(plan.planes, plan.out_channels, 1, outside, pools=True)], projection


def _convolve(phase: str, layer: Convolution, device: Device, batch: int, executing: float, pieces: Any) -> Part:
    """One launch for the images of a list."""
    name, rows, columns = layer.tile(batch, device)
    piece = pieces[name]
    tiles = layer.tiles(executing, rows, columns)
    at_once = len(piece["step"])
    slices = layer.slices if tiles * layer.slices <= device.multiprocessors * at_once else 1
    each = tiles * slices / device.multiprocessors  # thread blocks' work that falls to a multiprocessor
    side_by_side = min(at_once, max(1, ceil(each)))
    rounds = max(1.0, each / side_by_side)
    steps = layer.steps / slices
    step, finish = piece["step"][side_by_side - 1], piece["close" if layer.pools else "finish"][side_by_side - 1]
    reduce = slices > 1 and 2 * TO_L2 + slices * rows * columns * 4 / 64  # 64 bytes per cycle and multiprocessor
    work = piece["start"] + rounds * (steps * step + finish + reduce)
    weights = layer.inputs * layer.outputs * layer.kernel ** 2 * 2
    moved = executing * layer.pixels * (layer.inputs + layer.outputs * (2 if layer.pools else 1)) * 2
    through = tiles * layer.steps * (rows + columns) * 64
    return Part.of(phase, issue_and_products=device.seconds(work), L2=through / device.l2,
                   memory=(weights + max(0.0, moved - device.cache)) / device.memory)


def _gate(layer: Convolution, device: Device, batch: int, executing: int) -> float:
    """Seconds of RNNGate after a block's last convolution."""
    tail = layer.gates(batch, device)
    pieces = device.cycles["gate_tail"]["executed" if executing else "skipped"] if tail else device.cycles["gate_step"]
    tiles, many = ceil(layer.pixels / 64), layer.outputs > 512
    # A round takes four times two times 512 sums; of many channels, those of four tiles.
    rounds = ceil(tiles / 4) if many else ceil(tiles / (512 // layer.outputs) / 8)
    chunks = ceil(layer.outputs / 1024)
    cycles = pieces["alone" if batch == 1 else "listing"] + (rounds - 1) * chunks * pieces["sums"]
    cycles = max(cycles + (chunks - 1) * pieces["channels"], layer.outputs * tiles * 4 / 64)  # bytes per cycle from L2
    # The weights come while the grid before is at work, if grids overlap and multiprocessors have room.
    if not tail or (device.chained == device.launch and not executing):
        cycles += _gate_bytes(layer.outputs) / 64
    if tail:  # the last of the image's tiles finds out that it is; or there is nothing else in the launch
        found_out = max(2 * TO_L2, device.cycles["gate_tail"]["arrival"])
        return device.seconds(cycles + (found_out if executing else -EMPTY))
    return device.seconds(cycles * ceil(batch / (2 * device.multiprocessors))) + device.chained


def compacted(arch: SkipNetArch, device: Device, batch: int, share: float) -> Prediction:
    """Any network with RNNGate, kernel after kernel in a CUDA graph."""
    pieces = device.cycles["gathered_conv"]
    stem_pixels = 4 * math.prod(arch.blocks[0].in_size)  # before the max pool
    stem = Convolution(7 * 4 * 8, arch.widths[0], 1, stem_pixels)  # of pixel pairs
    moved = batch * stem_pixels * arch.widths[0] * 2 / device.memory
    parts = [Part("stem", 2e-6 + moved / 4, "memory"), _convolve("stem", stem, device, batch, batch, pieces),
             Part("stem", 2e-6 + moved, "memory")]
    launches = 3
    for index, plan in enumerate(arch.blocks):
        convolutions, projection = _convolutions(plan)
        for layer in projection:
            parts.append(_convolve("run_block", layer, device, batch, batch, pieces))
        executing = [(count, probability) for count, probability in _executing(batch, 1.0 if index == 0 else share)
                     if probability > 1e-6]
        for count, probability in executing:
            block = [_convolve("run_block", layer, device, batch, count, pieces) if count
                     else Part("run_block", device.seconds(EMPTY), "latency") for layer in convolutions]
            block.append(Part("gate_step", _gate(convolutions[-1], device, batch, count), "latency"))
            parts += [replace(part, seconds=part.seconds * probability) for part in block]
        launches += len(convolutions) + len(projection)
    head = Convolution(arch.blocks[-1].out_channels, arch.num_classes, 1, batch)
    parts.append(_convolve("head", head, device, 1, 1, pieces))
    launches += 2
    chain = Part("launch", device.launch + (launches - 1) * device.chained, "launches")
    return Prediction(arch.name or "", device.name, batch, (*parts, chain))


RUNS = {"cifar10_rnn_gate_110": (resident, (1, 8, 128, 1024, 4096)),
        "imagenet_rnn_gate_101": (compacted, (1, 8, 64, 256))}


def predictions(share: float = 0.5) -> list[Prediction]:
    """Of every network and batch on every device, with a share of the gated blocks executed."""
    results = [predict(srt.arch(name), device, batch, share)
               for name, (predict, batches) in RUNS.items() for device in DEVICES for batch in batches]
    shared = [resident(srt.arch("cifar10_rnn_gate_110"), device, 1, share, cluster=4)
              for device in DEVICES if device.arch == "sm_90"]
    return [*results, *shared]


def table(results: list[Prediction]) -> str:
    """Markdown."""
    lines = ["| network | device | batch | ms | gates | bound by |", "|---|---|---|---|---|---|"]
    lines += [f"| {each.network} | {each.device} | {each.batch:,} | {1e3 * each.seconds:.3f} | "
              f"{each.share(phase='gate_step'):.0%} | {each.bound} ({each.share(bound=each.bound):.0%}) |"
              for each in results]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the predictions here, too")
    arguments = parser.parse_args()
    results = predictions()
    sys.stdout.write(table(results) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([{"network": each.network, "device": each.device, "batch": each.batch,
                                               "predicted ms": round(1e3 * each.seconds, 4), "bound": each.bound}
                                              for each in results], indent=1) + "\n")
