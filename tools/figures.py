"""Draw the figures of docs/: MAMO's architecture, the passes of each objective, attention in videos, the trial.

    python -m tools.figures --out docs

The passes are traced, not drawn by hand. A model of the preset nano runs one step on a picture and a caption of the
built-in world, which shows the input of each encoder and what is masked in it. The step is then repeated once per pass,
with the output of that pass corrupted: the losses that change are those that read this output.
"""

import argparse
import functools
import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import runtime
from data import make_batch
from mamo import PRESETS, FusionEncoder, ImageEncoder, MAMOConfig, TextEncoder, View, by_frame, patchify, require
from siblings import OBJECTIVES
from tokenizer import Tokenizer
from tools.compare import difference
from world.shapes import COLOURS, Scene, place, render

# The pair whose step is traced, and another pair that supplies a negative picture and caption for matching.
CAPTIONS = ("a red circle above a blue cross", "a yellow square")
SCENES = (
    Scene(238, (place("red", "circle", "medium", 13, (11, 8)), place("blue", "cross", "medium", 13, (11, 24)))),
    Scene(238, (place("yellow", "square", "medium", 15, (16, 16)),)),
)
ROOT = Path(__file__).resolve().parent.parent
PATCHES = 16  # per picture in the preset nano, in four rows
WIDTH = 1120
INK, QUIET, LINE, PAPER = "#1c1c1c", "#5c5f66", "#9aa0a8", "#ffffff"
STUDENT, TEACHER, MASKED, TOKEN = "#eef4fa", "#f3f1ec", "#4a5a78", "#f7f7f4"
ON_COLOUR = "#fffffe"  # text on a coloured background, also in dark mode
DARK = {  # replacement colours for dark mode
    INK: "#e8e5de",
    QUIET: "#b3b5ba",
    LINE: "#4a4f57",
    PAPER: "#171a1f",
    STUDENT: "#1d2733",
    TEACHER: "#27251f",
    TOKEN: "#2b2f35",
    "#b8cde2": "#38506a",
    "#cfc8b8": "#5a5343",
    "#c4c4be": "#565b63",
    "#f1f2f4": "#2b2f35",
}
FILLS = {"token": MASKED, "blank": "#7f7f7f", "drop": PAPER}
# For each loss: a colour that is safe for colour-blind readers, the target, the distance.
LOSSES = {
    "itc": ("#a64d86", "class token of I, [CLS] of T: own partner in the batch", "cross-entropy"),
    "itm": ("#6a4c00", "right or wrong, for one right pair and two wrong", "cross-entropy"),
    "mlm": ("#00795a", "the masked words", "cross-entropy"),
    "mrm": ("#0072b2", "the teacher's fused vectors of (I, T)", "squared distance"),
    "mim": ("#b35900", "the teacher's features of I", "absolute distance"),
    "maskvlm mim": ("#b35900", "the raw pixels, by a decoder that reads the text", "absolute distance"),
    "mgsc": ("#0072b2", "class token of (I, T'), [CLS] of (I', T), detached", "contrast with the batch"),
    "mltc": ("#b35900", "patches of (I, T'), words of (I', T), detached", "contrast with all masked tokens"),
    "rmim": ("#0072b2", "normalised pixels, by a decoder that reads the text", "squared distance"),
    "ifr": ("#b35900", "before fusion, the teacher's image features", "smooth absolute distance"),
}
PARTS = {"teacher": "teacher: image encoder", "decoder.stream": "decoder of pixels"}  # or: student: image encoder
HOW = {"token": "mask token", "blank": "blanked", "drop": "dropped"}

# ----------------------------------------------------------------------------------------------------- a traced step


class Side(NamedTuple):
    """A picture or a text as an encoder receives it."""

    how: str  # "whole"; "token", "blank" or "drop" for patches, "mask" for words; "fused" after fusion
    masked: tuple[int, ...] = ()  # masked patches or words, numbered from the first one after [CLS]
    other: bool = False  # whether it belongs to the other pair


class Pass(NamedTuple):
    """A batch of rows that passes through an encoder."""

    part: str  # the encoder's name in the model, such as student.fusion
    call: int  # number of the call within the step; several passes may share a call
    image: Side | None
    text: Side | None


