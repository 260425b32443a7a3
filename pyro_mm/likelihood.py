r"""Marginal and conditional log-likelihoods by importance sampling, each row with its error and its diagnostics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arviz_bridge import inference_data
from .batch import Batch, Stack
from .importance import propose, score_model
from .pairs import Callback, Pair, Structure, Views, latents, structure
from .pareto import pareto_k, tail_length
from .seeding import seeded

BLOCK = 2**16  # draws of a (row, particle) pair that share a seed: the canonical block, whatever the chunk
CHUNK = 2**14  # pairs decoded at once on a CPU, where larger ones leave the cache


@dataclass(frozen=True)
class Evidence:
    r"""Log-likelihoods of N rows, estimated, with what is needed to trust them or not.

    Attributes:
        log_prob: :math:`\log \frac1K \sum_k w_{kn}`, ``(N,)``, in nats. Biased low by about half the squared error.
        standard_error: :math:`\sqrt{(\sum_k w_k^2 / (\sum_k w_k)^2 - 1/K) K / (K - 1)}`, by the delta method.
        ess: effective sample size :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and K.
        pareto_k: tail shape of the weights (:func:`pyro_mm.pareto.pareto_k`); above 0.7 the row is not to be trusted.
        quantity: which log-likelihood this is, in words.
        num_particles: K.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    quantity: str
    num_particles: int

    def __len__(self) -> int:
        return len(self.log_prob)

    def mean(self) -> tuple[float, float]:
        """The mean over rows, and the standard error that the estimation (not the choice of rows) gives it."""
        return self.log_prob.mean().item(), (self.standard_error.square().sum().sqrt() / len(self)).item()

    def untrusted(self) -> float:
        """The share of rows whose k-hat exceeds 0.7; NaN where there were too few draws for any k-hat."""
        return math.nan if self.pareto_k.isnan().any() else (self.pareto_k > 0.7).float().mean().item()

    def __repr__(self) -> str:
        mean, error = self.mean()
        return (
            f"Evidence({self.quantity}: {mean:.3f} ± {error:.3f} nats a row, mean of {len(self)} rows, "
            f"K = {self.num_particles}, k-hat > 0.7 in {self.untrusted():.1%})"
        )

    def to_arviz(self) -> Any:
        """As ArviZ's inference data: group ``log_likelihood``, and the diagnostics under ``sample_stats``."""
        column = lambda x: x.detach().cpu().numpy()[None, None]  # noqa: E731  # chain, draw, row
        stats = {name: column(getattr(self, name)) for name in ("standard_error", "ess", "pareto_k")}
        return inference_data({"log_likelihood": {self.quantity: column(self.log_prob)}, "sample_stats": stats})


def log_marginal(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    num_particles: int = 1000,
    proposal: Callback | Batch | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
) -> Evidence:
    r"""log p(x_present) of every row: the joint or a marginal, as the batch's masks say.

    .. math:: \log p(x_S) \approx \log \frac1K \sum_k \frac{p(x_S | z_k) p(z_k)}{q(z_k)}, \qquad z_k \sim q(z | x_S)

    Args:
        model, guide: callables of a batch. Row-local enumerated sites are summed out; a latent that only the model
            has is drawn from its prior.
        batch: N rows. A row in which nothing is present has log-likelihood 0.
        num_particles: K.
        proposal: another guide to draw from; or the same rows as another batch, for the guide to see instead of
            ``batch`` (with ``batch.only("image")`` and ``proposal=batch``: log p(image) under q(z | image, label)).
        seed: of the draws; None takes one from torch's generator, which is not otherwise touched.
        chunk: (row, particle) pairs decoded at once, which bounds the memory of the decoders (encoders see all rows at
            once) and changes no digit of the result but by rounding. Default 2^14, on CUDA 2^16.
        vectorize: False draws particle by particle, for stories that do not broadcast.

    Raises:
        ValueError: a site that is scaled, or outside the plate ``"data"``: its weights would be no likelihoods.
    """
    if num_particles < 1:
        raise ValueError(f"expected num_particles >= 1, got {num_particles}")
    seen = proposal if isinstance(proposal, Batch) else batch
    if seen.size != batch.size:
        raise ValueError(f"the proposal's batch has {seen.size} rows, and the batch {batch.size}")
    sampler = proposal if proposal is not None and not isinstance(proposal, Batch) else guide
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    with torch.no_grad():
        sums = _Sums(num_particles)
        for log_w in _weights(model, sampler, batch, seen, num_particles, seed, chunk, vectorize):
            sums.add(log_w)
    present = [n for n in batch.names if batch.presence(n) is not False]
    return sums.evidence(f"log p({', '.join(present)})")


def log_conditional(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    target: Sequence[str] | str,
    given: Sequence[str] | str = (),
    num_particles: int = 1000,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
) -> Evidence:
    r"""log p(x_target | x_given) of every row, as far as they are present in it.

    .. math:: \log p(x_T | x_G) = \log p(x_T, x_G) - \log p(x_G)

    Each of the two is estimated under a proposal of its own, q(z | x_T, x_G) and q(z | x_G), and their errors add in
    quadrature; ``ess`` and ``pareto_k`` are the worse of the two. A row that lacks all targets has 0, exactly.

    Args:
        target, given: names of modalities, without one in common.
        model, guide, batch, num_particles, seed, chunk, vectorize: as in :func:`log_marginal`.
    """
    targets, givens = ((x,) if isinstance(x, str) else tuple(x) for x in (target, given))
    if set(targets) & set(givens) or not targets:
        raise ValueError(f"expected targets, and none of them given: target={targets}, given={givens}")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    options: dict[str, Any] = {"num_particles": num_particles, "chunk": chunk, "vectorize": vectorize}
    joint = log_marginal(model, guide, batch.only(*targets, *givens), seed=seed, **options)
    quantity = f"log p({', '.join(targets)}{' | ' if givens else ''}{', '.join(givens)})"
    if not givens:
        return replace(joint, quantity=quantity)
    marginal = log_marginal(model, guide, batch.only(*givens), seed=seed + 1, **options)
    some = torch.stack([batch.present[n] for n in targets]).any(0)
    zero = torch.zeros_like(joint.log_prob)
    return Evidence(
        torch.where(some, joint.log_prob - marginal.log_prob, zero),
        torch.where(some, (joint.standard_error.square() + marginal.standard_error.square()).sqrt(), zero),
        torch.minimum(joint.ess, marginal.ess),
        torch.maximum(joint.pareto_k, marginal.pareto_k),
        quantity,
        num_particles,
    )


