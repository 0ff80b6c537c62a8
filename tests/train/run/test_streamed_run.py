"""A run on streamed text, begun and gone on with by one and the same command."""

import json

import pytest
import tokenizers
import transformers

from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_train.measure.loggers import read_metrics
from moezoo_train.run.cli import run


@pytest.fixture
def folder(tmp_path):
    """Return a folder with rows of text, and a tokenizer of bytes."""
    vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "words")
    rows = [json.dumps({"text": f"{n} the cat sat on mat {n * 7919 % 1000}"}) for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    return tmp_path


def fit(folder, output, steps):
    options = {
        "ckpt_path": "auto",
        "output": folder / output,
        "loggers": "[csv]",
        "sample_tokens": 4,
        "trainer.max_steps": steps,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "data.stream": "true",
        "data.source": folder / "a.jsonl",
        "data.tokenizer": folder / "words",
        "data.stream_readers": 4,
        "data.val_fraction": 0.1,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "model.d_model": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.schedule.name": "constant",
        "model.schedule.warmup_steps": 2,
    }
    run(["fit", *(f"--{name}={value}" for name, value in options.items())])


def test_a_run_that_goes_on_is_the_uninterrupted_one(folder, capsys):
    fit(folder, "whole", 7)
    assert "starting at step 0" in capsys.readouterr().err
    fit(folder, "parts", 3)
    fit(folder, "parts", 7)
    assert f"going on from {folder / 'parts' / 'checkpoints' / 'last.ckpt'}" in (
        capsys.readouterr().err
    )
    losses = [
        [(row["step"], row["train/loss"]) for row in read_metrics(folder / name / "metrics.csv")
         if "train/loss" in row]
        for name in ("whole", "parts")
    ]  # fmt: skip
    assert len(losses[0]) == 7
    assert losses[0] == losses[1]
    reports = [json.loads((folder / n / "report.json").read_text()) for n in ("whole", "parts")]
    assert reports[0]["val_loss"] == reports[1]["val_loss"] > 0
    assert not (folder / "runs").exists()
    # Documents stood behind the token that begins them, though the tokenizer puts none there.
    assert read_tokenizer(folder / "words").opening == []
    assert read_tokenizer(folder / "parts" / "model").opening == [256]
