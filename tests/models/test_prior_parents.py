"""Stories whose latent hangs on a modality, a covariate, a class or another latent, wherever the prior is drawn from.

Against closed forms and quadrature; where exact identities hold, by them.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, PRIOR, Objective, Term, expansion, stacked_views
from pyro_mm.scoring.importance import score
from pyro_mm.scoring.structure import pair_structure

CENTRES = (-3.0, 0.0, 3.0)
NOISE = 0.8
E = mm.estimators
GRID = torch.linspace(-14, 14, 2801, dtype=torch.float64)
STEP = GRID[1] - GRID[0]

pytestmark = pytest.mark.filterwarnings("ignore:latent site")


def uniform(batch):
    return dist.Categorical(logits=torch.zeros(3)).expand([len(batch)])


def centre(index):
    return torch.tensor(CENTRES)[index]


def decode(z):
    return dist.Normal(z, NOISE)


def of_label(batch):
    with batch.plate():
        label = batch.observe("label", uniform(batch))
        z = pyro.sample("z", dist.Normal(centre(label), 1.0))
        batch.observe("x", decode, z)


def of_covariate(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(centre(batch.covariates["u"]), 1.0))
        batch.observe("x", decode, z)


def of_class(batch):
    """A class that the model alone has: summed out."""
    with batch.plate():
        y = pyro.sample("y", uniform(batch))
        z = pyro.sample("z", dist.Normal(centre(y), 1.0))
        batch.observe("x", decode, z)


def of_class_and_label(batch):
    """The class is summed out, and the label beside it moves the prior too."""
    with batch.plate():
        label = batch.observe("label", uniform(batch))
        y = pyro.sample("y", uniform(batch))
        z = pyro.sample("z", dist.Normal(centre(label) + 0.5 * centre(y), 1.0))
        batch.observe("x", decode, z)


def of_a_latent(batch):
    """The guide lacks u, which so is drawn from its prior."""
    with batch.plate():
        u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(u, 1.0))
        batch.observe("x", decode, z)


def with_private(batch):
    with batch.plate():
        label = batch.observe("label", uniform(batch))
        z = pyro.sample("z", dist.Normal(centre(label), 0.8))
        w = pyro.sample("w_x", dist.Normal(0.2 * centre(label), 0.6))
        batch.observe("x", lambda z, w: decode(z + w), z, w)


STORIES = {
    "label": of_label, "covariate": of_covariate, "class": of_class, "class and label": of_class_and_label,
    "latent": of_a_latent, "private": with_private,
}  # fmt: skip


class Encoder(nn.Module):
    """q(z | x), and of the private latent."""

    def __init__(self, private=False):
        super().__init__()
        self.slope, self.private = nn.Parameter(torch.tensor(0.6)), private

    def forward(self, batch):
        x = batch["x"] if batch.presence("x") is True else torch.where(batch.present["x"], batch["x"], 0.0)
        if batch.presence("x") is False:
            x = torch.zeros(batch.size)
        with batch.plate():
            pyro.sample("z", dist.Normal(self.slope * x, 1.2))
            if self.private:
                pyro.sample("w_x", dist.Normal(0.2 * x, 0.9))


def guide(name):
    return Encoder(private=name == "private")


def rows(repeats=1):
    values = {"label": torch.tensor([0, 1, 2, 2]), "x": torch.tensor([-2.0, 0.5, 2.0, 4.0])}
    batch = mm.Batch(values, covariates={"u": torch.tensor([0, 1, 2, 2])})
    return batch[torch.arange(4).repeat(repeats)]


def only_x(batch):
    return mm.Batch({"x": batch["x"]}, covariates=batch.covariates)


def data(name, repeats=1):
    """The rows with the modalities that the story has."""
    return rows(repeats) if name in ("label", "class and label", "private") else only_x(rows(repeats))


def truth(name, batch):
    """log p of what the rows have, in closed form."""
    c, x = torch.tensor(CENTRES), batch["x"]
    sd, label = math.sqrt(1 + NOISE**2), (batch["label"] if "label" in batch else None)  # noqa: SIM401
    mixture = lambda loc: dist.Normal(loc, sd).log_prob(x[:, None]).logsumexp(-1) - math.log(3)  # noqa: E731
    return {
        "label": lambda: dist.Normal(c[label], sd).log_prob(x) - math.log(3),
        "covariate": lambda: dist.Normal(c[batch.covariates["u"]], sd).log_prob(x),
        "class": lambda: mixture(c),
        "class and label": lambda: mixture(c[label][:, None] + 0.5 * c) - math.log(3),
        "latent": lambda: dist.Normal(0.0, math.sqrt(2 + NOISE**2)).log_prob(x),
        "private": lambda: dist.Normal(1.2 * c[label], sd).log_prob(x) - math.log(3),
    }[name]()


# -- proposals and annealing from the prior -----------------------------------------------------------------------

SHARES = [{"prior_share": 0.1}, {"prior_share": 0.5}, {"prior_share": 1.0}, {"prior_share": 0.5, "draws": "quasi"}]


@pytest.mark.parametrize("how", SHARES, ids=str)
@pytest.mark.parametrize("name", [n for n in STORIES if n != "latent"])
def test_likelihoods_with_a_share_of_the_prior_are_within_their_error_under_parents(name, how, double):
    """Within 4.5 standard errors, of 0.03 nats at most. Rows with the label were off by up to 140 of them."""
    batch = data(name)
    found = mm.log_marginal(STORIES[name], guide(name), batch, num_particles=6000, seed=0, **how)
    assert found.standard_error.max() < 0.03
    assert ((found.log_prob - truth(name, batch)).abs() < 4.5 * found.standard_error + 1e-12).all()


@pytest.mark.parametrize("how", SHARES, ids=str)
@pytest.mark.parametrize("name", ["label", "private"])
def test_a_share_of_the_prior_in_rows_that_lack_the_modality(name, how, double):
    """Of the label alone, p is 1/3: a private latent of what is missing weighs nothing on either side."""
    full = data(name)
    batch = mm.Batch({n: full[n] for n in full.names}, {"x": torch.tensor([True, False, True, False])})
    found = mm.log_marginal(STORIES[name], guide(name), batch, num_particles=6000, seed=0, **how)
    expected = torch.where(batch.present["x"], truth(name, full), -math.log(3))
    assert ((found.log_prob - expected).abs() < 4.5 * found.standard_error + 1e-12).all()


def test_a_latent_that_the_guide_lacks_has_no_prior_to_share(double):
    with pytest.raises(ValueError, match="this story draws while it is scored"):
        mm.log_marginal(of_a_latent, guide("latent"), data("latent"), prior_share=0.5)


def test_posterior_draws_with_a_share_of_the_prior(double):
    """Mean and variance of a conjugate posterior, from 4000 draws: errors 0.010 and 0.0087."""
    batch, variance = data("label"), 1 / (1 + NOISE**-2)
    mean = variance * (batch["x"] / NOISE**2 + centre(batch["label"]))
    options = {"num_samples": 4000, "resample": True, "num_particles": 20_000, "seed": 0}
    drawn = mm.posterior_draws(of_label, guide("label"), batch, prior_share=0.5, **options)["z"]
    assert (drawn.mean(0) - mean).abs().max() < 4.5 * (variance / 4000) ** 0.5
    assert (drawn.var(0) - variance).abs().max() < 4.5 * variance * (2 / 4000) ** 0.5


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("name", ["label", "covariate", "class and label", "private"])
def test_annealing_is_unbiased_under_a_prior_with_parents(name, start, double):
    """The mean of w / p(x) over 400 rows is 1 within 4.5 standard errors."""
    batch = data(name, 100)
    options = {"num_chains": 4, "pilot_chains": 4, "temperatures": 6, "leapfrog_steps": 2, "seed": 0}
    found = mm.annealed_importance(STORIES[name], guide(name), batch, start=start, **options)
    ratio = (found.log_prob - truth(name, batch)).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / 20 and ratio.std() / 20 < 0.05


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_sandwich_of_rows_with_a_label(start, double):
    """E[p / w] = 1 above and E[w / p] = 1 below, over 400 simulated rows, within 4.5 standard errors."""
    options = {"num_chains": 4, "pilot_chains": 4, "temperatures": 10, "leapfrog_steps": 2, "seed": 1}
    lower, upper = mm.bidirectional(of_label, guide("label"), data("label", 100), start=start, **options)
    with mm.utils.seeding.temporary_seed(1, torch.device("cpu")):
        simulated, _ = mm.sampling.ancestral.simulate(of_label, data("label", 100))
    known = truth("label", simulated)
    for ratio in ((lower.log_prob - known).exp(), (known - upper.log_prob).exp()):
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / 20 and ratio.std() / 20 < 0.1


def test_a_parent_in_some_rows_only_is_refused_where_the_density_of_the_prior_is_needed(double):
    batch = rows()
    some = mm.Batch({n: batch[n] for n in batch.names}, {"label": torch.tensor([True, False, True, True])})
    with pytest.raises(ValueError, match="prior_share needs the density of the prior"):
        mm.log_marginal(of_label, guide("label"), some, prior_share=0.5)
    for start in ("guide", "prior"):
        with pytest.raises(ValueError, match="annealing needs the density of the story"):
            mm.annealed_importance(of_label, guide("label"), some, start=start)
    found = mm.log_marginal(of_label, guide("label"), some, num_particles=20_000, seed=0)
    expected = torch.where(some.present["label"], truth("label", batch), truth("class", batch))
    assert ((found.log_prob - expected).abs() < 4.5 * found.standard_error).all()


# -- terms that encode the prior ----------------------------------------------------------------------------------


def value(terms, estimator, name, batch, label, **options):
    """One term's value per row, of a table."""
    objective = Objective(terms, estimator, **options)
    objective.loss(STORIES[name], guide(name), batch)
    return objective.by_term[label].item() / len(batch)


