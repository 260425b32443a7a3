r"""Probabilities of the classes of a latent that is summed out, by importance sampling, with errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..distributions.base import base_distribution
from ..sampling.class_weights import ClassWeights
from ..sampling.particle_sampler import ProposalScheme
from ..sampling.shared_blocks import SharedBlock, share_blocks, shared_weights
from ..sampling.weighted import ImportanceSampling
from ..scoring.classes import classes_of_site
from ..scoring.evaluation import evaluating, move_result
from ..scoring.program import Program
from ..scoring.program_runs import propose, run_model
from ..scoring.sharing import share_evaluation
from ..scoring.structure import latent_sites, pair_structure, private_modality
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.arguments import check_name, check_programs
from ..utils.seeding import temporary_seed
from ..utils.sharing import sharing
from .accumulator import WeightAccumulator
from .class_sums import ClassAccumulator
from .evidence import Evidence, concatenate
from .likelihood import importance_sampling, name_proposal, split_proposal
from .quantity import name_quantity


@dataclass(frozen=True)
class ClassProbabilities:
    r"""Estimated probabilities p(y = c | x_S) of the C classes of a latent y, for N rows, with standard errors.

    With the importance weights split by class, :math:`w_{kc} = p(x_S, z_k, y = c) / q(z_k)`,

    .. math:: \hat p_c = \frac{\sum_k w_{kc}}{\sum_k \sum_{c'} w_{kc'}}

    Attributes:
        probabilities (Tensor): :math:`\hat p_c`, ``(N, C)``, in [0, 1]; NaN in rows without finite weights.
        standard_error (Tensor): of ``probabilities`` by the finite number of draws, ``(N, C)``, by the delta method of
            a ratio; NaN for a single independent group of draws.
        classes (Tensor): values of the latent, ``(C, *event)``; 0, .., C - 1 for a mixture's components.
        site (str): name of the latent.
        evidence (Evidence): log p(x_S) of the same draws, with their k-hat and effective sample size per row. Where it
            is doubtful, so are the probabilities.

    Example:
        >>> import torch, pyro_mm as mm
        >>> p = mm.ClassProbabilities(torch.tensor([[0.9, 0.1]]), torch.zeros(1, 2), torch.arange(2), "y", None)
        >>> p.most_probable
        tensor([0])
    """

    probabilities: Tensor
    standard_error: Tensor
    classes: Tensor
    site: str
    evidence: Evidence

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.probabilities)

    @property
    def most_probable(self) -> Tensor:
        """The most probable class of each row, one of ``classes``, ``(N, *event)``."""
        return self.classes[self.probabilities.argmax(-1)]

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the draws, ``(N,)``, between 1 and K."""
        return self.evidence.ess

    @property
    def pareto_k(self) -> Tensor:
        """k-hat, the shape of the tail of the weights, ``(N,)``; above 0.7 a row is not to be trusted."""
        return self.evidence.pareto_k

    @property
    def doubtful(self) -> Tensor:
        """Rows not to be trusted, boolean ``(N,)``: those whose evidence is doubtful."""
        return self.evidence.doubtful

    def __getitem__(self, rows: Any) -> ClassProbabilities:
        """Return the probabilities of some rows, by a slice, a mask, indices or one index."""
        evidence = self.evidence[rows]
        if isinstance(rows, int) or getattr(rows, "ndim", None) == 0:
            rows = [int(rows)]
        return ClassProbabilities(
            self.probabilities[rows], self.standard_error[rows], self.classes, self.site, evidence
        )

    def __repr__(self) -> str:
        evidence = self.evidence
        num_classes = len(self.classes)
        largest = self.standard_error.nan_to_num(0.0).max().item()
        heavy = "too few draws for k-hat" if evidence.few else f"k-hat > 0.7 in {evidence.untrusted():.1%}"
        return (
            f"ClassProbabilities(p({self.site} | x): {evidence.rows_text}, {num_classes} classes, "
            f"largest standard error {largest:.3f}, K = {evidence.num_particles}, {heavy}"
            f"{''.join(f'; {note}' for note in evidence.notes)})"
        )


