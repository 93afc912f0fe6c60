"""One training step, line by line, on one page: the source that ran on the left, the computed values on the right.

    python -m tools.trace --checkpoint weights/demo.pt --out trace.html
    python -m tools.trace --steps 0 150 500 --variants all --out trace.html         a short run, and variants of it
    python -m tools.trace --steps 0 300 --train="--objective glscl" --out glscl.html        with options of train.py

The page shows the forward pass of the model's objective and every function of mamo.py and siblings/ that the forward
pass calls, in the order of first calls. Each line is annotated with the values that it assigned. Some functions are
also illustrated: masked patches and words, the batch's cosines with the sampled negatives, the vectors that a loss
compares at a patch, reconstructions, losses compared with their chance levels, and gradient norms. A slider selects the
training step, a switch the variant. The page cannot go stale, because it embeds the source that ran.

How to read it: `Recorder` observes a call through Python's tracing hook, so the model's code is unchanged; `snapshot`
uses it to record a step; `pictured` creates the illustrations.
"""

import argparse
import ast
import atexit
import copy
import inspect
import shlex
import shutil
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mamo
import runtime
import siblings
import train
from data import captions_of, is_video, make_batch, read_rows
from eval import load_model
from mamo import MAMO, Config, MaskedWords, at, normalised, patchify
from tokenizer import Tokenizer
from tools.report import embed, filled, nearest, number, picture_of, text_of
from world import scenes

TEMPLATE = Path(__file__).with_name("trace.html")
ROOT = Path(mamo.__file__).parent
FOLLOWED = (mamo.__file__, *map(str, Path(siblings.__file__).parent.glob("*.py")))
# Functions that are not informative for a reader of the page.
LEFT_OUT = (
    "require",
    "gather",
    "rank_and_size",
    "frames_of",
    "VisionLanguageModel.check_batch",
    "at",
    "with_class_tokens",
)
LEFT_OUT += ("VisionLanguageModel.temperature", "VisionLanguageModel.total", "MAMO.contrasts_parts", "global_mean")
OBJECTIVE_NAMES = {cls.__name__ for cls, _ in siblings.OBJECTIVES.values()}
SAMPLES = 4  # number of pairs of the batch to show
CELLS = 32, 64  # maximum number of rows and columns of a tensor to draw
VARIANTS = {
    "as it is": "",
    "MRM alone": "--w-itc 0 --w-itm 0 --w-mlm 0 --w-mim 0",
    "without MIM and MLM": "--w-mim 0 --w-mlm 0",
    "momentum 0": "--ema 0",
    "momentum 1": "--ema 1",
    "no stop-gradient": "",
}

# ----------------------------------------------------------------------------------------------------------- recording


class Recorder:
    """Records the values that each line of the followed functions assigns in the function's first call."""

    def __init__(self):
        self.functions: dict[types.CodeType, dict] = {}  # in order of first calls
        self.locals: dict[str, dict] = {}  # by qualified name, the local variables of a function when it returned

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.called)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def called(self, frame: types.FrameType, event: str, _) -> Callable | None:
        """Called by Python when a function begins; returns the callback that traces its lines."""
        code = frame.f_code
        if event != "call" or code.co_filename not in FOLLOWED or not follows(code):
            return None
        if code in self.functions:
            self.functions[code]["calls"] += 1
            return None
        lines = {}
        self.functions[code] = {"calls": 1, "lines": lines}
        seen, statement = names_of(frame), statements_of(code)
        lines[code.co_firstlineno] = [
            [name, described(value)] for name, value in frame.f_locals.items() if name != "self"
        ]
        last = None

        def line(frame, event, value):
            nonlocal seen, last
            now = names_of(frame)
            if last is not None and event in ("line", "return"):
                new = [[name, described(one)] for name, (key, one) in now.items() if seen.get(name, (None,))[0] != key]
                place = statement.get(last, last)
                lines[place] = merged(lines.get(place, []), new)
            seen, last = now, frame.f_lineno
            if event == "return":
                self.locals[code.co_qualname] = dict(frame.f_locals)
                if value is not None:
                    place = statement.get(frame.f_lineno, frame.f_lineno)
                    lines[place] = merged(lines.get(place, []), [["returns", described(value)]])
            return line

        return line


