"""``fit``: it trains what it should, every time, and says so where it cannot."""

import copy
import math
import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_mm as mm
from pyro_mm.nn.images import channels_last
from pyro_mm.training.pace import Pace
from tests.support.paced import fit_at
from tests.support.training_pair import data, pair

ADAM = lambda ps: torch.optim.Adam(ps, 0.02)  # noqa: E731
QUIET = {"progress": False, "optimizer": ADAM, "batch_size": 32}


def weights(*modules):
    return [p.detach().clone() for m in modules for p in m.parameters()]


def changed(old, new):
    return all(not torch.equal(x, y) for x, y in zip(old, new, strict=True))


# -- a cell that is run again ----------------------------------------------------------------------

OBJECTIVES = {
    "elbo": lambda: mm.objectives.elbo(),
    "mvae by IWAE": lambda: mm.objectives.mvae(estimator=mm.estimators.IWAE(3)),
    "Trace": lambda: Trace_ELBO(),
    "TraceMeanField": lambda: TraceMeanField_ELBO(),
    "TraceGraph": lambda: TraceGraph_ELBO(),
    "elbo by TraceGraph": lambda: mm.objectives.elbo(TraceGraph_ELBO()),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_cell_that_is_run_again_trains_again(name):
    """With the same objects it goes on; with fresh ones it starts anew, to the same place, without Pyro's store."""
    batch, runs = data(), []
    for _ in range(2):
        torch.manual_seed(7)
        model, guide, objective = *pair(), OBJECTIVES[name]()
        before = weights(model, guide)
        first = mm.fit(model, guide, objective, batch, epochs=4, seed=0, **QUIET).to_dict()["loss"]
        between = weights(model, guide)
        second = mm.fit(model, guide, objective, batch, epochs=4, seed=1, **QUIET).to_dict()["loss"]
        assert first[-1] < first[0] - 0.2 and second[-1] < first[-1] - 0.1
        assert changed(before, between) and changed(between, weights(model, guide))
        runs.append((first, second, between))
    assert runs[0][:2] == runs[1][:2] and all(map(torch.equal, runs[0][2], runs[1][2]))
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("elbo", [lambda: Trace_ELBO(), lambda: mm.objectives.jmvae_kl(0.1)], ids=["Trace", "jmvae_kl"])
def test_a_cell_run_again_trains_again_under_plain_svi_with_a_store_never_cleared(elbo):
    batch = data()
    for _ in range(2):
        model, guide = pair()
        for _ in range(2):
            before = weights(model, guide)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo())
            losses = [svi.step(batch) / batch.size for _ in range(25)]
            assert losses[-1] < losses[0] - 0.1 and changed(before, weights(model, guide))


