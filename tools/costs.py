"""The cost of a training step of each objective, by formula: floating-point operations (FLOPs) of matrix products and,
for MAMO and the control, the memory that a step occupies.

    python -m tools.costs                                            the table in docs/objectives.md
    python -m tools.costs --memory base --batch-size 1 32 256        memory of a step of MAMO
    python -m tools.costs --growth base                              how both grow when each size is doubled

A backward pass costs twice the forward pass, with a gradient for each of the two factors; but pixels, the keys of a
queue and detached targets need no gradient, and the teacher and the similarities used to sample negatives have no
backward pass. Element-wise operations and the second forward pass of gradient checkpointing are not counted.

Each objective below counts the passes of its forward method; docs/objectives.md illustrates them. The cost of fusion
assumes the computation in mamo.FusionEncoder, see `uncounted`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import runtime
from mamo import MAMO, PRESETS, Config, Encoders, FusionEncoder, MAMOConfig, mask_patches, require
from siblings import OBJECTIVES
from siblings.glscl import GLSCLConfig
from siblings.maskvlm import MaskVLMConfig
from siblings.vlmae import VLMAEConfig
from train import takes_muon


@dataclass
class Passes:
    """The inputs to each part of the model in one step, per pair of the batch. Costs: multiply-adds, forward only."""

    images: list[int]  # tokens per view of the image in the student's encoder, with the class token
    texts: int  # number of views of the text
    fused: list[tuple[int, int]]  # per fused view: image tokens, output positions that are needed
    words: int = 0  # number of slots for the masked words that MLM predicts
    heads: int = 0  # cost of the heads and decoders specific to the objective
    contrast: int = 0  # cost of contrastive losses specific to the objective, against all rows of the batch
    teacher: int = 0  # cost of the teacher and of all other computation without a backward pass


class Costs:
    """The multiply-adds of each part of a model, for texts of length l and a batch of size b."""

    def __init__(self, config: Config, b: int, l: int):  # noqa: E741
        self.config, self.b, self.l, self.n, self.d = config, b, l, config.num_patches, config.width
        self.patch = 3 * config.patch_size**2
        self.embedding = self.n * self.patch * self.d

    def block(self, tokens: int, outputs: int) -> int:
        """A Block: query, output and MLP at output positions, key and value at all tokens, two attention products."""
        d = self.d
        return (2 + 8) * outputs * d * d + 2 * tokens * d * d + 2 * outputs * tokens * d

    def stack(self, depth: int, tokens: int, outputs: int) -> int:
        """A stack of blocks, the last of which is needed at `outputs` positions only."""
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
        """The fused views of ITM, each of which is needed at [CLS] only."""
        return [(image_tokens, 1)] * 3 * (self.config.w_itm > 0)

    def masked(self, ratio: float, of: int) -> int:
        """The number of masked patches, or units, out of `of`."""
        return mask_patches(torch.zeros(1, of), ratio)[0].shape[1]

    def slots(self, ratio: float) -> int:
        """The number of slots for masked words."""
        return math.ceil(ratio * self.l)


def mamo(config: MAMOConfig, costs: Costs) -> Passes:
    """The masked views, in separate passes or both in one, and the teacher's views."""
    n, d = costs.n, costs.d
    mrm, mim, queue = config.w_mrm > 0, config.w_mim > 0, config.queue_size > 0
    patches = config.masks_patches * costs.masked(config.mask_image, n)
    words = config.masks_words * costs.slots(config.mask_text)
    places = [patches + words] if config.mask_both else [patches, words]
    fused = [(1 + n, wanted) for wanted in places if wanted] + costs.matching(1 + n)
    predictor, target = 8 * d * d, d if config.mim_target == "features" else costs.patch
    heads = mrm * (patches + words) * predictor + mim * patches * 4 * d * (d + target)
    teacher = config.needs_teacher * (costs.embedding + costs.image(1 + n)) + (mrm or queue) * costs.text()
    teacher += mrm * costs.fusion(1 + n, patches + words) + queue * 2 * d * config.embed_dim
    entering = n - patches if config.drop_masked else n
    images = [1 + n] * config.sees_image + [1 + entering] * config.masks_patches
    mlm = (config.w_mlm > 0) * words
    return Passes(images, config.sees_text + config.masks_words, fused, mlm, heads, teacher=teacher)


