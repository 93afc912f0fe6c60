"""A synthetic world of coloured shapes: pictures, captions, twins and foils, deterministic from a seed.

    python scenes.py --out data/scenes               32 x 32 pictures of two objects on one axis
    python scenes.py --out data/full --level full    64 x 64, three to five objects, sizes, clutter, a covered area

How to read it: a *scene* says what stands where; a *meaning* is a claim about a scene; `holds(meaning, scene)` is the
one definition of truth; `words(meaning)` puts a meaning into a sentence. Everything on disk is made in one order: draw
a meaning, derive its foils or its twin from it, then draw a scene in which the caption holds and the rest does not.

What a model can be asked although it was never shown:

    novel combinations   some pairs (colour, shape) are in no picture and no text of train, val and test, only of novel
    held-out meanings    some keys (two colours, two shapes) are in no relation told in train and val, with all their
                         bindings, orders and axes, so that knowing the training captions is no hint on their foils

Text alone tells nothing: going from a caption to a foil is as likely as going from that foil to that caption.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 2  # counts up when the same arguments begin to give other files, so that an old world is not kept by mistake

COLOURS = {  # far from each other and from light paper
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "cyan": (60, 200, 215),
    "orange": (240, 135, 30),
    "black": (20, 20, 20),
}
# Grey levels of the paper. Not mid grey: that is 0 after normalisation, so an empty patch would be its position alone,
# which the first layer norm blows up; in a trial, R@1 on val after 500 steps was 16 % on grey and 34 % on light paper.
PAPER = (225, 243)
SHAPES = {  # True inside; u to the right and v downwards, both from -1 to 1 across the box, which every shape touches
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: 2 * abs(u) <= v + 1,
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) <= 0.25,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.45),
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
}


@dataclass(frozen=True)
class Level:
    """What a level shows and says. Weights are those of relation, single-object and count captions in training."""

    picture: int  # width and height in pixels
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: dict[str, tuple[int, int]]  # name: smallest and largest extent in pixels
    styles: int  # how many wordings of one meaning are used, the plainest first
    weights: tuple[float, float, float]
    twin_kinds: tuple[str, ...] = ("swap", "relation", "axis")  # foils that the twins of training teach
    other_kinds: tuple[str, ...] = ("colour", "shape")


LEVELS = {
    "easy": Level(32, tuple(COLOURS)[:6], tuple(SHAPES)[:5], {"medium": (11, 13)}, 1, (0.8, 0.2, 0.0)),
    "full": Level(
        64,
        tuple(COLOURS),
        tuple(SHAPES),
        {"small": (8, 9), "large": (15, 16)},
        8,
        (0.6, 0.2, 0.2),
        other_kinds=("colour", "shape", "size", "count"),
    ),
}

# -------------------------------------------------------------------------------------------------- scenes and meanings


@dataclass(frozen=True)
class Object:
    """A coloured shape in a picture; box is (x, y, width, height) in pixels."""

    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. The first two objects are those by which twins differ."""

    background: int  # grey level
    objects: tuple[Object, ...]  # what is seen
    cover: tuple[int, int, int, int] | None = None  # box of the covered area
    hidden: tuple[Object, ...] = ()  # what is behind the cover: no pixel shows it
    clutter: tuple[tuple[int, int, int, int, int], ...] = ()  # (x, y, width, height, difference in grey) of faint marks


