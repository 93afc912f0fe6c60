"""What the notebooks stand on: no exercise passes unsolved, and a broken notebook fails. `make notebooks` runs this."""

import execute
import lab
import nbformat
import pytest

CHECK = "lab.check({number}, double, lambda f: f(3) == 6 or 'double 3')"
STUB = "def double(x): ..."
SOLUTION = "<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"
RIGHT, WRONG = "def double(x):\n    return 2 * x", "def double(x):\n    return x"


def notebook(*codes: str, solutions: int = 3) -> nbformat.NotebookNode:
    """Three exercises; codes of their solutions, the right ones where none are given."""
    cells = [nbformat.v4.new_code_cell("import lab")]
    for number in range(1, 4):
        code = codes[number - 1] if len(codes) >= number else RIGHT
        cells += [nbformat.v4.new_code_cell(STUB), nbformat.v4.new_code_cell(CHECK.format(number=number))]
        if number <= solutions:
            cells.append(nbformat.v4.new_markdown_cell(SOLUTION.format(code=code)))
    return nbformat.v4.new_notebook(cells=cells)


def faults(one: nbformat.NotebookNode) -> list[str]:
    """What the executor finds wrong."""
    executed = execute.with_solutions(one)
    execute.NotebookClient(executed, resources={"metadata": {"path": execute.FOLDER}}).execute()
    return execute.judge(executed)


def test_three_solved_exercises_pass():
    assert faults(notebook()) == []


@pytest.mark.parametrize(
    ("broken", "wanted"),
    [
        (notebook(RIGHT, WRONG), "exercise 2: not yet, double 3"),
        (notebook(RIGHT, RIGHT, "def double(x):\n    raise KeyError(x)"), "it stops with KeyError: 3"),
        (notebook(STUB), "exercise 1: not solved yet"),
        (notebook(solutions=2), "expected 3 solved exercises"),
    ],
)
def test_a_solution_that_is_wrong_or_missing_fails(broken, wanted):
    assert wanted in "; ".join(faults(broken))


def test_a_cell_that_is_solved_already_fails():
    given = notebook()
    given.cells[1].source = RIGHT
    assert "expected 'not solved yet'" in faults(given)[0]


def test_a_solution_needs_a_check_before_it():
    given = notebook()
    del given.cells[2]
    with pytest.raises(ValueError, match="without a check before it"):
        execute.with_solutions(given)


def stub(x): ...


@pytest.mark.parametrize(
    ("answer", "said"),
    [(..., "not solved yet"), (stub, "not solved yet"), (None, "not yet"), (7, "not yet"), (6, "right")],
)
def test_only_the_right_answer_is_right(answer, said, capsys):
    lab.check(1, answer, lambda given: given == 6)
    assert capsys.readouterr().out.startswith(f"exercise 1: {said}")


def test_outputs_are_stored_in_the_cells_they_belong_to(tmp_path):
    given = notebook()
    given.cells.append(nbformat.v4.new_code_cell("print('the last')"))
    executed = execute.with_solutions(given)
    execute.NotebookClient(executed, resources={"metadata": {"path": execute.FOLDER}}).execute()
    execute.store(tmp_path / "a.ipynb", given, executed)
    kept = nbformat.read(tmp_path / "a.ipynb", as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in given.cells]
    assert "not solved yet" in execute.printed(kept.cells[2]) and execute.printed(kept.cells[-1]) == "the last\n"
