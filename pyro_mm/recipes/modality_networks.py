"""Networks of each modality: those that are passed to a recipe, and others that are chosen by kind and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import conditionals
from ..batch.batch import Batch
from ..nn import MLP, Convolutional, Deconvolutional, Recurrent, RecurrentDecoder, RecurrentTokens
from ..utils.arguments import check_mapping, check_name, describe
from .kinds import KINDS, Kind, check_kind, end_token, example_of_networks, modality_kind, number_of_classes, values_of

Hidden: TypeAlias = Sequence[int]
Scale: TypeAlias = Callable[[tuple[int, ...]], float | nn.Parameter]  # from the shape of a scale to itself
CHANNELS = (32, 64, 128, 256)  # of convolutions, the first of them as often as an image can be halved
LEAST_SIDE = 4  # pixels of the smallest image within a network of convolutions
COUNT_OFFSET = 1e-3  # added to mean counts before their logarithm


@dataclass(frozen=True)
class Networks:
    """Networks of one modality, for the argument ``networks`` of a recipe.

    A recipe calls each function once for every network that it needs, so that one call makes one new network.

    Args:
        encoder: from a number of features to a module, values ``(.., N, *event) -> (.., N, out)``; None for one that is
            chosen by kind.
        decoder: from a number of inputs to a conditional p(x | z) given ``(.., N, inputs)``; None for one chosen by
            kind. Its family is the likelihood.
        kind: the kind by which what is None is chosen, see :mod:`pyro_mm.recipes`; None for that of the values.

    Raises:
        TypeError: ``encoder`` or ``decoder`` is no function, or a module where a function that makes one is expected.
        ValueError: an unknown kind.

    Example:
        >>> import pyro_mm as mm
        >>> shape = (3, 16, 16)
        >>> networks = Networks(
        ...     encoder=lambda out: mm.nn.Convolutional(shape, out),
        ...     decoder=lambda inputs: mm.conditionals.Laplace(mm.nn.Deconvolutional(inputs, shape), shape, scale=0.1),
        ... )
        >>> rows = mm.Batch({"photo": torch.rand(8, *shape), "label": torch.arange(8) % 2})
        >>> model, guide, objective = mm.recipes.mvae(rows, networks={"photo": networks})
    """

    encoder: Callable[[int], nn.Module] | None = None
    decoder: Callable[[int], nn.Module] | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        for argument in ("encoder", "decoder"):
            value = getattr(self, argument)
            number = "out" if argument == "encoder" else "inputs"
            if isinstance(value, nn.Module) or not (value is None or callable(value)):
                raise TypeError(
                    f"expected {argument} to be a function that makes a network, lambda {number}: .., since a recipe "
                    f"may need several, of sizes of its own; got {describe(value)}"
                )
        if self.kind is not None:
            check_name("kind", self.kind, KINDS, "kind")


NetworksOf: TypeAlias = Mapping[str, Networks | Kind] | None


def check_networks(networks: NetworksOf, batch: Batch) -> dict[str, Networks]:
    """Return modality -> networks that were passed, with kinds in words as Networks.

    Raises:
        TypeError: no mapping, or a value that is neither Networks nor the name of a kind.
        ValueError: an unknown modality or kind, or a kind that the values are not of.
    """
    given = check_mapping("networks", {} if networks is None else networks, "Networks, or names of kinds")
    found: dict[str, Networks] = {}
    for name, value in given.items():
        check_name("modality", name, batch)
        if isinstance(value, str):
            value = Networks(kind=check_name(f"networks[{name!r}]", value, KINDS, "kind"))  # type: ignore[arg-type]
        if not isinstance(value, Networks):
            raise TypeError(
                f"expected networks[{name!r}] to be mm.recipes.Networks or the name of a kind, got {describe(value)}. "
                f"Give {example_of_networks(name)}"
            )
        if value.kind is not None:
            check_kind(batch, name, value.kind)
        found[name] = value
    return found


class ModalityNetworks:
    """Makers of the networks of every modality of a batch.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        hidden: sizes of the hidden layers of every network that is chosen by kind.
        networks: modality -> networks that were passed, or a kind; None for none.

    Attributes:
        batch: the rows.
        hidden: the sizes.
    """

    def __init__(self, batch: Batch, hidden: Hidden, networks: NetworksOf = None) -> None:
        self.batch = batch
        self.hidden = hidden
        self._given = check_networks(networks, batch)

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities."""
        return tuple(self.batch)

    def kind(self, name: str) -> Kind:
        """Return the kind of a modality: the one that was passed, or that of its values."""
        given = self._given.get(name, Networks())
        return modality_kind(self.batch, name) if given.kind is None else given.kind

    def event(self, name: str) -> tuple[int, ...]:
        """Return the shape of one value of a modality."""
        return tuple(values_of(self.batch, name).shape[1:])

    def is_class(self, name: str) -> bool:
        """Return True for a label: integers of shape ``(N,)``."""
        value = values_of(self.batch, name)
        return value.dim() == 1 and not value.is_floating_point()

    def has_decoder(self, name: str) -> bool:
        """Return True if a decoder of the modality was passed."""
        return self._given.get(name, Networks()).decoder is not None

    def encoder(self, name: str, out: int, hidden: Hidden | None = None) -> nn.Module:
        """Build a map from the values of a modality to features ``(.., out)``.

        An embedding for a class, an LSTM for sequences and tokens, convolutions for colour images, and a perceptron for
        the others, of counts after log(1 + x).

        Args:
            name: the modality.
            out: the number of features.
            hidden: sizes of the hidden layers, the last one is that of an LSTM's state, ``out`` if there is none; None
                for those of the recipe.
        """
        values_of(self.batch, name)
        make = self._given.get(name, Networks()).encoder
        if make is not None:
            return _check_made(make(out), f"networks[{name!r}].encoder({out})")
        hidden = self.hidden if hidden is None else hidden
        kind = self.kind(name)
        event = self.event(name)
        width = hidden[-1] if hidden else out
        if kind == "class":
            return nn.Embedding(number_of_classes(self.batch, name), out)
        if kind == "sequence":
            return Recurrent(event[-1], out, width, recurrence=nn.LSTM)
        if kind == "tokens":
            vocabulary = number_of_classes(self.batch, name)
            return Recurrent(width, out, width, recurrence=nn.LSTM, vocabulary=vocabulary)
        if kind == "number":
            return nn.Sequential(_OneFeature(), MLP(1, out, hidden))
        if channels := convolution_channels(event):
            if not hidden:
                return Convolutional(event, out, channels)
            return nn.Sequential(Convolutional(event, hidden[0], channels), nn.ReLU(), MLP(hidden[0], out, hidden[1:]))
        perceptron = MLP(self.batch[name][0].numel(), out, hidden)
        if kind == "counts":
            return nn.Sequential(_Log1p(), perceptron)
        return nn.Sequential(nn.Flatten(-len(event)), perceptron) if _has_idle_dimension(event) else perceptron

    def decoder(self, name: str, inputs: int, scale: Scale | None = None) -> nn.Module:
        """Build p(x_m | z) by the kind of the modality, see :func:`~pyro_mm.recipes.kinds.modality_kind`.

        Args:
            name: the modality m.
            inputs: the size of z, ``(.., inputs)``.
            scale: the standard deviation of a Normal, a number or a Parameter with its logarithm, from its shape: that
                of a vector or of one step of a sequence, and ``()`` for an array; None for a Parameter.

        Raises:
            ValueError: a feature has one value in all rows, of which the density under a learned scale has no bound.
        """
        values_of(self.batch, name)
        make = self._given.get(name, Networks()).decoder
        if make is not None:
            return _check_made(make(inputs), f"networks[{name!r}].decoder({inputs})")
        hidden = self.hidden
        kind = self.kind(name)
        event = self.event(name)
        width = hidden[-1] if hidden else inputs
        if kind == "class":
            return conditionals.Categorical(MLP(inputs, number_of_classes(self.batch, name), hidden))
        if kind == "tokens":
            next_token = RecurrentTokens(inputs, number_of_classes(self.batch, name), width, recurrence=nn.LSTM)
            return conditionals.Tokens(next_token, event[0], end_token(self.batch, name))
        if scale is None:
            if kind in ("vector", "sequence", "number"):
                _check_features_vary(self.batch, name)
            scale = _learned_scale
        if kind == "sequence":
            steps, size = event
            decoder = RecurrentDecoder(inputs, steps, size, width, recurrence=nn.LSTM)
            return conditionals.Normal(decoder, event, scale(event[1:]))
        network = self._image_decoder(name, inputs)
        if kind in ("bits", "grey"):
            return conditionals.Bernoulli(network, event)
        if kind == "counts":
            _start_at_mean_counts(network, self.batch[name][self.batch.present[name]])
            return conditionals.NegativeBinomial(network, event)
        return conditionals.Normal(network, event, scale(() if kind == "array" else event))

    def _image_decoder(self, name: str, inputs: int) -> nn.Module:
        """Build a map from z to one number per entry of a value: convolutions for colour images, or a perceptron."""
        event = self.event(name)
        hidden = self.hidden
        channels = convolution_channels(event)[::-1]
        if not channels:
            perceptron = MLP(inputs, self.batch[name][0].numel(), hidden)
            return nn.Sequential(perceptron, nn.Unflatten(-1, event)) if _has_idle_dimension(event) else perceptron
        if not hidden:
            return Deconvolutional(inputs, event, channels)
        return nn.Sequential(
            MLP(inputs, hidden[-1], hidden[:-1]), nn.ReLU(), Deconvolutional(hidden[-1], event, channels)
        )


