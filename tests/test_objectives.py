"""Every objective through every program: training, resuming, evaluation, fine-tuning, two processes, precision."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import test_processes
import torch
from conftest import PAD, SEP, make_same, tiny_batch, tiny_objective, total
from helpers import (
    COLOURS,
    PLACES,
    caption,
    kept_signals,
    new_run,
    options,
    read_log,
    resumed_run,
    same,
    write_rows,
    write_squares,
    write_task,
)
from processes import start, together
from test_finetune import resumed, stopped_and_straight, tuned, weights
from test_train import checkpoint
from test_train import command as program

import runtime
import train
from data import read_rows
from eval import foils, load_model, retrieval
from explain import How, ground
from mamo import Attention, Config, MAMOConfig, VisionLanguageModel, mask_words
from metrics import judge_grounding
from siblings import OBJECTIVES, build_model, glscl
from tasks import encoders_of
from tokenizer import SPECIAL_TOKENS, Tokenizer

CPU = torch.device("cpu")
SIBLINGS = tuple(name for name in OBJECTIVES if name not in ("mamo", "control"))

# name: (options, losses)
CASES = {
    "mamo": ("--ema 0.9", "itc itm mrm mim mlm"),
    "both masked": ("--ema 0.9 --mask-both", "itc itm mrm mim mlm"),
    "pixels": ("--ema 0.9 --mim-target pixels", "itc itm mrm mim mlm"),
    "control": ("--objective control", "itc itm mlm"),
    "maskvlm": ("--objective maskvlm", "itc itm mim mlm"),
    "glscl": ("--objective glscl", "itc itm mgsc mltc mlm"),
    "scl": ("--objective glscl --w-mltc 0", "itc itm mgsc mlm"),
    "vlmae": ("--objective vlmae --ema 0.9", "itc itm rmim ifr mlm"),
}
# A grid of 4 x 6 patches, and all kinds of randomness and of state.
EVERYTHING = "--patch-size 4 --steps 6 --log-every 2 --augment photo --dropout 0.1 --accumulate 2"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 pairs, of which eight are twins two by two, some with several captions."""
    return write_squares(tmp_path_factory.mktemp("squares") / "pairs.jsonl", 24, twins=8, several=True)


