"""`moezoo inspect blocks`: its figures against all pairs of tokens, and its files."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from moezoo import InputError
from moezoo.__main__ import main
from moezoo.analysis.isotropy import MeanCosine
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.inspect.blocks import measure_blocks

TEXT = "Über 素数: 2, 3, 5, 7.\nfür jede Zahl\n"


def mean_cosine(states):
    """Average over all pairs, one by one."""
    pairs = [
        torch.nn.functional.cosine_similarity(a, b, dim=0)
        for i, a in enumerate(states)
        for b in states[i + 1 :]
    ]
    return float(torch.stack(pairs).mean())


def test_the_mean_over_pairs_needs_no_pairs():
    states = torch.randn(37, 5, dtype=torch.float64) + 0.7
    cosine = MeanCosine(5)
    for part in states.split([1, 20, 16]):
        cosine.add(part)
    assert cosine.value() == pytest.approx(mean_cosine(states), abs=1e-12)
    alone = MeanCosine(5)
    alone.add(states[:1])
    assert alone.value() == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"parallel": "one_norm"},
        {"norm_placement": "both", "residual_multiplier": 0.3},
        {"attention_alone": True},
    ],
    ids=str,
)
def test_the_figures_of_every_kind_of_block(make, rules, byte_tokenizer, fields):
    ffn = [rules["rule"]("DenseFFN", d_ff=24)]
    if alone := fields.get("attention_alone"):
        ffn, fields = rules["persistent"], {}
    model = make(ffn=ffn, vocab_size=257, **fields).eval()
    model.model.embed_tokens.weight.data.mul_(30)
    tokens = byte_tokenizer.encode(TEXT)
    found = measure_blocks(model, tokens, sequence_length=16, batch_size=3)
    assert found.parallel == fields.get("parallel", "none")
    assert len(found.blocks) == 3

    # The same without the command: each window alone, every part from its definition.
    parts = [[] for _ in range(3)]
    for window in torch.tensor(tokens).split(16):
        seen = {}
        layer = model.model.layers[1]
        attn = layer.self_attn.register_forward_hook(lambda *a, seen=seen: seen.update(a=a[2][0]))
        whole = layer.register_forward_hook(lambda *a, seen=seen: seen.update(h=a[1][0], y=a[2][0]))
        with torch.no_grad():
            model(window[None])
            added = layer.norm_at(1)(seen["a"]) if layer.norm_at(1) else seen["a"]
        attn.remove()
        whole.remove()
        added = model.config.residual_multiplier * added
        for part, states in zip(parts, (seen["h"], seen["h"] + added, seen["y"]), strict=True):
            part.append(states[0])
    h, attended, after = (torch.cat(part).double() for part in parts)
    block = found.blocks[1]
    for name, states in (("before", h), ("attended", attended), ("after", after)):
        assert getattr(block, f"cosine_{name}") == pytest.approx(mean_cosine(states), abs=1e-5)
    ratio = ((attended - h).norm(dim=1) / h.norm(dim=1)).mean()
    assert block.attention == pytest.approx(float(ratio), rel=1e-4)
    ratio = ((after - attended).norm(dim=1) / h.norm(dim=1)).mean()
    assert block.feed_forward == pytest.approx(float(ratio), rel=1e-4, abs=1e-6)
    assert (found.blocks[0].feed_forward == 0) == bool(alone)


def test_the_command_writes_what_it_prints(make, rules, byte_level_tokenizer, place, capsys):
    model = make(vocab_size=300, ffn=[rules["rule"]("DenseFFN", d_ff=24)], parallel="two_norms")
    save_checkpoint(place / "model", model, byte_level_tokenizer)
    options = ["--checkpoint", str(place / "model"), "--text", str(place / "text.txt")]
    assert main(["inspect", "blocks", *options, "--output", str(place / "out")]) == 0
    printed = capsys.readouterr().out
    assert "parallel: two_norms" in printed
    report = json.loads((place / "out" / "blocks.json").read_text())
    assert report["parallel"] == "two_norms"
    with (place / "out" / "blocks.csv").open() as file:
        rows = list(csv.DictReader(file))
    tensors = load_file(place / "out" / "blocks.safetensors")
    for row, layer, cosine in zip(rows, report["layers"], tensors["cosine_after"], strict=True):
        assert float(row["cosine_after"]) == layer["cosine_after"] == float(cosine)
        assert f"{cosine:.3f}" in printed
    assert (place / "out" / "blocks.png").stat().st_size > 10_000


def test_a_foreign_model_is_refused():
    with pytest.raises(InputError, match="checkpoint: it is a Linear of transformers"):
        measure_blocks(torch.nn.Linear(2, 2), [1])
