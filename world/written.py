"""An output folder shared by several runs: each run replaces all files that it wrote there before, and nothing else.

`written.json` in this folder lists the files that each run wrote, under the name of the run. This lets a new run remove
the files of an earlier one. Other files, such as notes or data, are never deleted.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

LIST, TEMPORARY = "written.json", ".writing-"


def listed(folder: Path) -> dict[str, list[str]]:
    """A folder's list as {run: files}. Raises ValueError for a list that is damaged or points outside the folder."""
    path, runs = folder / LIST, {}
    if path.is_file():
        with suppress(ValueError, RecursionError):
            runs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(runs, dict) or not runs or not all(map(are_inside, runs.values())):
            raise ValueError(f"{path} is not a list of what was written there: mend it, or choose another --out")
    return runs


def are_inside(files) -> bool:
    """Whether a value is a list of file names that stay inside their folder."""
    names = isinstance(files, list) and all(isinstance(name, str) and name for name in files)
    return names and not any(PurePosixPath(name).is_absolute() or ".." in Path(name).parts for name in files)


@contextmanager
def replacing(folder: Path, run: str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, its files move to `folder` together, else nothing changes.

    The new files replace all files of an earlier run of the same name, and all files of any other run that wrote one of
    them. With force, they also replace unlisted files of the same names.

    Raises:  ValueError for an unlisted file of the same name without force
    """
    runs, fresh = listed(folder), not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            yield new
            names = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
            gone = {other for other, files in runs.items() if other == run or not set(files).isdisjoint(names)}
            theirs = {name for other in gone for name in runs[other]}
            for name in names:
                folders = (folder / name).is_dir() and not (folder / name).is_symlink()  # not even by force
                if name not in theirs and os.path.lexists(folder / name) and (not force or folders):
                    raise ValueError(
                        f"{folder / name} is not on its list of what was written there, {LIST}: move it away, or "
                        "choose another --out"
                    )
            others = {other: files for other, files in runs.items() if other not in gone}
            move(folder, new, old, theirs, names, others, run)
    finally:
        if fresh:
            with suppress(OSError):  # not empty
                folder.rmdir()


def move(folder: Path, new: Path, old: Path, theirs: set[str], names: list[str], others: dict, run: str) -> None:
    """Move old files out of a folder and new ones in, or undo all moves on failure. Meanwhile both are listed."""
    path, moves = folder / LIST, []
    before = path.read_bytes() if path.is_file() else None
    # The alphabetically last file leaves first and arrives last: a world without its world.json counts as incomplete.
    moves += [(folder / name, old / name) for name in sorted({*theirs, *names}, reverse=True)]
    moves += [(new / name, folder / name) for name in names]
    begun = []
    try:
        write_list(path, new.parent, others | {run: sorted({*theirs, *names})})
        for start, end in moves:
            if os.path.lexists(start):
                begun.append((start, end))
                end.parent.mkdir(parents=True, exist_ok=True)
                os.replace(start, end)
        write_list(path, new.parent, others | {run: names})
    except BaseException:  # including Ctrl-C
        for start, end in reversed(begun):
            if os.path.lexists(end):
                os.replace(end, start)
        path.write_bytes(before) if before is not None else path.unlink(missing_ok=True)
        raise
    finally:
        drop_empty(folder, {*theirs, *names})


def write_list(path: Path, temporary: Path, runs: dict[str, list[str]]) -> None:
    """Replace the list of written files atomically."""
    (temporary / LIST).write_text(json.dumps(runs, indent=0) + "\n", encoding="utf-8")
    os.replace(temporary / LIST, path)


def drop_empty(folder: Path, names: Iterable[str]) -> None:
    """Remove the parent folders of the given files if they are now empty."""
    inside = {parent for name in names for parent in PurePosixPath(name).parents if parent.parts}
    for parent in sorted(inside, key=lambda parent: -len(parent.parts)):
        with suppress(OSError):  # not empty, or does not exist
            (folder / parent).rmdir()
