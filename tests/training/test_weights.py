"""Weights on disk: there and back, and what cannot be saved or loaded."""

import copy
import io
import json
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("name", ["run.safetensors", "run", "run.pt", "run.pth"])
def test_a_saved_pair_loads_into_another_with_the_same_numbers(tmp_path, name):
    path, rows = tmp_path / name, batch()
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


# -- safetensors ------------------------------------------------------------------------------------------------------


def description(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pyro_mm"])


def test_a_safetensors_file_holds_the_tensors_and_says_what_they_are_of(tmp_path):
    model, guide = pair()
    mm.save(tmp_path / "run.safetensors", model, guide, notes={"data": "noise", "epochs": 3})
    found = load_file(tmp_path / "run.safetensors")
    states = {"model": model.state_dict(), "guide": guide.state_dict()}
    assert found.keys() == {f"{part}.{name}" for part, state in states.items() for name in state}
    assert all(torch.equal(found[f"{part}.{name}"], x) for part, state in states.items() for name, x in state.items())
    text = description(tmp_path / "run.safetensors")
    assert text["format"] == 1 and text["pyro_mm"] == mm.__version__ and text["torch"] == torch.__version__
    assert text["notes"] == {"data": "noise", "epochs": 3}
    assert text["model"]["classes"][""] == "PrivateLatents" and text["guide"]["classes"][""] == "Guide"


def test_every_dtype_tied_weights_and_scalars_come_back(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.other = nn.Linear(3, 3)
            self.other.weight = self.one.weight
            dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool
            for place, dtype in enumerate(dtypes):
                self.register_buffer(f"of{place}", (100 * torch.randn(2, 3, 4)).to(dtype).transpose(0, 2))
                self.register_buffer(f"scalar{place}", torch.tensor(1).to(dtype))
            self.register_buffer("nothing", torch.zeros(0, 3))

    path = tmp_path / "run.safetensors"
    one, other = Mixed(), Mixed()
    mm.save(path, one, Mixed())
    mm.load(path, other, Mixed())
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())
    assert other.other.weight is other.one.weight


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.999])
def test_a_damaged_file_is_refused_and_nothing_is_loaded(tmp_path, place):
    """Every byte counts: in the length, the description, and the numbers; and so does a cut."""
    path = tmp_path / "run.safetensors"
    mm.save(path, *pair())
    content = bytearray(path.read_bytes())
    other = pair()
    before = [p.clone() for m in other for p in m.parameters()]
    position = int(place * len(content))
    content[position] ^= 1
    damaged = (bytes(content), path.read_bytes()[:position], path.read_bytes()[:-1], path.read_bytes() + b"x")
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"run.safetensors is damaged"):
            mm.load(path, *other)
    assert all(map(torch.equal, before, [p for m in other for p in m.parameters()]))


def test_a_file_of_another_program_and_of_another_version_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is damaged, or not a file of mm\.save"):
        mm.load(path, *pair())
    from pyro_mm.utils.safetensors_files import save_safetensors

    save_safetensors(path, {"x": torch.zeros(2)}, {"kind": "a picture"})
    with pytest.raises(ValueError, match=r"is not a file of mm\.save: it says that it is a picture"):
        mm.load(path, *pair())
    save_safetensors(path, {}, {"kind": "a file of mm.save", "format": 9, "pyro_mm": "7.0"})
    with pytest.raises(ValueError, match=r"is of format 9, of pyro_mm 7\.0: load it with that version"):
        mm.load(path, *pair())


def test_the_weights_of_another_story_with_the_same_shapes_are_refused_unless_forced(tmp_path):
    """A product and a mixture of the same experts: every name and shape agrees, and the posterior is another one."""

    def of(posterior, activation=nn.Tanh):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 4))
        experts = {"a": mm.conditionals.Normal(net)}
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        decoders = {"a": mm.conditionals.Normal(nn.Linear(2, 3), scale=1.0)}
        return mm.models.SharedLatent(prior, decoders), mm.Guide(z=posterior(experts))

    path = tmp_path / "run.safetensors"
    mm.save(path, *of(mm.posteriors.ProductOfExperts))
    mixture = of(mm.posteriors.MixtureOfExperts)
    with pytest.raises(
        ValueError, match=r"fit the guide, .*another one: .* is MixtureOfExperts, and was ProductOfExperts.*force=True"
    ):
        mm.load(path, *mixture)
    mm.load(path, *mixture, force=True)
    with pytest.raises(ValueError, match=r"\.1 is ReLU, and was Tanh\. Build it alike"):
        mm.load(path, *of(mm.posteriors.ProductOfExperts, nn.ReLU))


def test_a_state_that_safetensors_cannot_hold_goes_to_a_pt_file(tmp_path):
    class Held(nn.Linear):
        state = 1

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    model = Held(2, 2)
    model.state = "text"
    other = Held(2, 2)
    mm.save(tmp_path / "run.safetensors", model, nn.Linear(1, 1))
    mm.load(tmp_path / "run.safetensors", other, nn.Linear(1, 1))
    assert other.state == "text"
    model.state = {"held": torch.ones(2)}
    with pytest.raises(TypeError, match=r"model\._extra_state is a dict, .* save to a path that ends in \.pt"):
        mm.save(tmp_path / "other.safetensors", model, nn.Linear(1, 1))
    assert not (tmp_path / "other.safetensors").exists()
    mm.save(tmp_path / "run.pt", model, nn.Linear(1, 1))
    mm.load(tmp_path / "run.pt", other, nn.Linear(1, 1))
    assert torch.equal(other.state["held"], torch.ones(2))
    with pytest.raises(TypeError, match=r"weight has no shape yet"):
        mm.save(tmp_path / "other.safetensors", nn.LazyLinear(2), nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"on meta, and not one of plain numbers"):
        mm.save(tmp_path / "other.safetensors", nn.Linear(2, 2, device="meta"), nn.Linear(1, 1))


def test_notes_are_json_and_go_into_a_safetensors_file(tmp_path):
    with pytest.raises(ValueError, match=r"for notes use \.safetensors"):
        mm.save(tmp_path / "run.pt", *pair(), notes={"epochs": 1})
    with pytest.raises(TypeError, match="is no JSON"):
        mm.save(tmp_path / "run.safetensors", *pair(), notes={"rows": torch.zeros(2)})
    with pytest.raises(TypeError, match="expected notes to be a dict"):
        mm.save(tmp_path / "run.safetensors", *pair(), notes="epochs")
    assert list(tmp_path.iterdir()) == []
