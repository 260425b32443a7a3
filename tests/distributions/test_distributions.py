"""Products, mixtures, choices and restrictions against brute force, deletion and torch's distributions."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mm.distributions import STANDARD_NORMAL, Mixture, product_of_normals
from pyro_mm.distributions.base import diagonal
from pyro_mm.distributions.scatter import Scatter
from pyro_mm.distributions.where import Where

F64 = {"dtype": torch.float64}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
INF = math.inf


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, event=1):
    d = dist.Normal(torch.randn(shape, **F64), torch.rand(shape, **F64) + 0.5, validate_args=False)
    return d.to_event(event)


def laplace(*shape, event=1):
    d = dist.Laplace(torch.randn(shape, **F64), torch.rand(shape, **F64) + 0.5, validate_args=False)
    return d.to_event(event)


def experts(count, *shape):
    return [torch.randn(shape, **F64) for _ in range(count)], [torch.rand(shape, **F64) + 0.5 for _ in range(count)]


# ---------------------------------------------------------------- product_of_normals


@pytest.mark.parametrize("prior", [None, STANDARD_NORMAL, dist.Normal(*torch.tensor([0.3, 2.0], **F64))])
def test_product_is_the_normalised_product_on_a_grid(prior):
    locs, scales = experts(3, 2)
    product = product_of_normals(locs, scales, prior=prior)
    z = torch.linspace(-12, 12, 4001, **F64)[:, None]
    log_p = sum(dist.Normal(m, s).log_prob(z) for m, s in zip(locs, scales, strict=True))
    if prior is not None:
        log_p = log_p + prior.log_prob(z)
    log_p = log_p - (log_p.logsumexp(0) + math.log(24 / 4000))
    torch.testing.assert_close(product.log_prob(z), log_p, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("prior", [None, STANDARD_NORMAL])
def test_masking_an_expert_equals_deleting_it_to_the_last_bit(prior):
    locs, scales = experts(4, 5, 3)
    masks = [torch.rand(5) < 0.5 for _ in range(4)]
    masks[0][:] = True
    locs[1], scales[2] = locs[1].clone(), scales[2].clone()
    locs[1][~masks[1]], scales[2][~masks[2]] = math.nan, math.nan
    product = product_of_normals(locs, scales, masks, prior)
    for n in range(5):
        kept = [i for i in range(4) if masks[i][n]]
        alone = product_of_normals([locs[i][n] for i in kept], [scales[i][n] for i in kept], prior=prior)
        assert torch.equal(product.loc[n], alone.loc)
        assert torch.equal(product.scale[n], alone.scale)


def test_a_false_mask_never_touches_the_expert():
    locs, scales = experts(2, 5, 3)
    both = product_of_normals([locs[0], None], [scales[0], None], [True, False])
    assert torch.equal(both.loc, product_of_normals(locs[:1], scales[:1]).loc)


def test_a_product_of_one_expert_without_a_prior_is_that_expert():
    (loc,), (scale,) = experts(1, 5, 3)
    product = product_of_normals([loc], [scale], prior=None)
    torch.testing.assert_close((product.loc, product.scale), (loc, scale), **EXACT)


def test_masks_broadcast_against_the_batch():
    locs, scales = experts(2, 5, 3)
    masks = [torch.rand(4, 1, 5) < 0.5, torch.rand(5) < 0.5]
    product = product_of_normals(locs, scales, masks)
    assert product.batch_shape == (4, 1, 5, 3)
    for t in range(4):
        row = product_of_normals(locs, scales, [masks[0][t, 0], masks[1]])
        assert torch.equal(product.loc[t, 0], row.loc)


@pytest.mark.parametrize("masks", [[False, False], [torch.zeros(5, dtype=torch.bool), False]])
@pytest.mark.parametrize("prior", [None, STANDARD_NORMAL])
def test_a_product_of_nothing_is_standard_normal_with_finite_gradients(masks, prior):
    locs, scales = experts(2, 5, 3)
    for x in (*locs, *scales):
        x.requires_grad_()
    product = product_of_normals(locs, scales, masks, prior)
    assert product.loc.dtype == torch.float64
    assert torch.equal(product.loc, torch.zeros(5, 3, **F64)) and torch.equal(product.scale, torch.ones(5, 3, **F64))
    if product.loc.requires_grad:
        (product.rsample() ** 2 + product.scale.log()).sum().backward()
        assert all(x.grad.count_nonzero() == 0 for x in (locs[0], scales[0]))


def test_gradients_of_a_masked_product_equal_those_of_the_deleted_one():
    locs, scales = experts(2, 5, 3)
    mask = torch.tensor([True, False, True, False, False])
    leaves = [x.requires_grad_() for x in (*locs, *scales)]
    product = product_of_normals(locs, scales, [True, mask], prior=None)
    masked = torch.autograd.grad((product.loc.sin() + product.scale).sum(), leaves)
    both = product_of_normals([x[mask] for x in locs], [x[mask] for x in scales], prior=None)
    first = product_of_normals([locs[0][~mask]], [scales[0][~mask]], prior=None)
    deleted = torch.autograd.grad(sum((d.loc.sin() + d.scale).sum() for d in (both, first)), leaves)
    torch.testing.assert_close(masked, deleted, **EXACT)


def test_a_product_needs_experts_and_equally_many_of_each():
    locs, scales = experts(2, 3)
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        product_of_normals(locs, scales[:1])
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        product_of_normals([], [])


# ---------------------------------------------------------------- Mixture

WEIGHTS = torch.tensor([[0.2, -INF, 1.0, 0.4], [-INF, 0.3, -INF, -INF], [0.1, 0.2, 0.3, 0.4]], **F64)


@pytest.mark.parametrize("components", [normal(3, 4, 2), laplace(3, 4, 2)])
def test_mixture_is_torchs_without_the_masked_components(components):
    mixture = Mixture(components, WEIGHTS)
    assert mixture.batch_shape == (3,) and mixture.event_shape == (2,)
    z = torch.randn(7, 3, 2, **F64)
    loc, scale = diagonal(components)
    for n in range(3):
        keep = WEIGHTS[n] > -INF
        family = type(components.base_dist)(loc[n, keep], scale[n, keep]).to_event(1)
        oracle = dist.MixtureSameFamily(dist.Categorical(logits=WEIGHTS[n, keep]), family)
        torch.testing.assert_close(mixture.log_prob(z)[:, n], oracle.log_prob(z[:, n]), **EXACT)
        torch.testing.assert_close(mixture.mean[n], oracle.mean, **EXACT)
        torch.testing.assert_close(mixture.variance[n], oracle.variance, **EXACT)


@pytest.mark.parametrize(("family", "error"), [(normal, 1e-10), (laplace, 1e-4)])
def test_mixture_integrates_to_one(family, error):
    mixture = Mixture(family(3, 4, 1), WEIGHTS)
    z = torch.linspace(-40, 40, 40001, **F64)
    total = mixture.log_prob(z[:, None, None].expand(-1, 3, 1)).exp().sum(0) * (80 / 40000)
    torch.testing.assert_close(total, torch.ones(3, **F64), rtol=0, atol=error)


def test_a_row_without_components_has_equal_weights_and_finite_gradients():
    logits = torch.tensor([[-INF, -INF], [0.0, -INF]], **F64).requires_grad_()
    loc = torch.randn(2, 2, 3, **F64).requires_grad_()
    mixture = Mixture(dist.Normal(loc, 1.0).to_event(1), logits)
    torch.testing.assert_close(mixture.log_weights[0].exp(), torch.full((2,), 0.5, **F64))
    mixture.log_prob(torch.randn(2, 3, **F64)).sum().backward()
    assert logits.grad.isfinite().all() and loc.grad.isfinite().all()
    assert loc.grad[1, 1].count_nonzero() == 0 and loc.grad[1, 0].count_nonzero() == 3
    assert logits.grad[0].count_nonzero() == 0


def test_a_masked_component_gets_no_gradient_even_where_its_density_vanishes():
    loc = torch.tensor([0.0, 1e200], **F64).requires_grad_()
    mixture = Mixture(dist.Normal(loc, 1.0), torch.tensor([0.0, -INF], **F64))
    mixture.log_prob(torch.tensor(0.5, **F64)).backward()
    assert torch.equal(loc.grad, torch.tensor([0.5, 0.0], **F64))


def test_a_masked_component_may_hold_anything():
    scale = torch.tensor([1.0, 0.0, math.nan], **F64)
    components = dist.Normal(torch.zeros(3, **F64), scale, validate_args=False)
    z = torch.tensor(0.0, **F64)  # where the density of the second component is infinite
    mixture = Mixture(components, torch.tensor([0.0, -INF, -INF], **F64))
    torch.testing.assert_close(mixture.log_prob(z), dist.Normal(z, 1.0).log_prob(z), **EXACT)


def test_a_masked_component_is_not_drawn_even_if_the_uniform_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    loc = torch.arange(3.0, **F64)
    mixture = Mixture(dist.Normal(loc, 1e-6), torch.tensor([-INF, 0.0, -INF], **F64))
    torch.testing.assert_close(mixture.sample(), loc[1], rtol=0, atol=1e-4)


def test_gradient_of_log_prob_is_the_numerical_one():
    loc, scale = torch.randn(3, 4, 2, **F64), torch.rand(3, 4, 2, **F64) + 0.5
    z = torch.randn(3, 2, **F64)
    leaves = (loc.requires_grad_(), scale.requires_grad_(), z.requires_grad_())

    def f(loc, scale, z):
        return Mixture(dist.Normal(loc, scale).to_event(1), WEIGHTS).log_prob(z)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize(
    "components",
    [normal(3, 4, 2), laplace(3, 4, 2), dist.Gamma(torch.rand(3, 4, 2, **F64) + 1, 2.0).to_event(1)],
)
def test_mixture_draws_have_its_moments(components):
    mixture = Mixture(components, WEIGHTS)
    count = 40_000
    z = mixture.rsample((count,))
    assert z.shape == (count, 3, 2) and z.dtype == torch.float64
    standard_error = (mixture.variance / count).sqrt()
    assert ((z.mean(0) - mixture.mean).abs() < 5 * standard_error).all()
    square = (z - mixture.mean) ** 2
    assert ((square.mean(0) - mixture.variance).abs() < 5 * square.std(0) / count**0.5).all()


def test_mixture_draws_choose_a_component_for_every_element():
    loc = torch.arange(3.0, **F64)[:, None].expand(3, 1)
    mixture = Mixture(dist.Normal(loc, 1e-3).to_event(1), torch.tensor([0.2, 0.0, 0.8], **F64).log()).expand((50,))
    draws = mixture.sample((400,)).round()[..., 0]
    assert set(draws.unique().tolist()) == {0.0, 2.0}
    share = (draws == 2).double()
    # Independent across both dimensions: no row and no column is dealt a fixed share.
    assert (share.mean() - 0.8).abs() < 5 * (0.16 / 20_000) ** 0.5
    for dim, count in ((0, 400), (1, 50)):
        spread = share.mean(dim).var() * count / 0.16
        assert 0.4 < spread < 1.8


def test_pathwise_gradient_of_a_quadratic_is_the_closed_form():
    # E z'z = sum_c w_c (m_c'm_c + ...), so the gradient for m_c is 2 w_c m_c: and 2 w_c s_c for s_c.
    loc, scale = torch.randn(3, 4, 2, **F64), torch.rand(3, 4, 2, **F64) + 0.5
    count = 20_000
    locs, scales = (x.expand(count, 3, 4, 2).clone().requires_grad_() for x in (loc, scale))
    mixture = Mixture(dist.Normal(locs, scales).to_event(1), WEIGHTS)
    mixture.rsample().square().sum().backward()
    weights = WEIGHTS.softmax(-1)[..., None]
    for leaf, value in ((locs, loc), (scales, scale)):
        standard_error = leaf.grad.std(0) / count**0.5
        assert ((leaf.grad.mean(0) - 2 * weights * value).abs() <= 5 * standard_error).all()


def test_component_draws_are_pathwise_and_of_the_component():
    loc = torch.randn(3, 4, 2, **F64).requires_grad_()
    logits = WEIGHTS.clone().requires_grad_()
    mixture = Mixture(dist.Normal(loc, 1e-9).to_event(1), logits).expand((5, 3))
    index = torch.randint(4, (5, 1))
    z = mixture.component_rsample(index)
    assert z.shape == (5, 3, 2)
    torch.testing.assert_close(z, loc[:, index[:, 0]].transpose(0, 1), rtol=0, atol=1e-7)
    z.sum().backward()
    counts = torch.bincount(index[:, 0], minlength=4).double()
    torch.testing.assert_close(loc.grad, counts[:, None].expand(3, 4, 2))


def test_learned_weights_have_a_pathwise_draw_of_normal_components_only():
    components, logits = normal(3, 4, 2), torch.zeros(3, 4, **F64).requires_grad_()
    assert Mixture(components, logits).has_rsample and Mixture(components, WEIGHTS).has_rsample
    learned = Mixture(laplace(3, 4, 2), logits)
    assert not learned.has_rsample and Mixture(laplace(3, 4, 2), WEIGHTS).has_rsample
    with pytest.raises(NotImplementedError, match="component_rsample"):
        learned.rsample()
    assert learned().shape == (3, 2) and not learned.sample().requires_grad
    discrete = Mixture(dist.Bernoulli(torch.rand(3, 4, 2)).to_event(1), WEIGHTS.float())
    assert not discrete.has_rsample and discrete.sample((6,)).shape == (6, 3, 2)
    with pytest.raises(NotImplementedError):
        discrete.component_rsample(torch.tensor(0))


def inverse(u, loc, scale, weights):
    """The draw of a mixture (C, D) whose conditional distribution functions, entry by entry, are u: by bisection."""
    z, share = [], weights
    for d in range(len(u)):
        low, high = torch.full((), -60.0, **F64), torch.full((), 60.0, **F64)
        for _ in range(70):
            middle = (low + high) / 2
            below = (share * torch.special.ndtr((middle - loc[:, d]) / scale[:, d])).sum() < u[d]
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        z.append(low)
        share = share * dist.Normal(loc[:, d], scale[:, d]).log_prob(low).exp()
        share = share / share.sum()
    return torch.stack(z)


@pytest.mark.parametrize("out", [None, 1])
def test_a_draw_with_learned_weights_moves_as_the_inverse_distribution_function_does(out):
    """One component left out in the second case; differences of the inverse are the oracle."""
    loc, scale = torch.randn(3, 3, **F64), torch.rand(3, 3, **F64) + 0.5
    logits = torch.randn(3, **F64)
    if out is not None:
        logits[out] = -INF
    leaves = [x.requires_grad_() for x in (loc, scale, logits)]
    z = Mixture(dist.Normal(loc, scale).to_event(1), logits).rsample((2,))
    direction = torch.randn(3, **F64)
    for row in range(2):
        found = torch.autograd.grad(z[row] @ direction, leaves, retain_graph=True)
        values = [x.detach().clone() for x in leaves]
        share, u = values[2].softmax(-1), []
        for d in range(3):
            noise = (z[row, d].detach() - values[0][:, d]) / values[1][:, d]
            u.append((share * torch.special.ndtr(noise)).sum())
            share = share * (-0.5 * noise**2).exp() / values[1][:, d]
            share = share / share.sum()
        for leaf, gradient in zip(values, found, strict=True):
            for i in range(leaf.numel()):
                if leaf.flatten()[i] == -INF:
                    assert gradient.flatten()[i] == 0
                    continue
                moved = []
                for step in (1e-6, -1e-6):
                    leaf.view(-1)[i] += step
                    moved.append(inverse(u, values[0], values[1], values[2].softmax(-1)) @ direction)
                    leaf.view(-1)[i] -= step
                slope = (moved[0] - moved[1]) / 2e-6
                torch.testing.assert_close(gradient.flatten()[i], slope, rtol=1e-5, atol=1e-6)


def test_a_draw_with_learned_weights_is_that_of_fixed_ones_and_has_the_gradient_of_the_mean():
    """Of E z'z = sum_c w_c (m_c'm_c + s_c's_c), with respect to everything; and in one dimension without an event."""
    loc, scale, logits = torch.randn(4, 2, **F64), torch.rand(4, 2, **F64) + 0.5, torch.randn(4, **F64)
    torch.manual_seed(1)
    fixed = Mixture(dist.Normal(loc, scale).to_event(1), logits).rsample((6,))
    count = 20_000
    leaves = [x.expand(count, *x.shape).clone().requires_grad_() for x in (loc, scale, logits)]
    mixture = Mixture(dist.Normal(*leaves[:2]).to_event(1), leaves[2])
    torch.manual_seed(1)
    assert torch.equal(Mixture(dist.Normal(loc, scale).to_event(1), logits.requires_grad_()).rsample((6,)), fixed)
    mixture.rsample().square().sum().backward()
    weights = logits.detach().softmax(-1)
    squares = (loc**2 + scale**2).sum(-1)
    expected = [2 * weights[:, None] * loc, 2 * weights[:, None] * scale, weights * (squares - weights @ squares)]
    for leaf, value in zip(leaves, expected, strict=True):
        standard_error = leaf.grad.std(0) / count**0.5
        # 20 differences, each beyond five errors with probability 6e-7, were they normal; the seed is fixed
        assert ((leaf.grad.mean(0) - value).abs() < 5 * standard_error).all()
    flat = Mixture(dist.Normal(loc[:, 0].requires_grad_(), 1.0), logits)
    z = flat.rsample((7,))
    (slope,) = torch.autograd.grad(z.sum(), logits)
    p = flat.log_prob(z).exp()
    below = logits.softmax(-1) * torch.special.ndtr(z[:, None] - loc[:, 0])
    by_hand = -(below - logits.softmax(-1) * below.sum(-1, keepdim=True)) / p[:, None]
    torch.testing.assert_close(slope, by_hand.sum(0), **EXACT)


