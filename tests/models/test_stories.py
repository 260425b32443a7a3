"""Stories written outside the package: trained, scored against brute-force quadrature, and drawn from."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn

import pyro_mm as mm

NAN = math.nan
WEIGHTS = torch.tensor([0.6, 0.3, 0.1])  # p(y)
SHIFT = torch.tensor([-2.0, 0.0, 2.5])  # of a's log by y
RATE = torch.tensor([1.0, -1.0, 0.5])  # of b's log rate by y
REPEATS = 60
GRID = torch.linspace(-7.0, 7.0, 2801, dtype=torch.float64)


# -- (a) a continuous and a discrete latent, LogNormal and Poisson ---------------------------------


class Mixed:
    """p(y) p(z) LogNormal(a; w z + shift_y, 0.6) Poisson(b; exp(v z + rate_y)); parameters in closures.

    ``enumerate`` says whether y is summed out; ``latent`` is the size of z.
    """

    def __init__(self, latent=1, in_guide=True, enumerate=False):
        self.w, self.v = nn.Parameter(torch.full((latent,), 0.8)), nn.Parameter(torch.full((latent,), -0.5))
        self.encoder, self.label = nn.Linear(4, 2 * latent), nn.Linear(4, 3)
        self.shift, self.rate = nn.Parameter(SHIFT.clone()), nn.Parameter(RATE.clone())
        self.latent, self.in_guide = latent, in_guide
        self.infer = {"enumerate": "parallel"} if enumerate else {}
        with torch.no_grad():
            self.encoder.weight.mul_(0.3), self.encoder.bias.zero_()

    def parameters(self):
        extra = list(self.label.parameters()) if self.in_guide else []
        return [self.w, self.v, self.shift, self.rate, *self.encoder.parameters(), *extra]

    def likelihoods(self, z, y):
        return (
            dist.LogNormal(z @ self.w + self.shift[y], 0.6),
            dist.Poisson((z @ self.v + self.rate[y]).clamp(max=6.0).exp()),
        )

    def model(self, batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(WEIGHTS), infer=self.infer)
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            batch.observe("a", lambda z, y: self.likelihoods(z, y)[0], z, y)
            batch.observe("b", lambda z, y: self.likelihoods(z, y)[1], z, y)

    def features(self, batch):
        there = [batch.present[n] for n in "ab"]
        values = [batch["a"].log(), batch["b"].log1p()]
        values = [torch.where(m, x, torch.zeros_like(x)) for m, x in zip(there, values, strict=True)]
        columns = torch.broadcast_tensors(*values, *(m.float() for m in there))
        return torch.stack(columns, -1)

    def guide(self, batch):
        with batch.plate():
            h = self.features(batch)
            if self.in_guide:
                pyro.sample("y", dist.Categorical(logits=self.label(h)), infer=self.infer)
            loc, raw = self.encoder(h).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, 1.1 * raw.exp()).to_event(1))

    @torch.no_grad()
    def data(self, n, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            y, z = dist.Categorical(WEIGHTS).sample((n,)), torch.randn(n, self.latent)
            a, b = (d.sample() for d in self.likelihoods(z, y))
        return a, b

    @torch.no_grad()
    def log_joint(self, batch):
        """log p(y, z, x_present) + log dz on the grid, ``(3, G, N)``: the brute-force oracle (1-d z)."""
        y, z = torch.arange(3)[:, None, None], GRID[None, :, None]
        total = WEIGHTS.double().log()[y] + dist.Normal(0.0, 1.0).log_prob(z) + (GRID[1] - GRID[0]).log()
        a, b = batch["a"].double(), batch["b"].double()
        of_a = dist.LogNormal(z * self.w.double() + self.shift.double()[y], 0.6).log_prob(a)
        of_b = dist.Poisson((z * self.v.double() + self.rate.double()[y]).clamp(max=6.0).exp()).log_prob(b)
        return total + of_a * batch.present["a"] + of_b * batch.present["b"]


def some_missing(story, n=9):
    """Rows complete, without b, without a: a third each."""
    a, b = story.data(n)
    i = torch.arange(n)
    return mm.Batch({"a": a, "b": b}, present={"a": i % 3 != 2, "b": i % 3 != 1})


OPTIMIZER = {
    "optimizer": lambda ps: torch.optim.Adam(ps, 0.02),
    "progress": False,
    "seed": 0,
    "batch_size": 100,
}
ENUMERATING = {
    "TraceEnum": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "IWAE": lambda: mm.estimators.IWAE(5),
    "elbo": lambda: mm.objectives.elbo(),
    "mvae": lambda: mm.objectives.mvae(),
    "jmvae_kl": lambda: mm.objectives.jmvae_kl(0.2),
    "mvae by IWAE": lambda: mm.objectives.mvae(estimator=mm.estimators.IWAE(3)),
    "elbo by TraceEnum": lambda: mm.objectives.elbo(TraceEnum_ELBO()),
}
SAMPLING = {
    "Trace": lambda: Trace_ELBO(),
    "TraceGraph": lambda: TraceGraph_ELBO(),
    "elbo by Trace": lambda: mm.objectives.elbo(Trace_ELBO()),
    "elbo by TraceGraph": lambda: mm.objectives.elbo(TraceGraph_ELBO()),
}


def trained(story, objective, by_svi, epochs=25):
    """First and last losses, a row; perturbs the parameters first, so that there is something to learn."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in story.parameters():
            p.add_(0.5 * torch.randn_like(p))
    batch = some_missing(story, 120)
    model, guide = story.model, story.guide
    if not by_svi:
        history = mm.fit(model, guide, objective, batch, epochs=epochs, **OPTIMIZER)
        losses = history.to_dict()["loss"]
        assert len(losses) == epochs
    else:

        def registered(batch):  # plain SVI trains what is in Pyro's store
            for i, p in enumerate(story.parameters()):
                pyro.module(f"p{i}", _Holder(p))
            return guide(batch)

        svi = SVI(model, registered, pyro.optim.Adam({"lr": 0.02}), objective)
        losses = [svi.step(batch) / batch.size for _ in range(2 * epochs)]
    return sum(losses[:5]) / 5, sum(losses[-5:]) / 5


