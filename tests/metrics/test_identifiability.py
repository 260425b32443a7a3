"""Mean correlation coefficients: what they do not see, what they see, and a library's canonical correlations."""

from itertools import permutations

import numpy as np
import pytest
import torch

from pyro_mm.metrics import mean_correlation

N, D = 600, 4


@pytest.fixture
def latents():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise(seed):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_permutation_and_a_rescaling_are_no_difference(latents):
    found = 3 - torch.tensor([2.0, -0.1, 5.0, -7.0]) * latents[:, [2, 0, 3, 1]]
    assert mean_correlation(latents, found) == pytest.approx((1, 1, 1, 1), abs=1e-12)


def test_an_affine_map_is_one_to_the_weak_kind_alone(latents):
    """Under a rotation whose entries are all 1/2 or -1/2, every correlation of white entries is about 1/2."""
    half = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    result = mean_correlation(latents, latents @ torch.kron(half, half) + 5)
    assert result[2:] == pytest.approx((1, 1), abs=1e-10)
    assert result[:2] == pytest.approx((0.5, 0.5), abs=0.1)


def test_increasing_functions_are_no_difference_to_ranks(latents):
    found = latents[:, [1, 0, 3, 2]] ** 3
    assert mean_correlation(latents, found, kind="spearman")[:2] == pytest.approx((1, 1), abs=1e-12)
    assert mean_correlation(latents, found)[0] < 0.95


def test_any_function_is_no_difference_to_the_dependence_coefficient(latents):
    """Even functions have no correlation, of ranks neither. What is independent has 2 (20 / 300)^(1/2) at the most."""
    found = torch.stack([latents[:, 1].square(), (3 * latents[:, 0]).cos(), latents[:, 3].abs(), latents[:, 2]], 1)
    assert mean_correlation(latents, found, kind="rdc")[:2] == pytest.approx((1, 1), abs=0.02)
    assert mean_correlation(latents, found, kind="spearman")[1] < 0.5
    assert mean_correlation(latents, noise(5), kind="rdc")[1] < 0.5
    still = torch.cat([found[:, :3], torch.zeros(N, 1)], 1)
    assert mean_correlation(latents, still, kind="rdc")[0] == pytest.approx(0.75, abs=0.02)


def test_the_assignment_is_the_best_and_that_of_the_fitted_rows(latents):
    """By brute force over permutations; out of sample the permutation of the fitted rows is kept."""
    found = latents[:, [1, 2, 3, 0]] + noise(2)
    halves = [np.abs(np.corrcoef(latents[r].T, found[r].T))[:D, D:] for r in (slice(0, 300), slice(300, N))]
    best = max(permutations(range(D)), key=lambda p: sum(halves[0][i, p[i]] for i in range(D)))
    expected = [np.mean([half[i, best[i]] for i in range(D)]) for half in halves]
    assert mean_correlation(latents, found)[:2] == pytest.approx(expected, abs=1e-12)


def test_the_weak_kind_is_the_mean_canonical_correlation(latents):
    """Against scikit-learn's, which iterates; and in sample it is at least the strong one."""
    from sklearn.cross_decomposition import CCA

    found = latents @ noise(3)[:D] + 2 * noise(4)
    cca = CCA(D, max_iter=10_000, tol=1e-12).fit(latents[:300].numpy(), found[:300].numpy())
    for rows, ours in ((slice(0, 300), 2), (slice(300, N), 3)):
        x, y = cca.transform(latents[rows].numpy(), found[rows].numpy())
        expected = np.mean([abs(np.corrcoef(x[:, i], y[:, i])[0, 1]) for i in range(D)])
        assert mean_correlation(latents, found)[ours] == pytest.approx(expected, abs=1e-4)
    result = mean_correlation(latents, found)
    assert result.weak_in >= result.strong_in


def test_independent_latents_do_not_correlate(latents):
    """In sample the best of noise is taken; out of sample each of D coefficients has mean |N(0, 1)| / sqrt(300), 0.046,
    and their mean a standard deviation of 0.017: the bound is six of them above."""
    assert mean_correlation(latents, noise(5)).strong_out < 0.15


def test_an_entry_that_does_not_vary_counts_zero(latents):
    found = latents.clone()
    found[:, 0] = 1.0
    assert mean_correlation(latents, found).strong_in == pytest.approx((D - 1) / D, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["pearson", "spearman", "rdc"])
def test_an_entry_that_varies_by_rounding_alone_counts_zero(kind, dtype):
    """Of three latents two are found, and the third entry is constant, nearly so, or a function of those: 2/3."""
    for seed in range(4):
        z = torch.randn(400, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        noise = torch.rand(400, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        for third in (torch.full((400,), 0.1), 5 + 4 * torch.finfo(dtype).eps * noise, z[:, 0] * 0.5 + z[:, 2] * 0.25):
            found = torch.stack([z[:, 0], third.to(dtype), z[:, 2]], 1)
            result = mean_correlation(z, found, kind=kind)
            assert result[2:] == pytest.approx((2 / 3, 2 / 3), abs=1e-3)


def test_an_entry_of_any_scale_counts_as_varying(latents):
    found = latents * torch.tensor([1e8, 1.0, 1e-6, 1e-12], dtype=torch.float64)
    assert mean_correlation(latents, found) == pytest.approx((1, 1, 1, 1), abs=1e-9)
    assert mean_correlation(found, latents) == pytest.approx((1, 1, 1, 1), abs=1e-9)


def test_mean_correlation_refuses_unlike_shapes_and_too_few_rows(latents):
    with pytest.raises(ValueError, match=r"got \(600, 4\) and \(600, 3\)"):
        mean_correlation(latents, latents[:, :3])
    with pytest.raises(ValueError, match="more than 5 rows on either side, got 5 and 5"):
        mean_correlation(latents[:10], latents[:10])
