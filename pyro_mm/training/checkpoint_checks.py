"""Comparison of a checkpoint with the training that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.stream import Stream
from ..utils.arguments import check_seed
from ..utils.tensor_files import describe_tensor_mismatch
from .fingerprint import describe_contents, rows_hash
from .position import describe_damage

FILE_KIND = "a checkpoint of mm.fit"
ENTRY_TYPES = {
    "epochs": int,
    "modules": list,
    "loose": list,
    "optimizer": dict,
    "steps": int,
    "columns": dict,
    "generators": list,
}
FREE_SHAPES = ("LBFGS", "Adafactor", "Muon")  # optimisers of torch whose state is not of the parameters' shapes
EXAMPLE_SHAPE = (2,)  # a shape that is not that of a count of steps


def damage_error(path: Path, text: str) -> ValueError:
    """Return the error of a file that is no whole checkpoint."""
    return ValueError(f"{path} is damaged, or not {FILE_KIND}: {text}")


def mismatch_error(path: Path, text: str, forcible: bool = False) -> ValueError:
    """Return the error of a checkpoint that does not fit; ``forcible`` if ``resume="force"`` would accept it.

    Args:
        path: the file.
        text: the part that differs, in words.
        forcible: True if ``resume="force"`` would accept the file.
    """
    mend = '. Give fit(.., resume="force") to go on all the same, or another path to start anew' * forcible
    return ValueError(f"{path} does not fit what is to be trained: {text}{mend}")


# -- entries and data ---------------------------------------------------------------------------------------------


def check_entries(path: Path, state: dict[str, Any]) -> None:
    """Raise a ValueError unless a checkpoint has all entries, each of its type, and one number per epoch."""
    if not state.keys() & ENTRY_TYPES.keys():
        raise ValueError(f"{path} is not {FILE_KIND}: it holds {', '.join(map(str, state)) or 'nothing'}")
    for name, kind in ENTRY_TYPES.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            found = type(state[name]).__name__ if name in state else "nothing"
            raise damage_error(path, f"expected {name!r} to be of type {kind.__name__}, found {found}")
    columns = state["columns"]
    for name, column in columns.items():
        numbers = isinstance(column, list) and all(isinstance(x, int | float) for x in column)
        if not (isinstance(name, str) and numbers and len(column) == state["epochs"]):
            raise damage_error(path, f"expected {state['epochs']} numbers in the column {name!r} of its history")
    position = state.get("position")
    if position is not None and (text := describe_damage(position)):
        raise damage_error(path, text)
    begun = state["epochs"] == 0 and position is not None
    if not begun and (state["epochs"] < 1 or state["steps"] < 0 or "loss" not in columns):
        raise damage_error(
            path, f"it is of {state['epochs']} epochs, {state['steps']} steps and {len(columns)} columns"
        )


def data_identity(
    data: Any, head: Batch, rows: int, batch_size: int, minibatches: int, seed: int | None
) -> dict[str, Any]:
    """Describe what decides a training's minibatches, to be compared when it goes on.

    Args:
        data: a batch; a stream, of which the first rows are compared; or a loader, whose values are not, since they may
            differ from epoch to epoch.
        head: some of its rows.
        rows: their number in all.
        batch_size: rows of a minibatch.
        minibatches: their number in an epoch.
        seed: seed of the training.
    """
    return {
        "rows": rows,
        "batch size": batch_size,
        "minibatches of an epoch": minibatches,
        "seed": check_seed(seed),
        "holds": describe_contents(head),
        "values": _values_hash(data, head),
    }


def _values_hash(data: Any, head: Batch) -> str:
    if isinstance(data, Stream):
        return rows_hash(head)
    return rows_hash(data) if isinstance(data, Batch) else "of a loader"


def difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Compare two results of :func:`data_identity`: the first difference in words, or an empty text.

    Two minibatches of a loader may lack different modalities, so that only those of both are compared.
    """
    for part, value in here.items():
        found = saved.get(part, 1 if part == "processes" else None)  # which earlier files do not have
        if found == value:
            continue
        if part == "values":
            return "some rows have other values"
        if part != "holds" or not isinstance(found, Mapping):
            return f"{part}: {found!r}, and not {value!r}"
        loader = "of a loader" in (saved.get("values"), here.get("values"))
        for name in sorted({*found, *value}):
            kinds = found.get(name, ""), value.get(name, "")
            absent = name not in found or name not in value or "" in kinds
            if kinds[0] != kinds[1] and not (loader and absent):
                return f"{name}: {kinds[0] or 'none'}, and not {kinds[1] or 'none'}"
    return ""


