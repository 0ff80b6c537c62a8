"""What calibration computes in the place of a dense block, against the plan expert by expert."""

import pytest
import torch

from moezoo.convert import Block, CarveOptions, carve_block
from moezoo_models.conversion import carving
from moezoo_models.conversion.carve import carve
from moezoo_models.conversion.carving import answer_of
from moezoo_models.conversion.sparsify import sparsify

D, F, T = 16, 96, 130


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "ridge_shared", "bias": True},
        {"output_scale": 1.7, "refit": False},
        {"split": "cmoe", "router": "cmoe", "signed": True},
        {"shared": 0, "active": 5},
    ],
)
def test_all_neurons_at_once_are_the_plan(options, monkeypatch):
    monkeypatch.setattr(carving, "_TOKENS", 48)
    x, gate = torch.randn(T, D), torch.randn(F, D)
    up, down = torch.randn(F, D), torch.randn(D, F)
    options = {"shared": 2, "active": 3, "experts": 8, **options}
    plan = carve_block(x, gate, up, down, CarveOptions(**options)).plan
    expected = plan.run(x, gate, up, down)
    found = answer_of(plan, Block(gate, up, down))(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_what_sparsify_would_cost_stands_beside_a_carve(readable, text, tmp_path, capsys):
    source, sizes = readable(), {"shared": 2, "active": 2, "experts": 6, "to": "moezoo", **text}
    made = carve(source, tmp_path / "carved", **sizes)
    found = made.extra["perplexity"]["sparsified"]
    assert f"sparsified to as much work  {found:>10.4g}" in capsys.readouterr().out
    work = made.extra["work"]
    expected = sparsify(source, tmp_path / "sparse", work=work, check="none", **text)
    assert found == pytest.approx(expected.perplexity["sparse"], rel=1e-5)
    without = carve(source, tmp_path / "without", **sizes, sparsified=False)
    assert "sparsified" not in without.extra["perplexity"]
    names = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("carved", "without")]
    assert names[0] == names[1]
