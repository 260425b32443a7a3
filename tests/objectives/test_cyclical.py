"""The weight that anneals in cycles."""

import pytest
import torch

import pyro_mm as mm
from tests.support.training_pair import data, pair


def test_a_cycle_is_a_ramp_and_a_plateau_again_and_again():
    weight = mm.objectives.cyclical(10, 2.0, 1.0, ramp=0.4, cycles=3)
    cycle = [1.0, 1.25, 1.5, 1.75, *[2.0] * 6]
    assert [weight(step) for step in range(40)] == pytest.approx(cycle * 3 + [2.0] * 10)
    endless = mm.objectives.cyclical(10, 2.0, 1.0, ramp=0.4)
    assert endless(10_000_001) == pytest.approx(1.25)


@pytest.mark.parametrize("options", [{"period": 0}, {"period": 4, "ramp": 0.0}, {"period": 4, "ramp": 1.5},
                                     {"period": 4, "cycles": 0}])  # fmt: skip
def test_other_cycles_are_refused(options):
    with pytest.raises(ValueError, match=r"expected (period|cycles)|ramp"):
        mm.objectives.cyclical(**options)


@pytest.mark.parametrize("compile", [False, True])
def test_a_training_follows_it(compile, monkeypatch):
    """With a step size of 0 the loss of a step differs by its weight alone: it is that of the weight by hand."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    programs = pair()
    seen = []

    class Note:
        def on_step(self, training):
            seen.append(training.values["loss"])

    weight = mm.objectives.cyclical(4, ramp=0.5)
    for kl in (weight, 0.0, 1.0):
        mm.fit(*programs, mm.objectives.elbo(kl=kl), data(32), epochs=8, batch_size=32, seed=0, progress=False,
               optimizer=lambda ps: torch.optim.SGD(ps, 0.0), callbacks=[Note()],
               compile=compile and kl is weight)  # fmt: skip
    cyclical, none, whole = seen[:8], seen[8:16], seen[16:]
    for step in range(8):
        expected = none[step] + weight(step) * (whole[step] - none[step])
        assert cyclical[step] == pytest.approx(expected, rel=1e-4)
