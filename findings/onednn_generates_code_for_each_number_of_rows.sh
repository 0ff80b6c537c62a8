#!/usr/bin/env bash
# torch 2.13.0 (oneDNN 3.x): a bf16 product on a CPU costs a multiple of its time on the first use of
# each number of rows, because oneDNN generates machine code per shape, and keeps the last 1,024.
#
# Mixtures hardly ever see a number of rows per expert twice, so that most of a bf16 training step on
# a CPU can be code generation, while a benchmark that repeats one shape shows nothing of it. fp32
# products go to MKL, which has no such step.
# Seen: `create:cache_miss` in oneDNN's log once for each of 40 numbers of rows, 0.2 to 0.4 ms each,
# where the product takes 0.05 ms; none when the same numbers come again, and none at all in fp32.
# Exits with 1 if it changes; with 0 and a word if oneDNN has no bf16 products for this processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
cat > products.py <<'PYTHON'
import sys

import torch

dtype = getattr(torch, sys.argv[1])
weight = torch.randn(352, 128).to(dtype)
for _ in range(2):
    for rows in range(200, 240):
        torch.randn(rows, 128).to(dtype) @ weight.T
PYTHON
count() { ONEDNN_VERBOSE=2 venv/bin/python products.py "$1" | grep -c "$2" || true; }
missed=$(count bfloat16 'create:cache_miss.*matmul')
found=$(count bfloat16 'create:cache_hit.*matmul')
fp32=$(count float32 'create:cache_miss.*matmul')
echo "bf16: code generated $missed times, found $found times; fp32: generated $fp32 times"
if [ "$missed" = 0 ] && [ "$found" = 0 ]; then
  echo "no bf16 products of oneDNN on this processor"
  exit 0
fi
[ "$missed" = 40 ] && [ "$found" = 40 ] && [ "$fp32" = 0 ]
