"""Rows, masks and filler; and what ``observe`` and ``plate`` mean in plain Pyro."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_mm as mm
from pyro_mm import Batch

NAN = math.nan


def mixed():
    """Five rows: ``a`` (2-d) lacks rows 1 and 4, ``b`` (a count) lacks rows 0 and 4."""
    return Batch(
        {"a": torch.arange(10.0).reshape(5, 2), "b": torch.tensor([7, 1, 2, 3, 4])},
        present={"a": torch.tensor([1, 0, 1, 1, 0]).bool(), "b": torch.tensor([0, 1, 1, 1, 0]).bool()},
        covariates={"u": torch.arange(5.0)},
        lengths={"a": torch.tensor([2, 1, 2, 1, 2])},
    )


def contents(batch):
    """All that a batch holds, as values that can be compared later."""
    tensors = {f"value {n}": batch[n].clone() for n in batch.names if batch.holds(n)}
    tensors |= {f"mask {n}": m.clone() for n, m in batch.present.items()}
    tensors |= {f"covariate {n}": c.clone() for n, c in batch.covariates.items()}
    tensors |= {f"length {n}": c.clone() for n, c in batch.lengths.items()}
    return tensors | {"size": torch.tensor(batch.size), "total": torch.tensor(batch.total or -1)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in one.items())


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, tuple])
def test_nan_rows_are_missing_and_filled_with_a_copy_of_a_present_row(kind):
    rows = [[NAN, 1.0], [2.0, 3.0], [4.0, NAN], [5.0, 6.0]]
    batch = Batch({"a": kind(rows), "b": kind([1, 2, 3, 4])})
    assert batch.names == ("a", "b") and batch.size == len(batch) == 4
    assert batch.present["a"].tolist() == [False, True, False, True]
    assert batch.presence("b") is True and batch.present["b"].tolist() == [True] * 4
    assert batch["a"].tolist() == [[2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    "column",
    [
        [None, [1.0, 2.0], None, [3.0, 4.0]],
        [None, torch.tensor([1.0, 2.0]), None, torch.tensor([3.0, 4.0])],
        np.array([None, np.array([1.0, 2.0]), None, np.array([3.0, 4.0])], dtype=object),
        [[NAN, NAN], np.array([1.0, 2.0]), None, [3.0, 4.0]],
    ],
    ids=["lists", "tensors", "object array", "mixed"],
)
def test_none_rows_are_missing(column):
    batch = Batch({"a": column})
    assert batch.present["a"].tolist() == [False, True, False, True]
    assert batch["a"].double().tolist() == [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]


def test_a_mask_and_nan_are_both_needed_for_presence():
    batch = Batch({"a": [1.0, NAN, 3.0, 4.0]}, present={"a": [False, True, True, True]})
    assert batch.present["a"].tolist() == [False, False, True, True]
    assert batch["a"].tolist() == [3.0, 3.0, 3.0, 4.0]


def test_a_modality_that_is_none_is_missing_everywhere():
    batch = Batch({"a": [1.0, 2.0], "b": None, "c": [None, None], "d": [NAN, NAN]})
    for name in "bcd":
        assert batch.presence(name) is False and batch.present[name].tolist() == [False, False]
    assert not batch.holds("b") and not batch.holds("c")
    assert batch["d"].isfinite().all()
    with pytest.raises(KeyError, match="'b'"):
        batch["b"]


def test_present_may_name_some_modalities_and_accepts_numpy_and_lists():
    for mask in (np.array([True, False]), [True, False], torch.tensor([True, False])):
        batch = Batch({"a": [1.0, 2.0], "b": [1, 2]}, present={"a": mask})
        assert batch.present["a"].tolist() == [True, False] and batch.presence("b") is True
    assert Batch({"a": [1.0, 2.0]}, present={"a": [True, True]}).presence("a") is True
    assert Batch({"a": [1.0, 2.0]}, present={"a": [False, False]}).presence("a") is False
    assert Batch({"a": [1.0, 2.0]}).presence("other") is False


def test_a_batch_keeps_dtypes():
    values = {
        "f64": np.zeros(3), "f32": np.zeros(3, np.float32), "i64": np.zeros(3, np.int64),
        "u8": np.zeros(3, np.uint8), "bool": np.zeros(3, bool),
    }  # fmt: skip
    batch = Batch(values)
    for name, array in values.items():
        assert batch[name].dtype == torch.as_tensor(array).dtype, name


def test_user_data_are_not_written_to():
    array, mask = np.array([[1.0, NAN], [2.0, 3.0]]), torch.tensor([True, True])
    tensor = torch.tensor([NAN, 2.0])
    Batch({"a": array, "b": tensor}, present={"a": mask})
    assert np.isnan(array[0, 1]) and tensor[0].isnan() and mask.all()


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, ["'a': 3", "'b': 2"], lambda: Batch({"a": [1.0, 2, 3], "b": [1, 2]})),
        (ValueError, ["'covariate u': 3"], lambda: Batch({"a": [1.0, 2]}, covariates={"u": torch.zeros(3)})),
        (ValueError, ["'label'", r"\['a'\]"], lambda: Batch({"a": [1.0]}, present={"label": [True]})),
        (ValueError, ["'label'", r"\['a'\]"], lambda: Batch({"a": [1.0]}, lengths={"label": [1]})),
        (
            ValueError,
            ["'a'", r"\(2,\)", r"\(3,\)"],
            lambda: Batch({"a": [1.0, 2]}, present={"a": [True] * 3}),
        ),
        (
            ValueError,
            ["'a'", r"\(2,\)", r"\(2, 1\)"],
            lambda: Batch({"a": [1.0, 2]}, {"a": [[True], [False]]}),
        ),
        (
            ValueError,
            ["'a'", "torch.bool", "torch.int64"],
            lambda: Batch({"a": [1.0, 2]}, present={"a": [1, 0]}),
        ),
        (
            ValueError,
            ["'a'", "torch.bool", "torch.float"],
            lambda: Batch({"a": [1.0, 2]}, present={"a": [1.0, 0]}),
        ),
        (TypeError, ["'a'", "numbers", "U1"], lambda: Batch({"a": np.array(["x", "y"])})),
        (TypeError, ["'a'"], lambda: Batch({"a": ["x", "y"]})),
        (TypeError, ["'a'"], lambda: Batch({"a": [[1.0, 2.0], [1.0]]})),
        (TypeError, ["'u'", "numbers"], lambda: Batch({"a": [1.0]}, covariates={"u": np.array(["x"])})),
        (ValueError, ["'a'", "single number"], lambda: Batch({"a": 3.0})),
        (ValueError, ["at least one"], lambda: Batch({})),
        (ValueError, ["at least one"], lambda: Batch({"a": None})),
        (ValueError, ["'c'", r"\['a', 'b'\]"], lambda: mixed().only("a", "c")),
        (ValueError, ["'c'", r"\['a', 'b'\]"], lambda: mixed().without("c")),
        (ValueError, ["n >= 1, got 0"], lambda: Batch.empty(0, like=mixed())),
    ],
)
def test_errors_of_a_batch_name_the_modality_the_expected_and_the_given(error, words, make):
    for word in words:
        with pytest.raises(error, match=word):
            make()


# -- other batches ---------------------------------------------------------------------------------


def test_only_and_without_mask_modalities_and_keep_their_values():
    batch = mixed()
    only, without = batch.only("a"), batch.without("a")
    assert only.presence("b") is False and torch.equal(only.present["a"], batch.present["a"])
    assert without.presence("a") is False and torch.equal(without.present["b"], batch.present["b"])
    assert only.names == without.names == batch.names and torch.equal(only["b"], batch["b"])
    assert only.rows.tolist() == [True, False, True, True, False] and batch.only().rows is False
    assert batch.rows.tolist() == [True, True, True, True, False]
    assert Batch({"a": [1.0, 2.0], "b": [NAN, 1.0]}).rows is True


def test_an_empty_batch_misses_everything_and_keeps_shapes_and_covariates():
    empty = Batch.empty(3, like=mixed())
    assert empty.size == 3 and empty.rows is False and empty.names == ("a", "b")
    assert empty["a"].shape == (3, 2) and empty["b"].shape == (3,) and empty.covariates["u"].shape == (3,)
    assert Batch.empty(2, like=mixed().subsample(torch.tensor([1, 2]))).total is None


ROWS = {
    "int": (2, [2]), "negative": (-1, [4]), "slice": (slice(1, 4), [1, 2, 3]), "list": ([3, 0, 3], [3, 0, 3]),
    "bools": ([True, False, False, True, False], [0, 3]), "step": (slice(None, None, 2), [0, 2, 4]),
    "long": (torch.tensor([4, 1]), [4, 1]), "mask": (torch.tensor([0, 1, 0, 0, 1]).bool(), [1, 4]),
    "numpy": (np.array([2, 2]), [2, 2]), "numpy bools": (np.array([0, 0, 1, 0, 0], bool), [2]),
}  # fmt: skip


@pytest.mark.parametrize("key", list(ROWS))
def test_indexing_takes_rows_of_everything(key):
    batch, (index, rows) = mixed(), ROWS[key]
    part = batch[index]
    assert part.size == len(part) == len(rows)
    for name in batch.names:
        assert torch.equal(part[name], batch[name][rows]) and torch.equal(part.present[name], batch.present[name][rows])
    assert part.covariates["u"].tolist() == rows and torch.equal(part.lengths["a"], batch.lengths["a"][rows])


def test_a_row_beyond_the_end_raises():
    with pytest.raises(IndexError):
        mixed()[5]


@pytest.mark.parametrize("index", [np.int64(2), torch.tensor(2)], ids=["numpy", "torch"])
def test_other_integers_index_one_row_as_well(index):
    assert torch.equal(mixed()[index]["a"], mixed()["a"][2:3])


def test_subsample_and_indexing_of_a_subsample():
    part = mixed().subsample(torch.tensor([3, 1]))
    assert part.size == 2 and part.total == 5
    with part.plate() as index:
        assert index.tolist() == [3, 1]


def test_to_moves_every_tensor_of_a_batch():
    moved = mixed().to("meta")
    tensors = [moved[n] for n in moved.names] + list(moved.present.values())
    tensors += [*moved.covariates.values(), *moved.lengths.values()]
    assert {t.device.type for t in tensors} == {"meta"} == {moved.device.type}
    assert mixed().only("a").to("meta").presence("b") is False


def test_no_method_changes_its_batch():
    batch = mixed()
    before = contents(batch)

    def story(b):
        with b.plate():
            a = b.observe("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b.observe("b", dist.Poisson(a.exp().sum(-1)))

    for use in (
        lambda: batch.only("a"), lambda: batch.without("a"), lambda: batch[1:], lambda: batch.to("meta"),
        lambda: batch.subsample(torch.tensor([0])), lambda: Batch.empty(2, like=batch), lambda: repr(batch),
        lambda: story(batch), lambda: poutine.trace(story).get_trace(batch),
        lambda: batch.encode("a", torch.nn.Linear(2, 1)),
        lambda: Trace_ELBO().loss(story, lambda b: None, batch),
    ):  # fmt: skip
        use()
        assert same(contents(batch), before)


def test_the_filler_of_missing_values_does_not_change_with_a_later_selection():
    """Rows selected so that none is present keep their filler, which was a present row's value."""
    batch = Batch({"a": torch.tensor([NAN, 2.5, NAN])})
    assert batch[torch.tensor([0, 2])]["a"].tolist() == [2.5, 2.5]


