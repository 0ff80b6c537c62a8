"""A block's parts on one token, in C++, against plain torch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from moezoo_kernels import token_step
from moezoo_kernels.activations import ACTIVATIONS, GLUOptions, gated_unit
from moezoo_kernels.layouts import column_major
from moezoo_kernels.moe_step import Scorer, moe_step
from moezoo_kernels.selective_mlp import NO_THRESHOLDS, Thresholds
from moezoo_kernels.sparse_linear import pack_blocks, pack_groups
from moezoo_kernels.token_step import Angles, Cache, Linear, Norm, SparseLinear

DIGITS = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}  # of the largest number
EPS = 1e-5


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def draw(request, native_library, poison_empty):
    """Draw tensors of one dtype, from one seed, about as large as in a model."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape, scale=None):
        std = shape[-1] ** -0.5 if scale is None else scale
        return (torch.randn(shape, generator=generator) * std).to(request.param)

    drawn.dtype = request.param
    return drawn


def normed(hidden, norm):
    wide = hidden.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.double()


def linear(x, part):
    return F.linear(x, part.weight.double(), None if part.bias is None else part.bias.double())


def assert_added(hidden, before, expected):
    """Compare what was added to the residual stream."""
    wanted = before.double() + expected
    largest = max(before.abs().max().item(), expected.abs().max().item(), 1.0)
    assert (hidden.double() - wanted).abs().max() <= DIGITS[before.dtype] * largest


