"""Small files in the formats of published data sets."""

from __future__ import annotations

import numpy as np
import scipy.io
from PIL import Image

NAMES = ["Bald", "Smiling", "Wearing_Hat"]


def write_svhn(folder, labels=((1, 10, 3, 3, 2), (10, 9, 1))):
    rng, held = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for part, y in zip(("train", "test"), labels, strict=True):
        x = rng.integers(0, 256, (32, 32, 3, len(y))).astype(np.uint8)
        scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": x, "y": np.array(y, np.uint8)[:, None]})
        held.append(x)
    return held


def write_celeba(folder, parts="00102002"):
    """Faces of one colour with a blue border outside the middle 148 pixels, and their attributes."""
    rng = np.random.default_rng(0)
    (folder / "img_align_celeba").mkdir(parents=True)
    colours, has = rng.integers(0, 200, (len(parts), 3)), rng.choice([-1, 1], (len(parts), 3))
    for n, colour in enumerate(colours):
        pixels = np.full((218, 178, 3), (0, 0, 255), np.uint8)
        pixels[35:183, 15:163] = colour
        path = folder / "img_align_celeba" / f"{n + 1:06}.jpg"
        Image.fromarray(pixels).save(path, quality=100, subsampling=0)
    rows = [f"{n + 1:06}.jpg  " + "  ".join(f"{a:2d}" for a in row) for n, row in enumerate(has)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(len(parts)), " ".join(NAMES) + " ", *rows]) + "\n")
    lines = [f"{n + 1:06}.jpg {part}" for n, part in enumerate(parts)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return colours / 255, has


def write_polymnist(folder, views=3):
    """0.3.png to 3.3.png and 0.7.png to 1.7.png in every view; six rows of training, and two of test."""
    rng, held = np.random.default_rng(0), {}
    for part, names in (("train", [f"{i}.{c}.png" for c, n in ((3, 4), (7, 2)) for i in range(n)]), ("test", TEST)):
        for m in range(views):
            (folder / part / f"m{m}").mkdir(parents=True)
            for name in names:
                pixels = rng.integers(0, 256, (28, 28, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / f"m{m}" / name)
                held[part, m, name] = pixels
    return held


TEST = ["0.1.png", "11.1.png"]
