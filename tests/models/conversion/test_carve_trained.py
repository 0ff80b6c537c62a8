"""Carving a small model that was trained, so that its routing has something to find."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion.carve import calibrate, carve
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.plans import Plans
from moezoo_models.conversion.source import open_source
from moezoo_models.conversion.study import inspect_carving

from .test_carve import perplexity

GREEDY = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}


@pytest.mark.slow
def test_a_trained_model_survives_better_than_by_pruning(trained, capsys):
    # Ratios to the dense perplexity, with a margin to what was measured on other machines.
    sizes = ["S3A9E16", "S2A6E16", "S2A2E16"]
    study = inspect_carving(trained, sizes, calibration_tokens=8192)
    for size, most in (("S3A9E16", 1.06), ("S2A6E16", 1.20), ("S2A2E16", 1.75)):
        ratios = {method: values[0] for method, values in study.ratios[size].items()}
        assert ratios["random"] > 1.1 * ratios["static"]
        assert ratios["random"] > ratios["cmoe"] > 1.1 * ratios["ridge"]
        if size != "S3A9E16":  # with only a quarter left out, pruning can match routing
            assert ratios["static"] > 1.02 * ratios["ridge"]
            assert ratios["static_refit"] > ratios["ridge_refit"]
        assert ratios["ridge"] > ratios["ridge_refit"] > 0.99
        assert ratios["ridge_refit"] < most
    assert "S2A2E16" in capsys.readouterr().out


class Planned(torch.nn.Module):
    """A block as its plan defines it."""

    def __init__(self, plan, block):
        super().__init__()
        self.plan, self.block = plan, block

    def forward(self, hidden):
        weights = [getattr(self.block, f"{name}_proj").weight for name in ("gate", "up", "down")]
        return self.plan.run(hidden.flatten(0, 1), *weights).view_as(hidden)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmodified_transformers_computes_what_was_planned(dtype, trained, tmp_path, monkeypatch):
    source, plans, original = trained, {}, Plans.save
    if dtype != torch.float32:
        source = tmp_path / "small"
        AutoModelForCausalLM.from_pretrained(trained, dtype=dtype).save_pretrained(source)
        read_tokenizer(trained).save(source)

    def save(self, layer, plan, figures):
        plans[layer] = plan
        original(self, layer, plan, figures)

    monkeypatch.setattr(Plans, "save", save)
    options = {"shared": 2, "active": 6, "experts": 16, "calibration_tokens": 8192}
    options["sparsified"] = False
    done = carve(source, tmp_path / "out", to="glm4_moe", accept_loss=True, **options)
    assert done.extra["beats"] == {"static_refit": True}
    memory = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    for number, layer in enumerate(memory.model.layers):
        layer.mlp = Planned(plans[number], layer.mlp)
    with open_source(source) as dense:
        text = calibrate(dense, "stdlib", 8192, 8192, None, 0)
    found = done.extra["perplexity"]
    # In bf16 all states are rounded, and routers that see them choose differently here and there:
    # that moves either model by as much as 1e-3, and says nothing of what was written. The two err
    # to different sides: the kernels sum a token's experts in fp32, the plan in bf16.
    assert found["loaded"] == pytest.approx(perplexity(memory, text), rel=2e-3)
    written = load_any(tmp_path / "out").float()
    assert perplexity(written, text) == pytest.approx(found["carved"], rel=1e-3)
    assert perplexity(memory.float(), text) == pytest.approx(found["carved"], rel=1e-5)
    prompt = torch.tensor([[40, 50, 60]])
    assert torch.equal(written.generate(prompt, **GREEDY), memory.generate(prompt, **GREEDY))


@pytest.mark.slow
def test_a_carve_that_does_not_beat_pruning_says_so(trained, tmp_path, capsys):
    options = {"split": "cmoe", "router": "cmoe", "refit": False, "calibration_tokens": 4096}
    options["sparsified"] = False
    done = carve(trained, tmp_path / "out", 3, 3, 8, **options, held_out_tokens=2048)
    assert done.extra["beats"] == {"static": False}
    assert "The carve does not beat static pruning" in capsys.readouterr().out
