"""Rows of the frontier that guess: those of sparsify, and GRIFFIN as it is decoded."""

import math

import pytest
import torch

from moezoo.convert.select.guess import GuessOptions
from moezoo_models.checkpoints.directory import load_checkpoint
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.sparsify import sparsify
from moezoo_models.decoding.griffin import kept_after
from moezoo_models.inspect.frontier import inspect_frontier


def test_rows_are_what_decoding_and_sparsify_give(readable, text, tmp_path):
    source = readable("llama_heads")
    methods = ["griffin", "low_rank_gate", "r_sparse"]
    found = inspect_frontier(
        source, [0.6], methods, **text, device="cpu", output=tmp_path / "frontier"
    )
    points = {point.method: point for point in found.points}
    assert points.keys() == set(methods)
    rank = GuessOptions().rank
    for method in methods[1:]:
        with open_source(source, ["llama"]) as model:
            d_model, width = model.config.hidden_size, model.width
            rank = int(0.3 * d_model * width / (d_model + width))
        options = GuessOptions(rank=min(rank, d_model, width))
        done = sparsify(source, tmp_path / method, method, 0.6, guess=options, check="none", **text)
        expected = done.perplexity["sparse"] / done.perplexity["dense"]
        assert points[method].ratio == pytest.approx(expected, rel=1e-4)

    with open_source(source, ["llama"]) as model:
        held_out = calibrate(
            model, text["calibration"], text["calibration_tokens"], text["held_out_tokens"],
            text["window"], 0,
        ).held_out  # fmt: skip
    network = load_checkpoint(source)[0].eval()
    half = held_out.shape[1] // 2

    @torch.no_grad()
    def nats():
        logits = network(held_out).logits[:, half:-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), held_out[:, half + 1 :].flatten()
        )

    dense = nats()
    with kept_after(network, 0.6, [half] * len(held_out)):
        pruned = nats()
    assert abs(float(pruned - dense)) > 1e-6
    assert points["griffin"].ratio == pytest.approx(math.exp(pruned - dense), rel=1e-4)
