"""MAMO: masked multimodal modelling for fine-grained vision-language pre-training, in one file.

The paper: Zhao et al., "MAMO", SIGIR 2023, arXiv 2210.04183. The base it builds on: ALBEF, arXiv 2107.07651.

The idea. Take an image-text pair (I, T). Hide 75 % of the patches (I') or 25 % of the words (T'), by default
never both at once, and recover what is hidden from the other modality:

    implicitly   MRM   masked representation modelling: the fused vectors of a moving-average teacher on (I, T)
    explicitly   MIM   masked image modelling: the teacher's visual features of the masked patches
                 MLM   masked language modelling: the masked words themselves
    as well as   ITC   image-text contrast between whole images and whole texts
                 ITM   image-text matching: does this text belong to this image?

How to read it. From top to bottom: the configuration, the three encoders, the joint masking, what every objective needs
(ITC, ITM, MLM), and finally MAMO itself, whose `forward` is the paper's pipeline in the paper's order. If you know
transformers, begin there. The file imports no other module of this project. Noise in the batch decides what is masked
and which negatives are drawn (data.py makes it for the masks, train.py for the negatives), so a loss is a plain
function of parameters and batch. Only initial weights, and dropout if it is on, are drawn in this file.

Two marks in comments and docstrings:
    differs:   the paper does this differently, or does not say how, and this is our choice
    fp32:      stays in single precision when the rest runs in bf16 or fp16 (train.py --precision), and why

One letter, one meaning, in shapes and einops patterns:
    b batch, n patches (or positions of any sequence), l text tokens, m selected positions: masked patches or, as m',
    masked words; d width, e joint embedding, h heads, v vocabulary; f frames of a video

A picture is a video of one frame. Where a shape says 1 + n, for the class token and the patches of a picture, a video
has f + f * n: the class tokens of its frames, then the patches of the first frame, of the second, and so on.
"""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """The shape of the model and the weights of the losses that every objective has. Saved in the checkpoint."""

    image_size: tuple[int, int] = (32, 32)  # height and width of the picture in pixels
    patch_size: int = 8  # side of a square patch in pixels
    frames: int = 1  # largest number of frames to look at in a video; 1 = pictures only
    max_tokens: int = 32  # longest text in tokens, including [CLS] and [SEP]
    width: int = 64  # width d of all three encoders
    heads: int = 4  # attention heads per block
    text_heads: int = 0  # attention heads per block of text and fusion encoder; 0 = same as heads
    clip_image: bool = False  # build the image encoder like CLIP's: with a norm before the blocks and quick GELU
    image_depth: int = 3  # blocks of the image encoder
    text_depth: int = 2  # blocks of the text encoder
    fusion_depth: int = 2  # blocks of the fusion encoder
    embed_dim: int = 64  # width e of the joint embedding in which ITC compares
    dropout: float = 0.0  # dropout on each residual branch
    position_scale: float = 1.0  # initial amplitude of the patches' positions, as a multiple of initial_scale
    w_itc: float = 1.0  # weight of image-text contrast; a loss of weight 0 costs nothing
    w_itm: float = 1.0  # weight of image-text matching
    w_mlm: float = 1.0  # weight of masked language modelling
    albef_negatives: bool = False  # draw ITM's hard negatives as ALBEF does: harder ones, from all candidates
    vocab_size: int = 109  # set from the tokenizer; 109 tokens spell every ASCII word, see Tokenizer.build
    mask_id: int = 4  # id of [MASK], set from the tokenizer
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 4)  # ids that are never masked, set from the tokenizer

    def __post_init__(self):
        self.image_size, self.special_ids = tuple(self.image_size), tuple(self.special_ids)
        if len(self.image_size) == 1:
            self.image_size *= 2  # one number means a square
        self.check()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number n of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def vit_eps(self) -> float:
        """Epsilon of the image encoder's layer norms."""
        return 1e-5 if self.clip_image else 1e-6

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss in the total: the fields w_*."""
        return {field.name[2:]: getattr(self, field.name) for field in fields(self) if field.name.startswith("w_")}

    @property
    def shares(self) -> list[str]:
        """Names of the fields that hold mask ratios."""
        return [field.name for field in fields(self) if field.name.startswith("mask_") and field.type is float]

    # Which passes a step needs (steps 2 and 5 of MAMO.forward): a loss of weight 0 costs no pass and no head.
    @property
    def sees_whole(self) -> bool:
        """Whether any loss needs the student's (I, T)."""
        return self.w_itc > 0 or self.w_itm > 0

    @property
    def masks_patches(self) -> bool:
        """Whether any loss needs an image with masked patches."""
        return False

    @property
    def masks_words(self) -> bool:
        """Whether any loss needs a text with masked words."""
        return self.w_mlm > 0

    @property
    def fuses(self) -> bool:
        """Whether any loss needs the fusion encoder."""
        return self.w_itm > 0 or self.masks_patches or self.masks_words

    def check(self) -> None:
        """Raise ValueError, in one sentence, for values that make no model. Objectives add their own rules."""
        size, p = self.image_size, self.patch_size
        require(
            len(size) == 2 and p > 0, f"image_size {size}, patch_size {p}: give height and width, and a patch from 1"
        )
        for side in size:
            near = " or ".join(str(s) for s in (side // p * p, side // p * p + p) if s)
            require(side % p == 0, f"image_size {side} is not a multiple of patch_size {p}: use {near}")
        require(self.num_patches > 1, f"a picture of {size} is one patch of {p}: use smaller patches")
        for name in ("width", "heads", "embed_dim", *DEPTHS):
            value = getattr(self, name)
            require(0 < value <= 2**15, f"{name} is {value}: it must be at least 1, and at most {2**15}")
        require(0 < self.frames <= 2**10, f"frames is {self.frames}: it must be at least 1, and at most {2**10}")
        longest = self.max_tokens
        require(2 <= longest <= 2**15, f"max_tokens is {longest}: it must be at least 2, for [CLS] and [SEP]")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}: give a share from 0 to below 1")
        scale = self.position_scale
        require(0 < scale <= 2**15, f"position_scale is {scale}: it must be above 0, and at most {2**15}")
        fits = self.width % self.heads == 0 and self.width % 4 == 0
        require(fits, f"width {self.width} must be a multiple of heads ({self.heads}) and of 4: change one of them")
        fits = self.text_heads >= 0 and self.width % (self.text_heads or 1) == 0
        require(fits, f"width {self.width} must be a multiple of text_heads ({self.text_heads}): change one of them")
        ids = self.mask_id, *self.special_ids
        known = min(ids) >= 0 and max(ids) < self.vocab_size and self.special_ids
        require(known, f"vocab_size is {self.vocab_size}: set it to the length of the tokenizer's vocabulary")
        parameters = 12 * self.width**2 * (self.image_depth + self.text_depth + self.fusion_depth)
        require(parameters <= 2**33, f"blocks of {parameters:.1g} parameters: take a smaller width, or fewer blocks")
        require(self.num_patches <= 2**14, f"a picture of {size} has {self.num_patches} patches: use larger ones")
        for name, weight in self.loss_weights.items():
            require(weight >= 0, f"w_{name} is {weight}: a weight is 0 or more")
        names = ", ".join(f"w_{name}" for name in self.loss_weights)
        require(any(self.loss_weights.values()), f"every loss has weight 0: give at least one of {names} a weight")
        for name in self.shares:
            share = getattr(self, name)
            require(0 < share < 1, f"{name} is {share}: give a share between 0 and 1, both excluded")


def require(holds: bool, otherwise: str) -> None:
    """Raise ValueError with the sentence `otherwise` unless the condition holds."""
    if not holds:
        raise ValueError(otherwise)


@dataclass
class MAMOConfig(Config):
    """What MAMO adds. Eq. 6 of the paper gives all five losses the weight 1."""

    mask_image: float = 0.75  # share of the patches masked in I'
    mask_text: float = 0.25  # share of the words masked in T'
    drop_masked: bool = False  # masked patches skip the image encoder, as in MAE; fusion sees mask tokens instead
    mask_both: bool = False  # mask both at once: one pass (I', T') instead of (I', T) and (I, T')
    w_mrm: float = 1.0  # weight of masked representation modelling
    w_mim: float = 1.0  # weight of masked image modelling
    mim_target: str = "features"  # what MIM recovers: features of the teacher's image encoder, or pixels
    queue_size: int = 0  # past teacher embeddings kept as additional ITC candidates; 0 = this batch only
    ema: float = 0.995  # momentum of the teacher; by default train.py sets it by the length of the run, see ema_for

    @property
    def masks_patches(self) -> bool:
        """Whether any loss needs I'."""
        return self.w_mrm > 0 or self.w_mim > 0

    @property
    def masks_words(self) -> bool:
        """Whether any loss needs T'."""
        return self.w_mrm > 0 or self.w_mlm > 0

    @property
    def sees_image(self) -> bool:
        """Whether any loss needs the student's whole image: in (I, T) or in (I, T')."""
        return self.sees_whole or (self.masks_words and not self.mask_both)

    @property
    def sees_text(self) -> bool:
        """Whether any loss needs the student's whole text: in (I, T) or in (I', T)."""
        return self.sees_whole or (self.masks_patches and not self.mask_both)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss needs the teacher."""
        return self.w_mrm > 0 or (self.w_mim > 0 and self.mim_target == "features") or self.queue_size > 0

    def check(self) -> None:
        """Config.check, then MAMO's own rules."""
        super().check()
        target, size = self.mim_target, self.queue_size
        require(target in ("features", "pixels"), f"unknown mim_target {target!r}: use features or pixels")
        both = self.masks_patches and self.masks_words
        require(both or not self.mask_both, "mask_both: give w_mrm a weight, or both w_mim and w_mlm")
        fits = size == 0 or (0 < size <= 2**20 and self.w_itc > 0)
        require(fits, f"queue_size is {size}: it must be from 0 to {2**20}, and 0 without ITC (w_itc 0)")
        require(0 <= self.ema <= 1, f"ema is {self.ema}: give the teacher a momentum in [0, 1]")


# `nano` is for the demo on two CPU cores; `tiny` for drawings on a laptop; `small` is ViT-S/16 and MiniLM, with as many
# fusion as text blocks; `base`, the size in the paper, is ViT-B/16 and BERT-base split into 6 text and 6 fusion blocks.
DEPTHS = ("image_depth", "text_depth", "fusion_depth")
SIZES = ("image_size", "patch_size", "width", "heads", "text_heads", *DEPTHS, "embed_dim")
PRESETS = {
    name: dict(zip(SIZES, row, strict=True))
    for name, *row in (
        ("nano", (32, 32), 8, 64, 4, 0, 3, 2, 2, 64),
        ("tiny", (64, 64), 8, 128, 4, 0, 4, 3, 3, 128),
        ("small", (224, 224), 16, 384, 6, 12, 12, 6, 6, 256),
        ("base", (256, 256), 16, 768, 12, 0, 12, 6, 6, 256),
    )
}


def ema_for(steps: int) -> float:
    """Momentum of the teacher for a run of this many steps: a half-life of 1.5 % of the run, and at most 0.995.

    differs: the paper's momentum is not known to us. ALBEF uses 0.995, which makes the teacher too slow in a short run.
    """
    return min(max(1 - 0.69 / (0.015 * max(steps, 1)), 0.0), 0.995)


# -------------------------------------------------------------------------------------------- blocks of a transformer


class Attention(nn.Module):
    """Multi-head attention of queries over a sequence. It can record its maps, see record_attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.recorded: list[Tensor] | None = None  # a list while maps are recorded

    def forward(self, queries: Tensor, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """queries (b, m, d), hidden (b, n, d), attention_mask (b, n), True = real token -> (b, m, d)"""
        boolean = attention_mask is None or attention_mask.dtype == torch.bool  # torch would add numbers as a bias
        require(boolean, "attention_mask holds numbers: give bool, True = real token (mask.bool())")
        q = rearrange(self.query(queries), "b m (h d) -> b h m d", h=self.heads)
        k, v = rearrange(self.key_value(hidden), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        key_mask = None if attention_mask is None else rearrange(attention_mask, "b n -> b 1 1 n")
        if self.recorded is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        else:  # the same in explicit steps, because the fused kernel never forms the attention map
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if key_mask is not None:
                logits = logits.masked_fill(~key_mask, float("-inf"))
            attention_map = logits.softmax(dim=-1)
            self.recorded.append(attention_map)
            mixed = attention_map @ v
        return self.out(rearrange(mixed, "b h m d -> b m (h d)"))


@contextmanager
def record_attention(*modules: nn.Module):
    """Inside the `with` block, every Attention in the modules records its maps, in order.

    Yields a list of lists: one list per Attention, one map (b, h, queries, n) per call.
    """
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, Attention)]
    for layer in layers:
        layer.recorded = []
    try:
        yield [layer.recorded for layer in layers]
    finally:
        for layer in layers:
            layer.recorded = None


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(...) -> (...)"""
        return hidden * (1.702 * hidden).sigmoid()


BERT_EPS = 1e-12  # of BERT's layer norms; ViT uses 1e-6, CLIP 1e-5. Published weights need their own.


class Block(nn.Module):
    """Transformer block, with the norm before each branch (ViT) or after each sum (BERT)."""

    def __init__(self, config: Config, norm_first: bool):
        super().__init__()
        d, clip = config.width, norm_first and config.clip_image
        eps, heads = (config.vit_eps, config.heads) if norm_first else (BERT_EPS, config.text_heads or config.heads)
        self.norm_first = norm_first
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)
        self.attention = Attention(d, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), QuickGELU() if clip else nn.GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """hidden (b, n, d), attention_mask (b, n), True = real token -> (b, n, d)

        With index (b, m), the output is computed at those positions only, (b, m, d). They attend to all n.
        """
        rows = hidden if index is None else at(hidden, index)
        if self.norm_first:
            keys = self.norm1(hidden)
            queries = keys if index is None else self.norm1(rows)
            rows = rows + self.dropout(self.attention(queries, keys, attention_mask))
            return rows + self.dropout(self.mlp(self.norm2(rows)))
        rows = self.norm1(rows + self.dropout(self.attention(rows, hidden, attention_mask)))
        return self.norm2(rows + self.dropout(self.mlp(rows)))


