"""Where does the model look for a phrase? Grad-CAM on the fusion encoder's attention, and grounding by it.

    python eval.py explain   --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle" --out heat.png
    python eval.py grounding --checkpoint runs/demo/checkpoint.pt --data data/scenes/grounding_test.jsonl
                             --choose data/scenes/grounding_val.jsonl

The matching logit says how well a picture and a text belong together; of a checkpoint of vqa, reasoning or entailment
the logit of the answer that it gives takes that place. Attention says which patches a word looks at; the
gradient of the logit says which of these looks speak for a match. Their product, where it is positive, is the map:

    map[patch] = mean over heads, sum over the phrase's tokens, of attention * relu(d logit / d attention)

as ALBEF grounds phrases. differs: the matching logit is the difference of the head's two, of which ALBEF takes the
second alone. [CLS] stands for the whole text and is counted where the phrase is the whole text. No box is
ever trained on. Of the last block only [CLS] has a map: the logit reads nothing else there. A model that judges
statements is asked for a phrase within one, with --frame "there is a {}".
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import runtime
from data import load_image, size_of, to_tensor
from mamo import VisionLanguageModel, record_attention
from metrics import inside, patch_centres
from tasks import Classifier
from tokenizer import Tokenizer, pad

# ----------------------------------------------------------------------------------------------------------- heat maps


def middle_layer(model: VisionLanguageModel) -> int:
    """The fusion block to explain by where none was chosen: the third of six, as in ALBEF, the first of two."""
    return (model.config.fusion_depth - 1) // 2


def check_layer(model: VisionLanguageModel, layer: int) -> int:
    """A fusion block counted from 0, or from the end if negative -> counted from 0. Raises ValueError if not there."""
    depth = model.config.fusion_depth
    if not -depth <= layer < depth:
        raise ValueError(f"layer is {layer}: the fusion encoder has {depth} blocks, give {-depth} to {depth - 1}")
    return layer % depth


def phrase_rows(tokenizer: Tokenizer, text: str, phrase: str, max_tokens: int) -> tuple[list[int], list[bool]]:
    """Ids of a text, and which of them are read for the map: the phrase where it stands first, or all if it is all.

    Raises:  ValueError if the phrase is not in the text as the model reads it
    """
    ids, wanted = tokenizer.encode(text, max_tokens), tokenizer.encode(phrase)[1:-1]
    for start in range(1, len(ids) - len(wanted)):
        if wanted and ids[start : start + len(wanted)] == wanted:
            whole = len(wanted) == len(ids) - 2
            return ids, [whole or start <= place < start + len(wanted) for place in range(len(ids))]
    raise ValueError(f"the phrase {phrase!r} is not in the text {text!r} within its first {max_tokens} tokens")


def token_maps(model: VisionLanguageModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Grad-CAM of the matching logit for every token by itself.           Source: ALBEF's weakly supervised grounding

    Args:    images (b, 3, height, width)
             input_ids, attention_mask (b, l)   attention_mask: True = real token
    Returns: per fusion block (b, l, n), values of 0 or more; of the last block (b, 1, n), [CLS] alone
    Raises:  ValueError for a model without a matching head
    """
    if model.config.w_itm <= 0:  # tasks.py's models have it too
        raise ValueError("this checkpoint was trained without matching (w_itm 0): it has no logit to explain")
    fusion, length = model.student.fusion, input_ids.shape[1]
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(input_ids, attention_mask)
    with torch.enable_grad(), record_attention(*fusion.text_attention) as recorded:
        logit = model.match(image, text, attention_mask)
        attention = [maps[0] for maps in recorded]
        gradient = torch.autograd.grad(logit.sum(), attention)  # a row's logit depends on its own maps only
    maps = [
        fusion.text_to_patches(one * slope.relu(), length).mean(dim=1).detach()
        for one, slope in zip(attention, gradient, strict=True)
    ]
    if any(one.shape[-1] != model.config.num_patches for one in maps):
        raise ValueError(
            f"{type(fusion).__name__} gives maps of {[one.shape[-1] for one in maps]} places, one a block, "
            f"where a picture has {model.config.num_patches} patches: see its text_to_patches"
        )
    return maps


