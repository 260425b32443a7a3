"""Recipes take any modality: kinds read off values, networks by shape, and networks that are passed."""

import math

import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.recipes import RECIPES, Networks, mvae
from pyro_mm.recipes.kinds import end_token, modality_kind

SMALL = {"latent": 2, "hidden": (6,)}
N = 16
FAMILIES = {
    "class": mm.conditionals.Categorical, "number": mm.conditionals.Normal, "bits": mm.conditionals.Bernoulli,
    "grey": mm.conditionals.Bernoulli, "counts": mm.conditionals.NegativeBinomial, "vector": mm.conditionals.Normal,
    "tokens": mm.conditionals.Tokens, "sequence": mm.conditionals.Normal, "array": mm.conditionals.Normal,
}  # fmt: skip


def values():
    """One modality of each kind, by its name."""
    torch.manual_seed(0)
    return {
        "class": torch.arange(N) % 3, "number": torch.randn(N), "bits": torch.rand(N, 5) > 0.5,
        "grey": torch.rand(N, 4, 4), "counts": torch.poisson(50 * torch.rand(N, 3)), "vector": torch.randn(N, 3),
        "tokens": torch.randint(5, (N, 4)), "sequence": torch.randn(N, 4, 2), "array": torch.rand(N, 3, 8, 8),
    }  # fmt: skip


def lengths():
    return {"tokens": torch.arange(N) % 4 + 1, "sequence": torch.arange(N) % 3 + 2}


@pytest.fixture(scope="module")
def rows():
    return mm.Batch(values(), lengths=lengths())


# -- kinds --------------------------------------------------------------------------------------------------------


def test_the_kind_is_read_off_and_chooses_the_likelihood(rows):
    assert {name: modality_kind(rows, name) for name in rows.names} == {name: name for name in FAMILIES}
    model, _, _ = mvae(rows, **SMALL)
    assert {name: type(decoder) for name, decoder in model.decoders.items()} == FAMILIES


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ((torch.rand(N, 3, 9, 9) > 0.5).float(), "bits"),
        (torch.rand(N, 3, 3) * 2 - 1, "array"),
        (torch.rand(N, 2, 3, 4, 5), "array"),
        (torch.rand(N, 3), "vector"),
        (-torch.ones(N, 3), "vector"),
        (torch.tensor([[0.0, 1.0], [2.0, 1.0]]), "counts"),
        (torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "bits"),
    ],
)
def test_a_kind_depends_on_shape_range_and_whole_numbers(value, kind):
    assert modality_kind(mm.Batch({"x": value}), "x") == kind


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.arange(12).reshape(4, 3), r"networks=\{'x': 'counts'\} for counts, networks=\{'x': 'tokens'\}"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), r"x.float\(\) / 255.*networks=\{'x': mm.recipes.Networks\("),
        (torch.tensor([True, False]), r"\.long\(\)"),
        (torch.tensor([0, -1, 2]), r"numbered from 0, and -1 is among them.*present="),
        (torch.tensor([[1.0, 0.5], [2.0, 0.5]]), r"1 of 2 features have one value in all rows \(1, counted from 0\)"),
    ],
)
def test_values_of_no_kind_are_refused_with_the_way_out(value, message):
    with pytest.raises(ValueError, match=message):
        mvae(mm.Batch({"x": value}), **SMALL)


def test_a_batch_without_values_has_no_kind():
    with pytest.raises(ValueError, match="holds no values"):
        modality_kind(mm.Batch({"a": None, "b": torch.zeros(2)}), "a")


def test_an_end_token_ends_every_string_and_is_nowhere_else():
    strings = torch.tensor([[3, 1, 0, 0], [2, 0, 0, 0], [1, 1, 2, 0]])

    def found(lengths, tokens=strings):
        return end_token(mm.Batch({"text": tokens}, lengths=lengths and {"text": lengths}), "text")

    assert found([3, 2, 4]) == 0
    assert found([2, 1, 3]) is None and found([4, 2, 4]) is None and found(None) is None


