"""Kernel distance and PRDC against double loops, closed forms and balls by hand; errors and p-values by repetition."""

import itertools
import math

import pytest
import scipy.stats
import torch

from pyro_mm import distributions, metrics
from pyro_mm.metrics import kernel_distances, row_splits

F64 = {"dtype": torch.float64}
KERNELS = {
    "polynomial": lambda a, b: (a @ b / len(a) + 1) ** 3,
    "gaussian": lambda a, b: math.exp(-(a - b).square().sum() / (2 * 1.5**2)),
    "imq": lambda a, b: 1.5**2 / (1.5**2 + (a - b).square().sum()),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def by_loops(x, y, k, paired=False):
    """The estimate as it is written down."""
    n, m = len(x), len(y)
    within = [
        sum(float(k(a[i], a[j])) for i, j in itertools.permutations(range(len(a)), 2)) / (len(a) * (len(a) - 1))
        for a in (x, y)
    ]
    pairs = [(i, j) for i in range(n) for j in range(m) if not (paired and i == j)]
    return sum(within) - 2 * sum(float(k(x[i], y[j])) for i, j in pairs) / len(pairs)


# -- kernel distance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_distance_and_its_error_are_those_of_double_loops(kernel, paired):
    x, y = torch.randn(7, 3, **F64), torch.randn(7 if paired else 5, 3, **F64) + 0.5
    k = KERNELS[kernel]
    bandwidth = None if kernel == "polynomial" else 1.5
    found = metrics.kernel_distance(x, y, kernel=kernel, bandwidth=bandwidth, paired=paired, permutations=9)
    assert found.value == pytest.approx(by_loops(x, y, k, paired), rel=1e-10)

    def without(rows, i):
        return torch.cat([rows[:i], rows[i + 1 :]])

    if paired:
        parts = [[by_loops(without(x, i), without(y, i), k, True) for i in range(7)]]
    else:
        parts = [[by_loops(without(x, i), y, k) for i in range(7)], [by_loops(x, without(y, j), k) for j in range(5)]]
    variance = sum((len(part) - 1) * torch.tensor(part, **F64).var(correction=0).item() for part in parts)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-8)


def test_the_distance_agrees_with_the_statistic_of_samples():
    x, y = torch.randn(40, 3, **F64), torch.rand(50, 3, **F64)
    for kernel, bandwidth in (("gaussian", None), ("imq", (0.5, 2.0))):
        found = metrics.kernel_distance(x, y, kernel=kernel, bandwidth=bandwidth, permutations=1)
        expected = distributions.squared_mmd(x, y, kernel=kernel, bandwidth=bandwidth)
        assert found.value == pytest.approx(expected.item(), rel=1e-9)
    own = metrics.kernel_distance(x, y, kernel=lambda a, b: a @ b.mT, permutations=1)
    assert own.kernel == "user's kernel" and own.value == pytest.approx(by_loops(x, y, torch.dot), rel=1e-9)


def test_the_p_value_counts_every_relabelling_of_three_and_three_rows():
    """Of the 20 divisions of 6 rows two have the largest distance, so p tends to 0.1: 5 standard errors of 4000."""
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    found = metrics.kernel_distance(x[:3], x[3:], kernel="gaussian", bandwidth=3.0, permutations=4000, seed=1)
    assert abs(found.p_value - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 4000)
    within = metrics.kernel_distance(
        x[:3], x[3:], kernel="gaussian", bandwidth=3.0, permutations=4000, paired=True, seed=1
    )
    assert abs(within.p_value - 2 / 8) < 5 * math.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("paired", [False, True])
