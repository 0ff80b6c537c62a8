"""`moezoo adopt`: the report on a directory, and what it refuses."""

from __future__ import annotations

import json

import pytest

from moezoo.__main__ import main
from moezoo_models.adopt.report import in_short, report_adoption

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}


def saved(kind: str, folder, **changes):
    """Save a configuration, as a directory without weights."""
    getattr(transformers, f"{kind}Config")(**(SIZES | changes)).save_pretrained(folder)
    return folder


def test_the_report_has_a_row_for_each_kind_of_block(tmp_path, capsys):
    moe = {"num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    folder = saved("Qwen3Moe", tmp_path, mlp_only_layers=[1], norm_topk_prob=True, **moe)
    assert main(["adopt", str(folder), "--report", "--device", "cpu", "--tokens", "16"]) == 0
    shown = capsys.readouterr().out
    assert "layers.0+2-3.mlp" in shown
    assert "softmax over all experts" in shown
    assert "8 experts of 32, top 2, silu" in shown
    (row,) = report_adoption(folder, device="cpu", tokens=16)
    assert row.names == ["layers.0.mlp", "layers.2.mlp", "layers.3.mlp"]
    assert 0 <= row.difference.output <= 1e-6
    assert 0 < row.difference.gradient <= 1e-5
    assert min(row.seconds) > 0
    assert row.width is None


def test_blocks_with_other_options_have_rows_of_their_own(tmp_path):
    saved("HunYuanMoEV1", tmp_path, head_dim=16, num_experts=8, moe_topk=[2, 2, 4, 4])
    rows = report_adoption(tmp_path, device="cpu", tokens=16)
    assert [in_short(row.names) for row in rows] == ["layers.0-1.mlp", "layers.2-3.mlp"]
    assert ["top 2" in row.options for row in rows] == [True, False]
    assert ["top 4" in row.options for row in rows] == [False, True]


def test_large_blocks_are_timed_with_fewer_neurons(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moezoo_models.adopt.report._WEIGHTS", 1)
    saved("Mixtral", tmp_path)
    (row,) = report_adoption(tmp_path, device="cpu", tokens=16)
    assert row.width == 16
    assert "(timed with 16 hidden neurons)" in capsys.readouterr().out
    assert "8 experts of 48" in row.options


@pytest.mark.parametrize(
    ("kind", "arguments", "line"),
    [
        ("Llama", [], "model: LlamaModel has no mixture block of transformers"),
        ("Mixtral", ["--tokens", "0"], "tokens: "),
        ("Mixtral", ["--dtype", "int8"], "dtype: 'int8'"),
        ("Mixtral", ["--device", "nowhere"], "device: 'nowhere'"),
        ("Mixtral", ["--no-report"], "report: it is all that this command does"),
    ],
)
def test_mistakes_are_one_line(kind, arguments, line, tmp_path, capsys):
    assert main(["adopt", str(saved(kind, tmp_path)), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"moezoo: error: {line}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (None, "config.json"),
        ({"model_type": "mixtrall"}, "did you mean 'mixtral'"),
        ({"model_type": "mixtral", "hidden_size": "wide"}, "hidden_size"),
        ([], "config.json"),
    ],
)
def test_directories_that_are_no_models(config, line, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["adopt", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def saved_omni(folder, **changes):
    """Save the configuration of a model of several parts, which has no base model."""
    sizes = SIZES | {"num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    thinker = {"text_config": {**sizes, "head_dim": 16}, "vision_config": {"depth": 1}}
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config={**thinker, "audio_config": {"encoder_layers": 1}},
        enable_audio_output=False,
    )
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_model_without_a_base_is_built_by_its_class(tmp_path):
    saved_omni(tmp_path)
    (row,) = report_adoption(tmp_path, device="cpu", tokens=16)
    assert in_short(row.names) == "thinker.model.language_model.layers.0-3.mlp"
    assert "6 experts of 16, top 2" in row.options


@pytest.mark.parametrize("architectures", [None, [], ["OmniOfMyOwn"]])
def test_a_model_without_a_base_or_a_class_is_one_line(architectures, tmp_path, capsys):
    saved_omni(tmp_path, architectures=architectures)
    assert main(["adopt", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has no base model of Qwen3OmniMoeConfig" in said
    assert said.count("\n") == 1


def test_options_of_experts_are_told(tmp_path):
    saved("GptOss", tmp_path, num_local_experts=8, num_experts_per_tok=2, head_dim=16)
    (row,) = report_adoption(tmp_path, device="cpu", tokens=16)
    for option in ("quick_gelu", "bias", "glu.limit 7.0", "glu.up_shift 1.0", "logits.bias true"):
        assert f", {option}" in row.options, option


def test_names_are_shortened_where_one_number_differs():
    assert in_short(["layers.0.mlp", "layers.1.mlp", "layers.3.mlp"]) == "layers.0-1+3.mlp"
    assert in_short(["layers.2.mlp"]) == "layers.2.mlp"
    assert in_short(["a.0.mlp", "b.1.mlp"]) == "a.0.mlp and 1 more"
