"""A step that was not finite as a file: its minibatch and all that its loss depends on, and the run of it again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..scoring.prepare_objective import prepare_objective
from ..scoring.training_objective import Loss
from ..utils.arguments import check_function, check_path
from ..utils.global_state import override_validation
from ..utils.reachable import ReachableObjects
from ..utils.seeding import set_generator_state, temporary_seed
from ..utils.tensor_files import describe_mismatch, describe_tensor_mismatch, load_modules, load_tensors
from .modes import set_training
from .nonfinite_report import generator_devices
from .problem import programs_of

KIND = "a step of a training that was not finite"
ENTRIES = ("batch", "generators", "player", "modules", "loose", "step", "precision")


def step_state(
    programs: Mapping[str, Any], batch: Batch, step: int, generators: Sequence[Tensor], player: str, precision: str
) -> dict[str, Any]:
    """Return what a loss depends on: entries of a file for :func:`replay`.

    Args:
        programs: model, guide and the objective's modules, by name.
        batch: the minibatch.
        step: steps taken before.
        generators: states of torch's generators before it, of the CPU and of the GPU if there is one.
        player: name of the further player whose loss it is, or empty.
        precision: that of the training.
    """
    reached = ReachableObjects(programs)
    return {
        "kind": KIND,
        "batch": _batch_state(batch),
        "generators": list(generators),
        "player": player,
        "modules": {path: _copy(module.state_dict()) for path, module in reached.modules.items()},
        "loose": [p.detach().clone() for p in reached.loose],
        "step": step,
        "precision": precision,
    }


def replay(path: str | Path, model: Callable[[Batch], Any], guide: Callable[[Batch], Any], objective: Any) -> Loss:
    """Run a step that was not finite again, from the file that a training wrote beside its checkpoint.

    Weights, buffers, minibatch, count of steps and the states of torch's generators are those before that step, so
    that loss and gradient are those that were not finite. Model, guide and objective are left with these weights, in
    training mode, and their parameters with the gradient. Parameters of Pyro's global store stay as they are.

    Args:
        path: the file, ``NAME-nonfinite-STEP.pt`` for a checkpoint ``NAME.pt``.
        model, guide, objective: made as for the training.

    Returns:
        The loss of the minibatch, and the value of each term; of a further player if its loss is the one.

    Raises:
        ValueError: the file is damaged or of another kind, or of programs with other networks.
        OSError: there is no such file.

    Example::

        >>> import math, tempfile, torch, pyro_mm as mm
        >>> rows = mm.Batch({"x": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, math.inf]])})
        >>> model = mm.models.LinearGaussian({"x": torch.eye(2)}, {"x": 0.5})
        >>> run = model, mm.Guide(z=model.posterior), mm.objectives.elbo()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         mm.fit(*run, rows, seed=0, checkpoint=f"{folder}/run.pt", progress=False)
        ...     except FloatingPointError:
        ...         loss = mm.replay(f"{folder}/run-nonfinite-0.pt", *run)
        >>> bool(loss.total.isfinite())
        False
    """
    path = check_path("path", path)
    check_function("model", model)
    check_function("guide", guide)
    prepared: Any = prepare_objective(objective)
    state = load_tensors(path, KIND)
    if state.get("kind") != KIND or any(entry not in state for entry in ENTRIES):
        raise ValueError(f"{path} is not of {KIND}, which fit(.., checkpoint=..) writes beside its checkpoint")

    batch = _batch_of_state(state["batch"])
    players = {player.name: player for player in prepared.players(model, guide, batch)}
    if state["player"]:
        if state["player"] not in players:
            raise ValueError(
                f"{path} is of the loss of a player {state['player']!r}, which the objective does not bring"
            )
        prepared = prepare_objective(players[state["player"]].loss)
    reached = ReachableObjects(programs_of(prepared, model, guide))
    _load(reached, state, path)
    device = reached.device() or torch.get_default_device()
    networks = list(reached.modules.values())

    batch = batch.to(device)
    set_training(networks, True)
    devices = generator_devices(device)
    autocast = nullcontext() if state["precision"] == "32-true" else torch.autocast(device.type, torch.bfloat16)
    with temporary_seed(0, device), override_validation(False), autocast:
        for place, generator in zip(devices, state["generators"], strict=False):
            set_generator_state(place, generator)
        for p in (*reached.loose, *(p for network in networks for p in network.parameters())):
            p.grad = None
        if not prepared.differentiable:
            found: Loss = prepared.evaluate_with_gradient(model, guide, batch, step=state["step"])
            return found
        loss: Loss = prepared.evaluate(model, guide, batch, step=state["step"])
        loss.total.backward()
    return Loss(loss.total.detach(), loss.by_term)


@torch.no_grad()
def _load(reached: ReachableObjects, state: Mapping[str, Any], path: Path) -> None:
    """Put the weights of a file in the place of those that programs reach.

    Raises:
        ValueError: they do not fit; nothing has been changed then.
    """
    saved = state["modules"]
    if saved.keys() != reached.modules.keys():
        names = [", ".join(each) or "none" for each in (saved, reached.modules)]
        raise ValueError(f"{path} is of other programs: its networks are {names[0]}, and these have {names[1]}")
    for name, module in reached.modules.items():
        if text := describe_mismatch(saved[name], module):
            raise ValueError(f"{path} does not fit {name}: {text}")
    if len(state["loose"]) != len(reached.loose):
        raise ValueError(
            f"{path} has {len(state['loose'])} parameters outside of modules, and these programs {len(reached.loose)}"
        )
    for number, (tensor, p) in enumerate(zip(state["loose"], reached.loose, strict=True)):
        if text := describe_tensor_mismatch(tensor, p):
            raise ValueError(f"{path} does not fit: parameter {number} outside of modules is {text}")
    load_modules(list(reached.modules.values()), list(saved.values()))
    for tensor, p in zip(state["loose"], reached.loose, strict=True):
        p.copy_(tensor)


def _copy(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in tensors.items()}


def _batch_state(batch: Batch) -> dict[str, Any]:
    """Return the contents of a minibatch as tensors, numbers and text."""
    return {
        "values": {name: batch[name] for name in batch.names if batch.holds(name)},
        "masks": dict(batch._masks),
        "lengths": dict(batch._lengths),
        "covariates": dict(batch.covariates),
        "total": batch.total,
        "index": batch._index,
        "rows": batch._rows,
        "end marks": batch._has_end_marks,
        "end tokens": dict(batch._end_tokens),
    }


def _batch_of_state(state: Mapping[str, Any]) -> Batch:
    """Return the minibatch that :func:`_batch_state` described."""
    values = state["values"]
    everywhere = {name: torch.ones(len(value), dtype=torch.bool) for name, value in values.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not finite
        batch = Batch(values, everywhere, state["covariates"], state["lengths"])
    return batch._copy(
        _masks=state["masks"],
        total=state["total"],
        _index=state["index"],
        _rows=state["rows"],
        _has_end_marks=state["end marks"],
        _end_tokens=state["end tokens"],
    )
