"""The audit of a pair: mistakes in its sites, shapes, supports and networks that would give a number all the same."""

from __future__ import annotations

import difflib
import math
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...batch.batch import Batch
from ...batch.restrict import TermStack
from ...distributions.support import Support, has_grey, outside, support_of
from ...utils.modules import buffers_kept
from ...utils.reachable import Fingerprint, ReachableObjects, evaluation_mode
from ...utils.seeding import generator_state, temporary_seed
from ..program_errors import Explained, explained
from ..structure import PairStructure, is_factor, latent_sites, observed_sites, pair_structure
from ..term_pair import UNBROADCAST, TermPair
from ..views import TermViews

FEW = 32  # rows on which `check` exchanges values to see who reads them
MOST = 64  # kinds of batches remembered for one pair
ROUNDING = 1e-3, 1e-5  # of a log-density in float32: absolute, and relative
ROUGH = 2e-2, 1e-3  # in half precision, and on accelerators, whose products may have ten bits
VALUES = "found invalid values"  # what torch says of a parameter or a value, and not of a shape
OFF = "Pass audit=False to go on all the same."


# -- what a run shows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sites:
    """Sites and modalities by name.

    Attributes:
        model, guide: the latent sites of each; of the model's, ``summed_out`` are enumerated, and ``from_prior`` are
            in the model only and cannot be.
        observed: the observed sites.
        guide_only: latent sites of the guide that the model has no latent for, and that are not marked as auxiliary.
        outside: sites outside the plate ``"data"``.
        scaled: sites with a scale of their own.
        unobserved: modalities of the batch that the story never observes.
        unheld: modalities that the story observes and the batch does not hold.
        unmasked: observed sites that bear no modality's name, so that no mask reaches them.
        peeks: (``"model"`` or ``"guide"``, modality) where it reads that modality's values in rows that lack it.
        blind: modalities whose presence makes no difference to the guide.
        read: modalities whose values the story looks at, be they observed or not.
        unknown: (``"model"`` or ``"guide"``, name) whose values it asks for, and the batch does not know.
        unasked: modalities whose values the guide does not ask for.
        swapped: whether the guide observes modalities and the model none.
        misfits: shapes of observed values that do not fit their distributions, in words.
        supports: observed modality -> what its distribution scores.
        unsupported: modalities with values that their distributions do not score, in words.
        mixing: why particles cannot stand to the left of the rows, in words; empty if they can, or nobody asked.
    """

    model: tuple[str, ...]
    guide: tuple[str, ...]
    observed: tuple[str, ...]
    summed_out: tuple[str, ...] = ()
    from_prior: tuple[str, ...] = ()
    guide_only: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    unobserved: tuple[str, ...] = ()
    unheld: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()
    peeks: tuple[tuple[str, str], ...] = ()
    blind: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()
    unknown: tuple[tuple[str, str], ...] = ()
    unasked: tuple[str, ...] = ()
    swapped: bool = False
    misfits: tuple[str, ...] = ()
    supports: dict[str, Support] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    mixing: str = ""

    def findings(self, per_row: bool) -> Iterator[tuple[int, str]]:
        """Yield what is amiss, in words, each with its rank, lower ones being more serious.

        Args:
            per_row: whether the estimator is one of :mod:`pyro_mm.estimators`, and not Pyro's.
        """
        yield from ((0, text) for text in (*self.misfits, *self.unsupported))
        if self.mixing:
            yield 0, self.mixing
        for who, name in self.peeks:
            yield 1, _peek_text(who, name)
        for name in self.guide_only:
            yield 1, self._guide_only_text(name)
        for name in self.unmasked:
            text = f"{name}: observed under the name of no modality of the batch, so that no mask reaches it. "
            yield 1, text + "Use batch.observe with the modality's name."
        for name in self.unobserved:
            yield 2, f"{name}: the batch has it, and the story never observes it. It is part of no likelihood."
        for name in self.from_prior:
            if per_row:
                yield 4, f"{name}: in the model only, drawn from its prior. That is unbiased, and noisy."
            else:
                yield (
                    1,
                    f"{name}: in the model only. Pyro's estimators count its log p, which nothing answers: no bound.",
                )
        for name in self.unheld:
            yield 3, f"{name}: the story observes it, and the batch does not hold it. It counts and trains nothing."
        for name in self.blind:
            yield 3, f"{name}: the guide is the same with it and without it, as if it did not look."

    def refusals(
        self, batch: Batch, targets: Sequence[str], givens: Sequence[str], hides: bool, draws: bool
    ) -> Iterator[str]:
        """Yield what would make the numbers of an evaluation or a training wrong, in words.

        Args:
            batch: the rows.
            targets, givens: modalities of which a conditional likelihood is asked for, and given which.
            hides: whether modalities that rows have will be hidden from the pair, as an objective's terms do.
            draws: whether the guide's draws are asked for, and not numbers that hold whatever they are.
        """
        if self.swapped:
            yield "the guide observes modalities and the model none: are model and guide swapped?"
            return
        yield from (self._guide_only_text(name) for name in self.guide_only)
        passed = [name for name in self.unobserved if batch.presence(name) is not False]
        for name in self.unmasked if passed else ():
            yield (
                f"{name}: observed by the story under the name of no modality of the batch, which holds "
                f"{', '.join(map(repr, batch.names))}; no mask reaches it, and {', '.join(map(repr, passed))} is never "
                "observed. Use batch.observe(name, ..) with the modality's name."
            )
        for who, name in self.peeks:
            if (who == "model" or draws) and (hides or batch.presence(name) is not True):
                yield _peek_text(who, name)
        yield from self._misspelt(batch)
        for name in (*targets, *givens):
            if name in self.unobserved and not (name in givens and name in self.read):
                yield (
                    f"{name}: the story neither observes nor reads it, so that the number would be called a likelihood "
                    "with it and be one without. Leave it out, or give the story a decoder for it."
                )
        yield from self.misfits

    def _guide_only_text(self, name: str) -> str:
        seen = "observed by the story" if name in self.observed else "unknown to the model"
        text = f"{name}: drawn by the guide and {seen}. Its -log q counts and no log p answers it: bounds are off "
        text += "by its entropy, and likelihoods have no meaning."
        if not set(self.guide) & set(self.model):
            text += " The guide's latent sites are none of the model's."
        lacking = [n for n in self.model if n not in self.guide]
        if lacking and name not in self.observed:
            close = difflib.get_close_matches(name, lacking, 1, 0.3)
            meant = close[0] if close or len(lacking) != 1 else lacking[0]
            text += f" The guide lacks {', '.join(map(repr, lacking))}, which the model has" + (
                f": is {meant!r} meant?" if meant else "."
            )
        return text + " A site that is auxiliary on purpose is to be marked by infer={'is_auxiliary': True}."

    def _misspelt(self, batch: Batch) -> Iterator[str]:
        """Names that the batch does not know, in a story or a guide that passes over one of its modalities."""
        passed = {
            "model": [n for n in self.unobserved if n not in self.read and batch.presence(n) is not False],
            "guide": [n for n in self.unasked if batch.presence(n) is not False],
        }
        wanted = [("model", name) for name in self.unheld] + [u for u in self.unknown if u[1] not in self.unheld]
        for who, name in wanted:
            if not passed[who]:
                continue  # a modality that the batch does not hold is one that is missing in every row
            close = difflib.get_close_matches(name, passed[who], 1)
            meant = repr(close[0]) if close else " or ".join(map(repr, passed[who]))
            what = ("story", "a decoder") if who == "model" else ("guide", "an expert or encoder")
            yield (
                f"{name}: the {what[0]} has {what[1]} for it, which the batch, with "
                f"{', '.join(map(repr, batch.names))}, does not know; and it passes over "
                f"{', '.join(map(repr, passed[who]))}. Is {meant} meant?"
            )


