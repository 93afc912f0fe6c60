"""Training speed of the demo on an idle machine and under background load, by the waiting policy of its threads.

    python experiments/crowded.py --data data/scenes/pairs_train.jsonl --busy 0 1 --results results/crowded.json

Each configuration runs train.py for a few steps in its own process; its speed is the median over the rows of the log,
without the first. The configurations take turns in each round, and we report the speed of each relative to the first
configuration without load in the same round. A background load is an endless loop. Its share of the cores explains part
of the slowdown: with c cores and t > c threads in total, a thread gets at most c / t of a core.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402

STEPS, ROW = 60, 20  # steps per run, and between two rows of its log
DDP = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
WAYS = {  # name: (arguments before train.py, environment variables)
    "threads that spin": ([], {"GOMP_SPINCOUNT": "300000"}),  # the default of the OpenMP library
    "threads that sleep": ([], {"OMP_WAIT_POLICY": "passive"}),
    "one thread": ([], {"OMP_NUM_THREADS": "1"}),
    "two processes of one thread": (DDP, {"OMP_NUM_THREADS": "1"}),
}


def rate(way: str, data: str, out: Path, tree: Path) -> float:
    """Training speed of a short run, in pairs per second."""
    before, variables = WAYS[way]
    arguments = ["--data", data, "--steps", str(STEPS), "--log-every", str(ROW), "--out", str(out)]
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, *before, str(tree / "train.py"), *arguments]
    environment = known | variables | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    with open(out / "log.csv", newline="") as file:
        return statistics.median(float(row["pairs_per_s"]) for row in list(csv.DictReader(file))[1:])


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--busy", type=int, nargs="+", default=(0, 1), help="numbers of background loads to measure")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, required=True, help="JSON file; its other entries are kept")
    options = parser.parse_args()
    rates = {f"{way}, {busy} busy": [] for busy in options.busy for way in options.ways}
    for _ in range(options.rounds):
        for busy in options.busy:
            programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                for way in options.ways:
                    with tempfile.TemporaryDirectory() as folder:
                        rates[f"{way}, {busy} busy"].append(rate(way, options.data, Path(folder, "run"), ROOT))
                    print(f"{way}, {busy} busy: {rates[f'{way}, {busy} busy'][-1]:.0f} pairs/s")
            finally:
                for program in programs:
                    program.kill()
    first, *_ = rates.values()
    rows = {}
    for name, each in rates.items():
        relative = [a / b for a, b in zip(each, first, strict=True)]
        spread = {"median": statistics.median(relative), "min": min(relative), "max": max(relative)}
        rows[name] = {"pairs_per_s": each, "rate relative to the first": spread}
    what = f"Demo training, {STEPS} steps a run, {options.rounds} rounds, {os.cpu_count()} cores"
    known = json.loads(options.results.read_text()) if options.results.is_file() else {}
    runtime.write_json(
        options.results, known | {"what": what, "rates": rows} | runtime.how_made("experiments/crowded.py")
    )


if __name__ == "__main__":
    runtime.guarded(main)
