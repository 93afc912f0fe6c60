"""Fine-tuning: what a run starts from, rates, resuming, the best step, val, two processes, options and errors."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import test_processes
import torch
from helpers import SIZES, new_run, read_log, same, square, write_rows, write_squares, write_task
from processes import fine_tune, together
from test_train import checkpoint, command

import eval as evaluation
import finetune
import train
from data import read_rows
from eval import classify, load_model, retrieval
from finetune import FineTune, expand, split_by_group, with_new_words
from metrics import score_answers
from tasks import TASKS, Retrieval, by_picture, coverage
from tokenizer import Tokenizer
from tools import prepare
from train import learning_rate

SHORT = (
    "--steps 6 --batch-size 4 --log-every 1 --eval-every 2 --save-every 100 --device cpu --lr 0.004 --lr-head 0.01 "
    "--warmup 0.4"
)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The checkpoint of a very small pre-training run on the squares."""
    folder = tmp_path_factory.mktemp("start")
    new_run(write_squares(folder / "pairs.jsonl", 24), folder / "run").train(stop_at=2)
    return folder / "run" / "checkpoint.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """A file of each task, of which a part is to be kept apart for val."""
    folder = tmp_path_factory.mktemp("data")
    return {task: write_task(folder / f"{task}.jsonl", task) for task in TASKS}


def arguments(task: str, start, data: Path, out: Path, *more: str) -> list[str]:
    """The command line of a very small run; what comes later wins."""
    return [task, "--init", str(start), "--data", str(data), "--out", str(out), *SHORT.split(), *more]


def tuned(task: str, start, data: dict[str, Path], out: Path, *more: str) -> FineTune:
    """A run as the command line would make it."""
    return finetune.start(*finetune.parse(arguments(task, start, data[task], out, *more)))


def resumed(task: str, out: Path, *more: str) -> FineTune:
    """The same run, made again from its folder."""
    return finetune.start(*finetune.parse([task, "--out", str(out), "--resume", *more]))


def best(out: Path) -> dict:
    """best.pt without what says where it was made."""
    state = torch.load(out / "best.pt", weights_only=False)
    for name in ("out", "workers", "resume"):
        del state["train"][name]
    return state


def weights(run: FineTune) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def scripted(monkeypatch, figures: list[float]) -> dict[int, dict]:
    """Let val come to these figures, one evaluation after another -> the weights at each, by step."""
    seen = {}

    def score(run: FineTune) -> float:
        seen[run.step] = weights(run)
        return figures[run.step // run.config.eval_every - 1]

    monkeypatch.setattr(FineTune, "score", score)
    return seen


# ------------------------------------------------------------------------------------------------ rates, and who moves


@pytest.mark.parametrize("from_scratch", [False, True])
def test_encoders_and_head_have_their_own_learning_rates(start, data, tmp_path, from_scratch):
    """At every step the schedule times 1 for the encoders and times lr_head / lr for the head; from scratch for all.

    Each parameter is in one group, and single tokens do not decay.
    """
    more = [] if not from_scratch else SIZES.split()
    run = tuned("reasoning", "none" if from_scratch else start, data, tmp_path, *more)
    names, rates, step = {p: name for name, p in run.model.named_parameters()}, [], run.optimizer.step

    def watched():
        groups = run.optimizer.param_groups
        rates.append({names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]})
        assert sum(len(group["params"]) for group in groups) == len(rates[-1])
        step()

    run.optimizer.step = watched
    run.train()
    assert len(rates) == 6
    for number, found in enumerate(rates):
        rate = learning_rate(number, run.config)
        assert found.keys() == set(names.values())
        for name, (lr, _) in found.items():
            times = 2.5 if from_scratch or name.startswith(("head.", "absent")) else 1.0
            assert lr == pytest.approx(times * rate), name
    decays = {name: decay > 0 for name, (_, decay) in rates[0].items()}
    assert decays["head.0.weight"] and decays["student.text.words.weight"]
    assert not any(decays[name] for name in ("absent", "head.0.bias", "head.1.weight", "student.text.positions"))


@pytest.mark.parametrize("task", ["vqa", "reasoning"])
def test_a_frozen_encoder_does_not_move_by_one_bit(start, data, tmp_path, task):
    """Under --freeze the head is one linear layer, and it alone learns; the same after the run is taken up again."""
    run = tuned(task, start, data, tmp_path, "--freeze")
    assert isinstance(run.model.head, torch.nn.Linear) and run.model.head_config.linear
    before = weights(run)
    run.train(stop_at=3)
    again = resumed(task, tmp_path)
    again.train()
    assert again.step == 6 and again.config.freeze
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("student."), name
    source = torch.load(start, weights_only=True)["model"]
    assert torch.equal(again.model.student.image.blocks[0].mlp[0].weight, source["student.image.blocks.0.mlp.0.weight"])
    assert sum(len(group["params"]) for group in again.optimizer.param_groups) == (3 if task == "reasoning" else 2)


# ---------------------------------------------------------------------------------------------- what a run starts from


@pytest.mark.parametrize("task", TASKS)
def test_a_run_starts_from_the_encoders_of_the_checkpoint(start, data, tmp_path, capsys, task):
    """Bit by bit, with new words behind the old ones; what is fresh is said, and everything moves in training."""
    run = tuned(task, start, data, tmp_path)
    said, source = capsys.readouterr().out, torch.load(start, weights_only=True)
    now, fresh = weights(run), {"reasoning": "head, absent", "retrieval": "nothing", "grounding": "nothing"}
    old = len(source["vocab"])
    for name, value in now.items():
        if name == "student.text.words.weight":
            assert torch.equal(value[:old], source["model"][name])
        elif not name.startswith(("head.", "absent")):
            assert torch.equal(value, source["model"][name]), name
    listed = re.search(f"not in {re.escape(str(start))}, so fresh: (.*)", said).group(1)
    assert sorted(listed.split(", ")) == sorted(fresh.get(task, "head").split(", "))
    assert run.tokenizer.vocab[:old] == source["vocab"] and run.model.config.vocab_size == len(run.tokenizer)
    run.train()
    still = [name for name, value in run.model.state_dict().items() if torch.equal(value, now[name])]
    assert not still, still


def test_added_words_and_the_coverage_of_the_answers_are_told(start, data, tmp_path, capsys):
    """So many words as the vocabulary has grown by, no more than asked for; the shares are those of coverage."""
    run, old = tuned("vqa", start, data, tmp_path / "all"), len(torch.load(start, weights_only=True)["vocab"])
    said, answers = capsys.readouterr().out, run.model.head_config.answers
    added = run.tokenizer.vocab[old:]
    assert set(added) == {"what", "colour", "is", "where"}
    assert f"4 words of the training rows are added to the vocabulary of {old}" in said
    assert f"{len(answers)} answers to choose from cover 100.0 % of train, 100.0 % of val" in said
    run = tuned("vqa", start, data, tmp_path / "few", "--new-words", "0", "--answers", "2")
    said, answers = capsys.readouterr().out, run.model.head_config.answers
    assert "added to the vocabulary" not in said and len(run.tokenizer) == old and len(answers) == 2
    shares = [coverage(rows, answers) for rows in (run.rows, run.val_rows)]
    assert f"2 answers to choose from cover {shares[0]:.1f} % of train, {shares[1]:.1f} % of val" in said
    assert 0 < shares[0] < 100


def test_a_large_vocabulary_stays_as_it_is(start, data, tmp_path):
    """One of BERT's size spells everything well enough; a word less than 8,000, and it is extended."""
    texts = [row["question"] for row in tuned("vqa", start, data, tmp_path).rows]
    old = torch.load(start, weights_only=True)["vocab"]
    large = old + [f"word{i}" for i in range(8000 - len(old))]
    assert with_new_words(Tokenizer(large), texts, 1000).vocab == large
    extended = with_new_words(Tokenizer(large[:-1]), texts, 1000).vocab
    assert extended[:7999] == large[:-1] and len(extended) > 8000


