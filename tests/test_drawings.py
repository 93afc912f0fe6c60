"""What the drawings say is built: the pictures hide what training hides, the figures show the passes of a step.

That the drawn files are current, and the tables beside them, is tested in docs/.
"""

import math
import re

import pytest
from conftest import LOSSES, only, tiny_batch, tiny_config, tiny_model

from mamo import PRESETS
from siblings import OBJECTIVES
from tools import architecture, diagrams

CONFIGS = {name: model.config_class(**changes) for name, (model, changes) in OBJECTIVES.items()}


def cell(left: int, row: int, patch: int) -> tuple[int, int]:
    """A pixel of a sheet, near the lower right corner of a patch, where no letter stands."""
    side = diagrams.SIDE // 4
    return left + patch % 4 * side + side - 5, 46 + row * diagrams.ROW + 16 + patch // 4 * side + side - 3


@pytest.mark.parametrize(
    ("name", "row", "hidden", "colour"),
    [
        ("control", 0, 0, (74, 90, 120)),
        ("mamo", 0, 12, (74, 90, 120)),
        ("maskvlm", 0, 8, (127, 127, 127)),
        ("glscl", 0, 13, (255, 255, 255)),
        ("glscl", 2, 5, (74, 90, 120)),
        ("vlmae", 0, 8, (255, 255, 255)),
        ("vlmae", 1, 8, (255, 255, 255)),
    ],
)
def test_a_picture_hides_what_training_hides(name, row, hidden, colour):
    sample = diagrams.Sample()
    one = diagrams.passes_of(name, sample)[row]
    assert len(one.patches) == hidden
    sheet = diagrams.Sheet(name, sample).image
    found = {p for p in range(16) if sheet.getpixel(cell(180, row, p)) == colour}
    assert found == set(one.patches)


def test_words_are_hidden_at_the_ratio_of_the_objective():
    """Seven words: 25 % are two, 30 % three, 15 % two, 40 % three; always rounded up."""
    counts = {name: int(diagrams.passes_of(name, diagrams.Sample())[-1].words.valid.sum()) for name in OBJECTIVES}
    assert counts == {name: math.ceil(7 * config.mask_text) for name, config in CONFIGS.items()}
    assert int(diagrams.passes_of("glscl", diagrams.Sample())[1].words.valid.sum()) == 3


@pytest.mark.parametrize("loss", LOSSES)
def test_the_figure_of_a_step_has_a_dot_for_every_pass_that_the_loss_alone_makes(loss):
    """Counted here at each encoder, by rows, in another model and batch than the figure's."""
    drawn = [dict(re.findall(r'data-(\w+)="([^"]*)"', line)) for line in architecture.draw_step().lines]
    config = tiny_config(**only(loss))
    model, seen = tiny_model(config), {}
    for network in ("student", "teacher"):
        for part in ("image", "text", "fusion"):
            encoder = getattr(getattr(model, network), part, None)
            watched = encoder.blocks[0] if encoder is not None and part == "fusion" else encoder
            if watched is not None:
                name = f"{network} {part}"
                watched.register_forward_hook(
                    lambda _, given, said, name=name: seen.update({name: seen.get(name, 0) + len(given[0])})
                )
    model(tiny_batch(config, b=5))
    dots = [mark["part"] for mark in drawn if mark.get("loss") == loss]
    assert {part: 5 * dots.count(part) for part in set(dots)} == seen


def test_a_step_of_all_losses_encodes_every_view_once_and_fuses_five_in_one_call():
    calls = architecture.trace()
    assert calls["student", "image"] == [["I", "I'"]] and calls["student", "text"] == [["T", "T'"]]
    assert [sorted(views) for views in calls["student", "fusion"]] == [sorted(["I'T", "IT'", "IT", "IT-", "I-T"])]
    assert [calls["teacher", part] for part in ("image", "text", "fusion")] == [[["I"]], [["T"]], [["IT"]]]


def test_the_figure_of_the_architecture_says_the_sizes_of_the_presets():
    text = "\n".join(architecture.draw_architecture().lines)
    for field in ("image_depth", "text_depth", "fusion_depth"):
        assert f"{PRESETS['nano'][field]} blocks in nano, {PRESETS['base'][field]} in base" in text
    patches, words = architecture.hidden_places()
    assert len(patches) == 12 and len(words) == 2
    assert text.count(f'fill="{architecture.HIDDEN}"') == len(patches) + len(words)
