"""Plans are run once and resumed, rows and summary are right, and equal wall-clock means equal time."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import SIZES, write_squares, write_task

import eval as evaluation
import finetune
import runtime
import train
from tools import compare
from tools.compare import Comparison, Job, Plan, flat, read_plan, steps_of, table

COMMANDS = {"train.py": train.main, "finetune.py": finetune.main, "eval.py": evaluation.main}


@pytest.fixture
def plan_file(tmp_path) -> Path:
    """Two arms, two seeds, twelve pairs of squares."""
    data = write_squares(tmp_path / "pairs.jsonl", 12)
    plan = {
        "what": "a test",
        "train": f"--data {data} {SIZES} --batch-size 4 --log-every 1 --device cpu",
        "arms": {"all": "", "no MRM": "--w-mrm 0"},
        "evaluate": f"retrieval --data {data} --k 5",
        "seeds": [0, 1],
        "steps": 4,
        "reference": "all",
        "equal": ["steps"],
        "columns": {"R@1": [f"retrieval {data}/contrast/image_to_text/R@1"], "nothing": ["none"]},
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    return path


@pytest.fixture
def runs(monkeypatch) -> list[list[str]]:
    """Commands that a comparison starts, run in this process instead of processes of their own; rates are made up."""
    started = []

    def run(command, **_):
        started.append([Path(word).name if word.endswith(".py") else word for word in command[1:]])
        monkeypatch.setattr(sys, "argv", command[1:])
        try:
            runtime.guarded(COMMANDS[Path(command[1]).name])
        except SystemExit as end:
            return SimpleNamespace(returncode=end.code or 0)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "seconds_per_step", lambda plan: dict.fromkeys(plan.arms, 0.1))
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)  # only a main thread may take signals over
    return started


def test_a_plan_is_run_once_and_its_rows_are_kept(plan_file, runs, tmp_path, capsys):
    """Two arms and two seeds are four rows; the estimate comes first; started again, nothing is left to do."""
    comparison = Comparison(read_plan(plan_file), tmp_path / "out", 1)
    comparison.run()
    said = capsys.readouterr().out
    assert "4 runs, 0 finished; about 0 minutes of training left" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["steps"], row["seed"]) for row in rows] == [
        ("all", 4, 0),
        ("no MRM", 4, 0),
        ("all", 4, 1),
        ("no MRM", 4, 1),
    ]
    for row in rows:
        folder = tmp_path / "out" / Job(row["arm"], 4, row["seed"]).folder
        result = json.loads((folder / "results.json").read_text())
        assert row.items() >= flat(result).items() and row["pairs_per_s"] > 0 and row["seconds"] > 0
        assert json.loads((folder / "config.json").read_text())["train"]["seed"] == row["seed"]
        assert json.loads((folder / "config.json").read_text())["model"]["w_mrm"] == (0 if "MRM" in row["arm"] else 1)
    assert [command[0] for command in runs] == ["train.py", "eval.py"] * 4

    runs.clear()
    again = Comparison(read_plan(plan_file), tmp_path / "out", 1)
    again.run()
    assert not runs and "4 finished; about 0" in capsys.readouterr().out and again.rows == comparison.rows


def test_a_plan_of_fine_tuning_starts_each_seed_from_its_own_checkpoint(plan_file, runs, tmp_path):
    """{seed} is the run's seed; best.pt is evaluated, by each of the commands."""
    Comparison(read_plan(plan_file), tmp_path / "pre", 1).run()
    data = write_task(tmp_path / "vqa.jsonl", "vqa")
    plan = {
        "what": "a test",
        "script": "finetune.py",
        "train": f"vqa --data {data} --batch-size 4 --log-every 1 --eval-every 1 --device cpu",
        "arms": {"tuned": f"--init {tmp_path}/pre/all-4-{{seed}}/checkpoint.pt"},
        "evaluate": [f"vqa --data {data}", f"vqa --data {data} --predictions {tmp_path}/said-{{seed}}.jsonl"],
        "seeds": [0, 1],
        "steps": 2,
        "reference": "tuned",
        "columns": {"accuracy": [f"vqa {data}/accuracy/value"]},
    }
    path = tmp_path / "vqa.json"
    path.write_text(json.dumps(plan))
    runs.clear()
    comparison = Comparison(read_plan(path), tmp_path / "out", 1)
    comparison.run()
    assert [command[0] for command in runs] == ["finetune.py", "eval.py", "eval.py"] * 2
    for seed in (0, 1):
        config = json.loads((tmp_path / "out" / f"tuned-2-{seed}" / "config.json").read_text())["train"]
        assert config["init"].endswith(f"all-4-{seed}/checkpoint.pt") and config["seed"] == seed
        assert (tmp_path / f"said-{seed}.jsonl").is_file()
    assert all("best.pt" in word for command in runs for word in command if word.endswith(".pt") and "out" in word)
    assert len(comparison.summary()["equal steps: tuned"]["accuracy"]["values"]) == 2
    with pytest.raises(ValueError, match="the script is"):
        Plan(**plan | {"script": "eval.py"})


