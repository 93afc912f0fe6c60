"""Evaluate a checkpoint, pre-trained or fine-tuned.

    python eval.py retrieval --checkpoint runs/demo/checkpoint.pt --data data/scenes/pairs_test.jsonl
    python eval.py foils     --checkpoint runs/demo/checkpoint.pt --data data/scenes/foils_test.jsonl
    python eval.py grounding --checkpoint runs/demo/checkpoint.pt --data data/scenes/grounding_test.jsonl
    python eval.py vqa       --checkpoint runs/vqa/best.pt --data data/scenes/vqa_test.jsonl --predictions said.jsonl
    python eval.py vqa       --data data/scenes/vqa_test.jsonl --predictions said.jsonl         score a file of answers
    python eval.py reasoning --checkpoint runs/reasoning/best.pt --data data/scenes/reasoning_test.jsonl --figure a.png
    python eval.py search    --checkpoint runs/mine/checkpoint.pt --data my/pairs_train.jsonl --text "a dog"
    python eval.py score     --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle"
    python eval.py explain   --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle" --out heat.png
    python eval.py embed     --checkpoint runs/mine/checkpoint.pt --data my/pairs.jsonl --out features.npz   for numpy
    python eval.py world     --checkpoint runs/demo/checkpoint.pt --data data/scenes       all of the built-in world
    torchrun --nproc-per-node 8 eval.py retrieval ...              eight processes share pictures, texts and queries

Retrieval ranks all captions for each picture and all pictures for each caption, and reports R@1/5/10. "contrast" ranks
by the cosine of the two embeddings; "matching" re-ranks its k best candidates with the matching head. A query is a hit
if any right answer is among the first; ties count against the model. Accuracies, chance levels and intervals are
defined in metrics.py, heat maps and grounding in explain.py. Results go to results.json beside the checkpoint.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import runtime
from data import CHECKS, captions_of, files_of, is_text, is_video, pictures_of, read_rows, resolved, video_of
from explain import Heat, How, ground, heats_of, pixels_of
from mamo import Encoders, VisionLanguageModel, frames_of, rank_and_size
from metrics import (
    chance_recalls,
    judge_answers,
    judge_grounding,
    judge_retrieval,
    named,
    read_lines,
    read_predictions,
    recall_intervals,
    recalls,
    right_label,
    worths,
    write_predictions,
)
from siblings import build_model
from tasks import TASKS, Classifier, build_task, coverage, head_of, read_as, slots, texts_of
from tokenizer import Tokenizer
from tools import sheet
from tools.tables import foil_table, result_table, retrieval_table

# ------------------------------------------------------------------------------------------------------------- models


def load_model(path: str | Path, device: torch.device) -> tuple[VisionLanguageModel, Tokenizer, dict]:
    """A checkpoint of train.py or finetune.py: model in evaluation mode, tokenizer, and everything else it holds.

    Raises:  ValueError, see load_checkpoint
    """
    state = runtime.load_checkpoint(path)
    tokenizer = Tokenizer(state["vocab"])
    if "head" in state:
        model = build_task(head_of(state), state["config"])
    else:
        model = build_model(state["objective"], state["config"])
    runtime.load_weights(model, state["model"], path)
    model.matching_weight = state.get("matching_weight", 1.0)
    model.trained_on = state.get("data", {}).get("rows to train on", [math.inf])[0]
    return model.to(device).eval(), tokenizer, state


@dataclass
class Pipeline:
    """A trained model, ready for use. It takes pictures as paths or PIL images and texts as strings, one or several."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    device: torch.device

    def pixels(self, images) -> Tensor:
        """Pictures -> (b, 3, height, width), values in [-1, 1]; videos, named by data.video_of -> (b, f, 3, ...)"""
        images = several(images)
        check_kinds(images)
        return torch.stack([pixels_of(image, self.model.config) for image in images]).to(self.device)

    def tokens(self, texts: str | list[str]) -> tuple[Tensor, Tensor]:
        """One text or several -> input_ids, attention_mask (b, l)"""
        input_ids, attention_mask = self.tokenizer(texts, self.model.config.max_tokens)
        return input_ids.to(self.device), attention_mask.to(self.device)

    @torch.inference_mode()
    def embed_images(self, images) -> Tensor:
        """-> unit vectors (b, e); contrast ranks by their products with those of texts"""
        pixels = self.pixels(images)
        return self.model.embed_image(self.model.encode_image(pixels), frames_of(pixels)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: str | list[str]) -> Tensor:
        """-> unit vectors (b, e)"""
        return self.model.embed_text(self.model.encode_text(*self.tokens(texts))).cpu()

    def score(self, images, texts) -> dict[str, float | list[float]]:
        """How well each picture fits its text: "itc", a cosine in [-1, 1], and "itm", a probability."""
        if isinstance(self.model, Classifier):
            raise ValueError(f"this checkpoint answers {self.model.head_config.task}: use answers(images, text)")
        pixels, (input_ids, attention_mask) = self.pixels(images), self.tokens(texts)
        if len(pixels) != len(input_ids):
            raise ValueError(f"{len(pixels)} pictures and {len(input_ids)} texts: give one text for each picture")
        scores = self.model.score(pixels, input_ids, attention_mask)
        return {name: one.item() if isinstance(texts, str) else one.tolist() for name, one in scores.items()}

    @torch.inference_mode()
    def answers(self, images, text: str, best: int = 5) -> list[tuple[str, float]]:
        """The likeliest answers to a text about one picture or two, with their probabilities (of vqa independent)."""
        model, pixels, (input_ids, attention_mask) = self.model, self.pixels(images), self.tokens(text)
        shown = slots([len(pixels)], model.pictures).to(self.device)
        encoded = model.encode_text(input_ids, attention_mask)
        logits = model.decide(model.encode_image(pixels), shown, encoded, attention_mask)
        chances = logits[0].sigmoid() if model.head_config.task == "vqa" else logits[0].softmax(dim=0)
        order = chances.argsort(descending=True)[:best].tolist()
        return [(model.head_config.answers[place], chances[place].item()) for place in order]

    def heat(self, images, text: str, phrase: str = "", how: How | None = None) -> Heat | list[Heat]:
        """Where the model looks for a phrase in a text, or for the whole text: `.values` (rows, columns), `.show()`,
        `.save(path)`; for several pictures, or the frames of a video, a list. how: see explain.How"""
        heats = heats_of(self.model, self.tokenizer, several(images), text, phrase or text, how or How(), self.device)
        return heats if isinstance(images, list | tuple) or is_video(images) else heats[0]


