"""Forms of Pyro's ``Trace_ELBO`` and ``TraceMeanField_ELBO`` that read no number off a tensor.

Pyro calls ``.item()`` for each site in each step, which waits for the device, and which ``make_fx`` cannot trace. The
forms here take the same traces and the same sums, and return the loss as a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from torch import Tensor
from torch.distributions import kl_divergence

from .plates import KnownPlates


class _Trace(Trace_ELBO):
    """``Trace_ELBO``: log p - log q, by pathwise gradients where sites have them and else by the score function."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = 0.0
        surrogate: Any = 0.0
        with KnownPlates():
            for traces in self._get_traces(model, guide, args, kwargs):
                value, differentiable = self._particle(*traces)
                loss = loss - value / self.num_particles
                surrogate = surrogate - differentiable / self.num_particles
        differentiable_loss: Tensor = loss.detach() + (surrogate - surrogate.detach())
        return differentiable_loss

    def _particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        """Return the ELBO of one particle, and the surrogate whose gradient is the ELBO's."""
        value = surrogate = sum(site["log_prob_sum"] for site in _samples(model_trace).values())
        log_r: Any = None
        for site in _samples(guide_trace).values():
            value = value - site["log_prob_sum"]
            _, score, entropy = site["score_parts"]
            if not is_identically_zero(entropy):
                surrogate = surrogate - entropy.sum()
            if not is_identically_zero(score):
                log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
                surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * score).sum()
        return value, surrogate


class _MeanField(TraceMeanField_ELBO, _Trace):
    """``TraceMeanField_ELBO``: the KL of a site in closed form where torch knows one."""

    differentiable_loss = _Trace.differentiable_loss

    def _particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        value: Any = 0.0
        model_sites = _samples(model_trace)
        guide_sites = _samples(guide_trace)
        for name, site in model_sites.items():
            if site["is_observed"]:
                value = value + site["log_prob_sum"]
                continue
            q = guide_sites[name]
            try:
                kl = scale_and_mask(kl_divergence(q["fn"], site["fn"]), scale=q["scale"], mask=q["mask"])
                per_row = kl if isinstance(kl, Tensor) else torch.as_tensor(kl)
                value = value - per_row.expand(q["fn"].batch_shape).sum()
            except NotImplementedError:
                value = value + site["log_prob_sum"] - q["score_parts"].entropy_term.sum()
        for name, q in guide_sites.items():
            if name not in model_sites:
                value = value - q["score_parts"].entropy_term.sum()
        return value, value


def traceable_form(estimator: ELBO) -> ELBO:
    """Return the form of an estimator that can be traced, with its settings; the estimator itself if there is none.

    Args:
        estimator: a ``pyro.infer.Trace_ELBO``, a ``TraceMeanField_ELBO`` or any other.
    """
    forms = {Trace_ELBO: _Trace, TraceMeanField_ELBO: _MeanField}
    form = forms.get(type(estimator))
    if form is None:
        return estimator
    new = object.__new__(form)
    new.__dict__.update(estimator.__dict__)
    return new


def _samples(trace: Any) -> dict[str, Any]:
    """Return the sample sites of a trace by name, index sets of plates too."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
