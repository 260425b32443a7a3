"""Calls of networks on values of modalities: in a type that they take, and on a bounded number of rows at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .network_keywords import call_network

ROWS = 2**12  # rows encoded at once, where no gradient is asked for
FAMILIES = {"torch", "pyro", "pyro_mm", "zuko"}  # packages whose densities take numbers of any type as floats
NO_KEYWORDS: Mapping[str, Any] = {}


class Composition(Protocol):
    """A module that returns ``distribution(output(*inputs, **keywords))``: a network, and a family for its output.

    Attributes:
        composes: True if that is what its ``forward`` computes, so that the network may run on one block of rows at a
            time.
    """

    @property
    def composes(self) -> bool: ...

    def output(self, *inputs: Any, **keywords: Any) -> Tensor: ...

    def distribution(self, output: Tensor) -> Any: ...


def apply_network(
    what: str, network: Callable[..., Any], value: Tensor, keywords: Mapping[str, Any] = NO_KEYWORDS
) -> Any:
    """Return ``network(value, **keywords)``, the value in a type that the network takes.

    Args:
        what: the value in words, for an error: ``"covariate 'u'"``.
        network: a module or function of one input.
        value: ``(.., N, *event)``.
        keywords: the lengths or covariates that the network asks for.

    Raises:
        TypeError: values of a type that the network does not take.
        ValueError: integers that do not index the network's embedding.
    """
    return _call_with_types(what, network, lambda x: call_network(network, (x,), keywords), value)


def encode_rows(
    name: str, network: Callable[..., Any], value: Tensor, keywords: Mapping[str, Any] = NO_KEYWORDS
) -> Any:
    """Return a network's result for all rows of a modality; without gradient it runs on ``ROWS`` rows at a time.

    Args:
        name: the modality.
        network: a module or function of one input, returning features or a distribution.
        value: ``(N, *event)``.
        keywords: the lengths ``(N,)`` and covariates ``(N, ...)`` that the network asks for.

    Raises:
        TypeError: values of a type that the network does not take.
        ValueError: integers that do not index the network's embedding.
    """
    what = f"modality {name!r}"
    if not runs_in_blocks(network, value.shape[0]):
        return apply_network(what, network, value, keywords)

    blocks = zip(value.split(ROWS), _split(keywords, value.shape[0]), strict=True)
    if is_composition(network):
        outputs = [_output(what, network, block, given) for block, given in blocks]
        return network.distribution(torch.cat(outputs))

    first = apply_network(what, network, *next(blocks))
    if not isinstance(first, Tensor) and _joinable_parameters(first) is None:
        return apply_network(what, network, value, keywords)  # a distribution that cannot be put together
    found = [first, *(apply_network(what, network, block, given) for block, given in blocks)]
    return torch.cat(found) if isinstance(first, Tensor) else _concatenate(found)


def _output(what: str, module: Any, block: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Return the output of a composition's network for a block of rows."""
    output: Tensor = _call_with_types(what, module, lambda x: module.output(x, **keywords), block)
    return output


def head_in_blocks(head: Any, features: Tensor, keywords: Mapping[str, Any] = NO_KEYWORDS) -> Any:
    """Return a head's distribution of features; without gradient its network runs on ``ROWS`` rows at a time.

    Args:
        head: a module or function of features.
        features: ``(.., N, F)``.
        keywords: the covariates ``(N, ...)`` that the head asks for.
    """
    rows = features.shape[-2]
    if not is_composition(head) or not runs_in_blocks(head, rows):
        return call_network(head, (features,), keywords)
    blocks = zip(features.split(ROWS, -2), _split(keywords, rows), strict=True)
    outputs = [head.output(block, **given) for block, given in blocks]
    return head.distribution(torch.cat(outputs, features.dim() - 2))


def is_composition(module: Any) -> TypeGuard[Composition]:
    """Return True if a module is a :class:`Composition`, such as our conditionals."""
    return getattr(module, "composes", False) is True


def runs_in_blocks(network: Any, rows: int) -> bool:
    """Return True if a network is to run on blocks of rows: many rows, no gradient, and nothing that mixes rows."""
    if torch.is_grad_enabled() or rows <= ROWS:
        return False
    return not isinstance(network, nn.Module) or not any(part.training for part in network.modules())


