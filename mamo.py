"""MAMO: masked multimodal modelling for fine-grained vision-language pre-training, in one file.

The paper: Zhao et al., "MAMO", SIGIR 2023, arXiv 2210.04183. The base it builds on: ALBEF, arXiv 2107.07651.

The idea. Take an image-text pair (I, T). Hide 75 % of the patches (I') or 25 % of the words (T'), by default
never both, and recover what is hidden from the other modality:

    implicitly   MRM   the fused vectors that a moving-average teacher sees on the whole pair (I, T)
    explicitly   MIM   the teacher's visual features of the hidden patches
                 MLM   the hidden words themselves
    beside       ITC   contrast between whole images and whole texts
                 ITM   matching: does this text belong to this image?

How to read it. Top to bottom: the sizes, the three encoders, the joint masking, what any vision-language objective
needs (ITC, ITM, MLM), and last the MAMO objective itself, whose `forward` is the paper's pipeline in the paper's order.
The file imports nothing of ours and draws no random number: all noise arrives in the batch (see data.py), so that a
loss is a plain function of parameters and batch.

In lower precision (train.py --precision) the products run in bf16 or fp16 under autocast, while parameters, residual
sums and what is marked `fp32:` stay in single precision, for the reason that stands there.

One letter, one meaning, in shapes and einops patterns:
    b batch, n patches, l text tokens, d width, e joint embedding, h heads, v vocabulary, m hidden positions
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

# -------------------------------------------------------------------------------------------------------------- sizes


@dataclass
class Config:
    """What decides the shape of the model and the losses that every objective has; it travels inside the checkpoint."""

    image_size: tuple[int, int] = (32, 32)  # height and width of the picture in pixels
    patch_size: int = 8  # side of a square patch in pixels
    max_tokens: int = 32  # longest text in tokens, [CLS] and [SEP] included
    width: int = 64  # width d of all three encoders
    heads: int = 4  # attention heads per block
    image_depth: int = 3  # blocks of the image encoder
    text_depth: int = 2  # blocks of the text encoder
    fusion_depth: int = 2  # blocks of the fusion encoder
    embed_dim: int = 64  # width e of the joint embedding that ITC compares
    dropout: float = 0.0  # dropout on each residual branch
    w_itc: float = 1.0  # weight of image-text contrast; a loss of weight 0 costs nothing
    w_itm: float = 1.0  # weight of image-text matching
    w_mlm: float = 1.0  # weight of masked language modelling
    vocab_size: int = 0  # set from the tokenizer
    mask_id: int = 4  # id of [MASK], set from the tokenizer
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 4)  # ids that are never hidden, set from the tokenizer

    def __post_init__(self):
        self.image_size, self.special_ids = tuple(self.image_size), tuple(self.special_ids)
        if len(self.image_size) == 1:
            self.image_size *= 2  # one number means a square
        if len(self.image_size) != 2 or self.patch_size < 1:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size}: give a height and a width, "
                "and a patch of 1 pixel or more"
            )
        for side in self.image_size:
            if side % self.patch_size:
                low = side // self.patch_size * self.patch_size
                near = " or ".join(str(s) for s in (low, low + self.patch_size) if s)
                raise ValueError(f"image_size {side} is not a multiple of patch_size {self.patch_size}: use {near}")
        for name in ("heads", "embed_dim", *(field.name for field in fields(self) if field.name.endswith("_depth"))):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of heads ({self.heads}) and of 4: change one of them"
            )
        if self.patches < 2:
            raise ValueError(f"a picture of {self.image_size} is one patch of {self.patch_size}: use smaller patches")
        for ratio in fields(self):  # the shares that an objective hides: mask_image, mask_text, ...
            if ratio.name.startswith("mask_") and ratio.type is float and not 0 < getattr(self, ratio.name) < 1:
                raise ValueError(
                    f"{ratio.name} is {getattr(self, ratio.name)}: give a share between 0 and 1, both excluded"
                )
        for name, weight in self.weights.items():
            if not weight >= 0:
                raise ValueError(f"w_{name} is {weight}: a weight is 0 or more")
        if not any(self.weights.values()):
            names = ", ".join(f"w_{name}" for name in self.weights)
            raise ValueError(f"every loss has weight 0: give at least one of {names} a weight")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """Number n of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss in the total: the fields w_*."""
        return {field.name[2:]: getattr(self, field.name) for field in fields(self) if field.name.startswith("w_")}

    @property
    def sees_whole(self) -> bool:
        """Whether any loss looks at the student's (I, T)."""
        return self.w_itc > 0 or self.w_itm > 0

    @property
    def hides_patches(self) -> bool:
        """Whether any loss looks at an image with patches behind a mask token."""
        return False

    @property
    def hides_words(self) -> bool:
        """Whether any loss looks at a text with hidden words."""
        return self.w_mlm > 0

    @property
    def fuses(self) -> bool:
        """Whether any loss needs the fusion encoder."""
        return self.w_itm > 0 or self.hides_patches or self.hides_words


