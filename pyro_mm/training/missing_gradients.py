"""Parameters that no gradient reached in an epoch, and the likely reason for each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..batch.batch import Batch
from .problem import TrainingError
from .step import Update

MAX_LISTED = 5  # names in a message


class MissingGradients:
    """Parameters that have had no gradient yet, and modalities that no row has had.

    One minibatch is not enough to judge: it may lack a rare modality, or rows that reach some network.

    Args:
        update: the update that is to give the gradients.
        names: identity of a parameter -> its name in messages.
    """

    def __init__(self, update: Update, names: dict[int, str]):
        self._update = update
        self._problem = update.loss
        self._names = names
        required = {id(p): p for p in update.targets} if update.name else update.loss.own_required_parameters
        self._pending: dict[int, Tensor] = {key: p for key, p in required.items() if p.requires_grad}
        self._modalities: tuple[str, ...] = ()
        self._absent: set[str] = set()
        self._seen_structures: set[Hashable] = set()
        self._was_made = False

    def after_step(self, batch: Batch, step: int) -> None:
        """Record the gradients of a step on a batch.

        Args:
            batch: the minibatch.
            step: steps taken so far, this one included.
        """
        if not self._pending:
            return
        self._was_made |= self._update.is_due(step - 1)
        self._pending = {key: p for key, p in self._pending.items() if p.grad is None}
        structure, _ = batch.parts()
        if not self._pending or structure in self._seen_structures:
            return
        if not self._seen_structures:
            self._modalities = batch.names
            self._absent = set(batch.names)
        self._seen_structures.add(structure)
        self._absent -= {name for name in batch.names if batch.presence(name) is not False}
        # an objective that decodes some modalities at a step leaves out parameters that it will reach
        for key in self._problem.parameters_to_come(batch, step):
            self._pending.pop(key, None)

    def after_epoch(self, could_have: Iterable[str] | None = None) -> None:
        """Raise if a parameter had no gradient so far.

        Args:
            could_have: modalities that some row of the data has; None if that is not known. No error is raised while
                one of them has not been in a minibatch yet.

        Raises:
            TrainingError: naming the parameters, and what mends it.
        """
        if self._pending and self._was_made and not self._absent & set(could_have or ()):
            raise TrainingError(self._message())

    def _message(self) -> str:
        names = [self._names[key] for key in self._pending]
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        problem = self._problem
        sentences = explain_missing_gradients(
            names,
            problem.modules_by_path,
            self._modalities,
            self._absent,
            problem.discrete_sites,
            problem.objective.estimator_name,
            "of the epoch",
        )
        of_player = f" of the player {self._update.name!r}" if self._update.name else ""
        return (
            f"no gradient{of_player} reaches {', '.join(names[:MAX_LISTED])}{more} in an epoch. {' '.join(sentences)}"
        )


def explain_missing_gradients(
    names: Iterable[str],
    modules_by_path: Mapping[str, nn.Module],
    modalities: Sequence[str],
    absent: Collection[str],
    discrete: Sequence[str],
    estimator: str,
    span: str = "here",
) -> Iterator[str]:
    """Explain why parameters have no gradient, a sentence for each reason.

    Args:
        names: of the parameters, by the paths of their modules.
        modules_by_path: path -> outermost module of the pair.
        modalities: of the batches.
        absent: the modalities that no row has.
        discrete: latent sites that are enumerated, or have no pathwise gradient.
        estimator: its class's name.
        span: the rows that were used, in words.
    """
    unexplained = list(names)
    lacking: dict[str, list[str]] = {}
    for path, key in _keys_of_modalities(modules_by_path, modalities):
        those = [name for name in unexplained if name.startswith(path + ".")]
        if not those or (key in modalities and key not in absent):
            continue
        unexplained = [name for name in unexplained if name not in those]
        if key in absent:
            lacking.setdefault(key, []).append(path)
            continue
        close = difflib.get_close_matches(key, modalities, 1)
        meant = f". Was {close[0]!r} meant?" if close else ": give it the name of one of them."
        yield f"{path} is for a modality {key!r}, and the batches hold {_names_text(modalities)}{meant}"
    for key, paths in lacking.items():
        yield f"No row {span} has {key!r}, which {' and '.join(paths)} are for: train on rows that have it."
    if not unexplained:
        return
    if discrete and estimator != "TraceEnum_ELBO":
        yield (
            f"The story or the guide samples {_names_text(discrete)}, a discrete latent, and {estimator} takes no "
            "gradient through it: pyro.infer.TraceEnum_ELBO, as the objective's estimator, does."
        )
        return
    yield (
        "The objective does not use them on these data: is one of them misspelt, or missing from forward? If they are "
        "not to be trained, freeze them with requires_grad_(False)."
    )


def _keys_of_modalities(
    modules_by_path: Mapping[str, nn.Module], modalities: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield path and key of the modules that seem to be named after a modality."""
    for what, root in modules_by_path.items():
        for path, module in root.named_modules():
            if not isinstance(module, nn.ModuleDict):
                continue
            keys = [key for key in module if key.removeprefix("w_") not in modalities or key in modalities]
            by_modality = any(difflib.get_close_matches(key, modalities, 1) for key in keys)
            for key in module if by_modality else ():
                yield ".".join(part for part in (what, path, key) if part), key


def _names_text(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
