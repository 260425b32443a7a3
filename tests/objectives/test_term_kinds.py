"""A table takes terms of other kinds than densities and penalties: here a statistic of a batch's latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, Objective, Term, tables
from pyro_mm.objectives.concrete_terms import TermKind
from pyro_mm.scoring.importance import score
from pyro_mm.scoring.structure import pair_structure
from pyro_mm.scoring.views import TermViews
from tests.support.contract import decoders
from tests.support.contract import pair as contract_pair

E = mm.estimators
LATENT = 3


class SquaredMean(TermKind):
    """Minus the squared norm of the mean of z under q, over the rows and particles of a batch."""

    needs_draws = True
    only_loosens = True

    def values(self, terms, scores, estimator):
        z = scores.draws.latent("z")
        rows = scores.draws.counts[None, ..., None].to(z.dtype)
        mean = (z * rows).sum((0, 2)) / (len(z) * rows.sum((0, 2)))
        return [-term.kl * m.square().sum() for term, m in zip(terms, mean, strict=True)]


class SquaredNorm(TermKind):
    """Minus the squared norm of z, row by row."""

    needs_draws = True

    def values(self, terms, scores, estimator):
        norm = scores.draws.latent("z").square().sum(-1).mean(0)
        return [-term.kl * x for term, x in zip(terms, norm, strict=True)]


class MeanTerm(Term):
    kind = SquaredMean()


class NormTerm(Term):
    kind = SquaredNorm()


class Pair:
    """A story, and a guide that keeps the latents of each of its runs."""

    def __init__(self):
        self.model = mm.models.SharedLatent(
            dist.Normal(torch.zeros(LATENT), 1.0).to_event(1), decoders(dict.fromkeys("abc", LATENT))
        )
        self.posterior = mm.posteriors.ProductOfExperts(
            {
                "a": mm.conditionals.Normal(mm.nn.MLP(4, 2 * LATENT, (8,))),
                "b": mm.conditionals.Normal(mm.nn.MLP(3, 2 * LATENT, (8,))),
                "c": mm.conditionals.Normal(torch.nn.Embedding(4, 2 * LATENT)),
            }
        )
        self.latents = []

        def guide(batch):
            with batch.plate():
                self.latents.append(pyro.sample("z", self.posterior(batch)))

        self.guide = guide

    @property
    def parameters(self):
        return [*self.model.parameters(), *self.posterior.parameters()]

    def gradients(self):
        found = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return found


def full_rows(size=5):
    return mm.Batch({"a": torch.bernoulli(torch.full((size, 2, 2), 0.5)), "b": torch.randn(size, 3) + 2,
                     "c": torch.arange(size) % 4})  # fmt: skip


def some_rows(size=6):
    rows = full_rows(size)
    b = torch.arange(size) % 2 == 0
    return mm.Batch({n: rows[n] for n in rows.names}, present={"b": b, "a": torch.arange(size) != 0})


def by_hand(z, rows):
    """The squared norm of the mean of ``(K, N, d)`` over particles and those rows."""
    return z[:, rows].mean((0, 1)).square().sum()


def table(weight=0.5, kind=MeanTerm):
    return [Term(ALL, ALL), Term(EACH, EACH), kind(ALL, (), kl=weight)]


def evaluated(objective, pair, batch, seed=0, step=0):
    pair_structure(pair.model, pair.guide, batch)  # which runs the guide
    pair.latents.clear()
    torch.manual_seed(seed)
    loss = objective.evaluate(pair.model, pair.guide, batch, step=step)
    return loss, pair.latents.copy()


LABEL = "SquaredMean (*, -, P)"


def test_a_batch_statistic_is_its_value_by_hand_in_one_pass_with_a_table():
    pair, batch = Pair(), full_rows()
    loss, latents = evaluated(Objective(table()), pair, batch)
    assert len(latents) == 1 and latents[0].shape == (5, 5, LATENT)  # one pass of five terms
    expected = -0.5 * len(batch) * by_hand(latents[0][None, 4], torch.arange(5))
    torch.testing.assert_close(loss.by_term[LABEL], expected.detach())
    torch.testing.assert_close(loss.total.detach(), -sum(loss.by_term.values()))

    # its gradient is that of the statistic alone, beside that of a table without it
    plain, _ = evaluated(Objective([*table()[:2], Term(ALL, (), kl=0.0)]), pair, batch)
    plain.total.backward()
    without = pair.gradients()
    loss, latents = evaluated(Objective(table()), pair, batch)
    loss.total.backward()
    whole = pair.gradients()
    _, latents = evaluated(Objective(table()), pair, batch)
    (0.5 * len(batch) * by_hand(latents[0][None, 4], torch.arange(5))).backward()
    alone = pair.gradients()
    assert any(g is not None and g.abs().max() > 1e-3 for g in alone)
    for one, other, both in zip(without, alone, whole, strict=True):
        zero = torch.zeros_like(both)
        expected = (zero if one is None else one) + (zero if other is None else other)
        torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)


def test_rows_in_which_it_does_not_count_and_padding_leave_a_statistic_alone():
    pair, batch = Pair(), some_rows()
    terms = [Term(ALL, ALL), MeanTerm(("b",), (), kl=2.0)]
    loss, latents = evaluated(Objective(terms), pair, batch)
    rows = torch.tensor([0, 2, 4])
    expected = -2.0 * len(rows) * by_hand(latents[0][None, 1], rows)
    torch.testing.assert_close(loss.by_term["SquaredMean (b, -, P)"], expected.detach())

    single = Objective([MeanTerm(ALL, ())])

    def alone(batch):
        """The statistic at the posterior's own means: the same draws for rows with padding and without."""
        posterior = lambda batch: dist.Delta(pair.posterior(batch).mean, event_dim=1)  # noqa: E731

        def guide(batch):
            with batch.plate():
                pyro.sample("z", posterior(batch))

        return single.evaluate(pair.model, guide, batch, step=0).total

    torch.testing.assert_close(alone(batch.padded(9)), alone(batch))


