"""Critics: exact ratios and gradients, who moves what, what is estimated, and what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, MMD, Critic, Objective, Term, elbo, jmvae_kl, masked, mvae, vaevae
from pyro_mm.objectives.critic_forms import TwoWay
from pyro_mm.objectives.critic_runs import next_row
from tests.support.implicit_pair import OFFSET, SCALE, WEIGHT, ExactLogits, Quadratic, pair, rows

OPTIONS = {"batch_size": 32, "seed": 0, "progress": False}


def perceptron(outputs=3):
    return mm.nn.MLP(4, outputs, (8,))


PRIOR_CRITIC = lambda: Critic(perceptron(1), "prior")  # noqa: E731


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


# -- exact critics --------------------------------------------------------------------------------------------------


ESTIMATORS = {
    "AnalyticKL(3)": mm.estimators.AnalyticKL(3),
    "IWAE": mm.estimators.IWAE(4),
    "DReG": mm.estimators.DReG(4),
    "StickTheLanding": mm.estimators.StickTheLanding(2),
    "one by one": mm.estimators.IWAE(3, vectorize_particles=False),
}
TABLES = {"elbo": elbo, "mvae": mvae, "jmvae_kl": jmvae_kl}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("table", TABLES)
def test_with_an_exact_critic_value_and_gradient_of_the_guide_are_those_of_the_likelihood(table, estimator):
    """The critic's ratio is log p(x | z) here, and each term has a pass of its own, with the same draws."""
    found = []
    for implicit in (False, True):
        model, guide = pair(implicit)
        objective = TABLES[table](estimator=ESTIMATORS[estimator], vectorize=False)
        if implicit:
            objective = objective.with_critics({"x": Critic(ExactLogits())})
        torch.manual_seed(5)
        total = objective.evaluate(model, guide, rows(), step=0).total
        found.append((total, gradients(total, [*guide.parameters(), *model.decoders["y"].parameters()])))
    torch.testing.assert_close(found[1][0], found[0][0])
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_masked_row_has_no_ratio():
    """Half of the rows lack x: the value is that of the explicit story."""
    some = mm.Batch({"x": rows()["x"], "y": rows()["y"]}, {"x": torch.arange(64) % 2 == 0})
    found = []
    for implicit in (False, True):
        objective = elbo(mm.estimators.AnalyticKL(2))
        objective = objective.with_critics({"x": Critic(ExactLogits())}) if implicit else objective
        torch.manual_seed(5)
        found.append(objective.evaluate(*pair(implicit), some, step=0).total)
    torch.testing.assert_close(found[1], found[0])


def test_a_critic_against_the_prior_replaces_the_kl_too():
    """With its logit minus log p(x | z), the objective is the expected log-likelihood of both, weighted."""

    class Negative(ExactLogits):
        def forward(self, pairs):
            return -super().forward(pairs)[..., 1:2]

    terms = [Term(ALL, ALL, likelihood=0.7, kl=0.7)]
    torch.manual_seed(5)
    objective = Objective(terms).with_critics({"x": Critic(Negative(), "prior")})
    found = objective.evaluate(*pair(), rows(), step=0).total
    torch.manual_seed(5)
    expected = Objective([Term(ALL, ALL, likelihood=0.7, kl=0.0)]).evaluate(*pair(False), rows(), step=0).total
    torch.testing.assert_close(found, expected)


def test_nobody_moves_what_is_anothers():
    """The objective has no gradient in critic and generator; their losses have none in anything but themselves."""
    model, guide = pair()
    critic = Critic(perceptron(), penalty=0.1)
    objective = elbo().with_critics({"x": critic})
    batch = rows()
    players = {player.name: player for player in objective.players(model, guide, batch)}
    assert list(players) == ["critic x", "generator x"]
    groups = {
        "critic": list(critic.parameters()),
        "generator": list(model.decoders["x"].parameters()),
        "others": [*guide.parameters(), *model.decoders["y"].parameters()],
    }
    assert set(map(id, players["generator x"].parameters)) == set(map(id, groups["generator"]))
    losses = {
        "others": objective,
        "critic": players["critic x"].loss,
        "generator": players["generator x"].loss,
    }
    for name, loss in losses.items():
        total = loss.evaluate(model, guide, batch, step=0).total
        for group, parameters in groups.items():
            reached = [g is not None and bool(g.any()) for g in gradients(total, parameters)]
            total = loss.evaluate(model, guide, batch, step=0).total
            assert all(reached) if group == name else not any(reached), (name, group)


