"""Objectives of a user's own: terms that are not log-densities, with and without parameters."""

import pyro
import torch
from torch import nn

import pyro_mm as mm


def squared_mmd(x, y, width=1.0):
    """Return the squared maximum mean discrepancy of two samples ``(N, D)``, under a Gaussian kernel."""

    def kernel(a, b):
        return (-(a[:, None] - b[None]).square().sum(-1) / (2 * width**2)).exp()

    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


class MMD:
    """Reconstruction, and the discrepancy between the guide's latents and the standard normal prior.

    Args:
        weight: of the discrepancy, per row; a function of the step, or a number.
    """

    def __init__(self, weight=10.0):
        self.weight = weight

    def evaluate(self, model, guide, batch, *, step):
        encoded = pyro.poutine.trace(guide).get_trace(batch)
        decoded = pyro.poutine.trace(pyro.poutine.replay(model, trace=encoded)).get_trace(batch)
        decoded.compute_log_prob()
        likelihood = sum(
            site["log_prob"].sum()
            for site in decoded.nodes.values()
            if site["type"] == "sample" and site["is_observed"]
        )
        z = encoded.nodes["z"]["value"]
        weight = self.weight(step) if callable(self.weight) else self.weight
        discrepancy = weight * len(batch) * squared_mmd(z, torch.randn_like(z))
        return mm.Loss(discrepancy - likelihood, {"reconstruction": likelihood.detach(), "-MMD": -discrepancy.detach()})


class Contrastive(nn.Module):
    """Contrastive loss of two modalities: each latent has to find that of its own row, by a critic that is trained.

    The story is not used. Its ``forward`` has the arguments of ``evaluate``.
    """

    def __init__(self, first, second, latent_dim, features=4):
        super().__init__()
        self.first = first
        self.second = second
        self.critic = nn.Linear(latent_dim, features)

    def forward(self, model, guide, batch, *, step):
        features = [
            self.critic(pyro.poutine.trace(guide).get_trace(batch.only(name)).nodes["z"]["value"])
            for name in (self.first, self.second)
        ]
        logits = features[0] @ features[1].T
        own = torch.arange(len(batch), device=logits.device)
        return nn.functional.cross_entropy(logits, own, reduction="sum")


def likelihood_alone(model, guide, batch, *, step):
    """Return minus the log-likelihood of the rows under the guide's draws: a function as an objective."""
    return MMD(weight=0.0).evaluate(model, guide, batch, step=step).total
