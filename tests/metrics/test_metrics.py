"""Metrics against a story whose predictions are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mm import Batch, metrics

ROWS = 300  # more than one chunk


@pytest.fixture
def batch():
    label = torch.arange(ROWS) % 4
    return Batch({"image": label.float()[:, None].expand(-1, 2).clone(), "label": label})


def model(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        batch.observe("image", lambda z: dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), z)
        # the nearest class to z, but class 3 is always taken for 0
        batch.observe("label", lambda z: dist.Categorical(logits=-50 * (z - torch.tensor([0.0, 1, 2, 9])).abs()), z)


def guide(batch):
    known = batch.presence("image") is not False
    loc = torch.where(batch["image"][:, :1] > 2.5, 0.0, batch["image"][:, :1]) if known else torch.zeros(ROWS, 1)
    with batch.plate():
        pyro.sample("z", dist.Normal(loc, 1e-3).to_event(1))


def test_accuracy_counts_the_right_ones(batch):
    assert metrics.cross_modal_accuracy(model, guide, batch, "label", "image", 5) == pytest.approx(0.75)


def test_accuracy_is_over_the_rows_that_have_the_target(batch):
    held = Batch({n: batch[n] for n in batch}, present={"label": batch["label"] < 3})
    assert metrics.cross_modal_accuracy(model, guide, held, "label", ["image"], 5) == 1.0


def test_probabilities_sum_to_one_and_the_target_is_not_shown(batch):
    probabilities = metrics.class_probabilities(model, guide, batch, "label", "image", 5)
    assert probabilities.shape == (ROWS, 4)
    assert torch.allclose(probabilities.sum(-1), torch.ones(ROWS))
    with pytest.raises(ValueError, match="both the target and given"):
        metrics.class_probabilities(model, guide, batch, "label", ["label", "image"])


def test_confusion_matrix_has_true_classes_down():
    matrix = metrics.confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), 3)
    assert matrix.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
