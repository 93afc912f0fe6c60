"""Write an HTML report on a checkpoint as one file: retrieval, heat maps, reconstructions, learning curves and results.

    python -m tools.report --checkpoint runs/demo/checkpoint.pt --data data/scenes/pairs_test.jsonl

The file needs neither a server nor a network connection: it embeds all pictures, figures and maps, and the template
page.html displays them. The page has five parts:

    gallery     retrieval in both directions by eval.retrieval, half right and half wrong answers if there are enough
    words       a heat map for each word of a caption, computed by masking parts of the picture, see explain.py
    recovered   what the student predicts at masked patches, shown as the patches of other pictures whose teacher
                features are nearest to the prediction (MAMO only: other objectives do not predict features)
    curves      log.csv beside the checkpoint, with the chance level of each loss
    results     recalls on this gallery, and the contents of results.json beside the checkpoint, compared with chance

How to read it: `describe` computes the parts in this order; each function returns a plain dictionary for page.html.
"""

import argparse
import base64
import csv
import datetime
import io
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

import runtime
from data import captions_of, centred, is_video, read_rows, sample_of, shown, to_pixels
from eval import UNASKED, encode_rows, load_for, match_pairs, one_name, retrieval, right_places
from explain import How, hidden_views, hiding_map, pixels_of, watched
from mamo import at, normalised, patchify
from metrics import chance_recalls, right_answers
from tasks import by_picture
from tokenizer import CHUNK, Tokenizer

TEMPLATE = Path(__file__).with_name("page.html")
DIRECTIONS = ("image_to_text", "text_to_image")
SHOWN = 4  # answers shown per query, out of the ten best that are known
MOSAICS = 6  # number of pictures whose reconstruction is shown
PATCHES = 65_536  # maximum number of patches in the data that may replace a masked one, to bound memory
LONG_SIDE = 320  # longer side of an embedded photograph, in pixels
DRAWING = 128  # pictures with at most this many pixels per side are embedded losslessly, as PNG
PICTURE_BYTES = 40_000  # maximum size of a photograph, so that 50 of them take less than 3 MB as text


# ----------------------------------------------------------------------------------------------------------- pictures


def embed(picture: Image.Image) -> dict:
    """A picture for the page -> {"src": data URI, "width", "height" in pixels, "crisp": display pixels as squares}

    A small drawing is embedded as it is; a photograph is downscaled and compressed until it is small enough.
    """
    width, height = picture.size
    file, crisp = io.BytesIO(), max(picture.size) <= DRAWING
    if crisp:
        picture.save(file, format="PNG", optimize=True)
    else:
        small = picture.copy()
        small.thumbnail((LONG_SIDE, LONG_SIDE))
        for quality in (85, 70, 55, 40, 25):
            file = io.BytesIO()
            small.save(file, format="JPEG", quality=quality, optimize=True)
            if file.tell() <= PICTURE_BYTES:
                break
    kind = "png" if crisp else "jpeg"
    return {"src": f"data:image/{kind};base64,{text_of(file.getvalue())}", "width": width, "height": height,
            "crisp": crisp}  # fmt: skip


def text_of(raw: bytes) -> str:
    """Bytes as base64 text, for JSON."""
    return base64.b64encode(raw).decode("ascii")


class Album:
    """The pictures of the page, each embedded once and referred to by its index."""

    def __init__(self, captions: dict[str, list[str]], frames: int):
        """frames: how many the model reads from a video, shown as one strip, so that a map can cover the strip"""
        self.captions, self.frames, self.numbers, self.pictures = captions, frames, {}, []

    def number(self, path: str) -> int:
        """The index of a picture, which is embedded when first used."""
        if path not in self.numbers:
            self.numbers[path] = len(self.pictures)
            self.pictures.append(embed(shown(path, self.frames, apart=False)) | {"alt": "; ".join(self.captions[path])})
        return self.numbers[path]


# ------------------------------------------------------------------------------------------------------ words and maps


def words_of(tokenizer: Tokenizer, text: str, max_tokens: int) -> list[tuple[str, list[int]]]:
    """The words of a text as written, each with the positions of its tokens (none if it is truncated)."""
    words, start = [], 1  # position 0 is [CLS]
    for chunk in CHUNK.findall(text):
        stop = start + len(tokenizer.tokenize(chunk))
        words.append((chunk, list(range(start, min(stop, max_tokens - 1)))))
        start = stop
    return words


