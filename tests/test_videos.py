"""Videos: one frame is a picture, time is seen, hidden places are hidden in all frames, rows and batches are right."""

import base64
import copy
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_objective, total
from helpers import caption, new_run, read_log, square, write_rows, write_squares
from PIL import Image
from test_processes import one_beside_two
from torch import nn

from data import Pairs, TwinBatches, captions_of, open_rows, read_rows, to_tensor
from eval import check_kinds, load, retrieval
from explain import How, hiding_masks
from finetune import parse as parse_task
from finetune import start as start_task
from mamo import (
    FusionEncoder,
    at,
    by_frame,
    drop_patches,
    frames_of,
    mask_patches,
    mask_words,
    patchify,
)
from reading import rows as reading
from reading import videos as reading_videos
from reading.videos import choose_frames, count_frames, load_frames, shown, video_of
from siblings import OBJECTIVES
from siblings.masking import blank, mask_units
from tokenizer import Tokenizer
from tools import report
from world import moving

CPU = torch.device("cpu")


def write_video(path: Path, pictures: list[Image.Image]) -> Path:
    """An animated picture; its kind follows from the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".webp": {"lossless": True}, ".gif": {}, ".png": {}}[path.suffix]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0, **kind)
    return path


def write_videos(path: Path, count: int = 12, twins: int = 0) -> Path:
    """A pairs file of videos: in each a square of one colour moves from place to place."""
    rows = []
    for number in range(count):
        name = f"videos/{number:02d}.webp"
        write_video(path.parent / name, [square(4 * (number % 6) + (number + step) % 4) for step in range(5)])
        row = {"video": name, "caption": f"{caption(number)} goes on {number}"}
        rows.append(row | ({"twin": number // 2} if number < twins else {}))
    return write_rows(path, rows)


def videos_for(batch: dict, frames: int, seed: int = 1) -> dict:
    """A batch with other pictures behind the first ones, as frames."""
    more = torch.rand(len(batch["images"]), frames - 1, *batch["images"].shape[1:], generator=torch.manual_seed(seed))
    return batch | {"images": torch.cat([batch["images"][:, None], 2 * more - 1], dim=1)}


# ---------------------------------------------------------------------------------------------------------- the encoder


WORDS = ("input_ids", "attention_mask", "token_noise", "replace_noise")
WAYS = [*((name, {}) for name in OBJECTIVES), ("mamo", {"drop_masked": True}), ("mamo", {"queue_size": 8})]


@pytest.mark.parametrize("name, more", [*WAYS, ("mamo", {"mask_both": True})])
def test_one_frame_is_the_picture(name, more):
    """Through every loss, value and gradient; and a model for four frames is on pictures what one without them is."""
    model, known = tiny_objective(name, frames=4, **more), tiny_objective(name, **more)
    known.load_state_dict({key: value for key, value in model.state_dict().items() if not key.endswith("times")})
    batch = tiny_batch(known.config)
    found = []
    for one, images in ((known, batch["images"]), (model, batch["images"]), (model, batch["images"][:, None])):
        one = copy.deepcopy(one)  # a queue moves on
        losses = one(batch | {"images": images})
        total(one, losses).backward()
        gradient = {key: value.grad for key, value in one.named_parameters() if value.grad is not None}
        found.append((losses, {key: value for key, value in gradient.items() if not key.endswith("times")}))
    for losses, gradient in found[1:]:
        assert losses.keys() == found[0][0].keys() and gradient.keys() == found[0][1].keys()
        for key, value in losses.items():
            torch.testing.assert_close(value, found[0][0][key], rtol=0, atol=1e-6)
        for key, value in gradient.items():
            torch.testing.assert_close(value, found[0][1][key], rtol=0, atol=1e-6, msg=key)


def test_a_block_on_videos_is_that_of_a_naive_loop():
    """Each token by itself: a patch looks at its frame's class token and patches, a class token at everything."""
    frames, n = 3, 4
    block = tiny_objective("mamo").student.image.blocks[0].double()
    hidden = torch.randn(2, frames + frames * n, 16, dtype=torch.double)
    found = by_frame(block, hidden, frames)
    for row in range(2):
        for place in range(hidden.shape[1]):
            frame = place if place < frames else (place - frames) // n
            own = [frame, *range(frames + frame * n, frames + (frame + 1) * n)]
            keys = hidden[row, list(range(hidden.shape[1])) if place < frames else own]
            query = hidden[row, place]
            mixed = block.attention(block.norm1(query)[None, None], block.norm1(keys)[None])[0, 0]
            middle = query + mixed
            expected = middle + block.mlp(block.norm2(middle))
            torch.testing.assert_close(found[row, place], expected, rtol=0, atol=1e-10)


