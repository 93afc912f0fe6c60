"""Localisation accuracy of heat maps by method: occlusion with each fill and budget, and Grad-CAM at each block.

    python experiments/maps.py --runs runs/demo_compare/mamo-2750-{seed} runs/demo_compare/control-4206-{seed}
                               --data data/scenes/grounding_val.jsonl --results results/maps.json

For each pattern of run folders and each of the seeds 0 to 2, computes pointing, proposals and box in the same way as
`eval.py grounding`, and reports the mean and the spread over the seeds. The defaults of How in explain.py were chosen
using these validation results.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from data import read_rows, sample_of  # noqa: E402
from eval import load_model  # noqa: E402
from explain import How, ground  # noqa: E402
from metrics import judge_grounding  # noqa: E402

WAYS = [How(), How(passes=32), How(passes=64), How(fill="blur"), How(fill="token")]
WAYS += [How(map="gradcam", layer=layer) for layer in (0, 1)]
MEASURES = ("pointing", "proposals", "box")


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="run folders, with {seed} in place of the seed")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of grounding rows")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000, help="number of phrases to sample")
    options = parser.parse_args()
    rows, device, found = read_rows(options.data, "grounding"), torch.device("cpu"), {}
    rows = sample_of(rows, options.rows)
    for pattern in options.runs:
        models = [load_model(Path(pattern.format(seed=seed)) / "checkpoint.pt", device)[:2] for seed in range(3)]
        for how in WAYS:
            if how.fill == "token" and models[0][0].student.image.mask_token is None:
                continue
            began, each = time.process_time(), []
            for model, tokenizer in models:
                result = judge_grounding(rows, ground(model, tokenizer, rows, device, how))
                each.append({name: result[name]["value"] for name in MEASURES})
                chance = {name: result[name]["chance"] for name in MEASURES}
            spent = 1000 * (time.process_time() - began) / len(rows) / len(models)
            entry = {"chance": chance, "processor ms a phrase": spent}
            for name in MEASURES:
                values = [one[name] for one in each]
                entry[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}
            found.setdefault(Path(pattern).name.partition("-")[0], {})[str(how)] = entry
            print(pattern, how, *(f"{name} {entry[name]['mean']:.1f} ± {entry[name]['std']:.1f}" for name in MEASURES))
            what = f"Maps of {len(rows)} phrases, three seeds, in percent"
            runtime.write_json(options.results, {"what": what, "arms": found} | runtime.how_made("experiments/maps.py"))


if __name__ == "__main__":
    runtime.guarded(main)
