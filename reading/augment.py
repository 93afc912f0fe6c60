"""Augmentation: random variants of a picture that preserve the truth of its caption, see train.py --augment.

Only aerial pictures are mirrored or rotated by large angles; in any other picture, this would make "left of" false.
"""

import math

import numpy as np
import torch
from einops import einsum
from PIL import Image, ImageFilter
from torch import Tensor


def photo(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """For photographs: a random crop of 50 to 100 % of the area, and brightness and contrast jittered by up to 30 %."""
    area, aspect = rng.uniform(0.5, 1.0), math.exp(rng.uniform(-0.25, 0.25))
    width = min(round(image.width * math.sqrt(area * aspect)), image.width)
    height = min(round(image.height * math.sqrt(area / aspect)), image.height)
    x, y = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    pixels = np.asarray(image.crop((x, y, x + width, y + height)), dtype=np.float32)
    contrast, brightness = rng.uniform(0.7, 1.3, size=2)
    middle = pixels.mean()
    return Image.fromarray((((pixels - middle) * contrast + middle) * brightness).clip(0, 255).astype(np.uint8))


def aerial(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """For aerial photographs, whose captions mention no directions: `photo`, then mirroring and quarter turns."""
    image, turn = photo(image, rng), rng.integers(8)
    return image if turn == 7 else image.transpose(Image.Transpose(turn))


def strong(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """After `photo` or `aerial`, to learn from few photographs: usually mix the colour channels a little, and half of
    the time blank a rectangle (Cutout, arXiv 1708.04552) with sides of an eighth to a half of the picture's.

    Args:    pixels (3, height, width), values in [-1, 1]
    """
    if rng.random() < 0.8:
        mix = torch.from_numpy(np.eye(3) + rng.normal(0, 0.08, size=(3, 3))).float()
        pixels = einsum(mix, pixels, "new old, old y x -> new y x").clamp(-1, 1)
    if rng.random() < 0.5:
        sizes = [int(rng.integers(max(side // 8, 1), max(side // 2, 2))) for side in pixels.shape[1:]]
        y, x = (rng.integers(side - size + 1) for side, size in zip(pixels.shape[1:], sizes, strict=True))
        pixels = pixels.clone()
        pixels[:, y : y + sizes[0], x : x + sizes[1]] = 0
    return pixels


def drawing(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """For drawings on white that should be recognised in another style: shifted, scaled, squeezed, rotated by up to 11
    degrees; blurred with probability 0.25, outlined with probability 0.5; colours mixed, faded or converted to grey."""
    width, height = image.size
    zoom, angle = math.exp(rng.uniform(-0.25, 0.35)), rng.uniform(-0.2, 0.2)  # the drawing shrinks if zoom > 1
    squeeze = math.exp(rng.uniform(-0.15, 0.15))
    a, b = zoom * math.cos(angle) * squeeze, zoom * math.sin(angle)
    c, d = -zoom * math.sin(angle), zoom * math.cos(angle) / squeeze
    x, y = (0.5 + rng.uniform(-0.1, 0.1, size=2)) * (width, height)  # new position of the centre
    matrix = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor="white")
    kind = rng.random()
    if kind < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0) * width / 64))
    pixels = np.asarray(image, dtype=np.float32) / 255
    if kind > 0.5:  # darken the edges
        brightness = pixels.mean(axis=2)
        edge = np.abs(np.gradient(brightness, axis=0)) + np.abs(np.gradient(brightness, axis=1))
        pixels = pixels * (1 - np.clip(edge * rng.uniform(1, 6), 0, 1))[..., None]
    mix = np.eye(3) + rng.normal(0, 0.12, size=(3, 3))
    grey = rng.uniform(0, 0.5) if rng.random() < 0.8 else 1.0
    mix = mix @ ((1 - grey) * np.eye(3) + grey / 3)
    mix /= mix.sum(axis=0, keepdims=True)  # keeps white unchanged
    pixels = 1 - (1 - pixels @ mix) * rng.uniform(0.6, 1.3)
    return Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))


def shuffle_boxes(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """For NLVR's pictures of three boxes, separated by gaps of half a box: permute the boxes randomly.

    Args:    pixels (3, height, width)
    """
    eighth, rest = divmod(pixels.shape[2], 8)
    if rest:
        raise ValueError(
            f"--augment boxes cuts pictures into eighths, their width is {pixels.shape[2]}: use a multiple of 8"
        )
    moved = pixels.clone()
    for place, box in enumerate(rng.permutation(3)):
        moved[:, :, 3 * eighth * place :][:, :, : 2 * eighth] = pixels[:, :, 3 * eighth * box :][:, :, : 2 * eighth]
    return moved
