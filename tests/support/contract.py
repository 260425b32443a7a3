"""Stories, posteriors, objectives and estimators by name, and small data for them."""

from __future__ import annotations

from functools import partial

import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_mm as mm

LATENT, DIMS = 3, {"a": (2, 2), "b": (3,), "c": ()}


def normal(shape=(LATENT,)):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


def decoders(inputs):
    return {
        "a": mm.conditionals.Bernoulli(mm.nn.MLP(inputs["a"], 4, (8,)), event_shape=(2, 2)),
        "b": mm.conditionals.Normal(mm.nn.MLP(inputs["b"], 6, (8,))),
        "c": mm.conditionals.Categorical(mm.nn.MLP(inputs["c"], 4, (8,))),
    }


def experts(family=mm.conditionals.Normal):
    return {
        "a": family(mm.nn.MLP(4, 2 * LATENT, (8,))),
        "b": family(mm.nn.MLP(3, 2 * LATENT, (8,))),
        "c": family(torch.nn.Embedding(4, 2 * LATENT)),
    }


def features(size=8):
    return {"a": mm.nn.MLP(4, size, ()), "b": mm.nn.MLP(3, size, ()), "c": torch.nn.Embedding(4, size)}


def joint_encoder(partial):
    head = mm.conditionals.Normal(mm.nn.MLP(15, 2 * LATENT, (8,)))
    return mm.posteriors.JointEncoder(features(5), head, partial() if partial else None)


def factorized(networks):
    """A story with a class c, a modality a with a private factor, and b without."""
    label = {"c": networks.pop("c")}
    factors = mm.nn.MLP(LATENT, 4, ()), {"a": mm.nn.MLP(3, 2, ())}
    return mm.models.Factorized(normal(), {"a": normal((3,))}, networks, label, *factors)


MODELS = {
    "shared": lambda: mm.models.SharedLatent(normal(), decoders(dict.fromkeys(DIMS, LATENT))),
    "private": lambda: mm.models.PrivateLatents(
        normal(), {"a": normal((2,)), "c": normal((1,))}, decoders({"a": LATENT + 2, "b": LATENT, "c": LATENT + 1})
    ),
    "factorized": lambda: factorized(decoders({"a": 4 + 2, "b": 4, "c": 4})),
}


PRIVATE = {
    "shared": dict,
    "private": lambda: {
        "w_a": mm.posteriors.Private("a", mm.conditionals.Normal(mm.nn.MLP(4, 4, (8,)))),
        "w_c": mm.posteriors.Private("c", mm.conditionals.Normal(torch.nn.Embedding(4, 2))),
    },
    "factorized": lambda: {"w_a": mm.posteriors.Private("a", mm.conditionals.Normal(mm.nn.MLP(4, 6, (8,))))},
}


POSTERIORS = {
    "product": lambda: mm.posteriors.ProductOfExperts(experts()),
    "product without prior": lambda: mm.posteriors.ProductOfExperts(experts(), prior=None),
    "mixture": lambda: mm.posteriors.MixtureOfExperts(experts()),
    "Laplace mixture": lambda: mm.posteriors.MixtureOfExperts(experts(mm.conditionals.Laplace)),
    "mixture of products": lambda: mm.posteriors.MixtureOfProducts(experts()),
    "dependent": lambda: mm.posteriors.DependentExperts(experts(), 0.4),
    "hoelder": lambda: mm.posteriors.HoelderPooling(experts()),
    "sum pooling": lambda: mm.posteriors.SumPooling(features(), mm.conditionals.Normal(mm.nn.MLP(8, 2 * LATENT)), 8),
    "attention": lambda: mm.posteriors.SelfAttention(
        features(), mm.conditionals.NormalMixture(mm.nn.MLP(8, 2 + 4 * LATENT), 2), 8
    ),
    "joint": lambda: joint_encoder(None),
    "joint and unimodal": lambda: joint_encoder(lambda: mm.posteriors.ProductOfExperts(experts(), prior=None)),
}


tables, E = mm.objectives, mm.estimators


OBJECTIVES = {
    "elbo": tables.elbo,
    "beta_vae": partial(tables.beta_vae, 2.0),
    "jmvae_kl": partial(tables.jmvae_kl, 0.1),
    "mvae": partial(tables.mvae, 1),
    "telbo": tables.telbo,
    "vaevae": tables.vaevae,
    "unimodal_mean": tables.unimodal_mean,
    "mopoe": tables.mopoe,
    "subset_mean": partial(tables.subset_mean, None),
    "mmjsd": partial(tables.mmjsd, None),
    "mvtcae": partial(tables.mvtcae, 0.8, 1.0),
    "dmvae": tables.dmvae,
    "mixture_mean": partial(tables.mixture_mean, 1.0),
    "mmvm": partial(tables.mmvm, 1.0),
    "masked": tables.masked,
}


ESTIMATORS = {
    "analytic": E.AnalyticKL, "iwae": lambda: E.IWAE(3), "one by one": lambda: E.IWAE(2, vectorize_particles=False),
    "dreg": lambda: E.DReG(3), "stl": E.StickTheLanding, "renyi": lambda: E.Renyi(0.5, 3), "trace": Trace_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True), "mean field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
}  # fmt: skip


def pair(model, posterior):
    return MODELS[model](), mm.Guide(z=POSTERIORS[posterior](), **PRIVATE[model]())


def data(rows=6):
    values = {
        "a": torch.bernoulli(torch.full((rows, 2, 2), 0.5)),
        "b": torch.randn(rows, 3),
        "c": torch.arange(rows) % 4,
    }
    present = {n: torch.rand(rows) < 0.7 for n in values}
    present["a"][:2] = present["b"][:2] = present["c"][:2] = True
    for p in present.values():
        p[-1] = False
    return mm.Batch(values, present=present)
