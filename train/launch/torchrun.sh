#!/usr/bin/env bash
# Train on all GPUs of one or several machines with torchrun. On each machine:
#
#   NODES=2 RANK=0 MASTER=first-machine train/launch/torchrun.sh --config configs/moe.yaml
#
# with RANK=1 on the second. On one machine the three variables may be left out. What follows the
# name of the script is passed on to `moezoo fit`; this one adds how many processes there are.
set -euo pipefail

NODES=${NODES:-1}
RANK=${RANK:-0}
MASTER=${MASTER:-localhost}
PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

exec torchrun \
  --nnodes "$NODES" --node_rank "$RANK" --nproc_per_node "$GPUS" \
  --master_addr "$MASTER" --master_port "$PORT" \
  -m moezoo fit --trainer.strategy fsdp2 --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" "$@"
