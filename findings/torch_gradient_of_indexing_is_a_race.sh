#!/usr/bin/env bash
# torch 2.13.0: on a CPU with two threads, the fp32 gradient of `w[i]` differs from call to call.
#
# Where rows are taken more than once, as of an embedding or a table of experts, the backward pass of
# indexing adds to them from several threads in whatever order these arrive. One thread, bf16 and fp64
# do not, so that a test in fp64 does not find it, and a run on one core repeats. `F.embedding` and
# `index_select` compute the same function, and their gradients repeat.
# Seen: of fifty calls 15 to 41 differ from the first by rounding for `w[i]`, none for the others.
# Exits with 1 if it changes. (A machine with a single core may never show it.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(2)
torch.manual_seed(0)
w, i = torch.randn(50, 64, requires_grad=True), torch.randint(50, (4000,))
upstream = torch.randn(4000, 64)


def differing(read, w):
    """Return how many of fifty gradients are not the first one."""
    gradients = [torch.autograd.grad(read(w), w, upstream.to(w.dtype))[0] for _ in range(51)]
    return sum(not torch.equal(gradients[0], gradient) for gradient in gradients[1:])


seen = {
    "w[i]": differing(lambda w: w[i], w),
    "w[i] in fp64": differing(lambda w: w[i], w.detach().double().requires_grad_()),
    "F.embedding": differing(lambda w: F.embedding(i, w), w),
    "index_select": differing(lambda w: w.index_select(0, i), w),
}
torch.set_num_threads(1)
seen["w[i] on one thread"] = differing(lambda w: w[i], w)
print("gradients that differ from the first, of fifty:", seen)
raise SystemExit(0 if seen.pop("w[i]") and not any(seen.values()) else 1)
PYTHON
