"""Where does the model look for a phrase? Heat maps from occlusion of the image, or from Grad-CAM on attention.

    python eval.py explain   --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle" --out heat.png
    python eval.py grounding --checkpoint runs/demo/checkpoint.pt --data data/scenes/grounding_test.jsonl

The default method, `hiding`, is occlusion in the spirit of masked modelling: mask some patches at a time, and measure
how much a score of the model drops. The score is

    for a whole text            the matching logit
    for a phrase in a text      the log-probability of its words, masked, given the rest of the text (MLM head)
    for vqa etc.                the logit of the answer predicted from the whole image

Each window of 2 x 2 patches is masked in turn, then random masks of 75 % use up the rest of the budget. A patch scores
the mean drop over the windows that mask it plus, over the random masks, the mean score where the patch is visible minus
that where it is masked, both standardised over the image. This needs no gradients and no choice of layer.

Grad-CAM (--map gradcam) is ALBEF's method for grounding: attention tells which patches a word attends to, the gradient
of the matching logit tells which of these are evidence for a match, and the positive part of their product is the map:

    map[patch] = mean over heads, sum over the phrase's tokens, of attention * relu(d logit / d attention)

differs: the matching logit is the difference between the head's two logits; ALBEF uses only the second. [CLS] is
included in the sum if the phrase is the whole text. In the last block, only [CLS] has a map, because the logit depends
on no other token there.

A video gets one map per frame: a window masks patches of one frame, a random mask masks patches of all frames. No boxes
are used in training. For a model trained on statements, wrap the phrase in one: --frame "there is a {}".
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor

import runtime
from data import is_video, load_image, size_of, some_frames, to_tensor
from mamo import View, VisionLanguageModel, frames_of, mask_patches, record_attention
from metrics import patch_centres
from siblings.masking import in_pixels
from tasks import Classifier
from tokenizer import Tokenizer, pad

MAPS, FILLS = ("hiding", "gradcam"), ("colour", "blur", "token")


@dataclass
class How:
    """The configuration of the maps. Raises ValueError for invalid or conflicting options."""

    map: str = "hiding"  # hiding or gradcam
    fill: str = "colour"  # replacement for masked patches: colour (the image's most frequent), blur or token (mask)
    passes: int = 128  # number of masked images to evaluate for a map by hiding
    layer: int | None = None  # fusion block for Grad-CAM, zero-based or negative from the end; None = the middle one

    def __post_init__(self):
        for name, allowed in (("map", MAPS), ("fill", FILLS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        if not 8 <= self.passes <= 100_000:
            raise ValueError(f"passes is {self.passes}: a map by hiding needs 8 or more, and at most 100,000")
        if self.layer is not None and self.map != "gradcam":
            raise ValueError(f"layer is {self.layer}: only --map gradcam looks at a fusion block")

    def __str__(self) -> str:
        if self.map == "hiding":
            return f"hiding {self.passes} times, by {self.fill}"
        return "Grad-CAM, " + ("the middle fusion block" if self.layer is None else f"fusion block {self.layer}")


@dataclass
class Phrase:
    """An image, a text about the image, and the phrase in the text to localise."""

    image: str
    text: str
    phrase: str


def phrase_rows(tokenizer: Tokenizer, text: str, phrase: str, max_tokens: int) -> tuple[list[int], list[bool]]:
    """The ids of a text, and a mask of the phrase's first occurrence: all ids, even [CLS], if it is the whole text.

    Raises:  ValueError if the text, as truncated to max_tokens, does not contain the phrase
    """
    ids = tokenizer.encode(text, max_tokens)
    wanted = tokenizer.encode(phrase, max_tokens if phrase == text else None)[1:-1]  # of a whole text, what is read
    for start in range(1, len(ids) - len(wanted)):
        if wanted and ids[start : start + len(wanted)] == wanted:
            whole = len(wanted) == len(ids) - 2
            return ids, [whole or start <= place < start + len(wanted) for place in range(len(ids))]
    raise ValueError(f"the phrase {phrase!r} is not in the text {text!r} within its first {max_tokens} tokens")


def maps_of(model, tokenizer: Tokenizer, phrases: list[Phrase], device, how: How) -> Tensor:
    """Heat maps of many phrases -> (phrases, n), or (phrases, f * n) for videos, on the CPU, values >= 0"""
    model.eval()
    if how.map == "gradcam":
        return gradcam_maps(model, tokenizer, phrases, device)[check_layer(model, how.layer)]
    maps = []
    for image, those in itertools.groupby(phrases, key=lambda one: one.image):  # mask an image once for all its phrases
        views, masks = hidden_views(model, pixels_of(image, model.config).to(device), how)
        for one in those:
            rows = phrase_rows(tokenizer, one.text, one.phrase, model.config.max_tokens)
            maps.append(hiding_map(watched(model, [views], *rows), masks).cpu())
    return torch.stack(maps)


def pixels_of(image, config) -> Tensor:
    """An image -> (3, height, width); a video -> (f, 3, height, width); preprocessed for the model"""
    return to_tensor(image, config.image_size, config.frames)


# ------------------------------------------------------------------------------------------------- maps by occlusion


def hiding_masks(grid: tuple[int, int], passes: int, frames: int = 1) -> tuple[Tensor, Tensor]:
    """The masks of all passes -> windows (w, n) and random masks (r, n), True = masked, w + r = passes; for a video,
    (w, f * n) and (r, f * n).

    Windows of 2 x 2 patches at every position or, if that takes more than half of the passes, fewer and larger windows.
    """
    (rows, columns), step = grid, 0
    while True:
        step += 1
        high, wide = min(step + 1, rows), min(step + 1, columns)
        tops = sorted({min(y, rows - high) for y in range(0, rows, step)})
        lefts = sorted({min(x, columns - wide) for x in range(0, columns, step)})
        if frames * len(tops) * len(lefts) <= max(passes // 2, 1) or (high, wide) == grid:
            break
    places = list(itertools.product(range(frames), tops, lefts))
    windows = torch.zeros(len(places), frames, rows, columns, dtype=torch.bool)
    for window, (frame, y, x) in zip(windows, places, strict=True):
        window[frame, y : y + high, x : x + wide] = True
    randoms = max(passes - len(windows), 1)
    noise = torch.rand(randoms, frames * rows * columns, generator=torch.Generator().manual_seed(0))
    return windows.flatten(1), mask_patches(noise, 0.75)[1]


@torch.no_grad()
def hidden_views(model: VisionLanguageModel, image: Tensor, how: How) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """image (3, height, width), or a video (f, 3, height, width) -> encoded views (1 + passes, 1 + n, d), the unmasked
    one first, and the masks of hiding_masks"""
    config, frames = model.config, frames_of(image[None])
    masks = hiding_masks(config.grid, how.passes, frames)
    hidden, encoded = torch.cat([torch.zeros_like(masks[0][:1]), *masks]).to(image.device), []
    filled = None
    if how.fill != "token":
        parts = [filling(one, how.fill, config.patch_size) for one in image.view(-1, *image.shape[-3:])]
        filled = torch.stack(parts).view_as(image)
    for some in hidden.split(max(2**15 // (frames + hidden.shape[1]), 1)):  # in chunks, to bound memory
        if filled is None:
            encoded.append(model.encode_masked(image.expand(len(some), *image.shape), some))
        else:
            pixels = in_pixels(some, image[None], config.patch_size)
            encoded.append(model.encode_image(torch.where(pixels, filled, image)))
    return torch.cat(encoded), masks


def filling(image: Tensor, fill: str, patch_size: int) -> Tensor:
    """image (3, height, width) -> the replacement for its masked patches, of the same shape"""
    if fill == "blur":
        for _ in range(2):
            image = F.avg_pool2d(image[None], 2 * patch_size + 1, 1, patch_size, count_include_pad=False)[0]
        return image
    colours = rearrange(image, "c y x -> (y x) c")
    _, kind, count = (colours * 8).round().unique(dim=0, return_inverse=True, return_counts=True)
    return colours[kind == count.argmax()].mean(dim=0)[:, None, None].expand_as(image)


@torch.no_grad()
def watched(model: VisionLanguageModel, pictures: list[Tensor], ids: list[int], counted: list[bool]) -> Tensor:
    """The score of each of k masked views -> (k,), see the module docstring.

    Args:    pictures        encoded images of one row, each (k, 1 + n, d), or (1, 1 + n, d) if never masked
             ids, counted    see phrase_rows
    Raises:  ValueError for a model without the head that the score requires
    """
    k, device = max(map(len, pictures)), pictures[0].device
    input_ids, chosen = torch.tensor([ids], device=device), torch.tensor(counted, device=device).nonzero().T
    inside = not all(counted) and not isinstance(model, Classifier)
    if inside:
        input_ids = input_ids.scatter(1, chosen, model.config.mask_id)
    real = torch.ones_like(input_ids, dtype=torch.bool)
    text = model.encode_text(input_ids, real).expand(k, -1, -1)
    image, real, found = torch.stack([one.expand(k, -1, -1) for one in pictures], dim=1), real.expand(k, -1), []
    for some in torch.arange(k, device=device).split(max(2**15 // (image.shape[2] + len(ids)), 1)):
        if isinstance(model, Classifier):
            shown = (torch.arange(model.pictures, device=device) < len(pictures)).expand(len(some), -1)
            found.append(model.decide(image[some].flatten(0, 1), shown, text[some], real[some]))
        elif inside:
            if model.config.w_mlm <= 0:
                raise ValueError(
                    "this checkpoint was trained without words to recover (w_mlm 0): look for a whole text, not for a "
                    "phrase within one, or use --map gradcam"
                )
            view = View(image[some, 0], text[some], real[some], chosen.expand(len(some), -1))
            words = model.word_logits(model.fuse_views({"words": view})["words"]).log_softmax(dim=-1)
            labels = repeat(torch.tensor(ids, device=device)[chosen[0]], "m -> b m 1", b=len(some))
            found.append(words.gather(2, labels).sum(dim=(1, 2)))
        else:
            require_matching(model)
            found.append(model.match(image[some, 0], text[some], real[some]))
    found = torch.cat(found)
    return found[:, found[0].argmax()] if isinstance(model, Classifier) else found


def hiding_map(watched: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
    """watched (1 + passes,): scores, the unmasked image's first; masks (w, n), (r, n) -> map (n,), values >= 0"""
    windows, randoms = (mask.to(watched).double() for mask in masks)
    whole, by_window, by_random = watched.double().split([1, len(windows), len(randoms)])
    lost = (whole - by_window) @ windows / windows.sum(dim=0)
    seen = by_random @ (1 - randoms) / (1 - randoms).sum(dim=0).clamp(min=1)
    hidden = by_random @ randoms / randoms.sum(dim=0).clamp(min=1)
    return (standardised(lost) + standardised(seen - hidden)).clamp(min=0).float()


