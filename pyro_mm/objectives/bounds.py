"""The quantity that a table of terms bounds, derived from the table."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pyro.infer import (
    ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)

from ..batch.masks import MAX_MODALITIES, subsets
from ..estimators import AnalyticKL, PerRow, Renyi, StickTheLanding
from .terms import ALL, EACH, EVERY, OTHERS, PRIOR, Names, Number, Random, Symbol, Term, members

AFTER_WARM_UP = 10**12  # a step at which every warm-up is over
LATER_STEPS = (
    0,
    1,
    2,
    3,
    10,
    100,
    1_000,
    12_345,
)  # after it, where a final weight stays the same


@dataclass
class Target:
    """The quantity that an objective bounds.

    Attributes:
        kind: ``"lower bound"``, ``"approximate"`` (a lower bound only where q(z | x_C) is the exact posterior for every
            C that a term is given), ``"estimate"`` (by critics, of a bound and of entropies of the data) or
            ``"surrogate"``.
        text: the quantity in words; of a surrogate the reason, if it is none of the table's.
        log_evidence: set of modalities -> weight of its log-evidence; empty if their names are not known.
        conditional: (targets, given) -> weight of a log-conditional; empty if names are not known.
        random: True if log-densities of random sets belong to it besides.
    """

    kind: str
    text: str
    log_evidence: dict[frozenset[str], float] = field(default_factory=dict)
    conditional: dict[tuple[frozenset[str], frozenset[str]], float] = field(default_factory=dict)
    random: bool = False

    def __str__(self) -> str:
        if self.kind == "surrogate":
            return "surrogate: not a bound" + (f", since {self.text}" if self.text else "")
        if self.kind == "estimate":
            return self.text
        text = f"lower bound on {self.text}"
        return text + (" only where q(z | x_C) is the exact posterior" if self.kind == "approximate" else "")


@dataclass(frozen=True)
class Piece:
    """One log-density that a term bounds: ``log p(x_decode | x_given)``, or a sum or mean of it over a symbol."""

    decode: Names
    given: Names = ()
    over: str = ""  # "sum_m ", "mean_S " and the like, where the modalities' names are not known


@dataclass(frozen=True)
class RowNames:
    """The modalities of a batch, and the ones among them that a row has."""

    names: tuple[str, ...]
    present: frozenset[str]

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in self.present)


Pieces = dict[Piece, float]


def target(
    terms: Sequence[Term],
    names: Sequence[str] | None = None,
    lower: bool = True,
    linear: bool | Sequence[bool] = True,
    present: Collection[str] | None = None,
) -> Target:
    """Return the quantity that the sum of these terms bounds, after any warm-up, for rows that have all modalities.

    The rules: a term given PRIOR with kl >= likelihood = w > 0 bounds w log p(x_B) from below; a penalty with
    kl >= 0 only loosens; a term given C, not PRIOR, bounds log p(x_B | x_C), only if B and C are disjoint, and only
    where q(z | x_C) is the exact posterior and B and C are independent given z. Anything else is a surrogate, and so is
    a sum with a weight that never stops changing. Wu & Goodman 2019 (arXiv:1912.05075).

    Args:
        terms: the table.
        names: the batch's modalities; without them the text says x for all of them.
        lower: True if the estimator keeps a lower bound one (Rényi's with alpha < 0 does not).
        linear: True if it is a mean of log-weights. One that takes the logarithm of a mean of weights needs
            kl = likelihood: with kl > likelihood the mean of those weights may exceed p(x). A weight for each
            modality stays inside of that logarithm, and has to be 1. One for all terms, or one for each.
        present: those modalities that the rows have; None for all.
    """
    if names is not None and len(names) > MAX_MODALITIES and any(term.over is EVERY for term in terms):
        names = None  # more sets than can be gone through
    rows = None if names is None else RowNames(tuple(names), frozenset(names if present is None else present))
    total: Pieces = {}
    approximate = False
    each_linear = [linear] * len(terms) if isinstance(linear, bool) else linear
    for term, is_mean in zip(terms, each_linear, strict=True):
        pieces = _symbolic(term, is_mean) if rows is None else _concrete(term, rows, is_mean)
        if pieces is None or not lower:
            return Target("surrogate", "")
        approximate |= bool(pieces) and term.given is not PRIOR
        for piece, weight in pieces.items():
            total[piece] = total.get(piece, 0.0) + weight
    total = _join_chains(total, rows)
    if not total:
        return Target("surrogate", "")
    return _describe(total, "approximate" if approximate else "lower bound", rows is not None)


def _describe(total: Pieces, kind: str, concrete: bool) -> Target:
    result = Target(kind, "")
    texts: dict[str, float] = {}
    for piece, weight in total.items():
        text = piece.over + _log_p(piece.decode, piece.given)
        texts[text] = texts.get(text, 0.0) + weight
        decode = piece.decode
        given = piece.given
        if isinstance(decode, Symbol) or isinstance(given, Symbol):
            result.random |= isinstance(decode, Random) or isinstance(given, Random)
        elif concrete and given:
            result.conditional[frozenset(decode), frozenset(given)] = weight
        elif concrete:
            result.log_evidence[frozenset(decode)] = weight
    result.text = " + ".join(f"{'' if abs(w - 1) < 1e-12 else f'{w:.4g} '}{t}" for t, w in texts.items())
    return result


def is_lower_bound(estimator: ELBO) -> bool:
    """Return True if the estimator's mean is known not to exceed the log-evidence that it estimates."""
    if isinstance(estimator, Renyi | RenyiELBO):
        return estimator.alpha >= 0
    known = PerRow | Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO | TraceTMC_ELBO
    return isinstance(estimator, known) and not isinstance(estimator, TraceTailAdaptive_ELBO)


def is_linear(estimator: ELBO) -> bool:
    """Return True if the estimator is a mean of log-weights, and takes no logarithm of a mean of weights."""
    means = AnalyticKL | StickTheLanding | Trace_ELBO | TraceGraph_ELBO | TraceEnum_ELBO
    if isinstance(estimator, means) and not isinstance(estimator, TraceTailAdaptive_ELBO):
        return True
    if not isinstance(estimator, PerRow | RenyiELBO) or estimator.num_particles > 1:
        return False
    return getattr(estimator, "stratified", None) != "inside"


# -- one term -------------------------------------------------------------------------------------------------------


def _symbolic(term: Term, linear: bool) -> Pieces | None:
    """Return the log-densities that a term bounds, for modalities without names; None if it bounds nothing."""
    weight = _weight(term, term.decode, linear)
    if weight is None or not _disjoint(term.decode, term.given):
        return None
    if weight == 0:
        return {}
    over = ""
    varies = {EACH, OTHERS, EVERY} & {x for x in (term.decode, term.given) if isinstance(x, Symbol)}
    if term.over is not None and (varies or not term.average):  # a mean of equal bounds is that bound
        over = f"{'mean' if term.average else 'sum'}_{term.over} "
    return {Piece(term.decode, () if term.given is PRIOR else term.given, over): weight}


def _concrete(term: Term, row: RowNames, linear: bool) -> Pieces | None:
    """Return the log-densities that a term bounds in a row of these modalities; None if it bounds nothing."""
    sums: Sequence[Sequence[str]] = [()]
    if term.over is EACH:
        sums = [(name,) for name in row.names]
    elif term.over is EVERY:
        sums = subsets(row.names)
    pieces: Pieces = {}
    counted = 0
    for chosen in sums:
        if not all(_counts(which, chosen, row) for which in (term.encode, term.given)):
            continue
        counted += 1
        decode, given = (_members(which, chosen, row) for which in (term.decode, term.given))
        weight = _weight(term, decode, linear)
        if weight is None or not _disjoint(decode, given):
            return None
        if weight > 0:
            piece = Piece(decode, () if given is PRIOR else given)
            pieces[piece] = pieces.get(piece, 0.0) + weight
    return {piece: weight / (counted if term.average else 1) for piece, weight in pieces.items()}


def _weight(term: Term, decode: Names, linear: bool) -> float | None:
    """Return w of the bound ``w log p(x_decode | ..)``: 0 for a mere penalty, None for no bound."""
    whole = _final_weight(term.weight)
    if whole is None or whole < 0:
        return None
    inside = 0.0 if whole == 0 else _weight_inside(term, decode, linear)
    return None if inside is None else whole * inside


def _weight_inside(term: Term, decode: Names, linear: bool) -> float | None:
    """Return w as if the weight of the whole term were 1."""
    kl = _final_weight(term.kl)
    if kl is None:
        return None
    if term.kind is not None:
        return 0.0 if term.kind.only_loosens and kl >= 0 else None
    if decode == ():
        return 0.0 if kl >= 0 else None
    given = term.likelihood
    inside = isinstance(given, Mapping)
    if isinstance(given, Mapping):
        # of a set that is not known yet: all modalities named, and those not named, which weigh 1
        each = [*given.values(), 1.0] if isinstance(decode, Symbol) else [given.get(name, 1.0) for name in decode]
    else:
        each = [given]
    weights = [_final_weight(weight) for weight in each]
    weight = weights[0]
    if weight is None or any(w is None or not math.isclose(w, weight) for w in weights) or weight < 0:
        return None
    if weight == 0:  # the mean of (r / q)^kl is at most 1 for kl <= 1
        return 0.0 if kl >= 0 and (linear or kl <= 1) else None
    if linear:
        return weight if kl >= weight or math.isclose(kl, weight) else None
    return weight if math.isclose(kl, weight) and (not inside or math.isclose(weight, 1.0)) else None


def _final_weight(weight: Number) -> float | None:
    """Return a weight after any warm-up; None if it goes on changing, or cannot be evaluated so late."""
    if not callable(weight):
        return float(weight)
    try:
        values = [float(weight(AFTER_WARM_UP + later)) for later in LATER_STEPS]
    except (ArithmeticError, LookupError, ValueError):
        return None
    same = all(math.isclose(value, values[0], abs_tol=1e-9) for value in values)
    return values[0] if same and math.isfinite(values[0]) else None


def _disjoint(decode: Names, given: Names) -> bool:
    """Return True if what a term decodes is certainly no part of what it is given."""
    if decode == () or given == () or given is PRIOR:
        return True
    if isinstance(decode, Random) and isinstance(given, Random):
        return decode.index == given.index and decode.rest != given.rest
    if isinstance(decode, Symbol) or isinstance(given, Symbol):
        return {decode, given} == {OTHERS, EACH}
    return not set(decode) & set(given)


def _counts(which: Names, chosen: Sequence[str], row: RowNames) -> bool:
    """Return True if a term that encodes, or is given, this set counts in a row: not if the set is wholly absent."""
    if which is PRIOR or isinstance(which, Random):
        return True
    nominal = members(which, chosen, row.names)
    return not nominal or not row.present.isdisjoint(nominal)


def _members(which: Names, chosen: Sequence[str], row: RowNames) -> Names:
    """Return those of a set that the row has, in the modalities' order; PRIOR and random sets as they are."""
    if which is PRIOR or isinstance(which, Random):
        return which
    nominal = members(which, chosen, row.names)
    return tuple(name for name in row.all if name in nominal)


# -- their sum ------------------------------------------------------------------------------------------------------


def _join_chains(total: Pieces, row: RowNames | None) -> Pieces:
    """Join log p(x_C) + log p(x_B | x_C) = log p(x_B, x_C) where both have one weight."""
    left = dict(total)
    for piece in total:
        own = Piece(piece.given, (), piece.over)
        joint = _union(piece, row)
        if piece.given == () or joint is None or own not in left or piece not in left:
            continue
        if not math.isclose(left[own], left[piece]):
            continue
        weight = left.pop(piece)
        del left[own]
        left[joint] = left.get(joint, 0.0) + weight
    return left


def _union(piece: Piece, row: RowNames | None) -> Piece | None:
    """Return the joint log-density of the sets decoded and given; None where it is not known."""
    decode = piece.decode
    given = piece.given
    everything: Names = ALL if row is None else row.all
    over = "" if piece.over.startswith("mean") else piece.over
    if isinstance(decode, Symbol) or isinstance(given, Symbol):
        complements = {decode, given} == {OTHERS, EACH} or (isinstance(decode, Random) and isinstance(given, Random))
        return Piece(everything, (), over) if complements else None
    order = (*given, *decode) if row is None else row.all
    return Piece(tuple(name for name in order if name in {*decode, *given}), (), piece.over)


def _log_p(decode: Names, given: Names) -> str:
    def text(names: Names) -> str:
        if not isinstance(names, Symbol):
            return ", ".join(names)
        if isinstance(names, Random):
            return "x_notS" if names.rest else "x_S"
        return {"*": "x", "m": "x_m", "others": "x_others", "S": "x_S"}[names.text]

    condition = "" if not isinstance(given, Symbol) and not given else f" | {text(given)}"
    random = any(isinstance(names, Random) for names in (decode, given))
    return f"{'E_S ' if random else ''}log p({text(decode)}{condition})"