def attended(hidden, norm, maps, norms, angles, cache, at, window, scale):
    """Attend to keys and values of one sequence after the other, head by head."""
    query, key, value, out = maps
    x, (batch, kv_heads, _, width) = normed(hidden, norm), cache.keys.shape
    heads = query.weight.shape[0] // width
    keys, values = cache.keys.double(), cache.values.double()

    def turned(head, place):
        cos, sin = angles.cos[place].double(), angles.sin[place].double()
        part, rest = head[: len(cos)], head[len(cos) :]
        return torch.cat([part * cos + part.roll(len(cos) // 2, -1) * sin, rest])

    answers = torch.zeros(batch, heads, width, dtype=torch.float64)
    for b in range(batch):
        place = int(angles.places[b])
        for h in range(heads):
            g = h // (heads // kv_heads)
            q, k, v = (linear(x[b], part) for part in (query, key, value))
            if norms[0] is not None and norms[0].shape == q.shape:
                q, k = normed(q, norms[0]), normed(k, norms[1])
            q, k, v = (p.view(-1, width)[n] for p, n in ((q, h), (k, g), (v, g)))
            if norms[0] is not None and norms[0].shape == q.shape:
                q, k = normed(q, norms[0]), normed(k, norms[1])
            keys[b, g, at], values[b, g, at] = turned(k, place), v
            first = 0 if window is None else max(0, at + 1 - window)
            seen = torch.arange(first, at + 1)
            if cache.mask is not None:
                seen = seen[cache.mask[b, seen]]
            weights = (keys[b, g, seen] @ turned(q, place) * scale).softmax(0)
            answers[b, h] = weights @ values[b, g, seen]
    return linear(answers.flatten(1), out), keys, values


@pytest.mark.parametrize(
    ("window", "part", "over_all"), [(None, 1.0, False), (1, 0.6, True), (6, 0.4, False)]
)
@pytest.mark.parametrize("extras", [True, False], ids=["norms_biases_mask", "plain"])
@pytest.mark.parametrize(
    ("batch", "width", "heads", "kv_heads", "head_width", "length"),
    [(1, 37, 3, 1, 10, 1), (1, 64, 4, 4, 16, 70), (3, 48, 4, 2, 34, 9), (16, 40, 2, 2, 128, 19)],
)
def test_attention(
    draw, batch, width, heads, kv_heads, head_width, length, extras, window, part, over_all
):
    room, at, scale = length + 3, length - 1, head_width**-0.5
    sizes = (heads * head_width, kv_heads * head_width, kv_heads * head_width)
    maps = [Linear(draw(n, width), draw(n, scale=0.3) if extras else None) for n in sizes]
    maps.append(Linear(draw(width, sizes[0]), draw(width, scale=0.3) if extras else None))
    normed_widths = sizes[:2] if over_all else (head_width, head_width)
    norms = [draw(n, scale=1.0) if extras else None for n in normed_widths]
    norm, hidden = draw(width, scale=1.0), draw(batch, width, scale=1.0)
    turned = int(head_width * part) // 2 * 2
    turns = torch.rand(batch + length, turned, generator=torch.Generator().manual_seed(1))
    places = torch.arange(batch) + length - 1
    angles = Angles(turns.cos().to(draw.dtype), turns.sin().to(draw.dtype), places)
    mask = torch.arange(room) >= torch.arange(batch)[:, None].clamp(max=at) if extras else None
    shape = (batch, kv_heads, room, head_width)
    cache = Cache(draw(*shape, scale=1.0), draw(*shape, scale=1.0), mask)
    untouched = [each.clone() for each in cache[:2]]
    expected, keys, values = attended(hidden, norm, maps, norms, angles, cache, at, window, scale)
    before = hidden.clone()
    step = token_step.attention_step(
        hidden,
        Norm(norm, EPS),
        *maps,
        angles,
        cache,
        scale=scale,
        query_norm=norms[0],
        key_norm=norms[1],
        window=window,
    )
    step(at)
    assert_added(hidden, before, expected)
    for actual, wanted, old in zip(cache[:2], (keys, values), untouched, strict=True):
        tolerance = 3 * DIGITS[draw.dtype]
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)
        for others in (slice(at), slice(at + 1, None)):
            assert torch.equal(actual[:, :, others], old[:, :, others])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("batch", "width", "inner"), [(1, 37, 19), (2, 16, 5), (7, 64, 130), (16, 5, 33)]
)
def test_dense_blocks(draw, batch, width, inner, gated, bias, activation):
    hidden, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    gate, up = (Linear(draw(inner, width), draw(inner) if bias else None) for _ in range(2))
    down = Linear(draw(width, inner), draw(width) if bias else None)
    before, x, act = hidden.clone(), normed(hidden, norm), ACTIVATIONS[activation]
    middle = act(linear(x, gate)) * linear(x, up) if gated else act(linear(x, up))
    step = token_step.dense_step(
        hidden, Norm(norm, EPS), gate if gated else None, up, down, activation
    )
    step()
    assert_added(hidden, before, linear(middle, down))


@pytest.mark.parametrize("kind", ["blocks", "groups"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_blocks_without_zeros(draw, batch, gated, kind):
    width, inner = 32, 64
    hidden, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    maps, packed = [], []
    for rows, columns in ((inner, width), (inner, width), (width, inner)):
        weight, bias = draw(rows, columns), draw(rows)
        if kind == "blocks":
            weight[:16, :16] = weight[-16:, 16:] = 0.0
        else:
            weight[:, 1::4] = weight[:, 2::4] = 0.0
        matrix = pack_blocks(weight, 16) if kind == "blocks" else pack_groups(weight, 2, 4)
        maps.append(Linear(weight, bias))
        packed.append(SparseLinear(matrix, bias))
    before, x = hidden.clone(), normed(hidden, norm)
    middle = (
        F.silu(linear(x, maps[0])) * linear(x, maps[1]) if gated else F.silu(linear(x, maps[1]))
    )
    packed[0] = packed[0] if gated else None
    token_step.sparse_step(hidden, Norm(norm, EPS), *packed, "silu")()
    assert_added(hidden, before, linear(middle, maps[2]))


def above(values, thresholds):
    return values * (values.abs() > thresholds)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize(
    ("batch", "width", "inner"), [(1, 37, 19), (2, 16, 5), (7, 64, 130), (16, 5, 33)]
)
def test_selective_blocks(draw, batch, width, inner, gated, columns):
    hidden, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    turn = column_major if columns else torch.Tensor.contiguous
    gate, up = (Linear(turn(draw(inner, width)), draw(inner)) for _ in range(2))
    down = Linear(turn(draw(width, inner)), draw(width))
    generator = torch.Generator().manual_seed(2)
    least = [
        torch.rand(n, generator=generator) * level
        for n, level in ((width, 1.0), (width, 0.5), (inner, 0.1), (inner, 0.05))
    ]
    before, x = hidden.clone(), normed(hidden, norm)
    first = F.silu(linear(above(x, least[0]), gate if gated else up))
    middle = above(first, least[2])
    if gated:
        middle = middle * linear(above(x, least[1]), up)
    step = token_step.selective_step(
        hidden,
        Norm(norm, EPS),
        gate if gated else None,
        up,
        down,
        Thresholds(least[0], least[1] if gated else None, *least[2:]),
        "silu",
    )
    step()
    assert_added(hidden, before, linear(above(middle, least[3]), down))
    assert not torch.equal(hidden, before)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("batch", "width", "inner"), [(1, 37, 19), (7, 64, 130), (16, 5, 33)])
def test_both_factors_through_a_relu(draw, batch, width, inner, activation):
    start, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    gate, up = (Linear(draw(inner, width), draw(inner)) for _ in range(2))
    down, x = Linear(draw(width, inner), draw(width)), normed(start, norm)
    middle = ACTIVATIONS[activation](linear(x, gate)) * linear(x, up).relu()
    for step, laid, thresholds in (
        (token_step.dense_step, down, ()),
        (token_step.selective_step, down, (NO_THRESHOLDS,)),
        (token_step.selective_step, Linear(column_major(down.weight), down.bias), (NO_THRESHOLDS,)),
    ):
        hidden = start.clone()
        step(hidden, Norm(norm, EPS), gate, up, laid, *thresholds, activation, relu_up=True)()
        assert_added(hidden, start, linear(middle, down))


def test_rows_that_zeros_would_multiply_are_not_read(draw):
    width, inner = 40, 64
    hidden, norm = draw(2, width, scale=1.0), draw(width, scale=1.0)
    gate, up = (Linear(draw(inner, width), draw(inner)) for _ in range(2))
    down = Linear(column_major(draw(width, inner)), None)
    silent = torch.arange(0, inner, 3)
    gate.bias[silent] = -100.0
    up.weight[silent], down.weight[:, silent] = torch.nan, torch.nan
    options = (Thresholds(), "relu")
    token_step.selective_step(hidden, Norm(norm, EPS), gate, up, down, *options)()
    assert hidden.isfinite().all()


def test_blocks_that_read_another_stream(draw):
    width, inner, experts = 29, 21, 4
    start, norm = draw(3, width, scale=1.0), draw(width, scale=1.0)
    read, asking = draw(3, width, scale=1.0), draw(3, width, scale=1.0)
    gate, up = (Linear(draw(inner, width), None) for _ in range(2))
    down, x = Linear(draw(width, inner), None), normed(read, norm)
    expected = linear(F.silu(linear(x, gate)) * linear(x, up), down)
    for step, more in ((token_step.dense_step, ()), (token_step.selective_step, (NO_THRESHOLDS,))):
        hidden = start.clone()
        step(hidden, Norm(norm, EPS), gate, up, down, *more, "silu", read=read)()
        assert_added(hidden, start, expected)

    router, w_out = draw(experts, width), draw(experts, width, inner)
    w_in = draw(experts, inner, width)
    for router_input in (None, asking):
        logits = (x if router_input is None else asking).double() @ router.double().T
        expected = torch.zeros_like(x)
        for b, e in enumerate(logits.argmax(-1).tolist()):
            middle = F.silu(linear(x[b], Linear(w_in[e], None)))
            expected[b] = linear(middle, Linear(w_out[e], None))
        hidden = start.clone()
        moe_step(
            hidden,
            Norm(norm, EPS),
            Scorer(router),
            w_in,
            w_out,
            top_k=1,
            activation="silu",
            gated=False,
            router_input=router_input,
            read=read,
        )()
        assert_added(hidden, start, expected)


@pytest.mark.parametrize(
    ("activation", "glu"),
    [
        ("quick_gelu", GLUOptions(limit=0.2, up_shift=1.0)),
        ("silu", GLUOptions(limit=0.2)),
        ("silu", GLUOptions(limit=0.05, limit_after=True)),
        ("silu", GLUOptions(gate_softcap=0.2, up_softcap=0.3)),
    ],
)
def test_bounded_gates(draw, activation, glu):
    batch, width, inner = 3, 29, 21
    start, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    x = normed(start, norm)
    gate, up = (Linear(draw(inner, width), draw(inner)) for _ in range(2))
    down = Linear(draw(width, inner), None)
    hidden = start.clone()
    token_step.dense_step(hidden, Norm(norm, EPS), gate, up, down, activation, glu)()
    middle = gated_unit(linear(x, gate), linear(x, up), activation, glu)
    assert_added(hidden, start, linear(middle, down))


@pytest.mark.parametrize("batch", range(1, 17))
def test_heads(draw, batch):
    hidden, norm = draw(batch, 45, scale=1.0), draw(45, scale=1.0)
    head = Linear(draw(50 + batch, 45), draw(50 + batch) if batch % 2 else None)
    before = hidden.clone()
    logits = token_step.head_step(hidden, Norm(norm, EPS), head)()
    assert torch.equal(hidden, before)
    assert logits.dtype == hidden.dtype
    tolerance = DIGITS[draw.dtype]
    expected = linear(normed(hidden, norm), head)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [256, 301, 512, 1031])  # from 1 KiB on, rows are read one by one
def test_heads_with_long_rows(draw, width):
    hidden, norm = draw(1, width, scale=1.0), draw(width, scale=1.0)
    head = Linear(draw(53, width), draw(53))
    logits = token_step.head_step(hidden, Norm(norm, EPS), head)()
    tolerance = DIGITS[draw.dtype]
    expected = linear(normed(hidden, norm), head)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


def test_threads_change_no_bit(draw):
    width, inner = 200, 1500  # enough for several threads
    parts = [Linear(draw(*shape), None) for shape in 2 * [(inner, width)] + [(width, inner)]]
    hidden, before, results = draw(3, width, scale=1.0), torch.get_num_threads(), []
    start = hidden.clone()
    norm = Norm(draw(width, scale=1.0), EPS)
    step = token_step.dense_step(hidden, norm, *parts, "silu")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            hidden.copy_(start)
            step()
            results.append(hidden.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_where_they_can_not_run(native_library):
    weight = torch.randn(8, 4)
    assert token_step.usable(torch.randn(16, 4), weight, None)
    assert not token_step.usable(torch.randn(17, 4), weight)
    assert not token_step.usable(torch.randn(2, 4).double(), weight.double())
    assert not token_step.usable(torch.randn(2, 4), weight.bfloat16())
    assert not token_step.usable(torch.randn(2, 4), torch.randn(4, 8).T)
    with token_step.backends.use("reference"):
        assert not token_step.usable(torch.randn(2, 4), weight)
