"""A run on conversations and text, stopped and resumed, and a talk with its model."""

import json
import random

import pytest
import tokenizers
import transformers
from safetensors.torch import load_file

from moezoo.__main__ import main

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist"),
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|eos|>", "<|end|>", "<|user|>", "<|assistant|>"])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
    hf.chat_template = TEMPLATE
    hf.save_pretrained(tmp_path / "words")
    chance = random.Random(0)
    with (tmp_path / "talks.jsonl").open("w") as file:
        for _ in range(30):
            a, b = ("".join(chance.choices("abcd ", k=8)) for _ in range(2))
            talk = [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
            file.write(json.dumps({"messages": talk}) + "\n")
    (tmp_path / "texts").mkdir()
    for i in range(9):
        (tmp_path / "texts" / f"{i}.txt").write_text("the router " * 9 + str(i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SOURCES = '[{"path": "talks.jsonl", "weight": 3, "messages_field": "messages"}, {"path": "texts"}]'


def fit(*options):
    return main(
        [
            "fit",
            *("--model.d_model", "16", "--model.num_layers", "1", "--model.num_heads", "2"),
            *("--data.sources", SOURCES, "--data.source", "null", "--data.tokenizer", "words"),
            *("--data.data_dir", "data", "--data.sequence_length", "24", "--data.batch_size", "4"),
            *("--data.val_fraction", "0.2", "--trainer.val_check_interval", "2"),
            *("--model.schedule.name", "constant", "--sample_tokens", "0"),
            *("--trainer.accelerator", "cpu", "--checkpoint_every", "2"),
            *options,
        ]
    )


def test_a_resumed_run_is_the_uninterrupted_one_and_its_model_answers(folder, capsys):
    assert fit("--output", "whole", "--trainer.max_steps", "4") == 0
    assert fit("--output", "parts", "--trainer.max_steps", "2") == 0
    assert fit("--output", "parts", "--trainer.max_steps", "4", "--ckpt_path", "last") == 0
    whole, parts = (
        load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)
    report = json.loads((folder / "parts" / "report.json").read_text())
    counts = {source["path"]: source["windows"] for source in report["sources"]}
    assert sum(counts.values()) == 16
    assert counts["talks.jsonl"] > counts["texts"] > 0
    capsys.readouterr()
    words = ["generate", "--checkpoint", "parts/model", "--chat", "--max_new_tokens", "5"]
    assert main([*words, "--prompt", "abc"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main([*words, "--prompt", "a<|end|>"]) == 2
    assert "spells the special token '<|end|>'" in capsys.readouterr().err
    assert main([*words[:3], "--system", "x"]) == 2
    assert "system: only conversations have one; add --chat" in capsys.readouterr().err