@pytest.mark.parametrize("task", ["vqa", "retrieval", "reasoning"])
def test_from_scratch_everything_is_trained(data, tmp_path, task):
    """--init none: sizes from the command line, a vocabulary from the rows; all of it moves, eval.py can load it."""
    run = tuned(task, "none", data, tmp_path, *SIZES.split(), "--val", str(data[task]))
    before = weights(run)
    run.train()
    assert not any(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.model.config.width == 16 and "square" in run.tokenizer.vocab
    for name in ("checkpoint.pt", "best.pt"):
        model, tokenizer, _ = load_model(tmp_path / name, torch.device("cpu"))
        assert model.config == run.model.config and tokenizer.vocab == run.tokenizer.vocab


def test_a_head_is_taken_from_a_checkpoint_of_the_same_task_only(start, data, tmp_path):
    """With --new-head not even from there; a linear probe and an MLP are not one another's; encoders come in any case.

    The head of reasoning has as many classes as this vqa has, so that only its task tells them apart.
    """
    first = tuned("vqa", start, data, tmp_path / "first", "--answers", "2")
    first.train(stop_at=3)
    path, trained = tmp_path / "first" / "checkpoint.pt", weights(first)
    again = tuned("vqa", path, data, tmp_path / "again")
    assert same(weights(again), trained) and again.fresh == ()
    for name, task, more in (
        ("new", "vqa", "--new-head"),
        ("entailment", "entailment", ""),
        ("linear", "vqa", "--freeze"),
    ):
        run = tuned(task, path, data, tmp_path / name, *more.split())
        heads = {part for part in run.model.state_dict() if part.startswith("head.")}
        assert set(run.fresh) == heads
        for part, value in run.model.state_dict().items():
            if part not in heads:
                assert torch.equal(value[: len(trained[part])], trained[part]), part  # words may be added behind
            elif value.ndim == 2:
                assert part not in trained or not same(value, trained[part]), part
    two = tuned("reasoning", start, data, tmp_path / "two")
    two.train(stop_at=2)
    run = tuned("vqa", tmp_path / "two" / "checkpoint.pt", data, tmp_path / "from two", "--answers", "2")
    assert run.model.head[3].weight.shape == two.model.head[3].weight.shape
    assert not torch.equal(run.model.head[3].weight, two.model.head[3].weight)
    assert "head.3.weight" in run.fresh


def test_vqa_keeps_the_answers_of_the_checkpoint_it_starts_from(start, data, tmp_path):
    """A class means what it meant, although other rows have other answers; with --new-head they are the rows' own."""
    first = tuned("vqa", start, data, tmp_path / "first")
    first.train(stop_at=2)
    answers, path = first.model.head_config.answers, tmp_path / "first" / "best.pt"
    assert set(answers) == {"red", "green", "blue", "dark", "left", "right", "on paper"}
    for name in ("best.pt", "checkpoint.pt"):
        assert torch.load(tmp_path / "first" / name, weights_only=True)["head"]["answers"] == answers
    rows = [json.loads(line) for line in data["vqa"].read_text().splitlines()]
    for row in rows:
        row["answers"] = {"purple": 1.0, "left": 0.5, "seven": 0.2}
    other = {"vqa": write_rows(data["vqa"].with_name("other.jsonl"), rows)}
    run = tuned("vqa", path, other, tmp_path / "kept")
    assert run.model.head_config.answers == answers and run.model.head[3].out_features == 7
    run.train(stop_at=2)
    assert torch.load(tmp_path / "kept" / "best.pt", weights_only=True)["head"]["answers"] == answers
    run = tuned("vqa", path, other, tmp_path / "new", "--new-head")
    assert run.model.head_config.answers == ["purple", "left", "seven"]


def test_another_resolution_and_longer_texts_train(start, data, tmp_path):
    """The pictures are read larger, the positions fit, and best.pt can be evaluated."""
    run = tuned("entailment", start, data, tmp_path, "--image-size", "32", "24", "--max-tokens", "20")
    assert run.model.config.grid == (4, 3) and run.model.student.image.positions.shape == (13, 16)
    assert len(run.model.student.text.positions) == 20 and run.model.config.width == 16
    run.train()
    model, _, state = load_model(tmp_path / "best.pt", torch.device("cpu"))
    assert model.config.image_size == (32, 24) and state["config"]["max_tokens"] == 20
    assert resumed("entailment", tmp_path).model.config == run.model.config


# ----------------------------------------------------------------------------------------------------------- resuming


def stopped_and_straight(task: str, start, data, folder: Path, stops: list[int], *more: str) -> None:
    """A run in one go and runs that were stopped leave the same checkpoint, the same best.pt and the same log."""
    tuned(task, start, data, folder / "straight", *more).train()
    for stop in stops:
        out = folder / f"stopped at {stop}"
        tuned(task, start, data, out, *more).train(stop_at=stop)
        run = resumed(task, out)
        assert run.step == stop
        run.train()
        for read in (checkpoint, best):
            one, other = read(folder / "straight"), read(out)
            for part in one:
                assert same(one[part], other[part]), (stop, part)
        assert read_log(folder / "straight") == read_log(out)


def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(start, data, tmp_path):
    """Between two evaluations, at one, after the best one; with dropout and augmentation."""
    more = ("--dropout", "0.1", "--augment", "drawing", "--log-every", "3")
    stopped_and_straight("vqa", start, data, tmp_path, [1, 2, 5], *more)
    assert [row["step"] for row in read_log(tmp_path / "straight")] == ["2", "3", "4", "6"]


@pytest.mark.parametrize(
    ("task", "more"), [("retrieval", "--accumulate 2"), ("reasoning", "--freeze"), ("grounding", "--lr 0.002")]
)
def test_other_tasks_are_resumed_as_exactly(start, data, tmp_path, task, more):
    """Of many captions a step takes some at random, and the order of the optimiser's groups is kept."""
    stopped_and_straight(task, start, data, tmp_path, [3], *more.split())


def test_boxes_in_any_order_are_resumed_as_exactly(start, data, tmp_path):
    """Reasoning with --augment boxes: the pictures differ from those of a run without, and so do the losses."""
    stopped_and_straight("reasoning", start, data, tmp_path, [1, 4], "--augment", "boxes")
    tuned("reasoning", start, data, tmp_path / "plain").train()
    losses = [[row["reasoning"] for row in read_log(tmp_path / out)] for out in ("straight", "plain")]
    assert losses[0] != losses[1]
    run = tuned("reasoning", start, data, tmp_path / "shown", "--augment", "boxes")
    batch = next(run.batches())
    assert len(batch["images"]) == len(batch["picture"]) == batch["shown"].sum()


def test_rows_of_one_picture_share_it_in_a_step(start, data, tmp_path):
    """The file has two questions to each picture."""
    run = tuned("vqa", start, data, tmp_path, "--val-share", "0", "--batch-size", "16")
    batch = next(run.batches())
    numbers = batch["picture"].tolist()
    assert len(batch["images"]) == len(set(numbers)) < len(numbers) == 16 and set(numbers) == set(
        range(max(numbers) + 1)
    )
    run.train(stop_at=2)


def test_a_resumed_run_keeps_its_options_and_refuses_others(start, data, tmp_path):
    run = tuned("vqa", start, data, tmp_path, "--patience", "4", "--answers", "5")
    run.train(stop_at=3)
    again = resumed("vqa", tmp_path)
    kept, asked = vars(again.config), vars(run.config)
    assert {name for name in kept if kept[name] != asked[name]} == {"resume"}
    assert len(again.model.head_config.answers) == 5 and again.best_step == 2
    with pytest.raises(ValueError) as error:
        resumed("vqa", tmp_path, "--lr-head", "0.5", "--freeze", "--width", "32", "--answers", "5")
    message = str(error.value)
    assert "lr_head (was 0.01, now 0.5)" in message and "freeze (was False, now True)" in message
    assert "width (was 16, now 32)" in message and "answers" not in message
    with pytest.raises(ValueError, match=r"task \(was vqa, now reasoning\)"):
        resumed("reasoning", tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt exists: pass --resume"):
        tuned("vqa", start, data, tmp_path)


def test_train_py_says_in_a_sentence_that_a_run_is_not_its_own(start, data, tmp_path):
    tuned("vqa", start, data, tmp_path).train(stop_at=1)
    with pytest.raises(ValueError, match="vqa"):
        train.start(*train.parse(["--out", str(tmp_path), "--resume"]))


# ------------------------------------------------------------------------------------------------------ the best step


def test_best_pt_holds_the_weights_of_the_best_step(start, data, tmp_path, monkeypatch, capsys):
    """Not those of the last one, and of equal figures the first; nobody needs the optimiser there."""
    seen = scripted(monkeypatch, [10.0, 50.0, 30.0, 50.0, 20.0])
    given = arguments("vqa", start, data["vqa"], tmp_path, "--steps", "10")
    assert command(monkeypatch, finetune.main, *given) == 0
    said, state = capsys.readouterr().out, best(tmp_path)
    assert list(seen) == [2, 4, 6, 8, 10] and state["step"] == 4 and state["best"] == [50.0, 4, 0]
    assert same(state["model"], seen[4]) and not same(state["model"], seen[8])
    assert not {"optimizer", "scaler", "meter"} & state.keys()
    last = checkpoint(tmp_path)
    assert same(last["model"], seen[10]) and last["best"] == [50.0, 4, 3]
    assert f"best on val: 50.0 % at step 4, kept in {tmp_path / 'best.pt'}" in said
    assert [float(row["val"]) for row in read_log(tmp_path) if "val" in row] == [10, 50, 30, 50, 20]


@pytest.mark.parametrize("task", TASKS)
def test_the_figure_on_val_is_what_best_pt_comes_to(start, data, tmp_path, task):
    """Of an answer its score; of retrieval R@1 by matching, the mean of both ways; after a resume the same."""
    run = tuned(task, start, data, tmp_path, "--val", str(data[task]), "--lr", "0.02")
    run.train(stop_at=4)
    figures = {int(row["step"]): float(row["val"]) for row in read_log(tmp_path) if "val" in row}
    model, tokenizer, state = load_model(tmp_path / "best.pt", torch.device("cpu"))
    rows, cpu = read_rows([data[task]], TASKS[task].schema), torch.device("cpu")
    if isinstance(model, Retrieval):
        ways = retrieval(model, tokenizer, by_picture(rows, TASKS[task].schema), cpu, k=16)["matching"]
        figure = (ways["image_to_text"]["R@1"] + ways["text_to_image"]["R@1"]) / 2
    else:
        figure = 100 * sum(score_answers(task, rows, classify(model, tokenizer, rows, cpu))) / len(rows)
    assert figures.keys() == {2, 4}
    assert figure == pytest.approx(max(figures.values()), rel=1e-5) == pytest.approx(run.best, rel=1e-5)
    assert figures[state["step"]] == max(figures.values()) and 0 < figure < 100
    assert resumed(task, tmp_path).score() == pytest.approx(figures[4], rel=1e-5)


def test_evaluation_changes_nothing_in_training(start, data, tmp_path):
    """The weights are those of a run that is evaluated at its end alone; with dropout, so that modes would show."""
    for out, every in (("often", "1"), ("once", "100")):
        tuned("vqa", start, data, tmp_path / out, "--dropout", "0.1", "--eval-every", every).train()
    assert same(checkpoint(tmp_path / "often")["model"], checkpoint(tmp_path / "once")["model"])


@pytest.mark.parametrize("stop", [None, 2, 3, 6])
def test_patience_ends_the_run_and_saves(start, data, tmp_path, monkeypatch, stop):
    """Two evaluations in a row without a better one; a better one gives patience back; a stop in between does not."""
    seen = scripted(monkeypatch, [10.0, 9.0, 11.0, 11.0, 9.0, 99.0])
    run = tuned("vqa", start, data, tmp_path, "--steps", "100", "--patience", "2")
    if stop:
        run.train(stop_at=stop)
        run = resumed("vqa", tmp_path)
    run.train()
    assert run.step == 10 and max(seen) == 10
    state = checkpoint(tmp_path)
    assert state["step"] == 10 and same(state["model"], seen[10]) and state["best"] == [11.0, 6, 2]
    assert same(best(tmp_path)["model"], seen[6]) and read_log(tmp_path)[-1]["step"] == "10"


def test_resuming_a_run_that_patience_ended_changes_nothing(start, data, tmp_path, monkeypatch):
    """As with a run that came to its last step."""
    scripted(monkeypatch, [10.0, 9.0, 99.0, 99.0])
    tuned("vqa", start, data, tmp_path, "--steps", "8", "--patience", "1").train()
    before = checkpoint(tmp_path)
    assert before["step"] == 4
    run = resumed("vqa", tmp_path)
    run.train()
    assert run.step == 4 and same(checkpoint(tmp_path), before)


# --------------------------------------------------------------------------------------------------- data, and val


def test_without_a_val_file_whole_groups_are_kept_apart(start, data, tmp_path, capsys):
    """No group is in both, every row is somewhere, and the share is about what was asked for."""
    run = tuned("vqa", start, data, tmp_path / "run", "--val-share", "0.3")
    groups = [{row["group"] for row in rows} for rows in (run.rows, run.val_rows)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 6
    assert len(run.val_rows) == 8 and len(run.rows) == 16  # the share is 7.2 rows, and a group has four
    assert "no val file: 8 of 24 rows are kept apart to choose on" in capsys.readouterr().out
    assert run.val_rows == tuned("vqa", start, data, tmp_path / "again", "--val-share", "0.3").val_rows
    seeds = [tuned("vqa", start, data, tmp_path / str(s), "--val-share", "0.3", "--seed", str(s)) for s in (1, 2, 3)]
    assert any({row["group"] for row in other.val_rows} != groups[1] for other in seeds)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5])
def test_groups_of_any_kind_go_apart_as_a_whole(share):
    """By `group`, else by picture, else by the pictures of a row; at most one group more than the share."""
    rows = [{"group": f"g{i % 7}", "image": f"{i}.png", "n": i} for i in range(40)]
    rows += [{"image": f"picture {i % 9}.png", "n": 40 + i} for i in range(30)]
    rows += [{"images": [f"pair {i % 4}.png", "x.png"], "n": 70 + i} for i in range(12)]

    def name(row: dict) -> str:
        return str(row.get("group") or row.get("image") or row["images"])

    for seed in range(5):
        train, val = split_by_group(rows, share, seed)
        assert sorted(row["n"] for row in train + val) == list(range(82))
        assert not {name(row) for row in train} & {name(row) for row in val}
        assert share * 82 <= len(val) < share * 82 + 6 + (share == 0)
    one = [{"group": "g", "image": f"{i}.png"} for i in range(5)]
    with pytest.raises(
        ValueError, match="5 rows in one group cannot be split into training and val: give --val a file"
    ):
        split_by_group(one, 0.1, 0)


def test_a_group_may_be_number_0():
    rows = [{"group": i % 2, "image": f"{i}.png"} for i in range(20)]
    train, val = split_by_group(rows, 0.3, 0)
    assert not {row["group"] for row in train} & {row["group"] for row in val}


def test_a_name_stands_for_its_training_file_and_the_val_file_beside_it(start, tmp_path):
    """X is X_train.jsonl with X_val.jsonl; the same for a file given by its own name; --val goes before."""
    write_task(tmp_path / "vqa_train.jsonl", "vqa", 8)
    write_task(tmp_path / "vqa_val.jsonl", "vqa", 3)
    write_task(tmp_path / "other.jsonl", "vqa", 2)
    for name, more, count in (
        ("vqa", [], 6),
        ("vqa_train.jsonl", [], 6),
        ("vqa", ["--val", str(tmp_path / "other.jsonl")], 4),
    ):
        run = tuned("vqa", start, {"vqa": tmp_path / name}, tmp_path / f"run {name} {count}", *more)
        assert len(run.rows) == 16 and len(run.val_rows) == count
    train, val = expand([str(tmp_path / "vqa"), str(tmp_path / "other.jsonl")])
    assert train == [tmp_path / "vqa_train.jsonl", tmp_path / "other.jsonl"] and val == [tmp_path / "vqa_val.jsonl"]


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("trains", "trains_train.jsonl", "trains_val.jsonl"),
        ("constrained", "constrained_train.jsonl", "constrained_val.jsonl"),
        ("train", "train_train.jsonl", "train_val.jsonl"),
        ("constrained_train.jsonl", "constrained_train.jsonl", "constrained_val.jsonl"),
        ("train-constrained.jsonl", "train-constrained.jsonl", "val-constrained.jsonl"),
        ("train2014.jsonl", "train2014.jsonl", "val2014.jsonl"),
        ("train/a.train.jsonl", "train/a.train.jsonl", "train/a.val.jsonl"),
        ("constrained.jsonl", "constrained.jsonl", None),
    ],
)
def test_only_the_word_train_in_a_name_stands_for_the_split(tmp_path, name, train, val):
    """The last such word, and never letters within another one or the name of a folder."""
    for wrong in ("vals_val", "vals_train", "consvaled_train", "consvaled_val", "consvaled", "val_val", "val_train"):
        write_task(tmp_path / f"{wrong}.jsonl", "vqa", 1)
    if val:
        write_task(tmp_path / val, "vqa", 1)
    assert expand([str(tmp_path / name)]) == ([tmp_path / train], [tmp_path / val] if val else [])


