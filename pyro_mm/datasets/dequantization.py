"""Uniform dequantisation: grey levels as real numbers, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_integer, check_name, check_seed, check_tensor
from ..utils.seeding import temporary_seed

TOLERANCE = 0.02  # distance from a level, in units of the distance of levels


def dequantize(batch: Batch, name: str, levels: int = 256, seed: int | None = None) -> Batch:
    r"""Add uniform noise to pixels of L levels, so that they have a density.

    .. math:: y = \frac{(L - 1) x + u}{L}, \qquad u \sim U(0, 1), \quad x \in \{0, \tfrac{1}{L - 1}, \dots, 1\}

    The modality is then one of real numbers in [0, 1), and its density is related to the probability of the levels by

    .. math:: \log P(x) = \log E_u[L^{-D} p(y)] \ge E_u[\log p(y)] - D \log L

    so that its log-density is, in the mean over the noise, a lower bound. Noise is added once for an evaluation, and
    anew for every minibatch of a training: ``fit(transform=lambda rows: dequantize(rows, "image"))``.

    Args:
        batch: N rows.
        name: the modality.
        levels: L.
        seed: of the noise; None takes torch's generator.

    Returns:
        The same rows with other values of the modality.

    Raises:
        ValueError: values between the levels, outside of [0, 1], or none of that modality.

    Example:
        >>> rows = Batch({"image": torch.tensor([[0.0, 1.0]])})
        >>> noisy = dequantize(rows, "image", levels=2, seed=0)["image"]
        >>> quantize(noisy, levels=2)
        tensor([[0., 1.]])

    References:
        Uria et al. 2013 (arXiv:1306.0186); Theis et al. 2016 (arXiv:1511.01844).
    """
    check_batch(batch)
    check_name("name", name, batch.names)
    check_integer("levels", levels, least=2)
    check_seed(seed)
    if not batch.holds(name):
        raise ValueError(f"dequantize: the batch holds no values of {name!r}")

    x = batch[name]
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    scaled = x * (levels - 1)
    level = scaled.round()
    far = (scaled - level).abs().max().item() > TOLERANCE
    if far or level.min().item() < 0 or level.max().item() > levels - 1:
        raise ValueError(
            f"dequantize: expected {name!r} on {levels} levels, the multiples of 1/{levels - 1} to 1, got values from "
            f"{x.min().item():g} to {x.max().item():g}{' between the levels' if far else ''}: divide grey levels "
            "by the largest one, give levels=, and do not add noise twice"
        )
    if seed is None:
        noise = torch.rand_like(level)
    else:
        with temporary_seed(seed, level.device):
            noise = torch.rand_like(level)
    return batch.replaced({name: (level + noise) / levels})


def quantize(values: Tensor, levels: int = 256) -> Tensor:
    r"""Return the levels of dequantised pixels, :math:`\lfloor L y \rfloor / (L - 1)`, in [0, 1].

    Args:
        values: pixels y of any shape; those outside of [0, 1) get the nearest level.
        levels: L.
    """
    check_integer("levels", levels, least=2)
    level = (check_tensor("values", values) * levels).floor().clamp(0, levels - 1)
    return level / (levels - 1)