def at(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden (b, n, d), index (b, m) -> (b, m, d): in each row, the vectors at those positions."""
    return hidden.gather(1, repeat(index, "b m -> b m d", d=hidden.shape[-1]))


def sine_code(places: Tensor, width: int) -> Tensor:
    """Sine-cosine code of places (n,) on one axis -> (n, width), values in [-1, 1]. Near places have similar codes."""
    frequencies = 10000 ** (-torch.arange(width // 2) / (width // 2))
    angles = places[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def initial_scale(width: int) -> float:
    """Initial amplitude of positions and initial standard deviation of words; 0.3 for a width of 64.

    Words and positions are added, so they need the same scale. On the built-in world, a model with small random
    positions did not learn "left of". With words at BERT's 0.02 and positions at this scale, it recognised foils with
    exchanged colours in 53 % after 1,000 steps (chance 50); with both at this scale, in 92 % (contrast, one seed).
    From few pairs, it learns places better still with position_scale 10 (docs/results.md).
    """
    return 2.4 / math.sqrt(width)


# ------------------------------------------------------------------------------------------------- the three encoders


class ImageEncoder(nn.Module):
    """ViT: patch embedding, class token, positions, pre-norm blocks, final norm."""

    def __init__(self, config: Config):
        super().__init__()
        d, p, (rows, columns) = config.width, config.patch_size, config.grid
        self.patch_size, self.image_size = p, config.image_size
        self.patch_embedding = nn.Linear(3 * p * p, d)  # a convolution with kernel and stride p, as a matrix product
        self.class_token = nn.Parameter(torch.zeros(d))
        self.mask_token = nn.Parameter(torch.zeros(d)) if config.masks_patches else None
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        code = torch.cat([sine_code(y.flatten(), d // 2), sine_code(x.flatten(), d // 2)], dim=1)
        scale = initial_scale(d) * config.position_scale
        self.positions = nn.Parameter(scale * torch.cat([torch.zeros(1, d), code]))  # learned from here
        times = sine_code(torch.arange(config.frames), d)
        later = initial_scale(d) * (times[1:] - times[:1])  # zero for the first frame, so one frame is a picture
        self.times = nn.Parameter(later) if config.frames > 1 else None
        self.norm_before = nn.LayerNorm(d, eps=config.vit_eps) if config.clip_image else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, norm_first=True) for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(d, eps=config.vit_eps)

    def forward(self, images: Tensor, patch_mask: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """images (b, 3, height, width) -> (b, 1 + n, d), class token first; videos (b, f, 3, height, width) ->
        (b, f + f * n, d), the class tokens of all frames first.

        Args:    patch_mask (b, n)   True = masked: a learned token replaces the patch; the sequence keeps its length
                 kept (b, k)         only these patches enter the blocks -> (b, 1 + k, d), see put_back; in a video, the
                                     same number of each frame
        differs: the paper does not say how a patch is masked. Here it is after the patch embedding, before positions.
        """
        if tuple(images.shape[-3:]) != (3, *self.image_size) or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: expected floats in [-1, 1] of shape "
                f"(b, 3, {self.image_size[0]}, {self.image_size[1]}), see to_tensor of data.py"
            )
        frames = frames_of(images)
        hidden = self.patch_embedding(patchify(images, self.patch_size))
        if patch_mask is not None:
            hidden = torch.where(patch_mask[..., None], self.mask_token.to(hidden.dtype), hidden)
        class_tokens = repeat(self.class_token, "d -> b f d", b=len(images), f=frames)
        hidden = torch.cat([class_tokens, hidden], dim=1) + self.places(frames)
        if kept is not None:
            hidden = at(hidden, with_class_tokens(kept, frames))
        hidden = self.norm_before(hidden)
        for block in self.blocks:
            hidden = block(hidden) if frames == 1 else by_frame(block, hidden, frames)
        return self.norm(hidden)

    def places(self, frames: int = 1) -> Tensor:
        """Embedding of where and when a token stands -> (f + f * n, d): its position plus the time of its frame."""
        if self.times is None and frames == 1:
            return self.positions
        most = 1 if self.times is None else 1 + len(self.times)
        require(0 < frames <= most, f"a video of {frames} frames, and this model was made for {most}: see --frames")
        times = rearrange(F.pad(self.times, (0, 0, 1, 0))[:frames], "f d -> f 1 d")
        class_tokens, patches = (self.positions + times).split([1, len(self.positions) - 1], dim=1)
        return torch.cat([rearrange(part, "f n d -> (f n) d") for part in (class_tokens, patches)])


def by_frame(block: Block, hidden: Tensor, frames: int) -> Tensor:
    """Apply a block to videos, hidden (b, f + f * n, d): patches attend to their own frame, class tokens to all frames.

    The cost is roughly linear in the number of frames, not quadratic. Source: SCL's code, "flexible vision encoder".
    """
    class_tokens, patches = hidden[:, :frames], hidden[:, frames:]
    own = rearrange(class_tokens, "b f d -> (b f) 1 d"), rearrange(patches, "b (f n) d -> (b f) n d", f=frames)
    patches = block(torch.cat(own, dim=1))[:, 1:]  # each frame as a picture
    index = torch.arange(frames, device=hidden.device).expand(len(hidden), -1)
    return torch.cat([block(hidden, index=index), rearrange(patches, "(b f) n d -> b (f n) d", f=frames)], dim=1)


def frames_of(images: Tensor) -> int:
    """Number f of frames of videos (b, f, 3, height, width); 1 of pictures (b, 3, height, width)."""
    return images.shape[1] if images.ndim == 5 else 1


def with_class_tokens(kept: Tensor, frames: int = 1) -> Tensor:
    """kept (b, k), numbers of patches -> (b, f + k): places of the class tokens, then of those patches."""
    class_tokens = torch.arange(frames, device=kept.device).expand(len(kept), -1)
    return torch.cat([class_tokens, frames + kept], dim=1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """images (b, 3, height, width) -> (b, n, 3 * patch_size ** 2): the pixels of each patch, row by row, and in videos
    frame by frame."""
    videos = images if images.ndim == 5 else images[:, None]
    return rearrange(videos, "b f c (y p) (x q) -> b (f y x) (c p q)", p=patch_size, q=patch_size)


class TextEncoder(nn.Module):
    """The lower half of BERT: words and positions, norm, post-norm blocks."""

    def __init__(self, config: Config):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(
            initial_scale(config.width) * sine_code(torch.arange(config.max_tokens), config.width)
        )
        self.norm = nn.LayerNorm(config.width, eps=BERT_EPS)
        self.blocks = nn.ModuleList(Block(config, norm_first=False) for _ in range(config.text_depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (b, l), attention_mask (b, l), True = real token -> (b, l, d), [CLS] first."""
        length = input_ids.shape[1]
        if length > len(self.positions):
            raise ValueError(
                f"a text of {length} tokens where max_tokens is {len(self.positions)}: cut it, or raise that"
            )
        hidden = self.norm(self.words(input_ids) + self.positions[:length])
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        return hidden


class Fused(NamedTuple):
    """Output of the fusion encoder: one vector for the pair, one per patch, one per token."""

    pair: Tensor  # (b, d), the fused text [CLS]
    image: Tensor  # (b, 1 + n, d), class token first
    text: Tensor  # (b, l, d)


class View(NamedTuple):
    """An encoded image and text to fuse, and the places at which fused vectors are needed."""

    image: Tensor  # (b, 1 + n, d)
    text: Tensor  # (b, l, d)
    attention_mask: Tensor  # (b, l), True = real token
    places: Tensor | None = None  # (b, m) places in the fused sequence, see FusionEncoder; None = everywhere


class FusionEncoder(nn.Module):
    """The upper half of BERT, applied to [text; image]: one stream of self-attention.

    It must output a vector at every patch and at every token, because MRM recovers both. ALBEF's fusion, in which the
    text attends to the image, outputs none at the patches. differs: the paper's own wiring is not known to us.

    The output is one sequence: [CLS], other tokens, class token, patches. A token's place in it is its number in the
    text; only `at_patches` and `unpack` know where the rest stands. To try another fusion, write a subclass with its
    own `fuse_views`, its blocks in `blocks`, and the attention from tokens to patches in `text_attention` and
    `text_to_patches`; then name it in Encoders.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.types = nn.Parameter(torch.zeros(2, config.width))  # 0 = text, 1 = image
        self.blocks = nn.ModuleList(Block(config, norm_first=False) for _ in range(config.fusion_depth))

    def forward(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Fused:
        """image (b, 1 + n, d), text (b, l, d), attention_mask (b, l), True = real token -> Fused"""
        (fused,) = self.fuse_views(View(image, text, attention_mask))
        return self.unpack(fused, text.shape[1])

    def fuse_views(self, *views: View) -> list[Tensor]:
        """Fuse views of one shape as one batch -> for each (b, l + 1 + n, d), or (b, m, d) at its places.

        The last block computes only these places, which saves a quarter of the whole step in `nano`.
        """
        text, image = torch.cat([view.text for view in views]), torch.cat([view.image for view in views])
        attention_mask = torch.cat([view.attention_mask for view in views])
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(image.shape[:2])], dim=1)
        hidden = torch.cat([text + self.types[0], image + self.types[1]], dim=1)
        for block in self.blocks[:-1]:
            hidden = block(hidden, attention_mask)
        per_view = zip(hidden.chunk(len(views)), attention_mask.chunk(len(views)), views, strict=True)
        return [self.blocks[-1](one, its_mask, view.places) for one, its_mask, view in per_view]

    @staticmethod
    def at_patches(patch_index: Tensor, length: int, frames: int = 1) -> Tensor:
        """patch_index (b, m), numbers of patches -> (b, m), their places in the fused sequence, behind `length` tokens.
        -1 gives the class token, in a video that of the last frame. The first place, 0, is [CLS]."""
        return length + frames + patch_index

    @staticmethod
    def unpack(fused: Tensor, length: int) -> Fused:
        """fused (b, l + 1 + n, d), with a text of `length` tokens -> Fused"""
        return Fused(pair=fused[:, 0], image=fused[:, length:], text=fused[:, :length])

    @property
    def text_attention(self) -> list[Attention]:
        """The attention of each block, whose maps text_to_patches reads."""
        return [block.attention for block in self.blocks]

    @staticmethod
    def text_to_patches(attention_map: Tensor, length: int) -> Tensor:
        """A recorded map (b, h, queries, l + 1 + n) -> (b, h, tokens, n): attention from tokens to patches. The map of
        the last block has one row for each requested place."""
        return attention_map[:, :, :length, length + 1 :]


class Encoders(nn.Module):
    """The three encoders and the two projections. The teacher is a moving average of the student's."""

    def __init__(self, config: Config):
        super().__init__()
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config)
        self.fusion = FusionEncoder(config) if config.fuses else None
        if config.w_itc > 0:
            self.image_projection = nn.Linear(config.width, config.embed_dim)
            self.text_projection = nn.Linear(config.width, config.embed_dim)

    def embed_image(self, image: Tensor, frames: int = 1) -> Tensor:
        """image (b, 1 + n, d) -> unit vector (b, e) from its class token, or the mean of a video's, for ITC"""
        # fp32: a norm rounded to 8 bits would change every cosine by up to 0.4 %.
        return F.normalize(self.image_projection(image[:, :frames].mean(dim=1)).float(), dim=-1)

    def embed_text(self, text: Tensor) -> Tensor:
        """text (b, l, d) -> unit vector (b, e) from its [CLS], for ITC"""
        return F.normalize(self.text_projection(text[:, 0]).float(), dim=-1)


