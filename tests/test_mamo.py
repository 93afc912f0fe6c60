"""The model: what may leak and what may not, the teacher, the queue, the cost of a step, attention, errors, learning.

The losses themselves are compared with their equations in test_losses.py.
"""

import io
import itertools
import math
from collections import deque

import pytest
import torch
from conftest import (
    LOSSES,
    MASK,
    ORDINARY,
    lengthen,
    make_same,
    only,
    tiny_batch,
    tiny_config,
    tiny_model,
    total,
)
from torch import Tensor, nn

from mamo import (
    MAMO,
    PRESETS,
    Attention,
    Block,
    MAMOConfig,
    Queue,
    View,
    at,
    ema_for,
    mask_patches,
    mask_words,
    record_attention,
)

SUBSETS = [names for size in range(1, 6) for names in itertools.combinations(LOSSES, size)]
HEADS = ("mrm_image_head", "mrm_text_head", "mim_head", "mlm_head")


def watch(model: MAMO, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step, with what the student recovers and what it is asked for.

    "<head> sees" and "<head> says": input (b, m, d) and output of each head, at the hidden positions;
    "patch_target", "word_target", "visual_target" (b, m, d); "labels" (b, m); and the losses by name.
    """
    seen, handles = {}, []
    for name in HEADS:

        def keep(module, given, said, name=name):
            seen[f"{name} sees"], seen[f"{name} says"] = given[0].detach(), said.detach()

        handles.append(getattr(model, name).register_forward_hook(keep))
    loss_mrm, loss_mim, loss_mlm = model.loss_mrm, model.loss_mim, model.loss_mlm

    def spy_mrm(at_patches, patch_target, at_words, word_target, valid):
        seen["patch_target"], seen["word_target"] = patch_target, word_target
        return loss_mrm(at_patches, patch_target, at_words, word_target, valid)

    def spy_mim(at_patches, target):
        seen["visual_target"] = target
        return loss_mim(at_patches, target)

    def spy_mlm(at_words, labels, valid):
        seen["labels"] = labels
        return loss_mlm(at_words, labels, valid)

    model.loss_mrm, model.loss_mim, model.loss_mlm = spy_mrm, spy_mim, spy_mlm
    try:
        return seen | model(batch)
    finally:
        del model.loss_mrm, model.loss_mim, model.loss_mlm
        for handle in handles:
            handle.remove()


def hidden_words(config: MAMOConfig, batch: dict[str, Tensor]):
    names = ("input_ids", "attention_mask", "token_noise", "replace_noise")
    return mask_words(*(batch[name] for name in names), config.mask_text, config)


def with_pixels(config: MAMOConfig, batch: dict[str, Tensor], patch_mask: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The batch with new random pixels in the patches where patch_mask (b, n) is True; written with plain loops."""
    images, p, columns = batch["images"].clone(), config.patch_size, config.grid[1]
    draw = torch.Generator().manual_seed(seed)
    for i, k in patch_mask.nonzero().tolist():
        y, x = k // columns * p, k % columns * p
        images[i, :, y : y + p, x : x + p] = torch.rand(3, p, p, generator=draw)
    return batch | {"images": images}


def changed_slots(one: Tensor, other: Tensor) -> list[list[int]]:
    """Where two tensors (b, m, d) differ in any feature: [[row, slot], ...]."""
    return ((one - other).abs().amax(dim=-1) > 1e-6).nonzero().tolist()


# ------------------------------------------------------------------------------------------------- nothing hidden leaks


@pytest.mark.parametrize("drop_masked", [False, True])
def test_hidden_patches_cannot_leak(drop_masked):
    """New pixels in the hidden patches change not one bit of what the student fuses and says for (I', T)."""
    model = tiny_model(tiny_config(drop_masked=drop_masked))
    batch = tiny_batch(model.config)
    _, patch_mask = mask_patches(batch["patch_noise"], model.config.mask_image)
    other = with_pixels(model.config, batch, patch_mask)
    before, after = watch(model, batch), watch(model, other)
    for name in ("mrm_image_head sees", "mrm_image_head says", "mim_head sees", "mim_head says"):
        assert torch.equal(before[name], after[name]), name

    real = batch["attention_mask"]
    text = model.encode_text(batch["input_ids"], real)
    fused = [model.fuse(model.encode_image(x["images"], patch_mask), text, real) for x in (batch, other)]
    assert all(torch.equal(one, two) for one, two in zip(*fused, strict=True))

    # The passes that see the whole picture do change: the new pixels are not lost.
    for name in ("mlm_head sees", "visual_target", "patch_target", "word_target"):
        assert not torch.equal(before[name], after[name]), name
    assert before["itc"] != after["itc"] and before["itm"] != after["itm"]


def test_visible_patches_and_the_text_are_used_to_recover_patches():
    model = tiny_model()
    batch = tiny_batch(model.config)
    _, patch_mask = mask_patches(batch["patch_noise"], model.config.mask_image)
    words = batch["input_ids"].clone()
    words[:, 1] = ORDINARY[0]
    before = watch(model, batch)
    for other in (with_pixels(model.config, batch, ~patch_mask), batch | {"input_ids": words}):
        after = watch(model, other)
        for name in ("mrm_image_head sees", "mim_head says"):
            assert not torch.equal(before[name], after[name])


def test_hidden_words_cannot_leak():
    """Other words under [MASK] or under a random word change not one bit of what the student fuses for (I, T')."""
    model = tiny_model()
    batch = tiny_batch(model.config, b=40, l=14)
    words = hidden_words(model.config, batch)
    replaced = words.valid & (batch["replace_noise"].gather(1, words.index) < 0.9)
    by_mask = replaced & (words.input_ids.gather(1, words.index) == MASK)
    assert by_mask.any() and (replaced & ~by_mask).any() and (words.valid & ~replaced).any(), (
        "all three kinds are tested"
    )

    def with_words(slots: Tensor) -> dict[str, Tensor]:
        """The batch with another ordinary word at the given slots."""
        input_ids = batch["input_ids"].clone()
        for i, slot in slots.nonzero().tolist():
            k = words.index[i, slot]
            input_ids[i, k] = ORDINARY[(ORDINARY.index(int(input_ids[i, k])) + 7) % len(ORDINARY)]
        return batch | {"input_ids": input_ids}

    before, after = watch(model, batch), watch(model, with_words(replaced))
    for name in ("mrm_text_head sees", "mrm_text_head says", "mlm_head sees", "mlm_head says"):
        assert torch.equal(before[name], after[name]), name
    for name in ("labels", "mim_head sees", "patch_target", "word_target"):
        assert not torch.equal(before[name], after[name]), name
    assert before["itc"] != after["itc"] and before["itm"] != after["itm"]

    # A chosen word that stays is seen, as in BERT.
    kept = watch(model, with_words(words.valid & ~replaced))
    assert not torch.equal(before["mlm_head sees"], kept["mlm_head sees"])


def test_the_picture_is_used_to_recover_words():
    model = tiny_model()
    batch = tiny_batch(model.config)
    other = batch | {"images": batch["images"].flip(0)}
    assert not torch.equal(watch(model, batch)["mlm_head sees"], watch(model, other)["mlm_head sees"])


def test_a_pass_hides_patches_or_words_but_never_both():
    """Another choice of words changes not one bit of (I', T), another choice of patches not one of (I, T')."""
    model = tiny_model()
    batch = tiny_batch(model.config)
    before = watch(model, batch)
    other_words = {name: batch[name].flip(1) for name in ("token_noise", "replace_noise")}
    other_patches = {"patch_noise": batch["patch_noise"].flip(1)}
    for noise, same, other in ((other_words, "mim", "mlm"), (other_patches, "mlm", "mim")):
        after = watch(model, batch | noise)
        assert torch.equal(before[f"{same}_head sees"], after[f"{same}_head sees"])
        assert not torch.equal(before[f"{other}_head sees"], after[f"{other}_head sees"])


def without_mixing(model: MAMO) -> MAMO:
    """The model with attention and MLPs silenced: every vector follows from its own patch or word and its position."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Block):
                for silenced in (module.attention.out, module.mlp[-1]):
                    silenced.weight.zero_()
                    silenced.bias.zero_()
    return model


def test_a_distinctive_patch_is_asked_for_in_its_own_slot():
    """Targets: a patch that changes alone changes the target of its own slot. Student: its position answers there."""
    model = without_mixing(tiny_model())
    batch = tiny_batch(model.config, b=3)
    index, _ = mask_patches(batch["patch_noise"], model.config.mask_image)
    before = watch(model, batch)
    for slot in range(index.shape[1]):
        k = int(index[1, slot])
        one_patch = torch.zeros(3, model.config.num_patches, dtype=torch.bool)
        one_patch[1, k] = True
        after = watch(model, with_pixels(model.config, batch, one_patch))
        assert changed_slots(before["visual_target"], after["visual_target"]) == [[1, slot]]
        assert changed_slots(before["patch_target"], after["patch_target"]) == [[1, slot]]
        assert not changed_slots(before["word_target"], after["word_target"])

        with torch.no_grad():
            model.student.image.positions[1 + k, 0] += 1.0
        moved = watch(model, batch)
        with torch.no_grad():
            model.student.image.positions[1 + k, 0] -= 1.0
        expected = (index == k).nonzero().tolist()
        assert changed_slots(before["mrm_image_head sees"], moved["mrm_image_head sees"]) == expected
        assert changed_slots(before["mim_head sees"], moved["mim_head sees"]) == expected


def test_a_distinctive_word_is_asked_for_in_its_own_slot():
    """As for patches: label and target of a word stand in its own slot, and its position answers there."""
    model = without_mixing(tiny_model(tiny_config(mask_text=0.5)))
    batch = tiny_batch(model.config, b=3, l=12)
    words = hidden_words(model.config, batch)
    before = watch(model, batch)
    for slot in words.valid[0].nonzero().flatten().tolist():
        k = int(words.index[0, slot])
        input_ids = batch["input_ids"].clone()
        input_ids[0, k] = new = ORDINARY[(ORDINARY.index(int(input_ids[0, k])) + 5) % len(ORDINARY)]
        after = watch(model, batch | {"input_ids": input_ids})
        assert changed_slots(before["word_target"], after["word_target"]) == [[0, slot]]
        assert (before["labels"] != after["labels"]).nonzero().tolist() == [[0, slot]]
        assert after["labels"][0, slot] == new
        assert not changed_slots(before["patch_target"], after["patch_target"])

        with torch.no_grad():
            model.student.text.positions[k, 0] += 1.0
        moved = watch(model, batch)
        with torch.no_grad():
            model.student.text.positions[k, 0] -= 1.0
        expected = (words.index == k).nonzero().tolist()
        assert changed_slots(before["mlm_head sees"], moved["mlm_head sees"]) == expected
        assert changed_slots(before["mrm_text_head sees"], moved["mrm_text_head sees"]) == expected


def targets_by_position(model: MAMO, batch: dict[str, Tensor]) -> dict[tuple, Tensor]:
    """Every target of a step under the place it belongs to: {(kind, row, position): vector}."""
    seen = watch(model, batch)
    index, _ = mask_patches(batch["patch_noise"], model.config.mask_image)
    words = hidden_words(model.config, batch)
    found = {}
    for i in range(len(index)):
        for slot, k in enumerate(index[i].tolist()):
            found["mrm patch", i, k], found["mim", i, k] = seen["patch_target"][i, slot], seen["visual_target"][i, slot]
        for slot, k in enumerate(words.index[i].tolist()):
            if words.valid[i, slot]:
                found["mrm word", i, k] = seen["word_target"][i, slot]
    return found


def test_targets_do_not_depend_on_the_mask():
    """A position that two masks hide has the same target under both; the teacher sees the whole pair."""
    model = tiny_model(tiny_config(mask_image=0.5, mask_text=0.5))
    batch = tiny_batch(model.config, l=14)
    draw = torch.Generator().manual_seed(9)
    noise = {
        name: torch.rand(batch[name].shape, generator=draw) for name in ("patch_noise", "token_noise", "replace_noise")
    }
    one, other = targets_by_position(model, batch), targets_by_position(model, batch | noise)
    assert one.keys() != other.keys()
    for kind in ("mrm patch", "mrm word", "mim"):
        shared = [place for place in one.keys() & other.keys() if place[0] == kind]
        assert len(shared) > 5
        for place in shared:
            torch.testing.assert_close(one[place], other[place], rtol=0, atol=1e-5)


def test_mrm_targets_depend_on_image_and_caption_and_mim_targets_on_the_image():
    model = tiny_model()
    batch = tiny_batch(model.config, b=4)
    one = targets_by_position(model, batch)
    new_image = batch | {"images": batch["images"].roll(1, 0)}
    words = batch["input_ids"].clone()
    words[:, 1] = torch.tensor(ORDINARY[:4])
    for changed, untouched in ((new_image, ()), (batch | {"input_ids": words}, ("mim",))):
        other = targets_by_position(model, changed)
        assert one.keys() == other.keys()
        for place in one:
            assert torch.equal(one[place], other[place]) == (place[0] in untouched), place


# ---------------------------------------------------------------------------------------------------------- the teacher


def test_teacher_starts_as_a_copy():
    torch.manual_seed(0)
    model = MAMO(tiny_config())
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    for name in student:
        assert torch.equal(student[name], teacher[name])
        assert student[name].data_ptr() != teacher[name].data_ptr()


def test_teacher_gets_no_gradient():
    """No gradient arrives, none is asked for, and what an optimiser may train has nothing of the teacher."""
    model = tiny_model(tiny_config(queue_size=4))
    total(model, model(tiny_batch(model.config))).backward()
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    for parameter in model.teacher.parameters():
        assert not parameter.requires_grad and parameter.grad is None
        assert parameter.data_ptr() not in trained
    seen = watch(model, tiny_batch(model.config))
    assert not any(seen[name].requires_grad for name in ("patch_target", "word_target", "visual_target"))


def test_the_student_is_not_pulled_through_the_targets():
    """A student that is its own teacher would get another gradient: targets come from the teacher's weights alone."""
    model = tiny_model()
    batch = tiny_batch(model.config)
    before = watch(model, batch)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = watch(model, batch)
    for name in ("patch_target", "word_target", "visual_target"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["mim_head sees"], after["mim_head sees"])


@pytest.mark.parametrize("ema", [0.0, 0.8, 0.995, 1.0])
def test_teacher_follows_the_closed_form_of_the_moving_average(ema: float):
    """teacher_k = m^k teacher_0 + sum over steps of (1 - m) m^(k - step) student_step, for a student that moves."""
    model = tiny_model(tiny_config(ema=ema)).double()
    start = [parameter.clone() for parameter in model.teacher.parameters()]
    history = []
    for _ in range(7):
        with torch.no_grad():
            for parameter in model.student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        history.append([parameter.detach().clone() for parameter in model.student.parameters()])
        model.after_step()
    for i, parameter in enumerate(model.teacher.parameters()):
        expected = ema**7 * start[i] + sum((1 - ema) * ema ** (6 - step) * history[step][i] for step in range(7))
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12)


