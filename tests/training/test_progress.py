"""The progress of a training in a notebook: one output of the cell, which changes in place."""

import subprocess
import sys
import types

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm


@pytest.fixture
def outputs(monkeypatch):
    """A stand-in of a notebook; the states of the outputs that it shows, as text and HTML."""
    shown = []

    class Handle:
        def update(self, value):
            shown[-1].append((repr(value), value._repr_html_()))

    def display(value, display_id=False):
        shown.append([(repr(value), value._repr_html_())])
        return Handle()

    monkeypatch.setattr("pyro_mm.training.progress.in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    return shown


def fit(epochs=3, **options):
    torch.manual_seed(0)
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        {"x": mm.conditionals.Normal(torch.nn.Linear(2, 3), scale=1.0)},
    )
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(torch.nn.Linear(3, 4))}))
    rows = mm.Batch({"x": torch.randn(12, 3)})
    return mm.fit(model, guide, mm.objectives.elbo(), rows, epochs=epochs, batch_size=4, seed=0, **options)


def test_a_notebook_shows_one_bar_that_ends_at_the_last_epoch(outputs, recwarn, capsys):
    history = fit()
    (states,) = outputs
    assert states[0][0] == "epoch 0/3"
    text, page = states[-1]
    assert text == f"epoch 3/3  loss {history.columns['loss'][-1]:.2f}"
    assert page == f'<progress value="3.0000" max="3"></progress> {text}'
    assert not recwarn.list and capsys.readouterr() == ("", "")


def test_a_training_that_stops_shows_how_far_it_came(outputs):
    fit(epochs=5, callback=lambda epoch, entry: epoch == 2)
    assert outputs[0][-1][0].startswith("epoch 2/5")


def test_no_bar_is_shown_without_progress(outputs):
    fit(progress=False)
    assert outputs == []


@pytest.mark.parametrize(("module", "warns"), [("pyro_mm", False), ("pyro", True)])
def test_an_import_in_a_notebook_does_not_ask_for_ipywidgets(module, warns):
    """Pyro's own import does, in the environment of the tests, which has none."""
    pytest.importorskip("ipykernel.zmqshell")
    code = f"import ipykernel.zmqshell, importlib.util as u, {module}; print(u.find_spec('ipywidgets') is None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "True" or not warns:
        assert ("IProgress not found" in done.stderr) == warns
