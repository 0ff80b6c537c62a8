"""The memory layers of one decoder share their values, through saving, loading and training."""

import pytest
import torch

from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint


@pytest.fixture
def pooled(rules):
    arguments = {"num_keys": 8, "num_heads": 2, "top_k": 4, "value_pool": "memory"}
    return [rules["rule"]("DenseFFN", d_ff=48), rules["rule"]("MemoryPlus", [0, 2], **arguments)]


def test_a_pool_belongs_to_one_model(make, pooled):
    model, other = make(ffn=pooled), make(ffn=pooled)
    first, _, last = (layer.mlp for layer in model.model.layers)
    assert last.memory.table is first.memory.values
    assert other.model.layers[0].mlp.memory.values is not first.memory.values
    tables = [name for name in model.state_dict() if name.endswith("memory.values.weight")]
    assert tables == ["model.layers.0.mlp.memory.values.weight"]


def test_a_pool_survives_saving_and_loading(make, pooled, ids, tmp_path):
    model = make(ffn=pooled).eval()
    save_checkpoint(tmp_path / "c", model)
    loaded, _ = load_checkpoint(tmp_path / "c")
    first, _, last = (layer.mlp for layer in loaded.model.layers)
    assert last.memory.table is first.memory.values
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_checkpointed_training_reaches_the_shared_values(make, pooled, ids):
    gradients = []
    for checkpointing in (False, True):
        model = make(ffn=pooled).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].mlp.memory.values.weight.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)
