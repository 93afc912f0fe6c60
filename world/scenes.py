"""The built-in world on disk: pictures, captions, twins, foils and questions, all determined by a seed.

    python -m world.scenes --out data/scenes             32 x 32 pictures of two objects on one axis
    python -m world.scenes --out data/full --level full  64 x 64, three to five objects, sizes, clutter, a covered area
    python -m world.scenes --out data/nlvr --level nlvr  400 x 100, three boxes of items or towers: see towers.py

Each task has files for train, val, test and novel, in the schemas of reading/rows.py: `pairs` for pre-training,
`foils` and `grounding`; questions.py adds `vqa`, `reasoning` and, if the level has covered areas, `entailment`.

How to read it: start with shapes.py, which defines what a scene is and which meanings are true of it. All samples are
generated in the same order: sample a meaning, derive its foils or its twin, then sample a scene in which the caption
holds and the foils do not.

The splits test two kinds of generalisation:

    novel combinations   some (colour, shape) pairs occur in no picture or text of train, val and test, only in novel
    held-out meanings    some keys (two colours, two shapes) occur in no relation of train and val, in any binding,
                         order or axis, so that the training captions carry no information about their foils

The text alone is uninformative: replacing a caption by a foil is as likely as replacing that foil by the caption.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from world import statements, towers, written
from world.questions import count_of, questions_of, tasks_of
from world.shapes import (
    DRAW,
    LEVELS,
    Count,
    Description,
    Exists,
    Meaning,
    Related,
    Scene,
    World,
    clear,
    differ,
    draw_count,
    facts,
    found,
    holds,
    key,
    make_world,
    mirrored,
    render,
    reverse,
    status,
    swap,
    tell,
    told_apart,
    turn,
    words,
)

VERSION = 3  # increment when the same arguments start to produce different files, so that no outdated world is reused

# ---------------------------------------------------------------------------------------------------------------- foils


def neighbours(meaning: Related, attribute: str, world: World) -> list[Related]:
    """All meanings of the same status that differ in one attribute of one object."""
    values = {"colour": world.level.colours, "shape": world.level.shapes, "size": tuple(world.level.sizes)}[attribute]
    others = []
    for side, value in product(("first", "second"), values):
        what = getattr(meaning, side)
        if getattr(what, attribute) not in (None, value):
            others.append(replace(meaning, **{side: replace(what, **{attribute: value})}))
    return [
        other
        for other in others
        if (other.first.colour, other.first.shape) != (other.second.colour, other.second.shape)
        and status(other, world) == status(meaning, world)
    ]


def altered(meaning: Related, attribute: str, world: World, rng: random.Random) -> Related | None:
    """Replace one attribute of one object at random, so that no meaning is more frequent in foils than in captions.

    Uniform sampling favours meanings with many neighbours. The Metropolis rule makes both directions equally likely:
    accept with probability (own neighbours / neighbours of the proposal), else the row has no foil of this kind.
    """
    choices = neighbours(meaning, attribute, world)
    if not choices:
        return None
    other = rng.choice(choices)
    return other if rng.random() * len(neighbours(other, attribute, world)) < len(choices) else None


def foils_of(meaning: Related, world: World, rng: random.Random) -> dict[str, Related]:
    """One incorrect meaning of each kind that is possible for a relation."""
    foils = {"swap": swap(meaning, world), "relation": reverse(meaning), "axis": turn(meaning, rng)}
    foils |= {attribute: altered(meaning, attribute, world, rng) for attribute in ("colour", "shape", "size")}
    return {kind: foil for kind, foil in foils.items() if foil}


# ----------------------------------------------------------------------------------------------------------- the splits


@dataclass(frozen=True)
class Sample:
    """One picture and its texts, from which the rows of several tasks are written."""

    tasks: tuple[str, ...]
    scene: Scene
    caption: str
    heldout: bool
    twin: int | None = None
    foils: dict[str, str] | None = None


DIFFERENCES = ("places", "colours", "places", "axis", "places", "colours", "places", "places")  # of twins, in rotation


def twins(number: int, world: World, rng: random.Random) -> list[Sample]:
    """Two training samples with the same objects that differ in their colours, their places or their axis.

    A caption of a relation is false of the twin's picture, so every batch contains hard negatives that are very rare in
    random batches. A relation may mention either object first, but a caption of a single object always names the first
    in reading order (left or upper), which ties content to place: in trials with one seed, contrast reached 93 %
    accuracy on relation foils after 500 steps; with the object sampled at random, 51 % after 500 and after 1,250.
    """
    kind = rng.choices(("related", "single", "count"), world.level.weights)[0]
    difference = DIFFERENCES[number % len(DIFFERENCES)]
    # The caption of a single object names the one that comes first in reading order, in both pictures.
    if kind == "single" and difference in ("places", "axis"):
        difference = rng.choice(("colours", "turned"))
    elif kind == "count" and difference == "colours":  # exchanging the colours could change the count
        difference = "places"
    meaning = tell(rng.choice(world.pools["exchangeable" if difference == "colours" else "seen"]), world, rng)
    claim = draw_count(world.ordinary, rng) if kind == "count" else meaning
    side = "first" if meaning.relation in ("left of", "above") else "second"
    style = rng.randrange(world.level.styles)
    while True:
        scene = DRAW[world.name](claim, world, rng)
        other, twin = differ(difference, meaning, scene, world, rng)
        if kind == "single":  # one caption for both, unless exchanging colours makes it false of the twin
            captions = [Exists(getattr(m, side)) for m in (meaning, other)]
        else:
            captions = [claim, claim] if kind == "count" else [meaning, rng.choice((other, mirrored(other)))]
        if told_apart(captions, [scene, twin]) and told_apart(captions[::-1], [twin, scene]):
            break
    # Only one twin yields grounding rows, because the other shows the same objects, mostly under the same names.
    return [
        Sample(tasks, s, words(caption, style), False, twin=number)
        for tasks, caption, s in zip((("pairs", "grounding"), ("pairs",)), captions, (scene, twin), strict=True)
    ]


def gallery(split: str, size: int, world: World, rng: random.Random) -> list[Sample]:
    """Samples with foils, in which each caption is true of one picture only; half of test is held out."""
    shares = {"val": {"seen": size}, "test": {"heldout": size // 2, "seen": size - size // 2}, "novel": {"novel": size}}
    samples, told, shown = [], set(), set()
    for pool, share in shares[split].items():
        wanted = len(samples) + share
        for plain in rng.sample(world.pools[pool], len(world.pools[pool])):
            if len(samples) == wanted:
                break
            if plain in shown:
                continue
            meaning = tell(plain, world, rng)
            foils = foils_of(meaning, world, rng)
            scene = find_scene(meaning, foils, told, world, rng)
            told.add(plain)
            shown |= facts(scene)
            style = rng.randrange(world.level.styles)
            texts = {kind: words(foil, style) for kind, foil in foils.items()}
            heldout = key(meaning) in world.heldout
            samples.append(Sample(("pairs", "foils", "grounding"), scene, words(meaning, style), heldout, foils=texts))
        if len(samples) < wanted:
            raise ValueError(
                f"{split} needs {share} {pool} captions of different meaning, the world has only "
                f"{len(samples) - wanted + share}: give a smaller --{'val' if split == 'val' else 'test'}"
            )
    rng.shuffle(samples)
    return samples


def find_scene(
    meaning: Related | Count, foils: dict[str, Meaning], told: set[Related], world: World, rng: random.Random
) -> Scene:
    """A scene in which the caption holds, but none of its foils and no caption of another picture."""
    while True:
        scene = DRAW[world.name](meaning, world, rng)
        if clear(meaning, scene) and not any(holds(foil, scene) for foil in foils.values()) and not facts(scene) & told:
            return scene


def counting(split: str, size: int, world: World, rng: random.Random) -> Iterator[Sample]:
    """Samples for foils of kind count, with pictures of their own, because their captions are true of many pictures."""
    for _ in range(size):
        meaning = draw_count(world.ordinary, rng)
        if split == "novel":
            meaning = Count(Description(*rng.choice(sorted(world.novel))), meaning.number)
        foil = replace(meaning, number=rng.choice([number for number in (1, 2, 3) if number != meaning.number]))
        scene = find_scene(meaning, {}, set(), world, rng)
        style = rng.randrange(world.level.styles)
        yield Sample(("foils",), scene, words(meaning, style), False, foils={"count": words(foil, style)})


def count_size(split: str, size: int, world: World) -> int:
    """The number of samples of kind count in a split."""
    return size // 2 if split != "train" and "count" in world.level.other_kinds else 0


def samples_of(split: str, size: int, world: World) -> Iterator[Sample]:
    """The samples of a split, generated from its own seed, so that no split depends on the size of another one."""
    rng = random.Random(f"{world.seed} {split}")
    if split == "train":
        for number in range(size // 2):
            yield from twins(number, world, rng)
        return
    yield from gallery(split, size, world, rng)
    yield from counting(split, count_size(split, size, world), world, rng)


# ---------------------------------------------------------------------------------------------------------------- files


def scene_row(scene: Scene) -> dict:
    """A scene as a JSON object, without the fields that its level does not use."""
    row = {"background": scene.background, "objects": [vars(thing) for thing in scene.objects]}
    if scene.cover:
        row |= {"cover": scene.cover, "hidden": [vars(thing) for thing in scene.hidden], "clutter": scene.clutter}
    return row


def pair_rows(sample: Sample, world: World) -> list[dict]:
    """One row for pre-training and retrieval."""
    twin = {} if sample.twin is None else {"twin": sample.twin}
    return [{"caption": sample.caption, **twin}]


def foil_rows(sample: Sample, world: World) -> list[dict]:
    """One row for discriminating the caption from its foils."""
    return [{"caption": sample.caption, "foils": sample.foils}]


def grounding_rows(sample: Sample, world: World) -> list[dict]:
    """One row per object that is unique in colour and shape ("a red circle"): its box, and all boxes as proposals.

    If a picture shows novel combinations, only those are referred to.
    """
    things, rows = sample.scene.objects, []
    novel = [thing for thing in things if (thing.colour, thing.shape) in world.novel]
    for thing in novel or things:
        what = Description(thing.colour, thing.shape)
        if len(found(what, sample.scene)) == 1:
            row = {"text": words(Exists(what)), "boxes": [thing.box], "proposals": [other.box for other in things]}
            rows.append(row)
    return rows


# task: function that returns the fields of a sample's rows beyond image, heldout and scene
ROWS = {"pairs": pair_rows, "foils": foil_rows, "grounding": grounding_rows}


def describe(world: World, sizes: dict[str, int]) -> dict:
    """The content of world.json: the arguments, and everything derived from them except the rows."""
    return {
        "version": VERSION,
        "level": world.name,
        "seed": world.seed,
        "pairs": sizes,
        "novel_combinations": sorted(map(list, world.novel)),
        "heldout_colours_and_shapes": [[list(colours), list(shapes)] for colours, shapes in sorted(world.heldout)],
        "foil_kinds_with_twins": list(world.level.twin_kinds),
        "foil_kinds_without_twins": list(world.level.other_kinds),
    }


def write_pairs(split: str, size: int, world: World, folder: Path, bar: tqdm) -> None:
    """Write the pictures of a split, and one JSONL file for each task on single pictures and their captions."""
    (folder / "images" / split).mkdir(parents=True)
    lines = {}
    for number, sample in enumerate(samples_of(split, size, world)):
        image = write_picture(sample.scene, f"images/{split}/{number:06d}.png", world, folder)
        for task in sample.tasks:
            about = {"heldout": sample.heldout, "scene": scene_row(sample.scene)}
            lines.setdefault(task, []).extend({"image": image, **row, **about} for row in ROWS[task](sample, world))
        bar.update()
    for task, rows in lines.items():
        write_rows(folder / f"{task}_{split}.jsonl", rows)


def write_questions(task: str, split: str, size: int, world: World, folder: Path, bar: tqdm) -> None:
    """Write the pictures and the JSONL file of one of the tasks in questions.py."""
    (folder / "images" / f"{task}_{split}").mkdir(parents=True)
    rows, count = [], 0
    for asked in questions_of(task, split, size, world):
        images = []
        for scene in asked.scenes:
            images.append(write_picture(scene, f"images/{task}_{split}/{count:06d}.png", world, folder))
            count += 1
        for places, keys in asked.rows:
            if task == "reasoning":
                pictures = {"images": [images[place] for place in places]}
                rows.append(pictures | keys | {"scenes": [scene_row(asked.scenes[place]) for place in places]})
            else:
                rows.append({"image": images[0], **keys, "scene": scene_row(asked.scenes[0])})
        bar.update()
    write_rows(folder / f"{task}_{split}.jsonl", rows)


def write_picture(scene: Scene, name: str, world: World, folder: Path) -> str:
    """Render a scene to a file -> the file name"""
    Image.fromarray(render(scene, world.level.picture)).save(folder / name, compress_level=1)
    return name


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one row per line."""
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8", newline="\n")


