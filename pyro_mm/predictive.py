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
from .pairs import Rewrite, latents, observed, structure
from .presence import over_events


@torch.no_grad()
def generate(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    mean: bool = False,
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
        vectorize: False draws sample by sample, for stories that do not broadcast.

    Returns:
        modality -> ``(S, N, *event)``.
    """
    if not vectorize and num_samples > 1:
        each = [generate(model, guide, batch, mean=mean) for _ in range(num_samples)]
        return {name: torch.cat([draws[name] for draws in each]) for name in each[0]}
    info = structure(model, guide, batch)
    dim = -info.nesting - (num_samples > 1)

    def particles() -> Any:
        return pyro.plate("particles", num_samples, dim=dim) if num_samples > 1 else nullcontext()

    with poutine.block(), poutine.trace() as drawn, particles():
        guide(batch)
    trace, rows = drawn.trace, batch.rows
    alike: dict[str, Tensor] = {}
    discrete = {name for name, enumerable in info.model_only.items() if enumerable}
    if discrete:
        trace = _with_discrete(trace, model, batch, discrete, particles, dim - 1)
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
        (rows, latents): the batch with drawn values under the same masks, and latent site -> ``(N, *event)``.
    """
    with poutine.block(), poutine.trace() as drawn:
        model(batch.only())
    values = {name: site["value"] for name, site in observed(drawn.trace).items() if name in batch}
    rows = batch.size
    sites = {
        n: s["value"].expand(*s["fn"].batch_shape[:-1], rows, *s["fn"].event_shape)
        for n, s in latents(drawn.trace).items()
    }
    return batch.replaced(values), sites


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
