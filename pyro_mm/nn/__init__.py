"""Networks from tensor to tensor, for encoders and decoders. All of them take any leading dimensions.

Encoders of sequences (``Recurrent``, ``TemporalConvolutional``, ``Attention``) have a parameter ``lengths``, and so
get those of their modality from the batch.
"""

from .images import Blocks, Convolutional, Deconvolutional
from .perceptron import MLP
from .sequences import Attention, Recurrent, RecurrentDecoder, TemporalConvolutional
from .token_decoders import AttentionTokens, RecurrentTokens

__all__ = [
    "MLP", "Attention", "AttentionTokens", "Blocks", "Convolutional", "Deconvolutional", "Recurrent",
    "RecurrentDecoder", "RecurrentTokens", "TemporalConvolutional",
]  # fmt: skip