class _Holder(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p


@pytest.mark.parametrize("by_svi", [False, True], ids=["fit", "SVI"])
@pytest.mark.parametrize(("name", "latent"), list(zip(SAMPLING, [2, 1, 1, 2], strict=True)))
def test_a_discrete_latent_in_the_guide_trains(name, latent, by_svi):
    """The parameters start 0.5 off in every direction, from which losses fall by more than 1 nat a row.

    A fall of 0.3 is asked for; the noise of a mean of five losses over 120 rows is about 0.1.
    """
    story = Mixed(latent)
    before = [p.detach().clone() for p in story.parameters()]
    first, last = trained(story, SAMPLING[name](), by_svi)
    assert last < first - 0.3
    for p, old in zip(story.parameters(), before, strict=True):
        assert p.grad is not None or by_svi  # SVI clears gradients after its step
        assert (p != old).all()


@pytest.mark.parametrize(("name", "latent"), list(zip(ENUMERATING, [1, 2, 1, 2, 1, 2, 1], strict=True)))
def test_a_discrete_latent_in_the_model_only_trains(name, latent):
    story = Mixed(latent, in_guide=False, enumerate=True)
    first, last = trained(story, ENUMERATING[name](), by_svi=False, epochs=15)
    assert last < first - 0.3
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in story.parameters())


@pytest.mark.parametrize("name", ["TraceEnum", "IWAE", "mvae"])
def test_a_discrete_latent_in_the_model_only_trains_under_plain_svi(name):
    story = Mixed(in_guide=False, enumerate=True)
    first, last = trained(story, ENUMERATING[name](), by_svi=True, epochs=10)
    assert last < first - 0.3


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceGraph_ELBO])
def test_sampling_estimators_refuse_a_discrete_latent_in_the_model_only(estimator):
    story = Mixed(in_guide=False, enumerate=True)
    batch = some_missing(story)
    for objective in (mm.objectives.elbo(estimator()), mm.objectives.mvae(estimator=estimator())):
        for evaluate in (objective.loss, objective.loss_and_grads):
            with pytest.raises(ValueError, match=r"'y'.*model only"):
                evaluate(story.model, story.guide, batch)


def test_pathwise_estimators_refuse_a_sampled_discrete_site():
    story = Mixed()
    for estimator in (mm.estimators.IWAE(2), mm.estimators.DReG(2), mm.estimators.StickTheLanding()):
        with pytest.raises(ValueError, match="'y'"):
            mm.objectives.elbo(estimator).loss(story.model, story.guide, some_missing(story))


