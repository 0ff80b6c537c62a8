"""Blocks whose matrices are factored or sparse, written as the plain ones that they multiply as."""

import pytest
import torch
from safetensors.torch import load_file
from torch.sparse import _semi_structured_conversions as semi_structured
from transformers import AutoModelForCausalLM

import moezoo
from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.checkpoints.export import export

MATRICES = {
    "low_rank": {"kind": "low_rank", "rank": 5, "guide": 0.5},
    "block_dense": {"kind": "block_dense", "blocks": 2},
    "block_shuffle": {"kind": "block_shuffle", "guide": 0.5},
    "pixelfly": {"kind": "pixelfly"},
    "factorized": {"kind": "factorized", "growth": 0.3},
    "doped": {"kind": "doped", "block": 4},
    "parallel": {"kind": "parallel", "growth": 0.3},
    "n_m": {"kind": "n_m", "leak": "linear", "end": 0.5},
    "transposable": {"kind": "transposable"},
    "soft_n_m": {"kind": "soft_n_m"},
    "pruned": {"kind": "pruned", "growth": 0.3},
}


def rule(layers="all", **arguments):
    return {
        "layers": layers,
        "class_path": "moezoo.DenseFFN",
        "init_args": {"d_ff": 48, **arguments},
    }


def trained(model):
    """Move everything away from where it began, schedules too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for layer in model.modules():
        if isinstance(layer, moezoo.FeedForward):
            layer.step(0.25)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", MATRICES)
def test_unmodified_transformers_computes_the_same(kind, make, ids, tmp_path):
    # The first block is dense, as the paper of structured blocks has it.
    rules = [rule(bias=True, matrices=MATRICES[kind]), rule(0, bias=True)]
    model = trained(make(ffn=rules))
    save_checkpoint(tmp_path / "ours", model)
    expected = logits(model, ids)
    ours, _ = load_checkpoint(tmp_path / "ours")
    assert torch.equal(logits(ours, ids), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name  # masks and schedules too
    export(tmp_path / "ours", tmp_path / "stock")
    stock, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stock", output_loading_info=True
    )
    assert not any(problems.values())
    found = logits(stock, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def is_two_of_four(matrix):
    """Return whether what ``to_sparse_semi_structured`` stores of a matrix is all of it.

    In 16 bits that is two of four; in fp32 sparse tensor cores read one of two.
    """
    dense = matrix.bfloat16()
    kept, places = semi_structured.sparse_semi_structured_from_dense_cutlass(dense)
    assert kept.shape == (dense.shape[0], dense.shape[1] // 2)
    return torch.equal(semi_structured.sparse_semi_structured_to_dense_cutlass(kept, places), dense)


@pytest.mark.parametrize("kind", ["n_m", "transposable", "soft_n_m"])
def test_what_is_exported_is_two_of_four_to_torch(kind, make, tmp_path):
    matrices = {**MATRICES[kind], **({"leak": None, "end": 1.0} if kind == "n_m" else {})}
    model = trained(make(ffn=[rule(d_ff=64, matrices=matrices)]))
    save_checkpoint(tmp_path / "ours", model)
    export(tmp_path / "ours", tmp_path / "stock")
    written = load_file(tmp_path / "stock" / "model.safetensors")
    found = [tensor for name, tensor in written.items() if ".mlp." in name]
    assert found
    assert all(is_two_of_four(tensor) for tensor in found)
    if kind == "transposable":  # the backward pass multiplies with the transpose
        assert all(is_two_of_four(tensor.t().contiguous()) for tensor in found)
    three = torch.tensor([1.0, 2.0, 3.0, 0.0]).repeat(32, 16)
    assert not is_two_of_four(three)


def test_blocks_of_other_widths_are_refused(make, tmp_path):
    wide = {"layers": 0, "class_path": "moezoo.DenseFFN", "init_args": {"d_ff": 64}}
    save_checkpoint(tmp_path / "ours", make(ffn=[rule(matrices=MATRICES["pruned"]), wide]))
    with pytest.raises(InputError, match="unlike the first"):
        export(tmp_path / "ours", tmp_path / "stock")
