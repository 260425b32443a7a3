"""Run a program under a seed, and compare the densities of its sites between runs."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...batch.batch import Batch
from ...distributions.pushforward import find_pushforward
from ...utils.seeding import temporary_seed
from ..structure import latent_sites, observed_sites


def run_program(program: Any, batch: Batch, seed: int, trace: Any = None) -> Any:
    """Run a program under a seed, and return its trace.

    Args:
        program: a model or a guide.
        batch: the rows.
        seed: the seed of its draws; the generators are restored afterwards.
        trace: a guide's trace, to replay a model against.
    """
    replayed = program if trace is None else poutine.replay(program, trace=trace)
    with torch.inference_mode(False), temporary_seed(seed, batch.device), poutine.block():
        return poutine.trace(replayed).get_trace(batch)


def densities(trace: Any) -> dict[str, Tensor]:
    """Return site -> log-density, and ``"<site>'s value"`` -> draw, summed over its event dimensions."""
    latents = latent_sites(trace)
    draws = {f"{name}'s value": _summed_value(site) for name, site in latents.items()}
    sites = {**latents, **observed_sites(trace)}
    sites = {name: site for name, site in sites.items() if find_pushforward(site["fn"]) is None}
    return draws | {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}


def _summed_value(site: dict[str, Any]) -> Tensor:
    value: Tensor = site["value"]
    event_dim: int = site["fn"].event_dim
    return value.double().flatten(value.dim() - event_dim).sum(-1) if event_dim else value


def equal_in_rows(one: dict[str, Tensor], other: dict[str, Tensor], rows: Tensor) -> bool:
    """Return True if two results of :func:`densities` are equal up to rounding in some of the rows.

    Args:
        one, other: the results; names that only one of them has are not compared.
        rows: boolean ``(N,)``, the rows that count.
    """

    def equal(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if a.dim() and a.shape[-1] == len(rows):
            a, b = a[..., rows], b[..., rows]
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)

    return all(equal(one[name], other[name]) for name in one if name in other)