class Trace:
    """A step of an objective: its passes, and the parts of them that each loss reads."""

    def __init__(self, objective: str, seed: int = 100, **changes):
        """changes: fields of the Config"""
        model, fields = OBJECTIVES[objective]
        tokenizer = Tokenizer.build(CAPTIONS, min_count=1)
        ids = {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids, "vocab_size": len(tokenizer)}
        torch.manual_seed(seed)
        self.model = model(model.config_class(**fields | changes | ids))
        pictures = [Image.fromarray(render(scene, 32)) for scene in SCENES]
        self.batch = make_batch(pictures, list(CAPTIONS), self.model.config, tokenizer, seed)
        self.batch["replace_noise"] *= 0  # replace every masked word by [MASK], none by a random word
        self.length = self.batch["input_ids"].shape[1]
        self.passes: list[Pass] = []
        self.given: list[tuple[Side, Side, Tensor]] = []  # encoder outputs, used to recognise the inputs of fusion
        self.parts = []
        fusions = FusionEncoder, type(self.model.student.fusion)
        for name, part in self.model.named_modules():
            for kind, watch in ((ImageEncoder, self.image), (TextEncoder, self.text), (fusions, self.fusion)):
                if isinstance(part, kind):
                    self.parts.append(name)
                    method = "fuse_views" if kind is fusions else "forward"
                    setattr(part, method, functools.partial(watch, name, getattr(part, method)))
        self.tracing, self.spoiled = True, (-1, "")
        losses = self.step()
        self.tracing, self.losses = False, list(losses)
        self.reads = [{} for _ in self.passes]  # per pass, by loss: output positions that the loss reads
        for number, one in enumerate(self.passes):
            for places in ("[CLS]", "words", "class token", "patches") if one.image and one.text else ("",):
                self.spoiled = number, places
                for loss, value in self.step().items():
                    if abs(value - losses[loss]) > 1e-6:
                        self.reads[number].setdefault(loss, []).append(places)

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """The losses of the step."""
        self.calls = self.count = 0
        return {name: loss.item() for name, loss in self.model(self.batch).items()}

    def image(self, part: str, forward, images: Tensor, patch_mask=None, kept=None) -> Tensor:
        """Replaces the forward method of an image encoder, to record its passes."""
        sides = []
        for number, pixels in enumerate(patchify(images, 8)):
            changed = (pixels != patchify(self.batch["images"], 8)[number % 2]).any(dim=-1)
            how = "blank" if changed.any() else "whole"
            if patch_mask is not None and patch_mask[number].any():
                how, changed = "token", patch_mask[number]
            if kept is not None:
                how, changed = "drop", torch.ones(PATCHES).index_fill(0, kept[number], 0)
            sides.append(Side(how, tuple(changed.nonzero().flatten().tolist()), number % 2 == 1))
        return self.encoded(part, "image", sides, forward(images, patch_mask, kept))

    def text(self, part: str, forward, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Replaces the forward method of a text encoder, to record its passes."""
        sides = []
        for number, ids in enumerate(input_ids):
            masked = (ids != self.batch["input_ids"][number % 2]).nonzero().flatten() - 1
            sides.append(Side("mask" if len(masked) else "whole", tuple(masked.tolist()), number % 2 == 1))
        return self.encoded(part, "text", sides, forward(input_ids, attention_mask))

    def encoded(self, part: str, modality: str, sides: list[Side], vectors: Tensor) -> Tensor:
        """Record the passes of one encoder call, each of two pairs."""
        self.calls += 1
        views = list(zip(sides[::2], sides[1::2], vectors.split(2), strict=True))
        if self.tracing:
            self.given += views
        return torch.cat([self.passed(part, view, **{modality: side}) for side, _, view in views])

    def fusion(self, part: str, fuse_views, *views: View) -> list[Tensor]:
        """Replaces the fuse_views method of a fusion encoder, to record its passes."""
        self.calls += 1
        return [
            self.passed(part, fused, self.side(view.image), self.side(view.text), view.places)
            for view, fused in zip(views, fuse_views(*views), strict=True)
        ]

    def side(self, vectors: Tensor) -> Side:
        """The input that led to these vectors. Two pairs in swapped order are each other's negatives."""
        for side, other, given in self.given if self.tracing else ():
            for found, rows in ((side, given), (other, given.flip(0))):
                if rows.shape == vectors.shape and rows.equal(vectors):
                    return found
        return Side("fused")

    def passed(self, part: str, vectors: Tensor, image=None, text=None, places: Tensor | None = None) -> Tensor:
        """Record a pass; if it is the pass to corrupt, negate the vectors at the selected positions."""
        number, self.count = self.count, self.count + 1
        if self.tracing:
            self.passes.append(Pass(part, self.calls, image, text))
        if number != self.spoiled[0]:
            return vectors
        if not self.spoiled[1]:
            return vectors.flip(-1)
        if places is None:
            places = torch.arange(vectors.shape[1]).expand(vectors.shape[:2])
        of_image = self.model.student.fusion.at_patches(torch.arange(-1, PATCHES), self.length)
        kinds = {"[CLS]": places == 0, "words": (places > 0) & ~torch.isin(places, of_image)}
        kinds |= {"class token": places == of_image[0], "patches": torch.isin(places, of_image[1:])}
        return torch.where(kinds[self.spoiled[1]][..., None], vectors.flip(-1), vectors)

    def names(self, modality: str) -> dict[Side, str]:
        """I, T: whole. I', I'': masked, most first. I_vis: masked, if never seen whole. I⁻, T⁻: negatives."""
        letter, seen = modality[0].upper(), {getattr(one, modality) for one in self.passes} - {None, Side("fused")}
        masked = sorted((-len(side.masked), side) for side in seen if side.masked and not side.other)
        names = {Side("whole"): letter} | {side: letter + "'" * (1 + rank) for rank, (_, side) in enumerate(masked)}
        if modality == "image" and self.passes[0].image in names.keys() - {Side("whole")}:
            names[self.passes[0].image] = letter = "I_vis"
        return names | {side: letter + "⁻" for side in seen if side.other}

    def name(self, one: Pass) -> str:
        """The name of a pass: I, T, (I', T) and so on."""
        if Side("fused") in one:
            return "what was fused"
        sides = [self.names(kind)[side] for kind, side in zip(("image", "text"), one[2:], strict=True) if side]
        return f"({', '.join(sides)})" if len(sides) == 2 else sides[0]


@functools.cache
def traced(objective: str) -> Trace:
    """The traced step of an objective."""
    return Trace(objective)


# ------------------------------------------------------------------------------------------------------------ drawing


class Drawing:
    """The elements of an SVG with its own background, light or dark like the page that embeds it."""

    def __init__(self, height: int, title: str):
        dark = " ".join(
            f'[fill="{light}"] {{ fill: {other} }} [stroke="{light}"] {{ stroke: {other} }}'
            for light, other in DARK.items()
        )
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f"<style>@media (prefers-color-scheme: dark) {{ svg {{ fill: {DARK[INK]} }} {dark} }}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{QUIET}"/></marker></defs>',
        ]
        self.box(1, 1, WIDTH - 2, height - 2, PAPER, LINE)

    def add(self, kind: str, text: str = "", **attributes) -> None:
        """Add an element; an underscore in an attribute name stands for a hyphen."""
        told = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.lines.append(f"<{kind} {told}>{escape(pretty(text))}</{kind}>" if text else f"<{kind} {told}/>")

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", **more) -> None:
        """A rectangle, with rounded corners unless rx=0."""
        place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
        self.add("rect", **place, **{"rx": 7, "fill": fill, "stroke": stroke} | more)

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = "start", fill: str = INK, bold=False):
        """One line of text; y is its baseline."""
        weight = {"font_weight": "bold"} if bold else {}
        self.add("text", text, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor, font_size=size, fill=fill, **weight)

    def labelled(self, x: float, y: float, width: float, height: float, title: str, *lines: str) -> None:
        """A box with centred lines, the first in bold."""
        self.box(x, y, width, height, PAPER, INK, stroke_width=1.5)
        top = y + height / 2 - 9 * len(lines) + 5
        self.text(x + width / 2, top, title, anchor="middle", bold=True)
        for number, line in enumerate(lines, 1):
            self.text(x + width / 2, top + 18 * number, line, 12, "middle", QUIET)

    def lines_of(self, x: float, y: float, text: str) -> None:
        """Small centred lines of text in the column of a loss."""
        for number, line in enumerate(textwrap.wrap(text.replace(", T", ",\u00a0T").replace("of ", "of\u00a0"), 17)):
            self.text(x, y + 14 * number, line, 11, "middle")

    def loss(self, name: str, x: float, y: float) -> None:
        """The name of a loss on a background of its colour."""
        self.box(x, y, 58, 28, LOSSES[name][0])
        self.text(x + 29, y + 19, name.upper(), anchor="middle", fill=ON_COLOUR, bold=True)

    def arrows(self, *paths: str, **more) -> None:
        """Straight lines from point to point, such as "0,0 9,0", with an arrowhead at the end."""
        for path in paths:
            self.add(
                "polyline", points=path, fill="none", stroke=QUIET, stroke_width=1.8, marker_end="url(#tip)", **more
            )

    def picture(self, x: float, y: float, size: float, side: Side) -> None:
        """The picture of the pair, or of the other pair, with its masked patches."""
        scene, scale, cell = SCENES[side.other], size / 32, size / 4
        self.box(x, y, size, size, rgb([scene.background] * 3), rx=0)
        for thing in scene.objects:
            left, top, w, h = (scale * edge for edge in thing.box)
            bars = [(0, h / 3, w, h / 3), (w / 3, 0, w / 3, h)] if thing.shape == "cross" else [(0, 0, w, h)]
            for right, down, width, height in bars:
                corner = f"{w / 2 if thing.shape == 'circle' else 0:g}"
                self.box(x + left + right, y + top + down, width, height, rgb(COLOURS[thing.colour]), rx=corner)
        for patch in range(PATCHES):
            left, top, masked = x + patch % 4 * cell, y + patch // 4 * cell, patch in side.masked
            self.box(left, top, cell, cell, FILLS[side.how] if masked else "none", "#c4c4be", rx=0, stroke_width=0.8)
            if masked and side.how == "drop":
                self.text(left + cell / 2, top + cell * 0.7, "×", round(cell * 0.7), "middle", QUIET)

    def words(self, x: float, y: float, side: Side) -> None:
        """The caption of the pair, or of the other pair, in two lines; masked words are covered."""
        left = x
        for number, word in enumerate(CAPTIONS[side.other].split()):
            if number == 4:
                left, y = x, y + 22
            width, masked = 8.2 * len(word) + 8, number in side.masked
            self.box(left, y, width, 20, MASKED if masked else TOKEN, "#c4c4be")
            self.text(left + width / 2, y + 14, "?" if masked else word, 12, "middle", ON_COLOUR if masked else INK)
            left += width + 4

    def save(self, path: Path) -> None:
        """Write the SVG file."""
        text = "\n".join([*self.lines, "</svg>", ""])
        runtime.write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def rgb(colour: Iterable[int]) -> str:
    """A colour in SVG notation."""
    return "rgb({},{},{})".format(*colour)


