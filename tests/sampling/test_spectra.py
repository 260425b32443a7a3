"""Functions of eigenvalues by matrix products against those by eigenvectors."""

import pytest
import torch

from pyro_mm.sampling.spectra import clamp_eigenvalues, clamp_singular_values, widen_singular_values

SIZES = (1, 3, 40)


def symmetric(values):
    """Return a matrix with these eigenvalues and random eigenvectors."""
    axes = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    return (axes * values) @ axes.mT


@pytest.mark.parametrize("size", SIZES)
def test_eigenvalues_are_clamped(size):
    values = torch.cat([torch.tensor([-3.0]), torch.logspace(-3, 4, 6), torch.full((size,), 0.25)])[
        -size - 3 :
    ].double()
    matrix = torch.stack([symmetric(values) for _ in range(4)])
    ways = [clamp_eigenvalues(matrix, 0.25, 100.0, by_products=chosen) for chosen in (False, True)]
    exact = values.clamp(0.25, 100.0).sort().values
    for found in ways:
        torch.testing.assert_close(torch.linalg.eigvalsh(found), exact.expand(4, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(*ways, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_singular_values_are_clamped_and_widened(size, dtype):
    deviations = torch.linspace(0.02, 1.6, size, dtype=torch.float64)
    root = torch.stack([symmetric(deviations) @ symmetric(torch.ones(size)) for _ in range(3)]).to(dtype)

    def covariance(change, *numbers, by_products):
        found = change(root, *numbers, by_products=by_products)
        assert found.dtype == dtype
        return found @ found.mT

    for change, numbers in ((clamp_singular_values, (0.1, 1.1)), (widen_singular_values, (0.3,))):
        ways = [covariance(change, *numbers, by_products=chosen) for chosen in (False, True)]
        torch.testing.assert_close(*ways, rtol=0, atol=1e-5)
    wide = covariance(widen_singular_values, 0.3, by_products=True)
    s = deviations
    exact = (s * (1 + 0.3 * (1 - s**2).clamp(min=0))).square().sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(wide.double()), exact.expand(3, -1), rtol=0, atol=1e-5)


def test_a_matrix_without_a_root_gives_nan():
    root = torch.full((2, 3, 3), torch.nan)
    assert clamp_singular_values(root, 0.1, 1.0, by_products=True).isnan().all()