def _split(keywords: Mapping[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """Yield the keywords of each block of rows: tensors, and dictionaries of tensors, whose first dimension is N."""
    for start in range(0, rows, ROWS):
        block = slice(start, start + ROWS)
        yield {name: take_rows(x, block) for name, x in keywords.items()}


def take_rows(x: Any, rows: Any) -> Any:
    """Return the rows of a tensor, or of every tensor in a dictionary."""
    if not isinstance(x, dict):
        return x[rows]
    taken = x.copy()
    for name, value in x.items():
        taken[name] = value[rows]
    return taken


def in_scoring_type(d: Any, value: Tensor) -> Tensor:
    """Return observed values in the dtype that their density is computed in.

    Integers would overflow in a density (255 + 1 is 0 in uint8), and half precision would round it. Classes, and values
    of a density from elsewhere, stay as they are.

    Args:
        d: the distribution.
        value: ``(N, *event)``.
    """
    if value.dtype in (torch.float32, torch.float64):
        return value
    inner = d
    while isinstance(inner, torch.distributions.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        inner = inner.base_dist
    family = type(inner)
    scores_classes = isinstance(inner, torch.distributions.Categorical) or getattr(inner, "scores_classes", False)
    if scores_classes or family.__module__.split(".")[0] not in FAMILIES:
        return value
    wide = torch.promote_types(_float_type(d) or torch.get_default_dtype(), torch.float32)
    return value.to(torch.promote_types(value.dtype, wide))


def _float_type(d: Any) -> torch.dtype | None:
    """Return the dtype of a distribution's parameters; None if it has none of floats."""
    for held in vars(d).values():
        if isinstance(held, Tensor) and held.is_floating_point():
            return held.dtype
        if isinstance(held, torch.distributions.Distribution) and (found := _float_type(held)) is not None:
            return found
    return None


# -- dtypes that networks take ------------------------------------------------------------------------------------


def _call_with_types(what: str, module: Any, call: Callable[[Tensor], Any], value: Tensor) -> Any:
    """Return ``call(value)``; if that fails, with the same numbers in a dtype that the module takes.

    Raises:
        TypeError, ValueError: the call fails with every dtype, in words on the data; other errors as they are.
    """
    try:
        return call(value)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        wanted = _parameter_type(module)
        if isinstance(error, IndexError) and not value.is_floating_point() and _has_embedding(module):
            low = int(value.min())
            high = int(value.max())
            raise ValueError(
                f"{what}: values from {low} to {high} do not index the table of its network: {error}. A "
                "value such as -1 that marks a missing row goes to present="
            ) from error
        if "'indices'" in str(error) and value.is_floating_point() and not _is_whole(value):  # of torch's Embedding
            raise ValueError(
                f"{what}: its network has a table of classes, and the values are no whole numbers, but from "
                f"{value.min().item():g} to {value.max().item():g}"
            ) from error
        for other in _other_types(value, wanted):
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


def _other_types(value: Tensor, wanted: torch.dtype) -> list[Tensor]:
    """Return the same numbers in the other dtypes that are worth a try."""
    if not value.is_floating_point():
        return [x for x in (value.long(), value.to(wanted)) if x.dtype != value.dtype]
    if value.dtype in (torch.float16, torch.bfloat16):
        return [value.to(wanted)] if value.dtype != wanted else []
    return [value.long()] if value.dim() < 3 and _is_whole(value) else []


def _is_whole(value: Tensor) -> bool:
    """Return True if all values are integers."""
    return torch.equal(value.long().to(value.dtype), value)


def _parameter_type(module: Any) -> torch.dtype:
    """Return the dtype of a module's first parameter of floats; torch's default without any."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    floats = (p.dtype for p in parameters if p.is_floating_point())
    return next(floats, torch.get_default_dtype())


def _has_embedding(module: Any) -> bool:
    """Return True if a module has a table of classes in it."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in parts)


# -- distributions of blocks of rows ------------------------------------------------------------------------------


def _joinable_parameters(d: Any) -> tuple[str, ...] | None:
    """Return the names of the parameters of a distribution that can be joined from blocks; None of any other."""
    base = d.base_dist if type(d) is dist.Independent else d
    if type(base) in (dist.Normal, dist.Laplace):
        return ("loc", "scale")
    return ("logits",) if type(base) is dist.Categorical else None


def _concatenate(parts: list[Any]) -> Any:
    """Return the distribution of the rows of all parts."""
    names = _joinable_parameters(parts[0]) or ()
    event_dim = parts[0].reinterpreted_batch_ndims if type(parts[0]) is dist.Independent else 0
    bases = [part.base_dist if type(part) is dist.Independent else part for part in parts]
    joined = {name: torch.cat([getattr(base, name) for base in bases]) for name in names}
    return type(bases[0])(**joined, validate_args=False).to_event(event_dim)
