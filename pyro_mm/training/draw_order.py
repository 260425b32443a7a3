"""A traced graph cut at its random draws, so that a compiler cannot put them into another order.

torch's CPU generator gives numbers in the order of the calls, and inductor reorders operations, draws included, for
memory and fusion. So draws are left out of the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
EMPTY_OPERATIONS = {
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
}
LIKE_OPERATIONS = {
    getattr(packet, name)
    for packet in (aten.rand_like, aten.randn_like, aten.randint_like)
    for name in ("default", "low_dtype")
    if name in packet.overloads()
}
ATTENTION = "aten._scaled_dot_product_"
ATTENTION_DROPOUT = 3  # the position of the probability of dropout among its arguments


@dataclass
class Piece:
    """A part of a graph as a function of named tensors.

    Attributes:
        run: the function; returns a sequence of tensors.
        inputs, outputs: names of the tensors that it takes and returns.
        last: names of tensors that no later piece takes, which are dropped after it.
    """

    run: Callable[..., Sequence[Tensor]]
    inputs: list[str]
    outputs: list[str]
    last: list[str]


class Pieces:
    """The pieces of a graph, run one after the other: a function of the graph's inputs.

    Args:
        inputs, outputs: names of the graph's inputs and outputs.
        pieces: in their order.
    """

    def __init__(self, inputs: list[str], pieces: list[Piece], outputs: list[str]):
        self.inputs, self.pieces, self.outputs = inputs, pieces, outputs

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip(self.inputs, tensors, strict=True))
        for piece in self.pieces:
            found = piece.run(*[held[name] for name in piece.inputs])
            held.update(zip(piece.outputs, found, strict=True))
            for name in piece.last:
                del held[name]
        return tuple(held[name] for name in self.outputs)


def compile_between_draws(
    graph: GraphModule, inputs: Sequence[Tensor], compiler: Callable[[GraphModule, list[Tensor]], Callable[..., Any]]
) -> Callable[..., Any]:
    """Compile a graph piece by piece, and run its draws between the pieces, in their order.

    Draws that depend on shapes alone are made before the piece that contains them. Those that depend on values, such as
    the index of a particle, end a piece. So a graph with draws of the first kind only is one piece.

    Args:
        graph: operations of torch on tensors of fixed shapes, as ``make_fx`` leaves them.
        inputs: of the graph, for the compiler to see.
        compiler: a graph without draws, and its inputs -> a function of these.

    Returns:
        A function of the graph's inputs, which gives its outputs.
    """
    nodes = list(graph.graph.nodes)
    if not any(map(is_draw, nodes)):
        return compiler(graph, list(inputs))
    names = [node.name for node in nodes if node.op == "placeholder"]
    examples = dict(zip(names, inputs, strict=True))
    (output,) = [node for node in nodes if node.op == "output"]
    returned = [node.name for node in output.args[0]]
    parts = _parts(graph)
    asked_for = [{n.name for node in part for n in node.all_input_nodes} for part, _ in parts] + [set(returned)]
    pieces: list[Piece] = []
    alive = set(names)
    for i, (part, random) in enumerate(parts):
        later = set().union(*asked_for[i + 1 :])
        own = set(part)
        needed = _unique(n for node in part for n in node.all_input_nodes if n not in own and n.op != "get_attr")
        given = [node for node in part if node.name in later]
        module = _module(graph, part, needed, given)
        run: Callable[..., Any] = module
        if not random:
            run = compiler(module, [examples[n.name] if n.name in examples else _empty_like(n) for n in needed])
        alive |= {node.name for node in given}
        pieces.append(Piece(run, [n.name for n in needed], [n.name for n in given], sorted(alive - later)))
        alive &= later
    return Pieces(names, pieces, returned)


def is_draw(node: Node) -> bool:
    """Return True if a node draws random numbers; attention draws none without dropout, whatever torch says."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if not str(node.target).startswith(ATTENTION):
        return True
    dropout = node.args[ATTENTION_DROPOUT] if len(node.args) > ATTENTION_DROPOUT else node.kwargs.get("dropout_p", 0)
    return bool(dropout != 0)


def _parts(graph: GraphModule) -> list[tuple[list[Node], bool]]:
    """Return the operations in parts, draws (True) and others (False), in the order in which they run."""
    parts: list[tuple[list[Node], bool]] = [([], True), ([], False)]
    for node in list(graph.graph.nodes):
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if not is_draw(node):
            parts[-1][0].append(node)
            continue
        made = _replace_by_empty(graph, node)
        if made is None:
            parts += [([node], True), ([], False)]
        else:
            parts[-2][0].extend([*made, node])
    graph.recompile()
    return [(nodes, random) for nodes, random in parts if nodes]


def _replace_by_empty(graph: GraphModule, node: Node) -> list[Node] | None:
    """Replace the tensor whose shape alone a draw takes by an empty one; None if the draw depends on values.

    Returns:
        Nodes that make empty tensors of these shapes in their place.
    """
    tensors = node.all_input_nodes
    if not tensors:
        return []
    (first,) = tensors if len(tensors) == 1 else (None,)
    if first is None or node.args[0] is not first:
        return None
    filled = first.target in EMPTY_OPERATIONS and set(first.users) == {node}
    if not filled and node.target not in LIKE_OPERATIONS:
        return None
    with graph.graph.inserting_before(node):
        empty = _empty(graph.graph, first.meta["val"])
    node.replace_input_with(first, empty)
    return [empty]


def _empty(graph: Graph, value: Tensor) -> Node:
    """Return an operation that makes an empty tensor of a value's shape, strides, type and device."""
    shape, strides = [int(n) for n in value.shape], [int(n) for n in value.stride()]
    kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    node = graph.call_function(aten.empty_strided.default, (shape, strides), kwargs)
    node.meta["val"] = value
    return node


def _module(graph: GraphModule, part: list[Node], needed: list[Node], given: list[Node]) -> GraphModule:
    """Return a part as a graph of its own."""
    new = Graph()
    copies: dict[Node, Node] = {}
    for node in needed:
        copies[node] = new.placeholder(node.name)
        copies[node].meta = node.meta.copy()

    def copy(node: Node) -> Node:
        if node not in copies:  # a constant, which each part has for itself
            copies[node] = new.node_copy(node)
        return copies[node]

    for node in part:
        copies[node] = new.node_copy(node, copy)
    new.output(tuple(copies[node] for node in given))
    return GraphModule(graph, new)


def _empty_like(node: Node) -> Tensor:
    """Return an uninitialised tensor like a node's value."""
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _unique(nodes: Iterable[Node]) -> list[Node]:
    return list(dict.fromkeys(nodes))
