"""A mixture on one token, in C++, against plain torch in fp64, expert by expert."""

import pytest
import torch

import moezoo_kernels
from moezoo_kernels.activations import ACTIVATIONS, PLAIN_GLU, GLUOptions, gated_unit
from moezoo_kernels.moe_step import NO_SHARED, Scorer, Shared, moe_step
from moezoo_kernels.token_step import Linear, Norm

from .test_token_step import EPS, assert_added, draw, linear, normed  # noqa: F401 - a fixture


def answers(x, w_in, w_out, b_in=None, b_out=None, activation="silu", gated=True, **unit):
    """Return what every expert answers to every token, ``(B, E, D)``."""
    rows = []
    for e, (first, second) in enumerate(zip(w_in, w_out, strict=True)):
        inner = linear(x, Linear(first, None if b_in is None else b_in[e]))
        hidden = ACTIVATIONS[activation](inner)
        if gated:
            halves = (
                (inner[:, ::2], inner[:, 1::2]) if unit.get("interleaved") else inner.chunk(2, -1)
            )
            hidden = gated_unit(*halves, activation, unit.get("glu", PLAIN_GLU))
        rows.append(linear(hidden, Linear(second, None if b_out is None else b_out[e])))
    return torch.stack(rows, dim=1)


def summed(each, ranks, weights, top_k):
    """Sum the answers of the best experts, ``(B, D)``; weights ``(B, E)`` of all."""
    chosen = torch.zeros_like(weights).scatter(1, ranks.topk(top_k).indices, 1.0)
    return (each * (weights * chosen).unsqueeze(-1)).sum(dim=1)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("read", ["normed", "other", "hidden"])
@pytest.mark.parametrize(
    ("batch", "experts", "top_k"), [(1, 5, 1), (1, 4, 4), (3, 6, 2), (8, 16, 3)]
)
def test_mixtures(draw, batch, experts, top_k, read, biased, normalize, softmax):  # noqa: F811
    width, inner = 29, 21
    hidden, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    router = draw(experts, width)
    w_in, w_out = draw(experts, 2 * inner, width), draw(experts, width, inner)
    b_in, b_out = (draw(experts, n) if biased else None for n in (2 * inner, width))
    selection = torch.linspace(-1, 1, experts).flip(0) if biased else None
    before, x = hidden.clone(), normed(hidden, norm).to(draw.dtype).double()
    asking = {"other": draw(batch, width, scale=1.0), "hidden": hidden}.get(read)
    logits = (x if asking is None else asking.double()) @ router.double().T
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    ranks = scores if selection is None else scores + selection
    best = scores.gather(1, ranks.topk(top_k).indices)
    weights = 1.5 * scores / (best.sum(1, keepdim=True) if normalize else 1.0)
    expected = summed(answers(x, w_in, w_out, b_in, b_out), ranks, weights, top_k)
    step = moe_step(
        hidden,
        Norm(norm, EPS),
        Scorer(router),
        w_in,
        w_out,
        top_k=top_k,
        activation="silu",
        gated=True,
        bias_in=b_in,
        bias_out=b_out,
        softmax=softmax,
        normalize=normalize,
        factor=1.5,
        selection_bias=selection,
        router_input=asking,
    )
    step()
    assert_added(hidden, before, expected)


