"""Pools of Gaussian experts against dense linear algebra, numerical integrals and deletion."""

import math
from itertools import permutations

import pytest
import torch
from pyro.distributions import Normal

from pyro_mm.distributions.gaussian_experts import consensus_of_normals, pairwise_pool, product_of_normals

F64 = {"dtype": torch.float64}
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def experts(count, *shape):
    return [torch.randn(shape, **F64) for _ in range(count)], [torch.rand(shape, **F64) + 0.5 for _ in range(count)]


def some_masks(count, rows):
    """Boolean masks such that every number of experts from none to all is there."""
    masks = torch.rand(count, rows) < 0.6
    masks[:, 0], masks[:, 1], masks[1:, 2] = True, False, False
    return list(masks)


# ---------------------------------------------------------------- consensus_of_normals


@pytest.mark.parametrize("correlation", [-0.3, 0.0, 0.4, 0.95])
def test_consensus_is_that_of_a_dense_solve(correlation):
    locs, scales = experts(4, 7, 3)
    masks = some_masks(4, 7)
    found = consensus_of_normals(locs, scales, masks, correlation)
    for row in range(7):
        kept = [i for i in range(4) if masks[i][row]]
        for d in range(3):
            if not kept:
                assert (found.loc[row, d], found.scale[row, d]) == (0, 1)
                continue
            mu = torch.stack([locs[i][row, d] for i in kept])
            s = torch.stack([scales[i][row, d] for i in kept])
            n = len(kept)
            cov = torch.outer(s, s) * (correlation + (1 - correlation) * torch.eye(n, **F64))
            one = torch.ones(n, **F64)
            precision = one @ torch.linalg.solve(cov, one)
            torch.testing.assert_close(found.scale[row, d] ** -2, precision, **EXACT)
            torch.testing.assert_close(found.loc[row, d], one @ torch.linalg.solve(cov, mu) / precision, **EXACT)


def test_masking_equals_deleting_to_the_last_bit():
    locs, scales = experts(4, 7, 3)
    masks = some_masks(4, 7)
    for i in range(4):
        locs[i][~masks[i]], scales[i][~masks[i]] = math.nan, math.nan
    found = consensus_of_normals(locs, scales, masks, 0.4)
    for row in range(7):
        if kept := [i for i in range(4) if masks[i][row]]:
            alone = consensus_of_normals([locs[i][row] for i in kept], [scales[i][row] for i in kept], None, 0.4)
            assert torch.equal(found.loc[row], alone.loc) and torch.equal(found.scale[row], alone.scale)


def test_gradients_of_what_is_masked_are_zero_and_of_the_rest_those_of_the_deleted():
    locs, scales = experts(3, 5, 2)
    masks = [torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 0, 0]).bool(), False]
    leaves = [x.requires_grad_() for x in (*locs, *scales)]
    found = consensus_of_normals(locs, scales, masks, 0.5)
    gradients = torch.autograd.grad((found.loc.sin() + found.scale).sum(), leaves, allow_unused=True)
    rows = [[0, 1], [0], [1]]
    by_hand = 0.0
    for row, kept in enumerate(rows):
        d = consensus_of_normals([locs[i][row] for i in kept], [scales[i][row] for i in kept], None, 0.5)
        by_hand = by_hand + (d.loc.sin() + d.scale).sum()
    expected = torch.autograd.grad(by_hand, leaves, allow_unused=True)
    assert gradients[2] is gradients[5] is None
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(gradients[i], expected[i], **EXACT)


def test_without_correlation_it_is_the_product():
    locs, scales = experts(3, 6, 2)
    masks = some_masks(3, 6)
    a, b = consensus_of_normals(locs, scales, masks), product_of_normals(locs, scales, masks, prior=None)
    torch.testing.assert_close((a.loc, a.scale), (b.loc, b.scale), **EXACT)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_alike_experts_narrow_each_other_less_the_more_they_depend(correlation):
    """n of them: variance s^2 (1 + (n - 1) rho) / n."""
    loc, scale = torch.randn(3, **F64), torch.rand(3, **F64) + 0.5
    for n in (1, 2, 5):
        d = consensus_of_normals([loc] * n, [scale] * n, None, correlation)
        torch.testing.assert_close(d.loc, loc, **EXACT)
        torch.testing.assert_close(d.variance, scale**2 * (1 + (n - 1) * correlation) / n, **EXACT)


def test_a_mask_that_is_false_never_touches_its_expert():
    locs, scales = experts(2, 4, 3)
    some = consensus_of_normals([locs[0], None, locs[1]], [scales[0], None, scales[1]], [True, False, True], 0.3)
    assert torch.equal(some.loc, consensus_of_normals(locs, scales, None, 0.3).loc)
    nothing = consensus_of_normals(locs, scales, [False, False], 0.3)
    assert torch.equal(nothing.loc, torch.zeros(4, 3, **F64)) and torch.equal(nothing.scale, torch.ones(4, 3, **F64))


