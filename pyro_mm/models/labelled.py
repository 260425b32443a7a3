"""A class behind all modalities, which one of them tells wherever it is present."""

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
    r"""The semi-supervised story: a class y that every row has, and a label that tells it where somebody gave one.

    .. math:: y_n \sim \mathrm{Cat}(\pi), \quad z_n \sim p(z | y_n), \quad x_{nm} \sim p(x_m | z_n, y_n), \quad
              \ell_n \sim p(\ell | y_n), \text{ by default } \ell_n = y_n

    The label is a modality like any other, and y is a latent in every row. So a row with a label has the evidence
    log p(x, y), one without it log p(x), y being summed out; and log p(label | image), an image from a label and a
    label from an image need nothing of their own. Decoders get y as a one-hot vector ``(.., N, C)``.

    Args:
        classes: p(y), a Categorical, or a module ``batch -> Categorical`` (a learned one).
        prior: p(z), a distribution; or a module giving p(z | y) from the one-hot y.
        decoders: modality -> module giving p(x_m | z, y), called with z and the one-hot y.
        independent: the modalities that do not depend on y given z, whose decoders are called with z alone. Estimators
            that follow dependencies, such as ``TraceGraph_ELBO``, leave them out of what a draw of y is judged by.
        label: the modality that tells y, integers ``(N,)``.
        annotator: a module giving p(label | y) from the one-hot y, for labels that may be wrong; None for y itself.

    The sites are ``"y"``, ``"z"`` and the modalities. How the same pair deals with y is said from outside:

    * ``config_enumerate(guide)`` sums it out, in ``TraceEnum_ELBO`` weighed by q(y | x_S), in the estimators and
      likelihoods of this package exactly, whatever q(y | x_S) is, which then learns nothing;
    * the guide as it is draws it: ``Trace_ELBO``, or ``TraceGraph_ELBO`` with baselines by ``poutine.infer_config``;
    * a guide without ``"y"`` leaves it to the model, where it is summed out.

    A term that decodes an exact label for which its encoder did not see it bounds nothing (minus infinity) where y is
    drawn, or weighed by q(y | x_S); summed out exactly it is log p(label | ..), and with an annotator finite anyway.

    Raises:
        ValueError: a name that is taken, or unknown.

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
        if taken := {label, "y", "z"} & set(check_mapping("decoders", decoders, "modules")) or {label} & {"y", "z"}:
            raise ValueError(f"expected other names than 'y', 'z' and the label's for the modalities, got {taken}")
        if unknown := set(independent) - set(decoders):
            raise ValueError(f"independent of the class: {unknown}, not among the decoders {list(decoders)}")
        self.classes = as_module("classes", classes)
        self.prior = as_module("prior", prior)
        self.decoders = nn.ModuleDict(check_decoders(decoders, "y", "z", label))
        self.annotator = None if annotator is None else check_function("annotator", annotator, ("classes",))
        self.independent, self.label = independent, label

    def forward(self, batch: Batch) -> None:
        register(self)
        names = [self.label, *self.decoders]
        with batch.plate():
            with covariates_read_by("the prior of 'y'", self.classes):
                classes = self.classes(batch)
            y = pyro.sample("y", classes)
            told = one_hot(y, classes.logits)
            z = pyro.sample("z", self.prior(told))
            for m in pyro.plate("modalities", len(names)):
                name = names[m]
                if name == self.label:
                    batch.observe(name, self.annotator or exact_label, told)
                else:
                    parents = (z,) if name in self.independent else (z, told)
                    batch.observe(name, self.decoders[name], *parents)


def one_hot(y: Tensor, like: Tensor) -> Tensor:
    """``(.., C)`` of the type of ``like``, ``(.., C)``; with no look at the values of y, unlike torch's own."""
    return (y[..., None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


def exact_label(told: Tensor) -> dist.Categorical:
    """The label that is y: by its logarithms, for the logits of probabilities are clamped."""
    return dist.Categorical(logits=told.log(), validate_args=False)
