"""Multimodal data built by pairing rows of equal label from data sets of one modality each.

Training pairs are made of training rows only, and test pairs of test rows. These arguments mean the same everywhere:

* ``seed``: the seed of the pairs and of their order (see :func:`pyro_mm.datasets.pairing.match_rows`), with separate
  draws for training and test. Another seed pairs the same rows differently.
* ``repeat``: with False no row is used twice, and rows of the larger set are left out; with True every row of the
  larger set is used once, and those of the smaller set as evenly as possible.
* ``binarize``: that of :func:`~pyro_mm.datasets.mnist`, for the images of MNIST; here None (grey) by default.

The class is the covariate ``label``, int64 ``(N,)``. The files of MNIST are downloaded if they are missing, others are
not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..batch.batch import Batch
from ..utils.arguments import check_flag, check_integer
from .files import Directory, Shape, check_rows, locate_files, read_arrays
from .images import Binarize, Split, mnist
from .pairing import match_rows, numpy_generator
from .published import svhn
from .speech import clip_recordings, log_mel
from .spelling import words

PHOTOGRAPHS = ("coffee", "cat", "hubble", "ihc", "retina", "rocket", "china", "flower")
SIDE = 28
ROWS_AT_ONCE = 1000


def mnist_usps_word(
    directory: Directory = None, *, binarize: Binarize = None, repeat: bool = False, seed: int = 0
) -> Split:
    """Pair MNIST and USPS by digit, and add the digit's name.

    Modalities: ``mnist`` ``(28, 28)`` and ``usps`` ``(16, 16)``, float32 in [0, 1]; ``word``, int64 ``(6,)`` with
    ``lengths`` (see :func:`~pyro_mm.datasets.words`). The modalities share nothing but the label. The licence of USPS
    is not stated by those who offer it, so that its file is no part of this package.

    Args:
        directory: a folder with ``usps/usps.npz``, which holds ``x_train`` and ``x_test``, int16 ``(N, 16, 16)`` from
            0 to 2000, ``y_train`` and ``y_test``, ``(N,)``; and with the files of MNIST. By default ``PYRO_MM_DATA``.
        binarize, repeat, seed: see the top of this module.

    Returns:
        (train, test), 7,291 and 2,007 rows, those of USPS; with ``repeat`` 60,000 and 10,000, those of MNIST.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format.

    References:
        Hull 1994, A Database for Handwritten Text Recognition Research (USPS).
    """
    parts = []
    for images, classes in _pair_with_usps(directory, binarize, repeat, seed):
        word, lengths = words(classes)
        values = {**images, "word": word}
        parts.append(Batch(values, covariates={"label": classes}, lengths={"word": lengths}).with_end_marks())
    train, test = parts
    return train, test


def mnist_usps(directory: Directory = None, *, binarize: Binarize = None, repeat: bool = False, seed: int = 0) -> Split:
    """Pair MNIST and USPS by digit, with the digit as a modality.

    Modalities: ``mnist`` ``(28, 28)`` and ``usps`` ``(16, 16)``, float32 in [0, 1]; ``label``, int64 ``()``. The two
    images share nothing but the label. The licence of USPS is not stated by those who offer it.

    Args:
        directory: as in :func:`mnist_usps_word`.
        binarize, repeat, seed: see the top of this module; the pairs are those of :func:`mnist_usps_word`.

    Returns:
        (train, test), 7,291 and 2,007 rows, those of USPS; with ``repeat`` 60,000 and 10,000, those of MNIST.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format.

    References:
        Hull 1994, A Database for Handwritten Text Recognition Research (USPS).
    """
    pairs = _pair_with_usps(directory, binarize, repeat, seed)
    train, test = (Batch({**images, "label": classes}) for images, classes in pairs)
    return train, test


def _pair_with_usps(
    directory: Directory, binarize: Binarize, repeat: bool, seed: int
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Return the images ``mnist`` and ``usps`` of pairs, and their digits, for training and for test."""
    check_flag("repeat", repeat)
    (path,) = locate_files("usps", ["usps.npz"], "usps", directory)
    side: Shape = (16, 16)
    usps = read_arrays(path, {
        "x_train": ("train", *side), "y_train": ("train",), "x_test": ("test", *side), "y_test": ("test",)
    })  # fmt: skip
    for images in usps[::2]:
        _check_range(path, "images", images, 0, 2000)
    for labels in usps[1::2]:
        _check_range(path, "labels", labels, 0, 9)

    found = []
    for part, written in enumerate(mnist(directory, binarize=binarize)):
        images, labels = usps[2 * part : 2 * part + 2]
        (i, j), label = match_rows([written["label"].numpy(), labels], numpy_generator(seed, part), repeat)
        grey = torch.from_numpy(images[j].astype(np.float32) / 2000)
        found.append(({"mnist": written["image"][i], "usps": grey}, torch.from_numpy(label)))
    return found


