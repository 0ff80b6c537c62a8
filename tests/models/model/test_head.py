"""The loss without logits: that of the logits, with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moezoo import InputError
from moezoo_kernels.linear_cross_entropy import chunked
from moezoo_models.model.head import Head, next_token_loss


def step(model, ids: Tensor, labels: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of a step."""
    model.zero_grad()
    output = model(ids, shift_labels=labels, **options)
    assert (output.logits is None) == (not options.get("return_logits", True))
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.lm_loss.detach(), gradients


def assert_same(one, other, digits: float) -> None:
    for a, b in [(one[0], other[0]), *((one[1][n], g) for n, g in other[1].items())]:
        assert (a - b).norm() <= digits * b.norm()
    assert one[1].keys() == other[1].keys()


@pytest.fixture
def labels(ids) -> Tensor:
    labels = ids.roll(-1, dims=1)
    labels[:, -2:] = labels[0, :5] = -100
    return labels


@pytest.mark.parametrize("kind", ["mixed", "moe"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens_per_chunk", [5, 1000])
def test_loss_and_gradients_are_those_of_the_logits(
    make, rules, ids, labels, kind, tied, tokens_per_chunk, monkeypatch
):
    monkeypatch.setattr(chunked, "chunk_size", lambda tokens, width: tokens_per_chunk)
    model = make(ffn=rules[kind], tie_word_embeddings=tied)
    whole, alone = (step(model, ids, labels, return_logits=r) for r in (True, False))
    assert_same(alone, whole, 1e-6)


def test_the_loss_of_no_label_is_zero(make, ids):
    model = make()
    loss, gradients = step(model, ids, torch.full_like(ids, -100), return_logits=False)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_autocast_and_bf16(make, rules, ids, labels):
    model = make(ffn=rules["moe"])
    exact = step(model, ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        whole, alone = (step(model, ids, labels, return_logits=r) for r in (True, False))
    assert alone[0].dtype == torch.float32
    head = "lm_head.weight"
    assert (alone[1][head] - exact[1][head]).norm() <= (whole[1][head] - exact[1][head]).norm() * 2
    whole, alone = (step(model.bfloat16(), ids, labels, return_logits=r) for r in (True, False))
    assert alone[0].dtype == torch.float32
    assert {g.dtype for g in alone[1].values()} == {torch.bfloat16}
    assert_same(alone, whole, 2e-2)


def test_labels_are_shifted_as_with_logits(make, ids):
    model = make()
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    one = model(ids, labels=ids, return_logits=False)
    assert torch.equal(one.loss, model(ids, shift_labels=shifted, return_logits=False).loss)
    with pytest.raises(InputError, match="return_logits: false goes with labels only"):
        model(ids, return_logits=False)


def test_without_gradients_the_head_is_multiplied_once(make, ids, labels):
    model = make()
    with torch.no_grad():
        expected = model(ids, shift_labels=labels).lm_loss
        with FlopCounterMode(display=False) as counter:
            found = model(ids, shift_labels=labels, return_logits=False).lm_loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    counts = counter.get_flop_counts()["Global"]
    active = int((labels != -100).sum())
    assert counts[torch.ops.moezoo.linear_cross_entropy] == 2 * active * 61 * 32


def test_an_adapted_head_makes_logits(make, ids, labels):
    model = make()
    model.requires_grad_(False)
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["lm_head"], r=2), model)
    assert not isinstance(adapted.lm_head, Head)
    torch.nn.init.normal_(adapted.lm_head.lora_B["default"].weight)
    whole, alone = (step(adapted, ids, labels, return_logits=r) for r in (True, False))
    assert whole[1].keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert_same(alone, whole, 0)


def test_a_frozen_head_passes_the_gradient_on(make, ids, labels):
    model = make(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    whole, alone = (step(model, ids, labels, return_logits=r) for r in (True, False))
    assert "lm_head.weight" not in alone[1]
    assert_same(alone, whole, 1e-6)


def test_a_head_that_stays_sharded_makes_logits(ids, labels):
    class Sharded(torch.nn.Parameter):
        device_mesh = None

    head, hidden = Head(32, 61), torch.randn(2, 12, 32)
    expected = next_token_loss(head(hidden), labels)
    head.weight.__class__ = Sharded
    assert torch.equal(head(hidden, labels), expected)


def test_it_compiles_into_one_graph(labels):
    torch._dynamo.reset()
    head, hidden = Head(32, 61), torch.randn(2, 12, 32, requires_grad=True)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for function in (head, compiled):
        found = torch.autograd.grad(function(hidden, labels), [hidden, head.weight])
        expected = torch.autograd.grad(next_token_loss(head(hidden), labels), [hidden, head.weight])
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()
