"""A pair with a string of tokens, a real series and a vector, and rows of unequal length that lack some of them."""

import pyro.distributions as dist
import torch

import pyro_mm as mm
from pyro_mm import conditionals, nn

STEPS, VOCABULARY, LATENT = 5, 4, 2


def pair(encoder=nn.Recurrent, tokens=nn.RecurrentTokens, end=0):
    """A shared latent with decoders of all three, and a product of their encoders."""
    torch.manual_seed(0)
    decoders = {
        "w": conditionals.Tokens(tokens(LATENT, VOCABULARY, 8), STEPS, end),
        "x": conditionals.Normal(nn.RecurrentDecoder(LATENT, STEPS, 6, 5), (STEPS, 3)),
        "y": conditionals.Normal(nn.MLP(LATENT, 3, ()), scale=1.0),
    }
    experts = {
        "w": conditionals.Normal(encoder(4, 2 * LATENT, 8, vocabulary=VOCABULARY)),
        "x": conditionals.Normal(encoder(3, 2 * LATENT, 8)),
        "y": conditionals.Normal(nn.MLP(3, 2 * LATENT, ())),
    }
    prior = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def rows(n=12, missing=True):
    """Strings that end with token 0, series of 0 to 5 steps, and vectors; some rows lack one of the sequences."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randint(1, VOCABULARY, (n, STEPS), generator=generator)
    of_w = torch.arange(n) % STEPS + 1
    w[torch.arange(STEPS) >= of_w[:, None] - 1] = 0
    x = torch.randn(n, STEPS, 3, generator=generator)
    of_x = torch.arange(n) % (STEPS + 1)
    x[torch.arange(STEPS) >= of_x[:, None]] = float("nan")
    values = {"w": w, "x": x, "y": torch.randn(n, 3, generator=generator)}
    present = {"w": torch.arange(n) % 4 != 2, "x": torch.arange(n) % 3 != 1} if missing else None
    return mm.Batch(values, present, lengths={"w": of_w, "x": of_x})
