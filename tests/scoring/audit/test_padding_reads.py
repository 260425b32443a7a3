"""Networks that read what stands behind the end of a sequence, or tokens ahead, are refused; others are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import conditionals
from tests.support.sequences import STEPS, VOCABULARY, pair, rows

PRIOR = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def test_a_pair_that_reads_no_padding_passes():
    mm.log_marginal(*pair(), rows(), num_particles=2, seed=0)


class Careless(nn.Module):
    """An encoder that has lengths, and a use for them, and forgets to mask."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, x, lengths):
        return self.net(x.sum(-2)) / (lengths[:, None] + 1)


ENCODERS = {
    "no lengths": lambda: mm.nn.MLP(3 * STEPS, 4, ()),
    "lengths without a mask": Careless,
    "attention behind one that mixes steps": lambda: nn.Sequential(
        nn.Flatten(-2), nn.Linear(3 * STEPS, 3 * STEPS), nn.Unflatten(-1, (STEPS, 3)), mm.nn.Attention(3, 4, 8)
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_that_reads_padding_is_refused(name):
    torch.manual_seed(0)
    model, guide = pair()
    guide.posteriors["z"].experts["x"] = conditionals.Normal(ENCODERS[name]())
    for evaluate in (
        lambda: mm.log_marginal(model, guide, rows(), num_particles=2),
        lambda: mm.encode(guide, rows()),
        lambda: mm.fit(model, guide, mm.objectives.elbo(), rows(), epochs=1, progress=False),
    ):
        with pytest.raises(ValueError, match="x: the guide reads what stands behind the end of its sequences"):
            evaluate()
    whole = rows()[rows().lengths["x"] == STEPS]
    mm.log_marginal(model, guide, whole, num_particles=2)  # nothing is padded
    with pytest.raises(ValueError, match="x: the guide reads"):
        mm.log_marginal(model, guide, rows(), num_particles=2)  # and the audit of those does not serve for these
    mm.log_marginal(model, guide, rows(), num_particles=2, audit=False)


def test_a_story_that_reads_padding_is_refused():
    class Story(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = conditionals.Normal(mm.nn.RecurrentDecoder(2, STEPS, 6, 5), (STEPS, 3))

        def forward(self, batch):
            with batch.plate():
                z = pyro.sample("z", PRIOR)
                pyro.sample("x", self.decoder(z), obs=batch["x"])

    torch.manual_seed(0)
    _, guide = pair()
    with pytest.raises(ValueError, match=r"x: the story reads what stands behind .* Use batch\.observe"):
        mm.log_marginal(Story(), guide, rows().only("x"), num_particles=2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sequences_of_one_value_do_not_disturb_the_audit(value):
    batch = mm.Batch({"x": torch.full((5, STEPS, 3), value)}, lengths={"x": [0, 1, 2, 3, STEPS]})
    mm.encode(pair()[1], batch)


# -- strings -------------------------------------------------------------------------------------------------------


class Peeking(nn.Module):
    """Attention without a causal mask."""

    def __init__(self):
        super().__init__()
        self.net = mm.nn.AttentionTokens(2, VOCABULARY, 8, heads=2)

    def forward(self, parents, tokens):
        first = self.net.start(parents)[..., None, :]
        embedded = self.net.embedding(tokens).expand(*first.shape[:-2], -1, -1)
        x = torch.cat([first, embedded], -2)
        return self.net.head(self.net.layers(x.flatten(0, -3))).reshape(*x.shape[:-1], -1)


def test_a_network_that_reads_tokens_ahead_is_refused():
    torch.manual_seed(0)
    model, guide = pair()
    model.decoders["w"] = conditionals.Tokens(Peeking(), STEPS, 0)
    with pytest.raises(ValueError, match="w: the network of its tokens predicts a token from that token or a later"):
        mm.log_marginal(model, guide, rows(), num_particles=2)


def test_tokens_that_make_no_string_are_refused_by_row():
    model, guide = pair()
    batch = rows()
    tokens, lengths = batch["w"].clone(), batch.lengths["w"]
    there = batch.present["w"].nonzero()[:, 0]
    late, early = [int(n) for n in there if lengths[n] < STEPS and lengths[n] > 1][:2]
    tokens[late, lengths[late] - 1 :] = 2  # does not end
    tokens[early, 0] = 0  # goes on behind its end
    wrong = mm.Batch({n: batch[n] for n in "xy"} | {"w": tokens}, batch.present, lengths=batch.lengths)
    first, second = sorted((late, early))
    with pytest.raises(ValueError, match=rf"strings end with the token 0.* 2 of 12 rows \({first}, {second}\)"):
        mm.log_marginal(model, guide, wrong, num_particles=2)
    found = mm.log_marginal(model, guide, wrong.only("w"), num_particles=2, seed=0, audit=False).log_prob
    assert (found[[late, early]] == -torch.inf).all()

    guide.posteriors["z"].experts["w"].net.embedding = nn.Embedding(9, 4)  # which would complain first
    beyond = mm.Batch({"w": torch.where(batch["w"] == 2, VOCABULARY, batch["w"])}, lengths={"w": lengths})
    with pytest.raises(ValueError, match="w: TokenSequence scores whole numbers from 0 to 3"):
        mm.log_marginal(model, guide, beyond, num_particles=2)