class _Sums:
    """What is kept of log-weights that come in blocks of particles: two sums, and the largest ones."""

    def __init__(self, num_particles: int):
        self.k, self.keep = num_particles, min(num_particles, tail_length(num_particles) + 1)
        self.one = self.two = self.top = None  # type: Any

    def add(self, log_w: Tensor) -> None:
        dtype, log_w = log_w.dtype, log_w.double()
        one, two = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
        self.dtype = dtype
        self.one = one if self.one is None else torch.logaddexp(self.one, one)
        self.two = two if self.two is None else torch.logaddexp(self.two, two)
        top = log_w.T if self.top is None else torch.cat([self.top, log_w.T], -1)
        self.top = top.topk(min(self.keep, top.shape[-1]), -1).values

    def evidence(self, quantity: str) -> Evidence:
        inverse_ess = (self.two - 2 * self.one).exp()
        variance = (inverse_ess - 1 / self.k).clamp(min=0) * (self.k / (self.k - 1) if self.k > 1 else math.nan)
        return Evidence(
            (self.one - math.log(self.k)).to(self.dtype),
            variance.sqrt().to(self.dtype),
            (1 / inverse_ess).to(self.dtype),
            pareto_k(self.top, self.k).to(self.dtype),
            quantity,
            self.k,
        )


def _weights(
    model: Callback,
    guide: Callback,
    batch: Batch,
    seen: Batch,
    num_particles: int,
    seed: int,
    chunk: int | None,
    vectorize: bool,
) -> Iterator[Tensor]:
    """Log-weights in canonical blocks of particles, ``(k, N)`` each: block b is drawn under the seed (seed, b)."""
    info = structure(model, guide, seen)
    chunk = chunk or (BLOCK if batch.device.type == "cuda" else CHUNK)
    memo: dict[Any, Any] = {}
    masks = lambda b: {n: b.presence(n) for n in b.names}  # noqa: E731
    shown = seen.view(masks(seen), Stack({}), memo, batch.rows)
    decoded = batch.view(masks(batch), Stack({}), {})
    views = Views(shown, decoded, shown, info.nesting, modalities=info.modalities)
    block = max(1, BLOCK // batch.size) if vectorize else 1
    whole = False
    for index, start in enumerate(range(0, num_particles, block)):
        with seeded(block_seed(seed, index), batch.device):
            pair = Pair(model, guide, views, min(block, num_particles - start))
            propose(pair, info)
            before = _generator_state(batch.device)
            if not whole:
                log_w = _in_chunks(pair, info, chunk)
                # a story that draws (a missing parent, say) would draw otherwise in other chunks
                whole = not torch.equal(before, _generator_state(batch.device))
            if whole:
                _set_generator_state(batch.device, before)
                log_w = score_model(pair, info, unscaled=True).log_weights()[:, 0]
        yield log_w


def _in_chunks(pair: Pair, info: Structure, chunk: int) -> Tensor:
    """The log-weights of a block, decoding at most ``chunk`` (row, particle) pairs at once."""
    size, particles = pair.views.decode.size, pair.num_particles
    if size * particles <= chunk:
        return score_model(pair, info, unscaled=True).log_weights()[:, 0]
    rows, k = (size, chunk // size) if chunk >= size else (chunk, 1)
    parts = [
        torch.cat([_part(pair, info, slice(i, i + k), slice(j, j + rows)) for j in range(0, size, rows)], -1)
        for i in range(0, particles, k)
    ]
    return torch.cat(parts)


def _part(pair: Pair, info: Structure, particles: slice, rows: slice) -> Tensor:
    """The log-weights of some particles and rows of a block, ``(k, n)``."""
    size, k = pair.views.decode.size, pair.num_particles

    views = replace(pair.views, decode=pair.views.decode[rows])
    part = Pair(pair._model, pair._guide, views, len(range(*particles.indices(k))), plated=k > 1)

    def cut(x: Tensor, event_dim: int = 0) -> Tensor:
        for dim, full, kept in ((-1, size, rows), (pair.particle_dim, k, particles)):
            place = x.dim() + dim - event_dim
            if place >= 0 and x.shape[place] == full > 1:
                x = x[(slice(None),) * place + (kept,)]
        return x

    part.trace = pair.trace.copy()
    for plate in {"data", "particles"} & set(part.trace.nodes):
        part.trace.remove_node(plate)  # its index set, which a replay would bring back whole
    for name, site in latents(pair.trace).items():
        part.trace.nodes[name] = site | {"value": cut(site["value"], site["fn"].event_dim)}
    part.log_q = {name: cut(x) for name, x in pair.log_q.items()}
    return score_model(part, info, unscaled=True).log_weights()[:, 0]


def block_seed(seed: int, index: int) -> int:
    """The seed of the canonical block ``index``."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
