#!/usr/bin/env bash
# Train on all GPUs of one or several machines with torchrun. On each machine:
#
#   NODES=2 RANK=0 MASTER=first-machine train/launch/torchrun.sh --config configs/moe.yaml
#
# with RANK=1 on the second. On one machine the three variables may be left out. What follows the
# name of the script is passed on to `moezoo fit`; this one adds how many processes there are, and
# the strategy fsdp2 unless a file or an option names another. Without GPUs, say how many processes
# there should be:
#
#   GPUS=2 train/launch/torchrun.sh --config configs/moe.yaml --trainer.accelerator cpu
set -euo pipefail

NODES=${NODES:-1}
RANK=${RANK:-0}
MASTER=${MASTER:-localhost}
PORT=${PORT:-29500}
PYTHON=${PYTHON:-python}

if [[ -z ${GPUS:-} ]]; then
  command -v nvidia-smi >/dev/null || {
    echo "torchrun.sh: there is no nvidia-smi to count GPUs; set GPUS to the number of processes" >&2
    exit 2
  }
  GPUS=$(nvidia-smi --list-gpus | wc -l)
fi

exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NODES" --node_rank "$RANK" --nproc_per_node "$GPUS" \
  --master_addr "$MASTER" --master_port "$PORT" \
  -m moezoo fit --config '{trainer: {strategy: fsdp2}}' \
  --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" "$@"
