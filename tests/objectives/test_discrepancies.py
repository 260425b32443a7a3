"""Statistics of a batch's latents as objectives: values by hand, which rows and draws enter, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_mm as mm
from pyro_mm.distributions import hsic, squared_mmd
from pyro_mm.objectives import ALL, EACH, HSIC, MMD, PRIOR, Objective, SlicedWasserstein, Term
from tests.support.contract import POSTERIORS, data
from tests.support.contract import pair as contract_pair

E = mm.estimators
LABEL = "MMD(z | *; p(z))"


class Capture:
    """A Gaussian kernel of bandwidth 1 that keeps the samples that it is asked to compare."""

    def __init__(self):
        self.samples = []

    def __call__(self, x, y):
        self.samples.append(x)
        return (-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / 2).exp()

    def last(self):
        """The two samples of the last comparison, each ``(K, N, D)``."""
        return self.samples[-1].chunk(2, -2)


def normal_pair(prior=None, latent=2):
    """A story of one latent and two modalities, and a guide that depends on what is present."""
    torch.manual_seed(1)
    prior = dist.Normal(torch.zeros(latent), 1.0).to_event(1) if prior is None else prior
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(latent, 3, ()), scale=1.0) for n in ("x", "y")}
    experts = {n: mm.conditionals.Normal(mm.nn.MLP(3, 2 * latent, ())) for n in ("x", "y")}
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def rows(size=12, missing=False):
    values = {"x": torch.randn(size, 3), "y": torch.randn(size, 3) + 1}
    return mm.Batch(values, present={"y": torch.arange(size) % 3 != 0} if missing else None)


def by_term(objective, model, guide, batch, seed=0):
    torch.manual_seed(seed)
    return objective.evaluate(model, guide, batch, step=0).by_term


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 3])
def test_it_is_minus_the_statistic_of_each_particle_averaged_for_every_row(particles):
    kernel = Capture()
    model, guide = normal_pair()
    batch = rows()
    objective = mm.objectives.elbo(E.AnalyticKL(particles)) + 2 * MMD("z", kernel=kernel)
    value = by_term(objective, model, guide, batch)[LABEL]
    z, prior = kernel.last()
    assert len(kernel.samples) == 1 and z.shape == prior.shape == (particles, 12, 2)
    expected = torch.stack([squared_mmd(a, b, bandwidth=1.0) for a, b in zip(z, prior, strict=True)]).mean()
    torch.testing.assert_close(value, -2 * 12 * expected.detach())

    torch.manual_seed(0)  # one pass, of two terms
    with pyro.poutine.trace() as traced, pyro.plate("terms", 2, dim=-2), pyro.plate("particles", particles, dim=-3):
        guide(batch)
    torch.testing.assert_close(z, traced.trace.nodes["z"]["value"].reshape(particles, 2, 12, 2)[:, 1])


def test_the_sliced_distance_and_hsic_are_of_the_same_draws():
    model, guide = contract_pair("private", "product")
    batch = data(8).having(every=True)
    batch = data(8)[batch]
    table = [Term(ALL, ALL)]
    values = by_term(Objective(table) + HSIC("z", "w_a", bandwidth=1.0), model, guide, batch)
    torch.manual_seed(0)
    nodes = pyro.poutine.trace(guide).get_trace(batch).nodes
    assert "HSIC(z, w_a | *)" in values and nodes["w_a"]["value"].shape == (len(batch), 2)
    both = SlicedWasserstein("z", reference=ALL, projections=5)
    assert by_term(both, model, guide, batch)["SlicedWasserstein(z | *; z | *)"] < 0


def test_hsic_is_its_value_by_hand():
    def guide(batch):
        with batch.plate():
            a = pyro.sample("a", dist.Delta(batch["x"], event_dim=1))
            pyro.sample("b", dist.Delta(a[..., :1] + batch["y"][..., :1], event_dim=1))

    def model(batch):
        with batch.plate():
            a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            batch.observe("x", dist.Normal(a, 1.0).to_event(1))
            batch.observe("y", dist.Normal(a, 1.0).to_event(1))

    batch = rows(10)
    for unbiased in (True, False):
        value = by_term(3 * HSIC("a", "b", bandwidth=1.0, unbiased=unbiased), model, guide, batch)["HSIC(a, b | *)"]
        expected = hsic(batch["x"], batch["x"][:, :1] + batch["y"][:, :1], bandwidth=1.0, unbiased=unbiased)
        torch.testing.assert_close(value, -30 * expected)

    # rows of padding, and rows with nothing, drop out
    present = {n: torch.arange(10) != 3 for n in "xy"}
    holed = mm.Batch({n: batch[n] for n in "xy"}, present=present)
    expected = by_term(HSIC("a", "b"), model, guide, batch[present["x"]])["HSIC(a, b | *)"]
    for with_holes in (holed, holed.padded(16)):
        torch.testing.assert_close(by_term(HSIC("a", "b"), model, guide, with_holes)["HSIC(a, b | *)"], expected)


PRIORS = {
    "normal": (lambda: dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1), [3, -1], [0.5, 2]),
    "mixture": (lambda: mm.priors.MixturePrior(2, 2), None, None),
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_reference_is_drawn_from_the_models_prior(name):
    make, loc, scale = PRIORS[name]
    kernel = Capture()
    model, guide = normal_pair(make())
    loss = MMD("z", kernel=kernel).evaluate(model, guide, rows(2000), step=0)
    _, prior = kernel.last()
    if loc is None:  # a prior with parameters learns by it
        loss.total.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.prior.parameters())
        return
    for d in range(2):
        assert abs(prior[0, :, d].mean() - loc[d]) < 4 * scale[d] / math.sqrt(2000)
        assert abs(prior[0, :, d].std() / scale[d] - 1) < 4 / math.sqrt(2 * 2000)


def test_a_latent_given_another_one_is_compared_with_its_marginal_prior():
    def model(batch):
        with batch.plate():
            a = pyro.sample("a", dist.Normal(torch.tensor([4.0]), 3.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 4.0).to_event(1))
            batch.observe("x", dist.Normal(b, 1.0).to_event(1))

    def guide(batch):
        with batch.plate():
            pyro.sample("a", dist.Normal(torch.tensor([100.0]), 0.1).to_event(1))
            pyro.sample("b", dist.Normal(torch.tensor([0.0]), 0.1).to_event(1))

    kernel = Capture()
    MMD("b", kernel=kernel).evaluate(model, guide, mm.Batch({"x": torch.zeros(2000, 1)}), step=0)
    _, prior = kernel.last()
    assert abs(prior.mean() - 4) < 4 * 5 / math.sqrt(2000) and abs(prior.std() / 5 - 1) < 4 / math.sqrt(4000)


def test_a_reference_may_be_another_set_of_modalities_or_another_latent():
    model, guide = contract_pair("private", "product")
    batch = data(12)
    kernel = Capture()
    objective = MMD("z", "a", kernel=kernel, reference="b")
    (label,) = by_term(objective, model, guide, batch)
    assert label == "MMD(z | a; z | b)"
    z, other = kernel.last()
    both = batch.having("a") & batch.having("b")
    expected = squared_mmd(z[:, both], other[:, both], bandwidth=1.0, paired=True).detach()
    torch.testing.assert_close(by_term(objective, model, guide, batch)[label], -expected.squeeze() * both.sum())
    with pytest.raises(ValueError, match="expected latents of one dimension, got 3 of 'z' and 2 of 'w_a'"):
        by_term(MMD("z", reference=ALL, reference_site="w_a"), model, guide, batch)


def test_the_private_latent_of_a_modality_counts_where_the_modality_is():
    model, guide = contract_pair("private", "product")
    batch = data(12)
    kernel = Capture()
    objective = MMD("w_a", kernel=kernel)
    value = by_term(objective, model, guide, batch)["MMD(w_a | *; p(w_a))"]
    z, prior = kernel.last()
    has = batch.having("a")
    assert 2 < has.sum() < 11
    expected = squared_mmd(z[:, has], prior[:, has], bandwidth=1.0).squeeze().detach()
    torch.testing.assert_close(value, -expected * has.sum())
    with pytest.raises(ValueError, match="'w_a' is private to 'a', which the term does not encode"):
        by_term(MMD("w_a", "b"), model, guide, batch)
    with pytest.raises(ValueError, match="'w_a' is private to 'a', which the reference does not encode"):
        by_term(MMD("w_a", "a", reference="b"), model, guide, batch)


def test_the_loss_per_row_is_the_statistic_at_any_number_of_rows_and_of_the_data():
    model, guide = normal_pair()
    batch = rows(8)
    objective = mm.objectives.elbo() + MMD("z")
    alone = by_term(objective, model, guide, batch)
    part = batch.part_of(80)
    torch.testing.assert_close(by_term(objective, model, guide, part)[LABEL], 10 * alone[LABEL])

    def mean(size, repeats):
        parts = [many[i : i + size] for i in range(repeats)]
        each = [by_term(MMD("z", bandwidth=1.0), model, guide, part, i)[LABEL] for i, part in enumerate(parts)]
        return torch.stack(each) / size

    many = rows(600)
    small, large = mean(4, 200), mean(100, 50)
    assert abs(small.mean() - large.mean()) < 4 * math.hypot(small.std() / 200**0.5, large.std() / 50**0.5)
    assert small.mean() < -4 * small.std() / math.sqrt(200)


def test_sums_and_means_over_modalities_are_rows_of_their_own():
    model, guide = contract_pair("shared", "product")
    batch = data(12)
    values = by_term(MMD("z", EACH), model, guide, batch)
    assert list(values) == [f"MMD(z | {n}; p(z))" for n in "abc"]


# -- beside other terms -----------------------------------------------------------------------------------------------


ESTIMATORS = {
    "analytic": E.AnalyticKL, "particles": lambda: E.AnalyticKL(3), "iwae": lambda: E.IWAE(4),
    "one by one": lambda: E.IWAE(2, vectorize_particles=False), "dreg": lambda: E.DReG(3),
    "stl": lambda: E.StickTheLanding(2), "resampled": lambda: E.IWAE(3, resample=True), "trace": Trace_ELBO,
}  # fmt: skip


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_its_gradient_is_its_own_beside_every_estimator(name, vectorize):
    model, guide = normal_pair()
    batch = rows(6, missing=True)
    parameters = [*guide.parameters(), *model.parameters()]
    kernel = Capture()

    def gradient(weight):
        torch.manual_seed(0)
        base = mm.objectives.elbo(ESTIMATORS[name](), vectorize=vectorize)
        loss = (base + weight * MMD("z", kernel=kernel)).evaluate(model, guide, batch, step=0).total
        return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)

    without, whole = gradient(0.0), gradient(50.0)
    samples = kernel.samples[len(kernel.samples) // 2 :]
    statistic = torch.stack([squared_mmd(*pooled.chunk(2, -2), bandwidth=1.0).mean() for pooled in samples]).mean()
    alone = torch.autograd.grad(50 * 6 * statistic, parameters, allow_unused=True)
    assert alone[0].abs().max() > 1e-2
    for one, other, both in zip(without, alone, whole, strict=True):
        zero = torch.zeros_like(both)
        expected = (zero if one is None else one) + (zero if other is None else other)
        torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_it_is_of_every_posterior(posterior):
    model, guide = contract_pair("private", posterior)
    batch = data(10)
    objective = mm.objectives.elbo() + MMD("z", kernel="imq") + HSIC("z", "w_a") + SlicedWasserstein("w_c")
    loss = objective.evaluate(model, guide, batch, step=0)
    loss.total.backward()
    assert loss.total.isfinite() and all(v.isfinite() for v in loss.by_term.values()) and len(loss.by_term) == 4
    assert all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters())


def test_it_is_the_whole_guide_that_learns():
    model, guide = normal_pair(dist.Normal(torch.full((2,), 2.0), 0.5).to_event(1))
    batch = rows(64)
    before = by_term(MMD("z", bandwidth=1.0), model, guide, batch)[LABEL]
    objective = mm.objectives.elbo(kl=0) + 1000 * MMD("z", bandwidth=1.0)
    optimizer = lambda ps: torch.optim.Adam(ps, 0.1)  # noqa: E731
    mm.fit(model, guide, objective, batch, epochs=20, batch_size=16, optimizer=optimizer, progress=False, seed=0)
    assert by_term(MMD("z", bandwidth=1.0), model, guide, batch)[LABEL] > 0.2 * before


def test_double_precision_is_kept(double):
    model, guide = normal_pair()
    loss = (mm.objectives.elbo() + MMD("z") + SlicedWasserstein("z")).evaluate(model, guide, rows(6), step=0)
    assert loss.total.dtype == torch.float64


# -- text and refusals ------------------------------------------------------------------------------------------------


def test_the_text_has_sets_settings_and_weight():
    text = str(mm.objectives.elbo() + 10 * MMD("z", ("x", "y"), bandwidth=(1, 2), unbiased=False))
    assert "MMD(z | x+y; p(z)) gaussian kernel, bandwidth 1, 2, V-statistic weight 10" in text
    assert "surrogate: not a bound" in text
    (term,) = MMD("z", EACH, "imq", reference=ALL, reference_site="w").terms
    assert repr(term) == "sum_m MMD(z | m; w | *) imq kernel, median bandwidth, U-statistic"
    assert "Capture kernel" in str(MMD("z", kernel=Capture()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMD(3), "expected site to be the name of a latent site, got 3"),
        (lambda: MMD("z", kernel="rbf"), "expected kernel to be one of 'gaussian', 'imq'"),
        (lambda: MMD("z", kernel=Capture(), bandwidth=1.0), "expected bandwidth=None beside a kernel that is a func"),
        (lambda: MMD("z", bandwidth=-1), "expected bandwidth > 0"),
        (lambda: MMD("z", unbiased=1), "expected unbiased to be True or False"),
        (lambda: MMD("z", encode=None), "expected encode to be names or a symbol, got None"),
        (lambda: MMD("z", reference=None), "expected given to be names or a symbol, got None"),
        (lambda: SlicedWasserstein("z", projections=0), "expected projections >= 1"),
        (lambda: HSIC("z", "z"), "expected two latents whose dependence is measured, got 'z' twice"),
        (lambda: -1 * MMD("z"), "expected the weight of an objective >= 0, got -1"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_words(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_latents_that_cannot_be_compared_are_refused():
    model, guide = normal_pair()
    with pytest.raises(ValueError, match=r"MMD\(q \| \*; p\(q\)\): the guide has no latent site 'q', it has 'z'"):
        by_term(MMD("q"), model, guide, rows())
    with pytest.raises(ValueError, match="'u' is a modality that is not observed"):
        by_term(MMD("z", "u"), model, guide, rows())

    def discrete(infer):
        def program(batch):
            with batch.plate():
                k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer=infer)
                if program is model:
                    batch.observe("x", dist.Normal(k, 1.0))

        return program

    batch = mm.Batch({"x": torch.randn(5)})
    for infer, message in (({}, "is discrete, or has no rsample"), ({"enumerate": "parallel"}, "is enumerated")):
        model = discrete({})
        guide = discrete(infer)
        with pytest.raises(ValueError, match=f"'k' {message}"):
            by_term(Trace_ELBO() + MMD("k"), model, guide, batch)
        if infer:
            with pytest.raises(ValueError, match=f"'k' {message}"):
                by_term(MMD("k"), model, guide, batch)


def test_a_batch_too_small_is_refused():
    model, guide = normal_pair()
    with pytest.raises(ValueError, match=r"MMD\(z \| \*; p\(z\)\) compares the rows .* needs 2 of them, got 1: pass"):
        by_term(MMD("z"), model, guide, rows(1))
    assert by_term(MMD("z", unbiased=False), model, guide, rows(1))[LABEL].isfinite()

    objective = mm.objectives.elbo() + MMD("z")
    options = {"epochs": 1, "progress": False, "batch_size": 4}
    with pytest.raises(ValueError, match=r"the smallest minibatch has 1 of the 2 rows .*drop_last=True"):
        mm.fit(model, guide, objective, rows(13), **options)
    with pytest.raises(ValueError, match="the smallest minibatch of the validation rows has 1 of the 2 rows"):
        mm.fit(model, guide, objective, rows(12), validation=rows(5), **options)
    mm.fit(model, guide, objective, rows(13), drop_last=True, **options)


def test_an_estimate_of_four_rows_is_prepared_on_fewer_and_trained_on_no_fewer():
    model, guide = contract_pair("private", "product")
    full = mm.Batch({"a": torch.ones(7, 2, 2), "b": torch.randn(7, 3), "c": torch.arange(7) % 4})
    objective = mm.objectives.elbo() + HSIC("z", "w_a")
    assert objective.least_rows(full.names) == 4
    mm.fit(model, guide, objective, full, epochs=1, batch_size=7, progress=False)
    with pytest.raises(ValueError, match="the smallest minibatch has 3 of the 4 rows"):
        mm.fit(model, guide, objective, full, epochs=1, batch_size=4, progress=False)


def test_a_prior_whose_discrete_parent_would_get_no_gradient_is_refused():
    logits = torch.zeros(2, requires_grad=True)

    def model(batch):
        with batch.plate():
            k = pyro.sample("k", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(torch.tensor([[0.0], [3.0]])[k], 1.0).to_event(1))
            batch.observe("x", dist.Normal(z, 1.0).to_event(1))

    posterior = mm.conditionals.Normal(mm.nn.MLP(1, 2, ()))
    guide = mm.Guide(z=lambda batch: batch.encode("x", posterior))
    batch = mm.Batch({"x": torch.randn(6, 1)})
    with pytest.raises(ValueError, match="compares with draws of it, draws 'k' from the model's prior"):
        MMD("z").evaluate(model, guide, batch, step=0)
    logits.requires_grad_(False)
    assert MMD("z").evaluate(model, guide, batch, step=0).total.isfinite()


def test_a_term_that_compares_the_prior_with_itself_is_zero_in_the_mean():
    model, guide = normal_pair()
    each = torch.stack(
        [by_term(MMD("z", PRIOR), model, guide, rows(8), seed)["MMD(z | P; p(z))"] for seed in range(100)]
    )
    assert abs(each.mean()) < 3 * each.std() / 10


@pytest.mark.parametrize("depends", [False, True])
def test_a_latent_beside_an_enumerated_one_is_compared_unless_it_depends_on_it(depends):
    """The prior of z is a mixture over the class, which the pass sums out and the reference draws."""
    locs = torch.tensor([[-50.0], [50.0]])

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(locs[y], 1.0).to_event(1))
            batch.observe("x", dist.Normal(z, 1.0).to_event(1))

    def guide(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(locs[y] if depends else batch["x"], 1.0).to_event(1))

    kernel = Capture()
    objective = mm.objectives.elbo(E.IWAE(2)) + MMD("z", kernel=kernel)
    batch = mm.Batch({"x": torch.randn(8, 1)})
    if depends:
        with pytest.raises(
            ValueError, match="'z' depends on an enumerated site and has a draw for each of its classes"
        ):
            objective.evaluate(model, guide, batch, step=0)
        return
    assert objective.evaluate(model, guide, batch, step=0).total.isfinite()
    z, prior = kernel.last()
    assert z.shape == prior.shape == (2, 8, 1) and z.abs().max() < 10
    assert prior.min() < -40 and prior.max() > 40 and (prior.abs() > 40).all()
