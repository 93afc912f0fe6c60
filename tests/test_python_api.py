"""A student's first calls from Python, and what they are told when they hand in something else; another fusion."""

import dataclasses
import warnings

import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_model
from helpers import caption, new_run, square, write_squares, write_task
from PIL import Image
from torch import nn

import finetune
import runtime
from data import load_image, make_batch, read_rows, to_tensor
from eval import load, load_model
from explain import How, token_maps
from mamo import MAMO, Attention, FusionEncoder, MAMOConfig, View, at
from tokenizer import Tokenizer
from train import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pre-trained checkpoint of one step, beside the pictures and pairs.jsonl that it saw."""
    folder = tmp_path_factory.mktemp("door")
    run = new_run(write_squares(folder / "pairs.jsonl"), folder / "run")
    run.train(stop_at=1)
    return folder / "run" / "checkpoint.pt"


# -------------------------------------------------------------------------------------------------- a batch, and a step


def test_a_fresh_model_trains_on_a_few_pictures_and_texts():
    """No option, no tokenizer, no file: five finite losses, whose weighted sum reaches every trained parameter."""
    config = MAMOConfig()
    model, batch = MAMO(config), make_batch([square(0), square(5)], [caption(0), caption(5)], config)
    losses = model(batch)
    assert losses.keys() == {"itc", "itm", "mrm", "mim", "mlm"}
    model.total(losses).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.total({"itc": torch.tensor(2.0)}), torch.tensor(2.0))
    weighted = MAMO(dataclasses.replace(config, w_mim=0.5))
    assert weighted.total({"mim": torch.tensor(2.0), "itc": torch.tensor(1.0)}).item() == 2.0


def test_a_batch_is_the_same_from_tensors_paths_and_pictures(tmp_path):
    """And from the same seed; another seed draws other noise. Equal texts and equal paths are one another's."""
    config, texts = MAMOConfig(), ["a red square", "a red square", "a blue square"]
    paths = [tmp_path / f"{number}.png" for number in (0, 1, 0)]
    for number in (0, 1):
        square(number).save(tmp_path / f"{number}.png")
    pictures = [Image.open(path) for path in paths]
    tensors = torch.stack([to_tensor(load_image(path), config.image_size) for path in paths])
    batches = [make_batch(images, texts, config, seed=3) for images in (paths, pictures, tensors)]
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch if name != "image_id")
    ids, words = batches[0]["image_id"].tolist(), batches[0]["caption_id"].tolist()
    assert ids[0] == ids[2] != ids[1] and words[0] == words[1] != words[2]
    assert len(set(batches[2]["image_id"].tolist())) == 3
    other = make_batch(paths, texts, config, seed=4)
    for name in ("patch_noise", "token_noise", "replace_noise", "negative_noise"):
        assert not torch.equal(other[name], batches[0][name])
    tokenizer = Tokenizer.build(texts * 2)
    known = make_batch(paths, texts, MAMOConfig(vocab_size=len(tokenizer)), tokenizer)
    assert known["input_ids"].shape[1] == 5 < batches[0]["input_ids"].shape[1], "words, where they were letters"