@pytest.mark.parametrize(
    ("activation", "glu"),
    [
        ("quick_gelu", GLUOptions(limit=0.2, up_shift=1.0)),
        ("silu", GLUOptions(limit=0.05, limit_after=True)),
        ("silu", GLUOptions(gate_softcap=0.2, up_softcap=0.3)),
    ],
)
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_bounded_experts(draw, batch, weighed, activation, glu):  # noqa: F811
    """Rows of gates and linear factors lie in turn in the experts, and not in the shared block."""
    width, inner, shared, experts = 29, 21, 17, 4
    hidden, norm = draw(batch, width, scale=1.0), draw(width, scale=1.0)
    before, x = hidden.clone(), normed(hidden, norm).to(draw.dtype).double()
    router, w_out = draw(experts, width), draw(experts, width, inner)
    w_in, b_in = draw(experts, 2 * inner, width), draw(experts, 2 * inner)
    gate, up = (Linear(draw(shared, width), draw(shared)) for _ in range(2))
    down = Linear(draw(width, shared), draw(width))
    scores = (x @ router.double().T).sigmoid()
    each = answers(x, w_in, w_out, b_in, activation=activation, glu=glu, interleaved=True)
    expected = summed(each, scores, scores, 2)
    always = linear(gated_unit(linear(x, gate), linear(x, up), activation, glu), down)
    weigh = draw(1, width, scale=0.5) if weighed else None
    expected += always if weigh is None else (x @ weigh.double().T).sigmoid() * always
    step = moe_step(
        hidden,
        Norm(norm, EPS),
        Scorer(router),
        w_in,
        w_out,
        top_k=2,
        activation=activation,
        gated=True,
        bias_in=b_in,
        softmax=False,
        normalize=False,
        shared=Shared(gate, up, down, weigh),
        glu=glu,
        interleaved=True,
    )
    step()
    assert_added(hidden, before, expected)


class Carved:
    """A dense block that is cut up: a shared part, fine experts, and what scores them."""

    def __init__(self, draw, scoring, gated, bias, sizes, asking=None):  # noqa: F811
        self.batch, width, inner, self.experts, self.top_k, shared = sizes
        self.hidden, self.norm = draw(self.batch, width, scale=1.0), draw(width, scale=1.0)
        self.activation, self.gated, self.scoring = "silu" if gated else "gelu", gated, scoring
        read = width + shared if scoring == "with_shared" else width
        neurons = "neurons" in scoring
        self.scorer = Scorer(
            draw(self.experts, read, scale=0.3),
            draw(self.experts, scale=0.3) if bias or not neurons else None,
            draw(self.experts, read, scale=0.3) if gated and neurons else None,
            scoring,
        )
        self.w_in = draw(self.experts, (2 if gated else 1) * inner, width)
        self.w_out = draw(self.experts, width, inner)
        self.b_in = draw(*self.w_in.shape[:2]) if bias else None
        b_out = draw(width) if bias else None
        self.shared = NO_SHARED._replace(down=Linear(None, b_out))
        if shared:
            gate, up = (
                Linear(draw(shared, width), draw(shared) if bias else None) for _ in range(2)
            )
            self.shared = Shared(gate if gated else None, up, Linear(draw(width, shared), b_out))
        self.selection = torch.linspace(-0.1, 0.1, self.experts)
        self.scales = torch.linspace(-1.0, 2.0, self.experts)
        self.asking = asking

    def expected(self):
        x = normed(self.hidden, self.norm).to(self.hidden.dtype).double()
        read, always, act = x, torch.zeros_like(x), ACTIVATIONS[self.activation]
        if self.asking is not None:
            read = self.asking.double()
        gate, up, down, _ = self.shared
        if up is not None:
            hidden = act(linear(x, up)) if gate is None else act(linear(x, gate)) * linear(x, up)
            always = linear(hidden, down._replace(bias=None))
            if self.scoring == "with_shared":
                read = torch.cat([read, hidden.abs()], dim=1)
        if down.bias is not None:
            always = always + down.bias.double()
        rows, bias, of_up, _ = self.scorer
        logits = linear(read, Linear(rows, bias))
        if "neurons" in self.scoring:
            logits = act(logits) * (1.0 if of_up is None else read @ of_up.double().T)
        if self.scoring == "neurons":
            logits = logits.abs()
        scores = logits.softmax(-1)
        each = answers(x, self.w_in, self.w_out, self.b_in, None, self.activation, self.gated)
        ranks, weights = scores + self.selection, 1 + scores * self.scales
        return always + summed(each, ranks, weights, self.top_k)

    def step(self):
        moe_step(
            self.hidden,
            Norm(self.norm, EPS),
            self.scorer,
            self.w_in,
            self.w_out,
            top_k=self.top_k,
            activation=self.activation,
            gated=self.gated,
            bias_in=self.b_in,
            normalize=False,
            selection_bias=self.selection,
            scales=self.scales,
            shared=self.shared,
            router_input=self.asking,
        )()


