"""README.md, docs/ and CONTRIBUTING.md keep their word: commands, options, links and sources exist."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_numbers import FILE, PAGES, ROOT

from eval import COMMANDS as EVALUATIONS
from explain import How
from finetune import FineConfig
from mamo import Config
from siblings import model_of
from tasks import TASKS
from tools.benchmark import COMMANDS as MEASUREMENTS
from tools.prepare import COMMANDS as CONVERSIONS
from train import TrainConfig

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
RECIPES = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "experiments").glob("*.sh")))
SUBCOMMANDS = {"eval.py": EVALUATIONS, "tools.prepare": CONVERSIONS, "finetune.py": TASKS}
SUBCOMMANDS |= {"tools.benchmark": MEASUREMENTS}


def commands_of(text: str) -> list[str]:
    """Lines of code that run a script, and such commands between backticks."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    lines = re.findall(r"^(?:[\w./]*python|torchrun .*?) (?:\w+\.py|-m (?:tools|world)\.\w+).*$", blocks, re.M)
    return lines + re.findall(
        r"`((?:[\w./]*python|torchrun [^`]*?) (?:\w+\.py|-m (?:tools|world)\.\w+)[^`]*)`", text.replace("\n", " ")
    )


IN_PAGES = [(page, command) for page, text in TEXTS.items() for command in commands_of(text)]
IN_RECIPES = [
    ("experiments", command)
    for command in re.findall(
        r"^\$(python (?:\w+\.py|-m (?:tools|world)\.\w+) [^\n]*)$", RECIPES.replace("\\\n", " "), re.M
    )
]


def file_of(script: str) -> Path:
    """train.py, or tools.prepare of `python -m tools.prepare` -> its file"""
    return ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")


def options_of(script: str, objective: str) -> set[str]:
    """Options that a script knows: those it declares itself and, of the loops, the fields of their dataclasses."""
    declared = set(re.findall(r'"(--[a-z0-9-]+)"', file_of(script).read_text(encoding="utf-8")))
    own = {"train.py": TrainConfig, "finetune.py": FineConfig, "eval.py": How}
    if script in own:
        shape = model_of(objective).config_class if script == "train.py" else Config
        fields = [field.name for config in (own[script], shape) for field in dataclasses.fields(config)]
        declared |= {"--" + name.replace("_", "-") for name in fields}
    return declared


@pytest.mark.parametrize(("page", "command"), IN_PAGES + IN_RECIPES)
def test_every_command_names_a_script_a_subcommand_options_and_plans_that_exist(page, command):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py") or word.startswith(("tools.", "world.")))
    if script == "yours.py" or "NAME" in words or "yours" in words:
        return  # what a reader is to write
    assert file_of(script).is_file(), f"{page}: {script} does not exist"
    after = words[words.index(script) + 1 :]
    given = {word.partition("=")[0] for word in after if word.startswith("--")} - {"--help"}
    objective = after[after.index("--objective") + 1] if "--objective" in after else "mamo"
    unknown = given - options_of(script, objective)
    assert not unknown, f"{page}: {script} does not know {unknown} of: {command}"
    if script in SUBCOMMANDS and after and after[0] != "...":
        assert after[0] in SUBCOMMANDS[script], f"{page}: {script} has no {after[0]}: {command}"
    for word in after:
        if word.startswith("experiments/"):
            assert (ROOT / word).is_file(), f"{page}: {word} does not exist: {command}"


def test_there_are_commands_to_check():
    assert len(IN_PAGES) >= 60 and len(IN_RECIPES) >= 6


@pytest.mark.parametrize("page", TEXTS)
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", TEXTS[page], re.M)
    assert {one or other for one, other in named} <= targets


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_exists(page):
    """Links to files, and files of ours in backticks; runs/, data/ and my/ are what a reader makes."""
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)", TEXTS[page]):
        if not link.startswith("http"):
            assert (folder / unquote(link)).exists(), f"{page}: the link {link} leads nowhere"
    for path in re.findall(
        r"`((?:docs|experiments|results|siblings|tests|tools|world|notebooks)/[\w./-]*|[a-z]+\.py)`", TEXTS[page]
    ):
        if not path.endswith("yours.py"):
            assert (ROOT / path).exists(), f"{page}: {path} does not exist"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 201


def test_the_readme_shows_every_notebook():
    shown = re.findall(r"\((notebooks/[\w.]+)\)", README)
    assert sorted(shown) == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_every_file_of_results_is_named_and_says_how_it_was_made():
    """What papers report says its source instead."""
    named = {file for text in TEXTS.values() for file in FILE.findall(text)}
    assert named == {path.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob("*.json")}
    for file in named:
        content = json.loads((ROOT / file).read_text(encoding="utf-8"))
        made = {"source"} if Path(file).name == "paper.json" else {"command", "hardware", "date"}
        assert made <= content.keys(), f"{file} does not say how it was made"
