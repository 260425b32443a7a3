"""Parameters and Pyro's global store: announced when somebody listens, under a name no other module ever has."""

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
    """Announces a module's parameters to ``pyro.infer.SVI``, and to nobody else.

    ``pyro.module`` under a fixed name makes a second model share the first one's parameters, silently. The name
    here belongs to the object: a copy, or a re-run notebook cell, gets another. Where nothing records parameters
    (``fit``, an evaluation, a hand-written loop) the store is left alone, so that models can be freed.
    """
    if any(isinstance(h, TraceMessenger) and h.param_only for h in _PYRO_STACK):
        if module not in _names:
            _names[module] = f"{type(module).__name__}${next(_count)}"
        pyro.module(_names[module], module)


def announce_gradient() -> None:
    """Tells Pyro's ELBOs that there is something to differentiate.

    ``loss_and_grads`` skips its backward pass where the trace holds no ``pyro.param`` site, which is so for every
    network held by a closure or by a plain ``nn.Module``. The leaf announced here stays out of the store.
    """
    leaf = torch.zeros((), requires_grad=True)
    leaf.unconstrained = lambda: leaf  # type: ignore[attr-defined]  # what SVI asks of a parameter
    message = dict(type="param", name=GRADIENT, fn=lambda: leaf, args=(), kwargs={}, infer={})
    message |= dict(is_observed=False, scale=1.0, mask=None, cond_indep_stack=(), done=False, stop=False)
    message |= dict(value=None, continuation=None, obs=None)
    apply_stack(message)  # type: ignore[arg-type]
