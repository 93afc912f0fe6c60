"""Videos: an animated picture (GIF, WebP, APNG), or a list of pictures, one per frame.

A row has "video" instead of "image". When it is read, its "image" is set to a single string built by `video_of`, so all
code that identifies pictures by their paths works for videos as well. Only the requested frames are decoded and kept: a
video of 10,000 frames takes no more memory than one of ten.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from reading.pictures import check_image, load_image, opened, to_rgb

MARK = "video:"
TEXT = r'"(?:[^"\\]|\\.)*"'  # as JSON writes one
VIDEO = re.compile(rf"{MARK}\[{TEXT}(?:, {TEXT})*\]", re.DOTALL)


def video_of(files: str | Path | Sequence[str | Path], folder: str | Path = "") -> str:
    """The name of a video, built from the path of an animated picture or the ordered paths of its frames. folder: the
    folder that the paths are relative to"""
    files = [files] if isinstance(files, str | Path) else files
    return MARK + json.dumps([str(Path(folder, file)) for file in files])


def is_video(name) -> bool:
    """Whether a value is the name of a video rather than a picture or the path of one."""
    return isinstance(name, str) and VIDEO.fullmatch(name) is not None


def files_of(name: str) -> list[str]:
    """The files that a video name refers to; for a picture, its own path."""
    return json.loads(name[len(MARK) :]) if is_video(name) else [name]


@lru_cache(maxsize=100_000)
def count_frames(name: str) -> int:
    """The number of frames of a video. Raises ValueError for a file that is not a picture."""
    files = files_of(name)
    if len(files) > 1:
        return len(files)
    try:
        with opened(files[0]) as file:
            return getattr(file, "n_frames", 1)
    except Exception as error:
        raise ValueError(f"{files[0]} cannot be read as a video ({error}): replace it") from error


def choose_frames(count: int, frames: int, rng: np.random.Generator | None = None) -> list[int]:
    """The indices of `frames` out of `count` frames that represent a video: it is split into equal segments, one frame
    per segment: the middle one or, with rng, a random one. If the video has fewer frames, some are repeated.
    """
    inside = np.full(frames, 0.5) if rng is None else rng.random(frames)
    return ((np.arange(frames) + inside) * count / frames).astype(int).tolist()


def decoded(name: str, numbers: Iterable[int]) -> Iterator[Image.Image]:
    """Selected frames of a video, one at a time, converted as by load_image; numbers must be distinct and ascending.

    Raises:  ValueError naming the file and the frame that cannot be decoded
    """
    files, number = files_of(name), 0
    if len(files) > 1:
        yield from (load_image(files[number]) for number in numbers)
        return
    try:
        with opened(files[0]) as file:
            for number in numbers:
                file.seek(number)
                yield to_rgb(file)
    except Exception as error:  # Pillow raises many kinds of exceptions for corrupt files
        raise ValueError(f"frame {number} of {files[0]} cannot be decoded ({error}): replace the file") from error


def load_frames(name: str, numbers: Sequence[int]) -> list[Image.Image]:
    """Selected frames of a video, each decoded once. Raises ValueError as `decoded` does."""
    different = sorted(set(numbers))
    found = dict(zip(different, decoded(name, different), strict=True))
    return [found[number] for number in numbers]


def some_frames(name: str, frames: int) -> list[Image.Image]:
    """A deterministic selection of frames that represent a video. Raises ValueError as `decoded` does."""
    return load_frames(name, choose_frames(count_frames(name), frames))


def check_video(name: str, check: str) -> str | None:
    """An error message for a bad video, or None. "header" reads the first bytes of each file, "full" decodes all."""
    for file in files_of(name):
        if fault := check_image(file, "header"):
            return f"{file}: {fault}"
    try:
        if check == "full":
            for _ in decoded(name, range(count_frames(name))):  # without keeping the frames
                pass
    except ValueError as fault:
        return str(fault)
    return None


def shown(source, frames: int = 4, apart: bool = True) -> Image.Image:
    """A picture for display; for a video, a strip of frames from left to right. apart: leave gaps between the frames"""
    if not is_video(source):
        return load_image(source)
    pictures = some_frames(source, frames)
    height, gap = pictures[0].height, max(pictures[0].height // 32, 1) * apart
    pictures = [one.resize((min(max(one.width * height // one.height, 1), 8 * height), height)) for one in pictures]
    strip = Image.new("RGB", (sum(one.width + gap for one in pictures) - gap, height), "white")
    left = 0
    for one in pictures:
        strip.paste(one, (left, 0))
        left += one.width + gap
    return strip
