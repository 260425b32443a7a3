"""The one place that knows that ArviZ 0.x and 1.x build inference data differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def inference_data(groups: Mapping[str, Mapping[str, Any]]) -> Any:
    """ArviZ's inference data from arrays of shape ``(chain, draw, ..)``, by group and variable.

    An ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x; both give a group as ``data[group]``.
    """
    import arviz as az  # here, because it takes seconds

    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict({group: dict(variables) for group, variables in groups.items()})
    return az.from_dict(**{group: dict(variables) for group, variables in groups.items()})
