"""What stands around a model that is adopted: hooks, contexts, and arguments of another kind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import moezoo
from moezoo import InputError
from moezoo.routing import Router

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 20,
}
IDS = torch.arange(22).reshape(2, 11) * 5 % 48


def model_of():
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**SIZES)
    config._experts_implementation = "eager"
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


PARTS = ("experts", "experts.act_fn", "shared_expert", "shared_expert.up_proj")
REGISTER = {
    "hook": lambda part: part.register_forward_hook(lambda *_: None).remove,
    "pre-hook": lambda part: part.register_forward_pre_hook(lambda *_: None).remove,
}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("path", PARTS)
def test_a_hook_that_would_not_be_called_is_refused_before_and_after(path, kind):
    model = model_of()
    part = model.model.layers[1].mlp.get_submodule(path)
    remove = REGISTER[kind](part)
    with pytest.raises(InputError, match=rf"layers\.1\.mlp\.{path} has hooks .* remove them"):
        moezoo.adopt(model)
    remove()
    adopted = moezoo.adopt(model)
    expected = model(IDS).logits
    remove = REGISTER[kind](part)
    with pytest.raises(InputError, match=rf"{path} of Qwen2MoeSparseMoeBlock was given hooks"):
        model(IDS)
    remove()
    assert torch.equal(model(IDS).logits, expected)
    adopted.undo()
    assert "forward" not in vars(part)


def test_a_forward_pass_that_would_not_run_is_refused_as_what_offloads_weights_has_one():
    model = model_of()
    shared = model.model.layers[0].mlp.shared_expert
    own = shared.forward
    shared.forward = lambda hidden: 2 * own(hidden)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.shared_expert has hooks or a forward"):
        moezoo.adopt(model)
    del shared.forward
    moezoo.adopt(model)
    shared.forward = own
    with pytest.raises(InputError, match=r"shared_expert of .* given hooks or a forward pass"):
        model(IDS)


def test_hooks_of_a_block_and_of_its_router_are_called():
    model = model_of()
    block, seen = model.model.layers[0].mlp, []
    for part in (block, block.gate):
        part.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    moezoo.adopt(model)
    seen.clear()
    model(IDS)
    assert sorted(seen) == ["Qwen2MoeSparseMoeBlock", "Qwen2MoeTopKRouter"]


def test_a_part_of_another_class_with_the_same_name_is_not_blamed_on_a_release():
    model = model_of()
    experts = model.model.layers[0].mlp.experts

    def forward(self, *arguments):
        return 2 * own(self, *arguments)

    own = type(experts).forward
    experts.__class__ = type(type(experts).__name__, (type(experts),), {"forward": forward})
    message = "on random tokens: one of its parts computes something else than its class"
    if transformers.__version__ != "5.23.0":
        message = "on random tokens: transformers .* computes something else than 5.23.0"
    with pytest.raises(InputError, match=message):
        moezoo.adopt(model)


def gemma4():
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    mixture = {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16}
    embeddings = {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 0}
    kinds = {"layer_types": ["full_attention"], "global_head_dim": 8}
    config = transformers.Gemma4TextConfig(
        **(sizes | heads | mixture | embeddings | kinds), num_hidden_layers=1, enable_moe_block=True
    )
    model = transformers.Gemma4ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def deepseek_v4():
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16}
    experts = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    kinds = {"mlp_layer_types": ["hash_moe"], "layer_types": ["sliding_attention"]}
    model = transformers.DeepseekV4ForCausalLM(
        transformers.DeepseekV4Config(**(sizes | heads | experts | kinds))
    ).eval()
    table = model.model.layers[0].mlp.gate.tid2eid
    table.copy_(torch.rand(table.shape[0], 6).topk(2).indices)
    return model


@pytest.mark.parametrize("build", [gemma4, deepseek_v4])
def test_threads_do_not_mix_what_one_part_leaves_for_another(build, monkeypatch):
    model, others = build(), 47 - IDS
    moezoo.adopt(model)
    expected = [model(ids).logits for ids in (IDS, others)]
    found, waiting = [], [others]

    def meanwhile(*_):
        # In the midst of a layer, another thread goes through the whole model.
        if waiting:
            ids = waiting.pop()
            thread = threading.Thread(target=lambda: found.append(model(ids).logits))
            thread.start()
            thread.join()

    logits = Router._logits
    if build is gemma4:
        norm = model.model.layers[0].pre_feedforward_layernorm_2
        norm.register_forward_hook(meanwhile)
    else:
        monkeypatch.setattr(Router, "_logits", lambda *given: (meanwhile(), logits(*given))[1])
    found.append(model(IDS).logits)
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[0])


@pytest.mark.parametrize("build", [gemma4, deepseek_v4])
def test_a_compiled_graph_is_whole(build):
    model = build()
    expected = model(IDS).logits
    moezoo.adopt(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, autocast])
def test_it_is_adopted_in_any_context_and_trains(context):
    model = model_of()
    expected = gradients(model)
    state = torch.get_rng_state()
    with context():
        adopted = moezoo.adopt(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert max(d.gradient for d in adopted.differences.values()) > 0
    found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_balance_may_be_a_mapping():
    adopted = moezoo.adopt(model := model_of(), balance={"load_balancing": 0.5})
    with adopted.collect() as outputs:
        model(IDS)
    assert [set(output.losses) for output in outputs] == [{"load_balancing"}] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "runs/mixtral"}, "model: str is no module; give a model that from_pretrained"),
        ({"where": "layers.0"}, "where: is no function; give one of a block's name"),
        ({"balance": 0.1}, "balance: 0.1 is not a mapping of options"),
        (
            {"balance": {"load_balance": 0.1}},
            "balance: unknown option 'load_balance'; did you mean",
        ),
    ],
)
def test_arguments_of_another_kind_are_one_line(arguments, message):
    given = {"model": model_of()} | arguments
    with pytest.raises(InputError, match=message) as caught:
        moezoo.adopt(given.pop("model"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_experts_are_refused_and_no_way_is_named_that_is_none(dtype):
    model = model_of()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), False)
    with pytest.raises(InputError, match=rf"{dtype}, as if quantized; dequantize") as caught:
        moezoo.adopt(model)
    assert "experts_implementation" not in str(caught.value)
    model.set_experts_implementation("moezoo")
    for ids in (IDS, IDS[:1, :1]):
        for learns in (True, False):
            with (
                torch.set_grad_enabled(learns),
                pytest.raises(InputError, match=rf"Qwen2MoeExperts are {dtype}, as if quantized"),
            ):
                model(ids)
