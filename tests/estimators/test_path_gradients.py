"""DReG and StickTheLanding against quadrature: any weight of the KL, hierarchies, every kind of term, dropout."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.scoring.structure import pair_structure
from pyro_mm.scoring.views import TermViews

E = mm.estimators
ALL, PRIOR, Term = mm.objectives.ALL, mm.objectives.PRIOR, mm.objectives.Term


class AtNodes(dist.Normal):
    """A normal whose draws, two particles of all rows, lie at the nodes of a quadrature rule."""

    nodes = None  # (K, N, 1) for the site to be drawn next

    def rsample(self, sample_shape=()):
        if self.loc.dim() < 3:  # a look at the structure, without particles
            return self.loc
        return self.loc + self.scale * self.nodes[self.number]

    def expand(self, batch_shape, _instance=None):
        new = AtNodes(self.loc.expand(batch_shape), self.scale.expand(batch_shape))
        new.number = self.number
        return new


def at_nodes(number, loc, scale):
    fn = AtNodes(loc, scale)
    fn.number = number
    return fn.to_event(1)


def gauss_hermite(order, dimensions, particles=2):
    """Nodes ``(dimensions, K, N, 1)`` and weights ``(N,)`` of a rule for so many standard normals per particle."""
    x, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(order))
    points = torch.cartesian_prod(*[x] * (dimensions * particles))
    weights = torch.cartesian_prod(*[w / w.sum()] * (dimensions * particles)).prod(-1)
    return points.T.reshape(dimensions, particles, -1, 1), weights


OBSERVED = 1.3
WEIGHTS = [(1.0, 1.0), (1.0, 0.5), (1.0, 2.0), (2.0, 1.0), (0.5, torch.tensor([[0.3]], dtype=torch.float64))]


def story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        batch.observe("x", lambda z: dist.Normal(z, 1.5).to_event(1), z)


@pytest.mark.parametrize("likelihood, kl", WEIGHTS)
def test_the_path_gradient_is_that_of_the_value(likelihood, kl, double):
    """The mean over two particles by Gauss-Hermite quadrature, the value's gradient on a grid of the density."""
    q = nn.Parameter(torch.tensor([0.4, -0.3]))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", at_nodes(0, q[:1].expand(len(batch), 1), q[1:].exp()))

    AtNodes.nodes, weights = gauss_hermite(40, 1)
    batch = mm.Batch({"x": torch.full((len(weights), 1), OBSERVED)})
    info = pair_structure(story, guide, batch)
    found = {}
    for estimator in (E.DReG(2), E.StickTheLanding(2)):
        scores = estimator.scores(story, guide, TermViews.of(batch, info), info)
        rows = estimator.bound(scores, likelihood, kl)[0]
        (found[type(estimator)],) = torch.autograd.grad((weights * rows).sum(), q)
    z = torch.linspace(-9, 9, 601)
    log_q = dist.Normal(q[0], q[1].exp()).log_prob(z)
    log_w = likelihood * dist.Normal(z, 1.5).log_prob(torch.tensor(OBSERVED))
    log_w = log_w + torch.as_tensor(kl).squeeze() * (dist.Normal(0.0, 1.0).log_prob(z) - log_q)
    share = log_q.exp() * (z[1] - z[0])
    both = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    for kind, value in ((E.DReG, share @ both @ share), (E.StickTheLanding, share @ log_w)):
        (expected,) = torch.autograd.grad(value, q, retain_graph=True)
        torch.testing.assert_close(found[kind], expected, rtol=1e-4, atol=1e-5)


class Chain(nn.Module):
    """q(z) q(w | z), the second one's location and scale a network of the first, with dropout if asked."""

    def __init__(self, make=at_nodes, dropout=0.0):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.net, self.dropout, self.make = nn.Linear(1, 2), nn.Dropout(dropout), make
        self.runs = 0

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", self.make(0, self.first[:1].expand(len(batch), 1), self.first[1:].exp()))
            self.runs += 1
            loc, scale = self.dropout(self.net(z)).chunk(2, -1)
            pyro.sample("w", self.make(1, 0.5 * loc + 0.3 * z, (0.1 * scale).exp()))


def chained_story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(0.5 * z, 1.2).to_event(1))
        batch.observe("x", lambda z, w: dist.Normal(z + 0.5 * w, 2.5).to_event(1), z, w)


@pytest.mark.parametrize("kl", [1.0, 0.5, 2.0])
def test_path_gradients_are_unbiased_for_a_latent_drawn_given_another(kl, double):
    """Path gradients and the plain one of the same bound, both by quadrature over four standard normals."""
    guide = Chain()
    AtNodes.nodes, weights = gauss_hermite(16, 2)
    batch = mm.Batch({"x": torch.full((len(weights), 1), OBSERVED)})
    info = pair_structure(chained_story, guide, batch)

    def gradient(estimator):
        scores = estimator.scores(chained_story, guide, TermViews.of(batch, info), info)
        total = (weights * estimator.bound(scores, 1.0, kl)[0]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(guide.parameters()))])

    torch.testing.assert_close(gradient(E.DReG(2)), gradient(E.IWAE(2)), rtol=1e-3, atol=1e-4)
    linear = _MeanOfLogWeights(2)
    torch.testing.assert_close(gradient(E.StickTheLanding(2)), gradient(linear), rtol=1e-3, atol=1e-4)


class _MeanOfLogWeights(E.PerRow):
    """The evidence lower bound by samples, differentiated as it stands."""

    def bound(self, scores, likelihood=1.0, kl=1.0):
        return E.weighted_log_ratio(scores, likelihood, kl).mean(0)


