"""A training of two players: reconstruction with doubtful latents, and a critic of latents against the prior."""

import torch
from pyro import poutine
from torch import nn

import pyro_mm as mm
from tests.support.training_pair import data, pair


class Reconstruction(nn.Module):
    """Reconstruction, and latents that the critic takes for draws from the prior; it brings the critic as a player.

    Args:
        critic: the network.
        changes: attributes of the player that are not those of the game.
    """

    def __init__(self, critic, **changes):
        super().__init__()
        self.critic = critic
        self.changes = changes

    def evaluate(self, model, guide, batch, *, step):
        guided = poutine.trace(guide).get_trace(batch)
        modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch)
        modelled.compute_log_prob(lambda name, site: name in batch.names)
        fit = sum(modelled.nodes[name]["log_prob_sum"] for name in batch.names)
        doubt = nn.functional.softplus(-self.critic(guided.nodes["z"]["value"])).mean() * (batch.total or batch.size)
        return mm.Loss(doubt * (1 + step / 10) - fit, {"doubt": -doubt.detach()})

    def players(self, model, guide, batch):
        settings = {"parameters": list(self.critic.parameters()), "every": 2, **self.changes}
        return [mm.Player("critic", settings.pop("loss", Classification(self.critic)), **settings)]


class Classification(nn.Module):
    """Classification of latents and of draws from the prior."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def evaluate(self, model, guide, batch, *, step):
        z = poutine.trace(guide).get_trace(batch).nodes["z"]["value"].detach()
        real = nn.functional.softplus(-self.critic(torch.randn_like(z))).mean()
        loss = (real + nn.functional.softplus(self.critic(z)).mean()) * (batch.total or batch.size)
        return mm.Loss(loss, {"real": -real.detach() * (batch.total or batch.size)})


def game(**changes):
    """Model, guide and objective; fresh weights each time."""
    torch.manual_seed(0)
    model, guide = pair()
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, guide, Reconstruction(critic, **changes)


def rows():
    """Complete rows."""
    return mm.Batch({name: data(64)[name] for name in "ab"})
