"""The English names of the digits as sequences of letters: tokens, text, and a classifier of words."""

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
    """Spell the names of digits as tokens, one per letter.

    Token 0 is the end mark and the padding after it, tokens 1 to 26 are a to z, so that a ``Categorical`` with 27
    classes and event shape ``(6,)`` is a likelihood of words. The end mark is part of the word: a story that scores
    only the first ``lengths`` steps still gives probabilities that sum to 1 over words of all lengths.

    Args:
        labels: integers from 0 to 9, ``(N,)``.

    Returns:
        (tokens, lengths): int64 ``(N, 6)``, and the number of letters plus the end mark, int64 ``(N,)``.

    Raises:
        TypeError: ``labels`` is no tensor.
        ValueError: ``labels`` is no vector of integers from 0 to 9.

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
    """Convert tokens to text, up to the first end mark.

    Args:
        tokens: integers from 0 to 26, ``(N, L)``; a tensor or nested sequences.

    Returns:
        N strings.

    Raises:
        TypeError: ``tokens`` is no iterable.
        ValueError: a row is no sequence of integers from 0 to 26.

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
    """Classify words by the digit that they spell exactly; a classifier for ``metrics``.

    Args:
        tokens: tokens ``(N, L)``, or probabilities of letters ``(N, L, 27)``, whose argmax is read.

    Returns:
        float32 ``(N, 11)``: 1 at the class of the word, else 0; class 10 is any other string.

    >>> word_logits(words(torch.tensor([3]))[0]).argmax(-1)
    tensor([3])
    """
    if check_tensor("tokens", tokens).is_floating_point():
        check_tensor("tokens", tokens, ("N", "L", LETTERS))
        tokens = tokens.argmax(-1)
    place = {name: c for c, name in enumerate(NAMES)}
    classes = torch.tensor([place.get(text, len(NAMES)) for text in spell(tokens)], device=tokens.device)
    return torch.nn.functional.one_hot(classes, len(NAMES) + 1).float()
