"""Shapes, types and leading dimensions of the networks."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mm.nn import MLP, Blocks, Convolutional, Deconvolutional, Recurrent
from pyro_mm.nn.images import BLOCK_ROWS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_mlp_is_the_composition_of_its_layers():
    net = MLP(6, 4, hidden=(8,), activation=nn.Tanh).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    first, _, last = net.layers
    by_hand = (x @ first.weight.T + first.bias).tanh() @ last.weight.T + last.bias
    torch.testing.assert_close(net(x), by_hand, rtol=1e-12, atol=1e-12)
    assert len(MLP(6, 4, hidden=()).layers) == 1


@pytest.mark.parametrize("event", [(64,), (8, 8), (4, 4, 4), (1, 64), (64, 1)])
@pytest.mark.parametrize("lead", [(), (5,), (3, 1, 5)])
def test_mlp_flattens_an_event_of_any_shape(event, lead):
    net = MLP(64, 7, hidden=(9,))
    x = torch.randn(*lead, *event)
    # The shortest run is the event: a dimension of 1 before it is a leading one.
    lead = (*lead, 1) if event == (1, 64) else lead
    torch.testing.assert_close(net(x), net(x.reshape(*lead, 64)))
    assert net(x).shape == (*lead, 7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.float64, torch.bfloat16])
def test_mlp_casts_its_input(dtype):
    net, x = MLP(4, 2), torch.eye(4)
    assert torch.equal(net(x.to(dtype)), net(x))


def test_mlp_names_the_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"64 entries, got shape \(5, 63\)"):
        MLP(64, 2)(torch.zeros(5, 63))


SHAPES = [(28, 28), (1, 28, 28), (3, 8, 8), (3, 32, 32), (64, 64), (14, 14), (2, 9, 31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (2,), (3, 1, 2), (0,)])
def test_images_go_in_and_come_out(shape, lead):
    encoder, decoder = Convolutional(shape, 5, channels=(4, 6)), Deconvolutional(5, shape, channels=(6, 4))
    assert encoder(torch.randn(*lead, *shape)).shape == (*lead, 5)
    assert decoder(torch.randn(*lead, 5)).shape == (*lead, *shape)


def test_leading_dimensions_are_rows():
    encoder, decoder = Convolutional((14, 14), 5).double(), Deconvolutional(5, (3, 14, 14)).double()
    for net, event in ((encoder, (14, 14)), (decoder, (5,))):
        x = torch.randn(2, 3, *event, dtype=torch.float64)
        by_row = torch.stack([torch.stack([net(x[i, j]) for j in range(3)]) for i in range(2)])
        torch.testing.assert_close(net(x), by_row, rtol=1e-10, atol=1e-10)


def test_every_pixel_depends_on_the_code_and_the_code_on_every_pixel():
    image = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    Convolutional((9, 13), 5, channels=(4, 4), activation=nn.Tanh).double()(image).sum().backward()
    # Halving drops the last row and column of an odd size, but the padding of the kernel still sees them.
    assert image.grad.count_nonzero() == 9 * 13
    decoder = Deconvolutional(5, (9, 13), channels=(4, 4), activation=nn.Tanh).double()
    pair = decoder(torch.randn(2, 5, dtype=torch.float64))
    assert (pair[0] != pair[1]).all()


def test_image_networks_name_the_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(28, 28\), got shape \(5, 28, 27\)"):
        Convolutional((28, 28), 5)(torch.zeros(5, 28, 27))
    with pytest.raises(ValueError, match=r"\(1, 28, 28\), got shape \(28, 28\)"):
        Convolutional((1, 28, 28), 5)(torch.zeros(28, 28))
    with pytest.raises(ValueError, match=r"\(\.\.\., 5\), got \(4, 6\)"):
        Deconvolutional(5, (28, 28))(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="3 x 28 cannot be halved 2 times"):
        Deconvolutional(5, (3, 28))
    with pytest.raises(ValueError, match="image shape"):
        Convolutional((28,), 5)


def test_recurrent_ignores_the_steps_beyond_the_length():
    net = Recurrent(3, 5, hidden=8).double()
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 3, 0])
    out = net(x, lengths)
    assert out.shape == (2, 4, 5)
    for n, length in enumerate(lengths.tolist()):
        alone = net(x[:, n, :length]) if length else net.head.bias.expand(2, 5)
        torch.testing.assert_close(out[:, n], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(x, torch.tensor(6)), net(x), rtol=1e-12, atol=1e-12)
    changed = x.clone()
    changed[:, 2, 3:] = 100.0
    assert torch.equal(net(changed, lengths), out)
    changed[:, 2, 3:] = torch.inf
    parameters = list(net.parameters())
    expected = torch.autograd.grad(net(x, lengths).sum(), parameters)
    found = torch.autograd.grad(net(changed, lengths).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert net(x[0, 0]).shape == (5,)


@pytest.mark.parametrize(
    ("net", "shape"),
    [(MLP(6, 2), (5, 2, 3)), (Convolutional((8, 8), 2), (5, 8, 8)), (Deconvolutional(3, (8, 8)), (5, 3))],
)
def test_networks_trace(net, shape):
    traced = make_fx(net)(torch.zeros(shape))
    x = torch.randn(shape)
    torch.testing.assert_close(traced(x), net(x))


# -- in blocks of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_a_network_in_blocks_is_the_network(rows):
    """Values and gradients, of its weights and of its input; and no block is larger than asked for."""
    net, seen = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(-1, (2, 2))).double(), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 2, 2, 2, dtype=torch.float64)
    results = []
    for whole in (Blocks(net, rows), lambda x: net(x.flatten(0, 1)).unflatten(0, (5, 2))):
        seen.clear()
        y = whole(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), (x, *net.parameters()))))
        if isinstance(whole, Blocks):
            assert max(seen) <= rows and sum(seen) == 10
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_images_are_rows_of_an_event_of_their_own():
    net = nn.Conv2d(3, 2, 3)
    x = torch.randn(4, 5, 3, 6, 6)
    torch.testing.assert_close(Blocks(net, 3, event_dim=3)(x), net(x.flatten(0, 1)).unflatten(0, (4, 5)))


@pytest.mark.parametrize("net", [Convolutional((8, 8), 5), Deconvolutional(5, (8, 8))])
def test_convolutions_take_many_images_in_blocks(net):
    x = torch.randn(2 * BLOCK_ROWS + 3, *((8, 8) if isinstance(net, Convolutional) else (5,)))
    each = torch.cat([net(part) for part in x.split(100)])
    seen = []
    hook = net.layers.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(net(x), each)
    hook.remove()
    assert seen == [BLOCK_ROWS, BLOCK_ROWS, 3]
