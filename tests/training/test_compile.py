"""A staged step does what the programs do: the same numbers under the same draws, and no others."""

import operator
import os
import random
import shutil
import warnings
from contextlib import nullcontext
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch._dynamo.utils import counters

import pyro_mm as mm
from pyro_mm.handlers.elbos import traceable_form
from pyro_mm.training.compile import MAX_GRAPHS
from pyro_mm.training.problem import problem_from_run
from tests.support.compiled import TRACED, agree, assert_same, cases, eager, gradients
from tests.support.contract import OBJECTIVES, data, pair

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="inductor needs a C++ compiler"
)


def complete(rows=6):
    return mm.Batch({n: data(rows)[n] for n in ("a", "b", "c")})


@pytest.mark.parametrize("names", cases(), ids=" | ".join)
def test_a_staged_step_has_the_numbers_of_the_programs(names):
    model, guide = pair(*names[:2])
    objective = OBJECTIVES[names[2]](TRACED[names[3]]())
    first, second = data(), data()
    second._masks = dict(first._masks)  # what is known of all rows at once is part of a graph
    agree(objective, model, guide, [first, second])


@pytest.mark.parametrize("name", [n for n in TRACED if n not in ("one by one", "particles")])
def test_an_estimator_alone_is_staged(name):
    model, guide = pair("shared", "product")
    agree(TRACED[name](), model, guide, [complete(), complete()])


@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_stratified_draws_are_staged(stratified):
    model, guide = pair("shared", "mixture")
    agree(tables_mmvae(stratified), model, guide, [complete(), complete()])


def tables_mmvae(stratified):
    return mm.objectives.mmvae(3, looser=stratified == "outside")


def enumerated():
    """A label that is observed in some rows and summed out in the others, and its guide."""
    logits, decoder = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)
    encoder = mm.conditionals.Normal(mm.nn.MLP(2, 4, (4,)))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(logits=logits))
            batch.observe("x", dist.Normal(decoder(nn.functional.one_hot(y, 3).float()) + z, 1.0).to_event(1))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", encoder(batch["x"]))

    return model, guide


def test_sums_over_classes_are_staged():
    model, guide = enumerated()
    batch = mm.Batch({"x": torch.randn(7, 2)})
    problem = problem_from_run(mm.estimators.IWAE(2), model, guide, batch)
    step = mm.stage(mm.estimators.IWAE(2), model, guide, batch, backend=None)
    torch.manual_seed(5)
    got = step(batch), gradients(problem.parameters)
    assert step.reasons == []
    for p in problem.parameters:
        p.grad = None
    torch.manual_seed(5)
    loss = mm.estimators.IWAE(2).differentiable_loss(model, guide, batch)
    loss.backward()
    assert_same((got[0], got[1]), (loss.detach(), gradients(problem.parameters)))


@needs_compiler
def test_inductor_gives_the_same_numbers_and_draws():
    """Two latents of one shape, with dropout: a pass that merged draws, or what they fill, would make them equal."""
    model = TwoLatents()
    encoder = {n: mm.conditionals.Normal(mm.nn.MLP(3, 2 * LATENTS, (8,))) for n in ("u", "v")}
    guide = mm.Guide(**{n: Of("b", net) for n, net in encoder.items()})
    batch = mm.Batch({"b": torch.randn(16, 3)})
    model.train()
    agree(mm.objectives.elbo(mm.estimators.IWAE(2)), model, guide, [batch, batch], backend="inductor")
    step = mm.stage(mm.objectives.elbo(mm.estimators.IWAE(1)), model, guide, batch)
    torch.manual_seed(0)
    first = float(step(batch))
    assert float(step(batch)) != first
    torch.manual_seed(0)
    assert float(step(batch)) == first


