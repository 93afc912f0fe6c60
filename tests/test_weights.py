"""Published encoders, converted and taken up: they compute what their own code computes.

golden_weights.json holds names and shapes of small encoders of timm, open_clip (which names as OpenAI does) and
transformers, and what they gave, once, for the picture and the ids below, with the numbers that `published` fills in.
"""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_batch
from helpers import new_run, resumed_run, write_squares
from torch import nn

import finetune
import train
from eval import load_model
from mamo import MAMO, Config, MAMOConfig, VisionLanguageModel, init_weights
from tools import slim, weights

GOLDEN = json.loads(Path(__file__).with_name("golden_weights.json").read_text(encoding="utf-8"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghi")]
PICTURE = torch.from_numpy(np.random.default_rng(100).random((1, 3, 32, 32), dtype=np.float32)) * 2 - 1
SIZES = {"image_size": (32, 32), "patch_size": 8, "width": 32, "heads": 4, "embed_dim": 16, "vocab_size": 40}


def published(name: str) -> dict[str, torch.Tensor]:
    """The weights of a golden encoder: random numbers, from one generator for each name in order."""
    return {
        key: torch.from_numpy((0.3 * np.random.default_rng(number).standard_normal(shape)).astype(np.float32))
        for number, (key, shape) in enumerate(sorted(GOLDEN[name]["shapes"].items()))
    }


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As the library of that name lays a file out."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        data = value.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


class Holder(nn.Module):
    """A network of no use, with the given parameters: what TorchScript can store."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in tensors.items():
            place, *parts = self, *name.split(".")
            for part in parts[:-1]:
                if not hasattr(place, part):
                    place.add_module(part, Holder({}))
                place = getattr(place, part)
            place.register_parameter(parts[-1], nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def fresh(config_class=Config, model=VisionLanguageModel, **changes) -> VisionLanguageModel:
    torch.manual_seed(0)
    made = model(config_class(**(TINY | SIZES | changes))).eval()
    if isinstance(made, MAMO):
        return made
    made.make_mlm_head()
    return made.apply(init_weights).eval()


def started(folder: Path, file: Path, model: VisionLanguageModel, **options) -> VisionLanguageModel:
    weights.convert(file, folder / "tower.pt", **options)
    weights.take(model, [folder / "tower.pt"])
    return model


@pytest.mark.parametrize("kind", ["timm", "deit.pth", "mae", "dino"])
def test_a_vit_computes_what_timm_computes(tmp_path, kind):
    """With the names around it that DeiT, MAE and DINO put there."""
    tensors, file = published("timm"), tmp_path / "vit.pth"
    if kind == "mae":
        tensors |= {"mask_token": torch.ones(1, 1, 32), "decoder_blocks.0.norm1.weight": torch.ones(16)}
    if kind == "dino":
        tensors = {f"backbone.{name}": value for name, value in tensors.items()} | {"head.mlp.0.weight": torch.ones(3)}
    torch.save({"timm": tensors, "dino": {"teacher": tensors, "epoch": 3}}.get(kind, {"model": tensors}), file)
    model = started(tmp_path, file, fresh(), heads=4)
    found = model.encode_image(PICTURE)[0, :, :8].flatten().tolist()
    assert found == pytest.approx(GOLDEN["timm"]["out"], abs=2e-5)


@pytest.mark.parametrize("kind", ["openai", "openai, TorchScript", "hugging face clip"])
def test_an_image_encoder_of_clip_gives_its_embedding(tmp_path, kind):
    name, file = kind.split(", ")[0], tmp_path / "clip.pt"
    tensors = published(name) | {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    if name != "openai":
        file = file.with_suffix(".safetensors")
        write_safetensors(file, tensors)
    elif kind == name:
        torch.save(tensors, file)
    else:
        torch.jit.script(Holder(tensors)).save(str(file))
    model = started(tmp_path, file, fresh(clip_image=True), heads=4)
    found = model.embed_image(model.encode_image(PICTURE))[0].tolist()
    assert found == pytest.approx(GOLDEN[name]["embedding"], abs=2e-6)


@pytest.mark.parametrize("kind", ["bert", "bert, old names", "minilm"])
def test_the_layers_of_a_bert_go_to_text_and_fusion(tmp_path, kind):
    """Two of three layers to texts, the third to fusion, which sees nothing but the text here; and the head of MLM."""
    name, file = kind.split(", ")[0], tmp_path / ("bert.bin" if kind != "minilm" else "model.safetensors")
    tensors, golden = published(name), GOLDEN[name]
    if kind == "bert, old names":
        tensors = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for key, value in tensors.items()
        }
    torch.save(tensors, file) if kind != "minilm" else write_safetensors(file, tensors)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    model = started(tmp_path, file, fresh(text_depth=2, fusion_depth=2))
    ids = torch.tensor([golden["ids"]])
    text = model.encode_text(ids, torch.ones_like(ids).bool())
    assert text[0, :, :8].flatten().tolist() == pytest.approx(golden["layers"][2], abs=2e-5)
    above = model.student.fusion.blocks[0](text)
    assert above[0, :, :8].flatten().tolist() == pytest.approx(golden["layers"][3], abs=2e-5)
    if name == "bert":
        assert model.word_logits(above)[0, 2].tolist() == pytest.approx(golden["words"], abs=1e-4)


def towers(folder: Path) -> list[str]:
    """A converted image and text encoder, of widths and heads as in SIZES."""
    torch.save(published("timm"), folder / "vit.pth")
    torch.save(published("bert"), folder / "bert.bin")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    weights.convert(folder / "vit.pth", folder / "image.pt", heads=4)
    weights.convert(folder / "bert.bin", folder / "text.pt", heads=4)
    return [str(folder / "image.pt"), str(folder / "text.pt")]


def test_what_is_taken_and_what_stays_fresh_is_told_and_the_teacher_is_copied(tmp_path):
    """Another grid, more fusion blocks than the file has, an image encoder with fewer blocks than there are."""
    model = fresh(MAMOConfig, MAMO, image_size=(16, 24), image_depth=1, text_depth=2, fusion_depth=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = weights.take(model, towers(tmp_path))
    assert "positions interpolated from 4 x 4 to 2 x 3, blocks 0 to 0 of 2" in said
    assert "2 layers of it for texts and 1 for fusion" in said
    rest = said.splitlines()[-1]
    assert "student.fusion.blocks.1" in rest and "student.image_projection" in rest and "itm_head" in rest
    assert "student.text." not in rest and "student.fusion.blocks.0" not in rest and "mlm_head" not in rest
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    for name, value in model.named_parameters():
        told = any(name.startswith(part.strip()) for part in rest.removeprefix("in none of them, so fresh:").split(","))
        assert name.startswith("teacher") or (name in changed) != told, name
        if name.startswith("student.") and "mask_token" not in name:
            assert torch.equal(value, model.state_dict()[name.replace("student", "teacher", 1)]), name
    model.train()(tiny_batch(model.config))


def test_a_run_starts_from_converted_encoders_and_goes_on_without_them(tmp_path, capsys):
    """With the vocabulary of the text encoder; after the first checkpoint the files are not needed any more."""
    paths, data = towers(tmp_path), tmp_path / "pairs_train.jsonl"
    write_squares(data)
    sizes = "--image-size 32 32 --patch-size 8 --width 32 --heads 4 --embed-dim 16 --max-tokens 16 --text-depth 2"
    shared = f"{sizes} --fusion-depth 1 --image-depth 2 --batch-size 4 --device cpu --out {tmp_path / 'run'}".split()
    options = [*shared, "--steps", "4", "--data", str(data)]
    run = train.start(*train.parse([*options, "--init", *paths]))
    assert f"from {paths[0]} (vit.pth)" in capsys.readouterr().out
    assert run.tokenizer.vocab == WORDS
    assert torch.equal(run.model.student.text.words.weight, published("bert")["bert.embeddings.word_embeddings.weight"])
    run.train(stop_at=2)
    for path in paths:
        Path(path).unlink()
    run = train.start(*train.parse([*options, "--init", *paths, "--resume"]))
    run.train()
    assert run.step == 4 and run.tokenizer.vocab == WORDS


class Hostile:
    """What a hostile pickle holds: a call, made while it is read."""

    def __reduce__(self):
        return (print, ("the file ran code",))


def spoiled(folder: Path, kind: str) -> Path:
    """A file that must be refused."""
    tensors, file = published("timm"), folder / "vit.pth"
    changes = {
        "distilled": {"dist_token": torch.ones(1, 1, 32)},
        "layer scale": {"blocks.0.ls1.gamma": torch.ones(32)},
        "half a block": {},
        "not finite": {"norm.bias": torch.full((32,), float("nan"))},
        "hostile": {"norm.bias": Hostile()},
    }
    if kind == "half a block":
        del tensors["blocks.1.mlp.fc2.bias"]
    torch.save(tensors | changes.get(kind, {}), file)
    if kind == "half a file":
        file.write_bytes(file.read_bytes()[:20000])
    if kind == "text":
        file.write_text("hello")
    if kind == "no tensors":
        torch.save({"epoch": 3}, file)
    if kind == "half of safetensors":
        write_safetensors(folder / "whole.safetensors", tensors)
        file = folder / "vit.safetensors"
        file.write_bytes((folder / "whole.safetensors").read_bytes()[:20000])
    if kind in ("no vocabulary", "cased", "other vocabulary", "no heads", "roberta", "relu"):
        if kind == "relu":
            (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "relu"}))
        prefix = "roberta." if kind == "roberta" else "bert."
        file = folder / "bert.bin"
        torch.save({name.replace("bert.", prefix): value for name, value in published("bert").items()}, file)
        words = {"cased": [*WORDS[:-1], "Paris"], "other vocabulary": [*WORDS, "more"]}.get(kind, WORDS)
        if kind != "no vocabulary":
            file.with_name("vocab.txt").write_text("\n".join(words) + "\n")
    return file


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "is not a file"),
        ("half a file", "is damaged"),
        ("half of safetensors", "is damaged"),
        ("text", "is damaged, or holds more than plain tensors"),
        ("hostile", "is damaged, or holds more than plain tensors"),
        ("no tensors", "holds no tensors by name"),
        ("distilled", "distilled DeiT"),
        ("layer scale", "holds blocks.0.ls1.gamma, which no encoder here has"),
        ("not finite", "not finite"),
        ("half a block", "lacks blocks.1.mlp.2.bias"),
        ("relu", "trained with relu"),
        ("no vocabulary", "give its vocab.txt or tokenizer.json as --vocab"),
        ("cased", "knows capital letters .'Paris'."),
        ("other vocabulary", "41 words and .* 40"),
        ("no heads", "give --heads"),
        ("roberta", "which no encoder here has"),
    ],
)
def test_a_file_that_is_no_encoder_is_refused_in_one_sentence(tmp_path, kind, says, capsys):
    file = tmp_path / "none.pth" if kind == "missing" else spoiled(tmp_path, kind)
    heads = 4 if file.suffix != ".bin" else 0
    with pytest.raises(ValueError, match=says) as refused:
        weights.convert(file, tmp_path / "out.pt", heads)
    assert "\n" not in str(refused.value) and not (tmp_path / "out.pt").exists()
    assert "ran code" not in capsys.readouterr().out


def test_a_model_of_another_shape_is_refused_and_stays_as_it_was(tmp_path):
    """With the option that would make it fit."""
    image, text = towers(tmp_path)
    for changes, paths, says in (
        ({"width": 64, "heads": 8}, [image], "width 32 and the model with 64: give --width 32, or another --preset"),
        ({"heads": 8}, [image], "heads 4 and the model with 8"),
        ({"text_heads": 8}, [image, text], "text_heads 4 and the model with 8: give --text-heads 4"),
        ({"patch_size": 16}, [image], "patch_size 8 and the model with 16"),
        ({"max_tokens": 30}, [text], "max_tokens is 30, and this BERT has 24 positions"),
        ({}, [image, image], "two encoders of one kind"),
        ({}, [str(tmp_path / "vit.pth")], "was not written by tools/weights.py"),
    ):
        model = fresh(**changes)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=says):
            weights.take(model, paths)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_words_are_read_from_a_tokenizer_json(tmp_path):
    """By id, not in the order of the file; a vocabulary beside --init that is another one is refused."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {word: number for number, word in reversed([*enumerate(WORDS)])}}}))
    assert weights.read_vocabulary(path) == WORDS
    (tmp_path / "other.txt").write_text("\n".join(reversed(WORDS)) + "\n")
    with pytest.raises(ValueError, match=r"not the vocabulary of the text encoder"):
        weights.vocabulary(towers(tmp_path), str(tmp_path / "other.txt"))
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"not the tokenizer\.json of a BERT"):
        weights.read_vocabulary(path)


def test_a_slim_checkpoint_scores_as_the_run_does_and_cannot_be_resumed(tmp_path, monkeypatch):
    """Half the bytes a weight and no optimiser; all that loads checkpoints loads it."""
    run = new_run(write_squares(tmp_path / "pairs.jsonl", 8), tmp_path / "run", "--steps", "2")
    run.train()
    whole, small = run.out / "checkpoint.pt", tmp_path / "new" / "demo.pt"
    monkeypatch.setattr("sys.argv", ["slim", str(whole), "--out", str(small)])
    slim.main()
    assert small.stat().st_size < whole.stat().st_size / 2
    (ours, *_), (theirs, *_) = (load_model(path, torch.device("cpu")) for path in (small, whole))
    batch = tiny_batch(ours.config)
    pairs = batch["images"], batch["input_ids"], batch["attention_mask"]
    for name, scores in ours.score(*pairs).items():
        torch.testing.assert_close(scores, theirs.score(*pairs)[name], atol=5e-3, rtol=0)
    assert all(value.dtype == torch.float32 for value in ours.state_dict().values() if value.is_floating_point())
    given = ["retrieval", "--init", small, "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "tuned"]
    task = finetune.start(*finetune.parse([*map(str, given), "--batch-size", "4", "--steps", "1"]))
    assert not any(name.startswith("student") for name in task.fresh)
    (tmp_path / "again").mkdir()
    small.rename(tmp_path / "again" / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds no run to go on from"):
        resumed_run(tmp_path / "again")
    monkeypatch.setattr("sys.argv", ["slim", str(whole), "--out", str(whole)])
    with pytest.raises(ValueError, match="is an input"):
        slim.main()
