"""Questions about the synthetic world have one right answer, and half of the input does not tell it.

Texts are read back by a parser of their own and judged naively, straight from the objects of the JSON rows, so that
nothing here trusts the code that wrote them.
"""

import json
import math
import re
from collections import Counter, defaultdict
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from test_scenes import (
    SIZES,
    as_scene,
    describe,
    drawn,
    features,
    fitting,
    naive_relation,
    naive_truth,
    parse,
    pixels_of,
    read,
)

from world import questions, scenes, shapes

LEVELS = ("easy", "full")
SPLITS = ("train", "val", "test", "novel")
DRAWN = {"vqa": {"train": 3000, "test": 1200, "novel": 1200}, "entailment": {"train": 1500, "test": 700, "novel": 700}}
KINDS = ("colour", "shape", "count", "existence", "position", "comparison")
LABELS = ("entailment", "neutral", "contradiction")
TASKS = [("easy", "vqa"), ("easy", "reasoning"), ("full", "vqa"), ("full", "reasoning"), ("full", "entailment")]

WORDINGS = (  # the kind and the wording of a question; the first wording of each kind is the only one of level easy
    ("colour", r"what colour is the (?P<a>\w+)\?"),
    ("shape", r"what shape is the (?P<a>\w+ object)\?"),
    ("count", r"how many (?P<a>[\w ]+) are there\?"),
    ("existence", r"is there a (?P<a>\w+ \w+)\?"),
    ("position", r"where is the (?P<a>\w+ \w+), seen from the (?P<b>\w+ \w+)\?"),
    ("comparison", r"are there more (?P<a>[\w ]+) than (?P<b>[\w ]+)\?"),
    ("colour", r"what is the colour of the (?P<a>\w+)\?"),
    ("shape", r"what is the shape of the (?P<a>\w+ object)\?"),
    ("count", r"how many (?P<a>[\w ]+) can be seen\?"),
    ("existence", r"can one see a (?P<a>\w+ \w+)\?"),
    ("position", r"on which side of the (?P<b>\w+ \w+) is the (?P<a>\w+ \w+)\?"),
)
PICTURES = re.compile(r"(?:the )?(first|second|both|neither|exactly one) (?:picture shows|pictures show) (.+)")
BOUND = re.compile(r"there (?:is|are) at (least|most) (one|two) (.+)")
COLOUR, SHAPE = "|".join(shapes.COLOURS), "|".join(shapes.SHAPES)
COMBINATION = re.compile(rf"\b({COLOUR}) ({SHAPE})(?:s|es)?\b")
RELATION = re.compile(r"\b(left of|right of|above|over|below|under)\b")

# ------------------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, Path]:
    return drawn(tmp_path_factory.getbasetemp())


@cache
def many(level: str, task: str) -> dict[str, list[dict]]:
    """The rows of each split of vqa or entailment, from so many scenes that the spread is small; none is drawn."""
    world = shapes.make_world(level, 0)
    return {
        split: [
            keys | {"scene": scenes.scene_row(asked.scenes[0])}
            for asked in questions.questions_of(task, split, size, world)
            for _, keys in asked.rows
        ]
        for split, size in DRAWN[task].items()
    }


def rows_of(folder: Path, task: str) -> list[tuple[str, dict]]:
    """(split, row) of all files of a task."""
    return [(split, row) for split in SPLITS for row in read(folder, task, split)]


def scenes_of(row: dict) -> list[dict]:
    return row.get("scenes") or [row["scene"]]


def text_of(row: dict) -> str:
    return row.get("question") or row["text"]


def read_question(text: str) -> tuple[int, str, dict, dict | None]:
    """A question -> (number of its wording, kind, what is asked for, seen from or compared with what)."""
    [(number, kind, match)] = [
        (number, kind, match)
        for number, (kind, wording) in enumerate(WORDINGS)
        if (match := re.fullmatch(wording, text))
    ]
    asked = match.groupdict()
    return number, kind, describe(asked["a"]), describe(asked["b"]) if "b" in asked else None