@needs_compiler
def test_inductor_keeps_the_order_of_draws():
    """Dropout in two passes, latents' noise and fillers of missing rows, which inductor by itself puts into another."""

    def normal(inputs, outputs):
        layers = nn.Linear(inputs, 4), nn.Dropout(0.3), nn.ReLU(), nn.Linear(4, 2 * outputs)
        return mm.conditionals.Normal(nn.Sequential(*layers))

    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"a": normal(2, 2), "b": normal(2, 3)})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": normal(2, 2), "b": normal(3, 2)}))
    rows = torch.arange(8)
    batch = mm.Batch({"a": torch.randn(8, 2), "b": torch.randn(8, 3)}, {"a": rows % 3 != 0, "b": rows % 3 != 1})
    agree(mm.objectives.mmvm(estimator=E.IWAE(3, resample=True)), model, guide, [batch, batch], backend="inductor")


@needs_compiler
def test_a_graph_is_compiled_once_and_one_with_another_constant_is_another():
    """Under another seed, or in the next session, inductor's cache spares most of the time of staging."""
    encoder = mm.conditionals.Normal(mm.nn.MLP(3, 2 * LATENTS, (8,)))
    batch = mm.Batch({"b": torch.randn(16, 3)})

    def staged(constant):
        held = torch.tensor([1.0, constant])  # in no module, so that it is part of the graph

        class Held(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(LATENTS, 3)

            def forward(self, batch):
                with batch.plate():
                    z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), held).to_event(1))
                    batch.observe("b", dist.Normal(self.net(z), 1.0).to_event(1))

        before = counters["inductor"]["fxgraph_cache_hit"]
        agree(mm.objectives.elbo(), Held(), mm.Guide(z=Of("b", encoder)), [batch], backend="inductor")
        return counters["inductor"]["fxgraph_cache_hit"] - before

    staged(2.0)
    assert staged(2.0) == 1
    staged(0.1)


LATENTS = 2


class Of(nn.Module):
    """An encoder of one modality as a posterior."""

    def __init__(self, name, net):
        super().__init__()
        self.name, self.net = name, net

    def forward(self, batch):
        return self.net(batch[self.name])


class TwoLatents(nn.Module):
    """Two latents of one shape whose difference is decoded, through dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(LATENTS, 3))

    def forward(self, batch):
        prior = dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1)
        with batch.plate():
            u, v = pyro.sample("u", prior), pyro.sample("v", prior)
            batch.observe("b", dist.Normal(self.net(u - v), 1.0).to_event(1))


def test_without_a_compiler_the_traced_step_runs(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.compile", fails)
    model, guide = pair("shared", "product")
    objective, batch, parameters = mm.objectives.elbo(), complete(), [*model.parameters(), *guide.parameters()]
    step = mm.stage(objective, model, guide, batch)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="inductor could not compile.*no compiler"):
        loss = step(batch)
    assert_same((loss, gradients(parameters)), eager(objective, model, guide, batch, parameters, 1))


@pytest.mark.parametrize("stage", ["trace", "compilation"])
def test_a_graph_that_fails_when_it_runs_is_not_taken(monkeypatch, stage):
    """Compiled code gives way to the trace, and a trace to the programs: with the same numbers, and the reason."""

    def fails(*_):
        raise RuntimeError("another layout\nof memory")

    if stage == "trace":
        hook = operator.methodcaller("register_forward_pre_hook", fails)
        monkeypatch.setattr("pyro_mm.training.tracing._fold_constants", hook)
        expected = "runs as it is: its trace cannot be run: RuntimeError: another layout$"
    else:
        monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: fails)
        expected = "compiled cannot be run, and the step runs as it was traced: another layout$"
    model, guide = pair("shared", "product")
    objective, batch, parameters = mm.objectives.elbo(), complete(), [*model.parameters(), *guide.parameters()]
    step = mm.stage(objective, model, guide, batch)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=expected):
        loss = step(batch)
    assert_same((loss, gradients(parameters)), eager(objective, model, guide, batch, parameters, 1))


@pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=needs_compiler)])
def test_convolutions_train_alike_in_either_layout(backend):
    """The weights' memory is laid out anew, which changes neither them nor what a fused optimiser makes of them."""
    ends = []
    for staged in (False, True):
        torch.manual_seed(0)
        decoder = mm.nn.Deconvolutional(2, (4, 4), channels=(6, 4))
        encoder = mm.conditionals.Normal(mm.nn.Convolutional((4, 4), 4, channels=(4, 6)))
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        model = mm.models.SharedLatent(prior, {"a": mm.conditionals.Normal(decoder, (4, 4), scale=0.5)})
        guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": encoder}))
        batch, parameters = mm.Batch({"a": torch.randn(8, 4, 4)}), [*model.parameters(), *guide.parameters()]
        before = [p.detach().clone() for p in parameters]
        adam, objective = torch.optim.Adam(parameters, 1e-2, fused=True), mm.objectives.elbo()
        step = mm.stage(objective, model, guide, batch, adam, backend=backend) if staged else None
        assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
        take_steps(3, step, objective, model, guide, batch, adam)
        ends.append([p.detach().clone() for p in parameters])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_convolutions_beside_a_recurrent_network_are_staged():
    """Traced without oneDNN, a decoder's images lie in another order than in the replay, which
    has oneDNN for large ones."""
    torch.manual_seed(0)
    encoders = {
        "image": mm.nn.Convolutional((3, 16, 16), 4, channels=(4, 6)),
        "text": mm.nn.Recurrent(4, 4, 4, vocabulary=5),
    }
    decoders = {
        "image": mm.conditionals.Bernoulli(mm.nn.Deconvolutional(2, (3, 16, 16), channels=(6, 4)), (3, 16, 16)),
        "text": mm.conditionals.Tokens(mm.nn.RecurrentTokens(2, 5, 4), 3),
    }
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    experts = {name: mm.conditionals.Normal(encoder) for name, encoder in encoders.items()}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts))
    batches = [
        mm.Batch({"image": torch.rand(40, 3, 16, 16).round(), "text": torch.randint(5, (40, 3))}) for _ in range(2)
    ]
    agree(mm.objectives.vaevae(), model, guide, batches)


