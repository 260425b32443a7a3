"""Encoders of sequences and of strings of tokens, and a decoder of sequences. Steps behind the end count nowhere."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.arguments import check_counts, check_number, describe
from .layer_arguments import check_activation, check_sizes

Recurrence = Callable[..., nn.Module]  # a class of torch's recurrent networks


class SequenceEncoder(nn.Module, ABC):
    """The base class of the encoders, ``(.., T, in_features) -> (.., out_features)``.

    It masks the steps behind the end of each sequence, puts the leading dimensions into one, and applies an affine
    map to the summary that a subclass computes.

    Args:
        in_features: the size of a step, or of the embedding of a token.
        out_features: the size of the output's last dimension.
        summary: the size of what ``summarise`` returns.
        vocabulary: the number of tokens, for inputs ``(.., T)`` of integers; None for steps of real numbers.
    """

    def __init__(self, in_features: int, out_features: int, summary: int, vocabulary: int | None) -> None:
        super().__init__()
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, in_features)
        self.head = nn.Linear(summary, out_features)

    @abstractmethod
    def summarise(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return one vector per sequence, which the steps behind its end do not enter.

        Args:
            x: steps ``(R, T, in_features)``, zero behind the end.
            valid: the steps before the end, boolean ``(R, T)``; None for all.

        Returns:
            ``(R, summary)``; zero for a sequence without a step.
        """

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return ``(.., out_features)``, which no step behind the last valid one changes, nor its gradient.

        Args:
            x: sequences ``(.., T, in_features)``, or tokens ``(.., T)`` if there is a vocabulary.
            lengths: numbers of valid steps, which broadcast with the leading dimensions; None for T. A sequence of
                length 0 gives the affine map of zero.
        """
        lead = x.shape[: x.dim() - (1 if self.embedding is not None else 2)]
        steps = x.shape[len(lead)]
        valid = None if lengths is None else valid_steps(lengths.expand(lead), steps).reshape(-1, steps)
        x = x.reshape(-1, *x.shape[len(lead) :])
        if self.embedding is not None:
            x = self.embedding(x if valid is None else torch.where(valid, x, 0))
        x = x.to(self.head.weight.dtype)
        if valid is not None:
            x = torch.where(valid[..., None], x, 0.0)  # padding that is infinite would get into the gradient
        output: Tensor = self.head(self.summarise(x, valid)).reshape(*lead, -1)
        return output


class Recurrent(SequenceEncoder):
    """A recurrent sequence encoder, ``(..., T, in_features) -> (..., out_features)``: an affine map of its last state.

    As an encoder, alone or within a conditional, it gets the lengths of its modality from the batch. The last state is
    that after the last valid step; steps behind it change neither the output nor the gradient.

    Args:
        in_features: the size of a step, or of the embedding of a token.
        out_features: the size of the output's last dimension.
        hidden: the size of the state.
        recurrence: ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN``.
        layers: the number of recurrent layers.
        vocabulary: the number of tokens, for inputs ``(.., T)`` of integers; None for steps of real numbers.

    Example:
        >>> from pyro_mm import Batch
        >>> batch = Batch({"word": torch.zeros(3, 7, 26)}, lengths={"word": [7, 2, 4]})
        >>> batch.encode("word", Recurrent(26, 8)).shape
        torch.Size([3, 8])
        >>> Recurrent(16, 8, vocabulary=27, recurrence=nn.LSTM)(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 64,
        *,
        recurrence: Recurrence = nn.GRU,
        layers: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        check_encoder_sizes(in_features, out_features, vocabulary, hidden=hidden, layers=layers)
        super().__init__(in_features, out_features, hidden, vocabulary)
        self.kind = add_recurrence(self, recurrence, in_features, hidden, layers)

    def summarise(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return the state after the last valid step, ``(R, hidden)``; zero without a step."""
        states, _ = getattr(self, self.kind)(x)
        if valid is None:
            at_end: Tensor = states[:, -1]
            return at_end
        length = valid.sum(-1)[:, None, None]
        last = (length - 1).clamp(min=0).expand(-1, 1, states.shape[-1])
        return torch.where(length > 0, states.gather(1, last), 0.0).squeeze(1)


class TemporalConvolutional(SequenceEncoder):
    r"""A convolutional sequence encoder, ``(..., T, in_features) -> (..., out_features)``.

    Convolutions over time, the i-th with dilation :math:`2^i`, which keep the number of steps; then the mean over the
    valid steps, and an affine map. What lies behind the end counts as zero in every layer, as what lies outside of the
    sequence does, so that a padded sequence is encoded as the same one cut to its length.

    Args:
        in_features: the size of a step, or of the embedding of a token.
        out_features: the size of the output's last dimension.
        channels: the number of channels after each convolution.
        kernel: the number of steps that a convolution sees, odd.
        activation: called for a module after each convolution.
        vocabulary: the number of tokens, for inputs ``(.., T)`` of integers; None for steps of real numbers.

    Raises:
        ValueError: a kernel that is even.

    Example:
        >>> lengths = torch.tensor([7, 2, 4])
        >>> TemporalConvolutional(26, 8)(torch.zeros(5, 3, 7, 26), lengths).shape
        torch.Size([5, 3, 8])

    References:
        Bai et al. 2018 (arXiv:1803.01271), there with causal convolutions.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        channels: Sequence[int] = (64, 64),
        *,
        kernel: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
        vocabulary: int | None = None,
    ) -> None:
        check_encoder_sizes(in_features, out_features, vocabulary, kernel=kernel)
        channels = check_sizes("channels", channels)
        check_activation(activation)
        if not channels:
            raise ValueError("expected channels to be the sizes of one layer at least, got none")
        if kernel % 2 == 0:
            raise ValueError(f"expected a kernel of an odd number of steps, got {kernel}")
        super().__init__(in_features, out_features, channels[-1], vocabulary)

        sizes = (in_features, *channels)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(sizes[i], sizes[i + 1], kernel, padding=kernel // 2 * 2**i, dilation=2**i)
            for i in range(len(channels))
        )
        self.activations = nn.ModuleList(activation() for _ in channels)

    def summarise(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return the mean over valid steps of the last layer, ``(R, channels[-1])``; zero without a step."""
        x = x.mT
        for convolution, activation in zip(self.convolutions, self.activations, strict=True):
            x = activation(convolution(x))
            if valid is not None:
                x = torch.where(valid[:, None], x, 0.0)
        return mean_over_steps(x.mT, valid)


class Attention(SequenceEncoder):
    """A sequence encoder of self-attention, ``(..., T, in_features) -> (..., out_features)``.

    Steps with sinusoidal positions go through layers of torch's ``nn.TransformerEncoder``, normalised before each part,
    in which steps behind the end are masked as keys; then the mean over the valid steps, and an affine map.

    Args:
        in_features: the size of a step; ``width`` numbers embed a token, whatever it is.
        out_features: the size of the output's last dimension.
        width: the size of a step within the layers.
        heads: the number of attention heads, which divides ``width``.
        layers: the number of layers.
        dropout: the probability of dropout in the layers, in training mode.
        vocabulary: the number of tokens, for inputs ``(.., T)`` of integers; None for steps of real numbers.

    Raises:
        ValueError: a width that the heads do not divide, or that is odd.

    Example:
        >>> lengths = torch.tensor([7, 2, 4])
        >>> Attention(26, 8)(torch.zeros(5, 3, 7, 26), lengths).shape
        torch.Size([5, 3, 8])

    References:
        Vaswani et al. 2017 (arXiv:1706.03762); Xiong et al. 2020 (arXiv:2002.04745) on normalisation before each part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int = 64,
        *,
        heads: int = 4,
        layers: int = 1,
        dropout: float = 0.0,
        vocabulary: int | None = None,
    ) -> None:
        check_encoder_sizes(in_features, out_features, vocabulary, width=width, heads=heads, layers=layers)
        super().__init__(in_features, out_features, width, vocabulary)
        self.entry = nn.Linear(in_features, width)
        self.layers = attention_layers(width, heads, layers, dropout)

    def summarise(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return the mean over valid steps of the last layer, ``(R, width)``; zero without a step."""
        x = self.entry(x)
        x = x + positions(x.shape[1], x.shape[2], x)
        hidden = None
        if valid is not None:
            first = torch.arange(x.shape[1], device=x.device) == 0
            hidden = ~(valid | first)  # without any key to attend to, a softmax would be NaN
        return mean_over_steps(self.layers(x, src_key_padding_mask=hidden), valid)


class RecurrentDecoder(nn.Module):
    r"""A recurrent sequence decoder, ``(..., in_features) -> (..., T, out_features)``.

    The input sets the first state and enters every step; steps are affine maps of the states. As a network of a
    conditional of event shape ``(T, D)``, m parameters per entry take ``out_features = m * D``.

    Args:
        in_features: the size of the input's last dimension.
        steps: the number of steps T.
        out_features: the size of a step.
        hidden: the size of the state.
        recurrence: ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN``.
        layers: the number of recurrent layers.

    Example:
        >>> from pyro_mm import conditionals
        >>> decoder = conditionals.Normal(RecurrentDecoder(2, 7, 2 * 26), event_shape=(7, 26))
        >>> decoder(torch.zeros(5, 3, 2)).event_shape
        torch.Size([7, 26])
    """

    def __init__(
        self,
        in_features: int,
        steps: int,
        out_features: int,
        hidden: int = 64,
        *,
        recurrence: Recurrence = nn.GRU,
        layers: int = 1,
    ) -> None:
        super().__init__()
        check_counts(in_features=in_features, steps=steps, out_features=out_features, hidden=hidden, layers=layers)
        self.steps = steps
        self.start = nn.Linear(in_features, hidden * layers)
        self.kind = add_recurrence(self, recurrence, in_features, hidden, layers)
        self.head = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return sequences ``(..., T, out_features)`` for ``(..., in_features)``."""
        rows = x.to(self.head.weight.dtype).reshape(-1, x.shape[-1])
        network = getattr(self, self.kind)
        states, _ = network(rows[:, None].expand(-1, self.steps, -1), first_state(network, self.start(rows)))
        output: Tensor = self.head(states).reshape(*x.shape[:-1], self.steps, -1)
        return output


# -- parts ---------------------------------------------------------------------------------------------------------


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """Return the steps before the end, boolean ``(.., steps)``, of sequences of ``lengths`` ``(..)``."""
    return torch.arange(steps, device=lengths.device) < lengths[..., None]


def mean_over_steps(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over valid steps, ``(R, F)``; zero without any.

    Args:
        x: ``(R, T, F)``.
        valid: boolean ``(R, T)``; None for all steps.
    """
    if valid is None:
        return x.mean(1)
    total = torch.where(valid[..., None], x, 0.0).sum(1)
    return total / valid.sum(-1).clamp(min=1)[:, None]


def positions(steps: int, width: int, like: Tensor) -> Tensor:
    r"""Return sinusoidal positions ``(steps, width)`` of the type and on the device of a tensor.

    .. math:: p_{t, 2i} = \sin(t / 10^{8 i / w}), \qquad p_{t, 2i + 1} = \cos(t / 10^{8 i / w})

    Args:
        steps: the number of steps.
        width: w, even.
        like: a tensor of floats.
    """
    step = torch.arange(steps, device=like.device, dtype=like.dtype)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, device=like.device, dtype=like.dtype) * (-math.log(1e4) / width))
    return torch.stack([(step * rate).sin(), (step * rate).cos()], -1).flatten(1)


def attention_layers(width: int, heads: int, layers: int, dropout: float) -> nn.TransformerEncoder:
    """Return torch's layers of self-attention, normalised before each part and at the end.

    Raises:
        ValueError: a width that the heads do not divide, or that is odd.
    """
    check_number("dropout", dropout, least=0, below=1)
    if width % heads or width % 2:
        raise ValueError(f"expected an even width that {heads} heads divide, got {width}")
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)


def add_recurrence(module: nn.Module, recurrence: Any, in_features: int, hidden: int, layers: int) -> str:
    """Add a recurrent network to a module under the name of its class, such as ``"gru"``, and return the name.

    Raises:
        TypeError: anything but a class of torch's recurrent networks.
    """
    if not isinstance(recurrence, type) or not issubclass(recurrence, nn.RNNBase) or recurrence is nn.RNNBase:
        raise TypeError(f"expected recurrence to be nn.GRU, nn.LSTM or nn.RNN itself, got {describe(recurrence)}")
    network = recurrence(in_features, hidden, layers, batch_first=True)  # type: ignore[arg-type]
    name = recurrence.__name__.lower()
    module.add_module(name, network)
    return name


def first_state(network: Any, start: Tensor) -> Any:
    """Return the first state of a recurrent network, of all its layers.

    Args:
        network: a GRU, an LSTM or an RNN.
        start: ``(R, layers * hidden)``, of any numbers.
    """
    state = start.tanh().unflatten(-1, (network.num_layers, -1)).movedim(1, 0).contiguous()
    return (state, torch.zeros_like(state)) if isinstance(network, nn.LSTM) else state


def check_encoder_sizes(in_features: int, out_features: int, vocabulary: int | None, **sizes: int) -> None:
    """Raise a TypeError or a ValueError unless all sizes are positive integers; a vocabulary may be None."""
    check_counts(in_features=in_features, out_features=out_features, **sizes)
    if vocabulary is not None:
        check_counts(vocabulary=vocabulary)
