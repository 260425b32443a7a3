"""Handlers of sample sites that are made of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

SiteFunction = Callable[[dict[str, Any]], None]


class EditSites(Messenger):
    """A handler that passes the message of each sample site to a function, which may change it.

    The functions run before the site is sampled, inner handlers first, and not for the index sets of plates. To give a
    site its value, set ``msg["value"]`` and ``msg["done"] = True``.

    Args:
        latent: called with the messages of latent sites; None to leave them as they are.
        observed: called with those of observed sites; None to leave them as they are.

    Example::

        >>> import pyro
        >>> def widen(msg):
        ...     msg["fn"] = pyro.distributions.Normal(0.0, 100.0)
        >>> with EditSites(latent=widen), pyro.poutine.trace() as traced:
        ...     z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        >>> traced.trace.nodes["z"]["fn"].scale
        tensor(100.)
    """

    def __init__(self, latent: SiteFunction | None, observed: SiteFunction | None = None):
        super().__init__()
        self.latent = latent
        self.observed = observed

    def _pyro_sample(self, msg: Any) -> None:
        edit = self.observed if msg["is_observed"] else self.latent
        if edit is not None and not site_is_subsample(msg):
            edit(msg)


class RecordSites(Messenger):
    """A handler that passes the message of each sample site to a function once the site has its value.

    The function runs for latent and observed sites, and not for the index sets of plates.

    Args:
        record: called with the message.

    Example::

        >>> import pyro
        >>> names = []
        >>> with RecordSites(lambda msg: names.append(msg["name"])):
        ...     z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        >>> names
        ['z']
    """

    def __init__(self, record: SiteFunction):
        super().__init__()
        self.record = record

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.record(msg)
