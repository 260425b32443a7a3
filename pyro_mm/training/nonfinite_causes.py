"""Explain a loss that is not finite: the rows, the site and the operation that it comes from, and what mends it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..batch.batch import Batch
from ..handlers.internals import TorchDispatchMode, tree_leaves
from ..handlers.rewrite import RecordSites

MAX_LISTED = 5  # rows in a message
SMALLEST_SCALE = 1e-15  # a scale below it has underflowed, or is about to
LARGEST_PARAMETER = 1e15  # a parameter beyond it gives densities that overflow
PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("/site-packages/", "/dist-packages/", "/lib/python3", "<frozen")

POSITIVE_CONSTRAINTS = (constraints.greater_than, constraints.greater_than_eq, type(constraints.lower_cholesky))
FILLING_OPERATIONS = (
    "empty",
    "new_empty",
    "full",
    "new_full",
    "fill",
    "masked_fill",
    "scalar_tensor",
    "lift_fresh",
    "detach",
)
OPERATIONS = {
    "log": "a log of 0, or of a negative number",
    "log2": "a log of 0, or of a negative number",
    "log10": "a log of 0, or of a negative number",
    "log1p": "a log1p of -1, or of a smaller number",
    "xlogy": "a log of 0, or of a negative number",
    "exp": "an exp that overflows",
    "expm1": "an expm1 that overflows",
    "div": "a division by 0, or one that overflows",
    "reciprocal": "a division by 0",
    "sqrt": "a square root of a negative number",
    "rsqrt": "an inverse square root of 0, or of a negative number",
    "pow": "a power that overflows",
    "mul": "a product that overflows",
}
LOG_ADVICE = (
    "Keep the argument of the log away from 0: give logits in the place of probabilities, use log_softmax or "
    "logsigmoid, or clamp(min=1e-6)"
)
OPERATION_ADVICE = {
    "log": LOG_ADVICE,
    "log2": LOG_ADVICE,
    "log10": LOG_ADVICE,
    "log1p": LOG_ADVICE,
    "xlogy": LOG_ADVICE,
    "exp": "Use softplus in the place of exp, or clamp its argument: beyond 88 it overflows in float32",
    "expm1": "Clamp its argument: beyond 88 it overflows in float32",
    "div": "Bound what is divided by away from 0",
    "reciprocal": "Bound what is divided by away from 0",
    "sqrt": "Add a small number, or clamp, inside of the square root",
    "rsqrt": "Add a small number, or clamp, inside of the square root",
}
UNDERFLOW_ADVICE = (
    "Bound it from below, as the families of pyro_mm.conditionals do: torch.nn.functional.softplus(x) + 1e-4 in "
    "the place of exp(x), say"
)
ZERO_ADVICE = (
    "0 times an infinite derivative. A square root, a norm or a power below 1 has one at 0, so add a small number "
    "inside of it; and so may what torch.where does not choose: clamp its argument"
)
DERIVATIVE_ADVICE = {
    "Sqrt": "the derivative of a square root is infinite at 0: add a small number inside of it",
    "Norm": "a norm has no derivative at 0: add a small number to what it is of",
    "LinalgVectorNorm": "a norm has no derivative at 0: add a small number to what it is of",
    "Std": "a standard deviation has no derivative where all values are equal: add a small number to the variance",
    "Log": "the derivative of a log is infinite at 0: clamp its argument away from 0",
    "Div": "bound what is divided by away from 0",
    "Exp": "an exp overflows: clamp its argument, also where torch.where does not choose it",
    "Where": ZERO_ADVICE,
    "Pow": ZERO_ADVICE,
    "Mul": ZERO_ADVICE,
}


@dataclass
class Cause:
    """The cause of NaN or infinity, in words; false if none was found.

    Attributes:
        where: sentences on where it comes from.
        advice: a sentence on what mends it, or empty.
    """

    where: list[str] = field(default_factory=list)
    advice: str = ""

    def __bool__(self) -> bool:
        return bool(self.where)


@dataclass(frozen=True)
class RowNames:
    """Names of a minibatch's rows in messages: their places in the data, if these are known.

    Attributes:
        index: places of the rows in the data, ``(N,)``; None names the rows by their places in the minibatch.
    """

    index: Tensor | None = None

    def text(self, bad: Tensor) -> str:
        """Name the rows in which a boolean ``(N,)`` holds."""
        places = bad.nonzero()[:, 0]
        if len(places) == len(bad) and len(bad) > 1:
            return f"all {len(bad)} rows of the minibatch"
        numbers = places if self.index is None else self.index[places.to(self.index.device)]
        listed = ", ".join(map(str, numbers[:MAX_LISTED].tolist()))
        more = f" and {len(places) - MAX_LISTED} more" if len(places) > MAX_LISTED else ""
        of = "the minibatch" if self.index is None else "the data"
        return f"row{'s' if len(places) > 1 else ''} {listed}{more} of {of}"


def has_nonfinite(x: Tensor) -> bool:
    """Return True if any entry is NaN or infinite."""
    return x.is_floating_point() and not bool(x.isfinite().all())


def cause_in_data(batch: Batch, rows: RowNames) -> Cause:
    """Find values of the batch that are not finite."""
    held = {f"modality {name!r}": (batch[name], batch.present[name]) for name in batch.names if batch.holds(name)}
    everywhere = torch.ones(batch.size, dtype=torch.bool, device=batch.device)
    held |= {f"covariate {name!r}": (value, everywhere) for name, value in batch.covariates.items()}
    for what, (value, present) in held.items():
        if not value.is_floating_point():
            continue
        bad = ~value.isfinite().flatten(1).all(1) if value.dim() > 1 else ~value.isfinite()
        bad = bad & present.reshape(-1, len(bad)).any(0)
        if bad.any():
            kind = _kind(value[bad])
            return Cause(
                [f"The data hold {kind} values: {what}, in {rows.text(bad)}"],
                "Leave these values out, or mark them as missing by present=, before training",
            )
    return Cause()


def cause_in_run(batch: Batch, rows: RowNames, run: Callable[[], Any]) -> Cause:
    """Run a loss, and find the site and the operation where NaN or infinity comes from.

    Args:
        batch: the rows of the run, for their number.
        rows: names them.
        run: evaluates the loss, with the draws that were not finite.
    """
    sites: list[_Site] = []
    operations = _OperationRecorder()

    def record(msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], Distribution):
            sites.append(_Site.of(msg))

    with torch.enable_grad(), RecordSites(record), operations:
        run()
    with torch.no_grad():
        cause = next((found for site in sites if (found := _cause_at_site(site, batch.size, rows))), Cause())
    own = next((x for x in operations.found if x.line), None)
    first = own or (None if cause else next(iter(operations.found), None))
    if first is not None:
        what = OPERATIONS.get(first.name, f"the operation {first.name}")
        cause.where.append(f"The first operation that gives {first.gives} from finite numbers is {what}{first.line}")
        if first.name in OPERATION_ADVICE:
            cause.advice = OPERATION_ADVICE[first.name]
    return cause


def advice_from_anomaly(error: Exception) -> str:
    """Return advice on a gradient that is NaN, from torch's anomaly detection; empty if it does not help."""
    text = str(error)
    if "Function '" not in text:
        return ""
    name = text.split("Function '")[1].split("Backward")[0]
    advice = next((advice for start, advice in DERIVATIVE_ADVICE.items() if name.startswith(start)), "")
    return f"It arises in the derivative of {name.lower()}: {advice}" if advice else ""


