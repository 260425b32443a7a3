"""Strokes of characters: paths of SVG as polylines, points along them, and pictures."""

from __future__ import annotations

import re

import numpy as np

CURVE_POINTS = 16  # of the polyline of one cubic Bezier curve
SPACING = 0.25  # pixels between the points that a picture is made of

_TOKEN = re.compile(r"([A-Za-z])|([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_NUMBERS = {"M": 2, "C": 6, "S": 4}  # of each command


def parse_path(text: str) -> np.ndarray:
    """Convert the path of one stroke, an SVG ``d`` of moves and cubic Bezier curves, to a polyline.

    Args:
        text: commands M, C and S, or m, c and s relative to the point before; the first one is a move, and the only.

    Returns:
        Points, float64 ``(P, 2)``: x and y, with y growing downwards.

    Raises:
        ValueError: another command, a wrong number of numbers, or a move elsewhere than at the beginning.

    >>> parse_path("M1,2c0,1,0,2,0,3")[[0, -1]]
    array([[1., 2.],
           [1., 5.]])
    """
    at = np.zeros(2)
    control: np.ndarray | None = None  # the second control point of the curve before
    pieces: list[np.ndarray] = []
    for command, numbers in _commands(text):
        start = at if command.islower() else np.zeros(2)
        points = numbers.reshape(-1, 2) + start
        if command in "Mm":
            pieces.append(points)
        else:
            if command in "Ss":  # the first control point mirrors the second one of the curve before
                first = at if control is None else 2 * at - control
                points = np.concatenate([first[None], points])
            pieces.append(_curve(np.concatenate([at[None], points]))[1:])
            control = points[1]
        at = points[-1]
    return np.concatenate(pieces)


def _commands(text: str) -> list[tuple[str, np.ndarray]]:
    """Return the commands of a path with their numbers, where a command that is repeated may be left out."""
    error = ValueError(f"expected the path of one stroke, a move M and then curves C or S, got {text!r}")
    if _TOKEN.sub("", text).strip(" ,\t\n\r"):
        raise error
    found: list[tuple[str, list[float]]] = []
    for letter, number in _TOKEN.findall(text):
        if letter:
            found.append((letter, []))
        elif found:
            found[-1][1].append(float(number))
        else:
            raise error

    commands: list[tuple[str, np.ndarray]] = []
    for letter, numbers in found:
        count = _NUMBERS.get(letter.upper())
        if count is None or not numbers or len(numbers) % count:
            raise error
        commands += [(letter, np.array(numbers[i : i + count])) for i in range(0, len(numbers), count)]
    if not commands or [letter in "Mm" for letter, _ in commands] != [True] + [False] * (len(commands) - 1):
        raise error
    return commands


def _curve(controls: np.ndarray) -> np.ndarray:
    """Return points of a cubic Bezier curve from its four control points ``(4, 2)``."""
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    a, b, c, d = controls
    points: np.ndarray = (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d
    return points


def points_along(line: np.ndarray, number: int) -> np.ndarray:
    """Return points at equal distances along a polyline, its ends among them.

    Args:
        line: points ``(P, 2)``.
        number: the number of points, 2 at least.

    Returns:
        float64 ``(number, 2)``.

    >>> points_along(np.array([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]), 3)[:, 0]
    array([0., 2., 4.])
    """
    lengths = np.linalg.norm(np.diff(line, axis=0), axis=1)
    distance = np.concatenate([[0.0], lengths.cumsum()])
    wanted = np.linspace(0, distance[-1], number)
    return np.stack([np.interp(wanted, distance, line[:, axis]) for axis in (0, 1)], 1)


def draw_strokes(strokes: list[np.ndarray], side: int, extent: float, radius: float) -> np.ndarray:
    """Draw strokes: the pixels whose centre is at most ``radius`` away from one.

    Args:
        strokes: polylines ``(P, 2)``, in the unit of ``extent``.
        side: height and width of the picture in pixels.
        extent: height and width of the picture in the unit of the strokes.
        radius: in pixels, at most 1.

    Returns:
        boolean ``(side, side)``.
    """
    picture = np.zeros((side, side), bool)
    near = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(1, -1, 2)
    for line in strokes:
        scaled = line * side / extent
        length = np.linalg.norm(np.diff(scaled, axis=0), axis=1).sum()
        points = points_along(scaled, max(2, int(np.ceil(length / SPACING)) + 1))
        pixels = np.floor(points)[:, None].astype(int) + near
        inside = (np.square(pixels + 0.5 - points[:, None]).sum(-1) <= radius**2) & (pixels >= 0).all(-1)
        x, y = pixels[inside & (pixels < side).all(-1)].T
        picture[y, x] = True
    return picture
