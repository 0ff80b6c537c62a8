"""A state that routers hand on, in a decoder: by hand, recomputed, cached, copied, compiled."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moezoo
from moezoo import InputError
from moezoo.routing.mlp import RouterMLP
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.eligible import ineligible

R = 6
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def moe(layers="all", carry=True, mlp=R):
    logits = {"mlp": mlp, "norm_eps": 0.1, "carry": carry}
    options = {"num_experts": 5, "num_skip_experts": 1, "top_k": 1, "d_expert": 16}
    router = {"normalize": False, "selection_bias": True, "logits": logits}
    arguments = {**options, "router": router, "balance": {"z_loss": 0.1}}
    return {"layers": layers, "class_path": "moezoo.SparseMoE", "init_args": arguments}


DENSE = {"layers": [1], "class_path": "moezoo.DenseFFN"}


@pytest.fixture
def model(make):
    """Build three blocks, of which the second has no router; no weight is zero or one."""
    built = make(num_hidden_layers=3, ffn=[moe(), DENSE]).double().eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
            if "mlp.gate" in name:
                std = 0.1 if "selection_bias" in name else 0.8
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
        built.model.embed_tokens.weight.mul_(30)
    return built


@pytest.fixture
def ids():
    return torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(2))


def states_of(model, ids):
    """Return what the routers were given and what they handed on, and logits."""
    seen = []

    def see(module, args, kwargs, output):
        seen.append((kwargs.get("router_state"), output.router_state))

    hooks = [
        block.mlp.register_forward_hook(see, with_kwargs=True) for block in model.model.blocks()
    ]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_states_are_handed_from_router_to_router(model, ids):
    (first, dense, last), _ = states_of(model, ids)
    assert first[0] is None
    assert dense == (None, None)
    assert last[0] is first[1]
    assert last[1].shape == (2, 11, R)
    gate = model.model.layers[2].mlp.gate.mlp
    read = []
    hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda m, a: read.append(a[0]))
    model(ids)
    hook.remove()
    by_hand = read[0] @ gate.down.weight.T + gate.down.bias + first[1] * gate.state_scale
    torch.testing.assert_close(last[1], by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fault", ["not given", "given without gradient", "of the pass before"])
def test_a_state_that_is_lost_is_noticed(model, ids, fault, monkeypatch):
    logits = model(ids).logits
    logits.square().sum().backward()
    right, state, kept = gradients(model), RouterMLP.state, []
    model.zero_grad()

    def wrong(self, hidden, before):
        if before is not None:
            before = {"not given": None, "given without gradient": before.detach()}.get(fault)
            if fault == "of the pass before":
                before = kept[0]
        elif fault == "of the pass before" and not kept:
            kept.append(torch.randn(22, R, dtype=torch.float64))
        return state(self, hidden, before)

    monkeypatch.setattr(RouterMLP, "state", wrong)
    found = model(ids).logits
    found.square().sum().backward()
    assert torch.equal(found, logits) == (fault == "given without gradient")
    key = "model.layers.0.mlp.gate.mlp.down.weight"
    assert not torch.allclose(gradients(model)[key], right[key])


def test_recomputation_changes_no_gradient(model, ids):
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        first, second = model(ids), model(ids.flip(0))  # both at once: neither sees the other's
        loss = sum(o.logits.square().mean() + sum(o.aux_losses.values()) for o in (first, second))
        loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert found[0]["model.layers.2.mlp.gate.mlp.state_scale"].any()
    for name, right in found[0].items():
        assert torch.equal(found[1][name], right), name


def test_every_parameter_has_a_gradient_whether_a_state_is_given_or_not(model, ids):
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.model.layers[0].mlp.gate.mlp.state_scale.grad.any()


@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_forward_pass(model, ids):
    whole = model(ids).logits
    cache = model(ids[:, :5], use_cache=True)
    steps = [cache.logits]
    for place in range(5, 11):
        token = ids[:, place : place + 1]
        cache = model(token, past_key_values=cache.past_key_values, use_cache=True)
        steps.append(cache.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-6, atol=1e-6)
    assert ineligible(model) is None
    model.float()
    whole, decoder = model(ids).logits, Decoder(model, ids[:, :5], torch.ones(2, 5), 6)
    found = [decoder.prefill(), *(decoder.step(ids[:, place]) for place in range(5, 10))]
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 4:10], rtol=1e-4, atol=1e-4)


def test_states_are_handed_on_in_compiled_code(model):
    first, _, last = (block.mlp for block in model.model.blocks())

    def both(hidden):
        return last(hidden, router_state=first(hidden).router_state).hidden

    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    found = torch.compile(both, backend="eager", fullgraph=True)(hidden)
    torch.testing.assert_close(found, both(hidden), rtol=1e-12, atol=1e-12)


def test_padding_and_copies_change_nothing(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits[1, 4:]
        alone = model(ids[1:, 4:]).logits[0]
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
        expected = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


def test_what_cannot_be_handed_on_is_refused(make, model, ids):
    message = (
        "router.logits.mlp: layer 2 carries the state of layer 0, which is 6 wide, into an MLP"
    )
    with pytest.raises(InputError, match=message):
        make(num_hidden_layers=3, ffn=[moe(), DENSE, moe([2], mlp=4)])
    make(num_hidden_layers=3, ffn=[moe(), DENSE, moe([2], carry=False, mlp=4)])
    with pytest.raises(InputError, match=r"router\.logits\.carry: there is no MLP"):
        moezoo.SparseMoE(8, router=moezoo.RouterOptions(logits=moezoo.LogitOptions(carry=True)))
    layer, hidden = model.model.layers[0].mlp, torch.randn(2, 3, 32, dtype=torch.float64)
    for state, said in (
        (torch.zeros(2, 4, R), r"router_state: shape \(2, 4, 6\) does not match hidden's"),
        (torch.zeros(2, 3, 5), "router_state: is 5 wide and the router's MLP 6"),
        (torch.zeros(2, 3, R, dtype=torch.int64), "router_state: torch.int64 is not floating"),
    ):
        with pytest.raises(InputError, match=said):
            layer(hidden, router_state=state)
    factory = {"class_path": "moezoo.SparseMoE", "init_args": moe()["init_args"]}
    with pytest.raises(InputError, match="carries a router's state over layers, which a foreign"):
        moezoo.swap(LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1)), factory)