def test_differences_to_an_arm_are_taken_seed_by_seed_with_an_interval(plan_file, runs, tmp_path, capsys):
    """Against the interval of a paired t-test, worked by hand: 4.303 standard errors either side for three seeds."""
    plan = json.loads(plan_file.read_text()) | {"against": "all", "seeds": [0, 1, 2], "rates": {"all": 2, "no MRM": 1}}
    plan_file.write_text(json.dumps(plan))
    comparison = Comparison(read_plan(plan_file), tmp_path / "out", 1)
    assert comparison.rates == plan["rates"], "given, and not measured"
    path = plan["columns"]["R@1"][0]
    for arm, values in (("all", (50.0, 70.0, 60.0)), ("no MRM", (53.0, 72.0, 67.0))):  # apart by 3, 2 and 7
        for seed, value in enumerate(values):
            comparison.rows[Job(arm, 4, seed)] = {"seed": seed, path: value}
    summary = comparison.summary()
    assert "difference" not in summary["equal steps: all"]["R@1"]
    half = 4.303 * 7**0.5 / 3**0.5
    found = summary["equal steps: no MRM"]["R@1"]["difference"]
    assert found == pytest.approx({"mean": 4, "low": 4 - half, "high": 4 + half})
    assert "difference -2.6 to +10.6" in " ".join(table(summary, ["R@1"]).split())
    del comparison.rows[Job("all", 4, 1)], comparison.rows[Job("no MRM", 4, 2)]
    assert "difference" not in comparison.summary()["equal steps: no MRM"]["R@1"], "one seed that both have"
    for wrong in ({"against": "none"}, {"rates": {"all": 1}}, {"rates": {"all": 1, "no MRM": 0}}):
        with pytest.raises(ValueError, match=r"against is|rates are"):
            Plan(**plan | wrong)