def several(images) -> list:
    """One picture or several -> a list"""
    return list(images) if isinstance(images, list | tuple) else [images]


def load(path: str | Path, device: str = "auto") -> Pipeline:
    """A checkpoint of train.py or finetune.py, ready for use. Raises ValueError, see runtime.load_checkpoint"""
    where = runtime.pick_device(device)
    model, tokenizer, _ = load_model(path, where)
    return Pipeline(model, tokenizer, where)


# ------------------------------------------------------------------------------------------------- several processes


def shard(count: int, rank: int | None = None) -> slice:
    """The rows, of count, that one process (by default this one) works on: contiguous, disjoint, together all."""
    own, processes = rank_and_size()
    rank = own if rank is None else rank
    return slice(count * rank // processes, count * (rank + 1) // processes)


def gather_shards(mine: Tensor, count: int) -> Tensor:
    """Rows of this process's shard -> all count rows, on every process. On the CPU, hence over gloo."""
    if rank_and_size()[1] == 1:
        return mine
    whole = mine.new_empty(count, *mine.shape[1:])
    whole[shard(count)] = mine
    for rank in range(rank_and_size()[1]):
        rows = whole[shard(count, rank)]
        if len(rows):
            dist.broadcast(rows, src=rank)
    return whole


# ---------------------------------------------------------------------------------------------------------- retrieval


@dataclass
class Encoded:
    """Each distinct picture and text of some rows, encoded once. Features are kept on the CPU in half precision: with
    preset `base`, 5,000 pictures take 2 GB and 25,000 captions 1.2 GB."""

    images: list[str]
    texts: list[str]
    image: Tensor  # (images, 1 + n, d)
    text: Tensor  # (texts, l, d)
    attention_mask: Tensor  # (texts, l), True = real token
    image_embed: Tensor | None  # (images, e); None for a model without contrast
    text_embed: Tensor | None  # (texts, e)


@torch.inference_mode()
def encode(
    model: VisionLanguageModel, tokenizer: Tokenizer, images: list[str], texts: list[str], device, batch: int = 100
) -> Encoded:
    """Encode distinct pictures (paths), or videos, and distinct texts; each process encodes its share."""
    model.eval()
    check_kinds(images)
    config, frames = model.config, model.config.frames if is_video(images[0]) else 1
    input_ids, attention_mask = tokenizer(texts, config.max_tokens)

    def encode_pictures(rows: slice) -> tuple[Tensor, Callable]:
        pixels = torch.stack([pixels_of(path, config) for path in images[rows]])
        return model.encode_image(pixels.to(device)), partial(model.embed_image, frames=frames)

    def encode_words(rows: slice) -> tuple[Tensor, Callable]:
        return model.encode_text(input_ids[rows].to(device), attention_mask[rows].to(device)), model.embed_text

    def encode_all(what: str, encode_some: Callable, count: int, length: int) -> tuple[Tensor, Tensor | None]:
        """Encode this process's share in chunks, then gather all."""
        mine = range(count)[shard(count)]
        hidden = torch.empty(len(mine), length, config.width, dtype=torch.float16)
        embed = torch.empty(len(mine), config.embed_dim)
        for start in tqdm(range(0, len(mine), batch), desc=what, leave=False, disable=count < 2000):
            rows = mine[start : start + batch]
            some, embed_some = encode_some(slice(rows.start, rows.stop))
            hidden[start : start + batch] = some.cpu()
            if config.w_itc > 0:
                embed[start : start + batch] = embed_some(some).cpu()
        return gather_shards(hidden, count), gather_shards(embed, count) if config.w_itc > 0 else None

    length = frames * (1 + config.num_patches)
    image, image_embed = encode_all("pictures", encode_pictures, len(images), length)
    text, text_embed = encode_all("texts", encode_words, len(texts), input_ids.shape[1])
    return Encoded(images, texts, image, text, attention_mask, image_embed, text_embed)


def check_kinds(images: list) -> None:
    """Raise ValueError where pictures and videos are mixed: a gallery holds one kind."""
    videos = sum(map(is_video, images))
    if 0 < videos < len(images):
        raise ValueError(f"{len(images) - videos} pictures and {videos} videos: evaluate them apart, a file of each")


@torch.inference_mode()
def match_pairs(model, encoded: Encoded, image_index: Tensor, text_index: Tensor, device, batch: int = 500) -> Tensor:
    """Matching logits (pairs,) of the pairs (image_index[i], text_index[i])."""
    logits = []
    for start in range(0, len(image_index), batch):
        i, t = image_index[start : start + batch], text_index[start : start + batch]
        image, text = encoded.image[i].to(device).float(), encoded.text[t].to(device).float()
        logits.append(model.match(image, text, encoded.attention_mask[t].to(device)).cpu())
    return torch.cat(logits)


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """scores (q, g), right (q, g) bool -> (q,): number of wrong answers not strictly behind the best right one.

    Ties and NaN count against the model: one that scores everything the same finds nothing.
    """
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)


def best_first(scores: Tensor, right: Tensor, k: int = 10) -> Tensor:
    """scores, right (q, g) -> (q, k): places of the k best. As in ranks, wrong answers win ties."""
    wrong_first = right.byte().argsort(dim=1, stable=True)
    broken = right & (scores.isnan() & right).any(dim=1, keepdim=True)
    ordered = (
        scores.nan_to_num(nan=math.inf)
        .masked_fill(broken, -math.inf)
        .gather(1, wrong_first)
        .argsort(dim=1, descending=True, stable=True)
    )
    return wrong_first.gather(1, ordered)[:, :k]


WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of matching relative to contrast; training chooses one on val


