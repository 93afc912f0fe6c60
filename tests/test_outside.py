"""What comes from outside is understood, or refused in one sentence; and no file of the user's is lost."""

import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import new_run, options, resumed_run, write_rows, write_squares, write_task
from PIL import Image

import data
import eval as evaluation
import finetune
import metrics
import runtime
import train
from reading import pictures
from reading.rows import open_rows, parse_object
from reading.shards import expand
from tools import compare, prepare, report, slim, trace, weights
from world import moving

unix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and links of Unix")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with pairs.jsonl and, in run/, a short run on it that can go on."""
    out = tmp_path_factory.mktemp("outside")
    new_run(write_squares(out / "pairs.jsonl"), out / "run").train(stop_at=3)
    return out


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program in this process -> its exit status, and what it wrote to standard error."""

    def call(main, *arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runtime.guarded(main)
            sys.exit(0)
        return end.value.code, capsys.readouterr().err

    return call


def refused(found: tuple[int, str], says: str = "") -> None:
    """One sentence, exit status 2."""
    code, errors = found
    sentences = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(sentences) == 1 and sentences[0].startswith("error: ") and says in sentences[0], found


# ----------------------------------------------------------------------------------------------------- files that stay


@pytest.mark.parametrize(
    ("main", "arguments", "kept"),
    [
        (evaluation.main, "retrieval --checkpoint CK --data ROWS --predictions ROWS", "ROWS"),
        (evaluation.main, "retrieval --checkpoint CK --data ROWS --figure ROWS", "ROWS"),
        (evaluation.main, "retrieval --checkpoint CK --data ROWS --results CK", "CK"),
        (evaluation.main, "retrieval --checkpoint CK --data ROWS --figure PICTURE", "PICTURE"),
        (evaluation.main, "embed --checkpoint CK --data ROWS --out CK", "CK"),
        (evaluation.main, "search --checkpoint CK --data ROWS --text red --figure PICTURE", "PICTURE"),
        (evaluation.main, "explain --checkpoint CK --image PICTURE --text red --out PICTURE", "PICTURE"),
        (report.main, "--checkpoint CK --data ROWS --out ROWS", "ROWS"),
        (trace.main, "--checkpoint CK --data ROWS --out CK", "CK"),
        (slim.main, "CK --out CK", "CK"),
    ],
)
def test_an_output_that_is_an_input_is_refused(run, program, main, arguments, kept):
    """Also by another spelling of its path."""
    files = {"CK": run / "run/checkpoint.pt", "ROWS": run / "pairs.jsonl", "PICTURE": run / "pictures/03.png"}
    before = files[kept].read_bytes()
    words = [files.get(word, word) for word in arguments.split()]
    words[-1] = f"{files[kept].parent}/../{files[kept].parent.name}/{files[kept].name}"
    refused(program(main, *words), "an input")
    assert files[kept].read_bytes() == before


@pytest.mark.parametrize("name", ["log.csv", "config.json", "best.pt"])
def test_a_new_run_does_not_take_the_place_of_other_files(run, tmp_path, program, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine\n")
    refused(program(train.main, *options(run / "pairs.jsonl", tmp_path / "out")), "files of yours, or of another run")
    assert (tmp_path / "out" / name).read_text() == "mine\n"


def test_every_damaged_file_of_results_is_kept(tmp_path):
    for content in ("[1]", "{", "[" * 100_000):
        (tmp_path / "results.json").write_text(content)
        evaluation.keep_result(tmp_path / "results.json", "a", {"b": 1})
    kept = {path.read_text() for path in tmp_path.glob("results.json.damaged*")}
    assert kept == {"[1]", "{", "[" * 100_000}


def test_one_world_does_not_take_the_place_of_another(tmp_path):
    (tmp_path / "written.json").write_text(json.dumps({"scenes": ["pairs_train.jsonl"]}))
    (tmp_path / "pairs_train.jsonl").write_text("a world\n")
    with pytest.raises(ValueError, match="holds other data, scenes"):
        moving.main(["--out", str(tmp_path), "--train", "2", "--val", "2", "--test", "2"])
    assert (tmp_path / "pairs_train.jsonl").read_text() == "a world\n"


def test_a_folder_under_the_name_of_an_output_stays(tmp_path):
    write_squares(tmp_path / "in" / "pairs.jsonl", 3)
    (tmp_path / "in/pairs.jsonl").unlink()
    (tmp_path / "out/pairs_train.jsonl").mkdir(parents=True)
    (tmp_path / "out/pairs_train.jsonl/mine.txt").write_text("x")
    for name in ("00", "01", "02"):
        (tmp_path / f"in/pictures/{name}.txt").write_text("a square")
    with pytest.raises(ValueError, match="not on its list"):
        prepare.main(["folder", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--force"])
    assert (tmp_path / "out/pairs_train.jsonl/mine.txt").read_text() == "x"


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("pairs", {"caption": "\u0301"}, "caption"),
        ("pairs", {"caption": "\ufffd"}, "caption"),
        ("grounding", {"text": "x", "boxes": [[1, 1, int("1" * 400), 2]]}, "boxes"),
        ("grounding", {"text": "x", "boxes": [[1, 1, 1e-300, 1e-300]]}, "boxes"),
        ("vqa", {"question": "what", "answers": {"": 1.0}}, "answers"),
        ("vqa", {"question": "what", "answers": {"\u200b": 1.0}}, "answers"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(tmp_path, task, row, says):
    write_squares(tmp_path / "pairs.jsonl", 2)
    path = write_rows(tmp_path / "rows.jsonl", [{"image": "pictures/00.png"} | row])
    with pytest.raises(ValueError, match=says):
        open_rows(path, task, "full")


def test_a_key_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="the key 'image' comes twice"):
        parse_object('{"image": "a.png", "image": "b.png", "caption": "a"}')


def test_a_line_in_another_encoding_costs_itself_alone(tmp_path):
    path = write_squares(tmp_path / "pairs.jsonl", 4)
    path.write_bytes(path.read_bytes() + '{"image": "pictures/00.png", "caption": "café"}\n'.encode("latin-1"))
    assert len(open_rows(path, "pairs", "full", skip_bad=True)) == 4
    with pytest.raises(ValueError, match=r"pairs.jsonl:5: not UTF-8 text"):
        open_rows(path, "pairs", "full")


@pytest.mark.parametrize("line", ['{"image": "a.png"}', "[1]", '{"image": 5, "caption": "a"}', "{"])
def test_without_a_check_a_row_is_refused_where_it_is_used(tmp_path, line):
    rows = open_rows(write_rows(tmp_path / "pairs.jsonl", [line]), "pairs", "none")
    with pytest.raises(ValueError, match=r"pairs.jsonl, row 1: "):
        rows[0]


def test_a_file_name_that_is_no_text_has_an_id(tmp_path):
    assert data.stable_id("\udcff.png") != data.stable_id("\udcfe.png")


def test_a_picture_in_the_place_of_a_video_is_a_picture():
    assert not data.is_video('video:["') and data.is_video(data.video_of(['a".gif', "\\b.gif"]))


def test_ranges_of_archives_have_an_end():
    assert len(expand(["x{8..11}.tar"])) == 4
    for pattern in ("x{0..99999999999}.tar", "x{5..1}.tar"):
        with pytest.raises(ValueError, match="expands to no path, or to more than a million"):
            expand([pattern])


def archive(path: Path, members: dict[str, bytes]) -> Path:
    """A tar archive."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def test_an_archive_is_whole_and_one_bad_text_costs_its_pair(tmp_path):
    """With what macOS leaves between the members, a PDF beside a picture, and texts that are none."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    texts = {"a.txt": b"a red circle", "b.txt": "café".encode("latin-1"), "c.json": b"[]", "d.TXT": b"a ring"}
    members = {}
    for name, text in texts.items():
        members |= {
            f"{name[0]}.png": stream.getvalue(),
            f"._{name[0]}.png": b"x",
            f"{name[0]}.pdf": b"%PDF",
            name: text,
        }
    path = archive(tmp_path / "one.tar", members)
    assert [row["caption"] for row in data.read_rows([path], "pairs")] == ["a red circle", "a ring"]
    (tmp_path / "two.tar").write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match="several, one behind the other"):
        data.read_rows([tmp_path / "two.tar"], "pairs")
    (tmp_path / "mine.tar").write_bytes(path.read_bytes())
    (tmp_path / "mine.tar.jsonl").write_text("my own notes\n")
    with pytest.raises(ValueError, match=r"is not a list of mine.tar"):
        data.read_rows([tmp_path / "mine.tar"], "pairs")
    assert (tmp_path / "mine.tar.jsonl").read_text() == "my own notes\n"


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("values", "brightness"),
    [
        (np.linspace(0, 1, 64), 127),
        (np.linspace(0, 1.0001, 64), 127),
        (np.linspace(0, 255, 64), 127),
        (np.linspace(0, 256.5, 64), 127),
        (np.linspace(0, 4000, 64), 127),
    ],
)
def test_floats_keep_their_brightness_whatever_their_range(values, brightness):
    picture = Image.fromarray(values.reshape(8, 8).astype(np.float32))
    assert np.asarray(pictures.to_rgb(picture)).mean() == pytest.approx(brightness, abs=1.5)


def test_values_that_are_not_finite_make_no_picture(tmp_path):
    values = np.ones((8, 8), np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert "not finite" in pictures.check_image(str(tmp_path / "a.tiff"), "full")


@pytest.mark.parametrize("ending", ["tiff", "png", "jpg"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_turned_picture_is_that_of_its_use(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (24, 16)).save(path, exif=exif)
    assert pictures.size_of(path) == pictures.load_image(path).size


@unix
def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert pictures.check_image(str(tmp_path / "a.png"), "full") == "missing"


def test_a_picture_that_would_take_all_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST", 1000)
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png cannot be decoded .40 x 40 pixels are over"):
        pictures.load_image(tmp_path / "a.png")


# --------------------------------------------------------------------------------------------------------- checkpoints


def changed(run: Path, tmp_path: Path, change) -> Path:
    """A run folder whose checkpoint has been changed."""
    state = torch.load(run / "run/checkpoint.pt", weights_only=True)
    change(state)
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/checkpoint.pt")
    return tmp_path / "run"


WORDS = "student.text.words.weight"


@pytest.mark.parametrize(
    "value",
    [
        lambda one: one.to_sparse(),
        lambda one: one.to_sparse_csr(),
        lambda one: torch.zeros(1).expand(one.shape),
        lambda one: one.T.contiguous().T,
        lambda one: one.to(torch.complex64),
        lambda one: one.to(torch.int32),
        lambda one: one.to(torch.int64),
        lambda one: one.bool(),
        lambda one: torch.zeros(1).expand(10**10),
        lambda one: one * float("nan"),
    ],
)
def test_a_weight_of_a_strange_kind_is_refused(run, tmp_path, value):
    out = changed(run, tmp_path, lambda state: state["model"].update({WORDS: value(state["model"][WORDS])}))
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        evaluation.load_model(out / "checkpoint.pt", torch.device("cpu"))


def moments(value):
    """Change the moments of the optimiser."""

    def change(state: dict) -> None:
        for one in state["optimizer"]["state"].values():
            one |= {name: value(part) for name, part in one.items() if part.ndim}

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(matching_weight=float("nan")),
        lambda state: state.update(matching_weight=-1.0),
        lambda state: state.update(vocab=state["vocab"][:-1]),
        lambda state: state.update(vocab=[]),
        lambda state: state.update(step=-1),
        lambda state: state.update(objective="glscl"),
        lambda state: state.update(meter={"itc": float("nan")}),
        lambda state: state.update(meter={"itc": "a"}),
        lambda state: state.update(data={"rows to train on": ["x"]}),
        lambda state: state["config"].update(width=32768),
        lambda state: state["config"].update(image_depth=32768),
        lambda state: state["config"].update(image_size=[10**5, 10**5]),
        lambda state: state["config"].update(mask_id=-1),
        lambda state: state["config"].update(special_ids=[]),
        lambda state: state["optimizer"].update(state={}),
        moments(lambda one: torch.zeros(1).expand(one.shape)),
        moments(lambda one: one.to_sparse()),
        lambda state: state.pop("train"),
        lambda state: state.pop("step"),
    ],
)
def test_a_checkpoint_that_cannot_be_meant_is_not_resumed(run, tmp_path, change):
    out = changed(run, tmp_path, change)
    with pytest.raises(ValueError, match=r"."):
        resumed_run(out)


def test_what_torch_never_writes_is_not_unpacked(run, tmp_path):
    """A zip whose content is compressed may be of any size."""
    source = zipfile.ZipFile(run / "run/checkpoint.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, bytes(10**6) + source.read(name))
    with pytest.raises(ValueError, match="compressed, which is never the case"):
        runtime.load_checkpoint(tmp_path / "packed.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": torch.zeros(3)},
        {"blocks.0.attn.qkv.weight": torch.zeros(())},
        {"blocks.0.attn.qkv.bias": torch.zeros(7)},
        {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8).to_sparse()},
        {"cls_token": torch.zeros(5)},
    ],
)
def test_a_published_file_of_strange_shapes_is_refused(tmp_path, change):
    d, blocks = 64, {}
    matrices = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for name, shape in ({"norm1": (d,), "norm2": (d,)} | matrices).items():
        blocks |= {f"blocks.0.{name}.weight": torch.zeros(shape), f"blocks.0.{name}.bias": torch.zeros(shape[0])}
    whole = blocks | {"patch_embed.proj.weight": torch.zeros(d, 3, 8, 8), "patch_embed.proj.bias": torch.zeros(d)}
    whole |= {"cls_token": torch.zeros(1, 1, d), "pos_embed": torch.zeros(1, 17, d)}
    whole |= {"norm.weight": torch.zeros(d), "norm.bias": torch.zeros(d)}
    torch.save(whole, tmp_path / "vit.pth")
    weights.convert(tmp_path / "vit.pth", tmp_path / "image.pt")
    torch.save(whole | change, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"vit\.pth"):
        weights.convert(tmp_path / "vit.pth", tmp_path / "image.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"columns": None},
        {"columns": {"R": "x/y"}},
        {"columns": {"R": [["x"]]}},
        {"arms": {"a": 5}},
        {"train": None},
        {"evaluate": 5},
        {"evaluate": []},
        {"steps": 2.5},
        {"steps": True},
        {"rates": {"a": float("inf")}},
    ],
)
def test_a_plan_of_strange_kinds_is_refused(change):
    plan = {"what": "w", "train": "", "arms": {"a": ""}, "evaluate": "world", "steps": 1, "reference": "a"}
    compare.Plan(**plan)
    with pytest.raises(ValueError, match="of another kind"):
        compare.Plan(**plan | change)


@unix
def test_a_pipe_is_no_encoder(tmp_path):
    os.mkfifo(tmp_path / "image.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        weights.load_tower(tmp_path / "image.pt")


# ------------------------------------------------------------------------------------------- options, predictions, ends


@pytest.mark.parametrize(
    "arguments",
    [
        "score --checkpoint CK --video PICTURE --frames 0 --text red",
        "score --checkpoint CK --video PICTURE --image PICTURE --text red",
        "score --checkpoint CK --image PICTURE --text \u200b",
        "search --checkpoint CK --data ROWS --text \u0301",
        "search --checkpoint CK --data ROWS --text red --matching-weight nan",
        "explain --checkpoint CK --image PICTURE --text red --passes 100000000",
        "retrieval --data ROWS --predictions ROWS --teacher",
        "score --checkpoint CK --image PICTURE --text red --device cpu:99999999999999",
    ],
)
def test_options_that_make_no_sense_are_refused(run, program, arguments):
    files = {"CK": run / "run/checkpoint.pt", "ROWS": run / "pairs.jsonl", "PICTURE": run / "pictures/03.png"}
    refused(program(evaluation.main, *(files.get(word, word) for word in arguments.split())))


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 2.5), ("steps", "abc"), ("freeze_text", "no"), ("lr", None), ("objective", ["mamo"]), ("data", [5])],
)
def test_a_config_of_strange_kinds_is_refused(run, tmp_path, program, name, value):
    content = json.loads((run / "run/config.json").read_text())
    content["train"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused(program(train.main, "--config", tmp_path / "config.json", "--out", tmp_path / "again"))


def test_a_fine_tuning_is_repeated_from_its_config(run, tmp_path):
    """The config names every size, and the checkpoint fixes them."""
    rows = write_task(tmp_path / "vqa.jsonl", "vqa")
    given = ["vqa", "--init", str(run / "run/checkpoint.pt"), "--data", str(rows), "--steps", "1", "--batch-size", "2"]
    finetune.start(*finetune.parse([*given, "--out", str(tmp_path / "one")]))
    again = finetune.parse(["vqa", "--config", str(tmp_path / "one/config.json"), "--out", str(tmp_path / "two")])
    assert finetune.start(*again).config.steps == 1


def test_foils_without_a_foil_are_refused(run, tmp_path, program):
    rows = [{"image": str(run / "pictures/00.png"), "caption": "a red square", "foils": {}}]
    path = write_rows(tmp_path / "foils.jsonl", rows)
    refused(
        program(evaluation.main, "foils", "--checkpoint", run / "run/checkpoint.pt", "--data", path),
        "no row has a foil",
    )


@pytest.mark.parametrize(
    "one",
    [{"way": ["contrast"]}, {"direction": {}}, {"also": 5}, {"also": [[1]]}, {"found": [1]}, {"query": "a\0"}],
)
def test_ranked_lists_of_strange_kinds_are_refused(tmp_path, one):
    ranked = {"way": "contrast", "direction": "image_to_text", "query": "a.png", "found": ["a"]} | one
    path = write_rows(tmp_path / "said.jsonl", [ranked])
    with pytest.raises(ValueError, match=r"said\.jsonl:1: expected texts"):
        metrics.judge_retrieval([{"image": "a.png", "caption": "a"}], path)


@pytest.mark.parametrize("box", [[100, 100, -5, 5], [5, 5, -4, -4]])
def test_a_box_of_negative_size_is_refused(box):
    with pytest.raises(ValueError, match="no negative size"):
        metrics.check_prediction({"boxes": []}, {"grid": [4, 4], "box": box})


def test_validation_on_pictures_that_were_trained_on_earns_matching_no_weight(run, tmp_path):
    """A copy of the rows, or another spelling of their path, is the same pictures."""
    (tmp_path / "copy.jsonl").write_text(
        (run / "pairs.jsonl").read_text().replace('"pictures/', f'"{run.as_posix()}/pictures/')
    )
    for number, path in enumerate((run / "pairs.jsonl", run / "run/../pairs.jsonl", tmp_path / "copy.jsonl")):
        assert new_run(run / "pairs.jsonl", tmp_path / str(number), "--val", str(path)).val_is_seen


@pytest.mark.parametrize("size", ["2", "0", "x"])
def test_a_number_of_processes_without_torchrun_is_refused(run, program, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    words = ["score", "--checkpoint", run / "run/checkpoint.pt", "--image", run / "pictures/03.png", "--text", "red"]
    refused(program(evaluation.main, *words), "start with torchrun")


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    runtime.guarded(lambda: print("to nobody"))


def test_nothing_that_is_printed_steers_a_terminal(capsys):
    runtime.guarded(lambda: print("a\x1b[31mred\x07\x9b caption"))
    assert capsys.readouterr().out == "a\\x1b[31mred\\x07\\x9b caption\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "[1]"),
        ("results.json", '{"a": 5}'),
        ("results.json", "[" * 100_000),
        ("log.csv", "step,itc\n1,2,3,4\n"),
        ("log.csv", "step,itc\n1,abc\n"),
    ],
)
def test_a_strange_file_beside_a_run_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        if name == "log.csv":
            report.curves(tmp_path / name, {})
        else:
            empty = {side: dict.fromkeys(("R@1", "R@5", "R@10"), 0.0) for side in ("image_to_text", "text_to_image")}
            result = {"images": 1, "texts": 1, "k": 0, "chance": empty, "contrast": empty, "matching": {}, "apart": {}}
            report.tables(result | {"intervals": {}}, "data", tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- prepare


def prepared(tmp_path: Path, *more: str) -> list[dict]:
    """The rows of train that `prepare folder` makes of tmp_path/in."""
    out = tmp_path / "out"
    prepare.main(["folder", "--images", str(tmp_path / "in"), "--out", str(out), "--force", *more])
    return [json.loads(line) for line in (out / "pairs_train.jsonl").read_text().splitlines()]


def drawn(folder: Path, *names: str) -> None:
    """Pictures of some names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(folder / name)