def test_masked_components_reach_no_draw_of_a_mixture_with_learned_weights():
    loc, logits = torch.randn(3, 2, **F64), torch.tensor([0.3, -INF, 0.1], **F64).requires_grad_()
    loc[1] = math.nan
    mixture = Mixture(dist.Normal(loc.requires_grad_(), 1.0, validate_args=False).to_event(1), logits)
    z = mixture.rsample((50,))
    gradients = torch.autograd.grad(z.sum(), [loc, logits])
    assert z.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert gradients[0][1].count_nonzero() == 0 and gradients[1][1] == 0


def test_mixture_expands_and_broadcasts_its_weights():
    components = normal(3, 4, 2)
    presence = torch.where(torch.rand(5, 1, 3, 4) < 0.5, 0.0, -INF).double()
    mixture = Mixture(components, presence)
    assert mixture.batch_shape == (5, 1, 3)
    wide = Mixture(components, WEIGHTS).expand((6, 3))
    assert wide.batch_shape == (6, 3) and wide.components.batch_shape == (6, 3, 4)
    assert wide.log_weights.shape == (6, 3, 4) and wide.mean.shape == wide.variance.shape == (6, 3, 2)
    loc = diagonal(wide.components)[0]
    assert loc.data_ptr() == diagonal(components)[0].data_ptr()  # expanded, not copied
    z = torch.randn(3, 2, **F64)
    torch.testing.assert_close(wide.log_prob(z), Mixture(components, WEIGHTS).log_prob(z).expand(6, 3))
    draws = wide.rsample()
    assert draws.shape == (6, 3, 2) and len(draws[:, 0, 0].unique()) == 6
    assert mixture.rsample((2,)).shape == (2, 5, 1, 3, 2)
    with pytest.raises(ValueError, match="cannot expand"):
        wide.expand((3,))
    with pytest.raises(ValueError, match="cannot expand"):
        wide.expand((7, 3))