def word_maps(model, tokenizer: Tokenizer, pairs: list[tuple[str, str]], how: How, device) -> list[Tensor]:
    """Occlusion maps for each pair (picture path, text) -> (words that are read + 1, n); the last row: the whole text.

    For a model without an MLM head, there is only the map of the whole text.
    """
    maps = {}
    model.eval()
    for path, text in sorted(set(pairs)):
        if path not in maps:  # the views of a picture are encoded once for all its texts
            views, maps[path] = hidden_views(model, pixels_of(path, model.config).to(device), how), {}
        maps[path][text] = maps_of_words(model, tokenizer, *views, text)
    return [maps[path][text] for path, text in pairs]


def maps_of_words(model, tokenizer: Tokenizer, views: Tensor, masks: tuple[Tensor, Tensor], text: str) -> Tensor:
    """Occlusion maps for a text, and a picture's views and masks (see hidden_views) -> (words that are read + 1, n), as
    in word_maps."""
    longest = model.config.max_tokens
    ids = tokenizer.encode(text, longest)
    words = words_of(tokenizer, text, longest) if model.config.w_mlm > 0 else []
    wanted = [
        [place in places or len(places) == len(ids) - 2 for place in range(len(ids))] for _, places in words if places
    ]
    looks = [watched(model, [views], ids, counted) for counted in [*wanted, [True] * len(ids)]]
    return torch.stack([hiding_map(look, masks) for look in looks]).cpu()


def read(tokenizer: Tokenizer, texts: list[str], max_tokens: int, device) -> tuple[Tensor, Tensor]:
    """Texts -> input_ids (b, l), attention_mask (b, l) on the device"""
    input_ids, attention_mask = tokenizer(texts, max_tokens)
    return input_ids.to(device), attention_mask.to(device)


def packed(maps: Tensor, grid: tuple[int, int]) -> str:
    """Maps (words + 1, n) as bytes, each scaled separately; for a video, with the frames side by side."""
    maps = rearrange(maps, "w (f y x) -> w (y f x)", y=grid[0], x=grid[1])
    levels = maps / maps.amax(dim=1, keepdim=True).clamp(min=1e-12)
    return text_of((255 * levels).round().byte().numpy().tobytes())


# ------------------------------------------------------------------------------------------------------------- gallery


