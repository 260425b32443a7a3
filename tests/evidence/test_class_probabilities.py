"""Probabilities of classes and components against closed forms and sums over all classes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch.distributions.transforms import AffineTransform

import pyro_mm as mm
from pyro_mm.evidence.accumulator import evidence_from_weights
from pyro_mm.evidence.class_sums import ClassAccumulator

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.3, 1.4], dtype=torch.float64)


def clusters(batch):
    with batch.plate():
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(MEANS[y], 0.5))
        batch.observe("x", dist.Normal(z, 0.5))


def of_clusters(x):
    return (WEIGHTS.log() + dist.Normal(MEANS, math.sqrt(0.5)).log_prob(x[:, None])).softmax(-1)


@pytest.fixture
def rows(double):
    return mm.Batch({"x": torch.linspace(-3, 3, 400)})


GUIDE = mm.Guide(z=lambda batch: dist.Normal(batch["x"] * 0.5 + 0.2, 0.6))


@pytest.mark.parametrize(
    "proposal", [None, mm.Proposal("antithetic"), mm.Proposal("quasi"), mm.Proposal(prior_share=0.3)]
)
def test_probabilities_are_off_by_their_errors(rows, proposal):
    """400 rows, 3 classes: the rms of z has a standard error of about 0.05, so that chance fails it once in 1e4."""
    exact = of_clusters(rows["x"])
    found = mm.class_probabilities(clusters, GUIDE, rows, "y", proposal=proposal, seed=1)
    z = (found.probabilities - exact) / found.standard_error
    assert 0.8 < z.square().mean().sqrt() < 1.2
    assert torch.allclose(found.probabilities.sum(-1), torch.ones(400))
    assert torch.equal(found.classes, torch.arange(3)) and found.most_probable.shape == (400,)


def test_the_evidence_is_that_of_the_same_draws(rows):
    found = mm.class_probabilities(clusters, GUIDE, rows, "y", seed=1)
    evidence = mm.log_marginal(clusters, GUIDE, rows, seed=1)
    assert torch.allclose(found.evidence.log_prob, evidence.log_prob)
    assert torch.allclose(found.pareto_k, evidence.pareto_k) and torch.allclose(found.ess, evidence.ess)
    assert found.evidence.quantity == "log p(x)"
    some = mm.class_probabilities(clusters, GUIDE, rows[::20], "y", num_particles=200, seed=1)
    parts = mm.class_probabilities(clusters, GUIDE, rows[::20], "y", num_particles=200, seed=1, chunk=77)
    assert torch.allclose(parts.probabilities, some.probabilities, atol=1e-12)
    assert torch.allclose(parts.standard_error, some.standard_error, atol=1e-12)
    assert torch.equal(found[5].probabilities, found.probabilities[5:6]) and len(found[found.doubtful]) == 0


def test_one_particle_after_another_is_as_right(rows):
    found = mm.class_probabilities(clusters, GUIDE, rows[::20], "y", num_particles=60, seed=1, vectorize=False)
    off = (found.probabilities - of_clusters(rows[::20]["x"])).abs()
    assert (off < 4.5 * found.standard_error + 1e-3).all()


def test_a_guide_that_enumerates_the_class_draws_each_class_its_own_latent(rows):
    """At the exact q(z | y, x) every draw has the weights of the classes themselves."""

    @config_enumerate
    def guide(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.sample("z", dist.Normal((batch["x"] + MEANS[y]) / 2, 0.5 / math.sqrt(2)))

    found = mm.class_probabilities(clusters, guide, rows, "y", num_particles=30, seed=1)
    assert torch.allclose(found.probabilities, of_clusters(rows["x"]), atol=1e-12)
    assert found.standard_error.max() < 1e-12


def test_one_of_several_enumerated_sites_has_the_others_summed_out(double):
    """A chain a -> b -> c and a second parent of x, against the sum over all 2 x 3 x 2 combinations."""
    p_b = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    p_c = torch.tensor([0.2, 0.7, 0.4])

    def model(batch):
        with batch.plate():
            a = pyro.sample("a", dist.Bernoulli(0.3)).long()
            b = pyro.sample("b", dist.Categorical(p_b[a]))
            c = pyro.sample("c", dist.Bernoulli(p_c[b]))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", dist.Normal(a + 2.0 * b, 1.0))
            batch.observe("v", dist.Bernoulli(0.2 + 0.5 * c))
            batch.observe("u", dist.Normal(z, 1.0))

    batch = mm.Batch(
        {"x": torch.tensor([0.3, 2.0, 4.4, 1.0]), "v": torch.tensor([1.0, 0.0, 1.0, 1.0]), "u": torch.ones(4)},
        present={"v": [True, True, False, True], "x": [True, True, True, False]},
    )
    guide = mm.Guide(z=lambda batch: dist.Normal(batch["u"] / 2, math.sqrt(0.5)).expand([batch.size]))

    a, b, c = torch.arange(2)[:, None, None], torch.arange(3)[:, None], torch.arange(2)
    joint = torch.tensor([0.7, 0.3])[a] * p_b[a, b] * torch.where(c == 1, p_c[b], 1 - p_c[b])
    for n in range(4):
        p = joint.clone()
        if batch.present["x"][n]:
            p = p * dist.Normal(a + 2.0 * b, 1.0).log_prob(batch["x"][n]).exp()
        if batch.present["v"][n]:
            p = p * dist.Bernoulli(0.2 + 0.5 * c).log_prob(batch["v"][n]).exp()
        for site, others in (("a", (1, 2)), ("b", (0, 2)), ("c", (0, 1))):
            found = mm.class_probabilities(model, guide, batch[n : n + 1], site, num_particles=25, seed=0)
            assert torch.allclose(found.probabilities[0], p.sum(others) / p.sum(), atol=1e-12)


def test_a_class_without_its_label_is_read_off_the_labelled_story(double):
    """p(z | y) and p(x | z) are linear, so that p(x | y) is Normal; a label that is there is certain."""
    centres = torch.tensor([[0.0, 1.0], [1.5, 0.0], [-1.0, -1.0]])

    def prior(y):
        return dist.Normal(y @ centres, 0.7).to_event(1)

    class Decoder(torch.nn.Module):
        def forward(self, z):
            return dist.Normal(z, 0.6).to_event(1)

    class Prior(torch.nn.Module):
        def forward(self, classes):
            return prior(classes)

    model = mm.models.Labelled(dist.Categorical(WEIGHTS), Prior(), {"x": Decoder()}, independent=("x",))
    torch.manual_seed(1)
    x = torch.randn(40, 2)
    batch = mm.Batch({"x": x, "label": torch.arange(40) % 3}, present={"label": torch.arange(40) < 10})
    guide = mm.Guide(z=lambda batch: dist.Normal(batch["x"] * 0.6, 0.6).to_event(1))
    found = mm.class_probabilities(model, guide, batch, "y", seed=0)
    assert torch.equal(found.probabilities[:10].argmax(-1), torch.arange(10) % 3)
    assert found.probabilities[:10].max(-1).values.min() == 1 and found.standard_error[:10].max() == 0
    exact = (WEIGHTS.log() + dist.Normal(centres, math.hypot(0.7, 0.6)).to_event(1).log_prob(x[:, None])).softmax(-1)
    z = ((found.probabilities - exact) / found.standard_error)[10:]
    assert z.abs().max() < 4.5  # 90 numbers: fails by chance in 1 of 1,600


class Unit(torch.nn.Module):
    """A decoder N(z, 0.25)."""

    def forward(self, z):
        return dist.Normal(z, 0.5).to_event(1)


@pytest.mark.parametrize("kind", ["ours", "mixing", "torch", "transformed"])
def test_the_components_of_a_mixture_prior_are_classes(double, kind):
    torch.manual_seed(2)
    prior = mm.priors.MixturePrior(3, 2, mixing=kind == "mixing")
    with torch.no_grad():
        prior.logits.copy_(WEIGHTS.log())
        prior.log_scale.normal_(-0.3, 0.2)
        if kind == "mixing":
            prior.mixing.copy_(torch.tensor([[1.0, 0.4], [-0.3, 0.8]]))
    axes = prior.mixing.detach() if kind == "mixing" else torch.eye(2)
    loc, scale = prior.loc.detach(), prior.log_scale.detach().exp()
    if kind == "torch":
        parts = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(loc, scale).to_event(1))
        model = mm.models.SharedLatent(parts, {"x": Unit()})
    elif kind == "transformed":
        parts = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal((loc - 1) / 2, scale / 2).to_event(1))
        affine = AffineTransform(torch.tensor(1.0), torch.tensor(2.0), event_dim=1)

        class Shifted(torch.nn.Module):
            def forward(self, batch):
                return dist.TransformedDistribution(parts, [affine])

        model = mm.models.SharedLatent(Shifted(), {"x": Unit()})
    else:
        model = mm.models.SharedLatent(prior, {"x": Unit()})

    x = torch.randn(60, 2)
    covariance = axes @ torch.diag_embed(scale.square()) @ axes.T + 0.25 * torch.eye(2)
    exact = (WEIGHTS.log() + dist.MultivariateNormal(loc @ axes.T, covariance).log_prob(x[:, None])).softmax(-1)
    guide = mm.Guide(z=lambda batch: dist.Normal(batch["x"], 0.6).to_event(1))
    found = mm.class_probabilities(model, guide, mm.Batch({"x": x}), "z", seed=0)
    z = (found.probabilities - exact) / found.standard_error
    assert z.abs().max() < 4.5 and 0.7 < z.square().mean().sqrt() < 1.3  # 180 numbers


def test_a_ratio_of_sums_is_the_same_in_blocks_of_any_size(double):
    torch.manual_seed(0)
    log_w = torch.randn(3, 120, 5) * 2 + torch.linspace(0, 900, 120)[:, None] / 40
    whole = ClassAccumulator(6)
    whole.add(log_w)
    parts = ClassAccumulator(6)
    for part in log_w.split([1, 7, 50, 2, 60], 1):
        parts.add(part)
    groups = log_w.exp().reshape(3, 20, 6, 5).sum(2)
    total = groups.sum((0, 1))
    p = groups.sum(1) / total
    error = ((groups - p[:, None] * groups.sum(0)).square().sum(1) / total.square() * 20 / 19).sqrt()
    for found in (whole.shares(), parts.shares()):
        assert torch.allclose(found[0], p.T) and torch.allclose(found[1], error.T)
    assert torch.allclose(evidence_from_weights(log_w.logsumexp(0), "").log_prob, (total / 120).log())


def test_a_class_of_one_component_in_each_draw_has_no_error(double):
    log_w = torch.tensor([0.9, 0.1]).log()[:, None, None] + torch.randn(50, 4) * 3
    sums = ClassAccumulator()
    sums.add(log_w)
    p, error = sums.shares()
    assert torch.allclose(p, torch.tensor([[0.9, 0.1]]).expand(4, 2)) and error.max() < 1e-15


def plain(batch):
    with batch.plate():
        y = pyro.sample("y", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(y, 1.0))
        batch.observe("x", dist.Normal(z, 1.0))


@pytest.mark.parametrize(
    ("site", "guide", "message"),
    [
        ("t", GUIDE, "unknown site 't': the model has 'y', 'z', 'x'"),
        ("x", GUIDE, r"modality 'x' has no classes: it is a Normal of event shape \(\)"),
        ("z", GUIDE, "'z' has no classes: its prior is a Normal"),
        (
            "y",
            mm.Guide(y=lambda b: dist.Bernoulli(0.5).expand([b.size]), z=lambda b: dist.Normal(b["x"], 1.0)),
            "'y' is drawn by the guide, .* leave it out of the guide",
        ),
    ],
)
def test_a_site_without_classes_is_refused(double, site, guide, message):
    with pytest.raises(ValueError, match=message):
        mm.class_probabilities(plain, guide, mm.Batch({"x": torch.zeros(3)}), site)


def test_rows_with_nothing_present_and_sites_of_many_classes_are_refused(double):
    batch = mm.Batch({"x": torch.zeros(3)}, present={"x": [True, False, True]})
    with pytest.raises(ValueError, match="row 1 has nothing present, and 'y' has its prior there"):
        mm.class_probabilities(plain, GUIDE, batch, "y")
    assert len(mm.class_probabilities(plain, GUIDE, batch[batch.having()], "y", num_particles=30)) == 2

    def inner(batch):
        with batch.plate():
            with pyro.plate("parts", 2, dim=-2):
                prior = mm.distributions.Mixture(dist.Normal(torch.tensor([-1.0, 1.0]), 1.0), torch.zeros(2))
                z = pyro.sample("z", prior)
            batch.observe("x", dist.Normal(z.sum(-2, keepdim=True), 1.0))

    def guide(batch):
        with batch.plate(), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' lies in the plate 'parts' within each row"):
        mm.class_probabilities(inner, guide, batch[:1], "z")


def test_single_precision_and_printing():
    found = mm.class_probabilities(plain, GUIDE, mm.Batch({"x": torch.zeros(3)}), "y", num_particles=40, seed=0)
    assert found.probabilities.dtype == torch.float32 and found.standard_error.dtype == torch.float32
    assert repr(found).startswith("ClassProbabilities(p(y | x): 3 rows, 2 classes, largest standard error 0.")
    few = mm.class_probabilities(plain, GUIDE, mm.Batch({"x": torch.zeros(3)}), "y", num_particles=1, seed=0)
    assert few.standard_error.isnan().all() and "too few draws for k-hat" in repr(few)


def labelled_image(batch):
    """A label of three classes and a number, which depend on one latent."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        batch.observe("x", dist.Normal, 2 * z, torch.ones(()))
        batch.observe("label", lambda z: dist.Categorical(logits=z[..., None] * MEANS), z)