def test_a_tokenizer_takes_one_text_or_several():
    tokenizer = Tokenizer.build([])
    ids, mask = tokenizer("ab")
    assert ids.tolist() == [tokenizer.encode("ab")] and mask.all() and mask.dtype == torch.bool
    ids, mask = tokenizer(["ab", "abcd"], 5)
    assert ids.shape == mask.shape == (2, 5) and mask.sum(dim=1).tolist() == [4, 5]
    assert ids[0, 4] == tokenizer.pad_id


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: make_batch([square(0)], ["a", "b"], c), "1 images and 2 texts: give a list of each"),
        (lambda c: make_batch([square(0)], "a", c), "give a list of each"),
        (lambda c: make_batch([square(0)], ["a"], c, Tokenizer.build(["dog dog"])), "the tokenizer has 110 words and"),
        (lambda c: make_batch(["none.png"], ["a"], c), "none.png is not a file: give the path of a picture"),
        (lambda c: MAMO(c)({"images": torch.zeros(2, 3, 32, 32)}), "the batch lacks input_ids, attention_mask,"),
        (lambda c: MAMO(c).encode_image(torch.zeros(2, 4, 32, 32)), r"shape \(2, 4, 32, 32\): expected floats"),
        (lambda c: MAMO(c).encode_image(torch.zeros(2, 3, 32, 32).byte()), "images are torch.uint8"),
        (lambda c: TrainConfig(data="pairs.jsonl"), "give lists of paths"),
        (lambda c: MAMOConfig(vocab_size=3), "vocab_size is 3: set it to the length of the tokenizer's vocabulary"),
        (lambda c: MAMOConfig(ema=1.5), "ema is 1.5: give the teacher a momentum"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call(MAMOConfig())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_an_attention_mask_of_numbers_is_not_taken_for_a_bias(kind):
    """In the whole step, and where a mask is handed to an encoder by itself."""
    model = tiny_model()
    batch = tiny_batch(model.config)
    mask = batch["attention_mask"].to(kind)
    for call in (
        lambda: model(batch | {"attention_mask": mask}),
        lambda: model.encode_text(batch["input_ids"], mask),
    ):
        with pytest.raises(ValueError, match=r"attention_mask .* give bool, True = real token"):
            call()


def test_a_transparent_picture_is_understood_and_one_path_needs_no_list(tmp_path):
    """Transparency stands on white, whether a picture comes from a file or from memory."""
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert (to_tensor(clear, (32, 32)) == 1).all() and to_tensor(clear, (32, 32)).shape == (3, 32, 32)
    path = write_squares(tmp_path / "pairs.jsonl", 2)
    assert read_rows(str(path), "pairs") == read_rows(path, "pairs") == read_rows([path], "pairs")


def test_a_forgotten_after_step_does_not_pass_unnoticed():
    """A warning at the next total; none while gradients are added up, in evaluation, or where it is called."""
    model = tiny_model()
    batch, optimizer = tiny_batch(model.config), torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for _ in range(2):
                model.total(model(batch)).backward()
            optimizer.step()
            model.after_step()
        model.total(model(batch)).backward()
        optimizer.step()
        model.eval().total(model(batch))
        model.train()
    with pytest.warns(UserWarning, match="after_step"):
        model.total(model(batch))


# ------------------------------------------------------------------------------------------------------ a trained model


def test_a_loaded_model_takes_paths_pictures_and_texts_one_or_many(checkpoint):
    """The same numbers as the model gives on tensors; one of each gives numbers, several give lists."""
    pipeline, (model, tokenizer, _) = load(checkpoint, "cpu"), load_model(checkpoint, CPU)
    rows = read_rows(checkpoint.parent.parent / "pairs.jsonl", "pairs")[:3]
    paths, texts = [row["image"] for row in rows], [row["caption"] for row in rows]
    images = torch.stack([to_tensor(load_image(path), model.config.image_size) for path in paths])
    expected = model.score(images, *tokenizer(texts))
    found = pipeline.score([paths[0], Image.open(paths[1]), paths[2]], texts)
    for name in ("itc", "itm"):
        assert found[name] == pytest.approx(expected[name].tolist(), abs=1e-6)
        assert pipeline.score(paths[1], texts[1])[name] == pytest.approx(found[name][1], abs=1e-6)
    cosines = (pipeline.embed_images(paths) * pipeline.embed_texts(texts)).sum(dim=1)
    assert cosines.tolist() == pytest.approx(found["itc"], abs=1e-6)
    assert pipeline.embed_images(paths[0]).shape == pipeline.embed_texts("a").shape == (1, model.config.embed_dim)
    with pytest.raises(ValueError, match="3 pictures and 2 texts: give one text for each picture"):
        pipeline.score(paths, texts[:2])


def test_a_heat_map_has_a_value_for_each_patch_and_can_be_kept(checkpoint, tmp_path):
    pipeline = load(checkpoint, "cpu")
    path = checkpoint.parent.parent / "pictures" / "00.png"
    heat = pipeline.heat(path, caption(0))
    assert heat.values.shape == pipeline.model.config.grid and (heat.values >= 0).all() and heat.values.any()
    heat.save(tmp_path / "new" / "heat.png")
    with Image.open(tmp_path / "new" / "heat.png") as kept:
        assert kept.size == heat.picture.size == (480, 320)
    both = pipeline.heat([path, path], caption(0))
    assert len(both) == 2 and torch.equal(both[0].values, both[1].values)
    with pytest.raises(ValueError, match="layer is 2"):
        pipeline.heat(path, caption(0), how=How(map="gradcam", layer=2))


def test_a_checkpoint_of_a_task_answers(checkpoint, tmp_path):
    """The likeliest answers, best first; it has no score of a pair."""
    data = write_task(tmp_path / "vqa.jsonl", "vqa")
    given = f"vqa --init {checkpoint} --data {data} --out {tmp_path / 'run'} --batch-size 4 --device cpu"
    run = finetune.start(*finetune.parse(given.split()))
    run.train(stop_at=1)
    pipeline, path = load(tmp_path / "run" / "checkpoint.pt", "cpu"), tmp_path / "pictures" / "00.png"
    answers = pipeline.answers(path, "what colour is the square")
    chances = [chance for _, chance in answers]
    assert len(answers) == 5 and chances == sorted(chances, reverse=True)
    assert {answer for answer, _ in answers} <= set(run.model.head_config.answers)
    with pytest.raises(ValueError, match=r"this checkpoint answers vqa: use answers\(images, text\)"):
        pipeline.score(path, "a red square")


# ------------------------------------------------------------------------------------------------------- another fusion


class CoBlock(nn.Module):
    """Two streams: each attends to itself and to the other."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.own, self.cross = (nn.ModuleList(Attention(d, heads) for _ in range(2)) for _ in range(2))

    def forward(self, text, image, mask):
        text = text + self.own[0](text, text, mask) + self.cross[0](text, image)
        return text, image + self.own[1](image, image) + self.cross[1](image, text, mask)


class CoAttention(FusionEncoder):
    """What another fusion owes the rest: views fused at their places, maps of text over patches, and its blocks."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(CoBlock(config.width, config.heads) for _ in range(config.fusion_depth))

    def fuse_views(self, *views: View) -> list:
        fused = []
        for view in views:
            text, image = view.text, view.image
            for block in self.blocks:
                text, image = block(text, image, view.attention_mask)
            whole = torch.cat([text, image], dim=1)
            fused.append(whole if view.places is None else at(whole, view.places))
        return fused

    @property
    def text_attention(self):
        return [block.cross[0] for block in self.blocks]

    @staticmethod
    def text_to_patches(attention_map, length):
        return attention_map[..., 1:]


def test_gradient_checkpointing_covers_every_block_of_every_encoder_or_says_so():
    """Also of a fusion whose blocks are of another class; the teacher's run once."""
    model = tiny_model(tiny_config(image_depth=2, text_depth=3))
    model.student.fusion = CoAttention(model.config)
    model.teacher.fusion, calls = CoAttention(model.config), []

    def counted(name, forward):
        return lambda *given, **options: calls.append(name) or forward(*given, **options)

    for name, block in model.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            block.forward = counted(name, block.forward)
    runtime.recompute_blocks(model)
    batch = tiny_batch(model.config)
    losses = model(batch)
    before = {name: calls.count(name) for name in calls}
    model.total(losses).backward()
    assert len(before) == 2 * (2 + 3 + 2)
    for name, times in before.items():
        again = 2 if name.startswith("student.") else 1
        assert calls.count(name) == again * times, name
    model.student.fusion.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="the fusion encoder has no list `blocks`"):
        runtime.recompute_blocks(model)


