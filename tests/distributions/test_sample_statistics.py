"""Statistics of samples against closed forms, formulas by hand, SciPy, and finite differences."""

import itertools
import math

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.autograd import gradcheck

from pyro_mm.distributions import hsic, sliced_wasserstein, squared_mmd
from pyro_mm.distributions.sample_statistics import gram_matrix

KERNELS = {
    "gaussian": {"bandwidth": 0.7},
    "several": {"bandwidth": (0.5, 2.0)},
    "imq": {"kernel": "imq", "bandwidth": 0.7},
    "own": {"kernel": lambda x, y: (x @ y.mT + 1) ** 2},
}


def exact_mmd(loc, scale, other_loc, other_scale, h):
    """MMD² of two diagonal Gaussians under a Gaussian kernel."""

    def mean(a, s, b, t):
        variance = h**2 + s**2 + t**2
        return (h / variance.sqrt() * (-((a - b) ** 2) / (2 * variance)).exp()).prod()

    own, other = (loc, scale), (other_loc, other_scale)
    return mean(*own, *own) + mean(*other, *other) - 2 * mean(*own, *other)


def assert_mean(values, expected, errors=3.0):
    """The mean of independent estimates lies within three standard errors, which 0.3 % of the seeds miss."""
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - expected) < errors * error


@pytest.mark.parametrize("h", [0.5, 2.0, (0.5, 2.0)])
def test_mmd_of_gaussians_has_the_mean_of_its_closed_form(double, h):
    loc, scale = torch.tensor([0.3, -0.5]), torch.tensor([0.8, 1.2])
    other_loc, other_scale = torch.tensor([0.0, 0.2]), torch.tensor([1.0, 0.5])
    x = loc + scale * torch.randn(400, 40, 2)
    y = other_loc + other_scale * torch.randn(400, 30, 2)
    widths = h if isinstance(h, tuple) else (h,)
    exact = sum(exact_mmd(loc, scale, other_loc, other_scale, torch.tensor(w)) for w in widths) / len(widths)
    found = squared_mmd(x, y, bandwidth=h)
    assert found.shape == (400,)
    assert_mean(found, exact)
    assert exact > 10 * found.std() / 20  # which an estimate of zero would not pass

    biased = squared_mmd(x, y, bandwidth=h, unbiased=False)
    assert (biased >= 0).all() and (biased > found).all()


@pytest.mark.parametrize("options", [*KERNELS.values(), {}], ids=[*KERNELS, "median"])
def test_mmd_of_equal_distributions_is_zero_in_the_mean(double, options):
    x, y = torch.randn(2, 1000, 20, 3)
    found = squared_mmd(x, y, **options)
    assert_mean(found, 0.0)
    assert (found < 0).any()
    assert squared_mmd(x, y, unbiased=False, **options).mean() > 10 * found.std() / math.sqrt(1000)


def test_paired_samples_leave_out_the_pairs_of_a_row(double):
    """Rows of y that are those of x would otherwise pull the mean below zero."""
    x = torch.randn(500, 12, 2)
    y = 0.8 * x + 0.6 * torch.randn(500, 12, 2)
    assert_mean(squared_mmd(x, y, bandwidth=1.0, paired=True), 0.0)
    assert squared_mmd(x, y, bandwidth=1.0).mean() < -0.01
    torch.testing.assert_close(squared_mmd(x, x, bandwidth=1.0, paired=True), torch.zeros(500))
    assert (squared_mmd(x, x, bandwidth=1.0) < -0.01).all()


def test_the_v_statistic_is_its_formula(double):
    x, y = torch.randn(5, 2), torch.randn(4, 2)

    def mean(a, b):
        return sum(math.exp(-float((p - q).square().sum()) / (2 * 0.7**2)) for p in a for q in b) / (len(a) * len(b))

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert squared_mmd(x, y, bandwidth=0.7, unbiased=False).item() == pytest.approx(expected)


