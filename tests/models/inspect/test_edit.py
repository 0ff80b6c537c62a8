"""Overwriting the rows of a subject: what the model then says, what stays, and what is saved."""

import csv
import json
import string

import pytest
import torch

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.inspect import edit
from moezoo_models.inspect.facts import pairs_of_subjects, question_tokens, read_facts

LAYERS = {
    "stem": ("STEM", {"d_ff": 48}),
    "mole": ("MoLE", {"num_experts": 2, "d_expert": 16, "d_ff": 16}),
    "folded": ("MoLE", {"num_experts": 2, "folded": True}),
    "engram": ("Engram", {"d_ff": 48, "num_heads": 2, "num_rows": 3000}),
}
SUBJECTS = ["ab", "cd", "ef", "ghi"]
WORDINGS = ["to {} is ", "so {}: "]


@pytest.fixture
def build(make, rules, byte_level_tokenizer, tmp_path):
    """Make a model that answers with a letter, and facts that are what it says."""

    def build_model(kind: str):
        name, options = LAYERS[kind]
        rule = rules["rule"]
        ffn = [rule("DenseFFN", d_ff=48), rule(name, [1, 2], vocab_size=257, **options)]
        model = make(
            ffn=ffn, vocab_size=257, max_position_embeddings=64, tie_word_embeddings=False
        ).eval()
        letters = byte_level_tokenizer.encode(string.ascii_letters)
        others = torch.ones(257, dtype=torch.bool).index_fill_(0, torch.tensor(letters), False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.5)  # so that what is said depends on the subject
            model.lm_head.weight[others] = 0.0
        rows = []
        for subject in SUBJECTS:
            for wording in WORDINGS:
                question = wording.format(subject)
                row = {"subject": subject, "question": question}
                rows.append({**row, "answer": says(model, byte_level_tokenizer, question)})
        path = tmp_path / "facts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
        return model, path

    return build_model


def says(model, tokenizer, question: str) -> str:
    return tokenizer.decode([int(logits(model, tokenizer, question).argmax())])


