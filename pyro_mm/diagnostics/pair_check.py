"""Check of a pair and an objective on some rows: sites, bounds, the guide as a proposal, and gradient noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pyro.infer import ELBO

from ..batch.batch import Batch, check_batch
from ..estimators import PerRow, check_pairing
from ..evidence.evidence import Evidence
from ..evidence.likelihood import log_marginal
from ..objectives.bounds import AFTER_WARM_UP, Target
from ..objectives.objective import Objective
from ..sampling.particle_sampler import ProposalScheme
from ..sampling.proposals import resolve_proposal
from ..scoring.audit.sites import Sites
from ..scoring.evaluation import evaluating
from ..scoring.prepare_objective import prepare_objective
from ..scoring.program_errors import explain_errors
from ..scoring.structure import pair_structure
from ..scoring.training_objective import PreparedObjective
from ..training.missing_gradients import explain_missing_gradients
from ..utils.arguments import check_counts, check_flag, check_programs, check_seed
from ..utils.modules import preserve_buffers
from ..utils.reachable import ReachableObjects
from .bound_gap import (
    ObjectiveValue,
    bound_target,
    elbo_gap,
    estimator_of,
    objective_gap,
    objective_value,
    table_of,
    undefined_gap_reason,
)
from .check_report import Check, findings
from .gradient_noise import GradientNoise, gradient_noise
from .site_checks import inspect_sites


def check(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: Any,
    batch: Batch,
    *,
    num_particles: int = 1000,
    proposal: ProposalScheme | str | None = None,
    repeats: int = 20,
    seed: int = 0,
    step: int | None = None,
    vectorize: bool = True,
) -> Check:
    r"""Check a story, a guide and an objective on some rows, and report mistakes.

    The report has five parts:

    * Sites: the latents and modalities of model and guide, those that one of them lacks, and programs that read values
      of a modality in rows that lack it.
    * Bounds: the gap :math:`\sum_i w_i \log p(x_{S_i}) - L` of an objective L that is a lower bound on such a sum, and
      that of the plain ELBO, :math:`E_n KL(q(z | x_n) \| p(z | x_n))`, at the weights after any warm-up.
    * Values: the objective's terms, by the labels of its ``by_term``.
    * The guide as a proposal: Pareto k-hat and effective sample size (:func:`~pyro_mm.log_marginal`), with everything
      that is present and with each modality alone.
    * The signal-to-noise ratio of the gradient, by part of model and guide, and the parameters without a gradient.

    An objective of one's own has no table of terms, so no bound and no gap are known; everything else is reported.
    Networks run in evaluation mode, but in their present mode for the gradient. Modules, objective, ``.grad`` and
    generators are left as they were; a ``pyro.param`` that has never run enters Pyro's store, as in any run.

    Args:
        model, guide: callables of a batch.
        objective: an :class:`~pyro_mm.objectives.Objective`, a ``pyro.infer.ELBO``, or one's own
            :class:`~pyro_mm.TrainingObjective`: an object or module with ``evaluate``, or a function.
        batch: N rows; a few hundred are enough.
        num_particles: K, draws per row of the log-likelihoods.
        proposal: the way to draw them: an :class:`mm.Proposal <pyro_mm.Proposal>` from the guide, the default; or an
            :class:`mm.Fitted <pyro_mm.Fitted>` to each row or ``"fitted"``, by which gaps hold where the guide is a
            poor proposal, about which the report then says nothing.
        repeats: R, gradients from which the noise is estimated.
        seed: of all draws.
        step: gradient steps taken so far, at which the gradient is taken and an objective of one's own is evaluated.
            None takes the objective's own count in use as a ``pyro.infer.ELBO``, 0 for one without.
        vectorize: False runs draws one by one, for stories that do not broadcast.

    Returns:
        A :class:`Check`; ``print`` shows the report.

    Raises:
        Errors of the story and the guide themselves on these rows. Errors of an objective or a likelihood are part of
        the report, and held in ``errors``.

    Example::

        print(mm.check(model, guide, mm.objectives.elbo(), batch[:200]))
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    prepared = prepare_objective(objective)
    check_counts(num_particles=num_particles)
    check_counts(2, repeats=repeats)
    check_seed(seed)
    check_flag("vectorize", vectorize)
    scheme = resolve_proposal(proposal)
    batch = batch._copy(total=None, _index=None)  # these rows are the data: nothing is scaled up to others
    return _PairCheck(model, guide, prepared, num_particles, scheme, seed, vectorize).run(batch, repeats, step)


