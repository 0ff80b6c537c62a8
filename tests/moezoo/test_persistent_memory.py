"""PersistentMemoryAttention: one softmax over context and slots, whatever the way to it."""

import pytest
import torch
import torch.nn.functional as F

import moezoo
from moezoo import InputError, PersistentMemoryAttention

D, H, N = 16, 4, 7
C = D // H


def attention(**arguments) -> PersistentMemoryAttention:
    torch.manual_seed(0)
    return PersistentMemoryAttention(D, **{"num_heads": H, "num_slots": N, **arguments}).double()


def tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, 9)), D, dtype=torch.float64, generator=generator)


def heads(layer: PersistentMemoryAttention, hidden: torch.Tensor) -> list[torch.Tensor]:
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    return [p(hidden).view(*hidden.shape[:2], H, C).transpose(1, 2) for p in projections]


def output(layer: PersistentMemoryAttention, attended: torch.Tensor) -> torch.Tensor:
    return layer.o_proj(attended.transpose(1, 2).flatten(-2))


class Cache:
    """Keys and values of earlier tokens, with the interface of transformers' caches."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key, value, layer_idx):
        if layer_idx in self.held:
            before = self.held[layer_idx]
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        self.held[layer_idx] = key, value
        return key, value


@pytest.mark.parametrize("include_self", [True, False])
def test_equals_dense_attention_with_more_keys(include_self):
    layer, hidden = attention(include_self=include_self), tokens()
    query, key, value = heads(layer, hidden)
    more_keys = (C**0.5 * layer.slots.keys).expand(2, -1, -1, -1)
    more_values = (N**0.5 * layer.slots.values).expand(2, -1, -1, -1)
    seen = torch.ones(9, 9, dtype=torch.bool).tril(0 if include_self else -1)
    expected = F.scaled_dot_product_attention(
        query,
        torch.cat([more_keys, key], 2),
        torch.cat([more_values, value], 2),
        attn_mask=torch.cat([torch.ones(9, N, dtype=torch.bool), seen], 1),
    )
    for call in (layer, layer.reference):
        torch.testing.assert_close(call(hidden).hidden, output(layer, expected), rtol=0, atol=1e-12)


def test_without_context_it_is_a_feed_forward_of_softmax():
    layer, hidden = attention(include_self=False), tokens(5, 1)
    query = heads(layer, hidden)[0]
    weights = torch.einsum("bhtc,hnc->bhtn", query, layer.slots.keys).softmax(-1)
    expected = torch.einsum("bhtn,hnc->bhtc", weights, N**0.5 * layer.slots.values)
    for call in (layer, layer.reference):
        found = call(hidden)
        torch.testing.assert_close(found.hidden, output(layer, expected), rtol=0, atol=1e-12)
        assert found.stats["context_mass"] == 0


def test_two_softmaxes_would_be_another_function():
    layer, hidden = attention(), tokens()
    query, key, value = heads(layer, hidden)
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    weights = (query @ layer.slots.keys.transpose(-1, -2)).softmax(-1)
    apart = output(layer, context + weights @ (N**0.5 * layer.slots.values))
    assert (layer(hidden).hidden - apart).abs().max() > 0.1


def test_slots_take_attention_from_the_context():
    layer, hidden = attention(), tokens()
    masses = []
    for _ in range(3):
        masses.append(layer(hidden).stats["context_mass"].item())
        with torch.no_grad():
            layer.slots.keys.mul_(4.0)
    assert 1 > masses[0] > masses[1] > masses[2] > 0


def test_weights_of_context_and_slots_sum_to_one():
    layer, hidden = attention(), tokens()
    with torch.no_grad():
        layer.v_proj.weight.zero_()
        layer.o_proj.weight.copy_(torch.eye(D))
        layer.slots.values.fill_(N**-0.5)
    found = layer(hidden)  # every slot says one, the context says nothing
    share = 1 - found.hidden.mean()
    torch.testing.assert_close(found.stats["context_mass"], share, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_merging_equals_the_joint_softmax_at_any_scale(scale):
    layer, hidden = attention(), scale * tokens()
    merged, joint = layer(hidden), layer.reference(hidden)
    torch.testing.assert_close(merged.hidden, joint.hidden, rtol=1e-9, atol=1e-9 * scale)
    assert merged.hidden.isfinite().all()


def test_sees_no_later_token():
    layer, hidden = attention(), tokens()
    changed = hidden.clone()
    changed[:, 5:] = 100.0
    torch.testing.assert_close(
        layer(hidden).hidden[:, :5], layer(changed).hidden[:, :5], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("call", ["forward", "reference"])
def test_cached_decoding_equals_one_pass_and_caches_no_slot(include_self, call):
    layer, hidden, cache = attention(include_self=include_self), tokens(), Cache()
    whole = layer(hidden).hidden
    steps = [
        getattr(layer, call)(part, past_key_values=cache, layer_idx=3).hidden
        for part in hidden.split([4, 1, 1, 3], dim=1)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    assert list(cache.held) == [3]
    assert all(t.shape == (2, H, 9, C) for t in cache.held[3])


def test_padding_stays_hidden_in_the_cache():
    layer, hidden, cache = attention(), tokens(), Cache()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    whole = layer(hidden, mask=mask).hidden
    alone = layer(hidden[1:, 3:]).hidden
    torch.testing.assert_close(whole[1:, 3:], alone, rtol=0, atol=1e-12)
    steps = []
    for start, end in ((0, 6), (6, 7), (7, 9)):
        part = {"mask": mask[:, start:end], "key_mask": mask[:, :end]}
        steps.append(layer(hidden[:, start:end], past_key_values=cache, **part).hidden)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="key_mask: is missing"):
        layer(hidden, mask=mask, past_key_values=Cache())


def test_slots_have_unit_variance_in_use():
    layer = PersistentMemoryAttention(256, num_heads=4)
    assert (64**0.5 * layer.slots.keys).std().item() == pytest.approx(1, abs=0.02)
    assert (layer.num_slots**0.5 * layer.slots.values).std().item() == pytest.approx(1, abs=0.02)
    mlp = moezoo.DenseFFN(256, gated=False)
    slots = layer.slots.keys.numel() + layer.slots.values.numel()
    assert slots == mlp.cost().total_parameters


def test_is_no_feed_forward_block():
    message = "PersistentMemoryAttention is of kind 'attention', not feed_forward"
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].mlp = torch.nn.Linear(D, D)
    model.layers[0].norm = torch.nn.LayerNorm(D)
    with pytest.raises(InputError, match=message):
        moezoo.swap(model, "moezoo.PersistentMemoryAttention", where="all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide d_model=16"),
        ({"num_slots": 0}, "num_slots: 0 is out of range"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        PersistentMemoryAttention(D, **arguments)


def test_a_vector_is_no_sequence():
    with pytest.raises(InputError, match="hidden: give"):
        attention()(tokens()[0, 0])
