"""Every recipe trains, is evaluated and generates; networks follow the kind of a modality."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.distributions.base import diagonal
from pyro_mm.recipes import RECIPES, code, cvae, hoelder, jnf, jnf_second, mmvae, mmvae_plus, mvae, telbo, vae

SMALL = {"latent": 3, "hidden": (8,)}


@pytest.fixture(scope="module")
def rows():
    return mm.datasets.load("digits")[0][torch.arange(64)]


def trained(run, rows, epochs=15):
    optimizer = lambda ps: torch.optim.Adam(ps, 1e-2)  # noqa: E731
    return mm.fit(*run, rows, epochs=epochs, optimizer=optimizer, seed=0, progress=False).to_dict()["loss"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_evaluates_and_generates(name, rows):
    torch.manual_seed(0)
    model, guide, objective = run = RECIPES[name](rows, **SMALL)
    objective.differentiable_loss(model, guide, rows).backward()
    for what, module in (("model", model), ("guide", guide)):
        for parameter_name, p in module.named_parameters():
            if p.requires_grad:  # the flows of a first stage want none
                assert p.grad is not None and p.grad.isfinite().all(), f"{what}.{parameter_name}"
    losses = trained(run, rows)
    assert sum(losses[-3:]) / 3 < losses[0]
    for seen in (rows, rows.only("image"), rows.only("label")):
        evidence = mm.log_marginal(model, guide, seen, num_particles=20, seed=0)
        assert math.isfinite(evidence.mean()[0])
    drawn = mm.generate(model, guide, rows.only("label"), num_samples=2)
    assert drawn.pop("image").shape == (2, 64, 8, 8)
    assert {n: x.shape for n, x in drawn.items()} == ({} if name == "vae" else {"label": (2, 64)})


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_serves_rows_that_lack_a_modality(name, rows):
    torch.manual_seed(0)
    model, guide, objective = RECIPES[name](rows, **SMALL)
    present = {"image": torch.arange(64) % 3 != 0, "label": torch.arange(64) % 4 != 0}
    some = mm.Batch({n: rows[n] for n in rows.names}, present)
    objective.differentiable_loss(model, guide, some).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for m in (model, guide) for p in m.parameters())
    other = mm.Batch({"image": 1 - rows["image"], "label": (rows["label"] + 1) % 10})
    swapped = {
        n: torch.where(present[n].reshape(-1, *[1] * (rows[n].dim() - 1)), rows[n], other[n]) for n in rows.names
    }
    losses = []
    for batch in (some, some.replaced(swapped)):  # whatever lies under the masks
        torch.manual_seed(1)
        losses.append(objective.loss(model, guide, batch))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["cvae", "jnf", "code"])
def test_recipe_is_traced(name, rows):
    """Without a compiler. Of the others there is nothing that the contract does not trace."""
    torch.manual_seed(0)
    model, guide, objective = RECIPES[name](rows, **SMALL)
    step = mm.stage(objective, model, guide, rows, backend=None)
    torch.manual_seed(1)
    found = float(step(rows))
    torch.manual_seed(1)
    assert found == pytest.approx(objective.loss(model, guide, rows), rel=1e-5) and step.reasons == []


def test_a_recipe_passes_its_estimator_to_the_objective(rows):
    for recipe in RECIPES.values():
        assert "num_particles=3" in repr(recipe(rows, **SMALL, estimator=mm.estimators.IWAE(3)).objective)


def test_the_default_mvae_is_a_bound_and_a_weighted_one_is_not(rows):
    _, _, objective = mvae(rows)
    assert str(objective.bounds(rows.names)) == ("lower bound on log p(image, label) + log p(image) + log p(label)")
    assert mvae(rows, label_weight=50.0).objective.bounds(rows.names).kind == "surrogate"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("vae", "lower bound on log p(image)"),
        ("cvae", "lower bound on log p(image, label)"),
        ("dmvae", "lower bound on 3 log p(image, label)"),
        ("code", "lower bound on log p(image, label)"),
        ("hoelder", "lower bound on log p(image, label)"),
        ("jnf", "lower bound on log p(image, label)"),
        ("mmvm", "surrogate: not a bound"),
    ],
)
def test_a_recipe_states_what_it_bounds(name, target, rows):
    assert str(RECIPES[name](rows, **SMALL).objective.bounds(rows.names)) == target


# -- one modality -------------------------------------------------------------------------------------------------


def test_a_vae_looks_at_its_own_modality_only(rows):
    """Whatever else is in the batch, and rows that lack it."""
    torch.manual_seed(0)
    model, guide, objective = vae(rows, **SMALL, modality="label")
    other = mm.Batch({"image": 1 - rows["image"], "label": rows["label"]}, {"image": torch.arange(64) % 2 == 0})
    alone, losses = mm.Batch({"label": rows["label"]}), []
    for batch in (rows, other, alone):
        torch.manual_seed(1)
        losses.append(objective.loss(model, guide, batch))
    assert losses[0] == losses[1] == losses[2]
    assert objective.loss(model, guide, rows.only("image")) == 0
    # log p(label) by an integral that is a sum: z weighs nothing in a row without the label
    assert mm.log_marginal(model, guide, rows.only("image"), num_particles=2).log_prob.abs().max() == 0


class Exact(torch.nn.Module):
    """p(z | x, y) of x ~ N(a z + b_y, s^2)."""

    def __init__(self, a, b, s):
        super().__init__()
        self.a, self.b, self.s = a, b, s

    def forward(self, batch):
        precision = 1 + (self.a**2 / self.s**2).sum()
        mean = ((batch["x"] - self.b[batch["y"]]) * self.a).sum(-1, keepdim=True) / self.s**2 / precision
        return dist.Normal(mean, precision.rsqrt()).to_event(1)


@pytest.mark.parametrize("learned", [False, True])
def test_the_likelihood_of_a_conditional_latent_is_the_closed_form(learned, double):
    """x | y ~ N(b_y, a a' + s^2), exactly under the exact posterior and within its error under another one."""
    a, b, s = torch.tensor([1.5, -0.5]), torch.randn(3, 2), 0.7
    decoder = torch.nn.Linear(1 + 3, 2, bias=False)
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([a[:, None], b.T], 1))
    logits = torch.tensor([0.2, -0.5, 1.0]) if learned else torch.zeros(3)
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    root, features = dist.Categorical(logits=logits), torch.nn.Embedding.from_pretrained(torch.eye(3))
    model = mm.models.ConditionalLatent(prior, ("y", root), features, {"x": mm.conditionals.Normal(decoder, scale=s)})
    batch = mm.Batch({"x": torch.randn(6, 2), "y": torch.arange(6) % 3})
    cov = torch.outer(a, a) + s**2 * torch.eye(2)
    given_y = lambda y: dist.MultivariateNormal(b[y], cov).log_prob(batch["x"])  # noqa: E731
    exact = mm.Guide(z=mm.posteriors.Given("x", Exact(a, b, s), prior))
    found = mm.log_conditional(model, exact, batch, target="x", given="y", num_particles=3, seed=0)
    torch.testing.assert_close(found.log_prob, given_y(batch["y"]), rtol=1e-10, atol=1e-10)
    both = mm.log_marginal(model, exact, batch, num_particles=3, seed=0)
    torch.testing.assert_close(both.log_prob, given_y(batch["y"]) + root.log_prob(batch["y"]), rtol=1e-10, atol=1e-10)
    label = mm.log_marginal(model, exact, batch.only("y"), num_particles=3, seed=0)
    torch.testing.assert_close(label.log_prob, root.log_prob(batch["y"]), rtol=1e-10, atol=1e-10)
    bound = -mm.objectives.elbo(mm.estimators.IWAE(1)).loss(model, exact, batch)
    assert bound == pytest.approx(both.log_prob.sum().item(), rel=1e-10)

    wide = mm.Guide(z=mm.posteriors.Given("x", Exact(0.8 * a, b, 1.2 * s), prior))
    found = mm.log_conditional(model, wide, batch, target="x", given="y", num_particles=4000, seed=0)
    # six differences: one is beyond five errors with probability 4e-6, were they normal; the seed is fixed
    assert ((found.log_prob - given_y(batch["y"])).abs() < 5 * found.standard_error + 1e-12).all()
    blind = mm.Guide(z=mm.posteriors.Given("y", Exact(a, b, s), prior))  # p(z), which no missing y misleads
    missing = mm.log_marginal(model, blind, batch.only("x"), num_particles=20_000, seed=0)
    total = torch.stack([given_y(torch.full((6,), y)) + logits.log_softmax(0)[y] for y in range(3)]).logsumexp(0)
    assert ((missing.log_prob - total).abs() < 5 * missing.standard_error).all()
    drawn = mm.generate(model, exact, batch.only("y"), num_samples=20_000, seed=0)["x"]
    assert ((drawn.mean(0) - b[batch["y"]]).abs() < 5 * drawn.std(0) / 20_000**0.5).all()
    with pytest.raises(ValueError, match="'y' is what the others are given"):
        mm.models.ConditionalLatent(prior, ("y", root), features, {"y": mm.conditionals.Normal(decoder)})