# -- plate -----------------------------------------------------------------------------------------


def test_plate_masks_empty_rows_and_scales_a_subsample():
    x = torch.tensor([0.3, NAN, -1.0, 2.0])
    batch = Batch({"a": x, "b": [1.0, NAN, NAN, 1.0]})

    def story(b):
        with b.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.full((b.size,), 1.5))  # scores as a latent would

    z = dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.5)).item()
    assert poutine.trace(story).get_trace(batch).log_prob_sum().item() == pytest.approx(3 * z)
    assert poutine.trace(story).get_trace(batch.only("b")).log_prob_sum().item() == pytest.approx(2 * z)
    assert poutine.trace(story).get_trace(batch.only()).log_prob_sum().item() == 0
    part = batch.subsample(torch.tensor([0, 1]))
    assert poutine.trace(story).get_trace(part).log_prob_sum().item() == pytest.approx(2 * z)  # one of two, times 4/2
    latent = poutine.trace(lambda b: story(b)).get_trace(part).nodes["z"]
    assert latent["scale"] == 2.0


# -- observe ---------------------------------------------------------------------------------------


def parent_and_child(decoder=None, seen=None):
    """a ~ N(0, 1) is the parent of b ~ N(a, 1)."""

    def story(batch):
        with batch.plate():
            root = torch.zeros(batch.size)
            a = batch.observe("a", decoder or (lambda r: dist.Normal(r, 1.0)), root)
            if seen is not None:
                seen.append(a + 0)
            batch.observe("b", lambda a: dist.Normal(a, 1.0), a)

    return story


