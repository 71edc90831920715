"""Code for one instruction set stays with it: the linker must not give it to a processor that lacks it.

A function that several object files define alike (an inline function, a template's instance) is linked once, from
whichever file comes first. Compiled for AVX-512, it would end a process on a lesser processor.
"""

import shutil
import subprocess

import pytest
import variants
from object_cache import ROOT, compiled
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")


def shared_functions(file):
    """Functions in an object file that another file may define as well."""
    listed = subprocess.run(["nm", "--demangle", "--defined-only", file], capture_output=True, text=True, check=True)
    return [line.split(" W ")[1] for line in listed.stdout.splitlines() if " W " in line]


@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda variant: variant[0])
def test_no_function_is_shared_between_instruction_sets(variant):
    """The objects are those that were installed: the cache has them."""
    compiler = new_compiler()
    customize_compiler(compiler)
    sources = [ROOT / "csrc" / "cpu", *(ROOT / "csrc").glob("*.h")]
    for command in variants.commands([*compiler.compiler_so_cxx, *variants.FLAGS], [variant]):
        shared = shared_functions(compiled(command, sources))
        assert [name for name in shared if f"{variant[0]}::" not in name] == []
