"""Values of modalities on their way into networks and densities: their types, and so many rows of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

ROWS = 2**12  # rows encoded at once, where no gradient is asked for
FAMILIES = {"torch", "pyro", "pyro_mm", "zuko"}  # packages whose densities take numbers of any type as floats


class Output(NamedTuple):
    """Output of a network in the place of its input: a conditional that is called with it runs no network."""

    value: Tensor


class OfOutput(nn.Module):
    """A module that makes its distribution of what a network puts out, and takes an :class:`Output` in its place."""

    def output(self, parents: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError


def apply_network(what: str, module: Callable[[Any], Any], value: Tensor) -> Any:
    """Return ``module(value)``, in the type that the module takes.

    Args:
        what: the value is, for an error: ``"covariate 'u'"``.
        module: a network.
        value: ``(.., N, *event)``.

    Raises:
        TypeError: values of a type that the module does not take.
        ValueError: integers that are no indices of its table.
    """
    return _tried(what, module, module, value)


def encode_rows(name: str, module: Callable[[Any], Any], value: Tensor) -> Any:
    """Return ``module(value)`` of a modality's values ``(N, *event)``; without gradient, ``ROWS`` rows at once.

    Raises:
        TypeError: values of a type that the module does not take.
        ValueError: integers that are no indices of its table.
    """

    what = f"modality {name!r}"

    def call(x: Tensor) -> Any:
        return apply_network(what, module, x)

    if not runs_in_blocks(module, value.shape[0]):
        return call(value)
    if isinstance(module, OfOutput):
        net = module.output
        parts = [_tried(what, module, lambda x: net((x,)), part) for part in value.split(ROWS)]
        return module(Output(torch.cat(parts)))
    first, *rest = value.split(ROWS)
    found = [call(first)]
    if not isinstance(found[0], Tensor) and _parameters(found[0]) is None:
        return call(value)  # a distribution whose parts are not known
    found += [call(part) for part in rest]
    return torch.cat(found) if isinstance(found[0], Tensor) else _joined(found)


def output_of(module: OfOutput, x: Tensor) -> Tensor:
    """Return the output of the module's network of features ``(.., N, F)``; without gradient, ``ROWS`` rows at once."""
    if not runs_in_blocks(module, x.shape[-2]):
        return module.output((x,))
    return torch.cat([module.output((part,)) for part in x.split(ROWS, -2)], x.dim() - 2)


def runs_in_blocks(module: Any, rows: int) -> bool:
    """Return whether to run a module on blocks of rows: many rows, no gradient, and nothing that mixes rows."""
    if torch.is_grad_enabled() or rows <= ROWS:
        return False
    return not isinstance(module, nn.Module) or not any(part.training for part in module.modules())


def in_scoring_type(d: Any, value: Tensor) -> Tensor:
    """Return observed values in the type that their density is computed in: of integers, booleans and half precision.

    Integers would overflow in a density (255 + 1 is 0 in uint8), and half precision would round it.
    """
    if value.dtype in (torch.float32, torch.float64):
        return value
    inner = d
    while isinstance(inner, torch.distributions.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        inner = inner.base_dist
    family = type(inner)
    if isinstance(inner, torch.distributions.Categorical) or family.__module__.split(".")[0] not in FAMILIES:
        return value
    wide = torch.promote_types(_float_type(d) or torch.get_default_dtype(), torch.float32)
    return value.to(torch.promote_types(value.dtype, wide))


def _float_type(d: Any) -> torch.dtype | None:
    """Return the type of the parameters of a distribution."""
    for held in vars(d).values():
        if isinstance(held, Tensor) and held.is_floating_point():
            return held.dtype
        if isinstance(held, torch.distributions.Distribution) and (found := _float_type(held)) is not None:
            return found
    return None


# -- types that networks take -------------------------------------------------------------------------------------


def _tried(what: str, module: Any, call: Callable[[Tensor], Any], value: Tensor) -> Any:
    """Return ``call(value)``, or that of the same numbers in the type that the module takes."""
    try:
        return call(value)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        wanted = _wanted(module)
        if isinstance(error, IndexError) and not value.is_floating_point() and _embeds(module):
            low, high = int(value.min()), int(value.max())
            raise ValueError(
                f"{what}: values from {low} to {high} do not index the table of its network: {error}. A "
                "value such as -1 that marks a missing row goes to present="
            ) from error
        if "'indices'" in str(error) and value.is_floating_point() and not _whole(value):  # of torch's Embedding
            raise ValueError(
                f"{what}: its network has a table of classes, and the values are no whole numbers, but from "
                f"{value.min().item():g} to {value.max().item():g}"
            ) from error
        for other in _others(value, wanted):
            try:
                return call(other)
            except (RuntimeError, IndexError, NotImplementedError):
                continue
        if value.dtype == wanted or not value.is_floating_point():
            raise
        raise TypeError(
            f"{what} is {value.dtype}, and its network, {type(module).__name__}, has parameters of {wanted}"
            f". Make the batch of values of that type (array.astype('{str(wanted).removeprefix('torch.')}')), or the "
            f"network of theirs (.to({value.dtype})). {str(error).splitlines()[0]}"
        ) from error


def _others(value: Tensor, wanted: torch.dtype) -> list[Tensor]:
    """Return the same numbers in other types."""
    if not value.is_floating_point():
        return [x for x in (value.long(), value.to(wanted)) if x.dtype != value.dtype]
    if value.dtype in (torch.float16, torch.bfloat16):
        return [value.to(wanted)] if value.dtype != wanted else []
    return [value.long()] if value.dim() < 3 and _whole(value) else []


def _whole(value: Tensor) -> bool:
    return torch.equal(value.long().to(value.dtype), value)


def _wanted(module: Any) -> torch.dtype:
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    floats = (p.dtype for p in parameters if p.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _embeds(module: Any) -> bool:
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in parts)


# -- distributions of blocks of rows ------------------------------------------------------------------------------


def _parameters(d: Any) -> tuple[str, ...] | None:
    """Return the names of the parameters of a distribution that blocks of can be joined; None of any other."""
    base = d.base_dist if type(d) is dist.Independent else d
    if type(base) in (dist.Normal, dist.Laplace):
        return ("loc", "scale")
    return ("logits",) if type(base) is dist.Categorical else None


def _joined(parts: list[Any]) -> Any:
    """Return one distribution of the rows of all parts."""
    names = _parameters(parts[0]) or ()
    event_dim = parts[0].reinterpreted_batch_ndims if type(parts[0]) is dist.Independent else 0
    bases = [part.base_dist if type(part) is dist.Independent else part for part in parts]
    joined = {name: torch.cat([getattr(base, name) for base in bases]) for name in names}
    return type(bases[0])(**joined, validate_args=False).to_event(event_dim)
