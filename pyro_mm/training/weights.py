"""Weights of a (model, guide) pair on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..utils.arguments import check_flag, check_path, describe
from ..utils.safetensors_files import load_safetensors, save_safetensors
from ..utils.tensor_files import OpenFile, describe_mismatch, load_modules, load_tensors, save_tensors
from ..utils.versions import library_versions

WHAT = "a file of mm.save"
FORMAT = 1  # of the description in a safetensors file
TORCH_SUFFIXES = (".pt", ".pth")
IN_JSON = (bool, int, float, str, type(None))
MAX_DIFFERENCES = 5  # classes that a message names


def save(path: str | Path | OpenFile, model: Any, guide: Any, *, notes: Mapping[str, Any] | None = None) -> None:
    """Save the weights of model and guide to one file.

    The file is of the safetensors format, which other programs read too. Its header has a description in JSON: the
    versions of the file, of this package and of torch, the class of every module, ``notes``, and a check sum. A path
    that ends in ``.pt`` or ``.pth`` makes a file of ``torch.save`` instead, as up to version 0.2, with weights alone.

    The file is replaced as a whole: a stop while it is written leaves the one before. Of two processes that write to
    one path the last one wins. :func:`load` reads either kind without running any code from it.

    Args:
        path: the file; or a binary file that is open.
        model, guide: modules, whose ``state_dict`` is written.
        notes: what else is to be known of the weights, such as data and epochs: name -> what JSON can hold.

    Raises:
        TypeError: a model or guide that is no ``nn.Module``; save the modules that such a function uses. Or a state
            that the format cannot hold.
        ValueError: ``notes`` for a ``.pt`` file.
        OSError: the file cannot be written.

    Example:
        >>> import io, torch, pyro_mm as mm
        >>> rows = mm.Batch({"image": torch.rand(8, 4, 4)})
        >>> model, guide, _ = mm.recipes.mvae(rows, latent=2, hidden=(8,))
        >>> file = io.BytesIO()
        >>> mm.save(file, model, guide, notes={"data": "noise"})
        >>> _ = file.seek(0)
        >>> mm.load(file, model, guide)
    """
    parts = {"model": _module("model", model), "guide": _module("guide", guide)}
    if notes is not None and not isinstance(notes, Mapping):
        raise TypeError(f"expected notes to be a dict of what JSON can hold, got {describe(notes)}")
    place = _place(path)
    if isinstance(place, Path) and place.suffix in TORCH_SUFFIXES:
        if notes:
            raise ValueError(f"{place} would be a file of torch.save, of weights alone: for notes use .safetensors")
        save_tensors(place, {part: module.state_dict() for part, module in parts.items()})
        return

    description: dict[str, Any] = {"kind": WHAT, "format": FORMAT, "notes": dict(notes or {}), **library_versions()}
    tensors: dict[str, Tensor] = {}
    for part, module in parts.items():
        state = module.state_dict()
        tensors |= {f"{part}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for name, value in others.items():
            if not isinstance(value, IN_JSON):
                raise TypeError(
                    f"{part}.{name} is a {type(value).__name__}, and a safetensors file holds tensors, numbers and "
                    "text: keep those in the state of a module, or save to a path that ends in .pt"
                )
        description[part] = {"classes": _classes(module), "others": others}
    save_safetensors(place, tensors, description)


def load(path: str | Path | OpenFile, model: Any, guide: Any, *, force: bool = False) -> None:
    """Load weights written by :func:`save` into a model and guide built alike, and leave these in ``eval`` mode.

    Everything is compared before anything is changed: of a file that does not fit, nothing is loaded. Numbers are cast
    to the dtypes of the pair if those can hold them. The pair may be on any device.

    Args:
        path: the file; or a binary file that is open.
        model, guide: modules with the same names and shapes of weights as those that were saved.
        force: True accepts modules of other classes, if their weights have the same names and shapes: a product of
            experts reads those of a mixture, say. Files of ``torch.save`` do not know their classes.

    Raises:
        TypeError: a model or guide that is no ``nn.Module``.
        FileNotFoundError: there is no file.
        ValueError: the file is damaged or of another kind, or of another pair, with the path and what differs.
    """
    parts = {"model": _module("model", model), "guide": _module("guide", guide)}
    check_flag("force", force)
    path = _place(path)
    states, classes = _read(path)
    for part, module in parts.items():
        if text := describe_mismatch(states[part], module, cast=True):
            raise ValueError(f"{path} does not fit the {part}, a {type(module).__name__}: {text}")
    for part, module in parts.items():
        if not force and (text := _describe_other_classes(classes.get(part), module)):
            raise ValueError(
                f"{path} does not fit the {part}, whose weights have the same names and shapes, but which is another "
                f"one: {text}. Build it alike, or pass force=True"
            )
    try:
        load_modules(list(parts.values()), [states[part] for part in parts])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the pair: {error}") from error
    for module in parts.values():
        module.eval()


def _read(path: Path | OpenFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``state_dict`` of model and guide, and the classes of their modules if the file knows them."""
    if _is_archive(path):
        state = load_tensors(path, WHAT)
        if state.keys() != {"model", "guide"}:
            raise ValueError(f"{path} is not {WHAT}: it holds {', '.join(map(str, state)) or 'nothing'}")
        return state, {}
    tensors, description = load_safetensors(path, WHAT)
    if description.get("kind") != WHAT:
        raise ValueError(f"{path} is not {WHAT}: it says that it is {description.get('kind', 'nothing')}")
    if description.get("format") != FORMAT:
        version = description.get("pyro_mm")
        raise ValueError(
            f"{path} is of format {description.get('format')}, of pyro_mm {version}: load it with that version"
        )
    states: dict[str, Any] = {part: dict(description[part]["others"]) for part in ("model", "guide")}
    for name, tensor in tensors.items():
        part, key = name.split(".", 1)
        states[part][key] = tensor
    return states, {part: description[part]["classes"] for part in states}


def _is_archive(path: Path | OpenFile) -> bool:
    """Return True for a file of ``torch.save``, which is a zip archive; an open file stays where it is.

    Raises:
        FileNotFoundError: there is no file.
    """
    if isinstance(path, Path):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: expected {WHAT}")
        with open(path, "rb") as file:
            return file.read(2) == b"PK"
    start = path.tell()
    begin = path.read(2)
    path.seek(start)
    return bool(begin == b"PK")


def _classes(module: nn.Module) -> dict[str, str]:
    """Return name -> class of every module in one; the outermost has an empty name."""
    return {name: type(each).__qualname__ for name, each in module.named_modules()}


def _describe_other_classes(saved: Any, module: nn.Module) -> str:
    """Return the modules of other classes than those that were saved, in words; empty if there are none."""
    if saved is None:
        return ""
    here = _classes(module)
    texts = []
    for name in dict.fromkeys([*saved, *here]):
        if saved.get(name) != here.get(name):
            texts.append(f"{name or 'it'} is {here.get(name, 'absent')}, and was {saved.get(name, 'absent')}")
    more = f", and {len(texts) - MAX_DIFFERENCES} more" * (len(texts) > MAX_DIFFERENCES)
    return "; ".join(texts[:MAX_DIFFERENCES]) + more


def _place(path: Any) -> Path | OpenFile:
    """Return a path, or an open binary file as it is."""
    return path if isinstance(path, OpenFile) else check_path("path", path)


def _module(what: str, x: Any) -> nn.Module:
    if not isinstance(x, nn.Module):
        raise TypeError(f"the {what} is a {type(x).__name__}, which has no state_dict: save the modules that it uses")
    return x
