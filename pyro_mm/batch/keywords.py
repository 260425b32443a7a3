"""Lengths and covariates for networks that ask for them by keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..utils.network_keywords import Keyword


class MissingCovariate(KeyError, ValueError):
    """A covariate that a network, a prior or a story reads, and that the batch does not have."""

    def __init__(self, reader: str, name: str, known: Sequence[str]) -> None:
        super().__init__(f"{reader} is given the covariate {name!r}; this batch has {list(known)}")

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows it in quotes


class Covariates(dict[str, Tensor]):
    """Covariates by name, as they are handed to a network. Raises a MissingCovariate for one that is not there."""

    reader = "the network"

    def __missing__(self, name: str) -> Tensor:
        raise MissingCovariate(self.reader, name, list(self))

    def copy(self) -> Covariates:
        new = Covariates(self)
        new.reader = self.reader
        return new


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
                raise ValueError(
                    f"{reader} needs lengths; this batch has those of {list(lengths)}: "
                    f"Batch(.., lengths={{{name!r}: ..}}), or give the parameter a default"
                )
        elif covariates:
            found["covariates"] = given = Covariates(covariates)
            given.reader = reader
        elif keyword.required:
            raise ValueError(
                f"{reader} needs covariates; this batch has none: Batch(.., covariates={{..}}), or give the parameter "
                "a default"
            )
    return found