NOTHING = Term(PRIOR, (), PRIOR)


@pytest.mark.parametrize(
    "estimator", [E.AnalyticKL, lambda: E.IWAE(3), lambda: E.IWAE(2, vectorize_particles=False), E.StickTheLanding],
    ids=["analytic", "iwae", "one by one", "stl"],
)  # fmt: skip
@pytest.mark.parametrize("name", STORIES)
def test_the_prior_against_itself_is_zero(name, estimator, double):
    batch = data(name, 5)
    assert abs(value([NOTHING], estimator(), name, batch, "(P, -, P)")) < 1e-12
    for vectorize in (True, False):
        table = [Term(ALL, ALL), NOTHING, Term(PRIOR, ("x",), ("x",))]
        assert abs(value(table, estimator(), name, batch, "(P, -, P)", vectorize=vectorize)) < 1e-12


@pytest.mark.parametrize("name", ["label", "covariate", "private"])
@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_prior_against_itself_is_zero_by_estimators_of_pyro(name, estimator, double):
    objective = Objective([NOTHING], estimator())
    assert abs(objective.loss(STORIES[name], guide(name), data(name, 5))) < 1e-9


def test_a_summed_class_under_the_prior_is_refused_of_trace_enum(double):
    objective = Objective([Term(PRIOR, ALL)], TraceEnum_ELBO())
    with pytest.raises(ValueError, match="encodes the prior, whose density is a sum over a class"):
        objective.loss(of_class, guide("class"), data("class"))