def spaced(items: list, count: int) -> list:
    """Up to `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def choose(queries: list[dict], count: int) -> list[dict]:
    """Queries with right and wrong answers in alternation, equally many of both if there are enough."""
    right, wrong = ([one for one in queries if one["right"] is good] for good in (True, False))
    few = min(len(wrong), max(count // 2, count - len(right)))
    turns = itertools.zip_longest(spaced(right, count - few), spaced(wrong, few))
    return [one for turn in turns for one in turn if one]


def answers_to(query: str, found: list[str], right: set[str], direction: str) -> list[dict]:
    """The first few of the ten best answers, plus the best right one if none of them is right; its rank may be None."""
    answers = [{"name": name, "place": place} for place, name in enumerate(found)]
    best = next((one for one in answers if one["name"] in right), {"name": min(right), "place": None})
    shown = answers[:SHOWN] if best in answers[:SHOWN] else [*answers[:SHOWN], best]
    for one in shown:
        name = one.pop("name")
        path, text = (query, name) if direction == "image_to_text" else (name, query)
        one |= {"path": path, "text": text, "right": name in right}
    return shown


def galleries(rows: list[dict], lists: list[dict], album: Album, pictures: int) -> dict[str, list[dict]]:
    """The queries to show, by direction; together they show at most `pictures` pictures, which are added to the album.

    Args:    lists   as filled by eval.retrieval: the ten best of each query by contrast, then re-ranked by matching
    Returns: {direction: [{"right": whether the first answer is, "answers": [{"path", "text", "right", "place"}]}]}
    """
    (right, names), way = right_answers(rows, lists), lists[-1]["way"]
    chosen = {}
    for direction in DIRECTIONS:
        queries, (asked, answer) = [], names[direction]
        for one in lists:
            if (one["way"], one["direction"]) == (way, direction):
                query, found = asked(one["query"]), list(map(answer, one["found"]))
                answers = answers_to(query, found, right[direction][query], direction)
                queries.append({"right": answers[0]["right"], "answers": answers})
        chosen[direction] = []
        for query in choose(queries, max(pictures // 3, 1)):
            paths = [answer["path"] for answer in query["answers"]]
            if len({*album.numbers, *paths}) > pictures:
                break
            chosen[direction].append(query)
            for path in paths:
                album.number(path)
    return chosen


def score(model, tokenizer: Tokenizer, answers: list[dict], k: int, how: How, device) -> None:
    """Add to each answer "contrast", its cosine; "matching", its probability (None beyond the k best, because matching
    re-ranks only those); and "maps", see packed (None for a model without matching)."""
    pairs = [(answer["path"], answer["text"]) for answer in answers]
    shown = [{"image": path, "caption": text} for path, text in pairs]  # avoids encoding the whole gallery again
    images, texts, encoded = encode_rows(model, tokenizer, shown, device, captions_of)
    i, t = (torch.tensor(places) for places in zip(*((images[path], texts[text]) for path, text in pairs), strict=True))
    cosines = (encoded.image_embed[i] * encoded.text_embed[t]).sum(dim=1).tolist()
    matching = match_pairs(model, encoded, i, t, device).sigmoid().tolist() if k else [None] * len(pairs)
    maps = [None] * len(pairs)
    if model.config.w_itm > 0:
        maps = [packed(one, model.config.grid) for one in word_maps(model, tokenizer, pairs, how, device)]
    for answer, cosine, probability, heat in zip(answers, cosines, matching, maps, strict=True):
        ordered = answer["place"] is not None and answer["place"] < k
        answer |= {"contrast": number(cosine), "matching": number(probability) if ordered else None, "maps": heat}


def number(value: float | None) -> float | None:
    """A number rounded for JSON, or None if it is not finite."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- recovered


def why_nothing_recovered(model) -> str:
    """The reason why a model has no reconstructions to show, or "" if it has some."""
    if not hasattr(model, "mim_head"):
        return (
            "Nothing to show: this checkpoint has no head that predicts the features of hidden patches. Only MAMO's "
            "masked image modelling (--objective mamo with w_mim above 0) trains one, and fine-tuning drops it."
        )
    if model.config.mim_target != "features":
        return "Nothing to show: this checkpoint was trained to recover pixels (--mim-target pixels), not features."
    return ""


