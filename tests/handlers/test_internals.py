"""Behaviour of Pyro's and torch's private names that this package relies on, one test for each name.

A test that fails here names what a new release has changed, and the modules to mend.
"""

import ast
import inspect
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.overrides import TorchFunctionMode

from pyro_mm.handlers.deferred import LazyTensor
from pyro_mm.handlers.internals import (
    BatchNorm,
    TorchDispatchMode,
    foreach_copy_,
    foreach_multiply_,
    foreach_norm,
    tree_iter,
    tree_leaves,
)
from pyro_mm.handlers.params import GRADIENT, announce_gradient, register
from pyro_mm.handlers.plates import FixedPlate, KnownPlates, PlateIndices, plate_shape
from pyro_mm.utils.reachable import INTERNAL

PACKAGE = Path(__file__).parents[2] / "pyro_mm"
TESTED = {
    "pyro.infer.trace_elbo._compute_log_r",
    "pyro.poutine.runtime._PYRO_STACK",
    "torch._dynamo",
    "torch._dynamo.utils.get_metrics_context",
    "torch._foreach_copy_",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._guards.TracingContext",
    "torch._guards.tracing",
    "torch._inductor",
    "torch._subclasses.FakeTensorMode",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_iter",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
}


def test_every_private_name_that_the_package_imports_is_tested_here():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            private = [n for n in names if any(part.startswith("_") for part in n.split(".")[1:])]
            found |= {name for name in private if name.split(".")[0] in ("torch", "pyro")}
    assert found == TESTED


class Seen(Messenger):
    """Collects the messages of sample sites before they are sampled and after."""

    def __init__(self):
        super().__init__()
        self.before, self.after = [], []

    def _pyro_sample(self, msg):
        self.before.append((msg["name"], msg["done"], msg["value"]))

    def _pyro_post_sample(self, msg):
        self.after.append(dict(msg))


# -- Pyro ------------------------------------------------------------------------------------------------------------


def test_messenger_calls_pyro_sample_before_and_pyro_post_sample_after_a_site_has_its_value():
    """handlers.rewrite: EditSites, RecordSites."""
    with Seen() as seen:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(2.0))
        pyro.deterministic("z", x)
    assert [name for name, _, _ in seen.before] == [msg["name"] for msg in seen.after] == ["x", "y", "z"]
    assert seen.before[0][1:] == (False, None) and seen.after[0]["value"] is x
    keys = {"name", "fn", "args", "kwargs", "value", "done", "is_observed", "infer", "mask", "scale"}
    assert keys | {"cond_indep_stack"} <= set(seen.after[0])
    assert [msg["is_observed"] for msg in seen.after] == [False, True, True]


def test_messenger_that_sets_value_and_done_gives_a_site_its_value_and_inner_ones_come_first():
    """handlers.rewrite.EditSites, of which two may be nested; scoring.term_pair relies on their order."""
    order = []

    class Fixed(Messenger):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def _pyro_sample(self, msg):
            order.append(self.value)
            if not msg["done"]:
                msg["value"], msg["done"] = torch.tensor(self.value), True

    with Fixed(1.0), Fixed(2.0):
        assert pyro.sample("x", dist.Normal(0.0, 1.0)) == 2.0
    assert order == [2.0, 1.0]


def test_pyro_stack_is_one_list_of_the_active_handlers_from_the_outside_in():
    """handlers.params.register, handlers.plates.plate_shape: _PYRO_STACK is imported by name, and never rebound."""
    from pyro.poutine import runtime
    from pyro.poutine.runtime import _PYRO_STACK

    outer, inner = Seen(), Seen()
    with outer, inner:
        assert _PYRO_STACK[-2:] == [outer, inner]
        assert runtime._PYRO_STACK is _PYRO_STACK
    assert outer not in _PYRO_STACK and inner not in _PYRO_STACK


def test_trace_messenger_param_only_is_true_for_the_traces_in_which_svi_finds_parameters():
    """handlers.params.register: parameters are registered in these alone."""
    from pyro.poutine.trace_messenger import TraceMessenger

    assert TraceMessenger(param_only=True).param_only is True and TraceMessenger().param_only in (None, False)
    net, batch = nn.Linear(1, 1), torch.ones(3, 1)

    def model():
        register(net)
        pyro.sample("x", dist.Normal(net(batch), 1.0).to_event(2), obs=batch)

    pyro.clear_param_store()
    Trace_ELBO().loss(model, lambda: None)
    assert not list(pyro.get_param_store().keys())
    SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()
    assert len(list(pyro.get_param_store().keys())) == 2
    pyro.clear_param_store()


