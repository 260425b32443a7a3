"""The audit at the door: ordinary mistakes that would give a number are refused in words, and nothing else is."""

import functools
import gc
import re
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.distributions.support import support_of
from pyro_mm.scoring.audit import audit as audits

tables = mm.objectives
LATENT = 2


class Column(nn.Module):
    """An encoder of one number per row, however it is shaped."""

    def __init__(self):
        super().__init__()
        self.net = mm.nn.MLP(1, 2 * LATENT, (8,))

    def forward(self, x):
        return self.net(x.float().reshape(*x.shape[:1], -1)[..., :1])


def prior():
    return dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)


def guide_of(**encoders):
    return mm.Guide(z=mm.posteriors.ProductOfExperts({n: mm.conditionals.Normal(e) for n, e in encoders.items()}))


def pair(decoders, encoders):
    return mm.models.SharedLatent(prior(), decoders), guide_of(**encoders)


def fitted(model, guide, batch, **options):
    return mm.fit(model, guide, tables.elbo(), batch, epochs=1, progress=False, **options)


DOORS = {
    "fit": fitted,
    "log_marginal": lambda m, g, b, **o: mm.log_marginal(m, g, b, num_particles=4, **o),
    "log_weights": lambda m, g, b, **o: mm.log_weights(m, g, b, 4, **o),
    "generate": lambda m, g, b, **o: mm.generate(m, g, b, 4, **o),
    "posterior_draws": lambda m, g, b, **o: mm.posterior_draws(m, g, b, 4, **o),
    "annealed_importance": lambda m, g, b, **o: mm.annealed_importance(
        m, g, b, num_chains=2, temperatures=2, pilot_chains=2, leapfrog_steps=1, **o
    ),
    "compare": lambda m, g, b, **o: mm.compare({"a": (m, g), "b": (m, g)}, b, num_particles=4, **o),
    "to_arviz": lambda m, g, b, **o: mm.to_arviz(m, g, b, num_samples=4, **o),
}  # fmt: skip


# -- sites -----------------------------------------------------------------------------------------------------------


def story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(batch)]))
        batch.observe("x", lambda z: dist.Normal(z, 0.7), z)


def guide_with(name, **infer):
    def guide(batch):
        with batch.plate():
            pyro.sample(name, dist.Normal(torch.zeros(len(batch)), 100.0), infer=infer)
            if name != "zz":
                pyro.sample("z", dist.Normal(batch["x"] / 1.49, 0.6))

    return guide


@pytest.fixture
def numbers():
    return mm.Batch({"x": torch.tensor([0.5, 1.0, -1.0, 0.2])})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore:latent site")
def test_a_site_of_the_guide_alone_is_refused_and_a_misspelt_one_told(door, numbers):
    with pytest.raises(ValueError, match=r"u: drawn by the guide and unknown to the model"):
        DOORS[door](story, guide_with("u"), numbers)
    with pytest.raises(ValueError, match=r"zz: drawn by the guide.*is 'z' meant"):
        DOORS[door](story, guide_with("zz"), numbers)


def test_an_auxiliary_site_is_exempt_and_audit_false_switches_the_audit_off(numbers):
    mm.log_weights(story, guide_with("u", is_auxiliary=True), numbers)
    mm.log_weights(story, guide_with("u"), numbers, audit=False)


def test_model_and_guide_swapped():
    batch = mm.Batch({"x": torch.randn(6, 3)})
    model, guide = pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(3, 4)})
    for door in DOORS.values():
        with pytest.raises(ValueError, match="are model and guide swapped"):
            door(guide, model, batch)


def peeking(batch):
    """Scores b in rows that lack it, which hold filler."""
    with batch.plate():
        z = pyro.sample("z", prior())
        batch.observe("a", lambda z: dist.Normal(z, 1.0).to_event(1), z)
        pyro.sample("b", dist.Normal(z, 1.0).to_event(1), obs=batch["b"])


def guide_of_a(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(batch["a"], 1.0).to_event(1))


def two(present=None):
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(8, 2, generator=generator) for name in "ab"}
    return mm.Batch(values, None if present is None else {"b": present})


SOME = torch.tensor([True, False] * 4)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("present", [SOME, ~SOME, torch.zeros(8, dtype=torch.bool)], ids=["odd", "even", "none"])
def test_filler_is_not_scored(door, present):
    batch = two(present) if present.any() else two().only("a")
    with pytest.raises(ValueError, match="b: the story reads its values where they are missing"):
        DOORS[door](peeking, guide_of_a, batch)


