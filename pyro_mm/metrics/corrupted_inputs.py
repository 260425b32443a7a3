"""Predictions and reconstructions from modalities that are noisy or missing at test time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.predictive import SampleSettings, draw_samples
from ..scoring.evaluation import evaluating
from ..utils.arguments import (
    check_counts,
    check_function,
    check_mapping,
    check_names,
    check_number,
    check_programs,
    check_seed,
    describe,
)
from ..utils.seeding import temporary_seed
from ..utils.text import align_columns, plus_minus
from .decoding import Decoded, decoding

Corruption = Callable[[Tensor, float], Tensor]
ROWS_PER_PASS = 256  # bounds the memory: a pass decodes every modality
EVERYTHING = "all"


@dataclass(frozen=True)
class Robustness:
    """Measures of each label and modality, by noise in one modality or its absence, with errors over rows.

    Attributes:
        levels: the L noise levels, the first of which is 0.
        corrupted: names of the M corrupted modalities; the last one is ``"all"`` of them at once, if there are several.
        measures: label or modality -> ``"accuracy"``, the proportion of right classes or tokens; or ``"unexplained"``,
            the mean squared error as a proportion of the variance over rows: 1 for the mean of all rows.
        values: label or modality -> ``(M, L)``.
        errors: the same, standard errors over rows.
        missing: label or modality -> values ``(M,)`` with the corrupted modality missing.
        missing_errors: the same, standard errors over rows.

    Example:
        >>> one = torch.ones(1, 2)
        >>> Robustness((0.0, 1.0), ("x",), {"x": "unexplained"}, {"x": one}, {"x": one}, {"x": one[0]}, {"x": one[0]})
        corrupted, noise    x unexplained
          x, 0            1.000 ± 1.000
          x, 1            1.000 ± 1.000
          x, missing      1.000 ± 1.000
    """

    levels: tuple[float, ...]
    corrupted: tuple[str, ...]
    measures: Mapping[str, str]
    values: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    missing: Mapping[str, Tensor]
    missing_errors: Mapping[str, Tensor]

    def table(self) -> str:
        """Return all measures with their errors, one line per modality and noise level."""
        lines = []
        for i, name in enumerate(self.corrupted):
            for j, level in enumerate(self.levels):
                cells = [plus_minus(self.values[t][i, j].item(), self.errors[t][i, j].item()) for t in self.measures]
                lines.append([f"{name}, {level:g}", *cells])
            cells = [plus_minus(self.missing[t][i].item(), self.missing_errors[t][i].item()) for t in self.measures]
            lines.append([f"{name}, missing", *cells])
        return align_columns(["corrupted, noise", *(f"{t} {kind}" for t, kind in self.measures.items())], lines)

    def __repr__(self) -> str:
        return self.table()


def robustness(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    labels: Sequence[str] | str = (),
    *,
    noise: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    corrupt: Mapping[str, Corruption] | None = None,
    num_samples: int = 10,
    seed: int | None = None,
    audit: bool = True,
) -> Robustness:
    r"""Measure predictions and reconstructions while one modality, or all, is noisy or missing.

    .. math:: \hat x_{nt} = \frac1S \sum_s E[x_t | z_{ns}], \qquad z_{ns} \sim q(z | \tilde x_n)

    with :math:`\tilde x` the rows in which one modality has noise of level s, is missing, or neither. Labels are never
    given to the guide. Against the clean values of the rows that have them,

    * a Categorical modality or label has the accuracy of the likeliest class, over valid steps. One without class
      probabilities or a mean, such as a string of tokens, has the share of tokens that draws have right at their place;
    * any other has :math:`\sum_n \|\hat x_n - x_n\|^2 / \sum_n \|x_n - \bar x\|^2` over valid steps.

    The noise of level s is :math:`s \, \sigma \, \epsilon` for real numbers, :math:`\epsilon` from N(0, 1) and
    :math:`\sigma` the standard deviation of that entry over rows, and over steps of a sequence. Whole numbers are each
    replaced by that of another row at the same place, with probability min(s, 1).

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        labels: names of modalities that the guide never sees.
        noise: levels, not negative; 0 is added if it is not among them.
        corrupt: modality -> function of its values ``(N, *event)`` and a level, in the place of the noise above.
        num_samples: S, draws per row.
        seed: of noise and draws; None uses torch's generator. Draws are the same at all levels.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Values and errors for each label and modality, corrupted modality, and level. The errors are over rows, with the
        variance of the truth held fixed.

    Raises:
        ValueError: an unknown modality, no modality but labels, a negative level, or noise of another shape.

    Example:
        >>> import pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.ones(3, 2), "y": torch.ones(4, 2)}, {"x": 0.1, "y": 0.1})
        >>> found = robustness(model, mm.Guide(z=model.posterior), model.sample(200), noise=(0, 5), seed=0)
        >>> bool(found.values["x"][0, 0] < 0.1 < found.values["x"][0, 1] < found.values["x"][2, 1])
        True

    References:
        Tsai et al. 2019 (arXiv:1806.06176), for missing modalities.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    hidden = check_names("labels", labels, batch)
    inputs = tuple(name for name in batch.names if name not in hidden and batch.presence(name) is not False)
    if not inputs:
        raise ValueError("expected a modality that is no label, which the guide could see, got none")
    levels = _check_levels(noise)
    own = check_mapping("corrupt", {} if corrupt is None else corrupt, "functions of values and a level")
    for name, function in own.items():
        check_names("corrupt", name, inputs)
        check_function(f"corrupt[{name!r}]", function, ("values", "level"))
    check_counts(num_samples=num_samples)
    check_seed(seed)

    corrupted = (*inputs, EVERYTHING) if len(inputs) > 1 else inputs
    visible = batch.only(*inputs)
    with torch.no_grad(), evaluating(model, guide, visible, audit=audit, stacked=num_samples > 1, draws=True) as rows:
        base = int(torch.randint(2**31, ())) if seed is None else seed
        truth = batch.to(rows.device)
        predictor = _Predictor(model, guide, truth, num_samples, base)
        noisy = _Noise(visible.to(rows.device), own, base + 1)

        clean = predictor.measure(rows)
        by_level = [
            [clean if level == 0 else predictor.measure(noisy.rows(_members(name, inputs), level)) for level in levels]
            for name in corrupted
        ]
        missing = [predictor.measure(rows.without(*_members(name, inputs))) for name in corrupted]
    return _collect(Robustness(levels, corrupted, predictor.measures, {}, {}, {}, {}), by_level, missing)


