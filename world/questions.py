"""Questions about the built-in world: visual question answering, visual reasoning and visual entailment.

`scenes.py` writes the questions to disk. Every answer comes from `holds`, the single source of truth, and each task is
balanced so that neither the text alone nor the picture alone is informative:

    vqa          all answers to a kind of question are equally frequent; for yes, no and numbers, this also holds given
                 the picture, whereas the answer to a question about a colour or shape always occurs in the picture
    reasoning    two texts are combined with two pictures, or two pairs of pictures; each text is true of one and false
                 of the other, and vice versa: the text alone, or the pictures alone, yield exactly 50 %
    entailment   each picture has one statement per label; the words of a statement do not reveal its label
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from world.shapes import (
    AXIS,
    DRAW,
    Count,
    Description,
    Exists,
    Meaning,
    Object,
    Related,
    Scene,
    World,
    clear,
    count_novel,
    found,
    holds,
    key,
    mirrored,
    phrase,
    place,
    plural,
    reverse,
    stands,
    swap,
    tell,
    turn,
    words,
)


@dataclass(frozen=True)
class Asked:
    """Some pictures and the rows that refer to them, by their index in `scenes`."""

    scenes: tuple[Scene, ...]
    rows: tuple[tuple[tuple[int, ...], dict], ...]


def draw_meaning(split: str, world: World, rng: random.Random) -> Related:
    """Sample a relation allowed in a split: seen in train and val, half of them held out in test, novel in novel."""
    pool = {"novel": "novel", "test": rng.choice(("heldout", "seen"))}.get(split, "seen")
    return tell(rng.choice(world.pools[pool]), world, rng)


def may_tell(meaning: Related, split: str, world: World) -> bool:
    """Whether a split may use a relation found in a picture: held-out ones in test only, novel ones in novel only."""
    if split == "novel":
        return count_novel(meaning, world.novel) > 0
    return split == "test" or key(meaning) not in world.heldout


def full(thing: Object) -> Description:
    """The description of an object by its colour and shape."""
    return Description(thing.colour, thing.shape)


# ------------------------------------------------------------------------------------------------------------------ vqa
#
# Each function generates one kind of question about a scene: (question, answer), or None if the scene allows none.
# `things` are the objects that a question may be about: all objects, or only the novel ones in the split novel.


def ask_colour(scene: Scene, things: list[Object], split: str, world: World, rng: random.Random):
    """What colour is the circle? Only about a shape that occurs once."""
    alone = [thing for thing in things if len(found(Description(None, thing.shape), scene)) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    frame = choose(("what colour is the {}?", "what is the colour of the {}?"), world, rng)
    return frame.format(thing.shape), thing.colour


def ask_shape(scene: Scene, things: list[Object], split: str, world: World, rng: random.Random):
    """What shape is the red object? Only about a colour that occurs once."""
    alone = [thing for thing in things if len(found(Description(thing.colour), scene)) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    frame = choose(("what shape is the {} object?", "what is the shape of the {} object?"), world, rng)
    return frame.format(thing.colour), thing.shape


def ask_count(scene: Scene, things: list[Object], split: str, world: World, rng: random.Random):
    """How many red objects are there? Only if every number from 0 to the level's maximum is possible."""
    largest = 3 if len(world.level.sizes) > 1 else 2
    by_count: dict[int, list[Description]] = {number: [] for number in range(largest + 1)}
    colours = [Description(colour) for colour in world.level.colours]
    for what in (*colours, *(Description(None, shape) for shape in world.level.shapes)):
        by_count.setdefault(len(found(what, scene)), []).append(what)
    if not all(by_count[number] for number in range(largest + 1)):
        return None
    number = rng.randint(0, largest)
    frame = choose(("how many {} are there?", "how many {} can be seen?"), world, rng)
    # Choose between colour and shape first, so that this choice does not reveal the number.
    kinds = [[what for what in by_count[number] if (what.colour is None) == asked] for asked in (False, True)]
    what = rng.choice(rng.choice([kind for kind in kinds if kind]))
    return frame.format(plural(what)), str(number)