def test_a_story_of_complete_rows_may_observe_by_itself_unless_an_objective_hides_them():
    """The number of the plain ELBO and of the likelihood is right: q and p hold all the rows."""
    mm.log_marginal(peeking, guide_of_a, two(), num_particles=4)
    trained = torch.nn.Parameter(torch.zeros(2))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["a"] + trained, 1.0).to_event(1))

    mm.fit(peeking, guide, tables.elbo(), two(), epochs=1, progress=False)
    with pytest.raises(ValueError, match="b: the story reads its values where they are missing"):
        mm.fit(peeking, guide, tables.mvae(), two(), epochs=1, progress=False)
    with pytest.raises(ValueError, match="b: the story reads its values where they are missing"):
        mm.log_conditional(peeking, guide_of_a, two(), target="b", given="a", num_particles=4)


def wider():
    """A pair that knows x alone, on rows that have a q besides."""
    batch = mm.Batch({"x": torch.randn(6, 3), "q": torch.randint(0, 2, (6,))})
    return *pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(3, 4)}), batch


@pytest.mark.parametrize("door", DOORS)
def test_what_a_story_does_not_observe_changes_nothing(door):
    model, guide, batch = wider()
    DOORS[door](model, guide, batch)


def test_the_quantity_names_what_is_observed():
    model, guide, batch = wider()
    whole, alone = (mm.log_marginal(model, guide, b, num_particles=4, seed=0) for b in (batch, batch.only("x")))
    assert whole.quantity == alone.quantity == "log p(x)" and torch.equal(whole.log_prob, alone.log_prob)
    assert "q is in these rows, and the story does not observe it" in repr(whole) and not alone.notes
    assert mm.log_marginal(model, guide, batch, num_particles=4, audit=False).quantity == "log p(x)"

    def conditional(batch):
        with batch.plate():
            z = pyro.sample("z", prior())
            loc = z.sum(-1, keepdim=True) + batch["q"][:, None]
            batch.observe("x", lambda loc: dist.Normal(loc, torch.ones(3)).to_event(1), loc)

    assert mm.log_marginal(conditional, guide, batch, num_particles=4).quantity == "log p(x | q)"
    mm.log_conditional(conditional, guide, batch, target="x", given="q", num_particles=4)
    with pytest.raises(ValueError, match="q: the story neither observes nor reads it"):
        mm.log_conditional(conditional, guide, batch, target="q", given="x", num_particles=4)


@pytest.mark.parametrize("target, given", [("q", "x"), ("x", "q")])
def test_a_conditional_of_what_is_not_observed(target, given):
    """Its number would be log p(x) - log p(x), or log p(x) itself."""
    model, guide, batch = wider()
    for call in (
        lambda: mm.log_conditional(model, guide, batch, target=target, given=given, num_particles=4),
        lambda: mm.compare(
            {"a": (model, guide), "b": (model, guide)}, batch, target=target, given=given, num_particles=4
        ),
        lambda: mm.protocols.conditional(model, guide, batch, [target], [given], num_particles=4),
        lambda: mm.protocols.both_ways(model, guide, batch, [target], [given], num_particles=4),
    ):
        with pytest.raises(ValueError, match="q: the story neither observes nor reads it"):
            call()


def test_a_recipe_of_one_modality_trains_on_more():
    image, label = torch.rand(6, 8, 8), torch.randint(0, 3, (6,))
    batch = mm.Batch({"image": image, "label": label})
    model, guide, objective = mm.recipes.vae(batch, latent=2, hidden=(8,))
    mm.fit(model, guide, objective, batch, epochs=1, progress=False)


@pytest.mark.parametrize("door", DOORS)
def test_misspelt_decoders_experts_and_sites(door):
    batch = mm.Batch({"image": torch.randn(6, 3), "label": torch.randn(6, 2)})
    decoders = {"image": mm.conditionals.Normal(nn.Linear(2, 6)), "label": mm.conditionals.Normal(nn.Linear(2, 4))}
    encoders = {"image": nn.Linear(3, 4), "label": nn.Linear(2, 4)}
    swap = lambda parts: {n.replace("label", "lable"): part for n, part in parts.items()}  # noqa: E731
    with pytest.raises(ValueError, match=r"lable: the story has a decoder for it.*Is 'label' meant"):
        DOORS[door](*pair(swap(decoders), encoders), batch)
    with pytest.raises(ValueError, match=r"lable: the guide has an expert or encoder for it.*Is 'label' meant"):
        DOORS[door](*pair(decoders, swap(encoders)), batch)

    def by_hand(batch):
        with batch.plate():
            z = pyro.sample("z", prior())
            pyro.sample("imgae", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=batch["image"])

    guide = pair(decoders, {"image": nn.Linear(3, 4)})[1]
    with pytest.raises(ValueError, match="imgae: observed by the story under the name of no modality"):
        DOORS[door](by_hand, guide, batch)


