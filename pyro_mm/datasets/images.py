"""Images with their labels: digits, which needs no file, and MNIST and Fashion-MNIST, which do.

Each function returns (train, test), two batches with the modalities ``image``, float32 in [0, 1], and
``label``, int64 of shape ``(N,)``. The meaning of a pixel differs, and so does any log-likelihood of it:

=================== ======================================================================================
``digits()``        8 x 8, 1 if the pixel is above 7 of 16, else 0
``binarize=``       28 x 28, for ``mnist()`` and ``fashion()``:
``"static"``        0 or 1, sampled once from Bernoulli(pixel / 255), in training and test rows; the default
``"threshold"``     0 or 1, 1 if pixel / 255 is above 0.5
``"dynamic"``       training pixels grey, to be sampled anew in every minibatch: ``fit(transform=
                    datasets.drawn("image"))``; test pixels as under ``"static"``
``None``            grey, pixel / 255: neither counts, nor continuous until noise is added
=================== ======================================================================================

Salakhutdinov & Murray 2008 sampled their binarised MNIST in the same way with other random numbers:
log-likelihoods are comparable in size, but not on the same data.
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
from ..utils.arguments import check_flag
from ..utils.global_state import preserve_process_settings
from .files import data_folder, read_decompressed

Binarize = Literal["static", "threshold", "dynamic"] | None
Split = tuple[Batch, Batch]

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SIZES = (47_040_016, 60_008, 7_840_016, 10_008)  # bytes of the uncompressed files
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
# Of the uncompressed files, since the compressed ones differ between mirrors.
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


def digits(*, grey: bool = False) -> Split:
    """Load handwritten digits of 8 x 8 pixels, which scikit-learn ships; no file is needed.

    Modalities: ``image``, float32 ``(8, 8)``, 1 if the pixel is above 7 of 16, else 0; ``label``, int64 ``()``, 0 to
    9. The split is fixed, and stratified by label. Licence: CC BY 4.0.

    Args:
        grey: True for the grey levels, sixteenths from 0 to 1.

    Returns:
        (train, test), 1,437 and 360 rows.

    References:
        Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (UCI).

    >>> digits()[0]
    Batch(size=1437, image(8, 8) present: all, label() present: all)
    """
    with preserve_process_settings():
        from sklearn.datasets import load_digits  # here, because it takes seconds
        from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = data.images / 16 if check_flag("grey", grey) else data.images > 7
    image = torch.from_numpy(pixels.astype(np.float32))
    label = torch.from_numpy(data.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(label)), test_size=360, random_state=0, stratify=data.target)
    return Batch({"image": image[train], "label": label[train]}), Batch({"image": image[test], "label": label[test]})


def mnist(directory: str | os.PathLike[str] | None = None, *, binarize: Binarize = "static") -> Split:
    """Load MNIST: handwritten digits of 28 x 28 pixels.

    Modalities: ``image``, float32 ``(28, 28)`` in [0, 1]; ``label``, int64 ``()``, 0 to 9. Licence: CC BY-SA 3.0.

    Missing files (11 MB in all) are downloaded over https from the mirrors in ``data/README.md`` into the folder
    ``pyro_mm`` of the user's cache, and read from there afterwards. Every file is checked by its SHA-256.

    Args:
        directory: a folder with the four idx files, compressed or not, in itself or in its folder ``mnist``; by
            default the folder named by the environment variable ``PYRO_MM_DATA``.
        binarize: the meaning of a pixel, see the top of this module.

    Returns:
        (train, test), 60,000 and 10,000 rows; 188 MB and 31 MB in memory.

    Raises:
        FileNotFoundError: a file is missing and cannot be downloaded.
        ValueError: a file is not the published one, or ``binarize`` is unknown.

    References:
        LeCun, Bottou, Bengio & Haffner 1998.
    """
    return _load_idx("mnist", directory, binarize)


def fashion(directory: str | os.PathLike[str] | None = None, *, binarize: Binarize = "static") -> Split:
    """Load Fashion-MNIST: articles of clothing of 28 x 28 pixels.

    Modalities, download (31 MB in all) and cache are as in :func:`mnist`. The images are grey by nature: their
    binarised form serves as a benchmark more than as pictures. Licence: MIT.

    Args:
        directory: as in :func:`mnist`, with a folder ``fashion``.
        binarize: the meaning of a pixel, see the top of this module.

    Returns:
        (train, test), 60,000 and 10,000 rows.

    Raises:
        FileNotFoundError: a file is missing and cannot be downloaded.
        ValueError: a file is not the published one, or ``binarize`` is unknown.

    References:
        Xiao, Rasul & Vollgraf 2017 (arXiv:1708.07747).
    """
    return _load_idx("fashion", directory, binarize)


def parse_idx(payload: bytes) -> np.ndarray:
    """Parse an uncompressed idx file of unsigned bytes.

    The header is two zero bytes, 8 for unsigned bytes, the number of dimensions, and each dimension as a
    big-endian 32-bit integer.

    Args:
        payload: the content of the file.

    Returns:
        The array, uint8, with the dimensions of the header.

    Raises:
        ValueError: the payload is no such file, or its length does not match the header.

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


