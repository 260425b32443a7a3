"""Draws from a mixture's components in turn: what they must leave unbiased, and what they cannot do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

E = mm.estimators
ALL, PRIOR, Term = mm.objectives.ALL, mm.objectives.PRIOR, mm.objectives.Term
Mixture = mm.distributions.Mixture


class Fixed(nn.Module):
    """An expert that says the same of all rows."""

    def __init__(self, loc=0.0, scale=1.0):
        super().__init__()
        self.loc, self.scale = loc, scale

    def forward(self, x):
        return dist.Normal(torch.full((len(x), 1), self.loc), self.scale).to_event(1)


def blind_story(batch):
    """Modalities that do not depend on z: every weight is p(x) where z is drawn from its prior."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        for name in batch.names:
            batch.observe(name, lambda z: dist.Normal(0 * z, 1.0).to_event(1), z)


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_a_table_that_encodes_the_prior_is_exact_where_every_weight_is(stratified, vectorize, resample, double):
    """Experts equal to the prior, so that each term is log p(x) times its weight, in any draw."""
    names = ("a", "b", "c")
    batch = mm.Batch({n: torch.randn(6, 1) for n in names}, {"c": torch.arange(6) % 2 == 0})
    guide = mm.Guide(z=mm.posteriors.MixtureOfExperts({n: Fixed() for n in names}))
    zero = torch.zeros(())
    log_p = sum(
        torch.where(batch.present[n], dist.Normal(0.0, 1.0).log_prob(batch[n][:, 0]), zero).sum() for n in names
    )
    estimator = E.IWAE(2, stratified=stratified, resample=resample)
    terms = [Term(ALL, ALL), Term(PRIOR, ALL, likelihood=2.0, kl=2.0), Term(PRIOR, (), ALL)]
    objective = mm.objectives.Objective(terms, estimator, vectorize=vectorize)
    assert -objective.loss(blind_story, guide, batch) == pytest.approx(3 * log_p.item(), rel=1e-12)
    shares = mm.objectives.mmjsd(None, estimator, vectorize=vectorize)
    assert -shares.loss(blind_story, guide, batch) == pytest.approx(log_p.item(), rel=1e-12)


def two_latents(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        batch.observe("x", lambda z, w: dist.Normal(z + w, 0.5), z, w)


def two_mixtures(batch):
    loc = torch.tensor([-1.0, 1.5])
    with batch.plate():
        pyro.sample("z", Mixture(dist.Normal(loc, torch.ones(2)), torch.tensor([0.3, 0.7]).log()))
        pyro.sample("w", Mixture(dist.Normal(-loc, torch.ones(2)), torch.tensor([0.6, 0.4]).log()))


def mixture_given_a_draw(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.4 * batch["x"], 1.0))
        logits = torch.stack([z, -z], -1)
        pyro.sample("w", Mixture(dist.Normal(torch.tensor([-1.0, 1.0]), torch.ones(2)), logits))


def one_of_many(fn):
    """A guide with a mixture in part of the rows, and one normal in the others."""

    def guide(batch):
        with batch.plate():
            some = torch.arange(len(batch)) % 2 == 0
            mixture = Mixture(dist.Normal(torch.tensor([-1.0, 1.5]), torch.ones(2)), torch.tensor([0.3, 0.7]).log())
            pyro.sample("z", fn(some, dist.Normal(0.4 * batch["x"], 0.9), mixture.expand([len(batch)])))
            pyro.sample("w", dist.Normal(0.4 * batch["x"], 0.9))

    return guide


GUIDES = {
    "two mixtures": two_mixtures,
    "weights that depend on a draw": mixture_given_a_draw,
    "a mixture in some rows": one_of_many(mm.distributions.Where),
}


@pytest.mark.parametrize("name", GUIDES)
def test_the_mean_stratified_weight_is_the_evidence(name, double):
    """E exp(bound) = p(x) for draws that are weighed rightly."""
    rows = 20_000
    batch = mm.Batch({"x": torch.full((rows,), 0.6)})
    info = mm.scoring.structure.pair_structure(two_latents, GUIDES[name], batch)
    estimator = E.IWAE(2, stratified="inside")
    scores = estimator.scores(two_latents, GUIDES[name], mm.scoring.views.TermViews.of(batch, info), info)
    ratio = (estimator.bound(scores)[0] - dist.Normal(0.0, 1.5).log_prob(batch["x"])).exp()
    error = ratio.std().item() / rows**0.5
    assert error < 0.02
    assert abs(ratio.mean().item() - 1) < 5 * error  # five standard errors: one seed in two million


