"""The decoder: causality, caching, padding, losses, gradients, recomputation, compilation."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moezoo import InputError
from moezoo_models import MoezooForCausalLM


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(model: MoezooForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["mixed", "moe", "persistent"])
@pytest.mark.parametrize("window", [None, 4])
def test_no_token_sees_a_later_one(make, rules, ids, kind, window):
    model = make(ffn=rules[kind], sliding_window=window)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    close(before[:, :7], after[:, :7], 1e-6)  # experts' batches differ, and so may rounding
    assert (before[:, 7] - after[:, 7]).abs().max() > 1e-3


def test_a_window_hides_what_is_before_it(make, ids):
    model = make(sliding_window=4, num_hidden_layers=1)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    assert (before[:, 5] - after[:, 5]).abs().max() > 1e-4  # 2, 3, 4, 5 are in the window of 5
    assert torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"sliding_window": 5}])
def test_decoding_with_a_cache_gives_the_same_logits(make, rules, ids, fields):
    model = make(ffn=rules["mixed"], **fields).eval()
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for position in range(4, ids.shape[1]):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        assert int(output.ffn_stats[1]["tokens"]) == len(ids)
        steps.append(output.logits)
    close(torch.cat(steps, dim=1), whole)


@pytest.mark.parametrize("kind", ["mixed", "moe", "persistent"])
def test_left_padding_changes_nothing(make, rules, ids, kind):
    model = make(ffn=rules[kind]).eval()
    alone = model(ids[:1, :7])
    padded_ids = torch.cat([torch.full((1, 5), 60), ids[:1, :7]], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 7])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(padded_ids, attention_mask=mask, position_ids=positions)
    close(padded.logits[:, 5:], alone.logits)
    for with_padding, without in zip(padded.ffn_stats, alone.ffn_stats, strict=True):
        assert with_padding.keys() == without.keys()
        for name, value in without.items():
            close(with_padding[name], value)
    for name, value in alone.aux_losses.items():
        close(padded.aux_losses[name], value)


@pytest.mark.parametrize("kind", ["mixed", "moe", "persistent"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_batched_generation_equals_one_by_one(make, rules, ids, kind, cache):
    model = make(ffn=rules[kind]).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(row[None], **options) for row in (ids[0, :5], ids[1])]
    batch = torch.stack([F.pad(ids[0, :5], (7, 0)), ids[1]])
    mask = torch.stack([F.pad(torch.ones(5).long(), (7, 0)), torch.ones(12).long()])
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 7:], alone[0][0])
    assert torch.equal(together[1], alone[1][0])


def test_static_caches_leave_the_blocks_their_mask(make, rules, ids):
    """transformers turns the mask into four dimensions there, which hides the padding."""
    model = make(ffn=rules["mixed"]).eval()
    seen = []
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda h, **k: seen.append(k["mask"]) or forward(h, **k)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
    model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, **options)
    assert torch.equal(seen[0], mask.bool())
    assert len(seen) == 3
    assert all(later.shape == (2, 1) and later.all() for later in seen[1:])


def test_loss_is_cross_entropy_plus_auxiliary_losses(make, rules, ids):
    model = make(ffn=[*rules["mixed"], rules["rule"]("TokenRouted", 2, coefficient=0.25)])
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(output.lm_loss, expected)
    assert list(output.aux_losses) == ["size"]
    assert len(output.ffn_stats) == 3
    assert output.ffn_stats[0] == {}
    assert output.aux_losses["size"] > 0.1
    close(output.loss, expected + output.aux_losses["size"])
    halves = [
        make(ffn=[*rules["mixed"], rules["rule"]("TokenRouted", 2, coefficient=c)])(ids)
        for c in (0.25, 0.0)
    ]
    # Summed over layers: taking one layer's coefficient to zero leaves the other's loss.
    assert 0 < halves[1].aux_losses["size"] < halves[0].aux_losses["size"]
    assert halves[0].loss is None


def test_labels_may_come_shifted(make, ids):
    model = make()
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=shifted).loss)
    with pytest.raises(InputError, match="labels: give labels or shift_labels"):
        model(ids, labels=ids, shift_labels=shifted)


def test_ignored_labels(make, ids):
    model = make()
    labels = ids.clone()
    labels[:, 5:] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :4].flatten(0, 1), ids[:, 1:5].flatten())
    close(output.loss, expected)
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing == 0
    assert model.lm_head.weight.grad.abs().max() == 0


def test_the_loss_is_fp32_in_a_bf16_model(make, rules, ids):
    model = make(ffn=rules["mixed"]).bfloat16()
    output = model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == output.lm_loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    close(output.lm_loss.double(), expected, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(make, rules, ids, tied):
    model = make(
        ffn=[*rules["mixed"], rules["moe"][0] | {"layers": 2}],
        tie_word_embeddings=tied,
        qk_norm=True,
        attention_bias=True,
        attention_output_bias=True,
    )
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Softmax is blind to what is added to all its inputs, as a key's bias does.
        assert "k_proj.bias" in name or parameter.grad.abs().max() > 0, name


def test_inputs_may_be_embeddings(make, rules, ids):
    model = make(ffn=rules["moe"])
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, labels=ids)
    assert torch.equal(output.logits, model(ids).logits)
    output.loss.backward()
    assert (embeds.grad.abs().amax(-1) > 0)[:, :-1].all()


def test_layers_that_route_on_token_ids_must_get_them(make, rules, ids):
    model = make(ffn=rules["mixed"])
    embeds = model.model.embed_tokens(ids)
    with pytest.raises(InputError, match=r"input_ids: layer 1 \(TokenRouted\) routes on token ids"):
        model(inputs_embeds=embeds)
    assert torch.equal(model(ids, inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(InputError, match="input_ids: missing"):
        model()


@pytest.mark.parametrize(("token", "named"), [(61, "61"), (700, "700"), (-1, "-1")])
def test_token_ids_outside_the_vocabulary(make, ids, token, named):
    ids[1, 3] = token
    with pytest.raises(InputError, match=f"token id {named} is outside .* vocabulary of 61"):
        make()(ids)


def test_layers_that_look_ahead_are_refused_unless_allowed(make, rules, ids):
    ahead = [rules["rule"]("DenseFFN"), rules["rule"]("LooksAhead", 2)]
    with pytest.raises(InputError, match=r"ffn\[1\]: LooksAhead .* allow_non_causal: true"):
        make(ffn=ahead)
    make(ffn=ahead, allow_non_causal=True)(ids)
    for router in ({"choice": "expert", "normalize": False}, {"rounding": 8}):
        choice = [rules["rule"]("SparseMoE", router=router)]
        with pytest.raises(InputError, match=r"ffn\[0\]: SparseMoE as configured is not causal"):
            make(ffn=choice)


def test_hidden_states_and_attentions_on_request(make, ids):
    model = make(attn_implementation="eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 12, 32)] * 4
    close(model.lm_head(output.hidden_states[-1]), output.logits)
    for weights in output.attentions:
        close(weights.sum(-1), torch.ones(2, 4, 12))
        assert weights.triu(1).abs().max() == 0
    plain = model(ids)
    assert plain.hidden_states is None
    assert plain.attentions is None


def test_a_cache_is_made_only_where_it_is_of_use(make, ids):
    model = make()
    assert model.train()(ids).past_key_values is None
    assert model.eval()(ids, labels=ids).past_key_values is None
    assert model(ids).past_key_values.get_seq_length() == 12
    assert model(ids, use_cache=False).past_key_values is None


def test_tuples_on_request(make, ids):
    model = make()
    logits, *_ = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits)


def test_last_logits_only(make, ids):
    model = make()
    logits = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])


@pytest.mark.parametrize("kind", ["mixed", "moe"])
def test_activation_checkpointing_counts_once(make, rules, ids, kind):
    balanced = [rules["rule"]("SparseMoE", num_experts=4, balance={"load_balancing": 0.1})]
    plain, recomputed = (
        make(ffn=balanced if kind == "moe" else rules["mixed"]).train() for _ in range(2)
    )
    recomputed.activation_checkpointing_enable()
    calls = []
    recomputed.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = [model(ids, labels=ids) for model in (plain, recomputed)]
    for output in outputs:
        output.loss.backward()
    assert len(calls) == 2
    assert outputs[0].aux_losses
    for name, loss in outputs[0].aux_losses.items():
        assert torch.equal(outputs[1].aux_losses[name], loss)
    for stats, others in zip(outputs[0].ffn_stats, outputs[1].ffn_stats, strict=True):
        for name, value in stats.items():
            assert torch.equal(value, others[name])
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(recomputed)[name], gradient), name


def test_auxiliary_losses_train_through_recomputation(make, rules, ids):
    """The loss inside a recomputed layer reaches the layers before it."""
    model = make(ffn=rules["mixed"]).train()
    model.activation_checkpointing_enable()
    output = model(ids)
    output.aux_losses["size"].backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    "enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"]
)
@pytest.mark.parametrize(
    "options", [None, {}, {"preserve_rng_state": False}, {"use_reentrant": None}]
)
def test_every_spelling_of_recomputation_keeps_the_gradients_of_losses(
    make, rules, ids, enable, options
):
    ffn = [rules["rule"]("SparseMoE", num_experts=4, balance={"load_balancing": 10.0})]
    plain, recomputed = (make(ffn=ffn).train() for _ in range(2))
    getattr(recomputed, enable)(options)
    assert recomputed.model.gradient_checkpointing
    for model in (plain, recomputed):
        model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(recomputed)[name], gradient), name


def test_reentrant_recomputation_is_refused_however_it_is_asked_for(make, rules, ids):
    model = make(ffn=rules["moe"]).train()
    for reentrant in (True, 1):
        with pytest.raises(InputError, match="use_reentrant: it drops gradients"):
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert not model.model.gradient_checkpointing
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    with pytest.raises(InputError, match=r"use_reentrant: .* SparseMoE's losses"):
        model(ids, labels=ids)


@pytest.mark.parametrize("kind", ["mixed", "moe", "persistent"])
def test_compiles_into_one_graph(make, rules, ids, kind):
    model = make(ffn=rules[kind])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, labels=ids)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    output = compiled(ids, labels=ids)
    output.loss.backward()
    close(output.loss, expected.loss, 1e-6)
    for name, gradient in gradients(model).items():
        close(gradient, wanted[name], 1e-5)
    for stats, others in zip(expected.ffn_stats, output.ffn_stats, strict=True):
        for name, value in stats.items():
            close(others[name], value)


def test_outputs_are_bit_identical_from_run_to_run(make, rules, ids):
    runs = []
    for _ in range(2):
        model = make(ffn=rules["moe"])
        model(ids, labels=ids).loss.backward()
        runs.append(gradients(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_initial_scale(make):
    model = make(
        vocab_size=1000, hidden_size=128, num_attention_heads=4, num_hidden_layers=8, head_dim=64
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def std(name):
        return float(parameters[name].std())

    near = {"rel": 0.03}
    for layer in ("model.layers.0", "model.layers.7"):
        for name in ("q_proj", "v_proj"):
            assert std(f"{layer}.self_attn.{name}.weight") == pytest.approx(128**-0.5, **near)
        assert std(f"{layer}.self_attn.o_proj.weight") == pytest.approx((16 * 256) ** -0.5, **near)
        # The layer was told the depth of the model.
        width = model.config.ffn[0]["init_args"]["d_ff"]
        assert std(f"{layer}.mlp.down_proj.weight") == pytest.approx((16 * width) ** -0.5, **near)
        assert (parameters[f"{layer}.input_layernorm.weight"] == 1).all()
    assert std("model.embed_tokens.weight") == pytest.approx(0.02, **near)
    assert std("lm_head.weight") == pytest.approx(0.02, **near)
    tokens = torch.randint(1000, (4, 64))
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(math.log(1000), abs=0.06)


def test_tied_embeddings_are_one_tensor(make, ids):
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert sum(p.numel() for p in make().parameters()) - sum(
        p.numel() for p in model.parameters()
    ) == (61 * 32)


def test_layers_of_relu_scores_share_the_sparsity_of_their_model(make):
    options = {
        "num_experts": 4,
        "d_expert": 4,
        "router": {"score": "relu", "normalize": False},
        "balance": {"load_balancing": 0.0, "sparsity_scope": "model"},
    }
    rule = {"layers": "all", "class_path": "moezoo.SparseMoE", "init_args": options}
    layers = [block.mlp for block in make(num_hidden_layers=2, ffn=[rule]).model.layers]
    for layer, ran in zip(layers, (9, 30), strict=True):  # 20 were asked for
        counts = torch.tensor([ran, 0, 0, 0])
        layer.observe({"expert_counts": counts, "tokens": torch.tensor(10)})
    for layer in layers:
        layer.step()
    found = [layer.gate.sparsity_weight for layer in layers]
    torch.testing.assert_close(found, [torch.tensor([1e-8 / 1.2])] * 2, rtol=1e-6, atol=0)
