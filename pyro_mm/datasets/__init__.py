"""Data sets, each a function that returns (train, test): two batches that share no row.

Where a modality is the class itself it is called ``label``; where it only says what rows were paired by, it is the
covariate ``label``, int64 of shape ``(N,)``: no story sees it unless it asks, and ``metrics`` can be given it.

========================== ======================================= ==========================================
``digits()``               images of 8 x 8, label                  no files needed
``mnist()``, ``fashion()`` images of 28 x 28, label                idx files, downloaded where absent
``mnist_usps_word()``      two images of a digit and its name      ``mnist/``, ``usps/usps.npz``
``mnist_speech()``         a digit written and spoken              ``mnist/``, ``fsdd/fsdd.npz``
``mnist_photographs()``    digits on up to eight photographs       ``mnist/``, ``backgrounds/``
``mnist_svhn()``           a digit written and on a house          ``mnist/``, ``svhn/``
``svhn()``                 house numbers, label                    ``svhn/*_32x32.mat``
``celeba()``               faces, attributes                       ``celeba/``
``polymnist()``            digits on photographs, as published     ``MMNIST/``
``mfeat()``                six sets of features of digits          ``multiview/mfeat.npz``
``nutrimouse()``           genes and lipids of mice                ``multiview/nutrimouse.npz``
``mosi()``                 text, audio, video, sentiment           ``mosi/mosi_utterance.npz``
``sequences()``            audio and video of 20 steps, ratings    ``mosi/*_mfn.npz``
========================== ======================================= ==========================================

Files are looked for in ``directory=``, or else in the folder that ``PYRO_MM_DATA`` names; ``data/README.md`` says
where they come from and under what terms. Nothing but the idx files is ever downloaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ..utils.arguments import check_name, check_path
from .composites import mnist_photographs, mnist_speech, mnist_svhn, mnist_usps_word
from .features import mfeat, mosi, nutrimouse, sequences
from .image_files import Pictures
from .images import FILES, SHA256, Split, digits, drawn, fashion, mnist, parse_idx
from .pairing import paired
from .published import celeba, celeba_pictures, polymnist, polymnist_pictures, svhn
from .speech import log_mel
from .spelling import spell, word_logits, words

__all__ = [
    "FILES", "SHA256", "Pictures", "celeba", "celeba_pictures", "digits", "drawn", "fashion", "load", "log_mel",
    "mfeat", "mnist", "mnist_photographs", "mnist_speech", "mnist_svhn", "mnist_usps_word", "mosi", "nutrimouse",
    "paired", "parse_idx", "polymnist", "polymnist_pictures", "sequences", "spell", "svhn", "word_logits", "words",
]  # fmt: skip


def load(name: str, *, directory: str | os.PathLike[str] | None = None, **options: Any) -> Split:
    """The data set of that name.

    Args:
        name: ``"digits"``, ``"mnist"``, ``"fashion"``, or that of another function with ``-`` for ``_``;
            ``"mmmo"``, ``"youtube"`` and ``"pom"`` are :func:`sequences`.
        directory: where the files are, for those that have any.
        options: keyword arguments of the function of that name.

    Returns:
        (train, test).

    Raises:
        ValueError: no data set has that name.

    >>> load("digits")[1]
    Batch(size=360, image(8, 8) present: all, label() present: all)
    """
    make = _DATASETS[check_name("name", name, _DATASETS, "data set")]
    if directory is not None:
        options["directory"] = check_path("directory", directory)
    known = inspect.signature(make).parameters
    if unknown := [option for option in options if option not in known]:
        raise TypeError(
            f"data set {name!r}: unknown option {unknown[0]!r}, expected one of {', '.join(known) or 'none'}"
        )
    return make(**options)


_DATASETS: dict[str, Callable[..., Split]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion": fashion,
    "mnist-usps-word": mnist_usps_word,
    "mnist-speech": mnist_speech,
    "mnist-photographs": mnist_photographs,
    "mnist-svhn": mnist_svhn,
    "svhn": svhn,
    "celeba": celeba,
    "polymnist": polymnist,
    "mfeat": mfeat,
    "nutrimouse": nutrimouse,
    "mosi": mosi,
    "mmmo": partial(sequences, "mmmo"),
    "youtube": partial(sequences, "youtube"),
    "pom": partial(sequences, "pom"),
}