def retrieval(
    model,
    tokenizer: Tokenizer,
    rows: list[dict],
    device,
    k: int = 128,
    by: str = "",
    block: int = 500,
    lists: list[dict] | None = None,
    weights: Sequence[float] = (),
    own: bool = False,
) -> dict:
    """Retrieval over the distinct pictures and captions of `pairs` rows, both ways.

    Args:    k         candidates to re-rank, at most a tenth of the gallery (MAMO Sec. 4.1 takes 128 on Flickr30k and
                       256 on COCO); 0 = contrast only
             by        a key of the rows: recalls are also reported for each of its values, among the whole gallery
             block     queries at a time, which bounds the memory
             lists     a list to which the ten best of each query are added, see metrics.py
             weights   of matching relative to contrast, see rerank. Of several, the one with the best mean of the six
                       recalls is reported (the first, if equal). Default: the model's
             own       only a picture's own captions are right, as in most published figures: the same caption of
                       another picture is wrong, and ties between equal captions are broken at random
    Returns: {"images", "texts", "k", "weight", "chance": recalls, "contrast": recalls, "matching": re-ranked recalls,
             "apart": {value}, "intervals": {way: recalls}, "separation"} where recalls = {"image_to_text": {"R@1",
             "R@5", "R@10"}, "text_to_image": ...} in percent; intervals are [low, high] over resampled queries
    """
    check_ranks(model, k)
    check_by(rows, by)
    rows, also = one_name(rows, tokenizer, model.config.max_tokens)
    images, texts, encoded = encode_rows(model, tokenizer, rows, device, captions_of)
    if own:
        rows, texts, encoded = each_caption(rows, texts, encoded)
    right, value_of = right_places(rows, images, texts, by)
    k = min(k, math.ceil(min(len(images), len(texts)) / 10)) if model.config.w_itm > 0 else 0
    weights = (weights or (model.matching_weight,)) if k else ()
    rank_of, best_of = {}, {}
    for direction in right:
        ways = ("contrast", *weights)
        ranked = rank_queries(
            model, encoded, direction, right[direction], ways, k, device, block, own, lists is not None
        )
        rank_of[direction], best_of[direction] = ranked

    def mean(way) -> float:
        return sum(sum(recalls(rank_of[direction][way].numpy()).values()) for direction in right)

    result = {"images": len(images), "texts": len(texts), "k": k}
    result |= {part: {} for part in ("chance", "contrast", "matching", "apart", "intervals")}
    ways = {"contrast": "contrast"}
    if weights:
        result["weight"] = max(weights, key=mean)
        ways["matching"] = result["weight"]
    for direction, gallery in (("image_to_text", texts), ("text_to_image", images)):
        result["chance"][direction] = chance_recalls([len(answer) for answer in right[direction]], len(gallery))
        for name, way in ways.items():
            rank = rank_of[direction][way]
            result[name][direction] = recalls(rank.numpy())
            result["intervals"].setdefault(name, {})[direction] = recall_intervals(rank.numpy())
            if lists is not None:
                lists += ranked_lists(name, direction, images, texts, best_of[direction][way], also)
            for value in sorted(set(value_of[direction])) if by else ():
                those = rank[torch.tensor([v == value for v in value_of[direction]])].numpy()
                result["apart"].setdefault(f"{by} {value}", {}).setdefault(name, {})[direction] = recalls(those)
    if k and not own:
        result["separation"] = separation(model, encoded, right["image_to_text"], device)
    return result


def rank_queries(
    model,
    encoded: Encoded,
    direction: str,
    right: list[set[int]],
    ways: Sequence[str | float],
    k: int,
    device,
    block: int,
    own: bool,
    keep_best: bool,
) -> tuple[dict, dict]:
    """One direction of retrieval, a block of queries at a time, each process its share.

    Args:    right   places of the right answers of each query
             ways    "contrast", or a weight of matching beside it, see rerank
    Returns: by way: rank of each query (q,), see ranks; if asked for, places of its ten best, q lists, see best_first
    """
    queries, gallery = encoded.image_embed, encoded.text_embed
    if direction == "text_to_image":
        queries, gallery = gallery, queries
    # Each list begins with no rows, because there may be fewer queries than processes.
    found = {way: [torch.empty(0, dtype=torch.long)] for way in ways}
    best = {way: [torch.empty(0, min(10, len(gallery)), dtype=torch.long)] for way in ways if keep_best}
    # With --own-captions equal captions score the same, and which one comes first is drawn at random.
    drawn = 1e-9 * torch.rand(len(gallery), generator=torch.Generator().manual_seed(0)) if own else None
    mine = range(len(queries))[shard(len(queries))]
    for start in tqdm(mine[::block], desc=direction, leave=False, disable=len(queries) < 2000):
        asked = range(start, min(start + block, mine.stop))
        truth = torch.zeros(len(asked), len(gallery), dtype=torch.bool)
        for place, query in enumerate(asked):
            truth[place, list(right[query])] = True
        cosines = queries[asked.start : asked.stop] @ gallery.T
        logits = match_best(model, encoded, cosines, start, direction, k, device) if k else None
        for way in ways:
            score = cosines if way == "contrast" else rerank(cosines, logits, model.temperature.item(), way)
            score = score if drawn is None else score.double() + drawn
            found[way].append(ranks(score, truth))
            if keep_best:
                best[way].append(best_first(score, truth))
    return (
        {way: gather_shards(torch.cat(rows), len(queries)) for way, rows in found.items()},
        {way: gather_shards(torch.cat(rows), len(queries)).tolist() for way, rows in best.items()},
    )


def separation(model, encoded: Encoded, right: list[set[int]], device, each: int = 10) -> dict[str, float]:
    """How well the matching logit tells a picture's own captions from others: area under the ROC curve, chance 0.5.

    Unlike the ITM loss, whose negatives each model draws for itself, this compares models on the same negatives.

    Args:    right   places of the right texts of each picture, of which the first is used
             each    number of wrong texts of each kind for a picture
    Returns: "uniform": against wrong texts drawn at random; "nearest": against those nearest by contrast, some of which
             may be true of the picture too
    """
    pairs, mine = [], range(len(right))[shard(len(right))]
    for image in mine:
        own = min(right[image])
        wrong = torch.tensor([text for text in range(len(encoded.texts)) if text not in right[image]] or [own])
        drawn = torch.randint(len(wrong), (each,), generator=torch.Generator().manual_seed(image))
        near = (encoded.text_embed[wrong] @ encoded.image_embed[image]).argsort(descending=True)
        near = near[torch.arange(each) % len(wrong)]
        pairs.append(torch.cat([torch.tensor([own]), wrong[drawn], wrong[near]]))
    texts = torch.stack(pairs) if pairs else torch.empty(0, 1 + 2 * each, dtype=torch.long)
    images = torch.tensor(mine, dtype=torch.long)[:, None].expand_as(texts)
    nothing = torch.empty(0)  # in a process without pictures
    logits = match_pairs(model, encoded, images.flatten(), texts.flatten(), device) if len(texts) else nothing
    own, *others = gather_shards(logits.view(-1, 1 + 2 * each), len(right)).split([1, each, each], dim=1)
    return dict(zip(("uniform", "nearest"), (area_under_curve(own, other) for other in others), strict=True))