VARIANTS = {
    "model only": (False, True),
    "in guide, enumerated": (True, True),
    "in guide, sampled": (True, False),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_evidence_agrees_with_quadrature(variant):
    """Every row within 1e-2 and within three standard errors, at 20,000 particles and one fixed seed.

    With nine rows of nearly normal error a failure by chance has probability 2.4 %: the seed settles it.
    """
    in_guide, enumerate = VARIANTS[variant]
    story = Mixed(in_guide=in_guide, enumerate=enumerate)
    if variant == "in guide, sampled":  # a proposal of y that is not far off, to reach 1e-2
        nn.init.zeros_(story.label.weight), story.label.bias.data.copy_(torch.tensor([0.5, 0.5, 0.0]))
    batch = some_missing(story)
    exact = story.log_joint(batch).logsumexp((0, 1))
    evidence = mm.log_marginal(story.model, story.guide, batch, num_particles=20_000, seed=2)
    error = (evidence.log_prob - exact).abs()
    if variant != "in guide, sampled":
        assert error.max() < 1e-2
    assert (error < 3 * evidence.standard_error + 1e-5).all()
    assert evidence.standard_error.max() < 0.03
    for one in "ab":  # and with either modality masked out of every row
        only = batch.only(one)
        exact = story.log_joint(only).logsumexp((0, 1))
        evidence = mm.log_marginal(story.model, story.guide, only, num_particles=20_000, seed=3)
        error = (evidence.log_prob - exact).abs()[only.present[one]]
        assert (error < 3.5 * evidence.standard_error[only.present[one]] + 1e-5).all()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_row_with_nothing_present_counts_nothing(variant):
    in_guide, enumerate = VARIANTS[variant]
    story = Mixed(in_guide=in_guide, enumerate=enumerate)
    only = some_missing(story).only("a")
    empty = ~only.present["a"]
    assert mm.log_weights(story.model, story.guide, only, 5)[:, empty].abs().max() < 1e-6
    assert mm.log_marginal(story.model, story.guide, only, num_particles=20).log_prob[empty].abs().max() < 1e-6
    objective = mm.objectives.elbo(None if enumerate else Trace_ELBO())
    assert abs(objective.loss(story.model, story.guide, only[empty])) < 1e-6


def test_a_discrete_private_latent_of_an_absent_modality_counts_nothing():
    """w_a in {0, 1, 2} shifts a, and a is missing: log p(b) = log N(b; 0, sqrt 2), q(z) exact."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w_a", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            batch.observe("a", lambda z, w: dist.Normal(z + SHIFT[w], 1.0), z, w)
            batch.observe("b", lambda z: dist.Normal(z, 1.0), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["b"] / 2, math.sqrt(0.5)))

    batch = mm.Batch({"a": torch.randn(3), "b": torch.randn(3)}).only("b")
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(batch["b"])
    torch.testing.assert_close(mm.log_marginal(model, guide, batch, num_particles=10).log_prob, exact)


@pytest.mark.parametrize("name", ["jmvae_kl", "mvae by IWAE"])
def test_the_loss_of_enumerated_terms_does_not_depend_on_how_they_are_stacked(name):
    """Values of the two ways agree, in a mean over 60 evaluations, within five standard errors of it."""
    story = Mixed(in_guide=False, enumerate=True)
    batch = some_missing(story)[:4]
    objective = ENUMERATING[name]()
    apart = mm.objectives.Objective(objective.terms, objective.estimator, vectorize=False)
    losses = [
        torch.tensor([o.loss(story.model, story.guide, batch) for _ in range(REPEATS)]) for o in (objective, apart)
    ]
    error = math.sqrt(sum(x.var().item() / REPEATS for x in losses))
    assert abs(losses[0].mean() - losses[1].mean()) < 5 * error


@pytest.mark.parametrize("name", ["jmvae_kl", "mvae"])
def test_the_loss_of_enumerated_terms_of_one_row_does_not_depend_on_how_they_are_stacked(name):
    story = Mixed(in_guide=False, enumerate=True)
    batch = some_missing(story)[:1]
    objective = ENUMERATING[name]()
    apart = mm.objectives.Objective(objective.terms, objective.estimator, vectorize=False)
    losses = [
        torch.tensor([o.loss(story.model, story.guide, batch) for _ in range(REPEATS)]) for o in (objective, apart)
    ]
    error = math.sqrt(sum(x.var().item() / REPEATS for x in losses))
    assert abs(losses[0].mean() - losses[1].mean()) < 5 * error


def test_particles_as_many_as_rows_and_classes_as_many_as_terms_are_not_confused(double):
    """T = C = 3, K = N = 4, and z drawn given y, so of shape (C, K, T, N): against the pass of one more row.

    All sites of the guide are deterministic given y, so that losses are exact.
    """

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(WEIGHTS.double()))
            z = pyro.sample("z", dist.Normal(SHIFT[y], 1.0))
            for n, sign in (("a", 1.0), ("b", -1.0)):
                batch.observe(n, lambda z, sign=sign: dist.Normal(sign * z, 1.0), z)

    class Still(dist.Normal):
        def rsample(self, sample_shape=()):
            return self.loc.expand(self.shape(sample_shape))

        def expand(self, batch_shape, _instance=None):
            return Still(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def guide(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            loc = sum(torch.where(batch.present[n], batch[n], 0.0) for n in "ab")
            pyro.sample("z", Still(0.5 * SHIFT[y] + loc, torch.ones(())))

    batch = mm.Batch({"a": torch.randn(5), "b": torch.randn(5)})
    objective = mm.objectives.mvae(estimator=mm.estimators.IWAE(4))
    each = [objective.loss(model, guide, batch[rows]) for rows in (slice(5), slice(4), slice(4, 5), slice(2, 5))]
    one_by_one = mm.objectives.Objective(objective.terms, objective.estimator, vectorize=False)
    whole = [one_by_one.loss(model, guide, batch[rows]) for rows in (slice(5), slice(4), slice(4, 5), slice(2, 5))]
    assert each == pytest.approx(whole, rel=1e-10)


def test_generate_draws_the_discrete_site_from_its_posterior():
    """E[log a] by quadrature over q(z | b) p(y | z, b), which is what generate promises, q being the guide.

    The draws' mean within five standard errors (p < 1e-6).
    """
    story = Mixed(in_guide=False, enumerate=True)
    b = torch.tensor([0.0, 3.0, 9.0])
    batch = mm.Batch({"a": torch.ones(3), "b": b}, present={"a": torch.zeros(3, dtype=torch.bool)})
    draws = mm.generate(story.model, story.guide, batch, num_samples=4000)["a"].log()
    q = mm.encode(story.guide, batch)["z"]
    with torch.no_grad():
        y_given_z = story.log_joint(batch).softmax(0)  # (3, G, N)
        log_q = dist.Normal(q.mean[..., 0].double(), q.variance[..., 0].double().sqrt()).log_prob(GRID[:, None])
        q_z = log_q.softmax(0)
        mean_a = GRID[None, :, None] * story.w.double() + story.shift.double()[:, None, None]
        exact = (q_z * (y_given_z * mean_a).sum(0)).sum(0)
        prior = (q_z * (WEIGHTS.double()[:, None, None] * mean_a).sum(0)).sum(0)
    error = draws.std(0) / math.sqrt(4000)
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()
    assert ((prior - exact).abs() > 10 * error).any()  # the prior of y would be seen


@pytest.mark.parametrize("rows", ["all empty", "some empty"])
def test_generate_draws_the_discrete_site_from_its_prior_where_nothing_is_present(rows):
    """E[log a] = sum_y p(y) shift_y = -0.95 (uniform: 0.17); standard error sqrt(4 / 8000), tolerance 5."""
    story = Mixed(in_guide=False, enumerate=True)
    full = mm.Batch({"a": torch.ones(4), "b": torch.ones(4)})
    first = torch.arange(4) < 1
    some = mm.Batch({"a": torch.ones(4), "b": torch.ones(4)}, {"a": first, "b": first})
    batch = mm.Batch.empty(4, like=full) if rows == "all empty" else some
    draws = mm.generate(story.model, story.guide, batch, num_samples=2667)["a"].log()[:, 1:]
    exact = (WEIGHTS * SHIFT).sum()
    assert (draws.mean() - exact).abs() < 5 * draws.std() / math.sqrt(draws.numel())


@pytest.mark.parametrize("chunk", [3, 11, 10**6])
def test_chunks_change_nothing_where_a_guide_draws_z_given_an_enumerated_y(chunk):
    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(SHIFT[y], 1.0))
            batch.observe("a", lambda z: dist.Normal(z, 1.0), z)

    def guide(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.5 * SHIFT[y] + 0.5 * batch["a"], 1.0))

    batch = mm.Batch({"a": torch.randn(8)})
    whole = mm.log_marginal(model, guide, batch, num_particles=40, seed=0, chunk=10**9)
    part = mm.log_marginal(model, guide, batch, num_particles=40, seed=0, chunk=chunk)
    torch.testing.assert_close(part.log_prob, whole.log_prob, rtol=1e-5, atol=1e-5)


# -- (b) an observed modality that is the parent of another one ------------------------------------


def continuous_chain(batch):
    """z ~ N(0, 1), a | z ~ N(0.7 z, 0.5), b | z, a ~ N(sin(a) + 0.5 z, 0.4)."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        a = batch.observe("a", lambda z: dist.Normal(0.7 * z, 0.5), z)
        batch.observe("b", lambda z, a: dist.Normal(a.sin() + 0.5 * z, 0.4), z, a)


def discrete_chain(batch):
    """z ~ N(0, 1), a | z in {0, 1, 2}, b | z, a ~ N(shift_a + 0.5 z, 0.8)."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        a = batch.observe("a", lambda z: dist.Categorical(logits=torch.stack([z, -z, 0.3 * z], -1)), z)
        batch.observe("b", lambda z, a: dist.Normal(SHIFT.to(z.dtype)[a.long()] + 0.5 * z, 0.8), z, a)


def wide_guide(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.2))


def chain_evidence(kind, batch):
    """log p(x_present) by quadrature over (z, a)."""
    z = GRID[::14, None, None]  # (Z, 1, 1)
    log_z = dist.Normal(0.0, 1.0).log_prob(z) + (14 * (GRID[1] - GRID[0])).log()
    b = batch["b"].double()

    def parts(a, log_da):
        if kind == "continuous":
            of_a, mean, scale = dist.Normal(0.7 * z, 0.5).log_prob(a), a.sin() + 0.5 * z, 0.4
        else:
            of_a = dist.Categorical(logits=torch.stack([z, -z, 0.3 * z], -1)).log_prob(a)
            mean, scale = SHIFT.double()[a] + 0.5 * z, 0.8
        of_b = dist.Normal(mean, scale).log_prob(b) * batch.present["b"]
        return log_z + of_a + log_da + of_b

    grid = (torch.arange(3)[:, None], 0.0)
    if kind == "continuous":
        grid = (GRID[::7, None], (7 * (GRID[1] - GRID[0])).log())
    absent = parts(*grid).logsumexp((0, 1))
    values = batch["a"].double() if kind == "continuous" else batch["a"]
    present = parts(values[None], 0.0).logsumexp((0, 1))
    empty = ~(batch.present["a"] | batch.present["b"])
    return torch.where(batch.present["a"], present, absent).masked_fill(empty, 0.0)


def chain(kind):
    a = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5, -0.2]) if kind == "continuous" else torch.tensor([0, 1, 2, 1, 0, 2])
    present = {"a": torch.tensor([1, 0, 0, 1, 0, 0]).bool(), "b": torch.tensor([1, 1, 1, 0, 1, 0]).bool()}
    values = {"a": a, "b": torch.tensor([1.0, -0.5, 2.0, 0.3, -1.4, 0.1])}
    return (continuous_chain if kind == "continuous" else discrete_chain), mm.Batch(values, present)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_evidence_with_an_absent_parent_agrees_with_quadrature(kind):
    """Six rows, among them one with nothing; then without the parent in any row.

    Tolerance 3.5 standard errors (0.05 % a comparison) of at most 0.02; the filler in place of the draw would be
    off by over 0.5.
    """
    model, batch = chain(kind)
    for rows in (batch, batch.without("a")):
        exact = chain_evidence(kind, rows)
        evidence = mm.log_marginal(model, wide_guide, rows, num_particles=20_000, seed=1)
        assert ((evidence.log_prob - exact).abs() < 3.5 * evidence.standard_error + 1e-5).all()
        assert evidence.standard_error.max() < 0.02
        assert abs(evidence.log_prob[5]) < 1e-12


@pytest.mark.parametrize("everywhere", [False, True])
def test_evidence_with_an_absent_root_parent(everywhere):
    """a ~ N(0, 1) has no latent parent (a semi-supervised label, say): b ~ N(z + a, 1) is N(0, 3)."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            a = batch.observe("a", dist.Normal(0.0, 1.0))
            batch.observe("b", lambda z, a: dist.Normal(z + a, 1.0), z, a)

    batch = mm.Batch({"a": torch.tensor([1.0, NAN, NAN]), "b": torch.tensor([0.4, 1.0, -2.0])})
    batch = batch.without("a") if everywhere else batch
    exact = dist.Normal(0.0, math.sqrt(3)).log_prob(batch["b"])[1:]
    evidence = mm.log_marginal(model, wide_guide, batch, num_particles=20_000, seed=0)
    assert ((evidence.log_prob[1:] - exact).abs() < 4 * evidence.standard_error[1:]).all()


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_tables_decode_from_draws_of_an_absent_parent(kind, vectorize):
    """IWAE's (b, b, P) on rows that have both bounds log p(b), a marginalised: tight at K = 4000.

    Within 0.15 over the four rows, each of standard error below 0.03 (the filler would be off by over 0.5).
    """
    model, batch = chain(kind)
    rows = batch[[0, 1, 2, 4]]
    table = mm.objectives.Objective(
        [mm.objectives.Term("b", "b"), mm.objectives.Term(mm.objectives.ALL, mm.objectives.ALL)],
        mm.estimators.IWAE(4000),
        vectorize=vectorize,
    )
    torch.manual_seed(5)
    table.loss(model, wide_guide, rows)
    exact = [chain_evidence(kind, x).sum().item() for x in (rows.only("b"), rows)]
    assert list(map(float, table.by_term.values())) == pytest.approx(exact, abs=0.15)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", ["elbo", "mvae", "Trace"])
def test_an_absent_parent_trains_in_minibatches(name, everywhere):
    """b | z, a ~ N(z + w a + c, 1), b about 4: the loss falls by far more than its noise, and c goes up to b."""
    w, c = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))
            a = batch.observe("a", lambda z: dist.Normal(w * z, 1.0), z)
            batch.observe("b", lambda z, a: dist.Normal(z + w * a + c, 1.0), z, a)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))

    batch = mm.Batch({"a": torch.randn(50), "b": 4 + torch.randn(50)}, {"a": torch.arange(50) > 20})
    batch = batch.without("a") if everywhere else batch
    objective = {"elbo": mm.objectives.elbo, "mvae": mm.objectives.mvae, "Trace": Trace_ELBO}[name]()
    options = OPTIMIZER | {"optimizer": lambda ps: torch.optim.Adam(ps, 0.1), "batch_size": 20}
    losses = mm.fit(model, guide, objective, batch, epochs=15, **options).to_dict()["loss"]
    assert losses[-1] < losses[0] - 2 and c > 2