def test_expanding_leaves_the_original_alone():
    # Pyro's ExpandedDistribution.expand changes the distribution it is called on.
    components = ExpandedDistribution(normal(1, 4, 2), torch.Size((3, 4)))
    mixture = Mixture(components, WEIGHTS)
    assert mixture.expand((6, 3)).components.batch_shape == (6, 3, 4)
    assert components.batch_shape == (3, 4) and mixture.components.batch_shape == (3, 4)


def test_mixture_checks_its_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        Mixture(normal(3, 4, 2), torch.zeros(3, 5))


# ---------------------------------------------------------------- Where

MASK = torch.tensor([True, False, True])


def test_where_chooses_by_element():
    p, q = normal(3, 2), laplace(3, 2)
    d = Where(MASK, p, q)
    assert d.batch_shape == (3,) and d.event_shape == (2,) and d.has_rsample and d.support is not None
    z = torch.randn(7, 3, 2, **F64)
    by_hand = torch.stack([(p if m else q).log_prob(z)[:, n] for n, m in enumerate(MASK.tolist())], -1)
    assert torch.equal(d.log_prob(z), by_hand)
    assert torch.equal(d.mean, torch.where(MASK[:, None], p.mean, q.mean))
    assert torch.equal(d.variance, torch.where(MASK[:, None], p.variance, q.variance))
    draws = d.rsample((20_000,))
    assert ((draws.mean(0) - d.mean).abs() < 5 * (d.variance / 20_000).sqrt()).all()