# -- critics that learn ---------------------------------------------------------------------------------------------


def best_critic(critic, model, guide, batch, steps=40):
    """Minimise the critic's loss on all rows, with the same draws at every evaluation."""
    (player, *_) = elbo().with_critics({"x": critic}).players(model, guide, batch)
    optimizer = torch.optim.LBFGS(player.parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = player.loss.evaluate(model, guide, batch, step=0).total / batch.size
        loss.backward()
        return loss

    optimizer.step(closure)
    return critic


def pairs_of(guide, batch):
    with torch.no_grad():
        z = mm.encode(guide, batch)["z"].sample()
    return batch["x"], z


def log_data_density(x):
    covariance = WEIGHT @ WEIGHT.T + SCALE**2 * torch.eye(2)
    return torch.distributions.MultivariateNormal(OFFSET, covariance).log_prob(x)


def test_on_gaussians_the_ratio_is_recovered():
    """log p(x | z) - log p_d(x), of a spread of 4.5 nats: root mean square error 0.09 with 20,000 rows, 0.2 with 8,000.

    Errors fall as the root of the number of rows; the seed is fixed, and the bound is twice the error.
    """
    model, guide = pair()
    critic = best_critic(Critic(Quadratic(4, 3)), model, guide, rows(20_000))
    x, z = pairs_of(guide, rows(2000, seed=9))
    (label,) = critic.labels
    with torch.no_grad():
        found = critic.form.log_ratio(critic.logits(label, x, z))
    likelihood = torch.distributions.Normal(z @ model_weight(model).T + model_offset(model), 0.5).log_prob(x).sum(-1)
    truth = likelihood - log_data_density(x)
    assert truth.std() > 4
    assert (found - truth).square().mean().sqrt() < 0.18


def model_weight(model):
    return model.decoders["x"].net.weight[:, :2].detach()


def model_offset(model):
    return model.decoders["x"].net.bias.detach()


def test_between_equal_distributions_the_ratio_is_zero():
    """A generator that ignores z and gives the data's distribution: root mean square 0.031 with 20,000 rows."""
    model, guide = pair()
    covariance = model_weight(model) @ model_weight(model).T + 0.25 * torch.eye(2)
    with torch.no_grad():
        model.decoders["x"].net.weight.copy_(torch.cat([torch.zeros(2, 2), torch.linalg.cholesky(covariance)], 1))
    critic = best_critic(Critic(Quadratic(4, 3)), model, guide, rows(20_000))
    x, z = pairs_of(guide, rows(2000, seed=9))
    with torch.no_grad():
        found = critic.form.log_ratio(critic.logits(critic.labels[0], x, z))
    assert found.square().mean().sqrt() < 0.07


def test_a_two_way_critic_loses_the_information_of_latents():
    """Its ratio is log p(x | z) - log q(x | z), the three-way one's less I_q(x; z) in the mean: here 0.31 nats.

    With 20,000 rows the difference is 0.34; the critics' errors of 0.03 in the mean decide that of this test.
    """
    model, guide = pair()
    batch = rows(20_000)
    values = {}
    x, z = pairs_of(guide, rows(5000, seed=9))
    for name, outputs in (("three", 3), ("two", 1)):
        critic = Critic(Quadratic(4, outputs))
        if name == "two":
            critic.form = TwoWay()
        best_critic(critic, model, guide, batch)
        with torch.no_grad():
            values[name] = critic.form.log_ratio(critic.logits(critic.labels[0], x, z)).mean()
    both = torch.cov(torch.cat([x, z], -1).T)
    information = (torch.logdet(both[:2, :2]) + torch.logdet(both[2:, 2:]) - torch.logdet(both)) / 2
    assert information > 0.2
    assert float(values["three"] - values["two"]) == pytest.approx(float(information), abs=0.08)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["posterior", "prior"])
