"""Batch statistics and players in trainings by two processes: the numbers of one process with the whole batch."""

import os

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, HSIC, MMD, Critic, Discriminator, Objective, SlicedWasserstein, Term
from pyro_mm.objectives.discrepancies import Discrepancy, DiscrepancyTerm
from pyro_mm.scoring.training_objective import PreparedObjective
from pyro_mm.utils.global_state import override_validation
from tests.support import implicit_pair
from tests.support.adversarial_game import game
from tests.support.constant_noise import without_noise
from tests.support.exact_training import without_inductor
from tests.support.nested_values import differing

MAIN = os.getpid()
SGD = lambda ps: torch.optim.SGD(ps, 0.002, momentum=0.5)  # noqa: E731


@pytest.fixture
def no_noise(monkeypatch):
    without_noise(monkeypatch)


def rows(size=37):
    """Rows of x and y in float64, some of which lack one of them."""
    uniform = torch.rand(size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    i = torch.arange(size)
    x = 4 * uniform[:, :2] - 1
    return mm.Batch({"x": x, "y": x[:, :1] + uniform[:, 2:]}, {"x": i % 5 != 1, "y": i % 4 != 2})


def train(make, batch, processes, **options):
    """Train with minibatches of 16 rows; return the history, and the weights of all modules."""
    model, guide, objective = make()
    networks = objective.modules if isinstance(objective, mm.objectives.Objective | mm.objectives.VAEGAN) else []
    modules = [model, guide, *([objective] if isinstance(objective, nn.Module) else networks)]
    for module in modules:
        module.double()
    settings = {"batch_size": 16 // processes, "devices": processes, "epochs": 1, "optimizer": SGD, "seed": 0}
    history = mm.fit(
        model, guide, objective, batch, **{"progress": False, "audit": False} | settings | options
    )  # fmt: skip
    return history.to_dict(), [p.detach().clone() for module in modules for p in module.parameters()]


# -- makers of model, guide and objective ---------------------------------------------------------------------------


def explicit_pair():
    model, guide = implicit_pair.pair(implicit=False)
    return model.double(), guide.double()


def private_pair():
    """A latent z of all modalities, and one of x."""
    torch.manual_seed(0)
    standard = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    decoders = {name: mm.conditionals.Normal(nn.Linear(2, size), scale=0.5) for name, size in (("x", 2), ("y", 1))}

    def model(batch):
        with batch.plate():
            z, w = pyro.sample("z", standard), pyro.sample("w", standard)
            batch.observe("x", decoders["x"], z + w)
            batch.observe("y", decoders["y"], z)

    experts = [
        mm.posteriors.ProductOfExperts({n: mm.conditionals.Normal(nn.Linear(d, 4)) for n, d in (("x", 2), ("y", 1))})
        for _ in range(2)
    ]
    story = nn.ModuleDict(decoders).double()
    story.forward = model
    return story, mm.Guide(z=experts[0], w=experts[1]).double()


def of_statistic(statistic, pair=explicit_pair):
    return lambda: (*pair(), mm.objectives.elbo() + 3 * statistic)


def of_critic(against, **options):
    def make():
        model, guide = implicit_pair.pair()
        torch.manual_seed(2)
        critic = Critic(mm.nn.MLP(4, 3 if against == "posterior" else 1, (8,)), against, optimizer=SGD, **options)
        table = Objective([Term(ALL, ALL), Term(("x",), ("x",), weight=0.5, average=True)])
        return model.double(), guide.double(), table.with_critics({"x": critic.double()})

    return make


def of_discriminator():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    table = mm.objectives.elbo() + 2 * MMD("z", bandwidth=1.0)
    return *explicit_pair(), table.with_discriminators({"x": Discriminator(net, penalty=0.1, optimizer=SGD, every=2)})


def of_game():
    model, guide, objective = game(optimizer=SGD)
    return model, guide, objective


CASES = {
    "MMD from the prior": of_statistic(MMD("z")),
    "MMD of two posteriors, V-statistic": of_statistic(MMD("z", "x", bandwidth=1.0, unbiased=False, reference="y")),
    "HSIC": of_statistic(HSIC("z", "w"), private_pair),
    "sliced Wasserstein distance": of_statistic(SlicedWasserstein("z", "x", 3, reference="y")),
    "a sum of two estimators": of_statistic(
        MMD("z", EACH, "imq", 2.0) + mm.objectives.mvae(estimator=mm.estimators.IWAE(2))
    ),
    "critic, posterior": of_critic("posterior", penalty=0.1),
    "critic, prior": of_critic("prior", every=2, generator_loss="likelihood"),
    "discriminator": of_discriminator,
    "own players": of_game,
}  # fmt: skip


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("case", CASES)
def test_trainings_by_two_processes_are_those_of_one_with_the_whole_batch(case):
    """Three steps on 37 rows, some without x or y: shards of 8 and 8 rows, and of 3 and 2 at the end.

    Without noise in float64; history and weights of all networks agree within 1e-10.
    """
    batch = rows_of(case)
    expected = train(CASES[case], batch, 1)
    assert differing(train(CASES[case], batch, 2), expected, atol=1e-10) == []


def rows_of(case):
    batch = rows()
    if case != "own players":
        return batch
    return mm.Batch({"a": torch.cat([batch["x"], batch["y"]], -1), "b": batch["y"]})


@pytest.mark.usefixtures("no_noise")
def test_a_stream_is_shared_out():
    """Its minibatches know of some modalities that all of their rows have them, in one process and not in the other."""
    whole = rows(21)
    stream = mm.Stream(lambda: (whole[i : i + 1] for i in range(whole.size)), whole.size, buffer=10)
    make = CASES["critic, posterior"]
    assert differing(train(make, stream, 2), train(make, stream, 1), atol=1e-10) == []


@pytest.mark.usefixtures("no_noise")
def test_compiled_steps_of_two_processes_are_those_of_one(monkeypatch):
    """The critic's loss, which gathers rows, runs uncompiled, and the generator's and the objective's are compiled."""
    without_inductor(monkeypatch)
    make = CASES["critic, posterior"]
    expected = train(make, rows(), 1)
    with override_validation(True), pytest.warns(UserWarning, match="not compiled") as caught:
        found = train(make, rows(), 2, compile=True)
    assert differing(found, expected, atol=1e-10) == []
    (text,) = [str(each.message) for each in caught if "not compiled" in str(each.message)]
    assert "the critic of (*, *, P) compares rows of several processes, which no graph gathers" in text


def test_players_of_two_processes_go_on_from_a_checkpoint(tmp_path):
    """With the noise of each process, and the moments of every player."""
    make = of_critic("posterior", every=2, generator_optimizer=lambda ps: torch.optim.Adam(ps, 0.01))
    expected = train(make, rows(), 2, epochs=2)
    train(make, rows(), 2, epochs=1, checkpoint=tmp_path / "run.pt")
    assert differing(train(make, rows(), 2, epochs=2, checkpoint=tmp_path / "run.pt"), expected) == []


# -- what is refused ------------------------------------------------------------------------------------------------


class Spread(Discrepancy):
    """The variance of latents over the rows of a batch."""

    def statistic(self, draws, place, term, rows):
        return draws.latent("z")[:, place].var(1).sum(-1)


class OneNumber(Spread):
    """The same as one number, of a kind that knows nothing of processes."""

    def values(self, terms, scores, estimator):
        return [self.statistic(scores.draws, place, term, None).mean() for place, term in enumerate(terms)]


@pytest.mark.parametrize(
    ("kind", "message"), [(Spread, "does not gather those of several processes"), (OneNumber, "has one number for all")]
)
def test_statistics_that_do_not_gather_rows_are_refused(monkeypatch, kind, message):
    objective = mm.objectives.elbo() + Objective([DiscrepancyTerm(kind("z"), ALL)])
    train(lambda: (*explicit_pair(), objective), rows(), 1, epochs=1)
    with pytest.raises(ValueError, match=message):
        train(lambda: (*explicit_pair(), objective), rows(), 2)
    monkeypatch.setattr(kind, "least_rows", 2)
    with pytest.raises(ValueError, match="the objective compares the rows of a minibatch with each other, which 2"):
        train(lambda: (*explicit_pair(), objective), rows(), 2)


def test_a_statistic_within_a_function_is_refused():
    """The training cannot know that all processes come to it."""

    def objective(model, guide, batch, *, step):
        return (mm.objectives.elbo() + MMD("z")).evaluate(model, guide, batch, step=step)

    with pytest.raises(ValueError, match=r"MMD\(z .* within an objective that does not say so: give fit the objective"):
        train(lambda: (*explicit_pair(), objective), rows(), 2)


def test_processes_that_compare_different_rows_are_refused():
    """Not left to wait for each other: one has a term that the other has not, at the second step."""

    class Chance(PreparedObjective):
        estimator_name = "own"
        parts = (mm.objectives.elbo(), mm.objectives.elbo() + MMD("z"))

        def gathers_rows(self, names):
            return True

        def evaluate(self, model, guide, batch, *, step):
            return self.parts[step == 1 and os.getpid() == MAIN].evaluate(model, guide, batch, step=step)

    with pytest.raises(ValueError, match=r"process 1 has come to the end of the loss, and process 0 to MMD\(z"):
        train(lambda: (*explicit_pair(), Chance()), rows(), 2)


def test_an_error_of_another_process_ends_those_that_wait_for_its_rows():
    class Broken(PreparedObjective):
        estimator_name = "own"
        part = mm.objectives.elbo() + MMD("z")

        def gathers_rows(self, names):
            return True

        def evaluate(self, model, guide, batch, *, step):
            if step == 1 and os.getpid() != MAIN:
                raise KeyError("of rank 1")
            return self.part.evaluate(model, guide, batch, step=step)

    with pytest.raises(KeyError, match="of rank 1"):
        train(lambda: (*explicit_pair(), Broken()), rows(), 2)


def test_batch_normalisation_in_a_players_network_is_refused():
    def make():
        model, guide, objective = of_game()
        objective.critic.insert(1, nn.BatchNorm1d(8))
        return model, guide, objective

    with pytest.raises(ValueError, match="batch normalisation in the player 'critic' would take its mean and variance"):
        train(make, rows_of("own players"), 2)


def test_a_minibatch_of_fewer_rows_than_a_statistic_needs_is_refused():
    """33 rows: one is left for the last minibatch of both processes."""
    with pytest.raises(ValueError, match="the smallest minibatch has 1 of the 2 rows that the objective needs"):
        train(CASES["MMD from the prior"], rows(33), 2)
    history, _ = train(CASES["MMD from the prior"], rows(33), 2, drop_last=True, epochs=1)
    assert len(history["loss"]) == 1