@pytest.mark.parametrize("how", ["fit", "SVI"])
@pytest.mark.parametrize("second", ["fresh", "deepcopy"])
def test_two_models_in_one_process_never_share_parameters(how, second):
    def train(pair, seed):
        torch.manual_seed(seed)
        if how == "fit":
            mm.fit(*pair, mm.objectives.elbo(), data(), epochs=2, **QUIET)
        else:
            svi = SVI(*pair, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
            for _ in range(5):
                svi.step(data())

    one = pair()
    train(one, 0)
    other = copy.deepcopy(one) if second == "deepcopy" else pair()
    kept, others = weights(*one), weights(*other)
    train(other, 1)
    assert all(map(torch.equal, kept, weights(*one))) and changed(others, weights(*other))
    others = weights(*other)
    train(one, 2)
    assert all(map(torch.equal, others, weights(*other))) and changed(kept, weights(*one))


# -- what is trained -------------------------------------------------------------------------------


def closures():
    """A story and a guide as functions, with their networks in closures."""
    decoders = {"a": nn.Linear(2, 3), "b": nn.Linear(2, 1)}
    encoder = nn.Linear(4, 4)

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name, net in decoders.items():
                batch.observe(name, lambda z, net=net: dist.Normal(net(z), 0.5).to_event(1), z)

    def guide(batch):
        with batch.plate():
            x = [torch.where(batch.present[n][..., None], batch[n], 0.0) for n in "ab"]
            lead = torch.broadcast_shapes(*(v.shape[:-1] for v in x))
            loc, raw = encoder(torch.cat([v.expand(*lead, -1) for v in x], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return story, guide, nn.ModuleList([*decoders.values(), encoder])


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_function_story_whose_networks_are_closures_trains(name):
    story, guide, nets = closures()
    before = weights(nets)
    losses = mm.fit(story, guide, OBJECTIVES[name](), data(), epochs=4, seed=0, **QUIET).to_dict()["loss"]
    assert losses[-1] < losses[0] - 0.5 and changed(before, weights(nets))


def test_a_function_story_trains_where_the_first_rows_lack_a_modality():
    """The parameters are found by a run on two rows, which have no b here; the first has nothing."""
    story, guide, nets = closures()
    rows = data(64)
    there = torch.arange(64)
    batch = mm.Batch({n: rows[n] for n in "ab"}, {"a": there > 0, "b": there > 10})
    before = weights(nets)
    mm.fit(story, guide, mm.objectives.elbo(), batch, epochs=2, seed=0, **QUIET)
    assert changed(before, weights(nets))


def test_bound_methods_train():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model_, self.guide_ = pair()

        def model(self, batch):
            self.model_(batch)

        def guide(self, batch):
            self.guide_(batch)

    both = Both()
    before = weights(both)
    mm.fit(both.model, both.guide, mm.objectives.mvae(), data(), epochs=2, seed=0, **QUIET)
    assert changed(before, weights(both))


@pytest.mark.parametrize("objective", [lambda: mm.objectives.elbo(), lambda: TraceGraph_ELBO()])
def test_a_story_with_pyro_param_trains(objective):
    def story(batch):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            w = pyro.param("w", torch.zeros(1, 3))
            batch.observe("a", lambda z: dist.Normal(z @ w, scale).to_event(1), z)

    def guide(batch):
        v = pyro.param("v", torch.full((3, 1), 0.1))
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["a"] @ v, 0.5).to_event(1))

    batch = data().only("a")
    for _ in range(2):  # a second run of the cell goes on from the store
        before = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
        losses = mm.fit(story, guide, objective(), batch, epochs=8, seed=0, **QUIET).to_dict()["loss"]
        after = dict(pyro.get_param_store().items())
        assert set(after) == {"scale", "w", "v"} and losses[-1] < losses[0]
        assert all(not torch.equal(before[n], after[n]) for n in before)
    assert 0 < after["scale"] < 3


def global_mean(n=60, scale=2.0):
    """m ~ N(0, 1) outside of the plate, x_n | m ~ N(m, scale): the posterior of m is normal and known."""
    torch.manual_seed(2)
    x = 1.5 + scale * torch.randn(n)
    loc, log_scale = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def story(batch):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with batch.plate():
            batch.observe("x", dist.Normal(m, scale))

    def guide(batch):
        pyro.sample("m", dist.Normal(loc, log_scale.exp()))

    precision = 1 + n / scale**2
    exact = (x.sum() / scale**2 / precision).item(), precision**-0.5
    log_p = dist.MultivariateNormal(torch.zeros(n), scale**2 * torch.eye(n) + 1).log_prob(x).item()
    return story, guide, mm.Batch({"x": x}), (loc, log_scale), exact, log_p


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("batch_size", [15, 60])
def test_a_global_latent_is_weighed_right_under_subsampling(elbo, batch_size):
    """Learned mean within 0.1 of the exact 1.27 and standard deviation within 10 % of the exact 0.25.

    Unscaled minibatches of 15 would give 0.46 for the latter. The
    optimiser's own noise, at the last of the steps 0.1, 0.03 and 0.01, is about 0.02 and 3 %; the seed is fixed.
    """
    story, guide, batch, (loc, log_scale), exact, log_p = global_mean()
    for step in (0.1, 0.03, 0.01):
        history = mm.fit(
            story, guide, elbo(num_particles=4), batch, epochs=25 * batch_size // 15, batch_size=batch_size,
            seed=0, progress=False,
            optimizer=lambda ps, step=step: torch.optim.Adam(ps, step),
        )  # fmt: skip
    assert loc.item() == pytest.approx(exact[0], abs=0.1)
    assert log_scale.exp().item() == pytest.approx(exact[1], rel=0.1)
    loss = history.to_dict()["loss"]
    assert sum(loss[-10:]) / 10 == pytest.approx(-log_p / 60, abs=0.1)  # nats per row of the whole, whatever the batch


def test_the_validation_loss_does_not_depend_on_the_batch_size():
    story, guide, batch, parameters, exact, log_p = global_mean()
    with torch.no_grad():
        parameters[0].fill_(exact[0]), parameters[1].fill_(math.log(exact[1]))
    still = {"optimizer": lambda ps: torch.optim.SGD(ps, 0.0), "progress": False, "epochs": 1, "seed": 0}
    for batch_size in (20, 60):
        history = mm.fit(story, guide, TraceMeanField_ELBO(30), batch, validation=batch, batch_size=batch_size, **still)
        assert history.to_dict()["validation"][0] == pytest.approx(-log_p / 60, abs=0.05)


# -- reproducible, and considerate -----------------------------------------------------------------


def test_a_seed_fixes_the_run_and_leaves_the_generator_alone():
    model, guide = pair()
    results = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        twin = copy.deepcopy((model, guide))
        history = mm.fit(*twin, mm.objectives.mvae(1), data(), validation=data(20, 1), epochs=2, seed=5, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((history.to_dict(), weights(*twin)))
    assert results[0][0] == results[1][0] and all(map(torch.equal, results[0][1], results[1][1]))
    other = mm.fit(*copy.deepcopy((model, guide)), mm.objectives.mvae(1), data(), epochs=2, seed=6, **QUIET)
    assert other.to_dict()["loss"] != results[0][0]["loss"]


def test_validation_draws_do_not_change_the_training():
    model, guide = pair()
    histories = []
    for validation in (None, data(20, 1)):
        twin = copy.deepcopy((model, guide))
        histories.append(mm.fit(*twin, mm.objectives.elbo(), data(), validation=validation, epochs=2, seed=5, **QUIET))
    assert histories[0].to_dict()["loss"] == histories[1].to_dict()["loss"]


def test_the_history_has_a_column_for_every_term_which_add_up():
    model, guide = pair()
    seen = []
    history = mm.fit(
        model, guide, mm.objectives.mvae(), data(), validation=data(10, 1), epochs=3, seed=0, **QUIET,
        callback=lambda epoch, entry: seen.append((epoch, entry)),
    )  # fmt: skip
    columns = history.to_dict()
    assert len(history) == 3 and {len(c) for c in columns.values()} == {3}
    terms = set(columns) - {"loss", "validation"}
    assert terms == {"(*, *, P)", "(a, a, P)", "(b, b, P)"}
    for i, loss in enumerate(columns["loss"]):
        assert loss == pytest.approx(-sum(columns[t][i] for t in terms), rel=1e-5)
    assert [e for e, _ in seen] == [1, 2, 3] and [e["loss"] for _, e in seen] == columns["loss"]
    assert set(mm.fit(*pair(), Trace_ELBO(), data(), epochs=1, **QUIET).to_dict()) == {"loss"}


def test_the_csv_of_a_history_has_its_columns(tmp_path):
    history = mm.fit(*pair(), mm.objectives.elbo(), data(), epochs=2, **QUIET)
    history.to_csv(tmp_path / "history.csv")
    head, *rows = (tmp_path / "history.csv").read_text().splitlines()
    assert len(rows) == 2 and float(rows[1].split(",")[0]) == history.to_dict()["loss"][1] and head.startswith("loss")


def exact_pair():
    """A story and the exact posterior: with IWAE every loss is -log p of its rows, whatever the draws."""
    torch.manual_seed(0)
    model = mm.models.LinearGaussian({"a": torch.randn(3, 2), "b": torch.randn(1, 2)}, noise=0.5).double()
    return model, mm.Guide(z=model.posterior)


@pytest.mark.parametrize("batch_size", [7, 32, 33, 100, 1000])
def test_the_loss_is_in_nats_a_row_whatever_the_last_smaller_batch(batch_size):
    model, guide = exact_pair()
    batch = mm.Batch({n: data()[n].double() for n in "ab"}, data().present)
    validation = batch[:37]
    history = mm.fit(
        model, guide, mm.estimators.IWAE(2), batch, validation=validation, epochs=1, batch_size=batch_size,
        optimizer=lambda ps: torch.optim.SGD(ps, 0.0), progress=False,
    ).to_dict()  # fmt: skip
    with torch.no_grad():
        assert history["loss"][0] == pytest.approx(-model.log_prob(batch).mean().item(), rel=1e-10)
        assert history["validation"][0] == pytest.approx(-model.log_prob(validation).mean().item(), rel=1e-10)


@pytest.mark.parametrize("plate", ["batch.plate()", "pyro.plate"])
def test_every_step_has_the_gradient_of_the_loss_a_row(plate, double):
    """Rows all equal c, x ~ N(mu, 1): mu <- mu - 0.1 (mu - c) at each step, however few rows are in it."""
    mu = nn.Parameter(torch.tensor(0.0))

    def story(batch):
        with batch.plate() if plate == "batch.plate()" else pyro.plate("data", batch.size, dim=-1):
            batch.observe("x", dist.Normal(mu, 1.0))

    batch = mm.Batch({"x": torch.full((11,), 3.0)})
    sgd = lambda ps: torch.optim.SGD(ps, 0.1)  # noqa: E731
    mm.fit(story, lambda b: None, Trace_ELBO(), batch, epochs=2, batch_size=4, optimizer=sgd, progress=False)
    assert mu.item() == pytest.approx(3 * (1 - 0.9**6), rel=1e-12)


def test_fit_leaves_the_callers_batch_untouched():
    batch = data()
    kept = {n: batch[n].clone() for n in "ab"}, {n: m.clone() for n, m in batch.present.items()}
    state = dict(batch.__dict__)
    mm.fit(*pair(), mm.objectives.mvae(1), batch, validation=batch, epochs=1, **QUIET)
    assert all(torch.equal(batch[n], kept[0][n]) and torch.equal(batch.present[n], kept[1][n]) for n in "ab")
    assert batch.__dict__.keys() == state.keys() and all(batch.__dict__[k] is v for k, v in state.items())


def test_modules_train_in_train_mode_and_are_left_in_eval_mode():
    model, guide = pair()
    modes = []
    model.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
    mm.fit(model, guide, mm.objectives.elbo(), data(), validation=data(9, 1), epochs=1, **QUIET)
    assert not model.training and not guide.training
    assert (True, True) in modes and modes[-1] == (False, False)


# -- errors ----------------------------------------------------------------------------------------


def test_a_parameter_without_a_gradient_is_named():
    model, guide = pair()
    model.decoders["a"].spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"model\.decoders\.a\.spare"):
        mm.fit(model, guide, mm.objectives.elbo(), data(), epochs=1, **QUIET)
    model.decoders["a"].spare.requires_grad_(False)
    mm.fit(model, guide, mm.objectives.elbo(), data(), epochs=1, **QUIET)
    only_a = mm.objectives.Objective([mm.objectives.Term("a", "a")])
    with pytest.raises(RuntimeError, match=r"model\.decoders\.b.* and 2 more|model\.decoders\.b"):
        mm.fit(*pair(), only_a, data(), epochs=1, **QUIET)


def test_a_parameter_without_a_gradient_is_found_in_a_function_story():
    story, guide, _ = closures()
    only_a = mm.objectives.Objective([mm.objectives.Term("a", "a")])
    with pytest.raises(RuntimeError, match="no gradient"):
        mm.fit(story, guide, only_a, data(), epochs=1, **QUIET)


@pytest.mark.parametrize("functions", [True, False])
def test_an_optimiser_that_leaves_out_a_parameter_raises(functions):
    story, guide = closures()[:2] if functions else pair()
    some = lambda ps: torch.optim.SGD(list(ps)[1:], 0.1)  # noqa: E731
    with pytest.raises(RuntimeError, match="leaves out 1 "):
        mm.fit(story, guide, mm.objectives.elbo(), data(), epochs=1, progress=False, optimizer=some)


def test_nothing_to_train_raises():
    model, guide = (m.requires_grad_(False) for m in pair())
    with pytest.raises(RuntimeError, match="nothing to train"):
        mm.fit(model, guide, mm.objectives.elbo(), data(), epochs=1, **QUIET)


def test_a_loss_that_is_not_finite_raises():
    model, guide = pair()
    with torch.no_grad():
        model.decoders["a"].net.weight.fill_(1e30)
    with pytest.raises((FloatingPointError, ValueError)):
        mm.fit(model, guide, mm.objectives.elbo(), data(), epochs=1, **QUIET)


def test_a_loss_that_diverges_raises():
    huge = lambda ps: torch.optim.SGD(ps, 1e6)  # noqa: E731
    with pytest.raises(FloatingPointError, match="epoch"):
        mm.fit(*pair(), mm.objectives.elbo(), data(), epochs=20, batch_size=32, progress=False, optimizer=huge)


# -- Pyro's optimisers -----------------------------------------------------------------------------


def test_an_objective_in_svi_gives_the_optimiser_nothing_but_parameters():
    model, guide = pair()
    optimizer = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(model, guide, optimizer, mm.objectives.elbo(Trace_ELBO()))
    for _ in range(5):
        svi.step(data())
    assert len(optimizer.optim_objs) == len(weights(model, guide))


def test_an_objective_in_svi_allows_a_rate_by_parameter():
    model, guide = pair()
    asked = []

    def rate(name):
        asked.append(name)
        return {"lr": 0.01 if len(asked) > 1 else 0.0}

    before = weights(model, guide)
    SVI(model, guide, pyro.optim.Adam(rate), mm.objectives.elbo(Trace_ELBO())).step(data())
    unmoved = [torch.equal(old, new) for old, new in zip(before, weights(model, guide), strict=True)]
    assert len(asked) == len(set(asked)) == len(before) and sum(unmoved) == 1


def test_a_mixture_with_learned_weights_trains_or_is_refused_by_pathwise_estimators():
    """Draws of a mixture of Normals move with its weights; those of another family do not, and it would not train."""
    log_weights = nn.Parameter(torch.zeros(2))
    shift = nn.Parameter(torch.tensor([[-1.0], [1.0]]))

    def guide(batch, family):
        with batch.plate():
            components = family(shift.expand(batch.size, 2, 2), 1.0).to_event(1)
            pyro.sample("z", mm.distributions.Mixture(components, log_weights.log_softmax(-1)))

    with pytest.raises(ValueError, match="'z'"):
        mm.fit(pair()[0], lambda b: guide(b, dist.Laplace), mm.estimators.IWAE(3), data(), epochs=1, **QUIET)
    assert not log_weights.any()
    mm.fit(pair()[0], lambda b: guide(b, dist.Normal), mm.estimators.IWAE(3), data(), epochs=1, **QUIET)
    assert log_weights.all()


def test_networks_that_only_some_terms_use_train_in_a_function_guide():
    """A joint encoder's stand-in for incomplete rows never runs on complete ones, and JMVAE-kl's penalties need it."""
    normal = lambda d: mm.conditionals.Normal(mm.nn.MLP(d, 4, ()))  # noqa: E731
    unimodal = mm.posteriors.ProductOfExperts({"a": normal(2), "b": normal(3)}, prior=None)
    features = {"a": mm.nn.MLP(2, 4, ()), "b": mm.nn.MLP(3, 4, ())}
    posterior = mm.posteriors.JointEncoder(features, normal(8), partial=unimodal)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", posterior(batch))

    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"a": normal(2), "b": mm.conditionals.Normal(mm.nn.MLP(2, 6, ()))})
    data = mm.Batch({"a": torch.randn(20, 2), "b": torch.randn(20, 3)})
    before = {n: p.clone() for n, p in posterior.named_parameters()}
    objective = mm.objectives.jmvae_kl(0.5)
    mm.fit(model, guide, objective, data, epochs=2, batch_size=10, progress=False)
    assert all(not torch.equal(p, before[n]) for n, p in posterior.named_parameters())
    assert objective.steps == 0  # the count of steps is that of the training


