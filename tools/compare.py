"""Controlled comparison of configurations: a plan of arms and seeds, one result row per run, means and deviations.

    python -m tools.compare experiments/table6.json --out runs/table6              one run after another
    python -m tools.compare experiments/table6.json --out runs/table6 --side-by-side 2      two runs in parallel
    python -m tools.compare experiments/table6.json --out runs/table6 --results results/table6.json     keep the summary

A plan is a JSON file:

    {"what": "one sentence for the summary",
     "train": "--data data/scenes/pairs_train.jsonl",           options of train.py for all arms
     "arms": {"all": "", "without MRM": "--w-mrm 0"},           options of each arm
     "evaluate": "world --data data/scenes",                    command and options of eval.py
     "seeds": [0, 1, 2], "steps": 1000,
     "reference": "all", "equal": ["steps", "wall-clock"],      wall-clock: as long as the reference takes
     "columns": {"R@1": ["pairs_test/matching/image_to_text/R@1", ...], "ITM loss": ["log/itm"]},
     "against": "all",                                          also report differences from this arm
     "rates": {"all": 1.0, "without MRM": 0.8}}                 seconds per step; measured if not given

A column shows the first of its paths that exists in a run's row: a path into results.json or, if it starts with log/,
into the last row of log.csv. With "script": "finetune.py", a plan compares fine-tuning runs: "train" then begins with
the task, and best.pt is evaluated. "evaluate" may be a list of commands, and {seed} in any option stands for the seed
of the run. All paths, including those in a plan, are relative to the working directory.

To equalise wall-clock time, we first measure the seconds per step of all arms, which take turns step by step so that a
slowdown of the machine affects all of them equally; these rates determine each arm's number of steps. To resume
interrupted runs, start the same command again; finished runs are not repeated.

Differences are paired by seed. We report their mean and its 95 % confidence interval from Student's t distribution
(`difference`). The sample size is the number of seeds, so few seeds yield wide intervals.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import finetune
import runtime
import train
from reading.rows import each_once

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Plan:
    """The specification of a comparison, see the module docstring."""

    what: str
    train: str
    arms: dict[str, str]
    evaluate: str | list[str]
    steps: int
    reference: str
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    equal: list[str] = field(default_factory=lambda: ["steps"])
    columns: dict[str, list[str]] = field(default_factory=dict)
    script: str = "train.py"
    against: str = ""
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        try:
            runtime.check_fields(Plan, vars(self), "the plan")
        except ValueError as fault:
            raise ValueError(f"a value is of another kind than --help says: {fault}") from fault
        if self.evaluate == [] or not all(abs(rate) < 1e9 for rate in self.rates.values()):
            raise ValueError("a value is of another kind than --help says: give a command, and finite rates")
        if self.script not in SCRIPTS:
            raise ValueError(f"the script is {self.script!r}: use {' or '.join(SCRIPTS)}")
        if self.reference not in self.arms:
            raise ValueError(f"the reference {self.reference!r} is not among the arms: use one of {list(self.arms)}")
        if self.against and self.against not in self.arms:
            raise ValueError(f"against is {self.against!r}, which is not an arm: use one of {list(self.arms)}")
        if self.rates and (set(self.rates) != set(self.arms) or not min(self.rates.values()) > 0):
            raise ValueError(f"rates are {self.rates}: give each arm's seconds per step, or leave rates out")
        if not self.equal or not set(self.equal) <= {"steps", "wall-clock"}:
            raise ValueError(f'equal is {self.equal}: give "steps", "wall-clock" or both')
        if not self.seeds or self.steps < 1:
            raise ValueError(f"seeds {self.seeds}, steps {self.steps}: give at least one of each")
        if any(type(seed) is not int for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: give whole numbers, each once, as a run counts once")
        folders: dict[str, str] = {}
        for arm, options in self.arms.items():
            other = folders.setdefault(folder_name(arm).lower(), arm)
            if other != arm:
                raise ValueError(f"the arms {other!r} and {arm!r} would share a folder: give them other names")
            for word in shlex.split(f"{self.train} {options}"):
                if word.partition("=")[0] in ("--out", "--steps", "--seed", "--resume"):
                    raise ValueError(f"the plan gives {word} to {arm!r}: leave it out, it follows from the plan")


FREE = ("what", "columns", "seeds", "against", "rates")  # fields of a plan that may change while its runs are kept

# script: function that starts a run, command-line parser, checkpoint to evaluate
SCRIPTS = {
    "train.py": (train.start, train.parse, "checkpoint.pt"),
    "finetune.py": (finetune.start, finetune.parse, "best.pt"),
}


def folder_name(arm: str) -> str:
    """The form of an arm's name that the folder names of its runs contain."""
    return "".join(letter if letter.isalnum() else "-" for letter in arm)


