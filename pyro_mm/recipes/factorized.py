"""Recipes with a factor that explains the labels, and one for each modality: MFM and its variational twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import nn

from .. import conditionals, objectives, posteriors
from ..batch.batch import Batch
from ..models import Factorized
from ..nn import MLP
from ..objectives.objective import Objective
from ..objectives.terms import ALL, Number, Term, check_nonnegative
from ..posteriors.guide import Guide
from ..utils.arguments import check_flags, check_integer, check_mapping, check_names, check_number
from .modality_networks import Hidden, ModalityNetworks, NetworksOf, Scale
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    Recipe,
    check_recipe_arguments,
    standard_prior,
)
from .private_latents import PRIVATE

SQUARED_ERROR = math.sqrt(0.5)  # the scale under which -log p(x) is the squared error and a constant


@check_recipe_arguments
def mfm(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    private: int | Mapping[str, int] = PRIVATE,
    labels: Sequence[str] | None = None,
    generation: float | Mapping[str, float] = 0.1,
    mmd: Number = 1.0,
    reconstruct_missing: bool = True,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    r"""MFM: a deterministic autoencoder with a discriminative factor and one generative factor for each modality.

    .. math:: \sum_y -\log p(y | f_y) + \sum_m \lambda_m \frac{\|x_m - \hat x_m(f_y, f_m)\|^2}{D_m}
              + \lambda \Big[ MMD^2(q(z), N(0, I)) + \sum_m MMD^2(q(w_m), N(0, I)) \Big]

    per row, which is the loss up to a constant. Model: :class:`pyro_mm.models.Factorized` with standard Normal priors.
    The error of a binary or grey image, of counts or of tokens is their negative log-likelihood, that of a real label
    its squared error, each per element. Guide: a joint encoder for z and an encoder for each w_m, all
    :class:`~pyro_mm.conditionals.Delta` and without shared layers; labels are not encoded. In a row that lacks a
    modality z comes from a surrogate network, a Normal given what is present, and so does w_m, from what else is
    present.

    Surrogates of z are trained by ``Term(modalities, (), S, freeze_encoder=True)`` for every proper subset S: the code
    of the whole row, held constant, gets a high density given S. With ``reconstruct_missing`` every modality is also
    reconstructed from the others, with the weight :math:`\lambda_m`; this trains the decoders, and the surrogates
    together with those of each w_m, which nothing else trains. :func:`pyro_mm.generate` and
    :func:`pyro_mm.posterior_draws` take w_m of a missing m from its surrogate; without ``reconstruct_missing`` there is
    none, and w_m comes from the prior.

    Likelihoods and other KLs ask for densities that a deterministic encoder does not have, and are refused: take
    :func:`mfm_variational` for these.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read: vectors, arrays, images, sequences (with
            lengths), tokens, classes and real labels.
        latent: dimensions of z, and of f_y.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every term; None for one draw (``AnalyticKL()``).
        private: dimensions of each w_m and f_m, or modality -> dimensions; a modality with 0, or not named, has none.
        labels: names of the labels; None for every class and real number ``(N,)``, and the modality ``"label"``.
        generation: :math:`\lambda_m`, of all modalities or by modality; one that is not named weighs 1.
        mmd: :math:`\lambda`, a number or a function of the step.
        reconstruct_missing: True to train the reconstruction of a missing modality.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    Raises:
        ValueError: no modality besides the labels, or a private latent of a label.

    References:
        Tsai et al. 2019 (arXiv:1806.06176): the V-statistic of MMD with the kernel :math:`\exp(-r^2 / D^2)` in D
        dimensions. Departures: z has a perceptron on features of all modalities in place of a memory fusion network;
        f_y and f_m have as many dimensions as z and w_m; their surrogates are points, and they have one for each w_m
        that is trained by its code; their released code does not train the reconstruction of a missing modality.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    check_flags(reconstruct_missing=reconstruct_missing)
    check_nonnegative("mmd", mmd)
    roles = _roles(batch, labels, private)
    weights = _generation_weights(generation, roles)
    names = roles.modalities

    model = _model(parts, roles, latent, lambda _: SQUARED_ERROR)
    guide = _guide(parts, roles, latent, conditionals.Delta, reconstruct_missing)

    size = {name: batch[name][0].numel() for name in (*names, *roles.labels)}
    likelihood: dict[str, Number] = {name: weights[name] / size[name] for name in names}
    likelihood |= {name: 1 / size[name] for name in roles.labels}
    terms = [Term(names, ALL, likelihood=likelihood, kl=0), *_surrogate_terms(names)]
    if reconstruct_missing and len(names) > 1:
        for name in names:
            others = tuple(other for other in names if other != name)
            terms.append(Term(others, (name,), likelihood={name: likelihood[name]}, kl=0))

    objective = Objective(terms, estimator)
    sizes = {"z": latent, **{f"w_{name}": d for name, d in roles.private.items()}}
    for site, d in sizes.items():
        objective = objective + mmd * objectives.MMD(site, names, bandwidth=d / math.sqrt(2), unbiased=False)
    return Recipe(model, guide, objective)


