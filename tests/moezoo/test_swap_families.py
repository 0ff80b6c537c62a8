"""Swapping a layer into the decoders of transformers: each family's own contract is kept."""

import pytest
import torch

import moezoo

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = {"num_key_value_heads": 2}
HEADS = {**KV, "head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
DEEPSEEK = {
    **LATENT,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MIXTURE = {**KV, "num_local_experts": 4, "num_experts_per_tok": 2}
FINE = {**KV, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
FAMILIES = {
    "bart": {"decoder_layers": 2, "encoder_layers": 2, "d_model": 32, "decoder_ffn_dim": 48},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_inner": 48},
    "cohere": KV,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "falcon": {},
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**DEEPSEEK, **HEADS},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "gpt_oss": {**MIXTURE, "head_dim": 8},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite": KV,
    "granitemoe": MIXTURE,
    "granitemoeshared": {**MIXTURE, "shared_intermediate_size": 24},
    "jamba": {**KV, **MAMBA, "mamba_dt_rank": 4, "num_experts": 4, "use_mamba_kernels": False},
    "llama": KV,
    "llama4_text": {**MIXTURE, "head_dim": 8, "intermediate_size_mlp": 48},
    "mistral": KV,
    "mixtral": MIXTURE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "nemotron": KV,
    "olmo2": KV,
    "olmoe": FINE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": KV,
    "phi3": KV,
    "qwen2": KV,
    "qwen2_moe": {**FINE, "shared_expert_intermediate_size": 16},
    "qwen3": HEADS,
    "qwen3_moe": {**FINE, "head_dim": 8},
    "stablelm": KV,
    "starcoder2": KV,
}
IDS = torch.tensor([[5, 9, 13, 17, 21, 6], [33, 8, 40, 3, 11, 50]])


def build(family: str, **changes) -> torch.nn.Module:
    """Build a tiny model whose blocks answer as loudly as attention does."""
    torch.manual_seed(0)
    sizes = {**SIZES, **FAMILIES[family], **changes}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def state(model: torch.nn.Module) -> list:
    """Return the modules of a model, their modes and numbers of hooks."""
    return [
        (name, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_stay_apart_gradients_arrive_and_undo_restores(family):
    model = build(family)
    before, was, names = logits(model, IDS), state(model), set(model.state_dict())
    swapped = moezoo.swap(model, "moezoo.SparseMoE")
    assert len(swapped) == 2
    together = logits(model, IDS)
    apart = torch.cat([logits(model, row[None]) for row in IDS])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-6 * float(apart.abs().max()))
    assert not torch.equal(together, before)

    model.train()
    with swapped.collect() as outputs:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert len(outputs) == 2
    loss.backward()  # the model's own loss only: the gradient comes through its blocks
    for layer in swapped:
        assert layer.gate.weight.grad.abs().sum() > 0
        assert layer.experts.down_proj.grad.abs().sum() > 0

    model.eval()
    swapped.undo()
    assert state(model) == was
    assert set(model.state_dict()) == names
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "granitemoeshared", "llama4_text", "opt"])
def test_one_layer_of_a_contract_of_its_own(family):
    model = build(family)
    swapped = moezoo.swap(model, lambda d: moezoo.DenseFFN(d, 24), where=[1])
    assert len(swapped) == 1
    apart = torch.cat([logits(model, row[None]) for row in IDS])
    torch.testing.assert_close(
        logits(model, IDS), apart, rtol=0, atol=2e-6 * float(apart.abs().max())
    )


def test_a_mixture_of_two_halves_is_replaced_whole():
    model = build("granitemoeshared")
    swapped = moezoo.swap(model, lambda d: moezoo.DenseFFN(d, 24))
    with torch.no_grad():
        for layer in swapped:
            layer.down_proj.weight.zero_()
    silent = logits(model, IDS)
    swapped.undo()
    with torch.no_grad():
        for block in model.model.layers:
            for part in (block.block_sparse_moe, block.shared_mlp):
                for parameter in part.parameters():
                    parameter.zero_()
    torch.testing.assert_close(logits(model, IDS), silent, rtol=0, atol=1e-6)


def test_blocks_that_are_none_of_their_own_are_refused():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("bert", is_decoder=True, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    was = state(model)
    with pytest.raises(moezoo.InputError, match="BertLMHeadModel has no list of blocks with"):
        moezoo.swap(model, "moezoo.SparseMoE")
    assert state(model) == was


def test_logits_of_routers_that_are_gone_are_refused():
    model = build("qwen2_moe")
    swapped = moezoo.swap(model, "moezoo.SparseMoE", where=[0])
    assert model(input_ids=IDS, labels=IDS, output_router_logits=True).aux_loss > 0
    swapped.undo()
    hooks = len(model._forward_pre_hooks)

    swapped = moezoo.swap(model, "moezoo.SparseMoE")
    with pytest.raises(moezoo.InputError, match="output_router_logits: the model's own routers"):
        model(input_ids=IDS, labels=IDS, output_router_logits=True)
    model(input_ids=IDS, labels=IDS)
    swapped.undo()
    assert len(model._forward_pre_hooks) == hooks
    assert model(input_ids=IDS, labels=IDS, output_router_logits=True).aux_loss > 0

    model.config.output_router_logits = True
    was = state(model)
    with pytest.raises(moezoo.InputError, match="output_router_logits: the model's own routers"):
        moezoo.swap(model, "moezoo.SparseMoE")
    assert state(model) == was