@torch.no_grad()
def logits(model, tokenizer, question: str) -> torch.Tensor:
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(question)]])
    return model(ids, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("kind", LAYERS)
def test_with_all_its_rows_a_subject_is_the_other(kind, build, byte_level_tokenizer):
    model, path = build(kind)
    facts, words = read_facts(path), byte_level_tokenizer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = edit.editable_tables(model, with_embeddings=True)
    assert [name.split(".")[0] for name in tables] == ["layer 1", "layer 2", "embedding"]
    moves = edit._moves(model, words, facts["ab"], facts["cd"], tables)
    wanted = [logits(model, words, wording.format("cd")) for wording in WORDINGS]
    other = [logits(model, words, wording.format("ef")) for wording in WORDINGS]
    kept = edit.overwrite(moves)
    for wording, expected in zip(WORDINGS, wanted, strict=True):
        assert torch.equal(logits(model, words, wording.format("ab")), expected)
        assert torch.equal(logits(model, words, wording.format("cd")), expected)
    for wording, expected in zip(WORDINGS, other, strict=True):
        assert torch.equal(logits(model, words, wording.format("ef")), expected)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert len(changed) == 3
    for (table, rows, _), values in zip(moves, kept, strict=True):
        stays = torch.ones(len(table.weight), dtype=torch.bool).index_fill_(0, rows, False)
        (name,) = (n for n in changed if model.get_parameter(n) is table.weight)
        assert torch.equal(table.weight[stays], before[name][stays])
        assert torch.equal(values, before[name][rows])


def test_edits_are_measured_and_undone(build, byte_level_tokenizer):
    model, path = build("stem")
    facts, words = read_facts(path), byte_level_tokenizer
    pairs = pairs_of_subjects(words, facts, 9)
    assert [subject for subject, _ in pairs] == ["ab", "cd", "ef"]  # "ghi" is longer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = edit.editable_tables(model, with_embeddings=True)
    for found in edit.try_edits(model, words, facts, pairs, tables, unrelated=64):
        assert (found.own_before, found.by_before, found.unrelated_before) == (1, 1, 1)
        assert (found.others_after, found.by_after, found.unrelated_after) == (1, 1, 1)
        assert found.others_before < 1
        assert found.own_after == found.others_before
        assert found.rows == 2 * 3
    one = edit.try_edits(model, words, facts, pairs[:1], edit.editable_tables(model, [2]), 4)
    assert one[0].rows == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_command_saves_an_edited_model_and_leaves_the_checkpoint(
    build, byte_level_tokenizer, tmp_path, capsys
):
    model, path = build("engram")
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    command = ["inspect", "edit", "--checkpoint", str(checkpoint), "--facts", str(path)]
    command += ["--output", str(tmp_path / "new" / "edit"), "--device", "cpu"]
    assert main([*command, "--with_embeddings", "true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{checkpoint}: rows of 3 subjects overwritten by those of others"
    (moved,) = (line for line in lines if line.startswith("of the subject, the other's answer"))
    assert moved.split()[-1] == "100.0%"
    report = json.loads((tmp_path / "new" / "edit" / "edit.json").read_text())
    assert report["means"]["others_after"] == report["means"]["unrelated_before"] == 1
    with (tmp_path / "new" / "edit" / "edit.csv").open() as file:
        assert [row["subject"] for row in csv.DictReader(file)] == ["ab", "cd", "ef"]

    saving = ["--subject", "cd", "--by", "ab", "--layers", "[1]", "--save_to", str(tmp_path / "e")]
    assert main([*command, *saving]) == 0
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == files
    edited = load_checkpoint(tmp_path / "e")[0].state_dict()
    old = model.state_dict()
    assert [name for name in old if not torch.equal(old[name], edited[name])] == [
        "model.layers.1.mlp.table.weight"
    ]


def test_mistakes_are_one_line(build, byte_level_tokenizer, tmp_path, capsys):
    model, path = build("stem")
    checkpoint = save_checkpoint(tmp_path / "c", model, byte_level_tokenizer)

    def fail(*more: str, facts: str | None = None) -> str:
        if facts is not None:
            (tmp_path / "bad").write_text(facts)
        source = path if facts is None else tmp_path / "bad"
        words = ["--checkpoint", str(checkpoint), "--facts", str(source), *more]
        assert main(["inspect", "edit", *words, "--output", str(tmp_path / "o")]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == ""
        return line

    assert "by: subject and by name the two of one edit" in fail("--subject", "ab")
    assert "save_to: one edit is saved; name it" in fail("--save_to", str(tmp_path / "e"))
    pair = ["--subject", "ab", "--by"]
    assert "by: the facts do not ask for 'zz'" in fail(*pair, "zz")
    assert "another number of tokens; name another" in fail(*pair, "ghi")
    assert "is the checkpoint; give another" in fail(*pair, "cd", "--save_to", str(checkpoint))
    assert "layers: 7 is out of range" in fail("--layers", "[7]")
    assert "no table of token rows in these layers, only DenseFFN, STEM" in fail("--layers", "[0]")
    row = {"subject": "ab", "question": "to ab is", "answer": " x"}
    assert "line 2 asks for 'ab' as an earlier one does" in fail(
        facts=f"{json.dumps(row)}\n{json.dumps(row)}\n"
    )
    assert "no two subjects are asked in the same words" in fail(facts=json.dumps(row))
    assert "holds its subject once" in fail(facts=json.dumps({**row, "subject": "z"}))
    assert "has no 'answer'" in fail(facts='{"subject": "a", "question": "a"}')
    assert "is not JSON" in fail(facts="nothing")
    assert "bad holds none" in fail(facts="\n")
    (tmp_path / "bad").unlink()
    assert "bad cannot be read: No such file" in fail("--facts", str(tmp_path / "bad"))
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "e").exists()


def test_models_without_token_rows_are_refused(make, rules):
    with pytest.raises(InputError, match="no table of token rows in these layers, only SparseMoE"):
        edit.editable_tables(make(ffn=rules["moe"]))


def test_questions_begin_behind_the_end_of_a_document(build, byte_level_tokenizer):
    _, path = build("stem")
    question = read_facts(path)["ab"]["so {}: "]
    ids = question_tokens(byte_level_tokenizer, question)
    assert ids == [byte_level_tokenizer.eos_id, *byte_level_tokenizer.encode("so ab: ")]