def area_under_curve(right: Tensor, wrong: Tensor) -> float:
    """The share of (right, wrong) pairs in which the right one scores higher; a tie counts half."""
    ordered, right = wrong.flatten().sort().values, right.flatten().contiguous()
    below, up_to = torch.searchsorted(ordered, right), torch.searchsorted(ordered, right, right=True)
    return ((below + up_to).double().mean() / 2 / len(ordered)).item()


def check_ranks(model: VisionLanguageModel, k: int) -> None:
    """Raise ValueError for a model that cannot rank, or an impossible number of candidates."""
    if model.config.w_itc <= 0:
        raise ValueError("this checkpoint was trained without contrast (w_itc 0): it has nothing to rank a gallery by")
    if k < 0:
        raise ValueError(f"k is {k}: give the number of candidates to re-rank, 0 = contrast only")


def right_places(rows: list[dict], images: dict, texts: dict, by: str) -> tuple[dict, dict]:
    """For each direction and query: the places of its right answers, and the value of its row under `by`."""
    right = {"image_to_text": [set() for _ in images], "text_to_image": [set() for _ in texts]}
    value = {"image_to_text": [""] * len(images), "text_to_image": [""] * len(texts)}
    for row in rows:
        for caption in captions_of(row):
            i, t = images[row["image"]], texts[caption]
            right["image_to_text"][i].add(t)
            right["text_to_image"][t].add(i)
            value["image_to_text"][i] = value["text_to_image"][t] = str(row.get(by, ""))
    return right, value


def each_caption(rows: list[dict], texts: dict, encoded: Encoded) -> tuple[list[dict], dict, Encoded]:
    """Every caption of every picture as a text of its own, even where two are the same."""
    named = [row | {"caption": [(text, number, place) for place, text in enumerate(captions_of(row))]}
             for number, row in enumerate(rows)]  # fmt: skip
    each = {name: place for place, name in enumerate(name for row in named for name in row["caption"])}
    names = [text for text, _, _ in each]
    index = torch.tensor([texts[text] for text in names])
    of_texts = {part: getattr(encoded, part)[index] for part in ("text", "attention_mask", "text_embed")}
    return named, each, replace(encoded, texts=names, **of_texts)


def one_name(rows: list[dict], tokenizer: Tokenizer, longest: int) -> tuple[list[dict], dict[str, dict]]:
    """Rows of `pairs` in which inputs that look the same to the model share one name, the first; and {name: all names}.

    Texts are the same if their tokens are, pictures if their files are."""
    first, names = {}, {}

    def name(key: str, own: str) -> str:
        names.setdefault(first.setdefault(key, own), {})[own] = None
        return first[key]

    named = []
    for row in rows:
        texts = [name(str(tokenizer.encode(text, longest)), text) for text in captions_of(row)]
        named.append(row | {"image": name(resolved(row["image"]), row["image"]), "caption": texts})
    return named, names


def ranked_lists(way: str, direction: str, images: dict, texts: dict, best: list[list[int]], also: dict) -> list[dict]:
    """Places of the best answers to each query -> their names, in the format of predictions."""
    asked, found = (images, texts) if direction == "image_to_text" else (texts, images)
    names = list(found)
    return [
        {"way": way, "direction": direction, "query": query, "found": [names[place] for place in places]}
        | ({"also": list(also[query])[1:]} if len(also[query]) > 1 else {})
        for query, places in zip(asked, best, strict=True)
    ]


def check_by(rows: list[dict], by: str) -> None:
    """Raise ValueError if no row has the key to break results down by."""
    if by and not any(by in row for row in rows):
        raise ValueError(f"no row has the key {by!r}: give --by one of {', '.join(sorted(rows[0]))}")


def encode_rows(
    model, tokenizer: Tokenizer, rows: list[dict], device, read_texts: Callable
) -> tuple[dict, dict, Encoded]:
    """Encode the distinct pictures and texts of rows -> place of each picture, place of each text, Encoded"""
    images = list(dict.fromkeys(image for row in rows for image in pictures_of(row)))
    texts = list(dict.fromkeys(text for row in rows for text in read_texts(row)))
    tell_unread(texts, tokenizer, model.config.max_tokens)
    places = ({name: i for i, name in enumerate(names)} for names in (images, texts))
    return *places, encode(model, tokenizer, images, texts, device)


TOLD: set[str] = set()  # warnings that have been printed


def tell_unread(texts: list[str], tokenizer: Tokenizer, longest: int) -> None:
    """Warn, once, of texts that the model cannot read completely."""
    read = [tokenizer.encode(text) for text in texts]
    for count, why in (
        (sum(len(ids) > longest for ids in read), f"are longer than max_tokens {longest} and lose their end"),
        (
            sum(tokenizer.unk_id in ids for ids in read),
            "have words in characters that the vocabulary lacks: they are read as [UNK]",
        ),
    ):
        said = f"{count} of {len(texts)} texts {why}"
        if count and said not in TOLD:
            TOLD.add(said)
            runtime.warn(said)


def tell_unknown(tokenizer: Tokenizer, text: str) -> None:
    """Name the words of a typed text that the model does not know."""
    if unknown := tokenizer.unknown_words(text):
        are, them = ("is", "it") if len(unknown) == 1 else ("are", "them")
        print(f"{', '.join(unknown)} {are} not among the words of this model: it knows no meaning of {them}")


