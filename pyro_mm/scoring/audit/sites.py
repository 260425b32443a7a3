"""The sites of a pair, and the mistakes in them that an evaluation is refused for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...batch.batch import Batch
from ...distributions.support import Support


@dataclass(frozen=True)
class Sites:
    """Names of a pair's sites and of a batch's modalities, by their role, with the mistakes found in them.

    Attributes:
        model: latent sites of the model.
        guide: latent sites of the guide.
        observed: observed sites of the model.
        summed_out: latent sites that are enumerated.
        from_prior: latent sites of the model that the guide lacks and that cannot be enumerated.
        guide_only: latent sites of the guide that the model lacks and that are not marked as auxiliary.
        outside: sites outside the plate ``"data"``.
        scaled: sites with a scale of their own.
        unobserved: modalities of the batch that the story does not observe.
        unheld: modalities that the story observes and the batch does not hold.
        unmasked: observed sites without the name of a modality, which no mask reaches.
        reads_missing: pairs (``"model"`` or ``"guide"``, modality) of programs that read a modality's values in rows
            that lack it.
        reads_padding: pairs (``"model"`` or ``"guide"``, modality) of programs that read what stands behind the end of
            a modality's sequences.
        reads_ahead: modalities whose network predicts a token from that token, or from later ones.
        ignored_by_guide: modalities whose presence makes no difference to the guide.
        read: modalities whose values the story reads, observed or not.
        unknown: pairs (``"model"`` or ``"guide"``, name) of values that a program asks for and the batch lacks.
        unasked: modalities whose values the guide does not ask for.
        swapped: True if the guide observes modalities and the model none.
        misfits: sentences on observed values whose shape is not that of their distribution.
        supports: observed modality -> support of its distribution.
        unsupported: sentences on observed values outside the support of their distribution.
        mixing: reason why particles cannot stand to the left of the rows; empty if they can, or if it was not tested.
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
    reads_padding: tuple[tuple[str, str], ...] = ()
    reads_ahead: tuple[str, ...] = ()
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
        """Yield a sentence for each mistake that would make the numbers of an evaluation or a training wrong.

        Args:
            batch: the rows.
            targets, givens: modalities x_T and x_G of a conditional likelihood log p(x_T | x_G).
            hides: True if modalities that rows have will be hidden from the pair, as terms of an objective do.
            draws: True if draws of the guide are returned; a likelihood is right under any proposal.
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
        yield from (reads_padding_text(who, name) for who, name in self.reads_padding)
        yield from (reads_ahead_text(name) for name in self.reads_ahead)
        yield from self._misspelt(batch)
        for name in (*targets, *givens):
            if name in self.unobserved and not (name in givens and name in self.read):
                yield (
                    f"{name}: the story neither observes nor reads it, so that the number would be called a likelihood "
                    "with it and be one without. Leave it out, or give the story a decoder for it."
                )
        yield from self.misfits

    def guide_only_text(self, name: str) -> str:
        """Return a sentence on a latent site that only the guide has."""
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
        """Yield a sentence for each name that the batch lacks, if that program also ignores a modality of the batch."""
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
    """Return a sentence on a program, "model" or "guide", that reads a modality where it is missing."""
    reader, then = ("guide", "posterior") if who == "guide" else ("story", "likelihood")
    text = f"{name}: the {reader} reads its values where they are missing, so that a {then} without them has "
    return text + "seen them. Ask batch.presence, or use batch.observe."


def reads_padding_text(who: str, name: str) -> str:
    """Return a sentence on a program, "model" or "guide", that reads what stands behind the end of sequences."""
    if who == "guide":
        reader, then, way = "guide", "posterior", "an encoder with a parameter lengths, such as those of mm.nn"
    else:
        reader, then, way = "story", "likelihood", "batch.observe, which counts the steps before the end alone"
    return (
        f"{name}: the {reader} reads what stands behind the end of its sequences, so that the {then} depends on their "
        f"padding. Use {way}."
    )


def reads_ahead_text(name: str) -> str:
    """Return a sentence on a network that predicts a token from that token, or from later ones."""
    return (
        f"{name}: the network of its tokens predicts a token from that token or a later one, so that the probabilities "
        "of all strings do not sum to 1. Mask its attention to later tokens, or take mm.nn.RecurrentTokens or "
        "mm.nn.AttentionTokens."
    )
