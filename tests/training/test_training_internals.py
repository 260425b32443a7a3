"""Behaviour of torch's private names that training relies on, one test for each name.

A test that fails here names what a new release has changed, and the modules to mend. Private modules are imported by
``training.compile`` and ``training.tracing`` alone; attributes of modules and tensors are read by
``training.program_snapshot``; the ``_foreach`` functions come from ``handlers.internals``.
"""

import inspect
import os
import shutil

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mm.handlers.internals import foreach_copy_, foreach_multiply_, foreach_norm
from pyro_mm.training.program_snapshot import GLOBAL_HOOKS, HOOKS, REGISTERS

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="inductor needs a C++ compiler"
)


# -- training.compile -------------------------------------------------------------------------------------------------


@needs_compiler
def test_inductor_compiles_a_graph_on_its_inputs_within_a_tracing_context_and_keeps_torchs_draws():
    """torch._inductor.compile, torch._guards.tracing and TracingContext, torch._subclasses.FakeTensorMode, ShapeEnv."""
    import torch._inductor as inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from pyro_mm.training.compile import _metrics_context

    def draw(x):
        return (torch.rand_like(x) + x,)

    x = torch.ones(3)
    fake = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))
    with torch.no_grad(), tracing(TracingContext(fake)), _metrics_context():
        run = inductor.compile(make_fx(draw)(x), [x], options={"fallback_random": True})
    torch.manual_seed(0)
    (found,) = run(x)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3) + 1)


def test_dynamo_has_a_context_for_its_metrics():
    """torch._dynamo.utils.get_metrics_context, used with torch 2.6 alone."""
    utils = pytest.importorskip("torch._dynamo.utils")
    if torch.__version__.startswith("2.6."):
        with utils.get_metrics_context() as context:
            assert context.in_progress()
        assert not context.in_progress()


# -- training.tracing -------------------------------------------------------------------------------------------------


def test_reading_a_traced_value_is_an_error_that_says_so():
    """The text by which ``tracing._explain`` knows that a program reads a value."""
    with pytest.raises(RuntimeError, match="value out of a tracing tensor"):
        make_fx(lambda x: x * float(x.sum()))(torch.ones(2))


