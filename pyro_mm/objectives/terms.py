r"""The terms of an objective's table, and the symbols for sets of modalities in them.

.. math:: term(A, B, C) = E_{z \sim q_A} [ a \log p(x_B | z) + b (\log r_C(z) - \log q_A(z)) ]

with :math:`q_A = q(z | x_A)`, :math:`r_C = q(z | x_C)`, and the prior p(z) in place of either where asked for.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

from pyro.infer import ELBO
from torch import Tensor

from ..utils.arguments import (
    check_flag,
    check_function,
    check_integer,
    check_mapping,
    check_names,
    check_number,
    describe,
)
from .concrete_terms import TermKind


@dataclass(frozen=True)
class Symbol:
    """A set of modalities that depends on the row of the table, or on what a row of the data holds."""

    text: str

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> Any:
        return _symbol, (self.text,)  # a copy is the symbol itself, by which it is known


def _symbol(text: str) -> Symbol:
    return next(symbol for symbol in SYMBOLS if symbol.text == text)


PRIOR = Symbol("P")
"""Not a set: the model's prior p(z). The empty set ``()`` is q(z | nothing), which is another thing.

Where a latent's parent is a modality, the prior of a term is that given its value in rows in which the term decodes it,
and given a draw of it elsewhere: then the term has the mean over those draws. A class that the model sums out is summed
out of its density.
"""
ALL = Symbol("*")
"""All present modalities."""
EACH = Symbol("m")
"""One modality: the term stands for the sum over them."""
OTHERS = Symbol("others")
"""All present modalities but the one of ``EACH``."""
EVERY = Symbol("S")
"""Every non-empty subset of the modalities: the term stands for the sum over them."""
SYMBOLS = (PRIOR, ALL, EACH, OTHERS, EVERY)


@dataclass(frozen=True)
class Random(Symbol):
    """A subset of the present modalities, uniform and drawn anew for every row at every step.

    Args:
        text: the name that error messages print.
        index: terms of equal ``index`` share the draw.
        empty: False excludes the empty set.
        rest: True stands for the complement of the draw.
    """

    text: str = "random S"
    index: int = 0
    empty: bool = True
    rest: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"expected Random's arguments by name, as in Random(index=1), got {describe(self.text)}")
        check_integer("index", self.index, least=0)
        check_flag("empty", self.empty)
        check_flag("rest", self.rest)

    def __reduce__(self) -> Any:
        return Random, astuple(self)

    def __repr__(self) -> str:
        return f"{'not ' if self.rest else ''}random S{self.index or ''}"


Names = Symbol | Sequence[str]
Number = float | Callable[[int], float]


@dataclass(frozen=True)
class Term:
    """A term of a table: ``E_{q(z|x_encode)}[likelihood log p(x_decode|z) + kl (log r_given(z) - log q(z|x_encode))]``.

    Args:
        encode, given: names of modalities, ``()``, ``PRIOR`` or another symbol.
        decode: names of modalities, ``()`` for a penalty, or a symbol.
        likelihood: a finite number, a function of the step, or either for each modality (one not named weighs 1).
        kl: a finite number or a function of the step.
        weight: of the whole term, outside of any logarithm that the estimator takes; a finite number or a function of
            the step.
        freeze_decoder: True to give the decoders no gradient from this term (with Pyro's own estimators, nor anything
            else of the model).
        freeze_encoder: True to hold q(z | x_encode) constant: draws, parameters and density. The term trains what it is
            given, the decoders and the prior, as where q(z | x_given) learns to infer what the encoder says. A penalty
            may then encode a deterministic latent, and is the mean of ``kl log q(z | x_given)``.
        average: True divides a sum over ``EACH`` or ``EVERY`` by the number of its terms that count in the row.

    In a row that has none of the modalities of ``encode``, or none of ``given``, the term counts 0. A ``pyro.factor``
    of the model, or what it observes besides modalities, counts like a likelihood in terms given PRIOR that decode
    something.

    Raises:
        TypeError, ValueError: an argument that is no set of modalities, or no weight; ``EVERY`` beside ``EACH`` or
            ``OTHERS``.
    """

    encode: Names
    decode: Names
    given: Names = PRIOR
    likelihood: Number | Mapping[str, Number] = 1.0
    kl: Number = 1.0
    weight: Number = 1.0
    freeze_decoder: bool = False
    freeze_encoder: bool = False
    average: bool = False
    kind: ClassVar[TermKind | None] = None  # None: a density, or a penalty where it decodes nothing

    def __init__(
        self,
        encode: Names,
        decode: Names,
        given: Names = PRIOR,
        *,
        likelihood: Number | Mapping[str, Number] = 1.0,
        kl: Number = 1.0,
        weight: Number = 1.0,
        freeze_decoder: bool = False,
        freeze_encoder: bool = False,
        average: bool = False,
    ):
        if decode is PRIOR:
            raise ValueError("PRIOR cannot be decoded: decode=() makes a term a penalty")
        sets = {"encode": _set("encode", encode), "decode": _set("decode", decode), "given": _set("given", given)}
        if EVERY in sets.values() and {EACH, OTHERS} & set(sets.values()):
            raise ValueError(f"a term is a sum over EACH or over EVERY, not over both: {tuple(sets.values())}")
        weights = {
            "likelihood": check_weights("likelihood", likelihood),
            "kl": check_weight("kl", kl),
            "weight": check_weight("weight", weight),
            "freeze_decoder": check_flag("freeze_decoder", freeze_decoder),
            "freeze_encoder": check_flag("freeze_encoder", freeze_encoder),
            "average": check_flag("average", average),
        }
        for name, value in {**sets, **weights}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        over = self.over
        text = f"{'mean' if self.average else 'sum'}_{over} " if over else ""
        text += self.label(*map(_text, (self.encode, self.decode, self.given)))
        if self.kind is not None and self.kind.settings:
            text += f" {self.kind.settings}"
        if isinstance(self.likelihood, Mapping) or callable(self.likelihood) or self.likelihood != 1:
            text += f" likelihood {weight_text(self.likelihood)}"
        if callable(self.kl) or self.kl != 1:
            text += f" kl {weight_text(self.kl)}"
        if callable(self.weight) or self.weight != 1:
            text += f" weight {weight_text(self.weight)}"
        text += " decoders frozen" if self.freeze_decoder else ""
        return text + (" encoder frozen" if self.freeze_encoder else "")

    def label(self, encode: str, decode: str, given: str) -> str:
        """Return the term in words, without its weights.

        Args:
            encode, decode, given: its sets of modalities in words.
        """
        return f"({encode}, {decode}, {given})" if self.kind is None else self.kind.describe(encode, decode, given)

    def evaluated(self, at: Callable[[Callable[[int], float], str], float | Tensor]) -> Term:
        """Return the term with the value of each weight that depends on the step.

        Args:
            at: gives the value, from the function of the step and what it weighs: "likelihood", "kl" or "weight".
        """

        def number(weight: Any, kind: str) -> Any:
            return at(weight, kind) if callable(weight) else weight

        likelihood = self.likelihood
        if isinstance(likelihood, Mapping):
            likelihood = {n: number(w, "likelihood") for n, w in likelihood.items()}
        else:
            likelihood = number(likelihood, "likelihood")
        new = copy.copy(self)
        object.__setattr__(new, "likelihood", likelihood)
        object.__setattr__(new, "kl", number(self.kl, "kl"))
        object.__setattr__(new, "weight", number(self.weight, "weight"))
        return new

    def scaled(self, weight: Number) -> Term:
        """Return the term with its weight multiplied by another one."""
        new = copy.copy(self)
        object.__setattr__(new, "weight", _product(weight, self.weight))
        return new

    @property
    def has_step_weights(self) -> bool:
        """True if a weight is a function of the step."""
        each = self.likelihood.values() if isinstance(self.likelihood, Mapping) else (self.likelihood,)
        return any(callable(weight) for weight in (self.kl, self.weight, *each))

    @property
    def is_random(self) -> bool:
        """True if one of its sets is drawn anew at every step."""
        return any(isinstance(which, Random) for which in (self.encode, self.decode, self.given))

    @property
    def form(self) -> tuple[Any, ...]:
        """Everything that distinguishes it from another term, except for its functions of the step."""

        def constant(weight: Any) -> Any:
            if isinstance(weight, Mapping):
                return tuple((name, constant(w)) for name, w in weight.items())
            return "of the step" if callable(weight) else weight

        weights = constant(self.likelihood), constant(self.kl), constant(self.weight)
        kind = None if self.kind is None else (type(self.kind), self.kind.describe("", "", ""), self.kind.settings)
        flags = self.freeze_decoder, self.freeze_encoder, self.average
        return (type(self), kind, self.encode, self.decode, self.given, *weights, *flags)

    @property
    def of_joint(self) -> bool:
        """True if it is of the model's log joint: a density given the prior, and no penalty."""
        return self.kind is None and self.given is PRIOR and self.decode != ()

    @property
    def over(self) -> Symbol | None:
        """The symbol over which the term is a sum, if it is one."""
        sets = (self.encode, self.decode, self.given)
        return EACH if EACH in sets or OTHERS in sets else EVERY if EVERY in sets else None