def take_steps(count, step, objective, model, guide, batch, optimizer):
    """Steps of either kind: staged, or, where that is None, by the programs."""
    for seed in range(count):
        torch.manual_seed(seed)
        if step is None:
            optimizer.zero_grad()
            objective.differentiable_loss(model, guide, batch).backward()
            optimizer.step()
        else:
            step(batch)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_step_trains_as_the_programs_do(optimizer, device):
    """Without latents nothing is random. Of an optimiser inside of a captured graph, or after it."""
    make = {
        "adam": partial(torch.optim.Adam, lr=1e-2),
        "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    }[optimizer]
    batch, ends = mm.Batch({"b": torch.randn(6, 2)}).to(device), []
    for staged in (False, True):
        mean = nn.Parameter(torch.zeros(2, device=device))

        def model(batch, mean=mean):
            with batch.plate():
                batch.observe("b", dist.Normal(mean, 1.0).to_event(1))

        descent, objective = make([mean]), mm.objectives.elbo()
        step = mm.stage(objective, model, lambda batch: None, batch, descent, backend=None) if staged else None
        take_steps(8, step, objective, model, lambda batch: None, batch, descent)
        assert step is None or step.reasons == []
        ends.append(mean.detach().cpu())
    torch.testing.assert_close(*ends)
    assert ends[0].abs().min() > 1e-3


@pytest.mark.cuda
def test_a_captured_step_draws_anew_and_can_be_seeded():
    model, guide = (module.cuda() for module in pair("shared", "product"))
    batch = complete(32).to("cuda")
    step = mm.stage(mm.objectives.elbo(E.IWAE(2)), model, guide, batch)
    for _ in range(5):
        step(batch)
    losses = []
    for _ in range(2):
        torch.cuda.manual_seed(3)
        losses.append([float(step(batch)) for _ in range(3)])
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


@pytest.mark.cuda
def test_fit_on_a_gpu_compiled_is_fit():
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide = pair("shared", "product")
        history = mm.fit(model, guide, mm.objectives.mvae(), complete(200), epochs=20, batch_size=32, seed=1,
                         device="cuda", progress=False, compile=compiled)  # fmt: skip
        ends.append(history.columns["loss"][-1])
    assert ends[0] == pytest.approx(ends[1], rel=0.05)


def test_two_latents_of_a_compiled_step_have_independent_draws():
    """The variance of u - v under equal posteriors is that of independent draws, and not zero."""
    fixed = dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1)
    weight = nn.Parameter(torch.ones(()))

    def model(batch):
        with batch.plate():
            u, v = pyro.sample("u", fixed), pyro.sample("v", fixed)
            batch.observe("b", dist.Normal(weight * (u - v), 1.0).to_event(1))

    def guide(batch):
        with batch.plate():
            pyro.sample("u", fixed.expand([batch.size]))
            pyro.sample("v", fixed.expand([batch.size]))

    batch = mm.Batch({"b": torch.zeros(50_000, LATENTS)})
    step = mm.stage(mm.estimators.IWAE(1), model, guide, batch, backend=None)
    got = float(step(batch)) / batch.size / LATENTS  # E[(u - v)^2] / 2 + log(2 pi) / 2 a coordinate
    # the mean of 100,000 variables of variance 2: a standard error of 0.0045, and five of them fail once in 2e6
    assert got == pytest.approx(1 + 0.5 * np.log(2 * np.pi), abs=0.0225)


