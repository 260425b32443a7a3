r"""Likelihoods in the layer of a discriminator, in the place of those of a modality's values (Larsen et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.mixture import Mixture
from ..distributions.support import unwrap
from ..utils.arguments import describe
from .bounds import Target
from .decoded_means import mean_of
from .terms import Symbol, Term

MIXTURES = (Mixture, torch.distributions.MixtureSameFamily)


@dataclass(frozen=True)
class FeatureLikelihood:
    r"""The Normal log-density of a layer f of a network at observed values, given the layer at the decoder's mean.

    .. math:: \log N(f(x_m); f(G(z)), \sigma^2 I), \qquad G(z) = E[x_m | z]

    It is a function of z and of the decoder, to which its gradient goes; the network is held constant.

    Args:
        name: the modality.
        net: the network.
        layer: name of the submodule whose output is f.
        scale: σ.
    """

    name: str
    net: nn.Module
    layer: str
    scale: float

    def log_density(self, site: Any, pair: Any) -> Tensor:
        """Return the log-density of each row, of the batch shape of a modality's distribution.

        Args:
            site: the site of the modality.
            pair: the run.
        """
        decoded = mean_of(site)
        view = pair.views.decode
        shape = decoded.shape[: decoded.dim() - len(site["fn"].event_shape)]
        values = view[self.name].to(decoded.dtype)
        with torch.no_grad():
            exact = layer_values(self.net, self.layer, values)
        generated = layer_values(self.net, self.layer, decoded.reshape(-1, *site["fn"].event_shape))
        generated = generated.reshape(*shape, -1)

        squares = ((exact - generated) / self.scale).square().sum(-1)
        constant = exact.shape[-1] * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))
        log_density: Tensor = -0.5 * squares - constant
        mask = view.presence(self.name)
        return torch.where(mask, log_density, 0.0) if isinstance(mask, Tensor) else log_density


def layer_values(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Return the output of a layer of a network, whose parameters get no gradient, flattened ``(N, F)``.

    Args:
        net: the network.
        layer: name of a submodule.
        x: values ``(N, *event)``.

    Raises:
        ValueError: a layer that does not run once, or whose output is no tensor of N rows.
    """
    found: list[Any] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, given, output: found.append(output))
    try:
        torch.func.functional_call(net, {name: p.detach() for name, p in net.named_parameters()}, (x,))
    finally:
        handle.remove()
    if len(found) != 1:
        raise ValueError(
            f"features={layer!r}: this layer of the discriminator runs {len(found)} times for one value, and its "
            "output has to be one: name a layer that runs once"
        )
    (output,) = found
    if not isinstance(output, Tensor) or output.dim() < 1 or len(output) != len(x):
        raise ValueError(
            f"features={layer!r}: expected this layer of the discriminator to return a row of features for each of "
            f"{len(x)} rows, got {describe(output)}"
        )
    flat = output.reshape(len(x), -1)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def check_layer(net: nn.Module, layer: Any) -> None:
    """Raise a ValueError unless a network has a submodule of this name."""
    names = [name for name, _ in net.named_modules() if name]
    if not isinstance(layer, str) or layer not in names:
        known = ", ".join(map(repr, names[:12])) + (", .." if len(names) > 12 else "") or "none"
        raise ValueError(f"expected features to be the name of a layer of net, one of {known}, got {describe(layer)}")


def check_rows_apart(name: str, net: nn.Module, layer: str, mean: Tensor) -> None:
    """Raise a ValueError if the features of a row depend on other rows, or on noise.

    Args:
        name: the modality.
        net: its discriminator's network.
        layer: the layer.
        mean: values of a row, ``(1, *event)``.
    """
    modes = {module: module.training for module in net.modules()}
    net.train()  # as in the training that is to come
    try:
        with torch.no_grad():
            each = [layer_values(net, layer, torch.cat([mean, mean + other]))[0] for other in (1.0, -1.0)]
    finally:
        for module, training in modes.items():
            module.training = training
    if not torch.allclose(each[0], each[1], rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"modality {name!r}: the features of a row in layer {layer!r} change with the other rows, or from one run "
            "to the next (batch normalization, or dropout?), so that they are no likelihood of this row: normalize by "
            "nn.GroupNorm or nn.LayerNorm, or name a layer before"
        )


def check_mean_alone(name: str, site: Mapping[str, Any], unreached: Sequence[Tensor]) -> None:
    """Raise a ValueError for a decoder that has more to learn than its mean.

    Args:
        name: the modality.
        site: its site in the story.
        unreached: parameters of the decoder that its mean does not depend on.
    """
    fn = unwrap(site["fn"])
    own = {argument: vars(fn).get(argument) for argument in getattr(fn, "arg_constraints", {})}
    learned = {name for name, value in own.items() if isinstance(value, Tensor) and value.requires_grad}
    if "logits" in learned:
        learned.discard("probs")  # of which one is computed from the other
    if unreached or len(learned) > 1 or isinstance(fn, MIXTURES):
        raise ValueError(
            f"modality {name!r}: its decoder learns a scale, or something else beside its mean, and a likelihood of "
            "features trains the mean alone. Evidence is of the decoder's own likelihood, and would be of a scale that "
            "nothing trained: fix it, as conditionals.Normal(net, scale=0.1) does, or leave out features="
        )


def target_by_features(
    found: Target, table: Sequence[Term], features: Collection[str], names: Sequence[str] | None = None
) -> Target:
    """Return the quantity that a table bounds whose likelihoods of some modalities are of features: none.

    Args:
        found: the quantity that it bounds with the likelihoods of values.
        table: its terms.
        features: the modalities.
        names: the batch's modalities; None if they are not known.
    """
    judged = set(features) if names is None else set(features).intersection(names)
    if not any(isinstance(term.decode, Symbol) or judged.intersection(term.decode) for term in table):
        return found
    texts = ", ".join(name for name in features if name in judged)
    return Target("surrogate", f"the likelihood of {texts} is that of features of a discriminator") if texts else found
