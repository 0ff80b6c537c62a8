"""Which layers are compared with plain references: the zoo, and every convention beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain.compare import VOCABULARY, randomize

import moezoo
from moezoo import ExpertNormOptions, GLUOptions
from moezoo.feed_forward import FeedForward
from moezoo.matrices import (
    NM,
    BlockDense,
    BlockShuffle,
    Doped,
    Factorized,
    LowRank,
    Matrices,
    Parallel,
    Pixelfly,
    Pruned,
    SoftNM,
    Transposable,
)
from moezoo.routing import (
    BalanceOptions,
    CapacityOptions,
    LogitOptions,
    RouterOptions,
    WeightOptions,
)
from moezoo.selection import Predictor, Thresholds

D = 21
NO_BALANCE = BalanceOptions(load_balancing=0.0)
SIZES: dict[str, dict[str, Any]] = {
    "CarvedMoE": {"num_experts": 9, "top_k": 3, "d_expert": 5},
    "Engram": {"d_ff": 7, "num_heads": 2, "num_rows": 31, "vocab_size": VOCABULARY},
    "Finedeep": {"d_ff": 18, "num_experts": 3},
    "HashLayer": {"vocab_size": VOCABULARY},
    "L3": {"vocab_size": VOCABULARY, "d_up": 11},
    "MemoryPlus": {"num_keys": 9, "top_k": 5},
    "MoLE": {"num_experts": 3, "d_expert": 5, "d_ff": 7, "vocab_size": VOCABULARY},
    "PEER": {"num_experts": 81, "top_k": 4, "num_heads": 3},
    "PerLayerEmbedding": {"d_row": 5, "vocab_size": VOCABULARY},
    "PersistentMemoryAttention": {"num_heads": 3, "num_slots": 11},
    "ProductKeyMemory": {"num_keys": 9, "top_k": 5},
    "STEM": {"d_ff": 13, "vocab_size": VOCABULARY},
    "SelectiveFFN": {"d_ff": 17},
    "SparseMoE": {"d_expert": 5},
}
# Blocks and groups want widths that are their multiples.
IN_FOURS = (
    "block_dense",
    "block_shuffle",
    "pixelfly",
    "sr_ste",
    "sdgf",
    "mdgf",
    "fst",
    "s_ste",
    "blast",
)
WIDTHS = dict.fromkeys(IN_FOURS, 24)


def build(name: str, **arguments: Any) -> FeedForward:
    """Build a method or a layer at the width of these tests, in fp64, with every bias it offers."""
    methods = {method.name: method for method in moezoo.zoo()}
    cls = methods[name].layer if name in methods else getattr(moezoo, name)
    arguments = {**SIZES.get(cls.__name__, {}), **biases(cls), **arguments}
    width = arguments.pop("d_model", WIDTHS.get(name, D))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # masks are drawn, and stay
        make = methods[name].build if name in methods else cls
        layer = make(width, **arguments)
    return randomize(layer.double())


def biases(cls: type[FeedForward]) -> dict[str, bool]:
    """Return the arguments that give a layer its biases, set to true."""
    annotations = cls.__init__.__annotations__
    names = [name for name in annotations if name.rpartition("_")[2] == "bias"]
    return {name: True for name in names if name != "shared_bias"}  # by default as the experts'


def _moe(**arguments: Any) -> Callable[[], FeedForward]:
    return lambda: build("SparseMoE", **{"balance": NO_BALANCE, **arguments})


def _layer(name: str, **arguments: Any) -> Callable[[], FeedForward]:
    return lambda: build(name, **arguments)


def _matrices(matrices: Matrices, **arguments: Any) -> Callable[[], FeedForward]:
    sizes = {"d_model": 24, "d_ff": 36}
    return lambda: build("DenseFFN", matrices=matrices, **{**sizes, **arguments})


def _uneven(**arguments: Any) -> FeedForward:
    """Build an L3 in which few tokens have most of the rows."""
    layer = build("l3", **arguments)
    tokens = torch.arange(VOCABULARY**2) ** 2 % 97 % VOCABULARY
    layer.allocate(torch.bincount(tokens, minlength=VOCABULARY).square(), tokens)
    return layer


ZOO = {method.name: _layer(method.name) for method in moezoo.zoo()}

CONVENTIONS = {
    "without_biases": _moe(bias=False, num_shared_experts=1),
    "softmax_bias_scale": _moe(
        router=RouterOptions(normalize=False, scale=6.0, selection_bias=True), top_k=3
    ),
    "softmax_bias_normalized": _moe(router=RouterOptions(selection_bias=True), top_k=3),
    "sigmoid_normalized": _moe(router=RouterOptions(score="sigmoid", scale=0.7), top_k=3),
    "sigmoid_raw": _moe(router=RouterOptions(score="sigmoid", normalize=False), top_k=1),
    "sigmoid_groups_by_best": _moe(
        num_experts=12,
        top_k=3,
        router=RouterOptions(
            score="sigmoid", num_groups=4, top_groups=2, group_score="max", selection_bias=True
        ),
        balance=BalanceOptions(load_balancing=0.1, sequence=0.2, scope="local"),
    ),
    "softmax_groups_by_two": _moe(
        num_experts=12,
        top_k=3,
        router=RouterOptions(num_groups=2, top_groups=1, group_score="sum_of_two"),
        balance=BalanceOptions(sequence=0.1, z_loss=0.2, entropy=0.3),
    ),
    # One closed expert: which of several zeros wins is up to torch.topk.
    "groups_closed_with_zero": _moe(
        num_experts=6,
        top_k=3,
        router=RouterOptions(
            score="sigmoid",
            select_on="logit",
            num_groups=6,
            top_groups=5,
            closed_groups="zero",
            selection_bias=True,
        ),
    ),
    "thresholds": _moe(
        top_k=3,
        num_shared_experts=1,
        router=RouterOptions(choice="threshold", normalize=False, scale=3.0, jitter=0.2),
        balance=BalanceOptions(load_balancing=0.0, z_loss=0.2),
    ),
    "positive_scores": _moe(
        top_k=3,
        num_shared_experts=1,
        router=RouterOptions(
            score="relu", normalize=False, scale=3.0, jitter=0.2, logits=LogitOptions(bias=True)
        ),
        balance=BalanceOptions(load_balancing=0.0, z_loss=0.2),
    ),
    "token_rounding": _moe(
        num_experts=7,
        top_k=3,
        num_shared_experts=1,
        router=RouterOptions(
            rounding=8,
            scale=1.3,
            noise=True,
            selection_bias=True,
            weights=WeightOptions(learned_scale=True, expert_scale=True),
        ),
        balance=BalanceOptions(0.1, importance=0.3),
    ),
    "token_rounding_raw": _moe(
        top_k=2,
        router=RouterOptions(score="sigmoid", rounding=16, normalize=False, jitter=0.2),
        balance=BalanceOptions(0.1, z_loss=0.2),
    ),
    "every_choice": _moe(top_k=8),
    "noise_jitter": _moe(
        top_k=3,
        router=RouterOptions(noise=True, jitter=0.2, normalize=False),
        balance=BalanceOptions(z_loss=0.2, importance=0.3, load=0.4, entropy=0.5),
    ),
    "jitter_of_experts": _moe(
        top_k=3,
        num_shared_experts=1,
        router=RouterOptions(jitter=0.3, jitter_experts=True, noise=True),
    ),
    "sparse_mixer": _moe(
        top_k=3,
        balance=BalanceOptions(0.1, z_loss=0.2),
        router=RouterOptions(
            score="sparse_mixer",
            normalize=False,
            mixer_eps=0.4,
            scale=1.3,
            weights=WeightOptions(expert_scale=True),
        ),
    ),
    "sparse_mixer_of_one": _moe(
        top_k=1,
        router=RouterOptions(score="sparse_mixer", normalize=False, mixer_eps=0.3, jitter=0.1),
        capacity=CapacityOptions(factor=0.8, eval_factor=0.8),
    ),
    "noise_of_all": _moe(
        num_experts=4,
        top_k=4,
        router=RouterOptions(noise=True),
        balance=BalanceOptions(0.0, load=0.4),
    ),
    "expert_dropout": _moe(
        num_experts=12,
        top_k=2,
        router=RouterOptions(score="sigmoid", expert_dropout=0.3),
        balance=BalanceOptions(0.1),
    ),
    "shared_gate": _moe(num_shared_experts=2, shared_gate=True),
    "small_capacity": _moe(
        top_k=3,
        capacity=CapacityOptions(factor=0.5, eval_factor=0.7),
        balance=BalanceOptions(0.3, importance=0.2),
    ),
    "least_capacity": _moe(capacity=CapacityOptions(factor=0.1, eval_factor=0.1, minimum=4)),
    "uneven_second_choices": _moe(
        top_k=3,
        capacity=CapacityOptions(factor=0.9, second_choice_threshold=0.5),
        router=RouterOptions(scale=1.5),
    ),
    "capacity_of_each_sequence": _moe(
        top_k=2,
        capacity=CapacityOptions(factor=0.7, eval_factor=0.6, scope="sequence"),
        router=RouterOptions(scale=1.5),
    ),
    "capacity_by_score": _moe(
        top_k=2,
        capacity=CapacityOptions(
            factor=0.7,
            eval_factor=0.8,
            order="score",
            normalize="after",
            second_choice_threshold=0.5,
        ),
        router=RouterOptions(selection_bias=True, scale=1.3, weights=WeightOptions(minimum=0.4)),
        balance=BalanceOptions(0.2, importance=0.3),
    ),
    "capacity_fixed": _moe(
        top_k=3,
        bias=False,
        num_shared_experts=1,
        capacity=CapacityOptions(fixed=3, scope="sequence", order="score", normalize="after"),
        router=RouterOptions(
            score="sigmoid", weights=WeightOptions(p=2.0, with_shared=True, expert_scale=True)
        ),
    ),
    "expert_choice_of_three": _moe(
        top_k=3,
        router=RouterOptions(choice="expert", normalize=False, scale=1.7, jitter=0.1),
        balance=BalanceOptions(0.0, z_loss=0.3),
    ),
    "sqrt_softplus": _moe(
        top_k=3,
        router=RouterOptions(score="sqrt_softplus", selection_bias=True, scale=1.5),
        balance=BalanceOptions(0.1, sequence=0.2),
    ),
    "chosen_by_logit": _moe(
        num_experts=12,
        top_k=3,
        router=RouterOptions(
            score="sigmoid", select_on="logit", selection_bias=True, num_groups=4, top_groups=2
        ),
    ),
    "logits_bias_scale_cap": _moe(
        top_k=3,
        router=RouterOptions(
            score="sigmoid",
            selection_bias=True,
            logits=LogitOptions(bias=True, scale=0.6, softcap=1.5),
        ),
        balance=BalanceOptions(0.1, z_loss=0.2),
    ),
    "weights_eps_minimum": _moe(
        top_k=3,
        router=RouterOptions(
            score="sigmoid", weights=WeightOptions(eps=0.3, minimum=2.0, learned_scale=True)
        ),
    ),
    "weights_p_norm": _moe(
        top_k=3, router=RouterOptions(scale=1.5, weights=WeightOptions(p=2.0, expert_scale=True))
    ),
    "weights_on_inputs": _moe(
        top_k=3,
        num_shared_experts=1,
        balance=BalanceOptions(0.1, importance=0.2),
        capacity=CapacityOptions(factor=0.8, eval_factor=0.9),
        router=RouterOptions(
            score="sigmoid",
            select_on="logit",
            normalize=False,
            scale=1.4,
            weights=WeightOptions(apply_to="input", expert_scale=True),
        ),
    ),
    "weights_on_inputs_of_one": _moe(
        top_k=1,
        gated=False,
        router=RouterOptions(normalize=False, weights=WeightOptions(apply_to="input")),
    ),
    "weights_with_shared": _moe(
        top_k=3,
        bias=False,
        num_shared_experts=2,
        balance=BalanceOptions(0.1, importance=0.2),
        capacity=CapacityOptions(factor=0.8, eval_factor=0.9),
        router=RouterOptions(
            score="sigmoid",
            scale=2.5,
            selection_bias=True,
            logits=LogitOptions(scale=1.4, softcap=0.9),
            weights=WeightOptions(with_shared=True, learned_scale=True, expert_scale=True),
        ),
    ),
    "weights_with_shared_ungated": _moe(
        top_k=1,
        bias=False,
        gated=False,
        num_shared_experts=1,
        router=RouterOptions(
            score="sqrt_softplus", noise=True, weights=WeightOptions(p=3.0, with_shared=True)
        ),
    ),
    "logits_norm": _moe(
        top_k=3,
        router=RouterOptions(noise=True, jitter=0.2, logits=LogitOptions(norm=True, norm_eps=0.3)),
    ),
    "logits_mlp": _moe(
        top_k=1,
        bias=False,
        num_shared_experts=1,
        router=RouterOptions(
            score="sigmoid",
            noise=True,
            logits=LogitOptions(mlp=6, norm_eps=0.2),
            weights=WeightOptions(with_shared=True),
        ),
    ),
    "expert_choice_logits": _moe(
        top_k=3,
        router=RouterOptions(
            choice="expert",
            normalize=False,
            logits=LogitOptions(True, True, 7, 0.3, 0.8, 0.9),
        ),
    ),
    "router_state": _moe(
        num_experts=5,
        num_skip_experts=1,
        top_k=1,
        router=RouterOptions(
            normalize=False,
            jitter=0.2,
            selection_bias=True,
            logits=LogitOptions(mlp=6, norm_eps=0.2, carry=True),
        ),
        balance=BalanceOptions(0.1, z_loss=0.2),
    ),
    "router_state_of_experts_that_choose": _moe(
        top_k=3,
        router=RouterOptions(
            choice="expert", normalize=False, logits=LogitOptions(mlp=7, carry=True, scale=0.8)
        ),
    ),
    "skip_and_identity": _moe(
        num_experts=4,
        num_identity_experts=2,
        num_skip_experts=2,
        num_shared_experts=1,
        top_k=3,
        bias=False,
        router=RouterOptions(scale=1.5, selection_bias=True, expected_experts=1.5),
    ),
    "gpt_oss_gate": _moe(activation="quick_gelu", glu=GLUOptions(limit=0.6, up_shift=1.0)),
    "limit_after": _moe(num_shared_experts=1, glu=GLUOptions(limit=0.3, limit_after=True)),
    "own_limit_of_shared": _moe(
        num_shared_experts=1, glu=GLUOptions(limit=0.4), shared_glu=GLUOptions(limit=0.8)
    ),
    "bias_of_shared": _moe(num_shared_experts=2, bias=False, shared_bias=True),
    "latent": _moe(d_latent=7, num_shared_experts=1, bias=False),
    "latent_capacity": _moe(d_latent=30, capacity=CapacityOptions(factor=0.6, eval_factor=0.7)),
    "norms_around_experts": _moe(
        top_k=3,
        num_shared_experts=1,
        d_latent=9,
        expert_norms=ExpertNormOptions(True, True, 0.2, 0.3),
        capacity=CapacityOptions(factor=0.8, eval_factor=0.9),
    ),
    "norm_of_outputs_of_threshold": _moe(
        top_k=2,
        gated=False,
        router=RouterOptions(choice="threshold", score="sigmoid", normalize=False),
        expert_norms=ExpertNormOptions(output=True, output_eps=0.3),
        balance=BalanceOptions(0.0),
    ),
    "gpt_oss_rows_in_turn": _moe(
        activation="quick_gelu", interleaved=True, glu=GLUOptions(limit=0.6, up_shift=1.0)
    ),
    "identity_expected": _moe(
        num_experts=5,
        num_identity_experts=3,
        top_k=4,
        router=RouterOptions(normalize=False, selection_bias=True, expected_experts=1.5),
    ),
    "identity": _moe(
        num_experts=5,
        num_identity_experts=3,
        top_k=4,
        router=RouterOptions(normalize=False, scale=6.0, selection_bias=True),
    ),
    "identity_latent": _moe(
        num_experts=4,
        num_identity_experts=2,
        num_shared_experts=1,
        top_k=3,
        d_latent=9,
        bias=False,
        balance=BalanceOptions(0.1, z_loss=0.2, sequence=0.1, importance=0.3),
    ),
    "identity_latent_weighed_inputs": _moe(
        num_experts=4,
        num_identity_experts=2,
        num_shared_experts=1,
        top_k=3,
        d_latent=9,
        router=RouterOptions(
            score="sigmoid",
            normalize=False,
            logits=LogitOptions(bias=True),
            weights=WeightOptions(apply_to="input", expert_scale=True),
        ),
    ),
    "identity_with_shared": _moe(
        num_experts=4,
        num_identity_experts=2,
        num_shared_experts=2,
        top_k=3,
        bias=False,
        glu=GLUOptions(limit=0.4),
        shared_glu=GLUOptions(limit=0.8),
        router=RouterOptions(
            score="sigmoid",
            scale=2.5,
            selection_bias=True,
            weights=WeightOptions(with_shared=True, learned_scale=True),
        ),
    ),
    "softcaps": _moe(
        num_shared_experts=1,
        glu=GLUOptions(gate_softcap=0.7, up_softcap=0.9),
        shared_glu=GLUOptions(gate_softcap=0.5, up_softcap=0.6),
    ),
    "quick_gelu": _moe(activation="quick_gelu"),
    "tanh": _moe(activation="tanh", gated=False),
    "leaky_relu": _moe(activation="leaky_relu"),
    "sigma_dropout": _layer("SigmaMoE", expert_dropout=0.4, entropy=0.3, activation="gelu"),
    "cmoe_linear": _layer("CarvedMoE", router="linear", output_bias=False),
    "cmoe_shared": _layer("CarvedMoE", router="shared", num_shared_experts=2),
    "cmoe_shared_ungated": _layer("CarvedMoE", router="shared", gated=False, activation="gelu"),
    "cmoe_signed": _layer("CarvedMoE", signed=True, num_shared_experts=0),
    "cmoe_ungated": _layer("CarvedMoE", gated=False, activation="relu2", bias=False),
    "hash_previous": _layer("hash", key="previous", gated=True),
    "hash_position": _layer("hash", key="position", bias=False),
    "hash_future": _layer("hash", key="future", allow_future=True),
    "hash_parlai": _layer("hash", compat="parlai"),
    "hash_bigrams": _layer("hash", key="bigram", num_hashes=3, activation="silu"),
    "hash_learned": _layer(
        "hash", weights="learned", top_k=3, scale=0.7, key="previous", gated=True
    ),
    "hash_learned_sigmoid": _layer("hash", weights="learned", top_k=2, score="sigmoid", bias=False),
    "hash_learned_softmax": _layer("hash", weights="learned", top_k=5, score="softmax"),
    "finedeep_one": _layer("finedeep", num_sublayers=1, num_experts=1, gated=False),
    "finedeep_deep": _layer(
        "finedeep", num_sublayers=3, num_experts=2, activation="gelu", norm_eps=0.1, bias=False
    ),
    "stem_relu": _layer("stem", activation="relu2"),
    "mole_mlp": _layer("mole", gated=False, activation="gelu", num_experts=2),
    "mole_folded": _layer("mole", folded=True),
    "engram_bigrams": _layer("engram", gate=False, max_ngram=2, d_memory=6, index=1),
    "engram_documents": _layer("engram", max_ngram=4, boundary_id=3, num_rows=60),
    "engram_alone": _layer("engram", d_ff=0, convolution=True, boundary_id=3, gate=False),
    "engram_convolution": _layer("engram", convolution=True, max_ngram=2, num_rows=60),
    "engram_polynomial": _layer("engram", hash_function="polynomial", index=2),
    "l3_uneven": lambda: _uneven(allocation="frequency", max_rows=5, num_rows=70),
    "l3_values": lambda: _uneven(allocation="words", d_value=6, num_rows=90),
    "l3_one_row": _layer("l3", max_rows=1),
    "per_layer_relu": _layer("per_layer_embedding", activation="relu", norm_eps=0.3),
    "peer_sigmoid": _layer("peer", score_fn="sigmoid", query_norm="layer", gated=True),
    "peer_relu": _layer("peer", score_fn="relu", query_norm="qk", share_keys=False),
    "peer_plain": _layer("peer", query_norm="none", activation="silu"),
    "pkm_layer": _layer("product_key_memory", query_norm="layer", v_dim=8),
    "pkm_qk": _layer("product_key_memory", query_norm="qk", top_k=9),
    "memory_plus_batch": _layer("memory_plus", query_norm="batch", v_dim=8, num_heads=2),
    "memory_plus_qk": _layer("memory_plus", query_norm="qk", top_k=2),
    "fff_one_leaf": _layer("fast_feed_forward", depth=0, d_master=3, load_balancing=0.2),
    "fff_leak": _layer(
        "fast_feed_forward", depth=3, region_leak=0.3, hardening_reduction="sum", gated=True
    ),
    "fff_dropout": _layer(
        "fast_feed_forward", depth=2, leaf_dropout=0.3, hardening_reduction="per_token"
    ),
    "fff_always_hard": _layer("fast_feed_forward", depth=3, hard=True, load_balancing=0.2),
    "fff_always_soft": _layer("fast_feed_forward", depth=2, hard=False, activation="gelu"),
    "fff_upstream": _layer("fast_feed_forward", depth=3, compat="upstream_eval"),
    "ultra_trees": _layer("ultra_fast_fff", num_trees=3, depth=3, activation="relu2"),
    "ultra_root": _layer("ultra_fast_fff", num_trees=2, depth=0),
    "top_k_contribution": _layer("top_k_ffn", rank="contribution", activation="gelu", gated=True),
    "top_k_split": _layer("top_k_ffn", gated=True, split_input=True, activation="silu"),
    "top_k_threshold": _layer("top_k_ffn", selection="statistical", activation="gelu"),
    "selective_limit": _layer("SelectiveFFN", glu=GLUOptions(limit=0.4, up_shift=0.5)),
    "selective_limit_after": _layer("SelectiveFFN", glu=GLUOptions(limit=0.3, limit_after=True)),
    "selective_softcaps": _layer(
        "SelectiveFFN", glu=GLUOptions(gate_softcap=0.7, up_softcap=0.9), first_tokens=3
    ),
    "selective_remainder": _layer("SelectiveFFN", selection=Thresholds(remainder=3)),
    "selective_remainder_mlp": _layer(
        "SelectiveFFN", gated=False, selection=Thresholds(remainder=2)
    ),
    "selective_guess": _layer("SelectiveFFN", selection=Predictor(top_k=13, rank=4, norm=True)),
    "selective_guess_gate": _layer(
        "SelectiveFFN",
        selection=Predictor(rank=5, score="gate"),
        glu=GLUOptions(gate_softcap=0.7, up_softcap=0.9),
    ),
    "selective_guess_mlp": _layer(
        "SelectiveFFN", gated=False, activation="relu", selection=Predictor(top_k=11)
    ),
    "selective_mlp": _layer("SelectiveFFN", gated=False, activation="relu2", bias=False),
    "earlier_only": _layer("persistent_memory", include_self=False),
    "drelu_l1": _layer("drelu", l1=0.3),
    "l1_warming_up": _layer("l1_reglu", l1=0.3, l1_warmup=3, activation="gelu"),
    "l1_mlp": _layer("dense_mlp", l1=0.2),
    "dense_limit": _layer("dense_glu", glu=GLUOptions(limit=0.5, up_shift=0.5)),
    "dense_limit_after": _layer("dense_glu", glu=GLUOptions(limit=0.3, limit_after=True)),
    "dense_softcaps": _layer("dense_glu", glu=GLUOptions(gate_softcap=0.7, up_softcap=0.9)),
    "dense_relu2": _layer("dense_mlp", activation="relu2", bias=False),
    "low_rank_guided": _matrices(LowRank(rank=5, init="normal", guide=0.5)),
    "block_dense_guided": _matrices(BlockDense(blocks=3, rank=9, guide=0.4), gated=False),
    "block_shuffle_guided": _matrices(BlockShuffle(blocks=3, guide=0.6), bias=False),
    "one_of_eight": _matrices(NM(n=1, m=8, decay=0.3), d_ff=32),
    "leak_exponential": _matrices(NM(leak="exponential", start=0.05, end=0.9)),
    "transposable_exact": _matrices(Transposable(sampled=False, decay=0.2), gated=False),
    "soft_three_of_six": _matrices(SoftNM(n=3, m=6, sampled=False), d_ff=48),
    "grown_next": _matrices(Pruned(growth=0.3, every=1), bias=False),
    "blocks_grown_next": _matrices(
        Pruned(growth=0.3, every=1, block=4, scope="matrix", dense_from=0.8)
    ),
    "pixelfly_half": _matrices(Pixelfly(size=4, factors=1, mix="half"), gated=False),
    "factorized": _matrices(Factorized(sparsity=0.5, growth=0.3, every=1)),
    "doped": _matrices(Doped(sparsity=0.6, block=4, rank=5), bias=False),
    "parallel": _matrices(Parallel(sparsity=0.75, growth=0.3, every=1), d_ff=48),
    "parallel_mlp": _matrices(Parallel(sparsity=0.6, branches=3), d_ff=36, gated=False),
}

SITUATIONS: dict[str, dict[str, Any]] = {
    "eval": {"training": False, "shape": (63,)},
    "train_padded": {"training": True, "shape": (3, 21), "masked": True},
    "eval_asked_padded": {
        "training": False,
        "shape": (3, 21),
        "masked": True,
        "empty_sequence": True,
        "router_input": True,
    },
    "train_asked": {"training": True, "shape": (63,), "router_input": True},
}