def maskvlm(config: MaskVLMConfig, costs: Costs) -> Passes:
    """The decoder reads the whole image part of the masked view, which is therefore needed at all positions."""
    whole, mim, unit = 1 + costs.n, config.w_mim > 0, config.mask_unit
    words = config.masks_words * costs.slots(config.mask_text)
    patches = costs.masked(config.mask_image, costs.n // unit**2) * unit**2
    images = (config.sees_whole or config.masks_words) + mim
    texts = (config.sees_whole or mim) + config.masks_words
    fused = [(whole, whole)] * mim + [(whole, words)] * config.masks_words + costs.matching(whole)
    return Passes([whole] * images, texts, fused, words, mim * costs.decoder(patches))


def glscl(config: GLSCLConfig, costs: Costs) -> Passes:
    """The image with and without the dropped patches, and texts with words masked for two purposes."""
    completes, mgsc, mltc, mlm = config.completes, config.w_mgsc > 0, config.w_mltc > 0, config.w_mlm > 0
    whole, kept = 1 + costs.n, 1 + costs.n - costs.masked(config.mask_drop, costs.n)
    patches = mltc * costs.masked(config.mask_image, costs.n)
    missing, words = mltc * costs.slots(config.mask_completion), mlm * costs.slots(config.mask_text)
    images, fused = [whole] * (1 + mltc) + [kept] * mgsc, [(kept, 2 + missing)] * mgsc
    fused += [(whole, 2 + missing + patches)] * completes
    fused += [(whole, patches)] * mltc + [(whole, words)] * mlm + costs.matching(whole)
    # Each contrast consists of two products, each with one factor that requires a gradient: four in all.
    contrast = 4 * costs.b * costs.d * (2 * mgsc + patches**2 + missing**2)
    # Without MGSC, the view without the dropped patches only provides targets.
    target = (mltc and not mgsc) * (costs.embedding + costs.image(kept) + costs.fusion(kept, 2 + missing))
    texts = (config.sees_whole or completes) + completes + mlm
    return Passes(images, texts, fused, words, contrast=contrast, teacher=target)


def vlmae(config: VLMAEConfig, costs: Costs) -> Passes:
    """Only the visible patches, in every view; the teacher sees all patches."""
    d, rmim, ifr = costs.d, config.w_rmim > 0, config.w_ifr > 0
    dropped, words = costs.masked(config.mask_image, costs.n), config.masks_words * costs.slots(config.mask_text)
    visible = 1 + costs.n - dropped
    # RMIM needs the positive pair at all positions; ITM, if it has a weight, reads its [CLS].
    pairs = [(visible, costs.l + visible), *costs.matching(visible)[1:]] if rmim else costs.matching(visible)
    fused = [(visible, words)] * config.masks_words + pairs
    heads = rmim * costs.decoder(dropped) + ifr * (costs.block(1 + costs.n, dropped) + dropped * d * d)
    teacher = ifr * (costs.embedding + costs.image(1 + costs.n))
    texts = (config.sees_whole or rmim) + config.masks_words
    return Passes([visible], texts, fused, words, heads, teacher=teacher)


PASSES = {MAMOConfig: mamo, MaskVLMConfig: maskvlm, GLSCLConfig: glscl, VLMAEConfig: vlmae}


def uncounted(fusion: nn.Module | None) -> str:
    """A one-sentence reason why the formula does not apply to a model with this fusion encoder; "" if it applies."""
    if fusion is None or type(fusion) is FusionEncoder:
        return ""
    return (
        f"no operations are quoted: tools/costs.py counts mamo.FusionEncoder, and this model fuses with "
        f"{type(fusion).__name__}; write its products into Costs.fusion first"
    )


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


def memory_of_step(
    config: MAMOConfig, batch_size: int, length: int, grad_checkpointing: bool = False
) -> dict[str, int]:
    """The bytes that a training step in fp32 holds between its forward and its backward pass.

    For the backward pass, a block keeps 3 vectors per token (its input, key and value) and 13 per output: query, mixed
    values, the inputs of both norms and of the MLP, and twice the MLP's hidden layer, which is four times as wide.
    Temporary memory of individual operations and memory reserved by the allocator are not counted.

    Args:    grad_checkpointing   each block keeps only its input, and the rest is recomputed one block at a time
    Returns: "weights" of student, heads and teacher, "gradients", "optimiser" (one moment for matrices in blocks, two
             for all other parameters), "activations"
    """
    costs, d = Costs(config, batch_size, length), config.width
    passes, n = mamo(config, costs), costs.n
    with torch.device("meta"):
        model = MAMO(config)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = sum(p.numel() for p in learning.values())
    by_muon = sum(p.numel() for name, p in learning.items() if takes_muon(name, p))
    # Stacks of blocks that run in one call: (depth, number of tokens in all views, output positions of the last block).
    stacks = [(config.image_depth, sum(passes.images), sum(passes.images))]
    stacks.append((config.text_depth, passes.texts * length, passes.texts * length))
    fused = sum(length + tokens for tokens, _ in passes.fused)
    stacks.append((config.fusion_depth, fused, sum(wanted for _, wanted in passes.fused)))
    whole = [((depth - 1) * 16 * tokens + 3 * tokens + 13 * outputs) * d for depth, tokens, outputs in stacks]
    embeddings = len(passes.images) * n * costs.patch + 2 * sum(passes.images) * d + 2 * passes.texts * length * d
    patches = config.masks_patches * costs.masked(config.mask_image, n)
    words = config.masks_words * costs.slots(config.mask_text)
    heads = 9 * d * ((config.w_mrm > 0) * (patches + words) + (config.w_mim > 0) * patches)
    heads += (config.w_mlm > 0) * words * (4 * d + 2 * config.vocab_size)
    kept = sum(whole)
    if grad_checkpointing:
        kept = sum(depth * tokens for depth, tokens, _ in stacks) * d + max(16 * tokens * d for _, tokens, _ in stacks)
    return {
        "weights": 4 * sum(p.numel() for p in model.parameters()),
        "gradients": 4 * trained,
        "optimiser": 8 * trained - 4 * by_muon,
        "activations": 4 * batch_size * (embeddings + kept + heads),
    }


def memory_table(
    preset: str, batch_sizes: Sequence[int] = (1, 8, 32, 64, 256), length: int = 30, words: int = 30522
) -> str:
    """GB of a MAMO step by batch size: by default, with masked patches dropped, with checkpointing, and with both."""
    rows = []
    for size in batch_sizes:
        cells = [str(size)]
        for again in (False, True):
            for drop in (False, True):
                config = MAMOConfig(**PRESETS[preset], drop_masked=drop, vocab_size=words)
                cells.append(f"{sum(memory_of_step(config, size, length, again).values()) / 1e9:.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def growth_table(preset: str, batch_size: int = 64, length: int = 30, words: int = 30522) -> str:
    """The exponents with which FLOPs and memory of a MAMO step grow in each size, from the preset to twice the size."""

    def both(batch_size: int = batch_size, length: int = length, words: int = words, **changes) -> tuple[int, int]:
        config = MAMOConfig(**PRESETS[preset] | changes, vocab_size=words)
        work = sum(flops_of_step(config, batch_size, length).values())
        return work, sum(memory_of_step(config, batch_size, length).values())

    shape, rows = PRESETS[preset], []
    depths = {name: 2 * shape[name] for name in ("image_depth", "text_depth", "fusion_depth")}
    doubled = {
        "pairs of a batch": {"batch_size": 2 * batch_size},
        "side of the picture": {"image_size": tuple(2 * side for side in shape["image_size"])},
        "tokens of a text": {"length": 2 * length},
        "width": {"width": 2 * shape["width"]},
        "depth of all encoders": depths,
        "words of the vocabulary": {"words": 2 * words},
    }
    for name, changes in doubled.items():
        powers = [math.log2(twice / once) for twice, once in zip(both(**changes), both(), strict=True)]
        rows.append(f"| {name} | {' | '.join(f'{power:.2f}' for power in powers)} |")
    return "\n".join(rows)


def table() -> str:
    """The rows of the table in docs/objectives.md: cost relative to the control, and each part's share in base."""

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


def main() -> None:
    """Command-line entry point: print the rows, or an error if the formula does not cover the fusion encoder."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=PRESETS, help="print the memory of a step of this preset instead of FLOPs")
    parser.add_argument("--growth", choices=PRESETS, help="print the exponents with which FLOPs and memory grow")
    parser.add_argument("--batch-size", type=int, nargs="+", default=(1, 8, 32, 64, 256), help="sizes for --memory")
    options = parser.parse_args()
    why = uncounted(Encoders(MAMOConfig()).fusion)
    require(not why, why)
    if options.memory:
        print(memory_table(options.memory, options.batch_size))
    else:
        print(growth_table(options.growth) if options.growth else table())


if __name__ == "__main__":
    runtime.guarded(main)
