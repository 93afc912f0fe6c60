"""The five tasks: losses and logits against naive versions in loops, adopting a checkpoint, rows, batches, learning."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLS, ORDINARY, PAD, SEP, moved, tiny_config, tiny_model
from helpers import COLOURS, caption, square, write_squares
from test_losses import (
    CLOSE,
    assert_same_loss,
    dot,
    double,
    naive_cross_entropy,
    naive_itm,
    naive_negative,
    naive_unit,
    random_vectors,
)
from torch import Tensor

from data import ENTAILMENT_LABELS, SCHEMAS, pad, stable_id
from tasks import (
    CAPTIONS,
    TASKS,
    HeadConfig,
    TaskCollate,
    TaskRows,
    adopt,
    answers_of,
    build_task,
    by_picture,
    coverage,
    read_as,
    resized,
    texts_of,
)
from tokenizer import Tokenizer

ANSWERS = {"vqa": ["red", "two", "yes", "left"], "reasoning": ["false", "true"], "entailment": list(ENTAILMENT_LABELS)}
CLASSIFIERS = [("vqa", (1, 1, 1, 1)), ("entailment", (1, 1, 1)), ("reasoning", (2, 1, 2, 1)), ("reasoning", (1, 1))]


def task_model(task: str, linear: bool = False, **changes):
    """A very small model of a task in training mode, every parameter moved, the vector of an absent picture too."""
    torch.manual_seed(0)
    head = HeadConfig(task, ANSWERS.get(task, []), linear)
    return moved(build_task(head, dataclasses.asdict(tiny_config(**changes))).train())


def random_texts(count: int, draw: torch.Generator) -> list[list[int]]:
    """Different texts of 2 to 8 words."""
    texts = []
    while len(texts) < count:
        words = torch.randint(len(ORDINARY), (int(torch.randint(2, 9, (), generator=draw)),), generator=draw)
        text = [CLS, *(ORDINARY[word] for word in words), SEP]
        if text not in texts:
            texts.append(text)
    return texts


def captioned(config, listed: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """A batch of retrieval: picture i lists the texts of the numbers listed[i]; an empty slot bears the id of text 0,
    so that nobody gets through without looking at `given`."""
    draw = torch.Generator().manual_seed(seed)
    texts = random_texts(1 + max(map(max, listed)), draw)
    input_ids, attention_mask = pad([texts[number] for numbers in listed for number in numbers], PAD)
    b, c = len(listed), max(map(len, listed))
    return {
        "images": torch.rand(b, 3, *config.image_size, generator=draw) * 2 - 1,
        "picture": torch.arange(b),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "given": torch.tensor([[slot < len(numbers) for slot in range(c)] for numbers in listed]),
        "caption_id": torch.tensor([[100 + n for n in numbers] + [100] * (c - len(numbers)) for numbers in listed]),
        "chosen": torch.tensor([int(torch.randint(len(numbers), (), generator=draw)) for numbers in listed]),
        "negative_noise": torch.rand(2, b, b, generator=draw),
    }


def asked(model, counts: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """A batch of classification: row i has counts[i] pictures and a text of its own length."""
    draw, b, classes = torch.Generator().manual_seed(seed), len(counts), len(model.head_config.answers)
    input_ids, attention_mask = pad(random_texts(b, draw), PAD)
    soft = torch.rand(b, classes, generator=draw) * (torch.rand(b, classes, generator=draw) < 0.6)
    return {
        "images": torch.rand(sum(counts), 3, *model.config.image_size, generator=draw) * 2 - 1,
        "picture": torch.arange(sum(counts)),
        "shown": torch.tensor([[slot < count for slot in range(model.pictures)] for count in counts]),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target": soft if model.head_config.task == "vqa" else torch.randint(classes, (b,), generator=draw),
    }


def logits_of(model, batch: dict[str, Tensor]) -> Tensor:
    """What forward decides, before the loss."""
    image = model.encode_image(batch["images"])[batch["picture"]]
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    return model.decide(image, batch["shown"], text, batch["attention_mask"])


def trainable(model) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ------------------------------------------------------------------------------------------- retrieval and grounding


def naive_contrast(image: list[Tensor], text: list[Tensor], listed: list[list[int]], tau: Tensor) -> Tensor:
    """Mean over pictures and over texts of the mean of H(right answer), each direction counting half.

    text: one vector for each text of each picture, in order
    """
    numbers, result = [number for one in listed for number in one], 0.0
    for i, one in enumerate(listed):
        right = [t for t, number in enumerate(numbers) if number in one]
        logits = [dot(image[i], vector) / tau for vector in text]
        result = result + sum(naive_cross_entropy(logits, t) for t in right) / len(right) / len(listed) / 2
    for t, number in enumerate(numbers):
        right = [i for i, one in enumerate(listed) if number in one]
        logits = [dot(text[t], vector) / tau for vector in image]
        result = result + sum(naive_cross_entropy(logits, i) for i in right) / len(right) / len(numbers) / 2
    return result


def naive_retrieval(model, batch: dict[str, Tensor], listed: list[list[int]]) -> dict[str, Tensor]:
    """Both losses picture by picture and text by text, each encoded anew where it is needed, without padding."""
    student, tau = model.student, model.temperature
    texts = [ids[real].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    first = [sum(map(len, listed[:i])) for i in range(len(listed))]  # where the texts of picture i begin
    chosen = [int(slot) for slot in batch["chosen"]]
    taken = [texts[first[i] + slot] for i, slot in enumerate(chosen)]
    number = [listed[i][slot] for i, slot in enumerate(chosen)]

    def seen(i: int) -> Tensor:
        return student.image(batch["images"][i : i + 1])

    def read(ids: list[int]) -> Tensor:
        return student.text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))

    def fused(i: int, ids: list[int]) -> Tensor:
        return student.fusion(seen(i), read(ids), torch.ones(1, len(ids), dtype=torch.bool)).pair[0]

    def text_unit(ids: list[int]) -> Tensor:
        return naive_unit(student.text_projection(read(ids)[0, 0]))

    image = [naive_unit(student.image_projection(seen(i)[0, 0])) for i in range(len(listed))]
    losses = {"itc": naive_contrast(image, [text_unit(ids) for ids in texts], listed, tau)}
    positive, negative, rows = [], [], range(len(listed))
    for i in rows:
        positive.append(fused(i, taken[i]))
        similarities = [dot(image[i], text_unit(taken[j])) for j in rows]
        allowed = [j for j in rows if number[j] not in listed[i]]
        j = naive_negative(similarities, tau, allowed, batch["negative_noise"][0, i], i)
        negative += [] if j is None else [fused(i, taken[j])]
        similarities = [dot(text_unit(taken[i]), image[j]) for j in rows]
        allowed = [j for j in rows if number[i] not in listed[j]]
        j = naive_negative(similarities, tau, allowed, batch["negative_noise"][1, i], i)
        negative += [] if j is None else [fused(j, taken[i])]
    return losses | {"itm": naive_itm(model.itm_head, positive, negative)}


# Several captions, unequal numbers of them, captions of two pictures, and a picture that lists what all others list.
LISTED = [
    [[0], [1], [2], [3]],
    [[0, 1, 2], [3], [4, 5]],
    [[1, 0, 4], [2], [3, 4, 0], [5, 2]],
    [[0], [0], [1, 2]],
    [[0, 1, 2, 3], [1], [2], [3]],
]


@pytest.mark.parametrize("listed", LISTED)
def test_contrast_equals_its_naive_loop(listed):
    """Value, and gradient for pictures, texts and temperature."""
    model, count = task_model("retrieval").double(), sum(map(len, listed))
    batch = captioned(model.config, listed)
    image, text = random_vectors(len(listed), 8, seed=1), random_vectors(count, 8, seed=2)
    units = [[naive_unit(x) for x in vectors] for vectors in (image, text)]
    ours = model.loss_contrast(*map(torch.stack, units), batch["caption_id"], batch["given"])
    naive = naive_contrast(*units, listed, model.temperature)
    assert_same_loss(ours, naive, [image, text, model.log_temperature])


def test_with_one_caption_for_each_picture_contrast_is_that_of_pre_training():
    model = task_model("retrieval").double()
    image, text = (F.normalize(random_vectors(6, 8, seed=seed), dim=1) for seed in (1, 2))
    batch = captioned(model.config, [[number] for number in (3, 0, 5, 1, 4, 2)])
    ours = model.loss_contrast(image, text, batch["caption_id"], batch["given"])
    theirs = model.loss_itc(image, text, torch.zeros(6, 6, dtype=torch.bool), image, text)
    assert_same_loss(ours, theirs, [image, text, model.log_temperature])


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
@pytest.mark.parametrize("listed", LISTED[1:])
def test_the_step_of_retrieval_equals_one_that_encodes_every_pair_on_its_own(task, listed):
    """Both losses, and their gradients for every parameter; the last of these has a picture without a negative text."""
    model = task_model(task).double()
    batch = double(captioned(model.config, listed, seed=3))
    ours, naive = model(batch), naive_retrieval(model, batch, listed)
    assert ours.keys() == model.loss_weights.keys() == {"itc", "itm"} and set(model.loss_weights.values()) == {1.0}
    for name in naive:
        assert_same_loss(ours[name], naive[name], trainable(model))


def test_matching_sets_the_chosen_caption_against_negatives_that_belong_to_nobody(monkeypatch):
    """Over many draws: each negative is possible, each possible negative is drawn, and positives are as chosen."""
    listed = [[0, 1], [2], [3, 2, 4], [5, 0]]
    model, pairs = task_model("retrieval").eval(), []
    with torch.no_grad():
        model.log_temperature.fill_(1.0)  # so high that every candidate has its turn
    pair = model.pair
    monkeypatch.setattr(model, "pair", lambda *given: pairs.append(given) or pair(*given))
    model.config.albef_negatives = True  # which leaves nothing out but what is right
    found, possible = set(), set()
    for seed in range(60):
        batch = captioned(model.config, listed)
        draw = torch.Generator().manual_seed(seed)
        batch["negative_noise"] = torch.rand(2, 4, 4, generator=draw)
        batch["chosen"] = torch.tensor([int(torch.randint(len(one), (), generator=draw)) for one in listed])
        number = [one[slot] for one, slot in zip(listed, batch["chosen"].tolist(), strict=True)]
        with torch.no_grad():
            model(batch)
            images = model.encode_image(batch["images"])[:, 0]
            texts = model.encode_text(batch["input_ids"], batch["attention_mask"])[:, 0]
        image, text, real = pairs.pop()
        assert len(image) == len(text) == len(real) == 12 and not pairs
        numbers = [n for one in listed for n in one]
        shown = [(images - row).abs().sum(dim=1).argmin().item() for row in image[:, 0]]
        said = [numbers[(texts - row).abs().sum(dim=1).argmin()] for row in text[:, 0]]
        assert shown[:4] == [0, 1, 2, 3] and said[:4] == number
        assert shown[4:8] == [0, 1, 2, 3] and said[8:] == number
        assert all(n not in listed[i] for i, n in zip(shown[4:], said[4:], strict=True))
        found |= {("text", i, n) for i, n in zip(shown[4:8], said[4:8], strict=True)}
        found |= {("image", i, n) for i, n in zip(shown[8:], said[8:], strict=True)}
        possible |= {(side, i, n) for side in ("text", "image") for n in number for i in range(4) if n not in listed[i]}
    assert found == possible


# ------------------------------------------------------------------------------------------------------ classification


def naive_logits(model, batch: dict[str, Tensor]) -> list[Tensor]:
    """Row by row: each picture with the text by itself, without padding; the vector of the absent for a missing one."""
    rows, k = [], 0
    for ids, real, shown in zip(batch["input_ids"], batch["attention_mask"], batch["shown"].tolist(), strict=True):
        vectors = []
        for there in shown:
            if not there:
                vectors.append(model.absent)
                continue
            ones = torch.ones(1, int(real.sum()), dtype=torch.bool)
            text, image = model.student.text(ids[real][None], ones), model.student.image(batch["images"][k : k + 1])
            vectors.append(model.student.fusion(image, text, ones).pair[0])
            k += 1
        rows.append(model.head(torch.cat(vectors)))
    assert k == len(batch["images"])
    return rows


def naive_answer_loss(task: str, rows: list[Tensor], target: Tensor) -> Tensor:
    """Of vqa the binary cross-entropies of all answers added up, of the others the cross-entropy; mean over rows."""
    result = 0.0
    for logits, right in zip(rows, target, strict=True):
        if task == "vqa":
            for logit, score in zip(logits, right, strict=True):
                chance = 1 / (1 + (-logit).exp())
                result = result - (score * chance.log() + (1 - score) * (1 - chance).log()) / len(rows)
        else:
            result = result + naive_cross_entropy(list(logits), int(right)) / len(rows)
    return result


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("task", "counts"), CLASSIFIERS)
def test_logits_and_loss_equal_those_of_rows_taken_one_by_one(task, counts, linear):
    """Rows of one and of two pictures in one batch; and the gradient of every parameter, the absent too."""
    model = task_model(task, linear).double()
    batch = double(asked(model, counts))
    rows = naive_logits(model, batch)
    torch.testing.assert_close(logits_of(model, batch).double(), torch.stack(rows), **CLOSE)
    loss = model(batch)
    assert loss.keys() == model.loss_weights.keys() == {task}
    assert_same_loss(loss[task], naive_answer_loss(task, rows, batch["target"]), trainable(model))


def test_the_order_of_two_pictures_matters():
    """ "The left one is larger" is about which is which."""
    model = task_model("reasoning").eval()
    batch = asked(model, (2, 2))
    turned = batch | {"images": batch["images"][[1, 0, 2, 3]]}
    change = (logits_of(model, batch) - logits_of(model, turned)).abs().amax(dim=1)
    assert change[0] > 1e-3 and change[1] < 1e-6


def test_a_missing_picture_is_the_learned_vector_of_the_absent():
    """It moves the rows of one picture and no others, and it has a gradient even in a batch that does not use it."""
    model = task_model("reasoning").eval()
    batch = asked(model, (1, 2, 1))
    before = logits_of(model, batch)
    with torch.no_grad():
        model.absent.add_(1.0)
    change = (logits_of(model, batch) - before).abs().amax(dim=1)
    assert change[0] > 1e-3 and change[1] == 0 and change[2] > 1e-3
    for counts, used in (((1, 2), True), ((2, 2), False)):
        model.zero_grad()
        model(asked(model, counts))["reasoning"].backward()
        assert model.absent.grad is not None and bool(model.absent.grad.abs().sum() > 0) == used


@pytest.mark.parametrize(("task", "counts"), CLASSIFIERS)
def test_padding_and_other_rows_change_no_logit(task, counts):
    """A row alone, cut to its own length, and the same row in a batch with four more tokens of padding."""
    model = task_model(task).eval()
    batch = asked(model, counts)
    more = {name: F.pad(batch[name], (0, 4), value=0) for name in ("input_ids", "attention_mask")}
    logits = logits_of(model, batch)
    torch.testing.assert_close(logits, logits_of(model, batch | more), rtol=0, atol=1e-5)
    for row, count in enumerate(counts):
        first, real = sum(counts[:row]), batch["attention_mask"][row]
        alone = {
            "images": batch["images"][first : first + count],
            "picture": torch.arange(count),
            "shown": batch["shown"][row : row + 1],
            "input_ids": batch["input_ids"][row : row + 1, real],
            "attention_mask": real[real][None],
        }
        torch.testing.assert_close(logits_of(model, alone)[0], logits[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("task", "counts"), CLASSIFIERS)
def test_match_is_the_logit_of_the_answer_that_is_given(task, counts):
    """What `explain` explains: the largest logit of one question, its text repeated for each picture."""
    model = task_model(task).eval()
    batch = asked(model, counts[:1])
    count = counts[0]
    image = model.encode_image(batch["images"])
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    said = model.match(image, text.expand(count, -1, -1), batch["attention_mask"].expand(count, -1))
    torch.testing.assert_close(said, logits_of(model, batch).amax(dim=1), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- all five tasks


def batch_for(model, seed: int = 0) -> dict[str, Tensor]:
    """A batch of the model's task; of reasoning rows of one and two pictures, of retrieval several captions."""
    task = model.head_config.task
    if task in ("retrieval", "grounding"):
        return captioned(model.config, [[0, 1, 2], [3], [4, 5], [6]], seed)
    return asked(model, (2, 1, 1) if task == "reasoning" else (1, 1, 1), seed)


