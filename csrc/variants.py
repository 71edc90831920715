"""What is compiled once for each instruction set; setup.py and the sanitizer tests read this."""

import platform

X86 = platform.machine().lower() in ("x86_64", "amd64")

RESIDENT, COMPACTED, STANDALONE = "resident/resident.cpp", "compacted/compacted.cpp", "standalone.cpp"
FLOAT32 = (RESIDENT, COMPACTED, STANDALONE)

# Name, floats in a vector, compiler flags, sources in csrc/cpu/. With avx512bf16 and amx those that form products from
# bfloat16; everything else of these processors is avx512's.
VARIANTS = [("portable", 4, [], FLOAT32)]
if X86:
    AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"]
    BF16 = [*AVX512, "-mavx512bf16"]
    VARIANTS += [("avx2", 8, ["-mavx2", "-mfma"], FLOAT32), ("avx512", 16, AVX512, FLOAT32),
                 ("avx512bf16", 16, BF16, (RESIDENT, COMPACTED)),
                 ("amx", 16, [*BF16, "-mamx-tile", "-mamx-bf16"], (RESIDENT,))]

# Fused multiply-adds wherever there are any.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"]

MACROS = [("SKIPNET_X86", "1")] if X86 else []


def commands(compiler: list[str], variants: list[tuple] = VARIANTS) -> list[list[str]]:
    """What compiles each source for each instruction set, without where to."""
    return [[*compiler, *flags, f"-DSKIPNET_ISA={name}", f"-DSKIPNET_WIDTH={width}", "-c", f"csrc/cpu/{source}"]
            for name, width, flags, sources in variants for source in sources]
