"""True and false statements about three boxes, in the style of Cornell NLVR, with captions and phrases for grounding.

The templates follow sentences of NLVR's training set; nothing was taken from its development or test sets.

How to read it: a `Said` is a fragment of a sentence with its possible readings. "There are two towers" can mean exactly
two, but also at least two: such a sentence has two readings, and we use it only where both agree.

Two pictures are sampled together, then statements until enough of them are true of only the first picture and of only
the second. Each text is thus true once and false once, and so is each picture: either one alone yields exactly 50 %.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from world.shapes import NUMBERS
from world.towers import (
    COLOURS,
    SHAPES,
    SIZES,
    TALLEST,
    Boxes,
    Has,
    Items,
    Number,
    Palette,
    Picture,
    Variety,
    What,
    bounds,
    count,
    count_boxes,
    draw_picture,
    fits,
    holds,
    shuffled,
)

# -------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Said:
    """A fragment of a sentence: its text and its possible readings. plural: whether it refers to several things."""

    text: str
    readings: tuple
    plural: bool = False


def numeral(n: int, rng: random.Random) -> str:
    """A number, spelled out or as a digit."""
    return rng.choice((NUMBERS[n], str(n)))


def quantity(most: int, rng: random.Random, ways: str = "a bare exactly least most only more no") -> Said:
    """A quantifier, with Numbers as its readings."""
    kind = rng.choice(ways.split())
    n = rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6)) if most > 3 else rng.choice((1, 1, 2, 3))
    n = min(n, most)
    exactly, least = Number(n), Number(n, "at least")
    said = numeral(n, rng)
    match kind:
        case "a":
            return Said("a", (Number(1, "at least"),))
        case "bare":
            return Said(said, (exactly, least), n > 1)
        case "exactly" | "only":
            return Said(f"{kind} {said}", (exactly,), n > 1)
        case "least":
            return Said(f"{rng.choice(('at least', 'at least', 'atleast'))} {said}", (least,), n > 1)
        case "most":
            return Said(f"at most {said}", (Number(n, "at most"),), n > 1)
        case "more":
            return Said(f"more than {said}", (Number(n + 1, "at least"),), n > 1)
        case "no":
            return Said("no", (Number(0),))


SIDES = {  # phrasings of an item touching a side
    "edge": ("touching the edge", "touching any edge", "touching an edge", "touching the wall", "touching the side",
             "closely touching a wall of a box"),
    "bottom": ("touching the base", "closely touching the bottom of a box", "touching the bottom"),
    "right": ("closely touching right wall of a box", "touching the right wall"),
    "top": ("closely touching the roof of a box", "touching the top"),
    "corner": ("touching the corner", "closely touching a corner of a box", "closely touching a corner"),
}  # fmt: skip
FREE = ("not touching the edge", "not touching any edge", "not touching the wall")


def name(what: What, plural: bool, noun: str) -> str:
    """The noun phrase with size, colour and shape but no number: small yellow circles."""
    return " ".join(filter(None, (what.size, what.colour, what.shape or noun))) + ("s" if plural else "")


def describe(rng: random.Random, towers: bool, kinds: str = "c cs cs s") -> What:
    """A random description by colour (c), shape (s), both (cs) or neither (n); for towers, never by shape."""
    kind = rng.choice(kinds.split())
    colour = rng.choice(tuple(COLOURS)) if "c" in kind else None
    shape = rng.choice(SHAPES) if "s" in kind and not towers else None
    if towers and "c" not in kind and "n" not in kind:
        colour = rng.choice(tuple(COLOURS))
    return What(colour, shape)


def be(said: Said) -> str:
    """The matching verb form: is or are."""
    return "are" if said.plural else "is"


def items_phrase(towers: bool, rng: random.Random) -> tuple[What, str, str]:
    """Countable items: their description, the noun, and the phrase that follows it ("touching the edge")."""
    what, tail = describe(rng, towers, "c cs cs s"), ""
    if not towers and rng.random() < 0.15:
        what = replace(what, size=rng.choice(tuple(SIZES)))
    noun = "block" if towers and rng.random() < 0.8 else rng.choice(("item", "item", "object"))
    if not towers and rng.random() < 0.7:
        if rng.random() < 0.3:
            what, tail = replace(what, free=True), " " + rng.choice(FREE)
        else:
            side = rng.choice(("edge", "edge", "bottom", "bottom", "right", "corner", "top"))
            what, tail = replace(what, touching=side), " " + rng.choice(SIDES[side])
    return what, noun, tail


def items_saying(towers: bool, rng: random.Random) -> Said:
    """Example: there are exactly two yellow circles touching the edge."""
    what, noun, tail = items_phrase(towers, rng)
    if tail and rng.random() < 0.1:
        return Said(f"none of the {name(what, True, noun)} are{tail}", (Items(what, Number(0)),))
    many = quantity(6, rng)
    text = f"there {be(many)} {many.text} {name(what, many.plural, noun)}{tail}"
    return Said(text, tuple(Items(what, number) for number in many.readings))


def place_saying(towers: bool, rng: random.Random) -> Said:
    """Example: there are exactly two yellow blocks as the base of a tower with at least three blocks."""
    place, spoken = rng.choice(((0, "base"), (-1, "top")))
    what, tail = replace(describe(rng, True, "c"), place=place), ""
    heights = (None,)
    if rng.random() < 0.6:
        height = quantity(TALLEST, rng, "bare exactly least most more")
        tail, heights = f" with {height.text} block{'s' if height.plural else ''}", height.readings
    many = quantity(3, rng, "a a bare exactly least no")
    text = f"there {be(many)} {many.text} {name(what, many.plural, 'block')} as the {spoken} of a tower{tail}"
    return Said(text, tuple(Items(replace(what, height=h), n) for h in heights for n in many.readings))


def order(rng: random.Random, noun: str = "block", plural: bool = False) -> Said:
    """Example: yellow block above a blue block. The readings describe the upper block, which is the one counted."""
    upper, lower = (rng.choice(tuple(COLOURS)) for _ in range(2))
    word = rng.choice(("on", "on", "on top of", "over", "above", "above"))
    ways = (True, False) if word == "above" else (True,)  # directly above, or with other blocks in between
    readings = tuple(What(upper, over=What(lower), near=near) for near in ways)
    if not plural and rng.random() < 0.3:
        word = rng.choice(("below", "below", "bellow", "beneath"))
        return Said(
            f"{lower} {noun} {word} a {upper} {noun}",
            tuple(replace(readings[0], near=near) for near in (True, False)),
        )
    return Said(f"{upper} {noun}{'s' if plural else ''} {word} a {lower} {noun}", readings)


def order_saying(towers: bool, rng: random.Random) -> Said:
    """Example: there is a yellow block above a blue block."""
    if rng.random() < 0.2:
        many = quantity(2, rng, "exactly least")
        said = order(rng, plural=True)
        if not many.plural:
            said = replace(said, text=said.text.replace("blocks", "block"))
    else:
        said, many = order(rng), quantity(1, rng, "a a a no")
    text = f"there {be(many)} {many.text} {said.text}"
    return Said(text, tuple(Items(what, number) for what in said.readings for number in many.readings))


def listed(words: list[str]) -> str:
    """Words joined to a list: blue, black and yellow."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def some(towers: bool, rng: random.Random, ways: str, kinds: str, noun: str) -> Said:
    """A condition on a box. Example: exactly two yellow items."""
    what, many = describe(rng, towers, kinds), quantity(TALLEST if towers else 5, rng, ways)
    return Said(f"{many.text} {name(what, many.plural, noun)}", tuple(Has(what, n) for n in many.readings))


