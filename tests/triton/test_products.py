"""The products of tests under the interpreter (interpreted.py): a row's bits are its own."""

import pytest
import torch

from skipnet_rt.kernels.language import INTERPRETED, jit, tl

if not INTERPRETED:
    pytest.skip("compiled kernels multiply by themselves", allow_module_level=True)


@jit()
def product_kernel(a_ptr: tl.tensor, b_ptr: tl.tensor, out_ptr: tl.tensor, rows: tl.constexpr, terms: tl.constexpr,
                   columns: tl.constexpr) -> None:
    row, term, column = tl.arange(0, rows)[:, None], tl.arange(0, terms), tl.arange(0, columns)[None, :]
    a = tl.load(a_ptr + row * terms + term[None, :])
    b = tl.load(b_ptr + term[:, None] * columns + column)
    tl.store(out_ptr + row * columns + column, tl.dot(a, b, input_precision="ieee"))


def product(a, b):
    out = torch.empty(len(a), b.shape[1])
    product_kernel[(1,)](a, b, out, rows=len(a), terms=len(b), columns=b.shape[1])
    return out


@pytest.mark.parametrize(("terms", "columns"), [(16, 16), (64, 16), (256, 32)])
def test_a_row_has_the_same_bits_alone_and_at_any_place_of_any_batch(terms, columns):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, terms, generator=generator), torch.randn(terms, columns, generator=generator)
    whole = product(a, b)
    torch.testing.assert_close(whole, a @ b, atol=1e-4, rtol=0)
    for rows in (1, 2, 16, 64):
        for start in (0, 1, 3, 13):
            assert torch.equal(product(a[start:start + rows], b), whole[start:start + rows])
    for places in (1, 3, 100):
        assert torch.equal(product(a.roll(places, 0), b), whole.roll(places, 0))