def test_kernels_are_their_formulas_and_the_median_is_that_of_the_distances(double):
    x = torch.randn(6, 2)
    r = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(gram_matrix(x, "gaussian", 0.7), (-r.square() / (2 * 0.49)).exp())
    torch.testing.assert_close(gram_matrix(x, "imq", 0.7), 1 / (1 + r.square() / 0.49))
    median = r[~torch.eye(6, dtype=torch.bool)].median()
    torch.testing.assert_close(gram_matrix(x, "gaussian", None), (-r.square() / (2 * median**2)).exp())
    count = torch.tensor([True, True, False, True, True, False])
    r = r[count][:, count]
    median = r[~torch.eye(4, dtype=torch.bool)].median()
    found = gram_matrix(x, "imq", None, count)[count][:, count]
    torch.testing.assert_close(found, 1 / (1 + r.square() / median**2))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)
def test_gradients_are_those_of_finite_differences(double, options, unbiased):
    x, y = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    mask = torch.tensor([True] * 5 + [False])
    for statistic in (squared_mmd, hsic):
        assert gradcheck(lambda a, b, f=statistic: f(a, b, unbiased=unbiased, mask=mask, **options), (x, y))
        assert torch.autograd.grad(statistic(x, y, unbiased=unbiased, **options), x)[0].abs().max() > 1e-4


def test_the_median_is_held_constant_in_the_gradient(double):
    x, y = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2)
    pooled = torch.cat([x, y]).detach()
    median = torch.cdist(pooled, pooled)[~torch.eye(12, dtype=torch.bool)].median().item()
    (found,) = torch.autograd.grad(squared_mmd(x, y), x)
    (expected,) = torch.autograd.grad(squared_mmd(x, y, bandwidth=median), x)
    torch.testing.assert_close(found, expected)


def test_hsic_is_its_formula_by_hand(double):
    x, y = torch.randn(7, 2), torch.randn(7, 3)
    k, l = (gram_matrix(z, "gaussian", 0.8) for z in (x, y))  # noqa: E741
    h = torch.eye(7) - 1 / 7
    torch.testing.assert_close(hsic(x, y, bandwidth=0.8, unbiased=False), (k @ h @ l @ h).trace() / 49)

    def of_four(i, j, q, r):
        return k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]

    each = torch.stack([of_four(*index) for index in itertools.permutations(range(7), 4)])
    torch.testing.assert_close(hsic(x, y, bandwidth=0.8), each.mean())


def test_hsic_of_independent_variables_is_zero_in_the_mean(double):
    x, y = torch.randn(1000, 12, 2), torch.randn(1000, 12, 1)
    for options in ({"bandwidth": 1.0}, {}, {"kernel": "imq"}):
        assert_mean(hsic(x, y, **options), 0.0)
    assert hsic(x, x[..., :1] + y).mean() > 0.01


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_sliced_wasserstein_distance_in_one_dimension_is_that_of_scipy(double, p):
    x, y = torch.randn(40, 1), 0.5 * torch.randn(40, 1) + 1
    found = sliced_wasserstein(x, y, p=p)
    by_quantiles = (x.sort(0).values - y.sort(0).values).abs().pow(p).mean()
    torch.testing.assert_close(found, by_quantiles)
    if p == 1:
        assert found.item() == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]))


def test_the_sliced_wasserstein_distance_of_a_shift_is_that_of_its_projections(double):
    x, shift = torch.randn(30, 3), torch.tensor([2.0, 0.0, 1.0])
    found = sliced_wasserstein(x, x + shift, projections=4000)
    # the mean of (theta' shift)^2 over the sphere, whose entries have variance 1 / 3
    assert found.item() == pytest.approx(float(shift.square().sum()) / 3, rel=0.05)
    y = x + shift
    x.requires_grad_()

    def statistic(a):
        torch.manual_seed(3)
        return sliced_wasserstein(a, y, projections=3, mask=torch.arange(30) < 25)

    assert gradcheck(statistic, (x,))


