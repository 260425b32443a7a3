"""Noise of which every number is one, so that draws are functions of parameters and rows."""

import torch

LEVEL = 0.3


def without_noise(monkeypatch):
    """Let draws of normal distributions and of torch's normal noise be those of a constant noise.

    Permutations of rows are drawn as ever. Processes that are forked later have it too.
    """

    def normal(mean, std, *args, **options):
        return (mean + LEVEL * std).detach()

    def randn(*shape, generator=None, **options):
        return torch.full(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape, LEVEL, **options)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, dtype, device: torch.full(
        shape, LEVEL, dtype=dtype, device=device))  # fmt: skip
    monkeypatch.setattr(torch, "normal", normal)
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "randn_like", lambda x, **options: torch.full_like(x, LEVEL, **options))