def test_where_broadcasts_and_expands():
    d = Where(torch.tensor([[True], [False]]), normal(3, 2), normal(1, 2))
    assert d.batch_shape == (2, 3)
    wide = d.expand((5, 2, 3))
    assert wide.batch_shape == (5, 2, 3) and wide.mean.shape == (5, 2, 3, 2)
    assert wide.log_prob(torch.zeros(2, **F64)).shape == (5, 2, 3)
    draws = wide.rsample((4,))
    assert draws.shape == (4, 5, 2, 3, 2) and len(draws.unique()) == draws.numel()
    assert d.batch_shape == (2, 3)


def test_where_has_rsample_only_if_both_have():
    d = Where(MASK, normal(3, 2), Mixture(laplace(3, 4, 2), WEIGHTS.clone().requires_grad_()))
    assert not d.has_rsample and d().shape == (3, 2)
    with pytest.raises(NotImplementedError):
        d.rsample()
    with pytest.raises(ValueError, match="event shapes differ"):
        Where(MASK, normal(3, 2), normal(3, 4))


def test_where_sends_a_gradient_to_the_chosen_branch_alone():
    loc = torch.zeros(2, 3, **F64).requires_grad_()
    d = Where(MASK, dist.Normal(loc[0], 1.0), dist.Laplace(loc[1], 1.0))
    d.log_prob(torch.ones(3, **F64)).sum().backward()
    assert torch.equal(loc.grad, torch.stack([MASK, ~MASK]).double())


