"""Generative stories p(z, x_1 .. x_M): modules that sample latents and observe the modalities of a batch.

A story knows nothing of guides, objectives or estimators. One of your own is a function, or an ``nn.Module``, of a
batch:

>>> import pyro, torch, pyro_mm as mm, pyro.distributions as dist
>>> decoder = mm.conditionals.Normal(torch.nn.Linear(2, 3), scale=1.0)
>>> def story(batch):
...     pyro.module("decoder", decoder)
...     with batch.plate():
...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
...         batch.observe("x", decoder, z)
>>> pyro.poutine.trace(story).get_trace(mm.Batch({"x": torch.zeros(5, 3)})).nodes["z"]["value"].shape
torch.Size([5, 2])
"""

from .conditional_latent import ConditionalLatent
from .factorized import Factorized
from .labelled import Labelled
from .linear_gaussian import LinearGaussian
from .private_latents import PrivateLatents
from .shared_latent import SharedLatent

__all__ = ["ConditionalLatent", "Factorized", "Labelled", "LinearGaussian", "PrivateLatents", "SharedLatent"]