# -- a training that is stopped --------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("functions", "compile"), [(False, False), (True, False), (False, True)])
def test_a_training_that_was_stopped_goes_on_with_the_same_numbers(tmp_path, functions, compile):
    """Warm-up, optimiser, shuffling, draws and history, of modules and of networks that functions hold.

    A compiled one has no first step that is not compiled.
    """
    rows, file = data(), tmp_path / "deep" / "checkpoint.pt"

    def train(checkpoint, stop=None):
        def at(epoch, entry):
            if epoch == stop:
                raise Stopped

        torch.manual_seed(3)
        model, guide = pair()
        programs = (lambda b: model(b), lambda b: guide(b)) if functions else (model, guide)
        objective = mm.objectives.elbo(kl=mm.objectives.warm_up(9))
        try:
            history = mm.fit(
                *programs, objective, rows, epochs=4, seed=1, validation=rows, checkpoint=checkpoint, callback=at,
                compile=compile, **QUIET,
            )  # fmt: skip
        except Stopped:
            return None, None
        return history.to_dict(), weights(model, guide)

    straight, there = train(None)
    assert train(file, stop=2) == (None, None)
    history, here = train(file)
    torch.testing.assert_close(here, there, rtol=0, atol=0)
    assert history == straight
    again, done = train(file)
    assert again == history
    torch.testing.assert_close(done, here, rtol=0, atol=0)