@torch.no_grad()
def recover(model, tokenizer: Tokenizer, paths: list[str], captions: list[str], shown: int, device) -> dict:
    """Compare the student's predictions at masked patches with the teacher's features of these patches.

    Args:    paths, captions   distinct pictures, each with a right caption; the first `shown` of them become mosaics
    Returns: {"ratio", "pictures", "cosines": [[of what, mean cosine with the teacher's feature of the same patch]],
             "items": [{"hidden": patches, "mosaic": the picture, its masked patches replaced by others'}]}
    """
    config, count = model.config, len(paths)
    noise = torch.rand(count, config.num_patches, generator=torch.Generator().manual_seed(0))
    index, patch_mask = model.mask_image(noise)
    pixels = torch.stack([to_pixels(path, config.image_size) for path in paths])  # uint8
    predicted, misled, target = [], [], []
    for start in range(0, count, 50):
        some = slice(start, start + 50)
        images = centred(pixels[some]).to(device)
        masked = model.encode_image(images, patch_mask[some].to(device))
        others = [captions[(place + count // 2) % count] for place in range(count)[some]]
        for texts, said in ((captions[some], predicted), (others, misled)):
            input_ids, attention_mask = read(tokenizer, texts, config.max_tokens, device)
            fused = model.fuse(masked, model.encode_text(input_ids, attention_mask), attention_mask).image
            said.append(model.mim_head(at(fused, 1 + index[some].to(device))).float().cpu())
        target.append(normalised(model.teacher.image(images)[:, 1:]).cpu())
    predicted, misled, target = map(torch.cat, (predicted, misled, target))
    mean_there = (target.sum(dim=0) - target) / (count - 1)  # (b, n, d), over all other pictures, per position
    candidates = {
        "the student's prediction, with the right caption": predicted,
        "the student's prediction, with another picture's caption": misled,
        "the mean feature of the other pictures at the same place": at(mean_there, index),
        "the mean feature of the other pictures (chance)": mean_there.mean(dim=1, keepdim=True),
    }
    own = at(target, index)
    cosines = [[name, number(F.cosine_similarity(one, own, dim=2).mean().item())] for name, one in candidates.items()]
    items = []
    for place in range(min(shown, count)):
        donor = nearest(predicted[place], target, place)
        mosaic = patchify(pixels[place : place + 1], config.patch_size)[0]
        mosaic[index[place]] = patchify(pixels[donor // config.num_patches], config.patch_size)[
            torch.arange(len(donor)), donor % config.num_patches
        ]
        items.append({"hidden": index[place].tolist(), "mosaic": embed(picture_of(mosaic, config))})
    return {"ratio": config.mask_image, "pictures": count, "cosines": cosines, "items": items}


def nearest(predicted: Tensor, target: Tensor, own: int) -> Tensor:
    """predicted (m, d), target (b, n, d) -> (m,): the patch nearest by cosine, numbered over all pictures, from any
    picture except `own`."""
    likeness = torch.einsum("md,bnd->mbn", F.normalize(predicted, dim=-1), F.normalize(target, dim=-1))
    likeness[:, own] = -math.inf
    return likeness.flatten(1).argmax(dim=1)


def picture_of(patches: Tensor, config) -> Image.Image:
    """patches (n, 3 * patch_size ** 2) of uint8, as patchify returns them -> the picture"""
    rows, p = config.grid[0], config.patch_size
    return Image.fromarray(rearrange(patches, "(y x) (c p q) -> (y p) (x q) c", y=rows, p=p, q=p).numpy())


# -------------------------------------------------------------------------------------------------- curves and results


def curves(log: Path, chance: dict[str, float]) -> list[dict]:
    """Losses and val scores in log.csv -> [{"name", "chance": level or None, "points": [[step, value], ...]}, ...]"""
    if not log.is_file():
        return []
    beside = ("step", "lr", "grad_norm", "temperature", "pairs_per_s", "peak_memory_mb")
    found = []
    try:
        with open(log, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
        for name in rows[0] if rows else ():
            points = [[int(row["step"]), float(row[name])] for row in rows if row[name]]
            points = [point for point in points if math.isfinite(point[1])]
            if name not in beside and points:
                found.append({"name": name, "chance": chance.get(name), "points": points})
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{log} is not the log of a run: move it away") from error
    return found


def val_paths(train: dict) -> list[Path]:
    """The validation files of a pre-training run, or none if they no longer exist."""
    paths = [Path(path) for path in train["val"]] or [Path(train["data"][0]).with_name("pairs_val.jsonl")]
    return [] if "task" in train or not all(path.is_file() for path in paths) else paths


def val_chance(tokenizer: Tokenizer, longest: int, train: dict) -> dict[str, float]:
    """The random baseline of retrieval on val, under the column names of the log."""
    if not (paths := val_paths(train)):
        return {}
    rows, _ = one_name(sample_of(read_rows(paths, "pairs"), 1000, "val"), tokenizer, longest)  # sampled as in train.py
    images = {name: place for place, name in enumerate(dict.fromkeys(row["image"] for row in rows))}
    texts = {text: place for place, text in enumerate(dict.fromkeys(text for row in rows for text in captions_of(row)))}
    right, _ = right_places(rows, images, texts, "")
    sides = (("val_i2t_r1", "image_to_text", texts), ("val_t2i_r1", "text_to_image", images))
    return {
        name: chance_recalls([len(one) for one in right[side]], len(gallery))["R@1"] for name, side, gallery in sides
    }


def recall_table(title: str, result: dict) -> dict:
    """The recalls returned by eval.retrieval as a table, with confidence intervals."""
    rows = []
    for direction in DIRECTIONS:
        for way in ("contrast", "matching", "chance"):
            if recalls := result[way].get(direction):
                low_high = result["intervals"].get(way, {}).get(direction, {})
                cells = [f"{value:.1f}" + interval(low_high.get(name)) for name, value in recalls.items()]
                label = "re-ranked" if way == "matching" else way
                rows.append([f"{direction.replace('_', ' ')}, {label}", *cells])
    about = f"{title}: {result['images']} pictures, {result['texts']} captions"
    return {"title": about, "head": ["recall in % (95 % interval)", "R@1", "R@5", "R@10"], "rows": rows}


def interval(low_high: list[float] | None) -> str:
    """The interval in parentheses, or an empty string."""
    return f" ({low_high[0]:.1f} to {low_high[1]:.1f})" if low_high else ""


def foil_table(title: str, result: dict) -> dict:
    """The accuracies returned by eval.foils as a table; chance is 50 %."""
    ways = [way for way in ("contrast", "matching") if result[way]]
    rows = [[kind, *(f"{result[way][kind]:.1f}" for way in ways), "50.0", str(n)] for kind, n in result["n"].items()]
    return {"title": f"{title}: the caption beats its foil", "head": ["in %", *ways, "chance", "n"], "rows": rows}


def grounding_table(title: str, result: dict) -> dict:
    """The results of metrics.judge_grounding as a table."""
    rows = [
        [name, f"{one['value']:.1f}{interval([one['low'], one['high']])}", f"{one['chance']:.1f}", str(one["n"])]
        for name, one in result.items()
        if isinstance(one, dict) and "value" in one
    ]
    title += f", by {result.get('map', 'Grad-CAM')}"
    return {"title": title, "head": ["in % (95 % interval)", "found", "chance", "n"], "rows": rows}


def tables(result: dict, data: str, kept: Path) -> list[dict]:
    """The recalls on this gallery, then the results for retrieval, foils and grounding in results.json."""
    found = [recall_table(f"this page, {data}", result)]
    try:
        for name, one in (json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}).items():
            if "images" in one and one["contrast"] == result["contrast"]:
                continue  # results on the same gallery, which the page already shows
            if "images" in one:
                found.append(recall_table(name, one))
            elif "contrast" in one:
                found.append(foil_table(name, one))
            elif "pointing" in one:
                found.append(grounding_table(name, one))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{kept} is not a file of results of eval.py: move it away") from error
    return found


# ------------------------------------------------------------------------------------------------------------ the page


def describe(model, tokenizer: Tokenizer, state: dict, options: argparse.Namespace, device) -> dict:
    """The full content of the page, as plain Python values.

    Raises:  ValueError for data with a single picture, or for a model without a contrastive loss
    """
    rows, config = read_rows(options.data, "pairs"), model.config
    captions = {row["image"]: row["caption"] for row in by_picture(rows, "pairs")}
    if len(captions) < 2 or options.pictures < 2:
        raise ValueError(
            f"{len(captions)} pictures in the data and --pictures {options.pictures}: a page needs 2 of both or more"
        )
    lists, how = [], How(passes=options.passes)
    result = retrieval(model, tokenizer, rows, device, lists=lists)
    album, frames = Album(captions, config.frames), config.frames if is_video(rows[0]["image"]) else 1
    grid = config.grid[0], frames * config.grid[1]  # for a strip of frames
    chosen = galleries(rows, lists, album, options.pictures)
    answers = [answer for queries in chosen.values() for query in queries for answer in query["answers"]]
    score(model, tokenizer, answers, result["k"], how, device)
    first = list(dict.fromkeys(answer["path"] for query in chosen["image_to_text"] for answer in query["answers"]))
    for answer in answers:
        answer["picture"] = album.number(answer.pop("path"))  # the page refers to pictures by index
    mapped = config.w_itm > 0 and config.w_mlm > 0  # without an MLM head, only whole texts have maps
    words = {
        text: words_of(tokenizer, text, config.max_tokens) for text in sorted({answer["text"] for answer in answers})
    }
    folder, data = options.checkpoint.parent, " ".join(options.data)
    levels = model.chance(state["train"]["batch_size"]) | val_chance(tokenizer, config.max_tokens, state["train"])
    return {
        "about": about(model, state, result, data, options.checkpoint),
        "map": {"grid": grid, "how": str(how) if config.w_itm > 0 else None, "words": mapped},
        "k": result["k"],
        "pictures": album.pictures,
        "words": {text: [[word, mapped and bool(places)] for word, places in found] for text, found in words.items()},
        "galleries": chosen,
        "recovered": recovered(model, tokenizer, captions, first[:MOSAICS], album, device),
        "curves": curves(folder / "log.csv", levels),
        "tables": tables(result, data, folder / "results.json"),
    }


def recovered(model, tokenizer: Tokenizer, captions: dict, first: list[str], album: Album, device) -> dict:
    """The result of `recover` for some of the gallery's pictures, or {"why": reason} if there is nothing to show."""
    if why := why_nothing_recovered(model) or "Nothing to show: only pictures are put together." * is_video(first[0]):
        return {"why": why}
    room, others = max(PATCHES // model.config.num_patches, 2), [path for path in captions if path not in first]
    paths = [*first, *spaced(others, max(room - len(first), 0))][:room]
    found = recover(model, tokenizer, paths, [captions[path][0] for path in paths], len(first), device)
    for item, path in zip(found["items"], first, strict=False):
        item |= {"picture": album.number(path), "text": captions[path][0]}
    return found


def about(model, state: dict, result: dict, data: str, checkpoint: Path) -> dict[str, str]:
    """A description of the checkpoint in words."""
    config, (rows, columns) = model.config, model.config.grid
    (height, width), task = config.image_size, state.get("head", {}).get("task")
    seen = ", which it was trained on, so it tests memory" if data.split() == state["train"]["data"] else ""
    millions = sum(part.numel() for name, part in model.named_parameters() if not name.startswith("teacher.")) / 1e6
    return {
        "objective": f"{task}, fine-tuned" if task else state["objective"],
        "checkpoint": str(checkpoint),
        "training": f"{state['step']:,} steps on {' '.join(state['train']['data'])}",
        "model": f"{millions:.2f} M parameters, width {config.width}; blocks: {config.image_depth} image, "
        f"{config.text_depth} text, {config.fusion_depth} fusion",
        "picture": f"{width} x {height} pixels, {columns} x {rows} patches of {config.patch_size} pixels",
        "gallery": f"{result['images']:,} pictures and {result['texts']:,} captions of {data}{seen}",
        "date": datetime.date.today().isoformat(),
    }


def page_of(report: dict) -> str:
    """The page template, filled with the content of the report."""
    return filled(TEMPLATE, report)


def filled(template: Path, content: dict) -> str:
    """A template combined with the style and script shared by all pages, and with the content as JSON. Every < in the
    JSON is escaped, so that the content cannot end the script element."""
    page = template.read_text(encoding="utf-8")
    for mark, name in (("PAGES_STYLE", "pages.css"), ("PAGES_SCRIPT", "pages.js")):
        page = page.replace(mark, template.with_name(name).read_text(encoding="utf-8"))
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("REPORT_AS_JSON", text)


def parse() -> argparse.Namespace:
    """Parse the command line, and set the fields that load_for expects but only the commands of eval.py define."""
    parser = runtime.Parser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt or best.pt of a run")
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files of pairs that form the gallery")
    parser.add_argument("--pictures", type=int, default=50, help="maximum number of pictures on the page")
    parser.add_argument("--passes", type=int, default=How.passes, help="masked images per map, see explain.py")
    parser.add_argument("--out", type=Path, help="HTML file to write (default: report.html beside the checkpoint)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.set_defaults(command="retrieval", **UNASKED)
    return parser.parse_args()


def main() -> None:
    """Load a checkpoint, evaluate it and write the page."""
    options = parse()
    device = runtime.pick_device(options.device)
    model, tokenizer = load_for(options, device)
    state = runtime.load_checkpoint(options.checkpoint)  # for its training options
    runtime.check_run(state, options.checkpoint)
    out = options.out or options.checkpoint.parent / "report.html"
    runtime.check_outputs([out], [*options.data, options.checkpoint])
    page = page_of(describe(model, tokenizer, state, options, device))
    runtime.write_beside(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(f"report written, {out.stat().st_size / 1e6:.2f} MB: open {out} in a browser")


if __name__ == "__main__":
    runtime.guarded(main)
