"""Latent attention of ours in unmodified DeepSeek-V2 and -V3, and what is made of these again."""

import pytest
import torch

from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.checkpoints.stock import load_as_it_is, predict
from moezoo_models.export.mixtures import as_stock_mixture
from moezoo_models.export.stock import export_stock
from moezoo_train.measure.throughput import count_parameters, forward_flops_per_token

LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
KINDS = {
    "deepseek_v2": {"normalize": False, "num_groups": 4, "top_groups": 2},
    "deepseek_v3": {
        "score": "sigmoid",
        "selection_bias": True,
        "scale": 2.5,
        "num_groups": 4,
        "top_groups": 2,
    },
}


@pytest.fixture(params=KINDS)
def model(request, make):
    """A mixture behind a dense block, none of whose numbers is that of its beginning."""
    experts = {"num_experts": 8, "top_k": 3, "d_expert": 16, "num_shared_experts": 1}
    mixture = {"layers": [1, 2], "class_path": "moezoo.SparseMoE"}
    dense = {"layers": "all", "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 48}}
    built = make(
        latent_attention={**LATENT, "q_lora_rank": 7},
        num_key_value_heads=None,
        attention_bias=True,
        attention_output_bias=True,
        rope_parameters=YARN,
        ffn=[dense, {**mixture, "init_args": {**experts, "router": KINDS[request.param]}}],
    )
    with torch.no_grad():
        for tensor in [*built.parameters(), *built.buffers()]:
            if tensor.is_floating_point() and tensor is not built.model.rotary_emb.inv_freq:
                tensor.add_(0.1 * torch.randn_like(tensor))
    built.model.rotary_emb.reset_parameters()
    return request.param, built.eval()


def test_logits_and_generated_text_are_the_same(model, ids):
    name, ours = model
    ours = ours.double()
    stock = as_stock_mixture(ours).double()
    stock.set_experts_implementation("eager")
    stock.model.rotary_emb.to(torch.float32)
    rotary = stock.model.rotary_emb
    fresh = type(rotary)(stock.config)
    rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq, fresh.inv_freq.clone()
    assert stock.config.model_type == name
    with torch.no_grad():
        expected, found = ours(ids).logits, stock(ids).logits
    assert (found - expected).abs().max() <= 1e-6
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))


def test_the_stock_one_is_run_and_counted_here(model, ids, tmp_path):
    name, ours = model
    save_checkpoint(tmp_path / "ours", ours)
    export_stock(tmp_path / "ours", tmp_path / "stock")
    stock, _ = load_as_it_is(tmp_path / "stock")
    assert stock.config.model_type == name
    assert stock.get_experts_implementation()[""] == "moezoo"
    chosen = []
    for block in stock.model.layers[1:]:
        block.mlp.experts.register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    theirs, own = (predict(each, ids, ids) for each in (stock, ours))
    torch.testing.assert_close(theirs.lm_loss, own.lm_loss, rtol=1e-5, atol=1e-5)
    assert theirs.ffn_stats[0] == {}
    for stats, of_ours, experts in zip(
        theirs.ffn_stats[1:], own.ffn_stats[1:], chosen, strict=True
    ):
        counted = torch.bincount(experts.flatten(), minlength=8)
        assert torch.equal(stats["expert_counts"], counted)
        assert torch.equal(of_ours["expert_counts"], counted)
    assert count_parameters(stock) == count_parameters(ours)
    # Beside the experts: a router's product is not a linear map in transformers.
    assert forward_flops_per_token(stock, 12) == forward_flops_per_token(ours, 12)