def convolution_channels(event: tuple[int, ...]) -> tuple[int, ...]:
    """Return the channels after each convolution for images ``(C, H, W)``; none for other shapes and tiny images.

    An image is halved up to four times, as long as no side gets below ``LEAST_SIDE`` pixels.
    """
    if len(event) != 3:
        return ()
    side = min(event[1:])
    return CHANNELS[: sum(side >> times >= LEAST_SIDE for times in range(1, 1 + len(CHANNELS)))]


def _has_idle_dimension(event: tuple[int, ...]) -> bool:
    """Return True for events such as ``(1, D)``, of which a perceptron cannot tell one of rows from that of size 1."""
    return len(event) > 1 and event[0] == 1


def _learned_scale(shape: tuple[int, ...]) -> nn.Parameter:
    """Return the logarithm of a standard deviation, trainable, which begins at 0."""
    return nn.Parameter(torch.zeros(shape))


def _check_made(network: nn.Module, call: str) -> nn.Module:
    """Return a network that a user's function made. Raises a TypeError for anything but a module."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"expected {call} to return a torch.nn.Module, got {describe(network)}")
    return network


def _check_features_vary(batch: Batch, name: str) -> None:
    """Raise a ValueError if a feature of real numbers has one value in all rows that have the modality."""
    value = batch[name][batch.present[name]]
    if len(value) < 2:
        return
    flat = value.reshape(-1, 1 if value.dim() == 1 else value.shape[-1])
    constant = (flat == flat[0]).all(0).nonzero()[:, 0].tolist()
    if constant:
        listed = ", ".join(map(str, constant[:5])) + (", .." if len(constant) > 5 else "")
        raise ValueError(
            f"modality {name!r}: {len(constant)} of {flat.shape[1]} features have one value in all rows ({listed}, "
            "counted from 0). Their density grows without bound as its learned scale shrinks. Leave them out, or pass "
            f"a likelihood with a fixed scale, networks={{{name!r}: mm.recipes.Networks(decoder=lambda inputs: "
            "mm.conditionals.Normal(.., scale=1.0))}"
        )


def _start_at_mean_counts(network: nn.Module, counts: Tensor) -> None:
    """Set the bias of a perceptron's last layer to the logarithms of mean counts ``(N, D)``, in place; if N > 0."""
    if len(counts) == 0:
        return
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_((counts.double().mean(0) + COUNT_OFFSET).log())


class _OneFeature(nn.Module):
    """Numbers ``(.., N)`` as vectors ``(.., N, 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None]


class _Log1p(nn.Module):
    """The logarithm of 1 + x, in floating-point numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x if x.is_floating_point() else x.to(torch.get_default_dtype())).log1p()