# Each function states one kind of condition on a box or a tower; its docstring is an example. Readings are tuples.


def total(towers: bool, noun: str, rng: random.Random) -> Said:
    """Exactly three blocks."""
    return both(some(towers, rng, "bare exactly only least most more", "n", noun))


def such(towers: bool, noun: str, rng: random.Random) -> Said:
    """At least two yellow items."""
    return both(some(towers, rng, "a bare exactly only least more", "c c cs s", noun))


def several(towers: bool, noun: str, rng: random.Random) -> Said:
    """A yellow circle, two squares and at least one black item."""
    number = rng.choice((2, 2, 3))
    return both(*(some(towers, rng, "a a bare least exactly", "c cs cs s", noun) for _ in range(number)))


def palette(towers: bool, noun: str, rng: random.Random) -> Said:
    """Only yellow and blue blocks. Two readings: both colours must occur, or need not."""
    attribute = "colour" if towers or rng.random() < 0.8 else "shape"
    values = rng.sample(tuple(COLOURS) if attribute == "colour" else SHAPES, rng.choice((1, 2, 2)))
    if attribute == "shape":
        text = f"only {listed([shape + 's' for shape in values])}"
    else:
        text = rng.choice(("only {0} {1}s", "only {0} {1}s", "{1}s of only {0} color")).format(listed(values), noun)
    return Said(text, tuple((Palette(frozenset(values), attribute, every),) for every in (True, False)))