@dataclass(frozen=True)
class Description:
    """What is said of one object; None is not said."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Exists:
    """At least one such object is seen."""

    what: Description


@dataclass(frozen=True)
class Count:
    """Exactly so many such objects are seen."""

    what: Description
    number: int


@dataclass(frozen=True)
class Related:
    """A first object stands left of, right of, above or below a second."""

    first: Description
    relation: str
    second: Description


Meaning = Exists | Count | Related

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TRANSPOSED = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
AXIS = {"left of": 0, "right of": 0, "above": 1, "below": 1}
ALIGNED = 3  # centres of two objects on one axis differ by at most so many pixels across it


def found(what: Description, scene: Scene) -> list[Object]:
    """The visible objects that a description fits."""
    return [
        thing
        for thing in scene.objects
        if what.colour in (None, thing.colour) and what.shape in (None, thing.shape) and what.size in (None, thing.size)
    ]


def stands(a: Object, relation: str, b: Object) -> bool:
    """Whether two boxes are apart along the axis of the relation, in its order, and aligned across it."""
    axis = AXIS[relation]
    near, far = (a.box, b.box) if relation in ("left of", "above") else (b.box, a.box)
    gap = far[axis] - (near[axis] + near[axis + 2])
    offset = (far[1 - axis] + far[3 - axis] / 2) - (near[1 - axis] + near[3 - axis] / 2)
    return gap >= 1 and abs(offset) <= ALIGNED


def holds(meaning: Meaning, scene: Scene) -> bool:
    """Whether a meaning is true of what is seen in a scene: the one definition of truth."""
    match meaning:
        case Exists(what):
            return bool(found(what, scene))
        case Count(what, number):
            return len(found(what, scene)) == number
        case Related(first, relation, second):
            return any(stands(a, relation, b) for a in found(first, scene) for b in found(second, scene))


# ---------------------------------------------------------------------------------------------------------------- words

RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
EXISTS_FRAMES = ("{}", "there is {}", "a picture of {}", "one can see {}")
COUNT_FRAMES = ("{}", "there {be} {}", "a picture of {}", "exactly {}")
RELATED_FRAMES = ("{}", "there is {}", "a picture of {}", "{a} is {r} {b}")
NUMBERS = ("no", "one", "two", "three", "four", "five")


def phrase(what: Description) -> str:
    """The description without an article: large red circle."""
    return " ".join(filter(None, (what.size, what.colour, what.shape or "object")))


def words(meaning: Meaning, style: int = 0) -> str:
    """A sentence for a meaning. Style 0 is the plain one; a caption and its foils share their style."""
    frame, synonym = style % 4, style // 4
    match meaning:
        case Exists(what):
            return EXISTS_FRAMES[frame].format(f"a {phrase(what)}")
        case Count(what, number):
            ending = "" if number == 1 else "es" if what.shape == "cross" else "s"
            text = f"{NUMBERS[number]} {phrase(what)}{ending}"
            return COUNT_FRAMES[frame].format(text, be="is" if number == 1 else "are")
        case Related(first, relation, second):
            a, r, b = f"a {phrase(first)}", RELATION_WORDS[relation][synonym], f"a {phrase(second)}"
            return RELATED_FRAMES[frame].format(f"{a} {r} {b}", a=a, r=r, b=b)


# ------------------------------------------------------------------------------------------------------------ the world


@dataclass(frozen=True)
class World:
    """What may be shown and said where. Pools hold every relation between two different objects once, without sizes."""

    name: str
    level: Level
    seed: int
    novel: frozenset[tuple[str, str]]  # (colour, shape)
    ordinary: tuple[tuple[str, str], ...]  # all other combinations
    heldout: frozenset[tuple]  # keys
    pools: dict[str, list[Related]]  # seen, exchangeable (a part of seen), heldout, novel


def key(meaning: Related) -> tuple:
    """What all bindings, orders and axes of two objects share: their colours and their shapes."""
    pair = (meaning.first, meaning.second)
    return tuple(sorted(what.colour for what in pair)), tuple(sorted(what.shape for what in pair))


def make_world(name: str, seed: int) -> World:
    """Choose the novel combinations and the held-out meanings, and sort all relations into pools."""
    level, rng = LEVELS[name], random.Random(f"{seed} world")
    # One combination for each shape, of different colours: every colour and every shape is still seen in others.
    novel = frozenset(zip(rng.sample(level.colours, len(level.shapes)), level.shapes, strict=True))
    combinations = [Description(colour, shape) for colour, shape in product(level.colours, level.shapes)]
    ordinary = tuple((what.colour, what.shape) for what in combinations if (what.colour, what.shape) not in novel)
    # One of two equivalent meanings: "left of" and "above" speak for "right of" and "below".
    meanings = [Related(a, relation, b) for a, b in permutations(combinations, 2) for relation in ("left of", "above")]
    pools = {"novel": [meaning for meaning in meanings if count_novel(meaning, novel)]}
    rest = [meaning for meaning in meanings if not count_novel(meaning, novel)]
    counts = Counter(map(key, rest))
    keys, heldout = rng.sample(sorted(counts), len(counts)), set()
    while sum(counts[held] for held in heldout) < 0.21 * len(rest):  # 21 %: enough for 500 test captions of level easy
        heldout.add(keys.pop())
    pools["heldout"] = [meaning for meaning in rest if key(meaning) in heldout]
    pools["seen"] = [meaning for meaning in rest if key(meaning) not in heldout]
    world = World(name, level, seed, novel, ordinary, frozenset(heldout), pools)
    pools["exchangeable"] = [meaning for meaning in pools["seen"] if swap(meaning, world)]
    return world


def count_novel(meaning: Related, novel: frozenset[tuple[str, str]]) -> int:
    """How many of the two objects are novel combinations."""
    return sum((what.colour, what.shape) in novel for what in (meaning.first, meaning.second))


def status(meaning: Related, world: World) -> tuple[int, bool]:
    """What a caption and its foils must share, since training texts tell it: novel objects, and whether held out."""
    return count_novel(meaning, world.novel), key(meaning) in world.heldout


def mirrored(meaning: Related) -> Related:
    """The same meaning, told from the other object."""
    return Related(meaning.second, OPPOSITE[meaning.relation], meaning.first)


def tell(meaning: Related, world: World, rng: random.Random) -> Related:
    """Choose which object is mentioned first and, where the level has sizes, which sizes are mentioned."""
    meaning = rng.choice((meaning, mirrored(meaning)))
    if len(world.level.sizes) == 1:
        return meaning
    first, second = rng.choices((*world.level.sizes, None, None), k=2)
    return Related(replace(meaning.first, size=first), meaning.relation, replace(meaning.second, size=second))


# ---------------------------------------------------------------------------------------------------------------- foils


def swap(meaning: Related, world: World) -> Related | None:
    """Exchange the colours of the two objects; none where only the order would change, or the status."""
    first, second = meaning.first, meaning.second
    if first.colour == second.colour or first.shape == second.shape:
        return None
    other = Related(replace(first, colour=second.colour), meaning.relation, replace(second, colour=first.colour))
    return other if status(other, world) == status(meaning, world) else None


def reverse(meaning: Related) -> Related:
    """The opposite relation between the same objects."""
    return replace(meaning, relation=OPPOSITE[meaning.relation])


def turn(meaning: Related, rng: random.Random) -> Related:
    """A relation on the other axis between the same objects."""
    return replace(meaning, relation=rng.choice([r for r in AXIS if AXIS[r] != AXIS[meaning.relation]]))


def neighbours(meaning: Related, attribute: str, world: World) -> list[Related]:
    """All meanings of the same status in which one attribute of one object is another."""
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

    A meaning with many neighbours would be reached too often. Keeping a draw with chance (own neighbours / neighbours
    of the draw) makes both directions equally likely, the rule of Metropolis; otherwise the row lacks this kind.
    """
    choices = neighbours(meaning, attribute, world)
    if not choices:
        return None
    other = rng.choice(choices)
    return other if rng.random() * len(neighbours(other, attribute, world)) < len(choices) else None


