"""Leaves of autograd graphs."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def graph_leaves(roots: list[Any]) -> dict[int, Tensor]:
    """Return the leaves of the autograd graphs of those roots that are tensors with one, by identity."""
    leaves: dict[int, Tensor] = {}
    stack = [x.grad_fn or x for x in roots if getattr(x, "requires_grad", False)]
    # the nodes themselves, not only their ids: torch wraps a node anew whenever Python asks for one that no variable
    # holds, and the id of a wrapper that is gone is given to the next
    seen: dict[int, Any] = {}
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        else:
            stack += [parent for parent, _ in node.next_functions]
    return leaves
