"""The figures show what is built: what training masks, the passes that a step makes, and which loss reads which.

That the drawn files are current, and the tables beside them, is tested in docs/.
"""

import re
from collections import Counter

import pytest
from conftest import tiny_batch, tiny_objective
from test_benchmark import COUNTED

from mamo import PRESETS, drop_patches, mask_patches, mask_words
from siblings import OBJECTIVES
from siblings.masking import mask_units
from tools import figures
from tools.figures import Side, traced

# What is masked in the passes of each objective: how, and how many of 16 patches or 7 words, always rounded up.
MASKED = {
    "mamo": {("token", 12), ("mask", 2)},
    "control": {("mask", 2)},
    "maskvlm": {("blank", 8), ("mask", 3)},
    "glscl": {("drop", 13), ("token", 5), ("mask", 3), ("mask", 2)},
    "vlmae": {("drop", 8), ("mask", 2)},
}


def sides_of(trace: figures.Trace) -> set[Side]:
    """All pictures and texts of the pair in which something is masked."""
    return {side for one in trace.passes for side in one[2:] if side and side.masked and not side.other}


def lines_of(objective: str) -> list[str]:
    """The figure of a step."""
    return figures.draw_step(objective).lines


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_masked_is_what_the_functions_of_training_mask(objective):
    trace = traced(objective)
    config, batch, found = trace.model.config, trace.batch, sides_of(trace)
    assert {(side.how, len(side.masked)) for side in found} == MASKED[objective]
    noise = batch["patch_noise"]
    for side in found - {side for side in found if side.how == "mask"}:
        ratio = config.mask_drop if objective == "glscl" and side.how == "drop" else config.mask_image
        if side.how == "blank":
            index, _ = mask_units(noise, ratio, config.grid, config.mask_unit)
        else:
            index, _ = {"token": mask_patches, "drop": drop_patches}[side.how](noise, ratio)
        assert side.masked == tuple(sorted(index[0].tolist()))
    ratios = {getattr(config, name) for name in ("mask_text", "mask_completion") if hasattr(config, name)}
    noise = batch["token_noise"], batch["replace_noise"]
    for ratio in ratios:
        words = mask_words(batch["input_ids"], batch["attention_mask"], *noise, ratio, config)
        assert Side("mask", tuple(sorted((words.index[0][words.valid[0]] - 1).tolist()))) in found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_figure_of_a_step_draws_every_mask_where_it_is(objective):
    """As many masked patches and words as the passes hold, and no other; a dropped patch is crossed out."""
    drawn, expected = Counter(), Counter()
    for line in lines_of(objective):
        drawn.update(how for how, fill in figures.FILLS.items() if f'fill="{fill}"' in line and 'rx="0"' in line)
        drawn.update({"mask": line.count(">?<"), "crosses": line.count(">×<")})
    for one in traced(objective).passes:
        for side in one[2:]:
            if side and (side.how != "mask" or not side.other):
                expected[side.how] += len(side.masked)
    expected["crosses"] = expected["drop"]
    assert +drawn == Counter({how: count for how, count in expected.items() if count})


LOSSES = [(name, loss) for name in OBJECTIVES for loss in traced(name).losses if loss != "ifr"]


@pytest.mark.parametrize(("objective", "loss"), LOSSES)
def test_a_dot_stands_at_every_pass_that_the_loss_alone_makes(objective, loss):
    """Counted here at each encoder, by rows, in another model and batch than the figure's. IFR cannot train alone."""
    marks = [dict(re.findall(r'data-(\w+)="([^"]*)"', line)) for line in lines_of(objective)]
    dots = Counter(mark["part"] for mark in marks if mark.get("loss") == loss)
    weights = {f"w_{name}": float(name == loss) for name in traced(objective).losses}
    model, seen = tiny_objective(objective, **weights), Counter()
    for name, part in model.named_modules():
        if name in traced(objective).parts:
            watched = part.blocks[0] if hasattr(part, "types") else part  # fusion is not always called as a whole
            watched.register_forward_hook(lambda _, given, said, name=name: seen.update({name: len(given[0])}))
    model(tiny_batch(model.config, b=5))
    assert {part: 5 * count for part, count in dots.items()} == seen


@pytest.mark.parametrize(("objective", "changes"), COUNTED, ids=str)
def test_every_pass_of_a_step_is_read_by_a_loss(objective, changes):
    """So nothing is encoded or fused in vain, whatever has a weight; the formula of costs counts as a step decides."""
    trace = figures.Trace(objective, **changes)
    unread = [trace.name(one) for one, reads in zip(trace.passes, trace.reads, strict=True) if not reads]
    assert not unread


def test_ifr_reads_the_visible_patches_and_the_teacher():
    trace = traced("vlmae")
    found = [one.part for one, reads in zip(trace.passes, trace.reads, strict=True) if "ifr" in reads]
    assert found == ["student.image", "teacher"]


def test_a_step_of_all_losses_encodes_every_view_once_and_fuses_five_in_one_call():
    trace, calls = traced("mamo"), {}
    for one in trace.passes:
        calls.setdefault((one.part, one.call), []).append(trace.name(one))
    assert {part: sorted(names) for (part, _), names in calls.items()} == {
        "student.image": ["I", "I'"],
        "student.text": ["T", "T'"],
        "student.fusion": sorted(["(I', T)", "(I, T')", "(I, T)", "(I, T⁻)", "(I⁻, T)"]),
        "teacher.image": ["I"],
        "teacher.text": ["T"],
        "teacher.fusion": ["(I, T)"],
    }
    assert len(calls) == 6


def test_the_places_that_a_loss_reads_stand_below_its_dot():
    trace = traced("mamo")
    places = {(trace.name(one), one.part): reads for one, reads in zip(trace.passes, trace.reads, strict=True)}
    assert places["(I', T)", "student.fusion"] == {"mrm": ["patches"], "mim": ["patches"]}
    assert places["(I, T')", "student.fusion"] == {"mrm": ["words"], "mlm": ["words"]}
    assert places["(I⁻, T)", "student.fusion"] == {"itm": ["[CLS]"]}
    assert places["(I, T)", "teacher.fusion"] == {"mrm": ["words", "patches"]}
    assert any(">words, patches<" in line for line in lines_of("mamo"))


def test_the_figure_of_the_architecture_says_the_sizes_of_the_presets_and_what_mamo_masks():
    text = "\n".join(figures.draw_architecture().lines)
    for field in ("image_depth", "text_depth", "fusion_depth"):
        assert f"{PRESETS['nano'][field]} blocks in nano, {PRESETS['base'][field]} in base" in text
    assert text.count(f'fill="{figures.MASKED}"') == 12 + 2


def test_a_loss_that_is_not_described_is_named(monkeypatch):
    monkeypatch.delitem(figures.LOSSES, "rmim")
    with pytest.raises(ValueError, match=r"rmim .*: add it to LOSSES"):
        figures.draw_step("vlmae")
