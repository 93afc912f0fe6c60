"""Damaged and foreign inputs of every kind: they work or end in one sentence, never in a traceback.

FUZZ=300 python -m pytest tests/test_fuzz.py tries that many of each kind.
"""

import base64
import copy
import dataclasses
import json
import os
import random
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SIZES, caption, new_run, resumed_run, square, write_squares, write_task

import data
import reading.pictures as reading_pictures
import runtime
import train
from eval import load_model
from explain import How
from mamo import MAMOConfig
from metrics import judge_answers, judge_grounding, read_predictions
from reading.pictures import check_image
from reading.videos import check_video
from tokenizer import Tokenizer
from tools import compare, prepare
from tools.serve import Looker

ODD = [None, True, -1, 0, 3.5, float("nan"), 10**12, "", "vqa", [], [1], {}, {"a": 1}, torch.zeros(3), torch.tensor(1)]
CPU = torch.device("cpu")
COUNT = int(os.environ.get("FUZZ", "60"))  # inputs of each kind; thousands for a long run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The content of a checkpoint in mid-run."""
    out = tmp_path_factory.mktemp("whole")
    new_run(write_squares(out / "pairs.jsonl"), out).train(stop_at=3)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all parts of nested dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in parts for found in [(*path, key), *places(part, (*path, key))]]


def changed(state: dict, draw: random.Random) -> tuple[dict, str]:
    """A copy in which one part is something else, or missing; and what was done."""
    state = copy.deepcopy(state)
    *parents, last = draw.choice(
        [place for place in places(state) if draw.random() < 2 / len(place) ** 2] or [("step",)]
    )
    part = state
    for key in parents:
        part = part[key]
    if draw.random() < 0.2 and isinstance(part, dict):
        del part[last]
        return state, f"{[*parents, last]} is missing"
    new = draw.choice(ODD)
    if isinstance(part[last], torch.Tensor) and draw.random() < 0.5:
        new = draw.choice(
            [part[last][:1] if part[last].ndim else part[last][None], part[last].double(), part[last] * 2]
        )
    part[last] = new
    return state, f"{[*parents, last]} is {new!r:.60}"


def outcome(use, what: str) -> str:
    """What came of it: fine, or the sentence of a refusal."""
    try:
        use()
    except ValueError as error:
        sentence, *listed = runtime.readable(str(error)).split(
            "\n"
        )  # the first pictures that cannot be used are listed below
        plain = len(sentence) < 700 and len(listed) <= 10 and all(one[:2] == "  " and len(one) < 320 for one in listed)
        assert plain, f"{what}: not one sentence: {error}"
        return str(error)
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    return "fine"


@pytest.mark.parametrize("kind", ["evaluated", "resumed"])
def test_a_checkpoint_with_a_foreign_part_works_or_is_refused_in_one_sentence(whole, tmp_path, kind):
    """Also the state of the optimiser: torch takes one of another length, and the process then dies."""
    draw, refused = random.Random(kind), 0
    for _ in range(COUNT):
        state, what = changed(whole, draw)
        torch.save(state, tmp_path / "checkpoint.pt")

        def use():
            if kind == "evaluated":
                model, tokenizer, _ = load_model(tmp_path / "checkpoint.pt", CPU)
                input_ids, attention_mask = tokenizer(["a red square"], model.config.max_tokens)
                model.score(torch.zeros(1, 3, *model.config.image_size), input_ids, attention_mask)
            else:
                run = resumed_run(tmp_path)
                run.config.save_every = 10**9
                run.train(stop_at=4)

        refused += outcome(use, what) != "fine"
        (tmp_path / "log.csv").unlink(missing_ok=True)
    assert refused > COUNT / 5, "nearly all were harmless: nothing is tested"


