"""Blocks without a gate: what judges by one refuses them in one line, and the rest takes them."""

import pytest
from transformers import GPT2Config

from moezoo import InputError
from moezoo.convert.select import METHODS
from moezoo.convert.select.guess import GUESSES, GuessOptions
from moezoo_models.conversion.sparsify import sparsify
from moezoo_models.inspect.frontier import WAYS, inspect_frontier

from .conftest import write_dense

JUDGE_BY_A_GATE = {*METHODS, "r_sparse"}


@pytest.fixture
def plain(tmp_path, byte_level_tokenizer):
    """Write a dense model whose blocks are plain MLPs."""
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    )
    directory = write_dense(tmp_path / "plain", config)
    byte_level_tokenizer.save(directory)
    return directory


@pytest.mark.parametrize("method", [*METHODS, *GUESSES])
def test_every_method_refuses_them_in_one_line_or_takes_them(method, plain, text, tmp_path):
    guess = GuessOptions(rank=4) if method in GUESSES else GuessOptions()
    options = {"method": method, "work": 0.7, "guess": guess, **text}
    if method in JUDGE_BY_A_GATE:
        said = f"method: {method} judges by a gate, .* gpt2 .*: predictor, polar, low_rank_gate$"
        with pytest.raises(InputError, match=said):
            sparsify(plain, tmp_path / "out", **options)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    else:
        done = sparsify(plain, tmp_path / "out", **options)
        assert done.perplexity["loaded"] == pytest.approx(done.perplexity["sparse"], rel=1e-5)


def test_the_frontier_leaves_out_what_needs_a_gate(plain, text, tmp_path):
    found = inspect_frontier(plain, works=[0.75], output=tmp_path / "all", **text)
    assert {point.method for point in found.points} == set(WAYS) - JUDGE_BY_A_GATE
    with pytest.raises(InputError, match=r"methods: teal judges by a gate"):
        inspect_frontier(plain, methods=["prune", "teal"], output=tmp_path / "two", **text)