def _peek_text(who: str, name: str) -> str:
    reader, then = ("guide", "posterior") if who == "guide" else ("story", "likelihood")
    text = f"{name}: the {reader} reads its values where they are missing, so that a {then} without them has "
    return text + "seen them. Ask batch.presence, or use batch.observe."


# -- the audit ----------------------------------------------------------------------------------------------------


@dataclass
class _Known:
    """Outcome of the audit of a pair on one kind of batch."""

    fingerprint: Fingerprint
    sites: Sites
    stacks: str | None = None  # why particles cannot be stacked; empty if they can be, None if that is not known


_pairs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class _Nothing:
    """In the place of a model or a guide that is not run."""


NOTHING = _Nothing()


def audit(
    model: Callable[[Batch], Any] | None,
    guide: Callable[[Batch], Any] | None,
    batch: Batch,
    *,
    targets: Sequence[str] = (),
    givens: Sequence[str] = (),
    stacked: bool = False,
    hides: bool = False,
    draws: bool = False,
    seen: Batch | None = None,
) -> Sites:
    """Run a pair on a few rows, once for each kind of batch, and refuse what would give wrong numbers.

    A kind of batch is given by the names, the types and the shapes of what it holds, and by what is missing in all,
    some or no rows. What is known is found again once a module, a function or a number that the pair refers to has
    changed. Values are checked against the support of their distributions in all rows, once for each tensor.

    Args:
        model, guide: callables of a batch; None for one that is not run.
        batch: N rows, on any device.
        targets, givens: modalities of which a conditional likelihood is asked for, and given which.
        stacked: whether particles or terms will stand to the left of the rows.
        hides: whether modalities that rows have will be hidden from the pair.
        draws: whether the guide's draws are asked for.
        seen: the same rows as the guide is shown them, where that is another batch.

    Returns:
        The sites.

    Raises:
        ValueError, TypeError: what is amiss and what mends it.
    """
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    reached = ReachableObjects(programs)
    known = _known_of(model, guide, batch, seen, reached, hides)
    wrong = list(known.sites.refusals(batch, targets, givens, hides, draws))
    wrong = wrong or _unsupported(batch, known.sites.supports)
    if wrong:
        raise ValueError(_joined(wrong))
    if stacked and model is not None and guide is not None:
        if known.stacks is None:
            with _quietly(reached, programs):
                known.stacks = _stacking(model, guide, *_probe(batch, seen, reached))
        if known.stacks:
            error = ValueError(f"{known.stacks} {OFF}")
            error.add_note(UNBROADCAST)
            raise error
    return known.sites


