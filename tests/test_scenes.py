"""The synthetic world tells the truth, gives nothing away in its texts, and is the same from the same seed.

Texts are read back by a parser of their own and judged by a naive second definition of truth, straight from the boxes
of the JSON rows, so that nothing here trusts the code that wrote them.
"""

import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from world import scenes, shapes

LEVELS = ("easy", "full")
SIZES = {"train": 600, "val": 200, "test": 400}
SPLITS = ("train", "val", "test", "novel")
SYNONYMS = {"over": "above", "under": "below", "to the left of": "left of", "to the right of": "right of"}
OPENING = re.compile("^(there is |there are |a picture of |one can see |exactly )")
RELATION = re.compile(" (?:is )?((?:to the )?(?:left|right) of|above|over|below|under) ")
NUMBERS = {"one": 1, "two": 2, "three": 3}

# ------------------------------------------------------------------------------------------------------------- helpers


def make(folder: Path, level: str, seed: int = 0, **sizes: int) -> Path:
    """A world on disk, made through the command line."""
    arguments = ["--out", str(folder), "--level", level, "--seed", str(seed)]
    for split, size in (SIZES | sizes).items():
        arguments += [f"--{split}", str(size)]
    scenes.main(arguments)
    return folder


@cache
def drawn(folder: Path) -> dict[str, Path]:
    """One small world of each level for all tests, those of test_questions.py too."""
    made = {}
    for level in LEVELS:
        start = time.perf_counter()
        made[level] = make(folder / "worlds" / level, level)
        count = len(list(made[level].glob("images/*/*.png")))
        print(f"level {level}: {count / (time.perf_counter() - start):.0f} pictures/s")
    return made


@pytest.fixture(scope="session")
def worlds(tmp_path_factory) -> dict[str, Path]:
    return drawn(tmp_path_factory.getbasetemp())


@cache
def read(folder: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}_{split}.jsonl").read_text().splitlines()]


def all_rows(folder: Path) -> list[tuple[str, str, dict]]:
    """(task, split, row) of every file that is asked of one picture and its caption; test_questions.py has the rest."""
    names = [path.stem.split("_") for path in sorted(folder.glob("*.jsonl"))]
    tasks = ("pairs", "foils", "grounding")
    return [(task, split, row) for task, split in names if task in tasks for row in read(folder, task, split)]


def told_rows(folder: Path) -> list[tuple[str, str, dict]]:
    """(task, split, row) of every file whose rows have a caption."""
    return [(task, split, row) for task, split, row in all_rows(folder) if "caption" in row]


def describe(text: str) -> dict:
    """'a large red circle' or 'red circles' -> what is said of colour, shape and size."""
    said = {}
    for word in text.removeprefix("a ").split():
        singular = word.removesuffix("es") if word == "crosses" else word.removesuffix("s") if word != "cross" else word
        if word in shapes.COLOURS:
            said["colour"] = word
        elif word in ("small", "large"):
            said["size"] = word
        elif singular in shapes.SHAPES:
            said["shape"] = singular
        else:
            assert singular == "object", f"unknown word {word!r} in {text!r}"
    return said


@cache
def parse(text: str) -> tuple:
    """A text -> ("exists", said), ("count", said, number) or ("related", said, relation, said)."""
    text = OPENING.sub("", text)
    if match := RELATION.search(text):
        relation = SYNONYMS.get(match[1], match[1])
        return "related", describe(text[: match.start()]), relation, describe(text[match.end() :])
    first, _, rest = text.partition(" ")
    return ("count", describe(rest), NUMBERS[first]) if first in NUMBERS else ("exists", describe(text))


