"""Swapping a layer into a transformers decoder, in place."""

import pytest
import torch
from torch import nn

import moezoo

transformers = pytest.importorskip("transformers")


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **changes))


IDS = torch.arange(24).reshape(2, 12)


def test_swap_trains_through_the_foreign_loss():
    model = llama()
    swapped = moezoo.swap(model, "moezoo.SparseMoE", where="every 2")
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == [
        "LlamaMLP",
        "Adapter",
        "LlamaMLP",
        "Adapter",
    ]
    with swapped.collect() as outputs:
        loss = model(input_ids=IDS, labels=IDS).loss
    assert len(outputs) == len(swapped) == 2
    (loss + sum(sum(o.losses.values()) for o in outputs)).backward()
    for layer in swapped:
        assert layer.gate.weight.grad.abs().sum() > 0
    model(input_ids=IDS)
    assert len(outputs) == 2  # nothing is caught outside the block


def test_swapped_dense_with_copied_weights_is_the_same_model():
    model = llama()
    before = model(input_ids=IDS).logits
    weights = [layer.mlp.state_dict() for layer in model.model.layers]
    for layer, state in zip(
        moezoo.swap(model, lambda d: moezoo.DenseFFN(d, 32)), weights, strict=True
    ):
        layer.load_state_dict(state)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-6)


def test_swap_keeps_dtype_mode_and_generation():
    model = llama().to(torch.bfloat16).eval()
    swapped = moezoo.swap(model, {"class_path": "moezoo.SparseMoE"}, where=lambda i: i == 3)
    assert swapped[0].experts.down_proj.dtype == torch.bfloat16
    assert not swapped[0].training
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(IDS[:1], **options)
        plain = model.generate(IDS[:1], use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_losses_are_counted_once_under_activation_checkpointing():
    model = llama().train()
    swapped = moezoo.swap(model, "moezoo.SparseMoE")

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with swapped.collect() as outputs:
            loss = model(input_ids=IDS, labels=IDS).loss
        (loss + 100 * sum(sum(o.losses.values()) for o in outputs)).backward()
        assert len(outputs) == 4
        return swapped[1].gate.weight.grad.clone()

    plain = gradient()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)


@pytest.mark.parametrize(
    ("factory", "where", "message"),
    [
        ("moezoo.SparseMoE", [7], "layers: there is no layer 7; the model has 4"),
        ("moezoo.SparseMoE", lambda i: False, "where: no layer of 4 is chosen"),
        ("moezoo.Sparse", "all", "did you mean 'moezoo.SparseMoE'"),
        (
            lambda d: {m.name: m for m in moezoo.zoo()}["expert_choice"].build(d),
            "all",
            "factory: SparseMoE is not causal",
        ),
    ],
)
def test_mistakes_leave_the_model_as_it_was(factory, where, message):
    model = llama()
    with pytest.raises(moezoo.InputError) as error:
        moezoo.swap(model, factory, where)
    assert message in str(error.value)
    assert all(type(layer.mlp).__name__ == "LlamaMLP" for layer in model.model.layers)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(moezoo.InputError, match="model: Linear has no list of blocks"):
        moezoo.swap(nn.Linear(2, 2), "moezoo.DenseFFN")
