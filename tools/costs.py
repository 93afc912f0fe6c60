"""What a training step of each objective costs, by formula: the floating-point operations of its matrix products.

A backward pass costs twice the forward pass, a gradient for each of the two factors; but pixels, the keys of a queue
and detached targets need no gradient, and the teacher and the similarities that draw negatives have no backward pass at
all. Work element by element is not counted, nor is the second forward pass of gradient checkpointing.

Each objective below is the list of its passes: the table of docs/objectives.md, as code.
"""

import math
from dataclasses import dataclass

import torch

from mamo import PRESETS, Config, MAMOConfig, hide_patches
from siblings import OBJECTIVES
from siblings.glscl import GLSCLConfig
from siblings.maskvlm import MaskVLMConfig
from siblings.vlmae import VLMAEConfig


@dataclass
class Passes:
    """What a step sends through each part, for one pair of the batch. Costs are multiply-adds of a forward pass."""

    images: list[int]  # tokens of each view of the image in the student's encoder, class token included
    texts: int  # views of the text
    fused: list[tuple[int, int]]  # image tokens of each fused view, and positions it is wanted at
    words: int = 0  # slots of hidden words that MLM predicts
    heads: int = 0  # of the objective's own heads and decoders
    contrast: int = 0  # of its own contrasts with all rows of the batch
    teacher: int = 0  # and what else has no backward pass


class Costs:
    """Multiply-adds of the parts of a model, for texts of length l and a batch of b."""

    def __init__(self, config: Config, b: int, l: int):  # noqa: E741
        self.config, self.b, self.l, self.n, self.d = config, b, l, config.patches, config.width
        self.patch = 3 * config.patch_size**2
        self.embedding = self.n * self.patch * self.d

    def block(self, tokens: int, outputs: int) -> int:
        """A Block: query, out and MLP at the outputs, key and value at all tokens, two products for attention."""
        d = self.d
        return (2 + 8) * outputs * d * d + 2 * tokens * d * d + 2 * outputs * tokens * d

    def stack(self, depth: int, tokens: int, outputs: int) -> int:
        """Blocks of which the last is wanted at some positions only."""
        return (depth - 1) * self.block(tokens, tokens) + self.block(tokens, outputs)

    def image(self, tokens: int) -> int:
        """The blocks of the image encoder."""
        return self.stack(self.config.image_depth, tokens, tokens)

    def text(self) -> int:
        """The text encoder."""
        return self.stack(self.config.text_depth, self.l, self.l)

    def fusion(self, image_tokens: int, outputs: int) -> int:
        """The fusion encoder."""
        return self.stack(self.config.fusion_depth, self.l + image_tokens, outputs)

    def decoder(self, outputs: int) -> int:
        """A PixelDecoder."""
        blocks = self.stack(self.config.decoder_depth, self.l + 1 + self.n, outputs)
        return blocks + outputs * self.d * self.patch

    def matching(self, image_tokens: int) -> list[tuple[int, int]]:
        """The fused views of ITM, each wanted at [CLS]."""
        return [(image_tokens, 1)] * 3 * (self.config.w_itm > 0)

    def hidden(self, ratio: float, of: int) -> int:
        """How many of so many patches, or units, are hidden."""
        return hide_patches(torch.zeros(1, of), ratio)[0].shape[1]

    def slots(self, ratio: float) -> int:
        """Slots of hidden words."""
        return math.ceil(ratio * self.l)


def mamo(config: MAMOConfig, costs: Costs) -> Passes:
    """(I', T), (I, T'), or both in one, and a teacher on (I, T)."""
    n, d = costs.n, costs.d
    mrm, mim, mlm, queue = config.w_mrm > 0, config.w_mim > 0, config.w_mlm > 0, config.queue_size > 0
    patches = costs.hidden(config.mask_image, n) * config.hides_patches
    words = costs.slots(config.mask_text) * config.hides_words
    apart = not config.mask_both
    images = (config.sees_whole or (config.hides_words and apart)) + config.hides_patches
    texts = (config.sees_whole or (config.hides_patches and apart)) + config.hides_words
    fused = [(1 + n, m) for m in ((patches, words) if apart else (patches + words,)) if m] + costs.matching(1 + n)
    predictor, target = 8 * d * d, d if config.mim_target == "features" else costs.patch
    heads = mrm * (patches + words) * predictor + mim * patches * 4 * d * (d + target)
    teacher = config.needs_teacher * (costs.embedding + costs.image(1 + n)) + (mrm or queue) * costs.text()
    teacher += mrm * costs.fusion(1 + n, patches + words) + queue * 2 * d * config.embed_dim
    return Passes([1 + n] * images, texts, fused, mlm * words, heads, teacher=teacher)


