"""GRIFFIN: neurons that a prompt chooses, in decoding and in evaluation, against plain loops."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moezoo import InputError
from moezoo import __main__ as command
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.decoding.decoder import Decoder
from moezoo_models.decoding.griffin import kept_after
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.evaluation.perplexity import evaluate_text
from moezoo_models.generate import continue_text, generate

FIELDS = {"vocab_size": 257, "max_position_embeddings": 512}
PROMPT = "To be, or not to be"


def dense(**arguments):
    return [{"layers": "all", "class_path": "DenseFFN", "init_args": {"d_ff": 40, **arguments}}]


KINDS = {
    "gated": dense(),
    "plain": dense(gated=False, activation="relu", bias=True),
    "biases": dense(bias=True),
}


@pytest.fixture
def build(make):
    def built(ffn=KINDS["gated"], **fields):
        model = make(ffn=ffn, **FIELDS, **fields).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
            model.lm_head.weight.mul_(20)
        return model

    return built


@torch.no_grad()
def by_hand(model, prompt, following, count):
    """Compute the logits after prompt and each following token, from the paper's definition."""
    chosen = []
    hidden = model.model.embed_tokens(prompt)[None]
    for block in model.model.layers:  # neurons of the prompt alone, layer by layer
        places = torch.arange(len(prompt))[None]
        rotary = model.model.rotary_emb(hidden, places)
        mask = torch.full((len(prompt), len(prompt)), -torch.inf).triu(1)[None, None]
        attended = block.self_attn(block.input_layernorm(hidden), rotary, mask)[0]
        hidden = hidden + attended
        inputs = block.post_attention_layernorm(hidden)
        z = block.mlp.inner(inputs)[0]
        share = z / z.square().sum(dim=1, keepdim=True).sqrt()
        chosen.append(share.square().sum(dim=0).topk(count).indices)
        hidden = hidden + block.mlp.reference(inputs).hidden
    whole = torch.cat([prompt, following])
    handles = []
    for block, neurons in zip(model.model.layers, chosen, strict=True):
        kept = torch.zeros(40)
        kept[neurons] = 1

        def cut(_, inputs, kept=kept):
            values = inputs[0].clone()
            values[:, len(prompt) :] *= kept
            return (values,)

        handles.append(block.mlp.down_proj.register_forward_pre_hook(cut))
    logits = model(whole[None]).logits[0, len(prompt) - 1 :]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_after_the_prompt_use_its_neurons(build, kind):
    model = build(KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    prompt, following = torch.randint(257, (24,), generator=generator).split([15, 9])
    decoder = Decoder(model, prompt[None], torch.ones(1, 15).long(), 10, griffin=0.4)
    steps = [decoder.prefill(), *(decoder.step(token[None]) for token in following)]
    expected = by_hand(model, prompt, following, 16)
    assert torch.allclose(torch.cat(steps), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    every = model(torch.cat([prompt, following])[None]).logits[0, 14:]
    assert torch.allclose(steps[0][0], every[0], atol=1e-3)  # the prompt itself is dense
    assert not torch.allclose(torch.cat(steps)[1:], every[1:], atol=1e-1)


@torch.no_grad()
def test_a_pass_over_the_whole_is_what_steps_compute(build):
    """Rows of a batch have prompts of their own, of unequal lengths."""
    model = build()
    ids = torch.randint(257, (2, 21), generator=torch.Generator().manual_seed(1))
    with kept_after(model, 0.4, [6, 15]):
        found = model(ids).logits
    for row, length, logits in zip(ids, (6, 15), found, strict=True):
        expected = by_hand(model, row[:length], row[length:], 16)
        assert torch.allclose(logits[length - 1 :], expected, rtol=1e-4, atol=1e-2)
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks


def test_all_neurons_write_the_text_of_the_model(build, byte_tokenizer):
    model = build()
    options = {"max_new_tokens": 20, "temperature": 0}
    whole = continue_text(model, byte_tokenizer, PROMPT, **options)
    assert continue_text(model, byte_tokenizer, PROMPT, griffin=1.0, **options) == whole
    assert continue_text(model, byte_tokenizer, PROMPT, griffin=0.1, **options) != whole


def test_a_prompt_s_choice_ends_with_its_text(build, byte_tokenizer):
    """Another prompt in between changes nothing, and the model keeps none of it."""
    model = build()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"max_new_tokens": 16, "temperature": 0}
    plain = continue_text(model, byte_tokenizer, PROMPT, **options)
    first = continue_text(model, byte_tokenizer, PROMPT, griffin=0.2, **options)
    continue_text(model, byte_tokenizer, "\xff\xfe 0123", griffin=0.2, **options)
    assert continue_text(model, byte_tokenizer, PROMPT, griffin=0.2, **options) == first
    assert continue_text(model, byte_tokenizer, PROMPT, **options) == plain
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())