def test_tokens_stand_where_and_when_they_are():
    """What enters the blocks is, frame by frame, pixels, position and time; the first frame has no time."""
    model = tiny_objective("mamo", frames=3)
    encoder, n = model.student.image, model.config.num_patches
    encoder.blocks, encoder.norm = nn.ModuleList(), nn.Identity()
    videos = videos_for(tiny_batch(model.config), 3)["images"]
    found = encoder(videos)
    for frame in range(3):
        time = encoder.times[frame - 1] if frame else 0
        alone = encoder(videos[:, frame])
        torch.testing.assert_close(found[:, frame], alone[:, 0] + time, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            found[:, 3 + frame * n : 3 + (frame + 1) * n], alone[:, 1:] + time, rtol=0, atol=1e-6
        )


def test_after_one_block_a_patch_knows_its_own_frame_alone():
    """In the encoder too; a class token knows all frames."""
    model = tiny_objective("mamo", frames=3, image_depth=1)
    videos, n = videos_for(tiny_batch(model.config), 3)["images"].requires_grad_(), model.config.num_patches
    encoded = model.encode_image(videos)
    for frame in range(3):
        patches = encoded[:, 3 + frame * n : 3 + (frame + 1) * n]
        for part, known in ((patches, [frame]), (encoded[:, frame], [0, 1, 2])):
            (gradient,) = torch.autograd.grad(part.square().sum(), videos, retain_graph=True)
            assert [place for place in range(3) if gradient[:, place].abs().sum() > 0] == known


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_frames_matters(name):
    """To every loss's model: the embedding and the matching logit are others."""
    model = tiny_objective(name, frames=4, noise=0.3).eval()
    batch = videos_for(tiny_batch(model.config), 4)
    score = [
        model.score(images, batch["input_ids"], batch["attention_mask"])
        for images in (batch["images"], batch["images"].flip(1))
    ]
    for key in score[0]:
        assert (score[0][key] - score[1][key]).abs().max() > 1e-4


def test_more_frames_than_a_model_knows_are_refused():
    """In one sentence, also of a model for pictures."""
    for known, given in ((1, 2), (3, 4)):
        model = tiny_objective("mamo", frames=known)
        batch = videos_for(tiny_batch(model.config), given)
        with pytest.raises(ValueError, match=f"video of {given} frames, and this model was made for {known}"):
            model(batch)


# -------------------------------------------------------------------------------------------------------------- masking


def test_hidden_places_are_the_same_in_all_frames():
    """As patches, and in what is kept, in the same order; together they are all."""
    noise, frames = torch.rand(5, 6), 3
    index, mask = mask_patches(noise, 0.5, frames)
    first, mask_of_one = mask_patches(noise, 0.5)
    assert index.tolist() == [[p + 6 * f for f in range(frames) for p in row] for row in first.tolist()]
    assert torch.equal(mask, mask_of_one.repeat(1, frames))
    dropped, kept = drop_patches(noise, 0.5, frames)
    assert torch.equal(dropped, index)
    assert kept.tolist() == [
        [p + 6 * f for f in range(frames) for p in row] for row in drop_patches(noise, 0.5)[1].tolist()
    ]
    for row in range(5):
        assert sorted([*dropped[row].tolist(), *kept[row].tolist()]) == list(range(18))


def test_units_are_masked_as_their_index_says_in_all_frames():
    """MaskVLM's squares: the mask is where the index points, frame by frame the same."""
    index, mask = mask_units(torch.rand(5, 24), 0.5, (4, 6), 2, frames=3)
    assert torch.equal(mask, torch.zeros(5, 72, dtype=torch.bool).scatter(1, index, True))
    assert torch.equal(mask, mask[:, :24].repeat(1, 3)) and 0 < mask.float().mean() < 1


def test_a_map_by_hiding_hides_windows_in_one_frame_at_a_time():
    """And random places in all of them; every place is hidden by some window."""
    windows, randoms = hiding_masks((4, 6), 128, frames=3)
    frames = windows.view(-1, 3, 24).any(dim=2)
    assert (frames.sum(dim=1) == 1).all() and windows.any(dim=0).all()
    assert len(windows) + len(randoms) == 128 and (randoms.sum(dim=1) == 54).all()


