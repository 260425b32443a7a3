"""Rows of multimodal data, and which modality each row has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..handlers.deferred import LazyTensor
from ..handlers.plates import plate_shape, sample_in_plates
from ..utils.arguments import check_integer, check_mapping, describe
from ..utils.network_calls import encode_rows, in_scoring_type
from .context import TermStack, cached
from .masks import Presence, all_of, any_of, over_events
from .parsing import dropped, read_covariate, read_lengths, read_mask, read_modality
from .restrict import decode_for_terms

RESERVED = {"data", "particles", "terms"}  # names of plates


class Batch:
    r"""N rows of up to M modalities, any of them missing in any row.

    Args:
        values: modality name -> tensor, array, series, frame or sequence of shape ``(N, *event)``. A row that is
            ``None`` or ``NA``, or holds a NaN or an entry that a mask of ``numpy.ma`` hides, is a missing one; a
            modality that is ``None`` is missing everywhere. Where such a row has numbers too, a warning says what share
            of them is lost.
        present: modality name -> boolean ``(N,)``; a modality not named is present in every row.
        covariates: name -> tensor ``(N, ...)``: known for every row, never modelled or masked (a batch effect).
        lengths: modality name -> ``(N,)`` numbers of valid steps of sequences, for a story or a guide to read.

    Missing values are replaced by a copy of a present row, so that they lie in the support of any likelihood;
    nothing that is public depends on them. A missing modality is a masked one everywhere: in training, in a
    likelihood and in sampling. Types are kept: float64 wants networks of float64, or ``nn.MLP``, which casts, and
    integers, booleans and half precision are converted where a network or a density needs it. A latent
    site called ``"w_<modality>"`` is private to that modality, and counts only where that is decoded.

    Raises:
        ValueError, TypeError: unequal lengths, an unknown name, a NaN in a covariate, a dtype, a container or a mask
            shape that cannot be used.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        present: Mapping[str, Any] | None = None,
        covariates: Mapping[str, Any] | None = None,
        lengths: Mapping[str, Any] | None = None,
    ):
        values = check_mapping("values", values, "arrays")
        present = check_mapping("present", {} if present is None else present, "masks")
        lengths = check_mapping("lengths", {} if lengths is None else lengths, "numbers of valid steps")
        covariates = check_mapping("covariates", {} if covariates is None else covariates, "arrays")
        if taken := RESERVED & set(values):
            raise ValueError(f"modality {taken.pop()!r}: a plate has that name, {', '.join(map(repr, RESERVED))} have")
        columns = {name: read_modality(name, value) for name, value in values.items()}
        sizes = {name: len(column.values) for name, column in columns.items() if column is not None}
        known = {name: read_covariate(name, value) for name, value in covariates.items()}
        sizes |= {f"covariate {name}": len(c) for name, c in known.items()}
        if not sizes:
            raise ValueError("a batch needs at least one modality with values; see Batch.empty for rows without any")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"expected as many rows in every modality, got {sizes}")
        self.size: int = next(iter(sizes.values()))
        for name in [*present, *lengths]:
            if name not in columns:
                raise ValueError(f"unknown modality {name!r}: this batch holds {list(columns)}")
        self._values: dict[str, Tensor] = {}
        self._masks: dict[str, Presence] = {}
        for name, column in columns.items():
            mask = read_mask(name, present.get(name), self.size)
            if column is None:
                self._masks[name] = False
                continue
            mask = mask.to(column.there.device)
            if lost := dropped(name, column, mask):
                warnings.warn(lost, stacklevel=2)
            self._masks[name], self._values[name] = _masked(column.values, column.there & mask)
        self.covariates: dict[str, Tensor] = known
        self._lengths = {name: self._read_lengths(name, value) for name, value in lengths.items()}
        self._heard_lengths: Callable[[], Any] | None = None  # called when a story or a guide reads the lengths
        self._warned: list[str] = []  # shared by all batches made of this one
        self._ended = False  # whether the values say themselves where a sequence ends, so that nobody has to
        devices = {str(x.device) for x in [*self._values.values(), *known.values()]}
        if len(devices) > 1:
            raise ValueError(f"expected all tensors of a batch on one device, got {', '.join(sorted(devices))}")
        self.total: int | None = None  # rows of the whole data set, where this batch is a subsample of one
        self._index: Tensor | None = None
        self._rows: Presence | None = None
        self._stack: TermStack | None = None
        self._memo: dict[Any, Any] | None = None
        self._each: Sequence[Mapping[str, Presence]] | None = None
        self._hear: Callable[[str], Any] | None = None  # is told of a modality when its observed values are used
        self._drawer: Callable[[str, Any, tuple[int, ...]], Tensor] | None = None  # draws missing modalities
        self._unscored = False  # whether `observe` gives values only, and makes no site

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in the order in which they were given."""
        return tuple(self._masks)

    @property
    def lengths(self) -> dict[str, Tensor]:
        """Modality name -> numbers of valid steps ``(N,)``."""
        if self._heard_lengths is not None:
            self._heard_lengths()
        return self._lengths

    @property
    def device(self) -> torch.device:
        tensors = [*self._values.values(), *self.covariates.values()]
        return tensors[0].device if tensors else torch.get_default_device()

    @property
    def present(self) -> dict[str, Tensor]:
        """Modality name -> boolean ``(N,)``, or ``(T, 1, .., N)`` inside an objective of T terms."""
        return {name: self._tensor_mask(name) for name in self._masks}

    def presence(self, name: str) -> Presence:
        """As ``present[name]``, but True or False where that is known of all rows at once. False if unknown."""
        return self._masks.get(name, False)

    def complete(self, names: Iterable[str]) -> Presence:
        """Which rows have all of these modalities: as :meth:`presence`. None of nothing but incomplete terms."""
        names = tuple(names)
        each = [all_of(masks.get(n, False) for n in names) for masks in self._each or [self._masks]]
        return False if all(m is False for m in each) else all_of(self.presence(n) for n in names)

    def having(self, names: Iterable[str] | None = None, *, every: bool = False) -> Tensor:
        """The rows that have any of some modalities, or with ``every`` all of them: boolean ``(N,)``.

        Args:
            names: of modalities; None for all that the batch knows.
        """
        masks = [self._tensor_mask(name) for name in (self.names if names is None else names)]
        if not masks:
            return torch.full((self.size,), every, dtype=torch.bool, device=self.device)
        found = torch.stack(masks)
        return found.all(0) if every else found.any(0)

    def holds(self, name: str) -> bool:
        """Whether there are values of a modality, be they filler."""
        return name in self._values

    @property
    def rows(self) -> Presence:
        """Which rows have anything at all: boolean ``(N,)``, or True or False for all of them."""
        return any_of(self._masks.values()) if self._rows is None else self._rows

    @property
    def plain(self) -> bool:
        """True if these are rows alone, and not a view of them for the terms of an objective, or with draws beside."""
        return self._stack is None and self._memo is None and not getattr(self, "_drawn", None)

    def __len__(self) -> int:
        return self.size

    def __contains__(self, name: str) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __repr__(self) -> str:
        def described(name: str) -> str:
            shape = tuple(self._values[name].shape[1:]) if name in self._values else "?"
            mask = self._masks[name]
            there = {True: "all", False: "none"}[mask] if isinstance(mask, bool) else f"{mask.float().mean():.0%}"
            return f"{name}{shape} present: {there}"

        return f"Batch(size={self.size}, {', '.join(map(described, self._masks))})"

    def __getitem__(self, key: Any) -> Any:
        """``batch["image"]``: the values (filler where missing). ``batch[rows]``: a batch of those rows."""
        if isinstance(key, str):
            if key not in self._values:
                raise KeyError(f"no values of modality {key!r}: this batch holds {list(self._values)}")
            return self._values[key]
        return self._taken(self._selected(key))

    def _taken(self, rows: Any) -> Batch:
        take = lambda tensors: {name: t[rows] for name, t in tensors.items()}  # noqa: E731
        new = self._copy(_values=take(self._values), covariates=take(self.covariates), _lengths=take(self._lengths))
        new._masks = {n: m[..., rows] if isinstance(m, Tensor) else m for n, m in self._masks.items()}
        new._memo = None if self._memo is None else {}
        new._rows = self._rows[..., rows] if isinstance(self._rows, Tensor) else self._rows
        new._index = None if self._index is None else self._index[rows]
        sized = [*new._values.values(), *new.covariates.values()]
        new.size = len(sized[0]) if sized else len(torch.empty(self.size)[rows])
        return new

    # -- other batches ------------------------------------------------------------------------------------------

    def only(self, *names: str) -> Batch:
        """The same rows with every modality but these missing."""
        self._known(names, "only")
        return self._copy(_masks={name: mask if name in names else False for name, mask in self._masks.items()})

    def without(self, *names: str) -> Batch:
        """The same rows with these modalities missing."""
        self._known(names, "without")
        return self._copy(_masks={name: False if name in names else mask for name, mask in self._masks.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same rows on another device. Raises a ValueError or a TypeError for what is none."""
        device = _device(device)
        return self.assembled([x.to(device, non_blocking=non_blocking) for x in self.parts()[1]])

    def pin_memory(self) -> Batch:
        """The same rows in pinned memory, from which a GPU can fetch them by itself."""
        return self.assembled([x.pin_memory() for x in self.parts()[1]])

    def subsample(self, index: Tensor) -> Batch:
        """The rows ``index`` as a subsample of all: ``plate()`` scales them up to the whole, as Pyro's plates do."""
        index = self._selected(index)
        if not isinstance(index, Tensor) or index.dtype == torch.bool:
            index = torch.arange(self.size, device=self.device)[index]
        new = self._taken(index)
        new.total, new._index = self.size, index
        return new

    def listened(self, hear: Callable[[str], Any]) -> Batch:
        """The same rows, telling of each modality that a story makes use of after it observed it."""
        return self._copy(_hear=hear)

    def noting_lengths(self, hear: Callable[[], Any]) -> Batch:
        """The same rows, calling ``hear`` when the lengths of sequences are read."""
        return self._copy(_heard_lengths=hear)

    def with_end_marks(self) -> Batch:
        """The same rows, whose sequences hold the mark of their end, so that nothing has to read their lengths."""
        return self._copy(_ended=True)

    def warn_unread_lengths(self) -> None:
        """Warn, once for a data set, that neither story nor guide reads the lengths of its sequences."""
        if self._ended or not self._lengths or self._warned:
            return
        self._warned.append("lengths")
        warnings.warn(
            f"neither the story nor the guide reads the lengths of {', '.join(map(repr, self._lengths))}: what lies "
            "behind the end of a sequence counts as data, in encoders and likelihoods. Read batch.lengths in them",
            stacklevel=2,
        )

    def block(self, rows: Any) -> Batch:
        """Return some rows that keep their places in the plate, by which a story may index what it has for each row.

        An evaluation that goes through rows in parts is that of all of them at once.

        Args:
            rows: a slice, or indices ``(n,)``.
        """
        new = self[rows]
        places = torch.arange(self.size, device=self.device) if self._index is None else self._index
        new.total, new._index = self.total or self.size, places[self._selected(rows)]
        return new

    def part_of(self, total: int) -> Batch:
        """The same rows as a subsample of ``total``, of which nobody asks where they stand among them."""
        total = check_integer("total", total, least=self.size)
        return self._copy(total=total, _index=torch.arange(self.size, device=self.device))

    def replaced(self, values: Mapping[str, Tensor]) -> Batch:
        """The same rows and masks with other values of some modalities, each ``(N, *event)``.

        Raises:
            ValueError: an unknown modality, or another number of rows.
            TypeError: values that are no tensor of numbers.
        """
        values = check_mapping("values", values, "tensors")
        self._known(tuple(values), "replaced")
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"modality {name!r}: expected a tensor, got {describe(value)}")
            if value.dim() == 0 or len(value) != self.size:
                raise ValueError(f"modality {name!r}: expected {self.size} rows, got shape {tuple(value.shape)}")
        return self._copy(_values=self._values | values, _memo=None)

    def padded(self, size: int) -> Batch:
        """The same rows, followed by copies of the first one that weigh nothing, ``size`` in all.

        Unlike a row in which everything is missing, a padding row looks complete: the masks of a modality that all
        rows have stay True.
        """
        size = check_integer("size", size, least=self.size)
        index = torch.arange(size, device=self.device)
        real = index < self.size
        new = self[torch.where(real, index, 0)]
        new._rows = all_of([new.rows, real])
        new.total = self.total
        return new

    def parts(self) -> tuple[Hashable, list[Tensor]]:
        """The tensors that the batch is made of, and all else that tells it from another batch."""
        masks = {"rows": self._rows} | {f"present {n}": m for n, m in self._masks.items()}
        held = {f"value {n}": v for n, v in self._values.items()} | {f"mask {n}": m for n, m in masks.items()}
        held |= {f"covariate {n}": v for n, v in self.covariates.items()}
        held |= {f"lengths {n}": v for n, v in self._lengths.items()} | {"index": self._index}
        tensors = {key: x for key, x in held.items() if isinstance(x, Tensor)}
        rest = tuple((key, x) for key, x in held.items() if not isinstance(x, Tensor))
        shapes = tuple((key, x.shape, x.dtype, x.device) for key, x in tensors.items())
        return (self.size, self.total, shapes, rest), list(tensors.values())

    def assembled(self, tensors: Iterable[Tensor]) -> Batch:
        """A batch like this one of other tensors, in the order of :meth:`parts`."""
        left = iter(tensors)

        def filled(held: Any) -> Any:
            if isinstance(held, dict):
                return {name: filled(x) for name, x in held.items()}
            return next(left) if isinstance(held, Tensor) else held

        new = self._copy(_values=filled(self._values), _rows=filled(self._rows), _masks=filled(self._masks))
        new.covariates = filled(self.covariates)
        new._lengths = filled(self._lengths)
        new._index = filled(self._index)
        new._memo = None
        return new

    @staticmethod
    def empty(n: int, like: Batch) -> Batch:
        """n rows in which every modality of ``like`` is missing: what ``generate`` draws from the prior for."""
        n, like = check_integer("n", n, least=1), check_batch(like, "like")
        new = like[torch.zeros(n, dtype=torch.long, device=like.device)]
        return new._copy(_masks=dict.fromkeys(like._masks, False), total=None, _index=None)

    # -- inside a story -----------------------------------------------------------------------------------------

    @contextmanager
    def plate(self) -> Iterator[Tensor]:
        """The plate ``"data"`` at dim -1. Rows in which everything is missing are masked, latent sites included.

        ``pyro.plate("data", batch.size, dim=-1)`` serves in its place, but that under Pyro's own ELBOs it does not
        mask such rows, and does not scale a subsample.
        """
        rows = self.rows
        plate = pyro.plate("data", self.total or self.size, subsample=self._index, dim=-1)
        with plate as index, poutine.mask(mask=rows):
            yield index

    def observe(self, name: str, fn: Any, *parents: Tensor) -> Tensor:
        """The one way in which a story meets data: the site ``name``, observed where the modality is present.

        Where it is missing the value is a draw from its distribution, which scores nothing, and which is made only
        if a descendant uses it. So a modality may be the parent of another one: descendants see the draw. One that
        has no ``rsample`` passes no gradient from them to its parents; sum such a label out instead, as a latent.

        Args:
            name: the modality, and the name of the site.
            fn: a distribution, or a callable giving one: ``fn(*parents)``. A callable is run only for those terms
                of an objective that decode this modality.
            parents: tensors whose leading dimensions are those of the plates; one that has none of them (a
                covariate ``(N, ...)``) is handed over as it is.

        Returns:
            ``(.., N, *event)``: the values, with draws in place of missing ones.
        """
        if not isinstance(name, str):
            raise TypeError(f"observe: expected the name of a modality first, got {describe(name)}")
        value, hear = self._observed(name, fn, *parents), self._hear
        return value if hear is None else LazyTensor(lambda: (hear(name), value)[1])

    def _observed(self, name: str, fn: Any, *parents: Tensor) -> Tensor:
        mask = self.presence(name)
        decode = fn if callable(fn) and not isinstance(fn, torch.distributions.Distribution) else lambda *_: fn
        plates = () if mask is True else plate_shape()

        def drawn(d: Any) -> Tensor:
            return sample_in_plates(d, plates) if self._drawer is None else self._drawer(name, d, plates)

        if mask is False and (self._stack is not None or self._unscored):
            return LazyTensor(lambda: drawn(decode(*parents)))
        if mask is False:
            d = _distribution(name, decode(*parents))
            return pyro.sample(name, d.mask(False), obs=drawn(d), infer={"is_auxiliary": True})
        if self._unscored and mask is True:
            return self._values[name]
        if self._unscored:
            return LazyTensor(lambda: self._mixed(name, decode(*parents), drawn))
        d = _distribution(name, decode_for_terms(name, decode, parents, self._stack, self.size))
        value = self._values[name]
        scored = in_scoring_type(d, value)
        observed = pyro.sample(name, d if mask is True else d.mask(mask), obs=scored)
        if observed is not scored:  # drawn anew, as Predictive does
            return observed
        if not isinstance(mask, Tensor):
            return value
        return LazyTensor(lambda: self._mixed(name, decode(*parents), drawn))

    def _mixed(self, name: str, d: Any, drawn: Callable[[Any], Tensor]) -> Tensor:
        """The values of a modality where it is present, and draws from d elsewhere."""
        there = over_events(self._masks[name], d.event_dim)  # type: ignore[arg-type]
        return torch.where(there, self._values[name], drawn(d))

    def encode(self, name: str, module: Callable[[Tensor], Any]) -> Any:
        """``module(batch[name])``, run once a step however many terms of an objective ask for it."""
        if name not in self._values:
            raise ValueError(f"encode: no values of modality {name!r}: this batch holds {list(self._values)}")
        if self._memo is None:
            return encode_rows(name, module, self._values[name])
        return cached(self._memo, (name, id(module)), lambda: encode_rows(name, module, self._values[name]), module)

    # -- for objectives -----------------------------------------------------------------------------------------

    def view(
        self,
        masks: Mapping[str, Presence],
        stack: TermStack,
        memo: dict[Any, Any] | None,
        rows: Presence | None = None,
        each: Sequence[Mapping[str, Presence]] | None = None,
    ) -> Batch:
        """The same rows under other masks, which may have leading plates, and which do not say what rows are empty.

        ``each`` are the masks term by term, of which more may be known than of the stack of them."""
        rows = self.rows if rows is None else rows
        return self._copy(_masks=dict(masks), _rows=rows, _stack=stack, _memo=memo, _each=each)

    def terms(self) -> Sequence[Mapping[str, Presence]]:
        """The masks of each term that the rows are shown to, in an objective's pass; else those of the rows."""
        return self._each or [self._masks]

    def drawn_by(self, drawer: Callable[[str, Any, tuple[int, ...]], Tensor], unscored: bool = False) -> Batch:
        """The same rows, whose missing modalities a function draws where a story uses them.

        Args:
            drawer: ``(name, distribution, plates)`` -> a draw for every element of the plates.
            unscored: True makes ``observe`` give values without a site, so that no decoder runs but for such a draw.
        """
        return self._copy(_drawer=drawer, _unscored=unscored, _each=self._each)

    def _tensor_mask(self, name: str) -> Tensor:
        mask = self._masks[name]
        if isinstance(mask, Tensor):
            return mask
        return torch.full((self.size,), mask, dtype=torch.bool, device=self.device)

    def _selected(self, key: Any) -> Any:
        """The rows that a key stands for, as what tensors are indexed by: a slice, or a tensor of booleans or integers.

        Raises:
            TypeError: a key of another kind.
            ValueError: a mask of another number of rows.
            IndexError: a row beyond the end.
        """
        if isinstance(key, Tensor) and key.dtype == torch.long and key.dim() == 1 and key.device == self.device:
            return key  # as at every step of a training
        wanted = "expected the name of a modality, a row, a slice, a mask or an index of rows"
        if isinstance(key, slice):
            return key
        if isinstance(key, bool | np.bool_ | float | complex) or not isinstance(
            key, int | np.integer | Tensor | np.ndarray | Sequence
        ):
            raise TypeError(f"{wanted}, got {describe(key)}")
        if isinstance(key, int | np.integer) or (isinstance(key, Tensor | np.ndarray) and key.ndim == 0):
            row = check_integer("row", key)
            if not -self.size <= row < self.size:
                raise IndexError(f"row {row} of a batch of {self.size} rows")
            key = [row % self.size]
        try:
            rows = torch.as_tensor(key, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{wanted}, got {describe(key)}") from None
        rows = rows.long() if rows.numel() == 0 and rows.dtype != torch.bool else rows
        if rows.is_floating_point() or rows.is_complex() or rows.dim() != 1:
            raise TypeError(f"{wanted}, got {describe(key)}")
        if rows.dtype == torch.bool and len(rows) != self.size:
            raise ValueError(f"expected a mask of {self.size} rows, got one of {len(rows)}")
        return rows if rows.dtype == torch.bool else rows.long()

    def _read_lengths(self, name: str, value: Any) -> Tensor:
        held = self._values.get(name)
        steps = held.shape[1] if held is not None and held.dim() > 1 else None
        return read_lengths(name, value, self.size, steps)

    def _known(self, names: tuple[str, ...], what: str) -> None:
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{what}: expected names of modalities one by one, got {describe(name)}")
            if name not in self._masks:
                raise ValueError(f"unknown modality {name!r}: this batch holds {list(self._masks)}")

    def _copy(self, **changes: Any) -> Batch:
        new = object.__new__(Batch)
        new.__dict__.update(self.__dict__)
        new.__dict__.update({"_each": None} | changes)
        return new


def check_batch(value: Any, argument: str = "batch", least: int = 1) -> Batch:
    """Return a batch. Raises a TypeError for anything else, a ValueError for one of fewer than ``least`` rows."""
    if not isinstance(value, Batch):
        hint = ""
        if isinstance(value, Mapping):
            hint = ": make one of it, Batch(values)"
        elif isinstance(value, Tensor | np.ndarray | list):
            hint = ": make one of it, Batch({'image': values}), with a name of yours"
        elif hasattr(value, "__iter__") and hasattr(value, "dataset"):
            hint = ": a Batch holds all rows, and fit takes minibatches of it by itself"
        raise TypeError(f"expected {argument} to be a pyro_mm.Batch, got {describe(value)}{hint}")
    if value.size < least:
        wanted = "one row" if least == 1 else f"{least} rows"
        raise ValueError(f"expected {argument} to have {wanted} at least, got {value.size or 'none'}")
    return value


def _distribution(name: str, d: Any) -> Any:
    if isinstance(d, torch.distributions.Distribution):
        return d
    raise TypeError(
        f"site {name!r}: expected a distribution, or a module or function that gives one, got {describe(d)}"
    )


def _masked(value: Tensor, mask: Tensor) -> tuple[Presence, Tensor]:
    """Return the mask of rows with a value, and the values with a copy of one of them in the others."""
    if bool(mask.all()):
        return True, value
    if not bool(mask.any()):
        return False, torch.nan_to_num(value)
    return mask, torch.where(over_events(mask, value.dim() - 1), value, value[mask][0])


def _device(value: Any) -> torch.device:
    if not isinstance(value, str | int | torch.device) or isinstance(value, bool):
        raise TypeError(f"expected device to be the name of a device, got {describe(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"expected device to be the name of a device, got {value!r}: {error}") from None