def match_best(model, encoded: Encoded, cosines: Tensor, start: int, direction: str, k: int, device) -> Tensor:
    """Matching logits (q, g) of the k best of each query by contrast, nan elsewhere.

    Args:    cosines (q, g)   of queries from place `start` on, with the whole gallery
    """
    best = cosines.topk(k, dim=1).indices
    query = torch.arange(start, start + len(cosines))[:, None].expand_as(best)
    pair = (query, best) if direction == "image_to_text" else (best, query)
    logits = match_pairs(model, encoded, pair[0].flatten(), pair[1].flatten(), device).view_as(best).double()
    logits = logits.where(~logits.isnan(), math.inf)  # NaN counts against the model, see ranks
    return torch.full_like(cosines, math.nan, dtype=torch.double).scatter(1, best, logits)


def rerank(cosines: Tensor, logits: Tensor, temperature: float, weight: float) -> Tensor:
    """Re-rank the candidates that have a matching logit -> scores (q, g); all others keep their order behind them.

    ITM's negatives are drawn by contrast: the more similar contrast finds a pair, the more often the matching head has
    seen it as a negative. The head therefore learns what contrast does not tell, and the evidence for a pair is the sum
    of both logits. How much weight the head has earned is chosen on val at the end of training.
    differs: ALBEF ranks by the matching head alone, which is weight inf

    Args:    cosines, logits (q, g)   see match_best
             weight                   of the matching logit relative to contrast's; 0 keeps the order of contrast
    """
    contrast = cosines.double() / temperature  # in single precision, close cosines would become ties
    scores = logits if weight == math.inf else weight * logits + contrast
    return torch.where(logits.isnan(), contrast - 1e6, scores)  # below any logit


def search(
    model, tokenizer: Tokenizer, images: list[str], text: str, device, k: int = 128, weight: float | None = None
) -> list[dict]:
    """Pictures (paths) ordered by how well they fit a text: by contrast, with the k best re-ranked, see rerank.

    Returns: for each {"image", "contrast": cosine, "matching": probability, or None if not among the k best}
    """
    check_ranks(model, k)
    encoded = encode(model, tokenizer, list(dict.fromkeys(images)), [text], device)
    scores = cosines = encoded.text_embed @ encoded.image_embed.T
    k = min(k, len(encoded.images)) if model.config.w_itm > 0 else 0
    if k:
        logits = match_best(model, encoded, cosines, 0, "text_to_image", k, device)
        scores = rerank(cosines, logits, model.temperature.item(), model.matching_weight if weight is None else weight)
    return [
        {
            "image": encoded.images[place],
            "contrast": cosines[0, place].item(),
            "matching": logits[0, place].sigmoid().item() if rank < k else None,
        }
        for rank, place in enumerate(scores[0].argsort(descending=True, stable=True).tolist())
    ]


# -------------------------------------------------------------------------------------------------------------- foils


def foils(model, tokenizer: Tokenizer, rows: list[dict], device, by: str = "") -> dict:
    """How often the caption scores above its foil, per kind, in percent. Chance is 50 %; a tie is wrong.

    Args:    by    a key of the rows: accuracies are also reported for each of its values
    Returns: {"n": {kind: rows}, "contrast": {kind: %}, "matching": {kind: %}, "apart": {value: the same}}
    """
    check_by(rows, by)
    images, texts, encoded = encode_rows(
        model, tokenizer, rows, device, lambda row: [row["caption"], *row["foils"].values()]
    )
    if not any(row["foils"] for row in rows):
        raise ValueError("no row has a foil: there is nothing to compare with the captions")
    result = {"n": {}, "contrast": {}, "matching": {}, "apart": {}}
    for kind in dict.fromkeys(kind for row in rows for kind in row["foils"]):
        those = [row for row in rows if kind in row["foils"]]
        image = torch.tensor([images[row["image"]] for row in those])
        true = torch.tensor([texts[row["caption"]] for row in those])
        false = torch.tensor([texts[row["foils"][kind]] for row in those])
        result["n"][kind] = len(those)
        if model.config.w_itc > 0:
            caption, foil = (
                (encoded.image_embed[image] * encoded.text_embed[text]).sum(dim=1) for text in (true, false)
            )
            result["contrast"][kind] = 100 * (caption > foil).float().mean().item()
        if model.config.w_itm > 0:
            caption, foil = (match_pairs(model, encoded, image, text, device) for text in (true, false))
            result["matching"][kind] = 100 * (caption > foil).float().mean().item()
    for value in sorted({str(row.get(by, "")) for row in rows}) if by else ():
        those = [row for row in rows if str(row.get(by, "")) == value]
        result["apart"][f"{by} {value}"] = foils(model, tokenizer, those, device)
    return result


# ------------------------------------------------------------------------------------------------------ classification


@torch.inference_mode()
def classify(model: Classifier, tokenizer: Tokenizer, rows: list[dict], device, batch: int = 250) -> list[str]:
    """The answer to each row of vqa, reasoning or entailment. Each distinct picture and text is encoded once."""
    schema = read_as(model.head_config.task)
    images, texts, encoded = encode_rows(model, tokenizer, rows, device, lambda row: texts_of(row, schema))
    mine, given = range(len(rows))[shard(len(rows))], []
    for start in range(0, len(mine), batch):
        some = [rows[number] for number in mine[start : start + batch]]
        image = torch.tensor([images[path] for row in some for path in pictures_of(row)])
        text = torch.tensor([texts[texts_of(row, schema)[0]] for row in some])
        logits = model.decide(
            encoded.image[image].to(device).float(),
            slots([len(pictures_of(row)) for row in some], model.pictures).to(device),
            encoded.text[text].to(device).float(),
            encoded.attention_mask[text].to(device),
        )
        if not logits.isfinite().all():
            raise ValueError("what the model answers is not finite: its run diverged, take a smaller --lr")
        given.append(logits.argmax(dim=1).cpu())
    places = gather_shards(torch.cat([torch.empty(0, dtype=torch.long), *given]), len(rows))
    return [model.head_config.answers[place] for place in places.tolist()]


# ----------------------------------------------------------------------------------------------------------- commands