def drawn(number, loc, scale):
    return dist.Normal(loc, scale).to_event(1)


@pytest.mark.parametrize("estimator", [E.DReG(3), E.StickTheLanding(3)], ids=repr)
def test_path_gradients_take_dropout_in_a_guide_of_several_latents(estimator, double):
    """log q is that of the masks under which the latents were drawn: one run of the networks, and IWAE's own value."""
    guide = Chain(drawn, dropout=0.5)
    batch = mm.Batch({"x": torch.full((6, 1), OBSERVED)})
    plain = E.IWAE(3) if isinstance(estimator, E.DReG) else _MeanOfLogWeights(3)
    values = []
    for each in (estimator, plain):
        pair_structure(chained_story, guide, batch)
        guide.runs = 0
        torch.manual_seed(0)
        values.append(each.differentiable_loss(chained_story, guide, batch).item())
        assert guide.runs == 1
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    same_mean_gradient(estimator, plain, chained_story, guide, [*guide.parameters()])


TABLES = {
    "given another set": [Term("x", ("x", "y"), "y", kl=0.5)],
    "given all": [Term("x", ("x", "y"), ALL, likelihood=2.0)],
    "the prior encoded": [Term(PRIOR, ALL, kl=0.5)],
    "the prior encoded and not": [Term(PRIOR, ALL, kl=0.5), Term(ALL, ALL, likelihood=2.0, kl=0.6)],
    "the prior encoded, given a set": [Term(PRIOR, ALL, "x", kl=0.4), Term("x", "y", kl=3.0)],
    "weights of each modality": [Term(ALL, ALL, likelihood={"x": 2.0, "y": 0.5}, kl=0.7)],
    "decoders frozen": [Term("x", ALL, kl=0.5, freeze_decoder=True), Term(ALL, ALL, kl=0.2)],
    "weights of the step": [Term(ALL, ALL, kl=lambda step: 0.3), Term("y", ALL, likelihood=lambda step: 2.0)],
}


@pytest.mark.parametrize("estimator", [E.DReG(2), E.StickTheLanding(1)], ids=repr)
@pytest.mark.parametrize("table", TABLES)
def test_path_gradients_are_unbiased_in_every_kind_of_term(table, estimator, double):
    """A prior and a posterior that draw w given z, both learned: the gradient of the plain estimator, in the mean."""
    prior = nn.Parameter(torch.tensor([0.2, -0.1, 0.8, -0.4]))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(prior[:1], prior[1:2].exp()).to_event(1))
            w = pyro.sample("w", dist.Normal(prior[2] * z, prior[3].exp()).to_event(1))
            batch.observe("x", lambda z, w: dist.Normal(z + 0.5 * w, 2.0).to_event(1), z, w)
            batch.observe("y", lambda w: dist.Normal(w, 0.9).to_event(1), w)

    nets = nn.ModuleDict({n: nn.Linear(1, 2) for n in ("x", "y", "z", "v")})

    def normal(h):
        loc, scale = h.chunk(2, -1)
        return dist.Normal(loc, (0.2 * scale).exp()).to_event(1)

    experts = {n: _Expert(nets[n], normal) for n in ("x", "y")}
    given = {n: _Expert(nets[m], normal) for n, m in (("z", "z"), ("y", "v"))}
    product = mm.posteriors.ProductOfExperts
    guide = mm.Guide(z=product(experts), w=product(given, prior=None))
    plain = E.IWAE(estimator.num_particles)
    one, other = (mm.objectives.Objective(TABLES[table], e) for e in (estimator, plain))
    same_mean_gradient(one, other, model, guide, [prior, *guide.parameters()], names=("x", "y"), rows=2500)


class _Expert(nn.Module):
    def __init__(self, net, read):
        super().__init__()
        self.net, self.read = net, read

    def forward(self, x):
        return self.read(self.net(x))


def same_mean_gradient(one, other, model, guide, parameters, names=("x",), rows=2500, blocks=20):
    """Two losses' gradients agree in the mean over many draws of one row."""
    batch = mm.Batch({n: torch.full((rows, 1), at) for n, at in zip(names, (OBSERVED, -0.4), strict=False)})
    difference = []
    for block in range(blocks):
        each = []
        for loss in (one, other):
            torch.manual_seed(block)
            value = loss.differentiable_loss(model, guide, batch) / rows
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            each.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        difference.append(torch.cat([(x - y).flatten() for x, y in zip(*each, strict=True)]))
    difference = torch.stack(difference)
    error = difference.std(0) / blocks**0.5
    # 20 block means: |t| < 5.5 with 19 degrees of freedom fails with probability 3e-5 for each of some 20 parameters
    assert (difference.mean(0).abs() < 5.5 * error + 1e-10).all(), (difference.mean(0) / error, error)
    assert error.max() < 0.05, "the test could tell no difference"


@pytest.mark.parametrize("kl, likelihood", [*itertools.product([0.5, 2.0], [1.0, 2.0])])
def test_path_gradients_are_unbiased_in_weighted_tables(kl, likelihood, double):
    """Of an objective: DReG's gradient is IWAE's in the mean, its likelihood weight taken out of the logarithm."""
    experts = {"x": _Expert(nn.Linear(1, 2), lambda h: dist.Normal(h[..., :1], (0.2 * h[..., 1:]).exp()).to_event(1))}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts))
    term = Term(ALL, ALL, likelihood=likelihood, kl=kl)
    one, other = (mm.objectives.Objective([term], e) for e in (E.DReG(2), E.IWAE(2)))
    same_mean_gradient(one, other, story, guide, [*guide.parameters()])
