"""Layers of token rows: what they read and move, folding, what is refused."""

import pytest
import torch

import moezoo
from moezoo import L3, STEM, Engram, InputError, MoLE, PerLayerEmbedding
from moezoo.experts.token_table import TokenTable
from moezoo.feed_forward import TokenContext

D, V = 16, 30
IDS = torch.tensor([[3, 7, 3, 11, 0], [7, 7, 29, 2, 3]])
MASK = torch.tensor([[True] * 5, [False, True, True, True, False]])


def make(cls: type[moezoo.FeedForward], **arguments) -> moezoo.FeedForward:
    torch.manual_seed(0)
    return cls(D, vocab_size=V, **arguments).double()


def hidden() -> torch.Tensor:
    return torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LAYERS = {
    "stem": lambda **more: make(STEM, **more),
    "mole": lambda **more: make(MoLE, num_experts=3, **more),
    "folded mole": lambda **more: make(MoLE, num_experts=3, folded=True, **more),
    "engram": lambda **more: make(Engram, num_heads=2, num_rows=40, **more),
    "l3": lambda **more: make(L3, max_rows=3, num_rows=70, **more),
    "per layer": lambda **more: make(PerLayerEmbedding, d_row=5, **more),
}


def read_rows(layer: moezoo.FeedForward) -> set[int]:
    """The rows that the calls of these tests read."""
    if isinstance(layer, Engram | L3):
        rows, _ = layer.rows_of(hidden(), TokenContext(token_ids=IDS, mask=MASK))
        return set(rows[MASK.flatten()].flatten().tolist()) - {-1}
    tokens = set(IDS[MASK].tolist())
    if isinstance(layer, MoLE) and layer.folded:
        return {token * 3 + expert for token in tokens for expert in range(3)}
    return tokens


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_the_rows_of_real_tokens_only(name, sparse):
    layer = LAYERS[name](sparse=sparse)
    (group,) = (g for g in layer.parameter_groups() if g.name == "token rows")
    assert (group.sparse, group.weight_decay) == (sparse, False)
    (table,) = group.parameters
    layer(hidden(), token_ids=IDS, mask=MASK).hidden.square().sum().backward()
    assert table.grad.is_sparse == sparse
    found = table.grad.to_dense().any(dim=1).nonzero().flatten().tolist()
    assert set(found) == read_rows(layer)
    if sparse:
        before = table.detach().clone()
        torch.optim.SparseAdam([table], lr=0.1).step()
        changed = (table != before).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) == read_rows(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_the_learning_rate_of_the_rows_is_their_own(name):
    groups = {g.name: g for g in LAYERS[name](table_lr_multiplier=3.0).parameter_groups()}
    assert groups["token rows"].lr_multiplier == 3.0
    assert groups["matrices"].lr_multiplier == 1.0


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "token_ids: missing"),
        (torch.full((2, 5), V), f"token_ids: id {V} is outside the table of {V}"),
        (IDS[:, :3], r"token_ids: shape \(2, 3\) does not match"),
    ],
)
def test_tokens_without_a_row_are_named(name, ids, message):
    with pytest.raises(InputError, match=message):
        LAYERS[name]()(hidden(), token_ids=ids)


def test_rows_come_back_in_the_shape_of_their_indices():
    table = TokenTable(9, 4, std=0.5)
    indices = torch.tensor([[3, -1], [8, 3]])
    expected = table.weight[indices.clamp(min=0)] * (indices >= 0).unsqueeze(-1)
    assert torch.equal(table.rows(indices), expected)
    assert torch.equal(table.reference_rows(indices), expected)
    assert table.rows(indices[:0]).shape == (0, 2, 4)


def test_a_row_of_stem_is_all_that_the_block_knows_of_a_token():
    layer = make(STEM).eval()
    with torch.no_grad():
        layer.table.weight[3] = layer.table.weight[7]
        same = layer(hidden(), token_ids=torch.full((2, 5), 3)).hidden
        assert torch.equal(same, layer(hidden(), token_ids=torch.full((2, 5), 7)).hidden)
        assert not torch.equal(same, layer(hidden(), token_ids=torch.full((2, 5), 8)).hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("arguments", [{}, {"gated": False, "bias": True, "d_expert": 5}], ids=str)
def test_a_folded_layer_computes_the_same_without_experts(arguments, dtype, monkeypatch):
    import moezoo.layers.mole as module

    monkeypatch.setattr(module, "_FOLD_TOKENS", 7)
    layer = make(MoLE, num_experts=3, **arguments).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    folded = layer.fold()
    assert not any("experts" in name or "embedding" in name for name in folded.state_dict())
    x = hidden().to(dtype)
    with torch.no_grad():
        expected, found = (each(x, token_ids=IDS, mask=MASK).hidden for each in (layer, folded))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    again = moezoo.FeedForward.from_config(folded.config()).to(dtype)
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again(x, token_ids=IDS, mask=MASK).hidden, found)
    with pytest.raises(InputError, match="folded: the layer is folded already"):
        folded.fold()


def test_layers_of_a_pool_read_one_table_of_embeddings():
    with moezoo.shared_values():
        layers = torch.nn.ModuleList(make(MoLE, embedding_pool="tokens") for _ in range(2))
    names = [name for name in layers.state_dict() if "embedding" in name]
    assert names == ["0.embedding.weight"]
    assert layers[1].embeddings is layers[0].embedding
    assert layers[0].cost().total_parameters - layers[1].cost().total_parameters == V * D
    groups = [group for layer in layers for group in layer.parameter_groups()]
    assert sum(group.name == "token rows" for group in groups) == 1
    layers[1](hidden(), token_ids=IDS).hidden.sum().backward()
    assert layers[0].embedding.weight.grad.any()
    with pytest.raises(InputError, match="embedding_pool: 3 is not a name"):
        make(MoLE, embedding_pool=3)