def standardised(values: Tensor) -> Tensor:
    """values (n,) -> (n,), with mean 0 and standard deviation 1; zeros if all values are equal"""
    away = values - values.mean()
    return away / away.square().mean().sqrt().clamp(min=1e-9)


# ----------------------------------------------------------------------------------------------------------- Grad-CAM


def require_matching(model: VisionLanguageModel) -> None:
    """Raise ValueError for a model trained without matching; classifiers from tasks.py provide another logit."""
    if model.config.w_itm <= 0:
        raise ValueError("this checkpoint was trained without matching (w_itm 0): it has no logit to explain")


def check_layer(model: VisionLanguageModel, layer: int | None) -> int:
    """A fusion block's index, possibly negative -> its zero-based index; None = the middle one: the third of six, as in
    ALBEF, or the first of two. Raises ValueError if the index is out of range."""
    depth = model.config.fusion_depth
    if layer is None:
        return (depth - 1) // 2
    if not -depth <= layer < depth:
        raise ValueError(f"layer is {layer}: the fusion encoder has {depth} blocks, give {-depth} to {depth - 1}")
    return layer % depth


def token_maps(model: VisionLanguageModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Grad-CAM of the matching logit, for each token separately.          Source: ALBEF's weakly supervised grounding

    Args:    images (b, 3, height, width), or videos (b, f, 3, height, width)
             input_ids, attention_mask (b, l)   attention_mask: True = real token
    Returns: per fusion block (b, l, n), values >= 0; for the last block (b, 1, n), [CLS] only
    Raises:  ValueError for a model trained without matching
    """
    require_matching(model)
    fusion, length, frames = model.student.fusion, input_ids.shape[1], frames_of(images)
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(input_ids, attention_mask)
    with torch.enable_grad(), record_attention(*fusion.text_attention) as recorded:
        logit = model.match(image, text, attention_mask)
        attention = [maps[0] for maps in recorded]
        gradient = torch.autograd.grad(logit.sum(), attention)  # the logit of a sample depends only on its own maps
    maps = [  # without the class tokens of a video's other frames
        fusion.text_to_patches(one * slope.relu(), length).mean(dim=1).detach()[..., frames - 1 :]
        for one, slope in zip(attention, gradient, strict=True)
    ]
    if any(one.shape[-1] != frames * model.config.num_patches for one in maps):
        raise ValueError(
            f"{type(fusion).__name__} gives maps of {[one.shape[-1] for one in maps]} places, one per block, "
            f"where a picture has {model.config.num_patches} patches: see its text_to_patches"
        )
    return maps


def heat_maps(
    model: VisionLanguageModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor, rows: Tensor
) -> Tensor:
    """The sum of the maps of selected tokens, per fusion block; other arguments and errors as in token_maps.

    Args:    rows (b, l)   True = a token to include, see phrase_rows
    Returns: (fusion blocks, b, n), values >= 0
    """
    layers = token_maps(model, images, input_ids, attention_mask)
    return torch.stack([(maps * rows[:, : maps.shape[1], None]).sum(dim=1) for maps in layers])


def gradcam_maps(model, tokenizer: Tokenizer, phrases: list[Phrase], device) -> Tensor:
    """Grad-CAM of many phrases -> (fusion blocks, phrases, n) on the CPU"""
    # A classifier treats all images in a batch as parts of one question.
    parts, batch = [], 1 if isinstance(model, Classifier) else 50
    for start in range(0, len(phrases), batch):
        chunk = phrases[start : start + batch]
        images = torch.stack([pixels_of(one.image, model.config) for one in chunk])
        found = [phrase_rows(tokenizer, one.text, one.phrase, model.config.max_tokens) for one in chunk]
        input_ids, attention_mask = pad([ids for ids, _ in found], tokenizer.pad_id)
        rows, _ = pad([counted for _, counted in found], False)
        batch_of = (part.to(device) for part in (images, input_ids, attention_mask, rows))
        parts.append(heat_maps(model, *batch_of).cpu())
    return torch.cat(parts, dim=1)


def phrases_of(rows: list[dict], frame: str = "{}") -> list[Phrase]:
    """The phrase of each `grounding` row, as the whole text or inside a frame such as "there is a {}"."""
    return [Phrase(row["image"], frame.replace("{}", row["text"]), row["text"]) for row in rows]


# ----------------------------------------------------------------------------------------------------------- grounding


def ground(model, tokenizer: Tokenizer, rows: list[dict], device, how: How, frame: str = "{}") -> list[dict]:
    """Localise the phrase of each row by its heat map -> predictions for metrics.judge_grounding.

    point      centre of the patch with the maximum value
    proposal   the row's proposal with the largest sum of the map inside it over area ** 0.5    (ALBEF, RefCOCO+)
    box        bounding box of the connected region around the peak where the map is at least half the maximum
    If the map is all zeros, point, proposal and box are None.
    """
    maps, predictions, grid = maps_of(model, tokenizer, phrases_of(rows, frame), device, how), [], model.config.grid
    for number, (row, heat) in enumerate(zip(rows, maps, strict=True)):
        width, height = size_of(row["image"])
        prediction = {"row": number, "point": None, "proposal": None, "box": None, "grid": list(grid)}
        if heat.any():
            # One cell per pixel, but at most 512 per side, to bound the cost of huge images.
            cells = min(height, 512), min(width, 512)
            fine = F.interpolate(heat.view(1, 1, *grid), size=cells, mode="bicubic")[0, 0].clamp(min=0)
            y, x = cells[0] / height, cells[1] / width
            sums = [warmth(fine, [box[0] * x, box[1] * y, box[2] * x, box[3] * y]) for box in row.get("proposals", [])]
            left, top, wide, high = hot_box(fine)
            prediction["point"] = list(patch_centres(grid, width, height)[int(heat.argmax())])
            prediction["proposal"] = row["proposals"][sums.index(max(sums))] if sums else None
            prediction["box"] = [left / x, top / y, wide / x, high / y]
        predictions.append(prediction)
    return predictions


def warmth(heat: Tensor, box: list[float]) -> float:
    """heat (height, width), box [x, y, width, height] -> sum of the map in the box over the square root of its area"""
    x, y, w, h = box
    part = heat[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)]
    return part.sum().item() / (w * h) ** 0.5


def hot_box(heat: Tensor, share: float = 0.5) -> list[int]:
    """heat (height, width) -> [x, y, width, height] of the connected region around the peak with heat >= share * max"""
    hot = (heat >= share * heat.max()).float()[None]
    region = torch.zeros_like(hot)
    region.view(-1)[heat.argmax()] = 1
    while True:  # dilate by one pixel within the hot area
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * hot
        if torch.equal(grown, region):
            break
        region = grown
    y, x = region[0].nonzero(as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1]


# ------------------------------------------------------------------------------------------------------- visualisation


LARGEST_MARK = 0.85  # side length of the square on the hottest patch, as a fraction of the patch


@dataclass
class Heat:
    """A heat map and the image that it belongs to."""

    values: Tensor  # (rows, columns) of patches, >= 0
    picture: Image.Image
    hottest: float  # the value drawn as the largest square: the maximum over the image, or over all frames of a video

    def image(self) -> Image.Image:
        """The image with a square centred on each patch, its area proportional to the patch's value. The squares are
        readable on any image, keep the image visible, and suggest no finer resolution than the map has."""
        marks, (rows, columns) = Image.new("RGBA", self.picture.size), self.values.shape
        pen, width, height = ImageDraw.Draw(marks), self.picture.width / columns, self.picture.height / rows
        for (row, column), value in np.ndenumerate(self.values.numpy()):
            half = LARGEST_MARK / 2 * math.sqrt(max(value, 0) / max(self.hottest, 1e-12))
            x, y, across, down = (column + 0.5) * width, (row + 0.5) * height, half * width, half * height
            if min(across, down) >= 1:  # pixels
                pen.rectangle((x - across - 1, y - down - 1, x + across + 1, y + down + 1), outline="black")
                pen.rectangle((x - across, y - down, x + across, y + down), fill=(255, 96, 0, 110), outline="white")
        return Image.alpha_composite(self.picture.convert("RGBA"), marks).convert("RGB")

    def show(self) -> None:
        """Open the image in the system's viewer."""
        self.image().show()

    def save(self, path: str | Path) -> None:
        """Save the image as a PNG."""
        save_png(self.image(), Path(path))


def heats_of(model, tokenizer: Tokenizer, images: list, text: str, phrase: str, how: How, device) -> list[Heat]:
    """The heat maps of a phrase, or of the whole text, for each image (path or PIL image), or for each frame of a video
    that the model sees.

    For a classifier, all images belong to one question; otherwise, each image is processed independently.

    Raises:  ValueError if a map is all zeros
    """
    config, heats = model.config, []
    tensors = torch.stack([pixels_of(image, config) for image in images]).to(device)
    ids, counted = phrase_rows(tokenizer, text, phrase, config.max_tokens)
    if how.map == "gradcam":
        rows = torch.tensor([counted] * len(images), device=device)
        input_ids = torch.tensor([ids] * len(images), device=device)
        maps = heat_maps(model, tensors, input_ids, torch.ones_like(rows), rows)[check_layer(model, how.layer)].cpu()
    else:
        model.eval()
        views, masks = zip(*(hidden_views(model, one, how) for one in tensors), strict=True)
        together = isinstance(model, Classifier)
        maps = []
        for number, own in enumerate(views):
            beside = [own if other is own else other[:1] for other in views] if together else [own]
            maps.append(hiding_map(watched(model, beside, ids, counted), masks[number]).cpu())
    for image, values in zip(images, maps, strict=True):
        if not values.any():
            raise ValueError(
                f"there is no map for {phrase!r}: nothing in the picture speaks for the answer, or it is Grad-CAM of "
                "the last block, which has a map for whole texts only"
            )
        pictures = some_frames(image, config.frames) if is_video(image) else [load_image(image)]
        hottest = values.max()
        for picture, part in zip(pictures, values.view(len(pictures), *config.grid), strict=True):
            scale = min(320 / min(picture.size), 1280 / max(picture.size))
            size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
            picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
            heats.append(Heat(part, picture, hottest.item()))
    return heats


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG, atomically."""
    runtime.write_beside(path, lambda temporary: image.save(temporary, format="PNG"))