def _check_levels(noise: Any) -> tuple[float, ...]:
    """Return noise levels that begin with 0. Raises a TypeError or a ValueError for anything else."""
    if isinstance(noise, str) or not isinstance(noise, Sequence):
        raise TypeError(f"expected noise to be levels, numbers that are not negative, got {describe(noise)}")
    levels = [check_number("noise", level, least=0) for level in noise]
    return tuple(sorted({0.0, *levels}))


def _members(name: str, inputs: Sequence[str]) -> tuple[str, ...]:
    return tuple(inputs) if name == EVERYTHING and EVERYTHING not in inputs else (name,)


Measured = Mapping[str, tuple[float, float]]  # label or modality -> (value, standard error)


def _collect(empty: Robustness, by_level: Sequence[Sequence[Measured]], missing: Sequence[Measured]) -> Robustness:
    """Return a result with the measures of all levels."""

    def level_table(name: str, which: int) -> Tensor:
        return torch.tensor([[found[name][which] for found in row] for row in by_level])

    def missing_column(name: str, which: int) -> Tensor:
        return torch.tensor([found[name][which] for found in missing])

    names = empty.measures
    return replace(
        empty,
        values={name: level_table(name, 0) for name in names},
        errors={name: level_table(name, 1) for name in names},
        missing={name: missing_column(name, 0) for name in names},
        missing_errors={name: missing_column(name, 1) for name in names},
    )


class _Noise:
    """The noise of all levels: the same random numbers, of another size.

    Args:
        rows: the clean rows.
        corrupt: modality -> function of values and a level, in the place of the usual noise.
        seed: of the random numbers.
    """

    def __init__(self, rows: Batch, corrupt: Mapping[str, Corruption], seed: int):
        self._rows = rows
        self._corrupt = corrupt
        self._seed = seed

    def rows(self, names: Sequence[str], level: float) -> Batch:
        """Return the rows with noise in some modalities.

        Raises:
            ValueError, TypeError: a function of the caller's returns something else than noisy values.
        """
        with temporary_seed(self._seed, self._rows.device):
            return self._rows.replaced({name: self._noisy(name, level) for name in names})

    def _noisy(self, name: str, level: float) -> Tensor:
        values = self._rows[name]
        valid = _valid(self._rows, name)
        if name in self._corrupt:
            found = self._corrupt[name](values.clone(), level)
            if not isinstance(found, Tensor) or found.shape != values.shape:
                raise ValueError(
                    f"corrupt[{name!r}]: expected noisy values of shape {tuple(values.shape)}, got {describe(found)}"
                )
        elif values.is_floating_point():
            found = values + level * _deviation(values, self._counted(name, valid)) * torch.randn_like(values)
        else:
            others = values[torch.randperm(len(values), device=values.device)]
            found = torch.where(torch.rand(values.shape, device=values.device) < level, others, values)
        return found if valid is None else torch.where(_as_event(valid, values), found, values)

    def _counted(self, name: str, valid: Tensor | None) -> Tensor:
        """Return the entries that are data, boolean and of the shape of the values."""
        values = self._rows[name]
        counted = _as_event(self._rows.present[name], values).expand(values.shape)
        return counted if valid is None else counted & _as_event(valid, values)


