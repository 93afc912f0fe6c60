"""docs/objectives.md shows what is built: its figures are drawn from it, its tables say ratios, weights and costs."""

import re
from pathlib import Path

import pytest

from mamo import PRESETS
from siblings import OBJECTIVES
from tools import figures
from tools.costs import flops_of_step

DOCS = Path(__file__).parent
PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
TABLES = [  # of each table, objective: its cells
    {cells[0].split("`")[1]: cells for line in table.splitlines() if "`" in (cells := line.split("|")[1:])[0]}
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
]
ROWS, COSTS = TABLES
CONFIGS = {name: model.config_class(**changes) for name, (model, changes) in OBJECTIVES.items()}


def test_the_page_shows_a_figure_of_every_objective():
    shown = re.findall(r"!\[[\w ]+\]\((\w+)\.svg\)", PAGE)
    assert sorted(shown) == sorted([*OBJECTIVES, "video"])


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_command_draws_the_figures_that_are_shown(name, tmp_path):
    figures.FIGURES[name]().save(tmp_path / name)
    same = (tmp_path / name).read_text(encoding="utf-8") == (DOCS / name).read_text(encoding="utf-8")
    assert same, f"docs/{name} is old: python -m tools.figures"
    pages = [PAGE, *(path.read_text(encoding="utf-8") for path in (DOCS.parent / "README.md", DOCS / "results.md"))]
    assert any(f"{name})" in page for page in pages), f"no page shows {name}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_says_the_ratios_that_are_the_defaults(name):
    config, (_, masked, *_) = CONFIGS[name], ROWS[name]
    ratios = {getattr(config, field) for field in vars(config) if field.startswith("mask_") and field != "mask_id"}
    wanted = {round(100 * ratio) for ratio in ratios if isinstance(ratio, float)}
    if name == "control":
        wanted = {round(100 * config.mask_text)}  # nothing masks patches
    assert {int(number) for number in re.findall(r"(\d+) %", masked)} == wanted


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_says_the_weights_that_are_the_defaults(name):
    own = {loss: weight for loss, weight in CONFIGS[name].loss_weights.items() if weight and loss not in ("itc", "itm")}
    said = [float(weight) for weight in re.findall(r"\(([\d.]+)(?: \+ [\d.]+)?\)", ROWS[name][4])]
    assert sorted(said) == sorted(own.values())


def test_the_table_says_the_depths_of_the_decoders():
    assert f"a decoder of {CONFIGS['maskvlm'].decoder_depth} blocks" in ROWS["maskvlm"][2]
    assert f"a decoder of {CONFIGS['vlmae'].decoder_depth} blocks" in ROWS["vlmae"][2]
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
