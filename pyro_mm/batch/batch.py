"""Rows of multimodal data, and the modalities that each row has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..distributions.token_sequence import TokenSequence, ends_before
from ..utils.arguments import check_integer, describe
from ..utils.network_calls import apply_network, encode_rows
from ..utils.network_keywords import call_network, keywords_of
from .context import PLAIN, Cache, Context, TermStack, cached
from .keywords import head_arguments, keyword_arguments
from .masks import Presence
from .observe import Modality, observe
from .parsing import parse
from .rows import Rows
from .steps import count_valid_steps


class Batch(Rows):
    r"""N rows of up to M modalities, any of them missing in any row.

    Args:
        values: modality -> ``(N, *event)``, a tensor, array, series, frame or sequence. A row that is ``None`` or
            ``NA``, holds a NaN, or has an entry hidden by a mask of ``numpy.ma`` is missing. A modality that is
            ``None`` is missing in every row. Numbers in a missing row are lost; a warning gives their share. Of a
            ``numpy.memmap``, a dataset of h5py or an array of zarr, rows are read as they are taken, and it is neither
            read whole nor searched for missing rows: give these by ``present``.
        present: modality -> boolean ``(N,)``. A modality that is not named is present in every row.
        covariates: name -> ``(N, ...)``, known for every row and never modelled or masked (a batch effect, say). A
            network with a parameter ``covariates`` gets them as a dictionary.
        lengths: modality -> ``(N,)``, the number of valid steps of each sequence ``(N, T, ..)``, from 0 to T. What lies
            behind is padding, which is not read, be it NaN. A sequence of length 0 is present, and empty; where it is
            missing, its length is that of a sequence to be generated, and 0 stands for T. A network with a parameter
            ``lengths`` gets those of its modality, and likelihoods count the valid steps alone.

    Missing values are replaced by a copy of a present row, and padding by copies of the last valid step, so that they
    lie in the support of any likelihood; no public result depends on them. A missing modality is masked in training, in
    likelihoods and in sampling. Types are kept: float64 values need networks of float64, or ``nn.MLP``, which casts;
    integers, booleans and half precision are converted where a network or a density needs it. A latent site
    ``"w_<modality>"`` is private to that modality, and counts only where the modality is decoded.

    Raises:
        ValueError, TypeError: unequal numbers of rows, an unknown name, a NaN in a covariate, or a dtype, container or
            mask shape that cannot be used.

    Example:
        >>> batch = Batch({"image": torch.rand(3, 8, 8), "label": [4, None, 2]})
        >>> batch
        Batch(size=3, image(8, 8) present: all, label() present: 67%)
        >>> batch.only("label").rows
        tensor([ True, False,  True])
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        present: Mapping[str, Any] | None = None,
        covariates: Mapping[str, Any] | None = None,
        lengths: Mapping[str, Any] | None = None,
    ):
        columns = parse(values, present, covariates, lengths)
        for text in columns.warnings:
            warnings.warn(text, stacklevel=2)

        self.size: int = columns.size
        self.covariates: dict[str, Tensor] = columns.covariates
        self._values: dict[str, Tensor] = columns.values
        self._masks: dict[str, Presence] = columns.masks
        self._lengths: dict[str, Tensor] = columns.lengths

        self.total: int | None = None  # rows of the whole data set, where this batch is a subsample of one
        self._index: Tensor | None = None  # their places in it, (N,)
        self._rows: Presence | None = None  # the rows that count; None for those with any modality

        self._has_end_marks = False  # True if sequences say themselves where they end
        self._end_tokens: dict[
            str, int
        ] = {}  # of strings, as a story observed them; all batches made of this one share it
        self._context: Context = PLAIN

    # -- in a story and a guide ---------------------------------------------------------------------------------

    @contextmanager
    def plate(self) -> Iterator[Tensor]:
        """Enter the plate ``"data"`` at dim -1. Rows in which everything is missing are masked, latents included.

        ``pyro.plate("data", batch.size, dim=-1)`` serves as well, but under Pyro's own ELBOs it does not mask such rows
        and does not scale a subsample.
        """
        rows = self.rows
        plate = pyro.plate("data", self.total or self.size, subsample=self._index, dim=-1, device=self.device)
        with plate as index, poutine.mask(mask=rows):
            yield index

    def observe(self, name: str, fn: Any, *parents: Tensor) -> Tensor:
        """Sample the site ``name``, observed in the rows where the modality is present.

        Where it is missing, the value is a draw from its distribution. The draw scores nothing, and is made only if a
        descendant uses it, so that a modality may be the parent of another. Without ``rsample`` a draw passes no
        gradient to its parents; sum such a label out as a latent instead.

        Args:
            name: the modality, and the name of the site.
            fn: a distribution, or a callable that returns one: ``fn(*parents)``. A callable runs only for those terms
                of an objective that decode this modality. If its signature has a parameter ``lengths`` or
                ``covariates`` that no parent fills, it gets the modality's lengths ``(N,)``, or the dictionary of
                covariates ``(N, ...)``, by keyword. Their dimension N aligns with the last batch dimension of the
                parents; particles and terms may stand to the left of it. Of a sequence whose lengths the batch has,
                the steps before the end count.
            parents: tensors whose leading dimensions are those of the plates; one without them (a covariate
                ``(N, ...)``) is handed over as it is.

        Returns:
            ``(.., N, *event)``: the values, with draws in place of missing ones.

        Raises:
            TypeError: ``name`` is no string, or ``fn`` gives no distribution.
            ValueError: ``fn`` needs lengths or covariates that the batch does not have; or it gives a distribution of
                whole sequences, and is not given the lengths that the batch has.
        """
        if not isinstance(name, str):
            raise TypeError(f"observe: expected the name of a modality first, got {describe(name)}")
        mask = self.presence(name)
        modality = Modality(name, None if mask is False else self._values[name], mask, self.size)
        return observe(modality, self._decoder(name, fn), parents, self._context)

    def _decoder(self, name: str, fn: Any) -> Callable[..., Any]:
        """Return the function from the parents to the distribution, which counts the valid steps of a sequence."""
        fixed = not callable(fn) or isinstance(fn, torch.distributions.Distribution)
        asked = () if fixed else keywords_of(fn)
        lengths = None if self._has_end_marks else self._lengths.get(name)
        if not asked and lengths is None and not fixed:
            unchanged: Callable[..., Any] = fn
            return unchanged

        def decode(*parents: Tensor) -> Any:
            d = fn if fixed else call_network(fn, parents, self.keywords(name, fn, len(parents)))
            if lengths is None:
                return d
            if isinstance(d, TokenSequence) and d.end is not None:
                self._end_tokens[name] = d.end
            return count_valid_steps(name, d, lengths, any(keyword.name == "lengths" for keyword in asked))

        return decode

    def encode(self, name: str, module: Callable[..., Any]) -> Any:
        """Return ``module(batch[name])``, computed once per step however many terms of an objective ask for it.

        If the signature has a parameter ``lengths`` or ``covariates``, the module gets the modality's lengths ``(N,)``,
        or the dictionary of covariates, by keyword. In a row where the modality is missing, its values are those of
        another row, and its length is the one given for it.

        Args:
            name: the modality.
            module: a module or function of the values ``(N, *event)``. Of an ``nn.Sequential`` the first module
                that has such a parameter gets the keywords.

        Raises:
            ValueError: no values of the modality, or the module needs lengths or covariates that the batch does not
                have.
            TypeError: values of a type that the module does not take.
        """
        if name not in self._values:
            raise ValueError(f"encode: no values of modality {name!r}: this batch holds {list(self._values)}")
        if name in self._context.latents:  # a draw, whose features are not those of the next one
            return call_network(module, (self._values[name],), self.keywords(name, module))

        def compute() -> Any:
            return encode_rows(name, module, self._values[name], self.keywords(name, module))

        cache = self._context.cache
        return compute() if cache is None else cached(cache, (name, id(module)), compute, module)

    def features(self, name: str, network: Callable[..., Any], value: Tensor) -> Any:
        """Return a network's result for a modality as a story observes it, ``(.., N, *event)``.

        It is :meth:`encode` of values that may be draws, such as those that :meth:`observe` returns. Strings that were
        drawn have the lengths at which they end.
        """
        keywords = self.keywords(name, network)
        if "lengths" in keywords and self.presence(name) is not True:
            value.dim()  # a draw is made at its first use, and by a distribution that tells the end token
            if name in self._end_tokens:
                keywords["lengths"] = (ends_before(value, self._end_tokens[name]) == 0).sum(-1)
        return apply_network(f"modality {name!r}", network, value, keywords)

    def keywords(self, name: str, network: Any, inputs: int = 1) -> dict[str, Any]:
        """Return the lengths and covariates that a network of a modality asks for by keyword.

        Args:
            name: the modality.
            network: a module or function.
            inputs: the number of its positional inputs.

        Raises:
            ValueError: it needs lengths or covariates that the batch does not have.
        """
        asked = keywords_of(network)
        if not asked:
            return {}
        return keyword_arguments(asked, name, inputs, lambda: self.lengths, self.covariates)

    def head_keywords(self, network: Any, role: str = "the head of a posterior") -> dict[str, Any]:
        """Return the covariates that a network of no one modality asks for by keyword.

        Args:
            network: a module or function of one input.
            role: of the network, for an error.

        Raises:
            ValueError: it needs covariates that the batch does not have.
        """
        asked = keywords_of(network)
        return head_arguments(asked, role, self.covariates) if asked else {}

    # -- for objectives and guides --------------------------------------------------------------------------------

    def view(
        self,
        masks: Mapping[str, Presence],
        stack: TermStack,
        cache: Cache | None,
        rows: Presence | None = None,
        term_masks: Sequence[Mapping[str, Presence]] | None = None,
    ) -> Batch:
        """Return the same rows under other masks, as the terms of an objective show them.

        Args:
            masks: modality -> mask, which may have leading plates.
            stack: the terms.
            cache: the cache of the step; None to cache nothing.
            rows: the rows that count, whatever the masks say; None for those of this batch.
            term_masks: the masks of each term alone: one may be True or False where the stacked mask is a tensor.
        """
        context = self._context._replace(stack=stack, cache=cache, term_masks=term_masks)
        return self._copy(_masks=dict(masks), _rows=self.rows if rows is None else rows, _context=context)

    def with_context(self, **changes: Any) -> Batch:
        """Return the same rows with parts of their :class:`~pyro_mm.batch.context.Context` replaced."""
        return self._copy(_context=self._context._replace(**changes))

    def with_latent(self, site: str, value: Tensor) -> Batch:
        """Return the same rows with the draw of a latent as one more modality, which every row has.

        Raises:
            ValueError: a modality has the name of the site.
        """
        if site in self:
            raise ValueError(f"site {site!r} bears the name of a modality: a latent needs one of its own")
        context = self._context
        term_masks = None if context.term_masks is None else [{**masks, site: True} for masks in context.term_masks]
        return self._copy(
            _rows=self.rows,
            _values=self._values | {site: value},
            _masks=self._masks | {site: True},
            _context=context._replace(latents=context.latents | {site}, term_masks=term_masks),
        )

    def is_draw(self, name: str) -> bool:
        """Return True if a modality is the draw of a latent, by :meth:`with_latent`."""
        return name in self._context.latents

    @property
    def has_end_marks(self) -> bool:
        """True if sequences show their own end, and all their steps count."""
        return self._has_end_marks

    def with_end_marks(self) -> Batch:
        """Return the same rows, marked as sequences that show their own end: all steps count, unless a network asks."""
        return self._copy(_has_end_marks=True)

    @staticmethod
    def empty(n: int, like: Batch) -> Batch:
        """Return n rows in which every modality of ``like`` is missing, for which ``generate`` draws from the prior."""
        n = check_integer("n", n, least=1)
        like = check_batch(like, "like")
        new = like[torch.zeros(n, dtype=torch.long, device=like.device)]
        lengths = {name: new._longest(name) for name in like._lengths}
        return new._copy(_masks=dict.fromkeys(like._masks, False), _lengths=lengths, total=None, _index=None)

    def _longest(self, name: str) -> Tensor:
        """Return the lengths of sequences with all steps; those that there are if the batch holds no values."""
        lengths = self._lengths[name]
        return torch.full_like(lengths, self._values[name].shape[1]) if name in self._values else lengths


def check_batch(value: Any, argument: str = "batch") -> Batch:
    """Return a batch.

    Raises:
        TypeError: anything else.
        ValueError: it has no rows.
    """
    if not isinstance(value, Batch):
        hint = ""
        if isinstance(value, Mapping):
            hint = ": make one of it, Batch(values)"
        elif isinstance(value, Tensor | np.ndarray | list):
            hint = ": make one of it, Batch({'image': values}), with a name of yours"
        elif hasattr(value, "__iter__") and hasattr(value, "dataset"):
            hint = ": a Batch holds all rows, and fit takes minibatches of it by itself"
        elif hasattr(value, "batches"):
            hint = ": take its first rows, stream.head(1000), or call this for each batch of stream.batches(1000)"
        raise TypeError(f"expected {argument} to be a pyro_mm.Batch, got {describe(value)}{hint}")
    if value.size == 0:
        raise ValueError(f"expected {argument} to have one row at least, got none")
    return value
