#!/usr/bin/env bash
# torch 2.13.0: on AMD's Zen 5, F.linear in fp32 takes twice as long as the same product by oneDNN, which is
# in the same wheel.
#
# torch sends fp32 products to MKL, and MKL takes its AVX2 kernels on processors that are not Intel's,
# whatever instructions they have; oneDNN goes by instructions. So torch.mm, F.linear and whatever is built
# on them run at half of what the wheel could do there, and a comparison of bf16, which oneDNN multiplies,
# with fp32 compares two libraries as well.
# Seen on an AMD EPYC (Zen 5), one thread, 256 x 576 x 1536: F.linear 100 GFLOP/s, torch.ops.mkldnn's linear
# 215, the same numbers to 1e-6; with transposed operands, as gradients need them, likewise.
# Zen 4 has AVX-512 in two halves, so nothing like it is expected there. Exits with 1 if a ratio is under 1.5
# on Zen 5 (family 26 with avx512f); on other processors it prints the ratios and exits with 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import re
import time

import torch

torch.set_num_threads(1)
multiply = torch.ops.mkldnn._linear_pointwise.default


def by_onednn(x, weight):
    return multiply(x, weight, None, "none", [], "")


def shortest(function, *operands):
    """Return the least CPU time of ten products: what else runs makes some longer."""
    times = []
    for _ in range(10):
        start = time.thread_time()
        function(*operands)
        times.append(time.thread_time() - start)
    return min(times)


torch.manual_seed(0)
rows, inputs, outputs = 256, 576, 1536
x, weight, slope = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
products = {
    "output": (x, weight),
    "gradient of the input": (slope, weight.t()),
    "gradient of the weight": (slope.t(), x.t()),
}
ratios = []
for name, operands in products.items():
    own, other = torch.nn.functional.linear(*operands), by_onednn(*operands)
    error = ((own - other).norm() / own.norm()).item()
    seconds = [shortest(function, *operands) for function in (torch.nn.functional.linear, by_onednn)]
    rates = [2 * rows * inputs * outputs / taken / 1e9 for taken in seconds]
    ratios.append(seconds[0] / seconds[1])
    print(f"{name}: F.linear {rates[0]:.0f} GFLOP/s, oneDNN {rates[1]:.0f}, {ratios[-1]:.2f} times")
    assert error < 1e-5, error
with open("/proc/cpuinfo", encoding="utf-8") as lines:
    about = lines.read()
family = re.search(r"^cpu family\s*: (\d+)$", about, re.MULTILINE)
zen5 = "AuthenticAMD" in about and "avx512f" in about and family is not None and family[1] == "26"
print(f"torch {torch.__version__}, AMD Zen 5 with AVX-512: {zen5}")
raise SystemExit(0 if not zen5 or min(ratios) >= 1.5 else 1)
PYTHON