def naive_relation(a: dict, relation: str, b: dict) -> bool:
    """From boxes alone: a free line of pixels between them in the right order, middles within 3 pixels across."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["box"], b["box"]
    same_row, same_column = abs(2 * ay + ah - 2 * by - bh) <= 6, abs(2 * ax + aw - 2 * bx - bw) <= 6
    return {
        "left of": same_row and ax + aw < bx,
        "right of": same_row and bx + bw < ax,
        "above": same_column and ay + ah < by,
        "below": same_column and by + bh < ay,
    }[relation]


def fitting(said: dict, scene: dict) -> list[dict]:
    """The objects of which everything said is true."""
    return [thing for thing in scene["objects"] if all(thing[name] == value for name, value in said.items())]


def naive_truth(meaning: tuple, scene: dict) -> bool:
    """A second definition of truth, on parsed texts and JSON scenes."""
    first = fitting(meaning[1], scene)
    if meaning[0] == "exists":
        return len(first) > 0
    if meaning[0] == "count":
        return len(first) == meaning[2]
    return any(naive_relation(a, meaning[2], b) for a in first for b in fitting(meaning[3], scene) if a is not b)


def combinations(text: str) -> set[tuple[str, str]]:
    """The (colour, shape) combinations that a text names."""
    parts = [part for part in parse(text) if isinstance(part, dict)]
    return {(part["colour"], part["shape"]) for part in parts if len(part.keys() & {"colour", "shape"}) == 2}


def key_of(text: str) -> list | None:
    """[sorted colours, sorted shapes] of a relation, as in world.json; None for other texts."""
    meaning = parse(text)
    if meaning[0] != "related":
        return None
    return [sorted(part[name] for part in (meaning[1], meaning[3])) for name in ("colour", "shape")]


def canonical(text: str) -> str:
    """One text for equivalent relations, without sizes and frames."""
    _, first, relation, second = parse(text)
    a, b = (f"{said['colour']} {said['shape']}" for said in (first, second))
    return (
        f"{b} {'left of' if relation == 'right of' else 'above'} {a}"
        if relation in ("right of", "below")
        else (f"{a} {relation} {b}")
    )


def as_scene(row: dict) -> shapes.Scene:
    """A JSON scene -> Scene."""
    objects, hidden = (
        tuple(shapes.Object(**{**thing, "box": tuple(thing["box"])}) for thing in row.get(name, ()))
        for name in ("objects", "hidden")
    )
    cover = tuple(row["cover"]) if "cover" in row else None
    return shapes.Scene(row["background"], objects, cover, hidden, tuple(map(tuple, row.get("clutter", ()))))


def pixels_of(folder: Path, row: dict) -> np.ndarray:
    return np.asarray(Image.open(folder / row["image"]).convert("RGB")).astype(int)


# --------------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("level", LEVELS)
def test_captions_are_true_and_foils_are_false(worlds, level):
    kinds = Counter()
    for _, split, row in told_rows(worlds[level]):
        assert naive_truth(parse(row["caption"]), row["scene"]), (split, row)
        for kind, foil in row.get("foils", {}).items():
            assert not naive_truth(parse(foil), row["scene"]), (split, kind, row)
            kinds[kind, split] += 1
    level_kinds = {"swap", "relation", "axis", "colour", "shape"} | ({"size", "count"} if level == "full" else set())
    assert {kind for kind, split in kinds if split == "test"} == level_kinds
    # Exchanged colours of a novel combination are never novel, which its text would give away: novel has no swap.
    assert {kind for kind, split in kinds if split == "novel"} == level_kinds - {"swap"}
    assert min(kinds.values()) >= 40, kinds


@pytest.mark.parametrize("level", LEVELS)
def test_phrases_name_one_object_and_its_box(worlds, level):
    """Every phrase fits exactly one visible object, whose box is the answer; all visible boxes are proposals."""
    count = Counter()
    for split in SPLITS:
        asked = set()
        for row in read(worlds[level], "grounding", split):
            kind, said = parse(row["text"])
            assert kind == "exists" and said.keys() == {"colour", "shape"}
            assert [thing["box"] for thing in fitting(said, row["scene"])] == row["boxes"]
            assert row["proposals"] == [thing["box"] for thing in row["scene"]["objects"]]
            assert (row["image"], row["text"]) not in asked
            asked.add((row["image"], row["text"]))
            count[split] += 1
    assert min(count.values()) >= 200, count


@pytest.mark.parametrize("level", LEVELS)
def test_related_objects_are_described_unambiguously(worlds, level):
    for _, _, row in told_rows(worlds[level]):
        meaning = parse(row["caption"])
        if meaning[0] == "related":
            assert all(len(fitting(said, row["scene"])) == 1 for said in (meaning[1], meaning[3])), row


@pytest.mark.parametrize("level", LEVELS)
def test_holds_agrees_with_a_naive_definition_of_truth(worlds, level):
    rng, seen = random.Random(0), Counter()
    for row in read(worlds[level], "pairs", "train")[:300]:
        scene = as_scene(row["scene"])
        for a, b in permutations(row["scene"]["objects"], 2):
            drawn = [{name: thing[name] for name in rng.sample(("colour", "shape", "size"), 2)} for thing in (a, b)]
            first, second = (shapes.Description(**said) for said in drawn)
            for relation in shapes.AXIS:
                truth = naive_truth(("related", drawn[0], relation, drawn[1]), row["scene"])
                assert shapes.holds(shapes.Related(first, relation, second), scene) is truth
                assert shapes.holds(shapes.mirrored(shapes.Related(first, relation, second)), scene) is truth
                seen[truth] += 1
            for number in range(4):
                truth = naive_truth(("count", drawn[0], number), row["scene"])
                assert shapes.holds(shapes.Count(first, number), scene) is truth
            assert shapes.holds(shapes.Exists(first), scene)
    assert min(seen[True], seen[False]) > 200


@pytest.mark.parametrize("level", LEVELS)
def test_no_relation_is_borderline(worlds, level):
    for _, _, row in all_rows(worlds[level]):
        objects = row["scene"]["objects"]
        for a, b in permutations(objects, 2):
            across = [abs(a["box"][i] + a["box"][i + 2] / 2 - b["box"][i] - b["box"][i + 2] / 2) for i in (0, 1)]
            assert all(offset <= 3 or offset >= 10 for offset in across), row
            assert sum(naive_relation(a, relation, b) for relation in shapes.AXIS) <= 1
        if level == "easy":
            assert len(objects) == 2 and sum(naive_relation(*objects[:1], r, *objects[1:]) for r in shapes.AXIS) == 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ("val", "test", "novel"))
def test_each_caption_of_a_gallery_is_true_of_exactly_one_picture(worlds, level, split):
    rows = read(worlds[level], "pairs", split)
    assert len({canonical(row["caption"]) for row in rows}) == len(rows)
    for row in rows[:120]:
        meaning = parse(row["caption"])
        assert sum(naive_truth(meaning, other["scene"]) for other in rows) == 1, row["caption"]


@pytest.mark.parametrize("level", LEVELS)
def test_twins_differ_in_their_pictures_and_deny_each_others_captions(worlds, level):
    rows = read(worlds[level], "pairs", "train")
    assert len(rows) == SIZES["train"]
    exchanged = single = 0
    relations = Counter()
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        assert a["twin"] == b["twin"]
        assert (pixels_of(worlds[level], a) != pixels_of(worlds[level], b)).any()
        looks = [sorted((t["colour"], t["shape"], t["size"]) for t in row["scene"]["objects"]) for row in (a, b)]
        boxes = [[thing["box"] for thing in row["scene"]["objects"]] for row in (a, b)]
        assert (looks[0] == looks[1]) != (boxes[0] == boxes[1]), "either the places or the colours change, never both"
        exchanged += boxes[0] == boxes[1]
        single += parse(a["caption"])[0] == "exists"
        if a["caption"] == b["caption"]:
            assert boxes[0] != boxes[1] and parse(a["caption"])[0] != "related"
        else:
            assert not naive_truth(parse(a["caption"]), b["scene"]) and not naive_truth(parse(b["caption"]), a["scene"])
        if parse(a["caption"])[0] == "related" and boxes[0] != boxes[1]:
            told = [parse(row["caption"])[2] for row in (a, b)]
            relations[shapes.AXIS[told[0]] == shapes.AXIS[told[1]]] += 1
        elif parse(a["caption"])[0] == "exists":
            for row in (a, b):
                named = min(row["scene"]["objects"][:2], key=lambda thing: sum(thing["box"][:2]))
                said = parse(row["caption"])[1]
                assert said == {name: named[name] for name in said}, row
    assert relations[True] > 2 * relations[False] > 0, "mostly reversed on the same axis, sometimes on the other"
    assert len({row["twin"] for row in rows}) == len(rows) // 2
    assert 0.2 < exchanged / (len(rows) // 2) < 0.4
    assert 0.14 < single / (len(rows) // 2) < 0.26


# ------------------------------------------------------------------------------------------- what text alone gives away


def pairs_of_texts(folder: Path, kind: str, splits: tuple[str, ...]) -> list[tuple[str, str]]:
    rows = [row for split in splits for row in read(folder, "foils", split)]
    return [(row["caption"], row["foils"][kind]) for row in rows if kind in row["foils"]]


def features(text: str) -> set[str]:
    parts = text.split()
    return set(parts) | {f"{a} {b}" for a, b in pairwise(parts)}


def near_chance(correct: float, rows: int) -> bool:
    """Within four standard deviations of half right: all tests here together would fail by chance once in hundreds."""
    return abs(correct / rows - 0.5) <= 4 * 0.5 / math.sqrt(rows)


def bag_of_words_correct(texts: list[tuple[str, str]]) -> tuple[float, int]:
    """Logistic regression on words and bigrams of caption and foil, fitted to half of the rows, judged on the rest."""
    names = {name: i for i, name in enumerate(sorted({f for pair in texts for text in pair for f in features(text)}))}
    bags = np.zeros((len(texts), 2, len(names)))
    for i, pair in enumerate(texts):
        for j, text in enumerate(pair):
            bags[i, j, [names[name] for name in features(text)]] = 1
    difference = bags[:, 0] - bags[:, 1]
    fit, judge = difference[::2], difference[1::2]
    weights = np.zeros(len(names))
    for _ in range(200):
        weights += 0.5 * (fit.T @ (1 / (1 + np.exp(fit @ weights))) / len(fit) * 4 - 0.01 * weights)
    score = judge @ weights
    return (score > 1e-9).sum() + 0.5 * (abs(score) <= 1e-9).sum(), len(judge)


CASES = [
    (level, kind, splits)
    for level, kinds in (("easy", ""), ("full", "size count"))
    for kind in ["swap", "relation", "axis", "colour", "shape", *kinds.split()]
    for splits in (("val", "test"), ("novel",))
    if not (kind == "swap" and splits == ("novel",))
]


@pytest.mark.parametrize(("level", "kind", "splits"), CASES)
def test_a_bag_of_words_cannot_tell_caption_from_foil(worlds, level, kind, splits):
    correct, rows = bag_of_words_correct(pairs_of_texts(worlds[level], kind, splits))
    assert near_chance(correct, rows), f"{correct:.0f} of {rows} right"


@pytest.mark.parametrize("attribute", ("colour", "shape"))
def test_each_meaning_is_a_foil_as_often_as_it_gets_one(attribute):
    """Else the meanings with many neighbours would be more frequent among foils than among captions."""
    world, rng = shapes.make_world("easy", 0), random.Random(0)
    left, reached, pool = Counter(), Counter(), world.pools["heldout"]
    for meaning in pool:
        for _ in range(30):
            if foil := scenes.altered(meaning, attribute, world, rng):
                left[meaning] += 1
                reached[foil] += 1
    assert left.total() > 10 * len(pool) and reached.keys() <= set(pool)
    excess = sum((left[meaning] - reached[meaning]) ** 2 / (left[meaning] + reached[meaning]) for meaning in reached)
    assert excess < len(reached) + 5 * math.sqrt(2 * len(reached))  # a sum of so many squares of mean one


@pytest.mark.parametrize(("level", "kind", "splits"), [case for case in CASES if case[1] != "count"])
def test_knowing_the_training_captions_is_no_hint(worlds, level, kind, splits):
    """Scores by how often training has told the key, the pieces of the text and its bigrams."""
    told = Counter()
    for row in read(worlds[level], "pairs", "train"):
        told.update(features(row["caption"]))
        told.update([str(key_of(row["caption"]))] if key_of(row["caption"]) else [])
    texts = pairs_of_texts(worlds[level], kind, splits)
    for score in (
        lambda text: bool(told[str(key_of(text))]),
        lambda text: sum(math.log(1 + told[name]) for name in features(text)),
    ):
        margins = [score(caption) - score(foil) for caption, foil in texts]
        correct = sum((margin > 1e-9) + 0.5 * (abs(margin) <= 1e-9) for margin in margins)
        assert near_chance(correct, len(texts)), f"{correct:.0f} of {len(texts)} right"


@pytest.mark.parametrize("level", LEVELS)
def test_novel_combinations_are_seen_and_told_only_in_novel(worlds, level):
    novel = set(map(tuple, json.loads((worlds[level] / "world.json").read_text())["novel_combinations"]))
    assert len(novel) == len(shapes.LEVELS[level].shapes)
    for _, split, row in all_rows(worlds[level]):
        things = row["scene"]["objects"] + row["scene"].get("hidden", [])
        shown = {(thing["colour"], thing["shape"]) for thing in things} & novel
        texts = [row["caption"], *row["foils"].values()] if "foils" in row else [row.get("caption") or row["text"]]
        assert all(bool(combinations(text) & novel) == (split == "novel") for text in texts), row
        assert bool(shown) == (split == "novel"), row


@pytest.mark.parametrize("level", LEVELS)
def test_heldout_meanings_are_told_only_in_test_and_novel(worlds, level):
    held = json.loads((worlds[level] / "world.json").read_text())["heldout_colours_and_shapes"]
    for task, split, row in told_rows(worlds[level]):
        assert row["heldout"] == (key_of(row["caption"]) in held)
        assert all((key_of(foil) in held) == row["heldout"] for foil in row.get("foils", {}).values())
        assert split in ("test", "novel") or not row["heldout"], (task, split)
    assert sum(row["heldout"] for row in read(worlds[level], "pairs", "test")) == SIZES["test"] // 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(5))
def test_every_ordinary_combination_is_seen_in_every_relation(level, seed):
    world = shapes.make_world(level, seed)
    told = {(pair.colour, pair.shape, m.relation) for m in world.pools["seen"] for pair in (m.first, m.second)}
    assert told == {(*combination, relation) for combination in world.ordinary for relation in ("left of", "above")}
    assert {colour for colour, _ in world.ordinary} == set(world.level.colours)
    assert {shape for _, shape in world.ordinary} == set(world.level.shapes)
    held, rest = len(world.pools["heldout"]), len(world.pools["heldout"]) + len(world.pools["seen"])
    assert 0.2 <= held / rest <= 0.22
    assert {shapes.key(meaning) for meaning in world.pools["seen"]}.isdisjoint(world.heldout)


# ------------------------------------------------------------------------------------------------- pictures and files


@pytest.mark.parametrize("level", LEVELS)
def test_boxes_hold_the_coloured_pixels_and_touch_them_on_all_sides(worlds, level):
    for split in SPLITS:
        for row in read(worlds[level], "pairs", split)[:40]:
            pixels, background = pixels_of(worlds[level], row), row["scene"]["background"]
            assert pixels.shape == (shapes.LEVELS[level].picture,) * 2 + (3,)
            boxes = {}
            for thing in row["scene"]["objects"]:
                x, y, w, h = thing["box"]
                inside = pixels[y : y + h, x : x + w]
                own = abs(inside - shapes.COLOURS[thing["colour"]]).max(axis=2) < 25
                assert own.mean() > 0.1
                marked = abs(inside - background).max(axis=2) > 12  # faint marks differ by 12
                assert all(edge.any() for edge in (marked[0], marked[-1], marked[:, 0], marked[:, -1])), thing
                boxes.setdefault(thing["colour"], np.zeros(pixels.shape[:2], dtype=bool))[y : y + h, x : x + w] = True
            for colour, rgb in shapes.COLOURS.items():
                outside = ~boxes.get(colour, np.zeros(pixels.shape[:2], dtype=bool))
                assert not (abs(pixels - rgb).max(axis=2) < 25)[outside].any(), (row["image"], colour)


def test_hidden_objects_leave_no_trace(worlds):
    rows = read(worlds["full"], "pairs", "train")[:200]
    assert 50 < sum(bool(row["scene"]["hidden"]) for row in rows) < 150
    for row in rows:
        x, y, w, h = row["scene"]["cover"]
        for thing in row["scene"]["hidden"]:
            bx, by, bw, bh = thing["box"]
            assert x <= bx and y <= by and bx + bw <= x + w and by + bh <= y + h
        for thing in row["scene"]["objects"]:
            bx, by, bw, bh = thing["box"]
            assert bx + bw <= x or x + w <= bx or by + bh <= y or y + h <= by, "a visible object is partly covered"
        bare = as_scene({**row["scene"], "hidden": []})
        assert (shapes.render(bare, 64) == pixels_of(worlds["full"], row)).all()


ABOUT = ("world.json", "written.json")  # what stands in a world beside pictures and rows


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("level", LEVELS)
def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, level):
    first, second, other = (
        files_of(make(tmp_path / name, level, seed=seed, train=20, val=10, test=10))
        for name, seed in (("first", 3), ("second", 3), ("other", 4))
    )
    assert first == second
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first if name.endswith("jsonl"))


@pytest.mark.parametrize("level", LEVELS)
def test_a_larger_training_split_changes_no_other_split(tmp_path, level):
    small, large = (files_of(make(tmp_path / str(n), level, train=n, val=10, test=10)) for n in (20, 40))
    assert all(small[name] == large[name] for name in small if "train" not in name and name not in ABOUT)
    assert large["pairs_train.jsonl"].startswith(small["pairs_train.jsonl"])


def test_a_second_run_does_nothing_and_other_arguments_are_refused(tmp_path, capsys):
    sizes = {"train": 20, "val": 10, "test": 10}
    folder = make(tmp_path / "world", "easy", **sizes)
    picture = folder / "images/train/000000.png"
    picture.write_bytes(b"mine")
    make(folder, "easy", **sizes)
    assert "nothing to do" in capsys.readouterr().out and picture.read_bytes() == b"mine"
    with pytest.raises(ValueError, match="other arguments: pass --force"):
        make(folder, "easy", seed=1, **sizes)
    scenes.main(["--out", str(folder), "--train", "20", "--val", "10", "--test", "10", "--force"])
    assert picture.read_bytes() != b"mine"
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "a.jpg").touch()
    with pytest.raises(ValueError, match="not a world"):
        scenes.main(["--out", str(foreign), "--force"])


def test_a_world_that_is_replaced_leaves_what_is_not_its_own(tmp_path, capsys):
    """Notes, a file of rows, a run, and a picture beside the pictures stay; of the old world nothing does."""
    folder = make(tmp_path / "world", "easy", train=40, val=10, test=10)
    mine = ("notes.txt", "my.jsonl", "runs/demo/checkpoint.pt", "images/train/cat.png", "images/my/a.png")
    for name in mine:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    small = ["--train", "20", "--val", "10", "--test", "10", "--level", "nlvr"]
    scenes.main(["--out", str(folder), *small, "--force"])
    fresh = files_of(make(tmp_path / "fresh", "nlvr", train=20, val=10, test=10))
    found = files_of(folder)
    assert {name: found.pop(name) for name in mine} == dict.fromkeys(mine, b"mine")
    assert found == fresh
    assert not (folder / "images" / "novel").exists(), "no empty folders"


def test_a_file_that_stands_in_the_way_is_not_replaced(tmp_path):
    """A world that needs a name which another file has is not written."""
    folder = make(tmp_path / "world", "easy", train=20, val=10, test=10)
    picture = folder / "images/train/000030.png"
    picture.write_bytes(b"mine")
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"000030.png.* is not on its list.* move it away"):
        scenes.main(["--out", str(folder), "--train", "40", "--val", "10", "--test", "10", "--force"])
    assert files_of(folder) == before


def test_a_world_without_a_list_is_not_deleted(tmp_path):
    """One that an older version wrote."""
    folder = make(tmp_path / "world", "easy", train=20, val=10, test=10)
    (folder / "written.json").unlink()
    before = files_of(folder)
    with pytest.raises(ValueError, match="is not on its list"):
        scenes.main(["--out", str(folder), "--train", "40", "--val", "10", "--test", "10", "--force"])
    assert files_of(folder) == before


def test_a_world_may_be_drawn_into_the_folder_that_one_is_in(tmp_path, monkeypatch):
    """Named by the way back to it, or not at all."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here", "images/.."):
        scenes.main(["--out", out, "--train", "20", "--val", "10", "--test", "10", "--force"])
    assert [path.name for path in tmp_path.iterdir()] == ["here"] and len(files_of(tmp_path / "here")) > 100


