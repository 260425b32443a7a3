r"""An objective: a table of terms (:mod:`pyro_mm.objectives.terms`), and an estimator of its value.

Its weights belong to the objective: ``poutine.scale`` refuses those that are not positive, forbids enumeration where
they differ, and lands inside the logarithm of an importance-weighted bound.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..batch.context import Cache
from ..estimators import AnalyticKL, PerRow, check_pairing, stacks_particles
from ..scoring.prepare_objective import untraceable_reason
from ..scoring.program import Program
from ..scoring.structure import PairStructure, pair_structure
from ..scoring.training_objective import Layout, Loss, Player, PreparedObjective, StepWeights, plain_attributes
from ..utils.arguments import check_flag, check_function, describe
from . import pyro_elbos, subsampling
from .bounds import Target, is_linear, is_lower_bound, target
from .critic_players import critic_players
from .critic_terms import target_by_critics
from .critics import Critic, Key, check_critics, key_text, module_dict
from .evaluation import Evaluation, combine
from .expansion import expand
from .feature_likelihood import FeatureLikelihood, target_by_features
from .html import objective_html
from .plan import PlanCache
from .terms import Number, Term, check_nonnegative, check_table, step_weight, weights_in_order

if TYPE_CHECKING:
    from .vae_gan import VAEGAN, Discriminator

Terms = Sequence[Term] | Callable[[tuple[str, ...]], Sequence[Term]]

# The plans of objectives, apart from these: an evaluation changes nothing of an objective.
_plans: weakref.WeakKeyDictionary[Objective, PlanCache] = weakref.WeakKeyDictionary()


class Objective(ELBO, PreparedObjective):
    """A sum of terms as one ``pyro.infer.ELBO``, for ``SVI``, a hand-written loop, or ``pyro_mm.fit``.

    Args:
        terms: the table; or a function from the modalities' names to it, where its weights depend on their number.
        estimator: any ``pyro.infer.ELBO``; by default :class:`~pyro_mm.estimators.AnalyticKL`. Those of
            :mod:`pyro_mm.estimators` evaluate all terms in one pass and report each of them in ``by_term``.
        vectorize: False evaluates term by term, with equal results, for stories or guides that do not broadcast.
        subsample: how many modalities an evaluation with gradient decodes; None decodes all. See :meth:`subsampled`.

    A term that decodes nothing is a penalty, and always a KL, whatever the estimator: an importance-weighted "KL"
    would tend to zero. A term's importance-weighted bound is of ``likelihood * log p + kl * (log r - log q)`` with
    the (single, positive) likelihood weight taken out of the logarithm.

    Attributes:
        critics: modality, or modalities, -> critic; see :meth:`with_critics`.
        steps: gradient evaluations so far, the argument of weights that are functions of the step.
        by_term: label -> value of each term in the latest evaluation (higher is better; summed over rows). Pyro's own
            estimators know only the sum of terms that they evaluate in one pass; ``vectorize=False`` tells them apart.
    """

    def __init__(
        self, terms: Terms, estimator: ELBO | None = None, *, vectorize: bool = True, subsample: int | None = None
    ):
        super().__init__()
        is_function = callable(terms) and not isinstance(terms, ELBO)
        self.terms = check_function("terms", terms, ("names",)) if is_function else check_table(terms)
        self.estimator = AnalyticKL() if estimator is None else _check_estimator(estimator)
        self.vectorize = check_flag("vectorize", vectorize)
        self.subsample = subsample
        self.critics: dict[Key, Critic] = {}
        self._features: Mapping[str, FeatureLikelihood] = {}
        subsampling.check_subsample(subsample, self.estimator_text, self.linear)
        self.steps = 0
        self.by_term: dict[str, Tensor] = {}
        self._names: tuple[str, ...] | None = None

    def __call__(self, model: Program, guide: Program) -> torch.nn.Module:
        """Return the loss as a module that holds model and guide, and is called with a batch."""
        module: torch.nn.Module = super().__call__(model, guide)
        return module

    def __repr__(self) -> str:
        return self.describe(self._names)

    def _repr_html_(self) -> str:
        return objective_html(self, self._names)

    def describe(self, names: tuple[str, ...] | None) -> str:
        """Return estimator, target and terms in words, for modalities of these names; None if they are not known."""
        table = "  (terms depend on the modalities)" if callable(self.terms) and names is None else ""
        rows = [f"  {term!r}" for term in self._table(names)] if not table else [table]
        some = "" if self.subsample is None else f", modalities subsampled: {self.subsample} decoded per step"
        head = f"Objective, {self.estimator_text}{some}; {self._target_text(names)}"
        critics = [f"  critic of {key_text(key)} {critic.settings}" for key, critic in self.critics.items()]
        return "\n".join([head, "  (encode, decode, given)", *rows, *critics])

    @property
    def estimator_text(self) -> str:
        """Short text of the estimator."""
        return repr(self.estimator) if isinstance(self.estimator, PerRow) else type(self.estimator).__name__

    @property
    def target(self) -> str:
        """Quantity that the objective bounds, in words; with the modalities' names once it was used as an ELBO."""
        return self._target_text(self._names)

    def _target_text(self, names: tuple[str, ...] | None) -> str:
        waits = callable(self.terms) or any(isinstance(term.likelihood, Mapping) for term in self.terms)
        return "known with the modalities" if waits and names is None else str(self.bounds(names))

    def bounds(self, names: Sequence[str] | None = None, present: Collection[str] | None = None) -> Target:
        """Return the quantity that the objective bounds, read off the table.

        Args:
            names: the batch's modalities; without them the text says x for all of them.
            present: those that the rows in question have; None for all.
        """
        names = None if names is None else tuple(names)
        table = self._table(names)
        found = target(table, names, lower=self.lower, linear=self.linear, present=present)
        found = target_by_critics(found, table, self.critics, names)
        return target_by_features(found, table, self._features, names)

    @property
    def lower(self) -> bool:
        """True if the estimator's mean is known to be no larger than the log-evidence that it estimates."""
        return is_lower_bound(self.estimator)

    @property
    def linear(self) -> bool:
        """True if the estimator is a mean of log-weights, and takes no logarithm of a mean of weights."""
        return is_linear(self.estimator)

    def subsampled(self, modalities: int | None) -> Objective:
        r"""Return the objective that decodes k = ``modalities`` of the M modalities in an evaluation with gradient.

        .. math:: E_S \Big[ \frac{M}{k} \sum_{m \in S} \log p(x_m | z) \Big] = \sum_m \log p(x_m | z), \qquad |S| = k

        They are drawn uniformly, anew each time and for all rows at once, as by a Pyro plate over the modalities with a
        ``subsample_size``; a private latent counts with its modality. Value, gradient and ``by_term`` are unbiased
        estimates of those of the whole objective. Only decoding is subsampled: posteriors see all modalities, and sums
        over ``EACH`` are complete. Decoders not drawn do not run, and have no gradient at that step, so that torch's
        optimisers pass over them. An evaluation without gradient (``loss``, and so the validation of ``fit``) decodes
        all modalities.

        Args:
            modalities: k; None decodes all again.

        Raises:
            ValueError: an estimator that takes the logarithm of a mean of weights; in use, fewer modalities than k, an
                enumerated site, a modality that is the parent of another one.
        """
        subsampling.check_subsample(modalities, self.estimator_text, self.linear)
        new = copy.copy(self)
        new.subsample = modalities
        return new

    def with_critics(self, critics: Mapping[Key, Critic]) -> Objective:
        r"""Return the objective with critics in the place of the likelihoods of implicit modalities.

        .. math:: \log p(x_m | z) \approx \log p_d(x_m) + T_G(x_m, z) - T_S(x_m, z)

        Up to the entropy :math:`H(x_m)` of the data, which is a constant, the value is that of the table. ``fit``
        trains critics and generators as further players, with columns ``"critic <name>"``, its ``accuracy`` (0.5 if it
        cannot tell values of the data and generated ones apart), and ``"generator <name>"`` in the history. In a loop
        by hand their losses are those of :meth:`players`. A critic stays with the objective: its networks are saved in
        checkpoints, and trained further by a second ``fit``.

        Args:
            critics: modality -> :class:`~pyro_mm.objectives.Critic`; or a tuple of implicit modalities -> one critic
                against the prior, which is shown all of them in that order. Its columns are ``"critic image+sound"``.

        Raises:
            TypeError, ValueError: something else; in use, a modality that has a density, an estimator of Pyro, an
                enumerated latent, a generator that shares networks with other decoders, a term that cannot have a
                critic against the prior.

        Example:
            >>> import torch, pyro, pyro_mm as mm
            >>> rows = mm.Batch({"x": torch.randn(64, 2), "y": torch.arange(64) % 3})
            >>> decoders = {
            ...     "x": mm.conditionals.Implicit(mm.nn.MLP(2 + 4, 2, (8,)), noise=4),
            ...     "y": mm.conditionals.Categorical(mm.nn.MLP(2, 3, ())),
            ... }
            >>> encoders = {"x": mm.nn.MLP(2, 4, (8,)), "y": torch.nn.Embedding(3, 4)}
            >>> prior = pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1)
            >>> model = mm.models.SharedLatent(prior, decoders)
            >>> experts = {name: mm.conditionals.Normal(net) for name, net in encoders.items()}
            >>> guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts))
            >>> critic = mm.objectives.Critic(mm.nn.MLP(2 + 2, 3, (8,)))
            >>> objective = mm.objectives.elbo().with_critics({"x": critic})
            >>> history = mm.fit(model, guide, objective, rows, epochs=1, seed=0, progress=False)
            >>> list(history.columns)
            ['loss', '(*, *, P)', 'critic x', 'critic x accuracy', 'generator x']
        """
        new = copy.copy(self)
        new.critics = check_critics(critics)
        return new

    def _with_terms(self, terms: Terms) -> Objective:
        """Return an objective of other terms, with the settings of this one."""
        new = Objective(terms, self.estimator, vectorize=self.vectorize, subsample=self.subsample)
        new.critics = self.critics
        new._features = self._features
        return new

    def _with_features(self, features: Mapping[str, FeatureLikelihood]) -> Objective:
        """Return the objective with likelihoods of features in the place of those of some modalities."""
        new = copy.copy(self)
        new._features = dict(features)
        return new

    def with_discriminators(self, discriminators: Mapping[str, Discriminator]) -> VAEGAN:
        r"""Return the objective of a story with VAE-GAN modalities, each with a discriminator of what is generated.

        See :mod:`pyro_mm.objectives.vae_gan` for the three losses. The modality keeps its explicit likelihood, and
        evidence of the story is of that.

        Args:
            discriminators: modality -> :class:`~pyro_mm.objectives.Discriminator`.

        Raises:
            TypeError, ValueError: no discriminators, or an estimator that takes its gradient itself.

        References:
            Suzuki et al. 2016 (arXiv:1611.01891); Larsen et al. 2016 (arXiv:1512.09300).
        """
        from .vae_gan import VAEGAN

        return VAEGAN(self, discriminators)

    def __add__(self, other: Any) -> Objective:
        """Return the sum of two objectives; see :mod:`pyro_mm.objectives.sums`."""
        from .sums import add, as_objective

        return self if isinstance(other, int | float) and other == 0 else add(self, as_objective(other))

    def __radd__(self, other: Any) -> Objective:
        from .sums import add, as_objective

        if isinstance(other, int | float) and other == 0:  # with which Python's sum() begins
            return self
        return add(as_objective(other), self)

    def __mul__(self, weight: Any) -> Objective:
        """Return the objective times a number, or times a function of the step, nowhere negative."""
        return self.scaled(check_nonnegative("the weight of an objective", weight))

    __rmul__ = __mul__
    __array_ufunc__ = None  # so that a number of NumPy leaves the product to us

    def scaled(self, weight: Number) -> Objective:
        """Return the objective times a weight, outside of any logarithm."""
        terms = self.terms
        if callable(terms):
            make_table = terms

            def scaled_terms(names: tuple[str, ...]) -> Sequence[Term]:
                return [term.scaled(weight) for term in make_table(names)]

            new_terms: Terms = scaled_terms
        else:
            new_terms = [term.scaled(weight) for term in terms]
        return self._with_terms(new_terms)

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """True if there is a differentiable loss; if not, ``loss_and_grads`` trains all the same."""
        return pyro_elbos.differentiable(self.estimator)

    # -- as a prepared objective ------------------------------------------------------------------------------------

    ignores_padding = True

    @property
    def estimator_name(self) -> str:
        return type(self.estimator).__name__

    @property
    def untraceable(self) -> str | None:  # type: ignore[override]
        """Reason why a step cannot be compiled, or None."""
        if self.subsample is not None:
            return "the modalities that it decodes are drawn in Python, anew at every step"
        return None if isinstance(self.estimator, PerRow) else untraceable_reason(self.estimator)

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        """Return minus the objective: summed over rows, averaged over particles, scaled by a subsampled data plate.

        Args:
            model, guide: callables of a batch.
            batch: rows, any of whose modalities may be missing.
            step: the gradient step, from 0, at which weights that depend on it are taken.

        Returns:
            The loss in nats, a scalar to be differentiated, and the value of each term, of which higher is better.
        """
        return self._evaluate(model, guide, batch, _at_step(step))

    def evaluate_with_gradient(self, model: Program, guide: Program, batch: Batch, *, step: int) -> Loss:
        """Return the loss without a graph, after its gradient was added to the parameters'.

        Args:
            model, guide, batch, step: as for :meth:`evaluate`.
        """
        if self.differentiable:
            return super().evaluate_with_gradient(model, guide, batch, step=step)
        return self._evaluate(model, guide, batch, _at_step(step), takes_gradient=True)

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        """Return the weights that depend on the step, in the table's order.

        The form of the loss depends on likelihood weights that are not positive; on the table's constants; and on the
        estimator and its settings.
        """
        values: list[float] = []
        fixed: dict[int, float] = {}

        def at(weight: Callable[[int], float], kind: str) -> float:
            values.append(step_weight(weight, step))
            if kind == "likelihood" and values[-1] <= 0:
                fixed[len(values) - 1] = values[-1]
            return values[-1]

        table = self._table(names)
        for term in table:
            term.evaluated(at)
        settings = plain_attributes(self.estimator)
        form = (self.vectorize, self.subsample, type(self.estimator), settings, *(term.form for term in table))
        return StepWeights(tuple(values), fixed, form)

    def evaluate_with_weights(
        self,
        weights: Tensor,
        fixed: Mapping[int, float],
        model: Program,
        guide: Program,
        batch: Batch,
        step: Tensor | None = None,
    ) -> Loss:
        """Return the loss as a function of the values of :meth:`step_weights`, which it does not read in Python."""
        return self._evaluate(model, guide, batch, weights_in_order(weights, fixed))

    def layout(self, batch: Batch) -> Layout:
        """Return how an evaluation shows a batch to model and guide."""
        devices = [batch.device] if batch.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a table may draw its subsets
            rows = expand([term.evaluated(lambda weight, kind: 1.0) for term in self._table(batch.names)], batch)
        there = {name: batch.presence(name) for name in batch.names}
        shown = [
            masks
            for row in rows
            for masks, prior in ((row.encode, row.encode_prior), (row.decode, False), (row.given, row.given_prior))
            if not prior
        ]
        hides = any(masks[name] is not mask for masks in shown for name, mask in there.items())
        terms = self.vectorize and len(rows) > 1
        return Layout(terms or stacks_particles(self.estimator), hides)

    def decoding_all(self) -> Objective:
        """Return the objective that decodes all modalities: this one, unless it decodes a random choice of them."""
        return self if self.subsample is None else self.subsampled(None)

    # -- as a pyro.infer.ELBO, with a counter of its own -----------------------------------------------------------

    def differentiable_loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return the loss at the object's own step, to be differentiated.

        Args:
            model, guide, batch: as for :meth:`evaluate`. The object counts the steps by itself.
        """
        loss = self.evaluate(model, guide, batch, step=self.steps)
        self._note(loss, batch)
        self.steps += torch.is_grad_enabled()
        return loss.total

    def loss(self, model: Program, guide: Program, batch: Batch) -> float:
        """Return the loss at the object's own step, as a number."""
        with torch.no_grad():
            loss = self.evaluate(model, guide, batch, step=self.steps)
        self._note(loss, batch)
        return float(loss.total)

    def loss_and_grads(self, model: Program, guide: Program, batch: Batch) -> float:
        """Return the loss at the object's own step, as a number, and add its gradient to the parameters'."""
        loss = self.evaluate_with_gradient(model, guide, batch, step=self.steps)
        self._note(loss, batch)
        self.steps += 1
        return float(loss.total)

    def _note(self, loss: Loss, batch: Batch) -> None:
        self.by_term = dict(loss.by_term)
        self._names = batch.names

    def least_rows(self, names: tuple[str, ...]) -> int:
        """Return the fewest rows of a batch that it can be evaluated on, for modalities of these names."""
        own = [term.kind.least_rows for term in self._table(names) if term.kind is not None]
        return max([*own, 2 if any(critic.form.has_other for critic in self.critics.values()) else 1])

    def gathers_rows(self, names: tuple[str, ...]) -> bool:
        """Return True if all that compares rows gathers those of several processes.

        Args:
            names: the modalities.
        """
        kinds = [term.kind for term in self._table(names) if term.kind is not None]
        comparing = [kind for kind in kinds if kind.gathers or kind.least_rows > 1]
        return self.differentiable and bool(comparing or self.critics) and all(kind.gathers for kind in comparing)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The critics."""
        return [torch.nn.ModuleDict({"critics": module_dict(self.critics)})] if self.critics else []

    def players(self, model: Program, guide: Program, batch: Batch) -> Sequence[Player]:
        """Return the players of critics and generators; see :meth:`with_critics`."""
        if not self.critics:
            return ()
        return critic_players(self, [(self._table, self.critics)], self.critics, model, guide, batch)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(
        self,
        model: Program,
        guide: Program,
        batch: Batch,
        weight_at: Callable[[Callable[[int], float], str], float | Tensor],
        takes_gradient: bool = False,
        cache: Cache | None = None,
    ) -> Loss:
        """Plan the passes, evaluate each, and combine their results.

        Args:
            model, guide, batch: what is evaluated.
            weight_at: gives the value of a weight that depends on the step, from its function and what it weighs,
                "likelihood", "kl" or "weight".
            takes_gradient: True to add the gradient to the parameters', for estimators that take it themselves.
            cache: results of encoders of this step; None for none so far.
        """
        check_batch(batch)
        stratified = isinstance(self.estimator, PerRow) and self.estimator.stratified is not None
        structure = pair_structure(model, guide, batch, stratified)
        check_pairing(self.estimator, structure)
        decoded = self._subsample(batch, structure)

        table = self._table(batch.names)
        plans = PlanCache() if callable(self.terms) else _plans.setdefault(self, PlanCache())
        passes = plans.get(table, self.estimator, batch, structure, self.vectorize, self.critics, self._features)
        if any(term.has_step_weights for term in table):
            at_step = [term.evaluated(weight_at) for term in table]
            passes = [each.with_weights(at_step) for each in passes]
        results = {} if cache is None else cache
        evaluation = Evaluation(model, guide, batch, structure, decoded, takes_gradient, results)
        return combine((each.evaluate(evaluation) for each in passes), takes_gradient)

    def _subsample(self, batch: Batch, structure: PairStructure) -> Mapping[str, float] | None:
        """Draw the modalities that an evaluation with gradient decodes; None for all."""
        if self.subsample is None or not torch.is_grad_enabled():
            return None
        subsampling.check_subsample(self.subsample, self.estimator_text, self.linear)
        return subsampling.draw_modalities(self.subsample, batch, structure)

    def _table(self, names: tuple[str, ...] | None) -> Sequence[Term]:
        return check_table(self.terms(names or ())) if callable(self.terms) else self.terms

    def _get_trace(self, *_: Any) -> Any:
        raise TypeError("an Objective has no single trace")


def _check_estimator(value: Any) -> ELBO:
    """Return an estimator. Raises a TypeError for a class, another objective, or anything else."""
    wanted = "expected estimator to be one of pyro_mm.estimators, or a pyro.infer.ELBO"
    if isinstance(value, Objective):
        raise TypeError(f"{wanted}, got an objective: its own estimator is {value.estimator_text}")
    if isinstance(value, ELBO):
        return value
    hint = f": make an instance, {value.__name__}(..)" if isinstance(value, type) and issubclass(value, ELBO) else ""
    raise TypeError(f"{wanted}, got {describe(value)}{hint}")


def _at_step(step: int | Tensor) -> Callable[[Callable[[int], float], str], float]:
    """Return the function that evaluates a weight at a step."""
    return lambda weight, kind: step_weight(weight, int(step))
