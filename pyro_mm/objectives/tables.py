r"""The multimodal objectives of the literature, each a table of terms ``(encode, decode, given)``.

``*`` is all present modalities, ``m`` each of them in turn, ``others`` all but that one, ``P`` the prior, ``-`` the
empty set. ``estimator=`` takes any ``pyro.infer.ELBO``; by default the KL is analytic where the posterior has one.
``print(objective)`` shows the table and what it bounds. Weights are finite and not negative, at every step; a table of
one's own, of Terms, may have negative ones. Other arguments raise a ``ValueError`` or a ``TypeError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.infer import ELBO

from ..estimators import IWAE
from ..utils.arguments import check_flag, check_integer, check_number
from .objective import Objective
from .terms import ALL, EACH, EVERY, OTHERS, PRIOR, Number, Random, Term, check_nonnegative, check_weights


def warm_up(steps: int, stop: float = 1.0, start: float = 0.0) -> Callable[[int], float]:
    """Return a weight that goes linearly from ``start`` to ``stop``, and stays there.

    Args:
        steps: how many gradient steps it takes.
        stop: the weight after them.
        start: the weight at step 0.

    Returns:
        A function from the step to the weight.

    Example:
        >>> import pyro_mm as mm
        >>> [mm.objectives.warm_up(4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    check_number("steps", steps, least=0)
    check_number("stop", stop)
    check_number("start", start)

    def warm_up(step: int) -> float:
        return start + (stop - start) * min(1.0, step / max(steps, 1))

    return warm_up


def cyclical(
    period: int, stop: float = 1.0, start: float = 0.0, *, ramp: float = 0.5, cycles: int | None = None
) -> Callable[[int], float]:
    """Return a weight that goes linearly from ``start`` to ``stop`` again and again.

    In every cycle it takes a share ``ramp`` of the steps to get there, and stays for the rest.

    Args:
        period: gradient steps of a cycle.
        stop: the weight at the end of every cycle.
        start: the weight at its beginning.
        ramp: share of the steps in which the weight moves, in (0, 1].
        cycles: their number, after which the weight is ``stop``; None goes on for ever.

    Returns:
        A function from the step to the weight.

    Example:
        >>> import pyro_mm as mm
        >>> [mm.objectives.cyclical(4)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
        >>> objective = mm.objectives.elbo(kl=mm.objectives.cyclical(1000, cycles=4))

    References:
        Fu et al. (2019), Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing.
    """
    check_integer("period", period, least=1)
    check_number("stop", stop)
    check_number("start", start)
    check_number("ramp", ramp, above=0, most=1)
    if cycles is not None:
        check_integer("cycles", cycles, least=1)

    def cyclical(step: int) -> float:
        if cycles is not None and step >= cycles * period:
            return float(stop)
        return start + (stop - start) * min(1.0, (step % period) / (ramp * period))

    return cyclical


def _nonnegatives(argument: str, weights: Any) -> Number | Mapping[str, Number]:
    """Return a weight, or one for each modality, after checking that none is negative."""
    weights = check_weights(argument, weights)
    if not isinstance(weights, Mapping):
        return check_nonnegative(argument, weights)
    return {name: check_nonnegative(f"{argument}[{name!r}]", weight) for name, weight in weights.items()}


def _count(argument: str, value: Any, least: int) -> int:
    """Return a count. Raises a TypeError or a ValueError for anything else."""
    if isinstance(value, ELBO):
        raise TypeError(f"expected {argument} to be an integer, got {value!r}: is it the estimator?")
    return check_integer(argument, value, least=least)


def _share(argument: str, value: Any) -> float:
    """Return a number from 0 to 1. Raises a TypeError or a ValueError for anything else."""
    if isinstance(value, ELBO):
        raise TypeError(f"expected {argument} to be a number, got {value!r}: is it the estimator?")
    return check_number(argument, value, least=0, most=1)


def elbo(estimator: ELBO | None = None, *, kl: Number = 1.0, vectorize: bool = True) -> Objective:
    r"""Build the evidence lower bound of what is present in each row: ``(*, *, P)``.

    .. math:: E_{q(z|x)} \log p(x|z) - KL(q(z|x) \| p(z)) \le \log p(x)

    With a joint encoder it is the objective of JMVAE-zero.

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        kl: weight of the KL, or a function of the step such as :func:`warm_up`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    Example:
        >>> import pyro_mm as mm
        >>> print(mm.objectives.elbo(mm.estimators.IWAE(5)))
        Objective, IWAE(num_particles=5); lower bound on log p(x)
          (encode, decode, given)
          (*, *, P)

    References:
        Kingma & Welling 2014 (arXiv:1312.6114); Suzuki et al. 2016 (arXiv:1611.01891).
    """
    return Objective([Term(ALL, ALL, kl=check_nonnegative("kl", kl))], estimator, vectorize=vectorize)


def beta_vae(beta: Number = 4.0, estimator: ELBO | None = None, *, vectorize: bool = True) -> Objective:
    r"""Build the evidence lower bound with its KL times ``beta``.

    .. math:: E_{q(z|x)} \log p(x|z) - \beta \, KL(q(z|x) \| p(z))

    A bound on log p(x) for :math:`\beta \ge 1`, the looser the larger; none for :math:`\beta < 1`.

    Args:
        beta: weight of the KL, or a function of the step.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Higgins et al. 2017 (beta-VAE, ICLR).
    """
    return elbo(estimator, kl=check_nonnegative("beta", beta), vectorize=vectorize)


def jmvae_kl(
    alpha: Number = 0.1, estimator: ELBO | None = None, *, kl: Number = 1.0, vectorize: bool = True
) -> Objective:
    r"""Build JMVAE-kl: the joint bound, minus the distance of every unimodal posterior from the joint one.

    .. math:: E_{q(z|x)} \log p(x|z) - KL(q(z|x) \| p(z)) - \alpha \sum_m KL(q(z|x) \| q(z|x_m))

    A lower bound on log p(x), and one on the variation of information between the modalities.

    Args:
        alpha: weight of the distances, or a function of the step.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        kl: weight of the prior's KL alone, which the authors warm up; or a function of the step.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Suzuki et al. 2016 (arXiv:1611.01891).
    """
    joint = Term(ALL, ALL, kl=check_nonnegative("kl", kl))
    penalty = Term(ALL, (), EACH, kl=check_nonnegative("alpha", alpha))
    return Objective([joint, penalty], estimator, vectorize=vectorize)


def mvae(
    num_subsets: int = 0,
    estimator: ELBO | None = None,
    *,
    likelihood: Number | Mapping[str, Number] = 1.0,
    kl: Number = 1.0,
    vectorize: bool = True,
) -> Objective:
    r"""Build MVAE's sub-sampled objective: the joint bound, every unimodal one, and those of some random subsets.

    .. math:: ELBO(x) + \sum_m ELBO(x_m) + \sum_{i=1}^{k} ELBO(x_{S_i})

    It bounds a sum of log-evidences, not log p(x). S is uniform over the non-empty subsets of what a row has.

    Args:
        num_subsets: k, the random subsets of each row and step.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        likelihood: weight of the log-likelihoods, or modality -> weight; each may be a function of the step.
            Weights that differ, such as the authors' label times 50, make it a surrogate.
        kl: weight of the KL, or a function of the step such as :func:`warm_up`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Wu & Goodman 2018 (arXiv:1802.05335).
    """
    num_subsets = _count("num_subsets", num_subsets, least=0)
    weights = {"likelihood": _nonnegatives("likelihood", likelihood), "kl": check_nonnegative("kl", kl)}
    subsets = [Random(index=i, empty=False) for i in range(num_subsets)]
    terms = [Term(ALL, ALL, **weights), Term(EACH, EACH, **weights), *(Term(s, s, **weights) for s in subsets)]  # type: ignore[arg-type]
    return Objective(terms, estimator, vectorize=vectorize)


def telbo(
    estimator: ELBO | None = None, *, likelihood: Number | Mapping[str, Number] = 1.0, vectorize: bool = True
) -> Objective:
    r"""Build the triple ELBO: the joint bound and every unimodal one, these with the decoders held fixed.

    .. math:: ELBO(x) + \sum_m ELBO(x_m)

    It bounds a sum of log-evidences. The unimodal bounds train the encoders alone.

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        likelihood: weight of the log-likelihoods, or modality -> weight; each may be a function of the step.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Vedantam et al. 2018 (arXiv:1705.10762).
    """
    likelihood = _nonnegatives("likelihood", likelihood)
    unimodal = Term(EACH, EACH, likelihood=likelihood, freeze_decoder=True)
    return Objective([Term(ALL, ALL, likelihood=likelihood), unimodal], estimator, vectorize=vectorize)


def vaevae(estimator: ELBO | None = None, *, vectorize: bool = True) -> Objective:
    r"""Build Wu & Goodman's objective: each modality's evidence, and that of the others given it.

    .. math:: \frac1M \sum_m [ ELBO(x_m) + E_{q(z|x)} \log p(x_{-m}|z) - KL(q(z|x) \| q(z|x_m)) ]

    Their sum over m targets M log p(x), hence the mean. A bound on log p(x) only where every q(z | x_m) is the exact
    posterior.

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Wu & Goodman 2019 (arXiv:1912.05075).
    """
    return Objective(
        [Term(EACH, EACH, average=True), Term(ALL, OTHERS, EACH, average=True)], estimator, vectorize=vectorize
    )


def mmvae(
    num_particles: int = 10, estimator: ELBO | None = None, *, looser: bool = True, vectorize: bool = True
) -> Objective:
    r"""Build MMVAE: the importance-weighted bound of a mixture-of-experts posterior, K draws from every expert.

    .. math:: \frac1M \sum_m \log \frac1K \sum_k w_{mk}, \qquad
              w_{mk} = \frac{p(x, z_{mk})}{q(z_{mk} | x)}, \quad z_{mk} \sim q_m

    A lower bound on log p(x). The guide's posterior has to be a mixture.

    Args:
        num_particles: K.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.IWAE`, stratified.
        looser: True takes the mean over experts of the logarithm, as its authors train; False the logarithm of the
            mean over experts, which is the tighter bound. An ``estimator`` takes the place of both.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Shi et al. 2019 (arXiv:1911.03393).
    """
    num_particles = _count("num_particles", num_particles, least=1)
    looser = check_flag("looser", looser)
    stratified = IWAE(num_particles, stratified="outside" if looser else "inside")
    return Objective([Term(ALL, ALL)], stratified if estimator is None else estimator, vectorize=vectorize)


def unimodal_mean(estimator: ELBO | None = None, *, vectorize: bool = True) -> Objective:
    r"""Build the mean of bounds on log p(x) that each encode one modality.

    .. math:: \frac1M \sum_m [ E_{q_m} \log p(x|z) - KL(q_m \| p) ]

    Looser than the bound of a mixture-of-experts posterior, whose density is that of the whole mixture.

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Shi et al. 2019 (arXiv:1911.03393), whose bound it loosens.
    """
    return Objective([Term(EACH, ALL, average=True)], estimator, vectorize=vectorize)


def mixture_mean(
    beta: Number = 1.0,
    estimator: ELBO | None = None,
    *,
    likelihood: Number | Mapping[str, Number] = 1.0,
    vectorize: bool = True,
) -> Objective:
    r"""Build MMVAE+: the mean of bounds that each encode one modality, with the density of their mixture.

    .. math:: \frac1M \sum_m E_{q_m} \Big[ \log p(x | z, w) + \beta \Big( \log \frac{p(z)}{\frac1M \sum_l q_l(z)}
              + \sum_l \log \frac{p(w_l)}{q(w_l | x_m)} \Big) \Big]

    z has a mixture-of-experts posterior, and for private latents w :class:`pyro_mm.posteriors.Private` has
    :math:`q(w_m | x_m)` and, for :math:`l \ne m`, its ``missing``. The table is ``mean_m (m, *, P)`` and, with weight
    :math:`-\beta`, the KL of every expert from the mixture: together they put the density of the mixture in the place
    of the expert's own.

    For :math:`\beta \ge 1`, and an estimator that is a mean of log-weights, a bound on log p(x): that of
    q(m, z, w) = q_m(z, w) / M for p(x, z, w) q(m | z), q(m | z) being the expert's share in the mixture at z.
    ``target``, which goes by single terms, calls it a surrogate. Without private latents and with K = 1 it is MMVAE.

    Args:
        beta: weight of the KL, or a function of the step.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        likelihood: weight of the log-likelihoods, or modality -> weight; each may be a function of the step.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Palumbo et al. 2023 (MMVAE+, ICLR).
    """

    beta = check_nonnegative("beta", beta)
    likelihood = _nonnegatives("likelihood", likelihood)

    def negative() -> Number:
        return (lambda step: -beta(step)) if callable(beta) else -beta

    own = Term(EACH, ALL, likelihood=likelihood, kl=beta, average=True)
    mixture = Term(EACH, (), ALL, kl=negative(), average=True)
    return Objective([own, mixture], estimator, vectorize=vectorize)


def dmvae(
    estimator: ELBO | None = None,
    *,
    likelihood: Number | Mapping[str, Number] = 1.0,
    kl: Number = 1.0,
    vectorize: bool = True,
) -> Objective:
    r"""Build DMVAE: the joint bound, and for every modality one that reconstructs all from what is shared with it.

    .. math:: ELBO(x) + \sum_m \Big( E_{q(z|x_m) q(w|x_m)} \log p(x|z, w) - KL(q(z, w|x_m) \| p(z, w)) \Big)

    A sum of 1 + M bounds on log p(x).

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        likelihood: weight of the log-likelihoods, or modality -> weight; each may be a function of the step.
        kl: weight of the KL, or a function of the step such as :func:`warm_up`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Lee & Pavlovic 2021 (arXiv:2012.13024).
    """
    weights = {"likelihood": _nonnegatives("likelihood", likelihood), "kl": check_nonnegative("kl", kl)}
    terms = [Term(ALL, ALL, **weights), Term(EACH, ALL, **weights)]  # type: ignore[arg-type]
    return Objective(terms, estimator, vectorize=vectorize)


def mopoe(estimator: ELBO | None = None, *, kl: Number = 1.0, vectorize: bool = True) -> Objective:
    r"""Build MoPoE: the evidence lower bound of a mixture of products of experts, ``(*, *, P)`` with that posterior.

    .. math:: E_{q(z|x)} \log p(x|z) - KL(q(z|x) \| p(z)), \qquad q(z|x) = \frac{1}{2^M} \sum_S q(z|x_S)

    A lower bound on log p(x). By default one draw from a component drawn at random, weighted by the density of the
    whole mixture; the form that its authors train is :func:`subset_mean`.

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        kl: weight of the KL, or a function of the step such as :func:`warm_up`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Sutter et al. 2021 (arXiv:2105.02470).
    """
    return elbo(estimator, kl=kl, vectorize=vectorize)


def subset_mean(
    num_subsets: int | None = None,
    estimator: ELBO | None = None,
    *,
    kl: Number = 1.0,
    empty: bool = False,
    vectorize: bool = True,
) -> Objective:
    r"""Build the mean over subsets S of the modalities of bounds on log p(x) that encode S: ``(S, *, P)``.

    .. math:: \frac{1}{2^M - 1} \sum_{S \ne \emptyset} [ E_{q(z|x_S)} \log p(x|z) - KL(q(z|x_S) \| p(z)) ]

    A lower bound on log p(x). With the empty set and one random subset it is the mixture-based bound that Hirt et al.
    compare with.

    Args:
        num_subsets: how many random subsets each row draws at each step, an unbiased estimate of the mean over all;
            None takes all.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        kl: weight of the KL, or a function of the step such as :func:`warm_up`.
        empty: True draws from all 2^M subsets, so that q(z | nothing) has to reconstruct all as well.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    Raises:
        ValueError: ``empty`` without ``num_subsets``; and in use, too many modalities to go through all subsets.

    References:
        Sutter et al. 2021 (arXiv:2105.02470); Hirt et al. 2024 (arXiv:2309.00380).
    """
    kl = check_nonnegative("kl", kl)
    check_flag("empty", empty)
    if num_subsets is None:
        if empty:
            raise ValueError(
                "empty=True needs num_subsets, since the weight of the empty set in a mean over all subsets depends "
                "on the row: give num_subsets a number of random subsets"
            )
        return Objective([Term(EVERY, ALL, kl=kl, average=True)], estimator, vectorize=vectorize)
    num_subsets = _count("num_subsets", num_subsets, least=1)
    share = 1 / num_subsets
    scaled: Number = (lambda step: share * kl(step)) if callable(kl) else share * kl
    terms = [Term(Random(index=i, empty=empty), ALL, likelihood=share, kl=scaled) for i in range(num_subsets)]
    return Objective(terms, estimator, vectorize=vectorize)


def mmjsd(prior_weight: float | None = None, estimator: ELBO | None = None, *, vectorize: bool = True) -> Objective:
    r"""Build mmJSD: the reconstruction of all from each, and a Jensen-Shannon divergence with a dynamic prior.

    .. math:: \frac1M \sum_m E_{q_m} \log p(x|z) - \sum_m \pi_m KL(q_m \| q) - \pi_0 KL(p \| q)

    q is the posterior of all modalities, and :math:`\pi_m = (1 - \pi_0) / M`. A surrogate: it bounds nothing.

    Args:
        prior_weight: :math:`\pi_0`, from 0 to 1; None is 1 / (M + 1).
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Sutter et al. 2020 (arXiv:2006.08242).
    """

    prior_weight = None if prior_weight is None else _share("prior_weight", prior_weight)

    def terms(names: tuple[str, ...]) -> list[Term]:
        share = 1 / (len(names) + 1) if prior_weight is None else prior_weight
        return [Term(EACH, ALL, ALL, kl=1 - share, average=True), Term(PRIOR, (), ALL, kl=share)]

    return Objective(terms, estimator, vectorize=vectorize)


def mmvm(beta: Number = 1.0, estimator: ELBO | None = None, *, vectorize: bool = True) -> Objective:
    r"""Build MMVM: each modality decoded from its own posterior, with KLs between all posteriors in place of a prior.

    .. math:: \sum_m E_{q_m} \log p(x_m | z) - \frac{\beta}{M} \sum_m \sum_{l} KL(q_m \| q_l)

    The sums are over the M modalities that a row has; a row with one has its reconstruction alone. A surrogate: neither
    q(z | x) of several modalities nor p(z) is in it, and neither is trained. The sum of KLs is at least the KL from the
    mixture of all experts, which the paper derives.

    Args:
        beta: weight of the tie, or a function of the step.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Sutter et al. 2024 (arXiv:2403.05300).
    """

    beta = check_nonnegative("beta", beta)

    def terms(names: tuple[str, ...]) -> list[Term]:
        # of those m that count, being present with l: as many as the row has
        return [Term(EACH, EACH, kl=0.0), *(Term(EACH, (), name, kl=beta, average=True) for name in names)]

    return Objective(terms, estimator, vectorize=vectorize)


def mvtcae(
    alpha: float = 5 / 6, beta: Number = 1.0, estimator: ELBO | None = None, *, vectorize: bool = True
) -> Objective:
    r"""Build MVTCAE: a weighted sum of the joint bound and of the conditional bounds given each modality.

    .. math:: (1 - \alpha) [E_q \log p(x|z) - \beta KL(q \| p)]
              + \frac{\alpha}{M} \sum_m [E_q \log p(x_{-m}|z) - \beta KL(q \| q_m)]

    Approximate: a bound on a sum of log-densities only where every q_m is the exact posterior. Meant for a product of
    experts without the prior expert.

    Args:
        alpha: share of the conditional bounds, from 0 to 1.
        beta: weight of every KL, or a function of the step.
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Hwang et al. 2021 (Multi-View Representation Learning via Total Correlation Objective, NeurIPS).
    """

    alpha = _share("alpha", alpha)
    beta = check_nonnegative("beta", beta)

    def times(weight: float) -> Number:
        return (lambda step: weight * beta(step)) if callable(beta) else weight * beta

    joint = Term(ALL, ALL, likelihood=1 - alpha, kl=times(1 - alpha))
    conditional = Term(ALL, OTHERS, EACH, likelihood=alpha, kl=times(alpha), average=True)
    return Objective([joint, conditional], estimator, vectorize=vectorize)


def masked(estimator: ELBO | None = None, *, vectorize: bool = True) -> Objective:
    r"""Build the masked objective: the evidence of a random subset S, and that of the rest given it.

    .. math:: ELBO(x_S) + E_{q(z|x)} \log p(x_{\setminus S}|z) - KL(q(z|x) \| q(z|x_S))

    S is uniform over all subsets of what a row has, the empty and the full one included, and drawn for every row at
    every step. Approximate: its gap from log p(x) may have either sign.

    Args:
        estimator: any ``pyro.infer.ELBO``; None is :class:`~pyro_mm.estimators.AnalyticKL`.
        vectorize: False evaluates term by term, for stories that do not broadcast.

    References:
        Hirt et al. 2024 (arXiv:2309.00380).
    """
    chosen = Random()
    rest = Random(rest=True)
    return Objective([Term(chosen, chosen), Term(ALL, rest, chosen)], estimator, vectorize=vectorize)
