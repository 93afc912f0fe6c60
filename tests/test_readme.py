"""The README keeps its word: commands exist with their options, paths exist, line counts and figures are right."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from eval import model_of
from finetune import FineConfig
from mamo import Config
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^(?:[^\n|]*python|torchrun [^\n]*?) \w+\.py[^\n]*$", README, re.M)
IN_CELLS = re.findall(r"`(python \w+\.py [^`]*)`", README)
RECIPES = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.sh")))
IN_RECIPES = re.findall(r"^\$(python \w+\.py [^\n]*)$", RECIPES.replace("\\\n", " "), re.M)
COMMANDS = [line for line in CALLS if "`" not in line] + IN_CELLS + IN_RECIPES


def options_of(script: str, objective: str) -> set[str]:
    """Options that a script knows: those it declares itself and, of the loops, the fields of their dataclasses."""
    declared = set(re.findall(r'"(--[a-z0-9-]+)"', (ROOT / script).read_text(encoding="utf-8")))
    own = {"train.py": TrainConfig, "finetune.py": FineConfig}
    if script in own:
        shape = model_of(objective).config_class if script == "train.py" else Config
        fields = [field.name for config in (own[script], shape) for field in dataclasses.fields(config)]
        declared |= {"--" + name.replace("_", "-") for name in fields}
    return declared


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_script_and_options_that_exist(command):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file(), f"{script} does not exist"
    given = {word for word in words[words.index(script) :] if word.startswith("--")}
    given -= {"--help"}
    objective = words[words.index("--objective") + 1] if "--objective" in words else "mamo"
    assert given <= options_of(script, objective), f"{script} does not know {given - options_of(script, objective)}"


def test_there_are_commands_to_check():
    assert len(CALLS) >= 8 and len(IN_CELLS) >= 10 and len(IN_RECIPES) >= 6


def test_line_counts_are_right():
    table = re.findall(r"^\| `([\w.]+)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in table} >= {"mamo.py", "data.py", "train.py"}
    for name, lines in table:
        actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert int(lines) == actual, f"README says that {name} has {lines} lines, it has {actual}"


def test_every_figure_file_named_exists_and_says_how_it_was_made():
    files = set(re.findall(r"`(results/[\w.-]+)`", README))
    assert files, "the README names no file of results"
    for file in files:
        content = json.loads((ROOT / file).read_text(encoding="utf-8"))
        assert {"command", "hardware", "date"} <= content.keys(), f"{file} does not say how it was made"


def test_every_figure_in_a_results_table_stands_in_the_file_it_names():
    """A table that ends in a line 'Source: `results/x.json`' holds only numbers that this file holds, rounded alike."""
    tables = re.findall(r"((?:^\|[^\n]*\n)+)\n*Source: `(results/[\w.-]+)`", README, re.M)
    assert tables, "no table of the README names its source"
    for table, file in tables:
        content = json.loads((ROOT / file).read_text(encoding="utf-8"))
        known = {f"{number:.{places}f}" for number in numbers(content) for places in (0, 1, 2, 3)}
        for line in table.splitlines()[2:]:
            for cell in line.split("|")[2:]:
                for figure in re.findall(r"\d+\.\d+|\d+", cell):
                    assert figure in known, f"{figure} in the README is not in {file}"


def numbers(value) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []
