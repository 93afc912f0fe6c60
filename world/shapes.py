"""A world of coloured shapes: the objects in a picture, the claims that are true of it, its captions and its rendering.

A *scene* lists the objects in a picture; a *meaning* is a claim about a scene; `holds(meaning, scene)` is the single
source of truth; `words(meaning)` returns a sentence for a meaning; `render(scene)` draws a scene. scenes.py builds
datasets from scenes and meanings, and questions.py asks questions about them.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

import numpy as np

COLOURS = {  # well separated from each other and from the light background
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "cyan": (60, 200, 215),
    "orange": (240, 135, 30),
    "black": (20, 20, 20),
}
# Grey levels of the background. Normalisation would map mid grey to 0, and an empty patch to its position embedding,
# which the first layer norm amplifies; in a trial, R@1 on val after 500 steps was 16 % on mid and 34 % on light grey.
PAPER = (225, 243)
SHAPES = {  # True inside; u to the right and v downwards, from -1 to 1 across the box, whose sides every shape touches
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: 2 * abs(u) <= v + 1,
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) <= 0.25,
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.45),
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
}


@dataclass(frozen=True)
class Level:
    """The content of a level. weights: of captions of relations, single objects and counts in training."""

    picture: int  # width and height in pixels
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: dict[str, tuple[int, int]]  # name: minimum and maximum extent in pixels
    styles: int  # number of templates per kind of meaning, the plainest first
    weights: tuple[float, float, float]
    twin_kinds: tuple[str, ...] = ("swap", "relation", "axis")  # kinds of foils that resemble the training twins
    other_kinds: tuple[str, ...] = ("colour", "shape")
    covers: bool = False  # whether an area of each picture is covered


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
        covers=True,
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
    """A picture before rendering. Twins differ in their first two objects."""

    background: int  # grey level
    objects: tuple[Object, ...]  # the visible ones
    cover: tuple[int, int, int, int] | None = None  # box of the covered area
    hidden: tuple[Object, ...] = ()  # objects behind the cover, not visible in any pixel
    clutter: tuple[tuple[int, int, int, int, int], ...] = ()  # faint marks: (x, y, width, height, grey difference)


@dataclass(frozen=True)
class Description:
    """A partial description of one object; None = not mentioned."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Exists:
    """At least one such object is visible."""

    what: Description


@dataclass(frozen=True)
class Count:
    """Exactly, at least or at most `number` such objects are visible."""

    what: Description
    number: int
    bound: str = "exactly"


@dataclass(frozen=True)
class Related:
    """A first object is left of, right of, above or below a second one."""

    first: Description
    relation: str
    second: Description


Meaning = Exists | Count | Related

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TRANSPOSED = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
AXIS = {"left of": 0, "right of": 0, "above": 1, "below": 1}
ALIGNED = 3  # maximum distance in pixels between the centres of two aligned objects across the axis


def found(what: Description, scene: Scene) -> list[Object]:
    """The visible objects that match a description."""
    return [
        thing
        for thing in scene.objects
        if what.colour in (None, thing.colour) and what.shape in (None, thing.shape) and what.size in (None, thing.size)
    ]


def stands(a: Object, relation: str, b: Object) -> bool:
    """Whether two boxes are separated along the axis of the relation, in the stated order, and aligned across it."""
    axis = AXIS[relation]
    near, far = (a.box, b.box) if relation in ("left of", "above") else (b.box, a.box)
    gap = far[axis] - (near[axis] + near[axis + 2])
    offset = (far[1 - axis] + far[3 - axis] / 2) - (near[1 - axis] + near[3 - axis] / 2)
    return gap >= 1 and abs(offset) <= ALIGNED


def agrees(count: int, number: int, bound: str) -> bool:
    """Whether a count is exactly, at least or at most a number."""
    return {"exactly": count == number, "at least": count >= number, "at most": count <= number}[bound]


def holds(meaning: Meaning, scene: Scene) -> bool:
    """Whether a meaning is true of the visible objects of a scene: the single source of truth."""
    match meaning:
        case Exists(what):
            return bool(found(what, scene))
        case Count(what, number, bound):
            return agrees(len(found(what, scene)), number, bound)
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
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")


def phrase(what: Description) -> str:
    """The description without an article: large red circle."""
    return " ".join(filter(None, (what.size, what.colour, what.shape or "object")))


def plural(what: Description, number: int = 2) -> str:
    """The description in the form required by a number of objects: large red circles."""
    return phrase(what) + ("" if number == 1 else "es" if what.shape == "cross" else "s")


