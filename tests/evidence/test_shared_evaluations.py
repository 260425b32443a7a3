"""Evaluations by several processes: the numbers are those of one, to the last digit or nearly."""

import os
import signal
import socket
import traceback
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm import protocols
from pyro_mm.utils.sharing import share_out
from tests.support.exact_training import linear_pair, rows

MAIN = os.getpid()


@pytest.fixture(scope="module")
def linear():
    """A linear-Gaussian model and a guide that is too wide, in float64; 1,001 rows with missing modalities."""
    model, _ = linear_pair()

    def wide(batch):
        q = model.posterior(batch)
        return dist.Normal(q.mean, 1.2 * q.stddev).to_event(1)

    return model, mm.Guide(z=wide), rows(1001)


@cache
def clusters():
    """Two clusters, whose label the guide does not know; 100 rows."""

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(2 * y - 1, 0.5))
            batch.observe("x", dist.Normal(z, 0.5))

    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    return model, mm.Guide(z=lambda batch: dist.Normal(batch["x"], 0.5)), mm.Batch({"x": x})


def tensors(result):
    """Return the numbers of a result of any kind."""
    if isinstance(result, tuple):
        return [x for part in result for x in tensors(part)]
    if isinstance(result, dict):
        return list(result.values())
    if isinstance(result, mm.Evidence):
        running = [x for pair in result.running.values() for x in pair]
        return [result.log_prob, result.standard_error, result.ess, result.pareto_k, *running, *result.shared]
    if isinstance(result, mm.ClassProbabilities):
        return [result.probabilities, result.standard_error, *tensors(result.evidence)]
    return list(result.ranks.values())


def evaluations(model, guide, batch):
    """Name -> result of every function that several processes share out."""
    few, two = {"num_particles": 150, "seed": 3, "audit": False}, ("a", "b")
    prior = mm.Proposal("antithetic", prior_share=0.3)
    found = {
        "marginal": mm.log_marginal(model, guide, batch, **few),
        "prior": mm.log_marginal(model, guide, batch, proposal=prior, **few),
        "quasi": mm.log_marginal(model, guide, batch, proposal=mm.Proposal("quasi"), **few),
        "one by one": mm.log_marginal(model, guide, batch[:3], num_particles=4, seed=0, vectorize=False, audit=False),
        "few draws": mm.log_marginal(model, guide, batch, num_particles=30, seed=0, audit=False),
        "fitted": mm.log_marginal(
            model, guide, batch[:700], num_particles=40, seed=3, audit=False, proposal=mm.Fitted(rounds=2, pilot=20)
        ),
        "conditional": mm.log_conditional(model, guide, batch, target="a", given="b", **few),
        "annealed": mm.annealed_importance(model, guide, batch, temperatures=2, leapfrog_steps=1, seed=3, audit=False),
        "both bounds": mm.bidirectional(
            model, guide, batch[:600], temperatures=2, leapfrog_steps=1, seed=3, audit=False
        ),
        "samples": dict(mm.generate(model, guide, batch.only("a"), 2, seed=3, audit=False)),
        "draws": mm.posterior_draws(model, guide, batch, 3, resample=True, num_particles=20, seed=3, audit=False),
        "calibration": mm.calibration(model, guide, batch, num_draws=60, seed=3, audit=False),
        "classes": mm.class_probabilities(*clusters(), "y", num_particles=1500, seed=3, audit=False),
    }
    for name in protocols.__all__[1:]:
        options = {"prior_draws": 100} if name == "conditional" else {}
        found[name] = getattr(protocols, name)(model, guide, batch[:100], two[:1], two[1:], **few, **options)
    return found


def test_two_processes_have_the_numbers_of_one(linear):
    """1,001 rows in float64, in both processes of one fork; Fitted as well; seeds alone decide what is drawn."""
    expected = evaluations(*linear)

    def compare():
        found = evaluations(*linear)
        differences = {}
        for name, result in expected.items():
            pairs = zip(tensors(result), tensors(found[name]), strict=True)
            gaps = [(torch.nan_to_num(one, 7) - torch.nan_to_num(two, 7)).abs().max() for one, two in pairs]
            differences[name] = float(max(gaps))
        assert max(differences.values()) <= 1e-12, differences
        return os.getpid()

    assert share_out("all", 2, compare, dict) == MAIN
    assert not torch.distributed.is_initialized()


def test_each_process_does_a_part(linear):
    """Draws in 16 blocks of 65, and samples in two blocks of rows; a story that counts its own runs."""
    model, guide, batch = linear
    runs = []

    def counted(rows):
        runs.append(rows.size)
        return model(rows)

    def count(**options):
        runs.clear()
        mm.log_marginal(counted, guide, batch, seed=0, audit=False, **options)
        by_likelihood = len(runs)
        mm.generate(counted, guide, batch, seed=0, audit=False, **options)
        return by_likelihood, len(runs) - by_likelihood

    count()  # finds the structure of the pair
    alone_likelihood, alone_samples = count(devices=1)
    shared_likelihood, shared_samples = count(devices=2)
    assert 0.4 < shared_likelihood / alone_likelihood < 0.6 and alone_likelihood > 50
    assert (alone_samples, shared_samples) == (2, 1)