def _load_idx(name: str, directory: str | os.PathLike[str] | None, binarize: Binarize) -> Split:
    """Load the four idx files of a data set."""
    if binarize not in ("static", "threshold", "dynamic", None):
        raise ValueError(f"expected binarize='static', 'threshold', 'dynamic' or None, got {binarize!r}")
    arrays = [parse_idx(_read_checked(name, i, directory)) for i in range(len(FILES))]
    of_train, of_test = (None, "static") if binarize == "dynamic" else (binarize, binarize)

    def batch(images: np.ndarray, labels: np.ndarray, kind: Binarize, seed: int) -> Batch:
        return Batch({"image": _binarize(images, kind, seed), "label": torch.from_numpy(labels.astype(np.int64))})

    train = batch(arrays[0], arrays[1], of_train, SEEDS[0])
    return train, batch(arrays[2], arrays[3], of_test, SEEDS[1])


def drawn(*names: str) -> Callable[[Batch], Batch]:
    """Make a transform of batches that samples each value in [0, 1] of the modalities from Bernoulli(value).

    Args:
        names: the modalities to sample, such as ``"image"``.

    Returns:
        A function from batch to batch, for ``fit(transform=...)``: the dynamic binarisation of grey pixels.

    >>> batch = Batch({"image": torch.tensor([[0.0, 1.0]])})
    >>> drawn("image")(batch)["image"]
    tensor([[0., 1.]])
    """

    def sample(batch: Batch) -> Batch:
        return batch.replaced({name: torch.bernoulli(batch[name]) for name in names})

    return sample


def _binarize(images: np.ndarray, binarize: Binarize, seed: int) -> torch.Tensor:
    """Convert bytes to float32 pixels in [0, 1] of the kind ``binarize``, which is not "dynamic"."""
    if binarize is None:
        return torch.from_numpy(images.astype(np.float32) / np.float32(255))
    if binarize == "threshold":
        return torch.from_numpy((images > 127).astype(np.float32))  # 127.5 is one half
    # uniform on 0 .. 254, so that P(u < pixel) is pixel / 255 exactly; from NumPy, whose draws are alike everywhere
    u = np.random.default_rng(seed).integers(0, 255, size=images.shape, dtype=np.uint8)
    return torch.from_numpy((u < images).astype(np.float32))


def _read_checked(name: str, i: int, directory: str | os.PathLike[str] | None) -> bytes:
    """Read the i-th of :data:`FILES`, uncompressed. Raises a ValueError unless its SHA-256 is the published one."""
    path = _find_or_download(name, FILES[i], directory)
    payload = read_decompressed(path, SIZES[i])
    found = hashlib.sha256(payload).hexdigest()
    expected = SHA256[name][i]
    if found != expected:
        raise ValueError(
            f"{path} is not {FILES[i]} of {name}: uncompressed, its SHA-256 is {found}, expected {expected}; "
            "delete it or put the right file there"
        )
    return payload


def _find_or_download(name: str, file: str, directory: str | os.PathLike[str] | None) -> Path:
    """Return the path of a file: in the data folder, or else in the cache, downloaded if it is not there."""
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
            # no hash here: it is taken after decompression, wherever the file comes from
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
