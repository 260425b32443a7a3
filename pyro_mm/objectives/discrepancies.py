r"""Terms that compare samples of a batch's latents: MMD, sliced Wasserstein distance, HSIC.

With the aggregated posterior of a set of modalities A, :math:`q_A(z) = E_n \, q(z | x_{n,A})` over rows n,

.. math:: -w \, D(q_A, p), \qquad -w \, D(q_A, q_C), \qquad -w \, HSIC(a, b)

where D is estimated from one draw of each row's posterior and as many of the reference. An objective's value is a sum
over rows, and D is a number of the batch: it stands for each row in which the term counts, as a KL does. So the loss
per row is that of the other terms plus :math:`w D`, and a weight means the same whatever the number of rows in a
minibatch or in the whole data set. Of several processes that share a minibatch out, each computes D of the rows of all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..distributions.sample_statistics import (
    Bandwidth,
    Kernel,
    check_bandwidth,
    check_kernel,
    hsic,
    sliced_wasserstein,
    squared_mmd,
)
from ..estimators import PerRow
from ..scoring.draws import Draws
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure, private_modality
from ..utils.arguments import check_flag, check_integer, check_name, check_number
from ..utils.shared_rows import gather_rows, rows_are_shared
from .concrete_terms import ConcreteTerm, TermKind
from .objective import Objective
from .terms import ALL, PRIOR, Names, Term


class Discrepancy(TermKind):
    """Minus a statistic of the latents of a batch; the mean of those of K particles, each with a draw per row.

    Draws are the guide's own, not weighted by importance. Rows in which the term does not count drop out, and have no
    share in the loss: padding, and those that lack all modalities of the sets compared; for the private latent of a
    modality, those that lack it.

    Args:
        sites: names of the latents.
    """

    needs_draws = True

    def __init__(self, *sites: str):
        self.sites = tuple(check_name("site", site, what="latent site") for site in sites)

    @property
    def name(self) -> str:
        """Name of the statistic."""
        return type(self).__name__.removesuffix("Kind")

    def rows(self, draws: Draws, term: ConcreteTerm) -> Tensor:
        """Return the rows of this process that count for terms like one of them, boolean ``(T, N)``."""
        rows = draws.counts
        for site in dict.fromkeys(self.sites):
            rows = rows & draws.informed(site)
        return rows

    @abstractmethod
    def statistic(self, draws: Draws, place: int, term: ConcreteTerm, rows: Tensor) -> Tensor:
        """Return the statistic of each particle, ``(K,)``.

        Args:
            draws: those of the terms of this kind in the pass.
            place: index of the term among them.
            term: the term.
            rows: boolean ``(N,)``, the rows that count; of several processes that share a minibatch out those of all,
                in the order of :func:`~pyro_mm.utils.shared_rows.gather_rows`.
        """

    def values(self, terms: Sequence[ConcreteTerm], scores: Scores, estimator: PerRow) -> Sequence[Tensor]:
        draws: Any = scores.draws
        if rows_are_shared() and not self.gathers:
            raise ValueError(
                f"{terms[0].label} compares the rows of a minibatch with each other, and does not gather those of "
                "several processes: train in one process"
            )
        values = []
        for place, term in enumerate(terms):
            rows = self.rows(draws, term)[place]
            every = gather_rows(rows, term.label)
            if len(every) < self.least_rows:
                raise ValueError(
                    f"{term.label} compares the rows of a batch with each other and needs {self.least_rows} of them, "
                    f"got {len(every)}: pass drop_last=True to fit, or another batch_size"
                )
            value = -self.statistic(draws, place, term, every).mean()
            values.append(torch.where(rows, value, torch.zeros_like(value)))
        return values

    def check(self, term: ConcreteTerm, batch: Batch, structure: PairStructure) -> None:
        for site in self.sites:
            if site not in structure.latents:
                known = ", ".join(map(repr, structure.latents)) or "none"
                raise ValueError(f"{term.label}: the guide has no latent site {site!r}, it has {known}")
            if (way := structure.latents[site]) != "pathwise":
                why = "is enumerated" if way == "enumerated" else "is discrete, or has no rsample,"
                raise ValueError(
                    f"{term.label}: latent site {site!r} {why} and its draws have no derivative by which the statistic "
                    "could train the guide: compare a latent that has rsample"
                )
            if site in structure.global_latents:
                raise ValueError(
                    f"{term.label}: latent site {site!r} lies outside the plate 'data', so that all rows share a draw "
                    "and have no distribution to compare: compare a latent of the rows"
                )
            own = private_modality(site, structure.modalities)
            if own is not None and term.encode.get(own) is False and batch.presence(own) is not False:
                raise ValueError(
                    f"{term.label}: latent site {site!r} is private to {own!r}, which the term does not encode, so "
                    "that no row of it counts: encode that modality"
                )


def _rows_of(draws: Tensor, place: int, term: ConcreteTerm) -> Tensor:
    """Return the draws of a term as vectors, ``(K, N, D)``: elements of a plate within a row are parts of one vector.

    Of several processes that share a minibatch out, N are the rows of all.

    Args:
        draws: ``(K, T, N, *plates, *event)``.
        place: index of the term.
        term: the term.
    """
    own = draws[:, place]
    return gather_rows(own.reshape(*own.shape[:2], -1), term.label, dim=1)


class TwoSample(Discrepancy):
    """Minus a distance between the distributions of two latents.

    Args:
        site: the latent on the left.
        reference_site: the latent on the right; the same by default.
    """

    gathers = True

    def __init__(self, site: str, reference_site: str | None = None):
        super().__init__(site) if reference_site is None else super().__init__(site, reference_site)
        self.site = site
        self.reference_site = site if reference_site is None else reference_site

    def describe(self, encode: str, decode: str, given: str) -> str:
        if given == repr(PRIOR):
            return f"{self.name}({self.site} | {encode}; p({self.reference_site}))"
        return f"{self.name}({self.site} | {encode}; {self.reference_site} | {given})"

    def check(self, term: ConcreteTerm, batch: Batch, structure: PairStructure) -> None:
        super().check(term, batch, structure)
        own = private_modality(self.reference_site, structure.modalities)
        hidden = own is not None and term.given.get(own) is False and batch.presence(own) is not False
        if hidden and not term.given_prior:
            raise ValueError(
                f"{term.label}: latent site {self.reference_site!r} is private to {own!r}, which the reference does "
                "not encode, so that no row of it counts: encode that modality"
            )

    def rows(self, draws: Draws, term: ConcreteTerm) -> Tensor:
        rows = draws.counts & draws.informed(self.site)
        return rows if term.given_prior else rows & draws.informed(self.reference_site, given=True)

    def statistic(self, draws: Draws, place: int, term: ConcreteTerm, rows: Tensor) -> Tensor:
        source = draws.prior if term.given_prior else draws.given
        reference = source(self.reference_site)
        x = _rows_of(draws.latent(self.site), place, term)
        y = _rows_of(reference, place, term)
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"{term.label}: expected latents of one dimension, got {x.shape[-1]} of {self.site!r} and "
                f"{y.shape[-1]} of {self.reference_site!r}"
            )
        return self.distance(x, y, rows.expand(x.shape[:-1]), paired=not term.given_prior)

    @abstractmethod
    def distance(self, x: Tensor, y: Tensor, rows: Tensor, paired: bool) -> Tensor:
        """Return the distance of two samples.

        Args:
            x, y: ``(K, N, D)``.
            rows: boolean ``(K, N)``, the rows that count.
            paired: True if row n of y may depend on row n of x.

        Returns:
            ``(K,)``.
        """


class _Kernels:
    """Kernel and bandwidth of a statistic, checked, and in words."""

    def __init__(self, kernel: Any, bandwidth: Any, unbiased: Any):
        self.kernel: Kernel = check_kernel(kernel)
        self.bandwidth: Bandwidth = check_bandwidth(bandwidth)
        self.unbiased = check_flag("unbiased", unbiased)
        if not isinstance(self.kernel, str) and bandwidth is not None:
            raise ValueError("expected bandwidth=None beside a kernel that is a function, which has one of its own")

    def __str__(self) -> str:
        statistic = "U-statistic" if self.unbiased else "V-statistic"
        if not isinstance(self.kernel, str):
            return f"{getattr(self.kernel, '__name__', type(self.kernel).__name__)} kernel, {statistic}"
        if self.bandwidth is None:
            return f"{self.kernel} kernel, median bandwidth, {statistic}"
        each = self.bandwidth if isinstance(self.bandwidth, tuple) else (self.bandwidth,)
        return f"{self.kernel} kernel, bandwidth {', '.join(f'{h:g}' for h in each)}, {statistic}"


class MMDKind(TwoSample):
    """Minus a squared maximum mean discrepancy; the arguments are those of :func:`MMD`."""

    def __init__(self, site: str, reference_site: str | None, kernels: _Kernels):
        super().__init__(site, reference_site)
        self.kernels = kernels
        self.least_rows = 2 if kernels.unbiased else 1

    @property
    def settings(self) -> str:
        return str(self.kernels)

    def distance(self, x: Tensor, y: Tensor, rows: Tensor, paired: bool) -> Tensor:
        own = self.kernels
        return squared_mmd(
            x, y, kernel=own.kernel, bandwidth=own.bandwidth, unbiased=own.unbiased, paired=paired, mask=rows
        )


class SlicedWassersteinKind(TwoSample):
    """Minus a sliced Wasserstein distance; the arguments are those of :func:`SlicedWasserstein`."""

    least_rows = 2

    def __init__(self, site: str, reference_site: str | None, projections: int, p: float):
        super().__init__(site, reference_site)
        self.projections = check_integer("projections", projections, least=1)
        self.p = check_number("p", p, least=1)

    @property
    def settings(self) -> str:
        return f"{self.projections} projections, p {self.p:g}"

    def distance(self, x: Tensor, y: Tensor, rows: Tensor, paired: bool) -> Tensor:
        return sliced_wasserstein(x, y, projections=self.projections, p=self.p, mask=rows)


class HSICKind(Discrepancy):
    """Minus the Hilbert-Schmidt independence criterion of two latents; the arguments are those of :func:`HSIC`."""

    gathers = True

    def __init__(self, a: str, b: str, kernels: _Kernels):
        super().__init__(a, b)
        if a == b:
            raise ValueError(f"expected two latents whose dependence is measured, got {a!r} twice")
        self.kernels = kernels
        self.least_rows = 4 if kernels.unbiased else 2

    @property
    def settings(self) -> str:
        return str(self.kernels)

    def describe(self, encode: str, decode: str, given: str) -> str:
        return f"{self.name}({', '.join(self.sites)} | {encode})"

    def statistic(self, draws: Draws, place: int, term: ConcreteTerm, rows: Tensor) -> Tensor:
        x, y = (_rows_of(draws.latent(site), place, term) for site in self.sites)
        own = self.kernels
        mask = rows.expand(x.shape[:-1])
        return hsic(x, y, kernel=own.kernel, bandwidth=own.bandwidth, unbiased=own.unbiased, mask=mask)


class DiscrepancyTerm(Term):
    """A term of a table that is minus a statistic of latents.

    Args:
        kind: the statistic.
        encode: the modalities whose aggregated posterior is compared.
        given: the modalities of the reference, or PRIOR.
        average: as in :class:`~pyro_mm.objectives.Term`.
    """

    def __init__(self, kind: Discrepancy, encode: Names, given: Names = PRIOR, *, average: bool = False):
        super().__init__(encode, (), given, average=average)
        object.__setattr__(self, "kind", kind)


def MMD(
    site: str,
    encode: Names = ALL,
    kernel: Kernel = "gaussian",
    bandwidth: Any = None,
    unbiased: bool = True,
    *,
    reference: Names = PRIOR,
    reference_site: str | None = None,
) -> Objective:
    r"""Build minus the squared maximum mean discrepancy of an aggregated posterior from the prior.

    .. math:: -MMD^2(q_A(z), p(z)), \qquad MMD^2(P, Q) = E k(x, x') + E k(y, y') - 2 E k(x, y)

    with :math:`q_A(z)` the mean of :math:`q(z | x_A)` over the rows. It is an objective of one term, to be added to
    others: ``elbo(kl=0) + 10 * MMD("z")`` is a Wasserstein autoencoder, ``elbo() + 10 * MMD("z")`` an InfoVAE. A
    surrogate, no bound.

    The loss per row is :math:`MMD^2` of the minibatch, whatever the number of rows of the minibatch or of the data;
    rows in which the term does not count have none. Each particle of the estimator gives a sample with one draw per
    row, and the value is the mean of their statistics. Draws of the prior are as many, made at every step by torch's
    generator. It has no estimator of its own, and takes the draws of what it is added to; beside an estimator whose
    draws are not the guide's, or have no gradient (``stratified``, ``resample``), it has draws of its own.

    Args:
        site: a latent site of the guide, of any event shape, whose draws have a derivative.
        encode: A, names of modalities or a symbol; ``EACH`` stands for a sum over them.
        kernel: ``"gaussian"``, :math:`\exp(-r^2 / (2 h^2))`; ``"imq"``, :math:`h^2 / (h^2 + r^2)`; or a function of two
            samples ``(.., N, D)`` and ``(.., N', D)`` to ``(.., N, N')``.
        bandwidth: h in the units of the latent, or several, of whose kernels the mean is taken; None for the median of
            the distances within both samples, anew in every minibatch and without gradient.
        unbiased: True for the U-statistic, which needs two rows, has the mean :math:`MMD^2`, and may be negative; False
            for the V-statistic of Tsai et al., never negative, whose mean exceeds :math:`MMD^2` by a term of order
            1 / N.
        reference: PRIOR, or the modalities C of another aggregated posterior: :math:`-MMD^2(q_A, q_C)`.
        reference_site: the latent of the reference, of the same dimension; None for the same latent.

    Returns:
        An objective of one term, whose label is such as ``"MMD(z | *; p(z))"``.

    Raises:
        TypeError, ValueError: an argument of another kind; in use, a latent that the guide lacks, or that is discrete
            or enumerated; a minibatch of fewer rows than the statistic needs.

    Example:
        >>> import pyro_mm as mm
        >>> print(mm.objectives.elbo(kl=0) + 10 * mm.objectives.MMD("z", kernel="imq", bandwidth=2.0))
        Objective, AnalyticKL(num_particles=1); surrogate: not a bound
          (encode, decode, given)
          (*, *, P) kl 0
          MMD(z | *; p(z)) imq kernel, bandwidth 2, U-statistic weight 10

    References:
        Tolstikhin et al. 2018 (Wasserstein Auto-Encoders, arXiv:1711.01558); Zhao et al. 2019 (InfoVAE,
        arXiv:1706.02262); Tsai et al. 2019 (arXiv:1806.06176), whose kernel :math:`\exp(-r^2 / d^2)` has
        :math:`h = d / \sqrt 2`.
    """
    kind = MMDKind(site, reference_site, _Kernels(kernel, bandwidth, unbiased))
    return Objective([DiscrepancyTerm(kind, encode, reference)])


def SlicedWasserstein(
    site: str,
    encode: Names = ALL,
    projections: int = 50,
    p: float = 2.0,
    *,
    reference: Names = PRIOR,
    reference_site: str | None = None,
) -> Objective:
    r"""Build minus the sliced Wasserstein distance of an aggregated posterior from the prior, to the power p.

    .. math:: -SW_p^p(q_A(z), p(z)), \qquad SW_p^p(P, Q) = E_\theta W_p^p(\theta^T x, \theta^T y)

    with :math:`\theta` uniform on the unit sphere: L directions, drawn anew at every step by torch's generator. It adds
    to others, enters the loss and takes its draws as :func:`MMD` does. A surrogate, no bound. For two samples of one
    distribution it is positive, and tends to 0 with the number of rows.

    Args:
        site: a latent site of the guide, of any event shape, whose draws have a derivative.
        encode: A, names of modalities or a symbol; ``EACH`` stands for a sum over them.
        projections: L.
        p: the power, 1 or more.
        reference: PRIOR, or the modalities of another aggregated posterior.
        reference_site: the latent of the reference, of the same dimension; None for the same latent.

    Returns:
        An objective of one term, whose label is such as ``"SlicedWasserstein(z | *; p(z))"``.

    Raises:
        TypeError, ValueError: as :func:`MMD`.

    Example:
        >>> import pyro_mm as mm
        >>> mm.objectives.SlicedWasserstein("z", "image", reference="text").terms
        (SlicedWasserstein(z | image; z | text) 50 projections, p 2,)

    References:
        Kolouri et al. 2019 (Sliced Wasserstein Auto-Encoders, arXiv:1804.01947).
    """
    kind = SlicedWassersteinKind(site, reference_site, projections, p)
    return Objective([DiscrepancyTerm(kind, encode, reference)])


def HSIC(
    a: str,
    b: str,
    encode: Names = ALL,
    kernel: Kernel = "gaussian",
    bandwidth: Any = None,
    unbiased: bool = True,
) -> Objective:
    r"""Build minus the Hilbert-Schmidt independence criterion of two latents under the aggregated posterior.

    .. math:: -HSIC(a, b) = -MMD^2(q_A(a, b), \; q_A(a) \, q_A(b))

    with the mean :math:`q_A` over rows, under the product of the kernels of a and b. It is 0 for independent latents,
    and pushes a and b to be independent over rows. It adds to others, enters the loss and takes its draws as
    :func:`MMD` does. A surrogate, no bound.

    Args:
        a, b: latent sites of the guide, of any event shapes, whose draws have a derivative.
        encode: A, names of modalities or a symbol; ``EACH`` stands for a sum over them.
        kernel, bandwidth: as in :func:`MMD`, of both latents; None for the median of the distances of each.
        unbiased: True for the estimate whose mean is HSIC, which needs four rows and may be negative; False for
            :math:`\mathrm{tr}(K H L H) / N^2`.

    Returns:
        An objective of one term, whose label is such as ``"HSIC(a, b | *)"``.

    Raises:
        TypeError, ValueError: as :func:`MMD`.

    Example:
        >>> import pyro_mm as mm
        >>> mm.objectives.HSIC("z", "w_image", bandwidth=(1.0, 2.0)).terms
        (HSIC(z, w_image | *) gaussian kernel, bandwidth 1, 2, U-statistic,)

    References:
        Gretton et al. 2005 (ALT); Song et al. 2012 (JMLR 13); Lopez et al. 2018 (arXiv:1805.08672), as a penalty.
    """
    return Objective([DiscrepancyTerm(HSICKind(a, b, _Kernels(kernel, bandwidth, unbiased)), encode)])
