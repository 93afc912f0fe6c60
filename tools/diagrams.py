"""Draw docs/objectives.md's pictures: what each objective hides, what it predicts there, and from where.

    python -m tools.diagrams --out docs

The masks are not drawn by hand: they come from the functions that training calls, at the ratios of the preset nano, on
one picture and caption of the built-in world.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import runtime
from mamo import Config, HiddenWords, hide_patches, hide_words
from siblings import OBJECTIVES
from siblings.masking import drop_patches, hide_units
from tokenizer import Tokenizer
from world.shapes import Scene, place, render

CAPTION = "a red circle above a blue cross"
SCENE = Scene(238, (place("red", "circle", "medium", 13, (11, 8)), place("blue", "cross", "medium", 13, (11, 24))))
SCALE = 4  # pixels of a sheet for one of the picture
SIDE, ROW, WIDTH = 32 * SCALE, 196, 1120
COLUMNS = {"image": 180, "text": 330, "fusion": 500, "predicted": 660, "target": 850}
INK, PALE, HIDDEN, FOUND = "#1c1c1c", "#e8e8e4", "#4a5a78", "#d9822b"


@dataclass
class Pass:
    """One fused view of the pair, and what is recovered from it."""

    name: str  # such as (I', T)
    losses: str
    target: str  # what stands there in truth, and who says so
    note: str = ""
    how: str = "whole"  # of the hidden patches: "token", "blank" or "drop"
    patches: tuple[int, ...] = ()  # hidden patches
    words: HiddenWords | None = None
    recovers: tuple[int, ...] = ()  # patches that are predicted


class Sample:
    """The picture and the caption, with noise from a seed."""

    def __init__(self, seed: int = 5):
        draw = torch.Generator().manual_seed(seed)
        self.tokenizer = Tokenizer.build([CAPTION], min_count=1)
        self.input_ids = torch.tensor([self.tokenizer.encode(CAPTION)])
        self.real = torch.ones_like(self.input_ids, dtype=torch.bool)
        self.patch_noise = torch.rand(1, 16, generator=draw)
        self.token_noise = torch.rand(self.input_ids.shape, generator=draw)
        self.picture = Image.fromarray(render(SCENE, 32))

    def config(self, objective: str) -> Config:
        """The Config of an objective in the preset nano."""
        model, changes = OBJECTIVES[objective]
        ids = {"mask_id": self.tokenizer.mask_id, "special_ids": self.tokenizer.special_ids}
        return model.config_class(**changes, **ids, vocab_size=len(self.tokenizer))

    def words(self, ratio: float, config: Config) -> HiddenWords:
        """Words hidden behind [MASK]: the noise that would let one in five stay or change is left out."""
        zeros = torch.zeros(self.input_ids.shape)
        return hide_words(self.input_ids, self.real, self.token_noise, zeros, ratio, config)


def listed(index: Tensor) -> tuple[int, ...]:
    """(1, m) -> plain numbers"""
    return tuple(index[0].tolist())


def passes_of(objective: str, sample: Sample) -> list[Pass]:
    """The passes in which something is hidden."""
    config = sample.config(objective)
    words = sample.words(config.mask_text, config)
    mlm = Pass("(I, T')", "MLM", "the words themselves", f"{config.mask_text:.0%} of the words", words=words)
    if objective == "control":
        return [mlm]
    if objective == "mamo":
        hidden = listed(hide_patches(sample.patch_noise, config.mask_image)[0])
        target = "MRM: the teacher's fused vectors of (I, T)"
        mlm.losses, mlm.target = "MRM + MLM", f"{target}; MLM: the words"
        image = f"{target}; MIM: the teacher's image features"
        note = f"{config.mask_image:.0%} of the patches, behind a mask token"
        return [Pass("(I', T)", "MRM + MIM", image, note, "token", hidden, recovers=hidden), mlm]
    if objective == "maskvlm":
        hidden = listed(hide_units(sample.patch_noise, config.mask_image, config.grid, config.mask_unit)[0])
        note = f"{config.mask_image:.0%} of units of {config.mask_unit} x {config.mask_unit} patches, pixels blanked"
        target = "the raw pixels, by a decoder that reads the text"
        return [Pass("(I', T)", "MIM", target, note, "blank", hidden, recovers=hidden), mlm]
    if objective == "glscl":
        mlm.name, mlm.note = "(I, T') for MLM", f"{config.mask_text:.0%} of the words, whole ones"
        dropped, some = drop_patches(sample.patch_noise, config.mask_drop)[0], config.mask_image
        hidden = listed(hide_patches(sample.patch_noise, some)[0])
        missing = sample.words(config.mask_completion, config)
        return [
            Pass(
                "(I', T)", "MGSC", "the image's class token of (I, T'), detached, against the batch",
                f"{config.mask_drop:.0%} of the patches dropped", "drop", listed(dropped),
            ),
            Pass(
                "(I, T')", "MGSC + MLTC", "the text's [CLS] and the hidden words' tokens of (I', T), detached",
                f"{config.mask_completion:.0%} of the words", words=missing,
            ),
            Pass(
                "(I'', T)", "MLTC", "the hidden patches' tokens of (I, T'), detached, against all hidden tokens",
                f"{some:.0%} of the patches, behind a mask token", "token", hidden, recovers=hidden,
            ),
            mlm,
        ]  # fmt: skip
    if objective != "vlmae":
        raise ValueError(f"what {objective} hides is not said: add it to passes_of in tools/diagrams.py")
    dropped = listed(drop_patches(sample.patch_noise, config.mask_image)[0])
    mlm.name, mlm.how, mlm.patches = "(I_vis, T')", "drop", dropped
    mlm.note += "; the same patches dropped"
    target = (
        "RMIM: normalised pixels, by a decoder that reads the text; IFR, before fusion: the teacher's image features"
    )
    note = f"{config.mask_image:.0%} of the patches dropped; ITC and ITM see this view too"
    return [Pass("(I_vis, T)", "RMIM + IFR", target, note, "drop", dropped, recovers=dropped), mlm]


class Sheet:
    """A picture with one row for each pass."""

    def __init__(self, objective: str, sample: Sample):
        self.sample, self.passes = sample, passes_of(objective, sample)
        self.image = Image.new("RGB", (WIDTH, 46 + ROW * len(self.passes)), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font, self.small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
        titles = {"image": "image", "text": "text", "fusion": "", "predicted": "predicted", "target": "should be"}
        for name, title in titles.items():
            self.pen.text((COLUMNS[name], 14), title, fill=INK, font=self.font)
        for number, one in enumerate(self.passes):
            self.draw(one, 46 + number * ROW)

    def draw(self, one: Pass, top: int) -> None:
        """A row: the view, its fusion, the prediction, and what it should be."""
        self.pen.line((12, top, WIDTH - 12, top), fill=PALE, width=2)
        top += 16
        self.pen.text((16, top), one.name, fill=INK, font=self.font)
        self.write(one.note, 16, top + 28, 150)
        self.view(one, COLUMNS["image"], top)
        chosen = set(listed(one.words.index[one.words.valid][None])) if one.words else set()
        self.text(COLUMNS["text"], top, chosen, "[MASK]", HIDDEN)
        self.arrow(COLUMNS["fusion"] - 34, COLUMNS["fusion"] - 6, top + 64)
        box = (COLUMNS["fusion"], top + 34, COLUMNS["fusion"] + 112, top + 94)
        self.pen.rectangle(box, outline=INK, width=2)
        self.pen.text((box[0] + 28, box[1] + 20), "fusion", fill=INK, font=self.font)
        self.arrow(box[2] + 6, COLUMNS["predicted"] - 8, top + 64)
        if one.recovers:
            for patch in range(16):
                self.cell(COLUMNS["predicted"], top, patch, FOUND if patch in one.recovers else PALE)
        elif chosen:
            self.text(COLUMNS["predicted"], top, chosen | {0} if "MGSC" in one.losses else chosen, "", FOUND)
        else:
            self.pen.rectangle((COLUMNS["predicted"], top + 42, COLUMNS["predicted"] + SIDE, top + 86), fill=FOUND)
            self.pen.text((COLUMNS["predicted"] + 22, top + 54), "class token", fill="white", font=self.font)
        self.pen.text((COLUMNS["target"], top), one.losses, fill="#9a5310", font=self.font)
        self.write(one.target, COLUMNS["target"], top + 28, 250)

    def view(self, one: Pass, left: int, top: int) -> None:
        """The image as the encoder is given it."""
        self.image.paste(self.sample.picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
        for patch in range(16):
            fill = {"token": HIDDEN, "blank": (127, 127, 127), "drop": "white"}.get(one.how)
            self.cell(left, top, patch, fill if patch in one.patches else None, dropped=one.how == "drop")

    def cell(self, left: int, top: int, patch: int, fill, dropped: bool = False) -> None:
        """One patch of the 4 x 4: filled, or its outline; a dropped one is crossed out."""
        side = SIDE // 4
        x, y = left + patch % 4 * side, top + patch // 4 * side
        self.pen.rectangle((x, y, x + side, y + side), fill=fill, outline="#b4b4ae")
        if fill == HIDDEN:
            self.pen.text((x + 10, y + 7), "M", fill="white", font=self.font)
        if dropped and fill:
            self.pen.line((x + 8, y + 8, x + side - 8, y + side - 8), fill="#b4b4ae")
            self.pen.line((x + 8, y + side - 8, x + side - 8, y + 8), fill="#b4b4ae")

    def text(self, left: int, top: int, chosen: set[int], shown: str, colour: str) -> None:
        """The caption, a word below the other; the chosen ones stand in colour, as themselves or as what is shown."""
        for number, token in enumerate(self.sample.input_ids[0].tolist()):
            box = (left, top + 17 * number - 4, left + 96, top + 17 * number + 12)
            if number in chosen:
                self.pen.rectangle(box, fill=colour)
            word = shown if shown and number in chosen else self.sample.tokenizer.vocab[token]
            self.pen.text((left + 6, box[1] + 1), word, fill="white" if number in chosen else INK, font=self.small)

    def arrow(self, start: int, end: int, y: int) -> None:
        """From left to right."""
        self.pen.line((start, y, end, y), fill=INK, width=2)
        self.pen.polygon([(end, y), (end - 8, y - 5), (end - 8, y + 5)], fill=INK)

    def write(self, text: str, left: int, top: int, width: int) -> None:
        """Text in lines of at most so many pixels."""
        line = ""
        for word in [*text.split(), ""]:
            longer = f"{line} {word}".strip()
            if not word or self.small.getlength(longer) > width:
                self.pen.text((left, top), line, fill=INK, font=self.small)
                top, longer = top + 19, word
            line = longer


def main() -> None:
    """Command line: one PNG for each objective."""
    parser = runtime.Parser(
        prog="python -m tools.diagrams", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    out, sample = parser.parse_args().out, Sample()
    for objective in OBJECTIVES:
        image = Sheet(objective, sample).image
        runtime.write_beside(out / f"{objective}.png", lambda path, image=image: image.save(path, format="PNG"))
    print(f"{len(OBJECTIVES)} pictures in {out}")


if __name__ == "__main__":
    runtime.guarded(main)
