"""The parameters of a story of functions are the leaves of its loss: all of them, whatever torch's nodes live for."""

import random
import weakref

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.utils.graph import graph_leaves


def random_graph(seed):
    """Leaves, and two results of random operations on them and on each other."""
    random.seed(seed)
    torch.manual_seed(seed)
    leaves = [torch.randn(3, requires_grad=True) for _ in range(random.randint(1, 12))]
    values = list(leaves)
    for _ in range(random.randint(1, 40)):
        a, b = random.choice(values), random.choice(values)
        values.append(random.choice([lambda: a * b, lambda: a + b, lambda: torch.tanh(a), lambda: a.exp() - b])())  # noqa: B023
    return leaves, [values[-1].sum(), values[-2].sum()]


def test_leaves_of_a_loss_are_the_tensors_that_get_a_gradient():
    """Of 100 graphs torch 2.6 to 2.11 lost some in 95, where only the ids of nodes were remembered."""
    for seed in range(100):
        leaves, results = random_graph(seed)
        gradients = torch.autograd.grad(sum(results), leaves, allow_unused=True)
        expected = {id(x) for x, g in zip(leaves, gradients, strict=True) if g is not None}
        assert set(graph_leaves(results)) == expected


class Wrapper:
    """A node as old torch hands it to Python: made anew when asked for, unless an earlier one is alive still."""

    alive = weakref.WeakValueDictionary()

    def __init__(self, key, parents):
        self.key, self.parents = key, parents

    @classmethod
    def of(cls, key, parents):
        node = cls.alive.get(key)
        if node is None:
            cls.alive[key] = node = cls(key, parents)
        return node

    @property
    def variable(self):
        return LEAVES.get(self.key)

    @property
    def next_functions(self):
        return tuple((Wrapper.of(key, self.parents), 0) for key in self.parents.get(self.key, ()))


LEAVES = {f"leaf {i}": torch.zeros((), requires_grad=True) for i in range(8)}


def test_leaves_are_found_where_nodes_die_when_released():
    """A chain of sums, each of the sum before and one leaf: on any torch, by nodes of the test's own."""
    parents = {f"sum {i}": (f"sum {i + 1}", f"leaf {i}") for i in range(8)}

    class Root:
        requires_grad = True
        grad_fn = Wrapper.of("sum 0", parents)

    assert set(graph_leaves([Root()])) == {id(x) for x in LEAVES.values()}


@pytest.mark.parametrize("depth", [1, 12])
def test_a_story_of_functions_trains_all_of_its_parameters(depth):
    """Each of the scalars whose sum is the mean of x is moved by one step of gradient descent, and by as much."""
    parts = [torch.zeros((), requires_grad=True) for _ in range(depth)]

    def story(batch):
        mean = torch.zeros(())
        for part in parts:
            mean = torch.tanh(mean) + part
        with batch.plate():
            batch.observe("x", dist.Normal(mean, 1.0))

    batch = mm.Batch({"x": torch.ones(5)})
    mm.fit(story, lambda b: None, mm.objectives.elbo(), batch, epochs=1, batch_size=5, progress=False,
           optimizer=lambda ps: torch.optim.SGD(ps, 0.1))  # fmt: skip
    # at zero the slope of tanh is 1, so that x - mean = 1 is the gradient of each
    assert [p.item() for p in parts] == pytest.approx([0.1] * depth)
