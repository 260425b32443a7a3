"""Explain errors of a story or a guide by the site, the network and the shapes that they come from."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import CO_VARARGS as VARIADIC
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..utils.reachable import ReachableObjects

OURS = "pyro_mm"
TO_EVENT = ("Shape mismatch inside plate", "invalid log_prob shape", "to_event", "Expected independent dimensions")


class ExplainedError(Exception):
    """A base of errors whose message has the place in the program already."""


class ProgramError(ValueError, RuntimeError, ExplainedError):
    """A story or a guide cannot be run on its rows, in an evaluation or in the first step of a training."""


class ProgramTypeError(TypeError, ExplainedError):
    """A story or a guide passes something of a wrong type to a function of this package."""


@contextmanager
def explain_errors(programs: Mapping[str, Any], rows: int) -> Iterator[None]:
    """Replace an error of a story or a guide by one that has its place in the program.

    Args:
        programs: ``"model"`` and ``"guide"`` -> callable, for the paths of their networks.
        rows: number of rows that they run on, N in the message.

    Raises:
        ValueError, TypeError: naming site, network, modality and shapes, with a hint; the original is its cause.
    """
    try:
        yield
    except Exception as error:
        new = explain_error(error, programs, rows)
        if new is error:
            raise
        raise new from error


@contextmanager
def explain_index_errors(programs: Mapping[str, Any], rows: int, named: str) -> Iterator[None]:
    """Replace an IndexError, such as a label beyond an embedding, by an error that names its place in the program.

    Args:
        programs: ``"model"`` and ``"guide"`` -> callable, for the paths of their networks.
        rows: number of rows that they run on, N in the message.
        named: the rows in words, with ``{}`` in the place of their number.

    Raises:
        ValueError: naming site, network, modality and shapes, with a hint; the original is its cause.
    """
    try:
        yield
    except IndexError as error:
        new = explain_error(error, programs, rows, named=named)
        if new is error:
            raise
        raise new from error


def explain_error(
    error: Exception,
    programs: Mapping[str, Any],
    rows: int,
    named: str = "the first {} rows",
) -> Exception:
    """Return an error with the place in the program that another error comes from.

    Args:
        error: raised by a program.
        programs: ``"model"`` and ``"guide"`` -> callable, for the paths of their networks.
        rows: number of rows that they run on, N in the message.
        named: the rows in words, with ``{}`` in the place of their number.

    Returns:
        A ProgramError, or a ProgramTypeError for a TypeError of this package; the old error if its place is not known,
        or if its message has it already.
    """
    if isinstance(error, ExplainedError):
        return error
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = list(_places(frames, programs, rows))
    if not where:
        return error
    text = str(error).strip().split("\nTrace Shapes")[0].strip() or type(error).__name__
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    head = f"{named.format(rows)} (N = {rows}) cannot be run{''.join(f', {place}' for place in where)}"
    ours = bool(frames) and str(frames[-1].f_globals.get("__name__", "")).split(".")[0] == OURS
    chosen = ProgramTypeError if isinstance(error, TypeError) and ours else ProgramError
    new = chosen(". ".join([f"{head}: {_with_n(text, rows)}", *_hints(text, frames)]))
    for note in getattr(error, "__notes__", []):
        new.add_note(note)
    return new


def _places(frames: list[FrameType], programs: Mapping[str, Any], rows: int) -> Iterator[str]:
    """Yield the network, the site and the modality that an error was raised at, in words."""
    module, given = _network(frames)
    if module is not None:
        path = _paths(programs).get(id(module))
        shapes = " and ".join(_shape(x, rows) for x in given)
        kind = type(module).__name__
        yield f"in {f'{path} ({kind})' if path else kind}" + (f", given {shapes}" if shapes else "")
    site = _site(frames)
    modality = _modality(frames)
    if site is not None:
        yield "at the plate 'data'" if site == "data" else f"at site {site!r}"
    if modality is not None and modality != site:
        yield f"for modality {modality!r}"


def _paths(programs: Mapping[str, Any]) -> dict[int, str]:
    """Return identity -> path of every module that programs refer to."""
    return {
        id(module): f"{root}.{path}" if path else root
        for root, outer in ReachableObjects(programs).modules.items()
        for path, module in outer.named_modules()
    }


def _site(frames: list[FrameType]) -> str | None:
    """Return the site that was being sampled, or whose distribution was being computed."""
    for frame in reversed(frames):
        code = frame.f_code
        names = frame.f_locals
        if code.co_name == "sample" and frame.f_globals.get("__name__", "").startswith("pyro.primitives"):
            return names.get("name")
        if code.co_name in ("observe", "_observed") and isinstance(names.get("self"), Batch):
            return names.get("name")
        msg = names.get("msg")
        if isinstance(msg, dict) and msg.get("type") == "sample" and msg.get("name"):
            name: str = msg["name"]
            return name
        if isinstance(names.get("site"), dict) and names["site"].get("type") == "sample":
            site: str = names["site"]["name"]
            return site
    for frame in reversed(frames):  # a guide's posterior is made before its site is sampled
        names = frame.f_locals
        if frame.f_code.co_name == "forward" and "posterior" in names and isinstance(names.get("site"), str):
            sampled: str = names["site"]
            return sampled
    return None


def _modality(frames: list[FrameType]) -> str | None:
    """Return the modality that was being read, encoded or observed."""
    for frame in reversed(frames):
        names = frame.f_locals
        function = frame.f_code.co_name
        if not isinstance(names.get("self"), Batch):
            continue
        if function in ("observe", "_observed", "encode"):
            return names.get("name")
        if function == "__getitem__" and isinstance(names.get("key"), str):
            key: str = names["key"]
            return key
    return None


def _network(frames: list[FrameType]) -> tuple[nn.Module | None, list[Tensor]]:
    """Return the innermost module that was called with tensors, and these."""
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        code = frame.f_code
        if not isinstance(module, nn.Module) or code.co_name in ("_call_impl", "_wrapped_call_impl"):
            continue
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & VARIADIC)]
        arguments = [frame.f_locals.get(name) for name in names]
        given = [x for a in arguments for x in (a if isinstance(a, tuple) else (a,)) if isinstance(x, Tensor)]
        if given:
            return module, given
    return None, []


def _shape(x: Tensor, rows: int) -> str:
    """Return a tensor's shape as text, with N in the place of the number of rows."""
    sizes = list(x.shape)
    last = len(sizes) - (len(sizes) > 1)
    named = ["N" if size == rows and i < last else str(size) for i, size in enumerate(sizes)]
    return f"({', '.join(named)}{',' if len(named) == 1 else ''})"


