"""The objectives that can be trained, MAMO among them: the name that `train.py --objective` takes, and its class.

    mamo      masked vectors, features and words, beside contrast and matching                     mamo.py
    control   contrast, matching and words: MAMO without its teacher                                mamo.py
    maskvlm   raw pixels and words                                                                  maskvlm.py
    glscl     completion by contrast with the pass that sees what is hidden                         glscl.py
    vlmae     a masked autoencoder, our proposal after an abstract                                  vlmae.py

What only the siblings share, beside the encoders of mamo.py, is in masking.py.
"""

import runtime
from mamo import MAMO, VisionLanguageModel
from siblings.glscl import GLSCL
from siblings.maskvlm import MaskVLM
from siblings.vlmae import VLMAE

# name: (class, fields of its Config that make it up)
OBJECTIVES = {
    "mamo": (MAMO, {}),
    "control": (MAMO, {"w_mrm": 0.0, "w_mim": 0.0}),
    "maskvlm": (MaskVLM, {}),
    "glscl": (GLSCL, {}),
    "vlmae": (VLMAE, {}),
}


def model_of(objective: str) -> type[VisionLanguageModel]:
    """The class of an objective. Raises ValueError for an unknown one."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective][0]


def build_model(objective: str, config: dict) -> VisionLanguageModel:
    """A fresh model of an objective from the fields of its Config."""
    model = model_of(objective)
    runtime.check_fields(model.config_class, config, f"the objective {objective}")
    return model(model.config_class(**config))