@pytest.mark.parametrize("compile", [False, True])
def test_rows_that_lack_the_modality_train_too(against, compile, monkeypatch):
    """Every update is compiled, penalties included, and none falls back."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    some = mm.Batch({"x": rows()["x"], "y": rows()["y"]}, {"x": torch.arange(64) % 3 != 0})
    model, guide = pair()
    critic = Critic(perceptron(3 if against == "posterior" else 1), against, penalty=0.1)
    before = [p.clone() for module in (model, guide, critic) for p in module.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {**OPTIONS, "batch_size": 24, "compile": compile, "epochs": 2}
        history = mm.fit(model, guide, elbo().with_critics({"x": critic}), some, **options)
    assert list(history.columns) == ["loss", "(*, *, P)", "critic x", "critic x accuracy", "generator x"]
    after = [p for module in (model, guide, critic) for p in module.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(moved[:-1])  # of a logit's difference from others of the pair the last bias has no part


def test_values_of_missing_rows_reach_no_loss():
    mask = torch.arange(64) % 3 != 0
    totals = []
    for fill in (0.0, 100.0):
        x = torch.where(mask[:, None], rows()["x"], torch.full((), fill))
        batch = mm.Batch({"x": x, "y": rows()["y"]}, {"x": mask})
        model, guide = pair()
        torch.manual_seed(7)
        objective = elbo().with_critics({"x": Critic(perceptron(), penalty=0.1)})
        for player in objective.players(model, guide, batch):
            torch.manual_seed(3)
            totals.append(float(player.loss.evaluate(model, guide, batch, step=0).total.detach()))
    assert totals[:2] == totals[2:]


def test_other_pairs_are_of_other_rows_that_have_the_modality():
    rows = torch.tensor([True, False, True, True, False])
    assert next_row(rows)[rows].tolist() == [2, 3, 0]
    assert next_row(torch.ones(3, dtype=torch.bool)).tolist() == [1, 2, 0]


def test_a_training_with_critics_goes_on_from_its_checkpoint(tmp_path):
    def run(epochs, **options):
        model, guide = pair()
        torch.manual_seed(2)
        critic = Critic(perceptron(), every=2)
        history = mm.fit(model, guide, elbo().with_critics({"x": critic}), rows(), epochs=epochs, **OPTIONS, **options)
        return history, [p.detach() for module in (model, guide, critic) for p in module.parameters()]

    whole, ends = run(3)
    run(1, checkpoint=tmp_path / "training")
    resumed, found = run(3, checkpoint=tmp_path / "training")
    assert resumed.to_dict() == whole.to_dict()
    assert all(map(torch.equal, ends, found))


@pytest.mark.parametrize("change", ["float64", "bf16-mixed"])
def test_other_precisions_train(change):
    model, guide = pair()
    critic = Critic(perceptron(), penalty=0.1)
    batch, options = rows(), {}
    if change == "float64":
        for module in (model, guide, critic):
            module.double()
        batch = mm.Batch({name: batch[name].double() for name in batch.names})
    else:
        options = {"precision": change}
    history = mm.fit(model, guide, elbo().with_critics({"x": critic}), batch, epochs=1, **OPTIONS, **options)
    assert math.isfinite(history.columns["critic x"][0])


class Chain(nn.Module):
    """x is generated from z and y."""

    def __init__(self):
        super().__init__()
        self.x = mm.conditionals.Implicit(nn.Linear(3 + 2, 2), 2)
        self.y = mm.conditionals.Normal(nn.Linear(2, 1), scale=0.5)

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", standard_normal())
            y = batch.observe("y", self.y, z)
            batch.observe("x", self.x, z, y)


class OfCovariate(nn.Module):
    """A story whose generator has a covariate as a parent, or by keyword; with a prior that may depend on it too."""

    def __init__(self, by_keyword=False, of_prior=False):
        super().__init__()
        net = ByKeyword() if by_keyword else nn.Linear(2 + 1 + 2, 2)
        self.x = mm.conditionals.Implicit(nn.Linear(4, 2) if of_prior else net, 2)
        self.y = pair()[0].decoders["y"]
        self.by_keyword = by_keyword
        self.of_prior = of_prior

    def forward(self, batch):
        u = batch.covariates["u"]
        with batch.plate():
            z = pyro.sample("z", dist.Normal(u.expand(-1, 2) if self.of_prior else torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", self.x, *((z,) if self.by_keyword or self.of_prior else (z, u)))
            batch.observe("y", self.y, z)


class ByKeyword(nn.Module):
    """A generator that asks for a covariate by keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 + 2 + 1, 2)

    def forward(self, parents, covariates):
        return self.linear(torch.cat([parents, covariates["u"].expand(*parents.shape[:-1], 1)], -1))


def standard_normal():
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def private_pair():
    """A pair with a latent that is private to x."""
    decoders = {"x": mm.conditionals.Implicit(nn.Linear(6, 2), 2), "y": pair()[0].decoders["y"]}
    model = mm.models.PrivateLatents(standard_normal(), {"x": standard_normal()}, decoders)
    private = mm.posteriors.Private("x", mm.conditionals.Normal(nn.Linear(2, 4)))
    return model, mm.Guide(z=pair()[1].posteriors["z"], w_x=private)


