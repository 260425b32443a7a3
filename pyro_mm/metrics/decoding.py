"""Reconstructions of a story's modalities as functions of its factors, whatever the story is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import ismethod
from typing import Any, Protocol, TypeGuard

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from ..batch.batch import Batch
from ..distributions.token_sequence import TokenSequence
from ..handlers.rewrite import EditSites, RecordSites
from ..sampling.ancestral import mean_of_modality, to_sample_layout
from ..sampling.predictive import SampleSettings, draw_samples
from ..scoring.evaluation import evaluating
from ..scoring.program import Program
from ..scoring.structure import in_data_plate, is_factor, pair_structure, private_modality
from ..utils.arguments import check_names
from ..utils.seeding import temporary_seed

ROWS_PER_PASS = 256  # bounds the memory: a pass decodes every modality


class StoryOfFactors(Protocol):
    """A story with networks between its latents and the factors that it decodes, such as ``models.Factorized``."""

    def factors(self, latents: Mapping[str, Tensor], batch: Batch | None = None) -> dict[str, Tensor]:
        """Return the factors of latents, by latent site."""

    def decode(self, factors: Mapping[str, Tensor], batch: Batch | None = None) -> dict[str, Any]:
        """Return the distributions of the modalities."""


class Decoded:
    """The factors of some rows, one draw each, and the modalities as functions of them.

    The factors are those of a story with methods ``factors`` and ``decode``, by latent site. Of any other story they
    are the latents in the plate ``"data"``, and what it names by ``pyro.deterministic``.

    Args:
        model: a story.
        rows: N rows, on the device of the networks.
        latents: latent site of the model -> ``(N, *plates, *event)``; ``(*plates, *event)`` if all rows share it.

    Attributes:
        values: factor -> ``(N, ..)``.
        deterministic: the factors among them that the story makes of latents, and names.
        modalities: names of the modalities that story and batch have.
    """

    def __init__(self, model: Program, rows: Batch, latents: Mapping[str, Tensor]):
        self._model = model
        self.rows = rows
        self._latents = latents
        self.deterministic: frozenset[str] = frozenset()
        self.modalities: tuple[str, ...] = ()
        self.values: dict[str, Tensor] = {}
        if _has_factors(model):
            self.values = model.factors(latents, rows)
            self.modalities = tuple(name for name in self._distributions({}) if name in rows)
        else:
            self._read_sites()

    def _read_sites(self) -> None:
        """Collect the latents and the deterministic sites of a story, and the names of its modalities."""
        found: dict[str, Tensor] = {}
        named: set[str] = set()

        def record(msg: dict[str, Any]) -> None:
            name, value = msg["name"], msg["value"]
            if msg["infer"].get("_deterministic", False):
                if isinstance(value, Tensor) and value.dim() and len(value) == self.rows.size:
                    found[name] = value
                    named.add(name)
            elif not msg["is_observed"] and in_data_plate(msg):
                found[name] = self._latents[name]

        self.modalities = tuple(name for name in self._distributions({}, record) if name in self.rows)
        self.values = found
        self.deterministic = frozenset(named)

    def distributions(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the distribution of each modality of the batch, with the site that tells its plates.

        Args:
            values: factor -> ``(N, ..)``, in the place of those that were drawn.
        """
        found = self._distributions(values)
        return {name: found[name] for name in self.modalities}

    def _distributions(
        self, values: Mapping[str, Tensor], record: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        if _has_factors(self._model):
            decoded = self._model.decode({**self.values, **values}, self.rows)
            return {name: {"fn": fn, "value": None, "cond_indep_stack": ()} for name, fn in decoded.items()}

        found: dict[str, Any] = {}

        def set_latent(msg: dict[str, Any]) -> None:
            value = values.get(msg["name"], self._latents.get(msg["name"]))
            if value is not None:
                msg["value"] = _to_site_layout(msg, value)
                msg["done"] = True

        def read(msg: dict[str, Any]) -> None:
            if msg["infer"].get("_deterministic", False):
                if msg["name"] in values:
                    msg["value"] = values[msg["name"]]
            elif in_data_plate(msg) and not is_factor(msg):
                found[msg["name"]] = dict(msg)

        recording = nullcontext() if record is None else RecordSites(record)
        with poutine.block(), recording, EditSites(set_latent, read):
            self._model(self.rows)
        return found

    def means(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the mean of each modality, ``(N, *plates, *event)``, differentiable in the factors.

        Of a Categorical it is the vector of its probabilities, and of a string of tokens the probabilities of every
        token given those before it in the row. A modality without a mean that is known is left out.

        Args:
            values: factor -> ``(N, ..)``, in the place of those that were drawn.
        """
        found = {}
        for name, site in self.distributions(values or {}).items():
            fn = _without_masks(site["fn"])
            mean, event_dim = self._mean(name, fn)
            if mean is not None:
                found[name] = self._layout(site, mean, event_dim)
        return found

    def _mean(self, name: str, fn: Any) -> tuple[Tensor | None, int]:
        """Return the mean of a distribution and the number of its event dimensions; None if it is not known."""
        if isinstance(fn, TokenSequence):
            tokens = torch.where(fn.valid(self.rows[name]), self.rows[name].long(), 0)
            return fn.logits(tokens[..., :-1]).softmax(-1), 2
        try:
            mean = mean_of_modality(name, fn)
        except ValueError:
            return None, 0
        return mean, fn.event_dim + (mean.dim() - len(fn.shape()))

    def draws(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return a draw of each modality, ``(N, *plates, *event)``.

        Args:
            values: as in :meth:`means`.
        """
        sites = self.distributions(values or {})
        return {
            name: self._layout(site, _without_masks(site["fn"]).sample(), site["fn"].event_dim)
            for name, site in sites.items()
        }

    def has_mean(self) -> frozenset[str]:
        """Return the modalities whose mean does not depend on their own values and is known."""
        fns = {name: _without_masks(site["fn"]) for name, site in self.distributions({}).items()}
        return frozenset(
            name
            for name, fn in fns.items()
            if not isinstance(fn, TokenSequence) and self._mean(name, fn)[0] is not None
        )

    def _layout(self, site: Mapping[str, Any], value: Tensor, event_dim: int) -> Tensor:
        if not site["cond_indep_stack"]:
            return value.expand(self.rows.size, *value.shape[1:])
        return to_sample_layout(site, self.rows.size, value, event_dim)[0]

    def independent(self, factors: Sequence[str]) -> list[tuple[str, ...]]:
        """Split factors into groups to replace together; each that the story makes of others is by itself."""
        latents = tuple(name for name in factors if name not in self.deterministic)
        groups = [latents] if latents else []
        return groups + [(name,) for name in factors if name in self.deterministic]

    def counts(self, factor: str, modality: str) -> Tensor:
        """Return the rows that have a modality and, of a private factor, the modality that informs it, ``(N,)``."""
        own = private_modality(factor, frozenset(self.modalities))
        rows = self.rows.present[modality]
        return rows if own is None else rows & self.rows.present[own]

    def valid(self, modality: str) -> Tensor | None:
        """Return the steps of a sequence before its end, boolean ``(N, T)``; None without lengths."""
        if modality not in self.rows.lengths:
            return None
        steps = self.rows[modality].shape[1]
        return torch.arange(steps, device=self.rows.device) < self.rows.lengths[modality][:, None]


@contextmanager
def decoding(
    model: Program, guide: Program, batch: Batch, *, seed: int | None, audit: bool, rows_per_pass: int = ROWS_PER_PASS
) -> Iterator[tuple[Batch, Iterator[Decoded]]]:
    """Draw the latents of a pair once per row, and give the rows, on the device of the networks, block by block.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        seed: of the draws; None goes on with torch's generator.
        audit: False skips the audit of the pair.
        rows_per_pass: the number of rows of a block.
    """
    with (
        evaluating(model, guide, batch, audit=audit, draws=True) as rows,
        temporary_seed(seed, rows.device),
        _networks_with_derivatives(rows.device),
    ):
        shared = pair_structure(model, guide, rows).global_latents
        yield rows, _blocks(model, guide, rows, shared, rows_per_pass)


def _blocks(
    model: Program, guide: Program, rows: Batch, shared: frozenset[str], rows_per_pass: int
) -> Iterator[Decoded]:
    for places in torch.arange(rows.size, device=rows.device).split(rows_per_pass):
        block = rows.block(places)
        with torch.no_grad():
            latents = draw_samples(model, guide, block, SampleSettings()).model_latents
            decoded = Decoded(model, block, {name: value[0] for name, value in latents.items()})
        yield decoded


def _networks_with_derivatives(device: torch.device) -> Any:
    """Return a context in which recurrent networks have derivatives in evaluation mode: cuDNN's have none."""
    return torch.backends.cudnn.flags(enabled=False) if device.type == "cuda" else nullcontext()


def choose_factors(sites: Sequence[str] | str | None, decoded: Decoded, *, real: bool = False) -> tuple[str, ...]:
    """Return the names of factors: those given, or all latents.

    Args:
        sites: names, or None.
        decoded: the factors of some rows.
        real: True for those alone that are real numbers.

    Raises:
        ValueError: an unknown factor, one of whole numbers where real ones are asked for, or none at all.
    """
    if sites is not None:
        names = check_names("sites", sites, decoded.values, least=1, what="factor")
        if real and (whole := [name for name in names if not decoded.values[name].is_floating_point()]):
            raise ValueError(f"sites: {whole[0]!r} is discrete, and nothing has a derivative in it: leave it out")
        return names
    hidden = decoded.deterministic
    names = tuple(n for n, x in decoded.values.items() if n not in hidden and (x.is_floating_point() or not real))
    if not names:
        raise ValueError("the story has no latent in the plate of the rows whose role could be measured")
    return names


def _has_factors(model: Any) -> TypeGuard[StoryOfFactors]:
    """Return True for a story with the methods ``factors`` and ``decode``; networks of these names are no methods."""
    return ismethod(getattr(model, "factors", None)) and ismethod(getattr(model, "decode", None))


def as_vectors(x: Tensor) -> Tensor:
    """Return values as vectors ``(N, D)`` in float64; whole numbers become indicators of each."""
    if not x.is_floating_point():
        x = nn.functional.one_hot(x.long() - x.long().min())
    return x.reshape(len(x), -1).double()


def _to_site_layout(msg: Mapping[str, Any], value: Tensor) -> Tensor:
    """Bring a value ``(N, *plates, *event)`` to the layout of its site, plates first."""
    if not in_data_plate(msg):
        return value
    event_dim = msg["fn"].event_dim
    plates = value.dim() - 1 - event_dim
    return value.movedim(0, plates).reshape(msg["fn"].shape())


def _without_masks(fn: Any) -> Any:
    """Return a distribution without the masks around it, or around the steps in it."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Independent) and isinstance(fn.base_dist, dist.MaskedDistribution):
        return dist.Independent(_without_masks(fn.base_dist), fn.reinterpreted_batch_ndims, validate_args=False)
    return fn
