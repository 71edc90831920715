"""Engines ask for the next convolution's weights while they multiply: no result shows it."""

import platform
import re
import shutil
import subprocess

import pytest
import variants
from object_cache import ROOT, compiled
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="prefetches are looked for by x86's name"),
]


@pytest.mark.parametrize(("source", "function", "prefetch"), [
    (variants.RESIDENT, r"Float32>::\w*multiply\w*\(", "prefetcht0"),
    (variants.COMPACTED, "multiply_panel<", "prefetcht1")],
    ids=["resident", "compacted"])
@pytest.mark.parametrize("variant", [known for known in variants.VARIANTS if known[0] in ("avx2", "avx512")],
                         ids=lambda variant: variant[0])
def test_products_of_float32_read_ahead(variant, source, function, prefetch):
    """The objects are those that were installed: the cache has them."""
    compiler = new_compiler()
    customize_compiler(compiler)
    sources = [ROOT / "csrc" / "cpu", *(ROOT / "csrc").glob("*.h")]
    (command,) = (command for command in variants.commands([*compiler.compiler_so_cxx, *variants.FLAGS], [variant])
                  if command[-1].endswith(source))
    listed = subprocess.run(["objdump", "--disassemble", "--demangle", "--no-show-raw-insn",
                             compiled(command, sources)], capture_output=True, text=True, check=True).stdout
    functions = [code.split("\n", 1) for code in listed.split("\n\n") if ">:\n" in code]
    products = [code for name, code in functions if re.search(function, name) and "{lambda" not in name]
    # One column of output channels at a time, or few tiles: functions of the resident engine for wide vectors only.
    assert len(products) == 3 or (variant[0], source) != ("avx512", variants.RESIDENT)
    assert products
    assert all(prefetch in code for code in products)
