"""The audit at the door: ordinary mistakes that would give a number are refused in words, and nothing else is."""

import functools
import gc
import math
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.scoring.audit import audit as audits
from tests.support.audited_pairs import (
    DOORS,
    LATENT,
    SOME,
    fitted,
    guide_of,
    guide_of_a,
    in_minibatches,
    pair,
    prior,
    story,
    tables,
    two,
)

# -- sites -----------------------------------------------------------------------------------------------------------


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
    exempt = mm.log_weights(story, guide_with("u", is_auxiliary=True), numbers)
    unchecked = mm.log_weights(story, guide_with("u"), numbers, audit=False)
    assert exempt.shape == unchecked.shape == (1, 4)
    assert exempt.isfinite().all() and unchecked.isfinite().all()


def test_model_and_guide_in_each_others_place_are_refused():
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
def test_a_modality_that_the_story_does_not_observe_is_accepted_everywhere(door):
    model, guide, batch = wider()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert DOORS[door](model, guide, batch) is not None
    assert not [w for w in caught if "q" in str(w.message).split()]


def test_the_quantity_of_a_likelihood_names_only_modalities_that_the_story_observes():
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
def test_a_conditional_of_a_modality_that_the_story_does_not_observe_is_refused(target, given):
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
    before = [p.detach().clone() for p in model.parameters()]
    history = mm.fit(model, guide, objective, batch, epochs=1, progress=False)
    assert math.isfinite(history.to_dict()["loss"][0])
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("door", DOORS)
def test_misspelt_decoders_experts_and_sites_are_refused_with_the_right_name(door):
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
def test_a_modality_observed_at_the_values_of_another_is_refused(door):
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


# -- supports --------------------------------------------------------------------------------------------------------


# -- particles for rows ----------------------------------------------------------------------------------------------


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


def test_an_audit_leaves_the_random_generator_alone():
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


def test_warnings_are_no_errors_and_stay_warnings(numbers):
    def of_nothing(batch):
        with batch.plate():
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="in the model and not in the guide"):
            mm.log_weights(story, of_nothing, numbers)