def test_after_step_leaves_the_student_alone_and_keeps_the_temperature_in_bounds():
    model = tiny_model()
    before = [parameter.clone() for parameter in model.student.parameters()]
    for given, kept in ((-20.0, 0.001), (3.0, 0.5), (math.log(0.1), 0.1)):
        with torch.no_grad():
            model.log_temperature.fill_(given)
        model.after_step()
        assert model.temperature.item() == pytest.approx(kept, rel=1e-5)
    assert all(torch.equal(old, new) for old, new in zip(before, model.student.parameters(), strict=True))


def test_teacher_is_free_of_dropout_in_training():
    """Two steps differ in what the student says and agree in the targets."""
    model = tiny_model(tiny_config(dropout=0.4)).train()
    assert model.student.training and model.mlm_head.training
    assert not any(module.training for module in model.teacher.modules())
    batch = tiny_batch(model.config)
    one, other = watch(model, batch), watch(model, batch)
    assert not torch.equal(one["mim_head sees"], other["mim_head sees"])
    for name in ("patch_target", "word_target", "visual_target"):
        assert torch.equal(one[name], other[name])
    assert not any(module.training for module in model.eval().modules())


def test_ema_for_gives_a_half_life_of_a_share_of_the_run():
    for steps in (500, 2000, 8000):
        assert ema_for(steps) ** (0.015 * steps) == pytest.approx(0.5, abs=0.05)
    assert ema_for(1_000_000) == 0.995 and 0 <= ema_for(1) <= ema_for(100) <= ema_for(1000)


