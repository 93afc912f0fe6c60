"""What a pre-trained model is for: five downstream tasks, each a small head and a loss on the shared encoders.

    retrieval    contrast with every caption of a picture as a right answer, matching with hard negatives
    grounding    the same on pictures and phrases: no box is ever seen; where the phrase is comes from explain.py
    vqa          classification over a list of answers, with soft targets
    reasoning    true or false of one or two pictures
    entailment   entailment, neutral or contradiction

How to read it. The first two keep the heads of pre-training. The other three put an MLP on the pair vector: the fused
[CLS] of (picture, text), and of two pictures the two vectors side by side. A batch holds k pictures and t texts without
padding rows, and masks that say whose they are:

    images (i, 3, height, width), picture (k,)              the i distinct pictures, each encoded once; whose place is
    shown (b, pictures)                                     True = the row has this picture; k is the count of True
    input_ids (t, l), given (b, captions)                   True = the row has this caption; t is the count of True

One letter, one meaning, as in mamo.py; and p pictures of a row, c captions of a row, a classes.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.data import Dataset

import runtime
from data import SCHEMAS, Pictures, captions_of, is_video, pictures_of, stable_id
from mamo import Config, View, VisionLanguageModel, frames_of, gather, global_mean, init_weights, rank_and_size
from metrics import LABELS, named, right_label, worths
from tokenizer import Tokenizer, bare_words, pad

CAPTIONS = 5  # captions of a picture that a step of retrieval looks at, as COCO has them; of more, some at random


@dataclass
class HeadConfig:
    """What a task adds to the encoders; it travels inside the checkpoint."""

    task: str  # a key of TASKS
    answers: list[str] = dataclasses.field(default_factory=list)  # what the classes mean, in their order
    linear: bool = False  # one linear layer in place of an MLP: a linear probe


# ------------------------------------------------------------------------------------------- retrieval and grounding


class Retrieval(VisionLanguageModel):
    """Contrast in which all captions of a picture are right, and matching with hard negatives.   (ALBEF, fine-tuning)

    differs: ALBEF finds a picture's other captions in a queue; here they come with the picture.
    """

    schema, pictures = "pairs", 1
    losses = ("w_itc", "w_itm")
    contrasts_parts = False  # --accumulate adds no negatives

    def __init__(self, config: Config, head: HeadConfig):
        super().__init__(config)
        self.head_config, self.loss_weights = head, {"itc": 1.0, "itm": 1.0}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: images, picture, given, input_ids, attention_mask; caption_id (b, c); chosen (b,), the caption that
        matching takes; negative_noise (2, b, b) -> {"itc", "itm"}"""
        given, attention_mask = batch["given"], batch["attention_mask"]
        image = self.encode_image(batch["images"])[batch["picture"]]
        text = self.encode_text(batch["input_ids"], attention_mask)
        image_embed, text_embed = self.embed_image(image, frames_of(batch["images"])), self.embed_text(text)
        losses = {"itc": self.loss_contrast(image_embed, text_embed, batch["caption_id"], given)}

        # Matching: of each picture one caption, against a hard negative text and a hard negative picture.
        place = given.flatten().cumsum(0).view_as(given) - 1  # (b, c) -> the row of input_ids
        chosen = place.gather(1, batch["chosen"][:, None]).squeeze(1)
        chosen_id = batch["caption_id"].gather(1, batch["chosen"][:, None]).squeeze(1)
        right = lists(batch["caption_id"], given, chosen_id)
        with torch.autocast(image.device.type, enabled=False):  # fp32: as in the contrast
            similarity = (image_embed @ text_embed[chosen].T).detach()
        pair = View(image, text[chosen], attention_mask[chosen])
        views, valid = self.matching_views(pair, similarity, right, batch["negative_noise"])
        images, texts, masks, _ = zip(*views.values(), strict=True)
        positive, negative = self.pair(*map(torch.cat, (images, texts, masks))).split([len(image), 2 * len(image)])
        losses["itm"] = self.loss_itm(positive, negative, valid)
        return losses

    def loss_contrast(self, image: Tensor, text: Tensor, caption_id: Tensor, given: Tensor) -> Tensor:
        """Contrast with several right answers: the target is uniform over them, both ways.

        A caption is right for every picture that lists it, so two pictures of one caption are both right for it.

        Args:    image (b, e), text (t, e)    unit vectors of this process's pictures and captions
                 caption_id, given (b, c)     given: True = a caption; t is the count of True
        Returns: scalar, mean over pictures and captions of all processes, and over the two directions
        """
        padded = text.new_zeros(given.numel(), text.shape[1])  # one shape on every process, so that it can be gathered
        padded[given.flatten()] = text
        all_image, all_text = gather(image), gather(padded)
        all_id, all_given = (
            (gather(caption_id), gather(given.float()) > 0) if rank_and_size()[1] > 1 else (caption_id, given)
        )
        flat_id, flat_given = all_id.flatten(), all_given.flatten()
        # fp32: as in mamo.py
        with torch.autocast(image.device.type, enabled=False):
            i2t = (image @ all_text.T / self.temperature).masked_fill(~flat_given, float("-inf"))
            t2i = padded @ all_image.T / self.temperature
            to_texts = log_of_right(i2t, lists(caption_id, given, flat_id) & flat_given)
            to_images = log_of_right(t2i, lists(all_id, all_given, caption_id.flatten()).T)
            return -(to_texts.mean() + global_mean(to_images, given.flatten())) / 2