@pytest.mark.parametrize("task", TASKS)
def test_each_picture_and_each_text_is_encoded_once_a_step(task):
    """No row of padding goes through an encoder, and fusion sees the pairs there are and no more."""
    model, seen = task_model(task), []
    parts = {"image": model.student.image, "text": model.student.text, "fusion": model.student.fusion.blocks[0]}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, given, out, name=name: seen.append((name, len(given[0]))))
    batch = batch_for(model)
    model(batch)
    pictures, texts = len(batch["images"]), len(batch["input_ids"])
    fused = 3 * pictures if task in ("retrieval", "grounding") else pictures
    assert seen == [("image", pictures), ("text", texts), ("fusion", fused)]


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_has_a_gradient_after_one_step(task):
    """Training on several processes would stop at a parameter without one; of a key's bias and of unused words, the
    gradient is zero but there."""
    model = task_model(task)
    losses = model(batch_for(model))
    sum(model.loss_weights[name] * loss for name, loss in losses.items()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_no_more_than_it_needs(task):
    """Neither teacher nor queue nor the heads of pre-training, whatever the checkpoint's config says."""
    shape = dataclasses.asdict(tiny_config(queue_size=8))
    names = {
        name.split(".")[0]
        for name in dict(build_task(HeadConfig(task, ANSWERS.get(task, [])), shape).named_parameters())
    }
    assert (
        names - {"student"}
        == {
            "retrieval": {"log_temperature", "itm_head"},
            "grounding": {"log_temperature", "itm_head"},
            "vqa": {"head"},
            "reasoning": {"head", "absent"},
            "entailment": {"head"},
        }[task]
    )


def test_a_choice_needs_two_answers():
    with pytest.raises(ValueError, match="vqa has 1 answers to choose from: expected two or more"):
        build_task(HeadConfig("vqa", ["red"]), dataclasses.asdict(tiny_config()))


def squares(numbers: list[int], config) -> Tensor:
    """Pictures of helpers.square as the model sees them."""
    pixels = np.stack([square(number, *config.image_size) for number in numbers])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def lesson(model) -> dict[str, Tensor]:
    """Twelve rows to learn by heart, of retrieval with two captions for every third picture.

    Of reasoning every second row is the one before it with its pictures exchanged and its label turned, so that only
    who tells the two apart can learn it; the last four have one picture. Of the others the same text stands beside
    several pictures, and several texts beside the same picture.
    """
    task, config, classes = model.head_config.task, model.config, len(model.head_config.answers)
    texts = [[CLS, ORDINARY[n // 4], ORDINARY[10 + n % 4], SEP] for n in range(12)]  # colour and place
    if task in ("retrieval", "grounding"):
        turned = [[CLS, ORDINARY[20], *reversed(text[1:3]), SEP] for text in texts]
        given = [[texts[n], turned[n]] if n % 3 == 0 else [texts[n]] for n in range(12)]
        input_ids, attention_mask = pad([text for both in given for text in both], PAD)
        return {
            "images": squares(list(range(12)), config),
            "picture": torch.arange(12),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "given": torch.tensor([[True, len(both) == 2] for both in given]),
            "caption_id": torch.arange(24).view(12, 2),
        }
    if task == "reasoning":
        numbers = [n for i in range(4) for n in (i, i + 4, i + 4, i)] + [8, 9, 10, 11]
        counts, said = [2] * 8 + [1] * 4, [texts[i // 2] for i in range(8)] + [texts[4]] * 4
        target = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0])
    else:
        numbers, counts, said = [i // 2 for i in range(12)], [1] * 12, [texts[i % 3] for i in range(12)]
        target = torch.tensor([i * 7 // 3 % classes for i in range(12)])
    if task == "vqa":
        target = F.one_hot(target, classes).float()
        target[:, 1] += 0.3 * (target[:, 1] == 0)  # everywhere a second answer that is right in part
    input_ids, attention_mask = pad(said, PAD)
    return {
        "images": squares(list(range(12)), config),
        "picture": torch.tensor(numbers),
        "shown": torch.tensor([[slot < count for slot in range(model.pictures)] for count in counts]),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target": target,
    }


@pytest.mark.parametrize("task", TASKS)
def test_twelve_rows_are_learned_by_heart(task):
    """Every answer is right; of retrieval contrast finds every right answer, and matching is far better than chance."""
    torch.manual_seed(0)
    shape = dataclasses.asdict(tiny_config(image_depth=1, text_depth=1, patch_size=8))
    model = build_task(HeadConfig(task, ANSWERS.get(task, [])), shape)
    contrasts = task in ("retrieval", "grounding")
    batch, steps, losses = lesson(model), 200 if contrasts else 120, []
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        if contrasts:
            batch["negative_noise"] = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(step))
            batch["chosen"] = batch["given"][:, 1].long() * (step % 2)
        losses.append(model(batch))
        adam.zero_grad()
        sum(losses[-1].values()).backward()
        adam.step()
        model.after_step()
    model.eval()
    if not contrasts:
        right = batch["target"].argmax(dim=1) if task == "vqa" else batch["target"]
        assert torch.equal(logits_of(model, batch).argmax(dim=1), right)
        return
    image = model.embed_image(model.encode_image(batch["images"]))
    text = model.embed_text(model.encode_text(batch["input_ids"], batch["attention_mask"]))
    owner = batch["given"].nonzero()[:, 0]
    scores = image @ text.T
    assert torch.equal(owner[scores.argmax(dim=1)], torch.arange(12)) and torch.equal(scores.argmax(dim=0), owner)
    assert sum(loss["itm"].item() for loss in losses[-20:]) / 20 < 0.5 * model.chance(12)["itm"]


# -------------------------------------------------------------------------------------------------- rows and answers


def test_the_answers_of_vqa_are_those_with_the_largest_sum_of_scores():
    """Not the most frequent ones; ties in the alphabet; no more than asked for."""
    rows = [
        {"answers": {"red": 1.0, "crimson": 0.3}},
        {"answers": {"crimson": 0.3, "two": 0.5}},
        {"answers": {"crimson": 0.3, "blue": 0.5}},
    ]
    assert answers_of("vqa", rows, 10) == ["red", "crimson", "blue", "two"]
    assert answers_of("vqa", rows, 3) == ["red", "crimson", "blue"]
    assert answers_of("reasoning", rows, 10) == ["false", "true"]
    assert answers_of("entailment", rows, 2) == ["entailment", "neutral", "contradiction"]
    assert answers_of("retrieval", rows, 10) == answers_of("grounding", rows, 10) == []


def test_coverage_is_the_best_score_within_reach():
    """By hand: 1, 0.3 and nothing of three rows."""
    rows = [{"answers": {"red": 1.0, "two": 0.6}}, {"answers": {"blue": 1.0, "two": 0.3}}, {"answers": {"no": 1.0}}]
    assert coverage(rows, ["two", "red"]) == pytest.approx(130 / 3)
    assert coverage(rows, ["red", "blue", "no"]) == 100.0
    assert coverage(rows, ["yes"]) == 0.0


def test_rows_of_a_picture_become_one_with_all_its_texts():
    """Each text once, in order; the twin is kept and other keys are not needed."""
    pairs = [
        {"image": "a.png", "caption": ["x", "y"], "twin": "f:1", "number": 3},
        {"image": "b.png", "caption": "x"},
        {"image": "a.png", "caption": ["y", "z", "z"]},
    ]
    assert by_picture(pairs, "pairs") == [
        {"image": "a.png", "twin": "f:1", "caption": ["x", "y", "z"]},
        {"image": "b.png", "caption": ["x"]},
    ]
    phrases = [{"image": "a.png", "text": "x"}, {"image": "a.png", "text": "y"}, {"image": "c.png", "text": "x"}]
    assert by_picture(phrases, "phrases") == [
        {"image": "a.png", "caption": ["x", "y"]},
        {"image": "c.png", "caption": ["x"]},
    ]


def test_texts_that_the_tokenizer_cannot_tell_apart_are_one_text_of_a_picture():
    """As it is written first: a caption that counts twice would weigh twice."""
    rows = [{"image": "a.png", "caption": ["A caf\u00e9", "x"]}, {"image": "a.png", "caption": " a  cafe\u0301"}]
    assert by_picture(rows, "pairs") == [{"image": "a.png", "caption": ["A caf\u00e9", "x"]}]


def test_each_task_is_read_with_its_own_text():
    assert texts_of({"image": "a.png", "caption": "x"}, "pairs") == ["x"]
    assert texts_of({"image": "a.png", "caption": ["x", "y"]}, "pairs") == ["x", "y"]
    assert texts_of({"image": "a.png", "question": "q", "answers": {"red": 1.0}, "text": "no"}, "vqa") == ["q"]
    assert texts_of({"images": ["a.png"], "text": "t", "label": True}, "reasoning") == ["t"]


def test_a_caption_beside_the_text_of_another_task_changes_nothing():
    """More keys are allowed and kept, and pictures of entailment come with captions."""
    assert texts_of({"image": "a.png", "text": "t", "label": "neutral", "caption": "x"}, "entailment") == ["t"]
    assert texts_of({"image": "a.png", "question": "q", "answers": {"red": 1.0}, "caption": "x"}, "vqa") == ["q"]


# ------------------------------------------------------------------------------------------------- samples and batches


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 squares; the folder has pictures/00.png to pictures/23.png."""
    return write_squares(tmp_path_factory.mktemp("squares") / "pairs.jsonl", 24, several=True)


def samples(pictures, task: str, rows: list[dict], seed: int = 0, augment: str = "none", **changes) -> TaskRows:
    """The dataset of some rows whose pictures are numbers."""

    def path(number: int) -> str:
        return str(pictures.parent / "pictures" / f"{number:02d}.png")

    named = []
    for row in rows:
        row = dict(row)
        if "images" in row:
            row["images"] = [path(number) for number in row["images"]]
        else:
            row["image"] = path(row["image"])
        named.append(row)
    tokenizer = Tokenizer.build(text for row in rows for text in texts_of(row, read_as(task)))
    config = tiny_config(vocab_size=len(tokenizer), **changes)
    return TaskRows(named, HeadConfig(task, ANSWERS.get(task, [])), tokenizer, config, augment, seed)


def test_the_target_is_what_the_head_should_say(pictures):
    """Scores of the answers in the list, zeros for what is not in it; the place of a class."""
    rows = [
        {"image": 0, "question": "q", "answers": {"yes": 0.9, "red": 0.3, "purple": 1.0}},
        {"image": 0, "question": "q", "answers": {"purple": 1.0}},
    ]
    vqa = samples(pictures, "vqa", rows)
    assert vqa[0, 0]["target"].tolist() == pytest.approx([0.3, 0, 0.9, 0]) and vqa[0, 1]["target"].tolist() == [0] * 4
    rows = [{"images": [0], "text": "t", "label": label} for label in (False, True)]
    assert [samples(pictures, "reasoning", rows)[0, i]["target"].item() for i in range(2)] == [0, 1]
    rows = [{"image": 0, "text": "t", "label": label} for label in ("contradiction", "entailment", "neutral")]
    assert [samples(pictures, "entailment", rows)[0, i]["target"].item() for i in range(3)] == [2, 0, 1]


def test_answers_beside_the_label_of_another_task_change_nothing(pictures):
    """More keys are allowed and kept."""
    rows = [{"image": 0, "text": "t", "label": "neutral", "answers": {"red": 1.0}}]
    assert samples(pictures, "entailment", rows)[0, 0]["target"].tolist() == 1


def test_a_batch_of_reasoning_has_its_pictures_in_order_and_no_others(pictures):
    """Shapes, masks, padding; the second picture of a row stands behind the first."""
    rows = [
        {"images": [3, 1], "text": "both squares are at the top", "label": True},
        {"images": [7], "text": "it is red", "label": False},
        {"images": [2, 2], "text": "they are the same", "label": True},
    ]
    dataset = samples(pictures, "reasoning", rows)
    batch = TaskCollate(dataset.tokenizer.pad_id, 2, 1)([dataset[0, i] for i in range(3)])
    assert torch.allclose(batch["images"][batch["picture"]], squares([3, 1, 7, 2, 2], tiny_config()), atol=1e-6)
    assert batch["shown"].tolist() == [[True, True], [True, False], [True, True]]
    assert batch["given"].tolist() == [[True]] * 3
    assert batch["target"].tolist() == [1, 0, 1] and batch["target"].dtype == torch.long
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i]
        assert batch["input_ids"][i][real].tolist() == dataset.tokenizer.encode(row["text"], 16)
        assert (batch["input_ids"][i][~real] == dataset.tokenizer.pad_id).all()
    assert batch["attention_mask"].sum(dim=1).max() == batch["attention_mask"].shape[1]
    longer = TaskCollate(dataset.tokenizer.pad_id, 2, 1, length=16)([dataset[0, i] for i in range(3)])
    assert longer["input_ids"].shape == longer["attention_mask"].shape == (3, 16)
    assert torch.equal(longer["attention_mask"].sum(dim=1), batch["attention_mask"].sum(dim=1))


def test_a_batch_of_retrieval_says_whose_its_captions_are(pictures):
    """Unequal numbers of captions, one of them of two pictures; texts are cut to max_tokens."""
    rows = [
        {"image": 0, "caption": ["a red square", "red"]},
        {"image": 4, "caption": "green " * 30},
        {"image": 8, "caption": ["blue", "a red square", "a blue square at the left"]},
    ]
    dataset = samples(pictures, "retrieval", rows)
    batch = TaskCollate(dataset.tokenizer.pad_id, 1, 4)([dataset[0, i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 16, 24) and batch["picture"].tolist() == [0, 1, 2]
    assert batch["shown"].tolist() == [[True]] * 3
    assert batch["given"].tolist() == [[True, True, False, False], [True, False, False, False], [True] * 3 + [False]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, 16)
    texts = [text for row in rows for text in texts_of(row, "pairs")]
    read = [dataset.tokenizer.encode(text, 16) for text in texts]
    assert [ids[real].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == read
    assert batch["caption_id"].shape == (3, 4)
    assert batch["caption_id"][batch["given"]].tolist() == [stable_id(str(ids)) for ids in read]
    assert batch["caption_id"][0, 0] == batch["caption_id"][2, 1]
    assert all(
        0 <= slot < len(texts_of(row, "pairs")) for slot, row in zip(batch["chosen"].tolist(), rows, strict=True)
    )


def test_of_many_captions_some_are_taken_at_random_and_reproducibly(pictures):
    """Five of nine, each once and in order, another choice each epoch; they follow from (seed, epoch, row) alone."""
    captions = [f"{caption(i)} {colour}" for i, colour in enumerate([*COLOURS, "black", "white", "grey"])]
    rows = [{"image": i, "caption": captions} for i in range(2)]

    def taken(key: tuple[int, int], seed: int = 0) -> tuple[tuple[int, ...], int]:
        sample = samples(pictures, "retrieval", rows, seed, augment="photo")[key]
        place = {stable_id(str(sample_text(text))): number for number, text in enumerate(captions)}
        assert sample["texts"] == [sample_text(captions[place[i]]) for i in sample["caption_id"]]
        return tuple(place[i] for i in sample["caption_id"]), sample["chosen"]

    tokenizer = samples(pictures, "retrieval", rows).tokenizer

    def sample_text(text: str) -> list[int]:
        return tokenizer.encode(text, 16)

    epochs = [taken((epoch, 0)) for epoch in range(30)]
    for places, chosen in epochs:
        assert len(places) == CAPTIONS == 5 and list(places) == sorted(set(places)) and 0 <= chosen < CAPTIONS
    assert {number for places, _ in epochs for number in places} == set(range(9))
    assert {chosen for _, chosen in epochs} == set(range(5)) and len({places for places, _ in epochs}) > 10
    assert epochs == [taken((epoch, 0)) for epoch in range(30)]
    assert epochs != [taken((epoch, 1)) for epoch in range(30)]
    assert epochs != [taken((epoch, 0), seed=1) for epoch in range(30)]


def test_five_captions_or_fewer_are_all_there_in_every_epoch(pictures):
    rows = [{"image": 0, "caption": [caption(i) for i in range(count)]} for count in (1, 5)]
    dataset = samples(pictures, "retrieval", rows)
    for epoch in range(5):
        for number, row in enumerate(rows):
            read = [dataset.tokenizer.encode(text, 16) for text in row["caption"]]
            assert dataset[epoch, number]["texts"] == read and len(set(map(str, read))) == len(read)
            assert dataset[epoch, number]["caption_id"] == [stable_id(str(ids)) for ids in read]


def test_augmentation_follows_from_the_key_and_each_picture_has_its_own(pictures):
    """The same picture twice in a row is cropped twice."""
    dataset = samples(pictures, "reasoning", [{"images": [3, 3], "text": "t", "label": True}], augment="photo")
    one, again, other = (dataset[key]["images"] for key in ((0, 0), (0, 0), (1, 0)))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])


# ------------------------------------------------------------------------------------- pictures that several rows show

EIGHT = {  # eight rows about two pictures or three, in several orders and slots; of retrieval, rows of one picture
    "vqa": [{"image": 5 * (i % 2), "question": f"q {i}", "answers": {ANSWERS["vqa"][i % 4]: 1.0}} for i in range(8)],
    "entailment": [
        {"image": 7 * (i // 4), "text": f"t {i}", "label": ENTAILMENT_LABELS[i % 3]} for i in range(8)
    ],
    "reasoning": [
        {"images": images, "text": f"t {i}", "label": i % 3 == 0}
        for i, images in enumerate([[4, 9], [9, 4], [4], [9], [4, 4], [9, 9], [9, 2], [2, 4]])
    ],
    "retrieval": [
        {"image": 3 * (i % 2), "caption": [f"t {i}", f"u {i % 3}"][: 1 + i % 2]} for i in range(8)
    ],
}  # fmt: skip
DISTINCT = {"vqa": 2, "entailment": 2, "reasoning": 3, "retrieval": 2}


def collated(dataset: TaskRows, length: int = 0, epoch: int = 0) -> dict[str, Tensor]:
    """All rows as one batch."""
    both = [dataset[epoch, number] for number in range(len(dataset))]
    captions = max(len(one["texts"]) for one in both)
    return TaskCollate(dataset.tokenizer.pad_id, TASKS[dataset.head.task].pictures, captions, length)(both)


def shown_by_rows(dataset: TaskRows, epoch: int = 0) -> Tensor:
    """The pictures of all rows one after another, however often they are repeated."""
    return torch.stack([image for number in range(len(dataset)) for image in dataset[epoch, number]["images"]])


@pytest.mark.parametrize("task", EIGHT)
def test_a_picture_of_several_rows_is_encoded_once_and_counts_as_often_as_it_is_shown(pictures, task):
    """Losses, and gradients of every parameter, are those of a batch in which it is repeated."""
    dataset, seen = samples(pictures, task, EIGHT[task]), []
    batch, repeated = collated(dataset), shown_by_rows(dataset)
    assert len(batch["images"]) == DISTINCT[task] < len(repeated) == batch["shown"].sum() == len(batch["picture"])
    assert torch.equal(batch["images"][batch["picture"]], repeated)
    model = task_model(task, vocab_size=len(dataset.tokenizer)).double()
    model.student.image.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    noise = {"negative_noise": torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))}
    batch = double(batch | noise)
    ours = model(batch)
    naive = model(batch | {"images": repeated.double(), "picture": torch.arange(len(repeated))})
    assert seen == [DISTINCT[task], len(repeated)] and ours.keys() == model.loss_weights.keys()
    for name in ours:
        assert_same_loss(ours[name], naive[name].double(), trainable(model))


@pytest.mark.parametrize("augment", ["photo", "aerial", "aerial-strong", "drawing", "boxes"])
@pytest.mark.parametrize("task", EIGHT)
def test_augmented_pictures_are_no_longer_the_same(pictures, task, augment):
    """Each stands for itself, also where one row shows one file twice."""
    dataset = samples(pictures, task, EIGHT[task], augment=augment)
    for epoch in range(3):
        batch, repeated = collated(dataset, epoch=epoch), shown_by_rows(dataset, epoch)
        assert torch.equal(batch["images"][batch["picture"]], repeated)
        assert len(batch["images"]) == len(repeated)


@pytest.mark.parametrize("task", EIGHT)
def test_a_compiled_step_has_one_shape_whatever_pictures_are_repeated(pictures, task):
    dataset = samples(pictures, task, EIGHT[task])
    batch, repeated = collated(dataset, length=16), shown_by_rows(dataset)
    assert torch.equal(batch["images"], repeated) and batch["picture"].tolist() == list(range(len(repeated)))


# --------------------------------------------------------------------------------------- from pre-training to a task

WORDS = ["a red square", "a blue square", "red and blue", "the square"]


def pre_trained(**changes) -> tuple[dict[str, Tensor], object, Tokenizer]:
    """The weights of a small pre-trained model, its config and its tokenizer."""
    tokenizer = Tokenizer.build(WORDS)
    ids = {"vocab_size": len(tokenizer), "mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids}
    config = tiny_config(**(ids | changes))
    return dict(tiny_model(config).state_dict()), config, tokenizer


def adopted(task: str, tokenizer: Tokenizer | None = None, before: dict | None = None, **changes):
    """A fresh model of a task with some fields of the config changed -> itself, what was fresh, source, fresh names."""
    source, config, old = pre_trained(**(before or {}))
    tokenizer = tokenizer or old
    shape = dataclasses.asdict(config) | changes | {"vocab_size": len(tokenizer)}
    torch.manual_seed(1)
    model = moved(build_task(HeadConfig(task, ANSWERS.get(task, [])), shape))
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    names = adopt(model, source, config, old.vocab, tokenizer)
    return model.state_dict(), fresh, source, names


@pytest.mark.parametrize("task", TASKS)
def test_encoders_of_the_same_shape_are_taken_bit_by_bit(task):
    """All of what both have, the matching head and the temperature too; the names of the rest are returned."""
    now, fresh, source, names = adopted(task)
    assert set(names) == {name for name in now if name.split(".")[0] in ("head", "absent")}
    for name, value in now.items():
        assert torch.equal(value, fresh[name] if name in names else source[name]), name
        assert name in names or not torch.equal(value, fresh[name]), name


def test_what_the_checkpoint_was_trained_without_is_fresh_and_named():
    """A checkpoint of a classification has no projections, no temperature and no matching head."""
    now, fresh, _, names = adopted("retrieval", before={"w_itc": 0.0, "w_itm": 0.0})
    wanted = ("student.image_projection", "student.text_projection", "log_temperature", "itm_head")
    assert set(names) == {name for name in now if name.startswith(wanted)}
    assert all(torch.equal(now[name], fresh[name]) for name in names)


@pytest.mark.parametrize("new", [(24, 24), (32, 48), (24, 16), (8, 12)])
def test_at_another_resolution_the_positions_are_interpolated(new):
    """Of the image alone, and also where the other grid has as many patches; the class position stays as it is."""
    now, _, source, _ = adopted("entailment", image_size=new)
    name = "student.image.positions"
    grid = (new[0] // 4, new[1] // 4)
    assert len(now[name]) == 1 + grid[0] * grid[1]
    assert torch.equal(now[name], resized(source[name], (4, 6), grid))
    assert torch.equal(now[name][0], source[name][0])
    for other in source.keys() & now.keys() - {name}:
        assert torch.equal(now[other], source[other]), other


def test_positions_of_an_equal_grid_stay_what_they_are():
    positions = torch.randn(1 + 24, 16)
    torch.testing.assert_close(resized(positions, (4, 6), (4, 6)), positions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", [(10, 16), (6, 9), (15, 12), (4, 7)])
def test_a_ramp_over_the_grid_stays_a_ramp(new):
    """Rows in one feature, columns in the other, in units of old patches; away from the rim, where nothing is missing.

    A cubic of torch's kind is off a ramp by up to 0.05 of a patch.
    """
    rows, columns = 5, 8
    ramp = torch.tensor([[7.0, 7.0], *([float(y), float(x)] for y in range(rows) for x in range(columns))])
    found, count = resized(ramp, (rows, columns), new), 0
    assert torch.equal(found[0], ramp[0])
    for y in range(new[0]):
        for x in range(new[1]):
            place = (y + 0.5) * rows / new[0] - 0.5, (x + 0.5) * columns / new[1] - 0.5
            if 1 <= place[0] <= rows - 2 and 1 <= place[1] <= columns - 2:
                assert found[1 + y * new[1] + x].tolist() == pytest.approx(place, abs=0.051)
                count += 1
    assert count >= 8


@pytest.mark.parametrize("length", [10, 16, 20])
def test_longer_texts_keep_the_learned_positions(length):
    """The code of a fresh model goes on where they end; shorter texts lose the last ones."""
    now, fresh, source, _ = adopted("vqa", max_tokens=length)
    name, kept = "student.text.positions", min(length, 16)
    assert len(now[name]) == length
    assert torch.equal(now[name][:kept], source[name][:kept]) and torch.equal(now[name][kept:], fresh[name][kept:])


def test_an_added_word_starts_at_the_mean_of_its_pieces():
    """ "redsquare" was red and ##s to ##e; the words that were there keep their ids and their rows."""
    _, _, old = pre_trained()
    texts = ["redsquare redsquare", "green green red", "blue once", "green"]
    longer = old.extended(texts, 10)
    assert longer.vocab[: len(old)] == old.vocab and longer.vocab[len(old) :] == ["green", "redsquare"]
    assert all(longer.encode(text) == old.encode(text) for text in WORDS)
    assert (longer.pad_id, longer.cls_id, longer.mask_id) == (old.pad_id, old.cls_id, old.mask_id)
    now, _, source, names = adopted("vqa", longer)
    name = "student.text.words.weight"
    assert name not in names and torch.equal(now[name][: len(old)], source[name])
    for number, pieces in enumerate((["g", "##r", "##e", "##e", "##n"], ["red", *(f"##{c}" for c in "square")])):
        expected = sum(source[name][old.vocab.index(piece)] for piece in pieces) / len(pieces)
        torch.testing.assert_close(now[name][len(old) + number], expected, rtol=0, atol=1e-6)


def test_no_more_words_are_added_than_asked_for():
    """The most frequent first, ties in the alphabet, none that was seen once, none that is there."""
    _, _, old = pre_trained()
    texts = ["zebra apple zebra apple", "pear pear pear", "red red red red", "lonely"]
    assert old.extended(texts, 2).vocab == [*old.vocab, "pear", "apple"]
    assert old.extended(texts, 0).vocab == old.vocab


def test_another_shape_is_one_clear_sentence():
    """Encoders of another width, and a head for another number of answers."""
    source, config, tokenizer = pre_trained()
    wide = build_task(HeadConfig("vqa", ANSWERS["vqa"]), dataclasses.asdict(config) | {"width": 32})
    with pytest.raises(ValueError, match=r"is \(.*\) in the checkpoint and \(.*\) here: .*encoders of another shape"):
        adopt(wide, source, config, tokenizer.vocab, tokenizer)
    three = build_task(HeadConfig("vqa", ["red", "green", "blue"]), dataclasses.asdict(config))
    four = build_task(HeadConfig("vqa", ANSWERS["vqa"]), dataclasses.asdict(config))
    with pytest.raises(ValueError) as error:
        adopt(four, dict(three.state_dict()), config, tokenizer.vocab, tokenizer)
    assert "head.3.weight is (3, 32) in the checkpoint and (4, 32) here" in str(error.value)
    assert "pass --new-head" in str(error.value) and "\n" not in str(error.value)


def test_a_task_without_text_reads_an_empty_one(monkeypatch):
    """As a classification of pictures would: nothing but its schema says that there is none."""
    monkeypatch.setitem(SCHEMAS, "labels", {"image": SCHEMAS["pairs"]["image"], "label": SCHEMAS["phrases"]["text"]})
    assert texts_of({"image": "a.png", "label": "circle", "text": "a further key"}, "labels") == [""]
    assert texts_of({"image": "a.png", "text": "a circle"}, "phrases") == ["a circle"]


def test_two_spellings_of_an_answer_are_one_class():
    """As evaluation compares them: else each would be trained as a wrong answer where the other is right."""
    rows = [
        {"image": "a.png", "question": "a?", "answers": {"Yes": 0.6, "yes.": 0.6}},
        {"image": "a.png", "question": "b?", "answers": {"YES": 0.3, "no": 0.9}},
    ]
    assert answers_of("vqa", rows, 10) == ["Yes", "no"]
    for answers in (["Yes", "no"], ["yes", "No."]):
        of_task = TaskRows(rows, HeadConfig("vqa", answers), Tokenizer.build([]), tiny_config(), "none", 0)
        assert [of_task.target(row).tolist() for row in rows] == [[1.0, 0.0], pytest.approx([0.3, 0.9])]