# ------------------------------------------------------------------------------------------------ queue and batch sizes


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_queue_takes_any_batch_size(size: int):
    """After every push it holds the last rows, each with its own ids, and says which slots are filled."""
    queue, kept, draw = Queue(size, 4), deque(maxlen=size), torch.Generator().manual_seed(size)
    for b in (1, 2, 10, 3, 7, 4, 9, 5, 6, 8):
        image, text = torch.rand(b, 4, generator=draw), torch.rand(b, 4, generator=draw)
        ids = torch.randint(2**62, (2, b), generator=draw)
        queue.push(image, text, ids[0], ids[1])
        rows = zip(ids[0].tolist(), ids[1].tolist(), image.tolist(), text.tolist(), strict=True)
        kept.extend(rows)
        assert queue.filled.sum() == len(kept)
        held = zip(
            *(x[queue.filled].tolist() for x in (queue.image_id, queue.caption_id, queue.image, queue.text)),
            strict=True,
        )
        assert sorted(held) == sorted(kept)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_the_step_takes_any_batch_size_with_any_queue(size: int):
    """The candidates are those of the batch and the filled slots: with all vectors alike the loss counts them."""
    model = tiny_model(tiny_config(queue_size=size, **only("itc")))
    for network in (model.student, model.teacher):
        for projection in (network.image_projection, network.text_projection):
            nn.init.zeros_(projection.weight)
            nn.init.ones_(projection.bias)
    held = 0
    for b in range(2, 11):
        loss = model(tiny_batch(model.config, b=b, seed=b))["itc"]
        assert loss.item() == pytest.approx(math.log(b + held), rel=1e-5)
        held = min(held + b, size)
    model.eval()
    model(tiny_batch(model.config, b=2, seed=99))
    assert model(tiny_batch(model.config, b=2, seed=98))["itc"].item() == pytest.approx(math.log(2 + held), rel=1e-5)


