"""Small data files in the place of the published ones."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pyro_mm import datasets
from pyro_mm.datasets import composites
from tests.support.idx_files import idx, write

TRAIN, TEST = 70, 30


PHOTOGRAPH = 40  # side


def strokes(rng, n):
    """Images whose first pixel tells the row, with a stroke of their own."""
    images = np.where(rng.random((n, 28, 28)) < 0.3, 255, 0).astype(np.uint8)
    images[:, 0, 0] = np.arange(n)
    return images


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with all files, in small. Rows of test sets are told by first pixels from 0 on, as those of training."""
    rng = np.random.default_rng(0)
    digits = [(strokes(rng, n), rng.integers(0, 3, n).astype(np.uint8)) for n in (TRAIN, TEST)]
    payloads = dict(zip(datasets.FILES, (idx(a) for pair in digits for a in pair), strict=True))
    monkeypatch.setitem(datasets.SHA256, "mnist", tuple(hashlib.sha256(p).hexdigest() for p in payloads.values()))
    write(payloads, tmp_path / "mnist")
    usps = {}
    for part, n in (("train", 40), ("test", 20)):
        images = rng.integers(0, 2001, (n, 16, 16)).astype(np.int16)
        images[:, 0, 0] = np.arange(n) + (1000 if part == "test" else 0)
        usps |= {f"x_{part}": images, f"y_{part}": rng.integers(0, 3, n).astype(np.uint8)}
    lengths = rng.integers(3000, 7000, 24)
    sounds = {
        "audio": rng.integers(-9000, 9000, lengths.sum()).astype(np.int16),
        "offsets": np.concatenate([[0], lengths.cumsum()]),
        "digit": np.arange(24).astype(np.uint8) % 3,
        "speaker": np.array(["theo", "george"])[np.arange(24) // 12],
        "index": (np.arange(24) % 12).astype(np.uint8),
    }
    photographs = {
        name: rng.integers(0, 256, (PHOTOGRAPH, PHOTOGRAPH, 3)).astype(np.uint8) for name in composites.PHOTOGRAPHS
    }
    for folder, file, arrays in (
        ("usps", "usps", usps),
        ("fsdd", "fsdd", sounds),
        ("backgrounds", "backgrounds160", photographs),
    ):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / f"{file}.npz", **arrays)
    return tmp_path, digits, usps, sounds, photographs