def test_an_lstm_is_traced_with_its_gradient_while_onednn_is_off():
    """_C._get_mkldnn_enabled and _C._set_mkldnn_enabled, by which a trace leaves out the LSTM of oneDNN."""
    lstm = nn.LSTM(2, 3, batch_first=True)
    names = list(dict(lstm.named_parameters()))

    def gradient(x, *weights):
        held = dict(zip(names, weights, strict=True))
        out = torch.func.functional_call(lstm, held, (x,))[0].sum()
        return torch.autograd.grad(out, weights)

    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        graph = make_fx(gradient)(torch.randn(4, 5, 2), *lstm.parameters())
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert torch._C._get_mkldnn_enabled() == enabled
    x = torch.randn(4, 5, 2)
    for one, other in zip(graph(x, *lstm.parameters()), gradient(x, *lstm.parameters()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.cuda
def test_a_gru_is_traced_with_its_gradient_while_cudnn_is_off():
    """_C._get_cudnn_enabled and _C._set_cudnn_enabled, by which a trace leaves out cuDNN's copy of the weights."""
    gru = nn.GRU(2, 3, batch_first=True).cuda().double()  # in single precision cuDNN multiplies with 10 bits (TF32)
    names = list(dict(gru.named_parameters()))
    x = torch.randn(4, 5, 2, device="cuda", dtype=torch.float64)

    def gradient(x, *weights):
        held = dict(zip(names, weights, strict=True))
        out = torch.func.functional_call(gru, held, (x,))[0].sum()
        return torch.autograd.grad(out, weights)

    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        graph = make_fx(gradient)(torch.randn_like(x), *gru.parameters())
    finally:
        torch._C._set_cudnn_enabled(enabled)
    assert torch._C._get_cudnn_enabled() == enabled
    for one, other in zip(graph(x, *gru.parameters()), gradient(x, *gru.parameters()), strict=True):
        torch.testing.assert_close(one, other)


def test_operations_of_a_graph_say_whether_they_change_their_inputs():
    """_schema.is_mutable of operators, by which constants that something writes to are not folded."""
    assert torch.ops.aten.add_.Tensor._schema.is_mutable
    assert not torch.ops.aten.add.Tensor._schema.is_mutable


def test_a_tensor_made_of_numbers_is_lifted_from_an_attribute_of_the_graph():
    """aten.lift_fresh_copy of a get_attr node, and aten._to_copy of its dtype: what ``_fold_constants`` looks for."""
    graph = make_fx(lambda x: x + torch.tensor([1.0, 2.0]).double())(torch.ones(2))
    lifts = [node for node in graph.graph.nodes if node.target is torch.ops.aten.lift_fresh_copy.default]
    copies = [node for node in graph.graph.nodes if node.target is torch.ops.aten._to_copy.default]
    assert len(lifts) == 1 and lifts[0].args[0].op == "get_attr"
    assert [node.args[0] for node in copies] == lifts
    assert isinstance(graph, GraphModule) and hasattr(graph, lifts[0].args[0].target)


def test_inputs_of_a_graph_are_placeholders_in_their_order_and_one_without_users_can_be_erased():
    graph = make_fx(lambda x, step, y: x + y)(torch.ones(2), torch.tensor(3), torch.ones(2))
    _, step, _ = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert not step.users
    graph.graph.erase_node(step)
    graph.recompile()
    assert torch.equal(graph(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_values_of_nodes_and_tags_of_draws_and_shapes_are_known():
    """node.meta["val"], and the tags by which draws and shapes that depend on values are found."""
    graph = make_fx(lambda x: x + torch.rand_like(x))(torch.ones(2))
    draws = [n for n in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    assert len(draws) == 1 and draws[0].meta["val"].shape == (2,)
    assert torch.Tag.dynamic_output_shape in torch.ops.aten.nonzero.default.tags


# -- training.program_snapshot ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTERS)
def test_modules_hold_children_parameters_and_buffers_in_dictionaries_that_setting_an_attribute_changes(name):
    module = nn.Module()
    register = module.__dict__[name]
    assert isinstance(register, dict) and not register
    value = {"_modules": nn.ReLU(), "_parameters": nn.Parameter(torch.ones(1)), "_buffers": nn.Buffer(torch.ones(1))}[
        name
    ]
    module.entry = value
    assert module.__dict__[name] is register and list(register.values()) == [value]
    del module.entry
    assert not register


@pytest.mark.parametrize("name", HOOKS)
def test_modules_hold_their_hooks_in_dictionaries(name):
    module = nn.Linear(1, 1)
    register = getattr(module, name)
    add = {
        "_forward_hooks": module.register_forward_hook,
        "_forward_pre_hooks": module.register_forward_pre_hook,
        "_backward_hooks": module.register_full_backward_hook,
        "_backward_pre_hooks": module.register_full_backward_pre_hook,
    }[name]
    handle = add(lambda *_: None)
    assert getattr(module, name) is register and len(register) == 1
    handle.remove()
    assert not register


def test_hooks_of_all_modules_lie_in_dictionaries_named_global():
    assert len(GLOBAL_HOOKS) >= 4 and all(isinstance(hooks, dict) for hooks in GLOBAL_HOOKS)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert any(GLOBAL_HOOKS)
    handle.remove()
    assert not any(GLOBAL_HOOKS)


def test_tensors_hold_their_hooks_in_a_dictionary_or_none():
    """Tensor._backward_hooks."""
    x = torch.ones(1, requires_grad=True)
    assert not x._backward_hooks
    handle = x.register_hook(lambda g: g)
    assert len(x._backward_hooks) == 1
    handle.remove()
    assert not x._backward_hooks


# -- functions on lists of tensors ------------------------------------------------------------------------------------


def test_foreach_functions_are_loops_over_lists():
    """torch._foreach_norm, _foreach_mul_ and _foreach_copy_, of tensors of any shapes."""
    xs = [torch.arange(3.0), torch.ones(2, 2)]
    assert [float(x) for x in foreach_norm(xs)] == pytest.approx([5**0.5, 2.0])
    foreach_multiply_(xs, 0.5)
    assert torch.equal(xs[0], torch.tensor([0.0, 0.5, 1.0])) and torch.equal(xs[1], torch.full((2, 2), 0.5))
    copies = [torch.zeros(3), torch.zeros(2, 2)]
    foreach_copy_(copies, xs)
    assert all(map(torch.equal, copies, xs)) and copies[0] is not xs[0]


# -- training.problem -------------------------------------------------------------------------------------------------


def test_nodes_of_autograd_lead_to_the_leaves():
    """grad_fn, next_functions and, of a node that accumulates a gradient, variable: public, and not documented."""
    x = torch.ones(2, requires_grad=True)
    ((node, _),) = (2 * x).grad_fn.next_functions[:1]
    assert node.variable is x and node.next_functions == ()


def test_foreach_and_private_modules_have_no_other_homes():
    """No other file of training reads a private attribute of torch itself."""
    import pyro_mm.training as training

    folder = os.path.dirname(inspect.getfile(training))
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name)) as file:
                text = file.read()
            assert "torch._foreach" not in text, name
