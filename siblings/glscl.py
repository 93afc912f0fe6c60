"""GLSCL: global and local semantic completion learning, a sibling of MAMO on the same encoders.

The paper: Tu et al., arXiv 2306.07096; before it SCL, CVPR 2023, arXiv 2211.13437, which is GLSCL with --w-mltc 0. Its
answer to "recover what?" is: the meaning, as another pass of the same network sees it, and told from all others.

    MGSC   global: the image's class token from (I', T), where I' lacks 80 % of its patches, shall be that from (I, T'),
           and the text's [CLS] from (I, T'), where T' lacks 40 % of its words, shall be that from (I', T)
    MLTC   local: so shall the tokens at masked patches, from (I'', T), and those at masked words, from (I, T')
    MLM    15 % of the words, whole ones. ITC, ITM as everywhere.

Each pass has whole what the other one lacks, so the two are each other's target, detached, and no teacher is needed.
What differs from MAMO's MRM: the target is this network itself in place of its moving average, on a pair with the other
half hidden in place of a whole pair, and the distance is contrast: being near to the target is worth nothing where all
targets are near to it. In a small batch there is little to tell the target from. MLTC compares all masked tokens
of a batch: with 77 masked patches a picture, as in `base`, 64 pairs on each of 8 processes make matrices of 0.8 GB.

How this differs from the paper and its release, so that a comparison isolates the objective:
    - one stream of fusion in place of co-attention; a shared, fresh text and image encoder in place of RoBERTa and CLIP
    - [CLS] and class token of the one stream are compared, and ITM reads [CLS] alone
    - ITM takes hard negatives as ALBEF, where the release draws images at random
    - T' hides ceil(0.4 * words), where the release draws with repetition and hides about a third
    - I' and I'' are chosen by one noise, so what I'' hides lies within what I' lacks; so are T' and the text of MLM
    - I' keeps n - round(0.8 * n) patches, where the release keeps int(0.2 * n): of 64 it is 13 and 12
    - a whole word that no longer fits into the 15 % is passed over, and only where no word fits is one masked in part
    - all is contrasted among all processes, and gradients go to the process that a vector came from; the release
      gathers without gradient, and contrasts [CLS] and patches within each process
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
    """What GLSCL adds; ratios, weights and temperature are those of the release."""

    mask_drop: float = 0.8  # share of the patches dropped from I', for MGSC
    mask_image: float = 0.3  # share of the patches behind a mask token in I'', for MLTC
    mask_completion: float = 0.4  # share of the words masked in T', for MGSC and MLTC
    mask_text: float = 0.15  # share of the words masked for MLM
    completion_temperature: float = 0.03  # of MGSC and MLTC, fixed
    w_mgsc: float = 1.0  # weight of masked global semantic completion
    w_mltc: float = 0.2  # weight of masked local token completion; 0 makes it SCL
    continuation_ids: tuple[int, ...] = ()  # ids of pieces that go on with a word (##), set from the tokenizer

    def __post_init__(self):
        super().__post_init__()
        self.continuation_ids = tuple(self.continuation_ids)

    def check(self) -> None:
        """Config.check, then what GLSCL adds."""
        super().check()
        temperature = self.completion_temperature
        require(temperature > 0, f"completion_temperature is {temperature}: give more than 0")

    @property
    def completes(self) -> bool:
        """Whether any loss compares (I', T) with (I, T')."""
        return self.w_mgsc > 0 or self.w_mltc > 0

    @property
    def masks_patches(self) -> bool:
        """Whether any loss looks at I''."""
        return self.w_mltc > 0

    @property
    def masks_words(self) -> bool:
        """Whether any loss looks at a text with masked words."""
        return self.completes or self.w_mlm > 0


class GLSCL(VisionLanguageModel):
    """Completion of what is hidden, as a whole and token by token, by contrast with the pass that sees it."""

    config_class = GLSCLConfig

    def __init__(self, config: GLSCLConfig):
        super().__init__(config)
        self.make_mlm_head()
        continues = torch.zeros(config.vocab_size, dtype=torch.bool)
        continues[list(config.continuation_ids)] = True
        self.register_buffer("continues", continues, persistent=False)  # it is in the config

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step; batch as for MAMO -> the unweighted scalar losses by name."""
        self.check_batch(batch)
        config, images, input_ids = self.config, batch["images"], batch["input_ids"]
        attention_mask, length, frames = batch["attention_mask"], input_ids.shape[1], frames_of(images)
        noise = batch["token_noise"], batch["replace_noise"]

        # 1. What is masked where, and the unimodal encoders: I and I'' in one call, all texts in another, I' by itself.
        texts = {}
        if config.sees_whole or config.completes:
            texts["whole"] = input_ids, attention_mask
        if config.completes:  # replace_noise 0 = every chosen word becomes [MASK]
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

        # 2. Whole pairs: contrast, and the views for matching.
        losses, views, valid = whole_pairs(self, image["whole"], text.get("whole"), batch)

        # 3. The masked views: a = (I', T), shorter than the others and so fused by itself, and b = (I, T') among them.
        if config.completes:
            fusion = self.student.fusion
            class_tokens = torch.arange(-frames, 0, device=images.device).expand(len(images), -1)
            class_tokens = fusion.at_patches(class_tokens, length, frames)
            places = [torch.zeros_like(class_tokens[:, :1]), class_tokens]  # [CLS] and class token, one for each frame
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

        # 4. Matching, completion, words.
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
        """Masked global semantic completion: all (b, d); targets take no gradient. Chance is 4 ln(candidates)."""
        tau = self.config.completion_temperature
        return nce(image, image_target, tau) + nce(text, text_target, tau)

    def loss_mltc(
        self, patches: Tensor, patch_target: Tensor, words: Tensor, word_target: Tensor, valid: Tensor
    ) -> Tensor:
        """Masked local token completion: a token among all masked tokens of the batch, those of its own image included.

        Args:    patches, patch_target (b, m, d)   (I'', T) and (I, T') at the masked patches
                 words, word_target (b, m', d)     (I, T') and (I', T) at the masked words; valid (b, m')
        """
        tau = self.config.completion_temperature
        return nce(patches, patch_target, tau) + nce(words, word_target, tau, valid)

    def chance(self, candidates: int) -> dict[str, float]:
        """VisionLanguageModel.chance; the level of MLTC depends on the batch."""
        return super().chance(candidates) | ({"mgsc": 4 * math.log(candidates)} if self.config.w_mgsc > 0 else {})
