"""Data sets of people who speak: text, audio and video features of what they say, with sentiments and ratings.

All of them share these rules and arguments:

* All-zero steps of a sequence are padding, before, between and behind its steps: they are removed, and ``lengths``
  count the steps that are left. A modality that is zero throughout a row is missing there; its length is that of the
  row's longest other modality.
* ``aligned``: with False the steps of every modality are closed up, so that step t of one need not belong to step t of
  another. With True only the steps that all modalities lack are removed; all have one length, and a step that one of
  them lacks is zero (once standardised, the training rows' mean) and counts as data.
* ``standardise``: subtract the mean of the training rows from every feature, and divide by their standard deviation,
  both taken over the steps that are left. Labels stay as they are.
* ``constant``: features that never vary in the training rows are refused by an error (``"refuse"``), left out
  (``"drop"``), or kept and only centred (``"keep"``).
* A value beyond a million, or a held-out value more than a thousand standard deviations from the training rows' mean,
  is an error; so is a held-out row that is a training row, too.

Licences are for research, or not stated; nothing is shipped or downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..utils.arguments import check_choice, check_flag, check_name
from .files import BadFile, Directory, Shape, array_names, check_file_names, locate_files, read_arrays
from .images import Split
from .measurements import Preparation, sequences_split, vectors_split
from .scaling import Constant
from .serialized import read_hdf5, read_pickle

HeldOut = Literal["test", "validation"]

STEPS = 20
FEATURES = ("audio", "video")
RATINGS: dict[str, tuple[Shape, tuple[float, float]]] = {  # shape of the labels in the file, and their range
    "mmmo": ((), (1, 5)),
    "youtube": (("ratings",), (0, 1)),
    "pom": (("ratings",), (0, 7)),
}
EMOTIONS = ("neutral", "happy", "sad", "angry")


def mosi(directory: Directory = None, *, standardise: bool = True, constant: Constant = "drop") -> Split:
    """Load CMU-MOSI: text, audio, video and sentiment of utterances.

    Modalities: ``text`` ``(100,)``, ``audio`` ``(73,)`` and ``video`` ``(68,)``, float32; ``label``, int64 ``()``,
    1 if the sentiment is positive, else 0. The file has 100 features of video, of which 32 never vary. All features
    were fitted with the training labels: accuracies on training rows mean nothing, and no training row can serve as a
    validation row. For research only.

    Args:
        directory: a folder with ``mosi/mosi_utterance.npz``, which holds ``text_train``, ``text_test`` and so on,
            ``y_train`` and ``y_test``, and may hold ``id_train`` and ``id_test``, VIDEO_NUMBER; by default
            ``PYRO_MM_DATA``.
        standardise, constant: see the top of :mod:`pyro_mm.datasets.sentiment`.

    Returns:
        (train, test), 1,447 and 752 rows of other speakers.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, lacks an array, or holds one of another shape; a video is in both parts; a
            feature cannot be used.

    References:
        Zadeh et al. 2016 (arXiv:1606.06259).
    """
    preparation = Preparation(standardise, constant).check()
    (path,) = locate_files("mosi", ["mosi_utterance.npz"], "mosi", directory)
    names = ("text", "audio", "video", "y")
    shapes: dict[str, Shape] = {f"{n}_{part}": (part,) if n == "y" else (part, n) for part in PARTS for n in names}
    arrays = dict(zip(shapes, read_arrays(path, shapes), strict=True))
    _check_videos(path)
    labels = {part: arrays[f"y_{part}"] for part in PARTS}
    for part, y in labels.items():
        _check_labels(path, part, y, (0, 1), whole=True)
    parts = {part: {n: arrays[f"{n}_{part}"] for n in names[:-1]} for part in PARTS}
    return vectors_split(str(path), parts, {p: y.astype(np.int64) for p, y in labels.items()}, preparation)


PARTS = ("train", "test")


def sequences(
    which: Literal["mmmo", "youtube", "pom"],
    directory: Directory = None,
    *,
    standardise: bool = True,
    held_out: HeldOut = "test",
    text: bool = False,
    aligned: bool = False,
    constant: Constant = "refuse",
    allow_empty: bool = False,
) -> Split:
    """Load videos of speakers, as audio and video features at up to 20 steps, and ratings of them.

    Modalities: ``audio`` ``(20, A)`` and ``video`` ``(20, V)``, float32, with ``lengths``; and ``label``.

    ================ ======== ========== ==== == == ====================================================
    ``which``        training validation test A  V  label
    ================ ======== ========== ==== == == ====================================================
    ``"mmmo"``       220      40         80   74 36 ICT-MMMO: a rating from 1 to 5, float32 ``()``
    ``"youtube"``    173      36         60   74 36 int64 ``()``: 0 negative, 1 neutral, 2 positive
    ``"pom"``        600      100        203  43 41 POM: 17 ratings up to 7, float32 ``(17,)``
    ================ ======== ========== ==== == == ====================================================

    Of YouTube's training rows 72 % have neither audio nor video: they are refused unless ``allow_empty`` is True. In
    POM video is missing in more than half of the rows.

    Args:
        which: ``"mmmo"``, ``"youtube"`` or ``"pom"``.
        directory: a folder with ``mosi/<which>_mfn.npz``, which holds ``audio_train``, ``video_train``, ``y_train``
            and the same with ``_valid`` and ``_test``; or with the published HDF5 files, ``<which>/audio_train.h5`` and
            so on, of one array each. By default ``PYRO_MM_DATA``.
        standardise, aligned, constant: see the top of :mod:`pyro_mm.datasets.sentiment`.
        held_out: return the rows for ``"test"`` or for ``"validation"`` beside the training rows.
        text: add ``text`` ``(20, 300)``, word embeddings averaged per sentence, which are not scaled unless there are
            some to train on. As published, MMMO and YouTube have them for held-out rows only: text is missing in every
            training row. POM has none.
        allow_empty: accept training rows most of which have no modality but the label.

    Returns:
        (train, held out).

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, lacks an array or has no text; ``which`` or ``held_out`` is unknown; most
            training rows are empty; a held-out row is a training row; a feature or a rating cannot be used.

    References:
        Wöllmer et al. 2013 (ICT-MMMO); Morency et al. 2011 (YouTube); Park et al. 2014 (POM); the features are those of
        Zadeh et al. 2018 (arXiv:1802.00927).
    """
    check_choice("which", which, RATINGS)
    check_choice("held_out", held_out, ("test", "validation"))
    check_flag("text", text)
    preparation = Preparation(standardise, constant, aligned, allow_empty).check()
    other = "test" if held_out == "test" else "valid"
    source, arrays = _read_sequences(which, directory, ("train", other), text)

    bounds = RATINGS[which][1]
    names = ("text", *FEATURES) if text else FEATURES
    parts = {part: {name: arrays.get(f"{name}_{part}") for name in names} for part in ("train", other)}
    if text and parts[other]["text"] is None:
        raise ValueError(f"{source} has no text for {other} rows: leave text=False")
    labels = {}
    for part in parts:
        y = arrays[f"y_{part}"]
        _check_labels(source, part, y, bounds)
        labels[part] = _classes(source, part, y) if which == "youtube" else y.astype(np.float32)
    return sequences_split(str(source), parts, labels, preparation)


def mosei(
    directory: Directory = None,
    *,
    file: str = "mosei_senti_data.pkl",
    standardise: bool = True,
    held_out: HeldOut = "test",
    aligned: bool = False,
    constant: Constant = "refuse",
) -> Split:
    """Load CMU-MOSEI: text, audio and video of utterances at up to 50 steps, and their sentiment.

    Modalities, as published: ``text`` ``(50, 300)``, ``audio`` ``(50, 74)`` and ``video`` ``(50, 35)``, float32, with
    ``lengths``; ``label``, float32 ``()``, the sentiment from -3 to 3. For research only.

    Args:
        directory: a folder with ``mosei/<file>``; by default ``PYRO_MM_DATA``.
        file: a pickled dictionary: ``"train"``, ``"valid"`` and ``"test"`` -> ``"text"``, ``"audio"``, ``"vision"``
            ``(N, T, F)`` and ``"labels"`` ``(N, 1, 1)``. It is read without running code from it. In
            ``"mosei_senti_data_noalign.pkl"`` audio and video have more steps than there are words. An audio feature of
            minus infinity, the logarithm of silence, becomes 0, as in the code published with these files.
        standardise, aligned, constant: see the top of :mod:`pyro_mm.datasets.sentiment`.
        held_out: return the rows for ``"test"`` or for ``"validation"`` beside the training rows.

    Returns:
        (train, held out), as published 16,326 rows, and 4,659 for test or 1,871 for validation.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged or of another layout; a held-out row is a training row; a feature or a label
            cannot be used.

    References:
        Zadeh et al. 2018 (ACL, Multimodal Language Analysis in the Wild); Tsai et al. 2019 (arXiv:1906.00295), whose
        files these are.
    """
    preparation = Preparation(standardise, constant, aligned).check()
    path, parts, labels = _read_utterances("mosei", directory, file, held_out, (1, 1))
    for part, y in labels.items():
        _check_labels(path, part, y, (-3, 3))
    return sequences_split(str(path), parts, {p: y[:, 0, 0].astype(np.float32) for p, y in labels.items()}, preparation)


def iemocap(
    directory: Directory = None,
    *,
    file: str = "iemocap_data.pkl",
    standardise: bool = True,
    held_out: HeldOut = "test",
    aligned: bool = False,
    constant: Constant = "refuse",
) -> Split:
    """Load IEMOCAP: text, audio and video of utterances at up to 20 steps, and four emotions.

    Modalities, as published: ``text`` ``(20, 300)``, ``audio`` ``(20, 74)`` and ``video`` ``(20, 35)``, float32, with
    ``lengths``; ``label``, float32 ``(4,)``, 1 if the utterance is neutral, happy, sad, angry. For research only.

    Args:
        directory: a folder with ``iemocap/<file>``; by default ``PYRO_MM_DATA``.
        file: a pickled dictionary as in :func:`mosei`, with ``"labels"`` ``(N, 4, 2)``, of each emotion whether it is
            absent and whether it is there; ``"iemocap_data_noalign.pkl"`` likewise.
        standardise, aligned, constant: see the top of :mod:`pyro_mm.datasets.sentiment`.
        held_out: return the rows for ``"test"`` or for ``"validation"`` beside the training rows.

    Returns:
        (train, held out), as published 2,717 rows, and 938 for test or 798 for validation.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged or of another layout; a held-out row is a training row; a feature or a label
            cannot be used.

    References:
        Busso et al. 2008 (doi:10.1007/s10579-008-9076-6); Tsai et al. 2019 (arXiv:1906.00295), whose files these are.
    """
    preparation = Preparation(standardise, constant, aligned).check()
    path, parts, labels = _read_utterances("iemocap", directory, file, held_out, (len(EMOTIONS), 2))
    for part, y in labels.items():
        _check_labels(path, part, y, (0, 1), whole=True)
        if (y.sum(2) != 1).any():
            raise ValueError(
                f"{path}: expected {part} labels that are 1 for absent or for there, found both or neither"
            )
    return sequences_split(str(path), parts, {p: y[:, :, 1].astype(np.float32) for p, y in labels.items()}, preparation)


def _read_sequences(
    which: str, directory: Directory, parts: tuple[str, str], text: bool
) -> tuple[Path, dict[str, np.ndarray]]:
    """Read the arrays of MMMO, YouTube or POM, from an npz file or from one HDF5 file each.

    Args:
        which: the data set.
        directory: the folder of the data files.
        parts: the parts to read, as the files name them.
        text: read the text of those parts that have it.

    Returns:
        The file or folder, and ``<modality>_<part>`` -> array.
    """
    required = [f"{name}_{part}" for part in parts for name in (*FEATURES, "y")]
    texts = [f"text_{part}" for part in parts] if text else []
    try:
        (path,) = locate_files(which, [f"{which}_mfn.npz"], "mosi", directory)
    except FileNotFoundError:
        try:
            files = locate_files(which, [f"{name}.h5" for name in required], which, directory)
        except FileNotFoundError:
            files = []
        if not files:
            raise
        return files[0].parent, _read_hdf5_files(which, files[0].parent, required, texts)

    held = array_names(path)
    rating = RATINGS[which][0]
    wanted: dict[str, Shape] = {}
    for name in [*required, *(t for t in texts if t in held)]:
        modality, part = name.split("_")
        wanted[name] = (part, *rating) if modality == "y" else (part, STEPS, modality)
    return path, dict(zip(wanted, read_arrays(path, wanted), strict=True))


def _read_hdf5_files(which: str, folder: Path, required: list[str], texts: list[str]) -> dict[str, np.ndarray]:
    """Read arrays that have a file each, and check their shapes as those of an npz file are."""
    found = {name: read_hdf5(folder / f"{name}.h5") for name in required}
    for name in texts:
        path = folder / f"{name}_emb.h5"
        if path.exists():
            found[name] = read_hdf5(path)
    sizes: dict[str, int] = {}
    for name, x in found.items():
        modality, part = name.split("_")
        rank = 1 + len(RATINGS[which][0]) if modality == "y" else 3
        if modality == "y" and x.ndim == rank + 1 and x.shape[-1] == 1:
            x = found[name] = x[..., 0]
        fits = x.ndim == rank and len(x) == sizes.setdefault(part, len(x))
        fits = fits and x.shape[1:] == sizes.setdefault(modality, x.shape[1:])  # type: ignore[arg-type]
        if not fits:
            raise BadFile(f"{folder / name}.h5: an array of shape {x.shape} does not fit the others: {sizes}")
    return found


def _read_utterances(
    which: str, directory: Directory, file: str, held_out: str, event: tuple[int, ...]
) -> tuple[Path, dict[str, dict[str, np.ndarray | None]], dict[str, np.ndarray]]:
    """Read a pickled dictionary of splits.

    Args:
        which: the data set, and its folder.
        directory: the folder of the data files.
        file: the name of the file.
        held_out: ``"test"`` or ``"validation"``.
        event: the shape of a row's labels.

    Returns:
        The file; part -> modality -> ``(N, T, F)``; part -> labels ``(N, *event)``.
    """
    check_choice("held_out", held_out, ("test", "validation"))
    check_file_names(Path("file"), [check_name("file", file, what="file")])
    (path,) = locate_files(which, [file], which, directory)
    held = read_pickle(path)
    parts: dict[str, dict[str, np.ndarray | None]] = {}
    labels = {}
    for part in ("train", "test" if held_out == "test" else "valid"):
        split = held.get(part) if isinstance(held, Mapping) else None
        if not isinstance(split, Mapping):
            raise BadFile(f"{path}: expected a dictionary with the splits 'train', 'valid' and 'test', lacks {part!r}")
        labels[part] = _array(path, part, split, "labels", 1 + len(event))
        if labels[part].shape[1:] != event:
            raise BadFile(f"{path}: expected {part} labels (N, {', '.join(map(str, event))}), got {labels[part].shape}")
        parts[part] = {}
        for name, known_as in (("text", "text"), ("audio", "audio"), ("video", "vision")):
            x = _array(path, part, split, known_as, 3)
            if name == "audio":
                x = np.where(np.isneginf(x), x.dtype.type(0), x)
            if len(x) != len(labels[part]) or not np.isfinite(x).all():
                got = f"{len(x)} rows" if len(x) != len(labels[part]) else "NaN or infinity"
                raise BadFile(f"{path}: expected {len(labels[part])} rows of finite {part} {known_as}, got {got}")
            parts[part][name] = x
    return path, parts, labels


def _array(path: Path, part: str, split: Mapping[str, Any], name: str, rank: int) -> np.ndarray:
    """Return an array of numbers with ``rank`` dimensions. Raises a BadFile if a split lacks it."""
    x = split.get(name)
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf" or x.ndim != rank or not x.size:
        got = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"{type(x).__name__}, among {list(split)}"
        raise BadFile(f"{path}: expected {part} {name} as numbers of {rank} dimensions, got {got}")
    return x


def _check_videos(path: Path) -> None:
    """Raise a ValueError if utterances of one video are in both parts of a file that names them."""
    if not {"id_train", "id_test"} <= array_names(path):
        return
    ids = read_arrays(path, {"id_train": ("train",), "id_test": ("test",)}, texts=("id_train", "id_test"))
    train, test = ({str(name).rsplit("_", 1)[0] for name in part} for part in ids)
    if common := sorted(train & test):
        raise ValueError(
            f"{path}: utterances of {len(common)} videos are in both parts, of {common[0]} for instance, so that the "
            "split is a wrong one: a model recognises speakers; put each video into one part"
        )


def _check_labels(
    path: Path, part: str, labels: np.ndarray, bounds: tuple[float, float], *, whole: bool = False
) -> None:
    """Raise a ValueError that names the path unless labels lie within bounds, and are integers if ``whole``."""
    low = float(labels.min())
    high = float(labels.max())
    if not bounds[0] <= low <= high <= bounds[1] or (whole and (labels != np.round(labels)).any()):
        kind = "integers" if whole else "numbers"
        raise ValueError(f"{path}: expected {part} labels, {kind} from {bounds[0]} to {bounds[1]}, got {low} to {high}")


def _classes(path: Path, part: str, labels: np.ndarray) -> np.ndarray:
    """Return the classes, int64 ``(N,)``, of labels that are 1 in the column of their class: ``(N, C)``."""
    if ((labels != 0) & (labels != 1)).any() or (labels.sum(1) != 1).any():
        raise ValueError(f"{path}: expected {part} labels with a 1 in the column of the class and 0 elsewhere")
    classes: np.ndarray = labels.argmax(1).astype(np.int64)
    return classes
