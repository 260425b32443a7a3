"""Announce parameters to Pyro's handlers, so that ``pyro.infer.SVI`` and Pyro's ELBOs find them."""

from __future__ import annotations

import itertools
import weakref

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from pyro.poutine.trace_messenger import TraceMessenger

GRADIENT = "pyro_mm$gradient"

_count = itertools.count()
_names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def register(module: torch.nn.Module) -> None:
    """Register a module's parameters in Pyro's store while a handler records parameters, as ``pyro.infer.SVI`` does.

    Under a fixed name ``pyro.module`` would let a second model share the first one's parameters, without a warning.
    The name used here belongs to the object, so a copy, or a re-run notebook cell, gets another one. If no handler
    records parameters (``fit``, an evaluation, a loop by hand) the store is left alone, so that models can be freed.

    Args:
        module: the model or the guide that is running.
    """
    if any(isinstance(h, TraceMessenger) and h.param_only for h in _PYRO_STACK):
        if module not in _names:
            _names[module] = f"{type(module).__name__}${next(_count)}"
        pyro.module(_names[module], module)


def announce_gradient() -> None:
    """Add a ``pyro.param`` site named ``GRADIENT`` to the running trace, without adding it to the store.

    ``loss_and_grads`` of Pyro's ELBOs skips its backward pass if the trace holds no ``pyro.param`` site, which is so
    for every network in a closure or in a plain ``nn.Module``.
    """
    leaf = torch.zeros((), requires_grad=True)
    leaf.unconstrained = lambda: leaf  # type: ignore[attr-defined]  # what SVI asks of a parameter
    message = dict(type="param", name=GRADIENT, fn=lambda: leaf, args=(), kwargs={}, infer={})
    message |= dict(is_observed=False, scale=1.0, mask=None, cond_indep_stack=(), done=False, stop=False)
    message |= dict(value=None, continuation=None, obs=None)
    apply_stack(message)
