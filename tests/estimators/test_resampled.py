"""IWAE(resample=True): a particle that is scored twice is scored the same, or all are differentiated."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

E = mm.estimators


class Flat(nn.Module):
    """A network of vectors, whatever dimensions stand to the left of them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Story(nn.Module):
    """z -> x, by way of a network, a further latent or a label, as the case has it."""

    def __init__(self, case):
        super().__init__()
        middle = {"dropout in a decoder": nn.Dropout(0.5), "batch normalisation in a decoder": nn.BatchNorm1d(4)}
        self.net = Flat(nn.Sequential(nn.Linear(1, 4), middle.get(case, nn.Tanh()), nn.Linear(4, 1)))
        self.shift, self.case = nn.Parameter(torch.tensor([-2.0, 2.0])), case

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            x = self.net(z)
            if self.case == "a latent of the model alone":
                u = pyro.sample("u", dist.Normal(torch.zeros(1), self.shift[1:].exp()).to_event(1))
                batch.observe("x", dist.Normal(x + u, 0.7).to_event(1))
            else:
                label = batch.observe("label", dist.Bernoulli(torch.tensor(0.4)).expand([len(batch)]))
                decoder = lambda x, label: dist.Normal(x + self.shift[label.long()][..., None], 0.7).to_event(1)  # noqa: E731
                batch.observe("x", decoder, x, label)


class Encoder(nn.Module):
    def __init__(self, middle=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), middle or nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        loc, scale = self.net(x).chunk(2, -1)
        return dist.Normal(loc, (0.2 * scale).exp()).to_event(1)


class ByHand(nn.Module):
    """A guide that asks its network each time that it is run."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch):
        with batch.plate():
            pyro.sample("z", self.encoder(batch["x"]))


def pair(case):
    torch.manual_seed(0)
    if case == "dropout in a guide that runs twice":
        return Story(case), ByHand(Encoder(nn.Dropout(0.5)))
    middle = {"dropout in an encoder": nn.Dropout(0.5), "batch normalisation in an encoder": nn.BatchNorm1d(4)}
    return Story(case), mm.Guide(z=mm.posteriors.ProductOfExperts({"x": Encoder(middle.get(case))}))


def rows(case, n):
    torch.manual_seed(0)
    present = torch.arange(n) % 3 > 0 if case == "a missing parent" else torch.ones(n, dtype=torch.bool)
    return mm.Batch({"x": torch.randn(4, 1).repeat(n // 4, 1), "label": torch.ones(n)}, {"label": present})


def gradient(resample, case, batch, seed, particles=3):
    model, guide = pair(case)
    parameters = [*model.parameters(), *guide.parameters()]
    torch.manual_seed(seed)
    loss = mm.objectives.elbo(E.IWAE(particles, resample=resample)).differentiable_loss(model, guide, batch)
    found = torch.autograd.grad(loss / len(batch), parameters, allow_unused=True)
    return loss.item(), torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
    )


AGAIN = {
    "dropout in a decoder": "networks draw random numbers",
    "dropout in a guide that runs twice": "networks draw random numbers",
    "batch normalisation in a decoder": "batch normalisation in training mode",
    "a latent of the model alone": "latent 'u' is in the model only",
    "a missing parent": "modality 'label' is the parent of another one and missing",
}


@pytest.mark.filterwarnings("ignore:latent site 'u'")
@pytest.mark.parametrize("case", AGAIN)
def test_particles_that_a_second_run_would_draw_anew_keep_the_gradient_of_all(case, double):
    """The gradient of all particles, draw by draw, and a word of why."""
    batch = rows(case, 12)
    plain = gradient(False, case, batch, 1)
    with pytest.warns(UserWarning, match=AGAIN[case]):
        resampled = gradient(True, case, batch, 1)
    assert resampled[0] == plain[0]
    torch.testing.assert_close(resampled[1], plain[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["dropout in an encoder", "batch normalisation in an encoder", "a present parent"])
def test_particles_that_a_second_run_repeats_are_resampled_without_bias(case, double):
    """Of networks that a step runs once, and data: one particle for all, in the mean, and the same value."""
    batch, differences = rows(case, 4000), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            one, all_of_them = (gradient(r, case, batch, seed) for r in (True, False))
            assert one[0] == pytest.approx(all_of_them[0], rel=1e-12)
            differences.append(one[1] - all_of_them[1])
    differences = torch.stack(differences)
    assert differences.abs().max() > 1e-4, "one particle was chosen"
    error = differences.std(0) / 20**0.5
    # |t| < 5.5 with 19 degrees of freedom fails with probability 3e-5, for each of 30 parameters
    assert (differences.mean(0).abs() < 5.5 * error + 1e-12).all()
    assert error.max() < 0.02


def test_resampling_one_particle_gives_the_gradient_of_the_bound(double):
    """Where there is one, its gradient is the bound's own, to the last digit: dropout in an encoder included."""
    for case in ("dropout in an encoder", "a present parent"):
        one, plain = (gradient(r, case, rows(case, 12), 3, particles=1) for r in (True, False))
        torch.testing.assert_close(one[1], plain[1], rtol=1e-12, atol=1e-12)