def fill_world(world: World, sizes: dict[str, int], folder: Path, bar: tqdm) -> None:
    """Write all files of the levels easy and full."""
    for split, size in sizes.items():
        write_pairs(split, size, world, folder, bar)
        for task in tasks_of(world):
            write_questions(task, split, size, world, folder, bar)


def fill_boxes(seed: int, sizes: dict[str, int], folder: Path, bar: tqdm) -> None:
    """Write all files of the level nlvr, whose tasks share their pictures."""
    for split, size in sizes.items():
        (folder / "images" / split).mkdir(parents=True)
        lines: dict[str, list[dict]] = {}
        for number, (picture, tasks) in enumerate(statements.samples(split, size, seed)):
            image = f"images/{split}/{number:06d}.png"
            Image.fromarray(towers.render(picture)).save(folder / image, compress_level=1)
            for task, rows in tasks.items():
                shown = {"images": [image]} if task == "reasoning" else {"image": image}
                lines.setdefault(task, []).extend(shown | row for row in rows)
            bar.update()
        for task, rows in lines.items():
            write_rows(folder / f"{task}_{split}.jsonl", rows)


def write_world(out: Path, description: dict, total: int, fill: Callable[[Path, tqdm], None]) -> None:
    """Write all files of a world atomically, replacing an earlier world and leaving all other files alone."""
    with written.replacing(out, "world") as folder:
        with tqdm(total=total, desc=f"drawing level {description['level']}", unit=" samples") as bar:
            fill(folder, bar)
        (folder / "world.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def is_there(out: Path, description: dict, force: bool) -> bool:
    """Whether a folder already holds the requested world, which can then be kept.

    Raises:  ValueError if the folder holds another world (--force replaces it) or files that we did not write
    """
    if not out.exists():
        return False
    if out.is_dir() and all(path.name.startswith(written.TEMPORARY) for path in out.iterdir()):
        return False  # empty, except for the temporary files of a killed run
    if not (out / "world.json").is_file():
        if "world" in written.listed(out):
            return False  # the run was killed while it was moving its files
        raise ValueError(f"{out} exists and is not a world made by scenes.py: choose another --out")
    same = json.loads((out / "world.json").read_text(encoding="utf-8")) == description
    if not same and not force:
        raise ValueError(f"{out} holds a world made with other arguments: pass --force to replace it, or another --out")
    return same and not force


def main(arguments: list[str] | None = None) -> None:
    """Command-line entry point: generate a world, unless it already exists."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="output folder (default: %(default)s)")
    parser.add_argument("--level", choices=(*LEVELS, "nlvr"), default="easy", help="difficulty (default: %(default)s)")
    parser.add_argument("--train", type=int, default=20000, help="training samples, in pairs of twins (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="validation pairs (%(default)s)")
    parser.add_argument("--test", type=int, default=500, help="test pairs, and as many for novel (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a different world in --out")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}: give 0 or more")
    if args.train % 2 or min(args.train, args.val, args.test) < 2:
        raise ValueError(f"--train {args.train} --val {args.val} --test {args.test}: expected 2 or more, --train even")
    if args.train + args.val + args.test > 10**7:
        raise ValueError(f"--train {args.train} --val {args.val} --test {args.test}: give at most ten million in all")
    # The training split comes last, so that a size that the world cannot provide is reported early.
    sizes = {"val": args.val, "test": args.test, "novel": args.test, "train": args.train}
    if args.level == "nlvr":
        del sizes["novel"]
        if args.val % 2 or args.test % 2:
            raise ValueError(
                f"--val {args.val} --test {args.test}: pictures of level nlvr come in pairs, give even numbers"
            )
        total, fill = sum(sizes.values()), partial(fill_boxes, args.seed, sizes)
        description = {"version": VERSION, "level": args.level, "seed": args.seed, "pairs": sizes}
    else:
        world = make_world(args.level, args.seed)
        total = sum(size + count_size(split, size, world) for split, size in sizes.items())
        total += sum(count_of(task, size) for size in sizes.values() for task in tasks_of(world))
        description, fill = describe(world, sizes), partial(fill_world, world, sizes)
    if is_there(args.out, description, args.force):
        print(f"{args.out} holds this world already: nothing to do (--force draws it again)")
        return
    write_world(args.out, description, total, fill)
    print(f"{args.out} holds {sizes}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # user errors end with one sentence instead of a traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