def class_probabilities(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    site: str,
    *,
    num_particles: int = 1000,
    proposal: ProposalScheme | Program | Batch | str | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> ClassProbabilities:
    r"""Estimate p(y = c | x_S) per row, for the classes of a latent or a modality, or the components of a prior.

    .. math:: p(y = c | x_S) \approx \frac{\sum_k w_{kc}}{\sum_k \sum_{c'} w_{kc'}}, \qquad
              w_{kc} = \frac{p(x_S, z_k, y = c)}{q(z_k)}, \qquad z_k \sim q(z | x_S)

    with S the modalities present in the row, and all other enumerated latents summed out. Where the prior of a
    continuous latent is a mixture, its site names the mixture's component: :math:`p(x_S, z_k, y = c) =
    \pi_c \, p_c(z_k) \, p(x_S | z_k)`. So clusters and classes are read off a story, and labels from rows without one.

    **Bias.** A ratio of two estimates is off by O(1/K), towards what the guide's draws alone say. **Standard error.**
    By the delta method, for each class; of a class that no draw supports it is 0, as its probability. **When not to
    trust a row.** As in :func:`~pyro_mm.log_marginal`: by the k-hat of the weights, in ``result.evidence``.

    The site may also be a modality, such as a label: where it is missing, :math:`w_{kc} = p(x_S, z_k, y = c) / q(z_k)`
    as for a latent; where it is present its class is certain. So ``batch.without("label")`` gives p(label | image).
    :func:`pyro_mm.metrics.class_probabilities` averages over the guide's draws instead, without weights and errors.

    Args:
        model (callable): a story, called with a batch.
        guide (callable): called with a batch. It either lacks the site, or has it enumerated, as by
            ``pyro.infer.config_enumerate``; for the component of a prior it draws the site.
        batch (Batch): N rows, each with something present.
        site (str): a discrete latent in the plate ``"data"`` that is summed out, a latent whose prior is a mixture, or
            a discrete modality.
        num_particles (int): K, draws per row.
        proposal: the way to draw, as in :func:`~pyro_mm.log_marginal`.
        seed (int): of all draws; None takes one from torch's generator, which is not otherwise used.
        chunk (int): (row, particle) pairs decoded at once, as in :func:`~pyro_mm.log_marginal`.
        vectorize (bool): False scores particle by particle, for stories that do not broadcast.
        audit (bool): False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.
        devices (int): processes that share out the work, as in :func:`~pyro_mm.log_marginal`.

    Returns:
        A :class:`ClassProbabilities` of N rows and C classes.

    Raises:
        ValueError: a site that is unknown, drawn by the guide, without classes, or in plates within a row; a modality
            with a private latent; rows in which nothing is present; and all that :func:`~pyro_mm.log_marginal` refuses.

    Example:
        Clusters of two Gaussians at -1 and 1, whose probabilities are known:

        >>> import torch, pyro, pyro.distributions as dist, pyro_mm as mm
        >>> def model(batch):
        ...     with batch.plate():
        ...         y = pyro.sample("y", dist.Bernoulli(0.5))
        ...         z = pyro.sample("z", dist.Normal(2 * y - 1, 0.5))
        ...         batch.observe("x", dist.Normal(z, 0.5))
        >>> batch = mm.Batch({"x": torch.tensor([-1.0, 0.0, 0.5])})
        >>> guide = mm.Guide(z=lambda batch: dist.Normal(batch["x"], 0.5))
        >>> found = mm.class_probabilities(model, guide, batch, "y", seed=0)
        >>> exact = torch.sigmoid(2 * batch["x"] / 0.5)
        >>> bool(((found.probabilities[:, 1] - exact).abs() < 4 * found.standard_error[:, 1]).all())
        True
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_name("site", site, what="site")
    sampled_guide, guide_batch, scheme = split_proposal(proposal, guide, batch)
    settings = importance_sampling(
        num_particles=num_particles, proposal=scheme, seed=seed, chunk=chunk, vectorize=vectorize
    )

    def estimate() -> ClassProbabilities:
        return _estimate_all(model, sampled_guide, batch, guide_batch, site, settings, audit)

    return share_evaluation("class_probabilities", devices, model, sampled_guide, batch, seed, estimate)


def _estimate_all(
    model: Program,
    guide: Program,
    batch: Batch,
    guide_batch: Batch,
    site: str,
    settings: ImportanceSampling,
    audit: bool,
) -> ClassProbabilities:
    """Estimate the probabilities in all rows, in evaluation mode, block by block of rows."""
    settings = replace(settings, seed=sharing().broadcast(settings.seed))
    with evaluating(model, guide, batch, audit=audit, stacked=settings.stacked, guide_batch=guide_batch) as rows:
        shown = rows if guide_batch is batch else guide_batch.to(rows.device)
        classes = _find_classes(model, guide, rows, shown, site)

        def estimate(block: SharedBlock) -> tuple[Tensor, Tensor, Evidence]:
            return _estimate(model, guide, block.rows, block.shown, settings.for_rows(block.first), classes)

        parts = share_blocks(model, guide, rows, shown, settings, estimate)
        evidence = name_quantity(concatenate([e for _, _, e in parts]), model, guide, rows, shown)
        result = ClassProbabilities(
            torch.cat([p for p, _, _ in parts]),
            torch.cat([error for _, error, _ in parts]),
            classes.classes,
            site,
            evidence,
        )
        return move_result(result, rows, batch)


def _estimate(
    model: Program,
    guide: Program,
    batch: Batch,
    guide_batch: Batch,
    settings: ImportanceSampling,
    classes: ClassWeights,
) -> tuple[Tensor, Tensor, Evidence]:
    """Return (probabilities, standard errors, evidence) of one block of rows."""
    by_class: ClassAccumulator | None = None
    for log_weights, sampler, shared in shared_weights(model, guide, batch, settings, guide_batch, classes):
        if by_class is None:
            by_class = ClassAccumulator(sampler.group_size)
            whole = WeightAccumulator(settings.num_particles, sampler.group_size, shared)
        by_class.add(log_weights)
        whole.add(log_weights.logsumexp(0))
    assert by_class is not None  # there is one particle at least
    evidence = name_proposal(whole.evidence(""), settings, sampler)
    probabilities, errors = (x.to(evidence.log_prob.dtype) for x in by_class.shares())
    return probabilities, errors, evidence


@torch.no_grad()
def _find_classes(model: Program, guide: Program, batch: Batch, guide_batch: Batch, site: str) -> ClassWeights:
    """Return the site by whose classes weights are split, from a run on two rows.

    Raises:
        ValueError: a site that has none, or rows in which nothing informs on it.
    """
    structure = pair_structure(model, guide, guide_batch)
    few = TermViews.of(batch[: min(2, batch.size)], structure)
    few_shown = TermViews.of(guide_batch[: min(2, batch.size)], structure)
    views = TermViews(few_shown.encode, few.decode, few_shown.encode, structure.nesting).given_globals(structure)
    pair = TermPair(model, guide, views)
    with temporary_seed(0, batch.device), poutine.block():
        propose(pair, structure)
        trace = run_model(pair, structure)

    sites = latent_sites(trace)
    if site in sites:
        classes = classes_of_site(site, sites[site], site in latent_sites(pair.trace))
        _check_rows(batch, site, structure.modalities)
        return ClassWeights(site, classes, observed=False)
    if site not in structure.modalities:
        known = ", ".join(map(repr, [*sites, *sorted(structure.modalities)]))
        raise ValueError(f"unknown site {site!r}: the model has {known}")
    if f"w_{site}" in sites:
        raise ValueError(
            f"modality {site!r} has a latent of its own, 'w_{site}', which the guide does not infer where the modality "
            f"is missing: take log_conditional with target={site!r}, once for each class"
        )
    with temporary_seed(0, batch.device), poutine.block():
        return ClassWeights(site, _classes_of_modality(model, guide, batch, guide_batch, site), observed=True)


def _classes_of_modality(model: Program, guide: Program, batch: Batch, guide_batch: Batch, site: str) -> Tensor:
    """Return the classes of a modality, ``(C, *event)``, from one run on two rows without it.

    Raises:
        ValueError: a modality without classes, one in plates within a row, or rows in which nothing is present.
    """
    _check_rows(batch, site, frozenset())
    few, few_shown = batch[: min(2, batch.size)], guide_batch[: min(2, batch.size)]
    guide_trace = poutine.trace(guide).get_trace(few_shown)
    replayed = poutine.replay(model, trace=guide_trace)
    trace = poutine.trace(replayed).get_trace(few.without(site) if site in few else few)
    found = trace.nodes[site]
    inner = [f.name for f in found["cond_indep_stack"] if f.vectorized and f.name != "data"]
    if inner:
        raise ValueError(
            f"modality {site!r} lies in the plate {inner[0]!r} within each row, so that a row has several classes: "
            "take a site directly in the plate 'data'"
        )
    fn = found["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    values = None
    if fn.has_enumerate_support:
        with suppress(NotImplementedError):  # as of a Binomial whose rows have unlike numbers of trials
            values = fn.enumerate_support(expand=False)
    if values is None:
        family = type(base_distribution(fn)).__name__
        raise ValueError(
            f"modality {site!r} has no classes: it is a {family} of event shape {tuple(fn.event_shape)}, and not one "
            "discrete value per row"
        )
    classes: Tensor = values.reshape(len(values), *fn.event_shape)
    return classes


def _check_rows(batch: Batch, site: str, modalities: frozenset[str]) -> None:
    """Raise a ValueError if there are rows in which nothing present informs on a site."""
    modality = private_modality(site, modalities)
    having = batch.having() if modality is None else batch.having([modality])
    if bool(having.all()):
        return
    row = int((~having).nonzero()[0])
    if modality is None:
        raise ValueError(
            f"row {row} has nothing present, and {site!r} has its prior there: leave such rows out, "
            "batch[batch.having()]"
        )
    raise ValueError(
        f"row {row} lacks {modality!r}, to which {site!r} is private, so that it has its prior there: leave such rows "
        f"out, batch[batch.having({modality!r})]"
    )