def test_pairs_of_the_same_image_or_caption_are_not_contrasted():
    """With all vectors alike, the contrast of each row counts the candidates that share nothing with it, and itself."""
    model = tiny_model(tiny_config(**only("itc")))
    for projection in (model.student.image_projection, model.student.text_projection):
        nn.init.zeros_(projection.weight)
        nn.init.ones_(projection.bias)
    batch = make_same(tiny_batch(model.config, b=5), image=[(0, 1), (0, 2)], caption=[(3, 1)])
    # Row 0: 1, 2 left out. Row 1: 0, 2, 3. Row 2: 0, 1. Row 3: 1. Row 4: nobody.
    expected = sum(math.log(count) for count in (3, 2, 3, 4, 5)) / 5
    assert model(batch)["itc"].item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_two_works_and_a_batch_of_one_is_refused():
    model = tiny_model(tiny_config(queue_size=3))
    losses = model(tiny_batch(model.config, b=2))
    assert all(loss.isfinite() for loss in losses.values())
    total(model, losses).backward()
    with pytest.raises(ValueError, match="holds one pair"):
        model(tiny_batch(model.config, b=1))


# --------------------------------------------------------------------------------------------------- the cost of a step

# Weights that are on; rows in units of the batch: student image, text, fusion; teacher image, text, fusion.
PLAN = [
    (LOSSES, 0, (2, 2, 5), (1, 1, 1)),
    (LOSSES, 4, (2, 2, 5), (1, 1, 1)),
    (("itm", "mrm", "mim", "mlm"), 0, (2, 2, 5), (1, 1, 1)),
    (("itc", "mrm", "mim", "mlm"), 0, (2, 2, 2), (1, 1, 1)),
    (("itc", "itm", "mim", "mlm"), 0, (2, 2, 5), (1, 0, 0)),
    (("itc", "itm", "mrm", "mlm"), 0, (2, 2, 5), (1, 1, 1)),
    (("itc", "itm", "mrm", "mim"), 0, (2, 2, 5), (1, 1, 1)),
    (("itc", "itm", "mlm"), 0, (1, 2, 4), (0, 0, 0)),
    (("itc", "itm", "mim"), 0, (2, 1, 4), (1, 0, 0)),
    (("itc", "itm"), 0, (1, 1, 3), (0, 0, 0)),
    (("mim", "mlm"), 0, (2, 2, 2), (1, 0, 0)),
    (("itc",), 0, (1, 1, 0), (0, 0, 0)),
    (("itc",), 4, (1, 1, 0), (1, 1, 0)),
    (("itm",), 0, (1, 1, 3), (0, 0, 0)),
    (("mrm",), 0, (2, 2, 2), (1, 1, 1)),
    (("mim",), 0, (1, 1, 1), (1, 0, 0)),
    (("mlm",), 0, (1, 1, 1), (0, 0, 0)),
]


