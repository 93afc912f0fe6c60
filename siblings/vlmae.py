"""VLMAE (our proposal): a masked autoencoder for vision and language, a sibling of MAMO on the same encoders.

Read this first. The paper is He et al., "VLMAE", arXiv 2208.09374. Only its abstract was available to us, and we found
no code. According to the abstract, masked autoencoding of the image is added to vision-language pre-training, so that
the model attends to almost all critical patches, not only to those that a caption mentions; pre-training gets cheaper.
The names RMIM and IFR are from memory, and we could not confirm them. Every formula, ratio, depth and weight below is
our own, in that spirit: results say nothing about the paper. Tables call it "vlmae (our proposal)".

Its answer to "recover what?": the targets of an autoencoder, predicted with and without the text.

    RMIM   the pixels of dropped patches, normalised per patch as in MAE, from the visible patches and the text
    IFR    the teacher's image features of dropped patches, from the visible patches alone, without the text
    MLM    15 % of the words, from the other words and the visible patches
    ITC and ITM as in all other objectives, but on (I_vis, T): in pre-training, the student never sees a whole image.

Differences from MAMO: half of the patches never enter the student, whatever the loss, which saves computation; the
image encoder alone must also reconstruct features of dropped patches; the teacher is a copy of the image encoder only.

Our choices: 50 % of the patches are dropped at random; the keys of ITC come from the student; the RMIM decoder consists
of two fusion blocks over the fused tokens of (I_vis, T), with mask tokens and positions reinserted; the IFR predictor
is one block over the image and a linear layer; IFR is smooth L1 with layer-normalised targets; all weights are 1.
Evaluation uses whole images, i.e. sequences about twice as long as in pre-training.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamo import (
    Block,
    Config,
    View,
    VisionLanguageModel,
    at,
    drop_patches,
    encode_together,
    frames_of,
    global_mean,
    init_weights,
    mask_words,
    move_teacher,
    normalised,
    patchify,
    put_back,
    require,
    teacher_of,
)
from siblings.masking import PixelDecoder, matched, whole_pairs


@dataclass
class VLMAEConfig(Config):
    """The fields that our proposal adds."""

    mask_image: float = 0.5  # fraction of patches that are dropped
    mask_text: float = 0.15  # fraction of words masked for MLM
    decoder_depth: int = 2  # number of blocks in the pixel decoder
    w_rmim: float = 1.0  # weight of regional masked image modelling
    w_ifr: float = 1.0  # weight of image feature reconstruction
    ema: float = 0.995  # momentum of the teacher; unless given, train.py sets it from the length of the run

    def check(self) -> None:
        """Config.check, and the checks specific to our proposal."""
        super().check()
        require(self.decoder_depth > 0, f"decoder_depth is {self.decoder_depth}: it must be at least 1")
        require(0 <= self.ema <= 1, f"ema is {self.ema}: give the teacher a momentum in [0, 1]")
        alone = [name for name, weight in self.loss_weights.items() if weight] == ["ifr"]
        require(not alone, "w_ifr alone trains no text encoder: give another loss a weight too")

    @property
    def fuses(self) -> bool:
        """Whether any loss needs the fusion encoder."""
        return super().fuses or self.w_rmim > 0


class VLMAE(VisionLanguageModel):
    """Predicts pixels with the text, features without the text, and words, all from the visible half of the image."""

    config_class = VLMAEConfig

    def __init__(self, config: VLMAEConfig):
        super().__init__(config)
        d = config.width
        if config.w_rmim > 0:
            self.pixel_token = nn.Parameter(torch.zeros(d))
            self.decoder = PixelDecoder(config, config.decoder_depth).apply(init_weights)
        if config.w_ifr > 0:
            self.feature_token = nn.Parameter(torch.zeros(d))
            self.feature_block = Block(config, norm_first=False).apply(init_weights)
            self.feature_head = nn.Linear(d, d).apply(init_weights)
            self.teacher = teacher_of(self.student.image)
        self.make_mlm_head()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One training step: batch as for MAMO -> unweighted scalar losses by name."""
        self.check_batch(batch)
        config, images, input_ids = self.config, batch["images"], batch["input_ids"]
        attention_mask = batch["attention_mask"]

        # 1. The visible patches, T and T'.
        frames = frames_of(images)
        dropped, kept = drop_patches(batch["patch_noise"], config.mask_image, frames)
        visible = self.student.image(images, kept=kept)
        texts = {}
        if config.sees_whole or config.w_rmim > 0:
            texts["whole"] = input_ids, attention_mask
        if config.w_mlm > 0:
            noise = batch["token_noise"], batch["replace_noise"]
            words = mask_words(input_ids, attention_mask, *noise, config.mask_text, config)
            texts["masked"] = words.input_ids, attention_mask
        text = encode_together(self.encode_text, texts)

        # 2. Pairs: contrast, and the views for matching. RMIM needs (I_vis, T) in full, matching only its [CLS].
        losses, views, valid = whole_pairs(self, visible, text.get("whole"), batch)
        if config.w_rmim > 0:
            views["pair"] = View(visible, text["whole"], attention_mask)
        if config.w_mlm > 0:
            views["words"] = View(visible, text["masked"], attention_mask, words.index)
        fused = self.fuse_views(views)

        # 3. Losses: matching, and the prediction of dropped patches and masked words.
        positions = self.student.image.places(frames)
        if config.w_itm > 0:
            losses["itm"] = self.loss_itm(*matched(fused), valid)
        if config.w_rmim > 0:
            pair = self.student.fusion.unpack(fused["pair"], input_ids.shape[1])
            whole = put_back(pair.image, kept, self.pixel_token, positions, frames)
            predicted = self.decoder(whole, pair.text, attention_mask, dropped, frames)
            losses["rmim"] = self.loss_rmim(predicted, at(patchify(images, config.patch_size), dropped))
        if config.w_ifr > 0:
            with torch.no_grad():
                target = at(self.teacher(images), frames + dropped)
            whole = put_back(visible, kept, self.feature_token, positions, frames)
            losses["ifr"] = self.loss_ifr(self.feature_head(self.feature_block(whole, index=frames + dropped)), target)
        if config.w_mlm > 0:
            losses["mlm"] = self.loss_mlm(fused["words"], words.labels, words.valid)
        return losses

    def contrasted_image(self, batch: dict[str, Tensor]) -> Tensor:
        """The visible patches alone, as in forward -> (b, 1 + k, d)"""
        images = batch["images"]
        kept = drop_patches(batch["patch_noise"], self.config.mask_image, frames_of(images))[1]
        return self.student.image(images, kept=kept)

    def loss_rmim(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        """Regional masked image modelling: predicted, pixels (b, m, 3 * patch_size ** 2) -> scalar, mean squared error.

        Each patch is normalised by its own mean and variance, as in MAE. The chance level is 1, or lower if some
        patches have a single colour, which normalises to 0.
        differs: MAE divides by the square root of the unbiased variance plus 1e-6; as for the other targets, we use the
        biased variance plus 1e-5.
        """
        return global_mean((predicted.float() - normalised(pixels)).square())

    def loss_ifr(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Image feature reconstruction: predicted, target (b, m, d) -> scalar, smooth L1; 0.42 at chance."""
        return global_mean(F.smooth_l1_loss(predicted.float(), normalised(target), reduction="none"))

    @torch.no_grad()
    def after_step(self, progress: float = 0.0) -> None:
        """VisionLanguageModel.after_step, then move the teacher towards the student's image encoder."""
        super().after_step(progress)
        if self.teacher is not None:
            move_teacher(self.teacher, self.student.image, self.config.ema)
