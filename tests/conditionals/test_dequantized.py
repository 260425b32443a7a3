"""Levels with dequantisation noise as a latent: probabilities that sum to one, bounds, and what is refused."""

import itertools

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.conditionals import Dequantized, ImageFlow

SHAPE, LEVELS = (2, 2), 2
NOISE = dist.Uniform(torch.zeros(SHAPE), 1.0).to_event(2)
FLOW = {"scales": 1, "steps": 2, "hidden": 6, "context_channels": 2, "margin": 0.0}


def pair(variational):
    decoders = {
        "image": Dequantized(ImageFlow(mm.nn.MLP(1, 3, (4,)), SHAPE, 3, **FLOW), LEVELS),
        "label": mm.conditionals.Categorical(mm.nn.MLP(1, 3, (4,))),
    }
    with torch.no_grad():
        for p in decoders["image"].parameters():
            p.add_(0.2 * torch.randn_like(p))
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    experts = {
        "image": mm.conditionals.Normal(mm.nn.MLP(4, 2, (4,))),
        "label": mm.conditionals.Normal(nn.Embedding(3, 2)),
    }
    noise = lambda batch: NOISE  # noqa: E731
    if variational:
        noise = mm.posteriors.Private("image", ImageFlow(mm.nn.MLP(4, 3, (4,)), SHAPE, 3, **FLOW), missing=NOISE)
    model = mm.models.PrivateLatents(prior, {"image": NOISE}, decoders)
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(experts), w_image=noise)


def images():
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).reshape(-1, *SHAPE)
    return mm.Batch({"image": values, "label": torch.arange(16) % 3})


def test_probabilities_of_all_images_given_the_parents_sum_to_one(double):
    """The integral over the noise by Gauss's rule; the density lies within [0, 1] as the margin is 0."""
    torch.manual_seed(0)
    model, _ = pair(False)
    nodes, weights = (torch.from_numpy(x) / 2 for x in np.polynomial.legendre.leggauss(6))
    noise = torch.cartesian_prod(*[nodes + 0.5] * 4).reshape(-1, *SHAPE)
    weight = torch.cartesian_prod(*[weights] * 4).prod(-1)
    with torch.no_grad():
        d = model.decoders["image"](torch.full((1, 1), 0.4), noise)
        total = sum((weight * d.log_prob(x).exp()).sum() for x in images()["image"])
    assert total.item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("variational", [False, True])
def test_evidence_of_all_images_sums_to_one(variational, double):
    torch.manual_seed(0)
    model, guide = pair(variational)
    if variational:
        mm.fit(model, guide, mm.objectives.elbo(), images(), epochs=30, batch_size=16, progress=False)
    evidence = mm.log_marginal(model, guide, images().only("image"), num_particles=2000, prior_share=0.3, seed=0)
    p = evidence.log_prob.exp()
    # 16 independent estimates, five standard errors of their sum, seed fixed
    assert (p.sum() - 1).abs() < 5 * (p * evidence.standard_error).square().sum().sqrt()
    assert "image has probabilities of 2 levels: the dequantisation noise is a latent" in evidence.summary()


def test_draws_have_the_probabilities_of_the_levels(double):
    torch.manual_seed(0)
    model, guide = pair(False)
    evidence = mm.log_marginal(model, guide, images().only("image"), num_particles=2000, prior_share=0.3, seed=0)
    rows = mm.generate(model, guide, mm.Batch.empty(20_000, images()), seed=0)["image"][0]
    number = (rows.flatten(1) * torch.tensor([8.0, 4.0, 2.0, 1.0])).sum(-1).long()
    share = number.bincount(minlength=16) / 20_000
    p = evidence.log_prob.exp()
    error = (p * (1 - p) / 20_000 + (p * evidence.standard_error).square()).sqrt()
    assert ((share - p).abs() < 5 * error).all()


@pytest.mark.parametrize("variational", [False, True])
def test_bounds_lie_below_and_rise_with_the_draws(variational, double):
    torch.manual_seed(0)
    model, guide = pair(variational)
    rows = images().only("image")
    exact = mm.log_marginal(model, guide, rows, num_particles=2000, prior_share=0.3, seed=0).mean()[0]
    with torch.no_grad():
        one, many = (
            -torch.tensor([mm.objectives.elbo(mm.estimators.IWAE(k)).loss(model, guide, rows) / 16 for _ in range(12)])
            for k in (1, 10)
        )
    # 12 losses each, five standard errors, seed fixed
    assert one.mean() < many.mean() + 5 * (one.std() + many.std()) / 12**0.5
    assert many.mean() < exact + 5 * many.std() / 12**0.5 + 0.01
    assert many.mean() > one.mean()


def test_tables_estimators_and_missing_images_train():
    model, guide = pair(True)
    batch = images()
    batch = mm.Batch(
        {n: batch[n] for n in batch}, {"image": torch.arange(16) % 3 > 0, "label": torch.arange(16) % 4 > 0}
    )
    parameters = [*model.parameters(), *guide.parameters()]
    tables, estimators = mm.objectives, mm.estimators
    for objective in (tables.elbo(), tables.vaevae(estimators.DReG(2)), tables.mvae(1, estimators.IWAE(2))):
        gradients = torch.autograd.grad(
            objective.differentiable_loss(model, guide, batch), parameters, allow_unused=True
        )
        assert all(g is None or g.isfinite().all() for g in gradients)
    assert mm.generate(model, guide, batch.only("label"), num_samples=2)["image"].shape == (2, 16, 2, 2)
    label = batch.only("label")
    evidence = mm.log_marginal(model, guide, label, num_particles=500, seed=0)
    assert (evidence.log_prob[label.rows] > -5).all(), "the noise of a missing image counts for nothing"


def test_terms_are_alike_stacked_and_one_by_one(double):
    torch.manual_seed(0)
    model, guide = pair(True)
    some = images()[torch.arange(16) % 3 > 0]
    losses = []
    for vectorize in (True, False):
        objective = mm.objectives.vaevae(vectorize=vectorize)
        with torch.no_grad():
            losses.append(torch.tensor([objective.loss(model, guide, some) for _ in range(25)]))
    # means of 25 losses with draws of their own, five standard errors, seed fixed
    error = (losses[0].var() / 25 + losses[1].var() / 25).sqrt()
    assert (losses[0].mean() - losses[1].mean()).abs() < 5 * error


def test_what_its_draws_cannot_be_used_for_is_refused():
    model, guide = pair(False)
    with pytest.raises(ValueError, match="'image': its draws do not depend on its dequantisation noise"):
        mm.simulate(model, images())
    with pytest.raises(ValueError, match="no draw from their joint distribution"):
        mm.bidirectional(model, guide, images(), num_chains=2, temperatures=2)
    noisy = mm.datasets.dequantize(images(), "image", LEVELS, seed=0)
    with pytest.raises(ValueError, match=r"the 2 multiples of 1/1 from 0 to 1, and .* add no noise: it is a latent"):
        mm.log_marginal(model, guide, noisy, num_particles=2)


def test_wrong_parents_are_refused():
    decode = Dequantized(ImageFlow(nn.Linear(2, 3), SHAPE, 3, **FLOW))
    with pytest.raises(ValueError, match="expected the noise behind the other parents"):
        decode(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"expected noise of event shape \(2, 2\), got a tensor of shape \(5, 4\)"):
        decode(torch.zeros(5, 2), torch.rand(5, 4))
    with pytest.raises(TypeError, match="expected a distribution from the conditional, got"):
        Dequantized(nn.Linear(2, 3))(torch.zeros(5, 2), torch.rand(5, 2, 2))
