"""Whole models of transformers that compute their mixtures by our layers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import moezoo
from moezoo import BalanceOptions, InputError, SparseMoE, WeightOptions
from moezoo.analysis.usage import collect_loads, usage_of
from moezoo_models.adopt import reading, reasons, table
from moezoo_models.adopt.block import path_of

transformers = pytest.importorskip("transformers")

VOCABULARY = 96
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "Dbrx": {
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": 2.0,
        },
        "router_aux_loss_coef": 0.5,
    },
    "GptOss": {"num_local_experts": 8, "head_dim": 8, "router_aux_loss_coef": 0.5},
    "Gemma4Text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "head_dim": 8,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "Zaya": {
        "num_experts": 8,
        "num_experts_per_tok": 1,
        "router_hidden_size": 12,
        "head_dim": 8,
    },
    "Mixtral": {"num_local_experts": 8, "router_aux_loss_coef": 0.5},
    "Qwen2Moe": {"num_experts": 8, "shared_expert_intermediate_size": 40},
    "GraniteMoe": {"num_local_experts": 8, "router_aux_loss_coef": 0.5},
    "DeepseekV3": {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def model_of(family: str, **changes):
    """Build a tiny model with random weights, biases and buffers."""
    kind = getattr(transformers, f"{family}Config")
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: value for name, value in COMMON.items() if name in known}
    config = kind(**(sizes | FAMILIES[family] | changes))
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            std = 0.3 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
            is_norm = "norm" in name and tensor.ndim < 2
            nn.init.normal_(tensor, mean=1.0 if is_norm else 0.0, std=std)
    model.family = family
    return model.eval()


def batch():
    """Return token ids and labels of two rows."""
    ids = torch.randint(VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def close(ours, theirs, tolerance=5e-6):  # three layers, each of which adds to the rounding
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def untouched(model) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(request.param)


def test_logits_losses_and_gradients_stay(model):
    returns_logits = model.family not in ("DeepseekV3", "Gemma4Text")
    asked = batch() | ({"output_router_logits": True} if returns_logits else {})
    found = []
    for adopts in (False, True):
        if adopts:
            moezoo.adopt(model)
        model.zero_grad()
        output = model(**asked)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((output, gradients))
    (theirs, before), (ours, after) = found
    close(ours.logits, theirs.logits)
    close(ours.loss, theirs.loss)
    if returns_logits:
        assert len(ours.router_logits) == len(theirs.router_logits) == 3
        for one, other in zip(ours.router_logits, theirs.router_logits, strict=True):
            close(one, other)
        if getattr(theirs, "aux_loss", None) is not None:
            close(ours.aux_loss, theirs.aux_loss)
    for name, gradient in before.items():
        close(after[name], gradient, 2e-5)


def test_router_logits_are_recorded_where_they_were(model):
    asked = batch() | {"output_router_logits": True}
    del asked["labels"]
    inner = getattr(model, model.base_model_prefix)
    before = inner(**asked)
    if not before.router_logits:
        pytest.skip("the family records none")
    moezoo.adopt(model)
    after = inner(**asked)
    assert len(after.router_logits) == len(before.router_logits)


def test_names_and_tensors_stay(model):
    before = dict(model.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters())
    modules = [name for name, _ in model.named_modules()]
    adopted = moezoo.adopt(model)
    model(**batch())
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    storages = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    for layer in adopted.layers.values():
        assert isinstance(layer, SparseMoE)
        copied = ("experts.gate_up_proj",) if model.family == "Dbrx" else ()
        shared = [t for name, t in layer.state_dict().items() if name not in copied]
        assert {t.data_ptr() for t in shared} <= storages


def test_a_directory_saved_is_theirs(model, tmp_path):
    theirs = model(**batch()).logits
    moezoo.adopt(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    close(again(**batch()).logits, theirs)
    moezoo.adopt(again)
    close(again(**batch()).logits, theirs)


def test_weights_loaded_later_count(model):
    moezoo.adopt(model)
    other = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(9)
    for name, tensor in other.items():
        if "rotary" not in name and "norm" not in name:
            tensor.normal_(std=0.2, generator=generator)
    for assign in (False, True):
        fresh = model_of(model.family)
        fresh.load_state_dict(other)
        theirs = fresh(**batch()).logits
        model.load_state_dict(other, assign=assign)
        close(model(**batch()).logits, theirs)


def test_dtype_follows_the_model(model):
    moezoo.adopt(model)
    model.double()
    ours = model(**batch()).logits
    assert ours.dtype == torch.float64
    alone = model_of(model.family).double()
    close(ours, alone(**batch()).logits, 2e-6)


def test_generation_goes_on(model):
    ids = batch()["input_ids"][:, :5]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, **options)
    moezoo.adopt(model)
    assert torch.equal(model.generate(ids, **options), theirs)


def test_a_copy_is_a_model_of_its_own(model):
    moezoo.adopt(model)
    before = model(**batch()).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert torch.equal(model(**batch()).logits, before)
    assert not torch.allclose(twin(**batch()).logits, before, rtol=1e-2)


def test_undo_puts_their_computation_back(model):
    before = model(**batch()).logits
    adopted = moezoo.adopt(model)
    assert not untouched(model)
    adopted.undo()
    assert untouched(model)
    assert torch.equal(model(**batch()).logits, before)
    assert adopted.layers == {}


def test_losses_and_statistics_are_caught(model):
    adopted = moezoo.adopt(model, balance=BalanceOptions(load_balancing=0.1, z_loss=0.1))
    with adopted.collect() as outputs:
        model(**batch())
    assert len(outputs) == len(adopted.layers)
    for output in outputs:
        assert output.losses["load_balancing"] > 0
        assert output.losses["router_z"].requires_grad
        top_k = 1 if model.family == "Zaya" else 2
        assert output.stats["expert_counts"].sum() == top_k * 2 * 23
    with adopted.collect() as outputs:
        pass
    assert outputs == []


def test_usage_of_experts_is_counted(model):
    adopted = moezoo.adopt(model)
    with torch.no_grad(), collect_loads(adopted.layers) as loads:
        model(**batch())
        model(**batch())
    assert loads.keys() == adopted.layers.keys()
    for load in loads.values():
        assert load.counts.sum() == (1 if model.family == "Zaya" else 2) * 2 * 2 * 23
        assert 0 < usage_of(load).by_choice.usage <= 1


def test_training_mode_is_the_models(model):
    theirs = model.train()(**batch()).logits
    adopted = moezoo.adopt(model)
    close(model(**batch()).logits, theirs)
    assert all(layer.training for layer in adopted.layers.values())
    model.eval()
    model(**batch())
    assert not any(layer.training for layer in adopted.layers.values())


def test_jitter_is_drawn_alike():
    model = model_of("Mixtral", router_jitter_noise=0.2).train()
    found = []
    for adopts in (False, True):
        if adopts:
            moezoo.adopt(model)
        torch.manual_seed(5)
        found.append(model(**batch()).logits)
    theirs, ours = found
    close(ours, theirs)
    assert not torch.allclose(model(**batch()).logits, ours, rtol=1e-2)


def test_selection_biases_move_in_the_model():
    model = model_of("DeepseekV3")
    adopted = moezoo.adopt(model)
    biases = {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}
    before = {name: bias.clone() for name, bias in biases.items()}
    model.train()
    with adopted.collect() as outputs:
        model(**batch())
    adopted.discard()
    adopted.step()
    assert all(torch.equal(bias, before[name]) for name, bias in biases.items())
    with adopted.collect() as outputs:
        model(**batch())
    adopted.step()
    for (name, bias), output in zip(biases.items(), outputs, strict=True):
        counts = output.stats["expert_counts"].float()
        moved = before[name] + 1e-3 * (counts.mean() - counts).sign()
        torch.testing.assert_close(bias, moved)
        assert dict(model.named_buffers())[name] is bias


@pytest.mark.parametrize("family", ["DeepseekV3", "Ernie4_5_Moe"])
def test_a_bias_of_16_bits_is_widened_and_moves(family, monkeypatch):
    """A step of 1e-3 would be rounded away, or stay in the layer alone."""
    sizes = {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "use_bias": False}
    monkeypatch.setitem(FAMILIES, "Ernie4_5_Moe", sizes)
    model = model_of(family).bfloat16().train()
    adopted = moezoo.adopt(model)

    def biases():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: t.clone() for name, t in tensors if name.endswith("correction_bias")}

    for _ in range(3):
        before = biases()
        with adopted.collect() as outputs:
            model(**batch())
        adopted.step()
        for (name, bias), output in zip(biases().items(), outputs, strict=True):
            counts = output.stats["expert_counts"].float()
            moved = before[name].float() + 1e-3 * (counts.mean() - counts).sign()
            assert bias.dtype == torch.float32
            torch.testing.assert_close(bias, moved.reshape(bias.shape), rtol=0, atol=1e-9)


def test_a_saved_deepseek_v3_has_the_whole_bias(tmp_path):
    model = model_of("DeepseekV3").bfloat16().train()
    adopted = moezoo.adopt(model)
    for _ in range(3):
        with adopted.collect():
            model(**batch())
        adopted.step()
    saved = {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    assert any(not torch.equal(bias.bfloat16().float(), bias) for bias in saved.values())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = dict(again.named_buffers())
    assert all(torch.equal(found[name], bias) for name, bias in saved.items())
    assert again.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def test_a_model_without_mixtures_is_refused():
    config = transformers.LlamaConfig(**{k: v for k, v in COMMON.items() if "moe" not in k})
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(InputError, match="has no mixture block"):
        moezoo.adopt(model)


def test_what_cannot_be_said_is_refused_and_nothing_changed(monkeypatch):
    model = model_of("Mixtral")
    model.model.layers[1].mlp.gate.top_k = 1
    with pytest.raises(InputError, match=r"layers\.1\.mlp .*router\.normalize") as refused:
        moezoo.adopt(model)
    assert "\n" not in str(refused.value)
    assert 'experts_implementation="moezoo"' in str(refused.value)
    assert untouched(model)

    model = model_of("Mixtral")
    monkeypatch.setitem(reasons.REASONS, path_of(model.model.layers[2].mlp), "is odd")
    monkeypatch.delitem(table.BY_CLASS, path_of(model.model.layers[2].mlp))
    with pytest.raises(InputError, match=r"layers\.0\.mlp \(MixtralSparseMoeBlock\) is odd"):
        moezoo.adopt(model)
    assert untouched(model)


def test_blocks_are_chosen_by_name():
    model = model_of("Mixtral")
    theirs = model(**batch()).logits
    adopted = moezoo.adopt(model, where=lambda name: ".1." in name)
    assert list(adopted.layers) == ["model.layers.1.mlp"]
    assert "forward" not in vars(model.model.layers[0].mlp)
    close(model(**batch()).logits, theirs)
    adopted.undo()
    with pytest.raises(InputError, match=r"where: no block of 3 .* model\.layers\.0\.mlp"):
        moezoo.adopt(model, where=lambda name: False)
    assert untouched(model)


def test_an_unknown_class_is_refused():
    class NewMoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Linear(2, 2)

    NewMoE.__module__ = "transformers.models.new.modeling_new"
    model = nn.Sequential(NewMoE())
    with pytest.raises(InputError, match=r"0 \(NewMoE\) is of a class that moezoo does not know"):
        moezoo.adopt(model)


def test_replaced_parts_are_refused_before_and_noticed_after():
    model = model_of("Qwen2Moe")
    adopted = moezoo.adopt(model)
    with pytest.raises(InputError, match=r"forward pass of .* was replaced already"):
        moezoo.adopt(model)
    shared = model.model.layers[0].mlp.shared_expert
    shared.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(InputError, match=r"shared_expert\.up_proj .* was replaced after"):
        model(**batch())
    adopted.undo()
    model.model.layers[0].mlp.experts = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"mlp\.experts is a Linear where"):
        moezoo.adopt(model)
    assert untouched(model)


def test_quantized_weights_are_refused():
    model = model_of("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), False)
    with pytest.raises(InputError, match=r"down_proj is torch\.int8"):
        moezoo.adopt(model)
    assert untouched(model)


def test_a_parameter_without_a_place_is_refused():
    model = model_of("Mixtral")
    model.model.layers[2].mlp.register_buffer("extra", torch.ones(3))
    with pytest.raises(InputError, match=r"layers\.2\.mlp .* has extra, which has no place"):
        moezoo.adopt(model)
    assert untouched(model)


# What the table might have wrong: each is another computation.
CHANGES = {
    "scale": {"scale": 1.01},
    "normalize": {"normalize": False, "weights": WeightOptions()},
    "groups": {"num_groups": 1, "top_groups": 1, "group_score": None},
    "group score": {"group_score": "max"},
    "score": {"score": "softmax"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_trial_finds_what_was_read_wrong(change, monkeypatch):
    model = model_of("DeepseekV3")
    convention = reading.CONVENTIONS["sigmoid_groups"]
    wrong = dataclasses.replace(
        convention, read=lambda router, block: convention.read(router, block) | CHANGES[change]
    )
    monkeypatch.setitem(reading.CONVENTIONS, "sigmoid_groups", wrong)
    with pytest.raises(InputError, match=r"differs from moezoo's layer by .* on random tokens"):
        moezoo.adopt(model)
    assert untouched(model)


@pytest.mark.parametrize("part", ["bias weighs too", "bias is left out", "shared is left out"])
def test_the_trial_finds_what_another_release_does(part, monkeypatch):
    model = model_of("DeepseekV3")
    block = type(model.model.layers[1].mlp)
    router = type(model.model.layers[1].mlp.gate)
    if part == "bias weighs too":

        def forward(self, hidden):
            logits, weights, indices = original(self, hidden)
            return logits, weights + 0.1 * self.e_score_correction_bias[indices], indices

        original = router.forward
        monkeypatch.setattr(router, "forward", forward)
    elif part == "bias is left out":

        def forward(self, hidden):
            bias, self.e_score_correction_bias = self.e_score_correction_bias, torch.zeros(8)
            try:
                return original(self, hidden)
            finally:
                self.e_score_correction_bias = bias

        original = router.forward
        monkeypatch.setattr(router, "forward", forward)
    else:

        def forward(self, hidden):
            return original(self, hidden) - self.shared_experts(hidden)

        original = block.forward
        monkeypatch.setattr(block, "forward", forward)
    with pytest.raises(InputError, match="differs from moezoo's layer by"):
        moezoo.adopt(model)
    assert untouched(model)


def test_experts_that_a_mesh_cannot_split_are_refused():
    class Mesh:
        def size(self):
            return 3

    adopted = moezoo.adopt(model_of("Mixtral"))
    with pytest.raises(InputError, match="has 8 experts, which 3 ranks do not divide"):
        adopted.shard_experts(Mesh())


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(server, tmp_path):
    program = str(Path(__file__).parent / "sharded_experts.py")
    for ended in server.run_ranks(2, folder=tmp_path, program=program):
        assert ended.code == 0, ended.output[-5000:]