def test_masks_broadcast_against_the_batch():
    locs, scales = experts(2, 5, 3)
    masks = [torch.rand(4, 1, 5) < 0.5, torch.rand(5) < 0.5]
    found = consensus_of_normals(locs, scales, masks, 0.3)
    assert found.batch_shape == (4, 1, 5, 3)
    for t in range(4):
        assert torch.equal(found.loc[t, 0], consensus_of_normals(locs, scales, [masks[0][t, 0], masks[1]], 0.3).loc)


@pytest.mark.parametrize("correlation", [1.0, -0.5, -0.9])
def test_a_correlation_that_no_three_variables_have_is_refused(correlation):
    with pytest.raises(ValueError, match=r"> -0.5 and < 1"):
        consensus_of_normals(*experts(3, 2), None, correlation)


# ---------------------------------------------------------------- pairwise_pool


def density(pool, z):
    loc, scale, log_weights = pool
    log_p = Normal(loc, scale, validate_args=False).log_prob(z.unsqueeze(-2)).sum(-1)
    return (log_weights.log_softmax(-1) + log_p).logsumexp(-1).exp()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_pool_is_the_normalised_square_of_the_mean_root(dims, count):
    locs, scales = experts(count, dims)
    axis = torch.linspace(-12, 12, 321, **F64)
    grid = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij"), -1)
    step = (axis[1] - axis[0]) ** dims
    root = sum(Normal(m, s).log_prob(grid).sum(-1).div(2).exp() for m, s in zip(locs, scales, strict=True)) / count
    expected = root.square() / (root.square().sum() * step)
    found = density(pairwise_pool(locs, scales), grid)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert float(found.sum() * step) == pytest.approx(1, abs=1e-9)


def test_masking_equals_deleting_and_order_does_not_matter():
    locs, scales = experts(3, 7, 2)
    masks, z = some_masks(3, 7), torch.randn(7, 2, **F64)
    found = density(pairwise_pool(locs, scales, masks), z)
    for order in permutations(range(3)):
        again = density(pairwise_pool(*([x[i] for i in order] for x in (locs, scales, masks))), z)
        some = [row for row in range(7) if any(m[row] for m in masks)]
        torch.testing.assert_close(again[some], found[some], **EXACT)
    for row in range(7):
        if kept := [i for i in range(3) if masks[i][row]]:
            alone = pairwise_pool([locs[i][row] for i in kept], [scales[i][row] for i in kept])
            torch.testing.assert_close(density(alone, z[row]), found[row], **EXACT)


def test_whatever_lies_under_a_mask_reaches_neither_value_nor_gradient():
    locs, scales = experts(2, 3, 2)
    mask = torch.tensor([True, False, True])
    leaves = [x.requires_grad_() for x in (*locs, *scales)]
    with torch.no_grad():
        locs[1][1], scales[1][1] = math.nan, math.nan
    loc, scale, log_weights = pairwise_pool(locs, scales, [True, mask])
    assert log_weights.isneginf().tolist() == [[False] * 3, [False, True, True], [False] * 3]
    (log_weights.exp()[..., None] * (loc + scale)).sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves) and leaves[1].grad[1].count_nonzero() == 0
    assert pairwise_pool(locs, scales, [True, False])[2].isneginf().tolist() == [[False, True, True]] * 3


def test_experts_that_agree_are_pooled_to_themselves_and_distant_ones_to_their_mixture():
    loc, scale = torch.zeros(2, **F64), torch.ones(2, **F64)
    z = torch.randn(5, 2, **F64)
    both = density(pairwise_pool([loc, loc], [scale, scale]), z)
    torch.testing.assert_close(both, Normal(loc, scale).log_prob(z).sum(-1).exp(), **EXACT)
    weights = pairwise_pool([loc, loc + 40], [scale, scale])[2].softmax(-1)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0], **F64), rtol=0, atol=1e-12)


def test_weights_have_the_gradient_of_the_overlap():
    locs, scales = experts(3, 4, 2)
    f = lambda *x: pairwise_pool(x[:3], x[3:])  # noqa: E731
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (*locs, *scales)])


def test_a_pool_needs_experts_and_equally_many_of_each():
    locs, scales = experts(2, 3)
    for pool in (pairwise_pool, consensus_of_normals):
        with pytest.raises(ValueError, match="got 2, 1 and 2"):
            pool(locs, scales[:1])
        with pytest.raises(ValueError, match="got 0, 0 and 0"):
            pool([], [])
