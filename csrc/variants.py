"""What is compiled once for each instruction set; setup.py and the sanitizer tests read this."""

import platform

# In csrc/cpu/.
VARIANT_SOURCES = ("resident/resident.cpp", "compacted/compacted.cpp", "standalone.cpp")

X86 = platform.machine().lower() in ("x86_64", "amd64")

# Name, floats in a vector, compiler flags.
VARIANTS = [("portable", 4, [])]
if X86:
    AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"]
    VARIANTS += [("avx2", 8, ["-mavx2", "-mfma"]), ("avx512", 16, AVX512),
                 ("avx512bf16", 16, [*AVX512, "-mavx512bf16"]),
                 ("amx", 16, [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"])]

MACROS = [("SKIPNET_X86", "1")] if X86 else []
