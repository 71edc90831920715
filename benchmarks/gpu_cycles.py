"""Cycles of every piece of the GPU engines' kernels, from their machine code for sm_90a: what gpu_model.py adds up.

    python benchmarks/gpu_cycles.py

writes benchmarks/results/predicted/cycles.json; it needs nvcc and nvdisasm, but no GPU. A piece is a way through the
code from barrier to barrier; where it leads is found by what must lie on it (products, a finish, a gate).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
from gpu_model import CYCLES  # noqa: E402
from gpu_replay import UNITS, Units, replay, without_loads  # noqa: E402
from machine_code import Instruction, count, kernels, way  # noqa: E402

IMAGES = (1, 2, 3)  # that a resident thread block takes; three fit the largest shared memory
PRODUCTS = (72, 144, 144)  # of a region, by stage
OF_CLUSTER = (36, 36, 36)  # the same where a cluster of four shares an image
_ENDS = ("BRA", "BSSY", "BSYNC", "BAR", "CALL", "RET", "EXIT", "WARPSYNC", "UCGABAR")


@dataclass(frozen=True)
class Block:
    """Instructions that are always executed one after the other; all but the last fall through."""

    start: int
    end: int

    def __call__(self, at: int) -> bool:
        """Whether a way that has come here has gone through it."""
        return at == self.end - 1


@dataclass(frozen=True)
class Code:
    """A kernel's instructions."""

    instructions: Sequence[Instruction]

    @cached_property
    def blocks(self) -> list[Block]:
        """All of them, in the order in which they lie in memory."""
        targets = {instruction.target for instruction in self.instructions}
        ends = [at + 1 for at, instruction in enumerate(self.instructions)
                if instruction.startswith(_ENDS) or at + 1 in targets]
        return [Block(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]

    def count(self, block: Block, name: str) -> int:
        """Instructions of a kind in a block."""
        return count(self.instructions[block.start:block.end], rf"{name}\b")

    def having(self, **at_least: int) -> list[Block]:
        """The blocks with so many instructions of each kind; 0 means none."""
        def has(block: Block, name: str, least: int) -> bool:
            return self.count(block, name) >= least if least else not self.count(block, name)

        return [block for block in self.blocks if all(has(block, *kind) for kind in at_least.items())]

    def barrier(self, at: int) -> bool:
        """Whether a thread block meets here."""
        return self.instructions[at].startswith(("BAR.SYNC", "BAR.RED"))

    def ends(self, at: int) -> bool:
        """Whether the kernel does."""
        return self.instructions[at].startswith("EXIT")

    def indices(self, start: int, *places: Callable[[int], bool]) -> list[int]:
        """The shortest way through places."""
        return way(self.instructions, start, places)

    def way(self, start: int, *places: Callable[[int], bool]) -> tuple[list[Instruction], int]:
        """The shortest way through places, and where it ends."""
        indices = self.indices(start, *places)
        return [self.instructions[at] for at in indices], indices[-1]


def resident(code: Code, units: Units, cluster: bool = False) -> dict[str, object]:
    """The resident kernel's pieces, two warps to a scheduler: for one, two and three executing images; or for one that
    a cluster of four thread blocks shares, of which the inner ones store to both sides."""
    def of_whole_planes(blocks: list[Block]) -> list[Block]:
        """There is code for those and for others, the longer one."""
        return [min(both, key=lambda block: block.end - block.start)
                for both in zip(blocks[::2], blocks[1::2], strict=True)]

    # In memory the stem comes first, then each stage: its entry and projection, then the others. What follows the
    # products, without a branch, is found by the rounding to 16 bits; what pools by the identity that it loads.
    finishes = of_whole_planes(code.having(F2FP=2, LDS=0, HMMA=16))
    pooling = of_whole_planes(code.having(F2FP=2, LDS=1, HMMA=1))
    images_at_once = IMAGES[:1] if cluster else IMAGES
    stem, inner, entry = finishes[0], finishes[1::2], finishes[2::2]
    closing, projection = pooling[::2], pooling[1::2]
    # Of a gate's warps some decide and others look ahead; of each the code that embeds features. They wait for each
    # other.
    embeds = code.having(SHFL=7, FFMA=16, MUFU=0)
    decisions = code.having(SHFL=13, MUFU=8)

    def pool(embed: Block) -> Block:
        """Which a block that has not changed an image saves those that look ahead."""
        return [block for block in code.having(LDS=4, SHFL=0, FFMA=0, HMMA=0) if block.start < embed.start][-1]

    def region(finish: Block, products: int) -> list[Block]:
        """The blocks that multiply, and the one that finishes."""
        blocks: list[Block] = []
        for block in reversed(code.blocks[:code.blocks.index(finish) + 1]):
            if code.count(block, "HMMA") and sum(code.count(other, "HMMA") for other in blocks) < products:
                blocks.insert(0, block)
        blocks = blocks if finish in blocks else [*blocks, finish]
        if cluster:  # what it stores to other thread blocks: two rows and perhaps a sum
            after = code.blocks[code.blocks.index(finish) + 1:]
            blocks += [block for block in after if code.count(block, "STAS")][:3 if finish in pooling else 2]
        return blocks

    def cycles(instructions: list[Instruction], warps: int = 2) -> int:
        return round(replay(instructions, units, warps).cycles)

    def without_barrier(instructions: list[Instruction]) -> list[Instruction]:
        """The same way where no block has been executed that would be waited for."""
        return [each.replaced("NOP") if each.predicated and each.startswith("BAR") else each for each in instructions]

    def through(start: int, region: list[Block], regions: int, to: Callable[[int], bool] = code.barrier) -> int:
        """Of a convolution: the next one's weights come with the last region's products."""
        most, at = code.way(start, *region * (regions - 1)) if regions > 1 else ([], start)
        return cycles(without_loads(most) + code.way(at, *region, to)[0])

    _, loaded = code.way(0, code.barrier)
    stages = []
    decided = loaded
    for stage in range(3):
        products, regions = (OF_CLUSTER[stage], 1) if cluster else (PRODUCTS[stage], 2 if stage == 0 else 1)
        first, last = region(inner[stage], products), region(closing[stage], products)
        _, middle = code.way(inner[stage].end - 1, code.barrier)
        decision, (embed, ahead) = decisions[stage], embeds[2 * stage:2 * stage + 2]
        # Each kind of warp has a barrier of its own before it embeds, where it waits for the block.
        closed = {each: [at for at in code.indices(closing[stage].end - 1, pool(each), each) if code.barrier(at)][-1]
                  for each in (embed, ahead)}
        _, next_decided = code.way(closed[embed], decision, code.barrier)
        pieces: dict[str, object] = {}
        if stage:
            entered = region(entry[stage - 1], 18 if cluster else 72)
            projected = region(projection[stage - 1], 2 if cluster else 8)
            pieces["entry"] = [cycles(code.way(decided, *entered * images, *projected * images, code.barrier)[0])
                               for images in images_at_once]
        decided = next_decided
        weights = [block for block in code.having(LDG=9, HMMA=0) if block.start < inner[stage].start][-1]
        stages.append(pieces | {
            "inner": [through(decided, first, regions * images) for images in images_at_once],
            "loading": through(decided, [weights, *first], 1) - through(decided, first, 1),
            "closing": [through(middle, last, regions * images, closed[embed].__eq__) for images in images_at_once],
            "gate": max(cycles(code.way(closed[embed], embed, decision, code.barrier)[0], 1),
                        cycles(code.way(closed[ahead], pool(ahead), ahead, code.barrier)[0], 1)),
            "recall": max(cycles(without_barrier(code.way(decided, each, code.barrier)[0]), 1)
                          for each in (decision, ahead)),
        })
    of_stem = region(stem, 36 if cluster else 72)
    start = [cycles(code.way(0, code.barrier)[0]) + through(loaded, of_stem, images if cluster else 2 * images)
             for images in images_at_once]
    return {"start": start, "stages": stages, "head": cycles(code.way(decided, code.barrier, code.ends)[0])}


def gathered_conv(code: Code, units: Units, warps: int, at_once: int, pools: int) -> dict[str, object]:
    """A tile's pieces; ``warps`` to a scheduler in a thread block, of which a multiprocessor has up to ``at_once``, and
    ``pools`` pooled tiles."""
    (products,) = code.having(HMMA=8)
    before = max(at for at in range(products.start) if code.barrier(at))
    loads = [block for block in code.having(LDGSTS=1) if before < block.start < products.start]
    step, _ = code.way(products.end - 1, *loads, products)
    several = 4  # steps, so that what is in flight at a step's end counts
    first, _ = code.way(0, products)
    staged, at = code.way(products.end - 1, code.having(STS=8)[0], code.barrier)
    # A row of 8 channels at a time, each in blocks of its own: the code that takes pooled sums lies first.
    pooling, flat = code.having(STG=1, F2FP=4, HADD2=8), code.having(STG=1, F2FP=4, HADD2=0)
    added = code.having(HADD2=8, STG=0, FADD=8)  # the residual
    closing = [block for row in zip(added, pooling, strict=False) for block in row]

    def finish(rows: list[Block]) -> list[int]:
        finished, _ = code.way(at, *rows * pools, code.ends)
        return [round(replay(staged + finished, units, warps * blocks, blocks).cycles)
                for blocks in range(1, at_once + 1)]

    return {
        "start": round(replay(first, units, warps).cycles),
        "step": [round(replay(step * several, units, warps * blocks, blocks).cycles / several)
                 for blocks in range(1, at_once + 1)],
        "finish": finish(flat),
        "close": finish(closing),  # with a residual and pooled sums
    }


def gate_step(code: Code, units: Units, after: str) -> dict[str, int]:
    """RNNGate of the published sizes from an instruction on (the last of its kind before the gate) to the kernel's end:
    of an image alone, of one among a few whose thread block lists them all; and what is added by a further round of
    loads, of pooled sums and of the embedding's weights. All places have images, and nothing is forced."""
    sums, more_sums, more_products = any_of(LDG=8, FADD=0), any_of(LDG=8, FADD=16), any_of(FFMA=80, LDS=20)
    rest = [any_of(FFMA=80, FADD=32), any_of(MUFU=4, LDS=10), any_of(MUFU=2, STG=5)]

    def cycles(*kinds: Callable[[Code], Callable[[int], bool]]) -> int:
        gate = without_loads(_shortest(code, after, *kinds, lambda code: code.ends), r"LDG\.E(\.S8)? ")
        return round(replay(gate, units, 1).cycles)

    alone = cycles(sums, *rest)
    return {
        "alone": alone,
        "listing": cycles(sums, *rest, any_of(ATOMG=1, MEMBAR=0), any_of(POPC=1, LDG=0)),
        "sums": cycles(sums, more_sums, *rest) - alone,
        "channels": cycles(sums, more_sums, more_products, *rest) - alone,
    }


def arrival(code: Code, units: Units) -> int:
    """From an image's last tile to its gate, without the fence: weights come into registers, and the state is taken in,
    while the arrival is counted."""
    met = _shortest(code, "BAR.SYNC", any_of(ATOMG=1, MEMBAR=1), any_of(LDS=15, SHFL=0), any_of(MEMBAR=1, ATOMG=0),
                    lambda code: code.barrier)
    return round(replay(met, units, 1).cycles)


def _shortest(code: Code, after: str, *kinds: Callable[[Code], Callable[[int], bool]]) -> list[Instruction]:
    """From an instruction of a kind on, whichever is nearest."""
    places, ways = [kind(code) for kind in kinds], []
    for start in (at for at, instruction in enumerate(code.instructions) if instruction.startswith(after)):
        with suppress(ValueError):
            ways.append(code.way(start, *places)[0])
    return min(ways, key=len)


def any_of(**kind: int) -> Callable[[Code], Callable[[int], bool]]:
    """In some code, the ends of the blocks of a kind."""
    def ends(code: Code) -> Callable[[int], bool]:
        blocks = code.having(**kind)
        return lambda at: any(block(at) for block in blocks)

    return ends


# By a tile's sides: warps per scheduler of a thread block, thread blocks at once, pooled tiles.
TILES = {"128, 128, 2, 4, false": (2, 2, 2), "128, 128, 2, 4, true": (2, 1, 2), "64, 64, 2, 2, true": (1, 3, 1),
         "128, 32, 4, 1, false": (1, 4, 2)}


def pieces(units: Units) -> dict[str, object]:
    """Of all kernels of a network in float16."""
    conv = kernels("gathered_conv.cu")
    tail = Code(conv["gathered_conv_kernel<Tile<Half, 64, 64, 2, 2, true>, true>"])
    return {
        "resident": resident(Code(kernels("resident.cu")["resident<Half, false>"]), units),
        "cluster": resident(Code(kernels("resident.cu")["resident<Half, true>"]), units, cluster=True),
        "gathered_conv": {
            name: gathered_conv(Code(conv[f"gathered_conv_kernel<Tile<Half, {name}>, false>"]), units, *tile)
            for name, tile in TILES.items()},
        # In a launch of its own; in the tail of a block's last convolution where the image executes the block, once its
        # last tile has arrived, and where it skips it. From griddepcontrol.wait on, or a barrier.
        "gate_step": gate_step(Code(kernels("gate_step.cu")["gate_step_kernel<PublishedRnn>"]), units, "ACQBULK"),
        "gate_tail": {"arrival": arrival(tail, units)} | {
            state: gate_step(tail, units, after) for state, after in (("executed", "BAR.RED"), ("skipped", "ACQBULK"))},
    }


if __name__ == "__main__":
    CYCLES.parent.mkdir(parents=True, exist_ok=True)
    CYCLES.write_text(json.dumps({name: pieces(units) for name, units in UNITS.items()}, indent=1) + "\n")
