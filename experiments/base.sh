#!/usr/bin/env bash
# Pre-training at the paper's size, on the number of GPUs that the machine has:
#
#     experiments/base.sh 'shards/{00000..01242}.tar' val.jsonl vocab.txt [options of train.py]
#
# 512 pairs a step whatever the number of GPUs: each holds 64 at a time, and one alone makes the step in eight passes, over
# all of which contrast goes. 10 epochs are the paper's ablations, 40 its main run (--epochs 40); its learning rate and
# batch are not known to us, these are ALBEF's. Whoever has less than 60 GB a GPU adds --drop-masked or
# --grad-checkpointing: `python -m tools.costs --memory base` says what a step holds in fp32, and bf16 needs less.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
data=$1 val=$2 vocab=$3
shift 3
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
gpus=$((gpus > 0 ? gpus : 1))
"$here/.venv/bin/torchrun" --nproc-per-node "$gpus" "$here/train.py" --data "$data" --val "$val" --vocab "$vocab" \
    --preset base --batch-size $((64 * gpus)) --accumulate $((8 / gpus > 0 ? 8 / gpus : 1)) --epochs 10 --optimizer adamw --lr 1e-4 --lr-end 0.1 \
    --augment photo --check none --workers 8 --compile --eval-every 5000 --save-every 2000 --out runs/base --resume "$@"
"$here/.venv/bin/torchrun" --nproc-per-node "$gpus" "$here/eval.py" retrieval --checkpoint runs/base/checkpoint.pt --data "$val"
