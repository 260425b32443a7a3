"""Callbacks, stopping, averages of weights, clipped and accumulated gradients, schedules, rows for validation."""

import math
import sys

import pytest
import torch
from pyro_mm.callbacks import BestWeights, EarlyStopping, Log, Training, WeightAverage
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import pyro_mm as mm
from pyro_mm.utils.global_state import override_validation
from tests.support.exact_training import linear_pair, log_likelihood, parameters, rows, without_inductor

SGD = lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.5)  # noqa: E731
ROWS = rows()
HELD_OUT = rows(30, 1)


def train(epochs=3, model_and_guide=None, data=ROWS, **options):
    model, guide = model_and_guide or linear_pair()
    settings = {"batch_size": 32, "seed": 0, "progress": False, "optimizer": SGD, "audit": False} | options
    return mm.fit(model, guide, log_likelihood, data, epochs=epochs, **settings), parameters(model, guide)


def assert_equal(one, other, atol=0.0):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


class Recorder(mm.callbacks.Callback):
    """Copies of the weights after every step and at the end of every epoch, and the losses of steps."""

    def __init__(self):
        self.steps = []
        self.epochs = []
        self.losses = []

    def on_step(self, training):
        self.steps.append([t.clone() for t in training.tensors])
        self.losses.append(training.values["loss"])

    def on_epoch(self, training):
        self.epochs.append([t.clone() for t in training.tensors])


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_accumulated_gradients_are_those_of_one_minibatch_of_all_rows(monkeypatch, compile, adam):
    """Minibatches of 32, 32, 32 and 4 rows, with missing modalities: weighed by their rows."""
    without_inductor(monkeypatch)
    optimizer = (lambda ps: torch.optim.Adam(ps, 0.01, fused=True)) if adam else SGD
    with override_validation(True):
        _, together = train(batch_size=100, optimizer=optimizer)
        _, apart = train(accumulate=4, compile=compile, optimizer=optimizer)
    assert_equal(apart, together, atol=1e-12)


def test_the_last_minibatch_of_an_epoch_ends_a_group():
    """Groups of 3 and 1 minibatches: two steps of the optimiser per epoch, as many of a schedule."""
    rates = []

    class Rates:
        def on_step(self, training):
            rates.append((training.moved, training.optimizers[0].param_groups[0]["lr"]))

    half = lambda optimizer: ExponentialLR(optimizer, 0.5)  # noqa: E731
    train(2, accumulate=3, scheduler=half, scheduler_interval="step", callbacks=[Rates()])
    moved, lr = zip(*rates, strict=True)
    assert moved == (False, False, True, True) * 2
    assert lr == (0.1, 0.1, 0.05, 0.025, 0.025, 0.025, 0.0125, 0.00625)


def test_a_gradient_is_clipped_to_a_norm():
    plain = lambda ps: torch.optim.SGD(ps, 1.0)  # noqa: E731

    def first_step(clip_norm):
        model, guide = linear_pair()
        before = parameters(model)
        train(1, (model, guide), batch_size=100, optimizer=plain, clip_norm=clip_norm)
        return torch.cat([(x - y).flatten() for x, y in zip(parameters(model), before, strict=True)])

    free = first_step(None)
    assert free.norm() > 1.0
    assert_equal(first_step(0.25), free * (0.25 / free.norm()), atol=1e-6)  # torch adds 1e-6 to the norm
    assert_equal(first_step(1e6), free)


def test_a_sparse_gradient_is_refused():
    table = torch.nn.Embedding(3, 2, sparse=True)

    def objective(model, guide, batch, *, step):
        return mm.Loss(table(batch["b"]).square().sum() + model.weight.sum())

    model = torch.nn.Linear(1, 1)
    batch = mm.Batch({"b": torch.arange(9) % 3})
    with pytest.raises(ValueError, match="sparse gradient, which is neither accumulated nor clipped"):
        mm.fit(
            lambda batch: model(torch.zeros(1)), lambda batch: table(batch["b"]), lambda m, g, b, *, step: objective(
                model, g, b, step=step
            ), batch, optimizer=SGD, clip_norm=1.0, progress=False, audit=False,
        )  # fmt: skip


# -- stopping and the best weights ----------------------------------------------------------------------------------


def epochs_until_stop(callback, losses, column="validation"):
    training = Training(None, None, mm.History(), [], [], validates=True)
    callback.on_start(training)
    for training.epoch, loss in enumerate(losses, 1):
        training.entry = {column: loss}
        if callback.on_epoch(training):
            return training.epoch
    return None


@pytest.mark.parametrize(
    ("callback", "losses", "expected"),
    [
        (EarlyStopping(2), [3.0, 2.0, 2.5, 2.4, 1.0], 4),
        (EarlyStopping(2), [3.0, 2.0, 2.5, 1.9, 2.5], None),
        (EarlyStopping(1), [3.0, 3.0], 2),
        (EarlyStopping(2, min_delta=0.5), [3.0, 2.6, 2.5, 2.0], 3),
        (EarlyStopping(1, maximize=True), [1.0, 2.0, 1.5], 3),
    ],
)
def test_early_stopping_waits_for_its_patience(callback, losses, expected):
    for _ in range(2):  # a second training starts anew
        assert epochs_until_stop(callback, losses) == expected


