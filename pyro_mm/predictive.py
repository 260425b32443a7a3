"""Draws of every modality, given whichever of them each row has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .batch import Batch
from .likelihood import ROWS, weighted
from .pairs import Pair, Rewrite, latents, observed, structure
from .presence import over_events
from .proposals import Proposal
from .seeding import seeded


@torch.no_grad()
def generate(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    mean: bool = False,
    resample: bool = False,
    num_particles: int = 1000,
    seed: int | None = None,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    r"""Draws :math:`x_m \sim p(x_m | z)`, :math:`z \sim q(z | x_{present})`, of every modality of every row.

    Of a present modality it is a reconstruction, of a missing one cross-modal generation. A row in which nothing is
    present is drawn from the model's own prior. A discrete latent that only the model has is drawn from its exact
    posterior given z and what is present. A missing modality on which a latent depends is drawn from its prior, unless
    the whole row is missing: give the story a latent for it where that matters. Descendants of a modality see its
    value where it is present, and the draw that is returned where it is not.

    Args:
        num_samples: S, independent draws of every row.
        mean: returns the means of the p(x_m | z) in place of draws; of a Categorical, the class probabilities
            ``(S, N, *event, C)``.
        resample: takes z from the guide's draws by their importance weights, and so, as K grows, from p(z | x_present)
            itself (:func:`posterior_draws`).
        num_particles: K, the draws to take from, if ``resample``.
        seed: of all draws; None goes on with torch's generator.
        vectorize: False draws sample by sample, for stories that do not broadcast.

    Returns:
        modality -> ``(S, N, *event)``.
    """
    with seeded(seed, batch.device):
        chosen: dict[str, Tensor] = {}
        if resample:
            chosen = posterior_draws(
                model, guide, batch, num_samples, resample=True, num_particles=num_particles, vectorize=vectorize
            )
        if vectorize or num_samples == 1:
            return _generate(model, guide, batch, num_samples, mean, chosen)
        one = lambda s: {name: z[s : s + 1] for name, z in chosen.items()}  # noqa: E731
        each = [_generate(model, guide, batch, 1, mean, one(s)) for s in range(num_samples)]
        return {name: torch.cat([draws[name] for draws in each]) for name in each[0]}


@torch.no_grad()
def posterior_draws(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    resample: bool = False,
    num_particles: int = 1000,
    seed: int | None = None,
    vectorize: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Draws of the guide's latents given what is present, or, with ``resample``, of the posterior's.

    Sampling importance resampling: S draws of every row, with replacement, out of K of the guide's, by

    .. math:: P(z = z_k) = w_k / \sum_l w_l, \qquad w_k = p(x_S, z_k) / q(z_k | x_S)

    which tends to p(z | x_S) as K grows. The draws of a row whose weights have a k-hat above 0.7 are mostly one and the
    same. The private latent of a missing modality has no part in the weights: it stays the guide's, which is right
    where that has the model's prior for it. Rubin 1988 (Bayesian Statistics 3:395).

    Args:
        num_samples: S.
        resample: whether the weights count.
        num_particles: K.
        seed: of all draws; None goes on with torch's generator.
        vectorize: False runs draw by draw, for stories that do not broadcast.
        options: ``draws``, ``stratify`` and ``prior_share``, as of :func:`pyro_mm.log_marginal`.

    Returns:
        latent site of the guide -> ``(S, N, *event)``, plates within a row to the left of N.
    """
    proposal, info = Proposal(**options), structure(model, guide, batch)
    if options and not resample:
        raise ValueError(f"{', '.join(options)}: for draws by weight, with resample=True")
    if resample and "enumerated" in info.latents.values():
        raise ValueError("resample needs a guide without enumerated sites: let the model alone have them")
    with seeded(seed, batch.device):
        if resample:
            own = int(torch.randint(2**62, ()))
            parts, inner = [], {}
            for start in range(0, batch.size, ROWS):
                rows = batch if batch.size <= ROWS else batch[slice(start, start + ROWS)]
                blocks = weighted(model, guide, rows, rows, num_particles, proposal, own + start, None, vectorize)
                chosen = _Chosen(num_samples)
                for _, pair, log_w in blocks:
                    chosen.add(pair, log_w)
                parts.append(chosen.values)
                inner = chosen.inner
            return {name: torch.cat([part[name] for part in parts], 1 + inner[name]) for name in parts[0]}
        if vectorize or num_samples == 1:
            sites = latents(_drawn(guide, batch, num_samples, info.nesting))
            return {n: s["value"] if num_samples > 1 else s["value"][None] for n, s in sites.items()}
        each = [latents(_drawn(guide, batch, 1, 1)) for _ in range(num_samples)]
        return {n: torch.stack([sites[n]["value"] for sites in each]) for n in each[0]}


