"""GLSCL: global and local semantic completion learning, a sibling of MAMO on the same encoders.

Paper: Tu et al., arXiv 2306.07096, an extension of SCL (CVPR 2023, arXiv 2211.13437), which is GLSCL with --w-mltc 0.
Its answer to "recover what?": the semantics, as another pass of the same network encodes them, by contrast.

    MGSC   global: the image's class token from (I', T), where I' lacks 80 % of the patches, should match that from
           (I, T'); the text's [CLS] from (I, T'), where 40 % of the words of T' are masked, that from (I', T)
    MLTC   local: likewise for the tokens at masked patches, from (I'', T), and at masked words, from (I, T')
    MLM    15 % of the words, masked as whole words. ITC and ITM are as in all other objectives.

Each pass sees the content masked in the other, so each provides the other's (detached) target without a teacher.
Differences from MAMO's MRM: the target comes from the network itself instead of its moving average, and from a pair
with the other modality masked instead of a whole pair; and the loss is contrastive, so a prediction close to its target
gains nothing if all targets are close. A small batch offers few negatives. MLTC compares all masked tokens of a batch:
with 77 masked patches per picture, as in `base`, 64 pairs on each of 8 processes make matrices of 0.8 GB.

Differences from the paper and its released code, so that a comparison isolates the objective:
    - one fusion stream instead of co-attention; our encoders, trained from scratch, instead of RoBERTa and CLIP
    - MGSC compares [CLS] and class token of the one stream, and ITM reads [CLS] alone
    - ITM uses hard negatives as in ALBEF; the released code samples negative images uniformly
    - T' masks ceil(0.4 * words); the released code samples with replacement and masks about a third
    - I' and I'' share the noise, so I'' masks a subset of the patches that I' lacks; likewise T' and the text of MLM
    - I' keeps n - round(0.8 * n) patches, the released code int(0.2 * n): 13 and 12 of 64
    - a whole word that no longer fits into the 15 % is skipped; only if no word fits, one is partially masked
    - contrastive losses span all processes, with gradients to the process of each vector; the released code gathers
      without gradient, and contrasts [CLS] and patches within each process
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mamo import (
    Config,
    View,
    VisionLanguageModel,
    drop_patches,
    encode_together,
    frames_of,
    mask_patches,
    mask_words,
    require,
)
from siblings.masking import mask_whole_words, matched, nce, whole_pairs


@dataclass
class GLSCLConfig(Config):
    """The fields that GLSCL adds; ratios, weights and temperature are those of the released code."""

    mask_drop: float = 0.8  # fraction of patches dropped from I', for MGSC
    mask_image: float = 0.3  # fraction of patches replaced by a mask token in I'', for MLTC
    mask_completion: float = 0.4  # fraction of words masked in T', for MGSC and MLTC
    mask_text: float = 0.15  # fraction of words masked for MLM
    completion_temperature: float = 0.03  # fixed temperature of MGSC and MLTC
    w_mgsc: float = 1.0  # weight of masked global semantic completion
    w_mltc: float = 0.2  # weight of masked local token completion; 0 reduces GLSCL to SCL
    continuation_ids: tuple[int, ...] = ()  # ids of word pieces that continue a word (##), set from the tokenizer

    def __post_init__(self):
        super().__post_init__()
        self.continuation_ids = tuple(self.continuation_ids)

    def check(self) -> None:
        """Config.check, and the checks specific to GLSCL."""
        super().check()
        temperature = self.completion_temperature
        require(temperature > 0, f"completion_temperature is {temperature}: give more than 0")

    @property
    def completes(self) -> bool:
        """Whether any loss compares (I', T) with (I, T')."""
        return self.w_mgsc > 0 or self.w_mltc > 0

    @property
    def masks_patches(self) -> bool:
        """Whether any loss uses I''."""
        return self.w_mltc > 0

    @property
    def masks_words(self) -> bool:
        """Whether any loss uses a text with masked words."""
        return self.completes or self.w_mlm > 0


class GLSCL(VisionLanguageModel):
    """Predicts masked content, globally and token by token, by contrast with a pass that sees this content."""

    config_class = GLSCLConfig

    def __init__(self, config: GLSCLConfig):
        super().__init__(config)
        self.make_mlm_head()
        continues = torch.zeros(config.vocab_size, dtype=torch.bool)
        continues[list(config.continuation_ids)] = True
        self.register_buffer("continues", continues, persistent=False)  # not saved, because the config contains it

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One training step: batch as for MAMO -> unweighted scalar losses by name."""
        self.check_batch(batch)
        config, images, input_ids = self.config, batch["images"], batch["input_ids"]
        attention_mask, length, frames = batch["attention_mask"], input_ids.shape[1], frames_of(images)
        noise = batch["token_noise"], batch["replace_noise"]

        # 1. Masking, then the unimodal encoders: I and I'' in one call, all texts in another, I' separately.
        texts = {}
        if config.sees_whole or config.completes:
            texts["whole"] = input_ids, attention_mask
        if config.completes:  # replace_noise 0 = replace every chosen word by [MASK]
            missing = mask_words(input_ids, attention_mask, noise[0], 0 * noise[1], config.mask_completion, config)
            texts["missing"] = missing.input_ids, attention_mask
        if config.w_mlm > 0:
            continues = self.continues[input_ids]
            words = mask_whole_words(input_ids, attention_mask, *noise, config.mask_text, config, continues)
            texts["masked"] = words.input_ids, attention_mask
        text = encode_together(self.encode_text, texts)
        image_views = {"whole": (images,)}
        if config.w_mltc > 0:
            patch_index, patch_mask = mask_patches(batch["patch_noise"], config.mask_image, frames)
            image_views = {"whole": (images, torch.zeros_like(patch_mask)), "masked": (images, patch_mask)}
        image = encode_together(self.encode_image, image_views)

        # 2. Whole pairs: contrastive loss, and the views for matching.
        losses, views, valid = whole_pairs(self, image["whole"], text.get("whole"), batch)

        # 3. The masked views: a = (I', T), which is shorter and therefore fused separately; b = (I, T'), with the rest.
        if config.completes:
            fusion = self.student.fusion
            class_tokens = torch.arange(-frames, 0, device=images.device).expand(len(images), -1)
            class_tokens = fusion.at_patches(class_tokens, length, frames)
            places = [torch.zeros_like(class_tokens[:, :1]), class_tokens]  # [CLS], and the class token of each frame
            if config.w_mltc > 0:
                places.append(missing.index)
            kept = drop_patches(batch["patch_noise"], config.mask_drop, frames)[1]
            visible = self.student.image(images, kept=kept)
            view = View(visible, text["whole"], attention_mask, torch.cat(places, dim=1))
            a = self.fuse_views({"visible": view})["visible"]
            if config.w_mltc > 0:
                places.append(fusion.at_patches(patch_index, length, frames))
                views["patches"] = View(image["masked"], text["whole"], attention_mask, places[-1])
            views["missing"] = View(image["whole"], text["missing"], attention_mask, torch.cat(places, dim=1))
        if config.w_mlm > 0:
            views["words"] = View(image["whole"], text["masked"], attention_mask, words.index)
        fused = self.fuse_views(views)

        # 4. Losses: matching, completion, masked words.
        if config.w_itm > 0:
            losses["itm"] = self.loss_itm(*matched(fused), valid)
        if config.w_mgsc > 0:
            b = fused["missing"]
            seen, target = (one[:, 1 : 1 + frames].mean(dim=1) for one in (a, b))
            losses["mgsc"] = self.loss_mgsc(seen, target, b[:, 0], a[:, 0])
        if config.w_mltc > 0:
            *_, at_words, at_patches = fused["missing"].split([part.shape[1] for part in places], dim=1)
            losses["mltc"] = self.loss_mltc(fused["patches"], at_patches, at_words, a[:, 1 + frames :], missing.valid)
        if config.w_mlm > 0:
            losses["mlm"] = self.loss_mlm(fused["words"], words.labels, words.valid)
        return losses

    def loss_mgsc(self, image: Tensor, image_target: Tensor, text: Tensor, text_target: Tensor) -> Tensor:
        """Masked global semantic completion: all (b, d), targets without gradient. Chance level: 4 ln(candidates)."""
        tau = self.config.completion_temperature
        return nce(image, image_target, tau) + nce(text, text_target, tau)

    def loss_mltc(
        self, patches: Tensor, patch_target: Tensor, words: Tensor, word_target: Tensor, valid: Tensor
    ) -> Tensor:
        """Masked local token completion: a token against all masked tokens of the batch, even those of its own image.

        Args:    patches, patch_target (b, m, d)   (I'', T) and (I, T') at the masked patches
                 words, word_target (b, m', d)     (I, T') and (I', T) at the masked words; valid (b, m')
        """
        tau = self.config.completion_temperature
        return nce(patches, patch_target, tau) + nce(words, word_target, tau, valid)

    def chance(self, candidates: int) -> dict[str, float]:
        """VisionLanguageModel.chance, plus MGSC; the chance level of MLTC depends on the batch."""
        return super().chance(candidates) | ({"mgsc": 4 * math.log(candidates)} if self.config.w_mgsc > 0 else {})