def naive_answer(question: str, scene: dict) -> str:
    """The answer, from the objects alone; fails where a question has none or several."""
    _, kind, a, b = read_question(question)
    things = fitting(a, scene)
    if kind in ("colour", "shape"):
        assert a.keys() == {"colour", "shape"} - {kind} and len(things) == 1, question
        return things[0][kind]
    if kind == "count":
        assert len(a) == 1, question
        return str(len(things))
    if kind == "existence":
        assert a.keys() == {"colour", "shape"}, question
        return "yes" if things else "no"
    others = fitting(b, scene)
    if kind == "comparison":
        assert a.keys() == b.keys() and len(a) == 1 and a != b and things + others, question
        return "yes" if len(things) > len(others) else "no"
    assert a.keys() == b.keys() == {"colour", "shape"} and len(things) == len(others) == 1, question
    sides = [side for side in ("left of", "right of", "above", "below") if naive_relation(things[0], side, others[0])]
    assert len(sides) == 1, question
    return sides[0].removesuffix(" of")


def answer_of(row: dict) -> str:
    [(answer, weight)] = row["answers"].items()
    assert weight == 1.0
    return answer


def naive_label(row: dict) -> bool:
    """Whether a text is true of one picture or of two."""
    match = PICTURES.fullmatch(row["text"])
    truths = [naive_truth(parse(match[2] if match else row["text"]), scene) for scene in row["scenes"]]
    if match is None:
        assert len(truths) == 1, row
        return truths[0]
    first, second = truths
    return {
        "first": first,
        "second": second,
        "both": first and second,
        "neither": not first and not second,
        "exactly one": first != second,
    }[match[1]]


def true_of(statement: str, scene: dict) -> bool:
    """Whether a statement of entailment is true of a scene: "at least two red circles", or a relation."""
    if match := BOUND.fullmatch(statement):
        count, number = len(fitting(describe(match[3]), scene)), {"one": 1, "two": 2}[match[2]]
        return count >= number if match[1] == "least" else count <= number
    return naive_truth(parse(statement), scene)


def possible(scene: dict) -> list[dict]:
    """Everything that a picture may show without its cover: nothing more, or any object at the cover's middle."""
    x, y, w, h = scene["cover"]
    sizes = [("small", 8), ("small", 9), ("large", 15), ("large", 16)]
    return [scene] + [
        {"objects": [*scene["objects"], {"colour": colour, "shape": shape, "size": size, "box": box}]}
        for colour, shape, (size, pixels) in product(shapes.COLOURS, shapes.SHAPES, sizes)
        for box in [(x + (w - pixels) / 2, y + (h - pixels) / 2, pixels, pixels)]
    ]


def shown(scene: dict) -> set[tuple[str, str]]:
    """The combinations (colour, shape) in a picture and behind its cover."""
    return {(thing["colour"], thing["shape"]) for thing in scene["objects"] + scene.get("hidden", [])}


def key_of(row: dict) -> list | None:
    """[sorted colours, sorted shapes] of the two objects that a row relates, as in world.json; None where none are."""
    named = COMBINATION.findall(text_of(row))
    assert len(named) == 2 or not (row["type"] == "position" or RELATION.search(text_of(row))), row
    return [sorted(part) for part in zip(*named, strict=True)] if len(named) == 2 else None


def content(scene: dict) -> set[str]:
    """A picture as a bag: what is in it, how often each colour and each shape, and how often the most frequent one."""
    bag = {f"{thing['colour']} {thing['shape']}" for thing in scene["objects"]} | {str(len(scene["objects"]))}
    for name in ("colour", "shape"):
        counts = Counter(thing[name] for thing in scene["objects"])
        bag |= {f"{number} {value}" for value, number in counts.items()}
        bag |= {f"{len(counts)} {name}s", f"{name} {max(counts.values())} times"}
    return bag


Bags = list[tuple[set[str], str]]  # what is known of each row, and its answer


def right(fit: Bags, judge: Bags) -> int:
    """How many answers naive Bayes guesses that has seen other rows."""
    prior, seen = Counter(answer for _, answer in fit), defaultdict(Counter)
    for bag, answer in fit:
        seen[answer].update(bag)

    def score(answer: str, bag: set[str]) -> float:
        return math.log(prior[answer]) + sum(math.log((seen[answer][f] + 1) / (prior[answer] + 2)) for f in bag)

    return sum(max(sorted(prior), key=lambda guess: score(guess, bag)) == answer for bag, answer in judge)


