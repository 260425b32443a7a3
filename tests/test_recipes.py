"""Every recipe trains, is evaluated and generates; networks follow the kind of a modality."""

import math

import pytest
import torch

import pyro_mm as mm
from pyro_mm.recipes import RECIPES, mvae

SMALL = {"latent": 3, "hidden": (8,)}


@pytest.fixture(scope="module")
def rows():
    return mm.datasets.load("digits")[0][torch.arange(64)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_evaluates_and_generates(name, rows):
    torch.manual_seed(0)
    model, guide, objective = RECIPES[name](rows, **SMALL)
    objective.differentiable_loss(model, guide, rows).backward()
    for what, module in (("model", model), ("guide", guide)):
        for parameter_name, p in module.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), f"{what}.{parameter_name}"
    optimizer = lambda ps: torch.optim.Adam(ps, 1e-2)  # noqa: E731
    history = mm.fit(model, guide, objective, rows, epochs=15, optimizer=optimizer, seed=0, progress=False)
    losses = history.to_dict()["loss"]
    assert sum(losses[-3:]) / 3 < losses[0]
    for seen in (rows, rows.only("image"), rows.only("label")):
        evidence = mm.log_marginal(model, guide, seen, num_particles=20, seed=0)
        assert math.isfinite(evidence.mean()[0])
    drawn = mm.generate(model, guide, rows.only("label"), num_samples=2)
    assert drawn["image"].shape == (2, 64, 8, 8) and drawn["label"].shape == (2, 64)


def test_an_estimator_goes_through(rows):
    for recipe in RECIPES.values():
        assert "num_particles=3" in repr(recipe(rows, **SMALL, estimator=mm.estimators.IWAE(3)).objective)


def test_the_default_is_a_bound(rows):
    _, _, objective = mvae(rows)
    assert str(objective.bounds(rows.names)) == ("lower bound on log p(image, label) + log p(image) + log p(label)")
    assert mvae(rows, label_weight=50.0).objective.bounds(rows.names).kind == "surrogate"


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'counts' is neither an image"):
        mvae(mm.Batch({"counts": torch.ones(4, 3)}))
