"""The Triton kernels against their oracles: on a GPU, or under the interpreter (see test_interpreter.py)."""

import pytest
import torch
from networks import small_model

from skipnet_rt import kernels
from skipnet_rt.kernels.gathered_conv import POOL_TILE, Configuration, Layer, Workspace, configurations
from skipnet_rt.kernels.language import INTERPRETED, unavailable_reason
from skipnet_rt.model.packing import PackedFeedforwardGate, pack

if unavailable_reason() is not None:
    pytest.skip(str(unavailable_reason()), allow_module_level=True)

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Where every launch has many tiles, which takes the interpreter seconds.
QUICK_DTYPES = [torch.float16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[:2])]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def listed(batch, count, generator):
    """``count`` of ``batch`` images in order, as compaction lists them."""
    executed = torch.zeros(batch, dtype=torch.bool)
    executed[torch.randperm(batch, generator=generator)[:count]] = True
    return kernels.compact_ref(executed.to(DEVICE))


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 255, 2500])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compact(batch, share, generator):
    executed = (torch.rand(batch, generator=generator) < share).to(DEVICE)
    for value, expected in zip(kernels.compact(executed), kernels.compact_ref(executed), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1030, 2)])
@pytest.mark.parametrize(("batch", "count"), [(0, 0), (1, 1), (5, 0), (5, 3), (5, 5)])
def test_gather_and_scatter(batch, count, shape, dtype, generator):
    x, out = ((100 * torch.randn(batch, *shape, generator=generator)).to(dtype).to(DEVICE) for _ in range(2))
    rows, number = listed(batch, count, generator)
    assert torch.equal(kernels.gather(x, rows, number)[:count], kernels.gather_ref(x, rows, number)[:count])
    expected = kernels.scatter_ref(x, rows, number, out)
    assert torch.equal(kernels.scatter(x, rows, number, out), expected)


