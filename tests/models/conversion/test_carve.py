"""Carved checkpoints: what is written computes what was planned, in unmodified transformers too."""

import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

from moezoo import InputError
from moezoo.__main__ import main
from moezoo_models.conversion import carving
from moezoo_models.conversion.carve import CMoEOptions, calibrate, carve
from moezoo_models.conversion.carving import model_nats
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.plans import writable
from moezoo_models.conversion.source import open_source

NATIVE = ("llama", "llama_heads", "mistral", "qwen2", "qwen3")
OURS = ("llama_bias", "mistral_window", "qwen2_window")
SMALL = {"shared": 1, "active": 2, "experts": 6, "accept_loss": True, "sparsified": False}


def logits(directory, dtype=torch.float32):
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load_any(directory).to(dtype)(input_ids=tokens, use_cache=False).logits.float()


def tensors(directory):
    return load_file(directory / "model.safetensors")


def perplexity(model, text):
    return math.exp(model_nats(model, text).mean())


def weights(directory):
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "to"),
    [(f, "glm4_moe") for f in NATIVE] + [(f, "moezoo") for f in (*NATIVE, *OURS)],
)
def test_with_all_parts_active_nothing_changes(family, to, readable, text, tmp_path):
    source = readable(family)
    options = {"shared": 2, "active": 4, "experts": 6, "split": "random", "refit": False}
    done = carve(source, tmp_path / "out", **options, to=to, **text)
    assert done.exact
    expected = logits(source)
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=2 * atol)