@pytest.mark.parametrize("door", DOORS)
def test_a_modality_observed_at_the_values_of_another(door):
    def twice(batch):
        with batch.plate():
            z = pyro.sample("z", prior())
            batch.observe("a", lambda z: dist.Normal(z, 1.0).to_event(1), z)
            pyro.sample("b", dist.Normal(z, 1.0).to_event(1), obs=batch["a"])

    with pytest.raises(ValueError, match="b: the story observes it at the values of a"):
        DOORS[door](twice, guide_of_a, two())


def test_a_modality_that_the_batch_does_not_hold_is_one_that_every_row_lacks():
    """Which is so by contract: a pair of two modalities evaluates rows of one of them."""
    batch = mm.Batch({"x": torch.randn(6, 3), "y": torch.randn(6, 2)})
    decoders = {"x": mm.conditionals.Normal(nn.Linear(2, 6)), "y": mm.conditionals.Normal(nn.Linear(2, 4))}
    model, guide = pair(decoders, {"x": nn.Linear(3, 4), "y": nn.Linear(2, 4)})
    alone = mm.Batch({"x": batch["x"]})
    one, two = (mm.log_marginal(model, guide, b, num_particles=9, seed=0) for b in (alone, batch.only("x")))
    assert torch.equal(one.log_prob, two.log_prob) and one.quantity == two.quantity == "log p(x)"


@pytest.mark.parametrize("name", ["generate", "posterior_draws", "encode"])
def test_draws_do_not_come_from_a_guide_that_sees_what_is_hidden(name):
    """A likelihood is right under any proposal; a draw given b alone is not one that has seen a."""

    def complete(batch):
        with batch.plate():
            z = pyro.sample("z", prior())
            for m in "ab":
                batch.observe(m, lambda z: dist.Normal(z, 1.0).to_event(1), z)

    batch = two().only("b")
    mm.log_marginal(complete, guide_of_a, batch, num_particles=4)
    call = {
        "generate": lambda: mm.generate(complete, guide_of_a, batch),
        "posterior_draws": lambda: mm.posterior_draws(complete, guide_of_a, batch),
        "encode": lambda: mm.encode(guide_of_a, batch),
    }[name]
    with pytest.raises(ValueError, match="a: the guide reads its values where they are missing"):
        call()


# -- shapes ----------------------------------------------------------------------------------------------------------


FAMILIES = {
    "Normal": (lambda: mm.conditionals.Normal(nn.Linear(2, 2)), torch.randn(6)),
    "fixed scale": (lambda: mm.conditionals.Normal(nn.Linear(2, 1), scale=1.0), torch.randn(6)),
    "Laplace": (lambda: mm.conditionals.Laplace(nn.Linear(2, 2)), torch.randn(6)),
    "Bernoulli": (lambda: mm.conditionals.Bernoulli(nn.Linear(2, 1)), torch.ones(6)),
    "Poisson": (lambda: mm.conditionals.Poisson(nn.Linear(2, 1)), torch.ones(6)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 6])
def test_one_number_per_row_is_a_column_to_a_decoder_of_one_entry(family, size):
    make, values = FAMILIES[family]
    values = values[:size]
    model, guide = pair({"age": make()}, {"age": Column()})
    column = mm.Batch({"age": values[:, None]})
    for name in ("fit", "log_marginal", "log_weights", "generate"):
        door = DOORS[name]
        with pytest.raises(ValueError, match=r"age: its values are of shape \(N,\).*event shape \(1,\).*\(N, 1\)"):
            door(model, guide, mm.Batch({"age": values}))
        if name in ("log_weights", "generate"):
            door(model, guide, column)


@pytest.mark.parametrize("values, decoder, words", [
    (torch.randint(0, 4, (6, 1)), lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), r"as \(N,\)"),
    (torch.eye(4)[torch.arange(6) % 4], lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), "argmax"),
    (torch.randn(6, 2, 3), lambda: mm.conditionals.Normal(nn.Linear(2, 12), event_shape=(3, 2)), "transposed"),
    (torch.randn(6, 3, 3), lambda: mm.conditionals.Normal(nn.Linear(2, 6), event_shape=(3,)), "event_shape"),
    (torch.randn(6, 1), lambda: mm.conditionals.Normal(nn.Linear(2, 20)), "event_shape"),
    (torch.randn(6, 10), lambda: mm.conditionals.Normal(nn.Linear(2, 2)), "event_shape"),
])  # fmt: skip
@pytest.mark.parametrize("door", ["fit", "log_marginal", "generate"])
def test_values_that_would_be_broadcast(values, decoder, words, door):
    with pytest.raises(ValueError, match=f"would be broadcast.*{words}"):
        DOORS[door](*pair({"v": decoder()}, {"v": Column()}), mm.Batch({"v": values}))