# -- operations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operation:
    name: str
    gives: str
    line: str  # of the user's code, or empty


class _OperationRecorder(TorchDispatchMode):
    """Records the operations that give NaN or infinity from finite numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0].strip("_")
        if name.startswith(FILLING_OPERATIONS):
            return func(*args, **kwargs)
        finite = not any(map(_is_nonfinite_tensor, tree_leaves((args, kwargs))))
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if _is_nonfinite_tensor(x)]
        if finite and results:
            self.found.append(_Operation(name, _kind(results[0]), _line()))
        return out


def _is_nonfinite_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and has_nonfinite(x.detach())


def _line() -> str:
    """Return where in the user's code the operation is, unless a library asks for it by itself."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not cause_in_run.__code__:
        file = frame.f_code.co_filename
        if PACKAGE not in Path(file).parents and not any(part in file for part in LIBRARIES):
            return f", in {frame.f_code.co_name} ({Path(file).name}, line {frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


# -- sites --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    name: str
    fn: Any
    value: Tensor
    mask: Any
    observed: bool
    enumerated: bool
    dim: int | None  # of the data plate

    @classmethod
    def of(cls, msg: dict[str, Any]) -> _Site:
        """Return the site of a message."""
        dim = next((frame.dim for frame in msg["cond_indep_stack"] if frame.name == "data"), None)
        enumerated = msg["infer"].get("enumerate") == "parallel" or "_enumerate_dim" in msg["infer"]
        return cls(msg["name"], msg["fn"], msg["value"], msg["mask"], msg["is_observed"], enumerated, dim)


