"""Rows of multimodal data, and which modality each row has."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from .columns import read_mask, read_modality, read_tensor
from .draws import Deferred, draw, plate_shape
from .memo import kept
from .presence import Presence, all_of, any_of, over_events
from .scatter import Stack, restricted


class Batch:
    r"""N rows of up to M modalities, any of them missing in any row.

    Args:
        values: modality name -> tensor, array or sequence of shape ``(N, *event)``. A row that is ``None`` or holds
            a NaN is a missing one; a modality that is ``None`` is missing everywhere.
        present: modality name -> boolean ``(N,)``; a modality not named is present in every row.
        covariates: name -> tensor ``(N, ...)``: known for every row, never modelled or masked (a batch effect).
        lengths: modality name -> ``(N,)`` numbers of valid steps of sequences.

    Missing values are replaced by a copy of a present row, so that they lie in the support of any likelihood;
    nothing that is public depends on them. A missing modality is a masked one everywhere: in training, in a
    likelihood and in sampling. Types are kept: float64 wants networks of float64, or ``nn.MLP``, which casts. A latent
    site called ``"w_<modality>"`` is private to that modality, and counts only where that is decoded.

    Raises:
        ValueError, TypeError: unequal lengths, an unknown name, a dtype or a mask shape that cannot be used.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        present: Mapping[str, Any] | None = None,
        covariates: Mapping[str, Any] | None = None,
        lengths: Mapping[str, Any] | None = None,
    ):
        columns = {name: read_modality(name, value) for name, value in values.items()}
        sizes = {name: len(column[0]) for name, column in columns.items() if column is not None}
        covariates = {name: read_tensor(f"covariate {name!r}", c) for name, c in (covariates or {}).items()}
        sizes |= {f"covariate {name}": len(c) for name, c in covariates.items()}
        if not sizes:
            raise ValueError("a batch needs at least one modality with values; see Batch.empty for rows without any")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"expected as many rows in every modality, got {sizes}")
        self.size: int = next(iter(sizes.values()))
        for name in [*(present or {}), *(lengths or {})]:
            if name not in columns:
                raise ValueError(f"unknown modality {name!r}: this batch holds {list(columns)}")
        self._values: dict[str, Tensor] = {}
        self._masks: dict[str, Presence] = {}
        for name, column in columns.items():
            mask = read_mask(name, (present or {}).get(name), self.size)
            if column is None:
                self._masks[name] = False
                continue
            value, there = column
            mask = there & mask.to(there.device)
            if bool(mask.all()):
                self._masks[name] = True
            elif not bool(mask.any()):
                self._masks[name] = False
            else:
                self._masks[name] = mask
                filler = value[mask][0]
                value = torch.where(mask.reshape(-1, *[1] * (value.dim() - 1)), value, filler)
            self._values[name] = torch.nan_to_num(value) if self._masks[name] is False else value
        for name, value in (lengths or {}).items():
            if len(value) != self.size:
                raise ValueError(f"lengths of {name!r}: expected {self.size} numbers, got {len(value)}")
        self.covariates: dict[str, Tensor] = covariates
        self.lengths: dict[str, Tensor] = {
            name: read_tensor(f"lengths of {name!r}", value).long() for name, value in (lengths or {}).items()
        }
        self.total: int | None = None  # rows of the whole data set, where this batch is a subsample of one
        self._index: Tensor | None = None
        self._rows: Presence | None = None
        self._stack: Stack | None = None
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

    def holds(self, name: str) -> bool:
        """Whether there are values of a modality, be they filler."""
        return name in self._values

    @property
    def rows(self) -> Presence:
        """Which rows have anything at all: boolean ``(N,)``, or True or False for all of them."""
        return any_of(self._masks.values()) if self._rows is None else self._rows

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
        if isinstance(key, int | np.integer) or (isinstance(key, Tensor | np.ndarray) and key.ndim == 0):
            if not -self.size <= key < self.size:
                raise IndexError(f"row {int(key)} of a batch of {self.size} rows")
            key = [int(key) % self.size]
        rows = torch.as_tensor(key, device=self.device) if isinstance(key, Sequence | np.ndarray) else key
        take = lambda tensors: {name: t[rows] for name, t in tensors.items()}  # noqa: E731
        new = self._copy(_values=take(self._values), covariates=take(self.covariates), lengths=take(self.lengths))
        new._masks = {n: m[..., rows] if isinstance(m, Tensor) else m for n, m in self._masks.items()}
        new._memo = None if self._memo is None else {}
        new._rows = self._rows[rows] if isinstance(self._rows, Tensor) else self._rows
        new._index = None if self._index is None else self._index[rows]
        sized = [*new._values.values(), *new.covariates.values()]
        new.size = len(sized[0]) if sized else len(torch.empty(self.size)[rows])
        return new

    # -- other batches ------------------------------------------------------------------------------------------

    def only(self, *names: str) -> Batch:
        """The same rows with every modality but these missing."""
        self._known(names)
        return self._copy(_masks={name: mask if name in names else False for name, mask in self._masks.items()})

    def without(self, *names: str) -> Batch:
        """The same rows with these modalities missing."""
        self._known(names)
        return self._copy(_masks={name: False if name in names else mask for name, mask in self._masks.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same rows on another device."""
        return self.assembled([x.to(device, non_blocking=non_blocking) for x in self.parts()[1]])

    def pin_memory(self) -> Batch:
        """The same rows in pinned memory, from which a GPU can fetch them by itself."""
        return self.assembled([x.pin_memory() for x in self.parts()[1]])

    def subsample(self, index: Tensor) -> Batch:
        """The rows ``index`` as a subsample of all: ``plate()`` scales them up to the whole, as Pyro's plates do."""
        new = self[index]
        new.total, new._index = self.size, index
        return new

    def listened(self, hear: Callable[[str], Any]) -> Batch:
        """The same rows, telling of each modality that a story makes use of after it observed it."""
        return self._copy(_hear=hear)

    def part_of(self, total: int) -> Batch:
        """The same rows as a subsample of ``total``, of which nobody asks where they stand among them."""
        return self._copy(total=total, _index=torch.arange(self.size, device=self.device))

    def replaced(self, values: Mapping[str, Tensor]) -> Batch:
        """The same rows and masks with other values of some modalities, each ``(N, *event)``."""
        self._known(tuple(values))
        return self._copy(_values=self._values | dict(values), _memo=None)

    def padded(self, size: int) -> Batch:
        """The same rows, followed by copies of the first one that weigh nothing, ``size`` in all.

        Unlike a row in which everything is missing, a padding row looks complete: the masks of a modality that all
        rows have stay True.
        """
        if size < self.size:
            raise ValueError(f"expected at least {self.size} rows to pad to, got {size}")
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
        held |= {f"lengths {n}": v for n, v in self.lengths.items()} | {"index": self._index}
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
        new.covariates, new.lengths, new._index = (filled(x) for x in (self.covariates, self.lengths, self._index))
        new._memo = None
        return new

    @staticmethod
    def empty(n: int, like: Batch) -> Batch:
        """n rows in which every modality of ``like`` is missing: what ``generate`` draws from the prior for."""
        if n < 1:
            raise ValueError(f"expected at least one row, got n={n}")
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
        value, hear = self._observed(name, fn, *parents), self._hear
        return value if hear is None else Deferred(lambda: (hear(name), value)[1])

    def _observed(self, name: str, fn: Any, *parents: Tensor) -> Tensor:
        mask = self.presence(name)
        decode = fn if callable(fn) and not isinstance(fn, torch.distributions.Distribution) else lambda *_: fn
        plates = () if mask is True else plate_shape()

        def drawn(d: Any) -> Tensor:
            return draw(d, plates) if self._drawer is None else self._drawer(name, d, plates)

        if mask is False and (self._stack is not None or self._unscored):
            return Deferred(lambda: drawn(decode(*parents)))
        if mask is False:
            d = decode(*parents)
            return pyro.sample(name, d.mask(False), obs=drawn(d), infer={"is_auxiliary": True})
        if self._unscored and mask is True:
            return self._values[name]
        if self._unscored:
            return Deferred(lambda: self._mixed(name, decode(*parents), drawn))
        d = restricted(name, decode, parents, self._stack, self.size)
        value = self._values[name]
        observed = pyro.sample(name, d if mask is True else d.mask(mask), obs=value)
        if not isinstance(mask, Tensor) or observed is not value:  # the latter: drawn anew, as Predictive does
            return observed
        return Deferred(lambda: self._mixed(name, decode(*parents), drawn))

    def _mixed(self, name: str, d: Any, drawn: Callable[[Any], Tensor]) -> Tensor:
        """The values of a modality where it is present, and draws from d elsewhere."""
        there = over_events(self._masks[name], d.event_dim)  # type: ignore[arg-type]
        return torch.where(there, self._values[name], drawn(d))

    def encode(self, name: str, module: Callable[[Tensor], Any]) -> Any:
        """``module(batch[name])``, run once a step however many terms of an objective ask for it."""
        if self._memo is None:
            return module(self._values[name])
        return kept(self._memo, (name, id(module)), lambda: module(self._values[name]), module)

    # -- for objectives -----------------------------------------------------------------------------------------

    def view(
        self,
        masks: Mapping[str, Presence],
        stack: Stack,
        memo: dict[Any, Any] | None,
        rows: Presence | None = None,
        each: Sequence[Mapping[str, Presence]] | None = None,
    ) -> Batch:
        """The same rows under other masks, which may have leading plates, and which do not say what rows are empty.

        ``each`` are the masks term by term, of which more may be known than of the stack of them."""
        rows = self.rows if rows is None else rows
        return self._copy(_masks=dict(masks), _rows=rows, _stack=stack, _memo=memo, _each=each)

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

    def _known(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._masks:
                raise ValueError(f"unknown modality {name!r}: this batch holds {list(self._masks)}")

    def _copy(self, **changes: Any) -> Batch:
        new = object.__new__(Batch)
        new.__dict__.update(self.__dict__)
        new.__dict__.update({"_each": None} | changes)
        return new