def keep_result(path: Path, name: str, result: dict) -> str:
    """Add a result under its name to a JSON file, beside earlier results of other names -> what was done"""
    if rank_and_size()[0] > 0:
        return ""  # one process writes
    said, known = f"not kept: give --results a file that can be written, in place of {path}", {}
    with runtime.side_file(path):
        if path.is_file():
            try:
                known = {} | json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError, RecursionError):
                names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
                aside = next(name for name in names if not name.exists())
                os.replace(path, aside)
                runtime.warn(f"{path} was damaged and is now {aside.name}: a new one begins")
        runtime.write_json(path, known | {name: result})
        said = f"kept in {path}"
    return said


def within_reach(task: str, rows: list[dict], answers: list[str]) -> dict:
    """Print how many rows have no right answer in the list -> for vqa {"coverage": see tasks.coverage}"""
    known = {named(task, answer) for answer in answers}
    outside = sum((worths(row).keys() if task == "vqa" else {right_label(row)}).isdisjoint(known) for row in rows)
    if outside:
        print(f"{outside} of {len(rows)} rows have no answer in the checkpoint's list: they count as wrong")
    return {"coverage": coverage(rows, answers)} if task == "vqa" else {}


def judge(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> dict:
    """vqa, reasoning, entailment or grounding: predict, or read predictions; score them; draw examples."""
    task, rows = options.command, asked_rows(options, "questions" if options.no_answers else options.command)
    extra = {}
    if model is None:
        predictions = read_predictions(options.predictions, rows)
    elif task == "grounding":
        how = how_of(options)
        extra = {"map": str(how)}
        predictions = ground(model, tokenizer, rows, device, how, options.frame)
    else:
        if not options.no_answers:
            extra = within_reach(task, rows, model.head_config.answers)
        given = classify(model, tokenizer, rows, device)
        predictions = [{"row": number, "answer": answer} for number, answer in enumerate(given)]
    if options.no_answers:
        if rank_and_size()[0] == 0:
            write_predictions(options.predictions, rows, predictions)
        return {}
    if task == "grounding":
        result = judge_grounding(rows, predictions)
    else:
        result = judge_answers(task, rows, [prediction["answer"] for prediction in predictions])
    if model is not None and options.predictions and rank_and_size()[0] == 0:
        with runtime.side_file(options.predictions):
            write_predictions(options.predictions, rows, predictions)
    if options.figure and rank_and_size()[0] == 0:
        with runtime.side_file(options.figure):
            sheet.draw_examples(task, rows, predictions, options.figure)
    return result | extra


def weights_of(options: argparse.Namespace) -> tuple[float, ...]:
    """The matching weight given in the options, if any."""
    weight = options.matching_weight
    if weight is not None and not weight >= 0:
        raise ValueError(f"matching_weight is {weight}: give 0 or more")
    return () if weight is None else (weight,)


def how_of(options: argparse.Namespace) -> How:
    """How to make heat maps, from the options."""
    given = vars(options)
    return How(**{field.name: given[field.name] for field in fields(How) if field.name in given})


ANSWERING = tuple(name for name, task in TASKS.items() if issubclass(task, Classifier))
HOWS = {field.name for field in fields(How)}
ROWS = {"data", "check", "skip_bad"}
SCORED = ROWS | {"predictions", "figure", "frames", "results"}
USES = {  # the options of each command, beside checkpoint, teacher and device
    "retrieval": SCORED | {"k", "matching_weight", "own_captions", "by"},
    "foils": ROWS | {"frames", "by", "results"},
    "grounding": SCORED | HOWS | {"frame"},
    **dict.fromkeys(ANSWERING, SCORED),
    "vqa": SCORED | {"no_answers"},
    "search": ROWS | {"text", "k", "matching_weight", "frames", "figure"},
    "score": {"image", "video", "frames", "text"},
    "explain": {"image", "video", "frames", "text", "phrase", "out"} | HOWS,
    "embed": ROWS | {"frames", "out"},
    "world": HOWS | {"data", "k", "matching_weight", "results"},
}
COMMANDS = tuple(USES)


UNASKED = {
    "predictions": None,
    "frame": "{}",
    "frames": None,
    "teacher": False,
}  # load_for, where a tool has none of them


def load_for(options: argparse.Namespace, device) -> tuple[VisionLanguageModel | None, Tokenizer | None]:
    """Model and tokenizer for a command, or (None, None) to score a file of predictions.

    Raises:  ValueError for a checkpoint of another task
    """
    if options.checkpoint is None:
        if options.predictions and options.command in ("retrieval", "grounding", *ANSWERING):
            if options.teacher or options.own_captions or options.by:
                raise ValueError("--teacher, --own-captions and --by need --checkpoint: leave them out, or give it")
            return None, None
        raise ValueError(f"{options.command} needs --checkpoint: give the checkpoint.pt or best.pt of a run")
    model, tokenizer, state = load_model(options.checkpoint, device)
    task = state.get("head", {}).get("task", "pre-training")
    if options.command in ANSWERING and task != options.command:
        raise ValueError(
            f"{options.checkpoint} is a checkpoint of {task} and has no head for {options.command}: give one that "
            f"finetune.py {options.command} made"
        )
    if options.command in ("retrieval", "foils", "search", "embed", "world") and task in ANSWERING:
        raise ValueError(
            f"{options.checkpoint} is a checkpoint of {task}, which neither contrasts nor matches: give one of "
            "train.py, or of finetune.py retrieval or grounding"
        )
    if options.teacher:
        use_teacher(model, options.checkpoint)
    if options.frames is not None:
        model.student.image.places(options.frames)  # raises for more than the model knows
        model.config = replace(model.config, frames=options.frames)
    if "{}" not in options.frame:
        raise ValueError(f'--frame is {options.frame!r}: expected a text with {{}} for the phrase, "there is a {{}}"')
    return model, tokenizer


def use_teacher(model: VisionLanguageModel, path: Path) -> None:
    """Evaluate the teacher: its encoders, a moving average, replace the student's. Heads and temperature stay.

    Raises:  ValueError for a checkpoint without a teacher
    """
    teacher = getattr(model, "teacher", None)
    if teacher is None:
        raise ValueError(f"{path} has no teacher: only pre-training with mamo or vlmae keeps a moving average")
    if isinstance(teacher, Encoders):
        model.student = teacher
    else:  # of vlmae, the image encoder alone
        model.student.image = teacher


def parse() -> argparse.Namespace:
    """The command line."""
    parser = runtime.Parser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint.pt or best.pt of a run")
    parser.add_argument("--data", nargs="+", help="JSONL files; for `world` the folder that world/scenes.py wrote")
    parser.add_argument("--predictions", type=Path, help="JSONL file to write; without --checkpoint: the file to score")
    parser.add_argument("--no-answers", action="store_true", help="the rows of vqa have no answers: only predict")
    parser.add_argument("--figure", type=Path, help="PNG to draw right and wrong examples on")
    parser.add_argument(
        "--k", type=int, default=128, help="candidates to re-rank by matching, 0 = contrast only (%(default)s)"
    )
    parser.add_argument(
        "--matching-weight",
        type=float,
        help="weight of the matching logit relative to contrast's: 0 = contrast alone, inf = matching alone; default: "
        "chosen on val at the end of training",
    )
    parser.add_argument(
        "--own-captions",
        action="store_true",
        help="count only a picture's own captions as right, not the same text of another",
    )
    parser.add_argument("--by", default="", help="key of the rows, such as heldout, to break results down by")
    parser.add_argument("--image", nargs="+", help="picture for `score` and `explain`; reasoning takes one or two")
    parser.add_argument("--video", nargs="+", help="instead of --image: an animated picture, or the frames of a video")
    parser.add_argument("--frames", type=int, help="frames of a video to look at; default: as many as in training")
    parser.add_argument("--text", help="text for `search`, `score` and `explain`")
    parser.add_argument("--phrase", help="part of the text that `explain` looks for; without: the whole text")
    runtime.add_options(parser, How)
    parser.add_argument(
        "--frame", default="{}", help="text that `grounding` reads a phrase in, such as 'there is a {}'"
    )
    parser.add_argument(
        "--out", type=Path, help="what `explain` writes (heat.png), or `embed`, a file for numpy (features.npz)"
    )
    parser.add_argument("--check", default="header", choices=CHECKS, help="full = decode every picture first")
    parser.add_argument("--skip-bad", action="store_true", help="skip bad rows instead of stopping")
    parser.add_argument(
        "--results", type=Path, help="JSON file for the results; default: results.json beside the checkpoint"
    )
    parser.add_argument("--teacher", action="store_true", help="evaluate the teacher, the moving average of training")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    options = parser.parse_args()
    known = USES[options.command] | {"checkpoint", "teacher", "device"}
    for word in sys.argv[1:]:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in vars(options) and name not in known:
            used = ", ".join(sorted("--" + one.replace("_", "-") for one in known))
            raise ValueError(f"{options.command} does not use {word.partition('=')[0]}: leave it out; it uses {used}")
    return options


def main() -> None:
    """Load a checkpoint, run one command, write its result."""
    options = parse()
    asked = {options.predictions, options.figure, options.results}
    beside = options.checkpoint or options.predictions
    written, shown = [options.figure, options.results, options.out], [options.checkpoint, *(options.data or [])]
    (written if options.checkpoint else shown).append(options.predictions)
    shown += [*(options.image or []), *(options.video or [])]
    runtime.check_outputs(written, shown)
    options.results = options.results or (beside and beside.with_name("results.json"))
    with runtime.process_group(options.device) as device:
        model, tokenizer = load_for(options, device)
        if options.command in ("score", "explain"):
            if options.video and options.image:
                raise ValueError("a picture and a video are given: give --image or --video")
            if options.video:
                options.image = [video_of(options.video)]
            if not options.image or not is_text(options.text):
                raise ValueError(f'{options.command} needs a picture and a text: --image photo.jpg --text "a circle"')
            most = model.pictures if isinstance(model, Classifier) else 1
            if len(options.image) > most:
                raise ValueError(
                    f"{len(options.image)} pictures are given, and this checkpoint reads {most} beside a text"
                )
            {"score": print_score, "explain": explain}[options.command](Pipeline(model, tokenizer, device), options)
            return
        if not options.data:
            raise ValueError(f"{options.command} needs --data: give JSONL files, or for `world` the world's folder")
        if options.command == "embed":
            export(model, tokenizer, options, device)
            return
        if options.command == "search":
            print_found(model, tokenizer, options, device)
            return
        if options.command == "world":
            evaluate_world(model, tokenizer, options, device)
            return
        name = " ".join(options.data) + ", own captions" * options.own_captions
        name += f", frames {options.frames}" * bool(options.frames) + ", teacher" * options.teacher
        if options.command == "retrieval":
            result = retrieve(model, tokenizer, options, device)
            print(retrieval_table(name, result))
        elif options.command == "foils":
            result = foils(model, tokenizer, asked_rows(options, "foils"), device, options.by)
            print(foil_table(name, result))
        else:
            if options.no_answers and (model is None or not options.predictions):
                raise ValueError("--no-answers only predicts: give --checkpoint, and --predictions to write")
            result = judge(model, tokenizer, options, device)
            if options.no_answers:
                print(f"answers to {name} are in {options.predictions}")
                return
            print(result_table(f"{options.command}, {name}", result))
        print(keep_result(options.results, f"{options.command} {name}", result))
    if asked & runtime.UNWRITTEN:  # results have been printed, but a script may wait for the file
        raise ValueError(f"not written: {', '.join(map(str, asked & runtime.UNWRITTEN))}")


def retrieve(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> dict:
    """Retrieval by a checkpoint, or the score of ranked lists in a file."""
    rows = asked_rows(options, "pairs")
    if model is None:
        result = judge_retrieval(rows, options.predictions)
        lists = [one for _, one in read_lines(options.predictions)]
    else:
        own, lists = options.own_captions, None if options.own_captions else []
        if own and (options.predictions or options.figure):
            raise ValueError("--own-captions gives figures only: leave --predictions and --figure out, or it")
        weights = weights_of(options)
        result = retrieval(model, tokenizer, rows, device, options.k, options.by, lists=lists, weights=weights, own=own)
    if model is not None and options.predictions and rank_and_size()[0] == 0:
        with runtime.side_file(options.predictions):
            write_predictions(options.predictions, rows, lists)
    if options.figure and rank_and_size()[0] == 0:
        with runtime.side_file(options.figure):
            sheet.draw_ranked(rows, lists, options.figure)
    return result


def asked_rows(options: argparse.Namespace, schema: str) -> list[dict]:
    """The rows of --data."""
    rows = read_rows(options.data, schema, options.check, options.skip_bad)
    pictures = {picture for row in rows for picture in pictures_of(row)} if options.figure or options.out else ()
    runtime.check_outputs([options.figure, options.out], (file for picture in pictures for file in files_of(picture)))
    return rows


def export(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> None:
    """Write a numpy file for use elsewhere: "images", "texts" (paths and captions, each distinct one once), and their
    embeddings "image_embed", "text_embed", unit vectors (rows, e)."""
    check_ranks(model, 0)
    _, _, encoded = encode_rows(model, tokenizer, asked_rows(options, "pairs"), device, captions_of)
    if rank_and_size()[0] > 0:
        return
    out = options.out or Path("features.npz")
    arrays = {"images": np.array(encoded.images), "texts": np.array(encoded.texts)}
    arrays |= {"image_embed": encoded.image_embed.numpy(), "text_embed": encoded.text_embed.numpy()}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    runtime.write_beside(out, write)
    count, width = len(encoded.images), encoded.image_embed.shape[1]
    print(f"{out}: {count} pictures and {len(encoded.texts)} texts, {width} numbers each")


FEW = 1000  # training rows; with fewer, a search for a text that is no caption prints a warning


def print_found(model, tokenizer: Tokenizer, options: argparse.Namespace, device, best: int = 10) -> None:
    """The pictures of `pairs` rows that fit --text best, with one of their captions; --figure draws them."""
    if not is_text(options.text):
        raise ValueError('search needs a text: --text "a red circle"')
    captions: dict[str, str] = {}  # the first of each picture
    rows = asked_rows(options, "pairs")
    for row in rows:
        captions.setdefault(row["image"], captions_of(row)[0])
    tell_unknown(tokenizer, options.text)
    asked = tokenizer.encode(options.text)
    if model.trained_on < FEW and all(tokenizer.encode(text) != asked for row in rows for text in captions_of(row)):
        print(
            f"no caption in --data is this text, and the model was trained on {model.trained_on} rows: so few are "
            "memorised, and how other texts are ranked means little"
        )
    (weight,) = weights_of(options) or (model.matching_weight,)
    found = search(model, tokenizer, list(captions), options.text, device, options.k, weight)[:best]
    print(f"{'matching':>9}{'contrast':>10}   picture: its caption, for comparison")
    for one in found:
        matching = "" if one["matching"] is None else f"{one['matching']:.4f}"
        path = ", ".join(map(os.path.normpath, files_of(one["image"])))
        print(f"{matching:>9}{one['contrast']:10.3f}   {path}: {captions[one['image']]}")
    if any(one["matching"] is not None for one in found):
        print(
            f"ordered by contrast and matching together, weight {weight:g}; --matching-weight 0 or inf asks one of them"
        )
    if options.figure and rank_and_size()[0] == 0:
        sheet.draw_found(options.text, found, options.figure)
        print(f"the pictures are in {options.figure}")


def explain(pipeline: Pipeline, options: argparse.Namespace) -> None:
    """Draw the heat map of a phrase over a picture, or over each of two."""
    model, phrase, out = pipeline.model, options.phrase or options.text, options.out or Path("heat.png")
    how = how_of(options)
    where = "" if phrase == options.text else f" in: {options.text}"
    said = f"   {pipeline.answers(options.image, options.text)[0][0]}" if isinstance(model, Classifier) else ""
    if how.map == "hiding" and phrase != options.text and isinstance(model, Classifier):
        raise ValueError("--phrase: hiding shows what speaks for the answer as a whole; --map gradcam reads a phrase")
    tell_unknown(pipeline.tokenizer, options.text)
    heats = pipeline.heat(options.image, options.text, phrase, how)
    sheet.draw_heats(heats, out, f"{phrase}{where}{said}   ({how})")
    print_score(pipeline, options)
    print(f"the map, by {how}, is in {out}")


def print_score(pipeline: Pipeline, options: argparse.Namespace) -> None:
    """Print how well a picture fits a text, or, for a task with answers, the likeliest answers."""
    if isinstance(pipeline.model, Classifier):
        for answer, probability in pipeline.answers(options.image, options.text):
            print(f"{answer}: {probability:.4f}")
        return
    names = {"itc": "contrast, cosine in [-1, 1]", "itm": "matching, probability"}
    if options.command == "score":  # explain has done so
        tell_unknown(pipeline.tokenizer, options.text)
    for name, value in pipeline.score(options.image[0], options.text).items():
        print(f"{names[name]}: {value:.4f}")


def evaluate_world(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> None:
    """Retrieval, foils and grounding on the test and novel splits of the built-in world."""
    folder, out, which = Path(options.data[0]), options.results.parent, ", teacher" * options.teacher
    matches = model.config.w_itm > 0
    for split in ("test", "novel"):
        rows = read_rows([folder / f"pairs_{split}.jsonl"], "pairs")
        by = "heldout" if split == "test" else ""
        lists = []
        result = retrieval(model, tokenizer, rows, device, options.k, by, lists=lists, weights=weights_of(options))
        print(retrieval_table(f"retrieval, {split}", result))
        keep_result(options.results, f"pairs_{split}{which}", result)
        if split == "test" and rank_and_size()[0] == 0:
            with runtime.side_file(out / "ranked.png"):
                sheet.draw_ranked(rows, lists, out / "ranked.png")
        result = foils(model, tokenizer, read_rows([folder / f"foils_{split}.jsonl"], "foils"), device, by)
        print(foil_table(f"foils, {split}", result))
        said = keep_result(options.results, f"foils_{split}{which}", result)
        if matches:
            rows = read_rows([folder / f"grounding_{split}.jsonl"], "grounding")
            how = how_of(options)
            result = judge_grounding(rows, ground(model, tokenizer, rows, device, how)) | {"map": str(how)}
            print(result_table(f"grounding, {split}", result))
            keep_result(options.results, f"grounding_{split}{which}", result)
    print(f"{said}; some pictures with their best captions: {out / 'ranked.png'}")


if __name__ == "__main__":
    runtime.guarded(main)
