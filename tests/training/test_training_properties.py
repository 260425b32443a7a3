"""Trainings of random rows end with finite parameters, or an error is ours; a loss is the sum of those of its rows."""

import pyro.distributions as dist
import torch
from hypothesis import assume
from hypothesis import strategies as st

import pyro_mm as mm
from tests.support.properties import assert_ours, for_all
from tests.support.random_batches import rows
from tests.support.random_stories import LATENT, latent_pair
from tests.support.random_tables import GivenNormal

RECIPES = sorted(set(mm.recipes.RECIPES) - {"cvae", "vae", "vaevae-flow"})  # which are of given modalities
few = st.integers(1, 6)
# of ours in words: a kind that has to be said, rows that teach nothing, or more modalities than a recipe is for
EXPECTED_REFUSALS = (
    "may be several things|holds no values|one value in all rows|rows that all lack|to be constants|"
    "No row of the epoch has|one boolean per row|does not use them on these data|one modality or two|"
    "besides the labels|Say which"
)


DTYPES = ["float32", "float64", "float16", "bool", "int64"]


@for_all(data=rows(most=3, size=few, dtypes=DTYPES), recipe=st.sampled_from(RECIPES), batch_size=st.integers(1, 8))
def test_recipes_train_on_any_rows_or_say_why(data, recipe, batch_size):
    batch = data.batch()
    try:
        model, guide, objective = mm.recipes.RECIPES[recipe](batch, latent=2, hidden=(4,))
        history = mm.fit(model, guide, objective, batch, epochs=2, batch_size=batch_size, seed=0, progress=False)
    except Exception as error:
        assert_ours(error, EXPECTED_REFUSALS, "|".join(data.names))
        return
    assert all(bool(p.isfinite().all()) for p in [*model.parameters(), *guide.parameters()])
    assert history.to_dataframe()["loss"].notna().all()
    assert bool(mm.log_marginal(model, guide, batch, num_particles=2, seed=0).log_prob.isfinite().all())
    samples = mm.generate(model, guide, batch, 2, seed=0)
    for name, column in data.columns.items():
        assert samples[name].shape == (2, data.size, *column.event) and bool(samples[name].isfinite().all())


TABLES = {
    "elbo": mm.objectives.elbo, "jmvae_kl": lambda: mm.objectives.jmvae_kl(0.1), "telbo": mm.objectives.telbo,
    "vaevae": mm.objectives.vaevae, "unimodal_mean": mm.objectives.unimodal_mean, "mvtcae": mm.objectives.mvtcae,
    "subset_mean": lambda: mm.objectives.subset_mean(None), "mvae": mm.objectives.mvae,
    "mixture_mean": lambda: mm.objectives.mixture_mean(1.0),
}  # fmt: skip
ESTIMATORS = {"default": lambda: None, "iwae": lambda: mm.estimators.IWAE(2), "dreg": lambda: mm.estimators.DReG(2)}


@for_all(
    data=rows(kinds=["real", "bits", "counts", "classes"], most=3, size=few, covariates=False),
    table=st.sampled_from(sorted(TABLES)),
    particles=st.sampled_from([None, 2]),
    extra=st.integers(0, 2),
)
def test_a_loss_is_the_sum_of_those_of_its_rows(data, table, particles, extra):
    """All draws have the same noise. The first rows may stand beside others, in any order, and beside padding."""
    model, guide = latent_pair(data, same_noise=True)
    objective = TABLES[table]()
    if particles:
        objective = mm.objectives.Objective(objective.terms, mm.estimators.IWAE(particles))
    GivenNormal.noise = torch.randn(particles or 1, LATENT)
    batch = data.batch()

    def loss(part):
        return objective.evaluate(model, guide, part, step=0).total.detach().double()

    each = torch.stack([loss(batch[i]) for i in range(data.size)])
    assert bool(each.isfinite().all())
    order = torch.randperm(data.size)
    close = dict(rtol=1e-4, atol=1e-4)
    assert torch.allclose(loss(batch), each.sum(), **close)
    assert torch.allclose(loss(batch[order].padded(data.size + extra)), each.sum(), **close)
    assert torch.allclose(loss(batch.subsample(order[:1])), data.size * each[order[0]], **close)


# -- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES = ["a dimension more", "a longer value", "no dimension", "outside"]
CALLS = {
    "fit": lambda pair, rows: mm.fit(*pair, mm.objectives.elbo(), rows, epochs=1, seed=0, progress=False),
    "log_marginal": lambda pair, rows: mm.log_marginal(*pair, rows, num_particles=2, seed=0),
    "log_conditional": lambda pair, rows: mm.log_conditional(*pair, rows, target=rows.names[0], num_particles=2),
    "log_weights": lambda pair, rows: mm.log_weights(*pair, rows, 2),
    "generate": lambda pair, rows: mm.generate(*pair, rows, seed=0),
    "posterior_draws": lambda pair, rows: mm.posterior_draws(*pair, rows, resample=True, num_particles=2),
    "encode": lambda pair, rows: mm.encode(pair[1], rows),
    "check": lambda pair, rows: mm.check(*pair, mm.objectives.elbo(), rows, num_particles=2, repeats=2),
}


@for_all(
    data=rows(kinds=["real", "bits", "counts", "classes"], dtypes=["float32"], most=2, covariates=False, plain=True),
    mistake=st.sampled_from(MISTAKES),
    call=st.sampled_from(sorted(CALLS)),
    reads=st.booleans(),
)
def test_values_that_a_pair_is_not_for_are_named(data, mistake, call, reads):
    """Whether the guide reads the values or not; only what encodes alone may take any that have as many entries."""
    name = data.names[0]
    column = data.columns[name]
    wrong = spoil(column, mistake)
    assume(wrong is not None and not column.missing.all())
    model, guide = latent_pair(data)
    if not reads:
        guide = mm.Guide(z=lambda batch: dist.Normal(torch.zeros(batch.size, LATENT), 1.0).to_event(1))
    batch = data.batch()
    batch = mm.Batch({n: wrong if n == name else batch[n] for n in data.names}, batch.present)
    try:
        found = CALLS[call]((model, guide), batch)
    except Exception as error:
        assert_ours(error, name)
        return
    if call == "check":
        assert any(name in text for text in found.findings), found
    else:
        assert call == "encode" and (not reads or mistake == "outside" or wrong[0].numel() == column.values[0].size)


def spoil(column, mistake):
    """Return values that a story of a column is not for."""
    x = column.tensor()
    if mistake == "a dimension more":
        return x[..., None].expand(*x.shape, 2).contiguous()
    if mistake in ("a longer value", "no dimension"):
        if not column.event:
            return None
        return torch.cat([x, x], -1) if mistake == "a longer value" else x.flatten(1)[:, 0]
    if column.kind == "real":
        return None
    there = torch.tensor(~column.missing).reshape(-1, *[1] * len(column.event))
    return torch.where(there, {"bits": 2.0, "counts": -1.0, "classes": 7.0}[column.kind], x)
