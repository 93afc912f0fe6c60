"""The page: figures are eval.py's, maps explain.py's, mosaics those of a loop; it is light, closed, and escaped."""

import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import caption, kept_signals, new_run, square, write_rows, write_squares
from PIL import Image

import finetune
import runtime
from data import centred, load_image, read_rows, to_pixels, to_tensor
from eval import load_model, retrieval
from explain import How, Phrase, maps_of
from mamo import normalised
from siblings import OBJECTIVES
from tools import report

CPU = torch.device("cpu")
WICKED = '</script><b>&amp; "é'


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and the text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.text = [], [], text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    @property
    def report(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture
def write(monkeypatch, capsys):
    """Run tools/report.py in this process -> the page that it wrote; what it said is kept in `said`."""

    def run(checkpoint, data, *more) -> Page:
        out = checkpoint.parent / "page.html"
        out.unlink(missing_ok=True)
        arguments = [
            "tools/report.py",
            "--checkpoint",
            checkpoint,
            "--data",
            data,
            "--out",
            out,
            "--device",
            "cpu",
            *more,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        capsys.readouterr()
        try:
            runtime.guarded(report.main)
        finally:
            run.said = "".join(capsys.readouterr())
        return Page(out.read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """22 pictures, every third with three captions, some of them right for several pictures."""
    return write_squares(tmp_path_factory.mktemp("squares") / "pairs.jsonl", several=True)


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    """A function that trains a very small model -> its checkpoint; each once."""
    made = {}

    def train(*options: str):
        if options not in made:
            with kept_signals():
                run = new_run(squares, tmp_path_factory.mktemp("run"), "--lr", "1e-2", "--steps", "12", *options)
                run.train()
            made[options] = run.out / "checkpoint.pt"
        return made[options]

    return train


def answers_of(page: dict, direction: str) -> list[dict]:
    return [answer for query in page["galleries"][direction] for answer in query["answers"]]


def levels_of(answer: dict, patches: int = 6) -> torch.Tensor:
    """The maps of an answer as numbers (words + 1, n)."""
    raw = np.frombuffer(base64.b64decode(answer["maps"]), dtype=np.uint8)
    return torch.from_numpy(raw.copy()).view(-1, patches).float()


def path_of(page: dict, answer: dict, rows: list[dict]) -> str:
    """The file of an answer's picture: the one whose captions are told as those of the picture."""
    alt = page["pictures"][answer["picture"]]["alt"]
    return next(row["image"] for row in rows if "; ".join(np.atleast_1d(row["caption"])) == alt)


# ------------------------------------------------------------------------------------------------------------- gallery


def test_the_gallery_is_what_retrieval_finds(trained, squares, write):
    """Places, right and wrong by the lists of eval.retrieval, scores by the model itself, and the recalls beside."""
    page = write(trained(), squares).report
    model, tokenizer, _ = load_model(trained(), CPU)
    rows, lists = read_rows([squares], "pairs"), []
    result = retrieval(model, tokenizer, rows, CPU, lists=lists)
    assert page["tables"] == [report.recall_table(f"this page, {squares}", result)] and page["k"] == result["k"] == 3
    assert {row[0]: row[1] for row in page["tables"][0]["rows"]}["image to text, re-ranked"].startswith(
        f"{result['matching']['image_to_text']['R@1']:.1f} ("
    )
    best = {(one["direction"], one["query"]): one["found"] for one in lists if one["way"] == "matching"}
    right = {(row["image"], text) for row in rows for text in np.atleast_1d(row["caption"])}
    for direction in report.DIRECTIONS:
        assert page["galleries"][direction]
        for query in page["galleries"][direction]:
            pairs = [(path_of(page, answer, rows), answer["text"]) for answer in query["answers"]]
            asked, other = (0, 1) if direction == "image_to_text" else (1, 0)
            assert len({pair[asked] for pair in pairs}) == 1
            found = best[direction, pairs[0][asked]]
            assert [pair[other] for pair in pairs[:4]] == found[:4]
            good = [pair in right for pair in pairs]
            assert [answer["right"] for answer in query["answers"]] == good and query["right"] == good[0] and any(good)
            for answer, pair in zip(query["answers"], pairs, strict=True):
                assert answer["place"] == (found.index(pair[other]) if pair[other] in found else None)
                ids = torch.tensor([tokenizer.encode(pair[1])])
                scores = model.score(to_tensor(load_image(pair[0]), (16, 24))[None], ids, torch.ones_like(ids) > 0)
                assert answer["contrast"] == pytest.approx(scores["itc"].item(), abs=2e-3)
                if answer["place"] is None or answer["place"] >= 3:
                    assert answer["matching"] is None, "matching orders the first three alone"
                else:
                    assert answer["matching"] == pytest.approx(scores["itm"].item(), abs=2e-3)


def test_right_and_wrong_take_turns_and_pictures_are_counted(trained, squares, write):
    """As many of both where there are enough; no more pictures than asked for, each embedded once."""
    queries = [{"number": number, "right": number % 10 != 3} for number in range(100)]
    chosen = report.choose(queries, 12)
    assert [one["right"] for one in chosen] == [True, False] * 6
    assert len({one["number"] for one in chosen}) == 12 and max(one["number"] for one in chosen) > 80
    assert [one["right"] for one in report.choose(queries[:20], 12)].count(False) == 2
    assert len(report.choose(queries[:20], 12)) == 12 and len(report.choose(queries[:3], 12)) == 3
    for count in (2, 9, 50):
        page = write(trained(), squares, "--pictures", count).report
        pictures = [one["src"] for one in page["pictures"]]
        assert 0 < len(set(pictures)) == len(pictures) <= count
        assert page["galleries"]["image_to_text"] and (count == 2 or page["galleries"]["text_to_image"])


# ---------------------------------------------------------------------------------------------------------------- maps


def test_each_words_map_is_that_of_explaining_the_word(trained, squares, write):
    """Each word and the whole caption on a scale of their own; wrong captions too; both directions."""
    page = write(trained(), squares).report
    model, tokenizer, _ = load_model(trained(), CPU)
    rows = read_rows([squares], "pairs")
    assert page["map"] == {"grid": [2, 3], "how": str(How()), "words": True}
    for direction in report.DIRECTIONS:
        for answer in answers_of(page, direction)[:9]:
            words = page["words"][answer["text"]]
            assert [word for word, _ in words] == answer["text"].split() and all(mapped for _, mapped in words)
            path = path_of(page, answer, rows)
            asked = [*(word for word, _ in words), answer["text"]]
            expected = maps_of(model, tokenizer, [Phrase(path, answer["text"], one) for one in asked], CPU, How())
            expected /= expected.amax(dim=1, keepdim=True).clamp(min=1e-12)
            torch.testing.assert_close(levels_of(answer) / 255, expected, rtol=0, atol=0.004)


def test_words_that_are_not_read_have_no_map(trained, squares, write, tmp_path):
    """Behind max_tokens, and characters that no token stands for; of the last block only the whole caption has one."""
    square(0).save(tmp_path / "a.png")
    square(5).save(tmp_path / "b.png")
    # Of 16 tokens [CLS] and [SEP] take two, three words one each; very is spelled in four, and of the third three fit.
    texts = ["a red \u200b square " + "very " * 20 + "small", "unheardof a"]
    rows = [{"image": f"{name}.png", "caption": text} for name, text in zip("ab", texts, strict=True)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    page = write(trained(), data).report
    mapped = {text: [on for _, on in words] for text, words in page["words"].items()}
    assert mapped[texts[0]] == [True, True, False, True] + [True] * 3 + [False] * 18
    assert mapped[texts[1]] == [True, True]
    for answer in answers_of(page, "text_to_image"):
        assert len(levels_of(answer)) == 1 + sum(mapped[answer["text"]])
    page = write(trained("--w-mlm", "0"), data).report
    assert not page["map"]["words"]
    assert not any(on for words in page["words"].values() for _, on in words)
    assert all(levels_of(answer).shape == (1, 6) for answer in answers_of(page, "text_to_image"))


# ----------------------------------------------------------------------------------------------------------- recovered


def test_of_many_pictures_those_recovered_are_from_all_over_the_data(trained, squares, write, monkeypatch):
    """And the ones that the page shows are among them."""
    checkpoint, asked = trained("--ema", "0.9"), []
    monkeypatch.setattr(report, "MOSAICS", 1)
    monkeypatch.setattr(report, "PATCHES", 10 * 6)
    monkeypatch.setattr(report, "recover", lambda *given: asked.append(given[2]) or {"items": []})
    write(checkpoint, squares)
    numbers = sorted(int(Path(path).stem) for path in asked[0])
    assert len(numbers) == len(set(numbers)) == 10 and sum(number >= 11 for number in numbers[-5:]) >= 3


def test_recovered_patches_are_those_of_a_loop(trained, squares, write):
    """Number by number: what the student says of each hidden patch, and which patch of another picture is nearest."""
    checkpoint = trained("--ema", "0.9")  # a teacher that differs from its student
    page = write(checkpoint, squares).report
    model, tokenizer, _ = load_model(checkpoint, CPU)
    rows, found = read_rows([squares], "pairs"), page["recovered"]
    first = [path_of(page, item, rows) for item in found["items"]]
    paths = first + [row["image"] for row in rows if row["image"] not in first]
    assert len(first) == 6 and found["pictures"] == len(paths) == 22 and found["ratio"] == 0.75
    caption_of = {row["image"]: np.atleast_1d(row["caption"])[0] for row in rows}
    assert [item["text"] for item in found["items"]] == [caption_of[path] for path in first]
    noise = torch.rand(22, 6, generator=torch.Generator().manual_seed(0))
    pixels = [to_pixels(load_image(path), (16, 24)) for path in paths]
    with torch.no_grad():
        target = [normalised(model.teacher.image(centred(one[None]))[0, 1:]) for one in pixels]

    def said(place: int, text: str, hidden: list[int]) -> torch.Tensor:
        mask = torch.zeros(1, 6, dtype=torch.bool)
        mask[0, hidden] = True
        ids = torch.tensor([tokenizer.encode(text)])
        real = torch.ones_like(ids) > 0
        with torch.no_grad():
            image = model.encode_image(centred(pixels[place][None]), mask)
            fused = model.student.fusion(image, model.encode_text(ids, real), real).image[0]
            return torch.stack([model.mim_head(fused[1 + patch]) for patch in hidden])

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / one.norm() / other.norm())

    sums = [0.0] * 4
    for place, path in enumerate(paths):
        hidden = sorted(range(6), key=lambda patch, place=place: noise[place, patch].item())[:4]  # round(0.75 * 6)
        predicted = said(place, caption_of[path], hidden)
        misled = said(place, caption_of[paths[(place + 11) % 22]], hidden)
        others = [target[other] for other in range(22) if other != place]
        everything = torch.cat(others).mean(dim=0)
        for row, patch in enumerate(hidden):
            own, there = target[place][patch], sum(other[patch] for other in others) / 21
            for number, one in enumerate((predicted[row], misled[row], there, everything)):
                sums[number] += cosine(one, own) / (22 * 4)
        if place < 6:
            item, mosaic = found["items"][place], pixels[place].permute(1, 2, 0).numpy().copy()
            assert item["hidden"] == hidden
            for row, patch in enumerate(hidden):
                likeness = {
                    (o, q): cosine(predicted[row], target[o][q]) for o in range(22) if o != place for q in range(6)
                }
                other, donor = max(likeness, key=likeness.get)
                (y, x), (v, u) = (divmod(one, 3) for one in (patch, donor))
                piece = pixels[other].permute(1, 2, 0)[8 * v : 8 * v + 8, 8 * u : 8 * u + 8]
                mosaic[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = piece
            shown = Image.open(io.BytesIO(base64.b64decode(item["mosaic"]["src"].split(",")[1])))
            assert np.array_equal(np.array(shown), mosaic)
    assert [value for _, value in found["cosines"]] == [pytest.approx(one, abs=2e-3) for one in sums]


def test_the_nearest_patch_is_another_pictures():
    """Even where the prediction is the picture's own feature."""
    target = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    found = report.nearest(target[2], target, 2)
    for patch in range(6):
        likeness = [float(torch.cosine_similarity(target[2, patch], one, dim=0)) for one in target.flatten(0, 1)]
        likeness[12:18] = [-2.0] * 6
        assert found[patch] == likeness.index(max(likeness))


# --------------------------------------------------------------------------------------------- curves, results, weight


def test_the_random_baseline_of_val_is_that_of_its_retrieval(squares, tmp_path):
    """Under the names that the log has; nothing where val is gone, or a task has another."""
    run = new_run(squares, tmp_path / "run", "--val", str(squares))
    found = report.val_chance(run.tokenizer, run.model.config.max_tokens, vars(run.config))
    result = retrieval(run.model, run.tokenizer, run.val_rows, CPU)["chance"]
    assert found == {
        f"val_{short}_r1": result[side]["R@1"] for short, side in (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    }
    for other in ({"task": "vqa"}, {"val": [str(tmp_path / "gone.jsonl")]}):
        assert report.val_chance(run.tokenizer, 20, vars(run.config) | other) == {}


def test_curves_and_results_are_those_beside_the_checkpoint(trained, squares, write):
    """Each loss of log.csv with its level of chance; results of each shape; and a page without either file."""
    checkpoint = trained("--seed", "3")
    folder = checkpoint.parent
    model, *_ = load_model(checkpoint, CPU)
    page = write(checkpoint, squares).report
    curves = {one["name"]: one for one in page["curves"]}
    assert curves.keys() >= {"itc", "itm", "mrm", "mim", "mlm"} and not curves.keys() & {"step", "lr"}
    beside = json.loads((folder / "config.json").read_text())["train"]
    levels = report.val_chance(load_model(checkpoint, CPU)[1], model.config.max_tokens, beside)
    assert {name: one["chance"] for name, one in curves.items() if one["chance"]} == model.chance(4) | levels
    assert [step for step, _ in curves["mim"]["points"]] == list(range(1, 13))

    broken = (folder / "log.csv").read_text().splitlines()
    place = broken[0].split(",").index("itm")
    row = broken[3].split(",")
    row[place] = "nan"
    (folder / "log.csv").write_text("\n".join([*broken[:3], ",".join(row), *broken[4:]]) + "\n")
    recalls = {side: {"R@1": 12.34, "R@5": 50.0, "R@10": 60.0} for side in report.DIRECTIONS}
    found = {"n": 9, "value": 55.55, "low": 40.0, "high": 70.0, "chance": 18.4}
    results = {
        "pairs_test": {
            "images": 7,
            "texts": 8,
            "k": 0,
            "chance": recalls,
            "contrast": recalls,
            "matching": {},
            "intervals": {},
        },
        "foils_test": {"n": {"colour": 5}, "contrast": {}, "matching": {"colour": 80.0}, "apart": {}},
        "grounding_test": {"pointing": found, "ceiling": 100.0, "box": found, "proposals": found, "map": "hiding"},
        "something else": {"value": 3},
    }
    (folder / "results.json").write_text(json.dumps(results))
    page = write(checkpoint, squares).report
    assert [step for step, _ in {one["name"]: one for one in page["curves"]}["itm"]["points"]] == [1, 2, *range(4, 13)]
    _, pairs, foils, grounding = page["tables"]
    assert pairs["title"] == "pairs_test: 7 pictures, 8 captions" and pairs["rows"][0][1] == "12.3"
    assert foils["head"] == ["in %", "matching", "chance", "n"] and foils["rows"] == [["colour", "80.0", "50.0", "5"]]
    assert grounding["rows"][0] == ["pointing", "55.5 (40.0 to 70.0)", "18.4", "9"] and len(grounding["rows"]) == 3
    for name in ("log.csv", "results.json"):
        (folder / name).unlink()
    page = write(checkpoint, squares).report
    assert page["curves"] == [] and len(page["tables"]) == 1


def test_a_gallery_that_was_trained_on_says_so(trained, squares, write, tmp_path):
    """What was memorised must not look like what was found."""
    other = tmp_path / "again.jsonl"
    other.write_text(squares.read_text(encoding="utf-8").replace("pictures/", f"{squares.parent}/pictures/"))
    said = [write(trained(), data).report["about"]["gallery"] for data in (squares, other)]
    assert ["memory" in one for one in said] == [True, False]


def test_a_caption_cannot_end_the_script(trained, write, tmp_path):
    """It stands in the page's JSON as it is in the data, and no tag of its own comes about."""
    rows = []
    for number in range(4):
        square(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"{caption(number)} {WICKED}"})
    page = write(trained(), write_rows(tmp_path / "pairs.jsonl", rows))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and "b" not in tags and page.text.count("</script>") == 2
    assert f"{caption(0)} {WICKED}" in page.report["words"] and "<" not in page.scripts[0]
    assert "REPORT_AS_JSON" not in page.text


def test_the_page_needs_nothing_but_itself(trained, squares, write):
    """No address in the template or in the pictures but those within the page; one option names the file to write."""
    page = write(trained(), squares)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert attributes.get("href", "#").startswith("#") and tag not in ("link", "iframe", "object", "base")
    assert all(one["src"].startswith("data:image/png;base64,") for one in page.report["pictures"])
    addresses = set(re.findall(r"https?://[\w./]+", page.text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name of SVG, which nothing is loaded from"
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page.text)
    assert re.search(r"page\.html in a browser", write.said) and " MB" in write.said


def test_fifty_photographs_weigh_less_than_five_megabytes(write, tmp_path, tmp_path_factory, monkeypatch):
    """640 x 480 with the noise of a camera, a grid of 16 x 16, long captions, and each query finds other pictures."""

    def other_pictures(*given, lists):
        result = retrieval(*given, lists=lists)
        for number, one in enumerate(lists):
            if one["direction"] == "text_to_image":
                one["found"] = [str(tmp_path / f"{(7 * number + place) % 60}.jpg") for place in range(6)]
        return result

    monkeypatch.setattr(report, "retrieval", other_pictures)
    draw, rows = np.random.default_rng(0), []
    words, noise = [f"word{number}" for number in range(60)], draw.normal(0, 60, (480, 640, 3))
    for number in range(60):
        light = np.kron(draw.integers(0, 256, (12, 16, 3)), np.ones((40, 40, 1)))
        noisy = light + np.roll(noise, 7 * number, axis=0)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{number}.jpg", quality=90)
        rows.append({"image": f"{number}.jpg", "caption": " ".join(draw.choice(words, 30))})
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    with kept_signals():
        run = new_run(
            data, tmp_path_factory.mktemp("photos"), "--image-size", "128", "--patch-size", "8", "--steps", "1"
        )
        run.train()
    page = write(run.out / "checkpoint.pt", data, "--passes", 8)
    pictures = page.report["pictures"]
    assert 45 <= len(pictures) <= 50 and all(one["src"].startswith("data:image/jpeg") for one in pictures)
    assert {(one["width"], one["height"], one["crisp"]) for one in pictures} == {(640, 480, False)}
    sizes = {Image.open(io.BytesIO(base64.b64decode(one["src"].split(",")[1]))).size for one in pictures}
    assert sizes == {(320, 240)}
    weight = len(page.text.encode()) / 1e6
    assert 1 < weight < 5, weight
    worst = Image.fromarray(draw.integers(0, 256, (320, 320, 3), dtype=np.uint8))
    assert len(report.embed(worst)["src"]) < 54_000, "the worst of pictures, 50 of them 2.7 MB"


# ------------------------------------------------------------------------------------------------ every checkpoint


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_its_page(trained, squares, write, objective):
    """With maps, and with mosaics where features are predicted."""
    unit = ["--mask-unit", "1"] if objective == "maskvlm" else []
    page = write(trained("--objective", objective, *unit), squares).report
    assert page["about"]["objective"] == objective and page["map"]["words"]
    assert all(answer["maps"] for answer in answers_of(page, "text_to_image"))
    assert ("why" in page["recovered"]) == (objective != "mamo")


def test_without_matching_contrast_ranks_and_there_are_no_maps(trained, squares, write):
    """Nor are maps chosen; MIM of pixels says why it shows nothing."""
    page = write(trained("--w-itm", "0", "--mim-target", "pixels"), squares).report
    assert page["map"] == {"grid": [2, 3], "how": None, "words": False} and page["k"] == 0
    for direction in report.DIRECTIONS:
        assert {(one["maps"], one["matching"]) for one in answers_of(page, direction)} == {(None, None)}
        cosines = [[one["contrast"] for one in query["answers"][:4]] for query in page["galleries"][direction]]
        assert cosines and all(one == sorted(one, reverse=True) for one in cosines)
    assert not any(on for words in page["words"].values() for _, on in words)
    assert "recover pixels" in page["recovered"]["why"]


@pytest.fixture(scope="module")
def tuned(squares, trained, tmp_path_factory):
    """A function that fine-tunes for two steps -> its best checkpoint."""

    def tune(task: str):
        rows = [{"image": f"pictures/{number:02d}.png", "caption": caption(number)} for number in range(22)]
        for row in rows:
            row |= {"text": "it is red", "label": "neutral"}
        data, out = write_rows(squares.with_name(f"{task}.jsonl"), rows), tmp_path_factory.mktemp(task)
        given = (
            f"{task} --init {trained()} --data {data} --val {data} --out {out} --steps 2 --batch-size 4 --device cpu"
        )
        with kept_signals():
            finetune.start(*finetune.parse(given.split())).train()
        return out / "best.pt"

    return tune


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
def test_fine_tuned_checkpoints_that_rank_have_a_page(tuned, squares, write, task):
    page = write(tuned(task), squares).report
    assert page["about"]["objective"] == f"{task}, fine-tuned" and not page["map"]["words"]
    assert "fine-tuning drops it" in page["recovered"]["why"]


def test_a_mistake_ends_with_a_sentence(trained, tuned, squares, write, tmp_path):
    square(0).save(tmp_path / "a.png")
    single = write_rows(tmp_path / "one.jsonl", [{"image": "a.png", "caption": "a red square"}])
    cases = [
        ((tuned("entailment"), squares), "is a checkpoint of entailment, which neither contrasts nor matches"),
        ((trained("--w-itc", "0"), squares), "trained without contrast"),
        ((trained(), single), "1 pictures in the data and --pictures 50: a page needs 2 of both or more"),
        ((trained(), squares, "--pictures", 1), "22 pictures in the data and --pictures 1: a page needs 2"),
        ((trained(), tmp_path / "nothing.jsonl"), "nothing.jsonl is not a file"),
        ((tmp_path / "nothing.pt", squares), "nothing.pt is not a file"),
        ((trained(), squares, "--picture", 9), "did you mean --pictures?"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(SystemExit) as end:
            write(*arguments)
        assert end.value.code == 2 and sentence in write.said and write.said.count("\n") == 1, write.said


def test_a_number_that_is_none_does_not_break_the_page():
    assert report.number(float("nan")) is report.number(math.inf) is report.number(None) is None
    assert report.number(0.123456) == 0.1235
    with pytest.raises(ValueError):
        report.page_of({"value": float("nan")})