def mnist_speech(
    directory: Directory = None, *, binarize: Binarize = None, repeat: bool = False, seed: int = 0
) -> Split:
    """Pair MNIST and recordings of the Free Spoken Digit Dataset by digit.

    Modalities: ``mnist``, float32 ``(28, 28)`` in [0, 1]; ``sound``, float32 ``(32, 32)``, the log-mel spectrogram of
    the middle 0.652 s (see :func:`~pyro_mm.datasets.log_mel`), each band standardised by its mean and standard
    deviation over training recordings and frames. Covariates: ``label``, and ``speaker``, 0 to 5 in alphabetical
    order; training and test have the same six speakers. Licence of the recordings: CC BY-SA 4.0.

    Silence before and after short recordings is constant: fix the scale of a density, or bound it from below.

    Args:
        directory: a folder with ``fsdd/fsdd.npz``, which holds ``audio`` int16 at 8 kHz, ``offsets`` ``(N + 1,)``,
            ``digit``, ``speaker`` and ``index`` ``(N,)``; and with the files of MNIST. By default ``PYRO_MM_DATA``.
        binarize, repeat, seed: see the top of this module.

    Returns:
        (train, test), 2,700 and 300 rows; with ``repeat`` 60,000 and 10,000. As its authors have it, recordings with
        an index below 5 are test rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format.

    References:
        Jackson et al., https://github.com/Jakobovski/free-spoken-digit-dataset.
    """
    check_flag("repeat", repeat)
    (path,) = locate_files("fsdd", ["fsdd.npz"], "fsdd", directory)
    shapes: dict[str, Shape] = {"audio": ("samples",), "offsets": ("ends",)}
    shapes |= {name: ("recordings",) for name in ("digit", "speaker", "index")}
    audio, offsets, digit, speaker, index = read_arrays(path, shapes, texts=("speaker",))
    _check_range(path, "digits", digit, 0, 9)
    covers_audio = len(offsets) == len(digit) + 1 and offsets[0] == 0 and offsets[-1] == len(audio)
    if not covers_audio or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError(
            f"{path}: expected offsets that rise from 0 to the {len(audio)} samples, one for each recording"
        )
    sound = log_mel(clip_recordings(audio, offsets))
    recordings = [np.flatnonzero(index >= 5), np.flatnonzero(index < 5)]  # to train on, to test on
    deviation, mean = torch.std_mean(sound[recordings[0]], (0, 2), correction=0, keepdim=True)
    sound = (sound - mean) / deviation
    speakers = torch.from_numpy(np.unique(speaker, return_inverse=True)[1].astype(np.int64))

    def pair(part: int, written: Batch) -> Batch:
        of_part = recordings[part]
        labels = [written["label"].numpy(), digit[of_part]]
        (i, j), label = match_rows(labels, numpy_generator(seed, part), repeat)
        j = of_part[j]
        covariates = {"label": torch.from_numpy(label), "speaker": speakers[j]}
        return Batch({"mnist": written["image"][i], "sound": sound[j]}, covariates=covariates)

    train, test = mnist(directory, binarize=binarize)
    return pair(0, train), pair(1, test)


def mnist_svhn(
    directory: Directory = None,
    *,
    binarize: Binarize = None,
    word: bool = False,
    repeat: bool = False,
    seed: int = 0,
) -> Split:
    """Pair MNIST and SVHN by digit, and with ``word`` add the digit's name.

    Modalities: ``mnist`` ``(28, 28)`` and ``svhn`` ``(3, 32, 32)``, float32 in [0, 1]; ``word`` as in
    :func:`mnist_usps_word`. SVHN is for non-commercial use only. Figures published for MNIST-SVHN are on other
    pairs: Shi et al. 2019 used every image in up to 20 pairs (30 at test).

    Args:
        directory: a folder with the files of :func:`~pyro_mm.datasets.svhn` and of MNIST; by default
            ``PYRO_MM_DATA``.
        word: add the modality ``word``.
        binarize, repeat, seed: see the top of this module.

    Returns:
        (train, test), as many rows as the labels allow.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format.

    References:
        Netzer et al. 2011 (SVHN); Shi et al. 2019 (arXiv:1911.03393).
    """
    check_flag("repeat", repeat)
    check_flag("word", word)
    houses = svhn(directory)

    def pair(part: int, written: Batch) -> Batch:
        house = houses[part]
        labels = [written["label"].numpy(), house["label"].numpy()]
        (i, j), label = match_rows(labels, numpy_generator(seed, part), repeat)
        classes = torch.from_numpy(label)
        values = {"mnist": written["image"][i], "svhn": house["image"][j]}
        lengths = {}
        if word:
            values["word"], lengths["word"] = words(classes)
        return Batch(values, covariates={"label": classes}, lengths=lengths).with_end_marks()

    train, test = mnist(directory, binarize=binarize)
    return pair(0, train), pair(1, test)


