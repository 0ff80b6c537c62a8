"""Text from a checkpoint: the same for the same seed, streamed in whole characters."""

import inspect

import pytest
import torch
from transformers import GenerationConfig

from moezoo import InputError
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.generate import (
    WholeCharacterStreamer,
    continue_text,
    generate,
    new_tokens,
)

FIELDS = {"vocab_size": 257, "max_position_embeddings": 512}


@pytest.fixture
def model(make, rules):
    """A model sure enough of itself that texts repeat, and unsure enough that seeds matter."""
    built = make(ffn=rules["mixed"], **FIELDS).eval()
    with torch.no_grad():
        built.lm_head.weight.mul_(20)
    return built


@pytest.fixture
def checkpoint(model, byte_level_tokenizer, tmp_path):
    return save_checkpoint(tmp_path / "checkpoint", model, byte_level_tokenizer)


def greedy(model, prompt_ids, tokens):
    """Take the likeliest token again and again, without cache and without transformers."""
    ids = torch.tensor([prompt_ids])
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt_ids) :].tolist()


def test_temperature_zero_is_greedy(model, byte_tokenizer):
    text = continue_text(model, byte_tokenizer, "To be", max_new_tokens=24, temperature=0)
    tokens = greedy(model, byte_tokenizer.encode("To be"), 24)
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    assert text == byte_tokenizer.decode(tokens)
    assert len(tokens) > 5


def test_an_empty_prompt_begins_after_the_end_of_a_text(model, byte_tokenizer):
    text = continue_text(model, byte_tokenizer, max_new_tokens=4, temperature=0)
    assert text == byte_tokenizer.decode(greedy(model, [byte_tokenizer.eos_id], 4))


def test_prompts_follow_the_token_that_begins_texts(model, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "bos_id", 7, raising=False)
    text = continue_text(model, byte_tokenizer, "a", max_new_tokens=4, temperature=0)
    assert text == byte_tokenizer.decode(greedy(model, [7, 97], 4))


def test_the_seed_decides(model, byte_tokenizer):
    def text(seed):
        return continue_text(model, byte_tokenizer, "a", max_new_tokens=32, seed=seed)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = text(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert text(1) == first
    assert len({text(seed) for seed in range(1, 5)}) > 1


def test_the_end_of_text_stops(model, byte_tokenizer):
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight[256] = 0.0
    # All logits are zero: the first id wins, unless it is the end.
    assert continue_text(model, byte_tokenizer, "a", temperature=0, max_new_tokens=5) == "\0" * 5
    byte_tokenizer.eos_id = 0
    assert continue_text(model, byte_tokenizer, "a", temperature=0, max_new_tokens=5) == ""


def test_top_k_of_one_is_greedy(model, byte_tokenizer):
    options = {"max_new_tokens": 12, "seed": 3}
    expected = continue_text(model, byte_tokenizer, "a", temperature=0, **options)
    assert continue_text(model, byte_tokenizer, "a", top_k=1, **options) == expected
    assert continue_text(model, byte_tokenizer, "a", top_p=1e-6, **options) == expected
    wild = {"temperature": 5.0, "top_k": 0}
    assert continue_text(model, byte_tokenizer, "a", **wild, **options) != expected


def test_the_model_stays_in_its_mode(model, byte_tokenizer):
    for training in (True, False):
        model.train(training)
        continue_text(model, byte_tokenizer, "a", max_new_tokens=2)
        assert model.training is training


def streamed(tokenizer, prompt, ids):
    pieces = []
    streamer = WholeCharacterStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([prompt]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("kind", ["byte_tokenizer", "byte_level_tokenizer"])
def test_streaming_never_breaks_a_character(request, kind):
    tokenizer = request.getfixturevalue(kind)
    text = "naïve 素数 🦓, €5\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert streamed(tokenizer, tokenizer.encode("→ "), ids) == list(text)
    assert streamed(tokenizer, [tokenizer.eos_id], [*ids, tokenizer.eos_id]) == list(text)
    # An unfinished character comes at the end, as the sign that something is missing.
    assert streamed(tokenizer, [tokenizer.eos_id], ids[:3]) == [
        "n",
        "a",
        "\N{REPLACEMENT CHARACTER}",
    ]


def test_streaming_keeps_spaces_that_begin_a_token():
    """A tokenizer of words writes no space before the first: decoding tokens alone loses it."""

    class Words:
        def decode(self, ids):
            return " ".join("abc"[i] for i in ids)

    assert "".join(streamed(Words(), [0], [1, 2, 0])) == " b c a"


def test_generate_prints_as_it_comes_and_returns_the_text(checkpoint, capsys):
    text = generate(checkpoint, "Ünï", max_new_tokens=8, device="cpu", seed=2)
    assert text.startswith("Ünï")
    assert len(text) > 3
    assert capsys.readouterr().out == text + "\n"
    assert generate(str(checkpoint), "Ünï", max_new_tokens=8, seed=2, stream=False) == text
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is out of range"),
        ({"temperature": -1.0}, "temperature: -1 is out of range"),
        ({"temperature": float("nan")}, "temperature: nan is out of range"),
        ({"top_k": -1}, "top_k: -1 is out of range"),
        ({"top_p": 1.5}, "top_p: 1.5 is out of range"),
        ({"top_p": 0.0}, "top_p: 0 leaves no token to choose from"),
        ({"seed": -1}, "seed: -1 is out of range"),
        ({"seed": 1 << 64}, "seed: 18446744073709551616 is out of range"),
        ({"prompt": "a\udcff"}, "prompt: character 2 is not UTF-8 text"),
        ({"max_new_tokens": 512}, "max_new_tokens: 512 after a prompt of 1 tokens are more"),
        ({"device": "gpu"}, r"device: 'gpu' cannot be used \(.*auto or cpu can"),
        ({"attention": "fast"}, "attention: 'fast' is not known"),
        ({"checkpoint": "nowhere"}, "checkpoint: nowhere does not exist"),
        ({"tokenizer": "nowhere"}, "tokenizer: nowhere is not a directory"),
    ],
)
def test_mistakes_are_named_before_anything_is_printed(checkpoint, options, message, capsys):
    with pytest.raises(InputError, match=message) as caught:
        generate(**{"checkpoint": checkpoint, "prompt": "a", **options})
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1e-30}, "temperature: 1e-30 is too little to divide by; give 0"),
        ({"seed": -1}, "seed: -1 is out of range"),
        ({"seed": 10**30}, "seed: .* is out of range"),
    ],
)
def test_options_that_break_what_computes(options, message, model, byte_tokenizer):
    with pytest.raises(InputError, match=message):
        continue_text(model, byte_tokenizer, "a", **options)


