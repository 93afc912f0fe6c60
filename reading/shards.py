"""Tar archives of pictures and captions in the format of img2dataset and webdataset: `key.jpg` beside `key.txt`, or
`key.json` with a "caption".

An archive is scanned once, header by header, and its pairs are written to a JSONL file beside it, ARCHIVE.tar.jsonl.
The path of a picture encodes the location of its bytes: `00000.tar#000012.jpg@1536+20480` is member 000012.jpg, 20,480
bytes from byte 1,536. Any row can be read at any time without unpacking, so shuffling, masking and resuming just work.
"""

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import runtime

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "PCX")  # of pictures
MEMBER = re.compile(r"(.*\.tar)#(.*)@(\d+)\+(\d+)", re.DOTALL)
MEMBER_ROW = re.compile(rb'\{"image": ".*?\.tar#')  # how a list of an archive begins
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def picture_file(path: str | Path) -> str | Path | io.BytesIO:
    """The argument for Pillow's open: the path itself, or the bytes of an archive member.

    Raises:  FileNotFoundError if the archive is missing
    """
    member = MEMBER.fullmatch(str(path))
    if not member:
        if not os.path.isfile(path):  # nor a pipe, which would be waited for
            raise FileNotFoundError(path)
        return path
    with open(member[1], "rb") as file:
        file.seek(int(member[3]))
        return io.BytesIO(file.read(int(member[4])))


def expand(paths: list) -> list[Path]:
    """Paths, in which patterns such as 'shards/{00000..01242}.tar' are expanded."""
    return [Path(path) for one in paths for path in spelled(str(one))]


def spelled(path: str) -> Iterator[str]:
    """All paths that a pattern expands to."""
    found = RANGE.search(path)
    if not found:
        yield path
        return
    if not 0 <= int(found[2]) - int(found[1]) < 1_000_000:
        raise ValueError(f"{path} expands to no path, or to more than a million: give a range such as {{00000..01242}}")
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from spelled(path[: found.start()] + str(number).zfill(len(found[1])) + path[found.end() :])


def as_rows(path: Path) -> Path:
    """The JSONL file of a data file: itself or, for an archive, the one with its pairs, written first if out of date.

    Raises:  ValueError for a file that is not a tar archive or contains no pair
    """
    if path.suffix in (".tgz", ".gz", ".zst", ".bz2", ".xz"):
        raise ValueError(
            f"{path} is compressed: unpack it to a JSONL file or a plain .tar, which can be read in any order"
        )
    if path.suffix != ".tar":
        return path
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give archives that are there, such as 'shards/{{00000..00009}}.tar'")
    rows = path.with_name(path.name + ".jsonl")
    made = path.stat().st_mtime_ns
    if not rows.is_file() or rows.stat().st_mtime_ns != made:  # the JSONL file carries the archive's time stamp
        if rows.is_file():
            with open(rows, "rb") as file:
                if not MEMBER_ROW.match(file.read(4096)):
                    raise ValueError(f"{rows} is not a list of {path.name}, whose place it has: rename it")
        runtime.write_beside(rows, lambda temporary: write_rows(path, temporary))
        os.utime(rows, ns=(made, made))
    return rows


def write_rows(path: Path, out: Path) -> None:
    """Write the pairs of an archive as JSONL, in the archive's order."""
    count, without = 0, 0
    with open(out, "w", encoding="utf-8") as file:
        for name, picture, caption in tqdm(samples(path), desc=f"listing {path.name}", delay=2, leave=False):
            if picture is None or not caption.strip():
                without += 1
                continue
            image = f"{path.name}#{name}@{picture.offset_data}+{picture.size}"
            file.write(json.dumps({"image": image, "caption": caption.strip()}) + "\n")
            count += 1
    if without:
        print(f"{path}: {without} of {count + without} samples lack a picture or a caption and are left out")
    if not count:
        raise ValueError(f"{path} holds no pair: expected members such as 000012.jpg beside 000012.txt or 000012.json")


def samples(path: Path) -> Iterator[tuple[str, tarfile.TarInfo | None, str]]:
    """For each key, the picture's name, the picture and the caption; the members of one key are adjacent."""
    endings, key, name, picture, caption = Image.registered_extensions(), None, "", None, ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in iter(archive.next, None):
                archive.members.clear()  # otherwise, tarfile keeps all members in memory
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                own, _, ending = base.partition(".")
                ending = ending.lower()
                if not own:  # "._000.jpg", which macOS puts beside 000.jpg
                    continue
                if (folder, own) != key:
                    if key:
                        yield name, picture, caption
                    key, name, picture, caption = (folder, own), "", None, ""
                if endings.get("." + ending) in FORMATS:
                    name, picture = member.name, member
                elif ending == "txt" or (ending == "json" and not caption):
                    with contextlib.suppress(ValueError, AttributeError, RecursionError):  # a bad one is no caption
                        text = archive.extractfile(member).read().decode("utf-8")
                        said = text if ending == "txt" else json.loads(text).get("caption")
                        caption = said if isinstance(said, str) else ""
            if key:
                yield name, picture, caption
            archive.fileobj.seek(archive.offset)
            if not (rest := archive.fileobj.read(2**20)) or any(rest):
                raise EOFError(
                    "the empty blocks that end an archive are missing, or it is several, one behind the other"
                )
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read to its end ({error}): expected a whole, plain tar archive") from error
