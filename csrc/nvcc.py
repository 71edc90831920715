"""How the CUDA sources are compiled; setup.py and the build check read this."""

import os
import shutil

# What a wheel holds. 90a is an architecture-specific variant; the highest one also comes as PTX.
ALL_ARCHS = ("80", "86", "89", "90a", "100", "120")
# Where no GPU is seen: one code for each of the two common generations, and PTX for all later ones.
DEFAULT_ARCHS = ("80", "90")

FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME's, the PATH's, or the usual place's."""
    homes = [os.environ.get("CUDA_HOME", ""), "", "/usr/local/cuda"]
    return next(filter(None, (shutil.which(f"{home}/bin/nvcc" if home else "nvcc") for home in homes)), None)
