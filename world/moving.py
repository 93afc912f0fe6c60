"""The built-in world in motion: short videos whose meaning depends on time.

    python -m world.moving --out data/moving

A *meaning* states what happens; `words(meaning)` returns its caption; `frames(meaning, seed)` renders it as 9 frames of
32 x 32 pixels. The files have the same format as those of world.scenes, with "video" instead of "image".

Meanings can be told apart only by the order of the frames. `backwards(meaning)` is what the reversed video shows; it is
rendered as the same frames in reverse order. Three kinds of foils are captions of this reversed video:

    direction   a red circle moves right                          a red circle moves left
    mover       a red circle moves up and a blue ring moves down  a blue ring moves up and a red circle moves down
    order       a red circle blinks, then a blue ring swells      a blue ring swells, then a red circle blinks

A model that sees all frames but not their order therefore scores 50 %, and so does a model that sees only the middle
frame. We make no such claim for the other kinds: `path` (the two legs of a path exchanged) and `change` (grows for
shrinks, appears for goes away, or the two colours of a colour change exchanged).

Training videos come in pairs of twins: a video and its reverse, or a video and the same one with the two objects
exchanged. The text alone is uninformative, because a caption is as likely as its foil.
"""

import argparse
import random
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from world import written
from world.scenes import write_rows
from world.shapes import COLOURS, PAPER, SHAPES, paint

FRAMES, MIDDLE, EXTENT = 9, 4, 32
THINGS = tuple(f"{colour} {shape}" for colour, shape in product(tuple(COLOURS)[:6], tuple(SHAPES)[:5]))
STEPS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # x increases to the right, y downwards
BACK = {"right": "left", "left": "right", "up": "down", "down": "up"}
BACK |= {"grows": "shrinks", "shrinks": "grows", "appears": "goes away", "goes away": "appears"}
ACTS = ("blinks", "swells", "hops")  # each of these looks the same in reverse


@dataclass(frozen=True)
class Moves:
    """A thing moves along a path of one or two legs."""

    thing: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class Apart:
    """Two things move in opposite directions, side by side."""

    thing: str
    other: str
    way: str  # direction in which the first one moves


@dataclass(frozen=True)
class Passes:
    """One thing moves past another, which stays still."""

    thing: str
    other: str


@dataclass(frozen=True)
class Changes:
    """A thing grows, shrinks, appears, goes away, or changes its colour."""

    thing: str
    how: str  # "grows", "shrinks", "appears", "goes away", or the new colour


@dataclass(frozen=True)
class Then:
    """One thing acts, then another."""

    thing: str
    act: str
    other: str
    act_of_other: str


Meaning = Moves | Apart | Passes | Changes | Then


def words(meaning: Meaning) -> str:
    """The caption of a meaning."""
    match meaning:
        case Moves(thing, path):
            return f"a {thing} moves {', then '.join(path)}"
        case Apart(thing, other, way):
            return f"a {thing} moves {way} and a {other} moves {BACK[way]}"
        case Passes(thing, other):
            return f"a {thing} passes a {other}"
        case Changes(thing, how):
            return f"a {thing} {how}" if how in BACK else f"a {thing} turns {how}"
        case Then(thing, act, other, act_of_other):
            return f"a {thing} {act}, then a {other} {act_of_other}"


def backwards(meaning: Meaning) -> Meaning:
    """The meaning of the reversed video."""
    match meaning:
        case Moves(thing, path):
            return Moves(thing, tuple(BACK[way] for way in reversed(path)))
        case Apart(thing, other, way):
            return Apart(thing, other, BACK[way])
        case Passes():
            return meaning
        case Changes(thing, how):
            colour, shape = thing.split()
            return Changes(thing, BACK[how]) if how in BACK else Changes(f"{how} {shape}", colour)
        case Then(thing, act, other, act_of_other):
            return Then(other, act_of_other, thing, act)


def exchanged(meaning: Apart | Passes) -> Meaning:
    """The same event with the two things exchanged."""
    return replace(meaning, thing=meaning.other, other=meaning.thing)