def test_apply_stack_of_a_param_message_records_a_parameter_that_elbos_differentiate_and_the_store_does_not_have():
    """handlers.params.announce_gradient: the keys of the message, and ``unconstrained`` of its value."""
    weight = torch.ones((), requires_grad=True)

    def model():
        announce_gradient()
        pyro.factor("loss", -((weight - 3.0) ** 2))

    trace = poutine.trace(model).get_trace()
    assert trace.nodes[GRADIENT]["type"] == "param" and trace.nodes[GRADIENT]["value"].requires_grad
    assert trace.nodes[GRADIENT]["value"].unconstrained() is trace.nodes[GRADIENT]["value"]
    Trace_ELBO().loss_and_grads(model, lambda: None)
    assert weight.grad == -4.0 and GRADIENT not in pyro.get_param_store()
    weight.grad = None
    Trace_ELBO().loss_and_grads(lambda: pyro.factor("loss", -((weight - 3.0) ** 2)), lambda: None)
    assert weight.grad is None  # without it, no backward pass


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
def test_get_traces_yields_model_and_guide_traces_with_log_probabilities_and_score_parts(estimator):
    """handlers.elbos: Trace_ELBO._get_traces(model, guide, args, kwargs), by particle."""

    def model(shift):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide(shift):
        pyro.sample("z", dist.Normal(shift, 2.0))

    pairs = list(estimator(num_particles=2)._get_traces(model, guide, (0.5,), {}))
    assert len(pairs) == 2
    for model_trace, guide_trace in pairs:
        z = guide_trace.nodes["z"]["value"]
        assert model_trace.nodes["z"]["value"] is z
        torch.testing.assert_close(guide_trace.nodes["z"]["log_prob_sum"], dist.Normal(0.5, 2.0).log_prob(z))
        torch.testing.assert_close(model_trace.nodes["x"]["log_prob_sum"], dist.Normal(z, 1.0).log_prob(torch.ones(())))
        log_prob, score, entropy = guide_trace.nodes["z"]["score_parts"]
        assert score == 0 and torch.equal(entropy, log_prob)  # pathwise


def test_compute_log_r_sums_log_p_minus_log_q_over_the_plates_that_a_site_is_not_in():
    """handlers.elbos: pyro.infer.trace_elbo._compute_log_r(model_trace, guide_trace).sum_to(cond_indep_stack)."""
    from pyro.infer.trace_elbo import _compute_log_r

    probs = torch.tensor([0.2, 0.6, 0.7])

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(0.5))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(probs))

    ((model_trace, guide_trace),) = Trace_ELBO()._get_traces(model, guide, (), {})
    site = guide_trace.nodes["z"]
    log_r = _compute_log_r(model_trace, guide_trace)
    expected = dist.Bernoulli(0.5).log_prob(site["value"]) - dist.Bernoulli(probs).log_prob(site["value"])
    torch.testing.assert_close(log_r.sum_to(site["cond_indep_stack"]), expected)
    torch.testing.assert_close(log_r.sum_to(()), expected.sum())


def test_plate_without_its_subsample_has_no_site_for_its_indices():
    """handlers.plates.FixedPlate overrides the static pyro.plate._subsample(name, size, ..) -> (size, size, None)."""
    assert isinstance(inspect.getattr_static(pyro.plate, "_subsample"), staticmethod)
    assert list(inspect.signature(pyro.plate._subsample).parameters)[:2] == ["name", "size"]

    def program(plate):
        with plate("some", 3, dim=-1):
            return pyro.sample("x", dist.Normal(0.0, 1.0))

    for plate, names in ((pyro.plate, {"some", "x"}), (FixedPlate, {"x"})):
        trace = poutine.trace(program).get_trace(plate)
        assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == names
        assert trace.nodes["x"]["value"].shape == (3,)
        (frame,) = trace.nodes["x"]["cond_indep_stack"]
        assert (frame.name, frame.dim, frame.size, frame.vectorized) == ("some", -1, 3, True)


