"""Random batches: what is handed over, in many forms, and beside it what it is, in NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from hypothesis import strategies as st

import pyro_mm as mm
from tests.support.properties import generator, seeds

TORCH_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "uint8")

# kind of a modality -> the dtypes that its values may have, and the event shapes
KINDS = {
    "real": (FLOATS, [(), (1,), (3,), (2, 2), (1, 3), (2, 1, 2)]),
    "bits": (("bool", *FLOATS, *INTEGERS), [(1,), (3,), (2, 2), ()]),
    "counts": ((*INTEGERS, *FLOATS), [(2,), (1,), ()]),
    "classes": ((*INTEGERS, *FLOATS), [()]),
    "tokens": (("int64", "int32"), [(1,), (4,)]),
    "sequence": (("float32", "float64", "float16"), [(3, 2), (1, 1)]),
}
NAMES = ("image", "a", "label", "x 1")
NUM_CLASSES = 3
END = 0  # token that ends a string

TENSORS = ["tensor", "transposed", "strided", "expanded", "grad", "inference"]
ARRAYS = ["numpy", "fortran", "reversed", "big-endian", "read-only"]
SEQUENCES = ["list", "tuple", "list of tensors", "list of arrays"]


@dataclass(repr=False)
class Column:
    """One modality as it is.

    Attributes:
        values: ``(N, *event)``, complete, exact in ``dtype``.
        missing: the rows that lack it, ``(N,)``.
        lengths: numbers of valid steps ``(N,)``, or None.
    """

    name: str
    kind: str
    dtype: str
    values: np.ndarray
    missing: np.ndarray
    lengths: np.ndarray | None = None

    @property
    def event(self):
        return self.values.shape[1:]

    def valid(self):
        """Return the entries that count, of the shape of the values: those of rows and steps that are there."""
        there = np.broadcast_to(~self.missing.reshape(-1, *[1] * len(self.event)), self.values.shape)
        if self.lengths is None:
            return there
        steps = np.arange(self.event[0]) < self.lengths[:, None]
        return there & steps.reshape(*steps.shape, *[1] * (len(self.event) - 1))

    def _repr_pretty_(self, printer, _):
        printer.text(repr(self))

    def __repr__(self):
        lengths = "" if self.lengths is None else f", lengths {self.lengths.tolist()}"
        missing = np.flatnonzero(self.missing).tolist()
        return f"{self.kind} of {self.dtype}, {self.values.shape}, missing in rows {missing}{lengths}"

    def tensor(self, dtype=None):
        return torch.tensor(self.values).to(TORCH_DTYPES[self.dtype] if dtype is None else dtype)

    def take(self, rows):
        lengths = None if self.lengths is None else self.lengths[rows]
        return Column(self.name, self.kind, self.dtype, self.values[rows], self.missing[rows], lengths)


@dataclass(repr=False)
class Data:
    """Rows as they are, and the arguments of a batch that say so.

    Attributes:
        columns: name -> column.
        covariates: name -> values ``(N, ..)``.
        arguments: of :class:`pyro_mm.Batch`.
        dtypes: name -> torch's dtype of the values in a batch.
    """

    columns: dict[str, Column]
    covariates: dict[str, np.ndarray]
    arguments: dict = field(default_factory=dict)
    dtypes: dict = field(default_factory=dict)

    def _repr_pretty_(self, printer, _):
        printer.text(repr(self))

    def __repr__(self):
        held = {
            name: (type(x).__name__, x.stride()) if isinstance(x, torch.Tensor) else type(x).__name__
            for name, x in self.arguments.get("values", {}).items()
        }
        return f"Data({self.columns}, covariates {list(self.covariates)}, given as {held})"

    @property
    def size(self):
        return len(next(iter(self.columns.values())).missing)

    @property
    def names(self):
        return list(self.columns)

    def batch(self):
        return mm.Batch(**self.arguments)

    def present(self, name):
        return ~self.columns[name].missing

    def take(self, rows):
        """Return some rows as they are, without arguments."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        return Data(columns, {name: x[rows] for name, x in self.covariates.items()}, {}, self.dtypes)


# -- what it is -----------------------------------------------------------------------------------------------------


def values_of(kind, event, size, rng):
    """Return random values of a kind, ``(N, *event)``, which all its dtypes can hold."""
    if kind in ("real", "sequence"):
        return rng.integers(-8, 9, (size, *event)) / 4  # exact in half precision
    most = {"bits": 2, "counts": 5, "classes": NUM_CLASSES, "tokens": 4}[kind]
    return rng.integers(1 if kind == "tokens" else 0, most, (size, *event)).astype(float)


@st.composite
def masks(draw, size):
    """Rows that lack a modality: none, some, all, all but one."""
    pattern = draw(st.sampled_from(["none", "some", "some", "all", "all but one"]))
    rng = generator(draw(seeds)) if pattern in ("some", "all but one") else None
    if pattern == "some":
        return rng.random(size) < rng.choice([0.2, 0.5, 0.8])
    missing = np.full(size, pattern != "none")
    if pattern == "all but one":
        missing[rng.integers(size)] = False
    return missing


@st.composite
def columns(draw, name, size, kinds=tuple(KINDS), dtypes=None):
    kind = draw(st.sampled_from(kinds))
    allowed, events = KINDS[kind]
    dtype = draw(st.sampled_from([d for d in allowed if dtypes is None or d in dtypes]))
    rng = generator(draw(seeds))
    event = draw(st.sampled_from(events))
    values = values_of(kind, event, size, rng)
    lengths = None
    if kind in ("tokens", "sequence"):
        shortest = 1 if kind == "tokens" else 0
        lengths = rng.integers(shortest, event[0] + 1, size)
    if kind == "tokens":
        values[np.arange(size), lengths - 1] = END
    return Column(name, kind, dtype, values, draw(masks(size)), lengths)


