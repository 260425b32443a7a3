"""Pictures of a study: images of each member in a file of its own, and figures that show all members side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.atomic_files import replace_file
from .studies.study import Images

Draw = Callable[[Tensor, Sequence[str], Sequence[str], str], Any]
"""From images ``(R, C, H, W)`` or ``(R, C, 3, H, W)``, R names, C labels and a title to a matplotlib figure."""

TRUTH = "data"  # name of the line of real images


def save_images(path: Path, images: Mapping[str, Images]) -> None:
    """Write images of one member.

    Args:
        path: the file; its folder must exist.
        images: title -> images.
    """
    content = {
        title: {
            "values": _copy(each.values),
            "labels": list(each.labels),
            "truth": None if each.truth is None else _copy(each.truth),
        }
        for title, each in images.items()
    }
    replace_file(path, lambda file: torch.save(content, file))


def _copy(images: Tensor) -> Tensor:
    """Return a copy on the CPU: a slice of a batch would be written with the memory of the whole batch."""
    return images.detach().float().cpu().clone()


def load_images(path: Path) -> dict[str, Images]:
    """Read title -> images from a file of :func:`save_images`."""
    content = torch.load(path, weights_only=True)
    return {title: Images(x["values"], tuple(x["labels"]), x["truth"]) for title, x in content.items()}


def write_pictures(folder: Path, members: Mapping[str, Path], draw: Draw) -> list[Path]:
    """Draw the images of several members side by side, one picture per title, and write them as ``TITLE.png``.

    Args:
        folder: the folder of the pictures, which exists.
        members: name -> file of :func:`save_images`, in the order of the lines. Members without such a file, such as
            those of an earlier version, have no line.
        draw: draws one picture.

    Returns:
        The paths of the pictures.
    """
    found = {name: load_images(path) for name, path in members.items() if path.is_file()}
    titles = dict.fromkeys(title for images in found.values() for title in images)
    paths = []
    for title in titles:
        lines = {name: images[title] for name, images in found.items() if title in images}
        path = folder / f"{title}.png"
        figure = _draw_lines(lines, title, draw)
        replace_file(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=150))  # type: ignore[misc]
        paths.append(path)
    return paths


def _draw_lines(lines: Mapping[str, Images], title: str, draw: Draw) -> Any:
    """Draw a line per member, below one of real images if there are any, as many images as all have."""
    first = next(iter(lines.values()))
    shown = {TRUTH: first.truth} if first.truth is not None else {}
    shown |= {name: images.values for name, images in lines.items()}
    count = min(map(len, shown.values()))
    values = torch.stack([images[:count] for images in shown.values()]).clamp(0, 1)
    return draw(values, list(shown), first.labels[:count], title)