def ask_existence(scene: Scene, things: list[Object], split: str, world: World, rng: random.Random):
    """Is there a red circle? Half of the absent objects recombine a colour and a shape that are present."""
    shown = {(thing.colour, thing.shape) for thing in scene.objects}
    thing = rng.choice(things)
    if rng.random() < 0.5:
        colour, shape, answer = thing.colour, thing.shape, "yes"
    else:
        pool = world.novel if split == "novel" else world.ordinary
        absent = sorted(set(pool) - shown)
        mixed = [c for c in absent if all(any(c[i] == seen[i] for seen in shown) for i in (0, 1))]
        (colour, shape), answer = rng.choice(mixed if mixed and rng.random() < 0.5 else absent), "no"
    frame = choose(("is there a {}?", "can one see a {}?"), world, rng)
    return frame.format(phrase(Description(colour, shape))), answer


def ask_position(scene: Scene, things: list[Object], split: str, world: World, rng: random.Random):
    """Where is the red circle, seen from the blue square? For two aligned objects, each unique in colour and shape."""
    pairs = [
        (a, relation, b)
        for a in scene.objects
        for b in scene.objects
        for relation in AXIS
        if stands(a, relation, b)
        and len(found(full(a), scene)) == len(found(full(b), scene)) == 1
        and may_tell(Related(full(a), relation, full(b)), split, world)
    ]
    if not pairs:
        return None
    a, relation, b = rng.choice(pairs)
    frame = choose(("where is the {}, seen from the {}?", "on which side of the {1} is the {0}?"), world, rng)
    return frame.format(phrase(full(a)), phrase(full(b))), relation.removesuffix(" of")


def ask_comparison(scene: Scene, things: list[Object], split: str, world: World, rng: random.Random):
    """Are there more circles than squares? About two colours or shapes, one or both visible; "no" if equal."""
    kinds = rng.choice(
        ([Description(c) for c in world.level.colours], [Description(None, s) for s in world.level.shapes])
    )
    number = {what: len(found(what, scene)) for what in kinds}
    pairs = {"yes": [], "no": []}
    for a in kinds:
        for b in kinds:
            if a != b and number[a] + number[b] > 0:
                pairs["yes" if number[a] > number[b] else "no"].append((a, b))
    answer = rng.choice(("yes", "no"))
    a, b = rng.choice(pairs[answer])
    return f"are there more {plural(a)} than {plural(b)}?", answer


ASK = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "existence": ask_existence,
    "position": ask_position,
    "comparison": ask_comparison,
}
PER_PICTURE = 3  # number of questions about each picture, all of different kinds


def choose(frames: tuple[str, ...], world: World, rng: random.Random) -> str:
    """Choose a template: the first one if the level has a single style, else a random one."""
    return frames[0] if world.level.styles == 1 else rng.choice(frames)


def vqa(number: int, split: str, world: World, rng: random.Random) -> Asked:
    """One picture and three questions of different kinds."""
    while True:
        kinds = rng.sample(sorted(ASK), PER_PICTURE)  # resampled, because some scenes rule out some kinds
        scene = draw_repeated(split, world, rng) if "count" in kinds else draw_any(split, world, rng)
        novel = [thing for thing in scene.objects if (thing.colour, thing.shape) in world.novel]
        asked = [ASK[kind](scene, novel or list(scene.objects), split, world, rng) for kind in kinds]
        if all(asked):
            break
    rows = [
        ((0,), {"question": question, "answers": {answer: 1.0}, "type": kind})
        for kind, (question, answer) in zip(kinds, asked, strict=True)
    ]
    return Asked((scene,), tuple(rows))


def draw_any(split: str, world: World, rng: random.Random) -> Scene:
    """Sample a scene that shows a relation allowed in a split."""
    return DRAW[world.name](draw_meaning(split, world, rng), world, rng)