@pytest.mark.parametrize(("task", "most"), [("vqa", 2000), ("retrieval", 500)])
def test_what_is_chosen_on_is_a_sample_of_val_said_once(start, data, tmp_path, capsys, task, most):
    """Of 2,400 rows, or pictures, as many from the end of the file as from its beginning; the same for every run."""
    lines = write_task(tmp_path / "few.jsonl", task).read_text().splitlines()
    copies = 2400 // len(lines)
    for copy, number in product(range(copies), range(12)):  # pictures of their own: retrieval reads each once
        picture = tmp_path / f"pictures/{number:02d}.png"
        (tmp_path / f"pictures/{copy}-{number:02d}.png").hardlink_to(picture)
    val = write_rows(
        tmp_path / "many.jsonl",
        [line.replace("pictures/", f"pictures/{copy}-") for copy in range(copies) for line in lines],
    )
    runs = [tuned(task, start, data, tmp_path / str(n), "--val", str(val), "--seed", str(n)) for n in (0, 1)]
    said = capsys.readouterr().out
    assert said.count(f"{most} of 2400") == 2
    assert len(runs[0].val_rows) == most and runs[0].val_rows == runs[1].val_rows
    places = [int(Path(row["image"]).name.partition("-")[0]) for row in runs[0].val_rows]
    assert places == sorted(places)
    late = sum(place >= copies // 2 for place in places)
    assert abs(late / most - 0.5) < 0.1


def test_retrieval_learns_from_pictures_and_is_judged_on_them(start, data, tmp_path):
    """One row for each picture with all its captions; grounding's phrases become captions too."""
    for task, count in (("retrieval", 7), ("grounding", 2)):
        run = tuned(task, start, data, tmp_path / task, "--val", str(data[task]))
        assert len(run.rows) == 12 and max(len(row["caption"]) for row in run.rows) == count
        batch = next(run.batches())
        assert batch["images"].shape == (4, 3, 16, 24) and batch["given"].shape == (4, min(count, 5))
        assert len(batch["input_ids"]) == batch["given"].sum()


def test_without_rows_to_choose_on_no_best_step_is_claimed(start, data, tmp_path, monkeypatch, capsys):
    """--val-share 0 trains on everything."""
    given = arguments("vqa", start, data["vqa"], tmp_path, "--val-share", "0")
    assert command(monkeypatch, finetune.main, *given) == 0
    assert not (tmp_path / "best.pt").exists() and checkpoint(tmp_path)["step"] == 6
    assert "-1.0 %" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.parametrize(("task", "more"), [("vqa", ""), ("reasoning", "--freeze"), ("retrieval", "--accumulate 2")])
def test_two_processes_equal_one(start, data, tmp_path, monkeypatch, task, more):
    """Every loss of every step, the figure on val and which step is best, with rows of unequal numbers of captions or
    pictures; one process draws ITM's negatives within the halves, as the two do."""
    given = [*more.split(), "--val", str(data[task]), "--batch-size", "8", "--clip", "100"]
    together(2, tmp_path, fine_tune, arguments(task, start, data[task], tmp_path / "two", *given), tmp_path)
    run = tuned(task, start, data, tmp_path / "one", *given, "--parts", "2")
    if task == "retrieval":
        monkeypatch.setattr(test_processes, "MAMO", Retrieval)
        test_processes.draw_within_halves(run, monkeypatch)
    run.train()

    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 6
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys() >= {*run.model.loss_weights, "grad_norm"}
        for name in ours:
            close = {"rel": 1e-3} if name == "grad_norm" else {"abs": 1e-4}
            assert float(theirs[name]) == pytest.approx(float(ours[name]), **close), (name, ours["step"])
    ended = [torch.load(tmp_path / f"ended-{rank}.pt") for rank in range(2)]
    assert same(ended[0], ended[1]) and ended[0]["best"] == pytest.approx([run.best, run.best_step])
    assert best(tmp_path / "two")["step"] == run.best_step == best(tmp_path / "one")["step"]


# ------------------------------------------------------------------------------------------------------- command line


REFUSED = [
    ("vqa --data", "--data"),
    ("vqa DATA --width 32", "--width is fixed by the checkpoint"),
    ("vqa DATA --patch-size 4", "--patch-size is fixed by the checkpoint"),
    ("vqa DATA --image-size 20 24", "image_size 20 is not a multiple of patch_size 8"),
    ("vqa DATA --batch-size 100", "batch of 100 pairs is larger than the"),
    ("vqa DATA --patience -1", "patience is -1"),
    ("vqa DATA --val-share 1", "val_share is 1.0"),
    ("vqa DATA --answers 1", "answers is 1"),
    ("vqa DATA --init none.pt", "none.pt is not a file"),
    ("vqa DATA --init TEXT", "use"),
    ("vqa DATA --init OTHER", "is not a checkpoint of this project"),
    ("vqa --data EMPTY", "no rows in"),
    ("vqa --data MISSING", "missing_train.jsonl is not a file"),
    ("vqa DATA --val MISSING", "is not a file"),
    ("reasoning DATA", "found the keys"),
    ("retrieval DATA --freeze", "retrieval has no head of its own to train while the encoders stay"),
    ("grounding DATA --freeze", "grounding has no head of its own to train while the encoders stay"),
    ("reasoning --data EMPTY --compile", "batches of reasoning have no one shape to compile a step for"),
    ("singing DATA", "invalid choice: 'singing'"),
    (
        "vqa DATA --augment flip",
        "unknown augment 'flip': use one of none, photo, photo-strong, aerial, aerial-strong, drawing, boxes",
    ),
    ("vqa DATA --lr-haed 1", "unknown option --lr-haed: did you mean --lr-head?"),
]


@pytest.mark.parametrize(("line", "says"), REFUSED)
def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(start, data, tmp_path, monkeypatch, capsys, line, says):
    """Exit status 2, what was got, what was expected; no traceback and no run folder."""
    words = {"DATA": ["--data", str(data["vqa"])], "MISSING": [str(tmp_path / "missing")]}
    words["EMPTY"], words["TEXT"], words["OTHER"] = ([str(tmp_path / name)] for name in ("e.jsonl", "t.pt", "o.pt"))
    (tmp_path / "e.jsonl").write_text("\n")
    (tmp_path / "t.pt").write_text("no checkpoint at all")
    torch.save({"model": {}}, tmp_path / "o.pt")
    given = [part for word in line.split() for part in words.get(word, [word])]
    given[1:1] = ["--init", str(start), "--out", str(tmp_path / "out"), *SHORT.split()]
    assert command(monkeypatch, finetune.main, *given) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and says in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()


def test_data_must_be_given(start, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, finetune.main, "vqa", "--init", start, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert errors == "error: --data is missing: give JSONL files, such as data/scenes/vqa_train.jsonl\n"


def test_one_answer_is_no_choice(start, data, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) | {"answers": {"yes": 1.0}} for line in data["vqa"].read_text().splitlines()]
    path = write_rows(data["vqa"].with_name("yes.jsonl"), rows)
    assert command(monkeypatch, finetune.main, *arguments("vqa", start, path, tmp_path / "out")) == 2
    assert "vqa has 1 answers to choose from" in capsys.readouterr().err


def test_a_learning_rate_of_0_is_one_sentence(start, data, tmp_path, monkeypatch, capsys):
    """Who wants still encoders is told of --freeze, or gets them."""
    code = command(monkeypatch, finetune.main, *arguments("vqa", start, data["vqa"], tmp_path, "--lr", "0"))
    assert code in (0, 2) and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pictures_that_break_off_are_named_in_the_middle_of_training(start, tmp_path, monkeypatch, capsys, workers):
    """The header of the picture was fine: one sentence says which file it is, with workers too."""
    data = write_task(tmp_path / "vqa.jsonl", "vqa", 4)
    broken = tmp_path / "pictures" / "02.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    given = arguments("vqa", start, data, tmp_path / "out", "--val-share", "0", "--workers", workers)
    assert command(monkeypatch, finetune.main, *given) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert re.match(r"error: .*02\.png cannot be decoded", errors.rstrip().splitlines()[-1])


def test_boxes_that_cannot_be_cut_are_one_sentence(data, tmp_path, monkeypatch, capsys):
    """A width of 20 is fine for patches of 4, not for eighths."""
    given = arguments("reasoning", "none", data["reasoning"], tmp_path / "out", *SIZES.split(), "--patch-size", "4")
    given += ["--image-size", "16", "20", "--augment", "boxes"]
    assert command(monkeypatch, finetune.main, *given) == 2
    errors = capsys.readouterr().err
    said = "error: --augment boxes cuts pictures into eighths, their width is 20: use a multiple of 8"
    assert "Traceback" not in errors and errors.rstrip().splitlines()[-1].endswith(said)


def test_an_interrupt_saves_and_names_the_command_that_goes_on(start, data, tmp_path, capsys, monkeypatch):
    """The task belongs to the command line of a resumed run too."""
    run = tuned("vqa", start, data, tmp_path)
    monkeypatch.setattr("runtime.any_process", lambda asked: True)
    run.train()
    said = capsys.readouterr().out
    assert f"stopped at step 1 and saved; go on with: python finetune.py vqa --out {tmp_path} --resume" in said
    assert resumed("vqa", tmp_path).step == 1


def test_a_label_that_a_kept_head_does_not_know_is_one_sentence(start, data, tmp_path):
    """It would end in a worker, at whatever step its row comes up."""
    tuned("entailment", start, data, tmp_path / "first").train(stop_at=1)
    path = tmp_path / "first" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["head"]["answers"][1] = "unsure"
    torch.save(state, path)
    with pytest.raises(ValueError, match="1 labels of the training rows, 'neutral' first, are none of the 3 that"):
        tuned("entailment", path, data, tmp_path / "second")
    assert tuned("entailment", path, data, tmp_path / "third", "--new-head").model.head_config.answers[1] == "neutral"


def test_questions_whose_answers_nobody_is_told_are_answered(tmp_path, monkeypatch, capsys):
    """A test split: converted without annotations, answered, and written as VQA's own server wants it."""
    data = write_task(tmp_path / "vqa.jsonl", "vqa")
    given = ["vqa", "--init", "none", "--data", str(data), "--out", str(tmp_path / "run"), *SIZES.split()]
    run = finetune.start(*finetune.parse([*given, *SHORT.split()]))
    run.train()

    def evaluate(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        return command(monkeypatch, evaluation.main, *arguments), *capsys.readouterr()

    asked = [{"question_id": 70 + n, "image_id": n, "question": "what colour is the square"} for n in range(3)]
    (tmp_path / "asked.json").write_text(json.dumps({"questions": asked}))
    for n in range(3):
        square(n).save(tmp_path / "pictures" / f"{n}.png")
    given = ["--questions", "asked.json", "--images", "pictures", "--out", "out"]
    given = [one if one.startswith("--") else str(tmp_path / one) for one in given]
    prepare.main(["vqa-test", *given, "--split", "test", "--pattern", "{id}.png"])
    data = tmp_path / "out" / "vqa_test.jsonl"
    best = ("vqa", "--checkpoint", run.out / "best.pt", "--data", data)
    for name in ("said.json", "said.jsonl"):
        code, said, errors = evaluate(*best, "--no-answers", "--predictions", tmp_path / name)
        assert code == 0 and name in said, errors
    found = json.loads((tmp_path / "said.json").read_text())
    assert [one["question_id"] for one in found] == [70, 71, 72]
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in lines] == [one["answer"] for one in found]
    assert all(one["answer"] in run.model.head_config.answers for one in found)
    code, _, errors = evaluate(*best)
    assert code == 2 and "found the keys" in errors and '"answers"' in errors
    code, _, errors = evaluate(*best, "--no-answers")
    assert code == 2 and "give --checkpoint, and --predictions to write" in errors