@pytest.mark.parametrize("name, more", [way for way in WAYS if way[0] != "control"])
def test_what_is_hidden_leaks_through_no_frame(name, more):
    """What a student sees of a video with places hidden does not depend on the pixels there, in any frame."""
    model = tiny_objective(name, frames=3, **more)
    config, batch = model.config, videos_for(tiny_batch(model.config), 3)
    videos, noise = batch["images"].requires_grad_(), batch["patch_noise"]
    if name == "mamo":
        mask = mask_patches(noise, config.mask_image, 3)[1]
        words = mask_words(*(batch[key] for key in WORDS), config.mask_text, config)
        seen = [(model.encode_whole_and_masked(batch, mask, words)[0]["masked"], mask)]
    elif name == "maskvlm":
        mask = mask_units(noise, config.mask_image, config.grid, config.mask_unit, 3)[1]
        seen = [(model.encode_image(blank(videos, mask, config.patch_size)), mask)]
    else:
        dropped, kept = drop_patches(noise, config.mask_drop if name == "glscl" else config.mask_image, 3)
        mask = torch.zeros(len(videos), 3 * config.num_patches, dtype=torch.bool).scatter(1, dropped, True)
        seen = [(model.student.image(videos, kept=kept), mask)]
        if name == "glscl":
            mask = mask_patches(noise, config.mask_image, 3)[1]
            seen.append((model.encode_image(videos, mask), mask))
    for encoded, mask in seen:
        (gradient,) = torch.autograd.grad((encoded * torch.randn_like(encoded)).sum(), videos)
        felt = patchify(gradient, config.patch_size).abs().sum(dim=-1) > 0
        assert not felt[mask].any() and felt[~mask].all()


def test_targets_are_those_of_the_hidden_patches_of_their_frames():
    """MIM of pixels, by a loop over frames and patches."""
    model = tiny_objective("mamo", frames=3, mim_target="pixels")
    config, batch = model.config, videos_for(tiny_batch(model.config), 3)
    index, _ = mask_patches(batch["patch_noise"], config.mask_image, 3)
    targets, (rows, columns), p = (
        at(patchify(batch["images"], config.patch_size), index),
        config.grid,
        config.patch_size,
    )
    for row, places in enumerate(index.tolist()):
        for slot, place in enumerate(places):
            frame, patch = divmod(place, rows * columns)
            y, x = divmod(patch, columns)
            pixels = batch["images"][row, frame, :, y * p : (y + 1) * p, x * p : (x + 1) * p]
            assert torch.equal(targets[row, slot], pixels.flatten())


class Straight(nn.Module):
    """In a block's place: what comes in goes out, at the places that are asked for."""

    def forward(self, hidden, attention_mask=None, index=None):
        return hidden if index is None else at(hidden, index)


def straightened(model):
    """The model, with fusion encoders that let everything through: so a loss is given what stands at its places."""
    for module in model.modules():
        if isinstance(module, FusionEncoder):
            module.blocks = nn.ModuleList([Straight()])
            nn.init.zeros_(module.types)
    return model


def given_to(model, monkeypatch, *names: str) -> dict:
    """What the losses of some names are given while the model makes a step."""
    seen = {}
    for name in names:
        monkeypatch.setattr(model, name, lambda *given, name=name: seen.setdefault(name, given)[0].sum())
    return seen


def hidden_at(places: torch.Tensor, encoded: torch.Tensor, frames: int) -> torch.Tensor:
    """By a loop: the vectors of an encoded video at places, the numbers of patches through all frames."""
    return torch.stack([encoded[row, [frames + place for place in some]] for row, some in enumerate(places.tolist())])


