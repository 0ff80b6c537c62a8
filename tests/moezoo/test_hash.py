"""Hash layers against their paper: who is chosen, how even the load is, what survives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo import FeedForward, HashLayer, InputError, SparseMoE
from moezoo.routing import hashing

D, V, E = 16, 50, 5
KEYS = ["token", "previous", "bigram", "position", "future"]


def make(**arguments) -> HashLayer:
    torch.manual_seed(0)
    layer = HashLayer(D, **{"num_experts": E, "d_expert": 12, "vocab_size": V, **arguments})
    return layer.double().eval()


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
    return hidden, torch.randint(V, shape, generator=generator)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zipf(count: int) -> torch.Tensor:
    return 1 / torch.arange(1, count + 1, dtype=torch.float64)


def load(table: torch.Tensor, frequencies: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Share of the tokens that each expert is given."""
    share = frequencies.double() / frequencies.sum()
    return torch.zeros(num_experts, dtype=torch.float64).index_add_(0, table, share)


# Who is chosen


def expected_hash(layer: HashLayer, ids: list[int], t: int) -> list[int]:
    """The hash of token t of a sequence without padding, in words of the paper."""
    rows = layer.table.tolist()
    previous = ids[t - 1] if t else V
    following = ids[t + 1] if t + 1 < len(ids) else V
    if layer.key == "position":
        return [t % E]
    if layer.key == "bigram":
        half = len(rows) // 2
        return [(rows[r][previous] + rows[half + r][ids[t]]) % E for r in range(half)]
    token = {"token": ids[t], "previous": previous, "future": following}[layer.key]
    return [row[token] for row in rows]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_experts_are_those_of_the_formula(key, num_hashes):
    if key == "position" and num_hashes > 1:
        pytest.skip("positions have one hash")
    layer = make(key=key, num_hashes=num_hashes)
    hidden, ids = inputs(3, 11)
    chosen = layer.route(hidden, ids).indices.reshape(3, 11, num_hashes)
    for b in range(3):
        for t in range(11):
            hashes = expected_hash(layer, ids[b].tolist(), t)
            assert chosen[b, t].tolist() == [h * num_hashes + r for r, h in enumerate(hashes)]


@pytest.mark.parametrize("key", KEYS)
def test_padding_is_no_neighbour_and_no_position(key):
    layer = make(key=key)
    hidden, ids = inputs(2, 9)
    alone = layer(hidden, token_ids=ids)
    wide_hidden = torch.nn.functional.pad(hidden, (0, 0, 4, 3))
    wide_ids = torch.nn.functional.pad(ids, (4, 3), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 3)).bool()
    padded = layer(wide_hidden, token_ids=wide_ids, mask=mask)
    torch.testing.assert_close(padded.hidden[:, 4:-3], alone.hidden, rtol=1e-12, atol=1e-14)
    assert not padded.hidden[:, :4].any()
    for name, value in alone.stats.items():
        assert torch.equal(padded.stats[name], value), name


