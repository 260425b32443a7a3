"""Scenes: a coloured digit and a coloured shape on a canvas, with a caption, attributes and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_choice, check_integer, check_names
from .captions import COLOURS, RELATIONS, SHAPES, caption_tokens
from .files import Directory, check_rows
from .images import Split, digits, mnist
from .pairing import numpy_generator
from .spelling import NAMES

Numbers = tuple[int, int]

MODALITIES = ("image", "caption", "attributes")
RGB = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)  # of COLOURS
INK = 0.35  # a pixel of a digit is set if at least this share of it is ink
ROWS = (10_000, 4_000)


def scenes(
    directory: Directory = None,
    *,
    rows: Numbers = ROWS,
    side: int = 32,
    source: Literal["mnist", "digits"] = "mnist",
    modalities: Sequence[str] = MODALITIES,
    held_out: int = 1,
    seed: int = 0,
) -> Split:
    """Draw scenes of a coloured digit and a coloured shape, with a caption that describes all of it.

    Digits are MNIST's, at half their size for the default canvas, in training rows training digits and in test rows
    test digits. Six colours, four shapes of random size, and four relations of the digit to the shape: "left" and
    "right" for boxes that overlap from top to bottom but not from left to right, "above" and "below" the other way
    round, so that exactly one of them holds. Modalities:

    * ``image``, float32 ``(3, side, side)``, 0 or 1: red, green and blue;
    * ``caption``, int64 ``(10,)`` with ``lengths``: tokens of ``datasets.captions.VOCABULARY``, such as "a red seven
      left of a blue square", ended and padded by token 0, which the length counts once. Either object may be named
      first, as often as the other;
    * ``attributes``, float32 ``(26,)``, 0 or 1: one-hot vectors of digit, digit's colour, shape and shape's colour.

    Covariates, int64 ``(N,)``: ``digit``, ``digit_colour``, ``shape``, ``shape_colour``, ``relation``, ``digit_first``
    (fields of :class:`~pyro_mm.datasets.captions.Description`), and ``held_out``, 1 in test rows with a combination
    that no training row has; and ``boxes``, float32 ``(N, 2, 4)``: left, top, right and bottom edge of the digit and
    of the shape, as shares of the canvas. Each colour lacks ``held_out`` digits and as many shapes in training rows;
    about a third of the test rows has a held-out combination by default.

    Args:
        directory: a folder with the files of :func:`~pyro_mm.datasets.mnist`, which are downloaded if missing.
        rows: numbers of training and test rows. Digits are used again once all of them have been used.
        side: height and width of the canvas in pixels, at least 16.
        source: ``"digits"`` takes the digits of 8 x 8 pixels that scikit-learn ships, and needs no file.
        modalities: those that the batches hold.
        held_out: digits, and shapes, that each colour lacks in training rows, 0 to 2.
        seed: the seed of scenes and of held-out combinations.

    Returns:
        (train, test). A row takes 12 kB at the default size.

    Raises:
        FileNotFoundError: files of MNIST are missing and cannot be downloaded.
        TypeError, ValueError: an argument of another kind or out of range.

    References:
        Wu & Goodman 2019 (arXiv:1912.05075), for scenes of coloured digits and shapes with captions; theirs differ.

    >>> train, test = scenes(source="digits", rows=(8, 4))
    >>> train
    Batch(size=8, image(3, 32, 32) present: all, caption(10,) present: all, attributes(26,) present: all)
    >>> train.covariates["boxes"].shape
    torch.Size([8, 2, 4])
    """
    check_choice("source", source, ("mnist", "digits"))
    check_integer("side", side, least=16)
    check_integer("held_out", held_out, least=0, most=2)
    check_integer("seed", seed)
    chosen = check_names("modalities", modalities, MODALITIES, least=1)
    numbers = check_rows(rows)
    both = digits() if source == "digits" else mnist(directory, binarize=None)
    missing = [_held_out(things, held_out, numpy_generator(seed, 2 + i)) for i, things in enumerate((NAMES, SHAPES))]

    def split(part: int) -> Batch:
        number = ROWS[part] if numbers[part] is None else numbers[part]
        assert number is not None
        return _draw(both[part], number, side, missing, part == 0, numpy_generator(seed, part), chosen)

    return split(0), split(1)


def _held_out(things: Sequence[str], number: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the things that each colour lacks, as evenly as possible, boolean ``(things, colours)``."""
    order = rng.permutation(len(things))
    missing = np.zeros((len(things), len(COLOURS)), bool)
    for colour in range(len(COLOURS)):
        for i in range(number):
            missing[order[(colour * number + i) % len(things)], colour] = True
    return missing


