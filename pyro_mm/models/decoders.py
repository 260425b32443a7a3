"""Decoders of a story, as it is given them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..utils.arguments import check_modules


def check_decoders(decoders: Mapping[str, nn.Module], *latents: str) -> dict[str, nn.Module]:
    """Return the decoders of a story, one at least, none of them named like a latent site or the plate.

    Raises:
        TypeError: no mapping from names to modules.
        ValueError: none of them, or a name that is taken or that torch forbids.
    """
    found = check_modules("decoders", decoders)
    for name in found:
        if name in (*latents, "data", "modalities"):
            raise ValueError(f"modality {name!r}: the story has a site or a plate of that name, choose another one")
    return found