def test_the_summary_is_mean_and_standard_deviation_over_seeds(plan_file, runs, tmp_path):
    comparison = Comparison(read_plan(plan_file), tmp_path / "out", 1)
    comparison.run()
    path = comparison.plan.columns["R@1"][0]
    for seed, value in ((0, 10.0), (1, 25.0)):
        assert path in comparison.rows[Job("all", 4, seed)]
        comparison.rows[Job("all", 4, seed)][path] = value
    summary = comparison.summary()
    assert list(summary) == ["equal steps: all", "equal steps: no MRM"]
    values = [comparison.rows[Job("all", 4, seed)][path] for seed in (0, 1)]
    part = summary["equal steps: all"]
    assert part["R@1"]["mean"] == pytest.approx(sum(values) / 2) and part["R@1"]["values"] == values
    assert part["R@1"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "nothing" not in part and part["seeds"] == [0, 1] and part["seconds_per_step_to_reference"] == 1.0
    text = table(summary, list(comparison.plan.columns))
    assert f"{part['R@1']['mean']:.1f} ± {part['R@1']['std']:.1f}" in text and text.count("equal steps") == 2


def test_more_seeds_are_added_and_another_plan_is_refused(plan_file, runs, tmp_path):
    """Seeds may grow in the same folder; what changes the runs may not."""
    plan = read_plan(plan_file)
    plan.seeds = [1]
    Comparison(plan, tmp_path / "out", 1).run()
    assert len(runs) == 4
    Comparison(read_plan(plan_file), tmp_path / "out", 1).run()
    assert len(runs) == 8 and all("0" in shlex.join(command) for command in runs[4:])
    changed = read_plan(plan_file)
    changed.arms["no MRM"] = "--w-mim 0"
    with pytest.raises(ValueError, match="holds the runs of another plan"):
        Comparison(changed, tmp_path / "out", 1)


def test_a_stopped_run_goes_on_and_a_failed_one_stops_the_comparison(plan_file, runs, tmp_path, monkeypatch):
    """A run that was interrupted gives no row; the next start resumes it. An error is told with the place to look."""
    comparison = Comparison(read_plan(plan_file), tmp_path / "out", 1)
    kept = train.Run.train
    monkeypatch.setattr(train.Run, "train", lambda self, stop_at=None: kept(self, 2))
    with pytest.raises(ValueError, match=r"a run failed: all-4-0 was interrupted; what is finished is kept"):
        comparison.run()
    assert not comparison.rows
    monkeypatch.setattr(train.Run, "train", kept)
    Comparison(read_plan(plan_file), tmp_path / "out", 1).run()
    log = (tmp_path / "out" / "all-4-0" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log[1:]] == ["1", "2", "3", "4"]

    broken = read_plan(plan_file)
    broken.evaluate = "retrieval --data nowhere.jsonl"
    with pytest.raises(ValueError, match=r"a run failed: all-4-0, see .*output.txt"):
        Comparison(broken, tmp_path / "other", 1).run()


def test_equal_wall_clock_means_equal_time():
    """An arm whose step takes half as long makes twice the steps; the reference keeps its own."""
    plan = Plan("", "", {"slow": "", "fast": ""}, "", 100, "slow", equal=["steps", "wall-clock"])
    steps = steps_of(plan, {"slow": 0.4, "fast": 0.1})
    assert steps == {"steps": {"slow": 100, "fast": 100}, "wall-clock": {"slow": 100, "fast": 400}}
    plan.equal = ["wall-clock"]
    assert steps_of(plan, {"slow": 0.4, "fast": 0.3}) == {"wall-clock": {"slow": 100, "fast": 133}}


def test_a_run_that_serves_both_kinds_is_run_once(plan_file, runs, tmp_path):
    """The reference has the same steps at equal steps and at equal wall-clock."""
    plan = read_plan(plan_file)
    plan.equal, plan.seeds = ["steps", "wall-clock"], [0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "seconds_per_step.json").write_text('{"all": 0.2, "no MRM": 0.1}')
    comparison = Comparison(plan, tmp_path / "out", 1)
    assert comparison.jobs() == [Job("all", 4, 0), Job("no MRM", 4, 0), Job("no MRM", 8, 0)]
    comparison.run()
    summary = comparison.summary()
    assert len(summary) == 4 and summary["equal wall-clock: all"] == summary["equal steps: all"]
    assert summary["equal wall-clock: no MRM"]["steps"] == 8


def test_the_rate_is_measured_for_every_arm(plan_file, tmp_path, monkeypatch):
    """Once, and kept: the number of steps follows from it and must not change when the plan goes on."""
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 2)  # two side by side have one each
    plan = read_plan(plan_file)
    comparison = Comparison(plan, tmp_path / "out", 2)
    assert comparison.rates.keys() == plan.arms.keys() and min(comparison.rates.values()) > 0
    assert Comparison(plan, tmp_path / "out", 1).rates == comparison.rates


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reference": "none"}, "the reference 'none' is not among the arms"),
        ({"equal": ["luck"]}, 'give "steps", "wall-clock" or both'),
        ({"seeds": []}, "give at least one of each"),
        ({"stepz": 3}, "is not a plan"),
    ],
)
def test_a_bad_plan_is_one_sentence(plan_file, change, says):
    plan_file.write_text(json.dumps(json.loads(plan_file.read_text()) | change))
    with pytest.raises(ValueError, match=says) as error:
        read_plan(plan_file)
    assert "\n" not in str(error.value)


