"""Why do the masked losses not pay on the built-in world? One change to MAMO at a time, judged on val.

    python experiments/trial/why.py "half the patches hidden" 0          one variant, one seed -> a row
    python experiments/trial/why.py --results results/trial/why.json     all rows -> a file of results

A run makes 1,000 steps on the built-in world (data/scenes), then learns to answer questions from 3,000 of them. A row
holds figures on val, in percent: mean of R@1 both ways, re-ranked and by contrast; mean over the kinds of foils, by
matching; pointing; accuracy on questions. Rows of finished runs are kept in runs/trial/why/rows.jsonl, and a finished
run is not repeated.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mamo  # noqa: E402
import runtime  # noqa: E402
import train  # noqa: E402

OUT, DATA, STEPS = ROOT / "runs/trial/why", "data/scenes", 1000
OPTIONS = {  # variants that are options of train.py
    "mamo": "",
    "control": "--objective control",
    "weights of MRM and MIM 0.25": "--w-mrm 0.25 --w-mim 0.25",
    "momentum 0": "--ema 0",
    "momentum 0.995": "--ema 0.995",
    "half the patches hidden": "--mask-image 0.5",
}
CHANGES = {}  # variants that change the model: a function of a run that has not begun


def change(name: str):
    """Name a function as a variant."""
    return lambda function: CHANGES.setdefault(name, function)


@change("targets not normalised")
def targets_not_normalised(run: train.Run) -> None:
    """The teacher's outputs as they are, without layer norm."""
    mamo.normalised = lambda target: target.float()


@change("MRM at patches only")
def patches_only(run: train.Run) -> None:
    """MRM's first half alone."""

    def loss_mrm(at_patches, patch_target, at_words, word_target, valid):
        return mamo.global_mean((run.model.mrm_image_head(at_patches).float() - patch_target).square().mean(dim=-1))

    run.model.loss_mrm = loss_mrm
    run.model.mrm_text_head.requires_grad_(False)


@change("MRM at words only")
def words_only(run: train.Run) -> None:
    """MRM's second half alone."""

    def loss_mrm(at_patches, patch_target, at_words, word_target, valid):
        words = (run.model.mrm_text_head(at_words).float() - word_target).square().mean(dim=-1)
        return mamo.global_mean(words, valid)

    run.model.loss_mrm = loss_mrm
    run.model.mrm_image_head.requires_grad_(False)


@change("matching sees hidden patches too")
def matching_sees_hidden_patches(run: train.Run) -> None:
    """Every second picture that matching reads is the one with 75 % of its patches hidden."""
    encode, views = run.model.encode_whole_and_masked, run.model.matching_views
    masked = {}

    def encode_and_keep(*inputs):
        image, text = encode(*inputs)
        masked["image"] = image["masked"]
        return image, text

    def matching_views(pair, *rest):
        every_second = torch.arange(len(pair.image))[:, None, None] % 2 == 1
        return views(pair._replace(image=torch.where(every_second, masked["image"], pair.image)), *rest)

    run.model.encode_whole_and_masked, run.model.matching_views = encode_and_keep, matching_views


@change("no masked patches in the last tenth")
def no_masked_patches_in_the_last_tenth(run: train.Run) -> None:
    """As FLIP does: for the last 100 steps the losses that hide patches, MRM and MIM, are off."""
    after_step, config = run.model.after_step, run.model.config

    def switch_off(progress: float) -> None:
        after_step(progress)
        config.w_mrm = config.w_mim = 0.0 if 0.9 <= progress < 1 else 1.0  # the checkpoint keeps the weights

    run.model.after_step = switch_off


def command(*words) -> None:
    """Run a command of the project."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure(variant: str, seed: int) -> dict:
    """Train, evaluate on val, fine-tune on questions -> a row."""
    folder = OUT / f"{''.join(letter if letter.isalnum() else '-' for letter in variant)}-{seed}"
    given = f"--data {DATA}/pairs_train.jsonl --steps {STEPS} --seed {seed} {OPTIONS.get(variant, '')}"
    run = train.start(*train.parse([*given.split(), "--out", str(folder)]))
    if variant in CHANGES:
        CHANGES[variant](run)
    run.train()
    evaluate, results = ["--checkpoint", folder / "checkpoint.pt", "--results", folder / "results.json"], {}
    for task in ("retrieval", "foils", "grounding"):
        schema = "pairs" if task == "retrieval" else task
        command("eval.py", task, *evaluate, "--data", f"{DATA}/{schema}_val.jsonl")
    questions = ["vqa", "--data", f"{DATA}/few_vqa.jsonl", "--val", f"{DATA}/vqa_val.jsonl", "--steps", 750]
    rates = ["--lr", "1e-3", "--lr-head", "4e-3", "--seed", seed]
    tuned = folder / "vqa"
    command("finetune.py", *questions, *rates, "--init", folder / "checkpoint.pt", "--out", tuned)
    command("eval.py", "vqa", "--checkpoint", tuned / "best.pt", "--data", f"{DATA}/vqa_val.jsonl", *evaluate[2:])
    for name, result in json.loads((folder / "results.json").read_text(encoding="utf-8")).items():
        results[name.split()[0]] = result
    sides = ("image_to_text", "text_to_image")
    return {
        "variant": variant,
        "seed": seed,
        "re-ranked R@1": statistics.mean(results["retrieval"]["matching"][side]["R@1"] for side in sides),
        "contrast R@1": statistics.mean(results["retrieval"]["contrast"][side]["R@1"] for side in sides),
        "foils": statistics.mean(results["foils"]["matching"].values()),
        "pointing": results["grounding"]["pointing"]["value"],
        "questions": results["vqa"]["accuracy"]["value"],
    }


def main() -> None:
    """Command line."""
    parser = runtime.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("variant", nargs="?", choices=[*OPTIONS, *CHANGES])
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--results", type=Path, help="file of results to write from all rows")
    options = parser.parse_args()
    path = OUT / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if options.variant and (options.variant, options.seed) not in [(row["variant"], row["seed"]) for row in rows]:
        torch.set_num_threads(1)
        row = measure(options.variant, options.seed)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row)
    if options.results:
        found = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            mine = found.setdefault(row["variant"], {"seeds": []})
            mine["seeds"].append(row["seed"])
            for name in list(row)[2:]:
                mine.setdefault(name, {"values": []})["values"].append(row[name])
        for mine in found.values():
            for one in list(mine.values())[1:]:
                one["mean"] = statistics.mean(one["values"])
                one["std"] = statistics.stdev(one["values"]) if len(one["values"]) > 1 else 0.0
        what = "MAMO with one change at a time, 1,000 steps on the built-in world, figures on val in percent"
        made = runtime.how_made("experiments/trial/why.py")
        runtime.write_json(options.results, {"what": what} | made | {"chance": chances(), "variants": found})


def chances() -> dict[str, float]:
    """Chance of each figure: of R@1 among 500, of a foil, of pointing and of the most frequent answer on val."""
    one = next(OUT.glob("mamo-*/results.json"))
    results = {name.split()[0]: result for name, result in json.loads(one.read_text(encoding="utf-8")).items()}
    recall = results["retrieval"]["chance"]["image_to_text"]["R@1"]
    rest = {"pointing": results["grounding"]["pointing"]["chance"], "questions": results["vqa"]["accuracy"]["chance"]}
    return {"re-ranked R@1": recall, "contrast R@1": recall, "foils": 50.0} | rest


if __name__ == "__main__":
    runtime.guarded(main)
