"""Cycles of a way through a kernel's machine code, by replaying its instructions on a multiprocessor's scheduler.

The compiler writes into every instruction how long its warp waits before the next one and for which results it waits
first. A replay issues one instruction per cycle from the scheduler's warps, the last one's as long as it can and then
the youngest's, and keeps to these, to the latency of what has a result of unknown time, and to how long a unit is taken
by each instruction. Latencies, units and order are published microbenchmarks' (docs/gpu-model.md); none was measured
here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from machine_code import Instruction

SCHEDULERS = 4  # of a multiprocessor


@dataclass(frozen=True)
class Units:
    """For how many cycles a warp's instruction takes a unit of its scheduler, and what it waits for.

    Attributes:
        product: cycles of a 16x8x16 product with float32 sums.
        arithmetic: of a float32 instruction.
        l2: cycles until a load that misses L1 is there.
        network: bytes per cycle from a multiprocessor to others of its cluster.
        other: cycles until what is stored to another one is there.
    """

    product: float
    arithmetic: float = 1.0
    l2: float = 280.0
    network: float = 11.4
    other: float = 180.0

    def occupied(self, instruction: str) -> tuple[str, float]:
        """The unit and the cycles. Units of the whole multiprocessor count four times: its four schedulers are busy
        with the same."""
        name = instruction.split()[0]
        wide = 4 if ".128" in name else 2 if ".64" in name else 1
        match name.split(".")[0]:
            case "HMMA":
                return "tensor cores", self.product if "16816" in name else self.product / 2
            case "LDSM":
                return "shared memory", SCHEDULERS * int(name[-1])
            case "LDS" | "STS" | "LDG" | "STG" | "LDGSTS" | "LD" | "ST" | "ATOMG" | "ATOMS":
                return "shared memory", SCHEDULERS * wide
            case "SHFL":
                return "shared memory", SCHEDULERS
            case "STAS":
                return "network", SCHEDULERS * 128 / self.network
            case "MUFU" | "I2F" | "F2I" | "I2FP":
                return "special functions", 8
            case "FFMA" | "FADD" | "FMUL":
                return "arithmetic", self.arithmetic
            case "IMAD" | "HFMA2" | "HADD2":
                return "arithmetic", 2
            case _:
                return "integers", 2

    def latency(self, instruction: str) -> float:
        """Cycles from issue until a scoreboard is free."""
        match re.split(r"[. ]", instruction)[0]:
            case "LDS":
                return 29
            case "LDSM":
                return 33
            case "SHFL":
                return 24
            case "LDG" | "LD" | "LDGSTS" | "ATOMG" | "ATOM" | "RED" | "MEMBAR":
                return self.l2
            case _:
                return 22

    # Cycles of work that may wait in front of a unit without holding up a warp.
    queued: ClassVar = {"shared memory": 96, "special functions": 32, "network": 1000}
    operands = 10  # cycles until a store's are read
    barrier = 20  # cycles from the last warp's arrival


@dataclass(frozen=True)
class Replay:
    """What a way through the code takes.

    Attributes:
        cycles: until the last of a scheduler's warps is through.
        issued: instructions of one warp.
        busy: cycles for which one warp takes each unit.
    """

    cycles: float
    issued: int
    busy: dict[str, float]

    def bound(self, warps: int) -> str:
        """What takes most of the cycles; latency, if nothing is taken for most of them."""
        shares = {unit: cycles * warps for unit, cycles in self.busy.items()} | {"issue slots": self.issued * warps}
        unit = max(shares, key=lambda unit: shares[unit])
        return unit if shares[unit] > 0.8 * self.cycles else "latency"


def without_loads(instructions: Sequence[Instruction], kind: str = "LDG") -> list[Instruction]:
    """The same way where a condition keeps loads from global memory, or a kind of them, from being executed: they still
    issue."""
    return [instruction.replaced("NOP") if instruction.predicated and re.match(kind, instruction) else instruction
            for instruction in instructions]


class _Warp:
    """On its way; until a barrier opens it is ready at no time."""

    def __init__(self, instructions: Sequence[Instruction], block: int) -> None:
        self.instructions = instructions
        self.block = block
        self.at = 0
        self.ready = 0.0
        self.free = [0.0] * 8  # when each scoreboard is; the last one is nobody's

    @property
    def next(self) -> Instruction | None:
        return self.instructions[self.at] if self.at < len(self.instructions) else None

    def earliest(self, slot: float, taken: dict[str, float], units: Units) -> float:
        """When its next instruction can issue."""
        if self.next is None:
            return inf
        unit, _ = units.occupied(self.next)
        awaited = [self.free[i] for i in range(6) if self.next.awaits >> i & 1]
        return max([self.ready, slot, taken[unit] - units.queued.get(unit, 0), *awaited])


def replay(instructions: Sequence[Instruction], units: Units, warps: int, blocks: int = 1) -> Replay:
    """All the warps of a scheduler, those of each thread block side by side, go the same way from the start; barriers
    gather a thread block's."""
    team = [_Warp(instructions, number * blocks // warps) for number in range(warps)]
    taken: dict[str, float] = defaultdict(float)  # until when each unit is
    slot = 0.0  # the next one to issue in
    last = 0  # the warp that has issued
    while any(warp.next for warp in team):
        times = [warp.earliest(slot, taken, units) for warp in team]
        time = min(times)
        can = [number for number, other in enumerate(times) if other == time]
        last = last if last in can else can[-1]  # greedy, then the youngest
        warp = team[last]
        instruction = warp.instructions[warp.at]
        unit, cycles = units.occupied(instruction)
        begun = max(time, taken[unit])
        slot, taken[unit] = time + 1, begun + cycles
        warp.at += 1
        warp.ready = time + max(1, instruction.stall)
        warp.free[instruction.result] = begun + units.latency(instruction)
        warp.free[instruction.operands] = max(warp.free[instruction.operands], begun + units.operands)
        stores = instruction.startswith("SYNCS.PHASECHK")  # of a cluster's other thread blocks, as far as this one is
        if stores or instruction.startswith("BAR"):
            warp.ready = inf
            others = [other for other in team if other.block == warp.block]
            if all(other.at == warp.at and other.ready == inf for other in others):
                for other in others:
                    other.ready = max(time, taken["network"] + units.other) if stores else time + units.barrier
    busy: dict[str, float] = defaultdict(float)
    for instruction in instructions:
        unit, cycles = units.occupied(instruction)
        busy[unit] += cycles
    return Replay(max(warp.ready for warp in team), len(instructions), dict(busy))


# An instruction's rate follows from a GPU's published one: H200 and H100 reach 63 % of it with mma.sync, as the six
# cycles say that nvcc keeps between two of them; the RTX 4090 has half its rate with float32 sums.
UNITS = {"sm_90": Units(product=6), "sm_80": Units(product=8, arithmetic=2, l2=200), "sm_89": Units(product=32, l2=270)}
