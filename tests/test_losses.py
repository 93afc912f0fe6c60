"""Every loss against a second, naive version: loops, written from the equations, nothing shared and nothing batched.

The naive versions work in float64. The model does too, up to the places where it turns to float32 on purpose.
"""

import math
from collections import deque

import pytest
import torch
from conftest import LOSSES, MASK, ORDINARY, PAD, UNK, lengthen, make_same, tiny_batch, tiny_config, tiny_model, total
from torch import Tensor

from mamo import MaskedWords, mask_patches, mask_words, mean_cosine, same_pairs

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


# ----------------------------------------------------------------------------------------------- naive losses, in loops


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the products of the features."""
    result = 0.0
    for a, b in zip(x, y, strict=True):
        result = result + a * b
    return result


def naive_unit(x: Tensor) -> Tensor:
    return x / dot(x, x).sqrt()


def naive_cross_entropy(logits: list[Tensor], label: int) -> Tensor:
    """-log of the softmax at the label."""
    denominator = 0.0
    for logit in logits:
        denominator = denominator + logit.exp()
    return -(logits[label].exp() / denominator).log()


def naive_normalised(x: Tensor) -> Tensor:
    """A target with mean 0 and variance 1 over its features (torch's epsilon of 1e-5)."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / (variance + 1e-5).sqrt()


def naive_itc(image, text, image_keys, text_keys, tau, nobody) -> Tensor:
    """Mean of both directions of H(partner, softmax over the candidates that are not in nobody[row])."""
    result = 0.0
    for b in range(len(image)):
        allowed = [j for j in range(len(image_keys)) if j not in nobody[b]]
        for query, keys in ((image[b], text_keys), (text[b], image_keys)):
            logits = [dot(query, keys[j]) / tau for j in allowed]
            result = result + naive_cross_entropy(logits, allowed.index(b)) / 2
    return result / len(image)


def naive_itm(head, positive: list[Tensor], negative: list[Tensor]) -> Tensor:
    """Two-way cross-entropy over the pairs there are: 1 for those that belong together."""
    result = 0.0
    for vectors, label in ((positive, 1), (negative, 0)):
        for vector in vectors:
            result = result + naive_cross_entropy(list(head(vector)), label)
    return result / (len(positive) + len(negative))


def naive_mrm(heads, patches: list[tuple], words: list[tuple]) -> Tensor:
    """1/|M_I| sum |g(student) - teacher|^2 + 1/|M_T| sum the same; the square is a mean over the features."""
    result = 0.0
    for head, positions in zip(heads, (patches, words), strict=True):
        for student, teacher in positions:
            guess, target = head(student), naive_normalised(teacher)
            for f in range(len(guess)):
                result = result + (guess[f] - target[f]) ** 2 / len(guess) / len(positions)
    return result


def naive_mim(head, patches: list[tuple]) -> Tensor:
    """1/|M_I| sum |h(student) - teacher|_1, as a mean over the features."""
    result = 0.0
    for student, teacher in patches:
        guess, target = head(student), naive_normalised(teacher)
        for f in range(len(guess)):
            result = result + (guess[f] - target[f]).abs() / len(guess) / len(patches)
    return result


def naive_mlm(model, words: list[tuple]) -> Tensor:
    """Mean cross-entropy over the vocabulary; a word's score is its embedding times the vector, plus a bias."""
    result = 0.0
    for student, label in words:
        vector = model.mlm_head(student)
        table = model.student.text.words.weight
        logits = [dot(vector, table[v]) + model.mlm_bias[v] for v in range(len(table))]
        result = result + naive_cross_entropy(logits, label)
    return result / len(words)


# -------------------------------------------------------------------------------- naive masks, draws and the whole step


def naive_patches(noise: Tensor, ratio: float) -> list[int]:
    """The places of the least noise."""
    ranked = sorted(range(len(noise)), key=lambda k: noise[k].item())
    return ranked[: min(max(round(ratio * len(noise)), 1), len(noise) - 1)]


def naive_words(ids: list[int], noise: Tensor, replace: Tensor, ratio: float) -> tuple[list[int], list[int]]:
    """Chosen places of one text, and the text with them replaced: 80 % [MASK], 10 % a random word, 10 % kept."""
    words = [k for k, word in enumerate(ids) if word in ORDINARY]
    chosen = sorted(words, key=lambda k: noise[k].item())[: math.ceil(ratio * len(words))]
    return chosen, naive_replaced(ids, chosen, replace)


def naive_replaced(ids: list[int], chosen: list[int], replace: Tensor) -> list[int]:
    """The text with 80 % of the chosen places replaced by [MASK], 10 % by a random word, 10 % kept."""
    shown = list(ids)
    for k in chosen:
        draw = replace[k].item()
        if draw < 0.8:
            shown[k] = MASK
        elif draw < 0.9:
            shown[k] = ORDINARY[int((draw - 0.8) * 10 * len(ORDINARY))]
    return shown


def naive_negative(similarities: list[Tensor], tau: Tensor, allowed: list[int], noise: Tensor, own: int) -> int | None:
    """Gumbel's trick among those allowed, less those above the own partner unless no other is left: the largest of
    similarity / (2 tau) - log(-log(noise)); None if there is none."""
    allowed = [j for j in allowed if similarities[j] <= similarities[own]] or allowed
    scores = {j: (similarities[j] / tau).item() / 2 - math.log(-math.log(noise[j].item())) for j in allowed}
    return max(scores, key=scores.get) if scores else None


def naive_forward(model, batch: dict[str, Tensor], past: list[tuple] = ()) -> dict[str, Tensor]:
    """The five losses pair by pair and pass by pass: each pass encodes anew, on its own, with the padding cut off.

    past   (image id, caption id, image embedding, text embedding) of the pairs in the queue, if the model has one
    """
    config, student, teacher, tau = model.config, model.student, model.teacher, model.temperature
    b = len(batch["images"])
    lengths = [int(real.sum()) for real in batch["attention_mask"]]
    texts = [batch["input_ids"][i, : lengths[i]].tolist() for i in range(b)]

    def encode_image(network, i, hidden=()):
        patch_mask = torch.tensor([[k in hidden for k in range(config.num_patches)]]) if hidden else None
        return network.image(batch["images"][i : i + 1], patch_mask)

    def encode_text(network, ids):
        return network.text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))

    def fuse(network, i, ids, hidden=()):
        return network.fusion(
            encode_image(network, i, hidden), encode_text(network, ids), torch.ones(1, len(ids), dtype=torch.bool)
        )

    # Contrast: with a queue the candidates are the teacher's.
    def embeddings(network):
        images = [naive_unit(network.image_projection(encode_image(network, i)[0, 0])) for i in range(b)]
        return images, [naive_unit(network.text_projection(encode_text(network, ids)[0, 0])) for ids in texts]

    image, text = embeddings(student)
    image_keys, text_keys = embeddings(teacher) if model.queue is not None else (image, text)
    ids = list(zip(batch["image_id"].tolist(), batch["caption_id"].tolist(), strict=True))
    candidates = ids + [(row[0], row[1]) for row in past]
    alike = [{j for j, other in enumerate(candidates) if other[0] == me[0] or other[1] == me[1]} for me in ids]
    losses = {
        "itc": naive_itc(
            image,
            text,
            image_keys + [row[2] for row in past],
            text_keys + [row[3] for row in past],
            tau,
            [alike[i] - {i} for i in range(b)],
        )
    }

    # Matching: one drawn text for each image and one drawn image for each text.
    positive, negative = [fuse(student, i, texts[i]).pair[0] for i in range(b)], []
    for i in range(b):
        allowed = [j for j in range(b) if j not in alike[i]]
        j = naive_negative([dot(image[i], text[k]) for k in range(b)], tau, allowed, batch["negative_noise"][0, i], i)
        if j is not None:
            negative.append(fuse(student, i, texts[j]).pair[0])
        j = naive_negative([dot(text[i], image[k]) for k in range(b)], tau, allowed, batch["negative_noise"][1, i], i)
        if j is not None:
            negative.append(fuse(student, j, texts[i]).pair[0])
    losses["itm"] = naive_itm(model.itm_head, positive, negative)

    # Masked modelling.
    mrm_patches, mrm_words, mim_patches, mlm_words = [], [], [], []
    for i in range(b):
        hidden = naive_patches(batch["patch_noise"][i], config.mask_image)
        chosen, shown = naive_words(texts[i], batch["token_noise"][i], batch["replace_noise"][i], config.mask_text)
        with torch.no_grad():
            target, visual = fuse(teacher, i, texts[i]), encode_image(teacher, i)
        from_text, from_image = fuse(student, i, texts[i], hidden), fuse(student, i, shown)
        mrm_patches += [(from_text.image[0, 1 + k], target.image[0, 1 + k]) for k in hidden]
        mim_patches += [(from_text.image[0, 1 + k], visual[0, 1 + k]) for k in hidden]
        mrm_words += [(from_image.text[0, k], target.text[0, k]) for k in chosen]
        mlm_words += [(from_image.text[0, k], texts[i][k]) for k in chosen]
    losses["mrm"] = naive_mrm((model.mrm_image_head, model.mrm_text_head), mrm_patches, mrm_words)
    losses["mim"] = naive_mim(model.mim_head, mim_patches)
    losses["mlm"] = naive_mlm(model, mlm_words)
    return losses


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"images": batch["images"].double()}


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradient of the loss for each input, zero where it does not depend on it."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_same_loss(ours: Tensor, naive: Tensor, inputs: list[Tensor]) -> None:
    """Same value and same gradient for every input, and a gradient that is not zero everywhere."""
    torch.testing.assert_close(ours.double(), naive, **CLOSE)
    ours_gradients, naive_gradients = gradients(ours, inputs), gradients(naive, inputs)
    assert max(float(g.abs().max()) for g in naive_gradients) > 1e-4
    for one, other in zip(ours_gradients, naive_gradients, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def random_vectors(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


# --------------------------------------------------------------------------------------------------- one loss at a time


def test_itc_equals_its_equation():
    """Value and gradient for queries, keys and temperature; left-out candidates, and more candidates than rows."""
    model = tiny_model().double()
    image, text = random_vectors(4, 8, seed=1), random_vectors(4, 8, seed=2)
    image_keys, text_keys = random_vectors(7, 8, seed=3), random_vectors(7, 8, seed=4)
    nobody = [{1}, {0, 6}, set(), {4, 5, 6}]
    same = torch.tensor([[j in nobody[i] for j in range(7)] for i in range(4)])
    scale = [naive_unit(x) for x in image], [naive_unit(x) for x in text]
    image_unit, text_unit = torch.stack(scale[0]), torch.stack(scale[1])
    ours = model.loss_itc(image_unit, text_unit, same, image_keys, text_keys)
    naive = naive_itc(image_unit, text_unit, image_keys, text_keys, model.temperature, nobody)
    assert_same_loss(ours, naive, [image, text, image_keys, text_keys, model.log_temperature])


def test_itc_of_equal_vectors_is_chance():
    """If every candidate looks alike, the loss is the logarithm of their number, those left out not counted."""
    model = tiny_model()
    same_vectors = torch.nn.functional.normalize(torch.ones(6, 8), dim=-1)
    nobody = torch.zeros(6, 6, dtype=torch.bool)
    loss = model.loss_itc(same_vectors, same_vectors, nobody, same_vectors, same_vectors)
    assert loss.item() == pytest.approx(math.log(6), rel=1e-5)
    assert model.chance(6)["itc"] == pytest.approx(math.log(6))
    nobody[:, :3] = True
    nobody.fill_diagonal_(False)
    loss = model.loss_itc(same_vectors, same_vectors, nobody, same_vectors, same_vectors)
    assert loss.item() == pytest.approx((math.log(4) + math.log(3)) / 2, rel=1e-5)


def test_itm_equals_its_equation_and_skips_rows_without_a_negative():
    model = tiny_model().double()
    positive, negative = random_vectors(3, 16, seed=1), random_vectors(6, 16, seed=2)
    valid = torch.tensor([True, False, True, True, True, False])
    ours = model.loss_itm(positive, negative, valid)
    naive = naive_itm(model.itm_head, list(positive), [negative[k] for k in range(6) if valid[k]])
    assert_same_loss(ours, naive, [positive, negative, *model.itm_head.parameters()])


def test_itm_of_a_model_that_knows_the_odds_is_chance():
    model = tiny_model()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.copy_(torch.tensor([2 / 3, 1 / 3]).log())
    loss = model.loss_itm(torch.randn(5, 16), torch.randn(10, 16), torch.ones(10, dtype=torch.bool))
    assert loss.item() == pytest.approx(model.chance(5)["itm"], rel=1e-5)


def test_mrm_equals_its_equation():
    """Value and gradient, empty slots left out; the teacher's vectors are normalised before."""
    model = tiny_model().double()
    at_patches, at_words = random_vectors(3, 4, 16, seed=1), random_vectors(3, 2, 16, seed=2)
    patch_target, word_target = random_vectors(3, 4, 16, seed=3).detach(), random_vectors(3, 2, 16, seed=4).detach()
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    unit = [torch.nn.functional.layer_norm(target, (16,)) for target in (patch_target, word_target)]
    ours = model.loss_mrm(at_patches, unit[0], at_words, unit[1], valid)
    patches = [(at_patches[i, k], patch_target[i, k]) for i in range(3) for k in range(4)]
    words = [(at_words[i, k], word_target[i, k]) for i in range(3) for k in range(2) if valid[i, k]]
    naive = naive_mrm((model.mrm_image_head, model.mrm_text_head), patches, words)
    heads = [*model.mrm_image_head.parameters(), *model.mrm_text_head.parameters()]
    assert_same_loss(ours, naive, [at_patches, at_words, *heads])


def test_mim_equals_its_equation():
    model = tiny_model().double()
    at_patches, target = random_vectors(3, 4, 16, seed=1), random_vectors(3, 4, 16, seed=2).detach()
    ours = model.loss_mim(at_patches, torch.nn.functional.layer_norm(target, (16,)))
    naive = naive_mim(model.mim_head, [(at_patches[i, k], target[i, k]) for i in range(3) for k in range(4)])
    assert_same_loss(ours, naive, [at_patches, *model.mim_head.parameters()])


def test_mlm_equals_its_equation():
    """Value and gradient, also for the word table, the weight of the vocabulary scores; empty slots left out."""
    model = tiny_model().double()
    at_words = random_vectors(3, 2, 16, seed=1)
    labels = torch.tensor([[5, 39], [6, 8], [12, 20]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    ours = model.loss_mlm(at_words, labels, valid)
    naive = naive_mlm(model, [(at_words[i, k], int(labels[i, k])) for i in range(3) for k in range(2) if valid[i, k]])
    parameters = [*model.mlm_head.parameters(), model.mlm_bias, model.student.text.words.weight]
    assert_same_loss(ours, naive, [at_words, *parameters])


def test_masked_losses_of_a_model_that_knows_nothing_are_chance():
    """With heads that say zero: MRM is 1 for each modality, MLM is ln(v), MIM the mean size of a normal number."""
    model = tiny_model()
    with torch.no_grad():
        for head in (model.mrm_image_head, model.mrm_text_head, model.mim_head, model.mlm_head):
            for parameter in head.parameters():
                parameter.zero_()
        model.mlm_bias.zero_()
    target = torch.nn.functional.layer_norm(torch.randn(4, 300, 16), (16,))
    valid = torch.ones(4, 300, dtype=torch.bool)
    chance = model.chance(4)
    assert model.loss_mrm(target, target, target, target, valid).item() == pytest.approx(chance["mrm"], rel=1e-3)
    assert model.loss_mim(target, target).item() == pytest.approx(chance["mim"], rel=0.03)
    labels = torch.zeros(4, 300, dtype=torch.long)
    assert model.loss_mlm(target, labels, valid).item() == pytest.approx(chance["mlm"], rel=1e-5)


def test_spread_is_the_mean_cosine_of_all_pairs_of_targets():
    target = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    rows = [naive_unit(row) for row in target.flatten(0, 1)]
    cosines = [dot(rows[i], rows[j]).item() for i in range(6) for j in range(6) if i != j]
    assert mean_cosine(target).item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert mean_cosine(torch.ones(2, 3, 16)).item() == pytest.approx(1.0, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- a whole step


def check_whole_step(model, batch, past=()) -> None:
    """Each of the five losses, and its gradient for every parameter, against the naive step."""
    ours, naive = model(batch), naive_forward(model, batch, past)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name in LOSSES:
        assert_same_loss(ours[name], naive[name], parameters)


def test_the_step_equals_one_that_encodes_every_pass_on_its_own():
    """Padding, a row of one word, an [UNK], two rows with the same image and two with the same caption."""
    model = tiny_model().double()
    batch = make_same(tiny_batch(model.config, b=5, l=9), image=[(0, 1)], caption=[(2, 4)])
    check_whole_step(model, double(batch))


def test_the_step_equals_the_naive_one_when_a_row_has_no_negative():
    """Row 0 shares something with each other row, so it is nobody's negative and has none itself."""
    model = tiny_model(seed=1).double()
    batch = make_same(tiny_batch(model.config, b=3, l=6, seed=1), image=[(0, 1)], caption=[(0, 2)])
    assert same_pairs(batch)[0].all() and not same_pairs(batch)[1].all()
    check_whole_step(model, double(batch))


def test_the_step_equals_the_naive_one_when_no_row_has_a_negative():
    """Four captions of one image: matching has positives only, and contrast has a single candidate."""
    model = tiny_model(seed=2).double()
    batch = double(make_same(tiny_batch(model.config, b=4, l=6, seed=2), image=[(0, 1), (0, 2), (0, 3)]))
    ours, naive = model(batch), naive_forward(model, batch)
    for name in LOSSES:
        torch.testing.assert_close(ours[name].double(), naive[name], **CLOSE)
        assert all(g.isfinite().all() for g in gradients(ours[name], list(model.student.parameters())))
    assert ours["itc"].item() == pytest.approx(0.0, abs=1e-6)


def test_the_step_with_a_queue_equals_the_naive_one():
    """Three steps: queue empty, filled in part, full and wrapped; some of its pairs come back in a later batch."""
    model = tiny_model(tiny_config(queue_size=5)).double()
    model.queue.float()  # embeddings are float32 in a model of any precision
    past = deque(maxlen=5)
    for step, b in enumerate((3, 4, 3)):
        batch = make_same(double(tiny_batch(model.config, b=b, l=7, seed=step)), image=[(0, 1)] if step == 1 else [])
        if past:  # a pair whose image was seen before, and one whose caption was
            batch["image_id"][0], batch["caption_id"][2] = past[-1][0], past[-2][1]
        with torch.no_grad():
            images = model.teacher.embed_image(model.teacher.image(batch["images"]))
            texts = model.teacher.embed_text(model.teacher.text(batch["input_ids"], batch["attention_mask"]))
        check_whole_step(model, batch, list(past))
        past.extend(zip(batch["image_id"].tolist(), batch["caption_id"].tolist(), images, texts, strict=True))
    assert len(past) == 5


def test_an_old_pair_of_the_same_image_or_caption_is_no_negative():
    """The loss does not change when the queue's pairs that share an id are moved, and does when others are."""
    model = tiny_model(tiny_config(queue_size=4))
    first, batch = tiny_batch(model.config, b=4, seed=1), tiny_batch(model.config, b=2, seed=2)
    model(first)
    batch["image_id"][:] = first["image_id"][1]
    batch["caption_id"][:] = first["caption_id"][2]
    model.eval()  # the queue takes nothing in
    before = model(batch)["itc"]
    model.queue.image[1:3], model.queue.text[1:3] = torch.rand(2, 8), torch.rand(2, 8)
    assert torch.equal(model(batch)["itc"], before)
    model.queue.text[0] = torch.rand(8)
    assert not torch.equal(model(batch)["itc"], before)


def test_a_second_step_on_the_same_batch_gives_the_same_bits():
    model = tiny_model()
    batch = tiny_batch(model.config)
    first, second = model(batch), model(batch)
    assert first.keys() == second.keys() == set(LOSSES)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("extra", [1, 4])
def test_padding_changes_no_loss_and_no_gradient(extra: int):
    model = tiny_model().double()
    batch = double(make_same(tiny_batch(model.config, b=4, l=9), image=[(0, 3)]))
    short, long = model(batch), model(lengthen(batch, extra))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name in short:
        torch.testing.assert_close(short[name], long[name], rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(total(model, short), parameters), gradients(total(model, long), parameters), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **CLOSE)


# -------------------------------------------------------------------------------------------------------------- masking


def test_patches_are_hidden_by_the_order_of_the_noise_and_in_the_right_number():
    for n, ratio, count in ((24, 0.75, 18), (6, 0.5, 3), (7, 0.75, 5), (9, 0.75, 7), (4, 0.01, 1), (2, 0.99, 1)):
        noise = torch.rand(50, n, generator=torch.Generator().manual_seed(n))
        index, patch_mask = mask_patches(noise, ratio)
        assert index.shape == (50, count) and patch_mask.dtype == torch.bool
        for row in range(50):
            expected = naive_patches(noise[row], ratio)
            assert sorted(index[row].tolist()) == sorted(expected)
            assert patch_mask[row].nonzero().flatten().tolist() == sorted(expected)
        moved = mask_patches(noise**3 * 0.5, ratio)  # other numbers in the same order
        assert torch.equal(moved[0], index) and torch.equal(moved[1], patch_mask)


def chosen_of(words: MaskedWords) -> list[list[int]]:
    """The chosen positions of each row."""
    return [[int(k) for k, ok in zip(*row, strict=True) if ok] for row in zip(words.index, words.valid, strict=True)]


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.9])
def test_the_words_of_least_noise_are_hidden_in_the_right_number(ratio: float):
    """ceil(ratio * words), at least one, never a special token or padding; labels are the words that stood there."""
    config = tiny_config(mask_text=ratio)
    batch = tiny_batch(config, b=60, l=14, seed=3)
    ids, real = batch["input_ids"], batch["attention_mask"]
    words = mask_words(ids, real, batch["token_noise"], batch["replace_noise"], config.mask_text, config)
    assert words.index.shape == words.labels.shape == words.valid.shape == (60, math.ceil(ratio * 14))
    for i, chosen in enumerate(chosen_of(words)):
        row, length = ids[i].tolist(), int(real[i].sum())
        expected, shown = naive_words(row, batch["token_noise"][i], batch["replace_noise"][i], ratio)
        assert chosen == expected and len(set(chosen)) == len(chosen) >= 1
        assert all(row[k] in ORDINARY and 0 < k < length - 1 for k in chosen)
        assert words.input_ids[i].tolist() == shown
        assert words.labels[i][words.valid[i]].tolist() == [row[k] for k in chosen]
    assert (ids == UNK).any(), "the batch holds special tokens among the words"


def test_a_text_without_words_hides_nothing():
    config = tiny_config()
    batch = tiny_batch(config, b=3, l=8)
    batch["input_ids"][1] = torch.tensor([2, UNK, UNK, 3, PAD, PAD, PAD, PAD])
    batch["attention_mask"] = batch["input_ids"] != PAD
    words = mask_words(
        *(batch[k] for k in ("input_ids", "attention_mask", "token_noise", "replace_noise")), config.mask_text, config
    )
    assert not words.valid[1].any() and words.valid[0].any()
    assert torch.equal(words.input_ids[1], batch["input_ids"][1])
    losses = tiny_model(config)(batch)
    assert all(losses[name].isfinite() for name in LOSSES)


def test_word_masks_depend_on_the_order_of_the_noise_only():
    config = tiny_config()
    batch = tiny_batch(config, b=20, l=14)
    given = batch["input_ids"], batch["attention_mask"]
    words = mask_words(*given, batch["token_noise"], batch["replace_noise"], config.mask_text, config)
    moved = mask_words(*given, batch["token_noise"] ** 3 * 0.5, batch["replace_noise"], config.mask_text, config)
    assert chosen_of(words) == chosen_of(moved) and torch.equal(words.input_ids, moved.input_ids)
    other = mask_words(*given, 1 - batch["token_noise"], batch["replace_noise"], config.mask_text, config)
    assert chosen_of(words) != chosen_of(other)


@pytest.mark.parametrize("extra", [1, 3, 20])
def test_padding_hides_no_other_words(extra: int):
    config = tiny_config()
    batch = tiny_batch(config, b=30, l=13)
    names = ("input_ids", "attention_mask", "token_noise", "replace_noise")
    short, long = (
        mask_words(*(x[k] for k in names), config.mask_text, config) for x in (batch, lengthen(batch, extra))
    )
    assert chosen_of(short) == chosen_of(long)
    assert torch.equal(long.input_ids[:, :13], short.input_ids) and (long.input_ids[:, 13:] == PAD).all()


def many_hidden(config, count: int = 2000):
    """Original and shown ids of the chosen words in many texts: two lists."""
    draw = torch.Generator().manual_seed(0)
    ordinary = torch.tensor([i for i in range(config.vocab_size) if i not in config.special_ids])
    ids = ordinary[torch.randint(len(ordinary), (count, 40), generator=draw)]
    noise = torch.rand(2, count, 40, generator=draw)
    words = mask_words(ids, torch.ones_like(ids, dtype=torch.bool), noise[0], noise[1], config.mask_text, config)
    assert words.valid.all()
    return words.labels.flatten(), words.input_ids.gather(1, words.index).flatten()


def test_hidden_words_are_masked_exchanged_and_kept_as_in_bert():
    """80 % [MASK], 10 % random, 10 % as they were; the random ones are all ordinary words alike, no special one."""
    config = tiny_config()
    labels, shown = many_hidden(config)
    assert len(labels) == 20_000
    masked, kept = shown == MASK, shown == labels
    exchanged = shown[~masked & ~kept]
    ordinary = len(ORDINARY)
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / ordinary, abs=0.008)
    assert len(exchanged) / len(shown) == pytest.approx(0.1 - 0.1 / ordinary, abs=0.008)
    counts = exchanged.bincount(minlength=config.vocab_size)
    assert all(counts[special] == 0 for special in config.special_ids)
    expected = len(exchanged) / ordinary
    chi_square = sum((int(counts[word]) - expected) ** 2 / expected for word in ORDINARY)
    assert chi_square < 75, "34 degrees of freedom: beyond 75 once in 10,000"


def test_every_word_of_a_large_vocabulary_can_be_drawn():
    """The noise that asks for a random word runs evenly over the vocabulary, to its very last words."""
    v = 30_000
    config = tiny_config(vocab_size=v, special_ids=(0, 1, 2, 3, v - 1), mask_id=3, mask_text=0.9999999)
    stretch = torch.linspace(0.8, 0.9, 2 * v + 1)[:-1].reshape(1, -1)
    ids = torch.full_like(stretch, 9, dtype=torch.long)
    words = mask_words(
        ids, torch.ones_like(ids, dtype=torch.bool), torch.rand_like(stretch), stretch, config.mask_text, config
    )
    drawn = words.input_ids[words.input_ids != 9].bincount(minlength=v)
    assert drawn[4] > 0 and drawn[-2] > 0 and drawn[-1] == 0 and not drawn[:4].any()
    assert (drawn[4:-1] > 0).float().mean() > 0.9 and drawn.max() < 10


# ------------------------------------------------------------------------------------------------------------ negatives


@pytest.mark.parametrize("sharpness", [0.5, 1.0])
def test_negatives_are_drawn_from_the_softmax_of_the_similarity(sharpness):
    """Chi-square over many draws, each row against the softmax of ITC or of half its logits, without the excluded."""
    model = tiny_model(tiny_config(albef_negatives=sharpness == 1.0))
    with torch.no_grad():
        model.log_temperature.fill_(math.log(0.2))
    draw = torch.Generator().manual_seed(1)
    similarity = torch.rand(6, 6, generator=draw) - 0.5
    same = torch.eye(6, dtype=torch.bool)
    same[0, 4] = same[4, 0] = same[2, 3] = same[3, 2] = True
    counts, rounds = torch.zeros(6, 6), 4000
    index, valid = model.draw_negatives(
        similarity.repeat(rounds, 1), same.repeat(rounds, 1), torch.rand(6 * rounds, 6, generator=draw)
    )
    assert valid.all()
    for row in range(6):
        counts[row] = index[row::6].bincount(minlength=6)
        weights = [0.0 if same[row, j] else math.exp(sharpness * similarity[row, j].item() / 0.2) for j in range(6)]
        expected = [rounds * weight / sum(weights) for weight in weights]
        assert all(counts[row, j] == 0 for j in range(6) if same[row, j])
        chi_square = sum((counts[row, j].item() - e) ** 2 / e for j, e in enumerate(expected) if e > 0)
        assert chi_square < 23.5, "at most 4 degrees of freedom: beyond 23.5 once in 10,000"
    assert max(counts[0]) > (1 + sharpness) * sorted(counts[0].tolist())[2], "the softmax is far from flat"


def test_what_contrast_prefers_to_the_partner_is_not_drawn():
    """Unless nothing else is left; ALBEF draws it."""
    similarity = torch.tensor([[0.5, 0.9, 0.1, 0.5], [0.2, 0.1, 0.3, 0.4], [0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])
    same = torch.eye(4, dtype=torch.bool)
    same[2, 3] = True
    expected = same.clone()
    expected[0, 1] = True  # of the second row all others are above, of the third all that are not the same
    assert torch.equal(tiny_model().not_drawn(similarity, same), expected)
    assert torch.equal(tiny_model(tiny_config(albef_negatives=True)).not_drawn(similarity, same), same)


def test_without_contrast_all_negatives_are_equally_likely():
    model = tiny_model(tiny_config(w_itc=0.0))
    same = torch.eye(5, dtype=torch.bool).repeat(4000, 1)
    noise = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    index, _ = model.draw_negatives(torch.zeros(20_000, 5), same, noise)
    counts = index[0::5].bincount(minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 900 and counts[1:].max() < 1100


def test_a_pair_of_the_same_image_or_caption_is_never_drawn():
    """Also when it is by far the most similar, and for the extreme values of the noise."""
    model = tiny_model()
    batch = make_same(tiny_batch(model.config, b=6), image=[(0, 1), (0, 2)], caption=[(3, 5), (2, 4)])
    same = same_pairs(batch)
    image_id, caption_id = batch["image_id"].tolist(), batch["caption_id"].tolist()
    for i in range(6):
        for j in range(6):
            assert same[i, j] == (image_id[i] == image_id[j] or caption_id[i] == caption_id[j])
    similarity = torch.where(same, 1.0, -1.0)
    for seed in range(200):
        noise = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
        noise[seed % 6] = seed % 2  # exactly 0 and exactly 1
        index, valid = model.draw_negatives(similarity, same, noise)
        assert valid.all() and not same[torch.arange(6), index].any()


def test_a_row_without_a_possible_negative_is_marked():
    model = tiny_model()
    same = torch.eye(4, dtype=torch.bool)
    same[2] = same[:, 2] = True
    index, valid = model.draw_negatives(torch.zeros(4, 4), same, torch.rand(4, 4))
    assert valid.tolist() == [True, True, False, True]
    assert index.min() >= 0 and index.max() < 4, "a skipped row still has a place that can be looked up"


def test_the_step_draws_for_images_and_for_texts_from_their_own_side():
    """Directions are not exchanged: the step asks with (image, text) cosines first, then with (text, image) ones."""
    model = tiny_model()
    batch = tiny_batch(model.config)
    asked, draw_negatives = [], model.draw_negatives

    def spy(similarity, same, noise):
        asked.append((similarity, noise))
        return draw_negatives(similarity, same, noise)

    model.draw_negatives = spy
    model(batch)
    image = model.embed_image(model.encode_image(batch["images"]))
    text = model.embed_text(model.encode_text(batch["input_ids"], batch["attention_mask"]))
    (image_to_text, noise_text), (text_to_image, noise_image) = asked
    torch.testing.assert_close(image_to_text, image @ text.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_to_image, text @ image.T, rtol=0, atol=1e-5)
    assert not image_to_text.requires_grad
    assert torch.equal(noise_text, batch["negative_noise"][0]) and torch.equal(noise_image, batch["negative_noise"][1])