def test_sites_in_plates_within_a_row_and_shared_distributions_have_their_shapes():
    """Values (3, N) in a plate of three, a distribution that is one for all rows, and values seen by three raters."""
    batch = mm.Batch({"x": torch.randn(6, 3), "y": torch.randn(6)})

    def nested(batch):
        with batch.plate():
            z = pyro.sample("z", prior())
            batch.observe("y", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=batch["x"].T)

    mm.log_weights(nested, guide_of(x=nn.Linear(3, 4)), batch)


# -- supports --------------------------------------------------------------------------------------------------------


def grey(low, high, size=6):
    return torch.linspace(low, high, size * 4).reshape(size, 4)


SUPPORTS = {
    "pixels to 255": (lambda: mm.conditionals.Bernoulli(nn.Linear(2, 4)), grey(0, 255), "divide by 255"),
    "pixels from -1": (lambda: mm.conditionals.Bernoulli(nn.Linear(2, 4)), grey(-1, 1), r"\(x \+ 1\) / 2"),
    "negative counts": (lambda: mm.conditionals.Poisson(nn.Linear(2, 4)), -grey(1, 24).round(), "counts as they are"),
    "fractional counts": (lambda: mm.conditionals.Poisson(nn.Linear(2, 4)), grey(0, 3), "counts as they are"),
    "scaled expression": (
        lambda: mm.conditionals.NegativeBinomial(nn.Linear(2, 4), (4,)), grey(-1, 2), "counts as they are"
    ),
    "infinite": (
        lambda: mm.conditionals.Normal(nn.Linear(2, 8)),
        torch.where(grey(0, 1) > 0.9, torch.inf, 0.0),
        "not finite",
    ),
    "fractional class": (lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), torch.tensor([0.0, 3.8]), "Classes"),
    "class 4 of 4": (lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), torch.tensor([0, 4, 1]), "4 outputs"),
    "class -1": (lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), torch.tensor([0, -1, 1]), "present="),
}  # fmt: skip


@pytest.mark.parametrize("case", SUPPORTS)
@pytest.mark.parametrize("door", ["fit", "log_marginal", "generate"])
def test_values_outside_the_support_are_refused_with_their_range_and_rows(case, door):
    make, values, mend = SUPPORTS[case]
    encoder = nn.Linear(4, 2 * LATENT) if values.dim() == 2 else Column()
    with pytest.raises(ValueError, match=rf"v: .* scores .* of {len(values)} rows \(\d.*{mend}"):
        DOORS[door](*pair({"v": make()}, {"v": encoder}), mm.Batch({"v": values}))