def _draw(
    written: Batch,
    rows: int,
    side: int,
    missing: Sequence[np.ndarray],
    training: bool,
    rng: np.random.Generator,
    modalities: Sequence[str],
) -> Batch:
    """Sample scenes and draw them.

    Args:
        written: digits with their labels.
        rows: the number of scenes N.
        side: of the canvas.
        missing: the held-out combinations of digits and colours, and of shapes and colours, boolean.
        training: leave held-out combinations out.
        rng: the generator of everything.
        modalities: those of the batch.
    """
    order = rng.permutation(written.size)[np.arange(rows) % written.size]
    digit = written["label"].numpy()[order]
    shape = rng.integers(0, len(SHAPES), rows)
    factors = {"digit": digit, "digit_colour": _colours(missing[0], digit, training, rng), "shape": shape}
    factors["shape_colour"] = _colours(missing[1], shape, training, rng)
    factors["relation"] = rng.integers(0, len(RELATIONS), rows)
    factors["digit_first"] = rng.integers(0, 2, rows)

    size = 7 * side // 16  # of a digit with its margin
    patches = [_digit_patches(written["image"], size)[order], _shape_patches(shape, size, rng)]
    extents = [_extents(patch) for patch in patches]
    corners = _place(factors["relation"], extents, side, rng)
    image = np.zeros((rows, 3, side, side), np.float32)
    for patch, corner, colour in zip(patches, corners, ("digit_colour", "shape_colour"), strict=True):
        n, y, x = patch.nonzero()
        image[n, :, corner[n, 1] + y, corner[n, 0] + x] = RGB[factors[colour][n]]

    boxes = np.stack([np.concatenate([a, a + e], 1) for a, e in zip(corners, extents, strict=True)], 1) / side
    is_missing = missing[0][digit, factors["digit_colour"]] | missing[1][shape, factors["shape_colour"]]
    covariates = {name: torch.from_numpy(value.astype(np.int64)) for name, value in factors.items()}
    covariates |= {"held_out": torch.from_numpy(is_missing.astype(np.int64)), "boxes": torch.from_numpy(boxes).float()}
    tokens, lengths = caption_tokens(factors)
    values = {"image": torch.from_numpy(image), "caption": tokens, "attributes": _attributes(covariates)}
    of_caption = {"caption": lengths} if "caption" in modalities else {}
    return Batch({name: values[name] for name in modalities}, covariates=covariates, lengths=of_caption)


def _colours(missing: np.ndarray, things: np.ndarray, training: bool, rng: np.random.Generator) -> np.ndarray:
    """Sample a colour for each thing, in training rows one that it has there, ``(N,)``."""
    keys = rng.uniform(size=(len(things), len(COLOURS)))
    if training:
        keys[missing[things]] = -1.0
    colours: np.ndarray = keys.argmax(1)
    return colours


def _attributes(factors: dict[str, Tensor]) -> Tensor:
    """Return one-hot vectors of digits, shapes and their colours side by side, float32 ``(N, 26)``."""
    numbers = {"digit": len(NAMES), "digit_colour": len(COLOURS), "shape": len(SHAPES), "shape_colour": len(COLOURS)}
    return torch.cat([torch.nn.functional.one_hot(factors[name], n) for name, n in numbers.items()], 1).float()


def _digit_patches(images: Tensor, size: int) -> np.ndarray:
    """Scale grey digits to ``size`` pixels, threshold them and move their ink to the upper left corner.

    Returns:
        boolean ``(N, size, size)``.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.double(), size).numpy()
    ink = small >= np.minimum(INK, small.max((1, 2), keepdims=True))
    return _to_corner(ink)


def _shape_patches(shapes: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw shapes of half of ``size`` to ``size`` pixels into the upper left corner, boolean ``(N, size, size)``."""
    sizes = rng.integers((size + 1) // 2, size + 1, len(shapes))[:, None, None]
    y = np.arange(size)[:, None]
    x = np.arange(size)
    middle = (sizes - 1) / 2
    inside = (x < sizes) & (y < sizes)
    arm = sizes / 6
    forms = np.select(
        [shapes[:, None, None] == s for s in range(len(SHAPES))],
        [
            inside,
            (x - middle) ** 2 + (y - middle) ** 2 <= (sizes / 2) ** 2,
            np.abs(x - middle) <= (y + 1) / 2,
            (np.abs(x - middle) <= arm) | (np.abs(y - middle) <= arm),
        ],
    )
    return forms & inside


def _to_corner(ink: np.ndarray) -> np.ndarray:
    """Move the ink of patches to their upper left corner."""
    n, y, x = ink.nonzero()
    top = ink.any(2).argmax(1)
    left = ink.any(1).argmax(1)
    moved = np.zeros_like(ink)
    moved[n, y - top[n], x - left[n]] = True
    return moved


def _extents(patches: np.ndarray) -> np.ndarray:
    """Return width and height of what is drawn into the upper left corner of patches, ``(N, 2)``."""
    size = patches.shape[1]
    lines = np.stack([patches.any(1), patches.any(2)], 1)  # columns and rows with ink, (N, 2, size)
    extents: np.ndarray = size - lines[..., ::-1].argmax(-1)
    return extents


def _place(
    relation: np.ndarray, extents: Sequence[np.ndarray], side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sample the upper left corners of two boxes that are in a relation.

    Args:
        relation: of the first box to the second, an index into ``RELATIONS``, ``(N,)``.
        extents: width and height of the two boxes, ``(N, 2)`` each, of which two fit side by side.
        side: of the canvas.
        rng: the generator.

    Returns:
        x and y of the first box and of the second, ``(N, 2)`` each.
    """
    rows = np.arange(len(relation))
    along = relation // 2  # the axis that divides the boxes: 0 for x, 1 for y
    across = 1 - along
    is_second = relation % 2 == 1  # the first box is the one further to the right, or further down
    first = np.where(is_second[:, None], extents[1], extents[0])
    second = np.where(is_second[:, None], extents[0], extents[1])

    a = np.zeros((len(rows), 2), np.int64)
    b = np.zeros_like(a)
    a[rows, along] = rng.integers(0, side - first[rows, along] - second[rows, along] + 1)
    b[rows, along] = rng.integers(a[rows, along] + first[rows, along], side - second[rows, along] + 1)
    a[rows, across] = rng.integers(0, side - first[rows, across] + 1)
    lowest = np.maximum(0, a[rows, across] - second[rows, across] + 1)
    highest = np.minimum(side - second[rows, across], a[rows, across] + first[rows, across] - 1)
    b[rows, across] = rng.integers(lowest, highest + 1)
    corners = np.where(is_second[:, None], b, a), np.where(is_second[:, None], a, b)
    return corners