def follows(code: types.CodeType) -> bool:
    """Whether the page shows a function: no comprehensions, no functions that only validate or look up."""
    owner = code.co_qualname.rpartition(".")[0]
    configures = owner.endswith("Config") or owner in ("MaskedWords", "View", "Fused")
    return not code.co_name.startswith(("<", "__")) and code.co_qualname not in LEFT_OUT and not configures


def names_of(frame: types.FrameType) -> dict[str, tuple]:
    """The local variables of a function, and dicts by key: name -> (identity, which changes on assignment; value)"""
    found = {}
    for name, value in frame.f_locals.items():
        if name == "self":
            continue
        if isinstance(value, dict):
            found |= {f'{name}["{key}"]': (id(part), part) for key, part in value.items()}
        else:
            found[name] = id(value), value
    return found


def merged(old: list, new: list) -> list:
    """The values of a line that runs more than once, of which the last ones are kept."""
    return [*(one for one in old if one[0] not in {name for name, _ in new}), *new]


def statements_of(code: types.CodeType) -> dict[int, int]:
    """Line -> last line of its statement, at which the values are shown"""
    lines, first = inspect.getsourcelines(code)
    tree, shift, last = ast.parse(textwrap.dedent("".join(lines))), first - 1, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            last |= dict.fromkeys(range(node.lineno + shift, node.end_lineno + 1 + shift), node.end_lineno + shift)
    return last