def with_decoders(**decoders):
    model, guide = pair()
    return mm.models.SharedLatent(standard_normal(), {**model.decoders, **decoders}), guide


STORIES = {
    "a private latent": (private_pair, lambda: elbo().with_critics({"x": Critic(mm.nn.MLP(6, 3, (8,)))})),
    "of the prior": (private_pair, lambda: elbo().with_critics({"x": Critic(mm.nn.MLP(6, 1, ()), "prior")})),
    "a modality as parent": (
        lambda: (Chain(), pair()[1]),
        lambda: elbo().with_critics({"x": Critic(mm.nn.MLP(5, 3, ()))}),
    ),
    "a covariate": (
        lambda: (OfCovariate(), pair()[1]),
        lambda: vaevae().with_critics({"x": Critic(mm.nn.MLP(5, 3, (8,)))}),
    ),
    "two implicit modalities": (
        lambda: with_decoders(y=mm.conditionals.Implicit(nn.Linear(4, 1), 2)),
        lambda: elbo().with_critics({"x": PRIOR_CRITIC(), "y": Critic(mm.nn.MLP(3, 3, ()))}),
    ),
    "random sets": (pair, lambda: masked().with_critics({"x": Critic(perceptron())})),
    "subsampled modalities": (pair, lambda: elbo().subsampled(1).with_critics({"x": Critic(perceptron())})),
    "a statistic": (pair, lambda: (elbo(kl=0) + MMD("z")).with_critics({"x": Critic(perceptron())})),
}


@pytest.mark.parametrize("story", STORIES)
def test_critics_meet_other_features(story):
    """Rows of which the first ones lack x, a few y; the accuracy is of the rows that have x."""
    programs, objective = STORIES[story]
    batch = mm.Batch(
        {name: rows()[name] for name in "xy"},
        {"x": torch.arange(64) >= 8, "y": torch.arange(64) % 5 != 3},
        covariates={"u": torch.arange(64.0)[:, None] / 64},
    )
    model, guide = programs()
    history = mm.fit(model, guide, objective(), batch, epochs=1, **OPTIONS | {"batch_size": 16})
    assert all(math.isfinite(column[0]) for column in history.columns.values())
    assert 0.2 < history.columns["critic x accuracy"][0] < 0.9


@pytest.mark.parametrize(
    ("story", "against", "words"),
    [
        ({"by_keyword": True}, "posterior", "the generator of 'x' asks for covariates by keyword"),
        ({}, "prior", r"latents or values of x depend on covariates \(u\)"),
        ({"of_prior": True}, "prior", r"latents or values of x depend on covariates \(u\)"),
    ],
)
def test_covariates_that_a_critic_is_not_shown_are_refused(story, against, words):
    batch = mm.Batch({name: rows()[name] for name in "xy"}, covariates={"u": torch.arange(64.0)[:, None] / 64})
    critic = Critic(perceptron(3 if against == "posterior" else 1), against)
    with pytest.raises(ValueError, match=words):
        mm.fit(OfCovariate(**story), pair()[1], elbo().with_critics({"x": critic}), batch, epochs=1, **OPTIONS)


def test_covariates_of_another_modality_leave_a_critic_against_the_prior_alone():
    batch = mm.Batch({name: rows()[name] for name in "xy"}, covariates={"u": torch.arange(64.0)[:, None] / 64})
    history = mm.fit(*pair(), elbo().with_critics({"x": PRIOR_CRITIC()}), batch, epochs=1, **OPTIONS)
    assert math.isfinite(history.columns["loss"][0])


def test_each_term_has_a_critic_of_its_own():
    model, guide = pair()
    critic = Critic(perceptron())
    objective = mvae().with_critics({"x": critic})
    mm.fit(model, guide, objective, rows(), epochs=1, **OPTIONS)
    assert critic.labels == ["(*, *, P)", "(x, x, P)"]
    assert len(critic.nets) == 2
    first, second = (torch.cat([p.flatten() for p in net.parameters()]) for net in critic.nets)
    assert not torch.equal(first, second)


def test_a_check_has_the_gradients_of_the_objectives_own_parameters():
    report = mm.check(*pair(), elbo().with_critics({"x": Critic(perceptron())}), rows())
    assert not report.gradients.unused
    assert "model.decoders.x" not in {group.name for group in report.gradients.groups}
    assert "estimates, by critics: lower bound on log p(x, y) + H(x)" in str(report)
    assert "its distance from the evidence has no sign" in str(report)


