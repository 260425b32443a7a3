"""Find observed values outside the support of their distribution."""

from __future__ import annotations

from ...batch.batch import Batch
from ...distributions.support import Support, describe_no_strings, describe_values_outside


def unscored_values(batch: Batch, supports: dict[str, Support]) -> list[str]:
    """Return a sentence for each modality with values outside the support of its distribution.

    Args:
        batch: N rows. All are tested, but each tensor only once, and those in a file block by block.
        supports: observed modality -> support of its distribution.
    """
    if not batch.is_stored:
        return _unscored_values(batch, supports)
    for block in batch.read_blocks():
        if found := _unscored_values(block, supports):
            return found
    return []


def _unscored_values(batch: Batch, supports: dict[str, Support]) -> list[str]:
    """Return the sentences on a batch in memory."""
    held = {name: support for name, support in supports.items() if name in batch and batch.holds(name)}
    found = [describe_values_outside(name, batch[name], batch.presence(name), held[name]) for name in held]
    for name, support in held.items():
        if support.end is not None and name in batch.lengths:
            tokens = batch[name]
            present = batch.presence(name)
            found.append(describe_no_strings(name, tokens, batch.lengths[name], present, support.end))
    return [text for text in found if text]
