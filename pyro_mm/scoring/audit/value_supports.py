"""Find observed values outside of the support of their distribution."""

from __future__ import annotations

from ...batch.batch import Batch
from ...distributions.support import Support, describe_values_outside


def unscored_values(batch: Batch, supports: dict[str, Support]) -> list[str]:
    """Modalities with values that their distributions do not score, in words."""
    found = []
    for name, support in supports.items():
        if (
            name in batch
            and batch.holds(name)
            and (text := describe_values_outside(name, batch[name], batch.presence(name), support))
        ):
            found.append(text)
    return found