@dataclass
class TrainingAudit:
    """Checks that an audit before training leaves for the minibatches to come.

    Attributes:
        unrunnable: the error of a pair that cannot be run on a few of the training rows, to be raised after the first
            run of the training, which may know more of the reason; None of a pair that can.
        supports: observed modality -> what its distribution scores.
    """

    unrunnable: Explained | None = None
    supports: dict[str, Support] = field(default_factory=dict)

    def check(self, batch: Batch) -> None:
        """Raise a ValueError if a minibatch, which was not at hand before, has values that are not scored."""
        # of a density of all real numbers, infinite ones are left to the watch over the loss
        bounded = {name: support for name, support in self.supports.items() if support != Support(support.family)}
        if wrong := _unsupported(batch, bounded):
            raise ValueError(_joined(wrong))


def audit_training(
    model: Callable[[Batch], Any], guide: Callable[[Batch], Any], objective: Any, train: Batch, validation: Any = None
) -> TrainingAudit:
    """Audit a pair for training by an objective, with the rows that it is trained and validated on.

    Args:
        model, guide: callables of a batch.
        objective: one with a ``layout``, or a ``pyro.infer.ELBO``.
        train: all rows, or a few where the others are not at hand.
        validation: other rows, or None.

    Returns:
        What is left to be done while the pair is trained.

    Raises:
        ValueError, TypeError: as of :func:`audit`.
    """
    found = TrainingAudit()
    for rows in (train, validation) if validation is not None else (train,):
        if hasattr(objective, "layout"):
            stacked, hides = objective.layout(rows)
        else:
            stacked = getattr(objective, "num_particles", 1) > 1 and getattr(objective, "vectorize_particles", False)
            hides = False
        try:
            sites = audit(model, guide, rows, stacked=stacked, hides=hides)
        except Explained as error:
            if rows is not train:
                raise
            # networks in evaluation mode may give a scale that is not positive, say, and none in training mode
            found.unrunnable = None if VALUES in str(error) else error
            break
        if rows is train:
            found.supports = sites.supports
    return found