def test_plate_takes_its_indices_from_the_value_of_a_site_whose_distribution_has_its_size_and_device():
    """handlers.plates.KnownPlates: ``fn.size``, ``fn.subsample_size`` and ``fn.device`` of an index site."""
    with Seen() as seen, pyro.plate("data", 4):
        pass
    fn = seen.after[0]["fn"]
    assert site_is_subsample(seen.after[0]) and fn.size == 4 and fn.subsample_size in (None, 4)
    assert torch.empty(0, device=fn.device).device.type == "cpu"
    with KnownPlates():
        with pyro.plate("data", 4) as rows:
            assert isinstance(rows, PlateIndices)
        with pyro.plate("some", 4, subsample_size=2) as rows:
            assert not isinstance(rows, PlateIndices) and len(rows) == 2
        assert list(pyro.plate("sequential", 3)) == [0, 1, 2]


def test_indep_messengers_on_the_stack_have_dim_and_size_and_subsampled_ones_their_subsample_size():
    """handlers.plates.plate_shape: ``dim``, ``size``, ``subsample_size`` of IndepMessenger and pyro.plate."""
    with pyro.plate("outer", 5, subsample_size=2, dim=-3), pyro.plate("inner", 4, dim=-1):
        assert plate_shape() == (2, 1, 4)
    with poutine.indep_messenger.IndepMessenger("plain", 6, dim=-2):
        assert plate_shape() == (6, 1)
    assert plate_shape() == ()


def test_enumerated_sites_have_their_dimension_in_infer():
    """scoring.reduction: ``infer["_enumerate_dim"]``, which Pyro's handler of parallel enumeration sets."""

    @config_enumerate
    def model():
        pyro.sample("c", dist.Categorical(torch.ones(3) / 3))

    trace = poutine.trace(poutine.enum(model, first_available_dim=-2)).get_trace()
    site = trace.nodes["c"]
    assert site["infer"]["_enumerate_dim"] == -2 and site["value"].shape == (3, 1)
    ((traced, _),) = TraceEnum_ELBO(max_plate_nesting=1)._get_traces(model, lambda: None, (), {})
    assert traced.nodes["c"]["infer"]["_enumerate_dim"] == -2


def test_deterministic_sites_are_observed_sample_sites_that_say_so_in_infer_and_factors_have_a_unit_distribution():
    """scoring.structure: observed_sites, is_factor."""

    def model():
        pyro.deterministic("d", torch.ones(()))
        pyro.factor("f", torch.ones(()))

    sites = poutine.trace(model).get_trace().nodes
    assert sites["d"]["is_observed"] and sites["d"]["infer"]["_deterministic"] is True
    assert isinstance(sites["f"]["fn"], dist.Unit) and not sites["f"]["infer"].get("_deterministic", False)


# -- torch -----------------------------------------------------------------------------------------------------------


def test_make_subclass_gives_a_tensor_whose_operations_pass_through_torch_function():
    """handlers.deferred.LazyTensor: torch.Tensor._make_subclass(cls, data), which sets no value."""
    made = torch.Tensor._make_subclass(LazyTensor, torch.empty(0))
    assert type(made) is LazyTensor and isinstance(made, torch.Tensor)
    computed = []
    lazy = LazyTensor(lambda: computed.append(1) or torch.arange(3.0))
    assert not computed
    for x in (lazy + 1, torch.stack([lazy, lazy])[0] + 1, torch.where(torch.ones(3) > 0, lazy + 1, 0.0)):
        assert type(x) is torch.Tensor and x.tolist() == [1.0, 2.0, 3.0]
    assert lazy.shape == (3,) and lazy.dtype == torch.float32 and computed == [1]


def test_tree_functions_go_through_tuples_lists_and_dictionaries():
    """handlers.deferred, scoring.structure_cache, training: tree_map, tree_iter, tree_leaves of torch.utils._pytree."""
    from torch.utils._pytree import tree_map

    nested = (1, [2, {"a": 3, "b": (4,)}], None)
    assert list(tree_iter(nested)) == tree_leaves(nested) == [1, 2, 3, 4, None]
    assert tree_map(lambda x: x and 10 * x, nested) == (10, [20, {"a": 30, "b": (40,)}], None)