def words(meaning: Meaning, style: int = 0) -> str:
    """A sentence for a meaning. Style 0 is the plainest; a caption and its foils share a style."""
    frame, synonym = style % 4, style // 4
    match meaning:
        case Exists(what):
            return EXISTS_FRAMES[frame].format(f"a {phrase(what)}")
        case Count(what, number, bound):
            be = "is" if number == 1 else "are"
            text = f"{NUMBERS[number]} {plural(what, number)}"
            return COUNT_FRAMES[frame].format(text, be=be) if bound == "exactly" else f"there {be} {bound} {text}"
        case Related(first, relation, second):
            a, r, b = f"a {phrase(first)}", RELATION_WORDS[relation][synonym], f"a {phrase(second)}"
            return RELATED_FRAMES[frame].format(f"{a} {r} {b}", a=a, r=r, b=b)


# ------------------------------------------------------------------------------------------------------------ the world


@dataclass(frozen=True)
class World:
    """The content of each split. Pools hold every relation between two different objects once, without sizes."""

    name: str
    level: Level
    seed: int
    novel: frozenset[tuple[str, str]]  # (colour, shape)
    ordinary: tuple[tuple[str, str], ...]  # all other combinations
    heldout: frozenset[tuple]  # keys, see `key`
    pools: dict[str, list[Related]]  # seen, exchangeable (a part of seen), heldout, novel


def key(meaning: Related) -> tuple:
    """The colours and shapes of the two objects, which all bindings, orders and axes of a relation share."""
    pair = (meaning.first, meaning.second)
    return tuple(sorted(what.colour for what in pair)), tuple(sorted(what.shape for what in pair))


def make_world(name: str, seed: int) -> World:
    """Choose the novel combinations and the held-out meanings, and assign every relation to its pools."""
    level, rng = LEVELS[name], random.Random(f"{seed} world")
    # One combination per shape, all in different colours, so that every colour and every shape still occurs elsewhere.
    novel = frozenset(zip(rng.sample(level.colours, len(level.shapes)), level.shapes, strict=True))
    combinations = [Description(colour, shape) for colour, shape in product(level.colours, level.shapes)]
    ordinary = tuple((what.colour, what.shape) for what in combinations if (what.colour, what.shape) not in novel)
    # One of each two equivalent meanings: "left of" and "above" also represent "right of" and "below".
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
    """The number of objects in a relation that are novel combinations."""
    return sum((what.colour, what.shape) in novel for what in (meaning.first, meaning.second))


def status(meaning: Related, world: World) -> tuple[int, bool]:
    """(number of novel objects, held out or not): a caption and its foils share both, or the text reveals the foil."""
    return count_novel(meaning, world.novel), key(meaning) in world.heldout


def mirrored(meaning: Related) -> Related:
    """An equivalent meaning, stated from the perspective of the other object."""
    return Related(meaning.second, OPPOSITE[meaning.relation], meaning.first)


def tell(meaning: Related, world: World, rng: random.Random) -> Related:
    """Choose which object is mentioned first and, if the level has sizes, which sizes are mentioned."""
    meaning = rng.choice((meaning, mirrored(meaning)))
    if len(world.level.sizes) == 1:
        return meaning
    first, second = rng.choices((*world.level.sizes, None, None), k=2)
    return Related(replace(meaning.first, size=first), meaning.relation, replace(meaning.second, size=second))


def swap(meaning: Related, world: World) -> Related | None:
    """The relation with the objects' colours exchanged; None if that only reverses the order, or changes the status."""
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


# ------------------------------------------------------------------------------------------------------- drawing scenes