def test_p_values_are_uniform_under_equality_and_small_under_difference(paired):
    """400 p-values of pairs of small samples from one distribution, by a Kolmogorov-Smirnov test at a level of 1e-4.

    p takes the values 1/20, .., 1 with equal probability; a uniform number is subtracted to make it continuous. Pairs
    share half of their variance with their row: permutations over all rows would give p-values that are too large.
    """
    p = []
    for repetition in range(400):
        shared = torch.randn(12, 2) if paired else 0.0
        x, y = torch.randn(12, 2) + shared, torch.randn(12, 2) + shared
        p.append(metrics.kernel_distance(x, y, permutations=19, paired=paired, seed=repetition).p_value)
    continuous = torch.tensor(p) - torch.rand(400) / 20
    assert scipy.stats.kstest(continuous.numpy(), "uniform").pvalue > 1e-4
    other = metrics.kernel_distance(torch.randn(60, 2), torch.randn(60, 2) + 1.0, permutations=199)
    assert other.p_value == 1 / 200


def test_the_distance_is_unbiased_and_its_error_that_of_repetitions():
    """Of N(0, 1) and N(m, 1) with the kernel x y + 1 the distance is m²; the mean of 300 within 4 standard errors.

    The spread of 300 estimates has a relative error of 4 per cent; the jackknife's is 0.95 to 1.15 of it here.
    """
    found = [
        metrics.kernel_distance(torch.randn(40, 1), torch.randn(30, 1) + 0.8, kernel=_linear, permutations=1)
        for _ in range(300)
    ]
    values = torch.tensor([each.value for each in found])
    assert abs(values.mean() - 0.64) < 4 * values.std() / math.sqrt(300)
    error = torch.tensor([each.standard_error for each in found]).square().mean().sqrt()
    assert 0.85 < error / values.std() < 1.25


def _linear(a, b):
    return a @ b.mT + 1


def test_a_seed_repeats_the_permutations_and_leaves_the_generator():
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    before = torch.get_rng_state()
    first, second, third = (metrics.kernel_distance(x, y, permutations=99, seed=s).p_value for s in (0, 0, 1))
    assert first == second != third and torch.equal(before, torch.get_rng_state())
    assert metrics.kernel_distance(x, y, permutations=1).p_value in (0.5, 1.0)
    assert not torch.equal(before, torch.get_rng_state())


# -- precision, recall, density, coverage -----------------------------------------------------------------------------


def test_the_four_measures_by_hand():
    """Real 0, 1, 3, 7 with k = 1: radii 1, 1, 2, 4. Fake 0.5, 2, 30, 31: radii 1.5, 1.5, 1, 1.

    0.5 is in the balls of 0 and 1; 2 in those of 3 alone, as 1 is at the distance of its radius; the others in none.
    """
    x, y = torch.tensor([0.0, 1.0, 3.0, 7.0]), torch.tensor([0.5, 2.0, 30.0, 31.0])
    found = metrics.precision_recall(x, y, neighbours=1, seed=0)
    assert (found.precision, found.recall, found.density, found.coverage) == (0.5, 0.75, 0.75, 0.75)


@pytest.mark.parametrize("k", [1, 3])
def test_the_four_measures_are_those_of_loops(k):
    x, y = torch.randn(30, 2, **F64), 1.3 * torch.randn(25, 2, **F64)
    distance = lambda a, b: (a - b).norm().item()  # noqa: E731
    radius = lambda rows: [  # noqa: E731
        sorted(distance(a, b) for j, b in enumerate(rows) if j != i)[k - 1] for i, a in enumerate(rows)
    ]
    of_real, of_fake = radius(x), radius(y)
    in_real = [[distance(a, b) < r for b in y] for a, r in zip(x, of_real, strict=True)]
    in_fake = [[distance(a, b) < r for b, r in zip(y, of_fake, strict=True)] for a in x]
    found = metrics.precision_recall(x, y, neighbours=k, seed=0)
    assert found.precision == pytest.approx(sum(map(any, zip(*in_real, strict=True))) / 25)
    assert found.recall == pytest.approx(sum(map(any, in_fake)) / 30)
    assert found.density == pytest.approx(sum(map(sum, in_real)) / (25 * k))
    assert found.coverage == pytest.approx(sum(map(any, in_real)) / 30)


