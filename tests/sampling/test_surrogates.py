"""Private latents of missing modalities, drawn from a surrogate of the guide or from the prior."""

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.recipes import mfm, mfm_variational

FAR = 100.0  # where the surrogate is, and no draw of the prior
PRESENT = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, True, False])}


class FarAway(torch.nn.Module):
    def forward(self, batch):
        return dist.Normal(torch.full((batch.size, 2), FAR), 1.0).to_event(1)


def pair(surrogate):
    """A story in which b has a private latent, and a guide that infers it from a, far from its prior."""
    torch.manual_seed(0)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    far = mm.posteriors.Given(("a",), FarAway(), normal)
    encoders = {name: mm.conditionals.Normal(mm.nn.MLP(3, 4, (8,))) for name in "ab"}
    sizes = {"a": 2, "b": 4}
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(size, 3, ()), scale=1.0) for n, size in sizes.items()}
    model = mm.models.PrivateLatents(normal, {"b": normal}, decoders)
    own = mm.conditionals.Normal(mm.nn.MLP(3, 4, (8,)))
    private = mm.posteriors.Private("b", own, far, surrogate=surrogate)
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(encoders), w_b=private)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("surrogate", [True, False])
def test_a_missing_modality_has_the_latent_of_its_surrogate_if_anything_is_present(surrogate, vectorize):
    model, guide = pair(surrogate)
    rows = mm.Batch({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, PRESENT)
    options = {"num_samples": 3, "seed": 0, "vectorize": vectorize}
    w = mm.posterior_draws(model, guide, rows, **options)["w_b"]
    is_far = (w > FAR / 2).all(-1).all(0)
    assert is_far.tolist() == [False, surrogate, False, False]  # the last row has nothing to infer it from
    samples = mm.generate(model, guide, rows, mean=True, **options)
    moved = (samples["b"].abs() > 10).any(-1).any(0)
    assert moved.tolist() == [False, surrogate, False, False]


def test_draws_by_weight_are_of_the_posterior_and_leave_surrogates_aside():
    model, guide = pair(True)
    rows = mm.Batch({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, PRESENT)
    w = mm.posterior_draws(model, guide, rows, 3, resample=True, num_particles=20, seed=0)["w_b"]
    assert (w.abs() < FAR / 2).all()


def test_mfm_decodes_the_surrogates_of_a_missing_modality_and_its_twin_draws_of_the_prior():
    torch.manual_seed(0)
    rows = mm.Batch({"a": torch.randn(6, 4), "b": torch.randn(6, 3), "label": torch.arange(6) % 2})
    given = rows.only("a")
    model, guide, _ = mfm(rows, latent=3, hidden=(8,), private=2)
    draws = mm.posterior_draws(model, guide, given, 2, seed=0)
    inferred = mm.encode(guide, given)["w_b"].mean
    assert torch.equal(draws["w_b"], inferred.expand(2, 6, 2))
    decoded = model.decode(model.factors(draws))["b"].mean
    torch.testing.assert_close(mm.generate(model, guide, given, 2, mean=True, seed=0)["b"], decoded)

    twin = mfm_variational(rows, latent=3, hidden=(8,), private=2)
    w = mm.posterior_draws(twin.model, twin.guide, given, 2000, seed=0)["w_b"]
    # 24,000 standard Normal draws: four standard errors of mean and variance
    assert abs(w.mean()) < 4 / 24_000**0.5 and abs(w.var() - 1) < 4 * (2 / 24_000) ** 0.5
