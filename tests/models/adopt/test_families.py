"""What some families ask of adoption: a state over blocks, experts apart, two mixtures a block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moezoo
from moezoo import InputError
from moezoo.analysis.usage import collect_loads
from moezoo_models.adopt.by_table import TableRouter

transformers = pytest.importorskip("transformers")

from transformers.models.ernie4_5_vl_moe import (  # noqa: E402 - if it is there
    modeling_ernie4_5_vl_moe as ernie,
)
from transformers.models.nllb_moe import modeling_nllb_moe as nllb  # noqa: E402

D = 32


def randomized(model: nn.Module) -> nn.Module:
    """Draw every weight, bias and buffer; none is zero or one."""
    torch.manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and "inv_freq" not in name:
            std = 0.3 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
            nn.init.normal_(tensor, mean=1.0 if "norm" in name else 0.0, std=std)
    return model.eval()


def zaya(**changes):
    sizes = {"vocab_size": 61, "hidden_size": D, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 24}
    router = {"num_experts": 5, "router_hidden_size": 12, "pad_token_id": 0, "eos_token_id": 1}
    config = transformers.ZayaConfig(**(sizes | heads | router | changes))
    config._experts_implementation = "eager"
    model = randomized(transformers.ZayaForCausalLM(config))
    with torch.no_grad():
        for layer in model.model.layers:  # each lets some tokens skip, and not all
            gate = layer.mlp.gate
            gate.router_mlp.fc1.weight *= 2
            gate.router_mlp.fc2.weight *= 2
            gate.balancing_biases *= 0.2
            gate.balancing_biases[-1] = 0.0
    return model


def close(ours, theirs, tolerance=5e-6):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def padded_batch():
    ids = torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :9] = 0
    return ids.masked_fill(mask == 0, 0), mask


def test_zaya_with_padding_and_a_cache_gives_their_logits_and_gradients():
    model = zaya()
    ids, mask = padded_batch()
    found = []
    for adopts in (False, True):
        if adopts:
            adopted = moezoo.adopt(model)
        model.zero_grad()
        whole = model(ids, attention_mask=mask).logits
        likely = torch.nn.functional.log_softmax(whole, -1).gather(-1, ids.unsqueeze(-1))
        (likely.squeeze(-1) * mask).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            steps = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
            logits = [steps.logits[:, -1]]
            for place in range(11, 17):
                steps = model(
                    ids[:, place : place + 1],
                    attention_mask=mask[:, : place + 1],
                    past_key_values=steps.past_key_values,
                    use_cache=True,
                )
                logits.append(steps.logits[:, -1])
            written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        found.append((whole.detach(), torch.stack(logits, 1), gradients, written))
    (theirs, their_steps, before, their_text), (ours, our_steps, after, our_text) = found
    close(ours, theirs)
    close(our_steps, their_steps)
    assert torch.equal(our_text, their_text)
    for name, gradient in before.items():
        assert gradient.abs().max() > 0, name
        close(after[name], gradient, 2e-5)
    with torch.no_grad(), collect_loads(adopted.layers) as loads:
        model(ids, attention_mask=mask)
    counts = torch.stack([load.counts for load in loads.values()])
    assert counts.shape == (3, 6)
    assert counts[:, 5].min() > 0, "no token skips"
    assert counts[:, :5].max() > 1.5 * counts[:, :5].float().mean()


def test_a_state_goes_through_blocks_of_both_kinds_recomputed_and_recorded():
    model = zaya()
    ids, mask = padded_batch()
    asked = {"attention_mask": mask, "output_router_logits": True, "use_cache": False}
    theirs = model(ids, **asked)
    theirs.logits.square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    adopted = moezoo.adopt(model, where=lambda name: ".1." in name)
    model.activation_checkpointing_enable({"use_reentrant": False})
    ours = model.train()(ids, **asked)
    ours.logits.square().sum().backward()
    close(ours.logits, theirs.logits)
    for one, other in zip(ours.router_logits, theirs.router_logits, strict=True):
        close(one, other)
    for name, parameter in model.named_parameters():
        close(parameter.grad, before[name], 2e-5)
    twin = copy.deepcopy(model).bfloat16()
    logits = twin(ids, **asked).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - theirs.logits).abs().median() < 0.05 * theirs.logits.abs().max()
    adopted.undo()
    close(model(ids, **asked).logits, theirs.logits)


@pytest.mark.parametrize("fault", ["drop", "detach"])
def test_the_trial_notices_a_state_that_is_lost(fault, monkeypatch):
    layer = moezoo.SparseMoE
    route = layer.routed

    def wrong(self, hidden, context, limited):
        if fault == "drop":
            context = context._replace(router_state=None)
        elif context.router_state is not None:
            context = context._replace(router_state=context.router_state.detach())
        return route(self, hidden, context, limited)

    monkeypatch.setattr(layer, "routed", wrong)
    with pytest.raises(InputError, match=r"layers\.1\.mlp \(ZayaSparseMoeBlock\) differs"):
        moezoo.adopt(zaya())


def switch(**changes):
    sizes = {"vocab_size": 61, "d_model": D, "d_ff": 24, "d_kv": 8, "num_heads": 4}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2}
    router = {"num_sparse_decoder_layers": 2, "num_experts": 4, "expert_capacity": 3}
    config = transformers.SwitchTransformersConfig(**(sizes | layers | router | changes))
    return randomized(transformers.SwitchTransformersForConditionalGeneration(config))


def test_switch_counts_places_in_each_sequence_and_jitters_what_experts_read():
    model = switch(dropout_rate=0.0, router_jitter_noise=0.1, router_bias=True).train()
    ids, mask = padded_batch()
    asked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :9]}
    found = []
    for adopts in (False, True):
        if adopts:
            adopted = moezoo.adopt(model)
        model.zero_grad()
        torch.manual_seed(7)
        logits = model(**asked).logits
        logits.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (theirs, before), (ours, after) = found
    close(ours, theirs, 2e-5)
    for name, gradient in before.items():
        close(after[name], gradient, 1e-4)
    with adopted.collect() as outputs:
        model(**asked)
    assert all(output.stats["dropped"] > 0 for output in outputs)
    with pytest.raises(InputError, match="stores its experts in another layout"):
        adopted.shard_experts(type("Mesh", (), {"size": lambda self: 2})())


def test_dropout_of_experts_is_refused_in_training():
    model = switch(dropout_rate=0.1)
    moezoo.adopt(model)
    ids = padded_batch()[0]
    model(input_ids=ids, decoder_input_ids=ids)
    message = (
        r"experts\.expert_0\.dropout of .* drops hidden neurons in training, .* set its p to 0"
    )
    with pytest.raises(InputError, match=message):
        model.train()(input_ids=ids, decoder_input_ids=ids)
    with pytest.raises(InputError, match=message):
        moezoo.adopt(switch(dropout_rate=0.1).train())


def deepseek_v4():
    sizes = {"vocab_size": 61, "hidden_size": D, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 4, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16}
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    kinds = {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}
    attention = {"layer_types": ["sliding_attention"] * 3}
    config = transformers.DeepseekV4Config(**(sizes | heads | experts | kinds | attention))
    config._experts_implementation = "eager"
    model = randomized(transformers.DeepseekV4ForCausalLM(config))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_((torch.rand(table.shape[0], 6) + torch.linspace(1, 0, 6)).topk(2).indices)
    return model


def test_layers_of_deepseek_v4_that_hash_token_ids_are_adopted():
    model = deepseek_v4()
    ids, mask = padded_batch()
    found = []
    for adopts in (False, True):
        if adopts:
            adopted = moezoo.adopt(model)
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        logits.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        written = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        found.append((logits.detach(), gradients, written))
    (theirs, before, their_text), (ours, after, our_text) = found
    close(ours, theirs)
    assert torch.equal(our_text, their_text)
    # A number that scales all of a head is the sum of much that cancels: theirs rounds by 3e-5, and
    # ours may round as much, by the same library's products.
    exact = deepseek_v4().double()
    exact(ids, attention_mask=mask).logits.square().sum().backward()
    assert after.keys() == before.keys()
    for name, parameter in exact.named_parameters():
        if (right := parameter.grad) is not None:
            rounded = (before[name] - right).abs().max() / right.abs().max()
            close(after[name].double(), right, max(2e-5, 1.5 * float(rounded)))
    with torch.no_grad(), collect_loads(adopted.layers) as loads:
        model(ids)
    table = model.model.layers[0].mlp.gate.tid2eid
    expected = torch.bincount(table[ids].flatten(), minlength=6)
    assert torch.equal(loads["model.layers.0.mlp"].counts, expected)
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.gate.tid2eid.copy_(table.roll(1, 0))
    assert not torch.allclose(twin(ids).logits, model(ids).logits, rtol=1e-2)
    layer = adopted.layers["model.layers.0.mlp"]
    assert "num_experts=6" in repr(layer)
    assert "rows=61" in repr(layer)
    with pytest.raises(InputError, match="token_ids: missing; a table of them chooses"):
        layer(torch.randn(2, 3, D))


def test_the_trial_notices_another_table(monkeypatch):
    read = TableRouter.read
    monkeypatch.setattr(
        TableRouter, "read", lambda self, ids: read(self, None if ids is None else ids.flip(-1))
    )
    with pytest.raises(InputError, match=r"layers\.0\.mlp \(DeepseekV4SparseMoeBlock\) differs"):
        moezoo.adopt(deepseek_v4())


def test_both_mixtures_of_ernies_block_are_adopted():
    config = transformers.Ernie4_5_VLMoeConfig().text_config
    sizes = {"hidden_size": D, "moe_intermediate_size": [24, 16], "moe_num_experts": 6}
    for name, value in (sizes | {"num_experts": 6, "num_experts_per_tok": 2}).items():
        setattr(config, name, value)
    config._experts_implementation = "eager"
    block = randomized(ernie.Ernie4_5_VLMoeMoeBlock(config))
    hidden = torch.randn(2, 13, D, generator=torch.Generator().manual_seed(2))
    kinds = torch.arange(26).reshape(2, 13) % 3
    for given in (None, kinds):
        theirs = block(hidden, given)
        adopted = moezoo.adopt(block)
        assert adopted.layers.keys() == {"text_moe", "vision_moe"}
        for one, other in zip(block(hidden, given), theirs, strict=True):
            close(one, other)
        adopted.undo()


def test_nllb_runs_two_experts_whichever_its_router_chooses():
    """The reason for which it is refused, true of the release that is installed."""
    config = transformers.NllbMoeConfig(d_model=D, num_experts=4, expert_capacity=64)
    block = randomized(nllb.NllbMoeSparseMLP(config, 24))
    hidden = torch.randn(2, 13, D)
    first, weights, _ = block.router(hidden.reshape(-1, D), None)
    ran = []
    for name, expert in block.experts.items():
        if name.startswith("expert_"):
            expert.register_forward_hook(lambda *_, name=name: ran.append(name))
    output = block(hidden)
    assert set(ran) == {"expert_0", "expert_1"}
    assert (first.sum(0) > 0).sum() > 2
    right = sum(
        weights[:, [e]] * block.experts[f"expert_{e}"](hidden.reshape(-1, D)) for e in range(4)
    )
    assert not torch.allclose(output, right.reshape(output.shape), atol=0.1)
    with pytest.raises(InputError, match="runs experts 0 and 1 alone, whichever its router"):
        moezoo.adopt(block)