def test_equal_distributions_have_density_one_and_the_coverage_of_the_formula_and_errors_are_those_of_repetitions():
    """Means of 200 repetitions within 4 standard errors. Errors are 0.8 to 2.2 of the spread: never too small."""
    n, m, k = 60, 80, 3
    found = [metrics.precision_recall(torch.randn(n, 3), torch.randn(m, 3), neighbours=k) for _ in range(200)]
    expected = {"density": 1.0, "coverage": 1 - math.comb(m + n - 1 - k, m) / math.comb(m + n - 1, m)}
    for name, value in expected.items():
        values = torch.tensor([getattr(each, name) for each in found])
        assert abs(values.mean() - value) < 4 * values.std() / math.sqrt(200), name
        error = torch.tensor([each.errors[name] for each in found]).square().mean().sqrt()
        assert 0.8 < error / values.std() < 2.2, name


def test_measures_tell_poor_samples_from_samples_of_one_kind():
    real = torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 20])
    one_kind = metrics.precision_recall(real, torch.randn(200, 2), seed=0)
    assert one_kind.precision > 0.9 and one_kind.recall < 0.55 and one_kind.coverage < 0.55
    poor = metrics.precision_recall(real, real + 8 * torch.randn(200, 2), seed=0)
    assert poor.precision < 0.4 and poor.density < 0.4


def test_relabelled_rows_have_the_values_of_equal_distributions():
    """Exact for a measure that is the difference of two means: every relabelling of pairs has a sign for each."""
    x = torch.arange(6.0)
    counted = lambda split: {"first": x[split[0]].sum().item(), "rows": float(len({*split[0].tolist()}))}  # noqa: E731
    found = row_splits.values_under_equality(counted, 3, 3, True, 400)
    assert found["rows"] == 3.0 and abs(found["first"] - 7.5) < 5 * math.sqrt(3 * 1.5**2 / 400)
    halves = row_splits.half_sample_errors(lambda split: {"mean": x[split[0]].mean().item()}, 6, 6, True, 4000)
    exact = torch.tensor([x[list(rows)].mean() for rows in itertools.combinations(range(6), 3)]).std(correction=0)
    assert halves["mean"] == pytest.approx(exact.item(), rel=0.05)  # 4 standard errors of a spread of 4000 draws


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "few rows": ({"fake": torch.zeros(2, 3)}, "fake data of 3 at least, got 2 rows"),
    "NaN": ({"real": torch.full((9, 3), torch.nan)}, "features of real data that are not finite, in 9 of 9 rows"),
    "fewer features": ({"fake": torch.zeros(9, 2)}, r"fake data: expected the same number of features .* \[2, 3\]"),
    "one number each": ({"features": lambda x: x[:, 0]}, r"expected features of shape \(9, D\), got \(9,\)"),
    "one for all": ({"features": lambda x: x.mean(0, keepdim=True)}, r"features of shape \(9, D\), got \(1, 3\)"),
    "an odd pair": ({"paired": True, "fake": torch.zeros(8, 3)}, "as many fake as real rows, .* got 8 and 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_two_samples_that_cannot_be_compared_are_refused(case):
    change, message = REFUSED[case]
    right = {"real": torch.randn(9, 3), "fake": torch.randn(9, 3)}
    with pytest.raises(ValueError, match=message):
        metrics.kernel_distance(**(right | change))
    with pytest.raises(ValueError, match=message.replace("of 3 at least", "of 8 at least")):
        metrics.precision_recall(**(right | change), neighbours=3)


def test_what_kernels_and_numbers_of_rows_need_is_said(monkeypatch):
    x = torch.randn(9, 3)
    with pytest.raises(ValueError, match="bandwidth: only the kernels 'gaussian' and 'imq' have one"):
        metrics.kernel_distance(x, x, bandwidth=1.0)
    with pytest.raises(TypeError, match=r"expected features to return a tensor \(9, D\), got the tuple|got an object"):
        metrics.kernel_distance(x, x, lambda x: (x, x))
    monkeypatch.setattr(kernel_distances, "MOST_ROWS", 8)
    with pytest.raises(ValueError, match="real data of 8 at most, since matrices of all pairs are in memory, got 9"):
        metrics.kernel_distance(x, x)
