"""Batches of scaled measurements with masks, from arrays in which zeros stand for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ..batch.batch import Batch
from ..utils.arguments import check_choice, check_flag
from .images import Split
from .scaling import CONSTANT, Constant, check_held_out, check_magnitudes, fit_scaling, identity_scaling
from .steps import Steps, expected_lengths, remove_padding

MAX_EMPTY = 0.5  # the largest share of training rows without any measurement


class Preparation(NamedTuple):
    """A user's choices for a data set of measurements.

    Attributes:
        standardise: scale features by statistics of training rows.
        constant: ``"refuse"``, ``"drop"`` or ``"keep"`` features that never vary in training rows.
        aligned: keep steps of modalities aligned; see :func:`~pyro_mm.datasets.steps.remove_padding`.
        allow_empty: accept training rows most of which have no measurement.
    """

    standardise: bool
    constant: Constant
    aligned: bool = False
    allow_empty: bool = True

    def check(self) -> Preparation:
        """Return these choices. Raises a TypeError or a ValueError for one that is none."""
        check_choice("constant", self.constant, CONSTANT)
        for argument in ("standardise", "aligned", "allow_empty"):
            check_flag(argument, getattr(self, argument))
        return self


class Measured(NamedTuple):
    """Values of one modality and one part of a data set.

    Attributes:
        values: ``(N, F)`` or ``(N, T, F)``.
        valid: the rows, or rows and steps, that were measured, boolean ``(N,)`` or ``(N, T)``.
    """

    values: np.ndarray
    valid: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """The rows with any measurement, boolean ``(N,)``."""
        return self.valid if self.valid.ndim == 1 else np.asarray(self.valid.any(1))


Part = Mapping[str, Measured | None]


def vectors_split(
    source: str,
    parts: Mapping[str, Mapping[str, np.ndarray]],
    labels: Mapping[str, np.ndarray],
    preparation: Preparation,
) -> Split:
    """Build (train, held out) from vectors; one that is zero throughout is missing.

    Args:
        source: the file, for an error.
        parts: ``"train"`` and the held-out part -> modality -> ``(N, F)``.
        labels: part -> ``(N, ..)``.
        preparation: the choices.
    """
    measured = {
        part: {name: Measured(x, (x != 0).any(1)) for name, x in arrays.items()} for part, arrays in parts.items()
    }
    values = _scaled_parts(source, measured, preparation)
    train, held_out = (_batch(measured[part], values[part], {}, labels[part]) for part in parts)
    return train, held_out


def sequences_split(
    source: str,
    parts: Mapping[str, Mapping[str, np.ndarray | None]],
    labels: Mapping[str, np.ndarray],
    preparation: Preparation,
) -> Split:
    """Build (train, held out) from sequences, whose all-zero steps are padding.

    Args:
        source: the file, for an error.
        parts: ``"train"`` and the held-out part -> modality -> ``(N, T, F)``; None for one that the part lacks.
        labels: part -> ``(N, ..)``.
        preparation: the choices.
    """
    measured: dict[str, Part] = {}
    lengths: dict[str, dict[str, np.ndarray]] = {}
    for part, arrays in parts.items():
        held = {name: x for name, x in arrays.items() if x is not None}
        if preparation.aligned:
            _check_equal_steps(source, held)
        steps = remove_padding(held, preparation.aligned)
        measured[part] = {name: _measured(steps.get(name)) for name in arrays}
        lengths[part] = expected_lengths(steps)
    if not preparation.allow_empty:
        _check_empty_rows(source, measured["train"])

    values = _scaled_parts(source, measured, preparation)
    train, held_out = (_batch(measured[part], values[part], lengths[part], labels[part]) for part in parts)
    return train, held_out


def _measured(steps: Steps | None) -> Measured | None:
    return None if steps is None else Measured(steps.values, steps.valid)


def _batch(
    measured: Part, values: Mapping[str, np.ndarray], lengths: Mapping[str, np.ndarray], label: np.ndarray
) -> Batch:
    """Build the batch of one part; a modality without values is missing in every row."""
    held = {name: torch.from_numpy(values[name]) if name in values else None for name in measured}
    present = {name: torch.from_numpy(m.present) for name, m in measured.items() if m is not None}
    steps = {name: torch.from_numpy(length) for name, length in lengths.items()}
    return Batch({**held, "label": torch.from_numpy(label)}, present=present, lengths=steps)


def _scaled_parts(
    source: str, measured: Mapping[str, Part], preparation: Preparation
) -> dict[str, dict[str, np.ndarray]]:
    """Return part -> modality -> scaled values, float32, with zeros where nothing was measured."""
    _check_common_rows(source, measured)
    found: dict[str, dict[str, np.ndarray]] = {part: {} for part in measured}
    for name, train in measured["train"].items():
        what = f"{source}, {name!r}"
        rows = None if train is None else train.values[train.valid]
        scaling = None
        if rows is not None and len(rows):
            scaling = fit_scaling(what, rows, preparation.standardise, preparation.constant)

        for part, arrays in measured.items():
            held = arrays[name]
            if held is None:
                continue
            part_rows = held.values[held.valid]
            check_magnitudes(f"{what}, {part} rows", part_rows)
            if scaling is None:
                scaling = identity_scaling(held.values.shape[-1])
            elif rows is not None and part != "train":
                check_held_out(f"{what}, {part} rows", scaling, rows, part_rows)
            found[part][name] = np.where(held.valid[..., None], scaling.apply(held.values), np.float32(0))
    return found


def _check_equal_steps(source: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a ValueError unless all modalities have the same number of steps."""
    steps = {name: x.shape[1] for name, x in arrays.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(f"{source}: aligned=True needs modalities of equal steps, got {steps}: load it with False")


def _check_empty_rows(source: str, train: Part) -> None:
    """Raise a ValueError if most training rows have no measurement at all."""
    held = {name: m for name, m in train.items() if m is not None}
    empty = ~np.logical_or.reduce([m.present for m in held.values()])
    if empty.mean() > MAX_EMPTY:
        raise ValueError(
            f"{source}: {empty.sum()} of {len(empty)} training rows ({empty.mean():.0%}) have none of "
            f"{', '.join(held)}, so that a model trained on them learns little but the label's frequencies. Give "
            f"allow_empty=True to load them all the same; batch[batch.having({list(held)})] are the other rows"
        )


def _check_common_rows(source: str, measured: Mapping[str, Part]) -> None:
    """Raise a ValueError if a held-out row has the very measurements of a training row."""
    seen: dict[str, set[bytes]] = {}
    for part, arrays in measured.items():
        shared = [m for name, m in arrays.items() if m is not None and measured["train"][name] is not None]
        rows = np.logical_or.reduce([m.present for m in shared]).nonzero()[0]
        seen[part] = {b"".join(np.ascontiguousarray(m.values[row]).tobytes() for m in shared) for row in rows}
    train, *others = seen
    for part in others:
        if common := len(seen[train] & seen[part]):
            raise ValueError(
                f"{source}: {common} of the {part} rows are training rows, too, so that the split is a wrong one: "
                "take them out of either part"
            )
