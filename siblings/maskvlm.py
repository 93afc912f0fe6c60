"""MaskVLM: masked vision and language modelling, a sibling of MAMO on the same encoders.

Paper: Kwon et al., ICLR 2023, arXiv 2208.02131. Its answer to "recover what?": the raw signal itself.

    MIM   the raw pixels of masked patches, predicted by a decoder from the other patches and the whole text (I', T)
    MLM   the masked words, from the other words and the whole image (I, T')
    ITC and ITM on whole pairs, as in all other objectives. No teacher is needed, as pixels and words are the targets.

One modality is masked at a time, as in MAMO: in the paper's Table 6, this retrieves better than masking both.
Differences from MAMO: the masking (squares of 2 x 2 patches, with pixels blanked before the encoder, which thus needs
no mask token), the targets (the raw signal instead of a teacher's vectors), and a decoder that also reads the text.

Differences from the paper, so that a comparison isolates the objective:
    - one fusion stream over [text; image] instead of two cross-attention streams; the decoder has the same blocks
    - ITM reads the fused [CLS], not the product of two class tokens, and uses whole pairs (the paper does not say)
    - our text encoder instead of RoBERTa, all weights trained from scratch, and a single learning rate
    - blanking patches before the encoder follows a re-implementation's reading of the paper; 80/10/10 for masked words
      and 0, mid grey, for blanked pixels are our choices
    - `nano` has 4 x 4 patches, so a unit of 2 x 2 is a quarter of the picture, and 60 % of four units round to two
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mamo import (
    Config,
    View,
    VisionLanguageModel,
    at,
    encode_together,
    frames_of,
    global_mean,
    init_weights,
    mask_words,
    patchify,
    require,
)
from siblings.masking import PixelDecoder, blank, mask_units, matched, whole_pairs


@dataclass
class MaskVLMConfig(Config):
    """The fields that MaskVLM adds. In the paper, all four losses have weight 1 (App. A.2)."""

    mask_image: float = 0.6  # fraction of patch units masked in I'
    mask_text: float = 0.3  # fraction of words masked in T'
    mask_unit: int = 2  # side length, in patches, of the square units that are masked as a whole
    decoder_depth: int = 3  # number of blocks in the pixel decoder
    w_mim: float = 1.0  # weight of masked image modelling

    def check(self) -> None:
        """Config.check, and the checks specific to MaskVLM."""
        super().check()
        require(self.mask_unit > 0, f"mask_unit is {self.mask_unit}: it must be at least 1")
        require(self.decoder_depth > 0, f"decoder_depth is {self.decoder_depth}: it must be at least 1")
        unit, grid = self.mask_unit, self.grid
        fits = grid[0] % unit == 0 and grid[1] % unit == 0
        require(fits, f"mask_unit is {unit}: the grid of patches {grid} is no multiple of it")
        require(self.num_patches > unit**2, f"mask_unit is {unit}: a grid of {grid} is one unit; use a smaller one")

    @property
    def fuses(self) -> bool:
        """Whether any loss needs the fusion encoder."""
        return super().fuses or self.w_mim > 0


class MaskVLM(VisionLanguageModel):
    """Predicts raw pixels and words, each from the other modality, alongside ITC and ITM."""

    config_class = MaskVLMConfig

    def __init__(self, config: MaskVLMConfig):
        super().__init__(config)
        if config.w_mim > 0:
            self.decoder = PixelDecoder(config, config.decoder_depth).apply(init_weights)
        self.make_mlm_head()

    def encode_masked(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """VisionLanguageModel.encode_masked, by blanking pixels."""
        return self.encode_image(blank(images, patch_mask, self.config.patch_size))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One training step: batch as for MAMO -> unweighted scalar losses by name."""
        self.check_batch(batch)
        config, pixels, input_ids = self.config, batch["images"], batch["input_ids"]
        attention_mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
        frames = frames_of(pixels)

        # 1. Masking, one modality at a time, then the unimodal encoders: I and I' in one call, T and T' in another.
        images, texts = {}, {}
        if config.sees_whole or config.w_mlm > 0:
            images["whole"] = (pixels,)
        if config.sees_whole or config.w_mim > 0:
            texts["whole"] = input_ids, attention_mask
        if config.w_mim > 0:
            squares = config.grid, config.mask_unit, frames
            patch_index, patch_mask = mask_units(batch["patch_noise"], config.mask_image, *squares)
            images["masked"] = (blank(pixels, patch_mask, config.patch_size),)
        if config.w_mlm > 0:
            noise = batch["token_noise"], batch["replace_noise"]
            words = mask_words(input_ids, attention_mask, *noise, config.mask_text, config)
            texts["masked"] = words.input_ids, attention_mask
        image, text = encode_together(self.encode_image, images), encode_together(self.encode_text, texts)

        # 2. Whole pairs: contrastive loss, and the views for matching. The masked views are fused in the same call.
        losses, views, valid = whole_pairs(self, image.get("whole"), text.get("whole"), batch)
        if config.w_mim > 0:
            places = torch.arange(-frames, frames * config.num_patches, device=pixels.device).expand(len(pixels), -1)
            places = self.student.fusion.at_patches(places, length, frames)  # the decoder reads class token and patches
            views["patches"] = View(image["masked"], text["whole"], attention_mask, places)
        if config.w_mlm > 0:
            views["words"] = View(image["whole"], text["masked"], attention_mask, words.index)
        fused = self.fuse_views(views)

        # 3. Losses: matching, pixels, words.
        if config.w_itm > 0:
            losses["itm"] = self.loss_itm(*matched(fused), valid)
        if config.w_mim > 0:
            predicted = self.decoder(fused["patches"], text["whole"], attention_mask, patch_index, frames)
            losses["mim"] = self.loss_mim(predicted, at(patchify(pixels, config.patch_size), patch_index))
        if config.w_mlm > 0:
            losses["mlm"] = self.loss_mlm(fused["words"], words.labels, words.valid)
        return losses

    def loss_mim(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        """Masked image modelling: L1 on the raw, unnormalised pixels of the masked patches.

        L = 1 / number of masked values * |decoder(f(I', T)) - I| over M_I

        Args:    predicted, pixels (b, m, 3 * patch_size ** 2)   at the masked patches, values about -1 to 1
        Returns: scalar, mean over the values of all masked patches
        """
        return global_mean((predicted.float() - pixels).abs())  # fp32: as in MAMO.loss_mim
