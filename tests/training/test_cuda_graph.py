"""The replay of a step, with the GPU played: a replay fills the memory of the capture anew, and runs no Python."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from pyro_mm.training import cuda_graph
from pyro_mm.training.compile import GraphStep
from pyro_mm.training.step import Update
from pyro_mm.training.tracing import TracedStep


def loss_and_gradients(scale, x, weight, other):
    """sum(scale * weight * x), its one term, and its gradient over weight; none for the other."""
    total = (scale * weight * x).sum()
    return total, total + 1, scale * x


@pytest.fixture
def played(monkeypatch):
    """torch.cuda as far as it is asked for; what it replays is set by the test."""
    streams = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(Stream=lambda: streams, current_stream=lambda: streams, stream=lambda s: nullcontext())
    cuda.captures, cuda.replays = 0, None

    class Graph:
        def replay(self):
            cuda.replays()

    def graph(which, capture_error_mode):
        cuda.captures += 1
        return nullcontext()

    cuda.CUDAGraph, cuda.graph = Graph, graph
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def build(played, optimizer=None):
    weight, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1))
    traced = TracedStep(None, ["term"], [0], uses_step=False)
    loss = SimpleNamespace(parameters=[weight, other])
    update = Update(loss, optimizer=optimizer and optimizer([weight]))
    step = GraphStep(loss_and_gradients, traced, update, [weight, other], optimizes=True)
    run = cuda_graph.CUDAGraphStep(step)

    def replays():
        with torch.no_grad():
            loss, term, gradient = loss_and_gradients(*run.inputs, *step.parameters_and_buffers)
            run.result[0].copy_(loss), run.result[1][0].copy_(term), step.gradients[0].copy_(gradient)
            step.update.apply()

    played.replays = replays
    return run, weight, other


def test_gradients_and_values_of_a_cuda_graph_are_those_of_the_step(played):
    run, weight, other = build(played)
    losses = []
    for k in range(7):
        weight.grad = other.grad = None  # as zero_grad would
        x = torch.full((3,), float(k))
        loss, (term,) = run([torch.tensor(2.0), x])
        assert torch.equal(weight.grad, 2 * x) and other.grad is None
        losses.append((loss, term))
    assert played.captures == 1
    assert [(float(a), float(b)) for a, b in losses] == [(6.0 * k, 6.0 * k + 1) for k in range(7)]


def test_a_setting_or_a_place_that_changes_is_captured_anew(played):
    run, weight, _ = build(played, lambda ps: torch.optim.SGD(ps, 0.0))
    inputs = [torch.tensor(1.0), torch.ones(3)]
    for _ in range(5):
        run(inputs)
    assert played.captures == 1
    run.step.update.optimizer.param_groups[0]["lr"] = 0.5
    run(inputs)
    assert played.captures == 2
    weight.data = weight.data.clone()
    run(inputs)
    run(inputs)
    assert played.captures == 3


def test_which_optimisers_can_be_captured():
    parameter = [torch.nn.Parameter(torch.ones(2))]
    adam = torch.optim.Adam(parameter)
    assert cuda_graph.can_capture(adam) and adam.param_groups[0]["capturable"]
    assert cuda_graph.can_capture(torch.optim.SGD(parameter, 0.1))
    assert not cuda_graph.can_capture(torch.optim.Adagrad(parameter))
    begun = torch.optim.Adam(parameter)
    parameter[0].grad = torch.ones(2)
    begun.step()
    assert not cuda_graph.can_capture(begun)
