"""Draw docs/architecture.svg, what MAMO is made of, and docs/step.svg, the passes of one training step.

    python -m tools.architecture --out docs

Sizes come from PRESETS, ratios and hidden places from the functions that training calls. The passes are traced: a
small model makes a step with all losses, and one with each loss alone, which makes only what that loss reads.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

import torch

import runtime
from mamo import MAMO, PRESETS, MAMOConfig, hide_patches
from tools.benchmark import random_batch
from tools.costs import flops_of_step
from tools.diagrams import CAPTION, SCENE, Sample
from world.shapes import COLOURS

WIDTH = 1120
INK, QUIET, LINE, PAPER = "#1c1c1c", "#5c5f66", "#9aa0a8", "#ffffff"
STUDENT, TEACHER, HIDDEN = "#eef4fa", "#f3f1ec", "#4a5a78"
# Of each loss: a colour for the colour-blind too; predicted from (two lines), should be, compared by.
LOSSES = {
    "mrm": ("#0072b2", "fused vectors at", "hidden patches, words", "the teacher's of (I, T)", "squared distance"),
    "mim": ("#b35900", "fused vectors at", "hidden patches", "the teacher's of I", "absolute distance"),
    "mlm": ("#00795a", "fused vectors at", "hidden words", "the words", "cross-entropy"),
    "itc": ("#a64d86", "class token of I,", "[CLS] of T", "own partner in batch", "cross-entropy"),
    "itm": ("#6a4c00", "fused [CLS] of", "a right, two wrong", "right or wrong", "cross-entropy"),
}
PARTS = [(network, encoder) for network in ("student", "teacher") for encoder in ("image", "text", "fusion")]

# ----------------------------------------------------------------------------------------------------- a traced step


def trace(rows: int = 3, length: int = 8, **weights: float) -> dict[tuple[str, str], list[list[str]]]:
    """One step of a small MAMO -> for each network and encoder a list of its calls, each the names of its views.

    Args:    rows, length   pairs of the batch, and tokens of each
             weights        of the losses, such as w_mrm=0
    """
    config = MAMOConfig(vocab_size=20, ema=0.9, **weights)
    model, batch = MAMO(config), random_batch(config, rows, length)
    batch["replace_noise"] = torch.zeros(rows, length)  # all hidden words become [MASK], so that T' differs from T
    seen: dict[tuple[str, str], list[list[str]]] = {part: [] for part in PARTS}

    def image_views(images: torch.Tensor, patch_mask: torch.Tensor | None = None) -> list[str]:
        masks = [None] * (len(images) // rows) if patch_mask is None else patch_mask.split(rows)
        return ["I" if mask is None or not mask.any() else "I'" for mask in masks]

    def text_views(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[str]:
        return ["T" if part.equal(batch["input_ids"]) else "T'" for part in input_ids.split(rows)]

    fused: list[str] = []  # the names that the student gives its fused views
    fuse_views = model.fuse_views
    model.fuse_views = lambda views: (fused.extend(views), fuse_views(views))[1]
    views_of = {
        ("student", "image"): image_views,
        ("student", "text"): text_views,
        ("student", "fusion"): lambda hidden, *_: fused[: len(hidden) // rows],
        ("teacher", "image"): image_views,
        ("teacher", "text"): text_views,
        ("teacher", "fusion"): lambda hidden, *_: ["IT"] * (len(hidden) // rows),
    }
    for (network, encoder), views in views_of.items():
        part = getattr(getattr(model, network), encoder, None)
        if part is not None:  # fusion is not called as a whole: its first block sees every row
            calls = seen[network, encoder]
            watched = part.blocks[0] if encoder == "fusion" else part
            watched.register_forward_hook(lambda _, given, said, views=views, calls=calls: calls.append(views(*given)))
    model(batch)
    return seen


def read_by(loss: str) -> dict[tuple[str, str], list[list[str]]]:
    """What a loss reads: the calls of a step in which it is the only one."""
    return trace(**{f"w_{name}": float(name == loss) for name in LOSSES})


# ------------------------------------------------------------------------------------------------------------ drawing


class Drawing:
    """Lines of an SVG, with its own background, so that it reads in a light and in a dark page."""

    def __init__(self, height: int, title: str):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{QUIET}"/></marker></defs>',
        ]
        self.box(1, 1, WIDTH - 2, height - 2, PAPER, LINE)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = INK, more: str = ""
    ) -> None:
        """A rectangle with round corners."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'<rect {place} rx="7" fill="{fill}" stroke="{stroke}" {more}/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", size: int = 14, fill: str = INK, bold=False):
        """One line; y is its base line."""
        weight = ' font-weight="bold"' if bold else ""
        look = f'text-anchor="{anchor}" font-size="{size}" fill="{fill}"{weight}'
        self.lines.append(f'<text x="{x:g}" y="{y:g}" {look}>{escape(pretty(text))}</text>')

    def labelled(self, x, y, width, height, lines: Iterable[str], fill: str = PAPER, stroke: str = INK) -> None:
        """A box with centred lines, of which the first is bold."""
        lines = list(lines)
        self.box(x, y, width, height, fill, stroke, 'stroke-width="1.5"')
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            quiet = {"size": 12, "fill": QUIET} if number else {"bold": True}
            self.text(x + width / 2, top + 18 * number, line, "middle", **quiet)

    def loss(self, name: str, x: float, y: float, width: float = 58) -> None:
        """A loss: its name on its colour."""
        self.box(x, y, width, 28, LOSSES[name][0], LOSSES[name][0])
        self.text(x + width / 2, y + 19, name.upper(), "middle", fill=PAPER, bold=True)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Straight lines from point to point, with a tip at the end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="6 4"' if dashed else ""
        look = f'fill="none" stroke="{QUIET}" stroke-width="1.8" marker-end="url(#tip)"{dashes}'
        self.lines.append(f'<polyline points="{path}" {look}/>')

    def shape(
        self, kind: str, fill: str, x: float, y: float, width: float, height: float, stroke: str = "none"
    ) -> None:
        """A circle, or a rectangle, inside a box."""
        if kind == "circle":
            place = f'cx="{x + width / 2:g}" cy="{y + height / 2:g}" r="{width / 2:g}"'
        else:
            place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'<{kind} {place} fill="{fill}" stroke="{stroke}" stroke-width="0.8"/>')

    def picture(self, x: float, y: float, side: float, hidden: Iterable[int] = (), other: bool = False) -> None:
        """The picture of the built-in world, or another one, with patches behind a mask token."""
        scale, cell = side / 32, side / 4
        self.shape("rect", rgb([SCENE.background] * 3), x, y, side, side)
        for thing in () if other else SCENE.objects:
            left, top, w, h = (scale * edge for edge in thing.box)
            colour = rgb(COLOURS[thing.colour])
            if thing.shape == "circle":
                self.shape("circle", colour, x + left, y + top, w, h)
            else:  # a cross is two bars
                self.shape("rect", colour, x + left, y + top + h / 3, w, h / 3)
                self.shape("rect", colour, x + left + w / 3, y + top, w / 3, h)
        if other:
            self.shape("rect", rgb(COLOURS["yellow"]), x + cell, y + cell, 2 * cell, 2 * cell)
        for patch in range(16):
            fill = HIDDEN if patch in hidden else "none"
            self.shape("rect", fill, x + patch % 4 * cell, y + patch // 4 * cell, cell, cell, "#c4c4be")

    def bars(self, x: float, y: float, hidden: Iterable[int] = (), other: bool = False) -> None:
        """The caption in small: a bar for each word, or those of another caption."""
        place, line = x, y
        for number, word in enumerate(CAPTION.split()):
            if number == 4:
                place, line = x, y + 15
            width = 3.2 * len(word) + 3
            fill = HIDDEN if number in hidden else rgb(COLOURS["yellow"]) if other else "#d5d8dc"
            self.shape("rect", fill, place, line, width, 10, "#b4b4ae")
            place += width + 3

    def words(self, x: float, y: float, hidden: Iterable[int] = ()) -> None:
        """The caption in two lines; hidden words stand behind a mask."""
        words = CAPTION.split()
        place, line = x, y
        for number, word in enumerate(words):
            if number == 4:
                place, line = x, y + 24
            width = 8.2 * len(word) + 8
            self.box(place, line, width, 20, HIDDEN if number in hidden else "#f7f7f4", "#c4c4be")
            shown = {"fill": PAPER} if number in hidden else {}
            self.text(place + width / 2, line + 14, "?" if number in hidden else word, "middle", 12, **shown)
            place += width + 4

    def save(self, path: Path) -> None:
        """Write the file."""
        text = "\n".join([*self.lines, "</svg>", ""])
        runtime.write_beside(path, lambda place: place.write_text(text, encoding="utf-8"))


def rgb(colour: Iterable[int]) -> str:
    """A colour as SVG writes it."""
    return "rgb({},{},{})".format(*colour)


def pretty(name: str) -> str:
    """I'T -> (I′, T), IT- -> (I, T⁻); other text as it is, with typographic primes."""
    plain = name.replace("'", "").replace("-", "")
    if plain == "IT":
        cut = name.index("T")
        name = f"({name[:cut]}, {name[cut:]})"
        name = name.replace("-", "⁻")
    return re.sub(r"\b([IT])'", r"\1′", name)


def sizes(field: str) -> str:
    """How many blocks the smallest and the paper's size have."""
    return f"{PRESETS['nano'][field]} blocks in nano, {PRESETS['base'][field]} in base"


def hidden_places() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patches and words (counted from the first after [CLS]) that the default ratios hide of the sample."""
    sample = Sample()
    config = sample.config("mamo")
    patches = hide_patches(sample.patch_noise, config.mask_image)[0][0].tolist()
    words = sample.words(config.mask_text, config)
    return tuple(patches), tuple(place - 1 for place in words.index[words.valid[0][None]].tolist())


def draw_architecture() -> Drawing:
    """Student, teacher, heads and losses, and what is compared with what."""
    sheet = Drawing(604, "MAMO: a student with image, text and fusion encoder, its moving-average teacher, five losses")
    sheet.box(232, 40, 660, 296, STUDENT, "#b8cde2")
    sheet.text(246, 62, "student", bold=True)
    sheet.box(232, 384, 500, 196, TEACHER, "#cfc8b8", 'stroke-dasharray="6 4"')
    sheet.text(246, 406, "teacher: whole pairs only, no gradient", bold=True)
    draw_inputs(sheet)
    draw_student(sheet)
    draw_teacher(sheet)
    return sheet


def draw_inputs(sheet: Drawing) -> None:
    """The pair, whole and with hidden places, and the whole pair again for the teacher."""
    patches, words = hidden_places()
    config = MAMOConfig()
    sheet.picture(30, 84, 72)
    sheet.picture(122, 84, 72, patches)
    sheet.text(66, 174, "I", "middle", bold=True)
    sheet.text(158, 174, f"I', {config.mask_image:.0%} hidden", "middle", 12)
    sheet.text(24, 214, "T", bold=True)
    sheet.words(42, 200)
    sheet.text(24, 276, "T'", bold=True)
    sheet.words(42, 262, words)
    sheet.text(42, 326, f"{config.mask_text:.0%} of the words hidden", size=12)
    sheet.picture(76, 412, 68)
    sheet.text(110, 500, "I", "middle", bold=True)
    sheet.text(24, 538, "T", bold=True)
    sheet.words(42, 524)


def draw_student(sheet: Drawing) -> None:
    """Encoders, heads and losses."""
    encoders = {
        "image": (76, "image encoder", "ViT", "image_depth"),
        "text": (240, "text encoder", "BERT, lower half", "text_depth"),
    }
    for top, title, kind, field in encoders.values():
        sheet.labelled(256, top, 200, 76, (title, kind, sizes(field)))
    sheet.labelled(
        520,
        132,
        180,
        128,
        ("fusion encoder", "BERT, upper half, over", "[text; class token, patches]", sizes("fusion_depth")),
    )
    sheet.arrow((198, 114), (254, 114))
    sheet.arrow((216, 272), (254, 272))
    sheet.arrow((458, 114), (488, 114), (488, 172), (518, 172))
    sheet.arrow((458, 278), (488, 278), (488, 220), (518, 220))
    sheet.loss("itc", 327, 182)
    sheet.arrow((356, 154), (356, 180))
    sheet.arrow((356, 238), (356, 212))
    heads = {"itm": (70, "linear", "[CLS]"), "mlm": (132, "BERT's head", "words")}
    heads |= {"mrm": (206, "two MLPs", "patches; words"), "mim": (280, "MLP", "patches")}
    for name, (y, *lines) in heads.items():
        middle = y + 14
        sheet.arrow((702, 196), (720, 196), (720, middle), (740, middle))
        sheet.labelled(742, y - 8, 138, 44, lines)
        sheet.arrow((882, middle), (928, middle))
        sheet.loss(name, 930, y)


def draw_teacher(sheet: Drawing) -> None:
    """The moving average, and what the losses compare with."""
    sheet.labelled(256, 420, 200, 60, ("image encoder", "the student's, averaged"))
    sheet.labelled(256, 508, 200, 60, ("text encoder", "the student's, averaged"))
    sheet.labelled(540, 464, 170, 60, ("fusion encoder", "the student's, averaged"))
    sheet.arrow((148, 446), (254, 446))
    sheet.arrow((216, 534), (254, 534))
    sheet.arrow((458, 460), (500, 460), (500, 484), (538, 484))
    sheet.arrow((458, 538), (500, 538), (500, 504), (538, 504))
    sheet.arrow((458, 434), (959, 434), (959, 310))
    sheet.arrow((712, 494), (1092, 494), (1092, 256), (959, 256), (959, 236))
    sheet.arrow((610, 338), (610, 382), dashed=True)
    sheet.text(624, 365, "a moving average, after every step", size=13, fill=QUIET)
    sheet.text(760, 427, "features of the hidden patches", size=12, fill=QUIET)
    sheet.text(760, 512, "fused vectors, hidden patches and words", size=12, fill=QUIET)
    sheet.text(998, 80, "do they belong", size=12)
    sheet.text(998, 96, "together?", size=12)
    sheet.text(998, 150, "the hidden words", size=12)
    sheet.text(998, 225, "squared", size=12)
    sheet.text(998, 299, "absolute", size=12)
    sheet.text(394, 201, "in-batch", size=12)


def draw_step() -> Drawing:
    """A row for each distinct pass of a step and a column for each loss, with a dot where the loss reads the pass."""
    whole, alone = trace(), {loss: read_by(loss) for loss in LOSSES}
    views = {part: [view for call in whole[part] for view in call] for part in PARTS}
    top, row = 84, 40
    bottom = top + row * sum(map(len, views.values())) + 10 * len(PARTS)
    sheet = Drawing(bottom + 92, "The passes of one training step of MAMO, and which loss reads which")
    columns = {loss: 540 + 118 * number for number, loss in enumerate(LOSSES)}
    sheet.text(28, 38, "who encodes", bold=True)
    sheet.text(28, 58, "b: pairs of the batch; %: of a step's operations in base", size=12, fill=QUIET)
    sheet.text(300, 38, "what", bold=True)
    for loss, x in columns.items():
        sheet.loss(loss, x - 29, 19)
        sheet.text(x, 66, "reads", "middle", 12, QUIET)
    y = top
    for part, notes in zip(PARTS, notes_of(views), strict=True):
        height = row * len(views[part])
        sheet.box(16, y, WIDTH - 32, height, STUDENT if part[0] == "student" else TEACHER, "none")
        sheet.text(28, y + 18, ": ".join((part[0], f"{part[1]} encoder")), bold=True)
        sheet.text(28, y + 34, notes, size=13, fill=QUIET)
        for view in views[part]:
            draw_view(sheet, view, y)
            for loss, x in columns.items():
                if any(view in call for call in alone[loss][part]):
                    mark = f'data-part="{part[0]} {part[1]}" data-view="{pretty(view)}" data-loss="{loss}"'
                    sheet.lines.append(f'<circle cx="{x}" cy="{y + 20}" r="9" fill="{LOSSES[loss][0]}" {mark}/>')
            y += row
        y += 10
    for number, title in enumerate(("predicted from", "", "should be", "compared by")):
        sheet.text(28, bottom + 14 + 20 * number, title, size=13, bold=True)
        for loss, x in columns.items():
            sheet.text(x, bottom + 14 + 20 * number, LOSSES[loss][1 + number], "middle", 12)
    return sheet


def notes_of(views: dict[tuple[str, str], list[str]]) -> Iterable[str]:
    """Of each part: how many rows go through it, and its share of the operations, which for the teacher is one."""
    costs = flops_of_step(MAMOConfig(**PRESETS["base"], vocab_size=30522), 64, 30)
    for (network, encoder), names in views.items():
        rows = f"{len(names)} b rows in one call" if len(names) > 1 else "b rows"
        counted = {"image": "image encoder", "text": "text encoder"}.get(encoder, encoder)
        if network == "student":
            yield f"{rows}, {costs[counted] / sum(costs.values()):.0%}"
        else:
            yield rows + (f", {costs['teacher'] / sum(costs.values()):.0%} for all three" if encoder == "image" else "")


def draw_view(sheet: Drawing, view: str, y: float) -> None:
    """A view by its name, as a small picture and a small caption."""
    patches, words = hidden_places()
    sheet.text(300, y + 25, view, bold=True)
    if "I" in view:
        sheet.picture(362, y + 5, 30, patches if "I'" in view else (), "I-" in view)
    if "T" in view:
        sheet.bars(402, y + 8, words if "T'" in view else (), "T-" in view)


FIGURES = {"architecture.svg": draw_architecture, "step.svg": draw_step}


def main() -> None:
    """Command line: both figures."""
    parser = runtime.Parser(
        prog="python -m tools.architecture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the figures")
    out = parser.parse_args().out
    for name, draw in FIGURES.items():
        draw().save(out / name)
    print(f"{len(FIGURES)} figures in {out}")


if __name__ == "__main__":
    runtime.guarded(main)
