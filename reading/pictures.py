"""Pictures: opened, rotated upright and converted to RGB. Validation and training share this code.

Only raster formats are accepted, because Pillow passes PostScript, whatever the file name, to an external program.
"""

import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from reading.shards import FORMATS, picture_file


def load_image(source: str | Path | Image.Image, side: int = 0) -> Image.Image:
    """A picture, or the path of one, in any mode -> RGB, rotated according to its EXIF orientation

    Args:    side   required pixels along the longer side: a JPEG is decoded at a half, a quarter or an eighth of its
                    size if at least twice as many pixels remain; 0 = decode at full size
    Raises:  ValueError naming a file that is missing or cannot be decoded
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    try:
        with opened(source) as file:
            if side:
                file.draft(None, (2 * side, 2 * side))
            return to_rgb(file)
    except Exception as error:  # Pillow raises many kinds of exceptions for corrupt files
        raise unreadable(source, error) from error


def unreadable(path: str | Path, error: Exception) -> ValueError:
    """The error to raise for a picture that is missing or cannot be decoded."""
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path} is not a file: give the path of a picture")
    return ValueError(f"{path} cannot be decoded ({error}): replace it, or find all such pictures with --check full")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: apply the EXIF rotation, transparency on white; palette, grey, CMYK and 16-bit modes included."""
    if orientation(image) != 1:  # checked first, because exif_transpose always copies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("some of its values are not finite")
        most = values.max(initial=0)
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of a TIFF: scanners write 12
        whole = 2**bits - 1 if image.mode.startswith("I;16") else most if most > 255 else 255
        whole = 1 if image.mode == "F" and most <= 1.01 else whole  # floats in [0, 1], rounded
        image = Image.fromarray((values * (255 / whole)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def opened(path: str | Path) -> Image.Image:
    """Open a picture, reading only its header. Raises ValueError for more than MOST pixels."""
    image = Image.open(picture_file(path), formats=FORMATS)
    if image.width * image.height > MOST:
        raise ValueError(f"{image.width} x {image.height} pixels are over {MOST // 10**6} million: scale it down")
    return image


MOST = 120_000_000  # pixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at fewer than MOST


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, from 1 (upright) to 8."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1  # as in ImageOps.exif_transpose


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of load_image's result, from the header alone. Raises ValueError under the same conditions."""
    try:
        with opened(path) as file:
            turned = orientation(file) >= 5 and file.format != "TIFF"  # Pillow itself turns the size of a TIFF
            return file.size[::-1] if turned else file.size
    except Exception as error:
        raise unreadable(path, error) from error


@lru_cache(maxsize=100_000)  # rows that share a picture are not necessarily adjacent
def check_image(path: str, check: str) -> str | None:
    """An error message for an unusable picture, or None. "header" reads the first bytes, "full" decodes everything."""
    try:
        if check == "full":
            load_image(path)
        else:
            opened(path).close()
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # Pillow raises many kinds of exceptions for corrupt files
        cause = error.__cause__ or error
        return "missing" if isinstance(cause, FileNotFoundError) else f"{type(cause).__name__}: {cause}"
    return None


def check_boxes(path: str, boxes: list) -> str | None:
    """An error message for the first box that extends beyond its picture, or None."""
    width, height = size_of(path)
    for x, y, w, h in boxes:
        if x + w > width or y + h > height:
            return f"the box {[x, y, w, h]} reaches outside the picture of {width} x {height} pixels"
    return None
