"""In which dtype checkpoints of 16 bits are run on CPUs that are slow in it, and that are not."""

import pytest
import torch
import transformers

from moezoo import InputError, dtype_speed
from moezoo_models.checkpoints import dtypes
from moezoo_models.checkpoints.directory import load_checkpoint, quiet, save_checkpoint
from moezoo_models.checkpoints.stock import load_any_with_tokenizer, load_as_it_is
from moezoo_models.conversion.drift import load_any
from moezoo_models.evaluation.evaluate import evaluate
from moezoo_models.files.checksums import seal
from moezoo_models.generate import generate
from moezoo_models.inspect.usage import inspect_usage

HALF = [torch.bfloat16, torch.float16]
SLOW, FAST = 8.0, 150.0


def set_speed(monkeypatch, dtype, gflops):
    products = {torch.float32: 100.0, torch.bfloat16: 100.0, torch.float16: 100.0, dtype: gflops}
    figures = dtype_speed.Speeds(products)
    monkeypatch.setattr(dtype_speed, "speeds", lambda: figures)


@pytest.fixture(params=["ours", "stock"])
def save(request, make, rules, byte_level_tokenizer, tmp_path):
    """Return a function that saves a model in a dtype: one of ours, or a stock Mixtral."""

    def saved(dtype):
        place = tmp_path / "model"
        if request.param == "ours":
            model = make(ffn=rules["mixed"], vocab_size=257, max_position_embeddings=64)
            return save_checkpoint(place, model.to(dtype), byte_level_tokenizer)
        config = transformers.MixtralConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            max_position_embeddings=64,
        )
        with quiet():
            transformers.MixtralForCausalLM(config).to(dtype).save_pretrained(place)
        byte_level_tokenizer.save(place)
        seal(place / "model.safetensors")
        return place

    return saved


def floats(model):
    return {p.dtype for p in model.parameters()}


@pytest.mark.parametrize("saved", HALF)
def test_slow_dtypes_are_loaded_in_fp32_exactly(save, saved, monkeypatch, capsys):
    place = save(saved)
    set_speed(monkeypatch, saved, SLOW)
    model, _ = load_any_with_tokenizer(place, dtype="auto")
    name = str(saved).removeprefix("torch.")
    assert capsys.readouterr().err == (
        f"dtype: products in {name} take about 12× as long as in float32 on this CPU, "
        f"so the weights are loaded in float32; --dtype {name} keeps them\n"
    )
    assert floats(model) == {torch.float32}
    as_saved, _ = load_as_it_is(place)
    assert saved in floats(as_saved)
    assert capsys.readouterr().err == ""
    expected = as_saved.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key


@pytest.mark.parametrize("saved", HALF)
def test_quick_dtypes_stay_without_a_word(save, saved, monkeypatch, capsys):
    place = save(saved)
    set_speed(monkeypatch, saved, FAST)
    model, _ = load_any_with_tokenizer(place, dtype="auto")
    assert saved in floats(model)
    assert capsys.readouterr().err == ""


def test_what_is_asked_for_is_taken_and_its_cost_is_said(save, monkeypatch, capsys):
    place = save(torch.float32)
    set_speed(monkeypatch, torch.bfloat16, SLOW)
    model, _ = load_any_with_tokenizer(place, dtype="bfloat16")
    assert torch.bfloat16 in floats(model)
    assert capsys.readouterr().err == (
        "dtype: products in bfloat16 take about 12× as long as in float32 on this CPU\n"
    )
    for quick in ("float16", "float32", "auto"):
        model, _ = load_any_with_tokenizer(place, dtype=quick)
        assert getattr(torch, quick, torch.float32) in floats(model)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="dtype: 'bfloat15' is not known; did you mean 'bfloat16'"):
        load_any_with_tokenizer(place, dtype="bfloat15")


def test_what_does_not_fit_in_fp32_stays(save, monkeypatch, capsys):
    place = save(torch.bfloat16)
    set_speed(monkeypatch, torch.bfloat16, SLOW)
    numbers = sum(p.numel() for p in load_as_it_is(place)[0].parameters())
    monkeypatch.setattr(dtypes, "free_memory", lambda: 2 * numbers)
    model, _ = load_any_with_tokenizer(place, dtype="auto")
    assert torch.bfloat16 in floats(model)
    line = capsys.readouterr().err
    assert line.endswith("GB of float32 weights do not fit into memory\n")
    assert line.count("\n") == 1


def test_other_devices_are_not_measured(save, monkeypatch):
    place = save(torch.bfloat16)
    monkeypatch.setattr(dtype_speed, "speeds", lambda: pytest.fail("measured"))
    model, _ = load_any_with_tokenizer(place, device="meta", dtype="auto")
    assert torch.bfloat16 in floats(model)


def test_commands_decide_alike(save, monkeypatch, tmp_path, capsys):
    place = save(torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text("one text of some length, which is read by the model " * 4)
    set_speed(monkeypatch, torch.bfloat16, SLOW)
    for module, command, options in [
        ("generate", generate, {"prompt": "a", "max_new_tokens": 2, "stream": False}),
        ("evaluation.evaluate", evaluate, {"text": text}),
    ]:
        loaded = []

        def load(*arguments, loaded=loaded):
            loaded.append(load_any_with_tokenizer(*arguments))
            return loaded[-1]

        monkeypatch.setattr(f"moezoo_models.{module}.load_any_with_tokenizer", load)
        for more, dtype in [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)]:
            command(place, device="cpu", **options, **more)
            assert loaded[-1][0].lm_head.weight.dtype == dtype
            assert capsys.readouterr().err.count("dtype: products in bfloat16") == 1
    assert floats(load_any(place)) == {torch.float32}  # what a conversion is measured with


def test_inspect_decides_alike(make, rules, byte_level_tokenizer, monkeypatch, tmp_path, capsys):
    sparse = rules["rule"]("SparseMoE", num_experts=4)
    model = make(ffn=[sparse], vocab_size=257, max_position_embeddings=64)
    place = save_checkpoint(tmp_path / "model", model.bfloat16(), byte_level_tokenizer)
    (tmp_path / "text.txt").write_text("some text " * 20)
    set_speed(monkeypatch, torch.bfloat16, SLOW)
    for dtype, end in [("auto", "--dtype bfloat16 keeps them\n"), ("bfloat16", "on this CPU\n")]:
        inspect_usage(place, tmp_path / "text.txt", tmp_path / "usage", device="cpu", dtype=dtype)
        error = capsys.readouterr().err
        assert error.startswith("dtype: products in bfloat16 take about 12× as long")
        assert error.endswith(end)
    assert load_checkpoint(place)[0].dtype == torch.bfloat16
