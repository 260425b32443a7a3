"""Lengths and covariates for networks that ask for them by keyword."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..utils.arguments import describe
from ..utils.network_keywords import Keyword


class MissingCovariate(KeyError, ValueError):
    """Error of a covariate that a network, a prior or a story reads, and that the batch does not have.

    Args:
        message: the error in words; :meth:`of` makes it.

    Attributes:
        name: the covariate; None if only the message is known.
        known: the covariates of the batch.
        reader: what reads it, in words; None if that is not known.
    """

    name: str | None = None
    known: Sequence[str] = ()
    reader: str | None = None

    @classmethod
    def of(cls, name: str, known: Sequence[str], reader: str | None = None) -> MissingCovariate:
        """Return the error; the arguments are the attributes of the same names."""
        error = cls(f"{reader or 'a story or guide'} is given the covariate {name!r}; this batch has {list(known)}")
        error.name = name
        error.known = list(known)
        error.reader = reader
        return error

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows it in quotes


class Covariates(dict[str, Tensor]):
    """Covariates by name. Raises a MissingCovariate for one that is not there.

    Attributes:
        reader: what reads them, in words, for that error; None if that is not known.
    """

    reader: str | None = None

    def __missing__(self, name: str) -> Tensor:
        raise MissingCovariate.of(name, list(self), self.reader)

    def copy(self) -> Covariates:
        """Return a shallow copy for the same reader."""
        new = Covariates(self)
        new.reader = self.reader
        return new


@contextmanager
def covariates_read_by(role: str, program: Any) -> Iterator[None]:
    """Name the reader of a missing covariate, unless the error names one already.

    Args:
        role: the program in words, such as ``"the prior of 'z'"``.
        program: the module or function that is called.

    Raises:
        MissingCovariate: with role and program.
    """
    try:
        yield
    except MissingCovariate as error:
        if error.name is None or error.reader is not None:
            raise
        raise MissingCovariate.of(error.name, error.known, f"{role}, {describe(program)},") from None


def keyword_arguments(
    asked: Sequence[Keyword],
    name: str,
    inputs: int,
    read_lengths: Callable[[], Mapping[str, Tensor]],
    covariates: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return what a network of a modality asks for by keyword.

    A parameter that a positional input fills is left alone, and so is one with a default where the batch has nothing
    for it.

    Args:
        asked: the parameters of the network, see :func:`~pyro_mm.utils.network_keywords.keywords_of`.
        name: the modality.
        inputs: the number of positional inputs.
        read_lengths: returns modality -> lengths ``(N,)``.
        covariates: name -> ``(N, ...)``.

    Returns:
        ``{"lengths": (N,), "covariates": {name: (N, ...)}}``, or a part of it.

    Raises:
        ValueError: the network needs lengths or covariates, and the batch has none.
    """
    found: dict[str, Any] = {}
    for keyword in asked:
        if keyword.position is not None and keyword.position < inputs:
            continue
        reader = f"{keyword.owner}, a network of modality {name!r},"
        if keyword.name == "lengths":
            lengths = read_lengths()
            if name in lengths:
                found["lengths"] = lengths[name]
            elif keyword.required:
                others = f"those of {list(lengths)}" if lengths else "none"
                raise ValueError(
                    f"{reader} needs lengths; this batch has {others}: "
                    f"Batch(.., lengths={{{name!r}: ..}}), or give the parameter a default"
                )
        elif covariates or keyword.required:
            found["covariates"] = _covariates_for(reader, covariates)
    return found


def head_arguments(asked: Sequence[Keyword], role: str, covariates: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a network of no one modality asks for by keyword: covariates, since lengths are of a modality.

    Args:
        asked: the parameters of the network, which has one positional input.
        role: of the network, for an error: ``"the head of a posterior"``.
        covariates: name -> ``(N, ...)``.

    Returns:
        ``{"covariates": {name: (N, ...)}}``, or nothing.

    Raises:
        ValueError: the network needs covariates, and the batch has none.
    """
    for keyword in asked:
        filled = keyword.position == 0
        if keyword.name == "covariates" and not filled and (covariates or keyword.required):
            return {"covariates": _covariates_for(f"{keyword.owner}, {role},", covariates)}
    return {}


def _covariates_for(reader: str, covariates: Mapping[str, Tensor]) -> Covariates:
    """Return covariates that name their reader if it asks for another one."""
    if not covariates:
        raise ValueError(
            f"{reader} needs covariates; this batch has none: Batch(.., covariates={{..}}), or give the parameter a "
            "default"
        )
    given = Covariates(covariates)
    given.reader = reader
    return given
