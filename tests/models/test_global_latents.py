"""A latent outside the data plate is of no row: a table counts it once per term, and once per mean over terms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, EVERY, Objective, Term

tables = mm.objectives
NAMES, ROWS = "abc", 12
AT = 30.0
KL = AT**2 / 2  # from Normal(30, 1), the global latent's posterior, to Normal(0, 1), its prior

# a table, and how often it counts the KL of a latent that is the same whatever a term encodes
TIMES = {
    "elbo": (tables.elbo, 1.0),
    "subset_mean": (lambda e: tables.subset_mean(estimator=e), 1.0),
    "vaevae": (tables.vaevae, 1.0),  # given another set the prior is the guide's own: no distance
    "mvae": (lambda e: tables.mvae(estimator=e), 4.0),
    "weights": (lambda e: Objective([Term(EACH, EACH, likelihood=3.0, kl=2.0, average=True)], e), 2.0),
    "sums": (lambda e: Objective([Term(EVERY, ALL, kl=0.5, average=True), Term("a", ALL)], e), 1.5),
}


class Still(dist.Normal):
    """A normal that draws its mean, and nothing of torch's generator."""

    def rsample(self, sample_shape=()):
        return self.loc.expand(self._extended_shape(sample_shape))

    def expand(self, batch_shape, _instance=None):
        return Still(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def pair(with_global):
    experts = {n: mm.conditionals.Normal(torch.nn.Linear(1, 2)) for n in NAMES}
    posterior = mm.posteriors.ProductOfExperts(experts)

    def model(batch):
        if with_global:
            pyro.sample("mu", dist.Normal(torch.zeros(1), 1.0).to_event(1))  # its KL is all that it does
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            for name in NAMES:
                batch.observe(name, lambda z: dist.Normal(z * 0.5, 0.8).to_event(1), z)

    def guide(batch):
        if with_global:
            pyro.sample("mu", Still(torch.full((1,), AT), torch.ones(1)).to_event(1))
        with batch.plate():
            pyro.sample("z", posterior(batch))

    return model, guide


def batches():
    values = {n: torch.randn(ROWS, 1) for n in NAMES}
    row = torch.arange(ROWS)
    incomplete = mm.Batch(values, {"a": row > 0, "b": row % 3 > 0, "c": row % 2 > 0})
    return {
        "complete": mm.Batch(values),
        "incomplete": incomplete,
        "rows of nothing": mm.Batch(values, {"a": row > 3, "b": row > 3, "c": row > 6}),
        "padded part": incomplete.part_of(10 * ROWS).padded(ROWS + 5),
    }


def loss(build, estimator, with_global, batch, vectorize):
    objective = build(estimator)
    objective.vectorize = vectorize
    torch.manual_seed(0)
    return objective.loss(*pair(with_global), batch)


@pytest.mark.parametrize("vectorize", [True, False], ids=["one pass", "term by term"])
@pytest.mark.parametrize("rows", ["complete", "incomplete", "rows of nothing", "padded part"])
@pytest.mark.parametrize("name", TIMES)
def test_the_kl_of_a_global_latent_is_counted_once(name, rows, vectorize, double):
    build, times = TIMES[name]
    batch = batches()[rows]
    whole, rest = (loss(build, TraceMeanField_ELBO(), mu, batch, vectorize) for mu in (True, False))
    assert whole - rest == pytest.approx(times * KL, rel=1e-10)


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceGraph_ELBO])
def test_the_sampled_kl_of_a_global_latent_is_counted_once(estimator, double):
    batch = batches()["incomplete"]
    whole, rest = (loss(tables.vaevae, estimator(), mu, batch, True) for mu in (True, False))
    assert whole - rest == pytest.approx(KL, rel=1e-10)  # log q - log p at the mean, where it is the KL without noise
