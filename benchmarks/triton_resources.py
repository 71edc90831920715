"""What every Triton kernel takes of a GPU, compiled without one: ``python benchmarks/triton_resources.py``.

Prints the table of docs/triton.md: bytes of shared memory, registers, and bytes of stack (spills), by target.
"""

from __future__ import annotations

import torch

from skipnet_rt.kernels import resources
from skipnet_rt.kernels.gathered_conv import Layer, configurations
from skipnet_rt.kernels.resources import Resources

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def shown(used: Resources, target: str) -> str:
    """One cell of the table."""
    if used.shared > resources.SHARED_LIMIT[target]:
        return f"{used.shared / 1024:.0f} KB: too much"
    inside = "" if used.registers is None else f", {used.registers}, {used.stack}"
    return f"{used.shared / 1024:.0f} KB{inside}"


def main() -> None:
    """Print the table."""
    print(f"| kernel | {' | '.join(TARGETS)} |\n|---{'|---' * len(TARGETS)}|")
    for dtype, tf32 in ((torch.float16, False), (torch.float32, False), (torch.float32, True)):
        large, small = (Layer(size, size, 256, 256, 3, 1, 1, dtype, pooled=True, tf32=tf32) for size in (56, 14))
        plans = [(large, configuration) for configuration in configurations(large)]
        plans += [(small, configuration) for configuration in configurations(small) if configuration.split_k > 1]
        for layer, configuration in plans:
            used = (shown(resources.convolution(layer, configuration, target), target) for target in TARGETS)
            name = "TF32" if tf32 else str(dtype).removeprefix("torch.")
            print(f"| {name}, {configuration} | {' | '.join(used)} |", flush=True)
    for name, pixels, channels, hidden in (("gate step, 1024 pixels of 16 channels", 1024, 16, 10),
                                           ("gate step, 3136 of 256", 3136, 256, 10),
                                           ("gate step, 49 of 2048", 49, 2048, 10),
                                           ("feed-forward tail, 64 of 16", 64, 16, 0)):
        used = (shown(resources.gate(pixels, channels, 10 if hidden else 1, hidden, target), target)
                for target in TARGETS)
        print(f"| {name} | {' | '.join(used)} |", flush=True)
    print(f"| compaction | {' | '.join(shown(resources.compaction(target), target) for target in TARGETS)} |")


if __name__ == "__main__":
    main()
