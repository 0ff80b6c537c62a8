"""Hash layers in the decoder: token ids reach them, in training and behind a cache."""

import pytest
import torch
import torch.nn.functional as F

from moezoo import InputError
from moezoo_models import MoezooForCausalLM
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint

KEYS = ["token", "previous", "bigram", "position"]


@pytest.fixture
def hashed(make, rules):
    """Build a model whose middle layer hashes."""

    def build(key: str, **arguments) -> MoezooForCausalLM:
        options = {"num_experts": 5, "d_expert": 32, "vocab_size": 61, "key": key, **arguments}
        rule = rules["rule"]
        return make(ffn=[rule("DenseFFN", d_ff=48), rule("HashLayer", 1, **options)])

    return build


def choices(model: MoezooForCausalLM) -> list[torch.Tensor]:
    """Note which experts the hash layer chooses, call by call."""
    layer, seen = model.model.layers[1].mlp, []
    route = layer.route

    def note(*arguments):
        seen.append(route(*arguments))
        return seen[-1]

    layer.route = note
    return seen


@pytest.mark.parametrize("key", KEYS)
def test_decoding_with_a_cache_gives_the_same_experts_and_logits(hashed, ids, key):
    model = hashed(key).eval()
    seen = choices(model)
    whole = model(ids).logits
    output = model(ids[:, :4], use_cache=True)
    steps, cache = [output.logits], output.past_key_values
    for end in range(5, 13):
        output = model(ids[:, end - 1 : end], past_key_values=cache, context_ids=ids[:, :end])
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
    everything, *parts = [r.indices.reshape(2, -1) for r in seen]
    assert torch.equal(torch.cat(parts, dim=1), everything)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation_chooses_the_experts_of_the_whole_text(hashed, ids, key, cache):
    """Left padding included: it is nobody's previous token and no position."""
    model = hashed(key).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"use_cache": False} if cache is None else {}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    batch = torch.stack([F.pad(ids[0, :5], (7, 0)), ids[1]])
    mask = torch.stack([F.pad(torch.ones(5).long(), (7, 0)), torch.ones(12).long()])
    seen = choices(model)
    together = model.generate(batch, attention_mask=mask, **options)
    if cache:
        generated = torch.cat([r.indices.reshape(2, -1) for r in seen], dim=1)
    else:
        generated = seen[-1].indices.reshape(2, -1)
    for row, start in ((0, 7), (1, 0)):
        model(together[row : row + 1, start:-1])
        assert torch.equal(generated[row, start:], seen[-1].indices.flatten())


def test_a_cache_without_the_tokens_before_is_refused(hashed, ids):
    model = hashed("previous").eval()
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"context_ids: a layer routes on earlier tokens"):
        model(ids[:, 4:5], past_key_values=cache)
    with pytest.raises(InputError, match=r"context_mask: shape \(2, 2\) does not match"):
        model(
            ids[:, 4:5],
            past_key_values=cache,
            context_ids=ids[:, :5],
            context_mask=torch.ones(2, 2),
        )


def test_the_layers_vocabulary_must_hold_the_models(hashed):
    with pytest.raises(InputError, match=r"ffn\[1\]: HashLayer has vocab_size 60, the model 61"):
        hashed("token", vocab_size=60)


def test_the_oracle_needs_leave_twice(hashed, make, rules, ids):
    with pytest.raises(InputError, match=r"HashLayer as configured is not causal"):
        hashed("future")
    ffn = [rules["rule"]("HashLayer", d_expert=32, vocab_size=61, key="future")]
    model = make(ffn=ffn, allow_non_causal=True)
    with pytest.raises(InputError, match=r"key: 'future' reads the token that is to be predicted"):
        model(ids, labels=ids)
    assert model.eval()(ids, labels=ids).loss.isfinite()


def test_a_built_table_survives_a_checkpoint(hashed, ids, tmp_path):
    model = hashed("token", hash_function="balanced").eval()
    with pytest.raises(InputError, match=r"the balanced table is not built"):
        model(ids)
    layer = model.model.layers[1].mlp
    layer.build_table(frequencies=1 / torch.arange(1, 62))
    save_checkpoint(tmp_path / "model", model)
    again, _ = load_checkpoint(tmp_path / "model")
    assert torch.equal(again.model.layers[1].mlp.table, layer.table)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("key", ["token", "bigram"])
def test_it_trains(hashed, key):
    """Sixteen symbols in a fixed order: soon each is known by the one before."""
    model = hashed(key).train()
    ids = (torch.arange(48).reshape(3, 16) * 5 + torch.arange(3)[:, None]) % 16
    before = {n: p.clone() for n, p in model.model.layers[1].mlp.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.1 * losses[0]
    for name, parameter in model.model.layers[1].mlp.named_parameters():
        assert (parameter != before[name]).any(), name
