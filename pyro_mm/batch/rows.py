"""The rows of a batch: what they hold, and batches made of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, overload

import torch
from torch import Tensor

from ..utils.arguments import check_integer, check_mapping, describe
from .context import Context
from .html import batch_html
from .indexing import RowsKey, read_device, read_rows_key
from .keywords import Covariates, MissingCovariate
from .masks import Presence, all_of, any_of
from .parsing import read_lengths
from .stored import StoredColumn


class Rows:
    """The base class of :class:`~pyro_mm.batch.batch.Batch`: the values, masks, covariates and lengths of N rows.

    Attributes:
        size: N.
        total: the number of rows of the whole data set, where these are a subsample of one; else None.
        covariates: name -> ``(N, ...)``.
    """

    size: int
    total: int | None
    covariates: dict[str, Tensor]
    _values: dict[str, Tensor]
    _masks: dict[str, Presence]
    _lengths: dict[str, Tensor]
    _index: Tensor | None  # places of the rows in the whole data set, (N,)
    _rows: Presence | None  # the rows that count; None for those with any modality
    _context: Context

    # -- contents -----------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in the order in which they were given."""
        return tuple(self._masks)

    @property
    def lengths(self) -> dict[str, Tensor]:
        """Modality -> numbers of valid steps ``(N,)``."""
        return self._lengths

    @property
    def device(self) -> torch.device:
        """The device of the values and covariates."""
        tensors = [*self._values.values(), *self.covariates.values()]
        return tensors[0].device if tensors else torch.get_default_device()

    @property
    def present(self) -> dict[str, Tensor]:
        """Modality -> boolean ``(N,)``, or ``(T, 1, .., N)`` inside an objective of T terms."""
        return {name: self._tensor_mask(name) for name in self._masks}

    def presence(self, name: str) -> Presence:
        """Return ``present[name]``, or True or False where that is known of all rows. False for an unknown name."""
        return self._masks.get(name, False)

    def complete(self, names: Iterable[str]) -> Presence:
        """Return the rows that have all of some modalities, in the form of :meth:`presence`.

        It is False if no term of an objective shows all of them in any row.
        """
        names = tuple(names)
        each = [all_of(masks.get(n, False) for n in names) for masks in self.terms()]
        return False if all(m is False for m in each) else all_of(self.presence(n) for n in names)

    def having(self, names: Iterable[str] | None = None, *, every: bool = False) -> Tensor:
        """Return the rows that have any of some modalities, or with ``every`` all of them: boolean ``(N,)``.

        Args:
            names: modalities; None for all that the batch knows.
            every: True to ask for all of them.
        """
        masks = [self._tensor_mask(name) for name in (self.names if names is None else names)]
        if not masks:
            return torch.full((self.size,), every, dtype=torch.bool, device=self.device)
        found = torch.stack(masks)
        return found.all(0) if every else found.any(0)

    def holds(self, name: str) -> bool:
        """Return True if there are values of a modality, or filler for them."""
        return name in self._values

    def covariate(self, name: str, reader: str) -> Tensor:
        """Return a covariate ``(N, ...)``.

        Args:
            name: the covariate.
            reader: what reads it, in words, for the error: ``"the prior"``.

        Raises:
            ValueError: the batch has no such covariate.
        """
        if name not in self.covariates:
            raise MissingCovariate.of(name, list(self.covariates), reader)
        return self.covariates[name]

    @property
    def rows(self) -> Presence:
        """The rows that have any modality: boolean ``(N,)``, or True or False for all of them."""
        return any_of(self._masks.values()) if self._rows is None else self._rows

    @property
    def is_plain(self) -> bool:
        """True for rows alone: no view of them for the terms of an objective, and none with a guide's draws."""
        return self._context.is_plain

    def __len__(self) -> int:
        return self.size

    def __contains__(self, name: str) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __repr__(self) -> str:
        def text(name: str) -> str:
            shape = tuple(self._values[name].shape[1:]) if name in self._values else "?"
            mask = self._masks[name]
            there = {True: "all", False: "none"}[mask] if isinstance(mask, bool) else f"{mask.float().mean():.0%}"
            return f"{name}{shape} present: {there}"

        return f"Batch(size={self.size}, {', '.join(map(text, self._masks))})"

    def _repr_html_(self) -> str:
        return batch_html(self)

    # -- other rows ---------------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: RowsKey) -> Self: ...

    def __getitem__(self, key: str | RowsKey) -> Tensor | Self:
        """Return values by ``batch["image"]`` (filler where missing), or a batch of some rows by ``batch[rows]``.

        Values in a file are a column that has a shape and a dtype, and cannot be computed with: ``batch[rows]`` reads
        some of them, and ``batch.read()`` all.
        """
        if isinstance(key, str):
            if key not in self._values:
                raise KeyError(f"no values of modality {key!r}: this batch holds {list(self._values)}")
            return self._values[key]
        return self._take(read_rows_key(key, self.size, self.device))

    def _take(self, rows: Any) -> Self:
        """Return some rows, selected by what a tensor can be indexed with."""
        new = self._copy(
            _values={name: x[rows] for name, x in self._values.items()},
            covariates=Covariates({name: x[rows] for name, x in self.covariates.items()}),
            _lengths={name: x[rows] for name, x in self._lengths.items()},
            _masks={name: _mask_rows(mask, rows) for name, mask in self._masks.items()},
            _rows=_mask_rows(self._rows, rows),
            _index=None if self._index is None else self._index[rows],
        )
        if self._context.cache is not None:
            new._context = new._context._replace(cache={})
        tensors = [*new._values.values(), *new.covariates.values()]
        new.size = len(tensors[0]) if tensors else len(torch.empty(self.size)[rows])
        return new

    def only(self, *names: str) -> Self:
        """Return the same rows with all other modalities missing."""
        self._check_known(names, "only")
        return self._copy(_masks={name: mask if name in names else False for name, mask in self._masks.items()})

    def without(self, *names: str) -> Self:
        """Return the same rows with these modalities missing."""
        self._check_known(names, "without")
        return self._copy(_masks={name: False if name in names else mask for name, mask in self._masks.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the same rows on another device. Raises a ValueError or a TypeError for an unknown device."""
        device = read_device(device)
        new = self.with_tensors([x.to(device, non_blocking=non_blocking) for x in self.parts()[1]])
        if self.is_stored:
            new._values = {name: _stored_to(x, device) for name, x in new._values.items()}
            new.covariates = Covariates({name: _stored_to(x, device) for name, x in new.covariates.items()})
        return new

    def pin_memory(self) -> Self:
        """Return the same rows in pinned memory, from which a GPU can fetch them asynchronously."""
        return self.with_tensors([x.pin_memory() for x in self.parts()[1]])

    @property
    def is_stored(self) -> bool:
        """True if values or covariates are in a file, of which rows are read as they are taken."""
        return any(isinstance(x, StoredColumn) for x in (*self._values.values(), *self.covariates.values()))

    def read(self) -> Self:
        """Return the same rows with all values in memory; the batch itself if they are there."""
        if not self.is_stored:
            return self
        values = {name: x[:] if isinstance(x, StoredColumn) else x for name, x in self._values.items()}
        covariates = {name: x[:] if isinstance(x, StoredColumn) else x for name, x in self.covariates.items()}
        return self._copy(_values=values, covariates=Covariates(covariates))

    def read_blocks(self) -> Iterator[Self]:
        """Yield the batch itself if its values are in memory; else blocks of rows that a few megabytes hold."""
        if not self.is_stored:
            yield self
            return
        columns: list[Any] = [*self._values.values(), *self.covariates.values()]
        most = min(x.rows_at_once for x in columns if isinstance(x, StoredColumn))
        for first in range(0, self.size, most):
            yield self.block(slice(first, first + most))

    def subsample(self, index: Tensor) -> Self:
        """Return the rows ``index`` as a subsample: ``plate()`` scales them up to all rows, as Pyro's plates do."""
        index = read_rows_key(index, self.size, self.device)
        if not isinstance(index, Tensor) or index.dtype == torch.bool:
            index = torch.arange(self.size, device=self.device)[index]
        new = self._take(index)
        new.total = self.size
        new._index = index % self.size
        return new

    def block(self, rows: Any) -> Self:
        """Return some rows with their places in the plate, so that a story can index its parameters per row.

        Evaluating all rows block by block gives the same numbers as evaluating them at once.

        Args:
            rows: a slice, or row numbers ``(n,)``.
        """
        new = self._take(read_rows_key(rows, self.size, self.device))
        places = torch.arange(self.size, device=self.device) if self._index is None else self._index
        new.total = self.total or self.size
        new._index = places[read_rows_key(rows, self.size, self.device)]
        return new

    def part_of(self, total: int, places: Sequence[int] | None = None) -> Self:
        """Return the same rows as a subsample of ``total`` rows.

        Args:
            total: the number of rows that the plate is sized to.
            places: the place of each row in the plate; None for those in this batch.
        """
        total = check_integer("total", total, least=self.size)
        index = torch.arange(self.size, device=self.device)
        if places is not None:
            index = torch.tensor(places, device=self.device)
        return self._copy(total=total, _index=index)

    def standalone(self) -> Self:
        """Return the same rows as a data set of their own: scaled up to no other, and without cached results."""
        return self._copy(total=None, _index=None, _context=self._context._replace(cache=None, term_masks=None))

    def replaced(self, values: Mapping[str, Tensor]) -> Self:
        """Return the same rows and masks with other values of some modalities.

        Args:
            values: modality -> tensor ``(N, *event)``.

        Raises:
            ValueError: an unknown modality, or another number of rows.
            TypeError: anything but a tensor.
        """
        values = check_mapping("values", values, "tensors")
        self._check_known(tuple(values), "replaced")
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"modality {name!r}: expected a tensor, got {describe(value)}")
            if value.dim() == 0 or len(value) != self.size:
                raise ValueError(f"modality {name!r}: expected {self.size} rows, got shape {tuple(value.shape)}")
        context = self._context._replace(cache=None, term_masks=None)
        return self._copy(_values=self._values | values, _context=context)

    def filled(self, name: str, value: Tensor) -> Self:
        """Return the same rows with one value of a modality in all of them.

        Args:
            name: the modality, known or not.
            value: ``(*event)``.
        """
        values = self._values | {name: value.expand(self.size, *value.shape)}
        context = self._context._replace(cache=None, term_masks=None)
        return self._copy(_values=values, _masks=self._masks | {name: True}, _context=context)

    def with_masks(self, masks: Mapping[str, Presence]) -> Self:
        """Return the same rows under other masks, which count as before."""
        return self._copy(_masks=dict(masks))

    def with_lengths(self, lengths: Mapping[str, Tensor]) -> Self:
        """Return the same rows with other numbers of valid steps of some sequences.

        Args:
            lengths: modality -> integers ``(N,)``, from 0 to the steps of its values.

        Raises:
            ValueError: a modality that the batch does not hold, or lengths that are none of its values.
        """
        lengths = check_mapping("lengths", lengths, "numbers of valid steps")
        self._check_known(tuple(lengths), "with_lengths")
        steps = {name: self[name].shape[1] if self[name].dim() > 1 else None for name in lengths}
        read = {name: read_lengths(name, value, self.size, steps[name]) for name, value in lengths.items()}
        read = {name: value.to(self.device) for name, value in read.items()}
        return self._copy(_lengths=self._lengths | read, _context=self._context._replace(cache=None, term_masks=None))

    def padded(self, size: int) -> Self:
        """Return the same rows, followed by copies of the first one with weight zero, ``size`` in all.

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
        """Return a key of this batch's form, equal for batches of the same form, and the list of its tensors."""
        masks = {"rows": self._rows} | {f"present {n}": m for n, m in self._masks.items()}
        held: dict[str, Any] = {f"value {n}": v for n, v in self._values.items()}
        held |= {f"mask {n}": m for n, m in masks.items()}
        held |= {f"covariate {n}": v for n, v in self.covariates.items()}
        held |= {f"lengths {n}": v for n, v in self._lengths.items()} | {"index": self._index}
        tensors = {key: x for key, x in held.items() if isinstance(x, Tensor)}
        rest = tuple((key, x) for key, x in held.items() if not isinstance(x, Tensor))
        shapes = tuple((key, x.shape, x.dtype, x.device) for key, x in tensors.items())
        return (self.size, self.total, shapes, rest), list(tensors.values())

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """Return a batch of the same form with other tensors, in the order of :meth:`parts`."""
        left = iter(tensors)

        def fill(held: Any) -> Any:
            if isinstance(held, dict):
                return type(held)({name: fill(x) for name, x in held.items()})
            return next(left) if isinstance(held, Tensor) else held

        new = self._copy(_context=self._context._replace(cache=None, term_masks=None))
        for attribute in ("_values", "_rows", "_masks", "covariates", "_lengths", "_index"):  # as in `parts`
            setattr(new, attribute, fill(getattr(self, attribute)))
        new.covariates = Covariates(new.covariates)
        return new

    def terms(self) -> Sequence[Mapping[str, Presence]]:
        """Return the masks of each term within an objective's pass; outside of one, a list of the rows' own masks."""
        return self._context.term_masks or [self._masks]

    def _tensor_mask(self, name: str) -> Tensor:
        """Return the mask of a modality as a tensor."""
        mask = self._masks[name]
        if isinstance(mask, Tensor):
            return mask
        return torch.full((self.size,), mask, dtype=torch.bool, device=self.device)

    def _check_known(self, names: tuple[str, ...], method: str) -> None:
        """Raise a TypeError or a ValueError unless all of these are names of modalities."""
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{method}: expected names of modalities one by one, got {describe(name)}")
            if name not in self._masks:
                raise ValueError(f"unknown modality {name!r}: this batch holds {list(self._masks)}")

    def _copy(self, **changes: Any) -> Self:
        """Return a batch with other attributes; unless a context is among them, masks of terms are dropped."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        if "_context" not in changes and self._context.term_masks is not None:
            new._context = self._context._replace(term_masks=None)
        return new


def _stored_to(column: Any, device: torch.device) -> Any:
    return column.to(device) if isinstance(column, StoredColumn) else column


def _mask_rows(mask: Any, rows: Any) -> Any:
    return mask[..., rows] if isinstance(mask, Tensor) else mask
