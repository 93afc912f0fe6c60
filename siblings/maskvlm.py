"""MaskVLM: masked vision and language modelling, a sibling of MAMO on the same encoders.

The paper: Kwon et al., ICLR 2023, arXiv 2208.02131. Its answer to "recover what?" is: the signal itself.

    MIM   the raw pixels of hidden patches, from the other patches and the whole text (I', T), by a decoder
    MLM   the hidden words, from the other words and the whole image (I, T')
    ITC, ITM on whole pairs, as everywhere. No teacher: targets that are pixels and words need none.

One modality is masked at a time, as in MAMO: in the paper's Table 6 that retrieves better than both at once. What
differs from MAMO is how patches are hidden (squares of 2 x 2, their pixels blanked before the encoder, so that it needs
no mask token), what is recovered (the signal in place of a teacher's vectors), and a decoder that reads the text.

How this differs from the paper, so that a comparison isolates the objective:
    - one stream of fusion over [text; image] in place of two streams of cross-attention; the decoder is more of it
    - ITM reads the fused [CLS], not the product of two class tokens, and reads whole pairs (the paper's is not known)
    - the text encoder is ours and not RoBERTa, all weights are fresh, and one learning rate serves all of them
    - that patches are blanked before the encoder is how a re-implementation reads the paper; 80/10/10 for hidden words
      and 0, mid grey, for blanked pixels are our choices
    - `nano` has 4 x 4 patches, so a unit of 2 x 2 is a quarter of the picture and 60 % of four units are two
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mamo import Config, VisionLanguageModel, at, global_mean, hide_words, init_weights, patchify
from siblings.masking import PixelDecoder, blank, hide_units


@dataclass
class MaskVLMConfig(Config):
    """What MaskVLM adds. The paper gives all four losses the weight 1 (App. A.2)."""

    mask_image: float = 0.6  # share of the units of patches hidden in I'
    mask_text: float = 0.3  # share of the words hidden in T'
    mask_unit: int = 2  # side of a unit in patches, which are hidden together
    decoder_depth: int = 3  # blocks of the decoder of pixels
    w_mim: float = 1.0  # weight of masked image modelling

    def __post_init__(self):
        super().__post_init__()
        if self.mask_unit < 1 or self.grid[0] % self.mask_unit or self.grid[1] % self.mask_unit:
            raise ValueError(f"mask_unit is {self.mask_unit}: the grid of patches {self.grid} is no multiple of it")
        if self.patches == self.mask_unit**2:
            raise ValueError(f"mask_unit is {self.mask_unit}: a grid of {self.grid} is one unit; use a smaller one")

    @property
    def fuses(self) -> bool:
        """Whether any loss needs the fusion encoder."""
        return super().fuses or self.w_mim > 0


class MaskVLM(VisionLanguageModel):
    """Raw pixels and words, each from the other modality, beside ITC and ITM."""

    config_class = MaskVLMConfig

    def __init__(self, config: MaskVLMConfig):
        super().__init__(config)
        if config.w_mim > 0:
            self.decoder = PixelDecoder(config, config.decoder_depth).apply(init_weights)
        self.make_mlm_head()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step; batch as for MAMO -> the unweighted scalar losses by name."""
        config, pixels, input_ids, real = self.config, batch["images"], batch["input_ids"], batch["attention_mask"]

        # 1. Masking, one modality at a time, and the unimodal encoders: I and I' in one call, T and T' in another.
        images, texts = {}, {}
        if config.sees_whole or config.w_mlm > 0:
            images["I"] = pixels
        if config.sees_whole or config.w_mim > 0:
            texts["T"] = input_ids
        if config.w_mim > 0:
            patch_index, patch_mask = hide_units(batch["patch_noise"], config.mask_image, config.grid, config.mask_unit)
            images["I'"] = blank(pixels, patch_mask, config.patch_size)
        if config.w_mlm > 0:
            words = hide_words(input_ids, real, batch["token_noise"], batch["replace_noise"], config.mask_text, config)
            texts["T'"] = words.input_ids
        encoded = self.encode_image(torch.cat(list(images.values()))).chunk(len(images))
        image, text = dict(zip(images, encoded, strict=True)), self.encode_texts(texts, real)

        # 2. Whole pairs: contrast, and the views for matching. Then the masked views, fused with them in one call.
        losses, views, valid = self.whole_pairs(image.get("I"), text.get("T"), batch)
        if config.w_mim > 0:
            everywhere = torch.arange(1 + config.patches, device=pixels.device) + input_ids.shape[1]
            views["I'T"] = image["I'"], text["T"], real, everywhere.expand(len(pixels), -1)
        if config.w_mlm > 0:
            views["IT'"] = image["I"], text["T'"], real, words.index
        fused = self.fuse_views(views)

        # 3. Matching, pixels, words.
        if config.w_itm > 0:
            losses["itm"] = self.matching(fused, valid)
        if config.w_mim > 0:
            predicted = self.decoder(fused["I'T"], text["T"], real, patch_index)
            losses["mim"] = self.loss_mim(predicted, at(patchify(pixels, config.patch_size), patch_index))
        if config.w_mlm > 0:
            losses["mlm"] = self.loss_mlm(fused["IT'"], words.labels, words.valid)
        return losses

    def loss_mim(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        """Masked image modelling: raw pixels of the hidden patches, not normalised, in L1.

        L = 1 / number of hidden values * |decoder(f(I', T)) - I| over M_I

        Args:    predicted, pixels (b, m, 3 * patch_size ** 2)   at the hidden patches, values about -1 to 1
        Returns: scalar, mean over the values of all hidden patches
        """
        return global_mean((predicted.float() - pixels).abs())  # fp32: as in MAMO's
