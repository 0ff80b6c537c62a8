#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon orthogonalizes in bfloat16 whatever the parameters' dtype, fp64 included,
# and has no option for it.
#
# Its update of an fp64 matrix consists of bf16 numbers: eight bits of each entry, whatever the gradient
# was. So a run in fp64 or fp32 that is to be compared with another (sharded against whole, one machine
# against another, a plain loop against an optimizer) differs by percents as soon as one bf16 sum is
# rounded the other way; and on a CPU without bf16 instructions these products, slower by an order of
# magnitude than in fp32, can take most of a step though nothing in the run is bf16.
# Seen: all entries of the update are bf16 numbers; gradients that differ by 1e-9 of their size have the
# same update to the last bit; the same iteration in fp64 differs by 2e-2 of the update's largest entry.
# Exits with 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch


def update(gradient):
    """Return what one step at learning rate 1 subtracts from a square matrix."""
    matrix = torch.nn.Parameter(torch.zeros_like(gradient))
    matrix.grad = gradient.clone()
    torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0, momentum=0.0).step()
    return -matrix.detach()


def in_fp64(gradient, a=3.4445, b=-4.775, c=2.0315):
    """Return the published iteration with every product in fp64."""
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


torch.manual_seed(0)
gradient = torch.randn(64, 64, dtype=torch.float64)
found, exact = update(gradient), in_fp64(gradient)
rounded = torch.equal(found, found.to(torch.bfloat16).to(found.dtype))
blind = torch.equal(found, update(gradient * (1 + 1e-9 * torch.randn_like(gradient))))
error = ((found - exact).abs().max() / exact.abs().max()).item()
print(f"update in {found.dtype}, bf16 numbers only: {rounded}; same for a near gradient: {blind}")
print(f"difference from the same iteration in fp64: {error:.1e} of its largest entry")
raise SystemExit(0 if rounded and blind and 1e-4 < error < 1e-1 else 1)
PYTHON