@pytest.mark.parametrize("key", ["token", "previous", "bigram", "position"])
@pytest.mark.parametrize("shape", [(9,), (2, 9)])
def test_earlier_tokens_may_stand_before_those_of_the_call(key, shape):
    layer = make(key=key)
    hidden, ids = inputs(*shape)
    mask = torch.arange(9).expand(shape) >= 2
    whole = layer(hidden, token_ids=ids, mask=mask).hidden
    for end in range(3, 10):
        here = (..., slice(end - 1, end), slice(None))
        last = layer(hidden[here], token_ids=ids[..., :end], mask=mask[..., :end]).hidden
        torch.testing.assert_close(last, whole[here], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("key", KEYS)
def test_only_the_oracle_sees_a_later_token(key):
    layer = make(key=key)
    hidden, ids = inputs(1, 12)
    changed = ids.clone()
    changed[:, 7:] = (ids[:, 7:] + 1 + torch.arange(5)) % V
    before, after = (layer(hidden, token_ids=i).hidden[:, :7] for i in (ids, changed))
    same = torch.allclose(before, after, rtol=0, atol=1e-12)
    assert same == layer.causal == (key != "future")


def test_hidden_states_never_change_the_routing():
    layer = make(num_hashes=2)
    hidden, ids = inputs(4, 30)
    before = layer.route(hidden, ids).indices
    assert torch.equal(layer.route(torch.randn_like(hidden) * 100, ids).indices, before)
    assert not torch.equal(layer.route(hidden, (ids + 1) % V).indices, before)


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_only_chosen_segments_get_gradients(num_hashes):
    layer = make(num_hashes=num_hashes)
    hidden, _ = inputs(6)
    ids = torch.tensor([3, 3, 4, 3, 4, 4])
    layer(hidden, token_ids=ids).hidden.sum().backward()
    chosen = torch.zeros(E * num_hashes, dtype=torch.bool)
    for token in (3, 4):
        for r in range(num_hashes):
            chosen[layer.table[r, token] * num_hashes + r] = True
    assert chosen.sum() < len(chosen)
    for parameter in layer.experts.parameters():
        assert torch.equal(parameter.grad.flatten(1).any(dim=1), chosen)


def test_multi_hash_is_the_papers_formula():
    """``v = relu([B_{k1} h, …, B_{kR} h])`` and ``y = Σ_r C_{kr} v_r``."""
    layer = make(num_hashes=3)
    hidden, ids = inputs(20)
    up = layer.experts.gate_up_proj.reshape(E, 3, 4, D)  # 3 segments of 12 / 3
    down = layer.experts.down_proj.reshape(E, 3, D, 4)
    for h, token, y in zip(hidden, ids, layer(hidden, token_ids=ids).hidden, strict=True):
        k = layer.table[:, token]
        v = torch.cat([up[k[r], r] @ h for r in range(3)]).relu()
        expected = torch.cat([down[k[r], r] for r in range(3)], dim=1) @ v
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)


def test_multi_hash_with_equal_hashes_is_a_single_hash():
    single, multi = make(), make(num_hashes=3)
    with torch.no_grad():
        multi.experts.gate_up_proj.copy_(single.experts.gate_up_proj.reshape(3 * E, 4, D))
        down = single.experts.down_proj.reshape(E, D, 3, 4).transpose(1, 2)
        multi.experts.down_proj.copy_(down.reshape(3 * E, D, 4))
    multi.set_table(single.table[:, :-1].expand(3, -1))
    hidden, ids = inputs(2, 13)
    torch.testing.assert_close(
        multi(hidden, token_ids=ids).hidden, single(hidden, token_ids=ids).hidden
    )
    assert multi.cost() == single.cost()


def test_one_expert_is_the_dense_block_and_costs_the_same():
    layer = HashLayer(64, num_experts=16)
    assert layer.cost().flops_per_token == 4 * 64 * layer.d_expert
    assert layer.d_expert == 256
    assert layer.cost().total_parameters == 16 * layer.cost().active_parameters


