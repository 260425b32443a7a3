"""Weights on disk: there and back, and what cannot be saved or loaded."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm


def pair(hidden=8, latent=2):
    z = dist.Normal(torch.zeros(latent), 1.0).to_event(1)
    w = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    net = lambda i, o: mm.nn.MLP(i, 2 * o, hidden=(hidden,))  # noqa: E731
    normal = mm.conditionals.Normal
    model = mm.models.PrivateLatents(z, {"a": w}, {"a": normal(net(latent + 1, 3)), "b": normal(net(latent, 2))})
    experts = {"a": normal(net(3, latent)), "b": normal(net(2, latent))}
    own = mm.posteriors.Private("a", normal(net(3, 1)))
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(experts), w_a=own)


def batch():
    return mm.Batch({"a": torch.randn(5, 3), "b": torch.randn(5, 2)})


def test_there_and_back(tmp_path):
    path, rows = tmp_path / "run.pt", batch()
    one, other = pair(), pair()
    expected = mm.log_marginal(*one, rows, num_particles=20, seed=0).log_prob
    assert not torch.equal(mm.log_marginal(*other, rows, num_particles=20, seed=0).log_prob, expected)
    kept = [copy.deepcopy(m.state_dict()) for m in one]
    mm.save(path, *one)
    assert mm.load(str(path), *other) is None
    assert torch.equal(mm.log_marginal(*other, rows, num_particles=20, seed=0).log_prob, expected)
    for state, m, n in zip(kept, one, other, strict=True):
        assert m.state_dict().keys() == state.keys() == n.state_dict().keys()
        assert all(torch.equal(state[k], x) and torch.equal(x, n.state_dict()[k]) for k, x in m.state_dict().items())


def test_loaded_weights_are_trained_on_and_belong_to_their_own_model(tmp_path):
    one, other = pair(), pair()
    mm.save(tmp_path / "run.pt", *one)
    mm.load(tmp_path / "run.pt", *other)
    parameters = list(other[0].parameters())
    mm.fit(*other, mm.objectives.elbo(), batch(), epochs=1, progress=False)
    assert all(p is q for p, q in zip(parameters, other[0].parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True))


def test_the_file_is_plain_weights(tmp_path):
    """It opens with weights_only, which runs no code, and holds nothing but tensors under two names."""
    mm.save(tmp_path / "run.pt", *pair())
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert set(state) == {"model", "guide"} and all(
        isinstance(t, torch.Tensor) for s in state.values() for t in s.values()
    )


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil(), "guide": {}}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"(?i)weights"):
        mm.load(tmp_path / "evil.pt", *pair())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("other", [{"hidden": 9}, {"latent": 3}])
def test_another_architecture_is_refused_and_the_weights_named(tmp_path, other):
    mm.save(tmp_path / "run.pt", *pair())
    with pytest.raises(RuntimeError, match=r"(size mismatch|Missing key).*decoders\.a|decoders\.a"):
        mm.load(tmp_path / "run.pt", *pair(**other))


@pytest.mark.parametrize("which", ["model", "guide"])
def test_functions_cannot_be_saved(tmp_path, which):
    modules = dict(zip(["model", "guide"], pair(), strict=True))
    mm.save(tmp_path / "run.pt", **modules)

    def story(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))

    modules[which] = story
    for act in (mm.save, mm.load):
        with pytest.raises(TypeError, match=f"the {which} is a function"):
            act(tmp_path / "run.pt", **modules)


def test_weights_go_to_where_the_pair_is(tmp_path, double):
    """Weights of float32 load into a float64 pair without changing its type; the device is the pair's own."""
    one = pair()
    for m in one:
        m.float()
    mm.save(tmp_path / "run.pt", *one)
    other = pair()
    mm.load(tmp_path / "run.pt", *other)
    p, q = next(one[0].parameters()), next(other[0].parameters())
    assert q.dtype == torch.float64 and q.device == torch.device("cpu") and torch.equal(p.double(), q)
    seen = []
    meta = [m.to("meta") for m in pair()]
    original = torch.load
    torch.load = lambda *a, **k: seen.append(k) or original(*a, **k)
    try:
        mm.load(tmp_path / "run.pt", *meta)
    finally:
        torch.load = original
    assert seen[0]["map_location"] == torch.device("meta") and seen[0]["weights_only"] is True


def test_a_pair_without_parameters_loads(tmp_path):
    class Empty(nn.Module):
        def forward(self, batch):
            pass

    mm.save(tmp_path / "run.pt", Empty(), Empty())
    mm.load(tmp_path / "run.pt", Empty(), Empty())
