"""Published encoders: convert the weights in a file, then initialise a model from them with train.py --init.

    python -m tools.weights deit_small_patch16_224.pth --out image.pt
    python -m tools.weights MiniLM/model.safetensors --out text.pt        with tokenizer.json and config.json beside it
    python train.py --preset small --init image.pt text.pt --data my/pairs_train.jsonl --out runs/mine

Supported are ViTs with timm's parameter names (timm, DeiT, MAE, DINO), CLIP's image encoder (OpenAI's file, or Hugging
Face's names) and BERTs with Hugging Face's names (BERT, MiniLM), as .pth, .pt, .bin or .safetensors. Nothing is
downloaded, and reading a file never executes code in it. The output holds plain tensors under the names of mamo.py:

    image   patch embedding, class token, positions, blocks, norms; CLIP's projection becomes ITC's if the widths match
    text    word embeddings, positions, norm, layers, the MLM head if there is one, and the vocabulary

`take` loads them into a model: the lower layers of a BERT into the text encoder, the next ones into the fusion encoder.
Our pixels are in [-1, 1], so a ViT's normalisation mean and deviation are folded into its patch embedding.

differs: positions are interpolated as in ALBEF if the picture size differs; DINO's own code shifts the grid by a tenth
of a patch. BERT's second token type is dropped, because our texts have only one.
"""

import argparse
import json
import re
import struct
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

import runtime
from mamo import ImageEncoder, VisionLanguageModel, move_teacher
from tasks import resized
from tokenizer import Tokenizer

PIXELS = {  # mean and standard deviation with which an encoder expects values in [0, 1] to be normalised
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # timm's "augreg" weights
}

# Published name, as a pattern -> our name; {0} is the block index. None: not part of the encoder, ignored.
IMAGE_NAMES = {
    r"patch_embed\.proj|conv1|embeddings\.patch_embedding": "patch_embedding",
    r"cls_token|class_embedding|embeddings\.class_embedding": "class_token",
    r"pos_embed|positional_embedding|embeddings\.position_embedding": "positions",
    r"ln_pre|pre_layrnorm": "norm_before",
    r"norm|ln_post|post_layernorm": "norm",
    r"proj|visual_projection": "projection",
    r"(?:blocks|transformer\.resblocks|encoder\.layers)\.(\d+)\.(?:norm1|ln_1|layer_norm1)": "blocks.{0}.norm1",
    r"(?:blocks|transformer\.resblocks|encoder\.layers)\.(\d+)\.(?:norm2|ln_2|layer_norm2)": "blocks.{0}.norm2",
    r"(?:blocks\.(\d+)\.attn\.qkv|transformer\.resblocks\.(\d+)\.attn\.in_proj)": "blocks.{0}.attention.qkv",
    r"encoder\.layers\.(\d+)\.self_attn\.q_proj": "blocks.{0}.attention.query",
    r"encoder\.layers\.(\d+)\.self_attn\.k_proj": "blocks.{0}.attention.key",
    r"encoder\.layers\.(\d+)\.self_attn\.v_proj": "blocks.{0}.attention.value",
    r"blocks\.(\d+)\.attn\.proj|transformer\.resblocks\.(\d+)\.attn\.out_proj": "blocks.{0}.attention.out",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj": "blocks.{0}.attention.out",
    r"(?:blocks|transformer\.resblocks|encoder\.layers)\.(\d+)\.mlp\.(?:fc1|c_fc)": "blocks.{0}.mlp.0",
    r"(?:blocks|transformer\.resblocks|encoder\.layers)\.(\d+)\.mlp\.(?:fc2|c_proj)": "blocks.{0}.mlp.2",
    r"head(\..*)?|decoder_.*|mask_token|pre_logits.*|embeddings\.position_ids": None,
}
TEXT_NAMES = {
    r"embeddings\.word_embeddings": "words",
    r"embeddings\.position_embeddings": "positions",
    r"embeddings\.token_type_embeddings": "types",
    r"embeddings\.LayerNorm": "norm",
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)": "blocks.{0}.attention.{1}",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense": "blocks.{0}.attention.out",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": "blocks.{0}.norm1",
    r"encoder\.layer\.(\d+)\.intermediate\.dense": "blocks.{0}.mlp.0",
    r"encoder\.layer\.(\d+)\.output\.dense": "blocks.{0}.mlp.2",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm": "blocks.{0}.norm2",
    r"cls\.predictions\.transform\.dense": "mlm_head.0",
    r"cls\.predictions\.transform\.LayerNorm": "mlm_head.2",
    r"cls\.predictions": "mlm",  # the bias of the MLM head
    r"embeddings\.position_ids|pooler\..*|cls\.seq_relationship|cls\.predictions\.decoder": None,
}