def described(value, inside: bool = False) -> dict:
    """A value for the page: a number, a tensor with its shape, statistics and first row, or a few words. Tensors inside
    other values are not drawn again, because they were drawn where they were computed."""
    if isinstance(value, Tensor):
        found = tensor(value.detach())
        return {name: part for name, part in found.items() if not (inside and name in ("map", "size", "most"))}
    if isinstance(value, bool | int | str | type(None)):
        return {"text": repr(value)[:80]}
    if isinstance(value, float):
        return {"value": number(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # View, Fused, MaskedWords
        return {"parts": [[name, described(part, True)] for name, part in zip(value._fields, value, strict=True)]}
    if isinstance(value, tuple | list) and value and all(isinstance(one, Tensor) for one in value):
        return {"parts": [[str(place), described(one, True)] for place, one in enumerate(value[:8])]}
    if isinstance(value, dict):
        return {"parts": [[str(name), described(part, True)] for name, part in value.items()]}
    return {"text": type(value).__name__}


def tensor(value: Tensor) -> dict:
    """Shape and statistics of a tensor, and its first row, see packed."""
    found = {"shape": list(value.shape), "kind": str(value.dtype).removeprefix("torch.")}
    if value.numel() == 1:
        return found | {"value": number(value.float().item())}
    numbers = value.float()
    finite = numbers[numbers.isfinite()]
    if value.dtype == torch.bool:
        found["share"] = number(numbers.mean().item())
    elif finite.numel() and value.dtype.is_floating_point:
        found |= {"mean": number(finite.mean().item()), "std": number(finite.std(correction=0).item())}
    first = numbers if numbers.ndim < 3 else numbers[0]
    first = first[None] if first.ndim == 1 else first.flatten(1) if first.ndim > 2 else first
    first = first[: CELLS[0], : CELLS[1]]
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        largest = first[first.isfinite()].abs().amax().item() if first.isfinite().any() else 0.0
        found |= {"size": list(first.shape), "map": packed(first, largest), "most": number(largest)}
    else:
        found["numbers"] = first[:1].long().flatten()[:16].tolist()
    return found


def packed(values: Tensor, most: float) -> str:
    """Values as bytes, encoded as text: 127 is zero, 0 and 254 are the largest magnitude."""
    levels = (127 + 127 * values.nan_to_num(0, 0, 0) / max(most, 1e-12)).round().clamp(0, 254)
    return text_of(levels.byte().contiguous().numpy().tobytes())


def as_bytes(pixels: Tensor) -> Tensor:
    """Values in [-1, 1] -> bytes"""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte()


# ------------------------------------------------------------------------------------------------- beside some lines


def pictured(model, recorder: Recorder, batch: dict, tokenizer: Tokenizer, losses: dict, chance: dict) -> dict:
    """The illustrations below some functions, by qualified function name: lists of {"kind", ...}."""
    found, held = {}, recorder.locals
    forward = f"{type(model).__name__}.forward"
    mine = held[forward]
    hidden = mine.get("patch_index", mine.get("dropped"))
    if hidden is not None:
        found.setdefault(forward, []).append({"kind": "hidden", "patches": hidden[:SAMPLES].tolist()})
    words = mine.get("words")
    if isinstance(words, MaskedWords):
        found.setdefault(forward, []).append({"kind": "words", "rows": words_of_masked(batch, words, tokenizer)})
    levels = [[name, number(loss.item()), number(chance.get(name, float("nan")))] for name, loss in losses.items()]
    found.setdefault(forward, []).append({"kind": "losses", "rows": levels})

    drawn = held.get("VisionLanguageModel.matching_views")
    if drawn:
        similarity = drawn["similarity"][: CELLS[0] * 2, : CELLS[0] * 2]
        found["VisionLanguageModel.matching_views"] = [
            {"kind": "cosines", "of": tensor(similarity[None]), "texts": drawn["texts"].tolist()[: len(similarity)],
             "images": drawn["images"].tolist()[: len(similarity)]}
        ]  # fmt: skip
    if isinstance(words, MaskedWords) and "VisionLanguageModel.loss_mlm" in held:
        likely = held["VisionLanguageModel.loss_mlm"]["logits"].softmax(dim=2)
        found["VisionLanguageModel.loss_mlm"] = [{"kind": "guesses", "rows": guesses(likely, words, tokenizer)}]
    for name, compared in comparisons(model, held):
        places = {"patches": hidden[:SAMPLES].tolist()}
        if compared.pop("at words"):
            chosen = zip(words.labels[:SAMPLES].tolist(), words.valid[:SAMPLES].tolist(), strict=True)
            places = {"words": [[tokenizer.vocab[i] if real else "" for i, real in zip(*row, strict=True)]
                                for row in chosen]}  # fmt: skip
        found.setdefault(name, []).append({"kind": "compared", **places, **compared})
    if mosaics := recovered(model, held, batch, hidden):
        name = next(name for name in held if name.rpartition(".")[2] in ("loss_mim", "loss_rmim"))
        found.setdefault(name, []).append({"kind": "recovered", "pictures": mosaics})
    return found


def words_of_masked(batch: dict, words: MaskedWords, tokenizer: Tokenizer) -> list:
    """For each shown text, its tokens as [input token, original token, whether it is to be predicted]."""
    rows = []
    for row in range(SAMPLES):
        chosen = set(words.index[row][words.valid[row]].tolist())
        real = batch["attention_mask"][row].sum().item()
        pairs = zip(words.input_ids[row].tolist()[:real], batch["input_ids"][row].tolist()[:real], strict=True)
        rows.append([[tokenizer.vocab[a], tokenizer.vocab[b], place in chosen] for place, (a, b) in enumerate(pairs)])
    return rows


def guesses(likely: Tensor, words: MaskedWords, tokenizer: Tokenizer) -> list:
    """likely (b, m, v) -> for each masked word in the shown texts, the three most likely [word, probability]"""
    rows = []
    for row in range(SAMPLES):
        for slot in words.valid[row].nonzero().flatten().tolist():
            best = likely[row, slot].topk(3)
            said = [
                [tokenizer.vocab[i], number(p)]
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            label = words.labels[row, slot].item()
            rows.append([row, tokenizer.vocab[label], number(likely[row, slot, label].item()), said])
    return rows


@torch.no_grad()
def comparisons(model, held: dict) -> Iterator[tuple[str, dict]]:
    """(loss, the vectors that it compares at masked positions of the shown pairs: prediction and target, (s, m, d))"""

    def put(name: str, ours: Tensor, target: Tensor, what: str, *sources: str, at_words: bool = False) -> tuple:
        pair = ours[:SAMPLES].float(), target[:SAMPLES].float()
        most = max(one.abs().amax().item() for one in pair)
        kind, distance = DISTANCES[name]
        found = {
            "ours": packed(pair[0], most),
            "target": packed(pair[1], most),
            "most": number(most),
            "first": [[[[number(v) for v in some[:6]] for some in row] for row in one.tolist()] for one in pair],
            "d": ours.shape[2],
            "kind of distance": kind,
            "distance": [[number(v) for v in row] for row in distance(*pair, reduction="none").mean(dim=2).tolist()],
            "what": what,
            "sources": sources,
            "at words": at_words,
        }
        return name, found

    features = model.config.mim_target == "features" if isinstance(model, MAMO) else False
    for name, mine in held.items():
        if name == "MAMO.loss_mrm":
            what = (
                "At each hidden {}: g of the student's fused vector of {}, and the teacher's fused vector of (I, T). "
                f'In seen["fused"], the first {mine["patch_target"].shape[1]} rows are patches, the rest are words.'
            )
            patches = model.mrm_image_head(mine["at_patches"]), mine["patch_target"], what.format("patch", "(I', T)")
            words = model.mrm_text_head(mine["at_words"]), mine["word_target"], what.format("word", "(I, T')")
            yield put(name, *patches, "MAMO.teach", "normalised")
            yield put(name, *words, "MAMO.teach", "normalised", at_words=True)
        elif name == "MAMO.loss_mim":
            there = "the teacher's image feature of that patch in I" if features else "its pixels"
            what = f"At each hidden patch: h of the student's fused vector of (I', T), and {there}."
            sources = ("MAMO.teach", "normalised") if features else ("patchify",)
            yield put(name, model.mim_head(mine["at_patches"]), mine["target"], what, *sources)
        elif "predicted" in mine and ".loss_" in name:
            target = mine.get("target", mine.get("pixels"))
            target = target if name == "MaskVLM.loss_mim" else normalised(target)
            source = "ImageEncoder.forward" if name == "VLMAE.loss_ifr" else "patchify"
            yield put(name, mine["predicted"], target, "At each hidden patch: the prediction, and the target.", source)


DISTANCES = {  # by loss: the distance that is averaged
    "MAMO.loss_mrm": ("squared", F.mse_loss),
    "MAMO.loss_mim": ("absolute", F.l1_loss),
    "MaskVLM.loss_mim": ("absolute", F.l1_loss),
    "VLMAE.loss_rmim": ("squared", F.mse_loss),
    "VLMAE.loss_ifr": ("smooth absolute", F.smooth_l1_loss),
}


@torch.no_grad()
def recovered(model, held: dict, batch: dict, hidden: Tensor | None) -> list[dict]:
    """The shown pictures with reconstructed patches: predicted pixels or, for predicted features, the nearest patch of
    another picture in the batch, see tools/report.py."""
    config, images = model.config, batch["images"]
    names = {name.rpartition(".")[2]: name for name in held}
    loss = names.get("loss_mim", names.get("loss_rmim"))
    if hidden is None or loss is None or images.ndim == 5:
        return []
    patches = patchify(images, config.patch_size)
    filled_in = patches[:SAMPLES].clone()
    if loss == "MAMO.loss_mim" and config.mim_target == "features":
        target = normalised(held["MAMO.teach"]["seen"]["image"][:, 1:])
        said = model.mim_head(held[loss]["at_patches"]).float()
        for row in range(SAMPLES):
            donor = nearest(said[row], target, row)
            filled_in[row, hidden[row]] = patches.flatten(0, 1)[donor]
    else:
        said = model.mim_head(held[loss]["at_patches"]) if loss == "MAMO.loss_mim" else held[loss]["predicted"]
        if loss == "VLMAE.loss_rmim":
            own = at(patches, hidden)
            said = said * (own.var(dim=2, correction=0, keepdim=True) + 1e-5).sqrt() + own.mean(dim=2, keepdim=True)
        filled_in.scatter_(1, hidden[:SAMPLES, :, None].expand(-1, -1, patches.shape[2]), said[:SAMPLES].float())
    return [embed(picture_of(one, config)) for one in as_bytes(filled_in)]


# ----------------------------------------------------------------------------------------------------------- snapshots


def snapshot(model, batch: dict, tokenizer: Tokenizer) -> tuple[dict, dict]:
    """Record one step of a copy of the model -> content for the page, and the functions {qualified name: code}"""
    model.watch = {}  # drop the values of the last step, which keep its graph alive
    model = copy.deepcopy(model).train()
    chance = model.chance(len(batch["images"]))
    with Recorder() as recorder:
        losses = model(batch)
    total = model.total(losses)
    total.backward()
    beside = pictured(model, recorder, batch, tokenizer, losses, chance)
    with recorder:
        model.after_step()
    values = {code.co_qualname: one["lines"] for code, one in recorder.functions.items()}
    calls = {code.co_qualname: one["calls"] for code, one in recorder.functions.items()}
    watch = {name: number(value.item()) for name, value in model.watch.items()}
    shown = {"values": values, "calls": calls, "beside": beside, "total": number(total.item()), "watch": watch}
    return shown | {"gradients": gradients(model)}, {code.co_qualname: code for code in recorder.functions}


def gradients(model) -> list:
    """[part, gradient norm, number of parameters], per block for the encoders"""
    groups: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("teacher."):
            parts = name.split(".")
            depth = 4 if "blocks" in parts[:3] else 3 if parts[0] == "student" else 1
            groups.setdefault(".".join(parts[:depth]), []).append(parameter)
    rows = []
    for name, group in groups.items():
        squares = sum(parameter.grad.square().sum().item() for parameter in group if parameter.grad is not None)
        rows.append([name, number(squares**0.5), sum(parameter.numel() for parameter in group)])
    return rows


def source_of(code: types.CodeType) -> dict:
    """The source of a function, as in its file."""
    lines, first = inspect.getsourcelines(code)
    return {"file": Path(code.co_filename).relative_to(ROOT).as_posix(), "first": first,
            "lines": [line.rstrip("\n") for line in lines]}  # fmt: skip


def order_of(functions: dict[str, dict], forward: str) -> list[str]:
    """The functions in page order: the forward pass, the losses, then all others in the order of first calls."""
    losses = [name for name in functions if name.rpartition(".")[2].startswith(("loss_", "contrast", "teach"))]
    return [forward, *losses, *(name for name in functions if name != forward and name not in losses)]


def variant(name: str, options: argparse.Namespace, out: str) -> "train.Run":
    """A run that has not started yet. Raises ValueError for options that train.py rejects."""
    given = shlex.split(f"{options.train} {VARIANTS[name]}")
    steps = max(max(options.steps), 1)
    run = train.start(*train.parse(["--data", *options.data, *given, "--steps", str(steps), "--out", out]))
    if name == "no stop-gradient":
        run.model.teacher = run.model.student  # without torch.no_grad, gradients flow into the targets
        run.model.teach = types.MethodType(MAMO.teach.__wrapped__, run.model)
    return run


def watched_runs(options: argparse.Namespace, texts: tuple[list, list]) -> tuple[list[dict], dict, Tokenizer, Config]:
    """Execute short runs, one per variant -> snapshots with "step" and "variant", the functions, tokenizer, config"""
    shots, functions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(options.variants):
            run = variant(name, options, f"{folder}/{place}")
            batch, batches = make_batch(*texts, run.model.config, run.tokenizer), run.batches()
            for step in sorted(set(options.steps)):
                while run.step < step:
                    run.one_step(batches)
                shot, seen = snapshot(run.model, batch, run.tokenizer)
                functions = seen | functions
                shots.append({"variant": name, "step": step} | shot)
                print(f"{name}, step {step}: total {shot['total']}")
    return shots, functions, run.tokenizer, run.model.config


def page_of(shots: list[dict], functions: dict, batch: dict, texts: list[str], config: Config, about: str) -> str:
    """The page as HTML."""
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in as_bytes(batch["images"][:SAMPLES])]
    sources = {name: source_of(code) for name, code in functions.items()}
    forward = next(name for name in functions if name.endswith(".forward") and name.split(".")[0] in OBJECTIVE_NAMES)
    return filled(
        TEMPLATE,
        {
            "about": about,
            "order": order_of(sources, forward),
            "sources": sources,
            "shots": shots,
            "grid": config.grid,
            "pictures": [embed(picture) | {"alt": text} for picture, text in zip(pictures, texts, strict=False)],
        },
    )


def own_world() -> list[str]:
    """A few pictures of the built-in world, rendered into a folder that is deleted when the program ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    arguments = ["--out", folder, "--train", "640", "--val", "20", "--test", "20"]
    scenes.main(arguments)
    return [f"{folder}/pairs_train.jsonl"]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = runtime.Parser(
        prog="python -m tools.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="checkpoint.pt of a run, or weights/demo.pt; default: trace short runs"
    )
    parser.add_argument("--data", nargs="+", help="JSONL files of pairs; default: a few pictures of the built-in world")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 150, 500], help="steps of the short runs to show")
    of = f"variants of short runs of MAMO: all, or some of {', '.join(VARIANTS)}"
    parser.add_argument("--variants", nargs="+", default=["as it is"], metavar="NAME", help=of)
    parser.add_argument("--train", default="", help="additional options of train.py for short runs, as one string")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of the batch that is traced (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("trace.html"), help="HTML file to write")
    options = parser.parse_args()
    options.variants = list(VARIANTS) if options.variants == ["all"] else options.variants
    for name in options.variants:
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}: use all, or some of {', '.join(VARIANTS)}")
    if min(options.steps) < 0 or options.batch_size < SAMPLES:
        raise ValueError(
            f"steps {options.steps}, batch_size {options.batch_size}: give 0 or more, and {SAMPLES} or more"
        )
    return options


def main() -> None:
    """Trace a checkpoint, or short runs, and write the page."""
    options = parse()
    runtime.check_outputs([options.out], [options.checkpoint, *(options.data or [])])
    options.data = options.data or own_world()
    rows = read_rows(options.data, "pairs")[: options.batch_size]
    if len(rows) < SAMPLES or is_video(rows[0]["image"]):
        raise ValueError(f"{' '.join(options.data)}: give at least {SAMPLES} rows with pictures")
    texts = [row["image"] for row in rows], [captions_of(row)[0] for row in rows]
    if options.checkpoint:
        model, tokenizer, state = load_model(options.checkpoint, torch.device("cpu"))
        if "head" in state:
            raise ValueError(f"{options.checkpoint} is from fine-tuning: give a checkpoint of train.py")
        batch = make_batch(*texts, model.config, tokenizer)
        shot, functions = snapshot(model, batch, tokenizer)
        shots, config = [{"variant": "as it is", "step": state.get("step", 0)} | shot], model.config
        about = f"{state['objective']}, {options.checkpoint}, step {state.get('step', 0):,}"
    else:
        shots, functions, tokenizer, config = watched_runs(options, texts)
        batch = make_batch(*texts, config, tokenizer)
        about = f"short runs, {options.train or 'the preset nano'}; the traced batch has {len(rows)} pairs"
    page = page_of(shots, functions, batch, texts[1], config, about)
    runtime.write_beside(options.out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(f"{options.out}, {options.out.stat().st_size / 1e6:.2f} MB: open it in a browser")


if __name__ == "__main__":
    runtime.guarded(main)
