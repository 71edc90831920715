"""Fixtures of several test files."""

import os

import pytest
import torch
from interpreted import fixed_products

os.environ.pop("COLUMNS", None)  # tables are as wide as without a terminal, whatever the tests run in


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Every session that was started under Triton's interpreter has its products in a fixed order."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        with fixed_products():
            yield
    else:
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
