"""Weights of a (model, guide) pair on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..utils.arguments import check_path
from ..utils.tensor_files import OpenFile, describe_mismatch, load_modules, load_tensors, save_tensors

WHAT = "a file of mm.save"


def save(path: str | Path | OpenFile, model: Any, guide: Any) -> None:
    """Save the weights of model and guide to one file.

    The file is replaced as a whole: a stop while it is written leaves the one before. Of two processes that write to
    one path the last one wins. :func:`load` reads the file without running any code from it.

    Args:
        path: the file; or a binary file that is open.
        model, guide: modules, whose ``state_dict`` is written.

    Raises:
        TypeError: a model or guide that is no ``nn.Module``; save the modules that such a function uses.
        OSError: the file cannot be written.

    Example:
        >>> import io, torch, pyro_mm as mm
        >>> rows = mm.Batch({"image": torch.rand(8, 4, 4)})
        >>> model, guide, _ = mm.recipes.mvae(rows, latent=2, hidden=(8,))
        >>> file = io.BytesIO()
        >>> mm.save(file, model, guide)
        >>> _ = file.seek(0)
        >>> mm.load(file, model, guide)
    """
    state = {"model": _module("model", model).state_dict(), "guide": _module("guide", guide).state_dict()}
    save_tensors(_place(path), state)


def load(path: str | Path | OpenFile, model: Any, guide: Any) -> None:
    """Load weights written by :func:`save` into a model and guide built alike, and leave these in ``eval`` mode.

    Everything is compared before anything is changed: of a file that does not fit, nothing is loaded. Numbers are cast
    to the dtypes of the pair if those can hold them. The pair may be on any device.

    Args:
        path: the file; or a binary file that is open.
        model, guide: modules with the same names and shapes of weights as those that were saved.

    Raises:
        TypeError: a model or guide that is no ``nn.Module``.
        FileNotFoundError: there is no file.
        ValueError: the file is damaged or of another kind, or weights do not fit, with the path and their names.
    """
    parts = {"model": _module("model", model), "guide": _module("guide", guide)}
    path = _place(path)
    state = load_tensors(path, WHAT)
    if state.keys() != parts.keys():
        raise ValueError(f"{path} is not {WHAT}: it holds {', '.join(map(str, state)) or 'nothing'}")
    for part, module in parts.items():
        if text := describe_mismatch(state[part], module, cast=True):
            raise ValueError(f"{path} does not fit the {part}, a {type(module).__name__}: {text}")
    try:
        load_modules(list(parts.values()), [state[part] for part in parts])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the pair: {error}") from error
    for module in parts.values():
        module.eval()


def _place(path: Any) -> Path | OpenFile:
    """Return a path, or an open binary file as it is."""
    return path if isinstance(path, OpenFile) else check_path("path", path)


def _module(what: str, x: Any) -> nn.Module:
    if not isinstance(x, nn.Module):
        raise TypeError(f"the {what} is a {type(x).__name__}, which has no state_dict: save the modules that it uses")
    return x