def test_a_checkpoint_of_short_epochs_takes_little_time_and_has_the_last(tmp_path):
    file, seen = tmp_path / "checkpoint.pt", []

    def at(epoch, entry):
        seen.append(torch.load(file, weights_only=True)["epochs"])
        if epoch == 6:
            raise Stopped

    for epochs in (4, 8):
        with nullcontext() if epochs == 4 else pytest.raises(Stopped):
            fit_at(
                Pace(write_share=1e9), *pair(), mm.objectives.elbo(), data(), epochs=epochs, checkpoint=file,
                callback=at, **QUIET,
            )  # fmt: skip
    assert seen == [1, 1, 1, 1, 5, 5]
    assert torch.load(file, weights_only=True)["epochs"] == 6


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    file, rows = tmp_path / "checkpoint.pt", data()
    again = lambda model, guide, objective=None, epochs=2, **options: mm.fit(  # noqa: E731
        model, guide, objective or mm.objectives.elbo(), rows, epochs=epochs, checkpoint=file, **QUIET | options
    )
    again(*pair())
    model, guide = pair()
    model.decoders["a"] = mm.conditionals.Normal(mm.nn.MLP(2, 6, (4,)))
    with pytest.raises(ValueError, match=r"does not fit what is to be trained(?s:.*)decoders.a"):
        again(model, guide)
    with pytest.raises(ValueError, match="its optimizer's kind is Adam, and not SGD"):
        again(*pair(), optimizer=lambda ps: torch.optim.SGD(ps, 0.1))
    with pytest.raises(ValueError, match=r"its objective is (?s:.*) and not (?s:.*)kl 0.5"):
        again(*pair(), mm.objectives.elbo(kl=0.5))
    with pytest.raises(ValueError, match="is of 2 epochs, more than the 1 asked for"):
        again(*pair(), epochs=1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged, or not a checkpoint of mm.fit"):
        again(*pair())


def test_a_checkpoint_leaves_the_step_size_to_the_caller(tmp_path):
    rows, file, still = data(), tmp_path / "checkpoint.pt", lambda ps: torch.optim.Adam(ps, 0.0)
    (model, guide), options = pair(), {"checkpoint": file, "epochs": 1}
    mm.fit(model, guide, mm.objectives.elbo(), rows, **QUIET | options)
    before = weights(model, guide)
    mm.fit(model, guide, mm.objectives.elbo(), rows, **QUIET | options | {"epochs": 2, "optimizer": still})
    assert all(map(torch.equal, before, weights(model, guide)))


SCHEDULES = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.3),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_followed_and_taken_up_where_a_training_stopped(tmp_path, kind, compile):
    """The sizes of a torch scheduler that is stepped by hand, epoch by epoch, and through a stop."""
    rows, sizes = data(), []

    def train(epochs, checkpoint=None):
        torch.manual_seed(3)
        made = []

        def sgd(parameters):
            made.append(torch.optim.SGD(parameters, 0.01))
            return made[-1]

        sizes.clear()
        model, guide = pair()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            history = mm.fit(
                model, guide, mm.objectives.elbo(), rows, epochs=epochs, seed=1, validation=rows,
                scheduler=SCHEDULES[kind], checkpoint=checkpoint, compile=compile,
                callback=lambda *_: sizes.append(made[-1].param_groups[0]["lr"]), **QUIET | {"optimizer": sgd},
            )  # fmt: skip
        return history, weights(model, guide)

    history, straight = train(6)
    by_hand = torch.optim.SGD([torch.zeros(1)], 0.01)
    plan, expected = SCHEDULES[kind](by_hand), []
    for loss in history.to_dict()["validation"]:
        by_hand.step()
        plan.step(*([loss] if kind == "plateau" else []))
        expected.append(by_hand.param_groups[0]["lr"])
    assert sizes == expected and len(set(expected)) > 1
    train(3, tmp_path / "checkpoint.pt")
    _, resumed = train(6, tmp_path / "checkpoint.pt")
    assert sizes == expected[3:]
    torch.testing.assert_close(resumed, straight, rtol=1e-5 if compile else 0, atol=1e-6 if compile else 0)


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_lays_out_moments_as_the_weights_are(tmp_path, first):
    """Moments of convolutions laid out with the channels last, for weights that are not, or the other way round."""
    rows = mm.Batch({"image": torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))})

    def run(last, epochs, file):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 4))
        decoder = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(-1, (2, 2, 2)), nn.ConvTranspose2d(2, 3, 2, 2))
        for net in (encoder, decoder) if last else ():
            channels_last(net)
        z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        model = mm.models.SharedLatent(z, {"image": mm.conditionals.Normal(decoder, (3, 4, 4), scale=1.0)})
        guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"image": mm.conditionals.Normal(encoder)}))
        fused = lambda ps: torch.optim.Adam(ps, 0.05, fused=True)  # noqa: E731
        mm.fit(model, guide, mm.objectives.elbo(), rows, epochs=epochs, seed=0, checkpoint=file,
               **QUIET | {"optimizer": fused})  # fmt: skip
        return weights(model, guide)

    straight = run(False, 6, None)
    run(first, 3, tmp_path / "checkpoint.pt")
    torch.testing.assert_close(run(not first, 6, tmp_path / "checkpoint.pt"), straight, rtol=1e-4, atol=1e-5)