ESTIMATORS = {
    "analytic": (E.AnalyticKL, 1),
    "analytic, particles": (lambda: E.AnalyticKL(3), 3),
    "iwae": (lambda: E.IWAE(4), 4),
    "one by one": (lambda: E.IWAE(2, vectorize_particles=False), 2),
    "dreg": (lambda: E.DReG(3), 3),
    "resampled": (lambda: E.IWAE(3, resample=True), 3),
    "trace": (Trace_ELBO, 1),
    "trace, particles": (lambda: Trace_ELBO(num_particles=2, vectorize_particles=True), 2),
    "graph": (TraceGraph_ELBO, 1),
    "enum": (TraceEnum_ELBO, 1),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_every_estimator_takes_a_batch_statistic_with_its_particles(name, vectorize):
    make, particles = ESTIMATORS[name]
    pair, batch = Pair(), full_rows()
    objective = Objective([Term(ALL, ALL), MeanTerm(ALL, (), kl=0.5)], make(), vectorize=vectorize)
    pair_structure(pair.model, pair.guide, batch)
    pair.latents.clear()
    torch.manual_seed(0)
    loss = objective.evaluate_with_gradient(pair.model, pair.guide, batch, step=0)
    shared = vectorize and name in ("analytic", "analytic, particles", "iwae", "one by one", "dreg")
    runs = pair.latents[-particles:] if name == "one by one" else pair.latents[-1:]
    z = torch.cat([x.detach().reshape(-1, 2 if shared else 1, 5, LATENT)[:, -1] for x in runs])
    assert len(z) == particles
    expected = -0.5 * 5 * by_hand(z, torch.arange(5))
    torch.testing.assert_close(loss.by_term[LABEL], expected, rtol=1e-4, atol=1e-6)
    assert loss.total.isfinite() and any(g is not None for g in pair.gradients())


def test_a_batch_statistic_has_draws_of_its_own_beside_a_stratified_pass():
    model, guide = contract_pair("shared", "mixture")
    batch = full_rows()
    both = Objective([Term(ALL, ALL), MeanTerm(ALL, (), kl=0.5)], E.IWAE(2, stratified="inside"))
    loss = both.evaluate(model, guide, batch, step=0)
    assert loss.total.isfinite() and loss.by_term[LABEL] < 0


def test_the_weight_of_a_batch_statistic_may_depend_on_the_step_and_on_a_mean():
    pair, batch = Pair(), full_rows()
    objective = Objective(table(tables.warm_up(10)))
    none, _ = evaluated(objective, pair, batch, step=0)
    half, _ = evaluated(objective, pair, batch, step=5)
    whole, _ = evaluated(Objective(table(1.0)), pair, batch)
    assert none.by_term[LABEL] == 0
    torch.testing.assert_close(2 * half.by_term[LABEL], whole.by_term[LABEL])

    mean, latents = evaluated(Objective([MeanTerm(EACH, (), average=True)]), pair, some_rows())
    present = some_rows().present
    count = sum(p.double() for p in present.values())
    each = [(p / count).sum() * by_hand(z[None], p) for z, p in zip(latents[0], present.values(), strict=True)]
    torch.testing.assert_close(mean.total.double(), sum(each), rtol=1e-5, atol=1e-6)


def test_a_term_of_ones_own_may_have_a_value_per_row():
    pair, batch = Pair(), some_rows()
    loss, latents = evaluated(Objective([Term(ALL, ALL), NormTerm(("b",), (), kl=2.0)]), pair, batch)
    expected = -2 * latents[0][1, batch.present["b"]].square().sum()
    torch.testing.assert_close(loss.by_term["SquaredNorm (b, -, P)"], expected.detach())


def test_a_step_with_a_batch_statistic_is_compiled():
    pair = Pair()
    guide = mm.Guide(z=pair.posterior)
    objective = Objective(table(tables.warm_up(4)))
    torch.manual_seed(3)
    first, second = some_rows(), some_rows()
    step = mm.stage(objective, pair.model, guide, first, backend=None)
    taken = 0
    for batch in (first, second):
        for seed in range(2):
            torch.manual_seed(seed)
            loss = step(batch)
            found = pair.gradients()
            torch.manual_seed(seed)
            expected = objective.evaluate(pair.model, guide, batch, step=taken)
            taken += 1
            torch.testing.assert_close(loss, expected.total.detach())
            expected.total.backward()
            for one, other in zip(found, pair.gradients(), strict=True):
                torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    assert step.reasons == []


def test_a_pair_trains_by_a_batch_statistic():
    pair, batch = Pair(), full_rows(40)
    guide = mm.Guide(z=pair.posterior)
    objective = Objective([Term(ALL, ALL), MeanTerm(ALL, (), kl=50.0)])

    def statistic():
        torch.manual_seed(1)
        return -objective.evaluate(pair.model, guide, batch, step=0).by_term[LABEL]

    before = statistic()
    optimizer = lambda ps: torch.optim.Adam(ps, 1e-2)  # noqa: E731
    history = mm.fit(pair.model, guide, objective, batch, epochs=30, batch_size=20, optimizer=optimizer, progress=False,
                     seed=0)  # fmt: skip
    assert statistic() < 0.5 * before and LABEL in history.to_dict()


def test_an_objective_prints_a_batch_statistic_and_knows_its_effect_on_the_bound():
    assert "SquaredMean (*, -, P) kl 0.5" in str(Objective(table()))
    assert Objective([Term(ALL, ALL), MeanTerm(ALL, ())]).target == "lower bound on log p(x)"
    for weight, kind in ((-1.0, MeanTerm), (1.0, NormTerm)):
        assert Objective([Term(ALL, ALL), kind(ALL, (), kl=weight)]).bounds().kind == "surrogate"


def test_a_term_of_ones_own_that_breaks_its_contract_is_refused():
    class Wrong(SquaredMean):
        def values(self, terms, scores, estimator):
            return [scores.draws.latent("z")[0, 0]]

    class WrongTerm(Term):
        kind = Wrong()

    pair, batch = Pair(), full_rows()
    with pytest.raises(ValueError, match=r"Wrong \(\*, -, P\) to have a value per row, of shape \(5,\).*\(5, 3\)"):
        Objective([WrongTerm(ALL, ())]).evaluate(pair.model, pair.guide, batch, step=0)
    with pytest.raises(ValueError, match="freeze_decoder is of terms that are densities"):
        Objective([MeanTerm(ALL, ALL, freeze_decoder=True)]).evaluate(pair.model, pair.guide, batch, step=0)


# -- what a pass knows besides densities ----------------------------------------------------------------------------


def scores_of(pair, batch, **options):
    info = pair_structure(pair.model, pair.guide, batch)
    return score(pair.model, pair.guide, TermViews.of(batch, info), info, **options)


def test_draws_are_kept_only_where_they_are_asked_for():
    pair, batch = Pair(), full_rows()
    assert scores_of(pair, batch).draws is None
    assert scores_of(pair, batch, draws=True).draws is not None


@pytest.mark.parametrize("vectorize", [True, False])
def test_draws_are_the_latents_the_data_and_the_masks(vectorize):
    pair, batch = Pair(), some_rows()
    scores = scores_of(pair, batch, num_particles=3, vectorize=vectorize, draws=True)
    found = pair.latents[-1] if vectorize else torch.stack(pair.latents[-3:])
    draws = scores.draws
    assert draws.sites == ("z",) and draws.places == (0,)
    assert torch.equal(draws.latent("z"), found[:, None]) and draws.latent("z") is draws.latent("z")
    assert draws.latent("z").requires_grad
    for name in batch.names:
        assert torch.equal(draws.mask(name), batch.present[name][None])
        held = batch.present[name]
        assert torch.equal(draws.observed(name)[held].to(batch[name].dtype), batch[name][held])
    assert draws.counts.all() and draws.counts.shape == (1, 6)
    for wrong in (lambda: draws.latent("w"), lambda: draws.observed("z")):
        with pytest.raises(ValueError, match=r"no latent site 'w'|no term of this pass decodes 'z'"):
            wrong()
    if not vectorize:
        with pytest.raises(ValueError, match="vectorize_particles=True"):
            draws.decoded("b")
        return
    decoded = draws.decoded("b")
    log_prob = decoded.log_prob(draws.observed("b"))
    torch.testing.assert_close(log_prob.reshape(3, 1, 6), scores.likelihood["b"])
    own = pair.model.decoders["b"](found)
    held = batch.present["b"]
    torch.testing.assert_close(own.log_prob(batch["b"])[:, held], log_prob.reshape(3, 6)[:, held])


def test_a_batch_statistic_gets_the_draws_of_its_own_terms():
    pair, batch = Pair(), some_rows()

    class Looks(SquaredMean):
        seen = []

        def values(self, terms, scores, estimator):
            self.seen.append(scores.draws)
            return super().values(terms, scores, estimator)

    class LooksTerm(Term):
        kind = Looks()

    evaluated(Objective([Term(ALL, ALL), LooksTerm(("b",), ()), Term(EACH, EACH), LooksTerm(("a",), "b")]), pair, batch)
    (draws,) = Looks.seen
    z = pair.latents[-1]
    assert draws.places == (1, 5) and torch.equal(draws.latent("z"), z[None, [1, 5]])
    assert torch.equal(draws.counts, torch.stack([batch.present["b"], batch.present["a"]]))
    assert torch.equal(draws.mask("b"), torch.stack([torch.zeros(6).bool(), batch.present["a"] & batch.present["b"]]))


def test_draws_within_a_plate_of_a_row_have_its_dimension():
    def model(batch):
        with batch.plate():
            with pyro.plate("parts", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            batch.observe("x", dist.Normal(z.sum((0, -1))[..., None], 1.0).to_event(1))

    def guide(batch):
        with batch.plate(), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    batch = mm.Batch({"x": torch.randn(4, 1)})
    info = pair_structure(model, guide, batch)
    draws = score(model, guide, TermViews.of(batch, info), info, draws=True).draws
    assert draws.latent("z").shape == (1, 1, 4, 2, 3)
    assert torch.equal(draws.latent("z")[0, 0].movedim(0, 1), draws._pair.trace.nodes["z"]["value"])
