"""Samples of sequences: strings stop at their end token, others at the length of the row, and lengths come back."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import conditionals, metrics
from tests.support.sequences import STEPS, VOCABULARY, pair, rows


def ends(tokens):
    """Numbers of tokens up to the end token, by hand."""
    return torch.tensor([[(r.tolist() + [0]).index(0) + 1 for r in sample] for sample in tokens]).clamp(max=STEPS)


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("vectorize", [True, False])
def test_lengths_of_generated_rows_come_back(resample, vectorize):
    """Also where the row lacks the string, whose own length is then no bound."""
    model, guide = pair()
    batch = rows()
    options = {"seed": 0, "resample": resample, "num_particles": 20, "vectorize": vectorize}
    for shown in (batch, batch.without("w"), batch.only("y")):
        samples = mm.generate(model, guide, shown, 4, **options)
        assert samples["w"].shape == (4, 12, STEPS) and set(samples.lengths) == {"w", "x"}
        assert torch.equal(samples.lengths["w"], ends(samples["w"]))
        assert torch.equal(samples.lengths["x"], batch.lengths["x"].expand(4, 12))
        assert len(samples.lengths["w"].unique()) == STEPS
        again = mm.Batch(
            {name: x[0] for name, x in samples.items()}, lengths={name: n[0] for name, n in samples.lengths.items()}
        )
        mm.log_marginal(model, guide, again, num_particles=2, seed=0)


def test_strings_without_an_end_token_have_the_lengths_of_the_batch():
    model, guide = pair(end=None)
    samples = mm.generate(model, guide, rows().without("w"), 3, seed=0)
    assert torch.equal(samples.lengths["w"], rows().lengths["w"].expand(3, 12))
    behind = torch.arange(STEPS) >= samples.lengths["w"][..., None]
    assert not samples["w"][behind].any() and samples["w"][~behind].any()


def test_strings_that_say_nothing_of_their_length_are_drawn_with_all_steps():
    model, guide = pair()
    batch = mm.Batch({"w": rows()["w"], "y": rows()["y"]})
    samples = mm.generate(model, guide, batch.only("y"), 3, seed=0)
    assert torch.equal(samples.lengths["w"], ends(samples["w"])) and list(samples.lengths) == ["w"]


def test_prior_samples_have_all_steps_of_a_series():
    model, guide = pair()
    samples = mm.generate(model, guide, mm.Batch.empty(6, rows()[[2, 1]]), seed=0)
    assert samples.lengths["x"].unique().tolist() == [STEPS]


def test_simulated_strings_have_their_own_lengths():
    model, guide = pair()
    torch.manual_seed(0)
    simulated, _ = mm.simulate(model, rows())
    assert torch.equal(simulated.lengths["w"], ends(simulated["w"][None])[0])
    assert torch.equal(simulated.lengths["x"], rows().lengths["x"])
    found = mm.log_marginal(model, guide, simulated, num_particles=5, seed=0)
    assert found.log_prob.isfinite().all()


def test_means_are_those_of_modalities_that_have_them():
    model, guide = pair()
    series = mm.models.SharedLatent(model.prior, {"x": model.decoders["x"]})
    mean = mm.generate(series, guide, rows().without("w"), mean=True, seed=0)
    torch.manual_seed(0)
    assert mean["x"].shape == (1, 12, STEPS, 3) and mean["x"].isfinite().all()
    with pytest.raises(ValueError, match="'w': TokenSequence has no mean that is known: take draws, mean=False"):
        mm.generate(model, guide, rows(), mean=True)
    both = mm.generate(model, guide, rows(), mean="x", seed=0)
    again = mm.generate(model, guide, rows(), mean=["x"], seed=0)
    assert not both["w"].is_floating_point() and torch.equal(both["w"], again["w"])
    assert torch.equal(both["x"], again["x"])
    with pytest.raises(ValueError, match="'nothing'"):
        mm.generate(model, guide, rows(), mean=["nothing"])


def test_classes_of_each_step_have_probabilities_up_to_the_length():
    decoder = conditionals.Categorical(mm.nn.RecurrentDecoder(2, STEPS, 4, 5), (STEPS,))
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), {"w": decoder})
    _, guide = pair()
    samples = mm.generate(model, guide, rows().only("w", "y"), 3, mean=True, seed=0)
    torch.testing.assert_close(samples["w"].sum(-1), torch.ones(3, 12, STEPS))


def test_a_classifier_that_asks_for_lengths_judges_sequences_up_to_their_end():
    """The class of a string is its length here, and that of a series whether it has a step."""
    model, guide = pair()
    batch = rows(missing=False)
    seen = []

    def by_length(values, lengths=None):
        seen.append((values, lengths))
        return torch.nn.functional.one_hot((lengths > 0).long(), 2).float()

    labels = (batch.lengths["x"] > 0).long()
    share = metrics.cross_modal_coherence(
        model, guide, batch, "x", "y", by_length, labels, num_samples=3, mean=False, seed=0
    )
    assert share.value == 1.0
    by_mean = metrics.cross_modal_coherence(model, guide, batch, "x", "y", by_length, labels, seed=0)
    assert by_mean.value == 1.0  # although the strings beside it have no mean
    assert torch.equal(seen[0][1], batch.lengths["x"].repeat(3)) and seen[0][0].shape == (36, STEPS, 3)


class Caption(nn.Module):
    """A string, and a vector that a network computes from it, up to its end."""

    def __init__(self):
        super().__init__()
        self.tokens = pair()[0].decoders["w"]
        self.encoder = mm.nn.Recurrent(4, 3, 8, vocabulary=VOCABULARY)

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            w = batch.observe("w", self.tokens, z)
            batch.observe("y", lambda f: dist.Normal(f, 1e-6).to_event(1), batch.features("w", self.encoder, w))


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_string_that_is_drawn_is_a_parent_up_to_its_own_end(vectorize):
    torch.manual_seed(0)
    model, (_, guide) = Caption(), pair()
    batch = mm.Batch(
        {"w": rows()["w"], "y": rows()["y"]}, {"w": rows().present["w"]}, lengths={"w": rows().lengths["w"]}
    )
    samples = mm.generate(model, guide, batch, 3, seed=0, vectorize=vectorize)
    present = batch.present["w"]
    with torch.no_grad():
        drawn = model.encoder(samples["w"], samples.lengths["w"])
        observed = model.encoder(batch["w"], batch.lengths["w"])
    torch.testing.assert_close(samples["y"][:, ~present], drawn[:, ~present], rtol=0, atol=1e-4)
    torch.testing.assert_close(samples["y"][:, present], observed[present].expand(3, -1, -1), rtol=0, atol=1e-4)
    assert (samples.lengths["w"][:, ~present] < STEPS).any()  # where reading on would show
