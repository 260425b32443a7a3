"""Captions of scenes: a grammar of colours, digits, shapes and relations, as tokens and as text."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import check_tensor, describe
from .spelling import NAMES

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("square", "disc", "triangle", "cross")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = (1, 0, 3, 2)  # the relation of the second object to the first
VOCABULARY = ("", "a", "of", *COLOURS, *NAMES, *SHAPES, *RELATIONS)  # token 0 is the end mark
PLACES = 10  # tokens of the longest caption, its end mark among them

_OBJECT = rf"a (?P<{{0}}_colour>{'|'.join(COLOURS)}) (?P<{{0}}>{'|'.join((*NAMES, *SHAPES))})"
_CAPTION = re.compile(
    f"{_OBJECT.format('first')} (?P<relation>left of|right of|above|below) {_OBJECT.format('second')}"
)
_TOKEN = {word: token for token, word in enumerate(VOCABULARY)}


class Description(NamedTuple):
    """The scene that a caption describes, by indices.

    Attributes:
        digit: 0 to 9.
        digit_colour: an index into ``COLOURS``.
        shape: an index into ``SHAPES``.
        shape_colour: an index into ``COLOURS``.
        relation: of the digit to the shape, an index into ``RELATIONS``.
        digit_first: 1 if the caption names the digit first, else 0.
    """

    digit: int
    digit_colour: int
    shape: int
    shape_colour: int
    relation: int
    digit_first: int


def caption_tokens(factors: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Write the captions of scenes as tokens.

    Args:
        factors: the fields of :class:`Description`, integers ``(N,)`` each.

    Returns:
        (tokens, lengths): int64 ``(N, 10)``, padded by the end mark 0; and the number of tokens with one end mark,
        int64 ``(N,)``.
    """
    digit_first = factors["digit_first"] == 1
    things = {"digit": factors["digit"] + _TOKEN[NAMES[0]], "shape": factors["shape"] + _TOKEN[SHAPES[0]]}
    colours = {name: factors[f"{name}_colour"] + _TOKEN[COLOURS[0]] for name in things}
    first = [np.where(digit_first, of["digit"], of["shape"]) for of in (colours, things)]
    second = [np.where(digit_first, of["shape"], of["digit"]) for of in (colours, things)]
    relation = np.where(digit_first, factors["relation"], np.array(OPPOSITE)[factors["relation"]])

    article, of = (np.full(len(relation), _TOKEN[word]) for word in ("a", "of"))
    end = np.zeros_like(article)
    across = [article, *first, relation + _TOKEN["left"], of, article, *second, end, end]
    upright = [article, *first, relation + _TOKEN["left"], article, *second, end, end, end]
    is_across = relation < 2
    tokens = np.where(is_across[:, None], np.stack(across, 1), np.stack(upright, 1)).astype(np.int64)
    return torch.from_numpy(tokens), torch.from_numpy(np.where(is_across, PLACES - 1, PLACES - 2).astype(np.int64))


def caption_text(tokens: Tensor) -> list[str]:
    """Convert captions from tokens to text, up to the first end mark.

    Args:
        tokens: integers from 0 to 26, ``(N, T)``.

    Returns:
        N strings.

    Raises:
        TypeError: no tensor.
        ValueError: no integers from 0 to 26 of two dimensions.

    >>> caption_text(torch.tensor([[1, 3, 16, 23, 2, 1, 5, 19, 0]]))
    ['a red seven left of a blue square']
    """
    check_tensor("tokens", tokens, ("N", "T"))
    outside = tokens.numel() > 0 and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(VOCABULARY)
    if tokens.is_floating_point() or tokens.dtype == torch.bool or outside:
        raise ValueError(f"expected tokens, integers from 0 to {len(VOCABULARY) - 1}, got {describe(tokens)}")
    texts = []
    for row in tokens.tolist():
        end = row.index(0) if 0 in row else len(row)
        texts.append(" ".join(VOCABULARY[token] for token in row[:end]))
    return texts


def parse_caption(text: str) -> Description:
    """Parse a caption into the scene that it describes.

    The grammar, in which one object is a digit and the other a shape::

        caption  = object relation object
        object   = "a" colour (digit | shape)
        relation = "left of" | "right of" | "above" | "below"

    Args:
        text: the caption.

    Returns:
        The scene; the relation is that of the digit to the shape, in whichever order the caption names them.

    Raises:
        TypeError: no string.
        ValueError: the text is no sentence of the grammar.

    >>> parse_caption("a blue square right of a red seven")
    Description(digit=7, digit_colour=0, shape=0, shape_colour=2, relation=0, digit_first=0)
    """
    if not isinstance(text, str):
        raise TypeError(f"expected the text of a caption, got {describe(text)}")
    match = _CAPTION.fullmatch(text)
    if match is None or (match["first"] in NAMES) == (match["second"] in NAMES):
        raise ValueError(
            f"{text!r} is no caption: expected 'a COLOUR DIGIT RELATION a COLOUR SHAPE', or digit and shape exchanged, "
            f"with a colour of {', '.join(COLOURS)}, a digit from zero to nine, a shape of {', '.join(SHAPES)}, and "
            "'left of', 'right of', 'above' or 'below'"
        )
    is_first = match["first"] in NAMES
    digit, shape = ("first", "second") if is_first else ("second", "first")
    relation = RELATIONS.index(match["relation"].removesuffix(" of"))
    return Description(
        digit=NAMES.index(match[digit]),
        digit_colour=COLOURS.index(match[f"{digit}_colour"]),
        shape=SHAPES.index(match[shape]),
        shape_colour=COLOURS.index(match[f"{shape}_colour"]),
        relation=relation if is_first else OPPOSITE[relation],
        digit_first=int(is_first),
    )
