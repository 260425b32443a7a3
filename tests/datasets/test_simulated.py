"""Simulated data: what their docstrings promise of loadings, mixtures and masks."""

import numpy as np
import pytest
import torch

from pyro_mm.datasets.simulated import SLOPE, clustered, dimensions, missing, orthonormal_loadings
from pyro_mm.models import LinearGaussian


def test_loadings_are_orthonormal_and_private_ones_apart():
    dims = {"a": 12, "b": 15, "c": 9}
    loadings = orthonormal_loadings(dims, 3, 2, seed=1)
    assert {name: w.shape for name, w in loadings.items()} == {name: (size, 9) for name, size in dims.items()}
    for m, w in enumerate(loadings.values()):
        own = [0, 1, 2, 3 + 2 * m, 4 + 2 * m]
        torch.testing.assert_close(w[:, own].T @ w[:, own], torch.eye(5), atol=1e-6, rtol=0)
        assert (w[:, [d for d in range(9) if d not in own]] == 0).all()
    assert not torch.equal(loadings["a"], orthonormal_loadings(dims, 3, 2, seed=2)["a"])


def test_posteriors_under_such_loadings_are_diagonal_given_any_modalities():
    story = LinearGaussian(orthonormal_loadings({"a": 12, "b": 15}, 3, 2), 1.0)
    rows = story.sample(2)
    for names in (("a",), ("b",), ("a", "b")):
        covariance = story.posterior(rows.only(*names)).covariance_matrix
        off = covariance - torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 1e-6
    with pytest.raises(ValueError, match="'b' has 4 dimensions, too few for 5"):
        orthonormal_loadings({"a": 12, "b": 4}, 3, 2)


def test_a_mixture_without_noise_is_inverted_to_its_latents():
    """B^T x = lrelu(A z), and A^T A = I, be A square or tall."""
    sources = clustered(50, 3, {"square": 3, "tall": 7}, noise=0.0, label="u", seed=2)
    for name in ("square", "tall"):
        mixing = sources.mixing[name]
        y = sources.batch[name].double() @ mixing.outer
        inverse = torch.where(y > 0, y, y / SLOPE) @ mixing.inner
        torch.testing.assert_close(inverse.float(), sources.latents, atol=1e-4, rtol=1e-4)


def test_clusters_are_equally_frequent_and_have_their_moments():
    """Means of 2,000 draws: six standard errors; standard deviations: six of theirs, s / sqrt(2 n)."""
    sources = clustered(10_000, 2, {"x": 2}, noise=0.1, label="u", seed=3)
    u = sources.batch["u"]
    assert u.bincount().tolist() == [2000] * 5
    for c in range(5):
        z, s = sources.latents[u == c].double(), sources.scales[c]
        assert ((z.mean(0) - sources.centres[c]).abs() < 6 * s / 2000**0.5).all()
        assert ((z.std(0) - s).abs() < 6 * s / 4000**0.5).all()
    residual = sources.batch["x"] - sources.mixing["x"](sources.latents)
    assert abs(residual.std().item() - 0.1) < 6 * 0.1 / (2 * 20_000) ** 0.5


def test_train_and_test_are_other_rows_of_the_same_story():
    options = {"rows": 20, "latent": 2, "dims": {"x": 3}, "noise": 0.1, "seed": 4}
    train, again, test, other = (clustered(**options | more) for more in ({}, {}, {"part": 1}, {"seed": 5}))
    assert torch.equal(train.batch["x"], again.batch["x"]) and not torch.equal(train.batch["x"], test.batch["x"])
    assert torch.equal(train.centres, test.centres) and not torch.equal(train.centres, other.centres)
    assert torch.equal(train.mixing["x"].outer, test.mixing["x"].outer)
    assert "label" in train.batch.covariates and train.batch.names == ("x",)
    with pytest.raises(ValueError, match="'x' has 3 dimensions, and cannot be an injective mixture of 4"):
        clustered(**options | {"latent": 4})


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.75])
def test_a_share_of_all_is_missing_and_no_row_is_empty(rate):
    """Of 4 x 10,000 entries, whose number kept in a row has a variance below 1: six standard errors."""
    batch = clustered(10_000, 2, {name: 3 for name in "abcd"}, noise=0.1).batch
    some = missing(batch, rate, seed=6)
    kept = torch.stack([some.present[name] for name in some]).float()
    assert kept.sum(0).min() >= 1
    assert abs(1 - kept.mean().item() - rate) < 6 / (4 * 10_000**0.5)
    assert np.ptp(kept.mean(1).numpy()) < 6 * 2**0.5 * 0.5 / 10_000**0.5  # no modality more than another
    if rate == 0.75:
        assert (kept.sum(0) == 1).all()
    with pytest.raises(ValueError, match=r"from 0 to 0.75, since a row keeps one of 4; got 0.8"):
        missing(batch, 0.8)


def test_dimensions_of_simulated_data_lie_in_their_range():
    dims = dimensions([f"x{i}" for i in range(200)], 30, 60, seed=7)
    assert min(dims.values()) >= 30 and max(dims.values()) < 60 and len(set(dims.values())) > 20