def right_by_halves(bags: Bags) -> int:
    """The same, fitted to one half of the rows and judged on the other, both ways."""
    return right(bags[::2], bags[1::2]) + right(bags[1::2], bags[::2])


def at_chance(correct: int, rows: int, chance: float) -> bool:
    """At most three points above chance, and four standard deviations of a guess.

    The three points are for what is not a flaw: no colour stands with every shape, so some are rarer than others.
    """
    return correct / rows <= chance + 0.03 + 4 * math.sqrt(chance * (1 - chance) / rows)


def nameless(text: str) -> str:
    """A text without its names of colours and shapes, which a bag of words may know too well to see the rest."""
    return re.sub(rf"\b({SHAPE})(es|s)?\b", "shape", re.sub(rf"\b({COLOUR})\b", "colour", text))


def independent(pairs: list[tuple[str, str]]) -> bool:
    """Whether wording and answer do not go together, by a chi-square test: it sees hints worth two or three points."""
    table, wordings, answers = Counter(pairs), *(Counter(column) for column in zip(*pairs, strict=True))
    expected = {(w, a): wordings[w] * answers[a] / len(pairs) for w, a in product(wordings, answers)}
    excess = sum((table[cell] - mean) ** 2 / mean for cell, mean in expected.items())
    freedom = (len(wordings) - 1) * (len(answers) - 1)
    print(f"chi-square {excess:.0f}, {freedom} is expected: {sorted(table.items())}")
    return excess <= freedom + 5 * math.sqrt(2 * freedom) + 5  # by chance less than once in thousands


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(("level", "task"), TASKS)
def test_each_row_names_the_pictures_of_its_scenes(worlds, level, task):
    """Each task has pictures of its own, and the file is the scene drawn, without what is hidden."""
    for split in SPLITS:
        for row in read(worlds[level], task, split)[:30]:
            for image, scene in zip(row.get("images") or [row["image"]], scenes_of(row), strict=True):
                assert image.startswith(f"images/{task}_{split}/")
                drawn = shapes.render(as_scene({**scene, "hidden": []}), shapes.LEVELS[level].picture)
                assert (drawn == pixels_of(worlds[level], {"image": image})).all(), image


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_the_tasks_it_can_ask(worlds, level):
    tasks = {path.stem.split("_")[0] for path in worlds[level].glob("*.jsonl")} - {"pairs", "foils", "grounding"}
    assert tasks == {task for name, task in TASKS if name == level}
    for task, split in product(tasks, SPLITS):
        size, rows = SIZES.get(split, SIZES["test"]), len(read(worlds[level], task, split))
        assert rows == (4 * (size // 2) if task == "reasoning" else 3 * size)


# ----------------------------------------------------------------------------------------------------------------- vqa


@pytest.mark.parametrize("level", LEVELS)
def test_every_question_has_one_answer_and_it_is_the_right_one(worlds, level):
    wordings = Counter()
    for split, row in rows_of(worlds[level], "vqa"):
        wording, kind, _, _ = read_question(row["question"])
        assert row["type"] == kind, (split, row)
        assert answer_of(row) == naive_answer(row["question"], row["scene"]), (split, row)
        wordings[wording] += 1
    assert wordings.keys() == set(range(len(KINDS) if level == "easy" else len(WORDINGS)))
    assert min(wordings.values()) > 200, wordings


@pytest.mark.parametrize("level", LEVELS)
def test_each_picture_is_asked_three_questions_of_different_kinds(worlds, level):
    kinds = defaultdict(list)
    for split, row in rows_of(worlds[level], "vqa"):
        kinds[split, row["image"]].append(row["type"])
    assert all(len(asked) == len(set(asked)) == 3 for asked in kinds.values())
    assert set().union(*kinds.values()) == set(KINDS)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_more_frequent_than_another(level, kind):
    """Within four standard deviations; colours and shapes within another quarter, since some stand with fewer others.

    One colour of level easy and two of level full belong to no novel combination, all other colours and all shapes to
    one. In the split novel, where novel combinations are asked for, only those colours and shapes are answers.
    """
    for split, rows in many(level, "vqa").items():
        counts = Counter(answer_of(row) for row in rows if row["type"] == kind)
        world = shapes.LEVELS[level]
        expected = {
            "colour": set(world.colours if split != "novel" else counts),
            "shape": set(world.shapes),
            "count": set("012" if level == "easy" else "0123"),
            "position": {"left", "right", "above", "below"},
        }.get(kind, {"yes", "no"})
        assert counts.keys() == expected and (kind != "colour" or len(counts) >= len(world.shapes)), split
        mean, chance = counts.total() / len(counts), 1 / len(counts)
        allowed = 4 * math.sqrt(mean * (1 - chance)) + (mean / 4 if kind in ("colour", "shape") else 0)
        assert all(abs(count - mean) <= allowed for count in counts.values()), (split, counts)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_without_its_picture_is_no_hint(level, kind):
    """A bag of words and bigrams learned in training, on the rest of train, on test and on novel.

    Who knows the question knows that of all colours one does not belong to this shape: one answer less to guess from.
    """
    bags = {
        split: [(features(row["question"]), answer_of(row)) for row in rows if row["type"] == kind]
        for split, rows in many(level, "vqa").items()
    }
    answers = len({answer for _, answer in bags["train"]})
    chance = 1 / (answers - 1 if kind in ("colour", "shape") else answers)
    correct = {split: right(bags["train"], bags[split]) for split in ("test", "novel")}
    correct["train"] = right_by_halves(bags["train"])
    for split, number in correct.items():
        rows = len(bags[split])
        assert at_chance(number, rows, chance), f"{split}: {number / rows:.1%} of {rows} right, chance is {chance:.1%}"


# Fails for kind count, on level easy with some seeds: questions.py asks for shapes the more, the larger the number.
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_wording_of_a_question_is_no_hint(level, kind):
    """Nor is it whether a colour or a shape is asked for."""
    rows = [row for row in many(level, "vqa")["train"] if row["type"] == kind]
    assert independent([(nameless(row["question"]), answer_of(row)) for row in rows])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ("count", "existence", "comparison"))
def test_a_picture_without_its_question_is_no_hint(level, kind):
    """Of these kinds, each answer is as likely of each picture. Not so of colours, shapes and sides, which are seen."""
    bags = [(content(row["scene"]), answer_of(row)) for row in many(level, "vqa")["train"] if row["type"] == kind]
    correct, chance = right_by_halves(bags), 1 / len({answer for _, answer in bags})
    assert at_chance(correct, len(bags), chance), f"{correct / len(bags):.1%} of {len(bags)} right"


# ----------------------------------------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_said_of_one_or_two_pictures_is_labelled_rightly(worlds, level):
    forms = Counter()
    for split, row in rows_of(worlds[level], "reasoning"):
        assert row["label"] is naive_label(row), (split, row)
        assert row["type"] == {1: "one picture", 2: "two pictures"}[len(set(row["images"]))]
        match = PICTURES.fullmatch(row["text"])
        forms[match[1] if match else "one", row["label"]] += 1
    assert {form for form, _ in forms} == {"one", "first", "second", "both", "neither", "exactly one"}
    assert len(forms) == 12 and min(forms.values()) > 50, forms


@pytest.mark.parametrize("level", LEVELS)
def test_each_text_and_each_set_of_pictures_is_half_true(worlds, level):
    """So that the text alone, and the pictures alone, are worth exactly one half."""
    for split in SPLITS:
        rows = read(worlds[level], "reasoning", split)
        assert sum(row["label"] for row in rows) * 2 == len(rows)
        groups, sets, everywhere = defaultdict(list), defaultdict(list), defaultdict(list)
        for row in rows:
            groups[row["group"]].append(row)
            sets[tuple(row["images"])].append(row)
            everywhere[row["text"]].append(row["label"])
        for group in groups.values():
            assert len({row["text"] for row in group}) == 1 and sorted(row["label"] for row in group) == [False, True]
            assert group[0]["images"] != group[1]["images"]
        for asked in sets.values():
            assert len({row["text"] for row in asked}) == 2 and sorted(row["label"] for row in asked) == [False, True]
        assert all(sum(labels) * 2 == len(labels) for labels in everywhere.values())


# ---------------------------------------------------------------------------------------------------------- entailment


def test_labels_say_what_may_be_behind_the_cover(worlds):
    """True whatever is there: entailment; false whatever is there: contradiction; else neutral."""
    for split in SPLITS:
        rows = read(worlds["full"], "entailment", split)[: 3 * 60]
        for start in range(0, len(rows), 3):
            candidates = possible(rows[start]["scene"])
            for row in rows[start : start + 3]:
                assert row["scene"] == rows[start]["scene"]
                truths = {true_of(row["text"], scene) for scene in candidates}
                label = "neutral" if len(truths) == 2 else "entailment" if True in truths else "contradiction"
                assert row["label"] == label, (split, row)


def test_what_is_behind_the_cover_agrees_with_the_labels(worlds):
    hidden = 0
    for split, row in rows_of(worlds["full"], "entailment"):
        everything = {"objects": row["scene"]["objects"] + row["scene"]["hidden"]}
        for scene in (row["scene"], everything):
            assert row["label"] == "neutral" or true_of(row["text"], scene) == (row["label"] == "entailment"), split
        assert row["type"] == ("count" if BOUND.fullmatch(row["text"]) else "relation")
        hidden += len(row["scene"]["hidden"])
    assert hidden > 1000


def test_each_picture_has_one_statement_of_each_label(worlds):
    """So that the picture alone is worth exactly one third."""
    labels = defaultdict(list)
    for split, row in rows_of(worlds["full"], "entailment"):
        labels[split, row["image"]].append(row["label"])
    assert all(sorted(stated) == sorted(LABELS) for stated in labels.values())


@pytest.mark.parametrize("kind", ("count", "relation"))
def test_no_label_is_more_frequent_among_counts_or_relations(kind):
    for split in ("train", "test"):
        counts = Counter(row["label"] for row in many("full", "entailment")[split] if row["type"] == kind)
        mean = counts.total() / 3
        assert all(abs(counts[label] - mean) <= 4 * math.sqrt(mean * 2 / 3) for label in LABELS), (split, counts)


def test_a_statement_without_its_picture_is_no_hint():
    bags = {
        split: [(features(row["text"]), row["label"]) for row in rows]
        for split, rows in many("full", "entailment").items()
    }
    correct = {split: right(bags["train"], bags[split]) for split in ("test", "novel")}
    half = len(bags["train"]) // 6 * 3  # between two pictures
    first, second = bags["train"][:half], bags["train"][half:]
    correct["train"] = right(first, second) + right(second, first)
    for split, number in correct.items():
        rows = len(bags[split])
        assert at_chance(number, rows, 1 / 3), f"{split}: {number / rows:.1%} of {rows} right"


def test_the_wording_of_a_statement_is_no_hint():
    """Nor is the relation, the bound, or whether a colour or a shape is counted."""
    rows = many("full", "entailment")["train"]
    counts, relations = ([row for row in rows if row["type"] == kind] for kind in ("count", "relation"))
    assert independent([(nameless(row["text"]), row["label"]) for row in counts])
    assert independent([(nameless(row["text"]), row["label"]) for row in relations])
    assert independent([(parse(row["text"])[2], row["label"]) for row in relations])


# --------------------------------------------------------------------------------------------------- what is never told


@pytest.mark.parametrize(("level", "task"), TASKS)
def test_novel_combinations_are_seen_and_told_only_in_novel(worlds, level, task):
    """A question of the split novel that names a colour together with a shape names at least one novel combination."""
    novel = set(map(tuple, json.loads((worlds[level] / "world.json").read_text())["novel_combinations"]))
    told = 0
    for split, row in rows_of(worlds[level], task):
        for scene in scenes_of(row):
            assert bool(shown(scene) & novel) == (split == "novel"), (split, row)
        named = set(COMBINATION.findall(text_of(row)))
        assert not named or bool(named & novel) == (split == "novel"), (split, row)
        told += bool(named & novel)
    assert told > 200


@pytest.mark.parametrize(("level", "task"), TASKS)
def test_heldout_relations_are_told_only_in_test_and_novel(worlds, level, task):
    held = json.loads((worlds[level] / "world.json").read_text())["heldout_colours_and_shapes"]
    told = Counter()
    for split, row in rows_of(worlds[level], task):
        if key := key_of(row):
            told[split, key in held] += 1
    assert not told["train", True] and not told["val", True], told
    assert min(told[case] for case in (("train", False), ("val", False), ("test", False), ("test", True))) > 20, told