def test_present_rows_are_observed_and_absent_ones_score_nothing():
    batch = Batch({"a": torch.tensor([0.5, NAN, -2.0]), "b": torch.tensor([1.0, 2.0, NAN])})
    seen = []
    nodes = poutine.trace(parent_and_child(seen=seen)).get_trace(batch)
    nodes.compute_log_prob()
    (a,), n = seen, dist.Normal(0.0, 1.0)
    assert torch.equal(a[[0, 2]], torch.tensor([0.5, -2.0]))
    expected = torch.stack([n.log_prob(torch.tensor(0.5)), torch.tensor(0.0), n.log_prob(torch.tensor(-2.0))])
    torch.testing.assert_close(nodes.nodes["a"]["log_prob"], expected)
    expected = torch.stack([n.log_prob(torch.tensor(0.5)), n.log_prob(2 - a[1]), torch.tensor(0.0)])
    torch.testing.assert_close(nodes.nodes["b"]["log_prob"], expected)
    assert all(nodes.nodes[m]["is_observed"] for m in "ab")


@pytest.mark.parametrize("everywhere", [False, True])
def test_descendants_see_a_draw_and_not_the_filler(everywhere):
    """2,000 rows without the parent: their mean and variance within 4.5 standard errors (p < 1e-5)."""
    n = 2000
    present = torch.zeros(n + 1, dtype=torch.bool)
    present[0] = not everywhere
    values = torch.full((n + 1,), 9.0)
    seen = []
    torch.manual_seed(1)
    parent_and_child(seen=seen)(Batch({"a": values, "b": values}, present={"a": present}))
    draws = seen[0][1:]
    assert abs(draws.mean()) < 4.5 / math.sqrt(n) and abs(draws.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert everywhere or seen[0][0] == 9.0


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_root_parent_is_drawn_for_every_row(everywhere):
    """The distribution has no row dimension of its own; its rows are independent all the same."""
    batch = Batch({"a": torch.tensor([9.0, NAN, NAN, NAN]), "b": torch.zeros(4)})
    batch = batch.without("a") if everywhere else batch
    seen = []

    def story(b):
        with pyro.plate("particles", 3, dim=-2), b.plate():
            a = b.observe("a", dist.Normal(0.0, 1.0))
            seen.append(a + torch.zeros(3, 4))

    story(batch)
    assert len(seen[0][:, 1:].unique()) == 9


def test_a_decoder_is_not_run_for_a_draw_that_nothing_uses():
    calls = []

    def decoder(r):
        calls.append(len(r))
        return dist.Normal(r, 1.0)

    batch = Batch({"a": torch.tensor([0.5, NAN]), "b": torch.tensor([1.0, 2.0])})

    def unused(b):
        with b.plate():
            b.observe("a", decoder, torch.zeros(b.size))

    def used(b):
        with b.plate():
            assert b.observe("a", decoder, torch.zeros(b.size)).shape == (2,)

    unused(batch)
    assert len(calls) == 1  # for the site alone
    used(batch)
    assert len(calls) == 3
    calls.clear()
    guide = lambda b: None  # noqa: E731
    mm.log_weights(unused, guide, batch.only("b"), 2)
    calls.clear()  # the structure is known now
    mm.log_weights(unused, guide, batch.only("b"), 2)
    assert calls == []


def test_a_distribution_and_a_callable_with_parents_are_one_thing():
    batch = Batch({"a": torch.randn(6), "b": torch.randn(6, 2)}, present={"b": torch.arange(6) < 4})
    w = torch.randn(2)

    def by_distribution(b):
        with b.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(b.size), 1.0))
            b.observe("a", dist.Normal(z, 1.0))
            b.observe("b", dist.Normal(z[:, None] * w, 1.0).to_event(1))

    def by_callable(b):
        with b.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(b.size), 1.0))
            b.observe("a", lambda z: dist.Normal(z, 1.0), z)
            b.observe("b", lambda z, s: dist.Normal(z[:, None] * w, s).to_event(1), z, torch.tensor(1.0))

    trace = poutine.trace(by_distribution).get_trace(batch)
    other = poutine.trace(poutine.replay(by_callable, trace=trace)).get_trace(batch)
    assert trace.log_prob_sum().item() == pytest.approx(other.log_prob_sum().item(), rel=1e-6)


