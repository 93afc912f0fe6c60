"""Extract frames from video files (.mp4 and similar formats) as pictures, for tools/prepare.py.

The files are decoded by PyAV (`pip install av`), which the rest of the project does not need. Frames are evenly spaced
over the video, downscaled to a useful size, and kept on disk, so that a second run reuses them.
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from reading.videos import choose_frames

CONTAINERS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg")
SIDE = 320  # length of the longer side in pixels


def frames_of_file(path: Path, folder: Path, count: int) -> list[str]:
    """Write `count` frames of a video file to a folder as JPEGs, unless they exist -> their names, in temporal order

    Raises:  ValueError if PyAV is not installed, or if the file cannot be decoded
    """
    names = [f"{number:03d}.jpg" for number in range(count)]
    if not all((folder / name).is_file() for name in names):
        total = sum(1 for _ in decoded(path))
        if not total:
            raise ValueError(f"{path} holds no picture: is it a video?")
        folder.mkdir(parents=True, exist_ok=True)
        wanted: dict[int, list[str]] = {}
        for name, number in zip(names, choose_frames(total, count), strict=True):
            wanted.setdefault(number, []).append(name)
        for number, frame in enumerate(decoded(path)):
            if number in wanted:
                picture = frame.to_image()
                picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
                for name in wanted[number]:
                    picture.save(folder / name, quality=90)
    return names


def decoded(path: Path) -> Iterator:
    """The frames of a video file in temporal order, as PyAV objects."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video file, which PyAV reads: pip install av") from error
    try:
        with av.open(str(path)) as file:
            yield from file.decode(video=0)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded ({error}): replace it") from error