def heat_maps(
    model: VisionLanguageModel, images: Tensor, input_ids: Tensor, attention_mask: Tensor, rows: Tensor
) -> Tensor:
    """The maps of some tokens added up, on every fusion block; other arguments and errors as token_maps.

    Args:    rows (b, l)   True = a token whose looks count, see phrase_rows
    Returns: (fusion blocks, b, n), values of 0 or more
    """
    layers = token_maps(model, images, input_ids, attention_mask)
    return torch.stack([(maps * rows[:, : maps.shape[1], None]).sum(dim=1) for maps in layers])


@dataclass
class Phrase:
    """A picture, the text that is read beside it, and the phrase in it that is looked for."""

    image: str
    text: str
    phrase: str


def maps_of(model, tokenizer: Tokenizer, phrases: list[Phrase], device) -> Tensor:
    """Heat maps of many phrases -> (fusion blocks, phrases, n) on the CPU"""
    model.eval()
    # A model that answers reads all pictures of a batch as those of one question.
    parts, batch = [], 1 if isinstance(model, Classifier) else 50
    for start in range(0, len(phrases), batch):
        chunk = phrases[start : start + batch]
        images = torch.stack([to_tensor(one.image, model.config.image_size) for one in chunk])
        found = [phrase_rows(tokenizer, one.text, one.phrase, model.config.max_tokens) for one in chunk]
        input_ids, attention_mask = pad([ids for ids, _ in found], tokenizer.pad_id)
        rows = torch.zeros_like(attention_mask)
        for number, (_, counted) in enumerate(found):
            rows[number, : len(counted)] = torch.tensor(counted)
        batch_of = (part.to(device) for part in (images, input_ids, attention_mask, rows))
        parts.append(heat_maps(model, *batch_of).cpu())
    return torch.cat(parts, dim=1)


def hits_by_layer(model, tokenizer: Tokenizer, rows: list[dict], device, frame: str = "{}") -> list[float]:
    """The pointing game by each fusion block, in percent: is the centre of the hottest patch in a right box?"""
    maps = maps_of(model, tokenizer, phrases_of(rows, frame), device)
    right = torch.tensor(
        [inside(patch_centres(model.config.grid, *size_of(row["image"])), row["boxes"]) for row in rows]
    )
    hits = right.gather(1, maps.argmax(dim=2).T).T & (maps.amax(dim=2) > 0)  # (layers, rows); zeros point nowhere
    return [100 * one.float().mean().item() for one in hits]


def choose_layer(model, tokenizer: Tokenizer, rows: list[dict], device, frame: str = "{}", words: bool = False) -> int:
    """The fusion block that points best at the phrases of some rows, such as those of val; of equals the first.

    words: leave out the last block, where there is another, because words by themselves have no map there
    """
    layers = hits_by_layer(model, tokenizer, rows, device, frame)
    count = max(len(layers) - words, 1)
    return max(range(count), key=lambda layer: layers[layer])


def phrases_of(rows: list[dict], frame: str = "{}") -> list[Phrase]:
    """Each `grounding` row's phrase as the whole text, or within a frame such as "there is a {}"."""
    return [Phrase(row["image"], frame.replace("{}", row["text"]), row["text"]) for row in rows]


# ----------------------------------------------------------------------------------------------------------- grounding


