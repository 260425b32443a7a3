"""Sequences in a batch: what stands behind the end is not read, and likelihoods count the steps before it."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_mm as mm
from pyro_mm import conditionals

STEPS = 4
NAN = float("nan")
LENGTHS = [4, 2, 0, 1]
VALID = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]


def series(padding=0.0):
    values = torch.arange(1.0, 33.0).reshape(4, STEPS, 2)
    return torch.where(VALID[..., None], values, padding)


# -- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0.0, 7.0, NAN, torch.inf])
@pytest.mark.parametrize("kind", [lambda x: x, lambda x: x.numpy(), list], ids=["tensor", "array", "rows"])
def test_padding_is_replaced_by_the_last_valid_step(padding, kind):
    given = series(padding)
    batch = mm.Batch({"a": kind(given)}, lengths={"a": LENGTHS})
    assert batch.presence("a") is True
    assert torch.equal(batch["a"][VALID], series()[VALID])
    assert torch.equal(batch["a"][1, 2:], series()[1, 1].expand(2, 2))
    assert torch.equal(batch["a"][2], series()[0, 0].expand(4, 2))  # an empty sequence, of another one's first step
    assert torch.equal(given.nan_to_num(-1.0), series(padding).nan_to_num(-1.0))  # the caller's values are untouched


def test_tokens_are_padded_in_their_own_type():
    batch = mm.Batch({"w": torch.tensor([[3, 1, -1], [2, -1, -1]])}, lengths={"w": [2, 1]})
    assert torch.equal(batch["w"], torch.tensor([[3, 1, 1], [2, 2, 2]]))
    hidden = np.ma.masked_array([[3, 1, 9], [2, 9, 9]], [[0, 0, 1], [0, 1, 1]])
    assert torch.equal(mm.Batch({"w": hidden}, lengths={"w": [2, 1]})["w"], batch["w"])
    assert mm.Batch({"w": hidden}, lengths={"w": [3, 1]}).present["w"].tolist() == [False, True]


def test_a_row_with_nan_among_its_valid_steps_is_missing():
    values = series(NAN)
    values[0, 1, 0] = NAN
    with pytest.warns(UserWarning, match="1 of 4 rows have missing entries"):
        batch = mm.Batch({"a": values}, lengths={"a": LENGTHS})
    assert batch.present["a"].tolist() == [False, True, True, True]
    assert batch["a"].isfinite().all()


def test_a_missing_sequence_of_length_0_is_to_be_generated_with_all_steps():
    batch = mm.Batch({"a": series(), "b": torch.zeros(4)}, {"a": [True, False, False, True]}, lengths={"a": LENGTHS})
    assert batch.lengths["a"].tolist() == [4, 2, STEPS, 1]
    assert mm.Batch({"a": series()}, lengths={"a": LENGTHS}).lengths["a"].tolist() == LENGTHS
    nothing = mm.Batch(
        {"a": torch.full((4, STEPS), NAN), "b": torch.zeros(4)}, {"a": [False] * 4}, lengths={"a": [0] * 4}
    )
    assert nothing.presence("a") is False and nothing.lengths["a"].tolist() == [STEPS] * 4


def test_what_cannot_be_a_sequence_is_refused_in_words():
    with pytest.raises(ValueError, match=r"lengths of 'a': expected sequences \(N, T, \.\.\), got shape \(3,\)"):
        mm.Batch({"a": torch.zeros(3)}, lengths={"a": [1, 1, 1]})
    with pytest.raises(ValueError, match="expected integers from 0 to 4, the steps of its values, got 0 to 5"):
        mm.Batch({"a": series()}, lengths={"a": [5, 2, 0, 1]})
    with pytest.raises(ValueError, match="expected integers from 0 to 4, the steps of its values, got -1 to 2"):
        mm.Batch({"a": series()}, lengths={"a": [-1, 2, 0, 1]})
    with pytest.raises(TypeError, match="Sequences of unequal length are to be padded, by "):
        mm.Batch({"a": [torch.zeros(3, 2), torch.zeros(2, 2)]})


# -- other batches -------------------------------------------------------------------------------------------------


def test_every_batch_made_of_one_carries_its_lengths(tmp_path):
    """Aligned sequences have the same lengths, unaligned ones their own."""
    values = {"a": series(), "b": series() + 1, "c": torch.ones(4, 7, dtype=torch.long)}
    whole = mm.Batch(values, lengths={"a": LENGTHS, "b": LENGTHS, "c": [7, 0, 3, 1]})
    others = {
        "rows": (whole[[2, 0]], [2, 0]),
        "mask": (whole[torch.tensor([True, False, True, False])], [0, 2]),
        "slice": (whole[1:3], [1, 2]),
        "subsample": (whole.subsample(torch.tensor([3, 1])), [3, 1]),
        "block": (whole.block(slice(1, 4)), [1, 2, 3]),
        "padded": (whole.padded(6), [0, 1, 2, 3, 0, 0]),
        "without": (whole.without("a"), [0, 1, 2, 3]),
        "only": (whole.only("a"), [0, 1, 2, 3]),
        "to": (whole.to("cpu"), [0, 1, 2, 3]),
        "with_tensors": (whole.with_tensors(whole.parts()[1]), [0, 1, 2, 3]),
        "replaced": (whole.replaced({"a": series()}), [0, 1, 2, 3]),
        "standalone": (whole.standalone(), [0, 1, 2, 3]),
        "part_of": (whole.part_of(9), [0, 1, 2, 3]),
    }
    torch.save(whole, tmp_path / "batch.pt")
    others["saved"] = (torch.load(tmp_path / "batch.pt", weights_only=False), [0, 1, 2, 3])
    for name, (other, rows) in others.items():
        for modality in "abc":
            assert torch.equal(other.lengths[modality], whole.lengths[modality][rows]), (name, modality)
    assert whole.to("meta").lengths["a"].device.type == "meta"
    assert mm.Batch.empty(3, whole).lengths["c"].tolist() == [7, 7, 7]  # not those of a row that is not shown


def test_lengths_are_exchanged_and_checked():
    batch = mm.Batch({"a": series()}, lengths={"a": LENGTHS})
    assert batch.with_lengths({"a": torch.tensor([1, 2, 3, 4])}).lengths["a"].tolist() == [1, 2, 3, 4]
    assert batch.lengths["a"].tolist() == LENGTHS
    with pytest.raises(ValueError, match="from 0 to 4, the steps of its values, got 1 to 5"):
        batch.with_lengths({"a": torch.tensor([1, 2, 3, 5])})
    with pytest.raises(ValueError, match="unknown modality 'b'"):
        batch.with_lengths({"b": torch.tensor([1, 2, 3, 4])})


# -- likelihoods ---------------------------------------------------------------------------------------------------


def whole_numbers(x):
    return x.abs().round()


FAMILIES = {
    "Normal": (conditionals.Normal, {}, 2, lambda x: x),
    "Normal of one scale": (conditionals.Normal, {"scale": 0.7}, 1, lambda x: x),
    "Laplace": (conditionals.Laplace, {}, 2, lambda x: x),
    "Laplace of one scale": (conditionals.Laplace, {"scale": 0.7}, 1, lambda x: x),
    "Bernoulli": (conditionals.Bernoulli, {}, 1, lambda x: (x > 0).to(x.dtype)),
    "Poisson": (conditionals.Poisson, {}, 1, whole_numbers),
    "NegativeBinomial": (conditionals.NegativeBinomial, {"shared_dispersion": False}, 2, whole_numbers),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_of_a_sequence_is_that_of_its_valid_steps(family):
    """Against each row by itself, cut to its length; with particles and a missing row; value and gradient."""
    make, options, parameters, values_of = FAMILIES[family]
    torch.manual_seed(0)
    net = mm.nn.RecurrentDecoder(3, STEPS, 2 * parameters, 5).double()
    decoder = make(net, (STEPS, 2), **options)
    x = values_of(torch.randn(4, STEPS, 2, dtype=torch.float64))
    batch = mm.Batch({"a": x}, {"a": [True, True, True, False]}, lengths={"a": LENGTHS})
    z = torch.randn(5, 4, 3, dtype=torch.float64)

    def observed(rows):
        with pyro.plate("particles", 5, dim=-2), rows.plate():
            trace = poutine.trace(rows.observe).get_trace("a", decoder, z)
        return trace.nodes["a"]["fn"].log_prob(trace.nodes["a"]["value"])

    found = observed(batch)
    base = decoder(z).base_dist
    by_hand = (base.log_prob(x) * VALID[..., None]).sum((-1, -2))
    by_hand[:, 3] = 0.0
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)
    assert not found[:, 2:].any()  # one without a step, and one that is missing

    other = batch.replaced({"a": torch.where(VALID[..., None], x, values_of(x + 100.0))})
    gradients = [torch.autograd.grad(observed(b).sum(), list(net.parameters())) for b in (batch, other)]
    assert torch.equal(observed(other), found)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_steps_with_a_density_of_their_own_count_too():
    """Classes per step, and a joint density of the entries of a step."""
    batch = mm.Batch({"a": series(), "w": torch.ones(4, STEPS).long()}, lengths={"a": LENGTHS, "w": LENGTHS})
    step = dist.MultivariateNormal(torch.zeros(STEPS, 2), torch.eye(2))
    classes = dist.Categorical(logits=torch.randn(STEPS, 3))
    with batch.plate():
        a = poutine.trace(batch.observe).get_trace("a", step.expand([4, STEPS]).to_event(1)).nodes["a"]
        w = poutine.trace(batch.observe).get_trace("w", lambda: classes.expand([4, STEPS]).to_event(1)).nodes["w"]
    torch.testing.assert_close(a["fn"].log_prob(a["value"]), (step.log_prob(batch["a"]) * VALID).sum(-1))
    torch.testing.assert_close(w["fn"].log_prob(w["value"]), (classes.log_prob(batch["w"]) * VALID).sum(-1))


class WholeSequences(nn.Module):
    """A density of all steps together, of which steps cannot be left out."""

    def forward(self, z):
        return dist.MultivariateNormal(z[..., :1].expand(*z.shape[:-1], STEPS), torch.eye(STEPS))


def test_a_density_of_whole_sequences_is_refused_unless_it_knows_the_lengths():
    batch = mm.Batch({"a": torch.randn(4, STEPS)}, lengths={"a": LENGTHS})
    z = torch.zeros(4, 2)
    with batch.plate(), pytest.raises(ValueError, match="MultivariateNormal is a distribution of all 4 steps"):
        batch.observe("a", WholeSequences(), z)

    def knows(z, lengths):
        return WholeSequences()(z)

    with batch.plate():
        batch.observe("a", knows, z)
    with batch.with_end_marks().plate():
        batch.with_end_marks().observe("a", WholeSequences(), z)


def test_a_decoder_that_lacks_the_shape_of_a_row_is_told_so():
    """A conditional without ``event_shape`` takes the steps of a row for rows, with lengths as without."""
    decoder = mm.conditionals.Normal(mm.nn.RecurrentDecoder(2, 5, 3), scale=1.0)
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), {"s": decoder})
    guide = mm.Guide(z=lambda rows: dist.Normal(torch.zeros(rows.size, 2), 1.0).to_event(1))
    batch = mm.Batch({"s": torch.randn(8, 5, 3)}, lengths={"s": torch.full((8,), 4)})
    with pytest.raises(ValueError, match=r"(?s)site s.*needs \.to_event"):
        mm.log_marginal(model, guide, batch, num_particles=2)


def test_an_empty_sequence_is_filled_by_a_row_that_has_the_modality():
    values = torch.tensor([[[NAN], [NAN]], [[5.0], [6.0]], [[7.0], [8.0]]])
    batch = mm.Batch({"a": values}, {"a": [True, False, True]}, lengths={"a": [0, 2, 1]})
    assert batch.present["a"].tolist() == [True, False, True]
    assert batch["a"][0].flatten().tolist() == [7.0, 7.0]
    nan = mm.Batch({"a": [[NAN, 1.0], [0.0, 0.0]]}, lengths={"a": [2, 0]})
    assert nan.present["a"].tolist() == [False, True] and bool(nan["a"].isfinite().all())


def test_a_sequence_that_is_none_is_missing_whatever_its_length():
    batch = mm.Batch({"a": [None, torch.tensor([1.0, 2.0])]}, lengths={"a": [0, 1]})
    assert batch.present["a"].tolist() == [False, True] and batch.lengths["a"].tolist() == [2, 1]