def test_documents_of_one_sequence_are_to_engram_as_each_alone():
    layer = make(Engram, num_heads=2, num_rows=40, boundary_id=2).eval()
    ids = torch.tensor([[5, 9, 2, 5, 9, 7, 2]])
    x = torch.randn(1, 7, D, dtype=torch.float64)
    together = layer(x, token_ids=ids).hidden
    alone = [layer(x[:, part], token_ids=ids[:, part]).hidden for part in (slice(3), slice(3, 7))]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-14)
    # What follows an end is not what would follow the token that stands there.
    unaware = make(Engram, num_heads=2, num_rows=40).eval()
    found = unaware(x, token_ids=ids).hidden
    first = unaware(x[:, 3:], token_ids=ids[:, 3:]).hidden
    assert not torch.allclose(found[:, 3], first[:, 0])
    assert torch.allclose(found[:, 5:], first[:, 2:])


def test_the_gate_of_engram_is_half_open_where_nothing_fits_and_follows_the_fit():
    layer = make(Engram, num_heads=2, num_rows=40).eval()
    x, e = torch.randn(3, D, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.key_proj.weight.copy_(torch.eye(D))
        assert (layer._openness(e, e) > 0.85).all()  # of z = sqrt(D) and sqrt(z) = 2
        assert (layer._openness(-e, e) < 0.15).all()
        layer.query_norm.weight.zero_()
        assert (layer._openness(x, e) == 0.5).all()


def test_rows_of_l3_are_its_tokens_own_and_weighed_by_fit():
    layer = make(L3, max_rows=3, num_rows=70).eval()
    assert layer.starts.diff().tolist() == [3] * 10 + [2] * 20
    context = TokenContext(token_ids=torch.tensor([[0, 29]]))
    rows, _ = layer.rows_of(torch.zeros(1, 2, D), context)
    assert rows.tolist() == [[0, 1, 2], [68, 69, -1]]
    with torch.no_grad():
        layer.keys.weight[1] = 9 * torch.eye(D)[0]
        layer.keys.weight[[0, 2]] = 0.0
        x = torch.eye(D, dtype=torch.float64)[:2].unsqueeze(0)
        found = layer.slot_load(x, token_ids=torch.zeros(1, 2, dtype=torch.int64))
    # RMSNorm makes 4 of 1: exp(36) against two of exp(0), and then no difference.
    torch.testing.assert_close(found.mass[:3], torch.tensor([1, 4, 1], dtype=torch.float64) / 3)
    assert found.counts[:4].tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 29}, "num_rows: 29 is out of range"),
        ({"num_rows": 91, "max_rows": 3}, "num_rows: 91 is out of range"),
        ({"allocation": "even"}, "allocation: 'even' is not"),
    ],
)
def test_what_l3_cannot_be_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make(L3, **arguments)


def test_l3_waits_for_its_rows_and_keeps_them():
    layer = make(L3, allocation="words", max_rows=4, num_rows=60)
    assert layer.missing_input == "tokens"
    with pytest.raises(InputError, match="allocation: no token has its rows by words yet"):
        layer(hidden(), token_ids=IDS)
    for given, message in [({}, "tokens: missing"), ({"tokens": IDS + 27}, "tokens: id 30 is out")]:
        with pytest.raises(InputError, match=message):
            layer.allocate(**given)
    layer.allocate(tokens=torch.arange(900) % 7)
    assert layer.missing_input is None
    assert layer.starts.diff().tolist() == [4] * 7 + [2] * 9 + [1] * 14
    again = make(L3, allocation="words", max_rows=4, num_rows=60)
    again.load_state_dict(layer.state_dict())
    expected = layer(hidden(), token_ids=IDS).hidden
    assert torch.equal(again(hidden(), token_ids=IDS).hidden, expected)
    again.check_table()
    again.starts[3] += 5
    with pytest.raises(InputError, match="starts: they are not those of 60 rows, 1 to 4 for"):
        again.check_table()
    for rows in (torch.ones(29, dtype=torch.int64), torch.full((30,), 2.0), torch.full((30,), 3)):
        with pytest.raises(InputError, match="rows: "):
            layer.set_rows(rows)
    with pytest.raises(InputError, match="allocation: all tokens have the same rows"):
        make(L3).allocate(tokens=IDS)
    counted = make(L3, allocation="frequency")
    with pytest.raises(InputError, match="frequencies: there are 29; give one per token, 30"):
        counted.allocate(frequencies=torch.ones(29))


def test_embeddings_of_another_shape_are_named():
    layer = make(PerLayerEmbedding)
    with pytest.raises(InputError, match=r"embeddings: shape \(2, 4, 16\) does not match"):
        layer(hidden(), token_ids=IDS, embeddings=hidden()[:, 1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_memory": 30}, "d_memory: 30 is not a multiple of the 16 rows of a token"),
        ({"gate": 1}, "gate: 1 is neither true nor false"),
        ({"num_rows": 1}, "num_rows: 1 is out of range"),
    ],
)
def test_what_engram_cannot_be_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make(Engram, **arguments)
