"""Kanji of KanjiVG: picture, pen trajectory, components and number of strokes of each character."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from ..batch.batch import Batch
from ..utils.arguments import check_integer, check_number
from .files import Directory, data_folder
from .images import Split
from .pairing import numpy_generator
from .strokes import draw_strokes, parse_path, points_along

EXTENT = 109.0  # of a character, in the unit of its file
RADIUS = 0.75  # of a stroke in pixels
FIRST, LAST = 0x4E00, 0x9FFF  # CJK unified ideographs
FILE_NAME = re.compile(r"[0-9a-f]{5}\.svg")  # those of variants have a suffix, such as 04e14-Kaisho.svg


class _Character(NamedTuple):
    """A character.

    Attributes:
        codepoint: of Unicode.
        components: elements that it consists of, at all levels, without itself.
        strokes: polylines in the order of writing, ``(P, 2)`` each.
    """

    codepoint: int
    components: frozenset[str]
    strokes: list[np.ndarray]


def kanji(
    directory: Directory = None,
    *,
    side: int = 32,
    points: int = 4,
    least: int = 100,
    held_out: float = 0.15,
    seed: int = 0,
) -> Split:
    """Load kanji from the files of KanjiVG: four views of each character.

    Modalities:

    * ``image``, float32 ``(side, side)``, 0 or 1: the pixels within 0.75 pixels of a stroke;
    * ``pen``, float32 ``(T, 2 * points)`` with ``lengths``: the strokes in the order of writing, each as x and y of
      points at equal distances along it, from -1 to 1, with y growing downwards; T is the largest number of strokes;
    * ``components``, float32 ``(C,)``, 0 or 1: the elements that the character consists of at any level, itself left
      out, of those that stand in at least ``least`` characters: 70 of :func:`kanji_components`;
    * ``strokes``, int64 ``()``: their number, at most 30. It is the length of ``pen`` too.

    Covariate: ``codepoint``, int64 ``(N,)``, whose ``chr`` is the character. Characters are CJK unified ideographs from
    U+4E00 to U+9FFF; kana, letters and variants are left out. 115 of them have no component.

    The files are those of the Python package ``kanjivg``, an optional extra of this one: ``pip install
    "pyro-mm[kanji]"``. Nothing is downloaded. KanjiVG is copyright Ulrich Apel and released under the Creative Commons
    Attribution-Share Alike 3.0 licence, http://kanjivg.tagaini.net: what is made of it, such as these arrays, may be
    handed on under that licence alone, with this notice.

    Args:
        directory: a folder with the SVG files in itself or in its folder ``kanji``; by default those of the installed
            package, or else the folder named by ``PYRO_MM_DATA``.
        side: height and width of the image in pixels.
        points: points per stroke, 2 at least.
        least: the least number of characters that a component stands in.
        held_out: the share of characters that are test rows.
        seed: of the split.

    Returns:
        (train, test), 5,451 and 962 rows.

    Raises:
        FileNotFoundError: neither the package is installed nor a folder has such files.
        TypeError, ValueError: an argument of another kind or out of range; a file of another format; or no component
            stands in so many characters.

    References:
        Apel, KanjiVG, http://kanjivg.tagaini.net.
    """
    check_integer("side", side, least=4)
    check_integer("points", points, least=2)
    check_integer("seed", seed)
    check_number("held_out", held_out, above=0, below=1)
    characters = _read(directory)
    names = _frequent(characters, least)
    rows = _rows(characters, names, side, points)
    num_test = round(held_out * len(characters))
    if not 0 < num_test < len(characters):
        raise ValueError(f"held_out={held_out} of {len(characters)} characters leaves no training or no test row")
    order = torch.from_numpy(numpy_generator(seed, 0).permutation(len(characters)))
    return rows[order[num_test:]], rows[order[:num_test]]


def kanji_components(directory: Directory = None, *, least: int = 100) -> list[str]:
    """Return the components of kanji that stand in at least so many characters, the most frequent first.

    They are the entries of the modality ``components`` of :func:`kanji`, in their order.

    Args:
        directory: as in :func:`kanji`.
        least: the least number of characters.

    Raises:
        FileNotFoundError: there are no files.
        TypeError, ValueError: an argument of another kind, a file of another format, or no such component.
    """
    return _frequent(_read(directory), least)


def _rows(characters: list[_Character], names: list[str], side: int, points: int) -> Batch:
    """Return the four views of characters."""
    counts = np.array([len(character.strokes) for character in characters])
    pen = np.zeros((len(characters), counts.max(), 2 * points), np.float32)
    image = np.zeros((len(characters), side, side), np.float32)
    components = np.zeros((len(characters), len(names)), np.float32)
    for n, character in enumerate(characters):
        image[n] = draw_strokes(character.strokes, side, EXTENT, RADIUS)
        components[n] = [name in character.components for name in names]
        for t, line in enumerate(character.strokes):
            pen[n, t] = (2 * points_along(line, points) / EXTENT - 1).ravel()
    values = {"image": image, "pen": pen, "components": components, "strokes": counts.astype(np.int64)}
    codepoints = torch.tensor([character.codepoint for character in characters])
    return Batch(
        {name: torch.from_numpy(value) for name, value in values.items()},
        covariates={"codepoint": codepoints},
        lengths={"pen": torch.from_numpy(counts)},
    )


def _frequent(characters: list[_Character], least: int) -> list[str]:
    """Return the components that stand in at least so many characters, the most frequent first."""
    check_integer("least", least, least=1)
    counts = Counter(name for character in characters for name in character.components)
    found = sorted((name for name in counts if counts[name] >= least), key=lambda name: (-counts[name], name))
    if not found:
        most = max(counts.values(), default=0)
        raise ValueError(f"no component stands in at least least={least} characters: the most frequent is in {most}")
    return found


def _read(directory: Directory) -> list[_Character]:
    """Read all characters, in the order of their codepoints."""
    folder = _folder(directory)
    files = [path for path in sorted(folder.iterdir()) if FILE_NAME.fullmatch(path.name)]
    chosen = [path for path in files if FIRST <= int(path.stem, 16) <= LAST]
    if not chosen:
        raise FileNotFoundError(f"kanji: {folder} has no file of a character, such as 04e95.svg")
    return [_read_character(path) for path in chosen]


def _folder(directory: Directory) -> Path:
    """Return the folder of the SVG files.

    Raises:
        FileNotFoundError: there is none.
    """
    if directory is None:
        try:
            return Path(str(distribution("kanjivg").locate_file("kanji")))
        except PackageNotFoundError:
            pass
    root = data_folder(directory)
    for folder in () if root is None else (root / "kanji", root):
        if folder.is_dir() and any(FILE_NAME.fullmatch(path.name) for path in folder.iterdir()):
            return folder
    looked = "the package kanjivg is not installed" if directory is None else f"{root} has no such files"
    raise FileNotFoundError(
        f'kanji: {looked}. Install it, pip install "pyro-mm[kanji]", or put the SVG files of KanjiVG into '
        "DIRECTORY/kanji and give directory=DIRECTORY"
    )


def _read_character(path: Path) -> _Character:
    """Read a file of KanjiVG. Raises a ValueError that names it if it is of another format."""
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        strokes = [parse_path(node.get("d", "")) for node in root.iter() if node.tag.rpartition("}")[2] == "path"]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not a file of KanjiVG: {error}") from error
    if not strokes:
        raise ValueError(f"{path}: not a file of KanjiVG: it has no path")
    codepoint = int(path.stem, 16)
    elements = {
        value for node in root.iter() for key, value in node.attrib.items() if key.rpartition("}")[2] == "element"
    }
    return _Character(codepoint, frozenset(elements - {chr(codepoint)}), strokes)