def _joined(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return f"{texts[0]} {OFF}"
    return "\n".join([*(f"{i}. {text}" for i, text in enumerate(texts, 1)), OFF])


def notes(model: Any, guide: Any, batch: Batch, seen: Batch | None = None) -> tuple[str, ...]:
    """Return what is to be said of a likelihood of these rows, where the pair was audited on their kind."""
    known = _remembered(model, guide).get(_kind(batch, seen, False))
    if known is None:
        return ()
    grey = [
        name
        for name, support in known.sites.supports.items()
        if support.bits and name in batch and batch.holds(name) and has_grey(batch[name], batch.presence(name))
    ]
    left = [n for n in known.sites.unobserved if batch.presence(n) is not False and n not in known.sites.read]
    return (
        *(f"{name} is in these rows, and the story does not observe it" for name in left),
        *(f"{name} has values between 0 and 1: under a Bernoulli this is no likelihood of bits" for name in grey),
    )


def read_by(model: Any, guide: Any, batch: Batch, seen: Batch | None = None) -> frozenset[str]:
    """Return the modalities whose values the story looks at, where the pair was audited on their kind."""
    known = _remembered(model, guide).get(_kind(batch, seen, False))
    return frozenset() if known is None else known.sites.read


def _remembered(model: Any, guide: Any) -> dict[Hashable, _Known]:
    keys = [NOTHING if f is None else getattr(f, "__func__", f) for f in (model, guide)]
    owners = tuple(id(getattr(f, "__self__", None)) for f in (model, guide))
    try:
        of_guide = _pairs.setdefault(keys[0], weakref.WeakKeyDictionary()).setdefault(keys[1], {})
        if len(of_guide) >= MOST and owners not in of_guide:
            of_guide.clear()  # methods of as many objects, most of which are gone
        return of_guide.setdefault(owners, {})
    except TypeError:  # a callable that cannot be referred to weakly
        return {}


def _known_of(
    model: Any, guide: Any, batch: Batch, seen: Batch | None, reached: ReachableObjects, hides: bool
) -> _Known:
    remembered, fingerprint = _remembered(model, guide), reached.fingerprint()
    kind = _kind(batch, seen, hides)
    known = remembered.get(kind)
    if known is None or known.fingerprint != fingerprint:
        programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
        with _quietly(reached, programs):
            known = _Known(fingerprint, _look(model, guide, *_probe(batch, seen, reached), hides))
        if len(remembered) >= MOST:
            remembered.clear()
        remembered[kind] = known
    return known


def _kind(batch: Batch, seen: Batch | None, hides: bool) -> Hashable:
    """All that the outcome of an audit depends on of a batch, but the values."""

    def presence(name: str) -> Any:
        mask = batch.presence(name)
        return mask if isinstance(mask, bool) else None

    held = tuple(
        (n, presence(n), (batch[n].shape[1:], batch[n].dtype) if batch.holds(n) else None) for n in batch.names
    )
    more = tuple((n, x.shape[1:], x.dtype) for n, x in batch.covariates.items())
    shown = None if seen is None or seen is batch else _kind(seen, None, hides)
    return (held, more, tuple(batch._lengths), hides, shown)


class _quietly:
    """Holds a pair in evaluation mode, without gradient, its buffers as they are."""

    def __init__(self, reached: ReachableObjects, programs: dict[str, Any]):
        self.contexts = [
            torch.inference_mode(False),
            torch.no_grad(),
            evaluation_mode(reached.modules.values()),
            buffers_kept(*programs.values()),
            poutine.block(),
        ]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _probe(batch: Batch, seen: Batch | None, reached: ReachableObjects) -> tuple[Batch, Batch]:
    """A few rows of both batches on the device of the networks, their number unlike any size in data and networks.

    They have and lack every modality that some rows have and others lack.
    """
    rows = [0]
    for name in batch.names:
        mask = batch.presence(name)
        if isinstance(mask, Tensor):  # two that have it, as one of them is the filler of those that lack it
            rows += [int(mask.int().argmin()), *mask.nonzero()[:2, 0].tolist()]
    rows = list(dict.fromkeys(rows))
    sizes = {size for m in reached.all_modules() for p in m.parameters(recurse=False) for size in p.shape}
    sizes |= {size for name in batch.names if batch.holds(name) for size in batch[name].shape[1:]}
    sizes |= {size for x in batch.covariates.values() for size in x.shape[1:]}
    number = next(n for n in range(max(3, len(rows)), 10**6) if n not in sizes)
    rows += [i for i in range(min(number, batch.size)) if i not in rows][: number - len(rows)]
    few = _rows(batch, rows, reached.device())
    return few, few if seen is None or seen is batch else _rows(seen, rows, reached.device())


def _rows(batch: Batch, rows: list[int], device: torch.device | None) -> Batch:
    few = batch[torch.tensor(rows, device=batch.device)]._copy(total=None, _index=None, _memo=None)
    return few if device is None or device == few.device else few.to(device)


def _look(model: Any, guide: Any, few: Batch, seen: Batch, hides: bool) -> Sites:
    """The sites of a pair, by a run of both; and by two more who reads values of what is missing."""
    heard: dict[str, _Heard] = {name: _Heard() for name in ("model", "guide")}
    devices = [few.device] if few.device.type == "cuda" else []
    of_guide = of_model = None
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    # the state of torch's generators as the caller has it: pyro.param may draw its first value here
    with torch.random.fork_rng(devices=devices):
        if guide is not None:
            with explained(programs, seen.size):
                of_guide = poutine.trace(guide).get_trace(heard["guide"].listening(seen))
        if model is not None:
            replayed = model if of_guide is None else poutine.replay(model, trace=of_guide)
            with explained(programs, few.size):
                of_model = poutine.trace(replayed).get_trace(heard["model"].listening(few))
    peeks: list[tuple[str, str]] = []
    if guide is not None:
        peeks = _peeks_where_missing(model, guide, few, seen, hides)
    return _sites(model, guide, few, of_model, of_guide, heard, peeks)


def _sites(
    model: Any,
    guide: Any,
    few: Batch,
    of_model: Any,
    of_guide: Any,
    heard: dict[str, _Heard],
    peeks: Sequence[tuple[str, str]],
) -> Sites:
    theirs = {} if of_guide is None else latent_sites(of_guide)
    ours, seen = ({}, {}) if of_model is None else (latent_sites(of_model), observed_sites(of_model))
    sites = [*theirs.items(), *ours.items(), *seen.items()]
    auxiliary = {n for n, site in seen.items() if site["infer"].get("is_auxiliary", False)}
    marked = {n for n, site in theirs.items() if site["infer"].get("is_auxiliary", False)}
    enumerable = {n for n, s in ours.items() if n not in theirs and s["fn"].has_enumerate_support}
    summed = enumerable | {n for n, s in theirs.items() if s["infer"].get("enumerate") == "parallel"}
    named = [n for n in seen if n not in few and n not in auxiliary]
    unknown = [(who, n) for who, h in heard.items() for n in h.unknown if n not in few and n not in {**theirs, **ours}]
    both = of_model is not None and of_guide is not None
    return Sites(
        model=tuple(ours),
        guide=tuple(theirs),
        observed=tuple(seen),
        summed_out=tuple(n for n in ours if n in summed),
        from_prior=tuple(n for n in ours if n not in theirs and n not in enumerable) if both else (),
        guide_only=tuple(n for n in theirs if n not in ours and n not in marked) if both else (),
        outside=tuple(dict.fromkeys(n for n, s in sites if "data" not in {f.name for f in s["cond_indep_stack"]})),
        scaled=tuple(dict.fromkeys(n for n, s in sites if _scaled(s))),
        unobserved=tuple(n for n in few.names if n not in seen) if of_model is not None else (),
        unheld=tuple(n for n in seen if n not in few and n in auxiliary and not is_factor(seen[n])),
        unmasked=tuple(n for n in named if not is_factor(seen[n])),
        peeks=tuple(peeks),
        read=frozenset(heard["model"].read),
        unknown=tuple(unknown),
        unasked=tuple(n for n in few.names if n not in heard["guide"].asked) if of_guide is not None else (),
        swapped=both and not seen and any(n in few for n in observed_sites(of_guide)),
        misfits=tuple(_misfits(seen, few)),
        supports={n: s for n, site in seen.items() if n in few and (s := support_of(site["fn"])) is not None},
    )


class _Heard:
    """Whose values a program asks a batch for: ``asked``, of them ``read``, and ``unknown`` to the batch."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.read: set[str] = set()
        self.unknown: dict[str, None] = {}

    def listening(self, batch: Batch) -> Batch:
        """Return the same rows, which note whose values they are asked for."""
        return batch._copy(_values=_Listening(batch._values, self))


class _Listening(dict[str, Any]):
    """A dictionary that notes the keys that it is asked for."""

    def __init__(self, entries: dict[str, Any], heard: _Heard):
        super().__init__(entries)
        self.heard = heard

    def __getitem__(self, key: str) -> Any:
        if key in self:
            self.heard.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        known = super().__contains__(key)
        if isinstance(key, str):
            self.heard.asked.add(key) if known else self.heard.unknown.setdefault(key)
        return known

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        return self[key] if key in self else default  # noqa: SIM401  # which is this very method

    def __or__(self, other: Any) -> Any:
        return _Listening(super().__or__(other), self.heard)


def _misfits(seen: dict[str, dict[str, Any]], few: Batch) -> Iterator[str]:
    """Observed values that are another modality's, or whose shape is not their distribution's."""
    for name, site in seen.items():
        if name not in few or not isinstance(site["value"], Tensor) or not few.holds(name):
            continue
        if other := _values_of_another(name, site["value"], few):
            yield f"{name}: the story observes it at the values of {other}, obs=batch[{other!r}]: take its own."
            continue
        fn, value = site["fn"], site["value"]
        shape = tuple("N" if size == few.size else size for size in few[name].shape)
        if not _event_fits(fn, value):
            event = _text(tuple(fn.event_shape))
            said = f"one being {_text(shape[1:])}, and its distribution is of event shape {event}"
        elif not _rows_fit(site, few.size):
            batch = tuple("N" if size == few.size else size for size in fn.batch_shape)
            said = (
                f"and its distribution is of batch shape {_text(batch)} and event shape {_text(tuple(fn.event_shape))}"
            )
        else:
            continue
        mend = _mend_event(shape[1:], tuple(fn.event_shape), support_of(fn))
        yield f"{name}: its values are of shape {_text(shape)}, {said}: they would be broadcast. {mend}"


def _values_of_another(name: str, value: Tensor, few: Batch) -> str | None:
    """The modality whose values a site has, where these are not its own."""
    if value is few[name] or (value.shape == few[name].shape and torch.equal(value, few[name].to(value.dtype))):
        return None
    for other in few.names:
        if other != name and few.holds(other) and value is few[other]:
            return other
    return None


def _event_fits(fn: Any, value: Tensor) -> bool:
    """Return True if a value has the event's shape, with a dimension of rows before it."""
    lead = value.dim() - len(fn.event_shape)
    return lead >= 1 and value.shape[lead:] == fn.event_shape


def _rows_fit(site: dict[str, Any], rows: int) -> bool:
    """Return True if a site in the data plate has one value per row, and none beyond its plates."""
    if not any(frame.name == "data" and frame.dim == -1 for frame in site["cond_indep_stack"]):
        return True
    batch = tuple(site["fn"].batch_shape)
    if batch and batch[-1] not in (1, rows):
        return True  # a pair that knows of its rows from elsewhere cannot be judged on a few of them
    given = tuple(site["value"].shape[: site["value"].dim() - site["fn"].event_dim])
    inside = all(one in (1, two) for one, two in zip(reversed(given), reversed(batch), strict=False))
    return given[-1] == rows and inside and len(given) <= len(batch)


def _text(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _mend_event(value: tuple[Any, ...], event: tuple[int, ...], support: Support | None) -> str:
    """Say what makes values and distribution fit."""
    if value == () and event == (1,):
        return "Give one number per row as (N, 1), values[:, None]; or the decoder event_shape=()."
    if value == (1,) and event == ():
        return "Give one class or number per row as (N,), values[:, 0]."
    if sorted(map(str, value)) == sorted(map(str, event)) and value != event:
        return "Are two dimensions transposed?"
    if len(value) == 1 and event == () and support is not None and support.family == "Categorical":
        return "Give one class per row as (N,), of one-hot values values.argmax(-1)."
    if value and event == ():
        return f"Declare the dimensions of one value: .to_event({len(value)})?"
    return "Give the decoder the event_shape of one value, and its network as many outputs."


def _unsupported(batch: Batch, supports: dict[str, Support]) -> list[str]:
    """Modalities with values that their distributions do not score, in words."""
    found = []
    for name, support in supports.items():
        if name in batch and batch.holds(name) and (text := outside(name, batch[name], batch.presence(name), support)):
            found.append(text)
    return found


# -- who reads what is missing -------------------------------------------------------------------------------------


def _peeks_where_missing(model: Any, guide: Any, few: Batch, seen: Batch, hides: bool) -> list[tuple[str, str]]:
    """Find readers of values that rows lack: values are exchanged, and a program whose densities change read them.

    A guide that is shown other rows than the model may read them.
    """
    held = [n for n in few.names if few.holds(n)]
    lacking = [n for n in held if few.presence(n) is not True]
    found = []
    if lacking:
        apart = None if seen is few else seen
        if _changed(model, guide, few, few.replaced({n: _exchanged(few, n) for n in lacking}), apart):
            for name in lacking:
                changed = _changed(model, guide, few, few.replaced({name: _exchanged(few, name)}), apart)
                found += [(who, name) for who in changed]
    for name in held if hides and seen is few else ():
        hidden = few.without(name)
        if few.presence(name) is not False and hidden.rows is not False:
            changed = _changed(model, guide, hidden, hidden.replaced({name: few[name].roll(1, 0)}))
            found += [(who, name) for who in changed if (who, name) not in found]
    return found


def _exchanged(few: Batch, name: str) -> Tensor:
    """Other values of a modality in the rows that lack it, from the rows around."""
    value, mask = few[name], few.presence(name)
    other = value.clone()
    for shift in range(1, few.size):
        rolled = value.roll(shift, 0)
        same = (other == value).reshape(few.size, -1).all(1)
        other[same] = rolled[same]
    if isinstance(mask, Tensor):
        other = torch.where(mask.reshape(-1, *[1] * (value.dim() - 1)), value, other)
    return other


def _changed(model: Any, guide: Any, one: Batch, two: Batch, seen: Batch | None = None) -> list[str]:
    """Find which of model and guide differs between two batches, in rows that have something to be seen.

    With ``seen``, that is what the guide is shown both times.
    """
    rows = one.rows
    rows = rows if isinstance(rows, Tensor) else torch.full((one.size,), rows, device=one.device)
    if not rows.any():
        return []
    try:
        guides = [_run(guide, b if seen is None else seen, 0) for b in (one, two)]
        each = {"guide": [_densities(t) for t in guides]}
        if model is not None:
            each |= {"model": [_densities(_run(model, b, 0, guides[0])) for b in (one, two)]}
    except Exception:  # a pair that cannot do without a modality says so where that is asked of it
        return []
    return [who for who, (a, b) in each.items() if not _alike(a, b, rows)]


@torch.no_grad()
def inspect_sites(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    seed: int = 0,
    stacked: bool = False,
) -> Sites:
    """Return the :class:`Sites` of a pair for a report, with all that is hidden or shown in turn.

    Errors of the story or the guide on these rows are raised, with where they are from.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        seed: of the draws.
        stacked: whether particles will stand to the left of the rows.
    """
    whole, batch = batch, batch[: min(FEW, batch.size)]
    pair_structure(model, guide, batch)
    heard = {name: _Heard() for name in ("model", "guide")}
    of_guide = _run(guide, heard["guide"].listening(batch), seed)
    of_model = _run(model, heard["model"].listening(batch), seed, of_guide)
    sites = _sites(model, guide, batch, of_model, of_guide, heard, ())
    if unsupported := _unsupported(whole, sites.supports):
        return replace(sites, unsupported=tuple(unsupported))  # nothing can be scored
    peeks, blind = _reading(model, guide, batch, seed)
    mixing = ""
    if stacked:
        programs = {"model": model, "guide": guide}
        reached = ReachableObjects(programs)
        with _quietly(reached, programs):
            mixing = _stacking(model, guide, *_probe(whole, None, reached))
    return replace(sites, peeks=tuple(peeks), blind=tuple(blind), mixing=mixing)


def _run(story: Any, batch: Batch, seed: int, trace: Any = None) -> Any:
    """The trace of a run, of a model replayed against its guide's."""
    with torch.inference_mode(False), temporary_seed(seed, batch.device), poutine.block():
        return poutine.trace(story if trace is None else poutine.replay(story, trace=trace)).get_trace(batch)


def _scaled(site: dict[str, Any]) -> bool:
    """Return True if a site has a scale besides that of a subsampled data plate."""
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    own = frames["data"].full_size / frames["data"].size if "data" in frames else 1.0
    scale = site["scale"]
    return not (isinstance(scale, float | int) and math.isclose(scale, own))


def _reading(model: Any, guide: Any, batch: Batch, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Find readers of missing modalities, and modalities that the guide ignores where they are present.

    The modality is hidden, and the rows exchange its hidden values: whoever changes has read them. The rows looked at
    have something else to be seen.
    """
    peeks, blind, whole = [], [], _densities(_run(guide, batch, seed))
    for name in (n for n in batch.names if batch.holds(n) and batch.presence(n) is not False):
        hidden = batch.without(name)
        rows = (
            hidden.rows
            if isinstance(hidden.rows, Tensor)
            else torch.full((batch.size,), hidden.rows, device=batch.device)
        )
        if not rows.any():
            continue
        rolled = hidden.replaced({name: batch[name].roll(1, 0)})
        try:
            traces = [_run(guide, b, seed) for b in (hidden, rolled)]
            scores = [_run(model, b, seed, traces[0]) for b in (hidden, rolled)]
        except Exception:  # a pair that cannot do without a modality says so where its likelihood is asked for
            continue
        for who, (one, other) in (("model", scores), ("guide", traces)):
            if not _alike(_densities(one), _densities(other), rows):
                peeks.append((who, name))
        if _alike(_densities(traces[0]), whole, rows & batch.present[name]) and ("guide", name) not in peeks:
            blind.append(name)
    return peeks, blind


def _densities(trace: Any) -> dict[str, Tensor]:
    """The log-densities of a trace's sites, and its draws as one number each."""
    sites = {**latent_sites(trace), **observed_sites(trace)}
    drawn = {f"{n}'s value": _flat(site) for n, site in latent_sites(trace).items()}
    return drawn | {n: site["fn"].log_prob(site["value"]) for n, site in sites.items()}


def _flat(site: dict[str, Any]) -> Tensor:
    value, event_dim = site["value"], site["fn"].event_dim
    return value.double().flatten(value.dim() - event_dim).sum(-1) if event_dim else value


def _alike(one: dict[str, Tensor], other: dict[str, Tensor], rows: Tensor) -> bool:
    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if a.dim() and a.shape[-1] == len(rows):
            a, b = a[..., rows], b[..., rows]
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)

    return all(same(one[n], other[n]) for n in one if n in other)


# -- who takes particles for rows -----------------------------------------------------------------------------------


def _stacking(model: Any, guide: Any, few: Batch, seen: Batch) -> str:
    """Give the reason that densities differ with particles to the left of the rows; empty if they do not.

    Everything is shown that there are values of, since a modality that is hidden may be decoded for draws of it; and
    what is hidden stays so for a pair that cannot be run otherwise.
    """
    info: PairStructure = pair_structure(model, guide, seen)
    for shown in (few._copy(_masks={n: few.holds(n) for n in few.names}), few):
        try:
            return _compared(model, guide, shown, info)
        except _Incomparable:
            continue
    return ""


class _Incomparable(Exception):
    """Rows on which particles cannot be told from rows."""


def _compared(model: Any, guide: Any, shown: Batch, info: PairStructure) -> str:
    """Give the reason that two particles in one pass differ from the second by itself; empty if they do not.

    Raises:
        _Incomparable: the pair draws as it is scored, or cannot be run on these rows without particles either.
    """
    try:
        with temporary_seed(0, shown.device):
            pair, of_model = _stacked(model, guide, shown, info)
    except Exception as error:
        try:
            of_guide = _run(guide, shown, 0)
            _densities(of_guide), _densities(_run(model, shown, 0, of_guide))
        except Exception as plain:
            raise _Incomparable from plain  # which it says by itself
        return (
            "the story or the guide fails with particles or terms to the left of the rows, a dimension that its "
            f"networks may take for that of rows: {error}. Pass vectorize=False, or write it for (.., N, *event)."
        )
    stacked = {**latent_sites(pair.trace), **latent_sites(of_model)}
    alone: dict[str, Tensor] = {}
    try:
        with temporary_seed(1, shown.device):
            state = generator_state(shown.device)
            traces = _alone(model, guide, shown, stacked)
            random = not torch.equal(state, generator_state(shown.device))
            for trace in traces:
                alone |= {
                    n: s["fn"].log_prob(s["value"]) for n, s in {**latent_sites(trace), **observed_sites(trace)}.items()
                }
            again = _alone(model, guide, shown, stacked)
    except Exception as error:
        raise _Incomparable from error
    if random:
        raise _Incomparable
    dim = pair.particle_dim
    sites = {**latent_sites(pair.trace), **latent_sites(of_model), **observed_sites(of_model)}
    for name, one in alone.items():
        if name not in sites:
            continue
        log_prob = sites[name]["fn"].log_prob(sites[name]["value"])
        second = log_prob.select(dim, 1) if log_prob.dim() >= -dim and log_prob.shape[dim] == 2 else log_prob
        fits = second.numel() == one.numel() and torch.allclose(
            second.reshape(one.shape), one, atol=_rounding(one)[0], rtol=_rounding(one)[1], equal_nan=True
        )
        if not fits and _repeats(name, one, again):
            what = f"p({name} | ..)" if name in observed_sites(of_model) else f"the density of {name}"
            return (
                f"{name}: {what} of a particle is another one among particles than by itself, so a network takes "
                "particles, a dimension to the left of the rows, for rows (a LogSoftmax(dim=1), say, where dim=-1 is "
                "meant, or a BatchNorm1d). Pass vectorize=False, or write it for shapes (.., N, *event)."
            )
    return ""


def _stacked(model: Any, guide: Any, shown: Batch, info: PairStructure) -> tuple[TermPair, Any]:
    view = shown.view({n: shown.presence(n) for n in shown.names}, TermStack({}), {})
    pair = TermPair(model, guide, TermViews(view, view, view, info.nesting, modalities=info.modalities), 2, plated=True)
    with poutine.block():
        pair.guide()
        with poutine.trace() as trace, poutine.replay(trace=pair.trace):
            pair.model()
    for site in observed_sites(trace.trace).values():
        site["fn"].log_prob(site["value"])
    return pair, trace.trace


def _alone(model: Any, guide: Any, shown: Batch, stacked: dict[str, dict[str, Any]]) -> list[Any]:
    """Traces of guide and model at the second particle's values."""
    second = {}
    for name, site in stacked.items():
        frame = next((f for f in site["cond_indep_stack"] if f.name == "particles"), None)
        value, event_dim = site["value"], site["fn"].event_dim
        if frame is not None and value.dim() - event_dim >= -frame.dim:
            place = frame.dim - event_dim
            value = value.select(place, 1) if value.shape[place] == 2 else value.select(place, 0)
        second[name] = value
    given = _Given(second)
    view = shown.view({n: shown.presence(n) for n in shown.names}, TermStack({}), None)  # what is missing is not drawn
    with poutine.block():
        with poutine.trace() as of_guide, given:
            guide(view)
        with poutine.trace() as of_model, given:
            model(view)
    return [of_guide.trace, of_model.trace]


class _Given(poutine.messenger.Messenger):
    """Gives latent sites values, in the shape that their distributions have."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        value, shape = self.values[msg["name"]], msg["fn"].shape()
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        msg["value"], msg["done"] = value, True


def _rounding(x: Tensor) -> tuple[float, float]:
    rough = x.device.type != "cpu" or x.dtype in (torch.float16, torch.bfloat16)
    return ROUGH if rough else ROUNDING


def _repeats(name: str, one: Tensor, again: Sequence[Any]) -> bool:
    """Return True if a density is the same in a second run; else a generator that is not torch's draws in it."""
    for trace in again:
        if name in trace.nodes:
            site = trace.nodes[name]
            return torch.equal(site["fn"].log_prob(site["value"]), one)
    return False
