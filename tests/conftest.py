"""Fixtures of several test files."""

import os
import signal
from contextlib import nullcontext

import pytest
import torch
from interpreted import fixed_products

from skipnet_rt import _C

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it
os.environ.pop("COLUMNS", None)  # tables are as wide as without a terminal, whatever the tests run in


@pytest.fixture(scope="session", autouse=True)
def lesser_processor():
    """Our own engine as on a processor with no more than this instruction set; see test_lesser_processors.py."""
    with pytest.MonkeyPatch.context() as patch:
        if best := os.environ.get("SKIPNET_TEST_INSTRUCTION_SET"):
            known = _C.instruction_sets()
            patch.setattr(_C, "instruction_sets", lambda: known[known.index(best):])
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Sessions under Triton's interpreter have its products in a fixed order."""
    with fixed_products() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext():
        yield


@pytest.fixture(scope="module")
def one_thread():
    """All is small in these tests: further threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_threads():
    """Sets PyTorch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