def test_a_conditional_vae_learns_the_labels_frequencies_if_asked(rows):
    torch.manual_seed(0)
    run = cvae(rows, **SMALL, learn_given=True)
    trained(run, rows, 60)
    label = mm.log_marginal(run.model, run.guide, rows.only("label"), num_particles=2).log_prob
    torch.testing.assert_close(label, run.model.root().log_prob(rows["label"]), rtol=1e-5, atol=1e-5)
    share = torch.bincount(rows["label"], minlength=10) / 64
    assert (run.model.root().probs - share).abs().max() < 0.04 and share.max() > 0.1
    uniform = cvae(rows, **SMALL)
    for only in (rows, rows.only("label")):
        expected = -math.log(10)
        both = mm.log_marginal(uniform.model, uniform.guide, only, num_particles=50, seed=0)
        given = mm.log_conditional(
            uniform.model, uniform.guide, only, target="image", given="label", num_particles=50, seed=0
        )
        torch.testing.assert_close(both.log_prob - given.log_prob, torch.full((64,), expected), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="expected a label to be given"):
        cvae(rows, target="label", given="image")


# -- mixtures -----------------------------------------------------------------------------------------------------


def test_mmvae_has_the_looser_and_the_tighter_bound(rows):
    torch.manual_seed(0)
    model, guide, looser = mmvae(rows, **SMALL, num_particles=50)
    tight = mmvae(rows, **SMALL, num_particles=50, looser=False).objective
    assert (looser.estimator.stratified, tight.estimator.stratified) == ("outside", "inside")
    assert tight.loss(model, guide, rows) < looser.loss(model, guide, rows)
    learned = mmvae(rows, **SMALL, learn_prior=True)
    losses = trained(learned, rows, 2)
    assert learned.model.prior.log_scale.abs().min() > 0 and losses[1] < losses[0]