def test_mamo_recovers_at_the_hidden_patches_of_their_frames(monkeypatch):
    """MRM and MIM read the student's vectors where patches are hidden, and the teacher's at the same places."""
    model = straightened(tiny_objective("mamo", frames=3))
    batch, seen = videos_for(tiny_batch(model.config), 3), given_to(model, monkeypatch, "loss_mrm", "loss_mim")
    model(batch)
    index, mask = mask_patches(batch["patch_noise"], model.config.mask_image, 3)
    student = hidden_at(index, model.encode_image(batch["images"], mask), 3)
    teacher = hidden_at(index, model.teacher.image(batch["images"]), 3)
    for found, wanted in (
        (seen["loss_mrm"][0], student),
        (seen["loss_mim"][0], student),
        (seen["loss_mrm"][1], nn.functional.layer_norm(teacher, (16,))),
        (seen["loss_mim"][1], nn.functional.layer_norm(teacher, (16,))),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_vlmae_recovers_at_the_dropped_patches_of_their_frames(monkeypatch):
    """A token, its position and its time come in at the place of a dropped patch, and are read there."""
    model = straightened(tiny_objective("vlmae", frames=3))
    model.feature_block, model.feature_head, model.decoder.pixels = Straight(), nn.Identity(), nn.Identity()
    batch, seen = videos_for(tiny_batch(model.config), 3), given_to(model, monkeypatch, "loss_rmim", "loss_ifr")
    model(batch)
    dropped, _ = drop_patches(batch["patch_noise"], model.config.mask_image, 3)
    places = model.student.image.places(3).expand(len(dropped), -1, -1)
    for loss, token in (("loss_rmim", model.pixel_token), ("loss_ifr", model.feature_token)):
        torch.testing.assert_close(seen[loss][0], token + hidden_at(dropped, places, 3), rtol=0, atol=1e-5)
    pixels = patchify(batch["images"], model.config.patch_size)
    assert torch.equal(seen["loss_rmim"][1], hidden_at(dropped, pixels, 0))
    teacher = hidden_at(dropped, model.teacher(batch["images"]), 3)
    torch.testing.assert_close(seen["loss_ifr"][1], teacher, rtol=0, atol=1e-5)


def test_maskvlm_recovers_at_the_blanked_patches_of_their_frames(monkeypatch):
    """The decoder reads all of the fused video, and gives the pixels at the blanked patches."""
    model = straightened(tiny_objective("maskvlm", frames=3))
    model.decoder.pixels = nn.Identity()
    config, batch = model.config, videos_for(tiny_batch(model.config), 3)
    seen = given_to(model, monkeypatch, "loss_mim")
    model(batch)
    index, mask = mask_units(batch["patch_noise"], config.mask_image, config.grid, config.mask_unit, 3)
    encoded = model.encode_image(blank(batch["images"], mask, config.patch_size))
    torch.testing.assert_close(seen["loss_mim"][0], hidden_at(index, encoded, 3), rtol=0, atol=1e-5)
    assert torch.equal(seen["loss_mim"][1], hidden_at(index, patchify(batch["images"], config.patch_size), 0))


def test_glscl_compares_the_mean_of_class_tokens_and_the_hidden_patches(monkeypatch):
    """MGSC takes the mean over frames of both passes; MLTC the patches hidden in I'' and what (I, T') has there."""
    model = straightened(tiny_objective("glscl", frames=3))
    config, batch = model.config, videos_for(tiny_batch(model.config), 3)
    seen = given_to(model, monkeypatch, "loss_mgsc", "loss_mltc")
    model(batch)
    kept = drop_patches(batch["patch_noise"], config.mask_drop, 3)[1]
    index, mask = mask_patches(batch["patch_noise"], config.mask_image, 3)
    visible, whole = model.student.image(batch["images"], kept=kept), model.encode_image(batch["images"])
    for found, encoded in zip(seen["loss_mgsc"][:2], (visible, whole), strict=True):
        torch.testing.assert_close(found, encoded[:, :3].mean(dim=1), rtol=0, atol=1e-5)
    hidden = hidden_at(index, model.encode_image(batch["images"], mask), 3), hidden_at(index, whole, 3)
    for found, wanted in zip(seen["loss_mltc"][:2], hidden, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert seen["loss_mltc"][2].shape == seen["loss_mltc"][3].shape


@pytest.mark.parametrize("more", [{}, {"queue_size": 8}])
def test_contrast_compares_the_mean_of_the_class_tokens_of_all_frames(more, monkeypatch):
    """In training, in parts of a step, in scoring, and of the teacher where there is a queue."""
    model = tiny_objective("mamo", frames=3, **more).eval()
    batch, seen = videos_for(tiny_batch(model.config), 3), given_to(model, monkeypatch, "loss_itc")
    model(batch)

    def embedded(encoders) -> torch.Tensor:
        mean = torch.stack([encoders.image(batch["images"])[:, frame] for frame in range(3)]).mean(dim=0)
        return nn.functional.normalize(encoders.image_projection(mean), dim=-1)

    image, text, _, image_keys, _ = seen["loss_itc"]
    torch.testing.assert_close(image, embedded(model.student), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.features(batch)["image"], image, rtol=0, atol=1e-5)
    candidates = embedded(model.teacher if more else model.student)
    torch.testing.assert_close(image_keys[: len(image)], candidates, rtol=0, atol=1e-5)
    scores = model.score(batch["images"], batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(scores["itc"], (image * text).sum(dim=1), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- rows and frames


def test_frames_are_the_middles_of_equal_segments_or_drawn_from_them():
    """In evaluation always the same; in training one from each segment; of too few some are taken twice."""
    assert (
        choose_frames(9, 1) == [4] and choose_frames(9, 4) == [1, 3, 5, 7] and choose_frames(100, 4) == [12, 37, 62, 87]
    )
    assert choose_frames(1, 4) == [0, 0, 0, 0] and choose_frames(2, 4) == [0, 0, 1, 1]
    rng = np.random.default_rng(0)
    drawn = np.array([choose_frames(10, 4, rng) for _ in range(400)])
    for place, (low, high) in enumerate([(0, 2), (2, 4), (5, 7), (7, 9)]):
        assert set(drawn[:, place]) == set(range(low, high + 1))


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_animated_pictures_and_lists_of_frames_are_one(tmp_path, suffix):
    """The same frames, whichever way they are stored; what the model sees of them too."""
    pictures = [square(number) for number in (0, 5, 10, 15, 20)]
    for number, one in enumerate(pictures):
        one.save(tmp_path / f"{number}.png")
    whole = video_of(write_video(tmp_path / f"all{suffix}", pictures))
    apart = video_of([tmp_path / f"{number}.png" for number in range(5)])
    assert count_frames(whole) == count_frames(apart) == 5
    near = 0 if suffix != ".gif" else 3  # a palette of 256 colours
    for one, two, drawn in zip(load_frames(whole, range(5)), load_frames(apart, range(5)), pictures, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(drawn, int)).max() <= near
        assert np.array_equal(np.asarray(two), np.asarray(drawn))
    found = to_tensor(apart, (16, 24), 2)
    assert found.shape == (2, 3, 16, 24) and torch.equal(found[0], to_tensor(tmp_path / "1.png", (16, 24)))
    assert shown(whole, 3).size[0] > 3 * 24 and shown(whole, 3, apart=False).size == (72, 16)


def test_frames_of_different_sizes_are_understood(tmp_path):
    """Each is scaled as a picture is."""
    square(0).save(tmp_path / "a.png")
    square(0).resize((48, 32)).save(tmp_path / "b.png")
    found = to_tensor(video_of([tmp_path / "a.png", tmp_path / "b.png"]), (16, 24), 2)
    assert found.shape == (2, 3, 16, 24) and (found[0] - found[1]).abs().mean() < 0.05


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"video": "a.webp", "image": "a.png", "caption": "x"}, "both image and video"),
        ({"video": 3, "caption": "x"}, "video is 3: expected the path of an animated picture, or a list of paths"),
        ({"video": [], "caption": "x"}, "expected the path of an animated picture"),
        ({"video": "gone.webp", "caption": "x"}, "gone.webp: missing"),
        ({"video": ["a.png", "gone.png"], "caption": "x"}, "gone.png: missing"),
        ({"video": "text.webp", "caption": "x"}, "text.webp: UnidentifiedImageError"),
    ],
)
def test_a_bad_video_is_told_in_one_sentence(tmp_path, row, sentence):
    """Where, what was found, what was expected."""
    square(0).save(tmp_path / "a.png")
    write_video(tmp_path / "a.webp", [square(0), square(1)])
    (tmp_path / "text.webp").write_text("no picture")
    with pytest.raises(ValueError, match=sentence):
        read_rows([write_rows(tmp_path / "pairs.jsonl", [row])], "pairs")


