"""Every posterior under every kind of mask: masking equals deleting, and nothing hidden is ever seen."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
import pyro_mm.objectives.expansion
import pyro_mm.objectives.stacked_views
import pyro_mm.objectives.terms
from pyro_mm.batch.context import TermStack
from pyro_mm.objectives import Term
from pyro_mm.scoring.structure import PairStructure
from tests.support.linear_gaussian import encoders, every_pattern, oracle

P, NAMES, LATENT, CLASSES = mm.posteriors, ("a", "b", "c"), 2, 4
SETS = [s for size in range(4) for s in itertools.combinations(NAMES, size)]


def normal(family=mm.conditionals.Normal):
    return family(mm.nn.MLP(3, 2 * LATENT, (5,)))


def experts(family=mm.conditionals.Normal):
    return {n: normal(family) for n in NAMES}


def classes():
    return {n: mm.conditionals.Categorical(mm.nn.MLP(3, CLASSES, ())) for n in NAMES}


def features(size=4):
    return {n: mm.nn.MLP(3, size, ()) for n in NAMES}


def head():
    return mm.conditionals.Normal(mm.nn.MLP(4, 2 * LATENT))


def private_of():
    whole, own = nn.Linear(4, 4), nn.Linear(4, 4)
    return P.PrivateOf(P.SumPooling(features(), head(), 4), "a", whole, own, head())


def standard(size=LATENT):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def joint(partial=None):
    return P.JointEncoder(features(4), mm.conditionals.Normal(mm.nn.MLP(12, 2 * LATENT, (5,))), partial)


OTHER = dist.Normal(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.4])).to_event(1)
SOME = [("a", "b"), ("b", "c"), ("c",)]
CONTINUOUS = {
    "product": lambda: P.ProductOfExperts(experts()),
    "product, no prior": lambda: P.ProductOfExperts(experts(), prior=None),
    "product, another prior": lambda: P.ProductOfExperts(experts(), prior=OTHER),
    "mixture": lambda: P.MixtureOfExperts(experts()),
    "Laplace mixture": lambda: P.MixtureOfExperts(experts(mm.conditionals.Laplace)),
    "weighted mixture": lambda: P.MixtureOfExperts(experts(), {"a": 3.0, "b": 1.0, "c": 0.5}),
    "mixture without c": lambda: P.MixtureOfExperts(experts(), {"a": 3.0, "b": 1.0, "c": 0.0}),
    "mixture of products": lambda: P.MixtureOfProducts(experts()),
    "mixture of products, no prior": lambda: P.MixtureOfProducts(experts(), prior=None),
    "mixture of some products": lambda: P.MixtureOfProducts(experts(), OTHER, SOME),
    "mixture of some products, no prior": lambda: P.MixtureOfProducts(experts(), None, SOME),
    "dependent": lambda: P.DependentExperts(experts(), 0.4),
    "negatively dependent": lambda: P.DependentExperts(experts(), -0.3),
    "hoelder": lambda: P.HoelderPooling(experts()),
    "sum pooling": lambda: P.SumPooling(features(), head(), 4),
    "attention": lambda: P.SelfAttention(features(), head(), 4, heads=2),
    "joint": joint,
    "joint and partial": lambda: joint(P.ProductOfExperts(experts(), prior=None)),
    "either": lambda: P.Either({n: normal() for n in "ab"}),
    "given": lambda: P.Given(("a", "b"), P.ProductOfExperts(experts()), OTHER),
    "private": lambda: P.Private("a", normal()),
    "private, another": lambda: P.Private("a", normal(), OTHER),
    "private of": private_of,
}
DISCRETE = {
    "product of classes": lambda: P.ProductOfCategoricals(classes()),
    "product of classes and prior": lambda: P.ProductOfCategoricals(
        classes(), dist.Categorical(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    ),
    "label": lambda: P.Label("label", P.ProductOfCategoricals(classes())),
}
KINDS = CONTINUOUS | DISCRETE
REFUSES = {"joint": "needs filler"}  # a batch that does not hold a modality
STANDARD = {  # given nothing
    "product", "product, no prior", "mixture", "mixture without c", "mixture of products",
    "mixture of products, no prior", "mixture of some products, no prior", "dependent", "negatively dependent",
    "hoelder", "either", "private",
}  # fmt: skip


def values(seed=0):
    torch.manual_seed(seed)
    return {n: 3 * torch.randn(5, 3) for n in NAMES} | {"label": torch.randint(CLASSES, (5,))}


def points(kind):
    """Where densities are compared, ``(5, D)``; or classes, ``(5,)``."""
    torch.manual_seed(9)
    return torch.randint(CLASSES, (5,)) if kind in DISCRETE else torch.randn(5, LATENT)


def close(found, expected):
    """But for the order in which numbers are summed."""
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def hidden(batch, names):
    """The rows with other values where they are hidden, ones that no encoder has met."""
    return batch.replaced({n: 1e4 + batch[n] if n in NAMES else (batch[n] + 1) % CLASSES for n in names})


def as_bools(names):
    return mm.Batch(values()).only(*names)


def as_tensors(names):
    batch = mm.Batch(values())
    return batch.view({n: torch.full((5,), n in names) for n in batch.names}, TermStack({}), None)


def deleted(kind, names):
    """The rows without the columns; where none is left, one that no posterior here reads."""
    kept = {n: x for n, x in values().items() if n in names}
    return mm.Batch(kept or {"other": torch.zeros(5)})


def of_deleted(kind, posterior, names, z):
    """The log-density with the other columns deleted, or hidden where the posterior cannot do without any."""
    try:
        return posterior(deleted(kind, names)).log_prob(z)
    except ValueError as error:  # which says what it needs
        needs = ("holds no values", "needs filler", "has none of", "no values of", *REFUSES.values())
        assert any(text in str(error) for text in needs)
        return posterior(as_bools(names)).log_prob(z)


@pytest.mark.parametrize("kind", KINDS)
def test_masking_equals_deleting(kind, double):
    """Under masks of Python and of tensors, whatever the hidden values are."""
    posterior, z = KINDS[kind](), points(kind)
    for some in SETS:
        names = (*some, "label") if kind == "label" and len(some) % 2 else some
        expected = of_deleted(kind, posterior, names, z)
        for masked in (as_bools, as_tensors):
            batch = masked(names)
            found = posterior(batch).log_prob(z)
            close(found.expand(5), expected.expand(5))
            assert torch.equal(found, posterior(hidden(batch, set(batch.names) - set(names))).log_prob(z))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_posterior_alone_and_among_rows_that_lack_others(kind, double):
    """Each is what it is in a batch of its own, and so are the draws, whatever is hidden."""
    posterior, z = KINDS[kind](), points(kind)
    patterns = [("a",), (), ("b", "c"), ("a", "b", "c"), ("c",)]
    batch = mm.Batch(values(), {n: torch.tensor([n in p for p in patterns]) for n in NAMES} | {"label": [False] * 5})
    masks = batch.present
    other = {n: torch.where(masks[n][:, None], batch[n], -1e4) for n in NAMES}
    found = posterior(batch)
    for row, some in enumerate(patterns):
        close(found.log_prob(z).expand(5)[row], of_deleted(kind, posterior, some, z).expand(5)[row])
    draws = []
    for rows in (batch, batch.replaced(other)):
        torch.manual_seed(3)
        draws.append(posterior(rows).sample())
    assert torch.equal(*draws)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_stacked_in_one_pass_have_the_posteriors_of_their_own_sets(kind, double):
    """All sets of modalities at once, the empty one among them, in rows that have all and in rows that do not."""
    posterior, z = KINDS[kind](), points(kind)
    info = PairStructure(1, {"z": "pathwise"}, {}, 0, True, frozenset(NAMES))
    present = {n: torch.tensor([True, True, n != "b", n == "c", True]) for n in NAMES}
    for batch in (mm.Batch(values()), mm.Batch(values(), present)):
        for sets in (SETS, [(), ("a",)], [("a",), ("a", "b", "c")]):
            terms = pyro_mm.objectives.expansion.expand([Term(s, NAMES) for s in sets], batch)
            view = pyro_mm.objectives.stacked_views.stack_views(terms, batch, info, {}).encode
            found = posterior(view).log_prob(z)
            found = found.expand(len(sets), 5) if found.dim() < 3 else found.squeeze(1)
            for t, some in enumerate(sets):
                close(found[t], posterior(batch.only(*some)).log_prob(z).expand(5))


@pytest.mark.parametrize("kind", sorted(STANDARD))
def test_given_no_modality_a_posterior_is_the_standard_normal(kind, double):
    posterior, z = KINDS[kind](), points(kind)
    for masked in (as_bools, as_tensors):
        found = posterior(masked(()))
        torch.testing.assert_close(found.log_prob(z).expand(5), standard().log_prob(z), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.mean.expand(5, LATENT), torch.zeros(5, LATENT), rtol=0, atol=1e-12)


def test_hoelder_pool_is_the_square_of_the_sum_of_roots(double):
    """By quadrature over one latent, for every set of modalities."""
    pool = P.HoelderPooling({n: mm.conditionals.Normal(mm.nn.MLP(3, 2, ())) for n in NAMES})
    grid = torch.linspace(-40, 40, 16_001)[:, None, None]
    for names in SETS[1:]:
        batch = as_bools(names)
        found = pool(batch).log_prob(grid).exp()  # (G, N)
        roots = sum(pool.experts[n](batch[n]).log_prob(grid).mul(0.5).exp() for n in names).square()
        torch.testing.assert_close(found, roots / (roots.sum(0) * 0.005), rtol=1e-8, atol=1e-12)


def test_a_weight_of_zero_leaves_an_expert_out(double):
    nets, z = experts(), points("mixture")
    without = P.MixtureOfExperts({n: nets[n] for n in "ab"}, {"a": 3.0, "b": 1.0})
    posterior = P.MixtureOfExperts(nets, {"a": 3.0, "b": 1.0, "c": 0.0})
    for names in SETS:
        expected = without(as_bools(names)).log_prob(z)
        for masked in (as_bools, as_tensors):
            torch.testing.assert_close(posterior(masked(names)).log_prob(z), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_mixture_refuses_negative_and_all_zero_weights(weight):
    with pytest.raises(ValueError, match=r"expected the weight of 'a' .*>= 0, got"):
        P.MixtureOfExperts(experts(), {"a": weight, "b": 1.0, "c": 1.0})
    with pytest.raises(TypeError, match=r"expected the weight of 'a' .*number.*, got 'much'"):
        P.MixtureOfExperts(experts(), {"a": "much", "b": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="expected a positive weight of one modality at least"):
        P.MixtureOfExperts(experts(), dict.fromkeys(NAMES, 0.0))


class Picked(torch.nn.Module):
    """A guide that shows its posterior the rows picked one by one, all of them in their order."""

    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self, batch):
        return self.guide(batch[torch.arange(len(batch))])


def test_rows_picked_inside_a_guide_are_those_of_every_term(double):
    """Where terms are stacked, and count in some rows only, each term has its own empty rows."""
    model = oracle(2, latent=2)
    guide, batch = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model))), every_pattern(model)
    values = []
    for same in (guide, Picked(guide)):
        torch.manual_seed(1)
        values.append(mm.objectives.vaevae().loss(model, same, batch))
    assert values[0] == values[1]