def draw_repeated(split: str, world: World, rng: random.Random) -> Scene:
    """Sample a scene in which a colour or a shape (equally often) occurs twice or, on level full, three times."""
    most, kind = 3 if len(world.level.sizes) > 1 else 2, rng.choice(("colour", "shape"))
    while True:
        scene = draw_any(split, world, rng)
        if max(Counter(getattr(thing, kind) for thing in scene.objects).values()) >= most:
            return scene


# ------------------------------------------------------------------------------------------------------------ reasoning


def reasoning(number: int, split: str, world: World, rng: random.Random) -> Asked:
    """Two texts combined with two pictures, or two pairs of pictures, such that each is true once and false once.

    With single pictures, the texts are two claims, each of which is false where the other is true. With two pictures,
    the texts state where a claim holds: in the first, in the second, in both, in neither, or in exactly one of them.
    """
    claims, drawn = draw_claims(split, world, rng)
    style = rng.choice((0, 4)) if world.level.styles > 1 else 0  # the other templates do not fit into a longer sentence
    said = [words(claim, style) for claim in claims]

    def picture(true: int) -> Scene:
        """A scene in which the claim with index `true` holds and the other one does not."""
        while True:
            scene = DRAW[world.name](drawn[true], world, rng)
            if clear(claims[true], scene) and not holds(claims[1 - true], scene):
                return scene

    if number % 3 == 0:
        scenes, sets, texts, kind = (picture(0), picture(1)), ((0,), (1,)), said, "one picture"
    elif rng.random() < 0.5:  # The texts say which of the two pictures a claim is true of.
        side = rng.randrange(2)
        texts = [f"the {('first', 'second')[side]} picture shows {text}" for text in said]
        scenes, kind = (picture(0), picture(1), picture(rng.randrange(2))), "two pictures"
        sets = ((0, 2), (1, 2)) if side == 0 else ((2, 0), (2, 1))
    else:  # The texts say how many pictures a claim is true of: two of one kind, or one of them replaced.
        same = rng.randrange(2)
        scenes, kind = (picture(same), picture(same), picture(1 - same)), "two pictures"
        sets = ((0, 1), rng.choice(((0, 2), (2, 1))))
        texts = [
            f"{('both pictures show', 'neither picture shows')[same]} {said[0]}",
            f"exactly one picture shows {said[0]}",
        ]
    rows = [
        (sets[s], {"text": text, "label": s == t, "group": f"{split} {number} {t}", "type": kind})
        for t, text in enumerate(texts)
        for s in range(2)
    ]
    return Asked(scenes, tuple(rows))


def draw_claims(split: str, world: World, rng: random.Random) -> tuple[list[Meaning], list[Related]]:
    """Two contradictory claims about the same objects and, for each of them, a relation to sample its scene from."""
    while True:
        meaning = draw_meaning(split, world, rng)
        kind = rng.choice(("swap", "swap", "reverse", "reverse", "turn"))
        if split == "novel" and kind == "swap":  # exchanging a novel one's colours never gives a novel one
            continue
        other = {"swap": swap(meaning, world), "reverse": reverse(meaning), "turn": turn(meaning, rng)}[kind]
        if other is None:
            continue
        if kind == "swap" and rng.random() < 0.5:
            side = rng.choice(("first", "second"))
            return [Exists(getattr(m, side)) for m in (meaning, other)], [meaning, other]
        return [meaning, rng.choice((other, mirrored(other)))], [meaning, other]


# ----------------------------------------------------------------------------------------------------------- entailment
#
# A covered area may conceal one object at its centre. A statement is entailed if it is true, and contradicted if it is
# false, for every possible concealed object; if its truth depends on the concealed object, it is neutral.

LABELS = ("entailment", "neutral", "contradiction")