def pretty(text: str) -> str:
    """The text with typographic primes after I and T."""
    return re.sub(r"\b([IT])('+)", lambda found: found[1] + {"'": "′", "''": "″"}[found[2]], text)


# --------------------------------------------------------------------------------------------- the passes of a step


def draw_step(objective: str) -> Drawing:
    """One row per pass and one column per loss, with a dot where the loss reads the output of the pass."""
    trace, row, top = traced(objective), 52, 62
    columns = {loss: 636 + 106 * number for number, loss in enumerate(reversed(trace.losses))}
    bottom = top + row * len(trace.passes) + 8 * len(trace.parts)
    sheet = Drawing(bottom + 112, f"The passes of one training step of {objective}, and which loss reads which")
    titles = (
        ("encoder", 28, 38),
        ("input", 258, 38),
        ("target", 28, bottom + 22),
        ("distance", 28, bottom + 88),
    )
    for title, *where in titles:
        sheet.text(*where, title, bold=True)
    for loss, x in columns.items():
        require(
            loss in LOSSES, f"the loss {loss} has no colour and no target yet: add it to LOSSES of tools/figures.py"
        )
        sheet.loss(loss, x - 29, 19)
        _, target, compared = LOSSES.get(f"{objective} {loss}") or LOSSES[loss]
        sheet.lines_of(x, bottom + 22, target)
        sheet.lines_of(x, bottom + 88, compared)
    y = top
    for part in trace.parts:
        rows = [(one, reads) for one, reads in zip(trace.passes, trace.reads, strict=True) if one.part == part]
        sheet.box(16, y, WIDTH - 32, row * len(rows), TEACHER if part.startswith("teacher") else STUDENT)
        sheet.text(28, y + 20, PARTS.get(part, part.replace(".", ": ") + " encoder"), bold=True)
        calls = len({one.call for one, _ in rows})
        sheet.text(28, y + 36, f"{len(rows)} x the batch, {calls} call{'s' * (calls > 1)}", 12, fill=QUIET)
        for one, reads in rows:
            draw_pass(sheet, trace, one, y)
            for loss, places in reads.items():
                marks = {"data_part": part, "data_view": trace.name(one), "data_loss": loss}
                sheet.add("circle", cx=columns[loss], cy=y + 20, r=8, fill=LOSSES[loss][0], **marks)
                sheet.lines_of(columns[loss], y + 42, "all of it" if len(places) == 4 else ", ".join(places))
            y += row
        y += 8
    return sheet


