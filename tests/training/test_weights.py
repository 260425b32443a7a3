"""Weights on disk: there and back, and what cannot be saved or loaded."""

import copy
import io
import re

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


def test_an_open_file_serves_from_where_it_is():
    file, rows = io.BytesIO(), batch()
    one, other = pair(), pair()
    file.write(b"before")
    mm.save(file, *one)
    file.seek(len(b"before"))
    mm.load(file, *other)
    first, second = (mm.log_marginal(*p, rows, num_particles=20, seed=0).log_prob for p in (one, other))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match=r"is damaged, or not a file of mm\.save"):
        mm.load(io.BytesIO(b"nothing"), *other)


def test_a_saved_pair_loads_into_another_with_the_same_numbers(tmp_path):
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
    with pytest.raises(ValueError, match=r"evil.pt is damaged, or not a file of mm.save"):
        mm.load(tmp_path / "evil.pt", *pair())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("other", [{"hidden": 9}, {"latent": 3}])
def test_another_architecture_is_refused_and_the_weights_named(tmp_path, other):
    mm.save(tmp_path / "run.pt", *pair())
    with pytest.raises(
        ValueError, match=r"run.pt does not fit the model, a PrivateLatents: decoders\.a.* and not float32"
    ):
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
    with pytest.raises(ValueError, match="to go to the meta device, which holds no numbers"):
        mm.load(tmp_path / "run.pt", *(m.to("meta") for m in pair()))


def test_a_pair_without_parameters_can_be_saved_and_loaded(tmp_path):
    class Empty(nn.Module):
        def forward(self, batch):
            pass

    mm.save(tmp_path / "run.pt", Empty(), Empty())
    loaded = Empty(), Empty()
    mm.load(tmp_path / "run.pt", *loaded)
    assert not any(module.state_dict() or module.training for module in loaded)


def test_loaded_modules_are_in_eval_mode(tmp_path):
    """As ``fit`` leaves them: dropout and batch norm of a fresh pair would answer for another model."""
    one, other = pair(), pair()
    mm.save(tmp_path / "run.pt", *one)
    mm.load(tmp_path / "run.pt", *other)
    assert not any(m.training for module in other for m in module.modules())


@pytest.mark.parametrize("part", ["model", "guide"])
def test_nothing_is_loaded_of_a_file_that_fits_in_part(tmp_path, part):
    """Either half of the pair is another one: both keep their weights, and their mode."""
    one, other = pair(), pair()
    mm.save(tmp_path / "run.pt", *one)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    name, last = list(state[part].items())[-1]
    kept = [copy.deepcopy(m.state_dict()) for m in other]
    for wrong in (torch.zeros(5, 7), last.to(torch.complex64), last.tolist(), None):
        torch.save({**state, part: {**state[part], name: wrong}}, tmp_path / "run.pt")
        with pytest.raises(ValueError, match=rf"run.pt does not fit the {part}, .*: {re.escape(name)} is a? ?\w+"):
            mm.load(tmp_path / "run.pt", *other)
    assert all(torch.equal(x, m.state_dict()[k]) for m, s in zip(other, kept, strict=True) for k, x in s.items())
    assert all(m.training for m in other)


def test_a_module_that_refuses_its_state_late_is_put_back(tmp_path):
    """Its own hook, which no comparison of shapes foresees, runs after the model was loaded."""

    class Picky(nn.Linear):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            raise RuntimeError("not this one")

    model, guide = nn.Linear(2, 2), Picky(2, 2)
    mm.save(tmp_path / "run.pt", nn.Linear(2, 2), Picky(2, 2))
    before = [p.clone() for m in (model, guide) for p in m.parameters()]
    Picky.set_extra_state = lambda self, state: (_ for _ in ()).throw(RuntimeError("not this one")) if state else None
    with pytest.raises(ValueError, match=r"run.pt does not fit the pair: not this one"):
        mm.load(tmp_path / "run.pt", model, guide)
    assert all(map(torch.equal, before, [p for m in (model, guide) for p in m.parameters()]))


def test_names_that_a_module_translates_while_it_loads_are_its_own_affair(tmp_path):
    """A layer that was renamed reads the files of before."""

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.new = nn.Linear(2, 2)
            self.register_load_state_dict_pre_hook(self._rename)

        @staticmethod
        def _rename(module, state, *_):
            for key in [k for k in state if k.startswith("old.")]:
                state[key.replace("old.", "new.")] = state.pop(key)

    old = nn.ModuleDict({"old": nn.Linear(2, 2)})
    mm.save(tmp_path / "run.pt", old, nn.Linear(1, 1))
    model = Renamed()
    mm.load(tmp_path / "run.pt", model, nn.Linear(1, 1))
    assert torch.equal(model.new.weight, old["old"].weight)


def test_a_lazy_module_is_given_its_shape_by_the_file(tmp_path):
    mm.save(tmp_path / "run.pt", nn.Linear(3, 2), nn.Linear(1, 1))
    model = nn.LazyLinear(2)
    mm.load(tmp_path / "run.pt", model, nn.Linear(1, 1))
    assert model.weight.shape == (2, 3)


def test_an_absent_file_and_an_absent_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere.pt: expected a file of mm.save"):
        mm.load(tmp_path / "nowhere.pt", *pair())
    with pytest.raises(FileNotFoundError, match=r"no/run.pt cannot be written: No such file"):
        mm.save(tmp_path / "no" / "run.pt", *pair())
