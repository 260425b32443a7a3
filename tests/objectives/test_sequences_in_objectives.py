"""Sequences in every kind of objective: what stands behind the end changes neither value nor gradient."""

import pyro
import pytest
import torch

import pyro_mm as mm
from pyro_mm.nn import Attention, AttentionTokens, Recurrent, RecurrentTokens, TemporalConvolutional
from tests.support.sequences import STEPS, pair, rows

OBJECTIVES = {
    "ELBO": lambda: mm.objectives.elbo(),
    "IWAE": lambda: mm.objectives.elbo(mm.estimators.IWAE(3)),
    "DReG": lambda: mm.objectives.elbo(mm.estimators.DReG(2)),
    "resampled": lambda: mm.objectives.elbo(mm.estimators.IWAE(3, resample=True)),
    "stacked terms": lambda: mm.objectives.mvae(),
    "stacked terms with particles": lambda: mm.objectives.unimodal_mean(mm.estimators.IWAE(2)),
    "random subsets": lambda: mm.objectives.masked(),
    "subsampled": lambda: mm.objectives.elbo().subsampled(1),
    "one by one": lambda: mm.objectives.elbo(mm.estimators.IWAE(2), vectorize=False),
}
NETWORKS = {
    "recurrent": (Recurrent, RecurrentTokens),
    "convolutions": (lambda f, o, w, **k: TemporalConvolutional(f, o, (w,), **k), RecurrentTokens),
    "attention": (
        lambda f, o, w, **k: Attention(f, o, w, heads=2, **k), lambda f, v, w: AttentionTokens(f, v, w, heads=2)
    ),
}  # fmt: skip


def with_other_padding(batch):
    """The rows with values in the place of padding that a batch would not put there."""
    behind = {name: torch.arange(STEPS) >= batch.lengths[name][:, None] for name in "wx"}
    return batch.replaced(
        {
            "w": torch.where(behind["w"], 2, batch["w"]),
            "x": torch.where(behind["x"][..., None], 1e4, batch["x"]),
        }
    )


def value_and_gradient(objective, model, guide, batch):
    for program in (model, guide):
        program.zero_grad()
    pyro.set_rng_seed(3)
    value = objective.differentiable_loss(model, guide, batch)
    value.backward()
    gradients = [p.grad for program in (model, guide) for p in program.parameters() if p.grad is not None]
    return [value.detach(), *(g.clone() for g in gradients)]


PAIRS = [(name, "recurrent") for name in OBJECTIVES]
PAIRS += [(name, networks) for networks in ("convolutions", "attention") for name in ("DReG", "random subsets")]


@pytest.mark.parametrize(("objective", "networks"), PAIRS)
def test_padding_changes_neither_value_nor_gradient(objective, networks):
    objective = OBJECTIVES[objective]()
    model, guide = pair(*NETWORKS[networks])
    batch = rows()
    one = value_and_gradient(objective, model, guide, batch)
    other = value_and_gradient(objective, model, guide, with_other_padding(batch))
    assert len(one) > 15 and all(x.isfinite().all() for x in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("networks", ["recurrent", "attention"])
def test_a_traced_step_takes_lengths_and_tokens_as_inputs(networks):
    """A graph traced on some rows, run on others, against the step as it is."""
    model, guide = pair(*NETWORKS[networks])
    objective = mm.objectives.elbo()
    step = mm.stage(objective, model, guide, rows(), backend=None)
    step(rows())
    other = rows()[torch.arange(12).flip(0)]
    other = other.with_lengths({"x": other.lengths["x"].flip(0)})
    expected = value_and_gradient(objective, model, guide, other)
    pyro.set_rng_seed(3)
    for program in (model, guide):
        program.zero_grad()
    value = step(other)
    gradients = [p.grad for program in (model, guide) for p in program.parameters() if p.grad is not None]
    assert not step.reasons
    for a, b in zip([value, *gradients], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sequence_that_every_row_lacks_is_left_out():
    model, guide = pair()
    batch = rows()
    without = mm.Batch(
        {"w": batch["w"], "x": None, "y": batch["y"]}, {"w": batch.present["w"]}, lengths={"w": batch.lengths["w"]}
    )
    objective = mm.objectives.elbo()
    found = value_and_gradient(objective, model, guide, without)[0]
    torch.testing.assert_close(found, value_and_gradient(objective, model, guide, batch.without("x"))[0])


def test_weights_of_rows_and_a_subsample_scale_sequences_as_all_else():
    """A padded batch, whose padding rows weigh nothing, and a subsampled plate."""
    model, guide = pair()
    objective = mm.objectives.elbo()
    batch = rows()
    loss = lambda b: value_and_gradient(objective, model, guide, b)[0]  # noqa: E731
    torch.testing.assert_close(loss(batch.padded(12)), loss(batch))
    part = batch[:6]
    torch.testing.assert_close(loss(part.part_of(12)), 2 * loss(part))


def test_a_short_training_learns_strings():
    """The mean likelihood of training rows rises, with a minibatch that is padded and sequences of every length."""
    model, guide = pair()
    batch = rows(30)
    before = mm.log_marginal(model, guide, batch, num_particles=20, seed=0).mean()[0]
    adam = lambda parameters: torch.optim.Adam(parameters, 0.02)  # noqa: E731
    mm.fit(model, guide, mm.objectives.elbo(), batch, epochs=8, batch_size=12, optimizer=adam, seed=0, progress=False)
    after = mm.log_marginal(model, guide, batch, num_particles=20, seed=0).mean()[0]
    assert after > before + 0.5
