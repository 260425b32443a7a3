"""Data sets: functions that return (train, test), two batches without a common row.

A class that is a modality is called ``label``; a class that only says what rows were paired by is the covariate
``label``, int64 ``(N,)``, which no story reads unless it asks for it, and which ``metrics`` take as an argument.

========================== ======================================= =============================================
``digits()``               images of 8 x 8, label                  none
``mnist()``, ``fashion()`` images of 28 x 28, label                idx files, downloaded if missing
``mnist_usps()``           two images of a digit, label            ``mnist/``, ``usps/usps.npz``
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
``sequences()``            audio and video of 20 steps, ratings    ``mosi/*_mfn.npz``, or ``mmmo/*.h5`` and so on
``mosei()``                text, audio, video, sentiment           ``mosei/mosei_senti_data.pkl``
``iemocap()``              text, audio, video, four emotions       ``iemocap/iemocap_data.pkl``
``kanji()``                pictures, pens, components of kanji     the package ``kanjivg``
``scenes()``               digits and shapes, captions, attributes ``mnist/``, or none
========================== ======================================= =============================================

Files are read from ``directory=``, or else from the folder named by the environment variable ``PYRO_MM_DATA``;
``data/README.md`` lists their sources and licences. Only the idx files of MNIST (11 MB) and Fashion-MNIST (31 MB) are
ever downloaded, over https into the folder ``pyro_mm`` of the user's cache.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ..utils.arguments import check_name, check_path
from .captions import caption_text, parse_caption
from .composed_scenes import scenes
from .composites import mnist_photographs, mnist_speech, mnist_svhn, mnist_usps, mnist_usps_word
from .dequantization import dequantize, quantize
from .features import mfeat, nutrimouse
from .image_files import Pictures
from .images import FILES, SHA256, Split, digits, drawn, fashion, mnist, parse_idx
from .kanjivg import kanji, kanji_components
from .pairing import paired
from .published import celeba, celeba_pictures, polymnist, polymnist_pictures, svhn
from .sentiment import iemocap, mosei, mosi, sequences
from .speech import log_mel
from .spelling import spell, word_logits, words
from .stored import complete_rows

__all__ = [
    "FILES", "SHA256", "Pictures", "caption_text", "celeba", "celeba_pictures", "complete_rows", "dequantize", "digits",
    "drawn", "fashion", "iemocap", "kanji", "kanji_components", "load", "log_mel", "mfeat", "mnist",
    "mnist_photographs", "mnist_speech", "mnist_svhn", "mnist_usps", "mnist_usps_word", "mosei", "mosi", "nutrimouse",
    "paired", "parse_caption", "parse_idx", "polymnist", "polymnist_pictures", "quantize", "scenes", "sequences",
    "spell", "svhn", "word_logits", "words",
]  # fmt: skip


def load(name: str, *, directory: str | os.PathLike[str] | None = None, **options: Any) -> Split:
    """Load a data set by name.

    Args:
        name: the name of a function of this module with ``-`` for ``_``, such as ``"digits"`` or ``"mnist-svhn"``;
            ``"mmmo"``, ``"youtube"`` and ``"pom"`` load :func:`sequences`.
        directory: the folder of the data files, for data sets that need any.
        options: keyword arguments of the function of that name.

    Returns:
        (train, test).

    Raises:
        ValueError: the name is unknown.
        TypeError: an option is unknown.
        FileNotFoundError: files are missing.

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
    "mnist-usps": mnist_usps,
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
    "mosei": mosei,
    "iemocap": iemocap,
    "kanji": kanji,
    "scenes": scenes,
    "mmmo": partial(sequences, "mmmo"),
    "youtube": partial(sequences, "youtube"),
    "pom": partial(sequences, "pom"),
}