def test_every_row_is_looked_at_and_one_bad_one_named():
    values = torch.zeros(5000, 4)
    values[4321, 2] = 2.0
    model, guide = pair({"v": mm.conditionals.Bernoulli(nn.Linear(2, 4))}, {"v": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"1 of 5000 rows \(4321\) have others, their values being from 0 to 2"):
        mm.log_weights(model, guide, mm.Batch({"v": values}))
    values[4321, 2] = torch.nan  # a missing row
    mm.log_weights(model, guide, mm.Batch({"v": values}))


def test_a_change_in_place_is_looked_at_again():
    values = torch.zeros(6, 4)
    model, guide = pair({"v": mm.conditionals.Bernoulli(nn.Linear(2, 4))}, {"v": nn.Linear(4, 4)})
    batch = mm.Batch({"v": values})
    mm.log_weights(model, guide, batch)
    batch["v"][3, 3] = 7.0
    with pytest.raises(ValueError, match=r"1 of 6 rows \(3\)"):
        mm.log_weights(model, guide, batch)


def test_grey_levels_are_allowed_and_said_to_be_no_bits():
    make = lambda: mm.conditionals.Bernoulli(nn.Linear(2, 4))  # noqa: E731
    model, guide = pair({"v": make(), "w": make()}, {"v": nn.Linear(4, 4)})
    batch = mm.Batch({"v": grey(0, 1), "w": grey(0, 1).round()})
    for found in (
        mm.log_marginal(model, guide, batch, num_particles=4),
        mm.log_marginal(model, guide, batch, num_particles=4)[:2],
        mm.log_conditional(model, guide, batch, target="v", given="w", num_particles=4),
    ):
        assert "v has values between 0 and 1: under a Bernoulli this is no likelihood of bits" in repr(found)
        assert "no likelihood of bits" in found.summary() and "w has" not in repr(found)
    assert not mm.log_marginal(model, guide, batch.only("w"), num_particles=4).notes


@pytest.mark.parametrize("d, inside, out", [
    (dist.LogNormal(0.0, 1.0), 2.0, 0.0), (dist.Gamma(1.0, 1.0), 2.0, -1.0), (dist.Beta(1.0, 1.0), 0.5, 1.5),
    (dist.Dirichlet(torch.ones(2)), [0.5, 0.5], [0.5, 1.5]), (dist.VonMises(0.0, 1.0), 1.0, torch.inf),
    (dist.Geometric(torch.tensor(0.5)), 3.0, 0.5), (dist.StudentT(3.0), -9.0, torch.inf),
    (dist.Binomial(torch.tensor(3.0), torch.tensor(0.5)), 3.0, 4.0),
])  # fmt: skip
def test_supports_of_other_families(d, inside, out):
    """What is inside by torch's own word is, and what has the density zero, or none, is not."""
    from pyro_mm.distributions.support import describe_values_outside

    support = support_of(d)
    assert describe_values_outside("v", torch.tensor([inside, inside]), True, support) is None
    assert "1 of 2 rows (1)" in describe_values_outside("v", torch.tensor([inside, out]), True, support)
    assert describe_values_outside("v", torch.tensor([inside, out]), torch.tensor([True, False]), support) is None


# -- particles for rows ----------------------------------------------------------------------------------------------


def classes(net):
    """A pair of numbers and a label, with a network for the label's logits."""
    model, guide = pair(
        {"x": mm.conditionals.Normal(nn.Linear(2, 6)), "y": mm.conditionals.Categorical(net)},
        {"x": nn.Linear(3, 4), "y": nn.Embedding(4, 4)},
    )
    generator = torch.Generator().manual_seed(2)
    return model, guide, mm.Batch({"x": torch.randn(32, 3, generator=generator), "y": torch.arange(32) % 4})


MIXING = {
    "LogSoftmax(dim=1)": lambda: nn.Sequential(nn.Linear(2, 4), nn.LogSoftmax(dim=1)),
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)),
    "mean of rows": lambda: _Centred(),
}
ROWWISE = {
    "LogSoftmax(dim=-1)": lambda: nn.Sequential(nn.Linear(2, 4), nn.LogSoftmax(dim=-1)),
    "dropout": lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 4)),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
    "functional dropout": lambda: _Noisy(),
    "numpy's noise": lambda: _Noisy(by_numpy=True),
}


class _Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, z):
        return self.net(z - z.mean(0, keepdim=True))


class _Noisy(nn.Module):
    """Draws whatever its mode."""

    def __init__(self, by_numpy=False):
        super().__init__()
        self.net, self.by_numpy = nn.Linear(2, 4), by_numpy

    def forward(self, z):
        if self.by_numpy:
            import numpy as np

            return self.net(z) + float(np.random.normal())
        return self.net(nn.functional.dropout(z, 0.5, training=True))


@pytest.mark.parametrize("net", MIXING)
@pytest.mark.parametrize("rows", [31, 32])
def test_networks_that_take_particles_for_rows(net, rows):
    """Two particles and more are refused, one is right, and so is vectorize=False."""
    torch.manual_seed(0)
    model, guide, batch = classes(MIXING[net]())
    batch = batch[:rows]
    for door in ("log_marginal", "log_weights", "generate", "posterior_draws", "compare"):
        with pytest.raises(ValueError, match="vectorize=False"):
            DOORS[door](model, guide, batch)
    with pytest.raises(ValueError, match="vectorize=False"):
        mm.fit(model, guide, tables.mvae(), batch, epochs=1, progress=False)
    with pytest.raises(ValueError, match="vectorize=False"):
        mm.fit(model, guide, tables.elbo(mm.estimators.IWAE(3)), batch, epochs=1, progress=False)
    mm.log_weights(model, guide, batch)
    mm.generate(model, guide, batch)
    mm.log_marginal(model, guide, batch, num_particles=3, vectorize=False)
    mm.fit(model, guide, tables.elbo(), batch, epochs=1, progress=False)
    mm.fit(model, guide, tables.mvae(vectorize=False), batch, epochs=1, progress=False)


def test_a_hidden_modality_that_is_drawn_is_looked_at_and_a_guide_may_insist_that_it_is_hidden():
    torch.manual_seed(0)
    model, _, batch = classes(MIXING["LogSoftmax(dim=1)"]())
    right = classes(ROWWISE["LogSoftmax(dim=-1)"]())[0]
    inner = guide_of(x=nn.Linear(3, 4))

    def guide(batch):
        assert batch.presence("y") is False
        inner(batch)

    with pytest.raises(ValueError, match=r"y: .* among particles"):
        mm.generate(model, inner, batch.only("x"), 3)
    mm.generate(right, guide, batch.only("x"), 3)