def test_a_flipped_bit_is_noticed(whole, tmp_path):
    """By the checksums that torch writes; a bit between the parts of the file may be of no consequence."""
    path, draw = tmp_path / "checkpoint.pt", random.Random(0)
    torch.save(whole, path)
    content, fine = path.read_bytes(), 0
    for _ in range(COUNT):
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        if outcome(lambda: runtime.load_checkpoint(path), f"a bit of byte {place}") == "fine":
            fine, loaded = fine + 1, runtime.load_checkpoint(path)
            same = all(torch.equal(value, whole["model"][name]) for name, value in loaded["model"].items())
            assert same and loaded["vocab"] == whole["vocab"], f"a bit of byte {place} went unnoticed"
    assert fine < COUNT / 2


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_file_that_is_cut_is_refused(whole, tmp_path, size):
    path = Path(tmp_path / "checkpoint.pt")
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:size])
    assert outcome(lambda: runtime.load_checkpoint(path), "cut") != "fine"


# ----------------------------------------------------------------------------------------------------- everything else
#
# Of each kind of input a whole one, and how it is used. A changed value is one from ODD_VALUES in a random place;
# changed bytes are flipped, cut off or repeated. What is refused ends in one sentence; what is accepted must work.

ODD_VALUES = [None, True, -1, 0, 3.5, 1e400, float("nan"), 10**30, "", " ", "\u200b", "\ud800", "vqa", "../x",
              "a" * 999, "[MASK]", [], [1], [[]], ["a", 1], {}, {"a": 1}, {"": ""}]  # fmt: skip


def odd(value: object, draw: random.Random) -> object:
    """A copy of plain values in which one part is something else, or missing."""
    value = copy.deepcopy(value)
    *parents, last = draw.choice(places(value))
    part = value
    for key in parents:
        part = part[key]
    if draw.random() < 0.2 and isinstance(part, dict):
        del part[last]
    else:
        part[last] = draw.choice(ODD_VALUES)
    return value