def maskvlm(config: MaskVLMConfig, costs: Costs) -> Passes:
    """(I', T) with a decoder, and (I, T')."""
    mim, mlm = config.w_mim > 0, config.w_mlm > 0
    whole, words, pairs = 1 + costs.n, costs.slots(config.mask_text) * mlm, config.sees_whole
    patches = costs.hidden(config.mask_image, costs.n // config.mask_unit**2) * config.mask_unit**2
    fused = [(whole, whole)] * mim + [(whole, words)] * mlm + costs.matching(whole)
    images, texts = (pairs or mlm) + mim, (pairs or mim) + mlm
    return Passes([whole] * images, texts, fused, words, mim * costs.decoder(patches))


def glscl(config: GLSCLConfig, costs: Costs) -> Passes:
    """(I', T) without most patches, (I, T'), (I'', T), and (I, T) with other words hidden for MLM."""
    completes, mgsc, mltc, mlm = config.completes, config.w_mgsc > 0, config.w_mltc > 0, config.w_mlm > 0
    whole, kept = 1 + costs.n, 1 + costs.n - costs.hidden(config.mask_drop, costs.n)
    patches = costs.hidden(config.mask_image, costs.n) * mltc
    missing, words = costs.slots(config.mask_completion) * mltc, costs.slots(config.mask_text) * mlm
    images, fused = [whole] * (1 + mltc) + [kept] * mgsc, [(kept, 2 + missing)] * mgsc
    fused += [(whole, 2 + missing + patches)] * completes
    fused += [(whole, patches)] * mltc + [(whole, words)] * mlm + costs.matching(whole)
    # Each contrast is two products, of which either has one factor that takes a gradient: four in all.
    contrast = 4 * costs.b * costs.d * (2 * mgsc + patches**2 + missing**2)
    # Without MGSC, (I', T) only gives targets.
    target = (mltc and not mgsc) * (costs.embedding + costs.image(kept) + costs.fusion(kept, 2 + missing))
    texts = (config.sees_whole or completes) + completes + mlm
    return Passes(images, texts, fused, words, contrast=contrast, teacher=target)


def vlmae(config: VLMAEConfig, costs: Costs) -> Passes:
    """Visible patches only: (I_vis, T) with a decoder, (I_vis, T'), and a teacher on I."""
    d, rmim, ifr, mlm = costs.d, config.w_rmim > 0, config.w_ifr > 0, config.w_mlm > 0
    dropped, words = costs.hidden(config.mask_image, costs.n), costs.slots(config.mask_text) * mlm
    visible = 1 + costs.n - dropped
    # RMIM wants all of the positive pair, of which ITM, if it has a weight, reads [CLS].
    pairs = [(visible, costs.l + visible), *costs.matching(visible)[1:]] if rmim else costs.matching(visible)
    fused = [(visible, words)] * mlm + pairs
    heads = rmim * costs.decoder(dropped) + ifr * (costs.block(1 + costs.n, dropped) + dropped * d * d)
    teacher = ifr * (costs.embedding + costs.image(1 + costs.n))
    texts = (config.sees_whole or rmim) + mlm
    return Passes([visible], texts, fused, words, heads, teacher=teacher)


PASSES = {MAMOConfig: mamo, MaskVLMConfig: maskvlm, GLSCLConfig: glscl, VLMAEConfig: vlmae}


def flops_of_step(config: Config, batch_size: int, length: int) -> dict[str, int]:
    """Floating-point operations of a training step by part, two per multiply-add.

    Args:    length   tokens of the longest text in the batch
    Returns: the student's "image encoder", "text encoder", "fusion", "heads" and "contrast", and the "teacher"
    """
    costs = Costs(config, batch_size, length)
    passes = PASSES[type(config)](config, costs)
    b, d, e, itc, itm = batch_size, config.width, config.embed_dim, config.w_itc > 0, config.w_itm > 0
    heads = passes.heads + itm * 3 * 2 * d + passes.words * (d * d + d * config.vocab_size)
    queue = getattr(config, "queue_size", 0)
    projections, candidates = 2 * d * e, 2 * (b + queue) * e
    contrast = itc * (3 * projections + (2 if queue else 3) * candidates + b * e) + passes.contrast
    return {
        "image encoder": 2 * b * sum(2 * costs.embedding + 3 * costs.image(tokens) for tokens in passes.images),
        "text encoder": 2 * b * passes.texts * 3 * costs.text(),
        "fusion": 2 * b * 3 * sum(costs.fusion(*view) for view in passes.fused),
        "heads": 2 * b * 3 * heads,
        "contrast": 2 * b * contrast,
        "teacher": 2 * b * passes.teacher,
    }


def table() -> str:
    """The rows of the table in docs/objectives.md: relative to control, and shares in base."""

    def counted(name: str, preset: str, length: int, words: int) -> dict[str, int]:
        model, changes = OBJECTIVES[name]
        return flops_of_step(model.config_class(**PRESETS[preset], **changes, vocab_size=words), 64, length)

    rows = []
    for name in OBJECTIVES:
        cells = [f"`{name}`"]
        for given in (("nano", 14, 125), ("base", 30, 30522)):
            parts = counted(name, *given)
            cells.append(f"{sum(parts.values()) / sum(counted('control', *given).values()):.2f}")
        cells += [f"{100 * value / sum(parts.values()):.0f} %" for part, value in parts.items() if part != "contrast"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
