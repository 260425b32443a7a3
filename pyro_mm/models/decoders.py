"""Checks of the decoders of a story."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..utils.arguments import check_modules


def check_decoders(decoders: Mapping[str, nn.Module], *latents: str) -> dict[str, nn.Module]:
    """Return the decoders of a story.

    Args:
        decoders: modality -> module, one at least.
        latents: names of the story's latent sites.

    Raises:
        TypeError: anything but a mapping from names to modules.
        ValueError: no decoders, or a modality named like a latent site or a plate, or by a name that torch forbids.
    """
    found = check_modules("decoders", decoders)
    for name in found:
        if name in (*latents, "data", "modalities"):
            raise ValueError(f"modality {name!r}: the story has a site or a plate of that name, choose another one")
    return found
