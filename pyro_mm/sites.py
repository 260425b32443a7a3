"""What a run of a model and its guide shows of their sites, and of modalities that they see and should not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .batch import Batch
from .pairs import is_factor, latents, observed, structure
from .seeding import seeded

FEW = 32  # rows on which values are exchanged to see who reads them


@dataclass(frozen=True)
class Sites:
    """Sites and modalities by name.

    Attributes:
        model, guide: the latent sites of each; of the model's, ``summed_out`` are enumerated, and ``from_prior`` are
            in the model only and cannot be.
        observed: the observed sites.
        guide_only: latent sites of the guide that the model has no latent for.
        outside: sites outside the plate ``"data"``.
        scaled: sites with a scale of their own.
        unobserved: modalities of the batch that the story never observes.
        unheld: modalities that the story observes and the batch does not hold.
        unmasked: observed sites that bear no modality's name, so that no mask reaches them.
        peeks: (``"model"`` or ``"guide"``, modality) where it reads that modality's values in rows that lack it.
        blind: modalities whose presence makes no difference to the guide.
    """

    model: tuple[str, ...]
    guide: tuple[str, ...]
    observed: tuple[str, ...]
    summed_out: tuple[str, ...]
    from_prior: tuple[str, ...]
    guide_only: tuple[str, ...]
    outside: tuple[str, ...]
    scaled: tuple[str, ...]
    unobserved: tuple[str, ...]
    unheld: tuple[str, ...]
    unmasked: tuple[str, ...]
    peeks: tuple[tuple[str, str], ...]
    blind: tuple[str, ...]

    def findings(self, per_row: bool) -> Iterator[tuple[int, str]]:
        """What is amiss, in words, each with its rank, lower ones being more serious.

        Args:
            per_row: whether the estimator is one of :mod:`pyro_mm.estimators`, and not Pyro's.
        """
        for who, name in self.peeks:
            reader, then = ("guide", "posterior") if who == "guide" else ("story", "likelihood")
            text = f"{name}: the {reader} reads its values where they are missing, so that a {then} without them has "
            yield 1, text + "seen them. Ask batch.presence, or use batch.observe."
        for name in self.guide_only:
            seen = "observed by the story" if name in self.observed else "unknown to the model"
            text = f"{name}: drawn by the guide and {seen}. Its -log q counts and no log p answers it: bounds are off "
            yield 1, text + "by its entropy, and likelihoods have no meaning."
        for name in self.unmasked:
            text = f"{name}: observed under the name of no modality of the batch, so that no mask reaches it. "
            yield 1, text + "Use batch.observe with the modality's name."
        for name in self.unobserved:
            yield 2, f"{name}: the batch has it, and the story never observes it. It is part of no likelihood."
        for name in self.from_prior:
            if per_row:
                yield 4, f"{name}: in the model only, drawn from its prior. That is unbiased, and noisy."
            else:
                yield (
                    1,
                    f"{name}: in the model only. Pyro's estimators count its log p, which nothing answers: no bound.",
                )
        for name in self.unheld:
            yield 3, f"{name}: the story observes it, and the batch does not hold it. It counts and trains nothing."
        for name in self.blind:
            yield 3, f"{name}: the guide is the same with it and without it, as if it did not look."


@torch.no_grad()
def look(model: Callable[[Batch], Any], guide: Callable[[Batch], Any], batch: Batch, seed: int = 0) -> Sites:
    """The :class:`Sites` of a pair; what the story or the guide raises on these rows passes through."""
    batch = batch[: min(FEW, batch.size)]
    info = structure(model, guide, batch)
    of_guide = _run(guide, batch, seed)
    of_model = _run(model, batch, seed, of_guide)
    theirs, ours, seen = latents(of_guide), latents(of_model), observed(of_model)
    enumerated = {n for n, kind in info.latents.items() if kind == "enumerated"}
    enumerated |= {n for n, can in info.model_only.items() if can}
    sites = [*theirs.items(), *ours.items(), *seen.items()]
    auxiliary = {n for n, site in seen.items() if site["infer"].get("is_auxiliary", False)}
    peeks, blind = _reading(model, guide, batch, seed)
    return Sites(
        model=tuple(ours),
        guide=tuple(theirs),
        observed=tuple(seen),
        summed_out=tuple(n for n in ours if n in enumerated),
        from_prior=tuple(n for n, can in info.model_only.items() if not can),
        guide_only=tuple(n for n in theirs if n not in ours),
        outside=tuple(dict.fromkeys(n for n, s in sites if "data" not in {f.name for f in s["cond_indep_stack"]})),
        scaled=tuple(dict.fromkeys(n for n, s in sites if _scaled(s))),
        unobserved=tuple(n for n in batch.names if n not in seen),
        unheld=tuple(n for n in seen if n not in batch and n in auxiliary and not is_factor(seen[n])),
        unmasked=tuple(n for n in seen if n not in batch and n not in auxiliary and not is_factor(seen[n])),
        peeks=tuple(peeks),
        blind=tuple(blind),
    )


def _run(story: Any, batch: Batch, seed: int, trace: Any = None) -> Any:
    """The trace of a run, of a model replayed against its guide's."""
    with torch.inference_mode(False), seeded(seed, batch.device), poutine.block():
        return poutine.trace(story if trace is None else poutine.replay(story, trace=trace)).get_trace(batch)


