"""What is compiled holds no draws, and between its pieces they come in the order of the programs."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_mm as mm
from pyro_mm.training import compile as compiled
from pyro_mm.training.draw_order import compile_between_draws, is_draw
from tests.support.compiled import TRACED, agree, cases
from tests.support.contract import OBJECTIVES, data, pair


class Compiler:
    """Leaves a graph as it is, and counts those that it was given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        assert not any(map(is_draw, graph.graph.nodes))
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for node, x in zip(placeholders, inputs, strict=True):
            value = node.meta["val"]
            assert (x.shape, x.stride(), x.dtype) == (value.shape, value.stride(), value.dtype)
        return graph


def noise_only(x):
    """Draws of every kind that depend on no values, one of them into strides of its own."""
    a = torch.nn.functional.dropout(x, 0.4) + torch.randn(3, 4)
    b = torch.randn_like(x.T) + torch.empty(4, 3).exponential_()
    return a * b.T, torch.rand(2), torch.randperm(5)


def by_values(x):
    """A particle chosen by its weight between two passes with dropout."""
    weights = torch.nn.functional.dropout(x, 0.4).exp()
    index = torch.multinomial(weights, 1)
    chosen = x.gather(1, index)
    return (
        torch.nn.functional.dropout(chosen, 0.3) + torch.randn(3, 1),
        torch.normal(x, x.abs()),
        torch.bernoulli(x.sigmoid()),
    )


def in_place(x):
    """Values that are drawn into memory which is read before and afterwards."""
    y = x * 2
    before = y.sum()
    y.normal_()
    view = y[0]
    y.mul_(2)
    return before, y, view


def without(x):
    return (x * 2,)


def constant_too(x):
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.rand(4), x


@pytest.mark.parametrize(
    ("f", "pieces"), [(noise_only, 1), (by_values, 3), (in_place, 2), (without, 1), (constant_too, 1)]
)
def test_a_graph_in_pieces_gives_the_graphs_values_and_draws(f, pieces):
    """Bit by bit, draws included, and the generator ends where it would have."""
    x = torch.randn(3, 4)
    graph, compiler = make_fx(f)(x), Compiler()
    torch.manual_seed(1)
    expected = f(x)
    state = torch.get_rng_state()
    run = compile_between_draws(graph, [x], compiler)
    torch.manual_seed(1)
    for got, value in zip(run(x), expected, strict=True):
        assert torch.equal(got, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert compiler.count == pieces


def test_values_of_a_graph_in_pieces_are_dropped_after_their_last_use():
    x = torch.randn(3, 4)
    run = compile_between_draws(make_fx(by_values)(x), [x], Compiler())
    for i, piece in enumerate(run.pieces):
        later = {name for other in run.pieces[i + 1 :] for name in other.inputs} | set(run.outputs)
        assert not later & set(piece.last)
    dropped = [name for piece in run.pieces for name in piece.last]
    everything = {name for piece in run.pieces for name in (*piece.inputs, *piece.outputs)}
    assert len(dropped) == len(set(dropped)) and set(dropped) == everything - set(run.outputs)


@pytest.fixture
def uncompiled(monkeypatch):
    """Staged steps cut at their draws, and run as they are."""
    compiler = Compiler()
    monkeypatch.setattr(
        compiled.CompiledStep,
        "_compile",
        lambda self, traced, inputs: compile_between_draws(traced.graph, inputs, compiler),
    )
    return compiler


@pytest.mark.parametrize("names", cases()[::4], ids=" | ".join)
def test_a_step_in_pieces_has_the_numbers_of_the_programs(names, uncompiled):
    model, guide = pair(*names[:2])
    objective = OBJECTIVES[names[2]](TRACED[names[3]]())
    agree(objective, model, guide, [data()], backend="inductor")
    assert uncompiled.count > 0


def test_a_particle_drawn_by_its_weight_ends_no_piece(uncompiled):
    """Its uniform number depends on shapes alone, as dropout and the latents' noise do."""
    model, guide = pair("shared", "product")
    agree(mm.objectives.mvae(estimator=mm.estimators.IWAE(3, resample=True)), model, guide, [data()], "inductor")
    assert uncompiled.count == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_is_a_draw_only_if_it_drops(dropout):
    """Its result is a tuple, which no cut of the graph may pass through."""
    x = torch.randn(2, 3, 5, 4)
    draws = torch.randn(5, 4)

    def attend(x):
        x = x + torch.randn_like(draws)
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=dropout)
        return (y.sum(),)

    graph = make_fx(attend)(x)
    compiler = Compiler()
    torch.manual_seed(1)
    expected = attend(x)[0]
    run = compile_between_draws(graph, [x], compiler)
    torch.manual_seed(1)
    torch.testing.assert_close(run(x)[0], expected)
    assert compiler.count == 1
