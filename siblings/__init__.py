"""All trainable objectives, including MAMO: their names in `train.py --objective`, and their classes.

    mamo      masked fused vectors, features and words, with contrast and matching                  mamo.py
    control   contrast, matching and masked words: MAMO without its teacher                         mamo.py
    maskvlm   masked raw pixels and words                                                           maskvlm.py
    glscl     contrastive completion: the target is a pass that sees what is masked                 glscl.py
    vlmae     a masked autoencoder: our own proposal, based on a paper's abstract                   vlmae.py

All objectives use the encoders of mamo.py; other code that the siblings share is in masking.py.
"""

import runtime
from mamo import MAMO, VisionLanguageModel
from siblings.glscl import GLSCL
from siblings.maskvlm import MaskVLM
from siblings.vlmae import VLMAE

# name: (class, Config fields that define the objective)
OBJECTIVES = {
    "mamo": (MAMO, {}),
    "control": (MAMO, {"w_mrm": 0.0, "w_mim": 0.0}),
    "maskvlm": (MaskVLM, {}),
    "glscl": (GLSCL, {}),
    "vlmae": (VLMAE, {}),
}


def model_of(objective: str) -> type[VisionLanguageModel]:
    """The class of an objective. Raises ValueError for an unknown name."""
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective][0]


def build_model(objective: str, config: dict) -> VisionLanguageModel:
    """A freshly initialised model of an objective, built from the fields of its Config."""
    model = model_of(objective)
    runtime.check_fields(model.config_class, config, f"the objective {objective}")
    return model(model.config_class(**config))