def _scaled(site: dict[str, Any]) -> bool:
    """Whether a site has a scale besides that of a subsampled data plate."""
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    own = frames["data"].full_size / frames["data"].size if "data" in frames else 1.0
    scale = site["scale"]
    return not (isinstance(scale, float | int) and math.isclose(scale, own))


def _reading(model: Any, guide: Any, batch: Batch, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Who reads a modality that is missing, and which modality the guide does not read where it is present.

    The modality is hidden, and the rows exchange its hidden values: whoever changes has read them. The rows looked at
    have something else to be seen.
    """
    peeks, blind, whole = [], [], _densities(_run(guide, batch, seed))
    for name in (n for n in batch.names if batch.holds(n) and batch.presence(n) is not False):
        hidden = batch.without(name)
        rows = (
            hidden.rows
            if isinstance(hidden.rows, Tensor)
            else torch.full((batch.size,), hidden.rows, device=batch.device)
        )
        if not rows.any():
            continue
        rolled = hidden.replaced({name: batch[name].roll(1, 0)})
        try:
            traces = [_run(guide, b, seed) for b in (hidden, rolled)]
            scores = [_run(model, b, seed, traces[0]) for b in (hidden, rolled)]
        except Exception:  # a pair that cannot do without a modality says so where its likelihood is asked for
            continue
        for who, (one, other) in (("model", scores), ("guide", traces)):
            if not _alike(_densities(one), _densities(other), rows):
                peeks.append((who, name))
        if _alike(_densities(traces[0]), whole, rows & batch.present[name]) and ("guide", name) not in peeks:
            blind.append(name)
    return peeks, blind


def _densities(trace: Any) -> dict[str, Tensor]:
    """The log-densities of a trace's sites, and its draws as one number each."""
    sites = {**latents(trace), **observed(trace)}
    drawn = {f"{n}'s value": _flat(site) for n, site in latents(trace).items()}
    return drawn | {n: site["fn"].log_prob(site["value"]) for n, site in sites.items()}


def _flat(site: dict[str, Any]) -> Tensor:
    value, event_dim = site["value"], site["fn"].event_dim
    return value.double().flatten(value.dim() - event_dim).sum(-1) if event_dim else value


def _alike(one: dict[str, Tensor], other: dict[str, Tensor], rows: Tensor) -> bool:
    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if a.dim() and a.shape[-1] == len(rows):
            a, b = a[..., rows], b[..., rows]
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)

    return all(same(one[n], other[n]) for n in one if n in other)