def test_a_broken_frame_is_found_by_a_full_check_and_named_when_it_is_met(tmp_path):
    """The header of a file that was cut off is whole."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.gif", [Image.fromarray(one) for one in noise])
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) * 2 // 3])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"video": "a.gif", "caption": "x"}] * 2)
    with pytest.raises(ValueError, match=r"a\.gif"):
        read_rows([pairs], "pairs", check="full")
    row = read_rows([pairs], "pairs")[0]
    with pytest.raises(ValueError, match=r"a\.gif"):
        load_frames(row["image"], [5])


def test_grounding_and_reasoning_have_no_videos(tmp_path):
    """Boxes belong to a picture: such a row lacks its image."""
    write_video(tmp_path / "a.webp", [square(0), square(1)])
    rows = write_rows(tmp_path / "g.jsonl", [{"video": "a.webp", "text": "x", "boxes": [[0, 0, 4, 4]]}])
    with pytest.raises(ValueError, match='expected "image"'):
        read_rows([rows], "grounding")


def test_a_long_video_costs_no_more_memory_than_a_short_one(tmp_path, monkeypatch):
    """Of 10,000 frames those are converted that are wanted, and none is kept longer than that."""
    frame = Image.new("P", (8, 8))
    frame.putpalette([0, 0, 0, 255, 255, 255])
    frames = []
    for number in range(200):
        one = frame.copy()
        one.putpixel((number % 8, number // 8 % 8), 1)
        frames.append(one)
    path = tmp_path / "long.gif"
    frames[0].save(path, save_all=True, append_images=(frames[n % 200] for n in range(1, 10_000)), disposal=2)
    converted, real = [], reading_videos.to_rgb
    monkeypatch.setattr(reading_videos, "to_rgb", lambda image: converted.append(1) or real(image))
    name = video_of(path)
    count = count_frames(name)
    assert count > 9_000 and len(load_frames(name, choose_frames(count, 4))) == len(converted) == 4


def test_a_full_check_goes_through_a_video_once(tmp_path, monkeypatch):
    """A frame of an animated picture is decoded from those before it: to begin anew for each takes their square."""
    name, opened, real = video_of(write_video(tmp_path / "a.gif", [square(n) for n in range(12)])), [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **more: opened.append(1) or real(*given, **more))
    assert reading_videos.check_video(name, "full") is None
    assert len(opened) == 3, "its header, how many frames it has, and all of them"


def test_the_index_keeps_which_rows_are_videos(tmp_path, monkeypatch):
    """As with twins: a second start reads it, also where nothing is checked."""
    path = write_videos(tmp_path / "pairs.jsonl", 4)
    square(0).save(tmp_path / "a.png")
    path.write_text(json.dumps({"image": "a.png", "caption": "a"}) + "\n" + path.read_text())
    monkeypatch.setattr(reading, "SAVE_AFTER", -1)
    expected = [False, True, True, True, True]
    for check in ("none", "header", "header", "full"):
        rows = open_rows([path], "pairs", check)
        assert reading.videos_of(rows).tolist() == reading.videos_of(list(rows)).tolist() == expected
    assert (tmp_path / "pairs.jsonl.index").is_file()


def test_a_sample_of_a_video_is_its_own(tmp_path):
    """Frames, masks and the place among others follow from seed, epoch and row; frames are augmented alike."""
    path = write_videos(tmp_path / "pairs.jsonl", 4)
    rows = read_rows([path], "pairs")
    tokenizer = Tokenizer.build(text for row in rows for text in captions_of(row))
    config = tiny_config(frames=4)
    samples = Pairs(rows, tokenizer, config)
    again = Pairs(rows, tokenizer, config)
    for key in ((0, 1), (3, 2)):
        for name, value in samples[key].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[key][name])), name
    assert len({samples[(epoch, 1)]["images"].sum().item() for epoch in range(12)}) > 1, "frames are drawn anew"
    assert len({samples[(0, row)]["image_id"] for row in range(4)}) == 4
    still = write_rows(tmp_path / "still.jsonl", [{"video": ["p.png"] * 4, "caption": "x"}])
    square(3).resize((96, 64)).save(tmp_path / "p.png")
    one = Pairs(read_rows([still], "pairs"), tokenizer, config, augment="photo")[(0, 0)]["images"]
    assert torch.equal(one[0], one[3]), "equal frames stay equal"


# -------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_of_one_kind_and_no_row_is_lost(tmp_path):
    """Pictures and videos in one list: kinds are mixed batch by batch, twins stay together."""
    pictures = write_squares(tmp_path / "pictures.jsonl", 10, twins=4)
    videos = write_videos(tmp_path / "videos.jsonl", 9, twins=6)
    rows = open_rows([pictures, videos], "pairs")
    order = TwinBatches(rows, 4)
    kind = reading.videos_of(rows)
    assert order.batches_per_epoch == 10 // 4 + 9 // 4
    seen, kinds = set(), []
    for epoch in range(8):
        batches = order.epoch(epoch)
        assert len(set(batches.flatten())) == batches.size == 16
        for batch in batches:
            assert len(set(kind[batch])) == 1
            seen |= set(batch)
        kinds.append(tuple(bool(kind[batch[0]]) for batch in batches))
    assert seen == set(range(19)) and len(set(kinds)) > 1
    assert np.array_equal(order.epoch(3), TwinBatches(rows, 4).epoch(3))
    with pytest.raises(ValueError, match="larger than the 9 videos at hand"):
        TwinBatches(rows, 10)


def both_kinds(folder: Path) -> list[str]:
    """A list of data with both kinds."""
    return [str(write_squares(folder / "pictures.jsonl", 16)), str(write_videos(folder / "videos.jsonl", 16))]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pictures_and_videos_train_in_one_run(name, tmp_path):
    """Of every objective; the run's model is for four frames, and evaluates either."""
    pictures, videos = both_kinds(tmp_path)
    unit = ["--image-size", "16", "32"] if name == "maskvlm" else []
    given = ["--objective", name, "--steps", "6", "--batch-size", "8", *unit]
    run = new_run(Path(pictures), tmp_path / "run", "--data", pictures, videos, *given)
    assert run.model.config.frames == 4
    run.train()
    assert all(math.isfinite(float(value)) for row in read_log(tmp_path / "run") for value in row.values())
    pipeline = load(tmp_path / "run" / "checkpoint.pt")
    for path in (pictures, videos):
        found = retrieval(pipeline.model, pipeline.tokenizer, read_rows([path], "pairs"), CPU, k=4)
        assert found["images"] == 16
    with pytest.raises(ValueError, match="16 pictures and 16 videos: evaluate them apart"):
        retrieval(pipeline.model, pipeline.tokenizer, read_rows([pictures, videos], "pairs"), CPU)


