"""A program at fixed values of the latents that all rows share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine

from ..batch.batch import Batch
from ..handlers.rewrite import EditSites
from ..utils.seeding import generator_state, set_generator_state
from .program import Program
from .structure import in_data_plate, latent_sites


class Given:
    """A program that takes the values of some latents as given, and no longer has these among its sites.

    Args:
        program: a model or a guide.
        sites: name -> site with its value, as :func:`draw_global_latents` draws it.
    """

    def __init__(self, program: Program, sites: Mapping[str, Mapping[str, Any]]):
        self.program = program
        self.set(sites)

    def set(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Take other values as given. One program for all of them keeps what is known of its structure."""
        self.values = {name: site["value"] for name, site in sites.items()}

    def __call__(self, batch: Batch) -> Any:
        """Run the program on a batch."""
        with poutine.block(hide=list(self.values)), EditSites(self._set_value):
            return self.program(batch)

    def _set_value(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


@torch.no_grad()
def draw_global_latents(guide: Program, batch: Batch) -> dict[str, dict[str, Any]]:
    """Draw the latents of a guide that lie outside the plate ``"data"``, once for all rows: name -> site.

    A guide without any leaves torch's generator as it was, so that its other draws do not depend on this call.
    """
    state = generator_state(batch.device)
    with poutine.block(), poutine.trace() as traced:
        guide(batch)
    shared = {name: site for name, site in latent_sites(traced.trace).items() if not in_data_plate(site)}
    if not shared:
        set_generator_state(batch.device, state)
    return shared
