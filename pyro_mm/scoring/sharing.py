"""Evaluations of a pair that several processes share out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..batch.batch import Batch
from ..utils.reachable import ReachableObjects
from ..utils.sharing import digest, share_out

Result = TypeVar("Result")


def share_evaluation(
    what: str,
    devices: int | None,
    model: Any,
    guide: Any,
    batch: Batch,
    seed: int | None,
    act: Callable[[], Result],
) -> Result:
    """Evaluate a pair on several processes, which are given the same pair, rows and seed.

    Args:
        what: name of the function that the user calls.
        devices: as in :func:`~pyro_mm.utils.sharing.share_out`.
        model, guide: callables of a batch.
        batch: N rows.
        seed: as the user gave it.
        act: the evaluation, which shares out its work by :func:`~pyro_mm.utils.sharing.sharing`.

    Raises:
        ValueError: as of :func:`~pyro_mm.utils.sharing.share_out`.
    """

    def alike() -> Mapping[str, Any]:
        networks = ReachableObjects({"model": model, "guide": guide}).modules.values()
        weights = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        return {
            "the numbers of rows": batch.size,
            "the seeds": seed,
            "the rows": digest(batch.parts()[1]),
            "the weights of model and guide": digest(weights),
        }

    return share_out(what, devices, act, alike)
