"""Where does the model look for a phrase? Grad-CAM on the fusion encoder's attention, and the pointing game.

    python eval.py explain  --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle" --out heat.png
    python eval.py pointing --checkpoint runs/demo/checkpoint.pt --data data/scenes/grounding_test.jsonl
                            --choose data/scenes/grounding_val.jsonl

The matching logit says how well a picture and a text belong together. Attention says which patches a word looks at; the
gradient of the logit says which of these looks speak for a match. Their product, where it is positive, is the map:

    map[patch] = mean over heads, sum over the phrase's tokens, of attention * relu(d logit / d attention)

as ALBEF grounds phrases (its fusion attends from text to patches; ours is one stream, so its rows of text and columns
of patches are taken). [CLS] stands for the whole text and is counted where the phrase is the whole text. No box is ever
trained on. Of the last block only [CLS] has a map: the logit reads nothing else there.
"""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import load_image, pad, size_of, to_tensor
from mamo import VisionLanguageModel, record_attention
from tokenizer import Tokenizer


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


def heat_maps(model: VisionLanguageModel, images: Tensor, input_ids: Tensor, real: Tensor, rows: Tensor) -> Tensor:
    """Grad-CAM of the matching logit on every fusion block.              Source: ALBEF's weakly supervised grounding

    Args:    images (b, 3, height, width)
             input_ids (b, l); real (b, l), True = real token
             rows (b, l)   True = a token whose looks count, see phrase_rows
    Returns: (fusion blocks, b, n), values of 0 or more
    Raises:  ValueError for a model without a matching head
    """
    if model.config.w_itm <= 0:
        raise ValueError("this checkpoint was trained without matching (w_itm 0): it has no logit to explain")
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(input_ids, real)
    with torch.enable_grad(), record_attention(model.student.fusion) as recorded:
        logit = model.match(image, text, real)
        attention = [maps[0] for maps in recorded]  # (b, h, queries, l + 1 + n); one query, [CLS], in the last block
        gradient = torch.autograd.grad(logit.sum(), attention)  # a row's logit depends on its own maps only
    length, layers = input_ids.shape[1], []
    for one, slope in zip(attention, gradient, strict=True):
        weighted = (one * slope.relu()).mean(dim=1)[:, :length, length + 1 :]  # (b, text rows, n), class token left out
        layers.append((weighted * rows[:, : weighted.shape[1], None]).sum(dim=1))
    return torch.stack(layers).detach()


@dataclass
class Phrase:
    """A picture, the text that is read beside it, the phrase in it that is looked for, and the boxes it names."""

    image: str
    text: str
    phrase: str
    boxes: list[list[float]]


def maps_of(model, tokenizer: Tokenizer, phrases: list[Phrase], device, batch: int = 50) -> Tensor:
    """Heat maps of many phrases -> (fusion blocks, phrases, n) on the CPU"""
    model.eval()
    parts = []
    for start in range(0, len(phrases), batch):
        chunk = phrases[start : start + batch]
        images = torch.stack([to_tensor(load_image(one.image), model.config.image_size) for one in chunk])
        found = [phrase_rows(tokenizer, one.text, one.phrase, model.config.max_tokens) for one in chunk]
        input_ids, real = pad([ids for ids, _ in found], tokenizer.pad_id)
        rows = torch.zeros_like(real)
        for number, (_, counted) in enumerate(found):
            rows[number, : len(counted)] = torch.tensor(counted)
        parts.append(heat_maps(model, images.to(device), input_ids.to(device), real.to(device), rows.to(device)).cpu())
    return torch.cat(parts, dim=1)


def patch_centres(grid: tuple[int, int], width: int, height: int) -> list[tuple[float, float]]:
    """The centre (x, y) of each patch in pixels of a picture of that size, row by row."""
    rows, columns = grid
    return [((x + 0.5) * width / columns, (y + 0.5) * height / rows) for y in range(rows) for x in range(columns)]


def inside(centres: list[tuple[float, float]], boxes: list[list[float]]) -> list[bool]:
    """Which centres lie in any of the boxes [x, y, width, height]."""
    return [any(x <= px < x + w and y <= py < y + h for x, y, w, h in boxes) for px, py in centres]


def pointing(model, tokenizer: Tokenizer, rows: list[dict], device, layer: int) -> dict:
    """The pointing game on `grounding` rows: does the centre of the hottest patch lie in a right box?

    Returns: {"n", "chance": a patch drawn at random, "ceiling": some patch has its centre in a box, "layer",
              "hits": by that fusion block, "layers": by each}, in percent. A map of zeros points nowhere: a miss
    """
    phrases = [Phrase(row["image"], row["text"], row["text"], row["boxes"]) for row in rows]
    maps = maps_of(model, tokenizer, phrases, device)
    sizes = {path: size_of(path) for path in dict.fromkeys(one.image for one in phrases)}
    right = torch.tensor([inside(patch_centres(model.config.grid, *sizes[one.image]), one.boxes) for one in phrases])
    hits = right.gather(1, maps.argmax(dim=2).T).T & (maps.amax(dim=2) > 0)  # (layers, phrases)
    layers = [100 * one.float().mean().item() for one in hits]
    return {
        "n": len(phrases),
        "chance": 100 * right.float().mean().item(),
        "ceiling": 100 * right.any(dim=1).float().mean().item(),
        "layer": layer,
        "hits": layers[layer],
        "layers": layers,
    }


def choose_layer(model, tokenizer: Tokenizer, rows: list[dict], device) -> int:
    """The fusion block that points best at the phrases of some rows, such as those of val; of equals the first."""
    layers = pointing(model, tokenizer, rows, device, 0)["layers"]
    return max(range(len(layers)), key=lambda layer: layers[layer])


def draw_heat(model, tokenizer: Tokenizer, path: str, text: str, phrase: str, layer: int, device) -> Image.Image:
    """A picture beside itself with the heat map of a phrase laid over it: cold stays pale, hot becomes red."""
    heat = maps_of(model, tokenizer, [Phrase(path, text, phrase, [])], device)[layer, 0]
    if not heat.any():
        raise ValueError(
            f"fusion block {layer} has no map for {phrase!r}: nothing that it looks at speaks for a match, or it is "
            "the last block, which has a map for whole texts only; give another --layer"
        )
    picture = load_image(path)
    scale = 320 / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    rows, columns = model.config.grid
    strength = (heat / heat.max()).reshape(rows, columns)
    mask = Image.fromarray((200 * strength).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    pale = Image.blend(picture, Image.new("RGB", size, "white"), 0.5)
    laid = Image.composite(Image.new("RGB", size, (215, 25, 28)), pale, mask)
    font = ImageFont.load_default(size=16)
    sheet = Image.new("RGB", (2 * size[0] + 36, size[1] + 56), "white")
    sheet.paste(picture, (12, 12))
    sheet.paste(laid, (size[0] + 24, 12))
    where = "" if phrase == text else f" in: {text}"
    ImageDraw.Draw(sheet).text((12, size[1] + 24), f"{phrase}{where}   (fusion block {layer})", fill="black", font=font)
    return sheet