@pytest.mark.parametrize("key", ["token", "previous", "position"])
def test_parlais_block_has_an_inner_residual_and_one_norm(key):
    """Token by token in words of their code; outputs and every gradient."""
    layer = make(compat="parlai", key=key, bias=True)
    parameters = list(layer.parameters())
    assert len(parameters) == 6  # two matrices and biases of all experts; one norm
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    hidden, ids = inputs(3, 11)
    hidden.requires_grad_()
    direction = torch.randn_like(hidden)
    mask = torch.arange(11).expand(3, 11) >= torch.tensor([[0], [2], [0]])

    def gradients(y: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((y * direction).sum(), [hidden, *parameters]))

    experts, rows = layer.experts, []
    for b in range(3):
        start = int((~mask[b]).sum())
        rows.append([torch.zeros(D, dtype=torch.float64)] * start)
        for t in range(start, 11):
            k = expected_hash(layer, ids[b, start:].tolist(), t - start)[0]
            x = hidden[b, t]
            inner = (experts.gate_up_proj[k] @ x + experts.gate_up_bias[k]).relu()
            total = x + experts.down_proj[k] @ inner + experts.down_bias[k]
            centred = total - total.mean()
            unit = centred / (centred.square().mean() + 1e-5).sqrt()
            rows[-1].append(unit * layer.norm.weight + layer.norm.bias)
    expected = torch.stack([torch.stack(row) for row in rows])
    wanted = gradients(expected)
    for call in (layer, layer.reference):
        y = call(hidden, token_ids=ids, mask=mask).hidden
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        for found, true in zip(gradients(y), wanted, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_parlais_block_counts_its_norm_and_is_off_by_default():
    plain, theirs = make(), make(compat="parlai")
    assert plain.norm is None
    assert theirs.cost().total_parameters == sum(p.numel() for p in theirs.parameters())
    assert theirs.cost().flops_per_token == plain.cost().flops_per_token
    assert FeedForward.from_config(theirs.config()).norm is not None
    theirs.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = theirs(torch.randn(4, D), token_ids=torch.arange(4)).hidden
    assert y.dtype == torch.bfloat16


# Tables


def test_random_tables_pass_a_chi_squared_test():
    table = hashing.random_experts(1, 32000, 64, generator())[0]
    counts = torch.bincount(table, minlength=64)
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    # 63 degrees of freedom: mean 63, deviation sqrt(126).
    assert abs(chi_squared - 63) < 4 * math.sqrt(126)


@pytest.mark.parametrize(("vocab_size", "num_experts"), [(32000, 64), (1000, 7), (40, 16)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_balanced_tables_keep_the_bound_and_random_ones_do_not(vocab_size, num_experts, shuffled):
    frequencies = zipf(vocab_size)
    share = frequencies / frequencies.sum()
    table = hashing.balanced_table(frequencies, num_experts, generator() if shuffled else None)
    heavy = 0  # tokens that alone are more than the fair share of what is left
    while share[heavy] > share[heavy:].sum() / (num_experts - heavy):
        heavy += 1
    rest = share[heavy:]
    loads = load(table, frequencies, num_experts)
    bound = max(share[0], 1 / num_experts + rest.max())
    assert loads.max() <= bound * (1 + 1e-12)
    assert loads.sum() == pytest.approx(1)
    if vocab_size >= 1000:
        light = torch.ones(num_experts, dtype=torch.bool)
        light[table[:heavy]] = False
        assert loads[light].max() / loads[light].min() - 1 < 1e-3
        assert loads.max() == pytest.approx(max(share[0], loads[light].max()))
        random = load(
            hashing.random_experts(1, vocab_size, num_experts, generator())[0],
            frequencies,
            num_experts,
        )
        assert random[light].max() / random[light].min() - 1 > 0.5
        assert random.max() > loads.max()


@given(
    counts=st.lists(st.integers(0, 1000), min_size=1, max_size=60).filter(any),
    num_experts=st.integers(1, 9),
    shuffled=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_balanced_tables_keep_the_bound_whatever_the_counts(counts, num_experts, shuffled):
    frequencies = torch.tensor(counts)
    table = hashing.balanced_table(frequencies, num_experts, generator() if shuffled else None)
    loads = torch.zeros(num_experts, dtype=torch.int64).index_add_(0, table, frequencies)
    heaviest = frequencies.max()
    assert loads.max() <= max(heaviest, frequencies.sum() / num_experts + heaviest)
    unseen = torch.bincount(table[frequencies == 0], minlength=num_experts)
    assert unseen.max() - unseen.min() <= 1


def clusters_of(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Well separated clouds of points, shuffled, and the cloud of each."""
    cloud = torch.arange(count).repeat_interleave(size)[
        torch.randperm(count * size, generator=generator(3))
    ]
    centres = torch.randn(count, 8, generator=generator(4)) * 50
    return centres[cloud] + torch.randn(count * size, 8, generator=generator(5)), cloud


def test_clustered_tables_keep_clusters_together():
    embeddings, cloud = clusters_of(6, 25)
    table = hashing.clustered_table(embeddings, 6, generator())
    assert len({(c, e) for c, e in zip(cloud.tolist(), table.tolist(), strict=True)}) == 6
    assert table.unique().numel() == 6


def test_dispersed_tables_take_clusters_apart_and_are_even():
    embeddings, cloud = clusters_of(6, 25)
    table = hashing.dispersed_table(embeddings, 10, generator(), num_clusters=6)
    for c in range(6):
        counts = torch.bincount(table[cloud == c], minlength=10)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(torch.bincount(table), torch.full((10,), 15))


@pytest.mark.parametrize("num_clusters", [1, 4, 12])
def test_k_means_ends_where_no_point_has_a_nearer_centre(num_clusters):
    points = torch.randn(12 if num_clusters == 12 else 90, 3, generator=generator())
    cluster = hashing.k_means(points, num_clusters, generator(), iterations=1000)
    assert cluster.unique().tolist() == list(range(num_clusters))
    centres = torch.stack([points[cluster == k].mean(dim=0) for k in range(num_clusters)])
    assert torch.equal(torch.cdist(points, centres).argmin(dim=-1), cluster)
    assert hashing.k_means(torch.ones(9, 2), 3, generator()).shape == (9,)  # all alike


def test_tables_are_the_same_in_every_process():
    torch.manual_seed(123)
    assert make().table[0, :12].tolist() == [4, 4, 3, 0, 3, 4, 2, 3, 2, 3, 1, 1]
    assert torch.equal(make(seed=1).table, make(seed=1).table)
    assert not torch.equal(make(seed=1).table, make().table)
    layer = make(hash_function="clustered")
    embeddings = torch.randn(V, 4, generator=generator())
    layer.build_table(embeddings=embeddings)
    first = layer.table.clone()
    torch.rand(7)
    layer.build_table(embeddings=embeddings)
    assert torch.equal(layer.table, first)


@pytest.mark.parametrize("hash_function", ["random", "balanced", "clustered", "dispersed"])
@pytest.mark.parametrize("num_hashes", [1, 2])
def test_tables_survive_the_state_dict(hash_function, num_hashes):
    arguments = {"hash_function": hash_function, "num_hashes": num_hashes}
    layer = make(seed=1, **arguments)
    sources = {"frequencies": zipf(V), "embeddings": torch.randn(V, 4, generator=generator())}
    if hash_function != "random":
        layer.build_table(**sources)
    assert 0 <= layer.table.min() <= layer.table.max() < E
    if num_hashes == 2:
        assert not torch.equal(layer.table[0], layer.table[1])
    again = make(seed=2, **arguments)
    again.load_state_dict(layer.state_dict())
    hidden, ids = inputs(3, 8)
    assert torch.equal(again.table, layer.table)
    assert again.table.dtype == torch.int64
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    assert torch.equal(again(hidden, token_ids=ids).hidden, layer(hidden, token_ids=ids).hidden)
    torch.testing.assert_close(
        compiled(hidden, token_ids=ids).hidden, layer(hidden, token_ids=ids).hidden
    )


def test_statistics_tell_how_even_the_load_is():
    layer = make()
    layer.set_table(torch.arange(V) % E)
    hidden, _ = inputs(30)
    even = layer(hidden, token_ids=torch.arange(30)).stats
    assert even["expert_counts"].tolist() == [6] * E
    assert even["usage"] == 1
    assert even["unevenness"] == pytest.approx(0, abs=1e-6)
    one = layer(hidden, token_ids=torch.zeros(30, dtype=torch.int64)).stats
    assert one["usage"] == pytest.approx(1 / E)
    assert one["unevenness"] == pytest.approx(math.log(E))


# Mistakes


def test_the_oracle_is_refused_in_training_unless_flagged():
    hidden, ids = inputs(5)
    with pytest.raises(InputError, match=r"key: 'future' reads the token"):
        make(key="future").train()(hidden, token_ids=ids)
    assert make(key="future")(hidden, token_ids=ids).hidden.shape == hidden.shape
    flagged = make(key="future", allow_future=True).train()
    assert flagged(hidden, token_ids=ids).hidden.shape == hidden.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_hashes": 5}, r"num_hashes: 5 does not divide d_expert=12"),
        ({"key": "position", "num_hashes": 2}, r"num_hashes: positions have one hash"),
        ({"key": "bigram", "hash_function": "balanced"}, r"hash_function: 'balanced' is a hash of"),
        ({"key": "next"}, r"key: 'next' is not known"),
        ({"compat": "parlay"}, r"compat: 'parlay' is not known; did you mean 'parlai'"),
        ({"compat": "parlai", "num_hashes": 2}, r"compat: .* set .* num_hashes and top_k to 1"),
        ({"compat": "parlai", "activation": "gelu"}, r"compat: .* set activation to relu"),
        ({"hash_function": "balance"}, r"did you mean 'balanced'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)


def test_wrong_tensors_are_named():
    layer = make()
    hidden, ids = inputs(2, 6)
    with pytest.raises(InputError, match=r"token_ids: missing"):
        layer(hidden)
    with pytest.raises(InputError, match=r"token_ids: shape \(2, 5\) does not match .*\(2, 6\)"):
        layer(hidden, token_ids=ids[:, :5])
    with pytest.raises(InputError, match=r"mask: shape \(2, 4\) does not match"):
        layer(hidden, token_ids=ids, mask=torch.ones(2, 4, dtype=torch.bool))
    for wrong in (V, -1):
        with pytest.raises(InputError, match=rf"token_ids: id {wrong} is outside .* of {V}"):
            layer(hidden, token_ids=torch.full_like(ids, wrong))


def test_wrong_tables_are_named():
    hidden, ids = inputs(4)
    layer = make(hash_function="balanced")
    with pytest.raises(InputError, match=r"the balanced table is not built; call build_table"):
        layer(hidden, token_ids=ids)
    with pytest.raises(InputError, match=r"frequencies: missing; .* one per token, 50"):
        layer.build_table(embeddings=torch.randn(V, 3))
    with pytest.raises(InputError, match=r"frequencies: there are 49"):
        layer.build_table(frequencies=torch.ones(49))
    with pytest.raises(InputError, match=r"frequencies: give one number ≥ 0 per token"):
        layer.build_table(frequencies=torch.zeros(V))
    with pytest.raises(InputError, match=r"embeddings: 50 tokens do not make 51 clusters"):
        make(num_experts=51, hash_function="clustered").build_table(embeddings=torch.ones(V, 2))
    with pytest.raises(InputError, match=r"hash_function: a random table is there already"):
        make().build_table(frequencies=torch.ones(V))
    with pytest.raises(
        InputError, match=r"table: it holds .*, and experts are numbered 0 to 4; give"
    ):
        layer.set_table(torch.full((V,), E))
    with pytest.raises(InputError, match=r"table: give integers of shape \(1, 50\)"):
        layer.set_table(torch.zeros(V - 1, dtype=torch.int64))
    assert SparseMoE.needs_token_ids is False
    assert make(key="position").needs_earlier_tokens
    assert not make().needs_earlier_tokens


# Learned weights


def test_router_of_deepseek_v4_has_the_same_experts_and_weights():
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = v4.DeepseekV4Config(
        vocab_size=V, hidden_size=D, n_routed_experts=7, num_experts_per_tok=3,
        routed_scaling_factor=1.7,
    )  # fmt: skip
    theirs = v4.DeepseekV4HashRouter(config).double()
    layer = make(num_experts=7, top_k=3, weights="learned", scale=1.7)
    torch.nn.init.normal_(layer.gate.weight)
    with torch.no_grad():
        theirs.weight.copy_(layer.gate.weight)
        theirs.tid2eid.copy_(layer.table[:, :-1].t())
    hidden, ids = inputs(3, 11)
    _, weights, experts = theirs(hidden, ids)
    routing = layer.route(hidden, ids)
    assert torch.equal(routing.indices, experts)
    torch.testing.assert_close(routing.weights, weights, rtol=1e-12, atol=0)
    assert (routing.weights.sum(-1) - 1.7).abs().max() < 1e-12


def test_a_token_has_different_experts_in_a_random_table():
    table = hashing.different_experts(4, 5000, 6, generator())
    assert all(len(set(column)) == 4 for column in table.t().tolist())
    for row in table:  # each choice is of any expert, equally often
        counts = torch.bincount(row, minlength=6)
        assert ((counts - 5000 / 6).abs() < 4 * math.sqrt(5000 * 5 / 36)).all()
    assert torch.equal(hashing.different_experts(4, 5000, 6, generator()), table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 2}, "top_k: 2 experts want weights; set weights to learned"),
        ({"weights": "learned"}, "top_k: the weight of one expert is its score over itself"),
        ({"top_k": 2, "weights": "learned", "num_hashes": 2}, "num_hashes: several experts"),
        ({"top_k": 2, "weights": "learned", "key": "bigram"}, "top_k: a hash of key 'bigram'"),
        ({"top_k": 6, "weights": "learned"}, "top_k: 6 is out of range"),
        ({"score": "sigmoid"}, "score: is that of learned weights; set weights to learned"),
        ({"scale": 2.0}, "scale: is that of learned weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make(**arguments)
