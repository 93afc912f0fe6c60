"""The notebooks as they are stored; that they still run is `make notebooks`."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: int(path.name.partition("_")[0]))


def cells_of(path: Path) -> list[dict]:
    """The cells of a notebook, their sources as one text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def defined_in(code: str) -> set[str]:
    """Names of the classes and functions that stand at the top level of some code."""
    return {node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


MODULES = {name for path in ROOT.glob("*.py") for name in defined_in(path.read_text(encoding="utf-8"))} - {
    "main",
    "parse",
}


def test_the_notebooks_are_numbered_and_each_leads_to_the_next():
    assert [path.name.partition("_")[0] for path in NOTEBOOKS] == [str(number) for number in range(13)]
    for path, following in pairwise(NOTEBOOKS):
        assert f"]({following.name})" in cells_of(path)[-1]["source"], f"{path.name} does not lead to {following.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_question_figures_and_three_exercises_with_folded_solutions(path):
    cells = cells_of(path)
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"].startswith("# ")
    assert "?" in "\n".join(cells[0]["source"].splitlines()[:6]), "it begins with its question"
    checks = [
        number for number, cell in enumerate(cells) if cell["cell_type"] == "code" and "lab.check(" in cell["source"]
    ]
    assert len(checks) == 3
    for number in checks:
        solution = cells[number + 1]
        assert solution["cell_type"] == "markdown" and solution["source"].startswith("<details><summary>"), number
        ast.parse(re.search(r"```python\n(.*?)```", solution["source"], re.S).group(1))
        assert cells[number]["metadata"]["jupyter"]["source_hidden"], "a check tells the answer, so it is folded"
    pictures = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran_with_exercises_unsolved(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == sorted(cell["execution_count"] for cell in code)
    outputs = [out for cell in code for out in cell["outputs"]]
    assert outputs and all(out["output_type"] != "error" for out in outputs)
    said = "".join(
        "".join(out["text"]) for out in outputs if out["output_type"] == "stream" and out["name"] == "stdout"
    )
    assert said.count("not solved yet") == 3 and ": right" not in said
    assert "weights/demo.pt" in said, "stored from the checkpoint that comes with the repository"
    assert not re.search(r"/(root|home|work|tmp|Users)/", json.dumps(outputs)), "an output names a path of one machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_that_a_module_has(path):
    defined = set()
    for cell in cells_of(path):
        if cell["cell_type"] == "code":
            source = "\n".join(line for line in cell["source"].splitlines() if not line.startswith(("%", "!")))
            defined |= defined_in(source)
    assert defined.isdisjoint(MODULES), f"it defines {defined & MODULES} anew"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_light(path):
    assert path.stat().st_size < 1_000_000