@pytest.mark.parametrize(
    ("losses", "queue_size", "student", "teacher"), PLAN, ids=[f"{'+'.join(row[0])}-{row[1]}" for row in PLAN]
)
def test_every_distinct_input_is_encoded_once(losses, queue_size, student, teacher):
    """Rows that each encoder sees in a step, and one call at most of each: a loss of weight 0 costs nothing."""
    model = tiny_model(tiny_config(queue_size=queue_size, **only(*losses)))
    b, rows, calls = 3, {}, {}

    def count(name: str, seen: int) -> None:
        rows[name], calls[name] = rows.get(name, 0) + seen, calls.get(name, 0) + 1

    for side, network in (("student", model.student), ("teacher", model.teacher)):
        if network is None:
            continue
        for part in ("image", "text"):
            getattr(network, part).register_forward_hook(
                lambda module, given, said, name=(side, part): count(name, len(said))
            )
        if network.fusion is not None:
            # The first block of the fusion encoder runs for whatever is fused, by whatever method.
            network.fusion.blocks[0].register_forward_hook(
                lambda module, given, said, name=(side, "fusion"): count(name, len(said))
            )
    found = model(tiny_batch(model.config, b=b))
    assert set(found) == set(losses)
    parts = [(side, part) for side in ("student", "teacher") for part in ("image", "text", "fusion")]
    assert {name: rows.get(name, 0) / b for name in parts} == dict(zip(parts, student + teacher, strict=True))
    assert max(calls.values()) == 1


@pytest.mark.parametrize("losses", SUBSETS, ids="+".join)
def test_every_parameter_gets_a_gradient_whatever_losses_are_on(losses):
    """No parameter is made that no loss uses, so that processes which average gradients need not look for them."""
    model = tiny_model(tiny_config(queue_size=3 if "itc" in losses else 0, **only(*losses)))
    found = model(tiny_batch(model.config, b=3))
    assert set(found) == set(losses)
    total(model, found).backward()
    unused = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
    assert not unused
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)


# -------------------------------------------------------------------------------------------------- attention and heads


def test_attention_equals_its_formula():
    """softmax(q k / sqrt(d / h)) v, head by head and query by query, over the real tokens."""
    torch.manual_seed(0)
    layer = Attention(16, 2).double()
    queries, hidden = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    real = torch.tensor([[True] * 5, [True, True, False, True, False]])
    q, (k, v) = layer.query(queries), layer.key_value(hidden).chunk(2, dim=-1)
    mixed = torch.zeros(2, 3, 16).double()
    for b, row, head in itertools.product(range(2), range(3), range(2)):
        features = slice(8 * head, 8 * head + 8)
        keys = [j for j in range(5) if real[b, j]]
        weights = [math.exp((q[b, row, features] @ k[b, j, features]).item() / math.sqrt(8)) for j in keys]
        mixed[b, row, features] = sum(w / sum(weights) * v[b, j, features] for w, j in zip(weights, keys, strict=True))
    torch.testing.assert_close(layer(queries, hidden, real), layer.out(mixed))


