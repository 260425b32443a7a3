"""Sites of a pair, and what is wrong with them, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...batch.batch import Batch
from ...distributions.support import Support


@dataclass(frozen=True)
class Sites:
    """Sites and modalities by name.

    Attributes:
        model, guide: the latent sites of each; of the model's, ``summed_out`` are enumerated, and ``from_prior`` are
            in the model only and cannot be.
        observed: the observed sites.
        guide_only: latent sites of the guide that the model has no latent for, and that are not marked as auxiliary.
        outside: sites outside the plate ``"data"``.
        scaled: sites with a scale of their own.
        unobserved: modalities of the batch that the story never observes.
        unheld: modalities that the story observes and the batch does not hold.
        unmasked: observed sites that bear no modality's name, so that no mask reaches them.
        reads_missing: (``"model"`` or ``"guide"``, modality) if it reads that modality's values in rows that lack it.
        ignored_by_guide: modalities whose presence makes no difference to the guide.
        read: modalities whose values the story looks at, be they observed or not.
        unknown: (``"model"`` or ``"guide"``, name) whose values it asks for, and the batch does not know.
        unasked: modalities whose values the guide does not ask for.
        swapped: whether the guide observes modalities and the model none.
        misfits: shapes of observed values that do not fit their distributions, in words.
        supports: observed modality -> what its distribution scores.
        unsupported: modalities with values that their distributions do not score, in words.
        mixing: why particles cannot stand to the left of the rows, in words; empty if they can, or nobody asked.
    """

    model: tuple[str, ...]
    guide: tuple[str, ...]
    observed: tuple[str, ...]
    summed_out: tuple[str, ...] = ()
    from_prior: tuple[str, ...] = ()
    guide_only: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    unobserved: tuple[str, ...] = ()
    unheld: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()
    reads_missing: tuple[tuple[str, str], ...] = ()
    ignored_by_guide: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()
    unknown: tuple[tuple[str, str], ...] = ()
    unasked: tuple[str, ...] = ()
    swapped: bool = False
    misfits: tuple[str, ...] = ()
    supports: dict[str, Support] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    mixing: str = ""

    def refusals(
        self, batch: Batch, targets: Sequence[str], givens: Sequence[str], hides: bool, draws: bool
    ) -> Iterator[str]:
        """Yield what would make the numbers of an evaluation or a training wrong, in words.

        Args:
            batch: the rows.
            targets, givens: modalities of which a conditional likelihood is asked for, and given which.
            hides: whether modalities that rows have will be hidden from the pair, as an objective's terms do.
            draws: whether the guide's draws are asked for, and not numbers that hold whatever they are.
        """
        if self.swapped:
            yield "the guide observes modalities and the model none: are model and guide swapped?"
            return
        yield from (self.guide_only_text(name) for name in self.guide_only)
        passed = [name for name in self.unobserved if batch.presence(name) is not False]
        for name in self.unmasked if passed else ():
            yield (
                f"{name}: observed by the story under the name of no modality of the batch, which holds "
                f"{', '.join(map(repr, batch.names))}; no mask reaches it, and {', '.join(map(repr, passed))} is never "
                "observed. Use batch.observe(name, ..) with the modality's name."
            )
        for who, name in self.reads_missing:
            if (who == "model" or draws) and (hides or batch.presence(name) is not True):
                yield reads_missing_text(who, name)
        yield from self._misspelt(batch)
        for name in (*targets, *givens):
            if name in self.unobserved and not (name in givens and name in self.read):
                yield (
                    f"{name}: the story neither observes nor reads it, so that the number would be called a likelihood "
                    "with it and be one without. Leave it out, or give the story a decoder for it."
                )
        yield from self.misfits

    def guide_only_text(self, name: str) -> str:
        """Describe the error that a latent site of the guide alone makes."""
        seen = "observed by the story" if name in self.observed else "unknown to the model"
        text = f"{name}: drawn by the guide and {seen}. Its -log q counts and no log p answers it: bounds are off "
        text += "by its entropy, and likelihoods have no meaning."
        if not set(self.guide) & set(self.model):
            text += " The guide's latent sites are none of the model's."
        lacking = [n for n in self.model if n not in self.guide]
        if lacking and name not in self.observed:
            close = difflib.get_close_matches(name, lacking, 1, 0.3)
            meant = close[0] if close or len(lacking) != 1 else lacking[0]
            text += f" The guide lacks {', '.join(map(repr, lacking))}, which the model has" + (
                f": is {meant!r} meant?" if meant else "."
            )
        return text + " A site that is auxiliary on purpose is to be marked by infer={'is_auxiliary': True}."

    def _misspelt(self, batch: Batch) -> Iterator[str]:
        """Names that the batch does not know, in a story or a guide that passes over one of its modalities."""
        passed = {
            "model": [n for n in self.unobserved if n not in self.read and batch.presence(n) is not False],
            "guide": [n for n in self.unasked if batch.presence(n) is not False],
        }
        wanted = [("model", name) for name in self.unheld] + [u for u in self.unknown if u[1] not in self.unheld]
        for who, name in wanted:
            if not passed[who]:
                continue  # a modality that the batch does not hold is one that is missing in every row
            close = difflib.get_close_matches(name, passed[who], 1)
            meant = repr(close[0]) if close else " or ".join(map(repr, passed[who]))
            what = ("story", "a decoder") if who == "model" else ("guide", "an expert or encoder")
            yield (
                f"{name}: the {what[0]} has {what[1]} for it, which the batch, with "
                f"{', '.join(map(repr, batch.names))}, does not know; and it passes over "
                f"{', '.join(map(repr, passed[who]))}. Is {meant} meant?"
            )


def reads_missing_text(who: str, name: str) -> str:
    """Describe the error that a program makes that reads a modality where it is missing."""
    reader, then = ("guide", "posterior") if who == "guide" else ("story", "likelihood")
    text = f"{name}: the {reader} reads its values where they are missing, so that a {then} without them has "
    return text + "seen them. Ask batch.presence, or use batch.observe."
