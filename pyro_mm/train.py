"""Stochastic-gradient training of any (model, guide, objective)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from .batch import Batch
from .registration import announce_gradient
from .seeding import seeded


class History:
    """What happened in training, an entry an epoch: columns of equal length.

    ``loss`` is minus the objective in nats a row, over the epoch's own steps; one column for each term of the
    objective (its value a row, higher is better) follows, and ``validation`` where there is any.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}

    def append(self, entry: dict[str, float]) -> None:
        length = len(next(iter(self.columns.values()), []))
        for name in [*self.columns, *(n for n in entry if n not in self.columns)]:
            self.columns.setdefault(name, [math.nan] * length).append(entry.get(name, math.nan))

    def to_dict(self) -> dict[str, list[float]]:
        """Column -> values, an entry an epoch."""
        return {name: list(values) for name, values in self.columns.items()}

    def to_csv(self, path: str | Path) -> None:
        """Writes the columns as a table."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.columns.items()) if len(self) else "empty"
        return f"History({len(self)} epochs: {last})"


def fit(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: Any,
    train: Batch,
    *,
    validation: Batch | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = lambda ps: torch.optim.Adam(ps, 1e-3),
    seed: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "32-true",
    progress: bool = True,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> History:
    """Minimises an objective's loss a row, by minibatches drawn without replacement.

    Parameters are those of the model and the guide where they are modules, and otherwise the leaves that a run of
    them depends on: a network held by a closure trains, and so does ``pyro.param``. Nothing enters Pyro's global
    store but what a ``pyro.param`` puts there, so a second call, or a second model, starts from its own weights. On a
    CPU, networks of a few hundred units train fastest on one thread (``torch.set_num_threads(1)``).

    Args:
        model, guide: callables of a batch.
        objective: an :class:`~pyro_mm.objectives.Objective`, whose weights start from step 0, or any
            ``pyro.infer.ELBO``.
        train: all rows; ``batch.plate()`` is sized to them, so that a latent outside of it is weighed right.
        validation: rows whose loss is taken after every epoch, under one seed.
        optimizer: parameters -> ``torch.optim`` optimiser. The gradient it sees is that of the loss a row.
        seed: of the shuffling and the draws; None goes on with torch's generator.
        device: where to train. None is where the modules are; or CUDA, where there is one and both are modules.
        precision: as of ``lightning.fabric`` ("32-true", "bf16-mixed").
        callback: called after every epoch with its number and its entry of the history.

    Returns:
        The history. Modules are left in ``eval`` mode.

    Raises:
        RuntimeError: a parameter without gradient after the first step, or one that the optimiser does not have.
        FloatingPointError: a loss that is not finite.
    """
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    fabric = _fabric(_device(modules, device, both=len(modules) == 2), precision)
    for module in modules:
        module.to(fabric.device)
    train = train.to(fabric.device)
    validation = None if validation is None else validation.to(fabric.device)
    history = History()
    if hasattr(objective, "steps"):
        objective.steps = 0  # a warm-up is one of this training
    with seeded(seed, fabric.device), _bar(progress, epochs, math.ceil(train.size / batch_size)) as bar:
        few = train.subsample(torch.arange(min(2, train.size), device=train.device))
        leaves, scaled = graph_leaves(objective, model, guide, few)
        own = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}
        parameters = list((own | leaves).values())
        if not parameters:
            raise RuntimeError(
                "nothing to train: neither model nor guide depends on a parameter that requires a gradient"
            )
        step = optimizer(parameters)
        _check_optimizer(step, parameters)
        for epoch in range(epochs):
            for module in modules:
                module.train()
            sums: dict[str, Tensor] = {}
            for index in torch.randperm(train.size, device=train.device).split(batch_size):
                batch = train.subsample(index)
                rows = train.size if scaled else batch.size
                step.zero_grad(set_to_none=True)
                first = not history and not sums
                with fabric.autocast(), pyro.validation_enabled(first):
                    loss = _backward(objective, model, guide, batch, fabric)
                if first:
                    _check_gradients(model, guide, leaves)
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / rows)
                step.step()
                values = {"loss": loss} | getattr(objective, "by_term", {})
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value.detach() * (batch.size / rows)  # type: ignore[assignment]
                bar()
            entry = {name: float(value) / train.size for name, value in sums.items()}
            if not math.isfinite(entry["loss"]):
                raise FloatingPointError(f"the loss of epoch {epoch + 1} is {entry['loss']}: a smaller step may help")
            for module in modules:
                module.eval()
            if validation is not None:
                entry["validation"] = _validation_loss(objective, model, guide, validation, batch_size, fabric, scaled)
            history.append(entry)
            bar(entry)
            if callback is not None:
                callback(epoch + 1, entry)
    return history


def _backward(objective: Any, model: Any, guide: Any, batch: Batch, fabric: Any) -> Tensor:
    """The loss, its gradient added to the parameters'."""
    if differentiable(objective):
        loss = objective.differentiable_loss(model, guide, batch)
        fabric.backward(loss)
        return loss.detach()
    return torch.as_tensor(loss_and_grads(objective, model, guide, batch))