class _Chosen:
    """S draws of every row out of those that come in blocks, by weight, as if all of them had been there at once."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.values: dict[str, Tensor] = {}
        self.inner: dict[str, int] = {}  # plates within a row
        self.total: Tensor | None = None

    def add(self, pair: Pair, log_w: Tensor) -> None:
        block = log_w.double().logsumexp(0)
        total = block if self.total is None else torch.logaddexp(self.total, block)
        # a row whose weights are all zero has no posterior to draw from, and keeps the guide's
        share = (log_w.double() - block).exp().T.nan_to_num(1.0)
        index = torch.multinomial(share, self.num_samples, replacement=True).T
        new = torch.rand(index.shape, dtype=total.dtype, device=total.device) < (block - total).exp().nan_to_num(1.0)
        rows = torch.arange(index.shape[1], device=index.device)
        for name, site in latents(pair.trace).items():
            value = site["value"] if pair.plated else site["value"][None]
            dim = value.dim() - site["fn"].event_dim - 1
            taken = value.movedim(dim, 1)[index, rows]
            if self.total is not None:
                mask = new.reshape(*new.shape, *[1] * (taken.dim() - 2))
                taken = torch.where(mask, taken, self.values[name].movedim(dim, 1))
            self.values[name], self.inner[name] = taken.movedim(1, dim), dim - 1
        self.total = total


def _drawn(guide: Callable[[Batch], Any], batch: Batch, num_samples: int, nesting: int) -> Any:
    """The trace of the guide, in a plate of samples if there are several."""
    with poutine.block(), poutine.trace() as drawn, _particles(num_samples, nesting):
        guide(batch)
    return drawn.trace


def _particles(num_samples: int, nesting: int) -> Any:
    return pyro.plate("particles", num_samples, dim=-nesting - 1) if num_samples > 1 else nullcontext()


def _generate(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int,
    mean: bool,
    chosen: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Draws of every modality, given draws of the latents or, for those without, the guide's."""
    info = structure(model, guide, batch)

    def particles() -> Any:
        return _particles(num_samples, info.nesting)

    trace, rows = _drawn(guide, batch, num_samples, info.nesting), batch.rows
    for name, value in chosen.items():
        trace.nodes[name] = trace.nodes[name] | {"value": value if num_samples > 1 else value[0]}
    alike: dict[str, Tensor] = {}
    discrete = {name for name, enumerable in info.model_only.items() if enumerable}
    if discrete:
        trace = _with_discrete(trace, model, batch, discrete, particles, -info.nesting - 1 - (num_samples > 1))
    if rows is not True:
        alike = _replace_empty(trace, model, batch, rows, particles)
    recorder = _Record(batch, mean, alike)
    with ExitStack() as stack:
        for handler in (poutine.block(), poutine.replay(trace=trace), recorder, particles()):
            stack.enter_context(handler)
        model(batch)
    return {name: _reshaped(x, num_samples, batch.size, event_dim) for name, (x, event_dim) in recorder.drawn.items()}