def test_a_modality_that_the_batch_does_not_hold_is_a_masked_one():
    batch = Batch({"b": torch.tensor([1.0, 2.0])})
    trace = poutine.trace(parent_and_child()).get_trace(batch)
    trace.compute_log_prob()
    assert trace.nodes["a"]["log_prob_sum"] == 0 and trace.nodes["b"]["log_prob_sum"] != 0


def absent_parent_gradient(batch, draws):
    w = torch.tensor(0.5, requires_grad=True)

    def story(b):
        with b.plate():
            a = b.observe("a", lambda r: dist.Normal(r + w, 1.0), torch.zeros(b.size))
            b.observe("b", lambda a: dist.Normal(a, 1.0), a)

    loss = Trace_ELBO().differentiable_loss
    total = sum(loss(story, lambda b: None, batch) for _ in range(draws))
    (grad,) = torch.autograd.grad(total / draws, w, allow_unused=True)
    return 0.0 if grad is None else grad.item()


ABSENT = Batch({"a": torch.tensor([0.5] + [NAN] * 400), "b": torch.full((401,), 3.0)})


def test_a_gradient_goes_through_the_draw_of_an_absent_parent():
    """d/dw -E log N(b; a, 1), a ~ N(w, 1), is w - 3 = -2.5 a row, with variance 1 a draw.

    400 rows x 50 draws: standard error sqrt(400 / 50) = 2.83 on -1000, tolerance 5 of them (p < 1e-6). The
    one present row adds w - a = 0.
    """
    assert abs(absent_parent_gradient(ABSENT, 50) + 1000) < 14.2