# -- (c) plain Pyro --------------------------------------------------------------------------------


def shipped():
    gaussian = mm.models.LinearGaussian({"a": torch.randn(2, 2), "b": torch.randn(3, 2)}, noise=0.8)
    normal = lambda i, o: mm.conditionals.Normal(nn.Linear(i, 2 * o))  # noqa: E731
    encoders = {"a": normal(2, 2), "b": normal(3, 2)}
    z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    w = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    posterior = lambda: mm.posteriors.ProductOfExperts(copy.deepcopy(encoders))  # noqa: E731
    shared = mm.models.SharedLatent(z, {"a": normal(2, 2), "b": normal(2, 3)})
    private = mm.models.PrivateLatents(z, {"a": w}, {"a": normal(3, 2), "b": normal(2, 3)})
    own = mm.posteriors.Private("a", normal(2, 1))
    return {
        "LinearGaussian": (gaussian, mm.Guide(z=posterior())),
        "SharedLatent": (shared, mm.Guide(z=posterior())),
        "PrivateLatents": (private, mm.Guide(z=posterior(), w_a=own)),
    }


def shipped_batch(n=12):
    i = torch.arange(n)
    return mm.Batch({"a": torch.randn(n, 2), "b": torch.randn(n, 3)}, {"a": i % 3 != 0, "b": i % 4 != 0})