def prior_density(name, label):
    """log p(z) on the grid, ``(.., G)``: given the label if there is one, else summed over what z hangs on."""
    c, log_p = torch.tensor(CENTRES), lambda loc: dist.Normal(loc, 1.0).log_prob(GRID)
    if name == "class":
        return log_p(c[:, None]).logsumexp(0) - math.log(3)
    return log_p(c[label][..., None])


def prior_against_guide(name):
    """E_p(z)[log q(z | x) - log p(z)] per row, by quadrature; of a label that is drawn, given it, and its mean."""
    x = data(name)["x"]
    log_q = dist.Normal(0.6 * x[:, None], 1.2).log_prob(GRID)
    if name == "label":
        log_p = prior_density("label", torch.arange(3))[:, None]
        return ((log_p.exp() * (log_q - log_p)).sum(-1) * STEP).mean(0)
    log_p = prior_density("class", None)
    return (log_p.exp() * (log_q - log_p)).sum(-1) * STEP


@pytest.mark.parametrize("name", ["class", "label"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_term_of_the_prior_against_a_guide_agrees_with_quadrature(name, alone, double):
    """mmJSD's term, of 4 rows 3000 times, within 4.5 standard errors of quadrature."""
    batch, term = data(name, 3000), Term(PRIOR, (), ("x",))
    objective = Objective([term] if alone else [Term(ALL, ALL), term, NOTHING], E.IWAE(1))
    objective.loss(STORIES[name], guide(name), batch)
    found = objective.by_term["(P, -, x)"].item() / len(batch)
    # the spread of one draw is at most that of (z - 0.6 x)^2 / 2.88, of standard deviation below 10 on these rows
    assert abs(found - prior_against_guide(name).mean()) < 4.5 * 10 / len(batch) ** 0.5


@pytest.mark.parametrize("name", ["label", "covariate", "class", "latent", "private"])
def test_importance_weights_under_the_prior_are_unbiased(name, double):
    """E[w] = p(x): of (P, *, P), and of (P, x, P), which hides the label. 4 rows 3000 times, 4.5 standard errors."""
    batch = data(name, 3000)
    info = pair_structure(STORIES[name], guide(name), batch)
    hidden = batch.without("label") if "label" in batch else batch
    for decoded, expected in (
        (batch, truth(name, batch)),
        (hidden, marginal_of_x(name, batch)),
    ):
        views = stacked_views.stack_views(
            expansion.expand([Term(PRIOR, tuple(n for n in batch.names if decoded.presence(n) is True))], batch),
            batch, info, {},
        )  # fmt: skip
        weights = (score(STORIES[name], guide(name), views, info).log_weights()[0, 0] - expected).exp()
        for r in range(4):
            each = weights[r::4]
            assert abs(each.mean() - 1) < 4.5 * each.std() / len(each) ** 0.5


def marginal_of_x(name, batch):
    if name not in ("label", "private"):
        return truth(name, batch)
    c = torch.tensor(CENTRES) * (1.2 if name == "private" else 1.0)
    return dist.Normal(c, math.sqrt(1 + NOISE**2)).log_prob(batch["x"][:, None]).logsumexp(-1) - math.log(3)


@pytest.mark.parametrize("name", ["label", "latent", "covariate", "private"])
@pytest.mark.parametrize("terms", [[Term(PRIOR, ("x",))], [Term(PRIOR, ("x",)), Term(ALL, ALL)]], ids=["one", "two"])
def test_a_particle_of_the_prior_is_scored_again_as_it_was(name, terms, double):
    """With the very label, or latent, that its z was drawn given."""
    batch = data(name)
    info = pair_structure(STORIES[name], guide(name), batch)
    views = stacked_views.stack_views(expansion.expand(terms, batch), batch, info, {})
    if name == "latent" and len(terms) > 1:  # which the other term draws from its prior, anew each time
        with pytest.warns(UserWarning, match="would be drawn anew"):
            assert score(STORIES[name], guide(name), views, info, 5, resample=True).rescore is None
        return
    scores = score(STORIES[name], guide(name), views, info, 5, resample=True)
    index = torch.randint(5, (2, len(terms), 4))
    first = scores.log_weights().gather(0, index)
    torch.testing.assert_close(scores.rescore(index).log_weights()[:, 0], first[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["label", "class"])
@pytest.mark.parametrize("estimator", [E.AnalyticKL, E.StickTheLanding, lambda: E.DReG(1)], ids=["a", "stl", "dreg"])
def test_the_gradient_of_terms_that_encode_the_prior(name, estimator, double):
    """That of quadrature, with respect to the centres' scale and a slope of the guide: 40,000 rows, 4.5 errors."""
    spread, slope = (torch.tensor(value, requires_grad=True) for value in (0.7, 0.6))

    def model(batch):
        with batch.plate():
            y = batch.observe("label", uniform(batch)) if name == "label" else pyro.sample("y", uniform(batch))
            z = pyro.sample("z", dist.Normal(spread * centre(y), 1.0))
            batch.observe("x", decode, z)

    def q(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(slope * batch["x"], 1.2))

    batch = mm.Batch(
        {"x": torch.full((40_000,), 1.3)} | ({"label": torch.arange(40_000) % 3} if name == "label" else {})
    )
    each = dist.Normal(spread * torch.tensor(CENTRES)[:, None], 1.0).log_prob(GRID)
    log_p = each.logsumexp(0, keepdim=True) - math.log(3) if name == "class" else each
    log_x = dist.Normal(GRID, NOISE).log_prob(torch.tensor(1.3))
    log_q = dist.Normal(slope * 1.3, 1.2).log_prob(GRID)
    for term, inner in ((Term(PRIOR, ("x",)), log_x), (Term(PRIOR, (), ("x",)), log_q - log_p)):
        expected = (log_p.exp() * inner).sum(-1).mean() * STEP
        loss = -Objective([term], estimator()).differentiable_loss(model, q, batch) / len(batch)
        found, wanted = (
            torch.autograd.grad(x, (spread, slope), retain_graph=True, allow_unused=True) for x in (loss, expected)
        )
        for one, other in zip(found, wanted, strict=True):
            # the derivative of a draw's value is below 40 on all but a few of the draws, with a spread of 10
            assert one is other is None or abs(one - other) < 4.5 * 10 / len(batch) ** 0.5


# -- a class in the guide -----------------------------------------------------------------------------------------


def labelled(classes, in_guide):
    """A story of a class with a prior that depends on it; the guide enumerates the class, or leaves it to the model."""
    prior = mm.conditionals.Normal(nn.Linear(3, 2, bias=False), scale=1.0)
    torch.nn.init.normal_(next(prior.parameters()))
    decoders = {"x": mm.conditionals.Normal(mm.nn.MLP(5, 2, ()), scale=0.7)}
    model = mm.models.Labelled(classes, prior, decoders)
    sees = {"x": mm.conditionals.Normal(mm.nn.MLP(2, 4, ()))}
    if not in_guide:
        return model, mm.Guide(z=mm.posteriors.ProductOfExperts(sees))
    experts = {"x": mm.conditionals.Categorical(mm.nn.MLP(2, 3, ()))}
    of_y = mm.posteriors.Label("label", mm.posteriors.ProductOfCategoricals(experts))
    of_z = mm.posteriors.ProductOfExperts({**sees, "y": mm.conditionals.Normal(nn.Embedding(3, 4))})
    both = mm.Guide(y=of_y, z=of_z)
    return model, pyro.poutine.infer_config(both, lambda site: {"enumerate": "parallel"} if site["name"] == "y" else {})


@pytest.mark.parametrize("in_guide", [True, False])
def test_the_prior_of_a_classs_latent_against_itself(in_guide, double):
    """Alone and in one table with others, which are worth what they are without it."""
    model, pair_guide = labelled(dist.Categorical(logits=torch.zeros(3)), in_guide)
    batch = mm.Batch({"x": torch.randn(6, 2), "label": torch.arange(6) % 3})
    for terms in ([NOTHING], [Term(ALL, ("x",)), NOTHING]):
        objective = Objective(terms, E.IWAE(2))
        torch.manual_seed(0)
        objective.loss(model, pair_guide, batch)
        assert abs(objective.by_term["(P, -, P)"]) < 1e-12
    torch.manual_seed(0)
    alone = Objective([Term(ALL, ("x",))], E.IWAE(2))
    alone.loss(model, pair_guide, batch)
    if in_guide:  # in one pass with the prior's the class would be drawn, and not summed out
        torch.testing.assert_close(objective.by_term["(*, x, P)"], alone.by_term["(*, x, P)"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_guide", [True, False])
def test_a_class_drawn_from_the_prior_passes_no_gradient(in_guide, double):
    """A draw of a class has no derivative with respect to its probabilities: a gradient without it is refused."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))

        def forward(self, batch):
            return dist.Categorical(logits=self.logits)

    model, pair_guide = labelled(Learned(), in_guide)
    batch = mm.Batch({"x": torch.randn(6, 2), "label": torch.arange(6) % 3})
    objective = Objective([Term(PRIOR, ("x",), ("x",))], E.IWAE(2))
    assert math.isfinite(objective.loss(model, pair_guide, batch))
    with pytest.raises(ValueError, match=r"encodes PRIOR, .* draws 'y' from the model's prior"):
        objective.differentiable_loss(model, pair_guide, batch)
    model.classes.logits.requires_grad_(False)
    objective.differentiable_loss(model, pair_guide, batch).backward()
