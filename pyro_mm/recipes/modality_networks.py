"""Networks for every kind of modality: vectors, arrays, images, sequences, strings of tokens, classes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from .. import conditionals
from ..batch.batch import Batch, check_batch
from ..nn import MLP, Recurrent, RecurrentDecoder, RecurrentTokens
from ..utils.arguments import check_name
from .networks import Hidden, number_of_classes

Kind = Literal["class", "number", "vector", "image", "array", "sequence", "tokens"]
Scale = Callable[[tuple[int, ...]], float | nn.Parameter]  # from the shape of a standard deviation to itself


def modality_kind(batch: Batch, name: str) -> Kind:
    """Return the kind of a modality by its type, shape, values and lengths.

    ============= ==================================== =============================================
    kind          values                               likelihood
    ============= ==================================== =============================================
    ``class``     integers ``(N,)``                    Categorical
    ``tokens``    integers ``(N, T)``                  :class:`~pyro_mm.conditionals.Tokens`
    ``number``    floats ``(N,)``                      Normal
    ``vector``    floats ``(N, D)``                    Normal
    ``sequence``  floats ``(N, T, D)`` with lengths    Normal
    ``image``     other floats, 0 or 1                 Bernoulli
    ``array``     all other floats                     Normal
    ============= ==================================== =============================================

    Args:
        batch: rows that hold values of it.
        name: the modality.

    Raises:
        ValueError: the modality is unknown, without values in the batch, or of no such kind.
    """
    check_batch(batch)
    check_name("modality", name, batch)
    if not batch.holds(name):
        raise ValueError(
            f"modality {name!r}: the batch holds no values of it, which the networks take their sizes from"
        )
    value = batch[name]
    if not value.is_floating_point():
        kinds: dict[int, Kind] = {1: "class", 2: "tokens"}
        if value.dim() not in kinds:
            raise ValueError(
                f"{name!r} is {value.dtype} of shape {tuple(value.shape)}, for which the recipe has no networks: "
                "it has them for a class (N,) and for tokens (N, T). Write the story instead, or make it floats"
            )
        return kinds[value.dim()]
    if value.dim() < 3:
        return "number" if value.dim() == 1 else "vector"
    if value.dim() == 3 and name in batch.lengths:
        return "sequence"
    return "image" if bool(((value == 0) | (value == 1)).all()) else "array"


def encoder_network(batch: Batch, name: str, out: int, hidden: Hidden) -> nn.Module:
    """Build a map from the values of a modality to features ``(.., out)``.

    An LSTM for sequences and tokens, an embedding for a class, and a perceptron for the others.

    Args:
        batch: rows from which the kind and the size of the modality are read.
        name: the modality.
        out: the number of features.
        hidden: sizes of the hidden layers; the last one is that of an LSTM's state, ``out`` if there is none.
    """
    kind = modality_kind(batch, name)
    width = hidden[-1] if hidden else out
    if kind == "class":
        return nn.Embedding(number_of_classes(batch, name), out)
    if kind == "sequence":
        return Recurrent(batch[name].shape[-1], out, width, recurrence=nn.LSTM)
    if kind == "tokens":
        vocabulary = number_of_classes(batch, name)
        return Recurrent(width, out, width, recurrence=nn.LSTM, vocabulary=vocabulary)
    return MLP(batch[name][0].numel(), out, hidden)


def likelihood_network(batch: Batch, name: str, inputs: int, hidden: Hidden, scale: Scale) -> nn.Module:
    """Build p(x_m | z) by the kind of the modality, see :func:`modality_kind`.

    Args:
        batch: rows from which the kind and the size of the modality are read.
        name: the modality m.
        inputs: the size of z, ``(.., inputs)``.
        hidden: sizes of the hidden layers; the last one is that of an LSTM's state.
        scale: the standard deviation of a Normal, a number or a Parameter with its logarithm, from its shape: that of
            the event, or of one step of a sequence.
    """
    kind = modality_kind(batch, name)
    event = tuple(batch[name].shape[1:])
    width = hidden[-1] if hidden else inputs
    if kind == "class":
        return conditionals.Categorical(MLP(inputs, number_of_classes(batch, name), hidden))
    if kind == "tokens":
        next_token = RecurrentTokens(inputs, number_of_classes(batch, name), width, recurrence=nn.LSTM)
        return conditionals.Tokens(next_token, event[0], end_token(batch, name))
    if kind == "sequence":
        steps, size = event
        decoder = RecurrentDecoder(inputs, steps, size, width, recurrence=nn.LSTM)
        return conditionals.Normal(decoder, event, scale(event[1:]))
    network = MLP(inputs, batch[name][0].numel(), hidden)
    if kind == "image":
        return conditionals.Bernoulli(network, event)
    return conditionals.Normal(network, event, scale(event))


def end_token(batch: Batch, name: str) -> int | None:
    """Return the token that ends every string, and occurs nowhere else in them; None if there is none.

    Args:
        batch: the rows.
        name: a modality of tokens ``(N, T)``.
    """
    if name not in batch.lengths:
        return None
    present: Any = batch.present[name]
    tokens, lengths = batch[name][present], batch.lengths[name][present].long()
    if not len(tokens) or bool((lengths < 1).any()):
        return None
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    before = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None] - 1
    is_end = bool((last == last[0]).all()) and not bool((before & (tokens == last[0])).any())
    return int(last[0]) if is_end else None
