r"""What to look at after writing a story: its sites, the gap of its bound, its guide, and the noise of its gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..batch.batch import Batch, check_batch
from ..estimators import PerRow, check_pairing
from ..evidence.evidence import Evidence
from ..evidence.likelihood import log_marginal
from ..objectives.objective import Objective
from ..scoring.evaluation import evaluating
from ..scoring.prepare_objective import prepare_objective
from ..scoring.structure import pair_structure
from ..training.missing_gradients import explain_missing_gradients
from ..utils.arguments import check_counts, check_programs, check_seed
from ..utils.reachable import ReachableObjects
from .bound_gap import bound_target, elbo_gap, objective_gap, undefined_gap_reason
from .check_report import Check, findings, objective_text
from .comparison import Comparison, compare
from .gradient_noise import gradient_noise, unchanged
from .inference_data import to_arviz
from .site_checks import inspect_sites

__all__ = ["Check", "Comparison", "check", "compare", "to_arviz"]


def check(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: Any,
    batch: Batch,
    *,
    num_particles: int = 1000,
    repeats: int = 20,
    seed: int = 0,
) -> Check:
    r"""Check a story, a guide and an objective on some rows, and report what is amiss.

    * Sites: which latents and modalities model and guide share, which of them lacks one and what comes of it, and who
      reads values of a modality that a row lacks.
    * The gap, :math:`\sum_i w_i \log p(x_{S_i}) - L`, of an objective L that is a lower bound on such a sum, in nats a
      row with its standard error; and that of the plain ELBO, :math:`E_n KL(q(z | x_n) \| p(z | x_n))`. Weights that
      depend on the step are those after any warm-up, of which the bound is spoken.
    * The guide as a proposal: Pareto k-hat and effective sample size (:func:`~pyro_mm.log_marginal`) with
      all that is present, and with each modality alone.
    * The signal-to-noise ratio of the gradient by part (``pyro_mm.diagnostics.gradient_noise``), and the parameters
      that it never reaches.

    Modules run in evaluation mode, but for the gradient, which is that of training in the mode that they are in. They,
    the objective, ``.grad`` and the generators are left as they are; a ``pyro.param`` that was never run enters Pyro's
    store, as in any run.

    Args:
        model, guide: callables of a batch.
        objective: an :class:`~pyro_mm.objectives.Objective`, or a ``pyro.infer.ELBO``, which bounds log p(x).
        batch: N rows; a few hundred do.
        num_particles: K, of the likelihoods.
        repeats: R, of the gradient.
        seed: of all draws.

    Raises:
        What story and guide themselves raise on these rows. What an objective or a likelihood of them raises is
        reported, and kept in ``errors``.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    prepare_objective(objective)
    check_counts(num_particles=num_particles)
    check_counts(2, repeats=repeats)
    check_seed(seed)
    batch = batch.standalone()
    objective, estimator = copy.copy(objective), getattr(objective, "estimator", objective)
    vectorize = getattr(objective, "vectorize", True)
    vectorize = vectorize and (not isinstance(estimator, PerRow) or estimator.vectorize_particles)
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed, "vectorize": vectorize, "audit": False}
    errors: dict[str, Exception] = {}
    known: dict[frozenset[str], Evidence] = {}

    def evidence(names: frozenset[str]) -> Evidence:
        if names not in known:
            shown = batch.only(*(n for n in batch.names if n in names))
            known[names] = log_marginal(model, guide, shown, **options)
        return known[names]

    def attempt(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:  # reported: the story and the guide by themselves have run
            errors[what] = error
            return None

    with unchanged(model, guide), _quiet(), evaluating(model, guide, batch, audit=False) as batch:
        sites = inspect_sites(model, guide, batch, seed, stacked=vectorize)
        joint = attempt("the likelihood", evidence, frozenset(batch.names))
        alone = [n for n in sites.observed if batch.presence(n) is not False]
        for name in alone if len(alone) > 1 and joint is not None else []:
            attempt(f"the likelihood of {name!r} alone", evidence, frozenset({name}))
        target = bound_target(objective, batch.names)
        gap, remark = None, undefined_gap_reason(target)
        if joint is not None and target is not None and not remark:
            gap = attempt("the objective", objective_gap, target, objective, model, guide, batch, evidence, seed)
            remark = "" if gap or "the objective" in errors else "no gap: no row here has every modality"
        plain = attempt("the ELBO", elbo_gap, model, guide, batch, joint, seed) if joint is not None else None
    with unchanged(model, guide), _quiet():
        gradients = attempt("the gradient", gradient_noise, model, guide, objective, batch, repeats=repeats, seed=seed)
        clash = _clash(estimator, model, guide, batch) if not isinstance(objective, Objective) else ""
    found = Check(
        batch.size, sites, objective_text(objective, estimator, target), gap, plain,
        {e.quantity: e for e in known.values()}, gradients, errors, (), remark,
    )  # fmt: skip
    why = " ".join(
        explain_missing_gradients(
            gradients.unused if gradients is not None else (),
            ReachableObjects({"model": model, "guide": guide}).modules,
            batch.names,
            [name for name in batch.names if batch.presence(name) is False],
            sites.summed_out,
            type(estimator).__name__,
        )
    )
    ranked = sorted(findings(found, isinstance(estimator, PerRow), clash, why), key=lambda x: x[0])
    return replace(found, findings=tuple(text for _, text in ranked))


def _clash(estimator: Any, model: Any, guide: Any, batch: Batch) -> str:
    """Why one of Pyro's own estimators, which do not ask, is wrong for a pair."""
    try:
        check_pairing(estimator, pair_structure(model, guide, batch))
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of sites that the report speaks of."""
    with warnings.catch_warnings():
        for message in (".*is in the model and not in the guide", "Found .*vars in"):
            warnings.filterwarnings("ignore", message=message)
        yield


# -- the report ---------------------------------------------------------------------------------------------------


# -- findings -----------------------------------------------------------------------------------------------------
