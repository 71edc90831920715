"""The CUDA convolution over a row list, run on the CPU (tests/simulated/simt), against PyTorch in float64."""

import ctypes
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from simt import SimtError, library
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ELEMENTS = [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]  # and whether products are TF32
TENSOR_CORES_SLOW = [ELEMENTS[0], *(pytest.param(*element, marks=pytest.mark.slow) for element in ELEMENTS[1:])]
# The rounding of the result and, for the float32 sum's own error, a share of the sum of absolute products.
EPSILON = {torch.float32: 2.0 ** -23, torch.float16: 2.0 ** -10, torch.bfloat16: 2.0 ** -7}
TF32 = 2.0 ** -10  # both operands' rounding, of an absolute product
PARTIAL_TILES = 256
# A layer of each type whose K is split into four slices, and how many multiprocessors run them all at once.
SPLIT_K = {torch.float32: dict(channels_in=64), torch.float16: dict(channels_in=128),
            torch.bfloat16: dict(channels_in=1024, kernel=1)}
SLICES, ENOUGH = 4, 60


def as_numpy(tensor):
    """Bits for NumPy, which has no bfloat16."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def as_torch(array, dtype):
    tensor = torch.from_numpy(array.copy())
    return tensor if dtype == torch.float32 else tensor.view(dtype)


@dataclass
class Case:
    """A layer, images and a list; runs the kernel and the oracle."""

    channels_in: int
    channels_out: int
    kernel: int = 3
    stride: int = 1
    size: tuple[int, int] = (5, 7)
    batch: int = 3
    rows: tuple[int, ...] | None = None
    gathers: bool = True
    scatters: bool = True
    relu: bool = True
    residual: bool = False
    in_place: bool = False
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    has_workspace: bool = True
    pools: bool = True  # without pooled sums tiles go on from one image to the next
    pixels_are_images: bool = False
    weights_seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.weights_seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        fan_in = self.channels_in * self.kernel ** 2
        self.weight = (normal(self.channels_out, self.kernel, self.kernel, self.channels_in)
                       * fan_in ** -0.5).to(self.dtype)
        self.bias = normal(self.channels_out).float()
        height, width = self.size
        self.out_size = ((height - 1) // self.stride + 1, (width - 1) // self.stride + 1)
        self.images = list(range(self.batch)) if self.rows is None else list(self.rows)
        self.x = normal(self.batch, height, width, self.channels_in).to(self.dtype)
        self.shortcut = normal(self.batch, *self.out_size, self.channels_out).to(self.dtype)

    @property
    def tiles(self):
        tiles = library("compacted")._library.count_pooled_tiles
        return tiles(self.kernel, self.stride, *map(ctypes.c_int, self.size))

    @property
    def element(self):
        """As csrc/cuda/element.h counts them."""
        return 3 if self.tf32 else DTYPES.index(self.dtype)

    def run(self, seed, multiprocessors=3, calls=1):
        """The kernel's (y [batch, ...], sums [batch, tiles, out]); NaN where nothing was written."""
        conv = library("compacted")
        conv.configure(seed, multiprocessors)
        partial = arrivals = None
        if self.has_workspace:
            floats = conv._library.count_partial_sums(self.element, self.channels_in, self.channels_out, self.kernel,
                                                      self.stride, self.batch, *self.size)
            partial, arrivals = conv.empty(floats), conv.array(np.zeros(PARTIAL_TILES, np.int32))
        n, poison = len(self.images), torch.uint16 if self.dtype != torch.float32 else torch.float32
        dtype = np.float32 if poison == torch.float32 else np.uint16
        # Images that are not in the list stay poisoned: reading one would show.
        x, shortcut = conv.empty(tuple(self.x.shape), dtype), conv.empty(tuple(self.shortcut.shape), dtype)
        y = shortcut if self.in_place else conv.empty(tuple(self.shortcut.shape), dtype)
        read = self.images if self.gathers else range(n)
        written = self.images if self.scatters else range(n)
        for place, image in zip(read, self.images, strict=True):
            x[place] = as_numpy(self.x[image])
        for place, image in zip(written, self.images, strict=True):
            shortcut[place] = as_numpy(self.shortcut[image])
        rows = count = None
        if self.rows is not None:
            rows, count = conv.empty(self.batch, np.int32), conv.array(np.array([n], np.int32))
            rows[:n] = self.rows
        sums = conv.empty((self.batch, self.tiles, self.channels_out)) if self.pools else None
        weight, bias = conv.array(as_numpy(self.weight)), conv.array(self.bias.numpy())
        for _ in range(calls):
            conv("run_gathered_conv", self.element, self.channels_in, self.channels_out, self.kernel, self.stride,
                 weight, bias, self.batch, *self.size, rows, count, self.gathers, self.scatters, self.relu, x,
                 shortcut if self.residual else None, y, sums, partial, arrivals, self.pixels_are_images, False)
        self.partial_sums_written = 0 if partial is None else int((~np.isnan(partial)).sum())
        assert arrivals is None or not arrivals.any(), "the counters are zero between calls"
        return as_torch(y, self.dtype), None if sums is None else torch.from_numpy(sums.copy())

    def expected(self):
        """The oracle's y in float64 for each image of the list, and the error it may be off by."""
        x, weight = self.x[self.images].double(), self.weight.double()

        def convolve(x, weight):
            return F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), stride=self.stride,
                            padding=self.kernel // 2).permute(0, 2, 3, 1)

        y = convolve(x, weight) + self.bias.double()
        if self.residual:
            y = y + self.shortcut[self.images].double()
        products = TF32 if self.tf32 else 1e-6
        allowed = EPSILON[self.dtype] * y.abs() + 1e-6 + products * convolve(x.abs(), weight.abs())
        return (y.relu() if self.relu else y), allowed

    def check(self, seed, multiprocessors=3, calls=1):
        y, sums = self.run(seed, multiprocessors, calls)
        expected, allowed = self.expected()
        places = self.images if self.scatters else list(range(len(self.images)))
        excess = (y[places].double() - expected).abs() - allowed
        assert not excess.isnan().any()
        assert not (excess > 0).any(), f"off by {excess.max()} more than allowed"
        others = [place for place in range(self.batch) if place not in places]
        assert y[others].isnan().all(), "other images' places are left alone"
        if self.pools:
            pixels = y[places].double().sum((1, 2))
            torch.testing.assert_close(sums[places].double().sum(1), pixels, rtol=1e-5, atol=1e-4)
            assert sums[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [
    dict(channels_in=16, channels_out=16, rows=(1, 2)),
    dict(channels_in=8, channels_out=24, size=(1, 1), rows=(0,)),
    dict(channels_in=16, channels_out=32, stride=2, size=(8, 9), rows=(0, 2), scatters=False),
    dict(channels_in=16, channels_out=32, kernel=1, stride=2, size=(9, 8), relu=False),
    dict(channels_in=40, channels_out=72, size=(9, 9), rows=(2,), residual=True),
    dict(channels_in=64, channels_out=64, size=(12, 11), rows=(0, 1, 2), residual=True, in_place=True, gathers=False),
    dict(channels_in=128, channels_out=136, kernel=1, size=(4, 5), rows=(1,), gathers=False),
    dict(channels_in=8, channels_out=64, kernel=7, stride=2, size=(20, 18), batch=2),
    dict(channels_in=256, channels_out=64, kernel=1, size=(7, 7), batch=2, rows=(1,), residual=True),
], ids=lambda case: "-".join(f"{value}" for value in case.values()))
def test_gathered_conv(case, dtype):
    for seed in range(3):
        Case(**case, dtype=dtype, weights_seed=seed).check(seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_large_tile(dtype):
    """128 x 128, taken where there is enough for every multiprocessor."""
    case = Case(24, 136, size=(13, 12), batch=2, rows=(1, 0), residual=True, dtype=dtype)
    for seed in range(2):
        case.check(seed, multiprocessors=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_channels(dtype):
    Case(2048, 16, kernel=1, size=(2, 3), batch=2, rows=(1,), dtype=dtype).check(seed=1)
    Case(16, 2048, kernel=1, size=(2, 3), batch=1, dtype=dtype).check(seed=2)


def test_an_empty_list():
    """Nothing is read or written, whatever the memory holds."""
    for seed in range(4):
        y, sums = Case(16, 16, rows=()).run(seed)
        assert y.isnan().all()
        assert sums.isnan().all()


def test_an_empty_batch():
    y, _ = Case(16, 16, batch=0, rows=()).run(seed=0)
    assert len(y) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype):
    """An image's result and pooled sums are bitwise the same in any list, under any tile and order of threads."""
    whole = Case(16, 136, size=(12, 12), batch=4, dtype=dtype)
    y, sums = whole.run(seed=0, multiprocessors=1)  # the large tile
    for seed, rows in ((1, (0, 1, 2, 3)), (2, (2,)), (3, (1, 3))):
        part = Case(16, 136, size=(12, 12), batch=4, rows=rows, dtype=dtype)
        got_y, got_sums = part.run(seed, multiprocessors=60)  # the small one
        assert torch.equal(got_y[list(rows)], y[list(rows)])
        assert torch.equal(got_sums[list(rows)], sums[list(rows)])


@pytest.mark.parametrize(("dtype", "tf32"), TENSOR_CORES_SLOW)
@pytest.mark.parametrize("case", [
    dict(channels_in=16, channels_out=72, rows=(0, 2, 3), size=(5, 7)),  # 105 rows: tiles of two images and of three
    dict(channels_in=40, channels_out=24, kernel=5, stride=2, rows=(1, 3), gathers=False),
    dict(channels_in=128, channels_out=72, kernel=1, size=(9, 9), rows=(3, 1, 2), residual=True),
], ids=lambda case: "-".join(f"{value}" for value in case.values()))
def test_rows_go_on_from_one_image_to_the_next(case, dtype, tf32):
    """Where no pooled sums are wanted, under small tiles and large ones."""
    for seed, multiprocessors in enumerate((1, 3, ENOUGH)):
        Case(**case, batch=5, scatters=False, pools=False, dtype=dtype, tf32=tf32).check(seed, multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_rows_do_not_change_a_bit(dtype):
    """An image's result is the same whoever shares its tiles, at whatever place in them, and with pooled sums."""
    shape = dict(SPLIT_K[dtype], channels_out=128, size=(6, 7), batch=4, dtype=dtype)
    whole, _ = Case(**shape, has_workspace=False).run(seed=0)
    for seed, (rows, multiprocessors) in enumerate([((0, 1, 2, 3), 1), ((0, 1, 2, 3), ENOUGH), ((1, 3), 4),
                                                    ((3, 2, 0), ENOUGH), ((2,), ENOUGH), ((3, 1, 2), 1)]):
        got, _ = Case(**shape, rows=rows, scatters=False, pools=False).run(seed, multiprocessors)
        assert torch.equal(got[:len(rows)], whole[list(rows)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_image(dtype):
    case = Case(16, 16, batch=3, dtype=dtype)
    clean, _ = case.run(seed=0)
    case.x[1, 2, 3, 4] = torch.nan
    y, sums = case.run(seed=0)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1, 1:4, 2:5].isnan().all()
    assert sums[1].isnan().any()


def test_infinities_of_float16():
    """A sum beyond float16's range is an infinity, as in PyTorch."""
    case = Case(16, 16, dtype=torch.float16, relu=False)
    case.bias[3] = 1e6
    y, _ = case.run(seed=0)
    assert y[..., 3].isposinf().all()


@pytest.mark.parametrize(("case", "message"), [
    (dict(channels_in=12, channels_out=16), "channels: expected multiples of 8, got 12 and 16"),
    (dict(channels_in=16, channels_out=16, kernel=2), "expected an odd kernel, got 2"),
])
def test_bad_layers_are_named(case, message):
    with pytest.raises((SimtError, RuntimeError), match=message):
        Case(**case).run(seed=0)


def split_k(dtype, **case):
    """A case whose K is split into four slices."""
    return Case(**SPLIT_K[dtype] | dict(channels_out=72, size=(6, 8), residual=True, dtype=dtype) | case)


@pytest.mark.parametrize(("dtype", "tf32"), [
    (torch.float32, False), (torch.float32, True), (torch.bfloat16, False),
    pytest.param(torch.float16, False, marks=pytest.mark.slow)])
def test_split_k(dtype, tf32):
    """Two tiles per image: with enough multiprocessors every slice is left to whoever adds them, over and over."""
    for seed in range(6):
        case = split_k(dtype, tf32=tf32, rows=(2, 0), weights_seed=seed)
        case.check(seed, ENOUGH, calls=1 + seed % 3)
        assert case.partial_sums_written == 2 * 2 * SLICES * 64 * 64


@pytest.mark.parametrize(("dtype", "tf32"), TENSOR_CORES_SLOW)
def test_how_k_is_split_makes_no_difference(dtype, tf32):
    """At the same time or one after another, in small tiles or large ones, in whatever company: the same bits."""
    shape = dict(channels_out=128, size=(9, 8), batch=4, tf32=tf32)
    tiles = 2 * 2  # of an image, small; 1 large
    whole = split_k(dtype, **shape, has_workspace=False)
    y, sums = whole.run(seed=0)
    for seed, (rows, multiprocessors, small, large) in enumerate([
        ((0, 1, 2, 3), ENOUGH, 4, 0), ((3, 1), ENOUGH, 2, 0), ((2,), ENOUGH, 1, 0),  # a thread block for each slice
        ((0, 1, 2, 3), 5, 0, 0), ((1,), 8, 1, 0),                                    # enough for one image at most
        ((0, 1, 2, 3), 4, 0, 0), ((0, 3), 4, 0, 2), ((2,), 4, 0, 1), ((2, 1), 1, 0, 0),  # large tiles
    ]):
        part = split_k(dtype, **shape, rows=rows)
        got_y, got_sums = part.run(seed, multiprocessors)
        assert part.partial_sums_written == SLICES * (small * tiles * 64 * 64 + large * 128 * 128)
        assert torch.equal(got_y[list(rows)], y[list(rows)])
        assert torch.equal(got_sums[list(rows)], sums[list(rows)])


@pytest.mark.parametrize("multiprocessors", [1, 3, ENOUGH])
def test_a_classifier_does_not_see_how_many_images_there_are(multiprocessors):
    """The batch as the pixels of one image: its tiles must not decide how a sum is divided."""
    shape = dict(channels_in=1024, channels_out=72, kernel=1, batch=1, residual=True, pixels_are_images=True)
    whole = Case(**shape, size=(1, 150))
    whole.check(0, multiprocessors)
    y, _ = whole.run(0, multiprocessors)
    for width in (1, 3, 66):
        part = Case(**shape, size=(1, width))
        part.weight, part.bias = whole.weight, whole.bias
        part.x, part.shortcut = whole.x[:, :, 80:80 + width], whole.shortcut[:, :, 80:80 + width]
        assert torch.equal(part.run(width, ENOUGH)[0], y[:, :, 80:80 + width])
        assert part.partial_sums_written


def in_tf32(values):
    """With 10 bits of fraction behind the first one, rounded to nearest, halfway cases away from zero."""
    fraction, exponent = torch.frexp(values.double())
    return torch.ldexp(fraction.sign() * (fraction.abs() * 2048 + 0.5).floor() / 2048, exponent)


def test_tf32_rounds_operands_only():
    """Products and sums are as in float32."""
    case = Case(64, 64, size=(9, 9), tf32=True, relu=False)
    case.x[0, 0, 0, :4] = 1 + torch.tensor([1.0, -1.0, 3.0, 0.0]) * 2.0 ** -11  # halfway cases
    y, (unrounded, _) = case.run(seed=1)[0].double(), case.expected()
    case.x, case.weight = in_tf32(case.x), in_tf32(case.weight)
    expected, _ = case.expected()
    assert (y - expected).norm() < 1e-6 * expected.norm() < 1e-2 * (y - unrounded).norm()
