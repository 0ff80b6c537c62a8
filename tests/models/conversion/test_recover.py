"""Recovery of a carve: its loss, its resumption, what it leaves alone, and its control."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moezoo.convert import Block
from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion import carved_recovery, distillation, recovery
from moezoo_models.conversion.calibration import read_calibration
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.carved_recovery import pruned_model, summary
from moezoo_models.conversion.carving import save_block
from moezoo_models.conversion.convert import REPORT
from moezoo_models.conversion.distillation import RecoveryOptions, backward_divergence, rate
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.source import open_source

SIZES = {"shared": 2, "active": 2, "experts": 6, "sparsified": False}
OPTIONS = {"recover": 24 * 64, "recovery": RecoveryOptions(lr=2e-3, save_every=5)}


@pytest.fixture
def text(text):
    return text | {"calibration_tokens": 256}


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@torch.no_grad()
def divergence(teacher, student, words):
    """Return the mean of KL(teacher || student) on the tokens that were trained on."""
    p, q = (
        model(input_ids=words.recovery).logits[:, 1:].float().log_softmax(-1)
        for model in (teacher, student)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("tokens", "positions"), [(1, 128), (13, 4), (12, 4), (7, 1), (9, 64)])
def test_the_divergence_and_its_gradient_are_those_of_all_logits_at_once(tokens, positions):
    d_model, vocabulary, seen = 6, 31, []
    hidden = torch.randn(tokens, d_model, requires_grad=True)
    inputs = torch.randn(tokens, d_model, requires_grad=True)
    matrix = torch.randn(d_model, d_model, requires_grad=True)
    one, other = (3 * torch.randn(vocabulary, d_model) for _ in range(2))
    wanted = torch.randn(tokens, d_model)

    def head(weight):
        def logits(states):
            seen.append(len(states))
            return states @ weight.t()

        return logits

    p = (wanted.double() @ other.double().t()).softmax(-1)
    q = ((hidden.double() + inputs.double() @ matrix.double()) @ one.double().t()).softmax(-1)
    expected = (p * (p.log() - q.log())).sum() / tokens
    leaves = (hidden, inputs, matrix)
    gradients = torch.autograd.grad(expected / 3, leaves)
    found = backward_divergence(
        hidden + inputs @ matrix, wanted, head(one), head(other), positions, 1 / 3
    )
    assert found == pytest.approx(expected.item() / 3, rel=1e-5)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6)
    assert max(seen) <= positions
    assert sum(seen) == 2 * tokens


def test_the_rate_rises_and_falls():
    found = [rate(step, 40) for step in range(40)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert all(a > b > 0 for a, b in itertools.pairwise(found[4:]))
    assert rate(0, 1) == 1.0


@pytest.mark.parametrize(("to", "dtype"), [("moezoo", torch.float32), ("glm4_moe", torch.bfloat16)])
def test_recovery_lowers_the_loss_and_trains_blocks_alone(to, dtype, readable, text, tmp_path):
    source, out = readable(dtype=dtype), tmp_path / "out"
    carve(source, tmp_path / "carved", to=to, **SIZES, **text)
    shutil.copytree(tmp_path / "carved", out)  # which is taken as it is
    made = carve(source, out, to=to, **SIZES, **text, **OPTIONS)
    losses = made.extra["recovery"]["losses"]
    assert len(losses) == 24
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("carved", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name: t.dtype for name, t in before.items()} == {n: t.dtype for n, t in after.items()}
    blocks = {name for name in before if ".mlp." in name}
    still = {n for n in blocks if ".mlp.gate." in n or n.endswith((".mlp.u", "correction_bias"))}
    assert changed == blocks - still
    files, others = contents(tmp_path / "carved"), contents(out)
    assert files.keys() == others.keys()
    for name in files.keys() - {"model.safetensors", REPORT}:
        assert files[name] == others[name], name
    assert json.loads(others[REPORT])["extra"]["recovery"]["losses"] == losses
    assert not [p.name for p in tmp_path.iterdir() if "recovery" in p.name]
    figures = made.extra["recovery"]["figures"]["recovered"]
    assert figures["perplexity"] != made.extra["perplexity"]["carved"]
    # What is written is what unmodified code loads, and what was measured.
    model = load_any(out)
    if to == "glm4_moe":
        model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(told.values()), told
    with open_source(source) as dense:
        words = read_calibration(
            [text["calibration"]],
            read_tokenizer(source),
            vocab_size=dense.config.vocab_size,
            tokens=256,
            held_out_tokens=256,
            window=64,
            recovery_tokens=24 * 64,
        )
    teacher = load_any(source)
    assert divergence(teacher, model, words) < 0.95 * divergence(
        teacher, load_any(tmp_path / "carved"), words
    )
    with torch.no_grad():
        nats = [
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:])
            for row in words.held_out
        ]
    near = 1e-4 if dtype == torch.float32 else 2e-2
    assert math.exp(torch.stack(nats).mean()) == pytest.approx(figures["perplexity"], rel=near)


def test_what_was_interrupted_goes_on_with_equal_bits(readable, text, tmp_path, monkeypatch):
    """Between two states; the carved checkpoint stays as it is until the end."""
    source, out, calls, at = readable(), tmp_path / "out", [], 12
    options = {"to": "moezoo", **SIZES, **text}
    carve(source, tmp_path / "carved", **options)
    for name in ("whole", "out"):
        shutil.copytree(tmp_path / "carved", tmp_path / name)
    carve(source, tmp_path / "whole", **options, **OPTIONS)
    original = distillation.backward_divergence

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(distillation, "backward_divergence", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        carve(source, out, **options, **OPTIONS)
    for name, content in contents(tmp_path / "carved").items():
        assert name == REPORT or (out / name).read_bytes() == content
    carve(source, out, **options, **OPTIONS)
    assert len(calls) == at + 24 - (at - 1) // 5 * 5
    weights = (contents(tmp_path / name)["model.safetensors"] for name in ("out", "whole"))
    assert len(set(weights)) == 1


def test_another_run_does_not_go_on_from_a_state(readable, text, tmp_path, monkeypatch):
    source, out = readable(), tmp_path / "out"
    options = {"to": "moezoo", **SIZES, **text}
    carve(source, out, **options)
    shutil.copytree(out, tmp_path / "fresh")
    seen, original = [], distillation.Distillation._save

    def interrupted(self, *arguments):
        original(self, *arguments)
        seen.append(self.file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation.Distillation, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            carve(source, out, **options, **OPTIONS)
    again = OPTIONS | {"recovery": RecoveryOptions(lr=1e-3)}
    found = carve(source, out, **options, **again)
    expected = carve(source, tmp_path / "fresh", **options, **again)
    assert found.extra["recovery"]["losses"] == expected.extra["recovery"]["losses"]


def test_a_damaged_state_is_refused(readable, text, tmp_path, monkeypatch):
    source, out = readable(), tmp_path / "out"
    options = {"to": "moezoo", **SIZES, **text, **OPTIONS}
    original = distillation.Distillation._save

    def spoiled(self, *arguments):
        original(self, *arguments)
        content = bytearray(self.file.read_bytes())
        content[-40] ^= 1
        self.file.write_bytes(content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation.Distillation, "_save", spoiled)
        with pytest.raises(KeyboardInterrupt):
            carve(source, out, **options)
    with pytest.raises(InputError, match=r"recover: .*state\.safetensors is damaged; remove it"):
        carve(source, out, **options)


def test_the_control_does_as_much_work_and_stands_in_the_table(
    readable, text, tmp_path, capsys, monkeypatch
):
    source, models, build = readable(), [], carved_recovery.pruned_model
    monkeypatch.setattr(
        carved_recovery, "pruned_model", lambda *a: models.append(build(*a)) or models[-1]
    )
    made = carve(source, tmp_path / "out", to="moezoo", **SIZES, **text, **OPTIONS, control=True)
    found, width = made.extra, 48
    assert "static_refit" not in found["perplexity"]
    figures = found["recovery"]["figures"]
    assert figures.keys() == {"recovered", "control_recovered"}
    table = capsys.readouterr().out
    assert summary(made) in table
    assert table.count("the same, recovered") == 2
    assert f"{figures['control_recovered']['perplexity']:.4g}" in table
    kept = [layer.mlp.d_ff for layer in models[0].model.blocks()]
    assert abs(sum(kept) / 3 - found["work"] * width) <= 0.5
    assert len({layer for layer, each in enumerate(kept) if each < width}) >= 2


def test_the_pruned_model_computes_its_blocks(readable, tmp_path):
    with open_source(readable("llama_heads")) as source:
        kept, tokens = torch.tensor([3, 5, 40, 1]), torch.randint(1, 90, (1, 9))
        block = Block(**source.block(1))
        save_block(tmp_path, 1, block.take(kept))
        found = pruned_model(source, tmp_path, [1])
        expected = AutoModelForCausalLM.from_pretrained(source.directory)
        mlp = expected.model.layers[1].mlp
        with torch.no_grad():
            others = [i for i in range(48) if i not in kept.tolist()]
            mlp.down_proj.weight[:, others] = 0
            logits = [model(input_ids=tokens).logits for model in (found, expected)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_the_text_of_a_recovery_is_neither_calibration_nor_held_out(byte_level_tokenizer, tmp_path):
    file = tmp_path / "numbers.txt"
    file.write_text("".join(f"<{number:07d}>\n" for number in range(4000)))

    def read(**more):
        return read_calibration(
            [str(file)],
            byte_level_tokenizer,
            vocab_size=300,
            tokens=2000,
            held_out_tokens=1000,
            window=50,
            **more,
        )

    plain, found = read(), read(recovery_tokens=3001)
    for name in ("fitted", "held_out"):
        assert torch.equal(getattr(plain, name), getattr(found, name))
    assert plain.describe() == found.describe()
    assert plain.recovery.shape == (0, 50)
    assert found.recovery.shape == (61, 50)
    numbers = [
        set(byte_level_tokenizer.decode(part.flatten().tolist()).split("\n"))
        for part in (found.fitted, found.held_out, found.recovery)
    ]
    whole = [{line for line in each if len(line) == 9} for each in numbers]
    assert all(len(each) > 50 for each in whole)
    assert not whole[0] & whole[2]
    assert not whole[1] & whole[2]
    with pytest.raises(InputError, match=r"too little text .* lower calibration_tokens, recover"):
        read(recovery_tokens=60_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": True}, "control: nothing is recovered; give recover"),
        ({"recovery": RecoveryOptions(lr=1e-3)}, "recovery: nothing is recovered; give recover"),
        ({"recover": -1}, "recover: -1"),
        ({"recover": 64, "active": 4}, "recover: all parts are active"),
        ({"recover": 64, "recovery": RecoveryOptions(lr=0.0)}, r"recovery\.lr: it is 0"),
        ({"recover": 64, "recovery": RecoveryOptions(windows=0)}, r"recovery\.windows"),
        ({"recover": 64, "recovery": RecoveryOptions(save_every=0)}, r"recovery\.save_every"),
        ({"recover": 64, "control": True, "refit": False}, "control: a pruned model is refitted"),
        ({"recover": 10_000_000}, r"calibration: .* too little text .* lower calibration_tokens"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options, message, readable, text, tmp_path
):
    source = readable()
    with pytest.raises(InputError, match=message) as refused:
        carve(source, tmp_path / "out", **SIZES | text | options)
    assert "\n" not in str(refused.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_too_little_memory_is_refused(readable, text, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "free_memory", lambda: 1000)
    with pytest.raises(
        InputError, match=r"recover: the dense model, the one made of it and Adam need"
    ):
        carve(readable(), tmp_path / "out", **SIZES, **text, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_carve_that_is_there_is_recovered_and_another_refused(readable, text, tmp_path):
    source, out = readable(), tmp_path / "out"
    options = {"to": "moezoo", **SIZES, **text}
    carve(source, out, **options)
    with pytest.raises(InputError, match=r"target: .* is not empty"):
        carve(source, out, **options | {"seed": 1}, **OPTIONS)
    made = carve(source, out, **options, **OPTIONS)
    assert made.extra["recovery"]["tokens"] == 24 * 64
    with pytest.raises(InputError, match=r"target: .* is not empty"):
        carve(source, out, **options, **OPTIONS)