STATISTICS = {
    "mmd": lambda x, y, mask: squared_mmd(x, y, mask=mask),
    "biased mmd": lambda x, y, mask: squared_mmd(x, y, kernel="imq", unbiased=False, mask=mask),
    "paired mmd": lambda x, y, mask: squared_mmd(x, y, paired=True, mask=mask),
    "hsic": lambda x, y, mask: hsic(x, y, mask=mask),
    "biased hsic": lambda x, y, mask: hsic(x, y, unbiased=False, mask=mask),
    "sliced": lambda x, y, mask: sliced_wasserstein(x[..., :1], y[..., :1], mask=mask),
}


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_masking_equals_deleting(double, statistic):
    x, y = torch.randn(2, 3, 9, 2)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 0], [1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    bad = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    found = statistic(bad, torch.where(mask[..., None], y, torch.inf), mask)
    for row in range(3):
        torch.testing.assert_close(found[row], statistic(x[row][mask[row]], y[row][mask[row]], None))
    found.sum().backward()
    assert bad.grad.isfinite().all() and (bad.grad[~mask] == 0).all() and bad.grad.abs().max() > 1e-3


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_that_count_give_zero_and_no_gradient(statistic, rows):
    x = torch.randn(5, 2, requires_grad=True)
    found = statistic(x, x.detach(), torch.arange(5) < rows)
    (gradient,) = torch.autograd.grad(found, x)
    assert found == 0 and (gradient == 0).all()


def test_rows_that_are_all_alike_are_finite():
    x = torch.ones(5, 2, requires_grad=True)
    for statistic in STATISTICS.values():
        (gradient,) = torch.autograd.grad(statistic(x, torch.ones(5, 2), None), x, allow_unused=True)
        assert gradient is None or gradient.isfinite().all()


def test_statistics_keep_their_digits_far_from_the_origin_and_under_autocast():
    x, y = torch.randn(50, 2), torch.randn(50, 2)
    near = squared_mmd(x.double(), y.double(), bandwidth=1.0).item()
    assert squared_mmd(x + 1000, y + 1000, bandwidth=1.0).item() == pytest.approx(near, abs=2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert squared_mmd(x, y, bandwidth=1.0).item() == pytest.approx(near, abs=1e-5)


X = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squared_mmd(X, torch.zeros(4, 3)), "one dimension, got 2 and 3"),
        (lambda: squared_mmd(X, torch.zeros(5, 2), paired=True), "one size, whose rows go together, got 4 and 5"),
        (lambda: squared_mmd(torch.zeros(4), X), r"expected x of shape \(.., N, D\), got \(4,\)"),
        (lambda: squared_mmd(X, X, kernel="rbf"), "expected kernel to be one of 'gaussian', 'imq'"),
        (lambda: squared_mmd(X, X, kernel=lambda x, y: x), r"expected the kernel to return a tensor of shape \(8, 8\)"),
        (lambda: squared_mmd(X, X, bandwidth=0.0), "expected bandwidth > 0"),
        (lambda: squared_mmd(X, X, bandwidth=()), "expected one bandwidth at least"),
        (lambda: squared_mmd(X, X, mask=torch.ones(4)), "expected mask to be boolean"),
        (lambda: squared_mmd(X, X, mask=torch.ones(3).bool()), "expected a mask of 4 rows"),
        (lambda: hsic(X, torch.zeros(5, 2)), "rows of both variables, got 4 of one and 5"),
        (lambda: sliced_wasserstein(X, torch.zeros(5, 2)), "one size, got 4 and 5 rows"),
        (lambda: sliced_wasserstein(X, X, projections=0), "expected projections >= 1"),
        (lambda: sliced_wasserstein(X, X, p=0.5), "expected p >= 1"),
        (lambda: squared_mmd(X, [1.0]), "expected y to be a tensor"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_words(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
