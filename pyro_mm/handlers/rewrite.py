"""A handler that edits the messages of sample sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


class EditSites(Messenger):
    """Hands every latent site's message to a function, which may change it; and every observed one's to another."""

    def __init__(
        self, edit: Callable[[dict[str, Any]], None], observed: Callable[[dict[str, Any]], None] | None = None
    ):
        super().__init__()
        self.edit, self.observed = edit, observed

    def _pyro_sample(self, msg: Any) -> None:
        edit = self.observed if msg["is_observed"] else self.edit
        if edit is not None and not site_is_subsample(msg):
            edit(msg)