@dataclass
class MAMOConfig(Config):
    """What MAMO adds. Eq. 6 of the paper gives all five losses the weight 1."""

    mask_image: float = 0.75  # share of the patches hidden in I'
    mask_text: float = 0.25  # share of the words hidden in T'
    mask_both: bool = False  # hide both at once: one pass (I', T') in place of (I', T) and (I, T')
    w_mrm: float = 1.0  # weight of masked representation modelling
    w_mim: float = 1.0  # weight of masked image modelling
    mim_target: str = "features"  # what MIM recovers: features of the teacher's image encoder, or pixels
    queue_size: int = 0  # past teacher embeddings kept as further ITC candidates; 0 = this batch only
    ema: float = -1.0  # momentum of the teacher; -1 = from the length of the run, see ema_for

    def __post_init__(self):
        super().__post_init__()
        if self.mim_target not in ("features", "pixels"):
            raise ValueError(f"unknown mim_target {self.mim_target!r}: use features or pixels")
        if self.mask_both and not (self.hides_patches and self.hides_words):
            raise ValueError("mask_both hides patches and words at once: give w_mrm a weight, or both w_mim and w_mlm")
        if self.queue_size < 0 or (self.queue_size and not self.w_itc):
            raise ValueError(f"queue_size is {self.queue_size}: it must be 0 or more, and 0 without ITC (w_itc 0)")

    @property
    def hides_patches(self) -> bool:
        """Whether any loss looks at I'."""
        return self.w_mrm > 0 or self.w_mim > 0

    @property
    def hides_words(self) -> bool:
        """Whether any loss looks at T'."""
        return self.w_mrm > 0 or self.w_mlm > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss asks the teacher."""
        return self.w_mrm > 0 or (self.w_mim > 0 and self.mim_target == "features") or self.queue_size > 0


# `nano` is the demo on two processor cores; `tiny` suits drawings and a laptop; `small` is ViT-S/16 beside a text side
# of the same width; `base` is the paper's size: ViT-B/16, and BERT-base split into 6 text and 6 fusion blocks.
SIZES = ("image_size", "patch_size", "width", "heads", "image_depth", "text_depth", "fusion_depth", "embed_dim")
PRESETS = {
    "nano": dict(zip(SIZES, ((32, 32), 8, 64, 4, 3, 2, 2, 64), strict=True)),
    "tiny": dict(zip(SIZES, ((64, 64), 8, 128, 4, 4, 3, 3, 128), strict=True)),
    "small": dict(zip(SIZES, ((224, 224), 16, 384, 6, 12, 6, 6, 256), strict=True)),
    "base": dict(zip(SIZES, ((256, 256), 16, 768, 12, 12, 6, 6, 256), strict=True)),
}


def ema_for(steps: int) -> float:
    """Momentum of the teacher for a run of so many steps: its half-life is 1.5 % of the run, at most m = 0.995.

    differs: the paper's momentum is not known to us; ALBEF uses 0.995, which is too slow a teacher for a short run.
    """
    return min(max(1 - 0.69 / (0.015 * max(steps, 1)), 0.0), 0.995)


# -------------------------------------------------------------------------------------------- blocks of a transformer


class Attention(nn.Module):
    """Multi-head attention of some queries over a sequence; it can also record its maps, see record_attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.recorded: list[Tensor] | None = None  # a list while maps are recorded

    def forward(self, queries: Tensor, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """queries (b, m, d), hidden (b, n, d), attention_mask (b, n), True = real token -> (b, m, d)"""
        q = rearrange(self.query(queries), "b m (h d) -> b h m d", h=self.heads)
        k, v = rearrange(self.key_value(hidden), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        keys = None if attention_mask is None else rearrange(attention_mask, "b n -> b 1 1 n")
        if self.recorded is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        else:  # the same in explicit steps, because the fused kernel never forms the map
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            if keys is not None:
                logits = logits.masked_fill(~keys, float("-inf"))
            attention_map = logits.softmax(dim=-1)
            self.recorded.append(attention_map)
            mixed = attention_map @ v
        return self.out(rearrange(mixed, "b h m d -> b m (h d)"))


@contextmanager
def record_attention(module: nn.Module):
    """Inside the block, every Attention in `module` records its maps, in the order of its blocks.

    Yields a list of lists: one list per Attention, one map (b, h, queries, n) per call.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Attention)]
    for layer in layers:
        layer.recorded = []
    try:
        yield [layer.recorded for layer in layers]
    finally:
        for layer in layers:
            layer.recorded = None


class Block(nn.Module):
    """Transformer block: norm before each branch (ViT) or after each sum (BERT)."""

    def __init__(self, config: Config, norm_first: bool):
        super().__init__()
        d = config.width
        self.norm_first = norm_first
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.attention = Attention(d, config.heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """hidden (b, n, d), attention_mask (b, n), True = real token -> (b, n, d)

        With index (b, m), norm last only, the output is computed at those positions, (b, m, d); they attend to all n.
        """
        if self.norm_first:
            normed = self.norm1(hidden)
            hidden = hidden + self.dropout(self.attention(normed, normed, attention_mask))
            return hidden + self.dropout(self.mlp(self.norm2(hidden)))
        rows = hidden if index is None else at(hidden, index)
        rows = self.norm1(rows + self.dropout(self.attention(rows, hidden, attention_mask)))
        return self.norm2(rows + self.dropout(self.mlp(rows)))


def at(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden (b, n, d), index (b, m) -> (b, m, d): the vectors at those positions, row by row."""
    return hidden.gather(1, repeat(index, "b m -> b m d", d=hidden.shape[-1]))


def sine_code(places: Tensor, width: int) -> Tensor:
    """Sine-cosine code of places (n,) on one axis -> (n, width), values in [-1, 1]: near places have like codes."""
    frequencies = 10000 ** (-torch.arange(width // 2) / (width // 2))
    angles = places[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def loudness(width: int) -> float:
    """Amplitude at which positions and words start, 0.3 for a width of 64.

    Content and place are added, so each must be heard beside the other. In trials on the built-in world, small random
    positions did not teach "left of"; and with words at BERT's 0.02, drowned by these positions, foils with exchanged
    colours stood at 53 % after 1,000 steps, where words as loud as positions reached 92 % (contrast, one seed).
    """
    return 2.4 / math.sqrt(width)


# ------------------------------------------------------------------------------------------------- the three encoders


class ImageEncoder(nn.Module):
    """ViT: patches, class token, positions, blocks with the norm first, final norm."""

    def __init__(self, config: Config):
        super().__init__()
        d, p, (rows, columns) = config.width, config.patch_size, config.grid
        self.patch_size, self.image_size = p, config.image_size
        self.patch_embedding = nn.Linear(3 * p * p, d)  # a convolution of kernel and stride p, written as a product
        self.class_token = nn.Parameter(torch.zeros(d))
        self.mask_token = nn.Parameter(torch.zeros(d)) if config.hides_patches else None
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        code = torch.cat([sine_code(y.flatten(), d // 2), sine_code(x.flatten(), d // 2)], dim=1)
        self.positions = nn.Parameter(loudness(d) * torch.cat([torch.zeros(1, d), code]))  # learned from there on
        self.blocks = nn.ModuleList(Block(config, norm_first=True) for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, images: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """images (b, 3, height, width), patch_mask (b, n), True = hidden -> (b, 1 + n, d), class token first.

        differs: the paper does not say how a patch is hidden; here a learned token takes its place after the patch
        embedding and before the positions are added, so that the sequence keeps its length.
        """
        return self.run_blocks(self.embed(images, patch_mask))

    def embed(self, images: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """The sequence that enters the blocks: class token and patches, with their positions."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} pixels where (height, width) is {self.image_size}"
            )
        hidden = self.patch_embedding(patchify(images, self.patch_size))
        if patch_mask is not None:
            hidden = torch.where(patch_mask[..., None], self.mask_token.to(hidden.dtype), hidden)
        return torch.cat([repeat(self.class_token, "d -> b 1 d", b=len(images)), hidden], dim=1) + self.positions

    def run_blocks(self, hidden: Tensor) -> Tensor:
        """The blocks and the final norm, on a sequence (b, n, d) of any length."""
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """images (b, 3, height, width) -> (b, n, 3 * patch_size ** 2): the pixels of each patch, row by row."""
    return rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=patch_size, q=patch_size)


class TextEncoder(nn.Module):
    """The lower half of a BERT: words and positions, norm, blocks with the norm last."""

    def __init__(self, config: Config):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(loudness(config.width) * sine_code(torch.arange(config.max_tokens), config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
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
    """What the fusion encoder sees of a pair: one vector for the pair, one per patch, one per token."""

    pair: Tensor  # (b, d), the fused text [CLS]
    image: Tensor  # (b, 1 + n, d), class token first
    text: Tensor  # (b, l, d)


class FusionEncoder(nn.Module):
    """The upper half of a BERT over [text; image]: one stream of self-attention.

    It must give a vector at every patch and at every token, because MRM recovers both; cross-attention from the text
    alone, as in ALBEF, has no vector at the patches. differs: the paper's own wiring is not known to us.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.types = nn.Parameter(torch.zeros(2, config.width))  # 0 = text, 1 = image
        self.blocks = nn.ModuleList(Block(config, norm_first=False) for _ in range(config.fusion_depth))

    def forward(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Fused:
        """image (b, 1 + n, d), text (b, l, d), attention_mask (b, l), True = real token -> Fused"""
        hidden = self.last_block(*self.lower_blocks(image, text, attention_mask))
        length = text.shape[1]
        return Fused(pair=hidden[:, 0], image=hidden[:, length:], text=hidden[:, :length])

    def lower_blocks(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks but the last -> hidden (b, l + 1 + n, d), its attention mask (b, l + 1 + n)"""
        hidden = torch.cat([text + self.types[0], image + self.types[1]], dim=1)
        real = torch.cat([attention_mask, attention_mask.new_ones(image.shape[:2])], dim=1)
        for block in self.blocks[:-1]:
            hidden = block(hidden, real)
        return hidden, real

    def last_block(self, hidden: Tensor, real: Tensor, index: Tensor | None = None) -> Tensor:
        """The last block on everything, or at the positions index (b, m) only -> (b, m, d)

        Training asks for the hidden positions and [CLS] alone, which spares most of this block: a quarter of the
        whole step in `nano`.
        """
        return self.blocks[-1](hidden, real, index)


class Encoders(nn.Module):
    """The three encoders and the two projections: what the student has and the teacher is a moving average of."""

    def __init__(self, config: Config):
        super().__init__()
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config)
        self.fusion = FusionEncoder(config) if config.fuses else None
        if config.w_itc > 0:
            self.image_projection = nn.Linear(config.width, config.embed_dim)
            self.text_projection = nn.Linear(config.width, config.embed_dim)

    def embed_image(self, image: Tensor) -> Tensor:
        """image (b, 1 + n, d) -> unit vector (b, e) of its class token, for ITC"""
        # fp32: a length rounded to 8 bits would change every cosine by up to 0.4 %.
        return F.normalize(self.image_projection(image[:, 0]).float(), dim=-1)

    def embed_text(self, text: Tensor) -> Tensor:
        """text (b, l, d) -> unit vector (b, e) of its [CLS], for ITC"""
        return F.normalize(self.text_projection(text[:, 0]).float(), dim=-1)


# ------------------------------------------------------------------------------------------------------ joint masking
#
# Noise becomes a mask by ranking: the positions with the least noise are hidden. The noise comes with the batch and
# belongs to the sample, so the same sample is masked alike however many workers or processes there are.


def hide_patches(patch_noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Choose the patches that I' hides: single patches, the same number in every row.

    Args:    patch_noise (b, n)   uniform noise
             ratio                share of the patches to hide
    Returns: patch_index (b, m)   the hidden patches
             patch_mask  (b, n)   the same as a mask, True = hidden
    differs: the paper does not say whether patches are hidden singly or in blocks.
    """
    n = patch_noise.shape[1]
    hidden = min(max(round(ratio * n), 1), n - 1)
    patch_index = patch_noise.argsort(dim=1)[:, :hidden]
    patch_mask = torch.zeros_like(patch_noise, dtype=torch.bool).scatter(1, patch_index, True)
    return patch_index, patch_mask


class HiddenWords(NamedTuple):
    """The masked text T' and what to predict in it. The number m of slots is the same in every row: ceil(ratio * l)."""

    input_ids: Tensor  # (b, l)  T'
    index: Tensor  # (b, m)  the chosen positions, least noise first
    labels: Tensor  # (b, m)  the words that stood there
    valid: Tensor  # (b, m)  True = a real choice, False = an empty slot of a short row


def hide_words(
    input_ids: Tensor, attention_mask: Tensor, token_noise: Tensor, replace_noise: Tensor, ratio: float, config: Config
) -> HiddenWords:
    """Choose ceil(ratio * words) words of each row and replace them as BERT does.

    Of the chosen words 80 % become [MASK], 10 % a random word, 10 % stay. Special tokens and padding are never chosen
    and never drawn. differs: the paper gives the ratio; the 80/10/10 is BERT's, and MRM regresses at every chosen
    position, those that stay included.

    Args:    input_ids, attention_mask (b, l)   attention_mask: True = real token
             token_noise (b, l)                 uniform noise; the least noisy words are chosen
             replace_noise (b, l)               uniform noise; decides [MASK], random or stay, and which random word
             ratio                              share of the words to hide
    """
    index, valid = choose_words(input_ids, attention_mask, token_noise, ratio, config)
    return replace_words(input_ids, index, valid, replace_noise, config)


def choose_words(
    input_ids: Tensor, attention_mask: Tensor, token_noise: Tensor, ratio: float, config: Config
) -> tuple[Tensor, Tensor]:
    """Where T' differs from T: index (b, m) and valid (b, m) of HiddenWords."""
    special = torch.tensor(config.special_ids, device=input_ids.device)
    ordinary = attention_mask & ~torch.isin(input_ids, special)
    slots = math.ceil(ratio * input_ids.shape[1])
    index = token_noise.masked_fill(~ordinary, 2.0).argsort(dim=1, stable=True)[:, :slots]
    chosen = (ratio * ordinary.sum(dim=1, keepdim=True) - 1e-4).ceil()  # 0.15 * 100 is 15, not 15.000001
    return index, torch.arange(slots, device=input_ids.device) < chosen


def replace_words(
    input_ids: Tensor, index: Tensor, valid: Tensor, replace_noise: Tensor, config: Config
) -> HiddenWords:
    """What stands in T' at index (b, m) where valid (b, m), by replace_noise (b, l)."""
    # One number decides both: below 0.8 [MASK], in [0.8, 0.9) a word drawn by where in that stretch it lies.
    draw = replace_noise.gather(1, index)
    words = config.vocab_size - len(config.special_ids)
    word = ((draw - 0.8) * 10 * words).long().clamp(0, words - 1)
    for special_id in sorted(config.special_ids):
        word = word + (word >= special_id)  # step over the special ids
    labels = input_ids.gather(1, index)
    shown = torch.where(draw < 0.8, config.mask_id, torch.where(draw < 0.9, word, labels))
    masked_ids = input_ids.scatter(1, index, torch.where(valid, shown, labels))
    return HiddenWords(masked_ids, index, labels, valid)


# -------------------------------------------------------------------------------------------------- several processes


def world() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class AllGather(torch.autograd.Function):
    """Forward: the rows of all processes. Backward: each row's gradient is summed over the processes that used it."""

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
    """(b, ...) of this process -> (processes * b, ...) of all, with gradient to the process each row came from."""
    return rows if world()[1] == 1 else AllGather.apply(rows)


def global_mean(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of values where valid, over the batch of all processes.

    Each process returns its own sum divided by the mean count per process: averaged over processes, as DDP averages
    gradients, this is the sum over all processes divided by the count over all processes. 0 where nothing is valid.
    """
    if valid is None:
        return values.mean()
    count = valid.sum().to(values.dtype)
    if world()[1] > 1:
        dist.all_reduce(count)
        count = count / world()[1]
    return (values * valid).sum() / count.clamp(min=1e-6)


# ------------------------------------------------------------------------- what every objective shares: ITC, ITM, MLM


class VisionLanguageModel(nn.Module):
    """Student encoders and heads, with the losses that every objective has, and scoring."""

    def __init__(self, config: Config):
        super().__init__()
        if config.vocab_size <= max(config.special_ids):
            raise ValueError(f"vocab_size is {config.vocab_size}: set it to the length of the tokenizer's vocabulary")
        self.config = config
        self.student = Encoders(config)
        # ln of ITC's temperature. In logarithm, so that a step of the optimiser changes it by a share of itself.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07))) if config.w_itc > 0 else None
        self.itm_head = nn.Linear(config.width, 2) if config.w_itm > 0 else None  # 0 = does not match, 1 = matches
        self.apply(init_weights)
        if self.itm_head is not None:
            nn.init.normal_(self.itm_head.weight, std=0.02)  # undecided at first
        self.teacher: nn.Module | None = None  # an objective with a teacher makes one, see teacher_of

    def make_mlm_head(self) -> None:
        """The head of MLM, as BERT's; every objective makes it, after its own heads."""
        d = self.config.width
        if self.config.w_mlm > 0:
            self.mlm_head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=1e-6)).apply(init_weights)
            self.mlm_bias = nn.Parameter(torch.zeros(self.config.vocab_size))  # the weight is the word table itself

    def train(self, mode: bool = True):
        """As nn.Module.train, but a teacher stays in evaluation mode: its targets are free of dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @property
    def temperature(self) -> Tensor:
        """ITC's temperature, a learned scalar."""
        return self.log_temperature.exp()

    def encode_image(self, images: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """images (b, 3, height, width), patch_mask (b, n), True = hidden -> (b, 1 + n, d)"""
        return self.student.image(images, patch_mask)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids (b, l), attention_mask (b, l), True = real token -> (b, l, d)"""
        return self.student.text(input_ids, attention_mask)

    def encode_texts(self, texts: dict[str, Tensor], attention_mask: Tensor) -> dict[str, Tensor]:
        """Views of the same texts, each input_ids (b, l), in one call -> by name (b, l, d)"""
        masks = torch.cat([attention_mask] * len(texts))
        views = self.encode_text(torch.cat(list(texts.values())), masks).chunk(len(texts))
        return dict(zip(texts, views, strict=True))

    def fuse(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Fused:
        """image (b, 1 + n, d), text (b, l, d), attention_mask (b, l), True = real token -> Fused"""
        return self.student.fusion(image, text, attention_mask)

    def embed_image(self, image: Tensor) -> Tensor:
        """Encoded image (b, 1 + n, d) -> unit vector (b, e)"""
        return self.student.embed_image(image)

    def embed_text(self, text: Tensor) -> Tensor:
        """Encoded text (b, l, d) -> unit vector (b, e)"""
        return self.student.embed_text(text)

    def pair(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded image (b, 1 + n, d) and text (b, l, d) -> (b, d): the fused [CLS] alone"""
        hidden, real = self.student.fusion.lower_blocks(image, text, attention_mask)
        return self.student.fusion.last_block(hidden, real, torch.zeros_like(real[:, :1], dtype=torch.long))[:, 0]

    def match(self, image: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded image (b, 1 + n, d) and text (b, l, d) -> (b,): log-odds that the two belong together"""
        logits = self.itm_head(self.pair(image, text, attention_mask)).float()  # fp32: re-ranking needs the digits
        return logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def score(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Score b pairs: "itc" (b,), cosine in [-1, 1]; "itm" (b,), probability of matching. Only what was trained."""
        image, text = self.encode_image(images), self.encode_text(input_ids, attention_mask)
        scores = {}
        if self.config.w_itc > 0:
            scores["itc"] = (self.embed_image(image) * self.embed_text(text)).sum(dim=-1)
        if self.config.w_itm > 0:
            scores["itm"] = self.match(image, text, attention_mask).sigmoid()
        return scores

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss that forward gives in the total."""
        return self.config.weights

    def chance(self, candidates: int) -> dict[str, float]:
        """What each loss comes to for a model that knows nothing, for reading a log."""
        levels = {"itc": math.log(candidates), "itm": math.log(3) - 2 / 3 * math.log(2)}
        levels["mlm"] = math.log(self.config.vocab_size)
        return {name: level for name, level in levels.items() if self.weights.get(name, 0) > 0}

    @torch.no_grad()
    def after_step(self) -> None:
        """Once per optimiser step: keep the temperature in ALBEF's bounds."""
        if self.log_temperature is not None:
            self.log_temperature.clamp_(math.log(0.001), math.log(0.5))

    def whole_pairs(
        self, image: Tensor, text: Tensor, batch: dict[str, Tensor], keys: tuple | None = None
    ) -> tuple[dict[str, Tensor], dict[str, tuple], Tensor | None]:
        """What ITC and ITM, as far as they have a weight, do with encoded images (b, 1 + n, d) and texts (b, l, d).

        Returns: the losses so far, by name; the views that ITM wants fused; and valid, see matching_views
        Raises:  ValueError for a batch of one, which has no negatives
        """
        if self.config.sees_whole and len(image) < 2:
            raise ValueError(
                "the batch holds one pair, and contrast and matching need others: use a batch of 2 or more"
            )
        losses, views, similarity, valid = {}, {}, None, None
        if self.config.w_itc > 0:
            losses["itc"], similarity = self.contrast(image, text, batch, keys)
        if self.config.w_itm > 0:
            views, valid = self.matching_views(image, text, batch, similarity)
        return losses, views, valid

    def contrast(self, image: Tensor, text: Tensor, batch: dict[str, Tensor], keys: tuple | None = None) -> tuple:
        """ITC of encoded images (b, 1 + n, d) and texts (b, l, d), each against the batch of all processes.

        Args:    keys   other candidates in the batch's place: same, image_keys, text_keys, see loss_itc
        Returns: the loss, and the cosines (b, b) of this process's pairs, without gradient, for draw_negatives
        """
        image_embed, text_embed = self.embed_image(image), self.embed_text(text)
        keys = keys or (same_pairs(batch, True), gather(image_embed), gather(text_embed))
        with torch.autocast(image.device.type, enabled=False):  # fp32: as in the contrast itself
            similarity = (image_embed @ text_embed.T).detach()
        return self.loss_itc(image_embed, text_embed, *keys), similarity

    def loss_itc(self, image: Tensor, text: Tensor, same: Tensor, image_keys: Tensor, text_keys: Tensor) -> Tensor:
        """Image-text contrast: among all candidates, find one's own partner, both ways.  (as ALBEF)

        Args:    image, text (b, e)            unit vectors of this process's pairs
                 same (b, candidates)          True = shares image or caption with the row and is not its own partner:
                                               nobody's negative, left out of the denominator
                 image_keys, text_keys (candidates, e)   this batch over all processes, then the queue if there is one
        Returns: scalar, mean over rows and the two directions; chance is ln(candidates)
        """
        rank, _ = world()
        partner = torch.arange(len(image), device=image.device) + rank * len(image)
        # fp32: cosines that differ by 0.01 are 0.15 apart after division by the temperature; bf16 cannot tell them.
        with torch.autocast(image.device.type, enabled=False):
            image_to_text = (image @ text_keys.T / self.temperature).masked_fill(same, float("-inf"))
            text_to_image = (text @ image_keys.T / self.temperature).masked_fill(same, float("-inf"))
            return (F.cross_entropy(image_to_text, partner) + F.cross_entropy(text_to_image, partner)) / 2

    @torch.no_grad()
    def draw_negatives(self, similarity: Tensor, same: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a hard negative for each row: the more similar, the likelier.  (as ALBEF)

        Args:    similarity (b, b)   ITC cosines of this process's rows (query, candidate)
                 same (b, b)         True = shares image or caption: never drawn
                 noise (b, b)        uniform noise
        Returns: index (b,)          the drawn candidate
                 valid (b,)          False = the row has no possible negative and is to be skipped
        """
        # Gumbel's trick: adding -log(-log(uniform)) to logits and taking the largest draws from their softmax.
        gumbel = -torch.log(-torch.log(noise.clamp(1e-12, 1 - 1e-7)))
        logits = similarity / self.temperature if self.config.w_itc > 0 else similarity
        return (logits + gumbel).masked_fill(same, float("-inf")).argmax(dim=1), ~same.all(dim=1)

    def matching_views(
        self, image: Tensor, text: Tensor, batch: dict[str, Tensor], similarity: Tensor | None
    ) -> tuple[dict[str, tuple], Tensor]:
        """The views of ITM for fuse_views: each pair, its text beside a hard negative image, and the reverse.

        Args:    image (b, 1 + n, d), text (b, l, d)   encoded
                 similarity (b, b)                     of images and texts; None without ITC: all negatives are alike
        Returns: the views IT, IT- and I-T, each at its [CLS], and valid (2b,), False = no negative could be drawn
        """
        real, noise, same = batch["attention_mask"], batch["negative_noise"], same_pairs(batch)
        similarity = torch.zeros_like(same, dtype=torch.float32) if similarity is None else similarity
        captions, valid_text = self.draw_negatives(similarity, same, noise[0])
        others, valid_image = self.draw_negatives(similarity.T, same, noise[1])
        pair = torch.zeros_like(batch["input_ids"][:, :1])  # [CLS]
        views = {
            "IT": (image, text, real, pair),
            "IT-": (image, text[captions], real[captions], pair),
            "I-T": (image[others], text, real, pair),
        }
        return views, torch.cat([valid_text, valid_image])

    def fuse_views(self, views: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        """Fuse views (image, text, attention_mask, index (b, m)) in one call -> by name (b, m, d) at the index.

        The index counts in the fused sequence: [CLS] and the other tokens, then the class token and the patches.
        """
        if not views:
            return {}
        image, text, real, index = zip(*views.values(), strict=True)
        hidden = self.student.fusion.lower_blocks(torch.cat(image), torch.cat(text), torch.cat(real))
        rows = zip(*(part.chunk(len(views)) for part in hidden), index, strict=True)
        return {name: self.student.fusion.last_block(*row) for name, row in zip(views, rows, strict=True)}

    def matching(self, fused: dict[str, Tensor], valid: Tensor) -> Tensor:
        """ITM of the fused views of matching_views, which stand first in each: a scalar."""
        negative = torch.cat([fused["IT-"][:, 0], fused["I-T"][:, 0]])
        return self.loss_itm(fused["IT"][:, 0], negative, valid)

    def loss_itm(self, positive: Tensor, negative: Tensor, valid: Tensor) -> Tensor:
        """Image-text matching: does the text belong to the image?  (as ALBEF)

        Args:    positive (b, d)    pair vectors of (I, T)
                 negative (2b, d)   pair vectors of (I, T-) and (I-, T)
                 valid (2b,)        False = no negative could be drawn
        Returns: scalar, two-way cross-entropy over the 3b pairs; chance is 0.64, the entropy of 1 : 2
        """
        logits = self.itm_head(torch.cat([positive, negative])).float()  # fp32: exponentials and sums of a softmax
        labels = torch.cat([valid.new_ones(len(positive)), valid.new_zeros(len(negative))]).long()
        counted = torch.cat([valid.new_ones(len(positive)), valid])
        return global_mean(F.cross_entropy(logits, labels, reduction="none"), counted)

    def loss_mlm(self, at_words: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Masked language modelling: the hidden words themselves.

        Args:    at_words (b, m, d)   student's fused vectors at the chosen words
                 labels (b, m)        the words that stood there
                 valid (b, m)         True = a word was chosen for the slot
        Returns: scalar, cross-entropy over the vocabulary; chance is ln(v)
        """
        # fp32: a softmax sums as many exponentials as there are words.
        logits = F.linear(self.mlm_head(at_words), self.student.text.words.weight, self.mlm_bias).float()
        loss = F.cross_entropy(rearrange(logits, "b m v -> (b m) v"), labels.flatten(), reduction="none")
        return global_mean(loss, valid.flatten())


def same_pairs(batch: dict[str, Tensor], all_processes: bool = False) -> Tensor:
    """Pairs that share an image or a caption are nobody's negatives -> bool (b, b), or (b, processes * b).

    In the contrast a row's own partner stays in: among all processes the diagonal is False.
    """
    image_id, caption_id = batch["image_id"], batch["caption_id"]
    if not all_processes:
        return (image_id[:, None] == image_id) | (caption_id[:, None] == caption_id)
    same = (image_id[:, None] == gather(image_id)) | (caption_id[:, None] == gather(caption_id))
    rank, _ = world()
    own = torch.arange(len(image_id), device=image_id.device)
    same[own, own + rank * len(image_id)] = False
    return same


def init_weights(module: nn.Module) -> None:
    """Xavier for products, so that a narrow model starts as lively as a wide one; words as loud as positions."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=loudness(module.embedding_dim))


# --------------------------------------------------------------------------------------------------------------- MAMO


class MAMO(VisionLanguageModel):
    """Masked multimodal modelling: MRM, MIM and MLM beside ITC and ITM, with a moving-average teacher."""

    config_class = MAMOConfig

    def __init__(self, config: MAMOConfig):
        super().__init__(config)
        d = config.width
        if config.w_mrm > 0:
            # g of the MRM equation, on the student's side only, as BYOL's predictor: one for patches, one for words.
            self.mrm_image_head, self.mrm_text_head = predictor(d, d), predictor(d, d)
        if config.w_mim > 0:  # a deeper decoder does not help: Table 10
            self.mim_head = predictor(d, d if config.mim_target == "features" else 3 * config.patch_size**2)
        self.make_mlm_head()
        if config.needs_teacher:
            self.teacher = teacher_of(self.student, config.ema)
        self.queue = Queue(config.queue_size, config.embed_dim) if config.queue_size > 0 else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step of the method: every distinct input is encoded once.                     Source: MAMO Eq. 6

        Args:    batch   images (b, 3, height, width); input_ids, attention_mask (b, l); image_id, caption_id (b,);
                         patch_noise (b, n); token_noise, replace_noise (b, l); negative_noise (2, b, b)
        Returns: the unweighted scalar losses by name, and "target_cosine", a watch on the teacher (see spread)
        """
        config = self.config
        input_ids, real = batch["input_ids"], batch["attention_mask"]

        # 1. Joint masking, and the student's unimodal encoders.
        image, image_masked, patch_index = self.encode_image_views(batch)
        text, text_masked, words = self.encode_text_views(batch)

        # 2. What to recover: positions in the fused sequence [text; class token, patches].
        if config.hides_patches:
            patches = input_ids.shape[1] + 1 + patch_index

        # 3. The teacher sees the whole pair. One pass gives the targets of MRM (both modalities) and of MIM.
        teacher = self.teach(batch)
        if config.w_mrm > 0:
            targets = self.teacher.fusion.last_block(*teacher["fused"], torch.cat([patches, words.index], dim=1))

        # 4. Whole pairs: contrast, and the views for matching.
        queued = None if self.queue is None else self.queued(batch, teacher)
        losses, matching, valid = self.whole_pairs(image, text, batch, queued)

        # 5. The student's fusion, up to five views of the pair in one call.
        views = {}
        if config.mask_both:
            views["I'T'"] = image_masked, text_masked, real, torch.cat([patches, words.index], dim=1)
        else:
            if config.hides_patches:
                views["I'T"] = image_masked, text, real, patches
            if config.hides_words:
                views["IT'"] = image, text_masked, real, words.index
        fused = self.fuse_views(views | matching)
        if config.mask_both:
            fused["I'T"], fused["IT'"] = fused["I'T'"].split([patches.shape[1], words.index.shape[1]], dim=1)

        # 6. Matching, and the recovery of what was hidden.
        if config.w_itm > 0:
            losses["itm"] = self.matching(fused, valid)
        if config.w_mrm > 0:
            patch_target, word_target = normalised(targets).split([patch_index.shape[1], words.index.shape[1]], dim=1)
            losses["mrm"] = self.loss_mrm(fused["I'T"], patch_target, fused["IT'"], word_target, words.valid)
            losses["target_cosine"] = spread(patch_target)
        if config.w_mim > 0:
            if config.mim_target == "features":
                target = normalised(at(teacher["image"], 1 + patch_index))
            else:
                target = at(patchify(batch["images"], config.patch_size), patch_index)
            losses["mim"] = self.loss_mim(fused["I'T"], target)
        if config.w_mlm > 0:
            losses["mlm"] = self.loss_mlm(fused["IT'"], words.labels, words.valid)
        return losses

    def encode_image_views(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """I and I' (b, 1 + n, d) in one call, and the hidden patches (b, m); only what a loss asks for."""
        config, noise = self.config, batch["patch_noise"]
        masks, patch_index = [], None
        if config.sees_whole or (config.hides_words and not config.mask_both):
            masks.append(torch.zeros_like(noise, dtype=torch.bool))
        if config.hides_patches:
            patch_index, patch_mask = hide_patches(noise, config.mask_image)
            masks.append(patch_mask)
        images = torch.cat([batch["images"]] * len(masks))
        views = self.encode_image(images, torch.cat(masks) if config.hides_patches else None).chunk(len(masks))
        return views[0], views[-1], patch_index

    def encode_text_views(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, HiddenWords | None]:
        """T and T' (b, l, d) in one call, and the hidden words; only what a loss asks for."""
        config, input_ids, real = self.config, batch["input_ids"], batch["attention_mask"]
        texts, words = {}, None
        if config.sees_whole or (config.hides_patches and not config.mask_both):
            texts["T"] = input_ids
        if config.hides_words:
            words = hide_words(input_ids, real, batch["token_noise"], batch["replace_noise"], config.mask_text, config)
            texts["T'"] = words.input_ids
        views = self.encode_texts(texts, real)
        return views.get("T"), views.get("T'"), words

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor]) -> dict:
        """The teacher's view of the pair: "image" (b, 1 + n, d), "text" (b, l, d), "fused" before the last block."""
        seen = {}
        if self.teacher is not None:
            seen["image"] = self.teacher.image(batch["images"])
        if self.config.w_mrm > 0 or self.queue is not None:
            seen["text"] = self.teacher.text(batch["input_ids"], batch["attention_mask"])
        if self.config.w_mrm > 0:
            seen["fused"] = self.teacher.fusion.lower_blocks(seen["image"], seen["text"], batch["attention_mask"])
        return seen

    def queued(self, batch: dict[str, Tensor], teacher: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates of ITC with a queue: the teacher's view of this batch and of past ones, see loss_itc.

        differs: the paper's queue is not known to us; off by default, as in-batch candidates suit small runs.
        """
        keys = [gather(self.teacher.embed_image(teacher["image"])), gather(self.teacher.embed_text(teacher["text"]))]
        ids = [gather(batch["image_id"]), gather(batch["caption_id"])]
        queue = self.queue
        left_out = (batch["image_id"][:, None] == queue.image_id) | (batch["caption_id"][:, None] == queue.caption_id)
        same = torch.cat([same_pairs(batch, True), left_out | ~queue.filled], dim=1)
        candidates = torch.cat([keys[0], queue.image]), torch.cat([keys[1], queue.text])
        if self.training:
            queue.push(*keys, *ids)
        return same, *candidates

    def loss_mrm(
        self, at_patches: Tensor, patch_target: Tensor, at_words: Tensor, word_target: Tensor, valid: Tensor
    ) -> Tensor:
        """Masked representation modelling: the teacher's fused vectors, at hidden patches and hidden words.

        L = mean over M_I of |g(f(I', T)) - sg f_teacher(I, T)|^2 + the same over M_T with f(I, T')

        Args:    at_patches (b, m, d), at_words (b, m', d)        student's fused vectors at the hidden positions
                 patch_target (b, m, d), word_target (b, m', d)   teacher's, layer-normalised, no gradient
                 valid (b, m')                                    True = a word was chosen for the slot
        Returns: scalar, each half a mean over positions and features; about 2 if the student knows nothing
        """
        # fp32: differences of near numbers, squared; the same holds for MIM.
        patches = (self.mrm_image_head(at_patches).float() - patch_target).square().mean(dim=-1)
        words = (self.mrm_text_head(at_words).float() - word_target).square().mean(dim=-1)
        return global_mean(patches) + global_mean(words, valid)

    def loss_mim(self, at_patches: Tensor, target: Tensor) -> Tensor:
        """Masked image modelling: the teacher's visual features of the hidden patches, in L1.

        L = mean over M_I of |h(f(I', T)) - sg v_teacher(I)|

        Args:    at_patches (b, m, d)   student's fused vectors at the hidden patches
                 target (b, m, d)       teacher's image encoder there, layer-normalised, no gradient; or raw pixels,
                                        which are a weaker target: Table 9
        Returns: scalar, mean over positions and features; about 0.8 if the student knows nothing of the features
        """
        return global_mean((self.mim_head(at_patches).float() - target).abs())

    @torch.no_grad()
    def after_step(self) -> None:
        """Once per optimiser step: as above, then move the teacher towards the student."""
        super().after_step()
        if self.teacher is not None:
            move_teacher(self.teacher, self.student, self.config.ema)

    def chance(self, candidates: int) -> dict[str, float]:
        """As above, with the queue among the candidates, and of the masked losses."""
        levels = super().chance(candidates + self.config.queue_size)
        if self.config.w_mrm > 0:
            levels["mrm"] = 2.0
        if self.config.w_mim > 0 and self.config.mim_target == "features":
            levels["mim"] = math.sqrt(2 / math.pi)
        return levels


def teacher_of(student: nn.Module, ema: float) -> nn.Module:
    """A copy of the student, or of a part of it, that takes no gradient and is in evaluation mode."""
    if not 0 <= ema <= 1:
        raise ValueError(f"ema is {ema}: give the teacher a momentum in [0, 1], such as ema_for(steps)")
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, ema: float) -> None:
    """teacher <- ema * teacher + (1 - ema) * student        fp32: in bf16 a move of 0.5 % would be rounded away"""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs, 1 - ema)


def predictor(width: int, out: int) -> nn.Sequential:
    """Two-layer MLP. differs: the paper says "non-linear projector" and "MLP" and gives no sizes."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out)).apply(init_weights)


def normalised(target: Tensor) -> Tensor:
    """Layer-norm without affine: targets keep one scale however the teacher drifts, as in data2vec.

    fp32: mean and variance are sums over the width.
    differs: whether the paper normalises its targets is not known to us.
    """
    return F.layer_norm(target.float(), target.shape[-1:])


def spread(target: Tensor) -> Tensor:
    """Mean cosine of targets (b, m, d), pair by pair: near 1 a teacher is fresh, or, if it climbs back, collapsed."""
    unit = F.normalize(rearrange(target, "b m d -> (b m) d"), dim=-1)
    count = len(unit)
    return (unit.sum(dim=0).square().sum() - count) / (count * (count - 1))


class Queue(nn.Module):
    """Ring of the last teacher embeddings with their ids, of any length, fed by batches of any size."""

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
        """Write b rows over the oldest ones; of a batch longer than the queue, the last rows stay."""
        size = len(self.filled)
        rows = [part[-size:] for part in (image, text, image_id, caption_id)]
        slots = (self.next + torch.arange(len(rows[0]), device=image.device)) % size
        for buffer, part in zip((self.image, self.text, self.image_id, self.caption_id), rows, strict=True):
            buffer[slots] = part.to(buffer.dtype)
        self.filled[slots] = True
        self.next.copy_((self.next + len(rows[0])) % size)
