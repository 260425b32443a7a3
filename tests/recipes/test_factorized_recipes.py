"""MFM and its variational twin: kinds of modalities, the loss by hand, surrogates, and missing modalities."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.datasets import simulated
from pyro_mm.recipes import mfm, mfm_variational

SMALL = {"latent": 3, "hidden": (8,), "private": 2}


def rows(n=24, **options):
    return simulated.factors(n, steps=6, **options).batch


def vectors(n=12):
    torch.manual_seed(0)
    return mm.Batch({"a": torch.randn(n, 4), "b": torch.randn(n, 3), "label": torch.arange(n) % 2})


@pytest.mark.parametrize("recipe", [mfm, mfm_variational])
@pytest.mark.parametrize("label", ["class", "real"])
def test_images_strings_and_series_train_with_a_class_or_a_number(recipe, label):
    torch.manual_seed(0)
    batch = rows(label=label)
    model, guide, objective = run = recipe(batch, **SMALL)
    objective.differentiable_loss(model, guide, batch).backward()
    missing = [
        n for m in (model, guide) for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert missing == []
    losses = mm.fit(*run, batch, epochs=6, optimizer=lambda ps: torch.optim.Adam(ps, 1e-2), seed=0, progress=False)
    assert losses.to_dict()["loss"][-1] < losses.to_dict()["loss"][0]
    found = mm.generate(model, guide, batch.only("text"), num_samples=2)
    assert {name: x.shape[:2] for name, x in found.items()} == dict.fromkeys(batch.names, (2, 24))


def test_the_loss_of_mfm_is_that_of_the_paper():
    """Cross-entropy, mean squared errors and V-statistics by hand, from the codes, up to the constants of Normals."""
    torch.manual_seed(0)
    batch = vectors()
    size = {"a": 4, "b": 3}
    model, guide, objective = mfm(
        batch, **SMALL, generation={"a": 0.5, "b": 0.0}, mmd=2.0, reconstruct_missing=False
    )  # fmt: skip
    torch.manual_seed(1)
    by_term = objective.evaluate(model, guide, batch, step=0).by_term

    codes = {site: d.mean for site, d in mm.encode(guide, batch).items()}
    decoded = model.decode(model.factors(codes, batch), batch)
    cross_entropy = torch.nn.functional.cross_entropy(decoded["label"].logits, batch["label"], reduction="sum")
    error = (decoded["a"].mean - batch["a"]).square().sum() / size["a"]
    constant = 12 * 0.5 * 0.5 * math.log(math.pi)  # of N(x; mu, 1/2), over the 4 entries
    assert -by_term["(a+b, *, P)"].item() == pytest.approx((cross_entropy + 0.5 * error + constant).item(), rel=1e-5)

    name = "MMD(w_a | a+b; p(w_a))"
    found = [value for label, value in by_term.items() if label.startswith(name)]
    distances = []
    for _ in range(400):
        prior = torch.randn(12, 2)

        def kernel(x, y):
            return torch.exp(-torch.cdist(x, y).square() / 2**2).mean()

        distances.append(kernel(codes["w_a"], codes["w_a"]) + kernel(prior, prior) - 2 * kernel(codes["w_a"], prior))
    each = torch.stack(distances)
    # one draw of the prior, under a fixed seed, within four deviations of the mean over 400
    assert abs(-found[0].item() / 12 / 2.0 - each.mean()) < 4 * each.std()


@pytest.mark.parametrize("recipe", [mfm, mfm_variational])
def test_surrogates_learn_the_whole_code_and_train_no_encoder(recipe):
    torch.manual_seed(0)
    batch = vectors()
    model, guide, objective = recipe(batch, **SMALL)
    terms = [term for term in objective.terms if term.freeze_encoder]
    assert [term.given for term in terms] == [("a",), ("b",)]
    mm.objectives.Objective(terms, objective.estimator).differentiable_loss(model, guide, batch).backward()
    whole = guide.posteriors["z"].posterior
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in whole.partial.parameters())
    rest = [p for n, p in guide.named_parameters() if ".partial." not in n]
    assert all(p.grad is None or not p.grad.any() for p in [*rest, *model.parameters()])


def test_codes_are_points_of_whole_rows_and_surrogates_are_densities():
    torch.manual_seed(0)
    batch = vectors()
    _, guide, _ = mfm(batch, **SMALL)
    assert all(not d.variance.any() for d in mm.encode(guide, batch).values())
    part = mm.encode(guide, batch.only("a"))
    assert (part["z"].variance > 0).all() and not part["w_a"].variance.any()
    other = batch.replaced({"a": batch["a"] + 1})
    assert not torch.equal(mm.encode(guide, other.only("a"))["w_b"].mean, part["w_b"].mean)  # inferred from a
    without = mfm(batch, **SMALL, reconstruct_missing=False).guide
    assert (mm.encode(without, batch.only("a"))["w_b"].variance == 1).all()  # its prior


@pytest.mark.parametrize("recipe", [mfm, mfm_variational])
def test_whatever_lies_under_the_masks_changes_nothing(recipe):
    torch.manual_seed(0)
    batch = vectors()
    model, guide, objective = recipe(batch, **SMALL)
    present = {"a": torch.arange(12) % 3 != 0, "b": torch.arange(12) % 4 != 1, "label": torch.arange(12) % 5 != 2}
    some = mm.Batch({n: batch[n] for n in batch.names}, present)
    other = {"a": batch["a"] + 5, "b": -batch["b"], "label": 1 - batch["label"]}
    swapped = {n: torch.where(present[n].reshape(-1, *[1] * (x.dim() - 1)), batch[n], x) for n, x in other.items()}
    losses = []
    for each in (some, some.replaced(swapped)):
        torch.manual_seed(1)
        loss = objective.differentiable_loss(model, guide, each)
        losses.append(loss.item())
    loss.backward()
    assert losses[0] == losses[1] and math.isfinite(losses[0])


def test_mfm_trains_on_three_modalities_that_any_row_may_lack():
    torch.manual_seed(0)
    batch = rows()
    present = {name: torch.rand(24) < 0.6 for name in batch.names}
    some = mm.Batch({n: batch[n] for n in batch.names}, present, lengths=batch.lengths)
    model, guide, objective = mfm(some, **SMALL)
    loss = objective.differentiable_loss(model, guide, some)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(p.grad is None or p.grad.isfinite().all() for m in (model, guide) for p in m.parameters())


def test_a_surrogate_may_be_a_mixture_whose_divergence_has_no_closed_form():
    """In rows that lack a modality the left side is a mixture too, and in whole rows a point."""
    torch.manual_seed(0)
    batch = vectors()
    some = mm.Batch({n: batch[n] for n in batch.names}, {"b": torch.arange(12) % 3 != 0})
    model, guide, objective = mfm(some, **SMALL)
    experts = {name: mm.conditionals.Normal(mm.nn.MLP(batch[name].shape[1], 6)) for name in ("a", "b")}
    guide.posteriors["z"].posterior.partial = mm.posteriors.MixtureOfExperts(experts)
    objective.differentiable_loss(model, guide, some).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for net in experts.values() for p in net.parameters())


def test_only_the_twin_has_likelihoods():
    torch.manual_seed(0)
    batch = vectors()
    run = mfm(batch, **SMALL)
    with pytest.raises(ValueError, match="deterministic"):
        mm.log_marginal(run.model, run.guide, batch, num_particles=5)
    twin = mfm_variational(batch, **SMALL)
    for seen in (batch, batch.only("a"), batch.only("label")):
        assert math.isfinite(mm.log_marginal(twin.model, twin.guide, seen, num_particles=5, seed=0).mean()[0])


def test_the_bound_of_the_twin_is_below_its_likelihood():
    """Three standard errors of each, and 300 draws, under fixed seeds."""
    torch.manual_seed(0)
    batch = vectors()
    model, guide, objective = mfm_variational(batch, **SMALL)
    joint = mm.objectives.Objective([objective.terms[0]], objective.estimator)
    torch.manual_seed(1)
    bound = -sum(joint.loss(model, guide, batch) for _ in range(50)) / 50 / 12
    value, error = mm.log_marginal(model, guide, batch, num_particles=300, seed=0).mean()
    assert bound < value + 3 * error


def test_settings_reach_story_guide_and_objective():
    batch = vectors()
    assert set(mfm(batch, private={"a": 2}).model.private_priors) == {"a"}
    plain = mfm(batch, private=0)
    assert not plain.model.private_priors and set(plain.guide.posteriors) == {"z"}
    free = mfm(batch, labels=())
    assert set(free.model.decoders) == {"a", "b", "label"} and not free.model.labels
    assert mfm(batch, **SMALL, estimator=mm.estimators.IWAE(3)).objective.estimator.num_particles == 3
    weights = mfm(batch, **SMALL, generation={"a": 0.5}).objective.terms[0].likelihood
    assert weights == {"a": 0.5 / 4, "b": 1 / 3, "label": 1.0}
    assert mfm_variational(batch, **SMALL).objective.terms[0].likelihood == 1


def test_a_batch_of_one_modality_has_no_surrogate():
    batch = vectors().only("a", "label")
    one = mm.Batch({"a": batch["a"], "label": batch["label"]})
    run = mfm(one, **SMALL)
    assert not any(term.freeze_encoder for term in run.objective.terms)
    assert math.isfinite(run.objective.loss(run.model, run.guide, one))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("a", "b", "label")}, "besides the labels"),
        ({"labels": "c"}, "'c'"),
        ({"private": {"label": 2}}, "expected a modality"),
        ({"private": -1}, "private"),
        ({"generation": {"label": 1.0}}, "expected a modality"),
        ({"generation": -0.1}, "generation"),
        ({"mmd": -1.0}, "mmd"),
    ],
)
def test_settings_that_fit_no_batch_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mfm(vectors(), **options)


def test_swapped_private_factors_change_their_modality_and_no_other():
    torch.manual_seed(0)
    batch = rows()
    model, guide, _ = mfm(batch, **SMALL)
    codes = {site: d.mean for site, d in mm.encode(guide, batch).items()}
    before = model.factors(codes, batch)
    expected = model.decode(before, batch)
    for name in ("image", "series"):
        swapped = model.decode(before | {f"w_{name}": before[f"w_{name}"].roll(1, 0)}, batch)
        same = [n for n in ("image", "series") if torch.equal(swapped[n].mean, expected[n].mean)]
        assert same == [n for n in ("image", "series") if n != name]
        for other in ("text", "label"):
            assert torch.equal(swapped[other].log_prob(batch[other]), expected[other].log_prob(batch[other]))


def test_a_learned_scale_is_one_number_per_feature():
    model = mfm_variational(rows(), **SMALL).model
    assert model.decoders["series"].log_scale.shape == (3,)
    assert isinstance(model.decoders["text"](torch.zeros(2, 5)), dist.TorchDistribution)


@pytest.mark.parametrize("recipe", [mfm, mfm_variational])
def test_a_traced_step_has_the_loss_of_an_eager_one(recipe):
    torch.manual_seed(0)
    batch = vectors()
    some = mm.Batch({n: batch[n] for n in batch.names}, {"b": torch.arange(12) % 3 != 0})
    model, guide, objective = recipe(some, **SMALL)
    step = mm.stage(objective, model, guide, some, backend=None)
    torch.manual_seed(1)
    found = float(step(some))
    torch.manual_seed(1)
    assert found == pytest.approx(objective.loss(model, guide, some), rel=1e-5) and step.reasons == []