def test_two_processes_equal_one_with_batches_of_both_kinds(tmp_path, monkeypatch):
    """The same rows, losses and gradient norms, step by step."""
    pictures, videos = both_kinds(tmp_path)
    given = ["--data", pictures, videos, *["--steps", "8", "--batch-size", "8", "--ema", "0.9", "--lr", "5e-3"]]
    run = one_beside_two(Path(pictures), tmp_path, monkeypatch, *given)
    assert run.step == 8


def test_val_of_both_kinds_is_refused_before_the_first_step(tmp_path):
    """Not after five hundred."""
    pictures, videos = both_kinds(tmp_path)
    with pytest.raises(ValueError, match="evaluate them apart"):
        new_run(Path(pictures), tmp_path / "run", "--data", pictures, "--val", pictures, videos, "--batch-size", "8")
    check_kinds([])


# ---------------------------------------------------------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with videos and a run on them."""
    folder = tmp_path_factory.mktemp("videos")
    run = new_run(write_videos(folder / "pairs.jsonl", 16), folder / "run", "--batch-size", "8")
    run.train(stop_at=2)
    return folder


def test_commands_take_videos(trained, command):
    """retrieval with fewer frames, foils, search with a sheet, score and explain of one."""
    checkpoint, pairs = ("--checkpoint", trained / "run" / "checkpoint.pt"), ("--data", trained / "pairs.jsonl")
    assert "16 pictures" in command("retrieval", *checkpoint, *pairs, "--frames", 1)[1]
    rows = [json.loads(line) | {"foils": {"order": "a red square"}} for line in pairs[1].read_text().splitlines()]
    assert "order" in command("foils", *checkpoint, "--data", write_rows(trained / "foils.jsonl", rows))[1]
    found = command("search", *checkpoint, *pairs, "--text", "a square", "--figure", trained / "s.png")[1]
    assert "videos/00.webp" in found and "video:" not in found
    video = ["--video", trained / "videos" / "00.webp", "--text", "a red square"]
    assert "cosine" in command("score", *checkpoint, *video)[1]
    for kind in ("hiding", "gradcam"):
        out = trained / f"{kind}.png"
        command("explain", *checkpoint, *video, "--out", out, "--map", kind)
        with Image.open(out) as sheet:
            assert sheet.width > 4 * 2 * 320, "four frames, each beside its map"
    status, _, errors = command("retrieval", *checkpoint, *pairs, "--frames", 8)
    assert status and "a video of 8 frames, and this model was made for 4" in errors