@pytest.mark.parametrize("net", ROWWISE)
@pytest.mark.parametrize("training", [True, False])
def test_networks_of_rows_and_random_ones_are_let_pass(net, training):
    model, guide, batch = classes(ROWWISE[net]())
    model.train(training)
    guide.train(training)
    for door in ("log_marginal", "log_weights", "generate", "posterior_draws"):
        DOORS[door](model, guide, batch)
    mm.fit(model, guide, tables.mvae(), batch, epochs=1, progress=False)


def test_the_report_of_check_has_the_audit():
    torch.manual_seed(0)
    model, guide, batch = classes(MIXING["LogSoftmax(dim=1)"]())
    found = mm.check(model, guide, tables.elbo(), batch, num_particles=20, repeats=2)
    assert found.findings[0].startswith("y: p(y | ..) of a particle is another one among particles")
    broken = mm.Batch({"x": batch["x"], "y": torch.full((32,), 4)}, {"y": torch.arange(32) % 2 == 0})
    guide = guide_of(x=nn.Linear(3, 4))
    found = mm.check(model, guide, tables.elbo(), broken, num_particles=20, repeats=2)
    assert any("y: Categorical scores whole numbers from 0 to 3, and 16 of 32 rows" in text for text in found.findings)


def in_minibatches(batch):
    rows = [batch[[i]] for i in range(batch.size)]
    joined = lambda several: mm.Batch({"x": torch.cat([one["x"] for one in several])})  # noqa: E731
    return torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=joined)


def test_later_minibatches_are_looked_at_too():
    """Of a loader and of a transform the first one says nothing of the others."""
    model, guide = pair({"x": mm.conditionals.Bernoulli(nn.Linear(2, 3), (3,))}, {"x": nn.Linear(3, 4)})
    pixels = torch.rand(12, 3)
    bright = torch.where(torch.arange(12)[:, None] < 8, pixels, 255.0)
    rows = r"x: Bernoulli scores numbers from 0 to 1, and 4 of 4 rows \(0, 1, 2, 3\) have others.*divide by 255"
    with pytest.raises(ValueError, match=rows):
        fitted(model, guide, in_minibatches(mm.Batch({"x": bright})))
    batch, seen = mm.Batch({"x": pixels}), []

    def brightened(batch):
        seen.append(batch)
        return batch if len(seen) < 3 else batch.replaced({"x": 255 * torch.ones(batch.size, 3)})

    with pytest.raises(ValueError, match=rows):
        fitted(model, guide, batch, transform=brightened, batch_size=4)
    fitted(model, guide, in_minibatches(batch))
    fitted(model, guide, in_minibatches(mm.Batch({"x": bright})), audit=False)


def test_an_index_beyond_a_table_in_a_later_row_is_explained():
    model, guide = _by_function(nn.Embedding(3, 4), mm.conditionals.Categorical(nn.Linear(2, 9)))
    batch = mm.Batch({"x": torch.arange(12) % 3 + 3 * (torch.arange(12) == 11)})
    words = r"in guide.encoder \(Embedding\), given \(N,\).*takes indices from 0 to 2, and gets 0 to 5"
    with pytest.raises(ValueError, match=r"a minibatch of 4 rows \(N = 4\) cannot be run, " + words):
        fitted(model, guide, in_minibatches(batch))
    with pytest.raises(ValueError, match=words):
        fitted(model, guide, batch)
    with pytest.raises(ValueError, match=r"one or more of 12 rows \(N = 12\) cannot be run, " + words):
        mm.log_weights(model, guide, batch)


# -- how often, and what it leaves -----------------------------------------------------------------------------------


