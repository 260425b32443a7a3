"""Information of probes against a mutual information by quadrature, and boxes against pixels that are counted."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mm import Batch, metrics


def guide(batch):
    """z has the value of x for its mean."""
    with batch.plate():
        pyro.sample("z", dist.Normal(batch["x"], 1.0).to_event(1))


def two_classes(rows, distance, seed=0):
    """Class y is 1 with probability 0.3, and x is Normal(distance * y, 1), beside a number that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(rows, generator=generator) < 0.3).long()
    x = torch.randn(rows, 2, generator=generator)
    x[:, 0] += distance * y
    return Batch({"x": x}, covariates={"y": y})


def information_by_quadrature(distance):
    """I(y; x) in nats of the two classes."""
    x = torch.linspace(-12, 12 + distance, 20_001, dtype=torch.float64)
    shares = {0.0: 0.7, distance: 0.3}  # mean -> probability of its class
    densities = {mean: p * dist.Normal(mean, 1.0).log_prob(x).exp() for mean, p in shares.items()}
    log_total = sum(densities.values()).log()
    found = sum(d * (dist.Normal(mean, 1.0).log_prob(x) - log_total) for mean, d in densities.items())
    return torch.trapezoid(found, x).item()


@pytest.mark.parametrize("distance", [0.5, 2.0])
def test_the_information_is_the_mutual_information_where_the_probe_is_right(distance):
    """A logistic regression is the posterior of two Normals with one variance: 4.5 errors, under one seed, and 0.002
    nats for a fit to 20,000 rows."""
    train, test = two_classes(20_000, distance), two_classes(20_000, distance, seed=1)
    found = metrics.label_information(guide, train, test, "y", "x")
    assert abs(found.value - information_by_quadrature(distance)) < 4.5 * found.standard_error + 0.002
    assert 0 < found.standard_error < 0.01
    share = test.covariates["y"].double().mean().item()
    frequency = train.covariates["y"].double().mean().item()
    entropy = -share * math.log(frequency) - (1 - share) * math.log(1 - frequency)
    assert found.entropy == pytest.approx(entropy, abs=1e-12)
    assert str(found) == f"{found.value:.3f} ± {found.standard_error:.3f} of {entropy:.3f} nats"


def test_no_information_is_no_information():
    found = metrics.label_information(guide, two_classes(5000, 0.0), two_classes(5000, 0.0, seed=1), "y", "x")
    assert abs(found.value) < 4.5 * found.standard_error + 0.001
    assert abs(found.value) < 0.002


def test_a_gain_is_that_of_rows_compared_one_by_one():
    train, test = two_classes(2000, 2.0), two_classes(2000, 2.0, seed=1)
    noisy = [b.replaced({"x": b["x"] + torch.randn(b["x"].shape, generator=torch.Generator().manual_seed(i))})
             for i, b in enumerate((train, test))]  # fmt: skip
    whole = metrics.label_information(guide, train, test, "y", "x")
    less = metrics.label_information(guide, *noisy, "y", "x")
    gain, error = whole.gain(less)
    differences = (whole.per_row - less.per_row) / whole.entropy
    assert gain == pytest.approx((whole.value - less.value) / whole.entropy) and gain > 4 * error
    assert error == pytest.approx(differences.std().item() / 2000**0.5)
    assert error < math.hypot(whole.standard_error, less.standard_error) / whole.entropy
    assert whole.gain(whole) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"expected the information of the same rows: 2000 rows with .* 1000 with"):
        whole.gain(metrics.label_information(guide, train, test[:1000], "y", "x"))
    with pytest.raises(TypeError, match="expected over to be a LabelInformation, got"):
        whole.gain(0.5)


def test_a_class_without_training_rows_is_refused():
    train, test = two_classes(50, 1.0), two_classes(50, 1.0)
    test.covariates["y"][3] = 2
    with pytest.raises(ValueError, match="'y': no training row is of class 2, which a test row has"):
        metrics.label_information(guide, train, test, "y", "x")


def test_overlaps_are_those_of_counted_pixels():
    corners = torch.randint(0, 9, (200, 2, 2), generator=torch.Generator().manual_seed(0))
    sizes = torch.randint(0, 6, (200, 2, 2), generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([corners, corners + sizes], -1)
    pixel = torch.arange(16)
    inside = (pixel >= boxes[..., :2, None]) & (pixel < boxes[..., 2:, None])  # of columns and of rows
    masks = (inside[..., 0, None, :] & inside[..., 1, :, None]).unbind(1)
    shared, either = (masks[0] & masks[1]).sum((-2, -1)), (masks[0] | masks[1]).sum((-2, -1))
    expected = torch.where(either > 0, shared / either.clamp(min=1), 0.0)
    found = metrics.intersection_over_union(*boxes.float().unbind(1))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found > 0).sum() > 20
    turned = torch.tensor([3.0, 3.0, 1.0, 1.0])  # its area is not 4
    assert metrics.intersection_over_union(turned, torch.tensor([0.0, 0.0, 4.0, 4.0])) == 0


def boxed(rows, noise, seed, number=2):
    """Boxes that are a linear function of x, which is seen with noise."""
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(rows, number, 2, generator=generator), 1 + torch.rand(rows, number, 2, generator=generator)
    boxes = torch.cat([low, low + size], -1)
    x = boxes.flatten(1) @ torch.randn(4 * number, 4 * number, generator=torch.Generator().manual_seed(7))
    x = x + noise * torch.randn(x.shape, generator=generator)
    return Batch({"x": x}, covariates={"boxes": boxes})


def test_boxes_that_a_latent_knows_are_found_and_others_are_not():
    exact = metrics.box_overlap(guide, boxed(500, 0.0, 0), boxed(300, 0.0, 1), given="x", regularisation=1e6)
    assert exact.mean.value > 0.999 and len(exact.each) == 2 and exact.mean.size == 300
    blurred = metrics.box_overlap(guide, boxed(500, 0.5, 0), boxed(300, 0.5, 1), given="x")
    blind = metrics.box_overlap(guide, boxed(500, 1e4, 0), boxed(300, 1e4, 1), given="x")
    assert exact.mean.value > blurred.mean.value > blind.mean.value
    assert blind.mean.value == pytest.approx(sum(each.value for each in blind.each) / 2)
    train, test = boxed(500, 0.0, 0), boxed(300, 0.0, 1)
    mean = train.covariates["boxes"].mean(0)  # what a regression on nothing predicts
    constant = metrics.intersection_over_union(mean, test.covariates["boxes"]).mean().item()
    assert blind.mean.value == pytest.approx(constant, abs=0.01)


def test_one_box_per_row_and_no_box():
    train, test = (Batch({"x": b["x"]}, covariates={"b": b.covariates["boxes"][:, 0]}) for b in (
        boxed(500, 0.0, 0, number=1), boxed(300, 0.0, 1, number=1)
    ))  # fmt: skip
    assert metrics.box_overlap(guide, train, test, "b", regularisation=1e6).each[0].value > 0.999
    wrong = Batch({"x": test["x"]}, covariates={"b": test["x"][:, :3]})
    with pytest.raises(ValueError, match=r"expected boxes \(N, 4\) or \(N, K, 4\) of 'b', .* got shape \(300, 3\)"):
        metrics.box_overlap(guide, wrong, wrong, "b")
    with pytest.raises(ValueError, match=r"expected first to be boxes \(.., 4\), got shape \(2, 3\)"):
        metrics.intersection_over_union(torch.zeros(2, 3), torch.zeros(2, 4))