def test_dropout_in_evaluation_mode_does_not_prevent_resampling(double):
    model, guide = pair("dropout in a decoder")
    batch = rows("dropout in a decoder", 12)
    estimator = E.IWAE(3, resample=True)
    with pytest.warns(UserWarning, match="networks draw random numbers"):
        estimator.differentiable_loss(model, guide, batch)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.differentiable_loss(model, guide, batch)


def test_dropout_whose_rate_rises_later_ends_resampling(double):
    """Its rate of 0 draws no numbers, and the structure found then is not that of a step at another rate."""
    model, guide = pair("dropout in a decoder")
    batch = rows("dropout in a decoder", 12)
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    rate, dropout.p = dropout.p, 0.0
    estimator = E.IWAE(3, resample=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.differentiable_loss(model, guide, batch)
    dropout.p = rate
    with pytest.warns(UserWarning, match="networks draw random numbers"):
        estimator.differentiable_loss(model, guide, batch)


def test_a_penalty_s_value_is_that_of_all_particles(double):
    """In rows in which a term decodes nothing its KL, which is by samples here, is the plain estimator's."""
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        {n: mm.conditionals.Normal(nn.Linear(1, 1), scale=1.0) for n in "ab"},
    )
    guide = mm.Guide(z=mm.posteriors.MixtureOfExperts({n: Encoder() for n in "ab"}))
    batch = mm.Batch({n: torch.randn(6, 1) for n in "ab"}, {"b": torch.arange(6) % 2 == 0})
    term = mm.objectives.Term(mm.objectives.ALL, "b", kl=0.5)
    values = []
    for resample in (False, True):
        torch.manual_seed(0)
        objective = mm.objectives.Objective([term], E.IWAE(4, resample=resample))
        values.append(objective.differentiable_loss(model, guide, batch).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("case", ["batch normalisation in a decoder", "batch normalisation in an encoder"])
def test_doubly_reparameterised_gradients_and_batch_normalisation(case, double):
    """Of a network of draws it is refused; one that has seen no draw leaves the gradient unbiased."""
    model, guide = pair(case)
    batch = rows(case, 12)
    if case == "batch normalisation in an encoder":
        E.DReG(3).differentiable_loss(model, guide, batch)
        return
    with pytest.raises(ValueError, match="mixes them: use IWAE"):
        E.DReG(3).differentiable_loss(model, guide, batch)
    for estimator in (E.DReG(1), E.StickTheLanding(3), E.IWAE(3)):
        estimator.differentiable_loss(model, guide, batch)
    model.eval()
    E.DReG(3).differentiable_loss(model, guide, batch)


@pytest.mark.parametrize("where", ["a missing parent", "a latent of the model alone"])
def test_a_parameter_of_discrete_draws_of_the_story_is_warned_about(where, double):
    """A learned rate or probability gets no gradient through counts and labels that are drawn as they are."""
    rate = nn.Parameter(torch.tensor(0.3))

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            if where == "a missing parent":
                count = batch.observe("n", dist.Poisson(rate.exp()).expand([len(batch)]))
            else:
                count = pyro.sample("n", dist.Poisson(rate.exp()))
            batch.observe("x", lambda z, n: dist.Normal(z + n[..., None], 0.7).to_event(1), z, count)

    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": Encoder()}))
    values = {"x": torch.zeros(4, 1), **({"n": torch.ones(4)} if where == "a missing parent" else {})}
    batch = mm.Batch(values, {"n": torch.arange(4) > 1} if where == "a missing parent" else {})
    estimator = E.IWAE(2)
    if where == "a missing parent":
        with pytest.warns(UserWarning, match=r"modality 'n' is missing .* its draws there have no derivative"):
            estimator.differentiable_loss(story, guide, batch)
    else:
        with warnings.catch_warnings(), pytest.raises(ValueError, match=r"latent site 'n' .* wrong gradient"):
            warnings.simplefilter("ignore")
            estimator.differentiable_loss(story, guide, batch)
    rate.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "latent site 'n' is in the model")
        estimator.differentiable_loss(story, guide, batch)
        assert estimator.loss(story, guide, batch) > 0