def ground(model, tokenizer: Tokenizer, rows: list[dict], device, layer: int, frame: str = "{}") -> list[dict]:
    """Where a phrase is, by the map of one fusion block: predictions for metrics.judge_grounding.

    point      centre of the hottest patch
    proposal   the row's proposal with the largest sum of the map inside it over area ** 0.5    (ALBEF, RefCOCO+)
    box        around the connected region that holds the hottest point and is at least half as hot
    A map of zeros says nothing: all three are None.
    """
    maps, predictions = maps_of(model, tokenizer, phrases_of(rows, frame), device)[layer], []
    grid = model.config.grid
    for number, (row, heat) in enumerate(zip(rows, maps, strict=True)):
        width, height = size_of(row["image"])
        prediction = {"row": number, "point": None, "proposal": None, "box": None, "grid": list(grid)}
        if heat.any():
            fine = F.interpolate(heat.view(1, 1, *grid), size=(height, width), mode="bicubic")[0, 0].clamp(min=0)
            prediction["point"] = list(patch_centres(grid, width, height)[int(heat.argmax())])
            prediction["proposal"] = max(row.get("proposals", []), key=lambda box: warmth(fine, box), default=None)
            prediction["box"] = hot_box(fine)
        predictions.append(prediction)
    return predictions


def warmth(heat: Tensor, box: list[float]) -> float:
    """heat (height, width), box [x, y, width, height]: sum of the map in the box over the square root of its area."""
    x, y, w, h = box
    part = heat[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)]
    return part.sum().item() / (w * h) ** 0.5


def hot_box(heat: Tensor, share: float = 0.5) -> list[int]:
    """heat (height, width) -> [x, y, width, height] around what is connected to its peak and at least share as hot."""
    hot = (heat >= share * heat.max()).float()[None]
    region = torch.zeros_like(hot)
    region.view(-1)[heat.argmax()] = 1
    while True:  # grow by one pixel on all sides, within what is hot
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * hot
        if torch.equal(grown, region):
            break
        region = grown
    y, x = region[0].nonzero(as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1]


# ------------------------------------------------------------------------------------------------------------- to look


@dataclass
class Heat:
    """A heat map, and the picture that it belongs to."""

    values: Tensor  # (rows, columns) of patches, 0 or more
    picture: Image.Image

    def image(self) -> Image.Image:
        """The picture with the map laid over it: cold stays pale, hot becomes red."""
        strength = self.values / self.values.max().clamp(min=1e-12)
        mask = Image.fromarray((200 * strength).byte().numpy()).resize(self.picture.size, Image.Resampling.BICUBIC)
        pale = Image.blend(self.picture, Image.new("RGB", self.picture.size, "white"), 0.5)
        return Image.composite(Image.new("RGB", self.picture.size, (215, 25, 28)), pale, mask)

    def show(self) -> None:
        """Open it in the system's viewer."""
        self.image().show()

    def save(self, path: str | Path) -> None:
        """Write it as a PNG."""
        save_png(self.image(), Path(path))


def heats_of(model, tokenizer: Tokenizer, images: list, text: str, phrase: str, layer: int, device) -> list[Heat]:
    """The map of a phrase, or of the whole text, over each of some pictures (paths or PIL images).

    Raises:  ValueError for a map of zeros, which says nothing
    """
    pictures = [load_image(image) for image in images]
    tensors = torch.stack([to_tensor(image, model.config.image_size) for image in images]).to(device)
    ids, counted = phrase_rows(tokenizer, text, phrase, model.config.max_tokens)
    rows = torch.tensor([counted] * len(images), device=device)
    input_ids = torch.tensor([ids] * len(images), device=device)
    maps = heat_maps(model, tensors, input_ids, torch.ones_like(rows), rows)[layer].cpu()
    if not maps.any():
        raise ValueError(
            f"fusion block {layer} has no map for {phrase!r}: nothing that it looks at speaks for the answer, or it is "
            "the last block, which has a map for whole texts only; give another --layer"
        )
    heats = []
    for picture, values in zip(pictures, maps, strict=True):
        scale = 320 / min(picture.size)
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
        heats.append(Heat(values.reshape(model.config.grid), picture))
    return heats


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture as a PNG; an old one stays until the new one is whole."""
    runtime.write_beside(path, lambda temporary: image.save(temporary, format="PNG"))