def test_a_killed_run_is_begun_anew(tmp_path):
    """While it drew: what it left is no world, and is not asked about. While it moved: the list knows its files."""
    folder = tmp_path / "world"
    (folder / f"{scenes.written.TEMPORARY}abc").mkdir(parents=True)
    sizes = {"train": 20, "val": 10, "test": 10}
    whole = files_of(make(folder, "easy", **sizes))
    (folder / "world.json").unlink()
    (folder / "pairs_val.jsonl").unlink()
    assert files_of(make(folder, "easy", **sizes)) == whole


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_old_world_stays_whole_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch, fault):
    folder = make(tmp_path / "world", "easy", train=20, val=10, test=10)
    (folder / "notes.txt").write_text("mine")
    before, calls, replace = files_of(folder), iter(range(1000)), scenes.written.os.replace

    def failing(*arguments):
        if next(calls) == 50:
            raise fault("stopped")
        return replace(*arguments)

    monkeypatch.setattr(scenes.written.os, "replace", failing)
    with pytest.raises(fault):
        scenes.main(["--out", str(folder), "--train", "40", "--val", "10", "--test", "10", "--force"])
    assert files_of(folder) == before


def test_an_interrupted_run_leaves_nothing_half_made(tmp_path, monkeypatch):
    def interrupt(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "scene_row", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "world", "easy", train=20, val=10, test=10)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give a smaller --test"):
        make(tmp_path / "world", "easy", test=600)
    with pytest.raises(ValueError, match="--train even"):
        make(tmp_path / "world", "easy", train=21)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path):
    command = [sys.executable, scenes.__file__, "--out", str(tmp_path / "world"), "--train", "21"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