def test_a_training_stops_early_with_its_best_weights():
    """Twenty rows of the model are fitted too closely: the validation loss falls and rises again."""
    few = rows(8, missing=False)
    best = BestWeights()
    model, guide = linear_pair()
    history, _ = train(
        200, (model, guide), few, validation=HELD_OUT, batch_size=8, callbacks=[EarlyStopping(3), best],
        optimizer=lambda ps: torch.optim.SGD(ps, 0.02),
    )  # fmt: skip
    losses = history.to_dict()["validation"]
    assert history.stopped and len(losses) < 200 and len(losses) == best.best_epoch + 3
    assert best.best == min(losses) == losses[best.best_epoch - 1] < losses[-1]
    with torch.no_grad():
        assert float(log_likelihood(model, guide, HELD_OUT, step=0).total) / 30 == pytest.approx(best.best, rel=1e-12)


@pytest.mark.parametrize("callback", [EarlyStopping(), BestWeights()])
def test_a_column_that_is_not_there_is_refused(callback):
    with pytest.raises(ValueError, match=f'{type(callback).__name__} follows the validation loss, .*column="loss"'):
        train(callbacks=[callback])
    with pytest.raises(ValueError, match="unknown column 'los', expected one of 'loss', 'log p'"):
        train(callbacks=[type(callback)(column="los")])


def test_a_callback_stops_a_training_by_returning_true():
    class Third:
        def on_step(self, training):
            return training.step == 6

    assert len(train(5, callback=lambda epoch, entry: epoch == 2)[0]) == 2
    assert len(train(5, callback=lambda epoch, entry: entry)[0]) == 5  # not True itself
    history, weights = train(5, callbacks=[Third()])
    assert history.stopped and len(history) == 1  # four steps an epoch: the second one is broken off
    recorder = Recorder()
    train(2, callbacks=[recorder])
    assert_equal(weights, recorder.steps[5][: len(weights)])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ("EarlyStopping", "a list of objects with on_epoch.* got 'EarlyStopping'"),
        ([EarlyStopping], r"got the class EarlyStopping among them: make an object, EarlyStopping\(\)"),
        ([lambda epoch, entry: None], r"among them: pass a function of \(epoch, entry\) as callback="),
        (EarlyStopping(), "a list of objects"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, message):
    with pytest.raises(TypeError, match=message):
        train(callbacks=callbacks)


# -- averages -------------------------------------------------------------------------------------------------------


def test_an_exponential_average_is_that_of_the_weights_after_every_step():
    recorder = Recorder()
    plain, _ = train(3, callbacks=[recorder], validation=HELD_OUT)
    average = recorder.steps[0]
    at_epoch_ends = []
    for number, weights in enumerate(recorder.steps):
        if number:
            average = [0.8 * a + 0.2 * w for a, w in zip(average, weights, strict=True)]
        if number % 4 == 3:
            at_epoch_ends.append(average)
    other = Recorder()
    history, left = train(3, callbacks=[WeightAverage(0.8), other], validation=HELD_OUT)
    for expected, found in zip(at_epoch_ends, other.epochs, strict=True):
        assert_equal(found, expected, atol=1e-14)
    assert_equal(other.steps, recorder.steps)  # steps are taken from the weights themselves
    assert_equal(left, average[: len(left)], atol=1e-14)
    assert history.to_dict()["loss"] == plain.to_dict()["loss"]
    model, guide = linear_pair()
    with torch.no_grad():
        for p, value in zip(model.parameters(), at_epoch_ends[0], strict=False):
            p.copy_(value)
        expected = float(log_likelihood(model, guide, HELD_OUT, step=0).total) / 30
    assert history.to_dict()["validation"][0] == pytest.approx(expected, rel=1e-12)


def test_a_mean_over_epochs_begins_after_the_start():
    recorder = Recorder()
    train(5, callbacks=[recorder])
    _, left = train(5, callbacks=[WeightAverage(None, start=2)])
    expected = [torch.stack(each).mean(0) for each in zip(*recorder.epochs[2:], strict=True)]
    assert_equal(left, expected[: len(left)], atol=1e-14)


def test_an_average_counts_steps_of_the_optimiser():
    average = WeightAverage(0.9)
    train(3, accumulate=2, callbacks=[average])
    assert average.count == 6


# -- checkpoints ----------------------------------------------------------------------------------------------------


