"""The semi-supervised story: a latent class, with a label in some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.keywords import covariates_read_by
from ..conditionals.unconditional import as_module
from ..handlers.params import register
from ..utils.arguments import check_function, check_mapping, check_name, check_names
from .decoders import check_decoders


class Labelled(nn.Module):
    r"""A latent class y behind all modalities, and a label that states it in some rows: semi-supervised learning.

    .. math:: p(y, z, x, \ell) = \mathrm{Cat}(y; \pi) \, p(z | y) \, p(\ell | y) \prod_{m=1}^M p(x_m | z, y),
              \qquad p(\ell | y) = [\ell = y] \text{ by default}

    The sites are ``"y"``, ``"z"`` and the modalities, the label included: y is a latent in every row. So a row with a
    label has the evidence log p(x, y), and a row without it log p(x), with y summed out. Conditionals such as log
    p(label | image), and generation of images given labels or labels given images, work as for any modalities.

    The guide decides how y is inferred:

    * ``config_enumerate(guide)`` sums it out: exactly in the estimators and likelihoods of this package, whatever
      q(y | x_S) is, which then gets no gradient; weighted by q(y | x_S) in ``TraceEnum_ELBO``;
    * a guide that samples ``"y"``: ``Trace_ELBO``, or ``TraceGraph_ELBO`` with baselines by ``poutine.infer_config``;
    * a guide without ``"y"``: the model's y is summed out.

    A term that decodes an exact label which its encoder did not see is minus infinity if y is sampled, or weighted by
    q(y | x_S). It is log p(label | ..) if y is summed out exactly, and finite with an annotator.

    Args:
        classes: p(y), a Categorical of C classes, or a module ``batch -> Categorical``.
        prior: p(z), a distribution of event shape ``(D,)``; or a module mapping the one-hot y ``(.., N, C)`` to
            p(z | y).
        decoders: modality -> module mapping z ``(.., N, D)`` and the one-hot y ``(.., N, C)`` to p(x_m | z, y).
        independent: modalities that do not depend on y given z, whose decoders are called with z alone. Estimators that
            follow dependencies, such as ``TraceGraph_ELBO``, leave them out of the score-function term of y.
        label: the modality that states y, integers ``(N,)`` below C.
        annotator: a module mapping the one-hot y ``(.., N, C)`` to p(label | y), for labels that may be wrong; None for
            labels that equal y.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a name that is used twice, or an unknown one.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> classes = dist.Categorical(logits=torch.zeros(3))
        >>> prior = mm.conditionals.Normal(mm.nn.MLP(3, 2 * 2))  # p(z | y) from the one-hot y
        >>> image = mm.conditionals.Normal(mm.nn.MLP(2 + 3, 10), scale=1.0)
        >>> model = mm.models.Labelled(classes, prior, {"image": image})
        >>> rows, latents = mm.simulate(model, mm.Batch({"image": torch.zeros(4, 10), "label": torch.zeros(4).long()}))
        >>> torch.equal(rows["label"], latents["y"]), latents["z"].shape
        (True, torch.Size([4, 2]))

    References:
        Kingma et al. 2014 (arXiv:1406.5298), whose M2 has p(z | y) = p(z) and one modality beside the label.
    """

    def __init__(
        self,
        classes: dist.Categorical | nn.Module,
        prior: dist.Distribution | nn.Module,
        decoders: Mapping[str, nn.Module],
        independent: Sequence[str] = (),
        label: str = "label",
        annotator: nn.Module | None = None,
    ):
        super().__init__()
        check_name("label", label)
        independent = check_names("independent", independent)
        decoded = set(check_mapping("decoders", decoders, "modules"))
        if reserved := {label, "y", "z"} & decoded or {label} & {"y", "z"}:
            raise ValueError(f"expected other names than 'y', 'z' and the label's for the modalities, got {reserved}")
        if unknown := set(independent) - set(decoders):
            raise ValueError(f"independent of the class: {unknown}, not among the decoders {list(decoders)}")
        self.classes = as_module("classes", classes)
        self.prior = as_module("prior", prior)
        self.decoders = nn.ModuleDict(check_decoders(decoders, "y", "z", label))
        self.annotator = None if annotator is None else check_function("annotator", annotator, ("classes",))
        self.independent = independent
        self.label = label

    def forward(self, batch: Batch) -> None:
        """Run the story on a batch: sample the latent sites, observe the modalities."""
        register(self)
        names = [self.label, *self.decoders]
        with batch.plate():
            with covariates_read_by("the prior of 'y'", self.classes):
                classes = self.classes(batch)
            y = pyro.sample("y", classes)
            class_vector = one_hot(y, classes.logits)
            z = pyro.sample("z", self.prior(class_vector))
            for m in pyro.plate("modalities", len(names), device="cpu"):
                name = names[m]
                if name == self.label:
                    batch.observe(name, self.annotator or exact_label, class_vector)
                else:
                    parents = (z,) if name in self.independent else (z, class_vector)
                    batch.observe(name, self.decoders[name], *parents)


def one_hot(y: Tensor, like: Tensor) -> Tensor:
    """Return classes as one-hot vectors, without reading their values in Python as torch's own function does.

    Args:
        y: integers below C, ``(..)``.
        like: a tensor ``(.., C)``, whose type, device and number of classes the result has.

    Returns:
        ``(.., C)``.
    """
    return (y[..., None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


def exact_label(class_vector: Tensor) -> dist.Categorical:
    """Return the distribution of a label that equals the class.

    Args:
        class_vector: the one-hot class, ``(.., C)``.
    """
    # by logits, since probabilities would be clamped away from 0
    return dist.Categorical(logits=class_vector.log(), validate_args=False)
