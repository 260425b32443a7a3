"""Flows of images: inverse and log-determinant by autograd's Jacobian, leading dimensions, objectives, evidence."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.conditionals import ImageFlow
from pyro_mm.distributions.scatter import Scatter
from pyro_mm.utils.global_state import override_validation
from tests.support.compiled import agree

SMALL = {"scales": 1, "steps": 2, "hidden": 4, "context_channels": 2}
KINDS = {
    "one channel, two scales": ((4, 4), {"scales": 2, "steps": 3, "hidden": 5, "context_channels": 2}),
    "three channels, real numbers": ((3, 4, 4), {**SMALL, "bounds": None}),
    "an odd half": ((2, 4, 8), {**SMALL, "scales": 2, "bounds": (-1.0, 1.0), "margin": 0.0}),
}


def flow(shape, options, noise=0.15):
    """Return a flow whose parameters are moved off their start, where it is the identity."""
    made = ImageFlow(nn.Linear(2, 3), shape, 3, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(noise * torch.randn_like(p))
    return made


@pytest.mark.parametrize("name", KINDS)
def test_the_density_is_that_of_the_draws_by_autograds_jacobian(name, double):
    shape, options = KINDS[name]
    d = flow(shape, options)(torch.randn(2))
    u = torch.randn(shape)
    x = d.transforms[0](u)
    torch.testing.assert_close(d.transforms[0].inv(x), u, rtol=1e-7, atol=1e-7)
    slopes = torch.autograd.functional.jacobian(d.transforms[0], u).reshape(u.numel(), u.numel())
    expected = dist.Normal(torch.zeros(()), 1.0).log_prob(u).sum() - torch.linalg.slogdet(slopes)[1]
    torch.testing.assert_close(d.log_prob(x), expected, rtol=1e-8, atol=1e-7)
    other = torch.distributions.TransformedDistribution(d.base_dist, d.transforms, validate_args=False)
    torch.testing.assert_close(other.log_prob(x), expected, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_it_begins_as_the_identity_behind_the_logit(name, double):
    shape, options = KINDS[name]
    d = flow(shape, options, noise=0.0)(torch.randn(5, 2))
    u = torch.randn(5, *shape)
    x = d.transforms[0](u)
    if options.get("bounds", 1) is None:
        torch.testing.assert_close(x, u)
        torch.testing.assert_close(d.log_prob(x), dist.Normal(0.0, 1.0).log_prob(u).flatten(1).sum(-1))
    else:
        low, high = options.get("bounds", (0.0, 1.0))
        margin = options.get("margin", 0.01)
        torch.testing.assert_close(x, low + (high - low) * (u.sigmoid() - margin) / (1 - 2 * margin))


def test_the_density_of_four_pixels_integrates_to_one(double):
    """A grid of four dimensions; the flow is smooth there, and decays within it."""
    d = flow((2, 2), {**SMALL, "bounds": None})(torch.randn(2))
    axis = torch.linspace(-7.0, 7.0, 18)
    x = torch.cartesian_prod(axis, axis, axis, axis).reshape(-1, 2, 2)
    with torch.no_grad():
        total = d.log_prob(x).exp().sum().item() * float(axis[1] - axis[0]) ** 4
    assert total == pytest.approx(1, abs=5e-3)


def test_particles_and_terms_stand_to_the_left_of_the_rows(double):
    decode, z, x = flow(*KINDS["one channel, two scales"]), torch.randn(3, 4, 5, 2), torch.rand(5, 4, 4)
    whole = decode(z).log_prob(x)
    assert whole.shape == (3, 4, 5) and decode(z).rsample().shape == (3, 4, 5, 4, 4)
    torch.testing.assert_close(whole[2, 1], decode(z[2, 1]).log_prob(x))
    some = Scatter(decode(z[:, [0, 2]]), (0, 2), 4, -2).log_prob(x)
    torch.testing.assert_close(some[:, [0, 2]], whole[:, [0, 2]])
    assert decode(z[0, 0]).log_prob(torch.rand(7, 1, 4, 4)).shape == (7, 5)
    wide = decode(z[0, 0]).expand((6, 5)).sample()
    assert wide.shape == (6, 5, 4, 4) and len(wide.unique()) == wide.numel()


def test_blocks_of_rows_change_nothing(double):
    decode = flow(*KINDS["one channel, two scales"])
    z, x = torch.randn(600, 2), torch.rand(600, 4, 4)
    whole = decode(z).log_prob(x)
    torch.testing.assert_close(whole[500:], decode(z[500:]).log_prob(x[500:]))


def pair():
    decoders = {
        "image": ImageFlow(mm.nn.MLP(2, 6, (8,)), (4, 4), 6, steps=2, hidden=8, context_channels=2),
        "label": mm.conditionals.Categorical(mm.nn.MLP(2, 3, (8,))),
    }
    experts = {
        "image": mm.conditionals.Normal(mm.nn.MLP(16, 4, (16,))),
        "label": mm.conditionals.Normal(nn.Embedding(3, 4)),
    }
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def data(rows=12):
    present = {"image": torch.arange(rows) % 3 > 0, "label": torch.arange(rows) % 4 > 0}
    return mm.Batch({"image": torch.rand(rows, 4, 4), "label": torch.arange(rows) % 3}, present)


def test_every_table_and_estimator_trains_a_flow_of_images():
    model, guide = pair()
    batch, parameters = data(), [*model.parameters(), *guide.parameters()]
    tables, estimators = mm.objectives, mm.estimators
    for objective in (
        tables.elbo(),
        tables.vaevae(estimators.DReG(3)),
        tables.mvae(1, estimators.IWAE(3, resample=True)),
        tables.mmjsd(None),
        tables.telbo(estimators.StickTheLanding()),
    ):
        loss = objective.differentiable_loss(model, guide, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)
    changed = batch.replaced({"image": torch.where(batch.present["image"][:, None, None], batch["image"], 0.5)})
    torch.manual_seed(0)
    one = tables.elbo().loss(model, guide, batch)
    torch.manual_seed(0)
    assert tables.elbo().loss(model, guide, changed) == one, "values of missing images count for nothing"


def test_a_traced_step_is_the_plain_one():
    model, guide = pair()
    with override_validation(True):
        agree(mm.objectives.elbo(mm.estimators.IWAE(2)), model, guide, [data(), data()])


def test_autocast_leaves_the_density_its_precision():
    model, _ = pair()
    z, x = torch.randn(5, 2), torch.rand(5, 4, 4)
    d = model.decoders["image"](z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(d.log_prob(x), model.decoders["image"].distribution(d.transforms[0].context).log_prob(x))
    torch.testing.assert_close(d.log_prob(x.double()), d.log_prob(x))


def test_evidence_of_images_is_that_by_quadrature(double):
    torch.manual_seed(0)
    model, guide = pair()
    with torch.no_grad():
        for p in model.decoders["image"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = data(4)
    axis = torch.linspace(-5.0, 5.0, 51)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = model.prior(batch).log_prob(z)[:, None]
        for name in ("image", "label"):
            log_p = model.decoders[name](z[:, None]).log_prob(batch[name])
            log_joint = log_joint + torch.where(batch.present[name], log_p, 0.0)
        exact = torch.where(batch.rows, log_joint.logsumexp(0) + 2 * (axis[1] - axis[0]).log(), 0.0)
    scheme = mm.Proposal("quasi", prior_share=0.5)
    evidence = mm.log_marginal(model, guide, batch, num_particles=2000, proposal=scheme, seed=0)
    # four rows, five stated errors, and 2e-3 for the grid; the seed is fixed
    assert ((evidence.log_prob - exact).abs() < 5 * evidence.standard_error + 2e-3).all()
    assert "image has a density: of dequantised levels, less log(levels) per dimension" in repr(evidence)
    annealed = mm.annealed_importance(model, guide, batch, num_chains=8, temperatures=8, seed=0, pilot_chains=4)
    assert ((annealed.log_prob - exact).abs() < 5 * annealed.standard_error + 0.1).all()


def test_levels_without_noise_are_refused():
    model, guide = pair()
    grey = mm.Batch({"image": torch.randint(0, 4, (6, 4, 4)) / 3, "label": torch.arange(6) % 3})
    with pytest.raises(
        ValueError, match=r"lie on no grid of levels, and 6 of 6 rows .*dequantize\(batch, name, levels"
    ):
        mm.fit(model, guide, mm.objectives.elbo(), grey, epochs=1, progress=False)
    beyond = mm.Batch({"image": 3 * torch.rand(6, 4, 4), "label": torch.arange(6) % 3})
    with pytest.raises(ValueError, match=r"real numbers from -0\.0102041 to 1\.0102 .*Transform the values"):
        mm.log_marginal(model, guide, beyond, num_particles=2)
    assert mm.generate(model, guide, data(), num_samples=2)["image"].shape == (2, 12, 4, 4)
    with pytest.raises(ValueError, match="'image': ImageFlowDistribution has no mean that is known: take draws"):
        mm.generate(model, guide, data(), mean=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((28, 28), 3, {"scales": 3}), "an image of 28 x 28 cannot be halved 3 times: take fewer scales"),
        (((28,), 3, {}), r"expected an image shape \(H, W\) or \(C, H, W\), got \(28,\)"),
        (((4, 4), 3, {"bounds": (1.0, 0.0)}), "the second of bounds > 1.0, got 0"),
        (((4, 4), 3, {"margin": 0.5}), "margin .* < 0.5, got 0.5"),
    ],
)
def test_a_flow_that_cannot_be_made_is_refused(arguments, message):
    shape, context, options = arguments
    with pytest.raises(ValueError, match=message):
        ImageFlow(nn.Linear(2, 3), shape, context, **options)


def test_a_context_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected a context of shape \(.., 4\) from the network, got \(5, 3\)"):
        ImageFlow(nn.Linear(2, 3), (4, 4), 4)(torch.zeros(5, 2))