def test_where_kls_resolve_without_ambiguity():
    p, q, r, s = normal(3, 2), normal(3, 2), normal(3, 2), normal(3, 2)
    other = torch.tensor([False, False, True])
    left, right = Where(MASK, p, q), Where(other, r, s)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            kl_divergence(left, r), torch.where(MASK, kl_divergence(p, r), kl_divergence(q, r)), **EXACT
        )
        torch.testing.assert_close(
            kl_divergence(p, right), torch.where(other, kl_divergence(p, r), kl_divergence(p, s)), **EXACT
        )
        pairs = [(p if m else q, r if o else s) for m, o in zip(MASK.tolist(), other.tolist(), strict=True)]
        by_hand = torch.stack([kl_divergence(a, b)[n] for n, (a, b) in enumerate(pairs)])
        torch.testing.assert_close(kl_divergence(left, right), by_hand, **EXACT)
        nested = Where(other, left, s)
        by_hand = torch.where(other, kl_divergence(left, r), kl_divergence(s, r))
        torch.testing.assert_close(kl_divergence(nested, r), by_hand, **EXACT)
        assert kl_divergence(left.expand((5, 3)), r).shape == kl_divergence(r, left.expand((5, 3))).shape == (5, 3)
        assert kl_divergence(left.expand((5, 3)), right).shape == kl_divergence(left, right.expand((5, 3))).shape
        assert torch.equal(kl_divergence(left, left.expand((5, 3))), torch.zeros(5, 3, **F64))
        delta = dist.Delta(torch.zeros(3, 2, **F64), event_dim=1)
        torch.testing.assert_close(kl_divergence(delta, left), -left.log_prob(delta.v), **EXACT)
        kl_divergence(left, dist.Normal(torch.zeros(3, 2, **F64), 1.0).expand((5, 3, 2)).to_event(1))