def test_dispatch_mode_sees_operations_named_by_aten():
    """training: TorchDispatchMode.__torch_dispatch__(func, types, args, kwargs), and names like "log.default"."""
    names = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).log()
    assert "log.default" in names


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_layers_of_batch_normalisation_share_a_base_class(layer):
    """training: ``_BatchNorm`` of torch.nn.modules.batchnorm."""
    assert issubclass(layer, BatchNorm) and not issubclass(nn.LayerNorm, BatchNorm)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_has_its_input_first_and_its_training_flag_sixth_under_a_function_mode(training):
    """handlers.repeatability.BatchNormalisation."""
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") == "batch_norm":
                calls.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x, layer = torch.randn(4, 2), nn.BatchNorm1d(2).train(training)
    with Mode():
        layer(x)
    assert calls
    for args, kwargs in calls:
        assert (args[0] if args else kwargs["input"]) is x
        assert bool(args[5] if len(args) > 5 else kwargs["training"]) is training


def test_modules_hold_their_children_parameters_and_buffers_in_dictionaries_of_their_own():
    """utils.snapshot, training: ``_modules``, ``_parameters``, ``_buffers`` and the hooks in ``__dict__``."""
    module = nn.Sequential(nn.BatchNorm1d(2))
    assert list(module.__dict__["_modules"]) == ["0"] and module.__dict__["training"] is True
    assert set(module[0].__dict__["_parameters"]) == {"weight", "bias"}
    assert {"running_mean", "running_var"} <= set(module[0].__dict__["_buffers"])
    handle = module.register_forward_hook(lambda *_: None)
    assert list(module.__dict__["_forward_hooks"]) == [handle.id]
    assert {"_modules", "_parameters", "_buffers", "training", "_forward_hooks", "_forward_pre_hooks"} <= INTERNAL


def test_pyro_modules_have_a_name_of_their_own():
    """utils.reachable: ``_pyro_name`` is no reference of a program."""
    assert "_pyro_name" in vars(pyro.nn.PyroModule("some"))


def test_validation_of_distributions_is_a_class_attribute():
    """scoring.evaluation, utils.global_state: Distribution._validate_args, which set_default_validate_args sets."""
    before = torch.distributions.Distribution._validate_args
    try:
        for on in (False, True):
            torch.distributions.Distribution.set_default_validate_args(on)
            assert torch.distributions.Distribution._validate_args is on
    finally:
        torch.distributions.Distribution._validate_args = before
    assert torch.distributions.Distribution._validate_args is before


def test_foreach_functions_work_on_lists_of_tensors():
    """training: _foreach_copy_, _foreach_mul_ and _foreach_norm, the first two in place."""
    xs, ys = [torch.zeros(2), torch.zeros(3)], [torch.full((2,), 3.0), torch.full((3,), 4.0)]
    foreach_copy_(xs, ys)
    assert all(map(torch.equal, xs, ys))
    foreach_multiply_(xs, 2.0)
    assert xs[0].tolist() == [6.0, 6.0] and ys[0].tolist() == [3.0, 3.0]
    torch.testing.assert_close(torch.stack(list(foreach_norm(ys))), torch.tensor([18.0, 48.0]).sqrt())


def test_inductor_compiles_a_graph_for_examples_under_a_tracing_context_and_returns_what_runs_it():
    """training.compile: torch._inductor.compile(graph, inputs, options=), _guards.tracing, FakeTensorMode.

    With ``fallback_random`` the draws are those of torch's generators.
    """
    inductor = pytest.importorskip("torch._inductor")
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    assert {"graph", "gm"} & set(inspect.signature(inductor.compile).parameters)
    assert {"example_inputs", "options"} <= set(inspect.signature(inductor.compile).parameters)
    assert "fallback_random" in inductor.list_options()
    fake = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))
    with tracing(TracingContext(fake)):
        assert TracingContext.get().fake_mode is fake
    graph = make_fx(lambda x: x + 1)(torch.ones(2))
    assert graph(torch.ones(2)).tolist() == [2.0, 2.0]


def test_inductor_has_a_context_for_its_counts():
    """training.compile, under torch 2.6 alone: get_metrics_context of torch._dynamo.utils."""
    if not torch.__version__.startswith("2.6."):
        pytest.skip("of torch 2.6 alone")
    from torch._dynamo.utils import get_metrics_context

    with get_metrics_context() as context:
        assert context.in_progress()
    assert not context.in_progress()
