"""One door for every evaluation: modes, devices, arguments, and the modules that a function reaches."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.scoring.evaluation import evaluating, move_result
from pyro_mm.utils.reachable import ReachableObjects, evaluation_mode


def noisy(inputs, outputs):
    """A network whose output depends on its mode, by dropout and by batch normalisation."""
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, outputs)
    )


DECODER, NETS = torch.nn.Linear(2, 3), {"encoder": torch.nn.Linear(3, 4)}


def story_of(decoder):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(decoder(z), 1.0).to_event(1), z)
            batch.observe("y", lambda z: dist.Normal(z, 1.0).to_event(1), z)

    return story


def guide_of(encoder):
    def guide(batch):
        with batch.plate():
            loc, scale = encoder(batch["x"]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return guide


@pytest.fixture
def batch():
    return mm.Batch({"x": torch.randn(12, 3), "y": torch.randn(12, 2)})


ROWS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
EVALUATIONS = {
    "log_marginal": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=5, seed=0, vectorize=False).log_prob,
    "log_conditional": lambda m, g, b: mm.log_conditional(
        m, g, b, target="y", given="x", num_particles=5, seed=0, vectorize=False
    ).log_prob,
    "log_weights": lambda m, g, b: mm.log_weights(m, g, b),
    "generate": lambda m, g, b: mm.generate(m, g, b, mean=True, seed=0)["x"],
    "posterior_draws": lambda m, g, b: mm.posterior_draws(m, g, b, seed=0)["z"],
    "simulate": lambda m, g, b: mm.simulate(m, b)[0]["x"],
    "encode": lambda m, g, b: mm.encode(g, b)["z"].mean,
    "annealed_importance": lambda m, g, b: mm.annealed_importance(
        m, g, b, num_chains=2, temperatures=3, pilot_chains=2, seed=0, vectorize=False
    ).log_prob,
    "bidirectional": lambda m, g, b: mm.bidirectional(
        m, g, b, num_chains=2, temperatures=3, pilot_chains=2, seed=0, vectorize=False
    )[0].log_prob,
    "calibration": lambda m, g, b: mm.calibration(m, g, b, num_draws=2, seed=0, vectorize=False).ranks["z"],
    "compare": lambda m, g, b: mm.compare(
        {"a": (m, g), "b": (m, g)}, b, num_particles=5, seed=0, vectorize=False
    ).evidence["a"].log_prob,
    "joint": lambda m, g, b: mm.protocols.joint(
        m, g, b, ["x"], ["y"], num_particles=5, seed=0, vectorize=False
    ).log_prob,
}  # fmt: skip


@pytest.mark.parametrize("form", ["functions", "modules"])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_run_in_evaluation_mode_and_put_back_every_mode(name, form, batch):
    """Numbers of networks in training mode are those of the same networks in evaluation mode; buffers stay."""
    encoder, decoder = noisy(3, 4), noisy(2, 3)
    if form == "functions":
        model, guide = story_of(decoder), guide_of(encoder)
    else:
        decoders = {n: mm.conditionals.Normal(noisy(2, k), scale=1.0) for n, k in (("x", 3), ("y", 2))}
        model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
        guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(encoder)}))
    modules = list(ReachableObjects({"model": model, "guide": guide}).all_modules())
    for module in modules:
        module.eval()
    torch.manual_seed(0)
    expected = EVALUATIONS[name](model, guide, batch)
    for module in modules:
        module.training = True
    modules[0].training = False
    before = [module.training for module in modules]
    buffers = [b.clone() for module in modules for b in module.buffers(recurse=False)]
    torch.manual_seed(0)
    assert torch.equal(EVALUATIONS[name](model, guide, batch), expected)
    assert [module.training for module in modules] == before
    after = [b for module in modules for b in module.buffers(recurse=False)]
    assert len(buffers) >= 6 and all(torch.equal(one, two) for one, two in zip(buffers, after, strict=True))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_refuse_what_is_no_pair_and_no_batch(name, batch):
    model, guide = story_of(DECODER), guide_of(NETS["encoder"])
    with pytest.raises(TypeError, match=r"to be a pyro_mm\.Batch, got an object of type dict"):
        EVALUATIONS[name](model, guide, {"x": batch["x"]})
    with pytest.raises(ValueError, match="one row at least, got none"):
        EVALUATIONS[name](model, guide, batch[:0])
    with pytest.raises(TypeError, match="expected"):
        EVALUATIONS[name]("model", "guide", batch)


def test_modes_come_back_after_an_error(batch):
    decoder = noisy(2, 3).train()

    def story(batch):
        decoder(torch.zeros(4, 2))
        raise KeyError("of the story")

    with pytest.raises(Exception, match="of the story"):
        mm.generate(story, guide_of(noisy(3, 4)), batch)
    assert all(module.training for module in decoder.modules())


def test_a_module_that_acts_on_its_mode_is_told_of_it_by_train():
    """As one that folds weights together for evaluation does: an attribute alone would leave it folded."""

    class Folding(torch.nn.Module):
        folded = False

        def train(self, mode=True):
            self.folded = not mode
            return super().train(mode)

    outer = torch.nn.Sequential(Folding(), torch.nn.Sequential(Folding()))
    outer[1].eval()
    with evaluation_mode([outer]):
        assert outer[0].folded and outer[1][0].folded and not any(m.training for m in outer.modules())
    assert not outer[0].folded and outer[0].training and outer.training
    assert outer[1][0].folded and not outer[1][0].training and not outer[1].training


def test_an_inner_evaluation_sees_that_it_is_inside(batch, monkeypatch):
    model, guide = story_of(DECODER), guide_of(NETS["encoder"])
    with evaluating(model, guide, batch, audit=False) as rows:
        monkeypatch.setattr("pyro_mm.scoring.evaluation.ReachableObjects", None)  # not called again
        with evaluating(model, guide, rows, audit=False), evaluating(None, guide, rows, audit=False):
            pass
    with pytest.raises(TypeError), evaluating(model, guide, batch, audit=False):
        pass


def test_rows_go_where_the_networks_are(batch):
    """Seen on torch's device without memory, which is another one on every machine."""
    guide = guide_of(torch.nn.Linear(3, 4, device="meta"))
    with evaluating(None, guide, batch, audit=False) as rows:
        assert rows.device.type == "meta" and batch.device.type == "cpu"
    with evaluating(None, lambda batch: None, batch, audit=False) as rows:
        assert rows is batch


def test_results_come_back_to_the_device_of_the_batch(batch):
    away = batch.to("meta")
    log_w = torch.randn(30, 12)
    evidence = mm.evidence.accumulator.evidence_from_weights(log_w, "log p(x)")
    found = {
        "tensor": log_w,
        "pair": (batch, evidence),
        "distribution": dist.Normal(log_w, 1.0).to_event(1),
        "word": "log p(x)",
    }
    moved = move_result(found, batch, away)
    rows, likelihood = moved["pair"]
    tensors = [moved["tensor"], rows["x"], likelihood.log_prob, likelihood.pareto_k, moved["distribution"].mean]
    tensors += [x for both in likelihood.running.values() for x in both]
    assert {x.device.type for x in tensors} == {"meta"} and moved["word"] == "log p(x)"
    assert likelihood.quantity == evidence.quantity and likelihood.num_particles == 30
    assert move_result(found, batch, batch) is found