def test_a_shared_mask_compares_only_like_with_like():
    mixture = Mixture(normal(3, 4, 2), WEIGHTS)
    p, q, r = normal(3, 2), normal(3, 2), laplace(3, 2)
    left, right = Where(MASK, p, r), Where(MASK, q, r)
    by_hand = torch.where(MASK, kl_divergence(p, q), torch.zeros(3, **F64))
    torch.testing.assert_close(kl_divergence(left, right), by_hand, **EXACT)
    a, b = (dist.Dirichlet(torch.rand(3, 2, **F64) + 1) for _ in range(2))  # no KL with a Normal exists
    by_hand = torch.where(MASK, kl_divergence(p, q), kl_divergence(a, b))
    torch.testing.assert_close(kl_divergence(Where(MASK, p, a), Where(MASK, q, b)), by_hand, **EXACT)
    with pytest.raises(NotImplementedError):
        kl_divergence(Where(MASK, p, mixture), q)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, Where(MASK, p, mixture))
    with pytest.raises(NotImplementedError):
        kl_divergence(Where(MASK, p, mixture), Where(~MASK, p, q))


# ---------------------------------------------------------------- Scatter


@pytest.mark.parametrize("index", [(0,), (2, 0), (0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (1, 1, 3), (4, 1, 3), (6, 4, 1, 3)])
def test_scatter_is_a_masked_dense_distribution(index, shape):
    loc = torch.randn(4, 1, 3, 2, **F64)
    dense = dist.Normal(loc, 1.0).to_event(1)
    known = torch.zeros(4, 1, 1, dtype=torch.bool)
    known[list(index)] = True
    d = Scatter(dist.Normal(loc[list(index)], 1.0).to_event(1), index, 4, -3)
    assert d.batch_shape == (4, 1, 3) and d.event_shape == (2,) and not d.has_rsample
    value = torch.randn(*shape, 2, **F64)
    expected = torch.where(known, dense.log_prob(value), 0.0)
    assert torch.equal(d.log_prob(value), expected)
    wide = d.expand((5, 4, 7, 3))
    value = torch.randn(5, 4, 7, 3, 2, **F64)
    assert wide.batch_shape == (5, 4, 7, 3)
    assert torch.equal(wide.log_prob(value), torch.where(known, dense.log_prob(value), 0.0))
    assert wide.log_prob(value[0, 0, 0]).shape == (5, 4, 7, 3)


def test_scatter_sends_no_gradient_to_other_entries():
    value = torch.randn(4, 3, 2, **F64).requires_grad_()
    Scatter(normal(2, 3, 2), (3, 1), 4, -2).log_prob(value).sum().backward()
    assert value.grad[[0, 2]].count_nonzero() == 0 and value.grad[[1, 3]].count_nonzero() == 12


def test_scatter_only_scores_and_checks_its_sizes():
    d = Scatter(normal(2, 3, 2), (0, 3), 4, -2)
    with pytest.raises(NotImplementedError, match="only scores"):
        d.sample()
    with pytest.raises(ValueError, match="1 or 4 entries"):
        d.log_prob(torch.zeros(2, 3, 2, **F64))
    for index, dim in (((0, 1, 2), -2), ((0, 1), -3), ((0, 0), -2), ((0, 4), -2), ((0, 1), 0)):
        with pytest.raises(ValueError, match="expected"):
            Scatter(normal(2, 3, 2), index, 4, dim)


# ---------------------------------------------------------------- all of them


def test_diagonal_finds_mean_and_scale_within_wrappers():
    loc, scale = torch.randn(3, 2, **F64), torch.rand(3, 2, **F64)
    d = dist.Laplace(loc, scale).to_event(1).expand((5, 3)).to_event(1)
    assert d.event_shape == (3, 2)
    assert torch.equal(diagonal(d)[0], loc.expand(5, 3, 2)) and torch.equal(diagonal(d)[1], scale.expand(5, 3, 2))
    assert torch.equal(diagonal(torch.distributions.Normal(loc, scale))[1], scale)
    with pytest.raises(TypeError, match="Gamma"):
        diagonal(dist.Gamma(torch.ones(3), 1.0).to_event(1))


def build(x):
    """One of each, from one leaf ``x`` of shape (3, 4, 2); no distribution validates, so that all trace."""
    mask = torch.ones(3, dtype=torch.bool, device=x.device).logical_not()
    components = dist.Normal(x, torch.full_like(x, 0.5), validate_args=False).to_event(1)
    locs, scales = list(x.unbind(1)), [x.exp() for x in x.unbind(1)]
    product = product_of_normals(locs, scales, [True, False, mask, mask], prior=None).to_event(1)
    weights = x.detach()[..., 0].masked_fill(mask[:, None], -INF)
    mixture = Mixture(components, weights)
    return {
        "product": product,
        "mixture": mixture,
        "learned mixture": Mixture(components, x[..., 0].masked_fill(mask[:, None], -INF)),
        "where": Where(mask, product, mixture),
        "scatter": Scatter(components, (2, 0, 1, 5), 6, -1),
    }


@pytest.mark.parametrize("name", ["product", "mixture", "learned mixture", "where", "scatter"])
def test_log_prob_and_draws_trace(name):
    def loss(x, z):
        d = build(x)[name]
        draw = d.rsample().sum() if d.has_rsample else 0.0
        return d.log_prob(z), torch.autograd.grad(d.log_prob(z).sum() + draw, x)[0]

    x, z = torch.randn(3, 4, 2, **F64).requires_grad_(), torch.randn(3, 2, **F64)
    z = z[:, None] if name == "scatter" else z
    traced = make_fx(loss)(x, z)
    new = torch.randn(3, 4, 2, **F64).requires_grad_()
    torch.testing.assert_close(traced(new, z)[0], build(new)[name].log_prob(z), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_follow_the_operands(dtype):
    x, z = torch.randn(3, 4, 2, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    with torch.device("meta"):  # a tensor made without a device would not mix with those of the CPU
        for name, d in build(x).items():
            value = z[:, None] if name == "scatter" else z
            assert d.log_prob(value).dtype == dtype and d.log_prob(value).device.type == "cpu"
            if name != "scatter":
                assert d.rsample().dtype == d.mean.dtype == dtype and d.sample((2,)).shape == (2, 3, 2)


@pytest.mark.parametrize("name", ["product", "mixture", "learned mixture", "where"])
def test_float32_agrees_with_float64(name):
    x, z = torch.randn(3, 4, 2, **F64), torch.randn(3, 2, **F64)
    torch.testing.assert_close(
        build(x.float())[name].log_prob(z.float()).double(), build(x)[name].log_prob(z), rtol=1e-5, atol=1e-5
    )