# -- the optimiser and the generators -----------------------------------------------------------------------------


def check_optimizer_state(path: Path, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise a ValueError unless saved moments fit the parameters of an optimiser.

    Args:
        path: the file, for the message.
        optimizer: the optimiser of the training.
        state: its saved ``state_dict``.
    """
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise damage_error(path, "the state of the optimiser is not one")
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise damage_error(path, "the state of the optimiser has groups without parameters")

    here = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    own_sizes = [len(group["params"]) for group in here]
    if sizes != own_sizes:
        raise mismatch_error(path, f"its optimiser has groups of {sizes} parameters, and not of {own_sizes}")

    numbers = [number for group in groups for number in group["params"]]
    parameters = dict(zip(numbers, (p for group in here for p in group["params"]), strict=True))
    if len(parameters) != len(numbers) or not moments.keys() <= parameters.keys():
        raise damage_error(path, "its optimiser has a state of parameters that are not in its groups")
    for number, moment in moments.items():
        if not isinstance(moment, dict):
            raise damage_error(path, f"the state of the optimiser for parameter {number} is a {type(moment).__name__}")
    for group, saved_group in zip(here, groups, strict=True):
        example = _example_moments(optimizer, group)
        for number in saved_group["params"]:
            if moments.get(number):
                _check_moments(path, number, moments[number], parameters[number], example)


def _check_moments(path: Path, number: int, moment: dict[str, Any], p: Tensor, example: dict[str, Any]) -> None:
    for name, here in example.items():
        if name not in moment:
            raise mismatch_error(path, f"its optimiser has no {name} of parameter {number}")
        if isinstance(here, Tensor):
            text = describe_tensor_mismatch(moment[name], p if here.shape == EXAMPLE_SHAPE else here)
        else:
            text = "" if isinstance(moment[name], type(here)) else f"a {type(moment[name]).__name__}"
        if text:
            raise mismatch_error(path, f"{name} of parameter {number} in its optimiser is {text}")


def _example_moments(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state of one of torch's optimisers after a step of a parameter of shape ``EXAMPLE_SHAPE``.

    Its tensors of that shape have the shape of the parameter in general. Empty if the state is unknown.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim") or kind.__name__ in FREE_SHAPES:
        return {}
    first = group["params"][0]
    p = torch.zeros(EXAMPLE_SHAPE, dtype=first.dtype, device=first.device, requires_grad=True)
    p.grad = torch.zeros_like(p)
    try:
        example = kind([p], **{k: v for k, v in group.items() if k in optimizer.defaults})
        example.step()
    except (RuntimeError, TypeError, ValueError):
        return {}
    return dict(example.state[p])


def check_accumulated(path: Path, here: Sequence[Tensor], saved: Any) -> None:
    """Raise a ValueError unless saved sums of gradients fit those of a training that accumulates them.

    Args:
        path: the file, for the message.
        here: the sums of the training; none if it steps on every minibatch.
        saved: those of the file.
    """
    if not isinstance(saved, list) or not all(isinstance(t, Tensor) for t in saved):
        raise damage_error(path, "its sums of gradients are not tensors")
    if any(t.any() for t in saved[-1:]) and list(map(torch.Tensor.size, saved)) != list(map(torch.Tensor.size, here)):
        raise mismatch_error(
            path, "it lies between two steps of an optimiser that accumulates gradients: pass accumulate as before"
        )


def check_generators(path: Path, devices: Sequence[torch.device], states: list[Any]) -> None:
    """Raise a ValueError unless saved states of torch's generators can be used on these devices.

    Args:
        path: the file, for the message.
        devices: devices that draw random numbers, besides the CPU.
        states: the saved states.
    """
    for device, saved in zip(devices, states, strict=False):
        try:
            torch.Generator(device).set_state(saved.cpu())
        except (AttributeError, RuntimeError, TypeError) as error:
            raise damage_error(path, f"the state of torch's generator on {device} cannot be used here") from error
    if not states:
        raise damage_error(path, "it has no state of torch's generator")