@pytest.mark.parametrize("name", ["two mixtures", "a mixture in some rows"])
def test_the_looser_stratified_bound_lies_below_the_tighter(name, double):
    rows = 5000
    batch = mm.Batch({"x": torch.full((rows,), 0.6)})
    bounds = [
        -mm.objectives.elbo(E.IWAE(8, stratified=s)).loss(two_latents, GUIDES[name], batch) / rows
        for s in ("outside", "inside")
    ]
    # the difference to log p is above 0.02, its standard error under 0.002
    assert bounds[0] < bounds[1] < dist.Normal(0.0, 1.5).log_prob(torch.tensor(0.6)).item()


def test_stratification_refuses_weights_that_depend_on_a_draw(double):
    batch = mm.Batch({"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="'w', whose weights depend on a latent drawn before it"):
        E.IWAE(2, stratified="outside").loss(two_latents, mixture_given_a_draw, batch)


def test_a_mixture_within_a_plate_is_refused(double):
    def story(batch):
        with batch.plate(), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    def guide(batch):
        with batch.plate(), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", Mixture(dist.Normal(torch.tensor([-1.0, 1.0]), torch.ones(2)), torch.zeros(2)))

    with pytest.raises(ValueError, match="the guide has none with one draw per row"):
        E.IWAE(2, stratified="inside").loss(story, guide, mm.Batch({"x": torch.zeros(3)}))


def test_a_mixture_given_a_class_that_is_summed_out_is_refused(double):
    def story(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.sample("z", dist.Normal(y.double(), 1.0))

    def guide(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            loc = torch.stack([y.double(), -y.double()], -1)
            pyro.sample("z", Mixture(dist.Normal(loc, torch.ones(2)), torch.zeros(2)))

    with pytest.raises(ValueError, match="the mixture 'z' is given an enumerated site"):
        E.IWAE(2, stratified="inside").loss(story, guide, mm.Batch({"x": torch.zeros(3)}))


@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_experts_that_take_over_where_a_modality_is_missing(stratified, double):
    """A joint encoder of complete rows, a batch of which has no mixture; each normal is the prior, so all is exact."""
    names = ("a", "b")
    experts = mm.posteriors.MixtureOfExperts({n: Fixed() for n in names})
    guide = mm.Guide(z=mm.posteriors.JointEncoder({n: nn.Identity() for n in names}, Fixed(), partial=experts))
    full = mm.Batch({n: torch.randn(3, 1) for n in names})
    mixed = mm.Batch({n: full[n] for n in names}, {"b": torch.tensor([True, False, True])})
    for batch in (full.only("a"), full, mixed, full):
        each = [torch.where(batch.present[n], dist.Normal(0.0, 1.0).log_prob(batch[n][:, 0]), 0.0) for n in names]
        bound = -E.IWAE(3, stratified=stratified).loss(blind_story, guide, batch)
        assert bound == pytest.approx(sum(each).sum().item(), rel=1e-12)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_learned_weights_have_their_gradient_when_resampled(stratified, particles, double):
    """Against the plain estimator, in the mean."""
    logits, loc = nn.Parameter(torch.tensor([0.3, -0.4])), nn.Parameter(torch.tensor([[-0.5], [1.0]]))

    def guide(batch):
        with batch.plate():
            components = dist.Normal(loc.expand(len(batch), 2, 1), 0.8).to_event(1)
            pyro.sample("z", Mixture(components, logits))

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z, 0.7).to_event(1), z)

    batch = mm.Batch({"x": torch.full((4000, 1), 1.2)})
    differences = []
    for seed in range(20):
        each = []
        for resample in (True, False):
            torch.manual_seed(seed)
            loss = E.IWAE(particles, stratified=stratified, resample=resample)
            value = loss.differentiable_loss(story, guide, batch) / len(batch)
            each.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, [logits, loc])]))
        differences.append(each[0] - each[1])
    differences = torch.stack(differences)
    error = differences.std(0) / 20**0.5
    # |t| < 5.5 with 19 degrees of freedom fails with probability 3e-5
    assert (differences.mean(0).abs() < 5.5 * error + 1e-12).all()
    assert error.max() < 0.02
