"""The graphical model of a story."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.inspect import render_model
from torch import nn

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_flags, check_programs
from ..utils.global_state import preserve_process_settings


def graph(model: Callable[[Batch], Any], batch: Batch, *, distributions: bool = False, parameters: bool = False) -> Any:
    """Draw the graphical model of a story, or of a guide: sites, their dependencies, and plates.

    What is observed is grey. A modality that no row of the batch has is drawn as a latent.

    Args:
        model: a callable of a batch.
        batch: rows, of which the first is enough.
        distributions: True to name the distribution of each site.
        parameters: True to show the parameters that are registered with ``pyro.param``.

    Returns:
        A ``graphviz.Digraph``, which a notebook shows, and ``.render("story")`` writes to a file.

    Raises:
        ImportError: the Python package graphviz is missing.

    Example::

        mm.plots.graph(model, train)
    """
    check_programs(model=model)
    check_batch(batch)
    check_flags(distributions=distributions, parameters=parameters)
    try:
        with preserve_process_settings():
            import graphviz  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the graph of a story is drawn by graphviz, which is not installed: pip install graphviz, and the programs "
            "of https://graphviz.org/download, from a package manager such as apt, brew or conda"
        ) from error
    modes = {module: module.training for module in (model.modules() if isinstance(model, nn.Module) else ())}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=[]):
            return render_model(model, (batch[:1],), render_distributions=distributions, render_params=parameters)
    finally:
        for module, training in modes.items():
            module.training = training
