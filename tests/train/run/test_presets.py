"""Presets: the published counts, what wins over what, and what is said of a change."""

import functools
from pathlib import Path

import jsonargparse
import pytest
import torch
import transformers

from moezoo.__main__ import main
from moezoo.errors import InputError
from moezoo_train.measure.throughput import count_parameters
from moezoo_train.run.cli import run
from moezoo_train.run.module import LanguageModel
from moezoo_train.run.presets import FOLDER, PUBLISHED, check_preset, describe_preset

PLAN = ["--gpu", "h200", "--layout", "ddp", "--pictures", "null"]


@functools.cache
def parser() -> jsonargparse.ArgumentParser:
    return jsonargparse.capture_parser(lambda: run(["fit"]))


def parse(*words: str) -> jsonargparse.Namespace:
    return parser().parse_args(["fit", *words]).fit


def built(options: jsonargparse.Namespace) -> LanguageModel:
    """Build the model without its weights."""
    single = jsonargparse.ArgumentParser(exit_on_error=False)
    single.add_class_arguments(LanguageModel, "model", skip={"vocab_size"}, instantiate=False)
    arguments = single.instantiate(single.parse_object({"model": options.model.as_dict()})).model
    with torch.device("meta"):
        return LanguageModel(vocab_size=options.data.vocab_size, **arguments)


def figures(name: str) -> tuple[float, float, float, float]:
    """Count all parameters, active ones, embeddings, and those without both tables.

    Of two blocks and of three; what the third adds holds for the others.
    """
    options = parse("--model.preset", name)
    depth, counts = options.model.num_layers, []
    for blocks in (2, 3):
        options.model.num_layers = blocks
        model = built(options).model
        counts.append(count_parameters(model))
    total, active = (two + (depth - 2) * (three - two) for two, three in zip(*counts, strict=True))
    table = model.config.vocab_size * model.config.hidden_size
    tables = table if model.config.tie_word_embeddings else 2 * table
    return total, active, table, total - tables


def agrees(count: float, published: str) -> bool:
    """Return whether billions, rounded or cut off as published, or within 1 %, are the same."""
    digits = len(published.partition(".")[2])
    stated, unit = float(published), 10.0**-digits
    return abs(count / stated - 1) <= 0.01 or -unit / 2 <= count - stated < unit


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    total, active, table, blocks = (count / 1e9 for count in figures(name))
    published = PUBLISHED[name]
    assert agrees(total, published.total), total
    if published.active is not None:
        counted = active if published.embeds else active - table
        assert agrees(counted, published.active), counted
    else:
        assert active == total
    if published.blocks is not None:
        assert agrees(blocks, published.blocks), blocks


def test_deepseek_v2_lite_is_as_large_as_transformers_own():
    """With the configuration that is published with its weights."""
    config = transformers.DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in theirs.parameters()) == figures("DeepSeek-V2-Lite")[0]


def test_the_comparison_of_counts_can_fail():
    assert agrees(3.353, "3.3")
    assert agrees(0.596, "0.6")
    assert not agrees(3.41, "3.3")
    assert not agrees(0.134, "0.15")
    assert not agrees(3.24, "3.3")


def test_every_file_is_a_preset():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)


