"""Classifiers trained on real data, to judge generated data by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.arguments import check_counts, check_number, check_tensor
from ..utils.seeding import temporary_seed
from .proportion import Share

ROWS_PER_PASS = 1024  # test rows classified at once


def classifier(
    values: Tensor,
    labels: Tensor,
    test_values: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 1e-3,
    hidden: int = 128,
    seed: int = 0,
) -> tuple[nn.Module, Share]:
    r"""Train a small classifier by Adam on the cross-entropy, and measure its accuracy on test rows.

    Images of at least 8 x 8 pixels, ``(N, H, W)`` or ``(N, channels, H, W)``, get two convolutions (16 and 32 kernels
    of 4 x 4, stride 2) and one hidden layer. Other values are flattened and get two hidden layers. Activations are
    ReLU. Inputs are standardised by the mean and the standard deviation over all entries of the training values.

    Args:
        values: training values, ``(N, *event)``.
        labels: training classes, integers from 0, ``(N,)``.
        test_values, test_labels: rows that are not trained on, of the same event shape.
        epochs: passes over the training rows.
        batch_size: rows per gradient step.
        lr: initial learning rate of Adam, annealed to 0 along half a cosine.
        hidden: width of the hidden layers.
        seed: of the initial weights and the order of rows; torch's own generators are left as they were.

    Returns:
        (network, accuracy): the network maps ``(B, *event)`` to logits ``(B, C)``, on the device of ``values``, in
        evaluation mode and with frozen parameters, and its method ``features`` to the last hidden layer
        ``(B, hidden)``, in which :func:`sample_quality` compares samples; the accuracy is over the test rows.

    Raises:
        ValueError: numbers of rows or event shapes that differ, no rows, or labels that are not integers from 0.
    """
    check_counts(batch_size=batch_size, hidden=hidden)
    check_counts(0, epochs=epochs)
    check_number("lr", lr, above=0)
    tensors = {"values": values, "labels": labels, "test_values": test_values, "test_labels": test_labels}
    for argument, value in tensors.items():
        check_tensor(argument, value)
    for x, y in ((values, labels), (test_values, test_labels)):
        if y.shape != x.shape[:1] or x.shape[1:] != values.shape[1:] or len(x) == 0:
            raise ValueError(f"expected labels of shape (N,) and alike values, got {tuple(y.shape)}, {tuple(x.shape)}")
        if y.is_floating_point() or y.dtype == torch.bool or int(y.min()) < 0:
            raise ValueError(f"expected labels to be classes from 0, got {y.dtype} with {y.min().item()} the smallest")

    device = values.device
    labels = labels.to(device, torch.long)
    test_labels = test_labels.to(device, torch.long)

    with torch.inference_mode(False), torch.enable_grad(), temporary_seed(seed, device):
        net = _Network(values, int(labels.max()) + 1, hidden).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr)
        steps = epochs * -(-len(values) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(epochs):
            for rows in torch.randperm(len(values)).to(device).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(values[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    net.eval().requires_grad_(False)
    return net, Share.of(_predict(net, test_values, device) == test_labels)


@torch.no_grad()
def _predict(net: nn.Module, values: Tensor, device: torch.device, rows_per_pass: int = ROWS_PER_PASS) -> Tensor:
    """Return the likeliest class of each row, ``(N,)``."""
    return torch.cat([net(x.to(device)).argmax(-1) for x in values.split(rows_per_pass)])


class _Network(nn.Module):
    """Standardisation of the input, followed by convolutions or by fully connected layers."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, values: Tensor, classes: int, hidden: int):
        super().__init__()
        self.event = event = values.shape[1:]
        deviation, mean = torch.std_mean(values.float(), correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation.clamp(min=1e-6))
        self.pictures = len(event) in (2, 3) and min(event[-2:]) >= 8
        if self.pictures:
            channels = event[0] if len(event) == 3 else 1
            height, width = event[-2:]
            first: list[nn.Module] = [
                nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
                nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), hidden),
            ]  # fmt: skip
        else:
            first = [nn.Flatten(), nn.Linear(event.numel(), hidden), nn.ReLU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*first, nn.ReLU(), nn.Linear(hidden, classes))

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layer, ``(B, hidden)``."""
        if x.shape[1:] != self.event:
            raise ValueError(f"expected values of shape (B, {', '.join(map(str, self.event))}), got {tuple(x.shape)}")
        x = (x.to(self.mean.dtype) - self.mean) / self.deviation
        x = x.reshape(len(x), -1, *self.event[-2:]) if self.pictures else x.reshape(len(x), -1)
        features: Tensor = self.layers[:-1](x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers[-1](self.features(x))
        return logits