@dataclass(frozen=True)
class Job:
    """One run: an arm trained for a number of steps from one seed."""

    arm: str
    steps: int
    seed: int

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        return f"{folder_name(self.arm)}-{self.steps}-{self.seed}"


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises ValueError, with a one-sentence message, for a plan that cannot be run."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a plan, see --help")
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once))
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a plan ({error}): see --help for its keys") from error


def read_rows(path: Path) -> dict[Job, dict]:
    """The rows of finished runs. An incomplete line, e.g. after a crash, is reported and its run evaluated again."""
    rows = {}
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            row = json.loads(line or "null")
            rows |= {Job(row["arm"], row["steps"], row["seed"]): row} if line else {}
        except (ValueError, LookupError, TypeError):
            print(f"{path}:{number} is no row, was it cut short? Its run is evaluated again", file=sys.stderr)
    return rows


def seconds_per_step(plan: Plan, rounds: int = 25) -> dict[str, float]:
    """The median seconds per training step of each arm, including data loading and optimiser; the arms take turns."""
    with tempfile.TemporaryDirectory() as folder:
        runs, seconds = {}, {arm: [] for arm in plan.arms}
        make_run, parse, _ = SCRIPTS[plan.script]
        for number, (arm, options) in enumerate(plan.arms.items()):
            given = f"{plan.train} {options} --steps {plan.steps} --out {folder}/{number}"
            run = make_run(*parse(shlex.split(given.replace("{seed}", str(plan.seeds[0])))))
            runs[arm] = run, run.batches()
        for counted in range(-5, rounds):
            for arm, (run, batches) in runs.items():
                start = time.perf_counter()
                run.one_step(batches)
                if counted >= 0:
                    seconds[arm].append(time.perf_counter() - start)
    return {arm: statistics.median(times) for arm, times in seconds.items()}


def steps_of(plan: Plan, rates: dict[str, float]) -> dict[str, dict[str, int]]:
    """The number of steps per arm under each constraint: {"steps": {arm: steps}, "wall-clock": {arm: steps}}."""
    steps = {"steps": dict.fromkeys(plan.arms, plan.steps)}
    if "wall-clock" in plan.equal:
        budget = plan.steps * rates[plan.reference]
        steps["wall-clock"] = {arm: max(round(budget / rates[arm]), 1) for arm in plan.arms}
    return {kind: steps[kind] for kind in plan.equal}