def variety(towers: bool, noun: str, rng: random.Random) -> Said:
    """Blocks of two different colors. "Of the same color" has two readings: one block is enough, or at least two."""
    n = rng.randint(1, 3)
    if n == 1:
        text = f"{noun}s of the same {rng.choice(('color', 'colour'))}"
        return Said(text, ((Variety(Number(1)),), (Variety(Number(1)), Has(What(), Number(2, "at least")))))
    every = "all " if n == 3 and rng.random() < 0.7 else ""
    return Said(f"{noun}s of {every}{numeral(n, rng)} different colors", ((Variety(Number(n)),),))


def of_which(towers: bool, noun: str, rng: random.Random) -> Said:
    """Three items of which two are yellow."""
    what, many = describe(rng, towers, "c c cs s"), quantity(3, rng, "bare bare least exactly")
    kind = name(what, many.plural and what.shape is not None, "")  # a colour alone has no plural form
    part = Said(f"{many.text} {be(many)} {kind}".strip(), tuple(Has(what, n) for n in many.readings))
    return both(some(towers, rng, "bare exactly", "n", noun), part, joint=" of which ")


def at_place(towers: bool, noun: str, rng: random.Random) -> Said:
    """A yellow block at the base."""
    colour = rng.choice(tuple(COLOURS))
    place, spoken = rng.choice(((0, "base"), (0, "bottom"), (-1, "top")))
    text = f"a {colour} {noun} at the {spoken}" if spoken != "base" or rng.random() < 0.7 else f"a {colour} base"
    return both(Said(text, (Has(What(colour, place=place), Number(1)),)))


def total_and_place(towers: bool, noun: str, rng: random.Random) -> Said:
    """Exactly three blocks and a yellow block at the base."""
    first, second = some(towers, rng, "bare exactly least", "n", noun), at_place(towers, noun, rng)
    return Said(f"{first.text} and {second.text}", tuple((a, *b) for a in first.readings for b in second.readings))


def counted_place(towers: bool, noun: str, rng: random.Random) -> Said:
    """A yellow second block."""
    place, colour = rng.randint(1, 3), rng.choice(tuple(COLOURS))
    text = f"a {colour} {('second', 'third', 'fourth')[place - 1]} {noun}"
    return both(Said(text, (Has(What(colour, place=place), Number(1)),)))


def ordered(towers: bool, noun: str, rng: random.Random) -> Said:
    """A yellow block above a blue block."""
    said = order(rng, noun)
    return both(Said(f"a {said.text}", tuple(Has(what, Number(1, "at least")) for what in said.readings)))


def at_side(towers: bool, noun: str, rng: random.Random) -> Said:
    """Two yellow items touching the edge."""
    what, many = describe(rng, towers, "c cs s"), quantity(3, rng, "a a bare exactly")
    side = rng.choice(("edge", "edge", "bottom", "corner"))
    text = f"{many.text} {name(what, many.plural, noun)} {SIDES[side][0]}"
    return both(Said(text, tuple(Has(replace(what, touching=side), n) for n in many.readings)))


