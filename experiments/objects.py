"""The siblings' claims about where a model looks, tested on the built-in world.

    python experiments/objects.py --runs runs/demo_compare/mamo-2750-{seed} runs/demo_compare/control-4206-{seed}
                                  --pairs data/scenes/pairs_test.jsonl --phrases data/scenes/grounding_test.jsonl
                                  --results results/objects.json

    objects     VLMAE claims that a model attends to almost all critical patches. We count an object as critical if the
                caption's matching logit drops further when the object's patches are masked (by the picture's most
                frequent colour) than when equally many empty patches are; chance: 50 %. Named objects are separate
    attention   GLSCL is judged by the attention of a text to the region it names: the fraction of the attention to
                patches in the last fusion block that falls inside the region, for the head where it is largest, from
                [CLS] and from the words of a phrase; compared with the region's fraction of the picture

Each pattern of run folders is evaluated for the seeds 0 to 2, skipping seeds without a folder; we report the mean and
the spread over the seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from data import read_rows, size_of, to_tensor  # noqa: E402
from eval import load_model  # noqa: E402
from explain import filling, phrase_rows  # noqa: E402
from mamo import record_attention  # noqa: E402


def share_inside(box: list[float], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """box [x, y, width, height] in a picture of (width, height) -> (n,), the fraction of each patch inside the box"""
    (x, y, w, h), (width, height), (rows, columns) = box, size, grid

    def overlap(first: float, length: float, whole: int, count: int) -> Tensor:
        edges = torch.arange(count + 1) * whole / count
        return (edges[1:].clamp(max=first + length) - edges[:-1].clamp(min=first)).clamp(min=0) * count / whole

    return torch.outer(overlap(y, h, height, rows), overlap(x, w, width, columns)).flatten()


@torch.no_grad()
def critical_objects(model, tokenizer, rows: list[dict]) -> dict[str, list[bool]]:
    """Whether masking an object lowers the matching logit more than masking empty patches, for objects named or not."""
    found, config = {"named": [], "not named": []}, model.config
    for row in rows:
        image = to_tensor(row["image"], config.image_size)
        objects, size = row["scene"]["objects"], size_of(row["image"])
        touched = torch.stack([share_inside(one["box"], size, config.grid) > 0 for one in objects])
        empty = (~touched.any(dim=0)).nonzero().flatten()
        if not len(empty):
            continue
        views = [torch.zeros(config.num_patches, dtype=torch.bool)]
        for one in touched:
            hidden = torch.zeros_like(one)
            hidden[empty[: int(one.sum())]] = True  # equally many, or all there are
            views += [one, hidden]
        masks = torch.stack(views).view(-1, 1, *config.grid)
        pixels = masks.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
        images = torch.where(pixels, filling(image, "colour", config.patch_size), image)
        input_ids = torch.tensor([tokenizer.encode(row["caption"], config.max_tokens)]).expand(len(images), -1)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        logits = model.match(model.encode_image(images), model.encode_text(input_ids, real), real)
        for one, (without, control) in zip(objects, logits[1:].view(-1, 2).tolist(), strict=True):
            named = f"{one['colour']} {one['shape']}" in row["caption"]
            found["named" if named else "not named"].append(without < control)
    return found


@torch.no_grad()
def attention_inside(model, tokenizer, rows: list[dict]) -> dict[str, list[float]]:
    """For each phrase, the fraction of attention in its boxes, from [CLS] and from its words; and the boxes' area."""
    found, config, fusion = {"[CLS]": [], "words": [], "region": []}, model.config, model.student.fusion
    for row in rows:
        ids, _ = phrase_rows(tokenizer, row["text"], row["text"], config.max_tokens)
        inside = torch.stack([share_inside(box, size_of(row["image"]), config.grid) for box in row["boxes"]]).amax(
            dim=0
        )
        input_ids = torch.tensor([ids])
        real = torch.ones_like(input_ids, dtype=torch.bool)
        image = model.encode_image(to_tensor(row["image"], config.image_size)[None])
        with record_attention(*fusion.text_attention) as recorded:
            model.fuse(image, model.encode_text(input_ids, real), real)
        maps = fusion.text_to_patches(recorded[-1][0], len(ids))[0]  # (heads, tokens, patches)
        shares = ((maps * inside).sum(dim=-1) / maps.sum(dim=-1)).amax(dim=0)
        found["[CLS]"].append(shares[0].item())
        found["words"].append(shares[1:-1].mean().item())
        found["region"].append(inside.mean().item())
    return found


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="run folders, with {seed} in place of the seed")
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL file of pairs that include their scenes")
    parser.add_argument("--phrases", type=Path, required=True, help="JSONL file of grounding rows")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    pairs, phrases, arms = read_rows([options.pairs], "pairs"), read_rows([options.phrases], "grounding"), {}
    for pattern in options.runs:
        each = []
        for folder in (Path(pattern.format(seed=seed)) for seed in range(3 if "{seed}" in pattern else 1)):
            if (folder / "checkpoint.pt").is_file():
                model, tokenizer, _ = load_model(folder / "checkpoint.pt", torch.device("cpu"))
                objects, attention = (
                    critical_objects(model, tokenizer, pairs),
                    attention_inside(model, tokenizer, phrases),
                )
                parts = {f"objects, {name}": values for name, values in objects.items() if values}
                parts |= {f"attention, {name}": values for name, values in attention.items()}
                each.append({name: 100 * statistics.mean(values) for name, values in parts.items()})
        arm = arms[Path(pattern).name.partition("-")[0]] = {}
        for name in each[0]:
            values = [one[name] for one in each]
            arm[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
            arm[name]["values"] = values
        print(pattern, *(f"{name} {one['mean']:.1f}" for name, one in arm.items()), sep=", ")
        what = (
            "Share of objects whose hiding costs the match (chance 50), and of attention inside the region, in percent"
        )
        runtime.write_json(options.results, {"what": what, "arms": arms} | runtime.how_made("experiments/objects.py"))


if __name__ == "__main__":
    runtime.guarded(main)