def draw_pass(sheet: Drawing, trace: Trace, one: Pass, y: float) -> None:
    """The input of a pass: its name, and its picture and caption with their masks."""
    sheet.text(258, y + 30, trace.name(one), bold=True)
    if Side("fused") in one:
        return
    if one.image:
        sheet.picture(344, y + 4, 44, one.image)
    if one.text:
        sheet.words(396, y + 5, one.text)
    if one.image and one.image.masked and not one.text:
        sheet.text(396, y + 31, f"{len(one.image.masked)} of {PATCHES} patches: {HOW[one.image.how]}", 12, fill=QUIET)
    if one.text and one.text.masked and not one.image:
        sheet.text(366, y + 31, f"{len(one.text.masked)} of {len(CAPTIONS[0].split())}", 12, "middle", QUIET)


# ------------------------------------------------------------------------------------------------- what MAMO is made of


def draw_architecture() -> Drawing:
    """The student, the teacher, the heads and losses, and the vectors that each loss compares."""
    sheet = Drawing(604, "MAMO: a student with image, text and fusion encoder, its moving-average teacher, five losses")
    draw_inputs(sheet)
    draw_student(sheet)
    draw_teacher(sheet)
    return sheet


def draw_inputs(sheet: Drawing) -> None:
    """The pair, whole and masked, and the whole pair again as input of the teacher."""
    config, whole = MAMOConfig(), Side("whole")
    image, text = (next(side for side in traced("mamo").names(kind) if side.masked) for kind in ("image", "text"))
    for x, y, size, side, name in ((30, 84, 72, whole, "I"), (122, 84, 72, image, "I'"), (76, 412, 68, whole, "I")):
        sheet.picture(x, y, size, side)
        sheet.text(x + size / 2, y + size + 18, name, anchor="middle", bold=True)
    for y, side, name in ((200, whole, "T"), (262, text, "T'"), (524, whole, "T")):
        sheet.text(24, y + 14, name, bold=True)
        sheet.words(42, y, side)
    sheet.text(158, 192, f"{config.mask_image:.0%} masked", 12, "middle")
    sheet.text(42, 326, f"{config.mask_text:.0%} of the words masked", 12)


