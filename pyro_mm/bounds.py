"""What a table of terms bounds, read off the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .presence import subsets
from .terms import ALL, EACH, EVERY, OTHERS, PRIOR, Names, Random, Symbol, Term, at_step

SETTLED = 10**12  # a step at which every warm-up is over


@dataclass
class Target:
    """What an objective is a bound on.

    ``kind`` is ``"lower bound"``, ``"approximate"`` (a lower bound only where q(z | x_C) is the exact posterior for
    every C that a term is given) or ``"surrogate"``. ``log_evidence`` maps a set of modalities to the weight of its
    log-evidence, and ``conditional`` (targets, given) to that of a log-conditional; both need the modalities' names.
    ``random`` says that there are others besides, of random sets.
    """

    kind: str
    text: str
    log_evidence: dict[frozenset[str], float] = field(default_factory=dict)
    conditional: dict[tuple[frozenset[str], frozenset[str]], float] = field(default_factory=dict)
    random: bool = False

    def __str__(self) -> str:
        if self.kind == "surrogate":
            return "surrogate: not a bound"
        text = f"lower bound on {self.text}"
        return text + (" only where q(z | x_C) is the exact posterior" if self.kind == "approximate" else "")


def target(
    terms: Sequence[Term], names: Sequence[str] | None = None, lower: bool = True, linear: bool = True
) -> Target:
    """What the sum of these terms bounds, after any warm-up, for rows that have all modalities.

    The rules: a term given PRIOR with kl >= likelihood = w > 0 bounds w log p(x_B) from below; a penalty with
    kl >= 0 only loosens; a term given C, not PRIOR, bounds log p(x_B | x_C), only if B and C are disjoint, and only
    where q(z | x_C) is the exact posterior. Anything else is a surrogate. Wu & Goodman 2019 (arXiv:1912.05075).

    Args:
        names: the modalities; without them the text says x for all of them.
        lower: whether the estimator keeps a lower bound one (Rényi's with alpha < 0 does not).
        linear: whether it is a mean of log-weights. One that takes the logarithm of a mean of weights needs
            kl = likelihood: with kl > likelihood the mean of those weights may exceed p(x).
    """
    parts: dict[tuple[Names, Names, bool], float] = {}
    kind = "lower bound" if lower else "surrogate"
    for term in terms:
        kl = at_step(term.kl, SETTLED)
        weights = term.likelihood if isinstance(term.likelihood, Mapping) else {"": term.likelihood}
        likelihood = {at_step(w, SETTLED) for w in weights.values()}
        if term.decode == () and kl >= 0:
            continue
        weight = likelihood.pop()
        wide = isinstance(term.likelihood, Mapping) and set(term.likelihood) != set(names or ())
        if not likelihood and weight == 0 and kl >= 0 and (linear or kl <= 1):
            continue
        off = kl < weight or (kl > weight and not linear)
        if likelihood or (wide and weight != 1) or weight <= 0 or off:
            return Target("surrogate", "")
        if term.given is not PRIOR:
            if not _disjoint(term.decode, term.given):
                return Target("surrogate", "")
            kind = "approximate" if kind == "lower bound" else kind
        # a sum whose terms bound one and the same quantity, averaged, bounds that quantity
        summed = not (term.average and not _varies(term.decode) and not _varies(term.given))
        key = (term.decode, () if term.given is PRIOR else term.given, summed and term.over is not None)
        if summed and term.average and names is not None:
            weight /= len(names) if term.over is EACH else 2 ** len(names) - 1
        mean = (*key[:2], "mean" if summed and term.average and names is None else key[2])
        parts[mean] = parts.get(mean, 0.0) + weight  # type: ignore[index,arg-type]
    _chain(parts, names)
    if kind == "surrogate" or not parts:
        return Target("surrogate", "")
    result = Target(kind, "")
    pieces: dict[str, float] = {}
    for (decode, given, over), weight in parts.items():
        for b, c in _concrete(decode, given, over, names):
            text = _log_p(b, c)
            prefix = "" if names is not None or not over else ("mean_m " if over == "mean" else "sum_m ")
            prefix = prefix.replace("m ", "S ") if EVERY in (decode, given) else prefix
            pieces[prefix + text] = pieces.get(prefix + text, 0.0) + weight
            result.random |= any(isinstance(x, Random) for x in (b, c))
            if names is not None and not isinstance(b, Symbol) and not isinstance(c, Symbol):
                sets = (frozenset(b), frozenset(c))
                if c:
                    result.conditional[sets] = result.conditional.get(sets, 0.0) + weight
                else:
                    result.log_evidence[sets[0]] = result.log_evidence.get(sets[0], 0.0) + weight
    result.text = " + ".join(f"{'' if abs(w - 1) < 1e-12 else f'{w:.4g} '}{t}" for t, w in pieces.items())
    return result


def _chain(parts: dict, names: Sequence[str] | None) -> None:
    """log p(x_C) + log p(x_B | x_C) = log p(x_B, x_C), for the pairs that tables are made of."""
    for given, decode in [(EACH, OTHERS), *((c, d) for c, d in _random_pairs(parts))]:
        for over in (False, True, "mean"):
            own, conditional = (given, (), over), (decode, given, over)
            if own in parts and conditional in parts and abs(parts[own] - parts[conditional]) < 1e-12:
                weight = parts.pop(own)
                del parts[conditional]
                terms = len(names) if over is True and names is not None else 1
                key = (ALL, (), True) if over is True and names is None else (ALL, (), False)
                parts[key] = parts.get(key, 0.0) + weight * terms


def _random_pairs(parts: dict) -> list[tuple[Random, Random]]:
    return [(c, d) for d, c, _ in list(parts) if isinstance(d, Random) and isinstance(c, Random) and d.rest]


def _varies(names: Names) -> bool:
    return names in (EACH, OTHERS, EVERY)


def _disjoint(decode: Names, given: Names) -> bool:
    if isinstance(decode, Random) and isinstance(given, Random):
        return decode.index == given.index and decode.rest != given.rest
    if isinstance(decode, Symbol) or isinstance(given, Symbol):
        return (decode, given) in ((OTHERS, EACH), (EACH, OTHERS)) or given == ()
    return not set(decode) & set(given)


def _concrete(decode: Names, given: Names, over: bool | str, names: Sequence[str] | None) -> list[tuple[Names, Names]]:
    if names is None:
        return [(decode, given)]
    sums: Sequence[Sequence[str]] = [()]
    if over and EVERY in (decode, given):
        sums = subsets(names)
    elif over:
        sums = [(n,) for n in names]

    def members(which: Names, chosen: Sequence[str]) -> Names:
        table = {ALL: tuple(names), EACH: chosen, EVERY: chosen, OTHERS: tuple(n for n in names if n not in chosen)}
        return table.get(which, which) if isinstance(which, Symbol) else which

    return [(members(decode, chosen), members(given, chosen)) for chosen in sums]


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