def foils_of(meaning: Meaning) -> dict[str, str]:
    """Incorrect captions by kind, each as close to the correct caption as possible."""
    match meaning:
        case Moves(_, path) if len(path) == 2:
            other = replace(meaning, path=path[::-1])
            return {"direction": words(backwards(meaning)), "path": words(other)}
        case Moves():
            return {"direction": words(backwards(meaning))}
        case Apart():
            return {"mover": words(exchanged(meaning))}
        case Passes():
            return {"passer": words(exchanged(meaning))}
        case Changes():
            return {"change": words(backwards(meaning))}
        case Then():
            return {"order": words(backwards(meaning))}


def question_of(meaning: Meaning) -> tuple[str, str, str]:
    """A question about a video -> kind, question, answer"""
    match meaning:
        case Moves(thing, path):
            return "direction", f"which way does the {thing} move{' last' if len(path) == 2 else ''}?", path[-1]
        case Apart(thing, _, way):
            return "mover", f"what moves {way}?", thing
        case Passes(thing, _):
            return "passer", "what moves?", thing
        case Changes(thing, how):
            kind = thing.split()[1]
            return "change", f"what happens to the {kind}?", f"it {how}" if how in BACK else f"it turns {how}"
        case Then(thing):
            return "order", "which one is first?", thing


def draw_meaning(rng: random.Random) -> Meaning:
    """Sample a random meaning for a video."""
    thing, other = rng.sample(THINGS, 2)
    match rng.randrange(8):
        case 0 | 1:
            return Moves(thing, (rng.choice(tuple(STEPS)),))
        case 2:
            way = rng.choice(tuple(STEPS))
            turns = [turn for turn in STEPS if turn not in (way, BACK[way])]
            return Moves(thing, (way, rng.choice(turns)))
        case 3 | 4:
            return Apart(thing, other, rng.choice(tuple(STEPS)))
        case 5:
            return Passes(thing, other)
        case 6:
            colours = [colour for colour in tuple(COLOURS)[:6] if colour != thing.split()[0]]
            return Changes(thing, rng.choice(("grows", "shrinks", "appears", "goes away", rng.choice(colours))))
        case 7:
            return Then(thing, rng.choice(ACTS), other, rng.choice(ACTS))


# ------------------------------------------------------------------------------------------------------------- drawing