def test_the_page_shows_a_strip_of_frames_with_a_map_over_it(trained, monkeypatch):
    """The frames that the model sees side by side, without gaps, and the map's places in the same order."""
    out = trained / "page.html"
    given = ["--checkpoint", trained / "run" / "checkpoint.pt", "--data", trained / "pairs.jsonl", "--out", out]
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, given), "--pictures", "6", "--passes", "16"])
    report.main()
    page = json.loads(re.search(r"<script[^>]*>(.*?)</script>", out.read_text(), re.S)[1])
    assert page["map"]["grid"] == [2, 4 * 3] and "pictures" in page["recovered"]["why"]
    assert all(picture["width"] == 4 * 24 for picture in page["pictures"])
    maps = [answer["maps"] for query in page["galleries"]["image_to_text"] for answer in query["answers"]]
    assert maps and all(len(base64.b64decode(one)) % (2 * 4 * 3) == 0 for one in maps)
    ordered = torch.arange(24.0)[None]  # frame, row, column
    said = list(base64.b64decode(report.packed(ordered, (2, 3))))
    wanted = [255 * (6 * f + 3 * y + x) / 23 for y in range(2) for f in range(4) for x in range(3)]
    assert said == [round(value) for value in wanted]


def test_a_video_has_a_heat_for_each_frame(trained):
    """From Python, as several pictures have."""
    pipeline = load(trained / "run" / "checkpoint.pt")
    heats = pipeline.heat(video_of(trained / "videos" / "00.webp"), "a red square", how=How(passes=32))
    assert len(heats) == 4 and all(heat.values.shape == (2, 3) for heat in heats)


