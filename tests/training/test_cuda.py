"""What needs a GPU: evaluations of rows that lie elsewhere, training, checkpoints, and the same numbers as on a CPU."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

pytestmark = pytest.mark.cuda
tables, E = mm.objectives, mm.estimators


def programs(dropout=0.0):
    torch.manual_seed(0)

    def net(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, outputs))

    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    decoders = {"a": mm.conditionals.Normal(net(3, 8)), "b": mm.conditionals.Categorical(net(3, 5))}
    experts = {"a": mm.conditionals.Normal(net(4, 6)), "b": mm.conditionals.Normal(nn.Embedding(5, 6))}
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def rows(size=96):
    generator = torch.Generator().manual_seed(1)
    values = {
        "a": torch.randn(size, 4, generator=generator),
        "b": torch.randint(0, 5, (size,), generator=generator),
    }
    return mm.Batch(values, present={"a": torch.arange(size) % 4 > 0})


def on_gpu(programs):
    return tuple(copy.deepcopy(p).cuda() for p in programs)


def test_a_likelihood_is_that_of_the_cpu_and_lies_where_the_rows_do():
    """Of 96 rows the mean difference, in units of its standard error, is below 5 but for one case in 2e6."""
    pair, batch = programs(), rows()
    here = mm.log_marginal(*pair, batch, num_particles=2000, seed=0)
    there = mm.log_marginal(*on_gpu(pair), batch, num_particles=2000, seed=0)
    assert there.log_prob.device == batch.device == here.log_prob.device
    difference = (here.log_prob - there.log_prob).mean()
    error = (here.standard_error.square() + there.standard_error.square()).sum().sqrt() / len(batch)
    assert abs(difference) < 5 * error
    on_the_gpu = mm.log_marginal(*on_gpu(pair), batch.to("cuda"), num_particles=2000, seed=0)
    assert on_the_gpu.log_prob.is_cuda and torch.equal(on_the_gpu.log_prob.cpu(), there.log_prob)


def test_every_evaluation_takes_rows_from_the_cpu_and_gives_back_there():
    model, guide = on_gpu(programs())
    batch = rows(12)
    assert all(x.device == batch.device for x in mm.generate(model, guide, batch, 2, seed=0).values())
    assert all(x.device == batch.device for x in mm.posterior_draws(model, guide, batch, 2, seed=0).values())
    assert mm.encode(guide, batch)["z"].sample().device == batch.device
    drawn, latents = mm.simulate(model, batch)
    assert drawn.device == batch.device and all(x.device == batch.device for x in latents.values())
    conditional = mm.log_conditional(model, guide, batch, target="b", given="a", num_particles=50, seed=0)
    assert conditional.log_prob.device == batch.device
    annealed = mm.annealed_importance(model, guide, batch, temperatures=5, num_chains=2, seed=0)
    assert annealed.log_prob.device == batch.device and annealed.log_prob.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_that_is_stopped_goes_on_with_the_same_numbers(compiled, tmp_path):
    ends = []
    for stops in ([6], [2, 6]):
        model, guide = programs()
        path = tmp_path / f"{len(stops)}.pt"
        for epochs in stops:
            if len(stops) > 1:
                model, guide = programs()
            history = mm.fit(
                model, guide, tables.jmvae_kl(0.1), rows(), epochs=epochs, batch_size=32, seed=3, device="cuda",
                compile=compiled, checkpoint=path, progress=False,
            )  # fmt: skip
        ends.append([history.columns["loss"], *(p.detach().cpu() for p in [*model.parameters(), *guide.parameters()])])
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for one, other in zip(ends[0][1:], ends[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "estimator", [E.AnalyticKL(), E.IWAE(3), E.IWAE(3, resample=True), E.DReG(3)], ids=lambda e: repr(e)
)
def test_a_compiled_loss_has_the_mean_of_the_programs(estimator):
    """40 losses of either kind; the difference of their means is below 5 standard errors but for one case in 2e6."""
    model, guide = on_gpu(programs(dropout=0.2))
    batch = rows().to("cuda")
    objective = tables.jmvae_kl(0.1, estimator)
    step = mm.stage(objective, model, guide, batch)
    staged, eager = [], []
    for seed in range(40):
        torch.cuda.manual_seed(seed)
        staged.append(float(step(batch)))
        eager.append(float(objective.differentiable_loss(model, guide, batch)))
    staged, eager = (torch.tensor(x[3:]).double() for x in (staged, eager))
    error = ((staged.var() + eager.var()) / len(staged)).sqrt()
    assert step.reasons == []
    assert abs(staged.mean() - eager.mean()) < 5 * error


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_not_finite_is_found(compiled):
    scale = nn.Parameter(torch.zeros((), device="cuda"))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))
            batch.observe("x", lambda z: dist.Normal(z, scale.exp()), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.5 * batch["x"], scale.exp()))

    batch = mm.Batch({"x": torch.linspace(-1, 1, 64)})
    with pytest.raises(FloatingPointError):
        mm.fit(
            model, guide, tables.elbo(), batch, epochs=200, batch_size=16, device="cuda", compile=compiled,
            optimizer=lambda p: torch.optim.SGD(p, 1e5), progress=False, seed=0,  # steps that leave float32's range
        )  # fmt: skip
    assert scale.isfinite()


def test_exact_log_weights_on_the_gpu():
    """The exact posterior of a linear-Gaussian story as guide: every log-weight is log p(x), in float64."""
    weight = torch.tensor([[1.0, 0.3], [-0.4, 0.8], [0.5, 0.5]], dtype=torch.float64, device="cuda")
    noise = 0.7
    precision = torch.eye(2, dtype=torch.float64, device="cuda") + weight.T @ weight / noise**2
    factor = torch.linalg.cholesky(torch.linalg.inv(precision))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(weight.new_zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z @ weight.T, noise).to_event(1), z)

    def guide(batch):
        with batch.plate():
            loc = torch.linalg.solve(precision, weight.T @ batch["x"].T / noise**2).T
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    x = torch.randn(20, 3, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    covariance = weight @ weight.T + noise**2 * torch.eye(3, dtype=torch.float64, device="cuda")
    right = dist.MultivariateNormal(weight.new_zeros(3), covariance).log_prob(x)
    found = mm.log_weights(model, guide, mm.Batch({"x": x}), 7)
    assert found.is_cuda and (found - right).abs().max() < 1e-10


def test_means_do_not_depend_on_the_device_of_the_objective():
    """All tables at one parameter value: the mean of 30 evaluations on either device, within 5 standard errors."""
    pair, batch = programs(), rows(400)
    gpu, there = on_gpu(pair), batch.to("cuda")
    for make in (tables.mvae, tables.vaevae, tables.mvtcae, tables.masked, tables.subset_mean):
        values = [
            torch.tensor([make().loss(*p, b) / len(b) for _ in range(30)]).double()
            for p, b in ((pair, batch), (gpu, there))
        ]
        error = math.sqrt(sum(float(v.var()) for v in values) / 30)
        assert abs(values[0].mean() - values[1].mean()) < 5 * error, make.__name__


def tall(size=1600):
    """Rows for 100 minibatches of 16."""
    return rows(size)


def train(epochs, capsys, model=None, guide=None, **options):
    torch.manual_seed(0)
    own = programs() if model is None else (model, guide)
    history = mm.fit(*own, tables.jmvae_kl(0.1), tall(), epochs=epochs, batch_size=16, seed=3, device="cuda", **options)
    return history.columns["loss"], " ".join(capsys.readouterr().out.split())


def test_a_long_training_compiles_by_itself_and_says_so(capsys):
    """As far as the rule sees: a callback ends it after two epochs."""
    stop = {"callback": lambda epoch, entry: epoch == 2}
    chosen, said = train(50, capsys, **stop)
    assert said.count("the step is compiled, for 5,000 of them on cuda:0") == 1
    asked, _ = train(50, capsys, compile=True, **stop)
    assert chosen == asked
    eager, said = train(49, capsys, **stop)
    assert "compiled" not in said and eager == pytest.approx(chosen, rel=0.05)


class SolvesEveryStep(nn.Module):
    """A story whose prior is a covariance matrix, of which every step takes the Cholesky factor, which waits for it."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.scale = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        covariance = torch.diag(self.scale.exp()) + 0.1
        with batch.plate():
            prior = dist.MultivariateNormal(covariance.new_zeros(2), covariance_matrix=covariance)
            z = pyro.sample("z", prior)
            batch.observe("a", lambda z: dist.Normal(self.decoder(z), 1.0).to_event(1), z)


