"""Checks that no minibatch of a training will have too few rows."""

from __future__ import annotations

from torch.utils.data import DataLoader

from ..batch.batch import Batch
from ..utils.modules import preserve_buffers
from ..utils.seeding import temporary_seed
from .modes import set_training
from .problem import TrainingProblem
from .setting import Setting
from .validation import Validation


def check_single_row(setting: Setting, problem: TrainingProblem) -> None:
    """Raise a ValueError if a minibatch will be a single row, too few for batch normalisation."""
    loader = setting.loader
    if loader.smallest != 1 or not problem.normalises_batches:
        return
    try:
        with temporary_seed(0, loader.device), preserve_buffers(*problem.networks):
            set_training(setting.networks, True)
            setting.evaluate(setting.transform(loader.head()[:1]), step=0)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        mend = "pass drop_last=True, or another batch_size"
        if loader.batch_size == 1:
            mend = "pass a larger batch_size"
        to = ", to the loader" if isinstance(loader.data, DataLoader) else ""
        raise ValueError(
            f"{loader.size} rows in minibatches of {loader.batch_size or 'the sizes given'} leave a minibatch of a "
            f"single row, of which batch normalisation has no variance: {mend}{to}"
        ) from error
    finally:
        set_training(setting.networks, False)


def check_least_rows(setting: Setting, head: Batch, validation: Validation | None) -> None:
    """Raise a ValueError if a minibatch will have fewer rows than the objective needs.

    Args:
        setting: the training.
        head: some of its rows.
        validation: the rows for validation.
    """
    least = setting.objective.least_rows(head.names)
    sizes = {"minibatch": setting.loader.smallest_of_all}
    if validation is not None:
        sizes["minibatch of the validation rows"] = validation.smallest
    for what, smallest in sizes.items():
        if 0 < smallest < least:
            mend = "pass drop_last=True, or another batch_size" if what == "minibatch" else "pass other rows"
            raise ValueError(
                f"the smallest {what} has {smallest} of the {least} rows that the objective needs, which compares "
                f"rows of a minibatch with each other: {mend}"
            )
