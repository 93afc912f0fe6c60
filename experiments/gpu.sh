#!/usr/bin/env bash
# The figures that need an NVIDIA GPU and are not in results/ yet, within half an hour of one H100: run this on a machine
# that has one (or more), from a fresh clone. Each line writes its own file, so it can be stopped and the rest run later.
set -euo pipefail
cd "$(dirname "$0")/.."
make .venv/ready
python=.venv/bin/python
$python -m world.scenes --out data/scenes

# Half precision and compiled steps against fp32: the total loss of twenty steps of train.py.
$python -m tools.benchmark agreement --presets tiny --device cuda --out results/gpu_agreement.json

# base at 256 px in bf16, compiled: utilisation against the rate of matrix products in the same run, pairs/s and peak
# memory per batch size, MAMO beside ITC + ITM + MLM; then with checkpointing, and with masked patches dropped. A batch
# that does not fit is reported as such.
step="$python -m tools.benchmark step --presets base --precision bf16 --compile --rounds 3"
$step --batch-size 32 128 256 --out results/gpu_step.json
$step --batch-size 128 512 --grad-checkpointing --objectives mamo --out results/gpu_step_checkpointing.json
$step --batch-size 128 256 --drop-masked --objectives mamo --out results/gpu_step_dropping.json

# Two processes on two GPUs, where there are two, against one: the same losses (log.csv of both is kept).
if [ "$(nvidia-smi --list-gpus | wc -l)" -gt 1 ]; then
    for processes in 1 2; do
        .venv/bin/torchrun --nproc-per-node $processes train.py --preset tiny --steps 300 --w-itm 0 --precision fp32 --out runs/gpu_$processes
        cp runs/gpu_$processes/log.csv results/gpu_processes_$processes.csv
    done
fi

# The demo's seeds on the GPU, three at a time.
$python -m tools.compare experiments/demo.json --out runs/gpu_demo --side-by-side 3 --results results/gpu_demo.json
