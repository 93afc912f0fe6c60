"""Evaluate a checkpoint without further training.

    python eval.py retrieval --checkpoint runs/demo/checkpoint.pt --data data/scenes/pairs_test.jsonl
    python eval.py foils     --checkpoint runs/demo/checkpoint.pt --data data/scenes/foils_test.jsonl
    python eval.py score     --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle"
    python eval.py explain   --checkpoint runs/demo/checkpoint.pt --image photo.jpg --text "a red circle" --out heat.png
    python eval.py pointing  --checkpoint runs/demo/checkpoint.pt --data data/scenes/grounding_test.jsonl
    python eval.py world     --checkpoint runs/demo/checkpoint.pt --data data/scenes       all of the built-in world
    torchrun --nproc-per-node 8 eval.py retrieval ...              pictures, texts and queries shared by eight processes

Retrieval is zero-shot: every picture against every caption, both ways, R@1/5/10. "contrast" ranks by the cosine of the
two embeddings; "matching" lets the matching head order the k best of them anew. A hit is any right answer among the
first; an equal score of a wrong answer counts as ahead. Explaining and pointing: see explain.py. Results go to
results.json beside the checkpoint.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import runtime
from data import captions_of, load_image, pad, read_rows, to_tensor
from explain import check_layer, choose_layer, draw_heat, middle_layer, pointing
from mamo import MAMO, Config, VisionLanguageModel, world
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------- models

# name: (class, fields of Config that make it up)
OBJECTIVES = {"mamo": (MAMO, {}), "control": (MAMO, {"w_mrm": 0.0, "w_mim": 0.0})}


def build_model(objective: str, config: dict) -> VisionLanguageModel:
    """A fresh model of an objective from the fields of its Config."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective][0](Config(**config))


def load_model(path: str | Path, device: torch.device) -> tuple[VisionLanguageModel, Tokenizer, dict]:
    """Model in evaluation mode, tokenizer and whole state of a checkpoint. Raises ValueError, see load_checkpoint."""
    state = runtime.load_checkpoint(path)
    tokenizer = Tokenizer(state["vocab"])
    if len(tokenizer) != state["config"]["vocab_size"]:
        raise ValueError(
            f"{path} holds a vocabulary of {len(tokenizer)} words and a model of {state['config']['vocab_size']}: "
            "the two do not belong together"
        )
    model = build_model(state["objective"], state["config"])
    runtime.load_weights(model, state["model"], path)
    return model.to(device).eval(), tokenizer, state


# --------------------------------------------------------------------------------------------- shared by the processes


def shard(count: int, rank: int | None = None) -> slice:
    """The part of count rows that one process, by default this one, works on: contiguous, none twice, none left out."""
    own, processes = world()
    rank = own if rank is None else rank
    return slice(count * rank // processes, count * (rank + 1) // processes)


def gather_shards(mine: Tensor, count: int) -> Tensor:
    """Rows of this process's shard -> all count rows, on every process. On the CPU, so over gloo."""
    if world()[1] == 1:
        return mine
    whole = mine.new_empty(count, *mine.shape[1:])
    whole[shard(count)] = mine
    for rank in range(world()[1]):
        rows = whole[shard(count, rank)]
        if len(rows):
            dist.broadcast(rows, src=rank)
    return whole


# ---------------------------------------------------------------------------------------------------------- retrieval


@dataclass
class Encoded:
    """Each distinct picture and each distinct text of some rows, encoded once; on the CPU, features in half precision:
    5,000 pictures of `base` take 2 GB, 25,000 captions 1.2 GB."""

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
    """Encode distinct pictures (paths) and distinct texts, each process its share."""
    model.eval()
    config = model.config
    input_ids, attention_mask = pad([tokenizer.encode(text, config.max_tokens) for text in texts], tokenizer.pad_id)

    def encode_pictures(rows: slice) -> tuple[Tensor, Callable]:
        pixels = torch.stack([to_tensor(load_image(path), config.image_size) for path in images[rows]])
        return model.encode_image(pixels.to(device)), model.embed_image

    def encode_texts(rows: slice) -> tuple[Tensor, Callable]:
        return model.encode_text(input_ids[rows].to(device), attention_mask[rows].to(device)), model.embed_text

    def encode_all(what: str, encode_some: Callable, count: int, length: int) -> tuple[Tensor, Tensor | None]:
        """This process's share in chunks, then everybody's."""
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

    image, image_embed = encode_all("pictures", encode_pictures, len(images), 1 + config.patches)
    text, text_embed = encode_all("texts", encode_texts, len(texts), input_ids.shape[1])
    return Encoded(images, texts, image, text, attention_mask, image_embed, text_embed)


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
    """scores (q, g), right (q, g) bool -> (q,): wrong answers not clearly behind the best right one; 0 = found first.

    An equal score, or one that is not a number, counts as ahead: who says the same to everything finds nothing.
    """
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)