# ------------------------------------------------------------------------------------------------------ joint masking
#
# The positions with the least noise are masked. The noise comes with the batch and belongs to the sample, so a sample
# is masked in the same way however many workers or processes there are.


def mask_patches(patch_noise: Tensor, ratio: float, frames: int = 1) -> tuple[Tensor, Tensor]:
    """Choose the patches to mask in I': single patches, the same number in every row, and in a video the same places in
    all frames, because a patch could otherwise be copied from another frame.

    Args:    patch_noise (b, n)   uniform noise
             ratio                share of the patches to mask
             frames               f; a video has f * n patches, of which f * m are masked
    Returns: patch_index (b, m)   the masked patches, least noise first
             patch_mask  (b, n)   the same as a mask, True = masked
    differs: the paper does not say whether patches are masked singly or in blocks.
    """
    n = patch_noise.shape[1]
    count = min(max(round(ratio * n), 1), n - 1)
    patch_index = in_frames(patch_noise.argsort(dim=1)[:, :count], n, frames)
    patch_mask = torch.zeros_like(patch_noise, dtype=torch.bool).repeat(1, frames).scatter(1, patch_index, True)
    return patch_index, patch_mask


def in_frames(index: Tensor, n: int, frames: int) -> Tensor:
    """index (b, m), numbers of patches in a frame of n -> (b, f * m), the same places in each of f frames"""
    first = n * torch.arange(frames, device=index.device)
    return rearrange(index[:, None] + first[:, None], "b f m -> b (f m)")