def both(*parts: Said, joint: str = "") -> Said:
    """Join fragments, each of which states one condition."""
    texts = [part.text for part in parts]
    text = joint.join(texts) if joint else listed(texts)
    return Said(text, tuple(product(*(part.readings for part in parts))))


CONDITIONS = {  # by kind of picture; conditions listed twice are used twice as often
    True: (total, such, such, palette, variety, of_which, at_place, at_place, ordered, total_and_place, counted_place),
    False: (total, such, such, several, several, palette, variety, of_which, at_side),
}


def boxes_phrase(towers: bool, rng: random.Random) -> tuple[str, str, Said]:
    """The noun for a box, in the singular and the plural, and a condition on the box."""
    as_tower = towers and rng.random() < 0.85  # a tower can also be called a box of blocks
    noun = "block" if as_tower else rng.choice(("item", "item", "item", "object"))
    subject = "tower" if as_tower else rng.choice(("box", "box", "box", "grey box", "grey square"))
    plural = subject + ("es" if subject.endswith("x") else "s")
    return subject, plural, rng.choice(CONDITIONS[towers])(towers, noun, rng)


def boxes_saying(towers: bool, rng: random.Random) -> Said:
    """Example: there is exactly one box with two yellow items and a blue circle."""
    subject, plural, has = boxes_phrase(towers, rng)
    many = quantity(3, rng, "a a a a bare bare exactly least only no")
    if rng.random() < 0.06:
        many = Said("each", (Number(3),))
        text = rng.choice((f"each {subject} has {has.text}", f"all the {plural} have {has.text}"))
    elif many.text == "a" and rng.random() < 0.25:
        text = rng.choice((f"one of the {subject} has {has.text}", f"one of the {plural} contains {has.text}"))
    elif many.text != "a" and rng.random() < 0.1:
        text = f"{many.text} {plural if many.plural else subject} {'have' if many.plural else 'has'} {has.text}"
    else:
        joint = rng.choice(("with", "with", "with", "with", "that has", "which has", "having"))
        text = f"there {be(many)} {many.text} {plural if many.plural else subject} {joint} {has.text}"
    return Said(text, tuple(Boxes(conditions, n) for conditions in has.readings for n in many.readings))


def whole_saying(towers: bool, rng: random.Random) -> Said:
    """Example: there is a yellow tower with at least two blocks."""
    colour = rng.choice(tuple(COLOURS))
    only = Palette(frozenset([colour]))
    if rng.random() < 0.5:
        return Said(f"there is a {colour} tower", (Boxes((only,), Number(1, "at least")),))
    height = quantity(TALLEST, rng, "bare exactly least only")
    text = f"there is a {colour} tower with {height.text} block{'s' if height.plural else ''}"
    number = Number(1, "at least")
    return Said(text, tuple(Boxes((only, Has(What(), n)), number) for n in height.readings))


SAYINGS = {  # by kind of picture: (kind of statement, weight)
    True: ((items_saying, 0.12), (place_saying, 0.2), (order_saying, 0.16), (whole_saying, 0.06), (boxes_saying, 0.46)),
    False: ((items_saying, 0.5), (boxes_saying, 0.5)),
}


def say(towers: bool, rng: random.Random) -> Said:
    """A sentence about one kind of picture, true or false; its readings are Meanings."""
    sayings, weights = zip(*SAYINGS[towers], strict=True)
    return rng.choices(sayings, weights)[0](towers, rng)


def verdict(said: Said, picture: Picture) -> bool | None:
    """Whether a sentence is true of a picture; None if its readings disagree."""
    truths = {holds(meaning, picture) for meaning in said.readings}
    return truths.pop() if len(truths) == 1 else None


# ------------------------------------------------------------------------------------------------------------ samples

TEXTS = 2  # number of statements per picture, each true of this picture and false of the other one


