"""Names of what is trained, for messages."""

from __future__ import annotations

from collections.abc import Iterator

import pyro

from .problem import TrainingProblem


def parameter_names(problem: TrainingProblem) -> dict[int, str]:
    """Name every parameter of a problem, by identity.

    A parameter of a module has its path; one that several places share has all of them. What a function uses of
    Pyro's store has its name there, and any other leaf its shape.
    """
    paths: dict[int, list[str]] = {}
    for key, path in _paths(problem):
        here = paths.setdefault(key, [])
        if path not in here:
            here.append(path)
    names = {key: here[0] + (f" (also {', '.join(here[1:])})" if here[1:] else "") for key, here in paths.items()}
    for p in problem.parameters:
        names.setdefault(id(p), f"a tensor of shape {tuple(p.shape)}")
    return names


def _paths(problem: TrainingProblem) -> Iterator[tuple[int, str]]:
    for what, module in problem.modules_by_path.items():
        for path, p in module.named_parameters(remove_duplicate=False):
            yield id(p), f"{what}.{path}"
    for name, p in pyro.get_param_store().named_parameters():
        yield id(p), f"pyro.param {name!r}"
