"""Tasks of lm-evaluation-harness from a folder, on a checkpoint, from the command line to JSON."""

import json
import socket

import pytest
import torch
import yaml

from moezoo import __main__ as command
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.evaluation.perplexity import evaluate_text

REASON = "lm-eval is not installed (pip install 'moezoo[eval]')"
pytest.importorskip("lm_eval", reason=REASON)

DOCUMENTS = [
    {"question": "The sky is", "colors": ["blue", "green", "red"], "answer": 0},
    {"question": "Grass is", "colors": ["blue", "green", "red"], "answer": 1},
    {"question": "Blood is", "colors": ["blue", "green", "red"], "answer": 2},
    {"question": "Snow is", "colors": ["black", "white"], "answer": 1},
    {"question": "Coal is", "colors": ["black", "white"], "answer": 0},
]
TEXT = "Roses are red,\nviolets are blue.\n"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path):
    """Write three tasks that read files beside them."""
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "colors.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    (place / "poem.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")

    def write(name, file, **fields):
        data = {"data_files": {"test": str(place / file)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, **fields}
        (place / f"{name}.yaml").write_text(yaml.safe_dump({**task, "test_split": "test"}))

    write(
        "colors",
        "colors.jsonl",
        output_type="multiple_choice",
        fewshot_split="test",
        doc_to_text="{{question}}",
        doc_to_choice="{{colors}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    write(
        "poem",
        "poem.jsonl",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    write(
        "spoken",
        "colors.jsonl",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{colors[answer]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return place


@pytest.fixture
def checkpoint(make, rules, byte_level_tokenizer, tmp_path):
    model = make(ffn=rules["moe"], vocab_size=257)
    return save_checkpoint(tmp_path / "checkpoint", model, byte_level_tokenizer)


def accuracy(model, tokenizer, documents):
    """Take the likeliest answer, its bytes' log probabilities summed one by one."""
    right = 0
    for document in documents:
        context = tokenizer.encode(document["question"])
        scores = []
        for color in document["colors"]:
            answer = tokenizer.encode(f" {color}")
            ids = torch.tensor([context + answer])
            with torch.no_grad():
                logs = model(ids).logits[0].double().log_softmax(-1)
            places = range(len(context) - 1, len(context) + len(answer) - 1)
            scores.append(sum(logs[p, ids[0, p + 1]].item() for p in places))
        right += scores.index(max(scores)) == document["answer"]
    return right / len(documents)


@pytest.mark.slow
def test_from_the_command_line_to_json(
    make, rules, byte_level_tokenizer, folder, checkpoint, tmp_path, capsys
):
    options = ["--checkpoint", str(checkpoint), "--task_path", str(folder), "--device", "cpu"]
    file = tmp_path / "out" / "figures.json"
    options += ["--tasks", "colors,poem,spoken", "--output", str(file), "--batch_size", "4"]
    assert command.main(["evaluate", *options]) == 0
    report = json.loads(file.read_text())
    model = make(ffn=rules["moe"], vocab_size=257).eval()
    results = report["results"]
    assert results["colors"]["acc,none"] == accuracy(model, byte_level_tokenizer, DOCUMENTS)
    alone = evaluate_text(model, byte_level_tokenizer, TEXT, stride=128)
    measured = results["poem"]["bits_per_byte,none"]
    assert measured == pytest.approx(alone.bits_per_byte, rel=1e-5)
    assert results["spoken"]["exact_match,none"] == 0.0
    assert report["checkpoint"] == str(checkpoint)
    assert (report["limit"], report["batch_size"], report["sequence_length"]) == (None, 4, 128)
    assert report["n-samples"]["colors"] == {"original": 5, "effective": 5}
    output = capsys.readouterr().out
    for name in ("colors", "poem", "spoken"):
        assert f"|{name}" in output
    assert f"{measured:.4f}" in output
    assert f"written to {file}" in output


def test_limit_and_examples(make, rules, byte_level_tokenizer, folder, checkpoint, tmp_path):
    answered = evaluate(
        checkpoint,
        tasks="colors",
        task_path=folder,
        limit=2,
        num_fewshot=1,
        output=tmp_path / "figures.json",
        device="cpu",
    )
    assert answered.report["n-samples"]["colors"] == {"original": 5, "effective": 2}
    assert answered.report["n-shot"]["colors"] == 1
    assert answered.results["colors"]["acc,none"] in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "color"], "tasks: there is no 'color' in "),
        (["--tasks", ","], "tasks: none is named; give --tasks NAME,NAME"),
        (["--tasks", "colors", "--limit", "0"], "limit: 0 is out of range"),
        (["--tasks", "colors", "--num_fewshot", "-1"], "num_fewshot: -1 is out of range"),
        (["--tasks", "colors", "--task_path", "nowhere"], "task_path: nowhere is no directory"),
        (["--tasks", "colors", "--checkpoint", "nowhere"], "checkpoint: nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(options, message, folder, checkpoint, capsys, monkeypatch):
    # The harness's own index takes long to read.
    from lm_eval.tasks import TaskManager

    def own_tasks_only(*arguments, include_defaults=True, **others):
        return TaskManager(*arguments, include_defaults=False, **others)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_tasks_only)
    given = ["--checkpoint", str(checkpoint), "--task_path", str(folder), *options]
    assert command.main(["evaluate", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moezoo: error: {message}")
