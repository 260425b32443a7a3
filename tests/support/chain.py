"""A pair with a plate within a row and a latent given another one."""

import pyro
import pyro.distributions as dist


def chain(vectorised):
    """A story with a plate within a row and a latent given another one, and its guide."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                v = pyro.sample("v", dist.Normal(z, 0.5))
            batch.observe("x", lambda v: dist.Normal(v.sum(-2, keepdim=vectorised), 1.0), v)

    def guide(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(batch["x"] / 4, 0.4))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("v", dist.Normal(z, 0.4))

    return model, guide