# -- what goes wrong ------------------------------------------------------------------------------------------------


def failing(model, at, act):
    """Return a story that does something at its call number ``at`` in another process than this one."""
    calls = []

    def story(batch):
        calls.append(batch.size)
        if os.getpid() != MAIN and len(calls) > at:
            act()
        return model(batch)

    return story


def test_an_error_of_another_process_is_raised_here(linear):
    model, guide, batch = linear

    def fail():
        raise KeyError("of rank 1")

    with pytest.raises(KeyError, match="of rank 1") as raised:
        mm.log_marginal(failing(model, 2, fail), guide, batch, seed=0, audit=False, devices=2)
    assert any("in process 1 of the evaluation" in note for note in raised.value.__notes__)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    with pytest.raises(ValueError, match="process 1 of the evaluation was killed by SIGKILL"):
        mm.generate(failing(model, 0, kill), guide, batch, seed=0, audit=False, devices=3)
    with pytest.raises(ValueError, match="process 1 of the evaluation ended by itself, with exit code 3"):
        mm.generate(failing(model, 0, lambda: os._exit(3)), guide, batch, seed=0, audit=False, devices=2)
    assert not torch.distributed.is_initialized()


def test_a_process_that_is_lost_before_all_are_there(linear, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match=r"process . of the evaluation was killed by SIGKILL"):
        mm.generate(*linear, devices=3, audit=False)


def test_processes_inside_of_processes_are_refused(linear):
    model, guide, batch = linear

    class Evaluate:
        def on_epoch(self, training):
            mm.log_marginal(model, guide, batch[:5], num_particles=30, audit=False, devices=2)

    with pytest.raises(ValueError, match="devices=2 in log_marginal, which is called within a training or an evalua"):
        mm.fit(
            model, guide, mm.objectives.elbo(), batch[:20], devices=2, epochs=1, progress=False, callbacks=[Evaluate()]
        )
    with pytest.raises(ValueError, match="devices >= 1, got 0"):
        mm.generate(model, guide, batch, devices=0)
    with pytest.raises(TypeError, match="expected devices to be an integer"):
        mm.calibration(model, guide, batch, devices="2")


def test_a_callback_evaluates_by_itself(linear):
    """The main process alone makes the call, for which it would wait for ever if the others took part."""
    model, guide, batch = linear
    seen = []

    class Evaluate:
        def on_epoch(self, training):
            if training.is_main:
                seen.append(mm.log_marginal(model, guide, batch[:50], num_particles=30, seed=0, audit=False).mean())

    mm.fit(model, guide, mm.objectives.elbo(), batch[:20], devices=2, epochs=2, progress=False, callbacks=[Evaluate()])
    assert len(seen) == 2 and seen[0] != seen[1]


def test_processes_of_torchrun_take_part_and_are_compared(linear, tmp_path):
    """None of them is given other rows, weights or seeds, or calls something else, without an error in all."""
    model, guide, batch = linear
    expected = mm.log_marginal(model, guide, batch, num_particles=150, seed=3, audit=False).log_prob
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def work(rank):
        found = mm.log_marginal(model, guide, batch, num_particles=150, seed=3, audit=False)
        free = mm.log_marginal(model, guide, batch, num_particles=70, audit=False)  # the seed of rank 0
        torch.save((found.log_prob, free.log_prob), tmp_path / f"{rank}.pt")
        other = linear_pair(seed=rank)[0]
        shown = mm.log_marginal(other, guide, batch[:4], num_particles=30, seed=rank, audit=False, devices=1)
        assert len(shown) == 4
        for refused, call in {
            "the seeds differ, 0 and 1": lambda: mm.generate(model, guide, batch, seed=rank),
            "the numbers of rows differ, 4 and 5": lambda: mm.generate(model, guide, batch[: 4 + rank]),
            "the rows differ": lambda: mm.generate(model, guide, batch[rank : rank + 4]),
            "the weights of model and guide differ": lambda: mm.generate(other, guide, batch),
            "process 0 calls generate and process 1 calls calibration": lambda: (
                mm.calibration(model, guide, batch) if rank else mm.generate(model, guide, batch)
            ),
        }.items():
            with pytest.raises(ValueError, match=refused):
                call()
        torch.distributed.destroy_process_group()

    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        try:
            torch.set_num_threads(1)
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
            torch.manual_seed(rank)
            work(rank)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(found, expected) for found, _ in results)
    assert torch.equal(results[0][1], results[1][1])