def warnings_of_winning(against, accuracies):
    """Return the epochs, from 1, after which a critic is said to have won, and the last text."""
    model, guide = pair()
    critic = Critic(perceptron(3 if against == "posterior" else 1), against)
    (player, _) = elbo().with_critics({"x": critic}).players(model, guide, rows())
    texts = [player.diagnose({"critic x": 1.0, "critic x accuracy": value}) for value in accuracies]
    return [epoch for epoch, text in enumerate(texts, 1) if text], texts[-1]


def test_a_critic_that_has_won_is_named():
    epochs, text = warnings_of_winning("posterior", (0.999, 0.9, 0.995, 1.0, 1.0))
    assert epochs == [5]
    assert text.startswith("the critic of 'x' has won: for 3 epochs it has told 100.0 % of values of the data")
    assert warnings_of_winning("posterior", (0.999, 0.995, 0.991)) == ([], None)  # the generator is catching up
    assert warnings_of_winning("posterior", (math.nan, 1.0, 1.0)) == ([], None)


def test_a_critic_against_the_prior_may_be_nearly_always_right_at_first():
    """The first accuracies are those of a training on digits that went well."""
    well = (0.873, 0.935, 0.995, 0.999, 0.997, 0.99, 0.944, 0.957, 0.958, 0.957, 0.95, 0.869)
    assert warnings_of_winning("prior", well) == ([], None)
    assert warnings_of_winning("prior", (0.9, *[1.0] * 9)) == ([], None)
    assert warnings_of_winning("prior", (0.9, *[1.0] * 9, 0.999))[0] == [11]
    assert warnings_of_winning("prior", (0.9, *[1.0] * 9, 0.991)) == ([], None)


def test_a_minibatch_of_one_row_is_refused():
    objective = elbo().with_critics({"x": Critic(perceptron())})
    with pytest.raises(ValueError, match="the smallest minibatch has 1 of the 2 rows that the objective needs"):
        mm.fit(*pair(), objective, rows(33), epochs=1, **OPTIONS)


def test_nan_of_a_critic_is_named_and_all_is_put_back():
    model, guide = pair()
    critic = Critic(perceptron(), optimizer=lambda parameters: torch.optim.SGD(parameters, 1e30))
    with pytest.raises(ValueError, match=r"of the player '(critic|generator) x' is nan at step"):
        mm.fit(model, guide, elbo().with_critics({"x": critic}), rows(), epochs=20, **OPTIONS)
    assert all(p.isfinite().all() for module in (model, guide, critic) for p in module.parameters())


# -- in words -------------------------------------------------------------------------------------------------------


def test_the_target_says_what_is_estimated():
    posterior = elbo().with_critics({"x": Critic(perceptron())})
    assert str(posterior.bounds(("x", "y"))) == "estimates, by critics: lower bound on log p(x, y) + H(x)"
    assert posterior.bounds(("x", "y")).kind == "estimate"
    assert str(mvae().with_critics({"x": Critic(perceptron())}).bounds(("x", "y"))).endswith("+ 2 H(x)")
    prior = elbo().with_critics({"x": Critic(perceptron(1), "prior")})
    assert "+ H(x) + I_q(others; z | x), a bias" in str(prior.bounds(("x", "y")))
    alone = Objective([Term(("x",), ("x",))]).with_critics({"x": Critic(perceptron(1), "prior")})
    assert str(alone.bounds(("x", "y"))) == (
        "estimates, by critics: lower bound on log p(x) + H(x), which is - KL(q(x, z) || p(x, z)), without bias"
    )
    assert "critic of x against the prior, non-saturating" in prior.describe(("x", "y"))


