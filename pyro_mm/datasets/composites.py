"""Modalities of one class put together out of sets that were made apart: rows are paired by label.

Training pairs are made of training rows alone, and test pairs of test rows. Which rows meet is drawn under ``seed``,
for training and test apart (:func:`pyro_mm.datasets.pairing.matched`), and so is the order of the pairs. ``repeat``
false uses no row of any set twice, and leaves rows of the larger set out; true uses all rows of the larger set once,
and those of the smaller set as evenly as can be. Another seed makes other pairs of the same rows. The class is the
covariate ``label``; ``binarize`` is that of :func:`~pyro_mm.datasets.mnist` and is of its images alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..batch.batch import Batch
from ..utils.arguments import check_flag, check_integer
from .files import Directory, Shape, arrays, check_rows, located
from .images import Binarize, Split, mnist
from .pairing import generator, matched
from .published import svhn
from .speech import clipped, log_mel
from .spelling import words

PHOTOGRAPHS = ("coffee", "cat", "hubble", "ihc", "retina", "rocket", "china", "flower")
SIDE = 28
CHUNK = 1000  # rows at once


def mnist_usps_word(
    directory: Directory = None, *, binarize: Binarize = None, repeat: bool = False, seed: int = 0
) -> Split:
    """A digit twice, and its name: MNIST, USPS (Hull 1994) and a word.

    Modalities: ``mnist`` ``(28, 28)`` and ``usps`` ``(16, 16)``, both float32 in [0, 1], and ``word``, int64 ``(6,)``
    with ``lengths`` (:func:`~pyro_mm.datasets.words`). The word follows from the label; nothing else is shared. 7,291
    training and 2,007 test rows, those of USPS; with ``repeat`` 60,000 and 10,000, those of MNIST.

    The terms of USPS are not stated where it is offered: its files are yours to find and are no part of this package.

    Args:
        directory: holds ``mnist/`` and ``usps/usps.npz``: ``x_train``, ``x_test`` ``(N, 16, 16)`` int16 from 0 to
            2000, ``y_train``, ``y_test`` ``(N,)``.
        binarize, repeat, seed: see the top of this module.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or not what it should be.
    """
    check_flag("repeat", repeat)
    (path,) = located("usps", ["usps.npz"], "usps", directory)
    side: Shape = (16, 16)
    usps = arrays(path, {
        "x_train": ("train", *side), "y_train": ("train",), "x_test": ("test", *side), "y_test": ("test",)
    })  # fmt: skip
    for images in usps[::2]:
        _check_range(path, "images", images, 0, 2000)
    for labels in usps[1::2]:
        _check_range(path, "labels", labels, 0, 9)

    def row(part: int, written: Batch) -> Batch:
        images, labels = usps[2 * part : 2 * part + 2]
        (i, j), label = matched([written["label"].numpy(), labels], generator(seed, part), repeat)
        grey, classes = torch.from_numpy(images[j].astype(np.float32) / 2000), torch.from_numpy(label)
        word, lengths = words(classes)
        values = {"mnist": written["image"][i], "usps": grey, "word": word}
        return Batch(values, covariates={"label": classes}, lengths={"word": lengths}).with_end_marks()

    train, test = mnist(directory, binarize=binarize)
    return row(0, train), row(1, test)


def mnist_speech(
    directory: Directory = None, *, binarize: Binarize = None, repeat: bool = False, seed: int = 0
) -> Split:
    """A digit written and spoken: MNIST and the Free Spoken Digit Dataset (Jackson et al., CC BY-SA 4.0).

    Modalities: ``mnist`` ``(28, 28)``, float32 in [0, 1], and ``sound`` ``(32, 32)``, a log-mel spectrogram of the
    middle 0.652 s (:func:`~pyro_mm.datasets.log_mel`), every band less its mean over training recordings and frames,
    divided by its standard deviation over them. Silence before and after short recordings is a constant: fix the
    scale of a density, or bound it from below. Covariates: ``label``, and ``speaker``, 0 to 5 by name. The recordings
    with an index below 5 are the test ones, as its authors have it; the six speakers are the same in both. 2,700
    training and 300 test rows; with ``repeat`` 60,000 and 10,000.

    Args:
        directory: holds ``mnist/`` and ``fsdd/fsdd.npz``: ``audio`` int16, ``offsets``, ``digit``, ``speaker``,
            ``index``.
        binarize, repeat, seed: see the top of this module.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or not what it should be.
    """
    check_flag("repeat", repeat)
    (path,) = located("fsdd", ["fsdd.npz"], "fsdd", directory)
    shapes: dict[str, Shape] = {"audio": ("samples",), "offsets": ("ends",)}
    shapes |= {name: ("recordings",) for name in ("digit", "speaker", "index")}
    audio, offsets, digit, speaker, index = arrays(path, shapes, texts=("speaker",))
    _check_range(path, "digits", digit, 0, 9)
    whole = len(offsets) == len(digit) + 1 and offsets[0] == 0 and offsets[-1] == len(audio)
    if not whole or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError(
            f"{path}: expected offsets that rise from 0 to the {len(audio)} samples, one for each recording"
        )
    sound = log_mel(clipped(audio, offsets))
    held = [np.flatnonzero(index >= 5), np.flatnonzero(index < 5)]
    deviation, mean = torch.std_mean(sound[held[0]], (0, 2), correction=0, keepdim=True)
    sound = (sound - mean) / deviation
    who = torch.from_numpy(np.unique(speaker, return_inverse=True)[1].astype(np.int64))

    def row(part: int, written: Batch) -> Batch:
        (i, j), label = matched([written["label"].numpy(), digit[held[part]]], generator(seed, part), repeat)
        j = held[part][j]
        covariates = {"label": torch.from_numpy(label), "speaker": who[j]}
        return Batch({"mnist": written["image"][i], "sound": sound[j]}, covariates=covariates)

    train, test = mnist(directory, binarize=binarize)
    return row(0, train), row(1, test)


def mnist_svhn(
    directory: Directory = None,
    *,
    binarize: Binarize = None,
    word: bool = False,
    repeat: bool = False,
    seed: int = 0,
) -> Split:
    """A digit written and on a house, and with ``word`` its name: MNIST and SVHN (Netzer et al. 2011).

    Modalities: ``mnist`` ``(28, 28)``, ``svhn`` ``(3, 32, 32)``, both float32 in [0, 1], and ``word`` as in
    :func:`mnist_usps_word`. Shi et al. 2019 (arXiv 1911.03393), who made pairs of the same two sets, used every image
    in up to 20 pairs (30 at test) of their own drawing.

    Args:
        directory: holds ``mnist/`` and what :func:`~pyro_mm.datasets.svhn` reads.
        binarize, repeat, seed: see the top of this module.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or not what it should be.
    """
    check_flag("repeat", repeat)
    check_flag("word", word)
    houses = svhn(directory)

    def row(part: int, written: Batch) -> Batch:
        house = houses[part]
        rows, label = matched([written["label"].numpy(), house["label"].numpy()], generator(seed, part), repeat)
        classes = torch.from_numpy(label)
        values, lengths = {"mnist": written["image"][rows[0]], "svhn": house["image"][rows[1]]}, {}
        if word:
            values["word"], lengths["word"] = words(classes)
        return Batch(values, covariates={"label": classes}, lengths=lengths).with_end_marks()

    train, test = mnist(directory, binarize=binarize)
    return row(0, train), row(1, test)


def mnist_photographs(
    directory: Directory = None,
    *,
    views: int = 5,
    rows: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
) -> Split:
    """MNIST on photographs: a digit of the same class on a crop of another photograph in every view.

    Made in the way of PolyMNIST (Sutter et al. 2021, arXiv 2105.02470) from other photographs: view m is a square of
    28 x 28 cut out of photograph m anywhere, inverted (1 - value, in each colour) where the digit's pixel is above
    half. Modalities ``m0`` to ``m4``, float32 ``(3, 28, 28)`` in [0, 1]: on coffee, a cat, stars, cells and a retina,
    then a rocket, a pagoda and a flower. The views of a row hold different digits of its class, and no digit is used
    twice in a view. Figures published for PolyMNIST are of other pictures.

    Args:
        directory: holds ``mnist/`` and ``backgrounds/backgrounds160.npz``, an array ``(H, W, 3)`` of bytes each.
        views: how many, 2 to 8.
        rows: how many, of training and test, drawn without replacement; None for all 60,000 and 10,000. A row of five
            views takes 47 kB: all of them 3.3 GB.
        seed: of digits, crops and order; fewer rows are not the first of more.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or a number is out of range.
    """
    check_integer("views", views, least=2, most=len(PHOTOGRAPHS))
    rows = check_rows(rows)
    (path,) = located("photographs", ["backgrounds160.npz"], "backgrounds", directory)
    photographs = arrays(path, {name: (f"height of {name}", f"width of {name}", 3) for name in PHOTOGRAPHS[:views]})
    for photograph in photographs:
        if photograph.dtype != np.uint8 or min(photograph.shape[:2]) < SIDE:
            raise ValueError(
                f"{path}: expected photographs of bytes and {SIDE} x {SIDE} pixels at least, got {photograph.dtype} "
                f"{photograph.shape}"
            )
    both = mnist(directory, binarize="threshold")

    def split(part: int) -> Batch:
        digits, labels = both[part]["image"].numpy() > 0, both[part]["label"].numpy()
        wanted = rows[part]
        n = len(labels) if wanted is None else wanted
        if not 1 <= n <= len(labels):
            raise ValueError(f"expected 1 to {len(labels)} rows, got {n}")
        rng = generator(seed, part)
        chosen = rng.permutation(len(labels))[:n]
        others = _others(labels, chosen, views, rng)
        values = {f"m{m}": _composed(digits, others[m], photographs[m], rng) for m in range(views)}
        return Batch(values, covariates={"label": torch.from_numpy(labels[chosen].astype(np.int64))})

    return split(0), split(1)


def _check_range(path: Path, what: str, values: np.ndarray, low: int, high: int) -> None:
    if values.min() < low or values.max() > high:
        raise ValueError(f"{path}: expected {what} from {low} to {high}, got {values.min()} to {values.max()}")


def _others(labels: np.ndarray, chosen: np.ndarray, views: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of the same class as the chosen ones, ``(views, n)``: of one row all different, of one view too."""
    found = np.empty((views, len(chosen)), np.int64)
    for c in np.unique(labels[chosen]):
        member, at = rng.permutation(np.flatnonzero(labels == c)), np.flatnonzero(labels[chosen] == c)
        # the class in one order, begun at another place in every view: independent orders would agree here and there
        starts = rng.choice(len(member), views, replace=views > len(member))
        found[:, at] = member[(np.arange(len(at)) + starts[:, None]) % len(member)]
    return found


def _composed(digits: np.ndarray, rows: np.ndarray, photograph: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Digits ``(N, 28, 28)`` inverted out of crops of a photograph: float32 ``(n, 3, 28, 28)``."""
    height, width, _ = photograph.shape
    tops, lefts = (rng.integers(0, side - SIDE + 1, len(rows)) for side in (height, width))
    planes, place = photograph.transpose(2, 0, 1), np.arange(SIDE)
    views = np.empty((len(rows), 3, SIDE, SIDE), np.float32)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        y, x = tops[part, None, None] + place[:, None], lefts[part, None, None] + place
        crops = planes[:, y, x].swapaxes(0, 1)
        views[part] = np.where(digits[rows[part], None], 255 - crops, crops)
    return torch.from_numpy(views).div_(255)