SIZES = [(1, 37, 16, 9, 4, 19), (1, 300, 5, 40, 12, 0), (1, 24, 33, 3, 3, 7), (5, 29, 8, 6, 2, 11)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scoring", ["linear", "with_shared", "neurons", "signed_neurons"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_carved_blocks(draw, sizes, scoring, gated, bias):  # noqa: F811
    if scoring == "with_shared" and not sizes[-1]:
        pytest.skip("there is no shared part to read")
    carved = Carved(draw, scoring, gated, bias, sizes)
    before, expected = carved.hidden.clone(), carved.expected()
    carved.step()
    assert_added(carved.hidden, before, expected)


@pytest.mark.parametrize("scoring", ["linear", "neurons"])
def test_a_router_may_read_what_experts_do_not(draw, scoring):  # noqa: F811
    asking = draw(2, 29, scale=1.0)
    carved = Carved(draw, scoring, True, True, (2, 29, 8, 6, 2, 11), asking)
    before, expected = carved.hidden.clone(), carved.expected()
    carved.step()
    assert_added(carved.hidden, before, expected)
    carved.scoring, carved.scorer = "with_shared", carved.scorer._replace(scoring="with_shared")
    with pytest.raises(ValueError, match="with_shared: the router reads x and a shared block"):
        carved.step()


def test_equal_scores_are_told_apart_by_their_logits(native_library):
    """A softmax makes zeros of logits far below the highest; among equals the lower number wins."""
    experts, width = 5, 8
    hidden, norm = torch.ones(1, width), torch.ones(width)
    logits = torch.tensor([200.0, -30.0, 50.0, 50.0, -20.0])
    w_out = torch.eye(experts, width)[:, :, None]
    step = moe_step(
        hidden,
        Norm(norm, 0.0),
        Scorer(torch.zeros(experts, width), logits),
        torch.ones(experts, 1, width),
        w_out,
        top_k=3,
        activation="relu",
        gated=False,
        normalize=False,
        scales=torch.zeros(experts),
    )
    step()
    assert (hidden - 1).squeeze(0).tolist() == [8.0, 0.0, 8.0, 8.0, 0.0, 0.0, 0.0, 0.0]
    hidden.fill_(1.0)
    logits[3] = 49.0
    logits[1] = 49.0
    step()
    assert (hidden - 1).squeeze(0).tolist() == [8.0, 8.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_threads_change_no_bit(draw):  # noqa: F811
    carved = Carved(draw, "with_shared", True, True, (1, 700, 16, 30, 12, 300))
    start, before, results = carved.hidden.clone(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            carved.hidden.copy_(start)
            carved.step()
            results.append(carved.hidden.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("routing", ["repeated", "some_none", "all_none"])
@pytest.mark.parametrize(("width", "inner"), [(40, 16), (300, 7), (9, 260)])
def test_one_tokens_fine_experts_outside_a_step(
    make_problem, assert_close, native_library, width, inner, routing
):
    """An expert may be chosen twice there, or none; from 256 numbers on, rows are not short."""
    made = make_problem(1, width, inner, 11, 6, routing=routing)
    expected = made.run(moezoo_kernels.grouped_mlp)
    small = made.to(torch.float32)
    with torch.no_grad(), moezoo_kernels.use("cpu"):
        found = small.run(moezoo_kernels.grouped_mlp)
    assert_close([found], [expected.detach()], 1e-5)
