"""Execute the notebooks from scratch, including solutions, and fail if a cell or the check of an exercise fails.

    python notebooks/execute.py                          all of them; executed copies go to runs/notebooks
    python notebooks/execute.py notebooks/1_tour.ipynb   one
    python notebooks/execute.py --store                  and store the outputs in the notebooks, after a change

An exercise is a code cell to fill in, a cell that calls lab.check, and a markdown cell that begins with <details> and
holds the solution as a block of Python. The check is run twice: on the empty cell, where it must say "not solved yet",
and after the solution, where it must say "right".
"""

import argparse
import copy
import re
import sys
import time
from pathlib import Path

import lab
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
EXERCISES = 3


def with_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy in which each folded solution is followed by its code and by the preceding check again."""
    result, check = copy.deepcopy(notebook), None
    result.cells = []
    for cell in notebook.cells:
        result.cells.append(copy.deepcopy(cell))
        if cell.cell_type == "code" and "lab.check(" in cell.source:
            check = cell.source
        if cell.cell_type == "markdown" and cell.source.startswith("<details>"):
            code = re.search(r"```python\n(.*?)```", cell.source, re.S)
            if not code or not check:
                raise ValueError(f"a solution without a block of Python, or without a check before it: {cell.source!r}")
            for source in (code.group(1), check):
                result.cells.append(nbformat.v4.new_code_cell(source, metadata={"solution": True}))
            check = None
    return result


def printed(cell: nbformat.NotebookNode) -> str:
    """What a code cell wrote to standard output."""
    return "".join(out.text for out in cell.get("outputs", []) if out.output_type == "stream" and out.name == "stdout")


def judge(executed: nbformat.NotebookNode) -> list[str]:
    """What is wrong with the exercises of an executed notebook, as sentences."""
    checks = [cell for cell in executed.cells if cell.cell_type == "code" and "lab.check(" in cell.source]
    first = [cell for cell in checks if "solution" not in cell.metadata]
    faults = [] if len(first) == len(checks) - len(first) == EXERCISES else [f"expected {EXERCISES} solved exercises"]
    for cell in checks:
        wanted = ": right" if "solution" in cell.metadata else "not solved yet"
        if wanted not in printed(cell):
            faults.append(f"expected {wanted!r} from {cell.source.splitlines()[0]!r}, got {printed(cell)!r}")
    return faults


def store(path: Path, notebook: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> None:
    """Store the outputs of the notebook's own cells."""
    own = [cell for cell in executed.cells if "solution" not in cell.metadata]
    for cell, done in zip(notebook.cells, own, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
            cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def main() -> None:
    """Command line: execute each notebook in its own kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks (default: all)")
    parser.add_argument("--store", action="store_true", help="store the outputs in the notebooks")
    options = parser.parse_args()
    paths = options.notebooks or sorted(FOLDER.glob("*.ipynb"), key=lambda path: int(path.name.partition("_")[0]))
    begun = time.perf_counter()
    lab.start()  # draws the world, if needed, before the clock of the first notebook starts
    print(f"the built-in world: {time.perf_counter() - begun:.0f} s", flush=True)
    failed = False
    for path in map(Path.absolute, paths):
        start = time.perf_counter()
        notebook = nbformat.read(FOLDER / path.name, as_version=4)
        executed = with_solutions(notebook)
        client = NotebookClient(executed, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
        try:
            client.execute()
            faults = judge(executed)
        except CellExecutionError as error:
            faults = [str(error)]
        kept = lab.ROOT / "runs" / "notebooks" / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(executed, kept)
        print(f"{path.name}: {'; '.join(faults) or 'passed'} in {time.perf_counter() - start:.0f} s", flush=True)
        if options.store and not faults:
            store(FOLDER / path.name, notebook, executed)
        failed = failed or bool(faults)
    total = time.perf_counter() - begun
    print(f"{len(paths)} notebooks in {total:.0f} s")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