def spoiled(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some of them flipped, cut off or repeated."""
    content, place = bytearray(content), draw.randrange(len(content))
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        return bytes(content[:place] + content[place // 2 :])
    for _ in range(1 if kind == 2 else 20):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


@dataclass
class Inputs:
    """Whole inputs in a folder, and what uses each of them."""

    folder: Path
    draw: random.Random

    def rows(self, task: str) -> None:
        """A JSONL file in which a value or some bytes changed, read, and its first picture decoded."""
        path = self.folder / f"{task}.jsonl"
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        number = self.draw.randrange(len(lines))
        lines[number] = odd(lines[number], self.draw)
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        changed = self.folder / "changed.jsonl"
        changed.write_bytes(spoiled(content, self.draw) if self.draw.random() < 0.3 else content)
        for row in data.read_rows([changed], task, check="full", skip_bad=self.draw.random() < 0.3):
            for image in data.pictures_of(row):
                data.to_tensor(image, (16, 24))

    def picture(self, kind: str) -> None:
        """What a full check passes can be used."""
        path = self.folder / f"changed.{kind}"
        path.write_bytes(spoiled((self.folder / f"whole.{kind}").read_bytes(), self.draw))
        reading_pictures.check_image.cache_clear()
        name = data.video_of(path) if kind in ("gif", "webp") else str(path)
        fault = check_video(name, "full") if kind in ("gif", "webp") else check_image(name, "full")
        if fault is None:
            data.to_tensor(name, (16, 24), 4)
        else:
            raise ValueError(str(fault).splitlines()[0][:600])

    def archive(self, _: str) -> None:
        """A tar archive with spoiled bytes."""
        path = self.folder / f"{self.draw.random()}.tar"
        path.write_bytes(spoiled((self.folder / "whole.tar").read_bytes(), self.draw))
        for row in data.open_rows([path], "pairs", "full"):
            data.to_tensor(row["image"], (16, 24))

    def vocabulary(self, _: str) -> None:
        """A vocab.txt."""
        path = self.folder / "changed.txt"
        path.write_bytes(spoiled((self.folder / "vocab.txt").read_bytes(), self.draw))
        Tokenizer.from_file(path)(["a red square"], 20)

    def annotations(self, kind: str) -> None:
        """An official file of COCO or VQA."""
        content = odd(json.loads((self.folder / f"{kind}.json").read_text()), self.draw)
        (self.folder / "changed.json").write_text(json.dumps(content))
        given = ["--annotations", self.folder / "changed.json", "--images", self.folder, "--out", self.folder / "out"]
        given += ["--questions", self.folder / "questions.json"] if kind == "vqa" else []
        prepare.main([kind, *map(str, given), "--split", "train", "--force"])

    def plan(self, _: str) -> None:
        """A plan of compare."""
        path = self.folder / "plan.json"
        path.write_text(json.dumps(odd(PLAN, self.draw)))
        compare.steps_of(compare.read_plan(path), {"a": 1.0, "b": 2.0})

    def predictions(self, task: str) -> None:
        """A file of answers, or of points and boxes, scored."""
        rows = data.read_rows([self.folder / f"{task}.jsonl"], task)
        if task == "vqa":
            lines = [{"row": number, "answer": "red"} for number in range(len(rows))]
        else:
            lines = [{"row": n, "grid": [2, 3], "point": [1, 1], "box": [0, 0, 9, 9]} for n in range(len(rows))]
        lines = odd(lines, self.draw)
        path = self.folder / "said.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = read_predictions(path, rows)
        judge_answers(task, rows, [one["answer"] for one in found]) if task == "vqa" else judge_grounding(rows, found)

    def options(self, script: str) -> None:
        """A command line with one option of another value, which must not pass and then fail before the first step."""
        names = [field.name for field in dataclasses.fields(train.TrainConfig) if field.type in (int, float)]
        names += [field.name for field in dataclasses.fields(MAMOConfig) if field.type in ("int", "float", int, float)]
        name = self.draw.choice([name for name in names if name not in ("workers", "vocab_size", "mask_id")])
        value = self.draw.choice(["-1", "0", "1", "7", "0.5", "nan", "inf", "-inf", "1e30", "99999999999", "x", ""])
        given = [*SIZES.split(), "--batch-size", "4", "--steps", "1", f"--{name.replace('_', '-')}", value]
        given += ["--data", str(self.folder / "pairs.jsonl"), "--out", str(self.folder / "run"), "--device", "cpu"]
        try:
            config, shape = train.parse(given)
        except SystemExit as end:
            raise ValueError("refused by the parser") from end
        run = train.start(config, shape)
        run.one_step(run.batches())

    def request(self, _: str) -> None:
        """What the page to try a checkpoint is asked."""
        picture = base64.b64encode((self.folder / "whole.png").read_bytes()).decode()
        asked = odd({"text": "a red square", "picture": picture, "number": 0}, self.draw)
        if self.draw.random() < 0.5:
            asked.pop("number", None)
            content = spoiled((self.folder / "whole.png").read_bytes(), self.draw)
            asked["picture"] = base64.b64encode(content).decode()
        json.dumps(LOOKERS[self.folder].look(asked), allow_nan=False)


PLAN = {"what": "a", "train": "--data x", "arms": {"a": "", "b": "--w-mrm 0"}, "evaluate": ["foils --data y"],
        "seeds": [0, 1], "steps": 4, "reference": "a", "equal": ["steps", "wall-clock"], "columns": {"R": ["x/y"]},
        "against": "a", "rates": {"a": 1.0, "b": 2.0}}  # fmt: skip
LOOKERS: dict[Path, Looker] = {}
KINDS = [("rows", task) for task in ("pairs", "foils", "vqa", "reasoning", "entailment", "grounding")]
KINDS += [("picture", kind) for kind in ("png", "jpg", "gif", "webp")]
KINDS += [("archive", ""), ("vocabulary", ""), ("plan", ""), ("request", ""), ("options", "train")]
KINDS += [("annotations", kind) for kind in ("coco-captions", "vqa")]
KINDS += [("predictions", task) for task in ("vqa", "grounding")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A whole input of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    for task in ("vqa", "reasoning", "entailment"):
        write_task(folder / f"{task}.jsonl", task, 4)
    write_squares(folder / "pairs.jsonl", 8)
    picture = "pictures/00.png"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    foils = [row | {"caption": "a", "foils": {"colour": "b"}} for row in pairs]
    phrases = [{"image": picture, "text": "a", "boxes": [[0, 0, 5, 5]], "proposals": [[0, 0, 5, 5], [1, 1, 4, 4]]}] * 3
    for name, rows in (("foils", foils), ("grounding", phrases)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("png", "jpg"):
        square(1).save(folder / f"whole.{kind}")
    for kind in ("gif", "webp"):
        square(0).save(folder / f"whole.{kind}", save_all=True, append_images=[square(n) for n in range(1, 6)])
    with tarfile.open(folder / "whole.tar", "w") as archive:
        for number in range(4):
            archive.add(folder / "pictures" / f"0{number}.png", f"{number}.png")
            (folder / "a.txt").write_text(caption(number))
            archive.add(folder / "a.txt", f"{number}.txt")
    Tokenizer.build(["a red square"] * 3).save(folder / "vocab.txt")
    names = [{"id": n, "file_name": f"pictures/0{n}.png"} for n in range(4)]
    captions = [{"id": n, "image_id": n, "caption": caption(n)} for n in range(4)]
    (folder / "coco-captions.json").write_text(json.dumps({"images": names, "annotations": captions}))
    questions = [{"question_id": n, "image_id": n, "question": "what?"} for n in range(2)]
    answers = [{"question_id": n, "image_id": n, "answers": [{"answer": "red"}] * 10} for n in range(2)]
    (folder / "questions.json").write_text(json.dumps({"questions": questions, "data_subtype": "train2014"}))
    (folder / "vqa.json").write_text(json.dumps({"annotations": answers, "data_subtype": "train2014"}))
    for n in range(2):
        square(n).save(folder / f"COCO_train2014_{n:012d}.jpg")
    run = new_run(folder / "pairs.jsonl", folder / "model")
    LOOKERS[folder] = Looker(
        run.model, run.tokenizer, data.read_rows([folder / "pairs.jsonl"], "pairs"), CPU, How(passes=8)
    )
    return folder


@pytest.mark.parametrize(("kind", "what"), KINDS)
def test_what_is_changed_works_or_is_refused_in_one_sentence(inputs, kind, what, capsys, monkeypatch):
    """No traceback, no hang, and nothing accepted that then fails."""
    draw, refused = random.Random(f"{kind} {what}"), 0
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)  # Pillow's, of damaged files
    for number in range(COUNT if kind != "options" else COUNT // 2):
        before = draw.getstate()
        use = partial(getattr(Inputs(inputs, draw), kind), what)
        refused += outcome(use, f"{kind} {what}, input {number}, {hash(before)}") != "fine"
    assert refused > 0, "nothing was refused: nothing is tested"
    capsys.readouterr()


@pytest.mark.parametrize("grid", [[0, 0], [1.5, 2], [100_000, 100_000], [10**30, 1], [True, 2], [2], "ab", None])
def test_a_grid_that_no_picture_has_is_refused(inputs, tmp_path, grid):
    """A large one took all of the memory."""
    rows = data.read_rows([inputs / "grounding.jsonl"], "grounding")
    lines = [{"row": number, "grid": grid, "point": [1, 1]} for number in range(len(rows))]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"said\.jsonl:1: grid is .*: expected"):
        read_predictions(tmp_path / "said.jsonl", rows)


@pytest.mark.parametrize("box", [[float("nan"), 0, 1, 1], [1e400, 0, 1, 1], [0, 0, 1], "abcd"])
def test_a_box_that_is_none_is_refused(inputs, tmp_path, box):
    rows = data.read_rows([inputs / "grounding.jsonl"], "grounding")
    lines = [{"row": number, "grid": [2, 3], "box": box} for number in range(len(rows))]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"said\.jsonl:1: box is .*: expected 4 numbers"):
        read_predictions(tmp_path / "said.jsonl", rows)


def test_a_checkpoint_says_what_rows_it_was_trained_on(whole, tmp_path):
    """Resuming compares them."""
    for rows in (3.5, [], "", {}):
        torch.save(whole | {"data": {"rows to train on": rows}}, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="does not say what rows it was trained on"):
            runtime.load_checkpoint(tmp_path / "checkpoint.pt")


def test_passes_of_a_step_have_a_bound():
    """Their batches are held together."""
    with pytest.raises(ValueError, match="accumulate is 99999999999: give 1 to 10000"):
        train.parse(["--accumulate", "99999999999"])