STORIES = ["LinearGaussian", "SharedLatent", "PrivateLatents"]


@pytest.mark.parametrize("name", STORIES)
def test_shipped_pairs_work_under_plain_svi_and_predictive(name):
    model, guide = shipped()[name]
    batch = shipped_batch()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    before = copy.deepcopy([*model.state_dict().values(), *guide.state_dict().values()])
    losses = [svi.step(batch) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    for old, new in zip(before, [*model.state_dict().values(), *guide.state_dict().values()], strict=True):
        assert not torch.equal(old, new)
    drawn = Predictive(poutine.uncondition(model), guide=guide, num_samples=7)(batch)
    assert drawn["a"].shape[0] == 7 and drawn["a"].shape[-2:] == (12, 2) and drawn["b"].shape[-2:] == (12, 3)
    assert len(drawn["a"].unique()) == 7 * 12 * 2  # nothing is the data, or the filler


def test_an_outside_story_works_under_predictive():
    """Draws of b by Predictive and by generate agree in mean, the parent absent: z-scores below 4.5."""
    model, batch = chain("continuous")
    batch = batch.without("a")
    drawn = Predictive(poutine.uncondition(model), guide=wide_guide, num_samples=800)(batch)["b"]
    ours = mm.generate(model, wide_guide, batch, 800)["b"]
    z = (drawn.mean(0).squeeze() - ours.mean(0)) / (drawn.var(0).squeeze() / 800 + ours.var(0) / 800).sqrt()
    assert (z[:5].abs() < 4.5).all()


@pytest.mark.parametrize("vectorized", [True, False])
def test_pyros_own_elbo_of_a_pair_is_our_own(vectorized, double):
    """One seed gives the particles of both; value and gradient agree exactly."""
    model, guide = (x.double() for x in shipped()["PrivateLatents"])
    batch = mm.Batch({n: shipped_batch()[n].double() for n in "ab"}, shipped_batch().present)
    grads = []
    options = {"num_particles": 3, "vectorize_particles": vectorized}
    for elbo in (Trace_ELBO(max_plate_nesting=1, **options), mm.objectives.elbo(Trace_ELBO(**options))):
        model.zero_grad(), guide.zero_grad()
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(model, guide, batch)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in [*model.parameters(), *guide.parameters()])])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# -- (d), (e) plates -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORIES)
def test_every_observed_site_of_a_shipped_story_lies_in_the_plate_modalities(name):
    model, guide = shipped()[name]
    for batch in (shipped_batch(), shipped_batch().only("a"), shipped_batch().only(), shipped_batch()[:1]):
        drawn = poutine.trace(guide).get_trace(batch)
        sites = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(batch).nodes
        frames = {n: {f.name: f for f in s["cond_indep_stack"]} for n, s in sites.items() if n in "ab z w_a"}
        assert set(frames) == {"a", "b", "z"} | ({"w_a"} if name == "PrivateLatents" else set())
        assert {n for n, s in sites.items() if s.get("is_observed")} == {"a", "b"}
        for site, stack in frames.items():
            assert stack["data"].dim == -1
            assert ("modalities" in stack) == (site != "z")
        assert frames["a"]["modalities"].counter != frames["b"]["modalities"].counter


