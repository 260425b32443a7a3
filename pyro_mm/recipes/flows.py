"""A recipe in two stages, whose unimodal posteriors are normalising flows."""

from __future__ import annotations

from torch import nn

from .. import conditionals, objectives, posteriors
from ..batch.batch import Batch
from ..objectives.objective import Objective
from ..objectives.terms import ALL, EACH, Term
from ..posteriors.guide import Guide
from ..utils.arguments import describe
from ..utils.global_state import import_zuko
from .networks import (
    HIDDEN,
    LATENT,
    Estimator,
    Hidden,
    Recipe,
    check_recipe_arguments,
    feature_network,
    make_joint_encoder,
    shared_latent_model,
)


@check_recipe_arguments
def jnf(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    transforms: int = 2,
) -> Recipe:
    """JNF, its first stage: a joint VAE. The flows q(z | x_m) are there, frozen until :func:`jnf_second`.

    Senellart, Chadebec & Allassonnière 2023 (arXiv:2305.11832), without the features from deep canonical correlation
    that their variant has. For two modalities or one: given some of several they sample a product of flows by
    Hamiltonian Monte Carlo, which is no distribution that a guide could hold. The rows of both stages are to be
    complete: what is encoded of others is the business of flows that are not trained yet, or of nobody.

    Raises:
        ValueError: three modalities or more.
    """

    zuko = import_zuko()

    def flow(name: str) -> nn.Module:
        net = nn.Sequential(feature_network(batch, name, hidden[-1], hidden[:-1]), nn.ReLU())
        made = zuko.flows.MAF(latent, hidden[-1], transforms=transforms, hidden_features=tuple(hidden[-1:]))
        return conditionals.Flow(net, made)

    partial = posteriors.Either({name: flow(name) for name in batch}).requires_grad_(False)
    guide = Guide(z=make_joint_encoder(batch, latent, hidden, partial))
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.elbo(estimator))


def jnf_second(run: Recipe) -> Recipe:
    r"""JNF, its second stage: the flows, drawn to the joint posterior. Model and joint encoder are frozen, in place.

    .. math:: \min \sum_m KL(q(z | x) \| q(z | x_m))

    by a draw from q(z | x). Any run with a joint encoder and a posterior for what is incomplete will do.

    Raises:
        TypeError: the posterior of z is no joint encoder with a ``partial``.
    """
    if not isinstance(run, Recipe):
        raise TypeError(f"expected run to be a Recipe, got {describe(run)}")
    posterior = dict(run.guide.posteriors.items()).get("z")
    if not isinstance(posterior, posteriors.JointEncoder) or posterior.partial is None:
        raise TypeError(f"expected a JointEncoder with a partial posterior for z, got {type(posterior).__name__}")
    run.model.requires_grad_(False)
    run.guide.requires_grad_(False)
    posterior.partial.requires_grad_(True)
    return Recipe(run.model, run.guide, Objective([Term(ALL, (), EACH)]))