def test_a_kind_of_batch_is_audited_once_and_again_after_a_change(monkeypatch):
    model, guide = pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(3, 4)})
    batch, looks = mm.Batch({"x": torch.randn(6, 3)}), []
    look = audits.collect_sites
    monkeypatch.setattr(audits, "collect_sites", lambda *a: looks.append(1) or look(*a))

    def times(call):
        before = len(looks)
        call()
        return len(looks) - before

    assert times(lambda: mm.log_weights(model, guide, batch)) == 1
    assert times(lambda: mm.log_weights(model, guide, batch)) == 0
    assert times(lambda: mm.log_marginal(model, guide, batch[:4], num_particles=4)) == 0
    assert times(lambda: mm.generate(model, guide, batch)) == 0
    assert times(lambda: mm.log_weights(model, guide, batch.only())) == 1
    assert times(lambda: mm.log_weights(model, guide, mm.Batch({"x": torch.randn(6, 3)}, {"x": SOME[:6]}))) == 1
    with torch.no_grad():
        model.decoders["x"].net.weight.zero_()
    assert times(lambda: mm.log_weights(model, guide, batch)) == 0
    model.decoders["x"] = mm.conditionals.Normal(nn.Linear(2, 2))  # one entry for three
    with pytest.raises(ValueError, match="would be broadcast"):
        mm.log_weights(model, guide, batch)
    with pytest.raises(ValueError, match="would be broadcast"):  # what was refused is refused again
        mm.log_weights(model, guide, batch)
    assert times(lambda: mm.log_weights(model, guide, batch, audit=False)) == 0


class Story:
    family = dist.Normal

    def __init__(self):
        self.net = nn.Linear(2, 3)

    def __call__(self, batch):
        with batch.plate():
            z = pyro.sample("z", self.prior)
            batch.observe("x", lambda z: type(self).family(self.net(z), 1.0).to_event(1), z)


class OfClass(Story):
    prior = prior()


def test_a_family_or_a_prior_that_is_exchanged_is_noticed(monkeypatch):
    batch = mm.Batch({"x": -torch.rand(6, 3)})
    model, guide = OfClass(), guide_of(x=nn.Linear(3, 4))
    mm.log_weights(model, guide, batch)
    monkeypatch.setattr(OfClass, "family", dist.LogNormal)
    with pytest.raises(ValueError, match="x: LogNormal scores numbers above 0, and 6 of 6 rows"):
        mm.log_weights(model, guide, batch)
    monkeypatch.undo()
    mm.log_weights(model, guide, batch)
    model.prior = dist.Normal(torch.zeros(LATENT), 1.0)
    with pytest.raises(ValueError, match=r"at site 'z'.*to_event"):
        mm.log_weights(model, guide, batch)


