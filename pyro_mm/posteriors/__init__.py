r"""Posteriors q(z | x_S) for every subset S of the modalities: modules ``batch -> distribution``.

Each row has its own S, the modalities present in it. A masked modality drops out as if it had been deleted, and no
result depends on a row's place in the batch. An encoder, or "expert", is a module that maps the values of a modality to
a Normal of event shape ``(D,)`` unless another family is named; it is run once per step.
"""

from .categorical import Label, ProductOfCategoricals
from .conditional_choice import Either, Given
from .expert_mixtures import HoelderPooling, MixtureOfExperts, MixtureOfProducts
from .experts import DependentExperts, ProductOfExperts
from .joint_encoder import JointEncoder
from .private import Private, PrivateOf
from .set_encoders import SelfAttention, SumPooling

__all__ = [
    "DependentExperts", "Either", "Given", "HoelderPooling", "JointEncoder", "Label", "MixtureOfExperts",
    "MixtureOfProducts", "Private", "PrivateOf", "ProductOfCategoricals", "ProductOfExperts", "SelfAttention",
    "SumPooling",
]  # fmt: skip