def test_mmvae_plus_draws_what_is_private_to_others_from_its_auxiliary_prior(rows):
    """And counts it by the model's own prior, so that the bound is one: r_m is drawn to p(w_m)."""
    torch.manual_seed(0)
    run = mmvae_plus(rows, **SMALL, private=2)
    auxiliary = run.guide.posteriors["w_image"].missing
    with torch.no_grad():
        auxiliary.log_scale.fill_(-3.0)
    label_only = run.guide.posteriors["w_image"](rows.only("label"))
    assert torch.equal(label_only.variance, dist.Laplace(0.0, math.exp(-3.0)).variance.expand(64, 2))
    before = mm.objectives.elbo().differentiable_loss(run.model, run.guide, rows.only("label"))
    (slope,) = torch.autograd.grad(before, auxiliary.log_scale, allow_unused=True, materialize_grads=True)
    assert slope.count_nonzero() == 0  # nothing of the image is decoded, and w_image is masked
    # KL(Laplace(0, s) || Laplace(0, 1)) = s - 1 - log s has the slope s (1 - 1 / s) = s - 1 in log s, for every row
    objective = mm.objectives.Objective([mm.objectives.Term("label", "image", likelihood=0.0)])
    loss = objective.differentiable_loss(run.model, run.guide, rows)
    (slope,) = torch.autograd.grad(loss, auxiliary.log_scale)
    torch.testing.assert_close(slope, torch.full((2,), 64 * (math.exp(-3.0) - 1)), rtol=1e-5, atol=1e-4)


