"""Images with their labels: digits, which needs no file, and MNIST and Fashion-MNIST, which do.

Each function returns (train, test), two batches with the modalities ``image``, float32 in [0, 1], and
``label``, int64 of shape ``(N,)``. What a pixel means differs, and so does any log-likelihood of it:

=================== ======================================================================================
``digits()``        8 x 8, 1 where the pixel is above 7 of 16, else 0
``binarize=``       28 x 28, of ``mnist()`` and ``fashion()``:
``"static"``        0 or 1, drawn once from Bernoulli(pixel / 255), train and test alike; the default
``"threshold"``     0 or 1, 1 where pixel / 255 is above 0.5
``"dynamic"``       training pixels grey, to be drawn anew every time they are used: ``fit(transform=
                    datasets.drawn("image"))``; test pixels as under ``"static"``
``None``            grey, pixel / 255: not counts, and no density until noise is added
=================== ======================================================================================

Salakhutdinov & Murray 2008 drew their binarised MNIST in the same way with other random numbers:
log-likelihoods are of the same size, not of the same data.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..batch.batch import Batch
from ..utils.global_state import preserve_process_settings
from .files import data_folder, unzipped

Binarize = Literal["static", "threshold", "dynamic"] | None
Split = tuple[Batch, Batch]

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SIZES = (47_040_016, 60_008, 7_840_016, 10_008)  # bytes of the uncompressed files, the most that is read
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion": (
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
# Of the uncompressed files: compressed ones differ from mirror to mirror.
SHA256 = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
SEEDS = (0, 1)  # of the static binarisation, train and test


def digits() -> Split:
    """Handwritten digits of 8 x 8 pixels, 1437 and 360 of them (Alpaydin & Kaynak 1998).

    scikit-learn ships them. A pixel is 1 where it is above 7 of 16. The split is a fixed one, drawn with
    equal shares of each label.
    """
    with preserve_process_settings():
        from sklearn.datasets import load_digits  # here, because it takes seconds
        from sklearn.model_selection import train_test_split

    data = load_digits()
    image = torch.from_numpy((data.images > 7).astype(np.float32))
    label = torch.from_numpy(data.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(label)), test_size=360, random_state=0, stratify=data.target)
    return Batch({"image": image[train], "label": label[train]}), Batch({"image": image[test], "label": label[test]})


def mnist(directory: str | os.PathLike[str] | None = None, *, binarize: Binarize = "static") -> Split:
    """Handwritten digits of 28 x 28 pixels, 60,000 and 10,000 of them (LeCun et al. 1998).

    Args:
        directory: holds the four idx files, compressed or not, itself or in a folder ``mnist``; by default
            what the environment variable ``PYRO_MM_DATA`` names. What is absent is downloaded into a cache.
        binarize: what a pixel is, see the top of this module.

    Raises:
        FileNotFoundError: the files are not there and cannot be downloaded.
        ValueError: a file is not the one that was published.
    """
    return _idx("mnist", directory, binarize)


def fashion(directory: str | os.PathLike[str] | None = None, *, binarize: Binarize = "static") -> Split:
    """Fashion-MNIST: articles of clothing of 28 x 28 pixels, 60,000 and 10,000 of them (Xiao et al. 2017).

    Grey by nature: binarised ones are a benchmark more than pictures. Arguments and errors are those of
    :func:`mnist`, with a folder ``fashion``.
    """
    return _idx("fashion", directory, binarize)


def parse_idx(payload: bytes) -> np.ndarray:
    """The array in an uncompressed idx file of unsigned bytes.

    The header is two zero bytes, 8 for unsigned bytes, the number of dimensions, and each dimension as a
    big-endian 32-bit integer.

    Raises:
        ValueError: it is no such file, or has not as many bytes as the header says.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
    array([5, 7], dtype=uint8)
    """
    if len(payload) < 4 or payload[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"expected an idx file of unsigned bytes, which starts with 00 00 08, got {payload[:4].hex(' ')}"
        )
    start = 4 + 4 * payload[3]
    shape = tuple(int(n) for n in np.frombuffer(payload[4:start], ">u4"))
    if len(shape) < payload[3] or len(payload) - start != math.prod(shape):
        raise ValueError(f"an idx file of shape {shape} needs {math.prod(shape)} bytes, got {len(payload) - start}")
    return np.frombuffer(payload, np.uint8, offset=start).reshape(shape)


def _idx(name: str, directory: str | os.PathLike[str] | None, binarize: Binarize) -> Split:
    if binarize not in ("static", "threshold", "dynamic", None):
        raise ValueError(f"expected binarize='static', 'threshold', 'dynamic' or None, got {binarize!r}")
    arrays = [parse_idx(_read(name, i, directory)) for i in range(len(FILES))]
    hows = (None, "static") if binarize == "dynamic" else (binarize, binarize)
    train, test = (
        Batch({"image": _pixels(images, how, seed), "label": torch.from_numpy(labels.astype(np.int64))})
        for images, labels, how, seed in zip(arrays[::2], arrays[1::2], hows, SEEDS, strict=True)
    )
    return train, test


def drawn(*names: str) -> Callable[[Batch], Batch]:
    """A transform of batches: each value in [0, 1] of these modalities becomes a draw from Bernoulli(value)."""

    def drawn(batch: Batch) -> Batch:
        return batch.replaced({name: torch.bernoulli(batch[name]) for name in names})

    return drawn


def _pixels(images: np.ndarray, binarize: Binarize, seed: int) -> torch.Tensor:
    if binarize is None:
        return torch.from_numpy(images.astype(np.float32) / np.float32(255))
    if binarize == "threshold":
        return torch.from_numpy((images > 127).astype(np.float32))  # 127.5 is one half
    # Uniform on 0 .. 254, so that P(u < pixel) is pixel / 255 exactly. From NumPy: alike on every device.
    u = np.random.default_rng(seed).integers(0, 255, size=images.shape, dtype=np.uint8)
    return torch.from_numpy((u < images).astype(np.float32))


def _read(name: str, i: int, directory: str | os.PathLike[str] | None) -> bytes:
    """The i-th file, uncompressed, and checked to be the one that was published."""
    path = _find(name, FILES[i], directory)
    payload = unzipped(path, SIZES[i])
    found, expected = hashlib.sha256(payload).hexdigest(), SHA256[name][i]
    if found != expected:
        raise ValueError(
            f"{path} is not {FILES[i]} of {name}: uncompressed, its SHA-256 is {found}, expected {expected}; "
            "delete it or put the right file there"
        )
    return payload


def _find(name: str, file: str, directory: str | os.PathLike[str] | None) -> Path:
    root = data_folder(directory)
    for folder in () if root is None else (root / name, root):
        for path in (folder / f"{file}.gz", folder / file):
            if path.is_file():
                return path
    with preserve_process_settings():
        import pooch  # here, because it takes seconds

    errors: list[OSError] = []
    tried: list[str] = []
    for mirror in MIRRORS[name]:
        url = f"{mirror}{file}.gz"
        try:
            # No hash here: what the file must be is checked after decompression, wherever it comes from.
            cache = pooch.os_cache("pyro_mm")
            return Path(pooch.retrieve(url, known_hash=None, fname=f"{name}-{file}.gz", path=cache))
        except OSError as error:  # that of requests is one too
            errors.append(error)
            tried.append(f"{url} ({type(error).__name__})")
    looked = "no directory was given" if root is None else f"it is neither in {root / name} nor in {root}"
    raise FileNotFoundError(
        f"{name}: {looked}, and neither {' nor '.join(tried)} can be downloaded. Put "
        f"{', '.join(f'{f}.gz' for f in FILES)} (or the same uncompressed) into DIRECTORY/{name}, and "
        "give directory=DIRECTORY or set the environment variable PYRO_MM_DATA to DIRECTORY."
    ) from errors[0]