def recalls(rank: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 in percent."""
    return {f"R@{k}": 100 * (rank < k).float().mean().item() for k in (1, 5, 10)}


def chance_recalls(counts: list[int], gallery: int) -> dict[str, float]:
    """R@1/5/10 in percent of a ranking drawn at random: the first k of g places hold none of a query's r right answers
    with probability C(g - r, k) / C(g, k). counts: r of each query; gallery: g."""
    levels = {}
    for k in (1, 5, 10):
        drawn = min(k, gallery)
        missed = {r: math.comb(gallery - r, drawn) / math.comb(gallery, drawn) for r in set(counts)}
        levels[f"R@{k}"] = 100 * (1 - sum(missed[r] for r in counts) / len(counts))
    return levels


def retrieval(
    model, tokenizer: Tokenizer, rows: list[dict], device, k: int = 128, by: str = "", block: int = 500
) -> dict:
    """Zero-shot retrieval over the distinct pictures and captions of `pairs` rows, both ways.

    Args:    k       candidates that matching orders anew, at most a tenth of the gallery (MAMO Sec. 4.1 takes 128 on
                     Flickr30k and 256 on COCO); 0 = contrast only
             by      a key of the rows: the recalls of its values are reported apart, still among the whole gallery
             block   queries at a time, which bounds the memory
    Returns: {"images", "texts", "k", "chance": recalls, "contrast": recalls, "matching": recalls, "apart": {value}}
             where recalls = {"image_to_text": {"R@1", "R@5", "R@10"}, "text_to_image": ...} in percent
    """
    if model.config.w_itc <= 0:
        raise ValueError("this checkpoint was trained without contrast (w_itc 0): it has nothing to rank a gallery by")
    if k < 0:
        raise ValueError(f"k is {k}: give the number of candidates that matching orders anew, 0 = contrast only")
    check_by(rows, by)
    images, texts, encoded = encode_rows(model, tokenizer, rows, device, captions_of)
    right_texts, right_images = [set() for _ in images], [set() for _ in texts]
    value_of_image, value_of_text = [""] * len(images), [""] * len(texts)
    for row in rows:
        for caption in captions_of(row):
            i, t = images[row["image"]], texts[caption]
            right_texts[i].add(t)
            right_images[t].add(i)
            value_of_image[i] = value_of_text[t] = str(row.get(by, ""))
    k = min(k, math.ceil(min(len(images), len(texts)) / 10)) if model.config.w_itm > 0 else 0
    result = {"images": len(images), "texts": len(texts), "k": k}
    result |= {"chance": {}, "contrast": {}, "matching": {}, "apart": {}}
    sides = {
        "image_to_text": (encoded.image_embed, encoded.text_embed, right_texts, value_of_image),
        "text_to_image": (encoded.text_embed, encoded.image_embed, right_images, value_of_text),
    }
    for direction, (queries, gallery, answers, values) in sides.items():
        found = {"contrast": [], "matching": []}
        mine = range(len(queries))[shard(len(queries))]
        for start in tqdm(mine[::block], desc=direction, leave=False, disable=len(queries) < 2000):
            asked = range(start, min(start + block, mine.stop))
            truth = torch.zeros(len(asked), len(gallery), dtype=torch.bool)
            for place, query in enumerate(asked):
                truth[place, list(answers[query])] = True
            scores = queries[asked.start : asked.stop] @ gallery.T
            found["contrast"].append(ranks(scores, truth))
            if k:
                found["matching"].append(ranks(rerank(model, encoded, scores, start, direction, k, device), truth))
        result["chance"][direction] = chance_recalls([len(answer) for answer in answers], len(gallery))
        for way in ("contrast", "matching") if k else ("contrast",):
            nothing = torch.empty(0, dtype=torch.long)  # for a process with fewer queries than there are processes
            rank = gather_shards(torch.cat([nothing, *found[way]]), len(queries))
            result[way][direction] = recalls(rank)
            for value in sorted(set(values)) if by else ():
                those = torch.tensor([v == value for v in values])
                result["apart"].setdefault(f"{by} {value}", {}).setdefault(way, {})[direction] = recalls(rank[those])
    return result


def check_by(rows: list[dict], by: str) -> None:
    """Raise ValueError if no row has the key whose values are to be reported apart."""
    if by and not any(by in row for row in rows):
        raise ValueError(f"no row has the key {by!r}: give --by one of {', '.join(sorted(rows[0]))}")


def encode_rows(model, tokenizer: Tokenizer, rows: list[dict], device, texts_of) -> tuple[dict, dict, Encoded]:
    """Encode the distinct pictures and texts of rows -> place of each picture, place of each text, Encoded"""
    images = list(dict.fromkeys(row["image"] for row in rows))
    texts = list(dict.fromkeys(text for row in rows for text in texts_of(row)))
    places = ({name: i for i, name in enumerate(names)} for names in (images, texts))
    return *places, encode(model, tokenizer, images, texts, device)


def rerank(model, encoded: Encoded, scores: Tensor, start: int, direction: str, k: int, device) -> Tensor:
    """Order the k best of each query by matching; all others keep their order behind them. scores (q, g) -> (q, g)"""
    best = scores.topk(k, dim=1).indices
    query = torch.arange(start, start + len(scores))[:, None].expand_as(best)
    pair = (query, best) if direction == "image_to_text" else (best, query)
    logits = match_pairs(model, encoded, pair[0].flatten(), pair[1].flatten(), device).view_as(best)
    behind = scores.double() - 1e4  # below any logit; double, because in single close cosines would become ties
    return behind.scatter(1, best, logits.double())


# -------------------------------------------------------------------------------------------------------------- foils


def foils(model, tokenizer: Tokenizer, rows: list[dict], device, by: str = "") -> dict:
    """How often the caption scores above its foil, per kind, in percent. Chance is 50 %, and an equal score is wrong.

    Args:    by    a key of the rows: the accuracies of its values are reported apart
    Returns: {"n": {kind: rows}, "contrast": {kind: %}, "matching": {kind: %}, "apart": {value: the same}}
    """
    check_by(rows, by)
    images, texts, encoded = encode_rows(
        model, tokenizer, rows, device, lambda row: [row["caption"], *row["foils"].values()]
    )
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


# ----------------------------------------------------------------------------------------------------------- commands


def percent(value: float) -> str:
    """A cell of a table."""
    return f"{value:6.1f}"


def retrieval_table(name: str, result: dict) -> str:
    """Recalls in percent, both ways, beside chance."""
    ways = {"contrast": result["contrast"], "chance": result["chance"]}
    if result["matching"]:
        ways = {
            "contrast": result["contrast"],
            f"matching, k={result['k']}": result["matching"],
            "chance": result["chance"],
        }
    for value, part in result["apart"].items():
        ways |= {f"{value}: {way}": recall for way, recall in part.items()}
    lines = [f"{name}: {result['images']} pictures, {result['texts']} captions; R@1 / R@5 / R@10 in %"]
    lines.append(f"  {'':28}{'image to text':>24}{'text to image':>24}")
    for way, recall in ways.items():
        cells = (
            "".join(percent(value) for value in recall[side].values()) for side in ("image_to_text", "text_to_image")
        )
        lines.append(f"  {way:28}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def foil_table(name: str, result: dict) -> str:
    """Accuracy in percent per kind, by contrast and by matching, beside chance."""
    lines = [f"{name}: caption above foil in %, chance 50.0"]
    lines.append(f"  {'':28}" + "".join(f"{kind:>10}" for kind in result["n"]))
    for title, part in {"": result, **result["apart"]}.items():
        for way in ("contrast", "matching"):
            if part[way]:
                label = f"{title}: {way}" if title else way
                lines.append(
                    f"  {label:28}" + "".join(f"{part[way].get(kind, math.nan):10.1f}" for kind in result["n"])
                )
    lines.append(f"  {'rows':28}" + "".join(f"{n:10d}" for n in result["n"].values()))
    return "\n".join(lines)


def pointing_table(name: str, result: dict) -> str:
    """Hits in percent beside chance and ceiling, by the chosen fusion block and by each."""
    layers = ", ".join(f"block {layer}: {hits:.1f}" for layer, hits in enumerate(result["layers"]))
    return (
        f"{name}: {result['n']} phrases; centre of the hottest patch in the right box, in %\n"
        f"  by block {result['layer']} {result['hits']:.1f}, chance {result['chance']:.1f}, "
        f"ceiling of the grid {result['ceiling']:.1f} ({layers})"
    )


def draw_ranked(
    model, tokenizer: Tokenizer, rows: list[dict], device, path: Path, pictures: int = 8, best: int = 5
) -> None:
    """Draw some pictures of a gallery beside their best captions, by matching where there is a matching head.

    A right caption is marked with +, a wrong one with -, so that the sheet does not rest on colour alone.
    """
    images, texts, encoded = encode_rows(model, tokenizer, rows, device, captions_of)
    if world()[0] > 0:
        return  # one process draws
    scores = encoded.image_embed @ encoded.text_embed.T
    if model.config.w_itm > 0:
        scores = rerank(model, encoded, scores, 0, "image_to_text", min(20, len(texts)), device)
    right = {(row["image"], caption) for row in rows for caption in captions_of(row)}
    names, side, line = list(texts), 128, 22
    chosen = list(images)[:: max(len(images) // pictures, 1)][:pictures]
    sheet = Image.new("RGB", (side + 460, (side + 12) * len(chosen) + 12), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, image in enumerate(chosen):
        top = 12 + number * (side + 12)
        sheet.paste(load_image(image).resize((side, side), Image.Resampling.NEAREST), (12, top))
        for place, t in enumerate(scores[images[image]].topk(min(best, len(texts))).indices.tolist()):
            good = (image, names[t]) in right
            text = f"{'+' if good else '-'} {names[t]}"
            pen.text((side + 28, top + 6 + place * line), text, fill="#0a6b2d" if good else "#8a1c1c", font=font)
    runtime.write_beside(path, lambda temporary: sheet.save(temporary, format="PNG"))


def keep_result(checkpoint: Path, name: str, result: dict) -> Path:
    """Put a result under its name into results.json beside the checkpoint; earlier results of other names stay."""
    path = checkpoint.parent / "results.json"
    if world()[0] > 0:
        return path  # one process writes
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    runtime.write_json(path, known | {name: result})
    return path


def main() -> None:
    """Command line: load a checkpoint, run one command, keep its result."""
    parser = runtime.Parser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("retrieval", "foils", "score", "explain", "pointing", "world"))
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint.pt of a run")
    parser.add_argument("--data", nargs="+", help="JSONL files; for `world` the folder that scenes.py wrote")
    parser.add_argument("--k", type=int, default=128, help="candidates that matching orders anew, 0 = contrast only")
    parser.add_argument("--by", default="", help="key of the rows whose values are reported apart, such as heldout")
    parser.add_argument("--image", help="picture for `score` and `explain`")
    parser.add_argument("--text", help="text for `score` and `explain`")
    parser.add_argument("--phrase", help="part of the text that `explain` looks for; without: the whole text")
    parser.add_argument("--layer", type=int, help="fusion block for `explain` and `pointing`, from 0, or -1 = the last")
    parser.add_argument("--choose", nargs="+", help="JSONL files on which `pointing` chooses the layer, such as val")
    parser.add_argument("--out", type=Path, default=Path("heat.png"), help="picture that `explain` writes")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    options = parser.parse_args()
    with runtime.processes(options.device) as device:
        model, tokenizer, _ = load_model(options.checkpoint, device)
        if options.command in ("score", "explain"):
            if not options.image or not options.text:
                raise ValueError(f'{options.command} needs a picture and a text: --image photo.jpg --text "a circle"')
            {"score": print_score, "explain": explain}[options.command](model, tokenizer, options, device)
            return
        if not options.data:
            raise ValueError(f"{options.command} needs --data: give JSONL files, or for `world` the world's folder")
        if options.command == "world":
            evaluate_world(model, tokenizer, options, device)
            return
        name = " ".join(options.data)
        if options.command == "retrieval":
            result = retrieval(model, tokenizer, read_rows(options.data, "pairs"), device, options.k, options.by)
            print(retrieval_table(name, result))
        elif options.command == "foils":
            result = foils(model, tokenizer, read_rows(options.data, "foils"), device, options.by)
            print(foil_table(name, result))
        else:
            result = point(model, tokenizer, options, device)
            print(pointing_table(name, result))
        print(f"kept in {keep_result(options.checkpoint, ' '.join([options.command, name]), result)}")


def point(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> dict:
    """The pointing game by the fusion block that was given, or chosen on --choose, or the middle one."""
    if options.layer is not None:
        layer = check_layer(model, options.layer)
    elif options.choose:
        layer = choose_layer(model, tokenizer, read_rows(options.choose, "grounding"), device)
    else:
        layer = middle_layer(model)
    return pointing(model, tokenizer, read_rows(options.data, "grounding"), device, layer)


def explain(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> None:
    """Lay the heat map of a phrase over a picture."""
    layer = middle_layer(model) if options.layer is None else check_layer(model, options.layer)
    sheet = draw_heat(model, tokenizer, options.image, options.text, options.phrase or options.text, layer, device)
    runtime.write_beside(options.out, lambda temporary: sheet.save(temporary, format="PNG"))
    print_score(model, tokenizer, options, device)
    print(f"fusion block {layer} of 0 to {model.config.fusion_depth - 1}; the map is in {options.out}")


def print_score(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> None:
    """Cosine and probability of matching of one picture and one text."""
    input_ids, attention_mask = pad([tokenizer.encode(options.text, model.config.max_tokens)], tokenizer.pad_id)
    image = to_tensor(load_image(options.image), model.config.image_size)[None]
    scores = model.score(image.to(device), input_ids.to(device), attention_mask.to(device))
    names = {"itc": "contrast, cosine in [-1, 1]", "itm": "matching, probability"}
    for name, value in scores.items():
        print(f"{names[name]}: {value.item():.4f}")


def evaluate_world(model, tokenizer: Tokenizer, options: argparse.Namespace, device) -> None:
    """Everything that the built-in world asks, each split apart, in one table, one results.json and one picture."""
    folder, out = Path(options.data[0]), options.checkpoint.parent
    matches = model.config.w_itm > 0
    if matches:  # the layer is chosen on val, and test is only looked at
        layer = choose_layer(model, tokenizer, read_rows([folder / "grounding_val.jsonl"], "grounding"), device)
    for split in ("test", "novel"):
        rows = read_rows([folder / f"pairs_{split}.jsonl"], "pairs")
        by = "heldout" if split == "test" else ""
        result = retrieval(model, tokenizer, rows, device, options.k, by)
        print(retrieval_table(f"retrieval, {split}", result))
        keep_result(options.checkpoint, f"pairs_{split}", result)
        if split == "test":
            draw_ranked(model, tokenizer, rows, device, out / "ranked.png")
        result = foils(model, tokenizer, read_rows([folder / f"foils_{split}.jsonl"], "foils"), device, by)
        print(foil_table(f"foils, {split}", result))
        path = keep_result(options.checkpoint, f"foils_{split}", result)
        if matches:
            rows = read_rows([folder / f"grounding_{split}.jsonl"], "grounding")
            result = pointing(model, tokenizer, rows, device, layer)
            print(pointing_table(f"pointing, {split}", result))
            keep_result(options.checkpoint, f"pointing_{split}", result)
    print(f"kept in {path}; some pictures with their best captions: {out / 'ranked.png'}")


if __name__ == "__main__":
    runtime.guarded(main)
