"""What calibration computes in the place of a dense block, against the plan expert by expert."""

import pytest
import torch

from moezoo.convert import Block, CarveOptions, carve_block
from moezoo_models.conversion import carving
from moezoo_models.conversion.carving import answer_of

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