# -- training -----------------------------------------------------------------------------------------------------


def test_every_kind_trains_is_evaluated_and_generated(rows):
    torch.manual_seed(0)
    model, guide, objective = run = mvae(rows, **SMALL)
    objective.differentiable_loss(model, guide, rows).backward()
    unused = [n for module in (model, guide) for n, p in module.named_parameters() if p.grad is None]
    assert unused == []
    optimizer = lambda ps: torch.optim.Adam(ps, 1e-2)  # noqa: E731
    losses = mm.fit(*run, rows, epochs=8, optimizer=optimizer, seed=0, progress=False).to_dict()["loss"]
    assert losses[-1] < losses[0]
    for name in rows.names:
        evidence = mm.log_marginal(model, guide, rows.only(name), num_particles=5, seed=0)
        assert math.isfinite(evidence.mean()[0])
    drawn = mm.generate(model, guide, rows.only("class"), num_samples=2)
    assert {n: x.shape for n, x in drawn.items()} == {n: (2, *rows[n].shape) for n in rows.names}


def test_what_lies_under_the_masks_changes_nothing(rows):
    torch.manual_seed(0)
    present = {name: torch.rand(N) < 0.6 for name in rows.names}
    some = mm.Batch(values(), present, lengths=lengths())
    model, guide, objective = mvae(some, **SMALL)
    other = {
        n: torch.where(present[n].reshape(-1, *[1] * (x.dim() - 1)), some[n], x.flip(0)) for n, x in values().items()
    }
    losses = []
    for batch in (some, some.replaced(other)):
        torch.manual_seed(1)
        losses.append(objective.loss(model, guide, batch))
    assert losses[0] == losses[1] and math.isfinite(losses[0])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_colour_images_and_counts(name):
    torch.manual_seed(0)
    values = {"image": torch.rand(8, 3, 8, 8), "genes": torch.poisson(torch.full((8, 3), 5.0)).long()}
    if name == "cvae":
        values["label"] = torch.arange(8) % 2
    batch = mm.Batch(values)
    small = {"levels": 256, "steps": 1, "channels": 4} if name == "vaevae-flow" else {}
    if name == "vaevae-flow":
        batch = batch.replaced({"image": (batch["image"] * 255).round() / 255})
    run = RECIPES[name](batch, **SMALL, **small, networks={"genes": "counts"})
    loss = run.objective.differentiable_loss(run.model, run.guide, batch)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(mm.log_marginal(run.model, run.guide, batch, num_particles=5, seed=0).mean()[0])