def test_sums_and_multiples_keep_critics():
    critics = {"x": Critic(perceptron())}
    total = (2 * elbo().with_critics(critics)) + elbo(mm.estimators.IWAE(2)).with_critics(critics)
    model, guide = pair()
    history = mm.fit(model, guide, total, rows(), epochs=1, **OPTIONS)
    assert {"critic x", "generator x"} <= set(history.columns)
    assert critics["x"].labels == ["(*, *, P)"]
    other = elbo(mm.estimators.IWAE(2)).with_critics({"x": Critic(perceptron())})
    with pytest.raises(ValueError, match="two parts of a sum have critics of their own for 'x'"):
        mm.fit(model, guide, elbo().with_critics(critics) + other, rows(), epochs=1, **OPTIONS)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: elbo(), "modality 'x' is implicit"),
        (lambda: elbo().with_critics({"y": Critic(mm.nn.MLP(3, 3, ()))}), "modality 'y' has a density in the story"),
        (lambda: elbo(Trace_ELBO()).with_critics({"x": Critic(perceptron())}), "Trace_ELBO asks for a density of x"),
        (lambda: elbo(mm.estimators.IWAE(3)).with_critics({"x": PRIOR_CRITIC()}), "weighs the draws of a row"),
        (lambda: elbo(kl=0.5).with_critics({"x": PRIOR_CRITIC()}), "they weigh 1 and 0.5: give kl the weight"),
        (lambda: Objective([Term((), ALL, ALL)]).with_critics({"x": PRIOR_CRITIC()}), "and the term has none"),
        (lambda: elbo().with_critics({"x": Critic(perceptron(1))}), "expected logits of shape"),
        (lambda: elbo().with_critics({"x": Critic(mm.nn.MLP(5, 3, ()))}), "expected an event of 5 entries, got shape"),
        (
            lambda: Objective([Term(("y",), ("y",))]).with_critics({"x": Critic(perceptron())}),
            "a critic of 'x', which no term of the objective decodes",
        ),
    ],
)
def test_mistakes_are_refused(objective, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        mm.fit(*pair(), objective(), rows(), epochs=1, **OPTIONS)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="expected against"):
        Critic(perceptron(), "two-way")
    with pytest.raises(TypeError, match="expected net to be a module"):
        Critic(lambda pairs: pairs)
    with pytest.raises(TypeError, match="expected critics to be a dictionary"):
        elbo().with_critics([Critic(perceptron())])
    critic = Critic(perceptron())
    with pytest.raises(ValueError, match="two modalities share a critic"):
        elbo().with_critics({"x": critic, "y": critic})


def test_a_generator_that_shares_networks_is_refused():
    model, guide = pair()
    trunk = nn.Linear(2, 2)
    generator = model.decoders["x"]
    y = model.decoders["y"]
    model.decoders = nn.ModuleDict({"x": Behind(trunk, generator), "y": Behind(trunk, y)})
    with pytest.raises(ValueError, match=r"the generator of 'x' shares model\.decoders\.x\.trunk\.weight"):
        mm.fit(model, guide, elbo().with_critics({"x": Critic(perceptron())}), rows(), epochs=1, **OPTIONS)


class Behind(nn.Module):
    """A conditional of a trunk's output."""

    def __init__(self, trunk, conditional):
        super().__init__()
        self.trunk = trunk
        self.conditional = conditional

    def forward(self, z):
        return self.conditional(self.trunk(z))


def with_floors(least):
    """The pair, whose explicit decoder and experts have scales of at least a number."""
    model, _ = pair()
    y = mm.conditionals.Normal(nn.Linear(2, 1), scale=nn.Parameter(torch.zeros(1)), least_scale=least)
    experts = {
        name: mm.conditionals.Normal(nn.Linear(size, 4), least_scale=least) for name, size in (("x", 2), ("y", 1))
    }
    model = mm.models.SharedLatent(standard_normal(), {"x": model.decoders["x"], "y": y})
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def test_a_critic_against_the_prior_may_ask_for_floors_of_scales():
    objective = elbo().with_critics({"x": Critic(perceptron(1), "prior", least_scale=0.05)})
    message = r"least_scale=0.05, and the scale of model.decoders.y may fall to 0.01: give this Normal least_scale=0.05"
    with pytest.raises(ValueError, match=message):
        mm.fit(*with_floors(0.01), objective, rows(), epochs=1, **OPTIONS)
    model, guide = with_floors(0.05)
    mm.fit(model, guide, objective, rows(), epochs=1, **OPTIONS)
    with torch.no_grad():
        for expert in guide.posteriors["z"].experts.values():
            expert.net.bias.fill_(-1e4)
            expert.net.weight.zero_()
            assert expert(torch.zeros(1, expert.net.in_features)).base_dist.scale == pytest.approx(0.05)
        model.decoders["y"].log_scale.fill_(-1e4)
        assert model.decoders["y"](torch.zeros(1, 2)).base_dist.scale.item() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="least_scale is of a critic against the prior"):
        Critic(perceptron(), least_scale=0.05)
    with pytest.raises(ValueError, match=r"is fixed, and least_scale=0\.1 bounds a learned one"):
        mm.conditionals.Normal(nn.Linear(2, 1), scale=1.0, least_scale=0.1)
