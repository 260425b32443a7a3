"""The context of a pass: immutable, replaced as a whole, and dropped where it no longer fits the rows."""

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.batch.context import PLAIN, TermStack, cached

STACK = TermStack({"a": (0, 1)}, terms=2)


def batch():
    return mm.Batch({"a": torch.arange(6.0).reshape(3, 2), "b": torch.zeros(3)})


def view_of(rows):
    masks = [{"a": True, "b": False}, {"a": True, "b": True}]
    return rows.view({"a": True, "b": True}, STACK, {"key": (1, True, ())}, term_masks=masks)


def test_views_leave_the_context_of_a_batch_as_it_was():
    rows = batch()
    view = view_of(rows).with_context(values_only=True).with_latent("z", torch.zeros(3, 2))
    assert rows._context is PLAIN and rows.is_plain and not view.is_plain
    assert view._context.stack is STACK and view._context.values_only and view._context.latents == {"z"}
    assert [masks["z"] for masks in view.terms()] == [True, True] and rows.terms() == [{"a": True, "b": True}]
    with pytest.raises(AttributeError):
        rows._context.stack = STACK


@pytest.mark.parametrize(
    ("make", "cache"),
    [
        (lambda v: v[:2], {}),
        (lambda v: v.only("a"), {"key": (1, True, ())}),  # the same values, and so the same encodings
        (lambda v: v.replaced({"a": torch.ones(3, 2)}), None),
        (lambda v: v.with_tensors(v.parts()[1]), None),
        (lambda v: v.standalone(), None),
    ],
    ids=["some rows", "fewer modalities", "other values", "other tensors", "standalone"],
)
def test_a_selection_of_rows_or_masks_drops_the_context_that_depends_on_them(make, cache):
    changed = make(view_of(batch()))
    assert changed._context.term_masks is None and changed._context.cache == cache
    assert changed._context.stack is STACK


def test_a_value_cached_without_gradient_is_computed_again_with_one():
    calls, cache = [], {}
    compute = lambda: calls.append(1) or len(calls)  # noqa: E731
    with torch.no_grad():
        assert cached(cache, "x", compute) == cached(cache, "x", compute) == 1
    assert cached(cache, "x", compute) == cached(cache, "x", compute) == 2
    with torch.no_grad():
        assert cached(cache, "x", compute) == 2


def test_use_of_observed_values_is_reported():
    used = []
    rows = mm.Batch({"a": torch.zeros(3, 2)}).with_context(on_use=used.append)
    with rows.plate():
        value = rows.observe("a", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))
    assert not used
    assert (value + 1).shape == (3, 2) and used == ["a"]


def test_other_rows_of_a_subclass_are_of_that_class():
    class Labelled(mm.Batch):
        def positive(self):
            return self[self["b"] > 0]

    rows = Labelled({"b": torch.tensor([1.0, -1.0, 2.0])})
    assert type(rows.positive()) is Labelled and len(rows.positive().only("b")) == 2