def depths(field: str) -> str:
    """The number of blocks in the smallest preset and in the paper."""
    return f"{PRESETS['nano'][field]} blocks in nano, {PRESETS['base'][field]} in base"


def draw_student(sheet: Drawing) -> None:
    """The student: encoders, heads and losses."""
    sheet.box(232, 40, 660, 296, STUDENT, "#b8cde2")
    sheet.text(246, 62, "student", bold=True)
    sheet.labelled(256, 76, 200, 76, "image encoder", "ViT", depths("image_depth"))
    sheet.labelled(256, 240, 200, 76, "text encoder", "BERT, lower half", depths("text_depth"))
    fused = "BERT, upper half, over", "[text; class token, patches]", depths("fusion_depth")
    sheet.labelled(520, 132, 180, 128, "fusion encoder", *fused)
    sheet.arrows("198,114 254,114", "216,272 254,272", "356,154 356,180", "356,238 356,212")
    sheet.arrows("458,114 488,114 488,172 518,172", "458,278 488,278 488,220 518,220")
    sheet.loss("itc", 327, 182)
    sheet.text(394, 192, "own partner", 12)
    sheet.text(394, 208, "in the batch", 12)
    heads = {"itm": (70, "linear", "[CLS]", "a pair, or not")}
    heads |= {"mlm": (132, "BERT's head", "words", "masked words")}
    heads |= {
        "mrm": (206, "two MLPs", "patches; words", "fused vectors"),
        "mim": (280, "MLP", "patches", "image features"),
    }
    for name, (y, head, places, compared) in heads.items():
        middle = y + 14
        sheet.arrows(f"702,196 720,196 720,{middle} 740,{middle}", f"882,{middle} 928,{middle}")
        sheet.labelled(742, y - 8, 138, 44, head, places)
        sheet.loss(name, 930, y)
        for line, told in enumerate(textwrap.wrap(compared, 18)):
            sheet.text(998, y + 18 - 8 * (len(compared) > 18) + 16 * line, told, 12)


