"""Stories with a kind of model for each modality, under every table of objectives: trained, or refused in words."""

import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils.global_state import import_zuko

NAMES = ("image", "caption", "attributes")
SCHEDULES = ("warm_up", "cyclical")
TABLES = {
    name: getattr(mm.objectives, name) for name in mm.objectives.__all__ if name.islower() and name not in SCHEDULES
}
CRITICS = ("critic against the posterior", "critic against the prior")
# with a discriminator or a flow the table is one of densities: each table with one of the two
CASES = [(kind, name) for i, name in enumerate(TABLES) for kind in (*CRITICS, ("VAE-GAN", "flow")[i % 2])]

# a critic against the prior stands for likelihood and KL together
OTHER_WEIGHTS = "a critic against the prior stands for likelihood and KL together, and they weigh"
NO_KL = "a critic of image against the prior stands for the KL from the guide to the prior, and the term has none"
REFUSED = {
    "beta_vae": OTHER_WEIGHTS, "mmvm": OTHER_WEIGHTS, "masked": NO_KL, "mmjsd": NO_KL, "mvtcae": NO_KL, "vaevae": NO_KL,
}  # fmt: skip
SURROGATES = {"mixture_mean", "mmjsd", "mmvm"}


@pytest.fixture(scope="module")
def rows():
    """Images of bits, captions of one to three tokens, two attributes in real numbers; three rows lack one of them."""
    rng = torch.Generator().manual_seed(0)
    values = {
        "image": torch.randint(2, (6, 4, 4), generator=rng).float(),
        "caption": torch.tensor([[1, 2, 0], [2, 0, 0], [1, 1, 0]] * 2),
        "attributes": torch.randn(6, 2, generator=rng),
    }
    present = {name: torch.ones(6, dtype=torch.bool) for name in NAMES}
    for n, name in enumerate(NAMES):
        present[name][n + 3] = False
    return mm.Batch(values, present=present, lengths={"caption": [3, 2, 3] * 2})


def mixed_pair(kind, rows, mixture):
    """Image by a generator, a likelihood or a flow; captions by an autoregressive decoder; attributes by a flow."""
    torch.manual_seed(1)
    zuko = import_zuko()

    def flow_of_attributes(inputs):
        return mm.conditionals.Flow(nn.Identity(), zuko.flows.NSF(2, inputs, transforms=1, hidden_features=(4,)))

    networks = {"attributes": mm.recipes.Networks(decoder=flow_of_attributes)}
    if "critic" in kind:
        networks["image"] = mm.recipes.Networks(
            decoder=lambda inputs: mm.conditionals.Implicit(mm.nn.MLP(inputs + 2, 16, (6,)), 2, (4, 4))
        )
    make = mm.recipes.mmvae if mixture else mm.recipes.vaevae
    if kind == "flow":
        model, guide, _ = mm.recipes.vaevae_flow(rows, 3, (6,), steps=1, channels=4, networks=networks)
        if mixture:
            mixed = mm.posteriors.MixtureOfExperts(dict(guide.posteriors["z"].experts.items()))
            guide = mm.Guide(z=mixed, w_image=guide.posteriors["w_image"])
        return model, guide
    return make(rows, 3, (6,), networks=networks)[:2]


def objective_of(kind, table):
    if "critic" in kind:
        against = kind.split()[-1]
        net = mm.nn.MLP(16 + 3, 3 if against == "posterior" else 1, (6,))
        return table.with_critics({"image": mm.objectives.Critic(net, against)})
    if kind == "VAE-GAN":
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
        return table.with_discriminators({"image": mm.objectives.Discriminator(net)})
    return table


def weight_of_the_image(table):
    """The weight of all log-densities of the image in what a table of densities bounds."""
    target = table.bounds(NAMES)
    evidence = sum(weight for names, weight in target.log_evidence.items() if "image" in names)
    return evidence + sum(weight for (names, _), weight in target.conditional.items() if "image" in names)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_table_trains_a_mixed_story_or_says_why_not(rows, kind, name):
    table = TABLES[name]()
    objective = objective_of(kind, table)
    model, guide = mixed_pair(kind, rows, mixture=name == "mmvae")
    of_prior = kind == "critic against the prior"
    options = {"epochs": 1, "batch_size": 6, "seed": 0, "progress": False}
    if of_prior and name in (*REFUSED, "mmvae"):
        reason = REFUSED.get(name, "weighs the draws of a row by its own posterior")
        with pytest.raises(ValueError, match=reason):
            mm.fit(model, guide, objective, rows, **options)
        return

    before = {key: value.clone() for key, value in model.state_dict().items()}
    history = mm.fit(model, guide, objective, rows, **options)
    assert all(torch.tensor(column).isfinite().all() for column in history.columns.values())
    for modality in NAMES:
        keys = [key for key in before if key.startswith(f"decoders.{modality}.")]
        assert any(not torch.equal(before[key], model.state_dict()[key]) for key in keys), f"{modality} did not move"

    target = str(objective.bounds(NAMES))
    if name in SURROGATES:
        assert target == "surrogate: not a bound"
    elif "critic" in kind:
        weight = weight_of_the_image(table)
        assert target.startswith(f"estimates, by critics: {table.bounds(NAMES)} + ")
        assert f" + {'' if weight == 1 else f'{weight:.4g} '}H(image)" in target
        assert ("I_q(others; z | image)" in target) == of_prior
    else:
        assert target == str(table.bounds(NAMES)) and target.startswith("lower bound on")