def test_another_fusion_trains_and_has_maps():
    """Two streams and a layout of their own: finite losses, places where they are asked for, maps of all patches."""
    model = tiny_model(tiny_config(dropout=0.0))
    model.student.fusion, model.teacher.fusion = CoAttention(model.config), CoAttention(model.config)
    batch = tiny_batch(model.config)
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values())
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["input_ids"], batch["attention_mask"])
    mask = batch["attention_mask"]
    fused, length = model.fuse(image, text, mask), text.shape[1]
    streams = text, image
    for block in model.student.fusion.blocks:
        streams = block(*streams, mask)
    assert torch.equal(fused.text, streams[0]) and torch.equal(fused.image, streams[1])
    torch.testing.assert_close(model.pair(image, text, mask), fused.pair)
    places = model.student.fusion.at_patches(torch.tensor([[-1, 0, 5]] * 5), length)
    (some,) = model.student.fusion.fuse_views(View(image, text, mask, torch.cat([mask[:, :2].long(), places], dim=1)))
    torch.testing.assert_close(some, torch.cat([fused.text[:, [1, 1]], fused.image[:, [0, 1, 6]]], dim=1))
    for maps in token_maps(model, batch["images"], batch["input_ids"], batch["attention_mask"]):
        assert maps.shape == (5, length, model.config.num_patches) and maps.any()


def test_maps_of_another_width_are_refused(monkeypatch):
    """As of a fusion that keeps the one-stream reading of its maps."""
    model = tiny_model()
    model.student.fusion = CoAttention(model.config)
    monkeypatch.setattr(CoAttention, "text_to_patches", staticmethod(FusionEncoder.text_to_patches))
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match=r"CoAttention gives maps of .* where a picture has 24 patches"):
        token_maps(model, batch["images"], batch["input_ids"], batch["attention_mask"])