def draw_teacher(sheet: Drawing) -> None:
    """The teacher, which is a moving average of the student, and the targets of the losses."""
    sheet.box(232, 384, 500, 196, TEACHER, "#cfc8b8", stroke_dasharray="6 4")
    sheet.text(246, 406, "teacher: whole pairs only, no gradient", bold=True)
    for x, y, width, kind in ((256, 420, 200, "image"), (256, 508, 200, "text"), (540, 464, 170, "fusion")):
        sheet.labelled(x, y, width, 60, f"{kind} encoder", "the student's, averaged")
    sheet.arrows("148,446 254,446", "216,534 254,534")
    sheet.arrows("458,460 500,460 500,484 538,484", "458,538 500,538 500,504 538,504")
    sheet.arrows("458,434 959,434 959,310", "712,494 1092,494 1092,256 959,256 959,236")
    sheet.arrows("610,338 610,382", stroke_dasharray="6 4")
    sheet.text(624, 365, "a moving average, after every step", 13, fill=QUIET)
    sheet.text(778, 427, "at the masked patches", 12, fill=QUIET)
    sheet.text(778, 512, "at the masked patches and words", 12, fill=QUIET)
    for x, y in ((754, 434), (754, 494)):
        sheet.box(x - 14, y - 11, 28, 22, PAPER, QUIET, stroke_width=1.5)
        sheet.text(x, y + 5, "sg", 13, "middle", bold=True)
    sheet.text(744, 548, "sg: stop-gradient, a target takes no gradient", 12, fill=QUIET)


def draw_video() -> Drawing:
    """The attention pattern of the image encoder for a video of three frames of 2 x 2 patches. The pattern is computed,
    not drawn by hand: a cell is filled where the gradient of the output token with respect to the input is non-zero."""
    frames, n, cell, left, top = 3, 4, 24, 250, 96
    config = MAMOConfig(image_size=(16, 16), patch_size=8, frames=frames)
    hidden = torch.randn(1, frames + frames * n, config.width, requires_grad=True)
    block, count = ImageEncoder(config).blocks[0], hidden.shape[1]
    sheet = Drawing(top + count * cell + 76, "Which token attends to which in a video of three frames")
    names = [f"frame {number + 1}" for number in range(frames)]
    blocks = [("class tokens", 0, frames)] + [
        (f"patches of {name}", frames + n * number, n) for number, name in enumerate(names)
    ]
    sheet.text(left, 38, "key: attended to", bold=True)
    sheet.text(28, top - 14, "query", bold=True)
    for name, start, length in blocks:
        middle = (start + length / 2) * cell
        sheet.text(left - 12, top + middle + 5, name, anchor="end")
        for line, word in enumerate(name.replace(" of", "").split(" ", 1)):
            sheet.text(left + middle, top - 28 + 16 * line, word, 11, "middle", QUIET)
    for query in range(count):
        (felt,) = torch.autograd.grad(by_frame(block, hidden, frames)[0, query].square().sum(), hidden)
        for key in range(count):
            fill = (LOSSES["mrm"][0] if query < frames else MASKED) if felt[0, key].abs().sum() > 0 else "#f1f2f4"
            sheet.box(left + key * cell + 1, top + query * cell + 1, cell - 2, cell - 2, fill, rx=2)
    said = (
        "The class token of a frame attends to all tokens of all frames.",
        "A patch attends to its own frame: its class token and its patches.",
        "So the cost is roughly linear in the number of frames,",
        "and a video of one frame is a picture.",
    )
    for number, line in enumerate(said):
        sheet.text(left + count * cell + 40, top + 40 + 26 * number, line)
    told = "Contrast compares the mean of the class tokens; fusion reads all tokens. Masks hide a place in all frames."
    sheet.text(28, top + count * cell + 36, told)
    return sheet


# ------------------------------------------------------------------------------------------------------- the trial