@pytest.mark.parametrize("kind", ["kl", "likelihood", "mapping"])
@pytest.mark.parametrize("estimator", ["analytic", "iwae", "trace", "mean field"])
def test_weights_of_a_compiled_objective_move_with_the_step(kind, estimator):
    warm = lambda step: step / 4  # noqa: E731
    given = {"kl": {"kl": warm}, "likelihood": {"likelihood": warm}, "mapping": {"likelihood": {"a": warm}}}[kind]
    term = mm.objectives.Term(mm.objectives.ALL, mm.objectives.ALL, **given)
    half = mm.objectives.Term(mm.objectives.EACH, mm.objectives.EACH, likelihood=0.5)
    objective = mm.objectives.Objective([term, half], TRACED[estimator]())
    model, guide = pair("shared", "product")
    parameters, batch = [*model.parameters(), *guide.parameters()], complete()
    step = mm.stage(objective, model, guide, batch, backend=None)
    staged = []
    for seed in range(3):
        torch.manual_seed(seed)
        staged.append((step(batch).clone(), gradients(parameters)))
    assert step.reasons == [] and step.steps == 3
    assert len(step._graphs) == (1 if kind == "kl" else 2)  # a likelihood that weighs nothing has a form of its own
    objective.steps = 0
    for seed in range(3):
        assert_same(staged[seed], eager(objective, model, guide, batch, parameters, seed))


def test_masks_are_inputs_of_a_compiled_step():
    model, guide = pair("shared", "product")
    agree(mm.objectives.masked(), model, guide, [data(8) for _ in range(3)])


E = mm.estimators
EXACT = {
    "analytic": E.AnalyticKL, "iwae": lambda: E.IWAE(2), "dreg": lambda: E.DReG(2), "renyi": lambda: E.Renyi(0.5, 2),
    "trace": Trace_ELBO, "mean field": TraceMeanField_ELBO,
}  # fmt: skip


