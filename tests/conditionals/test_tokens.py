"""Strings of tokens: probabilities sum to one over all strings, and what lies behind the end changes nothing."""

from itertools import product

import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.conditionals import Tokens
from pyro_mm.nn import AttentionTokens, RecurrentTokens

STEPS, VOCABULARY, END = 4, 3, 1
NETWORKS = {
    "recurrent": lambda: RecurrentTokens(2, VOCABULARY, 5, embedding=3),
    "LSTM": lambda: RecurrentTokens(2, VOCABULARY, 5, embedding=3, recurrence=nn.LSTM),
    "attention": lambda: AttentionTokens(2, VOCABULARY, 4, heads=2),
}
STRINGS = torch.tensor(list(product(range(VOCABULARY), repeat=STEPS)))


@pytest.fixture(params=NETWORKS)
def net(request):
    torch.manual_seed(1)
    net = NETWORKS[request.param]().double()
    nn.init.normal_(net.head.weight)  # far from the uniform distribution
    return net


def latent(*shape):
    return torch.randn(*shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def strings_with_end():
    """Every string that ends within 4 tokens, padded, and every one of 4 tokens that does not; with their lengths."""
    found = {}
    for string in map(tuple, STRINGS.tolist()):
        length = string.index(END) + 1 if END in string else STEPS
        found[string[:length]] = length
    padded = [[*string, *[END] * (STEPS - length)] for string, length in found.items()]
    return torch.tensor(padded), torch.tensor(list(found.values()))


def test_probabilities_of_all_strings_with_an_end_sum_to_one(net):
    strings, lengths = strings_with_end()
    assert len(strings) == 1 + 2 + 4 + 8 + 16
    z = latent(1, 1)
    for given in (None, lengths):
        d = Tokens(net, STEPS, END)(z.expand(1, len(strings), 2), lengths=given)
        torch.testing.assert_close(d.log_prob(strings).exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", range(STEPS + 1))
def test_probabilities_of_all_strings_of_one_length_sum_to_one(net, length):
    strings = torch.unique(STRINGS[:, :length], dim=0) if length else STRINGS[:1, :0]
    padded = torch.cat([strings, torch.zeros(len(strings), STEPS - length, dtype=torch.long)], -1)
    d = Tokens(net, STEPS)(latent(1).expand(len(strings), 2), lengths=torch.full((len(strings),), length))
    torch.testing.assert_close(d.log_prob(padded).exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-12)


def test_a_log_probability_is_the_sum_of_those_of_the_tokens(net):
    """Token by token by hand, on rows with particles to their left."""
    z, lengths = latent(2, 3), torch.tensor([4, 2, 0])
    x = STRINGS[[5, 40, 60]]
    found = Tokens(net, STEPS)(z, lengths=lengths).log_prob(x)
    for k in range(2):
        for n in range(3):
            each = [net(z[k, n], x[n, :t])[t].log_softmax(-1)[x[n, t]] for t in range(lengths[n])]
            torch.testing.assert_close(found[k, n], sum(each, torch.tensor(0.0).double()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("padding", [0, 2, -1, 10**6])
def test_padding_changes_neither_value_nor_gradient_of_a_string(net, end, padding):
    x, lengths = torch.tensor([[0, 2, 0, 2], [2, END, 0, 0], [0, 0, END, 2]]), torch.tensor([4, 2, 3])
    z = latent(5, 3).requires_grad_()

    def value_and_gradient(x):
        value = Tokens(net, STEPS, end)(z, lengths=lengths).log_prob(x)
        return [value, *torch.autograd.grad(value.sum(), [z, *net.parameters()])]

    other = torch.where(torch.arange(STEPS) < lengths[:, None], x, padding)
    for one, two in zip(value_and_gradient(other), value_and_gradient(x), strict=True):
        assert torch.equal(one, two) and one.isfinite().all()
    if end is not None and padding >= 0:  # the end token says the same as the lengths
        alone = Tokens(net, STEPS, end)(z).log_prob(other)
        assert torch.equal(alone, value_and_gradient(x)[0])


def test_what_is_no_string_has_probability_zero(net):
    d = Tokens(net, STEPS, END)
    goes_on, no_end, empty = [0, END, 2, END], [0, 2, 0, 0], [END, 0, 0, 0]
    lengths = torch.tensor([4, 2, 0])
    assert (d(latent(3), lengths=lengths).log_prob(torch.tensor([goes_on, no_end, empty])) == -torch.inf).all()


@pytest.mark.parametrize("end", [None, END])
def test_draws_have_the_probabilities_of_their_strings(net, end):
    """40,000 draws against 31 or 81 probabilities: |z| < 4.5 each fails at one seed in 1,800."""
    n = 40000
    torch.manual_seed(0)
    d = Tokens(net, STEPS, end)(latent(1))
    draws = d.sample((n,))[:, 0]
    strings = strings_with_end()[0] if end is not None else STRINGS
    p = d.log_prob(strings[:, None])[:, 0].exp().detach()
    counts = (draws[:, None] == strings).all(-1).double().mean(0)
    assert counts.sum() == 1
    assert ((counts - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_draws_stop_at_the_end_token_or_at_the_length(net):
    torch.manual_seed(0)
    d = Tokens(net, STEPS, END)(latent(3), lengths=torch.tensor([4, 1, 2]))
    draws = d.sample((50,))
    lengths = d.lengths_of(draws)
    assert draws.shape == (50, 3, STEPS) and set(lengths.unique().tolist()) == {1, 2, 3, 4}
    behind = torch.arange(STEPS) >= lengths[..., None]
    assert (draws[behind] == END).all()
    last = draws.gather(-1, lengths[..., None] - 1)[..., 0]
    assert ((last == END) | (lengths == STEPS)).all() and (draws[~behind] == END).sum() == (last == END).sum()

    d = Tokens(net, STEPS)(latent(3), lengths=torch.tensor([4, 0, 2]))
    draws = d.sample((50,))
    assert (d.lengths_of(draws) == torch.tensor([4, 0, 2])).all()
    assert not draws[:, 1].any() and not draws[:, 2, 2:].any() and draws[:, 2, :2].any()


class WithCovariate(nn.Module):
    """Logits of the next token, shifted by a covariate of the row; it has no way to go token by token."""

    def __init__(self):
        super().__init__()
        self.net = AttentionTokens(2, VOCABULARY, 4, heads=2)

    def forward(self, parents, tokens, covariates=None):
        shift = nn.functional.one_hot(covariates["u"], VOCABULARY)[:, None]
        return self.net(parents, tokens) + 9.0 * shift


def test_a_network_gets_covariates_and_draws_without_a_state():
    torch.manual_seed(0)
    decoder = Tokens(WithCovariate(), STEPS)
    batch = mm.Batch({"w": STRINGS[:3]}, lengths={"w": [4, 4, 3]}, covariates={"u": torch.tensor([0, 1, 2])})
    d = decoder(torch.zeros(3, 2), **batch.keywords("w", decoder))
    draws = d.sample((20,))
    assert torch.equal(d.lengths, batch.lengths["w"])
    assert (draws.mode(0).values == torch.tensor([[0] * 4, [1] * 4, [2, 2, 2, 0]])).all()


def test_several_parents_stand_side_by_side(net):
    z = latent(5, 3)
    whole = Tokens(net, STEPS)(z).log_prob(STRINGS[:3])
    parts = Tokens(net, STEPS)(z[..., :1], z[..., 1:]).log_prob(STRINGS[:3])
    assert torch.equal(whole, parts)


def test_sizes_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ValueError, match=r"logits of shape \(\.\., 4, V\) from the network of 3 tokens, .* got \(3, 3"):
        Tokens(lambda z, x: torch.zeros(*x.shape, VOCABULARY), STEPS)(latent(3)).log_prob(STRINGS[:3])
    with pytest.raises(ValueError, match="end token 9 is none of the 3 tokens"):
        Tokens(RecurrentTokens(2, VOCABULARY).double(), STEPS, 9)(latent(3)).log_prob(STRINGS[:3])


class Peeking(nn.Module):
    """Logits of the next token from that token itself."""

    def forward(self, parents, tokens):
        ahead = nn.functional.pad(tokens, (0, 1))
        return nn.functional.one_hot(ahead, VOCABULARY) * 5.0 + parents[..., :1, None]


def test_a_network_that_reads_ahead_is_found(net):
    assert not Tokens(net, STEPS)(latent(3)).reads_ahead()
    assert Tokens(Peeking(), STEPS)(latent(3)).reads_ahead()