def _product(first: Number, second: Number) -> Number:
    """Return the product of two weights."""
    if not callable(first) and not callable(second):
        return first * second
    if second == 1:
        return first
    if first == 1:
        return second

    def product(step: int) -> float:
        each = [weight(step) if callable(weight) else weight for weight in (first, second)]
        return each[0] * each[1]

    product.__name__ = " ".join(weight_text(weight).removesuffix("(step)") for weight in (first, second))
    return product


def check_weight(argument: str, value: Any) -> Number:
    """Return a weight: a finite number, or a function of the step.

    Raises:
        TypeError: something else, such as an estimator in its place, or a parameter.
        ValueError: NaN or infinity.
    """
    if isinstance(value, ELBO):
        raise TypeError(f"a weight is a number or a function of the step, got {value!r}: is it the estimator?")
    if callable(value):
        return check_function(argument, value, ("step",))
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"expected {argument} to be a number, got a tensor to be trained: weights are not trained")
    return check_number(argument, value)


def check_nonnegative(argument: str, weight: Any) -> Number:
    """Return a weight that is not negative, at any step. Raises a TypeError or a ValueError for anything else."""
    weight = check_weight(argument, weight)
    if not callable(weight):
        return check_number(argument, weight, least=0)

    @functools.wraps(weight)
    def checked(step: int) -> float:
        return check_number(f"{argument} at step {step}", weight(step), least=0)

    checked.__name__ = getattr(weight, "__name__", repr(weight))
    return checked