def test_a_transform_that_makes_another_batch_is_refused():
    """It would lose what its rows are a part of, and with it the size of the data plate."""
    model, guide = pair()
    for other in (lambda b: mm.Batch({n: b[n] for n in b}), lambda b: b[:1]):
        with pytest.raises(ValueError, match=r"return batch.replaced"):
            mm.fit(model, guide, mm.objectives.elbo(), data(), transform=other, epochs=1, **QUIET)


def test_a_transform_changes_every_training_minibatch_and_no_validation():
    """With the exact posterior and a step size of 0, both losses are closed forms."""
    model = mm.models.LinearGaussian({"a": torch.randn(1, 2)}, noise=0.5)
    rows = mm.Batch({"a": torch.randn(23, 1)})
    shifted = lambda batch: batch.replaced({"a": batch["a"] + 3.0})  # noqa: E731
    still = {"optimizer": lambda ps: torch.optim.SGD(ps, 0.0)}
    losses = mm.fit(
        model, mm.Guide(z=model.posterior), mm.estimators.IWAE(1), rows, validation=rows, epochs=1, transform=shifted,
        seed=0, **QUIET | still,
    ).columns  # fmt: skip
    assert losses["loss"][0] == pytest.approx(-model.log_prob(shifted(rows)).mean().item(), rel=1e-4)
    assert losses["validation"][0] == pytest.approx(-model.log_prob(rows).mean().item(), rel=1e-4)