def drop_patches(patch_noise: Tensor, ratio: float, frames: int = 1) -> tuple[Tensor, Tensor]:
    """patch_noise (b, n) -> the patches to drop (b, m), least noise first, and those to keep (b, k); in a video the
    same places in all frames."""
    (dropped, patch_mask), n = mask_patches(patch_noise, ratio), patch_noise.shape[1]
    kept = patch_noise.masked_fill(patch_mask, -1.0).argsort(dim=1)[:, dropped.shape[1] :]
    return in_frames(dropped, n, frames), in_frames(kept, n, frames)


def put_back(visible: Tensor, kept: Tensor, mask_token: Tensor, positions: Tensor, frames: int = 1) -> Tensor:
    """Restore the sequence: visible (b, 1 + k, d) in their places, the mask token (d) elsewhere -> (b, 1 + n, d).

    positions (1 + n, d), see ImageEncoder.places, are added everywhere, to tell a mask token where it stands.
    """
    whole = repeat(mask_token, "d -> b n d", b=len(visible), n=len(positions)).to(visible.dtype)
    index = repeat(with_class_tokens(kept, frames), "b k -> b k d", d=visible.shape[-1])
    return whole.scatter(1, index, visible) + positions


class MaskedWords(NamedTuple):
    """The masked text T' and what to predict in it. Every row has the same number m' of slots: ceil(ratio * l)."""

    input_ids: Tensor  # (b, l)  T'
    index: Tensor  # (b, m')  the chosen positions, least noise first
    labels: Tensor  # (b, m')  the original words
    valid: Tensor  # (b, m')  True = a chosen word, False = an empty slot of a short row


def mask_words(
    input_ids: Tensor, attention_mask: Tensor, token_noise: Tensor, replace_noise: Tensor, ratio: float, config: Config
) -> MaskedWords:
    """Choose ceil(ratio * words) words of each row and replace them as BERT does.

    Of the chosen words, 80 % become [MASK], 10 % a random word, and 10 % stay. Special tokens and padding are never
    chosen, nor drawn as random words. differs: the paper gives only the ratio; 80/10/10 is BERT's. MRM regresses at
    every chosen position, including those whose word stays.

    Args:    input_ids, attention_mask (b, l)   attention_mask: True = real token
             token_noise (b, l)                 uniform noise; the least noisy words are chosen
             replace_noise (b, l)               uniform noise; decides [MASK], random or stay, and which random word
             ratio                              share of the words to mask
    """
    index, valid = choose_words(input_ids, attention_mask, token_noise, ratio, config)
    return replace_words(input_ids, index, valid, replace_noise, config)


def choose_words(
    input_ids: Tensor, attention_mask: Tensor, token_noise: Tensor, ratio: float, config: Config
) -> tuple[Tensor, Tensor]:
    """Choose the words to mask: index (b, m') and valid (b, m') of MaskedWords."""
    special = torch.tensor(config.special_ids, device=input_ids.device)
    ordinary = attention_mask & ~torch.isin(input_ids, special)
    count = math.ceil(ratio * input_ids.shape[1])
    index = token_noise.masked_fill(~ordinary, 2.0).argsort(dim=1, stable=True)[:, :count]
    chosen = (ratio * ordinary.sum(dim=1, keepdim=True) - 1e-4).ceil()  # 1e-4: rounding may not make 15 of 100 16
    return index, torch.arange(count, device=input_ids.device) < chosen