def test_colour_images_have_convolutions_halved_as_often_as_they_can_be():
    convolutions = {}
    for side in (4, 8, 20, 64, 200):
        model, guide, _ = mvae(mm.Batch({"x": torch.rand(2, 3, side, side)}), **SMALL)
        count = [m for m in guide.modules() if isinstance(m, nn.Conv2d)]
        back = [m for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
        assert len(count) == len(back)
        convolutions[side] = len(count)
    assert convolutions == {4: 0, 8: 1, 20: 2, 64: 4, 200: 4}


def test_counts_begin_at_their_mean_over_the_rows_that_have_them():
    counts = torch.tensor([[1000.0, 2.0], [3000.0, 4.0], [7.0, 7.0]])
    model, _, _ = mvae(mm.Batch({"x": counts}, {"x": [True, True, False]}), **SMALL)
    bias = model.decoders["x"].net.layers[-1].bias
    torch.testing.assert_close(bias.exp(), torch.tensor([2000.001, 3.001]))


def test_a_number_that_is_encoded_is_one_feature():
    torch.manual_seed(0)
    batch = mm.Batch({"x": torch.randn(5)})
    encoder = mvae(batch, **SMALL).guide.posteriors["z"].experts["x"]
    several, alone = encoder(batch["x"]).mean, [encoder(batch["x"][i : i + 1]).mean[0] for i in range(5)]
    torch.testing.assert_close(several, torch.stack(alone))


# -- networks that are passed -------------------------------------------------------------------------------------


def test_passed_networks_are_made_once_for_each_network_at_the_sizes_asked_for():
    batch, asked = mm.Batch({"x": torch.randn(6, 4), "label": torch.arange(6) % 2}), []

    def encoder(out):
        asked.append(("encoder", out))
        return nn.Linear(4, out)

    def decoder(inputs):
        asked.append(("decoder", inputs))
        return mm.conditionals.Laplace(nn.Linear(inputs, 4), scale=1.0)

    run = mm.recipes.jmvae_kl(batch, latent=3, hidden=(5,), networks={"x": Networks(encoder, decoder)})
    assert asked == [("decoder", 3), ("encoder", 6), ("encoder", 5)]
    assert isinstance(run.model.decoders["x"], mm.conditionals.Laplace)
    assert math.isfinite(run.objective.loss(run.model, run.guide, batch))
    asked.clear()
    mm.recipes.dmvae(batch, latent=3, private=2, hidden=(5,), networks={"x": Networks(decoder=decoder)})
    assert asked == [("decoder", 5)]


def test_a_passed_encoder_reads_covariates():
    class Shifted(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.net = nn.Linear(4, out)

        def forward(self, x, covariates):
            return self.net(x - covariates["site"][:, None])

    x, site = torch.randn(6, 4), torch.arange(6.0)
    batch = mm.Batch({"x": x + site[:, None]}, covariates={"site": site})
    for recipe in (mvae, mm.recipes.jmvae_zero):
        torch.manual_seed(0)
        guide = recipe(batch, **SMALL, networks={"x": Networks(Shifted)}).guide
        plain = mm.Batch({"x": x}, covariates={"site": torch.zeros(6)})
        torch.testing.assert_close(mm.encode(guide, batch)["z"].mean, mm.encode(guide, plain)["z"].mean)


def test_a_kind_that_is_said_goes_before_the_kind_of_the_values():
    batch = mm.Batch({"x": torch.rand(4, 6, 6)})
    assert isinstance(mvae(batch, networks={"x": "array"}).model.decoders["x"], mm.conditionals.Normal)
    told = mvae(batch, networks={"x": Networks(encoder=lambda out: mm.nn.MLP(36, out), kind="array")})
    assert isinstance(told.model.decoders["x"], mm.conditionals.Normal)


@pytest.mark.parametrize(
    ("networks", "error", "message"),
    [
        ({"y": "bits"}, ValueError, "'y'"),
        ({"x": "pictures"}, ValueError, "unknown kind 'pictures', expected one of 'class'"),
        ({"x": "tokens"}, ValueError, "asks for integers from 0 of shape .N, T., and 'x' is torch.float32"),
        ({"x": "counts"}, ValueError, "asks for whole numbers from 0"),
        ({"x": nn.Linear(4, 2)}, TypeError, r"got the module Linear. Give networks=\{'x': .*decoder=lambda inputs"),
        ("bits", TypeError, "networks"),
        ({"x": Networks(encoder=lambda out: out)}, TypeError, r"networks\['x'\].encoder\(4\) to return a torch.nn.Mod"),
    ],
)
def test_networks_that_fit_no_modality_are_refused(networks, error, message):
    with pytest.raises(error, match=message):
        mvae(mm.Batch({"x": torch.randn(6, 4)}), **SMALL, networks=networks)


def test_networks_are_functions_that_make_them():
    with pytest.raises(TypeError, match=r"lambda out: \.\., since a recipe may need several"):
        Networks(encoder=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="kind"):
        Networks(kind="picture")


def test_a_passed_encoder_of_another_size_is_refused():
    batch = mm.Batch({"x": torch.randn(6, 4), "y": torch.randn(6, 4)})
    run = mvae(batch, **SMALL, networks={"x": Networks(encoder=lambda out: nn.Linear(4, 6))})
    with pytest.raises(ValueError, match=r"site 'z'|shape"):
        mm.fit(*run, batch, epochs=1, progress=False)