def _with_n(text: str, rows: int) -> str:
    """Return a text with N in the place of the number of rows, in the shapes that begin with it."""
    text = re.sub(rf"([(\[]){rows}(?=[,)\]])", r"\1N", text)
    return re.sub(rf"\b{rows}x(?=\d)", "Nx", text)


def _hints(text: str, frames: list[FrameType]) -> Iterator[str]:
    """Yield advice that may mend an error."""
    module, given = _network(frames)
    encoding = any(frame.f_code.co_name == "encode" for frame in frames)
    if isinstance(module, nn.Linear) and given[0].dim() and given[0].shape[-1] != module.in_features:
        gets = given[0].shape[-1]
        fits = f"nn.Linear({gets}, {module.out_features}), or nn.Flatten before it?"
        yield f"It takes {module.in_features} features and gets {gets}: {fits}"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield from _index_hints(module, given[0])
    elif "expected an event of 1 entries" in text and given and given[0].dim() == 1:
        yield "Give one number per row as (N, 1), values[:, None]"
    elif module is not None and "dtype" in text and not given[0].is_complex():
        weights = next((p.dtype for p in module.parameters()), given[0].dtype)
        if weights != given[0].dtype:
            double = given[0].dtype == torch.float64
            mend = ".float() the data, or .double() the networks" if double else f"give it x.to({weights})"
            yield f"Its weights are {weights}, and its input is {given[0].dtype}: {mend}"
    if "expected an output of shape" in text or "expected D (D + 3)" in text:
        yield "A family of two parameters takes two outputs for each entry: an encoder of 8 latents puts out 16"
    elif match := re.search(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)", text):
        what = (
            "an encoder of 8 latents puts out 16" if encoding else "a decoder takes as many entries as the latent has"
        )
        yield f"Sizes {match[1]} and {match[2]} meet: is .to_event(1) missing, or has a network other outputs ({what})?"
    if "Multiple sample sites named 'data'" in text:
        yield "Enter the plate once, with all that is of a row in the one block: with batch.plate(): .."
    if any(part in text for part in TO_EVENT):
        yield "A distribution over the entries of a row needs .to_event(1), or as many as the row has dimensions"


def _index_hints(module: Any, indices: Tensor) -> Iterator[str]:
    """Yield advice on the indices that an embedding is given."""
    if indices.dtype not in (torch.int32, torch.int64):
        whole = "x.argmax(-1) of one-hot rows x" if indices.dim() > 1 else "x.long()"
        yield f"An embedding takes indices as torch.int64, and gets {indices.dtype}: give it {whole}"
    elif indices.numel():
        low = int(indices.min())
        high = int(indices.max())
        most = module.num_embeddings
        if low < 0 or high >= most:
            yield (
                f"An embedding of {most} takes indices from 0 to {most - 1}, and gets {low} to {high}: count classes "
                "from 0; a missing label, such as -1, is to be said by present="
            )