@torch.no_grad()
def simulate(model: Callable[[Batch], Any], batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
    """Rows drawn from the model itself, with the latents that made them: an exact draw from p(z | x) of those rows.

    Args:
        batch: says how many rows, which modalities each of them has, and the covariates; its values are not used.

    Returns:
        (rows, latents): the batch with drawn values under the same masks, and latent site -> ``(N, *event)``, with the
        plates within a row to the left of N.
    """
    with poutine.block(), poutine.trace() as drawn:
        model(batch.only())
    sites = {name: site for name, site in observed(drawn.trace).items() if name in batch}
    values = {n: _reshaped(s["value"], 1, batch.size, s["fn"].event_dim)[0] for n, s in sites.items()}
    return batch.replaced(values), {name: site["value"] for name, site in latents(drawn.trace).items()}


class _Record(Messenger):
    """Draws every observed site anew, and lets descendants see the draw where nothing was observed."""

    def __init__(self, batch: Batch, mean: bool, alike: dict[str, Tensor]):
        super().__init__()
        self.batch, self.mean, self.alike = batch, mean, alike
        self.drawn: dict[str, tuple[Tensor, int]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if not msg["is_observed"] or not any(frame.name == "data" for frame in msg["cond_indep_stack"]):
            return
        while isinstance(fn, dist.MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, dist.Unit):
            return
        missing = msg["infer"].get("is_auxiliary", False)  # a modality of which the batch holds nothing
        draw, mask = fn.sample(), self.batch.presence(name) if name in self.batch else not missing
        if name in self.alike:  # the draw that the latents of an empty row were drawn with
            rows = self.batch.rows
            same = self.alike[name]
            draw = torch.where(over_events(rows, fn.event_dim), draw, same) if isinstance(rows, Tensor) else same
        if isinstance(mask, Tensor):
            msg["value"] = torch.where(over_events(mask, fn.event_dim), msg["value"], draw)
        elif not mask:
            msg["value"] = draw
        self.drawn[name] = (_mean(fn), fn.event_dim) if self.mean else (draw, fn.event_dim)
        if self.mean and _is_categorical(fn):
            self.drawn[name] = (self.drawn[name][0], fn.event_dim + 1)


def _replace_empty(trace: Any, model: Any, batch: Batch, rows: bool | Tensor, particles: Any) -> dict[str, Tensor]:
    """Puts draws from the model's prior in place of the guide's where a row has nothing for the guide to see.

    Returns the modalities drawn along with them, on which latents may depend.
    """
    with poutine.block(), poutine.trace() as prior, particles():
        model(batch.only())
    ours = latents(prior.trace)
    for name, site in latents(trace).items():
        if name in ours:
            value = ours[name]["value"]
            if isinstance(rows, Tensor):
                value = torch.where(over_events(rows, site["fn"].event_dim), site["value"], value)
            trace.nodes[name] = site | {"value": value}
    return {name: site["value"] for name, site in observed(prior.trace).items() if name in batch}


def _with_discrete(trace: Any, model: Any, batch: Batch, names: set[str], particles: Any, enum_dim: int) -> Any:
    """The trace with draws of the discrete sites that only the model has, from their posterior."""

    def enumerate_them(msg: dict[str, Any]) -> None:
        if msg["name"] in names:
            msg["infer"]["enumerate"] = "parallel"

    def conditioned() -> None:
        with poutine.replay(trace=trace), Rewrite(enumerate_them), particles():
            model(batch)

    with poutine.block(), poutine.trace() as discrete:
        infer_discrete(conditioned, first_available_dim=enum_dim)()
    new = trace.copy()
    for name in names:
        site = discrete.trace.nodes[name]
        new.add_node(name, **(site | {"infer": {}, "name": name}))
    return new


def _is_categorical(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent | dist.Independent):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.Categorical)


def _mean(fn: Any) -> Tensor:
    if not _is_categorical(fn):
        return fn.mean
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn.probs


def _reshaped(x: Tensor, num_samples: int, size: int, event_dim: int) -> Tensor:
    event = x.shape[x.dim() - event_dim :]
    lead = x.shape[: x.dim() - event_dim]
    x = x.reshape(lead[0] if len(lead) > 1 else 1, lead[-1] if lead else 1, *event)
    return x.expand(num_samples, size, *event)