FOILS = tuple(f"foils matching, {kind}" for kind in ("relation", "axis", "colour", "shape", "swap"))
TRIAL = {  # experiments/trial/plan.md: part -> measure, results file, columns to average, difference of interest
    "a. after fine-tuning": (
        ("questions, 60,000 rows", "vqa", ("accuracy",), 2),
        ("questions, 3,000 rows", "vqa_few", ("accuracy",), 2),
        ("pointing, 20,000 phrases", "grounding", ("pointing",), 3),
        ("pointing, 1,000 phrases", "grounding_few", ("pointing",), 3),
    ),
    "b. what the caption does not say": (
        ("questions about all objects", "untold_vqa", ("accuracy",), 2),
        ("unnamed objects that matter", "objects", ("objects, not named",), 5),
    ),
    "c. little data": (
        *((f"R@1, {pairs} pairs", f"pairs_{pairs}", ("test re-ranked i2t R@1",), 3) for pairs in (500, 2000, 8000)),
        *((f"foils, {pairs} pairs", f"pairs_{pairs}", FOILS, 3) for pairs in (500, 2000, 8000)),
    ),
    "d. four times as long, one seed": (
        ("R@1, novel combinations", "longer", ("novel re-ranked i2t R@1",), 2),
        ("questions, 3,000 rows", "longer_vqa_few", ("accuracy",), 2),
    ),
}
ARMS = {"mamo": ("MAMO", "mrm"), "maskvlm": ("MaskVLM", "itc"), "vlmae": ("our VLMAE", "mlm")}  # name, whose colour


def draw_trial() -> Drawing:
    """Differences from the control, with 95 % confidence intervals over seeds; one row per planned measure."""
    row, top, zero, scale = 34, 70, 790, 17.5  # pixels; of a point: scale
    bottom = top + row * (len(TRIAL) + sum(map(len, TRIAL.values())))
    sheet = Drawing(bottom + 52, "A fair trial: differences to ITC + ITM + MLM, with 95 % intervals")
    for number, (name, colour) in enumerate(ARMS.values()):
        sheet.add("circle", cx=360 + 130 * number, cy=30, r=6, fill=LOSSES[colour][0])
        sheet.text(372 + 130 * number, 35, name)
    sheet.text(zero + 12, 35, "better than ITC + ITM + MLM", 12, fill=QUIET)

    def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, **more) -> None:
        ends = {name: f"{value:.1f}" for name, value in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2))}
        sheet.add("line", **ends, stroke=colour, stroke_width=width, **more)

    for points in range(-25, 16, 5):
        x = zero + scale * points
        line(x, top - 12, x, bottom, LINE if points else INK, 1 if points == 0 else 0.4)
        sheet.text(x, bottom + 20, f"{points:+d}" if points else "0", 12, "middle", QUIET)
    sheet.text(zero, bottom + 40, "percentage points; dashed: the difference of interest", 12, "middle", QUIET)
    y = top
    for part, measures in TRIAL.items():
        y += row
        sheet.text(28, y - 10, part, bold=True)
        for measure, file, columns, interest in measures:
            y += row
            sheet.text(44, y - 12, measure)
            wanted = zero + scale * interest
            line(wanted, y - row + 6, wanted, y - 6, INK, 2, stroke_dasharray="3 3")
            arms = json.loads((ROOT / f"results/trial/{file}.json").read_text(encoding="utf-8"))["arms"]
            values = {
                name.rpartition(": ")[2]: np.mean([arm[column]["values"] for column in columns], axis=0)
                for name, arm in arms.items()
            }
            for number, arm in enumerate(name for name in ARMS if name in values):
                apart = (values[arm] - values["control"]).tolist()
                found = difference(apart) if len(apart) > 1 else dict.fromkeys(("mean", "low", "high"), apart[0])
                low, mean, high = (zero + scale * min(max(found[of], -26), 16) for of in ("low", "mean", "high"))
                colour, height = LOSSES[ARMS[arm][1]][0], y - row + 12 + 10 * number
                line(low, height, high, height, colour, 2.5)
                sheet.add("circle", cx=f"{mean:.1f}", cy=height, r=4.5, fill=colour)
    return sheet


FIGURES = {"architecture.svg": draw_architecture, "video.svg": draw_video, "trial.svg": draw_trial}
FIGURES |= {f"{objective}.svg": functools.partial(draw_step, objective) for objective in OBJECTIVES}


def main() -> None:
    """Command-line entry point: draw all figures."""
    parser = runtime.Parser(
        prog="python -m tools.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="output folder for the figures")
    out = parser.parse_args().out
    for name, draw in FIGURES.items():
        draw().save(out / name)
    print(f"{len(FIGURES)} figures in {out}")


if __name__ == "__main__":
    runtime.guarded(main)