def frames(meaning: Meaning, seed: str) -> list[np.ndarray]:
    """The frames of a video, each (32, 32, 3) of uint8. With the same seed, frames(backwards(meaning)) are the same
    frames in reverse order, because the motion is symmetric around the middle frame."""
    rng = random.Random(seed)
    paper, middle = rng.randint(*PAPER), [rng.randint(14, 18) for _ in range(2)]
    lanes, near = rng.sample((8, 24), 2), rng.randint(9, 10)
    pictures = []
    for time in range(-MIDDLE, FRAMES - MIDDLE):
        # The background flickers by one grey level, because the WebP encoder would merge identical frames.
        pixels = np.full((EXTENT, EXTENT, 3), paper - time % 2, dtype=np.float32)
        for thing, centre, extent, strength in placed(meaning, time, middle, lanes, near):
            colour, shape = thing.split()
            rgb = tuple(strength * part + (1 - strength) * paper for part in COLOURS[colour])
            if strength:
                paint(pixels, shape, rgb, (centre[0] - extent // 2, centre[1] - extent // 2, extent, extent))
        pictures.append(pixels.round().astype(np.uint8))
    return pictures


def placed(meaning: Meaning, time: int, middle: list[int], lanes: list[int], extent: int) -> list[tuple]:
    """The objects that are visible `time` frames after the middle one: thing, centre, extent, opacity."""
    far = int(9 * time / MIDDLE)  # distance from the middle in pixels, symmetric in time
    match meaning:
        case Moves(thing, path):
            x, y = STEPS[path[0] if time < 0 else path[-1]]
            return [(thing, (middle[0] + far * x, middle[1] + far * y), extent, 1.0)]
        case Apart(thing, other, way):
            x, y = STEPS[way]
            first, second = sorted((thing, other)), lanes  # a thing keeps its lane when the video is reversed
            lane = dict(zip(first, second, strict=True))
            along = {thing: middle[0] + far * (x + y), other: middle[1] - far * (x + y)}
            return [
                (one, (along[one], lane[one]) if x else (lane[one], along[one]), extent, 1.0) for one in (thing, other)
            ]
        case Passes(thing, other):
            upright = middle[1] % 2 == 0
            centres = {thing: (middle[0] + far, lanes[0]), other: (middle[1], lanes[1])}
            return [(one, at[::-1] if upright else at, extent, 1.0) for one, at in centres.items()]
        case Changes(thing, how):
            if how in ("grows", "shrinks"):
                return [(thing, middle, extent + int(time if how == "grows" else -time), 1.0)]
            seen = 0.5 + np.sign(time) / 2  # opacity of the thing that appears
            if how in ("appears", "goes away"):
                return [(thing, middle, extent, seen if how == "appears" else 1 - seen)]
            parts = [(thing, 1 - seen), (f"{how} {thing.split()[1]}", seen)]
            return [(one, middle, extent, strength) for one, strength in sorted(parts) if strength]
        case Then(thing, act, other, act_of_other):
            lane = dict(zip(sorted((thing, other)), lanes, strict=True))
            acts = {thing: act if time in (-3, -2, -1) else "", other: act_of_other if time in (1, 2, 3) else ""}
            return [
                (
                    one,
                    (lane[one], middle[0] - 4 * (acts[one] == "hops")),
                    extent + 4 * (acts[one] == "swells"),
                    0.0 if acts[one] == "blinks" else 1.0,
                )
                for one in (thing, other)
            ]


# --------------------------------------------------------------------------------------------------------- the data set


def videos(split: str, size: int, seed: int) -> list[tuple[Meaning, list[np.ndarray], int | None]]:
    """`size` videos: their meaning, their frames and, for training, the index of the pair of twins."""
    made, rng = [], random.Random(f"{seed} {split}")
    while len(made) < size:
        meaning, look = draw_meaning(rng), f"{seed} {split} {len(made)}"
        if split != "train":
            made.append((meaning, frames(meaning, look), None))
            continue
        turn = isinstance(meaning, Passes) or (isinstance(meaning, Apart) and rng.random() < 0.5)
        twin = exchanged(meaning) if turn else backwards(meaning)
        made += [(one, frames(one, look), len(made) // 2) for one in (meaning, twin)]
    return made


def write(folder: Path, split: str, size: int, seed: int, bar: tqdm) -> None:
    """Write the files of all tasks for one split."""
    rows = {"pairs": [], "foils": [], "vqa": []}
    (folder / "videos" / split).mkdir(parents=True)
    for number, (meaning, pictures, twin) in enumerate(videos(split, size, seed)):
        name = f"videos/{split}/{number:06d}.webp"
        first, *rest = map(Image.fromarray, pictures)
        first.save(folder / name, save_all=True, append_images=rest, duration=150, loop=0, lossless=True, method=0)
        shown, (kind, question, answer) = {"video": name}, question_of(meaning)
        rows["pairs"].append(shown | {"caption": words(meaning)} | ({} if twin is None else {"twin": twin}))
        rows["vqa"].append(shown | {"question": question, "answers": {answer: 1.0}, "type": kind})
        if twin is None:
            rows["foils"].append(shown | {"caption": words(meaning), "foils": foils_of(meaning)})
        bar.update()
    for task, lines in rows.items():
        if lines:
            write_rows(folder / f"{task}_{split}.jsonl", lines)


def main(arguments: list[str] | None = None) -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/moving"), help="output folder (default: %(default)s)")
    parser.add_argument("--train", type=int, default=10000, help="training videos, in pairs of twins (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="number of validation videos (%(default)s)")
    parser.add_argument("--test", type=int, default=500, help="number of test videos (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}: give 0 or more")
    sizes = {"train": args.train, "val": args.val, "test": args.test}
    if args.train % 2 or min(sizes.values()) < 2:
        raise ValueError(f"--train {args.train} --val {args.val} --test {args.test}: expected 2 or more, --train even")
    if others := ", ".join(written.listed(args.out).keys() - {"moving"}):
        raise ValueError(f"{args.out} holds other data, {others}: give another --out")
    if sum(sizes.values()) > 10**7:
        raise ValueError(f"{sum(sizes.values())} videos: give at most ten million")
    with written.replacing(args.out, "moving") as folder, tqdm(total=sum(sizes.values()), desc="drawing") as bar:
        for split, size in sizes.items():
            write(folder, split, size, args.seed, bar)
    print(f"{args.out} holds {sizes}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