def test_the_encoders_are_a_vit_and_two_halves_of_a_bert():
    """Norm first and a final norm for the image; norm last for text and fusion; a type for each modality."""
    model = tiny_model()
    batch = tiny_batch(model.config, b=2, l=9)
    real, student = batch["attention_mask"], model.student

    hidden = student.image.patch_embedding(
        torch.stack([x.reshape(3, 4, 4, 6, 4).permute(1, 3, 0, 2, 4).reshape(24, 48) for x in batch["images"]])
    )
    hidden = torch.cat([student.image.class_token.repeat(2, 1, 1), hidden], dim=1) + student.image.positions
    for block in student.image.blocks:
        hidden = hidden + block.attention(block.norm1(hidden), block.norm1(hidden))
        hidden = hidden + block.mlp(block.norm2(hidden))
    image = model.encode_image(batch["images"])
    torch.testing.assert_close(image, student.image.norm(hidden), rtol=1e-4, atol=1e-5)

    def bert(blocks, hidden: Tensor, real: Tensor) -> Tensor:
        for block in blocks:
            hidden = block.norm1(hidden + block.attention(hidden, hidden, real))
            hidden = block.norm2(hidden + block.mlp(hidden))
        return hidden

    words = student.text.words.weight[batch["input_ids"]] + student.text.positions[:9]
    text = model.encode_text(batch["input_ids"], real)
    torch.testing.assert_close(text, bert(student.text.blocks, student.text.norm(words), real), rtol=1e-4, atol=1e-5)

    both = torch.cat([text + student.fusion.types[0], image + student.fusion.types[1]], dim=1)
    expected = bert(student.fusion.blocks, both, torch.cat([real, torch.ones(2, 25, dtype=torch.bool)], dim=1))
    fused = model.fuse(image, text, real)
    torch.testing.assert_close(torch.cat([fused.text, fused.image], dim=1), expected, rtol=1e-4, atol=1e-5)


def test_recorded_attention_adds_up_and_changes_nothing():
    """Rows of every map sum to 1, padding gets 0, the output is the fused kernel's, recording ends with the block."""
    model = tiny_model()
    batch = tiny_batch(model.config, b=4, l=10)
    images, input_ids, real = batch["images"], batch["input_ids"], batch["attention_mask"]

    def all_three():
        image, text = model.encode_image(images), model.encode_text(input_ids, real)
        return image, text, *model.fuse(image, text, real)

    plain = all_three()
    with record_attention(model.student) as maps:
        recorded = all_three()
    for one, other in zip(plain, recorded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    n, l = model.config.num_patches, 10  # noqa: E741
    sides = [1 + n] * 2 + [l] * 2 + [l + 1 + n] * 2
    assert [layer[0].shape for layer in maps] == [(4, 2, side, side) for side in sides]
    for layer in maps:
        assert len(layer) == 1
        torch.testing.assert_close(layer[0].sum(dim=-1), torch.ones(layer[0].shape[:3]))
    for layer in maps[2:]:
        to_text = layer[0][..., :l]
        padding = ~real[:, None, None].expand_as(to_text)
        assert padding.any() and (to_text[padding] == 0).all() and (to_text[~padding] > 0).all()

    with pytest.raises(KeyError), record_attention(model):
        raise KeyError
    assert all(layer.recorded is None for layer in model.modules() if isinstance(layer, Attention))


def test_a_block_at_some_positions_equals_the_whole_block_there():
    """In the norm-last blocks of the fusion encoder, with positions in any order and some asked for twice."""
    torch.manual_seed(0)
    block = Block(tiny_config(), norm_first=False)
    hidden, real = torch.randn(3, 7, 16), torch.rand(3, 7) > 0.3
    real[:, 0] = True
    index = torch.tensor([[0, 6, 2], [5, 5, 1], [3, 0, 4]])
    expected = torch.stack([block(hidden, real)[i, index[i]] for i in range(3)])
    torch.testing.assert_close(block(hidden, real, index), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(at(hidden, index), torch.stack([hidden[i, index[i]] for i in range(3)]))


def test_the_last_block_at_some_positions_equals_the_full_fusion_there():
    model = tiny_model()
    batch = tiny_batch(model.config, l=10)
    real = batch["attention_mask"]
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["input_ids"], real)
    fused, fusion = model.fuse(image, text, real), model.student.fusion
    assert torch.equal(fused.pair, fused.text[:, 0])
    index = torch.tensor([[0, 1, 10, 11, 34]]).repeat(
        5, 1
    )  # [CLS], a word, the class token, the first and the last patch
    (some,) = fusion.fuse_views(View(image, text, real, index))
    expected = torch.stack(
        [fused.pair, fused.text[:, 1], fused.image[:, 0], fused.image[:, 1], fused.image[:, 24]], dim=1
    )
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)


