"""What siblings/masking.py hides and how it recovers: each function against loops, its places, its edges.

The losses that are made of these functions are compared with their equations in test_siblings.py.
"""

import itertools
import math
import random

import pytest
import torch
from conftest import CLS, MASK, ORDINARY, PAD, SEP, UNK, lengthen, moved, tiny_batch, tiny_config, tiny_objective
from test_losses import (
    assert_same_loss,
    chosen_of,
    naive_cross_entropy,
    naive_patches,
    naive_replaced,
    naive_unit,
    random_vectors,
)
from torch import Tensor, nn

from mamo import drop_patches, mask_patches, mask_words, put_back
from siblings.masking import (
    PixelDecoder,
    blank,
    mask_units,
    mask_whole_words,
    nce,
)

CONTINUED = ORDINARY[20:]  # in these tests, the pieces that go on with a word
GRIDS = [((4, 6), 2), ((6, 4), 2), ((2, 6), 2), ((6, 3), 3), ((4, 6), 1), ((3, 5), 1)]


def random_noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------- naive versions, in loops


def naive_units(noise: Tensor, ratio: float, grid: tuple[int, int], unit: int) -> list[int]:
    """The patches of the units of least noise, unit by unit; the noise of a unit is that of its upper left patch."""
    rows, columns = grid
    corners = [y * columns + x for y in range(0, rows, unit) for x in range(0, columns, unit)]
    units = naive_patches(noise[corners], ratio)
    return [corners[u] + v * columns + w for u in units for v in range(unit) for w in range(unit)]


def naive_whole_words(
    ids: list[int], noise: Tensor, replace: Tensor, ratio: float, continued: list[int] = CONTINUED
) -> tuple[list[int], list[int]]:
    """Chosen places of one text, and the text with them replaced: 80 % [MASK], 10 % a random word, 10 % kept.

    Words are taken, the least noise of a first piece first, and one that does not fit into what is left of the budget
    of pieces is passed over. If no word fits, the first pieces of the first one are taken.
    """
    words = []
    for k, piece in enumerate(ids):
        if piece in ORDINARY:
            if piece in continued:
                words[-1].append(k)
            else:
                words.append([k])
    budget = math.ceil(ratio * sum(map(len, words)) - 1e-9)
    words.sort(key=lambda word: noise[word[0]].item())
    chosen = []
    for word in words:
        if len(chosen) + len(word) <= budget:
            chosen += word
    if words and not chosen:
        chosen = words[0][:budget]
    return chosen, naive_replaced(ids, chosen, replace)


def naive_nce(pairs: list[tuple[Tensor, Tensor]], tau: float) -> Tensor:
    """Each prediction among all targets and each target among all predictions, by cosine; the sum of both means."""
    ours = [naive_unit(prediction) for prediction, _ in pairs]
    theirs = [naive_unit(target) for _, target in pairs]
    result = 0.0
    for i in range(len(pairs)):
        result = result + naive_cross_entropy([(ours[i] * other).sum() / tau for other in theirs], i) / len(pairs)
        result = result + naive_cross_entropy([(theirs[i] * other).sum() / tau for other in ours], i) / len(pairs)
    return result