def parent_label(batch):
    """The label is a parent of the number, whose mean is also shifted by a class that is summed out."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Bernoulli(0.4))
        label = batch.observe("label", dist.Categorical(WEIGHTS))
        batch.observe("x", dist.Normal, 2 * z + MEANS[label] + y, torch.ones(()))


def test_a_missing_label_has_probabilities_by_quadrature(double):
    grid = torch.linspace(-8, 8, 4001)[:, None, None]
    x = torch.linspace(-4, 4, 30)
    label = torch.arange(30) % 3
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(2 * grid, 1.0).log_prob(x[:, None])
    joint = joint + (grid * MEANS).log_softmax(-1)
    exact = joint.logsumexp(0).softmax(-1)
    evidence = (joint.logsumexp(0) + (grid[1] - grid[0]).log().squeeze()).logsumexp(-1)

    guide = mm.Guide(z=lambda batch: dist.Normal(batch["x"] * 0.3, 0.7))
    present = {"label": torch.arange(30) < 6}
    for batch in (mm.Batch({"x": x}), mm.Batch({"x": x, "label": label}, present)):
        found = mm.class_probabilities(labelled_image, guide, batch, "label", seed=0)
        missing = ~batch.present["label"] if "label" in batch else torch.ones(30).bool()
        z = (found.probabilities - exact) / found.standard_error
        assert z[missing].abs().max() < 4.5 and 0.6 < z[missing].square().mean().sqrt() < 1.4
        assert torch.equal(found.most_probable[~missing], label[~missing])
        assert found.probabilities[~missing].max(-1).values.eq(1).all()
        off = (found.evidence.log_prob - evidence) / found.evidence.standard_error
        assert off[missing].abs().max() < 4.5
        known = mm.log_marginal(labelled_image, guide, batch, seed=0)
        assert torch.allclose(known.log_prob, found.evidence.log_prob)
        parts = mm.class_probabilities(labelled_image, guide, batch, "label", seed=0, chunk=777)
        assert torch.allclose(parts.probabilities, found.probabilities, atol=1e-12)
    fitted = mm.class_probabilities(labelled_image, guide, batch, "label", proposal="fitted", seed=0)
    assert ((fitted.probabilities - exact) / fitted.standard_error)[missing].abs().max() < 4.5


def test_a_missing_label_on_which_others_depend(double):
    """x given label and class is N(., 5): the label's posterior in closed form."""
    x = torch.linspace(-4, 4, 20)
    guide = mm.Guide(z=lambda batch: dist.Normal(batch["x"] * 0.4, 0.8))
    means = MEANS[:, None] + torch.arange(2)
    log_p = WEIGHTS.log()[:, None] + torch.tensor([0.6, 0.4]).log()
    log_p = log_p + dist.Normal(means, 5**0.5).log_prob(x[:, None, None])
    exact = log_p.logsumexp(-1).softmax(-1)
    batch = mm.Batch({"x": x, "label": torch.arange(20) % 3}, {"label": torch.arange(20) < 4})
    found = mm.class_probabilities(parent_label, guide, batch, "label", num_particles=2000, seed=0)
    assert ((found.probabilities - exact) / found.standard_error)[4:].abs().max() < 4.5
    assert torch.equal(found.most_probable[:4], torch.arange(4) % 3)
    by_latent = mm.class_probabilities(parent_label, guide, batch, "y", num_particles=2000, seed=0)
    assert by_latent.probabilities.sum(-1) == pytest.approx(torch.ones(20))


def test_a_label_with_a_latent_of_its_own_is_refused(double):
    unit = dist.Normal(torch.zeros(1), 1.0).to_event(1)

    class Label(torch.nn.Module):
        def forward(self, z, w):
            return dist.Categorical(logits=torch.cat([z, w], -1))

    class Value(torch.nn.Module):
        def forward(self, z, w):
            return dist.Normal(z + w, 1.0).to_event(1)

    model = mm.models.PrivateLatents(unit, {"x": unit, "label": unit}, {"x": Value(), "label": Label()})
    site = lambda batch: unit.expand([batch.size])  # noqa: E731
    guide = mm.Guide(z=site, w_x=site, w_label=site)
    with pytest.raises(ValueError, match="modality 'label' has a latent of its own, 'w_label'"):
        mm.class_probabilities(model, guide, mm.Batch({"x": torch.zeros(3, 1)}), "label")
