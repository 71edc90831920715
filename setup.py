"""Builds the native extension skipnet_rt._C: C++ always, CUDA where nvcc is found. Everything else: pyproject.toml.

SKIPNET_CUDA=0             leave the CUDA sources out
SKIPNET_CUDA_ARCHS=90,120  build for these compute capabilities; "all" for every one that is supported
SKIPNET_BUILD_JOBS=4       compile so many files at a time, instead of one per core
SKIPNET_OBJECT_CACHE=DIR   where compiled files are kept, instead of build/objects
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import variants
from nvcc import ALL_ARCHS, DEFAULT_ARCHS, FLAGS, find_nvcc
from object_cache import compiled

MODULE = "csrc/bindings/module.cpp"
# What a file of these kinds may include.
CPU_SOURCES = [*Path("csrc").glob("*.h"), Path("csrc/cpu")]
CUDA_SOURCES = [*Path("csrc").glob("*.h"), Path("csrc/cuda")]


def toolkit_root(nvcc: str) -> Path:
    """The toolkit's folder in nvcc's own words: the nvcc on the PATH may be a link or a script."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    top = next(line for line in dry.stderr.splitlines() if line.startswith("#$ TOP="))
    return Path(top.removeprefix("#$ TOP="))


def cuda_archs() -> tuple[str, ...]:
    """The architectures to build for: those asked for, else of the GPUs at hand, else the default."""
    asked = os.environ.get("SKIPNET_CUDA_ARCHS", "")
    if asked:
        return ALL_ARCHS if asked == "all" else tuple(asked.replace(".", "").split(","))
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]):
        seen = subprocess.run(query, capture_output=True, text=True, check=False)
        if seen.returncode == 0 and seen.stdout.strip():
            return tuple(sorted({line.strip().replace(".", "") for line in seen.stdout.splitlines()}))
    return DEFAULT_ARCHS


Compilation = Callable[[], Path]
"""Compiles one file, or finds that it has been; returns the object's path."""


class BuildExtension(build_ext):
    """Compiles everything through the object cache, the .cu sources with nvcc, and links cudart statically."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; without nvcc it is CPU only, and says so."""
        nvcc = find_nvcc()
        compilations: list[Compilation] = []
        if os.environ.get("SKIPNET_CUDA") == "0":
            why = "left out: SKIPNET_CUDA=0 was set when skipnet-rt was built"
        elif nvcc is None:
            why = "left out: no nvcc was found when skipnet-rt was built"
        else:
            why, compilations = self.cuda(ext, nvcc)
        print(f"skipnet-rt: CUDA sources {why}")
        with ThreadPoolExecutor(int(os.environ.get("SKIPNET_BUILD_JOBS", 0)) or os.cpu_count()) as pool:
            compilations += [*self.variants(), *self.cpp(ext, why)]
            ext.extra_objects += [str(path) for path in pool.map(lambda compilation: compilation(), compilations)]
        ext.sources, ext.language = [], "c++"  # what is left is to link
        self.force = True
        super().build_extension(ext)

    def variants(self) -> list[Compilation]:
        """The CPU kernels for each instruction set."""
        compiler = [*self.compiler.compiler_so_cxx, *variants.FLAGS]
        return [partial(compiled, command, CPU_SOURCES) for command in variants.commands(compiler)]

    def cpp(self, ext: Pybind11Extension, about_cuda: str) -> list[Compilation]:
        """All other C++ sources, of which one is told about CUDA."""
        includes = [*self.compiler.include_dirs, *ext.include_dirs]
        flags = [*ext.extra_compile_args, *(f"-D{name}={value}" for name, value in variants.MACROS),
                 *(f"-I{folder}" for folder in includes)]

        def compilation(source: str) -> Path:
            macros = [("SKIPNET_CUDA_BUILD", f'"{about_cuda}"'), *ext.define_macros] if source == MODULE else []
            return compiled([*self.compiler.compiler_so_cxx, *flags, *(f"-D{name}={value}" for name, value in macros),
                             "-c", source],
                            [*CPU_SOURCES, *CUDA_SOURCES, Path("csrc/bindings"), *map(Path, includes)])

        return [partial(compilation, source) for source in ext.sources]

    def cuda(self, ext: Pybind11Extension, nvcc: str) -> tuple[str, list[Compilation]]:
        """The CUDA sources, and what is being done with them."""
        archs = cuda_archs()
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        newest = archs[-1].rstrip("af")
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")

        def compilation(source: Path) -> Path:
            return compiled([nvcc, *FLAGS, "--threads=0", *codes, "-c", source], CUDA_SOURCES)

        # The largest first: it takes longer than all others.
        sources = sorted(Path("csrc/cuda").glob("*.cu"), key=lambda source: source.stat().st_size, reverse=True)
        root = toolkit_root(nvcc)
        ext.library_dirs += [str(path) for path in (root / "lib64", *root.glob("targets/*/lib")) if path.is_dir()]
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ext.define_macros.append(("SKIPNET_CUDA_ARCHS", f'"{",".join(archs)}"'))
        ext.sources.append("csrc/bindings/cuda.cpp")
        return (f"built for {', '.join(f'sm_{arch}' for arch in archs)} and PTX {newest}",
                [partial(compilation, source) for source in sources])


setup(
    ext_modules=[Pybind11Extension(
        "skipnet_rt._C",
        [MODULE, "csrc/bindings/cpu.cpp",
         *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp") if path.name != variants.STANDALONE)],
        cxx_std=17,
        # No contraction by the compiler: one rounding sequence, whatever instruction set it builds for.
        extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off"],
    )],
    cmdclass={"build_ext": BuildExtension},
)
