"""The level nlvr of the built-in world: three grey boxes with scattered items or towers of blocks.

Pictures of 400 x 100 pixels in the style of Cornell NLVR (Suhr et al., ACL 2017). `statements.py` generates true and
false statements about the pictures, and `scenes.py` writes the dataset to disk.

How to read it: a box contains *items*, and three boxes make a *picture*; a *meaning* is a claim about a picture, and
`holds(meaning, picture)` is the single source of truth.
"""

import random
from dataclasses import dataclass

import numpy as np

from world.shapes import agrees, paint

COLOURS = {"yellow": (255, 255, 0), "blue": (0, 153, 255), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 10, "medium": 20, "big": 30}  # pixels
BOX, GAP = 100, 50  # pixels: side of each of the three boxes, and the gap between two boxes
BOX_GREY, GAP_GREY = 211, 128
TALLEST, MOST = 4, 7  # maximum number of blocks in a tower, and of scattered items in a box

# ------------------------------------------------------------------------------------------- pictures and what is true


@dataclass(frozen=True)
class Item:
    """A coloured shape. (x, y): upper left corner in pixels within its box; x increases to the right, y downwards."""

    colour: str
    shape: str
    size: str
    x: int
    y: int

    def touches(self, side: str) -> bool:
        """Whether the item touches a side of its box: left, right, top, bottom, edge (any side), corner (two sides)."""
        far = BOX - SIZES[self.size]
        sides = {"left": self.x == 0, "right": self.x == far, "top": self.y == 0, "bottom": self.y == far}
        return sides[side] if side in sides else sum(sides.values()) >= {"edge": 1, "corner": 2}[side]


Box = tuple[Item, ...]  # for a tower, from its base upwards


@dataclass(frozen=True)
class Picture:
    """Three boxes, from left to right."""

    towers: bool  # whether the boxes contain towers; else scattered items
    boxes: tuple[Box, Box, Box]


@dataclass(frozen=True)
class Number:
    """A count that is exactly, at least or at most n."""

    n: int
    bound: str = "exactly"

    def fits(self, count: int) -> bool:
        """Whether a count satisfies this bound."""
        return agrees(count, self.n, self.bound)


@dataclass(frozen=True)
class What:
    """A partial description of one item; None = not mentioned."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    touching: str | None = None  # a side, see Item.touches
    free: bool = False  # whether the item touches no side
    place: int | None = None  # zero-based position in its tower: 0 is the base, -1 the top
    height: Number | None = None  # number of blocks in its tower
    over: "What | None" = None  # description of an item below it in its tower
    near: bool = False  # whether that item must be directly below


@dataclass(frozen=True)
class Has:
    """A box holds `number` items that match."""

    what: What
    number: Number


@dataclass(frozen=True)
class Palette:
    """An attribute's values in a box are a subset of these or, with `every`, exactly these: only blue and black."""

    values: frozenset[str]
    attribute: str = "colour"
    every: bool = True


@dataclass(frozen=True)
class Variety:
    """The number of different values of an attribute in a box."""

    number: Number
    attribute: str = "colour"


@dataclass(frozen=True)
class Items:
    """A claim about all items of a picture: `number` of them match."""

    what: What
    number: Number


@dataclass(frozen=True)
class Boxes:
    """A claim about boxes: `number` of them satisfy all conditions."""

    conditions: tuple[Has | Palette | Variety, ...]
    number: Number


Meaning = Items | Boxes


def fits(what: What, place: int, box: Box) -> bool:
    """Whether a description matches the item at a position in a box."""
    item = box[place]
    lowest = max(place - 1, 0) if what.near else 0  # lowest position considered
    return (
        what.colour in (None, item.colour)
        and what.shape in (None, item.shape)
        and what.size in (None, item.size)
        and (what.touching is None or item.touches(what.touching))
        and not (what.free and item.touches("edge"))
        and (what.place is None or what.place in (place, place - len(box)))
        and (what.height is None or what.height.fits(len(box)))
        and (what.over is None or any(fits(what.over, lower, box) for lower in range(lowest, place)))
    )


def count(what: What, *boxes: Box) -> int:
    """The number of items in the given boxes that match a description."""
    return sum(fits(what, place, box) for box in boxes for place in range(len(box)))


