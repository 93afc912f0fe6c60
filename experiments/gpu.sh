#!/usr/bin/env bash
# The figures that need an NVIDIA GPU and are not in results/ yet: run this on a machine that has one, from a fresh clone.
set -euo pipefail
cd "$(dirname "$0")/.."
make .venv/ready
python=.venv/bin/python

# base at 256 px in bf16, compiled: utilisation against the rate of matrix products in the same run, pairs/s and peak
# memory per batch size, MAMO beside ITC + ITM + MLM. A batch that does not fit is reported as such.
$python -m tools.benchmark step --presets base --batch-size 16 32 64 128 256 --precision bf16 --compile --out results/gpu_step.json
$python -m tools.benchmark step --presets base --batch-size 128 256 --precision bf16 --compile --grad-checkpointing \
    --out results/gpu_step_checkpointing.json

# The demo's seeds on the GPU, three at a time.
$python -m world.scenes --out data/scenes
$python -m tools.compare experiments/demo.json --out runs/gpu_demo --side-by-side 3 --results results/gpu_demo.json