def test_a_list_may_hold_whole_paths_and_ways_round(tmp_path, capsys):
    drawn(tmp_path / "in", "dog.jpg", "sub/cat.jpg")
    lines = f"{tmp_path}/in/dog.jpg,a dog\nsub/../sub/cat.jpg,a cat\n"
    (tmp_path / "in/captions.txt").write_text("image,caption\n" + lines)
    assert [row["caption"] for row in prepared(tmp_path)] == [["a dog"], ["a cat"]]
    assert "without a caption" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["CAPTIONS.TXT", "Metadata.jsonl", "metadata.JSONL", "metadata.json", "dog.TXT"])
def test_a_list_under_a_name_that_is_not_read_is_named(tmp_path, name):
    drawn(tmp_path / "in", "dog.jpg")
    (tmp_path / "in" / name).write_text("a dog")
    with pytest.raises(ValueError, match=f"{name} is not read"):
        prepared(tmp_path)


@unix
def test_linked_folders_are_read_once(tmp_path):
    drawn(tmp_path / "photos", "a_red_dog.jpg")
    drawn(tmp_path / "in", "a_cat.jpe", "a_hen.jfif")
    os.symlink(tmp_path / "photos", tmp_path / "in/more")
    os.symlink(tmp_path / "in", tmp_path / "in/loop")
    assert sorted(row["caption"] for row in prepared(tmp_path)) == [["a cat"], ["a hen"], ["a red dog"]]