# (height, width, channels, out_channels, kernel, stride, padding): published shapes' kinds, and odd ones.
SHAPES = [(8, 8, 16, 16, 3, 1, 1), (9, 7, 16, 32, 3, 2, 1), (5, 6, 64, 40, 1, 1, 0), (9, 7, 12, 24, 1, 2, 0),
          (23, 17, 3, 8, 7, 2, 3), (1, 1, 70, 10, 1, 1, 0), (11, 10, 5, 3, 3, 1, 1), (3, 2, 8, 16, 3, 2, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("batch", "count"), [(1, 1), (5, 3), (4, 4), (3, 0)])
def test_gathered_conv2d(shape, dtype, batch, count, generator):
    """Every epilogue at once: gather, bias, residual, ReLU, scatter in place, pooled sums."""
    height, width, channels, out_channels, kernel, stride, padding = shape
    x = normal(batch, height, width, channels, generator=generator, dtype=dtype)
    weight = normal(kernel, kernel, channels, out_channels, generator=generator) / (kernel * channels ** 0.5)
    weight, bias = weight.to(dtype), normal(out_channels, generator=generator)
    plain = kernels.gathered_conv2d_ref(x, weight, bias, stride=stride, padding=padding)
    assert_close(kernels.gathered_conv2d(x, weight, bias, stride=stride, padding=padding), plain)
    rows, number = listed(batch, count, generator)
    outs = [normal(*plain.shape, generator=generator.manual_seed(1), dtype=dtype) for _ in range(2)]
    sums = [torch.full((batch, kernels.sum_tiles(plain.shape[1:3]), out_channels), -7.0, device=DEVICE)
            for _ in range(2)]
    for function, out, sums_out in zip((kernels.gathered_conv2d, kernels.gathered_conv2d_ref), outs, sums, strict=True):
        returned = function(x, weight, bias, number, gather=rows, scatter=rows, stride=stride, padding=padding,
                            relu=True, residual=out, out=out, sums=sums_out)
        assert returned is out
    assert_close(*outs)
    pixels = plain.shape[1] * plain.shape[2]
    assert_close(sums[0], sums[1], dtype=dtype, scale=min(pixels, POOL_TILE))
    skipped = torch.ones(batch, dtype=torch.bool)
    skipped[rows[:count].long()] = False
    assert (sums[0][skipped] == -7).all()
    written = sums[0][~skipped].sum(1)
    torch.testing.assert_close(written, outs[0][~skipped].float().flatten(1, 2).sum(1), atol=1e-3, rtol=1e-5)


def assert_close(value, expected, dtype=None, scale=1.0):
    """Within a unit in the last place of the dtype that was stored: sums of another order may round the other way."""
    error = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype or value.dtype]
    torch.testing.assert_close(value, expected, atol=scale * error, rtol=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_conv2d_of_a_compact_batch(dtype, generator):
    """Reads and writes in the list's own order; what lies behind the count is neither read nor written."""
    x = normal(6, 5, 5, 16, generator=generator, dtype=dtype)
    x[4:] = float("nan")
    weight, bias = normal(3, 3, 16, 16, generator=generator, dtype=dtype) / 12, normal(16, generator=generator)
    count = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    out = torch.full((6, 5, 5, 16), 3.0, dtype=dtype, device=DEVICE)
    kernels.gathered_conv2d(x, weight, bias, count, padding=1, relu=True, out=out)
    assert_close(out[:4], kernels.gathered_conv2d_ref(x, weight, bias, count, padding=1, relu=True)[:4])
    assert (out[4:] == 3).all()


def test_gathered_conv2d_reads_planar_images(generator):
    images = normal(2, 3, 9, 8, generator=generator)
    weight, bias = normal(3, 3, 3, 8, generator=generator), normal(8, generator=generator)
    x = images.permute(0, 2, 3, 1)
    assert_close(kernels.gathered_conv2d(x, weight, bias, padding=1),
                 kernels.gathered_conv2d_ref(x, weight, bias, padding=1), scale=5)


def test_gathered_conv2d_takes_weights_either_way(generator):
    x, bias = normal(2, 6, 5, 16, generator=generator), normal(24, generator=generator)
    weight = normal(3, 3, 16, 24, generator=generator)
    by_output = weight.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(kernels.gathered_conv2d(x, weight, bias, padding=1),
                       kernels.gathered_conv2d(x, by_output, bias, padding=1))


def test_gathered_conv2d_converts_to_the_weights_dtype(generator):
    """A feed-forward gate is float32 whatever the activation is."""
    x = normal(2, 6, 6, 16, generator=generator, dtype=torch.float16)
    weight, bias = normal(3, 3, 16, 16, generator=generator), normal(16, generator=generator)
    out = kernels.gathered_conv2d(x, weight, bias, padding=1)
    assert out.dtype == torch.float16
    assert_close(out, kernels.gathered_conv2d_ref(x, weight, bias, padding=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_conv2d_bits_do_not_depend_on_the_batch(dtype, generator):
    x = normal(7, 9, 9, 24, generator=generator, dtype=dtype)
    weight, bias = normal(3, 3, 24, 20, generator=generator, dtype=dtype), normal(20, generator=generator)
    sums = torch.zeros(7, 2, 20, device=DEVICE)
    whole = kernels.gathered_conv2d(x, weight, bias, padding=1, sums=sums)
    plain = kernels.gathered_conv2d(x, weight, bias, padding=1)
    for start, stop in [(0, 1), (6, 7), (2, 6)]:
        part_sums = torch.zeros(stop - start, 2, 20, device=DEVICE)
        part = kernels.gathered_conv2d(x[start:stop], weight, bias, padding=1, sums=part_sums)
        assert torch.equal(part, whole[start:stop])
        assert torch.equal(part_sums, sums[start:stop])
        assert torch.equal(kernels.gathered_conv2d(x[start:stop], weight, bias, padding=1), plain[start:stop])


def workspace(tiles, configuration):
    """For the slices of so many tiles, filled with NaN."""
    partials = configuration.split_k * configuration.block_m * configuration.block_n
    return Workspace(torch.full((tiles * partials,), float("nan"), device=DEVICE),
                     torch.zeros(tiles, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 9, 16, 24, 3, 2, 1), (9, 8, 32, 12, 3, 1, 1), (3, 2, 70, 10, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("split_k", [2, 4])
def test_slices_give_the_same_bits_however_programs_share_them(shape, split_k, dtype, generator):
    """Of several tiles, with every epilogue: all in one program, or each in one; also where one has nothing to add."""
    height, width, channels, out_channels, kernel, stride, padding = shape
    batch, count = 3, 2
    x = normal(batch, height, width, channels, generator=generator, dtype=dtype)
    weight = normal(kernel, kernel, channels, out_channels, generator=generator) / (kernel * channels ** 0.5)
    weight, bias = weight.to(dtype), normal(out_channels, generator=generator)
    rows, number = listed(batch, count, generator)
    configuration = Configuration(64, 16, 16, warps=4, stages=2, split_k=split_k)
    expected = kernels.gathered_conv2d_ref(x, weight, bias, number, gather=rows, stride=stride, padding=padding)
    size = expected.shape[1:3]
    tiles = count * kernels.sum_tiles(size) * -(-out_channels // 16)  # with pooled sums, whose tiles are images' own

    def run(capacity):
        memory = workspace(capacity, configuration)
        plain = torch.zeros_like(expected)
        kernels.gathered_conv2d(x, weight, bias, number, gather=rows, stride=stride, padding=padding, out=plain,
                                configuration=configuration, workspace=memory)
        out = torch.ones(batch, *size, out_channels, dtype=dtype, device=DEVICE)
        sums = torch.zeros(batch, kernels.sum_tiles(size), out_channels, device=DEVICE)
        kernels.gathered_conv2d(x, weight, bias, number, gather=rows, scatter=rows, stride=stride, padding=padding,
                                relu=True, residual=out, out=out, sums=sums, configuration=configuration,
                                workspace=memory)
        assert not memory.arrivals.any()
        assert not memory.partials.isnan().any(), "a slice was not written"
        return plain, out, sums

    shared, alone = run(tiles), run(0)
    for value, other in zip(shared, alone, strict=True):
        assert torch.equal(value, other)
    assert_close(shared[0][:count], expected[:count])


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_the_count_may_decide_who_sums_and_changes_no_bit(dtype, generator):
    x = normal(6, 8, 8, 40, generator=generator, dtype=dtype)
    weight, bias = normal(3, 3, 40, 16, generator=generator, dtype=dtype) / 20, normal(16, generator=generator)
    configuration = Configuration(64, 16, 32, warps=4, stages=2, split_k=4)
    memory = workspace(2, configuration)
    whole = kernels.gathered_conv2d(x, weight, bias, padding=1, configuration=configuration, workspace=memory)
    assert memory.partials.isnan().all()  # six tiles
    for images in (1, 2, 3, 5):
        count = torch.tensor([images], dtype=torch.int32, device=DEVICE)
        out = kernels.gathered_conv2d(x, weight, bias, count, padding=1, configuration=configuration, workspace=memory)
        assert torch.equal(out[:images], whole[:images])
    assert not memory.partials.isnan().any()  # of one and of two tiles


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_meet_in_order_every_time(dtype, generator):
    """A race would show on a GPU: launches follow one another over one workspace, as in a graph."""
    x = normal(2, 7, 7, 256, generator=generator, dtype=dtype)
    weight, bias = normal(3, 3, 256, 64, generator=generator, dtype=dtype) / 48, normal(64, generator=generator)
    layer = Layer(7, 7, 256, 64, 3, 1, 1, dtype, pooled=False)
    configuration = configurations(layer)[0]
    assert configuration.split_k > 1
    whole = kernels.gathered_conv2d(x, weight, bias, padding=1, configuration=configuration,
                                    workspace=workspace(0, configuration))
    memory = Workspace.empty([(layer, configuration)], 2, DEVICE)
    assert memory.capacity(configuration) > 0
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(2 if INTERPRETED else 1000):
        differing += (kernels.gathered_conv2d(x, weight, bias, padding=1, configuration=configuration, workspace=memory)
                      != whole).sum()
    assert differing.item() == 0


def test_a_workspace_suits_every_layer_it_was_made_for():
    layers = [Layer(*shape, torch.float16, False) for shape in (
        (7, 7, 512, 512, 3, 1, 1), (1, 1, 2048, 1000, 1, 1, 0), (56, 56, 16, 16, 1, 1, 0))]
    plans = [(layer, configurations(layer)[0]) for layer in layers]
    memory = Workspace.empty(plans, 3, DEVICE)
    for layer, configuration in plans:
        alone = Workspace.empty([(layer, configuration)], 3, DEVICE)
        assert memory.capacity(configuration) >= alone.capacity(configuration)
        assert alone.capacity(configuration) > 0 or configuration.split_k == 1
    assert len(Workspace.empty([], 3, DEVICE).arrivals) == 1  # for the gate step


@pytest.mark.parametrize("relu", [False, True])
def test_gathered_conv2d_keeps_nan_and_its_neighbours(relu, generator):
    x = normal(3, 4, 4, 16, generator=generator)
    weight, bias = normal(1, 1, 16, 16, generator=generator), normal(16, generator=generator)
    clean = kernels.gathered_conv2d(x, weight, bias, relu=relu)
    x[1, 2, 3, 4] = float("nan")
    out = kernels.gathered_conv2d(x, weight, bias, relu=relu)
    assert out[1, 2, 3].isnan().all()
    out[1, 2, 3] = clean[1, 2, 3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize(("change", "message"), [
    (dict(x=torch.zeros(2, 4, 4, 3)), r"weight must be \[kernel, kernel, 3, O\], got .* \[3, 3, 16, 8\]"),
    (dict(x=torch.zeros(2, 4, 4, 16, dtype=torch.float64)), r"x must be \[N, H, W, C\] in .*got torch.float64"),
    (dict(bias=torch.zeros(7)), r"bias must be contiguous torch.float32 \[8\], got torch.float32 \[7\]"),
    (dict(gather=torch.zeros(2, dtype=torch.int64)), r"gather must be contiguous torch.int32 \[2\], got torch.int64"),
    (dict(count=torch.zeros(2, dtype=torch.int32)), r"count must be contiguous torch.int32 \[1\], got .* \[2\]"),
    (dict(out=torch.zeros(2, 8, 4, 4).permute(0, 2, 3, 1)), "out must be contiguous .* not contiguous"),
    (dict(sums=torch.zeros(2, 2, 8)), r"sums must be contiguous torch.float32 \[2, 1, 8\], got .* \[2, 2, 8\]"),
    (dict(stride=0), "stride must be at least 1.*got stride 0"),
    (dict(tf32=True, weight=torch.zeros(3, 3, 16, 8).half()), "tf32 is for float32 weights, got torch.float16"),
    (dict(weight=torch.zeros(3, 3, 8, 16).transpose(2, 3)), r"weight must be contiguous as .*, got strides \[384, 12"),
    (dict(padding=-1), r"got stride 1, padding -1, input \[4, 4\]"),
    (dict(residual=torch.zeros(2, 4, 4, 8, device="meta")), "residual must be on .*, got meta"),
])
def test_gathered_conv2d_names_what_is_wrong(change, message):
    arguments = dict(x=torch.zeros(2, 4, 4, 16), weight=torch.zeros(3, 3, 16, 8), bias=torch.zeros(8), padding=1)
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
             for name, value in (arguments | change).items()}
    with pytest.raises(ValueError, match=message):
        kernels.gathered_conv2d(**moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_conv2d_rounds_to_the_nearest(dtype, generator):
    x = normal(1, 16, 16, 16, generator=generator)
    weight = torch.eye(16, device=DEVICE).view(1, 1, 16, 16)
    out = torch.empty(1, 16, 16, 16, dtype=dtype, device=DEVICE)
    kernels.gathered_conv2d(x, weight, torch.zeros(16, device=DEVICE), out=out)
    assert torch.equal(out, x.to(dtype))


def gate_inputs(channels, units, batch, pixels, generator):
    """Partial sums of an activation, and an LSTM's state."""
    sums = pixels / 2 * normal(batch, -(-pixels // POOL_TILE), channels, generator=generator)
    hidden, cell = (normal(batch, units, generator=generator) for _ in range(2))
    return sums, hidden, cell


@pytest.mark.parametrize("name", ["rnn", "bottleneck"])
@pytest.mark.parametrize(("batch", "pixels"), [(0, 64), (1, 64), (5, 1), (5, 200),
                                               pytest.param(70, 49, marks=pytest.mark.slow)])
def test_rnn_gate_step(name, batch, pixels, generator):
    network = pack(small_model(name), DEVICE, torch.float32)
    gate, lstm = network.gates[0], network.lstm
    sums, hidden, cell = gate_inputs(gate.weight.shape[1], network.arch.hidden_dim, batch, pixels, generator)
    logit, expected_hidden, expected_cell = kernels.gate_step_ref(kernels.pool_ref(sums, pixels), gate, lstm, hidden,
                                                                  cell)
    step = kernels.gate_step(sums, pixels, gate, lstm, hidden, cell)
    for value, expected in ((step.logit, logit), (step.probability, logit.sigmoid()), (hidden, expected_hidden),
                            (cell, expected_cell)):
        torch.testing.assert_close(value, expected, atol=5e-6, rtol=1e-5)
    assert torch.equal(step.executed, step.probability > 0.5)
    assert_listed(step)


def assert_listed(step):
    for value, expected in zip((step.rows, step.count), kernels.compact_ref(step.executed), strict=True):
        assert torch.equal(value, expected)


def feedforward_gate(weight, bias=0.0):
    return PackedFeedforwardGate(False, (), torch.tensor(weight, device=DEVICE), torch.tensor([bias], device=DEVICE))


@pytest.mark.parametrize(("batch", "channels"), [(1, 16), (5, 7), (9, 600), (300, 3)])
def test_feedforward_gate_step(batch, channels, generator):
    gate = feedforward_gate(torch.randn(channels, generator=generator).tolist(), 0.25)
    sums = 50 * normal(batch, 1, channels, generator=generator)
    step = kernels.gate_step(sums, 50, gate)
    torch.testing.assert_close(step.logit, kernels.pool_ref(sums, 50) @ gate.weight + gate.bias, atol=2e-5, rtol=1e-5)
    assert torch.equal(step.executed, step.probability > 0.5)
    assert_listed(step)


def test_exactly_half_and_nan_skip():
    sums = torch.tensor([0.0, float("nan"), 1e-3, -1e-3, 1e30, -1e30], device=DEVICE).view(6, 1, 1)
    step = kernels.gate_step(sums, 1, feedforward_gate([1.0]))
    assert step.probability[0] == 0.5
    assert step.probability[1].isnan()
    assert step.probability[4:].tolist() == [1.0, 0.0]
    assert step.executed.tolist() == [False, False, True, False, True, False]
    assert_listed(step)


def test_forced_decisions_and_absent_images(generator):
    sums = normal(6, 1, 4, generator=generator)
    gate = feedforward_gate([1.0, -1.0, 0.5, 2.0])
    free = kernels.gate_step(sums, 1, gate)
    forced = torch.tensor([True, False, True, False, True, True], device=DEVICE)
    present = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    step = kernels.gate_step(sums, 1, gate, forced=forced, present=present)
    assert step.executed.tolist() == [True, False, True, False, True, False]
    assert torch.equal(step.probability[:5], free.probability[:5])
    assert step.rows.tolist() == [0, 2, 4, -1, -1, -1]
    assert step.count.tolist() == [3]


def test_arrivals_are_left_at_zero(generator):
    arrivals = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sums = normal(6, 2, 4, generator=generator)
    first, second = (kernels.gate_step(sums, 100, feedforward_gate([1.0, -1.0, 0.5, 2.0]), arrivals=arrivals)
                     for _ in range(2))
    assert arrivals.item() == 0
    assert torch.equal(first.rows, second.rows)


def test_gate_step_names_what_is_wrong():
    network = pack(small_model("rnn"), DEVICE, torch.float32)
    with pytest.raises(ValueError, match="lstm, hidden and cell belong to an embedding"):
        kernels.gate_step(torch.zeros(2, 1, 8, device=DEVICE), 64, network.gates[0])
    state = torch.zeros(2, 10, device=DEVICE)
    with pytest.raises(ValueError, match=r"gate.weight must be contiguous torch.float32 \[10, 9\]"):
        kernels.gate_step(torch.zeros(2, 1, 9, device=DEVICE), 64, network.gates[0], network.lstm, state, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tiles", "channels"), [(0, 1, 8), (1, 1, 2048), (3, 49, 70), (2, 200, 5)])
def test_pool(batch, tiles, channels, dtype, generator):
    sums = normal(batch, tiles, channels, generator=generator)
    expected = kernels.pool_ref(sums, 64 * tiles).to(dtype)
    torch.testing.assert_close(kernels.pool(sums, 64 * tiles, dtype), expected)