def check_weights(argument: str, value: Any) -> Number | Mapping[str, Number]:
    """Return a weight, or a mapping from modalities to weights. Raises as :func:`check_weight` does."""
    if not isinstance(value, Mapping):
        return check_weight(argument, value)
    weights = check_mapping(argument, value, "weights")
    return {name: check_weight(f"{argument}[{name!r}]", weight) for name, weight in weights.items()} or 1.0


def step_weight(weight: Callable[[int], Any], step: int) -> float:
    """Return a function's weight at a step. Raises a TypeError or a ValueError for what is no finite number."""
    return check_number(f"the weight {weight_text(weight)} at step {step}", weight(step))


def weights_in_order(weights: Tensor, fixed: Mapping[int, float]) -> Callable[[Any, str], float | Tensor]:
    """Return the function that gives :meth:`Term.evaluated` its weights, one after the other.

    Args:
        weights: the weights that depend on the step, in the order of a table, ``(W,)``.
        fixed: index -> weight, for those that are read as numbers.
    """
    places = itertools.count()

    def at(weight: Any, kind: str) -> float | Tensor:
        place = next(places)
        return fixed[place] if place in fixed else weights[place]

    return at


def check_table(terms: Any) -> tuple[Term, ...]:
    """Return a table of terms.

    Raises:
        TypeError: something else than terms.
        ValueError: random sets that share a draw, but differ in whether they may be empty.
    """
    if isinstance(terms, str | Term | Mapping) or not isinstance(terms, Iterable):
        hint = ", one term alone: put it in a list" if isinstance(terms, Term) else ""
        raise TypeError(
            f"expected a list of terms, or a function from the modalities' names, got {describe(terms)}{hint}"
        )
    table = tuple(terms)
    empty: dict[int, bool] = {}
    for term in table:
        if not isinstance(term, Term):
            raise TypeError(f"expected a table to consist of Terms, got {describe(term)}")
        for drawn in (term.encode, term.decode, term.given):
            if isinstance(drawn, Random) and empty.setdefault(drawn.index, drawn.empty) != drawn.empty:
                raise ValueError(
                    f"random sets of index {drawn.index} share a draw, but one has empty=True and another one "
                    "empty=False: give them indices of their own"
                )
    return table