def _deviation(values: Tensor, counted: Tensor) -> Tensor:
    """Return the standard deviation of each entry over the rows; over the steps too if they are not all there."""
    over = (
        (0,) if bool((counted == counted.flatten(1)[:, :1].reshape(-1, *(1,) * (values.dim() - 1))).all()) else (0, 1)
    )
    number = counted.sum(over, keepdim=True).clamp(min=1)
    mean = torch.where(counted, values, 0.0).sum(over, keepdim=True) / number
    return (torch.where(counted, values - mean, 0.0).square().sum(over, keepdim=True) / number).sqrt()


def _valid(rows: Batch, name: str) -> Tensor | None:
    """Return the steps before the end of a sequence, boolean ``(N, T)``; None without lengths."""
    if name not in rows.lengths:
        return None
    return torch.arange(rows[name].shape[1], device=rows.device) < rows.lengths[name][:, None]


def _as_event(mask: Tensor, values: Tensor) -> Tensor:
    """Return a mask of rows or steps with the number of dimensions of the values."""
    return mask.reshape(*mask.shape, *(1,) * (values.dim() - mask.dim()))


class _Predictor:
    """Predictions of a pair from rows, compared with the truth.

    Args:
        model, guide: callables of a batch.
        truth: the clean rows, labels among them.
        num_samples: draws per row.
        seed: of the draws.

    Attributes:
        measures: label or modality -> the name of its measure.
    """

    def __init__(self, model: Any, guide: Any, truth: Batch, num_samples: int, seed: int):
        self._pair = (model, guide)
        self._truth = truth
        self._seed = seed
        few = truth[torch.arange(min(2, truth.size), device=truth.device)]
        with decoding(model, guide, few, seed=seed, audit=False) as (_, blocks):
            decoded: Decoded = next(blocks)
            self._with_mean = decoded.has_mean()
            means = decoded.means()
            names = [name for name in decoded.modalities if truth.presence(name) is not False]
        self._settings = SampleSettings(num_samples, mean=self._with_mean)
        self._with_classes = {name for name in self._with_mean if means[name].dim() > truth[name].dim()}
        discrete = {name for name in names if name not in self._with_mean and not truth[name].is_floating_point()}
        of_classes = self._with_classes | discrete
        self.measures = {name: "accuracy" if name in of_classes else "unexplained" for name in names}

    def measure(self, rows: Batch) -> dict[str, tuple[float, float]]:
        """Return label or modality -> (value, standard error), predicted from some rows."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.measures}
        with temporary_seed(self._seed, rows.device):
            for places in torch.arange(rows.size, device=rows.device).split(ROWS_PER_PASS):
                samples = draw_samples(*self._pair, rows.block(places), self._settings).modalities
                for name, parts in found.items():
                    parts.append(self._score(name, samples[name], self._truth[name][places]))
        return {name: self._mean(name, torch.cat(parts)) for name, parts in found.items()}

    def _score(self, name: str, samples: Tensor, truth: Tensor) -> Tensor:
        """Return the score of each entry, ``(n, *event)``: right or not, or the squared error.

        Args:
            name: the label or modality.
            samples: means, class probabilities or draws, ``(S, n, *event)`` or ``(S, n, *event, C)``.
            truth: ``(n, *event)``.
        """
        if self.measures[name] == "unexplained":
            return (samples.double().mean(0) - truth.double()).square()
        if name in self._with_classes:
            return (samples.double().mean(0).argmax(-1) == truth).double()
        return (samples == truth).double().mean(0)

    def _mean(self, name: str, scores: Tensor) -> tuple[float, float]:
        """Return the mean over the entries that are data, in units of the measure, with its error over rows."""
        truth = self._truth[name]
        valid = _valid(self._truth, name)
        present = self._truth.present[name] if valid is None else self._truth.present[name] & valid.any(1)
        counted = (
            torch.ones_like(truth, dtype=torch.bool) if valid is None else _as_event(valid, truth).expand_as(truth)
        )
        scores, counted, truth = scores[present], counted[present], truth[present]
        each = torch.where(counted, scores, 0.0).reshape(len(scores), -1).sum(1)
        if self.measures[name] == "accuracy":
            each = each / counted.reshape(len(counted), -1).sum(1)
            scale = 1.0
        else:
            values = truth.double()
            mean = torch.where(counted, values, 0.0).sum(0) / counted.sum(0).clamp(min=1)
            scale = torch.where(counted, (values - mean).square(), 0.0).sum().item() / len(each)
        error = each.std(correction=1) / len(each) ** 0.5 if len(each) > 1 else torch.tensor(torch.nan)
        return each.mean().item() / scale, error.item() / scale