def test_match_and_score_agree_with_their_parts():
    """match is the difference of the two ITM logits of the pair vector; score is cosine and probability of matching."""
    model = tiny_model()
    batch = tiny_batch(model.config)
    images, input_ids, real = batch["images"], batch["input_ids"], batch["attention_mask"]
    image, text = model.encode_image(images), model.encode_text(input_ids, real)
    logits = model.itm_head(model.fuse(image, text, real).pair)
    torch.testing.assert_close(model.match(image, text, real), logits[:, 1] - logits[:, 0], rtol=1e-4, atol=1e-5)

    scores = model.score(images, input_ids, real)
    torch.testing.assert_close(scores["itm"], logits.softmax(dim=-1)[:, 1], rtol=1e-4, atol=1e-5)
    x, y = model.student.image_projection(image[:, 0]), model.student.text_projection(text[:, 0])
    torch.testing.assert_close(scores["itc"], torch.cosine_similarity(x, y), rtol=1e-4, atol=1e-5)
    assert not scores["itc"].requires_grad and not scores["itm"].requires_grad
    for losses in (("itc",), ("itm", "mlm"), ("mim",)):
        found = tiny_model(tiny_config(**only(*losses))).score(images, input_ids, real)
        assert set(found) == set(losses) & {"itc", "itm"}


def test_padding_changes_nothing():
    """Encoded texts, fused vectors and scores are the same however far a caption is padded."""
    model = tiny_model()
    batch = tiny_batch(model.config, l=9)
    longer = lengthen(batch, 5)
    real = batch["attention_mask"]
    image = model.encode_image(batch["images"])
    short, long = (model.encode_text(x["input_ids"], x["attention_mask"]) for x in (batch, longer))
    torch.testing.assert_close(long[:, :9][real], short[real], rtol=1e-5, atol=1e-5)
    fused = model.fuse(image, short, real), model.fuse(image, long, longer["attention_mask"])
    torch.testing.assert_close(fused[1].pair, fused[0].pair, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused[1].image, fused[0].image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused[1].text[:, :9][real], fused[0].text[real], rtol=1e-5, atol=1e-5)
    names = ("images", "input_ids", "attention_mask")
    scores = [model.score(*(x[name] for name in names)) for x in (batch, longer)]
    for name in ("itc", "itm"):
        torch.testing.assert_close(scores[1][name], scores[0][name], rtol=1e-5, atol=1e-5)

    # Whatever stands at a padded place, no real one hears of it.
    dirty = batch["input_ids"].masked_fill(~real, ORDINARY[3])
    assert torch.equal(model.encode_text(dirty, real)[real], short[real])


# -------------------------------------------------------------------------------------------------------- places, sizes