def check_modalities(terms: Sequence[Term], names: Collection[str], observed: Collection[str]) -> None:
    """Refuse terms and weights of modalities that are not there.

    Args:
        terms: a table.
        names: the batch's modalities.
        observed: those that the story observes where they are present.

    Raises:
        ValueError: naming term, argument and modality.
    """
    here = f"the batch has {_list_names(names)}, the story observes {_list_names(observed)}"
    what = f"a modality that is not observed: {here}"
    for term in terms:
        for argument in ("encode", "given", "decode"):
            known = observed if argument == "decode" else {*names, *observed}
            which = getattr(term, argument)
            for name in () if isinstance(which, Symbol) else which:
                if name not in known:
                    raise ValueError(f"term {term!r}, {argument}: {name!r} is {what}")
        for name in term.likelihood if isinstance(term.likelihood, Mapping) else ():
            if name not in observed:
                raise ValueError(f"term {term!r} has a likelihood weight for {name!r}, {what}")


def _list_names(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def members(names: Names, chosen: Sequence[str], all_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modalities of a set, ``chosen`` for ``EACH`` and ``EVERY``; none for PRIOR or a random set."""
    if names is ALL:
        return all_names
    if names is OTHERS:
        return tuple(n for n in all_names if n not in chosen)
    if names in (EACH, EVERY):
        return tuple(chosen)
    return () if isinstance(names, Symbol) else tuple(names)


def _set(argument: str, names: Any) -> Names:
    """Return a set of modalities: a symbol, or names. Raises a TypeError or a ValueError for anything else."""
    if isinstance(names, Random):
        return names
    if isinstance(names, Symbol):
        if names not in SYMBOLS:
            raise ValueError(f"expected {argument} to be one of the symbols {SYMBOLS}, got {names!r}")
        return _symbol(names.text)
    if names is None:
        raise TypeError(f"expected {argument} to be names or a symbol, got None: the prior is PRIOR, the empty set ()")
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = tuple(names)
        if any(isinstance(name, Symbol) for name in names):
            raise TypeError(f"expected {argument} to be names, or one symbol alone, got {names}")
    return check_names(argument, names)


def _text(names: Names) -> str:
    return repr(names) if isinstance(names, Symbol) else "+".join(names) or "-"


def weight_text(weight: Any) -> str:
    """Return a weight in words: a number, a function by its name, or several by modality."""
    if isinstance(weight, Mapping):
        return "{" + ", ".join(f"{n}: {weight_text(w)}" for n, w in weight.items()) + "}"
    return f"{getattr(weight, '__name__', repr(weight))}(step)" if callable(weight) else f"{weight:g}"