def test_a_cache_has_to_fit_into_memory(model, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("moezoo_models.decoding.settings.free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"max_new_tokens: keys and values of 6 tokens need"):
        continue_text(model, byte_tokenizer, "a", max_new_tokens=5)


def test_more_tokens_than_there_are_may_be_sampled_among(model, byte_tokenizer):
    options = {"max_new_tokens": 5, "temperature": 1.0}
    every = continue_text(model, byte_tokenizer, "a", top_k=0, **options)
    assert continue_text(model, byte_tokenizer, "a", top_k=10**30, **options) == every


def test_the_settings_of_a_checkpoint_decide_nothing_but_the_end(model, byte_tokenizer):
    """Greedy text is the likeliest, whatever penalties and beams a directory asks for."""
    plain = continue_text(model, byte_tokenizer, "a", max_new_tokens=8, temperature=0)
    settings = {"num_beams": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    model.generation_config = GenerationConfig(**settings, eos_token_id=[-1, 10**6])
    assert continue_text(model, byte_tokenizer, "a", max_new_tokens=8, temperature=0) == plain
    assert model.generation_config.num_beams == 3


def test_no_more_is_written_than_the_model_is_made_for(make, byte_tokenizer):
    model = make(vocab_size=257, max_position_embeddings=16)
    wanted = [new_tokens(model, 6), new_tokens(make(), 6), new_tokens(make(), 6, 122)]
    assert wanted == [10, 122, 122]
    assert new_tokens(make(max_position_embeddings=4096), 6) == 128
    with pytest.raises(
        InputError,
        match="max_new_tokens: 11 after a prompt of 6 tokens are more than the 16 that the model "
        "is made for; give at most 10",
    ):
        continue_text(model, byte_tokenizer, "To be.", max_new_tokens=11)
    with pytest.raises(InputError, match="prompt: it has 16 tokens, and the model is made for 16"):
        continue_text(model, byte_tokenizer, "To be, or not to")
    continue_text(model, byte_tokenizer, "To be,", max_new_tokens=10)


def test_a_foreign_tokenizer_is_noticed(make, byte_tokenizer):
    with pytest.raises(InputError, match="token id 122 is outside the model's vocabulary of 61"):
        continue_text(make(), byte_tokenizer, "jazz")


def test_every_option_is_documented_for_the_command_line():
    import moezoo_models.evaluation.evaluate as evaluation

    for function in (generate, evaluation.evaluate):
        documentation = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert f"\n    {name}: " in documentation
