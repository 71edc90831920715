"""No test can hold up the others: one that hangs or dies is a failure with its stack, and the rest goes on."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"

# The first never lets go of the interpreter's lock, as a native loop in a library may: no Python thread could end it.
TESTS = """
import ctypes, os

def test_hangs_in_native_code():
    ctypes.PyDLL(None).pause()

def test_dies():
    os._exit(3)

def test_passes():
    pass

def test_passes_too():
    pass
"""


def test_a_test_that_hangs_or_dies_is_a_failure_and_the_rest_goes_on(tmp_path):
    (tmp_path / "test_trouble.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-n1", "-c", PROJECT, "--rootdir", tmp_path, "-p", "no:cacheprovider",
               "-o", "faulthandler_timeout=2", tmp_path / "test_trouble.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "2 failed, 2 passed" in done.stdout.splitlines()[-1]
    assert "crashed while running 'test_trouble.py::test_hangs_in_native_code'" in done.stdout
    assert "crashed while running 'test_trouble.py::test_dies'" in done.stdout
    assert "in test_hangs_in_native_code" in done.stderr, "the stack of the test that hung"