def test_functions_that_are_made_anew_are_not_kept_alive_by_the_audit():
    guide, batch, alive = guide_of(x=nn.Linear(3, 4)), mm.Batch({"x": torch.randn(6, 3)}), []
    for _ in range(3):
        story = OfClass()
        mm.log_weights(functools.partial(lambda story, batch: story(batch), story), guide, batch)
        alive.append(weakref.ref(story.net))
    del story
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_pairs_are_not_kept_alive_by_the_audit():

    model, guide = pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(3, 4)})
    batch = mm.Batch({"x": torch.randn(6, 3)})
    mm.log_marginal(model, guide, batch, num_particles=4)
    alive = [weakref.ref(model), weakref.ref(guide), weakref.ref(batch["x"])]
    del model, guide, batch
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_generators_are_left_alone():
    model, guide = pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(3, 4)})
    before = torch.get_rng_state()
    audits.audit(model, guide, mm.Batch({"x": torch.randn(6, 3, generator=torch.Generator())}), stacked=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_parameter_of_the_store_has_the_first_value_that_the_callers_generator_gives():
    """Under the seed of ``fit``, and not under one of the audit's own."""
    batch = mm.Batch({"x": torch.randn(6)})

    def guide(batch):
        loc = pyro.param("loc", lambda: torch.randn(()))
        with batch.plate():
            pyro.sample("z", dist.Normal(loc, 1.0).expand([len(batch)]))

    firsts = set()
    for seed in (0, 1, 0):
        pyro.clear_param_store()
        mm.fit(
            story,
            guide,
            tables.elbo(),
            batch,
            epochs=1,
            seed=seed,
            progress=False,
            optimizer=lambda p: torch.optim.SGD(p, 0.0),
        )
        firsts.add(pyro.param("loc").item())
    assert len(firsts) == 2


# -- errors of the first run ------------------------------------------------------------------------------------------


def broken():
    x = torch.randn(6, 3)
    good = mm.conditionals.Normal(nn.Linear(2, 6))
    return {
        "too narrow a network": (
            pair({"x": good}, {"x": nn.Linear(5, 4)}), x, ["site 'z'", "guide.posteriors.z.experts.x.net", r"\(N, 3\)"]
        ),
        "odd outputs": (
            pair({"x": mm.conditionals.Normal(nn.Linear(2, 5), (3,))}, {"x": nn.Linear(3, 4)}),
            x,
            ["site 'x'", "model.decoders.x", r"\(\.\.\., 6\)", r"\(N, 5\)", "puts out 16"],
        ),
        "no to_event": ((_without_to_event, guide_of(x=nn.Linear(3, 4))), x, ["site 'x'", r"to_event\(1\)"]),
        "other latents": (
            pair({"x": good}, {"x": nn.Linear(3, 6)}), x, ["site 'x'", "model.decoders.x.net", "2 features"]
        ),
        "float64": (pair({"x": good}, {"x": nn.Linear(3, 4)}), x.double(), ["'x'", "float64", "float32"]),
        "no such modality": ((_of_another, guide_of_a), x, ["'a'"]),
    }  # fmt: skip


def _without_to_event(batch):
    with batch.plate():
        z = pyro.sample("z", prior())
        batch.observe("x", lambda z: dist.Normal(z.sum(-1, keepdim=True) * torch.ones(3), 1.0), z)


def _in_two_blocks(batch):
    for name in ("z", "more"):
        with batch.plate():
            pyro.sample(name, dist.Normal(torch.zeros(len(batch)), 1.0))


def _entries_as_rows(batch):
    """Two entries of a latent, and two rows of the first run of ``fit``."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0))
        batch.observe("x", lambda z: dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(batch), 3]).to_event(1), z)


def _of_another(batch):
    with batch.plate():
        z = pyro.sample("z", prior())
        batch.observe("x", lambda z: dist.Normal(z, 1.0).to_event(1), z)


@pytest.mark.parametrize("case", broken())
@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("door", ["fit", "log_weights", "generate"])
def test_errors_of_the_first_run_say_where_they_are_from(case, audit, door):
    (model, guide), values, words = broken()[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        DOORS[door](model, guide, mm.Batch({"x": values}), audit=audit)
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), (word, text)


def _by_function(encoder, decoder):
    """A pair of functions, whose networks are given the values as they are."""

    def guide(batch):
        with batch.plate():
            loc, scale = encoder(batch["x"]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return mm.models.SharedLatent(prior(), {"x": decoder}), guide


def plain():
    real, classes = mm.conditionals.Normal(nn.Linear(2, 6)), mm.conditionals.Categorical(nn.Linear(2, 3))
    x, labels, table = torch.randn(6, 3), torch.arange(6), nn.Embedding(3, 4)
    return {
        "labels from 1": (_by_function(table, classes), labels % 3 + 1, ["0 to 2, and gets 1 to 3"]),
        "-1 for a missing label": (_by_function(table, classes), labels % 4 - 1, ["gets -1 to", "present="]),
        "short labels": (_by_function(table, classes), (labels % 3).char(), [r"int8: give it x\.long"]),
        "one-hot labels": (_by_function(nn.Embedding(6, 4), classes), torch.eye(6), ["float32: give it x.argmax"]),
        "integers": (_by_function(nn.Linear(3, 4), real), (9 * x).long(), [r"int64: give it x\.to\(torch\.float32\)"]),
        "one number to a network of one entry": (
            pair({"x": mm.conditionals.Normal(nn.Linear(2, 2), ())}, {"x": mm.nn.MLP(1, 4)}),
            x[:, 0].double(),
            [r"\. Give one number per row as \(N, 1\), values\[:, None\]$"],
        ),
        "two blocks of rows": ((story, _in_two_blocks), x[:, 0], ["plate 'data'", "Enter the plate once"]),
        "as many latents as rows of a first run": ((_entries_as_rows, guide_of(x=nn.Linear(3, 4))), x, ["to_event"]),
    }  # fmt: skip


@pytest.mark.parametrize("case", plain())
@pytest.mark.parametrize("door", ["fit", "log_weights"])
def test_what_mends_an_ordinary_mistake_is_told(case, door):
    (model, guide), values, words = plain()[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        DOORS[door](model, guide, mm.Batch({"x": values}))
    for word in words:
        assert re.search(word, str(caught.value)), (word, str(caught.value))


def test_a_pair_that_runs_in_training_mode_alone_is_trained():
    """A scale behind batch normalisation may underflow in evaluation mode before the training has begun."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return dist.Normal(x[:, :2] / 255, (-self.norm(x)[:, :2]).exp()).to_event(1)

    encoder = Narrow()

    def guide(batch):
        with batch.plate():
            pyro.sample("z", encoder(batch["x"]))

    model = mm.models.SharedLatent(prior(), {"x": mm.conditionals.Normal(nn.Linear(2, 6), (3,))})
    batch = mm.Batch({"x": torch.tensor([0.0, 1.0] + 6 * [200.0])[:, None] + torch.rand(8, 3)})
    assert len(fitted(model, guide, batch)) == 1


def test_warnings_are_no_errors_and_stay_warnings(numbers):
    def of_nothing(batch):
        with batch.plate():
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="in the model and not in the guide"):
            mm.log_weights(story, of_nothing, numbers)