@pytest.mark.parametrize("name", ["Trace", "IWAE", "mvae", "jmvae_kl"])
def test_pyros_own_data_plate_serves_as_well(name, double):
    """Equal losses, to the last digits, for complete and incomplete rows."""
    w = torch.randn(2, 2, dtype=torch.float64)
    full, rows = torch.randn(6, 2), torch.arange(6)
    # row 2 has nothing present, of which only batch.plate() could tell Pyro's own ELBO: not so in its case
    batch = mm.Batch({"a": full, "b": full.exp()}, {"a": rows != 2, "b": rows > (1 if name == "Trace" else 2)})

    def pair(plate):
        def model(b):
            with plate(b):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                b.observe("a", lambda z: dist.Normal(z @ w, 1.0).to_event(1), z)
                b.observe("b", lambda z: dist.LogNormal(z, 1.0).to_event(1), z)

        def guide(b):
            with plate(b):
                total = sum(torch.where(b.present[n][..., None], b[n], 0.0) for n in "ab")
                pyro.sample("z", dist.Normal(0.2 * total, 0.9).to_event(1))

        return model, guide

    elbos = {"Trace": lambda: Trace_ELBO(3), "IWAE": lambda: mm.estimators.IWAE(3)} | ENUMERATING
    losses = []
    for plate in (lambda b: b.plate(), lambda b: pyro.plate("data", b.size, dim=-1)):
        torch.manual_seed(4)
        loss = elbos[name]().loss(*pair(plate), batch)
        torch.manual_seed(4)
        evidence = mm.log_marginal(*pair(plate), batch, num_particles=50, seed=0).log_prob
        losses.append((loss, evidence))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-12, atol=1e-12)


