"""docs/objectives.md shows what is built: its drawn files are current, its tables say ratios, weights and costs.

The pictures are what `python -m tools.diagrams` draws, the two figures what `python -m tools.architecture` draws.
"""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from mamo import PRESETS
from siblings import OBJECTIVES
from tools import architecture, diagrams
from tools.costs import flops_of_step

DOCS = Path(__file__).parent
PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
TABLES = [  # of each table, objective: its cells
    {cells[0].split("`")[1]: cells for line in table.splitlines() if "`" in (cells := line.split("|")[1:])[0]}
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
]
ROWS, COSTS = TABLES
CONFIGS = {name: model.config_class(**changes) for name, (model, changes) in OBJECTIVES.items()}


def test_the_page_shows_a_picture_of_every_objective():
    shown = re.findall(r"!\[[\w ]+\]\(([\w.]+\.png)\)", PAGE)
    assert sorted(shown) == sorted(f"{name}.png" for name in OBJECTIVES)
    for file in shown:
        assert Image.open(DOCS / file).width == diagrams.WIDTH


def test_the_command_draws_the_pictures_of_the_page(tmp_path, monkeypatch):
    """Up to the shapes of letters, which are those of another version of Pillow."""
    monkeypatch.setattr(sys, "argv", ["tools/diagrams.py", "--out", str(tmp_path)])
    diagrams.main()
    for name in OBJECTIVES:
        drawn, kept = Image.open(tmp_path / f"{name}.png"), Image.open(DOCS / f"{name}.png")
        assert drawn.size == kept.size
        for number in range(len(diagrams.passes_of(name, diagrams.Sample()))):
            for patch in range(16):
                place = cell(diagrams.COLUMNS["image"], number, patch)
                assert drawn.getpixel(place) == kept.getpixel(place), f"{name}, row {number}, patch {patch}"


def cell(left: int, row: int, patch: int) -> tuple[int, int]:
    """A pixel of a sheet, near the lower right corner of a patch, where no letter stands."""
    side = diagrams.SIDE // 4
    return left + patch % 4 * side + side - 5, 46 + row * diagrams.ROW + 16 + patch // 4 * side + side - 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_says_the_ratios_that_are_the_defaults(name):
    config, (_, hidden, *_) = CONFIGS[name], ROWS[name]
    ratios = {getattr(config, field) for field in vars(config) if field.startswith("mask_") and field != "mask_id"}
    wanted = {round(100 * ratio) for ratio in ratios if isinstance(ratio, float)}
    if name == "control":
        wanted = {round(100 * config.mask_text)}  # nothing hides patches
    assert {int(number) for number in re.findall(r"(\d+) %", hidden)} == wanted


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_says_the_weights_that_are_the_defaults(name):
    own = {loss: weight for loss, weight in CONFIGS[name].weights.items() if weight and loss not in ("itc", "itm")}
    said = [float(weight) for weight in re.findall(r"\(([\d.]+)(?: \+ [\d.]+)?\)", ROWS[name][4])]
    assert sorted(said) == sorted(own.values())


def test_the_table_says_the_depths_of_the_decoders():
    assert f"a decoder of {CONFIGS['maskvlm'].decoder_depth} blocks" in ROWS["maskvlm"][5]
    assert f"a decoder of {CONFIGS['vlmae'].decoder_depth} blocks" in ROWS["vlmae"][5]
    assert f"units of {CONFIGS['maskvlm'].mask_unit} x {CONFIGS['maskvlm'].mask_unit}" in ROWS["maskvlm"][1]


@pytest.mark.parametrize(("preset", "length", "words", "column"), [("nano", 14, 125, 1), ("base", 30, 30522, 2)])
def test_the_table_of_costs_is_what_the_formula_says(preset, length, words, column):
    counted = {}
    for name, (model, changes) in OBJECTIVES.items():
        config = model.config_class(**PRESETS[preset], **changes, vocab_size=words)
        counted[name] = flops_of_step(config, 64, length)
    control = sum(counted["control"].values())
    for name, parts in counted.items():
        assert COSTS[name][column].strip() == f"{sum(parts.values()) / control:.2f}", f"{name} in {preset}"
        if preset == "base":
            shares = [100 * parts[part] / sum(parts.values()) for part in parts if part != "contrast"]
            assert [cell.strip() for cell in COSTS[name][3:8]] == [f"{share:.0f} %" for share in shares], name


@pytest.mark.parametrize("name", architecture.FIGURES)
def test_the_command_draws_the_figures_that_are_shown(name, tmp_path):
    architecture.FIGURES[name]().save(tmp_path / name)
    assert (tmp_path / name).read_text() == (DOCS / name).read_text(), f"docs/{name} is old"
    pages = [PAGE, (DOCS.parent / "README.md").read_text(encoding="utf-8")]
    assert any(f"{name})" in page for page in pages), f"no page shows {name}"