def test_a_step_that_cannot_be_captured_trains_all_the_same(capsys):
    """Under None with a sentence at most; and torch's generator goes on."""
    torch.manual_seed(0)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(nn.Linear(4, 4))}))
    data = tall().only("a")
    losses = []
    for options in ({}, {"compile": False}):
        pair = copy.deepcopy((SolvesEveryStep(), guide))
        history = mm.fit(*pair, tables.elbo(), data, epochs=60, batch_size=16, seed=3, device="cuda",
                         callback=lambda epoch, entry: epoch == 3, **options)  # fmt: skip
        losses.append(history.columns["loss"])
        print(capsys.readouterr().out)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert torch.randn(3, device="cuda").isfinite().all()


class CapturesNothing:
    """A compiled step that waits for the device while it is captured."""

    optimizes = False
    parameters_and_buffers: list = []

    def __call__(self, inputs):
        torch.cuda.synchronize()
        return inputs[0] + torch.randn((), device="cuda"), ()


def test_a_capture_that_fails_leaves_the_generator_as_it_is():
    from pyro_mm.training.cuda_graph import CUDAGraphStep

    said = []
    step = CUDAGraphStep(CapturesNothing(), said.append)
    torch.cuda.manual_seed(5)
    found = [float(step([torch.zeros((), device="cuda")])[0]) for _ in range(6)]
    torch.cuda.manual_seed(5)
    assert found == [float(torch.randn((), device="cuda")) for _ in range(6)]
    assert len(said) == 1 and "not captured as a CUDA graph" in said[0]
    with pytest.raises(RuntimeError):
        strict = CUDAGraphStep(CapturesNothing())
        for _ in range(6):
            strict([torch.zeros((), device="cuda")])