def loss_and_grads(objective: Any, model: Any, guide: Any, batch: Batch) -> float:
    """The loss of an objective that takes its gradient itself, and adds it to the parameters'."""

    def announced(batch: Batch) -> None:
        announce_gradient()
        guide(batch)

    ours = hasattr(objective, "differentiable")  # which announces for itself
    return float(objective.loss_and_grads(model, guide if ours else announced, batch))


def _validation_loss(
    objective: Any, model: Any, guide: Any, rows: Batch, batch_size: int, fabric: Any, scaled: bool
) -> float:
    total = 0.0
    with seeded(0, fabric.device), torch.no_grad(), fabric.autocast():
        for index in torch.arange(rows.size, device=rows.device).split(batch_size):
            loss = objective.loss(model, guide, rows.subsample(index))
            total += loss * len(index) / rows.size if scaled else loss
    return total / rows.size


def graph_leaves(objective: Any, model: Any, guide: Any, batch: Batch) -> tuple[dict[int, Tensor], bool]:
    """The leaves of the autograd graph of a loss, and whether the data plate scales a subsample up."""
    with poutine.block(), poutine.trace() as guided:
        guide(batch)
    with poutine.block(), poutine.trace() as modelled, poutine.replay(trace=guided.trace):
        model(batch)
    roots, scaled = [], False
    for trace in (guided.trace, modelled.trace):
        trace.compute_log_prob()
        for site in (s for s in trace.nodes.values() if s["type"] == "sample"):
            roots += [site["value"], site.get("log_prob_sum")]
            scaled |= any(frame.name == "data" and frame.full_size == batch.total for frame in site["cond_indep_stack"])
    if differentiable(objective):  # what only some of its terms use, such as an encoder of incomplete rows
        steps = getattr(objective, "steps", None)
        roots.append(objective.differentiable_loss(model, guide, batch))
        if steps is not None:
            objective.steps = steps
    leaves: dict[int, Tensor] = {}
    stack, seen = [x.grad_fn or x for x in roots if getattr(x, "requires_grad", False)], set()
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        else:
            stack += [parent for parent, _ in node.next_functions]
    return leaves, scaled


def differentiable(objective: Any) -> bool:
    """Whether an objective has a loss to differentiate; if not, it takes its gradient itself."""
    return getattr(objective, "differentiable", hasattr(objective, "differentiable_loss"))


def _check_optimizer(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [tuple(p.shape) for p in parameters if id(p) not in held]
    if missing:
        raise RuntimeError(f"the optimiser leaves out {len(missing)} trainable tensors, of shapes {missing[:5]}")


def _check_gradients(model: Any, guide: Any, leaves: dict[int, Tensor]) -> None:
    own = {id(p) for m in (model, guide) if isinstance(m, nn.Module) for p in m.parameters()}
    missing = [f"a tensor of shape {tuple(p.shape)}" for i, p in leaves.items() if i not in own and p.grad is None]
    missing += [
        f"{what}.{name}"
        for what, module in (("model", model), ("guide", guide))
        if isinstance(module, nn.Module)
        for name, p in module.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise RuntimeError(
            f"no gradient reaches {', '.join(missing[:5])}{more}: the objective does not use them on these data. "
            "Leave them out, or freeze them with requires_grad_(False)"
        )


def _device(modules: list[nn.Module], device: torch.device | str | None, both: bool) -> torch.device:
    if device is not None:
        return torch.device(device)
    here = next((p.device for m in modules for p in m.parameters()), torch.get_default_device())
    return torch.device("cuda") if both and here.type == "cpu" and torch.cuda.is_available() else here


def _fabric(device: torch.device, precision: str) -> Any:
    from lightning_fabric import Fabric  # here, because it takes seconds

    devices: Any = 1 if device.index is None or device.type == "cpu" else [device.index]
    return Fabric(accelerator=device.type, devices=devices, precision=precision)  # type: ignore[arg-type]


@contextmanager
def _bar(show: bool, epochs: int, steps: int) -> Iterator[Callable[..., None]]:
    """A progress bar: called with nothing after a step, and with the epoch's entry after an epoch."""
    if not show:
        yield lambda entry=None: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=epochs)

        def advance(entry: dict[str, float] | None = None) -> None:
            if entry is None:
                progress.advance(task, 1 / steps)
                return
            progress.update(
                task, description=", ".join(f"{n} {entry[n]:.2f}" for n in ("loss", "validation") if n in entry)
            )

        yield advance