def test_the_plans_of_the_repository_can_be_read():
    """Their arms are options that train.py or finetune.py knows."""
    plans = sorted((compare.ROOT / "experiments").rglob("*.json"))
    assert plans
    for path in plans:
        plan = read_plan(path)
        for options in plan.arms.values():
            compare.SCRIPTS[plan.script][1](shlex.split(f"{plan.train} {options} --out none --steps {plan.steps}"))


def test_the_command_writes_table_and_summary(plan_file, runs, tmp_path, monkeypatch, capsys):
    """And says how the figures were made."""
    arguments = [str(plan_file), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["tools/compare.py", *arguments])
    compare.main()
    assert "equal steps: no MRM" in capsys.readouterr().out
    report = json.loads((tmp_path / "result.json").read_text())
    assert report.keys() >= {"what", "command", "hardware", "date", "seeds", "arms"} and len(report["arms"]) == 2


# -------------------------------------------------------------------------------------- accidents, each told, none lost


@pytest.fixture
def shell(monkeypatch, capsys):
    """Run the command in this process -> exit status, what it said, its errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tools/compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runtime.guarded(compare.main)
            sys.exit(0)
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (lambda self, job: 1 / 0, "all-4-0: ZeroDivisionError: division by zero"),
        (
            lambda self, job: (_ for _ in ()).throw(FileNotFoundError("no log.csv")),
            "all-4-0: FileNotFoundError: no log",
        ),
        (lambda self, job: sys.exit(3), "all-4-0: SystemExit: 3"),
    ],
)
def test_whatever_breaks_beside_the_runs_is_a_failure(
    plan_file, runs, shell, tmp_path, monkeypatch, breaks, says, side_by_side
):
    """It would otherwise end a thread in silence: an empty table, and exit status 0."""
    monkeypatch.setattr(Comparison, "run_one", breaks)
    code, said, errors = shell(plan_file, "--out", tmp_path / "out", "--side-by-side", side_by_side)
    assert code == 2 and f"error: a run failed: {says}" in errors and "equal steps" not in said


def test_a_run_whose_log_or_result_cannot_be_read_is_a_failure(plan_file, runs, shell, tmp_path, monkeypatch):
    """Half a results.json, for example; mended, the comparison goes on."""
    whole = evaluation.keep_result

    def half(path, *given):
        said = whole(path, *given)
        path.write_text(path.read_text()[:40])
        return said

    monkeypatch.setattr(evaluation, "keep_result", half)
    code, _, errors = shell(plan_file, "--out", tmp_path / "out")
    assert code == 2 and "a run failed: all-4-0: JSONDecodeError" in errors
    monkeypatch.setattr(evaluation, "keep_result", whole)
    (tmp_path / "out" / "all-4-0" / "results.json").unlink()
    assert shell(plan_file, "--out", tmp_path / "out")[0] == 0


def test_every_path_is_that_of_the_folder_where_the_command_was_given(plan_file, runs, shell, tmp_path, monkeypatch):
    """--out, the data and the results, in measuring, training and evaluating: nothing is written beside the program."""
    before = sorted(path.name for path in compare.ROOT.iterdir())
    plan = json.loads(plan_file.read_text().replace(f"{tmp_path}/", ""))
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"seeds": [0], "arms": {"all": ""}}))
    monkeypatch.chdir(tmp_path)
    started, run = [], compare.subprocess.run
    monkeypatch.setattr(
        compare.subprocess, "run", lambda command, **given: started.append(given) or run(command, **given)
    )
    assert shell("plan.json", "--out", "runs/out", "--results", "table.json")[0] == 0
    assert all(given.get("cwd") in (None, Path.cwd()) for given in started) and len(started) == 2
    assert (tmp_path / "runs" / "out" / "all-4-0" / "results.json").is_file() and (tmp_path / "table.json").is_file()
    assert sorted(path.name for path in compare.ROOT.iterdir()) == before


def test_the_programs_are_found_from_any_folder(tmp_path):
    """In a process of its own, which knows them by their place and not by the folder it is started in."""
    for script in (*compare.SCRIPTS, "eval.py"):
        command = [sys.executable, str(compare.ROOT / script), "--help"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).returncode == 0


@pytest.mark.parametrize("spoil", [lambda text: text[:-30], lambda text: text[:-1], lambda text: text[:80] + text])
def test_half_a_line_of_the_rows_costs_its_run_only(plan_file, runs, shell, tmp_path, capsys, spoil):
    """A machine that went down while a row was written: the others stay, and that run is evaluated again."""
    assert shell(plan_file, "--out", tmp_path / "out")[0] == 0
    path = tmp_path / "out" / "rows.jsonl"
    kept = {name: json.loads(line)[name] for line in path.read_text().splitlines()[:1] for name in ("arm", "log/itc")}
    path.write_text(spoil(path.read_text()))
    runs.clear()
    code, _, errors = shell(plan_file, "--out", tmp_path / "out")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and len(rows) == 4 and len(runs) in (0, 2)
    assert ("rows.jsonl" in errors and "is no row" in errors) == bool(runs)
    assert len({(row["arm"], row["seed"]) for row in rows}) == 4
    assert kept in [{name: row[name] for name in kept} for row in rows]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": [0, 0]}, r"seeds \[0, 0\]: give whole numbers, each once"),
        ({"seeds": [0, "0"]}, r"seeds \[0, '0'\]: give whole numbers, each once"),
        ({"seeds": [1, True]}, r"seeds \[1, True\]: give whole numbers, each once"),
        ({"arms": {"all": "", "no MRM": "", "no-mrm": "--w-mrm 0"}}, "'no MRM' and 'no-mrm' would share a folder"),
        ({"arms": {"all": "--seed 3"}}, "--seed"),
        ({"train": "--data x --out y"}, "--out"),
        ({"train": "--data x --steps=7"}, "--steps"),
    ],
)
def test_a_plan_that_would_count_a_run_twice_is_refused(plan_file, change, says):
    """Or whose options would be overruled by those that a comparison gives."""
    plan_file.write_text(json.dumps(json.loads(plan_file.read_text()) | change))
    with pytest.raises(ValueError, match=says) as error:
        read_plan(plan_file)
    assert "\n" not in str(error.value)


def test_an_arm_that_is_named_twice_is_refused(plan_file):
    """JSON itself would silently keep the last one."""
    plan_file.write_text(plan_file.read_text().replace('"no MRM": "--w-mrm 0"', '"all": "--w-mrm 0"'))
    with pytest.raises(ValueError, match="the key 'all' comes twice"):
        read_plan(plan_file)


def test_a_table_alone_trains_nothing_and_writes_nothing(plan_file, runs, shell, tmp_path, monkeypatch):
    """Of a folder without runs it says so; of one with some it shows them."""
    monkeypatch.setattr(compare, "seconds_per_step", lambda plan: pytest.fail("it trains"))
    code, _, errors = shell(plan_file, "--out", tmp_path / "out", "--table-only")
    assert code == 2 and "holds no runs" in errors and not (tmp_path / "out").exists()
    monkeypatch.setattr(compare, "seconds_per_step", lambda plan: dict.fromkeys(plan.arms, 0.1))
    Comparison(read_plan(plan_file), tmp_path / "out", 1).run()
    runs.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, said, _ = shell(plan_file, "--out", tmp_path / "out", "--table-only")
    assert code == 0 and said.count("equal steps") == 2 and not runs
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
