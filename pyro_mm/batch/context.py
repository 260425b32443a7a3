"""What is computed once a step, however many terms ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def cached(memo: dict[Any, Any], key: Hashable, f: Callable[[], Any], *alive: object) -> Any:
    """``f()``, or what it gave under this key before.

    ``alive`` is kept too: objects whose identity is in the key, so that no others can come by it.
    """
    if not is_cached(memo, key):
        cache(memo, key, f(), *alive)
    return memo[key][0]


def is_cached(memo: dict[Any, Any], key: Hashable) -> bool:
    """Whether a value is there; one computed without gradient is not, where a gradient is asked for."""
    return key in memo and (memo[key][1] or not torch.is_grad_enabled())


def cache(memo: dict[Any, Any], key: Hashable, value: Any, *alive: object) -> None:
    """Puts a value under a key, see :func:`cached`."""
    memo[key] = value, torch.is_grad_enabled(), alive


@dataclass(frozen=True)
class TermStack:
    """How an objective stacks its terms to the left of a story's plates.

    ``decodes[m]`` are the terms, of ``terms``, that decode modality m; ``dim`` is the batch dimension of the terms.
    """

    decodes: Mapping[str, tuple[int, ...]]
    terms: int = 1
    dim: int = -2