def replace_words(
    input_ids: Tensor, index: Tensor, valid: Tensor, replace_noise: Tensor, config: Config
) -> MaskedWords:
    """Replace the words at index (b, m'), where valid (b, m'), as replace_noise (b, l) decides."""
    # Below 0.8: [MASK]. In [0.8, 0.9): a random word, chosen by where in this interval the number lies.
    draw = replace_noise.gather(1, index)
    words = config.vocab_size - len(config.special_ids)
    word = ((draw - 0.8) * 10 * words).long().clamp(0, words - 1)
    for special_id in sorted(config.special_ids):
        word = word + (word >= special_id)  # step over the special ids
    labels = input_ids.gather(1, index)
    shown = torch.where(draw < 0.8, config.mask_id, torch.where(draw < 0.9, word, labels))
    masked_ids = input_ids.scatter(1, index, torch.where(valid, shown, labels))
    return MaskedWords(masked_ids, index, labels, valid)


# -------------------------------------------------------------------------------------------------- several processes


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class AllGather(torch.autograd.Function):
    """Forward: gather the rows of all processes. Backward: sum each row's gradient over the processes that used it."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """(b, ...) of this process -> (processes * b, ...) of all; gradients flow to the process that a row came from."""
    return rows if rank_and_size()[1] == 1 else AllGather.apply(rows)


def global_mean(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of values where valid, over the batch of all processes.

    Each process returns its own sum divided by the mean count per process. DDP averages gradients over processes, which
    makes this the sum over all processes divided by the count over all processes. 0 if nothing is valid.
    """
    if valid is None:
        return values.mean()
    count = valid.sum().to(values.dtype)
    if rank_and_size()[1] > 1:
        dist.all_reduce(count)
        count = count / rank_and_size()[1]
    return (values * valid).sum() / count.clamp(min=1e-6)


# ------------------------------------------------------------------------- what every objective shares: ITC, ITM, MLM