def test_options_and_files_win_over_a_preset(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("model: {preset: OLMoE-1B-7B, num_layers: 2}\n")
    words = ["--model.d_model", "64", "--model.ffn.top_k", "4"]
    model = parse("--config", str(path), *words).model
    assert (model.num_layers, model.d_model, model.num_heads) == (2, 64, 16)
    assert (model.ffn.init_args.top_k, model.ffn.init_args.num_experts) == (4, 64)
    assert parse("--config", str(path), "--model.preset=SmolLM2-135M").model.num_heads == 9
    assert parse("--config", str(path), "--model.preset", "null").model.num_heads == 4


def test_what_is_changed_of_a_preset_is_said():
    config = built(parse("--model.preset=GPT-OSS-20B", "--model.num_layers=2")).model.config
    model = parse("--model.preset=GPT-OSS-20B").model
    whole = describe_preset(model, config)
    assert whole.startswith("preset GPT-OSS-20B: as published; without attention sinks, ")
    config.vocab_size = 1000
    model.head_dim, model.ffn.init_args.num_experts = 32, 8
    assert describe_preset(model, config).startswith(
        "preset GPT-OSS-20B: changed head_dim 32 (published: 64), "
        "ffn.init_args.num_experts 8 (published: 32), vocab_size 1000 (published: 201088); without"
    )
    model.preset = None
    assert describe_preset(model, config) is None


def test_a_rule_with_defaults_written_out_is_as_published():
    config = built(parse("--model.preset=DeepSeekMoE-16B", "--model.num_layers=2")).model.config
    model = parse("--model.preset=DeepSeekMoE-16B").model
    assert describe_preset(model, config) == "preset DeepSeekMoE-16B: as published"
    model.ffn_rules[0].ffn.init_args.d_ff = 64
    assert "changed ffn_rules [{'layers': [0], " in describe_preset(model, config)


def test_a_plan_takes_a_preset(capsys):
    words = ["--model.preset", "Qwen3-0.6B", "--model.num_layers", "2", *PLAN]
    assert main(["plan", *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == "preset Qwen3-0.6B: changed num_layers 2 (published: 28)\n"
    assert "187 M parameters" in printed.out


@pytest.mark.parametrize(
    ("name", "nearest"), [("Qwen3-0.6b", "Qwen3-0.6B"), ("../OLMoE-1B-7B", "OLMoE-1B-7B")]
)
def test_an_unknown_preset_is_one_line(name, nearest, capsys):
    message = f"model.preset: there is no '{name}'; did you mean '{nearest}'?"
    assert main(["plan", "--model.preset", name]) == 2
    assert capsys.readouterr().err == f"moezoo: error: {message}\n"
    with pytest.raises(InputError, match="did you mean"):
        check_preset(name)


def test_a_preset_and_a_directory_contradict_each_other():
    with pytest.raises(InputError, match="give one of the two"):
        LanguageModel(vocab_size=8, preset="Qwen3-0.6B", initialize_from=str(Path("model")))


def test_attention_options_reach_the_decoder():
    with torch.device("meta"):
        module = LanguageModel(
            vocab_size=16,
            d_model=24,
            num_layers=1,
            num_heads=5,
            num_kv_heads=1,
            head_dim=6,
            qk_norm=True,
            qk_norm_over="projection",
            attention_bias=True,
            attention_output_bias=True,
            norm_eps=1e-3,
        )
    attention = module.model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (30, 24)
    assert attention.k_proj.bias.shape == (6,)
    assert attention.o_proj.weight.shape == (24, 30)
    assert attention.o_proj.bias.shape == (24,)
    assert attention.q_norm.weight.shape == (30,)
    assert module.model.config.rms_norm_eps == 1e-3
    assert module.model.config.head_dim == 6


def test_latent_attention_is_an_option(capsys):
    words = ["--model.d_model=32", "--model.num_heads=2", "--model.num_layers=1"]
    words += ["--model.latent_attention.kv_lora_rank=6", "--model.latent_attention.v_head_dim=8"]
    attention = built(parse(*words)).model.model.layers[0].self_attn
    assert attention.kv_b_proj.weight.shape == (2 * (128 + 8), 6)
    assert attention.q_proj.weight.shape == (2 * (128 + 64), 32)
    assert main(["plan", *words, "--model.latent_attention.v_head=3"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["plan", *words, "--model.latent_attention.kv_lora_rank=0"]) == 2
    assert "latent_attention.kv_lora_rank: 0 is out of range" in capsys.readouterr().err
    assert main(["plan", *words, *PLAN]) == 0
    assert "1 TiB" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"num_heads": 5}, "d_model: 64 is not divisible by num_heads 5; make it a multiple, or"),
        ({"norm_eps": -1.0}, "norm_eps: -1 is out of range"),
        ({"qk_norm_over": "heads"}, "qk_norm_over: 'heads' is not known"),
    ],
)
def test_wrong_options_of_attention_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LanguageModel(vocab_size=8, **{"d_model": 64, "num_layers": 1, **options})