def test_every_neuron_is_in_one_part(readable, text, tmp_path):
    source = readable()
    carve(source, tmp_path / "out", **SMALL, refit=False, **text)
    old, new = tensors(source), tensors(tmp_path / "out")
    for layer in range(3):
        start = f"model.layers.{layer}.mlp"
        parts = ["shared_experts", *(f"experts.{e}" for e in range(5))]
        for each, axis in (("gate", 0), ("up", 0), ("down", 1)):
            pieces = [new[f"{start}.{part}.{each}_proj.weight"] for part in parts]
            assert {piece.shape[axis] for piece in pieces} == {8}
            dense = old[f"{start}.{each}_proj.weight"].movedim(axis, 0)
            carved = torch.cat(pieces, axis).movedim(axis, 0)
            # As multisets of neurons; the same order in all three projections is checked above.
            assert sorted(map(tuple, carved.tolist())) == sorted(map(tuple, dense.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NATIVE)
def test_stock_transformers_and_our_layer_agree(family, dtype, readable, text, tmp_path):
    # Ours counts every chosen expert fully, as planned; theirs nearly so, by a small factor on
    # the logits. Where two logits are nearly equal they may choose differently.
    source = readable(family, dtype)
    for to in ("glm4_moe", "moezoo"):
        carve(source, tmp_path / to, **SMALL, to=to, router="ridge", budgets="equal", **text)
    if dtype == torch.float32:
        ours, stock = logits(tmp_path / "moezoo"), logits(tmp_path / "glm4_moe")
        off = (stock - ours).abs().amax(-1) / ours.abs().max()
        assert off.median() < 5e-3
    report = json.loads((tmp_path / "glm4_moe" / "moezoo_conversion.json").read_text())
    found = report["extra"]["perplexity"]
    assert found["loaded"] == pytest.approx(found["carved"], rel=2e-2)
    assert found["carved"] != pytest.approx(found["dense"], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "cmoe", "router": "cmoe", "refit": False},
        {
            "split": "cmoe",
            "router": "cmoe",
            "cmoe": CMoEOptions(profile="raw", signed=True),
            "refit": False,
        },
        {"bias": True},
        {"shared": 0, "active": 3, "output_scale": 2.0},
        {"layers": [1]},
        {"budgets": "equal", "router_ridge": 0.1, "refit_ridge": 0.3, "follow": False},
    ],
)
def test_our_format_computes_what_was_planned(options, readable, text, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        source = readable(dtype=dtype)
        options = {**SMALL, "to": "moezoo", **options}
        done = carve(source, tmp_path / "out", force=True, **options, **text)
        found = done.extra["perplexity"]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert found["loaded"] == pytest.approx(found["carved"], rel=tolerance)


def test_formats_are_chosen_by_what_they_can_hold(readable, text, tmp_path):
    quick = {**SMALL, "check": "layers", **text}
    for number, (family, options, expected) in enumerate(
        [
            ("llama", {}, "glm4_moe"),
            ("mistral_window", {}, "moezoo"),
            ("llama", {"router": "cmoe"}, "moezoo"),
            ("llama", {"bias": True}, "moezoo"),
            ("llama", {"layers": [1, 2]}, "glm4_moe"),
            ("llama", {"router": "ridge_shared"}, "moezoo"),
            ("llama", {"budgets": "measured"}, "moezoo"),
        ]
    ):
        done = carve(readable(family), tmp_path / str(number), **quick, **options)
        assert done.target["architecture"] == expected


def test_flatness_leaves_choices_and_makes_weights_nearly_equal():
    from moezoo.convert import carve_block

    torch.manual_seed(0)
    x = torch.randn(500, 16)
    gate, up, down = torch.randn(48, 16), torch.randn(48, 16), torch.randn(16, 48)
    from moezoo.convert import CarveOptions

    plan = carve_block(x, gate, up, down, CarveOptions(1, 2, 6)).plan
    flat = writable(plan, x, torch.float32, flat=True)
    assert torch.equal(flat.weights(x), plan.weights(x))
    assert math.log2(flat.flatness) == int(math.log2(flat.flatness))
    scores = torch.sigmoid(flat.flatness * (x @ flat.router.t()))
    chosen = flat.weights(x).bool()
    sigmoids = (scores * chosen) / (scores * chosen).sum(1, keepdim=True) * 2
    assert 1e-4 < (sigmoids[chosen] - 1).abs().max() < 5e-3
    # In a small dtype the plan is what the file will hold.
    small = writable(plan, x, torch.bfloat16, flat=True)
    written = (small.router * small.flatness).to(torch.bfloat16)
    assert torch.equal(written.float() / small.flatness, small.router)


def test_the_report_holds_what_was_measured(readable, text, tmp_path, capsys):
    source = readable()
    done = carve(source, tmp_path / "out", **SMALL, seed=3, **text)
    report = json.loads((tmp_path / "out" / "moezoo_conversion.json").read_text())
    assert report["method"] == "carve"
    assert not report["exact"]
    assert report["options"]["seed"] == 3
    extra = report["extra"]
    assert extra["calibration"]["tokens"] == 768
    assert extra["calibration"]["held_out_tokens"] == 256
    assert set(extra["perplexity"]) == {"dense", "static", "static_refit", "carved", "loaded"}
    assert set(extra["layers"]) == {"0", "1", "2"}
    for figures in extra["layers"].values():
        assert figures["overlap"] > figures["chance_overlap"]
    assert extra["plan"]["num_experts"] == 5
    with open_source(source) as dense:
        words = calibrate(
            dense, text["calibration"], text["calibration_tokens"], 256, text["window"], 3
        )
    for name, directory in (("dense", source), ("loaded", tmp_path / "out")):
        expected = perplexity(load_any(directory), words)
        assert extra["perplexity"][name] == pytest.approx(expected, rel=1e-5)
    printed = capsys.readouterr().out
    assert f"carved, as loaded{done.extra['perplexity']['loaded']:>21.4g}" in printed
    lost = not extra["beats"]["static_refit"]
    assert ("does not beat static pruning" in printed) == lost


def test_with_all_parts_active_nothing_is_advised(readable, text, tmp_path, capsys):
    """It is the dense model, and there are no neurons to prune."""
    done = carve(readable(), tmp_path / "out", **{**SMALL, **text, "active": 5})
    assert done.extra["beats"] == {}
    assert "prune" not in capsys.readouterr().out.replace("pruned to as many neurons", "")


def test_the_same_command_writes_the_same_bytes(readable, text, tmp_path):
    source = readable()
    one = carve(source, tmp_path / "one", **SMALL, **text)
    torch.manual_seed(123)
    carve(source, tmp_path / "two", **SMALL, **text)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert len(one.target["sha256"]) == 1
    other = carve(source, tmp_path / "three", **SMALL, seed=1, **text)
    assert other.target["sha256"] != one.target["sha256"]


def test_an_interrupted_run_goes_on_to_the_same_bytes(readable, text, tmp_path, monkeypatch):
    source, original, calls = readable(), carving.carve_layer, []

    def interrupted(layer, *arguments):
        calls.append(layer)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return original(layer, *arguments)

    options = {**SMALL, **text, "max_shard_size": "60KB"}
    carve(source, tmp_path / "whole", **options)
    monkeypatch.setattr(carving, "carve_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carve(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    carve(source, tmp_path / "out", **options)
    assert calls == [0, 1, 1, 2]
    assert len(weights(tmp_path / "out")) > 1
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    report = (tmp_path / "out" / "moezoo_conversion.json").read_text()
    assert json.loads(report)["extra"]["perplexity"]["carved"] > 1
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


def test_when_only_writing_is_left_nothing_is_carved_again(readable, text, tmp_path, monkeypatch):
    from moezoo_models.conversion import writer

    source, original = readable(), writer.write_safetensors
    options = {**SMALL, **text, "max_shard_size": "60KB"}

    def interrupted(path, *arguments):
        if "00003" in path.name:
            raise KeyboardInterrupt
        return original(path, *arguments)

    monkeypatch.setattr(writer, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carve(source, tmp_path / "out", **options)
    first = tmp_path / ".out.partial"
    kept = {p.name: p.stat().st_mtime_ns for p in first.glob("model-*")}
    assert len(kept) == 2
    monkeypatch.setattr(writer, "write_safetensors", original)
    monkeypatch.setattr(carving, "carve_layer", None)
    carve(source, tmp_path / "out", **options)
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in kept} == kept


KILLED = """
import os, sys
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion import carving
from moezoo_models.conversion.carve import carve
original = carving.carve_layer
def killed(layer, *arguments):
    if layer == 2:
        os.kill(os.getpid(), 9)
    return original(layer, *arguments)
carving.carve_layer = killed
carve(sys.argv[1], sys.argv[2], 1, 2, 6, sys.argv[3], 768, 256, 64, accept_loss=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(server, readable, text, tmp_path):
    source = readable()
    # A process of its own for the whole run too: the same number of threads.
    runs = [(KILLED.replace("== 2", "== 9"), "whole", 0), (KILLED, "out", -signal.SIGKILL)]
    runs.append((runs[0][0], "out", 0))
    for code, name, expected in runs:
        words = (source, tmp_path / name, text["calibration"])
        ended = server.run(*words, folder=tmp_path, code=code)
        assert ended.code == expected, ended.output
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 7}, "experts: 7 does not divide the block's 48 neurons; choose 6 or 8"),
        ({"shared": 4, "active": 5}, "active: 5 is out of range"),
        ({"shared": 8}, "shared: 8 is out of range"),
        ({"split": "kmeans"}, "split: 'kmeans' is not known"),
        ({"router": "cmoe", "to": "glm4_moe"}, "router: cmoe has no place in glm4_moe; choose"),
        ({"bias": True, "to": "glm4_moe"}, "bias: an output bias has no place in glm4_moe"),
        ({"bias": True, "refit": False}, "bias: comes from the refit"),
        ({"to": "mixtral"}, "to: 'mixtral' is not known"),
        ({"layers": 9}, "layers:"),
        ({"layers": []}, r"layers: \[\] selects none of 3 layers; give all, every 2, or numbers"),
        ({"calibration_tokens": 32}, "calibration_tokens: 32 is out of range; give .* ≥ 33"),
        ({"calibration_tokens": 10**13}, r"calibration_tokens: .* of memory, and [\d.]+ [MG]B are"),
        ({"calibration_tokens": 10**6}, "calibration: .* has too little text"),
        ({"calibration": "nowhere.txt"}, "calibration: 'nowhere.txt' does not exist"),
        ({"window": 300}, "window: 300 is out of range"),
        ({"active": 2, "shared": 2}, "active: a token would use 4 of 8 parts; .* --accept_loss"),
        ({"router": "ridge_shared", "to": "glm4_moe"}, "router: ridge_shared has no place in glm4"),
        ({"router": "ridge_shared", "shared": 0}, "router: ridge_shared reads shared neurons"),
        ({"budgets": "measured", "to": "glm4_moe"}, "budgets: glm4_moe has as many active experts"),
        ({"budgets": "free"}, "budgets: 'free' is not known"),
        ({"refit_ridge": -1.0}, "refit_ridge: -1 is out of range"),
        ({"router_ridge": -1.0}, "router_ridge: -1 is out of range"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
        ({"seed": -1}, "seed: -1 is out of range"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(options, message, readable, text, tmp_path):
    source = readable()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as refusal:
        carve(source, tmp_path / "out", **{**text, "experts": 8, **options})
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before


def test_sources_that_can_not_be_carved_are_refused(dense, readable, text, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer: .* holds none, and calibration reads text"):
        carve(dense(), tmp_path / "out", experts=8, **text)
    with pytest.raises(InputError, match=r"hold the attention of a olmo2; choose --to moezoo$"):
        carve(readable("olmo2"), tmp_path / "out", experts=8, to="glm4_moe", **text)
    with pytest.raises(InputError, match="attends to all positions; choose --to moezoo"):
        carve(readable("mistral_window"), tmp_path / "out", experts=8, to="glm4_moe", **text)
    source = readable("qwen3")
    broken = tensors(source)
    broken["model.layers.2.mlp.up_proj.weight"][3, 4] = math.nan
    from safetensors.torch import save_file

    save_file(broken, source / "model.safetensors")
    with pytest.raises(InputError, match="holds NaN or infinity; the weights are damaged"):
        carve(source, tmp_path / "out", experts=8, **text)
    assert not list(tmp_path.glob("*out*"))


def test_the_command_line_says_mistakes_in_one_line(readable, text, tmp_path, capsys):
    arguments = ["carve", str(readable()), str(tmp_path / "out"), "--experts", "7", "--no-refit"]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("moezoo: error: experts: 7 does not divide")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--profile=raw", "cmoe.profile"),
        ("--distance=l2", "cmoe.distance"),
        ("--representative=most_active", "cmoe.representative"),
        ("--signed", "cmoe.signed"),
        ("--no-signed", "cmoe.signed"),
    ],
)
def test_options_of_cmoe_are_named_where_they_were_before(old, new, tmp_path, capsys):
    assert main(["carve", str(tmp_path), str(tmp_path / "out"), old]) == 2
    name = old.partition("=")[0].removeprefix("--")
    expected = f"moezoo: error: {name}: no such option; did you mean '{new}'?\n"
    assert capsys.readouterr().err == expected


def test_options_of_cmoe_are_read_from_the_command_line(readable, text, tmp_path):
    arguments = ["carve", str(readable()), str(tmp_path / "out"), "--experts", "6"]
    for name, value in text.items():
        arguments += [f"--{name}", str(value)]
    arguments += ["--split", "cmoe", "--router", "cmoe", "--no-refit", "--check", "layers"]
    arguments += ["--cmoe.signed", "--cmoe.distance", "l2", "--cmoe.profile", "raw"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "moezoo_conversion.json").read_text())
    found = {name: report["options"][name] for name in ("signed", "distance", "profile")}
    assert found == {"signed": True, "distance": "l2", "profile": "raw"}
