"""Does matching improve on contrast? Retrieval by contrast, then re-ranked by both heads together or by matching alone.

    python experiments/rerank.py --runs mamo=runs/a albef=runs/b --data data/scenes/pairs_val.jsonl --results out.json

For each run folder, reports R@1 in percent in both directions and the areas under the ROC curve of the matching logit
(see `separation` in eval.py), under the name given before the = sign.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from data import read_rows  # noqa: E402
from eval import load_model, retrieval  # noqa: E402


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="names and folders of the runs, as NAME=FOLDER")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of pairs")
    parser.add_argument("--results", type=Path, required=True, help="JSON file; its rows of other names are kept")
    options = parser.parse_args()
    rows, device = read_rows(options.data, "pairs"), torch.device("cpu")
    found = json.loads(options.results.read_text())["rows"] if options.results.is_file() else {}
    for name, _, folder in (run.partition("=") for run in options.runs):
        model, tokenizer, state = load_model(Path(folder) / "checkpoint.pt", device)
        both, alone = (retrieval(model, tokenizer, rows, device, weights=[weight]) for weight in (1.0, math.inf))
        ways = {"contrast": both["contrast"], "both": both["matching"], "matching alone": alone["matching"]}
        entry = {way: {side: one["R@1"] for side, one in result.items()} for way, result in ways.items()}
        entry |= {"chance": both["chance"]["image_to_text"]["R@1"], "separation": both["separation"]}
        found[name] = entry | {"pictures": both["images"], "steps": state["step"], "seed": state["train"]["seed"]}
        print(name, entry)
        what = "R@1 in percent by contrast, re-ranked by both heads, and by matching alone; areas under the curve"
        runtime.write_json(options.results, {"what": what, "rows": found} | runtime.how_made("experiments/rerank.py"))


if __name__ == "__main__":
    runtime.guarded(main)
