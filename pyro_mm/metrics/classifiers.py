"""A classifier of true data, to judge generated data by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.arguments import check_counts, check_number, check_tensor
from ..utils.seeding import temporary_seed
from .proportion import Share

CHUNK = 1024


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
    r"""A small network trained by Adam on the cross-entropy of labels.

    Pictures ``(N, H, W)`` or ``(N, channels, H, W)`` of 8 x 8 pixels at least: convolutions with 16 and 32 kernels of
    4 x 4 and stride 2, then a hidden layer. Anything else, flattened: two hidden layers. ReLU between layers. Values
    are less their mean, divided by their standard deviation, over all training numbers.

    Args:
        values: ``(N, *event)``, of training rows only.
        labels: ``(N,)``, classes from 0.
        test_values, test_labels: rows that it is not trained on.
        epochs: times that the training rows are gone through.
        batch_size: rows of a step.
        lr: Adam's step, falling to 0 along half a cosine.
        hidden: the size of hidden layers.
        seed: of weights and order; torch's generators are left as they were.

    Returns:
        (network, accuracy): the network maps ``(B, *event)`` to logits ``(B, C)`` on the device of the training values,
        in evaluation mode, with parameters that take no gradient; and its share of right test rows.

    Raises:
        ValueError: lengths or events differ.
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
    labels, test_labels = labels.long(), test_labels.long()
    device, event = values.device, values.shape[1:]
    labels, test_labels = labels.to(device), test_labels.to(device)
    with torch.inference_mode(False), torch.enable_grad(), temporary_seed(seed, device):
        net = _Network(values, int(labels.max()) + 1, event, hidden).to(device)
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
    with torch.no_grad():
        predicted = torch.cat([net(x.to(device)).argmax(-1) for x in test_values.split(CHUNK)])
    return net, Share.of(predicted == test_labels)


class _Network(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, values: Tensor, classes: int, event: torch.Size, hidden: int):
        super().__init__()
        self.event = event
        deviation, mean = torch.std_mean(values.float(), correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation.clamp(min=1e-6))
        self.pictures = len(event) in (2, 3) and min(event[-2:]) >= 8
        if self.pictures:
            channels, (height, width) = event[0] if len(event) == 3 else 1, event[-2:]
            first: list[nn.Module] = [
                nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
                nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), hidden),
            ]  # fmt: skip
        else:
            first = [nn.Flatten(), nn.Linear(event.numel(), hidden), nn.ReLU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*first, nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.event:
            raise ValueError(f"expected values of shape (B, {', '.join(map(str, self.event))}), got {tuple(x.shape)}")
        x = (x.to(self.mean.dtype) - self.mean) / self.deviation
        return self.layers(x.reshape(len(x), -1, *self.event[-2:]) if self.pictures else x.reshape(len(x), -1))
