"""Pictures of single values: images, strings, classes, sequences and vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .figure import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 0.62  # inches, of a cell of a grid
CHANGED, UNCHANGED = "#D55E00", "0.8"  # colours of frames
SYMBOLS = "·abcdefghijklmnopqrstuvwxyz"
LEAST_SIDE = 4  # pixels, of values that are shown as an image
COLOUR_CHANNELS = (3, 4)


class Cells:
    """Pictures of the values of one modality, on common scales.

    An image is grey, or in colour if it has three or four channels; a sequence or a vector has a curve per dimension;
    tokens and classes are letters and numbers, the likeliest ones of probabilities.

    Args:
        truth: values ``(N, *event)``.
        lengths: numbers of valid steps of sequences, ``(N,)``; None if all have all steps.
        symbols: the characters of tokens 0, 1, ..; a token beyond them is shown as its number.

    Attributes:
        whole: True for tokens and classes.
        image: True for images.
        width: of a cell, in inches.
    """

    def __init__(self, truth: Tensor, lengths: Tensor | None = None, symbols: str = SYMBOLS):
        self.truth = truth
        self.lengths = lengths
        self.symbols = symbols
        shape = tuple(truth.shape[1:])
        self.whole = not truth.is_floating_point()
        self.pixels = image_size(shape) if not self.whole and lengths is None else ()
        self.image = bool(self.pixels)
        if self.whole:
            self.width = max(0.4, 0.085 * (shape[0] if shape else 1) + 0.15)
        else:
            self.width = HEIGHT * self.pixels[1] / self.pixels[0] if self.image else 1.1
        self.limits = (float(truth.min()), float(truth.max()))

    def draw(self, ax: Axes, value: Tensor, row: int, changed: bool = False) -> None:
        """Draw a value in axes.

        Args:
            ax: the axes.
            value: ``(*event)``, or class probabilities ``(*event, C)``.
            row: the row whose length it has.
            changed: True for a frame in the colour of change.
        """
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set(color=CHANGED if changed else UNCHANGED, linewidth=1.6 if changed else 0.8)
        x = value.detach().cpu()
        length = None if self.lengths is None else int(self.lengths[row])
        if self.whole:
            ax.text(0.5, 0.5, self._text(x, length), ha="center", va="center", fontsize=9, family="monospace")
        elif self.image:
            draw_image(ax, x.reshape(self.pixels).numpy(), max(1.0, self.limits[1]))
        else:
            curves = x[:length].reshape(len(x[:length]), -1).numpy() if x.dim() else x.reshape(1, 1).numpy()
            for i, curve in enumerate(curves.T):
                color = PALETTE[i % len(PALETTE)]
                ax.plot(curve, color=color, linewidth=1.1, marker="." if len(curve) == 1 else None)
            margin = 0.08 * max(self.limits[1] - self.limits[0], 1e-6)
            ax.set_ylim(self.limits[0] - margin, self.limits[1] + margin)
            ax.set_xlim(-0.5, max(1, self.truth.shape[1] if self.truth.dim() > 1 else 1) - 0.5)

    def _text(self, x: Tensor, length: int | None) -> str:
        """Return tokens as characters, and a class as its number."""
        is_draw = x.shape == self.truth.shape[1:]
        tokens = x.long() if is_draw else x.argmax(-1)
        if not tokens.dim():
            return str(int(tokens))
        cut = tokens.flatten() if length is None or is_draw else tokens[:length].flatten()
        text = "".join(self.symbols[t] if t < len(self.symbols) else f"[{t}]" for t in cut.tolist())
        return text.rstrip(self.symbols[:1]) if length is not None else text


def image_size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``(H, W)`` or ``(C, H, W)`` of values that can be shown as images, ``()`` of others.

    Args:
        shape: of one value.
    """
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[0] in COLOUR_CHANNELS)
    return shape if is_image and min(shape[-2:]) >= LEAST_SIDE else ()


def draw_image(ax: Axes, pixels: np.ndarray, highest: float = 1.0) -> None:
    """Draw an image: grey with 0 in white, or in colour, which is cut to [0, 1].

    Args:
        ax: the axes.
        pixels: ``(H, W)``, or ``(C, H, W)`` with three or four channels.
        highest: the grey level that is black.
    """
    if pixels.ndim == 3:
        ax.imshow(np.clip(np.moveaxis(pixels, 0, -1), 0, 1), interpolation="nearest")
    else:
        ax.imshow(pixels, cmap="gray_r", vmin=0, vmax=highest, interpolation="nearest")