def test_code_and_hoelder_have_their_posteriors(rows):
    run = code(rows, **SMALL, correlation=0.7)
    assert run.guide.posteriors["z"].correlation == 0.7
    torch.manual_seed(0)
    run = hoelder(rows, **SMALL)
    assert run.objective.estimator.stratified == "outside"
    assert run.guide.posteriors["z"](rows)._log_weights.requires_grad
    one_draw = hoelder(rows, **SMALL, estimator=mm.estimators.AnalyticKL()).objective
    wide = rows[torch.arange(64).repeat(60)]
    losses = [o.loss(run.model, run.guide, wide) / wide.size for o in (run.objective, one_draw)]
    # a deviation of some 3 nats per row: of 3,840 rows within five standard errors
    assert losses[0] == pytest.approx(losses[1], abs=0.3)


# -- two stages ---------------------------------------------------------------------------------------------------


class Still(dist.Normal):
    """A normal that is always drawn at one standard deviation from its mean."""

    def rsample(self, sample_shape=()):
        return self.loc + self.scale

    def expand(self, batch_shape, _instance=None):
        return Still(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class StillHead(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return Still(*diagonal(self.head(x))).to_event(1)


def test_the_second_stage_of_jnf_is_its_formula(rows, double):
    """sum_m [log q(z | x) - log q(z | x_m)] at draws that are known; and only flows have a gradient."""
    torch.manual_seed(0)
    rows = rows[torch.arange(9)].replaced({"image": rows["image"][:9].double()})
    run = jnf_second(jnf(rows, **SMALL))
    posterior = run.guide.posteriors["z"]
    posterior.head = StillHead(posterior.head)
    loss = run.objective.differentiable_loss(run.model, run.guide, rows)  # first, as it puts the buffers back
    q = posterior(rows)
    z = q.rsample()
    each = [expert(rows[n]).log_prob(z) for n, expert in posterior.partial.experts.items()]
    expected = (2 * q.log_prob(z) - sum(each)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    moving = [p for m in (run.model, run.guide) for p in m.parameters() if p.requires_grad]
    assert {id(p) for p in moving} == {id(p) for p in posterior.partial.parameters()}
    for f, e in zip(*(torch.autograd.grad(x, moving) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-10)


def test_jnf_trains_in_two_stages(rows):
    torch.manual_seed(0)
    first = jnf(rows, **SMALL)
    flows = first.guide.posteriors["z"].partial
    held = [p.detach().clone() for p in flows.parameters()]
    trained(first, rows, 10)
    assert all(map(torch.equal, held, flows.parameters()))
    second = jnf_second(first)
    others = [p for p in [*first.model.parameters(), *first.guide.parameters()] if not p.requires_grad]
    held = [p.detach().clone() for p in others]
    losses = trained(second, rows, 20)
    assert losses[-1] < losses[0] and all(map(torch.equal, held, others))
    with pytest.raises(ValueError, match="one modality or two"):
        jnf(mm.Batch({n: rows["label"] for n in "abc"}))
    with pytest.raises(TypeError, match="expected a JointEncoder with a partial posterior for z, got ProductOfExperts"):
        jnf_second(mvae(rows, **SMALL))
    jnf_second(telbo(rows, **SMALL))  # of any joint encoder with unimodal posteriors


def test_a_flow_of_images_has_noise_by_a_flow_and_probabilities_of_levels(rows):
    torch.manual_seed(0)
    small = {"steps": 1, "channels": 4}
    run = mm.recipes.vaevae_flow(rows, **SMALL, variational=True, **small)
    losses = trained(run, rows, epochs=4)
    assert losses[-1] < losses[0]
    evidence = mm.log_marginal(run.model, run.guide, rows.only("image"), num_particles=20, seed=0)
    assert "image has probabilities of 2 levels" in repr(evidence)
    assert evidence.bits_per_dimension(64)[0] > 0
    odd = mm.Batch({"image": torch.zeros(4, 7, 8)})
    with pytest.raises(ValueError, match="an image of 7 x 8 cannot be halved 1 times"):
        mm.recipes.vaevae_flow(odd, **SMALL)
