"""The English names of the digits as sequences of letters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from ..utils.arguments import check_tensor, describe

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 6  # the longest name and an end mark
LETTERS = 27  # the end mark and a to z


def words(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The names of digits, letter by letter.

    A token is 0 for the end and the padding after it, and 1 to 26 for a to z, so that ``Categorical`` with 27 classes
    and event shape ``(6,)`` is a likelihood of words. The end mark is part of the word: a story that scores its steps
    up to ``lengths`` alone still gives words of all lengths a probability that sums to 1.

    Args:
        labels: ``(N,)``, 0 to 9.

    Returns:
        (tokens, lengths): int64 ``(N, 6)``, and the letters and the end mark counted ``(N,)``.

    >>> words(torch.tensor([2]))
    (tensor([[20, 23, 15,  0,  0,  0]]), tensor([4]))
    """
    table = torch.tensor([[ord(c) - 96 for c in name] + [0] * (LENGTH - len(name)) for name in NAMES])
    lengths = torch.tensor([len(name) + 1 for name in NAMES])
    labels = check_tensor("labels", labels).cpu()
    whole = labels.long()
    if labels.dtype == torch.bool or labels.dim() != 1 or not torch.equal(whole.to(labels.dtype), labels):
        raise ValueError(f"expected labels of digits, whole numbers (N,), got {describe(labels)}")
    if len(labels) and not 0 <= int(whole.min()) <= int(whole.max()) < len(NAMES):
        raise ValueError(f"expected labels from 0 to 9, got {int(whole.min())} to {int(whole.max())}")
    labels = whole
    return table[labels], lengths[labels]


def spell(tokens: Iterable[Iterable[int]] | Tensor) -> list[str]:
    """Tokens ``(N, L)`` as text, up to the first end mark.

    >>> spell(words(torch.tensor([4, 0]))[0])
    ['four', 'zero']
    """
    rows = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    wanted = "expected tokens (N, L), integers from 0 to 26"
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise TypeError(f"{wanted}, got {describe(tokens)}")
    rows = [list(row) if isinstance(row, Iterable) and not isinstance(row, str) else None for row in rows]
    if any(row is None or not all(isinstance(t, Integral) and 0 <= int(t) <= 26 for t in row) for row in rows):
        raise ValueError(f"{wanted}, got {describe(tokens)}")
    return ["".join(chr(96 + t) if t else " " for t in row).split(" ")[0] for row in rows]


def word_logits(tokens: Tensor) -> Tensor:
    """A classifier of words for ``metrics``: which digit is spelled, letter for letter.

    Args:
        tokens: ``(N, L)``, or probabilities of the letters ``(N, L, 27)``, of which the likeliest are read.

    Returns:
        ``(N, 11)``: 1 for the digit, else 0; class 10 is anything that is not the name of a digit.
    """
    if check_tensor("tokens", tokens).is_floating_point():
        check_tensor("tokens", tokens, ("N", "L", LETTERS))
        tokens = tokens.argmax(-1)
    place = {name: c for c, name in enumerate(NAMES)}
    classes = torch.tensor([place.get(text, len(NAMES)) for text in spell(tokens)], device=tokens.device)
    return torch.nn.functional.one_hot(classes, len(NAMES) + 1).float()