def captions(picture: Picture, rng: random.Random) -> list[str]:
    """The contents of any two boxes, from left to right; at most two kinds of scattered items per box."""
    parts = []
    for box in picture.boxes:
        if picture.towers:
            parts.append(f"a tower of {listed([item.colour for item in box])}")
        else:
            kinds = Counter(What(item.colour, item.shape) for item in box)
            told = rng.sample(sorted(kinds, key=str), min(len(kinds), 2))
            said = [
                f"{'a' if kinds[what] == 1 else NUMBERS[kinds[what]]} {name(what, kinds[what] > 1, '')}"
                for what in told
            ]
            parts.append(f"a box with {listed(said)}")
    return [", ".join(pair) for pair in combinations(parts, 2)]


def statements(pictures: tuple[Picture, Picture], rng: random.Random) -> list[tuple[str, int]]:
    """(text, index of the picture that it is true of), equally many for both; empty if none can be found in time."""
    told: dict[str, tuple[str, int]] = {}  # keyed by the text without its full stop
    for _ in range(400):
        said = say(pictures[0].towers, rng)
        verdicts = [verdict(said, picture) for picture in pictures]
        if None in verdicts or verdicts[0] == verdicts[1] or said.text in told:
            continue
        true = verdicts.index(True)
        if sum(side == true for _, side in told.values()) < TEXTS:
            told[said.text] = (said.text + rng.choice((".", "")), true)
        if len(told) == 2 * TEXTS:
            return list(told.values())
    return []


def grounding(picture: Picture, rng: random.Random) -> dict | None:
    """A row for grounding: a phrase that matches some but not all items; any of the matching items is correct."""
    boxes = {
        what: [
            bounds(number, item)
            for number, box in enumerate(picture.boxes)
            for place, item in enumerate(box)
            if fits(what, place, box)
        ]
        for what in (What(*values) for values in product((None, *COLOURS), (None, *SHAPES)))
    }
    proposals = boxes.pop(What())
    phrases = [what for what, found in boxes.items() if 0 < len(found) < len(proposals)]
    if not phrases:
        return None
    what = rng.choice(phrases)
    text = name(what, False, rng.choice(("item", "object")))
    return {"text": text, "boxes": boxes[what], "proposals": proposals}


def question(picture: Picture, rng: random.Random) -> tuple[str, int]:
    """How many yellow blocks are there? Or, phrased like a statement, so that counting transfers to statements: there
    are how many towers with a blue base? The answers range from 0 to 4 and are as evenly distributed as possible."""
    wanted = rng.randrange(5)
    while True:
        stated = rng.random() < 0.5
        if rng.random() < 0.4:
            what, noun, tail = items_phrase(picture.towers, rng)
            kind = name(what, True, noun)
            text = f"there are how many {kind}{tail}" if stated else f"how many {kind} are there{tail}"
            counts = {count(what, *picture.boxes)}
        else:
            _, plural, has = boxes_phrase(picture.towers, rng)
            text = f"there are how many {plural} with {has.text}" if stated else f"how many {plural} have {has.text}"
            counts = {count_boxes(conditions, picture) for conditions in has.readings}
        if counts == {wanted}:
            return text, wanted
        if rng.random() < 0.1:  # that number may not occur
            wanted = rng.randrange(5)


def samples(split: str, size: int, seed: int) -> Iterator[tuple[Picture, dict[str, list[dict]]]]:
    """The pictures of a split and, by task, their rows without the picture. size: number of pictures (in pairs)"""
    rng = random.Random(f"{seed} nlvr {split}")
    for number in range(size // 2):
        told = []
        while not told:
            first = draw_picture(rng.random() < 0.5, rng)
            second = shuffled(first, rng) if rng.random() < 0.5 else draw_picture(first.towers, rng)
            told = statements((first, second), rng)
        for side, picture in enumerate((first, second)):
            about = {"twin": number}
            asked = grounding(picture, rng)
            yield (
                picture,
                {
                    "pairs": [{"caption": captions(picture, rng)} | about],
                    "grounding": [asked] if asked else [],
                    "vqa": [
                        {"question": text, "answers": {str(number): 1.0}} | about
                        for text, number in (question(picture, rng) for _ in range(2 * TEXTS))
                    ],
                    "reasoning": [
                        {"text": text, "label": true == side, "group": f"{split} {number} {place}"} | about
                        for place, (text, true) in enumerate(told)
                    ],
                },
            )