def mnist_photographs(
    directory: Directory = None,
    *,
    views: int = 5,
    rows: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
) -> Split:
    """Compose views of digits of one class on crops of photographs, in the way of PolyMNIST.

    View m is a random square of 28 x 28 pixels of photograph m, inverted (1 - value, in each colour) where the digit's
    pixel is above one half. Modalities: ``m0`` to ``m4`` by default, float32 ``(3, 28, 28)`` in [0, 1], on coffee, a
    cat, stars, cells and a retina; then ``m5`` to ``m7`` on a rocket, a pagoda and a flower. The views of a row hold
    different digits of its class, and no digit is used twice in a view. Figures published for PolyMNIST are on other
    photographs. Licences of the photographs: CC0, public domain and CC BY 2.0.

    Args:
        directory: a folder with ``backgrounds/backgrounds160.npz``, which holds the photographs as bytes
            ``(H, W, 3)``, and with the files of MNIST; by default ``PYRO_MM_DATA``.
        views: the number of modalities, 2 to 8.
        rows: numbers of training and test rows, sampled without replacement; None for all. A row of five views takes
            47 kB, all rows 3.3 GB.
        seed: the seed of digits, crops and order; fewer rows are not the first ones of more.

    Returns:
        (train, test), 60,000 and 10,000 rows by default.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a number is out of range.

    References:
        Sutter, Daunhawer & Vogt 2021 (arXiv:2105.02470).
    """
    check_integer("views", views, least=2, most=len(PHOTOGRAPHS))
    rows = check_rows(rows)
    (path,) = locate_files("photographs", ["backgrounds160.npz"], "backgrounds", directory)
    shapes = {name: (f"height of {name}", f"width of {name}", 3) for name in PHOTOGRAPHS[:views]}
    photographs = read_arrays(path, shapes)
    for photograph in photographs:
        if photograph.dtype != np.uint8 or min(photograph.shape[:2]) < SIDE:
            raise ValueError(
                f"{path}: expected photographs of bytes and {SIDE} x {SIDE} pixels at least, got {photograph.dtype} "
                f"{photograph.shape}"
            )
    both = mnist(directory, binarize="threshold")

    def split(part: int) -> Batch:
        digits = both[part]["image"].numpy() > 0
        labels = both[part]["label"].numpy()
        num_rows = rows[part]
        n = len(labels) if num_rows is None else num_rows
        if not 1 <= n <= len(labels):
            raise ValueError(f"expected 1 to {len(labels)} rows, got {n}")
        rng = numpy_generator(seed, part)
        chosen = rng.permutation(len(labels))[:n]
        others = _choose_rows_of_class(labels, chosen, views, rng)
        values = {f"m{m}": compose_view(digits, others[m], photographs[m], rng) for m in range(views)}
        return Batch(values, covariates={"label": torch.from_numpy(labels[chosen].astype(np.int64))})

    return split(0), split(1)


def _check_range(path: Path, what: str, values: np.ndarray, low: int, high: int) -> None:
    """Raise a ValueError that names the path unless all values lie in [low, high]."""
    if values.min() < low or values.max() > high:
        raise ValueError(f"{path}: expected {what} from {low} to {high}, got {values.min()} to {values.max()}")


def _choose_rows_of_class(labels: np.ndarray, chosen: np.ndarray, views: int, rng: np.random.Generator) -> np.ndarray:
    """Choose a digit of its class for each view of each row, without repetition within a row or within a view.

    Args:
        labels: the class of each digit, ``(N,)``.
        chosen: digits whose classes are those of the rows, ``(n,)``.
        views: the number of views.
        rng: the generator of the choice.

    Returns:
        Indices of digits, int64 ``(views, n)``.
    """
    found = np.empty((views, len(chosen)), np.int64)
    for c in np.unique(labels[chosen]):
        members = rng.permutation(np.flatnonzero(labels == c))
        rows = np.flatnonzero(labels[chosen] == c)
        # the class in one order that starts elsewhere in every view: independent orders would agree now and then
        starts = rng.choice(len(members), views, replace=views > len(members))
        found[:, rows] = members[(np.arange(len(rows)) + starts[:, None]) % len(members)]
    return found


def compose_view(
    digits: np.ndarray,
    rows: np.ndarray,
    photograph: np.ndarray,
    rng: np.random.Generator,
    rows_at_once: int = ROWS_AT_ONCE,
) -> torch.Tensor:
    """Invert random crops of a photograph where digits are set.

    Args:
        digits: the pixels of all digits, boolean ``(N, 28, 28)``.
        rows: indices of the digits to use, ``(n,)``.
        photograph: bytes ``(H, W, 3)``.
        rng: the generator of the crops.
        rows_at_once: rows that are cropped in one go, which bounds the memory.

    Returns:
        float32 ``(n, 3, 28, 28)`` in [0, 1].
    """
    height, width, _ = photograph.shape
    tops = rng.integers(0, height - SIDE + 1, len(rows))
    lefts = rng.integers(0, width - SIDE + 1, len(rows))
    planes = photograph.transpose(2, 0, 1)
    pixel = np.arange(SIDE)
    views = np.empty((len(rows), 3, SIDE, SIDE), np.float32)
    for start in range(0, len(rows), rows_at_once):
        part = slice(start, start + rows_at_once)
        y = tops[part, None, None] + pixel[:, None]
        x = lefts[part, None, None] + pixel
        crops = planes[:, y, x].swapaxes(0, 1)
        views[part] = np.where(digits[rows[part], None], 255 - crops, crops)
    return torch.from_numpy(views).div_(255)