def words_of_pieces(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with no piece that goes on with a word behind [CLS] or [UNK], where no tokenizer puts one."""
    batch = batch | {"input_ids": batch["input_ids"].clone()}
    for row in batch["input_ids"]:
        for k in range(1, len(row)):
            if int(row[k]) in CONTINUED and int(row[k - 1]) not in ORDINARY:
                row[k] = ORDINARY[CONTINUED.index(int(row[k]))]
    return batch


def whole_words(batch: dict[str, Tensor], ratio: float, continued: list[int] = CONTINUED):
    names = ("input_ids", "attention_mask", "token_noise", "replace_noise")
    continues = torch.isin(batch["input_ids"], torch.tensor(continued))
    return mask_whole_words(*(batch[name] for name in names), ratio, tiny_config(), continues)


# ----------------------------------------------------------------------------------------------------- units of patches


@pytest.mark.parametrize(("grid", "unit"), GRIDS)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.6, 0.99])
def test_whole_units_of_least_noise_are_hidden(grid: tuple, unit: int, ratio: float):
    """As by loops: the units of least noise, all patches of each, least noise first, and at least one but never all."""
    noise = random_noise(20, grid[0] * grid[1])
    index, mask = mask_units(noise, ratio, grid, unit)
    units = grid[0] * grid[1] // unit**2
    assert index.shape == (20, min(max(round(ratio * units), 1), units - 1) * unit**2) and mask.dtype == torch.bool
    for row in range(20):
        assert index[row].tolist() == naive_units(noise[row], ratio, grid, unit)
        assert mask[row].nonzero().flatten().tolist() == sorted(index[row].tolist())


def test_a_unit_of_one_patch_is_a_patch():
    noise = random_noise(30, 24)
    index, mask = mask_units(noise, 0.6, (4, 6), 1)
    patches, patch_mask = mask_patches(noise, 0.6)
    assert torch.equal(mask, patch_mask) and torch.equal(index, patches)


def test_every_unit_is_hidden_equally_often():
    """3 of 6 units in each of 4,000 rows: each unit in a half of them, each two units together in a fifth."""
    _, mask = mask_units(random_noise(4000, 24), 0.5, (4, 6), 2)
    units = mask[:, [0, 2, 4, 12, 14, 16]].float()
    together = units.T @ units / 4000
    for i in range(6):
        for j in range(6):
            assert together[i, j].item() == pytest.approx(0.5 if i == j else 0.2, abs=0.035)


def test_blank_sets_hidden_pixels_to_zero_and_no_other():
    images, (rows, columns), p = random_noise(3, 3, 16, 24) + 0.5, (4, 6), 4
    before = images.clone()
    _, mask = mask_units(random_noise(3, 24), 0.5, (4, 6), 2)
    blanked = blank(images, mask, p)
    for i in range(3):
        for y in range(rows):
            for x in range(columns):
                place = (i, slice(None), slice(y * p, y * p + p), slice(x * p, x * p + p))
                expected = torch.zeros(3, p, p) if mask[i, y * columns + x] else before[place]
                assert torch.equal(blanked[place], expected)
    assert torch.equal(images, before)


# ------------------------------------------------------------------------------------------------------ patches dropped


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.8, 0.99])
def test_patches_are_either_dropped_or_kept(ratio: float):
    """Both together are all patches, each once; those of least noise are dropped, as mask_patches would hide them."""
    noise = random_noise(20, 24)
    dropped, kept = drop_patches(noise, ratio)
    assert torch.equal(dropped, mask_patches(noise, ratio)[0])
    for row in range(20):
        assert dropped[row].tolist() == naive_patches(noise[row], ratio)
        assert sorted(dropped[row].tolist() + kept[row].tolist()) == list(range(24))


def test_with_all_patches_visible_the_encoder_is_the_whole_one():
    """In any order: a patch takes its position along, so the order of those kept is that of the result."""
    model = tiny_objective("vlmae").double()
    images = tiny_batch(model.config)["images"].double()
    kept = random_noise(5, 24).argsort(dim=1)
    whole, visible = model.student.image(images), model.student.image(images, kept=kept)
    torch.testing.assert_close(visible[:, 0], whole[:, 0])
    for i in range(5):
        for slot, k in enumerate(kept[i].tolist()):
            torch.testing.assert_close(visible[i, 1 + slot], whole[i, 1 + k])


def test_the_order_of_the_visible_patches_is_that_of_the_result():
    model = tiny_objective("vlmae").double()
    images = tiny_batch(model.config)["images"].double()
    kept, order = drop_patches(random_noise(5, 24), 0.5)[1], torch.tensor([3, 0, 11, 7, 1, 2, 10, 4, 9, 5, 8, 6])
    one, other = (model.student.image(images, kept=x) for x in (kept, kept[:, order]))
    torch.testing.assert_close(one[:, 0], other[:, 0])
    torch.testing.assert_close(one[:, 1:][:, order], other[:, 1:])


def test_dropped_patches_are_not_seen():
    """New pixels there change not one bit; new pixels in one visible patch change all vectors."""
    model = tiny_objective("vlmae")
    images = tiny_batch(model.config)["images"]
    dropped, kept = drop_patches(random_noise(5, 24), 0.5)
    before = model.student.image(images, kept=kept)
    mask = torch.zeros(5, 24, dtype=torch.bool).scatter(1, dropped, True)
    assert before.shape == (5, 13, 16)
    assert torch.equal(before, model.student.image(blank(images, mask, 4), kept=kept))
    seen = torch.zeros(5, 24, dtype=torch.bool).scatter(1, kept[:, :1], True)
    after = model.student.image(blank(images, seen, 4), kept=kept)
    assert ((before - after).abs().amax(dim=-1) > 1e-6).all()


def test_what_is_put_back_stands_where_it_stood():
    """Class token first, visible patches at their places, the mask token elsewhere, and positions on all of them."""
    visible, kept = random_noise(2, 4, 8), torch.tensor([[5, 0, 3], [1, 2, 4]])
    token, positions = random_noise(8, seed=1).requires_grad_(), random_noise(7, 8, seed=2)
    whole = put_back(visible, kept, token, positions)
    assert whole.shape == (2, 7, 8)
    for i in range(2):
        torch.testing.assert_close(whole[i, 0], visible[i, 0] + positions[0])
        for k in range(6):
            vector = visible[i, 1 + kept[i].tolist().index(k)] if k in kept[i] else token
            torch.testing.assert_close(whole[i, 1 + k], vector + positions[1 + k])
    whole.sum().backward()
    torch.testing.assert_close(token.grad, torch.full((8,), 6.0))  # three hidden places in each of two rows


# ---------------------------------------------------------------------------------------------------------- whole words


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.4, 0.9])
def test_the_words_of_least_noise_are_hidden_whole(ratio: float):
    """As by loops, in many texts with [UNK]s, padding and words of one to many pieces."""
    batch = words_of_pieces(tiny_batch(tiny_config(), b=80, l=14, seed=4))
    words = whole_words(batch, ratio)
    several, in_part, fewer = 0, 0, 0
    for i, chosen in enumerate(chosen_of(words)):
        ids = batch["input_ids"][i].tolist()
        expected, shown = naive_whole_words(ids, batch["token_noise"][i], batch["replace_noise"][i], ratio)
        pieces = sum(k in ORDINARY for k in ids)
        budget = math.ceil(ratio * pieces - 1e-9)
        assert sorted(chosen) == sorted(expected) and words.input_ids[i].tolist() == shown
        assert 1 <= len(chosen) <= budget
        assert words.labels[i][words.valid[i]].tolist() == [ids[k] for k in chosen]
        assert all(ids[k] not in (PAD, CLS, SEP, UNK, MASK) for k in chosen)
        borders = [(k, k + 1) for k in range(len(ids) - 1) if ids[k + 1] in CONTINUED]  # inside of a word
        cut = any((left in chosen) != (right in chosen) for left, right in borders)
        lengths = [len(word) for word in "".join("+" if k in CONTINUED else " +" for k in ids if k in ORDINARY).split()]
        assert not cut or min(lengths) > budget == len(chosen), "in part only where no word fits"
        several, in_part = several + (not cut and any(ids[k] in CONTINUED for k in chosen)), in_part + cut
        fewer += len(chosen) < budget
    assert words.index.shape == words.labels.shape == words.valid.shape == (80, math.ceil(ratio * 14))
    assert (batch["input_ids"] == UNK).any()
    assert in_part or ratio > 0.4, "some first word was too long"
    assert several or ratio < 0.1, "some word of several pieces was hidden whole"
    assert fewer or ratio < 0.1, "some word no longer fitted"


def test_a_word_that_no_longer_fits_stays_and_those_behind_it_are_taken():
    """Budget 4 of 10 pieces: a word of three pieces fits, one of two no longer does, and the single one behind it."""
    first, piece = ORDINARY[0], CONTINUED[0]
    ids = torch.tensor([[CLS, first, piece, piece, first, piece, first, first, piece, first, first, SEP]])
    noise = torch.tensor([[0.0, 0.1, 0.9, 0.9, 0.2, 0.9, 0.3, 0.4, 0.9, 0.5, 0.6, 0.0]])
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "token_noise": noise, "replace_noise": 0 * noise}
    assert chosen_of(whole_words(batch, 0.4))[0] == [1, 2, 3, 6]
    assert whole_words(batch, 0.5).input_ids[0].tolist() == [
        *(CLS, MASK, MASK, MASK, MASK, MASK, first, first, piece, first, first, SEP)
    ]
    assert chosen_of(whole_words(batch, 0.2))[0] == [4, 5], "the first word is longer than the budget of two"
    long = batch | {"input_ids": torch.tensor([[CLS, *[first, piece, piece, piece] * 2, PAD, PAD, SEP]])}
    long["attention_mask"] = long["input_ids"] != PAD
    assert chosen_of(whole_words(long, 0.3))[0] == [1, 2, 3], "no word fits: three pieces of the first one"
    swapped = batch | {"token_noise": noise.index_fill(1, torch.tensor([6]), 0.05)}
    assert sorted(chosen_of(whole_words(swapped, 0.4))[0]) == [1, 2, 3, 6]


def test_no_word_of_2000_texts_is_hidden_in_part():
    """Words of one to five pieces, one of which fits: no piece stands alone, and what could still fit is not left."""
    draw, texts = random.Random(0), []
    for _ in range(2000):
        words = [[ORDINARY[0]] + [CONTINUED[0]] * draw.choice((0, 0, 1, 2, 4)) for _ in range(draw.randint(3, 9))]
        texts.append([[ORDINARY[0]], *words])
    longest = max(sum(map(len, text)) for text in texts) + 2
    ids = torch.tensor([([CLS, *itertools.chain(*text), SEP] + [PAD] * longest)[:longest] for text in texts])
    noise = random_noise(2, *ids.shape)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "token_noise": noise[0], "replace_noise": noise[1]}
    for text, chosen in zip(texts, chosen_of(whole_words(batch, 0.15)), strict=True):
        ends = [sum(map(len, text[: k + 1])) for k in range(len(text))]
        hidden = [sum(end - len(word) < k <= end for k in chosen) for word, end in zip(text, ends, strict=True)]
        left = math.ceil(0.15 * ends[-1] - 1e-9) - len(chosen)
        assert all(count in (0, len(word)) for count, word in zip(hidden, text, strict=True))
        assert all(count or len(word) > left for count, word in zip(hidden, text, strict=True))


def test_the_noise_of_a_word_is_that_of_its_first_piece():
    batch = words_of_pieces(tiny_batch(tiny_config(), b=40, l=14))
    continues = torch.isin(batch["input_ids"], torch.tensor(CONTINUED))
    other = batch | {"token_noise": torch.where(continues, random_noise(40, 14, seed=5), batch["token_noise"])}
    assert chosen_of(whole_words(batch, 0.4)) == chosen_of(whole_words(other, 0.4))
    other = batch | {"token_noise": torch.where(continues, batch["token_noise"], random_noise(40, 14, seed=5))}
    assert chosen_of(whole_words(batch, 0.4)) != chosen_of(whole_words(other, 0.4))


def test_words_of_single_pieces_are_hidden_as_by_hide_words():
    batch = tiny_batch(tiny_config(), b=40, l=14)
    names = ("input_ids", "attention_mask", "token_noise", "replace_noise")
    for ratio in (0.15, 0.5):
        expected = mask_words(*(batch[name] for name in names), ratio, tiny_config())
        for ours, theirs in zip(whole_words(batch, ratio, []), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [2, 3])
def test_every_word_is_hidden_equally_often(length: int):
    """Texts of six words of as many pieces as the budget, 3,000 times: each word in a sixth of them."""
    word = [ORDINARY[0]] + [CONTINUED[0]] * (length - 1)
    ids = torch.tensor([[CLS, *(word * 6), SEP]]).expand(3000, -1)
    noise = random_noise(2, *ids.shape, seed=length)
    batch = {"input_ids": ids, "attention_mask": ids != PAD, "token_noise": noise[0], "replace_noise": noise[1]}
    words = whole_words(batch, 1 / 6)
    counts = torch.zeros(6)
    for chosen in chosen_of(words):
        assert sorted(chosen) == list(range(min(chosen), min(chosen) + length)) and (min(chosen) - 1) % length == 0
        counts[(min(chosen) - 1) // length] += 1
    assert sum((count.item() - 500) ** 2 / 500 for count in counts) < 25.7, "5 degrees of freedom: once in 10,000"


@pytest.mark.parametrize("extra", [1, 3, 20])
def test_padding_hides_no_other_whole_words(extra: int):
    batch = words_of_pieces(tiny_batch(tiny_config(), b=40, l=13))
    short, long = whole_words(batch, 0.3), whole_words(lengthen(batch, extra), 0.3)
    assert [sorted(row) for row in chosen_of(short)] == [sorted(row) for row in chosen_of(long)]
    assert torch.equal(long.input_ids[:, :13], short.input_ids) and (long.input_ids[:, 13:] == PAD).all()


def test_a_text_without_words_hides_no_whole_word():
    batch = tiny_batch(tiny_config(), b=3, l=8)
    batch["input_ids"][1] = torch.tensor([CLS, UNK, UNK, SEP, PAD, PAD, PAD, PAD])
    batch["attention_mask"] = batch["input_ids"] != PAD
    words = whole_words(words_of_pieces(batch), 0.4)
    assert not words.valid[1].any() and words.valid[0].any()
    assert torch.equal(words.input_ids[1], batch["input_ids"][1])


# ---------------------------------------------------------------------------------------------------- decoder of pixels


def decoder_and_input(depth: int = 2) -> tuple:
    """A decoder with image (3, 1 + 24, 16), text (3, 7, 16), attention mask and four places in each row."""
    torch.manual_seed(0)
    decoder = moved(PixelDecoder(tiny_config(), depth)).double()
    real = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 2 + [False] * 5])
    places = torch.tensor([[3, 0, 23, 7], [5, 4, 3, 2], [11, 12, 1, 20]])
    return decoder, random_vectors(3, 25, 16, seed=1), random_vectors(3, 7, 16, seed=2), real, places


@pytest.mark.parametrize("depth", [1, 3])
def test_a_decoder_is_a_fusion_encoder_and_a_linear_map(depth: int):
    decoder, image, text, real, places = decoder_and_input(depth)
    assert len(decoder.stream.blocks) == depth
    predicted = decoder(image, text, real, places)
    assert predicted.shape == (3, 4, 48)
    for i in range(3):
        length = int(real[i].sum())
        whole = decoder.stream(image[i : i + 1], text[i : i + 1, :length], real[i : i + 1, :length]).image
        for slot, k in enumerate(places[i].tolist()):
            torch.testing.assert_close(predicted[i, slot], decoder.pixels(whole[0, 1 + k]))


def test_each_row_of_the_decoder_belongs_to_its_place():
    """Without attention and MLPs, a vector answers only in the slots of its own place."""
    decoder, image, text, real, places = decoder_and_input()
    for module in decoder.modules():
        if isinstance(module, nn.Linear) and module is not decoder.pixels:
            nn.init.zeros_(module.weight)
    before = decoder(image, text, real, places)
    for k in range(24):
        other = image.detach().clone()
        other[:, 1 + k] += torch.randn(16, dtype=torch.float64)
        changed = (decoder(other, text, real, places) - before).abs().amax(dim=-1) > 1e-6
        assert torch.equal(changed, places == k)


# ------------------------------------------------------------------------------------------------------------- contrast


def test_nce_by_hand():
    """Three predictions and targets in the plane whose cosines are 1, 0, -1 and so on, at temperature 0.5."""
    prediction = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    target = torch.tensor([[0.0, 1.0], [0.0, 5.0], [-1.0, 0.0]])
    e = math.exp(2)  # a cosine of 1 at that temperature
    # cosines: [0, 0, -1], [1, 1, 0], [0, 0, 1]; each row among the targets, then each column among the predictions
    rows = math.log(2 + 1 / e) + math.log((2 * e + 1) / e) + math.log((2 + e) / e)
    columns = math.log(2 + e) + math.log((2 + e) / e) + math.log((1 / e + 1 + e) / e)
    assert nce(prediction, target, 0.5).item() == pytest.approx(rows / 3 + columns / 3, rel=1e-5)


def test_nce_equals_its_equation():
    prediction, target = random_vectors(6, 16, seed=1), random_vectors(6, 16, seed=2)
    naive = naive_nce([(p, t.detach()) for p, t in zip(prediction, target, strict=True)], 0.3)
    assert_same_loss(nce(prediction, target, 0.3), naive, [prediction, target])


def test_nce_leaves_invalid_slots_out():
    """They are neither queries nor candidates, whatever stands there; all others are contrasted, of whatever row."""
    prediction, target = random_vectors(3, 4, 16, seed=1), random_vectors(3, 4, 16, seed=2)
    valid = torch.tensor([[True, False, True, True], [False] * 4, [True, True, False, False]])
    places = valid.nonzero().tolist()
    naive = naive_nce([(prediction[i, k], target[i, k].detach()) for i, k in places], 0.1)
    assert_same_loss(nce(prediction, target, 0.1, valid), naive, [prediction, target])
    other = [torch.where(valid[..., None], x, torch.full_like(x, 3.0)) for x in (prediction, target)]
    torch.testing.assert_close(nce(*other, 0.1, valid), nce(prediction, target, 0.1, valid))


def test_nce_of_nothing_is_zero():
    """No word was hidden in the whole batch: loss and gradient are 0, and finite."""
    prediction, target = random_vectors(2, 3, 16, seed=1), random_vectors(2, 3, 16, seed=2)
    loss = nce(prediction, target, 0.03, torch.zeros(2, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0.0 and not gradient.any() and gradient.isfinite().all()


def test_no_gradient_reaches_the_target_of_nce():
    prediction, target = random_vectors(4, 16, seed=1), random_vectors(4, 16, seed=2)
    nce(prediction, target, 0.03).backward()
    assert target.grad is None and prediction.grad.abs().max() > 1e-3


def test_nce_depends_on_directions_only_and_its_chance_is_twice_the_logarithm():
    prediction, target = random_vectors(7, 16, seed=1), random_vectors(7, 16, seed=2)
    scale = torch.linspace(0.01, 100, 7)[:, None]
    torch.testing.assert_close(nce(prediction * scale, target * scale.flip(0), 0.1), nce(prediction, target, 0.1))
    alike = torch.ones(7, 16)
    assert nce(alike, alike, 0.03).item() == pytest.approx(2 * math.log(7), rel=1e-5)
    assert nce(prediction, prediction, 0.03).item() < 1e-3