# -- (f) several latents ---------------------------------------------------------------------------


def test_a_guide_that_draws_one_latent_given_the_other(double):
    """u ~ N(0, 1), v | u ~ N(u, 1), a | v ~ N(v, 1): with the exact posterior every weight is log N(a; 0, 3).

    q(v | a) = N(2a/3, 2/3); q(u | v) = N(v/2, 1/2).
    """

    def model(batch):
        with batch.plate():
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Normal(u, 1.0))
            batch.observe("a", lambda v: dist.Normal(v, 1.0), v)

    slope = torch.tensor(0.5, requires_grad=True)

    def guide(batch):
        with batch.plate():
            loc = torch.where(batch.present["a"], 2 / 3 * batch["a"], 0.0)
            scale = torch.where(batch.present["a"], math.sqrt(2 / 3), math.sqrt(2.0))
            v = pyro.sample("v", dist.Normal(loc, scale))
            pyro.sample("u", dist.Normal(slope * v, math.sqrt(0.5)))

    batch = mm.Batch({"a": torch.tensor([0.3, -2.0, 1.0, 0.0])})
    exact = dist.Normal(0.0, math.sqrt(3.0)).log_prob(batch["a"])
    weights = mm.log_weights(model, guide, batch, 5)
    torch.testing.assert_close(weights, exact.expand(5, 4), rtol=1e-12, atol=1e-12)
    for estimator in (mm.estimators.IWAE(4), mm.estimators.Renyi(0.5, 4), mm.objectives.elbo(Trace_ELBO())):
        assert estimator.loss(model, guide, batch) == pytest.approx(-exact.sum().item(), rel=1e-12)
    evidence = mm.log_marginal(model, guide, batch, num_particles=30, chunk=3)
    torch.testing.assert_close(evidence.log_prob, exact, rtol=1e-10, atol=1e-10)
    for estimator in (mm.estimators.DReG(4), mm.estimators.StickTheLanding(4)):
        (grad,) = torch.autograd.grad(estimator.differentiable_loss(model, guide, batch), slope)
        assert abs(grad) < 1e-12  # it vanishes, draw by draw, where the guide is exact
    (grad,) = torch.autograd.grad(mm.estimators.IWAE(4).differentiable_loss(model, guide, batch), slope)
    assert abs(grad) > 1e-3  # and that of IWAE does not


