"""Objectives as HTML: the table of terms, typeset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..utils.html import Markup, escape, listing, report, table
from .terms import ALL, EACH, EVERY, OTHERS, PRIOR, Symbol, Term, weight_text

if TYPE_CHECKING:
    from .objective import Objective

INDEX = {EACH: "m", OTHERS: "\N{SET MINUS}m", EVERY: "S"}


def objective_html(objective: Objective, names: tuple[str, ...] | None) -> str:
    """Return the estimator, what the objective bounds, and the terms that it adds up.

    Args:
        objective: the table.
        names: the modalities, where they are known.
    """
    lines = [f"Estimator: {objective.estimator_text}.", f"Target: {objective.target}."]
    if objective.subsample is not None:
        lines.append(f"Modalities are subsampled: {objective.subsample} are decoded per step.")
    if callable(objective.terms) and names is None:
        return report("Objective", listing([*lines, "The terms depend on the modalities of the batch."]))
    terms: Sequence[Term] = objective.terms(names or ()) if callable(objective.terms) else objective.terms
    body = table(["term, higher is better", "weights"], [[typeset(term), weights(term)] for term in terms], left=2)
    return report("Objective: the sum of", body, listing(lines))


def typeset(term: Term) -> Markup:
    """Return the equation of a term, without its weights.

    Args:
        term: a term of a table.
    """
    over = {EACH: "m", EVERY: "S"}.get(term.over, "") if term.over is not None else ""
    operator = "mean" if term.average else "\N{N-ARY SUMMATION}"
    sign = f"{operator}<sub>{over}</sub> " if over else ""
    encode = _density(term.encode)
    given = _density(term.given)
    if term.kind is not None:
        return Markup(sign + escape(term.label(*map(_plain, (term.encode, term.decode, term.given)))))
    divergence = f"KL( {encode} \N{DOUBLE VERTICAL LINE} {given} )"
    if term.decode == ():
        return Markup(f"{sign}\N{MINUS SIGN} {divergence}")
    likelihood = f"E<sub>{encode}</sub> log p({_values(term.decode)} | z)"
    if term.encode is PRIOR and term.given is PRIOR:
        return Markup(f"{sign}{likelihood}")
    return Markup(f"{sign}{likelihood} \N{MINUS SIGN} {divergence}")


def weights(term: Term) -> str:
    """Return the weights of a term that are not 1, and what is held constant, in words.

    Args:
        term: a term of a table.
    """
    found = [
        f"{name} {weight_text(value)}"
        for name, value in (("likelihood", term.likelihood), ("KL", term.kl), ("term", term.weight))
        if callable(value) or value != 1
    ]
    found += ["decoders frozen"] if term.freeze_decoder else []
    found += ["encoder frozen"] if term.freeze_encoder else []
    return ", ".join(found)


def _density(names: Any) -> str:
    """Return the posterior given a set of modalities, as HTML."""
    return "p(z)" if names is PRIOR or names == () else f"q(z | {_values(names)})"


def _values(names: Any) -> str:
    """Return the values of a set of modalities, as HTML."""
    if names is ALL:
        return "<i>x</i>"
    if isinstance(names, Symbol):
        return f"<i>x</i><sub>{escape(INDEX.get(names, repr(names)))}</sub>"
    return ", ".join(escape(name) for name in names)


def _plain(names: Any) -> str:
    return repr(names) if isinstance(names, Symbol) else "+".join(names) or "-"
