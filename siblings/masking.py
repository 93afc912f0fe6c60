"""Code that the sibling objectives share and MAMO does not use: other masking schemes, and other prediction targets.

    mask      blank     set the pixels of masked patches to grey before the image encoder            MaskVLM
              words     mask whole words: all pieces of a word or none                               GLSCL
    recover   pixels    predicted by a decoder that is discarded after pre-training                  MaskVLM, VLMAE
              vectors   predicted contrastively: which of all candidates belongs here?               GLSCL

Shapes use the letters of mamo.py, plus k patches that are kept and r rows that are compared.
"""

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mamo import (
    Config,
    FusionEncoder,
    MaskedWords,
    View,
    VisionLanguageModel,
    choose_words,
    frames_of,
    gather,
    global_mean,
    in_frames,
    mask_patches,
    rank_and_size,
    replace_words,
    same_pairs,
)

# --------------------------------------------------------------------------------------------------------------- mask


def mask_units(
    patch_noise: Tensor, ratio: float, grid: tuple[int, int], unit: int, frames: int = 1
) -> tuple[Tensor, Tensor]:
    """As mask_patches, but squares ("units") of unit x unit patches are masked as a whole.

    Args:    patch_noise (b, n)   uniform noise; a unit uses the noise of its first patch
             ratio                fraction of units to mask
             grid                 number of rows and columns of patches, both multiples of unit
    Returns: patch_index (b, m)   the masked patches, unit by unit, by increasing noise
             patch_mask  (b, n)   the same as a mask, True = masked
    """
    sides = {"y": grid[0] // unit, "u": unit, "v": unit}
    unit_noise = rearrange(patch_noise, "b (y u x v) -> b (y x) (u v)", **sides)[..., 0]
    unit_index, unit_mask = mask_patches(unit_noise, ratio)
    patches = torch.arange(patch_noise.shape[1], device=patch_noise.device)
    patches_of_unit = rearrange(patches, "(y u x v) -> (y x) (u v)", **sides)
    patch_index = rearrange(patches_of_unit[unit_index], "b k patches -> b (k patches)")
    patch_index = in_frames(patch_index, patch_noise.shape[1], frames)
    return patch_index, repeat(unit_mask, "b (y x) -> b (f y u x v)", f=frames, **sides)


def blank(images: Tensor, patch_mask: Tensor, patch_size: int) -> Tensor:
    """images (b, 3, height, width), or videos (b, f, 3, height, width) -> the same, with the pixels of the patches that
    are masked in patch_mask (b, n) set to 0, mid grey"""
    return images.masked_fill(in_pixels(patch_mask, images, patch_size), 0.0)


def in_pixels(patch_mask: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """patch_mask (b, n) -> mask of the pixels of images in masked patches: (b, 1, height, width) or, for videos,
    (b, f, 1, height, width)"""
    sides = {"f": frames_of(images), "y": images.shape[-2] // patch_size, "p": patch_size, "q": patch_size}
    pixels = repeat(patch_mask, "b (f y x) -> b f 1 (y p) (x q)", **sides)
    return pixels if images.ndim == 5 else pixels[:, 0]


def mask_whole_words(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_noise: Tensor,
    replace_noise: Tensor,
    ratio: float,
    config: Config,
    continues: Tensor,
) -> MaskedWords:
    """As mask_words, but all pieces of a word are masked together. continues (b, l): True = continues a word (##).

    The ratio counts pieces: words are chosen by increasing noise; as in BERT, a word that no longer fits is skipped.
    If no word fits, as many pieces of the first word are masked as allowed; no other word is ever partially masked.
    Replacements are sampled per piece.
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    word = torch.where(continues, 0, place).cummax(dim=1).values  # (b, l) first position of each token's word
    special = torch.tensor(config.special_ids, device=input_ids.device)
    ordinary = attention_mask & ~torch.isin(input_ids, special)
    pieces = torch.zeros_like(input_ids).scatter_add(1, word, ordinary.long())  # per word, at its first piece
    left = (ratio * ordinary.sum(dim=1, keepdim=True) - 1e-4).ceil()  # as in choose_words
    taken = torch.zeros_like(ordinary)
    for start in token_noise.argsort(dim=1, stable=True).split(1, dim=1):
        count = pieces.gather(1, start)
        fits = (count > 0) & (count <= left)
        left, taken = left - fits * count, taken.scatter(1, start, fits)
    whole = taken.gather(1, word)
    noise = token_noise.gather(1, word) - whole.float()  # chosen words precede all others
    index, valid = choose_words(input_ids, attention_mask, noise, ratio, config)
    valid = valid & (whole.gather(1, index) | ~whole.any(dim=1, keepdim=True))
    return replace_words(input_ids, index, valid, replace_noise, config)


# --------------------------------------------------------------------------------------------------------- whole pairs


def whole_pairs(
    model: VisionLanguageModel, image: Tensor | None, text: Tensor | None, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, View], Tensor | None]:
    """Process encoded whole pairs, images (b, 1 + n, d) and texts (b, l, d), as in MAMO.forward; used by all siblings.

    Returns: the contrastive loss, by name; the views to fuse for matching; and valid, see matching_views
    """
    losses, views, similarity, valid = {}, {}, None, None
    if model.config.w_itc > 0:
        losses["itc"], similarity = model.contrast(image, text, batch)
    if model.config.w_itm > 0:
        pair = View(image, text, batch["attention_mask"])
        views, valid = model.matching_views(pair, similarity, same_pairs(batch), batch["negative_noise"])
    return losses, views, valid


def matched(fused: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The fused views of matching_views -> pair vectors for loss_itm, positive (b, d) and negative (2b, d)"""
    return fused["pair"][:, 0], torch.cat([fused["wrong text"][:, 0], fused["wrong image"][:, 0]])


# ------------------------------------------------------------------------------------------------------------ recover


class PixelDecoder(nn.Module):
    """Predicts the pixels of masked patches from an image and a text: additional fusion blocks and a linear layer."""

    def __init__(self, config: Config, depth: int):
        super().__init__()
        self.stream = FusionEncoder(dataclasses.replace(config, fusion_depth=depth))
        self.pixels = nn.Linear(config.width, 3 * config.patch_size**2)

    def forward(
        self, image: Tensor, text: Tensor, attention_mask: Tensor, patch_index: Tensor, frames: int = 1
    ) -> Tensor:
        """image (b, 1 + n, d), text (b, l, d), attention_mask (b, l) -> pixels (b, m, 3 * patch_size ** 2) at the
        masked patches, patch_index (b, m)"""
        places = self.stream.at_patches(patch_index, text.shape[1], frames)
        (fused,) = self.stream.fuse_views(View(image, text, attention_mask, places))
        return self.pixels(fused)


def nce(prediction: Tensor, target: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Contrast of vectors with their own targets among those of all processes, in both directions.     (GLSCL; InfoNCE)

    L = - mean log softmax_j(cos(p_i, t_j) / temperature)[i] - mean log softmax_j(cos(p_j, t_i) / temperature)[i]

    Args:    prediction, target (b, d) or (b, m, d)   no gradient reaches the target
             valid (b, m)                             True = a position to predict; all others are no candidates
    Returns: scalar, the sum over both directions; chance level: 2 ln(candidates)
    """
    if valid is None:
        valid = torch.ones(prediction.shape[:-1], dtype=torch.bool, device=prediction.device)
    valid = valid.flatten()
    # fp32: dividing by the temperature turns a difference of 0.01 between cosines into 0.3.
    with torch.autocast(prediction.device.type, enabled=False):
        exact = torch.promote_types(prediction.dtype, torch.float32)
        ours = F.normalize(prediction.to(exact).reshape(len(valid), -1), dim=-1)
        theirs = F.normalize(target.detach().to(exact).reshape(len(valid), -1), dim=-1)
        own, (all_ours, all_theirs, candidate) = among_all(ours, theirs, valid)
        loss = torch.zeros_like(ours[:, 0])
        for queries, keys in ((ours, all_theirs), (theirs, all_ours)):
            logits = (queries @ keys.T / temperature).masked_fill(~candidate, -1e4)  # finite: every row has a candidate
            loss = loss + F.cross_entropy(logits, own, reduction="none")
        return global_mean(loss, valid)


def among_all(ours: Tensor, theirs: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gather rows (r, d), (r, d), (r,) from all processes, each of which may have a different number r of rows.

    Returns: own (r,), the indices of this process's rows among all; the three gathered tensors; padding is not valid
    """
    rank, processes = rank_and_size()
    if processes == 1:
        return torch.arange(len(valid), device=valid.device), [ours, theirs, valid]
    most = torch.tensor(len(valid), device=valid.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    fill = (0, int(most) - len(valid))
    gathered = [gather(F.pad(rows, (0, 0, *fill))) for rows in (ours, theirs)]
    candidate = gather(F.pad(valid.float(), fill)) > 0
    return torch.arange(len(valid), device=valid.device) + rank * int(most), [*gathered, candidate]