def linear_gaussian(plate):
    """A story and its exact posterior, with which nothing is random: every draw has the same weight."""
    torch.manual_seed(0)
    inner = mm.models.LinearGaussian({"a": torch.randn(3, 2), "b": torch.randn(1, 2)}, noise=0.5)

    def story(batch):
        with pyro.plate("data", batch.size, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name in inner.loadings:
                batch.observe(name, inner.likelihood(name, z))

    rows = mm.Batch({"a": torch.randn(7, 3), "b": torch.randn(7, 1)})
    return inner, inner if plate == "batch" else story, mm.Guide(z=inner.posterior), rows


@pytest.mark.parametrize("plate", ["batch", "pyro"])
@pytest.mark.parametrize(
    ("name", "estimator"),
    # not the two that take likelihoods and a sampled KL from different draws, whose randomness does not cancel
    [(n, e) for n in ("elbo", "mvae", "vaevae") for e in EXACT if (n, e) != ("vaevae", "analytic")],
)
def test_padded_rows_count_nothing_in_a_compiled_step(name, estimator, plate, double):
    _, model, guide, batch = linear_gaussian(plate)
    objective = getattr(tables, name)(estimator=EXACT[estimator]())
    loss = objective.loss(model, guide, batch)
    assert objective.loss(model, guide, batch.padded(10)) == pytest.approx(loss, rel=1e-10)


tables = mm.objectives


def test_fit_compiled_is_fit():
    """Same seed, same draws: the same losses, with a last batch that is padded and so drawn otherwise left out."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide = pair("shared", "product")
        with partial_backend():
            history = mm.fit(model, guide, mm.objectives.mvae(), complete(64), epochs=3, batch_size=16, seed=1,
                             progress=False, compile=compiled)  # fmt: skip
        runs.append(history.columns)
    assert list(runs[0]) == list(runs[1])
    for name in runs[0]:
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-4)


class partial_backend:
    """fit without inductor: what it compiles to is tested apart."""

    def __enter__(self):
        import pyro_mm.training.updates as updates

        self.updates, self.compiled = updates, updates.CompiledStep
        updates.CompiledStep = partial(self.compiled, backend=None)

    def __exit__(self, *_):
        self.updates.CompiledStep = self.compiled


@pytest.mark.parametrize("plate", ["batch", "pyro"])
@pytest.mark.parametrize("objective", ["elbo", "iwae", "trace", "pyro's own"])
def test_every_compiled_step_has_the_gradient_of_the_loss_a_row(objective, plate, double):
    """Rows all equal c, x ~ N(mu, 1): mu <- mu - 0.1 (mu - c) at each step, however few rows are in the last."""
    mu = nn.Parameter(torch.tensor(0.0))

    def story(batch):
        with batch.plate() if plate == "batch" else pyro.plate("data", batch.size, dim=-1):
            batch.observe("x", dist.Normal(mu, 1.0))

    batch = mm.Batch({"x": torch.full((11,), 3.0)})
    made = {"elbo": tables.elbo(), "iwae": E.IWAE(2), "trace": tables.elbo(Trace_ELBO()), "pyro's own": Trace_ELBO()}
    with partial_backend():
        history = mm.fit(story, lambda b: None, made[objective], batch, epochs=2, batch_size=4, progress=False,
                         compile=True, optimizer=lambda ps: torch.optim.SGD(ps, 0.1))  # fmt: skip
    assert mu.item() == pytest.approx(3 * (1 - 0.9**6), rel=1e-12)
    mus = [3 * (1 - 0.9**k) for k in range(6)]
    losses = [0.5 * (3 - m) ** 2 + 0.5 * np.log(2 * np.pi) for m in mus]
    expected = [(4 * a + 4 * b + 3 * c) / 11 for a, b, c in (losses[:3], losses[3:])]
    assert history.columns["loss"] == pytest.approx(expected, rel=1e-12)


# -- what is not compiled ---------------------------------------------------------------------------------------------


def story_of(likelihood):
    """A story of one modality whose likelihood is ``likelihood(z)``, and its guide."""
    net = nn.Linear(2, 2)

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("b", dist.Normal(likelihood(net(z), batch), 1.0).to_event(1))

    encoder = mm.conditionals.Normal(nn.Linear(2, 4))
    return model, mm.Guide(z=Of("b", encoder)), mm.Batch({"b": torch.randn(9, 2)})


def reads(mean, batch):
    return mean if float(mean.sum()) > 0 else -mean


def draws_in_numpy(mean, batch):
    return mean + np.random.rand()


def draws_in_python(mean, batch):
    return mean + (random.random() < 1e-9)


def by_position(mean, batch):
    return mean + torch.as_tensor(batch["b"].detach().numpy()[:1] * 10)


def by_length(mean, batch):
    return mean + max(batch["b"][:, 0].tolist())


def by_choice_of_rows(mean, batch):
    return mean + mean[mean[:, 0] > 0].sum(0)


@pytest.mark.parametrize(
    ("likelihood", "reason"),
    [
        (reads, "reads a tensor's value in Python"),
        (draws_in_numpy, "random numbers outside of torch"),
        (draws_in_python, "random numbers outside of torch"),
        (by_position, "values in Python, by numpy"),
        (by_length, "values in Python, by tolist"),
        (by_choice_of_rows, "shapes that depend on values"),
    ],
)
def test_an_untraceable_step_runs_uncompiled_and_says_why_once(likelihood, reason):
    model, guide, batch = story_of(likelihood)
    objective = mm.objectives.elbo()
    step = mm.stage(objective, model, guide, batch, backend=None)
    with pytest.warns(UserWarning, match="is not compiled") as caught:
        first = step(batch)
    assert len(caught) == 1 and reason in str(caught[0].message) and reason in step.reasons[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(batch)
        step(batch[:5])  # another shape, the same reason
    assert first.isfinite() and step.steps == 3
    assert all(p.grad is not None for p in guide.parameters())


def test_an_untraceable_step_names_the_line_that_reads_a_value():
    model, guide, batch = story_of(reads)
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, backend=None)
    with pytest.warns(UserWarning, match="is not compiled"):
        step(batch)
    assert "reads, in" in step.reasons[0] and "test_compile.py" in step.reasons[0]


@pytest.mark.parametrize("estimator", [TraceGraph_ELBO(), TraceEnum_ELBO(max_plate_nesting=3)], ids=["graph", "enum"])
def test_estimators_that_differentiate_by_themselves_are_not_compiled(estimator):
    model, guide, batch = story_of(lambda mean, batch: mean)
    objective = mm.objectives.elbo(estimator)
    step = mm.stage(objective, model, guide, batch, backend=None)
    with pytest.warns(UserWarning, match=f"is not compiled.*{type(estimator).__name__}"):
        assert step(batch).isfinite()
    assert all(p.grad is not None for p in guide.parameters())


def test_a_step_of_too_many_shapes_runs_uncompiled_and_advises_padding():
    model, guide, batch = story_of(lambda mean, batch: mean)
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, backend=None)
    with pytest.warns(UserWarning, match="pad them"):
        for rows in range(1, MAX_GRAPHS + 2):
            step(batch[:rows])
    assert len(step.reasons) == 1


def test_buffers_move_as_they_do_eagerly():
    """Batch normalisation keeps running means: a step of either kind moves them once, and tracing does not."""
    runs = []
    for staged in (False, True):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(2)
        model, _, batch = story_of(lambda mean, batch: mean)
        guide = mm.Guide(z=Of("b", mm.conditionals.Normal(nn.Sequential(norm, nn.Linear(2, 4)))))
        objective = mm.objectives.elbo()
        step = mm.stage(objective, model, guide, batch, backend=None) if staged else None
        objective.loss(model, guide, batch)  # the first evaluation looks at the structure of the pair as well
        norm.reset_running_stats()
        for _ in range(3):
            if step is None:
                objective.differentiable_loss(model, guide, batch).backward()
            else:
                step(batch)
        runs.append((norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)))
    assert runs[0][2] == runs[1][2] == 3
    torch.testing.assert_close(runs[0][:2], runs[1][:2])


def test_a_module_put_into_another_mode_is_traced_anew():
    model, guide, batch = story_of(lambda mean, batch: nn.functional.dropout(mean, 0.5, training=flag.training))
    flag = nn.Dropout()
    guide.flag = flag
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, backend=None)
    torch.manual_seed(0)
    train = float(step(batch))
    flag.eval()
    torch.manual_seed(0)
    assert float(step(batch)) != train and len(step._graphs) == 2
    flag.train()
    torch.manual_seed(0)
    assert float(step(batch)) == train and len(step._graphs) == 2


def test_a_frozen_parameter_keeps_still():
    model, guide, batch = story_of(lambda mean, batch: mean)
    parameters = problem_from_run(mm.objectives.elbo(), model, guide, batch).parameters
    optimizer = torch.optim.SGD(parameters, 0.1)
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, optimizer, backend=None)
    step(batch)
    still = next(guide.parameters())
    still.requires_grad_(False)
    before = still.clone()
    step(batch)
    assert torch.equal(before, still) and still.grad is None and step.reasons == []


@pytest.mark.parametrize("form", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
def test_traceable_forms_of_pyros_estimators_have_their_value_and_gradient(form, particles, double):
    model, guide = pair("private", "product")
    model, guide, batch = model.double(), guide.double(), complete()
    parameters = [*model.parameters(), *guide.parameters()]
    results = []
    for make in (lambda e: e, traceable_form):
        estimator = make(form(num_particles=particles))
        results.append(eager(estimator, model, guide, batch, parameters, seed=2))
    assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-12)
    assert_same(*results)


def test_the_traceable_form_of_trace_elbo_takes_the_score_of_discrete_latents(double):
    logits, means = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.tensor([1.0, -1.0]))

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            batch.observe("x", dist.Normal(means[y], 1.0))

    def guide(batch):
        with batch.plate():
            pyro.sample("y", dist.Categorical(logits=logits))

    batch = mm.Batch({"x": torch.randn(6)})
    results = [
        eager(make(Trace_ELBO()), model, guide, batch, [logits, means], 3) for make in (lambda e: e, traceable_form)
    ]
    assert_same(*results)
    assert results[0][1][0].abs().sum() > 0


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staged", [False, True])
def test_bfloat16_networks_have_float32_log_probabilities(staged):
    """Against float64 at the same draws: the loss a row is off by hundredths of its size, and is float32."""
    batch = mm.Batch({"image": torch.bernoulli(torch.full((64, 12, 12), 0.3)), "label": torch.arange(64) % 10})
    model, guide, objective = mm.recipes.mvae(batch, latent=8, hidden=(64,))
    losses, norms = {}, {}
    for name in ("float64", "bfloat16"):
        torch.manual_seed(0)
        noise = torch.randn(3, 64, 8, dtype=torch.float64)
        if name == "float64":
            model, guide = model.double(), guide.double()
            context = nullcontext
        else:
            model, guide = model.float(), guide.float()
            model.zero_grad(), guide.zero_grad()
            context = partial(torch.autocast, "cpu", torch.bfloat16)
        with fixed_noise(noise):
            if not staged:
                with context():
                    loss = objective.differentiable_loss(model, guide, batch)
                loss.backward()
            else:
                step = mm.stage(objective, model, guide, batch, backend=None, autocast=context)
                loss = step(batch)
                assert step.reasons == []
        losses[name] = loss.detach().double() / 64
        norms[name] = torch.stack([p.grad.double().norm() for p in guide.parameters()])
        assert loss.dtype == (torch.float64 if name == "float64" else torch.float32)
    # images of 144 bits cost about 105 nats: bfloat16 has 8 bits, so a product is off by 0.4 %, and errors average out
    assert float(losses["bfloat16"]) == pytest.approx(float(losses["float64"]), rel=1e-3)
    torch.testing.assert_close(norms["bfloat16"], norms["float64"], rtol=0.1, atol=1e-3)


class fixed_noise:
    """Standard normal draws are these, in whatever precision they are asked for."""

    def __init__(self, noise):
        self.noise = noise

    def __enter__(self):
        import torch.distributions.normal as normal

        self.module, self.before = normal, normal._standard_normal
        normal._standard_normal = self.draw

    def draw(self, shape, dtype, device):
        few = self.noise.flatten()[: torch.Size(shape).numel()]  # the structure of a pair is looked at on two rows
        return few.reshape(shape).to(dtype)

    def __exit__(self, *_):
        self.module._standard_normal = self.before


# -- what may change between steps -------------------------------------------------------------------------------------


def replaced(guide, objective):
    linear = guide.posteriors["z"].net.net
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))


def assigned(guide, objective):
    guide.load_state_dict({n: torch.randn_like(p) for n, p in guide.state_dict().items()}, assign=True)


def in_place(guide, objective):
    guide.load_state_dict({n: torch.randn_like(p) for n, p in guide.state_dict().items()})


def more_particles(guide, objective):
    objective.estimator.num_particles = 5


def another_estimator(guide, objective):
    objective.estimator = E.Renyi(0.5, 3)


def another_table(guide, objective):
    objective.terms = (mm.objectives.Term(mm.objectives.ALL, mm.objectives.ALL, kl=3.0),)


def freed(guide, objective):
    for p in guide.parameters():
        p.requires_grad_(True)


CHANGES = [replaced, assigned, in_place, more_particles, another_estimator, another_table, freed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_compiled_step_follows_settings_that_change(change):
    model, guide, batch = story_of(lambda mean, batch: mean)
    if change is freed:
        for p in guide.parameters():
            p.requires_grad_(False)
    objective = mm.objectives.elbo(E.IWAE(3))
    step = mm.stage(objective, model, guide, batch, backend=None)
    step(batch)
    change(guide, objective)
    parameters = problem_from_run(objective, model, guide, batch).parameters
    torch.manual_seed(4)
    staged = step(batch), gradients(parameters)
    assert step.reasons == []
    assert_same(staged, eager(objective, model, guide, batch, parameters, 4))


def test_parameters_of_one_compiled_step_share_no_gradient_tensor():
    """The gradient of a + b is one tensor for both, and clipping scales each in place."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def model(batch):
        with batch.plate():
            batch.observe("b", dist.Normal(a + b, 1.0).to_event(1))

    step = mm.stage(E.IWAE(1), model, lambda batch: None, mm.Batch({"b": torch.randn(5, 2)}), backend=None)
    step(mm.Batch({"b": torch.randn(5, 2)}))
    assert a.grad.data_ptr() != b.grad.data_ptr() and torch.equal(a.grad, b.grad)


class Counts(nn.Module):
    """Anneals by a number of its own, which no graph can count."""

    def __init__(self):
        super().__init__()
        self.net, self.count = nn.Linear(2, 4), 0

    def forward(self, x):
        self.count += 1
        return (1 + self.count / 20_000) * self.net(x)


def test_a_module_that_counts_is_not_compiled():
    model, _, batch = story_of(lambda mean, batch: mean)
    guide = mm.Guide(z=Of("b", mm.conditionals.Normal(Counts())))
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, backend=None)
    with pytest.warns(UserWarning, match="changes a number that a module holds"):
        step(batch)


@pytest.mark.parametrize("kind", ["batch norm", "pyro's own"])
def test_a_step_whose_rows_see_each_other_is_not_padded(kind):
    """Batch normalisation, and estimators that mask only what the story does: the last batch has its own graph."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        _, guide, _ = story_of(lambda mean, batch: mean)
        encoder = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4)) if kind == "batch norm" else nn.Linear(2, 4)
        guide = mm.Guide(z=Of("b", mm.conditionals.Normal(encoder)))
        decoder = nn.Linear(2, 2)

        def model(batch, decoder=decoder):
            with pyro.plate("data", batch.size, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("b", dist.Normal(decoder(z), 1.0).to_event(1), obs=batch["b"])

        batch = mm.Batch({"b": torch.randn(11, 2)})
        objective = mm.objectives.elbo() if kind == "batch norm" else Trace_ELBO()
        with partial_backend():
            history = mm.fit(model, guide, objective, batch, epochs=2, batch_size=4, seed=0, progress=False,
                             compile=compiled)  # fmt: skip
        ends.append((history.columns["loss"], [p.detach().clone() for p in guide.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
