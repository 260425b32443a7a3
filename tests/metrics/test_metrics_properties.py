"""Metrics of any shapes and numbers of rows are those by SciPy or by loops, or an error says what is expected."""

import math

import numpy as np
import torch
from hypothesis import strategies as st
from scipy import optimize

import pyro_mm as mm
from tests.support.properties import assert_ours, for_all, generator, number, seeds

shapes = st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])


def samples(rng, size, shape, dtype, spread=3):
    x = torch.tensor(rng.integers(-spread, spread + 1, (size, *shape)) / (1 if dtype == torch.int64 else 2))
    return (x > 0 if dtype == torch.bool else x).to(dtype)


def flat(x):
    return x.reshape(len(x), -1).double().numpy()


@for_all(seed=seeds, shape=shapes, other=shapes, dtype=dtypes, real=st.integers(0, 9), fake=st.integers(0, 9))
def test_distances_of_samples(seed, shape, other, dtype, real, fake):
    """Of too few rows, or of several numbers of features, there is none."""
    rng = generator(seed)
    x, y = samples(rng, real, shape, dtype), samples(rng, fake, other, dtype)
    fits = math.prod(shape) == math.prod(other)
    for least, metric, expected in ((2, mm.metrics.frechet_distance, frechet), (3, polynomial, kernel_distance)):
        if fits and min(real, fake) >= least:
            assert np.isclose(metric(x, y), expected(flat(x), flat(y)), rtol=1e-5, atol=1e-6)
            continue
        try:
            metric(x, y)
        except Exception as error:
            few = [n for n in (real, fake) if n < least]
            assert_ours(error, "expected|not", "|".join(map(number, few or [math.prod(shape), math.prod(other)])))
        else:
            raise AssertionError(f"{real} and {fake} rows of {shape} and {other}")


def frechet(x, y):
    """Return the distance by the singular values of centred rows, which are exact for few rows too."""
    shift = x.mean(0) - y.mean(0)
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    return shift @ shift + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")


def polynomial(x, y):
    return mm.metrics.kernel_distance(x, y, permutations=3, seed=0).value


def kernel_distance(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


@for_all(seed=seeds, shape=shapes, real=st.integers(1, 9), fake=st.integers(1, 9), neighbours=st.integers(1, 3))
def test_precision_and_recall(seed, shape, real, fake, neighbours):
    rng = generator(seed)
    x, y = (torch.tensor(rng.normal(size=(n, *shape))) for n in (real, fake))
    least = 2 * neighbours + 2
    try:
        found = mm.metrics.precision_recall(x, y, neighbours=neighbours, seed=0)
    except Exception as error:
        assert min(real, fake) < least
        assert_ours(error, number(least), number(min(real, fake)) + "|" + number(real))
        return

    def radii(z):
        distances = [[np.linalg.norm(a - b) for j, b in enumerate(z) if i != j] for i, a in enumerate(z)]
        return [sorted(row)[neighbours - 1] for row in distances]

    x, y = flat(x), flat(y)
    inside = np.array([[np.linalg.norm(a - b) < r for b in y] for a, r in zip(x, radii(x), strict=True)])
    covered = np.array([[np.linalg.norm(a - b) < r for a in x] for b, r in zip(y, radii(y), strict=True)])
    expected = [inside.any(0).mean(), covered.any(0).mean(), inside.sum() / neighbours / len(y), inside.any(1).mean()]
    assert np.allclose([found.precision, found.recall, found.density, found.coverage], expected)
    assert all(math.isfinite(error) for error in found.errors.values())


@for_all(seed=seeds, lead=st.sampled_from([(), (1,), (3,), (2, 3)]), dtype=dtypes)
def test_boxes(seed, lead, dtype):
    rng = generator(seed)
    first, second = samples(rng, 1, (*lead, 4), dtype)[0], samples(rng, 1, (*lead, 4), dtype)[0]
    if dtype == torch.bool:
        try:
            mm.metrics.intersection_over_union(first, second)
        except Exception as error:
            return assert_ours(error, "first", "expected", "bool")
        raise AssertionError("no error")
    found = mm.metrics.intersection_over_union(first, second)
    assert found.shape == lead and bool(((found >= 0) & (found <= 1)).all())
    boxes = zip(first.reshape(-1, 4).tolist(), second.reshape(-1, 4).tolist(), found.reshape(-1), strict=True)
    for a, b, value in boxes:
        width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
        areas = [max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (a, b)]
        either = sum(areas) - width * height
        assert math.isclose(value, width * height / either if either else 0.0, rel_tol=1e-2, abs_tol=1e-6)


@for_all(seed=seeds, size=st.integers(1, 3), rows=st.integers(1, 14), kind=st.sampled_from(["pearson", "spearman"]))
def test_mean_correlations(seed, size, rows, kind):
    rng = generator(seed)
    z, z_hat = rng.normal(size=(rows, size)), rng.normal(size=(rows, size))
    half = rows // 2
    if min(half, rows - half) <= size + 1:
        try:
            mm.metrics.mean_correlation(torch.tensor(z), torch.tensor(z_hat), kind=kind)
        except Exception as error:
            return assert_ours(error, number(size + 1), number(half))
        raise AssertionError("no error")
    found = mm.metrics.mean_correlation(torch.tensor(z), torch.tensor(z_hat), kind=kind)
    a, b = z[:half], z_hat[:half]
    if kind == "spearman":
        a, b = (np.argsort(np.argsort(v, 0), 0) for v in (a, b))
    correlations = np.abs(np.corrcoef(a, b, rowvar=False)[:size, size:])
    pairs = optimize.linear_sum_assignment(-correlations)
    assert math.isclose(found.strong_in, correlations[pairs].mean(), rel_tol=1e-6)
    assert all(0 <= value <= 1 + 1e-9 for value in found)


@for_all(seed=seeds, rows=st.integers(1, 20), classes=st.integers(1, 4))
def test_confusions(seed, rows, classes):
    rng = generator(seed)
    true, predicted = rng.integers(0, classes, rows), rng.integers(0, classes, rows)
    found = mm.metrics.confusion_matrix(torch.tensor(true), torch.tensor(predicted), classes)
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (true, predicted), 1)
    assert np.array_equal(found, expected)