def test_image_size_is_height_and_width():
    """In a picture of 16 by 24 pixels the pixel (y, x) belongs to the patch (y // 4, x // 4), counted row by row."""
    config = tiny_config()
    assert config.grid == (4, 6) and config.num_patches == 24
    model = tiny_model(config)
    batch = tiny_batch(config, b=2)
    assert batch["images"].shape == (2, 3, 16, 24)
    assert model.encode_image(batch["images"]).shape == (2, 25, 16)
    found = []
    model.student.image.patch_embedding.register_forward_hook(lambda module, given, said: found.append(said.detach()))
    model.encode_image(batch["images"])
    for y, x in ((0, 0), (0, 23), (15, 0), (15, 23), (5, 13), (11, 8)):
        images = batch["images"].clone()
        images[1, 2, y, x] += 1
        model.encode_image(images)
        assert changed_slots(found[0], found[-1]) == [[1, y // 4 * 6 + x // 4]]


def test_position_scale_spreads_the_initial_positions_of_the_patches_only():
    """Ten times the scale is ten times the code of every patch, and the same weights everywhere else."""
    made = []
    for scale in (1, 10):
        torch.manual_seed(0)
        made.append(dict(MAMO(tiny_config(position_scale=scale)).student.named_parameters()))
    once, tenfold = made
    places = "image.positions"
    assert torch.allclose(tenfold[places], 10 * once[places]) and tenfold[places][1:].abs().max() > 1
    assert all(torch.equal(tenfold[name], weight) for name, weight in once.items() if name != places)


def test_patches_are_embedded_as_by_a_convolution():
    encoder = tiny_model().student.image
    images = torch.rand(2, 3, 16, 24)
    found = []
    encoder.patch_embedding.register_forward_hook(lambda module, given, said: found.append(said))
    encoder(images)
    kernel = encoder.patch_embedding.weight.reshape(16, 3, 4, 4)
    expected = nn.functional.conv2d(images, kernel, encoder.patch_embedding.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_positions_of_neighbours_are_more_alike_than_those_of_far_places():
    """In the text along the line; in the picture along both axes, in the order in which patches are counted."""
    model = MAMO(tiny_config(image_size=(32, 48), max_tokens=32, width=32))
    text = model.student.text.positions.detach()
    cosine = torch.cosine_similarity(text[:, None], text[None], dim=-1)
    for k in range(31):
        assert cosine[k, k + 1] > 0.7
        assert all(cosine[k, k + 1] > cosine[k, far] for far in range(32) if abs(far - k) > 5)
    image = model.student.image.positions.detach()
    assert image.shape == (1 + 8 * 12, 32)
    grid = image[1:].reshape(8, 12, 32)
    for y, x in itertools.product(range(7), range(11)):
        far = grid[(y + 4) % 8, (x + 6) % 12]
        for neighbour in (grid[y + 1, x], grid[y, x + 1]):
            near = torch.cosine_similarity(grid[y, x], neighbour, dim=0)
            assert near > 0.8 and near > torch.cosine_similarity(grid[y, x], far, dim=0) + 0.1
    assert len(image[1:].unique(dim=0)) == 96, "no two patches have the same code"


def test_the_order_of_words_and_of_patches_matters():
    """Exchanging two words, or two patches, changes the fused pair."""
    model = tiny_model()
    batch = tiny_batch(model.config, b=2)
    swapped = batch["input_ids"].clone()
    swapped[0, [1, 5]] = swapped[0, [5, 1]]
    assert not torch.equal(swapped, batch["input_ids"])
    images = batch["images"].clone()
    images[0, :, :4, :4], images[0, :, 8:12, 4:8] = batch["images"][0, :, 8:12, 4:8], batch["images"][0, :, :4, :4]
    real = batch["attention_mask"]

    def pair(images, input_ids):
        return model.fuse(model.encode_image(images), model.encode_text(input_ids, real), real).pair[0]

    whole = pair(batch["images"], batch["input_ids"])
    assert (pair(batch["images"], swapped) - whole).abs().max() > 1e-3
    assert (pair(images, batch["input_ids"]) - whole).abs().max() > 1e-3


def test_presets_are_valid():
    for name, sizes in PRESETS.items():
        config = MAMOConfig(vocab_size=30522, **sizes)
        assert config.num_patches == config.grid[0] * config.grid[1] > 1, name
    base = MAMOConfig(**PRESETS["base"])
    assert (base.width, base.heads, base.image_depth, base.text_depth, base.fusion_depth) == (768, 12, 12, 6, 6)
    assert base.loss_weights == dict.fromkeys(LOSSES, 1.0) and (base.mask_image, base.mask_text) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": (16, 250), "patch_size": 16},
            "image_size 250 is not a multiple of patch_size 16: use 240 or 256",
        ),
        ({"image_size": (3, 24), "patch_size": 4}, "image_size 3 .*patch_size 4: use 4"),
        ({"width": 18, "heads": 4}, "width 18 .*heads"),
        ({"width": 18, "heads": 2}, "width 18 .*4"),
        ({"mask_image": 0.0}, "mask_image is 0.0: .*between 0 and 1"),
        ({"mask_image": 1.0}, "mask_image is 1.0: .*between 0 and 1"),
        ({"mask_text": 1.5}, "mask_text is 1.5: .*between 0 and 1"),
        ({"mask_text": -0.1}, "mask_text is -0.1: .*between 0 and 1"),
        (only(), "every loss has weight 0: .*w_itc"),
    ],
)
def test_a_wrong_size_is_refused_with_advice(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 0"):
        MAMO(tiny_config(vocab_size=0))


# --------------------------------------------------------------------------------------------------- state and learning


def test_state_travels_whole():
    """Another model that loads the state gives the same losses, bit for bit, queue and teacher included."""
    config = tiny_config(queue_size=7)
    model, other = tiny_model(config, seed=1), tiny_model(config, seed=2)
    model(tiny_batch(config, b=4, seed=1))
    model.after_step()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3):
        batch = tiny_batch(config, b=3, seed=10 + step)
        one, two = model(batch), other(batch)
        assert all(torch.equal(one[name], two[name]) for name in one)
        model.after_step()
        other.after_step()


def test_a_step_does_not_write_into_its_batch():
    model = tiny_model(tiny_config(queue_size=7))
    batch = tiny_batch(model.config)
    before = {name: value.clone() for name, value in batch.items()}
    total(model, model(batch)).backward()
    assert all(torch.equal(before[name], batch[name]) for name in batch)


def test_each_loss_falls_on_16_pairs():
    """150 steps of AdamW on 16 pairs, masks and draws fixed, teacher frozen: every loss falls far below its start.

    A frozen teacher keeps the question the same, so that a falling loss is an answer learned.
    """
    torch.manual_seed(0)
    config = tiny_config(image_size=(8, 12), width=32, heads=4, embed_dim=32, image_depth=1, text_depth=1, ema=1.0)
    model, batch = MAMO(config).train(), tiny_batch(config, b=16, l=8)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=3e-3, fused=True)
    teacher = [parameter.clone() for parameter in model.teacher.parameters()]
    history = []
    for _ in range(150):
        losses = model(batch)
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        total(model, losses).backward()
        optimizer.step()
        model.after_step()
    first, last, chance = history[0], history[-1], model.chance(16)
    for name, share in {"itc": 0.05, "itm": 0.1, "mrm": 0.05, "mim": 0.3, "mlm": 0.05}.items():
        assert last[name] < share * min(first[name], chance[name]), (name, first[name], last[name])
    assert all(torch.equal(old, new) for old, new in zip(teacher, model.teacher.parameters(), strict=True))
