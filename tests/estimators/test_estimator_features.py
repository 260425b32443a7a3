"""Every estimator with every feature of a story: right against quadrature, or refused in words.

The mean over draws, value and gradient, of one particle (for several particles the weights' own tests compare the
estimators) with a term's likelihood weight a and KL weight b: the expectation of a log p(x | z) + b (log p(z) - log q).
"""

import itertools
import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

E = mm.estimators
LONG = os.environ.get("PYRO_MM_LONG") == "1"
X, A, ROWS, BLOCKS = 1.3, 0.4, 2000, 20

ESTIMATORS = {
    "AnalyticKL": E.AnalyticKL,
    "IWAE": lambda: E.IWAE(1),
    "IWAE, resampled": lambda: E.IWAE(1, resample=True),
    "IWAE, outside": lambda: E.IWAE(1, stratified="outside"),
    "Renyi": lambda: E.Renyi(0.5, 1),
    "StickTheLanding": E.StickTheLanding,
    "DReG": lambda: E.DReG(1),
}
WEIGHTS = [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (0.5, 2.0)]
FEATURES = [
    "none",
    "a present parent",
    "an absent parent",
    "a latent of the model alone",
    "an enumerated latent of the model",
    "an enumerated latent of the guide",
    "a private latent",
    "a latent given another one",
]


class Case:
    """A story and a guide in a parameter vector each, and their expectation by quadrature."""

    def __init__(self, feature, posterior):
        self.feature, self.posterior = feature, posterior
        self.theta = nn.Parameter(torch.tensor([0.3, -0.2, 0.6]))
        self.phi = nn.Parameter(torch.tensor([0.4, -0.3, -0.7, 0.2]))
        present = {"a": torch.zeros(ROWS, dtype=torch.bool)} if feature == "an absent parent" else {}
        self.batch = mm.Batch({"x": torch.full((ROWS,), X), "a": torch.full((ROWS,), A)}, present)
        if feature not in ("a present parent", "an absent parent"):
            self.batch = mm.Batch({"x": torch.full((ROWS,), X)})

    # the densities, of which story, guide and quadrature are made

    def q(self):
        first = dist.Normal(self.phi[0], self.phi[1].exp())
        if self.posterior == "normal":
            return first
        loc, scale = torch.stack([self.phi[0], self.phi[2]]), torch.stack([self.phi[1].exp(), 0.9 + 0 * self.phi[1]])
        return mm.distributions.Mixture(dist.Normal(loc, scale), torch.tensor([0.3, 0.7]).log())

    def second(self, z):
        """q(w | z), or q(w)."""
        tied = self.phi[3] * z if self.feature == "a latent given another one" else 0 * z
        return dist.Normal(tied + self.phi[3], 0.8)

    def middle(self, z):
        """What else x depends on, given z: p(w | z), or p(w)."""
        tied = self.theta[1] * z if self.feature != "a private latent" else 0 * z
        return dist.Normal(tied, self.theta[2].exp())

    def likelihood(self, z, w=0.0):
        return dist.Normal(z + w + self.theta[0], 0.9)

    classes = property(lambda self: dist.Categorical(logits=torch.stack([self.theta[1], self.theta[2]])))

    def story(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            if "parent" in self.feature:
                a = batch.observe("a", self.middle, z)
                batch.observe("x", self.likelihood, z, a)
            elif "enumerated" in self.feature:
                y = pyro.sample("y", self.classes)
                batch.observe("x", self.likelihood, z, y.to(z.dtype))
            elif self.feature == "none":
                batch.observe("x", self.likelihood, z)
            else:
                w = pyro.sample("w_x" if self.feature == "a private latent" else "w", self.middle(z))
                batch.observe("x", self.likelihood, z, w)

    def guide(self, batch):
        with batch.plate():
            z = pyro.sample("z", self.q().expand([len(batch)]))
            if self.feature == "a latent given another one":
                pyro.sample("w", self.second(z))
            if self.feature == "a private latent":
                pyro.sample("w_x", self.second(z))
            if self.feature == "an enumerated latent of the guide":
                pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})

    def expected(self, a, b):
        """The value by quadrature over z and w."""
        z = torch.linspace(-8, 8, 241)[:, None]
        w = torch.linspace(-8, 8, 241)
        step = (z[1] - z[0]).item()
        q = self.q().log_prob(z)
        gap = dist.Normal(0.0, 1.0).log_prob(z) - q
        x = torch.tensor(X)
        if self.feature == "none":
            inner = a * self.likelihood(z).log_prob(x) + b * gap
        elif self.feature == "a present parent":
            seen = self.middle(z).log_prob(torch.tensor(A)) + self.likelihood(z, A).log_prob(x)
            inner = a * seen + b * gap
        elif "enumerated" in self.feature:
            y = torch.arange(2.0)
            summed = (self.classes.logits + self.likelihood(z, y).log_prob(x)).logsumexp(-1, keepdim=True)
            inner = a * summed + b * gap
        else:
            own = self.feature in ("a latent given another one", "a private latent")
            drawn = (self.second(z) if own else self.middle(z)).log_prob(w)
            kl = self.middle(z).log_prob(w) - drawn if own else 0.0
            each = a * self.likelihood(z, w).log_prob(x) + b * kl
            inner = (drawn.exp() * each).sum(-1, keepdim=True) * step + b * gap
        return (q.exp() * inner).sum() * step


def refused(name, feature, posterior):
    """The words of a refusal, or None."""
    if name == "IWAE, outside" and posterior == "normal":
        return "needs a mixture posterior"
    if feature == "an enumerated latent of the guide" and name in ("DReG", "StickTheLanding"):
        return "'y' is enumerated"
    if "enumerated" in feature and name == "IWAE, resampled":
        return "an enumerated site is summed out"
    return None


CELLS = [*itertools.product(ESTIMATORS, WEIGHTS, FEATURES, ("normal", "mixture"))]


@pytest.mark.filterwarnings("ignore:latent site", "ignore:resample=True differentiates all")
@pytest.mark.parametrize("name, weights, feature, posterior", CELLS if LONG else CELLS[::9])
def test_value_and_gradient_are_those_of_quadrature(name, weights, feature, posterior, double):
    case = Case(feature, posterior)
    term = mm.objectives.Term(mm.objectives.ALL, mm.objectives.ALL, likelihood=weights[0], kl=weights[1])
    objective = mm.objectives.Objective([term], ESTIMATORS[name]())
    if words := refused(name, feature, posterior):
        with pytest.raises(ValueError, match=words):
            objective.differentiable_loss(case.story, case.guide, case.batch)
        return
    parameters = [case.theta, case.phi]
    draws = []
    for seed in range(BLOCKS):
        torch.manual_seed(seed)
        value = -objective.differentiable_loss(case.story, case.guide, case.batch) / ROWS
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        draws.append(torch.cat([value.detach()[None], *found]))
    expected = case.expected(*weights)
    truth = torch.autograd.grad(expected, parameters, allow_unused=True)
    truth = [torch.zeros_like(p) if g is None else g for g, p in zip(truth, parameters, strict=True)]
    truth = torch.cat([expected.detach()[None], *truth])
    draws = torch.stack(draws)
    error = draws.std(0) / BLOCKS**0.5
    # |t| < 6 with 19 degrees of freedom fails with probability 1e-5, for each of eight numbers; 1e-5 is the grid's
    assert ((draws.mean(0) - truth).abs() < 6 * error + 1e-5).all(), (
        (draws.mean(0) - truth) / error,
        draws.mean(0),
        truth,
    )
    assert error.max() < 0.2