def everything(**options):
    """Options of a training with all that a checkpoint has to hold, and the callbacks among them."""
    callbacks = [EarlyStopping(4), BestWeights(), WeightAverage(0.9), WeightAverage(None, start=1)]
    cosine = lambda optimizer: CosineAnnealingLR(optimizer, 20)  # noqa: E731
    return {
        "callbacks": callbacks, "scheduler": cosine, "scheduler_interval": "step", "accumulate": 3, "clip_norm": 5.0,
        "validation": HELD_OUT,
    } | options  # fmt: skip


def test_a_training_with_callbacks_goes_on_exactly(tmp_path):
    straight, expected = train(6, **everything())
    states = []
    for epochs in (2, 3, 6, 6):
        options = everything(checkpoint=tmp_path / "run.pt")
        history, found = train(epochs, **options)
        states.append([c.state_dict() for c in options["callbacks"]])
    assert history.to_dict() == straight.to_dict()
    assert_equal(found, expected)
    assert_equal(states[-1], states[-2])


def test_a_checkpoint_of_other_callbacks_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    train(2, callbacks=[EarlyStopping(column="loss")], checkpoint=path)
    with pytest.raises(ValueError, match=r'its callbacks are EarlyStopping, and not none.*resume="force"'):
        train(3, checkpoint=path)
    assert len(train(3, checkpoint=path, resume="force")[0]) == 3
    train(2, callbacks=[BestWeights("loss")], checkpoint=tmp_path / "other.pt")
    state = torch.load(tmp_path / "other.pt", weights_only=True)
    state["callbacks"][0]["tensors"][0] = torch.zeros(7)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"callback BestWeights is of other weights: float32 \(7,\), and not float64"):
        train(3, callbacks=[BestWeights("loss")], checkpoint=tmp_path / "other.pt")


def test_a_training_that_was_stopped_stays_so_unless_it_is_given_other_epochs(tmp_path):
    path = tmp_path / "run.pt"
    stop = lambda epoch, entry: epoch >= 2  # noqa: E731
    history, weights = train(5, callback=stop, checkpoint=path)
    again, same = train(5, callback=stop, checkpoint=path)
    assert len(again) == 2 and again.stopped and again.to_dict() == history.to_dict()
    assert_equal(same, weights)
    more, _ = train(4, checkpoint=path)
    assert len(more) == 4 and not more.stopped


# -- schedules, validation, logs ------------------------------------------------------------------------------------


def test_a_schedule_that_waits_for_a_plateau_moves_by_epochs():
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for the loss of an epoch"):
        train(scheduler=ReduceLROnPlateau, scheduler_interval="step")
    with pytest.raises(ValueError, match="scheduler_interval to be one of 'epoch', 'step', got 'batch'"):
        train(scheduler_interval="batch")


def loader(batch, **options):
    return DataLoader(range(batch.size), batch_size=8, collate_fn=lambda i: batch[torch.tensor(i)], **options)


def test_rows_for_validation_come_from_a_loader_without_changing_the_training():
    expected, weights = train(validation=HELD_OUT)
    seen = []
    generator = torch.Generator().manual_seed(3)
    for options in ({}, {"shuffle": True}, {"shuffle": True, "generator": generator}, {"drop_last": True}):
        history, found = train(validation=loader(HELD_OUT, **options))
        assert_equal(found, weights)
        seen.append(history.to_dict()["validation"])
    assert history.to_dict()["loss"] == expected.to_dict()["loss"]
    for losses in seen[:3]:
        assert losses == pytest.approx(expected.to_dict()["validation"], rel=1e-12)
    assert len(seen[3]) == 3 and all(map(math.isfinite, seen[3]))  # 24 of the 30 rows
    smaller, _ = train(validation=HELD_OUT, validation_batch_size=7)
    assert smaller.to_dict()["validation"] == pytest.approx(expected.to_dict()["validation"], rel=1e-12)


def test_a_log_is_given_epochs_and_steps():
    class Logger:
        def __init__(self):
            self.entries = []
            self.status = None

        def log_metrics(self, metrics, step):
            self.entries.append((step, metrics))

        def finalize(self, status):
            self.status = status

    logger = Logger()
    history, _ = train(2, callbacks=[Log(logger, every=3)], validation=HELD_OUT)
    assert [step for step, _ in logger.entries] == [3, 4, 6, 8] and logger.status == "success"
    columns = history.to_dict()
    names = {name: name.replace(" ", "_") for name in columns}
    assert logger.entries[1][1] == {**{names[name]: c[0] for name, c in columns.items()}, "epoch": 1}
    assert set(logger.entries[0][1]) == {"step/loss", "step/log_p"}
    assert math.isfinite(logger.entries[0][1]["step/loss"])


def test_a_history_is_a_data_frame(monkeypatch):
    pandas = pytest.importorskip("pandas")
    history, _ = train(2)
    frame = history.to_dataframe()
    assert list(frame.index) == [1, 2] and frame.index.name == "epoch"
    assert frame.to_dict("list") == history.to_dict() and isinstance(frame, pandas.DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas, which is not installed"):
        history.to_dataframe()
