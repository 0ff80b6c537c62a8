"""Loss, perplexity and bits per byte against sums done by hand."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from moezoo import InputError
from moezoo import __main__ as command
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.evaluation.perplexity import evaluate_text, evaluate_tokens
from moezoo_models.inspect.common import Stream

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n" * 2


@pytest.fixture
def model(make, rules):
    return make(ffn=rules["mixed"], vocab_size=257, max_position_embeddings=256)


def by_hand(model, tokens, start, length, stride):
    """Predict each token by itself from the context that the documentation promises it."""
    stream = torch.tensor([start, *tokens])
    losses = []
    begin, end = 0, min(length, len(tokens))
    for position in range(len(tokens)):
        if position >= end:
            end = min(end + stride, len(tokens))
            begin = end - length
        context = stream[begin : position + 1]
        logits = model(context[None]).logits[0, -1].double()
        losses.append(-F.log_softmax(logits, -1)[stream[position + 1]].item())
    return losses


@pytest.mark.parametrize(
    ("length", "stride"), [(16, 16), (16, 8), (16, 5), (16, 1), (7, 3), (1, 1), (200, 50)]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_against_every_token_by_itself(model, byte_tokenizer, length, stride, batch_size):
    tokens = byte_tokenizer.encode(TEXT)
    result = evaluate_text(
        model,
        byte_tokenizer,
        TEXT,
        sequence_length=length,
        stride=stride,
        batch_size=batch_size,
    )
    with torch.no_grad():
        losses = by_hand(model.eval(), tokens, byte_tokenizer.eos_id, length, stride)
    assert len(losses) == result.tokens == len(tokens)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-9)
    assert result.bytes == len(TEXT.encode())
    bits = sum(losses) / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / len(TEXT.encode()), rel=1e-6)


def test_a_model_that_knows_nothing_is_uniform(make, byte_tokenizer):
    model = make(vocab_size=257)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate_text(model, byte_tokenizer, TEXT)
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)


def test_two_bytes_per_token_halve_the_bits_per_byte(model):
    tokens = list(range(40))
    one = evaluate_tokens(model, tokens, start_token=256, num_bytes=40)
    two = evaluate_tokens(model, torch.tensor(tokens), start_token=256, num_bytes=80)
    assert one.loss == two.loss
    assert one.bits_per_byte == pytest.approx(2 * two.bits_per_byte, rel=1e-12)


def test_defaults_follow_the_model(model, byte_tokenizer):
    result = evaluate_text(model, byte_tokenizer, TEXT)
    assert (result.sequence_length, result.stride) == (256, 128)


def test_the_window_is_what_the_model_was_trained_on(make, byte_tokenizer):
    model = make(vocab_size=257, trained_length=16)
    assert evaluate_text(model, byte_tokenizer, TEXT).sequence_length == 16
    assert evaluate_text(model, byte_tokenizer, TEXT, sequence_length=128).sequence_length == 128
    assert Stream.of(model, [1] * 200, None, 1).sequence_length == 16
    model.config.trained_length = "16"  # as a stock model's file may have it
    with pytest.raises(InputError, match="trained_length: '16' is not a whole number"):
        evaluate_text(model, byte_tokenizer, TEXT)


def test_more_than_the_model_is_made_for_is_refused(make, byte_tokenizer):
    message = (
        r"sequence_length: 129 is more than the 128 tokens that the model is made for "
        r"\(max_position_embeddings\); give at most 128"
    )
    for measure in (
        lambda model: evaluate_text(model, byte_tokenizer, TEXT, sequence_length=129),
        lambda model: Stream.of(model, [1], 129, 1),
    ):
        with pytest.raises(InputError, match=message):
            measure(make(vocab_size=257))


def test_the_model_stays_in_its_mode_and_gets_no_gradient(model, byte_tokenizer):
    model.train()
    evaluate_text(model, byte_tokenizer, "abc")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_reads_a_file_and_prints_a_table(model, byte_level_tokenizer, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    result = evaluate(checkpoint, tmp_path / "text", sequence_length=32, device="cpu")
    assert result == evaluate_text(model, byte_level_tokenizer, TEXT, sequence_length=32)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["loss", "(nats/token)", f"{result.loss:.4f}"]
    assert f"{result.bits_per_byte:.4f}" in lines[2]
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text: .*text is empty; give a file with text in it"),
        (b"abc\xff\xfe", r"text: .*text is not UTF-8 text \(byte 3\); give a text file"),
        (b"abc\0def", "text: .*text is binary: it holds zero bytes"),
        (None, "text: .*text cannot be read: No such file"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, tmp_path / "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length: 0 is out of range"),
        ({"sequence_length": 8, "stride": 9}, "stride: 9 is out of range"),
        ({"stride": 0}, "stride: 0 is out of range"),
        ({"batch_size": 0}, "batch_size: 0 is out of range"),
    ],
)
def test_mistakes_are_named(model, byte_tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        evaluate_text(model, byte_tokenizer, TEXT, **options)


def test_a_foreign_tokenizer_is_noticed(make, byte_tokenizer):
    with pytest.raises(InputError, match="token id 256 is outside the model's vocabulary of 61"):
        evaluate_text(make(), byte_tokenizer, "jazz")
    with pytest.raises(InputError, match="text: it has no tokens"):
        evaluate_text(make(), byte_tokenizer, "")


def test_figures_are_written_where_asked(model, byte_level_tokenizer, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8", newline="")
    file = tmp_path / "out" / "figures.json"
    result = evaluate(checkpoint, tmp_path / "text", device="cpu", output=file)
    figures = json.loads(file.read_text())
    assert (figures["loss"], figures["tokens"]) == (result.loss, result.tokens)
    assert figures["text"] == str(tmp_path / "text")
    for place, said in ((tmp_path / "text" / "x", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(
            InputError, match=rf"output: {place} {said}"
        ):  # before the model is read
            evaluate("nowhere", tmp_path / "text", device="cpu", output=place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text: give either a file, --text FILE, or tasks"),
        ({"text": "a", "tasks": "b"}, "text: give either a file, --text FILE, or tasks"),
        ({"text": "a", "limit": 3}, "limit: it is for --tasks only; leave it out"),
        ({"text": "a", "task_path": "x"}, "task_path: it is for --tasks only; leave it out"),
        ({"tasks": "a", "stride": 3}, "stride: it is for --text only; leave it out"),
    ],
)
def test_a_text_or_tasks(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, **options)


def test_tasks_without_the_harness(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command.main(["evaluate", "--checkpoint", str(tmp_path), "--tasks", "piqa"]) == 2
    expected = "moezoo: error: lm_eval is not installed; run: pip install 'moezoo[eval]'\n"
    assert capsys.readouterr().err == expected
