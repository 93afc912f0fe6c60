#!/bin/sh
# The whole trial of plan.md, part by part; what is finished is not repeated, what was stopped goes on.
#   experiments/trial/run.sh [how many runs at a time, 2] [parts, all of them]
set -e
cd "$(dirname "$0")/../.."
side=${1:-2}
[ $# -gt 0 ] && shift
parts=${*:-world vqa vqa_few grounding grounding_few pairs_500 pairs_2000 pairs_8000 longer longer_vqa_few untold untold_vqa}
python=.venv/bin/python
[ -f data/scenes/written.json ] || $python -m world.scenes --out data/scenes
[ -f data/full/written.json ] || $python -m world.scenes --out data/full --level full
for count in 500 2000 8000; do head -n $count data/scenes/pairs_train.jsonl > data/scenes/few_$count.jsonl; done
head -n 3000 data/scenes/vqa_train.jsonl > data/scenes/few_vqa.jsonl
head -n 1000 data/scenes/grounding_train.jsonl > data/scenes/few_grounding.jsonl
mkdir -p results/trial
for part in $parts; do
    $python -m tools.compare experiments/trial/$part.json --out runs/trial/$part --side-by-side $side --results results/trial/$part.json
    if [ $part = untold ]; then
        runs=runs/trial/untold
        $python experiments/objects.py --runs $runs/control-1091-{seed} $runs/mamo-600-{seed} $runs/vlmae-1034-{seed} \
            --pairs data/full/pairs_test.jsonl --phrases data/full/grounding_test.jsonl --results results/trial/objects.json
    fi
done