def true_of(condition: Has | Palette | Variety, box: Box) -> bool:
    """Whether a condition is true of a box."""
    match condition:
        case Has(what, number):
            return number.fits(count(what, box))
        case Palette(values, attribute, every):
            found = {getattr(item, attribute) for item in box}
            return found == values if every else found <= values
        case Variety(number, attribute):
            return number.fits(len({getattr(item, attribute) for item in box}))


def count_boxes(conditions: tuple[Has | Palette | Variety, ...], picture: Picture) -> int:
    """The number of boxes in a picture that satisfy all conditions."""
    return sum(all(true_of(condition, box) for condition in conditions) for box in picture.boxes)


def holds(meaning: Meaning, picture: Picture) -> bool:
    """Whether a meaning is true of a picture: the single source of truth."""
    match meaning:
        case Items(what, number):
            return number.fits(count(what, *picture.boxes))
        case Boxes(conditions, number):
            return number.fits(count_boxes(conditions, picture))


# --------------------------------------------------------------------------------------------------- drawing pictures


def tower(colours: list[str]) -> Box:
    """A tower of blocks with the given colours, from the base upwards, one pixel apart."""
    return tuple(Item(colour, "square", "medium", 40, 80 - 21 * place) for place, colour in enumerate(colours))


def scatter(items: list[tuple[str, str, str]], rng: random.Random) -> Box:
    """(colour, shape, size) of items -> the items at random places in a box, at least one pixel apart.

    The upper left corner is sampled anywhere in the box and clamped so that the item fits. As in NLVR, many items
    therefore touch the right side or the bottom, and few the left side or the top.
    """
    while True:
        placed: list[Item] = []
        for colour, shape, size in sorted(items, key=lambda item: -SIZES[item[2]]):  # place large items first
            for _ in range(50):
                x, y = (min(rng.randrange(BOX), BOX - SIZES[size]) for _ in range(2))
                if not any(
                    abs(2 * x + SIZES[size] - 2 * a.x - SIZES[a.size]) < SIZES[size] + SIZES[a.size] + 2
                    and abs(2 * y + SIZES[size] - 2 * a.y - SIZES[a.size]) < SIZES[size] + SIZES[a.size] + 2
                    for a in placed
                ):
                    placed.append(Item(colour, shape, size, x, y))
                    break
        if len(placed) == len(items):
            rng.shuffle(placed)
            return tuple(placed)


def draw_picture(towers: bool, rng: random.Random) -> Picture:
    """Sample a picture: per box, either a tower of one to four blocks, or one to seven scattered items."""
    if towers:
        heights = [rng.randint(1, TALLEST) for _ in range(3)]
        return Picture(True, tuple(tower(rng.choices(tuple(COLOURS), k=height)) for height in heights))
    return Picture(
        False,
        tuple(
            scatter(
                [(rng.choice(tuple(COLOURS)), rng.choice(SHAPES), rng.choice(tuple(SIZES))) for _ in range(number)], rng
            )
            for number in (rng.randint(1, MOST) for _ in range(3))
        ),
    )


def shuffled(picture: Picture, rng: random.Random) -> Picture:
    """A picture with the same items, randomly redistributed over boxes and places."""
    items = [item for box in picture.boxes for item in box]
    rng.shuffle(items)
    while True:
        most = TALLEST if picture.towers else MOST
        cuts = sorted(rng.sample(range(1, len(items)), 2))
        parts = [items[: cuts[0]], items[cuts[0] : cuts[1]], items[cuts[1] :]]
        if max(map(len, parts)) <= most:
            break
    if picture.towers:
        return Picture(True, tuple(tower([item.colour for item in part]) for part in parts))
    return Picture(False, tuple(scatter([(i.colour, i.shape, i.size) for i in part], rng) for part in parts))


def render(picture: Picture) -> np.ndarray:
    """Render a picture as (100, 400, 3) of uint8."""
    pixels = np.full((BOX, 3 * BOX + 2 * GAP, 3), GAP_GREY, dtype=np.float32)
    for number, box in enumerate(picture.boxes):
        left = number * (BOX + GAP)
        pixels[:, left : left + BOX] = BOX_GREY
        for item in box:
            paint(pixels, item.shape, COLOURS[item.colour], bounds(number, item))
    return pixels.round().astype(np.uint8)


def bounds(number: int, item: Item) -> list[int]:
    """The bounding box [x, y, width, height], in pixels of the picture, of an item in the box with index `number`."""
    return [number * (BOX + GAP) + item.x, item.y, SIZES[item.size], SIZES[item.size]]
