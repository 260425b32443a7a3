"""Encoders and decoders of sequences: what lies behind the end changes nothing, and a decoder of tokens is causal."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mm import conditionals
from pyro_mm.nn import Attention, AttentionTokens, Recurrent, RecurrentDecoder, RecurrentTokens, TemporalConvolutional

STEPS = 6
LENGTHS = torch.tensor([6, 1, 3, 0])
ENCODERS = {
    "GRU": lambda f, **k: Recurrent(f, 5, 8, **k),
    "two LSTM layers": lambda f, **k: Recurrent(f, 5, 8, recurrence=nn.LSTM, layers=2, **k),
    "convolutions": lambda f, **k: TemporalConvolutional(f, 5, (8, 7), **k),
    "attention": lambda f, **k: Attention(f, 5, 8, heads=2, layers=2, **k),
}
TOKENS = {
    "GRU": lambda: RecurrentTokens(2, 4, 8, embedding=3),
    "two LSTM layers": lambda: RecurrentTokens(2, 4, 8, embedding=3, recurrence=nn.LSTM, layers=2),
    "attention": lambda: AttentionTokens(2, 4, 8, heads=2),
}


@pytest.fixture(params=ENCODERS)
def make(request):
    torch.manual_seed(0)
    return ENCODERS[request.param]


@pytest.fixture(params=TOKENS)
def tokens_net(request):
    torch.manual_seed(0)
    return TOKENS[request.param]().double()


def gradients(net, x, lengths):
    return torch.autograd.grad(net(x, lengths).sin().sum(), list(net.parameters()))


@pytest.mark.parametrize("evaluation", [False, True])  # torch has a path of its own for attention without gradients
def test_a_padded_sequence_is_encoded_as_the_one_cut_to_its_length(make, evaluation):
    net = make(3).double().train(not evaluation)
    x = torch.randn(2, 4, STEPS, 3, dtype=torch.float64)
    with torch.set_grad_enabled(not evaluation):
        out = net(x, LENGTHS)
        assert out.shape == (2, 4, 5)
        for n, length in enumerate(LENGTHS.tolist()):
            alone = net(x[:, n, :length]) if length else net.head.bias.expand(2, 5)
            torch.testing.assert_close(out[:, n], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(net(x, torch.tensor(STEPS)), net(x), rtol=1e-10, atol=1e-10)
        assert net(x[0, 0]).shape == (5,)


@pytest.mark.parametrize("padding", [100.0, torch.inf, torch.nan])
def test_padding_changes_neither_code_nor_gradient(make, padding):
    net = make(3).double()
    x = torch.randn(2, 4, STEPS, 3, dtype=torch.float64)
    other = torch.where((torch.arange(STEPS) < LENGTHS[:, None])[..., None], x, padding)
    assert torch.equal(net(other, LENGTHS), net(x, LENGTHS))
    for one, two in zip(gradients(net, other, LENGTHS), gradients(net, x, LENGTHS), strict=True):
        assert torch.equal(one, two) and one.isfinite().all()


def test_strings_of_tokens_are_embedded_up_to_their_end(make):
    net = make(3, vocabulary=4).double()
    x = torch.randint(4, (2, 4, STEPS))
    out = net(x, LENGTHS)
    assert torch.equal(net(torch.where(torch.arange(STEPS) < LENGTHS[:, None], x, -1), LENGTHS), out)
    torch.testing.assert_close(out[:, 2], net(x[:, 2, :3]), rtol=1e-10, atol=1e-10)
    assert (net(x[:, :1] * 0, LENGTHS[:1]) != net(x[:, :1] * 0 + 1, LENGTHS[:1])).any()


def test_an_encoder_sees_every_valid_step(make):
    net = make(3).double()
    x = torch.randn(4, STEPS, 3, dtype=torch.float64, requires_grad=True)
    net(x, LENGTHS).square().sum().backward()
    assert torch.equal(x.grad.any(-1), torch.arange(STEPS) < LENGTHS[:, None])


def test_an_encoder_is_traced_with_lengths_as_an_input(make):
    net = make(3)
    x = torch.randn(4, STEPS, 3)
    traced = make_fx(lambda x, lengths: net(x, lengths))(x, LENGTHS)
    torch.testing.assert_close(traced(x, LENGTHS.flip(0)), net(x, LENGTHS.flip(0)))


def test_arguments_of_sequence_networks_are_refused_in_words():
    with pytest.raises(ValueError, match="odd number of steps, got 4"):
        TemporalConvolutional(3, 5, kernel=4)
    with pytest.raises(ValueError, match="one layer at least, got none"):
        TemporalConvolutional(3, 5, ())
    with pytest.raises(ValueError, match="even width that 3 heads divide, got 8"):
        Attention(3, 5, 8, heads=3)
    with pytest.raises(TypeError, match=r"nn\.GRU, nn\.LSTM or nn\.RNN itself, got 'gru'"):
        Recurrent(3, 5, recurrence="gru")


@pytest.mark.parametrize("recurrence", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_decoder_takes_leading_dimensions(recurrence):
    net = RecurrentDecoder(2, STEPS, 3, 8, recurrence=recurrence, layers=2).double()
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    out = net(z)
    assert out.shape == (5, 4, STEPS, 3)
    torch.testing.assert_close(out[2, 1], net(z[2, 1]), rtol=1e-10, atol=1e-10)
    assert (out[0, 0] != out[0, 1]).any() and (out[0, 0, 0] != out[0, 0, 1]).any()


def test_parameters_of_a_step_stand_side_by_side():
    """An output (.., T, 2 D) is read as location and scale of each step; a flat one, and (.., 2 T, D), as before."""
    net = RecurrentDecoder(2, STEPS, 6)
    z = torch.randn(5, 4, 2)
    d = conditionals.Normal(net, (STEPS, 3))(z)
    assert d.batch_shape == (5, 4) and d.event_shape == (STEPS, 3)
    assert torch.equal(d.base_dist.loc, net(z)[..., :3])
    flat = conditionals.Normal(nn.Sequential(net, nn.Flatten(-2)), (STEPS, 3))(z)
    assert torch.equal(flat.base_dist.loc, net(z).flatten(-2)[..., : 3 * STEPS].unflatten(-1, (STEPS, 3)))
    one_step = conditionals.Normal(nn.Linear(2, 6), (1, 3))(z[:, :1])  # a batch of one row, and not a step
    assert one_step.batch_shape == (5, 1)


# -- decoders of tokens --------------------------------------------------------------------------------------------


def test_a_token_is_predicted_from_those_before_it_alone(tokens_net):
    z, x = torch.randn(4, 2, dtype=torch.float64), torch.randint(4, (4, 5))
    whole = tokens_net(z, x)
    assert whole.shape == (4, 6, 4)
    for t in range(5):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 4
        other = tokens_net(z, changed)
        torch.testing.assert_close(other[:, : t + 1], whole[:, : t + 1], rtol=1e-12, atol=1e-12)
        assert (other[:, t + 1 :] != whole[:, t + 1 :]).any(-1).all()
        torch.testing.assert_close(tokens_net(z, x[:, :t]), whole[:, : t + 1], rtol=1e-10, atol=1e-10)
    assert (tokens_net(z + 1, x) != whole).any(-1).all()


def test_particles_stand_to_the_left_of_the_rows_of_tokens(tokens_net):
    z, x = torch.randn(3, 1, 4, 2, dtype=torch.float64), torch.randint(4, (4, 5))
    whole = tokens_net(z, x)
    assert whole.shape == (3, 1, 4, 6, 4)
    torch.testing.assert_close(whole[1, 0, 2], tokens_net(z[1, 0, 2], x[2]), rtol=1e-10, atol=1e-10)
    traced = make_fx(lambda z, x: tokens_net(z, x))(z, x)
    torch.testing.assert_close(traced(z + 1, x), tokens_net(z + 1, x))


@pytest.mark.parametrize("net", ["GRU", "two LSTM layers"])
def test_token_by_token_is_all_at_once(net):
    torch.manual_seed(0)
    net = TOKENS[net]().double()
    z, x = torch.randn(3, 4, 2, dtype=torch.float64), torch.randint(4, (3, 4, 5))
    state, found = None, []
    for t in range(6):
        logits, state = net.next_logits(z, x[..., :t], state)
        found.append(logits)
    torch.testing.assert_close(torch.stack(found, -2), net(z, x), rtol=1e-10, atol=1e-10)