def place(colour: str, shape: str, size: str, pixels: int, centre: tuple[int, int]) -> Object:
    """An object with an extent of `pixels` around a centre."""
    return Object(colour, shape, size, (centre[0] - pixels // 2, centre[1] - pixels // 2, pixels, pixels))


def embody(what: Description, centre: tuple[int, int], world: World, rng: random.Random) -> Object:
    """An object that matches a description; unmentioned attributes are random, but never a novel combination."""
    colour, shape, size = what.colour, what.shape, what.size or rng.choice(tuple(world.level.sizes))
    if colour is None or shape is None:
        colour, shape = rng.choice([c for c in world.ordinary if colour in (None, c[0]) and shape in (None, c[1])])
    return place(colour, shape, size, rng.randint(*world.level.sizes[size]), centre)


def draw_easy(meaning: Related, world: World, rng: random.Random) -> Scene:
    """The two objects of a relation aligned on one axis, with the pair placed anywhere in the picture."""
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
    """Three to five objects in a jittered 3 x 3 grid, a cover over an empty cell, and faint marks anywhere."""
    cells = rng.sample(list(product(range(3), range(3))), 9)
    if isinstance(meaning, Related):
        wanted = [meaning.first, meaning.second]
        line, ends = rng.randrange(3), sorted(rng.sample(range(3), 2))
        pair = [(end, line) if AXIS[meaning.relation] == 0 else (line, end) for end in ends]
        if meaning.relation in ("right of", "below"):
            pair.reverse()
        cells = pair + [cell for cell in cells if cell not in pair]
    else:  # the second object is not among the counted ones, so that exchanging the first two changes the picture
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
    """Whether a caption holds, and each object that it relates is the only one that matches its description."""
    if isinstance(meaning, Related) and not len(found(meaning.first, scene)) == len(found(meaning.second, scene)) == 1:
        return False
    return holds(meaning, scene)


def places_exchanged(scene: Scene) -> Scene:
    """The scene with the places of the first two objects exchanged."""
    a, b, *rest = scene.objects
    middle_a, middle_b = ((x + w // 2, y + h // 2) for x, y, w, h in (a.box, b.box))
    a = place(a.colour, a.shape, a.size, a.box[2], middle_b)
    b = place(b.colour, b.shape, b.size, b.box[2], middle_a)
    return replace(scene, objects=(a, b, *rest))


def transposed(scene: Scene) -> Scene:
    """The scene with rows and columns exchanged, so that left of becomes above; the shapes themselves stay upright."""

    def over(things: tuple[Object, ...]) -> tuple[Object, ...]:
        return tuple(replace(t, box=(t.box[1], t.box[0], t.box[3], t.box[2])) for t in things)

    cover = scene.cover and (scene.cover[1], scene.cover[0], scene.cover[3], scene.cover[2])
    clutter = tuple((y, x, h, w, difference) for x, y, w, h, difference in scene.clutter)
    return replace(scene, objects=over(scene.objects), cover=cover, hidden=over(scene.hidden), clutter=clutter)


def exchanged(scene: Scene) -> Scene:
    """The scene with the colours of the first two objects exchanged."""
    a, b, *rest = scene.objects
    return replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour), *rest))


def differ(difference: str, meaning: Related, scene: Scene, world: World, rng: random.Random) -> tuple[Related, Scene]:
    """Apply one difference between twins -> the meaning that is then true, and the scene"""
    if difference == "colours":
        return swap(meaning, world), exchanged(scene)
    if difference == "places" or (difference == "axis" and rng.random() < 0.5):
        meaning, scene = reverse(meaning), places_exchanged(scene)
    if difference in ("axis", "turned"):
        meaning, scene = replace(meaning, relation=TRANSPOSED[meaning.relation]), transposed(scene)
    return meaning, scene


def told_apart(captions: list[Meaning], scenes: list[Scene]) -> bool:
    """Whether the first caption is clear in the first scene and false of the second, or both captions are equal."""
    return clear(captions[0], scenes[0]) and (captions[0] == captions[1] or not holds(captions[0], scenes[1]))


def draw_count(combinations: tuple[tuple[str, str], ...], rng: random.Random) -> Count:
    """One, two or three objects of the same colour, shape or both."""
    colour, shape = rng.choice(combinations)
    what = rng.choice((Description(colour), Description(None, shape), Description(colour, shape)))
    return Count(what, rng.randint(1, 3))


def facts(scene: Scene) -> set[Related]:
    """Every relation between two objects of a scene, in the form used by the pools."""
    return {
        Related(Description(a.colour, a.shape), relation, Description(b.colour, b.shape))
        for a, b in permutations(scene.objects, 2)
        for relation in ("left of", "above")
        if stands(a, relation, b)
    }


# ------------------------------------------------------------------------------------------------------------- pictures


@cache
def sprite(shape: str, pixels: int) -> np.ndarray:
    """The coverage of each pixel by a shape, (pixels, pixels, 1), from 8 x 8 sample points per pixel."""
    at = (np.arange(8 * pixels) + 0.5) / (4 * pixels) - 1
    inside = SHAPES[shape](at[None, :], at[:, None]) & np.ones((8 * pixels, 8 * pixels), dtype=bool)
    return inside.reshape(pixels, 8, pixels, 8).mean(axis=(1, 3), dtype=np.float32)[..., None]


def paint(pixels: np.ndarray, shape: str, colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> None:
    """Draw an anti-aliased shape into its box (x, y, width, height) of a picture (height, width, 3)."""
    x, y, w, h = box
    region = pixels[y : y + h, x : x + w]
    region += sprite(shape, w) * (np.array(colour, dtype=np.float32) - region)


def render(scene: Scene, extent: int) -> np.ndarray:
    """The rendered picture of a scene, (extent, extent, 3) of uint8."""
    pixels = np.full((extent, extent, 3), scene.background, dtype=np.float32)
    for x, y, w, h, difference in scene.clutter:
        pixels[y : y + h, x : x + w] = scene.background + difference
    for thing in scene.objects:
        paint(pixels, thing.shape, COLOURS[thing.colour], thing.box)
    if scene.cover:
        x, y, w, h = scene.cover
        stripes = (np.arange(w)[None, :] + np.arange(h)[:, None]) % 4 < 2
        pixels[y : y + h, x : x + w] = np.where(stripes, 90, 165)[..., None]
    return pixels.round().astype(np.uint8)