def test_a_quotation_without_an_end_is_refused(tmp_path):
    drawn(tmp_path / "in", "dog.jpg", "cat.jpg")
    (tmp_path / "in/metadata.csv").write_text('file_name,text\ndog.jpg,"a dog\ncat.jpg,a cat\n')
    with pytest.raises(ValueError, match=r"metadata.csv"):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("split", "images", "says"),
    [("train", [1, 2], "is of val by its name"), ("val", [1, 1], "the id 1 comes twice")],
)
def test_a_file_of_coco_is_of_one_split_and_names_a_picture_once(tmp_path, split, images, says):
    drawn(tmp_path / "in", "1.jpg", "2.jpg")
    content = {
        "images": [{"id": number, "file_name": f"{place}.jpg"} for place, number in enumerate(images, 1)],
        "annotations": [{"image_id": 1, "caption": "a dog"}],
    }
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps(content))
    given = ["coco-captions", "--annotations", str(path), "--split", split]
    with pytest.raises(ValueError, match=says):
        prepare.main([*given, "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("pattern", ["{id:{id}}.png", "{id[0]}.png", "{id.real}.png", "{id:10{id}}.png"])
def test_a_pattern_is_names_and_widths(pattern):
    with pytest.raises(ValueError, match="does not fit"):
        prepare.fill(pattern, {"id": 2_000_000_000, "split": "val"})