# ------------------------------------------------------------------------------------------------------------ reading


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a published file by name, as fp32.

    Raises:  ValueError, in one sentence, for a file that is damaged, contains more than tensors, or has another format
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the weights of a published encoder, on this disk")
    try:
        if path.suffix == ".safetensors":
            state = read_safetensors(path)
        elif is_script(path):  # OpenAI's CLIP; TorchScript contains no pickled code, and its own code is not run
            with warnings.catch_warnings(action="ignore"):  # loading TorchScript is deprecated
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged, or holds more than plain tensors ({reason}): download it again"
        ) from error
    for _ in range(3):
        if not isinstance(state, dict) or any(isinstance(value, Tensor) for value in state.values()):
            break
        state = next((state[name] for name in ("model", "state_dict", "teacher") if name in state), state)
        # DeiT and MAE store the weights under "model", a full checkpoint of DINO under "teacher"
    tensors = (
        {name: value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name: give the weights of a published encoder")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file: the length of the header, the header as JSON, and the bytes of all tensors."""
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
    }
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if last > len(body):
            raise ValueError(f"the file ends before {name}")
        tensors[name] = torch.frombuffer(body[first:last], dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_vocabulary(path: Path) -> list[str]:
    """The words of vocab.txt, or of Hugging Face's tokenizer.json, by id. Raises ValueError for any other file."""
    if path.suffix == ".json":
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
            words = sorted(ids, key=ids.get)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the tokenizer.json of a BERT: it has no model.vocab") from error
        if [ids[word] for word in words] != list(range(len(words))):
            raise ValueError(f"{path} does not number its words 0, 1, 2, ...: give vocab.txt")
    else:
        words = Tokenizer.from_file(path).vocab
    cased = next((word for word in words if word.lower() != word and not re.fullmatch(r"\[.*\]", word)), None)
    if cased:
        raise ValueError(f"{path} knows capital letters ({cased!r}): take an uncased BERT, texts are read without them")
    return list(words)


# --------------------------------------------------------------------------------------------------------- converting


def renamed(tensors: dict[str, Tensor], names: dict[str, str | None], path: Path) -> dict[str, Tensor]:
    """The tensors under our names, with query, key and value split as in Attention.

    Raises:  ValueError for an unknown tensor, because it would change what the encoder computes
    """
    found = {}
    for name, value in tensors.items():
        stem, kind = re.fullmatch(r"(.*?)[._]?((?:weight|bias|gamma|beta)?)", name).groups()
        for pattern, ours in names.items():
            match = re.fullmatch(pattern, stem) or (ours is None and re.fullmatch(pattern, name))
            if match:
                break
        else:
            raise ValueError(f"{path} holds {name}, which no encoder here has: another kind of network cannot be taken")
        if ours is not None:
            kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
            number = [group for group in match.groups() if group is not None]
            found[".".join(part for part in (ours.format(*number), kind) if part)] = value
    for name in [name for name in found if ".attention.qkv." in name]:
        query, *rest = found.pop(name).chunk(3)
        found[name.replace("qkv", "query")], found[name.replace("qkv", "key_value")] = query, torch.cat(rest)
    for name in [name for name in found if ".attention.key." in name]:
        both = found.pop(name), found.pop(name.replace(".key.", ".value."))
        found[name.replace(".key.", ".key_value.")] = torch.cat(both)
    numbers = {name.split(".")[1] for name in found if name.startswith("blocks.")}
    parts = ("norm1", "norm2", "attention.query", "attention.key_value", "attention.out", "mlp.0", "mlp.2")
    expected = [f"blocks.{n}.{part}.{kind}" for n in sorted(numbers) for part in parts for kind in ("weight", "bias")]
    lacking = [name for name in expected if name not in found]
    if lacking:
        raise ValueError(f"{path} lacks {lacking[0]} and {len(lacking) - 1} more: it is not a whole encoder")
    return found


def image_tower(tensors: dict[str, Tensor], path: Path, heads: int, pixels: str) -> dict:
    """The tensors of a ViT -> the dictionary that `convert` saves for an image encoder"""
    if any("dist_token" in name for name in tensors):
        raise ValueError(
            f"{path} is a distilled DeiT, with two tokens before the patches: take one that is not distilled"
        )
    prefix = next(
        (p for p in ("visual.", "vision_model.", "backbone.", "module.") if any(n.startswith(p) for n in tensors)), ""
    )
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if prefix == "vision_model." and "visual_projection.weight" in tensors:
        own["visual_projection.weight"] = tensors["visual_projection.weight"]
    found = renamed(own, IMAGE_NAMES, path)
    clip = "norm_before.weight" in found
    lacking = [
        name for name in ("patch_embedding.weight", "class_token", "positions", "norm.weight") if not has(found, name)
    ]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: it is not a whole ViT")
    kernel = found["patch_embedding.weight"]  # (d, 3, p, p)
    d, _, p, _ = kernel.shape
    mean, deviation = map(torch.tensor, PIXELS[pixels or ("clip" if clip else "imagenet")])
    bias = found.get("patch_embedding.bias", torch.zeros(d))
    # Our values x are in [-1, 1]; the encoder was trained on ((x + 1) / 2 - mean) / deviation.
    found["patch_embedding.bias"] = bias + (kernel * ((0.5 - mean) / deviation)[:, None, None]).sum(dim=(1, 2, 3))
    found["patch_embedding.weight"] = (kernel * (0.5 / deviation)[:, None, None]).reshape(d, -1)
    found["class_token"] = found["class_token"].flatten()
    found["positions"] = found.pop("positions.weight", found.get("positions")).reshape(-1, d)
    if "projection" in found:  # OpenAI stores the transpose
        found["projection.weight"] = found.pop("projection").T.contiguous()
    side = round((len(found["positions"]) - 1) ** 0.5)
    if side**2 != len(found["positions"]) - 1:
        raise ValueError(
            f"{path} has {len(found['positions']) - 1} patches, not a square number: its grid is not known"
        )
    if not heads and d % 64:
        raise ValueError(f"{path} has width {d}, and its number of attention heads is not known: give --heads")
    fields = {"width": d, "heads": heads or d // 64, "patch_size": p, "clip_image": clip}
    return {"what": "image", "fields": fields, "grid": (side, side), "tensors": found}


def has(found: dict[str, Tensor], name: str) -> bool:
    """Whether a tensor or an embedding table of that name exists."""
    return name in found or name + ".weight" in found


def text_tower(tensors: dict[str, Tensor], path: Path, heads: int, vocab: Path | None) -> dict:
    """The tensors of a BERT -> the dictionary that `convert` saves for a text encoder"""
    own = {name.removeprefix("bert."): value for name, value in tensors.items()}
    found = renamed(own, TEXT_NAMES, path)
    lacking = [name for name in ("words", "positions", "norm") if name + ".weight" not in found]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: it is not a whole BERT")
    types = found.pop("types.weight", torch.zeros(1, found["words.weight"].shape[1]))
    found["positions"] = found.pop("positions.weight") + types[0]  # all tokens of a single text have type 0
    beside = [path.with_name(name) for name in ("vocab.txt", "tokenizer.json")]
    vocab = vocab or next((one for one in beside if one.is_file()), None)
    if vocab is None:
        raise ValueError(f"the words of {path} are not known: give its vocab.txt or tokenizer.json as --vocab")
    words = read_vocabulary(vocab)
    if len(words) != len(found["words.weight"]):
        raise ValueError(
            f"{vocab} has {len(words)} words and {path} {len(found['words.weight'])}: they do not belong together"
        )
    if path.with_name("config.json").is_file():
        config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        heads = heads or config.get("num_attention_heads", 0)
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"{path} was trained with {config['hidden_act']}, and the blocks here have a GELU")
    if not heads:
        raise ValueError(f"the number of attention heads of {path} is not known: give --heads (BERT-base, MiniLM: 12)")
    fields = {"width": found["words.weight"].shape[1], "text_heads": heads}
    return {"what": "text", "fields": fields, "vocab": words, "tensors": found}


def convert(path: Path, out: Path, heads: int = 0, pixels: str = "", vocab: Path | None = None) -> str:
    """Convert a published encoder to a file for train.py --init -> a one-line description of it

    Args:    heads    number of attention heads, 0 = from config.json or, for a ViT, one per 64 of the width
             pixels   a key of PIXELS, "" = CLIP's for CLIP, else ImageNet's
             vocab    vocab.txt or tokenizer.json of a BERT, None = beside the file
    Raises:  ValueError, in one sentence, for a file that is not such an encoder
    """
    tensors = read_tensors(path)
    is_text = any("word_embeddings" in name for name in tensors)
    try:
        tower = text_tower(tensors, path, heads, vocab) if is_text else image_tower(tensors, path, heads, pixels)
    except (RuntimeError, TypeError, LookupError, AttributeError, RecursionError, NotImplementedError) as error:
        raise ValueError(f"{path} is not an encoder of a form that is known ({error}): download it again") from error
    width = tower["fields"]["width"]
    for name, value in tower["tensors"].items():
        inside = name.startswith(("blocks.", "norm", "positions", "class_token"))
        if inside and (value.ndim == 0 or value.shape[-1] % width):
            raise ValueError(
                f"{path}: {name} is {tuple(value.shape)} in an encoder of width {width}: download it again"
            )
    bad = next((name for name, value in tower["tensors"].items() if not value.isfinite().all()), None)
    if bad:
        raise ValueError(f"{path} holds numbers that are not finite, in {bad} first: download it again")
    tower["source"], tensors = path.name, tower["tensors"]
    runtime.write_beside(out, lambda temporary: torch.save(tower, temporary))
    size = ", ".join(f"{name} {value}" for name, value in tower["fields"].items())
    if not is_text:
        size += f", pixels as {pixels or ('clip' if tower['fields']['clip_image'] else 'imagenet')}"
    return f"{out}: {tower['what']} encoder of {depth_of(tensors)} blocks, {size}"


def depth_of(tensors: dict[str, Tensor]) -> int:
    """The number of blocks in an encoder."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


# ------------------------------------------------------------------------------------------------- into a model's place


def load_tower(path: str | Path) -> dict:
    """Load a file written by `convert`. Raises ValueError for any other file."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(path)
        tower = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # to read just the words
    except Exception as error:
        raise ValueError(f"{path} cannot be read: give a file that tools/weights.py wrote") from error
    if not isinstance(tower, dict) or not {"what", "fields", "tensors"} <= tower.keys():
        raise ValueError(f"{path} was not written by tools/weights.py: convert a published file with it first")
    return tower


def vocabulary(paths: list[str], given: str = "") -> list[str] | None:
    """The vocabulary of the text encoder among the files, or None. Raises ValueError if `given` is a different one."""
    words = next((tower["vocab"] for tower in map(load_tower, paths) if tower["what"] == "text"), None)
    if words and given and Tokenizer.from_file(given).vocab != words:
        raise ValueError(f"{given} is not the vocabulary of the text encoder in --init: leave --vocab out")
    return words


@torch.no_grad()
def take(model: VisionLanguageModel, paths: list[str]) -> str:
    """Load converted encoders into a new model and reset its teacher -> a description of what was and was not loaded

    Raises:  ValueError for encoders of another shape, or two of the same kind; the model is then unchanged
    """
    towers, state, said, wanted = [load_tower(path) for path in paths], model.state_dict(), [], {}
    if len({tower["what"] for tower in towers}) < len(towers):
        raise ValueError(
            f"{' and '.join(map(str, paths))} are two encoders of one kind: give one image and one text encoder"
        )
    for path, tower in zip(paths, towers, strict=True):
        for name, value in tower["fields"].items():
            ours = getattr(model.config, name) or (model.config.heads if name == "text_heads" else False)
            if ours != value:
                raise ValueError(
                    f"{path} was made with {name} {value} and the model with {ours}: give --{option(name, value)}"
                )
        placed, note = (place_image if tower["what"] == "image" else place_text)(model, tower)
        fits = {name: value for name, value in placed.items() if name in state and state[name].shape == value.shape}
        said.append(f"from {path} ({tower['source']}): {len(fits)} tensors{note}")
        wanted |= fits
    for name, value in wanted.items():
        state[name].copy_(value)
    if model.teacher is not None:
        part = model.student.image if isinstance(model.teacher, ImageEncoder) else model.student
        move_teacher(model.teacher, part, 0.0)
    rest = [name for name, _ in model.named_parameters() if name not in wanted and not name.startswith("teacher.")]
    parts = dict.fromkeys(part_of(name) for name in rest)
    return "\n".join([*said, f"in none of them, so fresh: {', '.join(parts)}"])


def part_of(name: str) -> str:
    """The block, table or head that a parameter belongs to."""
    name = name.removesuffix(".weight").removesuffix(".bias")
    return ".".join(name.split(".")[: 4 if ".blocks." in name else 3 if name.startswith("student.") else 1])


def option(name: str, value) -> str:
    """The option of train.py that makes the model fit the encoder."""
    return name.replace("_", "-") if value is True else f"{name.replace('_', '-')} {value}, or another --preset"


def place_image(model: VisionLanguageModel, tower: dict) -> tuple[dict[str, Tensor], str]:
    """The tensors of an image encoder under the model's names, and a note on them."""
    tensors, note = dict(tower["tensors"]), ""
    grid = model.config.grid
    if tuple(tower["grid"]) != grid:
        tensors["positions"] = resized(tensors["positions"], tower["grid"], grid)
        note = f", positions interpolated from {tower['grid'][0]} x {tower['grid'][1]} to {grid[0]} x {grid[1]}"
    placed = {f"student.image.{name}": value for name, value in tensors.items()}
    if "projection.weight" in tensors:
        placed["student.image_projection.weight"] = tensors["projection.weight"]
        placed["student.image_projection.bias"] = torch.zeros(len(tensors["projection.weight"]))
    if depth_of(tensors) > model.config.image_depth:
        note += f", blocks 0 to {model.config.image_depth - 1} of {depth_of(tensors)}"
    return placed, note


def place_text(model: VisionLanguageModel, tower: dict) -> tuple[dict[str, Tensor], str]:
    """The tensors of a text encoder under the model's names, and a note on them."""
    config, tensors = model.config, dict(tower["tensors"])
    if config.max_tokens > len(tensors["positions"]):
        raise ValueError(
            f"max_tokens is {config.max_tokens}, and this BERT has {len(tensors['positions'])} positions: lower it"
        )
    tensors["positions"] = tensors["positions"][: config.max_tokens]
    if "mlm.bias" in tensors:
        tensors["mlm_bias"] = tensors.pop("mlm.bias")
    placed = {}
    for name, value in tensors.items():
        first, *rest = name.split(".", 2)
        number = int(rest[0]) if first == "blocks" else 0
        if first == "blocks" and number >= config.text_depth:
            placed[f"student.fusion.blocks.{number - config.text_depth}.{rest[1]}"] = value
        else:
            placed[name if name.startswith("mlm") else f"student.text.{name}"] = value
    above = min(max(depth_of(tensors) - config.text_depth, 0), config.fusion_depth)
    return placed, f", {min(depth_of(tensors), config.text_depth)} layers of it for texts and {above} for fusion"


def main() -> None:
    """Command line."""
    parser = runtime.Parser(
        prog="tools.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="published weights: .pth, .pt, .bin or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="output file, for train.py --init")
    parser.add_argument(
        "--heads", type=int, default=0, help="attention heads; default, for a BERT: from config.json beside it"
    )
    parser.add_argument(
        "--pixels", choices=PIXELS, default="", help="pixel normalisation; default: imagenet, or clip for CLIP"
    )
    parser.add_argument("--vocab", type=Path, help="vocab.txt or tokenizer.json; default: the one beside the file")
    options = parser.parse_args()
    print(convert(options.file, options.out, options.heads, options.pixels, options.vocab))


if __name__ == "__main__":
    runtime.guarded(main)