def test_a_gradient_goes_through_the_draw_of_a_parent_absent_from_every_row():
    assert abs(absent_parent_gradient(ABSENT[1:].without("a"), 50) + 1000) < 14.2


def test_nan_never_reaches_a_gradient():
    net = torch.nn.Linear(1, 2)
    encoder = torch.nn.Linear(2, 2)
    batch = Batch({"a": [[1.0, NAN], [NAN, NAN], [0.3, 2.0]], "b": [1.0, NAN, NAN]})

    def story(b):
        with b.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b.observe("a", lambda z: dist.Normal(net(z), 1.0).to_event(1), z)
            b.observe("b", lambda z: dist.LogNormal(net(z)[..., 0], 1.0), z)

    def guide(b):
        with b.plate():
            loc, log_scale = (encoder(b["a"]) + b["b"].log()[:, None]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    for estimator in (Trace_ELBO(), mm.estimators.IWAE(3), mm.objectives.mvae()):
        for p in (*net.parameters(), *encoder.parameters()):
            p.grad = None
        estimator.differentiable_loss(story, guide, batch).backward()
        for p in (*net.parameters(), *encoder.parameters()):
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0


def test_filler_lies_in_the_support_of_a_lognormal():
    batch = Batch({"a": torch.tensor([NAN, 2.0, NAN]), "b": torch.zeros(3)})

    def story(b):
        with b.plate():
            b.observe("a", dist.LogNormal(torch.zeros(b.size), 1.0, validate_args=True))

    log_prob = dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(2.0)).item()
    assert poutine.trace(story).get_trace(batch).log_prob_sum().item() == pytest.approx(log_prob)
    assert poutine.trace(story).get_trace(batch[[0, 2]]).log_prob_sum().item() == 0


def test_encode_keeps_two_functions_apart_that_do_not_outlive_the_call():
    batch = mm.Batch({"a": torch.ones(3)})
    view = batch.view({"a": True}, mm.batch.context.TermStack({}), {})
    assert [float(view.encode("a", lambda x, k=k: k * x)[0]) for k in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_covariate_that_begins_with_its_rows_is_not_taken_for_a_stack_of_terms():
    """Shape (N, T, N) with T terms: its second and third sizes look like terms and rows, but its first is the rows."""
    rows, cell = 5, {}
    covariate = torch.arange(rows * 2 * rows, dtype=torch.float).reshape(rows, 2, rows)
    batch = mm.Batch({"a": torch.randn(rows), "b": torch.randn(rows)}, covariates={"u": covariate})

    def decode(z, u):
        cell.setdefault("shapes", []).append(tuple(u.shape))
        return dist.Normal(z + u.sum((-1, -2)), 1.0)

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("a", decode, z, batch.covariates["u"])
            batch.observe("b", dist.Normal(z, 1.0))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))

    mm.objectives.unimodal_mean(mm.estimators.IWAE(3)).loss(story, guide, batch)
    mm.objectives.Objective([mm.objectives.Term("a", "a"), mm.objectives.Term("b", "b")]).loss(story, guide, batch)
    assert set(cell["shapes"]) <= {(rows, 2, rows), (2, 2, rows)}  # whole, or the two rows of a look at the structure


def test_lengths_of_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="lengths of 'a': expected 5 numbers, got 2"):
        mm.Batch({"a": torch.zeros(5, 2)}, lengths={"a": [1, 2]})


def test_places_of_a_subsample_count_from_the_first_row():
    assert mixed().subsample([-1, 0])._index.tolist() == [4, 0]
