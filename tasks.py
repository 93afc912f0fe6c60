"""Five downstream tasks for a pre-trained model, each a small head and a loss on top of the shared encoders.

    retrieval    contrastive loss with all captions of an image as positives, and matching with hard negatives
    grounding    the same losses on images and phrases, without any boxes; explain.py then localises the phrase
    vqa          classification over a list of answers, with soft targets
    reasoning    whether a statement is true of one or two images
    entailment   entailment, neutral or contradiction

How to read it. Retrieval and grounding keep the pre-training heads. The other three put an MLP on the pair vector: the
fused [CLS] of (image, text) or, for two images, the concatenation of both. A batch of b rows holds k images and t
texts, none of which is padding, and masks that assign them to rows:

    images (i, 3, height, width), picture (k,)              the i distinct images, each encoded once; indices into them
    shown (b, pictures)                                     True = the row has this image; k is the number of True
    input_ids (t, l), given (b, captions)                   True = the row has this caption; t is the number of True

Shapes use the letters of mamo.py, and p images per row, c captions per row, a classes.
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
from mamo import Config, View, VisionLanguageModel, frames_of, gather, global_mean, init_weights
from metrics import LABELS, named, right_label, worths
from tokenizer import Tokenizer, bare_words, pad

CAPTIONS = 5  # captions per image in a step of retrieval, as in COCO; if an image has more, a random subset


@dataclass
class HeadConfig:
    """The configuration of a task's head; saved in the checkpoint."""

    task: str  # a key of TASKS
    answers: list[str] = dataclasses.field(default_factory=list)  # the answer that each class stands for
    linear: bool = False  # a linear layer instead of an MLP, for a linear probe


# ------------------------------------------------------------------------------------------- retrieval and grounding