sizes = st.one_of(st.integers(1, 3), st.integers(1, 12), st.just(40))


@st.composite
def rows(draw, least=1, most=4, kinds=tuple(KINDS), dtypes=None, size=sizes, covariates=True, plain=False):
    """Rows of ``least`` to ``most`` modalities, and the arguments of a batch that hold them.

    Args:
        kinds: of the modalities.
        dtypes: of their values; None for all.
        size: strategy of the number of rows.
        covariates: False for none.
        plain: True to hand all over as tensors and masks.
    """
    count = draw(size)
    names = NAMES[: draw(st.integers(least, most))]
    data = Data({name: draw(columns(name, count, kinds, dtypes)) for name in names}, {})
    if covariates and draw(st.booleans()):
        rng = generator(draw(seeds))
        data.covariates["u"] = rng.integers(-4, 5, (count, *draw(st.sampled_from([(), (2,)])))) / 2
    hand_over(draw, data, plain)
    return data


# -- how it is handed over ------------------------------------------------------------------------------------------


def hand_over(draw, data, plain):
    """Set the arguments of a batch that hold the rows."""
    values, present, lengths = {}, {}, {}
    for name, column in data.columns.items():
        way = "tensor" if plain else draw(st.sampled_from(containers(column)))
        marked = "present" if plain else draw(st.sampled_from(marks(column, way)))
        if marked == "none" and name == NAMES[0]:
            marked = "present"  # a batch has values of one modality at least
        if column.lengths is not None and marked in (
            "nan",
            "masked",
        ):  # a row of no step with a NaN is there, and empty
            column.lengths = np.where(column.missing, np.maximum(column.lengths, 1), column.lengths)
        junk = draw(st.sampled_from(["same", "huge", "nan"] if column.dtype in FLOATS else ["same", "huge"]))
        values[name] = contain(column, way, marked, junk)
        data.dtypes[name] = dtype_of(column, way)
        if marked in ("present", "both") and (column.missing.any() or draw(st.booleans())):
            mask = ~column.missing
            present[name] = mask if plain else draw(st.sampled_from([torch.tensor(mask), mask, mask.tolist()]))
        if column.lengths is not None:
            lengths[name] = torch.tensor(column.lengths)
    covariates = {name: torch.tensor(x, dtype=torch.float32) for name, x in data.covariates.items()}
    data.arguments = {"values": values, "present": present, "covariates": covariates, "lengths": lengths}


def containers(column):
    ways = list(TENSORS)
    if column.dtype not in FLOATS:
        ways.remove("grad")
    if column.dtype == "bfloat16":
        return ways
    ways += [*ARRAYS, *SEQUENCES]
    if column.event == ():
        ways.append("series")
    return [*ways, "frame"] if len(column.event) == 1 and column.lengths is None else ways


def marks(column, way):
    """Return the ways to say which rows are missing."""
    ways = ["present"]
    if column.dtype in FLOATS:
        ways += ["nan", "both"]
    if way in ("list", "tuple", "list of tensors", "list of arrays"):
        ways.append("none")
    if way == "numpy":
        ways.append("masked")
    return ways


def dtype_of(column, way):
    """Return the dtype that the values have in a batch."""
    if way in ("list", "tuple"):
        kind = np.bool_ if column.dtype == "bool" else np.int64 if column.dtype in INTEGERS else None
        return {np.bool_: torch.bool, np.int64: torch.int64, None: torch.get_default_dtype()}[kind]
    return TORCH_DTYPES[column.dtype]


def contain(column, way, marked, junk):
    """Return the values of a column as they are handed over.

    Args:
        column: what it is.
        way: the container.
        marked: how missing rows are marked.
        junk: what stands in rows that are missing by a mask, and behind the end of sequences.
    """
    values = column.values.copy()
    rubbish = {"same": None, "huge": 1 if column.dtype == "bool" else 100, "nan": np.nan}[junk]
    missing = column.missing.reshape(-1, *[1] * len(column.event))
    if rubbish is not None:
        values = np.where(column.valid(), values, rubbish)
    if marked in ("nan", "both"):
        values = np.where(missing, np.nan, values)
    if way in TENSORS:
        return as_tensor(values, column, way)
    array = values.astype(column.dtype)
    if marked == "masked":
        return np.ma.MaskedArray(array, np.broadcast_to(missing, array.shape))
    return as_rows(array, column, way, marked) if way in SEQUENCES else as_array(array, way)


def as_tensor(values, column, way):
    x = torch.tensor(values).to(TORCH_DTYPES[column.dtype])
    if way == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if way == "strided":
        return torch.stack([x, x], 1)[:, 0]
    if way == "expanded":
        return torch.stack([x, x]).expand(3, 2, *x.shape)[1, 0]
    if way == "grad":
        return x.requires_grad_()
    if way == "inference":
        with torch.inference_mode():
            return x.clone()
    return x


def as_array(array, way):
    if way == "fortran":
        return np.asfortranarray(array)
    if way == "reversed":
        return np.ascontiguousarray(array[::-1])[::-1]
    if way == "big-endian":
        return array.astype(array.dtype.newbyteorder(">"))
    if way == "series":
        return pd.Series(array)
    if way == "frame":
        return pd.DataFrame(array)
    if way == "read-only":
        array.flags.writeable = False
    return array


def as_rows(array, column, way, marked):
    items = {"list of tensors": lambda: [torch.tensor(x) for x in array], "list of arrays": lambda: list(array)}
    found = items.get(way, array.tolist)()
    if marked == "none":
        found = [None if gone else item for item, gone in zip(found, column.missing, strict=True)]
    return tuple(found) if way == "tuple" else found