def test_questions_about_videos_are_answered_from_a_checkpoint_of_pictures_too(trained, tmp_path, command):
    """The head of vqa; a checkpoint of pictures learns the times of frames anew."""
    rows = [
        {"video": str(trained / "videos" / f"{number:02d}.webp"), "question": "where?", "answers": {answer: 1.0}}
        for number, answer in zip(range(16), ["left", "right"] * 8, strict=True)
    ]
    data = write_rows(tmp_path / "vqa_train.jsonl", rows)
    new_run(write_squares(tmp_path / "pairs.jsonl", 16), tmp_path / "pictures").train(stop_at=1)
    for start in (trained / "run", tmp_path / "pictures"):
        given = [
            "--init",
            start / "checkpoint.pt",
            "--data",
            data,
            "--out",
            tmp_path / f"of-{start.name}",
            "--steps",
            2,
        ]
        run = start_task(*parse_task(["vqa", *map(str, given), "--batch-size", "4", "--val-share", "0.25"]))
        run.train()
        assert run.model.config.frames == 4 and run.step == 2
        sheet = run.out / "sheet.png"
        evaluated = command("vqa", "--checkpoint", run.out / "checkpoint.pt", "--data", data, "--figure", sheet)
        assert "accuracy" in evaluated[1] and sheet.is_file()
        assert ("student.image.times" in run.fresh) == (start.name == "pictures")


# ----------------------------------------------------------------------------------------------------- the moving world


def test_only_time_tells_in_the_moving_world():
    """A video and its like backwards are the same frames in the other order, and a foil of direction, mover or order is
    a caption of such a video: so neither one frame, the middle one, nor all without their order can tell."""
    rng, kinds = random.Random(0), {}
    for number in range(400):
        meaning = moving.draw_meaning(rng)
        other = moving.backwards(meaning)
        assert moving.backwards(other) == meaning
        ahead, back = moving.frames(meaning, str(number)), moving.frames(other, str(number))
        assert len(ahead) == moving.FRAMES and ahead[0].shape == (32, 32, 3)
        if not isinstance(meaning, moving.Passes):
            assert all(map(np.array_equal, ahead, reversed(back)))
        for kind, foil in moving.foils_of(meaning).items():
            assert foil != moving.words(meaning)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kind == "mover":
                assert same_claim(foil, moving.words(other))
            elif kind in ("direction", "order"):
                assert foil == moving.words(other)
    assert set(kinds) == {"direction", "mover", "order", "path", "passer", "change"} and min(kinds.values()) > 20


def same_claim(one: str, other: str) -> bool:
    """Whether two captions of two movers say the same, whichever comes first."""
    return sorted(one.split(" and ")) == sorted(other.split(" and "))


def test_the_moving_world_is_written_with_twins_and_its_videos_are_whole(tmp_path):
    """Every row can be read, every video has all its frames, and twins tell different things of the same objects."""
    moving.main(["--out", str(tmp_path / "m"), "--train", "12", "--val", "4", "--test", "6"])
    rows = read_rows([tmp_path / "m" / "pairs_train.jsonl"], "pairs", check="full")
    assert len(rows) == 12 and {count_frames(row["image"]) for row in rows} == {moving.FRAMES}
    for one, twin in zip(rows[::2], rows[1::2], strict=True):
        assert one["twin"] == twin["twin"] and one["caption"] != twin["caption"]
    for split, size in (("val", 4), ("test", 6)):
        assert len(read_rows([tmp_path / "m" / f"foils_{split}.jsonl"], "foils")) == size
        assert len(read_rows([tmp_path / "m" / f"vqa_{split}.jsonl"], "vqa")) == size


def test_frames_of_a_batch():
    """Pictures have one, whatever their size."""
    assert frames_of(torch.zeros(2, 3, 8, 8)) == 1 and frames_of(torch.zeros(2, 5, 3, 8, 8)) == 5