class Retrieval(VisionLanguageModel):
    """Contrastive loss with all captions of an image as positives, matching with hard negatives.   (ALBEF, fine-tuning)

    differs: ALBEF finds an image's other captions in its queue; here, the batch provides them with the image.
    """

    schema, pictures = "pairs", 1
    losses = ("w_itc", "w_itm")
    contrasts_parts = False  # --accumulate does not increase the number of negatives

    def __init__(self, config: Config, head: HeadConfig):
        super().__init__(config)
        self.head_config, self.loss_weights = head, {"itc": 1.0, "itm": 1.0}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: images, picture, given, input_ids, attention_mask; caption_id (b, c); chosen (b,), the index of the
        caption used for matching; negative_noise (2, b, b) -> {"itc", "itm"}"""
        given, attention_mask = batch["given"], batch["attention_mask"]
        image = self.encode_image(batch["images"])[batch["picture"]]
        text = self.encode_text(batch["input_ids"], attention_mask)
        image_embed, text_embed = self.embed_image(image, frames_of(batch["images"])), self.embed_text(text)
        losses = {"itc": self.loss_contrast(image_embed, text_embed, batch["caption_id"], given)}

        # Matching: one caption per image, against a hard negative text and a hard negative image.
        place = given.flatten().cumsum(0).view_as(given) - 1  # (b, c), the caption's row in input_ids
        chosen = place.gather(1, batch["chosen"][:, None]).squeeze(1)
        chosen_id = batch["caption_id"].gather(1, batch["chosen"][:, None]).squeeze(1)
        right = lists(batch["caption_id"], given, chosen_id)
        with torch.autocast(image.device.type, enabled=False):  # fp32: as in loss_contrast
            similarity = (image_embed @ text_embed[chosen].T).detach()
        pair = View(image, text[chosen], attention_mask[chosen])
        views, valid = self.matching_views(pair, similarity, right, batch["negative_noise"])
        images, texts, masks, _ = zip(*views.values(), strict=True)
        positive, negative = self.pair(*map(torch.cat, (images, texts, masks))).split([len(image), 2 * len(image)])
        losses["itm"] = self.loss_itm(positive, negative, valid)
        return losses

    def loss_contrast(self, image: Tensor, text: Tensor, caption_id: Tensor, given: Tensor) -> Tensor:
        """Contrastive loss with several positives per query: the target is uniform over them, in both directions.

        An image is a positive of every caption that it lists, so a caption shared by two images has two positives.

        Args:    image (b, e), text (t, e)    unit vectors of this process's images and captions
                 caption_id, given (b, c)     given: True = a caption; t is the number of True
        Returns: scalar, mean over the images and captions of all processes, and over the two directions
        """
        padded = text.new_zeros(given.numel(), text.shape[1])  # same shape on every process, as gather requires
        padded[given.flatten()] = text
        all_image, all_text = gather(image), gather(padded)
        all_id, all_given = gather(caption_id), gather(given.float()) > 0
        flat_id, flat_given = all_id.flatten(), all_given.flatten()
        # fp32: as in mamo.py
        with torch.autocast(image.device.type, enabled=False):
            i2t = (image @ all_text.T / self.temperature).masked_fill(~flat_given, float("-inf"))
            t2i = padded @ all_image.T / self.temperature
            to_texts = log_of_right(i2t, lists(caption_id, given, flat_id) & flat_given)
            to_images = log_of_right(t2i, lists(all_id, all_given, caption_id.flatten()).T)
            return -(to_texts.mean() + global_mean(to_images, given.flatten())) / 2


class Grounding(Retrieval):
    """Weakly supervised grounding: trained like retrieval, on images and phrases.         (ALBEF, RefCOCO+)"""

    schema = "phrases"


def lists(caption_id: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
    """caption_id, given (b, c), wanted (q,) -> bool (b, q): whether each image lists each wanted caption"""
    return ((caption_id[:, :, None] == wanted) & given[:, :, None]).any(dim=1)


def log_of_right(logits: Tensor, right: Tensor) -> Tensor:
    """logits, right (q, g) -> (q,): mean log-probability of each query's positives in the gallery, 0 if it has none"""
    logs = F.log_softmax(logits, dim=1).masked_fill(~right, 0.0)
    return logs.sum(dim=1) / right.sum(dim=1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------ classification


class Classifier(VisionLanguageModel):
    """An MLP on the pair vectors of a text with each of its images.

    If a task takes two images and a row has only one, a learned vector replaces the other. differs: ALBEF feeds both
    images through doubled fusion blocks in one pass; we fuse each image with the text separately, as METER does.
    """

    pictures = 1
    losses = ("w_itm",)  # required to build the fusion encoder; its other heads are left out

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
        row = shown.nonzero()[:, 0]  # (k,), the row that each image belongs to
        vectors = self.pair(image, text[row], attention_mask[row])
        if self.pictures == 1:
            return self.head(vectors).float()
        both = repeat(self.absent.to(vectors.dtype), "d -> b p d", b=len(shown), p=self.pictures).clone()
        both[shown] = vectors
        return self.head(rearrange(both, "b p d -> b (p d)")).float()

    def match(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded image (k, 1 + n, d), text (k, l, d) -> (1,), the logit of the predicted answer, used by explain.py.

        All k images belong to one question, whose text is repeated for each image.
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
        """Cross-entropy: logits (b, a), target (b,), the index of the right class."""
        return F.cross_entropy(logits, target)

    def chance(self, candidates: int) -> dict[str, float]:
        """The loss of a uniform prediction."""
        return {self.head_config.task: math.log(len(self.head_config.answers))}


class VQA(Classifier):
    """Visual question answering as classification over a list of answers.                    (METER, GLSCL)"""

    schema = "vqa"

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy summed over the answers: logits (b, a), target (b, a), soft scores from 0 to 1."""
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1).mean()

    def chance(self, candidates: int) -> dict[str, float]:
        """The loss when every logit is 0."""
        return {"vqa": math.log(2) * len(self.head_config.answers)}


class Reasoning(Classifier):
    """Is the text true of its one or two images?                                            (METER, GLSCL: NLVR2)"""

    schema, pictures = "reasoning", 2


class Entailment(Classifier):
    """Does the image entail the text, contradict it, or neither?                                (ALBEF: SNLI-VE)"""

    schema = "entailment"


TASKS = {"retrieval": Retrieval, "grounding": Grounding, "vqa": VQA, "reasoning": Reasoning, "entailment": Entailment}


def read_as(task: str) -> str:
    """The schema of a task's training rows once loaded: rows of retrieval and grounding are merged into pairs."""
    return "pairs" if issubclass(TASKS[task], Retrieval) else TASKS[task].schema


def head_of(state: dict) -> HeadConfig:
    """The head config in a checkpoint. Raises ValueError if it is invalid."""
    runtime.check_fields(HeadConfig, state["head"], "the checkpoint's head")
    if state["head"].get("task") not in TASKS:
        raise ValueError(f"the checkpoint's task is {state['head'].get('task')!r}: use one of {', '.join(TASKS)}")
    return HeadConfig(**state["head"])


def build_task(head: HeadConfig, shape: dict) -> Retrieval | Classifier:
    """A freshly initialised model for a task. shape: the Config fields with which its encoders were pre-trained"""
    return TASKS[head.task](encoders_of(shape, TASKS[head.task].losses), head)


def encoders_of(shape: dict, losses: tuple[str, ...] = ("w_itm",)) -> Config:
    """The base Config of the encoders, from the fields of any objective's Config. The weights of `losses` are set to 1,
    all others to 0. Raises ValueError for invalid values."""
    shape = shape | {"w_itc": 0.0, "w_itm": 0.0, "w_mlm": 0.0} | dict.fromkeys(losses, 1.0)
    own = {field.name: shape[field.name] for field in dataclasses.fields(Config) if field.name in shape}
    runtime.check_fields(Config, own, "the checkpoint")
    return Config(**own)


def answers_of(task: str, rows: list[dict], most: int) -> list[str]:
    """The answers that a task's classes stand for. For vqa: the `most` answers with the largest total score, ties
    in alphabetical order, each in its first spelling. For other tasks: the fixed labels, or those of the rows."""
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
    """The maximum possible score on vqa rows with answers from the given list, in percent."""
    known = {named("vqa", answer) for answer in answers}
    best = [max([score for answer, score in worths(row).items() if answer in known], default=0.0) for row in rows]
    return 100 * sum(best) / len(best)


def texts_of(row: dict, schema: str) -> list[str]:
    """The texts of a row under a schema; keys of other schemas are ignored."""
    if schema == "pairs":
        return captions_of(row)
    key = next((key for key in ("question", "text") if key in SCHEMAS[schema]), None)
    return [row[key] if key else ""]  # a task without text gets an empty string


def by_picture(rows: list[dict], schema: str) -> list[dict]:
    """Rows of pairs or phrases -> one row of pairs per image, with all its texts as captions."""
    merged: dict[str, dict] = {}
    for row in rows:
        one = merged.setdefault(row["image"], {key: row[key] for key in ("image", "twin") if key in row})
        for text in texts_of(row, schema):
            one.setdefault("caption", {}).setdefault(bare_words(text), text)
    return [one | {"caption": list(one["caption"].values())} for one in merged.values()]


# --------------------------------------------------------------------------------------- from pre-training to a task


def adopt(model: nn.Module, source: dict[str, Tensor], config: Config, vocab: list[str], tokenizer: Tokenizer) -> list:
    """Load a checkpoint into a task's model, adapting it to another resolution or text length and to added words.

    Args:    model       a freshly initialised model
             source      the checkpoint's weights; config, vocab: those of the checkpoint
             tokenizer   the model's: the checkpoint's vocabulary, possibly with words appended
    Returns: the names of the model's parameters that are not in the checkpoint
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
            found = torch.cat([found, value[len(found) :]])[: len(value)]  # new positions keep their sine code
        elif name == "student.text.words.weight" and len(found) < len(value):
            old = Tokenizer(vocab)
            pieces = [old.encode(word)[1:-1] for word in tokenizer.vocab[len(vocab) :]]
            found = torch.cat([found, torch.stack([found[ids].mean(dim=0) for ids in pieces])])
        if found.shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(found.shape)} in the checkpoint and {tuple(value.shape)} here: a head of another "
                "size or encoders of another shape; start from a checkpoint of the same shape, or pass --new-head"
            )
        weights[name] = found
    model.load_state_dict(weights)
    return [name for name in weights if name not in source]


def resized(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1 + n, d) for an old grid (rows, columns) of patches -> (1 + n', d) for a new one, bicubic.

    As in ALBEF. differs: timm antialiases by default, which smooths the embeddings if the new grid is smaller.
    """
    first, grid = positions[:1], rearrange(positions[1:], "(y x) d -> 1 d y x", y=old[0])
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([first, rearrange(grid, "1 d y x -> (y x) d")])


# ------------------------------------------------------------------------------------------------------------- batches


class TaskRows(Dataset):
    """Rows of a task as training samples, indexed by (epoch, row); this index and the seed determine all randomness."""

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
            "names": [  # one key per distinct image; augmented images and videos are random, so all distinct
                path if self.pictures.augment == "none" and not is_video(path) else f"{number} {slot}"
                for slot, path in enumerate(pictures_of(row))
            ],
            "texts": encoded,
            "caption_id": [stable_id(str(ids)) for ids in encoded],
            "chosen": int(rng.integers(len(texts))),
            "target": self.target(row),
        }

    def target(self, row: dict) -> Tensor:
        """The head's target: answer scores (a,) for vqa, else a class index; a dummy 0 for retrieval."""
        if self.head.task == "vqa":
            target = torch.zeros(len(self.head.answers))
            for answer, score in worths(row).items():
                if answer in self.place:
                    target[self.place[answer]] = score
            return target
        return torch.tensor(self.place[right_label(row)] if self.place else 0)


@dataclass
class TaskCollate:
    """Samples -> a batch. Images and captions are concatenated, and masks assign them to rows.

    captions: number of caption slots per image. length: pad all texts to this number of tokens, see data.Collate
    """

    pad_id: int
    pictures: int
    captions: int
    length: int = 0

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad([ids for one in samples for ids in one["texts"]], self.pad_id, self.length)
        caption_id = [one["caption_id"] + [0] * (self.captions - len(one["caption_id"])) for one in samples]
        names = [name for one in samples for name in one["names"]]
        if self.length:  # a compiled step needs a fixed shape, so duplicate images are kept
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
    """The number of filled slots in each row -> bool (b, width), True = filled"""
    return torch.arange(width) < torch.tensor(list(counts))[:, None]