@pytest.fixture(scope="module")
def judged(data) -> Path:
    """The same pictures as pairs, with foils, and with phrases and their boxes, in one file."""
    rows = []
    for number in range(24):
        row = {"image": f"pictures/{number:02d}.png", "caption": caption(number), "text": caption(number)}
        wrong = f"a {list(COLOURS)[(number // 4 + 1) % 6]} square {PLACES[number % 4]}"
        box = [12 * (number % 2), 8 * (number // 2 % 2), 12, 8]
        rows.append(row | {"foils": {"colour": wrong}, "boxes": [box]})
    return write_rows(data.with_name("judged.jsonl"), rows)


class Trained(NamedTuple):
    """A finished run of one of the CASES."""

    out: Path
    said: str  # at its start

    @property
    def path(self) -> Path:
        return self.out / "checkpoint.pt"

    def state(self) -> dict:
        return torch.load(self.path, weights_only=False)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A function: name of a case -> its run, which is made once and is not to be changed."""

    @functools.cache
    def run_of(case: str) -> Trained:
        out, said = tmp_path_factory.mktemp("run"), io.StringIO()
        with kept_signals(), contextlib.redirect_stdout(said):
            new_run(data, out, *EVERYTHING.split(), *CASES[case][0].split()).train()
        return Trained(out, said.getvalue())

    return run_of


def tiny(case: str) -> VisionLanguageModel:
    """A very small model of a case."""
    config, changes = train.parse(CASES[case][0].split())
    return tiny_objective(config.objective, **changes)


def fields_of(objective: str) -> set[str]:
    return {field.name for field in dataclasses.fields(OBJECTIVES[objective][0].config_class)}


def others(objective: str) -> list[str]:
    """The objectives of another class: MAMO and its control share one."""
    return [name for name in OBJECTIVES if OBJECTIVES[name][0] is not OBJECTIVES[objective][0]]


def foreign(objective: str) -> list[str]:
    """Options of other objectives that this one does not have."""
    names = set().union(*map(fields_of, OBJECTIVES)) - fields_of(objective)
    return ["--" + name.replace("_", "-") for name in sorted(names) if name not in train.FROM_TOKENIZER]


def changed(state: dict, folder: Path) -> Path:
    """A checkpoint of that state."""
    runtime.save_checkpoint(folder / "checkpoint.pt", state)
    return folder / "checkpoint.pt"


def one_sentence(code: int, errors: str, says: str) -> None:
    """A refusal: exit status 2 and one line that says why."""
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and says in errors, errors


# ------------------------------------------------------------------------------------------------------------- training


def test_every_objective_is_a_case():
    """So that a new one cannot be forgotten here."""
    assert {train.parse(given.split())[0].objective for given, _ in CASES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("case", CASES)
def test_a_run_logs_its_losses_announces_chance_and_saves(trained, case):
    """The losses of this case and no other; levels that follow from batch and vocabulary; a config of its kind."""
    run, state = trained(case), trained(case).state()
    losses, levels = CASES[case][1].split(), {"itc": math.log(2 * 4), "itm": 0.6365}
    levels["mlm"] = math.log(len(state["vocab"]))
    levels |= {"mamo": {"mrm": 2.0, "mim": 0.798}, "both masked": {"mrm": 2.0, "mim": 0.798}}.get(case, {})
    levels |= {"pixels": {"mrm": 2.0}}.get(case, {}) | ({"mgsc": 4 * math.log(4)} if "mgsc" in losses else {})
    listed = re.search("random baseline of the losses: (.*)", run.said).group(1)
    found = {name: float(level) for name, level in (part.split() for part in listed.split(", "))}
    assert found == pytest.approx(levels, abs=0.006)

    beside = {"step", "lr", "grad_norm", "temperature"} | ({"target_cosine"} if "mrm" in losses else set())
    rows = read_log(run.out)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(row.keys() == beside | set(losses) for row in rows), rows[0].keys()
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    objective = train.parse(CASES[case][0].split())[0].objective
    assert state["objective"] == state["train"]["objective"] == objective and state["step"] == 6
    assert state["config"].keys() == fields_of(objective)
    assert json.loads((run.out / "config.json").read_text())["model"].keys() == fields_of(objective)
    assert f"{objective} nano, " in run.said


@pytest.mark.parametrize("case", CASES)
def test_a_teacher_is_in_the_checkpoint_of_those_who_have_one(trained, case):
    """MAMO's is all encoders, VLMAE's the image encoder alone; the others save none, and the first line says so."""
    run, state = trained(case), trained(case).state()
    whole = {name.removeprefix("student.") for name in state["model"] if name.startswith("student.")}
    teacher = {name.removeprefix("teacher.") for name in state["model"] if name.startswith("teacher.")}
    image = {name.removeprefix("image.") for name in whole if name.startswith("image.")}
    expected = {"mamo": whole, "both masked": whole, "pixels": whole, "vlmae": image}.get(case, set())
    assert teacher == expected
    assert (", no teacher:" in run.said, ", teacher 0.9000:" in run.said) == (not expected, bool(expected))


def test_the_teacher_of_vlmae_follows_the_image_encoder(data, tmp_path):
    """One step: three quarters of itself and a quarter of the student's image encoder, which has moved."""
    run = new_run(data, tmp_path, "--objective", "vlmae", "--ema", "0.75", "--lr", "0.05", "--patch-size", "4")
    before = {name: value.clone() for name, value in run.model.teacher.state_dict().items()}
    run.train(stop_at=1)
    student = run.model.student.image.state_dict()
    assert before.keys() == student.keys() and not same(before, dict(student))
    for name, value in run.model.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * student[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("off", ["--objective vlmae --w-ifr 0", "--w-mrm 0 --mim-target pixels", "--w-mrm 0 --w-mim 0"])
def test_without_a_loss_that_asks_it_there_is_no_teacher(data, tmp_path, capsys, off):
    """Neither in the model, nor in the checkpoint, nor in the first line."""
    run = new_run(data, tmp_path, "--patch-size", "4", *off.split())
    run.train(stop_at=1)
    assert run.model.teacher is None and not any("teacher" in name for name in checkpoint(tmp_path)["model"])
    assert ", no teacher:" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("mamo", "control")])
def test_resume_is_bit_exact(trained, data, tmp_path, case):
    """Stopped between two rows of the log and gone on without naming the objective: weights, optimiser, log.

    MAMO and its control are resumed in test_train.py.
    """
    new_run(data, tmp_path, *EVERYTHING.split(), *CASES[case][0].split()).train(stop_at=3)
    assert checkpoint(tmp_path)["step"] == 3
    run = resumed_run(tmp_path)
    assert run.step == 3 and run.config.objective == checkpoint(tmp_path)["objective"]
    run.train()
    straight, again = checkpoint(trained(case).out), checkpoint(tmp_path)
    for part in straight:
        assert same(straight[part], again[part]), part
    assert read_log(tmp_path) == read_log(trained(case).out)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_stays_with_its_objective(trained, monkeypatch, capsys, objective):
    """Its own name changes nothing; another one's, or an option of another one, is refused in one sentence."""
    run = trained(objective)
    before = run.path.read_bytes()
    assert resumed_run(run.out, "--objective", objective).step == 6
    for other in OBJECTIVES.keys() - {objective}:
        code = program(monkeypatch, train.main, "--out", run.out, "--resume", "--objective", other)
        one_sentence(code, capsys.readouterr().err, f"objective (was {objective}, now {other})")
    option = foreign(objective)[0]
    code = program(monkeypatch, train.main, "--out", run.out, "--resume", option, "0.5")
    one_sentence(code, capsys.readouterr().err, f"unknown option {option}")
    assert run.path.read_bytes() == before


@pytest.mark.parametrize(
    ("objective", "option", "was", "now"),
    [
        ("control", "--mask-text", "0.25", "0.3"),
        ("maskvlm", "--mask-unit", "2", "1"),
        ("glscl", "--mask-drop", "0.8", "0.5"),
        ("vlmae", "--w-ifr", "1.0", "0.5"),
    ],
)
def test_own_options_are_known_when_a_run_goes_on(trained, objective, option, was, now):
    """Without naming the objective: unchanged is no change, and what differs is told by name."""
    assert resumed_run(trained(objective).out, option, was).step == 6
    name = option[2:].replace("-", "_")
    with pytest.raises(ValueError, match=re.escape(f"{name} (was {was}, now {now})")):
        resumed_run(trained(objective).out, option, now)


def test_a_checkpoint_that_is_older_than_the_ablations_goes_on(trained, tmp_path):
    """MAMO had neither mask_both nor mim_target: their defaults are what it did; it drew negatives as ALBEF does."""
    state = trained("mamo").state()
    for name in ("mask_both", "mim_target", "albef_negatives"):
        del state["config"][name]
    path = changed(state, tmp_path)
    model, _, _ = load_model(path, CPU)
    assert (model.config.mask_both, model.config.mim_target) == (False, "features")
    assert same(dict(model.state_dict()), state["model"]) and resumed_run(tmp_path).step == 6
    assert resumed_run(tmp_path).model.config.albef_negatives
    with pytest.raises(ValueError, match=r"mask_both \(was False, now True\)"):
        resumed_run(tmp_path, "--mask-both")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_help_lists_the_options_of_the_objective_and_of_no_other(capsys, objective):
    """Whatever of a Config is not set from the tokenizer is an option."""
    with pytest.raises(SystemExit) as end:
        train.parse(["--objective", objective, "--help"])
    listed = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    own = fields_of(objective) - {"vocab_size", "mask_id", "special_ids", "continuation_ids"}
    assert end.value.code == 0
    assert {"--" + name.replace("_", "-") for name in own} <= listed
    assert not listed & set(foreign(objective)) and "--continuation-ids" not in listed
    assert ("--mask-drop" in listed, "--w-mrm" in listed) == (objective == "glscl", objective in ("mamo", "control"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_option_of_another_objective_is_unknown(data, tmp_path, monkeypatch, capsys, objective):
    """One sentence, and no run folder; its own options arrive, in either way of writing."""
    assert len(foreign(objective)) > 3
    for option in foreign(objective):
        given = options(data, tmp_path / "out", "--objective", objective, option, "0.5")
        one_sentence(program(monkeypatch, train.main, *given), capsys.readouterr().err, f"unknown option {option}")
    assert not (tmp_path / "out").exists()
    for given in (["--objective", objective], [f"--objective={objective}"], ["--resume", "--objective", objective]):
        config, sizes = train.parse(["--out", str(tmp_path), *given, "--mask-text", "0.4"])
        assert config.objective == objective and sizes == {"mask_text": 0.4}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--objective clip", "unknown objective 'clip': use one of mamo, control, maskvlm, glscl, vlmae"),
        ("--objective", "expected one argument"),
        ("--objective maskvlm", "mask_unit is 2: the grid of patches (2, 3) is no multiple of it"),
        ("--objective maskvlm --mask-unit 0", "mask_unit is 0"),
        ("--objective maskvlm --image-size 16 16", "mask_unit is 2"),
        ("--objective maskvlm --mask-unit 1 --decoder-depth 0", "decoder_depth is 0"),
        ("--objective maskvlm --mask-unit 1 --mask-image 1", "mask_image is 1.0: give a share between 0 and 1"),
        ("--objective glscl --mask-drop 0", "mask_drop is 0.0: give a share between 0 and 1"),
        ("--objective glscl --mask-completion 1.5", "mask_completion is 1.5"),
        ("--objective glscl --completion-temperature 0", "completion_temperature is 0.0"),
        ("--objective glscl --w-mgsc -1", "w_mgsc is -1.0"),
        ("--objective vlmae --ema 1.5", "ema is 1.5"),
        ("--objective vlmae --w-itc 0 --w-itm 0 --w-mlm 0 --w-rmim 0 --w-ifr 0", "every loss has weight 0"),
        ("--mim-target words", "unknown mim_target 'words': use features or pixels"),
        ("--mask-both --w-mrm 0 --w-mlm 0", "mask_both: give w_mrm a weight"),
        ("--objective control --mask-both", "mask_both: give w_mrm a weight"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_writes_nothing(data, tmp_path, monkeypatch, capsys, given, says):
    """Exit status 2, no usage, no traceback, no run folder."""
    code = program(monkeypatch, train.main, *options(data, tmp_path / "out", *given.split()))
    one_sentence(code, capsys.readouterr().err, says)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_is_evaluated_by_its_encoders_alone(trained, judged, command, objective):
    """Every command takes it; the figures are those of a control with the same encoders, which knows no objective."""
    path = trained(objective).path
    model, tokenizer, state = load_model(path, CPU)
    assert type(model) is OBJECTIVES[objective][0] and not model.training
    assert same(dict(model.state_dict()), state["model"])
    plain = build_model(
        "control", vars(encoders_of(state["config"], ("w_itc", "w_itm", "w_mlm"))) | {"w_mrm": 0.0, "w_mim": 0.0}
    ).eval()
    missing = plain.load_state_dict({k: v for k, v in state["model"].items() if "mask_token" not in k}, strict=False)
    assert not missing.missing_keys
    plain.matching_weight = model.matching_weight
    batch = tiny_batch(plain.config, b=6)
    pairs = batch["images"], batch["input_ids"], batch["attention_mask"]
    ours, theirs = model.score(*pairs), plain.score(*pairs)
    assert same(ours, theirs) and ours.keys() == {"itc", "itm"} and len(ours["itm"].unique()) == 6

    pair_rows, foil_rows, phrase_rows = (read_rows([judged], kind) for kind in ("pairs", "foils", "grounding"))
    expected = {
        "retrieval": retrieval(plain, tokenizer, pair_rows, CPU, k=128),
        "foils": foils(plain, tokenizer, foil_rows, CPU),
        "grounding": judge_grounding(phrase_rows, ground(plain, tokenizer, phrase_rows, CPU, How()))
        | {"map": str(How())},
    }
    for name, result in expected.items():
        code, said, errors = command(name, "--checkpoint", path, "--data", judged)
        kept = json.loads(path.with_name("results.json").read_text())
        assert code == 0 and "chance" in said, errors
        assert kept[f"{name} {judged}"] == json.loads(json.dumps(result)), name

    picture = ("--checkpoint", path, "--image", judged.parent / "pictures" / "05.png", "--text", caption(5))
    code, said, errors = command("score", *picture)
    assert code == 0 and re.match(r"contrast, .*: -?\d\.\d+\nmatching, .*: \d\.\d+\n$", said), errors
    out = path.with_name("heat.png")
    code, said, errors = command("explain", *picture, "--phrase", "square", "--out", out)
    assert code == 0 and out.is_file() and "the map, by hiding 128 times, by colour" in said, errors


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_checkpoint_is_no_other_objectives(trained, tmp_path, objective):
    """Under another name it is refused, with the fields that betray it; so is a name that nobody has."""
    state = trained(objective).state()
    for other in others(objective):
        strange = sorted(state["config"].keys() - fields_of(other))
        path = changed(state | {"objective": other}, tmp_path / other)
        with pytest.raises(ValueError) as error:
            load_model(path, CPU)
        assert f"{', '.join(strange)} is no field of the objective {other}" in str(error.value)
    path = changed(state | {"objective": "clip"}, tmp_path / "clip")
    with pytest.raises(ValueError, match="unknown objective 'clip'"):
        load_model(path, CPU)


def test_a_run_of_an_objective_that_nobody_has_is_not_gone_on_with(trained, tmp_path):
    """Such as one of a later version: a sentence, not a traceback."""
    state = trained("glscl").state()
    changed(state | {"objective": "clip", "train": state["train"] | {"objective": "clip"}}, tmp_path)
    with pytest.raises(ValueError, match="unknown objective 'clip'"):
        resumed_run(tmp_path)


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def task_data(tmp_path_factory) -> dict[str, Path]:
    """Rows of two tasks, of which a part is to be kept apart for val."""
    folder = tmp_path_factory.mktemp("tasks")
    return {task: write_task(folder / f"{task}.jsonl", task) for task in ("vqa", "retrieval")}


@pytest.mark.parametrize(("task", "own"), [("vqa", ("head.",)), ("retrieval", ())])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fine_tuning_starts_from_the_encoders_of_any_objective(
    trained, task_data, tmp_path, capsys, command, objective, task, own
):
    """Bit by bit, and no more than the encoders; the run is evaluated and taken up again as ever."""
    source = trained(objective).state()
    stopped_and_straight(task, trained(objective).path, task_data, tmp_path, [1], "--steps", "2")
    said = capsys.readouterr().out
    run = tuned(task, trained(objective).path, task_data, tmp_path / "first")
    old = len(source["vocab"])
    for name, value in weights(run).items():
        if not name.startswith(own or "nothing"):
            assert torch.equal(value[:old] if "words" in name else value, source["model"][name]), name
    tasks_own = {"itm_head.weight", "itm_head.bias", "log_temperature"} if task == "retrieval" else set()
    shared = {name for name in source["model"] if name.startswith("student.") and "mask_token" not in name}
    if task == "vqa":
        shared = {name for name in shared if "projection" not in name}
    assert {name for name in weights(run) if not name.startswith("head.")} == shared | tasks_own
    assert f"so fresh: {'head' if own else 'nothing'}" in said
    expected = {field.name: source["config"][field.name] for field in dataclasses.fields(Config)}
    expected |= {"vocab_size": len(run.tokenizer), "w_mlm": 0.0, "w_itm": 1.0, "w_itc": float(task == "retrieval")}
    assert type(run.model.config) is Config and dataclasses.asdict(run.model.config) == expected
    assert run.config.objective == objective and expected["dropout"] == 0.1 and expected["heads"] == 2

    best = tmp_path / "straight" / "best.pt"
    model, _, state = load_model(best, CPU)
    assert state["config"].keys() == {field.name for field in dataclasses.fields(Config)}
    assert model.config == resumed(task, tmp_path / "straight").model.config
    code, said, errors = command(task, "--checkpoint", best, "--data", task_data[task])
    assert code == 0 and "chance" in said, errors


@pytest.mark.parametrize(
    "alone",
    [
        "--w-itc 0 --w-itm 0 --w-mlm 0 --ema 0.9",
        "--objective maskvlm --w-itc 0 --w-itm 0 --w-mlm 0",
        "--objective glscl --w-itc 0 --w-itm 0 --w-mlm 0",
        "--objective vlmae --w-itc 0 --w-itm 0 --w-mlm 0 --ema 0.9",
    ],
)
def test_fine_tuning_starts_from_a_run_of_its_own_losses_only(data, task_data, tmp_path, alone):
    """Without the losses that all objectives share, the encoders are there all the same."""
    run = new_run(data, tmp_path / "own", "--patch-size", "4", *alone.split())
    run.train(stop_at=1)
    start = torch.load(tmp_path / "own" / "checkpoint.pt", weights_only=True)["model"]
    tune = tuned("vqa", tmp_path / "own" / "checkpoint.pt", task_data, tmp_path / "tune")
    assert all(name.startswith("head.") for name in tune.fresh), tune.fresh
    blocks = [name for name in weights(tune) if "blocks" in name]
    assert blocks and all(torch.equal(weights(tune)[name], start[name]) for name in blocks)


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_fine_tuned_checkpoint_with_all_fields_of_mamo_still_loads(trained, task_data, tmp_path, task):
    """As those from before the siblings: what is not the encoders' is passed over, when it is taken up again too."""
    tuned(task, trained("mamo").path, task_data, tmp_path).train(stop_at=2)
    now, more = torch.load(tmp_path / "checkpoint.pt", weights_only=True), dataclasses.asdict(MAMOConfig())
    before = {"w_mrm": 0.0, "w_mim": 0.0, "queue_size": 0, "ema": 0.97} | {
        k: more[k] for k in ("mask_image", "mask_text")
    }
    assert not before.keys() & now["config"].keys()
    path = changed(now | {"config": now["config"] | before}, tmp_path)
    model, _, _ = load_model(path, CPU)
    assert dataclasses.asdict(model.config) == now["config"] and same(dict(model.state_dict()), now["model"])
    run = resumed(task, tmp_path)
    assert run.step == 2
    run.train()
    assert tuned(task, path, task_data, tmp_path / "on").fresh == ()


# --------------------------------------------------------------------------------------------------------- whole words

PIECES = "gre ##en yel ##low pur ##ple cy ##an re ##d bl ##ue"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """Every colour is two pieces, what stands beside them is whole; continuations and special tokens in between."""
    words = ["a", "square", "at", "the", "top", "bottom", "left", "right", "of", "white", "sheet"]
    entries = [*PIECES.split(), *SPECIAL_TOKENS, *words]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    Tokenizer(entries[::-1]).save(path)
    return path


def test_continuation_ids_reach_glscl_and_only_it(trained, data, tmp_path, vocabulary):
    """They survive the checkpoint; the model marks exactly those pieces that begin with ##."""
    run = new_run(data, tmp_path, "--objective", "glscl", "--patch-size", "4", "--vocab", str(vocabulary))
    run.train(stop_at=1)
    resumed_run(tmp_path).train(stop_at=2)
    model, tokenizer, state = load_model(tmp_path / "checkpoint.pt", CPU)
    starts = [token.startswith("##") for token in tokenizer.vocab]
    assert sum(starts) == 6 and model.continues.tolist() == starts
    assert sorted(state["config"]["continuation_ids"]) == [number for number, goes_on in enumerate(starts) if goes_on]
    assert model.config == run.model.config and not any("continues" in name for name in state["model"])
    shape = vars(encoders_of(state["config"]))  # what fine-tuning takes of it, special tokens at their places too
    shape = {name: value for name, value in shape.items() if not name.startswith("w_")}
    assert shape == {name: state["config"][name] for name in shape} and shape["mask_id"] == tokenizer.mask_id != 4
    for objective in OBJECTIVES:
        vocab, config = trained(objective).state()["vocab"], trained(objective).state()["config"]
        assert ("continuation_ids" in config) == (objective == "glscl")
        if objective == "glscl":
            expected = [number for number, token in enumerate(vocab) if token.startswith("##")]
            assert sorted(config["continuation_ids"]) == expected and expected, "characters can go on with a word"


def test_whole_words_are_hidden_in_a_run(data, tmp_path, monkeypatch, vocabulary):
    """All pieces of a word or none, but where the word alone is too long; and single pieces would have been broken."""
    seen, hide = [], glscl.mask_whole_words

    def noting(*given):
        seen.append((given, hide(*given)))
        return seen[-1][1]

    monkeypatch.setattr(glscl, "mask_whole_words", noting)
    run = new_run(data, tmp_path, "--objective", "glscl", "--patch-size", "4", "--vocab", str(vocabulary))
    run.train()
    assert len(seen) == 9 and run.model.config.mask_text == 0.15
    whole, broken = 0, 0
    for given, words in seen:
        config = given[5]
        singly = mask_words(*given[:6])
        for row, ids in enumerate(given[0].tolist()):
            pieces = [place for place, i in enumerate(ids) if i not in config.special_ids]
            starts = [place for place in pieces if not run.tokenizer.vocab[ids[place]].startswith("##")]
            groups = [{p for p in pieces if max(s for s in starts if s <= p) == start} for start in starts]
            allowed = math.ceil(0.15 * len(pieces) - 1e-4)
            hidden, other = (set(found.index[row][found.valid[row]].tolist()) for found in (words, singly))
            assert 1 <= len(hidden) <= allowed
            for group in groups:
                assert not hidden & group or group <= hidden or (hidden < group and len(group) > allowed)
                whole += len(group) > 1 and group <= hidden
                broken += allowed > 1 and bool(other & group) and not group <= other
    assert whole > 3 and broken > 3


# ------------------------------------------------------------------------------------------------------- two processes

HALF = 4  # pairs of each process
SHARES = (slice(0, HALF), slice(HALF, 2 * HALF))
ORDERS = ("first is longer", "first is shorter")
ALONE = {"mgsc alone": {"w_mgsc": 1.0, "w_mltc": 0.0}, "mltc alone": {"w_mgsc": 0.0, "w_mltc": 1.0}}


def model_of(case: str) -> VisionLanguageModel:
    """A case, or a completion of GLSCL without any other loss, so warm that every candidate counts."""
    if case not in ALONE:
        return tiny(case)
    changes = {"w_itc": 0.0, "w_itm": 0.0, "w_mlm": 0.0, "completion_temperature": 1.0}
    return tiny_objective("glscl", **changes, **ALONE[case])


def shared_batch(config: Config, order: str) -> dict[str, torch.Tensor]:
    """Eight pairs; of one half the longest text has 11 tokens, of the other 6, and a text there has no word at all.

    Some pairs share a picture or a caption, within a half and across.
    """
    batch = tiny_batch(config, b=2 * HALF)
    batch["input_ids"][SHARES[1], 6:] = PAD
    batch["input_ids"][5, 1:] = PAD
    batch["input_ids"][5, 1] = SEP
    batch["attention_mask"] = batch["input_ids"] != PAD
    batch = make_same(batch, image=((1, 6), (2, 3)), caption=((6, 7),))
    if order == ORDERS[1]:
        batch |= {name: value.roll(HALF, 0) for name, value in batch.items() if name != "negative_noise"}
    return batch


def share_of(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """What one process has of a batch: its rows, padded to its own longest text."""
    length = int(batch["attention_mask"][rows].sum(dim=1).max())
    share = {name: value[rows] for name, value in batch.items()} | {
        "negative_noise": batch["negative_noise"][:, rows, rows]
    }
    texts = ("input_ids", "attention_mask", "token_noise", "replace_noise")
    return share | {name: share[name][:, :length] for name in texts}


def steps_of_all(folder: Path) -> None:
    """In one of two processes: losses and averaged gradients of a step of every case."""
    rank, found = torch.distributed.get_rank(), {}
    for case, order in itertools.product((*CASES, *ALONE), ORDERS):
        model = model_of(case)
        shared = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        losses = shared(share_of(shared_batch(model.config, order), SHARES[rank]))
        total(model, losses).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[case, order] = {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": gradients}
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of two processes found, see steps_of_all."""
    folder = tmp_path_factory.mktemp("two")
    together(2, folder, steps_of_all, folder)
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", (*CASES, *ALONE))
def test_two_processes_equal_one(two, monkeypatch, case, order):
    """Losses and gradients of a step, with texts of other lengths here and there; ITM draws within the halves."""
    model, not_drawn = model_of(case), VisionLanguageModel.not_drawn
    across = torch.ones(2 * HALF, 2 * HALF, dtype=torch.bool)
    for rows in SHARES:
        across[rows, rows] = False
    monkeypatch.setattr(
        VisionLanguageModel,
        "not_drawn",
        lambda self, close, alike: not_drawn(self, close, alike | across),
    )
    batch = shared_batch(model.config, order)
    lengths = [share_of(batch, rows)["input_ids"].shape[1] for rows in SHARES]
    assert sorted(lengths) == [6, 11] and len(batch["attention_mask"].sum(dim=1).unique()) > 3
    losses = model(batch)
    total(model, losses).backward()
    found = [one[case, order] for one in two]
    for name in losses:
        mean = sum(one["losses"][name].item() for one in found) / 2
        assert mean == pytest.approx(losses[name].item(), rel=1e-5, abs=1e-6), name
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == found[0]["gradients"].keys() and same(found[0]["gradients"], found[1]["gradients"])
    for name, gradient in gradients.items():
        close = {"rtol": 1e-3, "atol": 1e-5 * max(gradient.abs().max().item(), 0.1)}
        torch.testing.assert_close(found[0]["gradients"][name], gradient, **close, msg=name)


def runs_of(commands: list[list[str]], folder: Path) -> None:
    """In one of several processes: whole runs, one after another, and what each ends with."""
    for number, arguments in enumerate(commands):
        run = train.start(*train.parse(arguments))
        run.train()
        torch.save(run.model.state_dict(), folder / f"model-{number}-{run.rank}.pt")


def test_whole_runs_of_two_processes_equal_those_of_one(data, tmp_path, monkeypatch):
    """Of each sibling every loss of every step, gradient norm, temperature; both processes end with the same bits."""
    more = ["--patch-size", "4", "--steps", "4", "--batch-size", "16", "--lr", "5e-3"]
    commands = [options(data, tmp_path / f"two {name}", "--objective", name, *more) for name in SIBLINGS]
    together(2, tmp_path, runs_of, commands, tmp_path)
    monkeypatch.setattr(test_processes, "MAMO", VisionLanguageModel)
    for number, name in enumerate(SIBLINGS):
        run = new_run(data, tmp_path / f"one {name}", "--objective", name, *more, "--parts", "2")
        with monkeypatch.context() as patch:
            test_processes.draw_within_halves(run, patch)
            run.train()
        ours, theirs = read_log(tmp_path / f"one {name}"), read_log(tmp_path / f"two {name}")
        assert len(ours) == len(theirs) == 4 and ours[0].keys() == theirs[0].keys()
        for one, other in zip(ours, theirs, strict=True):
            for column in one:
                assert float(other[column]) == pytest.approx(float(one[column]), rel=1e-3, abs=1e-4), (name, column)
        models = [torch.load(tmp_path / f"model-{number}-{rank}.pt") for rank in range(2)]
        assert same(*models) and models[0].keys() == run.model.state_dict().keys()


def test_features_alone_are_trained_by_two_processes_or_refused(data, tmp_path):
    """IFR does without text, and processes that average gradients do not expect parameters without one."""
    alone = "--objective vlmae --w-itc 0 --w-itm 0 --w-mlm 0 --w-rmim 0 --patch-size 4 --steps 3 --batch-size 8"
    workers = start(2, tmp_path, runs_of, [options(data, tmp_path / "run", *alone.split())], tmp_path)
    for worker in workers:
        worker.join(120)
    said = "".join((tmp_path / f"said-{rank}.txt").read_text() for rank in range(2))
    assert {worker.exitcode for worker in workers} in ({0}, {2}) and "Traceback" not in said, said


# ------------------------------------------------------------------------------------------------ precision and memory


@pytest.mark.parametrize("objective", SIBLINGS)
def test_losses_in_bf16_are_nearly_those_in_fp32(data, tmp_path, objective):
    """One step: products in bf16, parameters in fp32, no loss far off."""
    seen, logs = set(), []
    for precision in ("fp32", "bf16"):
        more = ("--objective", objective, "--patch-size", "4", "--precision", precision, "--steps", "1")
        run = new_run(data, tmp_path / precision, *more)
        for module in run.model.modules():
            if precision == "bf16" and isinstance(module, Attention):
                module.query.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
        run.train()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        logs += read_log(tmp_path / precision)
    assert seen == {torch.bfloat16} and logs[0] != logs[1]
    for name in CASES[objective][1].split():
        assert float(logs[1][name]) == pytest.approx(float(logs[0][name]), rel=0.03), name


@pytest.mark.parametrize("objective", SIBLINGS)
def test_what_is_recovered_is_judged_in_fp32(monkeypatch, objective):
    """What reaches such a loss in bf16 is judged again as fp32, outside of autocast: equal to the last bit."""
    model, seen = tiny_objective(objective), {}
    for name in model.loss_weights.keys() - {"itc", "itm", "mlm"}:
        kept = getattr(model, f"loss_{name}")

        def note(*given, kept=kept, name=name):
            seen[name] = kept, given
            return kept(*given)

        monkeypatch.setattr(model, f"loss_{name}", note)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(tiny_batch(model.config, b=6))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for name, (kept, given) in seen.items():
        whole = [value.float() if value.is_floating_point() else value for value in given]
        assert torch.equal(kept(*whole), losses[name]), name


@pytest.mark.parametrize("objective", SIBLINGS)
def test_gradient_checkpointing_changes_nothing_but_memory(data, tmp_path, objective):
    """The same log and the same weights, with dropout, which must fall alike again; and fewer numbers are kept."""
    kept = []
    for name, again in (("plain", []), ("again", ["--grad-checkpointing"])):
        more = ["--objective", objective, "--patch-size", "4", "--dropout", "0.1", "--steps", "2", *again]
        run, sizes = new_run(data, tmp_path / name, *more), []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        )
        with keep:
            run.train()
        kept.append(sum(sizes))
    assert read_log(tmp_path / "plain") == read_log(tmp_path / "again")
    assert same(*(checkpoint(tmp_path / name)["model"] for name in ("plain", "again")))
    assert kept[1] < 0.8 * kept[0]
