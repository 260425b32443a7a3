"""Small files in the layouts of MOSI, MMMO, POM, YouTube, MOSEI and IEMOCAP."""

from __future__ import annotations

import pickle

import h5py
import numpy as np

PARTS = {"train": 9, "valid": 3, "test": 4}
STEPS = 20


def padded(rng, rows, steps=STEPS, features=4, most=None):
    """Sequences that are padded in front: row i has 1 + i % (most or steps) steps, none of which is zero."""
    x = np.zeros((rows, steps, features), np.float32)
    for i in range(rows):
        length = 1 + i % (most or steps)
        x[i, steps - length :] = rng.uniform(1, 2, (length, features))
    return x


def utterance_arrays(rng):
    """Arrays of MOSI: the last feature of video never varies."""
    found = {}
    for part, n in (("train", 9), ("test", 4)):
        found |= {f"{m}_{part}": rng.normal(3, 5, (n, 3)).astype(np.float32) for m in ("text", "audio", "video")}
        found[f"video_{part}"][:, -1] = 0.1
        found[f"y_{part}"] = (np.arange(n) % 2).astype(np.uint8)
        found[f"id_{part}"] = np.array([f"{part}_video_{i}" for i in range(n)])
    return found


def sequence_arrays(rng, which):
    """Arrays of MMMO, POM or YouTube; text of held-out rows, except in POM."""
    found = {}
    for part, n in PARTS.items():
        found |= {f"audio_{part}": padded(rng, n), f"video_{part}": padded(rng, n, features=3, most=3)}
        if part != "train" and which != "pom":
            found[f"text_{part}"] = padded(rng, n, features=5)
        found[f"y_{part}"] = {
            "mmmo": rng.uniform(1, 5, n).astype(np.float32),
            "pom": rng.uniform(1, 7, (n, 17)).astype(np.float32),
            "youtube": np.eye(3, dtype=np.float32)[np.arange(n) % 3],
        }[which]
    return found


def write_npz(folder, file, arrays):
    (folder / "mosi").mkdir(exist_ok=True)
    np.savez(folder / "mosi" / file, **arrays)


def write_hdf5(folder, arrays):
    """One file per array, as published; text is called text_<part>_emb.h5."""
    folder.mkdir()
    for name, x in arrays.items():
        suffix = "_emb" if name.startswith("text") else ""
        with h5py.File(folder / f"{name}{suffix}.h5", "w") as file:
            file.create_dataset("data", data=x)


def utterance_splits(rng, labels, steps=(6, 6, 6), silence=True):
    """A dictionary of splits as those of MOSEI and IEMOCAP; an audio feature of one step is the logarithm of silence.

    Args:
        rng: NumPy's generator.
        labels: part -> labels.
        steps: numbers of steps of text, audio and video.
        silence: False for finite features alone.
    """
    found = {}
    for part, n in PARTS.items():
        text, audio, vision = (padded(rng, n, t, f) for t, f in zip(steps, (5, 4, 3), strict=True))
        if silence:
            audio[:, -1, 0] = -np.inf
        names = np.array([[f"{part}{i}".encode()] for i in range(n)])
        found[part] = {"text": text, "audio": audio, "vision": vision, "labels": labels[part], "id": names}
    return found


def write_pickle(path, value, protocol=pickle.DEFAULT_PROTOCOL):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))