class _PairCheck:
    """Run of the checks of a pair, which gathers their errors and the log-likelihoods that they share."""

    def __init__(
        self,
        model: Any,
        guide: Any,
        objective: PreparedObjective,
        num_particles: int,
        proposal: ProposalScheme,
        seed: int,
        vectorize: bool,
    ):
        self.model = model
        self.guide = guide
        self.objective = objective
        self.num_particles = num_particles
        self.proposal = proposal
        self.seed = seed
        self.table = table_of(objective)
        self.estimator = estimator_of(objective)
        self.vectorize = vectorize and _broadcasts(self.table)
        self.errors: dict[str, Exception] = {}
        self.known_evidence: dict[frozenset[str], Evidence] = {}

    def run(self, batch: Batch, repeats: int, step: int | None) -> Check:
        """Check the pair on a batch."""
        model = self.model
        guide = self.guide
        objective = self.objective
        seed = self.seed
        value_step = AFTER_WARM_UP if self.table is not None else step or 0
        with preserve_buffers(model, guide, *objective.modules), _no_site_warnings():
            with evaluating(model, guide, batch, audit=False) as rows:
                with explain_errors({"model": model, "guide": guide}, rows.size):
                    sites = inspect_sites(model, guide, rows, seed, stacked=self.vectorize)
                joint = self.evidence_of_each(rows, sites)
                target = bound_target(objective, rows.names)
                value = self.attempt("the objective", objective_value, objective, model, guide, rows, seed, value_step)
                gap = None
                remark = undefined_gap_reason(target)
                plain = None
                if joint is not None:
                    gap, remark = self.gap_to(target, rows, value)
                    plain = self.attempt("the ELBO", elbo_gap, model, guide, rows, joint, seed)
            gradients = self.attempt(
                "the gradient", gradient_noise, model, guide, objective, batch, repeats=repeats, seed=seed, step=step
            )
            pairing_error = self.pairing_error(batch)

        found = Check(
            rows=batch.size,
            sites=sites,
            objective=_objective_text(objective, self.estimator, target),
            gap=gap,
            elbo=plain,
            evidence={e.quantity: e for e in self.known_evidence.values()},
            gradients=gradients,
            errors=self.errors,
            findings=(),
            remark=remark,
            value=value,
        )
        per_row = None if self.estimator is None else isinstance(self.estimator, PerRow)
        reason = self.missing_gradient_reason(batch, sites, gradients)
        ranked = sorted(findings(found, per_row, pairing_error, reason), key=lambda finding: finding[0])
        return replace(found, findings=tuple(text for _, text in ranked))

    def attempt(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return the result of a function; None if it raises, which the report says."""
        try:
            return function(*arguments, **options)
        except Exception as error:  # the story and the guide themselves have run
            self.errors[what] = error
            return None

    def evidence(self, batch: Batch, names: frozenset[str]) -> Evidence:
        """Return the log-likelihood of some modalities, estimated at the first call."""
        if names not in self.known_evidence:
            self.known_evidence[names] = log_marginal(
                self.model,
                self.guide,
                batch.only(*(n for n in batch.names if n in names)),
                num_particles=self.num_particles,
                proposal=self.proposal,
                seed=self.seed,
                vectorize=self.vectorize,
                audit=False,
            )
        return self.known_evidence[names]

    def evidence_of_each(self, batch: Batch, sites: Sites) -> Evidence | None:
        """Estimate the log-likelihood of all modalities and of each alone; return that of all."""
        joint: Evidence | None = self.attempt("the likelihood", self.evidence, batch, frozenset(batch.names))
        alone = [name for name in sites.observed if batch.presence(name) is not False]
        if joint is not None and len(alone) > 1:
            for name in alone:
                self.attempt(f"the likelihood of {name!r} alone", self.evidence, batch, frozenset({name}))
        return joint

    def gap_to(self, target: Target | None, batch: Batch, value: ObjectiveValue | None) -> tuple[Any, str]:
        """Return the gap of the objective to its target, or None and the reason.

        Args:
            target: what the objective bounds.
            batch: N rows.
            value: the objective's value on them; None if it cannot be computed.
        """
        reason = undefined_gap_reason(target)
        if target is None or reason:
            return None, reason
        if shared := sorted(pair_structure(self.model, self.guide, batch).global_latents):
            names = ", ".join(map(repr, shared))
            return None, f"no gap: it bounds log p of all rows together, and log-likelihoods here are given {names}"
        what = "the gap of the objective"
        gap = self.attempt(
            what,
            objective_gap,
            target,
            self.objective,
            self.model,
            self.guide,
            batch,
            lambda names: self.evidence(batch, names),
            self.seed,
            value,
        )
        return gap, "" if gap or what in self.errors else "no gap: no row here has every modality"

    def pairing_error(self, batch: Batch) -> str:
        """Return the reason why one of Pyro's own estimators, which do not check, is wrong for the pair."""
        if self.estimator is None or isinstance(self.objective, Objective):
            return ""
        try:
            check_pairing(self.estimator, pair_structure(self.model, self.guide, batch))
        except ValueError as error:
            return str(error)
        return ""

    def missing_gradient_reason(self, batch: Batch, sites: Sites, gradients: GradientNoise | None) -> str:
        """Return the reason why some parameters have no gradient; empty if all have one."""
        if gradients is None or not gradients.unused:
            return ""
        reached = ReachableObjects({"model": self.model, "guide": self.guide}).modules
        absent = [name for name in batch.names if batch.presence(name) is False]
        estimator = self.objective.estimator_name if self.estimator is None else type(self.estimator).__name__
        return " ".join(
            explain_missing_gradients(gradients.unused, reached, batch.names, absent, sites.summed_out, estimator)
        )


def _broadcasts(table: Objective | None) -> bool:
    """Return False if the objective evaluates its terms or particles one by one."""
    if table is None:
        return True
    estimator = table.estimator
    return table.vectorize and (not isinstance(estimator, PerRow) or estimator.vectorize_particles)


def _objective_text(objective: PreparedObjective, estimator: ELBO | None, target: Target | None) -> str:
    """Describe an objective by its estimator and its target."""
    if estimator is None:
        return f"{objective.estimator_name}, an objective without a table of terms"
    name = repr(estimator) if isinstance(estimator, PerRow) else type(estimator).__name__
    if isinstance(objective, Objective):
        name = objective.estimator_text
    return f"{name}; {target}"


@contextmanager
def _no_site_warnings() -> Iterator[None]:
    """Silence the warnings about sites, which the report has in its findings."""
    with warnings.catch_warnings():
        for message in (".*is in the model and not in the guide", "Found .*vars in"):
            warnings.filterwarnings("ignore", message=message)
        yield