def foils_of(meaning: Related, world: World, rng: random.Random) -> dict[str, Related]:
    """One wrong meaning of each kind that exists for a relation."""
    foils = {"swap": swap(meaning, world), "relation": reverse(meaning), "axis": turn(meaning, rng)}
    foils |= {attribute: altered(meaning, attribute, world, rng) for attribute in ("colour", "shape", "size")}
    return {kind: foil for kind, foil in foils.items() if foil}


# ------------------------------------------------------------------------------------------------------- drawing scenes


def place(colour: str, shape: str, size: str, pixels: int, centre: tuple[int, int]) -> Object:
    """An object of so many pixels around a centre."""
    return Object(colour, shape, size, (centre[0] - pixels // 2, centre[1] - pixels // 2, pixels, pixels))


def embody(what: Description, centre: tuple[int, int], world: World, rng: random.Random) -> Object:
    """An object that a description fits; what is not said is drawn, never as a novel combination."""
    colour, shape, size = what.colour, what.shape, what.size or rng.choice(tuple(world.level.sizes))
    if colour is None or shape is None:
        colour, shape = rng.choice([c for c in world.ordinary if colour in (None, c[0]) and shape in (None, c[1])])
    return place(colour, shape, size, rng.randint(*world.level.sizes[size]), centre)


def draw_easy(meaning: Related, world: World, rng: random.Random) -> Scene:
    """The two objects of a relation on one axis, the pair anywhere in the picture."""
    distance = rng.randint(14, 18)
    start, across = rng.randint(7, 25 - distance), rng.randint(8, 24)
    centres = [(start, across), (start + distance, across + rng.randint(-1, 1))]
    if AXIS[meaning.relation] == 1:
        centres = [(x, y) for y, x in centres]
    if meaning.relation in ("right of", "below"):
        centres.reverse()
    pair = (meaning.first, meaning.second)
    objects = tuple(embody(what, centre, world, rng) for what, centre in zip(pair, centres, strict=True))
    return Scene(rng.randint(*PAPER), objects)


def draw_full(meaning: Related | Count, world: World, rng: random.Random) -> Scene:
    """Three to five objects in the cells of a jittered 3 x 3 grid, a cover over an empty one, faint marks anywhere."""
    cells = rng.sample(list(product(range(3), range(3))), 9)
    if isinstance(meaning, Related):
        wanted = [meaning.first, meaning.second]
        line, ends = rng.randrange(3), sorted(rng.sample(range(3), 2))
        pair = [(end, line) if AXIS[meaning.relation] == 0 else (line, end) for end in ends]
        if meaning.relation in ("right of", "below"):
            pair.reverse()
        cells = pair + [cell for cell in cells if cell not in pair]
    else:  # the second object is another one, so that exchanging the places of the first two changes the picture
        wanted = [meaning.what, Description()] + [meaning.what] * (meaning.number - 1)
    wanted += [Description()] * (rng.randint(3, 5) - len(wanted))
    shift_x, shift_y = rng.randint(-2, 2), rng.randint(-2, 2)
    middles = [(12 + 20 * column + shift_x, 12 + 20 * row + shift_y) for column, row in cells]
    centres = [(x + rng.randint(-1, 1), y + rng.randint(-1, 1)) for x, y in middles]
    objects = tuple(embody(what, centre, world, rng) for what, centre in zip(wanted, centres, strict=False))
    x, y = middles[len(wanted)]
    hidden = tuple(embody(Description(), centres[len(wanted)], world, rng) for _ in range(rng.randrange(2)))
    clutter = tuple(
        (rng.randrange(61), rng.randrange(61), rng.randint(1, 3), rng.randint(1, 3), rng.choice((-12, 12)))
        for _ in range(rng.randint(8, 16))
    )
    return Scene(rng.randint(*PAPER), objects, (x - 10, y - 10, 20, 20), hidden, clutter)


DRAW = {"easy": draw_easy, "full": draw_full}


def clear(meaning: Meaning, scene: Scene) -> bool:
    """Whether a caption holds and each object it relates is the only one that its description fits."""
    if isinstance(meaning, Related) and not len(found(meaning.first, scene)) == len(found(meaning.second, scene)) == 1:
        return False
    return holds(meaning, scene)


def places_exchanged(scene: Scene) -> Scene:
    """The first two objects exchange their places."""
    a, b, *rest = scene.objects
    middle_a, middle_b = ((x + w // 2, y + h // 2) for x, y, w, h in (a.box, b.box))
    a = place(a.colour, a.shape, a.size, a.box[2], middle_b)
    b = place(b.colour, b.shape, b.size, b.box[2], middle_a)
    return replace(scene, objects=(a, b, *rest))


def transposed(scene: Scene) -> Scene:
    """The picture's rows become its columns, so left of becomes above; the shapes themselves stay upright."""

    def over(things: tuple[Object, ...]) -> tuple[Object, ...]:
        return tuple(replace(t, box=(t.box[1], t.box[0], t.box[3], t.box[2])) for t in things)

    cover = scene.cover and (scene.cover[1], scene.cover[0], scene.cover[3], scene.cover[2])
    clutter = tuple((y, x, h, w, difference) for x, y, w, h, difference in scene.clutter)
    return replace(scene, objects=over(scene.objects), cover=cover, hidden=over(scene.hidden), clutter=clutter)


def exchanged(scene: Scene) -> Scene:
    """The first two objects exchange their colours."""
    a, b, *rest = scene.objects
    return replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour), *rest))


# ----------------------------------------------------------------------------------------------------------- the splits


@dataclass(frozen=True)
class Sample:
    """One picture and its texts, to be written as one row of each of its tasks."""

    tasks: tuple[str, ...]
    scene: Scene
    caption: str
    heldout: bool
    twin: int | None = None
    foils: dict[str, str] | None = None


DIFFERENCES = ("places", "colours", "places", "axis", "places", "colours", "places", "places")  # of twins, in turn


def twins(number: int, world: World, rng: random.Random) -> list[Sample]:
    """Two training samples of the same objects that differ in their colours, their places or the axis they stand on.

    A relation caption is false of the twin's picture, so every batch asks what a random one hardly ever would. Either
    object may be mentioned first, but a caption of a single object names the one that is read first, the left or upper
    one. That ties content to place: in trials of one seed, relation foils stood at 93 % by contrast after 500 steps;
    with the named object drawn at random, at 51 % after 500 and after 1,250.
    """
    kind = rng.choices(("related", "single", "count"), world.level.weights)[0]
    difference = DIFFERENCES[number % len(DIFFERENCES)]
    # The caption of a single object names the one that is read first, here and there.
    if kind == "single" and difference in ("places", "axis"):
        difference = rng.choice(("colours", "turned"))
    elif kind == "count" and difference == "colours":  # other colours could be another count
        difference = "places"
    meaning = tell(rng.choice(world.pools["exchangeable" if difference == "colours" else "seen"]), world, rng)
    claim = draw_count(world.ordinary, rng) if kind == "count" else meaning
    side = "first" if meaning.relation in ("left of", "above") else "second"
    style = rng.randrange(world.level.styles)
    while True:
        scene = DRAW[world.name](claim, world, rng)
        other, twin = differ(difference, meaning, scene, world, rng)
        if kind == "single":  # one caption for both arrangements, but for exchanged colours one that denies the twin
            captions = [Exists(getattr(m, side)) for m in (meaning, other)]
        else:
            captions = [claim, claim] if kind == "count" else [meaning, rng.choice((other, mirrored(other)))]
        if told_apart(captions, [scene, twin]) and told_apart(captions[::-1], [twin, scene]):
            break
    return [
        Sample(("pairs",), s, words(caption, style), False, twin=number)
        for caption, s in zip(captions, (scene, twin), strict=True)
    ]


def differ(difference: str, meaning: Related, scene: Scene, world: World, rng: random.Random) -> tuple[Related, Scene]:
    """The scene with one difference, and the meaning that is then true."""
    if difference == "colours":
        return swap(meaning, world), exchanged(scene)
    if difference == "places" or (difference == "axis" and rng.random() < 0.5):
        meaning, scene = reverse(meaning), places_exchanged(scene)
    if difference in ("axis", "turned"):
        meaning, scene = replace(meaning, relation=TRANSPOSED[meaning.relation]), transposed(scene)
    return meaning, scene


def told_apart(captions: list[Meaning], scenes: list[Scene]) -> bool:
    """Whether the first caption is clear in the first scene and false of the second, unless both captions are one."""
    return clear(captions[0], scenes[0]) and (captions[0] == captions[1] or not holds(captions[0], scenes[1]))


def draw_count(combinations: tuple[tuple[str, str], ...], rng: random.Random) -> Count:
    """One, two or three objects of a colour, of a shape or of both."""
    colour, shape = rng.choice(combinations)
    what = rng.choice((Description(colour), Description(None, shape), Description(colour, shape)))
    return Count(what, rng.randint(1, 3))


def facts(scene: Scene) -> set[Related]:
    """Every relation between two objects of a scene, in the form of the pools."""
    return {
        Related(Description(a.colour, a.shape), relation, Description(b.colour, b.shape))
        for a, b in permutations(scene.objects, 2)
        for relation in ("left of", "above")
        if stands(a, relation, b)
    }


def gallery(split: str, size: int, world: World, rng: random.Random) -> list[Sample]:
    """Samples with foils, each of whose captions is true of one picture only; half of test is held out."""
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
    """A scene in which the caption holds, the foils do not, nor any caption told of other pictures."""
    while True:
        scene = DRAW[world.name](meaning, world, rng)
        if clear(meaning, scene) and not any(holds(foil, scene) for foil in foils.values()) and not facts(scene) & told:
            return scene


def counting(split: str, size: int, world: World, rng: random.Random) -> Iterator[Sample]:
    """Samples for the foils of kind count: pictures of their own, since their captions are true of many."""
    for _ in range(size):
        meaning = draw_count(world.ordinary, rng)
        if split == "novel":
            meaning = Count(Description(*rng.choice(sorted(world.novel))), meaning.number)
        foil = replace(meaning, number=rng.choice([number for number in (1, 2, 3) if number != meaning.number]))
        scene = find_scene(meaning, {}, set(), world, rng)
        style = rng.randrange(world.level.styles)
        yield Sample(("foils",), scene, words(meaning, style), False, foils={"count": words(foil, style)})


def count_size(split: str, size: int, world: World) -> int:
    """How many samples of kind count a split has."""
    return size // 2 if split != "train" and "count" in world.level.other_kinds else 0


def samples_of(split: str, size: int, world: World) -> Iterator[Sample]:
    """The samples of a split, from a generator of its own, so that no split depends on the size of another."""
    rng = random.Random(f"{world.seed} {split}")
    if split == "train":
        for number in range(size // 2):
            yield from twins(number, world, rng)
        return
    yield from gallery(split, size, world, rng)
    yield from counting(split, count_size(split, size, world), world, rng)


# ------------------------------------------------------------------------------------------------------------- pictures


@cache
def sprite(shape: str, pixels: int) -> np.ndarray:
    """How much of each pixel a shape covers, (pixels, pixels, 1), from 8 x 8 points a pixel."""
    at = (np.arange(8 * pixels) + 0.5) / (4 * pixels) - 1
    inside = SHAPES[shape](at[None, :], at[:, None]) & np.ones((8 * pixels, 8 * pixels), dtype=bool)
    return inside.reshape(pixels, 8, pixels, 8).mean(axis=(1, 3), dtype=np.float32)[..., None]


def render(scene: Scene, extent: int) -> np.ndarray:
    """The picture of a scene, (extent, extent, 3) of bytes."""
    pixels = np.full((extent, extent, 3), scene.background, dtype=np.float32)
    for x, y, w, h, difference in scene.clutter:
        pixels[y : y + h, x : x + w] = scene.background + difference
    for thing in scene.objects:
        x, y, w, h = thing.box
        region = pixels[y : y + h, x : x + w]
        region += sprite(thing.shape, w) * (np.array(COLOURS[thing.colour], dtype=np.float32) - region)
    if scene.cover:
        x, y, w, h = scene.cover
        stripes = (np.arange(w)[None, :] + np.arange(h)[:, None]) % 4 < 2
        pixels[y : y + h, x : x + w] = np.where(stripes, 90, 165)[..., None]
    return pixels.round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- files


def scene_row(scene: Scene) -> dict:
    """A scene for JSON; what the level has not is left out."""
    row = {"background": scene.background, "objects": [vars(thing) for thing in scene.objects]}
    if scene.cover:
        row |= {"cover": scene.cover, "hidden": [vars(thing) for thing in scene.hidden], "clutter": scene.clutter}
    return row


def pair_rows(sample: Sample, world: World) -> list[dict]:
    """A row for pre-training and retrieval."""
    twin = {} if sample.twin is None else {"twin": sample.twin}
    return [{"caption": sample.caption, **twin}]


def foil_rows(sample: Sample, world: World) -> list[dict]:
    """A row for choosing the caption over wrong ones."""
    return [{"caption": sample.caption, "foils": sample.foils}]


def grounding_rows(sample: Sample, world: World) -> list[dict]:
    """A row for each object that colour and shape name alone, "a red circle": its box, and all boxes as proposals.

    Of a picture that shows novel combinations, only those are asked for.
    """
    things, rows = sample.scene.objects, []
    novel = [thing for thing in things if (thing.colour, thing.shape) in world.novel]
    for thing in novel or things:
        what = Description(thing.colour, thing.shape)
        if len(found(what, sample.scene)) == 1:
            row = {"text": words(Exists(what)), "boxes": [thing.box], "proposals": [other.box for other in things]}
            rows.append(row)
    return rows


# task: what the rows of a sample hold beside image, heldout and scene
ROWS = {"pairs": pair_rows, "foils": foil_rows, "grounding": grounding_rows}


def describe(world: World, sizes: dict[str, int]) -> dict:
    """The content of world.json: arguments, and everything that follows from them but the rows."""
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


def write_split(split: str, size: int, world: World, folder: Path, bar: tqdm) -> None:
    """Pictures of a split and one JSONL file for each of its tasks."""
    (folder / "images" / split).mkdir(parents=True)
    lines = {}
    for number, sample in enumerate(samples_of(split, size, world)):
        image = f"images/{split}/{number:06d}.png"
        Image.fromarray(render(sample.scene, world.level.picture)).save(folder / image, compress_level=1)
        for task in sample.tasks:
            about = {"heldout": sample.heldout, "scene": scene_row(sample.scene)}
            rows = [{"image": image, **row, **about} for row in ROWS[task](sample, world)]
            lines.setdefault(task, []).extend(map(json.dumps, rows))
        bar.update()
    for task, rows in lines.items():
        (folder / f"{task}_{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def write_world(world: World, sizes: dict[str, int], out: Path) -> None:
    """Write all files beside the place they go to and move them there at the end: nothing is ever half-made."""
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        total = sum(size + count_size(split, size, world) for split, size in sizes.items())
        with tqdm(total=total, desc=f"drawing level {world.name}", unit=" pictures") as bar:
            for split, size in sizes.items():
                write_split(split, size, world, folder, bar)
        (folder / "world.json").write_text(json.dumps(describe(world, sizes), indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_there(out: Path, description: dict, force: bool) -> bool:
    """Whether a folder holds the world already and is to be left alone.

    Raises:  ValueError if it holds something else: another world (--force replaces it) or files that are not ours
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "world.json").is_file():
        raise ValueError(f"{out} exists and is not a world made by scenes.py: choose another --out")
    same = json.loads((out / "world.json").read_text(encoding="utf-8")) == description
    if not same and not force:
        raise ValueError(f"{out} holds a world made with other arguments: pass --force to replace it, or another --out")
    return same and not force


def main(arguments: list[str] | None = None) -> None:
    """Command line: make a world, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder to write (default: %(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="easy", help="default: %(default)s")
    parser.add_argument("--train", type=int, default=20000, help="training pairs, two by two twins (%(default)s)")
    parser.add_argument("--val", type=int, default=500, help="pairs for validation (%(default)s)")
    parser.add_argument("--test", type=int, default=500, help="pairs for test, and again for novel (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace another world that is in --out")
    args = parser.parse_args(arguments)
    if args.train % 2 or min(args.train, args.val, args.test) < 2:
        raise ValueError(f"--train {args.train} --val {args.val} --test {args.test}: expected 2 or more, --train even")
    # Training last: a size that the world cannot meet is found before most of the work.
    sizes = {"val": args.val, "test": args.test, "novel": args.test, "train": args.train}
    world = make_world(args.level, args.seed)
    if is_there(args.out, describe(world, sizes), args.force):
        print(f"{args.out} holds this world already: nothing to do (--force draws it again)")
        return
    write_world(world, sizes, args.out)
    print(f"{args.out} holds {sizes}, novel combinations: {sorted(map(' '.join, world.novel))}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a user's mistake ends with its sentence, not with a traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