def _cause_at_site(site: _Site, size: int, rows: RowNames) -> Cause:
    """Find what is not finite at a site: a parameter of its distribution, its value or its log-density."""
    try:
        log_prob = site.fn.log_prob(site.value)
    except (ValueError, RuntimeError, NotImplementedError):
        return Cause()
    if site.mask is not None:
        mask = torch.as_tensor(site.mask, device=log_prob.device)
        log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
    bad = ~log_prob.isfinite()
    if site.enumerated:
        bad &= log_prob != -torch.inf
    value = site.value
    if value.is_floating_point():
        wrong = ~value.isfinite()
        bad = bad | wrong.flatten(wrong.dim() - site.fn.event_dim).any(-1) if site.fn.event_dim else bad | wrong
    if not bad.any():
        return Cause()
    what = f"site {site.name!r}"
    where = _in_rows(site, bad, size, rows)
    for name, parameter, constraint in _parameters(site.fn):
        if has_nonfinite(parameter):
            kind = _kind(parameter)
            advice = "Bound what the network gives: a softplus in the place of an exp, or clamp"
            return Cause([f"At {what} the distribution's {name} is {kind}{where}"], advice)
        if isinstance(constraint, POSITIVE_CONSTRAINTS) and (smallest := _smallest(name, parameter)) < SMALLEST_SCALE:
            return Cause([f"At {what} the distribution's {name} underflows to {smallest:.3g}{where}"], UNDERFLOW_ADVICE)
        if (largest := float(parameter.detach().abs().max())) > LARGEST_PARAMETER:
            advice = "Standardise what the network is given, or bound what it gives"
            return Cause([f"At {what} the distribution's {name} reaches {largest:.3g}{where}"], advice)
    if value.is_floating_point() and not value.isfinite().all():
        return Cause([f"At {what} the value is {_kind(value)}{where}"], "")
    if not _in_support(site):
        values = f"from {float(value.min()):.3g} to {float(value.max()):.3g}"
        advice = "Give the values the range that the distribution has, or another distribution"
        return Cause([f"At {what} values lie outside of the distribution's support{where}: they go {values}"], advice)
    if (log_prob == -torch.inf).any():
        return Cause([f"At {what} the log-density takes a log of 0: the value has probability 0{where}"], LOG_ADVICE)
    gives = _kind(log_prob)
    return Cause([f"At {what} the log-density is {gives}{where}"], "")


def _smallest(name: str, parameter: Tensor) -> float:
    size = parameter.detach().abs()
    return float((size.diagonal(dim1=-2, dim2=-1) if name == "scale_tril" else size).min())


def _in_rows(site: _Site, bad: Tensor, size: int, rows: RowNames) -> str:
    if site.dim is None or bad.dim() < -site.dim or bad.shape[site.dim] != size:
        return ""
    others = bad.movedim(site.dim, -1).reshape(-1, size)
    return f", in {rows.text(others.any(0))}"


def _parameters(fn: Any, seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, value and constraint of a distribution's parameters, and of those that it is made of."""
    if id(fn) in seen:
        return
    try:
        known = dict(fn.arg_constraints)
    except NotImplementedError:
        known = {}
    for name, constraint in known.items():
        value = vars(fn).get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            yield name, value, constraint
    for inner in vars(fn).values():
        if isinstance(inner, Distribution):
            yield from _parameters(inner, seen | {id(fn)})


def _in_support(site: _Site) -> bool:
    try:
        inside = site.fn.support.check(site.value)
    except (NotImplementedError, ValueError, RuntimeError, AttributeError):
        return True
    if site.mask is not None:
        inside = inside | ~torch.as_tensor(site.mask, device=inside.device)
    return bool(inside.all())


def _kind(x: Tensor) -> str:
    return "NaN" if bool(x.isnan().any()) else "infinite"