@check_recipe_arguments
def mfm_variational(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    private: int | Mapping[str, int] = PRIVATE,
    labels: Sequence[str] | None = None,
    generation: float | Mapping[str, float] = 1.0,
    kl: Number = 1.0,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    r"""The variational twin of MFM: the same story and networks, Normal encoders, and the ELBO.

    .. math:: E_q \Big[ \sum_y \log p(y | f_y) + \sum_m \lambda_m \log p(x_m | f_y, f_m) \Big]
              - KL(q(z | x) \| p(z)) - \sum_m KL(q(w_m | x_m) \| p(w_m))

    Model and guide: as in :func:`mfm`, with Normal encoders and learned standard deviations. Labels are decoded and not
    encoded, so that a row of labels alone is encoded as the prior. Surrogates of z are trained by the same terms, and
    w_m of a missing modality comes from its prior: under the story this is its posterior given the others, so that a
    surrogate for it would have nothing to infer.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read, as in :func:`mfm`.
        latent: dimensions of z, and of f_y.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every term; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        private: dimensions of each w_m and f_m, or modality -> dimensions; a modality with 0, or not named, has none.
        labels: names of the labels; None for every class and real number ``(N,)``, and the modality ``"label"``.
        generation: :math:`\lambda_m`, of all modalities or by modality; with any other than 1 the ELBO bounds nothing.
        kl: weight of the priors' KLs, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    Raises:
        ValueError: no modality besides the labels, or a private latent of a label.

    References:
        Tsai et al. 2019 (arXiv:1806.06176), whose released code has such a twin.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    roles = _roles(batch, labels, private)
    weights = _generation_weights(generation, roles)
    names = roles.modalities

    def learned(shape: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape))

    model = _model(parts, roles, latent, learned)
    guide = _guide(parts, roles, latent, conditionals.Normal, False)
    plain = all(weight == 1 for weight in weights.values())
    joint = Term(names, ALL, likelihood=1.0 if plain else weights, kl=kl)
    return Recipe(model, guide, Objective([joint, *_surrogate_terms(names)], estimator))


class _Roles(NamedTuple):
    """The parts of a batch in the story.

    Attributes:
        modalities: names of what is encoded and decoded.
        labels: names of what is decoded from the shared factor alone.
        private: modality -> dimensions of its private latent.
    """

    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    private: Mapping[str, int]


def _roles(batch: Batch, labels: Sequence[str] | None, private: int | Mapping[str, int]) -> _Roles:
    """Return the parts that labels and modalities have in the story."""
    if labels is None:
        found = tuple(name for name in batch if name == "label" or (batch.holds(name) and batch[name].dim() == 1))
    else:
        found = check_names("labels", labels, batch)
    modalities = tuple(name for name in batch if name not in found)
    if not modalities:
        listed = ", ".join(map(repr, found))
        raise ValueError(f"expected a modality besides the labels, got {listed} alone, which are all taken for labels")
    if isinstance(private, Mapping):
        sizes = check_mapping("private", private, "dimensions")
        for name, size in sizes.items():
            check_integer(f"private[{name!r}]", size, least=0)
            if name not in modalities:
                raise ValueError(f"private[{name!r}]: expected a modality, one of {', '.join(modalities)}")
    else:
        check_integer("private", private, least=0)
        sizes = dict.fromkeys(modalities, private)
    return _Roles(modalities, found, {name: size for name, size in sizes.items() if size})


def _generation_weights(generation: float | Mapping[str, float], roles: _Roles) -> dict[str, float]:
    """Return modality -> weight of its reconstruction."""
    if not isinstance(generation, Mapping):
        return dict.fromkeys(roles.modalities, check_number("generation", generation, least=0))
    given = check_mapping("generation", generation, "numbers")
    for name, weight in given.items():
        check_number(f"generation[{name!r}]", weight, least=0)
        if name not in roles.modalities:
            raise ValueError(f"generation[{name!r}]: expected a modality, one of {', '.join(roles.modalities)}")
    return {name: given.get(name, 1.0) for name in roles.modalities}


def _surrogate_terms(names: Sequence[str]) -> list[Term]:
    """Return the terms by which the posteriors given proper subsets learn the code of a whole row, held constant."""
    subsets = [s for size in range(1, len(names)) for s in combinations(names, size)]
    return [Term(tuple(names), (), subset, freeze_encoder=True) for subset in subsets]


def _model(parts: ModalityNetworks, roles: _Roles, latent: int, scale: Scale) -> Factorized:
    """Build the story.

    Args:
        parts: makers of networks.
        roles: the parts of modalities and labels.
        latent: dimensions of z and f_y.
        scale: the standard deviation of real values.
    """
    return Factorized(
        standard_prior(latent),
        {name: standard_prior(size) for name, size in roles.private.items()},
        {name: parts.decoder(name, latent + roles.private.get(name, 0), scale) for name in roles.modalities},
        {name: parts.decoder(name, latent, scale) for name in roles.labels},
        factor=MLP(latent, latent, parts.hidden),
        private_factors={name: MLP(size, size, parts.hidden) for name, size in roles.private.items()},
    )


def _guide(
    parts: ModalityNetworks,
    roles: _Roles,
    latent: int,
    family: type[conditionals.Delta] | type[conditionals.Normal],
    infer_missing: bool,
) -> Guide:
    """Build the guide: encoders of whole rows, and surrogates for rows that lack a modality.

    Args:
        parts: makers of networks.
        roles: the parts of modalities and labels.
        latent: dimensions of z.
        family: of the encoders; surrogates of z are Normal.
        infer_missing: True to infer w_m of a missing modality from the others, by an encoder of the family; False for
            its prior.
    """
    names = roles.modalities
    surrogate = _joint(parts, names, latent, conditionals.Normal) if len(names) > 1 else None
    whole = _joint(parts, names, latent, family, surrogate)
    found: dict[str, nn.Module] = {"z": posteriors.Given(names, whole, standard_prior(latent))}
    for name, size in roles.private.items():
        prior = standard_prior(size)
        others = [other for other in names if other != name]
        missing: nn.Module | None = None
        if infer_missing and others:
            missing = posteriors.Given(others, _joint(parts, others, size, family), prior)
        encoder = family(parts.encoder(name, _outputs(size, family)))
        if missing is None:
            found[f"w_{name}"] = posteriors.Private(name, encoder, prior)
        else:
            found[f"w_{name}"] = posteriors.Private(name, encoder, missing, surrogate=True)
    return Guide(**found)


def _joint(
    parts: ModalityNetworks,
    names: Sequence[str],
    size: int,
    family: type[conditionals.Delta] | type[conditionals.Normal],
    partial: nn.Module | None = None,
) -> posteriors.JointEncoder:
    """Build an encoder of several modalities with a latent of ``size`` dimensions.

    The head has the last of the hidden layers, and each modality's network the others.

    Args:
        parts: makers of networks.
        names: the modalities.
        size: dimensions of the latent.
        family: of the posterior.
        partial: the posterior of rows that lack a modality; None for zeros in place of its features.
    """
    hidden = parts.hidden
    width = hidden[-1] if hidden else size
    features = {name: nn.Sequential(parts.encoder(name, width, hidden[:-1]), nn.ReLU()) for name in names}
    head = MLP(width * len(names), _outputs(size, family), hidden[-1:])
    return posteriors.JointEncoder(features, family(head), partial)


def _outputs(size: int, family: type[conditionals.Delta] | type[conditionals.Normal]) -> int:
    """Return the number of a network's outputs for a latent of ``size`` dimensions."""
    return size if family is conditionals.Delta else 2 * size