class VisionLanguageModel(nn.Module):
    """The student's encoders and heads, the losses that every objective has, and scoring."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.loss_weights = config, config.loss_weights
        self.student = Encoders(config)
        # ITC's temperature is learned as a logarithm, so that an optimiser step changes it by a relative amount.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07))) if config.w_itc > 0 else None
        self.itm_head = nn.Linear(config.width, 2) if config.w_itm > 0 else None  # 0 = does not match, 1 = matches
        self.apply(init_weights)
        if self.itm_head is not None:
            nn.init.normal_(self.itm_head.weight, std=0.02)  # undecided at first
        self.teacher: nn.Module | None = None  # made by objectives that have one, see teacher_of
        self.watch: dict[str, Tensor] = {}  # scalars of the last step to log that are not losses
        self.matching_weight = 1.0  # of matching relative to contrast in retrieval; training chooses it on val
        self.class_token_before: Tensor | None = None  # lets `total` notice an optimiser step without after_step

    def make_mlm_head(self) -> None:
        """Make BERT's MLM head. An objective calls this after making its own heads: initial weights are drawn in order
        of creation, and the figures in results/ were measured with this order."""
        d = self.config.width
        if self.config.w_mlm > 0:
            self.mlm_head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=BERT_EPS)).apply(init_weights)
            self.mlm_bias = nn.Parameter(torch.zeros(self.config.vocab_size))  # the weight is the word embedding

    def train(self, mode: bool = True):
        """As nn.Module.train, but a teacher stays in evaluation mode, so that its targets have no dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @property
    def temperature(self) -> Tensor:
        """ITC's temperature, a learned scalar."""
        return self.log_temperature.exp()

    def encode_image(self, images: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """images (b, 3, height, width), patch_mask (b, n), True = masked -> (b, 1 + n, d)"""
        return self.student.image(images, patch_mask)

    def encode_masked(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """As encode_image, with patches hidden in the objective's own way, for heat maps."""
        has = self.student.image.mask_token is not None
        require(has, "this model has no mask token to hide patches with: take the picture's colour or a blur")
        return self.encode_image(images, patch_mask)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (b, l), attention_mask (b, l), True = real token -> (b, l, d)"""
        return self.student.text(input_ids, attention_mask)

    def fuse(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Fused:
        """image (b, 1 + n, d), text (b, l, d), attention_mask (b, l), True = real token -> Fused"""
        return self.student.fusion(image, text, attention_mask)

    def fuse_views(self, views: dict[str, View]) -> dict[str, Tensor]:
        """Views of one shape, in one call -> by name (b, m, d), the fused vectors at the view's places"""
        return dict(zip(views, self.student.fusion.fuse_views(*views.values()), strict=True)) if views else {}

    def embed_image(self, image: Tensor, frames: int = 1) -> Tensor:
        """Encoded image (b, 1 + n, d) -> unit vector (b, e)"""
        return self.student.embed_image(image, frames)

    def embed_text(self, text: Tensor) -> Tensor:
        """Encoded text (b, l, d) -> unit vector (b, e)"""
        return self.student.embed_text(text)

    def pair(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded image (b, 1 + n, d) and text (b, l, d) -> (b, d): the fused [CLS] alone"""
        cls = torch.zeros_like(attention_mask[:, :1], dtype=torch.long)
        return self.fuse_views({"pair": View(image, text, attention_mask, cls)})["pair"][:, 0]

    def match(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded image (b, 1 + n, d) and text (b, l, d) -> (b,): log-odds that the two belong together

        differs: the log-odds are the difference of the head's two logits; ALBEF ranks and explains by the second alone.
        """
        logits = self.itm_head(self.pair(image, text, attention_mask)).float()  # fp32: re-ranking needs the digits
        return logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def score(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Score b pairs: "itc" (b,), cosine in [-1, 1]; "itm" (b,), probability of matching; each only if trained."""
        image, text = self.encode_image(images), self.encode_text(input_ids, attention_mask)
        scores = {}
        if self.config.w_itc > 0:
            scores["itc"] = (self.embed_image(image, frames_of(images)) * self.embed_text(text)).sum(dim=-1)
        if self.config.w_itm > 0:
            scores["itm"] = self.match(image, text, attention_mask).sigmoid()
        return scores

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses from forward, which training minimises."""
        if self.training:
            token, before = self.student.image.class_token.detach().clone(), self.class_token_before
            if before is not None and not torch.equal(before, token):
                warnings.warn("the optimiser has stepped without model.after_step() after it", stacklevel=2)
            self.class_token_before = token
        return sum(self.loss_weights[name] * loss for name, loss in losses.items())

    @torch.no_grad()
    def after_step(self, progress: float = 0.0) -> None:
        """Call once after each optimiser step. Keeps the temperature within ALBEF's bounds.

        Args:    progress   share of the run that is done, from 0 to 1, for objectives with a schedule
        """
        self.class_token_before = None
        if self.log_temperature is not None:
            self.log_temperature.clamp_(math.log(0.001), math.log(0.5))

    def chance(self, candidates: int) -> dict[str, float]:
        """The value of each loss for a model that has learned nothing."""
        levels = {"itc": math.log(candidates), "itm": math.log(3) - 2 / 3 * math.log(2)}
        levels["mlm"] = math.log(self.config.vocab_size)
        return {name: level for name, level in levels.items() if self.loss_weights.get(name, 0) > 0}

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Raise ValueError for a batch that lacks something, or is too small for negatives."""
        names = (
            "images input_ids attention_mask image_id caption_id patch_noise token_noise replace_noise negative_noise"
        )
        missing = ", ".join(name for name in names.split() if name not in batch)
        require(not missing, f"the batch lacks {missing}: make it with make_batch of data.py")
        dtype, count = batch["attention_mask"].dtype, len(batch["images"])
        require(dtype == torch.bool, f"attention_mask is {dtype}: give bool, True = real token (mask.bool())")
        enough = count > 1 or not self.config.sees_whole
        require(enough, "the batch holds one pair, and contrast and matching need others: use 2 or more")

    def contrast(self, image: Tensor, text: Tensor, batch: dict[str, Tensor], queued: tuple | None = None) -> tuple:
        """ITC of encoded images (b, 1 + n, d) and texts (b, l, d), each against the batches of all processes.

        Args:    queued   candidates to use instead of the batch: left_out, image_keys, text_keys, see loss_itc
        Returns: the loss, and the cosines (b, b) of this process's pairs, without gradient, for matching_views
        """
        image_embed, text_embed = self.embed_image(image, frames_of(batch["images"])), self.embed_text(text)
        with torch.autocast(image.device.type, enabled=False):  # fp32: as in the contrast itself
            similarity = (image_embed @ text_embed.T).detach()
        if "parts" in batch:  # gradient accumulation: this pass's rows, with gradient, among those of all passes
            batch = batch["parts"]
            image_embed = among_parts(image_embed, batch["image"], batch["own"])
            text_embed = among_parts(text_embed, batch["text"], batch["own"])
        candidates = queued or (other_positives(batch), gather(image_embed), gather(text_embed))
        return self.loss_itc(image_embed, text_embed, *candidates), similarity

    @property
    def contrasts_parts(self) -> bool:
        """Whether contrast compares the pairs of all passes of a step, if gradients are accumulated over several."""
        return self.config.w_itc > 0

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What contrast compares in a batch: image, text (b, e); image_id, caption_id (b,).

        A step that accumulates gradients over k passes first computes the features of all passes without gradient. Each
        pass then gets them, concatenated, as batch["parts"], with own (b,), the places of its own rows. The contrast is
        then over k * b pairs, with the gradient of one batch of k * b, as in GradCache (arXiv 2101.06983), at the cost
        of a second forward pass for the features.
        """
        image, text = self.contrasted_image(batch), self.encode_text(batch["input_ids"], batch["attention_mask"])
        ids = {"image_id": batch["image_id"], "caption_id": batch["caption_id"]}
        return {"image": self.embed_image(image, frames_of(batch["images"])), "text": self.embed_text(text)} | ids

    def contrasted_image(self, batch: dict[str, Tensor]) -> Tensor:
        """The encoded image that contrast compares -> (b, 1 + n, d)"""
        return self.encode_image(batch["images"])

    def loss_itc(self, image: Tensor, text: Tensor, left_out: Tensor, image_keys: Tensor, text_keys: Tensor) -> Tensor:
        """Image-text contrast: find the partner of each image and each text among all candidates.  (as ALBEF)

        Args:    image, text (b, e)            unit vectors of this process's pairs
                 left_out (b, candidates)      True = shares its image or caption with the row but is not its partner:
                                               not a negative, and left out of the denominator
                 image_keys, text_keys (candidates, e)   the batches of all processes, then the queue if there is one
        Returns: scalar, mean over rows and the two directions; chance is ln(candidates)
        """
        rank, _ = rank_and_size()
        partner = torch.arange(len(image), device=image.device) + rank * len(image)
        # fp32: cosines that differ by 0.01 are 0.15 apart after division by the temperature; bf16 cannot resolve them.
        with torch.autocast(image.device.type, enabled=False):
            image_to_text = (image @ text_keys.T / self.temperature).masked_fill(left_out, float("-inf"))
            text_to_image = (text @ image_keys.T / self.temperature).masked_fill(left_out, float("-inf"))
            return (F.cross_entropy(image_to_text, partner) + F.cross_entropy(text_to_image, partner)) / 2

    def matching_views(self, pair: View, similarity: Tensor | None, same: Tensor, noise: Tensor) -> tuple:
        """The input of ITM: each pair, its image with a hard negative text, and its text with a hard negative image.

        Args:    similarity (b, b)   ITC cosines of images and texts; None without ITC, where all count as equal
                 same (b, b)         True = the text is right for the image, so it is not a negative
                 noise (2, b, b)     uniform noise for the draws
        Returns: the three views by name, each fused at [CLS], and valid (2b,), False = no negative could be drawn
        """
        image, text, attention_mask, _ = pair
        similarity = torch.zeros_like(same, dtype=torch.float32) if similarity is None else similarity
        texts, valid_text = self.draw_negatives(similarity, self.not_drawn(similarity, same), noise[0])
        images, valid_image = self.draw_negatives(similarity.T, self.not_drawn(similarity.T, same.T), noise[1])
        cls = torch.zeros_like(attention_mask[:, :1], dtype=torch.long)
        views = {
            "pair": View(image, text, attention_mask, cls),
            "wrong text": View(image, text[texts], attention_mask[texts], cls),
            "wrong image": View(image[images], text, attention_mask, cls),
        }
        return views, torch.cat([valid_text, valid_image])

    def not_drawn(self, similarity: Tensor, same: Tensor) -> Tensor:
        """Candidates not to be drawn as negatives: same (b, b), and those ITC finds more similar than the partner.

        differs: ALBEF draws the latter too, and most often. In real data most of them are false negatives: captions
        that do describe the picture. A head trained on them stays at chance. They are drawn if no others are left.
        """
        above = similarity > similarity.diagonal()[:, None]
        above = above & ~(above | same).all(dim=1, keepdim=True)
        return same if self.config.albef_negatives else same | above

    @torch.no_grad()
    def draw_negatives(self, similarity: Tensor, excluded: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a hard negative for each row: the more similar, the more likely.  (after ALBEF)

        differs: ALBEF draws from the softmax of ITC's logits; here they are halved, for more varied negatives. With a
        queue, ALBEF compares the student's embeddings with the teacher's; here always with the student's own.

        Args:    similarity (b, b)   ITC cosines of this process's rows (query, candidate)
                 excluded (b, b)     True = never drawn, see not_drawn
                 noise (b, b)        uniform noise
        Returns: index (b,)          the drawn candidate
                 valid (b,)          False = the row has no possible negative and is skipped
        """
        # The Gumbel-max trick: add -log(-log(uniform)) to the logits; the argmax is a draw from their softmax.
        gumbel = -torch.log(-torch.log(noise.clamp(1e-12, 1 - 1e-7)))
        sharpness = 1.0 if self.config.albef_negatives else 0.5
        logits = sharpness * similarity / self.temperature if self.config.w_itc > 0 else similarity
        return (logits + gumbel).masked_fill(excluded, float("-inf")).argmax(dim=1), ~excluded.all(dim=1)

    def loss_itm(self, positive: Tensor, negative: Tensor, valid: Tensor) -> Tensor:
        """Image-text matching: does the text belong to the image?  (as ALBEF)

        Args:    positive (b, d)    pair vectors of the pairs
                 negative (2b, d)   pair vectors of images with wrong texts, then of texts with wrong images
                 valid (2b,)        False = no negative could be drawn
        Returns: scalar, two-way cross-entropy over the 3b pairs; chance is 0.64, the entropy of a 1 : 2 split
        """
        logits = self.itm_head(torch.cat([positive, negative])).float()  # fp32: softmax
        labels = torch.cat([valid.new_ones(len(positive)), valid.new_zeros(len(negative))]).long()
        counted = torch.cat([valid.new_ones(len(positive)), valid])
        return global_mean(F.cross_entropy(logits, labels, reduction="none"), counted)

    def word_logits(self, at_words: Tensor) -> Tensor:
        """Fused vectors at masked words (b, m', d) -> (b, m', v)        fp32: the softmax sums v terms"""
        return F.linear(self.mlm_head(at_words), self.student.text.words.weight, self.mlm_bias).float()

    def loss_mlm(self, at_words: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Masked language modelling: the masked words themselves.

        Args:    at_words (b, m', d)   student's fused vectors at the masked words
                 labels (b, m')        the original words
                 valid (b, m')         True = a word was chosen for the slot
        Returns: scalar, cross-entropy over the vocabulary; chance is ln(v)
        """
        logits = self.word_logits(at_words)
        loss = F.cross_entropy(rearrange(logits, "b m v -> (b m) v"), labels.flatten(), reduction="none")
        return global_mean(loss, valid.flatten())


def encode_together(encode: Callable, inputs: dict[str, tuple]) -> dict[str, Tensor]:
    """Encode inputs of one shape, each a tuple of arguments (b, ...), as one batch -> by name (b, sequence, d)"""
    if not inputs:
        return {}
    together = [None if some[0] is None else torch.cat(some) for some in zip(*inputs.values(), strict=True)]
    return dict(zip(inputs, encode(*together).chunk(len(inputs)), strict=True))


def among_parts(features: Tensor, parts: Tensor, own: Tensor) -> Tensor:
    """Put features (b, e) of one pass in their places own (b,) among those of all k passes, parts (k * b, e).

    Their gradient is scaled by k: training averages the contrast over the k passes, but only one of them, this one,
    sends a gradient into these features.
    """
    k = len(parts) // len(features)
    return parts.index_copy(0, own, features.detach() + k * (features - features.detach()))


def same_pairs(batch: dict[str, Tensor]) -> Tensor:
    """Which of this process's images and texts belong together, by image or by caption -> bool (b, b)"""
    image_id, caption_id = batch["image_id"], batch["caption_id"]
    return (image_id[:, None] == image_id) | (caption_id[:, None] == caption_id)


def other_positives(batch: dict[str, Tensor]) -> Tensor:
    """The same over all processes, without each row's own partner -> bool (b, processes * b)"""
    image_id, caption_id = batch["image_id"], batch["caption_id"]
    same = (image_id[:, None] == gather(image_id)) | (caption_id[:, None] == gather(caption_id))
    own = torch.arange(len(image_id), device=image_id.device)
    same[own, own + rank_and_size()[0] * len(image_id)] = False
    return same


def init_weights(module: nn.Module) -> None:
    """Xavier for linear layers, so that the output variance does not depend on the width; words as initial_scale."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initial_scale(module.embedding_dim))


# --------------------------------------------------------------------------------------------------------------- MAMO


class MAMO(VisionLanguageModel):
    """Masked multimodal modelling: MRM, MIM and MLM as well as ITC and ITM, with a moving-average teacher."""

    config_class = MAMOConfig

    def __init__(self, config: MAMOConfig):
        super().__init__(config)
        d = config.width
        if config.w_mrm > 0:
            # g in the MRM equation, one for patches and one for words. Like BYOL's predictor, only the student has it.
            self.mrm_image_head, self.mrm_text_head = predictor(d, d), predictor(d, d)
        if config.w_mim > 0:  # a deeper decoder does not help: the paper's Table 10
            self.mim_head = predictor(d, d if config.mim_target == "features" else 3 * config.patch_size**2)
        self.make_mlm_head()
        if config.needs_teacher:
            self.teacher = teacher_of(self.student)
        self.queue = Queue(config.queue_size, config.embed_dim) if config.queue_size > 0 else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a batch. Every distinct input is encoded once.                     Source: MAMO Eq. 6

        Args:    batch   images (b, 3, height, width), or videos (b, f, 3, height, width); input_ids, attention_mask
                         (b, l); image_id, caption_id (b,); patch_noise (b, n); token_noise, replace_noise (b, l);
                         negative_noise (2, b, b)
        Returns: the losses by name, unweighted scalars; `total` weights and adds them
        Raises:  ValueError for a batch that lacks something, or holds only one pair
        """
        self.check_batch(batch)
        config, input_ids, attention_mask = self.config, batch["input_ids"], batch["attention_mask"]
        losses, views, places, patch_mask, words = {}, {}, {}, None, None
        frames = frames_of(batch["images"])  # f; 1 for pictures

        # 1. Joint masking: I' lacks 75 % of the patches, T' lacks 25 % of the words.
        if config.masks_patches:
            patch_index, patch_mask = self.mask_image(batch["patch_noise"], frames)
            places["patches"] = self.student.fusion.at_patches(patch_index, input_ids.shape[1], frames)
        if config.masks_words:
            noise = batch["token_noise"], batch["replace_noise"]
            words = mask_words(input_ids, attention_mask, *noise, config.mask_text, config)
            places["words"] = words.index

        # 2. The student's unimodal encoders: I and I' as one batch, T and T' as another.
        image, text = self.encode_whole_and_masked(batch, patch_mask, words)

        # 3. The teacher sees the whole pair, without gradient: the targets of MRM and MIM.
        seen = self.teach(batch, places)
        if config.w_mrm > 0:
            mrm_target = split_places(normalised(seen["fused"]), places)
            self.watch = {"target_cosine": mean_cosine(mrm_target["patches"])}
        if config.w_mim > 0 and config.mim_target == "features":
            mim_target = normalised(at(seen["image"], frames + patch_index))
        elif config.w_mim > 0:
            mim_target = at(patchify(batch["images"], config.patch_size), patch_index)

        # 4. Contrast of whole images and whole texts.
        similarity = None
        if config.w_itc > 0:
            queued = None if self.queue is None else self.queued(batch, seen)
            losses["itc"], similarity = self.contrast(image["whole"], text["whole"], batch, queued)

        # 5. The student's fusion, up to five views of the pair as one batch: with one modality masked and the other
        #    whole, and for matching the pair itself and its two hard negatives.
        if config.mask_both:
            views["both"] = View(image["masked"], text["masked"], attention_mask, torch.cat([*places.values()], dim=1))
        else:
            if config.masks_patches:
                views["patches"] = View(image["masked"], text["whole"], attention_mask, places["patches"])
            if config.masks_words:
                views["words"] = View(image["whole"], text["masked"], attention_mask, places["words"])
        if config.w_itm > 0:
            pair = View(image["whole"], text["whole"], attention_mask)
            pairs, valid = self.matching_views(pair, similarity, same_pairs(batch), batch["negative_noise"])
            views |= pairs
        fused = self.fuse_views(views)
        if config.mask_both:
            fused |= split_places(fused["both"], places)

        # 6. Matching, and recovering what was masked: implicitly by MRM, explicitly by MIM and MLM.
        if config.w_itm > 0:
            negative = torch.cat([fused["wrong text"][:, 0], fused["wrong image"][:, 0]])
            losses["itm"] = self.loss_itm(fused["pair"][:, 0], negative, valid)
        if config.w_mrm > 0:
            masked = fused["patches"], mrm_target["patches"], fused["words"], mrm_target["words"], words.valid
            losses["mrm"] = self.loss_mrm(*masked)
        if config.w_mim > 0:
            losses["mim"] = self.loss_mim(fused["patches"], mim_target)
        if config.w_mlm > 0:
            losses["mlm"] = self.loss_mlm(fused["words"], words.labels, words.valid)
        return losses

    @property
    def contrasts_parts(self) -> bool:
        """False with a queue, whose candidates are the teacher's."""
        return super().contrasts_parts and self.queue is None

    def mask_image(self, patch_noise: Tensor, frames: int = 1) -> tuple[Tensor, Tensor]:
        """The patches to mask in I', see mask_patches; also used to show what a model recovers."""
        return mask_patches(patch_noise, self.config.mask_image, frames)

    def encode_whole_and_masked(
        self, batch: dict[str, Tensor], patch_mask: Tensor | None, words: MaskedWords | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """I and I' (b, 1 + n, d), T and T' (b, l, d), as "whole" and "masked", if any loss needs them."""
        config, images, attention_mask = self.config, batch["images"], batch["attention_mask"]
        image_inputs, text_inputs, in_place = {}, {}, config.masks_patches and not config.drop_masked
        if config.sees_image:  # with a mask that masks nothing, so that both fit in one batch
            image_inputs["whole"] = images, torch.zeros_like(patch_mask) if in_place else None
        if in_place:
            image_inputs["masked"] = images, patch_mask
        if config.sees_text:
            text_inputs["whole"] = batch["input_ids"], attention_mask
        if config.masks_words:
            text_inputs["masked"] = words.input_ids, attention_mask
        image = encode_together(self.encode_image, image_inputs)
        if config.masks_patches and config.drop_masked:
            encoder, frames = self.student.image, frames_of(images)
            kept = drop_patches(batch["patch_noise"], config.mask_image, frames)[1]
            visible, positions = encoder(images, kept=kept), encoder.places(frames)
            image["masked"] = put_back(visible, kept, encoder.mask_token, positions, frames)
        return image, encode_together(self.encode_text, text_inputs)

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor], places: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's view of the whole pair, as far as losses need it: "image" (b, 1 + n, d), "text" (b, l, d), and
        "fused" (b, m, d) at the given places (b, m) of the fused sequence, concatenated."""
        seen, config = {}, self.config
        if self.teacher is not None:
            seen["image"] = self.teacher.image(batch["images"])
        if config.w_mrm > 0 or self.queue is not None:
            seen["text"] = self.teacher.text(batch["input_ids"], batch["attention_mask"])
        if config.w_mrm > 0:
            view = View(seen["image"], seen["text"], batch["attention_mask"], torch.cat([*places.values()], dim=1))
            (seen["fused"],) = self.teacher.fusion.fuse_views(view)
        return seen

    def queued(self, batch: dict[str, Tensor], seen: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """ITC's candidates with a queue: the teacher's embeddings of this batch and of past ones, see loss_itc.

        differs: the paper's queue is not known to us. Off by default: in-batch candidates suffice in small runs.
        """
        image = self.teacher.embed_image(seen["image"], frames_of(batch["images"]))
        keys = [gather(image), gather(self.teacher.embed_text(seen["text"]))]
        ids = [gather(batch["image_id"]), gather(batch["caption_id"])]
        queue = self.queue
        left_out = (batch["image_id"][:, None] == queue.image_id) | (batch["caption_id"][:, None] == queue.caption_id)
        left_out = torch.cat([other_positives(batch), left_out | ~queue.filled], dim=1)
        candidates = torch.cat([keys[0], queue.image]), torch.cat([keys[1], queue.text])
        if self.training:
            queue.push(*keys, *ids)
        return left_out, *candidates

    def loss_mrm(
        self, at_patches: Tensor, patch_target: Tensor, at_words: Tensor, word_target: Tensor, valid: Tensor
    ) -> Tensor:
        """Masked representation modelling: the teacher's fused vectors, at masked patches and masked words.

        L = mean over M_I of |g(f(I', T)) - sg f_teacher(I, T)|^2 + the same over M_T with f(I, T')

        Args:    at_patches (b, m, d), at_words (b, m', d)        student's fused vectors at the masked positions
                 patch_target (b, m, d), word_target (b, m', d)   teacher's, layer-normalised, no gradient
                 valid (b, m')                                    True = a word was chosen for the slot
        Returns: scalar, each half a mean over positions and features; about 2 if the student has learned nothing
        """
        # fp32: differences of similar numbers, squared; likewise in MIM.
        patches = (self.mrm_image_head(at_patches).float() - patch_target).square().mean(dim=-1)
        words = (self.mrm_text_head(at_words).float() - word_target).square().mean(dim=-1)
        return global_mean(patches) + global_mean(words, valid)

    def loss_mim(self, at_patches: Tensor, target: Tensor) -> Tensor:
        """Masked image modelling: the teacher's visual features of the masked patches, in L1.

        L = mean over M_I of |h(f(I', T)) - sg v_teacher(I)|

        Args:    at_patches (b, m, d)   student's fused vectors at the masked patches
                 target (b, m, d)       teacher's image features there, layer-normalised, no gradient; or raw pixels,
                                        weaker according to the paper's Table 9, equal on the built-in world
        Returns: scalar, mean over positions and features; about 0.8 if the student has learned nothing
        """
        return global_mean((self.mim_head(at_patches).float() - target).abs())

    @torch.no_grad()
    def after_step(self, progress: float = 0.0) -> None:
        """VisionLanguageModel.after_step, then move the teacher towards the student."""
        super().after_step(progress)
        if self.teacher is not None:
            move_teacher(self.teacher, self.student, self.config.ema)

    def chance(self, candidates: int) -> dict[str, float]:
        """VisionLanguageModel.chance, with the queue among the candidates, and chance for the masked losses."""
        levels = super().chance(candidates + self.config.queue_size)
        if self.config.w_mrm > 0:
            levels["mrm"] = 2.0
        if self.config.w_mim > 0 and self.config.mim_target == "features":
            levels["mim"] = math.sqrt(2 / math.pi)
        return levels


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy of the student, or of a part of it, without gradients and in evaluation mode."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, ema: float) -> None:
    """teacher <- ema * teacher + (1 - ema) * student        fp32: bf16 would round a step of 0.5 % to nothing"""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs, 1 - ema)


def predictor(width: int, out: int) -> nn.Sequential:
    """Two-layer MLP. differs: the paper says "non-linear projector" and "MLP" and gives no sizes."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out)).apply(init_weights)


def normalised(target: Tensor) -> Tensor:
    """Layer norm without learned scale and shift, so that targets keep their scale as the teacher drifts. (data2vec)

    fp32: mean and variance are sums over the width.
    differs: whether the paper normalises its targets is not known to us.
    """
    return F.layer_norm(target.float(), target.shape[-1:])


def split_places(vectors: Tensor, places: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split vectors (b, m + m', d) at concatenated places -> by the name of the places"""
    return dict(zip(places, vectors.split([index.shape[1] for index in places.values()], dim=1), strict=True))


def mean_cosine(target: Tensor) -> Tensor:
    """Mean cosine over all pairs of targets (b, m, d). In a healthy run it falls after the first steps; a value that
    stays near 1 means collapse."""
    unit = F.normalize(rearrange(target, "b m d -> (b m) d"), dim=-1)
    count = len(unit)
    return (unit.sum(dim=0).square().sum() - count) / (count * (count - 1))


class Queue(nn.Module):
    """Ring buffer of the latest teacher embeddings with their ids, for batches of any size."""

    def __init__(self, size: int, embed_dim: int):
        super().__init__()
        self.register_buffer("image", torch.zeros(size, embed_dim))
        self.register_buffer("text", torch.zeros(size, embed_dim))
        self.register_buffer("image_id", torch.zeros(size, dtype=torch.long))
        self.register_buffer("caption_id", torch.zeros(size, dtype=torch.long))
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, image_id: Tensor, caption_id: Tensor) -> None:
        """Write b rows over the oldest ones. Of a batch larger than the queue, the last rows are kept."""
        size = len(self.filled)
        rows = [part[-size:] for part in (image, text, image_id, caption_id)]
        slots = (self.next + torch.arange(len(rows[0]), device=image.device)) % size
        for buffer, part in zip((self.image, self.text, self.image_id, self.caption_id), rows, strict=True):
            buffer[slots] = part.to(buffer.dtype)
        self.filled[slots] = True
        self.next.copy_((self.next + len(rows[0])) % size)