def test_a_term_that_is_given_what_it_encodes_is_zero_for_dependent_latents(double):
    slope = torch.tensor([0.5, -0.3])

    def model(batch):
        with batch.plate():
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Normal(u, 1.0))
            for n in "ab":
                batch.observe(n, lambda v: dist.Normal(v, 1.0), v)

    def guide(batch):
        with batch.plate():
            loc = sum(torch.where(batch.present[n], s * batch[n], 0.0) for n, s in zip("ab", slope, strict=True))
            u = pyro.sample("u", dist.Normal(loc, 0.7))
            pyro.sample("v", dist.Normal(0.4 * u + loc, 0.9))

    batch = mm.Batch({"a": torch.randn(5), "b": torch.randn(5)}, {"a": torch.arange(5) > 0, "b": torch.arange(5) < 3})
    for sets in (("a", "b"), ("a",), ("b",)):
        for estimator in (mm.estimators.AnalyticKL(3), mm.estimators.IWAE(3), Trace_ELBO(3)):
            table = mm.objectives.Objective([mm.objectives.Term(sets, (), sets)], estimator)
            assert abs(table.loss(model, guide, batch)) < 1e-12


def test_a_private_latent_is_masked_where_its_modality_is_not_decoded(double):
    """(a, a, P) neither draws a gradient nor counts a KL for w_b; by hand against a story without w_b."""
    model, guide = (x.double() for x in shipped()["PrivateLatents"])
    batch = mm.Batch({"a": torch.randn(6, 2), "b": torch.randn(6, 3)}, {"a": torch.arange(6) > 1})
    term = mm.objectives.Objective([mm.objectives.Term(("a", "b"), "b")])
    model.zero_grad(), guide.zero_grad()
    torch.manual_seed(0)
    loss = term.loss_and_grads(model, guide, batch)
    assert all(p.grad is None or not p.grad.any() for p in guide.posteriors["w_a"].parameters())
    without = mm.models.PrivateLatents(model.prior, {}, {"b": model.decoders["b"]})
    torch.manual_seed(0)
    bare = mm.objectives.Objective([mm.objectives.Term(("a", "b"), "b")])
    assert loss == pytest.approx(bare.loss(without, mm.Guide(z=guide.posteriors["z"]), batch), rel=1e-10)
    with_a = mm.objectives.Objective([mm.objectives.Term(("a", "b"), ("a", "b"))])
    with_a.loss_and_grads(model, guide, batch)
    assert all(p.grad.any() for p in guide.posteriors["w_a"].parameters())
    private = mm.log_marginal(model, guide, batch.only("b"), num_particles=5, seed=0).log_prob
    bare = mm.log_marginal(without, mm.Guide(z=guide.posteriors["z"]), batch.only("b"), num_particles=5, seed=0)
    torch.testing.assert_close(private, bare.log_prob, rtol=1e-10, atol=1e-10)


def test_a_story_that_does_not_broadcast_runs_term_by_term_and_particle_by_particle():
    """It indexes rows as the first dimension: an error says how to go on, and going on gives the broadcast numbers."""

    def story(first):
        def run(batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pick = (lambda i: z[:, i]) if first else (lambda i: z[..., i])
                batch.observe("a", dist.Normal(pick(0), 0.5))
                batch.observe("b", dist.Normal(pick(1) - pick(0), 0.5))

        return run

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.8).to_event(1))

    batch = mm.Batch({"a": torch.randn(6), "b": torch.randn(6)}, present={"b": torch.arange(6) > 1})
    rowwise, broadcast = story(first=True), story(first=False)
    for objective in (mm.objectives.mvae(estimator=mm.estimators.IWAE(3)), mm.objectives.elbo(mm.estimators.IWAE(3))):
        with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
            objective.loss(rowwise, guide, batch)
        assert "vectorize=False" in "".join(caught.value.__notes__)
    estimator = mm.estimators.IWAE(3, vectorize_particles=False)
    losses = []
    for which in (rowwise, broadcast):
        torch.manual_seed(0)
        losses.append(mm.objectives.mvae(estimator=estimator, vectorize=False).loss(which, guide, batch))
    assert losses[0] == losses[1]
    found = mm.log_marginal(rowwise, guide, batch, num_particles=400, seed=0, vectorize=False)
    other = mm.log_marginal(broadcast, guide, batch, num_particles=400, seed=1)
    both = (found.standard_error.square() + other.standard_error.square()).sqrt()
    # six differences: |t| > 4.5 in one of them with probability 4e-5
    assert ((found.log_prob - other.log_prob).abs() < 4.5 * both).all()
    draws = mm.generate(rowwise, guide, batch, num_samples=3, vectorize=False)
    assert {n: tuple(x.shape) for n, x in draws.items()} == {"a": (3, 6), "b": (3, 6)}