class Grounding(Retrieval):
    """Weakly supervised grounding: retrieval's training on pictures and phrases.        (ALBEF, RefCOCO+)"""

    schema = "phrases"


def lists(caption_id: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
    """caption_id, given (b, c), wanted (q,) -> bool (b, q): whether a picture lists that caption"""
    return ((caption_id[:, :, None] == wanted) & given[:, :, None]).any(dim=1)


def log_of_right(logits: Tensor, right: Tensor) -> Tensor:
    """logits, right (q, g) -> (q,): mean log-probability of a query's right answers, 0 where it has none"""
    logs = F.log_softmax(logits, dim=1).masked_fill(~right, 0.0)
    return logs.sum(dim=1) / right.sum(dim=1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------ classification


class Classifier(VisionLanguageModel):
    """An MLP on the pair vector of a text with each of its pictures.

    With one picture of two, a learned vector stands for the other. differs: ALBEF reads both pictures in one pass
    through doubled fusion blocks; here, as in METER, each picture meets the text by itself.
    """

    pictures = 1
    losses = ("w_itm",)  # the fusion encoder, whose other heads are left out

    def __init__(self, config: Config, head: HeadConfig):
        super().__init__(config)
        self.itm_head, self.head_config, self.loss_weights = None, head, {head.task: 1.0}
        d, p, classes = config.width, self.pictures, len(head.answers)
        if classes < 2:
            raise ValueError(f"{head.task} has {classes} answers to choose from: expected two or more")
        self.absent = nn.Parameter(torch.zeros(d)) if p > 1 else None
        middle = [nn.Linear(p * d, 2 * d), nn.LayerNorm(2 * d, eps=1e-6), nn.GELU(), nn.Linear(2 * d, classes)]
        self.head = (nn.Linear(p * d, classes) if head.linear else nn.Sequential(*middle)).apply(init_weights)

    def decide(self, image: Tensor, shown: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded image (k, 1 + n, d), shown (b, p), encoded text (b, l, d), attention_mask (b, l) -> logits (b, a)"""
        row = shown.nonzero()[:, 0]  # whose picture each of the k is
        vectors = self.pair(image, text[row], attention_mask[row])
        if self.pictures == 1:
            return self.head(vectors).float()
        both = repeat(self.absent.to(vectors.dtype), "d -> b p d", b=len(shown), p=self.pictures).clone()
        both[shown] = vectors
        return self.head(rearrange(both, "b p d -> b (p d)")).float()

    def match(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """The logit of the answer that is given to encoded image (k, 1 + n, d) and text (k, l, d) -> (1,)

        It is what `explain` explains. All k pictures belong to one question, whose text is repeated for each.
        """
        shown = torch.arange(self.pictures, device=image.device)[None] < len(image)
        return self.decide(image, shown, text[:1], attention_mask[:1]).amax(dim=1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: images, picture, shown, input_ids, attention_mask, target (b, a) or (b,) -> {task: loss}"""
        image = self.encode_image(batch["images"])[batch["picture"]]
        text = self.encode_text(batch["input_ids"], batch["attention_mask"])
        logits = self.decide(image, batch["shown"], text, batch["attention_mask"])
        return {self.head_config.task: self.loss(logits, batch["target"])}

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy: logits (b, a), target (b,) the place of the right class."""
        return F.cross_entropy(logits, target)

    def chance(self, candidates: int) -> dict[str, float]:
        """What the loss comes to for a model that knows nothing."""
        return {self.head_config.task: math.log(len(self.head_config.answers))}


class VQA(Classifier):
    """Visual question answering as classification over a list of answers.                    (METER, GLSCL)"""

    schema = "vqa"

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy summed over the answers: logits, target (b, a), soft scores from 0 to 1."""
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1).mean()

    def chance(self, candidates: int) -> dict[str, float]:
        """With every logit at 0."""
        return {"vqa": math.log(2) * len(self.head_config.answers)}


class Reasoning(Classifier):
    """Is the text true of its one or two pictures?                                          (METER, GLSCL: NLVR2)"""

    schema, pictures = "reasoning", 2


class Entailment(Classifier):
    """Does the picture entail the text, contradict it, or neither?                              (ALBEF: SNLI-VE)"""

    schema = "entailment"


TASKS = {"retrieval": Retrieval, "grounding": Grounding, "vqa": VQA, "reasoning": Reasoning, "entailment": Entailment}


def read_as(task: str) -> str:
    """The schema of a task's training rows once they are read: those of retrieval and grounding become pairs."""
    return "pairs" if issubclass(TASKS[task], Retrieval) else TASKS[task].schema


def head_of(state: dict) -> HeadConfig:
    """The head in a checkpoint. Raises ValueError for one that is none."""
    runtime.check_fields(HeadConfig, state["head"], "the checkpoint's head")
    if state["head"].get("task") not in TASKS:
        raise ValueError(f"the checkpoint is of the task {state['head'].get('task')!r}: use one of {', '.join(TASKS)}")
    return HeadConfig(**state["head"])


def build_task(head: HeadConfig, shape: dict) -> Retrieval | Classifier:
    """A fresh model of a task from the fields of the Config that its encoders were pre-trained with."""
    return TASKS[head.task](encoders_of(shape, TASKS[head.task].losses), head)


def encoders_of(shape: dict, losses: tuple[str, ...] = ("w_itm",)) -> Config:
    """Of the fields of an objective's Config those that every objective has, its encoders; losses: which have weight 1
    and not 0, whatever the objective gave them."""
    shape = shape | {"w_itc": 0.0, "w_itm": 0.0, "w_mlm": 0.0} | dict.fromkeys(losses, 1.0)
    own = {field.name: shape[field.name] for field in dataclasses.fields(Config) if field.name in shape}
    runtime.check_fields(Config, own, "the checkpoint")
    return Config(**own)


def answers_of(task: str, rows: list[dict], most: int) -> list[str]:
    """What the classes of a task mean; of vqa the answers with the largest sum of scores, ties in the alphabet, each
    as it is spelled first; else the labels that it always has, or those of the rows."""
    if task == "vqa":
        scores, spelled = Counter(), {}
        for row in rows:
            scores.update(worths(row))
            for answer in row["answers"]:
                spelled.setdefault(named(task, answer), answer)
        found = sorted((-score, spelled[answer]) for answer, score in scores.items())
        return [answer for _, answer in found[:most]]
    if not issubclass(TASKS[task], Classifier):
        return []
    return list(LABELS.get(task) or sorted({right_label(row) for row in rows}))


def coverage(rows: list[dict], answers: list[str]) -> float:
    """The best score that answers from a list can reach on vqa rows, in percent."""
    known = {named("vqa", answer) for answer in answers}
    best = [max([score for answer, score in worths(row).items() if answer in known], default=0.0) for row in rows]
    return 100 * sum(best) / len(best)


def texts_of(row: dict, schema: str) -> list[str]:
    """The texts that a row of a schema is read with, whatever other keys it has."""
    if schema == "pairs":
        return captions_of(row)
    key = next((key for key in ("question", "text") if key in SCHEMAS[schema]), None)
    return [row[key] if key else ""]  # a task without text reads an empty one


def by_picture(rows: list[dict], schema: str) -> list[dict]:
    """Rows of pairs or phrases -> one row of pairs for each picture, with all its texts as captions."""
    merged: dict[str, dict] = {}
    for row in rows:
        one = merged.setdefault(row["image"], {key: row[key] for key in ("image", "twin") if key in row})
        for text in texts_of(row, schema):
            one.setdefault("caption", {}).setdefault(bare_words(text), text)
    return [one | {"caption": list(one["caption"].values())} for one in merged.values()]


# --------------------------------------------------------------------------------------- from pre-training to a task


def adopt(model: nn.Module, source: dict[str, Tensor], config: Config, vocab: list[str], tokenizer: Tokenizer) -> list:
    """Load what a checkpoint has of a model, fitted to another resolution, longer texts and added words.

    Args:    model       the fresh model of a task
             source      the checkpoint's weights; config and vocab: its own
             tokenizer   the model's: the checkpoint's words, and perhaps more behind them
    Returns: the names of the model's parameters that the checkpoint does not have
    Raises:  ValueError for a weight of another shape
    """
    weights = model.state_dict()
    for name, value in weights.items():
        if name not in source:
            continue
        found = source[name]
        if name == "student.image.positions" and config.grid != model.config.grid:
            found = resized(found, config.grid, model.config.grid)
        elif name in ("student.text.positions", "student.image.times") and len(found) != len(value):
            found = torch.cat([found, value[len(found) :]])[: len(value)]  # the code goes on where the learned ones end
        elif name == "student.text.words.weight" and len(found) < len(value):
            old = Tokenizer(vocab)
            pieces = [old.encode(word)[1:-1] for word in tokenizer.vocab[len(vocab) :]]
            found = torch.cat([found, torch.stack([found[ids].mean(dim=0) for ids in pieces])])
        if found.shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(found.shape)} in the checkpoint and {tuple(value.shape)} here: a head of another "
                "size or encoders of another shape; start from a checkpoint of the same, or pass --new-head"
            )
        weights[name] = found
    model.load_state_dict(weights)
    return [name for name in weights if name not in source]


