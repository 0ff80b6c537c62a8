"""Models whose lookup experts are folded: the same logits, saved and generated from."""

import pytest
import torch

from moezoo import InputError
from moezoo_models.checkpoints.directory import load_checkpoint, save_checkpoint
from moezoo_models.decoding.eligible import ineligible
from moezoo_models.model.folding import fold_experts


def test_a_folded_model_computes_the_same_and_survives_a_checkpoint(make, rules, ids, tmp_path):
    rule = rules["rule"]
    lookup = {"num_experts": 3, "d_expert": 8, "vocab_size": 61, "embedding_pool": "tokens"}
    model = make(ffn=[rule("MoLE", **lookup), rule("DenseFFN", 1, d_ff=48)]).eval()
    with torch.no_grad():
        for block in model.model.blocks():
            for parameter in block.mlp.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        before = model(ids).logits
        assert fold_experts(model) == 2
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    names = list(model.state_dict())
    assert not any("experts" in name or "mlp.embedding" in name for name in names)
    assert sum(name.endswith("mlp.table.weight") for name in names) == 2
    save_checkpoint(tmp_path / "model", model)
    again, _ = load_checkpoint(tmp_path / "model")
    assert torch.equal(again(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))
    with pytest.raises(InputError, match="model: it has no MoLE that is not folded"):
        fold_experts(model)


@pytest.mark.parametrize(("gate", "convolution"), [(True, False), (False, False), (True, True)])
def test_memories_of_n_grams_see_the_same_behind_a_cache(make, rules, ids, gate, convolution):
    """Also of texts that end within the window, and with padding before one."""
    rule = rules["rule"]
    memory = {"d_ff": 48, "num_heads": 2, "num_rows": 40, "vocab_size": 61, "boundary_id": 5}
    memory |= {"gate": gate, "convolution": convolution}
    model = make(ffn=[rule("DenseFFN", d_ff=48), rule("Engram", 1, **memory)]).eval()
    if convolution:
        torch.nn.init.normal_(model.model.layers[1].mlp.conv.weight)
    assert ineligible(model) is None
    ids[0, 6] = 5
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        cache, steps = None, []
        for end in range(1, 13):
            step = model(
                ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, end - 1 : end],
                past_key_values=cache,
                use_cache=True,
                context_ids=ids[:, :end],
            )
            cache = step.past_key_values
            steps.append(step.logits)
    found, real = torch.cat(steps, dim=1), mask.bool()
    torch.testing.assert_close(found[real], whole.logits[real], rtol=1e-5, atol=1e-5)