@torch.no_grad()
def test_a_batch_has_one_prompt(build):
    model = build()
    ids = torch.randint(257, (1, 9), generator=torch.Generator().manual_seed(2))
    ones = torch.ones(2, 9).long()
    token = torch.tensor([5])
    with pytest.raises(InputError, match="griffin: each prompt keeps neurons of its own"):
        Decoder(model, torch.cat([ids, ids.flip(1)]), ones, 4, griffin=0.5)
    alone = Decoder(model, ids, ones[:1], 4, griffin=0.5)
    twice = Decoder(model, ids.repeat(2, 1), ones, 4, griffin=0.5)
    padded = torch.cat([torch.zeros(1, 3).long(), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3).long(), ones[:1]], dim=1)
    behind = Decoder(model, padded, mask, 4, griffin=0.5)
    alone.prefill(), twice.prefill(), behind.prefill()
    expected = alone.step(token)
    assert torch.allclose(twice.step(token.repeat(2)), expected.repeat(2, 1), atol=1e-3)
    assert torch.allclose(behind.step(token), expected, atol=1e-3)


def test_perplexity_is_of_what_follows_a_window_s_first_part(build, byte_tokenizer):
    model = build()
    text = "Whether 'tis nobler in the mind to suffer the slings and arrows"
    ids = torch.tensor([256, *byte_tokenizer.encode(text)])
    result = evaluate_text(model, byte_tokenizer, text, sequence_length=24, griffin=0.4)
    losses = []
    for begin, end, counted in ((0, 24, 0), (12, 36, 24), (24, 48, 36), (36, 60, 48), (39, 63, 60)):
        length = counted - begin or 12
        window = ids[begin:end]
        logits = by_hand(model, window[:length], window[length:], 16)
        if counted == 0:  # the first window's first half is predicted by all neurons
            with torch.no_grad():
                logits = torch.cat([model(window[None, :length]).logits[0, :-1], logits])
            length = 1
        else:
            logits, length = logits[1:], length + 1
        targets = ids[begin + length : end + 1]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    expected = torch.cat(losses)
    assert result.tokens == len(expected) == 63
    assert result.loss == pytest.approx(float(expected.double().mean()), rel=1e-4)
    plain = evaluate_text(model, byte_tokenizer, text, sequence_length=24)
    assert plain.griffin is None
    assert abs(plain.loss - result.loss) > 1e-3
    assert "neurons kept (GRIFFIN)" in result.table()
    with pytest.raises(InputError, match=r"griffin: windows of 24 .*; lower the stride"):
        evaluate_text(model, byte_tokenizer, text, sequence_length=24, stride=24, griffin=0.4)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_shares_out_of_range_are_refused(build, byte_tokenizer, share):
    with pytest.raises(InputError, match="griffin: "):
        continue_text(build(), byte_tokenizer, "a", griffin=share, max_new_tokens=2)
    with pytest.raises(InputError, match="griffin: "):
        evaluate_text(build(), byte_tokenizer, "abc", griffin=share)


def test_models_without_dense_blocks_are_refused(build, rules, byte_tokenizer):
    with pytest.raises(InputError, match="griffin: the model has no dense feed-forward block"):
        continue_text(build(rules["moe"]), byte_tokenizer, "a", griffin=0.5, max_new_tokens=2)
    model = build()
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="griffin: its attention backend is eager, and only"):
        continue_text(model, byte_tokenizer, "a", griffin=0.5, max_new_tokens=2)


def test_models_of_transformers_are_refused(byte_tokenizer):
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="griffin: LlamaForCausalLM is computed by transformers"):
        continue_text(LlamaForCausalLM(config), byte_tokenizer, "a", griffin=0.5, max_new_tokens=2)


def test_commands_take_the_share(build, byte_level_tokenizer, tmp_path, capsys):
    model = build()
    place = str(save_checkpoint(tmp_path / "model", model, byte_level_tokenizer))
    text = generate(place, PROMPT, max_new_tokens=12, temperature=0, griffin=0.2, stream=False)
    expected = continue_text(
        model, byte_level_tokenizer, PROMPT, max_new_tokens=12, temperature=0, griffin=0.2
    )
    assert text == PROMPT + expected
    (tmp_path / "text.txt").write_text(PROMPT * 9)
    told = evaluate(place, tmp_path / "text.txt", sequence_length=32, griffin=0.5)
    assert told.griffin == 0.5
    capsys.readouterr()
    line = ["generate", "--checkpoint", place, "--prompt", "a", "--griffin", "0"]
    assert command.main(line) == 2
    assert capsys.readouterr() == ("", "moezoo: error: griffin: 0 keeps no neuron; give the share "
                                       "to keep, such as 0.5\n")  # fmt: skip
    line = ["generate", "--checkpoint", place, "--griffin", "0.5", "--attention", "eager"]
    assert command.main(line) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("moezoo: error: griffin: its attention backend is eager")
    with pytest.raises(InputError, match="griffin: it is for --text only"):
        evaluate(place, tasks="arc_easy", griffin=0.5)
