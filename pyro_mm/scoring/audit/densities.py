"""Densities of a program's sites in one run, and their comparison between runs."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...batch.batch import Batch
from ...utils.seeding import temporary_seed
from ..structure import latent_sites, observed_sites


def run_program(story: Any, batch: Batch, seed: int, trace: Any = None) -> Any:
    """The trace of a run, of a model replayed against its guide's."""
    with torch.inference_mode(False), temporary_seed(seed, batch.device), poutine.block():
        return poutine.trace(story if trace is None else poutine.replay(story, trace=trace)).get_trace(batch)


def densities(trace: Any) -> dict[str, Tensor]:
    """The log-densities of a trace's sites, and its draws as one number each."""
    sites = {**latent_sites(trace), **observed_sites(trace)}
    drawn = {f"{n}'s value": _flat(site) for n, site in latent_sites(trace).items()}
    return drawn | {n: site["fn"].log_prob(site["value"]) for n, site in sites.items()}


def _flat(site: dict[str, Any]) -> Tensor:
    value, event_dim = site["value"], site["fn"].event_dim
    return value.double().flatten(value.dim() - event_dim).sum(-1) if event_dim else value


def _equal_in_rows(one: dict[str, Tensor], other: dict[str, Tensor], rows: Tensor) -> bool:
    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if a.dim() and a.shape[-1] == len(rows):
            a, b = a[..., rows], b[..., rows]
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)

    return all(same(one[n], other[n]) for n in one if n in other)