def resized(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (1 + n, d) of a grid of old (rows, columns) of patches -> (1 + n', d) of a new one, bicubic.

    As in ALBEF. differs: timm's default is antialiased, which smooths where the new grid is smaller.
    """
    first, grid = positions[:1], rearrange(positions[1:], "(y x) d -> 1 d y x", y=old[0])
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([first, rearrange(grid, "1 d y x -> (y x) d")])


# ------------------------------------------------------------------------------------------------------------- batches


class TaskRows(Dataset):
    """Rows of a task as training samples; a sample's key is (epoch, row), and all its randomness follows from it."""

    def __init__(
        self, rows: list[dict], head: HeadConfig, tokenizer: Tokenizer, config: Config, augment: str, seed: int
    ):
        self.rows, self.head, self.tokenizer, self.seed = rows, head, tokenizer, seed
        self.schema = read_as(head.task)
        self.max_tokens, self.pictures = config.max_tokens, Pictures(config, augment, len(rows))
        self.place = {named(head.task, answer): place for place, answer in enumerate(head.answers)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, number = key
        row = self.rows[number]
        rng = np.random.default_rng([self.seed, epoch, number])
        texts = texts_of(row, self.schema)
        if len(texts) > CAPTIONS:
            texts = [texts[place] for place in sorted(rng.choice(len(texts), CAPTIONS, replace=False))]
        encoded = [self.tokenizer.encode(text, self.max_tokens) for text in texts]
        return {
            "images": [self.pictures(path, rng) for path in pictures_of(row)],
            "names": [  # augmented pictures differ, although they come from one file; so do frames of a video
                path if self.pictures.augment == "none" and not is_video(path) else f"{number} {slot}"
                for slot, path in enumerate(pictures_of(row))
            ],
            "texts": encoded,
            "caption_id": [stable_id(str(ids)) for ids in encoded],
            "chosen": int(rng.integers(len(texts))),
            "target": self.target(row),
        }

    def target(self, row: dict) -> Tensor:
        """What the head should say: scores (a,) of vqa's answers, the place of a class, nothing for retrieval."""
        if self.head.task == "vqa":
            target = torch.zeros(len(self.head.answers))
            for answer, score in worths(row).items():
                if answer in self.place:
                    target[self.place[answer]] = score
            return target
        return torch.tensor(self.place[right_label(row)] if self.place else 0)


@dataclass
class TaskCollate:
    """Samples -> a batch; pictures and captions stand one after another, and masks say whose they are.

    captions: slots for captions of a picture. length: pad all texts to so many tokens, see data.Collate.
    """

    pad_id: int
    pictures: int
    captions: int
    length: int = 0

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad([ids for one in samples for ids in one["texts"]], self.pad_id, self.length)
        caption_id = [one["caption_id"] + [0] * (self.captions - len(one["caption_id"])) for one in samples]
        names = [name for one in samples for name in one["names"]]
        if self.length:  # a compiled step has one shape, so a repeated picture stays repeated
            names = list(range(len(names)))
        images = dict(zip(names, (image for one in samples for image in one["images"]), strict=True))
        place = {name: place for place, name in enumerate(images)}
        return {
            "images": torch.stack(list(images.values())),
            "picture": torch.tensor([place[name] for name in names]),
            "shown": slots([len(one["images"]) for one in samples], self.pictures),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "given": slots([len(one["texts"]) for one in samples], self.captions),
            "caption_id": torch.tensor(caption_id),
            "chosen": torch.tensor([one["chosen"] for one in samples]),
            "target": torch.stack([one["target"] for one in samples]),
        }


def slots(counts: Iterable[int], width: int) -> Tensor:
    """How many of its slots each row fills -> bool (b, width)"""
    return torch.arange(width) < torch.tensor(list(counts))[:, None]