def flat(value, name: str = "") -> dict[str, float]:
    """All numbers in a nested result, keyed by their paths."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
    return {path: number for key, part in items for path, number in flat(part, f"{name}/{key}".strip("/")).items()}


class Comparison:
    """A plan, the folder of its runs, and the rows of its finished runs."""

    def __init__(self, plan: Plan, out: Path, side_by_side: int, table_only: bool = False):
        """table_only: measure nothing and write nothing"""
        self.plan, self.out, self.side_by_side = plan, out, side_by_side
        self.threads = max((os.cpu_count() or 1) // side_by_side, 1)
        self.rates = self.measured_rates(table_only)
        self.steps = steps_of(plan, self.rates)
        self.path, self.lock = out / "rows.jsonl", threading.Lock()
        self.rows, self.failed = read_rows(self.path), []

    def measured_rates(self, table_only: bool) -> dict[str, float]:
        """The seconds per step of each arm, measured once and saved, because the numbers of steps depend on them.

        From then on, the folder belongs to one plan: nothing that would affect its runs may change.
        """
        decides = {name: value for name, value in vars(self.plan).items() if name not in FREE}
        path, kept = self.out / "seconds_per_step.json", self.out / "plan.json"
        if not path.is_file():
            if table_only:
                raise ValueError(f"{self.out} holds no runs of a plan: give their --out, or leave --table-only out")
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            rates = self.plan.rates or seconds_per_step(self.plan)
            torch.set_num_threads(before)
            runtime.write_json(kept, decides)
            runtime.write_json(path, rates)
        if not kept.is_file() and not table_only:
            runtime.write_json(kept, decides)
        if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != decides:
            raise ValueError(f"{self.out} holds the runs of another plan: give another --out")
        return json.loads(path.read_text(encoding="utf-8"))

    def jobs(self) -> list[Job]:
        """All runs without duplicates, ordered by seed, so that every arm has a first result early."""
        wanted = [(arm, steps) for kind in self.steps.values() for arm, steps in kind.items()]
        return [Job(arm, steps, seed) for seed in self.plan.seeds for arm, steps in dict.fromkeys(wanted)]

    def run(self) -> None:
        """Execute all unfinished runs, several in parallel; if one fails, those already running are completed."""
        todo = deque(job for job in self.jobs() if job not in self.rows)
        seconds = sum(job.steps * self.rates[job.arm] for job in todo) / self.side_by_side
        print(f"{len(self.jobs())} runs, {len(self.jobs()) - len(todo)} finished", end="; ")
        print(f"about {seconds / 60:.0f} minutes of training left, evaluation not counted", flush=True)
        with tqdm(total=len(todo), desc="runs", dynamic_ncols=True) as bar:

            def work() -> None:
                while todo and not self.failed:
                    try:
                        job = todo.popleft()
                    except IndexError:
                        return
                    try:
                        self.run_one(job)
                    except BaseException as error:  # an exception in a thread would otherwise go unnoticed
                        self.failed.append(f"{job.folder}: {type(error).__name__}: {error}")
                    bar.update()

            workers = [threading.Thread(target=work) for _ in range(self.side_by_side)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        self.failed += [f"{job.folder} has no row" for job in self.jobs() if job not in self.rows]
        if self.failed:
            raise ValueError(f"a run failed: {self.failed[0]}; what is finished is kept, start again to go on")

    def run_one(self, job: Job) -> None:
        """Train and evaluate in separate processes, then write the result row."""
        plan, folder = self.plan, self.out / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, judged = folder / "checkpoint.pt", folder / SCRIPTS[plan.script][2]

        def words(options: str) -> list[str]:
            return shlex.split(options.replace("{seed}", str(job.seed)))

        training = words(f"{plan.train} {plan.arms[job.arm]} --steps {job.steps} --seed {job.seed}")
        evaluations = [plan.evaluate] if isinstance(plan.evaluate, str) else plan.evaluate
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        start = time.perf_counter()
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            for command in (
                [ROOT / plan.script, *training, "--out", folder, "--resume"],
                *([ROOT / "eval.py", *words(evaluation), "--checkpoint", judged] for evaluation in evaluations),
            ):
                command = [sys.executable, *map(str, command)]
                ended = subprocess.run(command, env=environment, stdout=output, stderr=output)
                if ended.returncode:
                    self.failed.append(f"{job.folder}, see {folder / 'output.txt'}")
                    return
        if runtime.load_checkpoint(checkpoint)["step"] < job.steps:
            self.failed.append(f"{job.folder} was interrupted")
            return
        with open(folder / "log.csv", newline="", encoding="utf-8") as file:
            log = list(csv.DictReader(file))
        row = {"arm": job.arm, "steps": job.steps, "seed": job.seed, "seconds": time.perf_counter() - start}
        row["pairs_per_s"] = statistics.median(float(line["pairs_per_s"]) for line in log if line["pairs_per_s"])
        row["peak_memory_mb"] = max(float(line["peak_memory_mb"]) for line in log if line["peak_memory_mb"])
        row |= {f"log/{name}": float(value) for name, value in log[-1].items() if value}  # the last values logged
        row |= flat(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        with self.lock:
            self.rows[job] = row
            text = "".join(json.dumps(one) + "\n" for one in self.rows.values())
            runtime.write_beside(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def summary(self) -> dict:
        """For each constraint and arm: steps, speed relative to the reference, means and standard deviations."""
        plan, arms = self.plan, {}
        for kind, steps in self.steps.items():
            for arm in plan.arms:
                rows = [self.rows[job] for seed in plan.seeds if (job := Job(arm, steps[arm], seed)) in self.rows]
                part = {"steps": steps[arm], "seeds": [row["seed"] for row in rows]}
                part["seconds_per_step_to_reference"] = self.rates[arm] / self.rates[plan.reference]
                for title, paths in plan.columns.items():
                    found = [[row[path] for path in paths if path in row][:1] for row in rows]
                    values = [value for one in found for value in one]
                    if values and len(values) == len(rows):
                        spread = statistics.stdev(values) if len(values) > 1 else 0.0
                        part[title] = {"mean": statistics.mean(values), "std": spread, "values": values}
                arms[f"equal {kind}: {arm}"] = part
            if plan.against:
                control = arms[f"equal {kind}: {plan.against}"]
                for arm in plan.arms:
                    add_differences(arms[f"equal {kind}: {arm}"], control, list(plan.columns))
        return arms


def add_differences(part: dict, control: dict, columns: list[str]) -> None:
    """Add to each column of an arm its "difference" from the control, if they have at least two seeds in common."""
    for title in columns:
        if part is not control and title in part and title in control:
            ours, theirs = (dict(zip(one["seeds"], one[title]["values"], strict=True)) for one in (part, control))
            differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            if len(differences) > 1:
                part[title]["difference"] = difference(differences)


# Student's t distribution: 97.5 % quantiles for 1, 2, 3, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def difference(values: list[float]) -> dict[str, float]:
    """Paired differences of two or more seeds -> {"mean", "low", "high"}: the mean and its 95 % confidence interval"""
    mean, freedom = statistics.mean(values), len(values) - 1
    half = T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(summary: dict, columns: list[str]) -> str:
    """Mean and standard deviation per arm and column, as a plain-text table."""
    wide = max(map(len, summary))
    lines = [f"{'':{wide}}  {'steps':>6} {'seeds':>5} {'time':>5}" + "".join(f"{title:>16}" for title in columns)]
    for arm, part in summary.items():
        cells = [f"{part[t]['mean']:.1f} ± {part[t]['std']:.1f}" if t in part else "" for t in columns]
        fixed = f"{part['steps']:>6} {len(part['seeds']):>5} {part['seconds_per_step_to_reference']:>5.2f}"
        lines.append(f"{arm:{wide}}  {fixed}" + "".join(f"{cell:>16}" for cell in cells))
        apart = [part[t]["difference"] if "difference" in part.get(t, {}) else None for t in columns]
        if any(apart):
            cells = [f"{one['low']:+.1f} to {one['high']:+.1f}" if one else "" for one in apart]
            lines.append(f"{'  difference':{wide}}  {'':17}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines) + "\n\ntime: seconds per step relative to the reference, all arms taking turns"


def main() -> None:
    """Command-line entry point: execute the missing runs of a plan, print the table and write the summary."""
    parser = runtime.Parser(
        prog="python -m tools.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="JSON file of the plan")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and their rows")
    parser.add_argument("--side-by-side", type=int, default=1, help="number of parallel runs, which share the cores")
    parser.add_argument("--results", type=Path, help="JSON file for the summary, with command and hardware")
    parser.add_argument("--table-only", action="store_true", help="show finished runs without running anything")
    options = parser.parse_args()
    if not 1 <= options.side_by_side <= 1000:
        raise ValueError(f"side_by_side is {options.side_by_side}: give 1 or more, and at most 1,000")
    runtime.check_outputs([options.results], [options.plan])
    comparison = Comparison(read_plan(options.plan), options.out, options.side_by_side, options.table_only)
    if not options.table_only:
        comparison.run()
    summary = comparison.summary()
    print(table(summary, list(comparison.plan.columns)))
    if options.results:
        report = {"what": comparison.plan.what} | runtime.how_made("-m tools.compare")
        report |= {"seeds": comparison.plan.seeds, "arms": summary}
        runtime.write_json(options.results, report)


if __name__ == "__main__":
    runtime.guarded(main)