def label_of(meaning: Meaning, scene: Scene, world: World) -> str:
    """One of LABELS. Only concealed objects matching the description can change its truth, so only these are tried."""
    described = (meaning.first, meaning.second) if isinstance(meaning, Related) else (meaning.what,)
    x, y, w, h = scene.cover
    truths = {holds(meaning, scene)}
    for what in described:
        for size, (pixels, _) in world.level.sizes.items():
            if what.size in (None, size):
                thing = place(what.colour or "any", what.shape or "any", size, pixels, (x + w // 2, y + h // 2))
                truths.add(holds(meaning, replace(scene, objects=(*scene.objects, thing))))
    return "neutral" if len(truths) == 2 else "entailment" if truths == {True} else "contradiction"


def state_count(label: str, kind: str, scene: Scene, world: World, rng: random.Random) -> Count | None:
    """A count of at least two, or at most one, of a colour or shape; None if no such statement has the label."""
    values = world.level.colours if kind == "colour" else world.level.shapes
    number, bound = rng.choice(((2, "at least"), (1, "at most")))
    meanings = [Count(Description(**{kind: value}), number, bound) for value in values]
    fitting = [meaning for meaning in meanings if label_of(meaning, scene, world) == label]
    return rng.choice(fitting) if fitting else None


def state_relation(label: str, split: str, scene: Scene, world: World, rng: random.Random) -> Related | None:
    """One object beside another: both are visible, or one of them is not and may or may not be behind the cover."""
    shown = sorted({(thing.colour, thing.shape) for thing in scene.objects})
    allowed = sorted(world.novel) if split == "novel" else world.ordinary
    unseen = [combination for combination in allowed if combination not in shown]
    for _ in range(40):
        a = rng.choice(shown)
        b = rng.choice(shown if label == "entailment" or (label == "contradiction" and rng.random() < 0.6) else unseen)
        meaning = Related(Description(*a), rng.choice(sorted(AXIS)), Description(*b))
        meaning = rng.choice((meaning, mirrored(meaning)))
        if a != b and may_tell(meaning, split, world) and label_of(meaning, scene, world) == label:
            return meaning
    return None


def entailment(number: int, split: str, world: World, rng: random.Random) -> Asked:
    """One picture with a covered area, and one statement per label."""
    while True:
        scene = draw_any(split, world, rng)
        repeated = [
            kind
            for kind in ("colour", "shape")
            if max(Counter(getattr(thing, kind) for thing in scene.objects).values()) >= 2
        ]
        if not repeated:
            continue
        kind, stated = rng.choice(repeated), []
        for label in LABELS:
            if split == "novel" or rng.random() < 0.5:  # a count mentions no combination, so no novel one either
                stated.append(state_relation(label, split, scene, world, rng))
            else:
                stated.append(state_count(label, kind, scene, world, rng))
        if all(stated):
            break
    rows = []
    for label, meaning in zip(LABELS, stated, strict=True):
        kind = "count" if isinstance(meaning, Count) else "relation"
        text = words(meaning, rng.choice((1, 3, 5, 7)))  # not "a picture of": the concealed object counts
        rows.append(((0,), {"text": text, "label": label, "type": kind}))
    return Asked((scene,), tuple(rows))


# ---------------------------------------------------------------------------------------------------------------- files

QUESTIONS = {"vqa": vqa, "reasoning": reasoning, "entailment": entailment}


def tasks_of(world: World) -> list[str]:
    """The tasks of a level; entailment is included only if the level covers an area."""
    return [task for task in QUESTIONS if task != "entailment" or world.level.covers]


def count_of(task: str, size: int) -> int:
    """The number of samples of a task in a split of `size`: one per picture or, for reasoning, one per two pictures."""
    return size // 2 if task == "reasoning" else size


def questions_of(task: str, split: str, size: int, world: World) -> Iterator[Asked]:
    """The questions of a split, generated from a separate random seed for each task and split."""
    rng = random.Random(f"{world.seed} {task} {split}")
    for number in range(count_of(task, size)):
        yield QUESTIONS[task](number, split, world, rng)
